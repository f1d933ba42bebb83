"""An ONNX graph as files: weights inline or beside it, metadata, and a report, put in place together."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies
from lora2fx.exporters.onnx_proof import Proof
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.writing import publish
from lora2fx.reports import Report

EXTERNAL_DATA_ABOVE = 1_500_000_000


def goes_beside(model: Any, external: bool | None) -> bool:
    """Whether the weights go into a file of their own: as asked, or where they are more than 1.5 GB."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    return size > EXTERNAL_DATA_ABOVE if external is None else external


def weights_digest(model: Any) -> str:
    """sha256 over all constants, in order."""
    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def save_onnx(model: Any, file: Path, external: bool) -> list[Path]:
    """Write the graph, and its weights beside it where they are many; then let the ONNX checker read it."""
    import onnx
    from onnxscript import ir

    data = f"{file.name}.{weights_digest(model)[:12]}.data" if external else None
    ir.save(model, file, external_data=data)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no base class
        raise ExportError(f"the ONNX checker refuses the exported file: {first_line(error)}") from error
    return [file] if data is None else [file, file.parent / data]


def note_metadata(file: Path, copies: Copies, proof: Proof, details: Mapping[str, Any]) -> None:
    """Add the model's metadata to a file that was proven, by appending: what was written stays, byte by byte."""
    import onnx

    ranks = {site["weight"]: site["rank"] for site in copies.folded.sites} if copies.folded else {}
    parity = {"max_error": proof.max_error, "margin": proof.margin, "noise": proof.noise, "vacuous": proof.vacuous}
    notes = {
        "lora2fx.version": version("lora2fx"),
        "lora2fx.versions": json.dumps(tool_versions()),
        "lora2fx.ranks": json.dumps(ranks),
        "lora2fx.base_sha256": _base_digest(copies),
        "lora2fx.weights_sha256": details["weights_sha256"],
        "lora2fx.dtype": details["dtype"],
        "lora2fx.parity": json.dumps(parity),
    }
    append_metadata(file, notes)
    found = {entry.key: entry.value for entry in onnx.load(str(file), load_external_data=False).metadata_props}
    if not notes.items() <= found.items():
        raise ExportError("the metadata that was added to the exported file doesn't read back; nothing was written.")


def append_metadata(file: Path, notes: Mapping[str, str]) -> None:
    """Add entries to a file's `metadata_props`: protocol buffers one after another are their fields put together."""
    import onnx

    added = onnx.ModelProto()
    onnx.helper.set_model_props(added, dict(notes))
    with file.open("ab") as stream:
        stream.write(added.SerializeToString())


def tool_versions() -> dict[str, str]:
    """What made the file: the versions of torch, onnx, onnxscript and ONNX Runtime, and of transformers if loaded."""
    import onnx
    import onnxruntime
    import onnxscript

    modules = {"torch": torch, "onnx": onnx, "onnxscript": onnxscript, "onnxruntime": onnxruntime}
    if "transformers" in sys.modules:
        modules["transformers"] = sys.modules["transformers"]
    return {name: str(module.__version__) for name, module in modules.items()}


def _base_digest(copies: Copies) -> str:
    """sha256 over the adapted weights as they were before the merge, in the order of their names."""
    digest = hashlib.sha256()
    for change in sorted(copies.changes, key=lambda change: change.weight):
        digest.update(change.weight.encode())
        digest.update(change.before.detach().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def publish_onnx(staged: Sequence[Path], place: Path, report: Report) -> None:
    """Data, graph, report in place; an earlier export's data goes last, so that no crash parts a graph from its own."""
    text = staged[0].with_name(place.name + ".report.json")
    digest = hashlib.sha256(staged[0].read_bytes()).hexdigest()
    text.write_text(json.dumps(report.to_dict() | {"sha256": digest}, indent=2) + "\n")
    files = {file: place.with_name(file.name) for file in (*staged[1:], staged[0], text)}
    publish(files)
    for old in place.parent.glob(f"{place.name}.{'[0-9a-f]' * 12}.data"):
        if old not in files.values():
            old.unlink()
