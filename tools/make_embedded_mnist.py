"""Make sparsebayes/data/embedded/mnist.npz: a small class-balanced sample of MNIST.

    python tools/make_embedded_mnist.py ROOT

ROOT/MNIST/raw holds the four idx files. Of each class, 1,000 training images and 200 test images are taken:
those whose position in MNIST has the smallest SHA-256, so that the choice depends on no random number
library. They keep their original order. The file is byte for byte the same each time it is made with one
version of NumPy and zlib.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch

from sparsebayes.data import Images, load

TARGET = Path(__file__).resolve().parents[1] / "sparsebayes" / "data" / "embedded" / "mnist.npz"


def choose(images: Images, part: str, per_class: int) -> Images:
    """The sample of one part, in original order: `per_class` images of each class."""
    chosen: list[int] = []
    for label in range(10):
        positions = torch.nonzero(images.labels == label).flatten().tolist()
        positions.sort(key=lambda position: hashlib.sha256(f"{part}:{position}".encode()).digest())
        chosen += positions[:per_class]
    return images.subset(torch.tensor(sorted(chosen)))


def sample(root: Path) -> dict[str, np.ndarray]:
    """The arrays of the embedded file: images uint8 `[N, 28, 28]`, labels uint8 `[N]`, for train and test."""
    mnist = load("mnist", root=root)
    parts = {"train": choose(mnist.train, "train", 1000), "test": choose(mnist.test, "test", 200)}
    arrays = {}
    for name, part in parts.items():
        arrays[f"{name}_images"] = part.images.squeeze(1).numpy()
        arrays[f"{name}_labels"] = part.labels.numpy().astype(np.uint8)
    return arrays


def main() -> None:
    """Write the file and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    arguments = parser.parse_args()
    TARGET.parent.mkdir(exist_ok=True)
    arrays = sample(arguments.root)
    np.savez_compressed(
        TARGET,
        train_images=arrays["train_images"],
        train_labels=arrays["train_labels"],
        test_images=arrays["test_images"],
        test_labels=arrays["test_labels"],
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
