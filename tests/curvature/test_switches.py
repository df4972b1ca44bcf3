"""Switches that are parameters: every way a supernet may use them, against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsebayes.curvature import block as block_module
from sparsebayes.curvature import capture, fallback, switch_curvature, switch_rows
from sparsebayes.curvature.exact import ggn_matrix
from sparsebayes.curvature.factors import class_columns
from sparsebayes.errors import GroupingError, NumericsError


class Cell(nn.Module):
    """Three operations on each of two edges, run twice with the same switches; `use` says how they multiply."""

    def __init__(self, use: Callable[[Cell, Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.ops = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.BatchNorm2d(2)),
                    nn.AvgPool2d(3, 1, 1),
                    nn.Identity(),
                ]
            )
            for _ in range(2)
        )
        self.alpha = nn.Parameter(torch.tensor([[1.0, 0.7, -0.4], [1.0, 1.0, 0.3]]))
        self.gate = nn.Parameter(torch.tensor([1.0, 0.8]))
        self.fc = nn.Linear(4, 3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for edge in (0, 1, 0):
            outputs = torch.stack([op(h) for op in self.ops[edge]])  # [O, n, C, H, W]
            h = torch.cat([self.use(self, self.alpha, outputs, edge)], 1).tanh()
        return self.fc(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


def _scalars(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    return sum(z[edge, o] * outputs[o] for o in range(3)) * cell.gate[edge]  # type: ignore[return-value]


def _in_place(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    total = outputs[0] * z[edge][0]
    total += z[edge, 1].view(1, 1, 1, 1) * outputs[1]
    total += torch.mul(outputs[2], z[edge, 2])
    return total.mul(cell.gate[edge])


def _softmax(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    weights = functional.softmax(z, dim=-1)[edge] * cell.gate[edge]
    return sum(w * y for w, y in zip(weights.unbind(), outputs, strict=True))  # type: ignore[return-value]


def _vectors(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    channels = z[edge, :2].view(2, 1, 1)  # one switch per channel
    return outputs[0] * channels + outputs[1] * z[:, 2:].mean() + cell.gate[edge] * outputs[2]


def _einsum(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    return torch.einsum("o,onchw->nchw", z[edge], outputs) * cell.gate[edge]


def _stacked(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    return (z[edge].view(3, 1, 1, 1, 1) * outputs).sum(0) * cell.gate.view(1, 2, 1, 1)


def _half_hidden(cell: Cell, z: Tensor, outputs: Tensor, edge: int) -> Tensor:
    return torch.addcmul(z[edge, 0] * outputs[0], z[edge, 1], outputs[1]) + outputs[2] * cell.gate[edge]


USES = {
    "scalars": _scalars,
    "in place": _in_place,
    "softmax": _softmax,
    "vectors": _vectors,
    "einsum": _einsum,
    "stacked": _stacked,
    "half hidden": _half_hidden,
}
NAMES = ["gate", "alpha"]


def _cell(use: str, num_images: int) -> tuple[Cell, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        cell = Cell(USES[use]).double().eval()
        for layer in cell.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
        return cell, torch.randn(num_images, 1, 4, 4, dtype=torch.float64)


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse", "binary_cross_entropy"])
@pytest.mark.parametrize("use", USES)
def test_exact_equals_the_oracle(targets, use: str, likelihood: str) -> None:
    # Batches of 3, 2 and 1: as long as the switches, where shapes alone would mistake one for the other.
    model, x = _cell(use, 6)
    y = targets(likelihood, 6)
    batches = list(zip(x.split([3, 2, 1]), y.split([3, 2, 1]), strict=True))
    found = switch_curvature(model, NAMES, batches, num_data=60, likelihood=likelihood, estimator="exact")
    expected = ggn_matrix(model, NAMES, x, y, likelihood) * 10
    assert found.matrix is not None
    _assert_equal(found.matrix, expected)
    _assert_equal(found.diagonal, expected.diagonal())
    rows = switch_rows(model, NAMES, batches, likelihood=likelihood, estimator="exact")
    assert rows.shape == (2 if likelihood == "cross_entropy" else 3, 6, 8)
    _assert_equal(torch.einsum("kne,knf->ef", rows, rows), expected / 10)


@pytest.mark.parametrize("use", ["scalars", "in place", "softmax", "vectors"])
def test_the_usual_ways_need_no_pass_for_each_image(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _cell(use, 6)
    assert _asked_image_by_image(model, x, monkeypatch) == []


def test_unusual_ways_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _cell("einsum", 6)
    assert _asked_image_by_image(model, x, monkeypatch) == ["alpha"]


def _asked_image_by_image(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Switches that were differentiated image by image, since not all of their uses were recorded."""
    asked: list[str] = []

    def listen(network: nn.Module, names: list[str], images: Tensor, v: Tensor) -> dict[str, Tensor]:
        asked.extend(names)
        return fallback.per_image_gradients(network, names, images, v)

    monkeypatch.setattr(block_module, "per_image_gradients", listen)
    switch_curvature(model, NAMES, [(x, torch.arange(6) % 3)], num_data=6)
    return asked


