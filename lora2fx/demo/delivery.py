"""An adapted model becomes what is shipped: adapter folder, folded weights, ONNX file, each compared with the last."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora2fx
from lora2fx.demo.measuring import Call, differences, latencies
from lora2fx.demo.transformer import VisionTransformer
from lora2fx.errors import Lora2fxError

LATENCY_BATCH = 32


def onnx_call(path: Path) -> Call:
    """The ONNX file as a function of images, on ONNX Runtime's CPU provider with as many threads as torch has.

    Raises `Lora2fxError` where ONNX Runtime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise Lora2fxError('The demo needs ONNX Runtime: pip install "lora2fx[demo]".') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return call


@torch.no_grad()
def deliver(adapted: VisionTransformer, images: Tensor, out: Path, rounds: int) -> dict[str, Any]:
    """Save, fold (a copy), export and run `adapted` on test `images`; plain JSON of what came out.

    Writes `adapter/` and `model.onnx` into `out`.
    """
    trained = lora2fx.report(adapted)
    lora2fx.save(adapted, out / "adapter")
    exported = lora2fx.exporters.export_onnx(adapted, out / "model.onnx", example_inputs=(images[:2],))
    folded = copy.deepcopy(adapted)
    merge = lora2fx.fold(folded)
    calls: dict[str, Call] = {"unmerged": adapted, "merged": folded, "onnx": onnx_call(out / "model.onnx")}
    logits = {name: call(images) for name, call in calls.items()}
    fold_error, fold_agreement = differences(logits["merged"], logits["unmerged"])
    onnx_error, onnx_agreement = differences(logits["onnx"], logits["merged"])
    return {
        "sites": trained.to_dict()["sites"],
        "totals": dict(trained.totals),
        "verify": dict(trained.verify),
        "fold": {"max_error": fold_error, "same_class": fold_agreement, "report": merge.to_dict()},
        "onnx": {"max_error": onnx_error, "same_class": onnx_agreement, "report": exported.to_dict()},
        "latency_ms": latencies(calls, images[:LATENCY_BATCH], rounds),
    }
