"""Source files before and after: hand-written plans, golden text."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

import rezero_convert as rz
from rezero_convert.errors import ConversionError
from rezero_convert.plan import Activation, Gate, Norm, Operand, Place, Plan, Repair, Site, Span
from rezero_convert.rewrite.source import Rewritten, rewrite

FILE = "model.py"


def dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


def span(text: str, part: str, nth: int = 0) -> Span:
    """The span of the nth occurrence of `part`; line ends of any kind count as one."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    start = -1
    for _ in range(nth + 1):
        start = text.index(part, start + 1)

    def position(offset: int) -> tuple[int, int]:
        return text.count("\n", 0, offset) + 1, len(text[text.rfind("\n", 0, offset) + 1 : offset].encode())

    return Span(FILE, *position(start), *position(start + len(part)))


def operand(text: str, part: str, index: int | str = 1, nth: int = 0) -> Operand:
    return Operand(Place("model", "Block.forward", FILE, 1), span(text, part, nth), index)


def gate(text: str, part: str, alpha: str = "alpha", child: str = "", index: int | str = 1, **more: object) -> Gate:
    return Gate(operand(text, part, index), alpha, child, part, **more)  # type: ignore[arg-type]


def norm(text: str, part: str, attribute: str, path: str = "", **more: object) -> Norm:
    at = operand(text, part, 0)
    return Norm(path or attribute, "LayerNorm", "layer", "pre", "bypass", "", at, attribute, **more)  # type: ignore[arg-type]


def site(at: Span | None, *gates: Gate, cls: str = "Block", path: str = "", **more: object) -> Site:
    if at is None and gates and gates[0].at is not None:
        at = gates[0].at.span
    return Site("converted", "RZ101", "", path, cls, None, at, gates=gates, **more)  # type: ignore[arg-type]


def run(text: str, *sites: Site) -> Rewritten:
    return rewrite(text, Plan(sites), FILE)


FORWARD = "    def forward(self, x):\n        return x + self.f(x)\n"


def simple(code: str, child: str = "f", imports: str = "import torch\nfrom torch import nn\n", **more: object) -> str:
    """The `__init__` that a block with this one gets."""
    init = textwrap.indent(dedent(code), "    ")
    text = f"{imports}\n\nclass Block(nn.Module):\n{init}\n{FORWARD}"
    result = run(text, site(None, gate(text, "x + self.f(x)", child=child, **more))).text  # type: ignore[arg-type]
    assert "return x + self.alpha * self.f(x)" in result
    body = result.partition("class Block(nn.Module):\n")[2].partition("    def forward")[0]
    return textwrap.dedent(body).strip("\n") + "\n"


# --- what is left alone, what is refused ---


def test_a_file_without_converted_sites_comes_back_identical() -> None:
    text = "\ufeffclass A:\r\n\tdef f(self, x):\r\n\t\treturn x + 1"
    refused = Site("refused", "RZ901", "", "", "A", None, span(text, "x + 1"))
    assert rewrite(text, Plan((refused,)), FILE) == Rewritten(text)


def test_sites_of_other_files_are_not_ours() -> None:
    text = "class Block:\n    def forward(self, x):\n        return x + self.f(x)\n"
    other = Span("other.py", 3, 15, 3, 28)
    elsewhere = Site(
        "converted",
        "",
        "",
        "",
        "Block",
        None,
        other,
        gates=(Gate(Operand(Place("", "", "other.py", 1), other, 1), "alpha", "", ""),),
    )
    assert rewrite(text, Plan((elsewhere,)), FILE) == Rewritten(text)


def test_text_that_does_not_parse_is_refused_with_its_line() -> None:
    with pytest.raises(ConversionError, match=r"model\.py:2"):
        rewrite("x = 1\ndef (:\n", Plan(()), FILE)


def test_text_that_is_put_together_is_no_add_of_tensors() -> None:
    renamed = 'def renamed(key):\n    return "encoder." + key[8:18] + key[20:]\n'
    assert not rz.convert_source(renamed).report.plan.sites


def test_a_gate_outside_of_every_class_is_refused() -> None:
    text = "def f(block, x):\n    return x + block(x)\n"
    with pytest.raises(ConversionError, match="not in a class"):
        run(text, site(None, gate(text, "x + block(x)")))


def test_instances_decided_differently_are_refused() -> None:
    text = GPT
    one = site(None, gate(text, "x + self.attn(self.ln_1(x))"), norms=(norm(text, "self.ln_1(x)", "ln_1"),), path="h.0")
    kept = Norm("ln_1", "LayerNorm", "layer", "pre", "keep", "", operand(text, "self.ln_1(x)", 0), "ln_1")
    two = site(None, gate(text, "x + self.attn(self.ln_1(x))"), norms=(kept,), path="h.1")
    with pytest.raises(ConversionError, match=r"h\.0 and h\.1 were decided differently"):
        run(text, one, two)


def test_a_norm_that_is_still_read_is_refused() -> None:
    text = GPT.replace("return x", "return x * self.ln_1.eps")
    with pytest.raises(ConversionError, match=r"it is still read at model\.py:\d+$"):
        run(text, *gpt_sites(text))


