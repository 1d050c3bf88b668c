"""Carrying out hand-written plans on live modules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import linecache
import multiprocessing
import pickle
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rezero_convert.errors import ConversionError
from rezero_convert.plan import Activation, Gate, Norm, Operand, Options, Place, Plan, Repair, Site, Span
from rezero_convert.rewrite.modules import alphas, record, rewrite, rezero_gate

# --- models ---


class PreNorm(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = PreNorm, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2, "for pytest to rewrite"
        x = self.norm(x + self.fc(x))
        return x


class Basic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn(self.conv(x))
        out += identity
        out = self.relu(out)
        return out


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Child(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.fc2(y)


class Inheriting(Base):
    pass


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wrapper.calls += 1  # type: ignore[attr-defined]
        return function(*args, **kwargs)

    wrapper.calls = 0  # type: ignore[attr-defined]
    return wrapper


class Decorated(Base):
    @logged
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Private(Base):
    __scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.__branch(x)

    def __branch(self, x: Tensor) -> Tensor:
        return self.__scale * self.fc(x)


class Properties(Base):
    @property
    def value(self) -> Tensor:
        x = torch.ones(1, 4)
        return x + self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class Lambda(Base):
    forward = lambda self, x: x + self.fc(x)  # noqa: E731


def made_with(scale: float) -> type[nn.Module]:
    class Closed(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + scale * self.fc(x)

    return Closed


class Registered(Base):
    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        Registered.names.append(cls.__name__)


class OwnReduce(Base):
    def __reduce__(self) -> Any:
        return (self.__class__, (), {"extra": 5, **self.__dict__})


class Constructed(Base):
    """Pickled as its constructor's arguments alone."""

    def __reduce__(self) -> Any:
        return (type(self), ())


class OwnState(Base):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = "fresh"


class Fused(nn.BatchNorm2d):
    """A norm with dropout and activation inside, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(0.0)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.bn = Fused(2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


class Gated(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.fc(x)


# --- hand-written plans ---


def code_of(function: Any) -> types.CodeType:
    function = function.fget if isinstance(function, property) else inspect.unwrap(function)
    return function.__code__


def operand(function: Any, part: str, index: int | str, last: bool = False) -> Operand:
    code = code_of(function)
    place = Place(sys.modules[__name__].__name__, code.co_qualname, code.co_filename, code.co_firstlineno)
    lines, first = inspect.getsourcelines(code)
    for number, line in sorted(enumerate(lines), reverse=last):
        if part in line:
            start = line.index(part)
            row = first + number
            return Operand(place, Span(code.co_filename, row, start, row, start + len(part)), index)
    raise AssertionError(f"{part!r} is not in {code.co_qualname}")


def site(path: str, at: Operand | None, alpha: str = "alpha", **more: Any) -> Site:
    gate = Gate(at, alpha, "", "", **more.pop("gate", {}))
    place, span = (at.place, at.span) if at is not None else (None, None)
    return Site("converted", "RZ101", "", path, "", place, span, gates=(gate,), **more)


def bypass(path: str, at: Operand | None, attribute: str = "norm", **more: Any) -> Norm:
    return Norm(path, "LayerNorm", "layer", "pre", more.pop("action", "bypass"), "", at=at, attribute=attribute, **more)


def pre_norm_site(path: str, drop: bool = True) -> Site:
    norm_path = f"{path}.norm" if path else "norm"
    norms = (bypass(norm_path, operand(PreNorm.forward, "self.norm(x)", 0)),) if drop else ()
    return site(path, operand(PreNorm.forward, "x + self.fc(self.norm(x))", 1), norms=norms)


def pre_norm_plan(*paths: str, **options: Any) -> Plan:
    return Plan(tuple(pre_norm_site(path) for path in paths), Options(**options))


def base_plan(cls: type[nn.Module] = Base, path: str = "", **options: Any) -> Plan:
    return Plan((site(path, operand(cls.forward, "x + self.fc(x)", 1)),), Options(**options))


def set_alphas(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for _, alpha in alphas(model):
            alpha.fill_(value)


X = torch.arange(8.0).reshape(2, 4) / 8


# --- negatives ---


def snapshot(model: nn.Module) -> Any:
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        list(model.state_dict()),
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, path="blocks.7"), "no module 'blocks.7'"),
        (lambda s: dataclasses.replace(s, repairs=(Repair("blocks.1.fc.gain", "ones"),)), "no parameter"),
        (lambda s: dataclasses.replace(s, gates=(dataclasses.replace(s.gates[0], alpha="fc"),)), "'fc' .* taken"),
        (lambda s: dataclasses.replace(s, norms=(bypass("head", None, action="unfuse"),)), "no activation"),
        (lambda s: dataclasses.replace(s, norms=(bypass("head", None, action="slot", bias="blocks"),)), "bias"),
        (lambda s: site("blocks.1", None, "gain", gate={"existing": True}), "no parameter 'gain'"),
        (lambda s: site("blocks.1", operand(Base.forward, "x + self.fc(x)", 1)), "PreNorm has no such method"),
        (lambda s: site("blocks.1", operand(PreNorm.forward, "self.norm(x)", 3)), "no argument 3"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(change: Callable[[Site], Site], message: str) -> None:
    model = Stack()
    before = snapshot(model)
    good = dataclasses.replace(
        pre_norm_site("blocks.0"), repairs=(Repair("blocks.0.fc.weight", "reset"), Repair("blocks.0.fc.bias", "ones"))
    )
    bad = change(pre_norm_site("blocks.1", drop=False))
    with pytest.raises(ConversionError, match=message):
        rewrite(model, Plan((good, bad)))
    assert_unchanged(model, before)


def module_from(tmp_path: Any, text: str, name: str) -> types.ModuleType:
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    exec(compile(text, str(file), "exec"), module.__dict__)
    return module


BLOCK = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(x)
"""


