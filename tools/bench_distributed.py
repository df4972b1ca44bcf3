"""Throughput of training on two processes against one, each with one thread, as benchmark `distributed`.

    python tools/bench_distributed.py                                             # LeNet-5 on the embedded digits
    python tools/bench_distributed.py --model resnet20 --data embedded_cifar10 --images 1024

One process, then two under torchrun (gloo), then two, then one, and so on: every start trains one epoch to warm up and
is timed over the next ones, on the same batches of the same images. Two processes share the batch, so twice the
throughput is what two idle cores could give at most; the sum of the gradients after every step is the price. On a
machine whose cores are taken by other programs the ratio says little, and the file then says so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_files import add_out, typed, write

from sparsebayes.data import Loader, load
from sparsebayes.models import build
from sparsebayes.recipe import load_recipe
from sparsebayes.recipe.schema import TrainSection
from sparsebayes.report.benchmarks import Row
from sparsebayes.report.provenance import busy_note
from sparsebayes.train.fit import Phase, fit_
from sparsebayes.train.processes import join, leave

METHODS = {"1 process": 1, "2 processes": 2}


def train(options: argparse.Namespace) -> None:
    """What every process does; the first prints how many images all of them trained on in a second."""
    is_first = join(load_recipe("quickstart", overrides=["device=cpu"]))
    torch.set_num_threads(1)
    dataset = load(options.data)

    def loader(num_images: int, batch: int, shuffle: bool) -> Loader:
        part = dataset.train.subset(torch.arange(min(num_images, len(dataset.train))))
        return Loader(
            part,
            batch_size=batch,
            mean=dataset.mean,
            std=dataset.std,
            shuffle=shuffle,
            augment="none",
            seed=0,
        )

    images, heldout = loader(options.images, options.batch, True), loader(20, 20, False)
    torch.manual_seed(0)
    model = build(options.model)
    phase = Phase(name="bench", epochs=1, lr=0.01, seed=0, reference=1e9)
    seconds = []
    for _ in range(options.epochs + 1):
        start = time.perf_counter()
        fit_(model, images, heldout, phase, TrainSection(lr=0.01))
        seconds.append(time.perf_counter() - start)
    leave()
    if is_first:
        print(f"images in a second: {len(images) * options.batch * options.epochs / sum(seconds[1:])}")


def measured(count: int) -> float:
    """Images in a second of a start with so many processes, of this command with `--train`."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).resolve()), *sys.argv[1:], "--train"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("images in a second: ")]
    return float(line.rpartition(" ")[2])


def main() -> int:
    """Time both and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet5_caffe")
    parser.add_argument("--data", default="embedded_mnist")
    parser.add_argument("--images", type=int, default=6400, help="training images of an epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of a start")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each")
    add_out(parser)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options)
        return 0
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    order = list(METHODS)
    for _ in range(options.rounds):
        for method in order:
            found[method].append(measured(METHODS[method]))
            print(f"{method}: {found[method][-1]:.0f} images in a second", flush=True)
        order.reverse()
    rounds = tuple(range(options.rounds))
    task = f"{options.model} on {options.images:,} images of {options.data}, batches of {options.batch}"
    rows = [
        Row(task, method, "images in a second", tuple(values), rounds) for method, values in found.items()
    ]
    ratios = tuple(two / one for one, two in zip(*found.values(), strict=True))
    rows.append(Row(task, "2 processes", "times one process", ratios, rounds))
    busy = busy_note()
    target = write(
        options.out,
        "distributed",
        title="Training on two processes",
        notes=[
            "Processes of one thread each on one machine, gloo; the seeds are the numbers of the rounds. "
            f"The median ratio was {statistics.median(ratios):.2f}.",
            *([busy] if busy else []),
        ],
        rows=rows,
        command=typed(options.out),
    )
    print(f"median ratio {statistics.median(ratios):.2f}; {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
