"""Erasure coding: time of encode, rebuild and decode of a volume, rate of reads with shards lost.

The servers take turns with the same volume. Beside them stands what `cp` and `sync` need for the bytes that the job
writes: no job that ends with its files on the disk can be much faster.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from pyvolume.pb import volume_server_pb2 as pb

if TYPE_CHECKING:
    from tools.bench.__main__ import Bench
    from tools.bench.targets import Target

VID: Final = 1
COOKIE: Final = 0x01234567
SHARDS: Final = 14
LOST: Final = (0, 3, 6, 9)
"""Data shards, the worst case for reads."""
NEEDLE_BYTES: Final = 64 << 10
CALL_LIMIT_S: Final = 600.0
JOBS: Final = ("encode", "rebuild of 4 shards", "ToVolume")


@dataclass
class Figures:
    """Of one server or of the limit, job by job, a list over the turns."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    on_disk_s: list[float] = field(default_factory=list)
    """Encode and a `sync` of its files after it: not every server flushes them before it answers."""
    growth_mib: dict[str, list[float]] = field(default_factory=dict)
    reads: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def make_volume(directory: Path, volume_bytes: int) -> int:
    """A volume of needles of 64 KiB with keys 1..n, flushed; n."""
    from pyvolume._native import engine

    volume = engine.Volume.open(
        str(directory / f"{VID}.dat"),
        str(directory / f"{VID}.idx"),
        vid=VID,
        flags=engine.OpenFlag.CREATE,
        offset_width=4,
        superblock=bytes([3, 0, 0, 0, 0, 0, 0, 0]),
    )
    pool = os.urandom(NEEDLE_BYTES * 4)
    count = volume_bytes // NEEDLE_BYTES
    for key in range(1, count + 1):
        start = key * 37 % (len(pool) - NEEDLE_BYTES)
        volume.write(key, COOKIE, pool[start : start + NEEDLE_BYTES], flags=0, check_cookie=False)
    volume.close()
    os.sync()
    return count


