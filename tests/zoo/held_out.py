"""Architectures that the rules for roles were not tuned on: what they score here is what a new model may expect."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.architecture import QKV, Architecture, Role, fused, repeated
from tests.zoo.decoders import ATTENTION, FOURFOLD, GATED, GROUPED, HEAD, INTERLEAVED, LLAMA, SIZES
from tests.zoo.encoders import ATTENTION as BERT_ATTENTION
from tests.zoo.encoders import DENSE, SMALL
from tests.zoo.seq2seq import letters, projections
from tests.zoo.traps import TRAPS
from tests.zoo.vision import ATTENTION as VIT_ATTENTION
from tests.zoo.vision import FC, SQUARE

BERT: dict[str, Role] = {**BERT_ATTENTION, **DENSE}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(name: str, config: str, settings: dict[str, Any]) -> Any:
    """A function that builds transformers' model `name` from a `config` of these settings."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return make


def gated_t5(layer: int) -> dict[str, Role]:
    dense = f"layer.{layer}.DenseReluDense"
    return {f"{dense}.wi_0": "ffn.gate", f"{dense}.wi_1": "ffn.up", f"{dense}.wo": "ffn.down"}


T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SERIES = {"context_length": 32, "num_input_channels": 3, "d_model": 16, "num_hidden_layers": 2, "ffn_dim": 24}
POSITION = tuple(f"transformer.layer.{i}.rel_attn.r" for i in range(2))
GLOBAL = tuple(
    f"longformer.encoder.layer.{i}.attention.self.{name}_global.weight"
    for i in range(2)
    for name in ("query", "key", "value")
)

