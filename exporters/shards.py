"""A safetensors checkpoint as it lies on disk, one file or several with an index: which tensor is where.

Only headers are read; a tensor's bytes when they are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora2fx.errors import FormatError

INDEX = ".safetensors.index.json"
_HEADER_LIMIT = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `start` and `stop` are byte positions in it."""

    name: str
    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a dtype that is only ever copied."""
        return _DTYPES.get(self.kind)

    def read(self) -> Tensor:
        """The tensor in memory of its own."""
        data = torch.empty(self.stop - self.start, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(data.numpy().data) != data.numel():
                raise FormatError(f"{self.path} ends within {self.name}: it is being changed, or the disk fails.")
        assert self.dtype is not None
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Shard:
    """One file: its header as it stands there, and its tensors in the order of their bytes."""

    path: Path
    header: dict[str, Any]
    data: int
    size: int
    tensors: tuple[Stored, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's weights; `index` is the parsed index of a checkpoint in several files."""

    folder: Path
    shards: tuple[Shard, ...]
    index_name: str | None
    index: dict[str, Any] | None

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name."""
        return {stored.name: stored for shard in self.shards for stored in shard.tensors}

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(stored.shape) for stored in self.tensors.values())


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} holds no valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds {type(found).__name__} where an object must be.")
    return found


def _stored(path: Path, name: str, entry: Any, data: int) -> Stored:
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not isinstance(kind, str) or stop < start:
        raise FormatError(f"{path}: the header's entry of {name!r} is no dtype, shape and place.")
    dtype = _DTYPES.get(kind)
    if dtype is not None and stop - start != prod(shape) * dtype.itemsize:
        raise FormatError(f"{path}: {name} takes {stop - start} bytes, which {kind} {shape} does not.")
    return Stored(name, path, kind, shape, data + start, data + stop)


def read_shard(path: Path) -> Shard:
    """One file's header, checked: known places, without holes, to the end. Raises `FormatError`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _HEADER_LIMIT):
                raise FormatError(f"{path} is no safetensors file: its header would be {length} bytes long.")
            header = _json(path, file.read(length))
    except OSError as error:
        raise FormatError(f"{path} can't be read: {error.strerror or error}.") from error
    data = 8 + length
    found = [_stored(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda stored: (stored.start, stored.stop))
    edges = [data, *(stored.stop for stored in found)]
    if [stored.start for stored in found] != edges[:-1] or edges[-1] != size:
        raise FormatError(f"{path}: its tensors do not fill the file of {size} bytes: it was cut short or damaged.")
    return Shard(path, header, data, size, tuple(found))


def _listed(folder: Path) -> tuple[list[str], str | None, dict[str, Any] | None]:
    """The weights' files, and the index's name and content; as transformers, one whole file before an index."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    indices = sorted(path.name for path in folder.glob("*" + INDEX))
    if "model.safetensors" in names or (len(names) == 1 and not indices):
        return ["model.safetensors" if "model.safetensors" in names else names[0]], None, None
    index = "model" + INDEX if "model" + INDEX in indices else indices[0] if len(indices) == 1 else None
    if index is None:
        what = f"{len(names)} .safetensors files and {len(indices)} indices" if names else "no .safetensors file"
        raise FormatError(
            f"{folder} holds {what}: a checkpoint is one model.safetensors, or several files with an index."
        )
    parsed = _json(folder / index, (folder / index).read_bytes())
    places = parsed.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FormatError(f"{folder / index} has no weight_map from tensors to files.")
    files = sorted(set(places.values()))
    if odd := [name for name in files if Path(name).name != name or name in ("", ".", "..")]:
        raise FormatError(f"{folder / index} names {odd[0]!r}, which is no file of its own folder.")
    return files, index, parsed


def open_checkpoint(folder: Path) -> Checkpoint:
    """The folder's safetensors checkpoint. Raises `FormatError` where there is none, or one that is incomplete."""
    if not folder.is_dir():
        raise FormatError(f"{folder} is no folder.")
    files, name, index = _listed(folder)
    shards = tuple(read_shard(folder / file) for file in files)
    places = {stored.name: shard.path.name for shard in shards for stored in shard.tensors}
    if sum(len(shard.tensors) for shard in shards) != len(places):
        raise FormatError(f"{folder}: a tensor is in two of its files.")
    if index is not None and places != index["weight_map"]:
        odd = sorted(set(places.items()) ^ set(index["weight_map"].items()))
        raise FormatError(f"{folder / str(name)} and the files disagree, first about {odd[0][0]!r}.")
    return Checkpoint(folder, shards, name, index)
