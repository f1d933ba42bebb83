"""Target expressions: what a user writes to name weights, read into a predicate over sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lora2fx.errors import TargetError
from lora2fx.site import ROLES, Site

TargetLike = str | Callable[[Site], bool]
Targets = TargetLike | Iterable[TargetLike]

ALL_LINEAR = "all-linear"
ROLE_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "ffn": tuple(role for role in ROLES if role.startswith("ffn.")),
    **{role: (role,) for role in ROLES},
}
NOT_ADAPTED_BY_DEFAULT = ("lm_head", "embedding", "conv")


@dataclass(frozen=True)
class Target:
    """One target as it was written, and the sites that it means."""

    text: str
    matches: Callable[[Site], bool]
    by_role: bool = False


def read_target(target: TargetLike) -> Target:
    """The sites that `target` means. Raises `TargetError` where it can't be read.

    - a role (`"query"`, `"ffn.down"`) or a group of them (`"attention"`, `"ffn"`); of a fused weight, its columns;
    - `"all-linear"`: every 2-D weight that is multiplied by, but the language-model head and embeddings;
    - `"re:<regex>"`: fullmatch on the parameter's full name or on its module's, so that a regex written for PEFT's
      `target_modules` carries over;
    - else a dotted suffix (`"q_proj"`, `"attention.output.dense"`, `"in_proj_weight"`) or, with `*`, `?` or `[`, a
      glob that may start at any dot (`"encoder.*.dense"`; `*` crosses dots), of either name;
    - a callable `(site) -> bool`.

    `role:` or `name:` in front forces that reading.
    """
    if not isinstance(target, str):
        if not callable(target):
            raise TargetError(
                f"a target is a string or a callable (site) -> bool, not {target!r} of type {type(target).__name__}."
            )
        return Target(getattr(target, "__name__", repr(target)), target)
    prefix, colon, rest = target.partition(":")
    if not target or (colon and not rest):
        raise TargetError(f"target {target!r} is empty. Name a role or a module, as in targets=['query', 'ffn'].")
    if colon and prefix == "role":
        return _role(target, rest)
    if colon and prefix == "name":
        return Target(target, lambda site: names_site(rest, site))
    if colon and prefix == "re":
        return _regex(target, rest)
    if target == ALL_LINEAR:
        return Target(target, _is_linear, by_role=True)
    if target in ROLE_GROUPS:
        return _role(target, target)
    return Target(target, lambda site: names_site(target, site))


def read_targets(targets: Targets) -> tuple[Target, ...]:
    """One target or several. Raises `TargetError` where one can't be read."""
    if isinstance(targets, str) or callable(targets):
        return (read_target(targets),)
    if not isinstance(targets, Iterable):
        raise TargetError(f"targets is a {type(targets).__name__}. Pass a list, as in targets=['query', 'ffn'].")
    return tuple(read_target(target) for target in targets)


def needs_roles(targets: Targets) -> bool:
    """Whether any target is one of roles, so that the model's dataflow must have been recorded."""
    return any(target.by_role for target in read_targets(targets))


def names_site(pattern: str, site: Site) -> bool:
    """Whether `pattern`, a dotted suffix or a glob, names the site's parameter or its module."""
    if any(char in pattern for char in "*?["):
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in _names(site))
    return any(name == pattern or name.endswith(f".{pattern}") for name in _names(site))


def _names(site: Site) -> tuple[str, ...]:
    return (site.weight, site.owner) if site.owner else (site.weight,)


def _role(text: str, role: str) -> Target:
    if role not in ROLE_GROUPS:
        raise TargetError(f"target {text!r}: {role!r} is no role. Roles: {', '.join(ROLE_GROUPS)}.")
    roles = ROLE_GROUPS[role]
    return Target(text, lambda site: site.role in roles, by_role=True)


def _regex(text: str, pattern: str) -> Target:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"target {text!r} is no regular expression: {error}.") from error
    return Target(text, lambda site: any(compiled.fullmatch(name) for name in _names(site)))


def _is_linear(site: Site) -> bool:
    return len(site.shape) == 2 and site.role not in NOT_ADAPTED_BY_DEFAULT
