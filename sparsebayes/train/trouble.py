"""What goes wrong with a machine rather than with a recipe, in a sentence: its memory is full, or its disk says no."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsebayes.errors import RunError, one_line

__all__ = ["machine_trouble"]

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How PyTorch says so where it has no class for it: on CPUs, and from libraries of the GPU's vendor."""


@contextmanager
def machine_trouble() -> Iterator[None]:
    """Turn a full memory, and files that cannot be read or written, into sentences.

    Raises:
        RunError: If one of both happened within the block.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads our output any more: the command line knows what to do
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(
            f"the run cannot go on ({where}{error.strerror or one_line(error)}); put that right, and continue it with "
            "--resume"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise RunError(
            f"the memory is full ({one_line(error, 160)}); lower data.batch_size, or run on a machine with more"
        ) from error


def _is_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error).lower() for words in NO_MEMORY)
