"""Gates folded into weights: what must not be folded, and that the rest gives the same outputs without gates."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz
from rezero_convert import folding
from rezero_convert.capture.recorded import record
from rezero_convert.detect.scaling import Unscalable, products, reading, scaling
from rezero_convert.rewrite import modules


class Block(nn.Module):
    """One residual branch, computed by a function of the module and the input."""

    def __init__(self, branch: Callable[[Any, Tensor], Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, child in children.items():
            self.add_module(name, child)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self, x)


class Custom(nn.Module):
    """Linear in nothing that could be scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.sin()) + self.b(x.cos())


class Shifted(nn.BatchNorm1d):
    """A batch norm with a bias that is not zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.bias)


def converted(model: nn.Module, inputs: Any, scale: float | None = None, **options: Any) -> nn.Module:
    """The converted model with gates at `scale`, or at random values, negative ones among them."""
    model = rz.convert(model, inputs, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, alpha in rz.alphas(model):
            alpha.copy_(torch.randn(alpha.shape) if scale is None else torch.full(alpha.shape, scale))
    return model


def outputs(model: nn.Module, inputs: Any, training: bool) -> Tensor:
    torch.manual_seed(2)
    model = copy.deepcopy(model).train(training)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, Tensor) else result[0]


def assert_same(one: nn.Module, other: nn.Module, inputs: Any) -> None:
    for training in (False, True):
        torch.testing.assert_close(outputs(one, inputs, training), outputs(other, inputs, training))


def assert_folded(model: nn.Module, inputs: Any) -> nn.Module:
    """Fold all; nothing may be left of the gates, and the given model is as it was."""
    names = [name for name, _ in rz.alphas(model)]
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = rz.fold(model, inputs)
    assert names
    assert not list(rz.alphas(folded))
    assert not set(names) & set(folded.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_same(model, folded, inputs)
    for module in folded.modules():
        recipe = getattr(type(module), "rezero_recipe", None)
        assert recipe is None or not any("rezero_gate" in method.text for method in recipe.methods)
    return folded


def assert_stays(model: nn.Module, inputs: Any, reason: str) -> None:
    """No gate is folded, each with this reason, and the outputs are bit for bit what they were."""
    gates = dict(rz.alphas(model))
    assert gates
    with pytest.warns(UserWarning, match="gates stay") as caught:
        folded = rz.fold(model, inputs)
    message = str(caught[0].message)
    assert reason in message
    assert all(f"{name}: " in message for name in gates)
    assert list(dict(rz.alphas(folded))) == list(gates)
    assert torch.equal(outputs(model, inputs, False), outputs(folded, inputs, False))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("branch", "children", "reason"),
    [
        pytest.param(lambda m, x: F.gelu(m.fc1(x)), {}, "gelu", id="gelu"),
        pytest.param(lambda m, x: m.fc1(x).sigmoid(), {}, "sigmoid", id="sigmoid"),
        pytest.param(lambda m, x: m.act(m.fc1(x)), {"act": nn.PReLU()}, "act does not pass", id="prelu"),
        pytest.param(
            lambda m, x: m.drop(m.fc1(x)), {"drop": nn.AlphaDropout(0.1)}, "drop does not", id="alpha-dropout"
        ),
        pytest.param(lambda m, x: m.end(m.fc1(x)), {"end": Custom()}, "sin", id="custom-module"),
        pytest.param(lambda m, x: m.fc1(x) + 1.0, {}, "adds a number", id="constant"),
        pytest.param(lambda m, x: m.fc1(x) * m.fc2(x), {}, "multiplies two values", id="product"),
        pytest.param(lambda m, x: m.fc1(x).square(), {}, "square", id="square"),
        pytest.param(lambda m, x: (h := m.fc1(x)) * h, {}, "is a square", id="times-itself"),
        pytest.param(lambda m, x: (h := m.fc1(x)) * h.mean(-1, keepdim=True).sigmoid(), {}, "", id="squeeze-excite"),
        pytest.param(lambda m, x: (h := m.fc1(x)) * (h > 0), {}, "is also read by gt", id="sign"),
        pytest.param(lambda m, x: 1.0 / m.fc1(x).exp().add(x.abs()), {}, "", id="reciprocal"),
        pytest.param(lambda m, x: m.fc1(m.fc1(x)), {}, "is also read", id="weight-used-twice"),
        pytest.param(
            lambda m, x: m.fc1(x * F.linear(x, m.fc1.weight).cos()),
            {},
            "also read elsewhere",
            id="weight-read-elsewhere",
        ),
        pytest.param(
            lambda m, x: m.norm(m.fc1(x)), {"norm": nn.BatchNorm1d(8, affine=False)}, "no weight", id="affine"
        ),
    ],
)
def test_what_is_not_homogeneous_or_is_read_elsewhere_stays(
    branch: Callable[[Any, Tensor], Tensor], children: dict[str, nn.Module], reason: str
) -> None:
    assert_stays(converted(Block(branch, **children), X, 0.5), X, reason)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)])
def test_a_negative_gate_does_not_pass_an_activation(activation: nn.Module) -> None:
    block = Block(lambda m, x: m.act(m.fc1(x)), act=activation)
    assert_stays(converted(block, X, -0.5), X, "it is negative")
    assert_folded(converted(block, X, 0.5), X)
    assert_folded(converted(block, X, 0.0), X)


def test_a_gate_that_is_applied_twice_on_one_path_is_not_folded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.alpha = nn.Linear(8, 8), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.alpha * (self.alpha * self.fc(x))

    trace = record(Twice(), (X,), {})
    ends = [(product, operand, None) for product, operand, _ in products(trace, "alpha")]
    assert len(ends) == 2
    with pytest.raises(Unscalable, match="scaled before"):
        scaling(reading(trace), ends, frozenset({"alpha"}))


def test_a_weight_of_two_branches_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.last(self.a(x).relu())
            return x + self.last(self.b(x).relu())

    assert_stays(converted(Two(), X), X, "last.weight is also read elsewhere")


def test_a_tied_weight_stays() -> None:
    block = Block(lambda m, x: m.fc1(x).relu())
    block.fc2.weight = block.fc1.weight
    assert_stays(converted(block, X, 0.5), X, "fc1.weight is tied")


def test_a_weight_that_only_train_mode_reads_elsewhere_stays() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.fc(x).relu()
            return self.fc(y) if self.training else y

    assert_stays(converted(Aux(), X, 0.5), X, "also read elsewhere")


def test_a_computed_weight_and_a_hooked_module_stay() -> None:
    torch.manual_seed(0)  # of some random weights ReLU passes nothing on
    block = Block(lambda m, x: m.fc1(x).relu())
    nn.utils.parametrizations.weight_norm(block.fc1)
    assert_stays(converted(block, X, 0.5), X, "no weight parameter of its own")
    block = Block(lambda m, x: m.fc1(x).relu())
    block.fc1.register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
    assert_stays(converted(block, X, 0.5), X, "forward hooks")


def test_an_arm_that_did_not_run_keeps_its_gate() -> None:
    class Arms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.wide = nn.Linear(8, 8), False

        def forward(self, x: Tensor) -> Tensor:
            if self.wide:
                return x + F.gelu(self.fc(x))
            return x + self.fc(x).relu()

    assert_stays(converted(Arms(), X, 0.5), X, "a path that did not run applies it to something else")


def test_a_loop_stays() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    assert_stays(converted(Loop(), X, 0.5), X, "in a loop")


def test_outputs_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(Block(lambda m, x: m.fc2(m.fc1(x).relu())), X)
    before, cls = copy.deepcopy(model.state_dict()), type(model)
    monkeypatch.setattr(folding, "_scale", lambda *args: None)
    with pytest.raises(rz.ConversionError, match="outputs differ in eval mode"):
        rz.fold(model, X, inplace=True)
    assert type(model) is cls
    assert [name for name, _ in rz.alphas(model)] == ["alpha"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(Block(lambda m, x: m.fc2(m.fc1(x).relu())), X, 0.5)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(folding, "_close", lambda *args: False)
    with pytest.raises(rz.ConversionError, match="outputs differ in eval mode"):
        rz.fold(model, X, inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_gates_or_values() -> None:
    with pytest.warns(rz.NoEffectWarning, match="no gates"):
        rz.fold(Block(lambda m, x: m.fc1(x)), X)
    model = converted(Block(lambda m, x: m.fc1(x).relu()), X)
    with pytest.raises(rz.ConversionError, match="meta"):
        rz.fold(model.to("meta"), X)
    with pytest.raises(rz.ConversionError, match="inputs"):
        rz.fold(converted(Block(lambda m, x: m.fc1(x).relu()), X))


@pytest.mark.parametrize(
    ("branch", "children", "into"),
    [
        pytest.param(lambda m, x: m.fc2(m.fc1(x).relu()), {}, "fc2.weight fc2.bias", id="linear"),
        pytest.param(
            lambda m, x: 3 * -m.drop(m.fc2(x.sin())) / 2, {"drop": nn.Dropout(0.5)}, "fc2.weight fc2.bias", id="dropout"
        ),
        pytest.param(lambda m, x: m.norm(m.fc1(x)), {"norm": Shifted(8)}, "norm.weight norm.bias", id="norm"),
        pytest.param(
            lambda m, x: F.linear(x.sin(), m.fc1.weight, m.fc1.bias), {}, "fc1.weight fc1.bias", id="functional"
        ),
        pytest.param(lambda m, x: m.fc1(x).relu() @ m.fc2.weight, {}, "fc2.weight", id="matmul"),
        pytest.param(
            lambda m, x: m.drop(m.both(x)),
            {"drop": nn.Dropout(0.5), "both": Both()},
            "both.a.weight both.a.bias both.b.weight both.b.bias",
            id="sum",
        ),
        pytest.param(
            lambda m, x: torch.cat([m.fc1(x)[:, :3], m.fc2(x)[:, 3:]], 1),
            {},
            "fc1.weight fc1.bias fc2.weight fc2.bias",
            id="slices",
        ),
        pytest.param(
            lambda m, x: m.fc1(x).view(-1, 2, 4).transpose(1, 2).flatten(1), {}, "fc1.weight fc1.bias", id="layout"
        ),
        pytest.param(
            lambda m, x: m.up(m.down(x.unsqueeze(1)).relu()).squeeze(1),
            {"down": nn.Conv1d(1, 4, 3, padding=1), "up": nn.Conv1d(4, 1, 3, padding=1)},
            "up.weight up.bias",
            id="convolution",
        ),
    ],
)
def test_forms_of_branches(branch: Callable[[Any, Tensor], Tensor], children: dict[str, nn.Module], into: str) -> None:
    model = converted(Block(branch, **children), X, -0.7)
    folded = assert_folded(model, X)
    changed = {key for key, value in folded.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert changed == set(into.split())
    assert type(folded) is Block


def test_an_embedding() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.table = nn.Linear(8, 8), nn.Embedding(5, 8)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return x + (self.fc(x) + self.table(ids))

    inputs = {"x": X, "ids": torch.tensor([1, 2, 4])}
    assert_folded(converted(Bag(), inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    model = converted(Block(lambda m, x: m.fc2(m.fc1(x).relu())).to(dtype), X.to(dtype), 1e-3)
    folded = rz.fold(model, X.to(dtype))
    expected = (model.fc2.weight.detach().float() * model.alpha.detach().float()).to(dtype)
    assert torch.equal(folded.fc2.weight, expected)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "encoder-layer": lambda: (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    "pre-norm encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, norm_first=True), 2, enable_nested_tensor=False),
        torch.randn(5, 2, 16),
    ),
    "gpt2": lambda: (
        transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
        {"input_ids": torch.randint(0, 50, (2, 7))},
    ),
    "llama": lambda: (transformers.LlamaModel(transformers.LlamaConfig(**SMALL)), {"input_ids": IDS}),
    "bert": lambda: (transformers.BertModel(transformers.BertConfig(**SMALL)), {"input_ids": IDS}),
    "albert, one layer three times": lambda: (
        transformers.AlbertModel(transformers.AlbertConfig(embedding_size=8, **{**SMALL, "num_hidden_layers": 3})),
        {"input_ids": IDS},
    ),
    "vit, drop path": lambda: (
        timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, drop_path_rate=0.3, proj_drop_rate=0.2),
        torch.randn(2, 3, 32, 32),
    ),
    "convnext, permuted": lambda: (
        timm.create_model("convnext_atto", depths=(1, 1, 1, 1), drop_path_rate=0.3),
        torch.randn(2, 3, 64, 64),
    ),
    "convnext, 1x1 convolutions": lambda: (
        timm.create_model("convnext_atto", depths=(1, 1, 1, 1), conv_mlp=True),
        torch.randn(2, 3, 64, 64),
    ),
    "cait, gamma in the code": lambda: (
        timm.create_model("cait_xxs24_224", depth=2, img_size=32, embed_dim=48, num_heads=2),
        torch.randn(2, 3, 32, 32),
    ),
    "vit, LayerScale": lambda: (
        timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, init_values=1e-2, drop_path_rate=0.3),
        torch.randn(2, 3, 32, 32),
    ),
}
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
IDS = torch.randint(0, 50, (2, 7))


@pytest.mark.parametrize("options", [{}, {"drop_norm": "none"}], ids=["", "norms kept"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    folded = assert_folded(converted(model, inputs, **options), inputs)
    assert_same(folded, pickle.loads(pickle.dumps(folded)), inputs)


@pytest.mark.parametrize("options", [{}, {"drop_norm": ("batch",)}, {"activation": "keep"}, {"share": "layer"}])
def test_a_resnet(options: dict[str, Any]) -> None:
    model, x = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 64, 64)
    assert_folded(converted(model, x, None if "activation" in options else 0.3, **options), x)


STAYS = "alpha stays: it is negative, and there is a ReLU between the weight and it"


def test_a_bottleneck_keeps_its_negative_gates() -> None:
    x = torch.randn(2, 64, 8, 8)
    block = nn.Sequential(*(torchvision.models.resnet.Bottleneck(64, 16) for _ in range(3)))
    model = converted(block, x, 0.4)
    with torch.no_grad():
        model.get_parameter("1.alpha").neg_()
    with pytest.warns(UserWarning, match="1 of 3 gates stay: 1.alpha: it is negative"):
        folded = rz.fold(model, x)
    assert [name for name, _ in rz.alphas(folded)] == ["1.alpha"]
    assert_same(model, folded, x)
    report = rz.audit(folded)
    assert report.counts["folded"] == 2
    assert "alpha is folded into 0.bn3.weight, 0.bn3.bias" in str(report)
    assert [site.reason.partition("; ")[2] for site in report.plan.converted] == [STAYS]
    assert rz.validate(folded, x).ok


def test_a_class_goes_back_to_the_original() -> None:
    model = MODELS["bert"]()[0]
    folded = assert_folded(converted(model, {"input_ids": IDS}, drop_norm="none"), {"input_ids": IDS})
    assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    assert list(folded.state_dict()) == list(model.state_dict())


def test_unconvert_says_what_was_folded() -> None:
    model, inputs = MODELS["vit, LayerScale"]()
    folded = rz.fold(converted(model, inputs, drop_norm="none"), inputs)
    with pytest.warns(
        UserWarning, match="not as before the conversion: 4 folded gates stay in their branches' weights$"
    ):
        back = rz.unconvert(folded)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    assert_same(back, folded, inputs)


class Scaled(nn.Module):
    """A branch with a gate of its own, applied by a function."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.form = nn.Linear(8, 8), nn.Linear(8, 8), form
        self.gamma = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.fc1(x).relu())
        if self.form == "left":
            return x + self.gamma * y
        if self.form == "right":
            return x + (-y) * self.gamma
        if self.form == "method":
            return x + y.mul(self.gamma.view(1, -1))
        if self.form == "function":
            return x + torch.mul(self.gamma, y)
        if self.form == "in place":
            y *= self.gamma
            return x + y
        if self.form == "activation":
            return x + self.gamma * y.relu()
        return x + self.gamma * y.view(-1, 2, 4).transpose(1, 2).flatten(1)


