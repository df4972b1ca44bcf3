"""Three posteriors over the same groups, and guided against random sampling of sub-networks.

    python tools/bench_posteriors.py posteriors-embedded --seeds 3 --threads 1
    python tools/bench_posteriors.py posteriors-lenet5-mnist --seeds 3      # hours
    python tools/bench_posteriors.py posteriors-equal-error --seeds 3 --threads 1
    python tools/bench_posteriors.py guided-sampling --seeds 5 --threads 1

The first two run recipes that differ in the posterior alone, at one budget. The third runs them without a budget, each
down to a network that is clearly worse, and takes from each run the smallest network whose held-out error is within
half a percentage point of the dense one's. The last learns drop probabilities of a LeNet-300-100 (PGNAS), draws
sub-networks from them, and judges each on held-out images with the weights it has, without any fine-tuning; beside them
random sub-networks of the same widths, and those drawn uniformly. Results are written after every seed. Render the page
afterwards: python tools/render_benchmarks.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_compression import SELECTED, Task
from bench_compression import run as run_task
from bench_files import add_out, write
from torch import Tensor

from sparsebayes.data import Loader, load
from sparsebayes.export.saved import load_model
from sparsebayes.inference import VariationalDropout
from sparsebayes.inference.sampling import (
    best_of,
    draw_candidates,
    expected_best,
    shuffled_candidates,
    uniform_candidates,
)
from sparsebayes.prune.masking import Masks
from sparsebayes.recipe import Recipe, load_recipe
from sparsebayes.report.benchmarks import Row
from sparsebayes.train.evaluation import Evaluation, evaluate
from sparsebayes.train.fit import Phase, fit_
from sparsebayes.train.front import Point, read_front
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.posteriors import phase_and_settings
from sparsebayes.train.removal import dense_groups
from sparsebayes.train.run import run_recipe
from sparsebayes.train.setup import make_builder, make_loaders
from sparsebayes.train.switched import Switched, make_posterior

PROGRAM = "tools/bench_posteriors.py"

OTHERS: dict[str, tuple[str, ...]] = {
    "variational_dropout": ("posterior=variational_dropout", "prior.joint=false"),
    "variational_dropout, best of 20": (
        "posterior=variational_dropout",
        "prior.joint=false",
        "sampling.count=20",
    ),
    "natural_gradient (vadam)": ("posterior=natural_gradient", "prior.joint=false"),
    "natural_gradient (ivon)": (
        "posterior=natural_gradient",
        "prior.joint=false",
        "natural_gradient.update=ivon",
    ),
}
METHODS: dict[str, tuple[str, ...]] = {"laplace": ("prior.joint=false",), "laplace, joint": (), **OTHERS}
EQUAL = (
    "All share network, data, schedule and budget; the learned posteriors train one more epoch in each cycle."
)
TASKS = {
    task.name: task
    for task in (
        Task(
            "posteriors-embedded",
            "Three posteriors at equal size, LeNet-5-Caffe on the embedded MNIST sample",
            "quickstart",
            {name: (*own, "prune.budget.params=0.03", "export.onnx=false") for name, own in METHODS.items()},
            (EQUAL, SELECTED),
        ),
        Task(
            "posteriors-lenet5-mnist",
            "Three posteriors at equal size, LeNet-5-Caffe on MNIST",
            "lenet5_mnist",
            METHODS,
            (EQUAL, SELECTED),
        ),
    )
}

EQUAL_ERROR = "posteriors-equal-error"
MARGIN = 0.005
EQUAL_ERROR_OVERRIDES = (
    "prior.strength=auto",
    # Every network of a run is trained alike: none is fine-tuned beyond its cycle.
    "train.finetune.epochs=0",
    "train.cycles={count: 20, epochs: 2, max_epochs: 6, shrink: 0.3}",
    "export.onnx=false",
    "evaluate.latency=false",
)
EQUAL_ERROR_NOTES = (
    "From each run the smallest network whose held-out error (1,000 images) is at most 0.5 percentage points above "
    "that of the dense network, which all methods of a seed share. Its test error is read once, and no other decided.",
    "Networks as their cycle leaves them, two to six passes after each removal of three tenths; no last fine-tuning.",
    EQUAL,
)

SAMPLING = "guided-sampling"
SAMPLING_OVERRIDES = (
    "model.name=lenet_300_100",
    "prior.joint=false",
    "train.pretrain.epochs=4",
    "train.distill=0",
    "posterior=variational_dropout",
    "variational_dropout={epochs: 8, length_scale: 50.0}",
)
NOTES = (
    "LeNet-300-100 on the embedded MNIST sample: 9,000 images to train on, 1,000 held out. Held-out error, in percent, "
    "of sub-networks with the weights they have, without fine-tuning; test_error_percent is that of the one with the "
    "smallest held-out loss among all, read once.",
    "best_of_k: expected best held-out error among k draws. same widths: as many units on in each layer as in the "
    "guided draws. uniform: every unit on with probability 1/2. constant L2: the weight decay does not weaken where a "
    "unit is dropped, and says nothing about its probability.",
    "Published for CIFAR-10 (PGNAS-MI, without fine-tuning): guided 2.06 %, random 9.75 %; constant L2 is worse.",
)
STEPS = (1, 5, 10, 50, 500)


def learned(recipe: Recipe, loaders: Loaders) -> Switched:
    """A network trained with its units dropped, and their drop probabilities."""
    model = make_builder(recipe, loaders.example.device)()
    train = recipe.train
    first = Phase(
        name="pretrain", epochs=train.pretrain.epochs, lr=train.rate(train.pretrain), seed=recipe.seed
    )
    fit_(model, loaders.train, loaders.heldout, first, train)
    grouping = dense_groups(recipe, model, loaders.example).grouping
    posterior = make_posterior(recipe, model, grouping, loaders.plain.num_data, None)
    switched = Switched(model, grouping, posterior, loaders.example)
    phase, settings = phase_and_settings(recipe, 1)
    fit_(switched, loaders.train, loaders.heldout, phase, settings, after_step=switched.learn_)
    return switched


def judged(switched: Switched, on: Tensor, images: Loader) -> Evaluation:
    """A sub-network as it is; the network comes back as it was."""
    model = switched.network
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    Masks(switched.grouping.masks(on)).reapply_(model)
    result = evaluate(model, images)
    model.load_state_dict(saved)
    return result


def sampled(
    kind: str, switched: Switched, candidates: Tensor, heldout: Loader, test: Loader
) -> Iterator[tuple[str, str, float]]:
    """Figures of one way to draw: (method, metric, value)."""
    errors: dict[bytes, float] = {}

    def loss(on: Tensor) -> float:
        result = judged(switched, on, heldout)
        errors[on.numpy().tobytes()] = 100 * result.error
        return result.loss

    best = best_of(candidates, loss)
    curve = expected_best([errors[on.numpy().tobytes()] for on in candidates])
    for k in STEPS:
        if k <= len(curve):
            yield kind, f"best_of_{k}_heldout_error_percent", float(curve[k - 1])
    chosen = candidates[best.best]
    yield kind, "test_error_percent", 100 * judged(switched, chosen, test).error
    yield kind, "share_of_units_on", float(candidates.double().mean())


def of_same_widths(scores: Tensor, like: Tensor, layers: Tensor) -> Tensor:
    """The best groups by score, as many in each layer as `like` has on: bool of shape ``[G]``."""
    on = torch.zeros_like(like)
    for layer in torch.unique(layers):
        members = (layers == layer).nonzero().flatten()
        count = int(like[members].sum())
        on[members[scores[members].argsort(descending=True)[:count]]] = True
    return on


def sampling_figures(seed: int, num_samples: int, overrides: list[str]) -> Iterator[tuple[str, str, float]]:
    """All figures of one seed."""
    changes = [*SAMPLING_OVERRIDES, f"seed={seed}", *overrides]
    reference = torch.empty(0)
    for adaptive in (True, False):
        own = [f"variational_dropout.adaptive={str(adaptive).lower()}"]
        recipe = load_recipe("quickstart", overrides=[*changes, *own])
        assert isinstance(recipe, Recipe)
        dataset = load(recipe.data.name, root=recipe.data.root)
        loaders, test = make_loaders(recipe, dataset, torch.device("cpu"))
        switched = learned(recipe, loaders)
        posterior, layers = switched.posterior, switched.grouping.layer_index
        assert isinstance(posterior, VariationalDropout)
        generator = torch.Generator().manual_seed(seed)
        guided = draw_candidates(posterior, num_samples, generator)
        if adaptive:
            reference = guided
            yield from sampled("guided", switched, guided, loaders.heldout, test)
            shuffled = shuffled_candidates(guided, layers, generator)
            yield from sampled("random, same widths", switched, shuffled, loaders.heldout, test)
            uniform = uniform_candidates(num_samples, posterior.num_groups, generator)
            yield from sampled("random, uniform", switched, uniform, loaders.heldout, test)
        else:
            # Without the adaptive term little is dropped: the draws' order decides at the other's sizes.
            fitted = torch.stack(
                [of_same_widths(posterior.sample_survival(generator), like, layers) for like in reference]
            )
            yield from sampled("guided by constant L2, same widths", switched, fitted, loaders.heldout, test)


def smallest_within(points: Sequence[Point], margin: float) -> Point:
    """The smallest network whose held-out error is at most so much above the dense one's, which is the first."""
    limit = points[0].heldout_error + margin + 1e-9  # errors are multiples of one image
    return min((p for p in points if p.heldout_error <= limit), key=lambda p: (p.params, p.heldout_error))


