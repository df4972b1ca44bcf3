"""A compacted network on disk: `model.safetensors` and `architecture.json`, no pickle.

    >>> save_model("out", small.model, replace(small.architecture, builder="lenet5_caffe"))
    >>> model = load_model("out")

The architecture names the builder of the dense network; loading builds that, gives it the compact shapes and
fills in the values. No code is in the files; a builder that is written out as "package.module:function" is called, so
load such files from people that you trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sparsebayes.errors import ModelError, RunError, one_line
from sparsebayes.files import make_folder, write_atomically
from sparsebayes.models import build
from sparsebayes.prune.architecture import Architecture, architecture_of, named_tensors
from sparsebayes.prune.reshaping import reshape_

__all__ = ["ARCHITECTURE_FILE", "WEIGHTS_FILE", "load_model", "save", "save_model"]

WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE_FILE = "architecture.json"


def save(
    model: nn.Module, directory: str | Path, builder: str, options: Mapping[str, object] | None = None
) -> None:
    """Write a network, dense or compacted, so that `sparsebayes.load` reads it back, without pickle.

    To train it further later, wrap what was loaded; an optimizer's `state_dict` fits its parameters again.

    Args:
        model: such as `SparseModel.model`.
        directory: made if absent; files of an earlier save are replaced.
        builder: what makes the dense network: a shipped model's name, or "package.module:function".
        options: what the builder is called with; JSON values only.

    Raises:
        ModelError: a tensor is of a type that cannot be saved, or the options are not JSON.
        RunError: the folder cannot be written.
    """
    save_model(directory, model, architecture_of(model, builder=builder, options=options or {}))


def save_model(directory: str | Path, model: nn.Module, architecture: Architecture) -> None:
    """Write a network so that `load_model` rebuilds it.

    Args:
        directory: made if absent; files of an earlier save are replaced.
        model: dense or compacted.
        architecture: describes it, with the builder of its dense form and the builder's options.

    Raises:
        ModelError: the architecture has no builder, is not that of `model`, or holds options that are not
            JSON.
        RunError: the folder cannot be written.
    """
    if architecture.builder is None:
        raise ModelError(
            "the architecture does not say how the model is built; set its builder to a model name or "
            '"package.module:'
            'function", with dataclasses.replace(architecture, builder=..., options=...)'
        )
    actual = architecture_of(model, builder=architecture.builder, options=architecture.options)
    if actual != architecture:
        raise ModelError(
            f"the architecture is not that of the model: {_first_difference(actual, architecture)}"
        )
    _check_no_extra_state(model)
    # A tensor shared by two modules is listed once, and a copy owns its memory: safetensors refuses shared
    # memory.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors(model).items()
    }
    folder = Path(directory)
    try:
        make_folder(folder)
        write_atomically(folder / WEIGHTS_FILE, safetensors_bytes(tensors))
        write_atomically(folder / ARCHITECTURE_FILE, architecture.to_json())
    except RunError as cause:
        raise RunError(f"cannot write the model to {folder} ({cause}); choose another folder") from cause


def load_model(directory: str | Path) -> nn.Module:
    """Rebuild a network from what `save_model` wrote.

    Args:
        directory: holds the two files.

    Returns:
        The network on the CPU in evaluation mode, with the types and values that were saved.

    Raises:
        RunError: a file is absent, cut short or damaged, or the two do not belong together.
        ModelError: the architecture is not valid, or its builder makes another model today.
    """
    folder = Path(directory)
    path = folder / ARCHITECTURE_FILE
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as cause:
        raise RunError(
            f"cannot read {path}: {cause.strerror}; expected a folder that a run has written"
        ) from cause
    except UnicodeDecodeError as cause:
        raise RunError(f"{path} is not text; the file is damaged: write it again") from cause
    architecture = Architecture.from_json(text, where=str(path))
    if architecture.builder is None:
        raise ModelError(
            f"{path} does not say how the model is built; expected a model name in the field 'builder'"
        )
    tensors = _read(folder / WEIGHTS_FILE, architecture)
    with torch.random.fork_rng(devices=[]):  # the dense network's random weights are overwritten at once
        model = build(architecture.builder, architecture.options)
    reshape_(model, architecture)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(tensors[name])
    for path_of_gather, gather in architecture.gathers.items():
        if tensors[f"{path_of_gather}.columns"].tolist() != list(gather.columns):
            raise RunError(
                f"{folder}: the columns of {path_of_gather!r} differ between {WEIGHTS_FILE} and "
                f"{ARCHITECTURE_FILE}; "
                "the files are of different runs: write both again"
            )
    return model.eval()


def _read(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """Read the tensors, and refuse any that the architecture does not describe."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as cause:
        raise RunError(
            f"cannot read {path}: no such file; expected a folder that a run has written"
        ) from cause
    except (OSError, SafetensorError) as cause:
        raise RunError(f"{path} is damaged or cut short ({one_line(cause)}); write it again") from cause
    if set(tensors) != set(architecture.shapes):
        odd = sorted(set(tensors) ^ set(architecture.shapes))[0]
        where = WEIGHTS_FILE if odd in tensors else ARCHITECTURE_FILE
        raise RunError(f"{path.parent}: only {where} has the tensor {odd!r}; the files are of different runs")
    for name, tensor in tensors.items():
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        stated = (architecture.shapes[name], architecture.dtypes[name])
        if found != stated:
            raise RunError(
                f"{path.parent}: {name!r} is {found[1]} of shape {list(found[0])} in {WEIGHTS_FILE} but "
                f"{stated[1]} of "
                f"shape {list(stated[0])} in {ARCHITECTURE_FILE}; the files are of different runs"
            )
    return tensors


def _first_difference(actual: Architecture, stated: Architecture) -> str:
    for name in sorted({*actual.shapes, *stated.shapes}):
        if actual.shapes.get(name) != stated.shapes.get(name):
            a, s = actual.shapes.get(name), stated.shapes.get(name)
            return f"{name!r} has shape {a and list(a)} in the model and {s and list(s)} in the architecture"
    return "types, groups or gathered columns differ; use architecture_of(model)"


def _check_no_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"{path!r} keeps state that is not a tensor (get_extra_state), which cannot be saved without "
                "pickle; "
                "store it in a buffer"
            )
