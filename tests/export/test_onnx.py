"""An exported file computes what the network computes, at any batch size, or it does not come into being."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export import OnnxFile, check_onnx, export_onnx
from sparsebayes.export import onnx as export_module


class SmallConvNet(nn.Module):
    """Convolution, BatchNorm with uneven statistics, pooling, dropout and a linear layer; outputs [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 3 * 3, 3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            self.fc.weight.sub_(0.6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.max_pool2d(x, 2)
        return self.fc(self.drop(torch.flatten(x, 1)))


class Lambda(nn.Module):
    """A linear layer with 4 inputs and 3 outputs, and any function of its input and output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.fc(x))


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def run_file(path: Path, x: Tensor) -> Tensor:
    """The file's outputs, by onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["input"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    (output,) = session.run(None, {"input": x.numpy()})
    return torch.from_numpy(output)


def tamper(path: Path, amount: float) -> None:
    """Add `amount` to every entry of the file's largest initializer."""
    proto = onnx.load(str(path))
    largest = max(proto.graph.initializer, key=lambda entry: numpy.prod(entry.dims))
    array = onnx.numpy_helper.to_array(largest) + numpy.float32(amount)
    largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))
    onnx.save(proto, str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_file_agrees_with_the_network_at_batches_of_1_and_7(tmp_path: Path, legacy: bool) -> None:
    model = SmallConvNet().eval()
    file = export_onnx(model, images(1), tmp_path / "model.onnx", legacy=legacy)

    assert file.exporter == ("torchscript" if legacy else "dynamo")
    assert file.path == tmp_path / "model.onnx"
    assert file.bytes == file.path.stat().st_size > 4 * sum(p.numel() for p in model.parameters())
    assert file.max_relative_error < 1e-5
    assert file.note == ""
    for batch in (1, 7):
        x = images(batch, seed=batch)
        torch.testing.assert_close(run_file(file.path, x), model(x).detach(), rtol=1e-4, atol=1e-5)
    proto = onnx.load(str(file.path))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert max(entry.version for entry in proto.opset_import) == file.opset
    assert list(tmp_path.iterdir()) == [file.path]


def test_dynamo_file_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    file = export_onnx(
        model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "m.onnx"
    )
    assert file.exporter == "dynamo"
    content = file.path.read_bytes()
    assert b"site-packages" not in content
    assert b"stack_trace" not in content


def test_model_and_generator_are_left_as_they_were(tmp_path: Path) -> None:
    model = SmallConvNet().double().train()
    model.norm.eval()
    model.fc.bias.requires_grad_(False)
    model(images(2).double()).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random_state = torch.get_rng_state()

    file = export_onnx(model, images(2).double(), tmp_path / "model.onnx", legacy=True)

    assert model.training and model.drop.training and not model.norm.training
    assert not model.fc.bias.requires_grad and model.fc.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert file.max_relative_error < 1e-5


def test_tampered_file_is_refused_with_the_figure(tmp_path: Path) -> None:
    model = SmallConvNet()
    file = export_onnx(model, images(2), tmp_path / "model.onnx", legacy=True)
    assert check_onnx(file.path, model, images(5)) < 1e-5
    tamper(file.path, 0.01)
    with pytest.raises(ModelError, match=r"differ from the network's by 0\.\d+ of the largest .* 0\.0001 is"):
        check_onnx(file.path, model, images(5))
    assert check_onnx(file.path, model, images(5), tolerance=1.0) > 1e-3


def test_zero_example_still_uncovers_wrong_weights(tmp_path: Path) -> None:
    # Zeros as inputs make every weight of the first layer irrelevant; the check must not rest on them.
    model = nn.Sequential(nn.Linear(4, 3))
    file = export_onnx(model, torch.zeros(1, 4), tmp_path / "model.onnx", legacy=True)
    tamper(file.path, 0.5)
    with pytest.raises(ModelError, match="differ from the network's"):
        check_onnx(file.path, model, torch.zeros(3, 4))


def test_wrong_file_never_replaces_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export_module._EXPORTERS["torchscript"]

    def wrong(network: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
        honest(network, example, path, opset)
        tamper(path, 0.1)

    target = tmp_path / "model.onnx"
    target.write_bytes(b"the file of last week")
    monkeypatch.setitem(export_module._EXPORTERS, "dynamo", wrong)
    monkeypatch.setitem(export_module._EXPORTERS, "torchscript", wrong)
    with pytest.raises(ModelError, match=r"neither exporter could write SmallConvNet as ONNX: .* differ"):
        export_onnx(SmallConvNet(), images(2), target)
    assert target.read_bytes() == b"the file of last week"
    assert list(tmp_path.iterdir()) == [target]

    monkeypatch.setitem(export_module._EXPORTERS, "torchscript", honest)
    file = export_onnx(SmallConvNet(), images(2), target)
    assert file.exporter == "torchscript"
    assert "torch.export based exporter was not used: the exported file's outputs differ" in file.note
    assert check_onnx(target, SmallConvNet(), images(4)) == pytest.approx(file.max_relative_error, abs=1e-5)


def test_falls_back_when_the_first_exporter_fails(tmp_path: Path) -> None:
    def no_export(x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("not with me")
        return y

    file = export_onnx(Lambda(no_export), torch.randn(2, 4), tmp_path / "model.onnx")
    assert file.exporter == "torchscript"
    assert "the dynamo exporter failed" in file.note and "not with me" in file.note


def test_branch_on_data_is_not_frozen_by_the_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(network: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
        raise RuntimeError("data-dependent branch")

    model = Lambda(lambda x, y: y if x.sum() > -1000 else 2 * y)
    monkeypatch.setitem(export_module._EXPORTERS, "dynamo", fail)
    with pytest.raises(ModelError, match=r"neither exporter .* data-dependent branch\).*Python boolean"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx")
    with pytest.warns(torch.jit.TracerWarning, match="Python boolean"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx", legacy=True)
    assert "Torch IR graph" not in capsys.readouterr().out


def test_exporter_is_quiet_and_the_network_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def talkative(x: Tensor, y: Tensor) -> Tensor:
        warnings.warn("mind the gap", UserWarning, stacklevel=2)
        print("forward was here")
        return y

    with pytest.warns(UserWarning, match="mind the gap") as caught:
        export_onnx(Lambda(talkative), torch.randn(2, 4), tmp_path / "model.onnx", legacy=True)
    assert {entry.category for entry in caught} == {UserWarning}
    assert set(capfd.readouterr().out.splitlines()) == {"forward was here"}

    export_onnx(SmallConvNet(), images(2), tmp_path / "quiet.onnx", legacy=True)
    assert capfd.readouterr() == ("", "")


def test_integer_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 3))
    words = torch.randint(0, 11, (1, 5), generator=torch.Generator().manual_seed(0))
    file = export_onnx(model, words, tmp_path / "model.onnx", legacy=True)
    assert isinstance(file, OnnxFile)
    assert run_file(file.path, words.repeat(4, 1)).shape == (4, 3)


def test_opset_is_what_was_asked_for(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    assert export_onnx(model, x, tmp_path / "m.onnx", legacy=True, opset=18).opset == 18
    old = export_onnx(model, x, tmp_path / "m.onnx", opset=13)
    assert (old.opset, old.exporter) == (13, "torchscript")
    assert old.note == "the torch.export based exporter writes opset 18 and later"
    with pytest.raises(ModelError, match=r"opset must lie in 1\.\.\d+ or be left out, not 99"):
        export_onnx(model, x, tmp_path / "m.onnx", opset=99)
    with pytest.raises(ModelError, match=r"torchscript exporter failed .*opset"):
        export_onnx(model, x, tmp_path / "m.onnx", legacy=True, opset=5)


def test_opset_that_the_exporter_ignores_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export_module._EXPORTERS["torchscript"]
    monkeypatch.setitem(
        export_module._EXPORTERS,
        "torchscript",
        lambda network, example, path, opset: honest(network, example, path, 17),
    )
    with pytest.raises(
        ModelError, match="opset 18 was asked for, but the torchscript exporter wrote opset 17"
    ):
        export_onnx(nn.Linear(4, 3), torch.randn(2, 4), tmp_path / "m.onnx", legacy=True, opset=18)


def test_invalid_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(network: nn.Module, example: Tensor, path: Path, opset: int | None) -> None:
        path.write_bytes(b"\x00 not a protobuf")

    monkeypatch.setitem(export_module._EXPORTERS, "torchscript", empty)
    with pytest.raises(ModelError, match="the torchscript exporter wrote an invalid file"):
        export_onnx(nn.Linear(4, 3), torch.randn(2, 4), tmp_path / "m.onnx", legacy=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: (y, y), "must return one tensor, not a tuple"),
        (lambda x, y: y.sum(0), r"one row per input, not shape \[3\] for a batch of 1"),
        (lambda x, y: y.view(5, 3), r"fails on a batch of shape \[1, 4\] .* any batch size"),
        (lambda x, y: y / 0, "outputs are not finite"),
    ],
)
def test_networks_that_cannot_be_exported(tmp_path: Path, function, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export_onnx(Lambda(function), torch.randn(5, 4), tmp_path / "model.onnx", legacy=True)
    assert list(tmp_path.iterdir()) == []


def test_network_that_cannot_be_copied(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    model.cached = model.weight * 2  # a tensor that hangs on a graph cannot be deep-copied
    with pytest.raises(ModelError, match="the network Linear cannot be copied for the export"):
        export_onnx(model, torch.randn(5, 4), tmp_path / "model.onnx", legacy=True)


@pytest.mark.parametrize(
    ("example", "what"),
    [(torch.zeros(0, 4), r"shape \[0, 4\]"), (torch.tensor(1.0), r"shape \[\]"), ([1], "list")],
)
def test_example_must_have_rows(tmp_path: Path, example, what: str) -> None:
    with pytest.raises(ModelError, match=f"with B >= 1, not {what}"):
        export_onnx(nn.Linear(4, 3), example, tmp_path / "model.onnx", legacy=True)


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(RunError, match="which is a folder"):
        export_onnx(model, x, tmp_path, legacy=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"the ONNX file .* cannot be written"):
        export_onnx(model, x, tmp_path / "file" / "model.onnx", legacy=True)
    with pytest.raises(RunError, match="an ONNX file was expected at"):
        check_onnx(tmp_path / "absent.onnx", model, x)
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(ModelError, match=r"onnxruntime cannot run .*garbage\.onnx"):
        check_onnx(tmp_path / "garbage.onnx", model, x)


def test_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = export_onnx(nn.Linear(4, 3), torch.randn(2, 4), tmp_path / "model.onnx", legacy=True)
    with pytest.raises(ModelError, match=r"returns shape \[1, 3\] for a batch of 1, .* returns \[1, 2\]"):
        check_onnx(file.path, nn.Linear(4, 2), torch.randn(2, 4))
    with pytest.raises(ModelError, match="cannot run the exported file on a batch of 1"):
        check_onnx(file.path, nn.Linear(5, 3), torch.randn(2, 5))