def test_injected_complete_probes_make_the_monte_carlo_estimator_exact() -> None:
    model, x = _cell("scalars", 5)
    y = torch.arange(5) % 3
    found = switch_curvature(
        model, NAMES, [(x, y)], num_data=5, factor=lambda logits, generator: class_columns(logits)
    )
    assert found.matrix is not None
    _assert_equal(found.matrix, ggn_matrix(model, NAMES, x, y))


@pytest.mark.parametrize("factor", ["stick", "rademacher", "sampled_label"])
def test_estimates_lie_within_five_standard_errors(factor: str) -> None:
    model, x = _cell("scalars", 4)
    y = torch.arange(4) % 3
    expected = ggn_matrix(model, NAMES, x, y)
    found = switch_curvature(
        model, NAMES, [(x.repeat(250, 1, 1, 1), y.repeat(250))], num_data=4, factor=factor, seed=5, draws=2
    )
    assert bool(((found.diagonal - expected.diagonal()).abs() <= 5 * found.standard_error).all())
    assert found.matrix is not None
    assert float((found.matrix - expected).norm() / expected.norm()) < 0.15
    alone = switch_curvature(
        model,
        NAMES,
        [(x.repeat(250, 1, 1, 1), y.repeat(250))],
        num_data=4,
        factor=factor,
        seed=5,
        draws=2,
        matrix=False,
    )
    assert alone.matrix is None and torch.equal(alone.diagonal, found.diagonal)


def test_a_buffer_as_long_as_the_batch_is_no_activation() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.z = nn.Parameter(torch.tensor(0.5))
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).tanh() * (self.table * self.z).sum(0)

    torch.manual_seed(0)
    model = Table().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = switch_curvature(model, ["z"], [(x, y)], num_data=4, estimator="exact")
    expected = ggn_matrix(model, ["z"], x, y)
    assert float(expected) > 0
    _assert_equal(found.diagonal, expected[0])


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("use", ["scalars", "softmax", "vectors"])
def test_half_precision_is_summed_in_float32(use: str, dtype: torch.dtype, precision: float) -> None:
    model, x = _cell(use, 32)
    y = torch.arange(32) % 3
    with torch.no_grad():
        model.fc.weight.mul_(20.0)  # sure of many images: gradients that float16 could not hold
    half = copy.deepcopy(model).to(dtype)
    same = copy.deepcopy(half).double()  # the very same rounded weights
    x = x.to(dtype)
    found = switch_curvature(half, NAMES, [(x, y)], num_data=32, estimator="exact").matrix
    expected = switch_curvature(same, NAMES, [(x.double(), y)], num_data=32, estimator="exact").matrix
    assert found is not None and expected is not None and found.dtype == torch.float32
    assert float((found.double() - expected).norm() / expected.norm()) < precision


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_with_an_input_gradient_of_our_own(dims: int, affine: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1.0, -0.5]))
            kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
            self.norm = kind(3, eps=0.1, affine=affine)
            self.norm.running_var.uniform_(0.5, 2.0)
            self.norm.running_mean.normal_()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.z[0] * x).tanh()
            return (self.z[1] * self.norm(h)).flatten(2).mean(2)

    torch.manual_seed(0)
    model = Normed().double().eval()
    if affine:
        nn.init.normal_(model.norm.weight)
    x, y = torch.randn(4, 3, *(4, 3, 2)[:dims], dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = switch_curvature(model, ["z"], [(x, y)], num_data=4, estimator="exact")
    assert found.matrix is not None
    _assert_equal(found.matrix, ggn_matrix(model, ["z"], x, y))


@pytest.mark.parametrize(
    ("pool", "remembers"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(3, 1, 1), True),
        (nn.MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1), ceil_mode=True), True),
        (lambda x: torch.max_pool2d(x, kernel_size=2, padding=1), True),
        (lambda x: functional.max_pool2d(x, 2, None), True),
        (lambda x: functional.max_pool2d(x.relu(), 2, return_indices=True)[0], False),
        (lambda x: functional.max_pool2d(x.relu(), 2, 2, 0, 1, False, True)[0], False),
    ],
)
def test_max_pools_that_remember_their_maxima(
    pool: Callable[[Tensor], Tensor], remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1.0, -0.5]))

        def forward(self, x: Tensor) -> Tensor:
            h = pool(self.z[0] * x)
            return (self.z[1] * pool(h.relu())).mean((2, 3))

    ran = []
    own = capture.max_pool
    monkeypatch.setattr(capture, "max_pool", lambda *given: ran.append(1) or own(*given))
    torch.manual_seed(0)
    model = Pooled().double()
    x, y = torch.randn(4, 3, 8, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = switch_curvature(model, ["z"], [(x, y)], num_data=4, estimator="exact")
    assert found.matrix is not None
    _assert_equal(found.matrix, ggn_matrix(model, ["z"], x, y))
    assert bool(ran) == remembers


def test_norms_that_a_network_runs_under_vmap() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1.0, -0.5]))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.vmap(self.norm, randomness="error")(
                torch.stack([self.z[0] * x, self.z[1] * x.tanh()])
            )
            return both.sum(0)

    torch.manual_seed(0)
    model = Mapped().double().eval()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = switch_curvature(model, ["z"], [(x, y)], num_data=4, estimator="exact")
    assert found.matrix is not None
    _assert_equal(found.matrix, ggn_matrix(model, ["z"], x, y))


