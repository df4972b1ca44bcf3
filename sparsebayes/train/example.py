"""One image in the run folder, so that a network is exported where the data are not.

An exporter follows an input through the network; it needs the shape of an image and how its pixels were normalised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from sparsebayes.errors import RunError, one_line
from sparsebayes.files import write_atomically

__all__ = ["EXAMPLE_FILE", "Example", "read_example", "write_example"]

EXAMPLE_FILE = "example.safetensors"


@dataclass(frozen=True)
class Example:
    """What a run's networks take.

    Attributes:
        image: A normalised image of the training set, of shape ``[1, C, H, W]``, on the CPU.
        mean: Of each channel, for pixels scaled to 0..1.
        std: Standard deviation of the same.
    """

    image: Tensor
    mean: Sequence[float]
    std: Sequence[float]


def write_example(folder: Path, example: Example) -> None:
    """Write the example of a run.

    Raises:
        RunError: The folder cannot be written.
    """
    metadata = {"mean": json.dumps(list(example.mean)), "std": json.dumps(list(example.std))}
    tensors = {"image": example.image.detach().cpu().contiguous()}
    write_atomically(folder / EXAMPLE_FILE, safetensors_bytes(tensors, metadata=metadata))


def read_example(folder: Path) -> Example:
    """Read the example of a run.

    Raises:
        RunError: It is missing, damaged or no image.
    """
    path = folder / EXAMPLE_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            image, metadata = file.get_tensor("image"), file.metadata()
        mean, std = ([float(value) for value in json.loads(metadata[key])] for key in ("mean", "std"))
        if image.dim() != 4 or not len(mean) == len(std) == image.shape[1]:
            raise ValueError("no image with a mean and a deviation for each of its channels")
    except FileNotFoundError:
        raise RunError(f"{path} is missing; resume the run, which writes it anew") from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({one_line(error)}); resume the run, which writes it anew"
        ) from None
    return Example(image, mean, std)
