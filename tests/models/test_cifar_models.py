"""The networks for CIFAR have the sizes and compute the functions that the literature reports on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.cost import cost
from sparsebayes.errors import ModelError
from sparsebayes.models import build


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "params", "macs"),
    [
        # 14.7 M and 313 M; 0.85 M and 125 M; 11.17 M and 0.56 G; 0.27 M and 41 M in the literature.
        ("vgg16", {}, 14_724_042, 313_201_664),
        ("vgg16", {"num_classes": 100}, 14_724_042 + 90 * 513, 313_201_664 + 90 * 512),
        ("resnet56", {"shortcut": "A"}, 853_018, 125_485_696),
        ("resnet56", {}, 855_770, 125_747_840),
        ("resnet20", {"shortcut": "A"}, 269_722, 40_551_040),
        ("resnet18", {}, 11_173_962, 555_422_720),
    ],
)
def test_sizes_are_the_literatures(name: str, options: dict[str, object], params: int, macs: int) -> None:
    model = build(name, options)
    assert num_params(model) == params
    assert cost(model, torch.zeros(1, 3, 32, 32)).macs == macs


@pytest.mark.parametrize(
    ("name", "depth"), [("vgg16", 13), ("resnet56", 55), ("resnet20", 19), ("resnet18", 17)]
)
def test_depth_counts_the_3x3_convolutions(name: str, depth: int) -> None:
    model = build(name, {"width": 0.1})
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == depth


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in double precision and eval mode, with norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


def norm(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """Batch normalisation in eval mode, from its formula."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return x * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None]


def test_vgg16_computes_what_it_says() -> None:
    model = with_statistics(build("vgg16", {"width": 0.05, "input_size": 64}))
    x = images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for stage in model.stages:
        layers = list(stage)
        for conv, bn in zip(layers[:-1:3], layers[1:-1:3], strict=True):
            x = norm(F.conv2d(x, conv.weight, padding=1), bn).clamp(min=0)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    assert x.shape[2:] == (2, 2)
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


@pytest.mark.parametrize("option", ["A", "B"])
def test_resnet_computes_what_it_says(option: str) -> None:
    model = with_statistics(build("resnet20", {"width": 0.25, "shortcut": option}))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = norm(F.conv2d(images, model.conv1.weight, padding=1), model.bn1).clamp(min=0)
    for number, block in enumerate(block for stage in model.stages for block in stage):
        stride = 2 if number in (3, 6) else 1
        branch = norm(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1).clamp(min=0)
        branch = norm(F.conv2d(branch, block.conv2.weight, padding=1), block.bn2)
        if stride == 2 and option == "A":
            half, few = x[:, :, ::2, ::2], x.shape[1] // 2
            zeros = half.new_zeros(half.shape)[:, :few]
            x = torch.cat([zeros, half, zeros], 1)
        elif stride == 2:
            x = norm(F.conv2d(x, block.shortcut[0].weight, stride=2), block.shortcut[1])
        x = (branch + x).clamp(min=0)
    assert x.shape[1:] == (16, 8, 8)
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("vgg16", {"input_size": 28}, "vgg16 needs an input_size of at least 32 pixels, got 28"),
        ("vgg16", {"width": 0}, "width must be a number above 0 and at most 8, got 0"),
        ("resnet18", {"width": "half"}, "width must be a number above 0 and at most 8, got 'half'"),
        ("resnet56", {"width": float("nan")}, "width must be a number above 0"),
        ("resnet56", {"shortcut": "C"}, r"unknown shortcut 'C'.*Choices: A, B"),
        ("resnet20", {"num_classes": 0}, "num_classes must be a positive whole number, got 0"),
        (
            "torchvision:resnet_18",
            {},
            r"unknown torchvision classifier 'resnet_18'; did you mean 'resnet18'\?",
        ),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "is built with random weights"),
        ("torchvision:resnet18", {"classes": 3}, "model 'torchvision:resnet18'.*'classes'"),
        ("torchvision:fcn_resnet50", {}, "unknown torchvision classifier 'fcn_resnet50'"),
    ],
)
def test_every_mistake_is_answered(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        build(name, options)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_torchvision_classifiers_give_plain_logits(name: str) -> None:
    model = build(f"torchvision:{name}", {"num_classes": 7})
    assert model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_auxiliary_heads_come_where_they_are_asked_for() -> None:
    model = build("torchvision:googlenet", {"num_classes": 7, "aux_logits": True})
    assert model.aux1 is not None
