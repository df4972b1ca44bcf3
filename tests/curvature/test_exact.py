"""The oracle itself, against a loop written from the definition and against curvlinops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.curvature import entry_curvature
from sparsebayes.curvature.exact import gate_matrix, ggn_diagonal, ggn_matrix
from sparsebayes.groups.grouping import Grouping, Labels

LIKELIHOODS = ["cross_entropy", "mse", "binary_cross_entropy"]


def _loss_hessian(f: Tensor, likelihood: str) -> Tensor:
    """Lam of one image from the closed form."""
    if likelihood == "cross_entropy":
        p = f.softmax(0)
        return p.diag() - torch.outer(p, p)
    if likelihood == "mse":
        return 2 * torch.eye(len(f), dtype=f.dtype)
    p = f.sigmoid()
    return (p * (1 - p)).diag()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_matrix_equals_a_loop_over_images_and_outputs(
    build, targets, network_name: str, likelihood: str
) -> None:
    model, x = build(network_name, 3)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    expected = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64).diag()
    for image in x:
        outputs = model(image.unsqueeze(0))[0]
        rows = [torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        expected += jacobian.T @ _loss_hessian(outputs.detach(), likelihood) @ jacobian
    found = ggn_matrix(model, names, x, targets(likelihood, 3), likelihood)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    diagonal = ggn_diagonal(model, names, x, targets(likelihood, 3), likelihood)
    assert {name: d.shape for name, d in diagonal.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    flat = torch.cat([diagonal[name].flatten() for name in names])
    torch.testing.assert_close(flat, expected.diagonal(), rtol=1e-10, atol=1e-13)


def test_gate_matrix_is_the_weights_ggn_along_the_groups() -> None:
    """With S holding the gate entries' values column by column, the switches' matrix is S^T G S."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    rows = Labels("0.weight", (3, 4), torch.tensor([[0], [1], [-1]]))
    own = Labels("0.bias", (3,), torch.tensor([0, 1, -1]), gate=False)
    reads = Labels("2.weight", (2, 3), torch.tensor([[2, 0, 2]]))
    grouping = Grouping("some", (rows, own, reads), ("0",), torch.zeros(3, dtype=torch.int64))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    names = ["0.weight", "2.weight"]
    first, second = model[0].weight.detach(), model[2].weight.detach()
    spread = torch.zeros(18, 3, dtype=torch.float64)
    spread[0:4, 0], spread[4:8, 1] = first[0], first[1]
    spread[[13, 16], 0] = second[:, 1]
    spread[[12, 14, 15, 17], 2] = second[:, [0, 2]].flatten()
    expected = spread.T @ ggn_matrix(model, names, x, y) @ spread
    torch.testing.assert_close(gate_matrix(model, grouping, x, y), expected, rtol=1e-10, atol=1e-14)


def test_an_entry_in_two_groups_is_scaled_by_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    row = Labels("0.weight", (2, 2), torch.tensor([[0], [-1]]))
    column = Labels("0.weight", (2, 2), torch.tensor([[1, -1]]))
    grouping = Grouping("both", (row, column), ("0",), torch.zeros(2, dtype=torch.int64))
    x = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    w = model[0].weight.detach()
    found = gate_matrix(model, grouping, x, torch.zeros(1, 2, dtype=torch.float64), "mse")
    by_row, by_column = torch.stack([w[0] @ x[0], w.new_zeros(())]), w[:, 0] * 3.0
    expected = 2 * torch.stack([by_row, by_column]) @ torch.stack([by_row, by_column]).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


# Its forward mode loads scripted functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("network", ["residual", "mlp"])
def test_curvlinops_agrees(build, network: str) -> None:
    from curvlinops import GGNLinearOperator

    model, x = build(network, 6)
    y = torch.arange(6) % 3
    parameters = dict(model.named_parameters())
    operator = GGNLinearOperator(
        model, nn.CrossEntropyLoss(reduction="sum"), list(parameters.values()), [(x, y)]
    )
    size = sum(p.numel() for p in parameters.values())
    dense = operator @ torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(ggn_matrix(model, list(parameters), x, y), dense, rtol=1e-9, atol=1e-12)

    fast = entry_curvature(model, list(parameters), [(x, y)], num_data=6, estimator="exact")
    flat = torch.cat([fast[name].flatten() for name in parameters])
    torch.testing.assert_close(flat, dense.diagonal(), rtol=1e-9, atol=1e-12)
