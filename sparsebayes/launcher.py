"""What torchrun tells each process that it starts, read from the environment: which one it is, and of how many.

Needs no torch, so that the command line can ask before anything is loaded.

    >>> launched()                     # without torchrun: the only process there is
    Process(rank=0, count=1, local_rank=0, restarts=0)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Process", "launched"]


@dataclass(frozen=True)
class Process:
    """One of the processes of a run.

    Attributes:
        rank: Its number among all; the first one, 0, writes and reports.
        count: How many there are, on all machines together.
        local_rank: Its number on its machine, which is also that of its GPU.
        restarts: How often torchrun has started all of them anew.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes the run folder and prints."""
        return self.rank == 0


def launched() -> Process:
    """This process, as torchrun numbered it; the only one where another program started it."""
    # Other launchers set RANK as well, for purposes of their own.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Process()

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Process(
        number("RANK", 0),
        number("WORLD_SIZE", 1),
        number("LOCAL_RANK", 0),
        number("TORCHELASTIC_RESTART_COUNT", 0),
    )