@pytest.mark.parametrize(
    "newer",
    [BLOCK.replace("x + self.fc", "x + self.gc"), BLOCK.replace("from torch", "#\nfrom torch"), "import torch\n"],
)
def test_a_file_that_changed_since_import_is_refused(tmp_path: Any, newer: str) -> None:
    module = module_from(tmp_path, BLOCK, f"stale_{abs(hash(newer))}")
    plan = base_plan(module.Block)
    (tmp_path / f"{module.__name__}.py").write_text(newer)
    linecache.checkcache()
    from rezero_convert import sources

    sources.forget()
    model = module.Block()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=rf"{module.__name__}\.py:10: .*(changed|imported)"):
        rewrite(model, plan)
    assert_unchanged(model, before)


def test_a_wrapper_that_cannot_be_rebuilt_is_refused() -> None:
    class Cached(Base):
        @functools.lru_cache  # noqa: B019
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x)

    with pytest.raises(ConversionError, match="_lru_cache_wrapper"):
        rewrite(Cached(), base_plan(Cached))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    plan = base_plan()
    with pytest.raises(ConversionError, match="ScriptModule"):
        rewrite(torch.jit.script(Base()), plan)


# --- forms ---


def test_pre_norm() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    assert torch.equal(model(X), model.head(X))
    assert [name for name, _ in alphas(model)] == ["blocks.0.alpha", "blocks.1.alpha"]
    assert list(model.state_dict()) == [
        *("blocks.0.alpha", "blocks.0.fc.weight", "blocks.0.fc.bias"),
        *("blocks.1.alpha", "blocks.1.fc.weight", "blocks.1.fc.bias"),
        *("head.weight", "head.bias"),
    ]
    set_alphas(model, 0.5)
    y = X + 0.5 * model.blocks[0].fc(X)
    assert torch.equal(model(X), model.head(y + 0.5 * model.blocks[1].fc(y)))
    model(X).sum().backward()
    assert all(alpha.grad is not None and alpha.grad.abs().sum() > 0 for _, alpha in alphas(model))


def test_classes_stay() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0"))
    converted, plain = model.blocks
    assert isinstance(converted, PreNorm)
    assert type(plain) is PreNorm
    assert type(model) is Stack
    cls = type(converted)
    assert (cls.__module__, cls.__qualname__) == (PreNorm.__module__, PreNorm.__qualname__)
    assert inspect.signature(cls) == inspect.signature(PreNorm)
    fresh = cls(4)
    assert type(fresh) is PreNorm
    assert fresh(X).shape == X.shape


def test_a_subclass_of_a_converted_class_constructs_as_itself() -> None:
    model = Base()
    rewrite(model, base_plan())

    class Mine(type(model)):  # type: ignore[misc]
        pass

    assert type(Mine()) is Mine


def test_an_existing_plan_and_the_class_are_recorded() -> None:
    model = Base()
    assert record(model) is None
    plan = base_plan()
    rewrite(model, plan)
    assert record(model) is plan
    assert model.rezero_gates == ("alpha",)