def test_a_slot_that_is_not_literal_is_refused() -> None:
    text = dedent("""
        from torch import nn
        class Block(nn.Module):
            def __init__(self, n):
                super().__init__()
                self.f = nn.Sequential(*[nn.LayerNorm(4) for _ in range(n)])
            def forward(self, x):
                return x + self.f(x)
    """)
    slot = Norm("f.0", "LayerNorm", "layer", "pre", "slot", "", None, "f")
    with pytest.raises(ConversionError, match="it is held in a list that is not written out"):
        run(text, site(None, gate(text, "x + self.f(x)"), norms=(slot,)))


# --- whole blocks ---

GPT = dedent("""
    import torch
    import torch.nn as nn


    class Block(nn.Module):
        # the usual one

        def __init__(self, config):
            super().__init__()
            self.ln_1 = nn.LayerNorm(config.n_embd)  # before
            self.attn = Attention(config)
            self.ln_2 = nn.LayerNorm(config.n_embd)
            self.mlp = MLP(config)

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))  # attention
            x = x + self.mlp(self.ln_2(x))
            return x
""")


def gpt_sites(text: str) -> tuple[Site, Site]:
    return (
        site(
            None,
            gate(text, "x + self.attn(self.ln_1(x))", "alpha_attn", "attn"),
            norms=(norm(text, "self.ln_1(x)", "ln_1"),),
        ),
        site(
            None,
            gate(text, "x + self.mlp(self.ln_2(x))", "alpha_mlp", "mlp"),
            norms=(norm(text, "self.ln_2(x)", "ln_2"),),
        ),
    )


def test_gpt_block() -> None:
    result = run(GPT, *gpt_sites(GPT), *gpt_sites(GPT))
    assert result.text == dedent("""
        import torch
        import torch.nn as nn


        class Block(nn.Module):
            # the usual one

            def __init__(self, config):
                super().__init__()
                self.attn = Attention(config)
                self.alpha_attn = nn.Parameter(torch.zeros(1))
                self.mlp = MLP(config)
                self.alpha_mlp = nn.Parameter(torch.zeros(1))

            def forward(self, x):
                x = x + self.alpha_attn * self.attn(x)  # attention
                x = x + self.alpha_mlp * self.mlp(x)
                return x
    """)
    assert result.notes == ()


def test_post_norm_encoder_layer() -> None:
    text = dedent("""
        import torch
        from torch import nn

        class Layer(nn.Module):
            def __init__(self, d, dropout, norm_layer=nn.LayerNorm):
                super().__init__()
                self.self_attn = nn.MultiheadAttention(d, 4)
                self.dropout = nn.Dropout(dropout)
                self.norm1 = norm_layer(d)
                self.norm2 = norm_layer(d)

                self.linear1 = nn.Linear(d, 4 * d)
                self.linear2 = nn.Linear(4 * d, d)

            def forward(self, src):
                src2 = self.self_attn(src, src, src)[0]
                src = src + self.dropout(src2)
                src = self.norm1(src)
                return self.norm2(src + self.linear2(self.linear1(src).relu()))
    """)
    result = run(
        text,
        site(
            None,
            gate(text, "src + self.dropout(src2)", "alpha_self_attn", "self_attn"),
            norms=(norm(text, "self.norm1(src)", "norm1"),),
            cls="Layer",
        ),
        site(
            None,
            gate(text, "src + self.linear2(self.linear1(src).relu())", "alpha_linear2", "linear2"),
            norms=(norm(text, "self.norm2(src + self.linear2(self.linear1(src).relu()))", "norm2"),),
            cls="Layer",
        ),
    )
    assert result.text == dedent("""
        import torch
        from torch import nn

        class Layer(nn.Module):
            def __init__(self, d, dropout, norm_layer=nn.LayerNorm):
                super().__init__()
                self.self_attn = nn.MultiheadAttention(d, 4)
                self.alpha_self_attn = nn.Parameter(torch.zeros(1))
                self.dropout = nn.Dropout(dropout)

                self.linear1 = nn.Linear(d, 4 * d)
                self.linear2 = nn.Linear(4 * d, d)
                self.alpha_linear2 = nn.Parameter(torch.zeros(1))

            def forward(self, src):
                src2 = self.self_attn(src, src, src)[0]
                src = src + self.alpha_self_attn * self.dropout(src2)
                return src + self.alpha_linear2 * self.linear2(self.linear1(src).relu())
    """)
    assert result.notes == ("model.py:5: argument `norm_layer` of `Layer.__init__` is not used any more",)


RESNET = dedent("""
    import torch
    from torch import nn


    def conv3x3(i, o, stride=1):
        return nn.Conv2d(i, o, 3, stride, 1, bias=False)


    class Block(nn.Module):
        def __init__(self, i, o, stride=1, downsample=None):
            super().__init__()
            self.conv1 = conv3x3(i, o, stride)
            self.bn1 = nn.BatchNorm2d(o)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(o)
            self.downsample = downsample

        def forward(self, x):
            identity = x

            out = self.relu(self.bn1(self.conv1(x)))
            out = self.conv2(out)
            out = self.bn2(out)

            if self.downsample is not None:
                identity = self.downsample(x)

            out += identity
            out = self.relu(out)
            return out


    class Net(nn.Module):
        def __init__(self, zero_init_residual=True):
            super().__init__()
            self.body = nn.Sequential(Block(8, 8), Block(8, 16, 2, nn.Conv2d(8, 16, 1, 2)))
            if zero_init_residual:
                for m in self.modules():
                    if isinstance(m, Block) and m.bn2.weight is not None:
                        nn.init.constant_(m.bn2.weight, 0)
""")


