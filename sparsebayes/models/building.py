"""A model from its name, from torchvision's, or from the user's own function.

>>> build("lenet_300_100", {"num_classes": 2}).fc3.out_features
2
>>> build("torch.nn:Linear", {"in_features": 3, "out_features": 4})
Linear(in_features=3, out_features=4, bias=True)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sparsebayes.errors import ModelError, unknown
from sparsebayes.models.lenet import LeNet5Caffe, LeNet300100
from sparsebayes.models.resnet import resnet18, resnet20, resnet56
from sparsebayes.models.torchvision_models import PREFIX, build_classifier
from sparsebayes.models.vgg import VGG16
from sparsebayes.user_code import call_function, load_function

__all__ = ["MODELS", "build"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": LeNet300100,
    "lenet5_caffe": LeNet5Caffe,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg16": VGG16,
}


def build(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network with fresh random weights (from PyTorch's global generator, as its layers draw them).

    Args:
        name: a key of `MODELS`; "torchvision:NAME" for a classifier of torchvision; or "package.module:function"
            for the user's own builder.
        options: keyword arguments of the builder, for example `{"num_classes": 10}`.

    Returns:
        The network, as its builder leaves it: in training mode, on the CPU.

    Raises:
        ModelError: unknown name; module or function not found, or not made to build networks; an option that the
            builder does not take, or lacks; the builder fails, or returns something that is not an `nn.Module`.
    """
    if name.startswith(PREFIX):
        return build_classifier(name.removeprefix(PREFIX), dict(options or {}))
    if ":" in name:
        builder = load_function("model", name, ModelError)
        _refuse_other_code(name, builder)
    elif name in MODELS:
        builder = MODELS[name]
    else:
        raise ModelError(
            f"{unknown('model', name, MODELS)}, 'torchvision:NAME', or your own as 'package.module:function'"
        )
    model = call_function("model", name, builder, dict(options or {}), ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _refuse_other_code(name: str, builder: Callable[..., Any]) -> None:
    """Refuse what cannot be a builder before it is called: a saved network may come from anybody."""
    roots = {name.partition(":")[0].partition(".")[0]}
    if inspect.isroutine(builder) or isinstance(builder, type):  # also where another module has imported it
        roots.add(str(builder.__module__ or "").partition(".")[0])
    is_other_class = isinstance(builder, type) and not issubclass(builder, nn.Module)
    if is_other_class or roots & sys.stdlib_module_names:
        raise ModelError(
            f"model {name!r} is no builder of networks; name a subclass of torch.nn.Module, or a function of your own "
            "that returns one"
        )
