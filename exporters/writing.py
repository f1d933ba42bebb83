"""Files that are there whole or not at all: written aside in the same folder, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lora2fx.errors import ExportError


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new, hidden folder in `folder` for files on their way, gone when the block ends.

    `folder` is made where it is missing, with its parents, and taken away again if nothing was published in it.
    """
    made = make_folders(folder)
    aside = Path(tempfile.mkdtemp(prefix=".lora2fx-", dir=folder))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for empty in reversed(made):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()


def publish(files: Mapping[Path, Path]) -> None:
    """Move each staged file (key) to its place (value), in order, after all of them have reached the disk.

    Where a move fails, files that had no predecessor are taken away again.
    """
    for staged in files:
        os.chmod(staged, usual_mode(staged.parent))
        sync(staged)
    added: list[Path] = []
    try:
        for staged, place in files.items():
            fresh = not place.exists()
            os.replace(staged, place)
            added += [place] if fresh else []
    except OSError:
        for place in added:
            place.unlink(missing_ok=True)
        raise
    for folder in {place.parent for place in files.values()}:
        sync_folder(folder)


def publish_folder(staged: Path, place: Path, owned: frozenset[str]) -> None:
    """Move a staged folder to `place`, over an earlier one that holds no other files than the `owned` names.

    Raises `ExportError` where it holds others.
    """
    check_folder(place, owned)
    for file in sorted(staged.iterdir()):
        os.chmod(file, usual_mode(staged.parent))
        sync(file)
    sync_folder(staged)
    os.chmod(staged, usual_mode(staged.parent) | 0o111)
    earlier = staged.parent / "earlier"
    if place.exists():
        os.rename(place, earlier)
    try:
        os.rename(staged, place)
    except OSError:
        if earlier.exists():
            os.rename(earlier, place)
        raise
    sync_folder(place.parent)


def check_folder(place: Path, owned: frozenset[str]) -> None:
    """Raise `ExportError` unless `place` is free, or a folder with no other files than the `owned` names."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise ExportError(f"{place} is asked for as a folder and is a file or a link. Choose another path.")
    others = sorted(entry.name for entry in place.iterdir() if entry.name not in owned) if place.exists() else []
    if others:
        raise ExportError(
            f"{place} holds files that no earlier export wrote: {', '.join(others[:5])}. An export replaces its whole"
            " folder: choose an empty or a new one."
        )


def check_file(place: Path) -> None:
    """Raise `ExportError` where `place` is a folder."""
    if place.is_dir():
        raise ExportError(f"{place} is asked for as a file and is a folder. Name a file in it.")


def usual_mode(folder: Path) -> int:
    """The mode that a new file in `folder` gets: 0666 less the umask, asked without touching the umask."""
    probe = folder / f".mode-{os.getpid()}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()


def make_folders(folder: Path) -> list[Path]:
    """Make the folder and its parents; those that were missing, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    for parent in missing:
        parent.mkdir()
    return missing


def sync(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk."""
    """Have the names in a folder reach the disk."""
    if os.name == "nt":  # Windows can't open a folder; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
