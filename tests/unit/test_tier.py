"""Volumes in a remote store: moving there and back, reading, deleting, loading (contract replication-tiering.md B)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, FakeS3, Seen
from storage_util import COOKIE, Config, config_of

from pyvolume import faults
from pyvolume._native import engine
from pyvolume.errors import (
    CrcMismatch,
    NeedleNotFound,
    NoSpace,
    RemoteError,
    StorageError,
    VolumeBusy,
    VolumeLoadError,
    VolumeNotFound,
    VolumeReadOnly,
)
from pyvolume.storage import compact, vif
from pyvolume.storage.store import Store
from pyvolume.storage.tier import move, s3
from pyvolume.storage.tier.backends import Backends, TransferStopped, Watcher, split_name
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.types import ReplicaPlacement, Ttl

VID = 7
SMALL = {key: b"%d;" % key * key * 30 for key in range(1, 9)}
LARGE = 100
LARGE_BYTES = 3 << 20
READ = FakeS3.requests


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    monkeypatch.setattr(s3, "RETRY_WAITS_S", (0.01, 0.02))
    with FakeS3() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path, s3_server: FakeS3) -> Iterator[Store]:
    made = opened(config_of(tmp_path / "a"), s3_server)
    yield made
    made.close()


def opened(config: Config, server: FakeS3 | None) -> Store:
    store = Store(config)
    if server is not None:
        store.add_backends([("s3", "default", server.properties())])
    store.load()
    return store


def large_data() -> bytes:
    return bytes(range(256)) * (LARGE_BYTES // 256)


def fill(store: Store, vid: int = VID, *, large: bool = True, ttl: Ttl = Ttl.NONE) -> Volume:
    volume = store.allocate_volume(vid, "", ReplicaPlacement.parse("001"), ttl)
    for key, data in SMALL.items():
        volume.write_needle(NeedleIn(key, COOKIE, data, engine.FLAG_NAME, b"n%d" % key))
    if large:
        volume.write_needle(NeedleIn(LARGE, COOKIE, large_data()))
    volume.delete_needle(3, COOKIE)
    return volume


def up(store: Store, vid: int = VID, destination: str = "s3.default", **more: Any) -> None:
    more = {"keep_local": False, "watcher": Watcher(), **more}
    store.move_to_remote(vid, "", destination, **more)


def down(store: Store, vid: int = VID, **more: Any) -> None:
    more = {"keep_remote": False, "watcher": Watcher(), **more}
    store.move_from_remote(vid, "", **more)


def check(volume: Volume, *, gone: tuple[int, ...] = (3,), large: bool = True) -> None:
    for key, data in SMALL.items():
        if key in gone:
            with pytest.raises(NeedleNotFound):
                volume.read_needle(key)
        else:
            needle = volume.read_needle(key)
            assert (bytes(needle.data or b""), needle.name, needle.cookie) == (data, b"n%d" % key, COOKIE)
    if large:
        needle = volume.read_needle(LARGE, meta_ok=True)
        assert needle.meta_only and needle.data_size == LARGE_BYTES
        assert b"".join(volume.stream_data(needle)) == large_data()


def names(store: Store) -> set[str]:
    return {path.name for path in Path(store.locations[0].directory).iterdir()} - {"vol_dir.uuid"}


def remount(store: Store, vid: int = VID) -> Volume:
    store.unmount_volume(vid)
    return store.mount_volume(vid)


# --------------------------------------------------------------------------------------------------------------- there


def test_a_round_trip(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    local = Path(volume.dat_path).read_bytes()
    mtime = int(os.stat(volume.dat_path).st_mtime)
    up(store)
    [key] = s3_server.keys()
    assert s3_server.data(key) == local
    assert names(store) == {"7.idx", "7.vif"}
    assert [vars_of(file) for file in vif.load(volume.vif_path).info.files] == [
        ("s3", "default", key, 0, len(local), mtime, ".dat")
    ]
    info = volume.to_info()
    assert info is not None
    assert (info.remote_storage_name, info.remote_storage_key) == ("s3.default", key)
    assert (info.size, info.modified_at_second, info.read_only) == (len(local), mtime, True)
    check(volume)
    volume = remount(store)
    check(volume)
    assert volume.replica_placement == ReplicaPlacement.parse("001"), "from the super block in the store"
    down(store)
    assert s3_server.keys() == [] and names(store) == {"7.dat", "7.idx", "7.sdx", "7.vif"}
    assert Path(volume.dat_path).read_bytes() == local and int(os.stat(volume.dat_path).st_mtime) == mtime
    assert vif.load(volume.vif_path).info.files == []
    check(volume)
    volume = remount(store)
    check(volume)
    volume.write_needle(NeedleIn(50, COOKIE, b"written again"))


def vars_of(file: vif.RemoteFile) -> tuple[Any, ...]:
    return (
        file.backend_type,
        file.backend_id,
        file.key,
        file.offset,
        file.file_size,
        file.modified_time,
        file.extension,
    )


def test_one_put_with_the_storage_class(store: Store, s3_server: FakeS3) -> None:
    fill(store, large=False)
    up(store)
    [put] = s3_server.requests("PUT")
    assert put.headers["x-amz-storage-class"] == "STANDARD_IA"
    assert put.headers["user-agent"] == "SeaweedFS/4.44 S3Manager"
    assert len(put.headers["x-amz-content-sha256"]) == 64 and "content-md5" not in put.headers
    bucket, _, key = put.path.partition("/")
    assert bucket == BUCKET and len(key) == 36 and key.count("-") == 4 and key[14] == "4"


def test_parts_of_a_large_file(store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    volume = fill(store)
    local = Path(volume.dat_path).read_bytes()
    seen: list[int] = []
    up(store, watcher=Watcher(seen.append))
    [begin, end] = s3_server.requests("POST")
    assert begin.headers["x-amz-storage-class"] == "STANDARD_IA" and "x-amz-storage-class" not in end.headers
    parts = s3_server.requests("PUT")
    assert sorted(int(part.query["partNumber"]) for part in parts) == [1, 2, 3, 4]
    assert sorted(part.length for part in parts)[-1] == 1 << 20
    assert all("x-amz-storage-class" not in part.headers for part in parts)
    assert s3_server.data(s3_server.keys()[0]) == local and s3_server.uploads == {}
    assert max(seen) == len(local)
    check(volume)
    del s3_server.seen[:]
    down(store, watcher=Watcher(seen.append))
    ranges = sorted(int(get.range.removeprefix("bytes=").partition("-")[0]) for get in s3_server.requests("GET"))
    assert ranges == [0, 1 << 20, 2 << 20, 3 << 20] and seen[-1] == len(local)
    check(volume)


def test_part_sizes() -> None:
    assert s3.part_bytes_for(1) == s3.part_bytes_for(64_000 << 20) == 64 << 20
    assert s3.part_bytes_for((64_000 << 20) + 1) == 256 << 20


def test_checks_in_upstreams_order(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    with pytest.raises(StorageError, match=r"^volume 9 not found$"):
        up(store, 9)
    with pytest.raises(StorageError, match=r"^existing collection: unexpected input: x$"):
        store.move_to_remote(VID, "x", "s3.default", False, Watcher())
    with pytest.raises(StorageError, match=r"^destination nowhere not found, supported: \[s3 s3.default\]$"):
        up(store, destination="nowhere")
    with pytest.raises(StorageError, match=r"^volume 7 is already on local disk$"):
        down(store)
    volume.info.files.append(vif.RemoteFile("s3", "default", "k"))
    with pytest.raises(StorageError, match=r"^destination s3 already exists$"):
        up(store, destination="s3")
    del volume.info.files[:]
    up(store, destination="s3")
    up(store, destination="nowhere")  # tiered already: nothing is asked
    with pytest.raises(StorageError, match=r"^existing collection: unexpected input: x$"):
        store.move_from_remote(VID, "x", False, Watcher())
    assert volume.info.files[0].backend_id == "default"


def test_keep_local_dat_file(store: Store, s3_server: FakeS3) -> None:
    """Reads go to the store all the same, and after a restart the local file is not looked at."""
    volume = fill(store, large=False)
    up(store, keep_local=True)
    assert "7.dat" in names(store)
    Path(volume.dat_path).write_bytes(b"not looked at")
    check(volume, large=False)
    volume = remount(store)
    check(volume, large=False)
    down(store)
    check(volume, large=False)


def test_keep_remote_dat_file(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    down(store, keep_remote=True)
    assert len(s3_server.keys()) == 1
    s3_server.close()
    check(volume, large=False)
    with pytest.raises(StorageError, match="is already on local disk"):
        down(store)


# ------------------------------------------------------------------------------------------- what is allowed, and when


def test_nothing_acknowledged_during_an_upload_is_lost(store: Store, s3_server: FakeS3) -> None:
    """Writes and deletes are refused while the file is read; upstream takes them and drops them with the file."""
    volume = fill(store, large=False)
    at_server, go_on = threading.Event(), threading.Event()

    def hold(seen: Seen) -> int | None:
        if seen.method == "PUT":
            at_server.set()
            assert go_on.wait(20)
        return None

    s3_server.hook = hold
    mover = threading.Thread(target=up, args=(store,))
    mover.start()
    assert at_server.wait(20)
    with pytest.raises(VolumeReadOnly):
        volume.write_needle(NeedleIn(60, COOKIE, b"too late"))
    with pytest.raises(VolumeReadOnly):
        volume.delete_needle(1, COOKIE)
    volume.set_writable()  # a mark does not open it, either
    with pytest.raises(VolumeReadOnly):
        volume.write_needle(NeedleIn(60, COOKIE, b"too late"))
    with pytest.raises(VolumeBusy):
        up(store)
    with pytest.raises(VolumeBusy):
        store.delete_volume(VID)
    check(volume, large=False)
    go_on.set()
    mover.join()
    check(volume, large=False)
    assert volume.delete_needle(1, COOKIE) > 0


def test_a_failed_upload_leaves_a_writable_volume(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    s3_server.hook = lambda seen: 403 if seen.method == "PUT" else None
    with pytest.raises(StorageError, match=r"^backend s3.default copy file .*/7.dat: failed to upload file .*Access"):
        up(store)
    assert len(s3_server.requests("PUT")) == 1, "this is not tried again"
    volume.write_needle(NeedleIn(60, COOKIE, b"more"))
    assert names(store) == {"7.dat", "7.idx", "7.vif"} and not volume.is_read_only


def test_a_store_that_fails_for_a_moment(store: Store, s3_server: FakeS3) -> None:
    fill(store, large=False)
    answers = iter([0, 0, 0])
    s3_server.hook = lambda seen: next(answers, None) if seen.method == "PUT" else None
    up(store)
    assert len(s3_server.keys()) == 1


def test_a_store_that_is_gone(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    s3_server.close()
    where = f"127.0.0.1:{s3_server.port}: .*refused"
    with pytest.raises(StorageError, match=rf"^backend s3.default copy file .*: {where}"):
        up(store)
    check(volume, large=False)
    assert not volume.is_read_only


def test_the_store_is_gone_in_the_middle_and_comes_back(
    store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    volume = fill(store)
    closed = threading.Event()

    def die(seen: Seen) -> int | None:
        if seen.query.get("partNumber") == "3" and not closed.is_set():
            closed.set()
            threading.Thread(target=s3_server.close).start()
        return None if not closed.is_set() else 0

    s3_server.hook = die
    with pytest.raises(StorageError, match=r"^backend s3.default copy file"):
        up(store)
    check(volume)
    assert not volume.is_read_only and vif.load(volume.vif_path).info.files == []
    with FakeS3(s3_server.port) as again:
        up(store)
        assert len(again.keys()) == 1
        check(volume)


def test_an_upload_that_could_not_be_aborted_is_aborted_later(
    store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    fill(store)
    broken = [True]

    def fail(seen: Seen) -> int | None:
        return 0 if broken[0] and (seen.query.get("partNumber") == "3" or seen.method == "DELETE") else None

    s3_server.hook = fail
    with pytest.raises(StorageError, match=r"^backend s3.default copy file"):
        up(store)
    assert len(s3_server.uploads) == 3, "one for each attempt"
    broken[0] = False
    up(store)
    assert s3_server.uploads == {} and len(s3_server.keys()) == 1


def test_cancelling_an_upload_removes_it(store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 1 << 20)
    volume = fill(store)
    seen: list[int] = []
    with pytest.raises(TransferStopped):
        up(store, watcher=Watcher(seen.append, lambda: sum(seen) < 2 << 20))
    assert s3_server.keys() == [] and s3_server.uploads == {}
    assert not volume.is_read_only
    check(volume)
    up(store)


def test_a_cancelled_download_leaves_the_volume_tiered(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    up(store)
    seen: list[int] = []
    with pytest.raises(TransferStopped):
        down(store, watcher=Watcher(seen.append, lambda: not seen))
    assert names(store) == {"7.idx", "7.vif"} and len(s3_server.keys()) == 1
    check(volume)


def test_an_object_that_is_shorter_than_the_file_is_not_trusted(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    real = s3_server.hook

    def cut(seen: Seen) -> int | None:
        if seen.method == "HEAD":
            for item in s3_server.objects.values():
                item.data = item.data[:-8]
        return None

    s3_server.hook = cut
    with pytest.raises(StorageError, match=r"^backend s3.default copy file .* bytes became"):
        up(store)
    s3_server.hook = real
    assert "7.dat" in names(store) and s3_server.keys() == []
    check(volume, large=False)


def test_marks_of_a_tiered_volume(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    volume.set_read_only()
    up(store)
    with pytest.raises(VolumeReadOnly):
        volume.delete_needle(1, COOKIE)
    volume.set_writable()
    assert volume.is_read_only, "upstream says writable here, and a write ends the process"
    with pytest.raises(VolumeReadOnly):
        volume.write_needle(NeedleIn(60, COOKIE, b"x"))
    with pytest.raises(VolumeReadOnly):
        volume.write_blob(60, 1, b"x" * 100)
    assert volume.delete_needle(1, COOKIE) > 0
    volume.set_read_only(can_delete=True, persist=True)
    assert volume.delete_needle(2, COOKIE) > 0
    check(volume, gone=(1, 2, 3), large=False)


def test_a_volume_that_came_back_takes_writes_as_before(store: Store, s3_server: FakeS3) -> None:
    """Tiered since it was loaded, and writable before: upstream never took that away."""
    volume = fill(store, large=False)
    up(store)
    down(store)
    volume.write_needle(NeedleIn(60, COOKIE, b"x"))
    up(store)
    volume = remount(store)
    down(store)
    with pytest.raises(VolumeReadOnly):  # upstream's quirk: loaded as tiered, so only the next load opens it
        volume.write_needle(NeedleIn(61, COOKIE, b"x"))
    volume = remount(store)
    volume.write_needle(NeedleIn(61, COOKIE, b"x"))
    assert bytes(volume.read_needle(60).data or b"") == b"x"


def test_deletes_add_rows_without_records(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    rows = os.path.getsize(volume.idx_path)
    assert volume.delete_needle(5, COOKIE) > 0 and volume.delete_needle(5, COOKIE) == 0
    assert volume.delete_needle(999, COOKIE) == 0
    added = Path(volume.idx_path).read_bytes()[rows:]
    assert added == engine.idx_pack([(5, 0, -1)], 4)
    check(volume, gone=(3, 5), large=False)
    volume = remount(store)
    check(volume, gone=(3, 5), large=False)
    down(store)
    volume = remount(store)
    assert not volume.is_read_only, "rows without records are no damage"
    check(volume, gone=(3, 5), large=False)
    compact.compact(volume)
    compact.commit(volume)
    check(volume, gone=(3, 5), large=False)


def test_vacuum_is_refused(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    with pytest.raises(StorageError, match=r"^volume 7 backend is empty remote:true$"):
        compact.compact(volume)
    assert names(store) == {"7.idx", "7.vif"}


@pytest.mark.parametrize("kind", ["leveldb", "memory"])
@pytest.mark.parametrize("width", [4, 5])
def test_all_kinds_of_maps(tmp_path: Path, s3_server: FakeS3, kind: str, width: int) -> None:
    store = opened(config_of(tmp_path / "a", index_kind=kind, offset_bytes=width), s3_server)
    volume = fill(store)
    up(store)
    volume.delete_needle(5, COOKIE)
    check(volume, gone=(3, 5))
    volume = remount(store)
    check(volume, gone=(3, 5))
    down(store)
    volume = remount(store)
    check(volume, gone=(3, 5))
    volume.write_needle(NeedleIn(60, COOKIE, b"x"))
    store.close()


# ------------------------------------------------------------------------------------------------------------- reading


def test_requests_of_reads(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    up(store)
    del s3_server.seen[:]
    where = volume.lookup(4)
    volume.read_needle(4)
    [get] = s3_server.seen
    end = where.offset + engine.needle_record_len(where.size, 3) - 1
    assert get.range == f"bytes={where.offset}-{end}" and get.headers["user-agent"] == "SeaweedFS/4.44"
    del s3_server.seen[:]
    where = volume.lookup(LARGE)
    needle = volume.read_needle(LARGE, meta_ok=True)
    assert [seen.range for seen in s3_server.seen][:1] == [f"bytes={where.offset}-{where.offset + 19}"]
    assert len(s3_server.seen) == 2, "without the data"
    del s3_server.seen[:]
    assert b"".join(volume.stream_data(needle, 1000, 10, 4 << 20)) == large_data()[1000:1010]
    data_at = where.offset + 20
    assert [seen.range for seen in s3_server.seen] == [f"bytes={data_at + 1000}-{data_at + 1009}"]
    del s3_server.seen[:]
    assert b"".join(volume.stream_data(needle, chunk_bytes=1 << 20)) == large_data()
    assert [seen.range for seen in s3_server.seen] == [
        f"bytes={data_at + (n << 20)}-{data_at + (n + 1 << 20) - 1}" for n in range(3)
    ]


def test_no_more_than_one_piece_is_fetched_ahead(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    up(store)
    needle = volume.read_needle(LARGE, meta_ok=True)
    del s3_server.seen[:]
    pieces = volume.stream_data(needle, chunk_bytes=256 << 10)
    next(pieces)
    wait_for(lambda: len(s3_server.seen) == 2)
    next(pieces)
    wait_for(lambda: len(s3_server.seen) == 3)
    pieces.close()
    assert len(s3_server.seen) == 3


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_damage_in_the_store_is_found(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    up(store)
    stored = s3_server.objects[f"{BUCKET}/{s3_server.keys()[0]}"]
    for key in (4, LARGE):
        at = volume.lookup(key).offset + 40
        stored.data = stored.data[:at] + bytes([stored.data[at] ^ 1]) + stored.data[at + 1 :]
    with pytest.raises(CrcMismatch):
        volume.read_needle(4)
    with pytest.raises(CrcMismatch):
        b"".join(volume.stream_data(volume.read_needle(LARGE, meta_ok=True)))
    check_one(volume, 5)


def check_one(volume: Volume, key: int) -> None:
    assert bytes(volume.read_needle(key).data or b"") == SMALL[key]


def test_a_body_that_breaks_off_is_read_on(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    up(store)
    s3_server.cut_after = 30
    check_one(volume, 6)
    s3_server.cut_after = 1 << 20
    needle = volume.read_needle(LARGE)
    assert needle.data is not None and bytes(needle.data) == large_data()
    s3_server.cut_after = 1 << 20
    down(store)
    check(volume)


def test_errors_of_reads_name_bucket_and_key(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    [key] = s3_server.keys()
    s3_server.hook = lambda seen: 404 if seen.method == "GET" else None
    with pytest.raises(RemoteError, match=f"^bucket {BUCKET} GetObject {key}: NoSuchKey: "):
        volume.read_needle(4)
    s3_server.hook = lambda seen: 503 if seen.method == "GET" else None
    del s3_server.seen[:]
    with pytest.raises(RemoteError, match=r"GetObject .*: SlowDown"):
        volume.read_needle(4)
    assert len(s3_server.seen) == 3, "asked again, but not for ever"
    s3_server.hook = None
    assert volume.check_io_health(), "a store that fails is no broken disk"
    check_one(volume, 4)


def test_a_store_that_ignores_ranges_is_not_believed(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    s3_server.hook = lambda seen: seen.headers.pop("range", None) and None
    with pytest.raises(RemoteError, match="answers a range with status 200"):
        volume.read_needle(4)


def test_readers_go_on_while_the_data_moves(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store)
    stop = threading.Event()
    failures: list[BaseException] = []
    reads = [0]

    def read() -> None:
        while not stop.is_set():
            try:
                check(volume)
                reads[0] += 1
            except BaseException as exc:
                failures.append(exc)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(4):
        up(store)
        before = reads[0]
        wait_for(lambda before=before: reads[0] > before or bool(failures))
        down(store)
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_store_that_is_not_known_yet(tmp_path: Path, s3_server: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
    """Departure P1: without a master at the start such volumes wait for its answer. Upstream needs a restart."""
    config = config_of(tmp_path / "a")
    store = opened(config, s3_server)
    fill(store)
    up(store)
    store.close()
    store = opened(config, None)
    assert store.find_volume(VID) is None
    assert "backend storage s3.default not found" in caplog.text
    news: list[tuple[str, int]] = []
    store.subscribe(lambda kind, info: news.append((kind, info.id)))
    store.add_backends([("s3", "other", s3_server.properties())])
    assert store.find_volume(VID) is None and news == []
    store.add_backends([("s3", "default", s3_server.properties()), ("s3", "default", {})])
    volume = store.find_volume(VID)
    assert volume is not None and news == [("new", VID)]
    check(volume)
    store.close()


def test_the_store_is_down_at_the_start(tmp_path: Path, s3_server: FakeS3) -> None:
    config = config_of(tmp_path / "a")
    store = opened(config, s3_server)
    fill(store, ttl=Ttl.parse("3d"))
    fill(store, 8)
    up(store)
    up(store, 8)
    store.close()
    s3_server.hook = lambda seen: 0
    store = opened(config, s3_server)
    volume = store.find_volume(VID)
    assert volume is not None and not volume.ttl and volume.replica_placement == ReplicaPlacement()
    with pytest.raises(RemoteError):
        volume.read_needle(1)
    store.tend_tiered()
    assert volume.lacks_superblock
    s3_server.hook = None
    check(volume)
    store.tend_tiered()  # upstream: not before the next load
    assert volume.ttl == Ttl.parse("3d") and volume.replica_placement == ReplicaPlacement.parse("001")
    info = volume.to_info()
    assert info is not None and info.ttl == Ttl.parse("3d").to_u32() and not volume.lacks_superblock
    volume = remount(store)
    assert volume.ttl == Ttl.parse("3d") and volume.replica_placement == ReplicaPlacement.parse("001")
    store.close()


def test_a_tiered_volume_without_its_index_is_left_out(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    store.unmount_volume(VID)
    os.unlink(volume.idx_path)
    with pytest.raises(VolumeLoadError, match=r"^check volume idx file .*7.idx: idx file .*7.idx does not exists$"):
        store.locations[0].load_named("7")
    with pytest.raises(StorageError, match=r"^volume 7 not found on disk$"):
        store.mount_volume(VID)
    assert len(s3_server.keys()) == 1


def test_rows_that_an_old_release_wrote_over_come_back(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    store.unmount_volume(VID)
    rows = bytearray(Path(volume.idx_path).read_bytes())
    rows[:32] = engine.idx_pack([(6, 0, -1), (7, 0, -1)], 4)  # where the rows of keys 1 and 2 stood
    Path(volume.idx_path).write_bytes(rows + b"half")
    volume = store.mount_volume(VID)
    check_one(volume, 1)
    check_one(volume, 2)
    assert os.path.getsize(volume.idx_path) == len(rows) + 32


def test_data_that_comes_back_needs_room(store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = fill(store, large=False)
    up(store)
    real = os.statvfs(volume.directory)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], 0, *real[5:]]))
    with pytest.raises(NoSpace, match="not enough free space"):
        down(store)
    assert "7.dat" not in names(store)


# ------------------------------------------------------------------------------------------------------------- removal


def test_deleting_a_volume_removes_its_object(store: Store, s3_server: FakeS3) -> None:
    for vid in (7, 8, 9):
        fill(store, vid, large=False)
        up(store, vid)
    keys = {vid: found.info.files[0].key for vid in (7, 8, 9) if (found := store.find_volume(vid)) is not None}
    store.delete_volume(7, keep_remote=True)
    assert s3_server.keys() == sorted(keys.values())
    store.delete_volume(8)
    assert s3_server.keys() == sorted([keys[7], keys[9]])
    store.delete_collection("")
    assert s3_server.keys() == [keys[7]] and names(store) == set()


def test_a_store_that_is_gone_does_not_keep_a_volume_from_being_deleted(store: Store, s3_server: FakeS3) -> None:
    fill(store, large=False)
    up(store)
    s3_server.close()
    store.delete_volume(VID)
    assert names(store) == set() and not store.has_volume(VID)


def test_an_expired_volume_takes_its_object_along(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False, ttl=Ttl.parse("3m"))
    old = time.time() - 3600
    os.utime(volume.dat_path, (old, old))
    volume = remount(store)
    up(store)
    expires = vif.load(volume.vif_path).info.expire_at_sec
    assert 170 < expires - time.time() < 190
    store.volume_size_limit = 1 << 30
    volume = remount(store)
    assert volume.last_modified_s == int(old)
    assert store.heartbeat_volumes() == [] and not store.has_volume(VID)
    wait_for(lambda: s3_server.keys() == [])


def test_not_in_the_fast_lane(store: Store, s3_server: FakeS3) -> None:
    fill(store, large=False)
    assert store.registry.acquire(VID) is not None
    up(store)
    assert store.registry.acquire(VID) is None
    down(store)
    assert store.registry.acquire(VID) is not None


# ------------------------------------------------------------------------------------------------------- failing steps


@pytest.mark.parametrize(
    ("point", "text"),
    [
        ("tier.uploaded", "backend s3.default copy file"),
        ("tier.save", "volume 7 failed to save remote file info: "),
        ("vif.write", "volume 7 failed to save remote file info: "),
        ("vif.rename", "volume 7 failed to save remote file info: "),
        ("tier.swap", "volume 7 failed to load remote file: "),
        ("tier.read", "backend s3.default copy file"),
        ("tier.put", "backend s3.default copy file"),
    ],
)
def test_a_step_there_that_fails_undoes_the_ones_before(store: Store, s3_server: FakeS3, point: str, text: str) -> None:
    volume = fill(store, large=False)
    with faults.set_points(f"{point}=error:EIO"), pytest.raises(StorageError) as failed:
        up(store)
    assert str(failed.value).startswith(text)
    assert not volume.is_remote and vif.load(volume.vif_path).info.files == volume.info.files == []
    assert s3_server.keys() == []
    volume.write_needle(NeedleIn(60, COOKIE, b"x"))
    check(remount(store), large=False)


@pytest.mark.parametrize(
    ("point", "text"),
    [
        ("tier.get", "backend s3.default copy file"),
        ("tier.write", "backend s3.default copy file"),
        ("tier.fetched", "backend s3.default copy file"),
        ("tier.place", "backend s3.default copy file"),
        ("tier.unsave", "volume 7 failed to save remote file info: "),
        ("vif.write", "volume 7 failed to save remote file info: "),
        ("tier.unswap", "volume 7 failed to open local dat file "),
    ],
)
def test_a_step_back_that_fails_leaves_the_volume_tiered(
    store: Store, s3_server: FakeS3, point: str, text: str
) -> None:
    volume = fill(store, large=False)
    up(store)
    with faults.set_points(f"{point}=error:EIO"), pytest.raises(StorageError) as failed:
        down(store)
    assert str(failed.value).startswith(text)
    assert volume.is_remote and len(vif.load(volume.vif_path).info.files) == len(s3_server.keys()) == 1
    check(volume, large=False)
    volume = remount(store)
    check(volume, large=False)
    down(store)
    assert s3_server.keys() == []
    check(volume, large=False)


def test_an_object_that_cannot_be_removed_is_told(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    up(store)
    [key] = s3_server.keys()
    s3_server.hook = lambda seen: 403 if seen.method == "DELETE" else None
    with pytest.raises(StorageError, match=f"^volume 7 failed to delete remote file {key}: "):
        down(store)
    assert not volume.is_remote and s3_server.keys() == [key]
    check(volume, large=False)


def test_an_object_that_a_vif_may_name_is_never_removed(store: Store, s3_server: FakeS3) -> None:
    """The rename was made, but its flush failed, and the old text could not be put back: both copies stay."""
    fill(store, large=False)
    with (
        faults.set_points("tier.uploaded=count"),
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(StorageError, match="failed to save remote file info"),
    ):

        def broken(path: str, info: vif.VolumeInfo) -> None:
            if info.files:
                Path(path).write_text(vif.render(info))
            raise StorageError("input/output error")

        patched.setattr(vif, "save", broken)
        up(store)
    assert len(s3_server.keys()) == 1 and "7.dat" in names(store)
    assert remount(store).is_remote


# ------------------------------------------------------------------------------------------------------------ backends


def test_names_of_backends(caplog: pytest.LogCaptureFixture) -> None:
    assert (
        split_name("s3") == ("s3", "default")
        and split_name("s3.a") == ("s3", "a")
        and split_name("s3.a.b")
        == (
            "",
            "",
        )
    )
    backends = Backends()
    assert not backends.add("rclone", "x", {}) and "storage type rclone not found" in caplog.text
    assert backends.add_all([("s3", "default", {"bucket": "b"}), ("s3", "default", {"bucket": "c"})])
    assert not backends.add_all([("s3", "default", {"bucket": "c"})])
    assert backends.names() == "[s3 s3.default]" and backends.find("s3") is backends.find("s3.default")
    assert not backends.add("s3", "bad", {"endpoint": "ftp://x"}) and "fail to create backend storage" in caplog.text
    assert backends.find("s3.bad") is None and backends.find("") is None


def test_nothing_secret_is_shown() -> None:
    backend = s3.S3Backend("x", {"aws_access_key_id": "AKID", "aws_secret_access_key": "very-secret", "bucket": "b"})
    assert "secret" not in repr(backend) and "AKID" not in repr(backend)


@pytest.mark.parametrize(
    ("given", "path_style"), [("", True), ("true", True), ("false", False), ("0", False), ("nonsense", True)]
)
def test_path_style(given: str, path_style: bool) -> None:
    backend = s3.S3Backend("x", {"bucket": "b", "endpoint": "http://host:1", "force_path_style": given})
    assert backend._path_style is path_style


def test_two_backends_have_keys_of_their_own(store: Store, s3_server: FakeS3) -> None:
    """Upstream keeps one client for each region and endpoint, with the keys of the first."""
    store.add_backends([("s3", "other", s3_server.properties(aws_access_key_id="other-key", bucket="second"))])
    fill(store, large=False)
    up(store)
    fill(store, 8, large=False)
    up(store, 8, "s3.other")
    first, second = s3_server.requests("PUT")
    assert "Credential=test-access-key/" in first.headers["authorization"]
    assert "Credential=other-key/" in second.headers["authorization"] and second.path.startswith("second/")


def test_the_environments_keys(store: Store, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    keyless = s3_server.properties(aws_access_key_id="", aws_secret_access_key="")
    store.add_backends([("s3", "keyless", keyless)])
    fill(store, large=False)
    up(store, destination="s3.keyless")
    assert "Credential=from-the-environment/" in s3_server.requests("PUT")[0].headers["authorization"]


def test_a_volume_that_was_just_unmounted_is_not_moved(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    store.unmount_volume(VID)
    with pytest.raises(VolumeNotFound, match=r"^volume 7 not found$"):
        move.to_remote(volume, store.backends, "s3")
    volume = store.mount_volume(VID)
    up(store)
    store.unmount_volume(VID)
    with pytest.raises(VolumeNotFound, match=r"^volume 7 not found$"):
        move.from_remote(volume, store.backends)
    assert len(s3_server.keys()) == 1 and "7.dat" not in names(store)
    check(store.mount_volume(VID), large=False)


def test_a_move_is_the_only_one(store: Store, s3_server: FakeS3) -> None:
    volume = fill(store, large=False)
    assert volume.try_claim("vacuum")
    with pytest.raises(VolumeBusy, match=r"^volume 7 is compacting$"):
        move.to_remote(volume, store.backends, "s3")
    volume.release()
