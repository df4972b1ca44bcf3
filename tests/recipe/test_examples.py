"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ["document", "loading", "mistakes", "names", "schema", "shipped", "summary"]


@pytest.mark.parametrize(
    "module", ["sparsebayes.recipe", *(f"sparsebayes.recipe.{name}" for name in MODULES)]
)
def test_examples(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert attempted > 0
    assert failed == 0
