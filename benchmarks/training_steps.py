"""One training step of each way to adapt a BERT, ready to be timed and counted: the same model, batch and optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import peft
import torch
from authors_arithmetic import adapt_as_published, allocate_as_published, penalty_as_published
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from lora2fx.program import program_of

SITES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
LENGTH_OF_RUN = 100_000
RANK = 8


PRECISIONS = ("float32", "autocast", "bfloat16")
"""A step in float32; in bfloat16 where autocast says so; of a model loaded in bfloat16, adapters in float32."""


@dataclass(frozen=True)
class Setting:
    """A BERT and a batch of `rows` x `tokens`, without dropout, so that all variants compute the same base.

    `dropout` is that of the adapters.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    rows: int
    tokens: int
    precision: str = "float32"
    dropout: float = 0.0

    @property
    def sites(self) -> int:
        """Adapted matrices."""
        return 6 * self.layers


GEMM_BOUND = Setting("GEMM-bound", 768, 3072, 6, 16, 64)
LAUNCH_BOUND = Setting("launch-bound", 128, 512, 12, 1, 16)
SETTINGS = {setting.name: setting for setting in (GEMM_BOUND, LAUNCH_BOUND)}


@dataclass(frozen=True)
class Training:
    """A model that trains: `step` is everything from zero_grad to what the method does after the optimizer's step."""

    model: nn.Module
    batch: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    extra_loss: Callable[[], Tensor] | None = None
    after: Callable[[], None] | None = None
    autocast: bool = False

    def loss(self) -> Tensor:
        """The forward, regulariser included where it is part of the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(**self.batch).loss
        return loss if self.extra_loss is None else loss + self.extra_loss()

    def step(self) -> None:
        """One whole training step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.after is not None:
            self.after()


def fresh_model(setting: Setting) -> BertForSequenceClassification:
    """The base model in train mode, seeded."""
    torch.manual_seed(0)
    heads = max(2, setting.hidden // 64)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=setting.hidden,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",  # else the first forward sets it, and torch.compile starts anew
    )
    model = BertForSequenceClassification(config)
    return (model.bfloat16() if setting.precision == "bfloat16" else model).train()


def fresh_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens without padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, (setting.rows, setting.tokens), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(2, (setting.rows,), generator=generator)}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over whatever is trained: the dearest parts of torch's own default are not an adapter's."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def _require(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def frozen_base(setting: Setting) -> Training:
    """Only the head trains, but the backward goes on to the outputs of the first adapted matrices.

    That is the frozen work which any adapter of these matrices needs.
    """
    model = fresh_model(setting).requires_grad_(False)
    model.classifier.requires_grad_(True)
    first = model.bert.encoder.layer[0].attention.self
    for linear in (first.query, first.key, first.value):
        linear.register_forward_hook(_require)
    return Training(model, fresh_batch(setting), optimizer_of(model))


def full_fine_tuning(setting: Setting) -> Training:
    """Every parameter trains."""
    model = fresh_model(setting)
    return Training(model, fresh_batch(setting), optimizer_of(model))


def peft_lora(setting: Setting) -> Training:
    """PEFT's LoRA, r = 8."""
    config = peft.LoraConfig(
        r=RANK, lora_dropout=setting.dropout, target_modules=list(SITES), modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(fresh_model(setting), config).train()
    return Training(model, fresh_batch(setting), optimizer_of(model))


def peft_adalora(setting: Setting) -> Training:
    """PEFT's AdaLoRA from r = 8 to 4, with its regulariser, importance and allocation in every step."""
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=RANK,
        target_r=4,
        tinit=1,
        tfinal=10,
        deltaT=1,
        total_step=LENGTH_OF_RUN,
        lora_dropout=setting.dropout,
        target_modules=list(SITES),
        modules_to_save=["classifier"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh_model(setting), config).train()
    steps = iter(range(2, LENGTH_OF_RUN))
    return Training(
        model,
        fresh_batch(setting),
        optimizer_of(model),
        after=lambda: model.base_model.update_and_allocate(next(steps)),
    )


def authors(setting: Setting) -> Training:
    """LoRA2's published arithmetic, restated: ΔW formed in every forward, in x out products in the regulariser."""
    model = fresh_model(setting).requires_grad_(False)
    model.classifier.requires_grad_(True)
    layers = adapt_as_published(model, SITES, RANK, RANK)
    steps = iter(range(1, LENGTH_OF_RUN))
    return Training(
        model,
        fresh_batch(setting),
        optimizer_of(model),
        extra_loss=lambda: 0.1 * penalty_as_published(layers),
        after=lambda: allocate_as_published(layers, next(steps)),
    )


def ours(setting: Setting, r: int = RANK) -> Training:
    """lora2fx's LoRA2, r = k = 8, with regulariser, importance and allocation in every step."""
    return adapted(setting, lora2fx.LoRA2(r=r, k=RANK, target_r=r / 2, tinit=0, tfinal=10, deltaT=1))


def adapted(setting: Setting, method: lora2fx.LoRA | lora2fx.AdaLoRA | lora2fx.LoRA2) -> Training:
    """A method of lora2fx's, attached."""
    method = replace(method, lora_dropout=setting.dropout)
    model, batch = fresh_model(setting), fresh_batch(setting)
    lora2fx.transform(model, list(SITES), method, example_inputs=batch, modules_to_save=["classifier"], verify=False)
    assert len(program_of(model, "benchmark").adapters) == setting.sites
    optimizer = optimizer_of(model)
    lora2fx.attach(model, optimizer, total_steps=LENGTH_OF_RUN)
    return Training(model.train(), batch, optimizer)


BASE, OURS = "frozen base", "lora2fx LoRA2"
VARIANTS: dict[str, Callable[[Setting], Training]] = {
    BASE: frozen_base,
    "full fine-tuning": full_fine_tuning,
    "PEFT LoRA": peft_lora,
    "PEFT AdaLoRA": peft_adalora,
    "LoRA2, authors' arithmetic": authors,
    OURS: ours,
    "lora2fx LoRA": partial(adapted, method=lora2fx.LoRA(r=RANK)),
    "lora2fx AdaLoRA": partial(
        adapted, method=lora2fx.AdaLoRA(r=RANK, target_r=RANK // 2, tinit=0, tfinal=10, deltaT=1)
    ),
}


def names_of(setting: Setting) -> list[str]:
    """The variants that can be trained so: the authors' arithmetic has float32 and no dropout in it."""
    all_can = setting.precision != "bfloat16" and not setting.dropout
    return [name for name, make in VARIANTS.items() if all_can or make is not authors]


def prepared(setting: Setting, name: str) -> Training:
    """A variant, ready to train."""
    return replace(VARIANTS[name](setting), autocast=setting.precision == "autocast")


def suffix_of(setting: Setting) -> str:
    """What the name of a results file ends with."""
    precision = "" if setting.precision == PRECISIONS[0] else f"-{setting.precision}"
    return precision + ("-dropout" if setting.dropout else "")
