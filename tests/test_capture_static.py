"""Static capture: graphs from text, nothing executed."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import operator
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import fx

from rezero_convert import sources
from rezero_convert.capture import static
from rezero_convert.capture.trace import Trace, origin
from rezero_convert.errors import ConversionError
from rezero_convert.plan import Span

HEAD = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from functools import partial
"""
_numbers = itertools.count()


def file_of(body: str) -> str:
    name = f"<static test {next(_numbers)}>"
    sources.register(name, HEAD + textwrap.dedent(body))
    return name


def trace_of(file: str, cls: str, method: str = "forward") -> Trace:
    found = [
        trace
        for trace in static.traces(file)
        if trace.root.cls == cls
        and any(origin(n).frames[-1].place.name == method for n in trace.graph.nodes if n.op == "placeholder")
    ]
    assert len(found) == 1, [t.root.cls for t in static.traces(file)]
    return found[0]


def capture(body: str, cls: str = "M") -> Trace:
    return trace_of(file_of(body), cls)


def named(trace: Trace, target: object) -> list[fx.Node]:
    return [n for n in trace.graph.nodes if n.target is target or n.target == target]


def adds_of(trace: Trace) -> list[fx.Node]:
    return [n for n in trace.graph.nodes if n.op != "output" and origin(n).facts.type == "add"]


def ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def package_file(package: str, path: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(next(iter(spec.submodule_search_locations))) / path)


# Nothing found, nothing run


def test_syntax_error_says_where() -> None:
    sources.register("<broken>", "class M(\n")
    with pytest.raises(ConversionError, match=r"<broken>:1: syntax error"):
        static.traces("<broken>")


def test_too_deep_nesting_is_an_error() -> None:
    file = file_of("class M(nn.Module):\n    def forward(self, x):\n        return " + " + ".join(["x"] * 5000))
    with pytest.raises(ConversionError, match="nested too deeply"):
        static.traces(file)


def test_missing_file_is_an_error() -> None:
    with pytest.raises(ConversionError, match="no source text"):
        static.classes("nowhere/to/be/found.py")


def test_classes_that_are_no_modules_are_left_out() -> None:
    file = file_of("""
        class Config: ...
        class Plain(Config):
            def forward(self, x): return x + 1
        class M(nn.Module):
            class Inner(nn.Module):
                def forward(self, x): return x
            def forward(self, x): return x
        class Sub(M): ...
        def make():
            class Local(M): ...
    """)
    assert static.classes(file) == ("M", "M.Inner", "Sub", "make.<locals>.Local")


def test_nothing_of_the_file_is_executed_or_imported(tmp_path: Path) -> None:
    (tmp_path / "helper_never_imported.py").write_text(
        "raise RuntimeError\nimport torch.nn as nn\nclass B(nn.Module): pass"
    )
    file = tmp_path / "model.py"
    file.write_text(
        "from helper_never_imported import B\nopen('trap')\n1 / 0\n"
        "class M(B):\n    def forward(self, x):\n        return x + x\n"
    )
    assert static.classes(str(file)) == ("M",)
    assert len(adds_of(static.traces(str(file))[0])) == 1
    assert "helper_never_imported" not in sys.modules


@pytest.mark.parametrize(
    "body",
    [
        "return x",
        "return undefined(x)",
        "return self.nothing.at.all(x)[0].y(*a, **k)",
        "for a, *b in x: x = x + a\n        return x",
        "return [*x, *(y for y in x)][::-1][0]",
        "del x; global q; assert x; pass",
        "while True:\n            try: x = x + 1\n            except E as e: break\n            finally: x = -x",
        "match x:\n            case [a, b]: return a\n            case _: return self.forward(x)",
        "f = lambda *a, k=1, **kw: f(*a)\n        return f(x)",
        "def g(y): return g(y)\n        return g(x)",
        "with torch.no_grad() as t, self.x: x = t\n        return x",
        "return (yield x)",
        "x[0], self.y, z = x; x[1:2] += z; return x",
        "return {**x, 1: x}[x] if x else {a: b for a, b in x}",
        "return super().forward(x) + super().nothing(x)",
        "return x + " + "(" * 60 + "x" + ")" * 60,
        "return " + " + ".join(["x"] * 400),
        "return f'{x!r:>{x}}' + b'' + ... + 1j",
        "self.x = self; return self.x.x.x(x)",
    ],
)
def test_odd_code_does_not_crash(body: str) -> None:
    file = file_of(f"class M(nn.Module):\n    def forward(self, x, a=(), *args, k=None, **kw):\n        {body}\n")
    assert static.traces(file)


