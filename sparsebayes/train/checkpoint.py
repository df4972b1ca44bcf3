"""Checkpoints that survive a kill at any moment: written aside, flushed, then renamed over the old one.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries. It is read with `weights_only`, so
that nothing in the file is executed, and it carries a version, so that an old one is refused by name.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsebayes.errors import RunError

__all__ = ["read_checkpoint", "write_atomically", "write_checkpoint"]

VERSION = 1


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        RunError: If the folder cannot be written or the disk is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: Where to; replaced if it exists.
        state: Tensors, numbers, strings, lists and dictionaries only.

    Raises:
        RunError: If the folder cannot be written or the disk is full.
    """
    # In memory first: an interruption inside torch.save surfaces as an error of the file, not of the interruption.
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, tensors on the CPU.

    Raises:
        RunError: If the file is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise RunError(f"{path.parent} holds no checkpoint to resume from; expected the file {path.name}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise RunError(
            f"{path} is damaged and cannot be resumed from ({type(error).__name__}); start the run anew"
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise RunError(f"{path} is a checkpoint of version {found}, expected {VERSION}; start the run anew")
    return state
