"""Labels of which every word has one: found, and checked row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora2fx.errors import DataError
from lora2fx.finetuning.columns import rows_of, shown

if TYPE_CHECKING:
    from datasets import Dataset


def tag_names(table: Dataset, text: str, column: str) -> tuple[list[Any], list[str]]:
    """The values that stand for a word's classes, in order, and their names. Raises `DataError` (lengths, values)."""
    inner = getattr(table.features[column], "feature", None)
    names = getattr(inner, "names", None)
    found: set[Any] = set()
    for (row, tags), (_, words) in zip(rows_of(table, column), rows_of(table, text), strict=True):
        if not isinstance(tags, list) or any(isinstance(tag, bool) or not isinstance(tag, (int, str)) for tag in tags):
            raise DataError(
                f"training data, row {row}: column {column!r} holds {shown(tags)} where one label a word should be."
                " Mend the row, or name another column with --label."
            )
        _check_lengths(words, tags, row, "training data")
        found.update(tags)
    if names:
        return list(range(len(names))), list(names)
    if len({isinstance(tag, str) for tag in found}) > 1 or len(found) < 2:
        raise DataError(
            f"column {column!r} needs at least two labels, all numbers or all text; it has {sorted(map(str, found))}."
        )
    classes = sorted(found)
    return classes, [str(tag) for tag in classes]


def check_tags(table: Dataset, text: str, column: str, known: Sequence[Any], source: str) -> None:
    """Raise `DataError`, naming the row, where the tags are no list as long as the words, or hold an unknown one."""
    usual = set(known)
    for (row, tags), (_, words) in zip(rows_of(table, column), rows_of(table, text), strict=True):
        if not isinstance(tags, list) or (odd := [tag for tag in tags if tag not in usual]):
            raise DataError(
                f"{source}, row {row}: the label {shown(odd[0] if isinstance(tags, list) else tags)} is none of the"
                f" training labels ({', '.join(map(str, known[:10]))}). Mend or drop the row."
            )
        _check_lengths(words, tags, row, source)


def _check_lengths(words: Sequence[str], tags: Sequence[Any], row: int, source: str) -> None:
    if len(words) != len(tags):
        raise DataError(f"{source}, row {row}: {len(words)} words and {len(tags)} labels. Give each word one label.")
