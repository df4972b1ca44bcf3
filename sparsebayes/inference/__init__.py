"""What we believe about the switches: priors, evidence updates and posteriors, as plain tensors.

Nothing here sees a network: magnitudes, curvatures or gradients come in, one number per group, and penalties and
decisions come out. The contract that all posteriors share: `sparsebayes.inference.posterior`; symbols:
`sparsebayes.inference.prior`.
"""

from __future__ import annotations

from sparsebayes.inference.laplace import Laplace
from sparsebayes.inference.natural_gradient import NaturalGradient
from sparsebayes.inference.posterior import Posterior
from sparsebayes.inference.variational_dropout import VariationalDropout

__all__ = ["Laplace", "NaturalGradient", "Posterior", "VariationalDropout"]
