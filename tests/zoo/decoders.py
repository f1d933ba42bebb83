"""Language models of transformers, built from tiny configs; their inputs are synthesised."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.architecture import QKV, Architecture, Role, fused, repeated
from tests.zoo.encoders import SMALL

GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2}
SIZES = {"vocab_size": 99, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
HEAD: dict[str, Role] = {"lm_head.weight": "lm_head"}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True))


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    small = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32))


def falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True)
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4))


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**GROUPED, **experts, shared_expert_intermediate_size=40))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8))


ATTENTION: dict[str, Role] = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
}
GATED: dict[str, Role] = {"mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down"}
FOURFOLD: dict[str, Role] = {"mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"}
INTERLEAVED = fused(
    query=(0, 8, 24, 32, 48, 56, 72, 80), key=(8, 16, 32, 40, 56, 64, 80, 88), value=(16, 24, 40, 48, 64, 72, 88, 96)
)
LLAMA = repeated("model.layers.{}.", ATTENTION | GATED) | HEAD


def experts(width: int) -> dict[str, Role]:
    """Stacks of experts: raw 3-D parameters (expert, out, in), gate and up fused."""
    stacks: dict[str, Role] = {
        "gate_up_proj": fused(ffn_gate=(0, width), ffn_up=(width, 2 * width)),
        "down_proj": "ffn.down",
    }
    return {f"model.layers.{i}.mlp.experts.{name}": role for i in range(2) for name, role in stacks.items()}


ROUTED = repeated("model.layers.{}.", ATTENTION | {"mlp.gate": "router"}) | HEAD

DECODERS = {
    "gpt2": Architecture(
        gpt2,
        repeated(
            "transformer.h.{}.",
            {"attn.c_attn": QKV, "attn.c_proj": "output", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"},
        )
        | HEAD,
    ),
    "llama": Architecture(llama, LLAMA),
    "qwen3": Architecture(qwen3, LLAMA),
    "gemma": Architecture(gemma, LLAMA),
    "phi3": Architecture(
        phi3,
        repeated(
            "model.layers.{}.",
            {
                "self_attn.qkv_proj": fused(query=(0, 32), key=(32, 48), value=(48, 64)),
                "self_attn.o_proj": "output",
                "mlp.gate_up_proj": fused(ffn_gate=(0, 64), ffn_up=(64, 128)),
                "mlp.down_proj": "ffn.down",
            },
        )
        | HEAD,
    ),
    "gpt_neox": Architecture(
        gpt_neox,
        repeated(
            "gpt_neox.layers.{}.",
            {"attention.query_key_value": INTERLEAVED, "attention.dense": "output", **FOURFOLD},
        )
        | HEAD,
    ),
    "bloom": Architecture(
        bloom,
        repeated(
            "transformer.h.{}.",
            {"self_attention.query_key_value": INTERLEAVED, "self_attention.dense": "output", **FOURFOLD},
        )
        | HEAD,
    ),
    "opt": Architecture(
        opt,
        repeated(
            "model.decoder.layers.{}.",
            {f"self_attn.{name[0]}_proj": name for name in ("query", "key", "value")}
            | {"self_attn.out_proj": "output", "fc1": "ffn.up", "fc2": "ffn.down"},
        )
        | HEAD,
    ),
    "falcon": Architecture(
        falcon,
        repeated(
            "transformer.h.{}.",
            {
                "self_attention.query_key_value": fused(query=(0, 32), key=(32, 40), value=(40, 48)),
                "self_attention.dense": "output",
                **FOURFOLD,
            },
        )
        | HEAD,
    ),
    "mixtral": Architecture(mixtral, ROUTED | experts(64)),
    "qwen_moe": Architecture(
        qwen_moe,
        ROUTED
        | experts(24)
        | repeated(
            "model.layers.{}.mlp.shared_expert.",
            {"gate_proj": "ffn.gate", "up_proj": "ffn.up", "down_proj": "ffn.down"},
        ),
        undecided=frozenset(f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(2)),
    ),
    "mamba": Architecture(mamba, HEAD),
}
