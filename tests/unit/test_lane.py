"""The lane's wrapper and its glue: threads by configuration, refusals, what is served by which settings."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyvolume._native import engine, http, lane
from pyvolume.config import ServerConfig
from pyvolume.ops.peers import PeerClient
from pyvolume.security_config import SecurityConfig
from pyvolume.server import lane as glue
from pyvolume.server.metric_types import Distribution


def make(registry: engine.Registry, **changes: Any) -> lane.Lane:
    options: dict[str, Any] = {
        "server": "S",
        "size_limit_bytes": 1 << 20,
        "body_bytes": 1 << 20,
        "budget_bytes": 1 << 22,
        "idle_timeout_s": 30.0,
        "threads": 1,
        "io_threads": 1,
        "sync_threads": 1,
        "max_connections": 10,
        "mailbox": 4,
        "fix_orientation": False,
        "serve": lane.Serve.READS | lane.Serve.WRITES,
    }
    return lane.Lane(registry, http.MimeTable(), **{**options, **changes})


def listener() -> tuple[int, int]:
    """(descriptor, port)"""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    port = sock.getsockname()[1]
    return sock.detach(), port


def lane_threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue  # it has ended meanwhile
    return [name for name in names if name.startswith("lane")]


def take(one: lane.Lane) -> list[lane.Handed] | None:
    """Waits for something to take."""
    poller = select.poll()
    poller.register(one.mail_fd, select.POLLIN)
    assert poller.poll(60_000)
    return one.take()


@pytest.fixture
def running() -> Iterator[tuple[lane.Lane, int]]:
    one = make(engine.Registry())
    fd, port = listener()
    one.listen(fd, public=False)
    one.start()
    yield one, port
    one.stop(1.0)


def test_number_of_threads() -> None:
    before = len(lane_threads())
    one = make(engine.Registry(), threads=3, io_threads=2, sync_threads=4)
    fd, _ = listener()
    one.listen(fd, public=False)
    one.start()
    assert len(lane_threads()) == before + 9
    assert one.stop(1.0) == 0
    assert len(lane_threads()) == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "changes", [{"threads": 0}, {"threads": 65}, {"io_threads": 0}, {"sync_threads": 0}, {"mailbox": 0}]
)
def test_options_out_of_range(changes: dict[str, int]) -> None:
    with pytest.raises(lane.LaneError, match="PV_EINVAL"):
        make(engine.Registry(), **changes)


def test_more_listeners_than_ports() -> None:
    one = make(engine.Registry())
    for _ in range(2):
        one.listen(listener()[0], public=False)
    fd, _ = listener()
    with pytest.raises(lane.LaneError, match="too many"):
        one.listen(fd, public=True)
    os.close(fd)


def test_handed_over_and_given_back(running: tuple[lane.Lane, int]) -> None:
    one, port = running
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"PATCH / HTTP/1.1\r\n")
        (handed,) = take(one) or ()
        assert handed.data == b"PATCH / HTTP/1.1\r\n"
        assert (handed.peer, handed.public, handed.served) == (sock.getsockname(), False, False)
        assert lane.Reason(handed.reason) is lane.Reason.HEAD
        assert one.give(handed.fd, public=False, lenient=True)
        sock.sendall(b"\r\n")
        (handed,) = take(one) or ()
        assert (handed.data, handed.served, handed.lenient) == (b"\r\n", True, True)
        os.close(handed.fd)
    stats = one.stats()
    assert (stats.accepted, stats.given, stats.handed_over["head"]) == (1, 1, 2)


def test_a_connection_that_came_back_to_a_sleeping_thread_was_never_idle() -> None:
    """Nobody wakes the thread for it, so the thread must not sleep for longer than such a connection may be idle."""
    one = make(engine.Registry(), idle_timeout_s=0.5)
    fd, port = listener()
    one.listen(fd, public=False)
    one.start()
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(b"PATCH / HTTP/1.1\r\n")
        (handed,) = take(one) or ()
        assert one.give(handed.fd, public=False, lenient=False)
        assert sock.recv(1) == b""
    assert one.stats().idle_closed == 1
    one.stop(1.0)


def test_a_taker_is_told_of_the_end(running: tuple[lane.Lane, int]) -> None:
    one, _ = running
    told: list[object] = []
    taker = threading.Thread(target=lambda: told.append(take(one)))
    taker.start()
    one.quiesce()
    taker.join(10)
    assert told == [None]
    assert one.take() is None
    assert not one.give(0, public=False, lenient=False)


@pytest.mark.parametrize(
    ("security", "limits", "serve"),
    [
        (SecurityConfig(), (0, 0), lane.Serve.READS | lane.Serve.WRITES),
        (SecurityConfig(jwt_write_key=b"k"), (0, 0), lane.Serve.READS),
        (SecurityConfig(white_list=("10.0.0.1",)), (0, 0), lane.Serve.READS),
        (SecurityConfig(jwt_read_key=b"k"), (0, 0), lane.Serve.WRITES),
        (SecurityConfig(), (1, 0), lane.Serve.READS),
        (SecurityConfig(), (0, 1), lane.Serve.WRITES),
        (SecurityConfig(jwt_write_key=b"k", jwt_read_key=b"k"), (0, 0), lane.Serve.NOTHING),
    ],
)
def test_what_settings_allow(security: SecurityConfig, limits: tuple[int, int], serve: lane.Serve) -> None:
    ops = SimpleNamespace(
        uploads=SimpleNamespace(limit_bytes=limits[0]),
        downloads=SimpleNamespace(limit_bytes=limits[1]),
        peers=PeerClient(),
        mime=http.MimeTable(),
    )
    context = SimpleNamespace(
        config=ServerConfig(), security=security, store=SimpleNamespace(registry=engine.Registry())
    )
    fast = glue.FastLane(cast("Any", context), cast("Any", SimpleNamespace(ops=ops, counts=None)), None)
    assert fast._may_serve(security) == serve


def test_distributions_take_counts_of_the_same_bounds_only() -> None:
    distribution = Distribution((1.0, 2.0))
    distribution.add([1, 2, 3], 9.0)
    distribution.observe(1.5)
    assert distribution.read() == ([1, 4, 7], 10.5)
    with pytest.raises(ValueError, match="bounds"):
        distribution.add([1, 2], 1.0)


def test_buckets_are_those_of_the_metrics() -> None:
    from pyvolume.server.metrics import BUCKETS

    assert len(BUCKETS) + 1 == lane.BUCKETS
