"""Figures in words, the same everywhere: counts, shares, sizes, times, and how many times less there is afterwards.

>>> count(431080), percent(0.0071), size(1_720_000), duration(245), ratio(431080, 2512, "fewer", "more")
('431,080', '0.71 %', '1.72 MB', '4 min 05 s', '172x fewer')
"""

from __future__ import annotations

__all__ = ["count", "duration", "milliseconds", "percent", "ratio", "size", "strength_text"]


def count(value: int) -> str:
    """Write a number with thousands separators: 431,080."""
    return f"{value:,}"


def percent(fraction: float) -> str:
    """Write a share of 1 in percent with two decimals: 0.71 %."""
    return f"{100 * fraction:.2f} %"


def size(num_bytes: int) -> str:
    """Write bytes in the unit of 1000s that leaves one to three digits before the point: 1.72 MB."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 999.5:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB" if value < 999.5 else f"{value:,.0f} GB"


def milliseconds(value: float) -> str:
    """Write a latency with three digits: 0.412 ms."""
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"


def duration(seconds: float) -> str:
    """Write a wall time: 3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def strength_text(value: float) -> str:
    """Write a strength with at most four digits and no exponent up to a million: 0.5, 2,048."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


def ratio(dense: float, compact: float, less: str, more: str) -> str:
    """Write how many times less, or more, there is afterwards.

    Args:
        dense: the figure before, >= 0.
        compact: the figure after, >= 0.
        less: what a decrease is called ("fewer").
        more: what an increase is called ("more").

    Returns:
        "172x fewer", "1.3x more", "the same", "about the same" below half a percent; "-" if one of the two
        is 0, where a ratio says nothing.
    """
    if dense == compact:
        return "the same"
    if dense <= 0 or compact <= 0:
        return "-"
    factor = max(dense / compact, compact / dense)
    if factor < 1.005:
        return "about the same"
    number = f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}" if factor >= 1.05 else f"{factor:.2f}"
    return f"{number}x {less if dense > compact else more}"
