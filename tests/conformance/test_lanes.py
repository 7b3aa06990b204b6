"""Both lanes give the same bytes: every case of the table, the shapes the lane serves, and pipelines cut anywhere."""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from http_bench import HOST, TIMEOUT_S, Bench, serving
from http_cases import CASES, Case

from pyvolume._native.lane import Serve
from pyvolume.config import ServerConfig
from pyvolume.security_config import SecurityConfig
from pyvolume.server import lifecycle
from pyvolume.server.lane import watch_lane
from pyvolume.server.metrics import ServerMetrics
from pyvolume.server.signals import Inbox
from pyvolume.types import Ttl

OCTETS = ("Content-Type", "application/octet-stream")
BINARY = bytes(range(256))
QUIET_S = 0.05

_MASKS = (
    (re.compile(rb"X-Amz-Request-Id: [0-9A-F]+"), b"X-Amz-Request-Id: *"),
    (re.compile(rb"(Date|Last-Modified): [^\r]+"), rb"\1: *"),
    (re.compile(rb"boundary=[0-9a-f]{60}"), b"boundary=*"),
    (re.compile(rb"--[0-9a-f]{60}"), b"--*"),
)


def masked(data: bytes, bench: Bench) -> bytes:
    """Without what differs from one answer to the next, and between two servers."""
    for pattern, text in _MASKS:
        data = pattern.sub(text, data)
    for port in (bench.port, bench.public.port):
        data = data.replace(b"%s:%d" % (HOST.encode(), port), b"*:*")
    return data


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Bench]]:
    """The same server with the lane and without."""
    with ExitStack() as stack:
        servers = []
        for lane in (True, False):
            directory = tmp_path_factory.mktemp(f"lane-{lane}")
            settings: dict[str, Any] = {"file_size_limit_bytes": 2 << 20, "read_mode": "local", "fast_lane": lane}
            running = stack.enter_context(serving(directory, **settings))
            running.allocate(2)
            running.allocate(3, ttl="3d")
            running.allocate(4, collection="pics")
            running.allocate(5, placement="001")
            running.context.store.mark_readonly(2, can_delete=False, persist=False)
            servers.append(running)
        yield servers[0], servers[1]


def _request(bench: Bench, method: str, target: str, headers: tuple[tuple[str, str], ...], body: bytes | None) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {HOST}:{bench.port}", *(f"{k}: {v}" for k, v in headers)]
    if body is not None and not {k.lower() for k, _ in headers} & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")


def exchange(bench: Bench, data: bytes, *, public: bool = False, pieces: int = 1) -> bytes:
    """All that comes back for these bytes, sent in so many pieces. A last request that closes marks the end."""
    port = bench.public.port if public else bench.port
    data += b"GET /1,00 HTTP/1.1\r\nHost: end\r\nConnection: close\r\n\r\n"
    with socket.create_connection((HOST, port), TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cuts = sorted(random.sample(range(1, len(data)), pieces - 1)) if pieces > 1 else []
        sender = threading.Thread(target=_send, args=(sock, data, cuts))
        sender.start()
        out = b""
        try:
            while piece := sock.recv(1 << 18):
                out += piece
        except ConnectionResetError:
            pass
        sender.join()
    return masked(out, bench)


def _send(sock: socket.socket, data: bytes, cuts: list[int]) -> None:
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            sock.sendall(data[start:end])
            if cuts:
                time.sleep(0.002)  # so that the pieces arrive as pieces; what is checked does not depend on it
    except OSError:
        pass  # the server has hung up, as is its right after an error


def _both(pair: tuple[Bench, Bench], ask: Callable[[Bench], bytes]) -> bytes:
    with_lane, without = (ask(bench) for bench in pair)
    assert with_lane == without
    return with_lane


def _answered(bench: Bench) -> int:
    assert bench.lane is not None
    return sum(bench.lane.stats().requests.values())


def _is_page(case: Case) -> bool:
    """Pages tell of the server itself; they are none of the lane's, and differ between any two servers."""
    return any(step.target.startswith(("/status", "/ui")) for step in case.steps)


@pytest.mark.parametrize("case", [case for case in CASES if not _is_page(case)], ids=lambda case: case.name)
def test_every_case(pair: tuple[Bench, Bench], case: Case) -> None:
    fid = Bench.fid(case.volume)
    vid, hex_ = fid.split(",")
    key, cookie = hex_[:-8], hex_[-8:]
    words = {"fid": fid, "vid": vid, "hex": hex_, "key": key, "cookie": cookie, "etag": ""}
    words["other"] = f"{key}{int(cookie, 16) ^ 1:08x}"
    words["next1"], words["next2"] = (f"{int(key, 16) + i:x}{cookie}" for i in (1, 2))

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), text)

    for step in case.steps:
        headers = tuple((name, fill(value)) for name, value in step.headers)

        def ask(bench: Bench, step: Any = step, headers: tuple[tuple[str, str], ...] = headers) -> bytes:
            data = _request(bench, step.method, fill(step.target), headers, step.send)
            return exchange(bench, data, public=step.port == "public")

        answer = _both(pair, ask)
        found = re.search(rb'(?i)\r\netag: ("?[^\r"]*"?)\r', answer)
        if found is not None:
            words["etag"] = found[1].decode("latin-1")


