"""Functions that a recipe names: found, called, and every mistake answered in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sparsebayes.errors import DataError, ModelError
from sparsebayes.user_code import call_function, load_function


def test_finds_a_function() -> None:
    assert load_function("model", "pathlib:Path", ModelError) is Path


def test_finds_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_for_this_test.py").write_text("def net():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = list(sys.path)
    assert load_function("model", "my_nets_for_this_test:net", ModelError)() == 3
    assert sys.path == [*before, str(tmp_path)]
    del sys.modules["my_nets_for_this_test"]


@pytest.mark.parametrize("reference", [":f", "a.b:", "a:b:c", "a:b c", ":"])
def test_refuses_another_form(reference: str) -> None:
    with pytest.raises(DataError, match=r"data source .* should have the form 'package\.module:function'"):
        load_function("data source", reference, DataError)


def test_refuses_a_module_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"module 'no_such_module' cannot be imported \(ModuleNotFoundError"):
        load_function("model", "no_such_module:f", ModelError)


def test_refuses_a_module_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_this_test.py").write_text("raise KeyError('left')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be imported \(KeyError: 'left'\); install it, or run"):
        load_function("model", "broken_for_this_test:f", ModelError)


@pytest.mark.parametrize("attribute", ["no_such_function", "sep"])
def test_refuses_what_cannot_be_called(attribute: str) -> None:
    with pytest.raises(ModelError, match=f"module 'os' has no function or class '{attribute}'"):
        load_function("model", f"os:{attribute}", ModelError)


def _net(width: int, *, depth: int = 2) -> tuple[int, int]:
    if width < 0:
        raise ValueError("too narrow")
    if width == 0:
        raise DataError("a sentence of our own")
    return width, depth


def test_calls_with_options() -> None:
    assert call_function("model", "net", _net, {"width": 3, "depth": 4}, ModelError) == (3, 4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"missing a required argument: 'width'; the options it takes: width, depth"),
        (
            {"width": 1, "breadth": 1},
            r"unexpected keyword argument 'breadth'; the options it takes: width, depth",
        ),
        ({"width": -1}, r"model 'net' failed with options \{'width': -1\}: ValueError: too narrow"),
    ],
)
def test_answers_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        call_function("model", "net", _net, options, ModelError)


def test_passes_our_own_errors_on() -> None:
    with pytest.raises(DataError, match=r"^a sentence of our own$"):
        call_function("model", "net", _net, {"width": 0}, ModelError)
