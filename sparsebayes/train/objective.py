"""What a training step computes: the forward pass in the recipe's precision and layout, and the loss.

It needs little more than PyTorch itself, so that a few steps can be timed without loading all that trains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.recipe.schema import TrainSection

__all__ = ["SoftTargets", "fast_layout_", "objective", "soft_targets", "training_forward"]

SoftTargets = Callable[[Tensor, Tensor], Tensor]
"""From the positions of a batch's images in their set, ``[B]``, and the images as augmented, to logits ``[B, C]``."""


def training_forward(model: nn.Module, settings: TrainSection) -> Callable[[Tensor], Tensor]:
    """The model's forward pass as the recipe wants it in training.

    Compiling forgets what was compiled before: PyTorch keeps a few programs for each function of the code, and beyond
    those would run the networks of later cycles uncompiled.

    Args:
        model: The network; a compiled one shares its parameters.
        settings: `precision` and `compile`.

    Returns:
        Maps images of shape ``[B, ...]`` to logits of shape ``[B, C]``, in float32 whatever the precision within.
    """
    device = next(model.parameters()).device.type
    run: Callable[[Tensor], Tensor] = model
    if settings.compile:
        torch.compiler.reset()
        run = torch.compile(model)
    if not _in_bfloat16(settings, device):
        return run

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = run(images)
        return logits.float()

    return forward


def fast_layout_(model: nn.Module) -> nn.Module:
    """Store convolution weights channels-last: activations follow, and values do not change.

    On CPUs it is up to 1.5 times as fast; on GPUs it is the layout of the tensor cores. Networks on a CPU that have a
    strided pointwise convolution of fewer than `LEAST_CHANNELS` channels get the ordinary layout.

    Returns:
        The model itself.
    """
    stalls = any(_stalls(module) for module in model.modules())
    layout = torch.contiguous_format if stalls else torch.channels_last
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                # A copy: the strides of 1x1 filters may speak of either layout, and `contiguous` leaves them.
                parameter.data = parameter.data.clone(memory_format=layout)
    return model


LEAST_CHANNELS = 8
"""Below, PyTorch 2.13's backward pass of a strided pointwise convolution in channels-last layout hangs or crashes on
processors without AVX-512."""


def _stalls(module: nn.Module) -> bool:
    """Whether this layer must not meet the channels-last layout."""
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.device.type == "cpu"
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < LEAST_CHANNELS
    )


def objective(logits: Tensor, labels: Tensor, soft: Tensor | None, settings: TrainSection) -> Tensor:
    """Mean training loss of a batch: cross-entropy, mixed with the dense network's soft targets.

    The soft part is ``tau * KL(teacher || student)`` of both logits divided by the temperature tau; the factor tau
    keeps its gradient's size independent of tau where the two nearly agree (Hinton, Vinyals and Dean 2015, section
    2.1, whose factor tau^2 counts the gradient with respect to the divided logits).

    Args:
        logits: Of shape ``[B, C]``.
        labels: int64 of shape ``[B]``.
        soft: The dense network's logits, of shape ``[B, C]``; None: labels only.
        settings: `distill`, `distill_temperature` and `label_smoothing`.

    Returns:
        Nats per image, a scalar.
    """
    hard = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    if soft is None or settings.distill == 0:
        return hard
    tau = settings.distill_temperature
    divergence = F.kl_div(
        F.log_softmax(logits / tau, 1), F.log_softmax(soft / tau, 1), log_target=True, reduction="batchmean"
    )
    return (1 - settings.distill) * hard + settings.distill * tau * divergence


def soft_targets(teacher: Tensor | nn.Module, settings: TrainSection) -> SoftTargets:
    """Where a step finds the logits that it learns from.

    Args:
        teacher: Logits of every training image, of shape ``[N, C]``; or a network, which is asked for each batch in
            evaluation mode, without gradients.
        settings: `precision` of a network's passes.
    """
    if isinstance(teacher, Tensor):
        return lambda positions, images: teacher[positions]
    # Compiled anew for each phase, a forward pass would take longer to compile than it saves.
    forward = training_forward(teacher.eval(), settings.model_copy(update={"compile": False}))

    def ask(positions: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(images)

    return ask


def _in_bfloat16(settings: TrainSection, device: str) -> bool:
    """Whether training passes run in bfloat16: asked for, or left to a device that computes in it."""
    if settings.precision == "auto":
        return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return settings.precision == "bfloat16"
