"""Detection against `expected_counts`: which module adds how many residual branches, read off the architectures.

The default run takes a slice of the table; `-m slow` takes the rest, with precision and recall over all of it.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from expected_counts import CASES, Case
from torch import nn

import rezero_convert as rz

FAST = frozenset(
    [
        # a model per way to write a block, in each library
        "repvgg_a0", "cait_xxs24_224", "convnextv2_atto", "cspnext_tiny", "dla34", "dpn48b", "edgenext_xx_small",
        "efficientnet_lite0", "efficientvim_m1", "efficientvit_b0", "fastvit_sa12", "hgnetv2_b0", "hiera_tiny_224",
        "hrnet_w18_small", "iformer_t", "inception_next_atto", "levit_128s", "lowformer_b0", "coatnet_pico_rw_224",
        "poolformer_s12", "mixer_s32_224", "mobilenetv4_conv_small", "pit_ti_224", "pvt_v2_b0", "regnety_002",
        "repvit_m0_9", "resnest14d", "resnetv2_18", "shvit_s1", "starnet_s050", "vit_base_patch16_xp_224",
        "vit_small_patch16_18x2_224", "visformer_tiny",
        "torchvision mobilenet_v2", "torchvision lraspp_mobilenet_v3_large", "torchvision mc3_18",
        "torchvision shufflenet_v2_x0_5",
        "transformers Qwen3ForCausalLM", "transformers GPTNeoXForCausalLM", "transformers BloomForCausalLM",
        "transformers FalconH1ForCausalLM", "transformers MixtralForCausalLM", "transformers RwkvForCausalLM",
        "transformers AlbertModel", "transformers DebertaV2Model", "transformers FNetModel", "transformers T5Model",
        "transformers BeitModel", "transformers HubertModel", "transformers Wav2Vec2ConformerModel",
        "transformers SiglipModel",
    ]
)  # fmt: skip

_Count = tuple[str, int, int]
"""A module's class, its branches by the table, and those found."""

KNOWN: dict[str, dict[str, _Count]] = {
    # spatial attention is added to a stream that is put together again on the spot: cat((cls, x)) + cat((c, f)), where
    # c and f are computed from cls and x
    "transformers TimesformerModel": {f"encoder.layer.{i}": ("TimesformerLayer", 3, 2) for i in range(2)},
}
"""What is known to be missed: exactly this, neither more nor less."""


@cache
def _counted(name: str) -> tuple[int | None, dict[str, _Count]]:
    """The configuration's total, and per module with branches its class, their expected and their found number."""
    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    model = case.make().eval()
    expected, found = case.expected(model), _found(model, case.inputs())
    paths = {id(module): (path, type(module).__name__) for path, module in model.named_modules()}
    counts = {}
    for key in sorted(expected.keys() | found.keys(), key=lambda key: paths[key]):
        path, kind = paths[key]
        counts[path] = (kind, expected[key], found[key])
    return case.total, counts


def _found(model: nn.Module, inputs: Any) -> Counter[int]:
    """The gates that the audit plans or found there, by the id of the module that adds."""
    found: Counter[int] = Counter()
    for site in rz.audit(model, inputs).plan.of("converted", "gated"):
        found[id(model.get_submodule(site.path))] += sum(len(gate.parameters()) for gate in site.gates) or 1
    return found


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    return [] if case.name in FAST else [pytest.mark.slow]


def test_the_slice_is_of_the_table_and_the_table_large_enough() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 150
    assert set(names) >= FAST | KNOWN.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(case.name, marks=_marks(case)) for case in CASES])
def test_gates_are_where_the_architecture_adds_branches(name: str) -> None:
    total, counts = _counted(name)
    expected = sum(branches for _, branches, _ in counts.values())
    assert total is None or expected == total, "the rules of the table say something else than its total"
    assert {path: count for path, count in counts.items() if count[1] != count[2]} == KNOWN.get(name, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_precision_and_recall() -> None:
    counts = [count for case in CASES for count in _counted(case.name)[1].values()]
    right = sum(min(expected, found) for _, expected, found in counts)
    assert right >= 0.99 * sum(found for _, _, found in counts), "precision"
    assert right >= 0.99 * sum(expected for _, expected, _ in counts), "recall"


@pytest.mark.parametrize(
    ("expected", "found"), [({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({"a": 2}, {"a": 1}), ({"a": 1}, {})]
)
def test_a_wrong_count_or_place_is_noticed(
    expected: dict[str, int], found: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {key: ("Block", expected.get(key, 0), found.get(key, 0)) for key in expected | found}
    monkeypatch.setitem(globals(), "_counted", lambda name: (None, counts))
    with pytest.raises(AssertionError):
        test_gates_are_where_the_architecture_adds_branches("resnet18")
