"""Write docs/benchmarks.md from docs/benchmarks/*.json, or check that it is up to date.

python tools/render_benchmarks.py            # write the page
python tools/render_benchmarks.py --check    # exit 1 if the page is not what the results say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically
from sparsebayes.report.benchmarks import render_page
from sparsebayes.report.files import read_text

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0 if the page is up to date now, 1 if `--check` found that it is not, 2 if a file is not
        valid.
    """
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from docs/benchmarks/*.json.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is out of date"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder that holds benchmarks/ and benchmarks.md"
    )
    options = parser.parse_args(arguments)
    page = options.docs / "benchmarks.md"
    try:
        text = render_page(options.docs / "benchmarks")
        if not options.check:
            write_atomically(page, text)
        elif not page.exists() or read_text(page) != text:
            print(f"{page} is out of date; run python tools/render_benchmarks.py", file=sys.stderr)
            return 1
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
