"""The compiler's front door: record → match → rewrite → verify, all or nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lora2fx.adapter import Adapter
from lora2fx.analysis import ModelAnalysis, analyse
from lora2fx.baselines import install_baseline, verify_baseline
from lora2fx.errors import AdapterError, MethodError, RewriteError
from lora2fx.heads import saved_modules
from lora2fx.inputs import ExampleInputs
from lora2fx.installation import all_or_nothing, install, install_verified, originals
from lora2fx.methods.hyperparameters import refuse_unmatched
from lora2fx.methods.lora2 import LoRA2
from lora2fx.passes.install import Adapted
from lora2fx.passes.match import coverage, match_sites
from lora2fx.passes.merging import is_foldable, largest
from lora2fx.passes.rewrite import child_name, plan_rewrite
from lora2fx.passes.state import unscanned
from lora2fx.passes.verify import reference_outputs
from lora2fx.program import RECORD, Baseline, Method, Program, Record, refuse_other
from lora2fx.reports import site_entry
from lora2fx.sharding import is_replicated, is_sharded
from lora2fx.site import Site
from lora2fx.targets import Targets, needs_roles
from lora2fx.ties import check_untied, untie_config, untie_weight

_LOG = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
DEFAULT_TARGETS = ("query", "key", "value", "ffn")


def refuse_adapted(model: nn.Module, asked: str) -> None:
    """Raise `AdapterError` where the model is none, holds adapters, or is spread over devices or processes."""
    refuse_other(model, asked)
    if is_sharded(model):
        raise AdapterError(
            f"{asked}: {type(model).__name__} is sharded over several processes already. Do this first and"
            " fully_shard(model) afterwards."
        )
    if is_replicated(model):
        raise AdapterError(
            f"{asked}: {type(model).__name__} is, or holds, a DataParallel or DistributedDataParallel, which never"
            " synchronises adapters that come later. Do this first and wrap the model afterwards."
        )
    if any(isinstance(module, (Adapted, Adapter)) or RECORD in vars(module) for module in model.modules()):
        raise AdapterError(
            f"{asked}: {type(model).__name__} already holds adapters. lora2fx.fold(model) merges them,"
            " lora2fx.unload(model) takes them off; then it can be transformed again."
        )


def make_adapter(model: nn.Module, site: Site, method: Method) -> Adapter:
    """A fresh adapter on the weight's device, float32 or wider. Raises `MethodError` for one that doesn't fit."""
    weight = model.get_parameter(site.weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapter = method.adapter(site)
    _refuse_misshapen(adapter, site)
    return adapter.to(device=weight.device, dtype=dtype)


@torch.no_grad()
def _refuse_misshapen(adapter: Adapter, site: Site) -> None:
    name = type(adapter).__name__
    if not adapter.axes():
        raise MethodError(
            f"{name}.axes() names no axis, so that nothing says how many ranks there are. Return one even where nothing"
            ' is pruned: {"rank": Axis(self.mask, self.keep)}, two bool buffers with an element for each rank.'
        )
    left, right = tuple(adapter.left().shape), tuple(adapter.right().shape)
    k = left[-1] if left else 0
    wanted = (*site.batch_shape, site.in_features, k), (*site.batch_shape, k, site.out_features)
    if (left, right) != wanted:
        raise MethodError(
            f"{name} of {site.weight}: left() is {left} and right() {right}. They must be (*batch, in, k) and (*batch,"
            f" k, out), here with batch {tuple(site.batch_shape)}, in {site.in_features} and out {site.out_features}."
        )


def _refuse_classes(method: object) -> None:
    if not isinstance(method, type) and hasattr(method, "adapter") and not hasattr(method, "training"):
        raise MethodError(
            f"{type(method).__name__} has adapter() and no training(): return lora2fx.training.slots.Training(), empty"
            " where the method asks nothing of the training."
        )
    if isinstance(method, type) or not hasattr(method, "training"):
        given = (
            repr(method) if isinstance(method, (type, str)) else f"a {type(method).__module__}.{type(method).__name__}"
        )
        raise MethodError(
            f"method is {given}: pass one with its hyperparameters, such as"
            " method=lora2fx.LoRA(r=8, lora_alpha=16) or method=lora2fx.LoRA2(target_k=1)."
        )


def refuse_unusable(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise `RewriteError`, naming it, where a weight to adapt is empty, or holds NaN: no check could tell anything."""
    for name in dict.fromkeys(site.weight for site in sites):
        weight = model.get_parameter(name).detach()
        if not weight.numel():
            raise RewriteError(f"{name} has no elements ({tuple(weight.shape)}). Leave it out with exclude=.")
        if is_foldable(weight) and not largest(weight).isfinite():
            raise RewriteError(
                f"{name} holds NaN or infinity: the checkpoint is damaged, or training had diverged. Load a whole one,"
                " or leave the weight out with exclude=."
            )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed`, the global generators as before afterwards; None draws from them."""
    devices = list(range(torch.cuda.device_count())) if seed is not None else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _program(model: nn.Module, method: Method, sites: Sequence[Site], record: Record) -> Program:
    adapters = {f"{site.owner}.{child_name(site)}".lstrip("."): make_adapter(model, site, method) for site in sites}
    return Program(model, model, record, adapters)


def _skipped(found: ModelAnalysis, sites: Sequence[Site], saved: Sequence[str]) -> tuple[dict[str, Any], ...]:
    matched = {(site.weight, site.role) for site in sites}
    entries = []
    for site in found.sites:
        if (site.weight, site.role) in matched:
            continue
        whole = any(site.weight.startswith(path + ".") for path in saved)
        tied = ", ".join(found.ties.get(site.weight, ()))
        reason = "trained whole (modules_to_save)" if whole else "not targeted" + (f"; tied to {tied}" if tied else "")
        entries.append(describe_site(site, reason=reason))
    return (*entries, *(site_entry(weight, reason=reason) for weight, reason in found.rest.items()))


def describe_site(site: Site, rewrite: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """A report's entry of a site that has no adapter."""
    columns = None if site.columns is None else [list(span) for span in site.columns]
    return site_entry(
        site.weight,
        role=site.role,
        slice=columns,
        evidence=site.evidence,
        rewrite=rewrite,
        reason=reason,
        shape=list(site.shape),
    )


def _unverified(asked: bool) -> dict[str, Any]:
    reason = "no example_inputs to run the model on" if asked else "verify=False"
    return {"status": "UNVERIFIED", "max_error": None, "checks": [], "reason": reason}


@unscanned()
def transform(
    model: M,
    targets: Targets | None = None,
    method: Method | Baseline | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    exclude: Targets = (),
    modules_to_save: Sequence[str] = (),
    untie: bool = False,
    verify: bool = True,
    seed: int | None = None,
) -> M:
    """Give every weight that `targets` means a trainable low-rank update; in place, and returns the same model.

    `targets=None` is query, key, value and ffn. A baseline (`lora2fx.methods.baselines`, `.houlsby`) as `method`
    trains what is there, or puts modules in, instead; what it takes without targets, and of them, it says itself.
    Everything but the adapters and `modules_to_save` is frozen (a classification head of a transformers model is
    saved and trained by default). Without `example_inputs` a transformers model is called with inputs made from
    its config; any other module can then be targeted by name only. `seed` draws the factors without touching
    torch's global generator. Adapters are float32, or float64 on a float64 weight, whatever the weight's dtype else
    is; outputs keep their dtype. Weights may have any shape of which a matmul, an einsum or a lookup contracts axes:
    (out, in), its transpose, stacks (expert, in, out), several heads' (in, head, width).

    Raises `TargetError` (a target matches nothing), `InputsError` (the model must be run and nothing says how),
    `MethodError` (a `rank_pattern` names no adapted weight),
    `RewriteError` (a matched weight is tied, parametrized, not finite, ...), `VerifyError` (a rewrite does not compute
    W + ΔW), `AdapterError` (adapted already). On any error the model is as it was.

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.ones(4, 8)
        >>> before = model(x)
        >>> model = lora2fx.transform(model, ["0", "2"], lora2fx.LoRA2(r=4, k=2), example_inputs=(x,), seed=0)
        >>> torch.equal(model(x), before)  # ΔW is 0 at the start
        True
        >>> lora2fx.report(model).verify["status"]
        'passed'
        >>> lora2fx.transform(nn.Sequential(nn.Linear(8, 16)), "up")
        Traceback (most recent call last):
        lora2fx.errors.TargetError: target 'up' matches none of the 1 weights. Roles: unknown 1. Module names: 0.
    """
    refuse_adapted(model, "transform")
    method = LoRA2() if method is None else method
    _refuse_classes(method)
    if targets is None:
        targets = method.default_targets if isinstance(method, Baseline) else DEFAULT_TARGETS
    found = analyse(model, example_inputs, needs_roles(targets) or needs_roles(exclude))
    saved = saved_modules(model, modules_to_save)
    free = tuple(site for site in found.sites if not any(site.weight.startswith(path + ".") for path in saved))
    sites = match_sites(free, targets, exclude, found.rest)
    for pattern in ("rank_pattern", "alpha_pattern"):
        refuse_unmatched(getattr(method, pattern, {}), sites, pattern)
    refuse_unusable(model, sites)
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with all_or_nothing(model):
        reference = reference_outputs(model, found.inputs) if verify and found.inputs is not None else None
        record = Record(method, trainable, saved, originals(model, saved), shared=found.shared)
        record.skipped, record.coverage = _skipped(found, sites, saved), coverage(free, sites)
        if isinstance(method, Baseline):
            with _seeded(seed):
                program = install_baseline(Program(model, model, record, {}), sites, found.outside_reads)
            record.verify = verify_baseline(program, found.inputs, reference) or _unverified(verify)
            return model
        record.untied = {
            site.weight: untie_weight(model, site, found.ties[site.weight], untie)
            for site in {site.weight: site for site in sites}.values()
            if site.weight in found.ties
        }
        record.tied_config = untie_config(model) if record.untied else None
        if reference is not None:
            check_untied(model, found, record, reference)
        with _seeded(seed):
            program = _program(model, method, sites, record)
        plans = {
            name: plan_rewrite(model, adapter.site, found.outside_reads) for name, adapter in program.adapters.items()
        }
        if reference is not None:
            record.verify = install_verified(program, found, plans, reference).to_dict()
        else:
            install(program, plans)
            record.verify = _unverified(verify)
    rewrites = ", ".join(f"{count} {rewrite}" for rewrite, count in Counter(plans.values()).items())
    status = record.verify["status"]
    _LOG.info("transform %s: %d sites (%s), verification: %s", type(model).__name__, len(plans), rewrites, status)
    return model
