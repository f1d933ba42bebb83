"""Exporters: an adapted model as files that others read. Each proves what it wrote before it is there."""

from lora2fx.exporters.onnx import export_onnx

__all__ = ["export_onnx"]
