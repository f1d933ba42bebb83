"""The two files of a saved adapter: read without trusting them, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from lora2fx.errors import FormatError
from lora2fx.exporters.writing import publish, staging

PAYLOAD, MANIFEST = "adapter.safetensors", "adapter.json"
MANIFEST_LIMIT = 64 * 2**20


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().flatten()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; `FormatError` for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise FormatError(f"{path} is a symbolic link; an adapter's files must lie in its own folder.")
        handle = os.open(path, flags)
    except OSError as error:
        raise FormatError(f"{path} can't be read: {error.strerror or error}.") from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path} is no regular file.")
        if found.st_size > limit:
            raise FormatError(f"{path} has {found.st_size} bytes where at most {limit} can be right.")
        return file.read(found.st_size)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_manifest(folder: Path) -> Any:
    """What adapter.json holds, as plain JSON. Raises `FormatError`."""
    data = read_regular(folder / MANIFEST, MANIFEST_LIMIT)
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / MANIFEST} is no valid JSON: {error}.") from error


def seal(manifest: Mapping[str, Any]) -> str:
    """The digest of all that adapter.json says but for its `payload`: the tensors' file carries it."""
    said = {key: value for key, value in manifest.items() if key != "payload"}
    return digest(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())


def _metadata(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, Any] = header.get("__metadata__", {})
    return found


def read_payload(folder: Path, size: int, sha256: str, sealed: str) -> dict[str, Tensor]:
    """The tensors of adapter.safetensors, if it has exactly the announced bytes and adapter.json is the one sealed.

    Raises `FormatError`.
    """
    path = folder / PAYLOAD
    data = read_regular(path, size)
    if len(data) != size or digest(data) != sha256:
        raise FormatError(
            f"{path} is not the file that {MANIFEST} was written with: it was changed, cut short, or a save was"
            " interrupted between the two files. Save the adapter again."
        )
    try:
        tensors = parse_tensors(data)
        if _metadata(data).get("manifest") != sealed:
            raise FormatError(f"{folder / MANIFEST} was changed after it was saved. Save the adapter again.")
        return tensors
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{path} is no valid safetensors file: {error}.") from error


def write_files(folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write both files, each whole or not at all, the tensors first; returns their bytes.

    `manifest` gets the key `payload` with the tensors' size and SHA-256. Files keep the umask's mode.
    Raises `FormatError` where `folder` is a file, `OSError` where it can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is asked for as a folder and is a file. Choose another path.")
    payload = tensor_bytes(dict(tensors), {"format": "pt", "manifest": seal(manifest)})
    whole = {**manifest, "payload": {"bytes": len(payload), "sha256": digest(payload)}}
    text = json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with staging(folder) as aside:
        (aside / PAYLOAD).write_bytes(payload)
        (aside / MANIFEST).write_text(text, encoding="utf-8")
        publish({aside / name: folder / name for name in (PAYLOAD, MANIFEST)})
    return len(payload)
