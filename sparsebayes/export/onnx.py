"""A network becomes an ONNX file that has been held against the network itself.

The file has one input `input` and one output `logits`, both with a free batch dimension. It is written by
`torch.onnx.export` (the torch.export based exporter; the TorchScript one as the fallback), checked by
`onnx.checker`, run in onnxruntime on a batch of one and on a larger batch, and only then moved to its name.
With y the outputs of the PyTorch network and y' those of onnxruntime, the file is accepted iff

    max |y' - y| <= tolerance * max |y|        on each of the two batches (tolerance 1e-4)

because an exporter can be wrong without a word: one release wrote a wrong bias when it folded a BatchNorm
into the convolution before it (pytorch/pytorch issue 166797).

    >>> file = export_onnx(model, images, "model.onnx")        # images: [B, 1, 28, 28]
    >>> file.bytes, file.exporter, file.opset, file.max_relative_error
    (1724981, 'dynamo', 20, 2.1e-07)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export.measure import first_line, open_session

__all__ = ["INPUT_NAME", "OUTPUT_NAME", "OnnxFile", "check_onnx", "export_onnx"]

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
TOLERANCE = 1e-4
DYNAMO_OLDEST_OPSET = 18  # below it the exporter converts afterwards, and keeps 18 where it cannot
MAX_CHECK_ROWS = 64  # rows of the example that are compared: more would only make the check slow

Exporter = Literal["dynamo", "torchscript"]

# What the exporters say about themselves on every successful call. Any other warning reaches the user.
EXPORTER_CHATTER = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (DeprecationWarning, r"You are using the legacy TorchScript-based ONNX export"),
    (DeprecationWarning, r"The feature will be removed\. Please remove usage of this function"),
)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that agrees with its network.

    Attributes:
        path: where it lies.
        bytes: its size; weights are inside the file, never beside it.
        exporter: `"dynamo"` (torch.export based) or `"torchscript"` (the older one).
        opset: version of the ONNX operator set that the file asks for.
        max_relative_error: the larger of max |y' - y| / max |y| over the two compared batches.
        note: one sentence on why the fallback was taken; empty if it was not.
    """

    path: Path
    bytes: int
    exporter: Exporter
    opset: int
    max_relative_error: float
    note: str = ""


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    legacy: bool = False,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
    metadata: Mapping[str, str] | None = None,
) -> OnnxFile:
    """Write a network as an ONNX file with a free batch dimension, and hold the file against it.

    A float32 copy of the network in eval mode on the CPU is exported: mode, device, gradients and dtype of
    `model` stay as they are. The file appears under its name only after every check has passed; a file that
    was there before is replaced then, and left alone if a check fails. The exporter's notes on source lines
    and module names are removed, since they hold paths of this machine and would be counted as bytes of the
    network.

    Args:
        model: takes one tensor, returns one tensor whose first dimension is the batch.
        example: real inputs of shape `[B, ...]`, B >= 1, on any device. Up to 64 rows are compared; a single
            row, or rows that are all the same, are replaced by seven or more noisy copies.
        path: the file to write; missing folders above it are made.
        legacy: True takes the TorchScript exporter at once. False takes it only where the torch.export
            based one fails, and then refuses to trace a network that branches on its data.
        opset: ONNX operator set version; None leaves the choice to the exporter.
        tolerance: largest accepted max |y' - y| / max |y|.
        metadata: what the file says of itself, for whoever serves it; onnxruntime shows it as
            `session.get_modelmeta().custom_metadata_map`.

    Returns:
        The file's path, size in bytes, exporter, opset and measured error.

    Raises:
        ModelError: the network does not map `[B, ...]` to one `[B, ...]` tensor for every B, neither exporter
            can write it, the file asks for another opset, or its outputs differ from the network's.
        RunError: the file cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise RunError(f"an ONNX file was to be written to {target}, which is a folder; name a file")
    if opset is not None and not 1 <= opset <= onnx.defs.onnx_opset_version():
        raise ModelError(f"opset must lie in 1..{onnx.defs.onnx_opset_version()} or be left out, not {opset}")
    network = _deployment_copy(model)
    reference = _reference(network, example, tolerance)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            draft = Path(folder) / "model.onnx"
            file = _write_checked(network, reference, draft, legacy=legacy, opset=opset)
            if metadata:
                proto = onnx.load(str(draft))
                onnx.helper.set_model_props(proto, dict(metadata))
                size = draft.write_bytes(proto.SerializeToString(deterministic=True))
                file = dataclasses.replace(file, bytes=size)
            draft.replace(target)
    except OSError as error:
        raise RunError(f"the ONNX file {target} cannot be written ({error.strerror or error})") from error
    return dataclasses.replace(file, path=target)


def check_onnx(
    path: str | os.PathLike[str], model: nn.Module, x: Tensor, *, tolerance: float = TOLERANCE
) -> float:
    """Compare an ONNX file with a network, on a batch of one and on the whole of `x`.

    Args:
        path: the ONNX file.
        model: the network, in any mode and on any device; compared as a float32 copy in eval mode on the CPU.
        x: real inputs of shape `[B, ...]`, B >= 1; used as `example` is in `export_onnx`.
        tolerance: largest accepted max |y' - y| / max |y|.

    Returns:
        The larger max |y' - y| / max |y| of the two batches.

    Raises:
        ModelError: onnxruntime refuses the file, or its outputs differ by more than the tolerance.
        RunError: the file is not there.
    """
    return _largest_error(Path(path), _reference(_deployment_copy(model), x, tolerance))


def _deployment_copy(model: nn.Module) -> nn.Module:
    """Copy a network as it is deployed: float32, eval mode, on the CPU; of a compiled one, what was compiled."""
    try:
        network = copy.deepcopy(getattr(model, "_orig_mod", model))
    except Exception as error:  # deepcopy runs user code
        raise ModelError(
            f"the network {type(model).__name__} cannot be copied for the export ({first_line(error)}); "
            "remove tensors that hang on a graph from its attributes"
        ) from error
    return network.to("cpu").float().eval().requires_grad_(False)


@dataclass(frozen=True)
class _Reference:
    """What an exported file is held against: inputs at two batch sizes and the network's outputs on them."""

    batches: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tolerance: float


