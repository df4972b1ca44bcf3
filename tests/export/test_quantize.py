"""Eight bits: close to the float network, smaller where it is large, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export import classify, export_onnx, open_session, quantize_onnx


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A network with batch norm as ONNX, and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(),
        nn.Linear(64, 5),
    )  # fmt: skip
    images = torch.randn(200, 1, 8, 8)
    model.train()(images)  # running statistics that are not the initial ones
    path = tmp_path_factory.mktemp("quantize") / "model.onnx"
    export_onnx(model, images[:8], path, legacy=True)
    return path, images


def run(path: Path, images: torch.Tensor) -> numpy.ndarray:
    (logits,) = open_session(path).run(None, {"input": images.numpy()})
    return logits


def test_eight_bits_stay_close_and_weights_are_int8(
    network: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path, images = network
    target = tmp_path / "int8.onnx"
    size = quantize_onnx(path, images[:100], target)
    assert size == target.stat().st_size < 0.5 * path.stat().st_size
    exact, rounded = run(path, images[100:]), run(target, images[100:])
    assert 0 < numpy.abs(exact - rounded).max() < 0.1 * numpy.abs(exact).max()
    assert (classify(path, images) == classify(target, images)).mean() > 0.95
    numpy.testing.assert_array_equal(classify(path, images, batch=7), run(path, images).argmax(1))
    kinds = {tensor.data_type for tensor in onnx.load(target).graph.initializer if len(tensor.dims) > 1}
    assert kinds == {onnx.TensorProto.INT8}
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


def test_what_cannot_be_quantized_is_a_sentence(network: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, images = network
    with pytest.raises(RunError, match="an ONNX file was expected at"):
        quantize_onnx(tmp_path / "none.onnx", images, tmp_path / "int8.onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ModelError, match="onnxruntime cannot run"):
        quantize_onnx(tmp_path / "text.onnx", images, tmp_path / "int8.onnx")
    with pytest.raises(ModelError, match="onnxruntime cannot quantize"):
        quantize_onnx(path, images[:, :, :5], tmp_path / "int8.onnx")
    with pytest.raises(RunError, match=r"the quantized file .* cannot be written"):
        quantize_onnx(path, images, tmp_path / "none" / "int8.onnx")
    with pytest.raises(ModelError, match="on these images"):
        classify(path, images[:, :, :5])
    assert [p.name for p in tmp_path.iterdir()] == ["text.onnx"]
