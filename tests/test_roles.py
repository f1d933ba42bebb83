"""Roles, columns and layouts against the zoo's truth, and against modules written to mislead."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora2fx.errors import InputsError
from lora2fx.inputs import Inputs, as_inputs
from lora2fx.record import record
from lora2fx.roles import Analysis, find_sites
from lora2fx.site import Layout, Site
from tests.zoo import HELD_OUT, ZOO
from tests.zoo.architecture import normal, tokens

EVERY = ZOO | HELD_OUT
TOLD = {"query", "key", "value", "output", "ffn.up", "ffn.gate", "ffn.down", "router", "lm_head"}


def analysed(model: nn.Module, *args: Any, **kwargs: Any) -> Analysis:
    model.eval()
    return find_sites(model, record(model, Inputs(args, kwargs)))


def roles(analysis: Analysis) -> dict[str, Any]:
    """By weight its role, or the columns of each of its roles."""
    found: dict[str, Any] = {}
    for site in analysis.sites:
        if site.columns is None:
            found[site.weight] = site.role
        else:
            found.setdefault(site.weight, {})[site.role] = site.columns
    return found


def known(analysis: Analysis) -> dict[str, Any]:
    """`roles` without what the zoo's truth doesn't list: unknown, embedding, conv."""
    kept: dict[str, Any] = {}
    for weight, role in roles(analysis).items():
        told = {name: columns for name, columns in role.items() if name in TOLD} if isinstance(role, Mapping) else role
        if told and (isinstance(told, Mapping) or told in TOLD):
            kept[weight] = told
    return kept


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_of_the_zoo_has_its_true_role(name: str) -> None:
    architecture = EVERY[name]
    model = architecture.build()
    inputs = as_inputs(model, architecture.example_inputs)
    analysis = find_sites(model, record(model, inputs))
    found = {weight: role for weight, role in known(analysis).items() if weight not in architecture.undecided}
    assert found == dict(architecture.roles)
    told = {site.weight for site in analysis.sites} | analysis.rest.keys()
    tied = {other for names in analysis.tied.values() for other in names}
    assert told | tied >= {weight for weight, value in model.named_parameters() if value.dim() >= 2}
    assert not analysis.rest.keys() & {site.weight for site in analysis.sites}
    assert all(site.evidence for site in analysis.sites)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_linears_and_conv1ds_are_read_as_torch_and_transformers_define_them(name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = ZOO[name].build()
    analysis = find_sites(model, record(model, as_inputs(model, None)))
    for site in analysis.sites:
        owner = model.get_submodule(site.owner)
        expected = {nn.Linear: Layout((1,), (0,)), Conv1D: Layout((0,), (1,)), nn.Embedding: Layout((0,), (1,))}
        if type(owner) in expected:
            assert site.layout == expected[type(owner)], site.weight
            assert owner.get_parameter(site.parameter).shape == site.shape


class Product(nn.Module):
    """One product of an activation with a raw weight."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.product = nn.Parameter(normal(*shape).double()), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Layout]] = {
    "linear": ((5, 6), F.linear, Layout((1,), (0,))),
    "matmul": ((6, 5), torch.matmul, Layout((0,), (1,))),
    "transposed": ((5, 6), lambda x, w: x @ w.T, Layout((1,), (0,))),
    "cast": ((5, 6), lambda x, w: F.linear(x.float(), w.float()).double(), Layout((1,), (0,))),
    "scaled": ((5, 6), lambda x, w: F.linear(x, w * 0.5) * 2, Layout((1,), (0,))),
    "one_out": ((1, 6), F.linear, Layout((1,), (0,))),
    "vector": ((5, 6), lambda x, w: torch.stack([w @ row for row in x.flatten(0, 1)]), Layout((1,), (0,))),
    "in_heads": ((6, 2, 4), lambda x, w: torch.einsum("bsd,dhk->bshk", x, w), Layout((0,), (1, 2))),
    "heads_first": ((2, 6, 4), lambda x, w: torch.einsum("bsd,hdk->bshk", x, w), Layout((1,), (0, 2))),
    "heads_before": ((2, 6, 4), lambda x, w: torch.einsum("bsd,hdk->bhsk", x, w), Layout((1,), (0, 2))),
    "weight_first": ((6, 2, 4), lambda x, w: torch.einsum("dhk,bsd->bshk", w, x), Layout((0,), (1, 2))),
    "merged": ((2, 3, 5), lambda x, w: torch.einsum("bshk,hkd->bsd", x.unflatten(-1, (2, 3)), w), Layout((0, 1), (2,))),
    "merged_last": (
        (5, 2, 3),
        lambda x, w: torch.einsum("bshk,dhk->bsd", x.unflatten(-1, (2, 3)), w),
        Layout((1, 2), (0,)),
    ),
    "reshaped": ((5, 2, 3), lambda x, w: x @ w.reshape(5, 6).T, Layout((1, 2), (0,))),
    "conv1d": (
        (5, 6, 1),
        lambda x, w: F.conv1d(x.mT, w).mT,
        Layout((1, 2), (0,)),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_layout_gives_the_matrix_that_the_weight_is(name: str) -> None:
    """x @ to_matrix(weight), in float64, is what the module computes."""
    shape, product, layout = PRODUCTS[name]
    model, x = Product(shape, product), normal(2, 3, 6, seed=2).double()
    (site,) = analysed(model, x).sites
    assert site.layout == layout
    assert site.role == ("conv" if name == "conv1d" else "unknown")
    expected = x.flatten(0, -2) @ site.to_matrix(model.weight.detach())
    made = model(x).detach()
    if name == "heads_before":
        made = made.transpose(1, 2)
    tolerance = 1e-6 if name == "cast" else 1e-14
    torch.testing.assert_close(made.reshape(expected.shape), expected, rtol=0, atol=tolerance * 40)


def test_a_stack_of_matrices_is_batched() -> None:
    model = Product((3, 6, 5), lambda x, w: torch.bmm(x, w))
    x = normal(3, 4, 6, seed=2).double()
    (site,) = analysed(model, x).sites
    assert site.layout == Layout((1,), (2,), (0,))
    torch.testing.assert_close(model(x).detach(), x @ site.to_matrix(model.weight.detach()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pick", [lambda w: w[1], lambda w: w[torch.tensor([1])][0], lambda w: w.unbind(0)[2]])
def test_one_matrix_of_a_stack_is_batched(pick: Callable[[Tensor], Tensor]) -> None:
    model = Product((3, 5, 6), lambda x, w: F.linear(x, pick(w)))
    (site,) = analysed(model, normal(2, 4, 6).double()).sites
    assert site.layout == Layout((2,), (1,), (0,))


def test_kernels_are_contracted() -> None:
    for module, x, layout in (
        (nn.Conv2d(3, 5, 2), normal(2, 3, 8, 8), Layout((1, 2, 3), (0,))),
        (nn.Conv2d(4, 6, 3, groups=2), normal(2, 4, 8, 8), Layout((1, 2, 3), (0,))),
        (nn.ConvTranspose2d(3, 5, 2), normal(2, 3, 8, 8), Layout((0,), (1, 2, 3))),
    ):
        (site,) = analysed(module, x).sites
        assert (site.layout, site.role) == (layout, "conv")


def test_a_weight_that_is_normed_first_is_no_site() -> None:
    model = Product((5, 6), lambda x, w: F.linear(x, F.layer_norm(w, (6,))))
    analysis = analysed(model, normal(2, 4, 6).double())
    assert analysis.sites == ()
    assert "only aten.native_layer_norm reads it" in analysis.rest["weight"]


def test_a_dimension_used_in_two_ways_is_no_matrix() -> None:
    model = Product(
        (6, 5), lambda x, w: torch.bmm(x.unflatten(-1, (2, 3)).permute(2, 0, 1, 3).flatten(1, 2), w.view(2, 3, 5))
    )
    analysis = analysed(model, normal(2, 4, 6).double())
    assert analysis.sites == ()
    assert "its dimension 0 as batch and contracted" in analysis.rest["weight"]


def test_what_is_never_reached_or_only_added_says_so() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
            self.position = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x + self.position)

    rest = analysed(Partly(), normal(2, 3, 4)).rest
    assert rest["idle.weight"].startswith("never reached")
    assert rest["position"] == "no matmul multiplies by it, only aten.add reads it"
    assert rest.keys() == {"idle.weight", "position"}


WIDTH = 8


class Block(nn.Module):
    """Attention and feed-forward in parts, for the variants below."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("stem", "q", "k", "v", "o", "up", "down", "head"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / math.sqrt(WIDTH)).softmax(-1) @ value


class Swapped(Block):
    """Scores computed as key @ queryᵀ, softmax over their rows' axis after a transpose."""

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.k(x) @ self.q(x).mT).mT
        return x + self.o(scores.softmax(-1) @ self.v(x))


class SoftmaxFirst(Block):
    """Softmax over the first of the two score axes: values are mixed with the transposed probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        probabilities = (self.k(x) @ self.q(x).mT).softmax(1)
        return x + self.o(probabilities.mT @ self.v(x))


class Einsum(Block):
    """The key stands first in the product."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bjd,bid->bij", self.k(x), self.q(x))
        return x + self.o(torch.einsum("bij,bjd->bid", scores.softmax(-1), self.v(x)))