def test_a_switch_that_a_layer_reads_as_its_bias_is_summed_over_both_uses() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.leave = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.fc.bias * self.fc(x).tanh())

    torch.manual_seed(0)
    model = Both().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    names = ["fc.bias", "leave.bias"]
    found = switch_curvature(model, names, [(x, y)], num_data=4, estimator="exact")
    assert found.matrix is not None
    _assert_equal(found.matrix, ggn_matrix(model, names, x, y))


def test_a_switch_that_nothing_reads_has_no_curvature() -> None:
    model, x = _cell("scalars", 4)
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = switch_curvature(model, ["spare", "gate"], [(x, torch.arange(4) % 3)], num_data=4)
    assert found.diagonal[:2].tolist() == [0.0, 0.0]
    assert bool((found.diagonal[2:] > 0).all())


def test_unknown_switches_and_overflow_are_refused_by_name() -> None:
    model, x = _cell("scalars", 4)
    with pytest.raises(GroupingError, match="expected a parameter of the model, got 'beta'"):
        switch_curvature(model, ["beta"], [(x, torch.arange(4) % 3)], num_data=4)
    model = model.float()
    with torch.no_grad():
        model.alpha.fill_(1e-30)
        model.fc.weight.fill_(1e38)
    x = (x * 1e6).float()
    y = torch.zeros(4, 3)
    with pytest.raises(NumericsError, match=r"nan or inf for \d of 8 switches, first in"):
        switch_curvature(model, NAMES, [(x, y)], num_data=4, likelihood="mse")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_convolutions_with_an_input_gradient_of_our_own(checkpointed: bool) -> None:
    class Dilated(nn.Module):
        """Convolutions whose library backward is slow, behind a switch."""

        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1.0, -0.5]))
            self.convs = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
                nn.Conv2d(4, 6, 1, groups=2),
                nn.Tanh(),
                nn.Conv2d(6, 3, (2, 3), dilation=(2, 1), padding=(1, 0)),
            )

        def forward(self, x: Tensor) -> Tensor:
            def body(h: Tensor) -> Tensor:
                return self.z[1] * self.convs(self.z[0] * h)

            h = checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
            return h.mean((2, 3))

    torch.manual_seed(0)
    model = Dilated().double()
    x, y = torch.randn(4, 4, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = switch_curvature(model, ["z"], [(x, y)], num_data=4, estimator="exact")
    _assert_equal(found.diagonal, _looped(model, x).diagonal())


def _looped(model: nn.Module, x: Tensor) -> Tensor:
    """The GGN of the switches "z" by backward passes through one image at a time."""
    total = torch.zeros(2, 2, dtype=torch.float64)
    for image in x:
        logits = model(image.unsqueeze(0)).squeeze(0)
        jacobian = torch.stack([torch.autograd.grad(f, model.z, retain_graph=True)[0] for f in logits])
        p = logits.detach().softmax(0)
        total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total