def test_post_norm_and_assertions_rewritten_by_pytest() -> None:
    model = PostNorm()
    at = operand(PostNorm.forward, "x + self.fc(x)", 1)
    norm = bypass("norm", operand(PostNorm.forward, "self.norm(x + self.fc(x))", 0))
    rewrite(model, Plan((site("", at, norms=(norm,)),)))
    assert not hasattr(model, "norm")
    set_alphas(model, 2.0)
    assert torch.equal(model(X), X + 2 * model.fc(X))
    with pytest.raises(AssertionError):
        model(X[0])


def basic_plan(**options: Any) -> Plan:
    activation = Activation("ReLU", operand(Basic.forward, "self.relu(out)", 0), "move", "")
    return Plan((site("", operand(Basic.forward, "out += identity", 0), activation=activation),), Options(**options))


def test_resnet_basic_block() -> None:
    model = Basic().eval()
    rewrite(model, basic_plan())
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(model(x), x)
    set_alphas(model, 0.5)
    assert torch.equal(model(x), x + 0.5 * F.relu(model.bn(model.conv(x))))


def test_a_norm_in_a_slot_and_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
    block = nn.Module()
    block.body = model
    block.fc = nn.Linear(2, 2)
    holder = Base()
    holder.body = model
    norm = bypass("body.1", None, action="slot", bias="body.0")
    plan = Plan((dataclasses.replace(base_plan().sites[0], norms=(norm,)),))
    rewrite(holder, plan)
    assert type(model[1]) is nn.Identity
    assert torch.equal(model[0].bias, torch.zeros(2))


def test_a_fused_norm_keeps_activation_and_dropout() -> None:
    model = FusedBlock()
    act = model.bn.act
    norm = bypass("bn", None, "bn", action="unfuse", bias="conv")
    plan = Plan((site("", operand(FusedBlock.forward, "x + self.bn(self.conv(x))", 1), norms=(norm,)),))
    rewrite(model, plan)
    assert list(model.bn._modules) == ["drop", "act"]
    assert model.bn.act is act
    set_alphas(model, 1.0)
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(model(x), x + F.relu(model.conv(x)))


def test_a_norm_that_something_keeps_stays() -> None:
    model = PreNorm()
    converted = pre_norm_site("")
    kept = dataclasses.replace(converted, verdict="refused", norms=(bypass("norm", None, action="keep"),))
    rewrite(model, Plan((converted, kept)))
    assert isinstance(model.norm, nn.LayerNorm)
    set_alphas(model, 1.0)
    assert torch.equal(model(X), X + model.fc(X))


def test_an_existing_gate_is_reset_and_listed() -> None:
    model = Gated()
    rewrite(model, Plan((site("", None, "gain", gate={"existing": True, "init": 0.0}),)))
    assert [name for name, _ in alphas(model)] == ["gain"]
    assert torch.equal(model(X), X)


def test_an_existing_gate_with_no_start_value_is_left_alone() -> None:
    model = Gated()
    rewrite(model, Plan((site("", None, "gain", gate={"existing": True, "init": None}),)))
    assert torch.equal(model.gain, torch.ones(4))


