"""What a model computes in each of its modes, and how far two such results are apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.dataflow.preserve import set_training
from lora2fx.inputs import Inputs, flatten_outputs
from lora2fx.passes.state import OUT_OF_MEMORY, preserved, same_values, seed_all

SEED = 20240813
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Mode:
    """One way to run a model."""

    name: str
    grad: bool
    train: bool


MODES = (Mode("eval", False, False), Mode("eval with gradients", True, False), Mode("train", True, True))
EVAL, EVAL_GRAD, TRAIN = MODES


@contextmanager
def running(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The model in a mode, generators seeded, adapters deterministic; all as before afterwards.

    torch's fused encoder path depends on which weights require gradients, which adapting changes; with gradients it
    is off.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with preserved(model, but=Adapter) as modules, torch.set_grad_enabled(mode.grad):
        try:
            torch.backends.mha.set_fastpath_enabled(fused and not mode.grad)
            set_training(model, mode.train, modules)
            for module in modules:
                if isinstance(module, Adapter) and module.training:
                    module.eval()
            seed_all(SEED)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def call(model: nn.Module, inputs: Inputs) -> Outputs:
    """The tensors that the model returns for a fresh copy of the inputs."""
    return tuple(flatten_outputs(copy.deepcopy(inputs).call(model)))


def observe(model: nn.Module, inputs: Inputs, mode: Mode) -> Outputs:
    """Detached copies of what the model returns in a mode."""
    with running(model, mode):
        return tuple(output.detach().clone() for output in call(model, inputs))


@dataclass(frozen=True)
class Reference:
    """What the base model returns, by mode; `skipped` says why a mode has none."""

    outputs: dict[str, Outputs] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeats:
    """How the base model repeats itself: `unstable` are the modes in which it does not.

    `frozen` holds what it returns with no parameter requiring gradients, as in an adapted model: torch chooses
    some kernels by that (attention with a trainable bias), and they round differently.
    """

    frozen: dict[str, Outputs] = field(default_factory=dict)
    unstable: frozenset[str] = frozenset()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def reference_outputs(model: nn.Module, inputs: Inputs) -> Reference:
    """What the model, not yet adapted, returns in eval, in eval with gradients and in train.

    The model is as before afterwards. An error in eval is raised; a model that can't run in train mode on these
    inputs (labels missing, a batch too small for BatchNorm) is not compared there, and the verification says so.
    """
    outputs: dict[str, Outputs] = {}
    skipped: dict[str, str] = {}
    for mode in MODES:
        try:
            outputs[mode.name] = observe(model, inputs, mode)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if not mode.train:
                raise
            skipped[mode.name] = f"the base model raises {type(error).__name__}: {error}"
    return Reference(outputs, skipped)


def repeated_outputs(model: nn.Module, inputs: Inputs, reference: Reference) -> Repeats:
    """Run the base model, or a copy of it, twice more in each mode that it can run in: as it is, and frozen."""
    frozen: dict[str, Outputs] = {}
    unstable = set()
    for mode in (mode for mode in MODES if mode.name in reference.outputs):
        if not identical(observe(model, inputs, mode), reference.outputs[mode.name]):
            unstable.add(mode.name)
        with _frozen(model):
            frozen[mode.name] = observe(model, inputs, mode)
    return Repeats(frozen, frozenset(unstable))


def identical(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two results agree in every value (NaN with NaN, 0 with -0)."""
    return len(a) == len(b) and all(same_values(x, y) for x, y in zip(a, b, strict=True))


def _as_float64(value: Tensor) -> Tensor:
    return (torch.view_as_real(value) if value.is_complex() else value).detach().double()


def scale(expected: Tensor) -> float:
    """The largest finite magnitude, 0 where there is none."""
    values = _as_float64(expected)
    return float(values[values.isfinite()].abs().max()) if values.isfinite().any() else 0.0


def _relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    a, b = _as_float64(found), _as_float64(expected)
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    worst = float(gap.max()) if gap.numel() else 0.0
    if worst != worst:
        return float("inf")
    return worst / scale(expected) if worst and scale(expected) else worst


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|found - expected| / max|expected|, the worst floating-point output; inf where they don't line up."""
    if len(found) != len(expected):
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.is_floating_point() or b.is_complex()]
    return max((_relative(a, b) for a, b in pairs), default=0.0)
