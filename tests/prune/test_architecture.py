"""Architectures: description, JSON, and giving a network its shapes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError
from sparsebayes.prune.architecture import Architecture, Gather, architecture_of, named_tensors
from sparsebayes.prune.gather import GatheredLinear
from sparsebayes.prune.reshaping import reshape_


class Tied(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def convnet(a: int, b: int, c: int) -> nn.Sequential:
    """Convolutions of many kinds with `a`, `b` and `c` channels."""
    return nn.Sequential(
        nn.Conv2d(1, a, 3),
        nn.BatchNorm2d(a),
        nn.Conv2d(a, a, 3, groups=a),
        nn.PReLU(a),
        nn.Conv2d(a, b, 1),
        nn.BatchNorm2d(b, affine=False),
        nn.Conv2d(b, b, 1, groups=2),
        nn.ConvTranspose2d(b, c, 2),
        nn.InstanceNorm2d(c, affine=True),
        nn.ConvTranspose2d(c, c, 2, groups=c),
        nn.Flatten(),
        nn.Linear(c * 36, 5),
    )


def test_reshaping_equals_building_it_small() -> None:
    dense, small = convnet(8, 6, 5), convnet(3, 4, 2)
    reshape_(dense, architecture_of(small))
    assert repr(dense) == repr(small)
    assert {n: t.shape for n, t in named_tensors(dense).items()} == {
        n: t.shape for n, t in named_tensors(small).items()
    }
    dense.load_state_dict(small.state_dict(), strict=True)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(dense.eval()(x), small.eval()(x))


def test_a_depthwise_convolution_may_end_with_one_group() -> None:
    dense, small = convnet(8, 6, 5), convnet(1, 2, 1)
    assert architecture_of(small).groups == {"6": 2}
    reshape_(dense, architecture_of(small))
    assert dense[2].groups == 1 and dense[2].in_channels == 1
    assert repr(dense) == repr(small)


def test_types_devices_and_grad_flags_stay() -> None:
    dense, small = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()
    dense.weight.requires_grad_(False)
    reshape_(dense, architecture_of(small))
    assert dense.weight.dtype == torch.float64 and not dense.weight.requires_grad and dense.bias.requires_grad
    reshape_(dense, architecture_of(nn.Linear(2, 3)))
    assert dense.weight.dtype == dense.bias.dtype == torch.float32


def test_shared_parameters_stay_shared() -> None:
    dense, small = Tied(), Tied()
    small.a.weight = small.b.weight = nn.Parameter(torch.ones(2, 2))
    small.a.bias, small.b.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    reshape_(dense, architecture_of(small))
    assert dense.a.weight is dense.b.weight and dense.a.weight.shape == (2, 2)


def test_gathers_are_restored_and_may_be_given_up() -> None:
    small = nn.Sequential(nn.Flatten(), GatheredLinear(6, torch.tensor([1, 4]), 3))
    dense = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    reshape_(dense, architecture_of(small))
    assert repr(dense) == repr(small) and dense[1].columns.tolist() == [1, 4]
    reshape_(dense, architecture_of(nn.Sequential(nn.Flatten(), nn.Linear(5, 3))))
    assert type(dense[1]) is nn.Linear and dense[1].weight.shape == (3, 5)


def test_json_round_trip() -> None:
    model = nn.Sequential(convnet(3, 4, 2), GatheredLinear(6, torch.tensor([1, 4]), 3, dtype=torch.float64))
    architecture = architecture_of(model, builder="lenet5_caffe", options={"num_classes": 10, "name": None})
    text = architecture.to_json()
    assert Architecture.from_json(text) == architecture
    assert '"0.0.weight": {"dtype": "float32", "shape": [3, 1, 3, 3]}' in text
    assert json.loads(text)["gathers"] == {"1": {"in_features": 6, "columns": [1, 4]}}
    assert Architecture.from_json(architecture_of(nn.Linear(1, 1)).to_json()).builder is None
    assert Architecture.from_json(architecture_of(nn.ReLU()).to_json()).shapes == {}


def test_options_that_are_not_json_are_refused() -> None:
    with pytest.raises(ModelError, match="options of model 'x' should be JSON values"):
        architecture_of(nn.Linear(1, 1), builder="x", options={"activation": torch.relu}).to_json()
    with pytest.raises(ModelError, match="should be JSON values"):
        architecture_of(nn.Linear(1, 1), builder="x", options={"p": float("nan")}).to_json()


def entry(shape: object, dtype: object = "float32") -> dict[str, object]:
    return {"tensors": {"weight": {"shape": shape, "dtype": dtype}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "'version' should be a whole number within 1..1, got 0"),
        ({"surprise": 0}, "unknown field 'surprise'"),
        ({"builder": 1}, "'builder' should be text, got 1"),
        ({"options": [1]}, r"'options' should be an object, got \[1\]"),
        ({"tensors": {"weight": 3}}, "'weight' should be an object, got 3"),
        (entry([-1, 4]), r"'shape' should be a list of whole numbers within 1..2147483648, got \[-1, 4\]"),
        (entry([0]), "'shape' should be"),
        (entry([True]), "'shape' should be"),
        (entry([2.0]), "'shape' should be"),
        (entry([2**31, 2**31]), "'shape' should be at most 8 sizes with a product of at most"),
        (entry([1] * 9), "'shape' should be at most 8 sizes"),
        (entry([2], "float31"), "unknown dtype 'float31'; did you mean 'float32'"),
        (entry([2], None), "'dtype' should be text"),
        ({"groups": {"conv": 1}}, "'conv' should be a whole number within 2..2147483648, got 1"),
        ({"gathers": {"fc": {"in_features": 0, "columns": []}}}, "'in_features' should be a whole number"),
        (
            {"gathers": {"fc": {"in_features": 3, "columns": [0, 3]}}},
            "'columns' should be a list .* within 0..2",
        ),
        (
            {"gathers": {"fc": {"in_features": 3, "columns": [1, 1]}}},
            "'columns' should be a non-empty list that rises",
        ),
        (
            {"gathers": {"fc": {"in_features": 3, "columns": []}}},
            "'columns' should be a non-empty list that rises",
        ),
        (
            {"gathers": {"fc": {"in_features": 3}}},
            "'fc' of 'gathers' of architecture.json lacks the field 'columns'",
        ),
    ],
)
def test_damaged_json_is_refused(change: dict[str, object], message: str) -> None:
    document = {**json.loads(architecture_of(nn.Linear(2, 2)).to_json()), **change}
    with pytest.raises(ModelError, match=message):
        Architecture.from_json(json.dumps(document))


def test_architectures_of_other_models_are_refused() -> None:
    small = architecture_of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        ModelError, match=r"only the model has a tensor '1.bias'.*check its builder and options"
    ):
        reshape_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), small)
    with pytest.raises(ModelError, match=r"only the architecture has a tensor '0.bias'"):
        reshape_(nn.Sequential(nn.Linear(2, 2, bias=False)), small)
    with pytest.raises(
        ModelError, match=r"'0.weight' should have at most the shape \[2, 1\] .* says \[2, 2\]"
    ):
        reshape_(nn.Sequential(nn.Linear(1, 2)), small)
    with pytest.raises(ModelError, match=r"'0.weight' should have at most the shape \[2, 2, 1\]"):
        reshape_(nn.Sequential(nn.Conv1d(2, 2, 1)), small)


def test_impossible_groups_and_gathers_are_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ModelError, match=r"the convolution '0' has 4 rows, which 3 groups do not divide"):
        reshape_(conv, replace(architecture_of(conv), groups={"0": 3}))
    layer = architecture_of(nn.Sequential(GatheredLinear(9, torch.tensor([0, 2]), 3)))
    with pytest.raises(ModelError, match=r"'0' has 8 inputs, but the architecture gathers from 9"):
        reshape_(nn.Sequential(nn.Linear(8, 3)), layer)
    with pytest.raises(ModelError, match=r"'0', which should be an nn.Linear but is a Bilinear"):
        reshape_(
            nn.Sequential(nn.Bilinear(3, 2, 3)),
            replace(layer, shapes={**layer.shapes, "0.weight": (3, 3, 2)}),
        )
    with pytest.raises(ModelError, match=r"gathers 3 inputs of '0', but says .* int64 of shape \[2\] and"):
        reshape_(nn.Sequential(nn.Linear(8, 3)), replace(layer, gathers={"0": Gather(4, (0, 1, 2))}))
    with pytest.raises(ModelError, match=r"gathers 2 inputs of '0', but says that '0.columns' is float32"):
        reshape_(
            nn.Sequential(nn.Linear(9, 3)), replace(layer, dtypes={**layer.dtypes, "0.columns": "float32"})
        )


def test_unsavable_types_are_refused() -> None:
    with pytest.raises(ModelError, match="'weight' is of type complex64, expected one of"):
        architecture_of(nn.Linear(1, 1, dtype=torch.complex64))