TEXT = {
    "distilbert": Architecture(
        build(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        ),
        repeated(
            "distilbert.transformer.layer.{}.",
            {f"attention.{name[0]}_lin": name for name in ("query", "key", "value")}
            | {"attention.out_lin": "output", "ffn.lin1": "ffn.up", "ffn.lin2": "ffn.down"},
        )
        | {"vocab_projector.weight": "lm_head"},
    ),
    "esm": Architecture(
        build(
            "EsmForMaskedLM",
            "EsmConfig",
            SMALL | {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
        ),
        repeated("esm.encoder.layer.{}.", BERT) | {"lm_head.decoder.weight": "lm_head"},
    ),
    "fnet": Architecture(
        build("FNetForMaskedLM", "FNetConfig", {k: v for k, v in SMALL.items() if k != "num_attention_heads"}),
        repeated("fnet.encoder.layer.{}.", dict(DENSE)) | {"cls.predictions.decoder.weight": "lm_head"},
    ),
    "longformer": Architecture(
        build("LongformerForSequenceClassification", "LongformerConfig", SMALL | {"attention_window": 8}),
        repeated("longformer.encoder.layer.{}.", BERT),
        undecided=frozenset(GLOBAL),
    ),
    "xlnet": Architecture(
        build(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        ),
        {
            f"transformer.layer.{i}.rel_attn.{name}": role
            for i in range(2)
            for name, role in {"q": "query", "k": "key", "v": "value", "o": "output"}.items()
        }
        | repeated("transformer.layer.{}.ff.", {"layer_1": "ffn.up", "layer_2": "ffn.down"}),
        undecided=frozenset(POSITION),
    ),
    "t5_gated": Architecture(
        build(
            "T5ForConditionalGeneration",
            "T5Config",
            T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
        ),
        repeated("encoder.block.{}.", letters("layer.0.SelfAttention") | gated_t5(1))
        | repeated(
            "decoder.block.{}.", letters("layer.0.SelfAttention") | letters("layer.1.EncDecAttention") | gated_t5(2)
        )
        | HEAD,
    ),
}

CAUSAL = {
    "gptj": Architecture(
        build("GPTJForCausalLM", "GPTJConfig", SIZES | SPECIAL | {"rotary_dim": 4}),
        repeated("transformer.h.{}.", projections("attn") | {"mlp.fc_in": "ffn.up", "mlp.fc_out": "ffn.down"}) | HEAD,
    ),
    "gpt_bigcode": Architecture(
        build("GPTBigCodeForCausalLM", "GPTBigCodeConfig", SIZES | SPECIAL | {"multi_query": True}),
        repeated(
            "transformer.h.{}.",
            {
                "attn.c_attn": fused(query=(0, 32), key=(32, 40), value=(40, 48)),
                "attn.c_proj": "output",
                "mlp.c_fc": "ffn.up",
                "mlp.c_proj": "ffn.down",
            },
        )
        | HEAD,
    ),
    "codegen": Architecture(
        build("CodeGenForCausalLM", "CodeGenConfig", SIZES | SPECIAL | {"n_ctx": 40, "rotary_dim": 4}),
        repeated(
            "transformer.h.{}.",
            {
                "attn.qkv_proj": {  # four groups, each query, value, key
                    role: tuple((24 * i + 8 * place, 24 * i + 8 * place + 8) for i in range(4))
                    for place, role in enumerate(("query", "value", "key"))
                },
                "attn.out_proj": "output",
                "mlp.fc_in": "ffn.up",
                "mlp.fc_out": "ffn.down",
            },
        )
        | HEAD,
    ),
    "gpt_neo": Architecture(
        build(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            SPECIAL
            | {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64}
            | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 40, "window_size": 8},
        ),
        repeated("transformer.h.{}.", projections("attn.attention") | {"mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"})
        | HEAD,
    ),
    "mpt": Architecture(
        build("MptForCausalLM", "MptConfig", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4}),
        repeated(
            "transformer.blocks.{}.",
            {"attn.Wqkv": QKV, "attn.out_proj": "output", "ffn.up_proj": "ffn.up", "ffn.down_proj": "ffn.down"},
        )
        | HEAD,
    ),
    "persimmon": Architecture(
        build("PersimmonForCausalLM", "PersimmonConfig", SMALL),
        repeated(
            "model.layers.{}.",
            {"self_attn.query_key_value": INTERLEAVED, "self_attn.dense": "output", **FOURFOLD},
        )
        | HEAD,
    ),
    "starcoder2": Architecture(
        build("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED | SPECIAL),
        repeated("model.layers.{}.", ATTENTION | {"mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"}) | HEAD,
    ),
    "olmo2": Architecture(build("Olmo2ForCausalLM", "Olmo2Config", SMALL | SPECIAL), LLAMA),
    "cohere": Architecture(build("CohereForCausalLM", "CohereConfig", GROUPED | SPECIAL), LLAMA),
    "gemma3": Architecture(
        build("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 8}), LLAMA
    ),
    "granite_moe": Architecture(
        build(
            "GraniteMoeForCausalLM",
            "GraniteMoeConfig",
            GROUPED | SPECIAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        repeated("model.layers.{}.", ATTENTION | {"block_sparse_moe.router": "router"})
        | {
            f"model.layers.{i}.block_sparse_moe.experts.{name}": role
            for i in range(2)
            for name, role in (("gate_up_proj", fused(ffn_gate=(0, 64), ffn_up=(64, 128))), ("down_proj", "ffn.down"))
        }
        | HEAD,
    ),
    "deepseek_v3": Architecture(
        build(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            SMALL | SPECIAL | LATENT | EXPERTS | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
        ),
        repeated(
            "model.layers.{}.self_attn.",
            {
                "q_b_proj": "query",
                "kv_b_proj": fused(key=(0, 8, 16, 24, 32, 40, 48, 56), value=(8, 16, 24, 32, 40, 48, 56, 64)),
                "o_proj": "output",
            },
        )
        | repeated("model.layers.{}.", GATED, count=1)
        | {
            "model.layers.1.mlp.gate.weight": "router",
            "model.layers.1.mlp.experts.gate_up_proj": fused(ffn_gate=(0, 24), ffn_up=(24, 48)),
            "model.layers.1.mlp.experts.down_proj": "ffn.down",
            "model.layers.1.mlp.shared_experts.gate_proj.weight": "ffn.gate",
            "model.layers.1.mlp.shared_experts.up_proj.weight": "ffn.up",
            "model.layers.1.mlp.shared_experts.down_proj.weight": "ffn.down",
        }
        | HEAD,
        undecided=frozenset(  # the latents that queries, keys and values are projected from
            f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ("q_a_proj", "kv_a_proj_with_mqa")
        ),
    ),
}

SENSES = {
    "beit": Architecture(
        build("BeitForImageClassification", "BeitConfig", SQUARE), repeated("beit.layers.{}.", VIT_ATTENTION | FC)
    ),
    "blip": Architecture(
        build(
            "BlipForConditionalGeneration",
            "BlipConfig",
            {"text_config": SMALL, "vision_config": SQUARE, "image_text_hidden_size": 16},
        ),
        repeated("vision_model.encoder.layers.{}.", {"self_attn.qkv": QKV, "self_attn.projection": "output", **FC})
        | repeated(
            "text_decoder.bert.encoder.layer.{}.",
            BERT | {name.replace("attention.", "crossattention.", 1): role for name, role in BERT_ATTENTION.items()},
        )
        | {"text_decoder.cls.predictions.decoder.weight": "lm_head"},
    ),
    "patchtst": Architecture(
        build("PatchTSTForPrediction", "PatchTSTConfig", SERIES | {"num_attention_heads": 4, "prediction_length": 4}),
        repeated("model.encoder.layers.{}.", projections("self_attn") | {"ff.0": "ffn.up", "ff.3": "ffn.down"}),
    ),
}

HELD_OUT: dict[str, Architecture] = TEXT | CAUSAL | SENSES | TRAPS
