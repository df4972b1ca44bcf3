"""Pictures of cells in a report: drawn from a search's records, absent elsewhere, damage named."""

from __future__ import annotations

import json

import pytest

from sparsebayes.errors import RunError
from sparsebayes.nas import Genotype
from sparsebayes.report.cells import cell_figures


def test_a_search_shows_its_cells(tmp_path):
    genotype = Genotype("nas_bench_201", {"normal": ((0, 3, "skip_connect"), (0, 3, "nor_conv_3x3"))})
    (tmp_path / "genotype.json").write_text(genotype.to_json())
    row = {"cell": "normal", "source": 0, "target": 3, "value": 0.5, "chosen": True}
    switches = [{**row, "op": "skip_connect", "score": 1.0}, {**row, "op": "nor_conv_3x3", "score": 50.0}]
    (tmp_path / "switches.json").write_text(json.dumps([*switches, {**row, "op": None, "score": 3.0}]))
    (figure,) = cell_figures(tmp_path)
    assert "skip connect" in figure.chart
    assert 'stroke-width="7.00"' in figure.chart
    assert 'stroke-width="1.50"' in figure.chart


def test_other_runs_show_none(tmp_path):
    assert cell_figures(tmp_path) == ()


def test_a_damaged_genotype_is_named(tmp_path):
    (tmp_path / "genotype.json").write_text("{}")
    with pytest.raises(RunError, match=r"genotype.json is damaged \(expected a genotype with the keys"):
        cell_figures(tmp_path)
