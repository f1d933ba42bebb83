"""y = x Wᵀ + b + (x Aᵀ) B of one site, or of several that read the same x; W and b are frozen.

All of it in one dtype, under autocast in autocast's, as torch's own linear layer would cast. A model in low precision
without autocast has A and B in float32: so are their products, and what they add is rounded to the model's dtype, as in
the functional form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora2fx.training.rebuilding import Origin, origin_of

CAST = (torch.float32, torch.bfloat16, torch.float16)
"""What autocast casts."""
SMALL = 2**16
"""Elements of x up to which calls cost more than passes over memory."""


class Drawn(NamedTuple):
    """Dropouts of x: masks (bool) of what they let through, in x's shape, and what they multiply that by.

    Each is for so many of A's rows as `sizes` says, one after the other. What is made of x is scaled in x's place: it
    is so much less.
    """

    masks: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    scale: float = 1.0

    @classmethod
    def by(cls, dropouts: Sequence[nn.Dropout], x: Tensor, sizes: Sequence[int]) -> Self:
        """Drawn as each `dropout(x)` would draw it, the last one first; all of one probability."""
        masks = [dropout(torch.ones_like(x)) != 0 for dropout in reversed(dropouts)]
        return cls(tuple(reversed(masks)), tuple(sizes), 1 / (1 - dropouts[0].p))

    def _masked(self, rows: Tensor) -> list[Tensor]:
        return [rows * mask.reshape(rows.shape) for mask in self.masks]

    def low(self, a: Tensor, rows: Tensor) -> Tensor:
        """A xᵀ (k, n) of rows x (n, in): transposed, as k long rows."""
        if not self.masks:
            return a.mm(rows.t())
        parts = zip(a.split(self.sizes), self._masked(rows), strict=True)
        return _rows([own.mm(masked.t()) for own, masked in parts]) * self.scale

    def scaled(self, back: Tensor) -> Tensor:
        """A gradient with respect to what `low` gives."""
        return back * self.scale if self.masks else back

    def of_rows(self, back: Tensor, a: Tensor) -> Tensor:
        """A scaled gradient (k, n) brought to the rows (n, in)."""
        if not self.masks:
            return back.t().mm(a)
        parts = zip(back.split(self.sizes), a.split(self.sizes), self.masks, strict=True)
        own = [low.t().mm(part) * mask.reshape(-1, mask.shape[-1]) for low, part, mask in parts]
        return own[0] if len(own) == 1 else torch.stack(own).sum(0)

    def of_a(self, back: Tensor, rows: Tensor) -> Tensor:
        """A scaled gradient (k, n) brought to A (k, in)."""
        if not self.masks:
            return back.mm(rows)
        parts = zip(back.split(self.sizes), self._masked(rows), strict=True)
        return _rows([low.mm(masked) for low, masked in parts])


def _rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


NOTHING = Drawn()
"""No dropout."""


class Layer(NamedTuple):
    """A site: its number, its weight (out, in) and its bias."""

    number: int
    weight: Tensor
    bias: Tensor | None


def is_cast(x: Tensor) -> bool:
    """Whether autocast casts what a linear layer of x reads."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype in CAST


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer of x computes in: autocast's, or x's own."""
    return torch.get_autocast_dtype(x.device.type) if is_cast(x) else x.dtype


def can_draw(dropouts: Sequence[nn.Dropout], x: Tensor) -> bool:
    """Whether `Drawn` can be these dropouts of x: of one probability that lets something through, and no small x."""
    if not dropouts:
        return True
    probabilities = {dropout.p for dropout in dropouts}
    return not is_small(x) and len(probabilities) == 1 and probabilities != {1.0}


def is_small(x: Tensor) -> bool:
    """Whether torch's own derivatives serve x best."""
    return x.numel() <= SMALL


def fits(factors: torch.dtype, x: Tensor) -> bool:
    """Whether factors of this dtype are those for x: of its dtype, or wider, or to be cast as autocast casts x."""
    return is_cast(x) or factors == x.dtype or (factors == torch.float32 and x.dtype in CAST)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For a backward, which may be called under autocast: each product in the dtype of what it is given."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def is_frozen(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Whether weight and bias are plain tensors on x's device that don't train, of x's dtype or cast as x is."""
    dtypes = CAST if is_cast(x) else (x.dtype,)
    return _is_plain(weight, x, dtypes) and (bias is None or _is_plain(bias, x, dtypes))


def _is_plain(tensor: Tensor, x: Tensor, dtypes: Collection[torch.dtype]) -> bool:
    kind = type(tensor)
    plain = (kind is nn.Parameter or kind is Tensor) and not tensor.requires_grad
    return plain and tensor.dtype in dtypes and tensor.device == x.device


