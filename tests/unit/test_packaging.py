"""Files for operators: unit, dashboard, alert rules, containers, manual, and what goes into a wheel and a source
distribution. What they name exists, what they say agrees with the code.
"""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvolume.config import GLOBAL_FLAGS, VOLUME_FLAGS, ServerConfig
from pyvolume.server.lane import watch_lane
from pyvolume.server.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
RULES = PACKAGING / "prometheus-alerts.yml"
FAMILY = re.compile(r"\b((?:SeaweedFS|pyvolume|process)_\w+)(\{[^}]*\})?")
LABELS_OF_SCRAPES = {"instance", "job", "le"}


def families() -> dict[str, tuple[str, set[str]]]:
    """(kind, labels) by name, with the names that a histogram has on the wire."""
    out: dict[str, tuple[str, set[str]]] = {}
    metrics = ServerMetrics(ServerConfig())
    watch_lane(metrics, SimpleNamespace())  # type: ignore[arg-type]  # asked for its figures only by a scrape
    for family in metrics.registry.families():
        endings = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        for ending in endings:
            out[family.name + ending] = (family.kind, set(family.labels))
    return out


def check_expression(text: str) -> None:
    """Families and labels exist, brackets are closed, counters are only used through rate or increase."""
    known = families()
    plain = re.sub(r"\[\$__rate_interval\]|\[\d+[mhd]\]", "", text)
    for pair in ("()", "{}"):
        assert plain.count(pair[0]) == plain.count(pair[1]), text
    found = FAMILY.findall(plain)
    assert found, text
    for name, selector in found:
        assert name in known, f"{name} in {text}"
        kind, labels = known[name]
        for label in re.findall(r"(\w+)\s*=", selector):
            assert label in labels | LABELS_OF_SCRAPES, f"{label} of {name} in {text}"
        if kind in ("counter", "histogram"):
            assert re.search(rf"(?:rate|increase)\({name}\b", plain), f"{name} is a counter: {text}"
    for grouped in re.findall(r"\bby \(([^)]*)\)", text):
        every = set().union(*(known[name][1] for name, _ in found)) | LABELS_OF_SCRAPES
        assert set(re.split(r",\s*", grouped)) <= every, text


def alert_expressions() -> dict[str, str]:
    out, name = {}, ""
    for line in RULES.read_text().splitlines():
        if match := re.match(r"\s+- alert: (\w+)$", line):
            name = match[1]
            assert name not in out
        elif match := re.match(r"\s+expr: (.+)$", line):
            out[name] = match[1]
    return out


@pytest.mark.parametrize("name", sorted(alert_expressions()))
def test_alert_looks_at_what_is_there(name: str) -> None:
    check_expression(alert_expressions()[name])


def test_every_alert_says_what_it_is_about() -> None:
    text = RULES.read_text()
    count = text.count("- alert:")
    assert count >= 10
    assert text.count("        expr:") == text.count("severity:") == text.count("summary:") == count
    assert text.count("          remedy: ") == count


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def dashboard() -> dict[str, object]:
    document: dict[str, object] = json.loads((PACKAGING / "grafana-dashboard.json").read_text())
    return document


def test_dashboard_looks_at_what_is_there() -> None:
    panels = dashboard()["panels"]
    assert isinstance(panels, list)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles) == len({panel["id"] for panel in panels})
    for panel in panels:
        for target in panel["targets"]:
            check_expression(target["expr"])
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in target["expr"] or label in ("instance", "name"), (panel["title"], label)


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert isinstance(panels, list)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24 and (x, y) not in taken
                taken.add((x, y))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((PACKAGING / "pyvolume.service").read_text())
    return parser


def test_the_unit_fits_the_server() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["KillSignal"] == "SIGTERM"
    names = {flag.name for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS)}
    for word in re.findall(r"\s-([\w.]+)", service["ExecStart"]):
        assert word in names
    config = ServerConfig()
    assert int(service["TimeoutStopSec"]) >= config.pre_stop_s + config.stop_timeout_s + 5
    assert set(service["RestartPreventExitStatus"].split()) == {"1", "2"}
    assert service["NoNewPrivileges"] == "true" and service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"] == "/var/lib/pyvolume"


