"""The command line: what is called, what is printed, and with which exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from sparsebayes import __version__
from sparsebayes.cli import main
from sparsebayes.cli.outcomes import missed_budget
from sparsebayes.errors import RunError, Terminated
from sparsebayes.recipe import dump_recipe, json_schema, load_recipe, parse_recipe, shipped_recipes
from sparsebayes.recipe.schema import Recipe
from sparsebayes.train.folder import is_finished

SMALL = "# A small one.\nversion: 1\nname: tiny\nmodel: {name: lenet5_caffe}\npresets: {smoke: {seed: 7}}\n"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="sparsebayes")


def complaint(*arguments: str) -> str:
    """The one sentence that a mistaken command ends in."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stand-ins for what the commands call; the list of the calls made."""
    made: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def stand_in(name: str) -> object:
        def function(*args: object, **kwargs: object) -> Path:
            made.append((name, args, kwargs))
            return Path("made/by") / name

        return function

    train, run = types.ModuleType("sparsebayes.train"), types.ModuleType("sparsebayes.train.run")
    run.run_recipe = stand_in("run_recipe")
    export = types.ModuleType("sparsebayes.train.export")
    export.export_point, export.quantize_export = stand_in("export_point"), stand_in("quantize_export")
    report = types.ModuleType("sparsebayes.report")
    report.write_report, report.write_comparison = stand_in("write_report"), stand_in("write_comparison")
    for module in (train, run, export, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SMALL, encoding="utf-8")
    Path("first").mkdir()
    Path("second").mkdir()
    return made


def test_run_gives_the_resolved_recipe_and_prints_the_run_folder(calls):
    result = call(
        "run", "tiny.yaml", "train.lr=0.5", "--preset", "smoke", "data.holdout=9", "--device", "cpu"
    )
    assert result.exit_code == 0
    assert result.output == f"run folder: {Path('made/by/run_recipe')}\n"
    [(_, (recipe,), options)] = calls
    assert isinstance(recipe, Recipe)
    assert (recipe.train.lr, recipe.data.holdout, recipe.seed, recipe.device) == (0.5, 9, 7, "cpu")
    assert options == {"out": None, "resume": None, "quiet": False, "overwrite": False}


def test_run_passes_its_options_on(calls):
    assert call("run", "tiny.yaml", "--seed", "3", "--out", "o", "--overwrite", "--quiet").exit_code == 0
    assert call("run", "tiny.yaml", "--resume", "first").exit_code == 0
    assert [options for _, _, options in calls] == [
        {"out": Path("o"), "resume": None, "quiet": True, "overwrite": True},
        {"out": None, "resume": Path("first"), "quiet": False, "overwrite": False},
    ]
    assert calls[0][1][0].seed == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny.yaml", "train.lr=x"], "override 'train.lr=x': train.lr: expected a number, got 'x'"),
        (
            ["tiny.yaml", "--preset", "smok"],
            "tiny.yaml: unknown preset 'smok'; did you mean 'smoke'? Choices: smoke",
        ),
        (["tiny"], "unknown recipe 'tiny'"),
        (
            ["tiny.yaml", "--device", "gpu"],
            "Invalid value for '--device': 'gpu' is not one of 'auto', 'cpu', 'cuda'",
        ),
        (["tiny.yaml", "--seed", "x"], "Invalid value for '--seed': 'x' is not a valid integer"),
        (
            ["tiny.yaml", "--seed", "-1"],
            "Invalid value for '--seed': -1 is not in the range 0<=x<=4294967295",
        ),
        (["tiny.yaml", "--sed", "1"], "No such option '--sed'"),
        (
            ["tiny.yaml", "--train.lr=1"],
            "No such option '--train.lr'. A key of the recipe is written without dashes: train.lr=VALUE; see",
        ),
        (
            ["tiny.yaml", "--", "--train.lr=1"],
            "override '--train.lr=1': expected key=value without dashes, such as",
        ),
        ([], "Missing argument 'RECIPE'; see 'sparsebayes run --help'"),
        (["tiny.yaml", "--resume", "none"], "expected a run folder, got 'none', which is no folder"),
        (
            ["tiny.yaml", "--resume", "tiny.yaml"],
            "expected a run folder, got 'tiny.yaml', which is no folder",
        ),
        (
            ["tiny.yaml", "--resume", "first", "--out", "o"],
            "expected either --resume or --out and --overwrite, got",
        ),
        (
            ["tiny.yaml", "--resume", "first", "--overwrite"],
            "expected either --resume or --out and --overwrite, got",
        ),
    ],
)
def test_mistakes_in_run_are_sentences_and_run_nothing(calls, arguments, sentence):
    assert complaint("run", *arguments).startswith(sentence)
    assert calls == []


