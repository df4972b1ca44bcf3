"""The image in the run folder that stands for the data at an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsebayes.errors import RunError
from sparsebayes.train.example import EXAMPLE_FILE, Example, read_example, write_example


def test_an_example_comes_back_as_it_was(tmp_path: Path) -> None:
    image = torch.randn(1, 2, 5, 4).to(memory_format=torch.channels_last)
    write_example(tmp_path, Example(image, (0.1, 0.2), (0.3, 1 / 3)))
    found = read_example(tmp_path)
    assert torch.equal(found.image, image)
    assert (found.mean, found.std) == ([0.1, 0.2], [0.3, 1 / 3])


def test_what_is_no_example_is_refused(tmp_path: Path) -> None:
    path = tmp_path / EXAMPLE_FILE
    with pytest.raises(RunError, match=r"safetensors is missing; resume the run, which writes it anew"):
        read_example(tmp_path)
    image = {"image": torch.zeros(1, 2, 5, 4)}
    about = {"mean": "[0, 0]", "std": "[1, 1]"}
    for tensors, metadata in (
        (image, None),
        (image, {"mean": "[0, 0]"}),
        (image, {**about, "std": "[1]"}),
        (image, {**about, "std": '["wide", 1]'}),
        (image, {**about, "mean": "3"}),
        (image, {**about, "mean": "[0,"}),
        ({"image": torch.zeros(2, 5, 4)}, about),
        ({"picture": torch.zeros(1, 2, 5, 4)}, about),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(RunError, match=r"safetensors is damaged \(.+\); resume the run"):
            read_example(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunError, match=r"safetensors is damaged \(.+\); resume the run"):
        read_example(tmp_path)
