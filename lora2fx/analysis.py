"""What a model's weights do: recorded from one real forward, or read off each owner's graph where none can run."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

from torch import nn

from lora2fx.dataflow.recording import Recording
from lora2fx.dataflow.sharing import Groups
from lora2fx.errors import InputsError, Lora2fxError
from lora2fx.inputs import ExampleInputs, Inputs, as_inputs, synthesise
from lora2fx.passes.recurrent import recurrent_sites
from lora2fx.passes.state import OUT_OF_MEMORY
from lora2fx.passes.static import static_sites
from lora2fx.record import record
from lora2fx.roles import find_sites
from lora2fx.site import Site
from lora2fx.synthesis import is_pretrained


@dataclass(frozen=True)
class ModelAnalysis:
    """Every site of a model, every other weight with the reason, and the inputs that showed it (None: none could).

    `shared` are weights that the recorded forward multiplies with one activation.
    """

    sites: tuple[Site, ...]
    rest: dict[str, str]
    inputs: Inputs | None = None
    outside_reads: frozenset[str] = frozenset()
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared: Groups = ()


def tied_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that two different modules hold, by each of its names, the other names."""
    holders: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders[id(parameter)][id(module), name] = f"{path}.{name}".lstrip(".")
    shared = [tuple(names.values()) for names in holders.values() if len(names) > 1]
    return {name: tuple(other for other in names if other != name) for names in shared for name in names}


def _inputs(model: nn.Module, example_inputs: ExampleInputs | None, roles_needed: bool) -> Inputs | None:
    if example_inputs is not None:
        return as_inputs(model, example_inputs)
    if roles_needed:
        return synthesise(model)
    with suppress(InputsError):
        return synthesise(model) if is_pretrained(model) else None
    return None


def _recorded(model: nn.Module, inputs: Inputs, made_up: bool) -> Recording:
    try:
        return record(model, inputs)
    except (Lora2fxError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        if not made_up:
            raise
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.kwargs.items())
        raise InputsError(
            f"{type(model).__name__}'s forward raised {type(error).__name__} on inputs made from its config ({shapes}):"
            f" {error}. Pass example_inputs= that it takes, a dict of its keyword arguments."
        ) from error


def analyse(model: nn.Module, example_inputs: ExampleInputs | None, roles_needed: bool) -> ModelAnalysis:
    """Record one forward and assign roles; without inputs for a plain module, the sites by name alone.

    Raises `InputsError` where roles are needed and nothing says how to call the model.
    """
    inputs = _inputs(model, example_inputs, roles_needed)
    if inputs is None:
        sites, rest = static_sites(model)
        return ModelAnalysis(sites, rest, ties=tied_weights(model))
    recording = _recorded(model, inputs, made_up=example_inputs is None)
    found = find_sites(model, recording)
    rest = {name: _rescaled(model, name) or reason for name, reason in found.rest.items()}
    reached = _reached(recording)
    recurrent = recurrent_sites(model, [weight for weight in rest if weight in reached])
    for site in recurrent:
        del rest[site.weight]
    sites = (*found.sites, *recurrent)
    if not sites:
        raise InputsError(
            f"{type(model).__name__}'s forward ran on the example inputs, but no weight of two or more dimensions met"
            " an activation in it. Pass example_inputs that take the path you train."
        )
    return ModelAnalysis(sites, rest, inputs, recording.outside_reads, tied_weights(model), found.shared)


def _rescaled(model: nn.Module, weight: str) -> str | None:
    owner = model.get_submodule(weight.rpartition(".")[0])
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and owner.max_norm is not None:
        return "its forward rescales the weight itself (max_norm), ΔW with it: set max_norm=None"
    return None


def _reached(recording: Recording) -> set[str]:
    """The weights that any call of the recorded forward reads."""
    read = {value for op in recording.ops for value in op.inputs}
    return {name for value, name in recording.parameters.items() if value in read}
