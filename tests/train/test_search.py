"""Searches from recipe to report: what is written, resuming to the same numbers, mistakes, and a planted operation."""

from __future__ import annotations

import copy
import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import sparsebayes
from sparsebayes.cli import main
from sparsebayes.cost import cost
from sparsebayes.data import Loader
from sparsebayes.errors import DataError, NumericsError, RecipeError, RunError, SparseBayesError, Terminated
from sparsebayes.nas import Genotype, Supernet
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.recipe import SearchRecipe, dump_recipe, parse_recipe
from sparsebayes.train import random_search, search_run
from sparsebayes.train import search as search_module
from sparsebayes.train.evaluation import Evaluation
from sparsebayes.train.export import export_point
from sparsebayes.train.progress import Reporter
from sparsebayes.train.random_search import random_cell
from sparsebayes.train.run import run_recipe
from sparsebayes.train.search import Searcher, decision_of
from sparsebayes.train.search_methods import method_name
from sparsebayes.train.search_removal import search_macs
from sparsebayes.train.search_setup import set_up
from sparsebayes.train.seeding import derive_seed

DATA = '''
import torch
from sparsebayes.data import Dataset, Images

def stripes():
    """Two classes that no single pixel tells apart: horizontal and vertical stripes at random phases."""
    generator = torch.Generator().manual_seed(0)
    def draw(number):
        labels = torch.arange(number) % 2
        line = (torch.arange(12) // 2 + torch.randint(0, 4, (number, 1), generator=generator)) % 2  # [N, 12]
        rows = line[:, :, None].expand(-1, 12, 12)
        images = torch.where(labels[:, None, None] == 0, rows, rows.transpose(1, 2)) * 200
        noise = torch.randint(0, 50, (number, 1, 12, 12), generator=generator)
        return Images((images[:, None] + noise).to(torch.uint8), labels)
    return Dataset("stripes", draw(240), draw(100), 2, (0.5,), (0.4,))
'''

SPACES = """
from sparsebayes.nas import read_space

def mine():
    ops = ["nor_conv_3x3", "skip_connect"]
    cell = {"name": "cell", "num_inputs": 1, "num_nodes": 2, "edges": [[0, 1, ops]]}
    return read_space({"name": "mine", "num_stages": 1, "cells": [cell]})

def none():
    return 3
"""

EDGE = {"source": 0, "target": 1, "ops": ["skip_connect", "nor_conv_3x3", "avg_pool_3x3"]}
SPACE = {
    "name": "tiny",
    "num_stages": 1,
    "gates": True,
    "cells": [{"name": "cell", "num_inputs": 1, "num_nodes": 2, "edges": [EDGE]}],
}


