"""Files that are whole or not there, and one sentence when a disk says no.

    >>> write_atomically(folder / "report.json", text)          # readers see the old content or the new, never a part
    >>> append_line(folder / "metrics.jsonl", row)

What this package writes itself goes through here (the ONNX exporter writes on its own): beside its place, flushed to
the disk, then renamed over the old file, so that a kill or a power cut at any moment leaves one of the two.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sparsebayes.errors import RunError

__all__ = ["append_line", "copy_file", "make_folder", "write_atomically"]


def write_atomically(path: Path, content: bytes | str, *, keep: Path | None = None) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Args:
        path: The file; its folder exists.
        content: What it holds afterwards; text as UTF-8, with the line ends that it has.
        keep: Where the old file is moved once the new one is on the disk; None: it is replaced.

    Raises:
        RunError: If the folder cannot be written or the disk is full; then the old file is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.is_file():
            path.replace(keep)
        aside.replace(path)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def append_line(path: Path, line: str) -> None:
    """Write one more line at the end of a text file, which is made if there is none.

    Raises:
        RunError: If the file cannot be written or the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _refused(path, error) from None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, whole or not at all; what was at `target` is replaced.

    Raises:
        RunError: If one cannot be read, or the other not be written.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise RunError(f"{source} cannot be read: {error.strerror or error}") from None
    write_atomically(target, content)


def make_folder(path: Path) -> None:
    """Make a folder with those around it, if it is not there.

    Raises:
        RunError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(path, error) from None


def _refused(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror or error}")
