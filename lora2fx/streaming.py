"""`fold_checkpoint`: base folder + adapter folder → merged folder, tensor by tensor; no model is built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import ExportError, FormatError
from lora2fx.exporters.base_folder import copy_settings, write_index
from lora2fx.exporters.resuming import Partial, check_new, resumable
from lora2fx.exporters.shards import Checkpoint, open_checkpoint
from lora2fx.exporters.streaming import Edit, Part, plan_shard, shard_size, write_shard
from lora2fx.passes.adding import write_measured
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.passes.fold import check_schedule, finished, lost_adaptation, warn_lost, warn_unfinished
from lora2fx.passes.merging import Merge, check_merges
from lora2fx.passes.rounding import Rounding, check_rounding
from lora2fx.program import Method, Program, Record
from lora2fx.reports import Report
from lora2fx.storage_adapters import read_adapters, read_description
from lora2fx.storage_files import digest, tensor_digest
from lora2fx.storage_peft_config import is_peft_folder
from lora2fx.stream_plan import Plan, plan_merge, weights_of

Folder = str | os.PathLike[str]
CALLER = 3
"""The frames from a warning to who called `fold_checkpoint`."""


@dataclass(frozen=True)
class _Merging:
    """How weights are merged: by weight the adapters and the digest of what they were trained on (None: any)."""

    adapters: dict[str, dict[str, Adapter]]
    digests: Mapping[str, str | None]
    rounding: Rounding
    seed: int

    def edit(self, weight: str, measured: dict[str, Any]) -> Edit:
        """What merges that weight, and notes by adapter what that did."""

        def merge_in(tensor: Tensor) -> None:
            wanted = self.digests[weight]
            if wanted is not None and tensor_digest(tensor) != wanted:
                raise FormatError(
                    f"{weight} is not the base weight that the adapter was trained on (its SHA-256 differs). Name the"
                    " right base in the dtype of the training, or allow another one (allow_other_base=True,"
                    " --allow-other-base); nothing was written."
                )
            merge = Merge(nn.Parameter(tensor, requires_grad=False), self.adapters[weight])
            check_merges([merge])
            measured.update(write_measured(merge, self.rounding, self.seed))

        return merge_in


def _replace(value: Tensor) -> Edit:
    def copy_in(tensor: Tensor) -> None:
        tensor.copy_(value)

    return copy_in


def _parts(
    checkpoint: Checkpoint, plan: Plan, merging: _Merging, trained: Mapping[str, Tensor], measured: dict[str, Any]
) -> list[list[Part]]:
    """By file of the checkpoint its tensors, each with what changes it."""
    edits = {name: merging.edit(weight, measured) for name, weight in plan.weights.items()}
    edits |= {name: _replace(trained[own]) for name, own in plan.trained.items()}
    added = [Part(copied.name, copied.source, edits.get(copied.name)) for copied in plan.added]
    return [plan_shard(shard, edits, added) for shard in checkpoint.shards]


def _identity(checkpoint: Checkpoint, sealed: str, merging: _Merging) -> str:
    """Tells this merge from any other: the base's files, the adapter's, and how they are merged."""
    files = [(s.path.name, s.size, s.path.stat().st_mtime_ns, sorted(s.header)) for s in checkpoint.shards]
    return digest(repr((files, sealed, sorted(merging.digests.items()), merging.rounding, merging.seed)).encode())


def _check_space(place: Path, needed: int) -> None:
    existing = next(folder for folder in (place.parent, *place.parent.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ExportError(f"{place} needs {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left.")


def _write(checkpoint: Checkpoint, parts: Sequence[Sequence[Part]], plan: Plan, partial: Partial) -> dict[str, Any]:
    for shard, own in zip(checkpoint.shards, parts, strict=True):
        write_shard(shard, own, partial)
    copied, left_out = copy_settings(checkpoint, partial.folder, bool(plan.added))
    added = {extra.name: extra.source.path.name for extra in plan.added}
    write_index(checkpoint, partial.folder, added, [extra.source.stop - extra.source.start for extra in plan.added])
    return {"shards": [shard.path.name for shard in checkpoint.shards], "copied": copied, "left_out": left_out}


def fold_checkpoint(
    base: Folder,
    adapter: Folder,
    out: Folder,
    *,
    strict: bool = True,
    rounding: Rounding = "nearest",
    seed: int = 0,
    allow_other_base: bool = False,
    methods: Sequence[type[Method]] = (),
) -> Report:
    """Merge a saved adapter into a safetensors checkpoint: `out` holds what `load`, `fold` and saving would give.

    One tensor at a time is in memory, beside the adapter. Every tensor is copied as it is but for the adapted ones
    (rounded as in `fold`, to the same bits) and those trained whole; configs and tokenizers are carried over, weights
    in other formats are left out. Weights that were tied and are adapted get tensors of their own, and config.json
    says so. The folder appears whole or not at all; a run that was cut off is gone on with by the same call.

    `allow_other_base` skips the comparison of the base weights' digests; `strict`, `rounding`, `seed` as for `fold`;
    `methods` as for `load`. The report has the fold's entries, and says which files were copied and left out.

    Raises `FormatError` (an adapter that can't be trusted; a base that is damaged, quantised, or whose names and
    shapes are not the adapter's), `ScheduleError`, `AdapterError` and `MethodError` as `fold` does, and `ExportError`
    (`out` is taken, or the disk too small); nothing is left behind then.
    """
    check_rounding(rounding)
    place, folder = Path(out), Path(adapter)
    check_new(place)
    if is_peft_folder(folder):
        raise FormatError(
            f"{folder} is a PEFT adapter, which says too little of its weights to be merged tensor by tensor. Load it"
            " on the model, lora2fx.load(model, folder), then lora2fx.fold(model)."
        )
    described = read_description(folder, methods)
    checkpoint = open_checkpoint(Path(base))
    size = sum(stored.stop - stored.start for stored in checkpoint.tensors.values())
    adapters, trained = read_adapters(folder, described, {}, size if described.manifest.modules_to_save else 0)
    plan = plan_merge(checkpoint, described.manifest, trained)
    program = Program(nn.Module(), nn.Module(), Record(described.method, frozenset()), adapters)
    status = check_schedule(program, strict)
    program = finished(program)
    counts = totals(program) | {"trainable": 0, "base_parameters": checkpoint.elements}
    if status is not None:
        warn_unfinished(status, counts, CALLER)
    digests = {saved.site.weight: None if allow_other_base else saved.sha256 for saved in described.manifest.sites}
    merging = _Merging(weights_of(program.adapters), digests, rounding, seed)
    with resumable(place, _identity(checkpoint, described.seal + described.manifest.sha256, merging)) as partial:
        resumed, measured = partial.resumed, partial.notes.setdefault("sites", {})
        parts = _parts(checkpoint, plan, merging, trained, measured)
        sizes = sum(shard_size(shard, own) for shard, own in zip(checkpoint.shards, parts, strict=True))
        _check_space(place, sizes - sum(partial.done.values()))
        details = _write(checkpoint, parts, plan, partial)
    sites = tuple(adapter_entry(name, own) | measured[name] for name, own in program.adapters.items())
    details |= {
        "bytes": sizes,
        "resumed": resumed,
        "prefix": {"left_out": plan.naming.left_out, "added": plan.naming.added},
        "untied": [copied.name for copied in plan.added],
        "modules_to_save": list(described.manifest.modules_to_save),
        "max_rounding_error": max((site["rounding_error"] for site in sites), default=0.0),
        "lost_adaptation": lost_adaptation(sites),
    }
    warn_lost(details["lost_adaptation"], CALLER)
    verify = {"status": "passed", "max_error": None, "checks": ["the base weights' digests"]}
    if allow_other_base:
        verify = {"status": "UNVERIFIED", "max_error": None, "checks": [], "reason": "allow_other_base=True"}
    return Report(f"fold {checkpoint.folder.name} + {folder.name}", sites, counts, verify, details)
