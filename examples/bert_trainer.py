"""Sentence classification with Hugging Face's Trainer: one line attaches the adapters to it.

python examples/bert_trainer.py                     # a small random BERT on made-up token ids, no download
python examples/bert_trainer.py --model FOLDER_OR_ID
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import lora2fx
from lora2fx.integrations.transformers import attach


class SevenOrNot(Dataset[dict[str, torch.Tensor]]):
    """Rows of token ids; the label says whether token 7 is among them. Put your tokenised data set in its place."""

    def __init__(self, rows: int, seed: int) -> None:
        self.ids = torch.randint(8, 100, (rows, 12), generator=torch.Generator().manual_seed(seed))
        self.ids[::2, 3] = 7

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": torch.tensor(int((self.ids[index] == 7).any()))}


def build(name: str | None) -> torch.nn.Module:
    """A pretrained model, or a small one with random weights."""
    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **sizes))


def main(name: str | None, folder: str) -> float:
    """Adapt, train, fold; returns the accuracy on rows that were not trained on."""
    model = build(name)
    lora2fx.transform(model, ["query", "key", "value", "ffn"], lora2fx.LoRA2(r=4, k=4, target_k=2))
    lora2fx.print_trainable_parameters(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(folder, max_steps=80, per_device_train_batch_size=32, learning_rate=1e-2, report_to=[]),
        train_dataset=SevenOrNot(1024, seed=0),
    )
    attach(trainer)
    trainer.train()
    print(lora2fx.report(model))
    lora2fx.fold(model)  # a plain BERT again: save_pretrained, push_to_hub, pipelines
    test = SevenOrNot(256, seed=1)
    with torch.no_grad():
        right = model.eval()(input_ids=test.ids.to(model.device)).logits.argmax(-1).cpu() == (test.ids == 7).any(-1)
    print(f"accuracy on new rows: {right.float().mean():.3f}")
    return right.float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or folder")
    with tempfile.TemporaryDirectory() as scratch:
        main(parser.parse_args().model, scratch)
