"""What must hold for a generated model, on each route."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import rezero_convert as rz
from rezero_convert.capture.live import trace_live
from rezero_convert.detect import detect
from rezero_convert.plan import Site
from rezero_convert.rewrite import modules

from .writing import Add, Case

_numbers = itertools.count()
_NORMS = ("LayerNorm", "RMSNorm", "Scaled", "ChannelNorm", "BatchNorm2d", "GroupNorm")


@dataclass(frozen=True)
class Made:
    """A generated model, imported and built."""

    case: Case
    file: Path
    model: nn.Module
    x: torch.Tensor


def build(case: Case, folder: Path) -> Made:
    """Write and import a case; its model must itself run, forwards and backwards."""
    file = folder / f"fuzz_{next(_numbers)}.py"
    file.write_text(case.text)
    torch.manual_seed(0)
    made = Made(case, file, load(file).Net().eval(), torch.randn(case.shape))
    output = made.model(made.x).sum()
    if output.requires_grad:
        output.backward()
    made.model.zero_grad()
    return made


def load(file: Path) -> ModuleType:
    """Import a file under its own name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def forget(made: Made) -> None:
    """Drop what `build` and the source route imported."""
    for name in [name for name in sys.modules if name.startswith(made.file.stem)]:
        del sys.modules[name]


# The exact set of blocks


def live_blocks(made: Made, sites: Iterable[Site], route: str) -> None:
    """Every add of every instance has its verdict, and nothing else is converted.

    Fewer gates than one an instance and add, or more, fail too.
    """
    expected: dict[tuple[str, int], Add] = {}
    for path, module in made.model.named_modules():
        for add in made.case.adds:
            if add.cls == type(module).__name__:
                expected[path, add.line] = add
    found: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        if site.span is not None and site.span.file == str(made.file):
            found.setdefault((site.path, site.span.line), []).append(site)
    wrong = []
    for key in sorted(expected.keys() | found.keys()):
        add, here = expected.get(key), found.get(key, [])
        problem = _differs(add, here)
        if problem is not None:
            wrong.append(f"{key[0] or 'root'}, line {key[1]} ({add.why if add else 'no add'}): {problem}")
    assert not wrong, f"{route}: " + "; ".join(wrong)


def _differs(add: Add | None, sites: list[Site]) -> str | None:
    """What is wrong with the findings of one instance on one line."""
    told = ", ".join(f"{site.verdict} {site.code} ({len(_parameters(site))} gates): {site.reason}" for site in sites)
    verdict = add.verdict if add is not None else "refused"
    if verdict in ("refused", "not-executed"):
        if any(site.verdict in ("converted", "gated") or (verdict == "refused" and site.edited) for site in sites):
            return f"should be {verdict}, is {told}"
        codes = add.codes if add is not None else ()
        if codes and sites and not any(site.code in codes for site in sites):  # a pointwise module may be one step
            return f"should be one of {codes}, is {told}"
        return None
    assert add is not None
    ours = [site for site in sites if site.verdict == verdict]
    if len(ours) != 1 or (verdict != "converted" and any(site.edited for site in sites)):
        return f"should be {verdict}, is {told or 'not found'}"
    if len(_parameters(ours[0])) != add.gates:
        return f"should have {add.gates} gates, has {_parameters(ours[0])}"
    return None


def _parameters(site: Site) -> set[str]:
    return {name for gate in site.gates for name in gate.parameters()}


def text_blocks(made: Made, sites: Iterable[Site]) -> None:
    """The same for the text alone: by lines, since it knows of no instances."""
    edited = {site.span.line for site in sites if site.span is not None and site.edited}
    told = {site.span.line: f"{site.verdict} {site.code}: {site.reason}" for site in sites if site.span is not None}
    wrong = []
    for add in made.case.adds:
        verdict = add.text or add.verdict
        if verdict != "any" and (add.line in edited) != (verdict == "converted"):
            wrong.append(f"line {add.line} ({add.why}): should be {verdict}, is {told.get(add.line, 'not found')}")
    extra = edited - {add.line for add in made.case.adds}
    wrong += [f"line {number}: {told[number]}" for number in sorted(extra)]
    assert not wrong, f"source: {'; '.join(wrong)}"


