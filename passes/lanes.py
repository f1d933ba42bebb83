"""A site's matrix as lanes along the adapter's own inputs, and what a fold does to the adaptation in them.

A lane is one output column, (in,), on which every input that the adapter was trained on acts at once. An embedding
looks single rows up, so that there a lane is a row, (out,), and the space is that of ΔW's own output directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.site import Site

SAMPLE = 2**16
"""Elements of a weight that are measured, in lanes spread evenly; a smaller weight is measured whole."""
_RANK = 1e-9


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (*batch, n, k) of the columns' span; columns of zeros fill up a rank below k."""
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r)
    top = values.amax(-1, keepdim=True) if values.shape[-1] else values
    basis: Tensor = (q @ u[..., : values.shape[-1]]) * (values > _RANK * top).unsqueeze(-2)
    return basis


def _looked_up(site: Site) -> bool:
    return site.role == "embedding" and site.columns is None


def site_lanes(site: Site, weight: Tensor) -> Tensor:
    """The whole weight as (*batch, n, lanes); a view of it where its memory order allows."""
    matrix = site.to_matrix(weight)
    return matrix.mT if _looked_up(site) else matrix


def from_lanes(site: Site, lanes: Tensor) -> Tensor:
    """The inverse of `site_lanes`."""
    return site.from_matrix(lanes.mT if _looked_up(site) else lanes)


def _picked(lanes: Tensor, chosen: Tensor) -> Tensor:
    """These lanes in float64; in most weights a lane is a row."""
    return lanes.mT.index_select(-2, chosen).mT.double()


@dataclass(frozen=True)
class Update:
    """ΔW of one site in float64 as space (*batch, n, k) · response (*batch, k, own lanes), and the lanes' numbers."""

    site: Site
    space: Tensor
    response: Tensor
    lanes: Tensor

    @classmethod
    def of(cls, exact: Adapter) -> Update:
        """An exact adapter's, with a space of orthonormal columns: the lanes' norms are the response's."""
        rows, right = exact.rows(), exact.right()
        space, response = (right.mT, rows.mT) if _looked_up(exact.site) else (rows, right)
        basis = orthonormal(space)
        lanes = torch.arange(response.shape[-1], device=response.device) if exact.columns is None else exact.columns
        return cls(exact.site, basis, basis.mT @ space @ response, lanes)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F"""
        return float(torch.linalg.vector_norm(self.response))


@dataclass(frozen=True)
class Sample:
    """Some lanes of a site before a fold, in float64, to hold against the same lanes after it."""

    update: Update
    chosen: Tensor
    before: Tensor

    @classmethod
    def of(cls, weight: Tensor, update: Update) -> Sample:
        """At most `SAMPLE` elements, in evenly spread lanes of the site's own."""
        lanes = site_lanes(update.site, weight)
        own = update.lanes.numel()
        count = max(1, min(own, SAMPLE // max(1, prod(lanes.shape[:-1]))))
        chosen = torch.arange(count, device=weight.device) * own // count
        return cls(update, chosen, _picked(lanes, update.lanes[chosen]))

    def measure(self, weight: Tensor) -> dict[str, float]:
        """The fold's report of the site: `delta_norm`, `rounding_error`, `lost_adaptation` (see `fold_adapters`)."""
        update = self.update
        after = _picked(site_lanes(update.site, weight), update.lanes[self.chosen])
        response = update.response[..., self.chosen]
        error = after - (self.before + update.space @ response)
        size = float(torch.linalg.vector_norm(response))
        within = update.space.mT @ error
        return {
            "delta_norm": update.norm,
            "rounding_error": float(torch.linalg.vector_norm(error)) / size if size else 0.0,
            "lost_adaptation": float(torch.linalg.vector_norm(within)) / size if size else 0.0,
        }
