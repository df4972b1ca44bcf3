"""What an operation is worth beyond the scale of the sum that it enters.

A node of a cell is the sum of its operations, and whatever reads the node ends in a batch norm: if all operations of a
node grow alike, nothing changes. Curvature is measured with fixed statistics, though, in which the common scale counts.
An operation that says the same as its neighbours, a skip connection among skips, then looks worth much merely because
the sum shrinks without it. So the others may rescale together when one goes. With H the Gauss-Newton matrix of relative
changes (z = 1), w the other operations of g's node that are on, 1 for each, and t their common change,

    e_g = min over t of (w t - 1_g)' H (w t - 1_g) = H_gg - (H w)_g^2 / w' H w,

twice the loss in nats, as z^2 h everywhere. Twins, and an operation that goes its own way:

    >>> H = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    >>> rescaled(H, beside=~torch.eye(3, dtype=torch.bool))
    tensor([2., 2., 4.])
    >>> rescaled(H[:2, :2], beside=~torch.eye(2, dtype=torch.bool))        # one of two twins may go, not both
    tensor([4., 0.])

Not in the papers: one step towards the full posterior, in which everything readjusts (MacKay 1992) and the quadratic is
trusted far from where it was measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rescaled"]


def rescaled(matrix: Tensor, beside: Tensor) -> Tensor:
    """Evidence of every group when those beside it may rescale together.

    Args:
        matrix: Gauss-Newton matrix H in relative changes, nats of the whole data set, of shape `[G, G]`.
        beside: in row g the operations that may make up for g, bool of shape `[G, G]`;
            `sparsebayes.nas.switches.SwitchTable.beside` says which.

    Returns:
        Of shape `[G]`, at least 0. The operation that is worth most to its node keeps H_gg, as does one that nothing
        stands beside: when the others are gone, nothing makes up for it.
    """
    others = beside.to(matrix)
    along = (others * matrix).sum(1)  # (H w)_g
    scale = torch.einsum("gi,ij,gj->g", others, matrix, others)  # w' H w
    saved = torch.where(scale > 0, along.square() / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)
    worth = (matrix.diagonal() - saved).clamp(min=0)
    order = torch.arange(len(worth), device=worth.device)
    ahead = (worth > worth[:, None]) | ((worth == worth[:, None]) & (order < order[:, None]))
    is_operation = beside.any(0)  # gates stand beside nothing
    is_first = is_operation & ~(beside & ahead).any(1)
    return torch.where(is_first, matrix.diagonal(), worth)