def resnet_site(path: str, norms: tuple[Norm, ...] = (), repairs: tuple[Repair, ...] = ()) -> Site:
    act = Activation("ReLU", operand(RESNET, "self.relu(out)", 0), "move", "")
    return site(
        None,
        gate(RESNET, "out += identity", child="conv2", index=0),
        path=path,
        activation=act,
        norms=norms,
        repairs=repairs,
    )


def test_resnet_block_keeps_its_norms_and_undoes_the_zero_init() -> None:
    result = run(
        RESNET,
        resnet_site("body.0", repairs=(Repair("body.0.bn2.weight", "ones"),)),
        resnet_site("body.1", repairs=(Repair("body.1.bn2.weight", "ones"),)),
    )
    assert (
        "        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)\n"
        "        self.alpha = nn.Parameter(torch.zeros(1))\n        self.bn2" in result.text
    )
    assert "nn.init.constant_(m.bn2.weight, 1)" in result.text
    assert "self.alpha * self.relu(out)" in result.text


def test_batch_norms_that_go_leave_a_bias() -> None:
    norms = (
        Norm(
            "body.0.bn1",
            "BatchNorm2d",
            "batch",
            "inside",
            "bypass",
            "",
            operand(RESNET, "self.bn1(self.conv1(x))", 0),
            "bn1",
            "body.0.conv1",
        ),
        Norm(
            "body.0.bn2",
            "BatchNorm2d",
            "batch",
            "end",
            "bypass",
            "",
            operand(RESNET, "self.bn2(out)", 0),
            "bn2",
            "body.0.conv2",
        ),
    )
    text = run(RESNET, resnet_site("body.0", norms)).text
    init = text.partition("class Block(nn.Module):\n")[2].partition("    def forward")[0]
    assert textwrap.dedent(init) == dedent("""
        def __init__(self, i, o, stride=1, downsample=None):
            super().__init__()
            self.conv1 = conv3x3(i, o, stride)
            self.conv1.bias = nn.Parameter(torch.zeros(self.conv1.weight.shape[0]))
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=True)
            self.alpha = nn.Parameter(torch.zeros(1))
            self.downsample = downsample

    """)
    assert text.endswith("        self.body = nn.Sequential(Block(8, 8), Block(8, 16, 2, nn.Conv2d(8, 16, 1, 2)))\n")


# --- the alpha's line ---


def test_after_the_child_and_its_comments() -> None:
    assert simple("""
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(1, 1)  # a long
                                      # story
            # the next one
            self.g = nn.Linear(1, 1)
    """) == dedent("""
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(1, 1)  # a long
                                      # story
            self.alpha = nn.Parameter(torch.zeros(1))
            # the next one
            self.g = nn.Linear(1, 1)
    """)


def test_after_an_if_whose_arms_both_make_the_child() -> None:
    assert simple("""
        def __init__(self, wide):
            super().__init__()
            if wide:
                self.f = nn.Linear(1, 2)
            else:
                self.f = nn.Linear(1, 1)
            self.g = 1
    """) == dedent("""
        def __init__(self, wide):
            super().__init__()
            if wide:
                self.f = nn.Linear(1, 2)
            else:
                self.f = nn.Linear(1, 1)
            self.alpha = nn.Parameter(torch.zeros(1))
            self.g = 1
    """)


def test_in_the_only_arm_that_makes_the_child_the_branch_needs() -> None:
    assert simple("""
        def __init__(self, wide):
            super().__init__()
            self.f = None
            if wide:
                self.f = nn.Linear(1, 2)
    """) == dedent("""
        def __init__(self, wide):
            super().__init__()
            self.f = None
            if wide:
                self.f = nn.Linear(1, 2)
                self.alpha = nn.Parameter(torch.zeros(1))
    """)


def test_after_the_if_when_the_branch_can_do_without_the_child() -> None:
    text = dedent("""
        import torch
        from torch import nn
        class Block(nn.Module):
            def __init__(self, wide):
                super().__init__()
                if wide:
                    self.g = nn.Linear(1, 1)
            def forward(self, x):
                h = x.sin()
                if self.wide:
                    h = self.g(h)
                return x + h
    """)
    result = run(text, site(None, gate(text, "x + h", "alpha", "g"))).text
    assert "            self.g = nn.Linear(1, 1)\n        self.alpha = nn.Parameter" in result


@pytest.mark.parametrize("finish", ["self.post_init()", "self.apply(self._init_weights)", "self.reset_parameters()"])
def test_without_a_child_before_the_finishing_call(finish: str) -> None:
    assert simple(
        f"""
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(1, 1)

            # at last
            {finish}
    """,
        child="",
    ) == dedent(f"""
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(1, 1)
            self.alpha = nn.Parameter(torch.zeros(1))

            # at last
            {finish}
    """)


def test_a_class_without_init_gets_one() -> None:
    head = 'import torch\nfrom torch import nn\n\n\nclass Block(nn.Module):\n    """A block."""\n\n    scale = 2\n\n'
    rest = "    # applies it\n    @decorated\n    def forward(self, x):\n        return x + {}self.f(x)\n"
    text = head + rest.format("")
    assert run(text, site(None, gate(text, "x + self.f(x)"))).text == (
        head
        + "    def __init__(self, *args, **kwargs):\n"
        + "        super().__init__(*args, **kwargs)\n"
        + "        self.alpha = nn.Parameter(torch.zeros(1))\n\n"
        + rest.format("self.alpha * ")
    )


