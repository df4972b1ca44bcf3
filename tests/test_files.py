"""Files that are whole or not there, and what is said when they cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsebayes.errors import RunError
from sparsebayes.files import append_line, copy_file, make_folder, write_atomically


def test_text_and_bytes_come_back_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\x00\r\n", keep=tmp_path / "before")
    assert path.read_bytes() == b"\x00\r\n"
    assert (tmp_path / "before").read_text(encoding="utf-8") == "größer\n"
    copy_file(path, tmp_path / "copy")
    append_line(tmp_path / "lines", "one")
    append_line(tmp_path / "lines", "two")
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "before", "copy", "file", "lines"]


def test_the_new_content_is_on_the_disk_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    seen = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        seen.append(path.read_text())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(path, "new", keep=tmp_path / "kept")
    assert seen == ["old"]
    assert (path.read_text(), (tmp_path / "kept").read_text()) == ("new", "old")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "absent" / "x", tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(RunError, match=f"cannot write {path}: "):
            write_atomically(path, "text")
    for path in (tmp_path / "absent" / "x", tmp_path / "folder"):
        with pytest.raises(RunError, match=f"cannot write {path}: "):
            append_line(path, "text")
    with pytest.raises(RunError, match=r"cannot write .*file: "):
        make_folder(tmp_path / "file")
    with pytest.raises(RunError, match="absent cannot be read: "):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