def norms(made: Made, converted: nn.Module) -> None:
    """The norms of blocks went, the others stayed."""
    left = dict(converted.named_modules())
    for path, module in made.model.named_modules():
        for cls, attribute in made.case.dropped:
            name = f"{path}.{attribute}".lstrip(".")
            if cls == type(module).__name__:
                assert type(left.get(name)).__name__ not in _NORMS, f"{name} should have gone"
        for cls, attribute in made.case.kept:
            name = f"{path}.{attribute}".lstrip(".")
            if cls == type(module).__name__:
                assert type(left.get(name)).__name__ in _NORMS, f"{name} should have stayed"


# What the results do


def run(model: nn.Module, x: torch.Tensor, *, train: bool = False) -> torch.Tensor:
    model.train(train)
    torch.manual_seed(1)
    return model(x)


def randomise(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the gates values that tell them apart, the same for the same names."""
    values = {}
    with torch.no_grad():
        for name, alpha in sorted(rz.alphas(model)):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            values[name] = alpha.copy_(torch.rand(alpha.shape, generator=generator) + 0.2).clone()
    return values


def same(one: torch.Tensor, other: torch.Tensor, what: str) -> None:
    far = (one - other).abs().max()
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), f"{what}: the outputs differ by {far}"


def expected_gates(made: Made) -> int:
    """How many gates the whole model must have, from the truth alone; a module counts once wherever it is."""
    count = Counter(type(module).__name__ for module in made.model.modules())
    return sum(add.gates * count[add.cls] for add in made.case.adds)


def convert(model: nn.Module, x: Any, **options: Any) -> nn.Module:
    """`rz.convert`, without the warning that there is nothing to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rz.NoEffectWarning)
        return rz.convert(model, x, **options)


def live(made: Made) -> nn.Module:
    """The recorded route: blocks, gates, norms, identity (verified by `convert`), the model left as it was."""
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    outputs = run(made.model, made.x)
    converted = convert(made.model, made.x)
    done = modules.record(converted)
    plan = done if done is not None else rz.audit(made.model, made.x).plan
    live_blocks(made, plan.sites, "recorded")
    norms(made, converted)
    found = [name for name, _ in rz.alphas(converted)]
    assert len(found) == expected_gates(made), f"{expected_gates(made)} gates expected, got {found}"
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert torch.equal(run(made.model, made.x), outputs)
    return converted


def again(made: Made, converted: nn.Module) -> None:
    """Converting a converted model changes nothing."""
    values = randomise(converted)
    outputs = run(converted, made.x)
    twice = convert(converted, made.x)
    assert {name: value.tolist() for name, value in rz.alphas(twice)} == {n: v.tolist() for n, v in values.items()}
    assert [type(module) for module in twice.modules()] == [type(module) for module in converted.modules()]
    assert torch.equal(run(twice, made.x), outputs)


def copies(made: Made, converted: nn.Module) -> None:
    """Pickles and copies do what the converted model does."""
    outputs = run(converted, made.x)
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    pickled = pickle.loads(pickle.dumps(converted))
    for other in (pickled, copy.deepcopy(converted), torch.load(stream, weights_only=False)):
        assert torch.equal(run(other, made.x), outputs)
        assert len(list(rz.alphas(other))) == len(list(rz.alphas(converted)))


def preserved(made: Made) -> None:
    """Preserve mode is bit-identical; taken back, the model is what it was."""
    held = convert(made.model, made.x, alpha_init="preserve", verify=False)
    for train in (False, True):
        one, other = (run(copy.deepcopy(model), made.x, train=train) for model in (made.model, held))
        assert torch.equal(one, other), f"preserve mode differs (train={train})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = rz.unconvert(held)
    assert [type(module) for module in back.modules()] == [type(module) for module in made.model.modules()]
    assert list(back.state_dict()) == list(made.model.state_dict())
    assert torch.equal(run(back, made.x), run(made.model, made.x))


