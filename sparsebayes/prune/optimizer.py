"""Continuing to train a compacted network with the optimizer state of the network it came from.

Compaction makes new parameters. An optimizer that keeps the old ones goes on without an error and trains
nothing; one that starts afresh forgets momentum and second moments. So its state is cut like the parameters:

    >>> small = compact(model, masks.masks, example)
    >>> optimizer = carry_optimizer_state(
    ...     optimizer, model, small.model, small.kept, lambda groups: torch.optim.SGD(groups, lr=0.1)
    ... )

`move_optimizer_` does the same to the optimizer itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from sparsebayes.errors import ModelError
from sparsebayes.prune.compaction import Kept, cut

__all__ = ["carry_optimizer_state", "check_optimizer", "move_optimizer_"]

# Name, old and new parameter.
Member = tuple[str, Tensor, nn.Parameter]


def carry_optimizer_state(
    old_optimizer: Optimizer,
    old_model: nn.Module,
    new_model: nn.Module,
    kept: Kept,
    make_optimizer: Callable[[list[dict[str, object]]], Optimizer],
) -> Optimizer:
    """Make an optimizer for the compacted network that goes on where the old one stood.

    Args:
        old_optimizer: trains some or all parameters of `old_model`, and maybe others, which stay; not changed.
        old_model: the network before compaction.
        new_model: the compacted network.
        kept: from the `Compaction`: what stayed of each parameter.
        make_optimizer: called with the parameter groups, which carry the old hyper-parameters (learning rate,
            weight decay and so on, which therefore override its defaults); returns an optimizer of the old
            one's kind. A group of which no parameter is left is given as well, so that schedulers find it.

    Returns:
        The new optimizer: state tensors shaped like their parameter are cut, numbers are copied.

    Raises:
        ModelError: the old optimizer trains no parameter of the old model, the networks do not
            belong together, `make_optimizer` changes the parameters or the kind, or a state tensor has
            another shape than its parameter, so that it cannot be cut.
    """
    check_optimizer(old_optimizer, old_model)
    carried = _carried(old_optimizer, old_model, new_model, kept)
    groups: list[dict[str, object]] = [
        {
            **{
                key: copy.deepcopy(value)
                for key, value in old.items()
                if key not in ("params", "param_names")
            },
            "params": [new for _, _, new in members],
        }
        for old, members in zip(old_optimizer.param_groups, carried, strict=True)
    ]
    optimizer = make_optimizer(groups)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    expected = [id(new) for members in carried for _, _, new in members]
    if type(optimizer) is not type(old_optimizer) or held != expected:
        raise ModelError(
            f"make_optimizer should return a {type(old_optimizer).__name__} over the groups that it is "
            f"given, but returned a {type(optimizer).__name__} over {len(held)} parameters (expected {len(expected)})"
        )
    optimizer.state.update(_states(old_optimizer, carried, kept))
    return optimizer


def move_optimizer_(optimizer: Optimizer, old_model: nn.Module, new_model: nn.Module, kept: Kept) -> None:
    """Let an optimizer, the very object that a training loop and its schedulers hold, go on with the compacted network.

    Args:
        optimizer: trains some or all parameters of `old_model`, and maybe others, which stay. Its groups keep their
            number, order and settings, also where no parameter of one is left.
        old_model: the network before compaction.
        new_model: the compacted network.
        kept: from the `Compaction`: what stayed of each parameter.

    Raises:
        ModelError: as for `carry_optimizer_state`; then nothing is changed. L-BFGS holds its parameters in other
            places too, and is refused.
    """
    check_optimizer(optimizer, old_model)
    carried = _carried(optimizer, old_model, new_model, kept)
    states = _states(optimizer, carried, kept)
    for group, members in zip(optimizer.param_groups, carried, strict=True):
        group["params"] = [new for _, _, new in members]
        if "param_names" in group:
            group["param_names"] = [name for name, _, _ in members]
    optimizer.state.clear()
    optimizer.state.update(states)


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that could not go on with a compacted network, before anything is changed.

    Args:
        optimizer: of the network as it is.
        model: the network as it is.

    Raises:
        ModelError: it trains no parameter of the model, or holds a state that cannot be cut.
    """
    if isinstance(optimizer, LBFGS):
        raise ModelError("an LBFGS optimizer cannot go on with other parameters; start a new one instead")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if held and not any(id(parameter) in names for parameter in held):
        raise ModelError(
            f"the optimizer holds a parameter of shape {list(held[0].shape)} that the old model does not have, and "
            "none that it has; pass the model that the optimizer was made for"
        )
    for parameter in held:
        if id(parameter) in names and parameter in optimizer.state:
            _cut_state(names[id(parameter)], parameter, optimizer.state[parameter], {})


