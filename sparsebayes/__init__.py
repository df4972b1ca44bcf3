"""sparsebayes: find out from data which parts of a network are needed, and remove the rest.

    import sparsebayes
    sparse = sparsebayes.wrap(model, groups="units")

Names are imported on first use, so that `import sparsebayes` and the command line's help do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsebayes.api import SparseModel, wrap
    from sparsebayes.curvature import gate_curvature
    from sparsebayes.errors import SparseBayesError
    from sparsebayes.export import export_onnx
    from sparsebayes.export.saved import load_model as load
    from sparsebayes.export.saved import save
    from sparsebayes.groups import Grouping, make_grouping, trace_units
    from sparsebayes.inference import Laplace
    from sparsebayes.prune import Selection, compact, prune_, select

__version__ = "0.1.0"

__all__ = [
    "Grouping",
    "Laplace",
    "Selection",
    "SparseBayesError",
    "SparseModel",
    "compact",
    "export_onnx",
    "gate_curvature",
    "load",
    "make_grouping",
    "prune_",
    "save",
    "select",
    "trace_units",
    "wrap",
]

_HOMES = {
    "Grouping": "groups",
    "Laplace": "inference",
    "Selection": "prune",
    "SparseBayesError": "errors",
    "SparseModel": "api",
    "compact": "prune",
    "export_onnx": "export",
    "gate_curvature": "curvature",
    "load": "export.saved",
    "make_grouping": "groups",
    "prune_": "prune",
    "save": "export.saved",
    "select": "prune",
    "trace_units": "groups",
    "wrap": "api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsebayes' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"sparsebayes.{_HOMES[name]}"), "load_model" if name == "load" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
