"""What a user gets wrong, through the whole program: one sentence, exit status 2, and nothing half-written.

Nothing is replaced by a stand-in except the network connection; `test_cli.py` holds the command line alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import sparsebayes
from sparsebayes.cli import main

CODE = """
import torch
from torch import nn
from sparsebayes.data import Dataset, Images, load


def digits():
    full = load("embedded_mnist")
    few = torch.arange(600)
    train, test = full.train.subset(few), full.test.subset(few[:100])
    return Dataset("few", train, test, 10, full.mean, full.std)


def seven():
    return 7


def broken():
    raise KeyError("weights")


def leaves():
    raise SystemExit(0)


def triple():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))


def images():
    return nn.Conv2d(1, 10, 28)
"""

RECIPE = """\
version: 1
name: few
threads: 1
device: cpu
data: {name: "bad_input_code:digits", holdout: 100, batch_size: 100}
model: {name: lenet_300_100}
curvature: {num_images: 100}
train:
  pretrain: {epochs: 1}
  cycles: {count: 1}
  finetune: {epochs: 1}
export: {onnx: false}
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="sparsebayes")


def complaint(*arguments: str) -> str:
    """What standard error says of a mistake, after `error: `; exit status 2 and no traceback are checked."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


def sentence(*arguments: str) -> str:
    """A complaint of one line."""
    text = complaint(*arguments)
    assert "\n" not in text
    return text


def write_code(folder: Path) -> None:
    (folder / "bad_input_code.py").write_text(CODE, encoding="utf-8")
    (folder / "few.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """An empty working folder with a recipe and code of the user's."""
    write_code(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("bad_input_code", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("finished")
    write_code(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        result = call("run", "few.yaml", "--out", "run", "--quiet")
    sys.modules.pop("bad_input_code", None)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def damaged(finished, here):
    """A copy of a finished run, to damage."""
    shutil.copytree(finished, here / "run")
    return here / "run"


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- recipes and options


def test_all_mistakes_come_at_once_each_with_its_line(here):
    Path("bad.yaml").write_text(
        "version: 1\nname: bad\nsed: 1\nmodel: {name: lenet5}\n"
        "train: {lr: fast, pretrain: {epochs: 1.5}}\ngroups: [unit]\ndata: [1]\n",
        encoding="utf-8",
    )
    head, *lines = complaint("run", "bad.yaml", "train.lrr=1").splitlines()
    assert head == "7 mistakes in bad.yaml:"
    expected = [
        "  bad.yaml:3: unknown key 'sed'; did you mean 'seed'?",
        "  bad.yaml:4: model.name: unknown model 'lenet5'; did you mean 'lenet5_caffe'?",
        "  bad.yaml:5: train.lr: expected a number, got 'fast'",
        "  bad.yaml:5: train.pretrain.epochs: expected a whole number, got 1.5",
        "  bad.yaml:6: groups[0]: unknown rule 'unit'; did you mean 'units'?",
        "  bad.yaml:7: data: expected a section of key: value lines, got a list of 1",
        "  override 'train.lrr=1': train: unknown key 'lrr'; did you mean 'lr'?",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["groups=unitz"], "groups: unknown rule 'unitz'; did you mean 'units'? Choices: blocks, branches,"),
        (["model.name=lenet5"], "model.name: unknown model 'lenet5'; did you mean 'lenet5_caffe'?"),
        (["device=gpu"], "device: expected 'auto', 'cpu' or 'cuda', got 'gpu'; did you mean 'cpu'?"),
        (["train.lr=1e6"], "train.lr: expected a number <= 100, got 1000000.0"),
        (
            ["data.holdout=600"],
            "holdout must be between 1 and 599, as there are 600 training images, got 600",
        ),
        (
            ["data.batch_size=501"],
            "data.batch_size is 501, but only 500 images are left to train on; lower it",
        ),
    ],
)
def test_values_that_cannot_be_carried_out(changes, text):
    assert text in sentence("run", "few.yaml", *changes)
    assert not Path("runs").exists()


def test_a_grouping_that_matches_nothing_names_the_layers_there_are():
    text = sentence("run", "few.yaml", "groups=[{rule: weights, include: [zzz]}]")
    assert text == (
        "the rule 'weights' found nothing to group (include zzz); layers of the model: fc1, fc2, fc3"
    )


def test_a_training_that_only_collapses_says_what_to_lower():
    text = sentence("run", "few.yaml", "train.pretrain.lr=100")
    assert re.match(
        r"the network collapsed in phase 'pretrain' .*; lower train.lr or set train.grad_clip", text
    )


# --- data


def idx(path: Path, magic: int, shape: tuple[int, ...], num_bytes: int) -> None:
    path.write_bytes(struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(num_bytes))


@pytest.fixture
def raw(here, monkeypatch):
    """A folder $SPARSEBAYES_DATA with two images of each part, to damage."""
    folder = here / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        idx(folder / f"{part}-images-idx3-ubyte", 0x803, (2, 28, 28), 2 * 784)
        idx(folder / f"{part}-labels-idx1-ubyte", 0x801, (2,), 2)
    monkeypatch.setenv("SPARSEBAYES_DATA", str(here / "data"))
    return folder


def run_mnist() -> str:
    text = sentence("run", "few.yaml", "data.name=mnist", "--out", "out")
    assert not Path("out").exists()
    return text


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0, "expected a header of 16 bytes, got 0 bytes"),
        (7, "expected a header of 16 bytes, got 7 bytes"),
        (1000, "expected 1568 bytes after the header, got only 984"),
    ],
)
def test_a_truncated_data_file_is_named(raw, length, text):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    assert run_mnist() == f"{path} is damaged: {text}; delete it and get it again"


