"""A small part of docs/benchmarks.md measured anew, beside the published figures: make bench-quick.

    python tools/bench_quick.py                    # a few minutes on two quiet cores
    python tools/bench_quick.py overhead surgery   # some parts

Every part is an ordinary benchmark with fewer seeds, networks or rounds, and writes to runs/bench-quick; the published
figures stay as they are. Errors and sizes should lie within the spread over seeds; seconds depend on the machine,
ratios of times hardly. Exit status 1 if a part fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench_files import PUBLISHED, ROOT

from sparsebayes.report.benchmarks import Row, mean_and_sd, read_benchmark

__all__ = ["PARTS", "beside_published", "main"]

PARTS = {
    "overhead": ("overhead", "bench_overhead.py --pairs 3"),
    "surgery": ("torchvision-surgery", "bench_surgery.py lenet5_caffe resnet18 mobilenet_v2"),
    "curvature": ("curvature-cell", "bench_curvature.py cell --rounds 3 --batches 4"),
    "quickstart": ("quickstart", "bench_compression.py quickstart --seeds 1 --threads 2"),
    "sampling": ("guided-sampling", "bench_posteriors.py guided-sampling --seeds 1 --samples 50 --threads 1"),
}
"""Part -> name of the published benchmark, and the command that makes a part of it."""


def beside_published(measured: Path, published: Path) -> str:
    """Write measured and published figures in lines, one for each metric of each method.

    Args:
        measured: JSON file of a benchmark.
        published: that of the published one; it may be absent.

    Returns:
        Aligned text, and how the published figures were made; "-" where nothing is published.

    Raises:
        RunError: a file is damaged.
    """
    reference = read_benchmark(published) if published.exists() else None
    rows = () if reference is None else reference.rows
    known = {(row.task, row.method, row.metric): mean_and_sd(row) for row in rows}
    lines = [("", "measured", "published")]
    task = ""
    for row in read_benchmark(measured).rows:
        if row.task != task:
            task = row.task
            lines.append((task, "", ""))
        place = (row.task, row.method, row.metric)
        lines.append((f"  {row.method}: {row.metric}", _figure(row), known.get(place, "-")))
    label, figure = (max(len(line[column]) for line in lines) for column in (0, 1))
    text = [f"{line[0]:<{label}}  {line[1]:<{figure}}  {line[2]}".rstrip() for line in lines]
    if reference is not None:
        text.append(f"published: {reference.command}, on {reference.hardware}")
    return "\n".join(text)


def _figure(row: Row) -> str:
    """Mean and deviation with digits enough to tell one seed from another."""
    mean = f"{row.mean:,.0f}" if row.mean >= 1000 else f"{row.mean:.4g}"
    return mean if row.sd is None else f"{mean} ± {row.sd:.2g} ({len(row.values)})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, and print each beside what is published.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0, or 1 if a part failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-quick", metavar="FOLDER")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; choose from {', '.join(PARTS)}")
    failed = []
    start = time.perf_counter()
    for part in options.parts or PARTS:
        name, command = PARTS[part]
        print(f"\n{part}: python tools/{command}", flush=True)
        script, *words = command.split()
        target = options.out / f"{name}.json"
        target.unlink(missing_ok=True)  # figures of an earlier try are none of this one
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / script), *words, "--out", str(options.out)], check=False
        )
        if done.returncode:
            print(f"{part}: failed with exit status {done.returncode}", file=sys.stderr)
            failed.append(part)
            continue
        print(f"\n{beside_published(target, PUBLISHED / target.name)}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s; figures in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
