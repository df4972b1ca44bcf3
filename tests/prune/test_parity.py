"""The self-check: it passes on equals and sees every kind of difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.prune.parity import (
    Reference,
    _doubled,
    _full_precision,
    called_modules,
    check_parity,
    inputs_for,
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 2)
    ).double()


X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Returning(nn.Module):
    """Returns what it is told to."""

    def __init__(self, make: object) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(self.layer(x))  # type: ignore[operator]


class Casting(nn.Module):
    """Casts to single precision, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_equals_pass_and_nothing_of_the_caller_changes() -> None:
    model = net()
    model[4].eval()
    model[0].weight.grad = torch.ones(4, 3, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert check_parity(model, copy.deepcopy(model), inputs_for(X)) == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, True, True, False]
    assert model[0].weight.grad is not None


def test_a_small_difference_is_seen() -> None:
    model, other = net(), net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[4].bias += 1e-6
    with pytest.raises(
        ModelError, match=r"differs from the masked one by .*e-0. of its largest output, more than 1e-09"
    ):
        check_parity(model, other, inputs_for(X))


def test_an_example_of_zeros_does_not_hide_a_difference() -> None:
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    with pytest.raises(ModelError, match="differs from the masked one"):
        check_parity(first, second, inputs_for(torch.zeros(2, 3)))


def test_the_callers_batch_is_used() -> None:
    class Rare(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x > 100).double().sum()

    plain, rare = nn.Linear(3, 2, dtype=torch.float64), Rare(3, 2, dtype=torch.float64)
    rare.load_state_dict(plain.state_dict())
    check_parity(plain, rare, inputs_for(X))
    with pytest.raises(ModelError, match="differs"):
        check_parity(plain, rare, inputs_for(X, check=X * 1e4))


def test_other_shapes_and_failures_are_refused() -> None:
    with pytest.raises(ModelError, match=r"outputs of shape \[5, 3\], the masked one \[5, 2\]"):
        check_parity(nn.Linear(3, 2), nn.Linear(3, 3), [X.float()])
    with pytest.raises(
        ModelError, match=r"fails where the masked one runs \(mat1 and mat2 .*holds a size as a const"
    ):
        check_parity(nn.Linear(3, 2), nn.Linear(4, 2), [X.float()])
    with pytest.raises(
        ModelError, match=r"does not run on an input of shape \[5, 3\], torch.float32, cpu: mat1"
    ):
        check_parity(nn.Linear(4, 2), nn.Linear(3, 2), [X.float()])


def test_a_branch_that_runs_in_training_only_is_checked() -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.Linear(3, 2), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)

    first, second = WithAuxiliary(3), WithAuxiliary(4)
    second.main.load_state_dict(first.main.state_dict())
    with pytest.raises(ModelError, match="fails where the masked one runs"):
        check_parity(first, second, inputs_for(X.float()))
    second.auxiliary = nn.Linear(3, 7)
    with pytest.raises(
        ModelError, match=r"in training mode .* \[2, 2\], \[2, 7\], the masked one \[2, 2\], \[2, 2\]"
    ):
        check_parity(first, second, inputs_for(X.float()))


def test_a_difference_below_single_precision_is_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-8 * self.layer(x)

    with pytest.raises(ModelError, match="differs from the masked one"):
        check_parity(Scaled(), Scaled(), inputs_for(X.float()))


def test_a_network_that_casts_is_compared_in_its_own_type() -> None:
    model = Returning(lambda y: y)
    model.layer = nn.Sequential(Casting(), nn.Linear(3, 2))  # type: ignore[assignment]
    other = copy.deepcopy(model)
    assert check_parity(model, other, inputs_for(X.float())) == 0.0
    with torch.no_grad():
        other.layer[1].bias += 1e-2  # type: ignore[index, union-attr]
    with pytest.raises(ModelError, match=r"more than 0.0001: the traced units are wrong"):
        check_parity(model, other, inputs_for(X.float()))


def test_a_network_that_does_not_train_is_checked_in_evaluation() -> None:
    class Refusing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("for inference only")
            return super().forward(x)

    model = Refusing(3, 2)
    assert check_parity(model, copy.deepcopy(model), inputs_for(X.float())) == 0.0


