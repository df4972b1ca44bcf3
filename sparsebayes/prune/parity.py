"""The check behind every compaction: the masked network and the compacted one compute the same.

Both run in evaluation mode on the example, on Gaussian noise of its shape (an example of zeros would prove
nothing) and on whatever batches the caller adds. A second run in training mode, of two images, compares shapes only,
since dropout draws other numbers for other widths: it finds branches that run in training alone.

    >>> check_parity(masked, compacted, inputs_for(example))
    2.4e-16
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.networks import copied

__all__ = ["Reference", "called_modules", "check_parity", "constant_output", "inputs_for"]

# Largest difference relative to the largest output, by type of the outputs: float64 wherever the network runs
# in it. Only rounding may differ, since sums have fewer terms.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2


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
    """Compare two networks: `Reference.compare` with a reference that serves once."""
    return Reference(masked, inputs).compare(compacted, folded=folded)


class Reference:
    """What a masked network computes, to compare compacted ones with.

    It runs in double precision if it can. In single precision a branch that is scaled by 1e-6, as in networks with
    layer scale, is lost in rounding: what was cut wrongly inside it would not show.

    Args:
        masked: the network; its removed entries are zero.
        inputs: batches of the input shape, the first of which also runs in training mode.

    Raises:
        ModelError: the network cannot be copied, or does not run on the inputs.
    """

    def __init__(self, masked: nn.Module, inputs: Sequence[Tensor]) -> None:
        own = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
        self._own_type = own
        self._inputs = [x.double() if x.is_floating_point() else x for x in inputs]
        self._in_double = True
        network = _doubled(masked).eval()
        try:
            first = self._evaluated(network, self._inputs[0])
        except ModelError:  # the model casts to a type of its own, say
            network, self._inputs, self._in_double = copied(masked).eval(), list(inputs), False
            first = self._evaluated(network, self._inputs[0])
        self._outputs = [first, *(self._evaluated(network, x) for x in self._inputs[1:])]
        self._training_shapes = self._trained(network)

    @staticmethod
    def _evaluated(network: nn.Module, x: Tensor) -> list[Tensor]:
        with _undisturbed(network, x):
            return _tensors(_run(network, x))

    def _trained(self, network: nn.Module) -> list[torch.Size] | None:
        """Shapes of the outputs in training mode; None if the network does not train on such a batch."""
        x = _two_images(self._inputs[0])
        with _undisturbed(network.train(), x):
            try:
                return [tensor.shape for tensor in _tensors(network(x))]
            except Exception:  # whatever the model raises, it raised before compaction too
                return None

    def compare(self, compacted: nn.Module, *, folded: bool = False) -> float:
        """Compare a compacted network with this reference.

        Args:
            compacted: the network that must compute the same; not changed.
            folded: whether parameters were computed anew, and are therefore rounded to the network's own type even
                where both networks run in double precision.

        Returns:
            The largest difference, relative to the largest output of its tensor.

        Raises:
            ModelError: outputs differ, the compacted network does not run where the masked one does, or outputs
                of the masked network are not finite.
        """
        trial = (_doubled(compacted) if self._in_double else copied(compacted)).eval()
        worst = 0.0
        for x, expected in zip(self._inputs, self._outputs, strict=True):
            with _undisturbed(trial, x):
                actual = _tensors(_run_compacted(trial, x))
            if [t.shape for t in actual] != [t.shape for t in expected]:
                raise ModelError(
                    f"the compacted network gives outputs of shape {_shapes(actual)}, the masked one "
                    f"{_shapes(expected)}: the traced units are wrong for this model; exclude layers until it "
                    "passes"
                )
            pairs = list(zip(actual, expected, strict=True))
            worst = max(
                [worst, *(_difference(a, e, self._own_type if folded else e.dtype) for a, e in pairs)]
            )
        self._compare_training(trial)
        return worst

    def _compare_training(self, trial: nn.Module) -> None:
        """Run in training mode and compare shapes."""
        if self._training_shapes is None:
            return
        x = _two_images(self._inputs[0])
        with _undisturbed(trial.train(), x):
            actual = _tensors(_run_compacted(trial, x))
        if [t.shape for t in actual] != self._training_shapes:
            raise ModelError(
                f"in training mode the compacted network gives outputs of shape {_shapes(actual)}, the masked one "
                f"{_listed(self._training_shapes)}; exclude the layers that run in training only"
            )


def _doubled(model: nn.Module) -> nn.Module:
    """Copy a network with its numbers in double precision, without a copy in its own type on the way."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # Other classes of tensors may mean something else by a type: they are copied, and converted afterwards.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.is_leaf:
            wide: Tensor = tensor.detach().to(torch.float64, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
    return copied(model, memo).double()


def _two_images(batch: Tensor) -> Tensor:
    """Two images of a batch, one of them twice if it is alone: batch norm refuses to train on one image."""
    return batch[:2] if len(batch) > 1 else torch.cat([batch, batch])


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
    with ExitStack() as stack:
        if devices:
            stack.enter_context(_full_precision())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which rounds to 10 bits, differently for different widths: it would hide what is compared."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        older: bool | None = backends.cudnn.allow_tf32
    except RuntimeError:  # it cannot be read once a user has set the newer switches otherwise
        older = None
    try:
        products: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = None
    try:
        if older is not None:  # a forward that enters `cudnn.flags` reads it
            backends.cudnn.allow_tf32 = False
        if products is not None:  # the older switch must say the same as the newer one
            torch.set_float32_matmul_precision("highest")
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            backends.cudnn.allow_tf32 = older
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _shapes(tensors: Sequence[Tensor]) -> str:
    return _listed([tensor.shape for tensor in tensors])


def _listed(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _first_line(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
