"""The main job: train a base, adapt it in three ways on several seeds, deliver one, write and print what came out."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lora2fx
from lora2fx.demo.contestants import RECIPES, Recipe, adapt, train_base, with_fresh_head
from lora2fx.demo.delivery import deliver
from lora2fx.demo.digits import Task, load_tasks
from lora2fx.demo.fitting import accuracy
from lora2fx.demo.tables import demo_tables, plain_parameters
from lora2fx.demo.transformer import VisionTransformer
from lora2fx.errors import Lora2fxError
from lora2fx.html import render_html


@dataclass(frozen=True)
class Size:
    """How long the demo trains and measures."""

    base_steps: int = 400
    steps: int = 80
    seeds: int = 8
    latency_rounds: int = 60


FULL = Size()
QUICK = Size(base_steps=40, steps=40, seeds=1, latency_rounds=5)


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads hardly speed up a model of this size, and slow it down badly on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment() -> dict[str, Any]:
    import onnxruntime
    import sklearn

    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "scikit-learn": sklearn.__version__}
    own = {"lora2fx": lora2fx.__version__, "python": platform.python_version()}
    return (
        own
        | versions
        | {"machine": platform.machine(), "processors": os.cpu_count(), "threads": torch.get_num_threads()}
    )


def _result(model: VisionTransformer, recipe: Recipe, task: Task, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"method": recipe.name, "seed": seed, "accuracy": accuracy(model, task.test)}
    if recipe.method is None:
        return found | {"adapter_parameters": 0, "rank": 0, "active": None}
    report = lora2fx.report(model)
    sites = [site for site in report.sites if site["r"] is not None]
    spent = {"adapter_parameters": plain_parameters(sites), "rank": sum(site["rank"] for site in sites)}
    return found | spent | {"active": report.totals["kept"].get("lambda")}


def compete(size: Size, seed: int, out: Path) -> dict[str, Any]:
    """Every recipe on every seed, and the first seed's last recipe delivered into `out`; plain JSON."""
    own, new = load_tasks()
    base = train_base(own.train, size.base_steps, seed)
    seeds = range(seed, seed + size.seeds)
    results = [
        {"method": "before", "seed": one, "accuracy": accuracy(with_fresh_head(base, one), new.test)} for one in seeds
    ]
    delivered: dict[str, Any] = {}
    for one in seeds:
        for recipe in RECIPES:
            model = adapt(base, new.train, recipe, size.steps, one)
            results.append(_result(model, recipe, new, one))
        delivered = delivered or deliver(model, new.test.images, out, size.latency_rounds)
    return {
        "base_parameters": sum(parameter.numel() for parameter in base.parameters()),
        "base_accuracy": accuracy(base, own.test),
        "examples": {"train": len(new.train), "test": len(new.test)},
        "results": results,
        "delivered": delivered,
    }


def check_folder(out: Path) -> None:
    """Raise `Lora2fxError` where `out` can't be the demo's folder."""
    if out.exists() and not out.is_dir():
        raise Lora2fxError(f"--out {out} is a file; name a folder.")


def run_demo(out: Path, seed: int = 0, size: Size = FULL) -> dict[str, Any]:
    """Run the demo and leave `adapter/`, `model.onnx` (with the exporter's report), `report.json` and `report.html`.

    Returns what `report.json` holds. Raises `Lora2fxError` where the demo's packages are missing.
    """
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with one_thread():
        run = compete(size, seed, out)
        run |= {"environment": _environment(), "size": asdict(size), "seconds": time.perf_counter() - start}
    text = json.dumps(run, indent=1)
    stored: dict[str, Any] = json.loads(text)
    page = demo_tables(stored) | {"sites": stored["delivered"]["sites"]}
    (out / "report.json").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(render_html(page), encoding="utf-8")
    return stored
