"""Has a real Prometheus scrape a server under load, loads the alert rules, and asks every query of the dashboard.

    python -m tools.dev.try_prometheus --minutes 10

Needs `prometheus` and `promtool` on the PATH. Exit status 1 if a scrape failed, a rule has an error, or a query of the
dashboard returns nothing that should return something. Not part of the tests: it takes minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tools.compat.bed import HOST, Bed, wait_for
from tools.ports import free_ports

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
VID = 3
MAY_BE_EMPTY = ("master_disconnections", "replication_", "_limit", "code=~", "vacuum_progress", "ec_", "scrub_")
"""Families that have no series before their first event; with these a query may return nothing."""


def load(bed: Bed, stop: threading.Event, seed: int, rate: float) -> None:
    rng = random.Random(seed)  # noqa: S311
    conn = http.client.HTTPConnection(HOST, bed.port, timeout=30)
    keys: list[int] = []
    while not stop.wait(1 / rate):
        try:
            if not keys or rng.random() < 0.3:
                keys.append((seed << 24) + len(keys) + 1)
                data = rng.randbytes(rng.randrange(100, 20000))
                query = "?fsync=true" if rng.random() < 0.1 else ""
                conn.request("PUT", f"/{VID},{keys[-1]:x}00000001{query}", data, {"Content-Type": "a/b"})
            elif rng.random() < 0.05:
                conn.request("DELETE", f"/{VID},{keys.pop(rng.randrange(len(keys))):x}00000001")
            elif rng.random() < 0.02:
                conn.request("GET", f"/{VID},ffffffffff00000001")
            else:
                conn.request("GET", f"/{VID},{rng.choice(keys):x}00000001")
            conn.getresponse().read()
        except (OSError, http.client.HTTPException):
            conn.close()


def api(port: int, path: str, **query: str) -> Any:
    text = f"http://{HOST}:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(text, timeout=10) as answer:
        return json.load(answer)["data"]


def dashboard_queries() -> list[tuple[str, str]]:
    document = json.loads((PACKAGING / "grafana-dashboard.json").read_text())
    out = []
    for panel in document["panels"]:
        for target in panel["targets"]:
            out.append((panel["title"], target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")))
    return out


def vacuum(bed: Bed) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from race.server import vacuum as run

    run(bed, VID)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=50, help="requests a second of each of two clients")
    args = parser.parse_args()
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            print(f"{program} is not installed", file=sys.stderr)
            return 2
    base = Path(tempfile.mkdtemp(prefix="pyvolume-prometheus-"))
    metrics_port, port = free_ports(2)
    configuration = base / "prometheus.yml"
    configuration.write_text(
        f"""global: {{scrape_interval: 5s, evaluation_interval: 5s}}
rule_files: [{PACKAGING / "prometheus-alerts.yml"}]
scrape_configs:
  - job_name: volume
    static_configs: [{{targets: ["{HOST}:{metrics_port}"]}}]
"""
    )
    problems = []
    stop = threading.Event()
    with Bed(base, command=f"{sys.executable} -m pyvolume", flags=[f"-metricsPort={metrics_port}"]) as bed:
        bed.allocate(volume_id=VID, replication="000", version=3)
        argv = ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={base / 'tsdb'}"]
        with (base / "prometheus.log").open("wb") as log:
            prometheus = subprocess.Popen(
                [*argv, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=log, cwd=base
            )
        clients = [threading.Thread(target=load, args=(bed, stop, seed, args.rate), daemon=True) for seed in (1, 2)]
        try:
            for client in clients:
                client.start()
            end = time.monotonic() + args.minutes * 60
            while time.monotonic() < end:
                time.sleep(min(30, max(0.0, end - time.monotonic())))
                vacuum(bed)
            assert wait_for(lambda: bool(api(port, "targets")["activeTargets"]), 30)
            target = api(port, "targets")["activeTargets"][0]
            span = f"[{int(args.minutes * 60)}s]"
            scrapes = api(port, "query", query=f"count_over_time(up{span})")["result"]
            ok = api(port, "query", query=f"sum_over_time(up{span})")["result"]
            took = api(port, "query", query=f"max_over_time(scrape_duration_seconds{span})")["result"]
            samples = api(port, "query", query="scrape_samples_scraped")["result"]
            counts = [found[0]["value"][1] for found in (scrapes, ok, took)]
            print(f"scrapes: {counts[0]}, good: {counts[1]}, longest {float(counts[2]):.3f} s")
            print(f"samples in one: {samples[0]['value'][1]}, last error: {target['lastError'] or 'none'}")
            if scrapes[0]["value"][1] != ok[0]["value"][1]:
                problems.append("scrapes failed")
            rules = api(port, "rules")["groups"][0]["rules"]
            for rule in rules:
                if rule["health"] != "ok":
                    problems.append(f"rule {rule['name']}: {rule['health']} {rule.get('lastError')}")
            print(f"rules: {len(rules)}, firing: {[rule['name'] for rule in rules if rule['state'] == 'firing']}")
            empty = 0
            for title, query in dashboard_queries():
                if not api(port, "query", query=query)["result"]:
                    empty += 1
                    expected = any(part in query for part in MAY_BE_EMPTY)
                    print(f"  no data{' (no event yet)' if expected else ''}: {title}: {query}")
                    if not expected:
                        problems.append(f"{title}: {query}")
            print(f"dashboard: {len(dashboard_queries())} queries, {empty} without data")
        finally:
            stop.set()
            prometheus.terminate()
            prometheus.wait(20)
    shutil.rmtree(base, ignore_errors=True)
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