# Data flow


def test_plain_residual() -> None:
    trace = capture("""
        class M(nn.Module):
            def __init__(self, d, norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.GELU):
                super().__init__()
                self.norm1 = norm_layer(d)
                self.fc, self.act = nn.Linear(d, d), act_layer()
            def forward(self, x):
                x = x + self.act(self.fc(self.norm1(x)))
                return x
    """)
    (add,) = adds_of(trace)
    skip, branch = add.args
    assert skip.op == "placeholder"
    assert [n.target for n in (branch, branch.args[0], branch.args[0].args[0])] == ["act", "fc", "norm1"]
    norm = origin(named(trace, "norm1")[0]).facts
    assert (norm.kind, norm.norm) == ("norm", "layer")
    assert origin(branch).facts.kind == "activation"
    assert origin(named(trace, "fc")[0]).facts.weight
    assert trace.root.inputs == [skip]
    assert trace.root.outputs == [add]
    frame = origin(add).frames[0]
    assert sources.segment(frame.span) == "x + self.act(self.fc(self.norm1(x)))"
    assert (frame.owner, frame.place.qualname) == ("", "M.forward")


def test_augmented_assignment_has_the_statements_span() -> None:
    trace = capture("""
        class M(nn.Module):
            def forward(self, x, y):
                y += x
                return y
    """)
    (add,) = adds_of(trace)
    assert add.target is operator.iadd
    assert [a.name for a in add.args] == ["y", "x"]
    assert origin(add).facts.inplace
    assert sources.segment(origin(add).frames[0].span) == "y += x"


@pytest.mark.parametrize("form", ["torch.add(x, y)", "x.add(y)", "x.add_(y)", "operator.add(x, y)", "plus(x, y)"])
def test_spellings_of_add(form: str) -> None:
    trace = capture(f"""
        import operator
        from torch import add as plus
        class M(nn.Module):
            def forward(self, x, y):
                return {form}
    """)
    (add,) = adds_of(trace)
    assert [a.name for a in add.args[:2]] == ["x", "y"]
    assert sources.segment(origin(add).frames[0].span) == form


def test_arms_of_a_condition_join_in_a_choice() -> None:
    trace = capture("""
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.down = nn.Conv2d(3, 3, 1), None
            def forward(self, x):
                identity = x
                out = self.conv(x)
                if self.downsample is not None:
                    identity = self.downsample(x)
                return out + identity
    """)
    (add,) = adds_of(trace)
    joined = add.args[1]
    assert joined.target is static.choice
    assert {n.target for n in joined.args} == {"x", "downsample"}
    assert origin(named(trace, "downsample")[0]).facts.weight  # unknown: may hold one


def test_an_arm_that_returns_does_not_reach_the_join() -> None:
    trace = capture("""
        class M(nn.Module):
            def forward(self, x, y):
                z = x
                if self.flag:
                    z = y
                    return z
                return z + y
    """)
    (add,) = adds_of(trace)
    assert [a.name for a in add.args] == ["x", "y"]
    assert named(trace, static.choice)[0].args == (named(trace, "y")[0], add)


def test_loop_over_a_module_list() -> None:
    trace = capture("""
        class M(nn.Module):
            def __init__(self, n):
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(n)])
                self.norms = nn.ModuleList()
                for _ in range(n):
                    self.norms.append(nn.LayerNorm(4))
            def forward(self, x):
                for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
                    x = x + layer(norm(x))
                return x
    """)
    (add,) = adds_of(trace)
    assert add.args[1].target == "layers.*"
    assert add.args[1].args[0].target == "norms.*"
    assert origin(named(trace, "norms.*")[0]).facts.norm == "layer"


def test_a_flag_set_in_a_loop_hides_no_arm() -> None:
    trace = capture("""
        class M(nn.Module):
            def forward(self, xs, y):
                first = True
                for x in xs:
                    if first:
                        y = x
                    else:
                        y = y + x
                    first = False
                return y
    """)
    assert len(adds_of(trace)) == 1


