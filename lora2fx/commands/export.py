"""`lora2fx export`: an adapted model as ONNX, merged safetensors or plain LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import lora2fx
from lora2fx.commands.naming import adapted_source, add_adapted

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    export = commands.add_parser("export", help="write an adapted model as ONNX, merged safetensors, or plain LoRA")
    add_adapted(export)
    kinds = export.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--onnx", type=Path, metavar="FILE", help="merged, as ONNX, checked against PyTorch")
    kinds.add_argument("--safetensors", type=Path, metavar="FILE", help="the merged weights")
    kinds.add_argument("--peft", type=Path, metavar="FOLDER", help="plain LoRA in PEFT's format")
    export.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    source = adapted_source(options)
    if options.onnx is not None:
        print(lora2fx.exporters.export_onnx(source.model, options.onnx, example_inputs=source.example_inputs))
    elif options.safetensors is not None:
        print(lora2fx.exporters.export_safetensors(source.model, options.safetensors))
    else:
        print(lora2fx.exporters.export_peft(source.model, options.peft))
