"""Random, extreme and empty messages to every RPC of a real server: it lives and touches nothing but its own files."""

from __future__ import annotations

import os
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_helpers import VOLUME_SERVICE, method_classes

from tools.compat.bed import HOST, Bed
from tools.compat.wire import Connection

CALLS = int(os.environ.get("PYVOLUME_HOSTILE_CALLS", "200"))
SEED = os.environ.get("PYVOLUME_HOSTILE_SEED", "1")
DEADLINE_S = 0.5
KEPT = 900  # no message names this volume
NAMED = (1, 2, 3)
DEPTH = 3


class Messages:
    """Makes requests of a message class, with values that a sender of the protocol would not send."""

    def __init__(self, seed: str, outside: Path) -> None:
        self.rng = random.Random(seed)
        self.texts = [
            *("", "", ".", "..", "/", "\0", "a\0b", "../x", "..\\x", "pics", "zz", "x" * 300, "é\u202e\u2028", "%s%n"),
            *("../outside/1", "../../outside/1", f"{outside}/1", f"../..{outside}/1", "/etc/passwd", "vol_dir.uuid"),
            *(".dat", ".idx", ".vif", ".ecx", ".ec00", "../outside/1.dat", "1,01deadbeef", "3,", ",", "000", "999"),
            *("127.0.0.1:1", "127.0.0.1:1.1", "127.0.0.1:x.y", "localhost:0", "[::1]:99999", "volumeServer", "3d"),
            *('{"a":', "select", "hdd"),
        ]

    def integer(self, bits: int, signed: bool, name: str) -> int:
        least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        if name == "preallocate":  # what the disk would give is not asked for
            return self.rng.choice([0, least, most])
        if name == "volume_id" and self.rng.random() < 0.7:
            return self.rng.choice(NAMED)
        values = [0, 1, 2, 3, 8, 14, 77, 255, 65536, least, most, most - 1, most >> 1, self.rng.randint(least, most)]
        value = self.rng.choice([*values, -1, -8] if signed else values)
        return 0 if value == KEPT else value

    def value(self, of: FieldDescriptor, depth: int) -> Any:
        if of.type == of.TYPE_MESSAGE:
            return self.fill(of.message_type._concrete_class(), depth + 1)
        if of.type == of.TYPE_STRING:
            return self.rng.choice(self.texts)
        if of.type == of.TYPE_BYTES:
            return self.rng.randbytes(self.rng.choice([0, 1, 8, 16, 33, 4096]))
        if of.type == of.TYPE_BOOL:
            return self.rng.random() < 0.5
        if of.type in (of.TYPE_FLOAT, of.TYPE_DOUBLE):
            return self.rng.choice([0.0, -1.0, 0.3, 1e30, float("nan"), float("inf"), float("-inf")])
        if of.type == of.TYPE_ENUM:
            return self.rng.choice([0, 1, 2, 3, 99, -1])
        return self.integer(*INTEGERS[of.type], of.name)

    def fill(self, message: Any, depth: int = 0) -> Any:
        """Sets about two thirds of the fields; now and then none."""
        if depth > DEPTH or self.rng.random() < 0.07:
            return message
        for of in message.DESCRIPTOR.fields:
            if self.rng.random() < 0.35:
                continue
            target = getattr(message, of.name)
            if of.message_type is not None and of.message_type.GetOptions().map_entry:
                target["k"]  # makes an entry with a default value
            elif isinstance(target, (bool, int, float, str, bytes)):
                setattr(message, of.name, self.value(of, depth))
            elif hasattr(target, "append"):
                for _ in range(self.rng.choice([0, 1, 1, 3, 40])):
                    target.append(self.value(of, depth))
            else:
                target.CopyFrom(self.value(of, depth))
        return message


INTEGERS = {
    FieldDescriptor.TYPE_INT32: (32, True),
    FieldDescriptor.TYPE_SINT32: (32, True),
    FieldDescriptor.TYPE_SFIXED32: (32, True),
    FieldDescriptor.TYPE_INT64: (64, True),
    FieldDescriptor.TYPE_SINT64: (64, True),
    FieldDescriptor.TYPE_SFIXED64: (64, True),
    FieldDescriptor.TYPE_UINT32: (32, False),
    FieldDescriptor.TYPE_FIXED32: (32, False),
    FieldDescriptor.TYPE_UINT64: (64, False),
    FieldDescriptor.TYPE_FIXED64: (64, False),
}


