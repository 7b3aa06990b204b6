"""Pages about the server, its health, and what is counted (contract http.md 12, operations.md 4.2; departure P1)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, serving

from pyvolume.ops.context import Events
from pyvolume.server.http_pages import ReadCounts

OCTETS = ("Content-Type", "application/octet-stream")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving(tmp_path_factory.mktemp("pages"), fast_lane=False) as running:  # what Python counts is looked at
        yield running


def test_health_follows_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        for target in ("/healthz", "/readyz"):
            assert (bench.ask("GET", target).status, bench.ask("GET", target).body) == (200, b"")
        bench.context.awaiting_master = True
        assert bench.ask("GET", "/healthz").body == b"no master has answered yet\n"
        bench.context.awaiting_master = False
        bench.context.stopping.set()
        for target in ("/healthz", "/readyz"):
            reply = bench.ask("GET", target)
            assert (reply.status, reply.body, reply.get("Content-Type")) == (503, b"", None)
        assert bench.ask("GET", "/status").status == 200


def test_status_tells_volumes_and_disks(bench: Bench, tmp_path: Path) -> None:
    bench.allocate(9, placement="001", ttl="3d", collection="pics")
    fid = bench.fid(9)
    bench.ask("PUT", f"/{fid}?type=replicate", (OCTETS,), b"x" * 100)
    document = json.loads(bench.ask("GET", "/status").body)
    assert list(document) == ["DiskStatuses", "Version", "Volumes"]
    disk = document["DiskStatuses"][0]
    assert {"dir", "all", "used", "free", "percent_free", "percent_used"} <= set(disk)
    assert disk["all"] == disk["used"] + disk["free"]
    assert [volume["Id"] for volume in document["Volumes"]] == [1, 9]
    volume = document["Volumes"][1]
    assert list(volume) == [
        "Collection", "DiskType", "RemoteStorageName", "ReplicaPlacement", "Ttl", "Size", "DeletedByteCount",
        "ModifiedAtSecond", "Id", "DiskId", "CompactRevision", "FileCount", "DeleteCount", "Version", "ReadOnly",
    ]  # fmt: skip
    assert (volume["Collection"], volume["ReplicaPlacement"], volume["Ttl"]) == (
        "pics",
        {"node": 1},
        {"Count": 3, "Unit": 3},
    )
    assert (volume["FileCount"], volume["ReadOnly"], volume["Version"]) == (1, False, 3)


def test_status_without_volumes_is_null(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.context.store.delete_volume(1)
        assert json.loads(bench.ask("GET", "/status").body)["Volumes"] is None


def test_long_documents_are_chunked_and_short_ones_are_not(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        assert bench.ask("GET", "/status").get("Transfer-Encoding") is None
        for vid in range(10, 16):
            bench.allocate(vid)
        reply = bench.ask("GET", "/status")
        assert (reply.get("Transfer-Encoding"), reply.get("Content-Length")) == ("chunked", None)


def test_the_ui_lists_what_is_there(bench: Bench) -> None:
    bench.allocate(12, collection="<b>")
    page = bench.ask("GET", "/ui/index.html").body.decode()
    assert "<title>SeaweedFS 30GB 4.44 </title>" in page
    for words in ("Disk Stats", "System Stats", "Volumes", "Masters", "Up Time", "Last Minute # ReadRequests"):
        assert words in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_static_directories(bench: Bench) -> None:
    assert 'href="css/"' in bench.ask("GET", "/seaweedfsstatic/bootstrap/3.3.1/").body.decode()
    moved = bench.ask("GET", "/seaweedfsstatic/bootstrap/3.3.1")
    assert (moved.status, moved.get("Location")) == (301, "3.3.1/")
    style = bench.ask("GET", "/seaweedfsstatic/bootstrap/3.3.1/css/bootstrap.min.css")
    assert (style.status, style.get("Content-Type")) == (200, "text/css; charset=utf-8")
    head = bench.ask("HEAD", "/seaweedfsstatic/seaweed50x50.png")
    assert (head.status, head.get("Content-Type"), head.body) == (200, "image/png", b"")
    assert bench.ask("GET", "/favicon.ico", (("Range", "bytes=999999-"),)).status == 416


def test_read_counts_move_through_their_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000_000.0]
    monkeypatch.setattr("pyvolume.server.http_pages.time.time", lambda: now[0])
    counts = ReadCounts()
    for _ in range(3):
        counts.count()
    now[0] += 1
    counts.count()
    series = dict(counts.series())
    assert list(series) == ["Weekly", "Daily", "Hourly", "Last Minute"]
    assert series["Last Minute"][-2:] == [3, 1]
    assert [sum(slots) for slots in series.values()] == [4] * 4
    assert [len(slots) for slots in series.values()] == [7, 24, 60, 60]
    now[0] += 120
    assert sum(dict(counts.series())["Last Minute"]) == 0
    assert sum(dict(counts.series())["Hourly"]) == 4
    now[0] += 8 * 86400
    assert [sum(slots) for _, slots in counts.series()] == [0] * 4


class Recorded(Events):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def handler(self, kind: str) -> None:
        self.seen.append(("handler", kind))

    def read_failure(self) -> None:
        self.seen.append(("read_failure",))

    def invalid_needle(self) -> None:
        self.seen.append(("invalid_needle",))

    def write_failure(self) -> None:
        self.seen.append(("write_failure",))

    def request_begins(self, method: str) -> None:
        self.seen.append(("begins", method))

    def in_flight_ended(self, method: str) -> None:
        self.seen.append(("in_flight_ended", method))

    def request_ended(self, method: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append(("ended", method, status))

    def local_write(self, seconds: float) -> None:
        self.seen.append(("local_write",))

    def replicated(self, operation: str, targets: int) -> None:
        self.seen.append(("replicated", operation, targets))


@pytest.fixture
def recorded(bench: Bench) -> Iterator[Recorded]:
    before, events = bench.ops.events, Recorded()
    bench.ops.events = events
    yield events
    bench.ops.events = before


def around(method: str, status: int, *inside: tuple[object, ...], label: str | None = None) -> list[tuple[object, ...]]:
    return [("begins", method), *inside, ("in_flight_ended", method), ("ended", label or method, status)]


def test_requests_are_counted(bench: Bench, recorded: Recorded) -> None:
    fid = bench.fid()
    not_found = (("read_failure",), ("handler", "errorGetNotFound"))
    bench.ask("PUT", f"/{fid}", (OCTETS,), b"x")
    assert recorded.seen == around("PUT", 201, ("local_write",), ("replicated", "write", 0))
    recorded.seen.clear()
    bench.ask("GET", f"/{fid}")
    assert recorded.seen == around("GET", 200)
    recorded.seen.clear()
    bench.ask("GET", f"/{bench.fid()}")
    assert recorded.seen == around("GET", 404, ("invalid_needle",), *not_found)
    recorded.seen.clear()
    bench.ask("DELETE", f"/{fid}")
    assert recorded.seen == around("DELETE", 202, ("replicated", "delete", 0))
    recorded.seen.clear()
    bench.ask("GET", f"/{fid}")
    assert recorded.seen == around("GET", 404, *not_found), "a deleted needle is no invalid one"
    recorded.seen.clear()
    bench.ask("PATCH", f"/{fid}")
    assert recorded.seen == around("PATCH", 400, label="INVALID")
    recorded.seen.clear()
    bench.ask("PUT", "/x,01deadbeef", (OCTETS,), b"x")
    assert recorded.seen == around("PUT", 400, ("write_failure",))
    recorded.seen.clear()
    for target in ("/status", "/healthz", "/favicon.ico"):
        bench.ask("GET", target)
    assert not recorded.seen
