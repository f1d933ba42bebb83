"""Encoder–decoders and speech models of transformers, built from tiny configs; their inputs are synthesised."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.architecture import Architecture, Role, repeated
from tests.zoo.encoders import SMALL

BOTH: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**BOTH, max_position_embeddings=40))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(
        WhisperConfig(**BOTH, **special, num_mel_bins=8, max_source_positions=15, max_target_positions=40)
    )


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    small = {name: value for name, value in SMALL.items() if name != "max_position_embeddings"}
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            **small,
            conv_dim=(16, 16),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )


def projections(prefix: str) -> dict[str, Role]:
    return {
        f"{prefix}.q_proj": "query",
        f"{prefix}.k_proj": "key",
        f"{prefix}.v_proj": "value",
        f"{prefix}.out_proj": "output",
    }


def letters(prefix: str) -> dict[str, Role]:
    return {f"{prefix}.q": "query", f"{prefix}.k": "key", f"{prefix}.v": "value", f"{prefix}.o": "output"}


def relu_dense(layer: int) -> dict[str, Role]:
    return {f"layer.{layer}.DenseReluDense.wi": "ffn.up", f"layer.{layer}.DenseReluDense.wo": "ffn.down"}


FC: dict[str, Role] = {"fc1": "ffn.up", "fc2": "ffn.down"}
BART = repeated("model.encoder.layers.{}.", projections("self_attn") | FC) | repeated(
    "model.decoder.layers.{}.", projections("self_attn") | projections("encoder_attn") | FC
)

SEQ2SEQ = {
    "t5": Architecture(
        t5,
        repeated("encoder.block.{}.", letters("layer.0.SelfAttention") | relu_dense(1))
        | repeated(
            "decoder.block.{}.", letters("layer.0.SelfAttention") | letters("layer.1.EncDecAttention") | relu_dense(2)
        )
        | {"lm_head.weight": "lm_head"},
    ),
    "bart": Architecture(bart, BART | {"lm_head.weight": "lm_head"}),
    "whisper": Architecture(whisper, BART | {"proj_out.weight": "lm_head"}),
    "wav2vec2": Architecture(
        wav2vec2,
        repeated(
            "wav2vec2.encoder.layers.{}.",
            projections("attention")
            | {"feed_forward.intermediate_dense": "ffn.up", "feed_forward.output_dense": "ffn.down"},
        ),
        undecided=frozenset({"lm_head.weight"}),
    ),
}
