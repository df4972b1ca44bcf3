"""Searches by the two posteriors that are learned along with the weights.

    natural_gradient      BaLeNAS (Zhang et al., CVPR 2022, arXiv 2111.13204): a Gaussian over architecture logits; each
                          step draws logits, mixes the operations of an edge by their softmax, and learns from the
                          gradient there, on images that the weights do not see. The mean's largest
                          logit decides, or the best of several draws by a score of the caller's (training-free proxies)
    variational_dropout   PGNAS (Zhou et al., AAAI 2020, arXiv 1906.09557): a drop probability per group; each step
                          draws a relaxed mask for every switch, weights and probabilities learn from the same images.
                          The best of several drawn sub-networks decides, by held-out loss with the weights they have

Both keep the order of a search: draws take the generator of the step, so that a resumed search goes on to the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Generator, Tensor

from sparsebayes.errors import RunError
from sparsebayes.inference.natural_gradient import NaturalGradient
from sparsebayes.inference.variational_dropout import VariationalDropout
from sparsebayes.nas.methods import (
    DartsSearch,
    LaplaceSearch,
    MagnitudeSearch,
    Method,
    Options,
    initial_logits,
)
from sparsebayes.nas.spaces import Decision
from sparsebayes.nas.switches import SwitchTable

__all__ = ["METHODS", "DropoutSearch", "NaturalGradientSearch"]


@final
class NaturalGradientSearch(Method):
    """A mean-field Gaussian over the logits of the operations; gates are 1.

    Args:
        table: what each switch belongs to.
        options: see `Options`.
        posterior: over one logit per group; None: logits of about 0, prior precision 1, initial precision 10. The
            paper's own values were not to be read: these are our choice.

    Attributes:
        posterior: the Gaussian; its `noise` and `curvature_trace` are worth a log.
    """

    bilevel = True
    removes = False
    decision = Decision(one_op_per_edge=True, top_k_edges=2)

    def __init__(
        self, table: SwitchTable, options: Options, posterior: NaturalGradient | None = None
    ) -> None:
        super().__init__(table, options)
        self.posterior = posterior or NaturalGradient(
            table.num_groups,
            num_data=options.num_data,
            mean=initial_logits(table, options.seed),
            initial_precision=10.0,
            strength=options.strength,
        )
        self._logits: Tensor | None = None

    def sample(self, switches: Tensor, generator: Generator, num_images: int | None = None) -> Tensor:
        """The softmax over each edge of logits drawn from the Gaussian, one draw for all images: of shape `[T]`."""
        self._logits = self.posterior.sample(generator)
        return self._spread(self._logits, switches)

    def mean(self, switches: Tensor) -> Tensor:
        """The softmax of the mean."""
        return self._spread(self.posterior.mean, switches)

    def learn_(self, gradient: Tensor, num_images: int = 1) -> None:
        """One natural-gradient step from d(mean loss over the images)/d(switches) at the last sample, `[T]`."""
        if self._logits is None:
            raise RunError("expected a sample before its gradient: call sample first.")
        drawn, self._logits = self._logits, None
        logits = drawn.clone().requires_grad_()
        mixture = self.table.softmax(logits)[self.table.group]
        (through,) = torch.autograd.grad(mixture, logits, gradient.detach().to("cpu", torch.float64))
        self.posterior.update_(drawn, through, num_images=num_images)

    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Nothing: the steps have done it all."""
        return

    def scores(self) -> Tensor:
        """The softmax of the mean; gates score 1."""
        return self.table.softmax(self.posterior.mean)

    def draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """An architecture: which groups are on, all of them, and the softmax of logits drawn from the Gaussian.

        Args:
            generator: of the CPU.

        Returns:
            bool and float64 of shape `[G]`, as `keep` and `scores` return them for the mean.
        """
        return self.keep(), self.table.softmax(self.posterior.sample(generator))

    def figures(self) -> dict[str, float]:
        """Standard deviation of the draws, and trace of the Hessian in the logits, nats of the whole data set."""
        return {"exploration_noise": self.posterior.noise, "curvature_trace": self.posterior.curvature_trace}

    def state_dict(self) -> dict[str, Any]:
        """The posterior's state."""
        return {"posterior": self.posterior.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.posterior.load_state_dict(state["posterior"])

    def _spread(self, logits: Tensor, switches: Tensor) -> Tensor:
        return self.table.softmax(logits)[self.table.group].to(switches)


@final
class DropoutSearch(Method):
    """A drop probability per group, a mask of its own for every switch of the group.

    Args:
        table: what each switch belongs to.
        options: see `Options`.
        posterior: over the T switches, groups sharing their probability; None: the paper's tau and initial
            probability. The squared norm of a switch's weights is taken as 1, so that an operation must save l^2/2 nats
            for each of the cells that share it: our choice, since the operations of a space differ in their number
            of weights.

    Attributes:
        posterior: the drop probabilities.
    """

    def __init__(
        self, table: SwitchTable, options: Options, posterior: VariationalDropout | None = None
    ) -> None:
        super().__init__(table, options)
        self.posterior = posterior or VariationalDropout(
            len(table.group),
            num_data=options.num_data,
            shared=table.group,
            strength=options.strength,
        )
        # Number of a switch of each group: what is asked per group is the same for all of its switches.
        self._first = torch.stack(
            [(table.group == group).nonzero()[0, 0] for group in range(table.num_groups)]
        )
        self._drawn: Tensor | None = None

    def sample(self, switches: Tensor, generator: Generator, num_images: int | None = None) -> Tensor:
        """Relaxed masks, one for every image: their noise in the gradient averages out over a batch."""
        self._drawn = self.posterior.sample(generator, num_images)
        return self._drawn.to(switches)

    def mean(self, switches: Tensor) -> Tensor:
        """Probabilities of being kept."""
        return self.posterior.mean.to(switches)

    def learn_(self, gradient: Tensor, num_images: int = 1) -> None:
        """One step of the log-odds from d(mean loss)/d(switches) at the last sample, `[T]` or `[B, T]`."""
        if self._drawn is None:
            raise RunError("expected a sample before its gradient: call sample first.")
        drawn, self._drawn = self._drawn, None
        self.posterior.update_(drawn, gradient, torch.ones(self.posterior.num_groups))

    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Nothing: the steps have done it all."""
        return

    def scores(self) -> Tensor:
        """Probabilities of being kept, of shape `[G]`."""
        return self.posterior.relevance[self._first]

    def keep(self) -> Tensor:
        """Groups that are kept more often than not, whose gate and one of whose predecessors is on as well."""
        return self.table.hierarchy().close(self.posterior.keep()[self._first])

    def draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """An architecture: each group is on with its probability of being kept, and so are those that it needs.

        Args:
            generator: of the CPU.

        Returns:
            bool of shape `[G]`, and float64 of shape `[G]`: odds of being kept with the noise of the draw, by which a
            space that allows one operation per edge chooses among those that are on.
        """
        odds = self.posterior.sample_survival(generator)[self._first]
        return self.table.hierarchy().close(odds > self.posterior.strength), odds

    def inherited(self, switches: Tensor) -> Tensor:
        """1: an operation that is not dropped counts in full."""
        return torch.ones_like(switches)

    def decay_shares(self) -> Tensor | None:
        """Probabilities of being kept, `[G]`: the weights of what is often dropped decay less; None: constant decay."""
        return self.scores() if self.posterior.adaptive else None

    def figures(self) -> dict[str, float]:
        """Mean probability of being kept."""
        return {"mean_relevance": float(self.scores().mean())}

    def state_dict(self) -> dict[str, Any]:
        """The posterior's state."""
        return {"posterior": self.posterior.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.posterior.load_state_dict(state["posterior"])


METHODS: dict[str, type[Method]] = {
    "laplace": LaplaceSearch,
    "natural_gradient": NaturalGradientSearch,
    "variational_dropout": DropoutSearch,
    "magnitude": MagnitudeSearch,
    "darts": DartsSearch,
}
"""All methods by the names that recipes use."""
