"""One base whose low-rank factors are inputs: A (in, rank) and B (rank, out) of every site that any adapter uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies, copy_of, unloaded_copy
from lora2fx.exporters.low_rank import low_rank
from lora2fx.exporters.shapes import Axes, Tensors
from lora2fx.passes.rewrite import rewrite_owners
from lora2fx.program import Program, program_of
from lora2fx.site import Site

Array = NDArray[Any]
PROBE_RANK = 2
PROBE_SIZE = 0.5


class Swapped(Adapter):
    """An adapter of plain factors that are given at each call: ΔW = a b."""

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__(site)
        shape = site.batch_shape
        self.a = nn.Parameter(weight.new_zeros(*shape, site.in_features, PROBE_RANK))
        self.b = nn.Parameter(weight.new_zeros(*shape, PROBE_RANK, site.out_features))
        self.register_buffer("one", weight.new_ones(1), persistent=False)

    def left(self) -> Tensor:
        """(*batch, in, rank)"""
        return self.a

    def gate(self) -> Tensor:
        """(1,): the factors hold the scale."""
        one: Tensor = self.get_buffer("one")
        return one

    def right(self) -> Tensor:
        """(*batch, rank, out)"""
        return self.b

    @property
    def lambdas(self) -> Tensor:
        """(1,)"""
        return self.gate()


@dataclass(frozen=True)
class Slot:
    """An input that an adapter may give: its place in the model, shape (None: the rank), and value where none does."""

    site: str
    place: str
    shape: tuple[int | None, ...]
    default: Tensor

    @property
    def rank_dim(self) -> int | None:
        """Which dimension is the rank; None for a whole parameter of a module that was trained."""
        return self.shape.index(None) if None in self.shape else None


class Swappable(nn.Module):
    """The base model, called with factors among its named inputs."""

    def __init__(self, inner: nn.Module, slots: Mapping[str, Slot]) -> None:
        super().__init__()
        self.lora2fx_inner = inner
        self.places = {name: slot.place for name, slot in slots.items()}

    def forward(self, **tensors: Tensor) -> Any:
        """The base's outputs with the given factors; every slot must be among the inputs."""
        state = {self.places[name]: tensor for name, tensor in tensors.items() if name in self.places}
        rest = {name: tensor for name, tensor in tensors.items() if name not in self.places}
        return torch.func.functional_call(self.lora2fx_inner, state, (), rest)


def factor_name(site: Site) -> str:
    """The site's name in the inputs' names: its weight's, with the role where it is part of a fused weight."""
    return site.weight if site.columns is None else f"{site.weight}.{site.role}"


def base_of(members: Mapping[str, Copies]) -> nn.Module:
    """The base that all adapted models have; raises `ExportError` where they differ in a value."""
    found: tuple[str, nn.Module] | None = None
    for name, copies in members.items():
        if program_of(copies.adapted, "export_onnx").record.untied:
            raise ExportError(f"mode='multi': {name!r} unties weights that the base ties. Export it merged.")
        base = unloaded_copy(copies.adapted, "export_onnx").eval()
        if found is None:
            found = (name, base)
        elif (other := _difference(found[1], base)) is not None:
            raise ExportError(
                f"mode='multi': adapters {found[0]!r} and {name!r} sit on different base models ({other} differs)."
                " Adapt copies of one base, or export each merged."
            )
    assert found is not None
    return found[1]


def _difference(own: nn.Module, other: nn.Module) -> str | None:
    first, second = own.state_dict(), other.state_dict()
    if first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys())[0]
    return next((name for name in first if not torch.equal(first[name], second[name])), None)


def swappable(base: nn.Module, members: Mapping[str, Copies]) -> tuple[Swappable, dict[str, Slot]]:
    """A copy of the base with a slot for every site and every trained parameter of the members."""
    model = copy_of(base)
    slots: dict[str, Slot] = {}
    adapters: dict[str, Adapter] = {}
    plans: dict[str, str] = {}
    prefix = ""
    for copies in members.values():
        program = program_of(copies.adapted, "export_onnx")
        prefix = next(name for name, module in copies.adapted.named_modules() if module is program.root)
        for path, adapter in program.adapters.items():
            assert adapter.rewrite is not None
            if path not in adapters:
                weight = program.root.get_submodule(adapter.site.owner)._parameters[adapter.site.parameter]
                assert weight is not None
                adapters[path], plans[path] = Swapped(adapter.site, weight.detach()), adapter.rewrite
                slots |= _factor_slots(adapters[path], f"{prefix}.{path}".lstrip("."))
        slots |= _whole_slots(base, copies)
    root = model.get_submodule(prefix)
    record = program_of(next(iter(members.values())).adapted, "export_onnx").record
    rewrite_owners(Program(model, root, record, adapters), plans)
    return Swappable(model.eval(), slots).eval(), slots


