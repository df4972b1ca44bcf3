"""Train the network of the cells that a search has found: fresh or with the supernet's weights.

What cell networks are trained with beside the ordinary (Liu, Simonyan and Yang, "DARTS", ICLR 2019, section 3.2): a
second classifier at two thirds of the depth, and dropped paths, whose probability rises linearly over the training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.data import Loader
from sparsebayes.nas.network import CellNetwork, set_drop_path_
from sparsebayes.recipe.search_schema import RetrainSection
from sparsebayes.train.checkpoint import phase_state, write_checkpoint
from sparsebayes.train.evaluation import Evaluation
from sparsebayes.train.fit import Epoch, Phase, fit_
from sparsebayes.train.stopwatch import Stopwatch

__all__ = ["retrain_"]


class _Training(nn.Module):
    """A cell network as it is trained; its training steps are counted, so that a resumed phase drops as many paths.

    Args:
        network: the network.
        drop_path: probability at the end.
        num_steps: steps of the whole training.
    """

    steps: Tensor

    def __init__(self, network: CellNetwork, drop_path: float, num_steps: int) -> None:
        super().__init__()
        self.network = network
        self.auxiliary_logits: Tensor | None = None
        self._drop_path = drop_path
        self._num_steps = num_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            logits: Tensor = self.network(images)
            return logits
        if self._drop_path:
            set_drop_path_(self.network, self._drop_path * min(1.0, int(self.steps) / self._num_steps))
        self.steps += 1
        logits, self.auxiliary_logits = self.network.classify(images)
        return logits


def retrain_(
    network: CellNetwork,
    loader: Loader,
    heldout: Loader,
    section: RetrainSection,
    *,
    seed: int,
    folder: Path,
    on_epoch: Callable[[Epoch], None],
    say: Callable[[str], None],
    watch: Stopwatch,
) -> Evaluation:
    """Train a network in place; it ends with its best state by held-out loss.

    Args:
        network: with an auxiliary classifier if the section asks for one; that is removed at the end.
        loader: training images.
        heldout: images for decisions.
        section: how it is trained.
        seed: the run's seed.
        folder: the run folder; an interrupted training resumes from a checkpoint there.
        on_epoch: called after every epoch.
        say: told, in one sentence, when a checkpoint is damaged.
        watch: told which time went into training, and which into evaluation.

    Returns:
        The network on the held-out images.

    Raises:
        NumericsError: the network collapses at every rate that is tried.
    """
    path = folder / "retrain.pt"
    training = _Training(network, section.drop_path, max(section.epochs * len(loader), 1))

    def auxiliary(labels: Tensor) -> Tensor:
        assert training.auxiliary_logits is not None, (
            "a network with an auxiliary classifier gives its logits"
        )
        return section.auxiliary * functional.cross_entropy(training.auxiliary_logits, labels)

    def save(state: dict[str, Any]) -> None:
        write_checkpoint(path, {"phase": "retrain", "state": state})

    result = fit_(
        training,
        loader,
        heldout,
        Phase(name="retrain", epochs=section.epochs, lr=section.lr, seed=seed, keep_best=True),
        section.settings(),
        on_epoch=on_epoch,
        save=save,
        resume=phase_state(path, "retrain", say),
        extra_loss=auxiliary if network.auxiliary is not None else None,
        watch=watch,
    )
    set_drop_path_(network, 0.0)
    network.auxiliary = None
    return result
