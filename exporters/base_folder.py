"""What lies beside a checkpoint's weights: configs and tokenizers, carried over to a folder with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora2fx.errors import FormatError
from lora2fx.exporters.shards import INDEX, Checkpoint
from lora2fx.program import TIED

CONFIG = "config.json"
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".pkl"))
_GRAPHS = frozenset((".onnx", ".onnx_data", ".data", ".npz", ".tflite", ".mlmodel"))


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json, None where there is none. Raises `FormatError` where it is no object."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds no object.")
    return found


def _is_weight(path: Path) -> bool:
    return path.suffix in _WEIGHTS | _GRAPHS or path.name.endswith(".index.json")


def copy_settings(checkpoint: Checkpoint, out: Path, untied: bool) -> tuple[list[str], list[str]]:
    """Copy all but weights, which would be unmerged ones; (copied, left out), paths within the folder.

    With `untied` the copied config says that no embeddings are tied.
    """
    copied, left_out = [], []
    used = {shard.path for shard in checkpoint.shards} | {checkpoint.folder / str(checkpoint.index_name)}
    for path in sorted(checkpoint.folder.rglob("*")):
        inside = path.relative_to(checkpoint.folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if _is_weight(path):
            left_out += [] if path in used else [str(inside)]
            continue
        (out / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / inside)
        copied.append(str(inside))
    config = read_config(checkpoint.folder)
    if untied and config is not None:
        text = json.dumps(config | {TIED: False}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (out / CONFIG).write_text(text, encoding="utf-8")
    return copied, left_out


def write_index(checkpoint: Checkpoint, out: Path, added: Mapping[str, str], sizes: Sequence[int]) -> None:
    """The checkpoint's index, where it has one, with the added tensors (name → file) of `sizes` bytes."""
    if checkpoint.index is None or checkpoint.index_name is None:
        return
    assert checkpoint.index_name.endswith(INDEX)
    if not added:
        shutil.copyfile(checkpoint.folder / checkpoint.index_name, out / checkpoint.index_name)
        return
    index = dict(checkpoint.index)
    index["weight_map"] = dict(sorted({**index["weight_map"], **added}.items()))
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and type(metadata.get("total_size")) is int:
        index["metadata"] = metadata | {"total_size": metadata["total_size"] + sum(sizes)}
    (out / checkpoint.index_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