class Assembled(Block):
    """Scores gathered piece by piece into an empty tensor, in place."""

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.q(x), self.k(x)
        scores = x.new_empty(len(x), x.shape[1], x.shape[1])
        scores[:, :2] = query[:, :2] @ key.mT
        scores[:, 2:].copy_(query[:, 2:] @ key.mT)
        scores.mul_(0.5).masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9)
        return x + self.o(scores.softmax(-1) @ self.v(x))


@pytest.mark.parametrize("block", [Swapped, SoftmaxFirst, Einsum, Assembled])
def test_query_and_key_are_told_apart_by_the_softmaxs_axis(block: type[Block]) -> None:
    found = roles(analysed(block(), normal(2, 5, WIDTH)))
    assert found == {"q.weight": "query", "k.weight": "key", "v.weight": "value", "o.weight": "output"}


class NothingProjected(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attend(x, x, x)
        return self.head(x)


class NothingProjectedNorResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.attend(x, x, x).mean(1))


class OnlyKeyAndValue(Block):
    """The query is the residual stream itself; no output projection before the next block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attend(F.layer_norm(x, (WIDTH,)), self.k(x), self.v(x))
        return x + self.down(F.gelu(self.up(x)))


class Slots(Block):
    """Slot attention: the softmax runs over the queries, which then compete."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.k(x) @ self.q(x[:, :3]).mT).softmax(-1)
        weights = weights / weights.sum(1, keepdim=True)
        return self.o(weights.mT @ self.v(x))


