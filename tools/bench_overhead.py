"""How much longer our training loop takes than one written by hand in PyTorch, as benchmark `overhead`.

    python tools/bench_overhead.py                                      # LeNet-5 on the embedded digits
    python tools/bench_overhead.py --model lenet_300_100 --pairs 9 --out runs/overhead.json

Both loops train the same network on the same images with the same optimizer and batch size. The one by hand is what a
tutorial shows: normalised images in memory, a random order, forward, backward, step. Ours adds the learning-rate cycle,
the collapse check, the state for a checkpoint and the held-out evaluation (ten images here); nothing is augmented.
Epochs of the two are timed in turn, in an order that reverses every round. On a CPU its own time is
given beside that on the wall, which other programs lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from bench_files import add_out, typed, write
from torch import nn
from torch.nn import functional as F

from sparsebayes.data import Loader, load
from sparsebayes.models import build
from sparsebayes.recipe.schema import TrainSection
from sparsebayes.report.benchmarks import Row
from sparsebayes.train.fit import Phase, fast_layout_, fit_

BATCH, LR, DECAY = 128, 0.01, 5e-4


def by_hand(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One epoch as a tutorial writes it."""
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=DECAY, nesterov=True)
    model.train()
    order = torch.randperm(len(images), device=images.device)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def timed_in_turns(
    loops: Mapping[str, Callable[[], object]], pairs: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    """Run every loop once to warm up, then in turns, each pair in the other order than the last.

    Returns:
        Name of a loop and of a clock to seconds, one value for each pair.
    """
    clocks = {"seconds": time.perf_counter} | (
        {"CPU seconds": time.process_time} if device.type == "cpu" else {}
    )
    times: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in loops for clock in clocks}
    order = list(loops)
    for loop in loops.values():
        loop()
    for _ in range(pairs):
        for name in order:
            if device.type == "cuda":
                torch.cuda.synchronize()
            starts = {clock: read() for clock, read in clocks.items()}
            loops[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            for clock, read in clocks.items():
                times[name, clock].append(read() - starts[clock])
        order.reverse()
    return times


def main() -> int:
    """Time both and write the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet5_caffe")
    parser.add_argument("--data", default="embedded_mnist")
    parser.add_argument("--images", type=int, default=6400, help="training images of an epoch")
    parser.add_argument("--pairs", type=int, default=7, help="epochs of each")
    add_out(parser)
    arguments = parser.parse_args()
    dataset = load(arguments.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = dataset.train.subset(torch.arange(min(arguments.images, len(dataset.train))))

    def loader(num_images: int, batch: int, shuffle: bool) -> Loader:
        part = train.subset(torch.arange(num_images))
        return Loader(
            part, batch_size=batch, mean=dataset.mean, std=dataset.std, shuffle=shuffle, augment="none", seed=0,
            device=device,
        )  # fmt: skip

    plain = list(loader(len(train), 1000, False))
    images, labels = torch.cat([x for x, _ in plain]), torch.cat([y for _, y in plain])
    ours_loader, heldout = loader(len(train), BATCH, True), loader(10, 10, False)
    models = {name: build(arguments.model).to(device) for name in ("ours", "by hand")}
    settings = TrainSection(lr=LR, weight_decay=DECAY)
    phase = Phase(name="bench", epochs=1, lr=LR, seed=0, reference=1e9)
    loops: dict[str, Callable[[], object]] = {
        "ours": lambda: fit_(models["ours"], ours_loader, heldout, phase, settings, save=lambda state: None),
        # Channels last, as ours: the layout is not what is compared.
        "by hand": lambda: by_hand(fast_layout_(models["by hand"]), images, labels),
    }
    times = timed_in_turns(loops, arguments.pairs, device)
    clocks = list(dict.fromkeys(clock for _, clock in times))
    rounds = tuple(range(arguments.pairs))
    task = f"{arguments.model} on {len(train):,} images of {arguments.data}, one epoch"
    rows = [Row(task, name, clock, tuple(found), rounds) for (name, clock), found in times.items()]
    medians = []
    for clock in clocks:
        pairs = zip(times["ours", clock], times["by hand", clock], strict=True)
        ratios = tuple(ours / hand for ours, hand in pairs)
        rows.append(Row(task, "ours", f"{clock}, times the loop by hand", ratios, rounds))
        medians.append(f"{statistics.median(ratios):.3f} in {clock}")
    target = write(
        arguments.out,
        "overhead",
        title="Overhead of the training loop",
        rows=rows,
        notes=[
            "Epochs of both loops timed in turn; the seeds are the numbers of the rounds. "
            f"The median ratio was {', '.join(medians)}."
        ],
        command=typed(arguments.out),
    )
    print(f"median ratio {', '.join(medians)}; {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