def _factor_slots(adapter: Adapter, path: str) -> dict[str, Slot]:
    site, name = adapter.site, factor_name(adapter.site)
    batch = site.batch_shape
    a = Slot(name, f"{path}.a", (*batch, site.in_features, None), adapter.left().new_zeros(*batch, site.in_features, 0))
    b = Slot(
        name, f"{path}.b", (*batch, None, site.out_features), adapter.left().new_zeros(*batch, 0, site.out_features)
    )
    return {f"{name}.A": a, f"{name}.B": b}


def _whole_slots(base: nn.Module, copies: Copies) -> dict[str, Slot]:
    """Parameters and buffers that were trained beside the adapters."""
    values = copies.adapted.state_dict()
    found: dict[str, Slot] = {}
    for name, value in base.state_dict().items():
        if name in values and not torch.equal(values[name], value):
            found[name] = Slot(name, name, tuple(value.shape), value.detach().clone())
    return found


def factors_of(copies: Copies, slots: Mapping[str, Slot]) -> dict[str, Array]:
    """One member's inputs by name: factors of each site's true rank, in the weights' dtype, and what was trained whole.

    Sites of rank 0 are left out: their slot's default is rank 0.
    """
    found: dict[str, Array] = {}
    for adapter in program_of(copies.adapted, "export_onnx").adapters.values():
        a, b = _planes(adapter)
        if a.shape[-1]:
            name = factor_name(adapter.site)
            dtype = slots[f"{name}.A"].default.dtype
            found |= {f"{name}.A": _array(a.to(dtype)), f"{name}.B": _array(b.to(dtype))}
    values = copies.adapted.state_dict()
    whole = [name for name, slot in slots.items() if slot.rank_dim is None]
    return found | {name: _array(values[name]) for name in whole}


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


@torch.no_grad()
def _planes(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A (*batch, in, rank) and B (*batch, rank, out), float64; a stack of matrices keeps its adapter's own rank."""
    if adapter.site.batch_shape:
        exact = adapter.exact()
        return exact.rows(), exact.right()
    update = low_rank([adapter])
    right = update.b.mT if adapter.columns is None else update.b.mT[:, adapter.columns]
    return update.a.mT, right


def factor_axes(slots: Mapping[str, Slot]) -> Axes:
    """The ranks as dynamic dimensions, one symbol a site."""
    return {name: {slot.rank_dim: f"{slot.site}.rank"} for name, slot in slots.items() if slot.rank_dim is not None}


def probe(slots: Mapping[str, Slot], base: nn.Module) -> Tensors:
    """Random factors of half the weights' size on every site, and the defaults of what was trained whole."""
    generator = torch.Generator().manual_seed(0)
    state = base.state_dict()
    found: Tensors = {}
    for name, slot in slots.items():
        if slot.rank_dim is None:
            found[name] = slot.default.clone()
            continue
        shape = tuple(PROBE_RANK if size is None else size for size in slot.shape)
        value = torch.randn(shape, generator=generator)
        if name.endswith(".B"):
            value *= PROBE_SIZE * float(_weight(state, slot.site).float().std()) / PROBE_RANK**0.5
        found[name] = value.to(slot.default.dtype)
    return found


def _weight(state: Mapping[str, Tensor], site: str) -> Tensor:
    """The weight of a site's name, which may end with a role."""
    return next(value for name, value in state.items() if site == name or site.startswith(f"{name}."))


def names_of(slots: Mapping[str, Slot], site: str) -> Sequence[str]:
    """The inputs of one site."""
    return [name for name, slot in slots.items() if slot.site == site]


def without(tensors: Tensors, slots: Mapping[str, Slot], site: str) -> Tensors:
    """The same inputs with one site's factors at zero."""
    names = names_of(slots, site)
    return {name: torch.zeros_like(value) if name in names else value for name, value in tensors.items()}
