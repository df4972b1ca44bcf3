"""Rows of derivatives: against the Jacobian written out, and against the general estimator of the package."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sparsebayes.curvature import switches as general
from sparsebayes.errors import DataError
from sparsebayes.nas import SPACES, Shape, Supernet, read_space
from sparsebayes.nas.rows import relative_rows, switch_matrix


def trained_like(name: str) -> Supernet:
    """A supernet with statistics of some images and switches that differ, gates included."""
    space = read_space({**SPACES[name].to_dict(), "gates": True, "name": "gated"})
    supernet = Supernet(space, Shape(width=3, depth=1), initial=0.5).double()
    with torch.no_grad():
        for _ in range(3):
            supernet(torch.randn(16, 3, 16, 16, dtype=torch.float64))
        supernet.switches.mul_(1 + 0.3 * torch.randn_like(supernet.switches))
    return supernet.eval()


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(sum(sizes), 3, 16, 16, dtype=torch.float64, generator=generator)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in data.split(list(sizes))]


def test_the_exact_matrix_is_the_gauss_newton_matrix_of_relative_changes():
    supernet = trained_like("nas_bench_201")
    (x, _), *_ = data = batches(3)
    z = supernet.switches.detach()
    jacobian = torch.autograd.functional.jacobian(lambda s: supernet(x, s), z) * z  # [B, C, T]
    jacobian = supernet.table.sum_groups(jacobian)
    p = functional.softmax(supernet(x), 1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("bcg,bcd,bdh->gh", jacobian, hessian, jacobian) * (1000 / 3)
    rows = relative_rows(supernet, data, num_images=3, estimator="exact")
    assert torch.allclose(switch_matrix(rows, 1000), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["nas_bench_201", "darts"])
def test_rows_are_those_of_the_general_estimator(name):
    supernet = trained_like(name)
    data = batches(4, 3)
    rows = relative_rows(supernet, data, num_images=7, draws=2, seed=5)  # [N, K, G]
    other = general.switch_rows(supernet, ["switches"], data, draws=2, seed=5)  # [K, N, T]
    other = supernet.table.sum_groups(other * supernet.switches.detach()).transpose(0, 1)
    assert rows.shape == (7, 2, supernet.table.num_groups)
    assert torch.allclose(rows, other, rtol=1e-8, atol=1e-10)


def test_only_so_many_images_are_used_however_they_come():
    supernet = trained_like("nas_bench_201")
    one = relative_rows(supernet, batches(6), num_images=5, seed=1)
    other = relative_rows(supernet, batches(2, 2, 2), num_images=5, seed=1)
    assert torch.allclose(one, other, rtol=1e-10)
    parts = relative_rows(supernet, batches(6), num_images=5, at_once=2, seed=1)
    assert torch.allclose(one, parts, rtol=1e-10)


def test_mode_and_gradients_stay_as_they_are():
    supernet = trained_like("nas_bench_201").train()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    relative_rows(supernet, batches(2), num_images=2)
    assert supernet.training
    assert all(p.grad is None and p.requires_grad for p in supernet.parameters())
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())


def test_no_images_is_an_error():
    with pytest.raises(DataError, match="expected images to measure the switches on"):
        relative_rows(trained_like("nas_bench_201"), [], num_images=3)
