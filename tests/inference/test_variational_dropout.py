"""Variational dropout: the KL against integration, the relaxation against its density, and planted groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RecipeError, RunError
from sparsebayes.inference import VariationalDropout
from sparsebayes.inference.variational_dropout import (
    LARGEST_LOGIT,
    bernoulli_entropy,
    concrete_log_density,
    concrete_sample,
    dropout_kl,
)

DOUBLE = torch.float64


def integrated_kl(p: float, m: float, precision: float, width: float) -> float:
    """KL(q || N(0, 1/precision)) of q = p N(0, width^2) + (1 - p) N(m, width^2), by quadrature."""
    x = torch.linspace(-12 * width, m + 12 * width, 2_000_001, dtype=DOUBLE)
    normal = torch.distributions.Normal
    log_q = torch.logaddexp(
        math.log(p) + normal(0.0, width).log_prob(x), math.log(1 - p) + normal(m, width).log_prob(x)
    )
    integrand = log_q.exp() * (log_q - normal(0.0, precision**-0.5).log_prob(x))
    return float(torch.trapezoid(integrand, x))


@pytest.mark.parametrize("p", [0.03, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("m", "precision"), [(0.4, 50.0), (1.5, 0.1), (0.8, 150.0)])
def test_kl_agrees_with_numerical_integration(p: float, m: float, precision: float) -> None:
    width = 0.01
    # What depends on neither p nor m: the widths of the two narrow Gaussians against the prior's.
    constant = 0.5 * (precision * width**2 - math.log(precision * width**2) - 1)
    logit = torch.logit(torch.tensor([p], dtype=DOUBLE))
    ours = float(dropout_kl(logit, torch.tensor([m**2], dtype=DOUBLE), precision)) + constant
    assert ours == pytest.approx(integrated_kl(p, m, precision, width), rel=1e-6, abs=1e-6)


def test_kl_of_the_class_is_the_sum_over_groups_at_its_temperature() -> None:
    p, energy = torch.tensor([0.2, 0.6], dtype=DOUBLE), torch.tensor([3.0, 0.5], dtype=DOUBLE)
    prices = torch.tensor([0.5, 1.5])
    posterior = VariationalDropout(2, num_data=10, length_scale=8.0, initial=p, strength=4.0, prices=prices)
    each = dropout_kl(torch.logit(p), energy, 8.0)
    assert float(posterior.kl(energy)) == pytest.approx(float((each * torch.tensor([2.0, 6.0])).sum()))
    torch.testing.assert_close(posterior.penalty, torch.tensor([2.0, 6.0]) * 4.0 * (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_binary_concrete_follows_its_density(p: float) -> None:
    tau, logit = 0.2, math.log(p / (1 - p))
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, generator=generator, dtype=DOUBLE)
    eps = concrete_sample(torch.tensor(logit, dtype=DOUBLE), tau, uniform)
    # In y = logit(eps) the peaks at 0 and 1 are smooth; density by the trapezoid rule, from the formula of the paper.
    edges = torch.linspace(-60, 60, 240_001, dtype=DOUBLE)
    inner = torch.sigmoid(edges)
    odds = p / (1 - p)
    log_density = (  # Maddison et al. 2017, eq 24, in y: times eps (1 - eps)
        math.log(tau * odds)
        - tau * torch.log(inner)
        - tau * torch.nn.functional.logsigmoid(-edges)
        - 2 * torch.log(odds * inner ** (-tau) + torch.exp(-tau * torch.nn.functional.logsigmoid(-edges)))
    )
    cumulative = torch.cumulative_trapezoid(log_density.exp(), edges)
    assert float(cumulative[-1]) == pytest.approx(1.0, abs=1e-4)
    for y in (-20.0, -5.0, -1.0, 0.0, 2.0, 10.0):
        share = float((torch.logit(eps) <= y).double().mean())
        at = int(((edges <= y).sum()) - 2)
        assert share == pytest.approx(float(cumulative[at]), abs=5 * 0.5 / 200_000**0.5)
    # The function of the package is the same density.
    inside = edges.abs() < 30
    at = inner[inside]
    ours = concrete_log_density(at, torch.tensor(logit, dtype=DOUBLE), tau) + torch.log(at * (1 - at))
    torch.testing.assert_close(ours, log_density[inside], rtol=1e-6, atol=1e-3)
    # Rounded, it is the Bernoulli distribution of p.
    assert float((eps > 0.5).double().mean()) == pytest.approx(p, abs=5 * 0.5 / 200_000**0.5)


def test_the_law_is_that_of_the_printed_double_logarithms() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(2, 400_000, generator=generator, dtype=DOUBLE)
    printed = torch.sigmoid(((-u[0].log()).log() - (-u[1].log()).log() + math.log(0.1 / 0.9)) / 0.2)
    ours = concrete_sample(torch.tensor(math.log(0.1 / 0.9), dtype=DOUBLE), 0.2, u[0])
    for x in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert float((printed <= x).double().mean()) == pytest.approx(
            float((ours <= x).double().mean()), abs=0.003
        )


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.02, 0.1, 0.5, 0.9], dtype=DOUBLE)
    posterior = VariationalDropout(4, num_data=10, initial=p, strength=7.0)
    generator = torch.Generator().manual_seed(3)
    num = 20_000
    hard = torch.stack([posterior.draw(generator) for _ in range(num)]).double().mean(0)
    soft = (torch.stack([posterior.sample(generator) for _ in range(num)]) > 0.5).double().mean(0)
    within = 4.5 * (p * (1 - p) / num).sqrt()
    assert bool(((hard - (1 - p)).abs() < within).all())
    assert bool(((soft - (1 - p)).abs() < within).all())
    torch.testing.assert_close(posterior.drop_probability, p)
    assert posterior.keep()[[0, 1, 3]].tolist() == [True, True, False]


def test_the_step_follows_the_gradient_of_the_objective() -> None:
    """The first Adam step is the sign of the gradient, which autograd finds from the relaxation and the KL."""
    generator = torch.Generator().manual_seed(5)
    p = torch.rand(6, generator=generator, dtype=DOUBLE)
    energy = torch.rand(6, generator=generator, dtype=DOUBLE)
    weight = torch.randn(6, generator=generator, dtype=DOUBLE)
    posterior = VariationalDropout(6, num_data=20, length_scale=30.0, initial=p, lr=0.01, strength=2.0)
    uniform = torch.rand(3, 6, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    z = posterior.sample(torch.Generator().manual_seed(9), num_images=3)
    logits = torch.logit(p).requires_grad_()
    switches = 1 - torch.sigmoid((logits - torch.logit(uniform)) / 0.2)
    torch.testing.assert_close(z, switches.detach())
    loss = (switches @ weight).square().mean() + 2.0 * dropout_kl(logits, energy, 30.0).sum() / 20
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    data = (switches @ weight).square().mean()
    (gradient,) = torch.autograd.grad(data, switches)
    posterior.update_(z, gradient, energy)
    state = posterior.state_dict()
    torch.testing.assert_close(state["first"], 0.1 * expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state["logits"], torch.logit(p) - 0.01 * expected.sign(), rtol=1e-6, atol=1e-9)


def test_the_rest_point_is_what_a_group_saves_less_what_it_costs() -> None:
    """With a linear loss the gradient does not depend on the draw, and the log-odds have a closed form."""
    saved = torch.tensor([3.0, 2.0, 0.5], dtype=DOUBLE)  # nats of the whole data set
    energy = torch.tensor([0.2, 0.1, 0.3], dtype=DOUBLE)
    posterior = VariationalDropout(3, num_data=50, length_scale=10.0, tau=0.5, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        z = posterior.sample(generator, num_images=128)
        posterior.update_(z, (-saved / 50 / 128).expand_as(z), energy)
    # The relaxed switch is z, whose mean differs from 1 - p; integrate d E[z]/d logit for the exact rest point.
    u = torch.linspace(0, 1, 200_003, dtype=DOUBLE)[1:-1]

    def slope(logit: Tensor) -> Tensor:
        z = 1 - concrete_sample(logit, 0.5, u)
        p = torch.sigmoid(logit)
        return (z * (1 - z) / 0.5).mean() / (p * (1 - p))

    kept = -posterior.state_dict()["logits"]
    factor = torch.stack([slope(-value) for value in kept])
    torch.testing.assert_close(kept, saved * factor - 5.0 * energy, rtol=0.0, atol=0.25)
    assert kept.argsort().tolist() == [2, 1, 0]


def test_useless_groups_go_and_only_adaptive_decay_lets_them() -> None:
    def trained(adaptive: bool) -> Tensor:
        posterior = VariationalDropout(2, num_data=100, lr=0.1, adaptive=adaptive)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            z = posterior.sample(generator)
            posterior.update_(z, torch.tensor([-1.0, 0.0], dtype=DOUBLE), torch.ones(2))
        return posterior.drop_probability

    adaptive, constant = trained(True), trained(False)
    assert float(adaptive[0]) < 0.01 and float(adaptive[1]) > 0.99
    assert float(constant[1]) == pytest.approx(0.5, abs=0.05)  # only the entropy speaks


def test_groups_that_share_a_probability_have_their_own_masks() -> None:
    posterior = VariationalDropout(5, num_data=10, shared=torch.tensor([0, 0, 1, 1, 1]), lr=0.5)
    posterior.update_(torch.full((5,), 0.5), torch.tensor([1.0, -3.0, 0.0, 0.0, 1.0]))
    p = posterior.drop_probability
    assert float(p[0]) == float(p[1]) < 0.1 < float(p[2]) == float(p[4])
    draws = torch.stack([posterior.draw(torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert bool((draws[:, 0] != draws[:, 1]).any())
    assert posterior.state_dict()["logits"].shape == (2,)


def test_log_odds_stay_where_they_can_be_told_from_certainty() -> None:
    posterior = VariationalDropout(2, num_data=10, lr=15.0)
    for _ in range(5):
        posterior.update_(torch.full((2,), 0.5), torch.tensor([1.0, -1.0]))
    assert posterior.state_dict()["logits"].tolist() == [LARGEST_LOGIT, -LARGEST_LOGIT]
    assert bool(torch.isfinite(posterior.kl(torch.ones(2))))
    assert float(bernoulli_entropy(torch.tensor(0.0))) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial": 0.0}, RecipeError, "a drop probability between 0 and 1, both excluded, got 0.0"),
        ({"initial": 1.0}, RecipeError, "a drop probability between 0 and 1, both excluded, got 1.0"),
        ({"initial": torch.tensor([0.1, 1.0])}, RecipeError, "both excluded"),
        ({"initial": torch.ones(3)}, GroupingError, r"one drop probability, or 2 of them, got shape \[3\]"),
        ({"initial": math.nan}, NumericsError, "expected a finite drop probability, got nan"),
        ({"tau": 0.0}, RecipeError, "positive finite tau, got 0.0"),
        ({"length_scale": -1.0}, RecipeError, "positive finite length_scale, got -1.0"),
        ({"num_data": 0}, RecipeError, "positive finite num_data, got 0"),
        ({"shared": torch.tensor([0, 2])}, GroupingError, "without gaps"),
        ({"shared": torch.tensor([0.0, 1.0])}, GroupingError, "whole numbers"),
        ({"prices": torch.zeros(2)}, NumericsError, "positive finite prices"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VariationalDropout(2, **{"num_data": 10, **options})


def test_bad_measurements() -> None:
    posterior = VariationalDropout(2, num_data=10)
    with pytest.raises(NumericsError, match=r"expected switches within \[0, 1\]"):
        posterior.update_(torch.tensor([0.5, 1.5]), torch.ones(2))
    with pytest.raises(GroupingError, match=r"of one shape, got \[2\] and \[3, 2\]"):
        posterior.update_(torch.ones(2), torch.ones(3, 2))
    with pytest.raises(NumericsError, match="expected a squared norm >= 0, got -1"):
        posterior.update_(torch.ones(2), torch.ones(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(RunError, match="drop probabilities of 0 or 1"):
        posterior.load_state_dict({**posterior.state_dict(), "logits": torch.tensor([0.0, 50.0])})
    with pytest.raises(RunError, match=r"with tau 0\.2, got 0\.5"):
        posterior.load_state_dict({**posterior.state_dict(), "tau": 0.5})
