"""The command line: `sparsebayes run | validate | show | list | copy | export | bench | report`.

Each command reads its arguments, calls one function of the package and prints what came of it. What a command
needs is imported inside it, so that help, and all that only reads recipes, does not wait for torch.
"""

from __future__ import annotations

from sparsebayes.cli import recipes, results, runs  # noqa: F401 - importing them adds their commands
from sparsebayes.cli.program import main

__all__ = ["main"]
