"""Acknowledged writes and deletes survive SIGKILL.

Sixteen clients write, overwrite and delete through HTTP, each on keys of its own, until the server is killed at a
random moment; after a restart every key must be in the state that was acknowledged last, or in that of the one request
which was on its way. Repeated until 100,000 writes and deletes were acknowledged.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools.compat.bed import HOST, Bed
from tools.compat.wire import Connection

CLIENTS = 16
WANTED = 100_000
VID = 7
SEED = 20261124


@dataclass
class Client:
    """What one client knows: the last acknowledged version of each of its keys (None: deleted) and what hangs."""

    number: int
    rng: random.Random
    known: dict[int, int | None] = field(default_factory=dict)
    doubtful: tuple[int, int | None] | None = None
    acknowledged: int = 0
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
        live = self.rng.random() < 0.4 and self.known
        key = self.rng.choice(list(self.known)) if live else (self.number << 24) + len(self.known) + 1
        before = self.known.get(key)
        version: int | None = self.acknowledged + 1  # never the content of an earlier version
        if before is not None and self.rng.random() < 0.4:
            version = None
        self.doubtful = (key, version)
        if version is None:
            request = f"DELETE /{fid(key)} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        else:
            data = body(key, version)
            head = f"PUT /{fid(key)} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: {len(data)}\r\n\r\n"
            request = head.encode() + data
        try:
            conn.send(request)
        except OSError:
            return False
        answer = conn.receive("PUT")
        if answer.error:
            return False
        if answer.status != (202 if version is None else 201):
            self.surprise = f"{request[:60]!r} answered {answer.status} {answer.body[:200]!r}"
            return False
        self.known[key] = version
        self.doubtful = None
        self.acknowledged += 1
        return True

    def check(self, port: int) -> None:
        """Reads every key; the answers must be what was acknowledged."""
        conn = Connection(HOST, port, 60)
        try:
            keys = sorted(self.known.keys() | ({self.doubtful[0]} if self.doubtful else set()))
            for at in range(0, len(keys), 64):
                batch = keys[at : at + 64]
                conn.send(b"".join(f"GET /{fid(k)} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for k in batch))
                for key in batch:
                    answer = conn.receive("GET")
                    assert not answer.error, f"{fid(key)}: {answer.error}"
                    self.judge(key, answer.status, answer.body)
        finally:
            conn.close()

    def judge(self, key: int, status: int, data: bytes) -> None:
        allowed: list[int | None] = [self.known[key]] if key in self.known else [None]
        if self.doubtful and self.doubtful[0] == key:
            allowed.append(self.doubtful[1])
        for version in allowed:
            if version is None and status == 404:
                break
            if version is not None and status == 200 and data == body(key, version):
                break
        else:
            pytest.fail(f"{fid(key)} should be in one of {allowed}, but is {status} {data[:40]!r}")
        self.known[key] = version


def fid(key: int) -> str:
    return f"{VID},{key:x}{(key * 2654435761) & 0xFFFFFFFF:08x}"


def body(key: int, version: int) -> bytes:
    unit = f"{key}:{version};".encode()
    return unit * (1 + (key + version) % 40)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_acknowledged_state_survives_sigkill(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    clients = [Client(i + 1, random.Random(f"{SEED}-{i}")) for i in range(CLIENTS)]
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume", size_limit_mb=30000) as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        kills = 0
        while sum(c.acknowledged for c in clients) < WANTED:
            threads = [threading.Thread(target=c.run, args=(bed.port,), name=f"client-{c.number}") for c in clients]
            done_before = sum(c.acknowledged for c in clients)
            goal = done_before + rng.randrange(2_000, 40_000)
            for t in threads:
                t.start()
            while sum(c.acknowledged for c in clients) < min(goal, WANTED) and any(t.is_alive() for t in threads):
                time.sleep(rng.random() / 50)  # the moment of the kill is meant to be random
            bed.stop_server(signal.SIGKILL)
            for t in threads:
                t.join(60)
            kills += 1
            assert [c.surprise for c in clients if c.surprise] == []
            assert sum(c.acknowledged for c in clients) > done_before, "no progress"
            bed.start_server()
            for c in clients:
                c.check(bed.port)
                c.doubtful = None
        assert kills >= 2