def test_a_data_file_of_another_kind_is_named(raw):
    path = raw / "train-labels-idx1-ubyte"
    shutil.copyfile(raw / "train-images-idx3-ubyte", path)
    assert run_mnist().startswith(f"{path} is damaged: expected magic number 0x00000801, got 0x00000803")
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(b"no gzip")
    assert run_mnist().startswith(f"{path}.gz is damaged: expected a complete gzip file, got Not a gzipped")


def test_without_data_and_network_the_ways_out_are_named(here, monkeypatch):
    monkeypatch.setattr("sparsebayes.data.download._any_answers", lambda urls: False)
    text = sentence("run", "few.yaml", "data.name=mnist", f"data.root={here / 'none'}")
    assert text.startswith(
        f"mnist is not in {here / 'none' / 'MNIST' / 'raw'}, and no server of MNIST answers;"
    )
    assert "data.root or $SPARSEBAYES_DATA" in text
    assert "data.name=embedded_mnist" in text
    assert not (here / "none").exists()
    assert not Path("runs").exists()


# --- the user's own code


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere:net", r"model 'nowhere:net': module 'nowhere' cannot be imported .*; install it, or run"),
        ("bad_input_code:net", r"model .* has no function or class 'net'; check the part after ':'"),
        ("bad_input_code:seven", r"model 'bad_input_code:seven' must return a torch.nn.Module, got int"),
        ("bad_input_code:broken", r"model 'bad_input_code:broken' failed .*: KeyError: 'weights'"),
        (
            "bad_input_code:leaves",
            r"the code of your model or data ended the program \(SystemExit: 0\) before",
        ),
        ("bad_input_code:triple", r".*\b3 outputs; .*model.options.num_classes"),
        (
            "bad_input_code:images",
            r"expected logits of shape \[2, classes\] from the model, got shape \[2, 10, 1",
        ),
    ],
)
def test_a_model_of_the_users_that_does_not_do(name, text):
    assert re.match(text, sentence("run", "few.yaml", f"model.name={name}"))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seven", "must return a sparsebayes.data.Dataset, got int"),
        ("broken", "failed with options {}: KeyError: 'weights'"),
    ],
)
def test_data_of_the_users_that_do_not_do(name, text):
    data = f"bad_input_code:{name}"
    assert sentence("run", "few.yaml", f"data.name={data}") == f"data source '{data}' {text}"


def test_a_data_set_of_unknown_size_is_asked_for():
    import torch

    batch = (torch.zeros(2, 1, 28, 28), torch.tensor([3, 7]))
    sparse = sparsebayes.wrap(sparsebayes.models.build("lenet_300_100"))
    with pytest.raises(sparsebayes.errors.DataError, match=r"size of the training set .*num_data=N"):
        sparse.update([batch])


# --- folders


