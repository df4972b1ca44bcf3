"""torchvision is imported with and without its compiled operators; each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# A torchvision whose import needs operators, as the real one does, and leaves a submodule behind when it
# fails.
INIT = "from torchvision import first\nfrom torchvision import needs\n"
FIRST = "import builtins\nbuiltins.imports_of_first = getattr(builtins, 'imports_of_first', 0) + 1\n"
NEEDS = """\
import torch
for name in {names}:
    try:
        getattr(torch.ops.torchvision, name)
    except AttributeError:
        raise RuntimeError(f"operator torchvision::{{name}} does not exist") from None
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with the torchvision above, which needs nms and qnms."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "first.py").write_text(FIRST)
    (package / "needs.py").write_text(NEEDS.format(names=("nms", "qnms")))
    return tmp_path


def run_python(code: str, folder: Path | None = None) -> str:
    """What a fresh interpreter prints, on either stream; warnings are errors, and `folder` comes first."""
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n" if folder else ""
    imports = "from sparsebayes.torchvision_compat import _declared, import_torchvision\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + imports + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def test_the_installed_torchvision_is_imported() -> None:
    printed = run_python("""
        import sys
        torchvision = import_torchvision()
        assert import_torchvision() is torchvision and torchvision is sys.modules["torchvision"]
        print(torchvision.__name__, torchvision.datasets.MNIST.__name__, torchvision.models.resnet18.__name__)
    """)
    assert printed == "torchvision MNIST resnet18"


def test_nothing_is_declared_where_the_operators_exist(fake: Path) -> None:
    printed = run_python(
        """
        import torch
        theirs = torch.library.Library("torchvision", "DEF")
        theirs.define("nms(Tensor x) -> Tensor")
        theirs.define("qnms(Tensor x) -> Tensor")
        import_torchvision()
        print(_declared, imports_of_first)
        """,
        fake,
    )
    assert printed == "{} 1"


def test_missing_operators_are_declared_and_the_import_is_repeated_from_the_start(fake: Path) -> None:
    printed = run_python(
        """
        import sys
        torchvision = import_torchvision()
        print(sorted(_declared), imports_of_first, torchvision.needs.__name__)
        assert import_torchvision() is torchvision
        """,
        fake,
    )
    assert printed == "['nms', 'qnms'] 3 torchvision.needs"


def test_only_what_is_missing_is_declared(fake: Path) -> None:
    printed = run_python(
        """
        import torch
        theirs = torch.library.Library("torchvision", "FRAGMENT")
        theirs.define("nms(Tensor x) -> Tensor")
        import_torchvision()
        print(sorted(_declared))
        """,
        fake,
    )
    assert printed == "['qnms']"


def test_an_operator_that_we_do_not_know_is_an_error(fake: Path) -> None:
    (fake / "torchvision" / "needs.py").write_text(NEEDS.format(names=("roi_align",)))
    assert run_python("import_torchvision()", fake).endswith(
        "RuntimeError: operator torchvision::roi_align does not exist"
    )


def test_any_other_failure_is_passed_on(fake: Path) -> None:
    (fake / "torchvision" / "needs.py").write_text("raise RuntimeError('compiled with another CUDA')\n")
    assert run_python("import_torchvision()", fake).endswith("RuntimeError: compiled with another CUDA")


def test_declaring_that_does_not_help_ends(fake: Path) -> None:
    (fake / "torchvision" / "needs.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    assert run_python("import_torchvision()", fake).endswith("operator torchvision::nms does not exist")


def test_an_absent_torchvision_is_an_import_error() -> None:
    printed = run_python("import sys; sys.modules['torchvision'] = None; import_torchvision()")
    assert "ModuleNotFoundError" in printed
