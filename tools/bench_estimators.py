"""Do better curvature estimates change what is pruned? Overlap of selections, and the error after fine-tuning.

    python tools/bench_estimators.py --seeds 3
    python tools/bench_estimators.py --data cifar10 --model resnet --width 16 --epochs 20 --finetune 5

For every seed one network is trained; each estimator then scores its single weights by their evidence z^2 h = w^2 G_ii,
or its filters by the sum of that over their entries, and the best share of each layer's groups that `--keep` allows
over the whole network stays. Selections are compared with those of the exact diagonal (Jaccard: common / either), and
each pruned network is fine-tuned in the same way. The test set is read once per network, at the end. The
benchmark is called curvature-selections.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from bench_files import add_out, typed, write
from torch import Generator, Tensor, nn
from torch.nn import functional

from sparsebayes.curvature import entry_curvature, recursion_curvature
from sparsebayes.data import Dataset, Loader, load
from sparsebayes.models.lenet import LeNet5Caffe
from sparsebayes.report.benchmarks import Row

Batches = list[tuple[Tensor, Tensor]]
Scores = dict[str, Tensor]


def train_(model: nn.Module, data: Dataset, epochs: int, rate: float, seed: int, keep: Scores) -> None:
    """Train with momentum; weights outside `keep` stay 0."""
    loader = Loader(data.train, batch_size=100, mean=data.mean, std=data.std, shuffle=True, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    parameters = dict(model.named_parameters())
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for name, mask in keep.items():
                    parameters[name].mul_(mask)
    model.eval()


def test_error(model: nn.Module, data: Dataset) -> float:
    """Share of the test images that the network gets wrong, in per cent."""
    loader = Loader(data.test, batch_size=500, mean=data.mean, std=data.std, shuffle=False)
    with torch.no_grad():
        wrong = [(model(x).argmax(1) != y).sum() for x, y in loader]
    return 100 * float(torch.stack(wrong).sum()) / len(data.test)


def empirical_fisher(batches: Batches) -> Callable[[Tensor, Generator], Tensor]:
    """Starting vectors that are the gradients at the true labels; asked for in the order of the images."""
    labels, place = torch.cat([y for _, y in batches]), 0

    def factor(logits: Tensor, _: Generator) -> Tensor:
        nonlocal place
        y = labels[place : place + len(logits)]
        place += len(logits)
        return (logits.softmax(1) - functional.one_hot(y, logits.shape[1])).unsqueeze(0)

    return factor


def diagonals(model: nn.Module, batches: Batches, names: list[str], seed: int) -> dict[str, Scores]:
    """The curvature of every weight by every estimator."""
    size = sum(len(y) for _, y in batches)

    def estimate(**settings: Any) -> Scores:
        return dict(entry_curvature(model, names, batches, num_data=size, seed=seed, **settings))

    return {
        "exact": estimate(estimator="exact"),
        "stick": estimate(),
        "stick, importance 0.1": estimate(importance=0.1),
        "sampled label": estimate(factor="sampled_label"),
        "empirical Fisher": estimate(factor=empirical_fisher(batches)),
        "recursion": recursion_curvature(model, names, batches, num_data=size),
        "magnitude (h = 1)": {name: torch.ones_like(dict(model.named_parameters())[name]) for name in names},
    }


def kept(evidence: Scores, share: float, filters: bool) -> Scores:
    """Masks of the groups with the most evidence; a filter's is the sum over its entries."""
    groups = {name: (e.flatten(1).sum(1) if filters else e.flatten()) for name, e in evidence.items()}
    every = torch.cat(list(groups.values()))
    least = every.topk(max(1, round(share * every.numel()))).values[-1]
    masks = {}
    for name, values in groups.items():
        mask = values >= least
        if not bool(mask.any()):  # a layer without groups would cut the network
            mask[values.argmax()] = True
        shape = evidence[name].shape
        masks[name] = mask.view(-1, *[1] * (len(shape) - 1)).expand(shape) if filters else mask.view(shape)
    return masks


def jaccard(one: Scores, other: Scores) -> float:
    """Entries kept by both over entries kept by either."""
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    return both / sum(int((one[name] | other[name]).sum()) for name in one)


def run(options: argparse.Namespace) -> list[Row]:
    """All seeds, methods and kinds of groups."""
    data = load(options.data)
    values: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        channels, size = data.train.images.shape[1], data.train.images.shape[-1]
        if options.model == "lenet":
            model: nn.Module = LeNet5Caffe(in_channels=channels, input_size=size)
        else:
            from bench_networks import resnet18

            model = resnet18(options.width, channels)
        train_(model, data, options.epochs, 0.05, seed, {})
        plain = Loader(data.train, batch_size=128, mean=data.mean, std=data.std, shuffle=False)
        batches = [pair for pair, _ in zip(plain, range(options.images // 128), strict=False)]
        # The last layer's rows are the classes: nothing to choose from.
        names = [name for name, p in model.named_parameters() if p.ndim > 1]
        found = diagonals(model, batches, names, seed)
        weights = {name: p.detach() for name, p in model.named_parameters() if name in names}
        for kind, share in (("weights", options.keep), ("filters", options.keep_filters)):
            scored = names if kind == "weights" else names[:-1]
            evidence = {
                method: {name: weights[name].square() * h[name] for name in scored}
                for method, h in found.items()
            }
            masks = {method: kept(one, share, kind == "filters") for method, one in evidence.items()}
            task = f"{options.model} on {options.data}, {100 * share:g} % of {kind} kept"
            for method, mask in masks.items():
                small = copy.deepcopy(model)
                with torch.no_grad():
                    for name, p in small.named_parameters():
                        if name in mask:
                            p.mul_(mask[name])
                train_(small, data, options.finetune, 0.02, seed, mask)
                results = {
                    "overlap with exact": jaccard(mask, masks["exact"]),
                    "test error (%)": test_error(small, data),
                }
                for metric, value in results.items():
                    values.setdefault((task, method, metric), []).append(value)
                    print(f"seed {seed}: {task}: {method}: {metric} {value:.3g}", flush=True)
    seeds = tuple(range(options.seeds))
    return [Row(*key, values=tuple(figures), seeds=seeds) for key, figures in values.items()]


def main() -> None:
    """Parse the command line, run, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="embedded_mnist")
    parser.add_argument("--model", choices=["lenet", "resnet"], default="lenet")
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--finetune", type=int, default=1, help="epochs after pruning")
    parser.add_argument("--images", type=int, default=2048, help="of the curvature")
    parser.add_argument("--keep", type=float, default=0.02, help="share of the weights")
    parser.add_argument("--keep-filters", type=float, default=0.1, help="share of the filters")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write(
        options.out,
        "curvature-selections",
        title="Does a better curvature change what is pruned?",
        notes=[
            f"Trained for {options.epochs} epochs, curvature from {options.images} training images, fine-tuned for "
            f"{options.finetune} epochs after pruning. Overlap: entries kept by both over entries kept by either.",
            "Test errors are those of the pruned networks after fine-tuning; the test set chose nothing.",
        ],
        rows=run(options),
        command=typed(options.out),
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
