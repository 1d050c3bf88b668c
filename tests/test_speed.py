"""What makes a conversion cheap changes nothing: calls that are left out, texts that are made once."""

from __future__ import annotations

import cProfile
import gc
import pstats
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import rezero_convert as rz
from rezero_convert import sources
from rezero_convert.capture import memo
from rezero_convert.capture.guard import uncollected, untouched
from rezero_convert.rewrite import text


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "_RESULTS", {})
    monkeypatch.setattr(memo, "_OTHERS", set())
    monkeypatch.setattr(memo, "_RECIPES", {})


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


class Counter:
    """A torch function that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
        self.calls = 0
        self.function = function
        monkeypatch.setattr(memo, "_is_torchs", lambda func: True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def same(one: Tensor, other: Tensor) -> bool:
    assert isinstance(one, FakeTensor)
    assert isinstance(other, FakeTensor)
    own, others = (
        (x.shape, x.stride(), x.dtype, x.device, x.fake_mode, x._version, x._base, x.requires_grad)
        for x in (one, other)
    )
    return own == others


CHANGED = {
    "a view": lambda x: x.view(8, 8),
    "a detached tensor": lambda x: x.detach(),
    "the argument": lambda x: x,
    "changed in place": lambda x: x.add_(1),
    "changed besides": lambda x: (x.mul_(2), x + 1)[1],
    "two tensors": lambda x: (x + 1, x + 2),
    "no tensor": lambda x: x.dim(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_call_that_does_more_than_make_a_tensor_is_made_again(
    name: str, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, perform = Counter(monkeypatch, CHANGED[name]), memo.Memo(mode)
    for _ in range(3):
        perform(function, (torch.randn(4, 16),), {})
    assert function.calls == 3


class Seen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.enable_grad, lambda: torch.autocast("cpu"), Seen])
def test_a_call_that_others_have_a_say_in_is_made(
    context: Any, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, perform, x = Counter(monkeypatch, torch.relu), memo.Memo(mode), torch.randn(4, 16)
    perform(function, (x,), {})
    perform(function, (x,), {})
    assert function.calls == 1
    with context():
        perform(function, (x,), {})
    assert function.calls == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((4, 16), (16, 4)),
        ((4, 16, 1), (4, 16, 1.0)),
        ((4, 16, 1), (4, 16, True)),
    ],
)
def test_calls_on_other_arguments_are_others(
    one: tuple[Any, ...], other: tuple[Any, ...], mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, perform = Counter(monkeypatch, torch.add), memo.Memo(mode)
    for shape in (one, other, one, other):
        perform(function, (torch.randn(shape[:2]), *(shape[2:] or (1,))), {})
    assert function.calls == 2


def test_a_known_value_is_computed_with(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    function, perform = Counter(monkeypatch, torch.neg), memo.Memo(mode)
    first, second = (perform(function, (torch.tensor(value),), {}) for value in (3, 4))
    assert (first.item(), second.item()) == (-3, -4)


def test_functions_of_others_and_operators_are_called(mode: FakeTensorMode) -> None:
    calls = []

    def own(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    perform, x = memo.Memo(mode), torch.randn(4, 16)
    for _ in range(2):
        perform(own, (x,), {})
        perform(torch.ops.aten.relu.default, (x,), {})
    assert len(calls) == 2
    assert memo._RESULTS == {}


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_result_that_is_made_again_is_like_the_computed_one(channels_last: bool, mode: FakeTensorMode) -> None:
    perform, layer = memo.Memo(mode), nn.Conv2d(3, 8, 3, stride=2, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 9, 9, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    given = (x, layer.weight, None, (2, 2))
    computed = functional.conv2d(*given)
    first, again = perform(functional.conv2d, given, {}), perform(functional.conv2d, given, {})
    assert len(memo._RESULTS) == 1
    assert first is not again
    assert same(first, computed)
    assert same(again, computed)
    assert again.untyped_storage()._cdata != first.untyped_storage()._cdata


def relations(result: Any, tensors: list[Tensor]) -> list[Any]:
    """What a result's tensors are like, and what they have to do with the arguments."""
    found = []
    for x in result if isinstance(result, (tuple, list)) else [result]:
        storages = [x.untyped_storage()._cdata == other.untyped_storage()._cdata for other in tensors]
        bases = [x._base is other or (x._base is not None and x._base is other._base) for other in tensors]
        versions = [other._version for other in tensors]
        metadata = (x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad, x._version)
        found.append((type(x), metadata, x._is_view(), storages, bases, versions, [x is other for other in tensors]))
    return [type(result), *found]


