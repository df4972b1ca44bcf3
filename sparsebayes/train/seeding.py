"""Independent random streams from one seed: every stage of a run draws from its own, named stream.

A stage that is repeated after an interruption therefore sees the same numbers, whatever ran before it:

    >>> derive_seed(0, "cycle", 3) == derive_seed(0, "cycle", 3)
    True
    >>> derive_seed(0, "cycle", 3) == derive_seed(0, "cycle", 4)
    False
"""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *names: str | int) -> int:
    """Seed of a named stream.

    Args:
        seed: The run's seed.
        names: What the stream is for, such as ``"cycle", 3, "curvature"``.

    Returns:
        An integer in ``[0, 2**63)``.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
