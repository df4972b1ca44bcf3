"""A data set from its name, or from the user's own function.

>>> load("embedded_mnist")
Dataset('embedded_mnist', train=Images(10,000 of 1x28x28, labels 0 to 9), test=..., 10 classes)

MNIST: Y. LeCun, C. Cortes, C. J. C. Burges. FashionMNIST: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a
    Novel
Image Dataset for Benchmarking Machine Learning Algorithms", arXiv 1708.07747, 2017.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsebayes.data.download import download_idx
from sparsebayes.data.idx import find_idx, read_images
from sparsebayes.data.images import Dataset, Images
from sparsebayes.errors import DataError, unknown
from sparsebayes.user_code import call_function, load_function

__all__ = ["SOURCES", "Dataset", "Images", "data_root", "load"]

_EMBEDDED = Path(__file__).with_name("embedded")

# Mean and standard deviation of the training pixels, scaled to 0..1.
_MNIST_MEAN, _MNIST_STD = (0.1307,), (0.3081,)
_FASHION_MEAN, _FASHION_STD = (0.2860,), (0.3530,)


def load(name: str, *, root: str | Path | None = None) -> Dataset:
    """Load a data set; download it if it is nowhere, and there is a network.

    Args:
        name: a key of `SOURCES`, or "package.module:function" for the user's own function, which takes no
            argument and returns a `Dataset`.
        root: folder of the data; None: $SPARSEBAYES_DATA, else the user's cache. MNIST is looked for in
            `root/MNIST/raw`, FashionMNIST in `root/FashionMNIST/raw`, as torchvision does. The embedded sets
            and the user's own ignore it.

    Returns:
        The data set, on the CPU.

    Raises:
        DataError: unknown name; a file is damaged; the files are absent and cannot be downloaded; the user's
            function is not found, fails, or returns something else.
    """
    if ":" in name:
        dataset = call_function(
            "data source", name, load_function("data source", name, DataError), {}, DataError
        )
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"data source {name!r} must return a sparsebayes.data.Dataset, got {type(dataset).__name__}"
            )
        return dataset
    if name not in SOURCES:
        raise DataError(f"{unknown('data source', name, SOURCES)}, or your own as 'package.module:function'")
    return SOURCES[name](data_root() if root is None else Path(root).expanduser())


def data_root() -> Path:
    """The folder of data where none is given: $SPARSEBAYES_DATA, else `sparsebayes` in the user's cache."""
    if given := os.environ.get("SPARSEBAYES_DATA"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "sparsebayes"


def _idx_source(
    root: Path, *, name: str, class_name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    """MNIST or a set in its format: four idx files in `root/CLASS_NAME/raw`."""
    raw = root / class_name / "raw"
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    paths = [find_idx(raw, stem) for stem in stems]
    if None in paths:
        try:
            download_idx(class_name, raw, stems)
        except DataError as error:
            raise DataError(
                f"{name} is not in {raw}, and {error}; either set data.root or $SPARSEBAYES_DATA to a folder "
                f"that holds {class_name}/raw with its four idx files, or use data.name=embedded_mnist, "
                "which needs no file, or connect to the network once"
            ) from error
    found = [path or raw / stem for path, stem in zip(paths, stems, strict=True)]
    train, test = read_images(found[0], found[1]), read_images(found[2], found[3])
    return Dataset(name, train, test, 10, mean, std)


def _embedded_mnist(root: Path) -> Dataset:
    """The 10,000 training and 2,000 test digits inside the package; `root` does not matter."""
    path = _EMBEDDED / "mnist.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        train, test = _pair(tensors, "train"), _pair(tensors, "test")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is absent or damaged ({error}); install the package again") from error
    return Dataset("embedded_mnist", train, test, 10, _MNIST_MEAN, _MNIST_STD)


def _pair(tensors: dict[str, Tensor], part: str) -> Images:
    """The images and labels of one part of an embedded file."""
    return Images(tensors[f"{part}_images"].unsqueeze(1), tensors[f"{part}_labels"].to(torch.int64))


SOURCES: dict[str, Callable[[Path], Dataset]] = {
    "mnist": partial(_idx_source, name="mnist", class_name="MNIST", mean=_MNIST_MEAN, std=_MNIST_STD),
    "fashion_mnist": partial(
        _idx_source, name="fashion_mnist", class_name="FashionMNIST", mean=_FASHION_MEAN, std=_FASHION_STD
    ),
    "embedded_mnist": _embedded_mnist,
}
