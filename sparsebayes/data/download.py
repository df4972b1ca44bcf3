"""Getting the public data sets through torchvision, without ever hanging where there is no network."""

from __future__ import annotations

import shutil
import socket
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from sparsebayes.errors import DataError
from sparsebayes.torchvision_compat import import_torchvision

__all__ = ["download_archive", "download_idx"]

# Seconds for a server to answer at all, and for one to go silent in the middle of a file.
_ANSWER_TIMEOUT = 8.0
_STALL_TIMEOUT = 30.0


def download_idx(class_name: str, raw: Path, stems: Sequence[str]) -> None:
    """Download the files of one of torchvision's MNIST-like classes.

    The files appear under `raw` complete or not at all: they are fetched beside it, checked by torchvision
    against their published MD5 sums, and moved.

    Args:
        class_name: "MNIST" or "FashionMNIST": the class in `torchvision.datasets`.
        raw: folder to put the unpacked files in; created if need be.
        stems: their names, without ".gz".

    Raises:
        DataError: no server answers, the download fails, or `raw` cannot be written.
    """
    source = getattr(import_torchvision().datasets, class_name)
    if not _any_answers([f"{mirror}{stems[0]}.gz" for mirror in source.mirrors]):
        raise DataError(f"no server of {class_name} answers")
    timeout = socket.getdefaulttimeout()
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=raw) as scratch:
            socket.setdefaulttimeout(_STALL_TIMEOUT)  # torchvision opens its connections without one
            source(scratch, download=True)
            for stem in stems:
                shutil.move(Path(scratch, class_name, "raw", stem), raw / stem)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download of {class_name} failed ({type(error).__name__}: {error})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def download_archive(url: str, md5: str, folder: Path, files: Sequence[str]) -> None:
    """Download a tar archive and take some files out of it.

    They appear in `folder` complete or not at all: the archive is fetched beside it and checked against its MD5 sum.

    Args:
        url: of the archive.
        md5: its published MD5 sum.
        folder: where to put the files; created if need be. The archive holds them in a folder of the same name.
        files: their names.

    Raises:
        DataError: the server does not answer, the download fails, or `folder` cannot be written.
    """
    name = url.rpartition("/")[2]
    if not _any_answers([url]):
        raise DataError("its server does not answer")
    fetch = import_torchvision().datasets.utils.download_url
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
            socket.setdefaulttimeout(_STALL_TIMEOUT)  # torchvision opens its connections without one
            fetch(url, scratch, filename=name, md5=md5)
            with tarfile.open(Path(scratch, name)) as archive:
                for file in files:
                    # Read, not extracted: a member cannot choose where it is written.
                    content = archive.extractfile(f"{folder.name}/{file}")
                    if content is None:
                        raise DataError(f"{name} holds no file {file}")
                    with content, Path(scratch, file).open("wb") as target:
                        shutil.copyfileobj(content, target)
            for file in files:
                shutil.move(Path(scratch, file), folder / file)
    except (OSError, RuntimeError, KeyError, tarfile.TarError) as error:
        raise DataError(f"the download of {name} failed ({type(error).__name__}: {error})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _any_answers(urls: Sequence[str]) -> bool:
    """Whether one of the servers answers in time.

    Each is asked in a daemon thread: a name look-up knows no timeout, and must hold up neither this call nor
    the end of the program.
    """
    answered = threading.Event()
    threads = [threading.Thread(target=_ask, args=(url, answered), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for _ in range(round(_ANSWER_TIMEOUT * 10)):
        if answered.wait(0.1):
            return True
        if not any(thread.is_alive() for thread in threads):
            break
    return answered.is_set()


def _ask(url: str, answered: threading.Event) -> None:
    """Set `answered` if the server of `url` answers anything that is not an error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_TIMEOUT):
            answered.set()
    except (OSError, ValueError):  # urllib's errors are OSErrors; a malformed proxy setting is a ValueError
        return
