"""Models adapted by hand with trained-looking factors, for tests of the exporters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lora2fx.adapter import Adapter
from lora2fx.methods.lora import LoRA
from lora2fx.passes.rewrite import child_name, plan_rewrite, rewrite_owners
from lora2fx.program import RECORD, Method, Program, Record
from lora2fx.site import Layout, Site

Columns = tuple[tuple[int, int], ...]
OUT_IN, IN_OUT = Layout(contracted=(1,), free=(0,)), Layout(contracted=(0,), free=(1,))


def site_of(model: nn.Module, weight: str, layout: Layout = OUT_IN, columns: Columns | None = None) -> Site:
    owner, _, parameter = weight.rpartition(".")
    shape = tuple(model.get_parameter(weight).shape)
    role = "unknown" if columns is None else f"part{columns[0][0]}"
    return Site(weight, owner, parameter, shape, layout, role, columns=columns)


def adapt(
    model: nn.Module,
    sites: list[Site] | list[str],
    ranks: Mapping[str, int] | None = None,
    size: float = 0.2,
    method: Method | None = None,
    outside_reads: frozenset[str] = frozenset(),
) -> nn.Module:
    """`model` with an adapter of random factors on every site, in place; `ranks` by weight, 3 where not given."""
    model.eval()
    found = [site_of(model, site) if isinstance(site, str) else site for site in sites]
    adapters: dict[str, Adapter] = {}
    generator = torch.Generator().manual_seed(5)
    for site in found:
        rank = (ranks or {}).get(site.weight, 3)
        adapter = (LoRA(r=max(rank, 1), lora_alpha=max(rank, 1)) if method is None else method).adapter(site)
        adapter.to(model.get_parameter(site.weight).dtype)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            if rank == 0:
                next(iter(adapter.axes().values())).mask.fill_(False)
        adapters[f"{site.owner}.{child_name(site)}".lstrip(".")] = adapter
    record = Record(LoRA(r=3), frozenset(name for name, p in model.named_parameters() if p.requires_grad))
    program = Program(model, model, record, adapters)
    plans = {name: plan_rewrite(model, adapter.site, outside_reads) for name, adapter in adapters.items()}
    rewrite_owners(program, plans)
    setattr(model, RECORD, record)
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that an export must leave as it is, to be compared with `==`."""
    values = {name: value.clone().numpy().tobytes() for name, value in model.state_dict().items()}
    flags = {name: (type(module), module.training, id(module)) for name, module in model.named_modules()}
    trained = {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()}
    config = getattr(model, "config", None)
    switches = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
    return {
        "values": values,
        "flags": flags,
        "trained": trained,
        "config": None if config is None else (config.to_dict(), config._attn_implementation),
        "switches": switches,
        "random": torch.get_rng_state().numpy().tobytes(),
    }
