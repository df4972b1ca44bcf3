"""Convolutions of every geometry, called as modules and as functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.curvature import entry_curvature
from sparsebayes.curvature.exact import ggn_diagonal
from sparsebayes.curvature.kernels import Geometry, patches

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
GEOMETRIES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((3,), {"stride": 2, "padding": 1}),
    ((2,), {"padding": (1,), "dilation": [2], "groups": 2}),
    ((2, 3), {"stride": (1, 2), "padding": (0, 1)}),
    ((2, 3), {"stride": [2], "padding": (1,), "dilation": (1,)}),
    ((3, 2), {"padding": "same"}),
    ((4, 1), {"padding": "same", "dilation": (1, 2)}),
    ((2, 2), {"padding": "valid", "stride": 2, "groups": 4}),
    ((3, 3), {"padding": 2, "dilation": 2, "groups": 2}),
    ((1, 2, 2), {"stride": (1, 2, 1), "padding": (0, 1, 0), "groups": 2}),
]


class Functional(nn.Module):
    """A convolution that is called as a function, with its options by name."""

    def __init__(self, kernel: tuple[int, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4 // options.get("groups", 1), *kernel))
        self.bias = nn.Parameter(torch.randn(4))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        run = CONVOLUTIONS[x.ndim - 3]
        return run(input=x, weight=self.weight, bias=self.bias, **self.options).tanh().flatten(2).sum(-1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("kernel", "options"), GEOMETRIES)
def test_diagonal_of_a_convolution_equals_the_oracle(
    kernel: tuple[int, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = Functional(kernel, options).double()
    x, y = torch.randn(3, 4, *(6, 5, 4)[: len(kernel)]).double(), torch.tensor([0, 3, 1])
    found = entry_curvature(model, ["weight", "bias"], [(x, y)], num_data=3, estimator="exact")
    expected = ggn_diagonal(model, ["weight", "bias"], x, y)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-10 * float(values.max()))


def test_patches_are_those_of_unfold() -> None:
    x = torch.randn(2, 3, 7, 6).to(memory_format=torch.channels_last)
    found = patches(x, Geometry((1, 3, 3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2), 1))
    expected = functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    assert torch.equal(found, expected)
    part = patches(
        x[1:], Geometry((1, 3, 3, 2), (2, 1), ((0, 0), (0, 0)), (1, 1), 1)
    )  # a view that starts inside its storage
    assert torch.equal(part, functional.unfold(x[1:], (3, 2), stride=(2, 1)))