NO_TIMES = {"wall_seconds": 0, "work_seconds": 0}


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "searchdata.py").write_text(DATA)
    (tmp_path / "searchspaces.py").write_text(SPACES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def recipe(**changes: object) -> SearchRecipe:
    """A search of seconds; `changes` are dotted keys with `__` for the dot."""
    base: dict[str, object] = {
        "version": 1,
        "name": "tiny",
        "task": "search",
        "data": {"name": "searchdata:stripes", "holdout": 40, "batch_size": 20},
        "search": {"space": SPACE, "width": 4, "depth": 1, "epochs": 2, "lr": 0.1, "strength": 3.0},
        "curvature": {"num_images": 100, "estimator": "exact"},
        "retrain": {"epochs": 1},
        "export": {"legacy": True},
        "evaluate": {"latency": False},
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    parsed = parse_recipe(yaml.safe_dump(base), "tiny.yaml", overrides=overrides)
    assert isinstance(parsed, SearchRecipe)
    return parsed


def numbers(folder: Path) -> list[dict[str, object]]:
    """What a run has recorded, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_a_search_ends_in_a_network_that_loads_and_a_report(tmp_path):
    folder = run_recipe(recipe(), out=tmp_path / "run", quiet=True)
    report = json.loads((folder / "report.json").read_text())
    genotype = Genotype.from_json((folder / "genotype.json").read_text())
    assert report["task"] == "search"
    assert report["method"] == "laplace"
    assert sorted(report["work_seconds"]) == ["curvature", "evaluation", "export", "training", "update"]
    assert report["compact"]["onnx_error"] <= 1e-4
    assert genotype.search_space.name == "tiny"
    model = sparsebayes.load(folder)
    assert sum(p.numel() for p in model.parameters()) == report["compact"]["params"]
    switches = json.loads((folder / "switches.json").read_text())
    assert [row["op"] for row in switches] == ["skip_connect", "nor_conv_3x3", "avg_pool_3x3", None]
    for file in ("report.html", "report.md", "model.onnx", "cell-cell.svg", "recipe.yaml"):
        assert (folder / file).stat().st_size > 0
    chosen = {row["op"] for row in switches if row["chosen"]}
    assert chosen == {op for _, _, op in genotype.cells["cell"]}


def test_the_operation_that_the_data_need_is_found_by_every_seed(tmp_path):
    """One stage without any other convolution but the stem's: only a second convolution tells stripes apart well."""
    for seed in range(3):
        run = run_recipe(
            recipe(
                seed=seed,
                search__one_op_per_edge=True,
                search__epochs=6,
                retrain__epochs=0,
                export__onnx=False,
            ),
            out=tmp_path / f"run{seed}",
            quiet=True,
        )
        genotype = Genotype.from_json((run / "genotype.json").read_text())
        assert genotype.cells["cell"] == ((0, 1, "nor_conv_3x3"),)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
@pytest.mark.parametrize(
    ("baseline", "posterior", "second_order"),
    [
        ("none", "laplace", False),
        ("darts", "laplace", False),
        ("darts", "laplace", True),
        ("none", "natural_gradient", False),
        ("none", "natural_gradient", True),
        ("none", "variational_dropout", False),
    ],
)
def test_an_interrupted_search_goes_on_to_the_same_numbers(
    tmp_path, monkeypatch, stop_at, baseline, posterior, second_order
):
    changes = {
        "posterior": posterior,
        "search__baseline": baseline,
        "search__cycles": 3,
        "search__epochs": 1,
        "search__warmup_epochs": 1,
        "search__removal": 0.0 if baseline == "darts" else 0.4,
        "search__second_order": second_order,
        "export__onnx": False,
    }
    whole = run_recipe(recipe(**changes), out=tmp_path / "whole", quiet=True)
    written = search_module.write_checkpoint
    count = 0

    def interrupt(path: Path, state: dict[str, object]) -> None:
        nonlocal count
        written(path, state)
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(**changes), out=tmp_path / "broken", quiet=True)
    monkeypatch.setattr(search_module, "write_checkpoint", written)
    again = run_recipe(recipe(**changes), resume=tmp_path / "broken", quiet=True)
    assert numbers(again) == numbers(whole)
    assert (again / "genotype.json").read_text() == (whole / "genotype.json").read_text()
    assert (again / "switches.json").read_text() == (whole / "switches.json").read_text()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    changes = {"search__epochs": 3, "retrain__epochs": 3, "export__onnx": False}
    whole = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    before, files = numbers(whole), ("genotype.json", "switches.json")
    written = {name: (whole / name).read_text() for name in files}
    for name in ("search.pt", "retrain.pt"):
        path = whole / name
        path.write_bytes(path.read_bytes()[:-100])
    (whole / "report.json").unlink()
    for name in files:
        (whole / name).unlink()
    shutil.rmtree(whole / "found")
    run_recipe(recipe(**changes), resume=whole)
    said = capsys.readouterr().out
    assert "search.earlier.pt, an epoch or more older, is used instead" in said
    assert "retrain.earlier.pt, an epoch or more older, is used instead" in said
    assert numbers(whole) == before
    assert {name: (whole / name).read_text() for name in files} == written


def test_a_lost_supernet_is_searched_again_to_the_same_numbers(tmp_path):
    changes = {"export__onnx": False, "retrain__epochs": 0, "retrain__inherit": True}
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    before, rows = json.loads((folder / "report.json").read_text()), numbers(folder)
    for name in ("report.json", "search.pt", "search.earlier.pt"):
        (folder / name).unlink()
    shutil.rmtree(folder / "found")
    run_recipe(recipe(**changes), resume=folder, quiet=True)
    after = json.loads((folder / "report.json").read_text())
    assert {**before, **NO_TIMES} == {**after, **NO_TIMES}
    assert numbers(folder) == rows


def test_a_terminated_search_says_so(tmp_path, monkeypatch):
    def terminate(path: Path, state: dict[str, object]) -> None:
        raise Terminated

    monkeypatch.setattr(search_module, "write_checkpoint", terminate)
    with pytest.raises(Terminated, match="run"):
        run_recipe(recipe(), out=tmp_path / "run", quiet=True)


def test_an_epoch_that_was_recorded_twice_counts_once(tmp_path):
    folder = run_recipe(recipe(export__onnx=False), out=tmp_path / "run", quiet=True)
    before = numbers(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    (folder / "report.json").unlink()
    run_recipe(recipe(export__onnx=False), resume=folder, quiet=True)
    assert numbers(folder) == before


def test_what_was_removed_keeps_the_worth_that_it_had(tmp_path):
    changes = {"search__cycles": 3, "search__epochs": 1, "search__removal": 0.4, "search__strength": 1e-6}
    folder = run_recipe(recipe(**changes, export__onnx=False), out=tmp_path / "run", quiet=True)
    rows = json.loads((folder / "switches.json").read_text())
    assert [row["chosen"] for row in rows[:3]].count(True) == 1
    assert all(row["score"] > 0 and row["value"] > 0 for row in rows)


def test_a_picture_that_cannot_be_drawn_costs_no_search(tmp_path, monkeypatch):
    def fail(*arguments: object) -> str:
        raise KeyboardInterrupt

    whole = run_recipe(recipe(export__onnx=False), out=tmp_path / "whole", quiet=True)
    draw = search_run.draw_cell
    monkeypatch.setattr(search_run, "draw_cell", fail)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(export__onnx=False), out=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "genotype.json").is_file()
    monkeypatch.setattr(search_run, "draw_cell", draw)
    folder = run_recipe(recipe(export__onnx=False), resume=tmp_path / "run", quiet=True)
    assert (folder / "cell-cell.svg").read_text() == (whole / "cell-cell.svg").read_text()


def test_a_finished_search_resumes_to_its_report(tmp_path):
    folder = run_recipe(recipe(export__onnx=False), out=tmp_path / "run", quiet=True)
    before = json.loads((folder / "report.json").read_text())
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "found")
    run_recipe(recipe(export__onnx=False), resume=folder, quiet=True)
    after = json.loads((folder / "report.json").read_text())
    assert {**before, **NO_TIMES} == {**after, **NO_TIMES}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("switches.json", r"switches\.json is damaged or incomplete"),
        ("genotype.json", "expected a genotype as JSON"),
    ],
)
def test_a_damaged_result_of_a_search_is_named(tmp_path, file, says):
    folder = run_recipe(recipe(export__onnx=False, retrain__epochs=0), out=tmp_path / "run", quiet=True)
    for name in ("report.json", "cell-cell.svg"):
        (folder / name).unlink()
    (folder / file).write_text("nonsense")
    with pytest.raises(SparseBayesError, match=says):
        run_recipe(recipe(export__onnx=False, retrain__epochs=0), resume=folder, quiet=True)


