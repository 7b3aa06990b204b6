"""Documents stay true: links lead somewhere, named tests exist, make targets are described."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "data" / "README.md"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_tests_exist(document: Path) -> None:
    """`unit/test_x.py::test_y` in a table is a promise."""
    for file, name in re.findall(r"`(?:tests/)?([\w/]+/test_\w+\.py)(?:::(\w+))?`", document.read_text("utf-8")):
        path = ROOT / "tests" / file
        assert path.exists(), f"{document.name} names {file}"
        if name:
            assert re.search(rf"^(?:async )?def {name}\b|^    def {name}\b", path.read_text("utf-8"), re.M), (
                f"{document.name} names {file}::{name}"
            )


def test_every_make_target_is_described() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = {t for line in re.findall(r"^\.PHONY: (.*)$", text, re.M) for t in line.split()}
    described = set(re.findall(r"^([a-z-]+):.*## \S", text, re.M))
    assert phony - described == {"asan-quick"}
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert described <= {line.split()[0] for line in shown.splitlines() if line.strip()}


def test_the_readme_opens_with_the_two_commands() -> None:
    lines = [line.strip() for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.strip()]
    assert lines[0] == "# pyvolume"
    assert lines[1].startswith("make run") and lines[2].startswith("make test")


def test_nothing_names_a_machine() -> None:
    """No absolute path of the checkout in any tracked text."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(files):
        pytest.skip("not a git checkout")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".xz", ".dat", ".idx", ".gz", ".png") or not path.is_file():
            continue
        assert str(ROOT) + "/" not in path.read_text("utf-8", "replace"), f"{name} names this checkout"
