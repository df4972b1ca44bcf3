"""What users bring to `sparsebayes.wrap`: their loaders, losses, types and optimizers, and what they keep of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import sparsebayes
from sparsebayes.errors import DataError, GroupingError, ModelError
from sparsebayes.prune import carry_tensors


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, outputs))


def builder() -> nn.Module:
    return network()


def data(num: int = 400) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 8, generator=generator)
    return TensorDataset(x, (x @ torch.randn(8, 4, generator=generator)).argmax(1))


def loader(**options: Any) -> DataLoader:
    return DataLoader(data(), batch_size=50, **options)


def evidence(model: nn.Module, batches: Iterable[Any], **options: Any) -> Tensor:
    return sparsebayes.wrap(model, num_data=400).update(batches, estimator="exact", **options).evidence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x, y, torch.arange(len(x))), "got a tuple of 3"),
        (lambda x, y: {"image": x, "label": y}, "got a (batch that begins with|)? ?a? ?dict"),
        (lambda x, y: (x, y.tolist()), "got a pair of Tensor and list"),
        (lambda x, y: (x, y[:-1]), "expected as many targets as images, got 49 for 50"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_batches_of_other_kinds_are_refused_in_a_sentence(change: Any, said: str, known: bool) -> None:
    example = data().tensors[0][:2] if known else None
    sparse = sparsebayes.wrap(network(), example=example, num_data=400)
    with pytest.raises(DataError, match=said):
        sparse.update([change(x, y) for x, y in loader()])


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(
        GroupingError, match="expected a rule's name, a function, a Grouping or several of them"
    ):
        sparsebayes.wrap(network(), None, num_data=400).update(loader())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_type_of_the_network(dtype: torch.dtype) -> None:
    expected = evidence(network(), loader())
    found = evidence(network().to(dtype), loader())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0.1, atol=0.05 * float(expected.max()))


def test_a_loader_sorted_by_class_is_warned_of() -> None:
    x, y = data().tensors
    order = y.argsort()
    batches = DataLoader(TensorDataset(x[order], y[order]), batch_size=50)
    with pytest.warns(
        UserWarning, match="the first 100 images of the curvature's loader are sorted by class"
    ):
        sparsebayes.wrap(network()).update(batches, num_images=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsebayes.wrap(network()).update(batches, num_images=None)  # all of them: the order is all one
        sparsebayes.wrap(network()).update(loader(), num_images=100)


class Batched(Dataset[tuple[Tensor, Tensor]]):
    """Items that are batches."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if number >= len(self):
            raise IndexError(number)
        return data()[50 * number : 50 * number + 50]


def test_the_number_of_images_is_never_that_of_something_else() -> None:
    with pytest.raises(DataError, match="the size of the training set is not known"):
        sparsebayes.wrap(network()).update(DataLoader(Batched(), batch_size=None))
    sparse = sparsebayes.wrap(network(), num_data=400)
    sparse.update(DataLoader(Batched(), batch_size=None))
    some = sparsebayes.wrap(network())
    some.update(loader(sampler=SubsetRandomSampler(range(200))))
    assert some.num_data == 200
    with pytest.raises(
        DataError, match=r"holds at least 400 images, but the training set was said to have 200"
    ):
        some.update(loader())


class Opened(Dataset[tuple[Tensor, Tensor]]):
    """Read by worker processes alone, which open it."""

    file: TensorDataset | None = None

    def __len__(self) -> int:
        return 400

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.file[number]  # type: ignore[index]


def open_(_: int) -> None:
    torch.utils.data.get_worker_info().dataset.file = data()  # type: ignore[union-attr]


def test_data_that_only_workers_can_read_are_not_read_elsewhere() -> None:
    batches = DataLoader(Opened(), batch_size=50, num_workers=1, worker_init_fn=open_)
    assert sparsebayes.wrap(network()).update(batches).num_groups == 28


def test_a_network_with_another_loss() -> None:
    x, y = data().tensors
    targets = F.one_hot(y, 4).float()
    batches = [(x, targets)]
    with pytest.raises(DataError, match="for other targets give likelihood='mse' or 'binary_cross_entropy'"):
        evidence(network(), batches)
    model = network()
    sparse = sparsebayes.wrap(model, num_data=400)
    sparse.update(batches, likelihood="mse", estimator="exact")
    expected = sparsebayes.gate_curvature(
        model, sparse.grouping, batches, num_data=400, likelihood="mse", estimator="exact"
    )
    torch.testing.assert_close(sparse.posterior.evidence.float(), expected.diagonal.float())
    with pytest.raises(DataError, match="expected at least two outputs for cross_entropy, got one"):
        evidence(network(1), [(x, torch.zeros_like(y))])