def test_inherited_weights_start_where_the_supernet_ended(tmp_path):
    changes = {
        "retrain__inherit": True,
        "retrain__epochs": 0,
        "search__strength": 1e-6,
        "export__onnx": False,
    }
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    report = json.loads((folder / "report.json").read_text())
    # Everything stays, so the network is the supernet with its switches as the scales of norms.
    assert report["compact"]["test_loss"] == pytest.approx(report["dense"]["test_loss"], rel=1e-4)


def test_a_space_made_in_python_travels_with_the_network(tmp_path):
    changes = {"search__space": "searchspaces:mine", "export__onnx": False}
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    genotype = Genotype.from_json((folder / "genotype.json").read_text())
    assert isinstance(genotype.space, dict)
    assert genotype.search_space.name == "mine"
    (tmp_path / "searchspaces.py").unlink()
    assert sparsebayes.load(folder)(torch.zeros(1, 1, 12, 12)).shape == (1, 2)


def test_the_network_that_was_found_can_be_exported(tmp_path):
    folder = run_recipe(recipe(search__epochs=1), out=tmp_path / "run", quiet=True)
    written = export_point(folder, legacy=True)
    assert written == folder / "export-found"
    assert (written / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (written / "model.onnx").stat().st_size > 0
    with pytest.raises(
        RunError, match="has compressed nothing yet, so there is one network to export; leave out --point"
    ):
        export_point(folder, point=1, legacy=True)
    shutil.rmtree(folder / "found")
    with pytest.raises(RunError, match="has not trained the network that it found yet; resume it"):
        export_point(folder, legacy=True)


def test_search_then_compression_in_one_run(tmp_path):
    compress = {
        "prior": {"strength": 5.0},
        "train": {
            "pretrain": {"epochs": 0},
            "cycles": {"count": 1, "epochs": 1, "max_epochs": 1, "shrink": 0.4},
            "finetune": {"epochs": 1},
        },
    }
    changes = {
        "compress": compress,
        "search__width": 8,
        "retrain__epochs": 3,
        "search__one_op_per_edge": True,
    }
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    report = json.loads((folder / "report.json").read_text())
    assert report["task"] == "search"
    assert report["space"] == "tiny"
    assert report["compact"]["params"] < report["dense"]["params"]
    assert report["work_seconds"]["compaction"] > 0
    assert report["compact"]["onnx_error"] <= 1e-4


def searcher_of(recipe: SearchRecipe, folder: Path) -> Searcher:
    """A search that has not begun."""
    setting = set_up(recipe)
    folder.mkdir()
    with Reporter(quiet=True) as reporter:
        return Searcher(recipe, setting.supernet, setting.search_loaders, folder, lambda row: None, reporter)


def test_curvature_can_be_measured_with_the_statistics_of_plain_images(tmp_path, monkeypatch):
    changes = {
        "search__cycles": 2,
        "search__removal": 0.4,
        "search__norm_images": 10_000,
        "data__augment": "shift",
    }
    searcher = searcher_of(recipe(**changes), tmp_path / "run")
    measure, seen = search_module.relative_rows, []

    def watch(supernet: Supernet, batches: Loader, **options: object) -> torch.Tensor:
        convolution, norm = supernet.network.stem[0], supernet.network.stem[1]
        images = torch.cat([x for x, _ in searcher.loaders.plain])
        expected = convolution(images).mean((0, 2, 3)).detach()
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)
        seen.append(1)
        return measure(supernet, batches, **options)

    monkeypatch.setattr(search_module, "relative_rows", watch)
    searcher.run()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("baseline", "posterior", "left"),
    [
        ("none", "laplace", 1),
        ("magnitude", "laplace", 1),
        ("darts", "laplace", 3),
        ("none", "natural_gradient", 3),
    ],
)
def test_a_softmax_over_an_edge_never_switches_operations_off(tmp_path, baseline, posterior, left):
    changes = {"search__baseline": baseline, "search__cycles": 3, "search__epochs": 1, "search__removal": 0.4}
    searcher = searcher_of(recipe(**changes, posterior=posterior, search__strength=1e-6), tmp_path / "run")
    searcher.run()
    assert int(searcher.supernet.alive[:3].sum()) == left


