"""Groups of a compacted network, from those of the network before: cut like the parameters that they label.

>>> smaller, origin = carry_grouping(grouping, compaction.kept, selection.on)
>>> gamma = gamma[origin]                       # what was known of the surviving groups goes on
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically
from sparsebayes.groups.grouping import Grouping, Labels, Quota
from sparsebayes.prune.cutting import Kept, is_gone

__all__ = ["Lineage", "carry_grouping"]


@dataclass(frozen=True, eq=False)
class Lineage:
    """What is left of a dense network after several removals, in the dense network's own numbers.

    Attributes:
        on: Bool of shape ``[G]``, over the dense network's groups: which are still there.
        masks: Parameter name to bool of the *present* shape: entries held at zero are False.
        kept: Parameter or buffer name to dimension to the dense network's positions that are still there.
    """

    on: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept = field(default_factory=dict)

    def then(self, origin: Tensor, on: Tensor, masks: dict[str, Tensor], kept: Kept) -> Lineage:
        """The lineage after one more removal.

        Args:
            origin: Dense numbers of the groups that were still there, as `grouping` returned them.
            on: Bool of the same length: which of them stay.
            masks: As they are after it.
            kept: Positions that stayed, in the numbers of the network before it.
        """
        joint = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in kept.items():
            for dim, positions in dims.items():
                before = joint.setdefault(name, {}).get(dim)
                joint[name][dim] = positions if before is None else before[positions]
        still = torch.zeros_like(self.on)
        still[origin[on.cpu()]] = True
        return Lineage(still, masks, joint)

    def grouping(self, dense: Grouping) -> tuple[Grouping, Tensor]:
        """The groups that are still there, over the present network, and their dense numbers.

        A group can be gone although it was never switched off: a channel that nothing reads any more, say.
        """
        return carry_grouping(dense, self.kept, self.on)

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all.

        Raises:
            RunError: If the folder cannot be written.
        """
        tensors = {"on": self.on.to(torch.uint8)}
        tensors.update({f"mask/{name}": mask.to("cpu", torch.uint8) for name, mask in self.masks.items()})
        for name, dims in self.kept.items():
            tensors.update({f"kept/{dim}/{name}": positions.cpu() for dim, positions in dims.items()})
        write_atomically(path, safetensors_bytes({name: t.contiguous() for name, t in tensors.items()}))

    @staticmethod
    def load(path: Path) -> Lineage:
        """Read what `save` wrote.

        Raises:
            RunError: If the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
            masks = {n.removeprefix("mask/"): t.bool() for n, t in tensors.items() if n.startswith("mask/")}
            kept: Kept = {}
            for name, positions in tensors.items():
                if name.startswith("kept/"):
                    _, dim, parameter = name.split("/", 2)
                    kept.setdefault(parameter, {})[int(dim)] = positions
            return Lineage(tensors["on"].bool(), masks, kept)
        except Exception as error:  # safetensors raises its own, undocumented types
            raise RunError(
                f"{path} is missing or damaged ({type(error).__name__}); start the run anew"
            ) from None


def carry_grouping(grouping: Grouping, kept: Kept, on: Tensor | None = None) -> tuple[Grouping, Tensor]:
    """Follow a grouping through a compaction.

    Args:
        grouping: G groups of the network before.
        kept: Parameter name to dimension to the positions that stayed (`Compaction.kept`).
        on: Bool of shape ``[G]``: groups that are off are dropped also where entries of theirs are still there as
            zeros; None: drop only groups that lost all their entries.

    Returns:
        The grouping of the compacted network, with G' groups in the old order, and the old number of each, int64 of
        shape ``[G']``.
    """
    cuts = [_cut(labels, kept) for labels in grouping.labels]
    present = torch.zeros(grouping.num_groups + 1, dtype=torch.bool)
    for index, shape in cuts:
        if 0 not in shape:
            present[(index + 1).flatten()] = True
    present = present[1:] if on is None else present[1:] & on.cpu()
    origin = present.nonzero().flatten()
    number = torch.full((grouping.num_groups + 1,), -1, dtype=torch.int64)
    number[origin + 1] = torch.arange(len(origin))
    # A parameter of a branch that is gone has no entries left, and no name in the network.
    labels = tuple(
        Labels(old.parameter, shape, number[index + 1], old.gate)
        for old, (index, shape) in zip(grouping.labels, cuts, strict=True)
        if 0 not in shape
    )
    quota = grouping.quota
    if quota is not None:
        quota = Quota(quota.pool[origin], quota.keep)
    index = grouping.layer_index[origin]
    return Grouping(grouping.name, labels, grouping.layers, index, quota, grouping.optional_layers), origin


def _cut(labels: Labels, kept: Kept) -> tuple[Tensor, tuple[int, ...]]:
    """Index and parameter shape of one label map after the cut."""
    if is_gone(labels.parameter, kept):
        return labels.index, (0,)
    index, shape = labels.index, list(labels.shape)
    for dim, positions in kept.get(labels.parameter, {}).items():
        shape[dim] = len(positions)
        if index.shape[dim] > 1 or labels.shape[dim] == 1:
            index = index.index_select(dim, positions)
    return index, tuple(shape)
