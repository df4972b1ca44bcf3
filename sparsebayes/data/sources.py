"""A data set from its name, or from the user's own function.

>>> load("embedded_mnist")
Dataset('embedded_mnist', train=Images(10,000 of 1x28x28, labels 0 to 9), test=..., 10 classes)

MNIST: Y. LeCun, C. Cortes, C. J. C. Burges. FashionMNIST: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image
Dataset for Benchmarking Machine Learning Algorithms", arXiv 1708.07747, 2017. CIFAR-10 and CIFAR-100: A. Krizhevsky,
"Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsebayes.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from sparsebayes.data.download import download_archive, download_idx
from sparsebayes.data.idx import find_idx, read_images
from sparsebayes.data.images import Dataset, Images
from sparsebayes.data.shapes import make_shapes
from sparsebayes.errors import DataError, unknown
from sparsebayes.user_code import call_function, load_function

__all__ = ["SOURCES", "Dataset", "Images", "data_root", "load"]

_EMBEDDED = Path(__file__).with_name("embedded")

# Mean and standard deviation of the training pixels, scaled to 0..1.
_MNIST_MEAN, _MNIST_STD = (0.1307,), (0.3081,)
_FASHION_MEAN, _FASHION_STD = (0.2860,), (0.3530,)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def load(name: str, *, root: str | Path | None = None) -> Dataset:
    """Load a data set; download it if it is nowhere, and there is a network.

    Args:
        name: a key of `SOURCES`, or "package.module:function" for the user's own function, which takes no
            argument and returns a `Dataset`.
        root: folder of the data; None: $SPARSEBAYES_DATA, else the user's cache. MNIST is looked for in
            `root/MNIST/raw`, FashionMNIST in `root/FashionMNIST/raw`, CIFAR-10 in `root/cifar-10-batches-bin` (the
            binary version) and `root/cifar-10-batches-py` (torchvision's), CIFAR-100 in `root/cifar-100-binary` and
            `root/cifar-100-python`. The embedded sets, `shapes` and the user's own ignore it.

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


def _cifar_source(
    root: Path, *, cifar: Cifar, mean: tuple[float, ...], std: tuple[float, ...], instead: str
) -> Dataset:
    """CIFAR-10 or CIFAR-100: binary batches, else Python batches, else a download of the binary ones."""
    parts = read_cifar(root, cifar)
    if parts is None:
        try:
            download_archive(cifar.url, cifar.archive_md5, root / cifar.binary, cifar.files)
        except DataError as error:
            raise DataError(
                f"{cifar.name} is not in {root / cifar.binary} or {root / cifar.python}, and {error}; either set "
                f"data.root or $SPARSEBAYES_DATA to a folder that holds one of the two, or use {instead}, which needs "
                "no file, or connect to the network once"
            ) from error
        parts = read_cifar(root, cifar)
        if parts is None:
            raise DataError(f"the files of {cifar.name} vanished from {root / cifar.binary}; try again")
    return Dataset(cifar.name, *parts, cifar.num_classes, mean, std)


def _shapes(root: Path) -> Dataset:
    """The procedural shapes; `root` does not matter."""
    return make_shapes()


def _embedded_cifar10(root: Path) -> Dataset:
    """The 2,300 training and 500 test images inside the package; `root` does not matter."""
    path = _EMBEDDED / "cifar10.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        train, test = _grid(tensors, "train"), _grid(tensors, "test")
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is absent or damaged ({error}); install the package again") from error
    return Dataset("embedded_cifar10", train, test, 10, _CIFAR10_MEAN, _CIFAR10_STD)


def _grid(tensors: dict[str, Tensor], part: str) -> Images:
    """Images of one part: a lossless WebP picture that holds them in rows of fifty."""
    from PIL import Image

    labels = tensors[f"{part}_labels"].to(torch.int64)
    with Image.open(io.BytesIO(tensors[f"{part}_webp"].numpy().tobytes()), formats=["WEBP"]) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # [rows*32, 50*32, 3]
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    tiles = pixels.reshape(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3)  # [rows, 50, 3, 32, 32]
    return Images(tiles.reshape(-1, 3, 32, 32).contiguous(), labels)


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
    "cifar10": partial(
        _cifar_source,
        cifar=CIFAR10,
        mean=_CIFAR10_MEAN,
        std=_CIFAR10_STD,
        instead="data.name=embedded_cifar10",
    ),
    "cifar100": partial(
        _cifar_source, cifar=CIFAR100, mean=_CIFAR100_MEAN, std=_CIFAR100_STD, instead="data.name=shapes"
    ),
    "embedded_cifar10": _embedded_cifar10,
    "shapes": _shapes,
}
