"""Oracle 4: a rewritten file and the live route make the same model of it. Both routes of the command line, on examples
and on copies of installed files; what they wrote is imported in a process that has seen nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import rezero_convert as rz
from rezero_convert import cli, targets
from rezero_convert.capture.homes import home

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class File:
    """A file, a model of it with inputs, and how many alphas that has by its configuration."""

    module: str
    model: str
    inputs: str
    alphas: int
    setup: str = ""
    exact: bool = True


_TEXT = "hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99"
_IDS = "{'input_ids': torch.randint(99, (2, 8))}"
_IMAGE = "torch.randn(2, 3, 64, 64)"
FILES = (
    File("examples/gpt.py", "GPT(GPTConfig(9, 8, 2, 2, 16))", "torch.randint(9, (2, 8))", 2 * 2),
    File("examples/resnet.py", "ResNet(BasicBlock, (1, 2))", "torch.randn(2, 3, 32, 32)", 3),
    File("examples/resnet.py", "ResNet(Bottleneck, (1, 2))", "torch.randn(2, 3, 32, 32)", 3, exact=False),
    File("examples/encoder.py", "EncoderLayer(16, 2, 32)", "torch.randn(2, 5, 16)", 2),
    File("torchvision.models.resnet", "ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7)", _IMAGE, 5),
    File(
        "torchvision.models.resnet",
        "ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, zero_init_residual=True)",
        _IMAGE,
        4,
        exact=False,
    ),
    File("torchvision.models.convnext", "ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)])", _IMAGE, 3),
    File("torchvision.models.vision_transformer", "VisionTransformer(64, 32, 2, 2, 32, 64)", _IMAGE, 2 * 2),
    File(
        "timm.models.vision_transformer",
        "VisionTransformer(img_size=64, patch_size=32, embed_dim=32, depth=2, num_heads=2)",
        _IMAGE,
        2 * 2,
    ),
    File(
        "timm.models.swin_transformer_v2",
        "SwinTransformerV2(img_size=64, window_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 2))",
        _IMAGE,
        2 * 3,
    ),
    File("transformers.models.gpt2.modeling_gpt2", f"GPT2LMHeadModel(GPT2Config({_TEXT}))", _IDS, 2 * 2),
    File("transformers.models.llama.modeling_llama", f"LlamaForCausalLM(LlamaConfig({_TEXT}))", _IDS, 2 * 2),
    File("transformers.models.bert.modeling_bert", f"BertModel(BertConfig({_TEXT}))", _IDS, 2 * 2),
)


def _name(case: Any) -> str | None:
    return f"{case.module} {case.model.partition(',')[0]}" if isinstance(case, File) else None


def original(case: File) -> Path:
    if case.module.endswith(".py"):
        return ROOT / case.module
    package = __import__(case.module.partition(".")[0])
    return Path(str(package.__file__)).parent.joinpath(*case.module.split(".")[1:]).with_suffix(".py")


def gradients(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Output and gradients, in eval mode."""
    output = zoo.call(model.eval(), inputs)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"output": output.detach(), **grads}


def zeros(model: nn.Module) -> list[str]:
    """Parameters that are all zero: the start values that matter here, and the same for every seed."""
    return sorted(name for name, value in model.named_parameters() if not value.any())


def fresh(request: str) -> None:
    """Runs in the fresh process: build the model from the rewritten text, give it the live route's weights."""
    asked = json.loads(request)
    torch.manual_seed(0)
    namespace = vars(targets.load(Path(asked["file"]), Path(asked["text"])))
    assert namespace["__file__"] == asked["text"]
    model = targets.model_of("--model", asked["model"], namespace)
    told = torch.load(asked["live"])
    start = zeros(model)
    alphas = [name for name, value in model.named_parameters() if name in told["alphas"] and not value.any()]
    model.load_state_dict(told["state"])  # strict: the same names
    torch.save({"zeros": start, "alphas": alphas, "found": gradients(model, told["inputs"])}, asked["to"])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The live route's model of a case, made once: alphas random, weights and gradients in a file."""
    made: dict[File, Path] = {}

    def build(case: File) -> Path:
        if case not in made:
            torch.manual_seed(0)
            namespace = vars(targets.load(original(case)))
            model = targets.model_of("--model", case.model, namespace)
            inputs = targets.evaluate("--inputs", case.inputs, namespace)
            converted = rz.convert(model, inputs, verify=False)
            alphas = dict(rz.alphas(converted))
            assert len(alphas) == case.alphas
            start = zeros(converted)
            for alpha in alphas.values():
                nn.init.normal_(alpha)
            made[case] = tmp_path_factory.mktemp("live") / "live.pt"
            torch.save(
                {
                    "alphas": list(alphas),
                    "state": converted.state_dict(),
                    "inputs": inputs,
                    "zeros": start,
                    "found": gradients(converted, inputs),
                },
                made[case],
            )
        return made[case]

    return build


