"""The probe and the recursion, and the matrices of groups' entries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.curvature import (
    block_curvature,
    entry_curvature,
    probe_curvature,
    recursion_curvature,
)
from sparsebayes.curvature.exact import ggn_diagonal, ggn_matrix
from sparsebayes.curvature.factors import class_columns
from sparsebayes.errors import DataError, GroupingError, ModelError, RecipeError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.rules import make_grouping


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_complete_probes_of_single_images_equal_the_oracle(build, targets, network_name, likelihood) -> None:
    model, x = build(network_name, 5)
    y = targets(likelihood, 5)
    found = probe_curvature(
        model,
        _names(model),
        [(x[:3], y[:3]), (x[3:], y[3:])],
        num_data=50,
        likelihood=likelihood,
        groups=8,
        factor=lambda logits, generator: class_columns(logits, likelihood),
    )
    for name, values in ggn_diagonal(model, _names(model), x, y, likelihood).items():
        _assert_equal(found[name], values * 10)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_probe_is_unbiased(build, groups: int) -> None:
    model, x = build("residual", 8)
    y = torch.arange(8) % 3
    names = _names(model)
    expected = ggn_diagonal(model, names, x, y)
    found = [
        probe_curvature(model, names, [(x, y)] * 10, num_data=8, groups=groups, seed=seed)
        for seed in range(12)
    ]
    for name in names:
        draws = torch.stack([one[name] for one in found])
        off = (draws.mean(0) - expected[name]).abs()
        assert bool((off <= 5 * draws.std(0) / 12**0.5 + 1e-12).all()), name
    total = torch.cat([expected[name].flatten() for name in names])
    errors = [torch.cat([(one[name] - expected[name]).flatten() for name in names]) for one in found]
    actual = sum(float(error.square().sum()) for error in errors) / 12 / float(total.square().sum())
    promised = sum(one.relative_error**2 for one in found) / 12
    assert 0.3 < promised / actual < 3


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_probe_of_a_sure_network_in_half_precision(dtype: torch.dtype, precision: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[3].bias.add_(torch.tensor([16.0, 0.0, 0.0]))  # starting vectors of 1e-4, gradients of 1e-6
    x, y = torch.randn(32, 4), torch.zeros(32, dtype=torch.int64)
    half = model.to(dtype)
    same = copy.deepcopy(half).double()
    batches = [(x.to(dtype), y)]

    def factor(logits: Tensor, _: torch.Generator) -> Tensor:
        v = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) * 2.0**-19  # float16 has nothing below 2^-24
        return v.expand(1, *logits.shape).to(logits.dtype)

    found = probe_curvature(half, _names(half), batches, num_data=32, factor=factor)
    expected = probe_curvature(same, _names(same), [(x.to(dtype).double(), y)], num_data=32, factor=factor)
    for name, values in expected.items():
        assert float((found[name].double() - values).norm() / values.norm()) < precision, name


def test_in_training_mode_it_is_the_jacobian_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    weight = model[0].weight

    def outputs(value: Tensor) -> Tensor:
        h = functional.linear(x, value, model[0].bias)
        h = functional.batch_norm(h, None, None, model[1].weight, model[1].bias, True)
        return model[3](h.tanh())

    jacobian = torch.autograd.functional.jacobian(outputs, weight.detach()).flatten(2)  # [n, C, P]
    p = outputs(weight.detach()).detach().softmax(1)
    columns = class_columns(p.log())  # [C, n, C]
    # All images' columns, each in its own place: signs between images average out.
    expected = torch.einsum("knc,ncp->knp", columns, jacobian).square().sum((0, 1)).view(4, 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    batches = [(x, y)] * 1500
    found = probe_curvature(model, ["0.weight"], batches, num_data=6, training=True, seed=1)
    assert float((found["0.weight"] - expected).norm() / expected.norm()) < 0.15
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert not model.training


def test_the_probe_leaves_nothing_behind_and_refuses_mistakes(build) -> None:
    model, x = build("residual", 4)
    y = torch.arange(4) % 3
    model.train()
    state = torch.get_rng_state()
    probe_curvature(model, ["fc.weight"], [(x, y)], num_data=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(RecipeError, match="at least 1 group of images in a batch, got groups=0"):
        probe_curvature(model, ["fc.weight"], [(x, y)], num_data=4, groups=0)
    with pytest.raises(DataError, match="at least one image"):
        probe_curvature(model, ["fc.weight"], [], num_data=4)
    with pytest.raises(DataError, match=r"class numbers in 0..2"):
        probe_curvature(model, ["fc.weight"], [(x, y + 1)], num_data=4)


def _looped_recursion(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The recursion written out for linear - tanh - linear."""
    first, _, second = model
    total = [torch.zeros_like(p) for p in model.parameters()]
    for image in x:
        z = first(image)
        a = z.tanh()
        p = second(a).softmax(0)
        h2 = p * (1 - p)
        h1 = (second.weight.square().T @ h2) * (1 - a.square()).square()
        for sums, part in zip(
            total,
            (torch.outer(h1, image.square()), h1, torch.outer(h2, a.square()), h2),
            strict=True,
        ):
            sums.add_(part.detach())
    return total


