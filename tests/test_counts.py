"""What a training step costs in exact counts: operations, host syncs, bytes kept; the timings are in benchmarks/."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora2fx
from benchmarks.counting import dispatched_operations, host_syncs, saved_bytes, state_of
from lora2fx.training import products

METHOD = lora2fx.LoRA2(r=8, k=8, target_r=4, tinit=0, tfinal=2, deltaT=1)
WIDTHS = (16, 32)


class Tower(nn.Module):
    """Pairs of linear layers, narrow to wide and back, and a head."""

    def __init__(self, pairs: int, gradient: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        narrow, wide = WIDTHS
        sizes = [(narrow, wide), (wide, narrow)] * pairs
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.head = nn.Linear(narrow, 2)
        self.gradient = gradient

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = (x.requires_grad_() if index == 0 and self.gradient else x).tanh()
        return self.head(x)


def frozen(pairs):
    model = Tower(pairs, True).requires_grad_(False)
    model.head.requires_grad_(True)
    return model, torch.optim.AdamW(model.head.parameters(), fused=True)


def adapted(pairs, method=METHOD, attach=True):
    model = Tower(pairs, False)
    lora2fx.transform(
        model, ["layers.*"], method, example_inputs=(batch(),), modules_to_save=["head"], seed=0, verify=False
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    if attach:
        lora2fx.attach(model, optimizer, total_steps=100)
    return model.train(), optimizer


def batch():
    return torch.randn(4, 8, WIDTHS[0], generator=torch.Generator().manual_seed(1))


def differentiate(model):
    model.zero_grad()
    model(batch()).square().mean().backward()


def counts(model, optimizer):
    """Operations of forward and backward, of the optimizer's step with all that it drives, and the host's reads."""
    for _ in range(3):
        differentiate(model)
        optimizer.step()
    passes = dispatched_operations(lambda: differentiate(model)).total()
    syncs = host_syncs(optimizer.step).total()
    differentiate(model)
    return passes, dispatched_operations(optimizer.step).total(), syncs


@pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])
def test_a_site_costs_at_most_seven_operations_and_the_rest_is_the_same_for_any_number_of_them(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    few, many = counts(*adapted(2)), counts(*adapted(10))
    base_few, base_many = counts(*frozen(2)), counts(*frozen(10))
    sites = 2 * (10 - 2)
    assert (many[0] - base_many[0]) - (few[0] - base_few[0]) <= 7 * sites
    assert many[1] == few[1] <= 90
    folding = few[0] - base_few[0] - 7 * 4
    assert folding <= 40
    assert many[2] == few[2] == 1, "the one read that says whether the step is to be skipped"


@pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])
@pytest.mark.parametrize(
    "method",
    [lora2fx.LoRA(r=8), lora2fx.AdaLoRA(r=8, target_r=4), lora2fx.SoRA(r=8), lora2fx.SaLoRA(r=8), lora2fx.ALoRA(r=8)],
    ids=lambda method: type(method).__name__,
)
def test_a_site_costs_as_little_with_every_method(method, size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)

    def operations(model, optimizer):
        optimizer.step = lambda: None
        return counts(model, optimizer)[0]

    few, many = (operations(*adapted(pairs, method)) - operations(*frozen(pairs)) for pairs in (2, 10))
    assert many - few <= 7 * 2 * (10 - 2)
    assert few <= 7 * 4 + 40, "the folding"


def test_a_site_with_dropout_costs_the_dropout_more():
    method = lora2fx.LoRA2(r=8, k=8, lora_dropout=0.1)
    few, many = (counts(*adapted(pairs, method))[0] - counts(*frozen(pairs))[0] for pairs in (2, 10))
    assert many - few <= (7 + 5) * 2 * (10 - 2)


@pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])
def test_under_autocast_a_site_costs_what_it_costs_without(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)

    def operations(make, pairs):
        model, optimizer = make(pairs)

        def passes():
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch()).square().mean()
            loss.backward()

        for _ in range(3):
            passes()
            optimizer.step()
        return dispatched_operations(passes).total()

    few, many = (operations(adapted, pairs) - operations(frozen, pairs) for pairs in (2, 10))
    assert many - few <= 7 * 2 * (10 - 2)
    assert few <= 7 * 4 + 50, "the folding, and its copy in bfloat16"


def lower(model):
    """The base in bfloat16, as if it had been loaded so; the adapters stay as they are."""
    for layer in (*model.layers, model.head):
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])
def test_a_model_in_low_precision_costs_the_casts_more(size, monkeypatch):
    """Without autocast the factors stay in float32: x, what the products add, and their gradients are cast."""
    monkeypatch.setattr(products, "SMALL", size)

    def operations(make, pairs):
        model, optimizer = make(pairs)
        lower(model)

        def passes():
            model.zero_grad()
            model(batch().bfloat16()).square().mean().backward()

        for _ in range(3):
            passes()
            optimizer.step()
        return dispatched_operations(passes).total()

    few, many = (operations(adapted, pairs) - operations(frozen, pairs) for pairs in (2, 10))
    assert many - few <= (7 + 5) * 2 * (10 - 2)


class Shared(nn.Module):
    """Rows of three linear layers that read one x each."""

    def __init__(self, rows: int, gradient: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3 * rows))
        self.head, self.gradient = nn.Linear(16, 2), gradient

    def forward(self, x):
        for index in range(0, len(self.layers), 3):
            a, b, c = (layer(x) for layer in self.layers[index : index + 3])
            x = (a * b * c).tanh()
            x = x.requires_grad_() if index == 0 and self.gradient else x
        return self.head(x)


@pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])
def test_three_sites_that_share_their_input_cost_fourteen_operations(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)

    def operations(rows, adapt):
        model = Shared(rows, not adapt).requires_grad_(adapt)
        model.head.requires_grad_(True)
        if adapt:
            arguments = {"example_inputs": (batch(),), "modules_to_save": ["head"], "seed": 0, "verify": False}
            lora2fx.transform(model, ["layers.*"], METHOD, **arguments)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        if adapt:
            lora2fx.attach(model, optimizer, total_steps=100)
        return counts(model.train(), optimizer)[0]

    few, many = (operations(rows, True) - operations(rows, False) for rows in (2, 6))
    assert many - few <= 14 * (6 - 2)


def test_unattached_adapters_cost_what_their_graph_says():
    model, optimizer = adapted(2, attach=False)
    few = counts(model, optimizer)
    assert few[0] > counts(*adapted(2))[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [8, 64])
def test_what_is_kept_for_the_backward_hardly_depends_on_r(r, dtype, dropout, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    model, _ = adapted(4, lora2fx.LoRA2(r=r, k=8, target_r=4, tinit=0, tfinal=2, lora_dropout=dropout))
    plain, _ = frozen(4)
    for each in (model, plain) if dtype == torch.bfloat16 else ():
        lower(each)
    x = torch.randn(64, 64, WIDTHS[0]).to(dtype)
    kept = saved_bytes(lambda: model(x), state_of(model))
    own = saved_bytes(lambda: plain(x), state_of(plain))
    rows = 64 * 64
    inputs = rows * dtype.itemsize * WIDTHS[0]  # the first site's; the others' are kept by tanh already
    inner = rows * 4 * 8 * 8
    factors = 8 * 3 * 4 * 4 * 8 * sum(WIDTHS) // 2  # A, B and the stacks of V, of 8 matrices
    core = 8 * 4 * (4 * 8 * r + 3 * r + 8 * 8 + 2 * 8)
    masks = rows * 4 * sum(WIDTHS) if dropout else 0  # a byte an element
    assert kept <= own + inputs + inner + factors + core + masks
