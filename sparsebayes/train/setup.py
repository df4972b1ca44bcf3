"""What a run starts from: device, images, and a network that fits them, all checked before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import onnx
import torch
from torch import nn

from sparsebayes.data import Dataset, Images, Loader, split
from sparsebayes.errors import DataError, ModelError, RecipeError
from sparsebayes.models import build
from sparsebayes.recipe import AnyRecipe, Recipe
from sparsebayes.train.evaluation import check_logits
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.seeding import derive_seed

__all__ = ["check_export", "check_model", "example_of", "make_builder", "make_loaders", "resolve_device"]

EVALUATION_BATCH = 1000
"""Images of one evaluation step: large enough to be fast, small enough for any memory."""


def resolve_device(name: str) -> torch.device:
    """The device of a recipe's name for it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is cuda, but this PyTorch sees no CUDA device; use --device cpu or auto")
    return torch.device(name)


def check_export(recipe: AnyRecipe) -> None:
    """Refuse an operator set that no file can have, before hours of training.

    Raises:
        RecipeError: `export.opset` is newer than the installed onnx.
    """
    opset, newest = recipe.export.opset, onnx.defs.onnx_opset_version()
    if recipe.export.onnx and opset is not None and opset > newest:
        raise RecipeError(
            f"export.opset is {opset}, but the installed onnx knows {newest} at most; lower it, or null"
        )


def make_loaders(recipe: AnyRecipe, dataset: Dataset, device: torch.device) -> tuple[Loaders, Loader]:
    """Training, curvature and held-out images, and the test set."""
    data = recipe.data
    train, heldout = split(dataset.train, holdout=data.holdout, seed=recipe.seed)

    def loader(
        images: Images,
        batch: int,
        *,
        shuffle: bool = False,
        augment: str = "none",
        drop_last: bool = False,
    ) -> Loader:
        return Loader(
            images,
            batch_size=batch,
            mean=dataset.mean,
            std=dataset.std,
            shuffle=shuffle,
            augment=augment,
            seed=derive_seed(recipe.seed, "loader"),
            device=device,
            drop_last=drop_last,
        )

    if data.batch_size > len(train):
        raise DataError(
            f"data.batch_size is {data.batch_size}, but only {len(train)} images are left to train on; lower it"
        )
    # Batch norm cannot train on a last batch of one image, and a compiled pass would be compiled once more for a
    # smaller one; whatever else reads the images gets all of them.
    rest = len(train) % data.batch_size
    dropped = rest == 1 or (rest > 0 and _compiles(recipe))
    loaders = Loaders(
        train=loader(
            train,
            data.batch_size,
            shuffle=True,
            augment=data.augment,
            drop_last=dropped and len(train) > rest,
        ),
        plain=loader(train, 256, shuffle=True),
        heldout=loader(heldout, EVALUATION_BATCH),
        example=example_of(dataset, device),
    )
    return loaders, loader(dataset.test, EVALUATION_BATCH)


def _compiles(recipe: AnyRecipe) -> bool:
    """Whether training passes are compiled, for the images of one batch."""
    compression = recipe if isinstance(recipe, Recipe) else recipe.compress
    return compression is not None and compression.train.compile


def example_of(dataset: Dataset, device: torch.device) -> torch.Tensor:
    """One normalised image of the training set, of shape ``[1, C, H, W]``."""
    one = Images(dataset.train.images[:1], dataset.train.labels[:1])
    loader = Loader(
        one,
        batch_size=1,
        mean=dataset.mean,
        std=dataset.std,
        shuffle=False,
        augment="none",
        seed=0,
        device=device,
    )
    return next(iter(loader))[0]


def make_builder(recipe: Recipe, device: torch.device) -> Callable[[], nn.Module]:
    """A function that makes the dense network, always with the same initial weights, leaving the global RNG alone."""

    def make() -> nn.Module:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(recipe.seed, "model"))
            return build(recipe.model.name, recipe.model.options).to(device)

    return make


def check_model(model: nn.Module, loaders: Loaders, num_classes: int) -> None:
    """Refuse, before anything is written, a model whose input or output does not fit the data."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "the model has no parameters to train; give a network with weights that require gradients"
        )
    images, labels = next(iter(loaders.plain))
    some = min(2, loaders.train.batch_size)
    images, labels = images[:some], torch.zeros_like(labels[:some])
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise DataError(
            f"the model does not accept images of shape {list(images.shape[1:])} ({_reason(error)}); "
            "choose model and data that belong together"
        ) from None
    check_logits(logits, labels)
    if logits.shape[1] < num_classes:
        raise DataError(
            f"the data have {num_classes} classes, but the model has {logits.shape[1]} outputs; "
            "set model.options.num_classes"
        )
    try:
        trained = copy.deepcopy(model).train()
        with torch.no_grad(), torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
            logits = trained(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        raise ModelError(
            f"the model takes images of shape {list(images.shape[1:])} in evaluation mode, but fails in training mode "
            f"({_reason(error)}); make it a network that can be copied and trained, or raise data.batch_size"
        ) from None
    check_logits(logits, labels)


def _reason(error: Exception) -> str:
    """The first line of what the user's code raised."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
