"""The object for the user's own loop: what the README shows, from the first update to the exported file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsebayes
from sparsebayes.errors import DataError, GroupingError, RecipeError, RunError
from sparsebayes.groups import Grouping, make_grouping, tracing
from sparsebayes.prune import GatheredLinear


class Plain(nn.Module):
    """A network as a user writes it: nothing in it knows of sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.out(F.relu(self.hidden(torch.flatten(x, 1))))


def data(num: int = 240) -> TensorDataset:
    """8x8 images whose bright corner is their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (num,), generator=generator)
    images = 0.3 * torch.randn(num, 1, 8, 8, generator=generator)
    for label, (row, column) in enumerate([(0, 0), (0, 4), (4, 0)]):
        images[labels == label, :, row : row + 4, column : column + 4] += 1.0
    return TensorDataset(images, labels)


def train(
    sparse: sparsebayes.SparseModel, loader: DataLoader, optimizer: torch.optim.Optimizer, epochs: int
) -> None:
    sparse.model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(sparse.model(x), y).backward()
            optimizer.step()


def error(model: nn.Module) -> float:
    x, y = data().tensors
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) != y).float().mean())


def test_two_arguments_suffice_from_update_to_onnx(tmp_path) -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="units")
    optimizer = torch.optim.SGD(sparse.model.parameters(), lr=0.05, momentum=0.9)
    dense = sum(p.numel() for p in sparse.model.parameters())
    train(sparse, loader, optimizer, 5)
    for strength in (2.0, 5.0, 10.0):
        sparse.update(loader, strength=strength)
        sparse.select(max_removal=0.5)
        sparse.compact(optimizer)
        train(sparse, loader, optimizer, 3)
    small = sum(p.numel() for p in sparse.model.parameters())
    assert small < dense / 3
    assert error(sparse.model) < 0.02
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, sparse.model.parameters())
    )
    assert isinstance(sparse.model, Plain)
    path = sparse.export_onnx(tmp_path / "model.onnx")
    assert path.stat().st_size > 0
    assert sparse.num_data == 240


def test_an_update_from_chosen_images_is_that_of_their_curvature() -> None:
    torch.manual_seed(0)
    model, loader = Plain().eval(), DataLoader(data(60), batch_size=20)
    sparse = sparsebayes.wrap(model, groups="filters")
    sparse.update(loader, importance=0.3)
    expected = sparsebayes.gate_curvature(model, sparse.grouping, loader, num_data=60, importance=0.3)
    assert sparse.curvature is not None and sparse.curvature.num_images == 60
    torch.testing.assert_close(sparse.curvature.diagonal, expected.diagonal)


def test_data_size_and_example_are_taken_from_the_first_update() -> None:
    batches = list(DataLoader(data(), batch_size=40))
    sparse = sparsebayes.wrap(Plain(), groups="units")
    with pytest.raises(
        DataError, match=r"size of the training set is not known: give wrap\(\.\.\., num_data=N\)"
    ):
        sparse.update(batches)
    sparse = sparsebayes.wrap(Plain(), groups="units", num_data=1000)
    with pytest.raises(DataError, match="got an empty loader"):
        sparse.update([])
    doubled = sparsebayes.wrap(sparse.model, groups="units", num_data=2000)
    first = sparse.update(batches).evidence
    second = doubled.update(batches).evidence
    torch.testing.assert_close(second, 2 * first)  # evidence is in nats of the whole data set


def test_the_first_batch_is_used_for_the_estimate_as_well() -> None:
    batches = list(DataLoader(data(), batch_size=40))
    model = Plain()
    late = sparsebayes.wrap(model, groups="units", num_data=240)
    early = sparsebayes.wrap(model, groups="units", num_data=240, example=batches[0][0])
    torch.testing.assert_close(
        late.update(iter(batches), estimator="exact").evidence,
        early.update(batches, estimator="exact").evidence,
    )


def test_order_of_calls_is_explained() -> None:
    sparse = sparsebayes.wrap(Plain(), groups="units")
    with pytest.raises(RunError, match="groups are not known without an example input"):
        _ = sparse.grouping
    with pytest.raises(RunError, match=r"call update\(loader\) before select\(\)"):
        sparse.select()
    with pytest.raises(RunError, match=r"call select\(\) before prune_\(\)"):
        sparse.prune_()
    with pytest.raises(RunError, match=r"call select\(\) before compact\(\)"):
        sparse.compact()
    with pytest.raises(RunError, match="no example input was seen yet"):
        sparse.export_onnx("never.onnx")
    with pytest.raises(GroupingError, match="did you mean 'units'"):
        sparsebayes.wrap(Plain(), groups="unit", example=torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("scale", ["switches", "entries"])
def test_penalty_falls_along_its_own_proximal_step(scale: str) -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="filters", scale=scale)
    assert float(sparse.penalty()) == 0.0
    sparse.shrink_(0.1)  # nothing is believed yet: nothing moves
    sparse.update(loader, strength=3.0)
    before = sparse.penalty()
    before.backward()
    assert sparse.model.conv.weight.grad is not None
    sparse.shrink_(0.1)
    assert 0 < float(sparse.penalty().detach()) < float(before.detach())


def test_shrinking_long_enough_makes_exact_zeros() -> None:
    sparse = sparsebayes.wrap(Plain(), groups="filters")
    sparse.update(DataLoader(data(), batch_size=40), strength=3.0)
    for _ in range(5):
        sparse.shrink_(100.0)
    norms = sparse.model.conv.weight.flatten(1).norm(dim=1)
    assert bool((norms == 0).any())


@pytest.mark.parametrize("price", ["params", "macs"])
def test_prices_divide_the_evidence(price: str) -> None:
    loader = DataLoader(data(), batch_size=40)
    model = Plain()
    plain = sparsebayes.wrap(model, groups="units").update(loader).evidence
    priced = sparsebayes.wrap(model, groups="units", price=price).update(loader).evidence
    ratio = (plain / priced)[plain > 0]
    # Two layers, two prices: the units of each all cost the same, and the mean unit costs 1.
    assert len(ratio.round(decimals=6).unique()) == 2
    assert float(ratio.min()) < 1 < float(ratio.max())


def test_masks_accumulate_and_hold() -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="weights")
    sparse.update(loader, strength=1.0)
    sparse.select(max_removal=0.5)
    masks = sparse.prune_()
    zeros = masks.num_zeros
    assert zeros > 0
    assert int((sparse.model.hidden.weight == 0).sum()) > 0
    sparse.update(loader, strength=4.0)
    sparse.select(max_removal=0.5)
    assert sparse.prune_().num_zeros >= zeros


def test_later_selections_are_pruned_and_compacted_too() -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="weights")
    for _ in range(3):
        sparse.update(loader, strength=1e6)
        selection = sparse.select(max_removal=0.5)
        sparse.compact()  # from the second time on there are masks of the compaction before
        nonzero = sum(int((p != 0).sum()) for p in sparse.model.parameters() if p.ndim > 1)
        assert nonzero == sparse.grouping.num_groups <= selection.num_kept


def test_repeated_pruning_without_compaction_goes_on() -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="filters")
    kept = []
    for _ in range(3):
        sparse.update(loader, strength=1e9)
        kept.append(sparse.select(max_removal=0.5).counts()["conv"][0])
        sparse.prune_()
    assert kept == [4, 2, 1]


@pytest.mark.parametrize("option", ["scale", "update", "price"])
def test_unknown_options_are_refused_at_once(option: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown {option} 'nonsense'"):
        sparsebayes.wrap(Plain(), **{option: "nonsense"})


def test_batches_that_are_no_pairs_are_refused() -> None:
    sparse = sparsebayes.wrap(Plain(), num_data=10)
    with pytest.raises(DataError, match="got a batch that begins with dict"):
        sparse.update([{"x": torch.zeros(2, 1, 8, 8)}])


def test_a_ready_grouping_is_carried_through_compaction() -> None:
    model = Plain()
    example = torch.zeros(2, 1, 8, 8)
    grouping = make_grouping(model, "units", example=example, include=["hidden"])
    sparse = sparsebayes.wrap(model, groups=grouping, example=example, num_data=240)
    sparse.update(DataLoader(data(), batch_size=40), strength=30.0)
    selection = sparse.select(max_removal=0.5)
    sparse.compact()
    assert isinstance(sparse.grouping, Grouping)
    assert sparse.grouping.num_groups == selection.num_kept == sparse.model.hidden.out_features
    assert sparse.model.conv.out_channels == 8  # not in the grouping


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("groups", ["units", "units+features", ["filters", "units"]])
def test_a_network_is_traced_once_until_it_changes(
    groups: sparsebayes.GroupSpec, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    inner = tracing.traceable
    monkeypatch.setattr(tracing, "traceable", lambda model: traced.append(model) or inner(model))
    loader = DataLoader(data(80), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups=groups, example=data(80)[0][0][None] if early else None)
    sparse.update(loader, strength=3.0)
    sparse.select(max_removal=0.5)
    sparse.graph()
    sparse.compact()
    assert len(traced) == 1
    sparse.update(loader)
    sparse.select(max_removal=0.5)
    assert len(traced) == 1  # the groups are carried over
    sparse.graph()
    sparse.compact()
    assert len(traced) <= 3  # a network that gathers is traced as it gathers, and as it is cut


def test_two_images_of_an_example_are_kept_as_they_were() -> None:
    example = torch.randn(40, 1, 8, 8)
    first = example[:2].clone()
    sparse = sparsebayes.wrap(Plain(), groups="units", example=example)
    example.zero_()
    assert torch.equal(sparse._seen_example(), first)


def test_augmentation_is_noticed_at_the_first_update_too() -> None:
    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, label = super().__getitem__(index)
            return image + 0.01 * torch.randn_like(image), label

    sparse = sparsebayes.wrap(Plain(), groups="units")
    loader = DataLoader(Augmented(*data(80).tensors), batch_size=40)
    for _ in range(2):
        with pytest.warns(UserWarning, match="images of the curvature's loader change each time"):
            sparse.update(loader)


def test_the_units_of_a_network_that_gathers_are_all_known() -> None:
    loader = DataLoader(data(80), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="features")
    sparse.update(loader, strength=1e6)
    sparse.select(max_removal=0.5)
    sparse.compact()
    assert isinstance(sparse.model.hidden, GatheredLinear)
    graph = sparse.graph()
    assert graph.layers == ("conv", "hidden")
    columns = next(s for s in graph.slices if s.parameter == "hidden.weight" and s.dim == 1)
    assert columns.unit.tolist() == [column // 16 for column in sparse.model.hidden.columns.tolist()]


def test_schedulers_and_groups_of_parameters_survive_compaction() -> None:
    loader = DataLoader(data(), batch_size=40)
    sparse = sparsebayes.wrap(Plain(), groups="units")

    class Strict(torch.optim.SGD):
        def __init__(self, model: nn.Module) -> None:
            super().__init__([{"params": [p]} for p in model.parameters()], lr=0.05, momentum=0.9)

    optimizer = Strict(sparse.model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(sparse, loader, optimizer, 1)
    sparse.update(loader, strength=5.0)
    sparse.select(max_removal=0.5)
    sparse.compact(optimizer)
    assert len(optimizer.param_groups) == 8
    train(sparse, loader, optimizer, 1)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.025] * 8


def test_public_names_are_the_ones_promised() -> None:
    for name in sparsebayes.__all__:
        assert getattr(sparsebayes, name) is not None
    assert len(sparsebayes.__all__) <= 15
    with pytest.raises(AttributeError, match="has no attribute 'rap'; it has"):
        _ = sparsebayes.rap
