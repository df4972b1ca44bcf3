"""Costs against formulas worked out by hand, and against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsebayes.cost import Cost, LayerCost, cost
from sparsebayes.errors import ModelError
from sparsebayes.models import LeNet5Caffe


class Through(nn.Module):
    """A module around a function of the input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_lenet5_row_by_row() -> None:
    found = cost(LeNet5Caffe(), torch.zeros(1, 1, 28, 28))
    assert found.layers == (
        LayerCost("conv1", "Conv2d", 520, 24 * 24 * 20 * 25, (1, 20, 24, 24)),
        LayerCost("conv2", "Conv2d", 25_050, 8 * 8 * 50 * 20 * 25, (1, 50, 8, 8)),
        LayerCost("fc1", "Linear", 400_500, 400_000, (1, 500)),
        LayerCost("fc2", "Linear", 5_010, 5_000, (1, 10)),
    )
    assert (found.params, found.macs, found.bytes) == (431_080, 2_293_000, 4 * 431_080)
    assert found.unsupported == ()
    assert repr(found) == "Cost(params=431,080, macs=2,293,000, bytes=1,724,320)"


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 10), 10 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2), (1, 4, 11, 13), 4 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (1, 4, 5, 5), 9 * 8 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 9 * 4 * 9),
        (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4), 4 * 3 * 2 * 3 * 2 * 6),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (1, 4, 5), 5 * 4 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(3, 7), (1, 3), 21),
        (nn.Linear(3, 7, bias=False), (1, 3), 21),
        (nn.Linear(3, 7), (1, 5, 3), 5 * 21),
        (nn.Linear(3, 7, bias=False), (1, 2, 5, 3), 10 * 21),
        (nn.LSTM(3, 5, batch_first=True), (1, 7, 3), 7 * 4 * 5 * (3 + 5)),
        (nn.LSTM(3, 5, batch_first=True, num_layers=2, bidirectional=True), (1, 7, 3), 7 * 40 * (8 + 15)),
        (nn.GRU(3, 5, batch_first=True), (1, 7, 3), 7 * 3 * 5 * (3 + 5)),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
        (nn.LayerNorm(4), (1, 4), 0),
        (nn.GroupNorm(2, 4), (1, 4, 5), 0),
        (nn.MaxPool2d(2), (1, 4, 6, 6), 0),
        (nn.GELU(), (1, 4), 0),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (1, 4, 8),
            4 * 64 * 4 + 4 * 128 * 2 + 2 * 16 * 8,
        ),
        (Through(lambda x: x @ x.transpose(1, 2)), (1, 4, 3), 4 * 4 * 3),
        (Through(lambda x: torch.einsum("bij,bkj->bik", x, x)), (1, 4, 3), 4 * 4 * 3),
        (Through(lambda x: torch.baddbmm(torch.zeros(1, 4, 4), x, x.mT)), (1, 4, 3), 48),
        (Through(lambda x: torch.addbmm(torch.zeros(4, 4), x, x.mT)), (1, 4, 3), 48),
        (Through(lambda x: x[0] @ torch.ones(3)), (1, 4, 3), 12),
        (Through(lambda x: torch.dot(x[0], x[0])), (1, 4), 4),
        (Through(lambda x: torch.linalg.vector_norm(x) + nn.functional.normalize(x)), (1, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_by_hand(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    found = cost(module, torch.zeros(shape))
    assert (found.macs, found.unsupported) == (macs, ())


def test_attention_with_fewer_keys_than_queries() -> None:
    def attend(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3, :8])

    assert cost(Through(attend), torch.zeros(1, 2, 5, 16)).macs == 2 * 5 * 3 * (16 + 8)


def test_agrees_with_pytorchs_counter() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(2), nn.Linear(144, 5), nn.Linear(5, 2),
    ).eval()  # fmt: skip
    example = torch.zeros(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(example)
    assert 2 * cost(model, example).macs == counter.get_total_flops()


def test_counts_for_one_input_of_a_batch() -> None:
    assert cost(nn.Linear(3, 7), torch.zeros(9, 3)) == cost(nn.Linear(3, 7), torch.zeros(1, 3))


def test_heavy_work_without_a_rule_is_named() -> None:
    found = cost(Through(lambda x: torch.fft.fft(x).abs() @ torch.ones(4)), torch.zeros(1, 4))
    assert found.macs == 4
    assert found.unsupported == ("aten::_fft_r2c",)
    assert repr(found).endswith("unsupported=('aten::_fft_r2c',))")


def test_a_foreign_operation_is_named() -> None:
    @torch.library.custom_op("sparsebayes_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    assert cost(Through(twice), torch.zeros(1, 4)).unsupported == ("sparsebayes_test::twice",)


class Shared(nn.Module):
    """One linear layer called twice, one parameter under two names, and a product outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("saved", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("unsaved", torch.zeros(100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x))) @ self.scale


def test_shared_and_functional_parts() -> None:
    found = cost(Shared(), torch.zeros(1, 4))
    assert found.layers == (
        LayerCost("", "Shared", 16, 16, (1, 4)),
        LayerCost("first", "Linear", 16, 32, (1, 4)),
        LayerCost("second", "Linear", 0, 16, (1, 4)),
    )
    assert (found.params, found.macs, found.bytes) == (32, 64, 4 * 32 + 8 * 3)


def test_double_precision_takes_twice_the_bytes() -> None:
    assert cost(nn.Linear(3, 7).double(), torch.zeros(1, 3).double()).bytes == 8 * 28


def test_a_layer_that_is_never_called_has_no_shape() -> None:
    model = Through(torch.relu)
    model.add_module("spare", nn.Linear(2, 2))
    assert cost(model, torch.zeros(1, 2)) == Cost(6, 0, 24, (), (LayerCost("spare", "Linear", 6, 0, ()),))


class Moody(nn.Module):
    """Draws random numbers in any mode, and refuses odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 4:
            raise ValueError("odd")
        return self.norm(self.drop(x)) + torch.rand_like(x)


@pytest.mark.parametrize("width", [4, 5])
def test_everything_is_as_it_was(width: int) -> None:
    model = Moody()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.enabled
    try:
        cost(model, torch.ones(2, width))
    except ModelError:
        assert width == 5
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled) == (fast, cudnn)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(
        ModelError, match=r"does not run on an example of shape \[1, 5\] .*ValueError: odd; give an"
    ):
        cost(Moody(), torch.zeros(3, 5))