def test_sequential_elements_are_entered() -> None:
    trace = capture("""
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                layers = [nn.Linear(4, 4)]
                layers.append(nn.ReLU(inplace=True))
                self.block = nn.Sequential(*layers, nn.Dropout())
            def forward(self, x):
                return x + self.block(x)
    """)
    (add,) = adds_of(trace)
    assert [n.target for n in trace.graph.nodes if n.op == "call_module"] == ["block.0", "block.1", "block.2"]
    assert [c.path for c in trace.calls] == ["", "block"]
    assert origin(named(trace, "block.1")[0]).facts.inplace
    assert origin(named(trace, "block.0")[0]).frames[0].owner == ""
    assert add.args[1].target == "block.2"


def test_submodules_of_the_file_are_inlined_with_their_owner() -> None:
    trace = capture(
        """
        class Output(nn.Module):
            def __init__(self):
                super().__init__()
                self.dense, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            def forward(self, hidden, residual):
                return self.norm(self.dense(hidden) + residual)
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.output = nn.Linear(4, 4), Output()
            def forward(self, x):
                return self.output(self.inner(x), x)
        """,
        "Outer",
    )
    (add,) = adds_of(trace)
    assert add.args[1].name == "x"
    assert add.args[0].target == "output.dense"
    assert named(trace, "inner")[0] in ancestors(add)
    (frame,) = origin(add).frames
    assert (frame.owner, frame.place.qualname) == ("output", "Output.forward")
    call = origin(add).call
    assert (call.path, call.cls, call.parent) == ("output", "Output", trace.root)
    assert [n.target for n in call.outputs] == ["output.norm"]


def test_helper_functions_show_the_call_site() -> None:
    trace = capture("""
        def drop_add(x, residual, p):
            out = F.dropout(x, p)
            return residual + out
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
            def _mix(self, x, y):
                return drop_add(y, x, 0.1)
            def forward(self, x):
                return self._mix(x, self.fc(x))
    """)
    (add,) = adds_of(trace)
    inner, outer = origin(add).frames
    assert (inner.owner, inner.place.qualname) == (None, "drop_add")
    assert (outer.owner, outer.place.qualname) == ("", "M._mix")
    assert sources.segment(outer.span) == "drop_add(y, x, 0.1)"
    assert add.args[0].name == "x"


def test_checkpoint_wrappers_run_what_they_are_given() -> None:
    trace = capture("""
        from torch.utils.checkpoint import checkpoint
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
            def forward(self, x):
                def inner(y):
                    return self.fc(y)
                if self.training:
                    x = x + checkpoint(inner, x, use_reentrant=False)
                else:
                    x = x + some.unknown.wrapper(inner, x)
                return x
    """)
    assert [a.args[1].target for a in adds_of(trace)] == ["fc", "fc"]
    assert {origin(n).frames[0].place.qualname for n in named(trace, "fc")} == {"M.forward"}


def test_methods_nobody_calls_are_entries_and_called_ones_are_not() -> None:
    file = file_of("""
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
            def forward_features(self, x): return x + self.fc(x)
            def extra(self, x): return x + self.fc(x)
            def init_weights(self, m): m.weight.zero_()
            def forward(self, x): return self.forward_features(x)
    """)
    places = [origin(next(iter(t.graph.nodes))).frames[0].place.name for t in static.traces(file)]
    assert places == ["forward", "extra"]


# Attribute types


@pytest.mark.parametrize(
    ("init", "kind", "norm", "optional"),
    [
        ("self.m = nn.BatchNorm2d(4)", "norm", "batch", False),
        ("self.m = LN(4)", "norm", "layer", False),
        ("norm = norm or nn.BatchNorm2d; self.m = norm(4)", "norm", "batch", False),
        ("if norm is None:\n            norm = nn.GroupNorm\n        self.m = norm(1, 4)", "norm", "group", False),
        ("self.m = nn.LayerNorm(4) if flag else nn.Identity()", "norm", "layer", True),
        ("if flag:\n            self.m = nn.LayerNorm(4)", "norm", "layer", True),
        ("self.m = make(4)", "linear", None, False),
        ("self.m = {'a': nn.ReLU, 'b': nn.GELU}[flag]()", "activation", None, False),
        ("self.m = TABLE[flag]", "activation", None, False),
        ("self.m = nn.utils.weight_norm(nn.Linear(4, 4))", "linear", None, False),
        ("self._build()", "linear", None, False),
        ("self.m = F.gelu", "activation", None, False),
        ("self.m = unknown(4)", "other", None, False),
    ],
)
def test_attribute_types(init: str, kind: str, norm: str | None, optional: bool) -> None:
    file = file_of(f"""
from torch.nn import LayerNorm as LN
class Instances(dict): ...
TABLE = Instances({{"gelu": nn.GELU, "relu": nn.ReLU}})
def make(d):
    layer = nn.Conv1d(d, d, 1)
    return layer
class M(nn.Module):
    def __init__(self, flag, norm=None):
        super().__init__()
        {init}
    def _build(self):
        self.m = nn.Linear(4, 4)
    def forward(self, x):
        return self.m(x)
""")
    (node,) = [n for n in trace_of(file, "M").graph.nodes if n.op in ("call_module", "call_function")]
    found = origin(node).facts
    assert (found.kind, found.norm, found.optional) == (kind, norm, optional)


