"""The list of known gaps of the compatibility runner may only shrink."""

from __future__ import annotations

from pathlib import Path

from tools.compat.__main__ import read_gaps

KNOWN_GAPS = Path(__file__).parents[2] / "tools" / "compat" / "known-gaps.txt"
ALLOWED: set[str] = set()


def test_known_gaps_only_shrink() -> None:
    assert read_gaps(KNOWN_GAPS) <= ALLOWED
