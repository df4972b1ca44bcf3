"""The procedural shapes: deterministic, balanced, and neither trivial nor hopeless."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.data import load
from sparsebayes.data.shapes import CLASSES, make_shapes
from sparsebayes.errors import DataError


def test_the_seed_decides_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (make_shapes(num_train=30, num_test=10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_named_set_is_balanced_and_normalised() -> None:
    dataset = load("shapes")
    assert dataset.train.images.shape == (5000, 3, 32, 32)
    assert dataset.test.images.shape == (1000, 3, 32, 32)
    assert torch.bincount(dataset.train.labels).tolist() == [500] * len(CLASSES)
    pixels = dataset.train.images.double() / 255
    for channel in range(3):
        assert float(pixels[:, channel].mean()) == pytest.approx(dataset.mean[channel], abs=1e-9)
        assert float(pixels[:, channel].std()) == pytest.approx(dataset.std[channel], abs=1e-9)


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match="at least one image in each part, got 10 and 0"):
        make_shapes(num_train=10, num_test=0)


def error(model: nn.Module, steps: int, lr: float) -> float:
    """Test error after a short training."""
    dataset = make_shapes(num_train=2000, num_test=500, seed=1)

    def normal(images: Tensor) -> Tensor:
        return images.float() / 128 - 1

    optimizer = torch.optim.Adam(model.parameters(), lr)
    x, y = normal(dataset.train.images), dataset.train.labels
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (100,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    predicted = model.eval()(normal(dataset.test.images)).argmax(1)
    return float((predicted != dataset.test.labels).double().mean())


def test_a_linear_classifier_does_poorly_and_a_small_network_well() -> None:
    assert error(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 100, 1e-3) > 0.6
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    assert error(network, 150, 5e-3) < 0.35
