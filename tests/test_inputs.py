"""Inputs: read as given, checked against the signature, or made for a transformers model; outputs flattened."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora2fx.errors import InputsError
from lora2fx.inputs import Inputs, as_inputs, flatten_outputs, synthesise
from tests.zoo import ZOO

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": 99}
IMAGE = SMALL | {"image_size": 16, "patch_size": 4}
BOTH = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 99}


def make(name: str, config: str, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def speech_to_text() -> Any:
    sound = {"input_feat_per_channel": 12, "conv_channels": 16, "max_source_positions": 64}
    return make("Speech2TextForConditionalGeneration", "Speech2TextConfig", **BOTH, **HEADS, **sound)


def blip() -> Any:
    parts = {"text_config": TEXT, "vision_config": IMAGE}
    return make("BlipForConditionalGeneration", "BlipConfig", **parts, image_text_hidden_size=16)


def llava() -> Any:
    parts = {
        "text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 2},
        "vision_config": IMAGE | {"model_type": "clip_vision_model"},
    }
    return make("LlavaForConditionalGeneration", "LlavaConfig", **parts, image_token_index=98)


def caption() -> Any:
    """An encoder of images and a decoder of text, each with a config of its own."""
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**IMAGE), decoder
    )
    return transformers.VisionEncoderDecoderModel(config).eval()


MODELS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "one token a row is the end": (
        lambda: make("BartForSequenceClassification", "BartConfig", **BOTH, **HEADS),
        {"input_ids": (2, 11), "attention_mask": (2, 11), "decoder_input_ids": (2, 11)},
    ),
    "T5 with a head": (
        lambda: make("T5ForSequenceClassification", "T5Config", **T5),
        {"input_ids": (2, 11), "attention_mask": (2, 11), "decoder_input_ids": (2, 11)},
    ),
    "the encoder alone": (
        lambda: make("T5EncoderModel", "T5Config", **T5),
        {"input_ids": (2, 11), "attention_mask": (2, 11)},
    ),
    "few positions": (
        lambda: make("RobertaModel", "RobertaConfig", **TEXT, max_position_embeddings=12),
        {"input_ids": (2, 10), "attention_mask": (2, 10)},
    ),
    "a length that is a setting": (
        lambda: make("BertModel", "BertConfig", **TEXT | {"num_hidden_layers": 1, "type_vocab_size": 11}),
        {"input_ids": (2, 13), "attention_mask": (2, 13)},
    ),
    "padding in the config": (
        lambda: make("GPT2ForSequenceClassification", "GPT2Config", vocab_size=99, n_embd=32, n_layer=1, n_head=4,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2),
        {"input_ids": (2, 11), "attention_mask": (2, 11)},
    ),
    "spectrograms": (
        lambda: make("ASTModel", "ASTConfig", **SMALL, max_length=48, num_mel_bins=32),
        {"input_values": (2, 48, 32)},
    ),
    "frames": (
        lambda: make("VideoMAEModel", "VideoMAEConfig", **IMAGE | {"patch_size": 8}, num_frames=4),
        {"pixel_values": (2, 4, 3, 16, 16)},
    ),
    "any size of image": (
        lambda: make("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]),
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "a time series": (
        lambda: make("PatchTSTModel", "PatchTSTConfig", context_length=32, num_input_channels=3, d_model=16,
                     num_attention_heads=4, num_hidden_layers=1, ffn_dim=24),
        {"past_values": (2, 32, 3)},
    ),
    "image and text": (
        lambda: make("ViltModel", "ViltConfig", **TEXT, image_size=32, patch_size=8),
        {"input_ids": (2, 11), "attention_mask": (2, 11), "pixel_values": (2, 3, 32, 32)},
    ),
    "features of sound": (speech_to_text, {"input_features": (2, 44, 12), "decoder_input_ids": (2, 9)}),
    "two towers": (blip, {"pixel_values": (2, 3, 16, 16), "input_ids": (2, 11), "attention_mask": (2, 11)}),
    "placeholders for images": (llava, {"input_ids": (2, 11), "attention_mask": (2, 11)}),
    "two configs": (caption, {"pixel_values": (2, 3, 16, 16), "decoder_input_ids": (2, 9)}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_synthesised_inputs_have_these_shapes_and_run(case: str) -> None:
    build, shapes = MODELS[case]
    model = build()
    inputs = synthesise(model)
    assert inputs.args == ()
    assert {name: tuple(value.shape) for name, value in inputs.kwargs.items()} == shapes
    with torch.no_grad():
        assert flatten_outputs(inputs.call(model))


TRANSFORMERS = [name for name, architecture in ZOO.items() if architecture.inputs is None]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_synthesised_inputs_suit_the_analysis(name: str) -> None:
    """Batch at least 2, sequence at least 8 and unlike the batch, ids in the vocabulary, none special but an end."""
    model = ZOO[name].build()
    kwargs = synthesise(model).kwargs
    special = {getattr(model.config, f"{kind}_token_id", None) for kind in ("pad", "bos")}
    for key, value in kwargs.items():
        assert value.shape[0] >= 2
        assert value.shape[-1] >= 8
        if key.endswith("input_ids"):
            assert not special & set(value.flatten().tolist())
            assert 0 <= int(value.min()) <= int(value.max()) < 99
            assert len(value.unique()) > 4
    if {"input_ids", "decoder_input_ids"} <= kwargs.keys():
        assert kwargs["input_ids"].shape[1] != kwargs["decoder_input_ids"].shape[1]


def test_synthesis_repeats_and_leaves_the_generator_alone() -> None:
    model = ZOO["clip"].build()
    before = torch.get_rng_state()
    first, second = synthesise(model).kwargs, synthesise(model).kwargs
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_floating_inputs_take_the_models_dtype_and_all_its_device() -> None:
    kwargs = synthesise(ZOO["clip"].build().to("meta", torch.bfloat16)).kwargs
    assert kwargs["pixel_values"].dtype is torch.bfloat16
    assert kwargs["input_ids"].dtype is torch.int64
    assert {value.device.type for value in kwargs.values()} == {"meta"}


def test_nothing_is_run() -> None:
    model = ZOO["bert"].build()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    synthesise(model)
    as_inputs(model, {"input_ids": torch.ones(2, 8, dtype=torch.int64)})


def test_an_input_without_a_rule_is_named() -> None:
    model = make("PerceiverModel", "PerceiverConfig", num_latents=4, d_latents=16, d_model=8, num_blocks=1,
                 num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2)  # fmt: skip
    with pytest.raises(InputsError, match=r"PerceiverModel.forward needs 'inputs'.* Pass example_inputs=\{'inputs': t"):
        synthesise(model)


def test_a_setting_that_is_missing_is_named() -> None:
    model = ZOO["bert"].build()
    object.__setattr__(model.config, "vocab_size", None)  # past the config's own validation
    with pytest.raises(InputsError, match="needs 'input_ids', which can't be made up: its config has no vocab_size"):
        synthesise(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder", r"Encoder is no transformers model.* forward\(ids.*example_inputs=\{\"ids\": tensor, \"padding\""),
        (
            "vit_plain",
            r"a dict of keyword arguments or a tuple of positional ones: example_inputs=\{\"images\": tensor",
        ),
    ],
)
def test_a_plain_module_says_how_to_pass_its_inputs(name: str, message: str) -> None:
    with pytest.raises(InputsError, match=message):
        as_inputs(ZOO[name].build(), None)


class Positional(nn.Module):
    def forward(self, x: Tensor, /, *rest: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
        return sum(rest, x) * scale


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (X, Inputs((X,))),
        ((X,), Inputs((X,))),
        ((X, X), Inputs((X, X))),
        (Inputs((X,), {"scale": 2.0}), Inputs((X,), {"scale": 2.0})),
    ],
)
def test_given_inputs_are_taken_as_they_are(given: Any, expected: Inputs) -> None:
    found = as_inputs(Positional(), given)
    assert len(found.args) == len(expected.args)
    assert all(a is b for a, b in zip(found.args, expected.args, strict=True))
    assert dict(found.kwargs) == dict(expected.kwargs)
    assert torch.equal(found.call(Positional()), sum(expected.args[1:], X) * expected.kwargs.get("scale", 1.0))


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict])
def test_a_mapping_holds_keyword_arguments(mapping: Any) -> None:
    """A tokenizer's BatchEncoding is a UserDict."""
    found = as_inputs(ZOO["encoder"].build(), mapping(ids=X.long()))
    assert found.args == ()
    assert list(found.kwargs) == ["ids"]


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("encoder", {"id": X}, r"don't fit Encoder.forward\(ids.*missing a required argument: 'ids'. Given: 'id'\."),
        ("encoder", (X, X, X), r"too many positional arguments. Given: 3 positional\."),
        ("encoder", {"ids": X, "extra": X}, "unexpected keyword argument 'extra'"),
        ("encoder", {}, "missing a required argument: 'ids'. Given: nothing"),
        ("encoder", [X], r"example_inputs is a list. Pass a dict .* example_inputs=\(the_list,\)"),
        ("encoder", {0: X}, "example_inputs is a dict. Pass a dict of the forward's keyword arguments"),
        ("encoder", "ids", "example_inputs is a str"),
        ("bert", {"inputs_ids": X}, "name 'inputs_ids', which .* would take into .* Did you mean 'input_ids'"),
    ],
)
def test_inputs_that_dont_fit_are_an_error(model: str, given: Any, message: str) -> None:
    with pytest.raises(InputsError, match=message):
        as_inputs(ZOO[model].build(), given)


