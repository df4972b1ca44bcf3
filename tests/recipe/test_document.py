"""YAML to plain data with places, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.recipe.document import Place, Tree, dump, overlay, parse


def read(text: str) -> object:
    tree, problems = parse(text, "r.yaml")
    assert problems == []
    return tree.data


def complaints(text: str) -> list[str]:
    return [str(problem) for problem in parse(text, "r.yaml")[1]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5e-4", 0.0005),
        (".5", 0.5),
        ("-2.", -2.0),
        ("12", 12),
        ("+3", 3),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("yes", "yes"),
        ("off", "off"),
        ("2:4", "2:4"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'3'", "3"),
        ("1e", "1e"),
        (".inf", ".inf"),
        ("0o9", "0o9"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    data = read(f"key: {text}")
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_places_are_lines_of_keys_and_entries():
    tree, _ = parse("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - e: 3\n", "r.yaml")
    assert tree.data == {"a": 1, "b": {"c": 2, "d": ["x", {"e": 3}]}}
    lines = {keys: place.line for keys, place in tree.places.items()}
    assert lines == {
        (): 1,
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1): 6,
        ("b", "d", 1, "e"): 6,
    }
    assert str(tree.place(("b", "nothing", "here"))) == "r.yaml:2"
    assert str(Place("override 'a=1'")) == "override 'a=1'"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3: expected each key once, got 'a' again (first on line 1); remove one"),
        ("a: 1\n2: b", "r.yaml:2: expected a name before the colon, got '2'"),
        ("a: 1\n? [x]\n: b", "r.yaml:2: expected a name before the colon, got a list or section"),
        ('a: 1\n"\\0": b', "r.yaml:2: expected a name before the colon, got '\\x00'"),
        ("a: 1\n<<: {b: 2}", "r.yaml:2: expected a name before the colon, got '<<'"),
        ("a: 1\nb: !!python/object:os.system x", "r.yaml:2: expected plain YAML, got the tag"),
        ("a: !!set {x}", "r.yaml:1: expected plain YAML, got the tag 'tag:yaml.org,2002:set'"),
        ("a: !!str [x]", "r.yaml:1: expected plain YAML, got the tag"),
        ("a: !!int x", "r.yaml:1: expected a finite number or text, got 'x'"),
        ("a: 1e999", "r.yaml:1: expected a finite number or text, got '1e999'"),
        ("a: " + "9" * 5000, "r.yaml:1: expected a finite number or text, got '9999"),
        ("a: &x 1\nb: *x", "r.yaml:1: expected no anchors (&) and aliases (*) in a recipe"),
        ("a: 1\nb: *x", "r.yaml:2: expected no anchors (&) and aliases (*) in a recipe"),
        ("a: " + "[" * 40 + "]" * 40, "r.yaml:1: expected lists and sections no more than 30 deep"),
        ("a: 1\n---\nb: 2", "r.yaml:2: expected one YAML document, got another after '---'"),
        ("a: 1\n b: 2", "r.yaml:2: expected YAML, got mapping values are not allowed here; check the"),
        ("a: [1, 2", "r.yaml:1: expected YAML, got expected ',' or ']'"),
        ("a: 'x", "r.yaml:1: expected YAML, got found unexpected end of stream"),
        ("a: \x07", "r.yaml:1: expected YAML text, got what cannot be read: unacceptable character #x0007"),
        ('a: "\\UFFFFFFFF"', "r.yaml:1: expected YAML text, got what cannot be read: "),
    ],
)
def test_what_is_refused(text, complaint):
    found = complaints(text)
    assert len(found) == 1
    assert found[0].startswith(complaint)


def test_several_refusals_come_together_and_the_rest_is_read():
    tree, problems = parse("a: 1\na: 2\nb: !!set {x}\nc: 3", "r.yaml")
    assert [problem.place.line for problem in problems] == [2, 3]
    assert tree.data == {"a": 1, "b": None, "c": 3}


def test_a_bomb_of_aliases_is_refused_before_it_grows():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    )
    assert complaints(bomb)[0].startswith("r.yaml:1: expected no anchors")


def test_nothing_is_none():
    assert read("") is None
    assert read("# only a comment\n") is None


def test_overlay_merges_mappings_and_replaces_the_rest():
    below, _ = parse("a: {x: 1, y: [1, 2]}\nb: 2\n", "below")
    above, _ = parse("\n\n\na:\n  y: [3]\n  z: {w: 4}\nb: {q: 5}\n", "above")
    merged = overlay(below, above)
    assert merged.data == {"a": {"x": 1, "y": [3], "z": {"w": 4}}, "b": {"q": 5}}
    assert {keys: str(place) for keys, place in merged.places.items()} == {
        (): "below:1",
        ("a",): "below:1",
        ("a", "x"): "below:1",
        ("a", "y"): "above:5",
        ("a", "y", 0): "above:5",
        ("a", "z"): "above:6",
        ("a", "z", "w"): "above:6",
        ("b",): "above:7",
        ("b", "q"): "above:7",
    }
    assert below.data == {"a": {"x": 1, "y": [1, 2]}, "b": 2}, "the tree below is not changed"


def test_a_part_remembers_where_it_stood():
    tree, _ = parse("presets:\n  smoke:\n    lr: 1\n", "r.yaml")
    part = tree.at("presets").at("smoke")
    assert part.data == {"lr": 1}
    assert part.places[("lr",)] == Place("r.yaml", 3, ("presets", "smoke"))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text().filter(lambda key: key.isprintable() and key != "<<"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_dumped_is_read_back(data):
    tree, problems = parse(dump({"top": data}), "dumped")
    assert problems == []
    assert tree.data == {"top": data}


@given(PLAIN, PLAIN)
def test_every_value_of_an_overlay_has_a_place(below, above):
    first, _ = parse(dump({"top": below}), "below")
    second, _ = parse(dump({"top": above}), "above")
    merged = overlay(first, second)

    def check(data: object, keys: tuple[str | int, ...]) -> None:
        assert keys in merged.places
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        for key, value in items:
            check(value, (*keys, key))

    check(merged.data, ())


def test_an_empty_overlay_changes_nothing():
    below, _ = parse("a: {x: 1}", "below")
    assert overlay(below, Tree({})) == below