def test_an_init_on_one_line_is_unfolded() -> None:
    assert simple("""
        def __init__(self): super().__init__(); self.f = nn.Linear(1, 1)
    """) == dedent("""
        def __init__(self):
            super().__init__(); self.f = nn.Linear(1, 1)
            self.alpha = nn.Parameter(torch.zeros(1))
    """)


def test_device_and_dtype_of_the_child_are_repeated() -> None:
    assert simple("""
        def __init__(self, device=None, dtype=None):
            dd = {'device': device, 'dtype': dtype}
            super().__init__()
            self.f = nn.Linear(1, 1, **dd)
    """).endswith("    self.alpha = nn.Parameter(torch.zeros(1, **dd))\n")
    assert simple("""
        def __init__(self, device=None):
            super().__init__()
            self.f = nn.Linear(1, 1, device=device)
    """).endswith("    self.alpha = nn.Parameter(torch.zeros(1, device=device))\n")


@pytest.mark.parametrize(
    ("init", "shape", "value"),
    [
        (1.0, (1,), "torch.ones(1)"),
        (0.5, (1,), "torch.full((1,), 0.5)"),
        (0.0, (8, 1, 1), "torch.zeros(8, 1, 1)"),
        (0.5, (8, 1), "torch.full((8, 1), 0.5)"),
    ],
)
def test_start_values_and_shapes(init: float, shape: tuple[int, ...], value: str) -> None:
    code = "def __init__(self):\n    super().__init__()\n    self.f = nn.Linear(1, 1)\n\n"
    assert simple(code, init=init, shape=shape).endswith(f"self.alpha = nn.Parameter({value})\n")


@pytest.mark.parametrize(
    ("imports", "new", "value"),
    [
        ("import torch.nn as nn\n", "import torch\nimport torch.nn as nn\n", "nn.Parameter(torch.zeros(1))"),
        ("from torch import nn\n", "import torch\nfrom torch import nn\n", "nn.Parameter(torch.zeros(1))"),
        ("import torch\n", None, "torch.nn.Parameter(torch.zeros(1))"),
        ("import torch as th\n", None, "th.nn.Parameter(th.zeros(1))"),
        ("import torch.nn\n", None, "torch.nn.Parameter(torch.zeros(1))"),
        ("import torch\nfrom torch.nn import Module, Parameter\n", None, "Parameter(torch.zeros(1))"),
        (
            "import math\n\nfrom timm import x\n",
            "import math\n\nfrom timm import x\nimport torch\n",
            "torch.nn.Parameter(torch.zeros(1))",
        ),
        (
            '"""Doc."""\nfrom __future__ import annotations\n',
            '"""Doc."""\nfrom __future__ import annotations\n\nimport torch\n',
            "torch.nn.Parameter(torch.zeros(1))",
        ),
    ],
)
def test_imports_in_each_spelling(imports: str, new: str | None, value: str) -> None:
    text = f"{imports}\n\nclass Block(Base):\n    def __init__(self):\n        self.f = F()\n\n{FORWARD}"
    result = run(text, site(None, gate(text, "x + self.f(x)", child="f"))).text
    assert result.partition("\n\n\nclass")[0] + "\n" == (new or imports)
    assert f"        self.alpha = {value}\n" in result


def test_subclasses_that_skip_the_init_get_their_own_line() -> None:
    text = dedent("""
        import torch
        from torch import nn
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.f = nn.Linear(1, 1)
            def forward(self, x):
                return x + self.f(x)
        class Child(Block):
            def __init__(self):
                nn.Module.__init__(self)
                self.f = nn.Linear(2, 2)
        class Other(Block):
            def __init__(self):
                super().__init__()
    """)
    result = run(text, site(None, gate(text, "x + self.f(x)", child="f"))).text
    assert result.count("self.alpha = ") == 2
    assert "        self.f = nn.Linear(2, 2)\n        self.alpha = nn.Parameter(torch.zeros(1))\n" in result


# --- norms ---


def dropped(init: str, extra: str = "") -> str:
    """What is left of an `__init__` whose `norm` goes."""
    head = f"import torch\nfrom torch import nn\n\n\nclass Block(nn.Module):\n{textwrap.indent(dedent(init), '    ')}\n"
    text = (
        head
        + "    def forward(self, x):\n        return x + self.f(self.norm(x))\n"
        + textwrap.indent("\n" + dedent(extra) if extra else "", "    ")
    )
    block = site(None, gate(text, "x + self.f(self.norm(x))", child="f"), norms=(norm(text, "self.norm(x)", "norm"),))
    result = run(text, block).text
    body = result.partition("class Block(nn.Module):\n")[2].replace(
        "        self.alpha = nn.Parameter(torch.zeros(1))\n", ""
    )
    return textwrap.dedent(body).replace("return x + self.alpha * self.f(x)", "...")


def test_an_if_left_empty_goes() -> None:
    assert dropped("""
        def __init__(self, rms):
            self.f = F()
            if rms:
                self.norm = RMS()
            else:
                self.norm = nn.LayerNorm(1)
            self.g = 1
    """) == dedent("""
        def __init__(self, rms):
            self.f = F()
            self.g = 1

        def forward(self, x):
            ...
    """)


def test_an_arm_left_empty_turns_the_condition() -> None:
    assert dropped("""
        def __init__(self, rms):
            self.f = F()
            if rms is None:
                self.norm = RMS()
            else:
                self.g = 1
    """) == dedent("""
        def __init__(self, rms):
            self.f = F()
            if rms is not None:
                self.g = 1

        def forward(self, x):
            ...
    """)


