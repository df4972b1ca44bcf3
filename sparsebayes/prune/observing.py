"""What single layers of a network take and give in one run, by forward hooks on a copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsebayes.networks import copied

__all__ = ["BATCH_NORMS", "Seen", "norm_behind", "observe"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a run of the masked network showed of one layer.

    Args:
        calls: how often it was called.
        source: the very tensor that it took.
        result: the very tensor that it gave.
        value: a copy of the result, made at once: what follows may change it in place.
        taken: a copy of what it took.
        uses: how many operations took the result, in place or not; to be an output of the network counts as well.
    """

    calls: int
    source: Tensor
    result: Tensor
    value: Tensor
    taken: Tensor
    uses: int = 0


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that take certain tensors, which the caller keeps alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[int, int] = {}
        self.paused = False

    def add(self, values: object) -> None:
        """Count every one of these tensors, in whatever lists they are."""
        for value in tree_leaves(values):
            if id(value) in self.counts:
                self.counts[id(value)] += 1

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, which does not count."""
        self.paused = True
        result = tensor.clone()
        self.paused = False
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.add((args, kwargs))
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, paths: Collection[str], example: Tensor) -> dict[str, Seen]:
    """Run a network once in evaluation mode, and note what the chosen layers and all batch norms took and gave.

    Layers that take or give anything but one tensor are left out.

    Args:
        model: the network.
        paths: of the layers.
        example: an input batch.
    """
    trial = copied(model).eval()
    seen: dict[str, Seen] = {}
    taken: dict[str, Tensor] = {}
    uses = _Uses()

    def before(path: str) -> Callable[[nn.Module, Sequence[object]], None]:
        def hook(_module: nn.Module, inputs: Sequence[object]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                taken[path] = uses.copy(inputs[0])

        return hook

    def note(path: str) -> Callable[[nn.Module, Sequence[object], object], None]:
        def hook(_module: nn.Module, inputs: Sequence[object], output: object) -> None:
            source = inputs[0] if inputs else None
            if not isinstance(source, Tensor) or not isinstance(output, Tensor):
                return  # recurrent layers, say, return more than one tensor
            calls = seen[path].calls + 1 if path in seen else 1
            seen[path] = Seen(calls, source, output, uses.copy(output), taken.pop(path))
            uses.counts.setdefault(id(output), 0)

        return hook

    for path, module in trial.named_modules():
        if path in paths or isinstance(module, BATCH_NORMS):
            module.register_forward_pre_hook(before(path))
            module.register_forward_hook(note(path))
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad(), uses:
        uses.add(trial(example))
    return {path: replace(one, uses=uses.counts[id(one.result)]) for path, one in seen.items()}


def norm_behind(layers: Mapping[str, nn.Module], seen: Mapping[str, Seen], path: str) -> str | None:
    """The batch norm that alone takes the result of a layer, and is called once; None if there is none."""
    result = seen[path].result
    if seen[path].uses != 1:
        return None
    return next(
        (
            other
            for other, one in seen.items()
            if one.source is result and one.calls == 1 and isinstance(layers[other], BATCH_NORMS)
        ),
        None,
    )
