"""Figures in words."""

from __future__ import annotations

import pytest

from sparsebayes.words import count, duration, milliseconds, percent, ratio, size, strength_text


@pytest.mark.parametrize(
    ("dense", "compact", "words"),
    [
        (431080, 2512, "172x fewer"),
        (9.949, 1, "9.9x fewer"),
        (9.96, 1, "10x fewer"),
        (1_200_000, 1, "1,200,000x fewer"),
        (1, 1.3, "1.3x more"),
        (1.02, 1, "1.02x fewer"),
        (430001, 430000, "about the same"),
        (7, 7, "the same"),
        (0, 0, "the same"),
        (5, 0, "-"),
        (0, 5, "-"),
    ],
)
def test_ratio(dense: float, compact: float, words: str) -> None:
    assert ratio(dense, compact, "fewer", "more") == words


def test_figures_in_words() -> None:
    assert count(1234567) == "1,234,567"
    assert percent(0.00714) == "0.71 %"
    assert [size(n) for n in (0, 999, 1000, 11800, 999_499, 999_500, 1_725_000, 3_400_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "11.8 kB",
        "999 kB",
        "1 MB",
        "1.73 MB",
        "3.4 GB",
    ]
    assert size(12_345_000_000_000) == "12,345 GB"
    assert [milliseconds(v) for v in (0.0216, 14.2, 999.4, 1234.5)] == [
        "0.0216 ms",
        "14.2 ms",
        "999 ms",
        "1,234 ms",
    ]
    assert [duration(s) for s in (0.04, 59.94, 59.96, 245, 3599.6, 7620)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "4 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert [strength_text(t) for t in (0.5, 100.0, 2048.0, 2.5e7)] == ["0.5", "100", "2,048", "2.5e+07"]
