"""How long a recipe will train, and in how much memory, from a few steps on this device.

The steps are those of the run itself (its images, augmentation and loss) on the dense network. From there on it is an
estimate: networks are taken to get cheaper by the square root of what each cycle removes (parameters fall
faster than multiply-accumulates), and one curvature estimate to cost as much as training on its images, a third of
that for images without a backward pass.

    >>> estimate(load_recipe("quickstart")).describe()
    'about 1 min 50 s of training on cpu with 2 threads (21 ms a step), in about 480 MB of memory'
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sparsebayes.data import Dataset, Images, Loader, load
from sparsebayes.errors import DataError
from sparsebayes.models import build
from sparsebayes.recipe.schema import Recipe
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.evaluation import check_logits
from sparsebayes.train.objective import fast_layout_, objective, training_forward
from sparsebayes.words import duration, milliseconds, size

__all__ = [
    "Estimate",
    "device_words",
    "estimate",
    "images_of",
    "missing_bytes",
    "now",
    "peak_bytes",
    "training_seconds",
    "undisturbed",
    "update_",
]

PUBLIC_SETS: dict[str, tuple[tuple[int, int, int], int, int]] = {
    "mnist": ((1, 28, 28), 60_000, 10),
    "fashion_mnist": ((1, 28, 28), 60_000, 10),
    "cifar10": ((3, 32, 32), 50_000, 10),
    "cifar100": ((3, 32, 32), 50_000, 100),
}
"""Image shape, training images and classes of the sets that might have to be downloaded: noise stands in for them."""
MOST_SECONDS = 0.2
MOST_STEPS = 8


@dataclass(frozen=True)
class Estimate:
    """What a few steps say about a whole run.

    Attributes:
        step_seconds: One training step of the dense network, or of the fresh supernet.
        search_seconds: Training a supernet, measuring it and comparing architectures; 0 where nothing is searched.
        training_seconds: Training in all other phases; exports and reports are left out.
        memory_bytes: Peak of the process, or of the GPU; None where the system does not tell.
        device: Where it was measured, in words.
    """

    step_seconds: float
    search_seconds: float
    training_seconds: float
    memory_bytes: int | None
    device: str

    def describe(self) -> str:
        """The estimate in one line."""
        times = {"search": self.search_seconds, "training": self.training_seconds}
        parts = [f"{duration(seconds)} of {name}" for name, seconds in times.items() if seconds]
        memory = "" if self.memory_bytes is None else f", in about {size(self.memory_bytes)} of memory"
        return (
            f"about {' and '.join(parts) or 'no time at all'} on {self.device} "
            f"({milliseconds(1e3 * self.step_seconds)} a step){memory}"
        )


def estimate(recipe: Recipe) -> Estimate:
    """Measure a few steps of a recipe and extrapolate; nothing is written or downloaded.

    Args:
        recipe: What would be run.

    Returns:
        The estimate.

    Raises:
        SparseBayesError: If the network cannot be built, or does not fit the images.
    """
    with undisturbed(recipe) as device:
        dataset, num_train = images_of(recipe)
        model = build(recipe.model.name, recipe.model.options).to(device)
        step, image = _measure(recipe, model, dataset, device)
        total, peak = training_seconds(recipe, num_train, step, image), peak_bytes(device)
        memory = None if peak is None else peak + missing_bytes(dataset, num_train)
        return Estimate(step, 0.0, total, memory, device_words(device))


@contextmanager
def undisturbed(recipe: Recipe | SearchRecipe) -> Iterator[torch.device]:
    """Use the recipe's device and threads for a while, and a random state of its own.

    Args:
        recipe: What would be run.

    Yields:
        The device.
    """
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            yield device
    finally:
        torch.set_num_threads(threads)


def training_seconds(recipe: Recipe, num_train: int, step_seconds: float, image_seconds: float) -> float:
    """Time of all phases, from that of a step of the dense network.

    Args:
        recipe: Epochs, cycles and sizes.
        num_train: Training images before any are held out.
        step_seconds: One training step.
        image_seconds: Evaluating one image.

    Returns:
        Seconds.
    """
    train, data, curvature = recipe.train, recipe.data, recipe.curvature
    steps = max(1, (num_train - data.holdout) // data.batch_size)
    epoch = steps * step_seconds + data.holdout * image_seconds
    # The dense network, which teaches on augmented images, does not shrink.
    teaches = train.distill > 0 and train.distill_on == "augmented"
    teaching = steps * data.batch_size * image_seconds if teaches else 0.0
    total, cost = train.pretrain.epochs * epoch, 1.0
    for _ in range(train.cycles.count):
        images = min(curvature.likely_images * curvature.draws, num_train)
        total += cost * step_seconds * images / data.batch_size * (1 + 2 * curvature.importance) / 3
        cost *= (1 - train.cycles.shrink) ** 0.5
        passes = max(train.cycles.epochs, min(train.cycles.max_epochs, int(train.cycles.epochs / cost)))
        total += passes * (cost * epoch + teaching)
    candidates = 2 if recipe.prior.strength == "auto" and recipe.prune.budget is None else 1
    return total + candidates * train.finetune.epochs * (max(cost, 0.2) * epoch + teaching)


def images_of(recipe: Recipe | SearchRecipe) -> tuple[Dataset, int]:
    """The data, or noise in their shape where they might have to be downloaded; and the number of training images."""
    known = PUBLIC_SETS.get(recipe.data.name)
    if known is None:
        dataset = load(recipe.data.name, root=recipe.data.root)
        _check_sizes(recipe, len(dataset.train))
        return dataset, len(dataset.train)
    shape, num_train, num_classes = known
    _check_sizes(recipe, num_train)
    count = min(num_train, (MOST_STEPS + 2) * recipe.data.batch_size)
    images = Images(
        torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % num_classes
    )
    channels = shape[0]
    return Dataset(
        recipe.data.name, images, images, num_classes, (0.5,) * channels, (0.25,) * channels
    ), num_train


def missing_bytes(dataset: Dataset, num_train: int) -> int:
    """Memory of the training images that a measurement did without.

    Args:
        dataset: What was measured on.
        num_train: Training images of the run.
    """
    images = dataset.train.images
    return (num_train - len(images)) * images.element_size() * images[0].numel()


def _check_sizes(recipe: Recipe | SearchRecipe, num_train: int) -> None:
    """Refuse what a run would refuse: more images held out, or in a batch, than there are."""
    data = recipe.data
    if data.holdout >= num_train:
        raise DataError(f"data.holdout is {data.holdout}, but there are only {num_train} training images")
    left = num_train - data.holdout
    if data.batch_size > left:
        raise DataError(
            f"data.batch_size is {data.batch_size}, but only {left} images are left to train on; lower it"
        )


def _measure(recipe: Recipe, model: nn.Module, dataset: Dataset, device: torch.device) -> tuple[float, float]:
    """Seconds of one training step, and of evaluating one image."""
    fast_layout_(model).train()
    batch = min(recipe.data.batch_size, len(dataset.train))
    loader = Loader(
        dataset.train, batch_size=batch, mean=dataset.mean, std=dataset.std, shuffle=True,
        augment=recipe.data.augment, seed=0, device=device,
    )  # fmt: skip
    # A compiled pass is timed as it is without: compiling takes longer than all of this.
    forward = training_forward(model, recipe.train.model_copy(update={"compile": False}))
    times: list[float] = []
    for _, images, labels in loader.indexed():
        start = now(device)
        logits = forward(images)
        check_logits(logits, labels)
        objective(logits, labels, None, recipe.train).backward()  # type: ignore[no-untyped-call]
        update_(model)
        times.append(now(device) - start)
        if len(times) > MOST_STEPS or sum(times) > MOST_SECONDS:
            break
    model.eval()
    with torch.no_grad():
        start = now(device)
        model(images[: max(1, len(images) // 4)])
        image = (now(device) - start) / max(1, len(images) // 4)
    # The first step makes buffers and chooses kernels; a slow one is all there is to go by.
    return statistics.median(times[1:] or times), image


def update_(model: nn.Module) -> None:
    """What an optimizer's step costs, written out: PyTorch's own take longer to load than all of this to run."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                momentum = parameter.grad.mul(0.9).add_(parameter, alpha=1e-4)
                parameter.sub_(momentum, alpha=1e-6)
                parameter.grad = None


def device_words(device: torch.device) -> str:
    """The device in words, with the threads that a CPU computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu with {threads} thread{'' if threads == 1 else 's'}"


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that the process, or its part of a GPU, ever took; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
