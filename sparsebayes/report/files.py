"""Text out of run folders, and one sentence when a file is absent or damaged.

>>> model = parse_json(Report, read_text(folder / "report.json"), folder / "report.json")
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from sparsebayes.errors import RunError

__all__ = ["parse_json", "parse_json_lines", "read_text", "recipe_values"]

MAX_COMPLAINTS = 3  # of a file with many faults the first few tell enough

Parsed = TypeVar("Parsed")
Record = TypeVar("Record", bound=BaseModel)


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        RunError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"{path} was expected and is not there; was the run finished?") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: it is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error})") from error


def parse_json(kind: type[Parsed], text: str, where: Path) -> Parsed:
    """Parse and validate one JSON document.

    Args:
        kind: a pydantic model, or a type made of such models (`list[ParetoPoint]`).
        text: the document.
        where: names the file in messages.

    Returns:
        The validated value.

    Raises:
        RunError: the text is not JSON, or does not have the fields and types of `kind`.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise RunError(f"{where} is damaged or incomplete: {_complaints(error)}") from error


def parse_json_lines(kind: type[Record], text: str, where: Path) -> tuple[Record, ...]:
    """Parse and validate a document with one JSON object per line; empty lines are passed over.

    Args:
        kind: the pydantic model of a line.
        text: the document.
        where: names the file in messages.

    Returns:
        The validated records in order.

    Raises:
        RunError: a line is not JSON or does not validate; the line's number is named.
    """
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(kind.model_validate_json(line, strict=True))
            except ValidationError as error:
                raise RunError(
                    f"{where}, line {number}, is damaged or incomplete: {_complaints(error)}"
                ) from error
    return tuple(records)


class _Plain(yaml.SafeLoader):
    """YAML without aliases, by which a short text could stand for gigabytes; recipes have none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def recipe_values(text: str | None) -> dict[str, object]:
    """The sections of a run's recipe, for what a report says about them.

    Args:
        text: recipe.yaml of the run; None where it has none.

    Returns:
        Key -> value; empty for a text that is no recipe, about which a report then says nothing.
    """
    try:
        content = _Plain(text or "").get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: PyYAML on a date such as 2000-13-13
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _complaints(error: ValidationError) -> str:
    """Field by field what was expected, in one line."""
    texts = []
    for entry in error.errors(include_url=False, include_input=False)[:MAX_COMPLAINTS]:
        place = ".".join(str(part) for part in entry["loc"])
        texts.append(f"{place}: {entry['msg']}" if place else str(entry["msg"]))
    more = error.error_count() - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")
