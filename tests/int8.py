"""A weight-only int8 tensor, as quantisation libraries make them: it multiplies and looks up, and does nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


class Int8(Tensor):
    """Rows of int8 with a scale each; poses as a float tensor of the scale's dtype."""

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return self.rows.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self):
        return ["rows", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["rows"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear and isinstance(args[1], Int8):
            product = args[0] @ args[1].rows.to(args[0].dtype).t() * args[1].scale.view(-1)
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if func is F.embedding and isinstance(args[1], Int8):
            return F.embedding(args[0], args[1].rows).to(args[1].scale.dtype) * args[1].scale[args[0]]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _SAME:
            return cls(args[0].rows.clone(), args[0].scale.clone())
        if func is _aten._to_copy.default:
            return cls(args[0].rows, args[0].scale.to(**kwargs))
        if func is _aten.copy_.default:
            args[0].rows.copy_(args[1].rows), args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(f"{func} is not for quantised weights")


def quantise(model: nn.Module) -> nn.Module:
    """Every linear and embedding weight of `model` as `Int8`, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(Int8.of(module.weight), requires_grad=False)
    return model


def dequantise(model: nn.Module) -> nn.Module:
    """The same numbers as plain tensors."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(module.weight.dequantised())
    return model
