"""Residual branches: found in any order and form, zero when their group is off, curved as their switch is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsebayes.curvature import gate_rows
from sparsebayes.errors import GroupingError, ModelError
from sparsebayes.groups import Grouping, make_grouping
from sparsebayes.models import build


class Residual(nn.Module):
    """x + f(x), or f(x) + x."""

    def __init__(self, branch: nn.Module, *, first: bool = True, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        f, s = self.branch(x), self.shortcut(x)
        return f + s if self.first else s + f


def branch(*, norm: bool = True, end: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 4, 3, padding=1)]
    layers += [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(*layers, *([end] if end else []))


def network(*blocks: nn.Module) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *blocks, *head)


EXAMPLE = torch.zeros(2, 3, 8, 8)


def group(model: nn.Module, **options: object) -> Grouping:
    example = EXAMPLE.to(next(model.parameters()).dtype)
    return make_grouping(model, "branches", example=example, **options)  # type: ignore[arg-type]


def gates(grouping: Grouping) -> list[str]:
    return [labels.parameter for labels in grouping.labels if labels.gate]


@pytest.mark.parametrize("first", [True, False])
def test_the_last_norm_gates_and_all_layers_belong(first: bool) -> None:
    model = network(Residual(branch(), first=first), nn.ReLU(), Residual(branch(norm=False), first=first))
    grouping = group(model)
    assert repr(grouping) == "Grouping('branches', 2 groups; branches: 2)"
    assert gates(grouping) == ["1.branch.4.weight", "1.branch.4.bias", "3.branch.3.weight", "3.branch.3.bias"]
    parameters = dict(model.named_parameters())
    sizes = [sum(p.numel() for n, p in parameters.items() if n.startswith(f"{block}.")) for block in (1, 3)]
    assert grouping.sizes().tolist() == sizes


@pytest.mark.parametrize("end", [nn.ReLU(), nn.Dropout(0.5), nn.GELU()], ids=["relu", "dropout", "gelu"])
def test_what_keeps_zeros_may_follow_the_last_layer(end: nn.Module) -> None:
    assert gates(group(network(Residual(branch(end=end))))) == ["1.branch.4.weight", "1.branch.4.bias"]


def test_the_shorter_side_is_the_shortcut() -> None:
    shortcut = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    for first in (True, False):
        grouping = group(network(Residual(branch(), first=first, shortcut=shortcut)))
        assert gates(grouping) == ["1.branch.4.weight", "1.branch.4.bias"]


class ParallelBranches(nn.Module):
    """x + f(x) + g(x): g is added to a sum that holds the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = branch(), branch()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.g(x)


def test_parallel_branches_are_two_groups() -> None:
    assert gates(group(network(ParallelBranches())))[::2] == ["1.f.4.weight", "1.g.4.weight"]


class Scaled(nn.Module):
    """A branch under a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = branch()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


def test_a_layer_scale_gates() -> None:
    assert gates(group(network(Scaled()))) == ["1.scale"]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("resnet56", {"width": 0.25}, 27),
        ("resnet20", {"width": 0.25, "shortcut": "A"}, 9),
        ("resnet18", {"width": 0.1}, 8),
        ("torchvision:mobilenet_v2", {}, 10),
        ("torchvision:convnext_tiny", {}, 18),
    ],
)
def test_known_networks(name: str, options: dict[str, object], count: int) -> None:
    model = build(name, options)
    grouping = make_grouping(model, "branches", example=torch.zeros(1, 3, 32, 32))
    assert grouping.num_groups == count


def test_masked_branches_leave_the_shortcuts() -> None:
    model = network(Residual(branch()), Residual(branch(norm=False)), nn.ReLU()).eval()
    for norm in (model[1].branch[1], model[1].branch[4]):
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    grouping = group(model)
    x = torch.randn(2, 3, 8, 8)
    shared = model[0](x)
    for on, expected in (
        ([True, True], model[2](model[1](shared))),
        ([True, False], model[1](shared)),
        ([False, True], model[2](shared)),
        ([False, False], shared),
    ):
        masks = grouping.masks(torch.tensor(on))
        weights = {name: p * masks.get(name, torch.tensor(1)) for name, p in model.named_parameters()}
        assert torch.equal(functional_call(model, weights, (x,)), model[3:](expected))


def test_the_curvature_is_that_of_a_factor_on_the_branch() -> None:
    torch.manual_seed(1)
    model = network(Residual(branch()), nn.ReLU(), Residual(branch(norm=False))).double().eval()
    for norm in (model[1].branch[4], model[3].branch[1]):
        nn.init.normal_(norm.bias)
    grouping = group(model)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    rows = gate_rows(model, grouping, [(x, y)], estimator="exact")  # [K, N, G]

    def logits(z: Tensor) -> Tensor:
        h = model[0](x)
        h = model[1].branch(h) * z[0] + h
        h = h.relu()
        return model[4:](model[3].branch(h) * z[1] + h)

    jacobian = torch.func.jacrev(logits)(torch.ones(2, dtype=torch.float64))  # [N, K, G]
    p = logits(torch.ones(2, dtype=torch.float64)).softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # [N, K, K]
    expected = torch.einsum("nkg,nkl,nlh->gh", jacobian, hessian, jacobian)
    torch.testing.assert_close(torch.einsum("kng,knh->gh", rows, rows), expected)


class Shared(nn.Module):
    """One norm ends two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.conv1(x))
        return x + self.norm(self.conv2(x))


class Reused(nn.Module):
    """What the branch computes is also read past the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = branch()

    def forward(self, x: Tensor) -> Tensor:
        f = self.branch(x)
        return (x + f) * f.sigmoid()


@pytest.mark.parametrize(
    "block",
    [
        nn.Sequential(branch()),
        Residual(branch(end=nn.Sigmoid())),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))),
        Residual(nn.Conv2d(4, 4, 1), shortcut=nn.Conv2d(4, 4, 1)),
        Shared(),
        Reused(),
    ],
    ids=["no sum", "sigmoid", "no scale", "no shortcut", "shared", "reused"],
)
def test_what_cannot_be_switched_off_is_no_branch(block: nn.Module) -> None:
    with pytest.raises(GroupingError, match="the rule 'branches' found nothing to group"):
        group(network(block))


def test_the_scope_chooses_by_any_layer() -> None:
    model = network(Residual(branch()), nn.ReLU(), Residual(branch()))
    assert gates(group(model, include=["3.branch.0"]))[0] == "3.branch.4.weight"
    assert gates(group(model, exclude=["3.*"]))[0] == "1.branch.4.weight"
    with pytest.raises(GroupingError, match="found nothing to group \\(include 2\\)"):
        group(model, include=["2"])


def test_mistakes_are_answered_and_modes_come_back() -> None:
    model = network(Residual(branch()))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    group(model)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(GroupingError, match="the rule 'branches' traces the model and needs an input"):
        make_grouping(model, "branches")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(
        ModelError, match=r"branches need a model that torch\.export can trace, but it failed: "
    ):
        group(network(Branching()))
