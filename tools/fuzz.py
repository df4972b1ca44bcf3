"""Damage what users can hand in, by the thousands, and see that each case ends in one sentence.

    python tools/fuzz.py                       # 10,000 cases over all subjects
    python tools/fuzz.py --cases 500 recipe    # 500 cases of one subject

Recipes, overrides, selections, architectures, safetensors, data headers, run folders and checkpoints are mutated by
hypothesis: bytes flipped, inserted, cut off; values of JSON and YAML replaced by hostile ones. Each case must either
work or raise an error of this package whose text is one sentence, within some seconds and without a warning. Exit
status 1 if one does not; what was handed in is printed in its smallest form.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebayes.cli import main as program
from sparsebayes.data.idx import read_images
from sparsebayes.errors import SparseBayesError
from sparsebayes.export import load_model, save_model
from sparsebayes.groups import make_grouping
from sparsebayes.models import build
from sparsebayes.prune import Selection, select
from sparsebayes.prune.architecture import architecture_of
from sparsebayes.prune.carry import Lineage
from sparsebayes.recipe import parse_recipe
from sparsebayes.recipe.reference import dotted_keys
from sparsebayes.recipe.shipped import read_text, shipped_recipes
from sparsebayes.train.checkpoint import read_checkpoint, write_checkpoint
from sparsebayes.train.front import Point, read_front, write_front

__all__ = ["SUBJECTS", "Failure", "fuzz", "prepare"]

SECONDS = 20
"""Longer than this a case hangs."""
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**30, -(10**18), 0.5, -1e308, 1e308, "", " ", "a", "A" * 5000, "../../x", "/",
    "nan", "1e5", "x:y", "no.such.module:thing", "\x00", "\u202e", "ä" * 50, [], [[]], {}, [None], [0], ["", ""],
    {"a": 1}, {"": None}, [[[[[[[[[[]]]]]]]]]], "2:4", "units", "off", "~", "*", "[", "{}", "!!python/object:x",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it must."""

    subject: str
    handed_in: str
    outcome: str


@dataclass(frozen=True)
class Subject:
    """Something that users hand in.

    Attributes:
        cases: what may be handed in.
        use: uses a case; returns, or raises an error of the package.
    """

    cases: st.SearchStrategy[Any]
    use: Callable[[Any], object]


def fuzz(name: str, subject: Subject, cases: int) -> list[Failure]:
    """Run cases of one subject.

    Args:
        name: the subject's name.
        subject: what is handed in.
        cases: how many.

    Returns:
        Nothing, or the smallest case that fails.
    """
    last: list[Failure] = []

    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(subject.cases)
    def check(case: Any) -> None:
        outcome = _outcome(subject, case)
        if outcome:
            last[:] = [Failure(name, repr(case)[:2000], outcome)]
            raise AssertionError(outcome)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hypothesis on the length of what it would print
            check()
    except AssertionError:
        return last
    return []


def _outcome(subject: Subject, case: Any) -> str:
    """What is wrong with how a case ends; empty if nothing is."""
    try:
        with _patience(), warnings.catch_warnings():
            warnings.simplefilter("error")
            subject.use(case)
    except SparseBayesError as error:
        return _no_sentence(str(error))
    except Exception as error:  # whatever comes through is what is looked for
        return f"{type(error).__name__}: {str(error)[:500]}"
    return ""


def _no_sentence(text: str) -> str:
    """What is wrong with an error's text."""
    lines = text.splitlines()
    if not text.strip():
        return "an empty message"
    if len(lines) > 1 and " mistakes" not in lines[0]:
        return f"a message of {len(lines)} lines: {text[:500]!r}"
    if "Traceback" in text or len(text) > 60_000:
        return f"not a sentence: {text[:500]!r}"
    if not text.isprintable() and any(not line.isprintable() for line in lines):
        return f"unprintable characters: {text[:300]!r}"
    return ""


