"""One class for every word, and every next token: tasks whose labels run along the text."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2fx.errors import DataError
from lora2fx.finetuning.columns import check_same, check_texts, find_label, find_text
from lora2fx.finetuning.tags import check_tags, tag_names
from lora2fx.finetuning.tasks import Columns, Metrics, class_config, labelled_collator

if TYPE_CHECKING:
    from datasets import Dataset

    from lora2fx.finetuning.reading import Tables
    from lora2fx.finetuning.settings import Settings

IGNORED = -100
"""The label that no loss counts: a word's further tokens, padding."""
OUTSIDE = "O"


class TokenClassification:
    """One class a word, predicted at its first token; judged by F1 over all words' classes but "O", and accuracy."""

    model_class = "AutoModelForTokenClassification"
    metric = "f1"
    words = True
    scores = True

    def __init__(self) -> None:
        self._outside: int | None = None

    def columns(self, tables: Tables, settings: Settings) -> Columns:
        """Classes are those of the training rows."""
        text, label = find_text(tables.train, settings.text), find_label(tables.train, settings.label)
        if len(text) > 1:
            raise DataError(f"--text {' '.join(text)}: token classification reads one column of words.")
        check_same(tables.validation, (*text, label), tables.source)
        for table, source in ((tables.train, "training data"), (tables.validation, tables.source)):
            check_texts(table, text, source, words=True)
        classes, names = tag_names(tables.train, text[0], label)
        check_tags(tables.validation, text[0], label, classes, tables.source)
        self._outside = names.index(OUTSIDE) if OUTSIDE in names else None
        return Columns(text, label, tuple(classes), tuple(names))

    def config(self, columns: Columns) -> dict[str, Any]:
        """Labels by id."""
        return class_config(columns)

    def encode(self, table: Dataset, columns: Columns, tokenizer: Any, settings: Settings) -> Dataset:
        """A word's label at its first token, `IGNORED` at the others. Raises `DataError` for a slow tokenizer."""
        if not tokenizer.is_fast:
            raise DataError(
                f"{settings.model}: its tokenizer can't say which word a token is of. Take a fast tokenizer."
            )
        ids = {value: index for index, value in enumerate(columns.classes)}

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            words = rows[columns.text[0]]
            inputs = tokenizer(words, is_split_into_words=True, truncation=True, max_length=settings.length)
            tags = rows[str(columns.label)]
            inputs["labels"] = [_first_tokens(inputs.word_ids(row), tags[row], ids) for row in range(len(words))]
            return dict(inputs)

        return table.map(encode, batched=True, remove_columns=table.column_names, load_from_cache_file=False)

    def collator(self, tokenizer: Any) -> Any:
        """Pads inputs and labels."""
        return labelled_collator(tokenizer)

    def measure(self, predictions: Any, labels: Any) -> Metrics:
        """Over words; F1 is micro-averaged over all classes but "O" (over all where there is no such class)."""
        from sklearn.metrics import accuracy_score, f1_score

        wanted = np.asarray(labels)
        counted = wanted != IGNORED
        chosen, wanted = np.asarray(predictions).argmax(-1)[counted], wanted[counted]
        kinds = [kind for kind in range(np.asarray(predictions).shape[-1]) if kind != self._outside]
        return {
            "f1": float(f1_score(wanted, chosen, labels=kinds, average="micro", zero_division=0)),
            "accuracy": float(accuracy_score(wanted, chosen)),
        }

    def summarise(self, loss: float) -> Metrics:
        """Nothing more."""
        return {}


def _first_tokens(words: list[int | None], tags: list[Any], ids: Mapping[Any, int]) -> list[int]:
    before = [None, *words[:-1]]
    return [
        IGNORED if word is None or word == last else ids[tags[word]] for word, last in zip(words, before, strict=True)
    ]


class CausalLM:
    """Every next token; judged by perplexity, the exponential of the validation loss."""

    model_class = "AutoModelForCausalLM"
    metric = "perplexity"
    words = False
    scores = False

    def columns(self, tables: Tables, settings: Settings) -> Columns:
        """One column of text, no label."""
        text = find_text(tables.train, settings.text)
        if not settings.text:
            text = text[:1]
        if len(text) > 1:
            raise DataError(f"--text {' '.join(text)}: a language model reads one column of text.")
        check_same(tables.validation, text, tables.source)
        check_texts(tables.train, text, "training data")
        check_texts(tables.validation, text, tables.source)
        return Columns(text)

    def config(self, columns: Columns) -> dict[str, Any]:
        """As it is."""
        return {}

    def encode(self, table: Dataset, columns: Columns, tokenizer: Any, settings: Settings) -> Dataset:
        """Each text with an end token, cut at `length`; with `pack` all of them in a row, in pieces of `length`.

        Texts of less than two tokens have nothing to predict and are left out. Raises `DataError` where none is left.
        """
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            room = None if settings.pack else settings.length - len(end)
            ids = tokenizer(rows[columns.text[0]], truncation=room is not None, max_length=room)["input_ids"]
            whole = [[*own, *end] if own and own[-1:] != end else own for own in ids]
            kept = [own for own in (_pieces(whole, settings.length) if settings.pack else whole) if len(own) > 1]
            return {"input_ids": kept, "attention_mask": [[1] * len(own) for own in kept], "labels": kept}

        found = table.map(encode, batched=True, remove_columns=table.column_names, load_from_cache_file=False)
        if len(found) == 0:
            raise DataError(
                f"column {columns.text[0]!r} holds no text of two tokens or more. Name another with --text."
            )
        return found

    def collator(self, tokenizer: Any) -> Any:
        """Pads inputs and labels."""
        return labelled_collator(tokenizer)

    def measure(self, predictions: Any, labels: Any) -> Metrics:
        """Nothing: the loss says it."""
        return {}

    def summarise(self, loss: float) -> Metrics:
        """Perplexity; infinite where the loss is out of all bounds."""
        return {"perplexity": exp(loss) if loss < 700 else float("inf")}


def _pieces(texts: list[list[int]], length: int) -> list[list[int]]:
    joined = [token for text in texts for token in text]
    return [joined[start : start + length] for start in range(0, len(joined), length)]
