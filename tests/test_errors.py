"""Errors are one family, and an unknown name is answered with the choices and the nearest match."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparsebayes import errors


@pytest.mark.parametrize(
    "name", ["DataError", "GroupingError", "ModelError", "NumericsError", "RecipeError", "RunError"]
)
def test_all_errors_are_ours(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.SparseBayesError)
    assert str(error("a sentence")) == "a sentence"


def test_unknown_names_the_nearest() -> None:
    message = errors.unknown("model", "lenet6", ["lenet_300_100", "lenet5"])
    assert message == "unknown model 'lenet6'; did you mean 'lenet5'? Choices: lenet5, lenet_300_100"


def test_a_name_that_was_begun_is_nearest() -> None:
    message = errors.unknown("model", "lenet5", ["lenet5_caffe", "resnet56"])
    assert "did you mean 'lenet5_caffe'?" in message
    assert "did you mean" not in errors.unknown("model", "l", ["lenet5_caffe", "resnet56"])


def test_unknown_does_not_guess_what_is_far() -> None:
    assert errors.unknown("model", "zzz", ["lenet5"]) == "unknown model 'zzz'. Choices: lenet5"


def test_unknown_without_choices() -> None:
    assert errors.unknown("preset", "smoke", []) == "unknown preset 'smoke'. Choices: none"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sparsebayes, sparsebayes.errors; print({'torch', 'numpy', 'click'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
