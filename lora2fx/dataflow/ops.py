"""What kinds of aten calls there are: views, pointwise, moving, norms, softmax, attention, contractions."""

from __future__ import annotations

from functools import cache

import torch
from torch._ops import OpOverloadPacket

from lora2fx.dataflow.recording import ALIAS, INPUT, Op, Recording


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


_MOVING = _aten(
    "_to_copy to clone contiguous copy copy_ lift_fresh dropout native_dropout cat stack repeat repeat_interleave roll"
    " flip constant_pad_nd reflection_pad1d replication_pad1d gather take index index_select _unsafe_index"
    " masked_select index_put index_put_ _unsafe_index_put index_add index_add_ index_copy index_copy_ scatter scatter_"
    " scatter_add scatter_add_ slice_scatter select_scatter as_strided_scatter masked_scatter masked_scatter_ tril triu"
    " im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle polar complex"
)
_UNTAGGED = _aten("hardswish hardswish_ prelu _prelu_kernel log_sigmoid_forward masked_fill_ fill_ zero_")
"""Pointwise ops that torch doesn't tag as such."""
_REDUCING = _aten("mean sum amax amin max min var var_mean std linalg_vector_norm norm")
_NORMS = _aten(
    "native_layer_norm layer_norm native_group_norm native_instance_norm _fused_rms_norm rms_norm native_batch_norm"
    " _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update"
    " cudnn_batch_norm"
)
_POOLING = _aten(
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d max_pool1d"
    " max_pool2d max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d"
    " upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
)
_ADDING = _aten("add sub rsub addcmul lerp index_add")
_PRODUCTS = _aten("mul div")
_LINEAR = _ADDING | _PRODUCTS | _aten("neg clone where masked_fill copy fill zero _to_copy maximum minimum clamp_max")
_NORMING = _aten("pow square sqrt rsqrt reciprocal abs")
"""Pointwise ops that norms are written with; an activation function that has one has another op too."""
_NARROWING = _aten("slice select split split_with_sizes unbind chunk index index_select gather as_strided")
_SELECTING = _aten("topk argmax sort max")
_RANDOM = _aten("normal_ uniform_ bernoulli bernoulli_ exponential_ random_")


def stem(op: Op) -> str:
    """The op's name, in place or not."""
    return op.name.removesuffix("_")


def is_view(recording: Recording, op: Op) -> bool:
    """Whether the op only looks at its first input in another way."""
    return (
        not op.writes
        and bool(op.inputs)
        and bool(op.outputs)
        and op.name != ALIAS
        and all(recording.same_storage(op.inputs[0], output) for output in op.outputs)
    )


def is_pointwise(op: Op) -> bool:
    """Whether torch tags the op, or an overload of it, as working element by element."""
    return op.name in _UNTAGGED or (op.func is not None and _tagged(op.func.overloadpacket))


@cache
def _tagged(packet: OpOverloadPacket) -> bool:
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def is_softmax(op: Op) -> bool:
    """Whether the op makes probabilities along a dimension."""
    return "softmax" in op.name and "log_softmax" not in op.name and "backward" not in op.name


def is_attention(op: Op) -> bool:
    """Whether the op is a whole attention of its first three arguments."""
    fused = "scaled_dot_product" in op.name or op.name.endswith(("_flash_attention_forward", "_flash_attn_forward"))
    return fused and "backward" not in op.name


def is_pooling(op: Op) -> bool:
    """Whether the op makes positions of several neighbours each."""
    return op.name in _POOLING


def is_reduction(op: Op) -> bool:
    """Whether the op sums or averages dimensions away, as norms written out do too."""
    return op.name in _REDUCING


def is_adding(op: Op) -> bool:
    """Whether the op is a sum of its operands, up to factors."""
    return stem(op) in _ADDING


def is_scattering(op: Op) -> bool:
    """Whether the op adds rows to some of many, as the tokens that an expert was given."""
    return stem(op) == "aten.index_add"


def is_product(op: Op) -> bool:
    """Whether the op multiplies or divides element by element."""
    return stem(op) in _PRODUCTS


def is_narrowing(op: Op) -> bool:
    """Whether the op gives a part of its input."""
    return op.name in _NARROWING


def is_selecting(op: Op) -> bool:
    """Whether the op picks the largest entries along a dimension."""
    return op.name in _SELECTING


def is_nonlinear(op: Op) -> bool:
    """Whether the op is an activation function, or a part of one written out; products are judged by their operands."""
    if stem(op) in ("aten.clamp", "aten.clamp_min"):
        return len(op.args) > 1 and op.args[1] == 0
    return is_pointwise(op) and stem(op) not in _LINEAR | _NORMING


def is_constant(op: Op) -> bool:
    """Whether the op makes a tensor whose contents no tensor decides."""
    made = op.name.endswith("_like") or op.name.startswith("aten.new_") or op.name in _RANDOM
    return made or (not op.inputs and op.name != INPUT)


def is_transparent(recording: Recording, op: Op) -> bool:
    """Whether values go through the op without meeting each other: views, moves, pointwise, norms, poolings."""
    return (
        op.name == ALIAS
        or op.name in _MOVING
        or op.name in _REDUCING
        or op.name in _NORMS
        or op.name in _POOLING
        or is_pointwise(op)
        or is_view(recording, op)
    )
