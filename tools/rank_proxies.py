"""Rank correlation of the training-free proxies with true accuracies, on random cells of NAS-Bench-201.

    python tools/rank_proxies.py --cells 1000
    python tools/rank_proxies.py --cells 100 --threads 1 --out runs/proxies

A check of the proxies, not of a search: networks of the benchmark's size (16 channels, 5 cells per stage) with fresh
weights, a batch of 32 CIFAR-10 images from the sample inside the package. Published Spearman correlations of SynFlow
and NASWOT with CIFAR-10 accuracies on this benchmark are about 0.7 to 0.8.
"""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
from bench_files import add_out, typed, write

from sparsebayes.data import Loader, load
from sparsebayes.nas import SPACES, Genotype, build_network
from sparsebayes.nas.decision import connected
from sparsebayes.nas.genotype import Op
from sparsebayes.nas.proxies import PROXIES, rank_correlation
from sparsebayes.nas.tabular import BenchTable, cell_of
from sparsebayes.report.benchmarks import Row

TASKS = {"CIFAR-10": "c10_test_200", "CIFAR-100": "c100_test_200", "ImageNet16-120": "in16_test_200"}
BATCH = 32


def alive(cell: str) -> tuple[Op, ...]:
    """Operations of a cell of the benchmark that lie on a path from its input to its output."""
    (spec,) = SPACES["nas_bench_201"].cells
    numbers = {(edge.source, edge.target): number for number, edge in enumerate(spec.edges)}
    ops = cell_of(cell)
    paths = connected(spec, [(numbers[source, target], op) for source, target, op in ops])
    return tuple((s, t, op) for s, t, op in ops if (numbers[s, t], op) in paths)


def scores(
    cells: list[str], seed: int, width: int, depth: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Score every cell with every proxy; also the seconds that each proxy took."""
    data = load("embedded_cifar10")
    loader = Loader(
        data.train, batch_size=BATCH, mean=data.mean, std=data.std, shuffle=True, augment="none", seed=seed
    )
    images, labels = next(iter(loader))
    found: dict[str, list[float]] = {name: [] for name in PROXIES}
    seconds = dict.fromkeys(PROXIES, 0.0)
    for number, cell in enumerate(cells):
        ops = alive(cell)
        torch.manual_seed(seed)
        network = (
            build_network(Genotype("nas_bench_201", {"normal": ops}), width=width, depth=depth)
            if ops
            else None
        )
        for name, proxy in PROXIES.items():
            start = time.perf_counter()
            found[name].append(-math.inf if network is None else proxy(network, images, labels))
            seconds[name] += time.perf_counter() - start
        if (number + 1) % 50 == 0:
            print(f"{number + 1} of {len(cells)} cells", flush=True)
    return found, seconds


def main() -> None:
    """Score the cells, print and write the correlations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=5)
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    table = BenchTable.embedded()
    cells = random.Random(arguments.seed).sample(sorted(table.position), arguments.cells)
    found, seconds = scores(cells, arguments.seed, arguments.width, arguments.depth)
    rows = []
    for name, values in found.items():
        for task, column in TASKS.items():
            truth = [table.columns[column][table.position[cell]] for cell in cells]
            value = rank_correlation(values, truth)
            print(f"{name:10} {task:15} {value:.3f}")
            metric = f"Spearman correlation, {task}"
            rows.append(Row("NAS-Bench-201 proxies", name, metric, (value,), (arguments.seed,)))
        spent = 1000 * seconds[name] / len(cells)
        rows.append(
            Row("NAS-Bench-201 proxies", name, "milliseconds for a cell", (spent,), (arguments.seed,))
        )
    write(
        arguments.out,
        "proxies",
        title="Training-free proxies against true accuracies on NAS-Bench-201",
        rows=rows,
        notes=[
            f"{len(cells)} random cells, {arguments.width} channels, {arguments.depth} cells per stage, batch {BATCH}."
        ],
        command=typed(arguments.out),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
