"""The table and the page of a sweep."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparsebayes.errors import RunError
from sparsebayes.export.sweep import Timing
from sparsebayes.report.provenance import busy_note
from sparsebayes.report.timings import timing_table, write_timings

ROWS = (
    Timing("dense", 1, 1, 0.4, 9.1e0),
    Timing("compact", 1, 1, 0.1, None),
    Timing("dense", 64, 1, 8.0, 12.0),
    Timing("compact", 64, 1, 10.0, 7.0),
)


def test_table_compares_with_the_first_of_each_setting() -> None:
    assert timing_table(ROWS).splitlines() == [
        "file     threads  batch  latency  inputs/s  memory  against the first",
        "dense          1      1   0.4 ms     2,500  9.1 MB",
        "compact        1      1   0.1 ms    10,000       -        4.0x faster",
        "dense          1     64     8 ms     8,000   12 MB",
        "compact        1     64    10 ms     6,400    7 MB        1.2x slower",
    ]


def test_page_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    page = write_timings(ROWS, tmp_path, "Timings of <run>").read_text()
    assert "Timings of &lt;run&gt;" in page and "<script" not in page
    assert "The machine was busy (load 99.0" in page
    assert page.count('class="chart"') == 2
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["throughput"] for row in record["rows"]] == [2500.0, 10000.0, 8000.0, 6400.0]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    assert busy_note() is None
    assert "was busy" not in write_timings(ROWS, tmp_path, "t").read_text()
    with pytest.raises(RunError, match=r"cannot write .*bench"):
        write_timings(ROWS, tmp_path / "none", "t")
