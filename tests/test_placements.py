"""Where code puts its residual adds: loops, helpers, closures, inheritance, spellings; live and as source."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import placements
import pytest
import torch
from torch import nn

import rezero_convert as rz

REFUSED = {
    "Appended": ("RZ911", "in a way that a list of alphas cannot be walked beside"),
    "Rebound": ("RZ911", "in a way that a list of alphas cannot be walked beside"),
    "SomePasses": ("RZ911", "not every pass of the loop over self.blocks adds its branch"),
    "SlicedByInput": ("RZ911", "self.blocks[:depth], is computed in the method"),
    "Counted": ("RZ911", "no `for` around it"),
    "Reduced": ("RZ911", "no `for` around it"),
    "DictionaryOfStreams": ("RZ911", "in a way that a list of alphas cannot be walked beside"),
    "LerpBackwards": ("RZ912", "no operand of the lerp"),
    "Summed": ("RZ912", "not written as an add"),
    "SummedFromSkip": ("RZ912", "not written as an add"),
    "Held": ("RZ912", "Holder.run, which is no module's method"),
    "ClassRuns": ("RZ912", "ClassRuns.run, which is no module's method"),
    "SquaredHelper": ("RZ912", "squared_add, where its operand is not one argument"),
    "HelperScaledByInput": ("RZ912", "scaled_add, where its operand is not one argument"),
    "HelperRuns": ("RZ912", "residual, where its operand is not one argument"),
}
GATES = {
    "Pairs": ["alpha_layers.0", "alpha_layers.1", "alpha_layers.2"] + [f"alpha_layers_2.{i}" for i in range(3)],
    "Plain": ["alpha.0", "alpha.1", "alpha.2"],
    "Enumerated": ["alpha.0", "alpha.1", "alpha.2"],
    "Indexed": ["alpha.0", "alpha.1", "alpha.2"],
    "Sliced": ["alpha.0", "alpha.1"],
    "Zipped": [f"alpha_{name}.{i}" for name in ("blocks", "others") for i in range(3)],
    "Tied": ["alpha"],
    "Nested": ["alpha.0.0", "alpha.0.1", "alpha.1.0", "alpha.1.1"],
    "NestedPairs": [f"alpha_stages{n}.{path}" for n in ("", "_2") for path in ("0.0", "1.0", "1.1")],
    "NestedAttribute": ["alpha.0.0", "alpha.0.1", "alpha.1.0"],
    "NestedNumbered": ["alpha.0.0", "alpha.0.1", "alpha.1.0", "alpha.1.1"],
    "NestedRepeats": ["alpha.0", "alpha.1", "alpha.2"],
    "NestedThrice": [f"alpha.{tree}.{path}" for tree in range(2) for path in ("0.0", "0.1", "1.0")],
    "AlphaTaken": ["alpha.0", "alpha.1", "alpha.2"],
    "LayerDrop": ["alpha.0", "alpha.1", "alpha.2"],
    "ByName": ["alpha.0", "alpha.1"],
    "ByKey": ["alpha.0", "alpha.1"],
    "Each": ["alpha.0", "alpha.1", "alpha.2"],
    "EachPart": ["alpha.0", "alpha.1", "alpha.2"],
    "Comprehension": ["alpha.0", "alpha.1"],
    "Display": ["alpha.0", "alpha.1"],
    "Backwards": ["alpha.0", "alpha.1", "alpha.2"],
    "BackwardsByNumber": ["alpha.0", "alpha.1", "alpha.2"],
    "BackwardsPairs": [f"alpha_layers{n}.{i}" for n in ("", "_2") for i in range(3)],
    "BackwardsZipped": ["alpha.0", "alpha.1", "alpha.2"],
    "NestedBackwards": ["alpha.0.0", "alpha.0.1", "alpha.1.0", "alpha.1.1"],
    "OnePass": ["alpha.0"],
    "EverySecond": ["alpha.0", "alpha.1"],
    "LocalList": ["alpha.0", "alpha.1"],
    "LocalNumbered": ["alpha.0", "alpha.1", "alpha.2"],
    "LocalPairs": [f"alpha_layers{n}.{i}" for n in ("", "_2") for i in range(2)],
    "LocalItems": ["alpha.0", "alpha.1"],
    "DictionaryOfModules": ["alpha.0", "alpha.1"],
    "NestedMixed": ["alpha.0.0", "alpha.0.1", "alpha.1.0", "alpha.1.1"],
    "Aggregated": ["alpha"],
    "AggregatedList": ["alpha"],
    "Accumulated": ["alpha.0", "alpha.1", "alpha.2"],
    "AccumulatedFromZero": ["alpha"],
    "AccumulatedFromFirst": ["alpha"],
    "Lerp": ["alpha"],
    "LerpNumber": ["alpha"],
    "LerpParameter": ["g"],
    "LerpInput": ["alpha"],
    "Helper": ["alpha_a", "alpha_b"],
    "ScaledHelper": ["alpha_a", "alpha_b"],
    "DepthHelper": ["alpha_a", "alpha_b"],
    "BalancedHelper": ["alpha"],
    "Parallel": ["alpha_a", "alpha_b"],
    "Subtracted": ["alpha"],
    "Addcmul": ["alpha"],
    "Towards": ["g"],
    "ScaledAdd": ["alpha"],
    "KeywordAdd": ["alpha"],
    "InPlaceOnBranch": ["alpha"],
    "InPlaceOnSkip": ["alpha"],
    "Statements": ["alpha_a", "alpha_b"],
    "Generic": ["net.0.alpha", "net.1.alpha"],
    "NormByCaller": ["layers.0.2.alpha", "layers.1.2.alpha"],
    "Checkpointed": ["alpha"],
    "Reentrant": ["alpha"],
    "Base": ["alpha"],
    "Child": ["alpha", "alpha_b"],
    "Dictionary": ["alpha"],
    "Listed": ["alpha_a", "alpha_b"],
    "ListedInLoop": ["alpha.0", "alpha.1", "alpha.2"],
    "Dataclass": ["alpha_a", "alpha_b"],
    "Tuples": ["alpha"],
    "Lambda": ["alpha"],
    "HeldLambda": ["alpha_a", "alpha_b"],
    "LambdaInModule": ["alpha_a", "alpha_b"],
    "Joined": ["alpha_a", "alpha_b"],
    "Static": ["alpha"],
    "Class": ["alpha"],
    "Timed": ["alpha"],
    "Generator": ["alpha.0", "alpha.1"],
    "HeldJoin": ["alpha"],
    "ForTraining": ["alpha_a", "alpha_b"],
    "ForEvaluation": ["alpha_a", "alpha_b"],
    "Scattered": ["alpha"],
    "IndexAdded": ["alpha_a", "alpha_b"],
    "Put": ["alpha"],
    "WrittenBack": ["alpha"],
    "WrittenBackSlice": ["alpha"],
    "Experts": ["alpha"],
    "Arms": ["alpha_a"],
    "Walrus": ["alpha"],
}


def make(name: str, module: ModuleType = placements) -> nn.Module:
    torch.manual_seed(0)
    return getattr(module, name)()  # type: ignore[no-any-return]


def outputs(model: nn.Module, x: torch.Tensor, *, train: bool) -> torch.Tensor:
    torch.manual_seed(1)
    result: torch.Tensor = copy.deepcopy(model).train(train)(x.clone().requires_grad_())
    return result


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_is_refused_with_the_reason(name: str) -> None:
    code, reason = REFUSED[name]
    found = [s for s in rz.audit(make(name), torch.randn(2, 4, 8)).plan.sites if s.verdict != "converted"]
    assert found
    assert not rz.audit(make(name), torch.randn(2, 4, 8)).plan.converted
    assert any(site.code == code and reason in site.reason for site in found), found
    assert all(site.span is not None and site.span.file == placements.__file__ for site in found)


@pytest.mark.parametrize("name", GATES)
def test_live_conversion(name: str) -> None:
    model, x = make(name), torch.randn(2, 4, 8)
    preserved = rz.convert(model, x, alpha_init="preserve")
    for train in (False, True):
        assert torch.equal(outputs(model, x, train=train), outputs(preserved, x, train=train))
    converted = rz.convert(model, x)  # verified
    assert [alpha for alpha, _ in rz.alphas(converted)] == GATES[name]
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    moved = outputs(converted, x, train=False)
    assert not torch.equal(moved, outputs(model, x, train=False))
    assert torch.equal(outputs(copy.deepcopy(converted), x, train=False), moved)
    assert torch.equal(outputs(rz.unconvert(preserved), x, train=False), outputs(model, x, train=False))


def test_a_lerp_by_a_number_is_refused_where_the_gated_weight_would_be_rounded() -> None:
    (site,) = rz.audit(make("LerpNumber").bfloat16(), torch.randn(2, 4, 8).bfloat16()).plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ912")
    assert "precision" in site.reason


def test_a_function_that_init_made_belongs_to_the_copy() -> None:
    model, x = make("HeldLambda"), torch.randn(2, 4, 8)
    before = outputs(model, x, train=False)
    converted = rz.convert(model, x)
    nn.init.zeros_(converted.a.linear.weight)
    nn.init.ones_(converted.alpha_a)
    assert torch.equal(outputs(model, x, train=False), before)
    assert not torch.equal(converted.run(x), x)  # the bias is left
    assert torch.equal(converted.run(x), x + torch.nn.functional.gelu(converted.a.linear.bias))
    rz.convert(model, x, inplace=True)
    assert torch.equal(model.run(x), x)


def test_a_variable_of_the_alphas_name_is_not_shadowed() -> None:
    model, x = make("AlphaTaken"), torch.randn(2, 4, 8)
    preserved = rz.convert(model, x, drop_norm="none", alpha_init="preserve")
    for _, alpha in rz.alphas(preserved):
        nn.init.constant_(alpha, 2.0)
    torch.testing.assert_close(preserved(x), model(x, alpha=1.0))


@pytest.mark.parametrize("name", ["Nested", "NestedThrice", "Comprehension", "Lerp", "Scattered", "WrittenBackSlice"])
def test_a_conversion_holds_once_trained_and_is_not_made_twice(name: str) -> None:
    x = torch.randn(2, 4, 8)
    converted = rz.convert(make(name), x)
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    assert rz.validate(converted, x).ok
    assert not rz.audit(converted, x).plan.converted


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file converted without being run, imported."""
    text = Path(placements.__file__).read_text()
    result = rz.convert_source(text, file=placements.__file__)
    again = rz.convert_source(result.text, file="again.py")
    assert again.text == result.text
    path = tmp_path_factory.mktemp("rewritten") / "placements_rewritten.py"
    path.write_text(result.text)
    spec = importlib.util.spec_from_file_location("placements_rewritten", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["placements_rewritten"] = module
    spec.loader.exec_module(module)
    return module


# The branch's norm also serves a use outside a branch in this file (Sliced, Nested, ...), so the file keeps it.
SOURCE = [name for name in GATES if name not in ("Towards", "Joined", "Static", "Class", "HeldJoin")]


@pytest.mark.parametrize("name", SOURCE)
def test_source_agrees_with_the_live_route(name: str, rewritten: ModuleType) -> None:
    x = torch.randn(2, 4, 8)
    live = rz.convert(make(name), x, drop_norm="none")
    twin = make(name, rewritten)
    names = [alpha for alpha, _ in rz.alphas(live)]
    assert [n for n, _ in twin.named_parameters() if "alpha" in n] == [n for n in names if "alpha" in n]
    for _, alpha in rz.alphas(live):
        nn.init.normal_(alpha)
    twin.load_state_dict({key: value for key, value in live.state_dict().items() if key in twin.state_dict()})
    torch.testing.assert_close(outputs(twin, x, train=False), outputs(live, x, train=False), rtol=1e-4, atol=1e-4)
