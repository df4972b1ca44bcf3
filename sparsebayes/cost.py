"""What a network costs: parameters, multiply-accumulates (MACs) for one input, and bytes.

>>> cost(nn.Linear(784, 300), torch.zeros(1, 784))
Cost(params=235,500, macs=235,200, bytes=942,000)

One MAC is one multiplication and one addition. MACs are counted below the modules, where the matrix products
and convolutions are carried out, so that functional calls and modules of any class are covered. Convolutions,
matrix products and attention count; additions of a bias, normalisation, activations, pooling and other
elementwise work count 0, as pruning papers do it. Heavy work of a kind that has no rule here is named in
`unsupported`, so that nobody takes the count for complete.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsebayes.errors import ModelError
from sparsebayes.networks import in_mode

__all__ = ["Cost", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """One row of the table: a module with parameters of its own, or that computes MACs itself.

    Attributes:
        name: path of the module, "" for the model itself.
        kind: its class.
        params: entries of its own parameters, those of submodules left out; a shared parameter counts once,
            where it is first met.
        macs: multiply-accumulates for one input, outside of its submodules; over all calls if there are
            several.
        output_shape: shape of what its last call returned for one input, of the first tensor where that is a
            tuple; () if it was never called.
    """

    name: str
    kind: str
    params: int
    macs: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Cost:
    """What a network costs.

    Attributes:
        params: entries of all parameters; a shared one counts once.
        macs: multiply-accumulates for one input; incomplete if `unsupported` is not empty.
        bytes: of parameters and saved buffers, as they are stored.
        unsupported: names of heavy operations without a rule that ran.
        layers: one row for each layer, in the order of `model.named_modules()`.
    """

    params: int
    macs: int
    bytes: int
    unsupported: tuple[str, ...]
    layers: tuple[LayerCost, ...]

    def __repr__(self) -> str:
        missing = f", unsupported={self.unsupported}" if self.unsupported else ""
        return f"Cost(params={self.params:,}, macs={self.macs:,}, bytes={self.bytes:,}{missing})"


def cost(model: nn.Module, example: Tensor) -> Cost:
    """Count what a network costs, by running it once in eval mode.

    Args:
        model: any module that takes one tensor. Its mode, hooks and gradients, and PyTorch's random numbers,
            are afterwards what they were.
        example: an input of shape `[1, ...]` on the model's device; of a larger batch the first item is
            taken.

    Returns:
        Totals and the table of layers.

    Raises:
        ModelError: the model does not run on the example.
    """
    counter = _Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in model.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, train=False))
        stack.enter_context(_plain_kernels())
        stack.enter_context(torch.no_grad())
        devices = [example.device] if example.is_cuda else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for module, name in names.items():
            enter = module.register_forward_pre_hook(partial(_enter, counter, name))
            leave = module.register_forward_hook(partial(_leave, counter, shapes, name), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        try:
            with counter:
                model(example[:1])
        except Exception as error:  # a model may fail in any way on an input it was not made for
            raise ModelError(
                f"the model does not run on an example of shape {list(example[:1].shape)} ({example.dtype}): "
                f"{type(error).__name__}: {error}; give an example input that it takes"
            ) from error
    params = _own_params(model)
    layers = tuple(
        LayerCost(name, type(module).__name__, params[name], counter.macs[name], shapes.get(name, ()))
        for module, name in names.items()
        if params[name] or counter.macs[name]
    )
    total = counter.macs.total()
    return Cost(sum(params.values()), total, _bytes(model), tuple(sorted(counter.unsupported)), layers)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of the operations that run, under the name of the module that runs them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self.unsupported: set[str] = set()
        self.path: list[str] = [""]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and count it."""
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        rule = _RULES.get(name) if space == "aten" else None
        if rule is not None:
            self.macs[self.path[-1]] += rule(args, result)
        elif space not in ("aten", "prims", "prim") or name.startswith(_HEAVY):
            self.unsupported.add(f"{space}::{name}")
        return result


