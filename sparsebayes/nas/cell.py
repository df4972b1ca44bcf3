"""One cell as a module: a graph whose edges are sums of operations, each times a factor if there is one.

The same class serves supernets, where every edge has all its candidates and factors come in with the images, and
derived networks, where it has what is left and no factors are given. It knows nothing of how factors come about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsebayes.errors import ModelError
from sparsebayes.nas.ops import build_op
from sparsebayes.nas.sharing import Place, Unit, compute, share
from sparsebayes.nas.spaces import CellSpec, Edge

__all__ = ["Cell", "MaxPoolBlock", "ResidualBlock"]


@final
class Cell(nn.Module):
    """A cell of a network.

    Args:
        spec: the kind of cell.
        edges: the edges that it has, with the operations on them.
        outputs: nodes that its output reads, each of them fed by an edge.
        in_channels: channels of each input.
        strides: for each input, what its resolution is divided by on the way in.
        width: channels of a node.
        edge_stride: stride of the operations that read an input: 2 in a reduction cell.
        project: bring every input to `width` by ReLU, pointwise convolution and norm; the projection then strides.
        residual: add the input to the output.
        affine: whether norms have scale and shift.

    Attributes:
        spec: as given.
        outputs: as given.
        in_channels: as given.
        out_channels: channels of the output.
        drop_path: probability with which an operation's result is dropped while training, image by image.
        remember: False: keep no activations inside operations but compute them again in the backward pass.
    """

    def __init__(
        self,
        spec: CellSpec,
        edges: Sequence[Edge],
        outputs: Sequence[int],
        *,
        in_channels: Sequence[int],
        strides: Sequence[int],
        width: int,
        edge_stride: int,
        project: bool,
        residual: bool,
        affine: bool,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_channels = tuple(in_channels)
        self.out_channels = width * len(outputs)
        self.drop_path = 0.0
        self.remember = True
        self.outputs = tuple(outputs)
        self._skip: frozenset[int] = frozenset()
        self._places = {(edge.source, edge.target): number for number, edge in enumerate(spec.edges)}
        if not project:
            edge_stride = strides[0]
        read = {edge.source for edge in edges}
        self.inputs = nn.ModuleDict()
        for node in sorted(read & set(range(spec.num_inputs))) if project else ():
            self.inputs[str(node)] = _pointwise(in_channels[node], width, strides[node], affine)
        self.edges = nn.ModuleDict()
        for edge in edges:
            enters = edge.source < spec.num_inputs
            c_in = in_channels[edge.source] if enters and not project else width
            stride = edge_stride if enters else 1
            ops = {op: build_op(op, c_in, width, stride=stride, affine=affine) for op in edge.ops}
            self.edges[f"{edge.source}-{edge.target}"] = nn.ModuleDict(ops)
        self._residual = residual
        self._halves = residual and strides[0] > 1
        # Positions of the operations among the switches of the kind of cell.
        slots = {place: slot for slot, place in enumerate(spec.places())}
        self._plan = [
            (
                edge.source,
                edge.target,
                [(op, slots[self._places[edge.source, edge.target], op]) for op in edge.ops],
            )
            for edge in sorted(edges, key=lambda edge: edge.target)
        ]
        self._units = self._share()

    def operations(self) -> Iterator[tuple[tuple[int, str], nn.Module]]:
        """((number of the edge in the kind of cell, operation), module) of every operation."""
        for source, target, ops in self._plan:
            for op, _ in ops:
                yield (self._places[source, target], op), self._op(source, target, op)

    def skip_(self, slots: Sequence[int]) -> None:
        """Compute all operations but these.

        Args:
            slots: positions in the order of `CellSpec.places`.

        Raises:
            ModelError: nothing would reach the output.
        """
        off = frozenset(slots)
        fed = set(range(self.spec.num_inputs))
        for source, target, ops in self._plan:
            if source in fed and any(slot not in off for _, slot in ops):
                fed.add(target)
        if not fed & set(self.outputs):
            raise ModelError(
                f"expected an operation that reaches the output of cell {self.spec.name!r}, got none"
            )
        self._skip = off
        self._units = self._share()

    def forward(self, states: Sequence[Tensor], factors: Tensor | None = None) -> Tensor:
        """The cell's output.

        Args:
            states: the inputs, each of shape `[B, C, H, W]`.
            factors: of every candidate of the kind of cell, in the order of `CellSpec.places`: of shape `[S]`, or
                `[B, S]` for one row per image; None: all 1.

        Returns:
            Of shape `[B, out_channels, H', W']`.
        """
        nodes = {node: states[node] for node in range(self.spec.num_inputs)}
        for name, projection in self.inputs.items():
            nodes[int(name)] = projection(states[int(name)])
        results = self._together if self._may_share() else self._one_by_one
        for target, y in results(nodes, factors):
            nodes[target] = nodes[target] + y if target in nodes else y
        made = next(nodes[node] for node in self.outputs if node in nodes)
        read = [nodes[node] if node in nodes else torch.zeros_like(made) for node in self.outputs]
        out = torch.cat(read, 1) if len(read) > 1 else made
        return out + self._shortcut(states[0]) if self._residual else out

    def _one_by_one(
        self, nodes: Mapping[int, Tensor], factors: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        """(node, what one operation adds to it) of all operations; nodes are read when they are complete."""
        for source, target, ops in self._plan:
            for op, slot in ops:
                if slot in self._skip or source not in nodes:
                    continue
                y = self._compute(self._op(source, target, op), nodes[source])
                if factors is not None:
                    y = y * factors[..., slot].reshape(-1, 1, 1, 1)
                if self.drop_path and self.training and op != "skip_connect":
                    y = _drop(y, self.drop_path)
                yield target, y

    def _together(self, nodes: Mapping[int, Tensor], factors: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """The same in less time, by what leaves each node (`sharing.py`)."""
        for source, units in self._units.items():
            if source in nodes:
                yield from compute(units, nodes[source], factors)

    def _may_share(self) -> bool:
        """Whether operations can be computed together: those of a supernet, by the batch's statistics alone."""
        if not (self._units and self.training and self.remember) or self.drop_path:
            return False
        return all(norm.training for units in self._units.values() for unit in units for norm in unit.norms)

    def _share(self) -> dict[int, list[Unit]]:
        """For each node, the operations that read it and are not skipped; nothing where they share nothing."""
        return share(
            Place(source, target, slot, self._op(source, target, op))
            for source, target, ops in self._plan
            for op, slot in ops
            if slot not in self._skip
        )

    def _op(self, source: int, target: int, op: str) -> nn.Module:
        ops = self.edges[f"{source}-{target}"]
        assert isinstance(ops, nn.ModuleDict)
        return ops[op]

    def _compute(self, op: nn.Module, x: Tensor) -> Tensor:
        if self.remember or not (self.training and torch.is_grad_enabled()):
            result: Tensor = op(x)
            return result
        contexts = partial(_contexts, op)
        again: Tensor = checkpoint(op, x, use_reentrant=False, context_fn=contexts)
        return again

    def _shortcut(self, x: Tensor) -> Tensor:
        """The input at the output's resolution, with channels of zeros behind its own (PyramidNet)."""
        if self._halves:
            x = functional.avg_pool2d(x, 2)
        return functional.pad(x, (0, 0, 0, 0, 0, self.out_channels - x.shape[1]))


