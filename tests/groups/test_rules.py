"""Rules: hand-computed patterns, disjointness, adjointness, scopes, stacking and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.rules import RULES, check_spec, make_grouping

PLAIN = [
    "weights",
    "rows",
    "columns",
    "filters",
    "channels",
    "kernels",
    "shapes",
    "blocks",
    "blocks:3x2",
    "1:4",
    "2:4",
]


class Net(nn.Module):
    """Two convolutions (one grouped), a transposed one, two linear layers; all inputs divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3)
        self.conv2 = nn.Conv2d(8, 6, (1, 2), groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.fc1 = nn.Linear(8, 5)
        self.bn = nn.BatchNorm1d(5)
        self.fc2 = nn.Linear(4, 3, bias=False)


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Cnn(nn.Module):
    """Two units of the convolution, each read by four columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.fc1 = nn.Linear(8, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


IMAGE = torch.zeros(2, 1, 4, 4)


def grouping_of(spec: str) -> tuple[nn.Module, Grouping]:
    if "units" in spec or "features" in spec:
        model: nn.Module = Cnn()
        return model, make_grouping(model, spec, example=IMAGE)
    return (model := Net()), make_grouping(model, spec)


def index_of(grouping: Grouping, parameter: str) -> Tensor:
    """Group of every entry of a parameter that has one label."""
    (labels,) = [part for part in grouping.labels if part.parameter == parameter]
    return labels.index.expand(labels.shape)


@pytest.mark.parametrize("spec", [*PLAIN, "units", "features", "units+features", "weights+filters+rows"])
def test_reduce_and_expand_are_adjoint(spec: str) -> None:
    model, grouping = grouping_of(spec)
    values = {name: torch.randn_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    vector = torch.randn(grouping.num_groups, dtype=torch.float64)
    left = float(grouping.reduce(values) @ vector)
    right = sum(float((values[name] * part).sum()) for name, part in grouping.expand(vector).items())
    assert abs(left - right) < 1e-12 * max(1, grouping.num_groups)


@pytest.mark.parametrize("spec", PLAIN)
def test_plain_rules_are_disjoint_and_complete(spec: str) -> None:
    model, grouping = grouping_of(spec)
    ones = grouping.expand(torch.ones(grouping.num_groups))
    weights = {name: p for name, p in model.named_parameters() if name in ones}
    assert not any(name.endswith("bias") or name.startswith("bn") for name in ones)
    for part in ones.values():
        assert torch.equal(part, torch.ones_like(part))
    assert int(grouping.sizes().sum()) == sum(p.numel() for p in weights.values())
    assert int(grouping.sizes().min()) > 0


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ("weights", [288, 48, 96, 40, 12]),
        ("rows", [5, 3]),
        ("columns", [8, 4]),
        ("filters", [8, 6, 6]),
        ("channels", [4, 8, 8]),
        ("kernels", [32, 24, 24]),
        ("shapes", [36, 16, 32]),
        ("blocks", [2 * 9, 2 * 2, 2 * 3, 2 * 2, 1]),
        ("blocks:3x2", [3 * 18, 2 * 4, 3 * 6, 2 * 4, 1 * 2]),
    ],
)
def test_number_of_groups_per_layer(spec: str, counts: list[int]) -> None:
    _, grouping = grouping_of(spec)
    layers = {"rows": ("fc1", "fc2"), "columns": ("fc1", "fc2")}.get(spec, ("conv1", "conv2", "up"))
    if len(counts) == 5:
        layers = ("conv1", "conv2", "up", "fc1", "fc2")
    assert grouping.layers == layers
    assert torch.bincount(grouping.layer_index).tolist() == counts


def test_channels_and_filters_of_grouped_convolutions() -> None:
    net = Net()
    # conv2 is [6, 4, 1, 2]: outputs 0-2 read inputs 0-3, outputs 3-5 read inputs 4-7.
    channels = index_of(make_grouping(net, "channels", include=["conv2"]), "conv2.weight")
    assert channels[:, :, 0, 0].tolist() == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3
    # up is [8, 3, 2, 2]: inputs 0-3 feed outputs 0-2, inputs 4-7 feed outputs 3-5.
    filters = index_of(make_grouping(net, "filters", include=["up"]), "up.weight")
    assert filters[:, :, 1, 1].tolist() == [[0, 1, 2]] * 4 + [[3, 4, 5]] * 4


def test_zeroing_an_input_channel_is_masking_its_group() -> None:
    conv = nn.Conv2d(8, 6, (1, 2), groups=2).double()
    grouping = make_grouping(nn.Sequential(conv), "channels")
    x = torch.randn(2, 8, 3, 4).double()
    on = torch.tensor([True, False, True, True, True, True, False, True])
    masked = conv.weight * grouping.masks(on)["0.weight"]
    expected = conv(x * on.view(1, 8, 1, 1))
    torch.testing.assert_close(
        nn.functional.conv2d(x, masked, conv.bias, groups=2), expected, atol=1e-12, rtol=0
    )


def test_zeroing_an_output_of_a_transposed_convolution_is_masking_its_group() -> None:
    conv = nn.ConvTranspose1d(4, 6, 2, groups=2, bias=False).double()
    grouping = make_grouping(nn.Sequential(conv), "filters")
    x = torch.randn(2, 4, 3).double()
    on = torch.tensor([True, False, True, False, True, True])
    masked = conv.weight * grouping.masks(on)["0.weight"]
    result = nn.functional.conv_transpose1d(x, masked, groups=2)
    torch.testing.assert_close(result, conv(x) * on.view(1, 6, 1), atol=1e-12, rtol=0)


def test_blocks_by_hand() -> None:
    grouping = make_grouping(nn.Sequential(nn.Linear(3, 3)), "blocks:2x2")
    assert index_of(grouping, "0.weight").tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]


def test_n_of_m_pools_run_along_the_inputs() -> None:
    grouping = make_grouping(nn.Sequential(nn.Linear(4, 2)), "1:2")
    assert grouping.quota is not None
    assert (grouping.quota.keep, grouping.quota.pool.tolist()) == (1, [0, 0, 1, 1, 2, 2, 3, 3])
    net = nn.Sequential(nn.Linear(4, 1), nn.Conv1d(4, 1, 2))
    quota = make_grouping(net, "2:4").quota
    # The four inputs of the linear layer, then the four inputs at each of the two kernel positions.
    assert quota is not None
    assert quota.pool.tolist() == [0, 0, 0, 0, 1, 2, 1, 2, 1, 2, 1, 2]
    transposed = make_grouping(nn.Sequential(nn.ConvTranspose1d(2, 2, 1)), "1:2").quota
    assert transposed is not None
    assert transposed.pool.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("spec", ["1:4", "2:4"])
def test_every_pool_holds_m_weights(spec: str) -> None:
    _, grouping = grouping_of(spec)
    assert grouping.quota is not None
    assert grouping.quota.keep == int(spec[0])
    assert set(torch.bincount(grouping.quota.pool).tolist()) == {4}
    assert torch.equal(grouping.sizes(), torch.ones(grouping.num_groups, dtype=torch.int64))


def test_n_of_m_refuses_layers_that_do_not_divide() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(GroupingError, match="'2:4' needs layers whose inputs divide by 4, but '0' has 6"):
        make_grouping(net, "2:4")
    assert make_grouping(net, "2:4", exclude=["0"]).layers == ("1",)


def test_include_and_exclude() -> None:
    net = Net()
    assert make_grouping(net, "weights", include=["conv*", "fc1"], exclude=["conv1"]).layers == (
        "conv2",
        "fc1",
    )
    assert make_grouping(net, "rows", include=["fc2.weight"]).layers == ("fc2",)
    assert make_grouping(net, "filters+rows", exclude=["conv?", "fc1"]).layers == ("up", "fc2")
    with pytest.raises(
        GroupingError, match=r"'filters' found nothing to group \(include fc1; exclude conv1\); layers"
    ):
        make_grouping(net, "filters", include=["fc1"], exclude=["conv1"])
    with pytest.raises(GroupingError, match="layers of the model: conv1, conv2, up, fc1, fc2"):
        make_grouping(net, "filters", include=["nothing"])
    with pytest.raises(GroupingError, match=r"expected a list of patterns for exclude, got the text 'fc1'"):
        make_grouping(net, "rows", exclude="fc1")
    with pytest.raises(GroupingError, match="layers of the model: none"):
        make_grouping(nn.ReLU(), "weights")


def test_unknown_names_and_numbers() -> None:
    with pytest.raises(GroupingError, match="unknown rule 'filter'; did you mean 'filters'"):
        make_grouping(Net(), "filter")
    with pytest.raises(GroupingError, match=r"Choices: .*blocks:RxC.*features.*n:m.*units.*weights"):
        check_spec("units+nothing")
    with pytest.raises(GroupingError, match="blocks need at least one row and one column, got 'blocks:0x4'"):
        check_spec("blocks:0x4")
    for bad in ("4:4", "0:4", "5:4"):
        with pytest.raises(
            GroupingError, match=f"n:m keeps n of every m weights with 0 < n < m, got '{bad}'"
        ):
            check_spec(bad)
    for name in [*RULES, *PLAIN, "units + features", "3:8"]:
        check_spec(name)


def test_stacking_strings_functions_and_groupings() -> None:
    net = Mlp()

    def first_row(model: nn.Module, example: Tensor | None) -> Grouping:
        index = torch.tensor([[0], [-1], [-1]])
        return Grouping("first_row", (Labels("0.weight", (3, 4), index),), ("0",), torch.tensor([0]))

    ready = make_grouping(net, "columns")
    stacked = make_grouping(net, ["rows", first_row, ready])
    assert stacked.name == "rows+first_row+columns"
    assert stacked.layers == ("0", "2", "0 (first_row)", "0 (columns)", "2 (columns)")
    assert stacked.num_groups == 5 + 1 + 7
    assert make_grouping(net, first_row).name == "first_row"
    assert make_grouping(net, ready) is ready


def test_ready_groupings_are_restricted_by_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 1))
    ready = make_grouping(net, "1:2")
    part = make_grouping(net, ready, exclude=["1"])
    assert part.layers == ("0", "2")
    assert part.num_groups == 12 + 4
    assert [labels.parameter for labels in part.labels] == ["0.weight", "2.weight"]
    assert part.quota is not None
    assert torch.bincount(part.quota.pool).tolist() == [2] * 6 + [0] * 4 + [2] * 2
    direct = make_grouping(net, "1:2", exclude=["1"])
    assert torch.equal(index_of(part, "2.weight"), index_of(direct, "2.weight"))
    with pytest.raises(GroupingError, match=r"the rule '1:2' found nothing to group \(include 7\)"):
        make_grouping(net, ready, include=["7"])


def test_shared_weights_are_grouped_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    grouping = make_grouping(net, "rows")
    assert (grouping.layers, grouping.num_groups) == (("0",), 3)


def test_computed_and_lazy_weights_are_refused() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    with pytest.raises(GroupingError, match="the weight of '0' is computed from other parameters"):
        make_grouping(net, "rows")
    assert make_grouping(net, "rows", exclude=["0"]).layers == ("1",)
    with pytest.raises(GroupingError, match="the lazy layer '0' has no weights yet"):
        make_grouping(nn.Sequential(nn.LazyLinear(2)), "rows")


def test_a_bare_layer_has_a_name() -> None:
    assert make_grouping(nn.Linear(2, 3), "rows").describe(2) == "model[2]"


def test_units_of_a_small_cnn() -> None:
    model, grouping = grouping_of("units")
    assert grouping.layers == ("conv", "fc1")
    assert grouping.layer_index.tolist() == [0, 0, 1, 1, 1]
    found = {
        (part.parameter, part.dim): (part.index.flatten().tolist(), part.gate) for part in grouping.labels
    }
    assert found == {
        ("conv.weight", 0): ([0, 1], False),
        ("conv.bias", 0): ([0, 1], False),
        ("bn.weight", 0): ([0, 1], False),
        ("bn.bias", 0): ([0, 1], False),
        ("fc1.weight", 1): ([0, 0, 0, 0, 1, 1, 1, 1], True),
        ("fc1.weight", 0): ([2, 3, 4], False),
        ("fc1.bias", 0): ([2, 3, 4], False),
        ("fc2.weight", 1): ([2, 3, 4], True),
    }
    # 9 + 1 + 1 + 1 own entries and 4 columns of 3; 8 + 1 own entries and 2 in a column.
    assert grouping.sizes().tolist() == [24, 24, 11, 11, 11]
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert grouping.reduce(ones, gates_only=True).tolist() == [12, 12, 2, 2, 2]


def test_scaling_the_gates_scales_what_consumers_read() -> None:
    model, grouping = grouping_of("units")
    model.double().eval()
    assert isinstance(model, Cnn)
    factor = torch.randn(5).double()
    x = torch.randn(3, 1, 4, 4).double()
    hidden = torch.relu(model.bn(model.conv(x))) * factor[:2].view(1, 2, 1, 1)
    expected = model.fc2(torch.relu(model.fc1(hidden.flatten(1))) * factor[2:])
    scaled = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, scale in grouping.scales(factor).items():
        scaled[name] = scaled[name] * scale
    result = torch.func.functional_call(model, scaled, (x,))
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def test_features_are_single_columns_behind_a_flatten() -> None:
    _, grouping = grouping_of("features")
    assert (grouping.layers, grouping.num_groups) == (("fc1.inputs",), 8)
    (labels,) = grouping.labels
    assert (labels.parameter, labels.dim, labels.gate) == ("fc1.weight", 1, True)
    assert labels.index.tolist() == [list(range(8))]
    _, stacked = grouping_of("units+features")
    assert stacked.layers == ("conv", "fc1", "fc1.inputs")
    assert stacked.describe(5) == "fc1.inputs[0]"


def test_scope_of_units_and_features() -> None:
    model = Cnn()
    assert make_grouping(model, "units", example=IMAGE, include=["conv"]).layers == ("conv",)
    only = make_grouping(model, "units", example=IMAGE, exclude=["conv"])
    assert (only.layers, only.num_groups) == (("fc1",), 3)
    assert {part.parameter for part in only.labels} == {"fc1.weight", "fc1.bias", "fc2.weight"}
    # A unit of several layers is out of scope as soon as one of them is excluded.
    assert make_grouping(model, "units", example=IMAGE, exclude=["bn"]).layers == ("fc1",)
    assert make_grouping(model, "features", example=IMAGE, include=["*.inputs"]).num_groups == 8
    with pytest.raises(
        GroupingError, match=r"'units' found nothing to group \(include fc2\); layers with units: conv, fc1"
    ):
        make_grouping(model, "units", example=IMAGE, include=["fc2"])
    with pytest.raises(GroupingError, match="no linear layer in the scope reads flattened channels"):
        make_grouping(model, "features", example=IMAGE, exclude=["fc1"])


def test_rules_that_trace_need_an_example() -> None:
    for rule in ("units", "features"):
        with pytest.raises(GroupingError, match=f"the rule '{rule}' traces the model and needs an input"):
            make_grouping(Cnn(), rule)


def test_units_name_why_nothing_is_left() -> None:
    with pytest.raises(
        GroupingError, match="layers with units: none; 'weight': 2 channels stay: they are outputs"
    ):
        make_grouping(nn.Linear(3, 2), "units", example=torch.zeros(1, 3))


# The network of these tests has no branch; tests/groups/test_branch_rules.py has some.
@pytest.mark.parametrize("name", sorted(set(RULES) - {"branches"}))
def test_every_rule_of_the_table_makes_a_grouping(name: str) -> None:
    _, grouping = grouping_of(name)
    assert grouping.num_groups > 0
    assert grouping.name == name
