"""How the switches of a supernet are learned, and what they say of the operations: one contract, several methods.

The search loop knows only `Method`: it asks for the switches to run a step with, lets the optimizer move what the
method learns, shows it the switches' derivatives at the end of every cycle, and reads scores and decisions. Another
posterior is another class here; nothing in the supernet, the loop or the decision changes.

    laplace    the HARD prior with its Laplace posterior: BayesNAS (Zhou et al., ICML 2019, arXiv 1905.04919),
               Algorithms 1 and 2, eqs. 6, 8, 16-21; switches are trained next to the weights under the reweighted
               group lasso
    magnitude  baseline: the same training without a penalty; the largest switches stay
    darts      baseline: Liu, Simonyan and Yang, "DARTS", ICLR 2019: a softmax over the operations of an edge,
               learned on images of its own
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Generator, Tensor

from sparsebayes.errors import RunError
from sparsebayes.inference.joint import joint_survival
from sparsebayes.inference.laplace import Laplace
from sparsebayes.nas.evidence import rescaled
from sparsebayes.nas.rows import switch_matrix
from sparsebayes.nas.spaces import Decision
from sparsebayes.nas.switches import SwitchTable

__all__ = [
    "DartsSearch",
    "LaplaceSearch",
    "MagnitudeSearch",
    "Method",
    "Options",
    "initial_logits",
]

ALPHA_LR, ALPHA_BETAS, ALPHA_DECAY = 3e-4, (0.5, 0.999), 1e-3
"""Adam of the architecture weights, as DARTS section 3.1.2 has it."""


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """What a method may need to know.

    Attributes:
        num_data: images of the data set that the evidence speaks of.
        strength: temperature T, in nats of evidence.
        rule: "evidence" or "entropy".
        joint: judge by the full curvature matrix.
        rescale: let the other operations of a node rescale together when one goes; without `joint`.
        switch_lr: learning rate of the switches.
        momentum: of their optimizer.
        seed: of random numbers that a method begins with.
    """

    num_data: int
    strength: float
    rule: str = "evidence"
    joint: bool = False
    rescale: bool = False
    switch_lr: float = 0.05
    momentum: float = 0.9
    seed: int = 0


class Method(ABC):
    """What a search believes of the G groups of switches. Subclasses are final.

    There are two ways to learn: by an `optimizer` over the network's switches or parameters of the method's own, or by
    `learn_`, which is given the gradient at every sample.

    Args:
        table: what each switch belongs to.
        options: see `Options`.

    Attributes:
        bilevel: whether its parameters learn from images that the weights do not see.
        removes: whether its weakest operations may be switched off between cycles. A softmax over an edge weighs
            operations against each other while all of them train.
        decision: how operations are chosen where the space and the recipe say nothing; None: by `keep`.
    """

    bilevel = False
    removes = True
    decision: Decision | None = None

    def __init__(self, table: SwitchTable, options: Options) -> None:
        self.table = table
        self.options = options

    def optimizer(self, switches: torch.nn.Parameter) -> torch.optim.Optimizer | None:
        """The optimizer of what the method learns; None (the default) if it learns by `learn_`."""
        return None

    def learn_(self, gradient: Tensor, num_images: int = 1) -> None:
        """Take in the gradient of a batch's mean loss at the last sample; only asked of methods without an optimizer.

        Args:
            gradient: nats per image, of the last sample's shape.
            num_images: images that the loss is the mean of.
        """
        return

    def sample(self, switches: Tensor, generator: Generator, num_images: int | None = None) -> Tensor:
        """Values of the switches for one training step; by default the network's own.

        Args:
            switches: the network's own, of shape `[T]`.
            generator: of the CPU.
            num_images: images of the batch, B; None: one row for all of them.

        Returns:
            Of shape `[T]`, or `[B, T]` from a method that draws for every image.
        """
        return switches

    def mean(self, switches: Tensor) -> Tensor:
        """Values of the switches to evaluate with, of shape `[T]`; by default the network's own."""
        return switches

    def shrink_(self, switches: Tensor, lr: float) -> None:
        """Move the switches towards the prior after a step with this learning rate; by default not at all."""
        return

    @abstractmethod
    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Take in what a cycle has learned.

        Args:
            switches: of shape `[T]`.
            rows: measures the derivatives of `sparsebayes.nas.rows`, `[N, K, G]`.
        """

    @abstractmethod
    def scores(self) -> Tensor:
        """How much each group is worth, float64 of shape `[G]`; larger is better."""

    def keep(self) -> Tensor:
        """Which groups stay, bool of shape `[G]`; by default all."""
        return torch.ones(self.table.num_groups, dtype=torch.bool)

    def inherited(self, switches: Tensor) -> Tensor:
        """What a derived network's operations are scaled by when it takes the supernet's weights, `[T]`."""
        return switches

    def decay_shares(self) -> Tensor | None:
        """Share of the weight decay that the weights of each group's operations get, `[G]`; None: all of it."""
        return None

    def figures(self) -> dict[str, float]:
        """What a log may say of the beliefs, by name; by default nothing."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""


@final
class LaplaceSearch(Method):
    """The HARD prior over the groups and its Laplace posterior.

    The penalty is T omega_g times the root mean square of the group's switches, the coordinate that the posterior works
    in, beside the loss of the whole data set (eq. 21), applied as a proximal step, which makes exact zeros. An update
    measures the Gauss-Newton curvature of each group's switch and moves omega and gamma; gates and predecessors enter
    gamma by eqs. 6 and 8.

    Args:
        table: see `Method`.
        options: see `Method`.

    Attributes:
        posterior: the prior variances, their penalty and evidence.
    """

    def __init__(self, table: SwitchTable, options: Options) -> None:
        super().__init__(table, options)
        self.posterior = Laplace(table.num_groups, hierarchy=table.hierarchy(), strength=options.strength)
        self._joint: Tensor | None = None

    def optimizer(self, switches: torch.nn.Parameter) -> torch.optim.Optimizer:
        """SGD without weight decay: the prior is all that pulls at switches."""
        return torch.optim.SGD([switches], self.options.switch_lr, self.options.momentum)

    def shrink_(self, switches: Tensor, lr: float) -> None:
        """The proximal step of T omega / N times the root mean square z of each group's c switches.

        z falls by lr T omega / (N c (1 - momentum)), not below 0: a gradient that stays the same moves a weight by
        lr / (1 - momentum) of it per step, and loss and penalty must count alike.
        """
        counts = torch.bincount(self.table.group, minlength=self.table.num_groups)
        weight = (self.posterior.penalty / self.options.num_data).to(switches)
        norms = self.table.norms(switches.detach())
        fall = lr / (1 - self.options.momentum) * weight / counts.to(switches)
        factor = (1 - fall / norms.clamp(min=1e-30)).clamp(min=0)
        with torch.no_grad():
            switches.mul_(factor[self.table.group.to(switches.device)])

    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Measure the curvature and update the posterior; switches keep their own scale z.

        With `rescale`, curvature is what `sparsebayes.nas.evidence` leaves of it.
        """
        matrix = switch_matrix(rows(), self.options.num_data).cpu()
        norms = self.table.norms(switches.detach()).double().cpu()
        relative = matrix.diagonal()  # in a relative change, so that z^2 h in any coordinate
        if self.options.rescale:
            relative = rescaled(matrix, self.table.beside(norms > 0))
        curvature = torch.where(norms > 0, relative / norms.square().clamp(min=1e-60), 0.0)
        self.posterior.update_(norms, curvature)
        self._joint = joint_survival(matrix) if self.options.joint else None

    def scores(self) -> Tensor:
        """Strength up to which each group stays."""
        return self.posterior.survives(self.options.rule) if self._joint is None else self._joint.clone()

    def keep(self) -> Tensor:
        """Groups worth more than the strength, whose gate and one of whose predecessors is on as well."""
        if self._joint is None:
            return self.posterior.keep(self.options.rule)
        return self.table.hierarchy().close(self._joint > self.options.strength)

    def state_dict(self) -> dict[str, Any]:
        """The posterior's state, and the joint survival where there is one."""
        return {"posterior": self.posterior.state_dict(), "joint": self._joint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self.posterior.load_state_dict(state["posterior"])
        self._joint = state["joint"]


@final
class MagnitudeSearch(Method):
    """Baseline: switches trained freely; the largest are the best."""

    def __init__(self, table: SwitchTable, options: Options) -> None:
        super().__init__(table, options)
        self._norms: Tensor | None = None

    def optimizer(self, switches: torch.nn.Parameter) -> torch.optim.Optimizer:
        """SGD, as for the posterior."""
        return torch.optim.SGD([switches], self.options.switch_lr, self.options.momentum)

    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Note the sizes; derivatives are not measured."""
        self._norms = self.table.norms(self.table.effective(switches.detach())).double().cpu()

    def scores(self) -> Tensor:
        """Size of the switch times that of its edge's gate, as the network computes it."""
        return _required(self._norms).clone()

    def state_dict(self) -> dict[str, Any]:
        """The sizes."""
        return {"norms": self._norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._norms = state["norms"]


@final
class DartsSearch(Method):
    """Baseline: a softmax over the operations of every edge, learned on held-back training images."""

    bilevel = True
    removes = False
    decision = Decision(one_op_per_edge=True, top_k_edges=2)

    def __init__(self, table: SwitchTable, options: Options) -> None:
        super().__init__(table, options)
        self._alpha = torch.nn.Parameter(initial_logits(table, options.seed).float())

    def optimizer(self, switches: torch.nn.Parameter) -> torch.optim.Optimizer:
        """Adam over the architecture weights; the network's own switches are not used."""
        self._alpha.data = self._alpha.data.to(switches.device)
        return torch.optim.Adam([self._alpha], ALPHA_LR, ALPHA_BETAS, weight_decay=ALPHA_DECAY)

    def sample(self, switches: Tensor, generator: Generator, num_images: int | None = None) -> Tensor:
        """The softmax over each edge, of shape `[T]`; gates are 1."""
        return self.table.softmax(self._alpha)[self.table.group.to(switches.device)]

    def mean(self, switches: Tensor) -> Tensor:
        """The same, as nothing is random."""
        return self.table.softmax(self._alpha)[self.table.group.to(switches.device)].detach()

    def update_(self, switches: Tensor, rows: Callable[[], Tensor]) -> None:
        """Nothing: the optimizer has done it all."""
        return

    def scores(self) -> Tensor:
        """The softmax; gates score 1."""
        return self.table.softmax(self._alpha.detach()).double().cpu()

    def state_dict(self) -> dict[str, Any]:
        """The architecture weights."""
        return {"alpha": self._alpha.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._alpha.data = state["alpha"].to(self._alpha)


def initial_logits(table: SwitchTable, seed: int) -> Tensor:
    """Logits of about 0 that differ by chance: float64 of shape `[G]`."""
    generator = Generator().manual_seed(seed)
    return 1e-3 * torch.randn(table.num_groups, generator=generator, dtype=torch.float64)


def _required(values: Tensor | None) -> Tensor:
    if values is None:
        raise RunError("expected a search with at least one cycle, got a new one: call update_ first.")
    return values
