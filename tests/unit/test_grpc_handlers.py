"""The RPCs on a real store: answers, texts and codes of contract grpc.md 4, 5 and 7."""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_helpers import Answer, BeatLog, FakeMaster, VolumeClient, wait_for

from pyvolume._native import engine
from pyvolume.config import DirConfig, ServerConfig
from pyvolume.errors import StorageError
from pyvolume.pb import master_pb2
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.security_config import SecurityConfig
from pyvolume.server.context import ServerContext
from pyvolume.server.grpc import needles
from pyvolume.server.grpc.service import HANDLERS, make_grpc_server
from pyvolume.server.heartbeat import Heartbeat
from pyvolume.server.master_client import MasterClient
from pyvolume.storage.store import Store
from pyvolume.storage.volume import FLAG_CHUNK_MANIFEST, FLAG_HAS_LAST_MODIFIED, FLAG_HAS_TTL, NeedleIn
from pyvolume.types import Ttl

ROOT = Path(__file__).resolve().parents[2]
Code = grpc.StatusCode
NOWHERE = 987654


class Node:
    """A volume server without HTTP, and a scripted master."""

    def __init__(self, directory: Path, **master: Any) -> None:
        self.marks: list[Any] = []
        self.mark_failure = ""

        def mark(request: Any, context: grpc.ServicerContext) -> Any:
            self.marks.append(request)
            if self.mark_failure:
                context.abort(Code.INTERNAL, self.mark_failure)
            return master_pb2.VolumeMarkReadonlyResponse()

        self.beats = BeatLog(lambda stream, number, beat: iter(()))
        methods = {
            "SendHeartbeat": self.beats,
            "VolumeMarkReadonly": mark,
            "Ping": lambda request, context: master_pb2.PingResponse(start_time_ns=77),
            **master,
        }
        self.master = FakeMaster(**methods)
        self.directories = [directory / "one", directory / "two"]
        for path in self.directories:
            path.mkdir(parents=True, exist_ok=True)
        self.config = ServerConfig(
            ip="127.0.0.1",
            port=8081,
            server_id="127.0.0.1:8081",
            masters=(self.master.address,),
            data_center="dc1",
            rack="r1",
            dirs=(
                DirConfig(str(self.directories[0]), "", max_volumes=4),
                DirConfig(str(self.directories[1]), "", max_volumes=2, disk_type="ssd"),
            ),
        )
        self.store = Store(self.config)
        self.store.load()
        client = MasterClient(self.config)
        client.set_current(self.master.address)
        self.context = ServerContext(config=self.config, security=SecurityConfig(), store=self.store, master=client)
        self.server = make_grpc_server(self.context, "127.0.0.1:0")
        self.server.start()
        self.client = VolumeClient(self.server.port)

    def call(self, name: str, **fields: Any) -> Answer:
        return self.client.call(name, fields)

    def alloc(self, vid: int, **fields: Any) -> Any:
        assert self.call("AllocateVolume", **{"volume_id": vid, "version": 3, **fields}).code is Code.OK
        return self.store.find_volume(vid)

    def put(self, vid: int, key: int, data: bytes, *, cookie: int = 0x11, **fields: Any) -> Any:
        needle = NeedleIn(key, cookie, data, **fields)
        volume = self.store.find_volume(vid)
        assert volume is not None
        return volume.write_needle(needle)

    def file(self, name: str, directory: int = 0) -> Path:
        return self.directories[directory] / name

    def end(self) -> None:
        self.client.close()
        self.server.stop(0)
        self.context.master.close()
        self.store.close()
        self.master.stop()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def plain(answer: Answer) -> tuple[Code, str]:
    return answer.code, answer.details


def unknown(text: str) -> tuple[Code, str]:
    return Code.UNKNOWN, text


# -- volumes ----------------------------------------------------------------------------------------------------------


def test_allocate(node: Node) -> None:
    assert (
        node.call("AllocateVolume", volume_id=3, collection="c", replication="10", ttl="5d", version=3).code is Code.OK
    )
    assert {path.name for path in node.directories[0].iterdir()} >= {"c_3.dat", "c_3.idx", "c_3.vif"}
    assert node.file("c_3.dat").read_bytes() == bytes((3, 10, 5, 3, 0, 0, 0, 0))
    status = node.call("VolumeStatus", volume_id=3).first
    assert status == pb.VolumeStatusResponse(volume_size=8)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"replication": "999"}, "unexpected replication type: 999"),
        ({"replication": "-1"}, "unknown replication type: 0-1"),
        ({"ttl": "abc"}, 'strconv.Atoi: parsing "ab": invalid syntax'),
        ({"replication": "999", "ttl": "abc"}, "unexpected replication type: 999"),
        ({"volume_id": 7}, "Volume Id 7 already exists!"),
        ({"disk_type": "nvme"}, "No more free space left"),
        ({"version": 0}, "volume super block version 0 is not supported"),
        ({"version": 4}, "volume super block version 4 is not supported"),
    ],
)
def test_allocate_refuses(node: Node, fields: dict[str, Any], text: str) -> None:
    node.alloc(7)
    assert plain(node.call("AllocateVolume", **{"volume_id": 8, "version": 3, **fields})) == unknown(text)


def test_allocate_fills_the_disk_of_its_type(node: Node) -> None:
    node.alloc(1, disk_type="SSD")
    node.alloc(2, disk_type="ssd")
    assert node.file("2.dat", 1).exists()
    full = node.call("AllocateVolume", volume_id=3, version=3, disk_type="ssd")
    assert plain(full) == unknown("No more free space left")
    node.alloc(4, disk_type="hdd")
    assert node.file("4.dat", 0).exists()


