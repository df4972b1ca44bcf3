"""Statistics of batch norms: stale ones become those of the data, and nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebayes.train.batch_norm import reestimate_


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Sigmoid(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 16, 5),
        nn.BatchNorm1d(5),
    ).double()


def images(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = 3 + 2 * torch.randn(count, size, 2, 6, 6, generator=generator, dtype=torch.float64)
    return [(batch, torch.zeros(size)) for batch in x]


def test_stale_statistics_become_those_of_the_data() -> None:
    model = network()
    first, last = model[1], model[6]
    first.running_mean.fill_(99)
    last.running_var.fill_(99)
    [(x, _)] = batches = images(1, 40)
    assert reestimate_(model.eval(), batches, 40) == 2
    activations = model[0](x)
    torch.testing.assert_close(first.running_mean, activations.mean((0, 2, 3)))
    torch.testing.assert_close(first.running_var, activations.var((0, 2, 3)))
    # With the right statistics in front, evaluation mode sees what the batch saw, up to N/(N-1) of the variance.
    spread = activations.var((0, 2, 3), correction=0) + first.eps
    normal = (activations - activations.mean((0, 2, 3))[:, None, None]) / spread.sqrt()[:, None, None]
    features = model[5](normal.sigmoid().flatten(1))
    torch.testing.assert_close(last.running_mean, features.mean(0))
    torch.testing.assert_close(last.running_var, features.var(0))
    normalised = model(x).detach()
    assert float(normalised.mean(0).abs().max()) < 0.01
    assert float((normalised.var(0) - 1).abs().max()) < 0.02


def test_batches_count_alike_and_stop_in_time() -> None:
    model = network()
    batches = images(5, 8)
    reestimate_(model, batches, 20)
    means = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in batches[:3]])
    torch.testing.assert_close(model[1].running_mean, means.mean(0))
    assert int(model[1].num_batches_tracked) == 3


def test_nothing_else_changes() -> None:
    model = network().train()
    model[3].eval()
    model[1].momentum = 0.3
    weights = {name: value.clone() for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    reestimate_(model, images(2, 8), 100)
    assert model[1].momentum == 0.3
    assert model[6].momentum == 0.1
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_norm_that_no_image_reaches_keeps_what_it_has() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm2d(2).double(), nn.BatchNorm2d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    model.idle.running_mean.fill_(3.0)
    assert reestimate_(model, images(2, 8), 100) == 1
    assert model.idle.running_mean.tolist() == [3.0, 3.0]
    assert float(model.used.running_mean.abs().min()) > 1.0


def test_without_norms_or_images_nothing_happens() -> None:
    model = network()
    before = model[1].running_var.clone()
    assert reestimate_(model, images(1, 8), 0) == 0
    assert reestimate_(model, [], 100) == 0
    assert reestimate_(model, images(3, 1), 100) == 0
    assert torch.equal(model[1].running_var, before)
    assert reestimate_(nn.Linear(3, 2), images(1, 8), 100) == 0
    untracked = nn.BatchNorm2d(2, track_running_stats=False)
    assert reestimate_(untracked, images(1, 8), 100) == 0
