"""Fixtures for all tests: one thread, a fixed seed, and the conditions under which marked tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No deadline, since a busy machine is no bug; the same examples each time, so that a failure can be repeated.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what it would take."""
    conditions = {
        "gpu": (torch.cuda.is_available(), "needs a CUDA device"),
        "data": (bool(os.environ.get("SPARSEBAYES_DATA")), "needs the full data sets: set SPARSEBAYES_DATA"),
        "release": (
            os.environ.get("SPARSEBAYES_RELEASE_TEST") == "1",
            "builds and installs a wheel: set SPARSEBAYES_RELEASE_TEST=1 or run `make release-test`",
        ),
    }
    for item in items:
        for marker, (met, reason) in conditions.items():
            if item.get_closest_marker(marker) and not met:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """Start each test from the same random numbers, on one thread, so that sums are added in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_root() -> Path:
    """The folder of the full data sets; for tests marked `data`."""
    return Path(os.environ["SPARSEBAYES_DATA"])
