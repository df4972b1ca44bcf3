"""Whole runs on a tiny task of the user's own: the folder, the front, resuming, exports, and bad input."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnxruntime
import pytest
import torch

import sparsebayes
from sparsebayes.errors import DataError, ModelError, NumericsError, RecipeError, RunError
from sparsebayes.groups import UnitGraph, trace_units
from sparsebayes.prune import Selection
from sparsebayes.recipe import Recipe, dump_recipe, parse_recipe
from sparsebayes.report import read_report
from sparsebayes.train import compress, measuring, phase_checkpoints, removal, run
from sparsebayes.train.export import export_point, quantize_export
from sparsebayes.train.fit import Phase
from sparsebayes.train.folder import (
    is_finished,
    mend_lines_,
    open_folder,
    read_seconds,
    recorded_recipe,
    settle_lines_,
)
from sparsebayes.train.front import read_front
from sparsebayes.train.interrupt import terminable
from sparsebayes.train.lock import locked
from sparsebayes.train.run import run_recipe

USER_CODE = """
def bad_labels():
    train = corners(0, 300)
    return Dataset("bad", Images(train.images, train.labels + 2), corners(1, 120), 5, (0.3,), (0.3,))

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.hidden = nn.Linear(width * 16, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.out(torch.relu(self.hidden(torch.flatten(x, 1))))

class Untrainable(Net):
    def forward(self, x):
        if self.training:
            raise ValueError("no such thing")
        return super().forward(x)

class Pair(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class Wide(Net):
    def forward(self, x):
        return super().forward(x.unsqueeze(0))
"""

RECIPE = """
version: 1
name: corners
data: {name: "tiny_task:data", holdout: 60, batch_size: 24}
model: {name: "tiny_task:Net", options: {width: 8}}
groups: [units, features]
curvature: {num_images: 120}
train:
  pretrain: {epochs: 4}
  cycles: {count: 4, epochs: 2, shrink: 0.4}
  finetune: {epochs: 2}
export: {legacy: true}
evaluate: {latency: false}
"""


@pytest.fixture(autouse=True)
def _user_code(corners_module: Callable[[str, str], None]) -> None:
    """A module of the user's, importable from the folder where the user works."""
    corners_module("tiny_task", USER_CODE)


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "corners.yaml", overrides=overrides)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(sparsebayes.load(folder).state_dict())


def test_a_run_leaves_a_smaller_network_and_its_files() -> None:
    folder = run_recipe(recipe(), out=Path("run"), quiet=True)
    report = report_of(folder)
    assert report["compact"]["params"] < 0.8 * report["dense"]["params"]
    assert report["compact"]["test_error"] < 0.05
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "pareto.json",
        "selection.json",
        "model.onnx",
        "dense.onnx",
        "report.md",
        "report.html",
        "environment.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    model = sparsebayes.load(folder)
    assert sum(p.numel() for p in model.parameters()) == report["compact"]["params"]
    selection = Selection.from_json((folder / "selection.json").read_text())
    assert selection.counts()["hidden"] == (report["widths"]["hidden"][1], 24)
    points = read_front(folder / "pareto.json")
    assert len({p.params for p in points}) == len(points) > 2
    assert [p.params for p in points] == sorted((p.params for p in points), reverse=True)
    assert report["widths"]["hidden"][1] < report["widths"]["hidden"][0] == 24


def test_a_run_says_where_its_time_went() -> None:
    folder = run_recipe(recipe("export.onnx=false"), out=Path("run"), quiet=True)
    report = report_of(folder)
    work, total = report["work_seconds"], sum(report["wall_seconds"].values())
    assert sorted(work) == ["compaction", "curvature", "evaluation", "export", "training", "update"]
    assert all(seconds > 0 for seconds in work.values())
    assert sum(work.values()) <= total + 0.01
    share = read_report(folder).removal_share
    assert share == pytest.approx((work["curvature"] + work["update"] + work["compaction"]) / total)
    (folder / "report.json").unlink()
    run_recipe(recipe("export.onnx=false"), resume=folder, quiet=True)
    resumed = report_of(folder)["work_seconds"]  # nothing was left to do but to export
    assert {**resumed, "export": 0} == {**work, "export": 0}


def test_the_dense_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def trace(model: torch.nn.Module, example: torch.Tensor) -> UnitGraph:
        traced.append(sum(parameter.numel() for parameter in model.parameters()))
        return trace_units(model, example)

    monkeypatch.setattr(removal, "trace_units", trace)
    folder = run_recipe(recipe("export.onnx=false", "train.cycles.count=2"), out=Path("run"), quiet=True)
    assert traced == [report_of(folder)["dense"]["params"]]


def test_same_recipe_same_numbers() -> None:
    first = run_recipe(recipe("export.onnx=false"), out=Path("one"), quiet=True)
    second = run_recipe(recipe("export.onnx=false"), out=Path("two"), quiet=True)
    assert read_front(first / "pareto.json") == read_front(second / "pareto.json")
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.parametrize("stop", [2, 7, 9, 13])
def test_interrupted_and_resumed_run_ends_in_the_same_numbers(
    stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after `stop` epochs: in pre-training, in two cycles and in fine-tuning."""
    quick = recipe("export.onnx=false", "train.distill=0.5")
    whole = run_recipe(quick, out=Path("whole"), quiet=True)
    done = 0
    write = phase_checkpoints.write_checkpoint

    def write_then_stop(path: Path, state: dict) -> None:
        nonlocal done
        write(path, state)
        done += 1
        if done == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(phase_checkpoints, "write_checkpoint", write_then_stop)
    with pytest.raises(KeyboardInterrupt, match="broken"):
        run_recipe(quick, out=Path("broken"), quiet=True)
    assert not (Path("broken") / "report.json").exists()
    monkeypatch.setattr(phase_checkpoints, "write_checkpoint", write)
    resumed = run_recipe(quick, resume=Path("broken"), quiet=True)
    assert read_front(whole / "pareto.json") == read_front(resumed / "pareto.json")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_run_that_could_not_be_exported_is_resumed_with_other_exports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_exporter(*arguments: object, **options: object) -> None:
        raise ModelError("neither exporter could write it")

    write = measuring.export_onnx
    monkeypatch.setattr(measuring, "export_onnx", no_exporter)
    with pytest.raises(ModelError, match="neither exporter could write it"):
        run_recipe(recipe(), out=Path("run"), quiet=True)
    points = read_front(Path("run/pareto.json"))
    without = recipe("export.onnx=false")
    assert report_of(run_recipe(without, resume=Path("run"), quiet=True))["compact"]["onnx_bytes"] is None
    assert recorded_recipe(Path("run")) == without
    # What is asked for is another report, so a finished run is not the one that is asked for.
    assert is_finished(Path("run"), without) and not is_finished(Path("run"), recipe())
    monkeypatch.setattr(measuring, "export_onnx", write)
    assert report_of(run_recipe(recipe(), resume=Path("run"), quiet=True))["compact"]["onnx_bytes"] > 0
    assert read_front(Path("run/pareto.json")) == points
    with pytest.raises(RecipeError, match=r"export\.opset is 30, but the installed onnx knows \d+ at most"):
        run_recipe(recipe("export.opset=30"), out=Path("other"), quiet=True)
    assert not Path("other").exists()


@pytest.mark.parametrize("collapses", ["cycle 2", "finetune 4"])
def test_a_network_that_collapses_late_ends_no_run(
    collapses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = compress.fit_

    def fit_or_collapse(
        model: torch.nn.Module, train: object, heldout: object, phase: Phase, *rest, **options
    ):
        if phase.name == collapses:
            raise NumericsError(f"the network collapsed in phase {phase.name!r}")
        return fit(model, train, heldout, phase, *rest, **options)

    monkeypatch.setattr(compress, "fit_", fit_or_collapse)
    quick = recipe("export.onnx=false", "prior.strength=1000.0")
    folder = run_recipe(quick, out=Path("run"))
    assert f"the network collapsed in phase {collapses!r}; the " in capsys.readouterr().out
    points = read_front(folder / "pareto.json")
    assert len(points) == (2 if collapses == "cycle 2" else 5)
    chosen = report_of(folder)["chosen_point"]
    assert points[chosen].finetuned and chosen == len(points) - 1
    if collapses != "cycle 2":  # as its cycle left it
        assert points[chosen].heldout_loss == points[chosen].untuned_loss
    collapses = "cycle 1"
    with pytest.raises(NumericsError, match="collapsed in phase 'cycle 1'"):
        run_recipe(quick, out=Path("second"), quiet=True)


def test_the_time_of_a_killed_run_is_known_up_to_its_last_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    append = run.append_line

    def look(path: Path, line: str) -> None:
        append(path, line)
        if (path.parent / "seconds.json").is_file():
            phases, work = read_seconds(path.parent)
            seen.append({**phases, "all": sum(work.values())})

    monkeypatch.setattr(run, "append_line", look)
    run_recipe(recipe("export.onnx=false"), out=Path("run"), quiet=True)
    assert set(seen[0]) == {"pretrain", "all"} and set(seen[-1]) == {"pretrain", "cycles", "finetune", "all"}
    assert all(before["all"] <= after["all"] for before, after in pairwise(seen))
    assert seen[0]["pretrain"] < seen[1]["pretrain"]


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own() -> None:
    folders = [open_folder(recipe(f"seed={seed}"), None, None, False) for seed in range(3)]
    assert len(set(folders)) == 3
    assert [recorded_recipe(folder).seed for folder in folders] == [0, 1, 2]


def test_a_restart_goes_on_with_the_run_that_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(recipe(), Path("run"), None, False)
    assert run._begun(folder, False) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert run._begun(folder, True) == folder and run._begun(Path("other"), True) is None
    (folder / "report.json").write_text("{}")  # of a run that was to be replaced
    assert run._begun(folder, True) is None and run._begun(folder, False) == folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_the_terminal_is_an_interruption(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        if name == "SIGHUP":  # as nohup asks for
            with terminable():
                signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_line_that_a_kill_cut_short_is_dropped() -> None:
    path = Path("metrics.jsonl")
    path.write_text('{"phase": "a"}\n{"pha')
    mend_lines_(path)
    assert path.read_text() == '{"phase": "a"}\n'


def test_budget_is_met_and_a_strength_is_not_exceeded() -> None:
    folder = run_recipe(
        recipe("prune.budget.params=0.2", "export.onnx=false"), out=Path("budget"), quiet=True
    )
    report = report_of(folder)
    assert report["compact"]["params"] <= 0.2 * report["dense"]["params"]
    assert report["compact"]["params"] > 0.1 * report["dense"]["params"]
    folder = run_recipe(recipe("prior.strength=3.0", "export.onnx=false"), out=Path("strength"), quiet=True)
    points = read_front(folder / "pareto.json")
    assert all(p.strength <= 3.0 for p in points[1:])
    assert points[-1].chosen


@pytest.mark.parametrize(
    "change",
    [
        "prune.score=magnitude",
        "prune.score=taylor",
        "prune.score=random",
        "prior.scale=entries",
        "prior.joint=true",
        "prior.price=params",
        "groups=units",
        "data.augment=affine",
        "train={distill: 0.5, distill_on: augmented}",
    ],
)
def test_every_way_to_score_reaches_the_budget(change: str) -> None:
    settings = ["prune.budget.params=0.3", "export.onnx=false", "train.pretrain.epochs=2", change]
    report = report_of(run_recipe(recipe(*settings), out=Path("run"), quiet=True))
    assert report["compact"]["params"] <= 0.3 * report["dense"]["params"]


def test_single_weights_shrink_without_changing_shape_and_stay_zero() -> None:
    settings = ["groups=weights", "prune.budget.params=0.3", "export.onnx=false", "train.cycles.count=6"]
    folder = run_recipe(recipe(*settings), out=Path("run"), quiet=True)
    report = report_of(folder)
    model = sparsebayes.load(folder)
    nonzero = sum(int((p != 0).sum()) for p in model.parameters())
    assert nonzero <= report["compact"]["params"] <= 0.3 * report["dense"]["params"]


def test_any_point_can_be_exported_without_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_recipe(recipe("export.onnx=false"), out=Path("run"), quiet=True)
    points = read_front(folder / "pareto.json")
    monkeypatch.delattr("sparsebayes.train.export.load")
    target = export_point(folder, point=1, legacy=True)
    assert sum(p.numel() for p in sparsebayes.load(target).parameters()) == points[1].params
    # Normalising is no part of the network, so the file says how it is done.
    says = onnxruntime.InferenceSession(target / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(says["mean"]) == [0.3] and "(pixel / 255 - mean) / std" in says["input"]
    small = export_point(folder, max_params=points[-1].params, out=Path("small"), legacy=True)
    assert sum(p.numel() for p in sparsebayes.load(small).parameters()) == points[-1].params
    with pytest.raises(RunError, match="has no point 99"):
        export_point(folder, point=99)
    with pytest.raises(RunError, match="is not a run folder with finished points"):
        export_point(Path("nowhere"))


def test_an_export_never_touches_what_it_did_not_write() -> None:
    folder = run_recipe(recipe("export.onnx=false"), out=Path("run"), quiet=True)
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"mine holds 'thesis\.tex', which no export writes"):
            export_point(folder, out=Path("mine"), overwrite=overwrite, legacy=True)
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="expected a folder to export to, got the file"):
        export_point(folder, out=Path("mine/thesis.tex"), legacy=True)
    Path("empty").mkdir()
    export_point(folder, point=0, out=Path("empty"), legacy=True)
    with pytest.raises(RunError, match="empty holds an export already; give another --out, or --overwrite"):
        export_point(folder, point=1, out=Path("empty"), legacy=True)
    # What a kill in the middle leaves is no obstacle, and no network is without the file that belongs to it.
    Path("empty/.model.onnx-abcd").mkdir()
    Path("empty/.architecture.json.7.part").write_text("{")
    Path("empty/model.int8.onnx").write_text("of point 0")
    export_point(folder, point=0, out=Path("empty"), overwrite=True, legacy=True)
    assert Path("empty/model.int8.onnx").is_file()
    export_point(folder, point=1, out=Path("empty"), overwrite=True, legacy=True)
    assert sorted(path.name for path in Path("empty").iterdir()) == [
        "architecture.json",
        "model.onnx",
        "model.safetensors",
    ]
    points = read_front(folder / "pareto.json")
    assert sum(p.numel() for p in sparsebayes.load("empty").parameters()) == points[1].params


def test_an_export_in_8_bits_is_measured() -> None:
    folder = run_recipe(recipe("export.onnx=false"), out=Path("run"), quiet=True)
    written = export_point(folder, legacy=True)
    found = quantize_export(folder, written)
    recorded = json.loads((written / "quantization.json").read_text())
    assert recorded["int8_error"] == found.int8_error
    assert (found.num_test_images, found.num_calibration_images) == (120, 300)
    assert found.float_error == pytest.approx(report_of(folder)["compact"]["test_error"])
    assert found.agreement > 0.95
    assert found.int8_bytes == (written / "model.int8.onnx").stat().st_size
    words = found.describe()
    slower = all(found.int8_ms[batch] >= found.float_ms[batch] for batch in found.float_ms)
    assert ("8 bits are not faster here" in words) == slower
    assert "test error" in words and "batch 64" in words


def test_folders_that_cannot_be_used() -> None:
    quick = recipe("export.onnx=false", "train.cycles.count=1", "train.pretrain.epochs=1")
    folder = run_recipe(quick, out=Path("run"), quiet=True)
    with pytest.raises(RunError, match="run exists already; give another --out"):
        run_recipe(quick, out=folder, quiet=True)
    run_recipe(quick, out=folder, quiet=True, overwrite=True)
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match=r"holds 'notes\.txt', which no run writes"):
        run_recipe(quick, out=folder, quiet=True, overwrite=True)
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="mine exists already"):
        run_recipe(quick, out=Path("mine"), quiet=True, overwrite=True)
    assert Path("mine/thesis.tex").read_text() == "precious"
    with pytest.raises(RunError, match=r"is not a run folder: expected recipe\.yaml"):
        run_recipe(quick, resume=Path("mine"), quiet=True)
    same = "export.onnx=false", "train.cycles.count=1", "train.pretrain.epochs=1"
    text = r"with other overrides: train\.lr is 0\.05 there and 0\.01 here; resume it with the same ones"
    with pytest.raises(RunError, match=text):
        run_recipe(recipe(*same, "train.lr=0.01"), resume=folder, quiet=True)
    Path("file").write_text("")
    with pytest.raises(RunError, match="cannot write the run folder"):
        run_recipe(quick, out=Path("file/run"), quiet=True)


def test_a_run_in_progress_is_neither_resumed_nor_overwritten() -> None:
    quick = recipe("export.onnx=false", "train.cycles.count=1", "train.pretrain.epochs=1")
    folder = run_recipe(quick, out=Path("run"), quiet=True)
    before = (folder / "report.json").read_bytes()
    with locked(folder):
        for options in ({"resume": folder}, {"out": folder, "overwrite": True}):
            with pytest.raises(RunError, match="is being worked on by process"):
                run_recipe(quick, quiet=True, **options)
    assert (folder / "report.json").read_bytes() == before
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    "left",
    [
        {"recipe.yaml": "ours", "metrics.jsonl": ""},
        {"recipe.yaml": "ours", "seconds.json": "{}", "bench.html": "", "bench.json": ""},
        {
            "recipe.yaml": "ours",
            ".report.json.77.part": "",
            ".model.onnx-x1/draft": "",
            ".lock": "",
            "found/x": "",
        },
        {".recipe.yaml.77.part": ""},
    ],
)
def test_what_a_kill_leaves_behind_can_be_overwritten(left: dict[str, str], tmp_path: Path) -> None:
    quick = recipe()
    for name, text in left.items():
        (Path("run") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("run") / name).write_text(dump_recipe(quick) if text == "ours" else text)
    open_folder(quick, Path("run"), None, overwrite=True)
    assert [path.name for path in Path("run").iterdir()] == ["recipe.yaml"]


def test_a_folder_with_a_recipe_of_the_users_own_is_not_overwritten() -> None:
    Path("mine").mkdir()
    for text in (RECIPE, "no recipe"):
        Path("mine/recipe.yaml").write_text(text)
        with pytest.raises(RunError, match="mine exists already"):
            open_folder(recipe(), Path("mine"), None, overwrite=True)
        assert Path("mine/recipe.yaml").read_text() == text


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("data.batch_size=1000", DataError, "batch_size is 1000, but only 240 images are left"),
        ("data.holdout=300", DataError, "holdout must be between 1 and 299"),
        ("data.name=tiny_task:bad_labels", DataError, "the model has 3 outputs"),
        ("model.name=tiny_task:Wide", DataError, r"does not accept images of shape \[1, 8, 8\]"),
        (
            "model.name=tiny_task:Untrainable",
            ModelError,
            r"in evaluation mode, but fails in training mode \(no such thing\)",
        ),
        ("model.name=tiny_task:Pair", ModelError, r"expected logits of shape \[2, classes\] .*, got tuple"),
        ("train.lr=99", NumericsError, "collapsed in phase 'pretrain'"),
        ("groups={rule: units, include: [nothing]}", sparsebayes.SparseBayesError, "found nothing to group"),
    ],
)
def test_bad_input_is_one_sentence(change: str, error: type[Exception], text: str) -> None:
    changes = [change, "train.momentum=0.99"] if "lr=99" in change else [change]
    with pytest.raises(error, match=text):
        run_recipe(recipe(*changes), out=Path("run"), quiet=True)
    assert not (Path("run") / "report.json").exists()


def test_a_recipe_that_contradicts_itself_is_refused_however_it_was_made() -> None:
    sound = recipe()
    wrong = sound.model_copy(update={"prior": sound.prior.model_copy(update={"price": "budget"})})
    with pytest.raises(RecipeError, match=r"prior\.price is budget, but the recipe has none"):
        run_recipe(wrong, out=Path("run"), quiet=True)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            r"memory is full \(CUDA out .*lower data\.batch_size",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), "memory is full .*lower data"),
        (MemoryError(), r"memory is full \(no message\)"),
        (
            OSError(28, "No space left on device", "here"),
            r"cannot go on \(here: No space left on device\); put that",
        ),
    ],
)
def test_trouble_with_the_machine_is_one_sentence(
    trouble: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise trouble

    monkeypatch.setattr(compress, "fit_", fail)
    with pytest.raises(RunError, match=text):
        run_recipe(recipe(), out=Path("run"), quiet=True)


def test_mistakes_of_our_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(compress, "fit_", fail)
    with pytest.raises(RuntimeError, match=r"^unexpected$"):
        run_recipe(recipe(), out=Path("run"), quiet=True)


def test_absent_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="sees no CUDA device; use --device cpu or auto"):
        run_recipe(recipe("device=cuda"), out=Path("run"), quiet=True)
    assert not Path("run").exists()


def test_progress_lines_tell_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe("export.onnx=false", "train.cycles.count=2"), out=Path("run"))
    lines = capsys.readouterr().out
    assert "point 0:" in lines
    assert "point 2:" in lines
    assert "x fewer" in lines


def test_records_of_a_broken_epoch_are_kept_once_and_in_order() -> None:
    path = Path("metrics.jsonl")
    rows = [
        ("select", 1, None, 0),
        ("cycle", 1, 1, 1),
        ("select", 1, None, 2),
        ("cycle", 1, 1, 3),
        ("cycle", 1, 2, 4),
    ]
    path.write_text(
        "".join(
            json.dumps({"phase": p, "cycle": c, "epoch": e, "lr": 0.1, "n": n}) + "\n" for p, c, e, n in rows
        )
    )
    settle_lines_(path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["phase"], row["epoch"], row["n"]) for row in kept] == [
        ("select", None, 2), ("cycle", 1, 3), ("cycle", 2, 4),
    ]  # fmt: skip
    settle_lines_(Path("absent.jsonl"))
