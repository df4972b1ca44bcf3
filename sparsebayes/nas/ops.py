"""The operations that an edge of a cell may carry, as a table: one row per operation.

    >>> build_op("sep_conv_3x3", 16, 16, stride=1, affine=True)(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

Every operation ends in a batch norm, pooling and identity included: in a supernet, where the norms have no scale of
their own (`affine=False`), all operations then send out signals of unit variance, and their switches are comparable. In
a derived network the norms are affine, so that a switch can live on as the scale of the last one.

A new operation is a new row of `OPS`. Sources: Liu, Simonyan and Yang, "DARTS", ICLR 2019, section 3.1.1 (separable and
dilated convolutions, pooling); Dong and Yang, "NAS-Bench-201", ICLR 2020, section 2 (`nor_conv`); Sandler et al.,
"MobileNetV2", CVPR 2018 (`mbconv`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from sparsebayes.errors import RecipeError, unknown

__all__ = ["OPS", "Op", "build_op", "check_op", "scale_of"]


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Attributes:
        build: (channels in, channels out, stride, affine) -> module.
        parameter_free: whether it has no weights where the shape does not change; such operations take over when a
            search collapses.
    """

    build: Callable[[int, int, int, bool], nn.Module]
    parameter_free: bool = False


def _norm(channels: int, affine: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=affine)


def _conv(c_in: int, c_out: int, size: int, stride: int, *, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output is as large as its input, divided by the stride."""
    padding = dilation * (size // 2)
    return nn.Conv2d(c_in, c_out, size, stride, padding, dilation, groups, bias=False)


def _plain(c_in: int, c_out: int, stride: int, affine: bool, *, size: int) -> nn.Module:
    """ReLU, convolution, norm."""
    return nn.Sequential(nn.ReLU(), _conv(c_in, c_out, size, stride), _norm(c_out, affine))


def _separable(c_in: int, c_out: int, stride: int, affine: bool, *, size: int) -> nn.Module:
    """ReLU, depthwise, pointwise, norm, twice; the first one strides."""
    return nn.Sequential(
        nn.ReLU(),
        _conv(c_in, c_in, size, stride, groups=c_in),
        _conv(c_in, c_in, 1, 1),
        _norm(c_in, affine),
        nn.ReLU(),
        _conv(c_in, c_in, size, 1, groups=c_in),
        _conv(c_in, c_out, 1, 1),
        _norm(c_out, affine),
    )


def _dilated(c_in: int, c_out: int, stride: int, affine: bool, *, size: int) -> nn.Module:
    """ReLU, dilated depthwise, pointwise, norm."""
    return nn.Sequential(
        nn.ReLU(),
        _conv(c_in, c_in, size, stride, dilation=2, groups=c_in),
        _conv(c_in, c_out, 1, 1),
        _norm(c_out, affine),
    )


def _reshape(c_in: int, c_out: int, stride: int, affine: bool) -> list[nn.Module]:
    """What brings an input to another width or resolution: ReLU and a pointwise convolution."""
    return [nn.ReLU(), _conv(c_in, c_out, 1, stride)]


def _identity(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
    """The input itself, normalised; a pointwise convolution where the shape changes."""
    change = _reshape(c_in, c_out, stride, affine) if c_in != c_out or stride != 1 else []
    return nn.Sequential(*change, _norm(c_out, affine))


def _pool(c_in: int, c_out: int, stride: int, affine: bool, *, kind: str) -> nn.Module:
    """Pooling over 3x3, after a pointwise convolution where the width changes."""
    change = [*_reshape(c_in, c_out, 1, affine), _norm(c_out, affine)] if c_in != c_out else []
    # Padding does not count in the mean, as in the spaces' own implementations.
    average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    pool = nn.MaxPool2d(3, stride, 1) if kind == "max" else average
    return nn.Sequential(*change, pool, _norm(c_out, affine))


def _inverted(c_in: int, c_out: int, stride: int, affine: bool, *, size: int, expand: int) -> nn.Module:
    """MobileNetV2's block without its shortcut: pointwise up, depthwise, pointwise down."""
    middle = c_in * expand
    return nn.Sequential(
        _conv(c_in, middle, 1, 1),
        _norm(middle, affine),
        nn.ReLU6(),
        _conv(middle, middle, size, stride, groups=middle),
        _norm(middle, affine),
        nn.ReLU6(),
        _conv(middle, c_out, 1, 1),
        _norm(c_out, affine),
    )


OPS: dict[str, Op] = {
    "skip_connect": Op(_identity, parameter_free=True),
    "avg_pool_3x3": Op(partial(_pool, kind="average"), parameter_free=True),
    "max_pool_3x3": Op(partial(_pool, kind="max"), parameter_free=True),
    "nor_conv_1x1": Op(partial(_plain, size=1)),
    "nor_conv_3x3": Op(partial(_plain, size=3)),
    "sep_conv_3x3": Op(partial(_separable, size=3)),
    "sep_conv_5x5": Op(partial(_separable, size=5)),
    "sep_conv_7x7": Op(partial(_separable, size=7)),
    "dil_conv_3x3": Op(partial(_dilated, size=3)),
    "dil_conv_5x5": Op(partial(_dilated, size=5)),
    **{
        f"mbconv_{size}x{size}_e{expand}": Op(partial(_inverted, size=size, expand=expand))
        for size in (3, 5, 7)
        for expand in (3, 6)
    },
}
"""Operations by name."""


def check_op(name: str) -> None:
    """Refuse a name that is not in the table.

    Raises:
        RecipeError: unknown operation.
    """
    if name not in OPS:
        raise RecipeError(unknown("operation", name, OPS))


def build_op(name: str, c_in: int, c_out: int, *, stride: int, affine: bool) -> nn.Module:
    """Build one operation.

    Args:
        name: a key of `OPS`.
        c_in: channels of the input.
        c_out: channels of the output.
        stride: 1, or 2 to halve the resolution.
        affine: whether the norms have a scale and a shift.

    Returns:
        A module from `[B, c_in, H, W]` to `[B, c_out, H/stride, W/stride]`, rounded up, that ends in a batch norm.

    Raises:
        RecipeError: unknown operation.
    """
    check_op(name)
    return OPS[name].build(c_in, c_out, stride, affine)


def scale_of(op: nn.Module) -> Tensor:
    """The scale of the norm that an affine operation ends in, of shape `[c_out]`; its switch in a derived network.

    Raises:
        RecipeError: the operation does not end in an affine batch norm.
    """
    last = op[-1] if isinstance(op, nn.Sequential) else op
    if not isinstance(last, nn.BatchNorm2d) or not last.affine:
        raise RecipeError(
            f"expected an operation that ends in an affine batch norm, got {type(last).__name__}; "
            "end every row of the table of operations in one"
        )
    return last.weight
