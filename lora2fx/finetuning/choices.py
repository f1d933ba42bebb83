"""The tasks by the names that the command line gives them."""

from __future__ import annotations

from lora2fx.finetuning.sequences import Classification, Regression
from lora2fx.finetuning.tasks import Task
from lora2fx.finetuning.tokens import CausalLM, TokenClassification

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "token-classification": TokenClassification,
    "causal-lm": CausalLM,
}
