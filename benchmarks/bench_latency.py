"""Latency of one adapted encoder in every form: unmerged and merged in torch, merged in ONNX Runtime on CPU and CUDA.

First ONNX Runtime's own optimised graphs of the base and of the merged model are compared, operator by operator: where
they differ, the latencies compare optimisers and not adapters, and the script stops. CUDA is measured where torch or
ONNX Runtime has it; what was not there is listed as such. Ways take turns, so that a busy machine slows all alike; the
median and the fastest of all rounds are told.

python benchmarks/bench_latency.py                                 # BERT of MiniLM's size, random weights
python benchmarks/bench_latency.py --layers 12 --hidden 768 --shapes 1x128 8x128 --out benchmarks/results/latency.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.exporters import OnnxModel, export_onnx

TARGETS = ["query", "key", "value", "attention.output.dense", "ffn"]
Ways = dict[str, Callable[[dict[str, Tensor]], object]]


def adapted(hidden: int, layers: int, rank: int) -> nn.Module:
    """A BERT classifier with trained-looking factors on all its matmuls, of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 32}
    model = BertForSequenceClassification(BertConfig(intermediate_size=4 * hidden, **sizes)).eval()
    lora2fx.transform(model, TARGETS, lora2fx.LoRA(r=rank), verify=False)
    with torch.no_grad():
        for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
    return model.eval()


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, nothing padded."""
    ids = torch.randint(0, 30000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}


def optimised_ops(path: Path, folder: Path) -> dict[str, int]:
    """The operators of ONNX Runtime's own optimised graph, counted by domain and name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / f"optimised-{path.name}")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    counts: dict[str, int] = {}
    for node in onnx.load(options.optimized_model_filepath).graph.node:
        name = f"{node.domain}.{node.op_type}".lstrip(".")
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def onnx_way(path: Path, provider: str, threads: int) -> Callable[[dict[str, Tensor]], object]:
    """Runs on bound memory, so that a GPU isn't charged for copies that the others don't make."""
    options = {"intra_op_num_threads": threads}
    model = OnnxModel(path, [provider]) if provider != "CPUExecutionProvider" else cpu_model(path, **options)
    return lambda tensors: model.run_bound({name: tensors[name] for name in model.inputs})


def cpu_model(path: Path, intra_op_num_threads: int) -> OnnxModel:
    """A model whose session has as many threads as torch has."""
    model = OnnxModel(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, intra_op_num_threads
    model.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return model


def torch_way(model: nn.Module, device: str) -> Callable[[dict[str, Tensor]], object]:
    """A forward without gradients, waited for."""
    model = copy.deepcopy(model).to(device)

    def run(tensors: dict[str, Tensor]) -> object:
        with torch.inference_mode():
            found = model(**{name: tensor.to(device) for name, tensor in tensors.items()})
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def ways_of(model: nn.Module, merged: nn.Module, files: dict[str, Path], threads: int) -> tuple[Ways, list[str]]:
    """What can be run here by name, and what can't."""
    ways: Ways = {"torch CPU, unmerged": torch_way(model, "cpu"), "torch CPU, merged": torch_way(merged, "cpu")}
    for name, path in files.items():
        ways[f"ONNX Runtime CPU, merged {name}"] = onnx_way(path, "CPUExecutionProvider", threads)
    absent = []
    if torch.cuda.is_available():
        ways |= {"torch CUDA, unmerged": torch_way(model, "cuda"), "torch CUDA, merged": torch_way(merged, "cuda")}
    else:
        absent.append("torch CUDA")
    try:
        ways["ONNX Runtime CUDA, merged float32"] = onnx_way(files["float32"], "CUDAExecutionProvider", threads)
    except lora2fx.Lora2fxError as error:
        absent.append(f"ONNX Runtime CUDA: {error}")
    return ways, absent


def measure(ways: Ways, tensors: dict[str, Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Median and fastest milliseconds of each way; all take a turn in each round, after two that don't count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way(tensors)
            if index >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median_ms": round(statistics.median(t), 3), "min_ms": round(min(t), 3)} for n, t in times.items()}


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Export, compare the optimised graphs, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "8x128"], help="batch x sequence")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = adapted(options.hidden, options.layers, options.rank)
    merged, base = copy.deepcopy(model), copy.deepcopy(model)
    lora2fx.fold(merged)
    lora2fx.unload(base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        example = inputs(2, 8)
        start = time.perf_counter()
        reports = {"float32": export_onnx(model, folder / "float32.onnx", example)}
        export_seconds = time.perf_counter() - start
        reports["int8"] = export_onnx(model, folder / "int8.onnx", example, int8=True)
        export_onnx(base, folder / "base.onnx", example)
        own, other = (optimised_ops(folder / f"{name}.onnx", folder) for name in ("float32", "base"))
        if own != other:
            raise SystemExit(f"the optimised graphs differ, so that latencies say nothing: {own} and {other}")
        files = {name: folder / f"{name}.onnx" for name in reports}
        ways, absent = ways_of(model, merged, files, options.threads)
        shapes = {shape: inputs(*map(int, shape.split("x"))) for shape in options.shapes}
        results = {shape: measure(ways, tensors, options.rounds) for shape, tensors in shapes.items()}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{processor()}, {os.cpu_count()} cores, {options.threads} used, load {os.getloadavg()[0]:.1f}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "model": f"BERT classifier, hidden {options.hidden}, {options.layers} layers, LoRA r={options.rank}",
        "optimised_ops": own,
        "parity": {name: report.details["outputs"][0]["relative_error"] for name, report in reports.items()},
        "export_seconds": round(export_seconds, 1),
        "rounds": options.rounds,
        "not_run": absent,
        "milliseconds": results,
    }
    show(about)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about, indent=1) + "\n")


def show(about: dict) -> None:
    """The result as a table."""
    print(about["model"], "on", about["cpu"])
    print("optimised graph, base and merged alike:", about["optimised_ops"])
    for name, error in about["parity"].items():
        print(f"relative error of {name}: {error:.1e}")
    for shape, ways in about["milliseconds"].items():
        print(f"\n{shape} (batch x sequence)")
        for name, found in ways.items():
            print(f"  {name:<36} median {found['median_ms']:9.2f} ms   fastest {found['min_ms']:9.2f} ms")
    for line in about["not_run"]:
        print("not run:", line)


if __name__ == "__main__":
    main()
