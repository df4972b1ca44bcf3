"""Kinds of work add up to the time that was watched, however they lie inside each other."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from sparsebayes.train import stopwatch
from sparsebayes.train.stopwatch import Stopwatch


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is one second further at every look: at each begin and end of work."""
    looks: Iterator[int] = iter(range(100))
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: float(next(looks))))


def test_work_inside_of_other_work_counts_once() -> None:
    watch = Stopwatch()
    with watch.of("update"):
        with watch.of("curvature"):
            pass
        with watch.of("compaction"), watch.of("evaluation"):
            pass
    assert watch.seconds == {"update": 3.0, "curvature": 1.0, "compaction": 2.0, "evaluation": 1.0}


def test_time_between_two_works_is_nobodys() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.of("training"):
            pass
    assert watch.seconds == {"training": 2.0}


def test_earlier_parts_count_and_stay_as_they_were() -> None:
    earlier = {"training": 10.0}
    watch = Stopwatch(earlier)
    with watch.of("training"):
        pass
    assert watch.seconds == {"training": 11.0}
    assert earlier == {"training": 10.0}


def test_work_that_fails_counts() -> None:
    watch = Stopwatch()
    with pytest.raises(KeyboardInterrupt), watch.of("training"), watch.of("evaluation"):
        raise KeyboardInterrupt
    assert watch.seconds == {"training": 2.0, "evaluation": 1.0}
    with watch.of("export"):
        pass
    assert watch.seconds["export"] == 1.0
