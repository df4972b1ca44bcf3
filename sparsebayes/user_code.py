"""The user's own function, named in a recipe as "package.module:function".

    >>> load_function("model", "torch.nn:Linear", ModelError)
    <class 'torch.nn.modules.linear.Linear'>

This is the only way that foreign code enters: a recipe or a saved network cannot hold code, only the name of something
that can be imported. Naming is calling, so whoever loads either trusts what it names.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsebayes.errors import SparseBayesError

__all__ = ["call_function", "load_function"]


def load_function(kind: str, reference: str, error: type[SparseBayesError]) -> Callable[..., Any]:
    """Import the function or class behind "package.module:function".

    The current folder is appended to `sys.path`, so that a file in the folder where the user works is found
    although the command itself is installed elsewhere; it comes last, so that it hides nothing.

    Args:
        kind: what the function is for, in the singular ("model", "data source"); used in messages.
        reference: the text that the user typed.
        error: the class of what is raised.

    Returns:
        The callable, not called yet.

    Raises:
        SparseBayesError: (of class `error`) the text has another form, the module cannot be imported, or it
            has no such function.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute.isidentifier():
        raise error(f"{kind} {reference!r} should have the form 'package.module:function'")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as cause:  # user code may fail in any way while it is imported
        reason = " ".join(str(cause).split())
        raise error(
            f"{kind} {reference!r}: module {module_name!r} cannot be imported "
            f"({type(cause).__name__}: {reason}); install it, or run the command from the folder that holds it"
        ) from cause
    function = getattr(module, attribute, None)
    if not callable(function):
        raise error(
            f"{kind} {reference!r}: module {module_name!r} has no function or class {attribute!r}; "
            "check the part after ':'"
        )
    return function  # type: ignore[no-any-return]


def call_function(
    kind: str,
    name: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    error: type[SparseBayesError],
) -> Any:
    """Call a builder with options that come from a recipe.

    Args:
        kind: what the function is for, in the singular; used in messages.
        name: what the user typed; used in messages.
        function: the callable.
        options: its keyword arguments.
        error: the class of what is raised.

    Returns:
        What the function returns, unchecked.

    Raises:
        SparseBayesError: errors of this package as they come; class `error` when an option does not fit the
            function's signature, or the function fails.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a readable signature: the call itself complains
        signature = None
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as cause:
            takes = ", ".join(signature.parameters) or "none"
            raise error(f"{kind} {name!r}: {cause}; the options it takes: {takes}") from cause
    try:
        return function(**options)
    except SparseBayesError:
        raise
    except Exception as cause:  # user code may fail in any way
        raise error(
            f"{kind} {name!r} failed with options {dict(options)}: {type(cause).__name__}: {cause}"
        ) from cause
