"""Writes of volumes with replicas in the fast lane: requests and failures are those of the other lane."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_bench import HOST, LANE, Bench, serving

from pyvolume.server import lane as lane_module
from pyvolume.server.lane import watch_lane
from pyvolume.server.master_client import Location
from pyvolume.server.metrics import ServerMetrics
from pyvolume.server.side_http import metrics_page

pytestmark = pytest.mark.skipif(not LANE, reason="these are tests of the fast lane")

OCTETS = ("Content-Type", "application/octet-stream")
STORED = b'HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"size":5}'


class Replica:
    """A server that keeps its connections, notes requests and answers as it is told; None closes instead."""

    def __init__(self) -> None:
        self.answer: bytes | None = STORED
        self.before_that: list[bytes] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self.per_connection = 1000
        self.stall: threading.Event | None = None
        self.listener = socket.create_server((HOST, 0))
        self.url = f"{HOST}:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            data = b""
            for _ in range(self.per_connection):
                while b"\r\n\r\n" not in data:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, body = data.partition(b"\r\n\r\n")
                found = re.search(rb"Content-Length: (\d+)", head)
                length = int(found[1]) if found else 0
                while len(body) < length:
                    body += sock.recv(65536)
                data = body[length:]
                self.requests.append(head + b"\r\n\r\n" + body[:length])
                if self.stall is not None:
                    self.stall.wait(30)
                answer = self.before_that.pop(0) if self.before_that else self.answer
                if answer is None:
                    return
                sock.sendall(answer)


@contextmanager
def replicated(directory: Path, **settings: object) -> Iterator[tuple[Bench, Replica]]:
    replica = Replica()
    try:
        with serving(directory, **settings) as bench:
            bench.allocate(7, placement="001", known=False)
            bench.master.places[7] = [Location(bench.url), Location(replica.url)]
            yield bench, replica
    finally:
        replica.listener.close()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Bench, Replica]]:
    with replicated(tmp_path) as made:
        yield made


def copied(bench: Bench) -> int:
    assert bench.lane is not None
    return bench.lane.stats().copied


def handed_over(bench: Bench, reason: str) -> int:
    assert bench.lane is not None
    return bench.lane.stats().handed_over[reason]


def put(bench: Bench, fid: str, body: bytes = b"hello", query: str = "") -> int:
    return bench.ask("PUT", f"/{fid}{query}", (OCTETS,), body).status


def test_the_first_write_is_looked_at_and_the_next_ones_are_copied_here(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    assert copied(bench) == 0
    fids = [bench.fid(7) for _ in range(10)]
    assert [put(bench, fid, fid.encode()) for fid in fids] == [201] * 10
    assert copied(bench) == 10
    assert len(replica.requests) == 11
    for fid in fids:
        assert bench.ask("GET", f"/{fid}").body == fid.encode()
        assert sum(f"/{fid}?".encode() in request.partition(b"\r\n")[0] for request in replica.requests) == 1
    assert put(bench, fids[0], fids[0].encode()) == 204, "unchanged"
    assert len(replica.requests) == 12, "forwarded all the same"


SHAPES: list[tuple[str, str, list[tuple[str, str]], bytes]] = [
    ("PUT", "?ts=1700000000", [OCTETS], b"plain"),
    ("POST", "?ts=1700000000", [("Content-Type", "image/png")], b"\x89PNG of a kind"),
    ("PUT", "?ts=1700000000&fsync=true", [OCTETS], b"flushed"),
    ("PUT", ".png?ts=1700000000", [OCTETS], b"an extension"),
    ("PUT", "?ts=1700000000", [OCTETS, ("Content-Disposition", 'attachment; filename="a b;c.bin"')], b"quoted"),
    (
        "POST",
        "?ts=1700000000",
        [("Content-Type", "multipart/form-data; boundary=xx")],
        b'--xx\r\nContent-Disposition: form-data; name="file"; filename="x\\"y.bin"\r\n\r\nbytes\x00\xff\r\n--xx--\r\n',
    ),
    ("PUT", "?ts=1700000000", [OCTETS], b""),
]


def normalised(request: bytes) -> list[bytes]:
    boundary = re.search(rb"boundary=([0-9a-f]{60})", request)
    assert boundary is not None
    request = re.sub(rb"X-Amz-Request-Id: [0-9A-F]{24,}\r\n", b"", request.replace(boundary[1], b"*"))
    head, _, body = request.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    return [line, *sorted(fields), body]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_the_request_is_that_of_the_other_lane(
    both: tuple[Bench, Replica], shape: tuple[str, str, list[tuple[str, str]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, replica = both
    method, rest, headers, body = shape
    fid = bench.fid(7)
    path = f"/{fid}{rest}"
    first = bench.ask(method, path, headers, body)
    assert first.status == 201, first
    assert copied(bench) == 0
    second = bench.ask(method, path, headers, body)
    assert second.status == (204 if body else 201)
    assert copied(bench) == 1
    assert normalised(replica.requests[1]) == normalised(replica.requests[0])
    sent = re.search(rb"X-Amz-Request-Id: ([0-9A-F]+)\r\n", replica.requests[1])
    assert sent is not None
    assert sent[1].decode() == second.get("X-Amz-Request-Id")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("?ttl=3d", [OCTETS]),
        ("", [OCTETS, ("Seaweed-a", "1")]),
        ("", [OCTETS, ("Content-Disposition", "attachment; filename=\u00e9.bin")]),
        ("%41", [OCTETS]),
        ("", [OCTETS, ("Authorization", "Bearer x")]),
        ("", [OCTETS, ("Cookie", "AT=x")]),
        ("?cm=true", [OCTETS]),
    ],
    ids=["ttl", "pairs", "name", "escaped path", "token", "cookie", "manifest"],
)
def test_what_the_lane_cannot_tell_replicas_is_left_to_the_other(
    both: tuple[Bench, Replica], path: str, headers: list[tuple[str, str]]
) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    before = len(replica.requests)
    bench.ask("PUT", f"/{bench.fid(7)}{path}", headers, b"{}")
    assert copied(bench) == 0
    assert len(replica.requests) - before <= 1


ANSWERS: dict[str, bytes | None] = {
    "error": b'HTTP/1.1 500 Oops\r\nContent-Length: 15\r\n\r\n{"error":"full"}'[:-1] + b"}",
    "no json": b"HTTP/1.1 201 Created\r\nContent-Length: 3\r\n\r\nabc",
    "closed": None,
    "garbage": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_replica_that_refuses_is_told_by_the_other_lane(both: tuple[Bench, Replica], kind: str) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    replica.answer = ANSWERS[kind]
    fid = bench.fid(7)
    answer = bench.ask("PUT", f"/{fid}", (OCTETS,), b"hello")
    assert answer.status == 500
    assert f"failed to write to replicas for volume 7: [{replica.url}]: ".encode() in answer.body
    assert bench.ask("GET", f"/{fid}").body == b"hello", "what was written here stays"
    assert copied(bench) == 0
    assert handed_over(bench, "copy") == 1
    assert put(bench, bench.fid(7)) == 500
    assert handed_over(bench, "copy") == 1, "the lane does not try again by itself"
    replica.answer = STORED
    assert put(bench, bench.fid(7)) == 201
    assert copied(bench) == 0
    assert put(bench, bench.fid(7)) == 201
    assert copied(bench) == 1, "it does, once a write has gone through"


def test_a_write_that_goes_through_the_second_time_is_told_as_unchanged(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    refusal = ANSWERS["error"]
    assert refusal is not None
    replica.before_that = [refusal]
    fid = bench.fid(7)
    assert put(bench, fid) == 204
    assert [fid.encode() in request for request in replica.requests] == [False, True, True]
    assert bench.ask("GET", f"/{fid}").body == b"hello"


def test_a_dead_replica(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    replica.per_connection = 1
    replica.listener.close()
    replica.answer = None
    answer = bench.ask("PUT", f"/{bench.fid(7)}", (OCTETS,), b"hello")
    assert answer.status == 500
    assert b"failed to write to replicas for volume 7" in answer.body


def test_a_connection_closed_between_two_writes_is_no_failure(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    replica.per_connection = 1
    assert [put(bench, bench.fid(7)) for _ in range(8)] == [201] * 8
    assert copied(bench) == 7
    assert handed_over(bench, "copy") == 0


def test_connections_are_kept(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    for _ in range(60):
        assert put(bench, bench.fid(7)) == 201
    assert replica.connections <= 1 + 16, "one for each thread at most"


def test_a_route_does_not_last(both: tuple[Bench, Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _ = both
    monkeypatch.setattr(lane_module, "ROUTE_S", 0.0)
    assert [put(bench, bench.fid(7)) for _ in range(3)] == [201] * 3
    assert copied(bench) == 0


def test_a_hung_replica_does_not_hold_up_other_volumes(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    assert put(bench, bench.fid(7)) == 201
    replica.stall = threading.Event()
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(put(bench, bench.fid(7))), daemon=True) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert put(bench, bench.fid(1)) == 201
    replica.stall.set()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 40
    assert set(answers) <= {201, 204}


def test_fewer_replicas_than_the_volume_is_to_have_are_not_enough(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.allocate(7, placement="002", known=False)
        assert bench.lane is not None
        bench.lane._lane.replicas(7, ["127.0.0.1:1"], 10.0)
        assert put(bench, bench.fid(7)) == 500
        assert handed_over(bench, "copy") == 0


def test_servers_by_name_and_over_tls_are_for_the_other_lane(both: tuple[Bench, Replica]) -> None:
    bench, replica = both
    port = replica.url.rpartition(":")[2]
    bench.master.places[7] = [Location(bench.url), Location(f"localhost:{port}")]
    assert [put(bench, bench.fid(7)) for _ in range(3)] == [201] * 3
    assert copied(bench) == 0


def test_copied_writes_are_counted(both: tuple[Bench, Replica]) -> None:
    bench, _ = both
    metrics = ServerMetrics(bench.context.config)
    assert bench.lane is not None
    watch_lane(metrics, bench.lane)
    assert [put(bench, bench.fid(7)) for _ in range(4)] == [201] * 4
    text = metrics_page(metrics.registry, "", {}).body.decode()
    prefix = "SeaweedFS_volumeServer_replication"
    assert f'{prefix}_operations_total{{operation="write",result="success"}} 3\n' in text
    assert f'{prefix}_seconds_count{{operation="write"}} 3\n' in text
    assert f"{prefix}_targets_sum 3\n" in text
    assert f"{prefix}_targets_count 3\n" in text
    assert f'{prefix}_targets_bucket{{le="1"}} 3\n' in text


def test_writes_that_concern_no_other_server_count_as_of_no_target(both: tuple[Bench, Replica]) -> None:
    bench, _ = both
    metrics = ServerMetrics(bench.context.config)
    assert bench.lane is not None
    watch_lane(metrics, bench.lane)
    fid = bench.fid(1)
    assert put(bench, fid) == 201
    assert bench.ask("DELETE", f"/{fid}").status == 202
    assert put(bench, bench.fid(7), query="?type=replicate") == 201
    assert put(bench, bench.fid(7)) == 201
    assert put(bench, bench.fid(7)) == 201
    for _ in range(2):
        text = metrics_page(metrics.registry, "", {}).body.decode()
        assert "SeaweedFS_volumeServer_replication_targets_count 4\n" in text, "the fourth was not the lane's"
        assert "SeaweedFS_volumeServer_replication_targets_sum 1\n" in text


def test_who_may_not_write_is_not_copied_for(tmp_path: Path) -> None:
    from pyvolume.security_config import SecurityConfig

    with replicated(tmp_path) as (bench, replica):
        assert put(bench, bench.fid(7)) == 201
        bench.context.security = SecurityConfig(jwt_write_key=b"secret")
        assert put(bench, bench.fid(7)) == 401
        assert len(replica.requests) == 1
