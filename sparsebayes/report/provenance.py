"""Where a figure comes from: the machine, the libraries and the commit.

>>> machine_hardware(), git_commit(Path("."))
('AMD EPYC 7763, 2 cores', '3f2a91c04b7d')
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["busy_note", "git_commit", "library_versions", "machine_hardware"]

LIBRARIES = ("torch", "torchvision", "onnx", "onnxruntime", "numpy")


def machine_hardware() -> str:
    """Say which processor and how many cores this process may use, and the GPU if torch sees one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    parts = [f"{_processor()}, {cores} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name(0))
    return "; ".join(parts)


def busy_note() -> str | None:
    """Say that other programs take the cores while something is timed; None where they do not, or it is not known.

    Returns:
        A sentence if the load of the last minute exceeds the cores of this process.
    """
    if sys.platform == "win32":
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores + 0.5:  # what is timed counts as well
        return None
    return (
        f"The machine was busy (load {load:.1f} on {cores} cores): ratios of one thread hold, times do not, and "
        "those of several threads say nothing."
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide on figures and speed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # onnxruntime-gpu, for one, is onnxruntime by another name.
            versions[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
    return versions


def git_commit(root: Path) -> str:
    """Name the commit that a working tree is on.

    Args:
        root: a folder in the working tree.

    Returns:
        The first 12 digits of the commit, with "-dirty" behind them if tracked files were changed other than the
        figures in docs/benchmarks, which a benchmark writes as it goes; "unknown" outside a repository or before the
        first commit.
    """
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _git(
        root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/benchmarks"
    )
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name: /proc/cpuinfo knows it on Linux, where `platform` does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
