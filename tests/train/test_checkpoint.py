"""Checkpoints: round trip, damage, version, and the old content kept when writing fails."""

from __future__ import annotations

import os

import pytest
import torch

from sparsebayes.errors import RunError
from sparsebayes.train.checkpoint import read_checkpoint, write_atomically, write_checkpoint


def test_round_trip(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"epoch": 3, "weights": {"a": torch.arange(4.0)}, "name": "x"})
    state = read_checkpoint(path)
    assert state["epoch"] == 3
    assert state["name"] == "x"
    assert torch.equal(state["weights"]["a"], torch.arange(4.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing_and_damaged_files_are_named(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(RunError, match="no checkpoint to resume from"):
        read_checkpoint(path)
    write_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(RunError, match="is damaged and cannot be resumed from"):
        read_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "checkpoint.pt"
    torch.save({"version": 1, "evil": Evil()}, path)
    with pytest.raises(RunError, match="is damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_other_version_is_refused(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"version": 99}, path)
    with pytest.raises(RunError, match="version 99, expected 1"):
        read_checkpoint(path)


def test_unwritable_folder_is_one_sentence(tmp_path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "absent" / "file.json", "{}")
    with pytest.raises(RunError, match="cannot write"):
        write_checkpoint(tmp_path / "absent" / "checkpoint.pt", {})


def test_failed_write_keeps_the_old_content(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises((RunError, TypeError, AttributeError)):
        write_checkpoint(path, {"epoch": 2, "function": lambda: None})
    assert read_checkpoint(path)["epoch"] == 1
