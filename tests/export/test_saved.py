"""Saved networks: they come back equal, and damaged files are named."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError, RunError
from sparsebayes.export.saved import load_model, save_model
from sparsebayes.models import build
from sparsebayes.prune.architecture import Architecture, architecture_of
from sparsebayes.prune.compaction import compact

X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
OPTIONS = {"input_size": 16, "num_classes": 4}


def compacted() -> tuple[nn.Module, Architecture]:
    """LeNet without three filters, some neurons and some features; it gathers."""
    model = build("lenet5_caffe", OPTIONS)
    masks = {
        "conv2.weight": torch.ones(50, 20, 5, 5, dtype=torch.bool),
        "fc1.weight": torch.ones(500, 50, dtype=torch.bool),
        "fc2.weight": torch.ones(4, 500, dtype=torch.bool),
    }
    masks["conv2.weight"][:, :3] = False
    masks["fc1.weight"][:, 40:] = False
    masks["fc2.weight"][:, 100:] = False
    result = compact(model, masks, X)
    return result.model, replace(result.architecture, builder="lenet5_caffe", options=OPTIONS)


@pytest.fixture(scope="module")
def saved() -> tuple[nn.Module, Architecture]:
    return compacted()


class Mixed(nn.Module):
    """Shared weights, types other than float32, and a buffer that is not in the state dict."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.low = nn.Linear(width, 2).half()
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.low((self.b(self.a(x)) * self.scale).half())


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable module of a user's own code."""
    module = types.ModuleType("users_own_code")
    module.make = Mixed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_own_code", module)


def test_a_compacted_network_comes_back(tmp_path: Path, saved: tuple[nn.Module, Architecture]) -> None:
    model, architecture = saved
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == (17, 40, 100)
    save_model(tmp_path / "new" / "folder", model, architecture)
    state = torch.get_rng_state()
    again = load_model(tmp_path / "new" / "folder")
    assert repr(again) == repr(model)
    assert not again.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(again(X), model.eval()(X))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "architecture.json",
        "model.safetensors",
    ]


def test_gathers_come_back(tmp_path: Path) -> None:
    model = build("lenet5_caffe", {"input_size": 20})  # 2 x 2 pixels for each of the 50 channels
    masks = {"fc1.weight": torch.ones(500, 200, dtype=torch.bool)}
    masks["fc1.weight"][:, ::3] = False
    x = torch.randn(2, 1, 20, 20)
    result = compact(model, masks, x)
    save_model(
        tmp_path,
        result.model,
        replace(result.architecture, builder="lenet5_caffe", options={"input_size": 20}),
    )
    again = load_model(tmp_path)
    assert "columns=133 of in_features=200" in repr(again)
    with torch.no_grad():
        assert torch.equal(again(x), result.model.eval()(x))


def test_types_sharing_and_buffers_come_back(tmp_path: Path, user_module: None) -> None:
    model = Mixed()
    with torch.no_grad():
        model.scale.copy_(torch.arange(4.0))
    save_model(tmp_path, model, architecture_of(model, builder="users_own_code:make", options={"width": 4}))
    again = load_model(tmp_path)
    assert again.a.weight is again.b.weight
    assert again.low.weight.dtype == torch.float16
    assert again.scale.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert torch.equal(again(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_saving_needs_a_builder_and_the_models_own_architecture(
    tmp_path: Path, saved: tuple[nn.Module, Architecture]
) -> None:
    model, architecture = saved
    with pytest.raises(
        ModelError, match="the architecture does not say how the model is built; set its builder"
    ):
        save_model(tmp_path, model, replace(architecture, builder=None))
    with pytest.raises(
        ModelError, match=r"'conv1.bias' has shape \[17\] in the model and \[20\] in the architecture"
    ):
        save_model(
            tmp_path,
            model,
            architecture_of(build("lenet5_caffe", OPTIONS), builder="lenet5_caffe", options=OPTIONS),
        )
    with pytest.raises(ModelError, match="types, groups or gathered columns differ"):
        save_model(
            tmp_path, model, replace(architecture, dtypes={**architecture.dtypes, "fc2.bias": "float64"})
        )
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> object:
            return {"count": 3}

    model = nn.Sequential(Stateful(2, 2))
    with pytest.raises(ModelError, match=r"'0' keeps state that is not a tensor \(get_extra_state\)"):
        save_model(tmp_path, model, architecture_of(model, builder="x:y"))


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, saved: tuple[nn.Module, Architecture]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot write the model to .*file \(cannot write .*\); choose another folder"
    ):
        save_model(tmp_path / "file", *saved)


def test_absent_files_are_named(tmp_path: Path, saved: tuple[nn.Module, Architecture]) -> None:
    with pytest.raises(
        RunError, match=r"cannot read .*architecture.json: No such file.*expected a folder that a run"
    ):
        load_model(tmp_path / "nowhere")
    save_model(tmp_path, *saved)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"cannot read .*model.safetensors: no such file"):
        load_model(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_weights_cut_short_are_refused(
    share: float, tmp_path: Path, saved: tuple[nn.Module, Architecture]
) -> None:
    save_model(tmp_path, *saved)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RunError, match=r"model.safetensors is damaged or cut short \(.*\); write it again"):
        load_model(tmp_path)


