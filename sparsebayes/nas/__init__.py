"""Architecture search: search spaces as data, supernets with a switch per operation, genotypes, and networks of them.

>>> supernet = Supernet(SPACES["darts"], Shape(width=16, depth=2))
>>> network = build_network(Genotype.from_json(text), width=36, depth=6)
"""

from __future__ import annotations

from sparsebayes.nas.catalogue import SPACES, find_space
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.network import Shape, build_network, derived_network, inherit_
from sparsebayes.nas.spaces import Space, read_space
from sparsebayes.nas.supernet import Supernet

__all__ = [
    "SPACES",
    "Genotype",
    "Shape",
    "Space",
    "Supernet",
    "build_network",
    "derived_network",
    "find_space",
    "inherit_",
    "read_space",
]
