"""A tensor that stands for W + ΔW without values: products go by W and by ΔW's factors, all else makes W + ΔW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lora2fx.passes.update import Update

_METADATA = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    }
)
"""What is answered as it is, without values."""


Keeping = Callable[..., Any]
KEPT: dict[Any, Keeping] = {}
"""By torch's function what keeps W and ΔW apart: taking what that takes, and giving None where W + ΔW is due."""


def keeps(*functions: Any) -> Callable[[Keeping], Keeping]:
    """Register what keeps W and ΔW apart in these functions of torch."""

    def register(keeping: Keeping) -> Keeping:
        KEPT.update(dict.fromkeys(functions, keeping))
        return keeping

    return register


@dataclass(frozen=True)
class Modes:
    """The modes that decide what an addition gives; entered again where it is made later than the read."""

    grad: bool
    inference: bool
    autocast: bool
    dtype: torch.dtype
    device: str

    @classmethod
    def now(cls, device: str) -> Self:
        """Those that are on."""
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, dtype, device)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """These modes, whatever those are that are on."""
        autocast = torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


def is_eager() -> bool:
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


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of torch's own kind."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


class Read(Protocol):
    """What a `LazyWeight` stands for: an `Update`, or what makes one where it is asked for."""

    @property
    def name(self) -> str:
        """The weight's."""

    @property
    def weight(self) -> Tensor:
        """W as it is."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What W + ΔW is made of, and its gradient goes to."""

    @property
    def update(self) -> Update:
        """W and ΔW's factors."""

    def whole(self) -> Tensor:
        """W + ΔW"""


class LazyWeight(Tensor):
    """W + ΔW of a matrix or a stack of them, without values of its own."""

    _read: Read
    _modes: Modes
    _total: Tensor | None

    @classmethod
    def of(cls, read: Read, modes: Modes) -> Tensor:
        """What stands for a read made under these modes, for autograd a function of what the read is made of."""
        if modes.grad and any(tensor.requires_grad for tensor in read.inputs):
            lazy: Tensor = _Differentiable.apply(read, modes, *read.inputs)  # type: ignore[no-untyped-call]
            return lazy
        return cls.without_gradient(read, modes)

    @classmethod
    def without_gradient(cls, read: Read, modes: Modes) -> LazyWeight:
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
        if func in KEPT and (kept := KEPT[func](*args, **kwargs)) is not None:
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

    def apart(self) -> Update | None:
        """W and ΔW; None where W + ΔW was made already, or is due, the modes not being the read's."""
        open_ = self._total is None and is_eager() and Modes.now(self._modes.device) == self._modes
        return self._read.update if open_ else None

    def part(self, update: Update) -> Tensor:
        """A view of it, which stands for what `update` says, read when it was."""
        return LazyWeight.of(update, self._modes)

    def is_open(self) -> bool:
        """Whether W + ΔW was not made yet."""
        return self._total is None

    def _whole(self) -> Tensor:
        if self._total is None:
            same = Modes.now(self._modes.device) == self._modes
            with contextlib.nullcontext() if same else self._modes.entered():
                self._total = self._read.whole()
        return self._total

    def _values(self) -> Tensor:
        return self._read.whole().detach() if self._total is None else self._total.detach()


class _Differentiable(torch.autograd.Function):
    """A `LazyWeight` as a function of what it is made of, for what reads it without `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, read: Read, modes: Modes, *tensors: Tensor) -> Tensor:
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
