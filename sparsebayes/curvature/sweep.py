"""Runs a network over images and its backward passes, and hands out per-image derivatives block by block.

What happens to each block of n images: one forward pass under `Capture`, K backward passes that compute
gradients of activations only, and then per-image derivatives of the parameters, from the records where they
explain a parameter completely and from `fallback.py` where they do not. Nothing of the caller's is changed:
mode, requires_grad, .grad and random states are as before when `Sweep` is left, also after an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import final

import torch
from torch import Tensor, nn

from sparsebayes.curvature.block import Block
from sparsebayes.curvature.capture import Capture
from sparsebayes.curvature.factors import Starts
from sparsebayes.curvature.images import (
    Batches,
    check_num_images,
    check_targets,
    first_images,
    pools,
    warn_of_augmentation,
)
from sparsebayes.curvature.importance import choose, curvature_traces, inclusion
from sparsebayes.curvature.layers import Call
from sparsebayes.curvature.scaling import Scaling
from sparsebayes.errors import DataError, GroupingError, ModelError, NumericsError, RecipeError
from sparsebayes.networks import as_input

__all__ = ["Sweep"]

# Images times backward passes of one block. Large enough to keep matrix products busy, small enough that a
# block of activations and their gradients needs no more memory than an ordinary training step.
_BLOCK_ROWS = 256
# Numbers in the recorded activations of a block, on a processor: what a shared cache and an allocator's arena hold.
# Larger blocks spend a third of their time on fresh pages. At least so many images are taken nonetheless.
_BLOCK_NUMBERS, _BLOCK_IMAGES = 1 << 24, 16

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@final
class Sweep:
    """A network prepared for per-image derivatives, while it is entered.

    Args:
        model: the network f; its outputs are logits of shape `[n, C]`.
        names: the parameters of interest.
        by_column: those of them that `Block.columns` will be asked for.
        by_row: those of them that `Block.rows` will be asked for.
        switches: those of them that multiply activations.
        not_looked_up: those of them that an embedding shares with a layer, of which only the layer's use counts.
        starts: logits -> starting vectors; names the likelihood that the targets must fit.
        importance: share of the images that get a backward pass, see `importance.py`; 1: all.

    Attributes:
        num_images: how many images were looked at so far, with or without a backward pass.
        complete: whether the blocks so far speak of all of them; a pool of images may be handed out in several.

    Raises:
        GroupingError: the model has no parameter of a name.
        ModelError: a parameter is not of a floating-point type, or there is none of interest.
        RecipeError: `importance` is not above 0 and at most 1.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        *,
        by_column: Iterable[str] = (),
        by_row: Iterable[str] = (),
        switches: Iterable[str] = (),
        not_looked_up: Iterable[str] = (),
        starts: Starts,
        importance: float = 1.0,
    ) -> None:
        if not 0 < importance <= 1:
            raise RecipeError(
                f"expected a share of the images above 0 and at most 1, got importance={importance:g}"
            )
        known = dict(model.named_parameters())
        self._parameters: dict[str, nn.Parameter] = {}
        for name in dict.fromkeys(names):
            if name not in known:
                raise GroupingError(
                    f"expected a parameter of the model, got {name!r}; it has {sorted(known)}"
                )
            if known[name].dtype not in _FLOATS:
                raise ModelError(
                    f"curvature needs float16, bfloat16, float32 or float64 parameters, got {known[name].dtype} "
                    f"in {name!r}; convert a copy of the model with .float()"
                )
            self._parameters[name] = known[name]
        if not self._parameters:
            raise ModelError("expected at least one parameter to compute the curvature of, got none")
        self._model = model
        self._by_column = frozenset(by_column)
        self._by_row = frozenset(by_row)
        self._overwritten: set[str] = set()  # weights whose outputs are changed in place after the layer
        self._switches = frozenset(switches)
        self._not_looked_up = frozenset(not_looked_up)
        self._signature: list[tuple[torch.Size, torch.Size]] = []
        self._starts = starts
        self._importance = importance
        self._generator = torch.Generator().manual_seed(starts.seed ^ 0x5DEECE66D)  # of the choice of images
        self.num_images = 0
        self.complete = True
        self._mixed: set[str] = set()  # parameters whose uses some batch showed not to keep the images apart
        self._sizes: set[int] = set()  # of the batches that were looked at
        self._few: Tensor | None = None  # outputs for the first images, until they have been compared
        self._size = 1
        self._stack = ExitStack()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of interest by name, without gradients."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self._parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of the parameters of interest, at least float32."""
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters.values())
        return torch.float64 if wide else torch.float32

    def __enter__(self) -> Sweep:
        with ExitStack() as stack:
            devices = [self.device.index or 0] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if "torch._dynamo" in sys.modules:
                # A compiled network calls no torch function that could be recorded.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self._model.modules():
                stack.callback(setattr, module, "training", module.training)
            for name, parameter in self._model.named_parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                if parameter.is_floating_point():
                    parameter.requires_grad_(name in self._parameters)
            self._model.eval()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def blocks(self, batches: Batches, num_images: int | None) -> Iterator[Block]:
        """Run over the images.

        Args:
            batches: pairs of images `[B, ...]` and targets (class numbers `[B]` for the cross-entropy, else
                `[B, C]`).
            num_images: stop after so many images; None: use all.

        Yields:
            One block after the other, images in order; it is valid until the next one is asked for.

        Raises:
            DataError: there are no images, or targets that do not fit the outputs.
            ModelError: outputs are not of shape `[n, C]`, or an image's outputs depend on its neighbours.
            NumericsError: outputs are not finite.
            RecipeError: `num_images` is below 1.
        """
        check_num_images(num_images)
        warn_of_augmentation(batches)
        if self._importance < 1:
            yield from self._important_blocks(first_images(batches, num_images))
        else:
            for x, y in first_images(batches, num_images):
                size = self._look(x)
                for start in range(0, len(x), size):
                    part_x = x[start : start + size]
                    first = self.num_images
                    self.num_images += len(part_x)
                    block = self._block(part_x, y[start : start + size], first)
                    yield block
                    block.release()  # before the next one is made
        if self.num_images == 0:
            raise DataError("expected at least one image to compute the curvature from, got none")

    def _important_blocks(self, batches: Batches) -> Iterator[Block]:
        """Blocks of the images that are worth it, pool by pool."""
        for x, y in pools(batches):
            size = self._look(x)
            first = self.num_images
            self.num_images += len(x)
            logits = []
            with torch.no_grad():
                for start in range(0, len(x), _BLOCK_ROWS):
                    part = slice(start, start + _BLOCK_ROWS)
                    found = self._model(self.ready(x[part]))
                    self._check(found, y[part], first + start)
                    self._compare(found)
                    logits.append(found.cpu())
            traces = curvature_traces(torch.cat(logits), self._starts.likelihood)
            chances = inclusion(traces, self._importance)
            chosen = choose(chances, float(torch.rand((), generator=self._generator)))
            for start in range(0, len(chosen), size):  # none, where a small pool keeps no image
                some = chosen[start : start + size]
                there = some.to(x.device)
                block = self._block(x[there], y[some.to(y.device)], first, chances[some])
                self.complete = start + size >= len(chosen)
                yield block
                block.release()

    def _look(self, x: Tensor) -> int:
        """Look at the network when the first images come; how many images make a block."""
        if not self._sizes:
            capture, self._few = self._examine(self.ready(x), 2)
            passes = max(self._starts.num_passes(self._few.shape[1]), 1)
            self._size = max(1, _BLOCK_ROWS // passes)
            if self.device.type == "cpu":
                # Of the two images; not all that is recorded need have images for its first dim.
                recorded = [call.output for call in capture.calls] + [one.input for one in capture.scalings]
                numbers = passes * sum(one.numel() for one in recorded) // 2
                self._size = min(self._size, max(_BLOCK_IMAGES, _BLOCK_NUMBERS // max(numbers, 1)))
        return self._size

    def ready(self, x: Tensor) -> Tensor:
        """Images on the parameters' device, such that autograd takes them."""
        x = as_input(self._model, x)
        return x.clone() if x.is_inference() else x  # autograd refuses what was made in inference mode

    def _block(self, x: Tensor, y: Tensor, first: int, chances: Tensor | None = None) -> Block:
        """Differentiate images, the first of which has the number `first`, each kept with its chance."""
        x = self.ready(x)
        capture, logits = self._forward(x)
        self._check(logits, y, first)
        self._compare(logits)
        untracked = self._note(capture, logits)
        if len(self._sizes) == 1:  # another number of images has to be seen
            _, self._few = self._examine(x, len(x) + 1)
            self._compare(logits)
            untracked |= self._mixed
        v = self._starts(logits.detach())
        if chances is not None:
            v = v * chances.to(v.device).rsqrt().to(v.dtype).unsqueeze(1)
        scale = None
        if logits.dtype == torch.float16:
            # Its numbers end at 6e-8: a sure image's gradients would vanish. All start at 1, and are scaled back.
            scale = v.abs().amax(-1)  # [K, n]
            v = v / scale.where(scale > 0, 1.0).unsqueeze(-1)
        v = v.to(logits.dtype)
        calls = [call for call in capture.calls if {call.weight, call.bias} - untracked - {None}]
        _backward(logits, v, calls, [] if self._switches <= untracked else capture.scalings)
        for call in calls:
            call.scale = scale
        return Block(self._model, x, v, capture, untracked, scale)

    def _check(self, logits: Tensor, y: Tensor, first: int) -> None:
        check_targets(logits, y, self._starts.likelihood)
        if not bool(torch.isfinite(logits).all()):
            bad = int((~torch.isfinite(logits)).any(1).nonzero()[0])
            raise NumericsError(
                f"expected finite network outputs, got nan or inf for image {first + bad}; check the "
                "weights and the inputs"
            )

    def _misread(self, capture: Capture, num_images: int) -> set[str]:
        """The switches, if the products found are not the same for every number of images.

        A tensor whose first dim happens to be as long as the batch passes for an activation.
        """
        intact = all(one.input_intact and len(one.input) == num_images for one in capture.scalings)
        same = [scaling.signature for scaling in capture.scalings] == self._signature
        return set() if intact and same else set(self._switches)

    def _forward(self, x: Tensor) -> tuple[Capture, Tensor]:
        with Capture(
            self._parameters, self._by_column, self._switches, self._overwritten, self._not_looked_up
        ) as capture:
            logits = self._model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"expected network outputs (logits) of shape [{len(x)}, classes], got {got}")
        return capture, logits

    def _examine(self, x: Tensor, count: int) -> tuple[Capture, Tensor]:
        """Run a few images in a batch of a given size.

        Args:
            x: images, of shape `[B, ...]`; the first `count` are used, the same ones again where there are fewer.
            count: how many.

        Returns:
            What was recorded; the outputs, of shape `[count, C]`.
        """
        capture, logits = self._forward(x[torch.arange(count, device=x.device) % len(x)])
        if not self._sizes:
            changed = {call.weight for call in capture.calls if not call.output_intact} - {None}
            self._overwritten = {name for name in changed if name in self._by_row}
            self._signature = [scaling.signature for scaling in capture.scalings]
        self._note(capture, logits)
        return capture, logits.detach()

    def _note(self, capture: Capture, logits: Tensor) -> set[str]:
        """The parameters that the records of a batch, or of a batch of another size before, do not explain.

        A sequence length that happens to equal the batch size would pass for the dim of the images; it does not
        follow the batch size.
        """
        found = capture.untracked(logits, len(logits)) | self._misread(capture, len(logits))
        if len(logits) not in self._sizes:
            self._mixed |= found
            self._sizes.add(len(logits))
        return found | self._mixed

    def _compare(self, logits: Tensor) -> None:
        """Refuse outputs that change with the company an image is in: they have no per-image derivatives.

        Args:
            logits: outputs of the first images, of shape `[B, C]`.
        """
        if self._few is None:
            return
        few, self._few = self._few[: len(logits)], None
        difference = float((logits[: len(few)] - few).detach().abs().max())
        # Room for kernels that are chosen by batch size and round differently, TF32 included.
        if difference > 1e-2 * float(logits.detach().abs().max()):
            raise ModelError(
                "expected a network whose outputs for an image do not depend on the other images of the "
                "batch, nor on chance, in evaluation mode; outputs for one image differ by "
                f"{difference:.3g} between two batches"
            )


def _backward(logits: Tensor, v: Tensor, calls: list[Call], scalings: list[Scaling]) -> None:
    """Fill in the calls' gradients, of shape `[K, n, ...]`, and the scalings' derivatives."""
    edges = [call.output_edge for call in calls]
    edges += [call.input_edge for call in calls if call.input_edge is not None]
    num_kept = len(edges)
    edges += [scaling.edge for scaling in scalings]
    if not edges:
        return
    passes: list[tuple[Tensor | None, ...]] = []
    for k, start in enumerate(v):
        gradients: tuple[Tensor | None, ...] = (None,) * len(edges)
        if logits.requires_grad:  # else the outputs are cut off from every parameter of interest
            gradients = torch.autograd.grad(
                logits, edges, start, retain_graph=k + 1 < len(v), allow_unused=True
            )
        # Used up at once: all passes' gradients of all activations would be K times a training step's memory.
        for scaling, gradient in zip(scalings, gradients[num_kept:], strict=True):
            scaling.add_pass(gradient)
        passes.append(gradients[:num_kept])
    stacks = iter([_stack([one[i] for one in passes]) for i in range(num_kept)])
    for call in calls:
        call.output_grad = _or_zeros(next(stacks), call.output, len(v))
    for call in calls:
        if call.input_edge is not None:
            call.input_grad = _or_zeros(next(stacks), call.input, len(v))


def _stack(gradients: list[Tensor | None]) -> Tensor | None:
    """One gradient per pass -> `[K, ...]`; None if the outputs do not depend on this place."""
    known = [gradient for gradient in gradients if gradient is not None]
    if not known:
        return None
    return known[0].unsqueeze(0) if len(known) == 1 else torch.stack(known)


def _or_zeros(gradient: Tensor | None, like: Tensor, num_passes: int) -> Tensor:
    return like.new_zeros(1).expand(num_passes, *like.shape) if gradient is None else gradient