def test_every_search_begins_its_logits_by_its_own_seed(tmp_path):
    states = [
        searcher_of(recipe(seed=seed, search__baseline="darts"), tmp_path / f"{seed}").method.state_dict()
        for seed in (1, 2)
    ]
    assert not torch.equal(states[0]["alpha"], states[1]["alpha"])


def test_a_random_cell_that_diverges_never_wins(tmp_path, monkeypatch):
    losses = iter([math.nan, 2.0, 1.0, math.inf])

    def diverging(network, loaders, recipe, steps):
        return Evaluation(next(losses), 0.0, 0.5, 40, math.log(2))

    monkeypatch.setattr(random_search, "_train", diverging)
    change = recipe(search__baseline="random", search__candidates=4, retrain__epochs=0)
    folder = run_recipe(change, out=tmp_path / "run", quiet=True)
    setting = set_up(change)
    third = random_cell(
        setting.supernet,
        decision_of(change.search, setting.supernet.space),
        torch.Generator().manual_seed(derive_seed(0, "random", 2)),
    )
    assert Genotype.from_json((folder / "genotype.json").read_text()) == third.genotype
    losses = iter([math.nan] * 4)
    with pytest.raises(NumericsError, match="no random cell has a held-out loss that is a number"):
        run_recipe(change, out=tmp_path / "none", quiet=True)


