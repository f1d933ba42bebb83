"""A folder on its way: hidden beside its place, gone on with where a run was cut off, then renamed to its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2fx.errors import ExportError, Lora2fxError
from lora2fx.exporters.writing import make_folders, sync, sync_folder, usual_mode

_STATE = ".lora2fx-progress.json"
_LOCK = ".lora2fx-lock"


@dataclass
class Partial:
    """The hidden folder: `done` says how many bytes of each file are safely there, `notes` what else is to be kept."""

    folder: Path
    identity: str
    done: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def keep(self) -> None:
        """Make what is in `done` and `notes` outlast a crash; the files' own bytes must be synced before."""
        state = {"identity": self.identity, "done": self.done, "notes": self.notes}
        staged = self.folder / (_STATE + ".tmp")
        staged.write_text(json.dumps(state), encoding="utf-8")
        sync(staged)
        os.replace(staged, self.folder / _STATE)
        sync_folder(self.folder)

    @property
    def resumed(self) -> bool:
        """Whether an earlier run left anything that is used."""
        return bool(self.done)


def _earlier(folder: Path, identity: str) -> Partial:
    """What an earlier run of the same task left, checked against the files; else an empty start."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        done = {name: size for name, size in state["done"].items() if (folder / name).stat().st_size >= size}
        same = state["identity"] == identity and done == state["done"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if same:
        return Partial(folder, identity, done, state["notes"])
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return Partial(folder, identity)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raise `ExportError` where another process writes there; a process that dies lets go."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(f"{folder} is being written by another process. Wait for it, or stop it.") from error
        yield


def check_new(place: Path) -> None:
    """Raise `ExportError` where something is at `place` already."""
    if place.exists() or place.is_symlink():
        raise ExportError(f"{place} is there already. Name a new folder.")


@contextmanager
def resumable(place: Path, identity: str) -> Iterator[Partial]:
    """A hidden folder beside `place` to write to, renamed to `place` when the block ends.

    `identity` tells one task from another: what a run of the same task left is gone on with, anything else is cleared
    away. On a `Lora2fxError` nothing is left behind; on any other end, such as a full disk or a kill, the folder stays
    for the next run. Raises `ExportError` where `place` is taken or another process writes it.
    """
    check_new(place)
    folder = place.parent / f".{place.name}.partial"
    if folder.exists() and not (folder / _LOCK).exists() and any(folder.iterdir()):
        raise ExportError(f"{folder} is needed for the work on {place.name} and is no leftover of it. Move it away.")
    made = make_folders(folder)
    with _locked(folder):
        try:
            partial = _earlier(folder, identity)
            yield partial
            _publish(partial, place)
        except Lora2fxError:
            shutil.rmtree(folder, ignore_errors=True)
            for empty in reversed(made):
                if empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()
            raise


def _publish(partial: Partial, place: Path) -> None:
    folder, own = partial.folder, (_STATE, _LOCK)
    mode = usual_mode(folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in own:
            os.chmod(path, mode)
            sync(path)
    sync_folder(folder)
    check_new(place)
    try:
        for name in own:
            (folder / name).unlink(missing_ok=True)
        os.rename(folder, place)
    except BaseException:
        (folder / _LOCK).touch()
        partial.keep()
        raise
    sync_folder(place.parent)
