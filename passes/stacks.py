"""Reading a matrix, or a stack of them, with W + ΔW without making it: products go by W and by ΔW's factors.

A stack of experts is read in three ways. A loop takes one expert's matrix and multiplies with it; a grouped product
multiplies each expert's tokens with its matrix, all in one call; a batched one all experts' tokens with the stack. A
`LazyWeight` stands for W + ΔW, for one matrix of it and for its transpose, and gives what these products would: x W
and (x left) right. Anything else makes W + ΔW, of what it was asked of, once, under the modes of the read, and goes on
with it. What is computed of the factors for one read serves all reads within one call of the module's forward.

It is only made op by op on plain tensors: under torch.compile, torch.export, tracing, torch.func, a forward-mode
derivative or a function or dispatch mode the read gives W + ΔW itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lora2fx.adapter import Adapter
from lora2fx.passes.updates import Update
from lora2fx.training.grouped import Multiply

_METADATA = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    }
)
"""What is answered as it is, without values."""


@dataclass(frozen=True)
class _Modes:
    """The modes that decide what an addition gives; entered again where it is made later than the read."""

    grad: bool
    inference: bool
    autocast: bool
    dtype: torch.dtype
    device: str

    @classmethod
    def now(cls, device: str) -> Self:
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype, device)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        autocast = torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


def _is_eager() -> bool:
    """Whether operations run one by one on the tensors themselves, with nothing between that looks at them."""
    return not (
        torch.compiler.is_compiling()
        or fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


_BATCH: dict[int, tuple[int, ...]] = {2: (), 3: (0,)}
"""By a weight's dimensions those that say which matrix."""


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def can_be_lazy(weight: Tensor, adapters: Sequence[Adapter]) -> bool:
    """Whether weight and factors are plain tensors on one device, the weight a matrix or a stack of them."""
    if weight.dim() not in (2, 3) or any(adapter.site.layout.batch != _BATCH[weight.dim()] for adapter in adapters):
        return False
    factors = [factor for adapter in adapters for factor in adapter._parameters.values() if factor is not None]
    plain = all(map(_is_plain, (weight, *factors)))
    return plain and not weight.is_meta and all(adapter.padding is None for adapter in adapters)


def merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW, in the weight's dtype."""
    total = weight
    for adapter in adapters:
        total = total + adapter.weight_delta().type_as(weight)
    return total


def read_merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW for a read of the weight; a `LazyWeight`, where that can't be told from it.

    Of one matrix only where it needs a gradient: without one, torch's attention has a fast path for plain tensors.
    """
    if not _is_eager() or not can_be_lazy(weight, adapters):
        return merged(weight, adapters)
    if weight.dim() == 2 and not (torch.is_grad_enabled() and _trains(weight, adapters)):
        return merged(weight, adapters)
    modes, reads = _Modes.now(weight.device.type), _READS.get()
    if reads is None:
        return LazyWeight.of(_Stack(weight, tuple(adapters)), modes)
    known, versions = reads.get((id(weight), modes)), _all_versions(adapters)
    if known is None or known.versions != versions or known.lazy._total is not None:
        lazy = cast(LazyWeight, LazyWeight.of(_Stack(weight, tuple(adapters)), modes))
        known = reads[id(weight), modes] = _Known(lazy, versions)
    return known.lazy


def _trains(weight: Tensor, adapters: Sequence[Adapter]) -> bool:
    factors = [factor for adapter in adapters for factor in adapter._parameters.values()]
    return weight.requires_grad or any(factor is not None and factor.requires_grad for factor in factors)


def _all_versions(adapters: Sequence[Adapter]) -> list[int]:
    state = [own for adapter in adapters for own in (adapter._parameters, adapter._buffers)]
    return [tensor._version for own in state for tensor in own.values() if tensor is not None]


class _Known(NamedTuple):
    """What a read gave, and the versions of what it is made of."""

    lazy: LazyWeight
    versions: list[int]


_READS: ContextVar[dict[tuple[int, _Modes], _Known] | None] = ContextVar("reads", default=None)
"""What the forward that is running has read, by the weight's identity."""


def reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward, in which reads of one stack are one read, as long as nothing needs W + ΔW itself."""

    @functools.wraps(forward)
    def shared(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_eager():
            return forward(self, *args, **kwargs)
        token = _READS.set({})
        try:
            return forward(self, *args, **kwargs)
        finally:
            _READS.reset(token)

    return shared


class _Read(Protocol):
    """What a `LazyWeight` stands for; an `Update` is one."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def inputs(self) -> tuple[Tensor, ...]: ...
    def whole(self) -> Tensor: ...
    def transposed(self) -> Update: ...
    def matrix(self, index: int | Tensor) -> Update: ...
    def rows(self, sizes: Sequence[int]) -> tuple[Update, ...]: ...
    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def grouped_product(self, x: Tensor, offs: Tensor, multiply: Multiply) -> Tensor: ...


