"""How curved the loss is: Gauss-Newton curvature of the groups' switches and of single weights."""

from __future__ import annotations

from sparsebayes.curvature.entries import entry_curvature
from sparsebayes.curvature.gates import gate_curvature, gate_rows
from sparsebayes.curvature.result import Curvature
from sparsebayes.curvature.switches import switch_curvature, switch_rows

__all__ = ["Curvature", "entry_curvature", "gate_curvature", "gate_rows", "switch_curvature", "switch_rows"]
