"""Finding recipes, and what is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsebayes.errors import RecipeError
from sparsebayes.recipe import Recipe, SearchRecipe, load_recipe, shipped, summarise
from sparsebayes.recipe.document import MAX_BYTES
from sparsebayes.recipe.shipped import find_recipe, headline, read_text, recipe_folder, shipped_recipes

FILES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
IDS = [path.stem for path in FILES]


def folder_with(path: Path, *files: str) -> Path:
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("# What it does.\n", encoding="utf-8")
    return path


def test_in_a_wheel_recipes_lie_in_the_package(tmp_path):
    folder_with(tmp_path, "sparsebayes/recipes/a.yaml", "recipes/b.yaml", "pyproject.toml")
    assert recipe_folder(tmp_path / "sparsebayes") == tmp_path / "sparsebayes" / "recipes"


def test_in_a_checkout_recipes_lie_beside_the_package(tmp_path):
    folder_with(tmp_path, "recipes/b.yaml", "pyproject.toml")
    assert recipe_folder(tmp_path / "sparsebayes") == tmp_path / "recipes"


@pytest.mark.parametrize("files", [["recipes/b.yaml"], ["pyproject.toml"], []])
def test_without_recipes_the_message_says_where_they_should_be(tmp_path, files):
    folder_with(tmp_path, *files)
    with pytest.raises(RecipeError, match=r"^expected shipped recipes in .*recipes, found none; reinstall"):
        recipe_folder(tmp_path / "sparsebayes")


def test_a_recipe_in_a_folder_is_named_with_it(tmp_path, monkeypatch):
    folder_with(tmp_path, "b.yaml", "nas/a.yaml", "notes.txt")
    monkeypatch.setattr(shipped, "recipe_folder", lambda: tmp_path)
    assert list(shipped_recipes()) == ["b", "nas/a"]
    assert find_recipe("nas/a.yaml") == tmp_path / "nas" / "a.yaml"


def test_a_file_comes_before_a_shipped_recipe_and_a_folder_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart") == shipped_recipes()["quickstart"]
    assert find_recipe("quickstart.yaml") == shipped_recipes()["quickstart"]
    folder_with(tmp_path, "quickstart.yaml")
    assert find_recipe("quickstart.yaml") == Path("quickstart.yaml")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "quikstart",
            "^unknown recipe 'quikstart'; did you mean 'quickstart'. Choices: .*, or the path of a YAML",
        ),
        ("no/such.yaml", "^unknown recipe 'no/such.yaml'.* Choices: lenet300_mnist, "),
        ("", "^expected a recipe file, got the folder ''; name the YAML file in it$"),
        (".", "^expected a recipe file, got the folder '.'; name the YAML file in it$"),
        ("a\0b", "^unknown recipe "),
        ("x" * 5000, "^unknown recipe 'xxx"),
    ],
)
def test_names_that_are_no_recipe(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=sentence):
        find_recipe(name)


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(
        RecipeError, match=r"r\.yaml:2: expected UTF-8 text, got other bytes; save it as UTF-8$"
    ):
        read_text(path)
    path.write_text("version: 1", encoding="utf-16")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: expected UTF-8 text"):
        read_text(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(
        RecipeError, match=r"expected a recipe of at most 1,000,000 bytes, got a larger file$"
    ):
        read_text(path)
    path.unlink()
    with pytest.raises(RecipeError, match=r"^recipe '.*r\.yaml' cannot be read: No such file or directory$"):
        read_text(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1", encoding="utf-8-sig")
    assert read_text(path) == "version: 1"


@pytest.mark.parametrize(("text", "line"), [("\n#  A b. \nx: 1", "A b."), ("x: 1\n# late", ""), ("", "")])
def test_headline(text, line):
    assert headline(text) == line


def test_all_recipes_are_counted():
    assert len(FILES) == 16
    assert list(shipped_recipes().values()) == FILES


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_shipped_recipe_is_valid_and_says_how_it_is_run(path):
    text = read_text(path)
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert 20 < len(headline(text)) < 80
    assert f"#     sparsebayes run {path.stem}\n" in text, "the head gives the exact command"
    assert f"#     sparsebayes run {path.stem} --preset smoke" in text
    words = (
        f"model      {recipe.model.name}"
        if isinstance(recipe, Recipe)
        else f"space      {recipe.search.space}"
    )
    assert words in summarise(recipe)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_head_claims_measured_figures_or_none(path):
    head = read_text(path).partition("\nversion:")[0]
    assert ("docs/benchmarks.md" in head) != ("Figures: not yet measured." in head)
    assert max(map(len, read_text(path).splitlines())) <= 120


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_command_in_a_head_comment_is_a_valid_one(path):
    commands = [
        line.split("#")[1].split() for line in read_text(path).splitlines() if "sparsebayes run" in line
    ]
    assert len(commands) >= 3
    for command in commands:
        overrides = [word for word in command if "=" in word]
        assert load_recipe(command[2], overrides=overrides).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_smoke_preset_is_small_and_needs_no_network(path):
    smoke = load_recipe(path.stem, preset="smoke")
    assert smoke.data.name in ("embedded_mnist", "embedded_cifar10", "shapes")
    assert smoke.curvature.num_images <= 512
    if isinstance(smoke, SearchRecipe):
        search = smoke.search
        assert search.warmup_epochs + search.cycles * search.epochs + smoke.retrain.epochs <= 5
        assert (search.num_images or 0) in range(1, 1000)
        return
    train = smoke.train
    assert train.pretrain.epochs + train.cycles.count * train.cycles.epochs + train.finetune.epochs <= 6
