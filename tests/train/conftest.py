"""A task of the user's own that a network learns in seconds: which of three corners of an image is bright."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CORNERS = """
import torch
from torch import nn
from sparsebayes.data import Dataset, Images

def corners(seed, num):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    images = torch.randint(0, 90, (num, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for label, (row, column) in enumerate([(0, 0), (0, 4), (4, 0)]):
        images[labels == label, :, row:row + 4, column:column + 4] += 100
    return Images(images, labels)

def data(num=300):
    return Dataset("corners", corners(0, num), corners(1, 120), 3, (0.3,), (0.3,))
"""
"""Source of a module with the data; models are added to it."""


@pytest.fixture
def corners_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Makes `CORNERS` and more code a module of the given name, importable from the folder where the test works."""
    made = []

    def make(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(CORNERS + code)
        made.append(name)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield make
    for name in made:
        sys.modules.pop(name, None)
