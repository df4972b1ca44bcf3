"""The Laplace posterior: fixed points, decisions, strength, hierarchy, state, and planted sparsity."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RecipeError, RunError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference import Laplace, updates
from sparsebayes.inference.prior import ENTROPY_THRESHOLD

DOUBLE = torch.float64
WANTED = torch.tensor([0.3, 0.9, 1.2, 1.5, 3.0, -3.0], dtype=DOUBLE)
CURVED = torch.tensor([1.0, 1.0, 1.0, 4.0, 100.0, 0.2], dtype=DOUBLE)


def fit(posterior: Laplace, wanted: Tensor, curvature: Tensor, *, num_updates: int, **options: Any) -> Tensor:
    """Alternate updates with exact training on h/2 (z - wanted)^2 + penalty |z|; the last z."""
    for _ in range(num_updates):
        z = wanted.sign() * (wanted.abs() - posterior.penalty / curvature).clamp(min=0)
        posterior.update_(z, curvature, **options)
    return z


def log_evidence(y: Tensor, x: Tensor, precision: Tensor, noise: float) -> Tensor:
    """Log density of y = x w + noise with w ~ N(0, 1/precision)."""
    covariance = noise * torch.eye(len(y), dtype=y.dtype) + (x / precision) @ x.T
    return torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)


def rows(num_groups: int, size: int) -> Grouping:
    """Each row of one matrix is a group."""
    label = Labels("weight", (num_groups, size), torch.arange(num_groups)[:, None])
    return Grouping("rows", (label,), ("layer",), torch.zeros(num_groups, dtype=torch.int64))


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_updates_and_training_rest_at_the_closed_form(update: str) -> None:
    posterior = Laplace(6, update=update)
    z = fit(posterior, WANTED, CURVED, num_updates=300)
    expected = updates.fixed_point(WANTED, CURVED)
    torch.testing.assert_close(posterior.gamma, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.own, posterior.gamma)
    torch.testing.assert_close(
        z, expected / WANTED, rtol=1e-9, atol=1e-9
    )  # the posterior mean of the ridge prior
    wanted_evidence = WANTED.square() * CURVED
    at_rest = (wanted_evidence - 1).clamp(min=0).square() / wanted_evidence
    torch.testing.assert_close(posterior.evidence, at_rest, rtol=1e-9, atol=1e-9)
    assert posterior.keep("printed").tolist() == (expected > ENTROPY_THRESHOLD).tolist()
    torch.testing.assert_close(posterior.relevance[2:], 1 - 1 / wanted_evidence[2:], rtol=1e-9, atol=0)


def test_switches_called_one_again_rest_where_fixed_coordinates_do() -> None:
    """At each update the trained z becomes part of the weights: z = 1, h grows or shrinks with z^2."""
    posterior = Laplace(6)
    position = WANTED.clone()
    for _ in range(300):
        live = position != 0
        posterior.update_(torch.ones_like(WANTED), position.square() * CURVED)
        pull = torch.where(live, posterior.penalty / (position.abs() * CURVED), 0.0)
        position = torch.where(live, WANTED.sign() * (WANTED.abs() - pull).clamp(min=0), 0.0)
    expected = updates.fixed_point(WANTED, CURVED)
    torch.testing.assert_close(position, expected / WANTED, rtol=1e-9, atol=1e-9)
    assert posterior.keep("evidence").tolist() == [False, False, False, True, True, False]
    assert posterior.own[:2].tolist() == [0.0, 0.0]


def test_evidence_and_entropy_are_nearly_one_rule_at_one() -> None:
    curvature = torch.tensor([0.99, 1.01, 1.062, 1.063, 2.0], dtype=DOUBLE)
    posterior = Laplace(5)
    posterior.update_(torch.ones(5), curvature)
    assert posterior.keep().tolist() == [False, True, True, True, True]
    assert posterior.keep("evidence").tolist() == posterior.keep().tolist()
    assert posterior.keep("entropy").tolist() == [False, False, False, True, True]
    assert pytest.approx(1.0622, abs=5e-5) == 1 / (1 - ENTROPY_THRESHOLD)
    torch.testing.assert_close(posterior.optimum, updates.fixed_point(torch.ones(5), curvature))
    # The single printed step does not see it: at z = 1 its variance never falls below 1.
    for _ in range(20):
        assert posterior.gamma.min() >= 1
        assert posterior.keep("printed").all()
        posterior.update_(torch.ones(5), curvature)
    # Away from z = 1 the entropy depends on the units of z, the evidence does not.
    posterior.update_(torch.full((5,), 0.24), curvature * 1e9)
    assert posterior.keep("evidence").all()
    assert not posterior.keep("entropy").any()


def test_printed_rule_is_algorithm_one_after_training() -> None:
    z = torch.tensor([1.0, 0.06, 0.05], dtype=DOUBLE)
    h = torch.tensor([50.0, 1e6, 1e6], dtype=DOUBLE)
    posterior = Laplace(3)
    assert posterior.gamma.tolist() == posterior.omega.tolist() == [1.0, 1.0, 1.0]
    posterior.update_(z, h)
    variance = 1 / (1 + h)
    printed = z / (1 - variance).sqrt()
    torch.testing.assert_close(posterior.gamma, printed, rtol=1e-9, atol=0)
    assert posterior.keep("printed").tolist() == [True, True, False]


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
@pytest.mark.parametrize("rule", ["evidence", "entropy", "printed"])
def test_dead_groups_are_off_at_once(rule: str, update: str) -> None:
    posterior = Laplace(4, update=update)
    posterior.update_(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 1e-9, 5.0, 5.0]))
    assert posterior.keep(rule).tolist() == [False, False, False, True]
    assert posterior.own[:3].tolist() == [0.0, 0.0, 0.0]
    assert posterior.omega.isfinite().all()
    assert posterior.relevance[:3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_strength_divides_the_curvature_and_weighs_the_penalty(update: str) -> None:
    tempered, plain = Laplace(6, update=update, strength=8.0), Laplace(6, update=update)
    for _ in range(3):
        tempered.update_(WANTED, CURVED)
        plain.update_(WANTED, CURVED / 8)
    for name in ("gamma", "omega", "evidence", "relevance", "optimum"):
        assert torch.equal(getattr(tempered, name), getattr(plain, name)), name
    assert torch.equal(tempered.penalty, 8 * plain.penalty)
    tempered.update_(WANTED, CURVED, strength=2.0)
    assert torch.equal(tempered.evidence, WANTED.square() * (CURVED / 2))
    assert tempered.strength == 2.0
    tempered.update_(WANTED, CURVED)  # a new strength stays
    assert torch.equal(tempered.evidence, WANTED.square() * (CURVED / 2))


def test_strength_moves_the_resting_point_by_itself() -> None:
    posterior = Laplace(6, strength=3.0)
    fit(posterior, WANTED, CURVED, num_updates=300)
    torch.testing.assert_close(
        posterior.gamma, (WANTED.square() - 3 / CURVED).clamp(min=0), rtol=1e-9, atol=1e-9
    )


def test_prices_are_strengths_of_single_groups() -> None:
    prices = torch.tensor([0.1, 0.5, 2.0, 1.0, 4.0, 1.0], dtype=DOUBLE)
    posterior = Laplace(6, strength=2.0)
    posterior.update_(WANTED, CURVED, prices=prices)
    torch.testing.assert_close(
        posterior.evidence, WANTED.square() * CURVED / (2 * prices), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(posterior.penalty, 2 * prices * posterior.omega, rtol=1e-14, atol=0)
    posterior.update_(WANTED, CURVED)  # prices are not remembered
    torch.testing.assert_close(posterior.evidence, WANTED.square() * CURVED / 2, rtol=1e-14, atol=0)


def orthogonal_regression(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, design with orthogonal columns, least-squares weights and their curvature at noise 0.5."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(12, size, dtype=DOUBLE, generator=generator)).Q
    x = basis * torch.linspace(1, 2, size, dtype=DOUBLE)
    truth = torch.zeros(size, dtype=DOUBLE)
    truth[::2] = 1.5
    y = x @ truth + 0.5**0.5 * torch.randn(12, dtype=DOUBLE, generator=generator)
    square = x.square().sum(0)
    return y, x, x.T @ y / square, square / 0.5


def test_the_decision_is_that_of_the_log_evidence_of_a_regression() -> None:
    y, x, weights, curvature = orthogonal_regression(6)
    posterior = Laplace(6)
    posterior.update_(weights, curvature)
    kept = posterior.keep()
    assert 0 < int(kept.sum()) < 6
    absent = torch.full((6,), 1e12, dtype=DOUBLE)
    nothing = log_evidence(y, x, absent, 0.5)
    for group in range(6):
        gains = []
        for variance in [float(posterior.optimum[group]), *torch.logspace(-4, 3, 50).tolist()]:
            precision = absent.clone()
            precision[group] = 1 / max(variance, 1e-12)
            gains.append(float(log_evidence(y, x, precision, 0.5) - nothing))
        evidence = max(float(posterior.evidence[group]), 1.0)  # Tipping and Faul's gain; none at or below 1
        assert gains[0] == pytest.approx(0.5 * (evidence - 1 - math.log(evidence)), abs=1e-6)
        assert max(gains[1:]) <= gains[0] + 1e-9  # no other variance does better
        assert (max(gains[1:]) > 1e-9) == bool(kept[group])  # kept iff some variance beats none


def test_updates_with_training_never_lose_evidence() -> None:
    y, x, weights, curvature = orthogonal_regression(6)
    posterior = Laplace(6)
    fit(posterior, weights, curvature, num_updates=2)  # omega = 1 at the start belongs to no variance
    last = -torch.inf
    for _ in range(30):
        fit(posterior, weights, curvature, num_updates=1)
        now = float(log_evidence(y, x, 1 / posterior.gamma.clamp(min=1e-14), 0.5))
        assert now >= last - 1e-9
        last = now
    best = float(log_evidence(y, x, 1 / posterior.optimum.clamp(min=1e-14), 0.5))
    assert best == pytest.approx(last, abs=2.0)


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_dependencies_are_counted_once(update: str) -> None:
    chain = Hierarchy.build(predecessors=[[], [0], [1]], gate=[-1, -1, 0])
    posterior = Laplace(3, hierarchy=chain, update=update)
    z, h = torch.tensor([0.9, 1.1, 1.3], dtype=DOUBLE), torch.tensor([4.0, 9.0, 20.0], dtype=DOUBLE)
    own = torch.ones(3, dtype=DOUBLE)
    for _ in range(4):
        gamma = chain.combine(own)  # only C sees the dependency; the state stays the own variance
        own = updates.reweighted(z, h, gamma)[1] if update == "reweighted" else updates.mackay(z, h, gamma)
        posterior.update_(z, h)
        assert torch.equal(posterior.own, own)
        assert torch.equal(posterior.gamma, chain.combine(own))
    assert torch.equal(posterior.optimum, chain.combine(updates.fixed_point(z, h)))


def test_each_penalty_belongs_to_the_documented_variances() -> None:
    chain, grouping = Hierarchy.build(predecessors=[[], [0], [1]]), rows(3, 1)
    z, h = torch.tensor([0.9, 1.1, 1.3], dtype=DOUBLE), torch.tensor([4.0, 9.0, 20.0], dtype=DOUBLE)
    for update, start in (("reweighted", 1.0), ("mackay", 0.0)):
        switches = Laplace(3, hierarchy=chain, update=update)
        entries = Laplace(3, hierarchy=chain, update=update, scale="entries")
        assert switches.omega.tolist() == entries.omega.tolist() == [start] * 3
        for _ in range(3):
            before = switches.gamma
            switches.update_(z, h)
            entries.update_(z, {"weight": h[:, None]}, grouping=grouping)
            variance = before if update == "reweighted" else switches.gamma
            expected = updates.log_det_slope(h, variance).sqrt()
            torch.testing.assert_close(switches.omega, expected, rtol=1e-14, atol=0)
            torch.testing.assert_close(entries.omega, expected, rtol=1e-14, atol=0)
            torch.testing.assert_close(entries.own, switches.own, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", ["evidence", "entropy", "printed"])
def test_groups_follow_their_gate_and_their_predecessors(rule: str) -> None:
    # 0 is the gate of 1; 2 is read from 1 or 3.
    hierarchy = Hierarchy.build(predecessors=[[], [], [1, 3], []], gate=[-1, 0, -1, -1])
    posterior = Laplace(4, hierarchy=hierarchy)
    h = torch.full((4,), 50.0)
    posterior.update_(torch.tensor([0.0, 1.0, 1.0, 1.0]), h)
    assert posterior.keep(rule).tolist() == [False, False, True, True]
    posterior.update_(torch.tensor([0.0, 1.0, 1.0, 0.0]), h)
    assert posterior.keep(rule).tolist() == [False, False, False, False]


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_entries_rest_at_the_closed_form_and_know_their_evidence(update: str) -> None:
    size, grouping = 9, rows(4, 9)
    posterior = Laplace(4, scale="entries", update=update, strength=2.0)
    norm = torch.tensor([1.0, 3.0, 0.8, 2.0], dtype=DOUBLE)
    h = torch.tensor([40.0, 10.0, 10.0, 0.0], dtype=DOUBLE)
    curvature = {"weight": h[:, None].expand(4, size), "bias": torch.ones(4)}  # a bias in no group is ignored
    posterior.update_(norm, curvature, grouping=grouping)
    assert posterior.evidence.tolist() == pytest.approx([40 / 18, 5.0, 0.64 * 10 / 18, 0.0])
    assert posterior.keep().tolist() == [True, True, False, False]
    expected = updates.fixed_point(norm / grouping.sizes().sqrt(), h / 2)
    torch.testing.assert_close(posterior.optimum, expected)
    evidence = posterior.evidence
    for _ in range(300):
        trained = (norm - torch.where(h > 0, posterior.penalty / h, 0.0)).clamp(min=0)
        posterior.update_(trained, curvature, grouping=grouping)
    torch.testing.assert_close(posterior.gamma, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.relevance[:2], 1 - 1 / evidence[:2], rtol=1e-9, atol=0)


def test_entries_in_several_groups_are_charged_the_mean_price() -> None:
    labels = (
        Labels("weight", (2, 2), torch.tensor([[0], [1]])),
        Labels("weight", (2, 2), torch.tensor([[2, -1]])),
    )
    grouping = Grouping("mixed", labels, ("layer",), torch.zeros(3, dtype=torch.int64))
    prices = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE)
    h = torch.tensor([[3.0, 5.0], [7.0, 0.0]], dtype=DOUBLE)
    posterior = Laplace(3, scale="entries", strength=10.0)
    posterior.update_(torch.ones(3), {"weight": h}, grouping=grouping, prices=prices)
    temperature = 10 * torch.tensor([[2.5, 1.0], [3.0, 2.0]], dtype=DOUBLE)
    expected = updates.reweighted_entries(
        torch.ones(3, dtype=DOUBLE), {"weight": h / temperature}, grouping, torch.ones(3, dtype=DOUBLE)
    )
    torch.testing.assert_close(posterior.omega, expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(posterior.own, expected[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(posterior.penalty, 10 * prices * posterior.omega, rtol=1e-14, atol=0)


def design(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights of a regression: 6 of 24 weights, 4 of 12 pairs; noise 0.25."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 24, dtype=DOUBLE, generator=generator)
    x += 0.5 * torch.randn(300, 1, dtype=DOUBLE, generator=generator)  # correlated inputs
    truth = torch.zeros(24, dtype=DOUBLE)
    truth[[0, 1, 4, 5, 8, 12]] = torch.tensor([1.0, -0.7, 0.5, 2.0, -0.4, 0.6], dtype=DOUBLE)
    return x, x @ truth + 0.5 * torch.randn(300, dtype=DOUBLE, generator=generator), truth


def train(x: Tensor, y: Tensor, w: Tensor, shrink: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Gradient descent on |y - x w|^2/(2 * 0.25), total loss, each step followed by ``shrink(w, rate)``."""
    rate = 0.25 / float(torch.linalg.matrix_norm(x, 2)) ** 2
    for _ in range(150):
        w = shrink(w - rate * (x.T @ (x @ w - y)) / 0.25, rate)
    return w


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_planted_weights_are_recovered(update: str) -> None:
    hits = 0
    for seed in range(10):
        x, y, truth = design(seed)
        posterior = Laplace(24, update=update, strength=10.0)
        w = torch.zeros(24, dtype=DOUBLE)
        for _ in range(6):
            penalty = posterior.penalty
            w = train(x, y, w, lambda w, rate, p=penalty: w.sign() * (w.abs() - rate * p).clamp(min=0))
            posterior.update_(w, x.square().sum(0) / 0.25)
        hits += torch.equal(posterior.keep(), truth != 0)
    assert hits >= 9


