"""Natural-gradient inference: exact posteriors of Gaussian-linear models, the printed formulas, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, RecipeError, RunError
from sparsebayes.inference import NaturalGradient

DOUBLE = torch.float64


def linear_model(seed: int, num_data: int, num_groups: int) -> tuple[Tensor, Tensor]:
    """Orthogonal inputs, so that the exact posterior is a product; residuals of the targets are +-1: noise 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(2, (num_data, 1), generator=generator).double() * 2 - 1
    columns = torch.randn(num_data, num_groups, generator=generator, dtype=DOUBLE)
    x = torch.linalg.qr(torch.cat([noise, columns], 1))[0][:, 1:]
    x = x * torch.linspace(15, 40, num_groups, dtype=DOUBLE)
    return x, x @ torch.linspace(-2, 2, num_groups, dtype=DOUBLE) + noise[:, 0]


@pytest.mark.parametrize(
    ("update", "batch"), [("vadam", "images"), ("vadam", "one"), ("vadam", "counted"), ("ivon", "mean")]
)
def test_converges_to_the_exact_posterior_of_a_gaussian_linear_model(update: str, batch: str) -> None:
    num_data, size, prior = 500, 4, 20.0
    x, y = linear_model(0, num_data, size)
    precision = x.square().sum(0) + prior  # the noise has variance 1
    mean = (x.T @ y) / precision
    posterior = NaturalGradient(
        size,
        num_data=num_data,
        update=update,
        mean=0.0,
        prior_precision=prior,
        initial_precision=200.0,
        betas=(0.9, 0.999 if update == "vadam" else 0.9995),
    )
    generator = torch.Generator().manual_seed(1)
    # Counting the square of a mean B times adds the draws' own spread, 1 + B/N: keep that small.
    num_steps, images = {"one": (12000, 1), "counted": (10000, 5)}.get(batch, (9000, 50))
    means, curvatures = [], []
    for step in range(num_steps):
        lr = 0.03 * (1 - step / num_steps) ** 2 + 1e-4
        z = posterior.sample(generator)
        pick = torch.randint(num_data, (images,), generator=generator)
        parts = (x[pick] @ z - y[pick])[:, None] * x[pick] / images
        if batch == "images":
            posterior.update_(z, parts, lr=lr)
        else:
            posterior.update_(z, parts.sum(0), lr=lr, num_images=images if batch == "counted" else 1)
        if step >= 2 * num_steps // 3:
            means.append(posterior.mean)
            curvatures.append(posterior.precision)
    # Averaged over the last third: a step size that does not vanish leaves noise about the rest point.
    spread = precision.rsqrt()
    found = torch.stack(means).mean(0)
    assert float(((found - mean).abs() / spread).max()) < 0.35  # a fraction of the posterior's own width
    ratio = torch.stack(curvatures).mean(0) / precision
    # Squared gradients at draws hold the draws' own spread too: 1 + (sum of x^2 var)/noise, a few thousandths here.
    assert ratio.tolist() == pytest.approx([1.0] * size, abs=0.12)


def test_the_square_of_a_mean_understates_the_curvature() -> None:
    x, y = linear_model(0, 2000, 3)
    posterior = NaturalGradient(3, num_data=2000, mean=torch.linspace(-2, 2, 3, dtype=DOUBLE), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3000):
        z = posterior.sample(generator)
        pick = torch.randint(2000, (50,), generator=generator)
        posterior.update_(z, ((x[pick] @ z - y[pick])[:, None] * x[pick]).mean(0))
    ratio = posterior.curvature / x.square().sum(0)
    assert bool((ratio < 0.2).all())  # about 1/50, and what is left of the start


def test_vadam_is_the_printed_algorithm() -> None:
    """A loop over plain numbers, written from the paper's equations."""
    posterior = NaturalGradient(
        1, num_data=40, mean=0.3, prior_precision=2.0, initial_precision=6.0, lr=0.05, strength=2.0
    )
    count, delta = 20.0, 2.0
    mu, m, s, v = 0.3, 0.0, (6.0 - 2.0) / count, 0.0
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for step in range(1, 7):
        z = posterior.sample(generator)
        assert float(z) == pytest.approx(mu + float(noises[step - 1]) / (count * s + delta) ** 0.5)
        g = float(z) ** 3
        posterior.update_(z, torch.tensor([g], dtype=DOUBLE))
        m = 0.9 * m + 0.1 * (g + delta / count * mu)
        s, v = 0.999 * s + 0.001 * g**2, 0.999 * v + 0.001 * g**2
        mu -= 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)) ** 0.5 + delta / count)
        assert float(posterior.mean) == pytest.approx(mu)
        assert float(posterior.precision) == pytest.approx(count * s + delta)


def test_the_first_step_of_vadam_does_not_depend_on_the_initial_precision() -> None:
    """With one gradient both corrected averages are that gradient, whatever the noise began with."""
    steps = []
    for initial in (2.0, 1e4):
        posterior = NaturalGradient(
            1, num_data=1000, mean=0.0, prior_precision=1.0, initial_precision=initial, lr=0.05
        )
        posterior.update_(torch.zeros(1), torch.tensor([0.2]))
        steps.append(float(posterior.mean))
    assert steps == pytest.approx([-0.05 * 0.2 / (0.2 + 1 / 1000)] * 2)


