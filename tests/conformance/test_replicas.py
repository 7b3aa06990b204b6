"""Volumes with two copies, one here and one on a Go (or Rust) volume server, under a Go master.

Needs the binary of upstream: WEED_BIN=/path/to/weed; WEED_VOLUME_RUST for the Rust server. Without them two servers of
ours are tried, under the development master. PYVOLUME_REPLICA_OPS=10000 for the long form.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tools.ports import free_port

HOST = "127.0.0.1"
WEED = os.environ.get("WEED_BIN", "")
RUST = os.environ.get("WEED_VOLUME_RUST", "")
OPERATIONS = int(os.environ.get("PYVOLUME_REPLICA_OPS", "800"))
LIMIT_S = 60.0
WRITERS = 4
KEYS_EACH = 60
ABSENT = -1
OWN_MASTER = [sys.executable, "-m", "pyvolume.devmaster"]

pytestmark = pytest.mark.timeout(400)


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, http.client.HTTPException):
            value = condition()
            if value:
                return value
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.1)


class Server:
    """One volume server; start() brings it (back) up on its ports and files."""

    def __init__(self, cluster: Cluster, kind: str, name: str) -> None:
        self.cluster, self.kind, self.name = cluster, kind, name
        self.slots = 20
        self.port, self.grpc = free_port(), free_port()
        self.url = f"{HOST}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        (cluster.base / name).mkdir()

    def start(self) -> None:
        base = self.cluster.base
        common = [f"-ip={HOST}", f"-port={self.port}", f"-port.grpc={self.grpc}", f"-dir={base / self.name}"]
        common += [f"-max={self.slots}", "-preStopSeconds=0", f"-master={self.cluster.master}"]
        if self.kind == "go":
            words = [WEED, f"-config_dir={base}", "volume", *common]
        elif self.kind == "rust":
            words = [RUST, f"--securityFile={base}/security.toml", *(f"-{word}" for word in common)]
        else:
            words = [sys.executable, "-m", "pyvolume", "-logtostderr", "volume", *common]
        self.process = self.cluster.run(self.name, words)
        wait_for(lambda: request(self.port, "GET", "/status")[0] == 200, f"{self.name} serves")
        wait_for(lambda: self.url in self.cluster.nodes(), f"{self.name} joined")

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(with_signal)
        if with_signal == signal.SIGKILL:
            self.process.wait()


class Cluster:
    """A Go master and volume servers in one rack; `slots`: how many volumes those of a kind may have."""

    def __init__(self, base: Path, kinds: tuple[str, ...], slots: Mapping[str, int] | None = None) -> None:
        self.base = base
        (base / "m").mkdir()
        (base / "security.toml").write_text("# nothing\n")
        self.master_port, grpc = free_port(), free_port()
        self.master = f"{HOST}:{self.master_port}.{grpc}"
        self.processes: list[subprocess.Popen[bytes]] = []
        where = [f"-ip={HOST}", f"-port={self.master_port}", f"-port.grpc={grpc}", f"-mdir={base / 'm'}"]
        program = [WEED, f"-config_dir={base}", "master", "-peers=none"] if WEED else OWN_MASTER
        self.run("master", [*program, *where, "-volumeSizeLimitMB=64"])
        wait_for(lambda: request(self.master_port, "GET", "/dir/status")[0] == 200, "the master serves")
        self.servers = [Server(self, kind, f"{kind}{number}") for number, kind in enumerate(kinds)]
        for server in self.servers:
            server.slots = (slots or {}).get(server.kind, server.slots)
            server.start()

    def run(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.base / f"{name}.log").open("ab") as out:
            process = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self.base)
        self.processes.append(process)
        return process

    def nodes(self) -> str:
        return request(self.master_port, "GET", "/dir/status")[1].decode()

    def assign(self) -> str:
        def ask() -> str:
            _, body = request(self.master_port, "GET", "/dir/assign?replication=001")
            return str(json.loads(body).get("fid", ""))

        return wait_for(ask, "an assignment")

    def shell(self, *commands: str) -> str:
        script = "".join(f"{command}\n" for command in ("lock", *commands, "unlock"))
        words = [WEED, f"-config_dir={self.base}", "shell", f"-master={self.master}"]
        done = subprocess.run(words, input=script.encode(), capture_output=True, timeout=120, cwd=self.base, check=True)
        return (done.stdout + done.stderr).decode(errors="replace")

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def request(port: int, method: str, path: str, body: bytes | None = None, timeout_s: float = 50.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Writer(threading.Thread):
    """Writes, overwrites and deletes keys of its own on either server. Knows for each key what may be found: the last
    acknowledged state, and what was sent after it without an acknowledgement."""

    def __init__(self, cluster: Cluster, vid: int, number: int, operations: int, seed: int) -> None:
        super().__init__()
        self.cluster, self.vid, self.operations = cluster, vid, operations
        self.random = random.Random(seed * 100 + number)
        self.keys = [f"{vid},{(number + 1) * 0x1000 + key:x}0000abcd" for key in range(KEYS_EACH)]
        self.may_be: dict[str, set[int]] = {key: {ABSENT} for key in self.keys}
        self.acknowledged = self.failed = 0
        self.problem: str | None = None

    def run(self) -> None:
        try:
            for number in range(self.operations):
                self.one(number)
        except Exception as exc:
            self.problem = repr(exc)

    def one(self, number: int) -> None:
        key = self.random.choice(self.keys)
        port = self.random.choice(self.cluster.servers).port
        state = ABSENT if self.random.random() < 0.2 else number
        try:
            if state == ABSENT:
                status, _ = request(port, "DELETE", f"/{key}")
            else:
                status, _ = request(port, "PUT", f"/{key}", content_of(key, number))
        except (OSError, http.client.HTTPException):
            status = 0
        known = self.may_be[key]
        if (state == ABSENT and status == 202) or (state != ABSENT and status in (201, 204)):
            self.may_be[key] = {state}
            self.acknowledged += 1
        elif state == ABSENT and status == 404 and ABSENT in known:
            self.may_be[key] = {ABSENT} if len(known) == 1 else known
        else:
            known.add(state)
            self.failed += 1


def content_of(key: str, number: int) -> bytes:
    rand = random.Random(f"{key} {number}")
    return f"{key} {number} ".encode() + rand.randbytes(rand.choice((10, 900, 1024, 5000)))


def state_of(port: int, key: str) -> int:
    status, body = request(port, "GET", f"/{key}?readDeleted=false")
    if status == 404:
        return ABSENT
    if status == 503:
        raise ConnectionError("starting")
    assert status == 200, (port, status, key, body)
    number = int(body.split(b" ", 2)[1])
    assert body == content_of(key, number), f"{key}: other bytes than were written"
    return number


class Readers:
    """Read keys of all writers on both servers until told to end; a body must be one that somebody wrote."""

    def __init__(self, cluster: Cluster, writers: list[Writer]) -> None:
        self.cluster, self.writers = cluster, writers
        self.end = threading.Event()
        self.problems: list[str] = []
        self.threads = [threading.Thread(target=self.read, args=(seed,)) for seed in range(2)]

    def read(self, seed: int) -> None:
        rand = random.Random(seed)
        while not self.end.is_set():
            try:
                state_of(rand.choice(self.cluster.servers).port, rand.choice(rand.choice(self.writers).keys))
            except (OSError, http.client.HTTPException):
                continue  # a server that was killed
            except AssertionError as exc:
                self.problems.append(str(exc))

    def __enter__(self) -> None:
        for thread in self.threads:
            thread.start()

    def __exit__(self, *exc: object) -> None:
        self.end.set()
        for thread in self.threads:
            thread.join()


def drive(
    cluster: Cluster, vid: int, seed: int, meanwhile: Callable[[list[Writer]], None] | None = None
) -> list[Writer]:
    writers = [Writer(cluster, vid, number, OPERATIONS // WRITERS, seed) for number in range(WRITERS)]
    readers = Readers(cluster, writers)
    with readers:
        for writer in writers:
            writer.start()
        if meanwhile is not None:
            meanwhile(writers)
        for writer in writers:
            writer.join()
    assert [writer.problem for writer in writers if writer.problem] == []
    assert readers.problems == []
    return writers


def compare(cluster: Cluster, writers: list[Writer]) -> None:
    """Both servers have the same, and what they have was the last thing acknowledged (or sent after it)."""
    for writer in writers:
        for key, possible in writer.may_be.items():
            found = [state_of(server.port, key) for server in cluster.servers]
            assert found[0] == found[1], f"{key}: {found}"
            assert found[0] in possible, f"{key}: {found[0]} is none of {possible}"


def check_disk(cluster: Cluster, vid: int) -> None:
    """Upstream's own comparison of the two indexes finds nothing."""
    if not WEED:
        return
    text = cluster.shell(f"volume.check.disk -slow -v -volumeId={vid}")
    found = re.findall(r"has (\d+) entries, \S+ missed (\d+) and partially deleted (\d+) entries", text)
    assert len(found) == 2, text
    assert {counts[1:] for counts in found} == {("0", "0")}, text
    assert "not resurrecting" not in text, text