def _shapes(fid: str, other: str) -> list[tuple[str, str, tuple[tuple[str, str], ...], bytes | None]]:
    """Requests about one file, most of them the lane's."""
    form = (
        b'--zz\r\nContent-Disposition: form-data; name="file"; filename="a b.bin"\r\n'
        b"Content-Type: application/x-thing\r\n\r\n" + BINARY + b"\r\n--zz--\r\n"
    )
    multipart = ("Content-Type", "multipart/form-data; boundary=zz")
    return [
        ("PUT", f"/{fid}?ts=1700000000", (OCTETS,), BINARY),
        ("PUT", f"/{fid}", (OCTETS,), BINARY),
        ("GET", f"/{fid}", (), None),
        ("HEAD", f"/{fid}", (("Origin", "http://x"),), None),
        ("GET", f"/{fid}", (("Range", "bytes=0-0"), ("Origin", "http://x")), None),
        ("GET", f"/{fid}", (("Range", "bytes=1-2,-3"),), None),
        ("GET", f"/{fid}", (("Range", "bytes=900-"),), None),
        ("GET", f"/{fid}", (("Range", "bytes=-0"),), None),
        ("GET", f"/{fid}", (("Range", "x"),), None),
        ("GET", f"/{fid}", (("If-Modified-Since", "Tue, 14 Nov 2023 22:13:20 GMT"),), None),
        ("GET", f"/{fid}.png", (("Accept-Encoding", "gzip"), ("User-Agent", "t")), None),
        ("GET", f"/{fid.replace(',', '/')}/name.txt", (), None),
        ("GET", f"/{fid}?dl=true", (), None),
        ("GET", f"/{fid}", (("X-Whatever", "1"),), None),
        ("POST", f"/{other}?ts=5&ttl=3d", (multipart,), form),
        ("POST", f"/{other}?type=replicate", (multipart,), form),
        ("POST", f"/{other}?fsync=true&ts=5", (multipart,), form),
        ("PUT", f"/{other}?fsync=false&ts=5", (OCTETS,), b"not flushed"),
        ("GET", f"/{other}", (("Connection", "keep-alive"),), None),
        ("PUT", f"/{other}?ts=6", (("Content-Type", "text/plain"),), b"text " * 100),
        ("GET", f"/{other}", (), None),
        ("GET", f"/{other}", (("Accept-Encoding", "gzip"),), None),
        ("POST", f"/{other}?ts=7", (("Content-Type", ""),), b""),
        ("PUT", f"/{other}?ts=8", (OCTETS, ("Content-Disposition", 'inline; filename="n.jpg"')), b"\xff\xd8\xff\xe0"),
        ("PUT", f"/{other}?ts=9", (OCTETS, ("Seaweed-Key", "v")), b"pairs"),
        ("GET", f"/{other}", (), None),
        ("DELETE", f"/{other}?type=replicate", (), None),
        ("GET", f"/{other}", (), None),
        ("GET", f"/{other}?readDeleted=true", (), None),
        ("DELETE", f"/{fid}", (), None),
        ("DELETE", f"/{fid}", (), None),
        ("GET", f"/{fid}", (), None),
    ]