def test_the_devices_of_the_option_are_those_of_the_recipe():
    [option] = [parameter for parameter in main.commands["run"].params if parameter.name == "device"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == json_schema()["$defs"]["Recipe"]["properties"]["device"]["enum"]


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["device=cuda"]])
def test_a_gpu_that_is_not_there_is_one_sentence(calls, monkeypatch, arguments):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sentence = "expected a CUDA device for 'device: cuda', found none; use --device cpu or auto"
    assert complaint("run", "tiny.yaml", *arguments) == sentence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert call("run", "tiny.yaml", *arguments).exit_code == 0


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_recipe(*args: object, **kwargs: object) -> Path:
        raise error

    monkeypatch.setattr(sys.modules["sparsebayes.train.run"], "run_recipe", run_recipe)


def test_an_error_of_the_package_is_one_sentence(calls, monkeypatch):
    fail_with(monkeypatch, RunError("the disk is full; make room"))
    assert complaint("run", "tiny.yaml") == "the disk is full; make room"


def test_an_error_of_the_program_keeps_its_traceback(calls, monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError("a bug"))
    result = call("run", "tiny.yaml")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("interrupt", "options", "folder"),
    [
        (KeyboardInterrupt("runs/tiny 1"), [], "'runs/tiny 1'"),
        (KeyboardInterrupt(), ["--out", "o"], "o"),
        (KeyboardInterrupt(), ["--resume", "first"], "first"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(calls, monkeypatch, interrupt, options, folder):
    fail_with(monkeypatch, interrupt)
    result = call(
        "run", "tiny.yaml", "groups=[units, features]", "--preset", "smoke", "--seed", "3", *options
    )
    assert result.exit_code == 130
    assert result.stderr == (
        "continue with: sparsebayes run tiny.yaml 'groups=[units, features]' seed=3 --preset smoke "
        f"--resume {folder}\ninterrupted\n"
    )


def test_an_interruption_without_a_folder_is_just_said(calls, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = call("run", "tiny.yaml")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_export_passes_its_options_on(calls):
    assert call("export", "first").output == f"exported to {Path('made/by/export_point')}\n"
    assert call("export", "first", "--point", "3", "--out", "o", "--legacy").exit_code == 0
    assert call("export", "first", "--max-params", "500", "--overwrite").exit_code == 0
    usual = {"out": None, "overwrite": False, "legacy": False}
    assert [(args, kwargs) for _, args, kwargs in calls] == [
        ((Path("first"),), {**usual, "point": None, "max_params": None}),
        ((Path("first"),), {**usual, "point": 3, "max_params": None, "out": Path("o"), "legacy": True}),
        ((Path("first"),), {**usual, "point": None, "max_params": 500, "overwrite": True}),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["first", "--point", "1", "--max-params", "5"],
            "expected --point or --max-params, got both; give one of",
        ),
        (
            ["first", "--data-root", "here"],
            "--data-root is for --int8, as nothing else of an export reads the data",
        ),
        (["first", "--point", "-1"], "Invalid value for '--point': -1 is not in the range x>=0"),
        (["first", "--max-params", "0"], "Invalid value for '--max-params': 0 is not in the range x>=1"),
        (["none"], "expected a run folder, got 'none', which is no folder; runs/ holds them by default"),
    ],
)
def test_mistakes_in_export_are_sentences(calls, arguments, sentence):
    assert complaint("export", *arguments).startswith(sentence)
    assert calls == []


def test_report_writes_the_report_of_each_run(calls):
    result = call("report", "first", "second")
    pages = f"report: {Path('first/report.html')}\nreport: {Path('second/report.html')}\n"
    assert result.output == f"{pages}comparison: {Path('made/by/write_comparison')}\n"
    runs = [Path("first"), Path("second")]
    assert calls[:2] == [("write_report", (run,), {}) for run in runs]
    assert calls[2] == ("write_comparison", (tuple(runs), Path("comparison.html")), {"overwrite": False})
    assert call("report", "first", "second", "--out", "o.html", "--overwrite").exit_code == 0
    assert calls[-1] == ("write_comparison", (tuple(runs), Path("o.html")), {"overwrite": True})
    assert complaint("report", "first", "--out", "o.html").startswith("expected two or more runs for --out")


def test_report_of_a_whole_folder_leaves_out_what_is_no_finished_run(calls):
    for name in ("second", "third"):
        Path(name, "recipe.yaml").parent.mkdir(exist_ok=True)
        Path(name, "recipe.yaml").write_text(SMALL)
    Path("second/report.json").write_text("{}")
    Path("comparison.html").write_text("")
    result = call("report", "comparison.html", "first", "second", "third")
    assert result.stderr == "left out: comparison.html is a comparison\nleft out: third has not ended\n"
    assert [args for name, args, _ in calls if name == "write_report"] == [
        (Path("first"),),
        (Path("second"),),
    ]
    result = call("report", "third", "comparison.html")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("error: none of these runs has ended; resume one, and report then\n")


def test_report_writes_nothing_where_one_folder_is_missing(calls):
    assert complaint("report", "first", "none").startswith("expected a run folder, got 'none'")
    assert complaint("report").startswith("Missing argument 'RUN...'; see 'sparsebayes report --help'")
    assert calls == []


def test_validate_says_what_the_recipe_does(calls):
    changes = ["prune.budget.macs=0.25", "model.options={num_classes: 3}", "groups=[units, '2:4']"]
    result = call("validate", "tiny.yaml", *changes, "--preset", "smoke", "--no-estimate")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "name       tiny",
        "data       embedded_mnist, 1000 held out, batches of 128, augment none",
        'model      lenet5_caffe {"num_classes": 3}',
        "groups     units + 2:4",
        "posterior  laplace, switches, by evidence",
        "strength   auto, price none, budget 0.25 of MACs",
        "epochs     4 dense, up to 12 cycles of 1, 10 after",
        "optimizer  sgd, lr 0.05",
        "presets    smoke",
        "recipe is valid",
    ]
    assert (
        "budget 0.1 of params"
        in call("validate", "tiny.yaml", "prune.budget.params=0.1", "--no-estimate").output
    )
    assert "price none, budget none" in call("validate", "tiny.yaml", "--no-estimate").output


