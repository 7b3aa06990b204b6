"""`make bench`: throughput, latency and cost at 16 connections; start with ten million needles, vacuum, deletion,
erasure coding.

Every figure of a table is measured in the same run, the servers in turns, one loaded at a time; what counts is the
ratio. WEED_BIN and WEED_VOLUME_RUST add the reference servers. Results go to the terminal and to bench-results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench import moving, pinned, storage, targets
from tools.bench.ec import EcBench
from tools.bench.targets import HOST, Target
from tools.ports import free_ports

NEEDLES_FOR_READS = {1024: 2000, 4 << 20: 24}
VID = 1


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.base = targets.workspace()
        self.load = targets.build_load(self.base)
        self.lines: list[str] = []
        self.next_id = 1 << 20
        port, grpc_port = free_ports(2)
        self.master_address = f"{HOST}:{port}.{grpc_port}"
        self.master_http = f"{HOST}:{port}"
        argv = [sys.executable, "-m", "pyvolume.devmaster", f"-ip={HOST}", f"-port={port}", f"-port.grpc={grpc_port}"]
        with (self.base / "master.log").open("wb") as log:
            self.master = subprocess.Popen([*argv, "-volumeSizeLimitMB=30000"], stdout=log, stderr=log, cwd=self.base)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                socket.create_connection((HOST, grpc_port), 1).close()
                break
            except OSError:
                time.sleep(0.05)

    def close(self) -> None:
        self.master.terminate()
        self.master.wait(10)
        shutil.rmtree(self.base, ignore_errors=True)

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)

    def target(self, name: str, command: list[str], bare_body_bytes: int | None = None) -> Target:
        port, grpc_port = free_ports(2)
        return Target(name, command, port, grpc_port, self.master_address, self.base, bare_body_bytes)

    def volume_targets(self) -> list[Target]:
        own = [self.target("pyvolume", targets.pyvolume_command())]
        if self.args.wsgi:
            own.append(self.target("pyvolume-wsgi", [*targets.pyvolume_command(), "-fastLane=false"]))
        return own + [self.target(n, c) for n, c in targets.references()]

    # -- one measurement
    def run_load(self, t: Target, *what: str) -> dict[str, Any]:
        cpu = t.cpu_s()
        argv = [str(self.load), HOST, str(t.port), str(self.args.connections), str(self.args.seconds), *what]
        out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        result: dict[str, Any] = json.loads(out)
        result["cpu_s"] = t.cpu_s() - cpu
        return result

    def allocate(self, t: Target, vid: int = VID, replication: str = "000") -> None:
        import grpc

        from tools.compat.bed import unary_call

        with grpc.insecure_channel(f"{HOST}:{t.grpc_port}") as channel:
            grpc.channel_ready_future(channel).result(30)
            unary_call(channel, "AllocateVolume", volume_id=vid, replication=replication, version=3)

    def fill(self, t: Target, size: int) -> Path:
        """Uploads the needles that reads will ask for; returns the file of their paths."""
        paths = self.base / f"paths-{t.name}-{size}.txt"
        import http.client

        body = os.urandom(size)
        conn = http.client.HTTPConnection(HOST, t.port, timeout=30)
        lines = []
        for i in range(NEEDLES_FOR_READS[size]):
            fid = f"/{VID},{size + i:x}01234567"
            if t.bare_body_bytes is None:
                conn.request("PUT", fid, body, {"Content-Type": "application/octet-stream"})
                reply = conn.getresponse()
                reply.read()
                if reply.status != 201:
                    raise RuntimeError(f"{t.name}: PUT {fid} answered {reply.status}")
            lines.append(fid)
        conn.close()
        paths.write_text("\n".join(lines) + "\n")
        return paths

    # -- tables
    def throughput(self) -> None:
        a = self.args
        self.say(f"## Requests at {a.connections} connections, {a.seconds} s a turn, {a.rounds} turns each, median\n")
        self.say(
            "| what | server | requests/s | MiB/s | p50 ms | p99 ms | CPU µs/request | errors | ratio to pyvolume |"
        )
        self.say("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for size, label in ((1024, "1 KiB"), (4 << 20, "4 MiB")):
            bare = [sys.executable, str(Path(__file__).with_name("bare_app.py"))]
            group = [*self.volume_targets(), self.target("bare", bare, size)]
            reads: dict[str, Path] = {}
            try:
                for t in group:
                    data = self.base / f"data-{t.name}-{size}"
                    data.mkdir()
                    t.start(data)
                    if t.bare_body_bytes is None:
                        self.allocate(t)
                    reads[t.name] = self.fill(t, size)
                self.table_rows(f"GET {label}", group, lambda t, r=reads: self.run_load(t, "get", str(r[t.name])))
                for verb, name in (("put", "PUT"), ("post", "POST form")):
                    self.table_rows(f"{name} {label}", group, lambda t, v=verb, s=size: self.write_load(t, v, s))
            finally:
                for t in group:
                    t.stop()
                    shutil.rmtree(self.base / f"data-{t.name}-{size}", ignore_errors=True)
        self.replicated()

    def replicated(self) -> None:
        """Writes of a volume with placement 001, all to one of two servers of the same kind. CPU is that of both."""
        first, second = self.volume_targets(), self.volume_targets()
        partners = {t.name: other for t, other in zip(first, second, strict=True)}
        vids = {t.name: 100 + number for number, t in enumerate(first)}
        try:
            for t in first:
                for place, server in (("a", t), ("b", partners[t.name])):
                    data = self.base / f"data-{t.name}-{place}"
                    data.mkdir()
                    server.start(data)
                    self.allocate(server, vids[t.name], "001")
                self.wait_for_copies(vids[t.name])

            def measure(t: Target) -> dict[str, Any]:
                other = partners[t.name]
                cpu = other.cpu_s()
                result = self.run_load(t, "put", f"/{vids[t.name]},%llx01234567", "1024", str(self.next_id))
                self.next_id = result["last_id"] + 1000
                result["cpu_s"] += other.cpu_s() - cpu
                return result

            self.table_rows("PUT 1 KiB replicated 001", first, measure)
        finally:
            for t in (*first, *second):
                t.stop()

    def wait_for_copies(self, vid: int) -> None:
        import urllib.request

        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://{self.master_http}/dir/lookup?volumeId={vid}", timeout=5) as reply:
                    if len(json.loads(reply.read()).get("locations", [])) == 2:
                        return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the master does not know both copies of volume {vid}")

    def write_load(self, t: Target, verb: str, size: int) -> dict[str, Any]:
        result = self.run_load(t, verb, f"/{VID},%llx01234567", str(size), str(self.next_id))
        self.next_id = result["last_id"] + 1000
        return result

    def table_rows(self, what: str, group: list[Target], measure: Callable[[Target], dict[str, Any]]) -> None:
        results: dict[str, list[dict[str, Any]]] = {t.name: [] for t in group}
        for _ in range(self.args.rounds):
            for t in group:
                results[t.name].append(measure(t))
        rate = {n: statistics.median(r["requests"] / r["seconds"] for r in rs) for n, rs in results.items()}
        for name, rs in results.items():
            mib = statistics.median(r["bytes"] / r["seconds"] for r in rs) / (1 << 20)
            p50, p99 = (statistics.median(r[k] for r in rs) / 1000 for k in ("p50_us", "p99_us"))
            cpu = statistics.median(r["cpu_s"] * 1e6 / max(1, r["requests"]) for r in rs)
            errors = sum(r["errors"] for r in rs)
            ratio = rate[name] / rate["pyvolume"]
            self.say(
                f"| {what} | {name} | {rate[name]:,.0f} | {mib:,.1f} | {p50:.2f} | {p99:.2f} | {cpu:,.0f} | {errors} "
                f"| {ratio:.2f} |"
            )


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{cpu}, {os.cpu_count()} CPUs, Python {platform.python_version()}, commit {commit}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--needles", type=int, default=10_000_000)
    parser.add_argument("--ec-mib", type=int, default=1024, help="size of the volume that is erasure coded")
    parser.add_argument("--wsgi", action="store_true", help="measure -fastLane=false too")
    parser.add_argument("--only", choices=["requests", "pinned", *storage.TABLES, "ec", "copy"], help="one table")
    args = parser.parse_args(argv)
    targets.compile_package()
    bench = Bench(args)
    try:
        bench.say(f"# Benchmark: {machine()}\n")
        if args.only in (None, "requests"):
            bench.throughput()
        if args.only in (None, "pinned"):
            pinned.run(bench)
        for name, table in storage.TABLES.items():
            if args.only in (None, name):
                table(bench)
        if args.only in (None, "ec"):
            EcBench(bench).run()
        if args.only in (None, "copy"):
            moving.copying(bench)
    finally:
        bench.close()
    out = Path("bench-results")
    out.mkdir(exist_ok=True)
    path = out / time.strftime("%Y%m%d-%H%M%S.md")
    path.write_text("\n".join(bench.lines) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
