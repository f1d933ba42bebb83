"""Exporters: an adapted model as files that others read. Each proves what it wrote before it is there."""

from lora2fx.exporters.onnx import export_onnx
from lora2fx.exporters.onnx_session import OnnxModel
from lora2fx.exporters.peft import export_peft
from lora2fx.exporters.safetensors import export_safetensors

__all__ = ["OnnxModel", "export_onnx", "export_peft", "export_safetensors"]
