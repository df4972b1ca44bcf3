"""Pictures of the cells that a search has found, drawn anew from genotype.json and switches.json of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from sparsebayes.errors import RecipeError, RunError
from sparsebayes.nas.draw import draw_cell
from sparsebayes.nas.genotype import Genotype, Op
from sparsebayes.report.charts import Figure
from sparsebayes.report.files import parse_json, read_text

__all__ = ["cell_figures"]

CAPTION = "Line width: what the operation is worth, on a logarithmic scale."


class _Switch(BaseModel):
    """One entry of switches.json."""

    model_config = ConfigDict(frozen=True, extra="allow")

    cell: str
    source: int
    target: int
    op: str | None
    score: Annotated[float, Field(allow_inf_nan=True)]


def cell_figures(folder: Path) -> tuple[Figure, ...]:
    """One picture for each cell of the genotype; none if the folder is not of a search.

    Args:
        folder: the run folder.

    Raises:
        RunError: genotype.json or switches.json is damaged.
    """
    path = folder / "genotype.json"
    if not path.exists():
        return ()
    try:
        genotype = Genotype.from_json(read_text(path))
    except RecipeError as error:
        raise RunError(f"{path} is damaged ({error}); run the search again") from None
    worth: dict[str, dict[Op, float]] = {}
    switches = folder / "switches.json"
    if switches.exists():
        for switch in parse_json(list[_Switch], read_text(switches), switches):
            if switch.op is not None:
                worth.setdefault(switch.cell, {})[switch.source, switch.target, switch.op] = switch.score
    # Names come from the tables of spaces and operations or are escaped by the drawing.
    return tuple(
        Figure(f"Cell {key}", Markup(draw_cell(genotype, key, worth.get(key))), CAPTION)
        for key in genotype.cells
    )
