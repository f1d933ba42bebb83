"""The command line. Exit codes: 0 done, 1 refused (it says why), 2 misused, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import lora2fx
from lora2fx.analysis import analyse
from lora2fx.errors import Lora2fxError
from lora2fx.passes.match import match_sites
from lora2fx.passes.rounding import Rounding
from lora2fx.sources import Source, SourceError, load_source
from lora2fx.streaming import fold_checkpoint

MODEL_HELP = "a local Hugging Face folder, or package.module:factory (returns a model, or model and example inputs)"
Command = Callable[[argparse.Namespace], None]


def _demo(options: argparse.Namespace) -> None:
    from lora2fx.demo.job import FULL, QUICK, run_demo
    from lora2fx.demo.tables import format_demo

    run = run_demo(options.out, options.seed, QUICK if options.quick else FULL)
    print(format_demo(run))
    print(f"\nWritten to {options.out}: adapter/, model.onnx, report.json, report.html")


def _source(name: str, options: argparse.Namespace) -> Source:
    source = load_source(name, options.as_class)
    if source.note:
        print(f"Note: {source.note}.", file=sys.stderr)
    return source


def _inspect(options: argparse.Namespace) -> None:
    source = _source(options.model, options)
    report = lora2fx.inspect(source.model, source.example_inputs)
    if options.targets:
        sites = analyse(source.model, source.example_inputs, roles_needed=True).sites
        matched = {(site.weight, site.role) for site in match_sites(sites, options.targets)}
        entries = tuple(entry for entry in report.sites if (entry["weight"], entry["role"]) in matched)
        report = replace(report, sites=entries)
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)


def _adapted(options: argparse.Namespace) -> Source:
    source = _source(options.base, options)
    lora2fx.load(source.model, options.adapter)
    return source


def _write_folder(save: Callable[[Path], None], base: Path, out: Path) -> None:
    """What `save` writes, with the base folder's tokenizer and the like, written aside and moved into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "model"
        save(folder)
        for path in base.iterdir():
            wanted = path.suffix in {".json", ".txt", ".model", ".jinja"} and not path.name.endswith(".index.json")
            if wanted and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        folder.replace(out)


def _fold_loaded(options: argparse.Namespace, base: Path, out: Path) -> None:
    """Build the model, fold it, save it as transformers does."""
    source = _source(options.base, options)
    lora2fx.load(source.model, options.adapter, allow_other_base=options.allow_other_base)
    save = getattr(source.model, "save_pretrained", None)
    if save is None:
        raise SourceError(f"{base} is no transformers model; lora2fx export --safetensors writes its merged weights.")
    print(lora2fx.fold(source.model, rounding=options.rounding))
    _write_folder(save, base, out)


def _fold(options: argparse.Namespace) -> None:
    base, out = Path(options.base), Path(options.out)
    if out.exists():
        raise SourceError(f"--out {out} is there already; name a new folder.")
    if options.as_class is None and base.is_dir():
        allowed = options.allow_other_base
        print(fold_checkpoint(base, options.adapter, out, rounding=options.rounding, allow_other_base=allowed))
    else:
        _fold_loaded(options, base, out)
    print(f"Written to {out}")


def _export(options: argparse.Namespace) -> None:
    source = _adapted(options)
    if options.onnx is not None:
        print(lora2fx.exporters.export_onnx(source.model, options.onnx, example_inputs=source.example_inputs))
    elif options.safetensors is not None:
        print(lora2fx.exporters.export_safetensors(source.model, options.safetensors))
    else:
        print(lora2fx.exporters.export_peft(source.model, options.peft))


def _add_adapted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help=f"the base model: {MODEL_HELP}")
    parser.add_argument("--adapter", required=True, type=Path, metavar="FOLDER", help="what lora2fx.save wrote")
    _add_class(parser)


def _add_class(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as",
        dest="as_class",
        metavar="CLASS",
        help="the transformers class to load a folder as, such as AutoModelForSequenceClassification"
        " (default: the one that its config names)",
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand sets `run`."""
    parser = argparse.ArgumentParser(prog="lora2fx", description="An adapter compiler for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lora2fx {lora2fx.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, adapt, prune, fold and export a small model; under a minute")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where its files go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few steps of one seed: shows the way, not the accuracy")
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="what each weight of a model does and how it would be adapted")
    inspect.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    inspect.add_argument(
        "--targets",
        nargs="+",
        metavar="TARGET",
        help="show only what these would adapt: roles (query, ffn), names (q_proj), patterns (encoder.*.dense)",
    )
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_class(inspect)
    inspect.set_defaults(run=_inspect)

    fold = commands.add_parser(
        "fold",
        help="merge an adapter into its base: a plain model folder",
        description="Merge an adapter into its base folder, tensor by tensor, without loading the model; a run that was"
        " cut off is gone on with. With --as the model is loaded and saved as that class instead.",
    )
    _add_adapted(fold)
    fold.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a folder that is not there yet")
    fold.add_argument(
        "--rounding",
        choices=get_args(Rounding),
        default="nearest",
        help="of 16-bit weights: adapter keeps small updates that nearest loses (default: %(default)s)",
    )
    fold.add_argument("--allow-other-base", action="store_true", help="merge into weights other than those of training")
    fold.set_defaults(run=_fold)

    export = commands.add_parser("export", help="write an adapted model as ONNX, merged safetensors, or plain LoRA")
    _add_adapted(export)
    kinds = export.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--onnx", type=Path, metavar="FILE", help="merged, as ONNX, checked against PyTorch")
    kinds.add_argument("--safetensors", type=Path, metavar="FILE", help="the merged weights")
    kinds.add_argument("--peft", type=Path, metavar="FOLDER", help="plain LoRA in PEFT's format")
    export.set_defaults(run=_export)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 2 on misuse)."""
    options = build_parser().parse_args(arguments)
    command: Command = options.run
    try:
        command(options)
    except SourceError as error:
        print(f"lora2fx: {error}", file=sys.stderr)
        return 2
    except Lora2fxError as error:
        print(f"lora2fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
