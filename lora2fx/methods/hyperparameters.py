"""Checks of a method's hyperparameters, and the rank that a pattern gives a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from lora2fx.errors import MethodError
from lora2fx.site import Site

V = TypeVar("V")


def check_count(name: str, value: int | None, least: int = 1, optional: bool = False) -> None:
    """Raise `MethodError` unless `value` is a whole number of at least `least`, or None where that is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        also = " or None" if optional else ""
        raise MethodError(f"{name}={value!r}: pass a whole number of at least {least}{also}.")


def check_number(name: str, value: float, low: float, high: float = float("inf"), closed: bool = True) -> None:
    """Raise `MethodError` unless low ≤ value < high (low < value < high where not `closed`); NaN never passes."""
    inside = not isinstance(value, bool) and isinstance(value, (int, float)) and low <= value < high
    if not inside or (not closed and value == low):
        bounds = f"at least {low:g}" if closed else f"above {low:g}"
        raise MethodError(f"{name}={value!r}: pass a number {bounds} and below {high:g}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `MethodError` unless `value` is one of the choices."""
    if value not in choices:
        raise MethodError(f"{name}={value!r}: pass one of {', '.join(map(repr, choices))}.")


def check_factorisation(r: int, lora_alpha: float, lora_dropout: float, rank_pattern: Mapping[str, int]) -> None:
    """Raise `MethodError` unless ranks are positive, the scale too, and the dropout a probability below 1."""
    check_count("r", r)
    check_number("lora_alpha", lora_alpha, 0, closed=False)
    check_number("lora_dropout", lora_dropout, 0, 1)
    for name, rank in rank_pattern.items():
        check_count(f"rank_pattern[{name!r}]", rank)


def check_schedule(tinit: int | None, tfinal: int | None, deltaT: int | None, beta1: float, beta2: float) -> None:
    """Raise `MethodError` unless the schedule's steps are counts and the averages' factors in [0, 1)."""
    check_count("tinit", tinit, least=0, optional=True)
    check_count("tfinal", tfinal, optional=True)
    check_count("deltaT", deltaT, optional=True)
    check_number("beta1", beta1, 0, 1)
    check_number("beta2", beta2, 0, 1)


def check_target(name: str, target: float | None, axis: str, most: int) -> None:
    """Raise `MethodError` where a budget would have to rise."""
    if target is None:
        return
    check_number(name, target, 0)
    if target > most:
        raise MethodError(f"{name}={target:g} is more than {axis}={most}, but a budget only falls. Raise {axis}.")


def check_local(name: str, target: float | None, scope: str) -> None:
    """Raise `MethodError` where every site would have to keep a fraction of an entry."""
    if scope == "local" and target is not None and target != int(target):
        raise MethodError(
            f"budget_scope='local' keeps {name} entries in every site, but {name}={target:g} is no whole number. Round"
            " it, or let the sites share the budget (budget_scope='global')."
        )


def names_site(pattern: str, site: Site) -> bool:
    """Whether a pattern means the site: its module or weight by full name, dotted suffix or glob, or its role."""
    names = (site.weight, site.owner)
    suffix = any(name == pattern or name.endswith("." + pattern) for name in names)
    return suffix or any(fnmatchcase(name, pattern) for name in names) or pattern == f"role:{site.role}"


def value_of(site: Site, default: V, pattern: Mapping[str, V], name: str = "rank_pattern") -> V:
    """The pattern's value where one of its names means the site, else the default; a weight's full name wins.

    Raises `MethodError` where two names mean the site and differ.
    """
    found = {key: value for key, value in pattern.items() if names_site(key, site)}
    found = {key: value for key, value in found.items() if key == site.weight} or found
    if len(set(found.values())) > 1:
        values = name.removesuffix("_pattern") + "s"
        raise MethodError(f"{name} gives {site.weight} several {values} ({found}). Make the names more specific.")
    return next(iter(found.values()), default)


def rank_of(site: Site, rank: int, pattern: Mapping[str, int]) -> int:
    """The site's rank, as `value_of` says."""
    return value_of(site, rank, pattern)


def refuse_unmatched(pattern: Mapping[str, float], sites: Sequence[Site], name: str = "rank_pattern") -> None:
    """Raise `MethodError`, naming near misses, where a key of the pattern means none of the adapted sites."""
    for key in pattern:
        if any(names_site(key, site) for site in sites):
            continue
        names = list(dict.fromkeys(own for site in sites for own in (site.owner, f"role:{site.role}") if own))
        near = get_close_matches(key, names, n=3) or names[:5]
        raise MethodError(
            f"{name}[{key!r}] names none of the {len(sites)} adapted weights. Close to it are"
            f" {', '.join(near)}. A key is a module or weight by full name, dotted suffix or glob, or role:<role>."
        )
