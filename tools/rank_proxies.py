"""Rank correlation of the training-free proxies with true accuracies, on random cells of NAS-Bench-201.

    python tools/rank_proxies.py --cells 1000
    python tools/rank_proxies.py --cells 100 --threads 1 --out runs/proxies

A check of the proxies, not of a search: networks of the benchmark's size (16 channels, 5 cells per stage) with fresh
weights, a batch of 32 CIFAR-10 images from the sample inside the package. Published Spearman correlations of SynFlow
and NASWOT with CIFAR-10 accuracies on this benchmark are about 0.7 to 0.8. The file is written after every 50 cells.
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


class Scores:
    """Scores of cells so far, and what they cost.

    Args:
        seed: of the batch, and of every network's weights.
        width: channels of the first stage.
        depth: cells of a stage.
    """

    def __init__(self, seed: int, width: int, depth: int) -> None:
        data = load("embedded_cifar10")
        loader = Loader(
            data.train,
            batch_size=BATCH,
            mean=data.mean,
            std=data.std,
            shuffle=True,
            augment="none",
            seed=seed,
        )
        self.images, self.labels = next(iter(loader))
        self.seed, self.width, self.depth = seed, width, depth
        self.cells: list[str] = []
        self.values: dict[str, list[float]] = {name: [] for name in PROXIES}
        self.seconds = dict.fromkeys(PROXIES, 0.0)

    def add_(self, cell: str) -> None:
        """Score a cell with every proxy; one that leads nowhere is worst."""
        ops = alive(cell)
        torch.manual_seed(self.seed)
        genotype = Genotype("nas_bench_201", {"normal": ops})
        network = build_network(genotype, width=self.width, depth=self.depth) if ops else None
        for name, proxy in PROXIES.items():
            start = time.process_time()
            value = -math.inf if network is None else proxy(network, self.images, self.labels)
            self.values[name].append(value)
            self.seconds[name] += time.process_time() - start
        self.cells.append(cell)

    def rows(self, table: BenchTable) -> list[Row]:
        """The correlations with the accuracies of a table, and the cost of each proxy."""
        rows = []
        for name, values in self.values.items():
            for task, column in TASKS.items():
                truth = [table.columns[column][table.position[cell]] for cell in self.cells]
                value = rank_correlation(values, truth)
                metric = f"Spearman correlation, {task}"
                rows.append(Row("NAS-Bench-201 proxies", name, metric, (value,), (self.seed,)))
            spent = 1000 * self.seconds[name] / len(self.cells)
            metric = "processor milliseconds for a cell"
            rows.append(Row("NAS-Bench-201 proxies", name, metric, (spent,), (self.seed,)))
        return rows


def main() -> None:
    """Score the cells, write the correlations as they become known, and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=5)
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = BenchTable.embedded()
    cells = random.Random(arguments.seed).sample(sorted(table.position), arguments.cells)
    scores = Scores(arguments.seed, arguments.width, arguments.depth)
    for number, cell in enumerate(cells, start=1):
        scores.add_(cell)
        if number % 50 and number < len(cells):
            continue
        rows = scores.rows(table)
        write(
            arguments.out,
            "proxies",
            title="Training-free proxies against true accuracies on NAS-Bench-201",
            rows=rows,
            notes=[
                f"{number} random cells, {arguments.width} channels, {arguments.depth} cells per stage, batch {BATCH}."
            ],
            command=typed(arguments.out),
            threads=arguments.threads,
        )
        print(f"{number} of {len(cells)} cells", flush=True)
    for row in rows:
        print(f"{row.method:10} {row.metric:40} {row.mean:.3f}")


if __name__ == "__main__":
    main()
