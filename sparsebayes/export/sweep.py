"""How long exported networks take, and how much memory, over batch sizes and numbers of threads.

Files of one setting are sampled in turn (see `measure`), so their ratio holds on a machine that is shared. Memory
is the growth of a fresh process's peak resident size, from before the file is opened until a batch has been run.

    >>> rows = sweep({"dense": "dense.onnx", "compact": "model.onnx"}, batches=(1, 64), threads=(1,))
    >>> rows[0]
    Timing(file='dense', batch=1, threads=1, latency_ms=0.412, memory_mb=9.1)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparsebayes.errors import ModelError
from sparsebayes.export.measure import compare_latency

__all__ = ["Timing", "peak_memory_mb", "sweep"]


@dataclass(frozen=True)
class Timing:
    """One file in one setting.

    Attributes:
        file: its name.
        batch: inputs of one call.
        threads: threads inside one operator.
        latency_ms: median milliseconds of one call.
        memory_mb: growth of the process's peak memory in 10^6 bytes; None where it cannot be measured.
    """

    file: str
    batch: int
    threads: int
    latency_ms: float
    memory_mb: float | None

    @property
    def throughput(self) -> float:
        """Inputs per second."""
        return 1e3 * self.batch / self.latency_ms


def sweep(
    paths: Mapping[str, str | os.PathLike[str]],
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    repeats: int = 30,
    on_setting: Callable[[int, int], None] | None = None,
) -> tuple[Timing, ...]:
    """Measure every file in every setting.

    Args:
        paths: a name for each ONNX file; each has one input of shape `[batch, ...]`, only `batch` free.
        batches: batch sizes.
        threads: numbers of threads.
        repeats: samples for each file and setting, each of at least 2 ms.
        on_setting: called with batch and threads before each setting.

    Returns:
        Ordered by threads, batch, file.

    Raises:
        ModelError: onnxruntime refuses a file or a batch size, or a count is below 1.
        RunError: a file is not there.
    """
    rows = []
    for count in threads:
        for batch in batches:
            if on_setting is not None:
                on_setting(batch, count)
            times = compare_latency(paths, batch=batch, threads=count, repeats=repeats)
            for name, path in paths.items():
                rows.append(Timing(name, batch, count, times[name], peak_memory_mb(path, batch, count)))
    return tuple(rows)


# A program that knows nothing of this package, whose imports would hide what the file needs.
_PROBE = """
import resource, sys
import numpy, onnxruntime

path, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kinds = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(int64)": "int64"}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
def peak():
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
try:
    open("/proc/self/clear_refs", "w").write("5")  # Linux: the peak so far, that of the imports, is forgotten
except OSError:
    pass
before = peak()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
entry = session.get_inputs()[0]
session.run(None, {entry.name: numpy.zeros((batch, *entry.shape[1:]), kinds[entry.type])})
print(peak() - before)
"""


def peak_memory_mb(path: str | os.PathLike[str], batch: int, threads: int) -> float | None:
    """Memory that opening and running a file takes, measured in a process of its own.

    Args:
        path: the ONNX file.
        batch: inputs of the call.
        threads: threads inside one operator.

    Returns:
        10^6 bytes above what the process used before the file was opened; None on systems without `resource`.

    Raises:
        ModelError: the process failed.
    """
    if sys.platform == "win32":
        return None
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(path), str(batch), str(threads)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(f"{path} could not be run in a process of its own ({lines[-1][:300]})")
    return int(done.stdout) / 1e6
