"""What a run is asked to do: plain values, stored in the run folder, that a resumed run goes on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lora2fx.errors import RunError


@dataclass(frozen=True)
class Settings:
    """One run. None stands for what is found in the data, or chosen for the method and the task.

    `model` is a hub id or a folder; `data` and `validation` a file, a folder of files, or the name of a dataset with
    its `config` and splits. `text` and `label` are columns. `hyperparameters` are the method's. Rates are AdamW's;
    `warmup` is a share of the steps, after which the rate falls linearly to 0. `length` counts tokens, `batch` rows of
    one process, `accumulate` batches of one optimizer step.
    """

    model: str
    data: str
    validation: str | None = None
    config: str | None = None
    split: str | None = None
    validation_split: str | None = None
    rows: int | None = None
    task: str = "classification"
    text: tuple[str, ...] = ()
    label: str | None = None
    length: int = 128
    pack: bool = False
    method: str = "lora2"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 32
    accumulate: int = 1
    lr: float | None = None
    head_lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.06
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    bf16: bool = False
    checkpointing: bool = False
    cpu: bool = False
    log_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rows", "length", "steps", "batch", "accumulate"):
            _check(self, name, lambda value: value >= 1, "a whole number of at least 1")
        for name in ("epochs", "lr", "head_lr"):
            _check(self, name, lambda value: 0 < value < float("inf"), "a number above 0")
        for name in ("clip", "weight_decay"):
            _check(self, name, lambda value: 0 <= value < float("inf"), "a number of at least 0")
        _check(self, "warmup", lambda value: 0 <= value < 1, "a share of the steps, at least 0 and below 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Raises `RunError` for anything else."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        if odd := sorted(names ^ set(stored)):
            raise RunError(f"the stored settings are of another version of lora2fx: {', '.join(odd)}.")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**values)


def _check(settings: Settings, name: str, fits: Any, wanted: str) -> None:
    value = getattr(settings, name)
    if value is not None and not fits(value):
        raise RunError(f"--{name.replace('_', '-')} {value:g}: pass {wanted}.")
