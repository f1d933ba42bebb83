"""Speech: adapt only the decoder of a Whisper model, cross-attention included, and leave the encoder alone.

python examples/whisper.py                       # a small random Whisper on made-up spectrograms, no download
"""

from __future__ import annotations

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import lora2fx


def build() -> WhisperForConditionalGeneration:
    """With `from_pretrained("openai/whisper-small")` in its place, nothing below changes but the data."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    lengths = {"max_source_positions": 15, "max_target_positions": 20, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**layers, **widths, **lengths, **special, init_std=0.2))


def tones(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms (rows, 8, 30) of one tone each, and the tone as a token from 3 to 10, shape (rows, 1)."""
    tokens = torch.randint(0, 8, (rows, 1), generator=generator)
    sound = 0.1 * torch.randn(rows, 8, 30, generator=generator)
    sound[torch.arange(rows), tokens[:, 0]] += 2
    return sound, tokens + 3


def main(steps: int = 120) -> float:
    """Returns the share of tones that the adapted model writes down rightly."""
    model, generator = build(), torch.Generator().manual_seed(0)
    # The embedding is tied to the head; neither is a target here. The encoder of this random model is as good as any.
    lora2fx.transform(model, ["attention", "ffn"], lora2fx.LoRA2(r=8, k=8, target_k=6), exclude=["model.encoder.*"])
    assert not any("encoder" in name.split(".")[:2] for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=steps)
    model.train()
    for _ in range(steps):
        sound, tokens = tones(64, generator)
        model(input_features=sound, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora2fx.fold(model.eval())
    sound, tokens = tones(64, generator)
    written = model(input_features=sound, labels=tokens).logits.argmax(-1)
    share = (written == tokens).float().mean().item()
    print(f"tones written down rightly, after folding: {share:.2f}")
    return share


if __name__ == "__main__":
    main()
