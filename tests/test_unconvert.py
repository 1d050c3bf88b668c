"""The way back from a converted model: classes, names, norms, and what is said about the rest."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import rezero_convert as rz

CASES = [pytest.param(case, id=case.name) for case in zoo.CASES]


@pytest.fixture(autouse=True)
def _unfused() -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class PreNorm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(self.norm(x)))


class WrittenOut(nn.Module):
    """A norm without `reset_parameters`; its scale starts at 0, as Gemma's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return y * (1 + self.scale) * self.gain + self.shift


class NoBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.ReLU()
        self.last = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.norm(self.conv(x))))


class Fused(nn.BatchNorm1d):
    """A norm with its activation, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = Fused(4)
        self.last = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.norm(self.conv(x)))


class InSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.relu(self.fc(x))


class ZeroLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.fc(x)))


class Walked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


X = torch.arange(16.0).reshape(2, 8) / 16


def layout(model: nn.Module) -> Any:
    """All that tells an unconverted model: classes, attributes, names in order."""
    return (
        [(name, type(module), list(module.__dict__)) for name, module in model.named_modules()],
        [(name, value.shape, value.dtype) for name, value in model.state_dict().items()],
        [(name, value.requires_grad) for name, value in model.named_parameters()],
    )


def silently(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rz.unconvert(model, **options)


def back(model: nn.Module, **options: Any) -> nn.Module:
    """Unconverted; the warning is another test's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rz.unconvert(model, **options)


# Negatives


def test_a_model_that_is_not_converted_is_said_to_be_so() -> None:
    model = PreNorm()
    with pytest.warns(rz.NoEffectWarning, match="nothing to undo"):
        again = rz.unconvert(model)
    assert layout(again) == layout(model)


def test_a_class_derived_from_a_converted_one_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential(PreNorm(), PreNorm())
    converted = rz.convert(model, X)

    class Mine(type(converted[1])):  # type: ignore[misc]
        pass

    object.__setattr__(converted[1], "__class__", Mine)
    before = layout(converted)
    with pytest.raises(rz.ConversionError, match=r"1: .*Mine is derived from a converted class"):
        rz.unconvert(converted, inplace=True)
    assert layout(converted) == before


def test_the_record_shows_nowhere() -> None:
    model = rz.convert(nn.Sequential(PreNorm(), PreNorm()), X)
    assert [name for name, _ in model.named_modules()] == ["", "0", "0.fc", "1", "1.fc"]
    assert not any("norm" in name for name in [*model.state_dict(), *dict(model.named_parameters())])
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.double()
    model.apply(lambda module: None)


# The way back


@pytest.mark.parametrize("case", CASES)
def test_preserve_and_back_is_bit_identical(case: zoo.Case) -> None:
    model, inputs = case.make(), case.inputs()
    converted = rz.convert(model, inputs, alpha_init="preserve", verify=False)
    again = silently(converted)
    assert layout(again) == layout(model)
    assert len(list(rz.alphas(converted))) == case.blocks
    for train in (False, True):
        outputs = []
        for one in (model, again):
            torch.manual_seed(1)
            outputs.append(zoo.call(one.train(train), inputs))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("case", CASES)