def test_containers_and_integers_are_compared() -> None:
    for make in (lambda y: {"a": y, "b": [y, (y, None)]}, lambda y: y.argmax(-1)):
        model = Returning(make)
        assert check_parity(model, copy.deepcopy(model), [X.float()]) == 0.0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.weight.neg_()
        other.layer.bias.neg_()
    with pytest.raises(ModelError, match="gives other integers"):
        check_parity(model, other, [X.float()])
    strange = Returning(lambda y: "text")
    with pytest.raises(ModelError, match=r"expected the network to return tensors.* not a str"):
        check_parity(strange, strange, [X.float()])


def test_outputs_that_are_not_finite_are_refused() -> None:
    broken = Returning(lambda y: y / 0)
    with pytest.raises(ModelError, match="gives outputs that are not finite"):
        check_parity(broken, broken, [X.float()])


def test_nan_in_the_compacted_network_is_a_difference() -> None:
    with pytest.raises(ModelError, match="differs from the masked one by nan"):
        other = Returning(lambda y: y * float("nan"))
        check_parity(Returning(lambda y: y), other, [X.float()])


def test_called_modules_names_every_path() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.functional = nn.Linear(3, 3), nn.Linear(3, 3)
            self.again = self.used

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.functional.weight)

    assert called_modules(Half(), X.float()) == {"", "used", "again"}


class Watched(nn.Linear):
    """Notes the mode, the number of images and the type of each of its runs, in all its copies."""

    runs: list[tuple[bool, int, torch.dtype]] = []  # noqa: RUF012 - shared on purpose

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append((self.training, len(x), x.dtype))
        return super().forward(x)


@pytest.mark.parametrize(("images", "trained"), [(1, 2), (2, 2), (7, 2)])
def test_a_reference_runs_once_for_several_comparisons_and_trains_on_two_images(
    images: int, trained: int
) -> None:
    model = Watched(3, 2)
    Watched.runs.clear()
    x = X.float()[:1].expand(images, 3)
    reference = Reference(model, [x, x + 1])
    once = [(False, images, torch.float64)] * 2 + [(True, trained, torch.float64)]
    assert Watched.runs == once
    plain = nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    assert reference.compare(plain) == reference.compare(plain) == 0.0
    assert Watched.runs == once
    reference.compare(model)
    assert Watched.runs == once * 2


def test_the_double_copy_shares_what_the_network_shares_and_nothing_with_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3).double())
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[3].running_mean = model[2].running_mean
    twin = _doubled(model)
    assert twin[1].weight is twin[0].weight  # type: ignore[index]
    assert twin[3].running_mean is twin[2].running_mean  # type: ignore[index]
    theirs, ours = dict(model.state_dict(keep_vars=True)), dict(twin.state_dict(keep_vars=True))
    assert {t.dtype for n, t in ours.items() if "num_batches" not in n} == {torch.float64}
    assert {t.data_ptr() for t in theirs.values()}.isdisjoint({t.data_ptr() for t in ours.values()})
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].detach(), tensor.detach().to(ours[name].dtype), rtol=0, atol=0)
        assert ours[name].requires_grad == tensor.requires_grad
        assert type(ours[name]) is type(tensor)


def test_the_precision_that_a_user_has_set_stays_and_may_be_of_the_new_kind() -> None:
    place = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = place.fp32_precision
    place.fp32_precision = "ieee"  # from now on the older switches cannot be read
    try:
        model = net()
        assert check_parity(model, copy.deepcopy(model), inputs_for(X)) == 0.0
        assert place.fp32_precision == "ieee"
        place.fp32_precision = "tf32"
        with _full_precision():
            assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "tf32"
    finally:
        place.fp32_precision = before
    older = torch.backends.cudnn.allow_tf32
    # `flags` reads the older switch.
    with _full_precision(), torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        assert place.fp32_precision != "tf32"
    assert torch.backends.cudnn.allow_tf32 == older
    assert place.fp32_precision == before
