"""Sums over the workers of a distributed run: each sees its own images, all get the curvature of all.

Every worker must compute the same curvature of the same network, over its own share of the images, at least one.
Where `torch.distributed` is not initialised, or has one worker, nothing happens.
"""

from __future__ import annotations

from torch import Tensor, distributed

__all__ = ["add_up_", "number_of_workers", "worker_seed"]


def number_of_workers() -> int:
    """Workers in the run."""
    return distributed.get_world_size() if _running() else 1


def worker_seed(seed: int) -> int:
    """A seed for this worker, so that no two draw the same numbers; the first worker keeps the one given."""
    rank = distributed.get_rank() if _running() else 0
    return (
        seed + rank * 0x9E3779B97F4A7C15
    ) % 2**63  # odd, and far from the small steps between a run's seeds


def add_up_(*tensors: Tensor) -> None:
    """Replace tensors by their sums over the workers.

    Args:
        tensors: of the same shapes on every worker, where the backend can read them.
    """
    if number_of_workers() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
