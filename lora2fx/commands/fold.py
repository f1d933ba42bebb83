"""`lora2fx fold`: an adapter merged into its base, as a plain model folder."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import lora2fx
from lora2fx.commands.naming import add_adapted, named_source
from lora2fx.passes.rounding import Rounding
from lora2fx.sources import SourceError
from lora2fx.storage_peft_config import is_peft_folder
from lora2fx.streaming import fold_checkpoint

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    fold = commands.add_parser(
        "fold",
        help="merge an adapter into its base: a plain model folder",
        description="Merge an adapter into its base folder, tensor by tensor, without loading the model; a run that was"
        " cut off is gone on with. With --as, and for PEFT's adapters, the model is loaded and saved instead.",
    )
    add_adapted(fold)
    fold.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a folder that is not there yet")
    fold.add_argument(
        "--rounding",
        choices=get_args(Rounding),
        default="nearest",
        help="of 16-bit weights: adapter keeps small updates that nearest loses (default: %(default)s)",
    )
    fold.add_argument("--allow-other-base", action="store_true", help="merge into weights other than those of training")
    fold.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    base, out = Path(options.base), Path(options.out)
    if out.exists():
        raise SourceError(f"--out {out} is there already; name a new folder.")
    if options.as_class is None and base.is_dir() and not is_peft_folder(options.adapter):
        allowed = options.allow_other_base
        print(fold_checkpoint(base, options.adapter, out, rounding=options.rounding, allow_other_base=allowed))
    else:
        _fold_loaded(options, base, out)
    print(f"Written to {out}")


def _fold_loaded(options: argparse.Namespace, base: Path, out: Path) -> None:
    """Build the model, fold it, save it as transformers does."""
    source = named_source(options.base, options)
    given, allowed = source.example_inputs, options.allow_other_base
    lora2fx.load(source.model, options.adapter, allow_other_base=allowed, example_inputs=given)
    save = getattr(source.model, "save_pretrained", None)
    if save is None:
        raise SourceError(f"{base} is no transformers model; lora2fx export --safetensors writes its merged weights.")
    print(lora2fx.fold(source.model, rounding=options.rounding))
    _write_folder(save, base, out)


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