def agrees(case: File, text: Path, live: Path) -> None:
    request = {"file": str(original(case)), "text": str(text), "model": case.model, "live": str(live)}
    request["to"] = str(text.with_suffix(".pt"))
    code = "import conftest, test_agreement, sys; test_agreement.fresh(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(request)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    told, answer = torch.load(live), torch.load(request["to"])
    assert answer["zeros"] == told["zeros"]
    assert set(answer["alphas"]) == set(told["alphas"])
    assert answer["found"].keys() == told["found"].keys()
    for name, expected in told["found"].items():
        torch.testing.assert_close(answer["found"][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def convert(case: File, folder: Path, *options: str) -> Path:
    """A copy of the file, changed by the command line."""
    copy = folder / original(case).name
    copy.write_bytes(original(case).read_bytes())
    assert cli.main([str(copy), "--write", "--quiet", *options]) == 0
    assert copy.read_bytes() != original(case).read_bytes()
    return copy


@pytest.mark.parametrize("case", FILES, ids=_name)
def test_the_static_route_agrees_with_the_live_one(case: File, tmp_path: Path, built: Any) -> None:
    text = convert(case, tmp_path)
    agrees(case, text, built(case))
    assert cli.main([str(text), "--check", "--quiet"]) == 0  # a second run has nothing to do


_QUICK = ("examples/gpt.py", "torchvision.models.resnet", "transformers.models.llama.modeling_llama")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.module in _QUICK else pytest.mark.slow, id=_name(case))
        for case in FILES
        if case.exact
    ],
)
def test_the_exact_route_writes_the_same_file(case: File, tmp_path: Path, built: Any) -> None:
    exact = ["--model", case.model, "--inputs", case.inputs]
    static, recorded = tmp_path / "static", tmp_path / "recorded"
    static.mkdir()
    recorded.mkdir()
    command = [sys.executable, "-c", "import conftest, sys; from rezero_convert.cli import main; sys.exit(main())"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], env=ENVIRONMENT, capture_output=True, text=True, check=False)

    copy = recorded / original(case).name
    copy.write_bytes(original(case).read_bytes())
    first = run(str(copy), "--write", *exact)
    assert first.returncode == 0, first.stderr
    assert "imported in a fresh process" in first.stderr
    if copy.read_text() != convert(case, static).read_text():
        agrees(case, copy, built(case))  # what only the run could tell
    second = run(str(copy), "--check", *exact)
    assert second.returncode == 0, second.stderr
    assert "nothing to rewrite" in second.stderr


def test_the_comparison_notices_a_wrong_file(tmp_path: Path, built: Any) -> None:
    case = FILES[0]
    text = convert(case, tmp_path)
    right = text.read_text()
    for old, new in (
        ("self.alpha_mlp * self.mlp(x)", "self.alpha_attn * self.mlp(x)"),
        ("x + self.alpha_attn * self.attn(x)", "self.alpha_attn * x + self.attn(x)"),
        ("alpha_mlp", "alpha_fc"),
        ("torch.zeros(1)", "torch.ones(1)"),
    ):
        assert old in right
        text.write_text(right.replace(old, new))
        with pytest.raises(AssertionError):
            agrees(case, text, built(case))


# What a file cannot say for one instance only