NO_ROLE = {"unknown"}


def test_attention_without_projections_blames_nobody() -> None:
    assert set(roles(analysed(NothingProjected(), normal(2, 5, WIDTH))).values()) == NO_ROLE
    assert set(roles(analysed(NothingProjectedNorResidual(), normal(2, 5, WIDTH))).values()) == NO_ROLE
    found = roles(analysed(OnlyKeyAndValue(), normal(2, 5, WIDTH)))
    assert found == {
        "stem.weight": "unknown",
        "k.weight": "key",
        "v.weight": "value",
        "up.weight": "ffn.up",
        "down.weight": "ffn.down",
    }


def test_an_ambiguous_attention_is_reported_as_such() -> None:
    analysis = analysed(Slots(), normal(2, 5, WIDTH))
    assert {name: role for name, role in roles(analysis).items() if name in ("q.weight", "k.weight")} == {
        "q.weight": "unknown",
        "k.weight": "unknown",
    }
    evidence = {site.weight: site.evidence for site in analysis.sites}
    assert "attention #0 is ambiguous: the softmax runs along another dimension" in evidence["q.weight"]


class SharedQueryKey(Block):
    def forward(self, x: Tensor) -> Tensor:
        both = self.q(x)
        return x + self.o(self.attend(both, both, self.v(x)))


