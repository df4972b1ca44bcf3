"""What may go: groups of weights, the rules that make them, and the units that a traced network couples."""

from __future__ import annotations

from sparsebayes.groups.grouping import Grouping, Labels, Quota
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.groups.rules import RULES, check_spec, make_grouping
from sparsebayes.groups.stacking import concatenate
from sparsebayes.groups.tracing import Slice, UnitGraph, trace_units

__all__ = [
    "RULES",
    "Grouping",
    "Hierarchy",
    "Labels",
    "Quota",
    "Slice",
    "UnitGraph",
    "check_spec",
    "concatenate",
    "make_grouping",
    "trace_units",
]