@dataclass(frozen=True)
class _Stack:
    """Reads of a whole weight, whose factors are computed where a product asks for them, once."""

    weight: Tensor
    adapters: tuple[Adapter, ...]

    @property
    def name(self) -> str:
        return self.adapters[0].site.weight

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        factors = (factor for adapter in self.adapters for factor in adapter._parameters.values())
        return (self.weight, *(factor for factor in factors if factor is not None))

    @functools.cached_property
    def _update(self) -> Update:
        return Update.of(self.weight, self.adapters)

    def whole(self) -> Tensor:
        return merged(self.weight, self.adapters)

    def transposed(self) -> Update:
        return self._update.transposed()

    def matrix(self, index: int | Tensor) -> Update:
        return self._update.matrix(index)

    def rows(self, sizes: Sequence[int]) -> tuple[Update, ...]:
        return self._update.rows(sizes)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._update.product(x, bias)

    def grouped_product(self, x: Tensor, offs: Tensor, multiply: Multiply) -> Tensor:
        return self._update.grouped_product(x, offs, multiply)


class LazyWeight(Tensor):
    """W + ΔW of a matrix or a stack of them, without values of its own: see the module."""

    _read: _Read
    _modes: _Modes
    _total: Tensor | None

    @classmethod
    def of(cls, read: _Read, modes: _Modes) -> Tensor:
        """What stands for a read made under these modes, for autograd a function of what the read is made of."""
        if modes.grad and any(tensor.requires_grad for tensor in read.inputs):
            lazy: Tensor = _Differentiable.apply(read, modes, *read.inputs)  # type: ignore[no-untyped-call]
            return lazy
        return cls.without_gradient(read, modes)

    @classmethod
    def without_gradient(cls, read: _Read, modes: _Modes) -> LazyWeight:
        """The same for autograd a constant: one NaN in the weight's shape, for what takes the memory as it is."""
        weight = read.weight
        nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        lazy: LazyWeight = Tensor._make_subclass(cls, nothing)
        lazy._read, lazy._modes, lazy._total = read, modes, None
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA and args[0]._total is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _KEPT and (kept := _KEPT[func](*args, **kwargs)) is not None:
            return kept
        args, kwargs = pytree.tree_map_only(LazyWeight, LazyWeight._whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What didn't come by `__torch_function__`, a custom autograd Function's: the values alone, for autograd
        knows the weight as `_Differentiable`'s output."""
        args, kwargs = pytree.tree_map_only(LazyWeight, LazyWeight._values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _open(self) -> _Read | None:
        """What it stands for; None where W + ΔW was made already, or is due, the modes not being the read's."""
        open_ = self._total is None and _is_eager() and _Modes.now(self._modes.device) == self._modes
        return self._read if open_ else None

    def _whole(self) -> Tensor:
        if self._total is None:
            same = _Modes.now(self._modes.device) == self._modes
            with contextlib.nullcontext() if same else self._modes.entered():
                self._total = self._read.whole()
        return self._total

    def _values(self) -> Tensor:
        return self._read.whole().detach() if self._total is None else self._total.detach()


class _Differentiable(torch.autograd.Function):
    """A `LazyWeight` as a function of what it is made of, for what reads it without `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, read: _Read, modes: _Modes, *tensors: Tensor) -> Tensor:
        # Not saved for the backward: a hook that moves what is saved elsewhere would move the whole frozen stack.
        ctx.read, ctx.modes, ctx.tensors, ctx.versions = read, modes, tensors, _versions(tensors)
        return LazyWeight.without_gradient(read, modes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if _versions(ctx.tensors) != ctx.versions:
            raise RuntimeError(
                f"{ctx.read.name} or a factor of its adapter was changed in place between a read and the read's"
                " gradient: take the optimizer's step after the backward."
            )
        needed = ctx.needs_input_grad[2:]
        wanted = [tensor for tensor, needs in zip(ctx.tensors, needed, strict=True) if needs]
        with ctx.modes.entered():
            total = ctx.read.whole()
        found = iter(torch.autograd.grad(total, wanted, grad, allow_unused=True))
        return (None, None, *(next(found) if needs else None for needs in needed))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor.requires_grad]


# What keeps W and ΔW apart: each takes what torch's function of that name takes, and gives None where W + ΔW is due.


def _matrix(self: Any, index: Any) -> Tensor | None:
    read = self._open() if isinstance(self, LazyWeight) and self.dim() == 3 else None
    number = type(index) is int or (
        type(index) is Tensor
        and index.dim() == 0
        and not index.is_floating_point()
        and index.dtype not in (torch.bool, torch.uint8)
    )
    return LazyWeight.of(read.matrix(index), self._modes) if read is not None and number else None


def _transposed(input: Any) -> Tensor | None:
    read = input._open()
    return None if read is None else LazyWeight.of(read.transposed(), input._modes)


def _transposed_matrix(input: Any) -> Tensor | None:
    return _transposed(input) if input.dim() == 2 else None


def _swapped(input: Any, dim0: Any, dim1: Any) -> Tensor | None:
    last = {input.dim() - 1, input.dim() - 2}
    integers = type(dim0) is int and type(dim1) is int
    return _transposed(input) if integers and {dim0 % input.dim(), dim1 % input.dim()} == last else None


def _split(self: Any, split_size: Any, dim: Any = 0) -> tuple[Tensor, ...] | None:
    length = self.shape[0]
    sizes = split_size if isinstance(split_size, list | tuple) else _equal(length, split_size)
    read: _Read | None = self._open() if self.dim() == 2 and dim == 0 and sum(sizes) == length else None
    return None if read is None else tuple(LazyWeight.of(part, self._modes) for part in read.rows(sizes))


def _chunked(input: Any, chunks: Any, dim: Any = 0) -> tuple[Tensor, ...] | None:
    return _split(input, -(-input.shape[0] // chunks), dim) if type(chunks) is int and chunks > 0 else None


def _equal(length: int, size: Any) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)] if type(size) is int and size > 0 else []


def _attention(*args: Any, **kwargs: Any) -> Any:
    """torch's attention, which asks its tensors first whether one of them knows better, without asking."""
    real, tensors = F.multi_head_attention_forward, (*args, *kwargs.values())
    known = all(_is_plain(t) or isinstance(t, LazyWeight) for t in tensors if isinstance(t, Tensor))
    if not known or _ASKS not in real.__code__.co_names:
        return None
    unasked = FunctionType(real.__code__, vars(F) | {_ASKS: lambda tensors: False}, real.__name__, real.__defaults__)
    unasked.__kwdefaults__ = real.__kwdefaults__
    return unasked(*args, **kwargs)


def _multiplied(input: Any, other: Any = None, *rest: Any, **options: Any) -> Tensor | None:
    plain = isinstance(other, LazyWeight) and _is_plain(input) and not rest and not options
    read: _Read | None = other._open() if plain else None
    if read is None or input.dim() < 1 or input.shape[-1] != other.shape[-2]:
        return None
    if other.dim() == 3 and (input.dim() != 3 or input.shape[0] != other.shape[0]):
        return None
    return read.product(input)


def _multiplied_alike(input: Any, mat2: Any = None, *rest: Any, **options: Any) -> Tensor | None:
    alike = isinstance(mat2, LazyWeight) and _is_plain(input) and input.dim() == mat2.dim()
    return _multiplied(input, mat2, *rest, **options) if alike else None


def _multiplied_from_right(self: Any, other: Any) -> Tensor | None:
    return _multiplied(other, self)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not isinstance(weight, LazyWeight) or weight.dim() != 2 or not _is_plain(input) or isinstance(bias, LazyWeight):
        return None
    read: _Read | None = weight._open() if input.dim() > 0 and input.shape[-1] == weight.shape[-1] else None
    return None if read is None else read.transposed().product(input, bias)


def _grouped(mat_a: Any, mat_b: Any = None, offs: Any = None, **options: Any) -> Tensor | None:
    pair = isinstance(mat_b, LazyWeight) and mat_b.dim() == 3 and _is_plain(mat_a) and mat_a.dim() == 2
    plain = pair and _is_plain(offs) and mat_a.dtype == mat_b.dtype and not any(v is not None for v in options.values())
    read: _Read | None = mat_b._open() if plain else None
    return None if read is None else read.grouped_product(mat_a, offs, torch._grouped_mm)


_ASKS = "has_torch_function"
_KEPT: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _attention,
    Tensor.split: _split,
    Tensor.chunk: _chunked,
    Tensor.__getitem__: _matrix,
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.T.__get__, Tensor.t, torch.t), _transposed_matrix),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.transpose, torch.transpose), _swapped),
    **dict.fromkeys((Tensor.matmul, torch.matmul, Tensor.__matmul__), _multiplied),
    Tensor.__rmatmul__: _multiplied_from_right,
    **dict.fromkeys((Tensor.mm, torch.mm), _multiplied_alike),
    **dict.fromkeys((Tensor.bmm, torch.bmm), _multiplied_alike),
    F.linear: _linear,
    torch._grouped_mm: _grouped,
}
