"""What PEFT makes of an exported folder, held against what was exported: keys, values, updates, outputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Change, Copies
from lora2fx.exporters.onnx_program import name_outputs
from lora2fx.exporters.onnx_proof import Proof, outputs_of, prove_outputs
from lora2fx.exporters.peft_layers import Layer
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.shapes import Case, Tensors
from lora2fx.passes.state import preserved_generators

UPDATE_TOLERANCE = 1e-5
"""ΔW is stored as float32 factors: their product is off by a few roundings, relative to its largest entry."""


def read_back(base: nn.Module, folder: Path, written: Mapping[str, Tensor]) -> Any:
    """The base with the folder loaded through PEFT; raises `ExportError` unless its state is what was written."""
    import peft

    try:
        with warnings.catch_warnings(), preserved_generators():  # PEFT draws factors before it loads them
            warnings.simplefilter("ignore")  # about keys, which are compared below, and about Conv1D's orientation
            loaded = peft.PeftModel.from_pretrained(base, str(folder)).eval()
            found = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    except Exception as error:  # PEFT raises many types
        raise ExportError(
            f"PEFT can't load what was written for it: {first_line(error)}. Nothing was written."
        ) from error
    missing, extra = sorted(written.keys() - found.keys()), sorted(found.keys() - written.keys())
    if missing or extra:
        raise ExportError(
            f"PEFT reads other keys than were written: {len(missing)} missing {missing[:3]}, {len(extra)} that it"
            f" made up {extra[:3]}. Nothing was written."
        )
    for name, tensor in written.items():
        if not torch.equal(found[name].detach().cpu().to(tensor.dtype), tensor):
            raise ExportError(f"PEFT reads other values than were written for {name}. Nothing was written.")
    return loaded


@torch.no_grad()
def prove_layers(loaded: Any, layers: Sequence[Layer], changes: Sequence[Change]) -> float:
    """The largest relative difference between a ΔW and what PEFT would add to the weight.

    Raises `ExportError` where it is more than float32 factors explain.
    """
    deltas = {change.weight: change for change in changes}
    worst = 0.0
    for layer in layers:
        expected = deltas[f"{layer.path}.weight"].delta()
        module = loaded.base_model.model.get_submodule(layer.path)
        found = module.get_delta_weight("default").double().cpu()
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= UPDATE_TOLERANCE:
            raise ExportError(
                f"PEFT's update of {layer.path} is off by {error:.3g} of its largest entry ({UPDATE_TOLERANCE:.0e} is"
                " allowed). Nothing was written."
            )
        worst = max(worst, error)
    return worst


def prove_peft_outputs(loaded: Any, copies: Copies, inputs: Tensors) -> Proof:
    """The output gate of the exporters, with PEFT's model in place of an exported file."""
    case = Case("example inputs", inputs)
    with torch.no_grad():
        names = name_outputs(copies.adapted(**inputs), list(inputs))
    return prove_outputs(lambda tensors: outputs_of(loaded, tensors), copies, [case], names)
