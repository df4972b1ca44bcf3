"""Data sets by name, and by the user's own function."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsebayes.data import SOURCES, load, sources
from sparsebayes.errors import DataError


def test_embedded_mnist_is_balanced_and_real() -> None:
    dataset = load("embedded_mnist")
    assert dataset.train.images.shape == (10_000, 1, 28, 28)
    assert dataset.test.images.shape == (2_000, 1, 28, 28)
    assert torch.bincount(dataset.train.labels).tolist() == [1000] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [200] * 10
    pixels = dataset.train.images.double() / 255
    assert float(pixels.mean()) == pytest.approx(dataset.mean[0], abs=0.002)
    assert float(pixels.std()) == pytest.approx(dataset.std[0], abs=0.002)
    assert (dataset.num_classes, dataset.train.labels.dtype) == (10, torch.int64)


def test_embedded_images_carry_their_labels() -> None:
    dataset = load("embedded_mnist")
    centres = torch.stack(
        [dataset.train.images[dataset.train.labels == k].double().mean(0) for k in range(10)]
    )
    distances = torch.cdist(dataset.test.images.double().flatten(1), centres.flatten(1))
    assert float((distances.argmin(1) == dataset.test.labels).double().mean()) > 0.75


def test_embedded_data_are_small() -> None:
    assert sum(path.stat().st_size for path in sources._EMBEDDED.iterdir()) < 8_000_000
    assert "CC BY-SA 3.0" in (sources._EMBEDDED / "PROVENANCE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cut", [0, 1000, 1_900_000])
def test_a_damaged_embedded_file_is_named(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (sources._EMBEDDED / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(content[:cut])
    monkeypatch.setattr(sources, "_EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"mnist\.npz is absent or damaged .*; install the package again"):
        load("embedded_mnist")


@pytest.mark.parametrize(
    "arrays", [{"train_images": np.zeros(3, np.uint8)}, {"train_images": np.array([{}])}]
)
def test_another_embedded_file_is_refused(
    arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "mnist.npz", **arrays)
    monkeypatch.setattr(sources, "_EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"mnist\.npz is absent or damaged"):
        load("embedded_mnist")


@pytest.mark.data
def test_full_mnist(data_root: Path) -> None:
    dataset = load("mnist", root=data_root)
    assert repr(dataset) == (
        "Dataset('mnist', train=Images(60,000 of 1x28x28, labels 0 to 9), "
        "test=Images(10,000 of 1x28x28, labels 0 to 9), 10 classes)"
    )
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    pixels = dataset.train.images.double() / 255
    assert float(pixels.mean()) == pytest.approx(dataset.mean[0], abs=5e-5)
    assert float(pixels.std()) == pytest.approx(dataset.std[0], abs=5e-5)


@pytest.mark.data
def test_the_embedded_sample_is_what_the_tool_makes(data_root: Path) -> None:
    path = Path(__file__).parents[2] / "tools" / "make_embedded_mnist.py"
    spec = importlib.util.spec_from_file_location("make_embedded_mnist", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    made = tool.sample(data_root)
    with np.load(sources._EMBEDDED / "mnist.npz", allow_pickle=False) as kept:
        assert sorted(made) == sorted(kept.files)
        for name, array in made.items():
            assert array.dtype == kept[name].dtype
            assert np.array_equal(array, kept[name])


@pytest.mark.data
def test_the_root_comes_from_the_environment_or_the_cache(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEBAYES_DATA", str(data_root))
    assert len(load("mnist").train) == 60_000
    monkeypatch.delenv("SPARSEBAYES_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw = tmp_path / "sparsebayes" / "MNIST" / "raw"
    shutil.copytree(data_root / "MNIST" / "raw", raw)
    assert len(load("mnist").train) == 60_000


def test_where_data_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEBAYES_DATA", "~/somewhere")
    assert sources.data_root() == Path.home() / "somewhere"
    monkeypatch.setenv("SPARSEBAYES_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert sources.data_root() == Path("/cache/sparsebayes")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.data_root() == Path.home() / ".cache" / "sparsebayes"


def test_a_function_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_images_for_this_test.py").write_text(
        "import torch\n"
        "from sparsebayes.data import Dataset, Images\n"
        "def mine():\n"
        "    images = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))\n"
        "    return Dataset('own', images, images, 4, (0.5,) * 3, (0.2,) * 3)\n"
        "def wrong():\n"
        "    return [1, 2]\n"
        "def fails():\n"
        "    raise OSError('disk on fire')\n"
        "def needs(size):\n"
        "    return mine()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("own_images_for_this_test:mine").name == "own"
    for name, text in {
        "wrong": r"must return a sparsebayes\.data\.Dataset, got list",
        "fails": r"failed with options \{\}: OSError: disk on fire",
        "needs": "missing a required argument: 'size'",
        "absent": "has no function or class 'absent'",
    }.items():
        with pytest.raises(DataError, match=text):
            load(f"own_images_for_this_test:{name}")


def test_unknown_names_and_modules() -> None:
    with pytest.raises(
        DataError, match=r"unknown data source 'minst'; did you mean 'mnist'\?.*, or your own as"
    ):
        load("minst")
    with pytest.raises(DataError, match="module 'no_such_module' cannot be imported"):
        load("no_such_module:f")
    assert set(SOURCES) >= {"mnist", "cifar10", "cifar100", "embedded_mnist", "embedded_cifar10", "shapes"}
