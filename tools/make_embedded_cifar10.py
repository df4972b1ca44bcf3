"""Make sparsebayes/data/embedded/cifar10.npz: a small class-balanced sample of CIFAR-10.

    python tools/make_embedded_cifar10.py ROOT

ROOT/cifar-10-batches-bin holds the six official binary batches. Of each class, 230 training images and 50 test images
are taken: those whose position in CIFAR-10 has the smallest SHA-256, so that the choice depends on no random number
library. They keep their original order. Pixels are stored as two lossless WebP pictures that hold the images in rows of
fifty, which takes about half the bytes of a compressed array.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparsebayes.data import Images, load

TARGET = Path(__file__).resolve().parents[1] / "sparsebayes" / "data" / "embedded" / "cifar10.npz"
COLUMNS = 50


def choose(images: Images, part: str, per_class: int) -> Images:
    """The sample of one part, in original order: `per_class` images of each class."""
    chosen: list[int] = []
    for label in range(10):
        positions = torch.nonzero(images.labels == label).flatten().tolist()
        positions.sort(key=lambda position: hashlib.sha256(f"{part}:{position}".encode()).digest())
        chosen += positions[:per_class]
    return images.subset(torch.tensor(sorted(chosen)))


def sample(root: Path) -> dict[str, Images]:
    """What the embedded file holds, by part."""
    cifar10 = load("cifar10", root=root)
    return {"train": choose(cifar10.train, "train", 230), "test": choose(cifar10.test, "test", 50)}


def webp(images: Images) -> np.ndarray:
    """The images as one lossless WebP picture, in rows of fifty: uint8 of shape `[bytes]`."""
    tiles = images.images.reshape(-1, COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2)  # [rows, 32, 50, 32, 3]
    buffer = io.BytesIO()
    picture = Image.fromarray(tiles.reshape(-1, COLUMNS * 32, 3).numpy())
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def main() -> None:
    """Write the file and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parts = sample(parser.parse_args().root)
    np.savez(
        TARGET,
        train_webp=webp(parts["train"]),
        train_labels=parts["train"].labels.numpy().astype(np.uint8),
        test_webp=webp(parts["test"]),
        test_labels=parts["test"].labels.numpy().astype(np.uint8),
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
