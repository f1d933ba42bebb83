"""What a machine does to a run, told in a sentence: a full disk, too little memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora2fx.errors import Lora2fxError, RunError
from lora2fx.finetuning.folder import complete_checkpoints, drop_incomplete

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROOM = 2**20
"""Bytes; with less a disk counts as full."""


@contextmanager
def told_failures(out: Path) -> Iterator[None]:
    """Raise `RunError` for a full disk and for too little memory; no half-written checkpoint stays."""
    try:
        yield
    except Lora2fxError:
        raise
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device has too little memory. Start a new run with a smaller --batch and as much more --accumulate,"
            " a smaller --length, --checkpointing or --dtype bfloat16."
        ) from error
    except Exception as error:
        drop_incomplete(out)
        if not is_full(error, out):
            raise
        kept = complete_checkpoints(out)
        way = f"go on with: lora2fx train --out {out} --resume" if kept else "start again; nothing was trained yet."
        raise RunError(f"the disk of {out} is full. Free some space, then {way}") from error


def is_full(error: BaseException, out: Path) -> bool:
    """Whether an error comes from a disk without room; PyTorch's writer doesn't say so, the disk does."""
    found: BaseException | None = error
    while found is not None:
        if (isinstance(found, OSError) and found.errno in FULL) or "No space left" in str(found):
            return True
        found = found.__cause__ or found.__context__
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free < ROOM
