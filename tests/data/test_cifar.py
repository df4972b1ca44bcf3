"""CIFAR from its binary and Python batches: read right, and every damaged or foreign file named."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparsebayes.data import cifar, download, load, sources
from sparsebayes.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from sparsebayes.errors import DataError


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tiny(full: Cifar, count: int) -> tuple[Cifar, dict[str, np.ndarray], dict[str, bytes]]:
    """A set like `full` with `count` images in each batch, its tables of bytes, and its binary batches."""
    random = np.random.default_rng(0)
    tables = {}
    for stem in (*full.train, *full.test):
        rows = random.integers(0, 256, (count, full.label_bytes + 3072), dtype=np.uint8)
        rows[:, 0] %= 20
        rows[:, full.label_bytes - 1] = np.arange(count) % full.num_classes
        tables[stem] = rows
    files = {stem: rows.tobytes() for stem, rows in tables.items()}
    small = dataclasses.replace(
        full,
        train=dict.fromkeys(full.train, count),
        test=dict.fromkeys(full.test, count),
        binary_md5={stem: md5(content) for stem, content in files.items()} if full.binary_md5 else {},
    )
    return small, tables, files


def write(folder: Path, files: dict[str, bytes], suffix: str = ".bin") -> None:
    folder.mkdir(parents=True)
    for stem, content in files.items():
        (folder / f"{stem}{suffix}").write_bytes(content)


@pytest.mark.parametrize("full", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_binary_batches_are_read_plane_by_plane(full: Cifar, tmp_path: Path) -> None:
    count = full.num_classes
    small, tables, files = tiny(full, count)
    write(tmp_path / full.binary, files)
    parts = read_cifar(tmp_path, small)
    assert parts is not None
    train, test = parts
    assert train.images.shape == (len(full.train) * count, 3, 32, 32)
    last = tables[list(full.train)[-1]][-1]
    for channel, row, column in ((0, 0, 0), (1, 0, 5), (2, 31, 31)):
        byte = full.label_bytes + 1024 * channel + 32 * row + column
        assert int(train.images[-1, channel, row, column]) == int(last[byte])
    assert test.labels.tolist() == list(range(count))


def python_batch(rows: np.ndarray, full: Cifar) -> bytes:
    """What Python 2 wrote: protocol 2, byte strings, and the module names of the NumPy of that time."""
    labels = rows[:, full.label_bytes - 1].astype(int).tolist()
    batch = {"batch_label": "some batch", full.label_key: labels, "data": rows[:, full.label_bytes :].copy()}
    content = pickle.dumps(batch, protocol=2)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("full", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_python_batches_hold_the_same_images(
    full: Cifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, tables, files = tiny(full, full.num_classes)
    write(tmp_path / "a" / full.binary, files)
    batches = {stem: python_batch(rows, full) for stem, rows in tables.items()}
    small = dataclasses.replace(small, python_md5={stem: md5(b) for stem, b in batches.items()})
    write(tmp_path / "b" / full.python, batches, suffix="")
    allow_encode(monkeypatch)
    binary, python = read_cifar(tmp_path / "a", small), read_cifar(tmp_path / "b", small)
    assert binary is not None
    assert python is not None
    for first, second in zip(binary, python, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


def allow_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3 writes byte strings of protocol 2 through `_codecs.encode`, which the real batches do not need."""
    known = cifar._ArrayReader.find_class

    def find(self: Any, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        return known(self, module, name)

    monkeypatch.setattr(cifar._ArrayReader, "find_class", find)


def test_the_published_sums_are_torchvisions() -> None:
    datasets = download.import_torchvision().datasets
    for ours, theirs in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        assert dict(ours.python_md5) == dict([*theirs.train_list, *theirs.test_list])
        assert ours.python == theirs.base_folder
        assert ours.url == theirs.url.replace("python", "binary")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise AssertionError('the pickle was run')",)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    small, _, _ = tiny(CIFAR10, 10)
    bomb = pickle.dumps({"data": Bomb(), "labels": []}, protocol=2)
    write(tmp_path / small.python, dict.fromkeys((*small.train, *small.test), bomb), suffix="")
    with pytest.raises(DataError, match=r"data_batch_1 is damaged: expected MD5 sum c99cafc1"):
        read_cifar(tmp_path, small)
    trusted = dataclasses.replace(small, python_md5=dict.fromkeys(small.python_md5, md5(bomb)))
    with pytest.raises(DataError, match=r"a batch of CIFAR needs no \w*builtin\w*\.exec"):
        read_cifar(tmp_path, trusted)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b[:-1], r"data_batch_3\.bin is damaged: expected 30,730 bytes, got only 30,729"),
        (lambda b: b"", r"data_batch_3\.bin is damaged: expected 30,730 bytes, got only 0"),
        (lambda b: b + b"x", r"expected 30,730 bytes, got 30,731; delete it and get it again"),
        (lambda b: bytes([b[0] ^ 1]) + b[1:], r"data_batch_3\.bin is damaged: expected MD5 sum"),
    ],
)
def test_a_damaged_batch_is_named(change: Any, text: str, tmp_path: Path) -> None:
    small, _, files = tiny(CIFAR10, 10)
    write(tmp_path / small.binary, files | {"data_batch_3": change(files["data_batch_3"])})
    with pytest.raises(DataError, match=text):
        read_cifar(tmp_path, small)


