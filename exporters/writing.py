"""Files that are there whole or not at all: written aside in the same folder, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lora2fx.errors import ExportError

_ASIDE = ".lora2fx-"
_EARLIER = "earlier-"
"""Names of what is replaced, while that may have to come back."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system answers that has no locks."""


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new, hidden folder in `folder` for files on their way, gone when the block ends.

    `folder` is made where it is missing, with its parents, and taken away again if nothing was published in it. An
    `OSError` gets a note that nothing was written. What a killed process left in `folder` is cleared away; what it had
    moved out of its place is put back first.
    """
    made: list[Path] = []
    try:
        made = make_folders(folder)
        with ExitStack() as held:
            with one_at_a_time([folder]):
                _clear_leftovers(folder)
                aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
                held.enter_context(one_at_a_time([aside]))
                held.callback(_clear, aside)
            yield aside
    except OSError as error:
        error.add_note(f"Nothing was written to {folder}: what was there is as it was.")
        raise
    finally:
        remove_empty(made)


def _clear(aside: Path) -> None:
    if not any(aside.glob(_EARLIER + "*")):
        shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Clear away the hidden folders that nobody holds: their processes are gone."""
    for aside in folder.glob(_ASIDE + "*"):
        if not is_free(aside):
            continue
        for earlier in aside.glob(_EARLIER + "*"):
            place = folder / earlier.name.removeprefix(_EARLIER)
            if not os.path.lexists(place):
                os.rename(earlier, place)
        shutil.rmtree(aside, ignore_errors=True)


def publish(files: Mapping[Path, Path]) -> None:
    """Move each staged file (key) to its place (value), in order, after all of them have reached the disk.

    Whatever goes wrong, an interrupt too, every place then holds what it held before. Two processes that publish in
    one folder do so one after the other.
    """
    for staged in files:
        os.chmod(staged, usual_mode(staged.parent))
        sync(staged)
    folders = sorted({place.parent for place in files.values()})
    with one_at_a_time(folders), ExitStack() as undo:
        earlier = [_keep_earlier(staged, place, undo) for staged, place in files.items()]
        for staged, place in files.items():
            os.replace(staged, place)
        for folder in folders:
            sync_folder(folder)
        undo.pop_all()
    _forget(earlier)


def _keep_earlier(staged: Path, place: Path, undo: ExitStack) -> Path:
    """Where, beside the staged file, what is at `place` has a second name: a copy where a file can't have two."""
    earlier = staged.with_name(_EARLIER + place.name)
    undo.callback(_put_back, staged, place, earlier)
    if os.path.lexists(place):
        try:
            os.link(place, earlier, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(place, earlier, follow_symlinks=False)
    return earlier


def _put_back(staged: Path, place: Path, earlier: Path) -> None:
    if staged.exists():
        _forget([earlier])
    elif os.path.lexists(earlier):
        os.replace(earlier, place)
    else:
        place.unlink(missing_ok=True)


def _forget(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def publish_folder(staged: Path, place: Path, owned: frozenset[str]) -> None:
    """Move a staged folder to `place`, over an earlier one that holds no other files than the `owned` names.

    Whatever goes wrong, an interrupt too, `place` then is what it was. Raises `ExportError` where it holds others.
    """
    for file in sorted(staged.iterdir()):
        os.chmod(file, usual_mode(staged.parent))
        sync(file)
    sync_folder(staged)
    os.chmod(staged, usual_mode(staged.parent) | 0o111)
    earlier = staged.with_name(_EARLIER + place.name)
    with one_at_a_time([place.parent]), ExitStack() as undo:
        check_folder(place, owned)
        undo.callback(_put_folder_back, staged, place, earlier)
        if place.exists():
            os.rename(place, earlier)
        os.rename(staged, place)
        sync_folder(place.parent)
        undo.pop_all()
    _forget([earlier])


def _put_folder_back(staged: Path, place: Path, earlier: Path) -> None:
    if place.exists() and not staged.exists():
        os.rename(place, staged)
    if earlier.exists():
        os.rename(earlier, place)


@contextmanager
def one_at_a_time(folders: Iterable[Path]) -> Iterator[None]:
    """Hold the folders' locks, waiting for other processes; Windows and file systems without locks have none."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with ExitStack() as stack:
        for folder in folders:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        yield


def is_free(folder: Path) -> bool:
    """Whether the folder is there, can be locked and no process holds it; on Windows never."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


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
    """Make the folder and its parents, all or none; those that were missing, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    try:
        for parent in missing:
            parent.mkdir(exist_ok=True)
    except BaseException:
        remove_empty(missing)
        raise
    return missing


def remove_empty(made: list[Path]) -> None:
    """Take folders that `make_folders` made away again, innermost first, where nothing is in them."""
    for folder in reversed(made):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def sync(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names are on the disk."""
    if os.name == "nt":  # Windows can't open a folder; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
