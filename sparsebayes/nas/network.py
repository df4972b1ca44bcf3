"""Networks of cells: the same code builds a supernet, which has all operations, and a derived network, which has some.

    >>> network = build_network(genotype, width=16, depth=5, num_classes=10)
    >>> network(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

Stem (3x3 convolution, norm), stages of cells with reductions between them, then norm, ReLU, global average
pooling and a linear layer. What lies between is the space's (`spaces.py`). A derived network has affine norms: the
switch that an
operation had in the supernet can live on as the scale of its last norm (`inherit_`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError, RecipeError
from sparsebayes.nas.cell import Cell, MaxPoolBlock, ResidualBlock
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.ops import scale_of
from sparsebayes.nas.spaces import CellSpec, Edge, Space
from sparsebayes.nas.switches import SwitchTable, cell_keys

__all__ = [
    "BUILDER",
    "CellNetwork",
    "Shape",
    "build_network",
    "derived_network",
    "inherit_",
    "make_network",
    "set_drop_path_",
]

BUILDER = "sparsebayes.nas.network:derived_network"
"""Builder that saved networks name."""

Wiring = Callable[[str, CellSpec], tuple[tuple[Edge, ...], tuple[int, ...]]]
"""(key, kind of cell) -> the edges that the cell has, and the nodes that its output reads."""


@final
@dataclass(frozen=True)
class Shape:
    """How large a network is.

    Attributes:
        width: channels of a node in the first stage.
        depth: cells of a stage, reductions not counted.
        in_channels: channels of an image.
        num_classes: outputs.

    Raises:
        RecipeError: a number below 1.
    """

    width: int
    depth: int
    in_channels: int = 3
    num_classes: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for name, value in vars(self).items():
            if value < 1:
                raise RecipeError(f"expected {name} of at least 1, got {value}")


@final
class CellNetwork(nn.Module):
    """A stack of cells.

    Args:
        space: says how cells are stacked.
        shape: widths and depth.
        wiring: which edges each cell has.
        affine: whether the norms inside cells have scale and shift.
        auxiliary: add a second classifier at two thirds of the depth, for training only.
    """

    def __init__(
        self, space: Space, shape: Shape, wiring: Wiring, *, affine: bool, auxiliary: bool = False
    ) -> None:
        super().__init__()
        self._num_inputs = space.cells[0].num_inputs
        stem = shape.width * space.stem_multiplier
        self.stem = nn.Sequential(
            nn.Conv2d(shape.in_channels, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem)
        )
        self.blocks = nn.ModuleList()
        self.auxiliary: nn.Module | None = None
        self._auxiliary_block = -1
        states = [(stem, 0)] * self._num_inputs  # channels, halvings so far
        keys = cell_keys(space, shape.depth)
        widths = _widths(space, shape, len(keys))
        halvings = 0
        for number, (key, spec) in enumerate(keys):
            position = number % (shape.depth + 1) if space.reduction == "cell" else number % shape.depth
            begins = number > 0 and position == (shape.depth if space.reduction == "cell" else 0)
            halvings += begins
            if begins and space.reduction in ("residual", "max_pool"):
                states = [self._reduce(space, states[-1][0], widths[number], halvings)] * self._num_inputs
            reduction_cell = begins and space.reduction == "cell"
            edges, outputs = wiring(key, spec)
            cell = Cell(
                spec,
                edges,
                outputs,
                in_channels=[channels for channels, _ in states],
                strides=[2 ** (halvings - reduction_cell - halved) for _, halved in states],
                width=widths[number],
                edge_stride=1 + reduction_cell,
                project=space.project,
                residual=space.residual,
                affine=affine,
            )
            self.blocks.append(cell)
            states = [*states, (cell.out_channels, halvings)][-self._num_inputs :]
            if auxiliary and number == min(2 * len(keys) // 3, len(keys) - 1):
                self.auxiliary = _classifier(cell.out_channels, shape.num_classes)
                self._auxiliary_block = len(self.blocks) - 1
        self.head = _classifier(states[-1][0], shape.num_classes)

    def _reduce(self, space: Space, channels: int, width: int, halvings: int) -> tuple[int, int]:
        """Add what stands between two stages; the (channels, halvings) behind it."""
        residual = space.reduction == "residual"
        block = ResidualBlock(channels, width) if residual else MaxPoolBlock(channels, channels)
        self.blocks.append(block)
        return block.out_channels, halvings

    @property
    def cells(self) -> list[Cell]:
        """The cells in order."""
        return [block for block in self.blocks if isinstance(block, Cell)]

    def forward(self, images: Tensor, factors: Sequence[Tensor] | None = None) -> Tensor:
        """Logits.

        Args:
            images: of shape `[B, in_channels, H, W]`.
            factors: for each cell, the factor of each of its operations, of shape `[S]`, or `[B, S]` for one row per
                image; None: all 1.

        Returns:
            Of shape `[B, num_classes]`.
        """
        return self.classify(images, factors)[0]

    def classify(
        self, images: Tensor, factors: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and those of the auxiliary classifier where there is one and the network trains."""
        states = [self.stem(images)] * self._num_inputs
        auxiliary: Tensor | None = None
        number = 0
        for position, block in enumerate(self.blocks):
            if isinstance(block, Cell):
                out = block(states, None if factors is None else factors[number])
                states = [*states, out][-self._num_inputs :]
                number += 1
            else:
                states = [block(states[-1])] * self._num_inputs
            if self.auxiliary is not None and self.training and position == self._auxiliary_block:
                auxiliary = self.auxiliary(states[-1])
        return self.head(states[-1]), auxiliary


