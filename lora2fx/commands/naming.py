"""The options by which commands name a model and an adapter, and what they name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import lora2fx
from lora2fx.sources import Source, load_source

MODEL_HELP = "a local Hugging Face folder, or package.module:factory (returns a model, or model and example inputs)"

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    """What `add_subparsers` returns."""


def add_adapted(parser: argparse.ArgumentParser) -> None:
    """Add `--base`, `--adapter` and `--as`."""
    parser.add_argument("--base", required=True, metavar="MODEL", help=f"the base model: {MODEL_HELP}")
    written = "what lora2fx.save wrote, or a LoRA or AdaLoRA of PEFT's"
    parser.add_argument("--adapter", required=True, type=Path, metavar="FOLDER", help=written)
    add_class(parser)


def add_class(parser: argparse.ArgumentParser) -> None:
    """Add `--as`."""
    parser.add_argument(
        "--as",
        dest="as_class",
        metavar="CLASS",
        help="the transformers class to load a folder as, such as AutoModelForSequenceClassification"
        " (default: the one that its config names)",
    )


def named_source(name: str, options: argparse.Namespace) -> Source:
    """The model that `name` and `--as` mean; what a user should know of it goes to stderr."""
    source = load_source(name, options.as_class)
    if source.note:
        print(f"Note: {source.note}.", file=sys.stderr)
    return source


def adapted_source(options: argparse.Namespace) -> Source:
    """The model of `--base` with the adapter of `--adapter`."""
    source = named_source(options.base, options)
    lora2fx.load(source.model, options.adapter, example_inputs=source.example_inputs)
    return source
