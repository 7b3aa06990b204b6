"""Reload, rotate, stop and kill a server while clients write: nothing acknowledged is lost, and what was let in before
an orderly stop is answered.
"""

from __future__ import annotations

import itertools
import signal
import sys
import threading
from pathlib import Path

from tools.compat.bed import HOST, Bed, wait_for
from tools.compat.wire import Answer, Connection

VID = 5
CLIENTS = 3
UPLOADS = 4
"""Uploads that are half sent when the server is told to stop."""
BODY = 200_000


def fid(key: int) -> str:
    return f"{VID},{key:x}00000001"


def head(key: int, length: int, more: str = "") -> bytes:
    return (
        f"PUT /{fid(key)} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: {length}\r\n{more}\r\n".encode()
    )


def content(key: int) -> bytes:
    return b"%d;" % key * 20


class Writer(threading.Thread):
    """Writes one new key after the other until the server is gone; `acknowledged` holds those that were answered."""

    def __init__(self, bed: Bed, keys: itertools.count[int]) -> None:
        super().__init__(name="writer", daemon=True)
        self._bed = bed
        self._keys = keys
        self.acknowledged: list[int] = []
        self.problem = ""

    def run(self) -> None:
        conn: Connection | None = None
        try:
            while True:
                key = next(self._keys)
                conn = conn or Connection(HOST, self._bed.port, 30)
                conn.send(head(key, len(content(key))) + content(key))
                answer = conn.receive("PUT")
                if answer.error:
                    return
                if answer.status != 201:
                    self.problem = f"{answer.status} {answer.body[:200]!r}"
                    return
                self.acknowledged.append(key)
                if answer.ends_connection:
                    conn.close()
                    conn = None
        except OSError:
            return
        finally:
            if conn is not None:
                conn.close()


def begin_upload(bed: Bed, key: int) -> Connection:
    """An upload that the server has let in (it said 100) and of which half is sent."""
    conn = Connection(HOST, bed.port, 60)
    conn.send(head(key, BODY, "Expect: 100-continue\r\n"))
    conn.sock.settimeout(30)
    while b"\r\n\r\n" not in conn.buf:
        conn.buf += conn.sock.recv(4096)
    assert conn.buf.startswith(b"HTTP/1.1 100 ")
    conn.buf.clear()
    conn.send(b"u" * (BODY // 2))
    return conn


def read_back(bed: Bed, key: int, conn: Connection) -> Answer:
    conn.send(f"GET /{fid(key)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return conn.receive("GET")


def check(bed: Bed, keys: dict[int, bytes]) -> None:
    conn = Connection(HOST, bed.port, 60)
    try:
        for key, data in keys.items():
            answer = read_back(bed, key, conn)
            assert (answer.error, answer.status) == ("", 200), f"{fid(key)}: {answer.error or answer.status}"
            assert answer.body == data, fid(key)
    finally:
        conn.close()


def test_nothing_acknowledged_is_lost_and_what_was_let_in_is_answered(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    command = (
        f"{sys.executable} -m pyvolume -logdir={logs} -v=4 -log_max_size_mb=1 -log_max_files=50 -alsologtostderr=false"
    )
    keys = itertools.count(1)
    stored: dict[int, bytes] = {}
    with Bed(tmp_path, command=f"{command} volume", flags=["-fastLane=true"]) as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
            writers = [Writer(bed, keys) for _ in range(CLIENTS)]
            for writer in writers:
                writer.start()

            def done(writers: list[Writer] = writers) -> int:
                return sum(len(writer.acknowledged) for writer in writers)

            assert wait_for(lambda: done() > 200, 60), [writer.problem for writer in writers]
            assert bed.server is not None
            for _ in range(3):
                bed.server.child.send_signal(signal.SIGHUP)
                so_far = done()
                assert wait_for(lambda least=so_far: done() > least + 50, 60)  # type: ignore[misc]
            uploads: dict[int, Connection] = {}
            if how is not signal.SIGKILL:
                uploads = {key: begin_upload(bed, key) for key in itertools.islice(keys, UPLOADS)}
            bed.server.child.send_signal(how)
            if uploads:
                # the stop has begun: the listener is gone, and what was let in goes on
                for writer in writers:
                    writer.join(30)
                    assert not writer.is_alive()
                assert bed.server.alive
                for key, conn in uploads.items():
                    conn.send(b"u" * (BODY - BODY // 2))
                    answer = conn.receive("PUT")
                    assert (answer.error, answer.status) == ("", 201), f"{fid(key)}: {answer.error or answer.status}"
                    conn.close()
                    stored[key] = b"u" * BODY
            for writer in writers:
                writer.join(30)
                assert writer.problem == ""
                stored |= {key: content(key) for key in writer.acknowledged}
            code = bed.server.child.wait(40)
            assert code == (0 if how is not signal.SIGKILL else -signal.SIGKILL)
            bed.stop_server()
            bed.start_server()
            check(bed, stored)
        assert bed.stop_server() == 0
    infos = sorted(logs.glob("pyvolume.*.log.INFO.*"))
    assert len(infos) > 3, "nothing was rotated"
    assert any("Reload volume server..." in path.read_text() for path in infos)
