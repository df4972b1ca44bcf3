"""The files of CIFAR-10 and CIFAR-100: the official binary batches, or the Python batches that torchvision keeps.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009. In a binary batch every image is one label
byte (CIFAR-100: the coarse label, then the fine one), then 3072 pixel bytes: the red, green and blue plane, row by row.
A Python batch is a pickle of the same. Reading a pickle can run anything, so one is opened only if its MD5 sum is the
published one, and even then its reader knows no more than how to make an array.

    >>> read_cifar(Path("data"), CIFAR10)                        # data/cifar-10-batches-bin/data_batch_1.bin, ...
    (Images(50,000 of 3x32x32, labels 0 to 9), Images(10,000 of 3x32x32, labels 0 to 9))
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsebayes.data.images import Images
from sparsebayes.errors import DataError

__all__ = ["CIFAR10", "CIFAR100", "Cifar", "read_cifar"]

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """Where one of the two sets lies and how it is checked.

    Attributes:
        name: what messages call it.
        num_classes: classes of the label that is learned.
        label_bytes: label bytes in front of each image of a binary batch; the last one is learned.
        label_key: where a Python batch holds that label.
        binary: folder of the binary batches.
        python: folder of the Python batches.
        train: names of the training batches without ".bin", with the number of images of each.
        test: the same of the test batch.
        binary_md5: published MD5 sum of each binary batch; empty where none is published, then counts are checked.
        python_md5: published MD5 sum of each Python batch.
        archive_md5: published MD5 sum of the archive of the binary batches.
    """

    name: str
    num_classes: int
    label_bytes: int
    label_key: str
    binary: str
    python: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    binary_md5: Mapping[str, str]
    python_md5: Mapping[str, str]
    archive_md5: str

    @property
    def url(self) -> str:
        """Address of the archive of the binary batches."""
        kind = "cifar-10" if self.num_classes == 10 else "cifar-100"
        return f"https://www.cs.toronto.edu/~kriz/{kind}-binary.tar.gz"

    @property
    def files(self) -> list[str]:
        """Names of the binary batches."""
        return [f"{stem}.bin" for stem in (*self.train, *self.test)]


CIFAR10 = Cifar(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    label_key="labels",
    binary="cifar-10-batches-bin",
    python="cifar-10-batches-py",
    train={f"data_batch_{number}": 10_000 for number in range(1, 6)},
    test={"test_batch": 10_000},
    binary_md5={
        "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    python_md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
)

CIFAR100 = Cifar(
    name="cifar100",
    num_classes=100,
    label_bytes=2,
    label_key="fine_labels",
    binary="cifar-100-binary",
    python="cifar-100-python",
    train={"train": 50_000},
    test={"test": 10_000},
    binary_md5={},
    python_md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)


def read_cifar(root: Path, cifar: Cifar) -> tuple[Images, Images] | None:
    """Read a set from its binary batches, else from its Python batches.

    Args:
        root: folder that holds the folder of the batches.
        cifar: which set.

    Returns:
        Training and test images of shape `[N, 3, 32, 32]`; None where `root` holds neither folder complete.

    Raises:
        DataError: a file is truncated, too long, damaged, or cannot be read.
    """
    binary = {stem: root / cifar.binary / f"{stem}.bin" for stem in (*cifar.train, *cifar.test)}
    python = {stem: root / cifar.python / stem for stem in (*cifar.train, *cifar.test)}
    for paths, read in ((binary, _read_binary), (python, _read_python)):
        if all(path.is_file() for path in paths.values()):
            parts = [
                _join([read(paths[stem], stem, count, cifar) for stem, count in part.items()])
                for part in (cifar.train, cifar.test)
            ]
            return parts[0], parts[1]
    return None


def _join(batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Images:
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Images(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels).to(torch.int64))


def _read_binary(
    path: Path, stem: str, count: int, cifar: Cifar
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `[count, 3072]` and labels `[count]` of one binary batch."""
    content = _content(path)
    row = cifar.label_bytes + _PIXELS
    if len(content) != count * row:
        came = f"only {len(content):,}" if len(content) < count * row else f"{len(content):,}"
        raise DataError(_damaged(path, f"{count * row:,} bytes", came))
    _check_md5(path, content, cifar.binary_md5.get(stem))
    table = np.frombuffer(content, dtype=np.uint8).reshape(count, row)
    labels = table[:, cifar.label_bytes - 1]
    counts = np.bincount(labels, minlength=cifar.num_classes)
    if len(counts) > cifar.num_classes:
        raise DataError(_damaged(path, f"labels below {cifar.num_classes}", f"{int(labels.max())}"))
    if stem not in cifar.binary_md5 and counts.min() != counts.max():
        raise DataError(_damaged(path, "as many images of each class", f"{counts.min()} to {counts.max()}"))
    return table[:, cifar.label_bytes :].copy(), labels.copy()


def _read_python(
    path: Path, stem: str, count: int, cifar: Cifar
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `[count, 3072]` and labels `[count]` of one Python batch."""
    content = _content(path)
    _check_md5(path, content, cifar.python_md5[stem])
    try:
        batch = _ArrayReader(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch[cifar.label_key])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(_damaged(path, "a batch of images", f"{type(error).__name__}")) from error
    if pixels.shape != (count, _PIXELS) or pixels.dtype != np.uint8 or labels.shape != (count,):
        raise DataError(
            _damaged(path, f"{count} rows of {_PIXELS} bytes", f"{pixels.dtype} {list(pixels.shape)}")
        )
    return pixels, labels.astype(np.uint8)


class _ArrayReader(pickle.Unpickler):
    """Reads a pickle of plain values and arrays, and refuses every other object by name."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for; the names are those of the NumPy that wrote the batches."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise DataError(f"a batch of CIFAR needs no {module}.{name}; delete the file and get it again")
        return known[module, name]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _check_md5(path: Path, content: bytes, published: str | None) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if published is not None and found != published:
        raise DataError(_damaged(path, f"MD5 sum {published}", found))


def _damaged(path: Path, expected: str, came: str) -> str:
    """The sentence for a file that is not what it should be."""
    return f"{path} is damaged: expected {expected}, got {came}; delete it and get it again"
