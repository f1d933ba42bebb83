"""Reading a stack of matrices with W + ΔW without making all of it: each expert's matrix when it is asked for.

An expert loop reads the whole stack once per expert and takes one matrix of it. `LazyStack` stands for W + ΔW: an int
or a 0-d integer tensor along its first dimension gives W[i] + ΔW[i], made of that expert's factors alone; anything else
makes the whole W + ΔW, once, under the modes of the read, and goes on with it.

It is only made op by op on plain tensors: under torch.compile, torch.export, tracing, torch.func, a forward-mode
derivative or a function or dispatch mode the read gives W + ΔW itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lora2fx.adapter import Adapter

_METADATA = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    }
)
"""What the stack answers as it is, without values."""


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


def is_plain_stack(weight: Tensor, adapters: Sequence[Adapter]) -> bool:
    """Whether weight and factors are plain tensors on one device, and the weight a stack along its first dimension."""
    if weight.dim() < 3 or not all(adapter.site.layout.batch == (0,) for adapter in adapters):
        return False
    factors = [factor for adapter in adapters for factor in adapter._parameters.values() if factor is not None]
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (weight, *factors))
    return plain and not weight.is_meta and all(adapter.padding is None for adapter in adapters)


def merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW, in the weight's dtype."""
    total = weight
    for adapter in adapters:
        total = total + adapter.weight_delta().type_as(weight)
    return total


def read_merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW for a read of the weight; of a stack a `LazyStack`, where that can't be told from it."""
    if not _is_eager() or not is_plain_stack(weight, adapters):
        return merged(weight, adapters)
    factors = [factor for adapter in adapters for factor in adapter.parameters()]
    read = _Read(weight, tuple(adapters), _Modes.now(weight.device.type))
    if not read.modes.grad or not any(tensor.requires_grad for tensor in (weight, *factors)):
        return LazyStack.of(read)
    lazy: Tensor = _Differentiable.apply(read, weight, *factors)  # type: ignore[no-untyped-call]
    return lazy


@dataclass(frozen=True)
class _Read:
    """One read of one weight."""

    weight: Tensor
    adapters: tuple[Adapter, ...]
    modes: _Modes

    def whole(self) -> Tensor:
        if _Modes.now(self.modes.device) == self.modes:
            return merged(self.weight, self.adapters)
        with self.modes.entered():
            return merged(self.weight, self.adapters)

    def expert(self, index: int | Tensor) -> Tensor:
        """W[i] + ΔW[i]; one addmm where nothing is cast and the matrix is a transposed or plain product."""
        total = self.weight[index]
        for adapter in self.adapters:
            rows, right = adapter.factors_of(index)
            free, contracted = adapter.site.layout.free, adapter.site.layout.contracted
            same = rows.dtype == right.dtype == total.dtype and not self.modes.autocast
            if not same or total.dim() != 2 or adapter.columns is not None:
                total = total + adapter.expert_delta(rows, right).type_as(total)
            elif contracted < free:
                total = torch.addmm(total, rows, right)
            else:
                total = torch.addmm(total, right.mT, rows.mT)
        return total


class LazyStack(Tensor):
    """W + ΔW of a stack of matrices, without values of its own: see the module."""

    _read: _Read
    _total: Tensor | None

    @classmethod
    def of(cls, read: _Read) -> LazyStack:
        """What stands for the weight of this read: one NaN in its shape, for what takes the memory as it is."""
        weight = read.weight
        nothing = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        lazy: LazyStack = Tensor._make_subclass(cls, nothing)
        lazy._read, lazy._total = read, None
        return lazy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA and args[0]._total is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[0], LazyStack) and args[0]._has_expert(args[1]):
            return args[0]._read.expert(args[1])
        args, kwargs = pytree.tree_map_only(LazyStack, LazyStack._whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What didn't come by `__torch_function__`, a custom autograd Function's: the values alone, for autograd
        knows the stack as `_Differentiable`'s output."""
        args, kwargs = pytree.tree_map_only(LazyStack, LazyStack._values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _has_expert(self, index: Any) -> bool:
        read = self._read
        if self._total is not None or not _is_eager() or _Modes.now(read.modes.device) != read.modes:
            return False
        if type(index) is int:
            return True
        whole = type(index) is Tensor and index.dim() == 0 and not index.is_floating_point()
        return whole and index.dtype not in (torch.bool, torch.uint8)

    def _whole(self) -> Tensor:
        if self._total is None:
            self._total = self._read.whole()
        return self._total

    def _values(self) -> Tensor:
        return merged(self._read.weight, self._read.adapters).detach() if self._total is None else self._total.detach()


class _Differentiable(torch.autograd.Function):
    """A `LazyStack` as a function of the weight and the factors, for what reads it without `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, read: _Read, *tensors: Tensor) -> Tensor:
        # Not saved for the backward: a hook that moves what is saved elsewhere would move the whole frozen stack.
        ctx.read, ctx.tensors, ctx.versions = read, tensors, _versions(tensors)
        return LazyStack.of(read)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if _versions(ctx.tensors) != ctx.versions:
            raise RuntimeError(
                f"{ctx.read.adapters[0].site.weight} or a factor of its adapter was changed in place between a read and"
                " the read's gradient: take the optimizer's step after the backward."
            )
        needed = ctx.needs_input_grad[1:]
        wanted = [tensor for tensor, needs in zip(ctx.tensors, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(ctx.read.whole(), wanted, grad, allow_unused=True))
        return (None, *(next(found) if needs else None for needs in needed))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor.requires_grad]
