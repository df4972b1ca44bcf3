"""One run on many processes: every process holds all images and the network, and works on its share of each batch.

Started by torchrun, all processes take the same steps: the same seeds draw the same batches, each process computes the
gradients of every W-th image of a batch of B, and one sum over the processes makes them those of the whole batch:

    gradient = sum over processes of  (n_r / B) * (gradient of the mean loss of its n_r images)

What decides anything is made equal, bit for bit, and not left to rounding: weights and buffers are the first process's
at the start of each phase, held-out losses and curvature are sums over all, scores and latencies are the first
process's, and each selection is compared. The first process writes the run folder; the others work in a temporary
one, filled from it when a run is resumed, so that machines need not share a file system.

    torchrun --nproc-per-node 2 -m sparsebayes run lenet5_mnist --out runs/two

Without torchrun every function here does what a single process needs: nothing. A single process adds up what it has.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from sparsebayes.data.loader import Loader
from sparsebayes.errors import RecipeError, RunError, SparseBayesError, one_line
from sparsebayes.files import make_folder, write_atomically
from sparsebayes.launcher import launched
from sparsebayes.recipe import AnyRecipe, SearchRecipe
from sparsebayes.train.evaluation import Evaluation, evaluate

__all__ = [
    "Share",
    "add_up_gradients_",
    "add_up_loss",
    "agree_on_norms_",
    "check_same",
    "evaluate_together",
    "from_first",
    "in_turn",
    "join",
    "leave",
    "lost_connections",
    "own_images",
    "same_network_",
    "same_scores",
    "share_of",
    "shared_folder",
]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; torchrun ends all of them sooner when one has died."""
LEAST_SHARE = 2
"""Images of a batch that a process gets at least, since batch norm needs two; smaller batches are not shared."""


@dataclass(frozen=True)
class Share:
    """A process's part of one batch.

    Attributes:
        rows: Which of its images.
        weight: What their mean counts for in the mean of the whole batch; those of all processes sum to 1.
    """

    rows: slice
    weight: float


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
    if not _running():
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
    if not _running():
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
        if not _running() or not (
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
    if not _running():
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
    if not _running():
        return read()
    is_first = launched().local_rank == 0
    first = read() if is_first else None
    _wait_for_all()
    return first if first is not None else read()


def share_of(count: int) -> Share:
    """This process's part of a batch; a batch too small to be shared is computed whole by all.

    Args:
        count: Images in the batch.
    """
    if not _running() or count < LEAST_SHARE * distributed.get_world_size():
        return Share(slice(None), 1.0 / _count())
    rows = slice(distributed.get_rank(), None, distributed.get_world_size())
    return Share(rows, len(range(count)[rows]) / count)


def own_images(
    batches: Iterable[tuple[Tensor, Tensor]], num_images: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every W-th image, counted through all batches; every image in a single process.

    Args:
        batches: Pairs of images and labels, the same ones in every process.
        num_images: Deal out the first so many, and ask for no more; None: all.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if _running() else (0, 1)
    seen = 0
    for images, labels in batches:
        left = len(images) if num_images is None else min(len(images), num_images - seen)
        rows = slice((rank - seen) % world, left, world)
        seen += left
        if len(range(left)[rows]):
            yield images[rows], labels[rows]
        if num_images is not None and seen >= num_images:
            return


def add_up_gradients_(parameters: Sequence[Tensor], weight: float) -> None:
    """Turn the gradients of the own share into those of the whole batch, in one sum over the processes.

    Args:
        parameters: Those that are trained; the ones without a gradient must be the same in every process.
        weight: The share's.
    """
    if not _running():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat.mul_(weight)
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def add_up_loss(total: Tensor) -> Tensor:
    """The sum over the processes of the weighted losses of their shares, a scalar."""
    if _running():
        distributed.all_reduce(total)
    return total


def same_network_(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if _running():
        for value in model.state_dict().values():
            _broadcast_(value)


def agree_on_norms_(model: nn.Module) -> None:
    """Average batch norm's running statistics over the processes, each of which has seen its own images."""
    if not _running():
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value in (module.running_mean, module.running_var):
                if value is not None:
                    distributed.all_reduce(value)
                    value.div_(distributed.get_world_size())


def evaluate_together(model: nn.Module, loader: Loader) -> Evaluation:
    """Measure loss and error like `evaluate`, each process on its share; the result is the same in all.

    Means and spreads of the shares are put together in float64: only their rounding differs from a single process's.

    Args:
        model: The same network in every process.
        loader: The same images in every process.
    """
    if not _running():
        return evaluate(model, loader)
    shared = min(loader.num_data, loader.batch_size) >= distributed.get_world_size()
    own = evaluate(model, own_images(loader) if shared else loader)
    row = torch.tensor(
        [own.num_images, own.loss, own.standard_error, own.error, own.chance], dtype=torch.float64
    )
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, row)
    return _joined([tuple(r.tolist()) for r in rows] if shared else [tuple(rows[0].tolist())])


def from_first(measure: Callable[[], float]) -> float:
    """A number that only the first process measures; the others wait for it."""
    if not _running():
        return measure()
    value = torch.tensor(measure() if distributed.get_rank() == 0 else 0.0, dtype=torch.float64)
    distributed.broadcast(value, 0)
    return float(value)


def check_same(what: str, text: str) -> None:
    """Make sure that all processes have decided alike.

    Args:
        what: Names the decision.
        text: All of it.

    Raises:
        RunError: If they have not.
    """
    if not _running():
        return
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    own = torch.tensor(int.from_bytes(digest, "big", signed=True))
    all_of_them = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_of_them, own)
    other = [rank for rank, value in enumerate(all_of_them) if int(value) != int(all_of_them[0])]
    if other:
        raise RunError(
            f"expected the same {what} in every process, but process {other[0]} has another one than process 0; "
            "give all machines the same version of sparsebayes, PyTorch, model and data"
        )


def same_scores(score: Tensor) -> Tensor:
    """The first process's scores, of the same shape as the own ones; the own ones in a single process."""
    if not _running():
        return score
    agreed = score.clone()
    _broadcast_(agreed)
    return agreed


def _joined(parts: Sequence[tuple[float, ...]]) -> Evaluation:
    """The evaluation of all images from (images, loss, standard error, error, chance) of each share."""
    total = sum(part[0] for part in parts)
    loss = sum(n * mean for n, mean, *_ in parts) / total
    error = sum(part[0] * part[3] for part in parts) / total
    # A standard error is s / sqrt(n - 1) with the spread s over n images.
    squares = sum(n * (se * se * max(n - 1, 1) + (mean - loss) ** 2) for n, mean, se, *_ in parts)
    spread = math.sqrt(squares / total / max(total - 1, 1))
    return Evaluation(loss, spread, error, int(total), parts[0][4])


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


def _broadcast_(value: Tensor) -> None:
    """Replace a tensor of any layout by the first process's."""
    dense = value.detach().contiguous()
    distributed.broadcast(dense, 0)
    with torch.no_grad():
        value.copy_(dense)


def _count() -> int:
    return distributed.get_world_size() if _running() else 1


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