def test_an_else_left_empty_goes() -> None:
    assert dropped("""
        def __init__(self, rms):
            self.f = F()
            if rms:
                self.g = 1
            elif f():
                self.norm = RMS()
            else:
                # plain
                self.norm = N()
    """) == dedent("""
        def __init__(self, rms):
            self.f = F()
            if rms:
                self.g = 1

        def forward(self, x):
            ...
    """)


def test_shared_and_joined_assignments() -> None:
    assert dropped("""
        def __init__(self):
            self.f = F()
            self.norm = self.other = N()
            self.norm, self.b = N(), 2
            self.x = 1; self.norm: nn.Module = N()
            self.add_module("norm", N())
    """) == dedent("""
        def __init__(self):
            self.f = F()
            self.other = N()
            self.b = 2
            self.x = 1

        def forward(self, x):
            ...
    """)


def test_comments_and_blank_lines_around_a_constructor() -> None:
    assert dropped("""
        def __init__(self):
            # layers
            self.norm = N()
            self.f = F()

            # the norm
            self.norm = N(
                1,  # one
            )

            self.g = 1

            self.norm = N()
    """) == dedent("""
        def __init__(self):
            # layers
            self.f = F()

            self.g = 1

        def forward(self, x):
            ...
    """)


def test_statements_that_initialize_the_norm_go_with_it() -> None:
    assert dropped(
        """
        def __init__(self):
            self.f = F()
            self.norm = N()
    """,
        """

        def reset(self):
            # gentle
            nn.init.ones_(self.norm.weight)
            self.norm.bias.data.zero_()

        def reset_others(self):
            self.f.reset()
            if getattr(self.norm, "bias", None) is not None:
                nn.init.zeros_(self.norm.bias)
    """,
    ) == dedent("""
        def __init__(self):
            self.f = F()

        def forward(self, x):
            ...

        def reset(self):
            # gentle
            pass

        def reset_others(self):
            self.f.reset()
    """)


def test_the_norm_of_a_child_class() -> None:
    text = dedent("""
        import torch
        from torch import nn
        class Mlp(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.LayerNorm(1)
                self.fc = nn.Linear(1, 1)
            def forward(self, x):
                return self.fc(self.norm(x))
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = Mlp()
            def forward(self, x):
                return x + self.mlp(x)
    """)
    inner = Norm("mlp.norm", "LayerNorm", "layer", "pre", "bypass", "", operand(text, "self.norm(x)", 0), "norm")
    result = run(text, site(None, gate(text, "x + self.mlp(x)", child="mlp"), norms=(inner,))).text
    assert "LayerNorm" not in result
    assert "return self.fc(x)" in result


SLOTS = {
    "nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))": ("0", "nn.Sequential(nn.Identity(), nn.Linear(4, 4))"),
    "nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])": ("1", "nn.ModuleList([nn.Linear(4, 4), nn.Identity()])"),
    "nn.Sequential(OrderedDict([('n', N()), ('l', L())]))": (
        "n",
        "nn.Sequential(OrderedDict([('n', nn.Identity()), ('l', L())]))",
    ),
    "nn.ModuleDict({'n': N(), 'l': L()})": ("n", "nn.ModuleDict({'n': nn.Identity(), 'l': L()})"),
    "nn.Sequential(nn.Sequential(A(), N()), L())": ("0.1", "nn.Sequential(nn.Sequential(A(), nn.Identity()), L())"),
    "nn.Sequential(N()) if a else nn.Sequential(M())": (
        "0",
        "nn.Sequential(nn.Identity()) if a else nn.Sequential(nn.Identity())",
    ),
}


@pytest.mark.parametrize("before", SLOTS)
def test_slots_become_identities(before: str) -> None:
    key, after = SLOTS[before]
    head = "import torch\nfrom torch import nn\nclass Block(nn.Module):\n    def __init__(self):\n"
    text = f"{head}        self.f = {before}\n{FORWARD}"
    slot = Norm(f"layers.3.f.{key}", "LayerNorm", "layer", "pre", "slot", "", None, "f")
    result = run(text, site(None, gate(text, "x + self.f(x)", child="f"), norms=(slot,), path="layers.3")).text
    assert f"        self.f = {after}\n" in result


# --- gates that were there ---


def regated(made: str, init: float = 0.0) -> str:
    head = "import torch\nfrom torch import nn\nclass Block(nn.Module):\n    def __init__(self, dim, c):\n"
    rest = "    def forward(self, x):\n        return x + self.gamma * self.f(x)\n"
    text = f"{head}        self.gamma = {made}\n{rest}"
    there = Gate(None, "gamma", "f", "self.f(x)", existing=True, init=init)
    result = run(text, site(span(text, "x + self.gamma * self.f(x)"), there)).text
    assert "return x + self.gamma * self.f(x)" in result
    return result.partition("self.gamma = ")[2].partition("\n")[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nn.Parameter(c * torch.ones(dim))", "nn.Parameter(torch.zeros(dim))"),
        ("nn.Parameter(torch.ones(dim, device=d) * c)", "nn.Parameter(torch.zeros(dim, device=d))"),
        ("nn.Parameter(torch.ones((dim)), requires_grad=True)", "nn.Parameter(torch.zeros(dim), requires_grad=True)"),
        ("nn.Parameter(torch.full((dim,), c, dtype=t))", "nn.Parameter(torch.zeros((dim,), dtype=t))"),
        ("nn.Parameter(c * torch.ones((dim))) if c > 0 else None", "nn.Parameter(torch.zeros(dim)) if c > 0 else None"),
        ("nn.Parameter(data=torch.ones(1).mul_(c))", "nn.Parameter(data=torch.zeros(1))"),
        ("nn.Parameter(torch.tensor(c))", "nn.Parameter(torch.zeros_like(torch.tensor(c)))"),
        ("nn.Parameter(torch.zeros(1))", "nn.Parameter(torch.zeros(1))"),
    ],
)
def test_existing_gates_start_at_zero(before: str, after: str) -> None:
    assert regated(before) == after


