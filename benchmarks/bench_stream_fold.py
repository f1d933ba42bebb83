"""Fold checkpoints that are made on the spot, tensor by tensor: peak memory and time beside a plain copy's.

Peak memory is that of a process of its own which does nothing else; it must not grow with the checkpoint.

python benchmarks/bench_stream_fold.py --gigabytes 2 8.2 --folder /somewhere/with/room --out results/stream_fold.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora2fx.methods.lora import LoRA
from lora2fx.site import Layout, Site
from lora2fx.storage_files import tensor_digest, write_files
from lora2fx.storage_format import SCHEMA, SavedSite
from lora2fx.storage_method import encode_method
from lora2fx.storage_tensors import adapter_tensors

HIDDEN, WIDE, VOCABULARY, SHARD = 4096, 11008, 32000, 2**31
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
METHOD = LoRA(r=8)


def names(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-like model with as many layers as the size asks for, in bfloat16."""
    found = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    layer = 0
    while sum(torch.Size(shape).numel() * 2 for shape in found.values()) < gigabytes * 1e9:
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        found[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        layer += 1
    return found


def make(folder: Path, gigabytes: float) -> dict[str, str]:
    """Write the checkpoint in shards of 2 GiB; by adapted weight its digest."""
    folder.mkdir(parents=True)
    pending: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    digests: dict[str, str] = {}
    held = total = files = 0
    wanted = names(gigabytes)
    generator = torch.Generator().manual_seed(0)
    for left, (name, shape) in zip(range(len(wanted) - 1, -1, -1), wanted.items(), strict=True):
        pending[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        held += pending[name].nbytes
        total += pending[name].nbytes
        if ".layers." in name and len(shape) == 2:
            digests[name] = tensor_digest(pending[name])
        if held >= SHARD or not left:
            files += 1
            file = f"model-{files:05d}.safetensors"
            save_file(pending, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(pending, file)
            pending, held = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return digests


def make_adapter(folder: Path, digests: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    """An adapter of rank 8 on every linear layer, ‖ΔW‖ about 10⁻³ ‖W‖."""
    saved, tensors = [], {}
    torch.manual_seed(1)
    for weight, digest in digests.items():
        owner = weight.removesuffix(".weight")
        site = Site(weight, owner, "weight", shapes[weight], Layout((1,), (0,)))
        adapter = METHOD.adapter(site)
        torch.nn.init.normal_(adapter.B, std=5e-4)
        saved.append(SavedSite(site, "activation", digest))
        tensors |= {f"{saved[-1].adapter}.{name}": value.detach() for name, value in adapter_tensors(adapter).items()}
    manifest = {
        "schema": SCHEMA,
        "lora2fx": "benchmark",
        "method": encode_method(METHOD),
        "sites": [one.to_dict() for one in saved],
        "progress": [0, 0, 0],
        "modules_to_save": [],
        "untied": {},
    }
    write_files(folder, manifest, tensors)


def memory(kind: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1000
    raise OSError(f"/proc/self/status has no {kind}")


def measure(folders: tuple[Path, Path, Path], rounding: str, queue: multiprocessing.Queue) -> None:
    """Fold in this process, which has done nothing else."""
    from lora2fx.streaming import fold_checkpoint

    torch.set_num_threads(1)
    before, start, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearest loses part of the adaptation, which is in the result
        report = fold_checkpoint(*folders, rounding=rounding)
    queue.put(
        {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - used,
            "rss_before_mb": before,
            "rss_peak_mb": memory("VmHWM"),
            "rss_added_mb": memory("VmHWM") - before,
            "bytes": report.details["bytes"],
            "sites": len(report.sites),
            "lost_adaptation": report.details["lost_adaptation"],
        }
    )


def copy_seconds(source: Path, target: Path) -> float:
    """A plain copy of the same files, synced."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def processor() -> str:
    """The CPU as Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def run(scratch: Path, gigabytes: float, roundings: list[str]) -> dict:
    """One checkpoint: made, copied, folded in every rounding, and cleared away."""
    base, adapter, out = (scratch / name for name in ("base", "adapter", "out"))
    shapes = names(gigabytes)
    make_adapter(adapter, make(base, gigabytes), shapes)
    changed = [shape for name, shape in shapes.items() if ".layers." in name]
    found = {
        "gigabytes": sum(path.stat().st_size for path in base.iterdir()) / 1e9,
        "files": len(list(base.glob("*.safetensors"))),
        "tensors": len(shapes),
        "largest_tensor_mb": max(torch.Size(shape).numel() * 2 for shape in shapes.values()) / 1e6,
        "largest_adapted_tensor_mb": max(torch.Size(shape).numel() * 2 for shape in changed) / 1e6,
        "adapter_mb": sum(path.stat().st_size for path in adapter.iterdir()) / 1e6,
        "copy_seconds": copy_seconds(base, scratch / "copy"),
        "folds": {},
    }
    shutil.rmtree(scratch / "copy")
    for rounding in roundings:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=measure, args=((base, adapter, out), rounding, queue))
        child.start()
        found["folds"][rounding] = queue.get()
        child.join()
        shutil.rmtree(out)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    return found


def main() -> None:
    """Make, copy, fold, print, clear away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 8.2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounding", nargs="+", default=["nearest", "adapter"])
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    result = {"date": time.strftime("%Y-%m-%d"), "cpu": f"{os.cpu_count()} cores, {processor()}, one used"}
    result |= {"torch": torch.__version__, "dtype": "bfloat16", "rank": METHOD.r, "checkpoints": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for gigabytes in options.gigabytes:
            result["checkpoints"].append(run(Path(scratch), gigabytes, options.rounding))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