def test_ivon_is_the_printed_algorithm() -> None:
    posterior = NaturalGradient(
        1, num_data=40, update="ivon", mean=0.3, prior_precision=2.0, initial_precision=6.0, lr=0.05
    )
    ess, decay = 40.0, 2.0 / 40
    mu, m, h = 0.3, 0.0, 4.0 / 40
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 7):
        z = posterior.sample(generator)
        eps = (float(z) - mu) * (ess * (h + decay)) ** 0.5
        g = float(z) ** 3
        posterior.update_(z, torch.tensor([g], dtype=DOUBLE))
        f = eps * g * (h + decay) ** 0.5 * ess**0.5
        m = 0.9 * m + 0.1 * g
        h = 0.999 * h + 0.001 * f + 0.5 * 0.001**2 * (h - f) ** 2 / (h + decay)
        mu -= 0.05 * (m / (1 - 0.9**step) + decay * mu) / (h + decay)
        assert float(posterior.mean) == pytest.approx(mu)
        assert float(posterior.curvature) == pytest.approx(ess * h)


def test_ivon_keeps_precisions_positive() -> None:
    posterior = NaturalGradient(3, num_data=10, update="ivon", betas=(0.9, 0.5), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    below = False
    for _ in range(30):
        z = posterior.sample(generator)
        posterior.update_(z, -0.1 * z, lr=1e-3)  # a loss that bends the wrong way
        assert bool((posterior.precision > 0).all()) and bool((posterior.survives() >= 0).all())
        below |= bool((posterior.curvature < 0).any())
    assert below
    again = NaturalGradient(3, num_data=10, update="ivon", betas=(0.9, 0.5), lr=0.1)
    again.load_state_dict(posterior.state_dict())
    assert torch.equal(again.precision, posterior.precision)


def test_evidence_is_that_of_the_laplace_rule_at_the_learned_curvature() -> None:
    prices = torch.tensor([0.5, 1.5])
    posterior = NaturalGradient(2, num_data=100, strength=3.0, prices=prices, initial_precision=10.0)
    torch.testing.assert_close(posterior.curvature, torch.tensor([1.5, 4.5], dtype=DOUBLE) * 9.0)
    torch.testing.assert_close(posterior.evidence, torch.full((2,), 9.0, dtype=DOUBLE))
    torch.testing.assert_close(posterior.survives(), 3.0 * posterior.evidence)
    torch.testing.assert_close(posterior.relevance, torch.full((2,), 1 - 1 / 9, dtype=DOUBLE))
    torch.testing.assert_close(posterior.penalty, torch.tensor([0.75, 2.25], dtype=DOUBLE))
    assert posterior.noise == pytest.approx(10.0**-0.5)
    assert posterior.curvature_trace == pytest.approx(54.0)


def test_draws_have_mean_and_variance_of_the_posterior() -> None:
    posterior = NaturalGradient(1, num_data=100, mean=0.5, initial_precision=16.0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([posterior.sample(generator) for _ in range(20_000)])
    assert float(draws.mean()) == pytest.approx(0.5, abs=5 * 0.25 / 20_000**0.5)
    assert float(draws.std()) == pytest.approx(0.25, rel=0.03)
    # survives > T at a draw iff z^2 h > T: h = 15.
    on = torch.stack([posterior.draw(generator) for _ in range(20_000)]).double().mean()
    assert float(on) == pytest.approx(float((draws.square() * 15 > 1).double().mean()), abs=0.02)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior_precision": 0.0}, RecipeError, "positive finite prior precision, got 0.0"),
        ({"prior_precision": -1.0}, RecipeError, "positive finite prior precision, got -1.0"),
        ({"initial_precision": 0.0}, RecipeError, "positive finite initial precision, got 0.0"),
        ({"initial_precision": 0.5}, RecipeError, "at least the prior precision 1.0, got 0.5"),
        ({"update": "vogn"}, RecipeError, "unknown update 'vogn'"),
        ({"betas": (0.9, 1.0)}, RecipeError, r"decay rates in \[0, 1\), got \(0.9, 1.0\)"),
        ({"mean": torch.ones(3)}, GroupingError, r"one mean, or 2 of them, got shape \[3\]"),
        ({"num_data": 0}, RecipeError, "positive finite num_data, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NaturalGradient(2, **{"num_data": 10, **options})


def test_bad_measurements_and_states() -> None:
    posterior = NaturalGradient(2, num_data=10)
    with pytest.raises(
        GroupingError, match=r"one draw of the switches for the whole batch, got shape \[3, 2\]"
    ):
        posterior.update_(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(RecipeError, match="positive finite number of images, got 0"):
        posterior.update_(torch.ones(2), torch.ones(2), num_images=0)
    with pytest.raises(RunError, match="with positive precisions, got others"):
        posterior.load_state_dict({**posterior.state_dict(), "curvature": torch.full((2,), -5.0)})
    with pytest.raises(RunError, match="with update 'vadam', got 'ivon'"):
        posterior.load_state_dict({**posterior.state_dict(), "update": "ivon"})