class Reused(Block):
    """One weight is the query of an attention and the key of the next."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.attend(self.q(x), self.k(x), self.v(x)))
        return x + self.o(self.attend(self.k(x), self.q(x), self.v(x)))


@pytest.mark.parametrize(("block", "weights"), [(SharedQueryKey, {"q.weight"}), (Reused, {"q.weight", "k.weight"})])
def test_several_roles_are_unknown_with_the_reason(block: type[Block], weights: set[str]) -> None:
    analysis = analysed(block(), normal(2, 5, WIDTH))
    unknown = {site.weight: site.evidence for site in analysis.sites if site.role == "unknown"}
    assert unknown.keys() == weights
    for evidence in unknown.values():
        assert evidence.startswith("used in several roles: ")
        assert "query (attention #0, operand 0" in evidence or "key (attention #0, operand 1" in evidence


def test_a_shared_layer_is_one_site() -> None:
    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.o(self.attend(self.q(x), self.k(x), self.v(x)))
            return x

    analysis = analysed(Shared(), normal(2, 5, WIDTH))
    assert [(site.weight, site.role) for site in analysis.sites] == [
        ("q.weight", "query"),
        ("k.weight", "key"),
        ("v.weight", "value"),
        ("o.weight", "output"),
    ]
    assert analysis.sites[0].evidence == "attention #0, operand 0 and 2 more"


class Gated(Block):
    """The attention's result is gated by a projection of its input, before the output projection."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attend(self.q(x), self.k(x), self.v(x))
        return x + self.o(mixed * torch.sigmoid(self.stem(x)))


def test_a_gate_on_the_result_hides_no_output() -> None:
    found = roles(analysed(Gated(), normal(2, 5, WIDTH)))
    assert found["o.weight"] == "output"
    assert found["stem.weight"] == "unknown"


class Pooled(Block):
    """No output projection: the classifier reads pooled results, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.q(x), self.k(x), self.v(x)).mean(1))


def test_a_classifier_is_no_output_projection() -> None:
    assert roles(analysed(Pooled(), normal(2, 5, WIDTH)))["head.weight"] == "unknown"


class Fused(nn.Module):
    """Query and gate in one weight, head by head; key and value in another."""

    def __init__(self) -> None:
        super().__init__()
        self.qg, self.kv, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, gate = self.qg(x).unflatten(-1, (2, 8)).chunk(2, -1)
        key, value = self.kv(x).chunk(2, -1)
        heads = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (key, value))
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), *heads).transpose(1, 2)
        return x + self.o((mixed * gate.sigmoid()).flatten(2))


def test_columns_that_nothing_claims_stay_unknown() -> None:
    assert roles(analysed(Fused(), normal(2, 5, 8))) == {
        "qg.weight": {"query": ((0, 4), (8, 12)), "unknown": ((4, 8), (12, 16))},
        "kv.weight": {"key": ((0, 8),), "value": ((8, 16),)},
        "o.weight": "output",
    }


def test_rotated_heads_of_a_fused_weight_keep_their_columns() -> None:
    """Rotary in place, on slices of a fused projection, as in the first half of each head."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).clone().split(8, -1)
            angle = torch.arange(x.shape[1]).float()[:, None]
            for each in (query, key):
                left, right = each[..., :4].clone(), each[..., 4:].clone()
                each[..., :4] = left * angle.cos() - right * angle.sin()
                each[..., 4:] = right * angle.cos() + left * angle.sin()
            return x + self.o((query @ key.mT).softmax(-1) @ value)

    found = roles(analysed(Rotary(), normal(2, 5, 8)))
    assert found["qkv.weight"] == {"query": ((0, 8),), "key": ((8, 16),), "value": ((16, 24),)}


