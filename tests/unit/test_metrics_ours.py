"""The families that only we have, on a running server (operations.md 4, docs/COMPATIBILITY.md)."""

from __future__ import annotations

import http.client
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_util import create, put
from test_lifecycle import HOST, Server, wait_for

from pyvolume.config import ServerConfig
from pyvolume.lockwatch import Watchdog, waiting_for
from pyvolume.server.metrics import ServerMetrics, StoreFigures
from pyvolume.storage.store import Store
from tools.ports import free_port

SOURCES = Path(__file__).parents[2] / "pyvolume" / "server"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    base = tmp_path_factory.mktemp("ours")
    (base / "data").mkdir()
    for vid in (1, 2):
        create(base / "data", vid).close()
    port = free_port()
    one = Server(base, f"-metricsPort={port}", f"-port.public={free_port()}").started()
    yield one, port
    one.end()


def scrape(port: int) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by name of the series and its label values."""
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    out: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.M):
        out.setdefault(name, {})[tuple(re.findall(r'="([^"]*)"', labels))] = float(value)
    return out


def names_in_the_code() -> set[str]:
    return {name for path in SOURCES.glob("*.py") for name in re.findall(r'"(pyvolume_\w+)"', path.read_text())}


def test_every_family_is_shown_or_has_had_no_event(server: tuple[Server, int]) -> None:
    """One write, one read and one page make all series but those of events that did not happen."""
    one, port = server
    assert one.request("PUT", "/1,01637037d6?fsync=true", b"x" * 1000)[0] == 201
    assert one.request("GET", "/1,01637037d6")[0] == 200
    assert one.request("GET", "/status")[0] == 200
    shown = scrape(port)
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} | set(shown)
    no_event = {"pyvolume_grpc_calls_total", "pyvolume_grpc_refused_total", "pyvolume_vacuum_progress"}
    assert names_in_the_code() - families <= no_event
    assert len(names_in_the_code()) > 35


def test_writes_with_fsync_count_their_flushes(server: tuple[Server, int]) -> None:
    one, port = server

    def counts() -> tuple[float, float]:
        shown = scrape(port)
        return shown["pyvolume_group_commits_total"][()], shown["pyvolume_group_commit_records_total"][()]

    before = counts()
    for key in range(2, 7):
        assert one.request("PUT", f"/2,{key:02x}637037d6?fsync=true", b"x")[0] == 201
        assert one.request("PUT", f"/2,{key:02x}637037d7", b"no flush")[0] in (201, 500)
    wait_for(lambda: counts()[0] >= before[0] + 5, "five flushes")
    assert counts()[1] == before[1] + 5


def test_figures_of_the_process(server: tuple[Server, int]) -> None:
    one, port = server
    shown = scrape(port)
    assert shown["pyvolume_loading_entries"] == {("done",): 2, ("found",): 2}
    assert shown["pyvolume_long_waits"] == {(): 0}
    assert shown["pyvolume_master_connected"] == {(): 0}
    assert shown["pyvolume_map_entries"][()] >= 1
    assert shown["pyvolume_map_bytes"][()] > 0
    assert {labels[0] for labels in shown["pyvolume_http_connections"]} == {"admin", "public"}
    wait_for(lambda: scrape(port)["pyvolume_gil_wait_seconds_count"][()] > 0, "a sample of the wait")
    assert one.process.poll() is None


def test_what_the_lane_does(server: tuple[Server, int]) -> None:
    one, port = server
    before = scrape(port)["pyvolume_lane_handed_over"]
    assert one.request("GET", "/status")[0] == 200
    after = scrape(port)["pyvolume_lane_handed_over"]
    assert sum(after.values()) > sum(before.values())


def test_the_progress_of_a_vacuum(tmp_path: Path) -> None:
    store = Store(ServerConfig())
    volume = create(tmp_path, 9)
    put(volume, 1, b"x" * 1000)
    metrics = ServerMetrics(ServerConfig())
    store.volumes = lambda: [volume]  # type: ignore[method-assign]
    figures = StoreFigures(metrics, store)
    figures.refresh()
    assert metrics.vacuum_progress.all_labels() == []
    volume.vacuum_offset = volume.stat().dat_bytes // 2
    figures._fresh_until = 0
    figures.refresh()
    assert metrics.vacuum_progress.value("9").value == pytest.approx(0.5, abs=0.01)
    volume.vacuum_offset = 0
    figures._fresh_until = 0
    figures.refresh()
    assert metrics.vacuum_progress.all_labels() == []
    volume.close()


def test_long_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ServerMetrics(ServerConfig())
    dog = Watchdog(limit_s=0.0, stacks=lambda: "")
    metrics.watch_locks(dog)
    with waiting_for("something"):
        dog.look()
        metrics._refresh_watched()
        assert metrics._waiting_long.value().value == 1
    metrics._refresh_watched()
    assert (metrics._long_waits.value().value, metrics._waiting_long.value().value) == (1, 0)


def test_the_scrape_of_a_stopped_server_is_gone(server: tuple[Server, int]) -> None:
    """Last in this file: an orderly stop takes the listener along with the process."""
    one, port = server
    one.send(signal.SIGTERM)
    assert one.exit_status() == 0
    with pytest.raises(OSError, match=r"."):
        scrape(port)
