"""Networks that use their parameters in ways no record explains: still right, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from sparsebayes.curvature import entry_curvature, gate_curvature
from sparsebayes.curvature.factors import Starts
from sparsebayes.curvature.fallback import per_image_gradients
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.errors import ModelError
from sparsebayes.groups.grouping import Grouping, Labels


class Wrapped(nn.Module):
    """A network from modules and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


class Twofold(torch.autograd.Function):
    """2 x w^T, with a backward of its own and no batching rule; its forward calls `functional.linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.T @ x


def _attention() -> nn.Module:
    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave((h + self.attention(h, h, h)[0]).mean(1))

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    return Wrapped(forward, enter=nn.Linear(3, 4), attention=attention, leave=nn.Linear(4, 3))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return Wrapped(
        lambda self, x: self.leave(self.layer(self.embed(x)).mean(1)),
        embed=nn.Embedding(7, 4),
        layer=layer,
        leave=nn.Linear(4, 3),
    )


def _recurrent() -> nn.Module:
    return Wrapped(
        lambda self, x: self.leave(self.cells(x)[0][:, -1]),
        cells=nn.LSTM(3, 4, batch_first=True),
        leave=nn.Linear(4, 3),
    )


def _sequence_first() -> nn.Module:
    return Wrapped(
        lambda self, x: self.leave(self.enter(x.transpose(0, 1)).tanh().mean(0)),
        enter=nn.Linear(3, 4),
        leave=nn.Linear(4, 3),
    )


def _folded() -> nn.Module:
    return Wrapped(
        lambda self, x: self.leave(self.enter(x.reshape(-1, 3)).tanh().reshape(len(x), -1, 4).mean(1)),
        enter=nn.Linear(3, 4),
        leave=nn.Linear(4, 3),
    )


def _single_images() -> nn.Module:
    return Wrapped(
        lambda self, x: self.leave(torch.stack([self.conv(image).tanh().flatten() for image in x])),
        conv=nn.Conv2d(1, 2, 3),
        leave=nn.Linear(8, 3),
    )


def _tied() -> nn.Module:
    leave = nn.Linear(4, 3, bias=False)
    embed = nn.Embedding(3, 4)
    leave.weight = embed.weight
    return Wrapped(lambda self, x: self.leave(self.embed(x).mean(1)), embed=embed, leave=leave)


def _custom_function() -> nn.Module:
    return Wrapped(
        lambda self, x: self.leave(Twofold.apply(x, self.enter.weight).tanh()),
        enter=nn.Linear(3, 4, bias=False),
        leave=nn.Linear(4, 3),
    )


def _scripted(shared: bool) -> nn.Module:
    layer = nn.Linear(3, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        scripted = torch.jit.script(layer)
    return nn.Sequential(layer if shared else nn.Linear(3, 3), nn.Tanh(), scripted)


def _weight_also_regularised() -> nn.Module:
    return Wrapped(
        lambda self, x: self.enter(x).tanh() * self.enter.weight.square().sum(),
        enter=nn.Linear(3, 3),
    )


def _odd_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].bias = nn.Parameter(torch.randn(1, 3))
    return model


def _norm_with_one_tensor_for_both() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    norm.bias = norm.weight
    return nn.Sequential(nn.Linear(3, 3), norm)


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(50, 3))


SEQUENCE = (4, 3)
# Name: network, shape of an image (int: that many tokens), parameters that the records must not claim.
ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int, str]] = {
    "attention": (_attention, SEQUENCE, "attention."),
    "transformer": (_transformer, 5, "embed. layer.self_attn."),
    "recurrent": (_recurrent, SEQUENCE, "cells."),
    "sequence first": (_sequence_first, SEQUENCE, "enter."),
    "folded": (_folded, SEQUENCE, "enter."),
    "single images": (_single_images, (1, 4, 4), "conv."),
    "tied": (_tied, 5, "embed."),
    "custom function": (_custom_function, (3,), "enter."),
    "scripted": (lambda: _scripted(False), (3,), "2."),
    "scripted and shared": (lambda: _scripted(True), (3,), "0."),
    "weight read twice": (_weight_also_regularised, (3,), "enter.weight"),
    "odd bias": (_odd_bias, (3,), "0."),
    "one tensor for both": (_norm_with_one_tensor_for_both, (3,), "1."),
    "group norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)), (3,), "1."),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3)), (3,), "0.param"),
    "transposed": (_transposed, (1, 4, 4), "0."),
}


def _make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    kind, shape, _ = ODD[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind().double().eval()
        # Four images: as many as the sequence is long.
        x = torch.randint(0, 3, (4, shape)) if isinstance(shape, int) else torch.randn(4, *shape).double()
    return model, x, torch.tensor([0, 2, 1, 1])


def _looped_diagonal(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Exact diagonal for the cross-entropy by plain autograd, image by image and class by class."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n in range(len(x)):
        f = model(x[n : n + 1])[0]
        p = f.detach().softmax(0)
        for k in range(len(f)):
            v = p[k].sqrt() * (torch.eye(len(f), dtype=p.dtype)[k] - p)
            gradients = torch.autograd.grad(f, list(parameters.values()), v, retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += gradient.square()
    return total


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_are_differentiated_right(name: str) -> None:
    model, x, y = _make(name)
    expected = _looped_diagonal(model, x)
    found = entry_curvature(model, list(expected), [(x, y)], num_data=4, estimator="exact")
    for parameter, values in expected.items():
        torch.testing.assert_close(found[parameter], values, rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("name", ODD)
def test_odd_parameters_are_left_to_the_fallback(name: str) -> None:
    model, x, y = _make(name)
    names = [parameter for parameter, _ in model.named_parameters()]
    odd = {parameter for parameter in names if parameter.startswith(tuple(ODD[name][2].split()))}
    with Sweep(model, names, starts=Starts("cross_entropy", "exact", "stick", 1, 0)) as sweep:
        block = next(sweep.blocks([(x, y)], None))
        # Others may go there too (an attention's output weight); what is plain must not.
        assert odd
        assert {parameter for parameter in names if not block.tracked(parameter)} == odd


@pytest.mark.parametrize("name", ["attention", "tied", "weight read twice", "recurrent"])
def test_slices_of_odd_parameters_are_summed_before_squaring(name: str) -> None:
    model, x, y = _make(name)
    parameter, value = next(
        (n, p) for n, p in model.named_parameters() if n.startswith(ODD[name][2]) and p.ndim > 1
    )
    index = torch.arange(value.shape[0]).view(-1, 1) // 2
    labels = Labels(parameter, tuple(value.shape), index)
    grouping = Grouping("pairs", (labels,), ("odd",), torch.zeros(int(index.max()) + 1, dtype=torch.int64))
    found = gate_curvature(model, grouping, [(x, y)], num_data=4, estimator="exact").diagonal
    expected = torch.zeros_like(found)
    for n in range(4):
        f = model(x[n : n + 1])[0]
        p = f.detach().softmax(0)
        for k in range(3):
            v = p[k].sqrt() * (torch.eye(3, dtype=p.dtype)[k] - p)
            (gradient,) = torch.autograd.grad(f, [value], v, retain_graph=True)
            by_row = (gradient * value).sum(1).detach()
            expected += torch.zeros_like(found).index_add_(0, index.flatten(), by_row).square()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 1 << 26])
def test_fallback_in_small_pieces(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    model, x, y = _make("attention")
    names = [name for name, _ in model.named_parameters()]
    expected = entry_curvature(model, names, [(x, y)], num_data=4)
    monkeypatch.setattr("sparsebayes.curvature.block._FALLBACK_KEPT", kept)
    monkeypatch.setattr("sparsebayes.curvature.squares._TEMPORARY_CPU", 1)
    found = entry_curvature(model, names, [(x, y)], num_data=4)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["entries", "gates"])
@pytest.mark.parametrize("images_kept", [1, 2, 3, 8])
def test_the_fallback_runs_each_image_once_for_all_parameters(
    monkeypatch: pytest.MonkeyPatch, kind: str, images_kept: int
) -> None:
    model, x, y = _make("attention")
    odd = [name for name, _ in model.named_parameters() if name.startswith("attention.")]
    volume = sum(p.numel() for name, p in model.named_parameters() if name in odd)
    monkeypatch.setattr("sparsebayes.curvature.block._FALLBACK_KEPT", images_kept * volume)
    monkeypatch.setattr("sparsebayes.curvature.squares._TEMPORARY_CPU", 1)  # questions about single images
    ran: list[int] = []

    def listen(network: nn.Module, names: list[str], images: Tensor, v: Tensor) -> dict[str, Tensor]:
        assert sorted(names) == sorted(odd)
        ran.append(len(images))
        return per_image_gradients(network, names, images, v)

    monkeypatch.setattr("sparsebayes.curvature.block.per_image_gradients", listen)
    if kind == "entries":
        entry_curvature(model, odd, [(x, y)], num_data=4)
    else:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        labels = [
            Labels(name, shapes[name], torch.full([1] * len(shapes[name]), i)) for i, name in enumerate(odd)
        ]
        layers = torch.zeros(len(odd), dtype=torch.int64)
        gate_curvature(model, Grouping("all", tuple(labels), ("odd",), layers), [(x, y)], num_data=4)
    assert sum(ran) == 4 and max(ran) <= images_kept


def test_a_layer_whose_output_is_dropped_needs_no_fallback() -> None:
    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.twice(self.twice(x).tanh())

    model = Wrapped(forward, aside=nn.Linear(3, 3), twice=nn.Linear(3, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    with Sweep(model, names, starts=Starts("cross_entropy", "exact", "stick", 1, 0)) as sweep:
        block = next(sweep.blocks([(x, y)], None))
        assert all(block.tracked(name) for name in names)
        assert bool((block.entries("aside.weight", slice(0, 2)) == 0).all())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_networks(reentrant: bool) -> None:
    torch.manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(checkpoint(lambda t: self.middle(t).tanh(), h, use_reentrant=reentrant))

    model = Wrapped(forward, enter=nn.Linear(3, 4), middle=nn.Linear(4, 4), leave=nn.Linear(4, 3)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    names = [name for name, _ in model.named_parameters()]
    if reentrant:
        # Its backward refuses autograd.grad, so that not even a loop over images has derivatives.
        with pytest.raises(RuntimeError, match=r"checkpoint"):
            entry_curvature(model, names, [(x, y)], num_data=4)
        return
    found = entry_curvature(model, names, [(x, y)], num_data=4, estimator="exact")
    for name, values in _looped_diagonal(model, x).items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_compiled_networks() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    expected = entry_curvature(plain, ["0.weight", "2.bias"], [(x, y)], num_data=4)
    compiled = torch.compile(plain, backend="eager")
    names = ["_orig_mod.0.weight", "_orig_mod.2.bias"]
    found = entry_curvature(compiled, names, [(x, y)], num_data=4)
    for name in expected:
        assert torch.equal(found[f"_orig_mod.{name}"], expected[name])


def test_an_input_overwritten_later_is_never_used() -> None:
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        result = self.layer(h)
        h.mul_(3)
        return result.tanh()

    model = Wrapped(forward, layer=nn.Linear(3, 3)).double()
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    # Ordinary training of such a network fails with the same words.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entry_curvature(model, ["layer.weight"], [(x, y)], num_data=2)


COUPLED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        "got a batch norm that uses the statistics of the batch",
    ),
    "centred": (
        lambda: Wrapped(lambda self, x: self.layer(x) - self.layer(x).mean(0), layer=nn.Linear(3, 3)),
        "do not depend on the other images of the batch, nor on chance",
    ),
    "random": (
        lambda: Wrapped(lambda self, x: functional.dropout(self.layer(x)), layer=nn.Linear(3, 3)),
        "do not depend on the other images of the batch, nor on chance",
    ),
}


@pytest.mark.parametrize("num_images", [2, 3, 4])
@pytest.mark.parametrize("name", COUPLED)
def test_networks_without_per_image_derivatives_are_refused(name: str, num_images: int) -> None:
    kind, text = COUPLED[name]
    torch.manual_seed(0)
    model = kind()
    parameter = next(iter(dict(model.named_parameters())))
    x, y = torch.randn(4, 3)[:num_images], torch.tensor([0, 1, 2, 2])[:num_images]
    with pytest.raises(ModelError, match=text):
        entry_curvature(model, [parameter], [(x, y)], num_data=4)