class ResidualMLP(nn.Module):
    """x + down(activation(up(x))), with whatever the test puts between."""

    def __init__(self, between: Callable[[Tensor], Tensor], inner: int = 12, residual: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, inner), nn.Linear(inner, 8)
        self.between, self.residual = between, residual

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(self.between(self.up(self.norm(x))))
        return x + made if self.residual else made


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "squared": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "tanh_gelu": tanh_gelu,
    "erf_gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": F.hardswish,
    "prelu": nn.PReLU(),
    "mish": F.mish,
    "dropout": lambda x: F.dropout(F.silu(x), 0.1, False),
    "normed": lambda x: F.layer_norm(F.gelu(x), (12,)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_feed_forward_is_known_by_any_activation(name: str) -> None:
    found = roles(analysed(ResidualMLP(ACTIVATIONS[name]), normal(2, 5, 8)))
    assert found == {"up.weight": "ffn.up", "down.weight": "ffn.down"}


LINEAR = {
    "identity": lambda x: x,
    "scaled": lambda x: x * 0.5 + 1,
    "normed": lambda x: F.layer_norm(x, (12,)),
    "rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "unit": lambda x: F.normalize(x, dim=-1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_two_linears_without_an_activation_are_no_feed_forward(name: str) -> None:
    assert set(roles(analysed(ResidualMLP(LINEAR[name]), normal(2, 5, 8))).values()) == NO_ROLE


@pytest.mark.parametrize("inner", [8, 12])
def test_without_a_residual_it_is_a_head(inner: int) -> None:
    assert set(roles(analysed(ResidualMLP(F.tanh, inner, residual=False), normal(2, 5, 8))).values()) == NO_ROLE


GATES = {
    "glu": (lambda x: F.glu(x, -1), {"ffn.up": ((0, 6),), "ffn.gate": ((6, 12),)}),
    "swiglu": (lambda x: F.silu(x[..., :6]) * x[..., 6:], {"ffn.gate": ((0, 6),), "ffn.up": ((6, 12),)}),
    "geglu_tanh": (lambda x: x[..., :6] * tanh_gelu(x[..., 6:]), {"ffn.up": ((0, 6),), "ffn.gate": ((6, 12),)}),
    "interleaved": (
        lambda x: x[..., ::2].clamp(max=7.0).mul(x[..., ::2].sigmoid()) * (x[..., 1::2].clamp(-7.0, 7.0) + 1),
        {"ffn.gate": tuple((i, i + 1) for i in range(0, 12, 2)), "ffn.up": tuple((i, i + 1) for i in range(1, 12, 2))},
    ),
    "bilinear": (lambda x: x[..., :6] * x[..., 6:], "ffn.up"),
}


@pytest.mark.parametrize("name", GATES)
def test_the_gate_is_the_branch_with_the_activation(name: str) -> None:
    class GatedMLP(ResidualMLP):
        def __init__(self) -> None:
            super().__init__(GATES[name][0])
            self.down = nn.Linear(6, 8)

    found = roles(analysed(GatedMLP(), normal(2, 5, 8)))
    assert found == {"up.weight": GATES[name][1], "down.weight": "ffn.down"}


GATING = {
    "excitation": lambda x, made: x + x * made.mean(1, keepdim=True).sigmoid(),
    "highway": lambda x, made: x + x * made.sigmoid(),
    "shift": lambda x, made: x + made.mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", GATING)
def test_what_scales_or_shifts_the_whole_stream_is_no_feed_forward(name: str) -> None:
    class Modulated(ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            return GATING[name](x, self.down(F.relu(self.up(x))))

    assert set(roles(analysed(Modulated(F.relu), normal(2, 5, 8))).values()) == NO_ROLE


RESIDUALS = {
    "scaled": lambda x, made, other: x * 0.5 + made * 0.5,
    "layer_scale": lambda x, made, other: x + made * torch.full((8,), 0.1),
    "parallel": lambda x, made, other: x + other + made,
    "parallel_after": lambda x, made, other: (made + other) + x,
    "gated": lambda x, made, other: x + made * other.sigmoid(),
    "in_place": lambda x, made, other: made.mul_(0.5).add_(x),
    "upcast": lambda x, made, other: (x.double() + made.double()).float(),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_feed_forward_is_known_by_any_residual(name: str) -> None:
    class Residual(ResidualMLP):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.other = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return RESIDUALS[name](x, self.down(F.relu(self.up(normed))), self.other(normed))

    found = roles(analysed(Residual(), normal(2, 5, 8)))
    assert found.pop("other.weight", "unknown") == "unknown"
    assert found == {"up.weight": "ffn.up", "down.weight": "ffn.down"}


def test_one_position_is_refused() -> None:
    with pytest.raises(InputsError, match=r"shape \(2, 1, 8\) holds a single position.*at least 2"):
        analysed(Einsum(), normal(2, 1, WIDTH))


def test_one_position_inside_the_model_is_unknown_not_refused() -> None:
    class Shrinks(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x.mean(1, keepdim=True)
            return x + self.o(self.attend(self.q(x), self.k(x), self.v(x)))

    analysis = analysed(Shrinks(), normal(2, 5, WIDTH))
    evidence = {site.weight: site.evidence for site in analysis.sites if site.role == "unknown"}
    assert evidence.keys() == {"q.weight", "k.weight"}
    assert all("a single position looks at a single position" in reason for reason in evidence.values())


def test_one_key_for_many_queries_is_told() -> None:
    class Summary(Block):
        def forward(self, x: Tensor) -> Tensor:
            summary = x.mean(1, keepdim=True)
            return x + self.o(self.attend(self.q(x), self.k(summary), self.v(summary)))

    found = roles(analysed(Summary(), normal(2, 5, WIDTH)))
    assert found == {"q.weight": "query", "k.weight": "key", "v.weight": "value", "o.weight": "output"}


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_one_changes_nothing(batch: int) -> None:
    model = ZOO["bert"].build()
    analysis = analysed(model, input_ids=tokens(batch, 7))
    assert known(analysis) == dict(ZOO["bert"].roles)


def test_a_tied_head_stands_under_the_name_of_who_multiplies() -> None:
    model = ZOO["gpt2"].build()
    analysis = find_sites(model, record(model, as_inputs(model, None)))
    found = {site.weight: site for site in analysis.sites}
    assert found["transformer.wte.weight"].role == "embedding"
    assert found["transformer.wte.weight"].evidence.endswith("; tied to lm_head.weight")
    assert found["lm_head.weight"].role == "lm_head"
    assert found["lm_head.weight"].owner == "lm_head"
    assert found["lm_head.weight"].layout == Layout((1,), (0,))


def test_a_two_class_head_is_no_language_model_head_for_having_two_segments() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=99, type_vocab_size=2, num_labels=2, **small))
    segments = torch.zeros(2, 7, dtype=torch.int64)
    found = roles(analysed(model, input_ids=tokens(2, 7), token_type_ids=segments))
    assert found["classifier.weight"] == "unknown"


def test_argmax_over_positions_is_no_router() -> None:
    class Best(nn.Module):
        """Scores each row, keeps the two best and weighs them: a choice of rows, not of columns."""

        def __init__(self) -> None:
            super().__init__()
            self.project, self.score = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            best = self.score(x).topk(2, dim=1)
            rows = self.project(x)
            return rows[:, :2] * best.values.sum(-1, keepdim=True)

    assert roles(analysed(Best(), normal(2, 5, 8)))["score.weight"] == "unknown"


def test_sites_are_found_in_time_and_without_touching_global_random_state() -> None:
    """12 layers of fused and rotated attention: well under a second, on one core."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 40}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=99, num_hidden_layers=12, **small)).eval()
    recording = record(model, as_inputs(model, None))
    state = torch.get_rng_state()
    start = time.process_time()
    analysis = find_sites(model, recording)
    assert time.process_time() - start < 2
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(site.role == "query" for site in analysis.sites) == 12


def test_sites_come_in_the_order_of_the_parameters() -> None:
    model = ZOO["bert"].build()
    sites: tuple[Site, ...] = find_sites(model, record(model, as_inputs(model, None))).sites
    names = [name for name, _ in model.named_parameters()]
    assert [site.weight for site in sites] == [name for name in names if name in {site.weight for site in sites}]
