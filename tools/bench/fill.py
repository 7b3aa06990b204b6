"""Puts the newest results of `make bench` between the marks in docs/BENCHMARKS.md and README.md.

    python -m tools.bench.fill [FILE]

The README gets the first table only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- make bench: begin -->\n", "<!-- make bench: end -->\n"


def between_marks(document: str, text: str) -> str:
    """The document with `text` between its marks. ValueError if it has none."""
    head, found, rest = document.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the marks {BEGIN.strip()} and {END.strip()} are missing")
    return f"{head}{BEGIN}{text.strip()}\n{END}{tail}"


def first_table(text: str) -> str:
    """Rows of the first table, with what stands before it left out."""
    rows: list[str] = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            break
    if not rows:
        raise ValueError("no table in the results")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    files = [Path(argv[0])] if argv else sorted((ROOT / "bench-results").glob("*.md"))
    if not files:
        print("no results: run `make bench` first", file=sys.stderr)
        return 1
    results = re.sub(r"^#+ ", "### ", files[-1].read_text("utf-8"), flags=re.M)
    for name, text in (("docs/BENCHMARKS.md", results), ("README.md", first_table(results))):
        path = ROOT / name
        path.write_text(between_marks(path.read_text("utf-8"), text), "utf-8")
        print(f"{name}: from {files[-1].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
