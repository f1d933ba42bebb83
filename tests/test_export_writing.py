"""Files are there whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from lora2fx.errors import ExportError
from lora2fx.exporters import writing
from lora2fx.exporters.writing import check_file, check_folder, publish, publish_folder, staging

OWNED = frozenset({"a", "b"})


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_staged_files_arrive_and_nothing_else_stays(tmp_path):
    (tmp_path / "a").write_text("old")
    with staging(tmp_path) as aside:
        (aside / "a").write_text("new")
        (aside / "b").write_text("beside")
        (aside / "scratch").write_text("left")
        publish({aside / "a": tmp_path / "a", aside / "b": tmp_path / "b"})
    assert tree(tmp_path) == {"a": "new", "b": "beside"}


def test_folders_are_made_and_taken_away_again(tmp_path):
    deep = tmp_path / "x" / "y"
    with pytest.raises(ValueError, match="inside"), staging(deep):
        raise ValueError("inside")
    assert not (tmp_path / "x").exists()
    with staging(deep) as aside:
        (aside / "a").write_text("a")
        publish({aside / "a": deep / "a"})
    assert tree(tmp_path) == {"x/y/a": "a"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with staging(tmp_path) as aside:
            (aside / "a").write_text("a")
            os.chmod(aside / "a", 0o600)
            publish({aside / "a": tmp_path / "a"})
            (aside / "f").mkdir(mode=0o700)
            (aside / "f" / "a").write_text("a")
            publish_folder(aside / "f", tmp_path / "f", OWNED)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "f/a", "f")]
    readable = 0o666 & ~umask
    assert modes == [readable, readable, readable | 0o111]


def failing(monkeypatch, name: str, at: int):
    real, calls = getattr(os, name), []

    def fail(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(writing.os, name, fail)


def put_both(tmp_path) -> None:
    with staging(tmp_path) as aside:
        (aside / "a").write_text("new")
        (aside / "b").write_text("new")
        publish({aside / "a": tmp_path / "a", aside / "b": tmp_path / "b"})


@pytest.mark.parametrize(("name", "at"), [("fsync", 1), ("fsync", 2), ("replace", 1)])
def test_a_failure_before_the_first_move_changes_nothing(tmp_path, monkeypatch, name, at):
    (tmp_path / "a").write_text("old")
    failing(monkeypatch, name, at)
    with pytest.raises(OSError, match="No space"):
        put_both(tmp_path)
    assert tree(tmp_path) == {"a": "old"}


def test_files_that_arrived_before_a_failed_move_are_taken_away(tmp_path, monkeypatch):
    (tmp_path / "b").write_text("old")
    failing(monkeypatch, "replace", 2)
    with pytest.raises(OSError, match="No space"):
        put_both(tmp_path)
    assert tree(tmp_path) == {"b": "old"}


def put(tmp_path, text: str) -> None:
    with staging(tmp_path) as aside:
        (aside / "f").mkdir()
        (aside / "f" / "a").write_text(text)
        publish_folder(aside / "f", tmp_path / "f", OWNED)


def test_a_folder_replaces_its_predecessor_whole(tmp_path):
    put(tmp_path, "old")
    (tmp_path / "f" / "b").write_text("stale")
    put(tmp_path, "new")
    assert tree(tmp_path) == {"f/a": "new"}


def test_a_folder_comes_back_when_its_successor_can_not_be_moved(tmp_path, monkeypatch):
    put(tmp_path, "old")
    failing(monkeypatch, "rename", 2)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path, "new")
    assert tree(tmp_path) == {"f/a": "old"}


def test_foreign_files_are_not_replaced(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").write_text("years")
    with pytest.raises(ExportError, match=r"holds files that no earlier export wrote: thesis.tex"):
        put(tmp_path, "new")
    assert tree(tmp_path) == {"f/thesis.tex": "years"}


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ExportError, match="asked for as a folder and is a file or a link"):
        check_folder(tmp_path / "a", OWNED)
    with pytest.raises(ExportError, match="is a file or a link"):
        check_folder(tmp_path / "link", OWNED)
    with pytest.raises(ExportError, match="asked for as a file and is a folder"):
        check_file(tmp_path)
    check_folder(tmp_path / "new", OWNED)
    check_file(tmp_path / "new")
