"""Which of a checkpoint's tensors an adapter changes, and which it adds where tied weights part; none is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import FormatError
from lora2fx.exporters.base_folder import read_config
from lora2fx.exporters.shards import Checkpoint, Stored
from lora2fx.exporters.stored_names import Naming, find_naming
from lora2fx.storage_format import Manifest
from lora2fx.storage_tensors import check_tensor


@dataclass(frozen=True)
class Copied:
    """A tensor that the merged checkpoint holds under a name of its own, since it was tied to `source`."""

    name: str
    source: Stored


@dataclass(frozen=True)
class Plan:
    """By stored name the adapted weight and the trained tensor's name; the added tensors; how names were mapped."""

    weights: dict[str, str]
    trained: dict[str, str]
    added: tuple[Copied, ...]
    naming: Naming


def weights_of(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Adapter]]:
    """By adapted weight its adapters by name: three for a fused QKV."""
    found: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        found.setdefault(adapter.site.weight, {})[name] = adapter
    return found


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint.folder)
    if config is not None and "quantization_config" in config:
        raise FormatError(
            f"{checkpoint.folder} is quantised (config.json has a quantization_config): its tensors are no weights that"
            " ΔW could be added to. Fold into the checkpoint that it was quantised from."
        )


def _parted(manifest: Manifest, naming: Naming, stored: Mapping[str, Stored]) -> tuple[Copied, ...]:
    """Every name of a tied weight, of which at least one is adapted, that has no tensor of its own yet."""
    found: dict[str, Copied] = {}
    for weight, others in manifest.untied.items():
        names = [naming.stored(name) for name in (weight, *others)]
        source = next(stored[name] for name in names if name in stored)
        found |= {name: Copied(name, source) for name in names if name not in stored}
    return tuple(found.values())


def plan_merge(checkpoint: Checkpoint, manifest: Manifest, trained: Mapping[str, Tensor]) -> Plan:
    """Find every adapted weight and trained tensor in the checkpoint, of the right shape and dtype.

    Raises `FormatError` where one is missing or doesn't fit.
    """
    _refuse_quantised(checkpoint)
    stored = checkpoint.tensors
    sites = {saved.site.weight: saved.site for saved in manifest.sites}
    if odd := set(manifest.untied) - set(sites):
        raise FormatError(f"adapter.json: untied names {sorted(odd)[0]!r}, which is not adapted.")
    if strangers := [
        name for name in trained if not any(name.startswith(path + ".") for path in manifest.modules_to_save)
    ]:
        raise FormatError(f"the adapter's file has an unknown {strangers[0]!r}.")
    alternatives = [(weight, *manifest.untied.get(weight, ())) for weight in sites] + [(name,) for name in trained]
    naming = find_naming(alternatives, stored, str(checkpoint.folder)) if alternatives else Naming()
    added = _parted(manifest, naming, stored)
    known = stored | {copied.name: copied.source for copied in added}
    for weight, site in sites.items():
        found = known[naming.stored(weight)]
        if found.shape != site.shape or found.dtype is None or not found.dtype.is_floating_point:
            raise FormatError(
                f"{found.path.name} holds {found.name} as {found.kind} {found.shape}; the adapter is for a"
                f" floating-point weight {weight} of shape {site.shape}."
            )
    for name, tensor in trained.items():
        found = stored[naming.stored(name)]
        if found.dtype is None:
            raise FormatError(f"{found.path.name} holds {found.name} as {found.kind}, which {name} can't be.")
        check_tensor(name, tensor, found.shape, found.dtype)
    weights = {naming.stored(weight): weight for weight in sites}
    return Plan(weights, {naming.stored(name): name for name in trained}, added, naming)
