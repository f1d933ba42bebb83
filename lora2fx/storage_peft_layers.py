"""The LoRA layers of a PEFT folder → the sites of a model, every shape and dtype checked before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lora2fx.errors import FormatError
from lora2fx.site import Layout, Site
from lora2fx.storage_peft_config import PeftConfig
from lora2fx.storage_peft_tensors import Announced
from lora2fx.storage_tensors import FLOATS, SPARE

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OUT_IN, IN_OUT = Layout((1,), (0,)), Layout((0,), (1,))


@dataclass(frozen=True)
class PeftLayer:
    """One adapted module: its whole weight's site, its rank, its factors' names in the file; an embedding's padding."""

    site: Site
    rank: int
    names: dict[str, str]
    padding: int | None = None

    def factors(self, tensors: Mapping[str, Tensor], wide: bool) -> dict[str, Tensor]:
        """A (r, in), B (out, r) and AdaLoRA's lam (r,), as lora2fx's adapters hold them; float64 if `wide`."""
        dtype = torch.float64 if wide else torch.float32
        shapes = {"A": (self.rank, -1), "eA": (self.rank, -1), "E": (self.rank,)}
        own = {"eA": "A", "eB": "B", "E": "lam"}
        found = {
            own.get(kind, kind): tensors[name].reshape(shapes.get(kind, (-1, self.rank))).to(dtype).contiguous()
            for kind, name in self.names.items()
            if kind != "ranknum"
        }
        kept = torch.ones(self.rank, dtype=torch.bool)
        return {**found, "mask": kept, "keep": kept.clone()}


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer whose weight lies (in, out); told by name and module, to import nothing."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def _layout(module: nn.Module, embedding: bool, kind: str) -> Layout | None:
    """How PEFT reads the module's weight; None where it has no such LoRA layer for it."""
    if embedding or isinstance(module, nn.Embedding):
        return IN_OUT if embedding and isinstance(module, nn.Embedding) and module.max_norm is None else None
    if isinstance(module, _CONVOLUTIONS) and (kind == "LORA" or isinstance(module, nn.Conv2d)):
        plain = module.groups == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}
        return Layout(tuple(range(1, module.weight.dim())), (0,)) if plain else None
    if is_conv1d(module):
        return IN_OUT
    return OUT_IN if isinstance(module, nn.Linear) else None


def _site(path: str, module: nn.Module, names: Mapping[str, str], kind: str) -> Site:
    weight = module._parameters.get("weight")
    layout = _layout(module, "eA" in names or "eB" in names, kind)
    if layout is None or weight is None:
        raise FormatError(
            f"the adapter's {path} is a {type(module).__name__} here, for which PEFT has no such {kind} layer, or one"
            " that computes another ΔW (grouped, dilated or padded convolutions, rescaled embeddings)."
        )
    role = "embedding" if isinstance(module, nn.Embedding) else "unknown"
    if isinstance(module, _CONVOLUTIONS):
        role = "conv"
    return Site(f"{path}.weight", path, "weight", tuple(weight.shape), layout, role, "named by a PEFT adapter")


def _shapes(site: Site, rank: int, kind: str) -> dict[str, tuple[int, ...]]:
    """The factors' shapes as PEFT stores them."""
    if kind == "ADALORA":
        return {"A": (rank, site.in_features), "E": (rank, 1), "B": (site.out_features, rank)}
    if site.role == "embedding":
        return {"eA": (rank, site.in_features), "eB": (site.out_features, rank)}
    kernel = site.shape[2:] if site.role == "conv" else ()
    ones = tuple(1 for _ in kernel)
    return {"A": (rank, site.in_features // prod(kernel), *kernel), "B": (site.out_features, rank, *ones)}


def _check_factors(site: Site, rank: int, names: Mapping[str, str], announced: Announced, kind: str) -> None:
    wanted = _shapes(site, rank, kind)
    if odd := sorted((set(names) - {"ranknum"}) ^ set(wanted)):
        raise FormatError(f"{site.owner}: the file lacks, or has too much: {', '.join(odd)} of its LoRA factors.")
    if rank * (site.in_features + site.out_features) > SPARE + 4 * prod(site.shape):
        raise FormatError(f"{site.owner}: rank {rank} is far more than a weight of shape {site.shape} can use.")
    dtypes = {announced.tensors[names[factor]].dtype for factor in wanted}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise FormatError(f"{site.owner}: its factors are of {', '.join(map(str, dtypes))}, not of one float dtype.")
    for factor, shape in wanted.items():
        found = tuple(announced.tensors[names[factor]].shape)
        if found != shape:
            raise FormatError(f"{names[factor]} has the shape {found} in the file; it must be {shape}.")


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _check_targets(model: nn.Module, config: PeftConfig, announced: Announced) -> None:
    """The tensors' modules are those that adapter_config.json names, all of them where it left none out."""
    if config.targets is None:
        return
    for path in announced.layers:
        if not any(_named(path, name) for name in config.targets):
            raise FormatError(f"the file has LoRA factors for {path}, which target_modules does not name.")
    if not config.all_targets:
        return
    for path, module in model.named_modules():
        adaptable = isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) or is_conv1d(module)
        heads = any(_named(part, name) for name in config.modules_to_save for part in _prefixes(path))
        if adaptable and not heads and path not in announced.layers:
            name = next((name for name in config.targets if _named(path, name)), None)
            if name is not None:
                raise FormatError(
                    f"target_modules names {name!r}, and the file has no LoRA factors for {path}: it is incomplete, or"
                    f" made for another model than {type(model).__name__}."
                )


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]


def peft_layers_of(model: nn.Module, config: PeftConfig, announced: Announced) -> list[PeftLayer]:
    """Every adapted module whose rank is not 0. Raises `FormatError` where one doesn't fit the model."""
    _check_targets(model, config, announced)
    if odd := sorted(set(config.kept) - set(announced.layers)):
        raise FormatError(
            f"adapter_config.json: rank_pattern names {odd[0][:80]!r}, for which the file has no factors."
        )
    layers, modules = [], {path: module for path, module in model.named_modules() if path}
    for path, names in announced.layers.items():
        if path not in modules:
            raise FormatError(
                f"the adapter is for a module {path[:200]!r}, which {type(model).__name__} does not have."
            )
        site, rank = _site(path, modules[path], names, config.kind), config.rank(path)
        _check_factors(site, rank, names, announced, config.kind)
        if rank:
            padding = modules[path].padding_idx if isinstance(modules[path], nn.Embedding) else None
            layers.append(PeftLayer(site, rank, names, padding))
    if not layers:
        raise FormatError("every LoRA of the folder has rank 0: there is nothing to load.")
    return layers