def test_existing_gates_start_elsewhere() -> None:
    assert regated("nn.Parameter(c * torch.ones(dim))", 1.0) == "nn.Parameter(torch.ones(dim))"
    assert regated("nn.Parameter(c * torch.ones(dim))", 0.5) == "nn.Parameter(0.5 * torch.ones(dim))"
    assert regated("nn.Parameter(make(c))", 0.5) == "nn.Parameter(torch.full_like(make(c), 0.5))"


SCALE = dedent("""
    import torch
    from torch import nn


    class LayerScale(nn.Module):
        def __init__(self, dim, init_values=1e-5):
            super().__init__()
            self.init_values = init_values
            self.gamma = nn.Parameter(torch.empty(dim))
            self.reset_parameters()

        def reset_parameters(self):
            torch.nn.init.constant_(self.gamma, self.init_values)

        def forward(self, x):
            return x * self.gamma


    class Block(nn.Module):
        def __init__(self, dim, init_values=None):
            super().__init__()
            self.attn = Attention(dim)
            self.ls1 = LAYER_SCALE

        def forward(self, x):
            return x + self.ls1(self.attn(x))
""")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LayerScale(dim, init_values=init_values)", "LayerScale(dim, init_values=0.0)"),
        ("LayerScale(dim, init_values)", "LayerScale(dim, 0.0)"),
        ("LayerScale(dim)", "LayerScale(dim, init_values=0.0)"),
    ],
)
def test_an_existing_layer_scale_starts_at_zero(before: str, after: str) -> None:
    text = SCALE.replace("LAYER_SCALE", before)
    there = Gate(None, "ls1.gamma", "attn", "", existing=True)
    result = run(text, site(span(text, "x + self.ls1(self.attn(x))"), there))
    assert result.text == SCALE.replace("LAYER_SCALE", after)


def test_a_layer_scale_without_an_argument_changes_in_its_class() -> None:
    text = (
        SCALE.replace("LAYER_SCALE", "LayerScale(dim)")
        .replace(", init_values=1e-5)", ")")
        .replace("= init_values\n", "= 1e-5\n")
    )
    result = run(
        text, site(span(text, "x + self.ls1(self.attn(x))"), Gate(None, "ls1.gamma", "attn", "", existing=True))
    )
    assert result.text == text.replace("(self.gamma, self.init_values)", "(self.gamma, 0.0)")


def test_a_conditional_layer_scale_starts_at_one_beside_an_alpha() -> None:
    text = SCALE.replace("LAYER_SCALE", "LayerScale(dim, init_values=init_values) if init_values else nn.Identity()")
    result = run(text, site(None, gate(text, "x + self.ls1(self.attn(x))", "alpha", "attn", conditional=True))).text
    assert "self.ls1 = LayerScale(dim, init_values=1.0) if init_values else nn.Identity()\n" in result
    assert "        self.attn = Attention(dim)\n        self.alpha = nn.Parameter(torch.zeros(1))\n" in result
    assert "return x + self.alpha * self.ls1(self.attn(x))" in result


IMPORTED = dedent("""
    import torch
    from torch import nn

    from .scales import Scale


    class Block(nn.Module):
        def __init__(self, dim, init_values=None):
            super().__init__()
            self.linear = nn.Linear(dim, dim)
            self.ls = MADE

        def forward(self, x):
            return x + self.ls(self.linear(x))
""")

SCALES = dedent("""
    import torch
    from torch import nn


    class Scale(nn.Module):
        def __init__(self, dim, init_std=0.02, start=1e-5):
            super().__init__()
            self.std = init_std
            self.gamma = nn.Parameter(start * torch.ones(dim))

        def forward(self, x):
            return x * self.gamma
""")


def imported(folder: Path, made: str, scales: str = SCALES) -> rz.SourceResult:
    """The conversion of a file that imports its LayerScale from the one beside it."""
    (folder / "scales.py").write_text(scales)
    return rz.convert_source(IMPORTED.replace("MADE", made), file=str(folder / "blocks.py"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Scale(dim, init_std=0.1)", "Scale(dim, init_std=0.1, start=0.0)"),
        ("Scale(dim, start=1e-6, init_std=0.1)", "Scale(dim, start=0.0, init_std=0.1)"),
        ("Scale(dim, 0.1, 1e-6)", "Scale(dim, 0.1, 0.0)"),
    ],
)
def test_an_imported_layer_scale_is_set_by_the_argument_that_its_class_fills_it_with(
    before: str, after: str, tmp_path: Path
) -> None:
    assert imported(tmp_path, before).text == IMPORTED.replace("MADE", after)


