"""What a PEFT folder holds beside LoRA factors: modules trained whole, trained biases, and copies of base weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora2fx.errors import FormatError
from lora2fx.site import Site
from lora2fx.storage_peft_config import PeftConfig
from lora2fx.storage_peft_tensors import Announced


@dataclass(frozen=True)
class Rest:
    """The modules trained whole; by name in the model the file's names of their tensors, of biases and of base weights.

    `repeats` are heads' tensors that PEFT wrote twice, as it does with bias="all".
    """

    modules: tuple[str, ...]
    heads: dict[str, str]
    biases: dict[str, str]
    copies: dict[str, str]
    repeats: dict[str, str]

    def trained_biases(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The biases that are not the model's own."""
        state = model.state_dict(keep_vars=True)
        return {own: name for own, name in self.biases.items() if not _same(tensors[name], state[own])}

    def check_base(self, model: nn.Module, tensors: Mapping[str, Tensor], allowed: bool) -> None:
        """Raise `FormatError` where the file's base weights aren't the model's; if `allowed`, the model's stay."""
        for own, name in self.repeats.items():
            if own not in self.heads or not torch.equal(tensors[name], tensors[self.heads[own]]):
                raise FormatError(f"the file holds {own} more than once, with different values.")
        state = model.state_dict(keep_vars=True)
        for own, name in self.copies.items():
            if not allowed and not _same(tensors[name], state[own]):
                raise FormatError(
                    f"the file holds {own}, a weight of the base model, with other values than here: it would overwrite"
                    " it. Load the right base model, or pass allow_other_base=True to keep this one's."
                )


def _same(found: Tensor, own: Tensor) -> bool:
    return torch.equal(found.to(own.dtype), own.detach().cpu())


def _saved_modules(model: nn.Module, config: PeftConfig) -> tuple[str, ...]:
    """The outermost modules that modules_to_save names by full name or dotted suffix."""
    paths = [path for path, module in model.named_modules() if path and module.state_dict()]
    found = [path for path in paths if any(path == n or path.endswith("." + n) for n in config.modules_to_save)]
    return tuple(path for path in found if not any(path.startswith(other + ".") for other in found))


def _refuse_unknown(own: str, bias: str) -> None:
    if "lora_magnitude_vector" in own:
        raise FormatError(f"the file holds {own[:120]!r}: that is DoRA, which rescales whole weights. Merge with PEFT.")
    if ".lora_" in own:
        raise FormatError(f"the file holds {own[:120]!r}, which is no factor of plain LoRA. Merge with PEFT instead.")
    raise FormatError(f"the file has an unknown {own[:120]!r} (bias={bias!r}): no tensor of the model has this name.")


def _check_head(name: str, found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape:
        raise FormatError(f"{name} has the shape {tuple(found.shape)} in the file; it must be {tuple(own.shape)}.")
    if found.is_floating_point() != own.is_floating_point():
        raise FormatError(f"{name} is {found.dtype} in the file; the model's is {own.dtype}.")


def sort_rest(model: nn.Module, config: PeftConfig, announced: Announced, sites: Sequence[Site]) -> Rest:
    """Which of the other tensors are heads and which are copies of base weights.

    Raises `FormatError` for one that is neither, one of another shape, and a head that is incomplete.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    modules = _saved_modules(model, config)
    adapted = {site.owner for site in sites}
    if inside := [path for path in modules if any((owner + ".").startswith(path + ".") for owner in adapted)]:
        raise FormatError(f"adapter_config.json: {inside[0]} is both in modules_to_save and adapted.")
    wanted = {name for name in state if any(name.startswith(path + ".") for path in modules)}
    heads: dict[str, str] = {}
    biases: dict[str, str] = {}
    copies: dict[str, str] = {}
    repeats: dict[str, str] = {}
    for own, name in announced.others.items():
        plain = re.sub(r"\.(base_layer|original_module|modules_to_save)\.", ".", own)
        if plain not in state:
            _refuse_unknown(own, config.bias)
        _check_head(name, announced.tensors[name], state[plain])
        bias = config.bias != "none" and plain.rpartition(".")[2] == "bias"
        if ".modules_to_save." in own:
            repeats[plain] = name
        elif ".original_module." in own or (plain not in wanted and not bias):
            copies[plain] = name
        else:
            (heads if plain in wanted else biases)[plain] = name
    if missing := sorted(wanted - set(heads)):
        raise FormatError(f"the file lacks {missing[0]!r} of a module in modules_to_save ({len(missing)} such in all).")
    return Rest(modules, heads, biases, copies, repeats)
