"""Which columns hold the text and the label, and what is wrong with their values, said with the row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from lora2fx.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = (
    ("text", "text2"),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "answer"),
    ("query", "passage"),
)
TEXTS = ("text", "sentence", "content", "review", "tokens", "words", "document", "question", "query", "title")
LABELS = ("label", "labels", "score", "ner_tags", "tags", "pos_tags", "target", "class", "category")
LEAST_ROWS_A_CLASS = 2
"""On average; with fewer a label column is more likely numbers or text."""


def find_text(table: Dataset, asked: Sequence[str]) -> tuple[str, ...]:
    """One or two columns: those asked for, else usual names. Raises `DataError`."""
    names = table.column_names
    if asked:
        _check_names(names, asked, "--text")
        if len(asked) > 2:
            raise DataError(
                f"--text {' '.join(asked)}: a model reads one text or a pair of them. Name one or two columns."
            )
        return tuple(asked)
    for pair in PAIRS:
        if set(pair) <= set(names):
            return pair
    for name in TEXTS:
        if name in names:
            return (name,)
    raise DataError(f"none of the columns ({', '.join(names)}) has a usual name for text. Name it with --text COLUMN.")


def find_label(table: Dataset, asked: str | None) -> str:
    """The column asked for, else the first with a usual name. Raises `DataError`."""
    names = table.column_names
    if asked:
        _check_names(names, [asked], "--label")
        return asked
    found = next((name for name in LABELS if name in names), None)
    if found is None:
        raise DataError(
            f"none of the columns ({', '.join(names)}) has a usual name for a label. Name it with --label COLUMN."
        )
    return found


def check_same(table: Dataset, columns: Sequence[str], source: str) -> None:
    """Raise `DataError` where the validation table lacks a column."""
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{source} has no column {missing[0]!r}, which the training rows have (it has"
            f" {', '.join(table.column_names)}). Name a validation file with the same columns."
        )


def check_texts(table: Dataset, columns: Sequence[str], source: str, words: bool = False) -> None:
    """Raise `DataError`, naming the row, where a text is no string (no list of strings where `words`)."""
    for column in columns:
        for row, value in rows_of(table, column):
            if not (_are_words(value) if words else isinstance(value, str)):
                wanted = "a list of words" if words else "a text"
                raise DataError(
                    f"{source}, row {row}: column {column!r} holds {shown(value)} where {wanted} should be. Mend or"
                    " drop the row, or name another column with --text."
                )


def class_names(table: Dataset, column: str) -> list[Any]:
    """The values that stand for classes, in order; whole numbers from 0 on keep theirs. Raises `DataError`."""
    known = getattr(table.features[column], "names", None)
    refused = [
        (row, value) for row, value in rows_of(table, column) if value == -1 or not isinstance(value, (int, str))
    ]
    for row, value in sorted(refused, key=lambda found: not _is_missing(found[1])):
        raise DataError(f"training data, row {row}: {_not_a_class(column, value)}")
    if known:
        return list(range(len(known)))
    found = set(table.unique(column))
    kinds = {isinstance(value, str) for value in found}
    if len(kinds) > 1:
        raise DataError(f"column {column!r} holds numbers and text. Write all labels in one way.")
    if len(found) < 2:
        raise DataError(f"column {column!r} holds {shown(found.pop())} in every row: there is nothing to tell apart.")
    if len(found) * LEAST_ROWS_A_CLASS > len(table):
        raise DataError(
            f"column {column!r} holds {len(found)} different values in {len(table)} rows, too many for classes. Name"
            " another column with --label, or pass --task regression for numbers."
        )
    return sorted(found)


def check_classes(table: Dataset, column: str, known: Sequence[Any], source: str) -> None:
    """Raise `DataError`, naming the row, where a label is none of the `known`."""
    usual = set(known)
    for row, value in rows_of(table, column):
        if isinstance(value, (dict, list)) or value not in usual:
            usual_ones = ", ".join(map(repr, known[:10])) + (", …" if len(known) > 10 else "")
            raise DataError(
                f"{source}, row {row}: the label {shown(value)} is none of the training labels ({usual_ones}). Mend or"
                " drop the row."
            )


def check_numbers(table: Dataset, column: str, source: str) -> None:
    """Raise `DataError`, naming the row, where a label is no finite number."""
    for row, value in rows_of(table, column):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise DataError(
                f"{source}, row {row}: the label {shown(value)} is no number. Mend or drop the row, or pass --task"
                " classification."
            )


def _not_a_class(column: str, value: Any) -> str:
    if isinstance(value, float) and isfinite(value):
        return f"the label {value:g} in column {column!r} is no class. Pass --task regression for numbers."
    if isinstance(value, list):
        return f"the label in column {column!r} is a list. Pass --task token-classification for one label a word."
    return f"column {column!r} holds no label ({shown(value)}). Drop the row, or name another column with --label."


def _is_missing(value: Any) -> bool:
    """Of whole numbers and nothing pandas makes floats: the row without a label is the one to name."""
    return value is None or value != value


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def rows_of(table: Dataset, column: str, size: int = 10_000) -> Iterator[tuple[int, Any]]:
    """(row from 1 on, value), read piece by piece."""
    for start in range(0, len(table), size):
        yield from enumerate(table[start : start + size][column], start + 1)


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 40 else text[:37] + "…"


def _check_names(names: Sequence[str], asked: Sequence[str], option: str) -> None:
    for name in asked:
        if name not in names:
            raise DataError(f"{option} {name}: there is no such column. There are {', '.join(names)}.")
