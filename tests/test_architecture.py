"""The shape of the package: imports point down, files are short, names documented, nothing unsafe."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsebayes

PACKAGE = Path(sparsebayes.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import what stands in an earlier row, and its own folder.
ORDER = [
    {"errors"},
    {"torchvision_compat", "user_code", "launcher", "networks", "files", "words"},
    {"cost"},
    {"layers"},
    {"groups"},
    {"curvature"},
    {"inference"},
    {"prune"},
    {"models", "data"},
    {"nas"},
    {"export"},
    {"report"},
    {"recipe"},
    {"api"},
    {"train"},
    {"cli"},
    {"__main__"},
]

# These know still less than their place in the order would let them.
ONLY = {
    "models": {"errors", "torchvision_compat", "user_code"},
    "data": {"errors", "torchvision_compat", "user_code"},
    "inference": {"errors", "groups.hierarchy", "groups.grouping"},
}


def part(path: Path) -> str:
    """The folder or top-level module of a file: "groups" for groups/rules.py, "cost" for cost.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and dotted name within the package of everything that a file imports from it, at any depth."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [
            (node.lineno, n.removeprefix("sparsebayes.")) for n in names if n.startswith("sparsebayes.")
        ]
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def violations(path: Path, tree: ast.Module) -> list[str]:
    """Imports of one file that point up or sideways."""
    here = part(path)
    rank = {name: row for row, names in enumerate(ORDER) for name in names}
    if here not in rank:
        return [f"{here} has no place in ORDER"]
    bad = []
    for line, name in imported(tree):
        there = name.partition(".")[0]
        if there in (here, "__version__"):
            continue
        if there not in rank or rank[there] >= rank[here]:
            bad.append(f"line {line}: {here} imports {name}")
        elif here in ONLY and not any(f"{name}.".startswith(f"{allowed}.") for allowed in ONLY[here]):
            bad.append(f"line {line}: {here} imports {name}, may import only {sorted(ONLY[here])}")
    return bad


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20
    assert part(PACKAGE / "groups" / "rules.py") == "groups"
    assert part(PACKAGE / "cost.py") == "cost"


@pytest.mark.parametrize(
    ("place", "code", "count"),
    [
        ("groups/rules.py", "from sparsebayes.errors import GroupingError", 0),
        ("groups/rules.py", "from sparsebayes.groups.grouping import Grouping", 0),
        ("groups/rules.py", "from sparsebayes.prune import select", 1),
        ("groups/rules.py", "def f():\n    import sparsebayes.cli", 1),
        ("models/lenet.py", "from sparsebayes.cost import cost", 1),
        ("inference/laplace.py", "from sparsebayes.groups.rules import RULES", 1),
        ("inference/laplace.py", "from sparsebayes.groups.hierarchy import Hierarchy", 0),
        ("somewhere/new.py", "", 1),
    ],
)
def test_the_import_check_finds_what_it_should(place: str, code: str, count: int) -> None:
    assert len(violations(PACKAGE / place, ast.parse(code))) == count


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":  # its names are imported on first use, from anywhere
        return
    assert violations(path, parsed(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_documented(path: Path) -> None:
    tree = parsed(path)
    undocumented = [] if ast.get_docstring(tree) else ["the module"]
    scopes: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while scopes:
        prefix, body = scopes.pop()
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                undocumented.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node.body))
    assert undocumented == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unsafe(path: Path) -> None:
    bad = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            bad.append(f"line {node.lineno}: bare except")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"cloudpickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in names}:
                bad.append(f"line {node.lineno}: reading such a file runs whatever it says")
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                bad.append(f"line {node.lineno}: write pickle.NAME, so that its use can be seen")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "hasattr":
                bad.append(f"line {node.lineno}: hasattr guesses; ask for a type, or for a named protocol")
            if called.startswith("pickle."):
                bad.append(f"line {node.lineno}: reading a pickle runs whatever it says")
            if called == "torch.load" and arguments.get("weights_only") != "True":
                bad.append(f"line {node.lineno}: torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and arguments.get("allow_pickle") == "True":
                bad.append(f"line {node.lineno}: np.load with allow_pickle=True")
            if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
                bad.append(f"line {node.lineno}: {called}")
    assert bad == []


def test_few_public_names() -> None:
    assert len(sparsebayes.__all__) <= 15
    assert sorted(set(sparsebayes.__all__)) == sorted(sparsebayes.__all__)


def test_public_names_exist() -> None:
    missing = [name for name in sparsebayes.__all__ if getattr(sparsebayes, name, None) is None]
    assert missing == []
