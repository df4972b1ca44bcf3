"""Charts: values stand where they belong, gaps stay gaps, hostile text stays text, no number breaks it."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.report.axes import Axis, short_number
from sparsebayes.report.shares import heat_map, share_bars
from sparsebayes.report.svg import Band, Dot, Mark, Series, histogram, line_chart, scatter_chart

ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True)


def series(name: str, *points: tuple[float, float]) -> Series:
    return Series(name, tuple(Dot(x, y) for x, y in points))


def elements(chart: str, tag: str) -> list[ElementTree.Element]:
    """All elements of a kind; parsing also proves that the chart is well-formed."""
    return list(ElementTree.fromstring(str(chart)).iter(tag))


def test_axis_places_values() -> None:
    axis = Axis(10.0, 20.0)
    assert [axis.place(v) for v in (10.0, 15.0, 20.0, math.nan, math.inf)] == [0.0, 0.5, 1.0, None, None]
    log = Axis(1.0, 100.0, log=True)
    assert log.place(10.0) == pytest.approx(0.5)
    assert [log.place(v) for v in (0.0, -1.0, math.nan)] == [None, None, None]


def test_axis_ticks_are_round() -> None:
    assert Axis(0.0, 0.5).ticks() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert Axis(-3.0, 36.0).ticks() == [0, 10, 20, 30]
    assert Axis(0.5, 2e5, log=True).ticks() == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5])
    assert Axis(2.0, 60.0, log=True).ticks() == pytest.approx([3, 10, 30])


@given(st.lists(ANY_NUMBER, max_size=8), st.booleans(), st.booleans())
def test_axis_shows_every_value(values: list[float], log: bool, from_zero: bool) -> None:
    axis = Axis.around(values, log=log, from_zero=from_zero)
    for value in values:
        place = axis.place(value)
        assert place is None or 0.0 <= place <= 1.0
    assert all(-1e-6 <= (axis.place(tick) or 0.0) <= 1 + 1e-6 for tick in axis.ticks())
    assert len(axis.ticks()) <= 12


def test_short_numbers() -> None:
    assert [short_number(v) for v in (0.0, 0.01, 250.0, 1200.0, 2.5e6, 4e9)] == [
        "0",
        "0.01",
        "250",
        "1.2k",
        "2.5M",
        "4G",
    ]


def test_curve_goes_through_its_points_and_breaks_at_gaps() -> None:
    line = series("loss", (1, 4.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 0.0))
    chart = line_chart("Loss", [line], x_label="epoch", y_label="nats")
    curves = [e.attrib["points"].split() for e in elements(chart, "polyline")]
    assert [len(curve) for curve in curves] == [2, 2]
    heights = [float(point.split(",")[1]) for curve in curves for point in curve]
    assert heights == sorted(heights)  # falling values go down the page
    assert (heights[3] - heights[2]) / (heights[1] - heights[0]) == pytest.approx(0.5, abs=0.01)


def test_bands_appear_and_curves_differ_in_colour_and_marker() -> None:
    lines = [series("training", (1, 1.0), (2, 0.5)), series("held out", (1, 2.0), (2, 1.0))]
    chart = line_chart(
        "Loss", lines, x_label="epoch", y_label="nats", bands=[Band("a", 0.5, 1.5), Band("b", 1.5, 2.5)]
    )
    texts = [e.text for e in elements(chart, "text")]
    assert {"Loss", "epoch", "nats", "a", "b"} <= set(texts)
    assert [e.attrib["class"] for e in elements(chart, "polyline")] == ["line c0", "line c1"]
    assert (len(elements(chart, "circle")), len(elements(chart, "polygon"))) == (2, 2)
    assert len([e for e in elements(chart, "rect") if "band" in e.attrib["class"]]) == 2


def test_scatter_marks_the_chosen_point() -> None:
    dots = [
        Dot(100, 1.0, "first"),
        Dot(10, 2.0, "second", chosen=True),
        Dot(0, 3.0, "no place on a log axis"),
    ]
    circles = elements(
        scatter_chart("t", [Series("run", tuple(dots))], x_label="x", y_label="y", log_x=True), "circle"
    )
    assert [(c.find("title").text, "chosen" in c.attrib["class"]) for c in circles] == [
        ("second", True),
        ("first", False),
    ]
    assert float(circles[0].attrib["cx"]) < float(circles[1].attrib["cx"])


def test_scatter_draws_error_bars_and_marks_to_scale() -> None:
    dots = (Dot(1, 2.0, spread=0.5), Dot(2, 4.0))
    marks = [Mark("limit", 3.0)]
    chart = scatter_chart("t", [Series("run", dots)], x_label="x", y_label="y", marks=marks)
    lines = {e.attrib["class"]: e.attrib for e in elements(chart, "line")}
    y = [float(c.attrib["cy"]) for c in elements(chart, "circle")]
    unit = (y[0] - y[1]) / 2.0
    bar, mark = lines["spread c0"], lines["mark"]
    assert float(bar["y1"]) - float(bar["y2"]) == pytest.approx(unit, abs=0.2)
    assert float(mark["y1"]) == pytest.approx(y[0] - unit, abs=0.2)
    assert "limit" in [e.text for e in elements(chart, "text")]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60), st.booleans())
def test_no_bar_holds_values_of_both_sides_of_the_threshold(values: list[float], log: bool) -> None:
    chart = histogram("t", values, x_label="x", threshold=1.0, log=log)
    counts = {"fill c0": 0, "fill c1": 0}
    for bar in elements(chart, "rect"):
        counts[bar.attrib["class"]] += int(bar.find("title").text)
    below = sum(value < 1.0 - 1e-6 for value in values)
    assert below <= counts["fill c1"] <= sum(value <= 1.0 + 1e-6 for value in values)
    assert sum(counts.values()) == len(values)


def test_heat_map_shades_by_the_share() -> None:
    chart = heat_map("Groups", ["conv"], ["0", "1"], [[(1.0, "20"), (0.25, "5")]])
    shades = [float(e.attrib["fill-opacity"]) for e in elements(chart, "rect") if "fill-opacity" in e.attrib]
    assert shades[1] / shades[0] == pytest.approx(0.25)
    assert {"conv", "0", "1", "20", "5"} <= {e.text for e in elements(chart, "text")}


def test_histogram_counts_every_positive_value() -> None:
    values = [0.01] * 7 + [1.0] * 3 + [100.0] * 5 + [0.0, -1.0, math.nan, math.inf]
    chart = histogram("Evidence", values, x_label="evidence", threshold=1.0)
    bars = elements(chart, "rect")
    assert sorted(int(bar.find("title").text) for bar in bars) == [3, 5, 7]
    heights = {int(bar.find("title").text): float(bar.attrib["height"]) for bar in bars}
    assert heights[7] / heights[3] == pytest.approx(7 / 3, rel=0.01)
    assert [e for e in elements(chart, "line") if e.attrib["class"] == "mark"]


def test_bars_show_the_share_that_is_left() -> None:
    chart = share_bars("Widths", [("conv1", 20, 5), ("fc1", 500, 500), ("none", 0, 0)])
    bars = [e.attrib["width"] for e in elements(chart, "rect") if e.attrib["class"] == "fill c0"]
    assert bars == ["25.00%", "100.00%", "0.00%"]
    assert "20 → 5" in [e.text for e in elements(chart, "text")]


HOSTILE = "<script>alert('x')</script>\"'&"


@pytest.mark.parametrize(
    "chart",
    [
        line_chart(HOSTILE, [series(HOSTILE, (1, 1.0)), series("b")], x_label=HOSTILE, y_label=HOSTILE,
                   bands=[Band(HOSTILE, 0, 500)]),
        scatter_chart(HOSTILE, [Series(HOSTILE, (Dot(1, 1, HOSTILE),))], x_label=HOSTILE, y_label=HOSTILE),
        histogram(HOSTILE, [1.0], x_label=HOSTILE),
        share_bars(HOSTILE, [(HOSTILE, 2, 1)]),
        heat_map(HOSTILE, [HOSTILE], [HOSTILE], [[(1.0, HOSTILE)]]),
    ],
    ids=["line", "scatter", "histogram", "bars", "heat"],
)  # fmt: skip
def test_hostile_text_stays_text(chart: str) -> None:
    assert not elements(chart, "script")
    assert "<script" not in chart
    assert re.search(r"&lt;script&gt;", chart)
    assert ElementTree.fromstring(str(chart)).attrib["aria-label"] == HOSTILE


@given(st.lists(st.tuples(ANY_NUMBER, ANY_NUMBER), max_size=6), st.booleans())
def test_no_numbers_break_a_chart(points: list[tuple[float, float]], log: bool) -> None:
    charts = [
        line_chart("t", [series("a", *points)], x_label="x", y_label="y", log_y=log),
        scatter_chart(
            "t",
            [Series("a", tuple(Dot(x, y, "p", spread=y) for x, y in points))],
            x_label="x",
            y_label="y",
            log_x=log,
            log_y=log,
        ),
        histogram("t", [y for _, y in points], x_label="x", threshold=1.0, log=log),
    ]
    for chart in charts:
        for element in ElementTree.fromstring(str(chart)).iter():
            for name in ("cx", "cy", "x", "y", "x1", "y1", "y2", "points", "width", "height"):
                assert "nan" not in element.attrib.get(name, "") and "inf" not in element.attrib.get(name, "")
