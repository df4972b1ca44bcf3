"""The Hessian pass of the BayesNAS authors' own code against ours, on a cell of the same shape.

    python tools/bench_official.py CHECKOUT
    python tools/bench_official.py CHECKOUT --width 16 --batch 8 --rounds 2

CHECKOUT is the folder of a git checkout of github.com/BayesNAS/BayesNAS; its search code is imported from there.
Theirs: the diagonal of the 64 switches of a normal cell (8 edges of 7 operations and a gate), layer by layer from
behind, after a forward and a backward pass that are not counted. Ours: the whole matrix of the 64 switches of a cell of
the same edges and width with stem, projections and classifier, forward and backward passes counted. Both take turns in
one process. Their time grows with images times pixels times channels, in Python. Writes
docs/benchmarks/nas-official.json after every round.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from bench_files import add_out, typed, write
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.nas import SPACES, Shape, Supernet
from sparsebayes.nas.rows import relative_rows, switch_matrix
from sparsebayes.nas.spaces import CellSpec, Edge, Space
from sparsebayes.report.benchmarks import Row
from sparsebayes.report.provenance import git_commit

EDGES = ((0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (1, 4), (0, 5), (2, 5))
"""Of the authors' normal cell: two inputs, four nodes; the last one reads the first input and the first node."""
THEIRS, OURS = "official Hessian pass (diagonal)", "matrix of the switches, one draw"
NOTES = (
    "Processor time. The official pass needs the activations and gradients of a training step, which are not counted "
    "for it; ours has its own forward and backward passes, which are.",
    "To run with a present PyTorch on a CPU, two things are changed at run time: the device, and the unpooling of the "
    "max pool, whose indices speak of the padded image while the code unpools into the one without padding, which "
    "PyTorch refuses. The curvature that enters the cell from behind is given, as one cell alone has no classifier.",
    "The official pass averages over images and positions before it squares, so its figures are others than those of "
    "the exact diagonal; this compares the time alone.",
)


def load_official(checkout: Path, name: str) -> ModuleType:
    """Import one of the authors' files from a checkout."""
    path = checkout / "search" / f"{name}.py"
    if not path.is_file():
        raise SystemExit(
            f"expected the authors' code at {path}; give the folder of a checkout of BayesNAS, and if it lacks files, "
            f"run: git -C {checkout} restore --source=HEAD search"
        )
    spec = importlib.util.spec_from_file_location(f"official_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpool(
    curvature: Tensor, indices: Tensor, kernel: int, stride: int, output_size: object = None
) -> Tensor:
    """Unpool into the padded image that the indices speak of, then cut the padding off."""
    padded = functional.max_unpool2d(curvature, indices, (kernel, kernel), (stride, stride))
    return padded[..., 1:-1, 1:-1]


class Official(nn.Module):
    """One normal cell of the authors' between a stem and a classifier of ours, and their pass over it.

    Args:
        checkout: folder of their repository.
        images: of shape `[B, 3, H, W]`.
        labels: of shape `[B]`.
        width: channels of a node.
    """

    def __init__(self, checkout: Path, images: Tensor, labels: Tensor, width: int) -> None:
        super().__init__()
        self.images, self.labels = images, labels
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.cell = load_official(checkout, "OneShot").NormalCell(width)
        self.head = nn.Linear(4 * width, 10)
        algorithm = load_official(checkout, "Algorithm")
        self.algorithm = algorithm.Algorithm(
            self.cell, torch.device("cpu"), lambda_child=1.0, lambda_origin=1.0
        )
        self.algorithm.hessian_max_upsample = unpool
        self.behind = torch.rand(len(images), 4 * width, *images.shape[2:])

    def step(self) -> None:
        """Forward and backward: the cell keeps what their pass reads."""
        self.zero_grad()
        x = self.stem(self.images)
        logits = self.head(self.cell(x, x).mean((2, 3)))
        torch.autograd.backward(functional.cross_entropy(logits, self.labels))

    @torch.no_grad()
    def hessian(self) -> None:
        """Their pass; it deletes what it has read, so that a step must come before."""
        found = self.algorithm.norm_pass(self.behind.clone(), self.cell)[2]
        values = [value for switches in found.values() for value in switches.values()]
        assert len(values) == 64
        assert all(bool(torch.isfinite(value)) for value in values)


def supernet_of(width: int, images: Tensor) -> Supernet:
    """Ours: a supernet of one cell with the same edges, whose norms have seen images."""
    ops = SPACES["darts"].cells[0].edges[0].ops
    cell = CellSpec("normal", 2, 6, tuple(Edge(*edge, ops) for edge in EDGES), output="concat")
    space = Space("official_cell", (cell,), num_stages=1, reduction="max_pool", project=True)
    supernet = Supernet(space, Shape(width, depth=1))
    assert supernet.table.num_switches == 64
    with torch.no_grad():
        for _ in range(3):
            supernet.train()(images)
    return supernet


def seconds_of(run: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Parse the command line, let the passes take turns, write what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of a checkout of the BayesNAS repository")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(10, (options.batch,))
    official = Official(options.checkout, images, labels, options.width).train()
    supernet = supernet_of(options.width, images)

    def matrix(estimator: str) -> Tensor:
        rows = relative_rows(supernet, [(images, labels)], num_images=len(images), estimator=estimator)
        return switch_matrix(rows, 50_000)

    work: dict[str, Callable[[], object]] = {
        THEIRS: official.hessian,
        OURS: lambda: matrix("monte_carlo"),
        "matrix of the switches, exact": lambda: matrix("exact"),
    }
    matrix("exact")  # what is only slow the first time
    seconds: dict[str, list[float]] = {name: [] for name in work}
    shape = f"{options.width} channels, {options.size}x{options.size}, batch {options.batch}"
    for number in range(options.rounds):
        official.step()
        for name, run in work.items():
            seconds[name].append(seconds_of(run))
        rounds = tuple(range(number + 1))
        rows = []
        for name, values in seconds.items():
            ratios = tuple(theirs / own for theirs, own in zip(seconds[THEIRS], values, strict=True))
            task = f"One cell, 64 switches, {shape}"
            rows.append(Row(task, name, "processor seconds", tuple(values), rounds))
            if name != THEIRS:
                rows.append(Row(task, name, "official pass / this", ratios, rounds))
            print(
                f"round {number}: {name}: {values[-1]:.3f} s, median ratio {statistics.median(ratios):.1f}",
                flush=True,
            )
        write(
            options.out,
            "nas-official",
            title="The official Hessian pass against the matrix of the switches",
            rows=rows,
            notes=[
                *NOTES,
                f"Official code at commit {git_commit(options.checkout / 'search')}; one value per round.",
            ],
            command=["tools/bench_official.py", "CHECKOUT", *typed(options.out)[2:]],
            threads=options.threads,
        )


if __name__ == "__main__":
    main()
