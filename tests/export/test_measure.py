"""Latency: the bigger network is slower, batches are honoured, calls are bundled, samples interleave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export import compare_latency, export_onnx, latency_ms, measure


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latency")
    example = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    for name, width in (("dense", 2048), ("compact", 8)):
        model = nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 10))
        export_onnx(model, example, folder / f"{name}.onnx", legacy=True)
    return {name: folder / f"{name}.onnx" for name in ("dense", "compact")}


def test_every_network_gets_a_positive_time(files: dict[str, Path]) -> None:
    single = compare_latency(files, batch=1, threads=1, repeats=3)
    assert list(single) == ["dense", "compact"]
    assert min(single.values()) > 0
    assert latency_ms(files["dense"], batch=64, repeats=3) > 0


def test_samples_last_long_enough_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    calls: list[str] = []
    seconds = {"fast": 2.0**-16, "slow": 2.0**-8}  # powers of two: the sums below are exact

    def caller(path: object, batch: int, threads: int):
        def call() -> None:
            calls.append(str(path))
            clock["now"] += seconds[str(path)]

        return call

    monkeypatch.setattr(measure, "prepare_call", caller)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    assert compare_latency({"a": "fast", "b": "slow"}, repeats=3) == {"a": 1e3 * 2.0**-16, "b": 1e3 * 2.0**-8}

    measured = calls[-3 * (256 + 1) :]  # 256 calls of 2^-16 s are the first power of two above 2 ms
    turns = [name for i, name in enumerate(measured) if i == 0 or measured[i - 1] != name]
    assert turns == ["fast", "slow", "fast", "slow"]  # fast slow | slow fast | fast slow
    assert measured.count("fast") == 3 * 256


def test_median_ignores_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([1.0, 9.0, 2.0])
    monkeypatch.setattr(measure, "prepare_call", lambda path, batch, threads: None)
    monkeypatch.setattr(measure, "_calls_per_sample", lambda call: 1)
    monkeypatch.setattr(measure, "_seconds_per_call", lambda call, count: next(samples))
    assert latency_ms("any", repeats=3) == 2000.0


@pytest.mark.parametrize("option", ["batch", "threads", "repeats"])
def test_counts_below_one_are_refused(files: dict[str, Path], option: str) -> None:
    with pytest.raises(ModelError, match=f"needs {option} of at least 1, not 0"):
        latency_ms(files["compact"], **{option: 0})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="an ONNX file was expected at"):
        latency_ms(tmp_path / "absent.onnx")


def save(path: Path, op: str, inputs: list[tuple[int, list[int | str]]]) -> Path:
    """Write an ONNX file of one operator with the given input types and shapes."""
    from onnx import helper, save_model

    entries = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i, (kind, shape) in enumerate(inputs)]
    output = helper.make_tensor_value_info("y", inputs[0][0], inputs[0][1])
    node = helper.make_node(op, [entry.name for entry in entries], ["y"])
    graph = helper.make_graph([node], "one", entries, [output])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        ("Add", [(1, ["batch", 2]), (1, ["batch", 2])], "needs a file with one input; .* has 2"),
        ("Identity", [(10, ["batch", 2])], r"is tensor\(float16\); known are"),
        ("Identity", [(1, ["batch", "width"])], "only its first dimension may be free"),
        ("Identity", [(1, [])], "has no batch dimension"),
        ("Identity", [(1, [4, 2])], "is fixed to a batch of 4, so a batch of 1 cannot be measured"),
    ],
)
def test_files_that_cannot_be_measured(tmp_path: Path, op: str, inputs, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        latency_ms(save(tmp_path / "odd.onnx", op, inputs))


def test_integer_input_is_measured(tmp_path: Path) -> None:
    assert latency_ms(save(tmp_path / "words.onnx", "Neg", [(7, ["batch", 5])]), repeats=2) > 0


def test_file_that_fails_at_this_batch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    file = export_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx", legacy=True)
    from onnx import helper, load, save_model

    proto = load(str(file.path))
    proto.graph.node[0].output[0] = (
        "inner"  # then add a [2, 4] constant, which fits a batch of 1 or 2, not of 3
    )
    constant = helper.make_tensor("two_rows", 1, [2, 4], [0.0] * 8)
    proto.graph.initializer.append(constant)
    proto.graph.node.append(helper.make_node("Add", ["inner", "two_rows"], ["logits"]))
    save_model(proto, str(file.path))
    with pytest.raises(ModelError, match=r"cannot run .* on a batch of 3"):
        latency_ms(file.path, batch=3)