@pytest.mark.parametrize("volume", [1, 2, 3, 4, 5, 77])
def test_shapes_one_by_one(pair: tuple[Bench, Bench], volume: int) -> None:
    before = _answered(pair[0])
    for shape in _shapes(Bench.fid(volume), Bench.fid(volume)):
        _both(pair, lambda bench, shape=shape: exchange(bench, _request(bench, *shape)))  # type: ignore[misc]
    if volume in (1, 3, 4):
        assert _answered(pair[0]) > before + 10


@pytest.mark.parametrize("seed", range(6))
def test_pipelines_cut_anywhere(pair: tuple[Bench, Bench], seed: int) -> None:
    """Requests of both lanes in one stream, in pieces that come one by one: the same answers in the same order."""
    random.seed(seed)
    fids = [Bench.fid() for _ in range(4)]
    stream = [shape for i in (0, 2) for shape in _shapes(fids[i], fids[i + 1])]
    head, rest = stream[:5], stream[5:]
    random.shuffle(rest)
    stream = head + rest
    data = [b"".join(_request(bench, *shape) for shape in stream) for bench in pair]
    for pieces in (1, 40):
        answers = [exchange(bench, one, pieces=pieces) for bench, one in zip(pair, data, strict=True)]
        assert answers[0] == answers[1]
        assert answers[0].count(b"HTTP/1.1 ") >= len(stream)


@pytest.mark.parametrize("size", [65_000, 1_000_000, 1_500_000])
def test_larger_files(pair: tuple[Bench, Bench], size: int) -> None:
    fid, data = Bench.fid(), BINARY * (size // 256)
    requests = [
        ("PUT", f"/{fid}?ts=1", (OCTETS,), data),
        ("GET", f"/{fid}", (), None),
        ("GET", f"/{fid}", (("Range", "bytes=70000-"),), None),
        ("PUT", f"/{fid}?ts=2", (OCTETS,), data),
    ]
    for request in requests:
        _both(pair, lambda bench, request=request: exchange(bench, _request(bench, *request)))  # type: ignore[misc]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"GARBAGE\r\n",
        b"GET /1,0 HTTP/1.1\r\n\r\n",
        b"GET /1,0 HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET /1,0 HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n",
        b"POST /1,0 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /1,0 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /1,0 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello\r\n",
        b"GET /1,0 HTTP/1.0\r\n\r\n",
        b"GET " + b"/1,0" * 4000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_odd_heads(pair: tuple[Bench, Bench], data: bytes) -> None:
    _both(pair, lambda bench: exchange(bench, data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET",
        b"GET /1,0 HTTP/1.1\r\nHost: h\r\n",
        b"PUT /1,01deadbeef HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nx",
    ],
)
def test_half_closed_connections(pair: tuple[Bench, Bench], data: bytes) -> None:
    def ask(bench: Bench) -> bytes:
        with socket.create_connection((HOST, bench.port), TIMEOUT_S) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            out = b""
            while piece := sock.recv(65536):
                out += piece
        return masked(out, bench)

    _both(pair, ask)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Bench]:
    with serving(tmp_path, fast_lane=True) as bench:
        yield bench


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_connection_comes_back(alone: Bench) -> None:
    assert alone.lane is not None
    fid, client = alone.fid(), alone.client()
    for _ in range(5):
        assert client.ask("GET", f"/{alone.fid()}").status == 404
        assert client.ask("PUT", f"/{fid}", (OCTETS,), os.urandom(9)).status == 201
    stats = alone.lane.stats()
    assert (stats.accepted, stats.given, stats.handed_over["needle"]) == (1, 5, 5)
    assert stats.requests == {(False, "PUT", 201): 5}
    client.close()
    _until(lambda: alone.lane is not None and alone.lane.stats().connections == 0)


