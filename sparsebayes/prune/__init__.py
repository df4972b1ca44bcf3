"""What goes: selections, masks, and the surgery that turns a masked network into a smaller ordinary one."""

from __future__ import annotations

from sparsebayes.prune.architecture import Architecture, architecture_of
from sparsebayes.prune.compaction import Compaction, Summary, compact
from sparsebayes.prune.cutting import carry_tensors
from sparsebayes.prune.gather import GatheredLinear
from sparsebayes.prune.masking import Masks, prune_
from sparsebayes.prune.optimizer import carry_optimizer_state
from sparsebayes.prune.reshaping import reshape_
from sparsebayes.prune.selection import Selection, select, select_top

__all__ = [
    "Architecture",
    "Compaction",
    "GatheredLinear",
    "Masks",
    "Selection",
    "Summary",
    "architecture_of",
    "carry_optimizer_state",
    "carry_tensors",
    "compact",
    "prune_",
    "reshape_",
    "select",
    "select_top",
]
