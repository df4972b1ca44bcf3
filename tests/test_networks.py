"""Copies that are refused in words, and modes that come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import trace_units
from sparsebayes.networks import copied, frozen, in_mode


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.product = model.weight * 2  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"the Linear cannot be copied \(Only Tensors created explicitly"):
        copied(model)


def test_a_memo_says_what_is_shared() -> None:
    model = nn.Linear(2, 2)
    twin = copied(model, {id(model.weight): model.weight})
    assert twin.weight is model.weight
    assert twin.bias is not model.bias


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), in_mode(model, train=False):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_every_parameter_asks_for_gradients_as_before() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("stands_in", [True, False])
def test_a_network_that_tracing_cannot_copy_is_named(stands_in: bool) -> None:
    """Tracing copies a network to put stand-ins in it, and to try a removal out."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
            self.norm = nn.MultiheadAttention(6, 2, batch_first=True) if stands_in else nn.Identity()
            self.opened = open(__file__)  # noqa: PTH123 - closed by the test

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.hidden(x)
            y = self.norm(y, y, y)[0] if stands_in else y * (1.0 / y.shape[-1])
            return self.out(y)

    model = Net()
    try:
        with pytest.raises(ModelError, match=r"the Net cannot be copied .*open files"):
            trace_units(model, torch.zeros(2, 3, 4))
    finally:
        model.opened.close()