def files_outside(bed: Bed) -> dict[str, tuple[int, int, bytes]]:
    """Everything below the base but the data directory and the logs: mode, time of change, content."""
    out = {}
    for path in sorted(bed.base.rglob("*")):
        if bed.data_dir in (path, *path.parents) or path.suffix == ".log":
            continue
        stat = path.lstat()
        out[str(path)] = (stat.st_mode, stat.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return out


def ask(bed: Bed, method: str, fid: str, body: bytes = b"") -> tuple[int, bytes]:
    conn = Connection(HOST, bed.port, 30)
    try:
        head = f"{method} /{fid} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: {len(body)}\r\n\r\n"
        conn.send(head.encode() + body)
        answer = conn.receive(method)
        return answer.status, answer.body
    finally:
        conn.close()


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("1", "1.dat", "1.idx", "1.vif", "1.ecx", "1.ec00", "1_1.dat", "1_1.ec00"):
        (outside / name).write_bytes(b"not the server's: " + name.encode())
    with Bed(tmp_path, command=f"{shlex.quote(sys.executable)} -m pyvolume") as running:
        yield running


def call(channel: grpc.Channel, name: str, requests: list[Any]) -> str:
    """Calls a method of any kind; its status code."""
    path, request_class, response_class = method_classes(VOLUME_SERVICE, name)
    method = VOLUME_SERVICE.methods_by_name[name]
    coders = {"request_serializer": request_class.SerializeToString, "response_deserializer": response_class.FromString}
    try:
        if method.client_streaming and method.server_streaming:
            list(channel.stream_stream(path, **coders)(iter(requests), timeout=DEADLINE_S))
        elif method.server_streaming:
            list(channel.unary_stream(path, **coders)(requests[0], timeout=DEADLINE_S))
        elif method.client_streaming:
            channel.stream_unary(path, **coders)(iter(requests), timeout=DEADLINE_S)
        else:
            channel.unary_unary(path, **coders)(requests[0], timeout=DEADLINE_S)
    except grpc.RpcError as exc:
        return str(exc.code().name)
    return "OK"


def prepare(bed: Bed) -> None:
    """Makes the volumes that messages name, as far as they are gone."""
    bed.call("SetState", state={"maintenance": False, "version": bed.call("GetState").state.version})
    for vid in NAMED:
        if bed.allocate(volume_id=vid, replication="000", collection="pics" if vid == 2 else "", version=3):
            for key in range(1, 6):
                ask(bed, "PUT", f"{vid},{key:x}00000001?type=replicate", b"data of the named %d" % key)
    try:
        bed.call("VolumeEcShardsGenerate", volume_id=3)
        bed.call("VolumeEcShardsMount", volume_id=3, shard_ids=range(14))
    except grpc.RpcError:
        pass  # it is half gone by what was called before


def test_no_message_ends_the_server_or_reaches_out_of_its_directories(bed: Bed) -> None:
    assert bed.server is not None
    bed.call("AllocateVolume", volume_id=KEPT, replication="000", collection="keep", version=3)
    kept = {f"{KEPT},{key:x}00000001": os.urandom(key * 100) for key in range(1, 20)}
    for fid, body in kept.items():
        assert ask(bed, "PUT", fid + "?type=replicate", body)[0] == 201
    before = files_outside(bed)
    messages = Messages(SEED, bed.base / "outside")
    names = sorted(VOLUME_SERVICE.methods_by_name)
    codes: dict[str, set[str]] = {name: set() for name in names}
    with grpc.insecure_channel(f"{HOST}:{bed.grpc_port}") as channel:
        for number in range(CALLS):
            if number % 50 == 0:
                prepare(bed)
            name = names[number % len(names)]
            request_class = method_classes(VOLUME_SERVICE, name)[1]
            count = messages.rng.choice([1, 1, 2, 5]) if VOLUME_SERVICE.methods_by_name[name].client_streaming else 1
            requests = [messages.fill(request_class()) for _ in range(count)]
            codes[name].add(call(channel, name, requests))
            assert bed.server.alive, f"{name} {requests} ended the server:\n{bed.server.tail()}"
    assert files_outside(bed) == before
    for fid, body in kept.items():
        assert ask(bed, "GET", fid) == (200, body)
    assert ask(bed, "PUT", f"{KEPT},ff00000001?type=replicate", b"still writable")[0] == 201
    assert bed.call("VolumeStatus", volume_id=KEPT).is_read_only is False
    assert all(codes.values()) or len(names) > CALLS
    assert bed.stop_server() == 0
