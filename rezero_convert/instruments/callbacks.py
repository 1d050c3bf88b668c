"""What hands readings on to other people's training loops and dashboards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tracker import AlphaTracker, Reading


def trainer_callback(tracker: AlphaTracker) -> Any:
    """A `transformers.TrainerCallback`: gradients are there, and clipped, when it calls `tracker.step`."""
    from transformers import TrainerCallback

    class AlphaCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for us
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tracker.step(int(state.global_step) + 1)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tracker.close()

    return AlphaCallback()


def tensorboard(writer: Any, prefix: str = "rezero") -> Callable[[tuple[Reading, ...]], None]:
    """For `AlphaTracker(on_record=(tensorboard(writer),))`: scalars `rezero/alpha/<gate>`, and of the other quantities.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`; it is yours to close.
        prefix: of the tags.
    """

    def write(readings: tuple[Reading, ...]) -> None:
        for reading in readings:
            for name in ("alpha", "rms", "ratio", "effect", "ablation"):
                value = getattr(reading, name)
                if value is not None:
                    writer.add_scalar(f"{prefix}/{name}/{reading.gate}", value, reading.step)

    return write
