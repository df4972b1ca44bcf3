"""torchvision, also beside a PyTorch that its compiled operators were not built for.

>>> import_torchvision().__name__
'torchvision'

The PyTorch of one package index (CPU only) and the torchvision of another are often installed together. Then
torchvision's compiled library does not load, and its import stops at "operator torchvision::nms does not
exist", although data sets and architectures need no such operator. Declaring the missing schemas is enough:
the operators then exist, and complain only when somebody calls them.
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A schema lives as long as the Library object that declared it.
_declared: dict[str, torch.library.Library] = {}


def import_torchvision() -> ModuleType:
    """Import torchvision; declare its missing operators where its compiled library does not load.

    Returns:
        The module `torchvision`. Nothing is declared where the plain import works.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: its import fails for any other reason.
    """
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            match = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if match is None or match[1] not in _SCHEMAS or match[1] in _declared:
                raise
            missing = match[1]
        # What the failed import left behind would make the next one skip what it has to register.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(missing + _SCHEMAS[missing])  # type: ignore[no-untyped-call]
        _declared[missing] = library
