"""What the wording of mistakes must hold for all of the schema."""

from __future__ import annotations

from sparsebayes.recipe.document import parse
from sparsebayes.recipe.mistakes import dotted, explain


def test_keys_are_written_as_overrides_write_them():
    assert dotted(()) == ""
    assert dotted(("train", "cycles", "lr")) == "train.cycles.lr"
    assert dotted(("groups", 1, "rule")) == "groups[1].rule"


def test_a_kind_of_error_without_words_of_ours_keeps_pydantics():
    tree, _ = parse("seed: 1", "r.yaml")
    mistake = {"type": "some_new_kind", "loc": ("seed",), "msg": "Input should be odd", "input": 2}
    assert str(explain(mistake, tree)) == "r.yaml:1: seed: Input should be odd, got 2"