VIEWS_AND_CHANGES = {
    "view": lambda x, y: Tensor.view(x, 8, 8),
    "transpose": lambda x, y: Tensor.transpose(x, 0, 1),
    "a view of a view": lambda x, y: Tensor.permute(x[1:], 1, 0),
    "split": lambda x, y: Tensor.split(x, 2),
    "unbind": lambda x, y: Tensor.unbind(x),
    "slice": lambda x, y: Tensor.__getitem__(x, (slice(1, 3), slice(None, None, 2))),
    "index": lambda x, y: Tensor.__getitem__(x, torch.tensor([0, 2])),
    "expand": lambda x, y: torch.broadcast_to(x[:1], (4, 16)),
    "as another type": lambda x, y: Tensor.view(x, torch.int32),
    "nothing to do": lambda x, y: Tensor.contiguous(x),
    "detach": lambda x, y: Tensor.detach(x),
    "reshape that copies": lambda x, y: Tensor.reshape(x.t(), 64),
    "in place": lambda x, y: Tensor.add_(x, y),
    "in place on a view": lambda x, y: Tensor.mul_(x[1], 2),
    "another shape in place": lambda x, y: Tensor.unsqueeze_(x, 0),
    "resized": lambda x, y: Tensor.resize_(x, 8, 4),
    "into a part": lambda x, y: (Tensor.__setitem__(x, 1, 5), x)[1],
    "out": lambda x, y: torch.add(x, y, out=y),
    "two new ones": lambda x, y: torch.max(x, 0),
    "a statistic is changed": lambda x, y: torch.batch_norm(x, None, None, y[0], y[1], True, 0.1, 1e-5, False),
    "with a number": lambda x, y: torch.cat([torch.tensor([]), x]),
}


