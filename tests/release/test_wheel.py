"""The wheel, installed where nothing else is, finds its recipes and its data and compresses a network."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.release, pytest.mark.slow]


def run(*command: str | Path, cwd: Path, timeout: float = 900) -> str:
    """Run a command that knows nothing of this checkout, and return what it prints."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPARSEBAYES_DATA")
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with status {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sparsebayes").rglob("*") if path.is_file()
    }
    package = {name for name in package if "__pycache__" not in name}
    recipes = {
        f"sparsebayes/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "recipes").rglob("*")
        if path.is_file()
    }
    assert "sparsebayes/recipes/quickstart.yaml" in recipes
    assert {"sparsebayes/py.typed", "sparsebayes/data/embedded/mnist.npz"} <= package
    assert {name for name in names if name.startswith("sparsebayes/")} == package | recipes
    assert {name.partition("/")[0] for name in names} == {
        "sparsebayes",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    bin_folder = environment / "bin"
    constraints = ROOT / "constraints.txt"
    run(bin_folder / "python", "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=tmp_path)
    run(bin_folder / "python", "-m", "pip", "check", cwd=tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    where = run(bin_folder / "python", "-c", "import sparsebayes; print(sparsebayes.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(environment)
    assert "quickstart" in run(bin_folder / "sparsebayes", "list", cwd=work)
    run(bin_folder / "sparsebayes", "run", "quickstart", "--preset", "smoke", "--out", "first", cwd=work)
    assert {"model.onnx", "model.safetensors", "report.html"} <= {
        path.name for path in (work / "first").iterdir()
    }
