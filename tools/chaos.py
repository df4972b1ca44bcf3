"""Break a small run in every way at hand, resume it, and see that it ends in the very same numbers.

    python tools/chaos.py                  # 100 kills, then every fault once
    python tools/chaos.py --kills 5 --seed 3
    python tools/chaos.py --kills 0        # only the faults

A run is killed (SIGKILL) after a random share of the time that the unbroken run took, one in three again while it is
resumed; then it is resumed to its end. One that ended before its moment is no kill, and is run again. Metrics, front,
test error and the bytes of the network must be those of the unbroken run. The faults: Ctrl-C and SIGTERM, a checkpoint
cut short, one with a flipped bit, both checkpoints lost, a disk that is full, a folder that may not be written. Exit
status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
version: 1
name: chaos
device: cpu
threads: 1
data: {name: embedded_mnist, holdout: 1000, batch_size: 250}
model: {name: lenet_300_100}
curvature: {num_images: 256}
train:
  distill: 0.5
  pretrain: {epochs: 3}
  cycles: {count: 3, epochs: 2, max_epochs: 2, shrink: 0.5}
  finetune: {epochs: 3}
export: {onnx: false}
"""
FULL_AFTER = 300_000
"""Bytes that a file may have on the full disk: less than a checkpoint."""

Result = dict[str, Any]


class Broken(Exception):
    """A run did not do what it must; the argument says what it did instead."""


