"""One run on many processes: every process holds all images and the network, and works on its share of each batch.

Started by torchrun, all processes take the same steps: the same seeds draw the same batches, each process computes the
gradients of every W-th image of a batch of B, and one sum over the processes makes them those of the whole batch:

    gradient = sum over processes of  (n_r / B) * (gradient of the mean loss of its n_r images)

What decides anything is made equal, bit for bit, and not left to rounding: weights and buffers are the first process's
at the start of each phase, held-out losses and curvature are sums over all, scores and latencies are the first
process's, and each selection is compared. How the processes meet and share a run folder is in `processes.py`.

Without torchrun every function here does what a single process needs: nothing. A single process adds up what it has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsebayes.data.loader import Loader
from sparsebayes.errors import RunError
from sparsebayes.train.evaluation import Evaluation, evaluate

__all__ = [
    "LEAST_SHARE",
    "Share",
    "add_up_gradients_",
    "add_up_loss",
    "agree_on_norms_",
    "check_same",
    "evaluate_together",
    "from_first",
    "own_images",
    "running",
    "same_network_",
    "same_scores",
    "share_of",
]

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


def running() -> bool:
    """Whether this process has met others that it runs with."""
    return distributed.is_available() and distributed.is_initialized()


def share_of(count: int) -> Share:
    """This process's part of a batch; a batch too small to be shared is computed whole by all.

    Args:
        count: Images in the batch.
    """
    if not running() or count < LEAST_SHARE * distributed.get_world_size():
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
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if running() else (0, 1)
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
    if not running():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat.mul_(weight)
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def add_up_loss(total: Tensor) -> Tensor:
    """The sum over the processes of the weighted losses of their shares, a scalar."""
    if running():
        distributed.all_reduce(total)
    return total


def same_network_(model: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if running():
        for value in model.state_dict().values():
            _broadcast_(value)


def agree_on_norms_(model: nn.Module) -> None:
    """Average batch norm's running statistics over the processes, each of which has seen its own images."""
    if not running():
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
    if not running():
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
    if not running():
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
    if not running():
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
    if not running():
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


def _broadcast_(value: Tensor) -> None:
    """Replace a tensor of any layout by the first process's."""
    dense = value.detach().contiguous()
    distributed.broadcast(dense, 0)
    with torch.no_grad():
        value.copy_(dense)


def _count() -> int:
    return distributed.get_world_size() if running() else 1
