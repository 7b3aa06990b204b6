"""Documents stay true: links lead somewhere, named tests exist, make targets are described."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvolume.config import GLOBAL_FLAGS, VOLUME_FLAGS, ServerConfig
from pyvolume.server.metrics import PREFIX, ServerMetrics

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


# --- every promise names its proof -----------------------------------------------------------------------------------

COMPATIBILITY = ROOT / "docs" / "COMPATIBILITY.md"
NAMED_TEST = re.compile(r"`((?:unit|conformance|crash|race|property)/test_\w+\.py)(?:::(\w+))?`")


def rows(first: str) -> Iterator[list[str]]:
    """Cells of all rows of the tables whose first column has that title and whose last one is `test`."""
    titles: list[str] = []
    for line in COMPATIBILITY.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            titles = []
        elif not titles:
            titles = cells
        elif titles[0] == first and titles[-1] == "test" and set(cells[0]) != {"-"}:
            yield cells


def proven(first: str) -> dict[str, str]:
    """State by each name in the first column; asserts that the last column names a test."""
    out: dict[str, str] = {}
    for cells in rows(first):
        names = re.findall(r"`([^`]+)`", cells[0])
        assert NAMED_TEST.search(cells[-1]), f"{cells[0]} in COMPATIBILITY.md names no test"
        out |= dict.fromkeys(names, cells[1])
    return out


def test_every_flag_names_its_test() -> None:
    assert set(proven("flag")) == {f"-{flag.name}" for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS)}


def test_every_rpc_names_its_test() -> None:
    from pyvolume.pb import volume_server_pb2

    assert set(proven("RPC")) == {m.name for m in volume_server_pb2.DESCRIPTOR.services_by_name["VolumeServer"].methods}


def test_every_route_names_its_test() -> None:
    listed = proven("route")
    source = (ROOT / "pyvolume" / "server" / "http_app.py").read_text("utf-8")
    routed = set(re.findall(r'Rule\("([^"]+)"', source))
    assert len(routed) >= 5
    assert routed | {"/seaweedfsstatic/", "/debug/pprof/", "/vid,fid", "/vid/fid", "/vid/fid/name"} <= set(listed)


def test_every_metric_names_its_test_and_its_use() -> None:
    listed = proven("family")
    ours = {
        name
        for path in (ROOT / "pyvolume" / "server").glob("*.py")
        for name in re.findall(r'"(pyvolume_\w+)"', path.read_text("utf-8"))
    }
    families = {family.name.removeprefix(PREFIX) for family in ServerMetrics(ServerConfig()).registry.families()} | ours
    assert set(listed) == families
    operations = (ROOT / "docs" / "OPERATIONS.md").read_text("utf-8")
    for name in families:
        if name.startswith(("process_", "SeaweedFS_")):
            continue
        assert re.search(rf"\b{name}\b", operations), f"OPERATIONS.md does not tell of {name}"


def test_log_lines_worth_an_alert_are_logged() -> None:
    """Each quoted line of that table stands in the code, in the pieces that surround its names and figures."""
    section = (ROOT / "docs" / "OPERATIONS.md").read_text("utf-8").partition("### Lines worth an alert")[2]
    table = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(table) > 12
    literals: list[str] = []
    for path in (ROOT / "pyvolume").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                literals.append("%".join(str(p.value) if isinstance(p, ast.Constant) else "" for p in node.values))
    checked = 0
    for row in table:
        for quoted in re.findall(r"`([^`]+)`", row.split("|")[1]):
            if quoted in ("F…", "Traceback"):
                continue
            pieces = [piece.strip() for piece in quoted.split("…") if len(piece.strip()) > 3]
            assert pieces
            for piece in pieces:
                assert any(piece in literal for literal in literals), f"{piece!r} of {quoted!r} is never logged"
                checked += 1
    assert checked > 15


def test_results_of_a_benchmark_go_between_the_marks() -> None:
    from tools.bench.fill import between_marks, first_table

    results = "### Benchmark\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n### Start\n\n| c |\n|---|\n| 3 |\n"
    for name in ("README.md", "docs/BENCHMARKS.md"):
        before = (ROOT / name).read_text("utf-8")
        once = between_marks(before, results)
        assert results.strip() in once
        assert between_marks(once, "other") == between_marks(before, "other")
        assert once.count("make bench: begin") == before.count("make bench: begin") == 1
    assert first_table(results) == "| a | b |\n|---|---|\n| 1 | 2 |"
