"""What curvature costs and how far off it is: all methods interleaved in one process, as ratios to a training pass.

    python tools/bench_curvature.py all --threads 1
    python tools/bench_curvature.py vgg --device cuda --batch 256
    python tools/bench_curvature.py error --data cifar10 --networks resnet --width 64 --epochs 20

Tasks: `vgg` (every weight, and every filter's gate, of VGG-16-BN), `cell` (98 switches of a DARTS-like cell), `classes`
(the same with 100 classes), `error` (relative error of the full diagonal against its cost, on trained networks). One
unit is the time of forward + backward over the same images in the same round; in a round the methods take turns, so
that other load on the machine falls on all of them. Memory is the peak of a process of its own, above
what the network and the images take. BackPACK and ASDL are measured if they can be imported. The
benchmarks are called curvature-TASK.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_files import add_out, typed, write
from bench_memory import peak_megabytes
from bench_networks import Cell, resnet18, vgg16
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.curvature import (
    entry_curvature,
    gate_curvature,
    probe_curvature,
    recursion_curvature,
    sum_curvature,
    switch_curvature,
)
from sparsebayes.data import Loader, load
from sparsebayes.groups.rules import make_grouping
from sparsebayes.models.lenet import LeNet5Caffe
from sparsebayes.report.benchmarks import Row

Batches = list[tuple[Tensor, Tensor]]
Methods = dict[str, Callable[[], object]]
PLAIN = "forward + backward"


def train_pass(model: nn.Module, batches: Batches) -> None:
    """Forward + backward over batches: the unit."""
    for x, y in batches:
        model.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), y))


def synchronise(device: str) -> None:
    """Wait for an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(methods: Methods, device: str, rounds: int) -> dict[str, tuple[float, ...]]:
    """Each method's time in each round, in units of the round's plain pass; every method warms up once."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for number in range(rounds + 1):
        for name, run in methods.items():
            synchronise(device)
            start = clock()
            run()
            synchronise(device)
            if number:
                seconds[name].append(clock() - start)
    return {
        name: tuple(own / plain for own, plain in zip(values, seconds[PLAIN], strict=True))
        for name, values in seconds.items()
    }


def noise_batches(device: str, batch: int, count: int, num_classes: int = 10) -> Batches:
    """Random 32 x 32 images."""
    torch.manual_seed(1)
    pairs = [(torch.randn(batch, 3, 32, 32), torch.randint(0, num_classes, (batch,))) for _ in range(count)]
    return [(x.to(device), y.to(device)) for x, y in pairs]


def backpack(model: nn.Module, batches: Batches) -> Callable[[], object]:
    """BackPACK's DiagGGNMC with one draw."""
    from backpack import backpack as context  # type: ignore[import-untyped]
    from backpack import extend
    from backpack.extensions import DiagGGNMC  # type: ignore[import-untyped]

    extended, loss = extend(model), extend(nn.CrossEntropyLoss())

    def run() -> None:
        for x, y in batches:
            extended.zero_grad()
            with context(DiagGGNMC(mc_samples=1)):
                loss(extended(x), y).backward()

    return run


def asdl(model: nn.Module, batches: Batches) -> Callable[[], object]:
    """ASDL's Monte Carlo Fisher diagonal."""
    import asdl as library  # type: ignore[import-not-found]

    config = library.FisherConfig(
        loss_type=library.LOSS_CROSS_ENTROPY,
        fisher_type=library.FISHER_MC,
        fisher_shapes=[library.SHAPE_DIAG],
        data_size=1,
    )
    maker = library.get_fisher_maker(model, config)

    def run() -> None:
        for x, y in batches:
            model.zero_grad()
            maker.setup_loss_call(functional.cross_entropy, maker.setup_model_call(model, x), y)
            maker.forward_and_backward()

    return run


