"""What the fast lane answers is counted like everything else, once, and is on the page (operations.md 4.2, 5)."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest
from test_lifecycle import HOST, Server

from pyvolume.config import DirConfig, ServerConfig
from pyvolume.storage.store import Store
from pyvolume.types import ReplicaPlacement, Ttl
from tools.ports import free_port

READS = 3


def make_volume(directory: Path) -> None:
    directory.mkdir()
    store = Store(ServerConfig(ip=HOST, bind_ip=HOST, masters=(), dirs=(DirConfig(str(directory), "", 8),)))
    store.load()
    none = ReplicaPlacement.parse("000")
    store.allocate_volume(3, "", none, Ttl.NONE, preallocate=0, disk_type="", version=3)
    store.close()


def page_of(port: int, path: str) -> str:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("lane", ["true", "false"])
def test_reads_of_either_lane_are_counted_once(tmp_path: Path, lane: str) -> None:
    make_volume(tmp_path / "data")
    metrics_port = free_port()
    server = Server(tmp_path, f"-fastLane={lane}", f"-metricsPort={metrics_port}").started()
    try:
        assert server.request("PUT", "/3,01deadbeef?type=replicate", b"text")[0] == 201
        for _ in range(READS):
            assert server.request("GET", "/3,01deadbeef") == (200, b"text")
        for _ in range(2):  # looking must not count
            text = page_of(metrics_port, "/metrics")
            assert f'SeaweedFS_volumeServer_request_total{{code="200",type="GET"}} {READS}\n' in text
            assert f'SeaweedFS_volumeServer_request_seconds_count{{type="GET"}} {READS}\n' in text
            assert 'SeaweedFS_volumeServer_request_total{code="201",type="PUT"} 1\n' in text
            assert 'SeaweedFS_volumeServer_request_seconds_count{type="writeToLocalDisk"} 1\n' in text
            page = server.request("GET", "/ui/index.html")[1].decode()
            row = page.partition("Hourly # ReadRequests</th><td>")[2].partition("<")[0]
            assert sum(map(int, row.split(","))) == READS
    finally:
        server.end()
