"""Searches by natural gradients and by variational dropout: planted operations are found, and states resume."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from sparsebayes.errors import RunError
from sparsebayes.inference import NaturalGradient, VariationalDropout
from sparsebayes.nas import SPACES
from sparsebayes.nas.methods import Method, Options
from sparsebayes.nas.posteriors import DropoutSearch, NaturalGradientSearch
from sparsebayes.nas.switches import SwitchTable

(CELL,) = SPACES["nas_bench_201"].cells
TABLE = SwitchTable.of(SPACES["nas_bench_201"], depth=2)
OPTIONS = Options(num_data=500, strength=1.0)
GOOD = torch.tensor([switch.op == "nor_conv_3x3" for switch in TABLE.groups])


def natural() -> NaturalGradientSearch:
    posterior = NaturalGradient(
        TABLE.num_groups, num_data=500, mean=0.0, initial_precision=10.0, lr=0.05, betas=(0.9, 0.99)
    )
    return NaturalGradientSearch(TABLE, OPTIONS, posterior)


def dropout() -> DropoutSearch:
    posterior = VariationalDropout(len(TABLE.group), num_data=500, shared=TABLE.group, lr=0.1)
    return DropoutSearch(TABLE, OPTIONS, posterior)


def train(method: Method, generator: Generator, steps: int) -> None:
    """Steps in which every switch of a good operation lowers the loss, and no other does."""
    switches = torch.ones(len(TABLE.group))
    gradient = torch.where(GOOD[TABLE.group], -0.5, 0.0)
    for _ in range(steps):
        values = method.sample(switches, generator)
        assert values.shape == switches.shape and values.dtype == switches.dtype
        method.learn_(gradient)


@pytest.mark.parametrize("make", [natural, dropout])
def test_planted_operations_are_found(make) -> None:
    method = make()
    train(method, Generator().manual_seed(0), 150)
    scores = method.scores()
    assert scores.shape == (TABLE.num_groups,) and scores.dtype == torch.float64
    assert float(scores[GOOD].min()) > float(scores[~GOOD].max())
    mean = method.mean(torch.ones(len(TABLE.group)))
    assert mean.tolist() == pytest.approx(scores[TABLE.group].tolist())


def test_dropout_keeps_what_is_needed() -> None:
    method = dropout()
    train(method, Generator().manual_seed(0), 150)
    assert torch.equal(method.keep(), GOOD)


def test_logits_learn_through_the_softmax() -> None:
    method = natural()
    switches = torch.ones(len(TABLE.group))
    method.sample(switches, Generator().manual_seed(4))
    logits = method.posterior.sample(Generator().manual_seed(4)).requires_grad_()
    gradient = torch.randn(len(TABLE.group), generator=Generator().manual_seed(1), dtype=torch.float64)
    edges = [switch.edge for switch in TABLE.groups]
    mixture = torch.zeros_like(logits)
    for edge in set(edges):
        members = torch.tensor([number for number, at in enumerate(edges) if at == edge])
        mixture = mixture.index_put((members,), torch.softmax(logits[members], 0))
    (expected,) = torch.autograd.grad(mixture[TABLE.group], logits, gradient)
    method.learn_(gradient)
    assert method.posterior.num_updates == 1
    torch.testing.assert_close(method.posterior.state_dict()["momentum"], 0.1 * expected)


@pytest.mark.parametrize("make", [natural, dropout])
def test_a_resumed_search_goes_on_to_the_same_numbers(make) -> None:
    method, generator = make(), Generator().manual_seed(1)
    train(method, generator, 5)
    resumed, again = make(), Generator()
    resumed.load_state_dict(method.state_dict())
    again.set_state(generator.get_state())
    train(method, generator, 5)
    train(resumed, again, 5)
    assert torch.equal(method.scores(), resumed.scores())


def test_draws_of_logits_are_all_on_and_differ() -> None:
    method = natural()
    generator = Generator().manual_seed(0)
    (on, scores), (_, others) = method.draw(generator), method.draw(generator)
    assert bool(on.all()) and not torch.equal(scores, others)
    expected = TABLE.softmax(method.posterior.sample(Generator().manual_seed(0)))
    assert torch.equal(scores, expected)


def test_draws_of_operations_are_as_frequent_as_they_are_kept() -> None:
    kept = torch.linspace(0.1, 0.9, TABLE.num_groups, dtype=torch.float64)
    posterior = VariationalDropout(len(TABLE.group), num_data=500, shared=TABLE.group, initial=1 - kept)
    method = DropoutSearch(TABLE, OPTIONS, posterior)
    generator = Generator().manual_seed(0)
    drawn = [method.draw(generator) for _ in range(4000)]
    from_inputs = torch.tensor([CELL.edges[switch.edge].source == 0 for switch in TABLE.groups])
    frequency = torch.stack([on for on, _ in drawn]).double().mean(0)
    # 4 standard errors of a frequency; what leaves an inner node needs one of its predecessors besides.
    assert float((frequency - kept)[from_inputs].abs().max()) < 4 * 0.5 / 4000**0.5
    assert float((frequency - kept).max()) < 4 * 0.5 / 4000**0.5
    on, odds = drawn[0]
    assert bool((odds[on] > OPTIONS.strength).all())


def test_weights_decay_by_the_probability_of_being_kept() -> None:
    method = dropout()
    train(method, Generator().manual_seed(0), 60)
    shares = method.decay_shares()
    assert shares is not None and torch.equal(shares, method.posterior.relevance[method._first])
    constant = VariationalDropout(len(TABLE.group), num_data=500, shared=TABLE.group, adaptive=False)
    assert DropoutSearch(TABLE, OPTIONS, constant).decay_shares() is None
    assert natural().decay_shares() is None


def test_a_gradient_counts_for_the_images_that_it_averages() -> None:
    switches, gradient = torch.ones(len(TABLE.group)), torch.randn(len(TABLE.group))
    grown = []
    for num_images in (1, 16):
        method = natural()
        before = method.posterior.curvature
        method.sample(switches, Generator().manual_seed(0))
        method.learn_(gradient, num_images)
        grown.append(method.posterior.curvature - 0.99 * before)
    torch.testing.assert_close(grown[1], 16 * grown[0])


def test_every_image_has_masks_of_its_own() -> None:
    method = dropout()
    values = method.sample(torch.ones(len(TABLE.group)), Generator().manual_seed(0), 5)
    assert values.shape == (5, len(TABLE.group))
    assert not torch.equal(values[0], values[1])
    gradient = torch.where(GOOD[TABLE.group], -0.1, 0.0).expand(5, -1)
    before = method.scores()
    method.learn_(gradient, 5)
    assert method.posterior.num_updates == 1
    assert bool((method.scores()[GOOD] > before[GOOD]).all())


def test_logits_begin_as_the_seed_says() -> None:
    means = [
        NaturalGradientSearch(TABLE, Options(num_data=500, strength=1.0, seed=seed)).posterior.mean
        for seed in (0, 0, 1)
    ]
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


@pytest.mark.parametrize("make", [natural, dropout])
def test_a_gradient_without_a_sample_is_refused(make) -> None:
    with pytest.raises(RunError, match="call sample first"):
        make().learn_(torch.ones(len(TABLE.group)))
