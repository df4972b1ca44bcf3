"""The lock of a run folder: one holder, gone with its process, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsebayes.errors import RunError
from sparsebayes.train.lock import LOCK_FILE, locked, refuse_running

HOLD = """
import sys, time
from pathlib import Path
from sparsebayes.train.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with locked(tmp_path):
        for _ in range(2):
            with pytest.raises(
                RunError, match=rf"is being worked on by process {os.getpid()} of .*; wait for it"
            ):
                refuse_running(tmp_path)
    refuse_running(tmp_path)
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"process {holder.pid} of"):
            refuse_running(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / LOCK_FILE).is_file()
    with locked(tmp_path):
        assert f"process {os.getpid()} of" in (tmp_path / LOCK_FILE).read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_error_releases_it_and_a_deleted_folder_is_no_error(tmp_path: Path) -> None:
    for error in (ValueError("mine"), FileNotFoundError("mine")):
        with pytest.raises(type(error), match="mine"), locked(tmp_path):
            raise error
    with locked(tmp_path):
        (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(RunError, match="cannot write"), locked(tmp_path / "absent"):
        pass