@pytest.mark.parametrize("form", ["left", "right", "method", "function"])
def test_a_gate_in_the_models_own_code(form: str) -> None:
    model = converted(Scaled(form), X, alpha_init="preserve")
    assert [name for name, _ in rz.alphas(model)] == ["gamma"]
    folded = assert_folded(model, X)
    assert isinstance(folded, Scaled)
    assert folded.gamma is None
    with pytest.warns(UserWarning, match="1 folded gate stays in its branch's weights"):
        back = rz.unconvert(folded)
    assert type(back) is Scaled
    assert torch.equal(back.gamma, torch.ones(8))
    assert_same(back, model, X)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("in place", "in a form of code that is not edited"),
        ("activation", "it is negative"),
        ("layout", "not followed through"),
    ],
)
def test_a_gate_in_the_models_own_code_stays(form: str, reason: str) -> None:
    assert_stays(converted(Scaled(form), X, alpha_init="preserve"), X, reason)


def test_in_place_and_again() -> None:
    model = converted(Block(lambda m, x: m.fc2(m.fc1(x).relu())), X)
    twin = copy.deepcopy(model)
    assert rz.fold(model, X, inplace=True) is model
    assert_same(model, twin, X)
    with pytest.warns(rz.NoEffectWarning):
        rz.fold(model, X)
    again = rz.convert(model, X)
    assert [name for name, _ in rz.alphas(again)] == ["alpha"]
    assert torch.equal(again(X), X)
    assert modules.record(again) is not None


class Unpacked(nn.Module):
    def __init__(self, told: bool) -> None:
        super().__init__()
        self.attn, self.told = nn.MultiheadAttention(8, 2, batch_first=True), told

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attn(x, x, x)
        return (x + y, weights) if self.told else x + y


@pytest.mark.parametrize("told", [False, True])
def test_attention_whose_weights_nobody_reads_is_folded(told: bool) -> None:
    x = torch.randn(2, 3, 8)
    model = rz.convert(Unpacked(told), x, alpha_init=0.5).eval()
    if told:
        with pytest.warns(UserWarning, match="also read"):
            folded = rz.fold(model, x)
    else:
        folded = rz.fold(model, x)
        assert list(rz.alphas(folded)) == []
        assert torch.allclose(folded(x), model(x), atol=1e-6)
    assert bool(list(rz.alphas(folded))) is told
