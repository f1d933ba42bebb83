"""A run as it goes: a bar where a terminal is, a line now and then elsewhere."""

from __future__ import annotations

import sys
from typing import Any

LINES = 10
"""Lines of progress in a run without a bar."""


def shown_values(logs: dict[str, Any]) -> str:
    """What of a log is worth a line: loss, the budgets and what is left of them, skipped steps."""
    parts = [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
    for key, value in logs.items():
        name = key.removeprefix("lora2fx/")
        if key != name and name.endswith("_budget"):
            axis = name.removesuffix("_budget")
            parts.append(f"{axis} {logs.get(f'lora2fx/{axis}_active', value):g} (budget {value:g})")
    if skipped := logs.get("lora2fx/skipped_steps"):
        parts.append(f"{skipped:g} steps skipped")
    return ", ".join(parts)


def evaluation_line(step: int, metrics: dict[str, Any]) -> str:
    """A validation's numbers."""
    usual = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    found = {key.removeprefix("eval_"): value for key, value in metrics.items() if key not in usual}
    return f"step {step}: " + ", ".join(
        f"validation {key} {value:.4g}" for key, value in found.items() if key != "epoch"
    )


class Bar:
    """Over transformers' own bar: the log as its postfix and not as a line each."""

    training_bar: Any

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Beside the bar."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(shown_values(logs), refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Above the bar."""
        super().on_evaluate(args, state, control, **known)  # type: ignore[misc]
        if self.training_bar is not None:
            self.training_bar.write(evaluation_line(state.global_step, known["metrics"]), file=sys.stdout)


class Lines:
    """Ten lines a run, and one a validation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Where another tenth is done."""
        before = state.global_step - state.logging_steps
        due = state.global_step * LINES // state.max_steps > before * LINES // state.max_steps
        if state.is_world_process_zero and "loss" in logs and due:
            print(f"step {state.global_step} of {state.max_steps}: {shown_values(logs)}", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Always."""
        if state.is_world_process_zero:
            print(evaluation_line(state.global_step, metrics), flush=True)


def progress_callback(bar: bool) -> Any:
    """Transformers' own bar with the numbers beside it; without one, lines on stdout."""
    from transformers.trainer_callback import ProgressCallback, TrainerCallback

    kinds = (Bar, ProgressCallback) if bar else (Lines, TrainerCallback)
    return type("RunProgress", kinds, {})()
