"""Choosing images: what is promised of the chances, and that sums stay unbiased."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.curvature import entry_curvature, gate_curvature, switch_curvature
from sparsebayes.curvature.exact import LOSSES, ggn_diagonal, output_hessian
from sparsebayes.curvature.importance import choose, curvature_traces, inclusion, pool_size
from sparsebayes.errors import RecipeError
from sparsebayes.groups.rules import make_grouping


@pytest.mark.parametrize("likelihood", LOSSES)
def test_traces_are_those_of_the_output_hessian(targets, likelihood: str) -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [30.0, 0.0, -30.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = curvature_traces(logits, likelihood)
    expected = output_hessian(logits, targets(likelihood, 3), likelihood).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_the_trace_of_a_sure_image_is_not_lost_to_rounding() -> None:
    found = curvature_traces(torch.tensor([[60.0, 0.0]], dtype=torch.float64), "cross_entropy")
    torch.testing.assert_close(found, 2 * torch.tensor([-60.0], dtype=torch.float64).exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_chances_follow_the_traces_and_fill_the_budget(share: float) -> None:
    traces = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    traces[:3] = 0.0
    pi = inclusion(traces, share)
    assert float(pi.min()) > 0 and float(pi.max()) <= 1
    torch.testing.assert_close(float(pi.sum()), share * 200, rtol=0.05, atol=0)
    order = traces.argsort()
    assert bool((pi[order].diff() >= 0).all())
    between = (pi < 0.97) & (traces > 1e-4)
    ratios = (pi[between] - 0.02 * share) / traces[between]
    assert bool(between.any()) == (share < 1)
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-8, atol=0)


def test_no_trace_at_all_still_leaves_a_chance() -> None:
    assert bool((inclusion(torch.zeros(10, dtype=torch.float64), 0.1) > 0).all())


def test_every_image_is_drawn_as_often_as_its_chance_says() -> None:
    pi = torch.tensor([0.1, 1.0, 0.55, 0.0001, 0.8, 0.0499], dtype=torch.float64)
    counts = torch.zeros(6, dtype=torch.float64)
    for step in range(5000):
        counts[choose(pi, (step + 0.5) / 5000)] += 1
    torch.testing.assert_close(counts / 5000, pi, rtol=0, atol=3e-4)


def test_pools_hold_few_large_images() -> None:
    assert (pool_size(784), pool_size(3 * 224 * 224), pool_size(1 << 30)) == (1024, 111, 64)


def _fitted(num_images: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that is sure of most images."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        with torch.no_grad():
            model[2].weight.mul_(12.0)
        x = torch.randn(num_images, 4, dtype=torch.float64)
        return model, x, torch.arange(num_images) % 3


def test_sums_over_chosen_images_are_unbiased_within_their_own_error() -> None:
    model, x, y = _fitted(300)
    names = [name for name, _ in model.named_parameters()]
    expected = ggn_diagonal(model, names, x, y)
    found = [
        entry_curvature(model, names, [(x, y)], num_data=300, estimator="exact", importance=0.2, seed=seed)
        for seed in range(60)
    ]
    for name in names:
        draws = torch.stack([one[name] for one in found])
        error = draws.std(0) / 60**0.5
        assert bool(((draws.mean(0) - expected[name]).abs() <= 4.5 * error + 1e-9).all()), name
    # Fewer images than a plain fifth would need: the plain fifth errs more.
    plain = [
        entry_curvature(model, names, [(x[k::5], y[k::5])], num_data=300, estimator="exact") for k in range(5)
    ]

    def squared_error(one) -> float:
        return sum(float((one[name] - expected[name]).square().sum()) for name in names)

    assert sum(map(squared_error, found)) / 60 < 0.5 * sum(map(squared_error, plain)) / 5


def test_standard_errors_of_gates_hold_for_chosen_images() -> None:
    model, x, y = _fitted(400)
    grouping = make_grouping(model, "rows")
    exact = gate_curvature(model, grouping, [(x, y)], num_data=400, estimator="exact")
    ratios = []
    for seed in range(30):
        found = gate_curvature(model, grouping, [(x, y)], num_data=400, importance=0.3, seed=seed)
        assert found.num_images == 400
        ratios.append((found.diagonal - exact.diagonal) / found.standard_error)
    spread = torch.stack(ratios).square().mean().sqrt()
    assert 0.3 < float(spread) < 1.6


def test_how_images_are_split_into_batches_does_not_matter() -> None:
    model, x, y = _fitted(90)

    def run(*sizes: int) -> torch.Tensor:
        batches = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
        return entry_curvature(model, ["0.weight"], batches, num_data=90, importance=0.3, seed=2)["0.weight"]

    whole = run(90)
    for sizes in [(45, 45), (1, 0, 89), (64, 26)]:
        torch.testing.assert_close(run(*sizes), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    model, x, y = _fitted(4)
    with pytest.raises(
        RecipeError, match="expected a share of the images above 0 and at most 1, got importance="
    ):
        entry_curvature(model, ["0.weight"], [(x, y)], num_data=4, importance=share)


def test_a_pool_that_keeps_no_image_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _fitted(65)
    monkeypatch.setattr("sparsebayes.curvature.importance._POOL", 64)
    options = {"num_data": 65, "importance": 0.02}
    # The last pool is one image, which is kept with a chance of 0.02.
    whole = entry_curvature(model, ["0.weight"], [(x, y)], **options)
    first = entry_curvature(model, ["0.weight"], [(x[:64], y[:64])], **options)
    assert whole.num_images == 65
    torch.testing.assert_close(whole["0.weight"] * 65, first["0.weight"] * 64, rtol=1e-12, atol=0)


def test_no_image_kept_at_all_gives_zeros() -> None:
    model, x, y = _fitted(1)
    options = {"num_data": 5, "importance": 0.01}
    names = [name for name, _ in model.named_parameters()]
    found = entry_curvature(model, names, [(x, y)], **options)
    assert set(found) == set(names) and found.num_images == 1 and found.relative_error == float("inf")
    assert all(
        not bool(found[name].any()) and found[name].shape == p.shape for name, p in model.named_parameters()
    )
    assert not bool(gate_curvature(model, make_grouping(model, "rows"), [(x, y)], **options).diagonal.any())
    matrix = switch_curvature(model, ["0.bias", "2.bias"], [(x, y)], **options).matrix
    assert matrix is not None and matrix.shape == (9, 9) and not bool(matrix.any())


def test_switches_from_chosen_images_average_to_the_matrix() -> None:
    model, x, y = _fitted(60)
    names = ["0.bias", "2.bias"]
    expected = switch_curvature(model, names, [(x, y)], num_data=60, estimator="exact").matrix
    found = [
        switch_curvature(
            model, names, [(x, y)], num_data=60, estimator="exact", importance=0.3, seed=seed
        ).matrix
        for seed in range(200)
    ]
    assert expected is not None
    average = torch.stack(found).mean(0)
    assert float((average - expected).norm() / expected.norm()) < 0.05


def test_images_that_fill_their_pools_leave_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _fitted(128)
    monkeypatch.setattr("sparsebayes.curvature.importance._POOL", 64)
    options = {"num_data": 128, "importance": 0.3}
    expected = entry_curvature(model, ["0.weight"], [(x, y)], **options)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    found = entry_curvature(model, ["0.weight"], batches, **options)
    torch.testing.assert_close(found["0.weight"], expected["0.weight"], rtol=1e-10, atol=1e-12)


def test_auto_stops_between_pools_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pool is handed out in several blocks; its images count from the first one on.
    model, x, y = _fitted(256)
    monkeypatch.setattr("sparsebayes.curvature.importance._POOL", 64)
    monkeypatch.setattr("sparsebayes.curvature.sweep._BLOCK_ROWS", 16)
    options = {"num_data": 256, "importance": 0.9, "seed": 3}
    loose = {"num_images": "auto", "tolerance": 1.0}
    grouping = make_grouping(model, "rows")
    found = gate_curvature(model, grouping, [(x, y)], **loose, **options)
    assert found.num_images == 64
    same = gate_curvature(model, grouping, [(x[:64], y[:64])], **options)
    torch.testing.assert_close(found.diagonal, same.diagonal, rtol=1e-12, atol=0)
    entries = entry_curvature(model, ["0.weight"], [(x, y)], **loose, **options)
    assert entries.num_images == 64
    whole = entry_curvature(model, ["0.weight"], [(x[:64], y[:64])], **options)
    torch.testing.assert_close(entries["0.weight"], whole["0.weight"], rtol=1e-12, atol=0)