def test_random_search_gets_what_a_search_that_shrinks_computes():
    edge = {"source": 0, "target": 1, "ops": ["nor_conv_1x1", "nor_conv_3x3"]}
    space = {**SPACE, "cells": [{**SPACE["cells"][0], "edges": [edge]}]}
    changes = {
        "search__space": space,
        "search__warmup_epochs": 1,
        "search__cycles": 2,
        "search__epochs": 1,
        "search__batch_size": 20,
        "curvature__num_images": 40,
    }
    setting = set_up(recipe(**changes))
    supernet, example = setting.supernet, setting.loaders.example
    whole = cost(supernet, example).macs
    alone = []
    for op in range(2):
        other = copy.deepcopy(supernet)
        other.switch_off_(torch.tensor([op == 0, op == 1, False]))
        alone.append(cost(other, example).macs)
    assert len({whole, *alone}) == 3
    # Ten steps of the warm-up and of each cycle, and the curvature of two batches after each cycle.
    assert search_macs(setting.recipe, supernet, 10, example) == 10 * whole + 2 * 12 * whole
    removing = set_up(recipe(**changes, search__removal=0.4)).recipe
    assert search_macs(removing, supernet, 10, example) in [22 * whole + 12 * macs for macs in alone]
    assert bool(supernet.alive.all())
    # Without curvature and removal, but with a step of the logits beside each of the weights.
    natural = set_up(recipe(**changes, search__removal=0.4, posterior="natural_gradient")).recipe
    assert search_macs(natural, supernet, 10, example) == 10 * whole + 2 * 20 * whole
    # Four passes for each of the logits' steps.
    second = set_up(recipe(**changes, search__second_order=True, posterior="natural_gradient")).recipe
    assert search_macs(second, supernet, 10, example) == 10 * whole + 2 * 50 * whole


