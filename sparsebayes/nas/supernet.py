"""A network with all operations of a search space at once, and a switch for each of them.

    >>> supernet = Supernet(SPACES["nas_bench_201"], Shape(width=8, depth=1), initial=0.5)
    >>> supernet(images).shape                                   # with its own switches
    torch.Size([64, 10])
    >>> supernet(images, switches=sample).shape                  # with others, also one row for each image
    torch.Size([64, 10])

The result of an operation is multiplied by its switch and its edge's zero-gate, and the results of an edge are summed
(BayesNAS, arXiv 1905.04919, section 3). Nothing here knows how switches are learned: an algorithm reads the parameter
`switches`, or passes its own values with the images. Operations that were switched off for good are not computed.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.nas.network import Shape, make_network
from sparsebayes.nas.spaces import Space
from sparsebayes.nas.switches import SwitchTable

__all__ = ["Supernet"]


@final
class Supernet(nn.Module):
    """A supernet.

    Args:
        space: the search space.
        shape: how large.
        initial: value that every switch begins with; gates begin with 1.
        remember: False saves memory: activations inside operations are computed again in the backward pass.

    Attributes:
        table: what each switch belongs to.
        switches: parameter of shape `[T]`.
        alive: buffer of shape `[T]`: False for switches that are off for good.
        network: the network of cells.
    """

    alive: Tensor

    def __init__(self, space: Space, shape: Shape, *, initial: float = 1.0, remember: bool = True) -> None:
        super().__init__()
        self.space = space
        self.shape = shape
        self.table = SwitchTable.of(space, shape.depth)
        gates = torch.ones(self.table.num_switches, dtype=torch.bool)
        for span in self.table.op_slices:
            gates[span] = False
        self.switches = nn.Parameter(torch.where(gates, 1.0, initial))
        self.register_buffer("alive", torch.ones(self.table.num_switches, dtype=torch.bool))
        self.network = make_network(space, shape, affine=False)
        for cell in self.network.cells:
            cell.remember = remember
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda module, keys: module._skip_dead()
        )

    def forward(self, images: Tensor, switches: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            images: of shape `[B, C, H, W]`.
            switches: of shape `[T]`, or `[B, T]` for one row per image; None: the network's own.

        Returns:
            Of shape `[B, num_classes]`.

        Raises:
            ModelError: switches of another shape.
        """
        values = self.switches if switches is None else switches
        expected = self.table.num_switches
        if values.shape not in ((expected,), (len(images), expected)):
            raise ModelError(
                f"expected switches of shape [{expected}] or [{len(images)}, {expected}], got {list(values.shape)}"
            )
        factors = self.table.effective(values * self.alive)
        logits: Tensor = self.network(images, [factors[..., span] for span in self.table.op_slices])
        return logits

    def switch_off_(self, off: Tensor) -> None:
        """Switch groups off for good: their operations are not computed any more.

        Args:
            off: bool of shape `[G]`.

        Raises:
            ModelError: not of that shape, or a cell would lose all that reaches its output.
        """
        if off.shape != (self.table.num_groups,) or off.dtype != torch.bool:
            raise ModelError(f"expected one bool for each of the {self.table.num_groups} groups")
        alive = self.alive & ~off.to(self.alive.device)[self.table.group.to(self.alive.device)]
        self.alive.copy_(alive)
        self._skip_dead()

    def _skip_dead(self) -> None:
        """Tell every cell which operations have no switch that is alive."""
        alive = self.table.effective(self.alive.float()) > 0
        for cell, span in zip(self.network.cells, self.table.op_slices, strict=True):
            cell.skip_((~alive[span]).nonzero().flatten().tolist())
