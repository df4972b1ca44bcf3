"""Compaction: the result equals the masked network, is as small as the mask allows, and else is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import Slice, UnitGraph, trace_units
from sparsebayes.prune.architecture import architecture_of, named_tensors
from sparsebayes.prune.compaction import Compaction, compact, cut, trace_compacted
from sparsebayes.prune.gather import GatheredLinear
from sparsebayes.prune.liveness import check_graph
from sparsebayes.prune.reshaping import reshape_

IMAGE = torch.randn(3, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A residual block between two convolutions, then global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(100, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, 3)
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Flatten(),
        nn.Linear(24, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3),
    )  # fmt: skip


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 1), nn.PReLU(6), nn.Conv2d(6, 4, 3, groups=2), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "tanh": lambda: perceptron(nn.Tanh),
    "sigmoid": lambda: perceptron(nn.Sigmoid),
    "lenet": lenet,
    "convnet": convnet,
    "residual": Residual,
}
BUILT: dict[str, tuple[nn.Module, UnitGraph]] = {}


def build(name: str) -> tuple[nn.Module, UnitGraph]:
    """A network in float64 with random parameters and statistics, and its units (traced once)."""
    if name not in BUILT:
        model = NETS[name]().double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor_name, tensor in named_tensors(model).items():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
                    tensor.copy_(noise.abs() + 0.5 if tensor_name.endswith("var") else noise)
        BUILT[name] = (model, trace_units(model, IMAGE))
    return BUILT[name]


def unit_masks(model: nn.Module, graph: UnitGraph, on: Tensor) -> dict[str, Tensor]:
    """Masks of units: every entry of every slice of a unit that is off."""
    on = torch.cat([on, torch.ones(1, dtype=torch.bool)])
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for piece in graph.slices:
        masks[piece.parameter].movedim(piece.dim, -1).logical_and_(on[piece.unit])
    return masks


def random_units(graph: UnitGraph, density: float, generator: torch.Generator) -> Tensor:
    """Random units, at least one in each layer."""
    on = torch.rand(graph.num_units, generator=generator) < density
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        on[members[torch.randint(len(members), (1,), generator=generator)]] = True
    return on


def masked_copy(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """The reference, without any of the code under test."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return masked


def assert_equal_networks(masked: nn.Module, small: nn.Module, batches: Iterable[Tensor] = ()) -> None:
    generator = torch.Generator().manual_seed(7)
    for x in (IMAGE, torch.randn(4, 1, 10, 10, dtype=torch.float64, generator=generator) * 3, *batches):
        with torch.no_grad():
            expected = copy.deepcopy(masked).eval()(x)
            torch.testing.assert_close(copy.deepcopy(small).eval()(x), expected, rtol=1e-10, atol=1e-10)


def assert_kept_tells_where_entries_went(
    model: nn.Module, masks: dict[str, Tensor], result: Compaction
) -> None:
    masked, small = named_tensors(masked_copy(model, masks)), named_tensors(result.model)
    for name, tensor in masked.items():
        if not name.endswith(".columns"):  # positions, which change as what they point to shrinks
            assert torch.equal(cut(tensor, result.kept.get(name, {})), small[name]), name
    for name, parameter in result.model.named_parameters():
        zeros = result.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert parameter[~zeros].abs().sum() == 0


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), density=st.sampled_from([0.3, 0.7]))
def test_masked_units_are_removed(name: str, seed: int, density: float) -> None:
    model, graph = build(name)
    on = random_units(graph, density, torch.Generator().manual_seed(seed))
    masks = unit_masks(model, graph, on)
    result = compact(model, masks, IMAGE, units=graph)
    assert_equal_networks(masked_copy(model, masks), result.model)
    assert_kept_tells_where_entries_went(model, masks, result)
    # A layer keeps no unit that is off; it may lose more, by consequence.
    for layer, (kept, total) in result.summary.units.items():
        members = graph.layer_index == graph.layers.index(layer)
        assert kept <= int(on[members].sum()) and total == int(members.sum())
    assert result.summary.params_after == sum(p.numel() for p in result.model.parameters())
    assert result.summary.params_before == sum(p.numel() for p in model.parameters())
    assert result.masks == {}


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), density=st.sampled_from([0.05, 0.3, 0.8]))
def test_masked_weights_leave_an_equal_network(name: str, seed: int, density: float) -> None:
    model, graph = build(name)
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}
    try:
        result = compact(model, masks, IMAGE, units=graph)
    except ModelError as error:
        assert "would be emptied" in str(error)
        return
    assert_equal_networks(masked_copy(model, masks), result.model)
    assert_kept_tells_where_entries_went(model, masks, result)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), units=st.booleans())