def vgg_methods(device: str, batch: int, count: int, only: str | None = None) -> Methods:
    """What is compared on VGG-16-BN."""
    torch.manual_seed(0)
    model = vgg16().to(device)
    batches = noise_batches(device, batch, count)
    names = [name for name, _ in model.named_parameters()]
    size = batch * len(batches)
    filters = make_grouping(model, "filters")
    builders: dict[str, Callable[[], Callable[[], object]]] = {
        PLAIN: lambda: lambda: train_pass(model, batches),
        "every weight": lambda: lambda: entry_curvature(model, names, batches, num_data=size),
        "every weight, tuned": lambda: (
            lambda: entry_curvature(model, names, batches, num_data=size, tune=True)
        ),
        "every weight, probe of 8 groups": lambda: (
            lambda: probe_curvature(model, names, batches, num_data=size)
        ),
        "every weight, recursion (biased)": lambda: (
            lambda: recursion_curvature(model, names, batches, num_data=size)
        ),
        "every filter's gate": lambda: lambda: gate_curvature(model, filters, batches, num_data=size),
        "every filter's sum": lambda: lambda: sum_curvature(model, filters, batches, num_data=size),
    }
    if importlib.util.find_spec("backpack"):
        builders["BackPACK DiagGGNMC"] = lambda: backpack(vgg16().to(device), batches)
    if importlib.util.find_spec("asdl"):
        builders["ASDL Fisher MC diagonal"] = lambda: asdl(vgg16().to(device), batches)
    return {name: build() for name, build in builders.items() if only in (None, name)}


def peak(method: str, device: str, batch: int) -> float:
    """MB above the start that a method takes; run in a process of its own."""
    run = vgg_methods(device, batch, 1, method)[method]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return peak_megabytes(run)


