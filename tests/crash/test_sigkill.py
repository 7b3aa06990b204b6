"""Acknowledged writes and deletes survive SIGKILL: under plain load, during a vacuum, at its commit.

Clients write, overwrite and delete through HTTP, each on keys of its own and several requests ahead, until the server
is killed at a random moment; after a restart every key must be in the state that was acknowledged last, or in that of
the one request for it which was on its way, and the volume must take writes. The rounds go on until 100,000 writes and
deletes were acknowledged, or PYVOLUME_KILL_ROUNDS rounds are over (`make crash`: 200).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from pyvolume._native import engine
from pyvolume.pb import volume_server_pb2 as pb
from tools.compat.bed import HOST, Bed
from tools.compat.wire import Connection

CLIENTS = 6
AHEAD = 12
"""Requests on their way on one connection."""
WANTED = 100_000
ROUNDS_MIN = 6
ROUNDS = int(os.environ.get("PYVOLUME_KILL_ROUNDS", "0"))
LONG_ROUND_OPS = (200, 2_000)
ROUND_OPS = {"plain": (20_000, 45_000), "vacuum": (500, 4_000), "commit": (500, 4_000)}
VID = 7
SEED = int(os.environ.get("PYVOLUME_CRASH_SEED", "20261124"))
READ_BACK = 300
"""Keys of each client that are read through HTTP after a restart; all are read from the files."""
MODES = ("plain", "vacuum", "commit")
COMMIT_POINTS = "compact.commit=sleep:40; compact.remove_marker=sleep:60"


@dataclass
class Client:
    """What one client knows: the last acknowledged version of each of its keys (None: deleted) and what hangs."""

    number: int
    rng: random.Random
    known: dict[int, int | None] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    doubtful: dict[int, int | None] = field(default_factory=dict)
    acknowledged: int = 0
    asked: int = 0
    surprise: str = ""

    def run(self, port: int) -> None:
        try:
            conn = Connection(HOST, port, 30)
        except OSError:
            return  # killed before it began
        try:
            while self.step(conn):
                pass
        finally:
            conn.close()

    def step(self, conn: Connection) -> bool:
        """Sends a few requests for different keys at once, then takes their answers; false when the server is gone."""
        wanted: dict[int, int | None] = {}
        while len(wanted) < AHEAD:
            live = self.rng.random() < 0.4 and self.keys
            key = self.rng.choice(self.keys) if live else (self.number << 24) + len(self.keys) + 1
            if key in wanted:
                continue
            if not live:
                self.keys.append(key)
            self.asked += 1  # a version of its own, never the content of an earlier one
            wanted[key] = None if self.known.get(key) is not None and self.rng.random() < 0.4 else self.asked
        self.doubtful = dict(wanted)
        try:
            conn.send(b"".join(request(key, version) for key, version in wanted.items()))
        except OSError:
            return False
        for key, version in wanted.items():
            answer = conn.receive("PUT")
            if answer.error:
                return False
            if answer.status != (202 if version is None else 201):
                self.surprise = f"{fid(key)} version {version}: {answer.status} {answer.body[:200]!r}"
                return False
            self.known[key] = version
            del self.doubtful[key]
            self.acknowledged += 1
        return True

    def check_files(self, volume: engine.Volume) -> None:
        """Reads every key from the files; the contents must be what was acknowledged."""
        for key in self.keys:
            try:
                data = bytes(volume.read(key).data or b"")
            except engine.NativeError as exc:
                assert engine.err_name(exc.code) in ("PV_ENOTFOUND", "PV_EDELETED"), f"{fid(key)}: {exc}"
                self.judge(key, None)
            else:
                self.judge(key, data)

    def check_answers(self, port: int) -> None:
        """Reads what hung and some other keys through HTTP."""
        keys = [*self.doubtful, *self.rng.sample(self.keys, min(READ_BACK, len(self.keys)))]
        conn = Connection(HOST, port, 60)
        try:
            for at in range(0, len(keys), 64):
                batch = keys[at : at + 64]
                conn.send(b"".join(f"GET /{fid(k)} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for k in batch))
                for key in batch:
                    answer = conn.receive("GET")
                    assert not answer.error, f"{fid(key)}: {answer.error}"
                    assert answer.status in (200, 404), f"{fid(key)}: {answer.status}"
                    self.judge(key, answer.body if answer.status == 200 else None)
        finally:
            conn.close()
        self.doubtful = {}

    def judge(self, key: int, data: bytes | None) -> None:
        allowed: list[int | None] = [self.known.get(key)]
        if key in self.doubtful:
            allowed.append(self.doubtful[key])
        for version in allowed:
            if (data is None) if version is None else data == body(key, version):
                break
        else:
            pytest.fail(f"{fid(key)} should be in one of {allowed}, but is {data[:40] if data is not None else None!r}")
        self.known[key] = version


def fid(key: int) -> str:
    return f"{VID},{key:x}{(key * 2654435761) & 0xFFFFFFFF:08x}"


def body(key: int, version: int) -> bytes:
    unit = f"{key}:{version};".encode()
    return unit * (1 + (key + version) % 40)


def request(key: int, version: int | None) -> bytes:
    if version is None:
        return f"DELETE /{fid(key)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    data = body(key, version)
    head = f"PUT /{fid(key)} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def vacuum_until(stop: threading.Event, grpc_port: int) -> None:
    """One vacuum after the other until told to stop or until the server is gone."""
    with grpc.insecure_channel(f"{HOST}:{grpc_port}") as channel, contextlib.suppress(grpc.RpcError):
        base = "/volume_server_pb.VolumeServer/VacuumVolume"
        compact = channel.unary_stream(
            base + "Compact",
            request_serializer=pb.VacuumVolumeCompactRequest.SerializeToString,
            response_deserializer=pb.VacuumVolumeCompactResponse.FromString,
        )
        commit = channel.unary_unary(
            base + "Commit",
            request_serializer=pb.VacuumVolumeCommitRequest.SerializeToString,
            response_deserializer=pb.VacuumVolumeCommitResponse.FromString,
        )
        while not stop.is_set():
            for _ in compact(pb.VacuumVolumeCompactRequest(volume_id=VID), timeout=60):
                pass
            commit(pb.VacuumVolumeCommitRequest(volume_id=VID), timeout=60)


def kill_under_load(bed: Bed, clients: list[Client], mode: str, operations: int, rng: random.Random) -> None:
    """Load, and a vacuum beside it, until so many operations were acknowledged; then SIGKILL."""
    threads = [threading.Thread(target=c.run, args=(bed.port,), name=f"client-{c.number}") for c in clients]
    stop = threading.Event()
    if mode != "plain":
        threads.append(threading.Thread(target=vacuum_until, args=(stop, bed.grpc_port), name="vacuum"))
    before = sum(c.acknowledged for c in clients)
    for t in threads:
        t.start()
    while sum(c.acknowledged for c in clients) < before + operations and threads[0].is_alive():
        time.sleep(rng.random() / 50)  # the moment of the kill is meant to be random
    stop.set()
    bed.stop_server(signal.SIGKILL)
    for t in threads:
        t.join(60)
        assert not t.is_alive(), t.name
    assert [c.surprise for c in clients if c.surprise] == []
    assert sum(c.acknowledged for c in clients) > before, "no progress"


def check(bed: Bed, clients: list[Client]) -> None:
    for c in clients:
        c.check_answers(bed.port)
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    paths = str(bed.data_dir / f"{VID}.dat"), str(bed.data_dir / f"{VID}.idx")
    with engine.Volume.open(*paths, vid=VID, flags=flags, offset_width=4) as volume:
        for c in clients:
            c.check_files(volume)
    status = bed.call("VolumeStatus", volume_id=VID)
    assert not status.is_read_only
    assert not [p.name for p in bed.data_dir.iterdir() if p.suffix in (".cpd", ".cpx", ".cpc")]


@pytest.mark.slow
@pytest.mark.timeout(3600 if ROUNDS else 300)
def test_every_acknowledged_state_survives_sigkill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    clients = [Client(i + 1, random.Random(f"{SEED}-{i}")) for i in range(CLIENTS)]
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume", size_limit_mb=30000) as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        rounds = 0
        while rounds < ROUNDS if ROUNDS else rounds < ROUNDS_MIN or sum(c.acknowledged for c in clients) < WANTED:
            mode = MODES[rounds % len(MODES)]
            operations = rng.randrange(*(LONG_ROUND_OPS if ROUNDS else ROUND_OPS[mode]))
            kill_under_load(bed, clients, mode, operations, rng)
            rounds += 1
            # points are set when a server starts: for the next round
            points = COMMIT_POINTS if MODES[rounds % len(MODES)] == "commit" else ""
            monkeypatch.setenv("PYVOLUME_FAILPOINTS", points)
            bed.start_server()
            check(bed, clients)
