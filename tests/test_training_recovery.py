"""Ranks (3, 1) that are known are found again, by every method, from a budget over both maps together."""

from __future__ import annotations

import pytest
import torch

from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.training.driver import Attachment, schedule_status
from tests.recovery import recovery, train

# (method, steps, entries kept on the pruned axis, relative error of ΔW at most)
CASES = {
    "LoRA": (LoRA(r=4, lora_alpha=4), 400, None, 0.02),
    "LoRA2": (LoRA2(r=6, k=4, lora_alpha=6, target_r=2), 600, [3, 1], 0.02),
    "LoRA2 columns": (LoRA2(r=6, k=6, lora_alpha=6, target_k=2), 600, [3, 1], 0.02),
    "LoRA2 as published": (LoRA2.paper(r=6, k=4, lora_alpha=6, target_r=2), 1000, [3, 1], 0.06),
}


@pytest.mark.parametrize(("method", "steps", "kept", "error"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_are_found(method, steps, kept, error, seed):
    problem = recovery(method, seed)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-2, weight_decay=0.0)
    attachment = Attachment(problem.adapters, method.training(), optimizer, steps)
    train(problem, optimizer, steps)
    assert schedule_status(problem.adapters, method.training()) is None
    if kept is not None:
        axis = next(iter(attachment.budgets))
        assert [int(adapter.axes()[axis].mask.sum()) for adapter in problem.adapters] == kept
    assert [adapter.rank(1e-2) for adapter in problem.adapters] == [3, 1]
    assert max(problem.errors()) < error