def test_classes_names_and_order_come_back(case: zoo.Case) -> None:
    model, inputs = case.make(), case.inputs()
    converted = rz.convert(model, inputs, drop_norm="all", verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = rz.unconvert(converted)
    assert layout(again) == layout(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(zoo.call(again.eval(), inputs), zoo.call(model.eval(), inputs))


def test_what_is_not_as_before_is_said_in_one_warning() -> None:
    model = nn.Sequential(PreNorm(), PreNorm(), Scaled(), ZeroLast())
    converted = rz.convert(model, X)
    with pytest.warns(UserWarning, match="2 dropped norms were made anew .*; 1 gate .*; 1 undone zero") as caught:
        again = rz.unconvert(converted)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert layout(again) == layout(model)
    assert torch.equal(again[2].gamma, torch.zeros(8))
    assert again[3].last.weight.any()
    assert torch.equal(again[0].norm.weight, torch.ones(8))
    assert torch.equal(again[0].norm.bias, torch.zeros(8))


def test_no_norm_dropped_no_word_of_norms() -> None:
    silently(rz.convert(nn.Sequential(PreNorm(), PreNorm()), X, drop_norm="none"))


def test_trained_weights_stay() -> None:
    converted = rz.convert(nn.Sequential(PreNorm(), PreNorm()), X)
    nn.init.constant_(converted[0].fc.weight, 3.0)
    again = back(converted)
    assert torch.equal(again[0].fc.weight, torch.full((8, 8), 3.0))
    assert again[0].fc.weight is not converted[0].fc.weight


def test_in_place() -> None:
    model = nn.Sequential(PreNorm(), PreNorm())
    before = layout(model)
    weight = model[0].fc.weight
    rz.convert(model, X, inplace=True)
    assert back(model, inplace=True) is model
    assert layout(model) == before
    assert model[0].fc.weight is weight


def test_a_copy_leaves_the_given_model_converted() -> None:
    model = rz.convert(nn.Sequential(PreNorm(), PreNorm()), X)
    before = layout(model)
    assert layout(back(model)) != before
    assert layout(model) == before


def test_a_written_out_norm_starts_where_it_started() -> None:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.norm = WrittenOut(8)  # type: ignore[assignment]

    model = nn.Sequential(Block(), Block())
    for parameter in model[0].norm.parameters():
        nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    converted = rz.convert(model, X, norm_types=(WrittenOut,))
    assert not hasattr(converted[0], "norm")
    again = back(converted)
    assert {name: set(value.tolist()) for name, value in again[0].norm.named_parameters()} == {
        "scale": {0.0},
        "shift": {0.0},
        "gain": {1.0},
    }


@pytest.mark.parametrize("trained", [False, True])
def test_a_bias_in_a_norms_place(trained: bool) -> None:
    model = nn.Sequential(NoBias(), NoBias())
    x = torch.randn(2, 4, 6)
    converted = rz.convert(model, x, drop_norm="batch")
    assert converted[0].conv.bias is not None
    if trained:
        nn.init.ones_(converted[0].conv.bias)
    with pytest.warns(UserWarning, match="2 dropped norms") as caught:
        again = rz.unconvert(converted)
    assert ("1 trained bias" in str(caught[0].message)) is trained
    assert again[1].conv.bias is None
    assert (again[0].conv.bias is not None) is trained
    assert (layout(again) == layout(model)) is not trained


def test_a_slot_is_filled_again() -> None:
    model = InSequence()
    converted = rz.convert(model, X)
    assert isinstance(converted.body[0], nn.Identity)
    again = back(converted)
    assert layout(again) == layout(model)


def test_a_fused_norm_takes_its_activation_back() -> None:
    model = nn.Sequential(FusedBlock(), FusedBlock())
    x = torch.randn(2, 4, 3)
    converted = rz.convert(model, x, drop_norm="batch")
    assert type(converted[0].norm) is nn.Sequential
    act = converted[0].norm.act
    back(converted, inplace=True)
    assert layout(converted) == layout(model)
    assert converted[0].norm.act is act
    converted.load_state_dict(model.state_dict())
    assert torch.equal(converted.eval()(x), model.eval()(x))


def test_a_norm_in_two_places_is_one_norm_again() -> None:
    model = nn.Sequential(PreNorm(), PreNorm())
    model[1].norm = model[0].norm
    converted = pickle.loads(pickle.dumps(rz.convert(model, X)))
    assert not hasattr(converted[0], "norm")
    with pytest.warns(UserWarning, match="1 dropped norm was"):
        again = rz.unconvert(converted)
    assert again[0].norm is again[1].norm


def test_alphas_of_a_loop_go() -> None:
    model = Walked()
    converted = rz.convert(model, X, verify=False)
    assert len(list(rz.alphas(converted))) == 3
    for other in (converted, copy.deepcopy(converted)):
        assert layout(silently(other)) == layout(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_norm_follows_the_model(dtype: torch.dtype) -> None:
    converted = rz.convert(nn.Sequential(PreNorm(), PreNorm()), X).to(dtype).eval()
    again = back(converted)
    assert again[0].norm.weight.dtype == dtype
    assert again(X.to(dtype)).dtype == dtype
    assert not again[0].norm.training


def test_a_norm_of_its_own_precision_keeps_it() -> None:
    class Careful(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    model = nn.Sequential(InSequence(), InSequence()).bfloat16()
    for block in model:
        block.body[0] = Careful(8)
    converted = rz.convert(model, X.bfloat16(), verify=False)
    assert type(converted[0].body[0]) is nn.Identity
    assert layout(back(converted)) == layout(model)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(PreNorm(), PreNorm())
    converted = rz.convert(model, X.to("meta"))
    assert layout(back(converted)) == layout(model)


def test_frozen_norms_come_back_frozen() -> None:
    model = nn.Sequential(PreNorm(), PreNorm())
    model[1].norm.requires_grad_(False)
    again = back(rz.convert(model, X))
    assert layout(again) == layout(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_from_a_copy(how: str) -> None:
    model = nn.Sequential(PreNorm(), InSequence())
    converted = rz.convert(model, X)
    if how == "deepcopy":
        other = copy.deepcopy(converted)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(converted))
    else:
        stream = io.BytesIO()
        torch.save(converted, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert layout(back(other)) == layout(model)


# Parts and steps


def test_a_partly_converted_model() -> None:
    model = nn.Sequential(PreNorm(), PreNorm(), Scaled())
    converted = rz.convert(model, X, include=("1",))
    assert type(converted[0]) is PreNorm
    assert layout(back(converted)) == layout(model)


def test_a_converted_part_of_a_larger_model() -> None:
    model = nn.Sequential(nn.Sequential(PreNorm(), PreNorm()), PreNorm())
    before = layout(model)
    model[0] = rz.convert(model[0], X)
    assert len(list(rz.alphas(model))) == 2
    assert layout(back(model)) == before
    back(model[0], inplace=True)
    assert layout(model) == before


def test_a_model_converted_in_two_steps() -> None:
    model = nn.Sequential(PreNorm(), InSequence(), PreNorm())
    first = rz.convert(model, X, include=("0", "1"))
    both = rz.convert(first, X)
    assert [name for name, _ in rz.alphas(both)] == ["0.alpha", "1.alpha", "2.alpha"]
    with pytest.warns(UserWarning, match="3 dropped norms"):
        again = rz.unconvert(both)
    assert layout(again) == layout(model)


def test_a_layer_converted_in_two_steps() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    x = torch.randn(2, 3, 8)
    one = rz.convert(model, x, drop_norm="none", alpha_init="preserve", verify=False)
    assert layout(silently(one)) == layout(model)
    again = rz.convert(silently(one), x)
    assert len(list(rz.alphas(again))) == 2
    assert torch.equal(again(x), x)


def test_back_and_forth() -> None:
    model = nn.Sequential(PreNorm(), PreNorm())
    once = rz.convert(model, X)
    twice = rz.convert(back(once), X)
    assert layout(twice) == layout(once)
    assert rz.validate(twice, X).ok
    assert type(twice[0]) is type(once[0])
