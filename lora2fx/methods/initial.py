"""Fresh factors, float32 or the wider default dtype, drawn from torch's global generator."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.promote_types(torch.float32, torch.get_default_dtype()))


def constant(value: float, *shape: int) -> nn.Parameter:
    """Every element `value`."""
    return nn.Parameter(_empty(*shape).fill_(value))


def gaussian(std: float, *shape: int) -> nn.Parameter:
    """N(0, std²)."""
    return nn.Parameter(_empty(*shape).normal_(0.0, std))


def kaiming(*shape: int) -> nn.Parameter:
    """U(-1/√in, 1/√in) with in = the last dimension: what Kaiming's uniform bound with a = √5 comes to."""
    bound = 1 / sqrt(shape[-1])
    return nn.Parameter(_empty(*shape).uniform_(-bound, bound))


def orthonormal(*shape: int) -> nn.Parameter:
    """Matrices (..., rows, columns) with orthonormal columns, or rows where there are more columns than rows.

    Uniformly distributed: Q of a Gaussian's QR, R's diagonal made positive.
    """
    *batch, rows, columns = shape
    tall = torch.linalg.qr(_empty(*batch, max(rows, columns), min(rows, columns)).normal_().double())
    q = tall.Q * tall.R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return nn.Parameter((q if rows >= columns else q.mT).to(_empty(0).dtype).contiguous())
