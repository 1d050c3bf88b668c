"""What instances carry themselves: own forwards, bound methods, hooks, shared modules, parts, steps, wrappers."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rezero_convert as rz


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(self.norm(x)))


class Kept(nn.Module):
    """Runs its method through what the constructor stored, in every way that it is done."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.how = how
        self.run: Any = self._run
        if how == "partial":
            self.run = functools.partial(self._run, scale=1.0)
        elif how == "list":
            self.run = [self._run]
        elif how == "dict":
            self.run = {"run": self._run}
        elif how == "class":
            self.run = functools.partial(type(self)._run, self)

    def _run(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * torch.relu(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        run = self.run[0] if self.how == "list" else self.run["run"] if self.how == "dict" else self.run
        return run(x)


class Caller(nn.Module):
    """Holds another module's method."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept("bound")
        self.fn = self.kept._run

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


X = torch.arange(16.0).reshape(2, 8) / 16


def awake(model: nn.Module, value: float = 0.5) -> nn.Module:
    for _, alpha in rz.alphas(model):
        nn.init.constant_(alpha, value)
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in rz.alphas(model)]


def back(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rz.unconvert(model, **options)


# Own forwards


def own_forward(self: Any, x: Tensor) -> Tensor:
    return x + torch.tanh(self.fc(self.norm(x)))


def scaled_forward(scale: float) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + scale * torch.tanh(self.fc(self.norm(x)))

    return forward


def test_a_forward_that_holds_its_module_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(Block(), Block())
    block = model[1]
    block.forward = lambda x: x + torch.tanh(block.fc(x))
    before = dict(block.__dict__)
    with pytest.raises(rz.ConversionError, match=r"1 has a forward of its own .* types\.MethodType"):
        rz.convert(model, X, inplace=True)
    assert block.__dict__ == before
    assert type(model[0]) is Block


@pytest.mark.parametrize("how", ["method", "closure", "partial"])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_own_forward_is_rewritten_and_comes_back(how: str, inplace: bool) -> None:
    model = nn.Sequential(Block(), Block())
    block = model[1]
    if how == "partial":
        block.forward = functools.partial(own_forward, block)
    else:
        block.forward = types.MethodType(own_forward if how == "method" else scaled_forward(1.0), block)
    expected = model(X)
    own = block.forward
    preserved = rz.convert(model, X, alpha_init="preserve")
    assert torch.equal(preserved(X), expected)
    converted = rz.convert(model, X, inplace=inplace, drop_norm="none")
    assert len(names(converted)) == 2
    assert torch.equal(converted(X), X)
    awake(converted)
    half = converted[0](X)
    assert torch.equal(converted(X), half + 0.5 * torch.tanh(converted[1].fc(converted[1].norm(half))))
    again = back(converted, inplace=inplace)
    assert torch.equal(again(X), expected)
    if inplace:
        assert model[1].forward is own
    else:
        assert torch.equal(model(X), expected)
        assert again[1].forward.func is own_forward if how == "partial" else again[1].forward.__self__ is again[1]


def test_an_own_forward_in_two_steps() -> None:
    model = nn.Sequential(Block(), Block())
    model[1].forward = types.MethodType(own_forward, model[1])
    expected = model(X)
    both = rz.convert(rz.convert(model, X, include=("1",), drop_norm="none"), X, drop_norm="none")
    assert names(both) == ["0.alpha", "1.alpha"]
    assert torch.equal(both(X), X)
    assert torch.equal(back(both)(X), expected)


@pytest.mark.parametrize("how", ["bound", "partial", "list", "dict", "class"])
def test_methods_kept_by_the_constructor(how: str) -> None:
    model = nn.Sequential(Kept(how), Kept(how))
    expected = model(X)
    converted = rz.convert(model, X)
    assert torch.equal(converted(X), X)
    assert torch.equal(model(X), expected)
    assert torch.equal(copy.deepcopy(awake(converted))(X), converted(X))
    assert not torch.equal(converted(X), X)
    assert torch.equal(back(converted)(X), expected)


def test_a_method_that_another_module_holds() -> None:
    model = Caller()
    expected = model(X)
    converted = rz.convert(model, X)
    assert names(converted) == ["kept.alpha"]
    assert torch.equal(converted(X), X)
    assert torch.equal(back(converted)(X), expected)


def test_accelerate_hooks() -> None:
    from accelerate import hooks

    class Doubling(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = nn.Sequential(Block(), Block())
    plain = copy.deepcopy(model)
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    hooks.add_hook_to_module(model[1], Doubling())
    hooks.add_hook_to_module(model[1].norm, hooks.ModelHook())
    expected = model(X)
    converted = rz.convert(model, X)
    assert names(converted) == ["0.alpha", "1.alpha"]
    assert torch.equal(converted(X), 2 * X)
    awake(converted)
    assert not torch.equal(converted(X), 2 * X)
    assert torch.equal(copy.deepcopy(converted)(X), converted(X))
    assert torch.equal(model(X), expected)
    hooks.remove_hook_from_module(converted, recurse=True)
    y = X + 0.5 * torch.relu(converted[0].fc(X))
    assert torch.equal(converted(X), y + 0.5 * torch.relu(converted[1].fc(y)))
    again = back(rz.convert(model, X, alpha_init="preserve"))
    assert torch.equal(again(X), expected)
    hooks.remove_hook_from_module(again, recurse=True)
    assert torch.equal(again(X), plain(X))


class FromConfig(Block):
    """Copies itself by its constructor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FromConfig:
        other = type(self)(self.fc.in_features)
        other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other


class Outer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(Block(width), nn.LayerNorm(width))
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(self.inner(x)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Outer:
        other = type(self)(self.fc.in_features)
        other.load_state_dict(self.state_dict())
        return other


@pytest.mark.parametrize("cls", [FromConfig, Outer])
def test_a_copy_made_by_the_constructor_is_converted_too(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(), cls())
    converted = awake(rz.convert(model, X))
    for twin, plain in ((converted, model), (converted[1], model[1])):
        other = copy.deepcopy(twin)
        assert [type(module) for module in other.modules()] == [type(module) for module in twin.modules()]
        assert names(other) == names(twin)
        assert torch.equal(other(X), twin(X))
        own = {id(parameter) for parameter in twin.parameters()}
        assert not any(id(parameter) in own for parameter in other.parameters())
        assert list(back(other).state_dict()) == list(plain.state_dict())
    assert type(type(converted[0])()) is cls


# Shared modules, parts and steps


def test_a_shared_block_is_edited_once() -> None:
    block = Block()
    model = nn.Sequential(block, Block(), block)
    converted = rz.convert(model, X)
    assert converted[0] is converted[2]
    assert names(converted) == ["0.alpha", "1.alpha"]
    assert torch.equal(converted(X), X)
    assert torch.equal(awake(converted)(X), copy.deepcopy(converted)(X))


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(Block(), Block())
    model[1].fc.weight = model[0].fc.weight
    converted = rz.convert(model, X)
    assert converted[0].fc.weight is converted[1].fc.weight
    assert back(converted)[1].fc.weight is not model[0].fc.weight


def test_another_model_of_the_class_is_left_alone() -> None:
    one, other = nn.Sequential(Block()), nn.Sequential(Block())
    expected = other(X)
    rz.convert(one, X, inplace=True)
    assert type(other[0]) is Block
    assert torch.equal(other(X), expected)
    assert torch.equal(one(X), X)


def test_a_part_of_a_larger_model() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(Block(), Block()), "decoder": nn.Sequential(Block())})
    rz.convert(model["encoder"], X, inplace=True)
    assert names(model) == ["encoder.0.alpha", "encoder.1.alpha"]
    assert type(model["decoder"][0]) is Block
    rz.convert(model["decoder"], X, inplace=True)
    assert names(model)[2:] == ["decoder.0.alpha"]
    assert type(model["decoder"][0]) is type(model["encoder"][0])


def test_a_part_first_then_the_whole() -> None:
    model = nn.Sequential(nn.Sequential(Block(), Block()), Block())
    rz.convert(model[0], X, inplace=True)
    awake(model, 0.25)
    whole = rz.convert(model, X)
    assert {name: alpha.item() for name, alpha in rz.alphas(whole)} == {
        "0.0.alpha": 0.25,
        "0.1.alpha": 0.25,
        "1.alpha": 0.0,
    }
    assert rz.validate(whole, X).ok


def test_two_steps_keep_trained_alphas_and_one_record() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    first = awake(rz.convert(model, X, include=("0",)), 0.25)
    both = rz.convert(first, X)
    assert {name: alpha.item() for name, alpha in rz.alphas(both)} == {"0.alpha": 0.25, "1.alpha": 0.0, "2.alpha": 0.0}
    report = rz.audit(both).to_dict()
    assert [(site["path"], site["verdict"]) for site in report["sites"]] == [
        ("0", "converted"),
        ("1", "converted"),
        ("2", "converted"),
    ]
    assert rz.validate(both, X).ok
    assert {type(block) for block in both} == {type(both[0])}
    with pytest.warns(rz.NoEffectWarning, match="3 .*gated already"):
        rz.convert(both, X)


class LongSkip(nn.Module):
    """The last sum spans the others: gated on request only."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.three = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.relu(self.one(x))
        y = y + torch.relu(self.two(y))
        return x + torch.tanh(self.three(y))


def test_one_method_edited_in_two_steps_makes_one_subclass_of_the_users() -> None:
    model = LongSkip()
    first = awake(rz.convert(model, X), 0.25)
    assert names(first) == ["alpha_one", "alpha_two"]
    both = rz.convert(first, X, long_skips=True, verify=False)
    assert len(names(both)) == 3
    assert torch.equal(both(X), X)
    assert type(both).__mro__[1] is LongSkip
    assert both.alpha_one.item() == 0.25
    assert torch.equal(pickle.loads(pickle.dumps(both))(X), both(X))
    assert torch.equal(back(both)(X), model(X))
    assert type(back(both)) is LongSkip


def test_an_instance_of_a_converted_class_is_converted_alike() -> None:
    converted = rz.convert(nn.Sequential(Block()), X)
    fresh = type(converted[0])()
    assert type(fresh) is Block
    assert type(rz.convert(fresh, X)) is type(converted[0])


# torch.nn's encoder takes a converted layer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_encoder_of_a_converted_layer(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=batch_first)
    x = torch.randn(2, 3, 8)
    converted = rz.convert(layer, x)
    encoder = nn.TransformerEncoder(converted, 2).eval()
    assert len(names(encoder)) == 4
    padding = torch.tensor([[False, False, True]] * (2 if batch_first else 3))
    padding = padding if batch_first else torch.zeros(3, 2, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=padding), x)
    assert layer.activation_relu_or_gelu == 1
    assert back(converted).activation_relu_or_gelu == 1
    assert nn.TransformerDecoder(rz.convert(nn.TransformerDecoderLayer(8, 2, 16), (x, x)), 2)(x, x).equal(x)


# Hooks, parametrizations, pruning


def test_hooks_of_a_block_run_as_before() -> None:
    model = nn.Sequential(Block(), Block())
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model[0].register_forward_hook(lambda module, args, output: seen.append("after") or output + 1)
    model[0].register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    model[0].register_full_backward_pre_hook(lambda module, outputs: seen.append("first"))
    converted = rz.convert(model, X)
    seen.clear()
    out = converted(X.clone().requires_grad_())
    assert torch.equal(out, X + 1)
    out.sum().backward()
    assert seen == ["before", "after", "first", "backward"]


@pytest.mark.parametrize(
    "register",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, output: output * 2),
        lambda norm: norm.register_forward_pre_hook(lambda module, args: None),
        lambda norm: norm.register_full_backward_hook(lambda module, grads, outputs: None),
        lambda norm: norm.register_full_backward_pre_hook(lambda module, outputs: None),
    ],
)
def test_a_norm_with_a_hook_stays_and_says_why(register: Any) -> None:
    model = nn.Sequential(Block(), Block())
    register(model[0].norm)
    converted = rz.convert(model, X)
    assert isinstance(converted[0].norm, nn.LayerNorm)
    assert not hasattr(converted[1], "norm")
    sites = rz.audit(converted).to_dict()["sites"]
    assert [norm["reason"] for norm in sites[0]["norms"]] == ["hooks are attached to it"]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_branches(wrap: Any) -> None:
    model = nn.Sequential(Block(), Block()).eval()
    for block in model:
        wrap(block.fc)
    expected = model(X)
    assert torch.equal(rz.convert(model, X, alpha_init="preserve").eval()(X), expected)
    converted = rz.convert(model, X).eval()
    assert names(converted) == ["0.alpha", "1.alpha"]
    awake(converted)
    y = X + 0.5 * torch.relu(converted[0].fc(X))
    assert torch.equal(converted[0](X), y)
    assert list(back(converted).state_dict()) == list(model.state_dict())


def test_a_parametrized_convolution_gets_the_norms_bias() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 1, bias=False))
            self.norm = nn.BatchNorm1d(4)
            self.last = nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(torch.relu(self.norm(self.conv(x))))

    x = torch.randn(2, 4, 3)
    converted = rz.convert(nn.Sequential(Conv(), Conv()), x, drop_norm="batch")
    assert torch.equal(converted[0].conv.bias, torch.zeros(4))


def test_pruned_branches() -> None:
    model = nn.Sequential(Block(), Block())
    for block in model:
        prune.l1_unstructured(block.fc, "weight", amount=0.5)
    mask = model[0].fc.weight_mask.clone()
    with pytest.raises(rz.ConversionError, match=r"Sequential cannot be copied .*deepcopy.*; pass inplace=True"):
        rz.convert(model, X)  # torch cannot copy a pruned module
    rz.convert(model, X, inplace=True)
    assert names(model) == ["0.alpha", "1.alpha"]
    assert torch.equal(model(X), X)
    awake(model)(X).sum().backward()
    assert model[0].alpha.grad is not None
    assert model[0].alpha.grad.any()
    assert torch.equal(model[0].fc.weight_mask, mask)
    assert ((model[0].fc.weight == 0) == (mask == 0)).all()


# Size


def test_equal_blocks_are_edited_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rezero_convert.rewrite import instances, subclass

    made: list[str] = []
    for module, name in ((instances, "edited"), (subclass, "compiled")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original, n=name: made.append(n) or f(*args))

    class Wide(Block):
        pass

    for depth in (20, 40):
        converted = rz.convert(nn.Sequential(*(Wide() for _ in range(depth))), X, verify=False)
        assert len(names(converted)) == depth
    assert made.count("compiled") == 1
