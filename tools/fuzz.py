"""Damage what users can hand in, by the thousands, and see that each case ends in one sentence.

    python tools/fuzz.py                       # 10,000 cases over all subjects
    python tools/fuzz.py --cases 500 recipe    # 500 cases of one subject

Recipes, overrides, selections, genotypes, architectures, safetensors, data headers, tables of cells, run folders and
checkpoints are mutated by hypothesis: bytes flipped, inserted, cut off; values of JSON, YAML and tables replaced by
hostile ones. Each case must either
work or raise an error of this package whose text is one sentence, within some seconds and without a warning. Exit
status 1 if one does not; what was handed in is printed in its smallest form.
"""

from __future__ import annotations

import argparse
import gzip
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
from damage import bytes_like, json_like, overrides, table_like, yaml_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebayes.cli import main as program
from sparsebayes.data.cifar import Cifar, read_cifar
from sparsebayes.data.idx import read_images
from sparsebayes.errors import SparseBayesError
from sparsebayes.export import load_model, save_model
from sparsebayes.groups import make_grouping
from sparsebayes.models import build
from sparsebayes.nas import Genotype
from sparsebayes.nas.draw import draw_cell
from sparsebayes.nas.tabular import BenchTable, cell_of
from sparsebayes.prune import Selection, select
from sparsebayes.prune.architecture import architecture_of
from sparsebayes.prune.carry import Lineage
from sparsebayes.recipe import parse_recipe
from sparsebayes.recipe.shipped import read_text, shipped_recipes
from sparsebayes.train.checkpoint import read_checkpoint, write_checkpoint
from sparsebayes.train.folder import read_seconds, write_seconds
from sparsebayes.train.front import Point, read_front, write_front

__all__ = ["SUBJECTS", "Failure", "fuzz", "prepare"]

SECONDS = 20
"""Longer than this a case hangs."""


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


SUBJECTS = (
    "recipe", "search recipe", "override", "selection", "genotype", "architecture", "weights", "weights header",
    "lineage", "data header", "data batch", "table of cells", "front", "times", "run folder", "checkpoint",
)  # fmt: skip
CELLS = (
    "arch,c10_test_200,c100_test_200\n"
    "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|,93.5,71.25\n"
    "|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|,10.0,1.0\n"
)
EDGES = [
    [0, 1, ["nor_conv_3x3", "skip_connect"]],
    {"source": 0, "target": 2, "ops": ["skip_connect"]},
    [1, 2, ["skip_connect"]],
]
GENOTYPE: dict[str, Any] = {
    "version": 1,
    "space": {
        "name": "mine", "num_stages": 1, "reduction": "stride", "gates": True, "shared": False,
        "cells": [
            {"name": "cell", "num_inputs": 1, "num_nodes": 3, "output": "concat", "read": [1, 2], "keep": [[2, 1]],
             "edges": EDGES},
        ],
        "decision": {"one_op_per_edge": True, "top_k_edges": 2},
    },
    "cells": {"cell0": [[0, 1, "nor_conv_3x3"], [1, 2, "skip_connect"]]},
}  # fmt: skip
BATCHES = Cifar(
    name="fuzz", num_classes=2, label_bytes=1, label_key="labels", binary="", python="absent", train={"train": 2},
    test={"test": 2}, binary_md5={}, python_md5={}, archive_md5="",
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
    recipe, search = (read_text(shipped_recipes()[name]) for name in ("quickstart", "nas_proxy"))
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

    pairs = st.tuples(bytes_like(good["images"]), st.booleans())
    files = st.one_of(*(st.tuples(st.just(name), _damaged_file(name, good[name])) for name in RUN_FILES))
    return {
        "recipe": Subject(yaml_like(recipe), lambda text: _show(work / "fuzz.yaml", text)),
        "search recipe": Subject(yaml_like(search), lambda text: _show(work / "fuzz.yaml", text)),
        "override": Subject(overrides(), lambda changes: parse_recipe(recipe, "fuzz", overrides=changes)),
        "selection": Subject(json_like(json.loads(good["grouping.json"])), _read_selection),
        "genotype": Subject(json_like(json.loads(good["genotype.json"])), _read_genotype),
        "architecture": Subject(
            json_like(json.loads(good["architecture.json"])), with_file("architecture.json", load_model)
        ),
        "weights": Subject(bytes_like(weights), with_file("model.safetensors", load_model)),
        "weights header": Subject(
            json_like(header).map(header_of), with_file("model.safetensors", load_model)
        ),
        "lineage": Subject(
            bytes_like(good["lineage.safetensors"]),
            with_file("lineage.safetensors", lambda place: Lineage.load(place / "lineage.safetensors")),
        ),
        "data header": Subject(pairs, lambda case: _read_idx(work, good, *case)),
        "data batch": Subject(
            bytes_like(good["train.bin"]), with_file("train.bin", lambda place: read_cifar(place, BATCHES))
        ),
        "table of cells": Subject(
            table_like(CELLS), with_file("table.csv.gz", lambda place: _look_up(place / "table.csv.gz"))
        ),
        "times": Subject(
            json_like(json.loads(good["seconds.json"])), with_file("seconds.json", read_seconds)
        ),
        "front": Subject(
            json_like(json.loads(good["pareto.json"])),
            with_file("pareto.json", lambda place: read_front(place / "pareto.json")),
        ),
        "run folder": Subject(
            files, lambda case: with_file(case[0], lambda place: _call("report", str(place)))(case[1])
        ),
        "checkpoint": Subject(
            bytes_like(good["checkpoint.pt"]),
            with_file("checkpoint.pt", lambda place: read_checkpoint(place / "checkpoint.pt")),
        ),
    }


def _damaged_file(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    return json_like(json.loads(content)) if name.endswith(".json") else bytes_like(content)


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
    write_seconds(folder, {"pretrain": 1.5, "cycles": 20.0}, {"training": 18.5, "curvature": 1.0})
    (folder / "genotype.json").write_text(Genotype.from_dict(GENOTYPE).to_json())
    (folder / "table.csv.gz").write_bytes(gzip.compress(CELLS.encode()))
    for stem in ("train", "test"):
        (folder / f"{stem}.bin").write_bytes(b"".join(bytes([label]) + bytes(3072) for label in (0, 1)))
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


def _read_genotype(content: bytes) -> None:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    genotype = Genotype.from_json(text)
    for key in genotype.cells:
        draw_cell(genotype, key)
    Genotype.from_json(genotype.to_json())


def _look_up(path: Path) -> None:
    """Read a table and look a cell up that the good one has."""
    cell = CELLS.splitlines()[1].partition(",")[0]
    BenchTable.read(path).look_up(Genotype("nas_bench_201", {"normal": cell_of(cell)}))


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
