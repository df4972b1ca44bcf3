"""Decisions among drawn architectures: the judge's best is taken, nothing is left changed, mistakes are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from sparsebayes.errors import RecipeError
from sparsebayes.export.saved import load_model
from sparsebayes.inference.sampling import expected_best
from sparsebayes.nas import SPACES, Genotype, Shape, Supernet, build_network
from sparsebayes.nas.decision import decide
from sparsebayes.nas.proxies import rank_average, synflow
from sparsebayes.nas.switches import SwitchTable
from sparsebayes.recipe import SearchRecipe, load_recipe, parse_recipe
from sparsebayes.train import search_draws
from sparsebayes.train.progress import Reporter
from sparsebayes.train.run import run_recipe
from sparsebayes.train.search import Searcher, WithSwitches
from sparsebayes.train.search_draws import (
    choose_architecture,
    clearly_better,
    groups_of,
    random_architecture,
)
from sparsebayes.train.search_setup import Setting, set_up

(CELL,) = SPACES["nas_bench_201"].cells


def recipe(posterior: str, *overrides: str) -> SearchRecipe:
    """A search of seconds in the space of NAS-Bench-201."""
    base = {
        "version": 1,
        "name": "tiny",
        "task": "search",
        "posterior": posterior,
        "data": {"name": "embedded_cifar10", "holdout": 60, "batch_size": 20, "augment": "none"},
        "search": {"space": "nas_bench_201", "width": 4, "depth": 1, "num_images": 80, "lr": 0.05},
        "curvature": {"num_images": 20},
        "retrain": {"epochs": 0},
        "sampling": {"count": 6, "norm_batches": 1},
        "export": {"onnx": False},
        "evaluate": {"latency": False},
    }
    parsed = parse_recipe(yaml.safe_dump(base), "tiny.yaml", overrides=list(overrides))
    assert isinstance(parsed, SearchRecipe)
    return parsed


def searched(recipe: SearchRecipe, folder: Path) -> tuple[Setting, Searcher]:
    """A supernet after its search, and what searched it."""
    setting = set_up(recipe)
    folder.mkdir()
    with Reporter(quiet=True) as reporter:
        searcher = Searcher(
            recipe, setting.supernet, setting.search_loaders, folder, lambda row: None, reporter
        )
        searcher.run()
    return setting, searcher


def chosen(setting: Setting, searcher: Searcher) -> tuple[Genotype, dict]:
    rows: list[dict] = []
    with Reporter(quiet=True) as reporter:
        found = choose_architecture(
            setting.recipe,
            setting.supernet,
            searcher.method,
            searcher.decide(),
            setting.search_loaders,
            rows.append,
            reporter,
        )
    (row,) = rows
    assert found.best == row["best"]
    return found.winner.genotype, row


def test_dropout_takes_the_lowest_held_out_loss_and_leaves_the_supernet_as_it_is(tmp_path, monkeypatch):
    setting, searcher = searched(recipe("variational_dropout"), tmp_path / "run")
    before = {name: value.clone() for name, value in setting.supernet.state_dict().items()}
    skipped = [cell._skip for cell in setting.supernet.network.cells]
    seen: list[tuple[torch.Tensor, float]] = []
    evaluate = search_draws.evaluate

    def watch(model: WithSwitches, loader: object) -> object:
        result = evaluate(model, loader)
        seen.append((model.supernet.alive.clone(), result.loss))
        return result

    monkeypatch.setattr(search_draws, "evaluate", watch)
    genotype, row = chosen(setting, searcher)
    assert len(row["losses"]) == len(row["random_losses"]) == 6
    assert row["losses"][row["best"]] == min(row["losses"])
    assert row["curve"] == pytest.approx(expected_best(row["losses"]).tolist())
    # What was judged is the supernet with the genotype's operations alone.
    table = setting.supernet.table
    alive = groups_of(table, genotype)[table.group]
    assert min(loss for on, loss in seen if torch.equal(on, alive)) == min(row["losses"])
    after = setting.supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [cell._skip for cell in setting.supernet.network.cells] == skipped


def test_proxies_rank_networks_as_large_as_they_will_be_and_the_mean_is_a_candidate(tmp_path):
    # With one proxy its own order decides.
    changes = ("sampling.proxies=[synflow]", "retrain.width=6", "retrain.depth=2")
    setting, searcher = searched(recipe("natural_gradient", *changes), tmp_path / "run")
    own = searcher.decide().genotype
    genotype, row = chosen(setting, searcher)
    values = row["proxies"]["synflow"]
    assert row["candidates"][0] == 0 and len(values) == row["distinct"] == len(row["mean_ranks"])
    assert values[row["candidates"].index(row["best"])] == max(values)
    assert (genotype == own) == (row["best"] == 0)
    images = next(iter(setting.search_loaders.plain))[0]
    with torch.random.fork_rng():
        torch.manual_seed(search_draws.derive_seed(0, "search", "proxies"))
        network = build_network(genotype, width=6, depth=2)
    assert synflow(network, images, images) == max(values)


def test_proxies_may_judge_the_cells_of_the_highest_evidence_and_the_evidence_be_one_of_them(tmp_path):
    changes = ("sampling.judge=proxies", "sampling.proxies=[posterior, params]", "sampling.count=9")
    setting, searcher = searched(recipe("laplace", *changes), tmp_path / "run")
    genotype, row = chosen(setting, searcher)
    scores, table = searcher.method.scores(), setting.supernet.table
    worth, sizes = row["proxies"]["posterior"], row["proxies"]["params"]
    assert len(worth) == len(sizes) == row["distinct"] == 9
    # Found by their sums, the highest first.
    assert worth == sorted(worth, reverse=True)
    assert worth[row["candidates"].index(row["best"])] == pytest.approx(
        float(scores[groups_of(table, genotype)].sum())
    )
    ranks = rank_average([worth, sizes])
    assert row["mean_ranks"] == ranks
    assert row["candidates"].index(row["best"]) == max(range(9), key=ranks.__getitem__)


def test_what_was_switched_off_for_good_is_in_no_candidate(tmp_path):
    changes = ("variational_dropout.lr=5.0", "variational_dropout.length_scale=1e5", "sampling.count=12")
    setting, searcher = searched(recipe("variational_dropout", *changes), tmp_path / "run")
    # Nearly nothing is kept in a draw, so that cells are rescued by their best path.
    assert float(searcher.method.scores().max()) < 0.05
    table = setting.supernet.table
    alone = torch.tensor([switch.edge == 3 and switch.op == "nor_conv_1x1" for switch in table.groups])
    straight = torch.tensor([CELL.edges[switch.edge].source == 0 for switch in table.groups]) & ~alone
    on = alone | (straight & torch.tensor([switch.op == "skip_connect" for switch in table.groups]))
    setting.supernet.switch_off_(~on)
    genotype, _ = chosen(setting, searcher)
    assert bool(on[groups_of(table, genotype)].all())


def test_weights_of_operations_decay_by_the_probability_of_being_kept(tmp_path):
    setting, searcher = searched(recipe("variational_dropout"), tmp_path / "run")
    groups = searcher._weights.param_groups
    table = setting.supernet.table
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in setting.supernet.network.parameters())
    number = next(
        n for n, switch in enumerate(table.groups) if switch.edge == 2 and switch.op == "nor_conv_3x3"
    )
    for cell in setting.supernet.network.cells:
        module = dict(cell.operations())[2, "nor_conv_3x3"]
        assert {id(p) for p in module.parameters()} <= {id(p) for p in groups[1 + number]["params"]}
    decay = setting.recipe.search.weight_decay
    assert groups[0]["weight_decay"] == decay
    searcher._set_decay()
    assert groups[1 + number]["weight_decay"] == pytest.approx(
        decay * float(searcher.method.scores()[number])
    )
    constant = searched(
        recipe("variational_dropout", "variational_dropout.adaptive=false"), tmp_path / "constant"
    )[1]
    assert len(constant._weights.param_groups) == 1


@pytest.mark.parametrize("posterior", ["variational_dropout", "natural_gradient"])
def test_a_choice_is_repeatable_and_leaves_the_callers_random_numbers(tmp_path, posterior):
    setting, searcher = searched(recipe(posterior), tmp_path / "run")
    state = torch.random.get_rng_state()
    first = chosen(setting, searcher)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert chosen(setting, searcher) == first


@pytest.mark.parametrize("posterior", ["variational_dropout", "natural_gradient"])
def test_a_certain_posterior_keeps_its_own_decision(tmp_path, posterior):
    setting, searcher = searched(recipe(posterior), tmp_path / "run")
    posterior_state = searcher.method.posterior.state_dict()
    name = "logits" if posterior == "variational_dropout" else "mean"
    steps = torch.arange(len(posterior_state[name])) % 4
    posterior_state[name] = (40.0 * steps - 20).clamp(max=20.0).double()
    if posterior == "natural_gradient":
        posterior_state["curvature"] = torch.full_like(posterior_state["curvature"], 1e6)
        posterior_state[name] = 40.0 * steps.double()
    searcher.method.posterior.load_state_dict(posterior_state)
    genotype, row = chosen(setting, searcher)
    assert row["distinct"] == 1
    assert genotype == searcher.decide().genotype


@pytest.mark.parametrize("baseline", ["none", "magnitude"])
def test_the_cells_of_the_highest_scores_are_judged_with_the_switches_they_have(
    tmp_path, monkeypatch, baseline
):
    changes = (
        f"search.baseline={baseline}",
        "search.removal=0.34",
        "search.cycles=2",
        "search.strength=1e-6",
    )
    setting, searcher = searched(recipe("laplace", *changes), tmp_path / "run")
    table, switches = setting.supernet.table, setting.supernet.switches.detach().clone()
    before = {name: value.clone() for name, value in setting.supernet.state_dict().items()}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    image_losses = search_draws.image_losses
    gain = 0.0

    def watch(model: WithSwitches, loader: object) -> torch.Tensor:
        assert torch.equal(model.values, switches)
        found = image_losses(model, loader)
        seen.append((model.supernet.alive.clone(), found))
        return torch.full_like(found, 1 - gain * (len(seen) == 4))

    monkeypatch.setattr(search_draws, "image_losses", watch)
    own = searcher.decide().genotype
    genotype, row = chosen(setting, searcher)
    # Six edges with three operations left on each: many cells, the own decision first, then by the sum of scores.
    assert row["distinct"] == len(row["heldout_losses"]) == len(seen) == 6
    assert genotype == own and row["best"] == 0
    assert torch.equal(seen[0][0], groups_of(table, own)[table.group])
    scores = searcher.method.scores()
    sums = [float(scores[groups_of_switches(table, on)].sum()) for on, _ in seen]
    assert sums == sorted(sums, reverse=True)
    assert all(bool(before["alive"][on].all()) for on, _ in seen)
    after = setting.supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A fourth candidate that is better on every image is taken.
    seen.clear()
    gain = 0.1
    other, row = chosen(setting, searcher)
    assert row["best"] == 3 and other != own
    assert torch.equal(seen[3][0], groups_of(table, other)[table.group])


def groups_of_switches(table: SwitchTable, on: torch.Tensor) -> torch.Tensor:
    return table.sum_groups(on.float()) > 0


def test_a_rival_must_be_better_by_two_standard_errors_of_the_difference():
    generator = torch.Generator().manual_seed(0)
    own = 1 + torch.rand(400, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    error = 1 / 399**0.5  # of a mean of this noise
    assert clearly_better(torch.stack([own, own + noise - 1.9 * error])) == 0
    assert clearly_better(torch.stack([own, own + noise - 2.1 * error])) == 1
    # Images that are as hard for both do not count: less than a standard error of either mean is enough.
    assert clearly_better(torch.stack([own, own - 0.001])) == 1
    # The lowest loss of those that are clear, whatever is lower but unclear.
    unclear, clear = own + 10 * noise - 15 * error, own - 0.01
    assert clearly_better(torch.stack([own, unclear, clear, own + 1])) == 2
    broken = torch.full_like(own, math.nan)
    assert clearly_better(torch.stack([own, broken])) == 0
    assert clearly_better(torch.stack([broken, own, own - 1])) == 2
    assert clearly_better(torch.stack([broken, broken])) == 0


@pytest.mark.parametrize("space", ["nas_bench_201", "darts"])
def test_a_random_control_has_as_many_operations(space):
    supernet = Supernet(SPACES[space], Shape(width=2, depth=1))
    alive = torch.ones(supernet.table.num_groups, dtype=torch.bool)
    alive[5] = False
    generator = torch.Generator().manual_seed(0)
    rule = SPACES[space].decision
    for num_ops in (3, 6) if space == "nas_bench_201" else (8, 40):
        found = [random_architecture(supernet, alive, rule, num_ops, generator) for _ in range(3)]
        assert [one.genotype.num_ops for one in found] == [num_ops] * 3
        assert len({one.genotype.to_json() for one in found}) == 3
        assert not any(bool(groups_of(supernet.table, one.genotype)[5]) for one in found)


@pytest.mark.parametrize("space", ["nas_bench_201", "darts", "tree"])
def test_groups_of_a_genotype_give_it_back(space):
    supernet = Supernet(SPACES[space], Shape(width=2, depth=1))
    table = supernet.table
    scores = torch.rand(table.num_groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = decide(supernet.space, table, scores > 0.5, scores).genotype
    on = groups_of(table, found)
    assert decide(supernet.space, table, on, scores).genotype == found
    operations = sum(switch.op is not None for switch, flag in zip(table.groups, on, strict=True) if flag)
    assert operations == found.num_ops


@pytest.mark.parametrize("posterior", ["variational_dropout", "natural_gradient"])
def test_a_run_records_what_was_drawn(tmp_path, posterior):
    folder = run_recipe(recipe(posterior, "table=embedded"), out=tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["phase"] == "sample"]
    assert row["distinct"] > 1
    noted = "mean_relevance" if posterior == "variational_dropout" else "exploration_noise"
    assert all(noted in row for row in rows if row["phase"] == "search")
    compared = json.loads((folder / "candidates.json").read_text())
    candidates = [Genotype.from_dict(data) for data in compared["candidates"]]
    assert len(candidates) == 6 and len({one.to_json() for one in candidates}) == row["distinct"]
    assert compared["best"] == row["best"]
    assert candidates[row["best"]].to_json() == (folder / "genotype.json").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["method"] == posterior and report["table"]["ranks"]["c10_test_200"] >= 1
    page = (folder / "report.html").read_text()
    assert ("Best of n" in page) == (posterior == "variational_dropout")


@pytest.mark.parametrize("norm_batches", [0, 1])
def test_an_inherited_network_is_the_one_that_was_judged(tmp_path, norm_batches):
    changes = ("retrain.inherit=true", f"sampling.norm_batches={norm_batches}", "sampling.baseline=false")
    folder = run_recipe(recipe("variational_dropout", *changes), out=tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = next(row for row in rows if row["phase"] == "sample")["losses"]
    setting = set_up(recipe("variational_dropout"))
    network = load_model(folder / "found")
    assert search_draws.evaluate(network, setting.search_loaders.heldout).loss == pytest.approx(
        min(losses), rel=1e-4
    )


@pytest.mark.parametrize(
    ("posterior", "change", "says"),
    [
        ("laplace", ["sampling.proxies=[params]"], "held-out loss judges those of posterior laplace"),
        (
            "variational_dropout",
            ["sampling.proxy_images=64"],
            "held-out loss judges those of posterior variational_dropout",
        ),
        ("natural_gradient", ["sampling.judge=heldout"], "no cell has weights of its own; set it to proxies"),
        ("natural_gradient", ["natural_gradient.initial_precision=0.5"], "below prior_precision 1.0"),
        ("natural_gradient", ["retrain.inherit=true"], "which posterior natural_gradient does not learn"),
    ],
)
def test_contradictions_are_named(posterior, change, says):
    with pytest.raises(RecipeError, match=says):
        set_up(recipe(posterior, *change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sampling.count=0", "sampling.count"),
        ("variational_dropout.initial=1.0", "variational_dropout.initial"),
        ("variational_dropout.initial=0.0", "variational_dropout.initial"),
        ("natural_gradient.prior_precision=0.0", "natural_gradient.prior_precision"),
        ("sampling.proxies=[synflw]", "did you mean 'synflow'"),
        ("sampling.proxies=[]", "sampling.proxies"),
    ],
)
def test_options_out_of_range_are_named(change, says):
    with pytest.raises(RecipeError, match=says):
        recipe("natural_gradient", change)


def test_the_papers_number_of_draws_is_the_default():
    for name, count in (("variational_dropout", 50), ("natural_gradient", 1), ("laplace", 1)):
        assert recipe(name, "sampling.count=null").num_draws == count


def test_a_softmax_and_random_cells_have_one_decision_only():
    for baseline, count in (("darts", 1), ("random", 1), ("magnitude", 16), ("none", 16)):
        overrides = [f"search.baseline={baseline}", "sampling.count=16"]
        assert load_recipe("nas_bench201", overrides=overrides).num_draws == count
