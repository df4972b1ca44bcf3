"""Many processes do what one does: shares, gradients, decisions, one writer, and what is left when one dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, distributed, nn

import sparsebayes
from sparsebayes.cli import main
from sparsebayes.errors import RecipeError, RunError
from sparsebayes.launcher import Process, launched
from sparsebayes.prune import Selection
from sparsebayes.recipe import parse_recipe
from sparsebayes.train import processes
from sparsebayes.train.distributed import (
    _joined,
    add_up_gradients_,
    agree_on_norms_,
    check_same,
    from_first,
    own_images,
    same_scores,
    share_of,
)
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.front import read_front
from sparsebayes.train.processes import join, leave, lost_connections, shared_folder
from sparsebayes.train.run import run_recipe
from tests.train.conftest import CORNERS

TASK = (
    CORNERS
    + '''
from sparsebayes.data import Loader, load
from sparsebayes.models import build
from sparsebayes.recipe.schema import TrainSection
from sparsebayes.train.fit import Phase, fit_

def odd():
    # The last batch of 27 has one image, and is left out; 331 - 60 - 27 * 10 = 1.
    return data(331)

class Net(nn.Module):
    """Computes in float64, so that the order of sums leaves no trace."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.hidden = nn.Linear(128, 24)
        self.out = nn.Linear(24, 3)
        self.double()

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x.double())), 2)
        return self.out(torch.relu(self.hidden(torch.flatten(x, 1))))

def mnist_losses():
    """Training loss of LeNet-5's first epoch on some of MNIST, and the held-out loss after it, in float32."""
    whole = load("embedded_mnist")
    def loader(rows, **options):
        images = Images(whole.train.images[rows].clone(), whole.train.labels[rows].clone())
        return Loader(images, mean=whole.mean, std=whole.std, **options)
    train = loader(slice(0, None, 5), batch_size=98, shuffle=True, augment="shift")
    heldout = loader(slice(1, 2500, 10), batch_size=200, shuffle=False)
    torch.manual_seed(0)
    model = build("lenet5_caffe", {})
    phase = Phase(name="first", epochs=1, lr=0.03, seed=0)
    seen = []
    end = fit_(model, train, heldout, phase, TrainSection(), on_epoch=lambda epoch: seen.append(epoch.train_loss))
    return [*seen, end.loss]