SHARED = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, plain):
        super().__init__()
        self.fc = nn.ReLU() if plain else nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.fc(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Block(4, False)
        self.second = Block(4, PLAIN)

    def forward(self, x):
        return self.second(self.first(x))
"""


def shared(folder: Path, name: str, plain: bool) -> Path:
    file = folder / f"{name}.py"
    file.write_text(SHARED.replace("PLAIN", str(plain)))
    return file


def exactly(file: Path, **options: Any) -> Any:
    model = targets.load(file).Net()
    return rz.convert_source(file.read_text(), file=str(file), model=model, example_inputs=torch.randn(2, 4), **options)


def test_a_pattern_cannot_part_instances_that_share_their_text(tmp_path: Path) -> None:
    file = shared(tmp_path, "rz_parted", plain=False)
    with pytest.raises(rz.ConversionError, match=r"rz_parted.py:11:16: second is excluded by 'second', first is not"):
        exactly(file, exclude="second")
    assert "self.alpha * torch.relu(self.fc(x))" in exactly(file).text


def test_a_block_that_is_refused_for_one_instance_is_refused_for_all(tmp_path: Path) -> None:
    file = shared(tmp_path, "rz_refused", plain=True)
    result = exactly(file)
    assert result.text == file.read_text()
    reasons = [site.reason for site in result.report.plan.sites if site.path == "first"]
    assert len(reasons) == 1
    assert "second shares this text with first, but cannot be gated: no linear" in reasons[0]


NORMS = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(depth)])

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = x + torch.tanh(layer(norm(x)))
        return x
"""


@pytest.mark.parametrize("depth", [1, 2])
def test_norms_that_one_expression_makes_go_together(depth: int, tmp_path: Path) -> None:
    file = tmp_path / f"rz_norms_{depth}.py"
    file.write_text(NORMS)
    model, x = targets.load(file).Net(depth), torch.randn(2, 4)
    made = rz.convert_source(NORMS, file=str(file), model=model, example_inputs=x)
    assert made.text == rz.convert_source(NORMS, file=str(file)).text
    assert "self.norms = nn.ModuleList([nn.Identity() for _ in range(depth)])" in made.text
    new = file.with_name(f"rz_norms_{depth}_new.py")
    new.write_text(made.text)
    live, twin = rz.convert(model, x), targets.load(new).Net(depth)
    for _, gate in rz.alphas(live):
        torch.nn.init.uniform_(gate, 0.5, 1.5)
    twin.load_state_dict(live.state_dict())
    assert not torch.equal(live(x), model(x))
    assert torch.allclose(live(x), twin(x))


STAYS = (
    ("        return x", "        return x * self.norms[0].weight", "its list is also used at FILE:14"),
    ("        return x", "        return x * norm.eps", "its list is also used at FILE:14"),
    ("zip(self.norms, self.layers)", "zip(*map(list, (self.norms, self.layers)))", "its list is also used at FILE:12"),
    ("for _ in range(depth)])\n\n", "for _ in range(depth)])\n        self.norms.append(nn.Linear(4, 4))\n\n", ""),
)


@pytest.mark.parametrize(("old", "new", "reason"), STAYS)
def test_norms_of_a_list_with_another_use_stay(old: str, new: str, reason: str) -> None:
    text = NORMS.replace(old, new)
    assert text != NORMS
    made = rz.convert_source(text, file="FILE")
    assert "nn.LayerNorm(4) for _ in range(depth)" in made.text
    assert "nn.Identity" not in made.text
    norms = [norm for site in made.report.plan.converted for norm in site.norms]
    assert all((norm.action, norm.reason) == ("keep", reason) for norm in norms if reason)


DERIVED = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(4), nn.LayerNorm(4)
        self.norm.bias = None
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + torch.tanh(self.fc(self.norm(x)))
        return x + torch.tanh(self.out(self.other(x)))


class Derived(Block):
    def forward(self, x):
        x = x + torch.tanh(self.fc(self.norm(x)))
        return torch.tanh(self.out(self.other(x)))
"""


def test_a_norm_that_a_derived_class_needs_stays_and_the_blocks_are_gated() -> None:
    made = rz.convert_source(DERIVED, file="FILE")
    assert "x = x + self.alpha_fc * torch.tanh(self.fc(x))" in made.text
    assert "return x + self.alpha_out * torch.tanh(self.out(self.other(x)))" in made.text
    assert "self.other = nn.LayerNorm(4)" in made.text
    assert "self.norm" not in made.text  # with what was set on it
    kept = [norm for site in made.report.plan.converted for norm in site.norms if norm.action == "keep"]
    assert [(norm.path, norm.reason) for norm in kept] == [("other", "it is still read at FILE:20")]


CONDITIONAL = """\
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, width, init=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Net(nn.Module):
    def __init__(self, init=None):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = Scale(4, init=init) if init else nn.Identity()

    def forward(self, x):
        return x + self.scale(torch.tanh(self.linear(x)))
"""


def test_a_gate_that_the_model_was_made_without_starts_at_one_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rz_conditional.py"
    file.write_text(CONDITIONAL)
    model, x = targets.load(file).Net(), torch.randn(2, 4)
    made = rz.convert_source(CONDITIONAL, file=str(file), model=model, example_inputs=x)
    assert made.text == rz.convert_source(CONDITIONAL, file=str(file)).text
    assert "Scale(4, init=1.0) if init else nn.Identity()" in made.text


CHOICE = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.first = first

    def forward(self, x):
        return x + torch.tanh(self.c(x)) + torch.tanh(self.a(x) if self.first else self.b(x))
"""


@pytest.mark.parametrize("first", [True, False])
def test_the_names_do_not_depend_on_the_arm_that_ran(first: bool, tmp_path: Path) -> None:
    file = tmp_path / f"rz_choice_{first}.py"
    file.write_text(CHOICE)
    model, x = targets.load(file).Net(first), torch.randn(2, 4)
    names = {name for name, _ in rz.alphas(rz.convert(model, x))}
    text = rz.convert_source(CHOICE, file=str(file)).text
    assert len(names) == 2
    assert all(f"self.{name} = " in text for name in names)


def test_a_copy_keeps_its_line_ends(tmp_path: Path) -> None:
    case = next(case for case in FILES if case.module == "torchvision.models.resnet")
    copy = tmp_path / original(case).name
    copy.write_bytes(original(case).read_bytes().replace(b"\n", b"\r\n"))
    assert cli.main([str(copy), "--check", "--quiet"]) == 1
    assert cli.main([str(copy), "--write", "--quiet"]) == 0
    plain = tmp_path / "plain"
    plain.mkdir()
    assert copy.read_bytes() == convert(case, plain).read_bytes().replace(b"\n", b"\r\n")
    assert cli.main([str(copy), "--check", "--quiet"]) == 0


@pytest.mark.parametrize("name", ["modeling_llama.py", "unheard_of.py"])
def test_only_a_copy_has_another_home(name: str, tmp_path: Path) -> None:
    import transformers

    real = Path(transformers.__file__).parent / "models" / "llama" / "modeling_llama.py"
    copy, other = tmp_path / name, tmp_path / "modeling_gpt2.py"
    copy.write_bytes(real.read_bytes())
    other.write_text("class Own:\n    pass\n")
    assert home(str(copy)) == (str(real) if name == real.name else str(copy))
    assert home(str(other)) == str(other)


@pytest.mark.parametrize("name", ["rl", "traverse"])
def test_a_file_that_only_shares_its_name_with_an_installed_one_is_no_copy(name: str, tmp_path: Path) -> None:
    """sympy has modules of these names without a class."""
    file = tmp_path / f"{name}.py"
    (tmp_path / f"beside_{name}.py").write_text("WIDTH = 4\n")
    file.write_text(f"from torch import nn\nfrom beside_{name} import WIDTH\n\n\nclass Net(nn.Module):\n    pass\n")
    assert home(str(file)) == str(file)
    module = targets.load(file)
    assert (module.__name__, module.__file__, module.WIDTH) == (name, str(file), 4)


SCALED_OR_NOT = """\
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, module, scaled):
        super().__init__()
        self.module = module
        self.gamma = nn.Parameter(torch.full((4,), 0.1)) if scaled else None

    def forward(self, x):
        if self.gamma is not None:
            return x + self.gamma * torch.tanh(self.module(x))
        return x + torch.tanh(self.module(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Residual(nn.Linear(4, 4), True), Residual(nn.Linear(4, 4), False)

    def forward(self, x):
        return self.second(self.first(x))
"""


def test_a_branch_with_a_gate_of_its_own_counts_for_the_names(tmp_path: Path) -> None:
    file = tmp_path / "rz_scaled_or_not.py"
    file.write_text(SCALED_OR_NOT)
    live = rz.convert(targets.load(file).Net(), torch.randn(2, 4))
    assert [name for name, _ in rz.alphas(live)] == ["first.gamma", "second.alpha_module"]
    assert "x + self.alpha_module * torch.tanh(self.module(x))" in rz.convert_source(SCALED_OR_NOT, file=str(file)).text
