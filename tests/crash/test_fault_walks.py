"""Every file call of loads, repairs and operations fails once; a full disk over HTTP (departures A5, V2, V5).

csrc/test/iotrace.c is preloaded into untouched builds: the walks run in fault_walk.py, the full disk in a server.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_walk import OPERATIONS, STATES

from tools.compat.bed import HOST, Bed
from tools.compat.wire import Answer, Connection

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "csrc/build/test/libiotrace.so"
VID = 7
LARGE = bytes(range(256)) * 400


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pyvolume-walk-", dir=place) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def shim() -> Path:
    subprocess.run(["make", "-s", "-C", str(ROOT / "csrc"), "iotrace"], check=True)
    return SHIM


@pytest.mark.parametrize("walk", [*STATES, *OPERATIONS])
def test_every_call_fails_once(memory_dir: Path, shim: Path, walk: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/crash/fault_walk.py"), str(memory_dir), walk],
        env=os.environ | {"IOTRACE_DIR": str(memory_dir), "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= 3


class Client:
    """One keep-alive connection to the server of a test bed."""

    def __init__(self, bed: Bed) -> None:
        self.conn = Connection(HOST, bed.port, 30)

    def ask(self, method: str, key: int, body: bytes = b"", query: str = "") -> Answer:
        head = f"{method} /{VID},{key:x}00000001{query} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n"
        self.conn.send(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return self.conn.receive(method)


def resources(bed: Bed) -> tuple[int, int]:
    """Open descriptors and resident bytes of the server."""
    assert bed.server is not None
    process = Path(f"/proc/{bed.server.child.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return len(os.listdir(process / "fd")), pages * os.sysconf("SC_PAGE_SIZE")


def sizes(bed: Bed) -> tuple[int, int]:
    return (bed.data_dir / f"{VID}.dat").stat().st_size, (bed.data_dir / f"{VID}.idx").stat().st_size


def assert_refused_and_healed(bed: Bed, client: Client, reason: str, refuse: object, heal: object) -> None:
    """Many refused writes leave nothing behind; what was there can be read; with room all is well again."""
    assert callable(refuse) and callable(heal)
    assert client.ask("PUT", 1, b"before").status == 201
    assert client.ask("PUT", 2, b"flushed", "?fsync=true").status == 201
    before = sizes(bed)
    refuse()
    for number in range(60):
        if number == 20:
            held = resources(bed)
        answer = client.ask("PUT", 3, LARGE, "?fsync=true" if number % 3 == 0 else "")
        assert answer.status == 500
        text = answer.body.decode()
        assert f"failed to write to local disk: append to volume {VID} size " in text, text
        assert reason in text
        assert sizes(bed) == before
    now = resources(bed)
    assert now[0] <= held[0]
    assert now[1] < held[1] + (8 << 20)
    assert client.ask("GET", 1).body == b"before"
    assert client.ask("GET", 3).status == 404
    heal()
    assert not bed.call("VolumeStatus", volume_id=VID).is_read_only
    assert client.ask("PUT", 3, LARGE).status == 201
    assert client.ask("GET", 3).body == LARGE
    assert client.ask("DELETE", 1).status == 202
    assert bed.stop_server() == 0
    bed.start_server()
    client = Client(bed)
    assert [client.ask("GET", key).body for key in (2, 3)] == [b"flushed", LARGE]
    assert client.ask("GET", 1).status == 404


def test_file_size_limit_over_http(tmp_path: Path) -> None:
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume") as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3) and bed.server is not None
        pid = bed.server.child.pid
        everything = resource.RLIM_INFINITY
        assert_refused_and_healed(
            bed,
            Client(bed),
            "file too large",
            lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, everything)),
            lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (everything, everything)),
        )


def test_full_disk_over_http(tmp_path: Path, shim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: Go's prefix, `no space left on device`, nothing left of the append, writable once there is room."""
    full = tmp_path / "full"
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume") as bed:
        bed.stop_server()
        monkeypatch.setenv("IOTRACE_DIR", str(bed.data_dir))
        monkeypatch.setenv("IOTRACE_FULL", str(full))
        monkeypatch.setenv("LD_PRELOAD", str(shim))
        bed.start_server()
        monkeypatch.delenv("LD_PRELOAD")
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        assert_refused_and_healed(bed, Client(bed), "no space left on device", full.touch, full.unlink)
