"""The page of benchmarks is generated, and the check notices when it is not."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsebayes.report.benchmarks import Row, write_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def render() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "render_benchmarks.py"))["main"]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    write_rows(
        tmp_path / "benchmarks" / "lenet.json",
        title="LeNet",
        rows=[Row("mnist", "switches", "test error (%)", (0.8, 0.9), (0, 1))],
        notes=[],
        hardware="2 cores",
        versions={},
        command="python tools/bench_lenet.py",
        git_commit="abc123",
    )
    return tmp_path


def test_page_is_written_and_checked(render, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = docs / "benchmarks.md"
    assert render(["--docs", str(docs), "--check"]) == 1
    assert "benchmarks.md is out of date; run python tools/render_benchmarks.py" in capsys.readouterr().err
    assert not page.exists()

    assert render(["--docs", str(docs)]) == 0
    assert "| switches | 0.850 ± 0.071 (2) |" in page.read_text(encoding="utf-8")
    assert render(["--docs", str(docs), "--check"]) == 0

    page.write_text(page.read_text(encoding="utf-8").replace("0.850", "0.750"), encoding="utf-8")
    assert render(["--docs", str(docs), "--check"]) == 1


def test_damaged_results_are_one_sentence(render, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (docs / "benchmarks" / "lenet.json").write_text("{")
    assert render(["--docs", str(docs)]) == 2
    message = capsys.readouterr().err
    assert "lenet.json is damaged or incomplete" in message and message.count("\n") == 1
    assert not (docs / "benchmarks.md").exists()


def test_the_page_of_this_repository_is_up_to_date(render, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(["--check"]) == 0, capsys.readouterr().err
