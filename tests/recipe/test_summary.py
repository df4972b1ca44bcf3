"""The summary of a recipe names what decides."""

from __future__ import annotations

import pytest

from sparsebayes.recipe import load_recipe, summarise


@pytest.mark.parametrize(
    ("name", "changes", "decides"),
    [
        ("quickstart", [], "laplace, switches, by evidence"),
        ("quickstart", ["prune.score=magnitude"], "none, groups go by magnitude"),
        ("lenet5_mnist_dropout", ["sampling={count: 20}"], "variational_dropout, best of 20 by held-out loss"),
        ("lenet5_mnist_dropout", ["sampling={count: 1}"], "variational_dropout"),
        ("nas_proxy", ["sampling.count=1"], "laplace, by evidence"),
        ("nas_proxy", ["sampling.count=5"], "laplace, by evidence, best of 5 by held-out loss"),
        ("nas_proxy", ["search.baseline=magnitude", "sampling.count=5"],
         "baseline magnitude, best of 5 by held-out loss"),
        ("nas_proxy", ["search.baseline=random"], "baseline random"),
        ("nas_proxy_balenas", ["sampling.count=10"], "natural_gradient, best of 10 by training-free proxies"),
    ],
)  # fmt: skip
def test_what_decides_is_named(name: str, changes: list[str], decides: str) -> None:
    lines = summarise(load_recipe(name, overrides=changes)).splitlines()
    assert [line for line in lines if line.startswith("posterior")] == [f"posterior  {decides}"]
