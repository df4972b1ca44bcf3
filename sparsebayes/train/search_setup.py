"""What a search starts from: space, images, supernet and table, all checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebayes.data import Dataset, Images, Loader, load, split
from sparsebayes.errors import DataError, ModelError, RecipeError
from sparsebayes.nas.catalogue import SPACES, find_space
from sparsebayes.nas.network import Shape
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.nas.spaces import Space
from sparsebayes.nas.supernet import Supernet
from sparsebayes.nas.tabular import BenchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.evaluation import check_logits
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.search import SearchLoaders, check_batch
from sparsebayes.train.search_methods import method_name
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.setup import check_export, make_loaders, resolve_device

__all__ = ["Setting", "check_images", "check_size", "checked_space", "read_table", "set_up"]


@dataclass(frozen=True)
class Setting:
    """What a search starts from.

    Attributes:
        recipe: what to do.
        loaders: images of the network that is built of what was found.
        search_loaders: images of the search.
        test: read once, at the end.
        supernet: fresh, on the run's device.
        table: true accuracies to look the cell up in, or None.
    """

    recipe: SearchRecipe
    loaders: Loaders
    search_loaders: SearchLoaders
    test: Loader
    supernet: Supernet
    table: BenchTable | None


def set_up(recipe: SearchRecipe) -> Setting:
    """Load the data, build the supernet, read the table.

    Raises:
        RecipeError: settings that contradict each other, or a space that is none.
        DataError: data that are absent, or too few images for the batches.
        ModelError: images that the supernet cannot take.
    """
    section, space = recipe.search, checked_space(recipe)
    check_export(recipe)
    device = resolve_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dataset = load(recipe.data.name, root=recipe.data.root)
    loaders, test = make_loaders(_with_augmentation(recipe), dataset, device)
    search_loaders = _search_loaders(recipe, dataset, loaders, device)
    shape = Shape(section.width, section.depth, dataset.train.images.shape[1], dataset.num_classes)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(recipe.seed, "supernet"))
        supernet = Supernet(space, shape, initial=section.initial, remember=not section.save_memory).to(
            device
        )
    check_size(supernet, *next(iter(loaders.heldout)))
    return Setting(recipe, loaders, search_loaders, test, supernet, read_table(recipe))


def checked_space(recipe: SearchRecipe) -> Space:
    """The space of a recipe that does not contradict itself, or it.

    Raises:
        RecipeError: settings that contradict each other, or a space that is none.
    """
    recipe.check()
    space = find_space(recipe.search.space)
    if recipe.table is not None and space != SPACES["nas_bench_201"]:
        raise RecipeError(
            f"a table of true accuracies is for the space nas_bench_201, not {space.name!r}; set table: null"
        )
    if not space.shared and recipe.retrain.depth not in (None, recipe.search.depth):
        raise RecipeError(
            f"every cell of the space {space.name!r} is found for its own place, so retrain.depth must be that of the "
            "search; leave it out"
        )
    return space


def _with_augmentation(recipe: SearchRecipe) -> SearchRecipe:
    """The recipe whose training images change as those of the retraining do."""
    if recipe.retrain.augment is None:
        return recipe
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"augment": recipe.retrain.augment})}
    )


def _search_loaders(
    recipe: SearchRecipe, dataset: Dataset, loaders: Loaders, device: torch.device
) -> SearchLoaders:
    """The images of the search: all training images or so many, in two halves where switches have their own."""
    section = recipe.search
    train, _ = split(dataset.train, holdout=recipe.data.holdout, seed=recipe.seed)
    check_images(recipe, len(train))
    if section.num_images is not None and section.num_images < len(train):
        _, train = split(train, holdout=section.num_images, seed=derive_seed(recipe.seed, "search", "images"))
    own = train
    if METHODS[method_name(recipe)].bilevel:
        train, own = split(train, holdout=len(train) // 2, seed=derive_seed(recipe.seed, "search", "halves"))
    batch = section.batch_size or recipe.data.batch_size

    def loader(images: Images, size: int, augment: str) -> Loader:
        return Loader(
            images,
            batch_size=size,
            mean=dataset.mean,
            std=dataset.std,
            shuffle=True,
            augment=augment,
            seed=derive_seed(recipe.seed, "search", "loader"),
            device=device,
            # A last batch of a few images would spoil the running statistics of the norms.
            drop_last=True,
        )

    augment = recipe.data.augment
    plain = loader(train, min(256, len(train)), "none")
    return SearchLoaders(loader(train, batch, augment), loader(own, batch, augment), plain, loaders.heldout)


def check_images(recipe: SearchRecipe, num_left: int) -> int:
    """Refuse a search of more images than there are, or of batches that batch norm cannot learn from.

    Args:
        recipe: what to do.
        num_left: training images that are not held out.

    Returns:
        Images that the supernet's weights learn from.

    Raises:
        DataError: too few images, or batches of one.
    """
    section = recipe.search
    count = num_left if section.num_images is None else section.num_images
    if count > num_left:
        raise DataError(f"search.num_images is {count}, but only {num_left} images are left; lower it")
    if METHODS[method_name(recipe)].bilevel:
        count -= count // 2
    batch = section.batch_size or recipe.data.batch_size
    check_batch(batch, count)
    if recipe.retrain.epochs > 0:  # which takes data.batch_size, whatever the search takes
        check_batch(min(batch, recipe.data.batch_size), count)
    return count


def read_table(recipe: SearchRecipe) -> BenchTable | None:
    """The table of true accuracies that a recipe names, if any.

    Raises:
        DataError: a file that is no such table, or is not there.
    """
    if recipe.table is None:
        return None
    return BenchTable.embedded() if recipe.table == "embedded" else BenchTable.read(recipe.table)


def check_size(supernet: Supernet, images: Tensor, labels: Tensor) -> None:
    """Refuse images that the network cannot take, before anything is written.

    Args:
        supernet: fresh.
        images: two of them are looked at.
        labels: of these.

    Raises:
        ModelError: what the network says of them, or too few outputs.
        DataError: labels that are none.
    """
    try:
        with torch.no_grad():
            logits = supernet.eval()(images[:2])
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"the supernet does not take images of shape {list(images.shape[1:])} ({reason}); choose other data, or a "
            "space with fewer stages"
        ) from None
    check_logits(logits, labels[:2])
