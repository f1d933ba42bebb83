"""A decoder with its key–value cache as named tensors: past_key_values.<layer>.key and .value in, present.* out.

The names are those that ONNX Runtime's own generators, Optimum and Transformers.js look for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies
from lora2fx.exporters.shapes import Case, Shapes, Tensors, resize
from lora2fx.synthesis import is_pretrained

PAST, PRESENT = "past_key_values.", "present."
TOTAL = "past_sequence + sequence"
TRACED = {"batch": 2, "sequence": 3, "past_sequence": 5}
LARGER = {"batch": 4, "sequence": 6, "past_sequence": 9}


class CachedDecoder(nn.Module):
    """A causal language model that takes and returns its cache as tensors (batch, heads, sequence, head size)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.lora2fx_inner = inner

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        """{"logits": (batch, sequence, vocabulary), "present.<layer>.key": ..., "present.<layer>.value": ...}"""
        past = {name: tensor for name, tensor in tensors.items() if name.startswith(PAST)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in past}
        cache = filled_cache(past)
        output = self.lora2fx_inner(**rest, past_key_values=cache, use_cache=True)
        found = {"logits": output["logits"]}
        for index, layer in enumerate(output["past_key_values"].layers):
            found |= {f"{PRESENT}{index}.key": layer.keys, f"{PRESENT}{index}.value": layer.values}
        return found


def filled_cache(past: Mapping[str, Tensor]) -> Any:
    """A transformers cache that holds these keys and values, each layer's whole sequence, whatever its window."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index in range(len(past) // 2):
        cache.update(past[f"{PAST}{index}.key"], past[f"{PAST}{index}.value"], index)
    return cache


@dataclass(frozen=True)
class CacheShape:
    """What a model's cache looks like: (heads, head size) of each layer's keys and values, in the order of inputs."""

    sizes: dict[str, tuple[int, int]]
    dtype: torch.dtype

    def empty(self, batch: int) -> Tensors:
        """A cache of past length 0."""
        return {
            name: torch.zeros(batch, heads, 0, size, dtype=self.dtype) for name, (heads, size) in self.sizes.items()
        }


def cached_copies(copies: Copies) -> tuple[Copies, CachedDecoder]:
    """The same copies, each behind named caches, and the adapted one of them.

    Raises `ExportError` for a model that has no such cache.
    """
    model: Any = copies.adapted
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if not is_pretrained(model) or "past_key_values" not in parameters or "input_ids" not in parameters:
        raise ExportError(
            f"kv_cache=True: {type(model).__name__} is no transformers decoder whose forward takes input_ids and"
            " past_key_values. Export it without."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"kv_cache=True: {type(model).__name__} is an encoder–decoder, which is exported without its caches."
        )
    shells = {id(m): CachedDecoder(m).eval() for m in (copies.adapted, copies.base, copies.merged)}
    adapted, base, merged = (shells[id(m)] for m in (copies.adapted, copies.base, copies.merged))
    return Copies(adapted, base, merged, copies.changes, copies.folded), adapted


def cached_cases(shell: CachedDecoder, given: Tensors) -> tuple[Shapes, list[Case]]:
    """The dynamic dimensions and the inputs to check with, made of the example's `input_ids` (batch, sequence).

    Each case's past is what the model itself returns for the tokens before. Raises `ExportError` where it doesn't run.
    """
    unknown = [name for name in given if name not in ("input_ids", "attention_mask", "position_ids")]
    if unknown or "input_ids" not in given:
        raise ExportError(
            f"kv_cache=True takes example_inputs of input_ids alone (masks, positions and pasts are made), and got"
            f" {', '.join(given)}."
        )
    shape = _cache_shape(shell, given["input_ids"])
    cases = [Case(name, _tensors(shell, shape, given["input_ids"], sizes)) for name, sizes in _sizes().items()]
    cases.append(Case("padded", _tensors(shell, shape, given["input_ids"], TRACED, padding=2)))
    return Shapes(_axes(cases[0].tensors), TRACED, LARGER), cases


def _sizes() -> dict[str, dict[str, int]]:
    changed = {
        "traced": {},
        "batch 1": {"batch": 1},
        "larger batch": {"batch": LARGER["batch"]},
        "sequence 1": {"sequence": 1},
        "larger sequence": {"sequence": LARGER["sequence"]},
        "past_sequence 0": {"past_sequence": 0},
        "past_sequence 0, sequence 1": {"past_sequence": 0, "sequence": 1},
        "larger past_sequence": {"past_sequence": LARGER["past_sequence"]},
    }
    return {name: TRACED | sizes for name, sizes in changed.items()}


def _axes(tensors: Tensors) -> dict[str, dict[int, str]]:
    axes = {name: {0: "batch", 1: "sequence"} for name in tensors}
    axes["attention_mask"] = {0: "batch", 1: TOTAL}
    return axes | {name: {0: "batch", 2: "past_sequence"} for name in tensors if name.startswith(PAST)}


def _cache_shape(shell: CachedDecoder, ids: Tensor) -> CacheShape:
    with torch.no_grad():
        output = shell.lora2fx_inner(input_ids=ids[:, :2], past_key_values=filled_cache({}), use_cache=True)
    layers = getattr(output["past_key_values"], "layers", ())
    sizes: dict[str, tuple[int, int]] = {}
    dtype = torch.float32
    name = type(shell.lora2fx_inner).__name__
    for index, layer in enumerate(layers):
        for kind, tensor in (("key", layer.keys), ("value", layer.values)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2] != ids[:, :2].shape[1]:
                raise ExportError(
                    f"kv_cache=True: layer {index} of {name} keeps something else than keys and"
                    " values (batch, heads, sequence, head size). Export it without."
                )
            sizes[f"{PAST}{index}.{kind}"] = (tensor.shape[1], tensor.shape[3])
            dtype = tensor.dtype
    if not sizes:
        raise ExportError(f"kv_cache=True: {name} returned no cache. Export it without.")
    return CacheShape(sizes, dtype)


def _tensors(
    shell: CachedDecoder, shape: CacheShape, example: Tensor, sizes: Mapping[str, int], padding: int = 0
) -> Tensors:
    """One call's inputs; all rows but the first begin with `padding` masked tokens."""
    before, now = sizes["past_sequence"], sizes["sequence"]
    axes = {"ids": {0: "batch", 1: "total"}}
    ids = resize({"ids": example}, axes, {"batch": sizes["batch"], "total": before + now})["ids"]
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    past = shape.empty(ids.shape[0])
    if before:
        with torch.no_grad():
            present = shell(**_call(shell, ids[:, :before], mask[:, :before]), **past)
        past = {name: present[name.replace(PAST, PRESENT, 1)].clone() for name in past}
    return _call(shell, ids[:, before:], mask) | past


def _call(shell: CachedDecoder, ids: Tensor, mask: Tensor) -> Tensors:
    """The inputs beside the cache: ids, a mask over past and present, and positions where the forward takes them."""
    tensors = {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}
    if "position_ids" in inspect.signature(shell.lora2fx_inner.forward).parameters:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        tensors["position_ids"] = positions[:, -ids.shape[1] :].contiguous()
    return tensors