def test_an_option_of_kwargs_is_no_misspelling() -> None:
    given = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "output_attentions": True}
    assert as_inputs(ZOO["bert"].build(), given).kwargs["output_attentions"] is True


@dataclass
class Pair:
    second: Tensor
    first: Any


def test_outputs_flatten_in_the_order_of_their_containers() -> None:
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    assert flatten_outputs(a) == [a]
    nested = {"x": [a, (b, None, 3, "text")], "y": Pair(c, {"z": d})}
    assert [t.item() for t in flatten_outputs(nested)] == [0.0, 1.0, 2.0, 3.0]
    assert flatten_outputs(None) == []
    assert flatten_outputs(nn.Linear(2, 2)) == []


def test_a_cycle_ends_and_a_repeat_is_kept() -> None:
    cycle: list[Any] = [X]
    cycle.append(cycle)
    assert len(flatten_outputs(cycle)) == 1
    assert len(flatten_outputs([X, X])) == 2
    shared = [X]
    assert len(flatten_outputs([shared, shared])) == 2


def test_a_distribution_gives_its_parameters() -> None:
    found = flatten_outputs(torch.distributions.Normal(X, X + 1))
    assert any(torch.equal(tensor, X) for tensor in found)
    assert any(torch.equal(tensor, X + 1) for tensor in found)


def test_key_value_caches_are_part_of_the_output() -> None:
    model = ZOO["llama"].build()
    with torch.no_grad():
        output = synthesise(model).call(model)
    flat = flatten_outputs(output)
    assert flat[0] is output.logits
    assert [tuple(t.shape) for t in flat[1:]] == [(2, 2, 11, 8)] * 4
    model = ZOO["t5"].build()
    with torch.no_grad():
        flat = flatten_outputs(synthesise(model).call(model))
    assert len(flat) == 1 + 2 * (2 + 2) + 1
