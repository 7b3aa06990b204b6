"""Asks pip-audit whether a pinned dependency has a known weakness: exit 1 and its list if one has.

Says so, and succeeds, where that cannot be known: pip-audit is not installed (`make audit` installs it beside the
project's own environment), or no list of advisories can be reached.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[2] / "requirements.lock"
SERVICES = ("pypi", "osv")
LIMIT_S = 120


def judge(report: dict[str, Any]) -> tuple[list[str], int, int]:
    """Of a report: a line for each weakness, how many packages were judged, how many could not be."""
    found, judged, skipped = [], 0, 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped += 1
            continue
        judged += 1
        for weakness in package["vulns"]:
            remedy = ", ".join(weakness.get("fix_versions", ())) or "no version yet"
            found.append(f"{package['name']} {package['version']}: {weakness['id']}, fixed in {remedy}")
    return found, judged, skipped


def ask(command: str, service: str) -> dict[str, Any] | None:
    """The report; None if there is none, as without a network."""
    words = [command, "-r", str(LOCK), "--no-deps", "--disable-pip", "-s", service]
    words += ["-f", "json", "--progress-spinner=off"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        report = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return report if isinstance(report, dict) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", default="pip-audit", help="default: the one on the PATH")
    command = shutil.which(parser.parse_args().command)
    if command is None:
        print("pip-audit is not installed: dependencies were not looked up (make audit)")
        return 0
    for service in SERVICES:
        report = ask(command, service)
        if report is None:
            continue
        found, judged, skipped = judge(report)
        if judged:
            print("\n".join([*found, f"{judged} dependencies looked up at {service}, {skipped} not known there"]))
            return 1 if found else 0
    print("no list of advisories can be reached: dependencies were not looked up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