PAIRS = [("own", "go"), ("go", "own"), ("own", "own"), ("own", "rust")]


@pytest.fixture(params=PAIRS, ids="-".join)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    if set(request.param) != {"own"} and not WEED:
        pytest.skip("set WEED_BIN to the binary of SeaweedFS 4.44 to run these")
    if "rust" in request.param and not RUST:
        pytest.skip("set WEED_VOLUME_RUST to the binary of the Rust volume server to run these")
    made = Cluster(tmp_path, request.param)
    yield made
    made.stop()


def test_replicas_are_equal_needle_by_needle(cluster: Cluster) -> None:
    vid = int(cluster.assign().partition(",")[0])
    writers = drive(cluster, vid, seed=1)
    assert sum(writer.failed for writer in writers) == 0
    compare(cluster, writers)
    check_disk(cluster, vid)


@pytest.mark.parametrize("cluster", [("own", "go"), ("go", "own")], ids="-".join, indirect=True)
def test_a_replica_that_dies_and_comes_back_has_every_acknowledged_write(cluster: Cluster) -> None:
    vid = int(cluster.assign().partition(",")[0])
    victim = cluster.servers[0]

    def kill_and_restart(writers: list[Writer]) -> None:
        wait_for(lambda: sum(w.acknowledged for w in writers) > OPERATIONS // 8, "the first writes")
        victim.kill()
        wait_for(lambda: sum(w.failed for w in writers) > 5 or not any(w.is_alive() for w in writers), "refused writes")
        victim.start()

    writers = drive(cluster, vid, seed=2, meanwhile=kill_and_restart)
    assert sum(writer.acknowledged for writer in writers) > OPERATIONS // 8
    wait_for(lambda: len(json.loads(lookup(cluster, vid)).get("locations", [])) == 2, "both copies known")
    text = cluster.shell(
        f"volume.check.disk -slow -v -volumeId={vid} -apply -syncDeleted -resurrectMissingNeedles",
        "volume.fix.replication -apply",
    )
    assert "missed" in text, text
    for writer in writers:
        for key, possible in writer.may_be.items():
            if len(possible) > 1:
                continue  # refused writes leave it open which of the two is right
            for server in cluster.servers:
                assert state_of(server.port, key) in possible, (server.kind, key)


def lookup(cluster: Cluster, vid: int) -> bytes:
    return request(cluster.master_port, "GET", f"/dir/lookup?volumeId={vid}")[1]


@pytest.mark.parametrize("cluster", [("own", "own"), ("own", "go")], ids="-".join, indirect=True)
def test_a_replica_that_hangs_does_not_hang_the_server(cluster: Cluster) -> None:
    own, other = cluster.servers
    fid = cluster.assign()
    assert request(own.port, "PUT", f"/{fid}", b"before")[0] == 201
    other.kill(signal.SIGSTOP)
    vid = fid.partition(",")[0]
    answers: list[int] = []

    def write(number: int) -> None:
        with contextlib.suppress(OSError):
            answers.append(request(own.port, "PUT", f"/{vid},{number:x}0000abcd", b"x", timeout_s=70)[0])

    threads = [threading.Thread(target=write, args=(0x9000 + number,), daemon=True) for number in range(80)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        assert request(own.port, "GET", f"/{fid}", timeout_s=20) == (200, b"before")
        assert request(own.port, "GET", "/status", timeout_s=20)[0] == 200
    other.kill(signal.SIGCONT)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert request(own.port, "PUT", f"/{vid},70000abcd", b"after")[0] == 201
    assert request(other.port, "GET", f"/{vid},70000abcd") == (200, b"after")
