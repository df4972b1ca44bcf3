"""How the processes of one run meet, part, and share a run folder.

    torchrun --nproc-per-node 2 -m sparsebayes run lenet5_mnist --out runs/two

The first process writes the run folder; the others work in a temporary one, filled from it when a run is resumed, so
that machines need not share a file system. What they compute together is in `distributed.py`. Without torchrun every
function here does what a single process needs: nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sparsebayes.errors import RecipeError, RunError, SparseBayesError, one_line
from sparsebayes.files import make_folder, write_atomically
from sparsebayes.launcher import launched
from sparsebayes.recipe import AnyRecipe, SearchRecipe
from sparsebayes.train.distributed import LEAST_SHARE, running

__all__ = ["in_turn", "join", "leave", "lost_connections", "shared_folder"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; torchrun ends all of them sooner when one has died."""


def join(recipe: AnyRecipe) -> bool:
    """Meet the other processes that torchrun has started; does nothing in a single process.

    Args:
        recipe: What they are to run together.

    Returns:
        Whether this is the process that writes and reports.

    Raises:
        RecipeError: If the recipe cannot be shared among processes.
        RunError: If the others cannot be reached.
    """
    process = launched()
    if process.count == 1:
        return True
    _check_recipe(recipe, process.count)
    backend = "gloo"
    if recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available()):
        if process.local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"process {process.local_rank} of this machine has no GPU of its own, as there are "
                f"{torch.cuda.device_count()}; start torchrun with --nproc-per-node {torch.cuda.device_count()}, or "
                "run with --device cpu"
            )
        torch.cuda.set_device(process.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not running():
        try:
            store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps the addresses of processes that died: those of this start must not be mixed with them.
            store = PrefixStore(f"start {process.restarts}", store)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the processes of the run do not find each other: {one_line(error)}") from None
    return process.is_first


def leave() -> bool:
    """Part from the other processes, once all have come this far.

    The first process goes on alone: while it measures latencies, no other one takes its processors.

    Returns:
        Whether this is the first process.
    """
    if not running():
        return True
    is_first = distributed.get_rank() == 0
    _wait_for_all()
    distributed.destroy_process_group()
    return is_first


@contextmanager
def lost_connections() -> Iterator[None]:
    """Say in a sentence that another process is gone, which a process learns from a sum that never comes.

    Raises:
        RunError: If a connection broke off within the block.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not running() or not (
            isinstance(error, distributed.DistError) or "gloo" in text or "connection" in text
        ):
            raise
        raise RunError(
            f"another process of the run is gone ({one_line(error, 120)}); the run folder keeps the last checkpoint: "
            "start the same command again with --resume and the run folder"
        ) from None


@contextmanager
def shared_folder(open_folder: Callable[[], Path]) -> Iterator[Path]:
    """The run folder for the first process; for the others a temporary one with the same state.

    Args:
        open_folder: Makes or checks the run folder; called by the first process alone.

    Raises:
        RunError: If the first process could not open it.
    """
    if not running():
        yield open_folder()
        return
    if distributed.get_rank() == 0:
        try:
            folder = open_folder()
        except SparseBayesError as error:
            _send(str(error).encode())
            raise
        _send(b" ")
        paths = [folder / "pareto.json", *folder.glob("checkpoint*.pt"), *(folder / "points").rglob("*")]
        files = {
            path.relative_to(folder).as_posix(): torch.frombuffer(
                bytearray(path.read_bytes()), dtype=torch.uint8
            )
            for path in paths
            if path.is_file() and path.stat().st_size
        }
        _send(pack(files))
        yield folder
        return
    problem = _received().decode().strip()
    if problem:
        raise RunError(problem)
    files = unpack(_received())
    with tempfile.TemporaryDirectory(prefix="sparsebayes-process-") as name:
        for path, data in files.items():
            file = Path(name) / path
            make_folder(file.parent)
            write_atomically(file, data.numpy().tobytes())
        yield Path(name)


def in_turn(read: Callable[[], T]) -> T:
    """Read a file that may have to be downloaded first: one process of each machine before its others."""
    if not running():
        return read()
    is_first = launched().local_rank == 0
    first = read() if is_first else None
    _wait_for_all()
    return first if first is not None else read()


def _check_recipe(recipe: AnyRecipe, count: int) -> None:
    """Refuse what is not shared among processes."""
    if isinstance(recipe, SearchRecipe) or recipe.posterior != "laplace":
        came = "task: search" if isinstance(recipe, SearchRecipe) else f"posterior: {recipe.posterior}"
        raise RecipeError(
            f"expected task: compress with posterior: laplace under torchrun with {count} processes, got {came}; "
            "start it without torchrun"
        )
    least = {"data.batch_size": (recipe.data.batch_size, LEAST_SHARE * count)}
    least["curvature.num_images"] = (recipe.curvature.likely_images, count)
    for key, (value, bound) in least.items():
        if value < bound:
            raise RecipeError(
                f"{key} is {value}, but {count} processes share it and need at least {bound}; raise it, or start "
                "fewer processes"
            )


def _wait_for_all() -> None:
    """Go on when all processes have come here; a sum on the CPU, which spares the devices."""
    distributed.all_reduce(torch.zeros(()))


def _send(content: bytes) -> None:
    """Give the other processes some bytes."""
    distributed.broadcast(torch.tensor(len(content)), 0)
    distributed.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0)


def _received() -> bytes:
    """The bytes of the first process's `_send`."""
    size = torch.tensor(0)
    distributed.broadcast(size, 0)
    content = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(content, 0)
    return content.numpy().tobytes()