# --- distributions ---------------------------------------------------------------------------------------------------


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_goes_into_the_wheel() -> None:
    tools = project()["tool"]
    assert isinstance(tools, dict)
    listed = set(tools["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "pyvolume").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert found | {"pyvolume.pb"} == listed
    data = {pattern for patterns in tools["setuptools"]["package-data"].values() for pattern in patterns}
    others = [
        path for path in (ROOT / "pyvolume").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    ]
    for path in others:
        assert any(path.match(pattern) for pattern in data), f"{path} is left out of the wheel"


def test_the_wheel_is_for_every_python_we_name() -> None:
    """abi3 from the oldest Python on, in both places that say it."""
    base = project()["project"]
    assert isinstance(base, dict)
    oldest = base["requires-python"].removeprefix(">=")
    assert f'"py_limited_api": "cp{oldest.replace(".", "")}"' in (ROOT / "setup.py").read_text()
    assert "py_limited_api=True" in (ROOT / "build_ffi.py").read_text()
    assert list((ROOT / "pyvolume").glob("_pv.abi3.so")), "the module that was built is not of the stable ABI"


def test_libisal_comes_with_its_license() -> None:
    base = project()["project"]
    assert isinstance(base, dict)
    named = [path for pattern in base["license-files"] for path in ROOT.glob(pattern)]
    assert any("Intel Corporation" in path.read_text() for path in named)


def test_what_a_source_distribution_holds(tmp_path: Path) -> None:
    """The list that setuptools would pack: enough to build from, and to test."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    packed = set((tmp_path / "pyvolume.egg-info" / "SOURCES.txt").read_text().splitlines())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    wanted = {name for name in tracked if name.startswith(("pyvolume/", "csrc/", "proto/", "packaging/", "docs/"))}
    wanted |= {"build_ffi.py", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "requirements.lock"}
    wanted = {name for name in wanted if name and (ROOT / name).exists()}
    assert wanted <= packed, sorted(wanted - packed)
    assert not [name for name in packed if name.endswith((".so", ".o", ".pyc")) or name.startswith("csrc/build/")]


# --- containers and the manual ---------------------------------------------------------------------------------------


def test_no_image_is_filled_in() -> None:
    """Which images to take is the user's to say: no registry is named, and what stands there is a variable."""
    container = (PACKAGING / "Containerfile").read_text()
    for source in re.findall(r"^FROM (\S+)", container, re.M):
        assert source == "${BASE}"
    compose = (PACKAGING / "compose.yml").read_text()
    images = re.findall(r"^\s+image: (.+)$", compose, re.M)
    assert images and all(re.fullmatch(r"\$\{\w+:\?[^}]+\}|pyvolume", image) for image in images)
    for text in (container, compose):
        assert not re.search(r"\b(?:docker|ghcr|quay|gcr)\.io\b", text)


def test_flags_in_the_container_files_exist() -> None:
    names = {flag.name for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS)}
    container = (PACKAGING / "Containerfile").read_text()
    compose = (PACKAGING / "compose.yml").read_text()
    words = re.findall(r'"-([\w.]+)[="]', "".join(re.findall(r"^(?:CMD|ENTRYPOINT) (\[.*\])", container, re.M)))
    words += re.findall(r'"-([\w.]+)[="]', re.findall(r"command: (\[.*8080.*\])", compose)[0])
    assert len(words) > 8
    assert set(words) <= names
    config = ServerConfig()
    assert int(re.findall(r"stop_grace_period: (\d+)s", compose)[0]) >= config.pre_stop_s + config.stop_timeout_s + 5


def test_the_manual_names_every_flag(tmp_path: Path) -> None:
    recipe = re.search(r"^\t\$\(BIN\)/(argparse-manpage .*?)\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert recipe is not None
    words = recipe[1].replace("\\\n", " ").replace("build/pyvolume.1", str(tmp_path / "page"))
    program = Path(sys.executable).parent / "argparse-manpage"
    done = subprocess.run(
        words.replace("argparse-manpage", str(program), 1),
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page").read_text().replace("\\-", "-")
    for flag in (*GLOBAL_FLAGS, *VOLUME_FLAGS):
        assert f"-{flag.name}" in page, flag.name
    for title in ("SIGNALS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES"):
        assert f".SH {title}" in page or f'.SH "{title}"' in page