def test_dropped_connections_leave_nothing(alone: Bench) -> None:
    lane = alone.lane
    assert lane is not None
    fid = alone.fid()
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), BINARY).status == 201
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        sockets = [socket.create_connection((HOST, alone.port)) for _ in range(200)]
        for i, sock in enumerate(sockets):
            sock.sendall(f"GET /{fid} HTTP/1.1\r\nHost: h\r\n\r\nGET /status HTTP/1.1\r\n".encode()[: i % 80])
        for sock in sockets:
            sock.close()
    _until(lambda: lane.stats().connections == 0 and alone.admin.server.stats.connections == 0)
    _until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert lane.stats().held_bytes == 0
    assert alone.ask("GET", f"/{fid}").body == BINARY


def test_settings_decide_what_is_served(alone: Bench) -> None:
    fid = alone.fid()
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201
    alone.context.security = SecurityConfig(white_list=("10.0.0.1",))
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), b"y").status == 401
    assert alone.ask("GET", f"/{fid}").body == b"x"
    alone.context.security = SecurityConfig(jwt_read_key=b"key")
    assert alone.ask("GET", f"/{fid}").status == 401
    alone.context.security = SecurityConfig()
    assert alone.ask("GET", f"/{fid}").body == b"x"
    assert alone.lane is not None
    assert alone.lane._may_serve(SecurityConfig()) == Serve.READS | Serve.WRITES


def test_flushed_writes_are_served_and_found(alone: Bench) -> None:
    assert alone.lane is not None
    fids = [alone.fid() for _ in range(40)]

    def write(mine: list[str]) -> None:
        client = alone.client()
        for fid in mine:
            assert client.ask("PUT", f"/{fid}?fsync=true", (OCTETS,), fid.encode()).status == 201
            assert client.ask("PUT", f"/{fid}?fsync=true", (OCTETS,), fid.encode()).status == 204
        client.close()

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(write, (fids[i::20] for i in range(20))))
    assert alone.lane.stats().requests == {(False, "PUT", 201): 40, (False, "PUT", 204): 40}
    assert alone.lane.stats().io_jobs == 80
    assert [alone.ask("GET", f"/{fid}").body for fid in fids] == [fid.encode() for fid in fids]


@pytest.mark.parametrize(("query", "stored"), [("", "3d"), ("?ttl=5m", "5m"), ("?ttl=nothing", "3d")])
def test_a_needle_without_ttl_takes_the_volumes(alone: Bench, query: str, stored: str) -> None:
    alone.allocate(3, ttl="3d")
    fid = alone.fid(3)
    assert alone.ask("PUT", f"/{fid}{query}", (OCTETS,), b"x").status == 201
    assert alone.lane is not None and alone.lane.stats().requests == {(False, "PUT", 201): 1}
    volume = alone.context.store.find_volume(3)
    assert volume is not None
    needle = volume.read_needle(int(fid.split(",")[1][:-8], 16))
    assert str(Ttl(needle.ttl_count, needle.ttl_unit)) == stored


def test_marks_and_unmounts_are_seen_at_once(alone: Bench) -> None:
    fid = alone.fid()
    store = alone.context.store
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201
    store.mark_readonly(1, can_delete=False, persist=False)
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), b"y").status == 500
    assert alone.ask("DELETE", f"/{fid}").status == 500
    store.mark_writable(1)
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), b"z").status == 201
    store.unmount_volume(1)
    assert alone.ask("GET", f"/{fid}").status == 404
    store.mount_volume(1)
    assert alone.ask("GET", f"/{fid}").body == b"z"


