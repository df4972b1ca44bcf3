"""Training one phase: learning, keeping the best, stepping back from a collapse, and resuming bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsebayes.data import Images, Loader
from sparsebayes.errors import DataError, ModelError, NumericsError
from sparsebayes.recipe.schema import TrainSection
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.fit import Epoch, Phase, fit_
from sparsebayes.train.objective import _in_bfloat16, objective, training_forward


def bars(num: int, seed: int) -> Images:
    """4x4 images whose bright row is their class: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (num,), generator=generator)
    images = torch.randint(0, 60, (num, 1, 4, 4), generator=generator, dtype=torch.uint8)
    images[torch.arange(num), 0, labels] += 150
    return Images(images, labels)


def loader(images: Images, *, shuffle: bool = False, batch: int = 32) -> Loader:
    return Loader(images, batch_size=batch, mean=(0.3,), std=(0.3,), shuffle=shuffle, drop_last=shuffle)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def fit(model: nn.Module, **changes: Any):
    settings = TrainSection(**changes.pop("settings", {}))
    options = {"name": "pretrain", "epochs": 3, "lr": 0.1, "seed": 0, **changes.pop("phase", {})}
    train = loader(bars(256, 1), shuffle=True)
    return fit_(model, train, loader(bars(128, 2)), Phase(**options), settings, **changes)


def test_it_learns_and_reports_every_epoch() -> None:
    model = network()
    epochs: list[Epoch] = []
    before = evaluate(model, loader(bars(128, 2)))
    after = fit(model, on_epoch=epochs.append)
    assert after.loss < 0.3 * before.loss
    assert after.error < 0.05
    assert [e.epoch for e in epochs] == [1, 2, 3]
    assert epochs[-1].heldout == after
    assert epochs[0].train_loss > epochs[-1].train_loss


def test_same_seed_same_weights_and_other_seed_others() -> None:
    first, second, third = network(), network(), network()
    fit(first)
    fit(second)
    fit(third, phase={"seed": 1})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[1].weight, third[1].weight)


