"""Example inputs for a transformers model, from its config and its forward's signature alone.

What is filled depends on the names of the inputs and on the config's settings, never on the architecture's name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.errors import InputsError

BATCH = 2
LENGTHS = (11, 13, 17, 19, 23)
DECODER_LENGTHS = (9, 10, 12, 14, 15)
RGB = 3
FREE_IMAGE_SIZE = 64
MODALITIES = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "video": ("pixel_values", "pixel_values_videos"),
    "audio": ("input_values", "input_features"),
    "time": ("past_values",),
}


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers model; imports nothing."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _configs(config: Any) -> Iterator[Any]:
    """The config, then the configs nested in it, outer ones first."""
    level = [config]
    while level:
        yield from level
        level = [value for outer in level for value in vars(outer).values() if hasattr(value, "model_type")]


@dataclass(frozen=True)
class _Source:
    """Draws inputs that fit one config: batch 2, sequences of 8 to 23 that equal no setting of the config."""

    config: Any
    generator: torch.Generator

    def get(self, *names: str) -> Any:
        """The first setting of these names that is there, in the config or nested in it; None otherwise."""
        found = (getattr(config, name, None) for config in _configs(self.config) for name in names)
        return next((value for value in found if value is not None), None)

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise LookupError(f"its config has no {' or '.join(names)}")
        return value

    def text(self, decoder: bool) -> _Source:
        """The same for the part of the config that describes the text encoder or decoder."""
        return _Source(self.config.get_text_config(**{"decoder" if decoder else "encoder": True}), self.generator)

    def length(self, choices: tuple[int, ...]) -> int:
        taken = {value for config in _configs(self.config) for value in vars(config).values() if type(value) is int}
        wanted = next((length for length in choices if length not in taken), choices[0])
        limit: int | None = self.get("max_position_embeddings", "max_target_positions")
        if limit is None or limit <= 0:
            return wanted
        pad: int = self.get("pad_token_id") or 0
        room = limit - pad - 1 if 0 <= pad < limit - 1 else limit  # some number their positions from pad + 1
        return min(wanted, room)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


def _special_ids(config: Any) -> set[int]:
    """Every id that the config names: padding, begin, end, image placeholders, ..."""
    special: set[int] = set()
    for part in _configs(config):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                special.update(value if isinstance(value, (list, tuple)) else (value,))
    return special


def _tokens(source: _Source, length: int, special: set[int]) -> Tensor:
    vocabulary = source.need("vocab_size")
    plain = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    return plain[source.integers(len(plain), BATCH, length)]


def _input_ids(source: _Source) -> Tensor:
    text = source.text(decoder=False)
    ids = _tokens(text, text.length(LENGTHS), _special_ids(source.config))
    end = text.get("eos_token_id")
    if source.get("is_encoder_decoder") and isinstance(end, int):
        ids[:, -1] = end  # sequence classification heads of encoder–decoders pool at the end token
    return ids


def _decoder_input_ids(source: _Source) -> Tensor:
    text = source.text(decoder=True)
    return _tokens(text, text.length(DECODER_LENGTHS), _special_ids(source.config))


def _attention_mask(source: _Source) -> Tensor:
    return torch.ones(BATCH, source.text(decoder=False).length(LENGTHS), dtype=torch.int64)


def _pixel_values(source: _Source) -> Tensor:
    """(batch, channels, height, width), with frames after the batch where the config has a number of frames."""
    size = source.get("image_size") or FREE_IMAGE_SIZE  # a model without one is convolutional and takes any
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = source.get("num_channels", "in_channels", "in_chans") or RGB
    frames = source.get("num_frames")
    return source.normal(BATCH, *((frames,) if frames else ()), channels, height, width)


def _input_values(source: _Source) -> Tensor:
    """Sound: (batch, samples) for a model with strided convolutions, else (batch, frames, mel bins)."""
    strides = source.get("conv_stride")
    if strides is None:
        return source.normal(BATCH, source.need("max_length"), source.need("num_mel_bins"))
    return source.normal(BATCH, prod(strides) * LENGTHS[0] + sum(source.need("conv_kernel")))


def _input_features(source: _Source) -> Tensor:
    """(batch, mel bins, 2 · source positions), or (batch, frames, features) where the config counts features."""
    features = source.get("input_feat_per_channel", "feature_projection_input_dim")
    if features is not None:
        return source.normal(BATCH, 4 * LENGTHS[0], features)
    return source.normal(BATCH, source.need("num_mel_bins"), 2 * source.need("max_source_positions"))


def _bbox(source: _Source) -> Tensor:
    """(batch, sequence, 4) boxes x0, y0, x1, y1 with x0 ≤ x1 and y0 ≤ y1."""
    length = source.text(decoder=False).length(LENGTHS)
    corners = source.integers(source.need("max_2d_position_embeddings"), BATCH, length, 2, 2)
    return corners.sort(dim=2).values.flatten(2)


def _past_values(source: _Source) -> Tensor:
    return source.normal(BATCH, source.need("context_length"), source.need("num_input_channels"))


DRAW: Mapping[str, Callable[[_Source], Tensor]] = {
    "input_ids": _input_ids,
    "attention_mask": _attention_mask,
    "decoder_input_ids": _decoder_input_ids,
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values,
    "input_values": _input_values,
    "input_features": _input_features,
    "bbox": _bbox,
    "past_values": _past_values,
}


def _wanted(model: Any, parameters: Mapping[str, inspect.Parameter], source: _Source) -> list[str]:
    """The inputs to fill, in the signature's order: the main one, one a modality, and those without a default."""
    wanted = {model.main_input_name}
    modalities = getattr(model, "input_modalities", ())
    for modality in (modalities,) if isinstance(modalities, str) else modalities:
        if source.get(f"{modality}_token_id", f"{modality}_token_index") is None:  # else: text may hold placeholders
            wanted.update(MODALITIES.get(modality, ()))
    if "input_ids" in wanted and "input_ids" in parameters:
        wanted.add("attention_mask")
    if getattr(model.config, "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {name for name, entry in parameters.items() if entry.default is entry.empty and entry.kind not in variadic}
    return [name for name in parameters if name in wanted | needed]


def synthesise_inputs(model: Any) -> dict[str, Tensor]:
    """Keyword arguments of a transformers model's forward, on its device, floating ones in its dtype.

    The same for the same config; the global generators stay as they are. Raises `InputsError` where an input
    can't be told from the config.
    """
    source = _Source(model.config, torch.Generator().manual_seed(0))
    drawn: dict[str, Tensor] = {}
    for name in _wanted(model, inspect.signature(model.forward).parameters, source):
        try:
            if name not in DRAW:
                raise LookupError(f"no rule for {name!r}")
            value = DRAW[name](source)
        except LookupError as error:
            raise InputsError(
                f"{type(model).__name__}.forward needs {name!r}, which can't be made up: {error.args[0]}."
                f" Pass example_inputs={{{name!r}: tensor, ...}}, a dict of the forward's keyword arguments."
            ) from error
        dtype = model.dtype if value.is_floating_point() else value.dtype
        drawn[name] = value.to(model.device, dtype)
    if "input_ids" in drawn and "decoder_input_ids" in drawn and not model.can_generate():
        drawn["decoder_input_ids"] = drawn["input_ids"].clone()  # heads that pool find the end token at its place
    return drawn
