"""What a computation leaves behind (nothing), and what it refuses."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.curvature import entry_curvature
from sparsebayes.errors import DataError, ModelError, NumericsError


class Returning(nn.Module):
    """A linear layer whose output a function changes."""

    def __init__(self, change) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.change = change

    def forward(self, x: Tensor):
        return self.change(self.layer(x))


def _state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
        [(name, b.tolist()) for name, b in model.named_buffers()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("surrounding", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_the_caller_finds_everything_as_it_was(build, network_name: str, surrounding, fails: bool) -> None:
    model, x = build(network_name, 4)
    y = torch.tensor([0, 1, 2, 9 if fails else 0])
    model.train()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(module for module in model.modules() if module is not model).eval()
    names = [name for name, _ in model.named_parameters()]
    with surrounding():
        before = _state(model)
        with pytest.raises(DataError) if fails else contextlib.nullcontext():
            entry_curvature(model, names, [(x, y)], num_data=4)
        after = _state(model)
    assert after == before
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


def test_shuffling_loaders_do_not_move_the_random_state(build) -> None:
    model, x = build("mlp", 6)
    data = torch.utils.data.TensorDataset(x, torch.arange(6) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    entry_curvature(model, ["0.weight"], loader, num_data=6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode])
def test_mode_and_frozen_parameters_do_not_change_the_result(build, network_name: str, surrounding) -> None:
    model, x = build(network_name, 4)
    y = torch.tensor([0, 1, 2, 0])
    names = [name for name, _ in model.named_parameters()]
    expected = entry_curvature(model, names, [(x, y)], num_data=4)
    model.train().requires_grad_(False)
    with surrounding():
        found = entry_curvature(model, names, [(x.clone(), y.clone())], num_data=4)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0.0)


def test_autocast_around_it_is_ignored(build) -> None:
    model, x = build("mlp", 4)
    model, x, y = model.float(), x.float(), torch.tensor([0, 1, 2, 0])
    expected = entry_curvature(model, ["0.weight"], [(x, y)], num_data=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entry_curvature(model, ["0.weight"], [(x, y)], num_data=4)
    assert torch.equal(found["0.weight"], expected["0.weight"])


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))]])
def test_no_images_are_refused(build, batches) -> None:
    model, _ = build("mlp", 1)
    with pytest.raises(
        DataError, match="expected at least one image to compute the curvature from, got none"
    ):
        entry_curvature(model, ["0.weight"], batches, num_data=5)


@pytest.mark.parametrize(
    ("likelihood", "y", "text"),
    [
        (
            "cross_entropy",
            torch.tensor([0, 3]),
            r"class numbers in 0..2, as the network has 3 outputs, got 0..3",
        ),
        (
            "cross_entropy",
            torch.tensor([-1, 1]),
            r"class numbers in 0..2, as the network has 3 outputs, got -1..1",
        ),
        ("cross_entropy", torch.tensor([0.0, 1.0]), r"class numbers of shape \[2\] .* got torch.float32"),
        ("cross_entropy", torch.tensor([True, False]), r"class numbers of shape \[2\] .* got torch.bool"),
        ("cross_entropy", torch.tensor([[0], [1]]), r"class numbers of shape \[2\] .* of shape \[2, 1\]"),
        ("cross_entropy", torch.tensor([0]), "expected as many targets as images, got 1 for 2"),
        ("mse", torch.zeros(2), r"expected mse targets of the outputs' shape \[2, 3\], got shape \[2\]"),
        (
            "binary_cross_entropy",
            torch.full((2, 3), 1.5),
            "expected binary_cross_entropy targets between 0 and 1",
        ),
        (
            "binary_cross_entropy",
            torch.full((2, 3), torch.nan),
            "binary_cross_entropy targets between 0 and 1",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(build, likelihood: str, y: Tensor, text: str) -> None:
    model, x = build("mlp", 2)
    with pytest.raises(DataError, match=text):
        entry_curvature(model, ["0.weight"], [(x, y)], num_data=5, likelihood=likelihood)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: f[:, 0], r"logits\) of shape \[2, classes\], got shape \[2\]"),
        (lambda f: f.unsqueeze(0), r"logits\) of shape \[2, classes\], got shape \[1, 2, 2\]"),
        (lambda f: f[:1], r"logits\) of shape \[2, classes\], got shape \[1, 2\]"),
        (lambda f: (f, f), r"logits\) of shape \[2, classes\], got tuple"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(change, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        entry_curvature(
            Returning(change), ["layer.weight"], [(torch.randn(4, 3), torch.zeros(4).long())], num_data=4
        )


def test_outputs_that_are_not_finite_are_refused_by_image() -> None:
    x = torch.zeros(5, 3)
    x[4, 0] = torch.inf
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(2)]
    with pytest.raises(NumericsError, match="expected finite network outputs, got nan or inf for image 4;"):
        entry_curvature(Returning(lambda f: f), ["layer.weight"], batches, num_data=5)
