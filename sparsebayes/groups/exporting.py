"""The graph of a model by `torch.export`, with the line of the model's code behind each operation.

    >>> exported(net, torch.zeros(2, 4), train=False)
    Exported(graph of 3 operations)

The line matters where an operation is handed a size (`sparsebayes.groups.written_sizes`), and where a smaller copy of
the model stops with an error (`sparsebayes.groups.trial`): an error has no node, but it has a line.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx.traceback import annotate, preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sparsebayes.networks import copied, in_mode

__all__ = [
    "Exported",
    "Failure",
    "Step",
    "exported",
    "line_of",
    "operation_of",
    "path_of",
    "step_of",
    "training_returns_more",
]

_TORCH = str(Path(torch.__file__).parent)
# Regions that the exporter puts into graphs of their own: ``with torch.no_grad():``, ``with torch.autocast(...):``.
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True, eq=False, repr=False)
class Exported:
    """An exported model.

    Attributes:
        graph: Its graph.
        names: Parameter or buffer behind each placeholder of the graph, by the placeholder's name.
        inputs: Names of the placeholders that are the model's inputs.
        steps: The operations as the code called them; `step_of` leads from a node to its number.
        returned: Shapes of the tensors that the model returns.
    """

    graph: fx.Graph
    names: dict[str, str]
    inputs: frozenset[str]
    steps: tuple[Step, ...]
    returned: tuple[tuple[int, ...], ...]

    @property
    def calls(self) -> list[fx.Node]:
        """The operations in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def __repr__(self) -> str:
        return f"Exported(graph of {len(self.calls)} operations)"


@dataclass(frozen=True, eq=False)
class Failure:
    """Why a model could not be exported.

    Attributes:
        reason: What the exporter or the model said, in one line.
        steps: The operations up to the one that failed.
    """

    reason: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Step:
    """One operation as the model's code called it.

    Attributes:
        name: Its name.
        line: The line that called it: ``"file:line:position in the bytecode"``.
        shapes: Shapes of its results, if it got so far and returned a tensor or several.
    """

    name: str
    line: str
    shapes: tuple[tuple[int, ...], ...] = ()


class _Steps(TorchFunctionMode):
    """Lists the operations that the model's code calls, and writes their numbers on the nodes of the graph.

    The exporter calls torch functions of its own before, between and after the runs of the model; those pass by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.failed: int | None = None
        self.running = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """List operations while this model runs."""

        def begin(_module: nn.Module, _inputs: Any) -> None:
            self.running = True

        def end(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self.running = False

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(begin, prepend=True).remove)
            stack.callback(model.register_forward_hook(end, always_call=True).remove)
            stack.enter_context(self)
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.running:
            return func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        # The position in the bytecode tells apart several calls on one line.
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}:{frame.f_lasti}"
        name = getattr(func, "__name__", str(func))
        number = len(self.steps)
        self.steps.append(Step(name, line))
        try:
            with annotate({"line": line, "step": number}):
                result = func(*args, **(kwargs or {}))
        except Exception:
            # What follows only describes the error.
            self.failed = number if self.failed is None else self.failed
            raise
        results = result if isinstance(result, (tuple, list)) else (result,)
        shapes = tuple(tuple(one.shape) for one in results if isinstance(one, Tensor))
        self.steps[number] = Step(name, line, shapes)
        return result


def line_of(node: fx.Node) -> str:
    """The line that called an operation, ``"file:line:position"``; empty where it is not known."""
    return str((node.meta.get("custom") or {}).get("line", ""))


def step_of(node: fx.Node) -> int:
    """Number of the step that made a node; -1 where it is not known."""
    return int((node.meta.get("custom") or {}).get("step", -1))


def path_of(node: fx.Node) -> str:
    """Path of the innermost module that a node runs in; empty for the model's own forward."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def operation_of(node: fx.Node) -> str:
    """Name of a node's operation without its overload: ``"conv2d"``, or ``"relu_"`` where it works in place."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target))


@contextmanager
def _lean() -> Iterator[None]:
    """Without PyTorch's log of errors, which are told in our words, and without a stack trace for every node."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, traces = logger.disabled, "do_not_emit_stack_traces"
    before = getattr(fx_config, traces, None)  # older versions of PyTorch have no such option
    logger.disabled = True
    if before is not None:
        setattr(fx_config, traces, True)
    try:
        yield
    finally:
        logger.disabled = disabled
        if before is not None:
            setattr(fx_config, traces, before)


def _inline_(module: fx.GraphModule) -> None:
    """Put the operations of regions among those around them."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) not in _REGIONS:
            continue
        rank = next(
            rank for rank, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"
        )
        body = getattr(module, str(node.args[rank].target))
        _inline_(body)
        operands = iter(node.args[rank + 1 :])
        values: dict[fx.Node, Any] = {}
        results: Any = ()
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(operands)
                elif inner.op == "output":
                    results = fx.node.map_arg(inner.args[0], values.get)
                else:
                    values[inner] = graph.node_copy(inner, values.__getitem__)
        for item in list(node.users):
            item.replace_all_uses_with(results[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)


def exported(model: nn.Module, example: Tensor, *, train: bool) -> Exported | Failure:
    """Export a model in one mode; its own mode, gradients and the random state are as before afterwards.

    Args:
        model: Any model of one tensor.
        example: An input, ``[B, ...]``. One image is doubled for training mode.
        train: Whether to export it in training mode.
    """
    example = _two_at_least(example) if train else example
    record = _Steps()
    with (
        in_mode(model, train=train),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        torch.enable_grad(),
    ):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            with preserve_node_meta(), _lean(), record.watching(model):
                program = torch.export.export(model, (example,), strict=False)
        except Exception as error:  # the exporter raises what the model raises, which can be anything
            stop = len(record.steps) if record.failed is None else record.failed + 1
            texts = [text.strip() for text in str(error).splitlines() if text.strip()]
            return Failure(
                (texts[0] if texts else type(error).__name__).rstrip("."), tuple(record.steps[:stop])
            )
    _inline_(program.graph_module)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    results = [
        one
        for one in program.graph.output_node().args[0]
        if getattr(one, "name", "") in signature.user_outputs
    ]
    returned = tuple(tuple(one.meta["val"].shape) for one in results if isinstance(one.meta["val"], Tensor))
    return Exported(program.graph, names, frozenset(signature.user_inputs), tuple(record.steps), returned)


def training_returns_more(model: nn.Module, example: Tensor, evaluation: Exported) -> bool:
    """Whether a model returns other tensors in training mode: in number, or in shape but for the batch.

    Far cheaper than an export: a copy runs once, on tensors without values. False if that fails.

    Args:
        model: Any model of one tensor.
        example: An input, ``[B, ...]``.
        evaluation: What `exported` made of both.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            memo = {id(t): fake.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
            with fake:
                returned = copied(model, memo).train()(_two_at_least(fake.from_tensor(example)))
    except Exception:  # the model's own, as in `exported`
        return False
    shapes = [tuple(one.shape) for one in tree_leaves(returned) if isinstance(one, Tensor)]
    return [shape[1:] for shape in shapes] != [shape[1:] for shape in evaluation.returned]


def _two_at_least(example: Tensor) -> Tensor:
    """One image doubled: batch norm refuses to train on one value per channel."""
    return torch.cat([example, example]) if len(example) == 1 else example
