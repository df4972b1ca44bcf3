"""Two workers with half of the images each get the curvature of all."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from sparsebayes.curvature import entry_curvature, gate_curvature, switch_curvature
from sparsebayes.curvature.workers import number_of_workers, worker_seed
from sparsebayes.groups.rules import make_grouping


class Net(nn.Module):
    """A linear layer and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.z = nn.Parameter(torch.tensor([1.0, 0.5, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) * self.z).tanh()


def _data() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net().double(), torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 3


def _compute(model: Net, x: Tensor, y: Tensor, estimator: str) -> list[Tensor]:
    batches = [(x, y)]
    gates = gate_curvature(model, make_grouping(model, "rows"), batches, num_data=70, estimator=estimator)
    entries = entry_curvature(model, ["fc.weight", "z"], batches, num_data=70, estimator=estimator)
    switches = switch_curvature(model, ["z"], batches, num_data=70, estimator=estimator)
    assert switches.matrix is not None
    assert gates.num_images == entries.num_images == switches.num_images
    numbers = torch.tensor([gates.num_images, entries.relative_error], dtype=torch.float64)
    return [
        gates.diagonal,
        gates.standard_error,
        entries["fc.weight"],
        entries["z"],
        switches.matrix,
        numbers,
    ]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        model, x, y = _data()
        share = slice(0, 4) if rank == 0 else slice(4, 7)
        found = _compute(model, x[share], y[share], "exact")
        drawn = _compute(model, x[:4], y[:4], "monte_carlo")  # the same images, other numbers
        torch.save([found, drawn, [worker_seed(5)]], f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_workers_add_up(tmp_path: Path) -> None:
    # One of the two is this process: starting another takes most of the time.
    other = multiprocessing.get_context("spawn").Process(target=_work, args=(1, str(tmp_path)))
    other.start()
    threads = torch.get_num_threads()
    try:
        _work(0, str(tmp_path))
    finally:
        torch.set_num_threads(threads)
    other.join(120)
    assert other.exitcode == 0
    (first, drawn, seed), (second, again, other_seed) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert seed == [5] and other_seed != seed
    expected = _compute(*_data(), "exact")
    for one, two, alone in zip(first[:-1], second[:-1], expected[:-1], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, alone, rtol=1e-10, atol=1e-12)
    assert torch.equal(first[-1], second[-1]) and int(first[-1][0]) == 7
    assert all(torch.equal(one, two) for one, two in zip(drawn, again, strict=True))
    model, x, y = _data()
    half = _compute(model, x[:4], y[:4], "monte_carlo")
    assert not torch.allclose(drawn[2], half[2])  # the second worker drew its own signs


def test_without_workers_nothing_changes() -> None:
    assert number_of_workers() == 1
    assert worker_seed(7) == 7
