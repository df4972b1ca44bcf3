"""The second-order gradient: equal to its formulas and to the exact derivative, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from sparsebayes.train import second_order
from sparsebayes.train.second_order import architecture_gradient

LR, MOMENTUM, DECAYS = 0.3, 0.9, (0.02, 0.1)


class Mixed(nn.Module):
    """Two operations weighed by a, with a batch norm in training mode; one weight is used by neither."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        h = self.norm(self.enter(x))
        return self.leave(self.dropout(a[0] * h.tanh() + a[1] * h.sigmoid()))


def case(
    steps: int = 2, dropout: float = 0.0
) -> tuple[Mixed, torch.optim.SGD, Tensor, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """A network in float64, its optimizer after some steps, an architecture, and two batches."""
    torch.manual_seed(0)
    network = Mixed(dropout).double()
    groups = [
        {"params": list(network.enter.parameters()), "weight_decay": DECAYS[0]},
        {
            "params": [*network.norm.parameters(), *network.leave.parameters(), network.unused],
            "weight_decay": DECAYS[1],
        },
    ]
    optimizer = torch.optim.SGD(groups, LR, MOMENTUM)
    a = torch.tensor([0.7, -0.4], dtype=torch.float64)
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3) for _ in range(2)]
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(network(batches[0][0], a), batches[0][1]).backward()
        optimizer.step()
    return network, optimizer, a, (batches[0], batches[1])