def test_a_stop_answers_what_has_begun(tmp_path: Path) -> None:
    with serving(tmp_path, fast_lane=True) as bench:
        fid = bench.fid()
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), BINARY).status == 201
        idle, begun = bench.client(), bench.client()
        assert idle.ask("GET", f"/{fid}").status == 200
        begun.send(f"GET /{fid} HTTP/1.1\r\nHo".encode())
        _until(lambda: bench.lane is not None and bench.lane.stats().connections == 2)
        assert bench.lane is not None
        bench.lane.quiesce()
        assert idle.connect().recv(1) == b""
        begun.send(b"st: h\r\n\r\n")
        assert begun.read().body == BINARY
        with pytest.raises(ConnectionRefusedError):
            bench.client().connect()


def test_metrics_count_each_request_once(alone: Bench) -> None:
    assert alone.lane is not None
    metrics = ServerMetrics(cast("ServerConfig", SimpleNamespace(**vars(alone.context.config))))
    watch_lane(metrics, alone.lane)
    fid = alone.fid()
    assert alone.ask("PUT", f"/{fid}", (OCTETS,), BINARY).status == 201
    for _ in range(3):
        assert alone.ask("GET", f"/{fid}").status == 200
        metrics.registry.gather()
    assert metrics.request_total.value("200", "GET").value == 3
    assert metrics.request_total.value("201", "PUT").value == 1
    counts, seconds = metrics.request_seconds.distribution("GET").read()
    assert counts[-1] == 3
    assert 0 < seconds < TIMEOUT_S


def reloaded(bench: Bench, security: SecurityConfig) -> None:
    """What SIGHUP does, with settings that the files would give."""
    process = lifecycle.Process(cast("Any", None), Inbox(), {})
    process.context, process._lane = bench.context, bench.lane
    process._loader = cast("Any", SimpleNamespace(reload=lambda _current: security))
    process._reload()
    assert bench.context.security is security


@pytest.mark.parametrize(
    ("security", "method"),
    [
        (SecurityConfig(jwt_read_key=b"k"), "GET"),
        (SecurityConfig(jwt_read_key=b"k"), "HEAD"),
        (SecurityConfig(jwt_write_key=b"k"), "PUT"),
        (SecurityConfig(jwt_write_key=b"k"), "DELETE"),
        (SecurityConfig(white_list=("10.9.9.9",)), "PUT"),
        (SecurityConfig(white_list=("10.9.9.9",)), "DELETE"),
    ],
)
def test_a_reload_was_over_before_the_lane_had_heard_of_it(
    tmp_path: Path, security: SecurityConfig, method: str
) -> None:
    """Idle connections, heads cut in two and a body cut in two: what ends after the reload goes by the new settings."""
    with serving(tmp_path, fast_lane=True) as bench, ExitStack() as stack:
        assert bench.lane is not None
        bench.context.lane = None  # type: ignore[attr-defined] # the reload tells the lane, nobody else
        targets = [f"/{bench.fid()}" for _ in range(4)]
        for target in targets:
            assert bench.ask("PUT", target, (OCTETS,), BINARY).status == 201
        length = f"Content-Length: {len(BINARY)}\r\n" if method == "PUT" else ""
        body = BINARY if method == "PUT" else b""
        clients = [bench.client() for _ in targets]
        for client in clients:
            stack.callback(client.close)
            assert client.ask("GET", targets[0]).status == 200
        before = bench.lane.stats().accepted
        assert before == len(targets) + len(clients), "all are the lane's"
        whole = [f"{method} {target} HTTP/1.1\r\nHost: h\r\n{length}\r\n".encode() + body for target in targets]
        cuts = (0, 9, len(whole[2]) - len(body) - 2, len(whole[3]) - max(1, len(body) // 2))
        for client, data, cut in zip(clients, whole, cuts, strict=True):
            client.send(data[:cut])
        served = sum(bench.lane.stats().requests.values())
        reloaded(bench, security)
        for client, data, cut in zip(clients, whole, cuts, strict=True):
            client.send(data[cut:])
            assert client.read(method).status == 401
        assert sum(bench.lane.stats().requests.values()) == served
        reloaded(bench, SecurityConfig())
        assert bench.ask(method, targets[0], (), body or None).status in (200, 202, 204)
        assert sum(bench.lane.stats().requests.values()) > served, "what is allowed again is the lane's again"