def test_parameters_keep_their_constructor() -> None:
    trace = capture(
        """
        class Scale(nn.Module):
            def __init__(self, d, value=1e-5):
                super().__init__()
                self.gamma = nn.Parameter(value * torch.ones(d))
                self.register_buffer("table", torch.zeros(3))
            def forward(self, x): return x * self.gamma + self.table
        class M(nn.Module):
            def __init__(self, d, init=None):
                super().__init__()
                self.ls = Scale(d) if init else nn.Identity()
                self.own = nn.Parameter(torch.zeros(1))
            def forward(self, x): return self.ls(x) * self.own
        """
    )
    meta = {n.target: n.meta for n in trace.graph.nodes if n.op == "get_attr"}
    assert meta["ls.gamma"]["constructor"] == "value * torch.ones(d)"
    assert meta["ls.gamma"]["conditional"]
    assert meta["ls.table"]["buffer"]
    assert meta["own"]["constructor"] == "torch.zeros(1)"
    assert not meta["own"]["conditional"]
    assert not meta["own"]["buffer"]


def test_norms_by_base_class() -> None:
    trace = capture("""
        class Plain(nn.LayerNorm): ...
        class Fused(nn.BatchNorm2d):
            def __init__(self, d, act_layer=nn.ReLU):
                super().__init__(d)
                self.act = act_layer()
            def forward(self, x): return self.act(super().forward(x))
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = Plain(4), Fused(4)
            def forward(self, x): return self.b(self.a(x))
    """)
    plain = origin(named(trace, "a")[0]).facts
    assert (plain.type, plain.norm, plain.fused) == ("Plain", "layer", False)
    (call,) = [c for c in trace.calls if c.path == "b"]
    assert (call.facts.norm, call.facts.fused) == ("batch", True)


# Helpers for findings


