"""Compaction of networks that share weights, or use them in ways of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import Slice, UnitGraph
from sparsebayes.prune.compaction import compact
from sparsebayes.prune.gather import GatheredLinear

IMAGE = torch.randn(3, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_equals_masked(model: nn.Module, masks: dict[str, Tensor], small: nn.Module, x: Tensor) -> None:
    """Compare with the masked network, made without any of the code under test."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-10)


def test_shared_weights_are_cut_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(100, 6), nn.Linear(100, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(torch.relu(self.a(x)) * torch.tanh(self.b(x.flip(1))))

    model = Shared().double()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    masks["head.weight"][:, [1, 4]] = False
    masks["a.weight"][:, 10:] = False
    result = compact(model, masks, IMAGE)
    small = result.model
    assert small.a.weight is small.b.weight and small.a.weight.shape == (4, 10)
    assert isinstance(small.a, GatheredLinear) and isinstance(small.b, GatheredLinear)
    assert_equals_masked(model, masks, small, IMAGE)
    again = {"a.weight": torch.ones(4, 10, dtype=torch.bool)}
    again["a.weight"][:, 3] = False
    twice = compact(small, again, IMAGE).model
    assert twice.a.weight is twice.b.weight and twice.a.weight.shape == (4, 9)
    assert_equals_masked(small, again, twice, IMAGE)


def test_a_linear_layer_that_is_not_called_keeps_its_columns() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(100, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.flatten(1), self.fc.weight, self.fc.bias)

    model = Functional().double()
    masks = {"fc.weight": torch.ones(4, 100, dtype=torch.bool)}
    masks["fc.weight"][:, 50:] = False
    result = compact(model, masks, IMAGE)
    assert type(result.model.fc) is nn.Linear and result.model.fc.weight.shape == (4, 100)
    assert set(result.masks) == {"fc.weight"}
    assert_equals_masked(model, masks, result.model, IMAGE)


def test_a_weight_shared_with_an_embedding_keeps_its_columns() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(9, 5), nn.LayerNorm(5), nn.Linear(5, 9)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(tokens)))

    model, tokens = Language().double(), torch.arange(8).view(2, 4)
    masks = {"embedding.weight": torch.ones(9, 5, dtype=torch.bool)}
    masks["embedding.weight"][:, 2] = False
    result = compact(model, masks, tokens)
    assert result.model.head.weight is result.model.embedding.weight
    assert result.model.head.weight.shape == (9, 5) and set(result.masks) == {"embedding.weight"}
    assert_equals_masked(model, masks, result.model, tokens)


def test_a_bare_layer_keeps_its_columns() -> None:
    model = nn.Linear(10, 4).double()
    masks = {"weight": torch.ones(4, 10, dtype=torch.bool)}
    masks["weight"][:, 5:] = False
    result = compact(model, masks, IMAGE)
    assert result.model.weight.shape == (4, 10)


def test_a_size_written_into_the_model_is_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(256, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).view(len(x), 256))

    units = torch.arange(4)
    graph = UnitGraph(
        (Slice("conv.weight", 0, units, False), Slice("conv.bias", 0, units, False),
         Slice("fc.weight", 1, units.repeat_interleave(64), True)),
        ("conv",), torch.zeros(4, dtype=torch.int64), (), (), torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    masks = {"fc.weight": (units.repeat_interleave(64) > 0).expand(2, 256).contiguous()}
    with pytest.raises(
        ModelError, match=r"shape '\[3, 256\]' is invalid .*the model holds a size as a constant"
    ):
        compact(Fixed().double(), masks, IMAGE, units=graph)
