"""Learning-rate cycle and random streams."""

from __future__ import annotations

import itertools

import pytest

from sparsebayes.train.schedule import one_cycle
from sparsebayes.train.seeding import derive_seed


def test_cycle_rises_to_one_then_falls_to_zero() -> None:
    factors = [one_cycle(step, 100, warmup=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(factors) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert 0 < factors[-1] < 1e-3


def test_cycle_of_one_step_and_without_warmup() -> None:
    assert one_cycle(0, 1) == 1.0
    assert one_cycle(0, 10, warmup=0.0) == 1.0


def test_streams_are_stable_and_apart() -> None:
    seeds = {derive_seed(s, name, k) for s in range(3) for name in ("a", "b") for k in range(10)}
    assert len(seeds) == 60
    assert derive_seed(0, "a", 12) != derive_seed(0, "a1", 2)
    assert derive_seed(0, "pretrain", "epoch", 0) == derive_seed(0, "pretrain", "epoch", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