def test_validate_lists_every_mistake(calls):
    Path("bad.yaml").write_text(SMALL + "sed: 1\ntrain: {lr: x}\n", encoding="utf-8")
    assert complaint("validate", "bad.yaml").splitlines()[0] == "2 mistakes in bad.yaml:"
    assert "bad.yaml:6: unknown key 'sed'; did you mean 'seed'?" in complaint("validate", "bad.yaml")


def test_show_prints_a_recipe_that_can_be_run(calls):
    result = call("show", "tiny.yaml", "--preset", "smoke", "train.lr=0.5")
    recipe = load_recipe("tiny.yaml", preset="smoke", overrides=["train.lr=0.5"])
    assert result.output == dump_recipe(recipe)
    assert parse_recipe(result.output, "shown") == recipe


def test_show_prints_the_schema():
    assert json.loads(call("show", "--schema").output) == json_schema()
    assert complaint("show") == "expected a recipe or --schema, got neither"
    assert complaint("show", "quickstart", "--schema") == "expected a recipe or --schema, got both"


def test_list_names_every_recipe_and_what_it_does():
    lines = call("list").output.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    [line] = [line for line in lines if line.startswith("quickstart ")]
    assert line.endswith("  A first run: LeNet-5 on the small MNIST sample inside the package, in minutes.")


