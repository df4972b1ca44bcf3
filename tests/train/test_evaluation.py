"""The table of the dense network's logits: every image at its own place, whatever the loader's last batch holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.data import Dataset, Images, Loader
from sparsebayes.errors import NumericsError
from sparsebayes.recipe.schema import DataSection, ModelSection, Recipe, TrainSection
from sparsebayes.train.evaluation import logits_table
from sparsebayes.train.setup import make_loaders


def numbered(count: int) -> Images:
    """Images of 1x1x2 pixels that spell their own number, of two classes in equal shares."""
    number = torch.arange(count)
    pixels = torch.stack([number % 256, number // 256], 1).to(torch.uint8)
    return Images(pixels.view(count, 1, 1, 2), number % 2)


def spelt(logits: torch.Tensor) -> torch.Tensor:
    """The number that normalised pixels spell."""
    pixels = (logits * 255).round().long()
    return pixels[:, 0] + 256 * pixels[:, 1]


def test_a_last_batch_of_one_image_is_left_out_of_training_only() -> None:
    train = numbered(261)  # 4 are held out: 257 = 256 + 1 = 4 * 64 + 1
    dataset = Dataset("numbers", train, numbered(4), 2, (0.0,), (1.0,))
    recipe = Recipe(
        version=1,
        name="numbers",
        data=DataSection(holdout=4, batch_size=64),
        model=ModelSection(name="vgg16"),
    )
    loaders, test = make_loaders(recipe, dataset, torch.device("cpu"))
    assert (len(loaders.train), len(loaders.plain), len(test)) == (4, 2, 1)
    table = logits_table(nn.Flatten(), loaders.plain)
    assert table.shape == (257, 2)
    for positions, images, _ in loaders.train.indexed():
        assert torch.equal(spelt(table[positions]), spelt(images.flatten(1)))


@pytest.mark.parametrize(("compiled", "count"), [(False, 3), (True, 2)])
def test_a_compiled_pass_sees_batches_of_one_size(compiled: bool, count: int) -> None:
    dataset = Dataset("numbers", numbered(104), numbered(4), 2, (0.0,), (1.0,))
    recipe = Recipe(
        version=1,
        name="numbers",
        data=DataSection(holdout=4, batch_size=40),
        model=ModelSection(name="vgg16"),
        train=TrainSection(compile=compiled),
    )
    loaders, _ = make_loaders(recipe, dataset, torch.device("cpu"))
    assert len(loaders.train) == len(list(loaders.train)) == count


def test_a_table_with_a_gap_is_refused() -> None:
    short = Loader(numbered(9), batch_size=4, mean=(0.0,), std=(1.0,), shuffle=True, drop_last=True)
    with pytest.raises(NumericsError, match="for all 9 training images, but 1 have none, or NaN"):
        logits_table(nn.Flatten(), short)
    whole = Loader(numbered(9), batch_size=4, mean=(0.0,), std=(1.0,), shuffle=True)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    nn.init.constant_(broken[1].bias, float("nan"))
    with pytest.raises(NumericsError, match="but 9 have none, or NaN; check the network"):
        logits_table(broken, whole)
