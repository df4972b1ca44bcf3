"""Linear layers that read some of their columns."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError
from sparsebayes.prune.gather import GatheredLinear, replace_module_, ungather_, ungathered


def gathered(bias: bool = True) -> GatheredLinear:
    layer = GatheredLinear(6, torch.tensor([0, 3, 5]), 2, bias=bias, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_linear_layer_with_zero_columns(bias: bool) -> None:
    layer = gathered(bias)
    state = torch.get_rng_state()
    linear = ungathered(layer)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-14, atol=1e-14)
    assert linear.weight[:, [1, 2, 4]].abs().sum() == 0
    assert (linear.bias is not None) == bias
    assert "columns=3 of in_features=6, out_features=2" in repr(layer)


def test_names_are_those_of_the_linear_layer() -> None:
    assert [name for name, _ in gathered().named_parameters()] == ["weight", "bias"]
    assert set(gathered().state_dict()) == {"weight", "bias", "columns"}


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match="expected 6 input columns, got 7"):
        gathered()(torch.zeros(1, 7, dtype=torch.float64))
    with pytest.raises(ModelError, match=r"non-empty list of int64, not torch.float32 of shape \[2\]"):
        GatheredLinear(4, torch.zeros(2), 2)
    with pytest.raises(ModelError, match="non-empty list"):
        GatheredLinear(4, torch.zeros(0, dtype=torch.int64), 2)
    with pytest.raises(ModelError, match=r"rise strictly within 0..3, not run from 1 to 4"):
        GatheredLinear(4, torch.tensor([1, 4]), 2)
    with pytest.raises(ModelError, match="rise strictly"):
        GatheredLinear(4, torch.tensor([1, 1]), 2)


def test_replacing_keeps_mode_hooks_and_every_place() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer), layer)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.eval()
    new = nn.Linear(3, 3)
    replace_module_(model, layer, new)
    assert model[0] is model[1][1] is model[2] is new
    assert not new.training
    model(torch.zeros(1, 3))
    assert len(calls) == 3
    with pytest.raises(ModelError, match=r"the bare Sequential; wrap it"):
        replace_module_(model, model, new)


def test_ungathering_keeps_sharing() -> None:
    first, second = gathered(), gathered()
    second.weight = first.weight
    model = nn.Sequential(first, nn.Linear(2, 6, dtype=torch.float64), second)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    ungather_(model)
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert model[0].weight is model[2].weight
    torch.testing.assert_close(model(x), expected, rtol=1e-14, atol=1e-14)


def test_a_shared_weight_with_two_lists_of_columns_is_refused() -> None:
    first, second = gathered(), gathered()
    second.weight, second.columns = first.weight, torch.tensor([0, 1, 2])
    with pytest.raises(ModelError, match="share a weight but read different columns"):
        ungather_(nn.Sequential(first, second))


def test_export_shows_one_index_select() -> None:
    program = torch.export.export(gathered().eval(), (torch.zeros(2, 6, dtype=torch.float64),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.index_select.default", "aten.linear.default"]


# The exporters warn of their own deprecations; tracer warnings of ours would be `torch.jit.TracerWarning`.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_holds_one_gather_and_computes_the_same(dynamo: bool, tmp_path: Path) -> None:
    layer, x = gathered().float().eval(), torch.randn(2, 6)
    path = tmp_path / "gather.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=dynamo, verbose=False)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Gather", "Gemm"]
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x).detach(), rtol=1e-5, atol=1e-5)
