"""The documentation is true: examples run, commands parse, generated pages are current, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsebayes
from sparsebayes.cli import main
from sparsebayes.export.saved import save_model
from sparsebayes.nas.spaces import read_space
from sparsebayes.prune.architecture import architecture_of
from sparsebayes.recipe import SearchRecipe, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.second = nn.Linear(32, 16)
        self.third = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def examples(language: str) -> list[object]:
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
        if page.name != "README.md"  # test_readme.py goes further with those
    ]


def commands() -> list[object]:
    """Every command line of this program in a block or between backticks, without comment and redirection."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^ {4}(sparsebayes .*)$", text, re.MULTILINE) + re.findall(
            r"`(sparsebayes [^`]+)`", text
        )
        for line in lines:
            found[f"{page.stem}: {line}"] = re.split(r" +[#>] ?", line)[0]
    return [pytest.param(command, id=name) for name, command in found.items()]


def tool(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", examples("python"))
def test_python_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("docs_example_models")
    module.Net = Net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "docs_example_models", module)
    model, x = Net(), torch.randn(120, 10)
    architecture = architecture_of(model, builder="docs_example_models:Net", options={})
    save_model(tmp_path / "run", model, replace(architecture))
    names = {
        "model": model, "images": x, "torch": torch, "sparsebayes": sparsebayes, "run": tmp_path / "run",
        "loader": DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=20),
    }  # fmt: skip
    exec(compile(example, "docs", "exec"), names)
    made = set(names) - {"model", "images", "torch", "sparsebayes", "run", "loader", "__builtins__"}
    assert made, "an example that makes nothing shows nothing"


@pytest.mark.parametrize("example", examples("yaml"))
def test_yaml_examples_are_recipes(example: str) -> None:
    whole = example if "version:" in example else f"version: 1\nname: docs\n{example}"
    if "search" in yaml.safe_load(whole):
        recipe = parse_recipe(f"{whole}\ntask: search\n", "docs")
        assert isinstance(recipe, SearchRecipe)
        space = recipe.search.space
        assert isinstance(space, str) or read_space(space).cells
        return
    if "model" not in yaml.safe_load(whole):
        whole += "\nmodel: {name: lenet5_caffe}\n"
    assert parse_recipe(whole, "docs").version == 1


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    assert program == "sparsebayes"
    if name.isupper() or name.startswith("-"):
        return
    assert name in main.commands, command
    if arguments:
        main.commands[name].make_context(name, arguments)


def test_there_are_examples() -> None:
    assert len(examples("python")) >= 4
    assert len(examples("yaml")) >= 4
    assert len(commands()) >= 20


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in main.commands if f"sparsebayes {name}" not in text] == []
    for status in (0, 1, 2, 3, 130, 143):
        assert f"| {status} |" in text
    assert "130" in CliRunner().invoke(main, ["--help"]).output


def test_generated_pages_are_current() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == tool("render_api_reference").render(), "run tools/render_api_reference.py"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["index.md"]


def test_links_lead_somewhere(tmp_path: Path) -> None:
    checker = tool("check_links")
    assert checker.broken_links(PAGES) == []
    (tmp_path / "b.md").write_text("# A Title: of `b`\n## Twice\n## Twice\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[ok](b.md) [ok](b.md#a-title-of-b) [ok](b.md#twice-1) [net](https://x.y/z) ![no](c.png)\n"
        "[no](b.md#none)\n```\n[code](d.md)\n```\n    [code](e.md) `[code](f.md)`\n"
    )
    assert checker.broken_links([page]) == [
        f"{page}:1: c.png, no such file",
        f"{page}:2: b.md#none, no such heading",
    ]


def test_pictures_are_whole_and_told() -> None:
    pictures = sorted((ROOT / "docs" / "images").glob("*.svg"))
    assert pictures
    for picture in pictures:
        root = ElementTree.parse(picture).getroot()
        space = "{http://www.w3.org/2000/svg}"
        assert root.find(f"{space}title") is not None and root.find(f"{space}desc") is not None
        text = picture.read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
        assert not re.search(r"<script|href|url\(|@import", text)
