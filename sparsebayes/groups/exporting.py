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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import annotate, preserve_node_meta
from torch.overrides import TorchFunctionMode

__all__ = ["Exported", "Failure", "Step", "exported", "line_of", "mode", "step_of"]

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False, repr=False)
class Exported:
    """An exported model.

    Attributes:
        graph: Its graph.
        names: Parameter or buffer behind each placeholder of the graph, by the placeholder's name.
        steps: The operations as the code called them; `step_of` leads from a node to its number.
    """

    graph: fx.Graph
    names: dict[str, str]
    steps: tuple[Step, ...]

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
        shape: Shape of its result, if that is one tensor.
    """

    name: str
    line: str
    shape: tuple[int, ...] | None


class _Steps(TorchFunctionMode):
    """Lists the operations that the model's code calls, and writes their numbers on the nodes of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.failed: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        # The position in the bytecode tells apart several calls on one line.
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}:{frame.f_lasti}"
        name = getattr(func, "__name__", str(func))
        number = len(self.steps)
        self.steps.append(Step(name, line, None))
        try:
            with annotate({"line": line, "step": number}):
                result = func(*args, **(kwargs or {}))
        except Exception:
            # What follows only describes the error.
            self.failed = number if self.failed is None else self.failed
            raise
        if isinstance(result, Tensor):
            self.steps[number] = Step(name, line, tuple(result.shape))
        return result


def line_of(node: fx.Node) -> str:
    """The line that called an operation, ``"file:line:position"``; empty where it is not known."""
    return str((node.meta.get("custom") or {}).get("line", ""))


def step_of(node: fx.Node) -> int:
    """Number of the step that made a node; -1 where it is not known."""
    return int((node.meta.get("custom") or {}).get("step", -1))


@contextmanager
def _silent() -> Iterator[None]:
    """Without PyTorch's log of errors, which are caught and told in our words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Put the model into one mode, and each module and the random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    model.train(train)
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        for module, training in modes:
            module.training = training


def exported(model: nn.Module, example: Tensor, *, train: bool) -> Exported | Failure:
    """Export a model in one mode; its own mode, gradients and the random state are as before afterwards.

    Args:
        model: Any model of one tensor.
        example: An input, ``[B, ...]``.
        train: Whether to export it in training mode.
    """
    record = _Steps()
    with mode(model, train=train), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            with preserve_node_meta(), _silent(), record:
                program = torch.export.export(model, (example,), strict=False)
        except Exception as error:  # the exporter raises what the model raises, which can be anything
            stop = len(record.steps) if record.failed is None else record.failed + 1
            texts = [text.strip() for text in str(error).splitlines() if text.strip()]
            return Failure(
                (texts[0] if texts else type(error).__name__).rstrip("."), tuple(record.steps[:stop])
            )
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return Exported(program.graph, names, tuple(record.steps))