@pytest.mark.parametrize("collection", ["../up", "a/b", "..", "a\\b"])
def test_allocate_never_leaves_its_directories(node: Node, tmp_path: Path, collection: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = node.call("AllocateVolume", volume_id=3, version=3, collection=collection)
    assert answer.code is Code.INVALID_ARGUMENT
    assert "collection" in answer.details
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert node.store.find_volume(3) is None


def test_unmount_and_mount(node: Node) -> None:
    node.alloc(3, collection="c")
    node.put(3, 1, b"hello")
    assert node.call("VolumeUnmount", volume_id=3).code is Code.OK
    assert plain(node.call("VolumeStatus", volume_id=3)) == unknown("not found volume id 3")
    assert node.call("VolumeUnmount", volume_id=3).code is Code.OK, "not mounted: fine"
    assert node.call("VolumeMount", volume_id=3).code is Code.OK
    assert node.call("VolumeMount", volume_id=3).code is Code.OK, "mounted already: fine"
    assert node.call("VolumeStatus", volume_id=3).first.file_count == 1
    assert plain(node.call("VolumeMount", volume_id=NOWHERE)) == unknown(f"volume {NOWHERE} not found on disk")


def test_delete(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"hello")
    refused = node.call("VolumeDelete", volume_id=3, only_empty=True)
    assert plain(refused) == unknown("DeleteVolume 3: volume not empty")
    assert node.call("VolumeDelete", volume_id=3).code is Code.OK
    assert not list(node.directories[0].glob("3.*"))
    assert plain(node.call("VolumeDelete", volume_id=3)) == unknown("delete volume 3 not found on disk")
    node.alloc(4)
    assert node.call("VolumeDelete", volume_id=4, only_empty=True).code is Code.OK


def test_delete_collection(node: Node) -> None:
    for vid, collection in ((1, "c"), (2, "c"), (3, "cx"), (4, "")):
        node.alloc(vid, collection=collection)
    assert node.call("DeleteCollection", collection="c").code is Code.OK
    assert [volume.vid for volume in node.store.volumes()] == [3, 4]
    assert node.call("DeleteCollection", collection="never was").code is Code.OK


def test_configure(node: Node) -> None:
    node.alloc(3)
    assert node.call("VolumeConfigure", volume_id=3, replication="001").first.error == ""
    volume = node.store.find_volume(3)
    assert volume is not None
    assert str(volume.replica_placement) == "001"
    assert b'"001"' in node.file("3.vif").read_bytes()
    assert node.file("3.dat").read_bytes()[1] == 0, "the super block stays"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"volume_id": 3, "replication": "777"},
            'volume configure replication volume_id:3 replication:"777": unexpected replication type: 777',
        ),
        (
            {"volume_id": 99, "replication": 'a"'},
            'volume configure replication volume_id:99 replication:"a\\"": unknown replication type: 0a"',
        ),
        (
            {"volume_id": 99, "replication": "001"},
            'volume configure volume_id:99 replication:"001": volume 99 not found on disk. '
            "Also failed to restore mount: volume 99 not found on disk",
        ),
        (
            {"volume_id": 99},
            "volume configure volume_id:99: volume 99 not found on disk. "
            "Also failed to restore mount: volume 99 not found on disk",
        ),
    ],
)
def test_configure_says_in_its_answer_what_failed(node: Node, fields: dict[str, Any], text: str) -> None:
    node.alloc(3)
    assert node.call("VolumeConfigure", **fields).first.error == text
    assert node.store.find_volume(3) is not None


def test_mark_readonly_tells_the_master_before_and_after(node: Node) -> None:
    node.alloc(3, collection="c", replication="001", ttl="3d")
    assert node.call("VolumeMarkReadonly", volume_id=3).code is Code.OK
    assert [mark.is_readonly for mark in node.marks] == [True, True]
    mark = node.marks[0]
    assert (mark.ip, mark.port, mark.volume_id, mark.collection) == ("127.0.0.1", 8081, 3, "c")
    assert (mark.replica_placement, mark.ttl, mark.disk_type, mark.version) == (1, 771, "", 0)
    assert node.call("VolumeStatus", volume_id=3).first.is_read_only
    node.marks.clear()
    assert node.call("VolumeMarkWritable", volume_id=3).code is Code.OK
    assert [mark.is_readonly for mark in node.marks] == [False]
    assert not node.call("VolumeStatus", volume_id=3).first.is_read_only


def test_mark_readonly_that_the_master_refuses_changes_nothing(node: Node) -> None:
    node.alloc(3)
    node.mark_failure = "no"
    answer = node.call("VolumeMarkReadonly", volume_id=3)
    assert plain(answer) == unknown(
        f"grpc VolumeMarkReadonly with master {node.master.http_address}: "
        "set volume 3 to read only on master: rpc error: code = Internal desc = no"
    )
    assert not node.call("VolumeStatus", volume_id=3).first.is_read_only
    assert len(node.marks) == 1


def test_mark_writable_that_the_master_refuses_stays_writable(node: Node) -> None:
    node.alloc(3)
    node.call("VolumeMarkReadonly", volume_id=3)
    node.mark_failure = "no"
    assert node.call("VolumeMarkWritable", volume_id=3).code is Code.UNKNOWN
    assert not node.call("VolumeStatus", volume_id=3).first.is_read_only


