"""Tiny pretrained models with tokenizers made on the spot, and made-up tables, for the tests of `lora2fx train`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

SUBJECTS = ("cats", "dogs", "boats", "stones", "rivers", "clouds")
GOOD, BAD = ("bright", "warm", "gentle", "lovely"), ("dull", "cold", "harsh", "ugly")
WORDS = ("the", "are", "and", "very", *SUBJECTS, *GOOD, *BAD)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


def save_tokenizer(folder: Path, special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> None:
    """A fast word-level tokenizer over `WORDS`, with BERT's frame around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    ).save_pretrained(folder)


def bert_folder(folder: Path, dropout: float = 0.1) -> Path:
    """A BERT encoder without a head, as pretrained ones are stored."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
        **SIZES,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    """A decoder whose tokenizer has no token to pad with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<unk>", "</s>", *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", model_max_length=32
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=40, eos_token_id=1, bos_token_id=None, **SIZES
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentence(chance: random.Random, good: bool) -> str:
    words = chance.choices(GOOD if good else BAD, k=chance.randint(2, 4))
    return f"{' and '.join(words)} {chance.choice(SUBJECTS)}"


def rated(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`text`, `label` (good or bad) and `score`, the share of good words."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        good = index % 2 == 0
        rows.append({"text": sentence(chance, good), "label": "good" if good else "bad", "score": float(good) + 0.25})
    return rows


def tagged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`tokens` and one of three `tags` a word."""
    rows = []
    for row in rated(count, seed):
        words = row["text"].split()
        kinds = {**dict.fromkeys(SUBJECTS, "SUBJECT"), **dict.fromkeys((*GOOD, *BAD), "QUALITY")}
        rows.append({"tokens": words, "tags": [kinds.get(word, "O") for word in words]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path
