"""The layout that networks train in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.train.objective import fast_layout_


def is_last(layer: nn.Conv2d) -> bool:
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_are_stored_channels_last_and_compute_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1, 2))
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fast_layout_(model)
    assert is_last(model[0])
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [4, 5, 7])
def test_a_strided_pointwise_convolution_of_few_channels_keeps_the_ordinary_layout(channels):
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, 2))
    for layer in model:
        layer.to(memory_format=torch.channels_last)
    fast_layout_(model)
    assert model[0].weight.is_contiguous()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert bool(model[0].weight.grad.isfinite().all())