@pytest.mark.parametrize(("persist", "after"), [(False, False), (True, True)])
def test_mark_outlives_a_mount_only_if_persistent(node: Node, persist: bool, after: bool) -> None:
    node.alloc(3)
    node.call("VolumeMarkReadonly", volume_id=3, persist=persist)
    node.call("VolumeUnmount", volume_id=3)
    node.call("VolumeMount", volume_id=3)
    assert node.call("VolumeStatus", volume_id=3).first.is_read_only == after


def test_marks_check_the_volume_before_maintenance(node: Node) -> None:
    node.alloc(3)
    maintain(node)
    for name in ("VolumeMarkReadonly", "VolumeMarkWritable"):
        assert plain(node.call(name, volume_id=NOWHERE)) == unknown(f"volume {NOWHERE} not found")
        assert plain(node.call(name, volume_id=3)) == unknown("volume server 127.0.0.1:8081 is in maintenance mode")
    assert not node.marks


def test_status_of_nothing(node: Node) -> None:
    for name in ("VolumeStatus", "VolumeSyncStatus", "ReadVolumeFileStatus"):
        assert plain(node.call(name, volume_id=NOWHERE)) == unknown(f"not found volume id {NOWHERE}"), name


def test_status_counts(node: Node) -> None:
    node.alloc(3)
    for _ in range(2):
        node.put(3, 1, os.urandom(20))
    node.put(3, 2, b"x")
    volume = node.store.find_volume(3)
    assert volume is not None
    volume.delete_needle(2, 0x11)
    status = node.call("VolumeStatus", volume_id=3).first
    assert status.volume_size == node.file("3.dat").stat().st_size
    assert (status.file_count, status.file_deleted_count, status.is_read_only) == (3, 2, False)


def test_consolidate_index(node: Node) -> None:
    node.alloc(3)
    assert node.call("VolumeConsolidateIndex", volume_id=3).code is Code.OK, "one directory for both: nothing to do"
    answer = node.call("VolumeConsolidateIndex", volume_id=NOWHERE)
    assert plain(answer) == unknown(f"volume {NOWHERE} not found on disk")


# -- the server -------------------------------------------------------------------------------------------------------


def maintain(node: Node, on: bool = True) -> None:
    version = node.call("GetState").first.state.version
    answer = node.call("SetState", state=pb.VolumeServerState(maintenance=on, version=version))
    assert answer.first.state.version == version + 1


def test_state(node: Node) -> None:
    empty = node.call("GetState").first
    assert empty.HasField("state")
    assert empty.state == pb.VolumeServerState()
    assert node.call("SetState").first.state == pb.VolumeServerState(), "no state: no change"
    wrong = node.call("SetState", state=pb.VolumeServerState(maintenance=True, version=5))
    assert plain(wrong) == unknown("version mismatch for VolumeServerState (got 0, want 5)")
    maintain(node)
    assert node.call("GetState").first.state == pb.VolumeServerState(maintenance=True, version=1)
    assert pb.VolumeServerState.FromString(node.file("state.pb").read_bytes()).maintenance
    refused = node.call("AllocateVolume", volume_id=3, version=3)
    assert plain(refused) == unknown("volume server 127.0.0.1:8081 is in maintenance mode")
    maintain(node, False)
    node.alloc(3)


def test_server_status(node: Node) -> None:
    status = node.call("VolumeServerStatus").first
    assert [disk.dir for disk in status.disk_statuses] == [str(path) for path in node.directories]
    disk = status.disk_statuses[0]
    assert disk.all == disk.used + disk.free > 0
    assert round(disk.percent_free + disk.percent_used) == 100
    assert (disk.disk_type, disk.error) == ("", "")
    memory = status.memory_status
    assert memory.all == memory.used + memory.free
    assert 0 < memory.self == memory.heap < memory.all
    assert memory.goroutines > 1
    assert memory.stack > 0
    assert (status.version, status.data_center, status.rack) == ("30GB 4.44 ", "dc1", "r1")
    assert status.HasField("state")


def test_ping_of_itself(node: Node) -> None:
    for fields in ({}, {"target_type": "odd"}):
        answer = node.call("Ping", **fields).first
        assert 0 < answer.start_time_ns <= answer.stop_time_ns
        assert answer.remote_time_ns == 0


def test_ping_of_a_master(node: Node) -> None:
    for target in (node.master.address, node.master.http_address):
        answer = node.call("Ping", target=target, target_type="master")
        if target == node.master.address:
            assert answer.first.remote_time_ns == 77
        else:
            assert re.match("ping master .*: rpc error: code = Unavailable", answer.details), "port + 10000 is nobody"


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("127.0.0.1:9", "filer"),
        ("127.0.0.1:9", "master"),
        ("nowhere", ""),
        ("nowhere", "master"),
        ("x", "volumeServer"),
    ],
)
def test_ping_of_others_is_refused(node: Node, target: str, kind: str) -> None:
    answer = node.call("Ping", target=target, target_type=kind)
    assert plain(answer) == (Code.INVALID_ARGUMENT, f"unknown ping target {target} of type {kind}")


@pytest.mark.parametrize("kind", ["master", "filer", "volumeServer"])
def test_ping_without_an_address(node: Node, kind: str) -> None:
    assert plain(node.call("Ping", target_type=kind)) == unknown(
        f'ping {kind} : rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: '
        'dial tcp: missing address"'
    )


