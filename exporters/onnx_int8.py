"""Dynamic int8 of a proven float32 file, by ONNX Runtime's own quantiser: each MatMul's constant weight in 8 bits.

Activations are quantised as they come. What was proven of the weights stays proven: an 8-bit weight is within half a
step of the merged one, every other constant is the same.

Weights use 7 of their 8 bits. A processor without VNNI adds two products of 8 bits in 16, before it widens them, and
cuts off what is beyond: 2 · 255 · 127 is, 2 · 255 · 64 is not. So a file computes alike wherever it runs, and what was
proven here holds there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora2fx.errors import ExportError
from lora2fx.exporters.onnx_proof import Lowering, Run, largest_difference
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.shapes import Tensors

Array = NDArray[Any]
QUANTISED, SCALE, ZERO = "_quantized", "_scale", "_zero_point"
STEP = 0.5 + 1e-4
"""Rounding to the nearest of the integers is off by half a step at most; the quotient itself is rounded in float32."""


def quantise(model: Any, folder: Path, name: str, external: bool) -> Any:
    """The graph (onnxscript IR) quantised, through files in `folder`. Raises `ExportError` where that fails."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript import ir

    source, target = folder / f"{name}.float.onnx", folder / f"{name}.int8.onnx"
    ir.save(model, source, external_data=f"{source.name}.data" if external else None)
    plain = onnx.load(str(source), load_external_data=False)
    del plain.graph.value_info[:]  # the quantiser contradicts sizes that it finds there
    onnx.save(plain, str(source))
    try:
        with _quiet():
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,
                use_external_data_format=external,
            )
    except Exception as error:  # the quantiser raises many types
        raise ExportError(f"int8=True: ONNX Runtime can't quantise the graph: {first_line(error)}") from error
    return ir.load(target)


def check_int8(exact: Any, quantised: Any) -> dict[str, int]:
    """Hold the constants of a quantised graph against those of the graph that it was made of (both onnxscript IR).

    Returns how many weights are in 8 bits and how many constants stayed. Raises `ExportError` for a weight that is off
    by more than half a step, and for any other constant that changed.
    """
    before = {name: value.const_value.numpy() for name, value in exact.graph.initializers.items()}
    after = {name: value.const_value.numpy() for name, value in quantised.graph.initializers.items()}
    weights = [name.removesuffix(QUANTISED) for name in after if name.endswith(QUANTISED)]
    if not weights:
        raise ExportError("int8=True: the graph holds no MatMul with a constant weight, so that nothing is quantised.")
    own = {f"{name}{suffix}" for name in weights for suffix in (QUANTISED, SCALE, ZERO)}
    for name in weights:
        _check_weight(name, _sources(name, before), after)
    for name in after.keys() - own:
        if not any(np.array_equal(after[name], source, equal_nan=True) for source in _sources(name, before)):
            raise ExportError(f"int8=True: the quantiser changed {name}, which it leaves in float32.")
    return {"int8": len(weights), "unchanged": len(after.keys() - own)}


def _sources(name: str, before: dict[str, Array]) -> list[Array]:
    """The constant of that name, as it was and turned round, as the quantiser turns the weights of Gemm."""
    if name not in before:
        raise ExportError(f"int8=True: the quantiser added the constant {name}, which the float32 graph doesn't have.")
    return [before[name], before[name].T]


def _check_weight(name: str, sources: Sequence[Array], after: dict[str, Array]) -> None:
    quantised, scale, zero = (after[f"{name}{suffix}"].astype(np.float64) for suffix in (QUANTISED, SCALE, ZERO))
    found = (quantised - zero) * scale
    excess = min(
        float((np.abs(found - source.astype(np.float64)) - STEP * scale).max(initial=-np.inf))
        for source in sources
        if source.shape == found.shape
    )
    if not excess <= 0:
        raise ExportError(f"int8=True: {name} in 8 bits is off by {excess:.3g} more than half a step.")


def int8_lowering(run: Run, base: Callable[[Tensors], Sequence[Array]]) -> Lowering:
    """How far 8 bits alone move the base model: its own quantised file (`run`) against the model."""

    def measure(tensors: Tensors) -> list[float]:
        return [largest_difference(own, other) for own, other in zip(run(tensors), base(tensors), strict=True)]

    return measure


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs advice to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
