"""Where a benchmark writes its figures: docs/benchmarks/NAME.json, or NAME.json in the folder that --out names.

Every tools/bench_*.py takes `--out` and writes through here, so that each file says the same of machine, versions and
commit, and a reader can measure without touching the published figures.

    >>> add_out(parser)
    >>> options = parser.parse_args(["--out", "runs/mine"])
    >>> write(options.out, "overhead", title="...", notes=["..."], rows=rows, command=["tools/bench_overhead.py"])
    PosixPath('runs/mine/overhead.json')
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsebayes.report.benchmarks import Row, read_benchmark, write_rows
from sparsebayes.report.provenance import git_commit, library_versions, machine_hardware

__all__ = ["PUBLISHED", "ROOT", "add_out", "file_of", "typed", "write"]

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs" / "benchmarks"


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out`: a folder, or one file, whose name then ends in .json."""
    parser.add_argument(
        "--out",
        type=Path,
        default=PUBLISHED,
        metavar="PATH",
        help="folder to write to, or a file NAME.json; default: docs/benchmarks",
    )


def file_of(out: Path, name: str) -> Path:
    """The file of a benchmark.

    Args:
        out: what `--out` says.
        name: name of the benchmark.
    """
    return out if out.suffix == ".json" else out / f"{name}.json"


def write(
    out: Path,
    name: str,
    *,
    title: str,
    notes: Sequence[str],
    rows: Sequence[Row],
    command: Sequence[str],
    threads: int | None = None,
) -> Path:
    """Write the rows of a benchmark, and read them back.

    Args:
        out: what `--out` says.
        name: name of the benchmark.
        title: heading of its part of the page.
        notes: sentences on what was compared and how to read it.
        rows: the results.
        command: script and arguments that make the file.
        threads: threads of torch, where the figures depend on them.

    Returns:
        The file.

    Raises:
        RunError: a result is there twice, or the file cannot be written.
    """
    target = file_of(out, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(
        target,
        title=title,
        rows=rows,
        notes=notes,
        hardware=machine_hardware() + ("" if threads is None else f"; {threads} threads"),
        versions=library_versions(),
        command=shlex.join(["python", *command]),
        git_commit=git_commit(ROOT),
    )
    read_benchmark(target)
    return target


def typed(out: Path) -> list[str]:
    """Script and arguments as they were typed, without a folder that only this machine has.

    Args:
        out: what `--out` says; a file's name is part of how its figures are made.
    """
    words = [
        word
        for number, word in enumerate(sys.argv[1:], start=1)
        if not word.startswith("--out=") and "--out" not in (word, sys.argv[number - 1])
    ]
    if out.suffix == ".json":
        words += ["--out", (PUBLISHED.relative_to(ROOT) / out.name).as_posix()]
    return [f"tools/{Path(sys.argv[0]).name}", *words]
