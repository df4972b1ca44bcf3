"""Train one network for one phase, keep its best state, and step back when it collapses.

A phase is a number of epochs under one learning-rate cycle. Small networks die at the rate that suits the dense one, so
a phase that ends in chance or in NaN is begun again at a third of its rate, and a phase never ends worse than it began
where that is asked for (``keep_best``).

Every epoch draws from its own random stream and its end can be saved, so an interrupted phase goes on to the very
numbers of an unbroken one.

No step waits for the device: losses are added up there and read once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsebayes.curvature.workers import worker_seed
from sparsebayes.data.loader import Loader
from sparsebayes.errors import NumericsError
from sparsebayes.recipe.schema import TrainSection
from sparsebayes.train.distributed import (
    add_up_gradients_,
    add_up_loss,
    agree_on_norms_,
    evaluate_together,
    same_network_,
    share_of,
)
from sparsebayes.train.evaluation import Evaluation, check_logits
from sparsebayes.train.objective import SoftTargets, fast_layout_, objective, soft_targets, training_forward
from sparsebayes.train.schedule import one_cycle
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Stopwatch

__all__ = ["Epoch", "Phase", "fast_layout_", "fit_"]

ATTEMPTS = 4
"""Learning rates that a phase tries: its own, then each a third of the last."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training.

    Attributes:
        name: Names the phase's random stream and its records.
        epochs: Passes over the training images; 0 leaves the network as it is.
        lr: Highest learning rate.
        seed: The run's seed.
        keep_best: End with the best state by held-out loss, the first one included, instead of the last.
        reference: Held-out loss that the network had before it was disturbed; None if it never learned anything.
    """

    name: str
    epochs: int
    lr: float
    seed: int
    keep_best: bool = False
    reference: float | None = None


@dataclass(frozen=True)
class Epoch:
    """What one epoch did.

    Attributes:
        epoch: 1-based number within the phase.
        lr: Highest rate of the phase's present attempt.
        train_loss: Mean training loss of an image over the epoch, in nats.
        heldout: The network on the held-out images after the epoch.
    """

    epoch: int
    lr: float
    train_loss: float
    heldout: Evaluation


def fit_(
    model: nn.Module,
    loader: Loader,
    heldout: Loader,
    phase: Phase,
    settings: TrainSection,
    *,
    teacher: Tensor | nn.Module | None = None,
    after_step: Callable[[float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    resume: Mapping[str, Any] | None = None,
    extra_loss: Callable[[Tensor], Tensor] | None = None,
    watch: Stopwatch | None = None,
) -> Evaluation:
    """Train `model` in place.

    Args:
        model: The network; ends in training mode as it came.
        loader: Training images.
        heldout: Images for decisions: not trained on, and not the test set.
        phase: What to do.
        settings: Optimizer and loss.
        teacher: What to learn from beside the labels: logits for every training image, of shape ``[N, C]``, or a
            network that is asked for those of each batch, as augmented; None: labels only.
        after_step: Called with the step's learning rate after every step (masks, proximal shrinkage).
        on_epoch: Called after every epoch.
        save: Called after every epoch with the state to resume from.
        resume: Such a state: the phase goes on after its epoch.
        extra_loss: Given a batch's labels after the forward pass, what to add to its loss (an auxiliary classifier).
        watch: Told which time went into training, and which into evaluation.

    Returns:
        The network on the held-out images as it ends.

    Raises:
        NumericsError: If the network collapses at every rate that is tried.
        ModelError: If its outputs do not fit the labels.
    """
    watch = watch or Stopwatch()

    def judge() -> Evaluation:
        with watch.of("evaluation"):
            return evaluate_together(model, heldout)

    fast_layout_(model)
    same_network_(model)
    initial = _copy(model)
    start = judge()
    if phase.epochs == 0:
        return start
    fresh = {"epoch": 0, "initial": initial, "best": initial, "start": start.loss, "best_loss": start.loss}
    state: dict[str, Any] = {"attempt": 0, **fresh} if resume is None else dict(resume)
    targets = None if teacher is None else soft_targets(teacher, settings)
    for attempt in range(state["attempt"], ATTEMPTS):
        with watch.of("training"):
            ended = _attempt(
                model, loader, judge, phase, settings, state, targets, after_step, on_epoch, save, extra_loss
            )
        if ended is not None:
            return ended
        _restore_(model, state["initial"])
        fresh = {"initial": state["initial"], "best": state["initial"], "start": state["start"]}
        state = {"attempt": attempt + 1, "epoch": 0, **fresh, "best_loss": state["start"]}
    raise NumericsError(
        f"the network collapsed in phase {phase.name!r} at every learning rate from {phase.lr:g} down to "
        f"{phase.lr * 3.0 ** (1 - ATTEMPTS):.2g}; lower train.lr or set train.grad_clip, and check the data"
    )


def _attempt(
    model: nn.Module,
    loader: Loader,
    judge: Callable[[], Evaluation],
    phase: Phase,
    settings: TrainSection,
    state: Mapping[str, Any],
    targets: SoftTargets | None,
    after_step: Callable[[float], None] | None,
    on_epoch: Callable[[Epoch], None] | None,
    save: Callable[[dict[str, Any]], None] | None,
    extra_loss: Callable[[Tensor], Tensor] | None,
) -> Evaluation | None:
    """Run the phase at one learning rate; None if the network collapsed."""
    forward = training_forward(model, settings)
    lr = phase.lr * 3.0 ** -state["attempt"]
    optimizer = make_optimizer(model, settings, lr)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        _restore_(model, state["model"])
    best, best_loss = state["best"], state["best_loss"]
    last: Evaluation | None = None
    for epoch in range(state["epoch"], phase.epochs):
        loader.reseed_(derive_seed(phase.seed, phase.name, "epoch", epoch))
        # Dropout and the like draw from the global generator: give each epoch its own stream of that as well.
        with torch.random.fork_rng(_cuda_devices(model)):
            torch.manual_seed(worker_seed(derive_seed(phase.seed, phase.name, "layers", epoch)))
            loss = _epoch_(
                model,
                forward,
                loader,
                optimizer,
                phase,
                settings,
                lr,
                epoch,
                targets,
                after_step,
                extra_loss,
            )
        agree_on_norms_(model)
        last = judge()
        if not math.isfinite(loss) or _collapsed(last, phase, epoch):
            return None
        if on_epoch is not None:
            on_epoch(Epoch(epoch + 1, lr, loss, last))
        if phase.keep_best and last.loss < best_loss:
            best, best_loss = _copy(model), last.loss
        if save is not None:
            moment = {"epoch": epoch + 1, "best": best, "best_loss": best_loss, "model": _copy(model)}
            save({**state, **moment, "optimizer": optimizer.state_dict()})
    if phase.keep_best:
        _restore_(model, best)
    return judge() if phase.keep_best or last is None else last


def _epoch_(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    settings: TrainSection,
    lr: float,
    epoch: int,
    targets: SoftTargets | None,
    after_step: Callable[[float], None] | None,
    extra_loss: Callable[[Tensor], Tensor] | None,
) -> float:
    """One pass over the training images; the mean loss, read once at the end so that no step waits for it."""
    training = model.training
    model.train()
    total: Tensor | None = None
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = epoch * len(loader)
    for batch in loader.indexed():
        share = share_of(len(batch[0]))
        positions, images, labels = (part[share.rows] for part in batch)
        rate = lr * one_cycle(step, phase.epochs * len(loader))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = forward(images)
        if total is None:
            check_logits(logits, labels)
        soft = None if targets is None else targets(positions, images)
        loss = objective(logits, labels, soft, settings)
        if extra_loss is not None:
            loss = loss + extra_loss(labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        add_up_gradients_(parameters, share.weight)
        if settings.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        if after_step is not None:
            after_step(rate)
        part_of_loss = loss.detach() * share.weight
        total = part_of_loss if total is None else total + part_of_loss
        step += 1
    model.train(training)
    return float("nan") if total is None else float(add_up_loss(total)) / len(loader)


def make_optimizer(model: nn.Module, settings: TrainSection, lr: float) -> torch.optim.Optimizer:
    """Optimizer of the recipe over the parameters that are trained.

    Args:
        model: The network.
        settings: `optimizer`, `momentum` and `weight_decay`.
        lr: Learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    # One kernel for all parameters, where there are such kernels and launching them is what takes the time.
    fused = all(p.device.type == "cuda" for p in parameters)
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(
            parameters, lr, settings.momentum, weight_decay=decay, nesterov=nesterov, fused=fused
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay, fused=fused)


def _collapsed(now: Evaluation, phase: Phase, epoch: int) -> bool:
    """Whether a network that had learned is on its way to chance, or a first training ended there."""
    if not math.isfinite(now.loss):
        return True
    if phase.reference is None:
        return epoch + 1 == phase.epochs and now.loss > 0.95 * now.chance
    # Training never takes a sound network half the way to chance. The first quarter of the phase is not judged, since
    # a large removal is still being repaired there.
    return 4 * (epoch + 1) > phase.epochs and now.loss > 0.5 * (phase.reference + now.chance)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _restore_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    model.load_state_dict(dict(state))
