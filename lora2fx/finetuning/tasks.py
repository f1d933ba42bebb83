"""What a task is: columns in, model inputs out, and the numbers that say how well it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

    from lora2fx.finetuning.reading import Tables
    from lora2fx.finetuning.settings import Settings

Metrics = dict[str, float]


@dataclass(frozen=True)
class Columns:
    """The columns that are read, and the classes in the order of their ids (none where the label is no class)."""

    text: tuple[str, ...]
    label: str | None = None
    classes: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()


class Task(Protocol):
    """One task. `model_class` is transformers' Auto class, `metric` the number by which runs are told apart.

    `words`: the text is a list of words. `scores`: whether predictions are needed to judge, or the loss says all.
    """

    model_class: str
    metric: str
    words: bool
    scores: bool

    def columns(self, tables: Tables, settings: Settings) -> Columns:
        """Find and check the columns of both tables. Raises `DataError`."""

    def config(self, columns: Columns) -> dict[str, Any]:
        """What the model's config must say."""

    def encode(self, table: Dataset, columns: Columns, tokenizer: Any, settings: Settings) -> Dataset:
        """The rows as the model takes them, `labels` among them."""

    def collator(self, tokenizer: Any) -> Any:
        """What makes a batch of rows."""

    def measure(self, predictions: Any, labels: Any) -> Metrics:
        """From logits and labels (numpy) to numbers."""

    def summarise(self, loss: float) -> Metrics:
        """Further numbers that follow from the validation loss."""


def class_config(columns: Columns) -> dict[str, Any]:
    """Labels by id and back."""
    return {
        "num_labels": len(columns.names),
        "id2label": dict(enumerate(columns.names)),
        "label2id": {name: index for index, name in enumerate(columns.names)},
    }


def padding_collator(tokenizer: Any) -> Any:
    """Pads to the longest row of a batch."""
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


def labelled_collator(tokenizer: Any) -> Any:
    """Pads inputs and one label a token, with -100 where there is nothing to predict."""
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8)


def cut_share(table: Dataset, length: int) -> float:
    """The share of rows that fill the length allowed: those that were cut, but for a few."""
    if len(table) == 0:
        return 0.0
    return sum(len(ids) >= length for ids in table["input_ids"]) / len(table)