def test_an_output_folder_that_is_not_a_run_is_never_touched():
    Path("mine").mkdir()
    Path("mine/notes").write_text("keep", encoding="utf-8")
    for options in ([], ["--overwrite"]):
        text = "mine exists already; give another --out, --overwrite a run there, or --resume it"
        assert sentence("run", "few.yaml", "--out", "mine", *options) == text
    assert files(Path("mine")) == {"notes": b"keep"}
    text = sentence("run", "few.yaml", "--out", "mine/notes/run")
    assert text == "cannot write the run folder mine/notes/run: Not a directory"
    assert sentence("run", "few.yaml", "--resume", "mine").startswith(
        "mine is not a run folder: expected recipe"
    )


@pytest.mark.parametrize("command", ["export", "report"])
def test_a_folder_that_is_no_run_is_refused(command):
    Path("mine").mkdir()
    assert sentence(command, "nothing").startswith("expected a run folder, got 'nothing', which is no folder")
    assert re.match(r"mine.* expected ", sentence(command, "mine") + " ")
    assert list(Path("mine").iterdir()) == []


def test_a_point_that_is_not_there_is_refused(damaged):
    before = files(damaged)
    assert sentence("export", "run", "--point", "9") == "the run has no point 9; it has points 0 to 1"
    text = r"no point of the run has at most 10 parameters; the smallest has \d+$"
    assert re.match(text, sentence("export", "run", "--max-params", "10"))
    assert files(damaged) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pareto.json", r"run/pareto.json is damaged or incomplete: "),
        ("points/1/model.safetensors", r"run/points/1/model.safetensors is damaged or cut short"),
        ("points/1/architecture.json", r"run/points/1/architecture.json is not JSON"),
    ],
)
def test_a_damaged_run_is_not_exported(damaged, name, text):
    halve(damaged / name)
    assert re.match(text, sentence("export", "run", "--point", "1"))
    assert not (damaged / "export-1").exists()


@pytest.mark.parametrize("name", ["report.json", "pareto.json", "metrics.jsonl"])
def test_a_damaged_run_keeps_its_old_report(damaged, name):
    halve(damaged / name)
    before = files(damaged)
    assert re.match(rf"run/{re.escape(name)}.* is damaged or incomplete: ", sentence("report", "run"))
    assert files(damaged) == before


def test_a_good_run_is_reported_and_exported_again(damaged):
    page = (damaged / "report.html").read_bytes()
    (damaged / "report.html").unlink()
    assert call("report", "run").exit_code == 0
    assert (damaged / "report.html").read_bytes() == page
    result = call("export", "run", "--point", "0", "--out", "dense")
    assert result.stdout == "exported to dense\n"
    assert sorted(files(Path("dense"))) == ["architecture.json", "model.onnx", "model.safetensors"]
    assert sum(p.numel() for p in sparsebayes.load("dense").parameters()) == 266_610


# --- interruption


def interrupted(number: signal.Signals) -> tuple[list[str], dict[str, str]]:
    """Interrupt a run by a signal; the command that it printed, and the environment to call it in."""
    root = str(Path(sparsebayes.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sparsebayes", "run", "few.yaml", "train.pretrain.epochs=20"]
    command += ["--seed", "3", "--out", "my run"]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        patience = time.monotonic() + 60
        while not Path("my run/checkpoint.pt").exists() and time.monotonic() < patience:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    [line, last] = stderr.splitlines()
    assert (process.returncode, last) == (
        (130, "interrupted") if number == signal.SIGINT else (143, "terminated")
    )
    assert line.startswith("continue with: ")
    return shlex.split(line.removeprefix("continue with: ")), environment


def test_an_interrupted_run_goes_on_with_the_very_command_that_it_printed():
    again, environment = interrupted(signal.SIGINT)
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("run folder: my run\n")
    assert Path("my run/report.html").is_file()


def test_a_terminated_run_says_how_to_go_on():
    again, _ = interrupted(signal.SIGTERM)
    assert again[:3] == [sys.executable, "-m", "sparsebayes"]
    assert again[3:] == ["run", "few.yaml", "train.pretrain.epochs=20", "seed=3", "--resume", "my run"]
    for path in Path("my run").glob("checkpoint*.pt"):
        halve(path)
    result = call(*again[3:])
    assert result.exit_code == 0, result.output
    assert "checkpoint.earlier.pt is damaged" in result.output or "checkpoint.pt is damaged" in result.output
    assert "begins again" in result.output