def equal_error_figures(
    method: str, seed: int, overrides: list[str], threads: int, folder: Path
) -> Iterator[tuple[str, float]]:
    """Run one method and look at the network that is taken from it: (metric, value)."""
    changes = [*METHODS[method], *EQUAL_ERROR_OVERRIDES, f"seed={seed}", f"threads={threads}", *overrides]
    recipe = load_recipe("quickstart", overrides=changes)
    assert isinstance(recipe, Recipe)
    start = time.perf_counter()
    run_recipe(recipe, out=folder, quiet=True, overwrite=True)
    seconds = time.perf_counter() - start
    points = read_front(folder / "pareto.json")
    taken = smallest_within(points, MARGIN)
    dataset = load(recipe.data.name, root=recipe.data.root)
    _, test = make_loaders(recipe, dataset, torch.device("cpu"))
    yield "test_error_percent", 100 * evaluate(load_model(folder / "points" / str(taken.point)), test).error
    yield "heldout_error_percent", 100 * taken.heldout_error
    yield "dense_heldout_error_percent", 100 * points[0].heldout_error
    yield "params", taken.params
    yield "params_ratio", points[0].params / taken.params
    yield "macs_ratio", points[0].macs / taken.macs
    yield "wall_seconds", seconds


def run_equal_error(
    seeds: list[int], overrides: list[str], threads: int, out: Path, keep: Path | None
) -> None:
    """Measure and write after every run."""
    options = ["--seeds", str(len(seeds)), "--threads", str(threads)]
    values: dict[tuple[str, str], dict[int, float]] = {}
    for seed in seeds:
        for method in METHODS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (keep or Path(scratch)) / f"{EQUAL_ERROR}-{method.replace(' ', '-')}-{seed}"
                found = dict(equal_error_figures(method, seed, overrides, threads, folder))
            for metric, value in found.items():
                values.setdefault((method, metric), {})[seed] = value
            print(f"seed {seed} {method}: {found}", flush=True)
            if (
                len({by_seed[seed] for (_, metric), by_seed in values.items() if metric.startswith("dense")})
                > 1
            ):
                raise RuntimeError(f"the methods of seed {seed} began with different dense networks")
            write(
                out,
                EQUAL_ERROR,
                title="Three posteriors at equal error, LeNet-5-Caffe on the embedded MNIST sample",
                notes=EQUAL_ERROR_NOTES,
                rows=rows_of(EQUAL_ERROR, values),
                command=[PROGRAM, EQUAL_ERROR, *options, *overrides],
                threads=threads,
            )


