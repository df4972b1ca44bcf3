"""Which names and special values a recipe accepts where a plain type says too little.

Data sets and models are named by a table or by user code; `groups` may be written in several ways; a strength
and the images of a curvature are a number or `auto`. Each check returns the value in the one form that the schema
keeps, or raises `ValueError` with what was expected and what came.

    >>> check_rule("2:4")
    '2:4'
    >>> list_rules("units+features")
    [{'rule': 'units+features'}]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal

from sparsebayes.errors import unknown

__all__ = [
    "DATA_NAMES",
    "FOLDER",
    "MODEL_NAMES",
    "MOST_IMAGES",
    "PATTERNS",
    "RULE_NAMES",
    "RUN_NAME",
    "USER_CODE",
    "check_data_name",
    "check_model_name",
    "check_num_images",
    "check_rule",
    "check_strength",
    "list_rules",
    "show_value",
]

# The names that the tables of `data`, `models` and `groups` know, repeated because those tables import torch;
# tests/recipe/test_names.py holds the two together.
DATA_NAMES = (
    "cifar10",
    "cifar100",
    "embedded_cifar10",
    "embedded_mnist",
    "fashion_mnist",
    "mnist",
    "shapes",
)
MODEL_NAMES = ("lenet5_caffe", "lenet_300_100", "resnet18", "resnet20", "resnet56", "vgg16")
RULE_NAMES = (
    "blocks",
    "branches",
    "channels",
    "columns",
    "features",
    "filters",
    "kernels",
    "rows",
    "shapes",
    "units",
    "weights",
)

USER_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PARAMETRIC_RULE = re.compile(r"blocks:[1-9]\d{0,3}x[1-9]\d{0,3}")
_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")
_LARGEST_STRENGTH = 1e12
_MOST_RULES = 64
MOST_IMAGES = 10_000_000
"""What a number of images may be at most."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
FOLDER = r"^[^\x00-\x1f\x7f]+$"
# What a text that must match a pattern is, in words.
PATTERNS = {
    RUN_NAME: "a name of letters, digits, '.', '_' and '-', a letter or digit first, 100 at most",
    FOLDER: "the path of a folder",
}


def show_value(value: object) -> str:
    """`value` as an error shows it: in YAML's words, short, and on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of over 20 digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _name(kind: str, known: Sequence[str], value: object) -> str:
    """Accept one of the `known` names, or the name of user code, `"package.module:function"`."""
    if not isinstance(value, str):
        raise ValueError(f"expected the name of a {kind}, got {show_value(value)}")
    if value in known or USER_CODE.fullmatch(value):
        return value
    if ":" in value:
        raise ValueError(f"expected user code as 'package.module:function', got {show_value(value)}")
    raise ValueError(unknown(kind, value, known) + ", or your own 'package.module:function'")


def check_data_name(value: object) -> str:
    """Accept the name of a data set, or of user code that loads one.

    Raises:
        ValueError: `value` is no text, no name of `DATA_NAMES`, and no `"package.module:function"`.
    """
    return _name("data set", DATA_NAMES, value)


def check_model_name(value: object) -> str:
    """Accept the name of a model, `"torchvision:NAME"`, or the name of user code that builds one.

    Raises:
        ValueError: `value` is no text, no name of `MODEL_NAMES`, and no `"package.module:function"`.
    """
    return _name("model", MODEL_NAMES, value)


def check_rule(value: object) -> str:
    """Accept a rule of `RULE_NAMES`, `blocks:RxC`, `n:m` with n < m, or several of these joined by `+`.

    Raises:
        ValueError: `value`, or one of its parts, is none of these, or a part is there twice.
    """
    if not isinstance(value, str):
        raise ValueError(f"expected the name of a rule, such as units, got {show_value(value)}")
    parts = value.split("+")
    if len(set(parts)) < len(parts):
        raise ValueError(f"expected each rule once, got {show_value(value)}")
    for part in parts:
        pair = _N_OF_M.fullmatch(part)
        if pair is not None and int(pair[1]) >= int(pair[2]):
            raise ValueError(f"expected n:m with n < m, n weights kept of each m, got {show_value(part)}")
        if part not in RULE_NAMES and pair is None and not _PARAMETRIC_RULE.fullmatch(part):
            raise ValueError(unknown("rule", part, RULE_NAMES) + ", blocks:RxC, or n:m such as 2:4")
    return value


def list_rules(value: Any) -> Any:
    """Bring every way to write `groups` into one: a list of mappings.

    What is neither text, list nor mapping comes back as it is, for the field's own type to refuse.

    Raises:
        ValueError: there are more than `_MOST_RULES` rules.
    """
    if not isinstance(value, (str, dict, list, tuple)):
        return value
    entries = [value] if isinstance(value, (str, dict)) else value
    if len(entries) > _MOST_RULES:
        raise ValueError(f"expected at most {_MOST_RULES} rules, got {show_value(value)}")
    return [{"rule": entry} if isinstance(entry, str) else entry for entry in entries]


def check_num_images(value: object) -> int | Literal["auto"]:
    """Accept `auto` or a whole number of images.

    Raises:
        ValueError: `value` is neither.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_IMAGES:
        return value
    near = isinstance(value, str) and difflib.get_close_matches(value, ["auto"])
    hint = "; did you mean 'auto'?" if near else ""
    raise ValueError(
        f"expected auto or a whole number >= 1 and <= {MOST_IMAGES:,}, got {show_value(value)}{hint}"
    )


def check_strength(value: object) -> float | str:
    """Accept `auto` or a positive finite number.

    Raises:
        ValueError: `value` is neither.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _LARGEST_STRENGTH:
        return float(value)
    near = isinstance(value, str) and difflib.get_close_matches(value, ["auto"])
    hint = "; did you mean 'auto'?" if near else ""
    raise ValueError(
        f"expected auto or a number > 0 and <= {_LARGEST_STRENGTH:g}, got {show_value(value)}{hint}"
    )