@final
class ResidualBlock(nn.Module):
    """Two convolutions that halve the resolution, and a pooled shortcut: between stages (NAS-Bench-201, section 2).

    Args:
        c_in: channels of the input.
        c_out: channels of the output.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.out_channels = c_out
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """From `[B, c_in, H, W]` to `[B, c_out, H/2, W/2]`, for even H and W."""
        result: Tensor = self.body(x) + self.shortcut(x)
        return result


@final
class MaxPoolBlock(nn.Module):
    """Max-pooling over 2x2 between stages (NAS-Bench-101); the next cell changes the width.

    Args:
        c_in: channels of the input, and of the output.
        c_out: the same number.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.out_channels = c_out

    def forward(self, x: Tensor) -> Tensor:
        """From `[B, C, H, W]` to `[B, C, H/2, W/2]`."""
        return functional.max_pool2d(x, 2)


def _pointwise(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Sequential:
    """ReLU, 1x1 convolution, norm."""
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out, affine=affine)
    )


def _drop(x: Tensor, probability: float) -> Tensor:
    """Zero whole images of a batch, and scale the others so that the mean stays."""
    kept = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) >= probability
    return x * kept / (1 - probability)


def _contexts(op: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a checkpointed operation runs in: nothing special first, without statistics when it is computed again."""
    return nullcontext(), _frozen_statistics(op)


@contextmanager
def _frozen_statistics(op: nn.Module) -> Iterator[None]:
    """Leave running means and variances alone: the same batch must not count twice."""
    norms = [module for module in op.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
