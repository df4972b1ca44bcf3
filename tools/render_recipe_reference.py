"""Write docs/recipes.md, the reference of every key of a recipe, from the schema.

python tools/render_recipe_reference.py            # writes the page
python tools/render_recipe_reference.py --check    # only says whether it is up to date; exit status 1 if not
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparsebayes.recipe.reference import render_reference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    fresh = render_reference()
    if parser.parse_args().check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == fresh
        print(f"{PAGE.name} is {'up to date' if current else 'out of date: run this script without --check'}")
        return 0 if current else 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