def _enter(counter: _Counter, name: str, module: nn.Module, args: Any) -> None:
    """Count what follows under `name`."""
    counter.path.append(name)


def _leave(
    counter: _Counter,
    shapes: dict[str, tuple[int, ...]],
    name: str,
    module: nn.Module,
    args: Any,
    result: Any,
) -> None:
    """Go back to counting under the caller's name."""
    counter.path.pop()
    while isinstance(result, list | tuple) and result:
        result = result[0]
    if isinstance(result, Tensor):
        shapes[name] = tuple(result.shape)


def _matrix(first: int, args: Sequence[Any], result: Tensor) -> int:
    """A (batched) matrix product: each output entry sums over the last dimension of the left factor."""
    return result.numel() * int(args[first].shape[-1])


def _batch_sum(args: Sequence[Any], result: Tensor) -> int:
    """addbmm: products of `[B, N, K]` and `[B, K, M]`, summed over the batch."""
    return result.numel() * int(args[1].shape[0]) * int(args[1].shape[2])


def _convolution(args: Sequence[Any], result: Tensor) -> int:
    """A convolution: each output entry reads one filter; transposed, each input entry is spread by one."""
    inputs, weight, transposed = args[0], args[1], args[6]
    per_entry: int = math.prod(weight.shape[1:])
    entries: int = (inputs if transposed else result).numel()
    return entries * per_entry


def _attention(args: Sequence[Any], result: Any) -> int:
    """Scaled dot products: every query meets every key, and mixes every value."""
    query, key, value = args[:3]
    pairs: int = math.prod(query.shape[:-1]) * int(key.shape[-2])
    return pairs * (int(query.shape[-1]) + int(value.shape[-1]))


def _recurrent(args: Sequence[Any], result: Any) -> int:
    """One direction of one LSTM layer on the CPU: both matrices act at each step of `[T, B, I]` inputs."""
    steps: int = math.prod(args[0].shape[:2])
    matrices: int = args[1].numel() + args[2].numel()
    return steps * matrices


_RULES: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "mm": partial(_matrix, 0),
    "bmm": partial(_matrix, 0),
    "mv": partial(_matrix, 0),
    "dot": partial(_matrix, 0),
    "linear": partial(_matrix, 0),
    "addmm": partial(_matrix, 1),
    "baddbmm": partial(_matrix, 1),
    "addmv": partial(_matrix, 1),
    "addbmm": _batch_sum,
    "convolution": _convolution,
    "mkldnn_rnn_layer": _recurrent,
    "linalg_vector_norm": lambda args, result: 0,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}

# Beginnings of the names of operations that multiply a lot and have no rule. What is neither here nor above
# is elementwise work, or moves data.
_HEAVY = (
    "_cdist", "_convolution", "_cudnn_rnn", "_efficient_attention", "_fft", "_flash", "_int_mm", "_linalg",
    "_native_multi_head", "_scaled", "_sparse", "_thnn", "_transformer", "_trilinear", "_weight_int",
    "cholesky", "cudnn_convolution", "fft", "grid_sampler", "linalg", "matrix_exp", "miopen_convolution",
    "miopen_rnn", "mkldnn_convolution", "mkldnn_linear", "sparse", "triangular_solve",
)  # fmt: skip


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Run attention and recurrent layers as the matrix products they are, not as one fused kernel each."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _own_params(model: nn.Module) -> dict[str, int]:
    """Entries of each module's own parameters; a shared parameter counts where it is first met."""
    seen: set[nn.Parameter] = set()
    counts = {}
    for name, module in model.named_modules():
        own = {parameter for parameter in module.parameters(recurse=False) if parameter not in seen}
        seen |= own
        counts[name] = sum(parameter.numel() for parameter in own)
    return counts


def _bytes(model: nn.Module) -> int:
    """Bytes of what a state dict holds, shared tensors once."""
    saved = model.state_dict(keep_vars=True).values()
    tensors = {id(tensor): tensor for tensor in saved if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
