"""Flags as text: eight to a byte, most significant bit first, in base64.

>>> pack(torch.tensor([True, False, True]))
'oA=='
>>> unpack("oA==", 3)
tensor([ True, False,  True])
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(flags: Tensor) -> str:
    """Write flags as text.

    Args:
        flags: bool, of shape `[N]`.
    """
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    packed = (padded * weights).sum(1, dtype=torch.uint8)
    return base64.b64encode(bytes(packed.tolist())).decode("ascii")


def unpack(text: str, count: int) -> Tensor:
    """Read what `pack` wrote.

    Args:
        text: base64.
        count: number N of flags.

    Returns:
        bool, of shape `[N]`.

    Raises:
        ValueError: the text is not base64, or not that of N flags.
    """
    packed = base64.b64decode(text, validate=True)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes do not hold {count} flags")
    values = torch.tensor(list(packed), dtype=torch.uint8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    flags = (values[:, None].bitwise_right_shift(shifts) & 1).flatten().to(torch.bool)
    if flags[count:].any():
        raise ValueError(f"there are flags beyond the {count} that are expected")
    return flags[:count].clone()
