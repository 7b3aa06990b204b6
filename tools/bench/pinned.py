"""The table of the fast lane: every server on CPU 0, the load generator on CPU 1, so that what counts is the server.

Rows are medians of `--rounds` turns. nginx serving files of the same sizes stands for what reads could cost at best; it
is measured if it is installed. "burning" is pyvolume with a Python thread that computes without end at the lowest
priority: it takes little of the CPU, but holds the interpreter's lock whenever it can.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.targets import HOST, Target

if TYPE_CHECKING:
    from tools.bench.__main__ import Bench

SERVER_CPU, LOAD_CPU = 0, 1
KIB, MIB = 1024, 1 << 20
IDLE_CONNECTIONS = 10_000
BURNING = """
import os, sys, threading
def burn():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    n = 0
    while True:
        n += 1
threading.Thread(target=burn, daemon=True).start()
from pyvolume.cli import main
sys.exit(main())
"""
NGINX = """
daemon off;
master_process off;
worker_processes 1;
pid {base}/nginx.pid;
error_log {base}/nginx.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    open_file_cache max=10000 inactive=600s;
    open_file_cache_valid 600s;
    server {{ listen {host}:{port}; root {root}; }}
}}
"""


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Whatever is started within runs on this CPU only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Nginx(Target):
    """Plain files under the names that the volume servers have for the same needles."""

    def start(self, data: Path, limit_s: float = 120.0) -> float:
        self.data = data
        (data / "root").mkdir()
        config = self.base / "nginx.conf"
        config.write_text(NGINX.format(base=self.base, host=HOST, port=self.port, root=data / "root"))
        began = time.monotonic()
        self.child = subprocess.Popen([*self.command, "-c", str(config)], stdin=subprocess.DEVNULL)
        while self.get_status("/") is None:
            if self.child.poll() is not None or time.monotonic() - began > limit_s:
                raise RuntimeError("nginx did not start")
            time.sleep(0.01)
        return time.monotonic() - began

    def add_file(self, path: str, size: int) -> None:
        assert self.data is not None
        (self.data / "root" / path.lstrip("/")).write_bytes(os.urandom(size))


def run(bench: Bench) -> None:
    """All rows. Needs two CPUs."""
    if len(os.sched_getaffinity(0)) < 2:
        bench.say("\n## Fast lane: not measured, it takes two CPUs\n")
        return
    a = bench.args
    bench.say(
        f"\n## Fast lane: server on CPU {SERVER_CPU}, load on CPU {LOAD_CPU}, {a.seconds} s a turn, {a.rounds} turns\n"
    )
    bench.say(
        "| what | connections | server | requests/s | p50 ms | p99 ms | CPU µs/request | errors | pyvolume / this |"
    )
    bench.say("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    for size, label, reads, writes in ((KIB, "1 KiB", (16, 64), 16), (4 * MIB, "4 MiB", (4,), 4)):
        group = [t for t in bench.volume_targets() if t.name != "pyvolume-wsgi"]
        readers = list(group)
        if size == KIB:
            readers.append(bench.target("pyvolume burning", [sys.executable, "-c", BURNING]))
        if nginx:
            like = bench.target("nginx", [nginx])
            readers.append(Nginx("nginx", [nginx], like.port, like.grpc_port, like.master, like.base))
        try:
            paths = {}
            for t in readers:
                data = bench.base / f"pinned-{t.name.replace(' ', '-')}-{size}"
                data.mkdir()
                with on_cpu(SERVER_CPU):
                    t.start(data)
                if isinstance(t, Nginx):
                    source = paths["pyvolume"]
                    for path in source.read_text().split():
                        t.add_file(path, size)
                    paths[t.name] = source
                else:
                    bench.allocate(t)
                    paths[t.name] = bench.fill(t, size)
            for connections in reads:
                rows(
                    bench,
                    f"GET {label}",
                    connections,
                    readers,
                    lambda t, c, p=paths: load(bench, t, c, "get", str(p[t.name])),
                )
            for verb, name in (("put", "PUT"), ("post", "POST form")):
                rows(
                    bench,
                    f"{name} {label}",
                    writes,
                    group,
                    lambda t, c, v=verb, s=size: write_load(bench, t, c, v, s),
                )
            if size == KIB:
                idle_connections(bench, group)
        finally:
            for t in readers:
                t.stop()
                if t.data is not None:
                    shutil.rmtree(t.data, ignore_errors=True)


def load(bench: Bench, t: Target, connections: int, *what: str) -> dict[str, Any]:
    """One turn of the load generator."""
    before = bench.args.connections
    bench.args.connections = connections
    try:
        with on_cpu(LOAD_CPU):
            return bench.run_load(t, *what)
    finally:
        bench.args.connections = before


def write_load(bench: Bench, t: Target, connections: int, verb: str, size: int) -> dict[str, Any]:
    result = load(bench, t, connections, verb, "/1,%llx01234567", str(size), str(bench.next_id))
    bench.next_id = result["last_id"] + 1000
    return result


def rows(bench: Bench, what: str, connections: int, group: list[Target], measure: Any) -> None:
    """Rows of one measure, the servers in turns."""
    results: dict[str, list[dict[str, Any]]] = {t.name: [] for t in group}
    for _ in range(bench.args.rounds):
        for t in group:
            results[t.name].append(measure(t, connections))
    rate = {n: statistics.median(r["requests"] / r["seconds"] for r in rs) for n, rs in results.items()}
    for name, rs in results.items():
        p50, p99 = (statistics.median(r[k] for r in rs) / 1000 for k in ("p50_us", "p99_us"))
        cpu = statistics.median(r["cpu_s"] * 1e6 / max(1, r["requests"]) for r in rs)
        errors = sum(r["errors"] for r in rs)
        bench.say(
            f"| {what} | {connections} | {name} | {rate[name]:,.0f} | {p50:.2f} | {p99:.2f} | {cpu:,.0f} | {errors} "
            f"| {rate['pyvolume'] / rate[name]:.2f} |"
        )


def idle_connections(bench: Bench, group: list[Target]) -> None:
    """Resident memory with many idle connections that had a request each."""
    lines = []
    for t in group:
        before, _ = t.memory_mib()
        held: list[socket.socket] = []
        try:
            for _ in range(IDLE_CONNECTIONS):
                sock = socket.create_connection((HOST, t.port), 20)
                held.append(sock)
                sock.sendall(b"HEAD /1,40001234567 HTTP/1.1\r\nHost: h\r\n\r\n")
                while b"\r\n\r\n" not in sock.recv(4096):
                    pass
            now, _ = t.memory_mib()
            each = (now - before) * KIB / len(held)
            lines.append(f"| {t.name} | {before:.1f} | {len(held):,} | {now:.1f} | {each:.2f} |")
        except OSError as exc:
            lines.append(f"| {t.name} | {before:.1f} | {len(held):,} | ended: {exc} | |")
        finally:
            for sock in held:
                sock.close()
    bench.say("\n| server | MiB before | idle connections | MiB with them | KiB each |\n|---|--:|--:|--:|--:|")
    for line in lines:
        bench.say(line)
    bench.say(
        "\n| what | connections | server | requests/s | p50 ms | p99 ms | CPU µs/request | errors | pyvolume / this |"
    )
    bench.say("|---|--:|---|--:|--:|--:|--:|--:|--:|")
