"""SIGTERM as Ctrl-C while a run works, so that both leave a folder to resume from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparsebayes.errors import Terminated

__all__ = ["terminable"]


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C within the block; in another thread than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
