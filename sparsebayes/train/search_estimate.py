"""How long a search will take, and in how much memory, from a few steps on this device.

Two networks are timed: the supernet, whose steps the search repeats with fewer and fewer operations, and a network of
random cells in the size that is trained afterwards, as nobody knows yet what will be found. On a CPU a step may take
minutes, so it is extrapolated from two on few images where a whole batch would be slow. Proxies, exports and reports
are left out.

    >>> estimate_search(load_recipe("nas_bench201")).describe()
    'about 4 min 10 s of search and 6 min 00 s of training on cpu with 1 thread (99 ms a step), in about 1 GB of memory'
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from sparsebayes.cost import cost
from sparsebayes.data import Loader
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.network import BUILDER, Shape, build_network
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.nas.supernet import Supernet
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.estimate import (
    Estimate,
    device_words,
    images_of,
    missing_bytes,
    now,
    peak_bytes,
    training_seconds,
    undisturbed,
    update_,
)
from sparsebayes.train.objective import fast_layout_
from sparsebayes.train.random_search import random_cell
from sparsebayes.train.search import decision_of
from sparsebayes.train.search_methods import method_name
from sparsebayes.train.search_removal import search_macs
from sparsebayes.train.search_setup import check_images, check_size, checked_space, read_table

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
    section, retrain, data = recipe.search, recipe.retrain, recipe.data
    space = checked_space(recipe)
    read_table(recipe)
    dataset, num_train = images_of(recipe)
    num_images = check_images(recipe, num_train - data.holdout)
    batch = section.batch_size or data.batch_size
    loader = Loader(
        dataset.train,
        batch_size=min(max(batch, data.batch_size), len(dataset.train)),
        mean=dataset.mean,
        std=dataset.std,
        shuffle=True,
        augment=data.augment,
        seed=0,
        device=device,
    )
    images, labels = next(iter(loader))
    shape = Shape(section.width, section.depth, images.shape[1], dataset.num_classes)
    supernet = Supernet(space, shape, initial=section.initial, remember=not section.save_memory).to(device)
    check_size(supernet, images, labels)
    rule = decision_of(section, space, METHODS[method_name(recipe)].decision)
    genotype = random_cell(supernet, rule, Generator().manual_seed(0)).genotype
    step, memory = _step(supernet, images, labels, batch)
    macs = _search_macs(recipe, supernet, genotype, num_images, images[:1])
    search_seconds = step * macs / cost(supernet, images[:1]).macs
    training = 0.0
    if retrain.epochs or recipe.compress is not None:
        width, depth = recipe.network_size
        network = build_network(
            genotype, **{**vars(shape), "width": width, "depth": depth}, auxiliary=retrain.auxiliary > 0
        )
        retrain_step, more = _step(network.to(device), images, labels, data.batch_size)
        memory = None if memory is None or more is None else max(memory, more)
        image = retrain_step / (3 * data.batch_size)
        epoch = (num_train - data.holdout) // data.batch_size * retrain_step + data.holdout * image
        training = retrain.epochs * epoch
        if recipe.compress is not None:
            training += training_seconds(recipe.compression(BUILDER, {}), num_train, retrain_step, image)
    memory = None if memory is None else memory + missing_bytes(dataset, num_train)
    return Estimate(step, search_seconds, training, memory, device_words(device))


def _search_macs(
    recipe: SearchRecipe, supernet: Supernet, genotype: Genotype, num_images: int, example: Tensor
) -> float:
    """Multiply-accumulates of the search, in forward passes of training steps over one image of every batch.

    An image that is only evaluated counts as a third: a step's passes are forward, and backward for inputs and weights.
    """
    section, sampling, holdout = recipe.search, recipe.sampling, recipe.data.holdout
    batch = section.batch_size or recipe.data.batch_size
    macs = search_macs(recipe, supernet, num_images // batch, example)
    macs *= 1 + holdout / (3 * num_images)  # held-out images after every pass
    if recipe.num_draws == 1:
        return macs
    cell = cost(build_network(genotype, **vars(supernet.shape)).to(example.device), example).macs
    if recipe.judge == "heldout":
        drops = recipe.posterior == "variational_dropout" and section.baseline == "none"
        cells = recipe.num_draws * (2 if drops and sampling.baseline else 1)
        norm_images = sampling.norm_batches * min(256, num_images)
        macs += cells * (holdout + norm_images) / (3 * batch) * cell
    return macs


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