def _carried(
    optimizer: Optimizer, old_model: nn.Module, new_model: nn.Module, kept: Kept
) -> list[list[Member]]:
    """For each group of an optimizer: name, old and new parameter of all that it trains in the compacted network."""
    names = {id(parameter): name for name, parameter in old_model.named_parameters()}
    new_parameters = dict(new_model.named_parameters())
    placed: set[str] = set()
    carried = []
    for group in optimizer.param_groups:
        olds: list[Tensor] = list(group["params"])
        foreign = [old for old in olds if id(old) not in names]
        olds = [old for old in olds if id(old) in names]
        found = [_counterpart(old, names[id(old)], new_parameters, kept) for old in olds]
        here = [(name, old, new) for old, (name, new) in zip(olds, found, strict=True) if new is not None]
        # What a branch that is gone still adds is trained where its last layer was.
        constants = {_constant(name, new_parameters) for name, new in found if new is None}
        added = sorted({name for name in constants if name is not None} - placed)
        here += [(name, new_parameters[name], new_parameters[name]) for name in added]
        placed.update(added)
        titles = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        here += [(titles.get(id(old), ""), old, old) for old in foreign if isinstance(old, nn.Parameter)]
        carried.append(here)
    return carried


def _states(optimizer: Optimizer, carried: list[list[Member]], kept: Kept) -> dict[Tensor, dict[str, object]]:
    """State of each new parameter."""
    return {
        new: optimizer.state[old]
        if new is old
        else _cut_state(name, old, optimizer.state[old], kept.get(name, {}))
        for members in carried
        for name, old, new in members
        if old in optimizer.state
    }


def _counterpart(
    old: Tensor, name: str, new_parameters: Mapping[str, nn.Parameter], kept: Kept
) -> tuple[str, nn.Parameter | None]:
    """Find the new parameter of an old one; None if it went with its branch."""
    dims = kept.get(name, {})
    shape = [dims[d].numel() if d in dims else size for d, size in enumerate(old.shape)]
    new = new_parameters.get(name)
    if 0 in shape and new is None:
        return name, None
    if new is None or list(new.shape) != shape:
        raise ModelError(
            f"the new model should have {name!r} of shape {shape}, but has "
            f"{'no such parameter' if new is None else list(new.shape)}; pass both models of one compaction"
        )
    return name, new


def _constant(name: str, new_parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Name of the constant that stands where a parameter was."""
    constant = f"{name.rpartition('.')[0]}.value"
    return constant if constant in new_parameters else None


def _cut_state(
    name: str, old: Tensor, state: Mapping[str, object], dims: Mapping[int, Tensor]
) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            result[key] = cut(value, dims)
        elif isinstance(value, Tensor) and value.ndim == 0:
            result[key] = value.detach().clone()
        elif value is None or isinstance(value, bool | int | float):
            result[key] = value
        else:
            shown = (
                f"a tensor of shape {list(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ModelError(
                f"the optimizer state {key!r} of {name!r} is {shown}, which cannot be cut with a parameter "
                "of shape "
                f"{list(old.shape)}; start a new optimizer instead"
            )
    return result
