"""A made-up record of `lora2fx train`, and a real browser to look at pages with, where there is one."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lora2fx.reports import site_entry

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip


def browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The page opened in a fresh profile."""
    with tempfile.TemporaryDirectory() as profile:
        command = [str(browser()), *QUIET, f"--user-data-dir={profile}", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def sites(layers: int = 3) -> list[dict[str, Any]]:
    names = {"query": "attention.query", "ffn.up": "ffn.up"}
    adapted = [
        site_entry(
            f"blocks.{layer}.{names[role]}.weight", adapter=f"a{layer}{role}", role=role, rewrite="activation", r=4,
            active=3, kept={"lambda": 3, "columns": layer}, rank=layer, shape=[8, 8], adapter_parameters=48,
            importance=[], importances={"columns": [0.1, 0.3, 0.0]}, **{"lambda": [0.5, -1.0, 0.25, 0.0]},
        )
        for role in names
        for layer in range(layers)
    ]  # fmt: skip
    rest = [site_entry(f"{name}.weight", role="unknown", shape=[8, 4], reason="not targeted") for name in ("in", "out")]
    return [*adapted, *rest, site_entry("tied.weight", reason="tied to <in.weight>: needs untie=True")]


def record(status: str = "finished", lr: float = 0.1, accuracy: float = 0.75) -> dict[str, Any]:
    """What report.json holds, in small."""
    training = [
        {
            "step": step, "epoch": 0.1, "loss": 2 / step, "lora2fx/columns_active": 12 - step,
            "lora2fx/columns_budget": 12 - step, "lora2fx/penalty": 0.5, "lora2fx/skipped_steps": 0,
            **{f"lora2fx/columns_importance_q{q}": q * 1e-9 for q in (10, 50, 90)},
        }
        for step in range(1, 9)
    ]  # fmt: skip
    validation = [{"step": step, "epoch": 0.5, "loss": 1.0, "accuracy": accuracy * step / 8} for step in (4, 8)]
    verify = {"status": "passed", "max_error": 1e-6, "checks": ["outputs", "weights"]}
    return {
        "kind": "train", "status": status, "metric": "accuracy", "steps": 8, "step": 8, "seconds": 12.5,
        "settings": {"model": "tiny", "data": "rows.csv", "task": "classification", "lr": lr, "text": ["text"]},
        "model": {"name": "tiny", "class": "Tiny", "method": "LoRA2(r=4)", "trained_whole": ["head"]},
        "data": {"train_rows": 90, "validation_rows": 10, "validation": "held back", "text": ["text"]},
        "history": {"training": training, "validation": validation},
        "sites": sites(), "totals": {
            "adapter_parameters": 288, "trainable": 300, "base_parameters": 10_000,
            "kept": {"lambda": 18, "columns": 6}, "budgets": {"columns": 6},
        },
        "verify": verify, "coverage": ["only 3 of 4 blocks were matched"],
        "exports": {"onnx": {"verify": verify, "margin": 0.5, "vacuous": False, "path": "model.onnx"}},
        "sizes": {"adapter": 2_000, "onnx": 41_000_000}, "environment": {"torch": "2"},
    }  # fmt: skip
