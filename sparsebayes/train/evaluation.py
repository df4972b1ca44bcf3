"""Loss and error of a network on a fixed set of images, with the standard error that decisions need.

The loss is the mean cross-entropy of an image in nats; its standard error is that of a mean over the images, so that
"within one standard error" has a meaning:

    >>> best = Evaluation(loss=0.030, standard_error=0.004, error=0.008, num_images=5000, chance=2.3)
    >>> Evaluation(loss=0.033, standard_error=0.004, error=0.009, num_images=5000, chance=2.3).loss <= best.limit
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.data.loader import Loader
from sparsebayes.errors import DataError, ModelError, NumericsError

__all__ = ["Evaluation", "check_logits", "evaluate", "image_losses", "logits_table"]


@dataclass(frozen=True)
class Evaluation:
    """What a network does on a set of images.

    Attributes:
        loss: Mean cross-entropy of an image, in nats; may be infinite or NaN for a broken network.
        standard_error: Standard error of that mean.
        error: Share of images that are classified wrongly, 0..1.
        num_images: Images it was measured on.
        chance: Loss of guessing, the logarithm of the number of classes.
    """

    loss: float
    standard_error: float
    error: float
    num_images: int
    chance: float

    @property
    def limit(self) -> float:
        """Largest loss that is within one standard error of this one."""
        return self.loss + self.standard_error


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Measure loss and error in evaluation mode; the model's mode comes back as it was.

    Args:
        model: Maps images ``[B, ...]`` to logits ``[B, C]``.
        batches: Pairs of images and int64 labels ``[B]``.

    Raises:
        DataError: If there is no image, or a label is outside the model's classes.
        ModelError: If the model does not return one row of logits per image.
    """
    losses: list[Tensor] = []
    wrong: list[Tensor] = []
    num_classes = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                logits = model(images)
                check_logits(logits, labels)
                num_classes = logits.shape[1]
                losses.append(F.cross_entropy(logits, labels, reduction="none"))
                wrong.append(logits.argmax(1) != labels)
    finally:
        model.train(training)
    if not losses:
        raise DataError("expected images to evaluate on, got none; check data.holdout and the data set")
    loss = torch.cat(losses).double()
    spread = float(loss.std(correction=0)) / max(len(loss) - 1, 1) ** 0.5
    error = float(torch.cat(wrong).double().mean())
    return Evaluation(float(loss.mean()), spread, error, len(loss), math.log(num_classes))


def image_losses(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Cross-entropy of every image in evaluation mode, for comparisons image by image.

    Args:
        model: Maps images ``[B, ...]`` to logits ``[B, C]``; its mode comes back as it was.
        batches: Pairs of images and int64 labels ``[B]``, in an order that is the same for all that is compared.

    Returns:
        float64 of shape ``[N]`` on the CPU, nats.

    Raises:
        DataError: If there is no image, or a label is outside the model's classes.
        ModelError: If the model does not return one row of logits per image.
    """
    losses: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                logits = model(images)
                check_logits(logits, labels)
                losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
    finally:
        model.train(training)
    if not losses:
        raise DataError("expected images to evaluate on, got none; check data.holdout and the data set")
    return torch.cat(losses)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse outputs that cannot be the logits of these labels.

    Args:
        logits: Expected of shape ``[B, C]``.
        labels: int64 of shape ``[B]``.

    Raises:
        ModelError: If the shapes do not fit.
        DataError: If a label is outside ``0..C-1``.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        came = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected logits of shape [{len(labels)}, classes] from the model, got {came}")
    if not logits.is_floating_point():
        raise ModelError(f"expected floating-point logits from the model, got {logits.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {logits.shape[1]} outputs; "
            "give the model as many classes as the data have (model.options.num_classes)"
        )


def logits_table(model: nn.Module, loader: Loader) -> Tensor:
    """Logits for all images of a loader, by their positions in its set.

    Args:
        model: In evaluation mode.
        loader: Its images must come as they are, without augmentation, and none may be left out.

    Returns:
        Of shape ``[N, C]``.

    Raises:
        NumericsError: If an image has no logits, or some that are NaN.
    """
    table: Tensor | None = None
    with torch.no_grad():
        for positions, images, _ in loader.indexed():
            logits = model(images)
            if table is None:
                table = logits.new_full((loader.num_data, logits.shape[1]), float("nan"))
            table[positions] = logits
    absent = loader.num_data if table is None else int(table.isnan().any(1).sum())
    if table is None or absent:
        raise NumericsError(
            f"expected logits of the dense network for all {loader.num_data} training images, but {absent} have none, "
            "or NaN; check the network, and let the loader leave no image out"
        )
    return table
