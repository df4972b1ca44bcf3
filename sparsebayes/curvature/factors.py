"""Square roots of the likelihood's Hessian, exact or random: what one backward pass is started with.

With logits f of one image, loss l and Lam = d2l/df2, the Gauss-Newton curvature along a direction a = df/dz
is a^T Lam a. Any vectors v_k with sum_k E[v_k v_k^T] = Lam give it as sum_k E[(v_k . a)^2], and v_k . a costs
one backward pass. Symbols: p the class probabilities, C the number of classes, K the number of passes.

| likelihood             | loss of one image                           | Lam              |
| ---------------------- | ------------------------------------------- | ---------------- |
| `cross_entropy`        | -log p_y, p = softmax(f)                    | diag(p) - p p^T  |
| `mse`                  | sum_c (f_c - y_c)^2                         | 2 I              |
| `binary_cross_entropy` | -sum_c log-likelihood of y_c, p = sigmoid(f) | diag(p (1 - p)) |

Random factors of the cross-entropy, in order of falling noise:

* `stick`: v = L s with random signs s and L the Cholesky factor of Lam, classes sorted by falling p. With
  r_k = 1 - sum_{j<=k} p_j and r_0 = 1:  L_kk = sqrt(p_k r_k / r_{k-1}),  L_jk = -p_j sqrt(p_k / (r_{k-1}
  r_k)), j > k. Its first column ("the top class against the rest") holds most of Lam, and (b . s)^2 is least
  noisy when one coordinate of b dominates; with two classes it is exact. The closed form is the classical
  factor of the multinomial's covariance.
* `rademacher`: v = (diag(sqrt p) - p sqrt(p)^T) s.
* `sampled_label`: v = p - onehot(y), y drawn from p: the Fisher matrix by Monte Carlo (Martens, "New insights
and
  perspectives on the natural gradient method", JMLR 2020, section 9).

For `mse` and `binary_cross_entropy` Lam is diagonal, and both sign factors are v = sqrt(Lam) s.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> columns = class_columns(logits)                                 # [C, B, C]
    >>> torch.einsum("kbi,kbj->bij", columns, columns)                  # diag(p) - p p^T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Generator, Tensor
from torch.nn import functional

from sparsebayes.errors import ModelError, RecipeError, unknown

__all__ = [
    "ESTIMATORS",
    "FACTORS",
    "LIKELIHOODS",
    "Factor",
    "Starts",
    "class_columns",
    "rademacher",
    "sampled_label",
    "stick",
    "stick_columns",
]

Factor = Callable[[Tensor, Generator], Tensor]
"""Own starting vectors: (logits `[B, C]`, generator) -> v `[K, B, C]`, summed over K when squared."""

LIKELIHOODS = ("cross_entropy", "mse", "binary_cross_entropy")
ESTIMATORS = ("exact", "monte_carlo")
FACTORS = ("stick", "rademacher", "sampled_label")

_NO_LABELS = (
    "factor 'sampled_label' draws class labels, which likelihood 'mse' does not have; use factor 'stick'"
)


def class_columns(logits: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Exact square root: one column per class.

    Args:
        logits: of shape `[B, C]`.
        likelihood: one of `LIKELIHOODS`.

    Returns:
        v of shape `[C, B, C]`, in the logits' dtype: sum_k v_k v_k^T = Lam for each image.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    num_classes = logits.shape[1]
    unit = torch.eye(num_classes, dtype=torch.float64, device=logits.device).unsqueeze(1)  # [C, 1, C]
    if likelihood == "cross_entropy":
        return rademacher(logits, unit.expand(-1, len(logits), -1))
    return (_diagonal_root(logits, likelihood) * unit).to(logits.dtype)


def stick_columns(logits: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Exact square root with as few columns as Lam has rank: those of the stick-breaking factor.

    Args:
        logits: of shape `[B, C]`.
        likelihood: one of `LIKELIHOODS`.

    Returns:
        v of shape `[K, B, C]`, in the logits' dtype: sum_k v_k v_k^T = Lam for each image. K = C - 1 for the
        cross-entropy, whose last column is 0 because Lam 1 = 0; else C.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    num_classes = logits.shape[1]
    unit = torch.eye(num_classes, dtype=torch.float64, device=logits.device).unsqueeze(1)  # [C, 1, C]
    if likelihood == "cross_entropy":
        unit = unit[: max(num_classes - 1, 1)]
    return stick(logits, unit.expand(-1, len(logits), -1), likelihood)


def stick(logits: Tensor, signs: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Apply the sorted stick-breaking factor to a sign vector.

    Args:
        logits: of shape `[B, C]`.
        signs: s of shape `[..., B, C]`; its position k belongs to the k-th most probable class. Linear in
            `signs`: the unit vectors give the factor's columns.
        likelihood: one of `LIKELIHOODS`.

    Returns:
        v of the shape of `signs`, in the logits' dtype: E[v v^T] = Lam for independent zero-mean
        unit-variance signs.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    if likelihood != "cross_entropy":
        return (_diagonal_root(logits, likelihood) * signs).to(logits.dtype)
    p, order = functional.softmax(logits.double(), dim=1).sort(dim=1, descending=True)
    # Summed from the small end: 1 - cumsum(p) would lose every rest that is below the rounding error of 1.
    rest_before = p.flip(1).cumsum(1).flip(1)  # r_{k-1} = sum_{j>=k} p_j, as sum p = 1
    rest = functional.pad(rest_before[:, 1:], (0, 1))  # r_k
    # Where nothing is left the column is 0 in the limit; computed, it would be 0/0.
    left = rest > 0
    share = p / rest_before.where(rest_before > 0, 1.0)  # p_k / r_{k-1}
    # A root of the quotient would overflow where the rest is subnormal; the quotient of roots stays below 1e162.
    down = torch.where(left, share.sqrt() / rest.where(left, 1.0).sqrt(), 0.0)  # t_k
    # Shifted rather than cumsum minus its last term: t_j may exceed all earlier ones by 1e15.
    before = functional.pad((down * signs)[..., :-1], (1, 0)).cumsum(-1)  # sum over k < j of t_k s_k
    sorted_v = (share * rest).sqrt() * signs - p * before
    back = order.argsort(dim=1).expand(sorted_v.shape)
    return sorted_v.gather(-1, back).to(logits.dtype)


def rademacher(logits: Tensor, signs: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Apply the factor diag(sqrt p) - p sqrt(p)^T to a sign vector.

    Args:
        logits: of shape `[B, C]`.
        signs: s of shape `[..., B, C]`. Linear in `signs`: the unit vectors give `class_columns`.
        likelihood: one of `LIKELIHOODS`.

    Returns:
        v of the shape of `signs`, in the logits' dtype: E[v v^T] = Lam for independent zero-mean
        unit-variance signs.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    if likelihood != "cross_entropy":
        return (_diagonal_root(logits, likelihood) * signs).to(logits.dtype)
    p = functional.softmax(logits.double(), dim=1)
    scaled = p.sqrt() * signs
    return (scaled - p * scaled.sum(-1, keepdim=True)).to(logits.dtype)


def sampled_label(logits: Tensor, uniform: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Gradient of the loss at a label drawn from the model itself.

    Args:
        logits: of shape `[B, C]`.
        uniform: random numbers in [0, 1), of shape `[..., B, C]`. The cross-entropy inverts the distribution
            function at the first of the C, as one label is drawn per image; the binary one draws C labels.
        likelihood: `cross_entropy` or `binary_cross_entropy`.

    Returns:
        v of the shape of `uniform`, in the logits' dtype: p - onehot(y) or p - y.

    Raises:
        RecipeError: the likelihood is `mse`, which has no labels to draw, or unknown.
    """
    if likelihood == "cross_entropy":
        p = functional.softmax(logits.double(), dim=1)
        ends = p.cumsum(1).expand(uniform.shape)
        # Rounding may leave the last end below 1, and the number between them: that is the last class.
        label = torch.searchsorted(ends.contiguous(), uniform[..., :1].contiguous(), right=True)
        label = label.clamp(max=logits.shape[1] - 1)
        return (p - torch.zeros_like(ends).scatter(-1, label, 1.0)).to(logits.dtype)
    if likelihood == "binary_cross_entropy":
        p = logits.double().sigmoid()
        return (p - (uniform < p).double()).to(logits.dtype)
    raise RecipeError(_NO_LABELS if likelihood == "mse" else unknown("likelihood", likelihood, LIKELIHOODS))


