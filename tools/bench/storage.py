"""The storage tables of `make bench`: start, vacuum, deletion of many needles; the servers in turns on copies of one
volume.

Volumes are written by volume.c, not by a server. The vacuum has the time of a plain copy and `sync` beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.targets import HOST, DidNotStart, Target

if TYPE_CHECKING:
    from tools.bench.__main__ import Bench

VID = 1
COOKIE = "01234567"
SERVE_LIMIT_S = 120.0
VACUUM_BYTES = 1 << 30
VACUUM_OBJECT = (1 << 10, 64 << 10)
VACUUM_GARBAGE_PERCENT = 30
DELETES = 300_000
DELETES_A_CALL = 1000
DELETE_BYTES = 1024
CALL_LIMIT_S = 600.0


@dataclass(frozen=True)
class Made:
    """A volume on disk that servers get copies of."""

    directory: Path
    last: int
    live: int
    dat_bytes: int


def make_volume(
    bench: Bench, needles: int, order: str, size: tuple[int, int], garbage: int = 0, *, whole: bool = True
) -> Made:
    """Writes a volume; a hole in the place of most records unless `whole`."""
    program = bench.base / "volume"
    if not program.exists():
        source = Path(__file__).with_name("volume.c")
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", str(program), str(source)], check=True)
    directory = bench.base / f"golden-{needles}-{order}-{size[1]}"
    directory.mkdir()
    argv = [program, directory / str(VID), needles, order, *size, garbage, "whole" if whole else "ends"]
    out = subprocess.run([str(a) for a in argv], check=True, capture_output=True, text=True).stdout
    said = json.loads(out)
    return Made(directory, said["last"], said["live"], said["dat_bytes"])


def fresh_copy(bench: Bench, made: Made) -> Path:
    """A directory of its own for one turn, on disk before this returns."""
    copy = bench.base / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["cp", "-r", "--sparse=auto", str(made.directory), str(copy)], check=True)
    os.sync()
    return copy


def copied_and_synced_s(bench: Bench, made: Made) -> float:
    """Seconds that `cp` and `sync` take for the data file: the yardstick of the disk."""
    target = bench.base / "limit.dat"
    began = time.monotonic()
    subprocess.run(["cp", "--sparse=never", str(made.directory / f"{VID}.dat"), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    took = time.monotonic() - began
    target.unlink()
    return took


@dataclass(frozen=True)
class Turn:
    """One measurement of one server."""

    seconds: float
    cpu_s: float
    idle_mib: float = 0.0
    now_mib: float = 0.0
    peak_mib: float = 0.0


def in_turns(bench: Bench, measure: Callable[[Target], Turn]) -> dict[str, list[Turn]]:
    rows: dict[str, list[Turn]] = {}
    for _ in range(bench.args.rounds):
        for t in bench.volume_targets():
            try:
                rows.setdefault(t.name, []).append(measure(t))
            finally:
                t.stop()
                shutil.rmtree(bench.base / "copy", ignore_errors=True)
    return rows


def median(turns: list[Turn], field: str) -> float:
    return float(statistics.median(getattr(turn, field) for turn in turns))


def empty_start(bench: Bench) -> None:
    """From exec until /healthz answers 200, with nothing on the disk."""

    def measure(t: Target) -> Turn:
        empty = bench.base / "copy"
        empty.mkdir()
        took = t.start(empty)
        now, peak = t.memory_mib()
        return Turn(took, t.cpu_s(), now_mib=now, peak_mib=peak)

    bench.say("\n## Start on an empty directory\n")
    bench.say("Seconds from exec until `/healthz` answers 200.\n")
    bench.say("| server | start s | CPU s | MiB | pyvolume's share of it |")
    bench.say("|---|--:|--:|--:|--:|")
    rows = in_turns(bench, measure)
    own = median(rows["pyvolume"], "seconds")
    for name, turns in rows.items():
        took = median(turns, "seconds")
        cpu, now = median(turns, "cpu_s"), median(turns, "now_mib")
        bench.say(f"| {name} | {took:.2f} | {cpu:.2f} | {now:.1f} | {own / took:.2f} |")


def loaded_start(bench: Bench) -> None:
    """From exec until the last needle is read, for ids that rise and for ids that are shuffled."""
    n = bench.args.needles
    bench.say(f"\n## Start with one volume of {n:,} needles\n")
    bench.say("Seconds from exec until the last needle is read; page cache warm. Memory is resident MiB.\n")
    bench.say("| ids | server | start s | CPU s | MiB | peak MiB | bytes/needle | pyvolume's share of it |")
    bench.say("|---|---|--:|--:|--:|--:|--:|--:|")
    own_of: dict[str, float] = {}
    for order in ("rising", "shuffled"):
        made = make_volume(bench, n, order, (64, 64), whole=False)

        def measure(t: Target, made: Made = made) -> Turn:
            empty = bench.base / "empty"
            shutil.rmtree(empty, ignore_errors=True)
            empty.mkdir()
            t.start(empty)
            idle, _ = t.memory_mib()
            t.stop()
            copy = fresh_copy(bench, made)
            began = time.monotonic()
            try:
                t.start(copy)
            except DidNotStart as exc:
                if t.name == "pyvolume":
                    raise
                bench.say(f"({exc})")
                return Turn(float("inf"), t.cpu_s())
            wait_for_needle(t, made, began)
            took = time.monotonic() - began
            now, peak = t.memory_mib()
            return Turn(took, t.cpu_s(), idle, now, peak)

        rows = in_turns(bench, measure)
        own_of[order] = own = median(rows["pyvolume"], "seconds")
        for name, turns in rows.items():
            took, cpu, idle, now, peak = (
                median(turns, f) for f in ("seconds", "cpu_s", "idle_mib", "now_mib", "peak_mib")
            )
            per = (now - idle) * (1 << 20) / n
            bench.say(
                f"| {order} | {name} | {took:.2f} | {cpu:.2f} | {now:.1f} | {peak:.1f} | {per:.1f} | {own / took:.2f} |"
            )
        shutil.rmtree(made.directory)
    bench.say(f"\npyvolume shuffled / rising: {own_of['shuffled'] / own_of['rising']:.2f}")


def wait_for_needle(t: Target, made: Made, began: float) -> None:
    while t.get_status(f"/{VID},{made.last:x}{COOKIE}") != 200:
        if time.monotonic() - began > SERVE_LIMIT_S:
            raise RuntimeError(f"{t.name} never served the last needle")
        time.sleep(0.01)


def channel_of(t: Target) -> Any:
    import grpc

    return grpc.insecure_channel(f"{HOST}:{t.grpc_port}")


def vacuum(bench: Bench) -> None:
    """Compact and commit of one volume, by RPC."""
    from pyvolume.pb import volume_server_pb2 as pb
    from tools.compat.bed import unary_call

    needles = VACUUM_BYTES * 2 // sum(VACUUM_OBJECT)
    made = make_volume(bench, needles, "rising", VACUUM_OBJECT, VACUUM_GARBAGE_PERCENT)

    def measure(t: Target) -> Turn:
        t.start(fresh_copy(bench, made))
        wait_for_needle(t, made, time.monotonic())
        with channel_of(t) as channel:
            compact = channel.unary_stream(
                "/volume_server_pb.VolumeServer/VacuumVolumeCompact",
                request_serializer=pb.VacuumVolumeCompactRequest.SerializeToString,
                response_deserializer=pb.VacuumVolumeCompactResponse.FromString,
            )
            cpu, began = t.cpu_s(), time.monotonic()
            for _ in compact(pb.VacuumVolumeCompactRequest(volume_id=VID), timeout=CALL_LIMIT_S):
                pass
            unary_call(channel, "VacuumVolumeCommit", volume_id=VID)
            took = time.monotonic() - began
            status = unary_call(channel, "VolumeStatus", volume_id=VID)
            if status.file_count != made.live:
                raise RuntimeError(f"{t.name}: {status.file_count} files after the vacuum, not {made.live}")
            return Turn(took, t.cpu_s() - cpu)

    low, high = (size >> 10 for size in VACUUM_OBJECT)
    bench.say(f"\n## Vacuum of {made.dat_bytes / 1e9:.2f} GB, {VACUUM_GARBAGE_PERCENT} % garbage\n")
    bench.say(
        f"Objects of {low} to {high} KiB. Seconds of VacuumVolumeCompact and VacuumVolumeCommit, page cache warm.\n"
    )
    bench.say("| server | s | CPU s | pyvolume's share of it |")
    bench.say("|---|--:|--:|--:|")
    limits: list[float] = []

    def measure_with_limit(t: Target) -> Turn:
        limits.append(copied_and_synced_s(bench, made))
        return measure(t)

    rows = in_turns(bench, measure_with_limit)
    limit = statistics.median(limits)
    own = median(rows["pyvolume"], "seconds")
    for name, turns in rows.items():
        took = median(turns, "seconds")
        bench.say(f"| {name} | {took:.2f} | {median(turns, 'cpu_s'):.2f} | {own / took:.2f} |")
    bench.say(f"| `cp` and `sync` of the whole .dat | {limit:.2f} | | {own / limit:.2f} |")
    shutil.rmtree(made.directory)


def batch_delete(bench: Bench) -> None:
    """BatchDelete of every needle of a volume, one call after the other, cookies checked."""
    from tools.compat.bed import unary_call

    made = make_volume(bench, DELETES, "rising", (DELETE_BYTES, DELETE_BYTES))
    ids = [f"{VID},{key:x}{COOKIE}" for key in range(1, DELETES + 1)]

    def measure(t: Target) -> Turn:
        t.start(fresh_copy(bench, made))
        wait_for_needle(t, made, time.monotonic())
        with channel_of(t) as channel:
            cpu, began = t.cpu_s(), time.monotonic()
            for first in range(0, DELETES, DELETES_A_CALL):
                results = unary_call(channel, "BatchDelete", file_ids=ids[first : first + DELETES_A_CALL]).results
                if any(result.status != 202 for result in results):
                    raise RuntimeError(f"{t.name}: {next(r for r in results if r.status != 202)}")
            return Turn(time.monotonic() - began, t.cpu_s() - cpu)

    bench.say(f"\n## BatchDelete of {DELETES:,} needles of {DELETE_BYTES} bytes\n")
    bench.say(f"{DELETES_A_CALL} ids a call, one call after the other, cookies checked.\n")
    bench.say("| server | s | CPU s | deletes/s | pyvolume's share of the time |")
    bench.say("|---|--:|--:|--:|--:|")
    rows = in_turns(bench, measure)
    own = median(rows["pyvolume"], "seconds")
    for name, turns in rows.items():
        took = median(turns, "seconds")
        bench.say(f"| {name} | {took:.2f} | {median(turns, 'cpu_s'):.2f} | {DELETES / took:,.0f} | {own / took:.2f} |")
    shutil.rmtree(made.directory)


TABLES: dict[str, Callable[[Bench], None]] = {
    "empty": empty_start,
    "start": loaded_start,
    "vacuum": vacuum,
    "delete": batch_delete,
}