def test_a_strength_stays_until_another_is_given() -> None:
    sparse = sparsebayes.wrap(network())
    assert sparse.update(loader()).strength == 1.0
    assert sparse.update(loader(), strength=100.0).strength == 100.0
    assert sparse.update(loader()).strength == 100.0


def test_a_first_update_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sparsebayes.wrap(network_without_seed()).update(loader())
    assert torch.equal(torch.get_rng_state(), before)


def network_without_seed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return network()


@pytest.mark.parametrize("scale", ["switches", "entries"])
def test_shrinking_is_the_proximal_step_of_the_penalty(scale: str) -> None:
    sparse = sparsebayes.wrap(network(), "rows", scale=scale)
    sparse.update(loader())
    norms = sparse._group_norms()
    weight = sparse.posterior.penalty / 400
    if scale == "switches":
        weight = weight / norms
    sparse.shrink_(0.01)
    expected = (norms - 0.01 * weight).clamp(min=0)
    torch.testing.assert_close(sparse._group_norms(), expected.to(norms), rtol=1e-4, atol=1e-7)


def test_entries_of_units_are_shrunk_to_zero() -> None:
    sparse = sparsebayes.wrap(network(), scale="entries")
    sparse.update(loader())
    for _ in range(60):
        sparse.shrink_(100.0)
    assert float(sparse._group_norms().max()) == 0.0


def test_frozen_weights_are_not_shrunk() -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    sparse = sparsebayes.wrap(model)
    sparse.update(loader())
    sparse.shrink_(1.0)
    assert torch.equal(model[2].weight, before)


def test_a_refused_optimizer_changes_nothing() -> None:
    model = network()
    sparse = sparsebayes.wrap(model)
    sparse.update(loader(), strength=1e9)
    sparse.select()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ModelError, match="an LBFGS optimizer cannot go on"):
        sparse.compact(torch.optim.LBFGS(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    sparse.compact(torch.optim.SGD(model.parameters(), lr=0.1))
    assert sparse.model is not model


def test_wrappers_of_the_network_are_named() -> None:
    with pytest.raises(ModelError, match=r"not its DataParallel: wrap\(model.module, ...\)"):
        sparsebayes.wrap(nn.DataParallel(network()))
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    sparse = sparsebayes.wrap(model)
    sparse.update(loader(), strength=1e9)
    sparse.select()
    done = sparse.compact()
    with pytest.raises(ModelError, match=r"none of the tensors, such as 'n_averaged', .*averaged\.module"):
        carry_tensors(averaged.state_dict(), done.kept)
    carried = carry_tensors(averaged.module.state_dict(), done.kept)
    assert carried["0.weight"].shape == sparse.model[0].weight.shape


def test_a_compacted_network_is_saved_and_goes_on(tmp_path: Path) -> None:
    sparse = sparsebayes.wrap(network())
    optimizer = torch.optim.Adam(sparse.model.parameters())
    for x, y in loader():
        F.cross_entropy(sparse.model(x), y).backward()
        optimizer.step()
    sparse.update(loader(), strength=1e9)
    sparse.select()
    sparse.compact(optimizer)
    sparsebayes.save(sparse.model, tmp_path, builder=f"{__name__}:builder")
    again = sparsebayes.load(tmp_path)
    x, y = data().tensors
    assert torch.equal(again(x), sparse.model.eval()(x))
    resumed = torch.optim.Adam(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = []
    for model, steps in ((sparse.model, optimizer), (again, resumed)):
        steps.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps.step()
        losses.append(model(x))
    torch.testing.assert_close(*losses)


class Language(nn.Module):
    """A bag of words whose embedding is its last layer too, or has a twin there."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 16)
        self.hidden = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight if tied else nn.Parameter(self.words.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).mean(1)
        return self.head(x + F.relu(self.hidden(x)))


def sentences() -> Iterator[tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 30, (200, 4), generator=torch.Generator().manual_seed(0))
    yield tokens, tokens[:, 0]


def test_tying_an_embedding_does_not_change_what_a_channel_is_worth() -> None:
    found = {}
    for tied in (True, False):
        sparse = sparsebayes.wrap(Language(tied), num_data=200, price="params")
        posterior = sparse.update(sentences(), estimator="exact")
        layers = [sparse.grouping.describe(group) for group in range(posterior.num_groups)]
        names = {name: float(value) for name, value in zip(layers, sparse.curvature.diagonal, strict=True)}
        found[tied] = names
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert len(found[True]) == 16
