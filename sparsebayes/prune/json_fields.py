"""Reading a JSON document field by field, with one clear sentence for whatever is wrong.

    >>> document = parse('{"version": 1}', where="selection.json", error=RunError)
    >>> document.integer("version", low=1)
    1
    >>> document.text("name")
    Traceback (most recent call last):
        ...
    sparsebayes.errors.RunError: selection.json lacks the field 'name'; write the file again

Files are written by this package but edited, cut short and mixed up by people, so nothing in them is taken on
trust.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass

from sparsebayes.errors import RunError, SparseBayesError, unknown

__all__ = ["Fields", "parse"]


@dataclass(frozen=True)
class Fields:
    """One JSON object, read with types checked.

    Args:
        values: the object.
        where: names it in messages ("selection.json", "layer 'fc1' of selection.json").
        error: what is raised.
    """

    values: dict[str, object]
    where: str
    error: type[SparseBayesError] = RunError

    def only(self, names: Collection[str]) -> None:
        """Refuse fields that are not in `names`."""
        for name in self.values:
            if name not in names:
                raise self.error(f"{self.where}: {unknown('field', name, names)}")

    def fail(self, name: str, expected: str) -> SparseBayesError:
        """Make the error that says what field `name` should have been."""
        shown = repr(self.values[name])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return self.error(f"{self.where}: {name!r} should be {expected}, got {shown}; write the file again")

    def value(self, name: str) -> object:
        """Read a field of any type."""
        if name not in self.values:
            raise self.error(f"{self.where} lacks the field {name!r}; write the file again")
        return self.values[name]

    def text(self, name: str) -> str:
        """Read a string."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self.fail(name, "text")
        return value

    def integer(self, name: str, *, low: int, high: int = 2**40) -> int:
        """Read a whole number within `low`..`high`."""
        value = self.value(name)
        if not _is_integer(value, low, high):
            raise self.fail(name, f"a whole number within {low}..{high}")
        return value  # type: ignore[return-value]  # just checked

    def integers(self, name: str, *, low: int, high: int = 2**40) -> list[int]:
        """Read a list of whole numbers within `low`..`high`."""
        value = self.value(name)
        if not isinstance(value, list) or not all(_is_integer(item, low, high) for item in value):
            raise self.fail(name, f"a list of whole numbers within {low}..{high}")
        return value

    def number(self, name: str) -> float | None:
        """Read a finite number, or null."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(name, "a finite number or null")
        return float(value)

    def fields(self, name: str) -> Fields:
        """Read an object."""
        value = self.value(name)
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, f"{name!r} of {self.where}", self.error)

    def list_of_fields(self, name: str) -> list[Fields]:
        """Read a list of objects."""
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.fail(name, "a list of objects")
        return [Fields(item, f"{name}[{k}] of {self.where}", self.error) for k, item in enumerate(value)]


def _is_integer(value: object, low: int, high: int) -> bool:
    # bool is an int in Python, but `true` is no size.
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def parse(text: str, *, where: str, error: type[SparseBayesError]) -> Fields:
    """Parse a JSON object.

    Args:
        text: the document.
        where: names it in messages.
        error: what is raised, here and by the fields.

    Returns:
        Its fields.

    Raises:
        SparseBayesError: of type `error`; the text is not JSON, or not an object.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not JSON ({cause}); the file may be cut short: write it again") from cause
    if not isinstance(document, dict):
        raise error(f"{where} should hold a JSON object, not a {type(document).__name__}; write it again")
    return Fields(document, where, error)
