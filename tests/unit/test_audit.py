"""What `make audit` makes of pip-audit's answers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "dev" / "audit.py"
judge = runpy.run_path(str(SCRIPT))["judge"]

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
WEAK = {"name": "weak", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}]}
HOPELESS = {"name": "hopeless", "version": "3", "vulns": [{"id": "CVE-1"}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


def test_weak_dependencies_are_named_with_their_remedy() -> None:
    assert judge({"dependencies": [SOUND, WEAK, HOPELESS, UNKNOWN]}) == (
        ["weak 1.0: PYSEC-1, fixed in 1.1, 2.0", "hopeless 3: CVE-1, fixed in no version yet"],
        3,
        1,
    )


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"dependencies": [SOUND]}, 0, "1 dependencies looked up at pypi, 0 not known"),
        ({"dependencies": [SOUND, WEAK]}, 1, "weak 1.0: PYSEC-1"),
        ({"dependencies": [UNKNOWN]}, 0, "no list of advisories can be reached"),
        (None, 0, "no list of advisories can be reached"),
    ],
)
def test_exit_status(tmp_path: Path, answer: Any, status: int, words: str) -> None:
    command = tmp_path / "pip-audit"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer) if answer else 'Traceback'}\nEND\n")
    command.chmod(0o755)
    done = subprocess.run([sys.executable, SCRIPT, "--command", command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert words in done.stdout


def test_without_pip_audit_nothing_is_claimed() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--command", "no-such-pip-audit"], capture_output=True, text=True, check=True
    )
    assert "not looked up" in done.stdout