def _reference(network: nn.Module, example: Tensor, tolerance: float) -> _Reference:
    batches = _check_batches(example)
    return _Reference(batches, tuple(_forward(network, batch) for batch in batches), tolerance)


def _check_batches(example: Tensor) -> tuple[Tensor, Tensor]:
    """Real inputs at two batch sizes: one row, and at least seven rows that differ from each other."""
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        what = f"shape {list(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ModelError(f"the export needs an example input of shape [B, ...] with B >= 1, not {what}")
    rows = example.detach().to("cpu")[:MAX_CHECK_ROWS]
    if not rows.is_floating_point():
        rows = rows if len(rows) > 1 else rows.repeat(7, *[1] * (rows.ndim - 1))
        return rows[:1].clone(), rows.clone()
    rows = rows.float()
    # Equal rows would hide a file that mixes up the batch, and zeros would hide wrong weights.
    if len(rows) < 2 or bool((rows == rows[:1]).all()):
        copies = rows.repeat(-(-7 // len(rows)), *[1] * (rows.ndim - 1))
        generator = torch.Generator().manual_seed(0)
        spread = float(rows.std(correction=0)) or 1.0
        rows = copies + spread * torch.randn(copies.shape, generator=generator)
    return rows[:1].clone(), rows.clone()


def _forward(network: nn.Module, batch: Tensor) -> Tensor:
    """Outputs of the network, refused unless they are one finite tensor with a row per input."""
    try:
        with torch.no_grad():
            output = network(batch)
    except Exception as error:  # user code
        raise ModelError(
            f"the network fails on a batch of shape {list(batch.shape)} ({first_line(error)}); "
            "an exported network must take any batch size"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(f"an exported network must return one tensor, not a {type(output).__name__}")
    if output.ndim < 1 or len(output) != len(batch):
        raise ModelError(
            f"an exported network must return one row per input, not shape {list(output.shape)} "
            f"for a batch of {len(batch)}"
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError("the network's outputs are not finite on the example input; nothing can be compared")
    return output


def _write_checked(
    network: nn.Module, reference: _Reference, path: Path, *, legacy: bool, opset: int | None
) -> OnnxFile:
    """Write and check the file, with the fallback exporter if the first one fails or writes a wrong file."""
    if legacy:
        return _write_once(network, reference, path, "torchscript", opset)
    if opset is not None and opset < DYNAMO_OLDEST_OPSET:
        file = _write_once(network, reference, path, "torchscript", opset)
        note = f"the torch.export based exporter writes opset {DYNAMO_OLDEST_OPSET} and later"
        return dataclasses.replace(file, note=note)
    try:
        return _write_once(network, reference, path, "dynamo", opset)
    except ModelError as first:
        try:
            with warnings.catch_warnings():
                # A branch on data is frozen into the way that the example takes: nobody asked for that.
                warnings.filterwarnings("error", category=TracerWarning)
                file = _write_once(network, reference, path, "torchscript", opset)
        except ModelError as second:
            raise ModelError(
                f"neither exporter could write {type(network).__name__} as ONNX: {first}; {second}"
            ) from second
        note = f"the torch.export based exporter was not used: {first}"
        return dataclasses.replace(file, note=note)


def _write_once(
    network: nn.Module, reference: _Reference, path: Path, exporter: Exporter, opset: int | None
) -> OnnxFile:
    """Write with one exporter; strip the file; check its form, its opset and its outputs."""
    try:
        with _without_chatter():
            _EXPORTERS[exporter](network, reference.batches[-1], path, opset)
    except Exception as error:  # whatever the tracer, the network or onnxscript raised comes through
        raise ModelError(f"the {exporter} exporter failed ({_cause(error)})") from error
    try:
        proto = _strip_notes(path)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # checker, shape inference and protobuf errors share no base
        raise ModelError(f"the {exporter} exporter wrote an invalid file ({first_line(error)})") from error
    written = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise ModelError(f"opset {opset} was asked for, but the {exporter} exporter wrote opset {written}")
    deviation = _largest_error(path, reference)
    return OnnxFile(path, path.stat().st_size, exporter, written, deviation)


def _export_dynamo(network: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
    torch.onnx.export(
        network,
        (example,),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        opset_version=opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def _export_torchscript(network: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
    torch.onnx.export(
        network,
        (example,),
        str(path),
        dynamo=False,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
    )


_EXPORTERS = {"dynamo": _export_dynamo, "torchscript": _export_torchscript}


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop what the exporters say about themselves, and the graphs that they print when they fail."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings():
        for category, message in EXPORTER_CHATTER:
            warnings.filterwarnings("ignore", message=message, category=category)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    # Reached only on success: what a network prints in its forward pass is not ours to swallow.
    sys.stdout.write(out.getvalue())
    sys.stderr.write(err.getvalue())


def _strip_notes(path: Path) -> onnx.ModelProto:
    """Remove source lines, module names and traced nodes, which hold machine paths, from the file."""
    proto = onnx.load(str(path))
    graph = proto.graph
    carriers: list[Any] = [proto, graph, *graph.node, *graph.input, *graph.output]
    carriers += [*graph.value_info, *graph.initializer]
    for function in proto.functions:
        carriers += [function, *function.node, *function.value_info]
    for carrier in carriers:
        carrier.ClearField("metadata_props")
        carrier.ClearField("doc_string")
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return proto


def _largest_error(path: Path, reference: _Reference) -> float:
    """Compare the file with the network's outputs: the largest relative error over the batches."""
    session = open_session(path)
    largest = 0.0
    for batch, expected in zip(reference.batches, reference.outputs, strict=True):
        try:
            (output,) = session.run([OUTPUT_NAME], {INPUT_NAME: batch.numpy()})
        except Exception as error:  # onnxruntime raises classes of its own that share no base
            raise ModelError(
                f"onnxruntime cannot run the exported file on a batch of {len(batch)} ({first_line(error)})"
            ) from error
        if tuple(output.shape) != tuple(expected.shape):
            raise ModelError(
                f"the exported file returns shape {list(output.shape)} for a batch of {len(batch)}, "
                f"where the network returns {list(expected.shape)}"
            )
        deviation = _relative_error(torch.from_numpy(output), expected)
        if not deviation <= reference.tolerance:  # written so that NaN is refused
            raise ModelError(
                f"the exported file's outputs differ from the network's by {deviation:.3g} of the largest "
                f"on a batch of {len(batch)}, where {reference.tolerance:.3g} is allowed; do not use the file"
            )
        largest = max(largest, deviation)
    return largest


def _relative_error(output: Tensor, expected: Tensor) -> float:
    """Max |output - expected| / max |expected|; infinite if only `expected` is all zero."""
    if expected.numel() == 0:
        return 0.0
    difference = float((output.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _cause(error: BaseException) -> str:
    """The reason under an exporter's error: its own first line only tells which of its steps failed."""
    inner = error.__cause__ if error.__cause__ is not None else error
    return f"{type(inner).__name__}: {first_line(inner)}"