def test_copy_writes_the_text_of_a_recipe(calls):
    text = shipped_recipes()["quickstart"].read_text(encoding="utf-8")
    assert call("copy", "quickstart").output == (
        "copied to quickstart.yaml; run it with: sparsebayes run quickstart.yaml\n"
    )
    assert call("copy", "quickstart", "first").exit_code == 0
    assert call("copy", "quickstart", "my own.yaml").output.endswith("sparsebayes run 'my own.yaml'\n")
    for path in ("quickstart.yaml", "first/quickstart.yaml", "my own.yaml"):
        assert Path(path).read_text(encoding="utf-8") == text
    assert sorted(path.name for path in Path("first").iterdir()) == ["quickstart.yaml"]


def test_copy_replaces_nothing_unless_told_to(calls):
    sentence = "'tiny.yaml' exists already; give another name, or --overwrite"
    assert complaint("copy", "quickstart", "tiny.yaml") == sentence
    assert Path("tiny.yaml").read_text(encoding="utf-8") == SMALL
    assert call("copy", "quickstart", "tiny.yaml", "--overwrite").exit_code == 0
    assert "name: quickstart" in Path("tiny.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["none/a.yaml", "tiny.yaml/a.yaml"])
def test_copy_says_why_it_cannot_write(calls, target):
    before = sorted(Path().rglob("*"))
    assert complaint("copy", "quickstart", target).startswith(f"cannot write {target}: ")
    assert sorted(Path().rglob("*")) == before


def test_copy_leaves_nothing_half_written(calls, monkeypatch):
    def replace(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    before = sorted(Path().rglob("*"))
    assert complaint("copy", "quickstart", "a.yaml") == "cannot write a.yaml: No space left on device"
    assert sorted(Path().rglob("*")) == before


def test_an_unknown_command_names_the_nearest():
    names = "bench, copy, export, list, report, run, show, validate"
    assert complaint("rnu") == f"unknown command 'rnu'; did you mean 'run'? Choices: {names}"
    assert complaint("xyz") == f"unknown command 'xyz'. Choices: {names}"
    assert complaint("--foo") == "No such option '--foo'; see 'sparsebayes --help'"


def test_no_command_prints_the_help():
    result = call()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == call("--help").output


def test_a_terminated_run_has_its_own_exit_status(calls, monkeypatch):
    fail_with(monkeypatch, Terminated("runs/tiny"))
    result = call("run", "tiny.yaml")
    assert result.exit_code == 143
    assert result.stderr == "continue with: sparsebayes run tiny.yaml --resume runs/tiny\nterminated\n"


def test_several_seeds_are_several_runs(calls):
    assert call("run", "tiny.yaml", "--seeds", "2", "--seed", "4", "--out", "o").exit_code == 0
    assert [(args[0].seed, options["out"]) for _, args, options in calls] == [
        (4, Path("o-seed4")),
        (5, Path("o-seed5")),
    ]
    sentence = "expected either --seeds or --resume, got both"
    assert complaint("run", "tiny.yaml", "--seeds", "2", "--resume", "first").startswith(sentence)


def test_finished_seeds_are_left_out_and_all_are_summed_up(calls):
    def finish(seed: int, error: float, params: int, changes: tuple[str, ...] = ()) -> None:
        run = Path(f"o-seed{seed}")
        run.mkdir()
        text = dump_recipe(load_recipe("tiny.yaml", overrides=[f"seed={seed}", *changes]))
        (run / "recipe.yaml").write_text(text, encoding="utf-8")
        figures = {"test_error": error, "params": params, "macs": 10 * params}
        dense = {"test_error": 0.01, "params": 1_000_000, "macs": 1}
        (run / "report.json").write_text(json.dumps({"budget": None, "dense": dense, "compact": figures}))

    finish(4, 0.02, 1000)
    finish(5, 0.04, 3000, ("out=elsewhere", "device=cpu"))
    finish(6, 0.5, 1, ("train.lr=0.7",))
    assert is_finished(Path("o-seed4"), load_recipe("tiny.yaml", overrides=["seed=4"]))
    assert not is_finished(Path("o-seed4"), load_recipe("tiny.yaml", overrides=["seed=5"]))
    result = call("run", "tiny.yaml", "--seeds", "3", "--seed", "4", "--out", "o")
    assert result.exit_code == 0
    assert [args[0].seed for _, args, _ in calls] == [6], "another recipe's run is not taken for this one's"
    assert result.stdout.splitlines() == [
        "run folder: o-seed4 (finished before)",
        "run folder: o-seed5 (finished before)",
        f"run folder: {Path('made/by/run_recipe')}",
        "mean of 2 seeds: test error 3.00 % (sd 1.41), dense 1.00 % (sd 0.00), "
        "2,000 parameters (sd 1,414), 20,000 MACs (sd 14,142)",
    ]
    calls.clear()
    assert call("run", "tiny.yaml", "--seeds", "2", "--seed", "4", "--out", "o", "--overwrite").exit_code == 0
    assert [args[0].seed for _, args, _ in calls] == [4, 5]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"kind": "params", "limit": 4310.8, "reached": 4311}, "params 4,311 instead of 4,310;"),
        (
            {"kind": "macs", "limit": 12_345_678.0, "reached": 23_456_789},
            "macs 23,456,789 instead of 12,345,678;",
        ),
        ({"kind": "latency_ms", "limit": 0.5, "reached": 0.61234}, "latency_ms 0.612 ms instead of 0.5 ms;"),
    ],
)
def test_a_missed_budget_is_said_in_whole_numbers(tmp_path, limit, words):
    budget = {"met": False, "limits": [{**limit, "met": False}]}
    (tmp_path / "report.json").write_text(json.dumps({"budget": budget}))
    assert words in missed_budget(tmp_path)


