"""Where the time of a run goes, by kind of work.

    >>> watch = Stopwatch()
    >>> with watch.of("update"):
    ...     with watch.of("curvature"):
    ...         rows = gate_rows(...)
    ...     survives = joint_survival(...)
    >>> watch.seconds
    {'curvature': 1.9, 'update': 0.1}

Work inside of other work counts as its own kind alone, so that the kinds add up to the time that was watched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, final

import torch

__all__ = ["Kind", "Phase", "Stopwatch"]

Kind = Literal["training", "evaluation", "curvature", "update", "compaction", "export"]
"""Kinds of work. "evaluation" is that on held-out images, "update" what is believed of the groups and the choice that
follows from it; "compaction" cuts, checks the cut network against the masked one, and estimates its batch norms anew;
"export" reads the test set, and writes, checks and times the files."""

Phase = Literal["pretrain", "cycles", "finetune", "search", "retrain", "compress", "export"]
"""Phases of a run, which a second stopwatch adds up."""


@final
class Stopwatch:
    """Adds up seconds on the wall by kind of work, or by phase.

    Args:
        seconds: those of earlier parts of the run.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = dict(seconds or {})
        self._kinds: list[Kind | Phase] = []
        self._since = 0.0

    @contextmanager
    def of(self, kind: Kind | Phase) -> Iterator[None]:
        """Count what is done inside as work of a kind."""
        self._charge()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._kinds.pop()

    def now(self) -> dict[str, float]:
        """Seconds by kind of work, those of the work that goes on included."""
        self._charge()
        return dict(self.seconds)

    def _charge(self) -> None:
        """Charge the time since the last change of work to the work that ends or is left here."""
        # What was only queued would count as the next work.
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._kinds:
            kind = self._kinds[-1]
            self.seconds[kind] = self.seconds.get(kind, 0.0) + now - self._since
        self._since = now
