"""The errors a user can meet, and the sentence for a name nobody knows.

Every message is one sentence: what was expected, what came, what to do. The command line prints `str(error)`
and exits with status 2, so a user never reads a traceback for a mistake in a recipe, a path, a file or a
model's shape.

    >>> unknown("model", "lenet5", ["lenet5_caffe", "lenet_300_100"])
    "unknown model 'lenet5'; did you mean 'lenet5_caffe'? Choices: lenet5_caffe, lenet_300_100"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "GroupingError",
    "ModelError",
    "NumericsError",
    "RecipeError",
    "RunError",
    "SparseBayesError",
    "Terminated",
    "one_line",
    "unknown",
]


class SparseBayesError(Exception):
    """Root of every error that this package raises on purpose."""


class RecipeError(SparseBayesError):
    """A recipe, an override or an option says something that cannot be carried out."""


class DataError(SparseBayesError):
    """A data set is absent, damaged, of the wrong shape, or cannot be downloaded."""


class ModelError(SparseBayesError):
    """A model cannot be built, traced, compacted or measured."""


class NumericsError(SparseBayesError):
    """A quantity that must be finite, or positive, is not."""


class RunError(SparseBayesError):
    """A run folder, a checkpoint or an exported file cannot be read or written."""


class GroupingError(SparseBayesError):
    """A grouping is unknown, matches nothing, or does not fit the model."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C: what is open is closed, and the run can be resumed."""


def one_line(text: object, limit: int = 300) -> str:
    """Another program's message as part of a sentence: one line, printable, not too long, no full stop.

    Args:
        text: the message, or the error that carries it.
        limit: characters at most.

    Returns:
        The text; "no message" where there is none.
    """
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return (flat if len(flat) <= limit else flat[: limit - 3] + "...").rstrip(".") or "no message"


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Write the message for a name that is not in a table.

    Args:
        kind: what the name should have been, in the singular ("model", "data source", "rule").
        name: what the user typed.
        choices: the names that exist; listed in sorted order.

    Returns:
        One line that names the nearest choice, if one is near, and then all choices ("none" where there are
        none).
    """
    known = sorted(choices)
    # A name that was not typed to its end is nearer than one of equal length with other letters.
    begun = [choice for choice in known if len(name) > 2 and choice.startswith(name)]
    nearest = begun or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {kind} {name!r}{hint} Choices: {', '.join(known) or 'none'}"
