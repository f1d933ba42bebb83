"""Who is compared: every method of lora2fx, and PEFT's LoRA and AdaLoRA as references from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import AdamW, Optimizer

import lora2fx
from lora2fx.passes.prune import prune_ranks
from lora2fx.program import Baseline, Method, program_of

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Setting:
    """What all contestants share: the modules they adapt and train besides, the run's length and learning rates.

    `inputs` are example inputs for models that are not transformers' own.
    """

    targets: Sequence[str]
    heads: Sequence[str]
    steps: int
    rate: float
    head_rate: float
    inputs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Trainee:
    """A model ready to be trained.

    `after_step(step)` is to be called between the optimizer's step and `zero_grad`, `outcome()` at the end: adapter
    parameters `before` pruning, `after` it and `folded` (as plain LoRA of each update's rank), ranks by weight.
    """

    model: nn.Module
    optimizer: Optimizer
    after_step: Callable[[int], None]
    outcome: Callable[[], dict[str, Any]]


class Contestant(Protocol):
    """One way to adapt."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """Adapt `model` in place. `evaluate` returns -loss on a fixed batch of training examples."""


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class HeadOnly:
    """Nothing is adapted: the modules that all train besides are trained, at their own rate."""

    name: str

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """Free the heads."""
        heads = [p for path in setting.heads for p in model.get_submodule(path).requires_grad_(True).parameters()]
        nothing: dict[str, Any] = {"before": 0, "after": 0, "folded": 0, "ranks": {}}
        optimizer = AdamW(heads, lr=setting.head_rate, weight_decay=0.0)
        return Trainee(model, optimizer, lambda step: None, lambda: nothing)


@dataclass(frozen=True)
class Ours:
    """A method of lora2fx, or one of its baselines."""

    name: str
    method: Method | Baseline

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """As a user would: transform, param_groups, attach."""
        lora2fx.transform(
            model, setting.targets, self.method, example_inputs=setting.inputs, modules_to_save=setting.heads
        )
        optimizer = AdamW(lora2fx.param_groups(model, setting.rate, head_lr=setting.head_rate))
        attachment = lora2fx.attach(model, optimizer, total_steps=setting.steps)
        attachment.evaluate = lambda: evaluate(model)
        heads = _count(p for path in setting.heads for p in model.get_submodule(path).parameters())
        before = _count(p for p in model.parameters() if p.requires_grad) - heads
        return Trainee(model, optimizer, lambda step: None, lambda: _ours_outcome(model, before))


def _ours_outcome(model: nn.Module, before: int) -> dict[str, Any]:
    ranks = {site["weight"]: (site["rank"], sum(site["shape"])) for site in lora2fx.report(model).sites if site["r"]}
    if not ranks:
        return {"before": before, "after": before, "folded": 0, "ranks": {}}
    pruned = copy.deepcopy(model)
    prune_ranks(program_of(pruned, "prune"))
    return {
        "before": before,
        "after": lora2fx.report(pruned).totals["adapter_parameters"],
        "folded": sum(rank * size for rank, size in ranks.values()),
        "ranks": {weight: rank for weight, (rank, _) in ranks.items()},
    }


@dataclass(frozen=True)
class Outside:
    """PEFT's LoRA, or its AdaLoRA from `start` to `r`, with PEFT's own defaults for what isn't named.

    PEFT adds AdaLoRA's penalty to the model's `loss`, so that the model must return one; but the wrapper that
    `get_peft_model` returns calls the tuner, which adds it, only where the configuration names one of PEFT's task
    types (0.21). So it is the tuner that is trained.
    """

    name: str
    r: int
    start: int | None = None
    orth_reg_weight: float = 0.5

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """As PEFT's documentation says: get_peft_model, and update_and_allocate after every step."""
        from peft import AdaLoraConfig, LoraConfig, get_peft_model

        shared: dict[str, Any] = {"target_modules": list(setting.targets), "modules_to_save": list(setting.heads)}
        if self.start is None:
            config: Any = LoraConfig(r=self.r, lora_alpha=2 * self.r, **shared)
        else:
            steps, scale = setting.steps, {"lora_alpha": 2 * self.start}
            ends = {"tinit": steps // 10, "tfinal": 4 * steps // 10, "deltaT": 1, "total_step": steps}
            penalty = self.orth_reg_weight
            config = AdaLoraConfig(
                init_r=self.start, target_r=self.r, orth_reg_weight=penalty, **scale, **ends, **shared
            )
        adapted = get_peft_model(model, config)
        named = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        factors = [p for name, p in named if "lora_" in name]
        heads = [p for name, p in named if "lora_" not in name]
        groups = [{"params": factors, "lr": setting.rate}, {"params": heads, "lr": setting.head_rate}]
        optimizer = AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        allocate = adapted.base_model.update_and_allocate if self.start is not None else lambda step: None
        before = _count(factors)
        return Trainee(adapted.base_model, optimizer, allocate, lambda: _outside_outcome(adapted, before))


def _outside_outcome(model: nn.Module, before: int) -> dict[str, Any]:
    ranks, sizes = {}, {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None):
            B, A = (getattr(module, key)["default"] for key in ("lora_B", "lora_A"))
            gates = getattr(module, "lora_E", None)
            rank = int((gates["default"] != 0).sum()) if gates else A.out_features
            ranks[name.removeprefix("base_model.model.") + ".weight"] = rank
            out, size = (B.shape[0], A.shape[1]) if gates else (B.out_features, A.in_features)
            sizes[name] = rank * (out + size)
            del B, A
    folded = sum(sizes.values())
    return {"before": before, "after": folded, "folded": folded, "ranks": ranks}
