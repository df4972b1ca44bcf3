"""The pages in a real browser: they load nothing, complain of nothing, fit a phone, and can be read by everybody."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sparsebayes.report import write_comparison, write_report

# For every text: its colour against the nearest background behind it, as the contrast ratio of WCAG 2.1, 1.4.3.
CONTRASTS = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.tagName !== 'title')
    .map(e => {
      const style = getComputedStyle(e);
      const ink = e.ownerSVGElement ? style.fill : style.color;
      const [a, b] = [light(rgb(ink)), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 30)];
    });
})()
"""


def figures(**changes: Any) -> dict[str, Any]:
    values = {"test_error": 0.0071, "params": 431080, "macs": 2293000, "onnx_bytes": 1725000}
    return {**values, "latency_ms_batch1": 0.412, "latency_ms_batch64": 14.2, **changes}


def fill(folder: Path) -> Path:
    """A run folder with everything that a page can show, long names among it."""
    folder.mkdir()
    layers = {f"features.block{k}.convolution.weight": (64, 60 - 6 * k) for k in range(8)}
    report = {
        "name": folder.name, "task": "compress", "seed": 3,
        "dense": figures(), "compact": figures(test_error=0.0084, params=2512, macs=90123),
        "widths": layers, "wall_seconds": {"train": 75.0}, "versions": {"torch": "2.13.0"},
        "refused": ["'classifier': 10 channels stay: they are outputs of the model"],
        "budget": {"params": 0.005, "met": False},
    }  # fmt: skip
    pareto = [
        {"point": k, "params": 431080 // 2**k, "macs": 2293000 // 2**k, "heldout_loss": 0.05 + 0.004 * k**2,
         "heldout_error": 0.01 + 0.001 * k, "strength": 2.0**k if k else None, "chosen": k == 6,
         "standard_error": 0.01, "widths": dict.fromkeys(layers, 64 - 6 * k)}
        for k in range(9)
    ]  # fmt: skip
    metrics = [
        {"phase": phase, "epoch": k, "train_loss": 1 / k, "heldout_loss": 1.1 / k, "heldout_error": 0.1 / k}
        for phase in ("pretrain", "cycle", "finetune")
        for k in range(1, 6)
    ]
    for name, content in {
        "report.json": report,
        "pareto.json": pareto,
        "evidence.json": {"evidence": [0.1 * 1.3**k for k in range(40)]},
        "selection.json": {"grouping": "units", "num_groups": 570, "num_kept": 40, "strength": 61.9},
        "environment.json": {"processor": "one of many words " * 4},
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (folder / "recipe.yaml").write_text(f"version: 1\nname: {folder.name}\nseed: 3\n# {'long ' * 60}\n")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [fill(folder / "first"), fill(folder / "second-run-with-a-longer-name")]
    return [write_report(runs[0]), write_comparison(runs, folder / "comparison.html")]


@pytest.mark.parametrize("which", [0, 1], ids=["report", "comparison"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_page_in_a_browser(
    browser: Any, pages: list[Path], which: int, dark: bool, width: int, tmp_path: Path
) -> None:
    browser.open(pages[which], width=width, dark=dark, mobile=width < 500)
    assert browser.requests == []
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == dark
    weak = [found for found in browser.evaluate(CONTRASTS) if found[0] < 4.5]
    assert weak == []
    assert browser.evaluate(
        "[...document.querySelectorAll('svg text')].every(t => t.getBoundingClientRect().left >= 0)"
    )
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("which", [0, 1], ids=["report", "comparison"])
def test_page_is_told_to_those_who_do_not_see_it(browser: Any, pages: list[Path], which: int) -> None:
    browser.open(pages[which])
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    told = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    for role in ("image", "img", "region", "table", "columnheader", "rowheader", "main", "heading"):
        unnamed = [name for kind, name in told if kind == role and not name and role not in ("table", "main")]
        assert unnamed == [], role
    roles = {kind for kind, _ in told}
    assert {"main", "heading", "region", "table", "columnheader", "rowheader"} <= roles
    assert roles & {"image", "img"}
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
