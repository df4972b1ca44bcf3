"""Compression figures: error, size, speed and time of the shipped recipes, seed by seed.

    python tools/bench_compression.py lenet5-mnist --seeds 5
    python tools/bench_compression.py equal-size --seeds 5 --threads 1

Each task runs a recipe once per seed, in this process, reads the test error off the run's report, and writes
what is known after every seed, so that a long benchmark can be watched and interrupted. The data root is
$SPARSEBAYES_DATA. Render the page afterwards: python tools/render_benchmarks.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_files import add_out, write

from sparsebayes.recipe import load_recipe
from sparsebayes.report import read_report
from sparsebayes.report.benchmarks import Row
from sparsebayes.train.run import run_recipe


@dataclass(frozen=True)
class Task:
    """One line of a table per method: a recipe with overrides.

    Attributes:
        name: Task as the tables call it.
        title: Heading of its file.
        recipe: Shipped recipe.
        methods: Method to the overrides that make it.
        notes: What a reader must know.
        preset: Preset of the recipe; None: the recipe itself.
    """

    name: str
    title: str
    recipe: str
    methods: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    preset: str | None = None


OURS: dict[str, tuple[str, ...]] = {"sparsebayes": ()}
SELECTED = (
    "Settings were chosen by the held-out loss of seed 0, whose test error was seen during development; no setting was "
    "changed after the other seeds were run. The test set is read once, at the end of each run."
)
UNTOUCHED = "Settings were not tuned on these runs. The test set is read once, at the end of each run."
SAMPLE = (
    "Full width and the recipe's budget, but only 1,800 training images: the latency is that of a network this large, "
    "the errors are no result for CIFAR-10."
)
EQUAL = "All share schedule, budget and seeds; only the score that orders the groups differs."
SCORES = {
    "switch evidence": (),
    "entries": ("prior.scale=entries", "prior.joint=false"),
    "magnitude": ("prune.score=magnitude",),
    "Taylor": ("prune.score=taylor",),
    "random": ("prune.score=random",),
}

TASKS = {
    task.name: task
    for task in (
        Task(
            "quickstart", "Quickstart: LeNet-5 on the embedded MNIST sample", "quickstart", OURS, (SELECTED,)
        ),
        Task(
            "lenet5-mnist",
            "LeNet-5-Caffe on MNIST, structured",
            "lenet5_mnist",
            OURS,
            (
                SELECTED,
                "Published, structured (error %, parameters fewer): BC-GHS 1.0, 156x; BC-GNJ 1.0, 108x "
                "(Louizos et al. 2017, as listed by its authors).",
            ),
        ),
        Task(
            "lenet5-mnist-300x",
            "LeNet-5-Caffe on MNIST at 1/300 of its parameters",
            "lenet5_mnist",
            {"sparsebayes": ("prune.budget.params=0.00333",)},
            (SELECTED,),
        ),
        Task(
            "lenet300-mnist",
            "LeNet-300-100 on MNIST, structured",
            "lenet300_mnist",
            {"sparsebayes": (), "sparsebayes, budget 1/27": ("prune.budget.params=0.037",)},
            (
                SELECTED,
                "Groups are whole neurons and whole input pixels; what is counted is the network that is exported.",
            ),
        ),
        Task(
            "lenet5-mnist-weights",
            "LeNet-5-Caffe on MNIST, single weights",
            "lenet5_mnist_weights",
            OURS,
            (
                SELECTED,
                "params_ratio counts the weights that are not zero.",
                "Published: sparse variational dropout 0.75 %, 280x (Molchanov et al. 2017, as listed by its authors).",
            ),
        ),
        Task(
            "auto-lenet5-mnist",
            "strength: auto, LeNet-5-Caffe on MNIST",
            "lenet5_mnist",
            {"sparsebayes (auto)": ("prune.budget=null", "prior.strength=auto")},
            (SELECTED,),
        ),
        Task(
            "auto-lenet300-mnist",
            "strength: auto, LeNet-300-100 on MNIST",
            "lenet300_mnist",
            {"sparsebayes (auto)": ("prune.budget=null", "prior.strength=auto")},
            (SELECTED,),
        ),
        Task(
            "auto-lenet5-fashion",
            "strength: auto, LeNet-5-Caffe on Fashion-MNIST",
            "lenet5_fashion",
            {"sparsebayes (auto)": ("prune.budget=null", "prior.strength=auto")},
            (UNTOUCHED,),
        ),
        Task(
            "vgg16-cifar10",
            "VGG-16 on CIFAR-10, whole filters",
            "vgg_cifar_filter",
            OURS,
            (UNTOUCHED, "Needs a CUDA GPU for its time; vgg16-half-cifar10 is the form for CPU cores."),
        ),
        Task(
            "vgg16-half-cifar10",
            "Half-width VGG-16 on CIFAR-10, whole filters, on CPU cores",
            "vgg_cifar_filter",
            OURS,
            (
                UNTOUCHED,
                "The dense network has half the width of VGG-16, a quarter of its parameters and MACs.",
            ),
            preset="cpu",
        ),
        Task(
            "resnet56-cifar10", "ResNet-56 on CIFAR-10, channels", "resnet56_cifar_units", OURS, (UNTOUCHED,)
        ),
        Task(
            "resnet20-cifar10",
            "ResNet-20 on CIFAR-10, channels, on CPU cores",
            "resnet56_cifar_units",
            OURS,
            (
                UNTOUCHED,
                "Trained for as long as two hours on one core allow: 10 epochs before the removals, 12 after them. "
                "Neither error is that of a converged network, and the dense one had fewer epochs.",
            ),
            preset="cpu",
        ),
        Task(
            "resnet18-cifar10",
            "ResNet-18 on CIFAR-10, branches and channels",
            "resnet18_cifar_blocks",
            {"branches and units": (), "units": ("groups=units",), "branches": ("groups=branches",)},
            (UNTOUCHED,),
        ),
        Task(
            "equal-size-cifar",
            "Which groups go: four scores at equal size, eighth-width VGG-16 on the embedded CIFAR-10 sample",
            "vgg_cifar_filter",
            {
                "switch evidence": (),
                "magnitude": ("prune.score=magnitude",),
                "Taylor": ("prune.score=taylor",),
                "random": ("prune.score=random",),
            },
            (
                EQUAL,
                "The budget is a tenth of the parameters. Only 1,800 training images: the errors compare scores, they "
                "are no result for CIFAR-10.",
                UNTOUCHED,
            ),
        ),
        Task(
            "vgg16-sample",
            "VGG-16 at the size of its recipe: latency, trained on the embedded CIFAR-10 sample",
            "vgg_cifar_filter",
            OURS,
            (SAMPLE, UNTOUCHED),
        ),
        Task(
            "resnet56-sample",
            "ResNet-56 at the size of its recipe: latency, trained on the embedded CIFAR-10 sample",
            "resnet56_cifar_units",
            OURS,
            (SAMPLE, UNTOUCHED),
        ),
        Task(
            "equal-size-1-percent",
            "Which groups go: five scores at one percent of LeNet-5-Caffe, on the embedded MNIST sample",
            "quickstart",
            SCORES,
            (EQUAL, "Groups are whole units.", SELECTED),
        ),
        Task(
            "equal-size",
            "Which groups go: five scores at three percent of LeNet-5-Caffe, on the embedded MNIST sample",
            "quickstart",
            SCORES,
            (EQUAL, "Groups are whole units.", SELECTED),
        ),
    )
}
SAMPLE_DATA = (
    "data={name: embedded_cifar10, holdout: 500, batch_size: 64}",
    "curvature.num_images=1800",
    "train.distill_on=images",
)
SHARED = {
    "vgg16-sample": (
        *SAMPLE_DATA,
        "train={lr: 0.05, pretrain: {epochs: 6}, finetune: {epochs: 8}}",
        "train.cycles={count: 8, epochs: 1, max_epochs: 1, shrink: 0.5}",
    ),
    "resnet56-sample": (
        *SAMPLE_DATA,
        "train={lr: 0.05, pretrain: {epochs: 6}, finetune: {epochs: 6}}",
        "train.cycles={count: 5, epochs: 1, max_epochs: 1, shrink: 0.25}",
    ),
    "equal-size": ("prune.budget.params=0.03", "export.onnx=false"),
    "equal-size-1-percent": ("prune.budget.params=0.01", "export.onnx=false"),
    "equal-size-cifar": (
        "data={name: embedded_cifar10, holdout: 500, batch_size: 64}",
        "model.options={width: 0.125}",
        "train={lr: 0.05, pretrain: {epochs: 20}, finetune: {epochs: 15}}",
        "train.cycles={count: 12, epochs: 1, max_epochs: 2}",
        "curvature.num_images=1800",
        "prune.budget={params: 0.1, macs: null}",
        "export.onnx=false",
    ),
}


def metrics(
    report: dict[str, Any], seconds: float, removal_share: float | None
) -> Iterator[tuple[str, float]]:
    """The figures of one run, in the units of the tables."""
    dense, compact = report["dense"], report["compact"]
    yield "test_error_percent", 100 * compact["test_error"]
    yield "dense_test_error_percent", 100 * dense["test_error"]
    yield "params", compact["params"]
    yield "params_ratio", dense["params"] / compact["params"]
    yield "macs_ratio", dense["macs"] / compact["macs"]
    for batch in (1, 64):
        key = f"latency_ms_batch{batch}"
        if dense.get(key) is not None:
            yield f"latency_ratio_batch{batch}", dense[key] / compact[key]
    yield "wall_seconds", seconds
    if removal_share is not None:
        yield "removal share (%)", 100 * removal_share


PROGRAM = "tools/bench_compression.py"


def command_line(program: str, task: Task, seeds: list[int], overrides: list[str], threads: int) -> list[str]:
    """The command that makes the same rows, without where this machine keeps things."""
    options = ["--seeds", str(len(seeds)), "--threads", str(threads)]
    return [program, task.name, *options, *overrides]


def run(
    task: Task,
    seeds: list[int],
    overrides: list[str],
    threads: int,
    out: Path,
    keep: Path | None,
    program: str = PROGRAM,
) -> None:
    """Run all methods of a task, and write what is known after every run."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for seed in seeds:
        for method, own in task.methods.items():
            changes = [*SHARED.get(task.name, ()), *own, f"seed={seed}", f"threads={threads}", *overrides]
            recipe = load_recipe(task.recipe, preset=task.preset, overrides=changes)
            with tempfile.TemporaryDirectory() as scratch:
                folder = (
                    (keep / f"{task.name}-{method.replace(' ', '-')}-{seed}")
                    if keep
                    else Path(scratch) / "run"
                )
                start = time.perf_counter()
                run_recipe(recipe, out=folder, quiet=True, overwrite=True)
                seconds = time.perf_counter() - start
                report = json.loads((folder / "report.json").read_text())
                share = read_report(folder).removal_share
            for metric, value in metrics(report, seconds, share):
                values.setdefault((method, metric), {})[seed] = value
            print(
                f"{task.name} {method} seed {seed}: {100 * report['compact']['test_error']:.2f} % "
                f"(dense {100 * report['dense']['test_error']:.2f} %), {report['compact']['params']} parameters, "
                f"{report['widths']}, {seconds:.0f} s",
                flush=True,
            )
            rows = [
                Row(task.name, name, metric, tuple(by_seed.values()), tuple(by_seed))
                for (name, metric), by_seed in values.items()
            ]
            write(
                out,
                task.name,
                title=task.title,
                notes=list(task.notes),
                rows=rows,
                command=command_line(program, task, seeds, overrides, threads),
                threads=threads,
            )


def main() -> None:
    """Parse the command line and run one task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    add_out(parser)
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")
    arguments = parser.parse_intermixed_args()
    run(
        TASKS[arguments.task],
        list(range(arguments.seeds)),
        arguments.overrides,
        arguments.threads,
        arguments.out,
        arguments.keep,
    )


if __name__ == "__main__":
    main()
