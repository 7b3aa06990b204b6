"""Profiles: what they hold, the formats that other tools read, and where they are served (operations.md 1.5, 5)."""

from __future__ import annotations

import gzip
import http.client
import json
import pstats
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_lifecycle import HOST, Server, connects, wait_for

from pyvolume.server import profiling
from pyvolume.server.profiling import Frame, Profile, Sampler, debug_page, folded_format, pprof_format, pstats_format
from tools.ports import free_port


def spin_for_a_profile(stop: threading.Event) -> int:
    count = 0
    while not stop.is_set():
        count += sum(range(200))
    return count


@pytest.fixture
def spinning() -> object:
    stop = threading.Event()
    thread = threading.Thread(target=spin_for_a_profile, args=(stop,), name="spinner-7")
    thread.start()
    yield thread
    stop.set()
    thread.join()


def sampled(until: Callable[[Profile], bool]) -> Profile:
    sampler = Sampler(0.005).start()
    end = time.monotonic() + 30
    while time.monotonic() < end and not until(sampler._profile):
        time.sleep(0.05)
    return sampler.stop()


def spin_seconds(profile: Profile) -> float:
    weights = [w[1] for stack, w in list(profile.weights.items()) if any(f.name == "spin_for_a_profile" for f in stack)]
    return sum(weights) / 1e9


def test_cpu_time_is_charged_to_the_thread_that_used_it(spinning: object) -> None:
    asleep = threading.Event()
    sleeper = threading.Thread(target=asleep.wait, name="sleeper")
    sleeper.start()
    profile = sampled(lambda so_far: spin_seconds(so_far) > 0.1)
    asleep.set()
    sleeper.join()
    assert spin_seconds(profile) > 0.1
    total = sum(weights[1] for weights in profile.weights.values())
    assert total < profile.duration_ns * 4
    names = {frame.name for stack in profile.weights for frame in stack}
    assert "[thread] spinner" in names
    assert "[thread] sleeper" not in names
    assert profile.duration_ns > 0
    assert Sampler(0.005).start().stop().weights is not profile.weights


def small_profile() -> Profile:
    inner = Frame("inner", "/x/a.py", 12, 10)
    outer = Frame("outer", "/x/b.py", 3, 1)
    profile = Profile((("samples", "count"), ("cpu", "nanoseconds")), period=10_000_000, default="cpu")
    profile.add((inner, outer), (2, 20_000_000))
    profile.add((outer,), (1, 10_000_000))
    profile.add((inner, outer), (1, 10_000_000))
    return profile


def test_folded_stacks() -> None:
    assert folded_format(small_profile()).decode().splitlines() == [
        "outer (b.py:3);inner (a.py:12) 30000000",
        "outer (b.py:3) 10000000",
    ]


def test_pstats_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "p.pstats"
    path.write_bytes(pstats_format(small_profile()))
    stats = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    calls, _, own, total, callers = stats["/x/a.py", 10, "inner"]
    assert (calls, round(own, 3), round(total, 3)) == (3, 0.03, 0.03)
    assert list(callers) == [("/x/b.py", 1, "outer")]
    _, _, own, total, _ = stats["/x/b.py", 1, "outer"]
    assert (round(own, 3), round(total, 3)) == (0.01, 0.04)


def fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(tag, value) of a protobuf message of varints and length-delimited fields."""
    out: list[tuple[int, int | bytes]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            out.append((key >> 3, varint()))
        else:
            assert key & 7 == 2
            size = varint()
            out.append((key >> 3, data[at : at + size]))
            at += size
    return out


def test_pprof_message_holds_it_all() -> None:
    top = fields(gzip.decompress(pprof_format(small_profile())))
    texts = [value.decode() for tag, value in top if tag == 6 and isinstance(value, bytes)]
    assert texts[0] == ""
    assert {"inner", "outer", "/x/a.py", "cpu", "nanoseconds"} <= set(texts)
    samples = [dict(fields(value)) for tag, value in top if tag == 2 and isinstance(value, bytes)]
    assert len(samples) == 2
    first = samples[0]
    assert isinstance(first[1], bytes) and len(first[1]) == 2, "two locations"
    locations = [dict(fields(value)) for tag, value in top if tag == 4 and isinstance(value, bytes)]
    functions = {
        dict(fields(value))[1]: dict(fields(value)) for tag, value in top if tag == 5 and isinstance(value, bytes)
    }
    line = dict(fields(locations[0][4]))  # type: ignore[arg-type]
    assert line[2] == 12
    assert texts[functions[line[1]][2]] == "inner"  # type: ignore[index]
    assert dict(top)[12] == 10_000_000
    assert texts[dict(top)[14]] == "cpu"  # type: ignore[index]


def test_stacks_of_all_threads(spinning: threading.Thread) -> None:
    text = profiling.stacks_text(grouped=False)
    assert f"thread {spinning.native_id} spinner-7:" in text
    assert "spin_for_a_profile" in text
    page = debug_page("/debug/pprof/goroutine", {"debug": "1"})
    assert page is not None and page.body.startswith(b"threads: total ")


def test_memory_by_type_and_by_line() -> None:
    page = debug_page("/debug/pprof/heap", {"debug": "1"})
    assert page is not None
    assert b"builtins.dict" in page.body
    kept: list[bytearray] = []
    timer = threading.Timer(0.1, lambda: kept.extend(bytearray(1000) for _ in range(3000)))
    timer.start()
    page = debug_page("/debug/pprof/heap", {"debug": "1", "seconds": "0.6"})
    timer.join()
    assert page is not None
    assert b"test_profiling.py:" in page.body
    assert len(kept) == 3000


def test_one_cpu_profile_at_a_time() -> None:
    with profiling._one_profile:
        page = debug_page("/debug/pprof/profile", {"seconds": "1"})
    assert page is not None
    assert (page.status, page.body) == (500, b"Could not enable CPU profiling: cpu profiling already in use\n")


def test_unknown_profile() -> None:
    page = debug_page("/debug/pprof/nope", {})
    assert page is not None
    assert (page.status, page.body) == (404, b"Unknown profile\n")
    assert debug_page("/debug/other", {}) is None


# --- of a whole server -----------------------------------------------------------------------------------------------


def get(port: int, path: str, limit_s: float = 20.0) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=limit_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_profiles_of_a_server(tmp_path: Path) -> None:
    debug_port, metrics_port = free_port(), free_port()
    server = Server(tmp_path, "-pprof", "-debug", f"-debug.port={debug_port}", f"-metricsPort={metrics_port}").started()
    try:
        text = f"Starting debug server for pprof at http://127.0.0.1:{debug_port}/debug/pprof/"
        assert text in server.lines()
        for port in (debug_port, metrics_port, server.port):
            assert get(port, "/debug/pprof/")[0] == 200
            status, headers, body = get(port, "/debug/pprof/goroutine?debug=2")
            assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
            assert b"Workers.handler_thread" in body
            assert "Server" not in headers
        assert get(server.port, "/debug/pprof")[0] == 307
        assert get(server.port, "/debug/pprof/profile?seconds=0.2&format=folded")[0] == 200
        assert get(debug_port, "/metrics")[0] == 200
        variables = json.loads(get(metrics_port, "/debug/vars")[2])
        assert {"SeaweedFS_volumeServer_max_volumes", "pyvolume_lane_connections", "pyvolume_lane_io_jobs"} <= set(
            variables
        )
        status, _, body = get(metrics_port, "/metrics")
        assert b'pyvolume_http_connections{port="admin"}' in body
    finally:
        server.end()


def test_nothing_of_it_without_flags(tmp_path: Path) -> None:
    server = Server(tmp_path).started()
    try:
        assert server.request("GET", "/debug/pprof/")[0] == 400
    finally:
        server.end()


def test_the_debug_listener_is_for_this_machine_only(tmp_path: Path) -> None:
    port = free_port()
    server = Server(tmp_path, "-ip.bind=0.0.0.0", "-debug", f"-debug.port={port}").started()
    try:
        wait_for(lambda: connects(HOST, port), "the listener")
        assert not connects("127.0.0.2", port)
        assert connects("127.0.0.2", server.port)
    finally:
        server.end()


def test_busy_ports(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(tmp_path, "-debug", f"-debug.port={port}").started()
        assert f"listen tcp 127.0.0.1:{port}: bind: address already in use" in server.log
        server.end()
        dead = Server(tmp_path, f"-metricsPort={port}")
        assert dead.exit_status() == 255
        assert f"listen tcp 127.0.0.1:{port}: bind: address already in use" in dead.log


def test_profiles_in_files(tmp_path: Path) -> None:
    cpu, memory = tmp_path / "cpu", tmp_path / "mem"
    server = Server(tmp_path, f"-cpuprofile={cpu}", f"-memprofile={memory}").started()
    server.request("GET", "/status")
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0
    assert fields(gzip.decompress(cpu.read_bytes()))
    assert fields(gzip.decompress(memory.read_bytes()))
    assert pstats.Stats(f"{cpu}.pstats").stats  # type: ignore[attr-defined]
    assert (tmp_path / "cpu.folded").read_text().strip()
    assert "bytes, blocks, line" in (tmp_path / "mem.txt").read_text()


def test_profile_file_that_cannot_be_made_is_fatal(tmp_path: Path) -> None:
    server = Server(tmp_path, f"-cpuprofile={tmp_path}/no/where")
    assert server.exit_status() == 255
    assert f"open {tmp_path}/no/where: no such file or directory" in server.log


def test_profiling_does_not_load_with_the_package() -> None:
    code = "import sys, pyvolume.config; sys.exit('tracemalloc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