@pytest.mark.parametrize(
    ("budget", "status"),
    [
        (None, 0),
        ({"met": True, "limits": []}, 0),
        ({"met": False, "limits": [{"kind": "macs", "limit": 45860.0, "reached": 90123, "met": False}]}, 3),
    ],
)
def test_a_missed_budget_has_its_own_exit_status(calls, budget, status):
    folder = Path("made/by/run_recipe")
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"budget": budget}))
    result = call("run", "tiny.yaml")
    assert result.exit_code == status
    assert result.stdout == f"run folder: {folder}\n"
    assert ("macs 90,123 instead of 45,860; raise" in result.stderr) == (status == 3)


def test_validate_estimates_time_and_memory(calls, monkeypatch):
    monkeypatch.delitem(sys.modules, "sparsebayes.train")
    monkeypatch.delitem(sys.modules, "sparsebayes.report")
    last = call("validate", "quickstart", "--preset", "smoke").output.splitlines()[-1]
    assert re.fullmatch(
        r"estimate   about .+ of training on .+ \(.+ ms a step\), in about .+ [MG]B of memory", last
    )


def test_validate_estimates_a_search(calls, monkeypatch):
    monkeypatch.delitem(sys.modules, "sparsebayes.train")
    monkeypatch.delitem(sys.modules, "sparsebayes.report")
    last = call("validate", "nas_bench201", "--preset", "smoke").output.splitlines()[-1]
    figures = r"about .+ of search and .+ of training on .+ \(.+ ms a step\), in about .+ [MG]B of memory"
    assert re.fullmatch(f"estimate   {figures}", last)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none"], "expected a run folder or an ONNX file, got 'none', which is neither"),
        (["first"], "first holds no ONNX file; run with export.onnx=true, or export a point of it"),
        (["tiny.yaml"], "onnxruntime cannot run tiny.yaml ("),
        (["first", "--batch", "0"], "Invalid value for '--batch': '0' is not a list of whole numbers from 1"),
        (["first", "--batch", "1,x"], "Invalid value for '--batch': '1,x' is not a list of whole numbers"),
        (["first", "--threads", "9" * 40], "Invalid value for '--threads': '999"),
        (["tiny.yaml", "--out", "tiny.yaml"], "expected a folder for --out, got the file 'tiny.yaml'"),
        ([], "Missing argument 'RUN|FILE...'; see 'sparsebayes bench --help'"),
    ],
)
def test_mistakes_in_bench_are_sentences(calls, monkeypatch, arguments, sentence):
    monkeypatch.delitem(sys.modules, "sparsebayes.report")
    assert complaint("bench", *arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("sparsebayes run quick", ["plain,quickstart", "file,quick"]),
        ("sparsebayes run quickstart train.l", ["plain,train.lr=", "plain,train.label_smoothing="]),
        (
            "sparsebayes run quickstart train.pretrain.",
            ["plain,train.pretrain.epochs=", "plain,train.pretrain.lr="],
        ),
        ("sparsebayes run quickstart pru", ["plain,prune."]),
        ("sparsebayes run nas_proxy search.pap", ["plain,search.paper_lambda="]),
        ("sparsebayes run nas_then_compress compress.prior.j", ["plain,compress.prior.joint="]),
        ("sparsebayes export ru", ["dir,ru"]),
        ("sparsebayes va", ["plain,validate"]),
    ],
)
def test_the_tab_key_completes_commands_recipes_and_keys(words, completions):
    environment = {"_SPARSEBAYES_COMPLETE": "bash_complete", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    result = CliRunner().invoke(main, [], prog_name="sparsebayes", env=environment)
    assert sorted(result.output.splitlines()) == sorted(completions)


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_errors_have_no_colours_where_there_is_no_terminal(variables):
    result = CliRunner().invoke(main, ["run", "nothing"], prog_name="sparsebayes", env=variables)
    assert "\x1b" not in result.output
    colourful = CliRunner().invoke(
        main, ["run", "nothing"], prog_name="sparsebayes", env=variables, color=True
    )
    assert ("\x1b" in colourful.output) == (not variables)


def test_the_help_says_what_an_exit_status_means():
    text = call("--help").output
    for status in ("0", "1", "2", "3", "130"):
        assert f" {status} " in text.partition("Exit status:")[2]


def test_the_version_is_the_packages():
    assert call("--version").output == f"sparsebayes, version {__version__}\n"


def test_the_commands_are_these():
    assert sorted(main.commands) == ["bench", "copy", "export", "list", "report", "run", "show", "validate"]


@pytest.mark.parametrize("name", ["", *sorted(main.commands)])
def test_every_help_ends_with_examples_that_parse(calls, name):
    text = call(*([name] if name else []), "--help").output
    examples = [line.strip() for line in text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()]
    assert examples
    for example in examples:
        program, command, *arguments = example.partition(" > ")[0].split()
        assert program == "sparsebayes"
        assert command in main.commands
        assert name in ("", command)
        main.commands[command].make_context(command, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["list"],
        ["show", "quickstart"],
        ["validate", "quickstart", "--no-estimate"],
    ],
)
def test_what_only_reads_recipes_does_not_import_torch(arguments):
    program = (
        "import sys\nfrom sparsebayes.cli import main\n"
        f"try:\n    main({arguments!r}, prog_name='sparsebayes')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'click' in sys.modules\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_validate_loads_nothing_that_it_does_not_need(calls):
    """What it waits for is PyTorch; the tracer, searches, reports and exporters are for runs."""
    code = (
        "import sys; from sparsebayes.cli import main; main(['validate', 'quickstart'], standalone_mode=False); "
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "estimate   about" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()
    assert "torch" in loaded and "sparsebayes.train.estimate" in loaded
    unwanted = ("sparsebayes.nas", "sparsebayes.groups", "sparsebayes.curvature", "sparsebayes.report")
    unwanted += ("sparsebayes.export", "jinja2", "torchvision", "onnx", "onnxruntime")
    assert [name for name in loaded if name.startswith(unwanted)] == []