def test_adds_of_a_function() -> None:
    file = file_of("""
        class M(nn.Module):
            def forward(self, x, y):
                x += y
                z = x - y * 2
                z = torch.add(z, x.add_(y))
                seen.add
                return F.relu(z)
    """)
    node = next(n for n in ast.walk(sources.tree(file)) if isinstance(n, ast.FunctionDef))
    texts = [sources.segment(span) for span in static.adds(file, node)]
    assert texts == ["x += y", "x - y * 2", "torch.add(z, x.add_(y))", "x.add_(y)"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("if c:\n    a(1)\nelse:\n    b(1)", True),
        ("if c:\n    a(1)\nb(1)", False),
        ("if c:\n    a(1)\n    return\nb(1)", True),
        ("if c:\n    if d:\n        a(1)\n        return\n    q()\nb(1)", True),
        ("if c:\n    return\nelse:\n    a(1)\nb(1)", False),
        ("x = a(1) if c else b(1)", True),
        ("x = a(1) + b(1)", False),
        ("for i in c:\n    if d:\n        a(1)\n        continue\n    b(1)", True),
        ("for i in c:\n    if d:\n        a(1)\n        break\nb(1)", False),
        ("match c:\n    case 1: a(1)\n    case _: b(1)", True),
    ],
)
def test_exclusive(code: str, expected: bool) -> None:
    name = f"<static test {next(_numbers)}>"
    sources.register(name, "def f(c, d):\n" + textwrap.indent(code, "    "))

    def span(function: str) -> Span:
        calls = (n for n in ast.walk(sources.tree(name)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
        return next(sources.span_of(name, n) for n in calls if n.func.id == function)  # type: ignore[attr-defined]

    assert static.exclusive(span("a"), span("b")) is expected
    assert static.exclusive(span("b"), span("a")) is expected


# Real files


def test_torchvision_bottleneck() -> None:
    trace = trace_of(package_file("torchvision", "models/resnet.py"), "Bottleneck")
    (add,) = adds_of(trace)
    out, identity = add.args
    assert out.target == "bn3"
    assert origin(out).facts.norm == "batch"
    x = named(trace, "x")[0]
    assert x in identity.args
    assert {n.target for n in ancestors(out)} >= {"x", "conv1", "bn1", "relu", "conv2", "bn2", "conv3"}
    assert trace.root.outputs[0].target == "relu"


def test_timm_norms_through_reexports() -> None:
    trace = trace_of(package_file("timm", "models/vision_transformer.py"), "Block")
    norms = {c.path: c.facts.norm for c in trace.calls if c.facts.kind == "norm"}
    assert norms["norm1"] == norms["norm2"] == "layer"
    own = [n for n in adds_of(trace) if origin(n).frames[0].owner == ""]
    assert len(own) == 2
    assert own[0] in own[1].args
    assert next(n for n in trace.graph.nodes if n.target == "ls1.gamma").meta["conditional"]


def test_llama_norm_is_a_call() -> None:
    trace = trace_of(package_file("transformers", "models/llama/modeling_llama.py"), "LlamaDecoderLayer")
    calls = {c.path: c for c in trace.calls}
    assert calls["input_layernorm"].cls == "LlamaRMSNorm"
    own = [n for n in adds_of(trace) if origin(n).frames[0].owner == ""]
    assert [n.args[0].name for n in own] == ["hidden_states", own[0].name]
    assert named(trace, "self_attn.o_proj")[0] in own[0].args
    assert origin(named(trace, "mlp.act_fn")[0]).facts.kind == "activation"


def test_bert_skip_and_branch_meet_in_the_output_module() -> None:
    trace = trace_of(package_file("transformers", "models/bert/modeling_bert.py"), "BertAttention")
    (add,) = [n for n in adds_of(trace) if origin(n).call.cls == "BertSelfOutput"]
    assert origin(add).frames[0].owner == "output"
    assert add.args[1].name == "hidden_states"
    assert add.args[1] in ancestors(add.args[0])
    assert named(trace, "self.query")[0] in ancestors(add.args[0])


@pytest.mark.parametrize(
    ("package", "folder"), [("timm", "layers"), ("torchvision", "models"), ("torch", "nn/modules")]
)
def test_whole_folders_do_not_crash(package: str, folder: str) -> None:
    count = 0
    for path in sorted(Path(package_file(package, folder)).glob("*.py")):
        for trace in static.traces(str(path)):
            trace.graph.lint()
            count += 1
            assert all("origin" in n.meta for n in trace.graph.nodes if n.op != "output")
    assert count > 10


def test_torch_objects_are_the_real_ones() -> None:
    trace = capture("""
        from torch.nn import functional as tf
        class M(nn.Module):
            def forward(self, x): return tf.softmax(torch.matmul(x, x.mT), dim=-1)
    """)
    assert named(trace, torch.nn.functional.softmax)
    assert named(trace, torch.matmul)


def test_what_is_a_tensor_or_a_tuple_is_followed_as_what_is_called_on_it() -> None:
    trace = capture("""
        def scan(x, state):
            return x if not state else (x, x * 2)

        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
            def forward(self, x, cache=None):
                out = scan(self.fc(x), cache is not None)
                if cache is not None:
                    y, last = out
                else:
                    y = out
                return x + y.transpose(1, 2)
    """)
    (add,) = adds_of(trace)
    (fc,) = (node for node in trace.graph.nodes if node.op == "call_module")
    above = [add]
    for node in above:
        above += [one for one in node.all_input_nodes if one not in above]
    assert fc in above


def test_a_tuple_and_what_follows_it_are_no_sum() -> None:
    trace = capture("""
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
            def forward(self, x, more):
                found = self.fc(x)
                outputs = (x,) + more[1:]
                return outputs[0] + found
    """)
    (add,) = adds_of(trace)
    assert [node.op for node in add.args] == ["placeholder", "call_module"]
