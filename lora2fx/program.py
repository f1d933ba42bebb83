"""A program: an adapted model with its sites, adapters and method. A pass is a function of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as KEPT

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError
from lora2fx.insert import Insert
from lora2fx.reports import Report
from lora2fx.site import Site
from lora2fx.training.slots import Training

RECORD = "_lora2fx"
TIED = "tie_word_embeddings"
"""The flag by which a transformers config says that the embeddings are tied."""


class Method(Protocol):
    """Hyperparameters of one adaptation method: a frozen dataclass."""

    def adapter(self, site: Site) -> Adapter:
        """A fresh adapter for the site, ΔW = 0, drawn from torch's global generator."""

    def training(self) -> Training:
        """What drives the adapters from step to step."""


@runtime_checkable
class Baseline(Protocol):
    """A method to compare with that is no ΔW: it trains what is there, or puts modules behind sites.

    `default_targets` are what `transform` takes where the user names no targets.
    """

    @property
    def default_targets(self) -> Any:
        """As `transform` takes them."""

    def trained(self, model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
        """Full names of the model's own parameters to train."""

    def insert(self, site: Site) -> Insert | None:
        """A fresh module to put behind the site's matmul; None where the method puts none."""

    def training(self) -> Training:
        """What drives it from step to step: nothing, but what it asks of the optimizer."""


@dataclass
class Record:
    """What `transform` leaves on the model beside the adapters, for the passes that undo and report it.

    `trained` are the model's own parameters that a baseline trains, by name. `originals` are the values before
    training of these and of everything in `modules_to_save`; `untied` the Parameters that
    adapted weights were tied to, by weight, and `tied_config` what the config said then.
    `coverage` says where only some of repeated blocks were matched; `shared` which weights were seen to meet one
    activation.
    """

    method: Method | Baseline
    trainable_before: frozenset[str]
    modules_to_save: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, nn.Parameter] = field(default_factory=dict)
    tied_config: bool | None = field(default=None, kw_only=True)
    trained: tuple[str, ...] = field(default=(), kw_only=True)
    verify: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[dict[str, Any], ...] = ()
    coverage: list[str] = field(default_factory=list)
    shared: tuple[tuple[str, ...], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Program:
    """A model, the module that `transform` was given within it, its method and its adapters by module path.

    A baseline has `inserts` in the place of adapters, or neither.
    """

    model: nn.Module
    root: nn.Module
    record: Record
    adapters: dict[str, Adapter]
    inserts: dict[str, Insert] = field(default_factory=dict)

    @property
    def method(self) -> Method | Baseline:
        """The method that made the adapters."""
        return self.record.method

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapters' sites, in order."""
        return tuple(adapter.site for adapter in self.adapters.values())


Pass = Callable[[Program], Report]


def keep_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set a plain attribute so that copies have it too; an fx module is copied with what it was told to keep only."""
    setattr(module, name, value)
    if isinstance(module, fx.GraphModule):
        module.meta.setdefault(KEPT, {})[name] = value


def drop_attribute(module: nn.Module, name: str) -> None:
    """Take back what `keep_attribute` set, if it did."""
    vars(module).pop(name, None)
    if isinstance(module, fx.GraphModule):
        kept = module.meta.get(KEPT, {})
        kept.pop(name, None)
        if not kept:
            module.meta.pop(KEPT, None)


def refuse_other(model: object, asked: str) -> None:
    """Raise `AdapterError` for anything but a module."""
    if not isinstance(model, nn.Module):
        shown = (
            f"{model!r:.80} is a {type(model).__name__}"
            if isinstance(model, str)
            else f"this is a {type(model).__name__}"
        )
        inner = isinstance(getattr(model, "model", None), nn.Module)
        way = "pass its .model." if inner else "load the model first and pass that."
        raise AdapterError(f"{asked} takes a torch.nn.Module; {shown}: {way}")


def program_of(model: nn.Module, asked: str) -> Program:
    """The program inside `model`, which may wrap it (DDP, torch.compile, a user's own module).

    Raises `AdapterError`, naming what was `asked`, where there is none.
    """
    refuse_other(model, asked)
    for root in model.modules():
        record = vars(root).get(RECORD)
        if record is not None:
            adapters = {name: module for name, module in root.named_modules() if isinstance(module, Adapter)}
            inserts = {name: module for name, module in root.named_modules() if isinstance(module, Insert)}
            return Program(model, root, record, adapters, inserts)
    raise AdapterError(
        f"{asked}: {type(model).__name__} holds no adapters. Call lora2fx.transform(model, targets=[...]) first;"
        " a model that was folded or unloaded is a plain model again."
    )


def refuse_baseline(program: Program, asked: str) -> None:
    """Raise `AdapterError` where there is no ΔW to write: the method is a baseline."""
    if not program.record.trained and not program.inserts:
        return
    name = type(program.method).__name__
    what = "puts modules into the model" if program.inserts else "trains the model's own weights"
    way = "" if program.inserts else "; lora2fx.fold(model) leaves a plain model, to be saved with its new weights"
    raise AdapterError(
        f"{asked}: {name} {what}, so that there is no low-rank update to write. Save the model itself (its state_dict,"
        f" or lora2fx.checkpoints.save_checkpoint){way}."
    )
