"""Small nets whose code is handed sizes, positions, states, regions or raw parameters: what follows a removal.

From each, about 40 % of all units are removed at once, in two ways. The compacted net must equal the masked one in
evaluation and in training mode, and be traced to the units that are left. What stays must be named, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.groups import channel_ids
from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.prune.compaction import compact
from sparsebayes.prune.masking import apply_masks_

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
WORDS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()


class Net(nn.Module):
    """Layers, parameters and numbers by name, and a forward given as a function of (net, x)."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def prepared(net: nn.Module) -> nn.Module:
    """The net in float64 and evaluation mode, with norms that are not the identity."""
    for module in net.double().eval().modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm):
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
    return net


def some_units(graph: UnitGraph, seed: int) -> Tensor:
    """Which units stay: at least one of each layer, and not all of a layer that has two."""
    on = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(seed)) > 0.4
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        if not bool(on[members].any()):
            on[members[0]] = True
        if bool(on[members].all()) and len(members) > 1:
            on[members[-1]] = False
    return on


def check(
    build: Callable[[], nn.Module], x: Tensor, num_units: int, reason: str = "", *, again: bool = True
) -> None:
    """Trace a net, compare its number of units, and remove some in two ways; trace what is left again."""
    torch.manual_seed(0)
    net = prepared(build())
    graph = trace_units(net, x)
    assert graph.num_units == num_units, (graph, graph.fixed)
    assert any(line.startswith(reason) for line in graph.fixed), graph.fixed
    grouping = unit_grouping(net, graph)
    for seed in range(2 if num_units else 0):
        on = some_units(graph, seed)
        masks = grouping.masks(on)
        masked = copy.deepcopy(net)
        apply_masks_(masked, masks)
        small = compact(net, masks, x, units=graph).model
        for train in (False, True):
            expected, actual = masked.train(train)(x), small.train(train)(x)
            torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
        if again:
            left = trace_units(small.eval(), x)
            assert left.num_units == int(on.sum()), left.fixed


def from_state(
    state: Callable[[Net, Tensor], object], kind: type[nn.RNNBase] = nn.GRU, layers: int = 1
) -> Callable[[], Net]:
    """A recurrent layer (6 units) that starts from a state, behind 7 features and in front of 4."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(net.fc(net.rnn(x, net.state(net, x))[0][:, -1]).relu())

    return lambda: Net(
        forward, state=state, hidden=6, a=nn.Linear(5, 7), rnn=kind(7, 6, layers, batch_first=True),
        first=nn.Parameter(torch.randn(1, 1, 6)), code=nn.Linear(7, 6), fc=nn.Linear(6, 4), head=nn.Linear(4, 2),
    )  # fmt: skip


def zeros(net: Net, x: Tensor) -> Tensor:
    return torch.zeros(net.rnn.num_layers, x.shape[0], net.hidden, dtype=x.dtype)


STATES: dict[str, tuple[Callable[[], Net], int, str]] = {
    "attribute": (from_state(lambda net, x: (zeros(net, x), zeros(net, x).detach()), nn.LSTM), 17, ""),
    "two layers": (from_state(zeros, layers=2), 17, ""),
    "attribute of the layer": (
        from_state(lambda net, x: x.new_zeros(1, len(x), net.rnn.hidden_size)),
        17,
        "",
    ),
    "number": (
        from_state(lambda net, x: x.new_zeros(1, len(x), 6)),
        11,
        "'rnn': 18 channels stay: new_zeros in the model's forward gives the states that they start from the size 6",
    ),
    "ones": (
        from_state(lambda net, x: zeros(net, x) + 1),
        11,
        "'rnn': 18 channels stay: gru at 'rnn' starts from",
    ),
    "filled": (from_state(lambda net, x: torch.full((1, len(x), net.hidden), 0.3, dtype=x.dtype)), 17, ""),
    "parameter": (from_state(lambda net, x: net.first.expand(-1, len(x), -1)), 17, ""),
    "computed": (from_state(lambda net, x: net.code(x.mean(1))[None].tanh()), 17, ""),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_recurrent_layers_start_from(name: str) -> None:
    build, num_units, reason = STATES[name]
    check(build, WORDS, num_units, reason)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def cut_at(first: Callable[[Net, Tensor], Tensor], size: int, channels: int) -> Callable[[], Net]:
    """Some code cuts channels off, and joins them with 4 others."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(torch.cat([net.b(x), first(net, x).sigmoid()], 1))

    return lambda: Net(
        forward, a=block(3, channels), b=nn.Conv2d(channels, 4, 1), one=1, head=nn.Conv2d(4 + size, 2, 1)
    )


