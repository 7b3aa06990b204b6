"""The traffic behind a scrape of a Go server, sent to ours: the same series, the same counts (operations.md 4.2)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, serving

from pyvolume.server.metric_types import text_format
from pyvolume.server.metrics import ServerMetrics

GOLDEN = Path(__file__).parents[1] / "data" / "metrics" / "go-4.44-scrape.txt"
OCTETS = ("Content-Type", "application/octet-stream")
P = "SeaweedFS_volumeServer_"
VOLUMES = 7
FROM_TRAFFIC = (
    "file_read_failures", "file_read_invalid_needles", "file_write_failures", "handler_total",
    "in_flight_download_size",
    "in_flight_requests", "in_flight_upload_size", "max_volumes", "read_only_volumes", "replication_targets",
    "request_total", "vacuuming_commit_count", "vacuuming_compact_count",
)  # fmt: skip
"""Families whose values follow from what was sent, not from the clock."""


def series(text: str) -> dict[str, str]:
    return dict(line.rpartition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#"))


def family_of(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name.partition("{")[0]).removeprefix(P)


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[Bench, ServerMetrics]]:
    with serving(tmp_path, fast_lane=False) as bench:
        metrics = ServerMetrics(bench.context.config)
        bench.context.events = bench.ops.events = metrics
        metrics.watch_store(bench.context.store)
        bench.context.store.delete_volume(1)
        yield bench, metrics


def settled(metrics: ServerMetrics) -> dict[str, str]:
    """The series once all requests have been counted: the last one is, just after its answer."""
    end = time.monotonic() + 10
    while True:
        now = series(text_format(metrics.registry.gather()).decode())
        flights = [value for name, value in now.items() if name.startswith(P + "in_flight_requests{")]
        if set(flights) <= {"0"} or time.monotonic() > end:
            return now
        time.sleep(0.01)


def test_the_same_traffic_gives_the_same_series(counted: tuple[Bench, ServerMetrics]) -> None:
    bench, metrics = counted
    for vid in range(2, 2 + VOLUMES):
        bench.allocate(vid, collection="pics")
    fids = [bench.fid(2) for _ in range(20)]
    for fid in fids:
        assert bench.ask("POST", f"/{fid}", (OCTETS,), b"x" * 30).status == 201
    for method in ("GET", "HEAD"):
        for fid in fids:
            assert bench.ask(method, f"/{fid}").status == 200
    assert bench.ask("OPTIONS", f"/{fids[0]}").status == 200
    assert bench.ask("PATCH", f"/{fids[0]}").status == 400
    assert bench.ask("GET", f"/{bench.fid(2)}").status == 404
    assert bench.ask("GET", "/notafid").status == 400
    for fid in fids[:5]:
        assert bench.ask("DELETE", f"/{fid}").status == 202
    bench.context.store.mark_readonly(3, can_delete=False, persist=False)
    metrics.rpc_ended("VacuumVolumeCompact", None, None, True, 0.01)
    metrics.rpc_ended("VacuumVolumeCommit", None, object(), True, 0.01)
    ours, expected = settled(metrics), series(GOLDEN.read_text())
    directory = bench.context.config.dirs[0].path

    wanted = {name.replace('name="/data"', f'name="{directory}"') for name in expected}
    wanted.discard(P + 'volumes{collection="pics",type="ec_shards"}')
    missing = wanted - ours.keys()
    assert not missing
    more = {name for name in ours.keys() - wanted if name.startswith("SeaweedFS_volumeServer_")}
    assert all('collection=""' in name for name in more), "a collection that was there before"
    for name, value in expected.items():
        if family_of(name) in FROM_TRAFFIC and not name.startswith(P + "max_volumes"):
            assert ours[name] == value, name
    assert (
        ours[P + 'volumes{collection="pics",type="volume"}'] == expected[P + 'volumes{collection="pics",type="volume"}']
    )
    for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "INVALID", "writeToLocalDisk"):
        name = f'{P}request_seconds_count{{type="{method}"}}'
        assert ours[name] == expected[name], name


def test_pages_are_not_counted(counted: tuple[Bench, ServerMetrics]) -> None:
    bench, metrics = counted
    for target in ("/status", "/healthz", "/ui/index.html", "/favicon.ico"):
        assert bench.ask("GET", target).status == 200
    assert not [name for name in settled(metrics) if name.startswith(P + "request_total")]