def test_planted_groups_are_recovered_from_entry_curvatures() -> None:
    grouping, hits = rows(12, 2), 0
    for seed in range(10):
        x, y, truth = design(seed)
        posterior = Laplace(12, scale="entries", strength=10.0)
        w = torch.zeros(24, dtype=DOUBLE)
        for _ in range(6):

            def shrink(w: Tensor, rate: float, penalty: Tensor = posterior.penalty) -> Tensor:
                pairs = w.view(12, 2)
                norm = pairs.norm(dim=1, keepdim=True).clamp(min=1e-300)
                return (pairs * (1 - rate * penalty[:, None] / norm).clamp(min=0)).flatten()

            w = train(x, y, w, shrink)
            curvature = {"weight": (x.square().sum(0) / 0.25).view(12, 2)}
            posterior.update_(w.view(12, 2).norm(dim=1), curvature, grouping=grouping)
        hits += torch.equal(posterior.keep(), truth.view(12, 2).any(dim=1))
    assert hits >= 9


@pytest.mark.parametrize("scale", ["switches", "entries"])
def test_a_loaded_state_goes_on_to_the_same_numbers(scale: str) -> None:
    grouping = rows(6, 2)
    generator = torch.Generator().manual_seed(4)
    hierarchy = Hierarchy.build(predecessors=[[], [0], [0], [1, 2], [3], []])

    def step(posterior: Laplace, z: Tensor, h: Tensor) -> None:
        if scale == "switches":
            posterior.update_(z, h[:, 0], prices=z + 0.1)
        else:
            posterior.update_(z, {"weight": h}, grouping=grouping, prices=z + 0.1)

    posterior = Laplace(6, hierarchy=hierarchy, scale=scale)
    for _ in range(3):
        step(posterior, torch.rand(6, generator=generator), 9 * torch.rand(6, 2, generator=generator))
    posterior.strength = 3.5
    file = io.BytesIO()
    torch.save(posterior.state_dict(), file)
    file.seek(0)
    resumed = Laplace(6, hierarchy=hierarchy, scale=scale)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert repr(resumed) == repr(posterior)
    assert torch.equal(resumed.evidence, posterior.evidence)
    assert torch.equal(resumed.penalty, posterior.penalty)
    z, h = torch.rand(6, generator=generator), 9 * torch.rand(6, 2, generator=generator)
    step(posterior, z, h)
    step(resumed, z, h)
    after, expected = resumed.state_dict(), posterior.state_dict()
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value, key


