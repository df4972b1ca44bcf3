"""Checkpoints that survive a kill at any moment: written aside, flushed, then renamed over the old one.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries. Its first line names the version of
the format and a digest of what follows, so that a single changed bit is found, and it is read with `weights_only`, so
that nothing in the file is executed. The checkpoint before the last is kept beside it and takes over from a damaged
one: since every epoch draws from its own random stream, going on from an older state ends in the same numbers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically

__all__ = ["phase_state", "read_checkpoint", "remove_checkpoints", "write_checkpoint"]

VERSION = 3
HEAD = "sparsebayes checkpoint"
MOST_HEAD = 200
"""Bytes within which the first line ends."""


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; the one that was there is kept beside it.

    Args:
        path: Where to.
        state: Tensors, numbers, strings, lists and dictionaries only.

    Raises:
        RunError: If the folder cannot be written or the disk is full; then both are as they were.
    """
    # In memory first: an interruption inside torch.save surfaces as an error of the file, not of the interruption.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    head = f"{HEAD} {VERSION} {_digest(content)}\n".encode()
    write_atomically(path, head + content, keep=_earlier(path))


def remove_checkpoints(path: Path) -> None:
    """Delete a checkpoint and the one before it, where they are."""
    for file in (path, _earlier(path)):
        file.unlink(missing_ok=True)


def read_checkpoint(path: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, tensors on the CPU; from a damaged file the one before it.

    Args:
        path: The checkpoint.
        say: Told, in one sentence, when the earlier one is taken.

    Returns:
        The state.

    Raises:
        RunError: If both are missing, damaged, or of another version.
    """
    earlier = _earlier(path)
    try:
        return _read(path)
    except RunError as error:
        if not earlier.is_file():
            raise
        state = _read(earlier)
        if say is not None:
            say(f"{error}; {earlier.name}, an epoch or more older, is used instead")
        return state


def phase_state(path: Path, phase: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """State to go on from within a phase; None if it has to begin anew, which only costs its epochs.

    Args:
        path: The checkpoint, of the form ``{"phase": name, "state": {...}}``.
        phase: Name of the phase that is to go on.
        say: Told, in one sentence, when a checkpoint is damaged.

    Returns:
        The state; None where there is no checkpoint, or none of this phase that can be read.
    """
    if not path.is_file() and not _earlier(path).is_file():
        return None
    try:
        checkpoint = read_checkpoint(path, say)
    except RunError as error:
        say(f"{error}; the phase {phase!r} begins again")
        return None
    if checkpoint.get("phase") != phase:
        return None
    state: dict[str, Any] = checkpoint["state"]
    return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"{path.parent} holds no checkpoint to resume from; expected the file {path.name}")
    try:
        file = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    line, _, content = file[:MOST_HEAD].partition(b"\n")
    content = file[len(line) + 1 :]
    words = line.decode("ascii", "replace").split(" ")
    if " ".join(words[:-2]) != HEAD:
        raise RunError(f"{path} is damaged: its first line is not that of a checkpoint")
    if words[-2] != str(VERSION):
        raise RunError(
            f"{path} is a checkpoint of version {words[-2]!r}, expected {VERSION}; start the run anew"
        )
    if words[-1] != _digest(content):
        raise RunError(f"{path} is damaged: its content does not have the digest in its first line")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # only a file made to deceive comes here; its unpickler may raise anything
        raise RunError(f"{path} is damaged and cannot be read ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise RunError(f"{path} is damaged: it holds a {type(state).__name__}, not a state")
    return state


def _earlier(path: Path) -> Path:
    """Where the checkpoint before the last is kept: checkpoint.pt, checkpoint.earlier.pt."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
