"""Any classifier of torchvision, by its name there, with random weights.

>>> build_classifier("squeezenet1_1", {"num_classes": 10}).num_classes
10
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsebayes.errors import ModelError, unknown
from sparsebayes.torchvision_compat import import_torchvision
from sparsebayes.user_code import call_function

__all__ = ["PREFIX", "build_classifier"]

PREFIX = "torchvision:"
"""What a model's name begins with where torchvision's name follows."""

# Their training output is a tuple with the logits of auxiliary heads, which no loss here knows; their builders also
# announce that their slow default initialisation will change.
_AUXILIARY = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build_classifier(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Build one of torchvision's classifiers.

    Args:
        name: its name in `torchvision.models`, such as "resnet50".
        options: keyword arguments of its builder, for example `{"num_classes": 10}`. GoogLeNet and Inception v3 come
            without auxiliary heads unless `aux_logits` asks for them.

    Returns:
        The network with fresh random weights.

    Raises:
        ModelError: unknown name, an option that the builder does not take, or pretrained weights.
    """
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(unknown("torchvision classifier", name, known))
    if options.get("weights") is not None:
        raise ModelError(
            f"model '{PREFIX}{name}' is built with random weights, since a saved network is rebuilt from its name "
            "without a download; load pretrained weights in a function of your own and name it as "
            "'package.module:function'"
        )
    given = {**_AUXILIARY.get(name, {}), **options}
    model = call_function("model", f"{PREFIX}{name}", models.get_model_builder(name), given, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model '{PREFIX}{name}' must be a torch.nn.Module, got {type(model).__name__}")
    return model
