"""What leaves the package: checked ONNX files, their measured latency, and networks saved without pickle."""

from __future__ import annotations

from sparsebayes.export.measure import compare_latency, latency_ms, open_session
from sparsebayes.export.onnx import OnnxFile, check_onnx, export_onnx
from sparsebayes.export.quantize import classify, quantize_onnx
from sparsebayes.export.saved import load_model, save_model
from sparsebayes.export.sweep import Timing, sweep

__all__ = [
    "OnnxFile",
    "Timing",
    "check_onnx",
    "classify",
    "compare_latency",
    "export_onnx",
    "latency_ms",
    "load_model",
    "open_session",
    "quantize_onnx",
    "save_model",
    "sweep",
]