def start(folder: Path, *options: str, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """Start a run in a folder, or go on with one."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "sparsebayes", "run", str(folder.parent / "chaos.yaml"), *options]

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background of a shell ignores it
        if prepare is not None:
            prepare()

    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=before,  # noqa: PLW1509 - this program has one thread
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a run's end; what it said."""
    out, err = process.communicate(timeout=600)
    if process.returncode != expected or "Traceback" in err:
        raise Broken(f"exit status {process.returncode}, expected {expected}; it said: {(out + err)[-1500:]}")
    return out + err


def resume(folder: Path) -> str:
    """Go on with a broken run to its end, or begin it where nothing was written yet."""
    begun = (folder / "recipe.yaml").is_file()
    return finish(start(folder, *(("--resume", str(folder)) if begun else ("--out", str(folder)))))


def result(folder: Path) -> Result:
    """All that two equal runs have in common: everything but times."""
    report = json.loads((folder / "report.json").read_text())
    for times in ("wall_seconds", "work_seconds"):
        report.pop(times)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return {
        "report": report,
        "metrics": rows,
        "front": json.loads((folder / "pareto.json").read_text()),
        "network": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "selection": hashlib.sha256((folder / "selection.json").read_bytes()).hexdigest(),
    }


def compare(found: Result, expected: Result) -> None:
    """Raise `Broken` where two results differ."""
    for part, value in expected.items():
        if found[part] != value:
            raise Broken(f"{part} differs: {str(found[part])[:600]} instead of {str(value)[:600]}")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written a file."""
    end = time.monotonic() + 300
    while not path.is_file():
        if process.poll() is not None or time.monotonic() > end:
            raise Broken(f"{path.name} was never written; it said: {process.communicate()[1][-800:]}")
        time.sleep(0.01)


# --- kills


def kill_and_resume(folder: Path, seconds: float, chance: random.Random) -> str:
    """Kill a run once or twice at random moments, and resume it to its end; when it was killed."""
    moments: list[str] = []
    for again in (False, True):
        if again and chance.random() > 1 / 3:
            break
        moment = killed_at(folder, seconds, chance)
        while moment is None and not moments:  # it ended sooner than the unbroken one: that is no kill
            shutil.rmtree(folder)
            moment = killed_at(folder, seconds, chance)
        if moment is not None:
            moments.append(f"{moment:.2f} s")
    resume(folder)
    return " and ".join(moments)


def killed_at(folder: Path, seconds: float, chance: random.Random) -> float | None:
    """Start a run or go on with it, and kill it after a random share of so many seconds; None if it ended before."""
    begun = (folder / "recipe.yaml").is_file()
    process = start(folder, *(("--resume", str(folder)) if begun else ("--out", str(folder))))
    moment = chance.uniform(0, seconds)
    try:
        process.wait(moment)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return moment
    finally:
        process.communicate()


# --- faults


def interrupted(number: signal.Signals, status: int) -> Callable[[Path], None]:
    """A run that is told to end, and says how to go on."""

    def fault(folder: Path) -> None:
        process = start(folder, "--out", str(folder))
        wait_for(folder / "checkpoint.pt", process)
        process.send_signal(number)
        if "--resume" not in finish(process, status):
            raise Broken("it did not say how to resume")

    return fault


def damaged(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run that is killed, and whose checkpoints are damaged then."""

    def fault(folder: Path) -> None:
        process = start(folder, "--out", str(folder))
        wait_for(folder / "points" / "1" / "model.safetensors", process)
        wait_for(folder / "checkpoint.earlier.pt", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        damage(folder)

    return fault


def cut(folder: Path) -> None:
    """Cut the checkpoint in half."""
    path = folder / "checkpoint.pt"
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder: Path) -> None:
    """Flip a bit in the middle of the checkpoint."""
    path = folder / "checkpoint.pt"
    if path.is_file():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def lose(folder: Path) -> None:
    """Cut both checkpoints to nothing."""
    for path in folder.glob("checkpoint*.pt"):
        path.write_bytes(b"")


def full_disk(folder: Path) -> None:
    """No file may grow beyond some bytes: the error is that of a full disk or a quota."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AFTER, FULL_AFTER))

    said = finish(start(folder, "--out", str(folder), prepare=limit), 2)
    if "cannot write" not in said:
        raise Broken(f"it said: {said[-800:]}")


def read_only(folder: Path) -> None:
    """The folder of the runs may not be written. Root may write anywhere but where no files can be: in /proc."""
    closed = Path("/proc") if os.getuid() == 0 else folder.parent / "closed"
    if closed.name == "closed":
        closed.mkdir(mode=0o555)
    said = finish(start(folder, "--out", str(closed / "run")), 2)
    if "cannot write the run folder" not in said:
        raise Broken(f"it said: {said[-800:]}")


FAULTS: dict[str, Callable[[Path], None]] = {
    "Ctrl-C": interrupted(signal.SIGINT, 130),
    "SIGTERM": interrupted(signal.SIGTERM, 143),
    "checkpoint cut short": damaged(cut),
    "bit flipped in the checkpoint": damaged(flip),
    "all checkpoints lost": damaged(lose),
    "full disk": full_disk,
    "read-only folder": read_only,
}


def main() -> int:
    """Break runs and count what survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--fault", choices=FAULTS, help="only this fault, and no kills")
    arguments = parser.parse_args()
    chance, same = random.Random(arguments.seed), 0
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    failures = []
    try:
        (base / "chaos.yaml").write_text(RECIPE)
        begin = time.monotonic()
        finish(start(base / "whole", "--out", str(base / "whole")))
        seconds, expected = time.monotonic() - begin, result(base / "whole")
        print(f"unbroken: {seconds:.1f} s, network {expected['network'][:12]}", flush=True)
        attempts: list[tuple[str, Callable[[Path], str | None]]] = [
            (f"kill {number + 1}", lambda folder: kill_and_resume(folder, seconds, chance))
            for number in range(arguments.kills)
        ]
        attempts += [] if arguments.no_faults else list(FAULTS.items())
        if arguments.fault is not None:
            attempts = [(arguments.fault, FAULTS[arguments.fault])]
        for name, attempt in attempts:
            folder = base / "broken"
            try:
                words = attempt(folder)
                if words is None:
                    resume(folder)
                compare(result(folder), expected)
                same += 1
                print(f"{name}: the same{f' ({words})' if words else ''}", flush=True)
            except Broken as error:
                failures.append(name)
                print(f"{name}: {error}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{same} of {len(attempts)} ended in the numbers of the unbroken run")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
