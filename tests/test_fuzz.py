"""Some hundred damaged inputs; `tools/fuzz.py` tries ten thousand."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from sparsebayes.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
CASES = 30


@pytest.fixture(scope="module")
def fuzz() -> types.ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("fuzz_tool", ROOT / "tools" / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_tool"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.fixture(scope="module")
def subjects(fuzz: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz.prepare(tmp_path_factory.mktemp("fuzz"))


def test_every_subject_is_prepared(fuzz: types.ModuleType, subjects: dict[str, Any]) -> None:
    assert sorted(subjects) == sorted(fuzz.SUBJECTS)


@pytest.mark.parametrize(
    "name",
    ["recipe", "search recipe", "override", "selection", "genotype", "architecture", "weights", "weights header",
     "lineage", "data header", "data batch", "table of cells", "front", "times", "run folder", "checkpoint"],
)  # fmt: skip
def test_damage_ends_in_a_sentence(fuzz: types.ModuleType, subjects: dict[str, Any], name: str) -> None:
    assert fuzz.fuzz(name, subjects[name], CASES) == []


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("a bug"), "ValueError: a bug"),
        (RunError(""), "an empty message"),
        (RunError("one\ntwo"), "a message of 2 lines"),
        (RunError("bell \x07"), "unprintable characters"),
        (Warning("careful"), "Warning: careful"),
    ],
)
def test_what_is_no_sentence_is_found(fuzz: types.ModuleType, error: Exception, outcome: str) -> None:
    def use(case: int) -> None:
        if case > 3:
            raise error

    [found] = fuzz.fuzz("made up", fuzz.Subject(st.integers(), use), 100)
    assert found.outcome.startswith(outcome)
    assert found.handed_in == "4"  # the smallest case that fails


def test_a_hang_is_found(fuzz: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def use(case: int) -> None:
        while True:
            pass

    [found] = fuzz.fuzz("made up", fuzz.Subject(st.just(0), use), 1)
    assert found.outcome == "TimeoutError: no end after 1 seconds"
