"""The README of an exported adapter: what it is, how to load it, which ranks are left."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from lora2fx.exporters.peft_layers import Layer
from lora2fx.program import Program
from lora2fx.reports import format_table

_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


def model_card(program: Program, layers: Sequence[Layer], rank: int, layout: str) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    base = getattr(getattr(program.root, "config", None), "_name_or_path", "") or ""
    adapted = len({site.weight for site in program.sites})
    parts = [
        _front_matter(base),
        f"# LoRA adapter for {base or type(program.root).__name__}",
        f"Trained with {type(program.method).__name__} in lora2fx {version('lora2fx')} and exported as plain LoRA:"
        f" scale and gates are in the factors, `lora_alpha` = `r` = {rank}. {len(layers)} of {adapted} adapted"
        " weights have a rank above 0.",
        _usage(layout, rank),
        "## Ranks",
        "```\n" + format_table(("module", "rank"), [(layer.path, layer.update.rank) for layer in layers]) + "\n```",
    ]
    if saved := program.record.modules_to_save:
        parts.append(
            "Trained whole and included: "
            + ", ".join(f"`{path}`" for path in saved)
            + ". PEFT loads these; vLLM and llama.cpp load LoRA factors only: serve the merged model there."
        )
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str) -> str:
    lines = [
        "---",
        *([f"base_model: {base}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- lora2fx",
        "---",
    ]
    return "\n".join(lines)


def _usage(layout: str, rank: int) -> str:
    load = "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, folder)\n```"
    if layout == "compact":
        return load + "\n\nEach module has its own rank (`rank_pattern`): for PEFT only."
    served = next((known for known in _SERVED_RANKS if known >= rank), None)
    vllm = f" In vLLM, pass `--max-lora-rank {served}`." if served else ""
    return load + f"\n\nEvery module is padded with zeros to rank {rank}, so that every server scales it alike.{vllm}"
