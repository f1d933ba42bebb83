"""Ctrl-C during training: the step is finished, a checkpoint written, and the run says how it goes on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a stop was asked for; `on_step_end` makes the Trainer obey."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop where asked; a run that is at its end ends as usual. Several processes stop together."""
        if args.world_size > 1:
            asked = torch.tensor(float(self.asked), device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first signal asks for a stop, a second one interrupts at once; elsewhere than in the main thread none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            for known in SIGNALS:
                signal.signal(known, signal.default_int_handler)
            print("\nStopping after this step; once more to stop at once.", file=sys.stderr)

        for number in SIGNALS:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, known in before.items():
                signal.signal(number, known)


def stop_callback() -> Any:
    """A `Stop` that is a Trainer callback."""
    from transformers import TrainerCallback

    return type("StopCallback", (Stop, TrainerCallback), {})()
