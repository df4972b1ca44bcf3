"""The check behind every compaction: the masked network and the compacted one compute the same.

Both run in evaluation mode on the example, on Gaussian noise of its shape (an example of zeros would prove
nothing) and on whatever batches the caller adds. A second run in training mode compares shapes only, since
dropout draws other numbers for other widths: it finds branches that run in training alone.

    >>> check_parity(masked, compacted, inputs_for(example))
    2.4e-16
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError

__all__ = ["called_modules", "check_parity", "constant_output", "copied", "inputs_for"]

# Largest difference relative to the largest output, by type of the outputs: float64 wherever the network runs
# in it. Only rounding may differ, since sums have fewer terms.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2


def copied(model: nn.Module) -> nn.Module:
    """Copy a network with its own tensors, modes and hooks.

    Raises:
        ModelError: the network holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as cause:
        raise ModelError(
            f"the {type(model).__name__} cannot be copied ({_first_line(cause)}); "
            "remove weight_norm hooks, non-leaf tensors, locks and open files from it first"
        ) from cause


def inputs_for(example: Tensor, check: Tensor | None = None) -> list[Tensor]:
    """List the batches to compare on: the example, noise with its mean and deviation, and the caller's batch.

    Args:
        example: of the network's input shape; noise is added only if it is of floating point.
        check: further inputs, if any.
    """
    inputs = [example.detach()]
    if example.is_floating_point() and example.numel() > 1:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(example.shape, generator=generator, dtype=torch.float64)
        mean, deviation = example.detach().double().mean().item(), example.detach().double().std().item()
        # Noise around a constant example would be constant as well, hence the floor.
        inputs.append((mean + max(deviation, 1.0) * noise).to(device=example.device, dtype=example.dtype))
    if check is not None:
        inputs.append(check.detach())
    return inputs


def called_modules(model: nn.Module, example: Tensor) -> set[str]:
    """Run a network and list the modules whose `forward` is called, by every path they have.

    A linear layer whose weight is only used by some other code is not among them.

    Raises:
        ModelError: the network does not run on the example.
    """
    called: set[int] = set()
    trial = copied(model).eval()
    handles = [
        module.register_forward_pre_hook(lambda module, _inputs: called.add(id(module)))
        for module in trial.modules()
    ]
    with _undisturbed(trial, example):
        _run(trial, example)
    for handle in handles:
        handle.remove()
    return {path for path, module in trial.named_modules(remove_duplicate=False) if id(module) in called}


