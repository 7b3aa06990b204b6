"""The tier RPCs, and what other RPCs say of a volume in a remote store (contract grpc.md 10)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_nodes import COOKIE, Server, content, put
from s3_server import FakeS3, Seen

from pyvolume.server.grpc import tier
from pyvolume.storage.tier import s3

Code = grpc.StatusCode
UP, DOWN = "VolumeTierMoveDatToRemote", "VolumeTierMoveDatFromRemote"


@pytest.fixture
def s3_server() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


@pytest.fixture
def server(tmp_path: Path, s3_server: FakeS3) -> Iterator[Server]:
    made = Server(tmp_path / "here")
    made.store.add_backends([("s3", "default", s3_server.properties())])
    volume = made.make(7, "c")
    for key in range(1, 6):
        put(volume, key, b"%d" % key * 1000)
    yield made
    made.end()


def up(server: Server, **more: object) -> None:
    answer = server.call(UP, volume_id=7, collection="c", destination_backend_name="s3.default", **more)
    assert (answer.code, answer.details) == (Code.OK, "")


def test_upload_read_delete_download(server: Server, s3_server: FakeS3) -> None:
    up(server)
    assert server.files() == {"c_7.idx", "c_7.vif"}
    assert content(server.volume(7), 3) == b"3" * 1000
    up(server)  # already there: nothing to do
    answer = server.call("BatchDelete", file_ids=[f"7,4{COOKIE:08x}"])
    assert answer.first.results[0].status == 202
    assert server.call(DOWN, volume_id=7, collection="c").code is Code.OK
    assert server.files() == {"c_7.dat", "c_7.idx", "c_7.vif"} and s3_server.keys() == []
    again = server.call(DOWN, volume_id=7, collection="c")
    assert (again.code, again.details) == (Code.UNKNOWN, "volume 7 is already on local disk")


def test_errors(server: Server, s3_server: FakeS3) -> None:
    wanted = {"volume_id": 7, "collection": "c", "destination_backend_name": "s3.default"}
    for changed, text in (
        ({"volume_id": 9}, "volume 9 not found"),
        ({"collection": "x"}, "existing collection:c unexpected input: x"),
        ({"destination_backend_name": "x.y"}, "destination x.y not found, supported: [s3 s3.default]"),
    ):
        answer = server.call(UP, **{**wanted, **changed})
        assert (answer.code, answer.details) == (Code.UNKNOWN, text)
    s3_server.hook = lambda seen: 403
    answer = server.call(UP, **wanted)
    assert answer.code is Code.UNKNOWN and answer.details.startswith("backend s3.default copy file ")
    assert server.call("SetState", state={"maintenance": True, "version": server.store.state.version}).code is Code.OK
    answer = server.call(UP, **wanted)
    assert (answer.code, answer.details) == (
        Code.UNKNOWN,
        f"volume server {server.config.server_id} is in maintenance mode",
    )
    answer = server.call(DOWN, volume_id=7, collection="c")
    assert answer.details == "volume 7 is already on local disk", "this one is not gated"


@pytest.mark.parametrize("name", [UP, DOWN])
def test_progress_once_in_a_while(
    server: Server, s3_server: FakeS3, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "REPORT_INTERVAL_S", 0.02)
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(s3, "PARALLEL", 1)
    volume = server.volume(7)
    put(volume, 50, bytes(3 << 20))
    size = volume.dat_bytes
    fields = {"volume_id": 7, "collection": "c"}
    if name == UP:
        fields["destination_backend_name"] = "s3.default"
    else:
        up(server)
    seen_one = threading.Event()

    def hold(seen: Seen) -> int | None:
        if seen.query.get("partNumber") == "3" or (name == DOWN and "bytes=2097152-" in seen.range):
            assert seen_one.wait(20), "no message though two parts are through"
        return None

    s3_server.hook = hold
    messages = []
    for message in server.client.open_stream(name, fields):
        messages.append(message)
        seen_one.set()
    told = [message.processed for message in messages]
    assert told == sorted(set(told)) and 0 < told[0] <= told[-1] <= size, "and none when nothing has moved"
    for message in messages:
        assert message.processedPercentage == pytest.approx(100 * message.processed / size)


@pytest.mark.parametrize("name", [UP, DOWN])
def test_a_client_that_goes_ends_the_move(
    server: Server, s3_server: FakeS3, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    put(server.volume(7), 50, bytes(8 << 20))
    if name == DOWN:
        up(server)
    at_server, go_on = threading.Event(), threading.Event()

    def hold(seen: Seen) -> int | None:
        if seen.query.get("partNumber") == "2" or (name == DOWN and "1048576-" in seen.range):
            at_server.set()
            go_on.wait(20)
        return None

    s3_server.hook = hold
    fields = {"volume_id": 7, "collection": "c"}
    if name == UP:
        fields["destination_backend_name"] = "s3.default"
    stream = server.client.open_stream(name, fields)
    assert at_server.wait(20)
    stream.cancel()
    go_on.set()
    deadline = time.monotonic() + 20
    while server.volume(7).is_compacting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert content(server.volume(7), 3) == b"3" * 1000
    if name == UP:
        assert s3_server.keys() == [] and s3_server.uploads == {} and not server.volume(7).is_read_only
    else:
        assert len(s3_server.keys()) == 1 and "c_7.dat" not in server.files() and server.volume(7).is_remote
        assert "c_7.dat.fetching" not in server.files()


def test_what_other_calls_say(server: Server, s3_server: FakeS3) -> None:
    before = server.call("ReadVolumeFileStatus", volume_id=7).first
    up(server)
    status = server.call("ReadVolumeFileStatus", volume_id=7).first
    [file] = status.volume_info.files
    assert (file.backend_type, file.backend_id, file.file_size) == ("s3", "default", before.dat_file_size)
    assert (status.dat_file_size, status.dat_file_timestamp_seconds) == (
        before.dat_file_size,
        before.dat_file_timestamp_seconds,
    )
    assert server.call("VolumeStatus", volume_id=7).first.is_read_only
    answer = server.call("VacuumVolumeCompact", volume_id=7)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "volume 7 backend is empty remote:true")
    assert server.call("VacuumVolumeCheck", volume_id=7).code is Code.OK
    assert server.call("VacuumVolumeCleanup", volume_id=7).code is Code.OK
    blob = server.call("ReadNeedleBlob", volume_id=7, offset=8, size=server.volume(7).lookup(1).size).first
    assert len(blob.needle_blob) > 1000
    marked = server.call("VolumeMarkWritable", volume_id=7)
    assert server.volume(7).is_read_only, marked
    write = server.call("WriteNeedleBlob", volume_id=7, needle_id=1, size=1005, needle_blob=blob.needle_blob)
    assert write.details.endswith(": volume 7 is read only")


def test_deleting_with_and_without_the_object(server: Server, s3_server: FakeS3) -> None:
    up(server)
    assert server.call("VolumeDelete", volume_id=7, keep_remote_data=True).code is Code.OK
    assert len(s3_server.keys()) == 1
    volume = server.make(8)
    put(volume, 1, b"x")
    answer = server.call(UP, volume_id=8, collection="", destination_backend_name="s3")
    assert answer.code is Code.OK and len(s3_server.keys()) == 2
    assert server.call("VolumeDelete", volume_id=8).code is Code.OK
    assert len(s3_server.keys()) == 1


def test_a_tiered_volume_is_copied_by_its_index(server: Server, s3_server: FakeS3, tmp_path: Path) -> None:
    up(server)
    target = Server(tmp_path / "there")
    target.store.add_backends([("s3", "default", s3_server.properties())])
    try:
        answer = target.call("VolumeCopy", volume_id=7, collection="c", source_data_node=server.address)
        assert answer.code is Code.OK, answer
        assert target.files() == {"c_7.idx", "c_7.sdx", "c_7.vif"}
        assert content(target.volume(7), 5) == b"5" * 1000
        modified = server.call("ReadVolumeFileStatus", volume_id=7).first.dat_file_timestamp_seconds
        assert answer.messages[-1].last_append_at_ns == modified * 1_000_000_000
        assert server.call("VolumeDelete", volume_id=7, keep_remote_data=True).code is Code.OK
        assert content(target.volume(7), 5) == b"5" * 1000
    finally:
        target.end()


# ------------------------------------------------------------------------------------------- scans of a tiered volume


def tailed(server: Server, since_ns: int) -> list[tuple[bytes, bytes]]:
    """Records of VolumeTailSender from since_ns on, up to its first heartbeat."""
    stream = server.client.open_stream(
        "VolumeTailSender", {"volume_id": 7, "since_ns": since_ns, "idle_timeout_seconds": 1}
    )
    found: list[tuple[bytes, bytes]] = []
    for message in stream:
        if not message.needle_header:
            stream.cancel()
            break
        found.append((message.needle_header, message.needle_body))
        if message.is_last_chunk and len(found) == 5:
            stream.cancel()
            break
    return found


def test_scans_say_the_same_as_of_a_local_volume(server: Server, s3_server: FakeS3) -> None:
    volume = server.volume(7)
    volume.delete_needle(2, COOKIE)
    times = [volume.read_needle(key).append_at_ns for key in (1, 3, 4, 5)]

    def asked() -> list[object]:
        everything = [m.SerializeToString() for m in server.call("ReadAllNeedles", volume_ids=[7]).messages]
        since = [
            [m.file_content for m in server.call("VolumeIncrementalCopy", volume_id=7, since_ns=at).messages]
            for at in (0, *times, times[-1] + (1 << 40))
        ]
        return [everything, since, tailed(server, times[2]), tailed(server, times[2] - 1), tailed(server, 1 << 62)]

    before = asked()
    assert len(before[0]) == 5, "the deleted one, too, as upstream"  # type: ignore[arg-type]
    up(server)
    assert asked() == before
    volume.delete_needle(5, COOKIE)
    assert tailed(server, times[2]) == before[2], "a delete there has no record"


def test_scrub(server: Server, s3_server: FakeS3) -> None:
    def scrubbed(mode: int) -> tuple[int, list[str], list[int]]:
        found = server.call("ScrubVolume", volume_ids=[7], mode=mode).first
        return found.total_files, list(found.details), list(found.broken_volume_ids)

    index, full = 1, 2
    server.volume(7).delete_needle(2, COOKIE)
    before = scrubbed(index), scrubbed(full)
    up(server)
    assert (scrubbed(index), scrubbed(full)) == before
    server.volume(7).delete_needle(5, COOKIE)
    assert scrubbed(full) == (7, [], [])
    [stored] = s3_server.objects.values()
    at = server.volume(7).lookup(4).offset + 30
    stored.data = stored.data[:at] + b"?" + stored.data[at + 1 :]
    count, details, broken = scrubbed(full)
    assert (count, broken) == (7, [7]) and len(details) == 1
    assert details[0].startswith("failed to read needle 4 on volume 7: invalid CRC for needle 4 ")
    assert scrubbed(index) == (7, [], [])
    s3_server.hook = lambda seen: 0
    answer = server.call("ScrubVolume", volume_ids=[7], mode=full, mark_broken_volumes_readonly=True)
    assert answer.code is Code.UNKNOWN and "GetObject" in answer.details, "no answer says nothing of the volume"
    assert not server.volume(7).no_write_or_delete
