"""Records where a forward pass uses the parameters of interest: the one mechanism behind all fast paths.

A torch function mode sees the torch functions that a forward pass calls, with their arguments. Where
`linear`, `conv*d`, `batch_norm` or `layer_norm` gets a parameter of interest, the call is recorded with its input, its
output and the places in the autograd graph where their gradients will arrive; where an activation is multiplied
by a switch, so is the product. So a module called twice yields
two records, a parameter used without a module one like any other, and nothing depends on module types.

The autograd graph is then the witness that nothing was missed: it counts every use of a parameter that the
outputs depend on. Where the records do not account for all of them (another function read it, or a scripted
module, which runs unseen), where a call does not keep the images apart along its first dim, or where its
input was overwritten later, the parameter is `untracked`, and its derivatives come from `fallback.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, final

import torch
from torch import Tensor, conv1d, conv2d, conv3d, is_grad_enabled, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsebayes.curvature.adjoint import convolve, gains, max_pool, normalise
from sparsebayes.curvature.kernels import Geometry
from sparsebayes.curvature.layers import Call, ConvCall, LayerNormCall, LinearCall, NormCall
from sparsebayes.curvature.scaling import Scaling, is_made_of, scale
from sparsebayes.curvature.squares import at_least_float32
from sparsebayes.errors import ModelError

__all__ = ["Capture"]


@final
class Capture(TorchFunctionMode):
    """Records the calls that use some of a model's parameters, while it is entered.

    Args:
        parameters: the parameters of interest by name; they must require gradients.
        by_column: names of those that will be asked for `Call.columns`, which costs the input's gradient.
        switches: names of those that multiply activations.
        overwritten: names of weights whose layers' outputs are changed in place later, and are needed as they were.
        not_looked_up: names of weights that an embedding shares with a layer, of which only the layer's use counts.

    Attributes:
        calls: the records of layers, in the order of the calls.
        scalings: the records of products with switches, likewise.

    Raises:
        ModelError: while entered, if a batch norm uses the statistics of the batch: its images are coupled,
            and a per-image derivative does not exist.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        by_column: frozenset[str],
        switches: frozenset[str] = frozenset(),
        overwritten: Set[str] = frozenset(),
        not_looked_up: Set[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.scalings: list[Scaling] = []
        self._switches = frozenset(get_gradient_edge(parameters[name]).node for name in switches)
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._by_column = by_column
        self._overwritten = overwritten
        self._not_looked_up = not_looked_up

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record or run one torch function; called by torch."""
        keywords = kwargs or {}
        if func in (functional.batch_norm, functional.layer_norm):
            norm = self._batch_norm if func is functional.batch_norm else self._layer_norm
            return norm(*args, **keywords)
        # Without gradients the call is a constant to autograd; inside a custom autograd function, whose own
        # backward decides what the parameter's gradient is, gradients are off as well.
        if is_grad_enabled():
            if func is functional.linear:
                return self._linear(*args, **keywords)
            if func in _CONVOLUTIONS:
                return self._conv(func, *args, **keywords)
            if func in _LOOKUPS and self._not_looked_up and len(args) > 1:
                position = _LOOKUPS[func]
                if self._names.get(id(args[position])) in self._not_looked_up:
                    args = (*args[:position], args[position].detach(), *args[position + 1 :])
            if func in _MAX_POOLS and args:
                return _max_pool(func, args, keywords)
            if self._switches and func in _PRODUCTS and len(args) == 2 and not keywords and not _recomputed():
                return self._product(func, *args)
        return func(*args, **keywords)

    def untracked(self, outputs: Tensor, num_images: int) -> set[str]:
        """Find the parameters that the records do not explain; call it after the forward pass.

        Args:
            outputs: what the network returned.
            num_images: images in the batch.

        Returns:
            Names of parameters.
        """
        accumulators = {get_gradient_edge(p).node: name for name, p in self._parameters.items()}
        reached, uses = _walk(outputs.grad_fn, accumulators)
        found: set[str] = set()
        for call in self.calls:
            names = {name for name in (call.weight, call.bias) if name is not None}
            if call.output_edge.node not in reached:
                continue
            uses.subtract(names)
            apart = call.input.ndim > 1 and len(call.input) == len(call.output) == num_images
            if not (apart and call.input_intact):
                found |= names
        return found | {name for name, count in uses.items() if count != 0}

    def calls_of(self, name: str) -> list[Call]:
        """The calls that use a parameter; none if it was not used at all."""
        return [call for call in self.calls if name in (call.weight, call.bias)]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return functional.linear(x, weight, bias)

        if weight.ndim != 2 or (bias is not None and bias.ndim != 1):  # broadcasts in ways of its own
            return run(input)
        return self._record(LinearCall, run, input, weight, bias, {})

    def _conv(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return func(x, weight, bias, stride, padding, dilation, groups)

        if input.ndim != weight.ndim:  # a single image, without a batch dim
            return run(input)
        kernel = weight.shape[2:]
        dilations = _per_dim(dilation, len(kernel))
        geometry = Geometry(
            tuple(weight.shape),
            _per_dim(stride, len(kernel)),
            _paddings(padding, kernel, dilations),
            dilations,
            groups,
        )
        frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
        if frozen and gains(input, geometry) and _ordinary(input):
            return convolve(input, weight, bias, geometry)
        return self._record(ConvCall, run, input, weight, bias, {"geometry": geometry})

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training or running_mean is None or running_var is None:
            raise ModelError(
                "expected a network whose images do not influence each other in evaluation mode, got a batch "
                "norm that uses the statistics of the batch; give it running statistics "
                "(track_running_stats=True)"
            )

        def run(x: Tensor) -> Tensor:
            rate = 0.0 if momentum is None else momentum
            return functional.batch_norm(x, running_mean, running_var, weight, bias, False, rate, eps)

        if not is_grad_enabled():
            return run(input)
        frozen = not any(one is not None and one.requires_grad for one in (weight, bias))
        if frozen and input.requires_grad and input.ndim > 1 and _ordinary(input):
            return normalise(run, input, running_var, weight, eps)
        if weight is None:
            return run(input)
        statistics = {
            "mean": at_least_float32(running_mean),
            "inverse_std": (at_least_float32(running_var) + eps).rsqrt(),
        }
        return self._record(NormCall, run, input, weight, bias, statistics)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return functional.layer_norm(x, normalized_shape, weight, bias, eps)

        # Over all dims, the first one included, it would mix the images.
        if weight is None or input.ndim <= len(normalized_shape) or not is_grad_enabled():
            return run(input)
        return self._record(LayerNormCall, run, input, weight, bias, {"eps": eps})

    def _product(self, func: Callable[..., Tensor], first: Any, second: Any) -> Tensor:
        for factor, other in ((first, second), (second, first)):
            # A factor without a dim of the images, which comes first, is the same for all of them.
            if (
                isinstance(factor, Tensor)
                and isinstance(other, Tensor)
                and factor.requires_grad
                and other.ndim > 1
                and (factor.ndim < other.ndim or (factor.ndim == other.ndim and len(factor) == 1))
                and _spreads(factor.shape, other.shape)
                and factor.dtype == other.dtype
                and is_made_of(factor, self._switches)
            ):
                product, scaling = scale(first, second, factor is second)
                self.scalings.append(scaling)
                return product
        return func(first, second)

    def _record(
        self,
        kind: type[Call],
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        details: Mapping[str, Any],
    ) -> Tensor:
        """Run a layer; if it uses a parameter of interest, keep what its derivatives need."""
        name, bias_name = self._names.get(id(weight)), self._names.get(id(bias))
        if name is None and bias_name is None:
            return run(x)
        columns = name in self._by_column
        if columns:
            # A name of its own in the graph: the input may have other readers, whose gradients must not be
            # added.
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        y = run(x)
        kept = y.detach().clone() if name in self._overwritten else y
        call = kind(
            weight=name,
            bias=bias_name,
            values={"weight": weight} if bias is None else {"weight": weight, "bias": bias},
            input=x,
            output=kept,
            input_edge=get_gradient_edge(x) if columns else None,
            output_edge=get_gradient_edge(y),
            versions=(x._version, kept._version),
            **details,
        )
        self.calls.append(call)
        return y


_CONVOLUTIONS = frozenset({conv1d, conv2d, conv3d})
_LOOKUPS = {functional.embedding: 1, torch.embedding: 0}  # where the weight stands
_MAX_POOLS = frozenset({torch.max_pool2d, functional.max_pool2d})  # modules call the second
_PRODUCTS = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__})


def _recomputed() -> bool:
    """Whether what runs now may be run again in the backward pass, unseen, and must then save the same tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _max_pool(func: Callable[..., Tensor], args: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    x = args[0]
    if (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.float64)
        and x.requires_grad
        and x.is_contiguous()
        and _ordinary(x)
        and len(args) < 7  # the seventh asks for the places of the maxima
        and not keywords.get("return_indices", False)
    ):
        named = {name: value for name, value in keywords.items() if name != "return_indices"}
        if named.get("stride", 0) is None:
            del named["stride"]
        return max_pool(x, [[] if value is None else value for value in args[1:]], named)
    return func(*args, **keywords)


def _ordinary(x: Tensor) -> bool:
    """Whether an autograd function of our own may read a tensor: not recomputed, not in a `torch.func` transform."""
    return not _recomputed() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _spreads(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a factor of a shape can be spread over a tensor without making it larger."""
    return all(size in (1, wide) for size, wide in zip(reversed(shape), reversed(target), strict=False))


def _walk(start: Node | None, accumulators: Mapping[Node, str]) -> tuple[set[Node], Counter[str]]:
    """Visit an autograd graph.

    Args:
        start: node of the outputs; None if they depend on no parameter of interest.
        accumulators: the node at which each parameter's gradient arrives -> its name.

    Returns:
        The nodes that are reached, and how many of their edges lead to each parameter.
    """
    reached: set[Node] = set()
    uses: Counter[str] = Counter()
    waiting = [] if start is None else [start]
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following in accumulators:
                uses[accumulators[following]] += 1
            else:
                waiting.append(following)
    return reached, uses


def _per_dim(size: int | Sequence[int], num_dims: int) -> tuple[int, ...]:
    """A convolution's option, one number per spatial dim."""
    if isinstance(size, int):
        return (size,) * num_dims
    return tuple(size) * num_dims if len(size) == 1 else tuple(size)


def _paddings(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Zeros in front and behind, per spatial dim; "same" puts the odd one behind."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if isinstance(padding, str):
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _per_dim(padding, len(kernel)))
