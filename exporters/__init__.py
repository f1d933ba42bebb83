"""Exporters: an adapted model as files that others read. Each proves what it wrote before it is there.

Shapes and dtypes in a file are the merged model's, unless it is asked for otherwise. All raise
`lora2fx.errors.ExportError`, with nothing left behind, where what was written doesn't prove itself.

Examples:
    >>> from torch import nn
    >>> from lora2fx import exporters
    >>> done = exporters.export_safetensors(nn.Sequential(nn.Linear(8, 16)), "base.safetensors")
    >>> done.verify["status"]
    'passed'
"""

from lora2fx.exporters.onnx import export_onnx
from lora2fx.exporters.onnx_session import OnnxModel
from lora2fx.exporters.peft import export_peft
from lora2fx.exporters.safetensors import export_safetensors

__all__ = ["OnnxModel", "export_onnx", "export_peft", "export_safetensors"]
