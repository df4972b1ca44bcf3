"""idx files: read as they are, and every kind of damage answered in one sentence."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from sparsebayes.data.idx import find_idx, read_images
from sparsebayes.errors import DataError

PIXELS = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
LABELS = torch.tensor([7, 0, 9])
IMAGE_BYTES = struct.pack(">4I", 0x803, 3, 4, 5) + bytes(PIXELS.flatten().tolist())
LABEL_BYTES = struct.pack(">2I", 0x801, 3) + bytes(LABELS.tolist())


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_what_was_written(tmp_path: Path, suffix: str) -> None:
    images = write(tmp_path / f"images{suffix}", IMAGE_BYTES)
    labels = write(tmp_path / f"labels{suffix}", LABEL_BYTES)
    found = read_images(images, labels)
    assert torch.equal(found.images, PIXELS.unsqueeze(1))
    assert torch.equal(found.labels, LABELS)
    assert found.labels.dtype == torch.int64


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "expected a header of 16 bytes, got 0 bytes"),
        (IMAGE_BYTES[:15], "expected a header of 16 bytes, got 15 bytes"),
        (IMAGE_BYTES[:-1], "expected 60 bytes after the header, got only 59"),
        (IMAGE_BYTES[:16], "expected 60 bytes after the header, got only 0"),
        (IMAGE_BYTES + b"!", "expected 60 bytes after the header, got more"),
        (LABEL_BYTES + bytes(20), "expected magic number 0x00000803, got 0x00000801"),
        (b"<html>404 not found</html>", "expected magic number 0x00000803, got 0x3c68746d"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "a header with a plausible size"),
        (struct.pack(">4I", 0x803, 0, 28, 28), r"a header with a plausible size, got \[0, 28, 28\]"),
    ],
)
def test_damage_is_named(tmp_path: Path, suffix: str, content: bytes, text: str) -> None:
    images = write(tmp_path / f"images{suffix}", content)
    labels = write(tmp_path / "labels", LABEL_BYTES)
    with pytest.raises(DataError, match=f"images{suffix} is damaged: .*{text}.*; delete it and get it again"):
        read_images(images, labels)


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
def test_a_truncated_gzip_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(IMAGE_BYTES)[:-cut])
    with pytest.raises(DataError, match=r"images\.gz is damaged"):
        read_images(path, write(tmp_path / "labels", LABEL_BYTES))


@pytest.mark.parametrize("position", [0, 20, -6])
def test_a_changed_gzip_is_named(tmp_path: Path, position: int) -> None:
    content = bytearray(gzip.compress(IMAGE_BYTES))
    content[position] ^= 0xFF
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"images\.gz is damaged"):
        read_images(tmp_path / "images.gz", write(tmp_path / "labels", LABEL_BYTES))


def test_different_counts_are_refused(tmp_path: Path) -> None:
    labels = write(tmp_path / "labels", struct.pack(">2I", 0x801, 2) + b"\x01\x02")
    with pytest.raises(DataError, match=r"holds 3 images and .* 2 labels; they do not belong together"):
        read_images(write(tmp_path / "images", IMAGE_BYTES), labels)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent cannot be read: No such file"):
        read_images(tmp_path / "absent", tmp_path / "labels")


def test_finds_raw_before_gzip(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "images") is None
    write(tmp_path / "images.gz", b"")
    assert find_idx(tmp_path, "images") == tmp_path / "images.gz"
    write(tmp_path / "images", b"")
    assert find_idx(tmp_path, "images") == tmp_path / "images"
