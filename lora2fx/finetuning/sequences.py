"""One label for a text or a pair of texts: a class, or a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora2fx.finetuning.columns import (
    check_classes,
    check_numbers,
    check_same,
    check_texts,
    class_names,
    find_label,
    find_text,
)
from lora2fx.finetuning.tasks import Columns, Metrics, class_config, padding_collator

if TYPE_CHECKING:
    from datasets import Dataset

    from lora2fx.finetuning.reading import Tables
    from lora2fx.finetuning.settings import Settings


def _found(tables: Tables, settings: Settings) -> Columns:
    """Text and label columns, texts checked."""
    text, label = find_text(tables.train, settings.text), find_label(tables.train, settings.label)
    check_same(tables.validation, (*text, label), tables.source)
    for table, source in ((tables.train, "training data"), (tables.validation, tables.source)):
        check_texts(table, text, source)
    return Columns(text, label)


def _encoded(table: Dataset, columns: Columns, tokenizer: Any, settings: Settings, label: Any) -> Dataset:
    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = tokenizer(*(rows[name] for name in columns.text), truncation=True, max_length=settings.length)
        return {**inputs, "labels": [label(value) for value in rows[str(columns.label)]]}

    return table.map(encode, batched=True, remove_columns=table.column_names, load_from_cache_file=False)


class Classification:
    """One class a row; judged by accuracy, with macro F1 and Matthews' correlation beside it."""

    model_class = "AutoModelForSequenceClassification"
    metric = "accuracy"
    words = False
    scores = True

    def columns(self, tables: Tables, settings: Settings) -> Columns:
        """Classes are those of the training rows; a validation label outside them is an error."""
        found = _found(tables, settings)
        assert found.label is not None
        classes = class_names(tables.train, found.label)
        check_classes(tables.validation, found.label, classes, tables.source)
        known = getattr(tables.train.features[found.label], "names", None) or list(map(str, classes))
        return Columns(found.text, found.label, tuple(classes), tuple(known))

    def config(self, columns: Columns) -> dict[str, Any]:
        """Labels by id."""
        return class_config(columns)

    def encode(self, table: Dataset, columns: Columns, tokenizer: Any, settings: Settings) -> Dataset:
        """Labels become ids."""
        ids = {value: index for index, value in enumerate(columns.classes)}
        return _encoded(table, columns, tokenizer, settings, ids.__getitem__)

    def collator(self, tokenizer: Any) -> Any:
        """Pads."""
        return padding_collator(tokenizer)

    def measure(self, predictions: Any, labels: Any) -> Metrics:
        """Of the most likely class."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        chosen = np.asarray(predictions).argmax(-1)
        return {
            "accuracy": float(accuracy_score(labels, chosen)),
            "f1": float(f1_score(labels, chosen, average="macro", zero_division=0)),
            "matthews": float(matthews_corrcoef(labels, chosen)),
        }

    def summarise(self, loss: float) -> Metrics:
        """Nothing more."""
        return {}


class Regression:
    """One number a row; judged by Pearson's correlation, with Spearman's and the mean squared error beside it."""

    model_class = "AutoModelForSequenceClassification"
    metric = "pearson"
    words = False
    scores = True

    def columns(self, tables: Tables, settings: Settings) -> Columns:
        """Labels are finite numbers."""
        found = _found(tables, settings)
        assert found.label is not None
        check_numbers(tables.train, found.label, "training data")
        check_numbers(tables.validation, found.label, tables.source)
        return found

    def config(self, columns: Columns) -> dict[str, Any]:
        """One output, mean squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, table: Dataset, columns: Columns, tokenizer: Any, settings: Settings) -> Dataset:
        """Labels become floats."""
        return _encoded(table, columns, tokenizer, settings, float)

    def collator(self, tokenizer: Any) -> Any:
        """Pads."""
        return padding_collator(tokenizer)

    def measure(self, predictions: Any, labels: Any) -> Metrics:
        """Correlations are 0 where either side is constant."""
        from scipy.stats import pearsonr, spearmanr

        found, wanted = np.asarray(predictions, np.float64).reshape(-1), np.asarray(labels, np.float64).reshape(-1)
        constant = len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(found, wanted).statistic),
            "spearman": 0.0 if constant else float(spearmanr(found, wanted).statistic),
            "mse": float(np.mean((found - wanted) ** 2)),
        }

    def summarise(self, loss: float) -> Metrics:
        """Nothing more."""
        return {}
