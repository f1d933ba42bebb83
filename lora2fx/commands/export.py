"""`lora2fx export`: an adapted model as ONNX, merged safetensors or plain LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import lora2fx
from lora2fx.commands.naming import adapted_source, add_adapted, named_source
from lora2fx.sources import Source, SourceError

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands

SHORT = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
ONNX_ONLY = {"mode": "merged", "opset": 20, "dtype": None, "int8": False, "kv_cache": False, "providers": ["cpu"]}
"""The ONNX options and what they are where they aren't given."""


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    export = commands.add_parser("export", help="write an adapted model as ONNX, merged safetensors, or plain LoRA")
    add_adapted(export)
    kinds = export.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--onnx", type=Path, metavar="FILE", help="as ONNX, checked against PyTorch")
    kinds.add_argument("--safetensors", type=Path, metavar="FILE", help="the merged weights")
    kinds.add_argument("--peft", type=Path, metavar="FOLDER", help="plain LoRA in PEFT's format")
    onnx = export.add_argument_group("with --onnx")
    onnx.set_defaults(**ONNX_ONLY)
    onnx.add_argument(
        "--mode",
        choices=("merged", "multi"),
        help="one merged file, or a base with swappable .onnx_adapter files (default: merged)",
    )
    onnx.add_argument(
        "--also",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="with --mode multi: further adapters of the same base; each is named as its folder",
    )
    onnx.add_argument("--opset", type=int, metavar="N", help="the ONNX opset, 18 to 25 (default: 20)")
    onnx.add_argument("--dtype", choices=("float32", "float16"), help="of the weights (default: as the model's)")
    onnx.add_argument("--int8", action="store_true", help="quantise the merged weights of all MatMuls dynamically")
    onnx.add_argument("--kv-cache", action="store_true", help="a decoder's cache as inputs and outputs")
    onnx.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="what ONNX Runtime proves the file on: cpu, cuda, tensorrt, or a provider's full name (default: cpu)",
    )
    export.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    source = adapted_source(options)
    if options.onnx is not None:
        print(_onnx(source, options))
    elif options.safetensors is not None:
        print(lora2fx.exporters.export_safetensors(source.model, options.safetensors))
    else:
        print(lora2fx.exporters.export_peft(source.model, options.peft, example_inputs=source.example_inputs))


def _check(options: argparse.Namespace) -> None:
    """Raise `SourceError`, the error of a misused command line, for options that don't go together."""
    given = [name for name, default in ONNX_ONLY.items() if getattr(options, name) != default]
    given += ["also"] if options.also else []
    if options.onnx is None and given:
        raise SourceError(f"--{given[0].replace('_', '-')} goes with --onnx.")
    if options.also and options.mode != "multi":
        raise SourceError("--also names further adapters for --mode multi; a merged file holds one.")


def _onnx(source: Source, options: argparse.Namespace) -> Any:
    return lora2fx.exporters.export_onnx(
        source.model,
        options.onnx,
        source.example_inputs,
        opset=options.opset,
        dtype=options.dtype,
        int8=options.int8,
        kv_cache=options.kv_cache,
        providers=[SHORT.get(name.lower(), name) for name in options.providers],
        mode=options.mode,
        adapters=_adapters(source, options) if options.mode == "multi" else None,
    )


def _adapters(source: Source, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The adapted models by their folders' names, each on a base of its own."""
    found: dict[str, nn.Module] = {options.adapter.resolve().name: source.model}
    for folder in options.also:
        name = folder.resolve().name
        if name in found:
            raise SourceError(f"--also {folder}: an adapter named {name!r} is there already; rename the folder.")
        other = named_source(options.base, options)
        lora2fx.load(other.model, folder, example_inputs=other.example_inputs)
        found[name] = other.model
    return found
