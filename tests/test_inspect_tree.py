"""The tree that `lora2fx inspect` prints: every weight once, layers that are alike as one, what targets would do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lora2fx
from lora2fx.cli import main
from lora2fx.tree import TreeStyle, format_tree

BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}


def bert(layers=3):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=2, **BERT)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(path)
    return str(path)


def tree(model, inputs=None, **style):
    return format_tree(model, lora2fx.inspect(model, inputs).sites, TreeStyle(**style))


EXPECTED = """
BertForSequenceClassification
├─ bert BertModel
│  ├─ embeddings BertEmbeddings
│  │  ├─ word_embeddings.weight        embedding  50×16                    800  activation
│  │  ├─ position_embeddings.weight    embedding  512×16                 8,192  activation
│  │  └─ token_type_embeddings.weight  embedding  2×16                      32  activation
│  ├─ encoder.layer ModuleList
│  │  └─ 0–2 (3 alike) BertLayer
│  │     ├─ attention BertAttention
│  │     │  ├─ self BertSelfAttention
│  │     │  │  ├─ query.weight         query      16×16                    256  activation
│  │     │  │  ├─ key.weight           key        16×16                    256  activation
│  │     │  │  └─ value.weight         value      16×16                    256  activation
│  │     │  └─ output.dense.weight     output     16×16                    256  activation
│  │     ├─ intermediate.dense.weight  ffn.up     24×16                    384  activation
│  │     └─ output.dense.weight        ffn.down   16×24                    384  activation
│  └─ pooler.dense.weight              unknown    16×16                    256  activation
└─ classifier.weight                   unknown    2×16                      32  activation
"""


def test_layers_that_are_alike_are_one_line():
    assert tree(bert()) == EXPECTED.strip()


def test_expanded_every_weight_is_there_once():
    model = bert()
    shown = tree(model, expand=True)
    weights = [entry["weight"] for entry in lora2fx.inspect(model).sites]
    assert len(re.findall(r"activation$", shown, re.MULTILINE)) == len(weights)
    assert "alike" not in shown


def test_a_layer_that_differs_stands_alone():
    model = bert(4)
    model.bert.encoder.layer[1].intermediate.dense = nn.Linear(16, 40)
    model.bert.encoder.layer[1].output.dense = nn.Linear(40, 16)
    shown = tree(model)
    assert re.findall(r"─ (\d.*) BertLayer$", shown, re.MULTILINE) == ["0", "1", "2–3 (2 alike)"]


def test_slices_and_reasons_are_shown():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    shown = tree(model)
    assert re.search(r"weight \[16:32\] +key ", shown)
    assert re.search(r"lm_head\.weight .*tied to transformer\.wte\.weight", shown)
    assert not re.search(r"\n.*#", shown) and "attention #0" in tree(model, evidence=True)


def test_colour_changes_nothing_but_colour():
    plain, coloured = tree(bert()), tree(bert(), colour=True)
    assert "\x1b[" in coloured and "\x1b[" not in plain
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_a_module_without_children_is_a_tree():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(4, 3))
            self.unused = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.mix

    shown = tree(Raw(), (torch.randn(2, 4),)).splitlines()
    assert shown[0] == "Raw"
    assert re.fullmatch(r"├─ mix +unknown +4×3 +12 +activation", shown[1])
    assert re.fullmatch(r"└─ unused +– .*never.*", shown[2])


def test_targets_show_what_they_would_do(folder, capsys):
    assert main(["inspect", folder, "--targets", "query", "ffn.up", "--exclude", "*.layer.0.*"]) == 0
    shown = capsys.readouterr().out
    assert "0–2" not in shown and "1–2 (2 alike)" in shown
    model = lora2fx.transform(bert(), ["query", "ffn.up"], lora2fx.LoRA(r=1), exclude=["*.layer.0.*"])
    added = lora2fx.report(model).totals["adapter_parameters"]
    assert f"4 weights at 4 sites; each rank of LoRA takes {added:,} parameters" in shown


def test_where_filters_by_name_role_or_rewrite(folder, capsys):
    for pattern, count in (("*.layer.0.*", 6), ("ffn.*", 6), ("embedding", 3), ("activation", 23)):
        assert main(["inspect", folder, "--where", pattern, "--expand"]) == 0
        assert f", {count} weights shown" in capsys.readouterr().out
    assert main(["inspect", folder, "--where", "nothing"]) == 1
    assert "fits none of the 23 weights" in capsys.readouterr().err


def test_the_flat_table_is_still_there(folder, capsys):
    assert main(["inspect", folder, "--table"]) == 0
    assert "bert.encoder.layer.2.output.dense.weight" in capsys.readouterr().out
