"""Recipes from text, presets and overrides; the text of every mistake."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebayes.errors import RecipeError
from sparsebayes.recipe import Recipe, dump_recipe, load_recipe, parse_recipe

HEAD = "version: 1\nname: tiny\nmodel: {name: lenet5_caffe}\n"


def refusal(text: str, **options: object) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", **options)
    return str(caught.value)


def test_a_small_recipe_takes_every_default():
    recipe = parse_recipe(HEAD, "r.yaml")
    assert recipe == Recipe(version=1, name="tiny", model={"name": "lenet5_caffe"})
    assert [group.rule for group in recipe.groups] == ["units"]
    assert recipe.prior.strength == "auto"


MISTAKES = [
    ("train:\n  lr: fast", "r.yaml:5: train.lr: expected a number, got 'fast'"),
    ("train:\n  lr: true", "r.yaml:5: train.lr: expected a number, got true"),
    ("train:\n  lr: null", "r.yaml:5: train.lr: expected a number, got nothing"),
    ("train:\n  lr: [1]", "r.yaml:5: train.lr: expected a number, got a list of 1"),
    ("train:\n  lr: 0", "r.yaml:5: train.lr: expected a number > 0, got 0"),
    ("train:\n  lr: 101", "r.yaml:5: train.lr: expected a number <= 100, got 101"),
    ("train: {momentum: 1}", "r.yaml:4: train.momentum: expected a number < 1, got 1"),
    ("seed: -1", "r.yaml:4: seed: expected a number >= 0, got -1"),
    ("seed: 4294967296", "r.yaml:4: seed: expected a number <= 4294967295, got 4294967296"),
    (f"seed: {'9' * 30}", "r.yaml:4: seed: expected a number <= 4294967295, got a number of over 20 digits"),
    ("seed: 1.5", "r.yaml:4: seed: expected a whole number, got 1.5"),
    ("seed: '1'", "r.yaml:4: seed: expected a whole number, got '1'"),
    ("export: {onnx: yes}", "r.yaml:4: export.onnx: expected true or false, got 'yes'"),
    ("out: 3", "r.yaml:4: out: expected text, got 3"),
    ('out: "\\ud800"', "r.yaml:4: out: expected text of Unicode characters, got '\\ud800'"),
    ("out: ''", "r.yaml:4: out: expected the path of a folder, got ''"),
    ('data: {root: "a\\0b"}', "r.yaml:4: data.root: expected the path of a folder, got 'a\\x00b'"),
    ("train:", "r.yaml:4: train: expected a section of key: value lines, got nothing"),
    ("train: 3", "r.yaml:4: train: expected a section of key: value lines, got 3"),
    ("presets: {smoke: 3}", "r.yaml:4: presets.smoke: expected a section of key: value lines, got 3"),
    ("presets: [smoke]", "r.yaml:4: presets: expected a section of key: value lines, got a list of 1"),
    ("device: gpu", "r.yaml:4: device: expected 'auto', 'cpu' or 'cuda', got 'gpu'"),
    ("device: cude", "r.yaml:4: device: expected 'auto', 'cpu' or 'cuda', got 'cude'; did you mean 'cuda'?"),
    (
        "posterior: laplce",
        "posterior: expected 'laplace', 'variational_dropout' or 'natural_gradient', got 'laplce'; did you mean "
        "'laplace'?",
    ),
    ("evaluate: {batch_sizes: 3}", "r.yaml:4: evaluate.batch_sizes: expected a list, as in [a, b], got 3"),
    (
        "evaluate: {batch_sizes: []}",
        "r.yaml:4: evaluate.batch_sizes: expected at least one entry, got an empty",
    ),
    (
        f"evaluate: {{batch_sizes: {list(range(1, 18))}}}",
        "r.yaml:4: evaluate.batch_sizes: expected at most 16 entries, got a list of 17",
    ),
    (
        "evaluate:\n  batch_sizes:\n    - 1\n    - x",
        "r.yaml:7: evaluate.batch_sizes[1]: expected a whole number, got 'x'",
    ),
    (
        "data: {name: mnits}",
        "r.yaml:4: data.name: unknown data set 'mnits'; did you mean 'mnist'? Choices: cifar10, "
        "cifar100, embedded_cifar10, embedded_mnist, fashion_mnist, mnist, shapes, or your own "
        "'package.module:function'",
    ),
    ("data: {name: 3}", "r.yaml:4: data.name: expected the name of a data set, got 3"),
    (
        "data: {name: 'my-data:load'}",
        "r.yaml:4: data.name: expected user code as 'package.module:function', got 'my-data:load'",
    ),
    ("groups: unit", "r.yaml:4: groups: unknown rule 'unit'; did you mean 'units'? Choices: blocks"),
    ("groups: units+featurs", "r.yaml:4: groups: unknown rule 'featurs'; did you mean 'features'?"),
    ("groups: [units, rows+]", "r.yaml:4: groups[1]: unknown rule ''. Choices: blocks, "),
    ("groups:\n - units+x\n - rows", "r.yaml:5: groups[0]: unknown rule 'x'. Choices: blocks"),
    ("groups:\n - units\n - rule: row", "r.yaml:6: groups[1].rule: unknown rule 'row'; did you mean 'rows'?"),
    ("groups:\n - {rule: 3}", "r.yaml:5: groups[0].rule: expected the name of a rule, such as units, got 3"),
    ("groups: units+rows+units", "r.yaml:4: groups: expected each rule once, got 'units+rows+units'"),
    (f"groups: [{'rows, ' * 65}]", "r.yaml:4: groups: expected at most 64 rules, got a list of 65"),
    ("groups: 4:2", "r.yaml:4: groups: expected n:m with n < m, n weights kept of each m, got '4:2'"),
    ("groups: blocks:0x4", "r.yaml:4: groups: unknown rule 'blocks:0x4'; did you mean 'blocks'? Choices: "),
    ("groups: []", "r.yaml:4: groups: expected at least one entry, got an empty list"),
    ("groups: 3", "r.yaml:4: groups: expected a list, as in [a, b], got 3"),
    ("groups: [3]", "r.yaml:4: groups[0]: expected a section of key: value lines, got 3"),
    ("groups: [{include: [a]}]", "r.yaml:4: groups[0].rule: expected a value, got nothing; add this key"),
    (
        "groups: {rule: rows, include: fc}",
        "r.yaml:4: groups.include: expected a list, as in [a, b], got 'fc'",
    ),
    (
        "groups: {rule: rows, include: ['']}",
        "r.yaml:4: groups.include[0]: expected text that is not empty, got ''",
    ),
    ("prior: {strength: 0}", "r.yaml:4: prior.strength: expected auto or a number > 0 and <= 1e+12, got 0"),
    (
        "prior: {strength: true}",
        "r.yaml:4: prior.strength: expected auto or a number > 0 and <= 1e+12, got true",
    ),
    (
        "prior: {strength: atuo}",
        "r.yaml:4: prior.strength: expected auto or a number > 0 and <= 1e+12, got 'atuo'; "
        "did you mean 'auto'?",
    ),
    (
        "prune: {budget: {}}",
        "r.yaml:4: prune.budget: expected at least one of params, macs and latency_ms, got none; write budget: null "
        "for none",
    ),
    ("prune: {budget: {params: 2}}", "r.yaml:4: prune.budget.params: expected a number <= 1, got 2"),
    ("prune: {budget: .1}", "r.yaml:4: prune.budget: expected a section of key: value lines, got 0.1"),
    (
        "prune: {budget: {param: .1}}",
        "r.yaml:4: prune.budget: unknown key 'param'; did you mean 'params'? Choices: latency_ms, macs, params",
    ),
    (
        "trian: {lr: 1}",
        "r.yaml:4: unknown key 'trian'; did you mean 'train'? Choices: curvature, data, device,",
    ),
    (
        "train:\n  cycles:\n    epoch: 3",
        "r.yaml:6: train.cycles: unknown key 'epoch'; did you mean 'epochs'? Choices: count, "
        "epochs, lr, max_epochs, shrink",
    ),
    ("holdout: 3", "; elsewhere there is data.holdout"),
    (
        "train: {epochs: 3}",
        "natural_gradient.epochs, train.pretrain.epochs, train.cycles.epochs, train.finetune.epochs",
    ),
    (
        "groups: [{rule: rows, includ: [a]}]",
        "r.yaml:4: groups[0]: unknown key 'includ'; did you mean 'include'?",
    ),
    (
        "model: {name: lenet5_caffe}",
        "r.yaml:4: expected each key once, got 'model' again (first on line 3); remove one of them",
    ),
    (f"out: {'x' * 99}\nseed: {'y' * 99}", f"r.yaml:5: seed: expected a whole number, got '{'y' * 56}..."),
    ("presets: {a: {train: {lr: no}}}", "r.yaml:4: presets.a.train.lr: expected a number, got 'no'"),
    (
        "presets:\n  a:\n    presets: {}",
        "r.yaml:6: presets.a.presets: expected only at the top of a recipe's file",
    ),
    (
        f"presets: {{{', '.join(f'p{i}: {{}}' for i in range(33))}}}",
        "r.yaml:4: presets: expected at most 32 entries, got a section",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES)
def test_the_sentence_of_each_mistake(text, sentence):
    message = refusal(HEAD + text)
    assert sentence in message
    assert "\n" not in message, "one mistake is one line"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "name: tiny\nmodel: {name: lenet5_caffe}",
            "r.yaml:1: version: expected a value, got nothing; add this key",
        ),
        (
            "# a comment\nversion: 1\nname: tiny",
            "r.yaml:1: model: expected a value, got nothing; add this key, it",
        ),
        (
            "version: 1\nname: x\nmodel: {}",
            "r.yaml:3: model.name: expected a value, got nothing; add this key",
        ),
        ("version: 2\nname: x\nmodel: {name: lenet5_caffe}", "r.yaml:1: version: expected 1, got 2"),
        (
            "version: 1\nname: x\nmodel: {name: lenet5}",
            "r.yaml:3: model.name: unknown model 'lenet5'; did you mean",
        ),
        (
            "version: 1\nname: a/b\nmodel: {name: lenet5_caffe}",
            "r.yaml:2: name: expected a name of letters, digits",
        ),
        ("", "r.yaml:1: expected a recipe's key: value lines, got an empty file; see 'sparsebayes show"),
        ("- a\n- b", "r.yaml:1: expected a recipe's key: value lines, got a list of 2; see"),
        ("just text", "r.yaml:1: expected a recipe's key: value lines, got 'just text'; see"),
        ("a: [", "r.yaml:1: expected YAML, got "),
        ("&a a: 1", "r.yaml:1: expected no anchors (&) and aliases (*) in a recipe; write the value out"),
    ],
)
def test_the_sentence_of_each_mistake_at_the_top(text, sentence):
    assert refusal(text).startswith(sentence)


def test_all_mistakes_come_at_once_in_the_order_of_lines():
    text = HEAD + "train:\n  lr: fast\n  lrr: 1\nseed: x\nseed: 1\npresets:\n  smoke:\n    seed: y\n"
    assert refusal(text, preset="smok", overrides=["train.momentum=7", "nothing"]).splitlines() == [
        "8 mistakes in r.yaml:",
        "  r.yaml:5: train.lr: expected a number, got 'fast'",
        "  r.yaml:6: train: unknown key 'lrr'; did you mean 'lr'? Choices: compile, cycles, "
        "distill, distill_on, distill_temperature, finetune, grad_clip, label_smoothing, lr, momentum, optimizer, "
        "precision, pretrain, weight_decay",
        "  r.yaml:7: seed: expected a whole number, got 'x'",
        "  r.yaml:8: expected each key once, got 'seed' again (first on line 7); remove one of them",
        "  r.yaml:11: presets.smoke.seed: expected a whole number, got 'y'",
        "  r.yaml: unknown preset 'smok'; did you mean 'smoke'? Choices: smoke",
        "  override 'nothing': expected key=value, such as train.lr=0.01",
        "  override 'train.momentum=7': train.momentum: expected a number < 1, got 7",
    ]


def test_of_very_many_mistakes_the_first_are_listed():
    lines = refusal(HEAD + "".join(f"k{number}: 1\n" for number in range(60))).splitlines()
    assert lines[0] == "more than 50 mistakes, the first of them in r.yaml:"
    assert [line.partition(": ")[0] for line in lines[1:]] == [f"  r.yaml:{line}" for line in range(4, 54)]


def test_presets_and_overrides_are_laid_over_the_recipe_in_turn():
    text = (
        HEAD
        + "train: {lr: 0.1, momentum: 0.5}\npresets:\n  fast:\n    train: {lr: 0.2, cycles: {count: 2}}\n"
    )
    plain, fast = parse_recipe(text, "r.yaml"), parse_recipe(text, "r.yaml", preset="fast")
    assert (plain.train.lr, plain.train.momentum, plain.train.cycles.count) == (0.1, 0.5, 12)
    assert (fast.train.lr, fast.train.momentum, fast.train.cycles.count) == (0.2, 0.5, 2)
    changes = [
        "train.lr=3e-1",
        "train.cycles={shrink: 0.4}",
        "groups=2:4",
        "prune.budget.params=0.1",
        "seed=1",
        "seed=2",
    ]
    changed = parse_recipe(text, "r.yaml", preset="fast", overrides=changes)
    assert (changed.train.lr, changed.train.cycles.count, changed.train.cycles.shrink) == (0.3, 2, 0.4)
    assert [group.rule for group in changed.groups] == ["2:4"]
    assert changed.prune.budget is not None and changed.prune.budget.params == 0.1
    assert changed.seed == 2, "the last of two overrides counts"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr", "override 'train.lr': expected key=value, such as train.lr=0.01"),
        ("--train.lr=3", "override '--train.lr=3': expected key=value without dashes, such as train.lr=0.01"),
        ("=3", "override '=3': expected a dotted key before '=', such as train.lr, got ''"),
        (
            "train..lr=3",
            "override 'train..lr=3': expected a dotted key before '=', such as train.lr, got 'train..lr'",
        ),
        (
            "train.lr=",
            "override 'train.lr=': expected a value after '=', got nothing; write train.lr=null to set",
        ),
        ("train.lr=[", "override 'train.lr=[': expected YAML, got "),
        ("train.lr=&a 3", "override 'train.lr=&a 3': expected no anchors"),
        (
            "train={lr: 1, lr: 2}",
            "override 'train={lr: 1, lr: 2}': expected each key once, got 'lr' again; remove one",
        ),
        ("train.lr=fast", "override 'train.lr=fast': train.lr: expected a number, got 'fast'"),
        ("train.lr.x=1", "override 'train.lr.x=1': train.lr: expected a number, got a section"),
        ("train.epcohs=1", "override 'train.epcohs=1': train: unknown key 'epcohs'"),
        ("trian.lr=1", "override 'trian.lr=1': unknown key 'trian'; did you mean 'train'?"),
        (
            "groups.rule=rows",
            "override 'groups.rule=rows': groups is a list; write all of it, as in groups=[a, b]",
        ),
        ("groups.0.rule=rows", "override 'groups.0.rule=rows': groups is a list; write all of it"),
        (
            "presets.a.seed=1",
            "override 'presets.a.seed=1': presets: expected only at the top of a recipe's file",
        ),
    ],
)
def test_the_sentence_of_each_mistake_in_an_override(override, sentence):
    assert refusal(HEAD + "groups: [units, features]", overrides=[override]).startswith(sentence)


def test_an_unknown_preset_names_the_nearest_and_an_absent_table_none():
    assert refusal(HEAD, preset="smoke") == "r.yaml: unknown preset 'smoke'. Choices: none"


def test_every_preset_is_checked_also_with_overrides_that_hide_its_mistake():
    text = HEAD + "presets: {a: {seed: 1}, b: {seed: x}}"
    assert refusal(text, preset="a", overrides=["seed=3"]) == (
        "r.yaml:4: presets.b.seed: expected a whole number, got 'x'"
    )


def test_a_resolved_recipe_is_read_back_to_itself():
    text = HEAD + "groups: [units+features, {rule: '2:4', exclude: [fc3]}]\nprune: {budget: {macs: .1}}\n"
    text += "presets: {smoke: {out: '1e3'}}\n"
    recipe = parse_recipe(text, "r.yaml", overrides=["model.options={a: [1, 2.5, null, 'yes', '1e-3']}"])
    assert [group.rule for group in recipe.groups] == ["units", "features", "2:4"]
    assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe


def test_load_recipe_names_the_file_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(HEAD + "seed: x\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^mine\.yaml:4: seed: expected a whole number, got 'x'$"):
        load_recipe("mine.yaml")


TOKENS = st.sampled_from(
    [
        *"\n:-?[]{},&*!|>'\"%@`#~ \t.",
        *["\n  ", "---", "...", "<<", "!!int ", "&a ", "*a", "\\U", "\x00", "\ud800", "é"],
        *["version: 1\n", "name: x\n", "model: {name: lenet5_caffe}\n", "groups", "units+", "2:4", "seed"],
        *["train:", "  lr: ", "1e-3", ".nan", "1e999", "null", "true", "presets:", "  smoke:", "budget"],
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TOKENS, max_size=30).map("".join) | st.text(), st.lists(st.text(), max_size=2))
def test_no_text_raises_anything_but_a_recipe_error(text, overrides):
    for given_text in (text, HEAD + text):
        try:
            recipe = parse_recipe(given_text, "r.yaml", preset="smoke", overrides=overrides)
        except RecipeError as error:
            assert str(error).encode(), "the message can be printed"
        else:
            assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe


KEYS = st.sampled_from(
    [
        *[
            "version",
            "name",
            "model",
            "options",
            "train",
            "lr",
            "cycles",
            "count",
            "groups",
            "rule",
            "include",
        ],
        *[
            "presets",
            "smoke",
            "prune",
            "budget",
            "params",
            "prior",
            "strength",
            "evaluate",
            "batch_sizes",
            "data",
        ],
        *["holdout", "bogus"],
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["units", "auto", "lenet5_caffe", "1e-3", "\ud800", 10**400, 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_no_data_of_the_right_shape_raises_anything_but_a_recipe_error(data):
    from sparsebayes.recipe.document import dump

    whole = {"version": 1, "name": "x", "model": {"name": "lenet5_caffe"}} | data
    try:
        recipe = parse_recipe(dump(whole), "r.yaml")
    except RecipeError as error:
        assert str(error).encode(), "the message can be printed"
    else:
        assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe
