"""How long an exported network takes in onnxruntime, measured so that two files can be compared.

One sample is the mean time of k calls in a row, with k chosen so that a sample lasts at least 2 ms: the
clock and the scheduler are too coarse for one call of a small network (about 20 microseconds). The figure
is the median over the samples. Files that are compared are sampled in turn, in an order that reverses every
round, so that a machine that warms up, throttles or is shared slows all of them alike.

    >>> compare_latency({"dense": "dense.onnx", "compact": "model.onnx"}, batch=1)
    {'dense': 0.412, 'compact': 0.067}          # milliseconds for one batch
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

from sparsebayes.errors import ModelError, RunError

__all__ = ["compare_latency", "latency_ms", "open_session", "prepare_call"]

MIN_SAMPLE_SECONDS = 2e-3
WARM_UP_CALLS = 3
NUMPY_TYPES = {"tensor(float)": numpy.float32, "tensor(double)": numpy.float64, "tensor(int64)": numpy.int64}


def latency_ms(path: str | os.PathLike[str], *, batch: int = 1, threads: int = 1, repeats: int = 30) -> float:
    """Median time that one call of an ONNX file takes in onnxruntime on the CPU.

    Args:
        path: an ONNX file with one input of shape `[batch, ...]`, only the batch dimension free.
        batch: rows of the input.
        threads: threads inside one operator.
        repeats: samples, each of at least 2 ms.

    Returns:
        Milliseconds for one batch.

    Raises:
        ModelError: onnxruntime refuses the file or the batch size, or the file's input is not as above.
        RunError: the file is not there.
    """
    return compare_latency({"file": path}, batch=batch, threads=threads, repeats=repeats)["file"]


def compare_latency(
    paths: Mapping[str, str | os.PathLike[str]], batch: int = 1, threads: int = 1, repeats: int = 30
) -> dict[str, float]:
    """Median time per call of several ONNX files, sampled in turn.

    Args:
        paths: a name for each ONNX file; each has one input of shape `[batch, ...]`, only `batch` free.
        batch: rows of the input.
        threads: threads inside one operator.
        repeats: samples for each file, each of at least 2 ms.

    Returns:
        Milliseconds for one batch, by name, in the order of `paths`.

    Raises:
        ModelError: onnxruntime refuses a file or the batch size, a file's input is not as above, or a count
            is below 1.
        RunError: a file is not there.
    """
    for what, count in (("batch", batch), ("threads", threads), ("repeats", repeats)):
        if count < 1:
            raise ModelError(f"a latency measurement needs {what} of at least 1, not {count}")
    calls = {name: prepare_call(path, batch, threads) for name, path in paths.items()}
    per_sample = {name: _calls_per_sample(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            samples[name].append(_seconds_per_call(calls[name], per_sample[name]))
        order.reverse()
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def open_session(path: str | os.PathLike[str], *, threads: int = 1) -> Any:
    """Open an ONNX file in onnxruntime on the CPU.

    Args:
        path: the ONNX file.
        threads: threads inside one operator; operators always run one after the other.

    Returns:
        The `onnxruntime.InferenceSession`.

    Raises:
        ModelError: onnxruntime refuses the file.
        RunError: the file is not there.
    """
    if not Path(path).is_file():
        raise RunError(f"an ONNX file was expected at {path}, where there is none; export the network first")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between two calls would take the cores from the next file that is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only: remarks on the graph optimiser are of no use to the caller
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen classes of its own that share no base
        raise ModelError(
            f"onnxruntime cannot run {path} ({first_line(error)}); export the network again"
        ) from error


def prepare_call(path: str | os.PathLike[str], batch: int, threads: int) -> Callable[[], object]:
    """Open a file and warm it up.

    Args:
        path: an ONNX file with one input of shape `[batch, ...]`, only the batch dimension free.
        batch: rows of the input.
        threads: threads inside one operator.

    Returns:
        A function that runs the file once, on fixed noise (zeros for integer inputs, which may be indices).

    Raises:
        ModelError: onnxruntime refuses the file or the batch size, or the file's input is not as above.
        RunError: the file is not there.
    """
    session = open_session(path, threads=threads)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ModelError(f"a latency measurement needs a file with one input; {path} has {len(inputs)}")
    entry = inputs[0]
    if entry.type not in NUMPY_TYPES:
        raise ModelError(f"the input of {path} is {entry.type}; known are {', '.join(sorted(NUMPY_TYPES))}")
    feed = {entry.name: _noise(_input_shape(path, entry.shape, batch), NUMPY_TYPES[entry.type])}

    def call() -> object:
        return session.run(None, feed)

    try:
        for _ in range(WARM_UP_CALLS):
            call()
    except Exception as error:  # onnxruntime raises classes of its own that share no base
        raise ModelError(
            f"onnxruntime cannot run {path} on a batch of {batch} ({first_line(error)})"
        ) from error
    return call


def _input_shape(path: str | os.PathLike[str], shape: list[int | str | None], batch: int) -> tuple[int, ...]:
    """The input's shape with the batch filled in; free dimensions are names or None in onnxruntime."""
    if not shape:
        raise ModelError(f"the input of {path} has no batch dimension")
    first, *rest = shape
    sizes = [size for size in rest if isinstance(size, int)]
    if len(sizes) != len(rest):
        raise ModelError(f"the input of {path} has shape {shape}; only its first dimension may be free")
    if isinstance(first, int) and first != batch:
        raise ModelError(f"{path} is fixed to a batch of {first}, so a batch of {batch} cannot be measured")
    return (batch, *sizes)


def _noise(shape: tuple[int, ...], dtype: type) -> Any:
    if issubclass(dtype, numpy.integer):
        return numpy.zeros(shape, dtype=dtype)
    return numpy.random.default_rng(0).standard_normal(shape).astype(dtype)


def _calls_per_sample(call: Callable[[], object]) -> int:
    """Double the calls until they last 2 ms together; also warms the caches of the machine."""
    count = 1
    while _seconds_per_call(call, count) * count < MIN_SAMPLE_SECONDS:
        count *= 2
    return count


def _seconds_per_call(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300].rstrip(".") if text else type(error).__name__