def test_a_learned_posterior_is_told_how_many_images_a_gradient_averages(tmp_path, monkeypatch):
    for posterior in ("natural_gradient", "variational_dropout"):
        searcher = searcher_of(recipe(posterior=posterior, search__epochs=1), tmp_path / posterior)
        method, seen = searcher.method, []
        learn, sample = method.learn_, method.sample
        monkeypatch.setattr(
            method, "learn_", lambda g, n, learn=learn, seen=seen: seen.append(n) or learn(g, n)
        )
        shapes = []

        def watch(switches, generator, num_images, sample=sample, shapes=shapes):
            drawn = sample(switches, generator, num_images)
            shapes.append(drawn.ndim)
            return drawn

        monkeypatch.setattr(method, "sample", watch)
        searcher.run()
        assert set(seen) == {20}
        assert set(shapes) == {2 if posterior == "variational_dropout" else 1}


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("changes", [{"search__baseline": "darts"}, {"posterior": "natural_gradient"}])
def test_a_step_of_second_order_moves_the_architecture_alone(tmp_path, changes, save_memory):
    first, second = (
        searcher_of(
            recipe(**changes, search__second_order=second, search__save_memory=save_memory),
            tmp_path / f"{second}",
        )
        for second in (False, True)
    )
    for searcher in (first, second):
        searcher.supernet.train()
        images, labels = next(iter(searcher.loaders.train))
        generator = torch.Generator().manual_seed(0)
        before = {name: value.clone() for name, value in searcher.supernet.state_dict().items()}
        for _ in range(2):  # the first step of an adaptive rate has one size whatever the gradient
            searcher._step_switches(images, labels, generator)
        after = searcher.supernet.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        if searcher is first:
            assert moved and all("running" in name or "tracked" in name for name in moved)
        else:
            assert not moved
            assert all(parameter.grad is None for parameter in searcher.supernet.network.parameters())
    assert not torch.equal(first.method.scores(), second.method.scores())


def test_what_may_take_the_second_order_are_the_methods_with_images_of_their_own():
    for posterior in ("laplace", "natural_gradient", "variational_dropout"):
        for baseline in ("none", "darts", "magnitude", "random"):
            asked = recipe(posterior=posterior, search__baseline=baseline)
            assert asked.is_bilevel == METHODS[method_name(asked)].bilevel


@pytest.mark.parametrize("baseline", ["darts", "magnitude", "random"])
def test_every_baseline_runs_in_the_same_harness(tmp_path, baseline):
    changes = {
        "search__baseline": baseline,
        "search__candidates": 2,
        "retrain__epochs": 0,
        "export__onnx": False,
    }
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    assert json.loads((folder / "report.json").read_text())["method"] == baseline
    assert Genotype.from_json((folder / "genotype.json").read_text()).num_ops >= 1


def test_auxiliary_classifier_and_dropped_paths_leave_an_ordinary_network(tmp_path):
    changes = {"retrain__auxiliary": 0.4, "retrain__drop_path": 0.2, "retrain__augment": "shift1"}
    folder = run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    model = sparsebayes.load(folder)
    assert not any("auxiliary" in name for name in model.state_dict())
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(model(x), model(x))


def test_a_strength_beyond_all_evidence_keeps_a_path_and_says_what_to_do(tmp_path, capsys):
    folder = run_recipe(recipe(search__strength=1e9, export__onnx=False), out=tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "nothing of cell cell" in line]
    assert len(said) == 1
    assert "its best path stays; lower search.strength to keep more" in said[0]
    assert Genotype.from_json((folder / "genotype.json").read_text()).num_ops == 1


