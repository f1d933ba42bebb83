"""`export_peft`: the update as a plain LoRA folder in PEFT's format, read back through PEFT before it is there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies, bind_constants, copies_of, unloaded_copy, unwrapped
from lora2fx.exporters.model_card import model_card
from lora2fx.exporters.onnx_program import without_cache
from lora2fx.exporters.peft_layers import Layer, peft_layers
from lora2fx.exporters.peft_proof import prove_layers, prove_peft_outputs, read_back
from lora2fx.exporters.shapes import named_inputs
from lora2fx.exporters.writing import check_folder, publish_folder, staging
from lora2fx.inputs import ExampleInputs, as_inputs
from lora2fx.program import Program, program_of, refuse_baseline
from lora2fx.reports import Report
from lora2fx.synthesis import is_pretrained

RankLayout = Literal["uniform", "compact"]
OWNED = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layout: RankLayout = "uniform",
    example_inputs: ExampleInputs = None,
) -> Report:
    """Write the adapters as LoRA of each weight's true rank, with the modules trained whole; the model stays as it is.

    Scale and gates are in the factors: nothing is left to scale (lora_alpha = r). "uniform" pads every site with
    zeros to the largest rank, which vLLM, llama.cpp, diffusers and PEFT all scale alike; "compact" keeps each site's
    own rank in `rank_pattern`, for PEFT alone. Sites of rank 0 are left out; the slices of a fused weight become one
    LoRA. The folder is replaced if an earlier export wrote it.

    It counts as written once PEFT has loaded it onto the base: the same keys and values, each module's ΔW, and the
    adapted model's outputs (`prove_outputs`) for `example_inputs` (a transformers model's are made up; without any,
    the report says so). Tensors are float32 `lora_A` (r, in) and `lora_B` (out, r) by PEFT's names, and the modules
    trained whole in their own dtype.

    Raises `ExportError` otherwise, where a weight can't be a PEFT module or every rank is 0, `AdapterError` where there
    are no adapters, and what folding raises (`ScheduleError` for an unfinished schedule, `AdapterError` for a factor
    that isn't finite).

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from lora2fx.exporters import export_peft
        >>> from torch import nn
        >>> x = torch.ones(4, 8)
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.LoRA(r=4))
        >>> with torch.no_grad():
        ...     model[0].lora2fx_weight.B[:, 0] = 0.1  # as if one rank of four had been trained
        >>> done = export_peft(model, "peft", example_inputs=(x,))
        >>> done.verify["status"], done.details["r"], done.details["files"]
        ('passed', 1, ['README.md', 'adapter_config.json', 'adapter_model.safetensors'])
    """
    _require_peft(layout)
    place, model = Path(folder), unwrapped(model)
    check_folder(place, OWNED)
    program = program_of(model, "export_peft")
    refuse_baseline(program, "export_peft")
    runs = example_inputs is not None or is_pretrained(model)
    copies = copies_of(model, "export_peft")
    layers = peft_layers(program, runs)
    rank = max(layer.update.rank for layer in layers)
    tensors = {key: value for layer in layers for key, value in _tensors(layer, rank, layout).items()}
    tensors |= _saved_tensors(program)
    with staging(place.parent) as aside:
        staged = aside / place.name
        _write(staged, program, layers, rank, layout, tensors)
        verify, details = _prove(staged, copies, layers, tensors, example_inputs, runs)
        publish_folder(staged, place, OWNED)
    ranks = {layer.path: layer.update.rank for layer in layers}
    details |= {"layout": layout, "r": rank, "ranks": ranks, "files": sorted(OWNED)}
    folded = copies.folded
    assert folded is not None
    return Report("export_peft: LoRA for PEFT", folded.sites, folded.totals, verify, details)


def _require_peft(layout: str) -> None:
    if layout not in ("uniform", "compact"):
        raise ExportError(f"layout={layout!r}: choose 'uniform' (one rank, for every server) or 'compact' (PEFT only).")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "export_peft reads back what it writes through peft, which is not installed here: pip install peft"
        ) from error


def _tensors(layer: Layer, rank: int, layout: str) -> dict[str, Tensor]:
    return layer.tensors(rank if layout == "uniform" else layer.update.rank)


def _saved_paths(program: Program) -> list[str]:
    """The modules trained whole, without those inside another."""
    paths = program.record.modules_to_save
    return [path for path in paths if not any(path.startswith(other + ".") for other in paths)]


def _saved_tensors(program: Program) -> dict[str, Tensor]:
    return {
        f"base_model.model.{path}.{name}": value.detach().cpu().contiguous().clone()
        for path in _saved_paths(program)
        for name, value in program.root.get_submodule(path).state_dict().items()
    }


def _write(
    staged: Path, program: Program, layers: Sequence[Layer], rank: int, layout: str, tensors: Mapping[str, Tensor]
) -> None:
    from safetensors.torch import save_file

    staged.mkdir()
    config = _config(program, layers, rank, layout)
    save_file(dict(tensors), staged / "adapter_model.safetensors", metadata={"format": "pt"})
    (staged / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (staged / "README.md").write_text(model_card(program, layers, rank, layout), encoding="utf-8")


def _config(program: Program, layers: Sequence[Layer], rank: int, layout: str) -> dict[str, Any]:
    from peft import LoraConfig

    pattern = {f"^{re.escape(layer.path)}": layer.update.rank for layer in layers if layer.update.rank != rank}
    root = program.root
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(root, [layer.path for layer in layers]),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(layer.transposed for layer in layers),
        modules_to_save=_saved_paths(program) or None,
        rank_pattern=pattern if layout == "compact" else {},
        alpha_pattern=pattern if layout == "compact" else {},
        inference_mode=True,
        base_model_name_or_path=_base_name(root),
        auto_mapping={"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
        if is_pretrained(root)
        else None,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _targets(root: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """The full paths, or one anchored pattern where a path is another module's suffix, as which PEFT matches it."""
    others = [name for name, _ in root.named_modules() if name not in paths]
    if any(name.endswith("." + path) for name in others for path in paths):
        return "^(?:" + "|".join(re.escape(path) for path in paths) + ")$"
    return list(paths)


def _base_name(root: nn.Module) -> str | None:
    return getattr(getattr(root, "config", None), "_name_or_path", None) or None


def _prove(
    staged: Path,
    copies: Copies,
    layers: Sequence[Layer],
    tensors: Mapping[str, Tensor],
    example_inputs: ExampleInputs,
    runs: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the folder through PEFT and compare keys, values, updates and outputs."""
    fresh = unloaded_copy(copies.adapted, "export_peft").eval()
    checks = ["keys and values", "updates"]
    models = [copies.adapted, copies.base, copies.merged, fresh]
    without_cache(models)
    if runs:
        inputs, constants = named_inputs(copies.adapted, as_inputs(copies.adapted, example_inputs))
        for module in models:
            bind_constants(module, constants)
    loaded = read_back(fresh, staged, tensors)
    update_error = prove_layers(loaded, layers, copies.changes)
    if not runs:
        note = "outputs: not checked, since example_inputs= was not given"
        return {"status": "passed", "max_error": update_error, "checks": [*checks, note]}, {}
    proof = prove_peft_outputs(loaded, copies, inputs)
    return {"status": "passed", "max_error": proof.max_error, "checks": [*checks, "outputs"]}, proof.to_dict()
