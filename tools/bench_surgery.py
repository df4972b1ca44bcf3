"""Surgery on the networks of torchvision: what is removed must change nothing.

    python tools/bench_surgery.py                     # all networks: benchmark torchvision-surgery
    python tools/bench_surgery.py resnet18 vit_b_16   # some of them, whose rows are replaced
    python tools/bench_surgery.py --timing            # processor seconds alone, the same way

From each network about 40 % of all units are removed at once: channels, hidden features, attention heads, the width
of residual streams. Weights are random, statistics and scales of norms too, so that nothing is exact by chance. The
compacted network is compared with the masked one in float32, forward, backward and as an ONNX file; and in float64 in
training mode, which runs auxiliary heads. Where Torch-Pruning is installed, it prunes 40 % of the channels of the same
networks by random importance, and the bench notes whether the result still runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_files import add_out, file_of, write
from torch import Tensor, nn

from sparsebayes.errors import SparseBayesError
from sparsebayes.export.onnx import check_onnx, export_onnx
from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.models import build
from sparsebayes.prune.compaction import Compaction, compact, cut
from sparsebayes.prune.masking import apply_masks_
from sparsebayes.report.benchmarks import Row, read_benchmark
from sparsebayes.torchvision_compat import import_torchvision

NAME = "torchvision-surgery"
SEED = 0
SHARE = 0.4
TASK = "40 % of all units removed at once"

# Name to side of the image; the exporter of VGG and the auxiliary head of Inception need their full size.
NETWORKS = {
    "lenet5_caffe": 28, "vgg16_bn": 224, "resnet18": 64, "resnet50": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "mnasnet1_0": 64, "densenet121": 64, "googlenet": 64, "inception_v3": 299,
    "efficientnet_b0": 64, "squeezenet1_1": 64, "shufflenet_v2_x1_0": 64, "regnet_x_400mf": 64,
    "resnext50_32x4d": 64, "convnext_tiny": 64, "vit_b_16": 64, "swin_t": 64,
}  # fmt: skip
TIMED = {"resnet18": 64, "resnet50": 64, "resnet152": 64, "vit_b_16": 64}
PEER_SKIPS = {"swin_t"}  # Torch-Pruning 1.6.1 had not finished after minutes
# They need the size of the image, or another way of starting.
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_b_16": {"image_size": 64},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    add_out(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = {name: NETWORKS[name] for name in arguments.networks} or NETWORKS
    makers = [] if arguments.timing else [partial(_surgery_rows, name, side) for name, side in chosen.items()]
    if arguments.timing or chosen is NETWORKS:
        makers += [partial(_timing_rows, name, side) for name, side in TIMED.items()]
    for make in makers:
        _write(make(), arguments.out)
    return 0


def _surgery_rows(name: str, side: int) -> list[Row]:
    try:
        figures = surgery(name, side)
    except SparseBayesError as refusal:
        figures = {"refused (1 = by name)": 1.0}
        print(f"{name}: refused: {refusal}", flush=True)
    if importlib.util.find_spec("torch_pruning") and name not in PEER_SKIPS:
        figures["Torch-Pruning: runs forward and backward (1 = yes)"] = float(peer_runs(name, side))
    print(name, ", ".join(f"{metric} {value:.3g}" for metric, value in figures.items()), flush=True)
    return [Row(TASK, name, metric, values=(value,), seeds=(SEED,)) for metric, value in figures.items()]


def surgery(name: str, side: int) -> dict[str, float]:
    """Remove units from one network and compare in four ways."""
    model, example = network(name), images(name, side)
    graph = trace_units(model, example)
    grouping = unit_grouping(model, graph)
    masks = grouping.masks(random_units(graph))
    done = compact(model, masks, example, units=graph)
    masked = copy.deepcopy(model)
    apply_masks_(masked, masks)
    forward, backward = errors(masked, done, example)
    doubled = replace(done, model=copy.deepcopy(done.model).double())
    _, exact_backward = errors(copy.deepcopy(masked).double(), doubled, example.double())
    figures = {
        "units": float(graph.num_units),
        "parameters kept (%)": 100 * done.summary.params_after / done.summary.params_before,
        "forward error": forward,
        "gradient error": backward,
        "gradient error, float64": exact_backward,
        "error in training mode, float64": training_error(masked, done, example),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(done.model, example, path, legacy=True)
        figures["ONNX error"] = check_onnx(path, masked, example)
    return figures


def network(name: str) -> nn.Module:
    """A network of this name with random weights, statistics and scales, in evaluation mode."""
    torch.manual_seed(SEED)
    if name == "lenet5_caffe":
        model = build(name, {})
    else:
        models: Any = import_torchvision().models
        model = getattr(models, name)(weights=None, **OPTIONS.get(name, {}))
    assert isinstance(model, nn.Module)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)  # torchvision starts some heads at zero
        elif isinstance(module, nn.Dropout) or hasattr(module, "p"):
            setattr(module, "p", 0.0)  # noqa: B010 - draws differ for other widths
    return model.eval()


def images(name: str, side: int) -> Tensor:
    """Two random images."""
    channels = 1 if name == "lenet5_caffe" else 3
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(SEED))


def random_units(graph: UnitGraph) -> Tensor:
    """Which units stay: each with probability 0.6, and at least one of each layer."""
    generator = torch.Generator().manual_seed(SEED)
    on = torch.rand(graph.num_units, generator=generator) >= SHARE
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        if not bool(on[members].any()):
            on[members[0]] = True
    return on


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _first(output: Any) -> Tensor:
    result = output if isinstance(output, Tensor) else output[0]
    assert isinstance(result, Tensor)
    return result


def errors(masked: nn.Module, done: Compaction, example: Tensor) -> tuple[float, float]:
    """Forward error, and the largest error of a gradient of a parameter that stays."""
    slopes = []
    results = []
    for model in (masked, done.model):
        model.zero_grad()
        result = _first(model(example))
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(result)
        torch.autograd.backward((result * weights).sum())
        results.append(result.detach())
        slopes.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert slopes[0].keys() == slopes[1].keys()
    backward = max(relative(slopes[1][n], cut(slope, done.kept.get(n, {}))) for n, slope in slopes[0].items())
    return relative(results[1], results[0]), backward


def training_error(masked: nn.Module, done: Compaction, example: Tensor) -> float:
    """Largest error of an output in training mode, auxiliary heads included."""
    outputs = []
    for model in (masked, done.model):
        with torch.no_grad():
            result = copy.deepcopy(model).double().train()(example.double())
        outputs.append([result] if isinstance(result, Tensor) else [t for t in result if t is not None])
    return max(relative(z, y) for y, z in zip(*outputs, strict=True))


def peer_runs(name: str, side: int) -> bool:
    """Whether Torch-Pruning's result of the same share still runs forward, in both modes, and backward."""
    peer: Any = importlib.import_module("torch_pruning")
    model, example = network(name), images(name, side)
    try:
        last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        pruner = peer.pruner.BasePruner(
            model,
            example,
            importance=peer.importance.RandomImportance(),
            pruning_ratio=SHARE,
            ignored_layers=[last],
        )
        pruner.step()
        for mode in (False, True):
            torch.autograd.backward(_first(model.train(mode)(example)).sum())
    except Exception as error:  # whatever it raises, it is a failure of the pruned network
        print(f"{name}: Torch-Pruning: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        return False
    return True


def _timing_rows(name: str, side: int) -> list[Row]:
    """Processor seconds of tracing, grouping and compaction; the check of the result counts as compaction."""
    model, example = network(name), images(name, side)
    graph, tracing = _timed(lambda: trace_units(model, example))
    grouping, grouped = _timed(lambda: unit_grouping(model, graph))
    masks = grouping.masks(random_units(graph))
    _, compaction = _timed(lambda: compact(model, masks, example, units=graph))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    figures = {
        "parameters (millions)": parameters,
        "tracing (s)": tracing,
        "grouping (s)": grouped,
        "compaction with its check (s)": compaction,
        "all (s)": tracing + grouped + compaction,
    }
    print(name, ", ".join(f"{metric} {value:.3g}" for metric, value in figures.items()), flush=True)
    return [Row("processor seconds", name, metric, (value,), (SEED,)) for metric, value in figures.items()]


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()  # other work on the machine does not count
    result = function()
    return result, time.process_time() - started


def _write(rows: list[Row], out: Path) -> None:
    """Replace these rows in the file, and leave the others."""
    places = {(row.task, row.method) for row in rows}
    target = file_of(out, NAME)
    known = read_benchmark(target).rows if target.exists() else ()
    left = [row for row in known if (row.task, row.method) not in places]
    order = [*NETWORKS, *TIMED]
    rows = sorted([*left, *rows], key=lambda row: (row.task != TASK, order.index(row.method)))
    write(
        out,
        NAME,
        title="Surgery on torchvision's networks",
        rows=rows,
        notes=[
            "Errors are largest differences between compacted and masked network, relative to the largest value; at "
            "most 1e-4 in float32 counts as exact.",
            "In float32 a rounding at the kink of a rectifier or between two maxima of a pool can switch a path of the "
            "gradient; in float64 it does not, hence both.",
            "Weights, statistics and scales are random, dropout is off, images have 64 pixels a side (LeNet 28, VGG "
            "224, Inception 299). Removed are channels, features, attention heads and widths of residual streams.",
            "Where Torch-Pruning is installed, it prunes 40 % of the channels by random importance; noted is whether "
            "the result still runs in both modes, not whether it is right.",
            "swin_t works sizes out of its width in its code: its residual width and heads stay, by name.",
        ],
        command=["tools/bench_surgery.py"],
    )


if __name__ == "__main__":
    raise SystemExit(main())