def rows_of(name: str, values: dict[tuple[str, str], dict[int, float]]) -> list[Row]:
    """Rows of what is known so far."""
    return [
        Row(name, method, metric, tuple(by_seed.values()), tuple(by_seed))
        for (method, metric), by_seed in values.items()
    ]


def run_sampling(seeds: list[int], num_samples: int, overrides: list[str], threads: int, out: Path) -> None:
    """Measure and write after every seed."""
    torch.set_num_threads(threads)
    values: dict[tuple[str, str], dict[int, float]] = {}
    options = ["--seeds", str(len(seeds)), "--samples", str(num_samples), "--threads", str(threads)]
    for seed in seeds:
        for method, metric, value in sampling_figures(seed, num_samples, overrides):
            values.setdefault((method, metric), {})[seed] = value
            print(f"seed {seed} {method}: {metric} {value:.3f}", flush=True)
        write(
            out,
            SAMPLING,
            title="Guided against random sampling of sub-networks",
            notes=NOTES,
            rows=rows_of(SAMPLING, values),
            command=[PROGRAM, SAMPLING, *options, *overrides],
            threads=threads,
        )


def main() -> None:
    """Parse the command line and run one task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=[EQUAL_ERROR, SAMPLING, *sorted(TASKS)])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--samples", type=int, default=500, help="draws (guided-sampling)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    add_out(parser)
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")
    arguments = parser.parse_intermixed_args()
    seeds = list(range(arguments.seeds))
    if arguments.task == SAMPLING:
        run_sampling(seeds, arguments.samples, arguments.overrides, arguments.threads, arguments.out)
    elif arguments.task == EQUAL_ERROR:
        run_equal_error(seeds, arguments.overrides, arguments.threads, arguments.out, arguments.keep)
    else:
        task = TASKS[arguments.task]
        run_task(
            task,
            seeds,
            arguments.overrides,
            arguments.threads,
            arguments.out,
            arguments.keep,
            program=PROGRAM,
        )


if __name__ == "__main__":
    main()