class AddedProducts(torch.autograd.Function):
    """One output (..., out) a layer, for x (..., in), its A (m·k, in) together, and W, b and B of each.

    The small product comes first, and the frozen one is added to it: one pass over memory less. A product with few
    columns is made transposed, as k long rows: a BLAS is two to four times faster at it. Where `origin` says how x was
    made of what autograd keeps anyway, that is kept in the place of x; of a dropout of x its mask, a byte an element.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, origin: Origin | None, drawn: Drawn, a: Tensor, *layers: Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        weights, biases, b = _columns(layers)
        weights = [weight.to(x.dtype) for weight in weights]
        biases = [None if bias is None else bias.to(x.dtype) for bias in biases]
        rows = x.reshape(-1, x.shape[-1])
        inner = drawn.low(a, rows.to(a.dtype))
        outputs = []
        for weight, bias, own, low in zip(weights, biases, b, inner.chunk(len(b)), strict=True):
            y = x.new_empty(*x.shape[:-1], len(weight))  # no view of another: users may write to it
            _write_product(y.view(-1, len(weight)), low.t(), own, bias).addmm_(rows, weight.t())
            outputs.append(y)
        ctx.origin, ctx.count, ctx.drawn = origin, len(b), drawn._replace(masks=())
        kept = (x,) if origin is None else origin.tensors
        ctx.save_for_backward(inner, a, *b, *weights, *drawn.masks, *kept)
        return outputs[0] if len(b) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # noqa: D102
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return (None,) * (4 + 3 * ctx.count)
        with without_autocast(given.device):
            return AddedProducts._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
        n, (inner, a, *kept) = ctx.count, ctx.saved_tensors
        ends = (n, 2 * n, 2 * n + len(ctx.drawn.sizes))
        b, weights, masks, kept = (kept[start:stop] for start, stop in pairwise((0, *ends, None)))
        x = kept[0] if ctx.origin is None else ctx.origin.rebuild(kept)
        drawn = ctx.drawn._replace(masks=tuple(masks))
        rows = x.reshape(-1, x.shape[-1]).to(a.dtype)
        given = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        wide = [None if grad is None else grad.to(a.dtype) for grad in given]
        if torch.is_grad_enabled():  # a second derivative follows, which must see what `inner` is made of
            inner = drawn.low(a, rows)
        back, grad_x = drawn.scaled(_through(b, wide)), None
        if ctx.needs_input_grad[0]:
            grad_x = drawn.of_rows(back, a).to(x.dtype)
            for grad, weight in zip(given, weights, strict=True):
                grad_x = grad_x if grad is None else _plus(grad_x, grad, weight)
            grad_x = grad_x.view(x.shape)
        lows = [None if grad is None else low.mm(grad) for low, grad in zip(inner.chunk(n), wide, strict=True)]
        return grad_x, None, None, drawn.of_a(back, rows), *(part for low in lows for part in (None, None, low))


def _write_product(y: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """left right + bias, into y, whose dtype bias has."""
    if y.dtype != right.dtype:
        return y.copy_(left.mm(right) if bias is None else torch.addmm(bias.to(right.dtype), left, right))
    return torch.mm(left, right, out=y) if bias is None else torch.addmm(bias, left, right, out=y)


def _columns(layers: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]]:
    return layers[0::3], layers[1::3], layers[2::3]


def _plus(total: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    return total.addmm(grad, weight) if torch.is_grad_enabled() else total.addmm_(grad, weight)


def _through(b: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """B gᵀ (m·k, rows); 0 for an output that nothing was made of."""
    first = next(grad for grad in grads if grad is not None)
    parts = [
        own.new_zeros(len(own), len(first)) if grad is None else own.mm(grad.t())
        for own, grad in zip(b, grads, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added_products(
    x: Tensor, layers: Sequence[Layer], a: Tensor, b: Sequence[Tensor], rebuild: bool, drawn: Drawn = NOTHING
) -> tuple[Tensor, ...]:
    """One output a layer, in x's dtype; by torch's derivatives, whose nodes cost less than Python, where x is small.

    `drawn` are dropouts for the small product's x, which must not be small itself then.
    """
    if not is_small(x):
        origin = origin_of(x) if rebuild else None
        own = [part for layer, right in zip(layers, b, strict=True) for part in (layer.weight, layer.bias, right)]
        found = AddedProducts.apply(x, origin, drawn, a, *own)  # type: ignore[no-untyped-call]
        return (found,) if isinstance(found, Tensor) else found
    shape = x.shape
    rows = x.reshape(-1, shape[-1])
    inner = F.linear(rows.to(a.dtype), a)
    lows = (inner,) if len(b) == 1 else inner.chunk(len(b), 1)
    outputs = (
        _add_product(F.linear(rows, layer.weight, layer.bias), low, right)
        for layer, right, low in zip(layers, b, lows, strict=True)
    )
    return tuple([y.view(*shape[:-1], -1) for y in outputs])


def _add_product(y: Tensor, low: Tensor, right: Tensor) -> Tensor:
    return y.addmm_(low, right) if y.dtype == low.dtype else y.add_(low.mm(right))