def test_the_recursion_follows_its_equations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    found = recursion_curvature(model, _names(model), [(x[:2], y[:2]), (x[2:], y[2:])], num_data=6)
    for name, expected in zip(_names(model), _looped_recursion(model, x), strict=True):
        _assert_equal(found[name], expected)


class Small(nn.Module):
    """Convolution, norm, pooling, a switch, a mean: what the recursion has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.z = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.avg_pool2d(functional.relu(self.norm(self.conv(x))), 2)
        h = self.z[0] * h + 0.5 * functional.max_pool2d(h, 1) * self.z[1]
        return self.fc(h.mean((2, 3)))


def test_the_recursion_is_exact_where_nothing_is_dropped() -> None:
    """One position, and each entry of an activation reached by one path only."""
    torch.manual_seed(0)
    model = Small().double().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    x, y = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.arange(4) % 3
    found = recursion_curvature(model, _names(model), [(x, y)], num_data=4)
    expected = ggn_diagonal(model, _names(model), x, y)
    for name in ("fc.weight", "fc.bias"):
        _assert_equal(found[name], expected[name])
    # Further down it drops what it says it drops, and is not exact.
    assert not torch.allclose(found["conv.weight"], expected["conv.weight"], rtol=1e-2)
    # By hand for the average over 2 x 2 positions: each has the weight 1/16, so that means fall by 1/4 in all.
    h = functional.avg_pool2d(functional.relu(model.norm(model.conv(x))), 2).detach().squeeze((2, 3))
    p = model(x).softmax(1).detach()
    down = (p * (1 - p)) @ model.fc.weight.detach().square()
    _assert_equal(found["z"], torch.stack([(down * h.square()).sum(), (down * h.square()).sum() * 0.25]))
    gate = down * (0.25 + 0.25 * 4.0)
    normed = functional.batch_norm(model.conv(x), model.norm.running_mean, model.norm.running_var).detach()
    on = model.norm(model.conv(x)).detach() > 0
    weight = (gate[:, :, None, None] / 16 * on * normed.square()).sum((0, 2, 3))
    torch.testing.assert_close(found["norm.weight"], weight, rtol=1e-6, atol=0)


def test_the_recursion_refuses_what_it_does_not_know(build) -> None:
    model, x = build("sequence", 2)
    with pytest.raises(ModelError, match=r"does not know the squared Jacobian of '\w+'; use entry_curvature"):
        recursion_curvature(model, ["enter.weight"], [(x, torch.tensor([0, 1]))], num_data=2)


@pytest.mark.parametrize("rule", ["rows", "kernels"])
def test_blocks_are_those_of_the_full_matrix(build, rule: str) -> None:
    model, x = build("residual", 5)
    y = torch.arange(5) % 3
    grouping = make_grouping(model, rule)
    found = block_curvature(model, grouping, [(x[:2], y[:2]), (x[2:], y[2:])], num_data=10, estimator="exact")
    assert len(found) == grouping.num_groups
    diagonal = entry_curvature(model, list(grouping.parameters), [(x, y)], num_data=10, estimator="exact")
    for labels in grouping.labels:
        if not labels.gate:
            continue
        full = ggn_matrix(model, [labels.parameter], x, y) * 2
        numbers = labels.index.expand(labels.shape).flatten()
        for group in numbers.unique().tolist():
            own = (numbers == group).nonzero().flatten()
            _assert_equal(found[group], full[own][:, own])
            _assert_equal(found[group].diagonal(), diagonal[labels.parameter].flatten()[own])


def test_a_block_across_two_parameters(build) -> None:
    model, x = build("mlp", 4)
    y = torch.arange(4) % 3
    labels = (
        Labels("4.weight", (3, 4), torch.tensor([[0], [-1], [0]])),
        Labels("4.bias", (3,), torch.tensor([-1, -1, 0])),
    )
    grouping = Grouping("odd", labels, ("4", "4"), torch.zeros(2, dtype=torch.int64))
    found = block_curvature(model, grouping, [(x, y)], num_data=4, estimator="exact")
    full = ggn_matrix(model, ["4.weight", "4.bias"], x, y)
    own = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 14])
    _assert_equal(found[0], full[own][:, own])
    assert found[1].shape == (0, 0)


def test_blocks_too_large_to_hold_are_refused(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("mlp", 2)
    monkeypatch.setattr("sparsebayes.curvature.blocks._MOST_NUMBERS", 10)
    with pytest.raises(GroupingError, match=r"would hold \d+ numbers, more than 10; choose smaller groups"):
        block_curvature(model, make_grouping(model, "rows"), [(x, torch.tensor([0, 1]))], num_data=2)
