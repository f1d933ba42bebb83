"""More held-out architectures: experts in modules of their own, convolutions that project, odd orders, recurrences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import QKV, Architecture, Role, fused, normal, repeated
from tests.zoo.decoders import ATTENTION, GATED, GROUPED, HEAD, LLAMA, ROUTED, SIZES
from tests.zoo.encoders import ATTENTION as BERT_ATTENTION
from tests.zoo.encoders import DENSE, SMALL
from tests.zoo.held_out import SPECIAL, T5, build
from tests.zoo.seq2seq import BART, BOTH, letters, projections
from tests.zoo.vision import SQUARE

BERT: dict[str, Role] = {**BERT_ATTENTION, **DENSE}
SOUND: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "max_position_embeddings"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
WI: dict[str, Role] = {"wi": "ffn.up", "wo": "ffn.down"}
FEEDS: dict[str, Role] = {
    f"{name}.{part}_dense": f"ffn.{role}"
    for name in ("ffn1", "ffn2")
    for part, role in (("intermediate", "up"), ("output", "down"))
}
INTERLEAVED_GATE = fused(
    ffn_gate=tuple(edge for i in range(0, 128, 2) for edge in (i, i + 1)),
    ffn_up=tuple(edge for i in range(1, 128, 2) for edge in (i, i + 1)),
)


def stacks(prefix: str, gate_up: Role) -> dict[str, Role]:
    """Stacks of experts of two layers."""
    return {
        f"{prefix.format(i)}{name}": role
        for i in range(2)
        for name, role in (("gate_up_proj", gate_up), ("down_proj", "ffn.down"))
    }


HALVES = fused(ffn_gate=(0, 64), ffn_up=(64, 128))
SWITCH = (
    repeated("encoder.block.{}.", letters("layer.0.SelfAttention"))
    | repeated("decoder.block.{}.", letters("layer.0.SelfAttention") | letters("layer.1.EncDecAttention"))
    | {f"encoder.block.0.layer.1.mlp.{name}.weight": role for name, role in WI.items()}
    | {f"decoder.block.0.layer.2.mlp.{name}.weight": role for name, role in WI.items()}
    | {
        f"{stack}.block.1.layer.{layer}.mlp.{name}.weight": role
        for stack, layer in (("encoder", 1), ("decoder", 2))
        for name, role in (
            ("router.classifier", "router"),
            *((f"experts.expert_{e}.{part}", role) for e in range(4) for part, role in WI.items()),
        )
    }
    | HEAD
)

LANGUAGE = {
    "switch": Architecture(
        build(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            T5
            | {"num_decoder_layers": 2, "num_experts": 4, "expert_capacity": 16, "decoder_start_token_id": 0}
            | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ),
        {name: role for name, role in SWITCH.items() if "expert_3" not in name},
        undecided=frozenset(name for name in SWITCH if "expert_3" in name),  # no token of the inputs goes to one
    ),
    "gpt_oss": Architecture(
        build(
            "GptOssForCausalLM",
            "GptOssConfig",
            GROUPED | SPECIAL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        repeated("model.layers.{}.", ATTENTION | {"mlp.router": "router"})
        | stacks("model.layers.{}.mlp.experts.", INTERLEAVED_GATE)
        | HEAD,
    ),
    "llama4": Architecture(
        build(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            GROUPED
            | SPECIAL
            | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 16},
        ),
        repeated(
            "model.layers.{}.",
            ATTENTION
            | {"feed_forward.router": "router"}
            | {name.replace("mlp.", "feed_forward.shared_expert."): role for name, role in GATED.items()},
        )
        | stacks("model.layers.{}.feed_forward.experts.", HALVES)
        | HEAD,
    ),
    "olmoe": Architecture(
        build("OlmoeForCausalLM", "OlmoeConfig", GROUPED | SPECIAL | MOE),
        ROUTED | stacks("model.layers.{}.mlp.experts.", HALVES),
    ),
    "gemma2": Architecture(
        build("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 8}), LLAMA
    ),
    "glm": Architecture(
        build("GlmForCausalLM", "GlmConfig", GROUPED | SPECIAL | {"head_dim": 8}),
        repeated("model.layers.{}.", ATTENTION | {"mlp.gate_up_proj": HALVES, "mlp.down_proj": "ffn.down"}) | HEAD,
    ),
    "recurrent_gemma": Architecture(
        build(
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            GROUPED | SPECIAL | {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
        ),
        {f"model.layers.2.temporal_block.{n[10:]}.weight": role for n, role in ATTENTION.items()}
        | repeated("model.layers.{}.", {n.replace("mlp.", "mlp_block."): r for n, r in GATED.items()}, count=3)
        | HEAD,
    ),
    "rwkv": Architecture(
        build(
            "RwkvForCausalLM",
            "RwkvConfig",
            {"vocab_size": 99, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
            | {"intermediate_size": 64, "context_length": 32},
        ),
        {"head.weight": "lm_head"},
        undecided=frozenset(f"rwkv.blocks.{i}.feed_forward.{n}.weight" for i in range(2) for n in ("key", "value")),
    ),
    "openai_gpt": Architecture(
        build("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", SIZES),
        repeated(
            "transformer.h.{}.",
            {"attn.c_attn": QKV, "attn.c_proj": "output", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"},
        )
        | HEAD,
    ),
    "pegasus": Architecture(
        build("PegasusForConditionalGeneration", "PegasusConfig", BOTH | {"max_position_embeddings": 40}), BART | HEAD
    ),
    "mpnet": Architecture(
        build("MPNetForMaskedLM", "MPNetConfig", SMALL | {"pad_token_id": 1}),
        repeated("mpnet.encoder.layer.{}.", letters("attention.attn") | DENSE) | {"lm_head.decoder.weight": "lm_head"},
    ),
    "squeezebert": Architecture(
        build(
            "SqueezeBertForMaskedLM",
            "SqueezeBertConfig",
            SMALL
            | {"embedding_size": 32, "post_attention_groups": 1}
            | {f"{name}_groups": 2 for name in ("q", "k", "v", "intermediate", "output")},
        ),
        repeated(
            "transformer.encoder.layers.{}.",
            {f"attention.{name}": name for name in ("query", "key", "value")} | {"post_attention.conv1d": "output"},
        )
        | {"cls.predictions.decoder.weight": "lm_head"},
    ),
}

SENSES = {
    "timesformer": Architecture(
        build("TimesformerForVideoClassification", "TimesformerConfig", SQUARE | {"num_frames": 4}),
        repeated(
            "timesformer.encoder.layer.{}.",
            {f"{name}.attention.qkv": QKV for name in ("attention", "temporal_attention")}
            | {f"{name}.output.dense": "output" for name in ("attention", "temporal_attention")}
            | DENSE,
        ),
    ),
    "hubert": Architecture(
        build(
            "HubertForCTC",
            "HubertConfig",
            SOUND
            | {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
            | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        ),
        repeated(
            "hubert.encoder.layers.{}.",
            projections("attention")
            | {"feed_forward.intermediate_dense": "ffn.up", "feed_forward.output_dense": "ffn.down"},
        ),
    ),
    "wav2vec2_bert": Architecture(
        build(
            "Wav2Vec2BertForCTC",
            "Wav2Vec2BertConfig",
            SOUND | {"feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 5},
        ),
        repeated(
            "wav2vec2_bert.encoder.layers.{}.",
            {f"self_attn.linear_{name[0]}": name for name in ("query", "key", "value")}
            | {"self_attn.linear_out": "output"}
            | FEEDS,
        ),
    ),
}


class GatedSpatial(nn.Module):
    """gMLP: half of the hidden channels, mixed over the tokens, scales the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.norm_gate, self.mix = nn.LayerNorm(32), nn.Conv1d(11, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.enter(self.norm(x))).chunk(2, -1)
        return x + self.leave(kept * self.mix(self.norm_gate(gate)))