def test_state_and_properties_are_copies() -> None:
    posterior = Laplace(2)
    z, h = torch.ones(2, dtype=DOUBLE), torch.full((2,), 4.0, dtype=DOUBLE)
    posterior.update_(z, h)
    saved = posterior.state_dict()
    expected = {key: value.clone() for key, value in saved.items() if isinstance(value, Tensor)}
    properties = ("own", "gamma", "omega", "penalty", "optimum", "evidence", "relevance")
    for touched in (
        z,
        h,
        *(saved[key] for key in expected),
        *(getattr(posterior, name) for name in properties),
    ):
        touched.fill_(-7.0)
    for key, value in expected.items():
        assert torch.equal(posterior.state_dict()[key], value), key
    given = posterior.state_dict()
    posterior.load_state_dict(given)
    for key, value in expected.items():
        given[key].fill_(-7.0)
        assert torch.equal(posterior.state_dict()[key], value), key


def test_repr_says_what_it_is() -> None:
    posterior = Laplace(3, strength=20)
    assert repr(posterior) == "Laplace(3 groups, switches, reweighted, strength 20, 0 updates)"
    posterior.update_(torch.ones(3), torch.tensor([0.0, 10.0, 40.0]))
    assert repr(posterior) == "Laplace(3 groups, switches, reweighted, strength 20, 1 updates, 1 of 3 kept)"