@pytest.mark.parametrize("name", VIEWS_AND_CHANGES)
def test_results_of_operators_that_are_made_again_are_like_the_computed_ones(name: str, mode: FakeTensorMode) -> None:
    """Also what they share with the arguments, and what these are then like."""
    function, perform = VIEWS_AND_CHANGES[name], memo.Memo(mode)

    class Through(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return perform(func, args, kwargs or {})

    found = []
    for through in (False, True, True, True):
        x, y = torch.randn(4, 16), torch.randn(4, 16)
        if through:
            with Through():
                result = function(x, y)
        else:
            result = function(x, y)
        found.append([*relations(result, [x, y]), x.shape])
    assert found[1:] == found[:1] * 3


def test_views_are_computed_once(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, perform = [], memo.Memo(mode)
    dispatch = FakeTensorMode.__torch_dispatch__
    counted = lambda self, func, *args: seen.append(func) or dispatch(self, func, *args)  # noqa: E731
    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", counted)
    tensors = [torch.randn(4, 16) for _ in range(3)]
    del seen[:]
    for x in tensors:
        perform(Tensor.relu_, (perform(Tensor.view, (x, 8, 8), {}),), {})
    assert seen.count(torch.ops.aten.view.default) == seen.count(torch.ops.aten.relu_.default) == 1


def test_views_of_other_parts_are_others(mode: FakeTensorMode) -> None:
    perform, x = memo.Memo(mode), torch.randn(4, 16)
    for start in (0, 32, 0, 32):
        part = perform(Tensor.__getitem__, (x, slice(start // 16, start // 16 + 2)), {})
        assert perform(Tensor.view, (part, 32), {}).storage_offset() == start


def test_known_values_stay_known_until_something_is_written_there(mode: FakeTensorMode) -> None:
    perform = memo.Memo(mode)
    for value in (3.0, 4.0):
        number = perform(torch.tensor, (value,), {})
        assert perform(Tensor.item, (perform(Tensor.view, (number, 1), {}),), {}) == value
        assert perform(Tensor.mul_, (number, 2.0), {}).item() == 2 * value
        perform(Tensor.add_, (number, torch.randn(())), {})
        assert number.constant is None
    assert perform(torch.tensor, ([1.0, 2.0],), {}).constant is None


def test_the_values_of_a_mask_decide_on_the_shape(mode: FakeTensorMode) -> None:
    perform, x = memo.Memo(mode), torch.randn(1, 16)
    for value in (True, False, True):
        mask = perform(torch.tensor, ([value],), {})
        assert perform(Tensor.__getitem__, (x, mask), {}).shape == (int(value), 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_hooks_of_layers_whose_calls_are_left_out_run() -> None:
    model, seen = nn.Sequential(Block(), Block(), Block()), []
    for block in model:
        assert isinstance(block, Block)
        block.up.register_forward_hook(lambda module, args, output: seen.append(output))
    rz.audit(model, torch.randn(2, 8))
    assert len(seen) == 3
    assert len({id(output) for output in seen}) == 3


def test_the_edited_text_of_a_class_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sources.forget()
    made = []
    edit = text.edit
    monkeypatch.setattr(text, "edit", lambda *args, **kwargs: made.append(args) or edit(*args, **kwargs))
    model, x = nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 8)
    first, second = rz.convert(model, x), rz.convert(model, x)
    assert len(made) == 1
    assert type(first[0]) is type(second[3])
    other = rz.convert(model, x, drop_norm="none")
    assert type(other[0]) is not type(first[0])
    assert hasattr(other[0], "norm")
    assert not hasattr(first[0], "norm")


def test_garbage_is_collected_again_after_an_error() -> None:
    assert gc.isenabled()

    def failing() -> None:
        with uncollected():
            assert not gc.isenabled()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert gc.isenabled()


def test_who_collects_no_garbage_goes_on_so() -> None:
    gc.disable()
    try:
        rz.audit(Block(), torch.randn(2, 8))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_run_puts_into_empty_containers_is_taken_out() -> None:
    model = Block()
    model.seen, model.table, model.names = [], {}, set()
    model.order = {"a": 1, "b": 2}
    held = (model.seen, model.table, model.names, model.order)
    with untouched(model):
        model.seen.append(1)
        model.table["x"] = 1
        model.names.add("x")
        model.order["a"] = model.order.pop("a")  # the same items in another order
        model.up.register_forward_hook(lambda *_: None)
        model.late = 1
    assert held == ([], {}, set(), {"a": 1, "b": 2})
    assert list(model.order) == ["a", "b"]
    assert not model.up._forward_hooks
    assert not hasattr(model, "late")
    assert all(
        one is other for one, other in zip(held, (model.seen, model.table, model.names, model.order), strict=True)
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


@pytest.mark.parametrize("verify", [True, False])
def test_twice_the_depth_is_twice_the_calls(verify: bool) -> None:
    def calls(depth: int) -> int:
        model, x = nn.Sequential(*(Normed() for _ in range(depth))), torch.randn(2, 4)
        with cProfile.Profile() as profile:
            rz.convert(model, x, verify=verify)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # absent from the stubs

    calls(2)
    few, more, most = (calls(depth) for depth in (20, 40, 80))
    assert (most - more) / (more - few) == pytest.approx(2.0, abs=0.01)