@final
class Starts:
    """The starting vectors of a computation's backward passes, drawn block by block.

    Args:
        likelihood: one of `LIKELIHOODS`.
        estimator: "exact" (one pass per column of Lam's root; `factor` and `draws` are unused) or "monte_carlo".
        factor: one of `FACTORS`, or own vectors (then `draws` is unused).
        draws: random passes per image.
        seed: of the own generator. It lives on the CPU, so that a seed means the same numbers on every
            device, and is consumed image by image: how the images are split into batches does not matter.

    Raises:
        RecipeError: an unknown likelihood, estimator or factor, or `draws` below 1.
    """

    def __init__(self, likelihood: str, estimator: str, factor: str | Factor, draws: int, seed: int) -> None:
        if likelihood not in LIKELIHOODS:
            raise RecipeError(unknown("likelihood", likelihood, LIKELIHOODS))
        if estimator not in ESTIMATORS:
            raise RecipeError(unknown("curvature estimator", estimator, ESTIMATORS))
        if isinstance(factor, str) and factor not in FACTORS:
            raise RecipeError(unknown("factor", factor, FACTORS))
        if factor == "sampled_label" and likelihood == "mse":
            raise RecipeError(_NO_LABELS)
        if draws < 1:
            raise RecipeError(f"expected at least 1 draw per image, got draws={draws}")
        self.likelihood = likelihood
        self._exact = estimator == "exact"
        self._factor = factor
        self._draws = draws
        self.seed = seed
        self._generator = Generator().manual_seed(seed)

    def num_passes(self, num_classes: int) -> int:
        """Backward passes per image, K; a guess for own vectors."""
        if not self._exact:
            return self._draws
        return max(num_classes - 1, 1) if self.likelihood == "cross_entropy" else num_classes

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw the vectors of a block of images.

        Args:
            logits: of shape `[B, C]`, any device.

        Returns:
            v of shape `[K, B, C]`, in the logits' dtype, at least float32: the sum of the K squares of v . a
            has a^T Lam a as its mean.

        Raises:
            ModelError: own vectors are of another shape.
        """
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self._exact:
            return _flushed(stick_columns(logits, self.likelihood))
        if not isinstance(self._factor, str):
            v = self._factor(logits, self._generator)
            if v.ndim != 3 or v.shape[1:] != logits.shape:
                expected = ", ".join(map(str, logits.shape))
                raise ModelError(
                    f"a factor must return vectors of shape [K, {expected}], got {list(v.shape)}"
                )
            return v.to(logits.dtype)
        shape = (len(logits), self._draws, logits.shape[1])
        uniform = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        uniform = uniform.to(logits.device).transpose(0, 1)  # [K, B, C]
        if self._factor == "sampled_label":
            return _flushed(sampled_label(logits, uniform, self.likelihood) / math.sqrt(self._draws))
        signs = torch.where(uniform < 0.5, -1.0, 1.0).double()
        sign_factor = stick if self._factor == "stick" else rademacher
        return _flushed(sign_factor(logits, signs, self.likelihood) / math.sqrt(self._draws))


def _flushed(v: Tensor) -> Tensor:
    """Set vectors to 0 that are so short that their gradients would leave the normal numbers.

    A very confident image starts its backward passes with 1e-20 or less. On a CPU every product of what comes of
    that takes a hundred times as long as others, and its squares are 1e-24 nats or less in float32.
    """
    shortest = torch.finfo(v.dtype).tiny ** (1 / 3)  # 2e-13 for float32, 3e-103 for float64
    return torch.where(v.abs().amax(-1, keepdim=True) > shortest, v, 0.0)


def _diagonal_root(logits: Tensor, likelihood: str) -> Tensor:
    """Square root of a diagonal Lam, float64, of shape `[B, C]`."""
    if likelihood == "mse":
        return torch.full_like(logits, 2.0**0.5, dtype=torch.float64)
    if likelihood == "binary_cross_entropy":
        half = logits.double() / 2
        # p (1 - p) = 1 / (2 cosh(f/2))^2: no cancellation for confident outputs.
        return 0.5 / half.cosh()
    raise RecipeError(unknown("likelihood", likelihood, LIKELIHOODS))
