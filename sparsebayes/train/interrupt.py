"""SIGTERM, and the end of the terminal, as Ctrl-C while a run works, so that all leave a folder to resume from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparsebayes.errors import Terminated

__all__ = ["terminable"]

NAMES = ("SIGTERM", "SIGHUP")
"""Windows knows the first alone."""


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C within the block; in another thread than the main one, do nothing.

    Under `nohup` the end of the terminal stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    numbers = [number for name, number in signal.Signals.__members__.items() if name in NAMES]
    heeded = [n for n in numbers if n == signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
