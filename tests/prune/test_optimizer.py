"""Optimizer states: training goes on after compaction as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import trace_units
from sparsebayes.prune.compaction import compact, cut
from sparsebayes.prune.masking import Masks
from sparsebayes.prune.optimizer import carry_optimizer_state, move_optimizer_

Make = Callable[[list[dict[str, object]]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(
        groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    # The gradient of a bias before a batch norm is nothing but rounding: eps must not blow it up into steps.
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, eps=1e-5),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(45, 6), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(8, 1, 5, 5, dtype=torch.float64, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def step_(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def masks_for(model: nn.Module) -> Masks:
    """Two channels, two neurons, some single features and some single weights."""
    graph = trace_units(model, torch.zeros(2, 1, 5, 5, dtype=torch.float64))
    on = torch.ones(graph.num_units + 1, dtype=torch.bool)
    on[[1, 3, 5, 9]] = False
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for piece in graph.slices:
        masks[piece.parameter].movedim(piece.dim, -1).logical_and_(on[piece.unit])
    masks["4.weight"][:, [0, 7, 20]] = False
    masks["6.weight"][1, 2] = False
    return Masks(masks)


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Biases with settings of their own, as recipes often have them."""
    parameters = dict(model.named_parameters())
    return [
        {"params": [p for n, p in parameters.items() if n.endswith("weight")]},
        {"params": [p for n, p in parameters.items() if n.endswith("bias")], "lr": 0.02, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_the_masked_network(name: str) -> None:
    make, data = OPTIMIZERS[name], batches(12)
    model = network()
    optimizer = make(groups_of(model))
    for x, y in data[:3]:
        step_(model, optimizer, x, y)
    masks = masks_for(model)
    masks.reapply_(model)
    for x, y in data[3:5]:
        step_(model, optimizer, x, y)
        masks.reapply_(model)

    small = compact(model, masks.masks, data[0][0])
    small_masks = Masks(small.masks)
    assert set(small_masks.masks) == {"6.weight"}
    carried = carry_optimizer_state(optimizer, model, small.model, small.kept, make)
    for x, y in data[5:]:
        step_(model, optimizer, x, y)
        masks.reapply_(model)
        step_(small.model, carried, x, y)
        small_masks.reapply_(small.model)

    full = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ours = {**dict(small.model.named_parameters()), **dict(small.model.named_buffers())}
    for key, tensor in full.items():
        torch.testing.assert_close(
            cut(tensor, small.kept.get(key, {})), ours[key].detach(), rtol=1e-10, atol=1e-10
        )


def test_a_fresh_optimizer_would_differ() -> None:
    make, data = OPTIMIZERS["momentum"], batches(4)
    model = network()
    optimizer = make(groups_of(model))
    for x, y in data[:3]:
        step_(model, optimizer, x, y)
    masks = masks_for(model)
    masks.reapply_(model)
    small = compact(model, masks.masks, data[0][0])
    fresh = copy.deepcopy(small.model)
    step_(fresh, make(groups_of(fresh)), *data[3])
    carried = carry_optimizer_state(optimizer, model, small.model, small.kept, make)
    step_(small.model, carried, *data[3])
    assert (fresh[6].weight - small.model.get_submodule("6").weight).abs().max() > 1e-4


def test_hyper_parameters_and_untrained_parameters_are_kept() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(
        [
            {"params": model[4].parameters(), "lr": 0.3, "weight_decay": 0.01},
            {"params": model[6].parameters(), "momentum": 0.5},
        ],
        lr=0.1,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step_(model, optimizer, *batches(1)[0])
    scheduler.step()
    small = compact(model, masks_for(model).masks, batches(1)[0][0])
    carried = carry_optimizer_state(
        optimizer,
        model,
        small.model,
        small.kept,
        lambda groups: torch.optim.SGD(groups, lr=99.0, momentum=99.0),
    )
    for old, new in zip(optimizer.param_groups, carried.param_groups, strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }
    assert carried.param_groups[0]["lr"] == 0.15 and carried.param_groups[0]["initial_lr"] == 0.3
    held = [id(p) for group in carried.param_groups for p in group["params"]]
    assert held == [id(p) for index in ("4", "6") for p in small.model.get_submodule(index).parameters()]
    assert [id(p) for p in carried.state] == held[2:]  # only the second group has momentum
    assert next(iter(carried.state.values()))["momentum_buffer"].shape == (3, 4)


def test_what_does_not_belong_together_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["momentum"](groups_of(model))
    small = compact(model, masks_for(model).masks, batches(1)[0][0])
    with pytest.raises(
        ModelError, match=r"holds a parameter of shape \[5, 1, 3, 3\] that the old model does not have"
    ):
        carry_optimizer_state(optimizer, network(), small.model, small.kept, OPTIMIZERS["momentum"])
    with pytest.raises(
        ModelError, match=r"should have '0.weight' of shape \[3, 1, 3, 3\], but has \[5, 1, 3, 3\]"
    ):
        carry_optimizer_state(optimizer, model, network(), small.kept, OPTIMIZERS["momentum"])
    with pytest.raises(
        ModelError, match="should return a SGD over the groups that it is given, but returned a Adam"
    ):
        carry_optimizer_state(optimizer, model, small.model, small.kept, OPTIMIZERS["adam"])
    with pytest.raises(ModelError, match=r"returned a SGD over 8 parameters \(expected 8\)"):
        carry_optimizer_state(
            optimizer,
            model,
            small.model,
            small.kept,
            lambda _: torch.optim.SGD(network().parameters(), lr=1.0),
        )


def test_states_that_cannot_be_cut_are_refused() -> None:
    model, (x, y) = network(), batches(1)[0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    small = compact(model, masks_for(model).masks, x)
    with pytest.raises(ModelError, match="an LBFGS optimizer cannot go on with other parameters"):
        carry_optimizer_state(optimizer, model, small.model, small.kept, torch.optim.LBFGS)
    rows = torch.optim.Adafactor(model.parameters())
    nn.functional.cross_entropy(model(x), y).backward()
    rows.step()
    with pytest.raises(
        ModelError, match=r"optimizer state '\w+' of '0.weight' is .*start a new optimizer instead"
    ):
        carry_optimizer_state(rows, model, small.model, small.kept, torch.optim.Adafactor)


def test_parameters_of_another_network_stay_with_their_state() -> None:
    model, (x, y) = network(), batches(1)[0]
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature])
    nn.functional.cross_entropy(model(x) * temperature, y).backward()
    optimizer.step()
    moment = optimizer.state[temperature]["exp_avg"].clone()
    small = compact(model, masks_for(model).masks, x)
    move_optimizer_(optimizer, model, small.model, small.kept)
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [*map(id, small.model.parameters()), id(temperature)]
    assert torch.equal(optimizer.state[temperature]["exp_avg"], moment)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_itself_goes_on_as_a_copy_would(name: str) -> None:
    make, data = OPTIMIZERS[name], batches(6)
    model = network()
    optimizer = make(groups_of(model))
    for x, y in data[:3]:
        step_(model, optimizer, x, y)
    masks = masks_for(model)
    masks.reapply_(model)
    small = compact(model, masks.masks, data[0][0])
    twin = copy.deepcopy(small.model)
    carried = carry_optimizer_state(optimizer, model, twin, small.kept, make)
    held = [id(group) for group in optimizer.param_groups]
    move_optimizer_(optimizer, model, small.model, small.kept)
    assert [id(group) for group in optimizer.param_groups] == held
    for x, y in data[3:]:
        step_(twin, carried, x, y)
        step_(small.model, optimizer, x, y)
    for first, second in zip(small.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(first, second)


class Scaled(torch.optim.SGD):
    """An optimizer whose arguments are its own."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__(list(model.named_parameters()), lr=0.1 * scale, momentum=0.9)


def test_an_optimizer_of_a_class_of_its_own_goes_on() -> None:
    model, (x, y) = network(), batches(1)[0]
    optimizer = Scaled(model, 0.5)
    step_(model, optimizer, x, y)
    small = compact(model, masks_for(model).masks, x)
    move_optimizer_(optimizer, model, small.model, small.kept)
    names, parameters = zip(*small.model.named_parameters(), strict=True)
    assert optimizer.param_groups[0]["param_names"] == list(names)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    assert {tuple(s["momentum_buffer"].shape) for s in optimizer.state.values()} == {
        tuple(p.shape) for p in parameters
    }
    step_(small.model, optimizer, x, y)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_group_of_which_nothing_is_left_stays_for_the_schedulers(name: str, in_place: bool) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 3)
            self.back, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.last(x + self.back(torch.relu(self.inner(x))))

    torch.manual_seed(0)
    model = Residual().double()
    make, x = OPTIMIZERS[name], torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    optimizer = make(
        [
            {"params": list(model.inner.parameters())},
            {"params": [*model.first.parameters(), *model.back.parameters(), *model.last.parameters()]},
        ]
    )
    step_(model, optimizer, x, y)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step_(model, optimizer, x, y)
    masks = {"back.weight": torch.zeros(4, 3, dtype=torch.bool)}
    small = compact(model, masks, x)
    assert not any(name.startswith("inner.") for name, _ in small.model.named_parameters())
    if in_place:
        move_optimizer_(optimizer, model, small.model, small.kept)
        moved = optimizer
    else:
        moved = carry_optimizer_state(optimizer, model, small.model, small.kept, make)
    assert [len(group["params"]) == 0 for group in moved.param_groups] == [True, False]
    step_(small.model, moved, x, y)
    scheduler.step()
    assert len(scheduler.get_last_lr()) == 2
    assert len(optimizer.param_groups) == 2


def test_an_optimizer_that_holds_parameters_elsewhere_is_refused() -> None:
    model, (x, _) = network(), batches(1)[0]
    optimizer = torch.optim.LBFGS(model.parameters())
    small = compact(model, masks_for(model).masks, x)
    with pytest.raises(ModelError, match="an LBFGS optimizer cannot go on"):
        move_optimizer_(optimizer, model, small.model, small.kept)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
