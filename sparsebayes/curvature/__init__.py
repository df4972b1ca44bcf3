"""How curved the loss is: Gauss-Newton curvature of groups' switches, of single weights, and of a supernet's switches.

| what                                   | function              | what it costs beside one training pass            |
| -------------------------------------- | --------------------- | ------------------------------------------------- |
| gates of filters, channels, units, ... | `gate_curvature`      | about 0.65: no weight gradients                   |
| the same, as factors of a matrix       | `gate_rows`           | the same                                          |
| switches that are parameters           | `switch_curvature`    | 0.45, with the full matrix                        |
| single weights                         | `entry_curvature`     | about 1.2; a fraction of it with `importance=0.1` |
| sums over the weights of every group   | `sum_curvature`       | about 0.8 for filters                             |
| the matrix of every group's entries    | `block_curvature`     | more: for small groups                            |
| anything, images coupled by batch norm | `probe_curvature`     | about 1.2; noisier                                |
| the literature's layer recursion       | `recursion_curvature` | 1 to 1.7; biased, for comparison                  |

Costs: processor time on one core, 32 x 32 images, VGG-16-BN and a cell of 98 switches (`tools/bench_curvature.py`).

`exact.py` holds the oracle that all of them are tested against.
"""

from __future__ import annotations

from sparsebayes.curvature.blocks import block_curvature
from sparsebayes.curvature.entries import EntryCurvature, entry_curvature
from sparsebayes.curvature.gates import gate_curvature, gate_rows
from sparsebayes.curvature.probe import probe_curvature
from sparsebayes.curvature.recursion import recursion_curvature
from sparsebayes.curvature.result import Curvature
from sparsebayes.curvature.switches import switch_curvature, switch_rows
from sparsebayes.curvature.traces import sum_curvature

__all__ = [
    "Curvature",
    "EntryCurvature",
    "block_curvature",
    "entry_curvature",
    "gate_curvature",
    "gate_rows",
    "probe_curvature",
    "recursion_curvature",
    "sum_curvature",
    "switch_curvature",
    "switch_rows",
]