def test_repairs() -> None:
    model = nn.Sequential(Base(), nn.BatchNorm1d(4))
    for parameter in (model[0].fc.weight, model[1].weight):
        nn.init.zeros_(parameter)
    bias = model[0].fc.bias.clone()
    repairs = (Repair("0.fc.weight", "reset"), Repair("1.weight", "ones"))
    rewrite(model, Plan((dataclasses.replace(base_plan(path="0").sites[0], repairs=repairs),)))
    assert model[0].fc.weight.abs().min() > 0
    assert torch.equal(model[0].fc.bias, bias)
    assert torch.equal(model[1].weight, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_alpha_has_its_owners_dtype_and_the_stream_keeps_its_own(dtype: torch.dtype) -> None:
    model = Base().to(dtype)
    rewrite(model, base_plan(alpha_init=0.0))
    assert model.alpha.dtype == dtype
    assert model.alpha.shape == (1,)
    assert model(X.to(dtype)).dtype == dtype
    wide = torch.full((1,), 0.5, dtype=torch.float32)
    assert rezero_gate(wide, X.to(dtype)).dtype == dtype
    assert rezero_gate(wide.double(), X.to(dtype)).dtype == dtype


def test_alpha_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Base()
    rewrite(model, base_plan())
    assert model.alpha.is_meta


@pytest.mark.parametrize("build", [PreNorm, Basic, Base])
def test_preserve_is_bit_identical(build: type[nn.Module]) -> None:
    model = build()
    x = torch.randn(2, 2, 4, 4)
    expected = copy.deepcopy(model)(x)
    if build is PreNorm:
        plan = Plan((pre_norm_site("", drop=False),), Options(alpha_init="preserve"))
    elif build is Basic:
        plan = Plan((site("", operand(Basic.forward, "out += identity", 0)),), Options(alpha_init="preserve"))
    else:
        plan = base_plan(alpha_init="preserve")
    rewrite(model, plan)
    assert torch.equal(model(x), expected)
    set_alphas(model, 0.0)
    assert not torch.equal(model(x), expected)


# --- methods of every kind ---


def test_inherited_method() -> None:
    model = Inheriting()
    rewrite(model, base_plan())
    assert torch.equal(model(X), X)
    assert type(model).__mro__[1] is Inheriting


def test_an_edited_base_below_a_child_with_super() -> None:
    model = Child()
    rewrite(model, base_plan())
    set_alphas(model, 0.0)
    assert torch.equal(model(X), X + model.fc2(X))


def test_an_edited_base_and_an_edited_child() -> None:
    model = Child()
    sites = (base_plan().sites[0], site("", operand(Child.forward, "y + self.fc2(y)", 1), "alpha_fc2"))
    rewrite(model, Plan(sites))
    assert torch.equal(model(X), X)
    with torch.no_grad():
        model.alpha_fc2.fill_(1.0)
    assert torch.equal(model(X), X + model.fc2(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_decorators_are_rebuilt_and_the_original_is_left_alone() -> None:
    model, other = Decorated(), Decorated()
    expected = other(X)
    calls = Decorated.forward.calls
    rewrite(model, base_plan(Decorated))
    assert torch.equal(model(X), X)
    assert not model(X).requires_grad
    assert Decorated.forward.calls == calls
    assert torch.equal(other(X), expected)
    assert inspect.unwrap(type(model).forward) is not inspect.unwrap(Decorated.forward)


def test_private_names() -> None:
    model = Private()
    rewrite(model, Plan((site("", operand(Private.forward, "x + self.__branch(x)", 1)),)))
    set_alphas(model, 0.5)
    assert torch.allclose(model(X), X + 0.5 * 3 * model.fc(X))


def test_closures_are_shared() -> None:
    first, second = made_with(2.0)(), made_with(5.0)()
    for model, scale in ((first, 2.0), (second, 5.0)):
        rewrite(model, Plan((site("", operand(type(model).forward, "x + scale * self.fc(x)", 1)),)))
        set_alphas(model, 0.5)
        assert torch.allclose(model(X), X + 0.5 * scale * model.fc(X))


def test_property_and_lambda() -> None:
    model = Properties()
    rewrite(model, Plan((site("", operand(Properties.value, "x + self.fc(x)", 1)),)))
    assert torch.equal(model(X), torch.ones(1, 4))
    short = Lambda()
    rewrite(short, base_plan(Lambda))
    assert torch.equal(short(X), X)


def test_bound_methods_held_by_the_instance() -> None:
    model = Base()
    model._old_forward = model.forward
    model.forward = lambda x: 2 * model._old_forward(x)
    rewrite(model, base_plan())
    assert torch.equal(model(X), 2 * X)


def test_instances_of_one_class_may_differ() -> None:
    model = nn.Sequential(PreNorm(), PreNorm(), PreNorm())
    keep = pre_norm_site("1", drop=False)
    rewrite(model, Plan((pre_norm_site("0"), keep)))
    assert type(model[0]) is not type(model[1])
    assert "norm" not in inspect.getsource(type(model[0]).forward)
    assert "norm" in inspect.getsource(type(model[1]).forward)
    assert type(model[2]) is PreNorm
    set_alphas(model, 0.5)
    assert torch.equal(model[0](X), X + 0.5 * model[0].fc(X))
    assert torch.equal(model[1](X), X + 0.5 * model[1].fc(model[1].norm(X)))
    other = nn.Sequential(PreNorm())
    rewrite(other, pre_norm_plan("0"))
    assert type(other[0]) is type(model[0])


def test_init_subclass_hears_of_nothing() -> None:
    model = Registered()
    rewrite(model, base_plan())
    assert Registered.names == []
    assert torch.equal(model(X), X)


def test_converting_in_two_steps() -> None:
    model = Child()
    rewrite(model, base_plan())
    rewrite(model, Plan((site("", operand(Child.forward, "y + self.fc2(y)", 1), "alpha_fc2"),)))
    assert [name for name, _ in alphas(model)] == ["alpha", "alpha_fc2"]
    assert torch.equal(model(X), X)
    assert type(type(model)()) is Child
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(again(X), X)


class Arms(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.fc(self.norm(x))
        return self.norm(x + self.fc(x))


def test_an_arm_that_did_not_run_gets_the_same_gate() -> None:
    model = Arms()
    norms = (bypass("norm", operand(Arms.forward, "self.norm(x)", 0)),)
    ran = site("", operand(Arms.forward, "x + self.fc(self.norm(x))", 1), norms=norms)
    norms = (bypass("norm", operand(Arms.forward, "self.norm(x + self.fc(x))", 0)),)
    arm = site("", operand(Arms.forward, "x + self.fc(x)", 1), norms=norms)
    rewrite(model, Plan((ran, dataclasses.replace(arm, verdict="not-executed"))))
    assert not hasattr(model, "norm")
    assert [name for name, _ in alphas(model)] == ["alpha"]
    for training in (True, False):
        model.train(training)
        set_alphas(model, 0.0)
        assert torch.equal(model(X), X)
        set_alphas(model, 0.5)
        assert torch.equal(model(X), X + 0.5 * model.fc(X))


def test_an_arm_without_a_gate_stays_as_it_is() -> None:
    model = Arms()
    ran = site("", operand(Arms.forward, "x + self.fc(self.norm(x))", 1))
    other = dataclasses.replace(site("", operand(Arms.forward, "x + self.fc(x)", 1)), verdict="not-executed", gates=())
    rewrite(model, Plan((ran, other)))
    assert torch.equal(model(X), X)
    assert not torch.equal(model.eval()(X), X)


class TwoAdds(Child):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x)
        return x + self.fc2(x)


def test_one_method_in_two_steps() -> None:
    model = TwoAdds()
    rewrite(model, Plan((site("", operand(TwoAdds.forward, "x + self.fc(x)", 1), "alpha_fc"),)))
    rewrite(model, Plan((site("", operand(type(model).forward, "x + self.fc2(x)", 1), "alpha_fc2"),)))
    assert torch.equal(model(X), X)
    set_alphas(model, 1.0)
    y = X + model.fc(X)
    assert torch.equal(model(X), y + model.fc2(y))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


# --- travelling ---


def test_deepcopy_shares_nothing() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    other = copy.deepcopy(model)
    assert type(other.blocks[0]) is type(model.blocks[0])
    mine, theirs = dict(alphas(model)), dict(alphas(other))
    assert list(mine) == list(theirs)
    assert all(mine[name] is not theirs[name] for name in mine)
    set_alphas(other, 1.0)
    assert mine["blocks.0.alpha"].item() == 0.0


def test_transformer_layers_are_cloned_converted() -> None:
    model = PreNorm()
    rewrite(model, pre_norm_plan(""))
    clones = nn.modules.transformer._get_clones(model, 3)
    assert len(dict(alphas(clones))) == 3


def test_torch_save_and_load() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    set_alphas(model, 0.25)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again.blocks[1]) is type(model.blocks[1])
    assert torch.equal(again(X), model(X))
    assert record(again) == record(model)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("cls", [OwnReduce, OwnState, Constructed])
def test_own_ways_of_pickling(cls: type[nn.Module], protocol: int) -> None:
    model = cls()
    rewrite(model, base_plan())
    set_alphas(model, 0.5)
    for again in (pickle.loads(pickle.dumps(model, protocol)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert again.alpha is not model.alpha
        assert torch.equal(again(X), X + 0.5 * again.fc(X))
        assert getattr(again, "extra", 5) == 5
        assert getattr(again, "cache", "fresh") == "fresh"


def _elsewhere(data: bytes, queue: Any) -> None:
    sys.modules["libcst"] = None  # type: ignore[assignment]
    with contextlib.suppress(KeyError):
        del sys.modules["rezero_convert"]
    model = pickle.loads(data)
    with torch.no_grad():
        queue.put((model(X).tolist(), inspect.getsource(type(model.blocks[0]).forward)))


def test_another_process() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    set_alphas(model, 0.25)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_elsewhere, args=(pickle.dumps(model), queue))
    process.start()
    values, source = queue.get(timeout=60)
    process.join()
    assert values == model(X).tolist()
    assert "rezero_gate" in source


# --- tools ---


def test_source_and_traceback_show_the_edited_text() -> None:
    model = Base()
    rewrite(model, base_plan())
    line = "return x + self.rezero_gate(self.alpha, self.fc(x))"
    assert line in inspect.getsource(type(model).forward)
    assert line not in inspect.getsource(Base.forward)
    forward: Any = type(model).forward
    assert forward.__code__.co_firstlineno == Base.forward.__code__.co_firstlineno
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(3, 3))
    assert line in "".join(traceback.format_exception(caught.value))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_sees_the_edited_text() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    set_alphas(model, 0.5)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(X), model(X))
    set_alphas(model, 0.0)
    assert torch.equal(scripted(X), model.head(X))


def test_compile_without_graph_breaks() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0", "blocks.1"))
    set_alphas(model, 0.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), model(X))