def taken_back(made: Made, converted: nn.Module) -> None:
    """Unconverting gives the classes and keys of before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = rz.unconvert(converted)
    assert [type(module) for module in back.modules()] == [type(module) for module in made.model.modules()]
    assert set(back.state_dict()) >= set(made.model.state_dict())
    run(back, made.x)


def unseen(made: Made) -> None:
    """Without inputs, by the text with live attributes: the same blocks."""
    try:
        plan = detect(trace_live(made.model))
    except rz.ConversionError as error:
        raise AssertionError(f"static with live attributes: {error}") from error
    live_blocks(made, plan.sites, "static with live attributes")


def source(made: Made, converted: nn.Module) -> None:
    """The source route: blocks by the text, a second run is empty, and the rewritten file is the same model."""
    text = made.file.read_text()
    result = rz.convert_source(text, file=str(made.file))
    text_blocks(made, result.report.plan.sites)
    assert rz.convert_source(result.text, file=str(made.file)).text == result.text
    if any(_only_in_memory(site) for site in result.report.plan.converted):
        result = rz.convert_source(text, file=str(made.file), drop_norm="none")
        converted = convert(made.model, made.x, drop_norm="none", verify=False)
    _as_file(made, result.text, converted)


def _only_in_memory(site: Site) -> bool:
    """Whether a norm of the block goes in memory and stays in the file, as documented."""
    return any(norm.action == "keep" and "not written out" in norm.reason for norm in site.norms)


def exact(made: Made, converted: nn.Module) -> None:
    """The source route with a model."""
    text = made.file.read_text()
    result = rz.convert_source(text, file=str(made.file), model=made.model, example_inputs=made.x)
    if any(_only_in_memory(site) for site in result.report.plan.converted):
        options = {"drop_norm": "none"}
        result = rz.convert_source(text, file=str(made.file), model=made.model, example_inputs=made.x, **options)
        converted = convert(made.model, made.x, verify=False, **options)
    _as_file(made, result.text, converted)


def _as_file(made: Made, text: str, converted: nn.Module) -> None:
    file = made.file.with_name(f"{made.file.stem}_rewritten.py")
    file.write_text(text)
    twin = load(file).Net().eval()
    for difference in _differences(set(twin.state_dict()), set(converted.state_dict())):
        raise AssertionError(f"source and live: {difference}")
    values = randomise(converted)
    zero = [name for name, value in twin.named_parameters() if name in values and value.any()]
    assert all(_was_trained(made, name) for name in zero), f"source: {zero} do not start at zero"
    twin.load_state_dict(converted.state_dict())
    same(run(twin, made.x), run(converted, made.x), "source and live")


def _was_trained(made: Made, name: str) -> bool:
    """A gate of the original that is left alone."""
    return name in dict(made.model.named_parameters())


def _differences(one: set[str], other: set[str]) -> Iterator[str]:
    if one != other:
        yield f"only in the file's {sorted(one - other)}, only in the live model's {sorted(other - one)}"


def traced(made: Made, converted: nn.Module) -> None:
    """torch.fx: the traced model converts to the same."""
    if not made.case.traceable:
        return
    graph = torch.fx.symbolic_trace(made.model)
    twin = convert(graph, made.x)
    mine, theirs = ([name for name, _ in rz.alphas(model)] for model in (twin, converted))
    loops = {_owner(name) for name in theirs if name.rpartition(".")[2].isdigit()}

    def known(name: str) -> str:
        """A gate's name on both routes: a graph has no lists of gates, nor attributes that take their names."""
        return _owner(name) if _owner(name) in loops else name.replace("rezero_", "")

    gates = [sorted(map(known, names)) for names in (mine, theirs)]
    assert gates[0] == gates[1], f"torch.fx: gates {sorted(mine)}, live {sorted(theirs)}"
    for model in (converted, twin):
        for name, alpha in rz.alphas(model):
            nn.init.constant_(alpha, 0.2 + sum(known(name).encode()) % 97 / 97)
    same(run(twin, made.x), run(converted, made.x), "torch.fx and live")


def _owner(name: str) -> str:
    """The module that adds, by a gate's name."""
    holder, _, last = name.rpartition(".")
    return holder.rpartition(".")[0] if last.isdigit() else holder


def check(case: Case, folder: Path, *, whole: bool = True) -> None:
    """All of it for one case; or, if not `whole`, the blocks on each route but torch.fx, and the rewritten file.

    Raises:
        AssertionError: something does not hold; or whatever a route raises.
    """
    made = build(case, folder)
    try:
        converted = live(made)
        unseen(made)
        source(made, converted)
        if whole:
            again(made, converted)
            copies(made, converted)
            preserved(made)
            taken_back(made, converted)
            exact(made, converted)
            traced(made, converted)
    finally:
        forget(made)