def test_a_refused_update_changes_nothing() -> None:
    posterior = Laplace(2, strength=2.0)
    posterior.update_(torch.ones(2), torch.tensor([3.0, 4.0]))
    before = posterior.state_dict()
    for z, h in (([1.0, 1.0], [1.0, -1.0]), ([1.0, torch.nan], [1.0, 1.0])):
        with pytest.raises(NumericsError):
            posterior.update_(torch.tensor(z), torch.tensor(h), strength=5.0)
    with pytest.raises(RunError):
        posterior.load_state_dict({**before, "own": before["own"][:1], "strength": 9.0})
    after = posterior.state_dict()
    assert all(
        torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in before.items()
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_groups": 0}, GroupingError, r"expected at least one group, got 0"),
        (
            {"hierarchy": Hierarchy.build(predecessors=[[], [0]])},
            GroupingError,
            r"expected a hierarchy over 3 groups, got one over 2",
        ),
        ({"scale": "entry"}, RecipeError, r"unknown scale 'entry'; did you mean 'entries'\?"),
        ({"update": "makay"}, RecipeError, r"unknown update 'makay'; did you mean 'mackay'\?"),
        ({"strength": 0.0}, RecipeError, r"expected a positive finite strength, got 0.0"),
    ],
)
def test_posteriors_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Laplace(**{"num_groups": 3, **options})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ([1.0] * 2, [1.0] * 3),
            {},
            GroupingError,
            r"a magnitude of shape \[3\], one number per group, got \[2\]",
        ),
        (
            ([1.0] * 3, [1.0] * 4),
            {},
            GroupingError,
            r"a curvature of shape \[3\], one number per group, got \[4\]",
        ),
        (
            ([1.0, torch.inf, 1.0], [1.0] * 3),
            {},
            NumericsError,
            r"a finite magnitude, got inf at \[1\]: lower",
        ),
        (
            ([1.0] * 3, [1.0, 1.0, torch.nan]),
            {},
            NumericsError,
            r"a finite curvature, got nan at \[2\]: lower",
        ),
        (
            ([1.0] * 3, [1.0, -0.5, 1.0]),
            {},
            NumericsError,
            r"a curvature >= 0, got -0.5 at \[1\]: use a Gauss-Newton",
        ),
        (([1.0] * 3, [1.0] * 3), {"strength": -1.0}, RecipeError, r"positive finite strength, got -1.0"),
        (
            ([1.0] * 3, [1.0] * 3),
            {"prices": torch.zeros(3)},
            NumericsError,
            r"positive finite prices, got 0.0",
        ),
        (
            ([1.0] * 3, [1.0] * 3),
            {"grouping": rows(3, 2)},
            GroupingError,
            r"but the scale is 'switches': pass",
        ),
    ],
)
def test_bad_measurements_are_refused(
    arguments: tuple[list[float], list[float]], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Laplace(3).update_(torch.tensor(arguments[0]), torch.tensor(arguments[1]), **options)


def test_bad_entry_measurements_are_refused() -> None:
    posterior, ones, grouping = Laplace(3, scale="entries"), torch.ones(3), rows(3, 2)
    with pytest.raises(GroupingError, match="but the scale is 'entries': pass"):
        posterior.update_(ones, ones, grouping=grouping)
    with pytest.raises(GroupingError, match="but the scale is 'entries': pass"):
        posterior.update_(ones, {"weight": torch.ones(3, 2)})
    with pytest.raises(GroupingError, match="expected a grouping of 3 groups, got 4"):
        posterior.update_(ones, {"weight": torch.ones(4, 2)}, grouping=rows(4, 2))
    with pytest.raises(GroupingError, match=r"curvature of 'weight' with shape \[3, 2\], got shape \[3, 1\]"):
        posterior.update_(ones, {"weight": torch.ones(3, 1)}, grouping=grouping)
    with pytest.raises(NumericsError, match=r"curvature of weight >= 0, got -1 at \[0, 0\]"):
        posterior.update_(ones, {"weight": -torch.ones(3, 2)}, grouping=grouping)
    with pytest.raises(NumericsError, match=r"finite curvature of weight, got nan at \[0, 0\]"):
        posterior.update_(ones, {"weight": torch.full((3, 2), torch.nan)}, grouping=grouping)
    assert posterior.num_updates == 0


def test_nothing_is_decided_before_the_first_update() -> None:
    posterior = Laplace(2)
    for ask in ("evidence", "relevance", "optimum"):
        with pytest.raises(RunError, match="at least one update, got a new one: call update_ first"):
            getattr(posterior, ask)
    for rule in ("evidence", "entropy", "printed"):
        with pytest.raises(RunError, match="call update_ first"):
            posterior.keep(rule)
    posterior.update_(torch.ones(2), torch.ones(2))
    with pytest.raises(RecipeError, match="unknown rule 'entropie'; did you mean 'entropy'"):
        posterior.keep("entropie")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"expected a posterior state with the keys \['curvature', .* got .*'extra'"),
        (
            {"scale": "entries"},
            r"expected a posterior state with scale 'switches', got 'entries': resume with",
        ),
        ({"update": "mackay"}, r"expected a posterior state with update 'reweighted', got 'mackay'"),
        ({"strength": -1.0}, r"expected a positive finite strength in the posterior state, got -1.0"),
        ({"strength": "1"}, r"expected a positive finite strength in the posterior state, got '1'"),
        ({"num_updates": -1}, r"expected a count of updates in the posterior state, got -1"),
        (
            {"omega": torch.ones(3)},
            r"expected 'omega' of the posterior state with shape \[2\], got shape \[3\]",
        ),
        ({"size": [1.0, 1.0]}, r"expected 'size' of the posterior state with shape \[2\], got list"),
        ({"own": torch.tensor([1.0, torch.nan])}, r"expected finite values >= 0 in 'own'"),
        ({"energy": torch.tensor([1.0, -1.0])}, r"expected finite values >= 0 in 'energy'"),
    ],
)
def test_foreign_states_are_refused(change: dict[str, Any], message: str) -> None:
    posterior = Laplace(2)
    with pytest.raises(RunError, match=message):
        posterior.load_state_dict({**posterior.state_dict(), **change})


@pytest.mark.parametrize("rule", ["evidence", "entropy"])
def test_survives_is_the_strength_at_which_keep_changes_its_mind(rule: str) -> None:
    magnitude = torch.tensor([1.0, 0.5, 1.2, 0.1], dtype=torch.float64)
    curvature = torch.tensor([3.0, 40.0, 0.7, 900.0], dtype=torch.float64)
    prices = torch.tensor([1.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    posterior = Laplace(4, strength=7.0)
    posterior.update_(magnitude, curvature, prices=prices)
    limits = posterior.survives(rule)
    for group, limit in enumerate(limits.tolist()):
        for strength in (0.999 * limit, 1.001 * limit):
            if strength > 0:
                posterior.update_(magnitude, curvature, prices=prices, strength=strength)
                assert bool(posterior.keep(rule)[group]) == (strength < limit)
    with pytest.raises(RecipeError, match="unknown rule 'printed'"):
        posterior.survives("printed")
    with pytest.raises(RunError, match="at least one update"):
        Laplace(4).survives()