def test_leave_ends_the_heartbeat_and_nothing_else(node: Node) -> None:
    heart = Heartbeat(node.context, node.store, node.config, pulse_s=600.0)
    node.context.heartbeat = heart
    heart.start()
    wait_for(lambda: len(node.beats.all()) == 2)
    assert node.context.healthy
    for _ in range(2):
        assert node.call("VolumeServerLeave").code is Code.OK
    assert not node.context.healthy
    wait_for(lambda: node.beats.all()[-1].has_no_volumes and len(node.beats.all()) == 3)
    node.alloc(3)
    heart.stop()
    assert len(node.beats.all()) == 3, "nobody is told any more"


# -- deltas of a real store -------------------------------------------------------------------------------------------


def test_changes_reach_the_master(node: Node) -> None:
    heart = Heartbeat(node.context, node.store, node.config, pulse_s=600.0)
    heart.start()
    wait_for(lambda: len(node.beats.all()) == 2)

    def changes() -> list[tuple[str, int, str]]:
        found = []
        for beat in node.beats.all()[2:]:
            found += [("new", volume.id, volume.collection) for volume in beat.new_volumes]
            found += [("deleted", volume.id, volume.collection) for volume in beat.deleted_volumes]
        return found

    node.alloc(3, collection="c")
    wait_for(lambda: changes() == [("new", 3, "c")])
    node.call("VolumeUnmount", volume_id=3)
    node.call("VolumeUnmount", volume_id=3)
    node.call("VolumeMount", volume_id=3)
    wait_for(lambda: changes()[1:] == [("deleted", 3, "c"), ("new", 3, "c")])
    node.call("VolumeMount", volume_id=3)
    wait_for(lambda: changes()[3:] == [("new", 3, "c")], "mounting again says it again")
    node.call("VolumeConfigure", volume_id=3, replication="001")
    wait_for(lambda: changes()[4:] == [("deleted", 3, "c"), ("new", 3, "c")])
    assert node.beats.all()[-1].new_volumes[0].replica_placement == 1
    node.alloc(4, collection="c")
    node.call("DeleteCollection", collection="c")
    wait_for(lambda: sorted(changes()[7:]) == [("deleted", 3, "c"), ("deleted", 4, "c")])
    node.alloc(5)
    node.call("VolumeDelete", volume_id=5)
    wait_for(lambda: changes()[9:] == [("new", 5, ""), ("deleted", 5, "")])
    heart.stop()


def test_beat_of_a_real_store(node: Node) -> None:
    node.alloc(3, collection="c", replication="001", ttl="3d")
    node.put(3, 0x1234, b"hello")
    node.alloc(4, disk_type="ssd")
    heart = Heartbeat(node.context, node.store, node.config, pulse_s=600.0)
    heart.start()
    first = wait_for(lambda: node.beats.all() and node.beats.all()[0])
    heart.stop()
    assert dict(first.max_volume_counts) == {"": 4, "ssd": 2}
    assert first.max_file_key == 0x1234
    assert len(set(first.location_uuids)) == 2
    volumes = {volume.id: volume for volume in first.volumes}
    assert (volumes[3].collection, volumes[3].replica_placement, volumes[3].ttl) == ("c", 1, 771)
    assert volumes[3].size == node.file("c_3.dat").stat().st_size
    assert abs(volumes[3].modified_at_second - node.file("c_3.dat").stat().st_mtime) < 5
    assert (volumes[4].disk_type, volumes[4].disk_id, volumes[3].disk_id) == ("ssd", 1, 0)
    assert first.volume_digest


# -- copiers ----------------------------------------------------------------------------------------------------------


def test_file_status(node: Node) -> None:
    node.alloc(3, collection="c", replication="001", disk_type="ssd")
    node.put(3, 1, b"hello")
    dat, idx = node.file("c_3.dat", 1), node.file("c_3.idx", 1)
    status = node.call("ReadVolumeFileStatus", volume_id=3).first
    assert (status.volume_id, status.collection, status.disk_type, status.version) == (3, "c", "ssd", 3)
    assert (status.dat_file_size, status.idx_file_size) == (dat.stat().st_size, idx.stat().st_size)
    assert status.dat_file_timestamp_seconds == status.idx_file_timestamp_seconds
    assert abs(status.dat_file_timestamp_seconds - dat.stat().st_mtime) < 5
    assert (status.file_count, status.compaction_revision) == (1, 0)
    assert status.HasField("volume_info")
    assert status.volume_info.version == 3


def test_sync_status(node: Node) -> None:
    node.alloc(3, collection="c", replication="010", ttl="90m")
    node.put(3, 1, b"hello")
    assert node.call("VolumeSyncStatus", volume_id=3).first == pb.VolumeSyncStatusResponse(
        volume_id=3,
        collection="c",
        replication="010",
        ttl="90m",
        tail_offset=node.file("c_3.dat").stat().st_size,
        idx_file_size=16,
        version=3,
    )


# -- needles ----------------------------------------------------------------------------------------------------------


def entry(node: Node, vid: int, key: int) -> engine.Entry:
    volume = node.store.find_volume(vid)
    assert volume is not None
    return volume.lookup(key)


