"""Connections that are opened and dropped at every point of a request leave no descriptor, thread or memory behind."""

from __future__ import annotations

import os
import random
import re
import shlex
import socket
import struct
import sys
import time
from pathlib import Path

from race.server import threads_and_fds

from tools.compat.bed import HOST, Bed, wait_for

CONNECTIONS = int(os.environ.get("PYVOLUME_DROPPED_CONNECTIONS", "2000"))
ROUNDS = 4
SLACK_BYTES = 16 << 20
BEGINNINGS = (
    b"",
    b"GET /1,1000",
    b"GET /1,100000001 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /1,300000001 HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: 100000\r\n\r\nabc",
    b"PUT /1,200000001 HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc",
    b"PUT /1,400000001 HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    b"POST /1,500000001 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 9\r\n"
    b"\r\n",
    b"DELETE /1,600000001 HTTP/1.1\r\nHost: x\r\n\r\nGET /status HTTP/1.1\r\nHost: x\r\n\r\nGET /",
    b"no HTTP at all\r\n\r\n",
)


def resident_bytes(bed: Bed) -> int:
    assert bed.server is not None
    status = Path(f"/proc/{bed.server.child.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def drop_some(port: int, count: int, rng: random.Random) -> None:
    for _ in range(count):
        with socket.create_connection((HOST, port), 20) as sock:
            data = rng.choice(BEGINNINGS)
            sock.sendall(data[: rng.randint(0, len(data))] if rng.random() < 0.3 else data)
            time.sleep(rng.choice((0, 0, 0.001, 0.005)))
            if rng.random() < 0.3:
                sock.shutdown(socket.SHUT_WR)
            if rng.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset


def test_dropped_connections_leave_nothing_behind(tmp_path: Path) -> None:
    rng = random.Random(1)
    # the idle timeout is far away: what is left until then counts as a leak
    with Bed(tmp_path, command=f"{shlex.quote(sys.executable)} -m pyvolume", flags=["-idleTimeout=600"]) as bed:
        bed.call("AllocateVolume", volume_id=1, replication="000", version=3)
        drop_some(bed.port, CONNECTIONS // ROUNDS, rng)
        assert wait_for(lambda: threads_and_fds(bed)[1] < 60, 20), threads_and_fds(bed)
        threads, files = threads_and_fds(bed)
        memory = resident_bytes(bed)
        for _ in range(ROUNDS - 1):
            drop_some(bed.port, CONNECTIONS // ROUNDS, rng)
            assert wait_for(lambda: threads_and_fds(bed)[1] <= files + 2, 20), (threads_and_fds(bed), files)
        assert threads_and_fds(bed)[0] <= threads + 2
        assert resident_bytes(bed) < memory + SLACK_BYTES
        assert bed.stop_server() == 0
