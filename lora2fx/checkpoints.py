"""A run's checkpoint in one file: what is trained, the adapters' state, optimizer and schedules, random generators.

Trainer, accelerate and Lightning write their own, and sharded models need torch.distributed.checkpoint; this is for
plain loops, where torch.save alone leaves half a file when the process is killed.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lora2fx.errors import FormatError
from lora2fx.exporters.writing import check_file, publish, staging
from lora2fx.passes.state import kept_on_error
from lora2fx.sharding import refuse_sharded

FORMAT = "lora2fx checkpoint 1"


class Stateful(Protocol):
    """An optimizer, a learning-rate schedule, a GradScaler, a dataloader that can resume."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go on from there."""


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, states: Mapping[str, Stateful]) -> None:
    """Write what is trained in `model`, its buffers, every one of `states` and this process' random generators.

    Frozen weights stay out: a resumed run makes the base model and its adapters again. The file is there whole or as
    it was before: written aside, synced, renamed. It holds tensors and plain values only, so that
    `torch.load(path, weights_only=True)` reads it.
    Raises `AdapterError` for a model that FSDP shards, and `OSError`.
    """
    refuse_sharded(model, "checkpoint")
    place = Path(path)
    check_file(place)
    content = {
        "format": FORMAT,
        "model": _own_tensors(model),
        "states": {name: state.state_dict() for name, state in states.items()},
        "random": _random_state(),
    }
    with staging(place.parent) as aside:
        staged = aside / place.name
        _write(content, staged)
        publish({staged: place})


def _write(content: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's, about a file cut short, hides what cut it short
            raise error.__context__ or error from None


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, states: Mapping[str, Stateful]) -> None:
    """Take up a run in a model that was transformed as the saved one was; `lora2fx.attach` before or after this.

    Random generators go on too, so that dropout and shuffling draw what they would have drawn.
    Raises `FormatError` for a file that is no checkpoint, or one of another model or other states, and `OSError`
    where it can't be read; on these, and whatever else is raised, model, states and generators are as they were.
    """
    content = _read(Path(path))
    tensors, own = content["model"], _own_tensors(model)
    _check_same(path, "tensor", set(tensors), set(own))
    _check_same(path, "state", set(content["states"]), set(states))
    for name, value in own.items():
        if tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
            raise FormatError(
                f"{path}: {name} is {tensors[name].dtype} {tuple(tensors[name].shape)}; the model has {value.dtype}"
                f" {tuple(value.shape)}. Transform the model with the hyperparameters that it was saved with."
            )
    with _all_or_nothing(own, states):
        for name, state in states.items():
            try:
                state.load_state_dict(content["states"][name])
            except (ValueError, KeyError, RuntimeError) as error:
                raise FormatError(
                    f"{path}: the saved state {name!r} doesn't fit: {type(error).__name__}: {error}"
                ) from error
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])
        _set_random_state(content["random"])


@contextmanager
def _all_or_nothing(own: Mapping[str, Tensor], states: Mapping[str, Stateful]) -> Iterator[None]:
    """On any error tensors, states and random generators are as they were."""
    held = copy.deepcopy({name: state.state_dict() for name, state in states.items()})
    generators = _random_state()
    try:
        with kept_on_error(own.values()):
            yield
    except BaseException:
        for name, state in states.items():
            state.load_state_dict(held[name])
        _set_random_state(generators)
        raise


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict's live tensors, less the frozen parameters."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: v.detach() for name, v in state.items() if name not in frozen and isinstance(v, Tensor)}


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FormatError(f"{path} is no checkpoint that can be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{path} is no lora2fx checkpoint; lora2fx.load(model, folder) reads saved adapters.")
    return content


def _check_same(path: str | os.PathLike[str], kind: str, found: set[str], wanted: set[str]) -> None:
    if odd := sorted(found ^ wanted):
        side = "holds" if odd[0] in found else "lacks"
        raise FormatError(
            f"{path} {side} the {kind} {odd[0]!r} ({len(odd)} such differences from what is loaded into)."
        )


def _random_state() -> dict[str, Any]:
    """Tensors and plain numbers: a generator's words as a tensor."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": numpy | {"state": numpy["state"] | {"key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