def constant_output(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a network in evaluation mode gives the same whatever it is given.

    Args:
        model: the network.
        inputs: batches of the input shape, of which some differ.
    """
    trial = copied(model).eval()
    first = inputs[0]
    others = [first.flip(0), *(x for x in inputs[1:] if x.shape == first.shape)]
    with _undisturbed(trial, first):
        reference = _tensors(_run(trial, first))
        for x in others:
            if any(not torch.equal(y, z) for y, z in zip(reference, _tensors(_run(trial, x)), strict=True)):
                return False
    return True


def check_parity(
    masked: nn.Module, compacted: nn.Module, inputs: Sequence[Tensor], *, folded: bool = False
) -> float:
    """Compare two networks.

    Args:
        masked: the reference; its removed entries are zero.
        compacted: the network that must equal it.
        inputs: batches of the input shape, the first of which also runs in training mode.
        folded: whether parameters were computed anew, and are therefore rounded to the network's own type even where
            both networks run in double precision.

    Returns:
        The largest difference, relative to the largest output of its tensor.

    Raises:
        ModelError: outputs differ, the compacted network does not run where the masked one does, or outputs
            of the masked network are not finite.
    """
    reference, trial, inputs = _in_double(masked, compacted, inputs)
    worst = 0.0
    own = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
    for x in inputs:
        with _undisturbed(reference, x):
            expected = _tensors(_run(reference, x))
        with _undisturbed(trial, x):
            actual = _tensors(_run_compacted(trial, x))
        if [t.shape for t in actual] != [t.shape for t in expected]:
            raise ModelError(
                f"the compacted network gives outputs of shape {_shapes(actual)}, the masked one "
                f"{_shapes(expected)}: the traced units are wrong for this model; exclude layers until it "
                "passes"
            )
        pairs = list(zip(actual, expected, strict=True))
        worst = max([worst, *(_difference(a, e, own if folded else e.dtype) for a, e in pairs)])
    _check_training(reference, trial, inputs[0])
    return worst


def _in_double(
    masked: nn.Module, compacted: nn.Module, inputs: Sequence[Tensor]
) -> tuple[nn.Module, nn.Module, Sequence[Tensor]]:
    """Copy both networks for the comparison, in double precision if the masked one runs in it.

    In single precision a branch that is scaled by 1e-6, as in networks with layer scale, is lost in rounding:
    what was cut wrongly inside it would not show.
    """
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    reference = copied(masked).eval().double()
    with _undisturbed(reference, inputs[0]):
        try:
            reference(doubled[0])
        except Exception:  # the model casts to a type of its own, say
            return copied(masked).eval(), copied(compacted).eval(), inputs
    return reference, copied(compacted).eval().double(), doubled


def _difference(actual: Tensor, expected: Tensor, precision: torch.dtype) -> float:
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            raise ModelError("the compacted network gives other integers than the masked one; exclude layers")
        return 0.0
    if not expected.isfinite().all():
        raise ModelError(
            "the masked network gives outputs that are not finite, so that nothing can be compared; "
            "check its weights and the example"
        )
    if expected.numel() == 0:
        return 0.0
    gap = (actual.double() - expected.double()).abs().max().item()
    error = gap / max(expected.double().abs().max().item(), torch.finfo(expected.dtype).tiny)
    allowed = TOLERANCE.get(precision, HALF_TOLERANCE)
    if not error <= allowed:  # written so that NaN fails
        raise ModelError(
            f"the compacted network differs from the masked one by {error:.2g} of its largest output, more "
            "than "
            f"{allowed:g}: the traced units are wrong for this model; exclude layers until it passes"
        )
    return error


def _check_training(reference: nn.Module, trial: nn.Module, example: Tensor) -> None:
    """Run both in training mode and compare shapes, if the masked network trains on such a batch at all."""
    x = torch.cat([example, example])  # batch norm refuses to train on one image
    reference.train()
    trial.train()
    with _undisturbed(reference, x):
        try:
            expected = _tensors(reference(x))
        except Exception:  # whatever the model raises, it raised before compaction too
            return
        actual = _tensors(_run_compacted(trial, x))
    if [t.shape for t in actual] != [t.shape for t in expected]:
        raise ModelError(
            f"in training mode the compacted network gives outputs of shape {_shapes(actual)}, the masked "
            "one "
            f"{_shapes(expected)}; exclude the layers that run in training only"
        )


def _run(model: nn.Module, x: Tensor) -> object:
    try:
        return model(x)
    except Exception as cause:
        raise ModelError(
            f"the network does not run on an input of shape {list(x.shape)}, {x.dtype}, {x.device}: "
            f"{_first_line(cause)}; give an example of its input"
        ) from cause


def _run_compacted(model: nn.Module, x: Tensor) -> object:
    try:
        return model(x)
    except Exception as cause:
        raise ModelError(
            f"the compacted network fails where the masked one runs ({_first_line(cause)}): the model holds "
            "a size "
            "as a constant, or the traced units are wrong for it; exclude the layers concerned"
        ) from cause


def _tensors(output: object) -> list[Tensor]:
    """Flatten what a network returns."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _tensors(value)]
    if output is None:
        return []
    raise ModelError(
        "expected the network to return tensors, or tuples, lists or dicts of them, not a "
        f"{type(output).__name__}; "
        "wrap it in a module that does"
    )


@contextmanager
def _undisturbed(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Without gradients, in full precision, and with the caller's random numbers put back."""
    devices = {t.device.index for t in (x, *model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    # TF32 rounds to 10 bits, differently for different widths: it would hide what is compared here.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _first_line(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
