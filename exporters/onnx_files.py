"""An ONNX graph as files: weights inline or beside it, metadata, and a report, put in place together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies
from lora2fx.exporters.onnx_proof import Proof
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.writing import publish
from lora2fx.reports import Report

EXTERNAL_DATA_ABOVE = 1_500_000_000


def _weight_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(value.const_value.tobytes())
    return digest.hexdigest()


def save_onnx(model: Any, file: Path, external: bool | None) -> list[Path]:
    """Write the graph, and its weights beside it where they are many; then let the ONNX checker read it."""
    import onnx
    from onnxscript import ir

    external = _weight_bytes(model) > EXTERNAL_DATA_ABOVE if external is None else external
    data = f"{file.name}.{_digest(model)[:12]}.data" if external else None
    ir.save(model, file, external_data=data)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no base class
        raise ExportError(f"the ONNX checker refuses the exported file: {first_line(error)}") from error
    return [file] if data is None else [file, file.parent / data]


def note_metadata(file: Path, copies: Copies, proof: Proof) -> None:
    """Add the model's metadata to a file that was proven, leaving its graph as it is, byte by byte."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph.SerializeToString(deterministic=True)
    ranks = {site["weight"]: site["rank"] for site in copies.folded.sites} if copies.folded else {}
    notes = {
        "lora2fx.version": version("lora2fx"),
        "lora2fx.ranks": json.dumps(ranks),
        "lora2fx.base_sha256": _base_digest(copies),
        "lora2fx.parity": json.dumps({"max_error": proof.max_error, "margin": proof.margin, "noise": proof.noise}),
    }
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, str(file))
    if onnx.load(str(file), load_external_data=False).graph.SerializeToString(deterministic=True) != graph:
        raise ExportError("adding metadata changed the exported graph; nothing was written.")


def _base_digest(copies: Copies) -> str:
    """sha256 over the adapted weights as they were before the merge, in the order of their names."""
    digest = hashlib.sha256()
    for change in sorted(copies.changes, key=lambda change: change.weight):
        digest.update(change.weight.encode())
        digest.update(change.before.detach().contiguous().cpu().numpy().tobytes())
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
