"""Say which links between the pages of this repository lead nowhere.

    python tools/check_links.py            # all Markdown files that git knows; exit status 1 if a link is broken

Links to files, folders and headings are looked up; addresses on the network are not asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/*.md", "docs/**/*.md")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def pages(root: Path) -> list[Path]:
    """The Markdown files at the top and in docs."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def broken_links(paths: Iterable[Path]) -> list[str]:
    """One sentence for each link that leads nowhere.

    Args:
        paths: Markdown files.

    Returns:
        "FILE:LINE: TARGET, what is missing".
    """
    found = []
    for path in paths:
        for number, line in enumerate(_prose(path), start=1):
            for target in LINK.findall(line):
                problem = _problem(path, target)
                if problem:
                    found.append(f"{path}:{number}: {target}, {problem}")
    return found


def _problem(page: Path, target: str) -> str:
    """What is wrong with a link; empty if nothing is."""
    if ELSEWHERE.match(target):
        return ""
    name, _, heading = target.partition("#")
    goal = page if not name else page.parent / name
    if not goal.exists():
        return "no such file"
    if heading and goal.suffix == ".md" and heading not in _anchors(goal):
        return "no such heading"
    return ""


def _prose(path: Path) -> list[str]:
    """The lines of a page; those of code blocks are empty."""
    lines, fence = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
            lines.append("")
        else:
            lines.append("" if fence or line.startswith("    ") else re.sub(r"`[^`]*`", "", line))
    return lines


def _anchors(path: Path) -> set[str]:
    """Headings as links name them: lower case, spaces as dashes, signs left out, repeats numbered."""
    anchors: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        heading = re.match(r"#{1,6} +(.+)", line)
        if heading:
            text = re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
            number = 0
            while (f"{text}-{number}" if number else text) in anchors:
                number += 1
            anchors.add(f"{text}-{number}" if number else text)
    return anchors


def main() -> int:
    """Print what is broken."""
    found = broken_links(pages(ROOT))
    print("\n".join(found) if found else f"all links of {len(pages(ROOT))} pages lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
