"""The idx files of MNIST: a big-endian header, then one byte for each pixel or label.

Format: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits". Header of images:
    magic
0x00000803, number of images, rows, columns; of labels: magic 0x00000801, number of labels; each a 32-bit
integer.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sparsebayes.data.images import Images
from sparsebayes.errors import DataError

__all__ = ["find_idx", "read_images"]

_IMAGES, _LABELS = 0x00000803, 0x00000801

# A header that asks for more is damaged; reading would only fill the memory before it fails.
_MAX_BYTES = 2**31


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file `stem` in `folder`, or its gzip `stem.gz`; None where there is neither."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    return None


def read_images(images: Path, labels: Path) -> Images:
    """Read an idx file of grey images and the one of their labels.

    Args:
        images: path of the images, raw or gzip (name ends in .gz).
        labels: path of the labels, likewise.

    Returns:
        Images of shape `[N, 1, H, W]`.

    Raises:
        DataError: a file cannot be read, is truncated, too long, damaged or of another kind, or the two
            differ in the number of items.
    """
    pixels = _read(images, _IMAGES)  # [N, H, W]
    classes = _read(labels, _LABELS)  # [N]
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} holds {len(pixels)} images and {labels} {len(classes)} labels; "
            "they do not belong together: delete both and get them again"
        )
    return Images(pixels.unsqueeze(1), classes.to(torch.int64))


def _read(path: Path, magic: int) -> Tensor:
    """The array in one idx file: uint8 of shape `[N, H, W]` for images, `[N]` for labels."""
    num_dims = magic & 0xFF
    header_bytes = 4 + 4 * num_dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise DataError(_damaged(path, f"a header of {header_bytes} bytes", f"{len(header)} bytes"))
            found, *shape = struct.unpack(f">{1 + num_dims}I", header)
            if found != magic:
                raise DataError(_damaged(path, f"magic number {magic:#010x}", f"{found:#010x}"))
            size = 1
            for length in shape:
                size *= length
            if not 0 < size <= _MAX_BYTES:
                raise DataError(_damaged(path, "a header with a plausible size", f"{shape}"))
            content = file.read(size + 1)  # one more: a longer file is damaged too
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(_damaged(path, "a complete gzip file", str(error))) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if len(content) != size:
        came = f"only {len(content)}" if len(content) < size else "more"
        raise DataError(_damaged(path, f"{size} bytes after the header", came))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)


def _damaged(path: Path, expected: str, came: str) -> str:
    """The sentence for a file that is not what it should be."""
    return f"{path} is damaged: expected {expected}, got {came}; delete it and get it again"
