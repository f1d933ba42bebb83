"""Baselines that train what is there: full fine-tuning, and BitFit (arXiv 2106.10199), the biases alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lora2fx.errors import MethodError
from lora2fx.methods.hyperparameters import check_choice
from lora2fx.site import Site
from lora2fx.training.slots import Training

Scope = Literal["all", "targets"]
SCOPES = ("all", "targets")


def every_site(site: Site) -> bool:
    """The target that is every weight, whatever its role: nothing needs to be run to know."""
    return True


def is_bias(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias by its own name: `bias`, `in_proj_bias`, `bias_ih_l0`."""
    own = name.rpartition(".")[2]
    return parameter.dim() == 1 and (own == "bias" or own.endswith("_bias") or own.startswith("bias_"))


@dataclass(frozen=True)
class FullFineTuning:
    """Every floating-point parameter is trained, whatever the targets; `scope="targets"`: the targeted weights alone.

    Biases and norms get no weight decay from `lora2fx.param_groups`.
    """

    scope: Scope = "all"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)

    @property
    def default_targets(self) -> Callable[[Site], bool]:
        """Every weight."""
        return every_site

    def trained(self, model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
        """All parameters, or the sites' weights."""
        targeted = {site.weight for site in sites}
        found = [name for name, p in model.named_parameters() if p.is_floating_point()]
        return tuple(name for name in found if self.scope == "all" or name in targeted)

    def insert(self, site: Site) -> None:
        """None: nothing is added."""

    def training(self) -> Training:
        """Nothing to drive."""
        return Training()


@dataclass(frozen=True)
class BitFit:
    """Every bias is trained, norms' biases too, whatever the targets; `scope="targets"`: those of the targeted layers.

    Raises `MethodError` at `transform` where there is none (Llama has no biases).
    """

    scope: Scope = "all"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)

    @property
    def default_targets(self) -> Callable[[Site], bool]:
        """Every weight."""
        return every_site

    def trained(self, model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
        """The biases, or those in the sites' owners."""
        owners = {site.owner for site in sites}
        biases = [name for name, p in model.named_parameters() if is_bias(name, p) and p.is_floating_point()]
        found = tuple(name for name in biases if self.scope == "all" or name.rpartition(".")[0] in owners)
        if not found:
            where = "the targeted layers" if self.scope == "targets" and biases else type(model).__name__
            raise MethodError(f"BitFit trains biases, and {where} has none. Choose another method, or other targets.")
        return found

    def insert(self, site: Site) -> None:
        """None: nothing is added."""

    def training(self) -> Training:
        """Nothing to drive."""
        return Training()
