"""LoRA2's regulariser (arXiv 2408.06854, eq. 5): orthonormality within u, v, U, V and of the planes u v and U V."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lora2fx.training.penalty import Form, Orthogonality, deviation, product_deviation

PLANES = ("uv", "UV", "PQ")
"""R(u, v), R(U, V) and R(P, Q) with P = u v, Q = U V: the three that the paper's ablation switches."""

TERMS = 6


def _deviations(factors: tuple[Tensor, ...], planes: tuple[str, ...]) -> list[Tensor]:
    """The squared deviations of the chosen planes; K x K products and one r x r at most, never in x out."""
    u, v, U = factors[:3]
    V = factors[3] if len(factors) == 4 else None
    gram = u.mT @ u
    outer = None if V is None else V @ V.mT
    terms: dict[str, list[Callable[[], Tensor]]] = {
        "uv": [partial(deviation, gram), partial(deviation, v @ v.mT)],
        "UV": [partial(deviation, U.mT @ U)],
        "PQ": [partial(product_deviation, gram, v)],
    }
    if outer is not None:
        terms["UV"].append(partial(deviation, outer))
        terms["PQ"].append(partial(product_deviation, outer, U.mT))
    return [term() for plane in planes for term in terms[plane]]


def lora2_penalty(weight: float, factors: tuple[str, ...], planes: tuple[str, ...], form: Form) -> Orthogonality:
    """The penalty on u, v, U and, where `factors` names it, V (its two terms left out otherwise)."""
    return Orthogonality(weight, factors, partial(_deviations, planes=planes), TERMS, form)
