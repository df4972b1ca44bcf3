"""Posteriors that are learned along with the weights: a network whose groups are drawn, and removal guided by draws.

Before each removal the network trains with its groups scaled by switches drawn from the posterior (PGNAS: a relaxed
drop; BaLeNAS: a Gaussian), image by image where its groups allow it; every step updates weights and posterior. Then
sub-networks of the target's size are drawn from the posterior, judged on held-out images with the weights they have,
and the best one is cut out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from sparsebayes.api import SparseModel
from sparsebayes.data import Loader
from sparsebayes.errors import NumericsError, RecipeError
from sparsebayes.groups import Grouping
from sparsebayes.inference import NaturalGradient, Posterior, VariationalDropout
from sparsebayes.inference.sampling import best_of, shuffled_candidates
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.gating import check_gates, gates_images, run_gated, scale_gates_
from sparsebayes.prune.masking import Masks, apply_masks_
from sparsebayes.prune.pricing import EntryCosts, entry_costs, group_prices
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe.schema import Recipe, TrainSection
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.fit import Phase
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.removal import Removal, choose_groups, cut, remove
from sparsebayes.train.seeding import derive_seed

__all__ = ["Switched", "check_posterior", "make_posterior", "phase_and_settings", "remove_next"]


Fit = Callable[[nn.Module, Phase, dict[str, Tensor], TrainSection], object]
"""Trains a network for a phase, with entries held at zero, under some settings."""

_GENTLER = {
    "variational_dropout": "lower variational_dropout.length_scale or prior.strength",
    "natural_gradient": "raise natural_gradient.initial_precision or lower prior.strength",
}


def check_posterior(recipe: Recipe) -> None:
    """Refuse options of the Laplace posterior beside another one, and sampling beside the Laplace posterior.

    Raises:
        RecipeError: An option that would be ignored.
    """
    prior, defaults = recipe.prior, type(recipe.prior)()
    if recipe.posterior == "laplace":
        if recipe.sampling != type(recipe.sampling)():
            raise RecipeError(
                "sampling draws from a posterior that is learned along with the weights, but posterior is laplace; "
                "leave out sampling, or set posterior to variational_dropout or natural_gradient"
            )
        return
    for name in ("scale", "rule", "joint"):
        if getattr(prior, name) != getattr(defaults, name):
            raise RecipeError(
                f"prior.{name} belongs to the posterior laplace, but posterior is {recipe.posterior}; leave it out"
            )
    if recipe.prune.score != "evidence":
        raise RecipeError(
            f"prune.score is {recipe.prune.score}, which would ignore the posterior {recipe.posterior}; "
            "set it to evidence, or posterior to laplace"
        )
    gaussian = recipe.natural_gradient
    if recipe.posterior == "natural_gradient" and gaussian.initial_precision < gaussian.prior_precision:
        raise RecipeError(
            f"natural_gradient.initial_precision is {gaussian.initial_precision}, below prior_precision "
            f"{gaussian.prior_precision}; data only add precision: lower one or raise the other"
        )


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
        """Take over what `get_extra_state` returned."""
        known = self.posterior.state_dict()
        loaded: dict[str, Any] = dict(known)
        begin = 0
        for key in sorted(known):
            value = known[key]
            if isinstance(value, str):
                continue
            part = state[begin : begin + len(_vector(value))].double().cpu()
            begin += len(part)
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


def phase_and_settings(recipe: Recipe, number: int) -> tuple[Phase, TrainSection]:
    """How the network trains while its switches are drawn.

    Args:
        recipe: Epochs of the posterior; rates and losses of the cycles.
        number: Number of the cycle.

    Returns:
        The phase, and its settings: variational dropout brings a weight decay of its own.
    """
    train, is_dropout = recipe.train, recipe.posterior == "variational_dropout"
    section = recipe.variational_dropout if is_dropout else recipe.natural_gradient
    # Groups that go take loss with them, which is no collapse short of guessing: there is no reference.
    phase = Phase(
        name=f"posterior {number}", epochs=section.epochs, lr=train.rate(train.cycles), seed=recipe.seed
    )
    return phase, train.model_copy(update={"weight_decay": 0.0}) if is_dropout else train


def remove_next(
    recipe: Recipe,
    model: nn.Module,
    lineage: Lineage,
    dense: Grouping,
    loaders: Loaders,
    fit_: Fit,
    record: Callable[[dict[str, Any]], None],
    *,
    costs: EntryCosts,
    target: float,
    number: int,
) -> Removal | None:
    """Remove groups by the posterior that the recipe names, until the network costs no more than a target.

    The Laplace posterior is measured; the others are learned first, then sub-networks that meet the target are drawn,
    and the best is cut out.

    Args:
        recipe: Posterior, sampling, prior and bounds.
        model: The network as it stands; learning a posterior trains it.
        lineage: How it came from the dense one.
        dense: The groups of the dense network.
        loaders: Images to estimate on, and to judge by.
        fit_: Trains a network for a phase, entries at zero held there, under some settings.
        record: Called with what was drawn and how good it was.
        costs: What the target counts.
        target: Cost to reach; bounds and the recipe's strength may prevent it.
        number: Number of the cycle, for its random streams.

    Returns:
        The removal; None if no group may go.

    Raises:
        GroupingError: If nothing reads a group.
        ModelError: If the network cannot be traced, or the cut one would not compute the same.
        NumericsError: If training collapses, or the curvature is not finite.
    """
    plain, example = loaders.plain, loaders.example
    if recipe.posterior == "laplace":
        return remove(
            recipe, model, lineage, dense, plain, example, costs=costs, target=target, number=number
        )
    grouping, origin = lineage.grouping(dense)
    posterior = _learned_(recipe, model, lineage, grouping, loaders, fit_, number)
    sparse = SparseModel(model, grouping, example=example, num_data=plain.num_data)
    sparse.masks = Masks(lineage.masks) if lineage.masks else None
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "draws", number))
    scores = [posterior.survives()]
    scores += [posterior.sample_survival(generator) for _ in range(recipe.sampling.count - 1)]
    selections = [
        choose_groups(recipe, sparse, lineage, dense, score, costs=costs, target=target) for score in scores
    ]
    record({"phase": "posterior state", "cycle": number, **_describe(posterior)})
    best = 0
    if len(selections) > 1:
        plain.reseed_(derive_seed(recipe.seed, "norm images", number))
        judged = _judge(recipe, model, grouping, lineage, selections, loaders, generator)
        record({"phase": "sample", "cycle": number, **judged})
        best = judged["best"]
    return cut(sparse, lineage, origin, selections[best], scores[best])


def _learned_(
    recipe: Recipe,
    model: nn.Module,
    lineage: Lineage,
    grouping: Grouping,
    loaders: Loaders,
    fit_: Fit,
    number: int,
) -> Posterior:
    """Train the network with its switches drawn; the posterior that came of it."""
    prices = None
    if recipe.prior.price != "none":
        prices = group_prices(grouping, entry_costs(model, loaders.example, recipe.prior.price))
    posterior = make_posterior(recipe, model, grouping, loaders.plain.num_data, prices)
    switched = Switched(model, grouping, posterior, loaders.example)
    phase, settings = phase_and_settings(recipe, number)
    try:
        fit_(switched, phase, lineage.masks, settings)
    except NumericsError as error:
        raise NumericsError(f"{error}; or drop less: {_GENTLER[recipe.posterior]}") from None
    switched.absorb_()
    return posterior


def _judge(
    recipe: Recipe,
    model: nn.Module,
    grouping: Grouping,
    lineage: Lineage,
    selections: list[Selection],
    loaders: Loaders,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Held-out losses of drawn sub-networks and, if asked for, of random ones; which drawn one is the best."""

    def loss(on: Tensor) -> float:
        with _masked(model, grouping.masks(on), lineage, loaders.plain, recipe.sampling.norm_batches):
            return evaluate(model, loaders.heldout).loss

    candidates = torch.stack([selection.on for selection in selections])
    distinct = torch.unique(candidates, dim=0)
    if len(distinct) == 1:  # late in a run the bounds may leave one choice
        return {"best": 0, "losses": [loss(distinct[0])], "distinct": 1}
    guided = best_of(candidates, loss)
    result: dict[str, Any] = {"best": guided.best, "losses": list(guided.losses), "distinct": len(distinct)}
    if recipe.sampling.baseline:
        shuffled = shuffled_candidates(candidates, grouping.layer_index, generator)
        result["random_losses"] = [loss(on) for on in shuffled]
    return result


@contextmanager
def _masked(
    model: nn.Module, masks: dict[str, Tensor], lineage: Lineage, images: Loader, norm_batches: int
) -> Iterator[None]:
    """The network with entries at zero, batch norm estimated anew if asked for; afterwards as it was."""
    saved = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        apply_masks_(model, masks)
        apply_masks_(model, lineage.masks)
        if norm_batches:
            _estimate_norms_(model, images, norm_batches)
        yield
    finally:
        model.load_state_dict(saved)


def _estimate_norms_(model: nn.Module, images: Loader, num_batches: int) -> None:
    """Average batch norm's statistics anew over some batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    try:
        with torch.no_grad():
            for batch, _ in islice(images, num_batches):
                model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)


def _describe(posterior: Posterior) -> dict[str, float]:
    """What a report may show of a posterior."""
    figures = {"mean_relevance": float(posterior.relevance.mean())}
    if isinstance(posterior, NaturalGradient):
        figures.update(exploration_noise=posterior.noise, curvature_trace=posterior.curvature_trace)
    return figures


def _vector(value: Tensor | float | bool) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor([float(value)], dtype=torch.float64)
