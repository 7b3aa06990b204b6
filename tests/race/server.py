"""A server under test as the race tests use it."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
from race.history import Refused

from pyvolume.pb import volume_server_pb2 as pb
from tools.compat.bed import HOST, Bed
from tools.compat.wire import Answer, Connection

REFUSALS = (b"is read only", b"is closed", b"not found", b"lookup failed")


class HttpStore:
    """One keep-alive connection. Statuses that say that the volume does not serve are Refused; others are errors."""

    def __init__(self, bed: Bed, vid: int) -> None:
        self.bed = bed
        self.vid = vid
        self.conn: Connection | None = None

    def _ask(self, method: str, key: int, data: bytes = b"") -> Answer:
        self.conn = self.conn or Connection(HOST, self.bed.port, 30)
        head = f"{method} /{self.vid},{key:x}00000001 HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n"
        self.conn.send(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = self.conn.receive(method)
        if answer.error:
            raise AssertionError(f"{method} {key}: {answer.error}")
        if answer.ends_connection:
            self.conn.close()
            self.conn = None
        return answer

    def put(self, key: int, data: bytes) -> None:
        answer = self._ask("PUT", key, data)
        if answer.status in (404, 500) and any(text in answer.body for text in REFUSALS):
            raise Refused
        assert answer.status in (201, 204), f"PUT: {answer.status} {answer.body[:200]!r}"

    def delete(self, key: int) -> None:
        answer = self._ask("DELETE", key)
        if answer.status in (404, 500) and any(text in answer.body for text in REFUSALS):
            raise Refused
        assert answer.status in (202, 404), f"DELETE: {answer.status} {answer.body[:200]!r}"

    def get(self, key: int) -> bytes | None:
        answer = self._ask("GET", key)
        assert answer.status in (200, 404), f"GET: {answer.status} {answer.body[:200]!r}"
        return answer.body if answer.status == 200 else None


def vacuum(bed: Bed, vid: int) -> None:
    with grpc.insecure_channel(f"{HOST}:{bed.grpc_port}") as channel:
        compact = channel.unary_stream(
            "/volume_server_pb.VolumeServer/VacuumVolumeCompact",
            request_serializer=pb.VacuumVolumeCompactRequest.SerializeToString,
            response_deserializer=pb.VacuumVolumeCompactResponse.FromString,
        )
        for _ in compact(pb.VacuumVolumeCompactRequest(volume_id=vid), timeout=60):
            pass
    bed.call("VacuumVolumeCommit", volume_id=vid)


def threads_and_fds(bed: Bed) -> tuple[int, int]:
    assert bed.server is not None
    process = Path(f"/proc/{bed.server.child.pid}")
    return len(os.listdir(process / "task")), len(os.listdir(process / "fd"))
