"""Vision models of transformers, built from tiny configs; their inputs are synthesised."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.architecture import Architecture, Role, repeated
from tests.zoo.encoders import SMALL
from tests.zoo.seq2seq import projections

SQUARE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SQUARE, num_labels=5))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
    )


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    )


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    square = {name: value for name, value in SQUARE.items() if name != "intermediate_size"}
    return Dinov2ForImageClassification(Dinov2Config(**square, mlp_ratio=2))


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=12,
            image_size=32,
        )
    )


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    special = {"pad_token_id": 1, "bos_token_id": 97, "eos_token_id": 98}
    return CLIPModel(CLIPConfig(text_config=SMALL | special, vision_config=SQUARE, projection_dim=16))


ATTENTION: dict[str, Role] = {
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.o_proj": "output",
}
FC: dict[str, Role] = {"mlp.fc1": "ffn.up", "mlp.fc2": "ffn.down"}
CLIP = projections("self_attn") | FC

VISION = {
    "vit": Architecture(vit, repeated("vit.layers.{}.", ATTENTION | FC)),
    "swin": Architecture(
        swin,
        repeated("swin.encoder.layers.0.blocks.{}.", ATTENTION | FC)
        | repeated("swin.encoder.layers.1.blocks.{}.", ATTENTION | FC, count=1),
    ),
    "convnext": Architecture(
        convnext,
        repeated("convnext.encoder.stages.{}.layers.0.", {"pwconv1": "ffn.up", "pwconv2": "ffn.down"}),
    ),
    "dinov2": Architecture(dinov2, repeated("dinov2.encoder.layer.{}.", ATTENTION | FC)),
    "segformer": Architecture(
        segformer,
        repeated("segformer.stages.{}.blocks.0.", ATTENTION),
        undecided=frozenset(  # a depthwise convolution stands between the two
            f"segformer.stages.{i}.blocks.0.mlp.{name}.weight" for i in range(2) for name in ("fc1", "fc2")
        ),
    ),
    "clip": Architecture(
        clip,
        repeated("text_model.encoder.layers.{}.", CLIP) | repeated("vision_model.encoder.layers.{}.", CLIP),
    ),
}