@pytest.mark.parametrize("channels", [5, 8, 9, 17])
@pytest.mark.parametrize(
    ("first", "size", "fixed"),
    [
        (lambda net, x: x[:, :1], 1, 1),
        (lambda net, x: x[:, -1:], 1, 1),
        (lambda net, x: x[:, : net.one], 1, 1),
        (lambda net, x: x.narrow(1, 1, 1), 1, 2),
        (lambda net, x: x[:, 1:3], 2, 3),
        (lambda net, x: x[:, -2:], 2, 2),
        (lambda net, x: torch.cat(x.split([1, x.shape[1] - 1], 1)[:1], 1), 1, 1),
    ],
)
def test_channels_cut_off_by_number_stay_and_no_others(
    first: Callable[[Net, Tensor], Tensor], size: int, fixed: int, channels: int
) -> None:
    reason = f"'a.0': {fixed} channels stay: "
    check(cut_at(first, size, channels), IMAGES, channels - fixed + 4, reason)


@pytest.mark.parametrize("channels", range(6, 26, 2))
def test_halves_are_not_taken_for_pieces_that_shrink_alone(channels: int) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        half = x.shape[1] // 2
        return net.head(x[:, :half] * x[:, half:].sigmoid())

    net = Net(forward, a=block(3, channels), head=nn.Conv2d(channels // 2, 2, 1))
    assert trace_units(net, IMAGES.float()).num_units == channels // 2


def regions() -> Net:
    """No gradient around a block and within another region, where channels are cut and joined."""

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = net.a(x)
        with torch.autocast("cpu", enabled=False):
            x = net.b(x)
            with torch.no_grad():
                weight = x.mean((2, 3), keepdim=True)
            first, second = (x * weight).chunk(2, 1)
            x = torch.cat([first, second.sigmoid()], 1)
        return net.head(net.c(x).relu())

    return Net(forward, a=block(3, 5), b=block(5, 8), c=nn.Conv2d(8, 6, 1), head=nn.Conv2d(6, 2, 1))


def attention_with_computed_biases() -> Net:
    """Keys and values of another width: PyTorch cuts the three biases out of one parameter."""

    def forward(net: Net, x: Tensor) -> Tensor:
        seen = net.a(x).flatten(2).transpose(1, 2)
        words = net.patch(x).flatten(2).transpose(1, 2)
        return net.head((words + net.attend(words, seen, seen, need_weights=False)[0]).mean(1))

    attend = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    return Net(forward, a=block(3, 6), patch=nn.Conv2d(3, 8, 4, 4), attend=attend, head=nn.Linear(8, 2))


def test_operations_in_regions_are_followed_like_those_around_them() -> None:
    check(regions, IMAGES, 5 + 4 + 6)


def test_where_a_bias_is_computed_only_what_the_layer_gives_stays() -> None:
    reason = "'attend': 44 channels stay: the bias of linear at 'attend' is computed by other operations"
    check(attention_with_computed_biases, IMAGES, 6, reason)


def words_of(code: Callable[[Net, Tensor], Tensor]) -> Callable[[], Net]:
    """8 features of 4 patches, some code with raw parameters, and 5 features behind it."""

    def forward(net: Net, x: Tensor) -> Tensor:
        words = code(net, net.patch(x).flatten(2).transpose(1, 2))
        return net.head(net.fc(words).relu().mean(1))

    def build() -> Net:
        layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        net = Net(
            forward, places=nn.Parameter(torch.randn(1, 9, 8)), extra=nn.Parameter(torch.randn(1, 3, 8)),
            square=nn.Parameter(torch.randn(8, 8)), wide=nn.Parameter(torch.randn(4, 16)), layer=layer,
            tall=nn.Parameter(torch.randn(8, 4)), q=nn.Linear(8, 6), patch=nn.Conv2d(3, 8, 4, 4),
            back=nn.Linear(6, 8), fc=nn.Linear(8, 5), head=nn.Linear(5, 2),
        )  # fmt: skip
        net.register_buffer("waves", torch.randn(9, 8))
        return net

    return build


RAW: dict[str, tuple[Callable[[Net, Tensor], Tensor], int, str]] = {
    "sliced": (lambda net, x: x + net.places[:, : x.shape[1]], 13, ""),
    "sliced twice": (
        lambda net, x: torch.cat(
            [net.extra.expand(len(x), -1, -1) + net.places[:, :3], x + net.places[:, 3:7]], 1
        ),
        13,
        "",
    ),
    "sliced buffer": (lambda net, x: x + net.waves[: x.shape[1]], 13, ""),
    "indexed": (lambda net, x: x + net.waves[torch.arange(x.shape[1])] + net.places[0, :4], 13, ""),
    "joined": (lambda net, x: torch.cat([net.extra.expand(len(x), -1, -1), x], 1), 13, ""),
    "queries": (lambda net, x: net.layer(net.extra.expand(len(x), -1, -1), x), 8 + 5 + 2 + 2 + 12, ""),
    "linear first": (
        lambda net, x: net.back(net.q(net.extra).relu()).mean(1, keepdim=True) + x,
        8 + 5 + 6 + 8,
        "",
    ),
    "product first": (lambda net, x: x + (net.places[:, :4] @ net.square).tanh(), 8 + 5 + 8, ""),
    "cut along channels": (
        lambda net, x: x + net.wide[:, :8],
        5,
        "'patch': 8 channels stay: they lie along a dim of a raw parameter that is cut",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_positions_of_raw_parameters_go_together_whoever_meets_them_first(name: str) -> None:
    code, num_units, reason = RAW[name]
    # One head alone is not told from none.
    check(words_of(code), IMAGES, num_units, reason, again=name != "queries")


@pytest.mark.parametrize(
    ("code", "num_units", "reason"),
    [
        (lambda net, x: x + net.places[:, :4], 13, ""),
        (lambda net, x: x + net.waves[: x.shape[1]], 13, ""),
        (
            lambda net, x: x + net.tall.t(),
            5,
            "'patch': 8 channels stay: 'tall' has more than 30 entries, and they do not lie along its last dim",
        ),
    ],
)
def test_large_parameters_have_channels_along_their_last_dim(
    code: Callable[[Net, Tensor], Tensor], num_units: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_ids, "_MAX_LEAF", 30)
    check(words_of(code), IMAGES, num_units, reason)


@pytest.mark.parametrize(
    ("view", "num_units", "reason"),
    [
        (lambda net, x: x.view(len(x), net.channels, 2, 2), 6 + 5, ""),
        (lambda net, x: x.view(len(x), x.shape[1] // 4, 2, 2), 6 + 5, ""),
        (
            lambda net, x: x.view(-1, 6, 2, 2),
            5,
            "'fc': 24 channels stay: view in the model's forward splits them over",
        ),
    ],
)
def test_features_that_become_images(
    view: Callable[[Net, Tensor], Tensor], num_units: int, reason: str
) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = view(net, net.fc(x.mean(1)))
        return net.head(net.up(x.relu()).relu())

    def build() -> Net:
        up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        return Net(forward, channels=6, fc=nn.Linear(5, 24), up=up, head=nn.Conv2d(5, 2, 1))

    check(build, WORDS, num_units, reason)


def test_a_batch_that_holds_several_frames_of_each_film_is_taken_as_a_whole() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(x.view(len(x) // net.frames, net.frames, *x.shape[1:]).mean((1, 3, 4)))

    films = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    check(lambda: Net(forward, frames=3, a=block(3, 5), head=nn.Linear(5, 2)), films, 5)
