"""Where the training phases of a compression can be resumed from.

>>> checkpoints = PhaseCheckpoints(folder, print)
>>> checkpoints.save("cycle 3", state)
>>> checkpoints.resumed("cycle 3") == state, checkpoints.resumed("cycle 4")
(True, None)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsebayes.train.checkpoint import phase_state, remove_checkpoints, write_checkpoint

__all__ = ["PhaseCheckpoints"]

SLOW_SAVE, SAVE_SHARE = 0.2, 0.05
"""Checkpoints that take more seconds than the first are written so rarely that they take this share of the time."""


class PhaseCheckpoints:
    """The state within the phase that is being trained.

    The training of a posterior has a file of its own: it outlives the training after the removal that it decides.

    Args:
        folder: The run folder.
        say: Told, in one sentence, when a checkpoint is damaged.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._next_save = 0.0  # time before which no checkpoint is written

    def save(self, phase: str, state: Mapping[str, Any]) -> None:
        """Keep the state after an epoch, unless writing it so often would slow down the training.

        Raises:
            RunError: If the folder cannot be written or the disk is full.
        """
        began = time.perf_counter()
        if began < self._next_save:
            return
        write_checkpoint(self._path(phase), {"phase": phase, "state": dict(state)})
        took = time.perf_counter() - began
        self._next_save = began + took / SAVE_SHARE if took > SLOW_SAVE else 0.0

    def resumed(self, phase: str) -> dict[str, Any] | None:
        """State of this very phase, if the run was interrupted within it; damage only costs the phase's epochs."""
        return phase_state(self._path(phase), phase, self._say)

    def remove(self) -> None:
        """Delete them all: the run is done."""
        for phase in ("training", "posterior"):
            remove_checkpoints(self._path(phase))

    def _path(self, phase: str) -> Path:
        return self._folder / ("posterior.pt" if phase.startswith("posterior") else "checkpoint.pt")
