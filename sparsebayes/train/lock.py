"""One process at a time in a run folder: two that resume the same run would write over each other's points.

The lock is the operating system's own (`flock`), on the file `.lock` of the folder. It ends with the process that holds
it, however that dies, so that there is never a stale one to delete. The file says who holds it, for the sentence that
refuses.

    >>> with locked(folder):
    ...     work()
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sparsebayes.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "locked", "refuse_running"]

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder for the length of the block.

    Where the system, or the file system, knows no such locks, nothing is kept out.

    Raises:
        RunError: If another process works there, or the folder cannot be written.
    """
    path = folder / LOCK_FILE
    with _taken(path) as file:
        try:
            with contextlib.suppress(OSError):  # on a full disk it keeps others out as well
                file.truncate(0)
                file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
                file.flush()
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that was deleted meanwhile has none
                path.unlink()  # while it is still locked


def refuse_running(folder: Path) -> None:
    """Refuse a run folder that a process works in.

    Raises:
        RunError: If one does.
    """
    if (folder / LOCK_FILE).is_file():
        with locked(folder):
            pass


def _taken(path: Path) -> IO[str]:
    """The lock file, opened and locked."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
            raise RunError(
                f"{path.parent} is being worked on by {holder}; wait for it, or end it, before you resume or overwrite "
                "the run"
            ) from None
        except OSError:  # a file system without locks
            return file
        # The last holder may have deleted the file between our opening and our locking it.
        if path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
