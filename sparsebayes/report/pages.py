"""Pages of one file each: the templates, with style sheet and charts inside; nothing is loaded, no script runs.

>>> page("report", report=..., rows=...)
'<!doctype html>...'
"""

from __future__ import annotations

from functools import cache

import jinja2

__all__ = ["page"]


def page(template: str, **content: object) -> str:
    """Fill in a template.

    Args:
        template: "report" or "comparison".
        content: the template's variables; text among them is escaped, charts stay as they are.

    Returns:
        A whole HTML document that loads nothing.
    """
    return _environment().get_template(f"{template}.html.j2").render(**content)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sparsebayes.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
