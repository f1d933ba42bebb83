"""A run's folder: what it holds, and how it is written so that a kill or a full disk leaves nothing half done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2fx.errors import RunError
from lora2fx.exporters.writing import sync, sync_folder, usual_mode
from lora2fx.finetuning.settings import Settings
from lora2fx.integrations.pages import write_text

RUN, REPORT, PAGE, ADAPTER, TRAINED, CHECKPOINTS = (
    "run.json",
    "report.json",
    "report.html",
    "adapter",
    "trained.safetensors",
    "checkpoints",
)
COMPLETE = "complete"
"""The file that a checkpoint gets when all others of it are on the disk."""


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `RunError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object.")
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """What a run's report.json holds. Raises `RunError` where the folder is no run's."""
    if not (folder / REPORT).is_file():
        raise RunError(
            f"{folder} holds no {REPORT}. Name the folder of a run: the --out of lora2fx train or lora2fx demo."
        )
    return read_json(folder / REPORT)


def check_new(folder: Path) -> None:
    """Raise `RunError` where a new run would mix with what is there."""
    if (folder / RUN).exists():
        raise RunError(f"{folder} holds a run already. Go on with it: --resume; or name another folder with --out.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already and is no run's. Name a new folder with --out.")


def read_run(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings of a run that is there, and what else its run.json says. Raises `RunError`."""
    if not (folder / RUN).is_file():
        raise RunError(f"{folder} holds no run to go on with. Leave --resume out to start one.")
    stored = read_json(folder / RUN)
    if not isinstance(stored.get("settings"), dict):
        raise RunError(f"{folder / RUN} holds no settings. Start a new run with another --out.")
    return Settings.from_dict(stored["settings"]), stored


def complete_checkpoints(folder: Path) -> list[Path]:
    """The run's whole checkpoints, the newest first."""
    found = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def seal_checkpoint(checkpoint: Path) -> None:
    """Have everything in a checkpoint reach the disk, readable by others, and mark it whole."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            path.chmod(usual_mode(checkpoint))
            sync(path)
    sync_folder(checkpoint)
    write_text(checkpoint / COMPLETE, "")


def drop_incomplete(folder: Path) -> None:
    """Remove checkpoints that a kill or a full disk cut short."""
    whole = complete_checkpoints(folder)
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints: the run is done."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def sizes(folder: Path, names: Mapping[str, str]) -> dict[str, int]:
    """Bytes on the disk of those entries (label → name in the folder) that are there."""
    found = {}
    for label, name in names.items():
        path = folder / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        if files:
            found[label] = sum(file.stat().st_size for file in files)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
