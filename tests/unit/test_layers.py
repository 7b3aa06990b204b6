"""What the import linter cannot see: the compiled module is imported by _native alone."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pyvolume"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_only_native_imports_the_compiled_module() -> None:
    importers = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if "pyvolume._pv" in imported(p)}
    assert importers == {"_native"}


def test_nothing_but_the_tests_imports_the_tools() -> None:
    assert not [p for p in PACKAGE.rglob("*.py") if any(n.split(".")[0] in ("tools", "tests") for n in imported(p))]
