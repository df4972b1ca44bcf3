"""The two LeNets have the shapes that the literature reports on."""

from __future__ import annotations

import pytest
import torch

from sparsebayes.errors import ModelError
from sparsebayes.models import LeNet5Caffe, LeNet300100


def test_lenet_300_100_is_the_literatures() -> None:
    model = LeNet300100()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(shapes) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]
    assert shapes["fc1.weight"] == (300, 784)
    assert sum(parameter.numel() for parameter in model.parameters()) == 266_610


def test_lenet5_caffe_is_the_literatures() -> None:
    model = LeNet5Caffe()
    shapes = [
        tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")
    ]
    assert shapes == [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    assert sum(parameter.numel() for parameter in model.parameters()) == 431_080


def test_lenet_300_100_computes_what_it_says() -> None:
    model = LeNet300100(in_channels=2, num_classes=3, input_size=4).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    hidden = (x.reshape(5, 32) @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    hidden = (hidden @ model.fc2.weight.T + model.fc2.bias).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ model.fc3.weight.T + model.fc3.bias)


def test_lenet5_caffe_computes_what_it_says() -> None:
    model = LeNet5Caffe().double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    for conv in (model.conv1, model.conv2):
        patches = x.unfold(2, 5, 1).unfold(3, 5, 1)  # [B, C, H, W, 5, 5]
        x = torch.einsum("bchwij,ocij->bohw", patches, conv.weight) + conv.bias[:, None, None]
        x = x.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    hidden = (x.reshape(2, 800) @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    expected = hidden @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(torch.randn(0, 1, 28, 28).double()), expected[:0])
    torch.manual_seed(0)
    model_again = LeNet5Caffe().double()
    torch.testing.assert_close(model_again(torch.randn(2, 1, 28, 28, dtype=torch.float64)), expected)


@pytest.mark.parametrize("size", [16, 17, 32])
def test_lenet5_caffe_takes_other_sizes(size: int) -> None:
    assert LeNet5Caffe(in_channels=3, num_classes=7, input_size=size)(
        torch.zeros(2, 3, size, size)
    ).shape == (2, 7)


def test_lenet5_caffe_refuses_images_that_vanish() -> None:
    with pytest.raises(
        ModelError, match="needs an input_size of at least 16 pixels, got 15; use larger images"
    ):
        LeNet5Caffe(input_size=15)


@pytest.mark.parametrize("model", [LeNet5Caffe, LeNet300100])
@pytest.mark.parametrize("option", ["in_channels", "num_classes", "input_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "ten", True])
def test_refuses_sizes_that_are_none(model: type[LeNet5Caffe], option: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"{option} must be a positive whole number, got {value!r}"):
        model(**{option: value})
