"""How long a search will take, and in how much memory, from a few steps on this device.

Two networks are timed: the supernet, whose steps the search repeats with fewer and fewer operations, and a network of
random cells in the size that is trained afterwards, as nobody knows yet what will be found. On a CPU a step may take
minutes, so it is extrapolated from two on few images where a whole batch would be slow. Proxies, exports, reports and a
compression of the network are left out.

    >>> estimate_search(load_recipe("nas_bench201")).describe()
    'about 4 min of search and 6 min of training on cpu with 2 threads (150 ms a step), in about 900 MB of memory'
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from sparsebayes.cost import cost
from sparsebayes.data import Loader
from sparsebayes.nas.network import Shape, build_network
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.nas.supernet import Supernet
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.estimate import (
    Estimate,
    device_words,
    images_of,
    now,
    peak_bytes,
    undisturbed,
    update_,
)
from sparsebayes.train.objective import fast_layout_
from sparsebayes.train.random_search import random_cell
from sparsebayes.train.search import check_batch, decision_of
from sparsebayes.train.search_methods import method_name
from sparsebayes.train.search_removal import search_macs
from sparsebayes.train.search_setup import check_size, checked_space

__all__ = ["estimate_search"]

PARTS = (2, 8)
"""Images of two steps that stand for one that is too slow to be measured whole."""
SLOW = 0.2
"""Seconds of the first of them beyond which it is."""


def estimate_search(recipe: SearchRecipe) -> Estimate:
    """Measure a few steps of a search and extrapolate; nothing is written or downloaded.

    Args:
        recipe: What would be run.

    Returns:
        The estimate.

    Raises:
        SparseBayesError: What a run would refuse: no such space, too few images, images that do not fit the supernet.
    """
    with undisturbed(recipe) as device:
        return _measured(recipe, device)


def _measured(recipe: SearchRecipe, device: torch.device) -> Estimate:
    """The estimate, with the random state and the threads of whoever calls."""
    section, retrain = recipe.search, recipe.retrain
    dataset, num_train = images_of(recipe)
    num_train -= recipe.data.holdout
    batch = section.batch_size or recipe.data.batch_size
    num_images = min(section.num_images or num_train, num_train)
    if METHODS[method_name(recipe)].bilevel:
        num_images //= 2
    check_batch(batch, num_images)
    loader = Loader(
        dataset.train,
        batch_size=min(max(batch, recipe.data.batch_size), len(dataset.train)),
        mean=dataset.mean,
        std=dataset.std,
        shuffle=True,
        augment=recipe.data.augment,
        seed=0,
        device=device,
    )
    images, labels = next(iter(loader))
    channels, classes = images.shape[1], dataset.num_classes
    shape = Shape(section.width, section.depth, channels, classes)
    space = checked_space(recipe)
    supernet = Supernet(space, shape, initial=section.initial, remember=not section.save_memory).to(device)
    check_size(supernet, images, labels)
    decided = random_cell(supernet, decision_of(section, supernet.space), Generator().manual_seed(0))

    def network_of(width: int, depth: int, auxiliary: bool) -> nn.Module:
        sizes = {"width": width, "depth": depth, "in_channels": channels, "num_classes": classes}
        return build_network(decided.genotype, **sizes, auxiliary=auxiliary).to(device)

    example = images[:1]
    step, memory = _step(supernet, images, labels, batch)
    work = search_macs(recipe, supernet, num_images // batch, example)
    cell_macs, sampling = cost(network_of(section.width, section.depth, False), example).macs, recipe.sampling
    if recipe.num_draws > 1 and recipe.judge == "heldout":
        judged = recipe.data.holdout + sampling.norm_batches * batch
        # Three passes make a step: forward, and backward for inputs and weights.
        work += recipe.num_draws * judged / batch * cell_macs / 3
    work += sampling.finalists * sampling.finalist_epochs * (num_images // batch) * cell_macs
    search_seconds = step * work / cost(supernet, example).macs
    retrain_seconds = 0.0
    if retrain.epochs:
        whole, (width, depth) = recipe.data.batch_size, recipe.network_size
        network = network_of(width, depth, auxiliary=retrain.auxiliary > 0)
        retrain_step, more = _step(network, images, labels, whole)
        memory = None if memory is None or more is None else max(memory, more)
        retrain_seconds = retrain.epochs * (num_train / whole) * retrain_step
    return Estimate(step, search_seconds, retrain_seconds, memory, device_words(device))


def _step(network: nn.Module, images: Tensor, labels: Tensor, batch: int) -> tuple[float, int | None]:
    """Seconds of a training step on so many images, and the memory that it takes."""
    device = images.device
    fast_layout_(network).train()

    def seconds(count: int) -> float:
        start = now(device)
        functional.cross_entropy(network(images[:count]), labels[:count]).backward()  # type: ignore[no-untyped-call]
        update_(network)
        return now(device) - start

    few, more = (min(batch, part, len(images)) for part in PARTS)
    before = peak_bytes(device)
    seconds(few)  # makes buffers and chooses kernels
    short = seconds(few)
    if short < SLOW or device.type == "cuda":
        return seconds(batch) * batch / len(images[:batch]), peak_bytes(device)
    long, after = seconds(more), peak_bytes(device)
    per_image = max(long - short, 0.0) / max(more - few, 1)
    memory = None if before is None or after is None else before + (after - before) * batch // more
    return long + (batch - more) * per_image, memory