def loss_of(network: Mixed, batch: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda a: functional.cross_entropy(network(batch[0], a), batch[1])


def pure_loss(network: Mixed, weights: dict[str, Tensor], a: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same as a function of weights and architecture; running statistics are not touched."""
    state = {**{name: buffer.clone() for name, buffer in network.named_buffers()}, **weights}
    return functional.cross_entropy(functional_call(network, state, (batch[0], a)), batch[1])


def virtual_step(
    network: Mixed, optimizer: torch.optim.SGD, w: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Equation 6, weight by weight."""
    decay = {
        name: DECAYS[0] if name.startswith("enter") else DECAYS[1] for name, _ in network.named_parameters()
    }
    found = {}
    for name, parameter in network.named_parameters():
        u = optimizer.state[parameter]["momentum_buffer"] if parameter in optimizer.state else 0.0
        found[name] = w[name] - LR * (MOMENTUM * u + gradients[name] + decay[name] * w[name])
    return found


def exact(network: Mixed, optimizer: torch.optim.SGD, a: Tensor, train: tuple, own: tuple) -> Tensor:
    """Equation 7 without a difference: the own loss differentiated through the step."""
    a = a.clone().requires_grad_()
    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    loss = pure_loss(network, w, a, train)
    found = torch.autograd.grad(loss, list(w.values()), create_graph=True, allow_unused=True)
    gradients = {
        name: torch.zeros_like(w[name]) if g is None else g for name, g in zip(w, found, strict=True)
    }
    after = virtual_step(network, optimizer, w, gradients)
    (gradient,) = torch.autograd.grad(pure_loss(network, after, a, own), a)
    return gradient


def by_equation_8(network: Mixed, optimizer: torch.optim.SGD, a: Tensor, train: tuple, own: tuple) -> Tensor:
    """Equations 6 to 8 with torch.func, as they are printed."""
    w = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradients = torch.func.grad(lambda w: pure_loss(network, w, a, train))(w)
    after = virtual_step(network, optimizer, w, gradients)
    v, direct = torch.func.grad(lambda w, a: pure_loss(network, w, a, own), argnums=(0, 1))(after, a)
    epsilon = 0.01 / torch.cat([g.flatten() for g in v.values()]).norm()
    ends = [
        torch.func.grad(
            lambda a, sign=sign: pure_loss(network, {n: w[n] + sign * epsilon * v[n] for n in w}, a, train)
        )(a)
        for sign in (1, -1)
    ]
    return direct - LR * (ends[0] - ends[1]) / (2 * epsilon)


@pytest.mark.parametrize("steps", [0, 2])
def test_it_is_what_the_paper_prints(steps: int) -> None:
    network, optimizer, a, (train, own) = case(steps)
    found = architecture_gradient(network, optimizer, a, loss_of(network, train), loss_of(network, own))
    torch.testing.assert_close(found, by_equation_8(network, optimizer, a, train, own), rtol=1e-9, atol=1e-12)


def test_small_steps_tend_to_the_exact_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer, a, (train, own) = case()
    truth = exact(network, optimizer, a, train, own)
    off = []
    for step in (0.1, 0.01, 0.001):
        monkeypatch.setattr(second_order, "STEP", step)
        found = architecture_gradient(network, optimizer, a, loss_of(network, train), loss_of(network, own))
        off.append(float((found - truth).norm() / truth.norm()))
    # A central difference errs by the square of its step.
    assert off[2] < 1e-6
    assert off[1] < off[0] / 50 and off[2] < off[1] / 50
    # The first order is another number: the term that is added matters here.
    first = a.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss_of(network, own)(first), first)
    assert float((plain - truth).norm() / truth.norm()) > 0.05


def test_groups_with_rates_of_their_own_go_each_its_way() -> None:
    network, optimizer, a, (train, own) = case()
    optimizer.param_groups[0]["lr"] = 0.0
    found = architecture_gradient(network, optimizer, a, loss_of(network, train), loss_of(network, own))
    for parameter in network.enter.parameters():
        parameter.requires_grad_(False)
    optimizer.param_groups[0]["lr"] = LR
    still = architecture_gradient(network, optimizer, a, loss_of(network, train), loss_of(network, own))
    torch.testing.assert_close(found, still, rtol=1e-10, atol=1e-13)


def everything(network: Mixed, optimizer: torch.optim.SGD) -> list[Tensor]:
    """All that a training step reads."""
    found = [tensor.detach().clone() for tensor in network.state_dict().values()]
    found += [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.state]
    found += [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return [*found, torch.random.get_rng_state()]


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_left_of_it(breaks: bool) -> None:
    network, optimizer, a, (train, own) = case(dropout=0.5)
    a.requires_grad_()
    network.dropout.eval()
    before = everything(network, optimizer)
    assert len(before) > 15

    def own_loss(at: Tensor) -> Tensor:
        if breaks:
            raise RuntimeError("no images left")
        return loss_of(network, own)(at)

    call = (network, optimizer, a, loss_of(network, train), own_loss)
    if breaks:
        with pytest.raises(RuntimeError, match="no images left"):
            architecture_gradient(*call)
    else:
        assert not architecture_gradient(*call).requires_grad
    after = everything(network, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert a.grad is None
    assert network.training and not network.dropout.training


def test_all_passes_see_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer, a, (train, own) = case(dropout=0.5)
    monkeypatch.setattr(second_order, "STEP", 1e-6)
    losses = loss_of(network, train), loss_of(network, own)
    found = architecture_gradient(network, optimizer, a, *losses)
    assert torch.equal(architecture_gradient(network, optimizer, a, *losses), found)
    # Masks that differ between the two ends would be divided by the tiny distance.
    monkeypatch.setattr(second_order, "STEP", 1e-4)
    torch.testing.assert_close(
        architecture_gradient(network, optimizer, a, *losses), found, rtol=1e-4, atol=1e-7
    )


def test_weights_that_do_not_matter_leave_the_first_order() -> None:
    network, optimizer, a, (train, _) = case()
    found = architecture_gradient(
        network, optimizer, a, loss_of(network, train), lambda at: at.square().sum()
    )
    torch.testing.assert_close(found, 2 * a)


def test_another_kind_of_step_is_refused() -> None:
    network, _, a, (train, own) = case()
    nesterov = torch.optim.SGD(network.parameters(), 0.1, 0.9, nesterov=True)
    with pytest.raises(ValueError, match="without dampening, Nesterov momentum or maximize"):
        architecture_gradient(network, nesterov, a, loss_of(network, train), loss_of(network, own))