def test_masked_features_are_gathered(seed: int, units: bool) -> None:
    model, graph = build("lenet")
    generator = torch.Generator().manual_seed(seed)
    on = random_units(graph, 0.6, generator) if units else torch.ones(graph.num_units, dtype=torch.bool)
    masks = unit_masks(model, graph, on)
    features = torch.rand(24, generator=generator) < 0.5
    features[::4] = True  # the first pixel of each channel stays, so that no channel dies of its features
    masks["4.weight"] &= features
    result = compact(model, masks, IMAGE, units=graph)
    assert_equal_networks(masked_copy(model, masks), result.model)
    assert_kept_tells_where_entries_went(model, masks, result)
    channels = on[graph.layer_index == graph.layers.index("2")]
    read = int((features & channels.repeat_interleave(4)).sum())
    layer = result.model.get_submodule("4")
    assert result.model.get_submodule("2").out_channels == int(channels.sum())
    if read < 4 * int(channels.sum()):
        assert isinstance(layer, GatheredLinear)
        assert layer.in_features == 4 * int(channels.sum())
        assert layer.weight.shape[1] == read
        assert result.summary.gathers == {"4": (read, layer.in_features)}
    else:
        assert type(layer) is nn.Linear and layer.in_features == read


def test_channels_without_features_die() -> None:
    model, graph = build("lenet")
    masks = {"4.weight": torch.ones(9, 24, dtype=torch.bool)}
    masks["4.weight"][:, 4:12] = False  # all pixels of channels 1 and 2
    masks["4.weight"][:, 13] = False  # one pixel of channel 3
    result = compact(model, masks, IMAGE, units=graph)
    assert result.model.get_submodule("2").out_channels == 4
    assert result.kept["2.weight"][0].tolist() == [0, 3, 4, 5]
    layer = result.model.get_submodule("4")
    assert isinstance(layer, GatheredLinear)
    assert (layer.in_features, layer.weight.shape[1]) == (16, 15)
    assert layer.columns.tolist() == [i for i in range(16) if i != 5]
    assert result.kept["4.weight"][1].tolist() == [0, 1, 2, 3, 12, *range(14, 24)]
    assert_equal_networks(masked_copy(model, masks), result.model)
    assert repr(result.summary) == (
        "Summary(517 -> 362 parameters; 0 4 of 4, 2 4 of 6, 4 9 of 9; 4 reads 15 of 16 inputs)"
    )


def test_inputs_of_the_first_layer_are_gathered() -> None:
    model, graph = build("perceptron")
    masks = {"1.weight": torch.ones(8, 100, dtype=torch.bool)}
    masks["1.weight"][:, :30] = False
    result = compact(model, masks, IMAGE, units=graph)
    assert result.model.get_submodule("1").weight.shape == (8, 70)
    assert_equal_networks(masked_copy(model, masks), result.model)


def test_dead_neurons_of_weight_masks_go() -> None:
    model, graph = build("perceptron")
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["3.weight"][:, 2] = False  # nobody reads unit 2 of the first layer
    masks["3.weight"][4], masks["3.bias"][4] = False, False  # unit 4 of the second layer is zero
    masks["5.weight"][0, 0] = False  # a lone zero stays as a zero
    result = compact(model, masks, IMAGE, units=graph)
    assert [tuple(p.shape) for _, p in result.model.named_parameters()] == [
        (7, 100),
        (7,),
        (6, 7),
        (6,),
        (3, 6),
        (3,),
    ]
    assert {name: (~mask).nonzero().tolist() for name, mask in result.masks.items()} == {"5.weight": [[0, 0]]}
    assert_equal_networks(masked_copy(model, masks), result.model)


def test_sigmoid_units_of_zeros_go_where_a_bias_takes_their_half() -> None:
    model, graph = build("sigmoid")
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["1.weight"][0], masks["1.bias"][0] = False, False  # sigmoid(0) = 0.5 is still read
    result = compact(model, masks, IMAGE, units=graph)
    assert result.model.get_submodule("1").out_features == 7
    assert_equal_networks(masked_copy(model, masks), result.model)
    # A bias that is held at zero takes nothing.
    masks["3.bias"][0] = False
    result = compact(model, masks, IMAGE, units=graph)
    assert result.model.get_submodule("1").out_features == 8
    assert_equal_networks(masked_copy(model, masks), result.model)


@pytest.mark.parametrize("name", ["lenet", "convnet", "residual"])
def test_empty_masks_give_a_copy(name: str) -> None:
    model, graph = build(name)
    for masks in (None, {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}):
        result = compact(model, masks, IMAGE, units=graph)
        assert result.kept == {} and result.masks == {} and result.summary.error == 0.0
        assert result.architecture == architecture_of(model)
        for key, tensor in named_tensors(model).items():
            twin = named_tensors(result.model)[key]
            assert torch.equal(twin, tensor) and twin.data_ptr() != tensor.data_ptr()


