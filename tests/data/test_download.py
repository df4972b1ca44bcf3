"""Downloads end soon and cleanly, whatever the network does; a server on this machine stands for it."""

from __future__ import annotations

import gzip
import http.server
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsebayes.data import download, load
from sparsebayes.errors import DataError

STEMS = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def idx_files() -> dict[str, bytes]:
    """Four small idx files: two training images, one test image."""
    return {
        STEMS[0]: struct.pack(">4I", 0x803, 2, 28, 28) + bytes(2 * 784),
        STEMS[1]: struct.pack(">2I", 0x801, 2) + bytes([3, 8]),
        STEMS[2]: struct.pack(">4I", 0x803, 1, 28, 28) + bytes(784),
        STEMS[3]: struct.pack(">2I", 0x801, 1) + bytes([5]),
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers every request with an empty success."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()
        thread.join()


def closed_address() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


def stand_in(
    monkeypatch: pytest.MonkeyPatch, mirrors: list[str], files: dict[str, bytes] | Exception
) -> list[float]:
    """Replace torchvision by one whose sets write `files`; returns the timeouts that they ran under."""
    timeouts = []

    def source(name: str) -> object:
        def fetch(root: str, *, download: bool) -> None:
            assert download
            timeouts.append(socket.getdefaulttimeout())
            if isinstance(files, Exception):
                raise files
            raw = Path(root, name, "raw")
            raw.mkdir(parents=True)
            for stem, content in files.items():
                (raw / stem).write_bytes(content)
                (raw / f"{stem}.gz").write_bytes(gzip.compress(content))

        fetch.mirrors = mirrors
        return fetch

    datasets = SimpleNamespace(MNIST=source("MNIST"), FashionMNIST=source("FashionMNIST"))
    monkeypatch.setattr(download, "import_torchvision", lambda: SimpleNamespace(datasets=datasets))
    return timeouts


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_an_absent_set_is_downloaded_once(
    name: str, folder: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = stand_in(monkeypatch, [closed_address(), server], idx_files())
    dataset = load(name, root=tmp_path / "new")
    assert dataset.name == name
    assert dataset.train.labels.tolist() == [3, 8]
    assert dataset.test.labels.tolist() == [5]
    raw = tmp_path / "new" / folder / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(STEMS)
    load(name, root=tmp_path / "new")
    assert timeouts == [download._STALL_TIMEOUT]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("mirrors", [[], ["http://"], ["nonsense"], ["http://name.invalid/"]])
def test_no_network_is_said_with_the_three_ways_out(
    mirrors: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, [closed_address(), *mirrors], idx_files())
    with pytest.raises(DataError) as caught:
        load("mnist", root=tmp_path)
    message = str(caught.value)
    assert f"mnist is not in {tmp_path / 'MNIST' / 'raw'}, and no server of MNIST answers" in message
    assert "data.root or $SPARSEBAYES_DATA" in message
    assert "embedded_mnist" in message
    assert "connect to the network once" in message
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stays_silent_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ANSWER_TIMEOUT", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        stand_in(monkeypatch, [f"http://127.0.0.1:{silent.getsockname()[1]}/"], idx_files())
        start = time.monotonic()
        with pytest.raises(DataError, match="no server of MNIST answers"):
            load("mnist", root=tmp_path)
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "error", [RuntimeError("File not found or corrupted."), OSError("reset"), TimeoutError()]
)
def test_a_broken_download_leaves_nothing(
    error: Exception, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, [server], error)
    with pytest.raises(DataError, match=rf"the download of MNIST failed \({type(error).__name__}: {error}\)"):
        load("mnist", root=tmp_path)
    assert list((tmp_path / "MNIST" / "raw").iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_root_that_is_a_file(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [server], idx_files())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the download of MNIST failed \(NotADirectoryError"):
        load("mnist", root=tmp_path / "file")


def test_torchvision_has_what_we_use() -> None:
    datasets = download.import_torchvision().datasets
    for name in ("MNIST", "FashionMNIST"):
        source = getattr(datasets, name)
        assert source.mirrors
        assert [file.removesuffix(".gz") for file, _ in source.resources] == STEMS


@pytest.mark.data
def test_torchvision_reads_the_same_mnist(data_root: Path) -> None:
    ours = load("mnist", root=data_root)
    for train, part in ((True, ours.train), (False, ours.test)):
        theirs = download.import_torchvision().datasets.MNIST(str(data_root), train=train)
        assert torch.equal(part.images.squeeze(1), theirs.data)
        assert torch.equal(part.labels, theirs.targets)