def vgg_rows(options: argparse.Namespace) -> list[Row]:
    """Cost and memory on VGG-16-BN."""
    methods = vgg_methods(options.device, options.batch, options.batches)
    task = f"VGG-16-BN, batch {options.batch}, {options.device}"
    rows = [
        _row(task, name, "time / training pass", *values)
        for name, values in ratios(methods, options.device, options.rounds).items()
    ]
    for name in methods if options.memory else ():
        command = [sys.executable, __file__, "vgg", "--peak", name, "--device", options.device]
        command += ["--batch", str(options.batch), "--threads", str(options.threads)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(_row(task, name, "peak memory (MB)", float(found.stdout.split()[-1])))
    return rows


def cell_rows(options: argparse.Namespace, num_classes: int = 10) -> list[Row]:
    """Cost of the switches of a cell."""
    torch.manual_seed(0)
    model = Cell(num_classes).to(options.device).eval()
    # Several batches: the look at the network that comes before the first falls on all of them.
    batches = noise_batches(
        options.device, 8 if options.device == "cpu" else options.batch, options.batches, num_classes
    )
    size = sum(len(y) for _, y in batches)
    with torch.no_grad():  # running statistics of the data: without them the outputs of so deep a sum explode
        model.train()
        for _ in range(20):
            model(batches[0][0])
        model.eval()

    def switches(**settings: Any) -> Callable[[], object]:
        return lambda: switch_curvature(model, ["switches"], batches, num_data=size, **settings)

    methods: Methods = {
        PLAIN: lambda: train_pass(model, batches),
        "98 x 98 matrix, 1 draw": switches(),
        "98 x 98 matrix, 2 draws": switches(draws=2),
    }
    if num_classes <= 10:
        methods[f"98 x 98 matrix, exact for {num_classes} classes"] = switches(estimator="exact")
        methods["diagonal, recursion (biased)"] = lambda: recursion_curvature(
            model, ["switches"], batches, num_data=size
        )
    task = f"DARTS-like cell, {num_classes} classes, batch {len(batches[0][1])}, {options.device}"
    found = ratios(methods, options.device, options.rounds)
    return [_row(task, name, "time / training pass", *values) for name, values in found.items()]


def trained(name: str, options: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """A network trained on some data, and the images of a curvature in batches of 128."""
    data = load(options.data)
    channels, size = data.train.images.shape[1], data.train.images.shape[-1]
    torch.manual_seed(0)
    lenet = name == "LeNet-5"
    model = LeNet5Caffe(in_channels=channels, input_size=size) if lenet else resnet18(options.width, channels)
    model = model.to(options.device).train()
    loader = Loader(data.train, batch_size=100, mean=data.mean, std=data.std, shuffle=True)
    epochs = options.epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.autograd.backward(
                functional.cross_entropy(model(x.to(options.device)), y.to(options.device))
            )
            optimizer.step()
            schedule.step()
    plain = Loader(data.train, batch_size=128, mean=data.mean, std=data.std, shuffle=False)
    batches: Batches = []
    for x, y in plain:
        batches.append((x.to(options.device), y.to(options.device)))
        if len(batches) == options.images // 128:
            break
    return model.eval(), batches


def error_rows(options: argparse.Namespace) -> list[Row]:
    """Relative error of the full diagonal on the same images, against its cost."""
    rows = []
    names_of = {"lenet": "LeNet-5", "resnet": f"ResNet-18, width {options.width}"}
    for name in (names_of[network] for network in options.networks):
        model, batches = trained(name, options)
        names = [parameter for parameter, _ in model.named_parameters()]
        size = sum(len(y) for _, y in batches)
        exact = entry_curvature(model, names, batches, num_data=size, estimator="exact")
        norm = sum(float(values.double().square().sum()) for values in exact.values()) ** 0.5

        def estimate(seed: int = 0, **settings: Any) -> dict[str, Tensor]:
            found = entry_curvature(model, names, batches, num_data=size, seed=seed, **settings)  # noqa: B023
            return dict(found)

        def recursion(seed: int = 0) -> dict[str, Tensor]:
            return recursion_curvature(model, names, batches, num_data=size)  # noqa: B023

        estimates: dict[str, Callable[..., dict[str, Tensor]]] = {
            "stick": estimate,
            "stick, importance 0.2": lambda seed=0: estimate(seed, importance=0.2),
            "stick, importance 0.1": lambda seed=0: estimate(seed, importance=0.1),
            "stick, importance 0.05": lambda seed=0: estimate(seed, importance=0.05),
            "stick, importance 0.1, 3 draws": lambda seed=0: estimate(seed, importance=0.1, draws=3),
            "stick, importance 0.05, 3 draws": lambda seed=0: estimate(seed, importance=0.05, draws=3),
            "sampled label": lambda seed=0: estimate(seed, factor="sampled_label"),
            "recursion (biased)": recursion,
        }
        task = f"{name} on {options.data}, {size} images, {options.device}"
        for method, run in estimates.items():
            errors = []
            for seed in range(3):
                found = run(seed=seed)
                off = sum(float((found[n].double() - exact[n].double()).square().sum()) for n in names)
                errors.append(off**0.5 / norm)
            rows.append(Row(task, method, "relative error", tuple(errors), tuple(range(3))))
        methods: Methods = {PLAIN: lambda: train_pass(model, batches), **estimates}  # noqa: B023
        for method, values in ratios(methods, options.device, options.rounds).items():
            rows.append(_row(task, method, "time / training pass", *values))
    return rows


def _row(task: str, method: str, metric: str, *values: float) -> Row:
    print(f"{task}: {method}: {metric} {statistics.fmean(values):.3g}", flush=True)
    return Row(task, method, metric, values, tuple(range(len(values))))


TASKS: dict[str, tuple[str, Callable[[argparse.Namespace], list[Row]]]] = {
    "vgg": ("Curvature of VGG-16-BN: cost", vgg_rows),
    "cell": ("Curvature of a supernet cell's switches: cost", cell_rows),
    "classes": ("The same with 100 classes", lambda options: cell_rows(options, 100)),
    "error": ("Curvature of trained networks: error against cost", error_rows),
}


def main() -> None:
    """Parse the command line, run tasks, write their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["all", *TASKS])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--data", default="embedded_mnist")
    parser.add_argument("--networks", nargs="+", choices=["lenet", "resnet"], default=["lenet", "resnet"])
    parser.add_argument("--width", type=int, default=8, help="of the ResNet-18")
    parser.add_argument("--epochs", type=int, default=6, help="of training before `error`")
    parser.add_argument("--images", type=int, default=2048, help="of the curvature in `error`")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in `vgg`")
    parser.add_argument(
        "--batches", type=int, default=4, help="of images in one timed call of `vgg` and `cell`"
    )
    parser.add_argument(
        "--note", action="append", default=[], help="a sentence on how it was measured; repeatable"
    )
    add_out(parser)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "all" and options.out.suffix == ".json":
        parser.error("all tasks do not fit into one file; give --out a folder")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak(options.peak, options.device, options.batch))
        return
    for name in TASKS if options.task == "all" else [options.task]:
        title, run = TASKS[name]
        threads = "" if options.threads == 1 else f"-{options.threads}-threads"
        write(
            options.out,
            f"curvature-{name}{threads}",
            title=title,
            notes=[
                f"{'Processor time' if options.device == 'cpu' else 'Time'} as a ratio to forward + backward over the "
                f"same images in the same round: mean and deviation over {options.rounds} rounds, in which the methods "
                "take turns in one process.",
                "Relative errors: of the whole diagonal against the exact one on the same images, 3 seeds.",
                *options.note,
            ],
            rows=run(options),
            command=typed(options.out),
            threads=options.threads,
        )


if __name__ == "__main__":
    main()