def test_needle_status(node: Node) -> None:
    node.alloc(3)
    node.put(
        3,
        5,
        b"hello",
        cookie=0xABCD,
        flags=FLAG_HAS_LAST_MODIFIED | FLAG_HAS_TTL,
        last_modified_s=1_700_000_000,
        ttl=Ttl.parse("9d"),
    )
    node.put(3, 6, b"")
    status = node.call("VolumeNeedleStatus", volume_id=3, needle_id=5).first
    crc = engine.crc_legacy(engine.crc32c(b"hello"))
    assert (status.needle_id, status.cookie, status.size) == (5, 0xABCD, entry(node, 3, 5).size)
    assert (status.last_modified, status.crc, status.ttl) == (1_700_000_000, crc, "9d")
    assert plain(node.call("VolumeNeedleStatus", volume_id=3, needle_id=9)) == unknown("not found")
    absent = node.call("VolumeNeedleStatus", volume_id=NOWHERE, needle_id=9)
    assert plain(absent) == unknown(f"volume not found {NOWHERE}")
    volume = node.store.find_volume(3)
    assert volume is not None
    volume.delete_needle(5, 0xABCD)
    assert plain(node.call("VolumeNeedleStatus", volume_id=3, needle_id=5)) == unknown("already deleted")


def test_needle_blob(node: Node) -> None:
    node.alloc(3)
    node.put(3, 5, b"hello")
    found = entry(node, 3, 5)
    raw = node.file("3.dat").read_bytes()
    blob = node.call("ReadNeedleBlob", volume_id=3, offset=found.offset, size=found.size).first.needle_blob
    assert blob == raw[found.offset :]
    assert node.call("ReadNeedleBlob", volume_id=3, offset=0, size=0).first.needle_blob == raw[:32], (
        "nothing is verified"
    )


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"volume_id": NOWHERE}, Code.UNKNOWN, f"not found volume id {NOWHERE}"),
        ({"offset": 1 << 30, "size": 5}, Code.UNKNOWN, "read needle blob offset 1073741824 size 5: EOF"),
        ({"offset": 8, "size": 2**31 - 1}, Code.UNKNOWN, "read needle blob offset 8 size 2147483647: EOF"),
        ({"offset": -8, "size": 5}, Code.UNKNOWN, "read needle blob offset -8 size 5: readat {dat}: negative offset"),
        ({"offset": 8, "size": -(2**31)}, Code.INVALID_ARGUMENT, "size: -2147483648 is no size of a needle"),
    ],
)
def test_needle_blob_refuses(node: Node, fields: dict[str, Any], code: Code, text: str) -> None:
    node.alloc(3)
    answer = node.call("ReadNeedleBlob", **{"volume_id": 3, **fields})
    assert plain(answer) == (code, text.format(dat=node.file("3.dat")))


def test_needle_meta(node: Node) -> None:
    node.alloc(3)
    result = node.put(
        3,
        5,
        b"hello",
        cookie=0xABCD,
        flags=FLAG_HAS_LAST_MODIFIED | FLAG_HAS_TTL | 0x02 | 0x04 | 0x20,
        name=b"n" * 200,
        mime=b"m/m",
        pairs=b'{"a":"b"}',
        last_modified_s=1_700_000_000,
        ttl=Ttl.parse("9d"),
    )
    found = entry(node, 3, 5)
    meta = node.call("ReadNeedleMeta", volume_id=3, needle_id=99, offset=found.offset, size=found.size).first
    assert meta == pb.ReadNeedleMetaResponse(
        cookie=0xABCD,
        last_modified=1_700_000_000,
        crc=engine.crc_legacy(engine.crc32c(b"hello")),
        ttl="9d",
        append_at_ns=result.append_at_ns,
    )


def test_needle_meta_of_a_tombstone(node: Node) -> None:
    volume = node.alloc(3)
    node.put(3, 5, b"hello")
    offset = node.file("3.dat").stat().st_size
    volume.delete_needle(5, 0x77, 0x1234)
    meta = node.call("ReadNeedleMeta", volume_id=3, offset=offset, size=-1).first
    assert (meta.cookie, meta.crc, meta.last_modified) == (0x77, engine.crc_legacy(0x1234), 0)
    assert meta.append_at_ns > 0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"volume_id": NOWHERE},
            f"not found volume id {NOWHERE} and read needle metadata at ec shards is not supported",
        ),
        ({"offset": -8}, "readat {dat}: negative offset"),
        ({"offset": 1 << 20, "size": 5}, "EOF"),
        ({"offset": 8, "size": 7}, "EOF"),
    ],
)
def test_needle_meta_refuses(node: Node, fields: dict[str, Any], text: str) -> None:
    node.alloc(3)
    node.put(3, 5, b"hello")
    answer = node.call("ReadNeedleMeta", **{"volume_id": 3, **fields})
    assert plain(answer) == unknown(text.format(dat=node.file("3.dat")))


def test_needle_meta_of_damaged_records(node: Node) -> None:
    node.alloc(3)
    node.put(3, 5, b"hello", flags=0x02, name=b"abc")
    found = entry(node, 3, 5)
    dat = node.file("3.dat")
    raw = bytearray(dat.read_bytes())
    struct.pack_into(">I", raw, found.offset + 16, 1 << 30)
    dat.write_bytes(raw)
    answer = node.call("ReadNeedleMeta", volume_id=3, offset=found.offset, size=found.size)
    assert answer.details.startswith("invalid needle meta size -")
    struct.pack_into(">I", raw, found.offset + 16, 5)
    raw[found.offset + 20 + 5 + 1] = 250  # the name's length
    dat.write_bytes(raw)
    answer = node.call("ReadNeedleMeta", volume_id=3, offset=found.offset, size=found.size)
    assert plain(answer) == unknown("index out of range 2: needle data corrupted")


