"""Checkpoints: round trip, damage, version, and the old content kept when writing fails."""

from __future__ import annotations

import hashlib
import io
import os

import pytest
import torch

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically
from sparsebayes.train.checkpoint import (
    HEAD,
    VERSION,
    phase_state,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)


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
    good = path.read_bytes()
    path.write_bytes(good[:700])
    with pytest.raises(RunError, match="is damaged: its content does not have the digest"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(RunError, match="is damaged: its first line is not that of a checkpoint"):
        read_checkpoint(path)


def test_every_changed_bit_is_found(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"weights": torch.zeros(8)})
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(RunError, match=r"is damaged|of version"):
            read_checkpoint(path)


def test_the_checkpoint_before_takes_over_from_a_damaged_one(tmp_path) -> None:
    path, said = tmp_path / "checkpoint.pt", []
    for epoch in (1, 2, 3):
        write_checkpoint(path, {"epoch": epoch})
    assert read_checkpoint(path, said.append)["epoch"] == 3
    assert said == []
    path.write_bytes(path.read_bytes()[:-1])
    assert read_checkpoint(path, said.append)["epoch"] == 2
    assert len(said) == 1 and "checkpoint.earlier.pt, an epoch or more older, is used instead" in said[0]
    path.unlink()  # a kill between the two renames
    assert read_checkpoint(path)["epoch"] == 2
    (tmp_path / "checkpoint.earlier.pt").write_bytes(b"x")
    with pytest.raises(RunError, match=r"checkpoint\.earlier\.pt is damaged"):
        read_checkpoint(path)
    remove_checkpoints(path)
    assert list(tmp_path.iterdir()) == []


def test_a_phase_goes_on_from_its_own_state_only(tmp_path) -> None:
    path, said = tmp_path / "checkpoint.pt", []
    assert phase_state(path, "cycle 1", said.append) is None
    write_checkpoint(path, {"phase": "cycle 1", "state": {"epoch": 4}})
    assert phase_state(path, "cycle 1", said.append) == {"epoch": 4}
    assert phase_state(path, "cycle 2", said.append) is None
    assert said == []
    path.write_bytes(b"")
    assert phase_state(path, "cycle 1", said.append) is None
    assert len(said) == 1 and said[0].endswith("the phase 'cycle 1' begins again")


def forged(path, state: object) -> None:
    """A file with the right first line around anything."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digest = hashlib.blake2b(buffer.getvalue(), digest_size=16).hexdigest()
    path.write_bytes(f"{HEAD} {VERSION} {digest}\n".encode() + buffer.getvalue())


def test_code_in_a_checkpoint_is_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "checkpoint.pt"
    forged(path, {"evil": Evil()})
    with pytest.raises(RunError, match="is damaged and cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    forged(path, [1])
    with pytest.raises(RunError, match="it holds a list, not a state"):
        read_checkpoint(path)


def test_other_version_is_refused(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"sparsebayes checkpoint 99 00\n")
    with pytest.raises(RunError, match=f"version '99', expected {VERSION}"):
        read_checkpoint(path)


def test_unwritable_folder_is_one_sentence(tmp_path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "absent" / "file.json", "{}")
    with pytest.raises(RunError, match="cannot write"):
        write_checkpoint(tmp_path / "absent" / "checkpoint.pt", {})


def test_a_full_disk_costs_neither_of_two_checkpoints(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2):
        write_checkpoint(path, {"epoch": epoch})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*checkpoint\.pt: No space left on device"):
        write_checkpoint(path, {"epoch": 3})
    assert read_checkpoint(path)["epoch"] == 2
    assert read_checkpoint(tmp_path / "checkpoint.earlier.pt")["epoch"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.earlier.pt", "checkpoint.pt"]


def test_failed_write_keeps_the_old_content(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises((RunError, TypeError, AttributeError)):
        write_checkpoint(path, {"epoch": 2, "function": lambda: None})
    assert read_checkpoint(path)["epoch"] == 1
