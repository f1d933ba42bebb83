"""adapter_config.json, as PEFT writes it: strict reading of a LoRA's or AdaLoRA's; what would change ΔW is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from lora2fx.errors import FormatError
from lora2fx.storage_files import MANIFEST, read_json
from lora2fx.storage_names import NamePattern, parse_pattern

V = TypeVar("V")
CONFIG = "adapter_config.json"
KINDS = ("LORA", "ADALORA")
_UNREAD = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step", "fan_in_fan_out"),
}
"""Where the adapter comes from, how its modules were chosen and its ranks pruned: nothing that ΔW depends on."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw the factors that leave the base weights alone."""
_METHODS = {
    "use_dora": "DoRA rescales whole weights, so that there is no low-rank ΔW",
    "lora_bias": "its lora_B has a bias, which ΔW does not hold",
    "target_parameters": "it adapts bare parameters through PEFT's ParamWrapper",
    "trainable_token_indices": "it trains single rows of the embedding",
    "layer_replication": "it repeats the base model's layers",
    "alora_invocation_tokens": "it acts only after invocation tokens",
    "ensure_weight_tying": "it ties adapters of different modules to each other",
}


@dataclass(frozen=True)
class PeftConfig:
    """What a PEFT folder says of its LoRA. `ranks` and `alphas` by pattern, the first that fits counts.

    `targets` are the literal names that modules end in, None where PEFT chose them by a regular expression or by
    type. `all_targets`: whether every module of such a name must be there. `kept` (AdaLoRA): ranks by lora_E's name.
    """

    kind: str
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    orth_reg_weight: float
    bias: str
    ranks: tuple[tuple[NamePattern, int], ...]
    alphas: tuple[tuple[NamePattern, float], ...]
    kept: dict[str, int]
    targets: tuple[str, ...] | None
    all_targets: bool
    modules_to_save: tuple[str, ...]

    def rank(self, path: str) -> int:
        """The rank of the module's LoRA."""
        if self.kind == "ADALORA":
            return self.kept.get(path, self.r)
        return next((rank for pattern, rank in self.ranks if pattern.fits(path)), self.r)

    def alpha(self, path: str) -> float:
        """The lora_alpha of the module's LoRA."""
        return next((alpha for pattern, alpha in self.alphas if pattern.fits(path)), self.lora_alpha)


def _refuse(where: str, found: Any, wanted: str) -> FormatError:
    shown = repr(found)
    return FormatError(f"{CONFIG}: {where} is {shown[:80] + '…' if len(shown) > 80 else shown}, not {wanted}.")


def _count(where: str, found: Any) -> int:
    if type(found) is not int or not 1 <= found < 2**31:
        raise _refuse(where, found, "a whole number of at least 1")
    return found


def _number(where: str, found: Any) -> float:
    if type(found) not in (int, float) or abs(found) > 1e30 or not isfinite(found):
        raise _refuse(where, found, "a number")
    return float(found)


def _share(where: str, found: Any) -> float:
    share = _number(where, found)
    if not 0 <= share < 1:
        raise _refuse(where, found, "a number of at least 0 and below 1")
    return share


def _flag(where: str, found: Any) -> bool:
    if type(found) is not bool:
        raise _refuse(where, found, "true or false")
    return found


def _names(where: str, found: Any) -> tuple[str, ...]:
    texts = isinstance(found, list) and all(isinstance(name, str) and name.isprintable() and name for name in found)
    if not texts:
        raise _refuse(where, found, "a list of names")
    return tuple(found)


def _patterns(where: str, found: Any, value: Callable[[str, Any], V]) -> tuple[tuple[NamePattern, V], ...]:
    if not isinstance(found, dict):
        raise _refuse(where, found, "an object")
    return tuple((parse_pattern(where, key), value(f"{where}[{key!r}]", item)) for key, item in found.items())


def _kept(found: Any, r: int) -> dict[str, int]:
    """AdaLoRA's rank_pattern: by lora_E's name which of its r ranks are left; here by module, how many."""
    if not isinstance(found, dict):
        raise _refuse("rank_pattern", found, "an object")
    ranks: dict[str, int] = {}
    for name, mask in found.items():
        flags = isinstance(mask, list) and len(mask) == r and all(type(flag) is bool for flag in mask)
        path = name.removesuffix(".lora_E")
        if not flags or path == name:
            raise _refuse(f"rank_pattern[{name!r}]", mask, f"true or false for each of {r} ranks of a lora_E")
        ranks[path] = sum(mask)
    return ranks


def _targets(found: Any) -> tuple[str, ...] | None:
    """A regular expression from a file is never run: the tensors' own names say which modules there are."""
    return None if found is None or isinstance(found, str) else _names("target_modules", found)


def _refuse_variants(config: Mapping[str, Any], used: set[str]) -> None:
    """Whatever is switched on beside plain LoRA changes what the tensors mean, known to lora2fx or not."""
    start = config.get("init_lora_weights", True)
    if not any(start is choice or (isinstance(start, str) and start == choice) for choice in _STARTS):
        raise FormatError(
            f"{CONFIG}: init_lora_weights is {str(start)[:40]!r}, which changes the base weights before training. Have"
            " PEFT convert the adapter to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    for name, value in config.items():
        if name in used or name in _UNREAD or not value:
            continue
        why = _METHODS.get(name, "lora2fx does not know what that does to ΔW")
        raise FormatError(
            f"{CONFIG}: {name[:80]!r} is on: {why}. Only plain LoRA and AdaLoRA are read; merge with PEFT"
            " (merge_and_unload) and use the merged model instead."
        )


_USED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "orth_reg_weight", "bias", "rank_pattern"),
    *("alpha_pattern", "target_modules", "modules_to_save", "init_lora_weights", "init_r"),
}


def parse_config(config: Any) -> PeftConfig:
    """Check every entry of adapter_config.json. Raises `FormatError`, naming the entry."""
    if not isinstance(config, dict):
        raise _refuse("the file", config, "an object")
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise FormatError(
            f"{CONFIG}: peft_type is {str(kind)[:40]!r}; lora2fx reads {' and '.join(KINDS)}. Merge the adapter with"
            " PEFT (merge_and_unload) and use the merged model instead."
        )
    _refuse_variants(config, _USED)
    ada = kind == "ADALORA"
    r = _count("init_r", config.get("init_r", 12)) if ada else _count("r", config.get("r", 8))
    pattern = config.get("rank_pattern") or {}
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only") or not isinstance(bias, str):
        raise _refuse("bias", bias, "one of none, all, lora_only")
    return PeftConfig(
        kind,
        r,
        _number("lora_alpha", config.get("lora_alpha", 8)),
        _share("lora_dropout", config.get("lora_dropout", 0.0)),
        _flag("use_rslora", config.get("use_rslora", False)) and not ada,
        _number("orth_reg_weight", config.get("orth_reg_weight", 0.5)),
        bias,
        () if ada else _patterns("rank_pattern", pattern, _count),
        () if ada else _patterns("alpha_pattern", config.get("alpha_pattern") or {}, _number),
        _kept(pattern, r) if ada else {},
        _targets(config.get("target_modules")),
        not any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")),
        _names("modules_to_save", config.get("modules_to_save") or []),
    )


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder is PEFT's and none that `lora2fx.save` wrote."""
    return os.path.lexists(folder / CONFIG) and not os.path.lexists(folder / MANIFEST)


def read_config(folder: Path) -> PeftConfig:
    """The folder's adapter_config.json. Raises `FormatError`."""
    return parse_config(read_json(folder / CONFIG))