def test_write_blob(node: Node) -> None:
    node.alloc(3)
    node.put(3, 5, b"hello")
    found = entry(node, 3, 5)
    blob = node.call("ReadNeedleBlob", volume_id=3, offset=found.offset, size=found.size).first.needle_blob
    assert node.call("WriteNeedleBlob", volume_id=3, needle_id=77, size=found.size, needle_blob=blob).code is Code.OK
    status = node.call("VolumeNeedleStatus", volume_id=3, needle_id=77).first
    assert status.needle_id == 5, "the id inside the record"
    size = node.file("3.dat").stat().st_size
    assert node.call("WriteNeedleBlob", volume_id=3, needle_id=5, size=found.size, needle_blob=blob).code is Code.OK
    assert node.file("3.dat").stat().st_size == size, "the same data is there already"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"volume_id": NOWHERE}, f"not found volume id {NOWHERE}"),
        (
            {"needle_blob": b"abc"},
            "write blob needle 5 size 3: needle 5 blob of 3 bytes is shorter than a needle header",
        ),
        (
            {"needle_blob": b"\0" * 16},
            "write blob needle 5 size 3: needle 5 size 3 does not match its blob header size 0",
        ),
    ],
)
def test_write_blob_refuses(node: Node, fields: dict[str, Any], text: str) -> None:
    node.alloc(3)
    answer = node.call("WriteNeedleBlob", **{"volume_id": 3, "needle_id": 5, "size": 3, **fields})
    assert plain(answer) == unknown(text)


def test_write_blob_into_a_read_only_volume(node: Node) -> None:
    node.alloc(3)
    node.call("VolumeMarkReadonly", volume_id=3)
    answer = node.call("WriteNeedleBlob", volume_id=3, needle_id=5, size=0, needle_blob=b"\0" * 32)
    assert plain(answer) == unknown("write blob needle 5 size 0: volume 3 is read only")


# -- batch delete -----------------------------------------------------------------------------------------------------


def results(answer: Answer) -> list[tuple[int, str, int]]:
    return [(result.status, result.error, result.size) for result in answer.first.results]


def test_batch_delete(node: Node) -> None:
    node.alloc(3)
    for key in (1, 2, 3, 4):
        node.put(3, key, b"hello", cookie=0xAABBCCDD)
    node.put(3, 5, b"{}", cookie=0xAABBCCDD, flags=FLAG_CHUNK_MANIFEST)
    size = entry(node, 3, 1).size
    fids = [
        "3,01aabbccdd",
        "3,01aabbccdd",
        "3,02aabbccde",
        "3,01aabbccdd_2",
        "3,05aabbccdd",
        "3,99aabbccdd",
        f"{NOWHERE},01aabbccdd",
    ]
    answer = node.call("BatchDelete", file_ids=fids)
    assert [result.file_id for result in answer.first.results] == fids
    assert results(answer) == [
        (202, "", size),
        (404, "already deleted", 0),
        (400, "File Random Cookie does not match.", 0),
        (202, "", size),
        (406, "ChunkManifest: not allowed in batch delete mode.", 0),
        (404, "not found", 0),
        (404, f"volume {NOWHERE} not found", 0),
    ]
    assert entry(node, 3, 3).size < 0
    assert {result.version for result in answer.first.results} == {0}
    assert results(node.call("BatchDelete")) == []


@pytest.mark.parametrize(
    ("fid", "text"),
    [
        ("nonsense", "Wrong fid format."),
        ("", "Wrong fid format."),
        (",01aabbccdd", "Wrong fid format."),
        ("3,aabbccdd", "Invalid fid: aabbccdd"),
        ("3,", "Invalid fid: "),
        ("3,0000000000000000000000001", "KeyHash is too long."),
        ("3,1_99999999", "KeyHash is too short."),
        (
            "3,zzaabbccdd",
            'Parse needleId error: needle id zz format error: strconv.ParseUint: parsing "zz": invalid syntax',
        ),
        (
            "3,01aabbccdz",
            "Parse cookie error: needle cookie aabbccdz format error: "
            'strconv.ParseUint: parsing "aabbccdz": invalid syntax',
        ),
        ("3,01aabbccdd_x", 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("4294967296,01aabbccdd", 'strconv.ParseUint: parsing "4294967296": value out of range'),
    ],
)
def test_batch_delete_of_bad_ids(node: Node, fid: str, text: str) -> None:
    node.alloc(3)
    assert results(node.call("BatchDelete", file_ids=[fid])) == [(400, text, 0)]


def test_batch_delete_of_odd_volume_parts(node: Node) -> None:
    answer = node.call("BatchDelete", file_ids=["x,01aabbccdd", "99999999999999999999,01aabbccdd"])
    assert results(answer) == [(404, "volume 0 not found", 0), (404, "volume 4294967295 not found", 0)]


def test_batch_delete_without_cookie_check(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"hello", cookie=0xAABBCCDD)
    node.put(3, 5, b"{}", cookie=0xAABBCCDD, flags=FLAG_CHUNK_MANIFEST)
    fids = ["3,05aabbccdd", "3,01aabbccdd", "3,0900000000", f"{NOWHERE},0100000000", "3,0100000000_1"]
    answer = node.call("BatchDelete", file_ids=fids, skip_cookie_check=True)
    shown = results(answer)
    assert [status for status, _, _ in shown] == [202, 202, 304, 500, 400], "a manifest is deleted, too"
    assert shown[3][1] == f"volume {NOWHERE} not found on 127.0.0.1:8081"
    cookie = struct.unpack_from(">I", node.file("3.dat").read_bytes(), node.file("3.dat").stat().st_size - 32)[0]
    assert cookie == 0, "the tombstone's cookie"


def test_batch_delete_in_a_read_only_volume(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"hello", cookie=0xAABBCCDD)
    node.call("VolumeMarkReadonly", volume_id=3)
    assert results(node.call("BatchDelete", file_ids=["3,01aabbccdd"])) == [(500, "volume 3 is read only", 0)]
    node.call("VolumeMarkReadonly", volume_id=3, can_delete=True)
    assert results(node.call("BatchDelete", file_ids=["3,01aabbccdd"]))[0][0] == 202


def content_without_times(node: Node, vid: int) -> tuple[bytes, bytes]:
    """.dat with its append times made 0 (they must rise), and .idx."""
    dat = bytearray(node.file(f"{vid}.dat").read_bytes())
    at, last = 8, 0
    while at < len(dat):
        size = struct.unpack_from(">i", dat, at + 12)[0]
        when = at + 16 + size + 4
        append_at_ns = int.from_bytes(dat[when : when + 8], "big")
        assert append_at_ns > last
        last = append_at_ns
        dat[when : when + 8] = bytes(8)
        at += engine.needle_record_len(size, 3)
    return bytes(dat), node.file(f"{vid}.idx").read_bytes()


@pytest.mark.parametrize("skip_cookie", [False, True])
def test_deletes_of_many_are_as_those_of_one_each(
    node: Node, monkeypatch: pytest.MonkeyPatch, skip_cookie: bool
) -> None:
    """Results and files are the same, for runs cut by whatever is not plain."""
    rest = []
    for key in range(1, 1400):
        tail = "_1" if key % 41 == 0 else ""
        cookie = 0xAABBCCDE if key % 43 == 0 else 0xAABBCCDD
        rest.append(f"{max(1, key - 7 * (key % 29 == 0)):x}{cookie:08x}{tail}")
    odd = {100: "nonsense", 101: "", 300: f"{NOWHERE},01aabbccdd", 500: "x,01aabbccdd", 501: "3,ü1aabbccdd"}
    outcomes = []
    for vid in (3, 4):
        node.alloc(vid)
        for key in range(1, 1300):
            flags = FLAG_CHUNK_MANIFEST if key % 37 == 0 else 0
            data = b"" if key % 61 == 0 else b"needle %d" % key
            node.put(vid, key, data, cookie=0xAABBCCDD, flags=flags, last_modified_s=1)
        fids = [f"{vid},{text}" for text in rest]
        for at, fid in odd.items():
            fids.insert(at, fid)
        if vid == 4:
            monkeypatch.setattr(needles, "_delete_run", lambda call, batch, at: 0)
        answer = node.call("BatchDelete", file_ids=fids, skip_cookie_check=skip_cookie)
        assert [result.file_id for result in answer.first.results] == fids
        outcomes.append((results(answer), content_without_times(node, vid), node.store.find_volume(vid).deleted_count))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2] > 1000


def test_batch_delete_takes_an_id_with_a_newline_as_any_bad_one(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"hello", cookie=0xAABBCCDD)
    node.put(3, 2, b"hello", cookie=0xAABBCCDD)
    shown = results(node.call("BatchDelete", file_ids=["3,01aabbccdd\n3,02aabbccdd", "3,01aabbccdd"]))
    assert [status for status, _, _ in shown] == [400, 202]
    assert entry(node, 3, 2).size > 0


def test_batch_delete_that_cannot_write_goes_on_one_by_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.alloc(3)
    for key in range(1, 600):
        node.put(3, key, b"hello", cookie=0xAABBCCDD)
    tries = []

    def fails(handle: Any, batch: Any, at: int) -> int:
        tries.append(at)
        return -1

    monkeypatch.setattr(engine.Volume, "delete_many", fails)
    shown = results(node.call("BatchDelete", file_ids=[f"3,{key:x}aabbccdd" for key in range(1, 600)]))
    assert {status for status, _, _ in shown} == {202}
    assert tries == [0, 512]


def test_batch_delete_while_the_volume_is_compacted(node: Node) -> None:
    node.alloc(3)
    keys = range(1, 6001)
    for key in keys:
        node.put(3, key, b"needle %d" % key, cookie=0xAABBCCDD)
    gone = [key for key in keys if key % 3]
    statuses: list[int] = []
    halfway = threading.Event()

    def delete() -> None:
        for at in range(0, len(gone), 50):
            fids = [f"3,{key:x}aabbccdd" for key in gone[at : at + 50]]
            statuses.extend(status for status, _, _ in results(node.call("BatchDelete", file_ids=fids)))
            if at > len(gone) // 8:
                halfway.set()

    worker = threading.Thread(target=delete)
    worker.start()
    assert halfway.wait(60)
    for _ in range(3):
        assert node.call("VacuumVolumeCompact", volume_id=3).code is Code.OK
        assert node.call("VacuumVolumeCommit", volume_id=3).code is Code.OK
        assert node.call("VacuumVolumeCleanup", volume_id=3).code is Code.OK
    worker.join()
    assert set(statuses) == {202} and len(statuses) == len(gone)
    volume = node.store.find_volume(3)
    for key in keys:
        if key % 3:
            with pytest.raises(StorageError):
                volume.read_needle(key)
        else:
            assert bytes(volume.read_needle(key).data) == b"needle %d" % key


# -- all needles ------------------------------------------------------------------------------------------------------


def test_read_all_needles(node: Node) -> None:
    node.alloc(3)
    node.alloc(4)
    node.put(3, 1, b"one", name=b"n.bin", flags=0x02)
    node.put(3, 2, b"old")
    node.put(3, 2, b"two two", mime=b"a/b", flags=0x04 | FLAG_HAS_LAST_MODIFIED, last_modified_s=1_700_000_000)
    node.put(3, 3, b"gone")
    node.put(4, 9, b"compressed", flags=0x01)
    volume = node.store.find_volume(3)
    assert volume is not None
    volume.delete_needle(3, 0x11)
    answer = node.call("ReadAllNeedles", volume_ids=[3, 4])
    assert answer.code is Code.OK
    shown = [(message.volume_id, message.needle_id, message.needle_blob) for message in answer.messages]
    assert shown == [(3, 1, b"one"), (3, 2, b"two two"), (3, 3, b"gone"), (4, 9, b"compressed")], "deleted ones, too"
    first, second, _, last = answer.messages
    assert (first.name, first.cookie, first.crc) == (b"n.bin", 0x11, engine.crc_legacy(engine.crc32c(b"one")))
    assert (second.mime, second.last_modified) == (b"a/b", 1_700_000_000)
    assert (first.needle_blob_compressed, last.needle_blob_compressed) == (False, True)


def test_read_all_needles_ends_at_a_missing_volume(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"one")
    answer = node.call("ReadAllNeedles", volume_ids=[3, NOWHERE, 3])
    assert len(answer.messages) == 1
    assert plain(answer) == unknown(f"not found volume id {NOWHERE}")
    assert node.call("ReadAllNeedles").messages == []


def test_read_all_needles_of_many(node: Node) -> None:
    node.alloc(3)
    for key in range(1, 601):
        node.put(3, key, str(key).encode())
    answer = node.call("ReadAllNeedles", volume_ids=[3])
    assert [message.needle_id for message in answer.messages] == list(range(1, 601))


# -- closed volumes, concurrency, documents ---------------------------------------------------------------------------


def test_calls_on_a_closed_volume_answer_an_error(node: Node) -> None:
    """Departure A4: upstream's process dies of some of these."""
    volume = node.alloc(3)
    node.put(3, 1, b"hello", cookie=0xAABBCCDD)
    volume.close()
    assert plain(node.call("VolumeStatus", volume_id=3)) == unknown("volume 3 data backend not found")
    for name, fields in (
        ("VolumeSyncStatus", {}),
        ("ReadVolumeFileStatus", {}),
        ("ReadNeedleBlob", {"offset": 8, "size": 5}),
        ("ReadNeedleMeta", {"offset": 8, "size": 5}),
        ("WriteNeedleBlob", {"needle_blob": b"\0" * 32}),
        ("VolumeNeedleStatus", {"needle_id": 1}),
        ("ReadAllNeedles", {}),
    ):
        key = "volume_ids" if name == "ReadAllNeedles" else "volume_id"
        answer = node.call(name, **{key: [3] if key == "volume_ids" else 3, **fields})
        if name == "VolumeNeedleStatus":
            assert plain(answer) == unknown("not found")
        elif name == "WriteNeedleBlob":
            assert plain(answer) == (Code.FAILED_PRECONDITION, "volume 3 is closed")
        else:
            assert answer.code is Code.FAILED_PRECONDITION, (name, answer)
    assert results(node.call("BatchDelete", file_ids=["3,01aabbccdd"]))[0][:2] == (404, "not found")
    node.call("VolumeUnmount", volume_id=3)
    assert node.call("VolumeMount", volume_id=3).code is Code.OK


def test_volumes_come_and_go_under_load(node: Node) -> None:
    node.alloc(3)
    node.put(3, 1, b"hello", cookie=0xAABBCCDD)
    stop = threading.Event()
    seen: set[tuple[str, Code]] = set()

    def load(name: str, fields: dict[str, Any]) -> None:
        client = VolumeClient(node.server.port)
        while not stop.is_set():
            seen.add((name, client.call(name, fields).code))
        client.close()

    calls: list[tuple[str, dict[str, Any]]] = [
        ("VolumeStatus", {"volume_id": 3}),
        ("ReadVolumeFileStatus", {"volume_id": 3}),
        ("VolumeNeedleStatus", {"volume_id": 3, "needle_id": 1}),
        ("ReadAllNeedles", {"volume_ids": [3]}),
        ("ReadNeedleBlob", {"volume_id": 3, "offset": 8, "size": 5}),
    ]
    threads = [threading.Thread(target=load, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for _ in range(60):
        assert node.call("VolumeUnmount", volume_id=3).code is Code.OK
        assert node.call("VolumeMount", volume_id=3).code is Code.OK
    stop.set()
    for thread in threads:
        thread.join()
    assert {code for _, code in seen} <= {Code.OK, Code.UNKNOWN, Code.FAILED_PRECONDITION}, seen
    assert node.call("VolumeNeedleStatus", volume_id=3, needle_id=1).first.cookie == 0xAABBCCDD


def test_storage_errors_of_handlers_are_never_internal(node: Node) -> None:
    node.alloc(3)
    node.file("3.dat").unlink()
    for name in ("VolumeUnmount", "VolumeMount", "VolumeDelete"):
        assert node.call(name, volume_id=3).code in (Code.OK, Code.UNKNOWN), name


def test_table_of_the_manual_lists_every_rpc() -> None:
    text = (ROOT / "docs" / "COMPATIBILITY.md").read_text().partition("\n## gRPC\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (works|differs|later)", text, re.MULTILINE))
    assert set(rows) == {method.name for method in pb.DESCRIPTOR.services_by_name["VolumeServer"].methods}
    assert {name for name, state in rows.items() if state != "later"} == set(HANDLERS)
