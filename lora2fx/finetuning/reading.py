"""A file, a folder of files or the name of a dataset become a table to train on and one to validate on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2fx.errors import DataError
from lora2fx.finetuning.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
TRAIN, VALIDATION = ("train",), ("validation", "dev", "valid", "val", "test")
HELD_BACK = 0.1
"""Of the training rows, for validation, where there are none of its own."""


@dataclass(frozen=True)
class Tables:
    """What is trained on, what is validated on, where the second came from, and a digest of both."""

    train: Dataset
    validation: Dataset
    source: str
    digest: str


def read_tables(settings: Settings) -> Tables:
    """The tables that the settings name; a tenth of the training rows is held back where there is no validation.

    Raises `DataError` for what is missing, empty, or can't be read.
    """
    splits = _named(settings.data, settings.config)
    train = _pick(splits, settings.split, TRAIN, settings.data)
    if settings.validation is not None:
        others = _named(settings.validation, None)
        validation = _pick(others, settings.validation_split, (*VALIDATION, *TRAIN), settings.validation)
        source = settings.validation
    else:
        found = [name for name in VALIDATION if name in splits]
        wanted = settings.validation_split or (found[0] if found else None)
        validation = None if wanted is None else _pick(splits, wanted, VALIDATION, settings.data)
        source = f"split {wanted} of {settings.data}"
    if settings.rows is not None and settings.rows < len(train):
        train = train.shuffle(seed=settings.seed).select(range(settings.rows))
    if validation is None:
        train, validation = _held_back(train, settings)
        source = f"{len(validation)} of the training rows, held back"
    digest = hashlib.sha256(f"{_digest(train)} {_digest(validation)}".encode()).hexdigest()
    return Tables(train, validation, source, digest)


def _held_back(train: Dataset, settings: Settings) -> tuple[Dataset, Dataset]:
    count = int(HELD_BACK * len(train))
    if count < 1:
        raise DataError(
            f"{settings.data} has {len(train)} rows: too few to hold a tenth back for validation. Name others with"
            " --validation."
        )
    parts = train.train_test_split(test_size=count, seed=settings.seed)
    return parts["train"], parts["test"]


def _named(name: str, config: str | None) -> Mapping[str, Dataset]:
    """All splits of what a name means."""
    path = Path(name)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return {"train": _read_file(path)}
    if path.suffix in BUILDERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{name}: there is no such file or folder.")
    return _read_hub(name, config)


def _read_folder(folder: Path) -> Mapping[str, Dataset]:
    files = sorted(file for file in folder.iterdir() if file.suffix in BUILDERS)
    known = {file.stem: file for file in files if file.stem in (*TRAIN, *VALIDATION)}
    if "train" not in known:
        there = ", ".join(file.name for file in files) or "no csv, tsv, json, jsonl, parquet or txt file"
        raise DataError(
            f"{folder} holds no train file (there is: {there}). Name it train.csv, or pass the file itself."
        )
    return {stem: _read_file(file) for stem, file in known.items()}


def _read_file(path: Path) -> Dataset:
    from datasets import load_dataset

    if path.suffix not in BUILDERS:
        raise DataError(
            f"{path}: a {path.suffix or 'file without an ending'} can't be read. Pass {', '.join(BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Pass a file with rows.")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    files = {"train": str(path)}
    read: Dataset = _tell(str(path), lambda: load_dataset(BUILDERS[path.suffix], data_files=files, **options))["train"]
    if len(read) == 0:
        raise DataError(f"{path} holds no rows. Pass a file with rows.")
    if any(name.startswith("__index_level_") for name in read.column_names):
        raise DataError(
            f"{path}: its rows have more fields than its header has names. Quote the fields that hold commas."
        )
    return read


def _read_hub(name: str, config: str | None) -> Mapping[str, Dataset]:
    from datasets import Dataset, load_dataset

    found = _tell(name, lambda: load_dataset(name, config))
    return {"train": found} if isinstance(found, Dataset) else dict(found)


@contextmanager
def quiet_datasets(bars: bool) -> Iterator[None]:
    """Without `datasets`' log, and its bars too unless `bars`."""
    import datasets
    from datasets.utils import logging

    shown, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    if not bars:
        datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _tell(name: str, read: Callable[[], Any]) -> Any:
    """Read, with errors as one sentence."""
    try:
        with quiet_datasets(bars=False):
            return read()
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(_sentence(name, error)) from error
    except Exception as error:  # of pandas, pyarrow and datasets alike: whatever the file holds
        raise DataError(_sentence(name, error.__cause__ or error)) from error


def _sentence(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or "it holds no rows"
    return f"{name} can't be read: {reason.rstrip('.')}. Check the file (one row a line, the same fields in each)."


def _pick(splits: Mapping[str, Dataset], asked: str | None, usual: tuple[str, ...], name: str) -> Dataset:
    for split in (asked,) if asked else usual:
        if split in splits:
            return splits[split]
    wanted = asked or " or ".join(usual)
    raise DataError(f"{name} has no split {wanted}; it has {', '.join(splits)}. Name one with --split.")


def _digest(table: Dataset) -> str:
    """Of the column names and the first, middle and last hundred rows' values, and the number of rows."""
    count = len(table)
    found = hashlib.sha256(f"{count} {table.column_names}".encode())
    for start in (0, count // 2, max(0, count - 100)):
        found.update(repr(table[start : start + 100]).encode())
    return found.hexdigest()
