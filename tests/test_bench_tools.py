"""The benchmarks write where they are told, and the quick ones beside the published figures, never over them."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsebayes.report.benchmarks import Row, read_benchmark, write_rows

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    return runpy.run_path(str(TOOLS / "bench_files.py"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(TOOLS))
    return runpy.run_path(str(TOOLS / "bench_quick.py"))


def write_benchmark(path: Path, *values: float, method: str = "ours") -> None:
    """A benchmark of one row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = Row("LeNet", method, "error (%)", values, tuple(range(len(values))))
    about = {"title": "t", "notes": (), "hardware": "two cores", "versions": {}, "command": "make it"}
    write_rows(path, rows=[row], git_commit="abc", **about)


def test_figures_go_where_they_are_sent(files: dict[str, Any], tmp_path: Path) -> None:
    rows = [Row("LeNet", "ours", "error (%)", (1.0,), (0,))]
    about = {
        "title": "A title",
        "notes": ["A note."],
        "rows": rows,
        "command": ["tools/x.py", "--note", "a b"],
    }
    in_folder = files["write"](tmp_path / "new", "lenet", threads=3, **about)
    assert in_folder == tmp_path / "new" / "lenet.json"
    found = read_benchmark(in_folder)
    assert (found.title, found.notes, found.rows) == ("A title", ("A note.",), tuple(rows))
    assert found.command == "python tools/x.py --note 'a b'"
    assert found.hardware.endswith("; 3 threads")
    own_name = files["write"](tmp_path / "mine.json", "lenet", **about)
    assert own_name == tmp_path / "mine.json"
    assert "threads" not in read_benchmark(own_name).hardware


def test_without_a_place_they_are_published(files: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    files["add_out"](parser)
    assert parser.parse_args([]).out == ROOT / "docs" / "benchmarks"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["cell", "--out", "/mine", "--rounds", "3"], ["cell", "--rounds", "3"]),
        (["--out=/mine", "cell"], ["cell"]),
        (["--out", "/mine/two.json", "cell"], ["cell", "--out", "docs/benchmarks/two.json"]),
        ([], []),
    ],
)
def test_a_command_is_recorded_without_folders(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: list[str], kept: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/bench_x.py", *words])
    parser = argparse.ArgumentParser()
    files["add_out"](parser)
    out = parser.parse_known_args(words)[0].out
    assert files["typed"](out) == ["tools/bench_x.py", *kept]


def test_every_benchmark_writes_through_one_place() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in TOOLS.glob("bench_*.py")}
    others = {"bench_files.py", "bench_memory.py", "bench_networks.py", "bench_quick.py"}
    assert len(scripts) > 8 and others <= scripts.keys()
    for name in scripts.keys() - others:
        assert "add_out(parser)" in scripts[name], name
        assert "write_rows" not in scripts[name], name


def test_measured_stands_beside_published(quick: dict[str, Any], tmp_path: Path) -> None:
    write_benchmark(tmp_path / "here.json", 1.2543)
    write_benchmark(tmp_path / "there.json", 1.2, 1.4)
    text = quick["beside_published"](tmp_path / "here.json", tmp_path / "there.json")
    assert text.splitlines() == [
        "                   measured  published",
        "LeNet",
        "  ours: error (%)  1.254     1.30 ± 0.14 (2)",
        "published: make it, on two cores",
    ]


def test_what_is_not_published_has_a_dash(quick: dict[str, Any], tmp_path: Path) -> None:
    write_benchmark(tmp_path / "here.json", 1.5)
    write_benchmark(tmp_path / "there.json", 1.5, method="other")
    for published in ("there.json", "absent.json"):
        text = quick["beside_published"](tmp_path / "here.json", tmp_path / published)
        assert "  ours: error (%)  1.5       -" in text.splitlines()


def test_parts_are_benchmarks_that_are_published(quick: dict[str, Any]) -> None:
    assert len(quick["PARTS"]) == 5
    for name, command in quick["PARTS"].values():
        assert (ROOT / "docs" / "benchmarks" / f"{name}.json").is_file()
        assert (TOOLS / command.split()[0]).is_file()


def test_a_part_that_fails_is_said(
    quick: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        calls.append(command)
        failed = command[1].endswith("bench_surgery.py")
        if not failed:
            write_benchmark(tmp_path / "overhead.json", 1.0)
        return SimpleNamespace(returncode=3 if failed else 0)

    monkeypatch.setattr(quick["subprocess"], "run", run)
    (tmp_path / "torchvision-surgery.json").write_text("of an earlier try")
    assert quick["main"](["surgery", "overhead", "--out", str(tmp_path)]) == 1
    assert [call[-2:] for call in calls] == [["--out", str(tmp_path)]] * 2
    assert not (tmp_path / "torchvision-surgery.json").exists()
    out, err = capsys.readouterr()
    assert err == "surgery: failed with exit status 3\n"
    assert "ours: error (%)" in out
    assert quick["main"](["overhead", "--out", str(tmp_path)]) == 0


def test_unknown_parts_are_refused(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quick["main"](["overhed"])
    assert "no part is called 'overhed'; choose from overhead, surgery" in capsys.readouterr().err
