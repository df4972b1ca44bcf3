"""Run folders are read whole, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsebayes.errors import RunError
from sparsebayes.prune.selection import Selection
from sparsebayes.report import read_report, read_run

FIGURES = {
    "test_error": 0.01,
    "params": 100,
    "macs": 1000,
    "onnx_bytes": 500,
    "latency_ms_batch1": 0.1,
    "latency_ms_batch64": 2,
}


def document() -> dict[str, Any]:
    return {
        "name": "lenet",
        "task": "compress",
        "dense": dict(FIGURES),
        "compact": {**FIGURES, "params": 10},
        "widths": {"fc1": [30, 3]},
        "seed": 0,
        "wall_seconds": {"train": 1},
        "versions": {"torch": "2.13.0"},
        "refused": [],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(document()))
    return tmp_path


def test_only_the_report_is_needed(folder: Path) -> None:
    run = read_run(folder)
    assert run.report == read_report(folder)
    assert run.report.widths == {"fc1": (30, 3)}
    assert (run.metrics, run.pareto) == ((), ())
    assert (run.selection, run.evidence, run.recipe, run.environment) == (None, None, None, None)


def test_the_share_of_removal_needs_times(folder: Path) -> None:
    def share(**times: Any) -> float | None:
        (folder / "report.json").write_text(json.dumps({**document(), **times}))
        return read_report(folder).removal_share

    assert share() is None
    assert share(wall_seconds={}, work_seconds={"curvature": 1}) is None
    work = {"training": 6, "curvature": 1, "update": 0.5, "compaction": 0.25}
    assert share(wall_seconds={"cycles": 8, "export": 2}, work_seconds=work) == pytest.approx(0.175)
    assert share(work_seconds={"training": 1}) == 0.0


def test_unmeasured_figures_are_null(folder: Path) -> None:
    changed = document()
    changed["compact"].update(onnx_bytes=None, latency_ms_batch1=None, latency_ms_batch64=None)
    (folder / "report.json").write_text(json.dumps(changed))
    assert read_report(folder).compact.onnx_bytes is None


def test_unknown_fields_are_kept(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({**document(), "genotype": "conv3x3"}))
    assert read_report(folder).model_extra == {"genotype": "conv3x3"}


def test_evidence_lies_in_its_own_file_or_in_the_selection(folder: Path) -> None:
    selection = {
        "grouping": "units",
        "num_groups": 2,
        "num_kept": 1,
        "gamma": [0.1, 0.0],
        "bits": {"on": "gA=="},
    }
    (folder / "selection.json").write_text(json.dumps(selection))
    run = read_run(folder)
    assert run.evidence is not None and run.selection is not None
    assert (run.evidence.evidence, run.evidence.gamma) == (None, [0.1, 0.0])
    (folder / "evidence.json").write_text('{"evidence": [3, 0.5]}')
    run = read_run(folder)
    assert run.evidence is not None and run.evidence.evidence == [3.0, 0.5]


def test_selection_is_read_as_it_is_written(folder: Path) -> None:
    on = torch.tensor([True, False, True])
    selection = Selection("units", on, ("fc1", "fc2"), torch.tensor([0, 0, 1]), "abc", strength=4.0)
    (folder / "selection.json").write_text(selection.to_json())
    read = read_run(folder).selection
    assert read is not None
    assert (read.grouping, read.num_groups, read.num_kept, read.strength) == ("units", 3, 2, 4.0)
    assert [(layer.name, layer.kept, layer.groups) for layer in read.layers] == [("fc1", 1, 2), ("fc2", 1, 1)]


def test_metrics_may_diverge(folder: Path) -> None:
    lines = ('{"phase": "train", "epoch": 1, "train_loss": NaN}', "", '{"phase": "cycle", "cycle": 1}', "")
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    first, second = read_run(folder).metrics
    assert first.train_loss is not None and first.train_loss != first.train_loss
    assert (second.phase, second.cycle, second.train_loss) == ("cycle", 1, None)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a run folder was expected at .*absent, where there is none"):
        read_report(tmp_path / "absent")
    with pytest.raises(RunError, match=r"report\.json was expected and is not there"):
        read_report(tmp_path)


@pytest.mark.parametrize("key", sorted(document()))
def test_every_missing_key_is_named(folder: Path, key: str) -> None:
    broken = document()
    del broken[key]
    (folder / "report.json").write_text(json.dumps(broken))
    with pytest.raises(RunError, match=rf"report\.json is damaged or incomplete: {key}: Field required"):
        read_report(folder)


@pytest.mark.parametrize("key", sorted(FIGURES))
def test_every_missing_figure_is_named(folder: Path, key: str) -> None:
    broken = document()
    del broken["compact"][key]
    (folder / "report.json").write_text(json.dumps(broken))
    with pytest.raises(RunError, match=rf"compact\.{key}: Field required"):
        read_report(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("dense", "test_error"), 1.5, r"dense\.test_error: Input should be less than or equal to 1"),
        (("dense", "params"), -1, r"dense\.params: Input should be greater than or equal to 0"),
        (("dense", "params"), "many", r"dense\.params: Input should be a valid integer"),
        (("compact", "latency_ms_batch1"), 0, r"compact\.latency_ms_batch1: Input should be greater than 0"),
        (("widths", "fc1"), [1], r"widths\.fc1\.1: Field required"),
        (("wall_seconds", "train"), float("inf"), r"wall_seconds\.train: Input should be a finite number"),
        (("refused",), "none", r"refused: Input should be a valid array"),
    ],
)
def test_wrong_values_are_named(folder: Path, path: tuple[str, ...], value: object, message: str) -> None:
    broken = document()
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "report.json").write_text(json.dumps(broken))
    with pytest.raises(RunError, match=message):
        read_report(folder)


def test_many_faults_make_one_short_sentence(folder: Path) -> None:
    (folder / "report.json").write_text("{}")
    with pytest.raises(RunError, match=r"; and 6 more$") as caught:
        read_report(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_truncated_report(folder: Path, keep: int) -> None:
    path = folder / "report.json"
    path.write_text(path.read_text()[:keep])
    with pytest.raises(RunError, match=r"report\.json is damaged or incomplete: Invalid JSON: EOF"):
        read_report(folder)


def test_report_that_is_not_text(folder: Path) -> None:
    (folder / "report.json").write_bytes(b"{\xff\xfe}")
    with pytest.raises(RunError, match=r"report\.json is damaged: it is not UTF-8 text \(byte 1\)"):
        read_report(folder)
    (folder / "report.json").unlink()
    (folder / "report.json").mkdir()
    with pytest.raises(RunError, match=r"report\.json cannot be read"):
        read_report(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"phase": "train"}\n{"phase": "tr',
            r"metrics\.jsonl, line 2, is damaged .*: Invalid JSON",
        ),
        ("metrics.jsonl", '{"epoch": 1}\n', r"metrics\.jsonl, line 1, .*phase: Field required"),
        (
            "pareto.json",
            '[{"point": 1}]',
            r"pareto\.json is damaged or incomplete: 0\.params: Field required",
        ),
        ("selection.json", "[]", r"selection\.json is damaged or incomplete: Input should be an object"),
        ("evidence.json", '{"gamma": 3}', r"evidence\.json .*gamma: Input should be a valid array"),
        ("environment.json", "3", r"environment\.json is damaged or incomplete"),
        ("recipe.yaml", b"\xff", r"recipe\.yaml is damaged: it is not UTF-8"),
    ],
)
def test_damaged_companions(folder: Path, name: str, text: str | bytes, message: str) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=message):
        read_run(folder)
