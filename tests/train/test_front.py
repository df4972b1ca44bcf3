"""The front: the 1-SE rule, choosing points, and reading back what was written."""

from __future__ import annotations

import pytest

from sparsebayes.errors import RunError
from sparsebayes.train.front import (
    Point,
    band_limit,
    choose,
    read_front,
    replace_point,
    write_front,
)


def front() -> list[Point]:
    return [
        Point(0, 1000, 9000, 0.030, 0.004, 0.008),
        Point(1, 300, 3000, 0.028, 0.003, 0.008, strength=2.0),
        Point(2, 100, 800, 0.031, 0.004, 0.009, strength=5.0),
        Point(3, 20, 200, 0.032, 0.005, 0.010, strength=9.0, chosen=True),
    ]


def test_band_is_one_standard_error_above_the_best_loss() -> None:
    assert band_limit(front()) == pytest.approx(0.031)


def test_choose_by_number_size_and_own_choice() -> None:
    assert choose(front(), point=1).point == 1
    assert choose(front(), max_params=300).point == 1  # the best loss that fits, not the largest or smallest
    assert choose(front(), max_params=99).point == 3
    assert choose(front()).point == 3


def test_choose_refuses_what_is_not_there() -> None:
    with pytest.raises(RunError, match="has no point 9; it has points 0 to 3"):
        choose(front(), point=9)
    with pytest.raises(RunError, match="at most 10 parameters; the smallest has 20"):
        choose(front(), max_params=10)
    with pytest.raises(RunError, match="has not chosen a point yet"):
        choose(front()[:2])


def test_a_chosen_point_unchooses_the_others() -> None:
    chosen = Point(1, 300, 3000, 0.028, 0.003, 0.008, chosen=True)
    assert [p.chosen for p in replace_point(front(), chosen)] == [False, True, False, False]


def test_front_survives_the_disk(tmp_path) -> None:
    path = tmp_path / "pareto.json"
    assert read_front(path) == []
    write_front(path, front())
    assert read_front(path) == front()


@pytest.mark.parametrize("text", ["[{}]", "nonsense", "{}[", '[{"point": 1}]'])
def test_damaged_front_is_named(tmp_path, text: str) -> None:
    path = tmp_path / "pareto.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"pareto.json is damaged"):
        read_front(path)


def test_front_with_a_missing_point_is_damaged(tmp_path) -> None:
    path = tmp_path / "pareto.json"
    write_front(path, [front()[0], front()[2]])
    with pytest.raises(RunError, match="not numbered from 0"):
        read_front(path)
