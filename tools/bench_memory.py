"""How much more memory a call takes than the process held before it, on Linux.

Run it in a process of its own: what an earlier call has left in the allocator's hands is not counted again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["peak_megabytes"]


def peak_megabytes(call: Callable[[], object]) -> float:
    """MB above the start that a call takes at most.

    Args:
        call: what to measure.
    """
    # Not getrusage: its peak begins with that of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
