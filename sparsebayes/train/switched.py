"""A network that trains with its groups scaled by switches drawn from a posterior, which learns along with it.

>>> switched = Switched(network, grouping, posterior, example)
>>> loss(switched(images)).backward()            # in training mode: with a draw, in evaluation mode: with the mean
>>> optimizer.step()
>>> switched.learn_(lr)                          # the posterior's own step
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from sparsebayes.groups import Grouping
from sparsebayes.inference import NaturalGradient, VariationalDropout
from sparsebayes.prune.gating import check_gates, gates_images, run_gated, scale_gates_
from sparsebayes.recipe.schema import Recipe

__all__ = ["Switched", "gate_energy", "make_posterior"]


def make_posterior(
    recipe: Recipe, model: nn.Module, grouping: Grouping, num_data: int, prices: Tensor | None
) -> VariationalDropout | NaturalGradient:
    """The posterior that a recipe names, before it has seen data.

    Args:
        recipe: `posterior` and the section of that name; `prior.strength`, where it is a number.
        model: The network as it stands.
        grouping: G groups of its parameters.
        num_data: Training images.
        prices: Cost of each group relative to the mean group, ``[G]``; None: all 1.
    """
    num_groups = grouping.num_groups
    strength = recipe.prior.strength if isinstance(recipe.prior.strength, float) else 1.0
    if recipe.posterior == "variational_dropout":
        dropout = recipe.variational_dropout
        return VariationalDropout(
            num_groups,
            num_data=num_data,
            length_scale=dropout.length_scale / _layer_energy(model, grouping)
            if dropout.relative
            else dropout.length_scale,
            tau=dropout.tau,
            initial=dropout.initial,
            lr=dropout.lr,
            adaptive=dropout.adaptive,
            strength=strength,
            prices=prices,
        )
    gaussian = recipe.natural_gradient
    return NaturalGradient(
        num_groups,
        num_data=num_data,
        update=gaussian.update,
        prior_precision=gaussian.prior_precision,
        initial_precision=gaussian.initial_precision,
        lr=gaussian.lr,
        betas=(gaussian.gradient_decay, gaussian.curvature_decay),
        strength=strength,
        prices=prices,
    )


@final
class Switched(nn.Module):
    """A network that draws its groups' switches when it trains, and takes their mean when it is judged.

    Posterior and weights are saved and loaded together, as extra state of the module, so that what saves, restores and
    resumes networks does the same for both.

    Args:
        network: The network itself; it is trained in place.
        grouping: G groups of its parameters.
        posterior: Over their switches.
        example: Inputs of shape ``[B, ...]``, to find out whether each image can have a draw of its own.

    Raises:
        GroupingError: A group that nothing reads.
    """

    def __init__(
        self,
        network: nn.Module,
        grouping: Grouping,
        posterior: VariationalDropout | NaturalGradient,
        example: Tensor,
    ) -> None:
        super().__init__()
        check_gates(grouping)
        self.network = network
        self.grouping = grouping
        self.posterior = posterior
        self.per_image = gates_images(network, grouping, example)
        self._drawn: tuple[Tensor, Tensor, int] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``[B, C]``."""
        if not self.training:
            return run_gated(self.network, self.grouping, images, self._placed(self.posterior.mean, images))
        # The global generator is the one that a training phase seeds anew for each epoch.
        generator, posterior = torch.default_generator, self.posterior
        if isinstance(posterior, VariationalDropout) and self.per_image:
            drawn = posterior.sample(generator, len(images))
        else:
            drawn = posterior.sample(generator)
        switches = self._placed(drawn, images)
        if self.per_image and switches.ndim == 1:
            switches = switches.expand(len(images), -1)
        switches = switches.clone().requires_grad_()
        self._drawn = drawn, switches, len(images)
        return run_gated(self.network, self.grouping, images, switches)

    def learn_(self, lr: float) -> None:
        """Update the posterior by the last step's gradient, and let weights decay as it says.

        Args:
            lr: The weights' learning rate of the step.
        """
        if self._drawn is None:
            return
        drawn, switches, num_images = self._drawn
        gradient, self._drawn = switches.grad, None
        if gradient is None:
            return
        posterior = self.posterior
        if isinstance(posterior, NaturalGradient):
            posterior.update_(drawn, gradient, num_images=1 if gradient.ndim == 2 else num_images)
            return
        posterior.update_(drawn, gradient, gate_energy(self.network, self.grouping))
        decay = 2 * lr * posterior.penalty / posterior.num_data
        scale_gates_(self.network, self.grouping, (1 - decay).clamp(min=0).to(switches.device))

    def absorb_(self) -> None:
        """Multiply Gaussian switches into the weights; switches that are on or off need none of it."""
        if isinstance(self.posterior, NaturalGradient):
            scale_gates_(self.network, self.grouping, self.posterior.mean)

    def get_extra_state(self) -> Tensor:
        """The posterior's state as one float64 vector."""
        state = self.posterior.state_dict()
        return torch.cat([_vector(state[key]) for key in sorted(state) if not isinstance(state[key], str)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned; the prior stays this posterior's own."""
        known = self.posterior.state_dict()
        loaded: dict[str, Any] = dict(known)
        begin = 0
        for key in sorted(known):
            value = known[key]
            if isinstance(value, str):
                continue
            part = state[begin : begin + len(_vector(value))].double().cpu()
            begin += len(part)
            if key == "length_scale":
                # Worked out anew from the same weights, where another number of threads sums in another order.
                continue
            loaded[key] = part if isinstance(value, Tensor) else type(value)(part.item())
        self.posterior.load_state_dict(loaded)

    def _placed(self, switches: Tensor, images: Tensor) -> Tensor:
        return switches.to(images.device, next(self.network.parameters()).dtype)


def gate_energy(model: nn.Module, grouping: Grouping) -> Tensor:
    """||m_g||^2 over each group's gate entries, of shape ``[G]``."""
    names = grouping.parameters
    squares = {n: p.detach().square() for n, p in model.named_parameters() if n in names}
    return grouping.reduce(squares, gates_only=True)


def _layer_energy(model: nn.Module, grouping: Grouping) -> Tensor:
    """Mean of `gate_energy` over the groups of each group's layer: float64 of shape ``[G]``, positive."""
    energy, layer = gate_energy(model, grouping).double().cpu(), grouping.layer_index
    total = torch.zeros(len(grouping.layers), dtype=torch.float64).index_add_(0, layer, energy)
    mean = total / torch.bincount(layer, minlength=len(total)).clamp(min=1)
    return mean.clamp(min=1e-12)[layer]


def _vector(value: Tensor | float | bool) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor([float(value)], dtype=torch.float64)
