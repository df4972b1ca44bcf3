"""Sweeps: every setting, ratios that make sense, memory of a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export import export_onnx, sweep
from sparsebayes.export.sweep import Timing, peak_memory_mb


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sweep")
    for name, width in {"large": 2000, "small": 4}.items():
        model = nn.Sequential(
            nn.Linear(100, width), nn.ReLU(), nn.Linear(width, 500), nn.ReLU(), nn.Linear(500, 3)
        )
        export_onnx(model, torch.randn(4, 100), folder / f"{name}.onnx", legacy=True)
    return {name: folder / f"{name}.onnx" for name in ("large", "small")}


def test_every_setting_is_measured_in_order(files: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    rows = sweep(
        files, batches=(1, 32), threads=(1,), repeats=3, on_setting=lambda *setting: told.append(setting)
    )
    assert told == [(1, 1), (32, 1)]
    assert [(r.file, r.batch, r.threads) for r in rows] == [
        ("large", 1, 1), ("small", 1, 1), ("large", 32, 1), ("small", 32, 1),
    ]  # fmt: skip
    large, small = rows[2:]
    assert large.latency_ms > 2 * small.latency_ms  # 1.2 million multiply-accumulates against four thousand
    assert large.throughput == pytest.approx(32 / large.latency_ms * 1000)


def test_memory_is_that_of_the_file(files: dict[str, Path]) -> None:
    large, small = (peak_memory_mb(files[name], 1, 1) for name in ("large", "small"))
    assert large is not None and small is not None
    weights = 4 * (100 * 2000 + 2000 * 500) / 1e6
    assert large - small > 0.7 * weights  # MB; loading may need more, never less


def test_mistakes(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="an ONNX file was expected at"):
        sweep({"x": tmp_path / "none.onnx"}, batches=(1,), threads=(1,))
    with pytest.raises(ModelError, match="needs batch of at least 1"):
        sweep(files, batches=(0,), threads=(1,))
    with pytest.raises(ModelError, match="could not be run in a process of its own"):
        peak_memory_mb(tmp_path / "none.onnx", 1, 1)


def test_throughput_counts_inputs() -> None:
    assert Timing("f", 64, 1, 2.0, None).throughput == 32_000