def test_an_imported_layer_scale_without_a_start_argument_is_refused(tmp_path: Path) -> None:
    fixed = SCALES.replace(", start=1e-5", "").replace("start *", "1e-5 *")
    result = imported(tmp_path, "Scale(dim, init_std=0.1)", fixed)
    assert "ls.gamma" in str(result.report)
    assert result.text == IMPORTED.replace("MADE", "Scale(dim, init_std=0.1)")


def test_an_imported_conditional_layer_scale_starts_at_one(tmp_path: Path) -> None:
    text = imported(tmp_path, "Scale(dim, start=init_values) if init_values else nn.Identity()").text
    assert "self.ls = Scale(dim, start=1.0) if init_values else nn.Identity()\n" in text
    assert "return x + self.alpha * self.ls(self.linear(x))" in text


# --- bytes ---


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", ["    ", "\t", "  "])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_indentation_mark_and_last_line_are_kept(mark: str, end: str, indent: str, last: bool) -> None:
    before = "# -*- coding: utf-8 -*-\n" + GPT.replace("usual", "übliche")
    sites = gpt_sites(before.replace("    ", indent))
    after = run(before, *gpt_sites(before)).text

    def spelled(text: str) -> str:
        text = text.replace("    ", indent)
        return mark + (text if last else text.rstrip("\n")).replace("\n", end)

    assert run(spelled(before), *sites).text == spelled(after)


def test_mixed_line_ends_are_kept_line_by_line() -> None:
    text = GPT.replace("import torch\n", "import torch\r\n", 1).replace("return x\n", "return x\r\n")
    result = run(text, *gpt_sites(text)).text
    assert result.startswith("import torch\r\nimport torch.nn as nn\n")
    assert result.endswith("(x)\n        return x\r\n")
    assert result.count("\r") == 2


def test_no_class_to_hold_the_last_line_end() -> None:
    text = "import torch\nclass Block(B):\n def forward(self, x): return x + self.f(x)\n"
    text += " def __init__(self):\n  self.f = F()"
    result = run(text, site(None, gate(text, "x + self.f(x)", child="f"))).text
    assert result.endswith("\n  self.f = F()\n  self.alpha = torch.nn.Parameter(torch.zeros(1))")


# --- transformers ---


def installed(name: str) -> str:
    """The text of an installed model file, with absolute imports so that a copy can be imported from anywhere."""
    path = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
    return path.read_text(encoding="utf-8")


def absolute(text: str, name: str) -> str:
    text = re.sub(r"^from \.\.\. import", "from transformers import", text, flags=re.M)
    text = re.sub(r"^from \.\.\.(\w)", r"from transformers.\1", text, flags=re.M)
    return re.sub(r"^from \.(\w)", rf"from transformers.models.{name}.\1", text, flags=re.M)


def loaded(text: str, name: str, folder: Path) -> ModuleType:
    """The rewritten file, imported."""
    file = folder / f"rewritten_{name}.py"
    file.write_text(absolute(text, name), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gpt2_sites(text: str) -> tuple[Site, ...]:
    def one(part: str, index: int, alpha: str, child: str, attribute: str) -> Site:
        return site(
            None,
            gate(text, part, alpha, child, index),
            cls="GPT2Block",
            norms=(norm(text, f"self.{attribute}(hidden_states)", attribute),),
        )

    return (
        one("attn_output + residual", 0, "alpha_attn", "attn", "ln_1"),
        one("residual + cross_attn_output", 1, "alpha_crossattention", "crossattention", "ln_cross_attn"),
        one("residual + feed_forward_hidden_states", 1, "alpha_mlp", "mlp", "ln_2"),
    )


def llama_sites(text: str) -> tuple[Site, ...]:
    found = []
    for nth, (child, attribute) in enumerate((("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))):
        at = operand(text, "residual + hidden_states", 1, nth)
        call = norm(text, f"self.{attribute}(hidden_states)", attribute)
        found.append(site(None, Gate(at, f"alpha_{child}", child, ""), cls="LlamaDecoderLayer", norms=(call,)))
    return tuple(found)


def test_gpt2_sets_its_alphas_in_its_own_init_weights() -> None:
    before = installed("gpt2")
    text = run(before, *gpt2_sites(before)).text
    changed = list(difflib.unified_diff(before.split("\n"), text.split("\n"), n=0, lineterm=""))
    assert [line for line in changed if line[:1] in "+-" and line[:3] not in ("+++", "---")] == [
        "-        self.ln_1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_epsilon)",
        "-        self.ln_2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_epsilon)",
        "+        self.alpha_attn = nn.Parameter(torch.zeros(1))",
        "-            self.ln_cross_attn = nn.LayerNorm(hidden_size, eps=config.layer_norm_epsilon)",
        "+            self.alpha_crossattention = nn.Parameter(torch.zeros(1))",
        "+        self.alpha_mlp = nn.Parameter(torch.zeros(1))",
        "-        hidden_states = self.ln_1(hidden_states)",
        "-        hidden_states = attn_output + residual",
        "+        hidden_states = self.alpha_attn * attn_output + residual",
        "-            hidden_states = self.ln_cross_attn(hidden_states)",
        "-            hidden_states = residual + cross_attn_output",
        "+            hidden_states = residual + self.alpha_crossattention * cross_attn_output",
        "-        hidden_states = self.ln_2(hidden_states)",
        "-        hidden_states = residual + feed_forward_hidden_states",
        "+        hidden_states = residual + self.alpha_mlp * feed_forward_hidden_states",
        "+        if isinstance(module, GPT2Block):",
        "+            init.zeros_(module.alpha_attn)",
        '+            if hasattr(module, "alpha_crossattention"):',
        "+                init.zeros_(module.alpha_crossattention)",
        "+            init.zeros_(module.alpha_mlp)",
    ]


def test_llama_gets_an_init_weights() -> None:
    before = installed("llama")
    text = run(before, *llama_sites(before)).text
    assert "\nfrom ... import initialization as init\nfrom ...activations import" in text
    assert text.count("initialization") == before.count("initialization") + 1
    assert dedent("""
            "attentions": LlamaAttention,
        }

        @torch.no_grad()
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, LlamaDecoderLayer):
                init.zeros_(module.alpha_self_attn)
                init.zeros_(module.alpha_mlp)


    @auto_docstring
    class LlamaModel(""").partition("\n")[2] in textwrap.dedent(text)


@pytest.mark.parametrize("cross", [False, True])
def test_an_original_gpt2_checkpoint_loads_with_zero_alphas(tmp_path: Path, cross: bool) -> None:
    before = installed("gpt2")
    module = loaded(run(before, *gpt2_sites(before)).text, "gpt2", tmp_path)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, add_cross_attention=cross)
    check_alphas(transformers.GPT2LMHeadModel(config), module.GPT2LMHeadModel, tmp_path, 6 if cross else 4)


def test_an_original_llama_checkpoint_loads_with_zero_alphas(tmp_path: Path) -> None:
    before = installed("llama")
    module = loaded(run(before, *llama_sites(before)).text, "llama", tmp_path)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
    )
    check_alphas(transformers.LlamaForCausalLM(config), module.LlamaForCausalLM, tmp_path, 4)


def check_alphas(original: nn.Module, converted: type[nn.Module], folder: Path, count: int) -> None:
    original.save_pretrained(folder / "original")  # type: ignore[operator]
    model = converted.from_pretrained(folder / "original")  # type: ignore[attr-defined]
    alphas = [p for name, p in model.named_parameters() if "alpha" in name]
    assert [float(a.detach()) for a in alphas] == [0.0] * count
    ids = torch.arange(6)[None]
    embedded = model.get_input_embeddings()(ids)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1], hidden[0])
    assert hidden[0].shape == embedded.shape
    # A trained checkpoint keeps its alphas.
    with torch.no_grad():
        for index, alpha in enumerate(alphas):
            alpha.fill_(index + 1.0)
    model.save_pretrained(folder / "trained")
    again = converted.from_pretrained(folder / "trained")  # type: ignore[attr-defined]
    assert [float(p.detach()) for name, p in again.named_parameters() if "alpha" in name] == [
        i + 1.0 for i in range(count)
    ]


