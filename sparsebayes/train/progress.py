"""What a person sees while a run works: one line per step of the work, and on a terminal a bar with the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Reporter"]


class Reporter:
    """Prints lines, and on a terminal a progress bar; prints nothing when quiet.

    Args:
        quiet: Print nothing.
        console: Where to; None: standard output.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Reporter:
        if not self._quiet and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def line(self, text: str) -> None:
        """Print one line, with the seconds since the run began."""
        if not self._quiet:
            self._console.print(f"[{time.monotonic() - self._start:7.1f} s] {text}", markup=False)

    def phase(self, name: str, total: int) -> None:
        """Begin a bar of `total` steps, in place of the last one."""
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=max(total, 1))

    def step(self) -> None:
        """Move the bar one step on."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)