def make_network(space: Space, shape: Shape, *, affine: bool, wiring: Wiring | None = None) -> CellNetwork:
    """A network with all operations of a space, or with those that a wiring names."""
    return CellNetwork(space, shape, wiring or (lambda key, spec: (spec.edges, spec.outputs)), affine=affine)


def build_network(
    genotype: Genotype,
    *,
    width: int,
    depth: int,
    in_channels: int = 3,
    num_classes: int = 10,
    auxiliary: bool = False,
) -> CellNetwork:
    """An ordinary network of a genotype's cells, with fresh weights.

    Args:
        genotype: the operations of every cell.
        width: channels of a node in the first stage.
        depth: cells of a stage; where cells are not shared, that of the search.
        in_channels: channels of an image.
        num_classes: outputs.
        auxiliary: add a second classifier at two thirds of the depth, for training only (`classify`).

    Returns:
        The network, in training mode, on the CPU.

    Raises:
        RecipeError: a size below 1, or a cell that the genotype does not have.
        ModelError: a cell without any operation.
    """

    def wiring(key: str, spec: CellSpec) -> tuple[tuple[Edge, ...], tuple[int, ...]]:
        edges = genotype.edges(key)
        fed = {edge.target for edge in edges}
        outputs = tuple(node for node in spec.outputs if node in fed)
        if not outputs:
            raise ModelError(
                f"cell {key!r} of the genotype has no operation that reaches its output; search again"
            )
        return edges, outputs

    shape = Shape(width, depth, in_channels, num_classes)
    return CellNetwork(genotype.search_space, shape, wiring, affine=True, auxiliary=auxiliary)


def derived_network(
    *, genotype: Mapping[str, Any], width: int, depth: int, in_channels: int = 3, num_classes: int = 10
) -> CellNetwork:
    """`build_network` from plain data: the builder that saved networks name.

    Raises:
        RecipeError: the data are no genotype, or a size is below 1.
        ModelError: a cell without any operation.
    """
    found = Genotype.from_dict(genotype)
    return build_network(found, width=width, depth=depth, in_channels=in_channels, num_classes=num_classes)


def inherit_(network: CellNetwork, supernet: CellNetwork, switches: Tensor, table: SwitchTable) -> None:
    """Give a derived network the weights and the switches of the supernet that it was found in.

    Both compute the same then, if the operations that the derived network lacks had switch 0 and what reads a node
    without operations is 0 as well.

    Args:
        network: derived, of the supernet's width and depth.
        supernet: the network with all operations.
        switches: of shape `[T]`.
        table: what each switch belongs to.

    Raises:
        ModelError: the networks are not of one width and depth.
    """
    target, source = network.state_dict(), supernet.state_dict()
    factors = table.effective(switches.detach())
    channels = _channels_read(network, supernet)
    with torch.no_grad():
        for name, value in target.items():
            if name not in source:
                continue
            given = source[name]
            kept = channels.get(name.rpartition(".")[0])
            if kept is not None and given.ndim and given.shape != value.shape:
                given = given.index_select(min(given.ndim - 1, 1), kept.to(given.device))
            if given.shape != value.shape:
                raise ModelError(
                    f"weights can only be inherited at the width and depth of the search, but {name!r} has shape "
                    f"{list(value.shape)} here and {list(given.shape)} in the supernet; set retrain.inherit to false"
                )
            value.copy_(given)
        for cell, span in zip(network.cells, table.op_slices, strict=True):
            values = dict(zip(cell.spec.places(), factors[span], strict=True))
            for place, module in cell.operations():
                scale_of(module).fill_(float(values[place]))


def _channels_read(network: CellNetwork, supernet: CellNetwork) -> dict[str, Tensor]:
    """For the layers that read a cell's output: which of the supernet's channels are left where nodes are missing."""
    found: dict[str, Tensor] = {}
    num_inputs = len(supernet.cells[0].in_channels)
    states: list[Tensor | None] = [None] * num_inputs

    def reads(state: Tensor | None, *layers: str) -> None:
        if state is not None:
            found.update(dict.fromkeys(layers, state))

    for number, (block, whole) in enumerate(zip(network.blocks, supernet.blocks, strict=False)):
        if isinstance(block, Cell) and isinstance(whole, Cell):
            for node in block.inputs:
                reads(states[int(node)], f"blocks.{number}.inputs.{node}.1")
            width = block.out_channels // len(block.outputs)
            places = [whole.outputs.index(node) for node in block.outputs]
            kept = torch.cat([torch.arange(width) + width * place for place in places])
            states = [*states, kept][-num_inputs:]
        elif isinstance(block, ResidualBlock):
            reads(states[-1], f"blocks.{number}.body.1", f"blocks.{number}.shortcut.1")
            states = [None] * num_inputs
        else:
            states = [states[-1]] * num_inputs
    reads(states[-1], "head.0", "head.4")
    return found


def set_drop_path_(network: CellNetwork, probability: float) -> None:
    """Drop the result of every operation but the identity with this probability, image by image, while training."""
    for cell in network.cells:
        cell.drop_path = probability


def _widths(space: Space, shape: Shape, num_cells: int) -> list[int]:
    """Channels of a node in each cell."""
    if space.widths == "linear":
        last = shape.width * 2 ** (space.num_stages - 1)
        return [round(shape.width + (last - shape.width) * (i + 1) / num_cells) for i in range(num_cells)]
    if space.reduction == "cell":  # a reduction cell already has the width of the stage behind it
        return [shape.width * 2 ** ((i + 1) // (shape.depth + 1)) for i in range(num_cells)]
    return [shape.width * 2 ** (i // shape.depth) for i in range(num_cells)]


def _classifier(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )
