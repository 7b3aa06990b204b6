"""Files and volumes between servers (contract grpc.md 7, departures V3, S5): CopyFile, ReceiveFile, VolumeCopy, …"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_helpers import wait_for
from grpc_nodes import Peer, Server, content, push, put, relay

from pyvolume import faults
from pyvolume.errors import NoFreeLocation
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server import pull
from pyvolume.server.grpc import copy as handlers
from pyvolume.server.grpc import wire
from pyvolume.server.grpc.methods import LIMITS, Kind
from pyvolume.server.grpc.status import CallEnded
from pyvolume.storage import compact, copy
from pyvolume.storage.store import Store
from pyvolume.storage.volume_load import create_volume
from pyvolume.types import ReplicaPlacement

COPIES = LIMITS[Kind.COPY]
Code = grpc.StatusCode
ANY = 0xFFFFFFFF
WHOLE = (1 << 63) - 1
HOSTILE_EXTENSIONS = ("", ".", "dat", ".d/t", "/../x", "../x", ".da t", ".dät", ".dat\n", ".a.b", "..", ".\0")
HOSTILE_COLLECTIONS = (".", "..", "a/b", "../x", "a\\b", "/etc")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "source")
    yield made
    made.end()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "target", disk_types=("", "ssd"))
    yield made
    made.end()


def fill(server: Server, vid: int, collection: str = "", count: int = 20) -> None:
    volume = server.make(vid, collection)
    for key in range(1, count + 1):
        put(volume, key, f"needle {key} ".encode() * key)
    volume.delete_needle(2, 0x1234ABCD)


def got(answer: Any) -> bytes:
    assert answer.code is Code.OK, (answer.code, answer.details)
    return b"".join(message.file_content for message in answer.messages)


# -- the wire ---------------------------------------------------------------------------------------------------------


def test_bulk_messages_are_the_librarys() -> None:
    for text in (b"", b"x", os.urandom(300)):
        for when in (0, 1, 1 << 62):
            made = wire.file_piece(text, when)
            assert made == pb.CopyFileResponse(file_content=text, modified_ts_ns=when).SerializeToString()
        for is_last in (False, True):
            made = wire.TailFrame(3).piece(b"h" * 16, text, is_last)
            expected = pb.VolumeTailSenderResponse(
                needle_header=b"h" * 16, needle_body=text, is_last_chunk=is_last, version=3
            )
            assert made == expected.SerializeToString()
    assert (
        wire.TailFrame(3).heartbeat() == pb.VolumeTailSenderResponse(is_last_chunk=True, version=3).SerializeToString()
    )


def test_reading_messages_of_any_library() -> None:
    whole = pb.VolumeTailSenderResponse(needle_header=b"head", needle_body=b"body", is_last_chunk=True, version=300)
    fields = wire.read_fields(whole.SerializeToString())
    assert wire.content(fields, wire.HEADER_FIELD) == b"head"
    assert wire.content(fields, wire.BODY_FIELD) == b"body"
    assert (wire.number(fields, wire.LAST_FIELD), wire.number(fields, wire.VERSION_FIELD)) == (1, 300)
    unknown = b"\x51" + bytes(8) + b"\x65" + bytes(4) + b"\x7a\x02xy"
    reordered = b"\x10\x05" + unknown + b"\x0a\x03old" + b"\x0a\x03new"
    fields = wire.read_fields(reordered)
    assert wire.content(fields, 1) == b"new"
    assert wire.number(fields, 2) == 5
    assert wire.content(fields, 2) == b""  # a number where bytes were expected
    assert wire.number(fields, 1) == 0


def test_records_are_read_alike_however_they_are_written() -> None:
    def read(message: bytes) -> tuple[bytes, bytes, bool, int]:
        header, body, is_last, version = wire.tail_fields(message)
        return bytes(header), bytes(body), is_last, version

    for length in (0, 1, 16, 127, 128, 300, 20_000, 3 << 20):
        for header in (b"h" * 16, b"h" * 15, b""):
            for is_last in (False, True):
                for version in (0, 3, 127, 128):
                    expected = (header, os.urandom(length), is_last, version)
                    made = pb.VolumeTailSenderResponse(
                        needle_header=expected[0], needle_body=expected[1], is_last_chunk=is_last, version=version
                    ).SerializeToString()
                    assert read(made) == expected
                    assert read(b"\x20\x07" + made + b"\x20" + bytes([version & 0x7F])) == (
                        *expected[:3],
                        version & 0x7F,
                    )
    plain = wire.TailFrame(3).piece(b"h" * 16, b"body", True)
    assert read(plain) == (b"h" * 16, b"body", True, 3)
    assert read(plain + plain) == (b"h" * 16, b"body", True, 3)
    for cut in range(1, len(plain)):
        whole = cut in (18, 24, 26)  # between two fields
        if whole:
            assert read(plain[:cut])[0] == b"h" * 16
        else:
            with pytest.raises(ValueError, match="message"):
                read(plain[:cut])
    with pytest.raises(ValueError, match="message"):
        read(plain[:19] + b"\xff\xff\xff\xff\x0f" + plain[20:])


@pytest.mark.parametrize("text", [b"\x0a", b"\x0a\x05abc", b"\x80", b"\x0a" + b"\xff" * 11, b"\x0b", b"\x07", b"\x00"])
def test_reading_what_is_no_message(text: bytes) -> None:
    with pytest.raises(ValueError, match="message"):
        wire.read_fields(text)


# -- CopyFile ---------------------------------------------------------------------------------------------------------


def test_copy_file_in_pieces_with_the_time_first(source: Server) -> None:
    volume = source.make(3)
    put(volume, 1, os.urandom(5 << 20))
    path = source.directories[0] / "3.dat"
    answer = source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=0, stop_offset=WHOLE)
    assert got(answer) == path.read_bytes()
    assert [len(m.file_content) for m in answer.messages[:-1]] == [2 << 20, 2 << 20]
    assert [m.modified_ts_ns for m in answer.messages] == [path.stat().st_mtime_ns, 0, 0]


@pytest.mark.parametrize("stop", [1, 8, 100, (2 << 20) + 1])
def test_copy_file_stops(source: Server, stop: int) -> None:
    volume = source.make(3)
    put(volume, 1, os.urandom(3 << 20))
    answer = source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=ANY, stop_offset=stop)
    assert got(answer) == (source.directories[0] / "3.dat").read_bytes()[:stop]


@pytest.mark.parametrize("stop", [0, 1 << 63, (1 << 64) - 1])
def test_copy_file_of_nothing_still_tells_that_there_is_a_file(source: Server, stop: int) -> None:
    source.make(3)
    answer = source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=ANY, stop_offset=stop)
    assert got(answer) == b""
    assert len(answer.messages) == 1
    assert answer.messages[0].modified_ts_ns > 0
    empty = source.call("CopyFile", volume_id=3, ext=".idx", compaction_revision=ANY, stop_offset=WHOLE)
    assert [m.file_content for m in empty.messages] == [b""]
    assert empty.messages[0].modified_ts_ns > 0


def test_copy_file_that_is_missing(source: Server) -> None:
    source.make(3)
    path = source.directories[0] / "3.nope"
    wanted = {"volume_id": 3, "ext": ".nope", "compaction_revision": ANY}
    answer = source.call("CopyFile", **wanted, stop_offset=5)
    assert (answer.code, answer.details) == (Code.UNKNOWN, f"open {path}: no such file or directory")
    for lenient in ({"stop_offset": 0}, {"stop_offset": 5, "ignore_source_file_not_found": True}):
        answer = source.call("CopyFile", **wanted, **lenient)
        assert (answer.code, answer.messages) == (Code.OK, [])
    answer = source.call("CopyFile", volume_id=99, ext=".dat", compaction_revision=ANY, stop_offset=5)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "not found volume id 99")


def test_copy_file_of_another_revision(source: Server) -> None:
    fill(source, 3)
    compact.compact(source.volume(3))
    compact.commit(source.volume(3))
    stale = source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=0, stop_offset=8)
    assert (stale.code, stale.details) == (Code.UNKNOWN, "volume 3 is compacted")
    for revision in (1, ANY):
        assert (
            len(got(source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=revision, stop_offset=8))) == 8
        )


def test_index_files_come_from_the_idx_directory(tmp_path: Path) -> None:
    server = Server(tmp_path, idx=True)
    try:
        fill(server, 3)
        assert server.idx_directory is not None
        index = got(server.call("CopyFile", volume_id=3, ext=".idx", compaction_revision=ANY, stop_offset=WHOLE))
        assert index == (server.idx_directory / "3.idx").read_bytes() != b""
    finally:
        server.end()


@pytest.mark.parametrize("is_ec", [False, True])
def test_copy_file_refuses_names_that_leave_the_directory(source: Server, is_ec: bool) -> None:
    (source.directories[0].parent / "secret").write_text("x")
    source.make(3)
    for extension in HOSTILE_EXTENSIONS:
        answer = source.call("CopyFile", volume_id=3, ext=extension, stop_offset=9, is_ec_volume=is_ec)
        assert answer.code is Code.UNKNOWN, extension
        assert answer.details.startswith('invalid file extension "'), extension
    for collection in HOSTILE_COLLECTIONS:
        answer = source.call(
            "CopyFile", volume_id=3, ext=".dat", collection=collection, stop_offset=9, is_ec_volume=is_ec
        )
        assert answer.code is Code.UNKNOWN, collection
        assert answer.details.startswith('invalid collection "'), collection
    answer = source.call("CopyFile", volume_id=3, ext=".dat", collection="a\0b", stop_offset=9)
    assert answer.code is Code.INVALID_ARGUMENT


def test_copy_file_of_ec_volumes_takes_the_last_hit(target: Server) -> None:
    for number, directory in enumerate(target.directories):
        (directory / "c_7.ec01").write_bytes(b"shard in %d" % number)
    wanted = {"volume_id": 7, "ext": ".ec01", "is_ec_volume": True, "stop_offset": WHOLE}
    assert got(target.call("CopyFile", **wanted, collection="c")) == b"shard in 1"
    answer = target.call("CopyFile", **wanted)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "CopyFile not found ec volume id 7")
    answer = target.call("CopyFile", **wanted, ignore_source_file_not_found=True)
    assert (answer.code, answer.messages) == (Code.OK, [])


def test_copy_file_read_error(source: Server) -> None:
    source.make(3)
    with faults.set_points("copy.read=error:EIO"):
        answer = source.call("CopyFile", volume_id=3, ext=".dat", compaction_revision=ANY, stop_offset=8)
    path = source.directories[0] / "3.dat"
    assert (answer.code, answer.details) == (Code.UNKNOWN, f"read {path}: input/output error")


def test_copy_file_to_a_client_that_goes_away_gives_its_slot_back(source: Server) -> None:
    put(source.make(3), 1, os.urandom(30 << 20))
    for _ in range(COPIES + 4):  # more than there are slots
        stream = source.client.open_stream(
            "CopyFile", {"volume_id": 3, "ext": ".dat", "compaction_revision": ANY, "stop_offset": WHOLE}
        )
        next(stream)
        stream.cancel()
        wait_for(lambda: _copy_slots(source) > 0, "a slot")
    wait_for(lambda: _copy_slots(source) == COPIES, "all slots")


def test_clients_that_stall_are_cut(source: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "CLIENT_SILENCE_LIMIT_S", 0.3)
    put(source.make(3), 1, os.urandom(60 << 20))
    stream = source.client.open_stream(
        "CopyFile", {"volume_id": 3, "ext": ".dat", "compaction_revision": ANY, "stop_offset": WHOLE}
    )
    next(stream)
    wait_for(lambda: _copy_slots(source) == COPIES, "the slot of the client that takes nothing")
    released = threading.Event()

    def silent() -> Iterator[Any]:
        yield pb.ReceiveFileRequest(**info(3, ".rcv"))
        released.wait(20)

    answer = push(source.client, silent())
    released.set()
    assert answer.code is Code.CANCELLED
    wait_for(lambda: source.files() == {"3.dat", "3.idx", "3.vif"}, "the working file to go")


def _copy_slots(server: Server) -> int:
    from pyvolume.server.grpc.methods import Kind

    return int(server.grpc.budgets._slots[Kind.COPY]._value)


# -- ReceiveFile ------------------------------------------------------------------------------------------------------


def info(vid: int, extension: str, **fields: Any) -> dict[str, Any]:
    return {"info": {"volume_id": vid, "ext": extension, **fields}}


def piece(data: bytes) -> dict[str, Any]:
    return {"file_content": data}


def test_receive_file_beside_a_mounted_volume(target: Server) -> None:
    target.make(3, "c")
    answer = target.push(info(3, ".rcv", collection="ignored"), piece(b"one "), piece(b"two"))
    assert (answer.error, answer.bytes_written) == ("", 7)
    assert (target.directories[0] / "c_3.rcv").read_bytes() == b"one two"
    assert target.push(info(3, ".rcv"), piece(b"new")).bytes_written == 3
    assert (target.directories[0] / "c_3.rcv").read_bytes() == b"new"


def test_receive_file_twice_in_a_stream(target: Server) -> None:
    target.make(3)
    answer = target.push(info(3, ".one"), piece(b"first"), info(3, ".two"), piece(b"second"))
    assert (answer.error, answer.bytes_written) == ("", 11)
    assert (target.directories[0] / "3.one").read_bytes() == b"first"
    assert (target.directories[0] / "3.two").read_bytes() == b"second"


def test_receive_file_refuses_in_the_answer(target: Server) -> None:
    target.make(3)
    before = target.files()
    assert target.push(piece(b"x")).error == "file info must be sent first"
    assert target.push({}).error == "unknown message type"
    assert target.push(info(3, ".rcv"), piece(b"x"), {}).error == "unknown message type"
    assert target.push(info(99, ".dat"), piece(b"x")).error == "volume 99 not found"
    assert target.push(info(9, ".ec00", is_ec_volume=True, disk_id=2)).error == "invalid disk_id 2: only have 2 disks"
    assert target.push(info(9, ".dat", disk_type="nvme")).error == "no nvme disk location with a free slot for volume 9"
    assert (target.push().error, target.push().bytes_written) == ("", 0)
    assert target.files() == before


@pytest.mark.parametrize("fields", [{}, {"is_ec_volume": True}, {"disk_type": "hdd"}])
def test_receive_file_refuses_names_that_leave_the_directory(target: Server, fields: dict[str, Any]) -> None:
    before = target.files()
    for extension in HOSTILE_EXTENSIONS:
        answer = target.push(info(9, extension, **fields), piece(b"x"))
        assert answer.error.startswith("invalid file extension "), extension
    for collection in (*HOSTILE_COLLECTIONS, "a\0b"):
        answer = target.push(info(9, ".ec00", collection=collection, **fields), piece(b"x"))
        assert answer.error.startswith("invalid collection "), collection
    assert target.files() == before


@pytest.mark.parametrize("extension", [".dat", ".idx", ".sdx", ".cpd", ".cpx", ".cpc"])
def test_receive_file_leaves_what_a_mounted_volume_has_open(target: Server, extension: str) -> None:
    fill(target, 3)
    answer = target.push(info(3, extension), piece(b"not a volume"))
    assert answer.error == f"volume 3 is mounted; unmount before ReceiveFile of {extension}"
    assert content(target.volume(3), 5) == b"needle 5 " * 5


def test_receive_ec_files_go_where_their_index_is(target: Server) -> None:
    (target.directories[1] / "c_9.ecx").write_bytes(b"rows")
    assert target.push(info(9, ".ec03", collection="c", is_ec_volume=True), piece(b"shard")).error == ""
    assert (target.directories[1] / "c_9.ec03").read_bytes() == b"shard"
    assert target.push(info(8, ".ec03", is_ec_volume=True), piece(b"hdd first")).error == ""
    assert (target.directories[0] / "8.ec03").read_bytes() == b"hdd first"
    assert target.push(info(8, ".ec04", is_ec_volume=True, disk_id=1), piece(b"as told")).error == ""
    assert (target.directories[1] / "8.ec04").read_bytes() == b"as told"


def test_files_of_a_mounted_ec_volume_are_refused(target: Server) -> None:
    fill(target, 9)
    assert target.call("VolumeEcShardsGenerate", volume_id=9).code is Code.OK
    assert target.call("VolumeEcShardsMount", volume_id=9, shard_ids=[0, 1]).code is Code.OK
    answer = target.push(info(9, ".ec00", is_ec_volume=True, disk_id=7), piece(b"x"))
    assert answer.error == "ec volume 9 is mounted on disk_ids:[0]; unmount before ReceiveFile"
    target.store.unmount_volume(9)
    assert "with a free slot for volume 9" in target.push(info(9, ".dat", disk_type="hdd")).error
    wanted = {"volume_id": 9, "ext": ".ec01", "is_ec_volume": True, "stop_offset": WHOLE}
    assert got(target.call("CopyFile", **wanted)) == (target.directories[0] / "9.ec01").read_bytes()


def test_receive_staged_volume_files(target: Server) -> None:
    (target.directories[0] / "8.ec00").write_bytes(b"")  # an empty shard is none
    assert target.push(info(8, ".dat", disk_type="hdd"), piece(b"staged")).error == ""
    assert (target.directories[0] / "8.dat.copying").read_bytes() == b"staged"
    (target.directories[0] / "9.ec00").write_bytes(b"shard")
    assert "with a free slot for volume 9" in target.push(info(9, ".dat", disk_type="hdd")).error
    assert target.push(info(9, ".dat", disk_type="ssd"), piece(b"x")).error == ""


def test_cut_push_leaves_the_old_file_and_nothing_else(target: Server) -> None:
    target.make(3)
    (target.directories[0] / "3.rcv").write_bytes(b"old")
    before = target.files()
    begun = threading.Event()

    def messages() -> Iterator[Any]:
        yield pb.ReceiveFileRequest(**info(3, ".rcv"))
        yield pb.ReceiveFileRequest(file_content=b"half")
        begun.wait(10)
        raise RuntimeError("the client breaks off")

    threading.Timer(0.2, begun.set).start()
    assert push(target.client, messages()).code is not Code.OK
    wait_for(lambda: target.files() == before, "the working file to go")
    assert (target.directories[0] / "3.rcv").read_bytes() == b"old"


class LateCall:
    """A call whose end is told a moment after its requests ended, as the library does with a call that was cut."""

    def __init__(self, server: Server, late_s: float | None) -> None:
        self.server = server.context
        self.context = SimpleNamespace(cancel=lambda: None)
        self._late_s = late_s

    def on_end(self, wake: Any) -> None:
        if self._late_s is not None:
            threading.Timer(self._late_s, wake).start()

    def check(self) -> None:
        pass


def test_no_cut_push_passes_for_a_whole_one(target: Server) -> None:
    target.make(3)
    (target.directories[0] / "3.rcv").write_bytes(b"old")
    half = [pb.ReceiveFileRequest(**info(3, ".rcv", file_size=100)), pb.ReceiveFileRequest(file_content=b"half")]
    with pytest.raises(CallEnded):
        handlers.receive_file(LateCall(target, 0.05), iter(half))  # type: ignore[arg-type]
    assert (target.directories[0] / "3.rcv").read_bytes() == b"old"
    assert target.files() == {"3.dat", "3.idx", "3.vif", "3.rcv"}
    answer = handlers.receive_file(LateCall(target, None), iter(half))  # type: ignore[arg-type]
    assert (answer.error, answer.bytes_written) == ("", 4)  # what was announced does not matter


@pytest.mark.parametrize(
    ("point", "error"),
    [
        ("copy.create=error:ENOSPC", "failed to create file: open {path}: no space left on device"),
        ("copy.write=error:ENOSPC", "failed to write file: write {path}: no space left on device"),
        ("copy.sync=error:EIO", "failed to write file: sync {path}: input/output error"),
        ("copy.rename=error:EIO", "failed to write file: rename {path}: input/output error"),
    ],
)
def test_push_that_the_disk_refuses(target: Server, point: str, error: str) -> None:
    target.make(3)
    before = target.files()
    with faults.set_points(point):
        answer = target.push(info(3, ".rcv"), piece(b"x" * 100))
    assert answer.error == error.format(path=target.directories[0] / "3.rcv")
    assert target.files() == before


def test_push_over_the_file_size_limit_of_the_process(target: Server) -> None:
    target.make(3)
    before = target.files()
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        answer = target.push(info(3, ".rcv"), *[piece(bytes(1 << 19)) for _ in range(4)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    assert answer.error == f"failed to write file: write {target.directories[0] / '3.rcv'}: file too large"
    assert target.files() == before


# -- VolumeIncrementalCopy --------------------------------------------------------------------------------------------


def test_incremental_copy(source: Server) -> None:
    fill(source, 3)
    volume = source.volume(3)
    whole = (source.directories[0] / "3.dat").read_bytes()
    assert got(source.call("VolumeIncrementalCopy", volume_id=3, since_ns=0)) == whole[8:]
    middle = volume.read_needle(10)
    newer = got(source.call("VolumeIncrementalCopy", volume_id=3, since_ns=middle.append_at_ns))
    assert newer == whole[volume.lookup(11).offset :]
    assert source.call("VolumeIncrementalCopy", volume_id=3, since_ns=1 << 62).messages == []
    answer = source.call("VolumeIncrementalCopy", volume_id=99)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "not found volume id 99")


def test_incremental_copy_of_an_index_that_lies(source: Server) -> None:
    volume = source.make(3)
    put(volume, 1, b"x")
    volume.sync()
    with open(source.directories[0] / "3.idx", "r+b") as index:
        index.seek(8)
        index.write((1 << 20).to_bytes(4, "big"))
    answer = source.call("VolumeIncrementalCopy", volume_id=3)
    assert (answer.code, answer.details) == (
        Code.UNKNOWN,
        f"fail to locate by appendAtNs 0: read entry 0 offset {8 << 20}: EOF",
    )


# -- VolumeCopy -------------------------------------------------------------------------------------------------------


def copy_volume(target: Server, vid: int, address: str, **fields: Any) -> Any:
    return target.call("VolumeCopy", volume_id=vid, source_data_node=address, **fields)


def same_files(source: Server, target: Server, name: str, directory: int = 0) -> None:
    for extension in ("dat", "idx"):
        left, right = (
            source.directories[0] / f"{name}.{extension}",
            target.directories[directory] / f"{name}.{extension}",
        )
        assert left.read_bytes() == right.read_bytes()
        assert left.stat().st_mtime_ns == right.stat().st_mtime_ns


def test_volume_copy(source: Server, target: Server) -> None:
    fill(source, 3, "col")
    volume = source.volume(3)
    answer = copy_volume(target, 3, source.address, collection="col")
    assert answer.code is Code.OK, answer.details
    tombstone_ns = volume.stat().last_append_at_ns
    assert [(m.processed_bytes, m.last_append_at_ns) for m in answer.messages] == [(0, tombstone_ns)]
    same_files(source, target, "col_3")
    assert target.files() == {"col_3.dat", "col_3.idx", "col_3.vif"}
    assert content(target.volume(3), 7) == content(volume, 7)
    assert target.news == [("new", 3)]
    assert target.volume(3).collection == "col"


def test_volume_copy_of_an_empty_volume(source: Server, target: Server) -> None:
    source.make(3)
    answer = copy_volume(target, 3, source.address)
    assert answer.code is Code.OK, answer.details
    assert answer.messages[-1].last_append_at_ns == source.volume(3).modified_at_s * 1_000_000_000
    assert target.volume(3).dat_bytes == 8
    put(target.volume(3), 1, b"writable")


def test_volume_copy_takes_the_sources_disk_type_unless_told(source: Server, target: Server, tmp_path: Path) -> None:
    fill(source, 3)
    assert copy_volume(target, 3, source.address, disk_type="ssd").code is Code.OK
    assert (target.directories[1] / "3.dat").exists()
    back = Server(tmp_path / "back", disk_types=("", "ssd"))
    try:
        assert copy_volume(back, 3, target.address).code is Code.OK
        assert (back.directories[1] / "3.dat").exists()
    finally:
        back.end()


def test_volume_copy_with_an_idx_directory(source: Server, tmp_path: Path) -> None:
    fill(source, 3)
    server = Server(tmp_path / "apart", idx=True)
    try:
        assert copy_volume(server, 3, source.address).code is Code.OK
        assert server.idx_directory is not None
        assert (server.idx_directory / "3.idx").read_bytes() == (source.directories[0] / "3.idx").read_bytes()
        assert content(server.volume(3), 4) == b"needle 4 " * 4
        assert server.files() == {"3.dat", "3.idx", "3.vif"}
    finally:
        server.end()


def test_volume_copy_reports_progress(source: Server, target: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "REPORT_INTERVAL_BYTES", 3 << 20)
    put(source.make(3), 1, os.urandom(11 << 20))
    answer = copy_volume(target, 3, source.address)
    assert [m.processed_bytes >> 20 for m in answer.messages] == [4, 8, 11, 0]
    assert answer.messages[-1].last_append_at_ns > 0


def test_volume_copy_replaces_an_older_replica(source: Server, target: Server) -> None:
    fill(source, 3)
    put(target.make(3), 1000, b"only the old one has this")
    answer = copy_volume(target, 3, source.address)
    assert answer.code is Code.OK, answer.details
    same_files(source, target, "3")
    assert target.news == [("new", 3), ("deleted", 3), ("new", 3)]
    assert target.files() == {"3.dat", "3.idx", "3.vif"}


def test_volume_copy_replaces_a_replica_on_another_disk_and_of_another_collection(
    source: Server, target: Server
) -> None:
    fill(source, 3, "new")
    put(target.make(3, "old", disk_type="ssd"), 1, b"old")
    assert copy_volume(target, 3, source.address).code is Code.OK
    assert target.files() == {"new_3.dat", "new_3.idx", "new_3.vif"}


def test_the_only_slot_may_be_the_old_replicas(source: Server, target: Server) -> None:
    fill(source, 3)
    for vid in (3, 4, 5, 6):
        put(target.make(vid), 1, b"full")
    assert copy_volume(target, 3, source.address).code is Code.OK
    answer = copy_volume(target, 7, source.address)
    assert answer.details == "read volume file status failed, rpc error: code = Unknown desc = not found volume id 7"
    fill(source, 7)
    answer = copy_volume(target, 7, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "no space left for disk type hdd")


class Kept:
    """A target with a replica that a failing copy must leave as it was."""

    def __init__(self, target: Server) -> None:
        self._target = target
        put(target.make(3), 1000, b"the old replica")
        target.volume(3).sync()
        self._files = {path: path.read_bytes() for path in target.directories[0].glob("3.*")}

    def check(self) -> None:
        assert content(self._target.volume(3), 1000) == b"the old replica"
        assert {path: path.read_bytes() for path in self._files} == self._files
        assert self._target.files() == {path.name for path in self._files}
        assert self._target.news == [("new", 3)]
        put(self._target.volume(3), 1001, b"still writable")


def test_no_room_keeps_the_old_replica(source: Server, target: Server) -> None:
    fill(source, 3)
    kept = Kept(target)
    answer = copy_volume(target, 3, source.address, disk_type="nvme")
    assert (answer.code, answer.details) == (Code.UNKNOWN, "no space left for disk type nvme")
    kept.check()


def test_a_source_that_cannot_be_had_keeps_the_old_replica(source: Server, target: Server) -> None:
    kept = Kept(target)
    answer = copy_volume(target, 3, source.address)
    text = "read volume file status failed, rpc error: code = Unknown desc = not found volume id 3"
    assert (answer.code, answer.details) == (Code.UNKNOWN, text)
    for address in ("127.0.0.1:1.1", ""):
        answer = copy_volume(target, 3, address)
        assert answer.code is Code.UNAVAILABLE
        assert answer.details.startswith("read volume file status failed, rpc error: code = Unavailable desc = ")
    for address in ("127.0.0.1:nonsense", "127.0.0.1", "127.0.0.1:99999"):
        answer = copy_volume(target, 3, address)
        assert answer.code is Code.INVALID_ARGUMENT, address
        assert answer.details.startswith("source_data_node: ")
    kept.check()


@pytest.mark.parametrize(
    "point",
    [
        "copy.create=error:ENOSPC@1",
        "copy.create=error:EACCES@3",
        "copy.write=error:ENOSPC@1",
        "copy.write=error:ENOSPC@2",
        "copy.sync=error:EIO@1",
        "copy.sync=error:EIO@2",
        "copy.seal=error:EIO",
        "copy.marker.write=error:ENOSPC",
        "copy.marker.rename=error:EIO",
    ],
)
def test_a_disk_that_fails_keeps_the_old_replica(source: Server, target: Server, point: str) -> None:
    fill(source, 3)
    kept = Kept(target)
    with faults.set_points(point):
        answer = copy_volume(target, 3, source.address)
    assert answer.code is Code.UNKNOWN
    kept.check()
    assert copy_volume(target, 3, source.address).code is Code.OK


def test_a_disk_that_fails_without_an_old_replica_leaves_nothing(source: Server, target: Server) -> None:
    fill(source, 3)
    with faults.set_points("copy.write=error:ENOSPC@2"):
        answer = copy_volume(target, 3, source.address)
    path = target.directories[0] / "3.idx"
    assert answer.details == f"failed to copy {path} file: write {path}: no space left on device"
    assert target.files() == set()
    assert target.news == []


def sick_source(source: Server, copy_file: Any, **changes: Any) -> Peer:
    """A source that tells the truth about itself, with changes, and sends files as it likes."""

    def status(request: Any, context: grpc.ServicerContext) -> Any:
        answer = source.client.call("ReadVolumeFileStatus", {"volume_id": request.volume_id}).first
        for name, value in changes.items():
            setattr(answer, name, value)
        return answer

    return Peer(ReadVolumeFileStatus=status, CopyFile=copy_file)


def cut(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    yield pb.CopyFileResponse(file_content=b"\3" + bytes(7), modified_ts_ns=1)
    context.abort(Code.DATA_LOSS, "the stream breaks")


def garbage(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    yield b"\x0a\x7fshort"


def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    while context.is_active():
        yield pb.CopyFileResponse(file_content=bytes(1 << 20), modified_ts_ns=1)


def nothing(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    return iter(())


def zeros(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """As many bytes as asked for, of no volume."""
    yield pb.CopyFileResponse(file_content=bytes(min(request.stop_offset, 1 << 16)), modified_ts_ns=1)


def half(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    yield pb.CopyFileResponse(file_content=b"\3" + bytes(99), modified_ts_ns=1)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (cut, "receiving {dat}: rpc error: code = DataLoss desc = the stream breaks"),
        (garbage, "a message that ends within a field"),
        (endless, "the source sends more than"),
        (nothing, "stat idx file {idx} failed: stat {idx}: no such file or directory"),
        (zeros, "copied volume 3 "),
        (half, "size [100] is not same as origin file size ["),
    ],
)
@pytest.mark.parametrize("has_replica", [True, False])
def test_sick_sources(source: Server, target: Server, behaviour: Any, text: str, has_replica: bool) -> None:
    fill(source, 3)
    kept = Kept(target) if has_replica else None
    peer = sick_source(source, behaviour)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        peer.stop()
    if kept is None and behaviour is zeros:
        # without a replica to lose it is mounted, or not, as upstream would
        assert answer.details.startswith("failed to mount volume 3: ")
        return
    assert answer.code is Code.UNKNOWN
    directory = target.directories[0]
    assert text.format(dat=directory / "3.dat", idx=directory / "3.idx") in answer.details
    if kept is not None:
        kept.check()
    else:
        assert target.files() == set()


def test_a_source_without_a_data_file(source: Server, target: Server) -> None:
    fill(source, 3)

    def only_index(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if request.ext != ".dat":
            yield from relay(source, "CopyFile")(request, context)

    peer = sick_source(source, only_index)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        peer.stop()
    path = target.directories[0] / "3.dat"
    assert answer.details == f"get dat file info failed, stat {path}: no such file or directory"
    assert target.files() == set()


@pytest.mark.parametrize("collection", [*HOSTILE_COLLECTIONS, "a\0b"])
def test_a_source_that_names_another_directory(source: Server, target: Server, collection: str) -> None:
    fill(source, 3)
    peer = sick_source(source, relay(source, "CopyFile"), collection=collection)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        peer.stop()
    assert (answer.code, answer.details[:19]) == (Code.UNKNOWN, "invalid collection ")
    assert target.files() == set()
    assert {path.name for path in target.directories[0].parent.iterdir()} == {"d0", "d1"}


def test_a_source_of_enormous_size(source: Server, target: Server) -> None:
    fill(source, 3)
    peer = sick_source(source, endless, dat_file_size=(1 << 64) - 1)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        peer.stop()
    assert answer.details == "no space left for disk type hdd"


def test_a_source_that_falls_silent_is_given_up(
    source: Server, target: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, 3)
    kept = Kept(target)
    silence = pull.PeerLink.pull
    monkeypatch.setattr(pull.PeerLink, "pull", lambda self, name, request: silence(self, name, request, 0.3))
    released = threading.Event()

    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.CopyFileResponse(file_content=b"\3", modified_ts_ns=1)
        released.wait(20)

    peer = sick_source(source, silent)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        released.set()
        peer.stop()
    assert answer.code is Code.UNKNOWN
    assert "code = DeadlineExceeded desc = " in answer.details
    assert "has sent nothing for 0.3 s" in answer.details
    kept.check()


def test_a_cancelled_copy_stops_within_a_second_and_cleans_up(source: Server, target: Server) -> None:
    put(source.make(3), 1, os.urandom(20 << 20))
    kept = Kept(target)
    stream = target.client.open_stream(
        "VolumeCopy", {"volume_id": 3, "source_data_node": source.address, "io_byte_per_second": 1 << 20}
    )
    working = target.directories[0] / "3.dat.copying"
    wait_for(lambda: working.exists() and working.stat().st_size > 0, "the copy to begin")
    stream.cancel()
    cancelled_s = time.monotonic()
    wait_for(lambda: not working.exists(), "the clean-up")
    assert time.monotonic() - cancelled_s < 1.5
    wait_for(lambda: _copy_slots(target) == COPIES and _copy_slots(source) == COPIES, "the slots")
    kept.check()


def test_a_copy_cancelled_while_the_source_is_silent(source: Server, target: Server) -> None:
    fill(source, 3)
    begun, released = threading.Event(), threading.Event()

    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        begun.set()
        released.wait(20)
        return iter(())

    peer = sick_source(source, silent)
    try:
        stream = target.client.open_stream("VolumeCopy", {"volume_id": 3, "source_data_node": peer.address})
        assert begun.wait(10)
        stream.cancel()
        wait_for(lambda: target.files() == set(), "the clean-up", 2.0)
        wait_for(lambda: _copy_slots(target) == COPIES, "the slot", 2.0)
    finally:
        released.set()
        peer.stop()


def test_a_lost_reply_deletes_nothing(source: Server, target: Server) -> None:
    fill(source, 3)
    with faults.set_points("copy.mount=sleep:400"):
        stream = target.client.open_stream("VolumeCopy", {"volume_id": 3, "source_data_node": source.address})
        wait_for((target.directories[0] / "3.idx").exists, "the renames")
        stream.cancel()
        wait_for(lambda: target.store.has_volume(3), "the mount")
        wait_for(lambda: _copy_slots(target) == COPIES, "the end of the call")
    same_files(source, target, "3")
    assert target.files() == {"3.dat", "3.idx", "3.vif"}


def test_two_copies_of_one_volume_do_not_meet(source: Server, target: Server) -> None:
    put(source.make(3), 1, os.urandom(4 << 20))
    stream = target.client.open_stream(
        "VolumeCopy", {"volume_id": 3, "source_data_node": source.address, "io_byte_per_second": 1 << 20}
    )
    note = target.directories[0] / "3.note"
    wait_for(lambda: note.exists() and note.read_text() == f"copying from {source.address}", "the first copy")
    answer = copy_volume(target, 3, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "volume 3 is being copied already")
    assert [m.last_append_at_ns > 0 for m in stream][-1:] == [True]
    same_files(source, target, "3")


def test_a_volume_made_meanwhile_is_not_replaced(source: Server, target: Server) -> None:
    put(source.make(3), 1, os.urandom(2 << 20))
    stream = target.client.open_stream(
        "VolumeCopy", {"volume_id": 3, "source_data_node": source.address, "io_byte_per_second": 1 << 20}
    )
    wait_for((target.directories[0] / "3.dat.copying").exists, "the copy to begin")
    put(target.make(3, disk_type="ssd"), 1, b"newer")
    with pytest.raises(grpc.RpcError, match="it was made here while it was being copied"):
        list(stream)
    assert content(target.volume(3), 1) == b"newer"
    assert target.files() == {"3.dat", "3.idx", "3.vif"}


def test_a_replica_in_vacuum_is_not_replaced(source: Server, target: Server) -> None:
    fill(source, 3)
    kept = Kept(target)
    assert target.volume(3).try_claim("vacuum")
    try:
        answer = copy_volume(target, 3, source.address)
    finally:
        target.volume(3).release()
    assert answer.details == "failed to delete existing volume 3: volume 3 is compacting"
    kept.check()


def test_copies_under_way_share_the_room(target: Server) -> None:
    room, locations = copy.CopyRoom(), target.store.locations
    free = locations[0].disk_usage().free_bytes
    with ExitStack() as under_way:
        assert under_way.enter_context(room.admit(locations, 1, free // 2, "hdd")) is locations[0]
        with pytest.raises(NoFreeLocation, match="no space left for disk type hdd"):
            under_way.enter_context(room.admit(locations, 2, free // 4 * 3, "hdd"))
        for vid in (2, 3, 4):
            under_way.enter_context(room.admit(locations, vid, 1, "hdd"))
        with pytest.raises(NoFreeLocation, match="no space left for disk type hdd"):
            under_way.enter_context(room.admit(locations, 5, 1, "hdd"))  # no slot is left
    with room.admit(locations, 5, free // 4 * 3, "hdd"):
        pass


def test_a_volume_vacuumed_meanwhile_is_told(source: Server, target: Server) -> None:
    fill(source, 3)

    def behaviour(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if request.ext == ".idx":
            compact.compact(source.volume(3))
            compact.commit(source.volume(3))
        yield from relay(source, "CopyFile")(request, context)

    peer = sick_source(source, behaviour)
    try:
        answer = copy_volume(target, 3, peer.address)
    finally:
        peer.stop()
    assert answer.details.endswith("rpc error: code = Unknown desc = volume 3 is compacted")
    assert target.files() == set()


def test_the_rate_is_kept(source: Server, target: Server) -> None:
    put(source.make(3), 1, os.urandom(4 << 20))
    began_s = time.monotonic()
    assert copy_volume(target, 3, source.address, io_byte_per_second=4 << 20).code is Code.OK
    assert time.monotonic() - began_s > 0.5


# -- what a crash leaves ----------------------------------------------------------------------------------------------


def reopen(server: Server) -> Store:
    server.store.close()
    fresh = Store(server.config)
    fresh.load()
    return fresh


def test_renames_that_fail_are_finished_at_the_next_start(source: Server, target: Server) -> None:
    fill(source, 3)
    put(target.make(3), 1000, b"old")
    with faults.set_points("copy.rename=error:EIO@2+"):
        answer = copy_volume(target, 3, source.address)
    assert "input/output error" in answer.details
    assert target.files() == {"3.dat", "3.idx.copying", "3.vif.copying", "3.copied"}
    fresh = reopen(target)
    try:
        volume = fresh.find_volume(3)
        assert volume is not None
        assert content(volume, 9) == b"needle 9 " * 9
        same_files(source, target, "3")
        assert target.files() == {"3.dat", "3.idx", "3.vif"}
    finally:
        fresh.close()


def test_a_sealed_copy_whose_replica_is_still_there_goes(source: Server, target: Server) -> None:
    put(target.make(3), 1000, b"old")
    for extension in ("dat", "idx", "vif"):
        (target.directories[0] / f"3.{extension}.copying").write_bytes(b"a copy")
    (target.directories[0] / "3.copied").write_bytes(b".dat .idx .vif")
    fresh = reopen(target)
    try:
        volume = fresh.find_volume(3)
        assert volume is not None
        assert content(volume, 1000) == b"old"
        assert target.files() == {"3.dat", "3.idx", "3.vif"}
    finally:
        fresh.close()


@pytest.mark.parametrize("lost", ["", ".dat"])
def test_a_sealed_copy_is_not_served_by_an_old_index_beside_its_data(source: Server, tmp_path: Path, lost: str) -> None:
    """A loader takes an index beside the data before that in the idx directory: the replica that was to be replaced
    had its own there, and the crash came before it was removed, or between its files."""
    fill(source, 3)
    server = Server(tmp_path / "other", idx=True)
    assert server.idx_directory is not None
    directory = server.directories[0]
    old = create_volume(str(directory), str(directory), "", 3, replica_placement=ReplicaPlacement())
    put(old, 1000, b"old")
    put(old, 9, b"old, too")
    old.close()
    source.store.close()
    for extension in ("dat", "idx", "vif"):
        place = server.idx_directory if extension == "idx" else directory
        shutil.copy(source.directories[0] / f"3.{extension}", place / f"3.{extension}.copying")
    (directory / "3.copied").write_bytes(b".dat .idx .vif")
    (directory / "3.cpc").touch()  # a marker that stayed, of the old replica: not to be settled with files of the copy
    if lost:
        (directory / f"3{lost}").unlink()
    fresh = reopen(server)
    try:
        volume = fresh.find_volume(3)
        assert volume is not None and not volume.is_read_only
        if lost:
            assert content(volume, 9) == b"needle 9 " * 9
            assert volume.idx_path == f"{server.idx_directory}/3.idx"
        else:
            assert content(volume, 1000) == b"old" and content(volume, 9) == b"old, too"
        assert server.files() == {"3.dat", "3.idx", "3.vif"}
    finally:
        fresh.close()
        server.end()


def test_working_files_of_a_crash_are_removed_and_others_left(target: Server) -> None:
    for name in ("3.dat.copying", "c_4.ec01.receiving", "5.vif.copying"):
        (target.directories[1] / name).write_bytes(b"half")
    for name in ("notes.copying", "3.dat.copying.bak", "x.d-t.copying"):
        (target.directories[1] / name).write_bytes(b"mine")
    fresh = reopen(target)
    fresh.close()
    assert target.files() == {"notes.copying", "3.dat.copying.bak", "x.d-t.copying"}


def test_what_was_made_since_a_crash_is_not_overwritten(source: Server, target: Server) -> None:
    """Another server may have been at work on the directory in between."""
    put(target.make(3), 1000, b"made since")
    for extension in ("idx", "vif"):  # the data had been renamed
        (target.directories[0] / f"3.{extension}.copying").write_bytes(b"a copy")
    (target.directories[0] / "3.copied").write_bytes(b".dat .idx .vif")
    fresh = reopen(target)
    try:
        volume = fresh.find_volume(3)
        assert volume is not None
        assert content(volume, 1000) == b"made since"
        assert target.files() == {"3.dat", "3.idx", "3.vif"}
    finally:
        fresh.close()


def test_notes_that_stand_alone_are_removed(target: Server) -> None:
    put(target.make(4), 1, b"whole")
    for name in ("3.note", "5.dat", "5.note"):
        (target.directories[0] / name).write_bytes(b"copying from elsewhere")
    reopen(target).close()
    assert target.files() == {"4.dat", "4.idx", "4.vif"}


def test_an_idx_directory_may_be_shared(tmp_path: Path) -> None:
    server = Server(tmp_path, idx=True)
    assert server.idx_directory is not None
    (server.directories[0] / "3.dat.copying").write_bytes(b"half")
    for vid in (3, 4):  # 4 is being copied by another server
        (server.idx_directory / f"{vid}.idx.copying").write_bytes(b"half")
    fresh = reopen(server)
    fresh.close()
    assert server.files() == {"4.idx.copying"}
    server.end()


def test_files_that_are_not_mounted_are_not_noted(source: Server, target: Server) -> None:
    """A note would make the next load delete them."""
    fill(source, 3)
    put(target.make(3), 1, b"unmounted, not forgotten")
    target.store.unmount_volume(3)
    with faults.set_points("copy.write=error:ENOSPC@2"):
        assert copy_volume(target, 3, source.address).code is Code.UNKNOWN
    assert target.files() == {"3.dat", "3.idx", "3.vif"}
    assert content(target.store.mount_volume(3), 1) == b"unmounted, not forgotten"


def test_the_rate_of_the_server_is_kept(source: Server, tmp_path: Path) -> None:
    put(source.make(3), 1, os.urandom(4 << 20))
    slow = Server(tmp_path / "slow", maintenance_bytes_per_s=4 << 20)
    try:
        began_s = time.monotonic()
        assert copy_volume(slow, 3, source.address).code is Code.OK
        assert time.monotonic() - began_s > 0.5
    finally:
        slow.end()
