"""One training loop for all contestants, ours and others'."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality.contestants import Trainee

WARM_UP = 0.06
CLIP = 1.0


def fit(
    trainee: Trainee,
    batches: Iterable[dict[str, Any]],
    steps: int,
    warm_up: float = WARM_UP,
    low_precision: bool = False,
) -> float:
    """Train on `steps` batches of keyword arguments for the model, which returns a `loss`; CPU seconds a step.

    The learning rate warms up linearly over a share of the steps, then falls linearly to 0; gradients are clipped.
    `low_precision` has the forward compute in bfloat16 where autocast does; what is trained stays float32.
    """
    rising = max(1, round(warm_up * steps))
    schedule = LambdaLR(trainee.optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1)))
    trained = [parameter for parameter in trainee.model.parameters() if parameter.requires_grad]
    trainee.model.train()
    start = time.process_time()
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            loss = trainee.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        trainee.optimizer.step()
        trainee.after_step(step)
        schedule.step()
        trainee.optimizer.zero_grad()
    trainee.model.eval()
    return (time.process_time() - start) / steps
