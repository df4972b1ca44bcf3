"""Running a network with its groups scaled by switches: soft masks that gradients flow through.

    >>> switches = torch.rand(grouping.num_groups, requires_grad=True)
    >>> run_gated(model, grouping, images, switches)                 # one set of switches for the whole batch
    >>> switches = torch.rand(len(images), grouping.num_groups, requires_grad=True)
    >>> run_gated(model, grouping, images, switches)                 # every image has its own

One set for all scales the weights, which works for any grouping. Where each image has its own, groups that are columns
or rows of linear layers and convolutions scale what those layers read or return: a unit's switch then multiplies the
input channels of its consumers, as dropout of input channels does. A torch function mode finds the calls, as
`sparsebayes.curvature.capture` does; `gates_images` says whether a network's groups can be reached in this way, by
comparing both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, conv1d, conv2d, conv3d, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.networks import in_mode

__all__ = ["check_gates", "gates_images", "run_gated", "scale_gates_"]

_CONVOLUTIONS = frozenset({conv1d, conv2d, conv3d})


def check_gates(grouping: Grouping) -> None:
    """Refuse a grouping that has nothing to multiply by a switch.

    Raises:
        GroupingError: A group without gate entries: nothing reads it.
    """
    reached = torch.zeros(grouping.num_groups + 1, dtype=torch.bool)
    for labels in grouping.labels:
        if labels.gate:
            reached[(labels.index + 1).flatten()] = True
    missing = (~reached[1:]).nonzero().flatten()
    if missing.numel():
        group = int(missing[0])
        raise GroupingError(
            f"expected groups that can be masked, but nothing reads {grouping.describe(group)}, nor {len(missing) - 1} "
            f"others of {grouping.name!r}: leave their layers out of the grouping."
        )


def run_gated(model: nn.Module, grouping: Grouping, images: Tensor, switches: Tensor) -> Tensor:
    """Run a network with every group's gate entries multiplied by its switch.

    Args:
        model: The network; it is not changed.
        grouping: G groups of its parameters.
        images: Of shape ``[B, ...]``.
        switches: Of shape ``[G]``, or ``[B, G]`` where `gates_images` allows it; on the network's device.

    Returns:
        What the network returns.

    Raises:
        GroupingError: Switches of another shape.
    """
    if switches.ndim == 1:
        parameters = dict(model.named_parameters())
        scaled = {name: parameters[name] * scale for name, scale in grouping.scales(switches).items()}
        result: Tensor = functional_call(model, scaled, (images,))
        return result
    if switches.shape != (len(images), grouping.num_groups):
        raise GroupingError(
            f"expected switches of shape [{grouping.num_groups}] or [{len(images)}, {grouping.num_groups}], got "
            f"{list(switches.shape)}: one per group, or one per image and group."
        )
    with _ImageGates(model, grouping, switches):
        result = model(images)
    return result


def gates_images(model: nn.Module, grouping: Grouping, example: Tensor) -> bool:
    """Whether switches of each image's own reach every gate: tried out, not guessed.

    Args:
        model: The network, judged in evaluation mode; the modes of its modules come back as they were.
        grouping: Groups of its parameters.
        example: Inputs of shape ``[B, ...]``.
    """
    gates = [labels for labels in grouping.labels if labels.gate]
    if not all(_is_slice(labels) for labels in gates):
        return False
    generator = torch.Generator().manual_seed(0)
    switches = (0.5 + torch.rand(grouping.num_groups, generator=generator)).to(example)
    images = example[:1].expand(2, *example.shape[1:])
    with in_mode(model, train=False), torch.no_grad():
        shared = run_gated(model, grouping, images, switches)
        own = run_gated(model, grouping, images, switches.expand(2, -1))
    return torch.allclose(own, shared, rtol=1e-3, atol=1e-4 * float(shared.abs().max()) + 1e-9)


def scale_gates_(model: nn.Module, grouping: Grouping, factors: Tensor) -> None:
    """Multiply every group's gate entries by its factor, for good.

    Args:
        model: The network.
        grouping: G groups of its parameters.
        factors: Of shape ``[G]``.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, scale in grouping.scales(factors).items():
            parameter = parameters[name]
            parameter.mul_(scale.to(parameter))


def _is_slice(labels: Labels) -> bool:
    """Whether all entries at one place of dim 0, or of dim 1, belong to the same group."""
    sizes = labels.index.shape
    return all(size == 1 for dim, size in enumerate(sizes) if dim != labels.dim) and labels.dim in (
        None,
        0,
        1,
    )


@final
class _ImageGates(TorchFunctionMode):
    """Scales the inputs and outputs of linear layers and convolutions, image by image, while it is entered."""

    def __init__(self, model: nn.Module, grouping: Grouping, switches: Tensor) -> None:
        super().__init__()
        # One more column of ones, for entries in no group.
        self._table = torch.cat([switches, switches.new_ones(len(switches), 1)], 1)
        self._num_groups = grouping.num_groups
        parameters = dict(model.named_parameters())
        self._labels: dict[int, list[Labels]] = {}
        for labels in grouping.labels:
            if labels.gate:
                self._labels.setdefault(id(parameters[labels.parameter]), []).append(labels)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function, gated if it is a layer of interest; called by torch."""
        keywords = dict(kwargs or {})
        if func is functional.linear or func in _CONVOLUTIONS:
            names = ("input", "weight", "bias")
            named = {**dict(zip(names, args, strict=False)), **keywords}
            if id(named["weight"]) in self._labels or id(named.get("bias")) in self._labels:
                rest = {name: value for name, value in keywords.items() if name not in names}
                return self._layer(func, named["input"], named["weight"], named.get("bias"), args[3:], rest)
        return func(*args, **keywords)

    def _layer(
        self,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: Sequence[Any],
        keywords: Mapping[str, Any],
    ) -> Tensor:
        """A layer whose input channels, output channels and bias are scaled by the switches."""
        channel = -1 if func is functional.linear else 1
        columns = self._factor(weight, 1)
        if columns is not None:
            x = x * _shaped(columns, x, channel)
        y = func(x, weight, None, *rest, **keywords)
        rows = self._factor(weight, 0)
        if rows is not None:
            y = y * _shaped(rows, y, channel)
        if bias is None:
            return y
        factor = self._factor(bias, 0)
        shift = bias.expand(len(y), -1) if factor is None else bias * factor
        return y + _shaped(shift, y, channel)

    def _factor(self, parameter: Tensor, dim: int) -> Tensor | None:
        """Product of the switches along one dim of a parameter, of shape ``[B, size or 1]``; None if there are none."""
        factor: Tensor | None = None
        for labels in self._labels.get(id(parameter), []):
            if (labels.dim or 0) == dim:
                slots = labels.slots(self._num_groups, self._table.device).flatten()
                part = self._table[:, slots]
                factor = part if factor is None else factor * part
        return factor


def _shaped(factor: Tensor, values: Tensor, channel: int) -> Tensor:
    """``[B, C]`` with dims of size 1 put in, so that it broadcasts against values with C in the dim `channel`."""
    shape = [1] * values.ndim
    shape[0], shape[channel] = factor.shape
    return factor.view(shape)
