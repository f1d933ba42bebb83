"""Text encoders of transformers, built from tiny configs; their inputs are synthesised."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.architecture import QKV, Architecture, fused, repeated

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}

ATTENTION = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
}
DENSE = {"intermediate.dense": "ffn.up", "output.dense": "ffn.down"}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**SMALL))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(AlbertConfig(**SMALL, embedding_size=16, num_labels=3))


def modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**SMALL, **special))


def deberta(share: bool) -> nn.Module:
    """As published: relative positions in buckets, content to position and back; v3 shares the projections."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **SMALL,
        num_labels=3,
        relative_attention=True,
        position_buckets=8,
        pos_att_type="p2c|c2p",
        norm_rel_ebd="layer_norm",
        share_att_key=share,
        position_biased_input=False,
        type_vocab_size=0,
    )
    return DebertaV2ForSequenceClassification(config)


DEBERTA = {
    "attention.self.query_proj": "query",
    "attention.self.key_proj": "key",
    "attention.self.value_proj": "value",
    "attention.output.dense": "output",
    **DENSE,
}

ENCODERS = {
    "bert": Architecture(bert, repeated("bert.encoder.layer.{}.", ATTENTION | DENSE)),
    "deberta_v2": Architecture(lambda: deberta(share=True), repeated("deberta.encoder.layer.{}.", DEBERTA)),
    "deberta_v2_separate": Architecture(
        lambda: deberta(share=False),
        repeated("deberta.encoder.layer.{}.", DEBERTA),
        undecided=frozenset(
            f"deberta.encoder.layer.{i}.attention.self.pos_{name}_proj.weight"
            for i in range(2)
            for name in ("key", "query")
        ),
    ),
    "roberta": Architecture(
        roberta,
        repeated("roberta.encoder.layer.{}.", ATTENTION | DENSE) | {"lm_head.decoder.weight": "lm_head"},
    ),
    "albert": Architecture(
        albert,
        repeated(
            "albert.encoder.albert_layer_groups.0.albert_layers.{}.",
            {f"attention.{name}": name for name in ("query", "key", "value")}
            | {"attention.dense": "output", "ffn": "ffn.up", "ffn_output": "ffn.down"},
            count=1,
        ),
    ),
    "modernbert": Architecture(
        modernbert,
        repeated(
            "model.layers.{}.",
            {
                "attn.Wqkv": QKV,
                "attn.Wo": "output",
                "mlp.Wi": fused(ffn_gate=(0, 64), ffn_up=(64, 128)),  # the activation is on the first half
                "mlp.Wo": "ffn.down",
            },
        )
        | {"decoder.weight": "lm_head"},
    ),
}
