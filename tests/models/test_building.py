"""Models by name, and by the user's own function."""

from __future__ import annotations

import pytest
from torch import nn

from sparsebayes.errors import ModelError
from sparsebayes.models import MODELS, build


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_builds_with_the_common_options(name: str) -> None:
    options = {"in_channels": 3, "num_classes": 4, "input_size": 32}
    model = build(name, options)
    assert isinstance(model, nn.Module)
    assert model.training
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features == 4


def test_a_function_of_the_user() -> None:
    model = build("torch.nn:Linear", {"in_features": 3, "out_features": 4})
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "lenet5_cafe",
            {},
            r"unknown model 'lenet5_cafe'; did you mean 'lenet5_caffe'\? Choices: .*, or your own as",
        ),
        (
            "lenet5_caffe",
            {"classes": 3},
            r"unexpected keyword argument 'classes'; .* takes: in_channels, num_classes",
        ),
        ("lenet5_caffe", {"num_classes": 0}, "num_classes must be a positive whole number"),
        ("torch.nn:Linear", {"in_features": 3}, "missing a required argument: 'out_features'"),
        ("torch.nn:Conv7d", {}, "module 'torch.nn' has no function or class 'Conv7d'"),
        ("no_such_module:net", {}, "module 'no_such_module' cannot be imported"),
        (
            "torch.nn:Conv2d",
            {"in_channels": 1, "out_channels": 3, "kernel_size": 3, "groups": 2},
            "failed with opt",
        ),
        ("builtins:dict", {}, "model 'builtins:dict' is no builder of networks; name a subclass of"),
        ("os:getcwd", {}, "model 'os:getcwd' is no builder of networks"),
        ("torch.utils.data:TensorDataset", {}, "is no builder of networks"),
        ("numpy:prod", {"a": [1.0]}, "must return a torch.nn.Module, got float64"),
    ],
)
def test_every_mistake_is_answered(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        build(name, options)
