"""Files for operators: unit, dashboard, alert rules. What they name exists, what they say agrees with the code."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyvolume.config import GLOBAL_FLAGS, VOLUME_FLAGS, ServerConfig
from pyvolume.server.metrics import ServerMetrics

PACKAGING = Path(__file__).parents[2] / "packaging"
RULES = PACKAGING / "prometheus-alerts.yml"
FAMILY = re.compile(r"\b((?:SeaweedFS|pyvolume|process)_\w+)(\{[^}]*\})?")
LABELS_OF_SCRAPES = {"instance", "job", "le"}


def families() -> dict[str, tuple[str, set[str]]]:
    """(kind, labels) by name, with the names that a histogram has on the wire."""
    out: dict[str, tuple[str, set[str]]] = {}
    for family in ServerMetrics(ServerConfig()).registry.families():
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
