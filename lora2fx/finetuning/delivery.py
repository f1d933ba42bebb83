"""What a trained run leaves to be used: the adapter and the exports asked for, each proven as it is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2fx.errors import RunError
from lora2fx.exporters import export_onnx, export_peft, export_safetensors
from lora2fx.finetuning.folder import ADAPTER, TRAINED, sizes
from lora2fx.finetuning.methods import RECIPES
from lora2fx.finetuning.prepare import Prepared
from lora2fx.finetuning.weights import read_trained, write_trained
from lora2fx.program import Baseline
from lora2fx.storage import load, save

if TYPE_CHECKING:
    from datasets import Dataset

EXPORTS = {"onnx": "model.onnx", "peft": "peft", "safetensors": "merged"}
"""By kind the entry in the run's folder."""
ENTRIES = {"adapter": ADAPTER, "trained weights": TRAINED} | EXPORTS
"""What a finished run's folder may hold, by the name that its sizes are given under."""
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "peft": ("peft",), "safetensors": ()}
TRACED_ROWS = 2


def check_exports(kinds: Sequence[str], method: str) -> None:
    """Raise `RunError`, before anything is trained, where an export will not be possible."""
    for kind in kinds:
        missing = [name for name in PACKAGES[kind] if importlib.util.find_spec(name) is None]
        if missing:
            raise RunError(f"--export {kind} needs {', '.join(missing)}: pip install {' '.join(missing)}")
        if not RECIPES[method].folds:
            raise RunError(f"--export {kind}: --method {method} is no update of weights, so that it can't be merged.")
        if kind == "peft" and method in ("full", "bitfit"):
            raise RunError(f"--export peft: --method {method} makes no low-rank update. Pass --export safetensors.")


def example_batch(table: Dataset, collator: Callable[[Any], Any]) -> dict[str, Any]:
    """The longest two of the first rows, as tensors, without their labels: what an export is traced and proven on."""
    rows = [table[index] for index in range(min(len(table), 64))]
    longest = sorted(rows, key=lambda row: len(row["input_ids"]))[-TRACED_ROWS:]
    return {name: value for name, value in dict(collator(longest)).items() if name != "labels"}


def keep_trained(run: Prepared, out: Path) -> None:
    """Write the adapter; of a baseline, which has none, everything that it trained."""
    if isinstance(run.method, Baseline):
        write_trained(run.model, out / TRAINED)
    else:
        save(run.model, out / ADAPTER)


def take_up(run: Prepared, out: Path) -> None:
    """Give the plain model what `keep_trained` wrote. Raises `FormatError` or `RunError` where it doesn't fit."""
    if isinstance(run.method, Baseline):
        run.adapt()
        read_trained(run.model, out / TRAINED)
    else:
        load(run.model, out / ADAPTER)


def deliver(run: Prepared, out: Path, kinds: Sequence[str], record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write the exports that are asked for and not there, and enter them, and what all entries weigh, in the record."""
    examples = example_batch(run.validation, run.task.collator(run.tokenizer))
    for kind in kinds:
        if kind in record["exports"] and (out / EXPORTS[kind]).exists():
            continue
        say(f"export      {EXPORTS[kind]}: writing and proving it")
        record["exports"][kind] = _export(run, kind, out / EXPORTS[kind], examples)
    record["sizes"] = sizes(out, ENTRIES)


def _export(run: Prepared, kind: str, path: Path, examples: dict[str, Any]) -> dict[str, Any]:
    """What the exporter's report says, less the sites."""
    if kind == "onnx":
        report = export_onnx(run.model, path, examples)
    elif kind == "peft":
        report = export_peft(run.model, path, example_inputs=examples)
    else:
        report = export_safetensors(run.model, path)
        run.tokenizer.save_pretrained(path)
    found = report.to_dict()
    return {key: value for key, value in found.items() if key != "sites"} | {"path": path.name}
