"""The report shows every record, loads nothing, and lets no text become markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsebayes.errors import RunError
from sparsebayes.report import write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> | `x` [a](javascript:b) \"'"


class Collector(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def figures(**changes: Any) -> dict[str, Any]:
    values = {"test_error": 0.0071, "params": 431080, "macs": 2293000, "onnx_bytes": 1725000}
    return {**values, "latency_ms_batch1": 0.412, "latency_ms_batch64": 14.2, **changes}


def fill(folder: Path, text: str = "plain") -> None:
    """Write a complete run folder, with `text` wherever a free text can stand."""
    report = {
        "name": f"lenet {text}",
        "task": text,
        "dense": figures(),
        "compact": figures(
            test_error=0.0084, params=2512, macs=90123, latency_ms_batch1=0.0675, onnx_bytes=None
        ),
        "widths": {f"conv1 {text}": [20, 5], "fc1": [500, 21]},
        "seed": 3,
        "wall_seconds": {f"train {text}": 75.0, "cycles": 5.0},
        "work_seconds": {"training": 70.0, "curvature": 4.0, "compaction": 2.0},
        "versions": {"torch": f"2.13.0 {text}"},
        "refused": [f"fc2: its units are the outputs ({text})."],
        f"genotype {text}": [text, 1],
    }
    metrics = [
        {"phase": f"train {text}", "epoch": 1, "train_loss": 0.9, "heldout_loss": 0.8, "heldout_error": 0.2,
         "params": 431080, "macs": 2293000, "seconds": 1.0},
        {"phase": "cycle", "cycle": 1, "epoch": 1, "train_loss": 0.4, "heldout_loss": 0.5,
         "heldout_error": 0.1, "params": 100000, "macs": 1000000, "strength": 2.0, "seconds": 1.0},
        {"phase": "cycle", "cycle": 2, "epoch": 1, "train_loss": None, "heldout_loss": 0.4,
         "heldout_error": 0.1, "params": 50000, "macs": 900000, "strength": 4.0, "seconds": 1.0},
    ]  # fmt: skip
    pareto = [
        {"point": k, "params": p, "macs": 20 * p, "heldout_loss": 0.1 * k + 0.1,
         "heldout_error": 0.01 * (k + 1), "strength": None if k == 0 else 1024.0 * k, "chosen": k == 2}
        for k, p in enumerate((431080, 10000, 2512, 900))
    ]  # fmt: skip
    selection = {"grouping": f"units {text}", "num_groups": 1370, "num_kept": 112, "strength": 2048.0}
    evidence = {"evidence": [0.0, 0.5, 3.0, 40.0], "gamma": [0.1, 0.2, 0.0, 0.9]}
    environment = {"cpu": text, f"gpu {text}": None}
    for name, content in (
        ("report.json", report),
        ("pareto.json", pareto),
        ("selection.json", selection),
        ("evidence.json", evidence),
        ("environment.json", environment),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (folder / "recipe.yaml").write_text(f"version: 1  # {text}\n```\nseed: 3\n")


def test_both_files_hold_every_record(tmp_path: Path) -> None:
    fill(tmp_path)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = " ".join(" ".join(Collector(page.read_text()).texts).split())
    markdown = (tmp_path / "report.md").read_text()
    facts = [
        "431,080 -> 2,512 parameters (172x fewer), test error 0.71 % -> 0.84 %, latency 6.1x shorter",
        "112 of 1,370 units plain kept at strength 2,048",
        "+0.13 points", "2,293,000", "25x fewer", "1.73 MB", "not measured", "0.0675 ms", "6.1x shorter",
        "conv1 plain", "fc2: its units are the outputs (plain).", "1 min 15 s", "together", "1 min 20 s",
        "curvature", "4.0 s, 5.0 %", "other", "4.0 s, 5.0 %", "curvature + update + compaction", "6.0 s, 7.5 %",
        "2.13.0 plain", "genotype plain", "version: 1 # plain", "seed 3",
    ]  # fmt: skip
    for fact in facts:
        assert fact in text
        assert fact.replace("|", "\\|") in " ".join(markdown.split())
    for title in ("Loss", "Held-out error", "Size", "Strength", "Evidence", "Gamma", "Held-out loss"):
        assert title in text
    assert "20 → 5" in text and "| conv1 plain | 20 | 5 | 4.0x narrower |" in markdown
    assert "| 2 | 2,048 | 2,512 | 50,240 | 0.3 | 3.00 % | yes |" in markdown
    charts = [a for a in Collector(page.read_text()).attributes if a[:2] == ("svg", "role")]
    assert len(charts) == 1 + 2 + 2 + 2 + 2


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    page = write_report(tmp_path).read_text()
    found = Collector(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not [
        a
        for a in found.attributes
        if a[1] in ("src", "href", "srcset", "xlink:href") or a[1].startswith("on")
    ]
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    fill(tmp_path, HOSTILE)
    page = write_report(tmp_path).read_text()
    found = Collector(page)
    assert not {"script", "img", "a"} & set(found.tags)
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert page.count("&lt;script&gt;") >= 10
    markdown = (tmp_path / "report.md").read_text()
    outside_fence, fenced = markdown.split("\n````yaml\n")
    assert "<script" not in outside_fence and "<img" not in outside_fence
    assert "](javascript" not in outside_fence.replace("\\]", "")
    assert fenced.endswith("\n````\n") and "\n```\nseed: 3" in fenced
    for line in outside_fence.splitlines():
        if line.startswith("| lenet") or line.startswith("| conv1"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5


def test_a_bare_report_is_enough(tmp_path: Path) -> None:
    fill(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report.update(widths={}, wall_seconds={}, work_seconds={}, versions={}, refused=[])
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_report(tmp_path).read_text()
    assert "<svg" not in page
    assert "No unit was refused." in page
    assert "No unit was refused." in (tmp_path / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_quantities_that_were_not_recorded_have_no_chart(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"phase": "train", "train_loss": 0.5}\n{"phase": "train", "train_loss": NaN}\n'
    )
    (tmp_path / "evidence.json").write_text('{"evidence": [0.0, 0.0]}')
    (tmp_path / "pareto.json").write_text("[]")
    text = " ".join(Collector(write_report(tmp_path).read_text()).texts)
    assert "Loss" in text
    for title in ("Strength", "Size", "Evidence", "Gamma"):
        assert title not in text


def test_networks_without_parameters_have_gaps(tmp_path: Path) -> None:
    fill(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report["dense"].update(params=0, macs=0)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "percent of dense" not in write_report(tmp_path).read_text()


def test_a_network_that_is_not_faster_or_over_budget_is_not_hidden(tmp_path: Path) -> None:
    fill(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert "did not fall" not in write_report(tmp_path).read_text()
    report["compact"].update(latency_ms_batch1=0.41)
    limits = [
        {"kind": "macs", "limit": 45860.0, "reached": 90123, "met": False},
        {"kind": "latency_ms", "limit": 0.5, "reached": 0.41, "met": True},
    ]
    report["budget"] = {"met": False, "limits": limits}
    (tmp_path / "report.json").write_text(json.dumps(report))
    page, markdown = write_report(tmp_path).read_text(), (tmp_path / "report.md").read_text()
    for text in (page, markdown):
        assert "Latency at batch 1 did not fall" in text
        assert (
            "The budget was missed (macs at most 45,860, reached 90,123, missed; latency_ms at most" in text
        )
    assert "at most 0.5, reached 0.41</td>" in page
    report["compact"]["macs"] = report["dense"]["macs"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "Nothing was cut out" in write_report(tmp_path).read_text()


def test_gamma_follows_from_the_evidence_where_it_was_not_recorded(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "evidence.json").write_text('{"evidence": [0.5, 2.0, 4.0, 1.01, 0.0]}')
    text = " ".join(" ".join(Collector(write_report(tmp_path).read_text()).texts).split())
    assert "5 groups, 3 above 1 and kept by the rule. 1 without a positive value are not drawn." in text
    assert "2 of 5 groups stand at 0 and are not drawn. From the evidence" in text
    assert "evidence z" in write_report(tmp_path).read_text()
    for other in ("prune: {score: magnitude}", "prior: {rule: entropy}", "posterior: variational_dropout"):
        (tmp_path / "recipe.yaml").write_text(other + "\n")
        page = write_report(tmp_path).read_text()
        assert "evidence z" not in page and "nats of evidence" not in page


def test_damaged_folder_leaves_the_old_report(tmp_path: Path) -> None:
    fill(tmp_path)
    page = write_report(tmp_path)
    before = page.read_text()
    (tmp_path / "pareto.json").write_text("[{")
    with pytest.raises(RunError, match=r"pareto\.json is damaged or incomplete: Invalid JSON"):
        write_report(tmp_path)
    assert page.read_text() == before


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "report.md").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*report\.md"):
        write_report(tmp_path)