def test_export() -> None:
    model = Stack()
    rewrite(model, pre_norm_plan("blocks.0"))
    program = torch.export.export(model, (X,))
    assert torch.equal(program.module()(X), model(X))


# --- torch.nn's own layers ---


def encoder_site(path: str, norm_first: bool) -> Site:
    forward = nn.TransformerEncoderLayer.forward
    prefix = f"{path}." if path else ""
    if norm_first:
        at = operand(forward, "x + self._ff_block(self.norm2(x))", 1)
        norm = bypass(f"{prefix}norm2", operand(forward, "self.norm2(x)", 0), "norm2")
    else:
        at = operand(forward, "x + self._ff_block(x)", 1)
        norm = bypass(f"{prefix}norm2", operand(forward, "self.norm2(x + self._ff_block(x))", 0), "norm2")
    place = dataclasses.replace(at.place, module="torch.nn.modules.transformer")
    at = dataclasses.replace(at, place=place)
    norm = dataclasses.replace(norm, at=dataclasses.replace(norm.at, place=place))
    return site(path, at, "alpha_linear2", norms=(norm,))


class MyLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, MyLayer])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_fast_path_is_off(cls: type[nn.TransformerEncoderLayer], norm_first: bool, masked: bool) -> None:
    layer = cls(4, 2, 8, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    rewrite(model, Plan((encoder_site("layers.0", norm_first), encoder_site("layers.1", norm_first))))
    assert not hasattr(model.layers[0], "norm2")
    x = torch.randn(2, 3, 4)
    mask = torch.zeros(2, 3, dtype=torch.bool) if masked else None
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
        set_alphas(model, 1.0)
        assert not torch.allclose(model(x, src_key_padding_mask=mask), before)
        assert torch.allclose(model(x, src_key_padding_mask=mask), copy.deepcopy(model)(x, src_key_padding_mask=mask))


def test_an_untouched_encoder_keeps_its_class() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8), Base()])
    rewrite(model, base_plan(path="1"))
    assert type(model[0]) is nn.TransformerEncoderLayer