def test_damaged_bytes_are_refused(tmp_path: Path, saved: tuple[nn.Module, Architecture]) -> None:
    save_model(tmp_path, *saved)
    weights, text = tmp_path / "model.safetensors", tmp_path / "architecture.json"
    content = weights.read_bytes()
    weights.write_bytes(b"\xff" * 64 + content[64:])
    with pytest.raises(RunError, match="damaged or cut short"):
        load_model(tmp_path)
    text.write_bytes(b"\xff\xfe{}")
    with pytest.raises(RunError, match=r"architecture.json is not text"):
        load_model(tmp_path)
    text.write_text(architecture_of(nn.Linear(1, 1)).to_json()[:40])
    with pytest.raises(ModelError, match=r"architecture.json is not JSON .* cut short"):
        load_model(tmp_path)


def test_files_of_different_runs_are_refused(tmp_path: Path, saved: tuple[nn.Module, Architecture]) -> None:
    save_model(tmp_path, *saved)
    dense = build("lenet5_caffe", OPTIONS)
    save_model(tmp_path / "dense", dense, architecture_of(dense, builder="lenet5_caffe", options=OPTIONS))
    (tmp_path / "dense" / "architecture.json").replace(tmp_path / "architecture.json")
    with pytest.raises(
        RunError, match=r"is float32 of shape \[17.* in model.safetensors but float32 of shape \[20"
    ):
        load_model(tmp_path)
    other = build("lenet_300_100", {"input_size": 4})
    save_model(
        tmp_path / "other", other, architecture_of(other, builder="lenet_300_100", options={"input_size": 4})
    )
    (tmp_path / "other" / "architecture.json").replace(tmp_path / "architecture.json")
    with pytest.raises(RunError, match=r"only (model.safetensors|architecture.json) has the tensor '"):
        load_model(tmp_path)


def edited(folder: Path, **changes: object) -> None:
    path = folder / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_edited_architectures_are_refused(tmp_path: Path, saved: tuple[nn.Module, Architecture]) -> None:
    save_model(tmp_path, *saved)
    edited(tmp_path, builder=None)
    with pytest.raises(ModelError, match=r"does not say how the model is built"):
        load_model(tmp_path)
    edited(tmp_path, builder="lenet5_cafe")
    with pytest.raises(ModelError, match="did you mean 'lenet5_caffe'"):
        load_model(tmp_path)
    edited(tmp_path, builder="lenet_300_100")
    with pytest.raises(ModelError, match=r"only the (model|architecture) has a tensor '"):
        load_model(tmp_path)
    edited(tmp_path, builder="lenet5_caffe", options={"input_size": 16, "num_classes": 3})
    with pytest.raises(ModelError, match=r"'fc2.weight' should have at most the shape \[3, 500\]"):
        load_model(tmp_path)


def test_gathered_columns_must_agree_in_both_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    masks = {"1.weight": torch.tensor([[True, False, True, True]] * 2)}
    small = compact(model, masks, torch.zeros(1, 4))
    module = types.ModuleType("users_gather")
    module.make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))  # type: ignore[attr-defined]
    sys.modules["users_gather"] = module
    try:
        save_model(tmp_path, small.model, replace(small.architecture, builder="users_gather:make"))
        load_model(tmp_path)
        edited(tmp_path, gathers={"1": {"in_features": 4, "columns": [0, 1, 3]}})
        with pytest.raises(
            RunError, match=r"the columns of '1' differ between model.safetensors and architecture.json"
        ):
            load_model(tmp_path)
    finally:
        del sys.modules["users_gather"]
