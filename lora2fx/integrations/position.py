"""Where a loop says it is must be where the adapters are: a resumed loop without their state prunes from scratch."""

from __future__ import annotations

from lora2fx.errors import ScheduleError
from lora2fx.training.driver import Attachment


def check_position(attachment: Attachment, loop: str, steps: int, resume: str) -> None:
    """Raise `ScheduleError`, and detach, where the loop starts at another optimizer step than the adapters' schedule.

    Methods without a schedule may start anywhere. `resume` says how the loop is told of a checkpoint.
    """
    own = attachment.step + attachment.skipped
    if not attachment.training.allocators or own == steps:
        return
    attachment.detach()
    raise ScheduleError(
        f"{loop} starts at optimizer step {steps}, and the adapters' schedule is at step {own} of"
        f" {attachment.total_steps}. Resume both from one checkpoint ({resume}), or train a freshly transformed model."
    )
