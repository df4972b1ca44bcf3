"""What we believe about the switches: priors, evidence updates and posteriors, as plain tensors.

Nothing here sees a network: magnitudes and curvatures come in, one number per group, and penalties and
decisions come out. Symbols: `sparsebayes.inference.prior`.
"""

from __future__ import annotations

from sparsebayes.inference.laplace import Laplace

__all__ = ["Laplace"]
