"""A sweep with Optuna: rank, budget and learning rate of LoRA², with poor trials stopped early. pip install optuna

python examples/sweep.py [--trials 20]
"""

from __future__ import annotations

import argparse

import optuna
import torch
from torch import nn

import lora2fx

STEPS = 80


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A base model, inputs, and what an update of rank 3 in one layer and 1 in the other makes of them."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
    x = torch.randn(256, 24)
    with torch.no_grad():
        moved = nn.functional.linear(x, base[0].weight + torch.randn(24, 3) @ torch.randn(3, 24) / 10, base[0].bias)
        y = nn.functional.linear(
            moved.tanh(), base[2].weight + torch.randn(8, 1) @ torch.randn(1, 24) / 5, base[2].bias
        )
    return base, x, y


def objective(trial: optuna.Trial) -> float:
    """The error on the last quarter of the rows after one run."""
    model, x, y = problem()
    columns = trial.suggest_int("k", 2, 6)
    budget = trial.suggest_float("target_k", 1, 2, step=0.5)
    method = lora2fx.LoRA2(r=8, k=columns, target_k=budget, lora_alpha=8)
    lora2fx.transform(model, ["0", "2"], method, example_inputs=(x[:2],), seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=trial.suggest_float("lr", 1e-3, 1e-1, log=True)))
    lora2fx.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        (model(x[:192]) - y[:192]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            with torch.no_grad():
                error = (model(x[192:]) - y[192:]).square().mean().item()
            trial.report(error, step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return error


def main(trials: int) -> optuna.Study:
    """Search; prints the best settings."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner())
    study.optimize(objective, n_trials=trials)
    print(f"best of {trials}: error {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    main(parser.parse_args().trials)
