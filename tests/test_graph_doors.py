"""torchvision's classification models through symbolic_trace, torch.export and make_fx, against the module route."""

from __future__ import annotations

import pytest
from sweep.doors import NAMES, outcomes
from torch import fx

import rezero_convert as rz
from rezero_convert import api


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")  # torchvision's own
@pytest.mark.parametrize("name", NAMES)
def test_every_door_agrees_with_the_module_route(name: str) -> None:
    assert [(one.door, one.failures) for one in outcomes(name) if one.failures] == []


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = api.convert

    def without_some(model, inputs, **options):  # type: ignore[no-untyped-def]
        graph = isinstance(model, fx.GraphModule)
        return convert(model, inputs, **options, **({"exclude": ("layer1*",)} if graph else {}))

    monkeypatch.setattr(rz, "convert", without_some)
    (one,) = outcomes("resnet18", ("symbolic_trace",))
    assert any("gates instead of" in failure for failure in one.failures)
