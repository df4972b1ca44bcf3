"""Groups followed through removals equal the groups found anew, and lineages compose and survive the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsebayes.errors import RunError
from sparsebayes.groups import Grouping, Labels, make_grouping
from sparsebayes.prune import compact
from sparsebayes.prune.carry import Lineage, carry_grouping

EXAMPLE = torch.zeros(1, 1, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * 16, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


def choice(num_groups: int, seed: int) -> torch.Tensor:
    return torch.rand(num_groups, generator=torch.Generator().manual_seed(seed)) > 0.4


@pytest.mark.parametrize("seed", range(4))
def test_carried_units_are_the_units_found_anew(seed: int) -> None:
    model = network()
    grouping = make_grouping(model, "units", example=EXAMPLE)
    on = choice(grouping.num_groups, seed)
    done = compact(model, grouping.masks(on), EXAMPLE)
    carried, origin = carry_grouping(grouping, done.kept, on)
    assert carried.fingerprint() == make_grouping(done.model, "units", example=EXAMPLE).fingerprint()
    assert torch.equal(origin, on.nonzero().flatten())


def test_masked_groups_are_dropped_although_their_entries_are_there() -> None:
    model = network()
    grouping = make_grouping(model, "weights")
    on = choice(grouping.num_groups, 0)
    carried, origin = carry_grouping(grouping, {}, on)
    assert carried.num_groups == int(on.sum())
    assert int(carried.sizes().min()) == int(carried.sizes().max()) == 1
    assert torch.equal(origin, on.nonzero().flatten())


@pytest.mark.parametrize("rule", ["units", "units+features", "weights"])
def test_two_removals_compose(rule: str, tmp_path: Path) -> None:
    dense = network()
    grouping = make_grouping(dense, rule, example=EXAMPLE)
    lineage, model = Lineage(torch.ones(grouping.num_groups, dtype=torch.bool)), dense
    for seed in (1, 2):
        present, origin = lineage.grouping(grouping)
        on = choice(present.num_groups, seed)
        masks = present.masks(on)
        for name, mask in lineage.masks.items():
            masks[name] = masks.get(name, mask) & mask
        done = compact(model, masks, EXAMPLE)
        lineage, model = lineage.then(origin, on, dict(done.masks), done.kept), done.model
    parameters = dict(dense.named_parameters())
    for name, small in model.named_parameters():
        value = parameters[name].detach()
        for dim, positions in lineage.kept.get(name, {}).items():
            value = value.index_select(dim, positions)
        mask = lineage.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value * mask, small.detach()), name
    present, origin = lineage.grouping(grouping)
    assert bool(lineage.on[origin].all())
    assert all(tuple(dict(model.named_parameters())[n].shape) == s for n, s in present.parameters.items())
    path = tmp_path / "lineage.safetensors"
    lineage.save(path)
    again = Lineage.load(path)
    assert torch.equal(again.on, lineage.on)
    assert again.grouping(grouping)[0].fingerprint() == present.fingerprint()
    assert {n: m.tolist() for n, m in again.masks.items()} == {
        n: m.tolist() for n, m in lineage.masks.items()
    }


def test_damaged_lineage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lineage.safetensors"
    with pytest.raises(RunError, match="is missing or damaged"):
        Lineage.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(RunError, match="is missing or damaged"):
        Lineage.load(path)


def test_optional_layers_stay_optional() -> None:
    labels = Labels("a.weight", (3, 2), torch.arange(3)[:, None])
    grouping = Grouping("rows", (labels,), ("a",), torch.zeros(3, dtype=torch.int64), optional_layers=("a",))
    smaller, _ = carry_grouping(grouping, {"a.weight": {0: torch.tensor([0, 2])}})
    assert smaller.num_groups == 2
    assert smaller.optional_layers == ("a",)
