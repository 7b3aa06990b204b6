"""What a run counted, by family and by kind of difference."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tools.compat.judge import Difference, brief


@dataclass
class Report:
    checks: int = 0
    differences: int = 0
    by_family: dict[str, list[int]] = field(default_factory=dict)
    kinds: dict[tuple[str, str, str], list[Any]] = field(default_factory=dict)
    tolerated: Counter[str] = field(default_factory=Counter)
    show: int = 20
    shown: int = 0

    def add(self, family: str, what: str, differences: list[Difference]) -> None:
        """One check; `what` tells the request or file in one line."""
        self.checks += 1
        row = self.by_family.setdefault(family, [0, 0])
        row[0] += 1
        if not differences:
            return
        self.differences += 1
        row[1] += 1
        for name, want, got in differences:
            kind = self.kinds.setdefault((name, _kind(want), _kind(got)), [0, set(), what])
            kind[0] += 1
            kind[1].add(family)
        if self.shown < self.show:
            self.shown += 1
            print(f"DIFFERENCE [{family}] {what[:600]}")
            for name, want, got in differences:
                print(f"    {name}: recorded {brief(want)}\n    {'':{len(name)}}  got      {brief(got)}")

    def print_summary(self) -> None:
        rows = sorted(self.kinds.items(), key=lambda kv: -kv[1][0])[:40]
        if rows:
            print("differences by kind: count, what, recorded -> got, families, first request")
        for (name, want, got), (count, families, first) in rows:
            print(f"{count:6d}  {name}: {want} -> {got}  [{','.join(sorted(families))}]\n        {first[:200]}")
        print("families: " + "  ".join(f"{f} {d}/{n}" for f, (n, d) in sorted(self.by_family.items())))
        print("tolerated: " + (", ".join(f"{k}: {n}" for k, n in sorted(self.tolerated.items())) or "nothing"))


def _kind(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = re.sub(r"[0-9a-fA-F]{6,}", "#", text)
    text = re.sub(r"\d+", "N", text) if len(text) > 6 else text
    return text if len(text) <= 70 else text[:70] + "..."
