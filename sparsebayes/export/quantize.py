"""An ONNX file in 8-bit integers, by onnxruntime's own static quantizer.

Weights become int8 with one scale per output channel, activations uint8 with one scale and zero point per
tensor, whose range is taken from calibration images (smallest and largest value seen). The quantized operators
are written between QuantizeLinear and DequantizeLinear nodes, so that any onnxruntime can run the file; batch
normalisation is folded into the convolution before it first. Whether the file is smaller and faster depends on
the network and the processor: measure it, a network of some thousand parameters often is neither.

    >>> quantize_onnx("model.onnx", images, "model.int8.onnx")        # images: [B, 1, 28, 28], normalised
    10312
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export.measure import first_line, open_session

__all__ = ["classify", "quantize_onnx"]

CALIBRATION_BATCH = 64


def quantize_onnx(source: str | os.PathLike[str], images: Tensor, target: str | os.PathLike[str]) -> int:
    """Write a file with 8-bit weights and activations.

    Args:
        source: a float ONNX file with one input of shape `[batch, ...]`.
        images: calibration images, normalised as the network takes them, of shape `[N, ...]`; some hundred
            training images are enough.
        target: the file to write; it appears only once it runs.

    Returns:
        Size of the file in bytes.

    Raises:
        ModelError: onnxruntime cannot read, quantize or run the file.
        RunError: `source` is not there, or `target` cannot be written.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = open_session(source).get_inputs()[0].name
    goal = Path(target)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{goal.name}-", dir=goal.parent) as folder, _quiet():
            prepared, draft = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
            try:
                quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
                quantize_static(
                    str(prepared),
                    str(draft),
                    _reader(name, images),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    # 7 bits: on processors without VNNI sums of two products of 8 bits saturate.
                    reduce_range=True,
                    calibrate_method=CalibrationMethod.MinMax,
                )
            except OSError:
                raise
            except Exception as error:  # the quantizer raises classes of its own that share no base
                raise ModelError(f"onnxruntime cannot quantize {source} ({first_line(error)})") from error
            classify(draft, images[:1])
            draft.replace(goal)
    except OSError as error:
        raise RunError(f"the quantized file {goal} cannot be written ({error.strerror or error})") from error
    return goal.stat().st_size


def classify(path: str | os.PathLike[str], images: Tensor, *, batch: int = 256) -> Any:
    """Class of each image by an ONNX file.

    Args:
        path: a file with one input and logits of shape `[batch, C]` as its first output.
        images: normalised, of shape `[N, ...]`.
        batch: images of one call.

    Returns:
        An integer array of shape `[N]`.

    Raises:
        ModelError: onnxruntime cannot run the file on these images.
        RunError: the file is not there.
    """
    session = open_session(path)
    name = session.get_inputs()[0].name
    try:
        logits = [session.run(None, {name: part.cpu().numpy()})[0] for part in torch.split(images, batch)]
    except Exception as error:  # onnxruntime raises classes of its own that share no base
        raise ModelError(f"onnxruntime cannot run {path} on these images ({first_line(error)})") from error
    return numpy.concatenate(logits).argmax(1)


def _reader(name: str, images: Tensor) -> Any:
    """The calibration images in the form that the quantizer reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches of images, one after the other."""

        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(torch.split(images, CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            """The next batch; None after the last."""
            batch = next(self._batches, None)
            return None if batch is None else {name: batch.cpu().numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the quantizer's advice to its caller, which goes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
