"""What single layers of a network take and give in one run, by forward hooks on a copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """

    calls: int
    source: Tensor
    result: Tensor
    value: Tensor
    taken: Tensor


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

    def before(path: str) -> Callable[[nn.Module, Sequence[object]], None]:
        def hook(_module: nn.Module, inputs: Sequence[object]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                taken[path] = inputs[0].clone()

        return hook

    def note(path: str) -> Callable[[nn.Module, Sequence[object], object], None]:
        def hook(_module: nn.Module, inputs: Sequence[object], output: object) -> None:
            source = inputs[0] if inputs else None
            if not isinstance(source, Tensor) or not isinstance(output, Tensor):
                return  # recurrent layers, say, return more than one tensor
            calls = seen[path].calls + 1 if path in seen else 1
            seen[path] = Seen(calls, source, output, output.clone(), taken.pop(path))

        return hook

    for path, module in trial.named_modules():
        if path in paths or isinstance(module, BATCH_NORMS):
            module.register_forward_pre_hook(before(path))
            module.register_forward_hook(note(path))
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        trial(example)
    return seen


def norm_behind(layers: Mapping[str, nn.Module], seen: Mapping[str, Seen], path: str) -> str | None:
    """The batch norm that takes the result of a layer, and is called once; None if there is none."""
    result = seen[path].result
    return next(
        (
            other
            for other, one in seen.items()
            if one.source is result and one.calls == 1 and isinstance(layers[other], BATCH_NORMS)
        ),
        None,
    )
