"""One ONNX base with two swappable adapters of unequal ranks: each request runs with the one that it names.

python examples/export_onnx_multi.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lora2fx
from lora2fx.exporters import OnnxModel, export_onnx


def base() -> nn.Module:
    """The same base each time, as a checkpoint would give."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def trained(targets: list[str], rank: int, shift: float, x: Tensor) -> nn.Module:
    """An adapter of its own targets and rank, trained on a task of its own."""
    model = lora2fx.transform(base(), targets, lora2fx.LoRA(r=rank), example_inputs=(x,), seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=30)
    for _ in range(30):
        (model(x) - (x[:, :4] + shift)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(folder: Path) -> dict[str, float]:
    """Returns how far the outputs with each adapter, and with none, are from torch's."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    models = {"wide": trained(["0", "2"], 12, 1.0, x), "small": trained(["2", "4"], 2, -1.0, x)}
    report = export_onnx(models["wide"], folder / "model.onnx", (x,), mode="multi", adapters=models)
    sizes = {name: entry["bytes"] for name, entry in report.details["adapters"].items()}
    print(f"base {(folder / 'model.onnx').stat().st_size} bytes, adapters {sizes}")

    onnx_model = OnnxModel(folder / "model.onnx")
    for name in models:
        onnx_model.load_adapter(name, folder / f"model.{name}.onnx_adapter")
    errors = {}
    for name, model in {"none": base(), **models}.items():
        found = onnx_model.run({"input": x}, adapter=None if name == "none" else name)["output"]
        with torch.no_grad():
            errors[name] = float(np.abs(found - model(x).numpy()).max())
    print("off by at most", ", ".join(f"{error:.1e} with {name}" for name, error in errors.items()))
    return errors


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
