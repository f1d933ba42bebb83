"""A small model of every kind of weight, adapted by hand: what the passes are tested on."""

import torch
from torch import nn

from lora2fx.inputs import Inputs
from lora2fx.passes.rewrite import child_name, plan_rewrite, rewrite_owners
from lora2fx.program import RECORD, Program, Record
from lora2fx.site import Layout, Site

OUT_IN, IN_OUT = Layout((1,), (0,)), Layout((0,), (1,))


class Small(nn.Module):
    """A linear, a fused projection, a convolution, a stack of experts, BatchNorm, dropout and a head."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 6)
            self.fused = nn.Linear(6, 6)
            self.conv = nn.Conv1d(6, 5, 3, padding=1)
            self.norm = nn.BatchNorm1d(5)
            self.drop = nn.Dropout(0.2)
            self.experts = nn.Parameter(torch.randn(2, 5, 3) / 2)
            self.head = nn.Linear(3, 2)
        self.double().eval()

    def forward(self, x):
        y = self.conv(torch.tanh(self.fused(self.linear(x))).transpose(1, 2))
        y = self.drop(self.norm(y)).transpose(1, 2)
        return self.head(torch.einsum("blc,ecd->ebld", y, self.experts))


FUSED = (
    Site("fused.weight", "fused", "weight", (6, 4), OUT_IN, "query", "by hand", ((0, 2),)),
    Site("fused.weight", "fused", "weight", (6, 4), OUT_IN, "value", "by hand", ((3, 4), (5, 6))),
)
SITES = (
    Site("linear.weight", "linear", "weight", (6, 4), OUT_IN, "query", "by hand"),
    Site("fused.weight", "fused", "weight", (6, 6), OUT_IN, "key", "by hand", ((0, 2),)),
    Site("fused.weight", "fused", "weight", (6, 6), OUT_IN, "value", "by hand", ((3, 4), (5, 6))),
    Site("conv.weight", "conv", "weight", (5, 6, 3), Layout((1, 2), (0,)), "conv", "by hand"),
    Site("experts", "", "experts", (2, 5, 3), Layout((1,), (2,), (0,)), "unknown", "by hand"),
)


def small_inputs(dtype=torch.float64) -> Inputs:
    return Inputs((torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(2)).to(dtype),))


def adapt(model, method, sites=SITES, modules_to_save=(), plans=None) -> Program:
    """What `transform` does, by hand: adapters, record, rewritten owners, flags."""
    torch.manual_seed(3)
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    originals = {
        f"{path}.{name}": value.detach().clone()
        for path in modules_to_save
        for name, value in model.get_submodule(path).state_dict().items()
    }
    adapters = {}
    for site in sites:
        wide = model.get_submodule(site.owner)._parameters[site.parameter].dtype == torch.float64
        adapter = method.adapter(site).to(torch.float64 if wide else torch.float32)
        adapters[f"{site.owner}.{child_name(site)}".lstrip(".")] = adapter
    program = Program(model, model, Record(method, trainable, tuple(modules_to_save), originals), adapters)
    rewrite_owners(
        program, {name: (plans or {}).get(name) or plan_rewrite(model, a.site) for name, a in adapters.items()}
    )
    setattr(model, RECORD, program.record)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(path + ".") for path in (*adapters, *modules_to_save)))
    return program


def randomised(program: Program) -> Program:
    """Factors that make ΔW visible."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in program.adapters.values():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return program


def states(model) -> dict:
    """Everything in the state dict, as bytes."""
    return {name: value.contiguous().view(-1).view(torch.uint8).tolist() for name, value in model.state_dict().items()}
