"""A plain training loop and a plain accuracy; nothing here knows of adapters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora2fx.demo.digits import Examples
from lora2fx.errors import Lora2fxError

BATCH = 32
WARM_UP = 0.06


def fit(model: nn.Module, optimizer: Optimizer, examples: Examples, steps: int, seed: int, label: str) -> None:
    """Cross-entropy on batches drawn with `seed`; the learning rate warms up linearly, then falls linearly to 0.

    Shows a progress bar called `label` where standard error is a terminal. Leaves the model in eval mode.
    """
    try:
        from tqdm import trange
    except ImportError as error:
        raise Lora2fxError('The demo needs tqdm: pip install "lora2fx[demo]".') from error
    warm_up = max(1, round(WARM_UP * steps))
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1)))
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for _ in trange(steps, desc=label, disable=None, leave=False):
        batch = examples.take(torch.randint(len(examples), (BATCH,), generator=generator))
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """The share of examples whose class is the model's highest logit."""
    hits = model(examples.images).argmax(1) == examples.labels
    return float(hits.double().mean())