'''
)

# Each process writes down what it decides, and a process can be told to die within a phase.
WORKER = """
import json, os, signal, sys
from pathlib import Path
from sparsebayes.cli import main
from sparsebayes.train import compress

witness = Path("witness") / os.environ["RANK"]
remove, fit = compress.remove_next, compress.fit_
deaths = os.environ.get("DEATHS", "").split(",")
death = deaths[min(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), len(deaths) - 1)]

def remove_next(*arguments, **options):
    removal = remove(*arguments, **options)
    with witness.open("a") as file:
        file.write(removal.selection.to_json() + "\\0")
    return removal

def fit_(model, loader, heldout, phase, settings, *, on_epoch, **options):
    def dying(epoch):
        if phase.name.startswith(death) and epoch.epoch == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        on_epoch(epoch)

    if phase.name == "pretrain" and not death:
        from shared_task import mnist_losses

        witness.with_name("mnist" + os.environ["RANK"]).write_text(json.dumps(mnist_losses()))
    return fit(model, loader, heldout, phase, settings, on_epoch=dying if death else on_epoch, **options)

if __name__ == "__main__":
    compress.remove_next, compress.fit_ = remove_next, fit_
    main(prog_name="sparsebayes")
"""

RECIPE = """
version: 1
name: corners
device: cpu
data: {name: "shared_task:odd", holdout: 60, batch_size: 27, augment: shift}
model: {name: "shared_task:Net"}
groups: units
curvature: {num_images: 121, estimator: exact}
train:
  distill: 0.5
  pretrain: {epochs: 3}
  cycles: {count: 2, epochs: 3, shrink: 0.4}
  finetune: {epochs: 3}
export: {onnx: false}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder with the user's code, and three finished runs: `one` process, `two`, and two that `died` twice."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "shared_task.py").write_text(TASK)
    (folder / "worker.py").write_text(WORKER)
    (folder / "corners.yaml").write_text(RECIPE)
    for name in ("witness", "scratch"):
        (folder / name).mkdir()
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("shared_task", None)
    os.chdir(before)


def torchrun(
    place: Path, *arguments: str, restarts: int = 0, deaths: str = ""
) -> subprocess.CompletedProcess[str]:
    """Start two processes with `sparsebayes run`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    package = str(Path(sparsebayes.__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(place), package]),
        "TMPDIR": str(place / "scratch"),
        "DEATHS": deaths,
    }
    command = [*launcher, "--max-restarts", str(restarts), "worker.py", "run", *arguments]
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    """The run of a single process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = run_recipe(parse_recipe(RECIPE, "corners.yaml"), out=place / "one", quiet=True)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """The same run on two processes."""
    done = torchrun(place, "corners.yaml", "--out", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: two") == done.stdout.count("point 0:") == 1, done.stdout
    return place / "two"


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("train_loss", "heldout_loss") if key in row]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_compute_what_one_computes(one: Path, two: Path) -> None:
    """In float64, from the first loss through two removals to the last one."""
    assert len(losses(one)) > 20
    torch.testing.assert_close(
        torch.tensor(losses(two), dtype=torch.float64),
        torch.tensor(losses(one), dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    selections = [Selection.from_json((folder / "selection.json").read_text()) for folder in (one, two)]
    assert torch.equal(selections[0].on, selections[1].on)
    assert not bool(selections[0].on.all())
    weights = [dict(sparsebayes.load(folder).state_dict()) for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-9, atol=1e-12)


def test_both_processes_decide_alike_and_the_first_one_writes(place: Path, one: Path, two: Path) -> None:
    decisions = [(place / "witness" / rank).read_text() for rank in ("0", "1")]
    assert decisions[0] == decisions[1]
    assert decisions[0].count("\0") >= 2
    assert files(two) == files(one)
    assert not list((place / "scratch").glob("sparsebayes-*")), "the other process leaves nothing behind"
    assert len((two / "metrics.jsonl").read_text().splitlines()) == len(
        (one / "metrics.jsonl").read_text().splitlines()
    )


def test_a_death_ends_all_and_a_restart_and_a_resumption_go_on(place: Path, two: Path) -> None:
    """Killed in a cycle, restarted by torchrun, killed in fine-tuning, resumed by hand."""
    arguments = ("corners.yaml", "--out", "died")
    died = torchrun(place, *arguments, restarts=1, deaths="cycle 1,finetune")
    assert died.returncode != 0
    # torchrun's SIGTERM follows a death so soon that it may come before the broken connection is seen.
    said = re.findall(r"another process of the run is gone|^terminated$", died.stderr, re.MULTILINE)
    assert len(said) == 2, died.stderr
    assert died.stdout.count("point 0:") == 1, "the restart began anew"
    assert read_front(place / "died" / "pareto.json")[-1].point >= 2
    assert (place / "died" / "checkpoint.pt").is_file()
    done = torchrun(place, "corners.yaml", "--resume", "died")
    assert done.returncode == 0, done.stderr
    assert (place / "died" / "pareto.json").read_text() == (two / "pareto.json").read_text()
    assert losses(place / "died") == losses(two)


def test_float32_on_mnist_differs_by_rounding_alone(place: Path, two: Path) -> None:
    from shared_task import mnist_losses

    alone = mnist_losses()
    shared = [json.loads((place / "witness" / f"mnist{rank}").read_text()) for rank in (0, 1)]
    assert shared[0] == shared[1], "every process knows the losses of all"
    assert len(alone) == 2
    assert shared[0] == pytest.approx(alone, rel=1e-4)


# One process stands for many: these replace what torch.distributed would say.


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be one of three processes; returns a function that says which."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)

    def become(rank: int) -> None:
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)

    return become


@pytest.mark.parametrize("count", [5, 6, 7, 100])
def test_shares_of_a_batch_make_up_the_batch(three, count: int) -> None:
    shares = []
    for rank in range(3):
        three(rank)
        shares.append(share_of(count))
    assert sum(share.weight for share in shares) == pytest.approx(1)
    seen = [image for share in shares for image in range(count)[share.rows]]
    assert sorted(seen) == (sorted([*range(count)] * 3) if count < 6 else [*range(count)])
    values = torch.randn(count, dtype=torch.float64)
    mean = sum(share.weight * values[share.rows].mean() for share in shares)
    torch.testing.assert_close(mean, values.mean())


@pytest.mark.parametrize("num_images", [None, 3, 8, 9])
def test_images_are_dealt_out_once(three, num_images: int | None) -> None:
    batches = [(torch.arange(a, b), torch.arange(a, b)) for a, b in [(0, 4), (4, 5), (5, 9), (9, 11)]]
    dealt = []
    for rank in range(3):
        three(rank)
        own = [x for x, y in own_images(batches, num_images)]
        assert all(len(x) for x in own)
        dealt.append(torch.cat(own))
        assert bool((dealt[-1] % 3 == rank).all())
    assert sorted(torch.cat(dealt).tolist()) == list(range(num_images or 11))


def test_evaluations_of_shares_make_up_that_of_all_images() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.arange(20) % 3
    whole = evaluate(model, [(x, y)])
    parts = [evaluate(model, [(x[rows], y[rows])]) for rows in (slice(0, 1), slice(1, 8), slice(8, 20))]
    joined = _joined([(p.num_images, p.loss, p.standard_error, p.error, p.chance) for p in parts])
    assert joined.num_images == 20
    for name in ("loss", "standard_error", "error", "chance"):
        assert getattr(joined, name) == pytest.approx(getattr(whole, name), rel=1e-6), name


def test_gradients_of_any_layout_are_weighted_and_added(three, monkeypatch: pytest.MonkeyPatch) -> None:
    three(0)
    others: list[Tensor] = []

    def all_reduce(flat: Tensor) -> None:
        others.append(torch.arange(len(flat), dtype=flat.dtype))
        flat.add_(others[-1])

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    image = nn.Parameter(torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    unused, row = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(4))
    image.grad = torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    row.grad = torch.randn(4)
    expected = [
        0.25 * image.grad + torch.arange(24.0).view(2, 3, 2, 2),
        0.25 * row.grad + torch.arange(24.0, 28.0),
    ]
    add_up_gradients_([image, unused, row], 0.25)
    torch.testing.assert_close([image.grad, row.grad], expected)
    assert len(others) == 1, "one sum for all"
    assert unused.grad is None


def test_norm_statistics_are_averaged(three, monkeypatch: pytest.MonkeyPatch) -> None:
    three(1)
    monkeypatch.setattr(distributed, "all_reduce", lambda value: value.add_(4.0))
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    agree_on_norms_(model)
    torch.testing.assert_close(model[0].running_mean, torch.full((2,), 4 / 3))
    torch.testing.assert_close(model[0].running_var, torch.full((2,), 5 / 3))
    assert int(model[0].num_batches_tracked) == 0


def test_different_decisions_are_found(three, monkeypatch: pytest.MonkeyPatch) -> None:
    three(0)

    def gather(disagreeing: int):
        def all_gather(found: list[Tensor], own: Tensor) -> None:
            for rank, value in enumerate(found):
                value.copy_(own + (rank == disagreeing))

        return all_gather

    monkeypatch.setattr(distributed, "all_gather", gather(-1))
    check_same("selection", "a")
    monkeypatch.setattr(distributed, "all_gather", gather(2))
    with pytest.raises(RunError, match="same selection in every process, but process 2 has another"):
        check_same("selection", "a")


def test_a_folder_that_cannot_be_opened_is_known_to_all(three, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(processes, "_send", sent.append)
    monkeypatch.setattr(processes, "_received", lambda: sent.pop(0))

    def refuse() -> Path:
        raise RunError("two exists already")

    for rank in (0, 1):
        three(rank)
        with pytest.raises(RunError, match="two exists already"), shared_folder(refuse):
            raise AssertionError


def test_the_others_get_the_state_and_write_elsewhere(
    three, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(processes, "_send", sent.append)
    monkeypatch.setattr(processes, "_received", lambda: sent.pop(0))
    (tmp_path / "points" / "0").mkdir(parents=True)
    state = {"pareto.json": "[]", "checkpoint.pt": "c", "checkpoint.earlier.pt": "e", "points/0/m": "\0"}
    for name, text in {**state, "metrics.jsonl": "{}"}.items():
        (tmp_path / name).write_text(text)
    three(0)
    with shared_folder(lambda: tmp_path) as folder:
        assert folder == tmp_path
    three(1)
    with shared_folder(lambda: tmp_path) as folder:
        assert folder != tmp_path
        assert {name: (folder / name).read_text() for name in files(folder)} == state
    assert not folder.exists()


def test_a_broken_connection_is_a_sentence(three) -> None:
    three(0)
    with pytest.raises(RunError, match=r"is gone \(.*peer.*--resume"), lost_connections():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="shapes"), lost_connections():
        raise RuntimeError("shapes do not fit")


def test_a_single_process_needs_nobody() -> None:
    score = torch.randn(3)
    assert same_scores(score) is score
    assert from_first(lambda: 2.5) == 2.5
    assert join(parse_recipe(RECIPE, "corners.yaml"))
    assert leave()
    assert share_of(1).weight == 1
    assert not distributed.is_initialized()


def test_processes_are_numbered_by_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == Process() and launched().is_first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launched() == Process(1, 4, 1, 2)
    assert not launched().is_first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["posterior=natural_gradient"], "got posterior: natural_gradient; start it without torchrun"),
        (["data.batch_size=7"], "data.batch_size is 7, but 4 processes share it and need at least 8"),
        (["curvature.num_images=3"], "curvature.num_images is 3, but 4 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match=message):
        join(parse_recipe(RECIPE, "corners.yaml", overrides=overrides))


def test_searches_and_several_seeds_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    search = CliRunner().invoke(main, ["run", "nas_proxy"])
    assert search.exit_code == 2
    assert "got task: search; start it without torchrun" in search.stderr
    seeds = CliRunner().invoke(main, ["run", "quickstart", "--seeds", "2"])
    assert seeds.exit_code == 2
    assert "expected --seed under torchrun, got --seeds" in seeds.stderr
    assert not list(tmp_path.iterdir())