def test_the_given_network_is_not_changed() -> None:
    model, graph = build("lenet")
    model.train()
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    state = torch.get_rng_state()
    compact(model, unit_masks(model, graph, torch.arange(graph.num_units) % 3 > 0), IMAGE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert repr(model) == text and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_flags_hooks_and_types_are_kept() -> None:
    model, graph = build("convnet")
    model = copy.deepcopy(model).float().train()
    model.get_submodule("1").eval()
    model.get_submodule("3").weight.requires_grad_(False)
    widths: list[int] = []
    model.get_submodule("11").register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    masks = unit_masks(model, graph, torch.arange(graph.num_units) % 3 != 1)
    masks["11.weight"][:, 0] = False  # the layer with the hook becomes a gathered one
    small = compact(model, masks, IMAGE.float(), units=graph).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == flags
    assert all(p.dtype == torch.float32 for p in small.parameters())
    assert isinstance(small.get_submodule("11"), GatheredLinear)
    widths.clear()
    small.eval()(IMAGE.float())
    assert widths == [small.get_submodule("11").in_features]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_compacted_network_can_be_compacted_again(seed: int) -> None:
    model, graph = build("lenet")
    generator = torch.Generator().manual_seed(seed)
    masks = unit_masks(model, graph, random_units(graph, 0.8, generator))
    features = torch.rand(24, generator=generator) < 0.6
    features[::4] = True
    masks["4.weight"] &= features
    first = compact(model, masks, IMAGE, units=graph)
    again = {n: torch.ones_like(p, dtype=torch.bool) for n, p in first.model.named_parameters()}
    columns = torch.rand(again["4.weight"].shape[1], generator=generator) < 0.5
    columns[torch.randint(len(columns), (1,), generator=generator)] = True
    again["4.weight"] &= columns
    second = compact(first.model, again, IMAGE, check=IMAGE * 2)
    assert_equal_networks(masked_copy(first.model, again), second.model)
    assert_kept_tells_where_entries_went(first.model, again, second)
    assert second.model.get_submodule("4").weight.shape[1] == int(columns.sum())
    # The same as removing both at once.
    both = {name: mask.clone() for name, mask in masks.items()}
    kept = torch.arange(24)[first.kept["4.weight"][1]] if 1 in first.kept["4.weight"] else torch.arange(24)
    both["4.weight"][:, kept[~columns]] = False
    at_once = compact(model, both, IMAGE, units=graph).model
    assert repr(at_once) == repr(second.model)
    for name, tensor in named_tensors(at_once).items():
        assert torch.equal(tensor, named_tensors(second.model)[name]), name


def test_units_of_a_gathered_network_are_found() -> None:
    model, graph = build("lenet")
    masks = {"4.weight": torch.ones(9, 24, dtype=torch.bool)}
    masks["4.weight"][:, [5, 8, 9, 10]] = False
    small = compact(model, masks, IMAGE, units=graph).model
    traced = trace_compacted(small, IMAGE)
    check_graph(traced, {name: tuple(tensor.shape) for name, tensor in named_tensors(small).items()})
    assert repr(traced) == repr(graph)
    (read,) = [p.unit for p in traced.slices if p.parameter == "4.weight" and p.reads]
    (own,) = [p.unit for p in traced.slices if p.parameter == "2.weight" and not p.reads]
    assert read.tolist() == own.repeat_interleave(4)[masks["4.weight"][0]].tolist()
    # Removing the unit that is read through three of its four columns.
    again = unit_masks(small, traced, torch.arange(traced.num_units) != own[1])
    result = compact(small, again, IMAGE)
    assert result.model.get_submodule("2").out_channels == 5
    assert result.model.get_submodule("4").in_features == 20
    assert result.kept["4.weight"][1].tolist() == [0, 1, 2, 3, *range(7, 20)]
    assert_equal_networks(masked_copy(small, again), result.model)


def test_a_gather_that_is_not_needed_any_more_is_dropped() -> None:
    model, graph = build("lenet")
    masks = {"4.weight": torch.ones(9, 24, dtype=torch.bool)}
    masks["4.weight"][:, 5] = False
    first = compact(model, masks, IMAGE, units=graph)
    assert isinstance(first.model.get_submodule("4"), GatheredLinear)
    same = compact(first.model, None, IMAGE)
    assert same.architecture == first.architecture and same.kept == {}
    again = {"4.weight": torch.ones(9, 23, dtype=torch.bool)}
    again["4.weight"][:, 4:7] = False  # what is left of channel 1
    second = compact(first.model, again, IMAGE)
    assert type(second.model.get_submodule("4")) is nn.Linear
    assert second.model.get_submodule("4").in_features == 20
    assert second.kept["4.weight"][1].tolist() == [0, 1, 2, 3, *range(7, 23)]
    assert_equal_networks(masked_copy(first.model, again), second.model)


def test_the_architecture_rebuilds_the_network() -> None:
    model, graph = build("convnet")
    masks = unit_masks(model, graph, torch.arange(graph.num_units) % 3 != 1)
    masks["11.weight"][:, 0] = False
    result = compact(model, masks, IMAGE, units=graph)
    fresh = convnet().double()
    reshape_(fresh, result.architecture)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert repr(fresh) == repr(result.model)
    assert_equal_networks(result.model, fresh)


def test_an_emptied_layer_is_refused() -> None:
    model, graph = build("lenet")
    masks = unit_masks(model, graph, graph.layer_index != graph.layers.index("2"))
    with pytest.raises(
        ModelError,
        match=r"the layer '[024]' would be emptied, and with it every path from the input to the output",
    ):
        compact(model, masks, IMAGE, units=graph)
    model, graph = build("perceptron")
    with pytest.raises(ModelError, match="the layer '1' would be emptied"):
        compact(model, {"1.weight": torch.zeros(8, 100, dtype=torch.bool)}, IMAGE, units=graph)


def test_masks_that_do_not_fit_are_refused() -> None:
    model, graph = build("perceptron")
    with pytest.raises(
        ModelError, match=r"mask of '1.bias' to be bool of shape \[8\], got bool of shape \[7\]"
    ):
        compact(model, {"1.bias": torch.ones(7, dtype=torch.bool)}, IMAGE, units=graph)
    with pytest.raises(ModelError, match="unknown masked parameter 'bias'"):
        compact(model, {"bias": torch.ones(7, dtype=torch.bool)}, IMAGE, units=graph)


def changed(graph: UnitGraph, parameter: str, change: Callable[[Slice], Slice | None]) -> UnitGraph:
    """The graph with the reading slices of one parameter changed or dropped."""
    pieces = [change(p) if p.parameter == parameter and p.reads else p for p in graph.slices]
    kept = tuple(piece for piece in pieces if piece is not None)
    return UnitGraph(kept, graph.layers, graph.layer_index, graph.fixed, graph.buffers, graph.zero_preserving)


def test_a_wrong_graph_is_caught() -> None:
    model, graph = build("lenet")
    off = int((graph.layer_index == graph.layers.index("2")).nonzero()[1])
    masks = unit_masks(model, graph, torch.arange(graph.num_units) != off)
    compact(model, masks, IMAGE, units=graph)
    # Columns of channel 0 are cut instead of those of channel 1, as a wrong flatten rule would do.
    wrong = changed(graph, "4.weight", lambda p: Slice(p.parameter, p.dim, p.unit.roll(-4), True))
    with pytest.raises(ModelError, match="the compacted network differs from the masked one by"):
        compact(model, unit_masks(model, graph, torch.arange(graph.num_units) != off), IMAGE, units=wrong)
    # The consumer is forgotten.
    lost = changed(graph, "4.weight", lambda p: None)
    masks = unit_masks(model, graph, torch.arange(graph.num_units) != off)
    with pytest.raises(ModelError, match="the compacted network fails where the masked one runs"):
        compact(model, masks, IMAGE, units=lost)
    # A unit that is not zero is said to be.
    model, graph = build("sigmoid")
    wrong = UnitGraph(
        graph.slices, graph.layers, graph.layer_index, (), (), torch.ones(graph.num_units, dtype=torch.bool)
    )
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["1.weight"][0], masks["1.bias"][0] = False, False
    with pytest.raises(ModelError, match="differs from the masked one"):
        compact(model, masks, IMAGE, units=wrong)


def test_a_graph_of_another_network_is_refused() -> None:
    model, _ = build("perceptron")
    masks = {"1.weight": torch.zeros(8, 100, dtype=torch.bool)}
    with pytest.raises(ModelError, match=r"the unit graph expects .* trace the model as it is now"):
        compact(model, masks, IMAGE, units=build("lenet")[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_kept() -> None:
    model, graph = build("lenet")
    model = copy.deepcopy(model).cuda()
    on = torch.arange(graph.num_units) % 3 > 0
    masks = {name: mask.cuda() for name, mask in unit_masks(model, graph, on).items()}
    masks["4.weight"][:, 13] = False
    result = compact(model, masks, IMAGE, units=graph)
    assert isinstance(result.model.get_submodule("4"), GatheredLinear)
    assert {tensor.device.type for tensor in named_tensors(result.model).values()} == {"cuda"}
    assert_equal_networks(masked_copy(model, masks).cpu(), copy.deepcopy(result.model).cpu())