def test_resumed_phase_ends_in_the_very_same_weights() -> None:
    whole, broken = network(), network()
    states: list[dict[str, Any]] = []
    fit(whole, phase={"epochs": 4, "keep_best": True}, save=lambda state: states.append(copy.deepcopy(state)))
    assert [s["epoch"] for s in states] == [1, 2, 3, 4]
    again: list[dict[str, Any]] = []
    fit(broken, phase={"epochs": 4, "keep_best": True}, resume=states[1], save=again.append)
    assert [s["epoch"] for s in again] == [3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_dropout_is_seeded_and_resumed_too() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Dropout(0.3), network()[1]) for _ in range(3)]
    states: list[dict[str, Any]] = []
    before = torch.get_rng_state()
    fit(models[0], save=lambda state: states.append(copy.deepcopy(state)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    fit(models[1])
    fit(models[2], resume=states[0])
    assert torch.equal(models[0][2].weight, models[1][2].weight)
    assert torch.equal(models[0][2].weight, models[2][2].weight)


def test_zero_epochs_leave_the_network_alone() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    fit(model, phase={"epochs": 0})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_keep_best_never_ends_worse_than_it_began() -> None:
    model = network()
    good = fit(model, phase={"epochs": 6})
    # A rate that disturbs but does not kill.
    after = fit(model, phase={"epochs": 2, "lr": 1.5, "keep_best": True, "reference": good.loss})
    assert after.loss <= good.loss


def test_a_collapse_is_begun_again_at_a_lower_rate() -> None:
    model = network()
    good = fit(model, phase={"epochs": 6})
    epochs: list[Epoch] = []
    after = fit(
        model,
        phase={"epochs": 4, "lr": 1000.0, "reference": good.loss, "name": "finetune 1"},
        on_epoch=epochs.append,
    )
    assert epochs[-1].lr < 1000.0
    assert after.error < 0.5


def test_a_hopeless_rate_is_one_sentence() -> None:
    model = network()
    with pytest.raises(
        NumericsError, match=r"collapsed in phase 'pretrain' at every learning rate from 1e\+12"
    ):
        fit(model, phase={"lr": 1e12})


def test_after_step_holds_masked_entries_at_zero() -> None:
    model = network()
    mask = torch.ones_like(model[1].weight, dtype=torch.bool)
    mask[:5] = False
    rates: list[float] = []

    def hold(lr: float) -> None:
        rates.append(lr)
        with torch.no_grad():
            model[1].weight.mul_(mask)

    fit(model, after_step=hold)
    assert torch.equal(model[1].weight[:5], torch.zeros(5, 16))
    assert bool((model[1].weight[5:] != 0).all())
    assert len(rates) == 3 * 8
    assert max(rates) == pytest.approx(0.1, rel=0.02)


def test_teacher_logits_are_those_of_the_very_image() -> None:
    model, images = network(), bars(256, 1)
    logits = F.one_hot(images.labels, 4).float() * 8
    assert fit(model, settings={"distill": 1.0}, teacher=logits).error < 0.1  # learned from the teacher alone
    with pytest.raises(NumericsError, match="collapsed"):
        fit(network(), settings={"distill": 1.0}, teacher=logits.roll(1, 0))


class Watched(nn.Module):
    """A network that keeps the images of its passes, those without gradients apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.learned: list[torch.Tensor] = []
        self.judged: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.training == torch.is_grad_enabled()
        (self.learned if self.training else self.judged).append(images)
        return self.inner(images)


def test_a_teacher_that_is_a_network_sees_what_the_student_sees() -> None:
    teacher, student, images = Watched(), Watched(), bars(256, 1)
    fit(teacher.inner, phase={"epochs": 6})
    before = [p.clone() for p in teacher.parameters()]
    turned = Loader(images, batch_size=32, mean=(0.3,), std=(0.3,), shuffle=True, augment="crop_flip")
    phase = Phase(name="cycle 1", epochs=1, lr=0.1, seed=0)
    end = fit_(student, turned, loader(bars(128, 2)), phase, TrainSection(distill=1.0), teacher=teacher)
    assert end.error < 0.7, "learned from the teacher alone"
    assert teacher.learned == [] and len(teacher.judged) == 8
    assert all(torch.equal(a, b) for a, b in zip(teacher.judged, student.learned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_objective_is_the_mixture_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, soft = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).unbind(0)
    labels = torch.tensor([0, 2, 1, 1, 0])
    settings = TrainSection(distill=0.3, distill_temperature=2.0)
    p, q = (soft / 2).softmax(1), (logits / 2).softmax(1)
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(objective(logits, labels, soft, settings), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective(logits, labels, None, settings), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_learns(optimizer: str) -> None:
    lr = 0.1 if optimizer == "sgd" else 0.01
    assert fit(network(), phase={"lr": lr, "epochs": 4}, settings={"optimizer": optimizer}).error < 0.05


def test_outputs_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 3, but the model has 2 outputs"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    with pytest.raises(
        ModelError, match=r"expected logits of shape \[32, classes\] from the model, got shape"
    ):
        fit(nn.Conv2d(1, 4, 1))


def test_evaluation_by_hand_and_mode_restored() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))
    images = bars(50, 3)
    found = evaluate(model.train(), loader(images, batch=7))
    assert model.training
    x = (images.images.float() / 255 - 0.3) / 0.3
    losses = F.cross_entropy(model.eval()(x), images.labels, reduction="none").detach().double()
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.standard_error == pytest.approx(float(losses.std()) / 50**0.5, rel=1e-6)
    assert found.error == pytest.approx(float((model(x).argmax(1) != images.labels).double().mean()))
    with pytest.raises(DataError, match="expected images to evaluate on, got none"):
        evaluate(model, [])


def test_bfloat16_learns_and_leaves_float32_weights() -> None:
    exact, rounded = network(), network()
    fit(exact)
    after = fit(rounded, settings={"precision": "bfloat16"})
    assert after.error < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())
    difference = (exact[1].weight - rounded[1].weight).detach().abs().max()
    assert 0 < float(difference) < 0.1


def test_automatic_precision_is_exact_without_a_gpu() -> None:
    exact, automatic = network(), network()
    fit(exact)
    fit(automatic, settings={"precision": "auto"})
    assert torch.equal(exact[1].weight, automatic[1].weight)


def test_automatic_precision_never_emulates_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {name: TrainSection(precision=name) for name in ("auto", "bfloat16", "float32")}
    assert {name: _in_bfloat16(settings, "cuda") for name, settings in asked.items()} == {
        "auto": False,
        "bfloat16": True,
        "float32": False,
    }


@pytest.mark.gpu
def test_automatic_precision_is_bfloat16_on_a_gpu() -> None:
    seen = []
    model = network().cuda()
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = training_forward(model, TrainSection(precision="auto"))(torch.zeros(2, 16, device="cuda"))
    assert (seen, logits.dtype) == ([torch.bfloat16], torch.float32)


def test_compiled_passes_train_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_eagerly(model: nn.Module) -> nn.Module:
        assert forgotten, "programs of the networks before count against the number that is kept"
        compiled.append(model)
        wrapper = nn.Sequential(model)
        return wrapper

    forgotten: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain, model = network(), network()
    fit(plain)
    fit(model, settings={"compile": True})
    assert compiled == [model]
    assert torch.equal(plain[1].weight, model[1].weight)
