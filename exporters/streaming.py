"""A checkpoint copied file by file with some tensors changed on the way; one tensor is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora2fx.exporters.resuming import Partial
from lora2fx.exporters.shards import Shard, Stored
from lora2fx.exporters.writing import sync

Edit = Callable[[Tensor], None]
"""Changes a tensor in place; shape and dtype stay."""
CHUNK = 2**23
KEPT_EVERY = 2**28
"""Bytes after which what was written is made to outlast a crash."""


@dataclass(frozen=True)
class Part:
    """One tensor of a file that is written: where it comes from, under which name, and what changes it on the way."""

    name: str
    source: Stored
    edit: Edit | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.stop - self.source.start


def plan_shard(shard: Shard, edits: Mapping[str, Edit], added: Sequence[Part]) -> list[Part]:
    """The file's tensors in their order, then the added ones that come from this file."""
    own = [Part(stored.name, stored, edits.get(stored.name)) for stored in shard.tensors]
    return [*own, *(part for part in added if part.source.path == shard.path)]


def _header(shard: Shard, parts: Sequence[Part]) -> bytes:
    """The file's own header as it is read, with the added tensors behind the others."""
    if len(parts) == len(shard.tensors):
        with shard.path.open("rb") as file:
            return file.read(shard.data)
    entries: dict[str, Any] = {"__metadata__": shard.header["__metadata__"]} if "__metadata__" in shard.header else {}
    place = 0
    for part in parts:
        entry = {"dtype": part.source.kind, "shape": list(part.source.shape)}
        entries[part.name] = entry | {"data_offsets": [place, place + part.size]}
        place += part.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_size(shard: Shard, parts: Sequence[Part]) -> int:
    """Bytes that the file will have."""
    return len(_header(shard, parts)) + sum(part.size for part in parts)


def _copy(part: Part, file: BinaryIO) -> None:
    left = part.size
    with part.source.path.open("rb") as source:
        source.seek(part.source.start)
        while left:
            data = source.read(min(CHUNK, left))
            if not data:
                raise OSError(f"{part.source.path} became shorter while it was read")
            file.write(data)
            left -= len(data)


def _write(part: Part, file: BinaryIO) -> None:
    if part.edit is None:
        _copy(part, file)
        return
    tensor = part.source.read()
    part.edit(tensor)
    file.write(tensor.flatten().view(torch.uint8).numpy().data)


def write_shard(shard: Shard, parts: Sequence[Part], partial: Partial) -> None:
    """Write one file to the partial folder, from where an earlier run left off; its bytes are synced in the end."""
    place, name = partial.folder / shard.path.name, shard.path.name
    header = _header(shard, parts)
    at = len(header)
    done = partial.done.get(name, 0)
    with place.open("r+b" if done else "wb") as file:
        file.truncate(done)
        file.seek(done)
        if not done:
            file.write(header)
            done = at
        kept = done
        for part in parts:
            at += part.size
            if at <= done:
                continue
            _write(part, file)
            if at - kept >= KEPT_EVERY:
                file.flush()
                _keep(partial, place, at)
                kept = at
    _keep(partial, place, at)


def _keep(partial: Partial, place: Path, size: int) -> None:
    sync(place)
    partial.done[place.name] = size
    partial.keep()
