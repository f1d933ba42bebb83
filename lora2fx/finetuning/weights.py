"""What is trained in a model, as one safetensors file: what a checkpoint of a run holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora2fx.errors import RunError
from lora2fx.exporters.writing import publish, staging


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything but the frozen weights, live; of names that share memory the first."""
    seen: set[tuple[int, torch.Size]] = set()
    found: dict[str, Tensor] = {}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, value in model.state_dict().items():
        if name in frozen or not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), value.shape)
        if key not in seen or not value.numel():
            found[name] = value
        seen.add(key)
    return found


def write_trained(model: nn.Module, path: Path) -> None:
    """Write the trained tensors; the file is there whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.cpu().contiguous() for name, value in trained_tensors(model).items()}
    with staging(path.parent) as aside:
        save_file(tensors, aside / path.name, metadata={"format": "pt"})
        publish({aside / path.name: path})


def read_trained(model: nn.Module, path: Path) -> None:
    """Take the tensors up. Raises `RunError`, the model untouched, where they are not those that the model trains."""
    stored, own = stored_tensors(path), trained_tensors(model)
    check_fit(stored, own, path)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(stored[name])


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """What the file holds. Raises `RunError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} can't be read: {error}. Remove its folder to go on from an earlier one.") from error


def check_fit(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise `RunError` unless names, shapes and dtypes are the same."""
    odd = sorted(set(stored) ^ set(own))
    odd += [n for n in own if n in stored and (stored[n].shape, stored[n].dtype) != (own[n].shape, own[n].dtype)]
    if odd:
        raise RunError(
            f"{path} doesn't fit the model that the run's settings make: {odd[0]} ({len(odd)} such tensors). Was the"
            " model's folder changed? Start a new run with another --out."
        )
