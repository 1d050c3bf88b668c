"""Random architectures with known truth through every route, and mutated files: a few hundred here, more when slow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz import blocks, branches, decoys, models, mutations, oracles
from fuzz.writing import Case
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = [form.__name__ for form in (*blocks.BLOCKS, *decoys.DECOYS)]
_RANDOM = st.randoms(use_true_random=False)


def _examples(count: int, *, fixed: bool = True) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=fixed, database=None, deadline=None, suppress_health_check=checks)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


# That the oracles can fail


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        ("plain", {"verdict": "refused"}), ("plain", {"gates": 2}), ("n_ary", {"gates": 1}), ("loop", {"gates": 7}),
        ("parallel", {"verdict": "converted", "gates": 1}), ("scalar_gate", {"verdict": "converted"}),
        ("position", {"codes": ("RZ999",)}), ("highway", {"verdict": "gated"}),
    ],
)  # fmt: skip
def test_a_wrong_truth_is_noticed(form: str, wrong: dict[str, object], tmp_path: Path) -> None:
    case = models.of_forms(Random(3), (form,), image=False)
    oracles.check(case, tmp_path, whole=False)
    adds = [dataclasses.replace(add, **wrong) if add.line == case.adds[-1].line else add for add in case.adds]
    with pytest.raises(AssertionError, match=r"should be|should have"):
        oracles.check(dataclasses.replace(case, adds=tuple(adds)), tmp_path, whole=False)


def test_a_truth_that_leaves_an_add_out_is_noticed(tmp_path: Path) -> None:
    case = models.of_forms(Random(3), ("plain",), image=False)
    with pytest.raises(AssertionError, match="should be refused"):
        oracles.check(dataclasses.replace(case, adds=()), tmp_path, whole=False)


def test_a_wrong_fate_of_a_norm_is_noticed(tmp_path: Path) -> None:
    case = models.of_forms(Random(3), ("post_norm",), image=False)
    assert case.dropped
    with pytest.raises(AssertionError, match="should have stayed"):
        oracles.check(dataclasses.replace(case, dropped=(), kept=case.dropped), tmp_path, whole=False)


# Each form by itself, then at random


@pytest.mark.parametrize("image", [False, True], ids=["rows", "images"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form(form: str, image: bool, tmp_path: Path) -> None:
    oracles.check(models.of_forms(Random(FORMS.index(form)), (form,), image=image), tmp_path)


def _agree(case: Case, folder: Path, *, whole: bool) -> None:
    note(case.text)
    oracles.check(case, folder, whole=whole)


@_examples(100)
@given(random=_RANDOM)
def test_the_blocks_of_random_models(random: Random, tmp_path: Path) -> None:
    _agree(models.model(random), tmp_path, whole=False)


@_examples(20)
@given(random=_RANDOM)
def test_all_oracles_on_random_models(random: Random, tmp_path: Path) -> None:
    _agree(models.model(random), tmp_path, whole=True)


@_examples(40)
@given(random=_RANDOM)
def test_mutated_files(random: Random) -> None:
    mutant = mutations.mutant(random)
    note(f"{mutant.name}\n{mutant.change}")
    mutations.check(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 3000, 500))
def test_thousands_of_random_models(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 500):
        oracles.check(models.model(Random(seed)), tmp_path)


@pytest.mark.slow
def test_a_thousand_mutated_files() -> None:
    for seed in range(1000):
        mutations.check(mutations.mutant(Random(seed)))


def test_every_branch_is_drawn() -> None:
    """A generator that stopped to write some form would still pass all of the above."""
    texts = [models.model(Random(seed)) for seed in range(600)]
    told = {add.why for case in texts for add in case.adds}
    assert {"inside a branch", "scores and a mask", "a rotary embedding", "around blocks", "highway", "RepVGG"} <= told
    assert len(told) >= 60
    assert {add.verdict for case in texts for add in case.adds} == {
        "converted", "refused", "gated", "interior", "long-skip", "not-executed",
    }  # fmt: skip
    assert len(branches.BRANCHES) == len(set(branches.BRANCHES))
