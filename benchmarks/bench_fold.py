"""Merging float32 LoRA into its weights: lora2fx's fold beside PEFT's merge, in CPU time and in memory.

Both sides hold the same layers and ranks; they take turns in one process, and the ratio is of their medians. Memory is
what the resident peak grows by while one whole model is merged. PEFT's merge is `merge_and_unload` without its optional
check (safe_merge), lora2fx's is `fold` with all of its checks and its report, and with `undo=False`, since PEFT can't
take back a merge that was interrupted either; "adding alone" leaves checks and report out.

python benchmarks/bench_fold.py --out results/fold.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

import lora2fx
from lora2fx.passes.adding import write_merge
from lora2fx.passes.merging import merges
from lora2fx.program import program_of

SIZES = {"768 x 768": (768, 768, 24), "4096 x 4096": (4096, 4096, 4), "11008 x 4096": (4096, 11008, 2)}


def layers(width: int, out: int, count: int) -> nn.Sequential:
    """`count` linear layers that are never called."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, out, bias=False) for _ in range(count)))


def ours(sizes: tuple[int, int, int], rank: int) -> nn.Module:
    """Adapted by lora2fx, the update visible."""
    model = layers(*sizes)
    names = [str(index) for index in range(sizes[2])]
    lora2fx.transform(model, names, lora2fx.LoRA(r=rank), verify=False, seed=0)
    with torch.no_grad():
        for adapter in program_of(model, "bench").adapters.values():
            adapter.get_parameter("B").normal_(std=0.01)
    return model


def theirs(sizes: tuple[int, int, int], rank: int) -> nn.Module:
    """Adapted by PEFT in the same way."""
    import peft

    names = [str(index) for index in range(sizes[2])]
    model = peft.get_peft_model(layers(*sizes), peft.LoraConfig(r=rank, lora_alpha=16, target_modules=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def fold(model: nn.Module) -> None:
    """All of it but the copy for interrupts."""
    lora2fx.fold(model, undo=False)


def fold_undoably(model: nn.Module) -> None:
    """All of it, as by default."""
    lora2fx.fold(model)


def add_alone(model: nn.Module) -> None:
    """W + ΔW and nothing else; the model stays adapted."""
    for merge in merges(program_of(model, "bench")):
        write_merge(merge)


def merge(model: nn.Module) -> None:
    """PEFT's, all of it."""
    model.merge_and_unload()


def merge_alone(model: nn.Module) -> None:
    """PEFT's W + ΔW and nothing else."""
    model.merge_adapter()


def measure(build: Callable[[], nn.Module], run: Callable[[nn.Module], None]) -> tuple[float, float]:
    """CPU seconds, and MB by which resident memory peaked above the adapted model's."""
    model = build()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    run(model)
    return time.process_time() - start, memory("VmHWM") - before


def memory(kind: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(kind + ":"))


def processor() -> str:
    """The CPU as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def compare(sizes: tuple[int, int, int], rank: int, repeats: int) -> dict:
    """One size of layer."""
    sides = {
        "fold": (lambda: ours(sizes, rank), fold),
        "fold, undo kept": (lambda: ours(sizes, rank), fold_undoably),
        "peft": (lambda: theirs(sizes, rank), merge),
        "fold, adding alone": (lambda: ours(sizes, rank), add_alone),
        "peft, adding alone": (lambda: theirs(sizes, rank), merge_alone),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 1):  # the first turn warms up
        for name, (build, run) in sides.items():
            found = measure(build, run)
            seconds[name].append(found[0])
            peaks[name].append(found[1])
    times = {name: median(values[1:]) for name, values in seconds.items()}
    return {
        "layers": sizes[2],
        "weights_mb": sizes[0] * sizes[1] * sizes[2] * 4 / 1e6,
        "one_weight_mb": sizes[0] * sizes[1] * 4 / 1e6,
        "cpu_seconds": times,
        "peak_mb": {name: median(values[1:]) for name, values in peaks.items()},
        "times_faster": times["peft"] / times["fold"],
        "times_faster_adding_alone": times["peft, adding alone"] / times["fold, adding alone"],
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    import peft

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = {"date": time.strftime("%Y-%m-%d"), "cpu": f"{os.cpu_count()} cores, {processor()}, one used"}
    about |= {"torch": torch.__version__, "peft": peft.__version__, "dtype": "float32", "rank": options.rank}
    sizes = {name: compare(size, options.rank, options.repeats) for name, size in SIZES.items()}
    text = json.dumps(about | {"sizes": sizes}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
