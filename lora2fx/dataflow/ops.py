"""What kinds of aten calls there are: views, pointwise, moving, norms, softmax, attention, contractions."""

from __future__ import annotations

import torch

from lora2fx.dataflow.recording import ALIAS, INPUT, Op, Recording

_MOVING = frozenset(
    f"aten.{name}"
    for name in (
        *("_to_copy", "to", "clone", "contiguous", "copy", "copy_", "lift_fresh", "dropout", "native_dropout"),
        *("cat", "stack", "repeat", "roll", "flip", "constant_pad_nd", "reflection_pad1d", "replication_pad1d"),
        *("gather", "index", "index_select", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "take"),
        *("index_add", "index_add_", "index_copy", "index_copy_", "scatter", "scatter_", "scatter_add", "scatter_add_"),
        *("slice_scatter", "select_scatter", "as_strided_scatter", "masked_fill_", "masked_scatter", "fill_", "zero_"),
        *(
            "masked_scatter_",
            "masked_select",
            "tril",
            "triu",
            "hardswish",
            "prelu",
            "_prelu_kernel",
            "im2col",
            "col2im",
        ),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat_interleave"),
    )
)
_REDUCING = frozenset(
    f"aten.{name}" for name in ("mean", "sum", "amax", "amin", "var", "var_mean", "std", "linalg_vector_norm", "norm")
)
_NORMS = frozenset(
    f"aten.{name}"
    for name in (
        *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *(
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "cudnn_batch_norm",
        ),
        *("_fused_rms_norm", "rms_norm", "layer_norm", "native_instance_norm"),
    )
)
_POOLING = frozenset(
    f"aten.{name}{dims}"
    for name in ("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "max_pool", "upsample_nearest")
    for dims in ("1d", "2d", "3d")
) | frozenset({"aten.max_pool2d_with_indices", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d"})
_ADDING = frozenset(f"aten.{name}" for name in ("add", "sub", "rsub", "addcmul", "lerp", "index_add"))
_LINEAR = _ADDING | frozenset(
    f"aten.{name}" for name in ("neg", "clone", "where", "masked_fill", "copy", "fill", "_to_copy", "conj", "maximum")
)
_PRODUCTS = frozenset({"aten.mul", "aten.div"})
_NARROWING = frozenset(f"aten.{name}" for name in ("slice", "select", "split", "split_with_sizes", "unbind", "chunk"))
_SELECTING = frozenset(f"aten.{name}" for name in ("topk", "argmax", "sort", "max"))


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
    """Whether torch tags the op as working element by element."""
    return op.func is not None and torch.Tag.pointwise in op.func.tags


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


def is_product(op: Op) -> bool:
    """Whether the op multiplies or divides element by element."""
    return stem(op) in _PRODUCTS


def is_narrowing(op: Op) -> bool:
    """Whether the op gives a part of its input."""
    return op.name in _NARROWING or op.name in ("aten.index", "aten.index_select", "aten.gather", "aten.as_strided")


def is_selecting(op: Op) -> bool:
    """Whether the op picks the largest entries along a dimension."""
    return op.name in _SELECTING


def is_nonlinear(op: Op) -> bool:
    """Whether the op is an activation function, or a part of one written out; products are judged by their operands."""
    if op.name in ("aten.hardswish", "aten.prelu", "aten._prelu_kernel"):
        return True
    if stem(op) in ("aten.clamp", "aten.clamp_min"):
        return len(op.args) > 1 and op.args[1] == 0
    bounds = ("aten.clamp_max", "aten.minimum")
    return is_pointwise(op) and stem(op) not in _LINEAR | _PRODUCTS and stem(op) not in bounds


def is_constant(op: Op) -> bool:
    """Whether the op makes a tensor whose contents no tensor decides."""
    made = op.name.endswith("_like") or op.name.startswith("aten.new_")
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