def test_a_table_without_the_cell_is_named_and_the_network_that_was_found_stays(tmp_path):
    table = tmp_path / "table.csv.gz"
    table.write_bytes(gzip.compress(b"arch,accuracy\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,10\n"))
    searched = recipe(search__space="nas_bench_201", search__epochs=1, table=str(table), export__onnx=False)
    with pytest.raises(
        DataError, match=r"the table of 1 cells has no cell .*; use the whole table"
    ) as caught:
        run_recipe(searched, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    genotype = Genotype.from_json((tmp_path / "run" / "genotype.json").read_text())
    assert genotype.space == "nas_bench_201"
    assert sparsebayes.load(tmp_path / "run")(torch.zeros(1, 1, 12, 12)).shape == (1, 2)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"search__batch_size": 500}, DataError, "the search has only 200 images; lower it"),
        (
            {"data__batch_size": 1},
            DataError,
            "batches of at least 2 images, as every operation ends in a batch norm",
        ),
        ({"search__batch_size": 20, "data__batch_size": 1}, DataError, "batches of at least 2 images"),
        ({"search__num_images": 5000}, DataError, "search.num_images is 5000, but only 200 images are left"),
        ({"table": "embedded"}, RecipeError, "is for the space nas_bench_201, not 'tiny'"),
        ({"retrain__inherit": True, "retrain__width": 9}, RecipeError, "must be those of the search"),
        (
            {"retrain__inherit": True, "search__baseline": "darts"},
            RecipeError,
            "takes switches, which baseline darts does not learn",
        ),
        (
            {"search__space": "chain", "retrain__depth": 3},
            RecipeError,
            "retrain.depth must be that of the search",
        ),
        (
            {"search__space": {**SPACE, "name": "nas_bench_201"}, "table": "embedded"},
            RecipeError,
            "is for the space nas_bench_201",
        ),
        ({"search__space": "searchspaces:none"}, RecipeError, "must return a sparsebayes.nas.Space, got int"),
        ({"search__space": "searchspaces:other"}, RecipeError, "has no function or class 'other'"),
        ({"search__space": {**SPACE, "cells": []}}, RecipeError, "expected at least one cell"),
        (
            {
                "search__space": {
                    **SPACE,
                    "cells": [{**SPACE["cells"][0], "edges": [[1, 0, ["skip_connect"]]]}],
                }
            },
            RecipeError,
            "edge 1 -> 0 points back, which can close a cycle",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        run_recipe(recipe(**changes), out=tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search__space": "darts", "table": "embedded"}, "for the space nas_bench_201, not 'darts'"),
        (
            {"search__space": "nas_bench_201", "search__one_op_per_edge": False, "table": "embedded"},
            "cells of one operation per edge, but search.one_op_per_edge is false",
        ),
        ({"search__joint": True, "search__rule": "entropy"}, "but search.rule is entropy"),
        (
            {"search__second_order": True},
            "for switches that learn from images of their own .*, but this is posterior laplace; set it to false",
        ),
        (
            {"search__second_order": True, "posterior": "variational_dropout"},
            "but this is posterior variational",
        ),
        (
            {"search__second_order": True, "search__baseline": "magnitude", "posterior": "natural_gradient"},
            "but this is baseline magnitude",
        ),
        (
            {"search__paper_lambda": 0.1, "search__strength": 2.0},
            "replaces search.strength, but both are set",
        ),
        ({"retrain__inherit": True, "retrain__depth": 9}, "must be those of the search"),
        ({"natural_gradient__initial_precision": 0.5}, "below prior_precision 1.0"),
    ],
)
def test_validate_refuses_what_a_run_refuses(tmp_path, changes, says):
    refused = recipe(**changes)
    for refuse in (refused.check, lambda: set_up(refused)):
        with pytest.raises(RecipeError, match=says) as caught:
            refuse()
        assert "\n" not in str(caught.value)
    path = tmp_path / "refused.yaml"
    path.write_text(dump_recipe(refused))
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert isinstance(result.exception, RecipeError) or result.exit_code == 2
    assert "recipe is valid" not in result.output


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("search__space", "dart", "unknown search space 'dart'; did you mean 'darts'"),
        ("search__cycle", 3, "unknown key 'cycle'; did you mean 'cycles'"),
        ("prune", {}, "unknown key 'prune'"),
        ("search__baseline", "drts", "did you mean 'darts'"),
        ("search__removal", 1.0, "expected a number < 1, got 1.0"),
    ],
)
def test_mistakes_in_a_recipe_are_named_with_what_it_may_say(key, value, says):
    with pytest.raises(SparseBayesError, match=says):
        recipe(**{key: value})


def test_the_papers_lambda_is_a_strength_for_the_number_of_images():
    section = recipe(search__paper_lambda=0.01).search
    assert section.strength_for(50_000) == 500.0
    assert recipe().search.strength_for(50_000) == 3.0