def test_a_zero_init_in_a_loop_over_the_blocks_is_undone() -> None:
    text = dedent("""
        import torch
        from torch import nn


        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.f = nn.Linear(1, 1)
                self.norm = nn.BatchNorm1d(1)

            def forward(self, x):
                return x + self.norm(self.f(x))


        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.Sequential(*[Block() for _ in range(3)])
                for block in self.blocks:
                    nn.init.zeros_(block.norm.weight)
    """)
    repair = Repair("blocks.1.norm.weight", "ones")
    one = site(None, gate(text, "x + self.norm(self.f(x))", child="f"), path="blocks.1", repairs=(repair,))
    result = run(text, one)
    assert result.text.endswith("            nn.init.ones_(block.norm.weight)\n")
    assert result.notes == ()


def test_a_zero_init_that_is_not_found_is_told() -> None:
    repairs = (Repair("body.0.conv2.weight", "reset"),)
    assert run(RESNET, resnet_site("body.0", repairs=repairs)).notes == (
        "model.py:9: conv2.weight of Block starts at zero, but not by a statement found here",
    )


def test_instances_that_were_refused_are_told() -> None:
    refused = Site("refused", "RZ901", "no skip", "h.1", "Block", None, gpt_sites(GPT)[0].span)
    result = rewrite(GPT, Plan((*gpt_sites(GPT), refused)), FILE)
    assert result.notes == ("model.py:16:13: h.1 run this text too, but were not to be converted: no skip",)


def test_norms_called_in_other_files_are_told() -> None:
    text = GPT
    at = Operand(Place("layers", "Mlp.forward", "layers.py", 1), Span("layers.py", 7, 8, 7, 20), 0)
    inner = Norm("h.0.mlp.norm", "LayerNorm", "layer", "inside", "bypass", "", at, "norm")
    one = site(None, gate(text, "x + self.mlp(self.ln_2(x))", "alpha_mlp", "mlp"), norms=(inner,), path="h.0")
    assert run(text, one).notes == ("model.py: h.0.mlp.norm should go, but the call is in another file: layers.py:7:9",)


TWO_OF_ONE_NAME = """\
import torch
from torch import nn


class Zero(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
"""


def test_a_report_names_the_zero_inits_that_were_undone_and_no_others() -> None:
    made = rz.convert_source(TWO_OF_ONE_NAME)
    for report in (made.report, rz.audit_source(TWO_OF_ONE_NAME)):
        undone, left = report.plan.converted
        assert (undone.form, left.form) == ("identity skip, zero-initialised last layer", "identity skip")
        assert [repair.parameter for repair in (*undone.repairs, *left.repairs)] == ["down.weight"]
        assert str(report).count("undone") == 1
    assert "nn.init.zeros_(self.down.weight)" not in made.text