@pytest.mark.parametrize(
    ("label", "text"),
    [(100, "expected labels below 100, got 100"), (5, "expected as many images of each class, got 0 to 2")],
)
def test_cifar100_without_a_published_sum_is_counted(label: int, text: str, tmp_path: Path) -> None:
    small, tables, files = tiny(CIFAR100, 100)
    tables["train"][7, 1] = label
    write(tmp_path / small.binary, files | {"train": tables["train"].tobytes()})
    with pytest.raises(DataError, match=text):
        read_cifar(tmp_path, small)


def test_an_incomplete_folder_counts_as_none(tmp_path: Path) -> None:
    small, _, files = tiny(CIFAR10, 10)
    write(tmp_path / small.binary, {stem: b for stem, b in files.items() if stem != "test_batch"})
    assert read_cifar(tmp_path, small) is None


def archive(small: Cifar, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for stem, content in files.items():
            member = tarfile.TarInfo(f"{small.binary}/{stem}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def downloads(monkeypatch: pytest.MonkeyPatch, small: Cifar, content: bytes | Exception) -> None:
    """Let the server answer with `content`, and make `cifar10` the small set."""

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        if isinstance(content, Exception):
            raise content
        assert (url, md5) == (CIFAR10.url, CIFAR10.archive_md5)
        Path(root, filename).write_bytes(content)

    utils = SimpleNamespace(download_url=fetch)
    datasets = SimpleNamespace(datasets=SimpleNamespace(utils=utils))
    monkeypatch.setattr(download, "import_torchvision", lambda: datasets)
    monkeypatch.setattr(download, "_any_answers", lambda urls: True)
    monkeypatch.setitem(sources.SOURCES["cifar10"].keywords, "cifar", small)


def test_an_absent_set_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _, files = tiny(CIFAR10, 10)
    downloads(monkeypatch, small, archive(small, files))
    dataset = load("cifar10", root=tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (50, 10)
    assert sorted(path.name for path in (tmp_path / small.binary).iterdir()) == sorted(small.files)
    downloads(monkeypatch, small, RuntimeError("asked again"))
    assert torch.equal(load("cifar10", root=tmp_path).train.images, dataset.train.images)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (OSError("reset"), r"the download of cifar-10-binary\.tar\.gz failed \(OSError: reset\)"),
        (b"no archive", r"the download of cifar-10-binary\.tar\.gz failed \(ReadError"),
        (None, r"failed \(KeyError"),
    ],
)
def test_a_broken_download_leaves_nothing(
    content: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _, files = tiny(CIFAR10, 10)
    files.pop("test_batch")
    downloads(monkeypatch, small, archive(small, files) if content is None else content)
    with pytest.raises(DataError, match=text) as caught:
        load("cifar10", root=tmp_path)
    for way in ("$SPARSEBAYES_DATA", "data.name=embedded_cifar10", "connect to the network once"):
        assert way in str(caught.value)
    assert list((tmp_path / small.binary).iterdir()) == []


def test_embedded_cifar10_is_balanced_and_real() -> None:
    dataset = load("embedded_cifar10")
    assert dataset.train.images.shape == (2_300, 3, 32, 32)
    assert dataset.test.images.shape == (500, 3, 32, 32)
    assert torch.bincount(dataset.train.labels).tolist() == [230] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [50] * 10
    pixels = dataset.train.images.double() / 255
    for channel in range(3):
        assert float(pixels[:, channel].mean()) == pytest.approx(dataset.mean[channel], abs=0.01)
        assert float(pixels[:, channel].std()) == pytest.approx(dataset.std[channel], abs=0.01)
    assert "2,300 of the 50,000" in (sources._EMBEDDED / "PROVENANCE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cut", [0, 1000, 4_000_000])
def test_a_damaged_embedded_file_is_named(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (sources._EMBEDDED / "cifar10.npz").read_bytes()
    (tmp_path / "cifar10.npz").write_bytes(content[:cut])
    monkeypatch.setattr(sources, "_EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"cifar10\.npz is absent or damaged .*; install the package again"):
        load("embedded_cifar10")


def test_another_picture_in_the_embedded_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "cifar10.npz", train_webp=np.zeros(9, np.uint8), train_labels=np.zeros(9, np.uint8))
    monkeypatch.setattr(sources, "_EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"cifar10\.npz is absent or damaged"):
        load("embedded_cifar10")


@pytest.mark.data
def test_full_cifar10(data_root: Path) -> None:
    if not (data_root / CIFAR10.binary).is_dir():
        pytest.skip("needs the binary version of CIFAR-10 under $SPARSEBAYES_DATA")
    dataset = load("cifar10", root=data_root)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert dataset.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    pixels = dataset.train.images.double() / 255
    for channel in range(3):
        assert float(pixels[:, channel].mean()) == pytest.approx(dataset.mean[channel], abs=5e-5)
        assert float(pixels[:, channel].std()) == pytest.approx(dataset.std[channel], abs=1e-4)
    path = Path(__file__).parents[2] / "tools" / "make_embedded_cifar10.py"
    spec = importlib.util.spec_from_file_location("make_embedded_cifar10", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    kept = load("embedded_cifar10")
    made = tool.sample(data_root)
    for part, images in (("train", kept.train), ("test", kept.test)):
        assert torch.equal(made[part].images, images.images)
        assert torch.equal(made[part].labels, images.labels)