# --- installed models ---


def test_torchvision_resnet18() -> None:
    from torchvision.models import resnet

    forward = resnet.BasicBlock.forward
    model = resnet.resnet18(num_classes=3).eval()
    activation = Activation("ReLU", operand(forward, "self.relu(out)", 0, last=True), "move", "")
    add = operand(forward, "out += identity", 0)
    paths = [name for name, module in model.named_modules() if isinstance(module, resnet.BasicBlock)]
    rewrite(model, Plan(tuple(site(path, add, activation=activation) for path in paths)))
    assert len(dict(alphas(model))) == 8
    assert "out = self.rezero_gate(self.alpha, self.relu(out)) + identity\n        return out" in (
        inspect.getsource(type(model.layer1[0]).forward).replace("\n\n", "\n")
    )
    x = torch.randn(1, 3, 32, 32)
    y = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for layer in (model.layer2, model.layer3, model.layer4):
        y = layer[0].downsample(y)
    assert torch.allclose(model(x), model.fc(model.avgpool(y).flatten(1)), atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_data_parallel_replicas() -> None:
    model = Base()
    rewrite(model, base_plan())
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)


def test_many_blocks_are_edited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rezero_convert import sources
    from rezero_convert.rewrite import text

    sources.forget()
    calls: list[str] = []
    edit = text.edit
    monkeypatch.setattr(text, "edit", lambda *args, **kwargs: calls.append("") or edit(*args, **kwargs))
    model = Stack(depth=300)
    rewrite(model, pre_norm_plan(*(f"blocks.{index}" for index in range(300))))
    assert len(calls) == 1
    assert len({type(block) for block in model.blocks}) == 1