@contextmanager
def _patience() -> Iterator[None]:
    """Raise `TimeoutError` when a case takes too long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- what is handed in


def _bytes_like(content: bytes) -> st.SearchStrategy[bytes]:
    """Damaged copies of some bytes."""
    edit = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "zero"]),
        st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(64, max(len(content) - 1, 0))),
        st.binary(min_size=1, max_size=16),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edit(content, edits))


def _edit(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, payload in edits:
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ (payload[0] or 1)]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + payload + content[place:]
        elif kind == "repeat":
            content += content[place:]
        elif kind == "zero":
            content = content[:place] + bytes(len(payload)) + content[place + len(payload) :]
    return content


def _json_like(document: Any) -> st.SearchStrategy[bytes]:
    """Documents with values replaced, removed or added, now and then also damaged as text."""
    places = list(_places(document))
    change = st.tuples(
        st.sampled_from(places), st.sampled_from(["replace", "remove", "add"]), st.sampled_from(HOSTILE)
    )
    changed = st.lists(change, min_size=1, max_size=3).map(lambda changes: _change(document, changes))
    plain = json.dumps(document).encode()
    return changed | _bytes_like(plain)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _change(document: Any, changes: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
    document = copy.deepcopy(document)
    for path, kind, value in changes:
        if not path:
            document = value if kind == "replace" else document
            continue
        inner = document
        try:
            for key in path[:-1]:
                inner = inner[key]
            if kind == "replace":
                inner[path[-1]] = value
            elif kind == "remove":
                del inner[path[-1]]
            elif isinstance(inner, dict):
                inner["added"] = value
            elif isinstance(inner, list):
                inner.append(value)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return json.dumps(document).encode()


def _yaml_like(text: str) -> st.SearchStrategy[bytes]:
    """A recipe with lines changed, moved, repeated or indented otherwise, now and then damaged as bytes."""
    lines = text.splitlines()
    edit = st.tuples(
        st.sampled_from(["value", "delete", "repeat", "indent", "key"]),
        st.integers(0, len(lines) - 1),
        st.sampled_from(HOSTILE),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edit_lines(lines, edits)) | _bytes_like(
        text.encode()
    )


def _edit_lines(lines: list[str], edits: list[tuple[str, int, Any]]) -> bytes:
    lines = list(lines)
    for kind, number, value in edits:
        if number >= len(lines):
            continue
        line, shown = lines[number], value if isinstance(value, str) else json.dumps(value)
        if kind == "value":
            lines[number] = f"{line.partition(':')[0]}: {shown}"
        elif kind == "key":
            lines[number] = f"{shown}:{line.partition(':')[2]}"
        elif kind == "indent":
            lines[number] = "   " + line
        elif kind == "repeat":
            lines.insert(number, line)
        else:
            del lines[number]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _overrides() -> st.SearchStrategy[list[str]]:
    key = (
        st.sampled_from(dotted_keys())
        | st.text(max_size=12)
        | st.sampled_from(["groups", "presets", "train", "a.b"])
    )
    value = st.sampled_from([v if isinstance(v, str) else json.dumps(v) for v in HOSTILE]) | st.text(
        max_size=20
    )
    return st.lists(st.builds("{}={}".format, key, value) | st.text(max_size=15), min_size=1, max_size=3)


# --- what is done with it


SUBJECTS = (
    "recipe", "override", "selection", "architecture", "weights", "weights header", "lineage", "data header", "front",
    "run folder", "checkpoint",
)  # fmt: skip
RUN_FILES = (
    "report.json",
    "metrics.jsonl",
    "evidence.json",
    "selection.json",
    "environment.json",
    "recipe.yaml",
)


def prepare(folder: Path) -> dict[str, Subject]:
    """Write one good example of everything, and say how copies of it are damaged and used.

    Args:
        folder: an empty folder.

    Returns:
        The subjects by name.
    """
    good = _write_good(folder / "good")
    recipe = read_text(shipped_recipes()["quickstart"])
    work = folder / "work"
    shutil.copytree(folder / "good", work)

    def with_file(name: str, use: Callable[[Path], object]) -> Callable[[bytes], object]:
        """Use a folder of which one file is damaged."""

        def run(content: bytes) -> object:
            (work / name).write_bytes(content)
            try:
                return use(work)
            finally:
                (work / name).write_bytes(good[name])

        return run

    weights = good["model.safetensors"]
    (size,) = struct.unpack("<Q", weights[:8])
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]

    def header_of(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content + body

    pairs = st.tuples(_bytes_like(good["images"]), st.booleans())
    files = st.one_of(*(st.tuples(st.just(name), _damaged_file(name, good[name])) for name in RUN_FILES))
    return {
        "recipe": Subject(_yaml_like(recipe), lambda text: _show(work / "fuzz.yaml", text)),
        "override": Subject(_overrides(), lambda changes: parse_recipe(recipe, "fuzz", overrides=changes)),
        "selection": Subject(_json_like(json.loads(good["grouping.json"])), _read_selection),
        "architecture": Subject(
            _json_like(json.loads(good["architecture.json"])), with_file("architecture.json", load_model)
        ),
        "weights": Subject(_bytes_like(weights), with_file("model.safetensors", load_model)),
        "weights header": Subject(
            _json_like(header).map(header_of), with_file("model.safetensors", load_model)
        ),
        "lineage": Subject(
            _bytes_like(good["lineage.safetensors"]),
            with_file("lineage.safetensors", lambda place: Lineage.load(place / "lineage.safetensors")),
        ),
        "data header": Subject(pairs, lambda case: _read_idx(work, good, *case)),
        "front": Subject(
            _json_like(json.loads(good["pareto.json"])),
            with_file("pareto.json", lambda place: read_front(place / "pareto.json")),
        ),
        "run folder": Subject(
            files, lambda case: with_file(case[0], lambda place: _call("report", str(place)))(case[1])
        ),
        "checkpoint": Subject(
            _bytes_like(good["checkpoint.pt"]),
            with_file("checkpoint.pt", lambda place: read_checkpoint(place / "checkpoint.pt")),
        ),
    }


def _damaged_file(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    return _json_like(json.loads(content)) if name.endswith(".json") else _bytes_like(content)


def _write_good(folder: Path) -> dict[str, bytes]:
    """A small network, a selection, data and a run's records, all valid."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("lenet5_caffe")
    options: dict[str, Any] = {}
    save_model(folder, model, architecture_of(model, builder="lenet5_caffe", options=options))
    grouping = make_grouping(model, "filters")
    scores = torch.arange(grouping.num_groups, dtype=torch.float64)
    selection = select(grouping, scores, threshold=20.0, strength=2.0)
    (folder / "grouping.json").write_text(selection.to_json())
    Lineage(torch.ones(grouping.num_groups, dtype=torch.bool)).save(folder / "lineage.safetensors")
    write_front(
        folder / "pareto.json", [Point(0, 100, 900, 0.1, 0.01, 0.02, widths={"conv1": 20}, chosen=True)]
    )
    write_checkpoint(
        folder / "checkpoint.pt", {"phase": "cycle 1", "state": {"epoch": 1, "model": {"w": torch.ones(3)}}}
    )
    (folder / "images").write_bytes(struct.pack(">4I", 0x803, 2, 3, 3) + bytes(range(18)))
    (folder / "labels").write_bytes(struct.pack(">2I", 0x801, 2) + bytes([3, 7]))
    figures = {"test_error": 0.1, "params": 100, "macs": 900, "onnx_bytes": 10, "latency_ms_batch1": 0.1}
    figures["latency_ms_batch64"] = 1.0
    records: dict[str, Any] = {
        "report.json": {
            "name": "fuzz", "task": "compress", "dense": figures, "compact": figures, "widths": {"conv1": [20, 5]},
            "seed": 0, "wall_seconds": {"cycles": 1.0}, "versions": {"torch": "2"}, "refused": ["one"],
            "budget": {"params": 0.1, "met": False},
        },
        "evidence.json": {"evidence": [0.5, 2.0, 0.0], "gamma": [0.0, 0.5, 0.1]},
        "selection.json": json.loads(selection.to_json()),
        "environment.json": {"threads": 1, "versions": {"torch": "2"}},
    }  # fmt: skip
    for name, content in records.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text('{"phase": "cycle", "cycle": 1, "epoch": 1, "train_loss": 0.5}\n')
    (folder / "recipe.yaml").write_text("version: 1\nname: fuzz\nprune: {score: evidence}\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _call(*arguments: str) -> None:
    """Run a command; raises what it must not do, and the error of the package that it ended in."""
    result = CliRunner().invoke(program, arguments, prog_name="sparsebayes")
    if result.exit_code == 0:
        return
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code != 2 or not result.stderr.startswith("error: "):
        raise AssertionError(f"exit status {result.exit_code}: {result.output[:500]}")
    raise SparseBayesError(result.stderr.removeprefix("error: ").rstrip("\n"))


def _show(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _call("show", str(path))


def _read_selection(content: bytes) -> None:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    selection = Selection.from_json(text)
    selection.counts()
    Selection.from_json(selection.to_json())


def _read_idx(work: Path, good: dict[str, bytes], content: bytes, swap: bool) -> None:
    """Read damaged images with good labels, or the other way round."""
    images, labels = (good["images"], content) if swap else (content, good["labels"])
    (work / "images").write_bytes(images)
    (work / "labels").write_bytes(labels)
    read_images(work / "images", work / "labels")


def main() -> int:
    """Fuzz and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], default=[], help="default: all")
    parser.add_argument("--cases", type=int, default=10_000, help="over all subjects")
    arguments = parser.parse_args()
    names = arguments.subjects or list(SUBJECTS)
    each = -(-arguments.cases // len(names))
    failures: list[Failure] = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = prepare(Path(folder))
        for name in names:
            found = fuzz(name, subjects[name], each)
            failures += found
            print(f"{name}: {each:,} cases, {'FAILED' if found else 'clean'}", flush=True)
    for failure in failures:
        print(f"\n{failure.subject}: {failure.outcome}\n  handed in: {failure.handed_in}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
