"""Convolutions of every geometry, called as modules and as functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.curvature import block_curvature, entry_curvature, gate_curvature, kernels
from sparsebayes.curvature.exact import ggn_diagonal
from sparsebayes.curvature.kernels import Geometry, patches
from sparsebayes.groups.rules import make_grouping

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


@pytest.mark.parametrize("kind", ["entries", "kernels", "weights", "blocks"])
def test_temporaries_are_bounded_by_the_patches_of_a_large_map(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batches = [(torch.randn(6, 2, 10, 10), torch.arange(6) % 2)]
    asked: list[int] = []

    def counted(x: Tensor, geometry: Geometry) -> Tensor:
        found = patches(x, geometry)
        asked.append(found.numel())
        return found

    monkeypatch.setattr(kernels, "patches", counted)
    # The patches of two images are 2 * 18 * 100 numbers; their gradients only 2 * 36.
    monkeypatch.setattr("sparsebayes.curvature.squares._TEMPORARY_CPU", 3600)
    if kind == "entries":
        entry_curvature(model, ["0.weight"], batches, num_data=6)
    elif kind == "blocks":
        block_curvature(model, make_grouping(model, "kernels"), batches, num_data=6)
    else:
        gate_curvature(model, make_grouping(model, kind), batches, num_data=6)
    assert sum(asked) == 6 * 1800 and max(asked) == 3600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_norm_in_half_precision_are_not_rounded_again(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(16)).eval()
    with torch.no_grad():
        for buffer in (model[0].running_mean, model[0].running_var):
            buffer.uniform_(0.5, 2.0)
    model = model.to(dtype)
    x, y = torch.randn(8, 16).to(dtype), torch.zeros(8, 16)
    # One vector per output, exact in any precision.
    options = {
        "num_data": 8,
        "likelihood": "mse",
        "factor": lambda f, _: torch.eye(16).unsqueeze(1).expand(16, 8, 16),
    }
    found = entry_curvature(model, ["0.weight"], [(x, y)], **options)["0.weight"]
    wide = entry_curvature(model.double(), ["0.weight"], [(x.double(), y.double())], **options)["0.weight"]
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)
