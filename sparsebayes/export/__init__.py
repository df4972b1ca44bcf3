"""What leaves the package: checked ONNX files, their measured latency, and networks saved without pickle."""

from __future__ import annotations

from sparsebayes.export.measure import compare_latency, latency_ms, open_session
from sparsebayes.export.onnx import OnnxFile, check_onnx, export_onnx
from sparsebayes.export.saved import load_model, save_model

__all__ = [
    "OnnxFile",
    "check_onnx",
    "compare_latency",
    "export_onnx",
    "latency_ms",
    "load_model",
    "open_session",
    "save_model",
]