class InducedSet(nn.Module):
    """Set transformer's induced attention: learned points look at the set, the set looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, 5, 32))
        self.q1, self.k1, self.v1, self.o1 = (nn.Linear(32, 32) for _ in range(4))
        self.q2, self.k2, self.v2, self.o2 = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        points = self.points.expand(len(x), -1, -1)
        hidden = self.o1(F.scaled_dot_product_attention(self.q1(points), self.k1(x), self.v1(x)))
        return x + self.o2(F.scaled_dot_product_attention(self.q2(x), self.k2(hidden), self.v2(hidden)))


class UpFirst(nn.Module):
    """A gated unit whose up projection runs first and whose gate is the sigmoid of another."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a, self.c = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x) * torch.sigmoid(self.a(x))) + x


def _induced() -> dict[str, Role]:
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return {f"{name}{i}.weight": role for i in (1, 2) for name, role in names.items()}


OWN = {
    "gmlp": Architecture(
        GatedSpatial, {}, lambda: (normal(2, 11, 32),), undecided=frozenset({"enter.weight", "leave.weight"})
    ),
    "induced_set": Architecture(InducedSet, _induced(), lambda: (normal(2, 11, 32),)),
    "up_first": Architecture(
        UpFirst, {"b.weight": "ffn.up", "a.weight": "ffn.gate", "c.weight": "ffn.down"}, lambda: (normal(2, 11, 32),)
    ),
}

FRESH: dict[str, Architecture] = LANGUAGE | SENSES | OWN