def call(t: Target, method: str, **fields: object) -> None:
    """One RPC, without the short limit of the test bed."""
    request, response = getattr(pb, f"{method}Request"), getattr(pb, f"{method}Response")
    with grpc.insecure_channel(f"127.0.0.1:{t.grpc_port}") as channel:
        stub = channel.unary_unary(
            f"/volume_server_pb.VolumeServer/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        stub(request(**fields), timeout=CALL_LIMIT_S)


def copy_and_sync(sources: list[Path], directory: Path) -> float:
    """Seconds that `cp` and `sync` need for files."""
    directory.mkdir()
    began = time.monotonic()
    subprocess.run(["cp", *map(str, sources), str(directory)], check=True)
    subprocess.run(["sync", *(str(directory / path.name) for path in sources)], check=True)
    took = time.monotonic() - began
    shutil.rmtree(directory)
    os.sync()
    return took


class EcBench:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.bytes = bench.args.ec_mib << 20
        self.golden = bench.base / "ec-golden"
        self.figures: dict[str, Figures] = {}
        self.limit = Figures()

    def run(self) -> None:
        """All turns, then the tables."""
        self.golden.mkdir()
        count = make_volume(self.golden, self.bytes)
        keys = list(range(1, count + 1))
        random.Random(1).shuffle(keys)  # noqa: S311
        paths = self.bench.base / "ec-paths.txt"
        paths.write_text("".join(f"/{VID},{key:x}{COOKIE:08x}\n" for key in keys[:4096]))
        for _ in range(self.bench.args.rounds):
            for t in self.bench.volume_targets():
                self._turn(t, paths, self.figures.setdefault(t.name, Figures()))
        self._tables()

    def _timed(self, t: Target, figures: Figures, job: str, work: Callable[[], None]) -> None:
        os.sync()
        resident, _ = t.memory_mib()
        t.forget_peak()
        cpu, began = t.cpu_s(), time.monotonic()
        work()
        figures.seconds.setdefault(job, []).append(time.monotonic() - began)
        figures.cpu_s.setdefault(job, []).append(t.cpu_s() - cpu)
        figures.growth_mib.setdefault(job, []).append(t.memory_mib()[1] - resident)

    def _limit(self, job: str, sources: list[Path]) -> None:
        took = copy_and_sync(sources, self.bench.base / "ec-limit")
        self.limit.seconds.setdefault(job, []).append(took)

    def _turn(self, t: Target, paths: Path, figures: Figures) -> None:
        data = self.bench.base / f"ec-{t.name}"
        shutil.copytree(self.golden, data)
        everything = list(range(SHARDS))
        shard_files = [data / f"{VID}.ec{n:02d}" for n in everything]
        lost_files = [shard_files[n] for n in LOST]
        t.start(data)
        try:
            self._timed(t, figures, JOBS[0], lambda: call(t, "VolumeEcShardsGenerate", volume_id=VID))
            began = time.monotonic()
            subprocess.run(["sync", *map(str, shard_files)], check=True)
            figures.on_disk_s.append(figures.seconds[JOBS[0]][-1] + time.monotonic() - began)
            self._limit(JOBS[0], shard_files)
            call(t, "VolumeDelete", volume_id=VID)
            call(t, "VolumeEcShardsMount", volume_id=VID, shard_ids=everything)
            call(t, "VolumeEcShardsUnmount", volume_id=VID, shard_ids=LOST)
            self._limit(JOBS[1], lost_files)
            call(t, "VolumeEcShardsDelete", volume_id=VID, shard_ids=LOST)
            self._reads(t, figures, "GET 64 KiB, 4 data shards lost", paths)
            self._timed(t, figures, JOBS[1], lambda: call(t, "VolumeEcShardsRebuild", volume_id=VID))
            call(t, "VolumeEcShardsMount", volume_id=VID, shard_ids=everything)
            self._timed(t, figures, JOBS[2], lambda: call(t, "VolumeEcShardsToVolume", volume_id=VID))
            self._limit(JOBS[2], [data / f"{VID}.dat"])
        finally:
            t.stop()
            shutil.rmtree(data, ignore_errors=True)
            os.sync()

    def _reads(self, t: Target, figures: Figures, what: str, paths: Path) -> None:
        first = paths.read_text().partition("\n")[0]
        end = time.monotonic() + 60
        while t.get_status(first) != 200:  # until the master knows of the shards
            if time.monotonic() > end:
                raise RuntimeError(f"{t.name} does not serve shards")
            time.sleep(0.2)
        with contextlib.suppress(ValueError):
            figures.reads.setdefault(what, []).append(self.bench.run_load(t, "get", str(paths)))

    def _tables(self) -> None:
        say, gib = self.bench.say, self.bytes / (1 << 30)
        say(f"\n## Erasure coding, a volume of {self.bytes >> 20} MiB, {self.bench.args.rounds} turns each, median\n")
        say("`cp` and `sync`: the bytes that the job writes, for comparison. Growth: peak of resident memory.\n")
        say("| job | server | seconds | ratio to pyvolume | CPU s/GiB | growth MiB |")
        say("|---|---|--:|--:|--:|--:|")
        for job in JOBS:
            own = statistics.median(self.figures["pyvolume"].seconds[job])
            for name, figures in self.figures.items():
                took = statistics.median(figures.seconds[job])
                cpu = statistics.median(figures.cpu_s[job]) / gib
                growth = statistics.median(figures.growth_mib[job])
                say(f"| {job} | {name} | {took:.2f} | {took / own:.2f} | {cpu:.2f} | {growth:.0f} |")
            took = statistics.median(self.limit.seconds[job])
            say(f"| {job} | `cp`, `sync` | {took:.2f} | {took / own:.2f} | | |")
        own = statistics.median(self.figures["pyvolume"].on_disk_s)
        for name, figures in self.figures.items():
            took = statistics.median(figures.on_disk_s)
            say(f"| encode, then `sync` of its files | {name} | {took:.2f} | {took / own:.2f} | | |")
        say("\n| what | server | requests/s | p50 ms | p99 ms | CPU µs/request | errors | ratio to pyvolume |")
        say("|---|---|--:|--:|--:|--:|--:|--:|")
        for what in self.figures["pyvolume"].reads:
            rates = {
                name: statistics.median(r["requests"] / r["seconds"] for r in figures.reads[what])
                for name, figures in self.figures.items()
            }
            for name, figures in self.figures.items():
                rs = figures.reads[what]
                p50, p99 = (statistics.median(r[k] for r in rs) / 1000 for k in ("p50_us", "p99_us"))
                cpu = statistics.median(r["cpu_s"] * 1e6 / max(1, r["requests"]) for r in rs)
                errors = sum(r["errors"] for r in rs)
                ratio = rates[name] / rates["pyvolume"]
                times = f"{p50:.2f} | {p99:.2f} | {cpu:,.0f}"
                say(f"| {what} | {name} | {rates[name]:,.0f} | {times} | {errors} | {ratio:.2f} |")
