"""A mounted volume: needles, read-only marks, expiry, failures, end of life (contract storage.md 12-14, 18, 24)."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from storage_util import (
    COOKIE,
    PLAIN,
    Clock,
    config_of,
    create,
    data_of,
    load,
    put,
    record,
    rows_in,
    write_index,
    write_volume,
)

from pyvolume._native import engine
from pyvolume.errors import (
    CookieMismatch,
    CorruptNeedle,
    CrcMismatch,
    DiskError,
    NeedleDeleted,
    NeedleNotFound,
    NoSpace,
    StorageError,
    VolumeBusy,
    VolumeClosed,
    VolumeFull,
    VolumeNotEmpty,
    VolumeReadOnly,
)
from pyvolume.storage import compact, files, vif
from pyvolume.storage import volume as volume_module
from pyvolume.storage.disk_location import DiskLocation
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.types import Ttl


@pytest.fixture
def volume(tmp_path: Path):
    volume = create(tmp_path)
    yield volume
    volume.close()


# ------------------------------------------------------------------------------------------------------------- needles


def test_write_read_delete(volume: Volume) -> None:
    result = put(volume, 7, b"hello", name=b"a.txt", mime=b"text/plain", pairs=b"", flags=0x0E)
    assert (result.offset, result.unchanged, result.cookie) == (8, False, COOKIE)
    needle = volume.read_needle(7)
    assert (bytes(needle.data), needle.cookie, needle.name, needle.mime) == (b"hello", COOKIE, b"a.txt", b"text/plain")
    assert needle.etag == "9a71bb4c" and needle.last_modified_s == 1_700_000_000
    assert volume.lookup(7) == engine.Entry(8, needle.size, 0)
    assert volume.delete_needle(7, COOKIE, needle.checksum) == needle.size
    with pytest.raises(NeedleDeleted) as caught:
        volume.read_needle(7)
    assert str(caught.value) == "already deleted"
    assert bytes(volume.read_needle(7, read_deleted=True).data) == b"hello"
    assert volume.delete_needle(7, COOKIE) == 0
    assert volume.delete_needle(8, COOKIE) == 0
    with pytest.raises(NeedleNotFound) as missing:
        volume.read_needle(8)
    assert str(missing.value) == "not found" and type(missing.value) is NeedleNotFound
    with pytest.raises(NeedleNotFound):
        volume.lookup(8)
    assert (volume.file_count, volume.deleted_count, volume.max_file_key) == (1, 1, 7)
    assert volume.content_bytes == volume.deleted_bytes == needle.size


def test_unchanged_data_is_not_written_again(volume: Volume) -> None:
    put(volume, 7, b"same", name=b"x")
    size = volume.dat_bytes
    assert put(volume, 7, b"same", name=b"another name").unchanged
    assert volume.dat_bytes == size
    assert volume.read_needle(7).name == b"x"
    assert not put(volume, 7, b"other").unchanged


def test_empty_needle(volume: Volume) -> None:
    put(volume, 7, b"")
    needle = volume.read_needle(7)
    assert needle.empty and needle.checksum == 0 and needle.etag == "00000000"
    assert not put(volume, 7, b"").unchanged
    assert volume.delete_needle(7, 1) == 0
    with pytest.raises(NeedleDeleted):
        volume.read_needle(7)


@pytest.mark.parametrize("deleted", [False, True])
def test_cookies(volume: Volume, deleted: bool) -> None:
    put(volume, 7, b"a")
    if deleted:
        volume.delete_needle(7, COOKIE)
    with pytest.raises(CookieMismatch) as caught:
        put(volume, 7, b"b", cookie=0xAB)
    assert str(caught.value) == "mismatching cookie ab"
    adopted = volume.write_needle(NeedleIn(7, 0, b"b"), check_cookie=False)
    assert adopted.cookie == COOKIE


def test_synced_write(volume: Volume) -> None:
    assert volume.write_needle(NeedleIn(1, COOKIE, b"durable"), fsync=True).offset == 8
    assert data_of(volume, 1) == b"durable"
    volume.sync()


def test_write_blob(volume: Volume) -> None:
    blob = record(0x77, b"raw record")
    size = int.from_bytes(blob[12:16], "big")
    result = volume.write_blob(5, size, blob)
    needle = volume.read_needle(5)
    assert needle.id == 0x77, "quirk: the record keeps its own id"
    assert bytes(needle.data) == b"raw record"
    assert needle.append_at_ns == result.append_at_ns != 1 << 60
    assert volume.write_blob(5, size, blob).unchanged


@pytest.mark.parametrize(
    ("blob", "size", "text"),
    [
        (b"short", 5, "needle 9 blob of 5 bytes is shorter than a needle header"),
        (record(1, b"abc"), 7, "needle 9 size 7 does not match its blob header size 8"),
        (record(1, b"abc")[:30], 8, "needle blob buffer too small: need 36 bytes, have 30"),
        (
            record(1, b"abc")[:12] + b"\xff\xff\xff\xff",
            -1,
            "needle blob buffer too small: need 27 bytes, have 16",
        ),
        (
            record(1, b"abc")[:12] + b"\xff\xff\xff\x00" + bytes(40),
            -256,
            "invalid needle size -256 results in negative timestamp offset -236",
        ),
    ],
)
def test_refused_blobs(volume: Volume, blob: bytes, size: int, text: str) -> None:
    before = volume.dat_bytes
    with pytest.raises(StorageError) as caught:
        volume.write_blob(9, size, blob)
    assert str(caught.value) == text
    assert volume.dat_bytes == before


def test_damaged_needle_names_file_and_offset(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"intact")
    put(volume, 2, b"about to rot")
    offset = volume.lookup(2).offset
    with open(volume.dat_path, "r+b") as handle:
        handle.seek(offset + 22)
        handle.write(b"X")
    with pytest.raises(CrcMismatch) as caught:
        volume.read_needle(2)
    assert str(caught.value).startswith("invalid CRC for needle 2 (got ")
    assert str(caught.value).endswith("data on disk corrupted: needle data corrupted")
    assert (caught.value.path, caught.value.offset) == (volume.dat_path, offset)
    assert data_of(volume, 1) == b"intact"
    os.truncate(volume.dat_path, offset + 10)
    with pytest.raises(CorruptNeedle) as cut:
        volume.read_needle(2)
    assert str(cut.value) == "EOF"
    with pytest.raises(CorruptNeedle) as rewrite:
        put(volume, 2, b"new")
    assert str(rewrite.value) == "reading existing needle: EOF"
    volume.close()


# ----------------------------------------------------------------------------------------------------------- streaming


BIG = bytes(range(256)) * 8192  # 2 MiB: above what is read whole


def test_streaming(volume: Volume) -> None:
    put(volume, 1, BIG)
    needle = volume.read_needle(1, meta_ok=True)
    assert needle.meta_only and needle.data is None and needle.data_size == len(BIG)
    pieces = list(volume.stream_data(needle, chunk_bytes=300_000))
    assert [len(p) for p in pieces[:-1]] == [300_000] * 6
    assert b"".join(pieces) == BIG
    assert b"".join(volume.stream_data(needle, 1000, 5000)) == BIG[1000:6000]
    assert b"".join(volume.stream_data(needle, len(BIG) - 3, 100)) == BIG[-3:]
    assert list(volume.stream_data(needle, 5, 0)) == []
    assert not volume.read_needle(1).meta_only


def test_streaming_finds_rot_behind_the_last_byte(volume: Volume) -> None:
    """As upstream: the bytes are out by then; part of the data is never checked."""
    put(volume, 1, BIG)
    needle = volume.read_needle(1, meta_ok=True)
    with open(volume.dat_path, "r+b") as handle:
        handle.seek(needle.data_offset + 5)
        handle.write(b"X")
    received = bytearray()
    with pytest.raises(CrcMismatch, match="ReadNeedleData checksum"):
        for piece in volume.stream_data(needle):
            received += piece
    assert len(received) == len(BIG)
    assert len(b"".join(volume.stream_data(needle, 0, len(BIG) - 1))) == len(BIG) - 1


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_stream_over_a_vacuum_never_goes_on_with_other_data(volume: Volume, rewritten: bool) -> None:
    """Data of the same length that was written meanwhile was appended to the begin of the former."""
    put(volume, 1, BIG)
    needle = volume.read_needle(1, meta_ok=True)
    stream = volume.stream_data(needle, 0, len(BIG) - 1, 1 << 20)  # a range: no checksum is compared at its end
    first = next(stream)
    if rewritten:
        put(volume, 1, bytes(reversed(BIG)))
    assert compact.compact(volume) and compact.commit(volume)
    if rewritten:
        with pytest.raises(NeedleNotFound):
            next(stream)
    else:
        assert b"".join([first, *stream]) == BIG[:-1]


def test_a_stream_over_a_vacuum_takes_a_checksum_of_old_releases_for_the_same(tmp_path: Path) -> None:
    item = bytearray(record(1, BIG))
    at = 16 + int.from_bytes(item[12:16], "big")
    item[at : at + 4] = engine.crc_legacy(engine.crc32c(BIG)).to_bytes(4, "big")
    write_volume(tmp_path, [bytes(item)])
    with closing(load(tmp_path, 3)) as volume:
        needle = volume.read_needle(1, meta_ok=True)
        stream = volume.stream_data(needle, chunk_bytes=1 << 20)
        first = next(stream)
        assert compact.compact(volume) and compact.commit(volume)
        assert volume.read_needle(1, meta_ok=True).checksum != needle.checksum
        assert b"".join([first, *stream]) == BIG


# ----------------------------------------------------------------------------------------------------------------- ttl


def test_ttl_of_the_volume_is_inherited(tmp_path: Path) -> None:
    volume = create(tmp_path, ttl=Ttl.parse("3h"))
    put(volume, 1, b"inherits")
    put(volume, 2, b"has its own", ttl=Ttl.parse("1d"), flags=0x1E)
    first, second = volume.read_needle(1), volume.read_needle(2)
    assert first.has_ttl and (first.ttl_count, first.ttl_unit) == (3, 2)
    assert (second.ttl_count, second.ttl_unit) == (1, 3)
    assert not put(volume, 1, b"inherits").unchanged, "a ttl volume writes the same data again"
    volume.close()


@pytest.mark.parametrize(("age_s", "flags", "lives"), [(59, 0x18, True), (61, 0x18, False), (61, 0x10, True)])
def test_expiry_goes_by_the_append_time(tmp_path: Path, age_s: int, flags: int, lives: bool) -> None:
    item = engine.frame_needle(
        1,
        COOKIE,
        b"one minute",
        flags=flags,
        last_modified_s=1 if flags & 8 else 0,
        ttl=(1, 1),
        append_at_ns=time.time_ns() - age_s * 10**9,
    )
    write_volume(tmp_path, [item])
    write_index(tmp_path, [(1, 8, int.from_bytes(item[12:16], "big"))])
    volume = load(tmp_path, 3)
    if lives:
        assert data_of(volume, 1) == b"one minute"
    else:
        with pytest.raises(NeedleNotFound, match="not found"):
            volume.read_needle(1)
        with pytest.raises(NeedleNotFound):
            volume.read_needle(1, read_deleted=True)
    volume.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_expiry_of_a_volume(tmp_path: Path, clock: Clock) -> None:
    volume = create(tmp_path, ttl=Ttl.parse("30m"))
    put(volume, 1, b"x", last_modified_s=int(time.time()) + 1000)
    last = volume.last_modified_s
    limit, size = 1 << 30, volume.dat_bytes
    clock.reaches(last)
    assert not volume.expired(size, limit)
    clock.reaches(last + 31 * 60 - 1)
    assert not volume.expired(size, limit)
    clock.reaches(last + 31 * 60)
    assert volume.expired(size, limit)
    assert not volume.expired(size, 0), "the limit is not known yet"
    assert not volume.expired(8, limit), "nothing in it"
    clock.reaches(last + 33 * 60)
    assert not volume.expired_long_enough()
    clock.reaches(last + 33 * 60 + 1)
    assert volume.expired_long_enough()
    volume.close()
    forever = create(tmp_path, 4)
    clock.reaches(1 << 40)
    assert not forever.expired(1000, limit) and not forever.expired_long_enough()
    forever.close()


YEARS_S = 10 * 365 * 86400


def test_a_clock_that_jumps_ahead_makes_nothing_old(tmp_path: Path, clock: Clock) -> None:
    """All volumes with a ttl were destroyed by the next heartbeat, with what was acknowledged a moment ago."""
    volume = create(tmp_path, ttl=Ttl.parse("30m"))
    limit, size = 1 << 30, put(volume, 1, b"x", last_modified_s=int(clock.wall_s)).offset + 64
    assert not volume.expired(size, limit)
    clock.passes(5 * 60)
    assert not volume.expired(size, limit)
    clock.passes(2)
    put(volume, 2, b"y", last_modified_s=int(clock.wall_s))
    clock.wall_s += YEARS_S
    for _ in range(31):  # the first heartbeat that sees the second needle comes after the jump
        assert not volume.expired(size, limit) and not volume.expired_long_enough()
        clock.passes(60)
    assert volume.expired(size, limit), "half an hour is over by any clock"
    assert not volume.expired_long_enough()
    put(volume, 3, b"z", last_modified_s=int(clock.wall_s))
    assert not volume.expired(size, limit)
    clock.wall_s -= YEARS_S
    clock.passes(34 * 60)
    assert not volume.expired(size, limit), "changed in what is the future again"
    volume.close()


def test_a_clock_that_was_set_after_the_start_makes_nothing_old(tmp_path: Path, clock: Clock) -> None:
    """A machine without a clock of its own begins in 1970."""
    now_s, clock.wall_s = clock.wall_s, 100.0
    volume = create(tmp_path, ttl=Ttl.parse("30m"))
    volume._last_modified_floor_s = volume._dat_mtime_s = 100
    put(volume, 1, b"x", last_modified_s=110)
    size, limit = volume.dat_bytes, 1 << 30
    assert not volume.expired(size, limit)
    clock.wall_s = now_s
    assert not volume.expired(size, limit) and not volume.expired_long_enough()
    clock.passes(31 * 60)
    assert volume.expired(size, limit) and not volume.expired_long_enough()
    clock.passes(2 * 60 + 1)
    assert volume.expired_long_enough()
    volume.close()


def test_age_at_the_start_counts(tmp_path: Path, clock: Clock) -> None:
    volume = create(tmp_path, ttl=Ttl.parse("30m"))
    put(volume, 1, b"x", last_modified_s=1)
    size = volume.dat_bytes
    volume.close()
    os.utime(tmp_path / "3.dat", (clock.wall_s - 3600, clock.wall_s - 3600))
    with closing(load(tmp_path, 3)) as volume:
        assert volume.expired(size, 1 << 30) and volume.expired_long_enough()


# ----------------------------------------------------------------------------------------------------------- read-only


def test_marks(volume: Volume) -> None:
    put(volume, 1, b"x"), put(volume, 2, b"y")
    volume.set_read_only()
    assert volume.is_read_only and volume.no_write_or_delete
    for attempt in (
        lambda: put(volume, 3, b"z"),
        lambda: volume.delete_needle(1, COOKIE),
        lambda: volume.write_blob(3, 8, record(3, b"abc")),
    ):
        with pytest.raises(VolumeReadOnly) as caught:
            attempt()
        assert str(caught.value) == "volume 3 is read only"
    with pytest.raises(engine.NativeError):
        volume.handle.write(3, COOKIE, b"past Python")
    volume.set_read_only(can_delete=True)
    assert volume.is_read_only and volume.no_write_can_delete and not volume.no_write_or_delete
    with pytest.raises(VolumeReadOnly):
        put(volume, 3, b"z")
    assert volume.delete_needle(1, COOKIE) > 0
    volume.set_read_only()
    assert volume.no_write_or_delete and not volume.no_write_can_delete
    volume.set_writable()
    assert not volume.is_read_only
    put(volume, 3, b"z")


@pytest.mark.parametrize("can_delete", [False, True])
def test_persisted_marks_survive_a_reload(tmp_path: Path, can_delete: bool) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"x")
    volume.set_read_only(can_delete)
    volume.close()
    volume = load(tmp_path, 3)
    assert not volume.is_read_only, "without persist the mark is lost"
    volume.set_read_only(can_delete, persist=True)
    volume.close()
    info = vif.load(str(tmp_path / "3.vif")).info
    assert (info.read_only, info.read_only_can_delete) == (True, can_delete)
    volume = load(tmp_path, 3)
    assert (volume.no_write_or_delete, volume.no_write_can_delete) == (not can_delete, can_delete)
    volume.set_writable()
    put(volume, 2, b"y")
    volume.close()
    info = vif.load(str(tmp_path / "3.vif")).info
    assert (info.read_only, info.read_only_can_delete) == (False, False)


def test_files_that_may_not_be_written_cannot_be_marked_writable(tmp_path: Path) -> None:
    create(tmp_path).close()
    (tmp_path / "3.dat").chmod(0o444)
    volume = load(tmp_path, 3)
    with pytest.raises(DiskError) as caught:
        volume.set_writable()
    assert str(caught.value) == f"volume 3 reopen idx for write: open {tmp_path}/3.dat: permission denied"
    assert volume.is_read_only
    (tmp_path / "3.dat").chmod(0o644)
    exchanged = []
    volume.on_reopen = exchanged.append
    volume.set_writable()
    assert exchanged == [volume]
    put(volume, 1, b"now it may")
    volume.close()


def test_readers_go_on_while_the_handle_is_exchanged(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"steady")
    volume.close()
    (tmp_path / "3.dat").chmod(0o444)
    volume = load(tmp_path, 3)
    (tmp_path / "3.dat").chmod(0o644)
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                assert data_of(volume, 1) == b"steady"
            except Exception as exc:  # reported by the test's own thread
                failures.append(exc)
                return

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    volume.set_writable()
    (tmp_path / "idx").mkdir()
    volume.relocate_index(str(tmp_path / "idx"))
    volume.relocate_index(str(tmp_path))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    volume.close()


def test_disk_low_on_space_still_deletes(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"x")
    location = DiskLocation(config_of(tmp_path).dirs[0])
    location.add(volume)
    location.is_low = True
    volume.refresh_read_only()
    assert volume.is_read_only and volume.read_only_reasons.disk_space_low and not volume.no_write_or_delete
    with pytest.raises(VolumeReadOnly):
        put(volume, 2, b"y")
    with pytest.raises(engine.NativeError):
        volume.handle.write(2, COOKIE, b"past Python")
    assert volume.delete_needle(1, COOKIE) > 0
    location.is_low = False
    volume.refresh_read_only()
    put(volume, 2, b"y")
    volume.close()


def test_save_of_a_mark_that_fails_is_told(tmp_path: Path) -> None:
    volume = create(tmp_path)
    (tmp_path / "3.vif").chmod(0o444)
    with pytest.raises(StorageError, match=r"failed to check .*vif not writable"):
        volume.set_read_only(persist=True)
    assert volume.is_read_only
    volume.close()


# ------------------------------------------------------------------------------------------------------------- failures


class FailingHandle:
    """An engine handle whose calls fail as told."""

    def __init__(self, handle: engine.Volume, error: engine.NativeError) -> None:
        self.inner = handle
        self.error = error

    def __getattr__(self, name: str):
        if name in ("write", "delete", "write_blob", "sync", "read", "lookup", "pread"):
            return self.fail
        return getattr(self.inner, name)

    def fail(self, *args, **kwargs):
        raise self.error


def native_error(code: int, number: int = 0, a=0, b=0, c=0, d=0, size=0) -> engine.NativeError:
    return engine.NativeError(code, engine.NativeInfo(code, number, a, b, c, d), size=size)


ESYS, EFULL = -1000, -1013


@pytest.mark.parametrize(
    ("error", "cls", "text"),
    [
        (
            native_error(ESYS, errno.ENOSPC, 8, 48, 0, 0, size=20),
            NoSpace,
            "append to volume 3 size 20 actualSize 48: failed to write 48 bytes to {dat} at offset 8: "
            "write {dat}: no space left on device",
        ),
        (
            native_error(ESYS, errno.EIO, 8, 17, 0, 2, size=20),
            DiskError,
            "index needle 9 of volume 3 at offset 8: write {idx}: input/output error",
        ),
        (native_error(ESYS, errno.EIO, 0, 0, 0, 4, size=20), DiskError, "sync {dat}: input/output error"),
        (
            native_error(ESYS, errno.EIO, 8, 16, 0, 1),
            DiskError,
            "reading existing needle: read {dat}: input/output error",
        ),
        (
            native_error(EFULL, 0, 1 << 35, 1 << 35),
            VolumeFull,
            "append to volume 3 size 0 actualSize 0: Volume Size 34359738368 Exceeded 34359738368",
        ),
        (
            native_error(EFULL, 0, 77, 1 << 35, 0, 1),
            VolumeFull,
            "volume size limit 34359738368 exceeded! current size is 77",
        ),
    ],
)
def test_texts_of_failed_appends(volume: Volume, error: engine.NativeError, cls: type, text: str) -> None:
    handle = volume._handle
    volume._handle = FailingHandle(handle, error)  # type: ignore[assignment]
    try:
        with pytest.raises(StorageError) as caught:
            volume.write_needle(NeedleIn(9, COOKIE, b"x"))
    finally:
        volume._handle = handle
    assert type(caught.value) is cls
    assert str(caught.value) == text.format(dat=volume.dat_path, idx=volume.idx_path)
    if error.info.sys_errno:
        assert caught.value.errno == error.info.sys_errno


def test_full_disk_leaves_the_volume_writable(tmp_path: Path) -> None:
    """A5, on a real full file system: the limit on the size of files gives EFBIG in place of ENOSPC."""
    import resource
    import signal

    volume = create(tmp_path)
    put(volume, 1, b"before")
    size = volume.dat_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(DiskError) as caught:
            put(volume, 2, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value).startswith("append to volume 3 size ") and str(caught.value).endswith("file too large")
    assert volume.dat_bytes == size == os.path.getsize(volume.dat_path)
    assert not volume.is_read_only
    put(volume, 2, b"room again")
    assert data_of(volume, 2) == b"room again" and data_of(volume, 1) == b"before"
    volume.close()


@pytest.mark.parametrize("code", [-1011, -1012])
@pytest.mark.parametrize("call", ["read", "lookup", "pread", "write", "delete", "blob"])
def test_calls_that_met_an_exchange_of_the_handle_are_repeated(volume: Volume, call: str, code: int) -> None:
    """The old handle answers "closed", or "read only" to a write, but a new one is there by then."""
    put(volume, 1, b"x")
    good = volume._handle

    class Outgoing(FailingHandle):
        def fail(self, *args, **kwargs):
            volume._handle = good
            raise self.error

    volume._handle = Outgoing(good, native_error(code))  # type: ignore[assignment]
    blob = record(9, b"abc")
    attempts = {
        "read": lambda: data_of(volume, 1) == b"x",
        "lookup": lambda: volume.lookup(1).offset == 8,
        "pread": lambda: len(volume.pread(8, 16, 0)) == 16,
        "write": lambda: put(volume, 2, b"y").offset > 8,
        "delete": lambda: volume.delete_needle(1, COOKIE) > 0,
        "blob": lambda: volume.write_blob(9, 8, blob).offset > 8,
    }
    assert attempts[call]()
    assert volume._handle is good


class CountedStat(FailingHandle):
    def __init__(self, handle: engine.Volume, eio_count: int) -> None:
        super().__init__(handle, native_error(ESYS))
        self.eio_count = eio_count

    def stat(self):
        from dataclasses import replace

        return replace(self.inner.stat(), eio_count=self.eio_count)


def test_quarantine_is_sticky(volume: Volume, caplog: pytest.LogCaptureFixture) -> None:
    handle = volume._handle
    volume._handle = counted = CountedStat(handle, 2)  # type: ignore[assignment]
    assert volume.check_io_health() and not volume.is_read_only
    counted.eio_count = 3
    assert not volume.check_io_health()
    assert volume.no_write_or_delete
    assert "volume 3 quarantined after 3 consecutive IO errors" in caplog.text
    counted.eio_count = 0
    assert not volume.check_io_health(), "a good read does not end it"
    counted.eio_count = 4
    volume.set_writable()
    assert volume.check_io_health() and not volume.is_read_only, "errors of before are forgiven"
    counted.eio_count = 6
    assert volume.check_io_health()
    counted.eio_count = 7
    assert not volume.check_io_health()
    volume.set_writable()
    counted.eio_count = 1
    assert volume.check_io_health()
    counted.eio_count = 3
    assert not volume.check_io_health(), "a streak that began anew counts from its own start"
    volume._handle = handle


def test_errors_of_a_handle_that_was_replaced_meanwhile_do_not_quarantine(volume: Volume) -> None:
    """The heartbeat's check waited for a mark as writable, which had just opened the files anew."""
    handle = volume._handle
    volume._handle = CountedStat(handle, 3)  # type: ignore[assignment]
    lock = volume._state_lock

    class LockWonLate:
        def __enter__(self) -> None:
            volume._handle = handle
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    volume._state_lock = LockWonLate()  # type: ignore[assignment]
    assert volume.check_io_health() and not volume.is_read_only
    volume._state_lock = lock


# ---------------------------------------------------------------------------------------------------------- end of life


def test_closed_volume(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"x")
    volume.close()
    volume.close()
    for attempt in (
        lambda: volume.read_needle(1),
        lambda: put(volume, 2, b"y"),
        lambda: volume.delete_needle(1, COOKIE),
        lambda: volume.lookup(1),
        volume.sync,
    ):
        with pytest.raises(VolumeClosed) as caught:
            attempt()
        assert str(caught.value) == "volume 3 is closed"
    assert volume.file_count == 1, "the last figures stay"
    assert volume.to_info() is None


@pytest.mark.parametrize(
    "late", [Volume.set_writable, lambda volume: volume.set_read_only(can_delete=True)], ids=["writable", "can delete"]
)
def test_a_closed_volume_is_not_opened_anew_by_a_mark(tmp_path: Path, late: Callable[[Volume], None]) -> None:
    """A mark that met an unmount opened the files again: two handles appended to one file after the next mount."""
    volume = create(tmp_path)
    volume.set_read_only(persist=True)
    volume.close()
    volume = load(tmp_path, 3)
    volume.close()
    with pytest.raises(VolumeClosed):
        late(volume)
    assert volume.handle.stat().closed and not volume.is_open


def test_destroy_removes_what_belongs_to_the_volume(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path, 3, "c", idx=idx)
    put(volume, 1, b"x")
    for extension in ("sdx", "cpd", "cpx", "cpc", "note", "rdb", "torn-4096", "torn-4096.1", "cpd.kept", "idx.tmp"):
        (tmp_path / f"c_3.{extension}").touch()
        (idx / f"c_3.{extension}").touch()
    (idx / "c_3.ldb").mkdir()
    (idx / "c_3.ldb" / "LOG").touch()
    bystanders = ["3.dat", "3.torn-8", "c_3.dat.copying", "c_3.ec00", "c_33.dat", "c_33.torn-8"]
    for bystander in bystanders:
        (tmp_path / bystander).touch()
    volume.destroy()
    assert sorted(p.name for p in tmp_path.iterdir()) == [*bystanders, "idx"]
    assert not list(idx.iterdir())


def test_destroy_keeps_the_vif_that_an_ec_volume_shares(tmp_path: Path) -> None:
    volume = create(tmp_path)
    (tmp_path / "3.ecx").write_bytes(b"index")
    volume.destroy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.ecx", "3.vif"]


def test_destroy_only_if_empty(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"x")
    volume.delete_needle(1, COOKIE)
    with pytest.raises(VolumeNotEmpty, match=r"^volume not empty$"):
        volume.destroy(only_empty=True)
    put(volume, 2, b"still writable")
    volume.close()
    empty = create(tmp_path, 4)
    empty.destroy(only_empty=True)
    assert not list(tmp_path.glob("4.*"))


def test_a_claimed_volume_is_not_destroyed_and_closes_later(tmp_path: Path) -> None:
    volume = create(tmp_path)
    assert volume.try_claim("vacuum") and not volume.try_claim("vacuum")
    assert volume.is_compacting
    with pytest.raises(VolumeBusy, match=r"^volume 3 is compacting$"):
        volume.destroy()
    with pytest.raises(VolumeBusy):
        (tmp_path / "x").mkdir()
        volume.relocate_index(str(tmp_path / "x"))
    closer = threading.Thread(target=volume.close)
    closer.start()
    put(volume, 1, b"a vacuum under way does not stop writes")
    assert volume.is_open
    volume.release()
    closer.join()
    assert not volume.is_open and not volume.is_compacting


# ---------------------------------------------------------------------------------------------------------- index moves


def test_index_is_relocated_in_place(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path)
    put(volume, 1, b"before", last_modified_s=2_000_000_000)
    (tmp_path / "3.sdx").write_bytes(b"derived")
    modified = volume.last_modified_s
    volume.relocate_index(str(idx))
    assert sorted(p.name for p in idx.iterdir()) == ["3.idx", "3.sdx"]
    assert volume.idx_path == f"{idx}/3.idx" and not (tmp_path / "3.idx").exists()
    assert volume.last_modified_s == modified == 2_000_000_000
    put(volume, 2, b"after")
    assert data_of(volume, 1) == b"before" and data_of(volume, 2) == b"after"
    volume.relocate_index(str(idx))
    volume.close()
    assert len(rows_in(idx / "3.idx")) == 2


def test_relocation_that_fails_changes_nothing(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"x")
    with pytest.raises(DiskError) as caught:
        volume.relocate_index(str(tmp_path / "missing"))
    assert str(caught.value) == (
        f"relocate index for volume 3: move .idx: rename {tmp_path}/3.idx {tmp_path}/missing/3.idx: "
        "no such file or directory"
    )
    put(volume, 2, b"still writable")
    volume.close()


@pytest.fixture(params=["same disk", "other disk", "no hard links"])
def move_between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an index is moved to: what the system says to a hard link there."""
    number = {"other disk": errno.EXDEV, "no hard links": errno.EPERM}.get(request.param)
    if number is not None:

        def refuse(*_names: str) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.os, "link", refuse)
    return str(request.param)


@pytest.mark.usefixtures("move_between")
def test_relocation_works_across_disks(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path)
    put(volume, 1, b"before")
    (idx / "3.idx").write_bytes(b"what a crash left")
    volume.relocate_index(str(idx))
    put(volume, 2, b"after")
    volume.close()
    assert [p.name for p in idx.iterdir()] == ["3.idx"] and not (tmp_path / "3.idx").exists()
    with closing(load(tmp_path, 3, idx=idx)) as again:
        assert data_of(again, 1) == b"before" and data_of(again, 2) == b"after"


@pytest.mark.usefixtures("move_between")
def test_relocation_whose_open_fails_keeps_the_index_that_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was copied to the other disk and unlinked; back came a copy, while appends went to the unlinked file."""
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path)
    put(volume, 1, b"before")

    def refuse(*_args: object, **_more: object) -> None:
        raise DiskError("cannot write Volume Index: too many open files", errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(volume_module, "open_handle", refuse)
        with pytest.raises(StorageError, match=r"^relocate index for volume 3: cannot write Volume Index: too many"):
            volume.relocate_index(str(idx))
    put(volume, 2, b"after")
    assert os.path.samestat(os.stat(tmp_path / "3.idx"), os.stat(f"/proc/self/fd/{idx_fd_of(tmp_path / '3.idx')}"))
    volume.close()
    assert not list(idx.iterdir()) and len(rows_in(tmp_path / "3.idx")) == 2
    with closing(load(tmp_path, 3, idx=idx)) as again:
        assert data_of(again, 2) == b"after"


def idx_fd_of(path: Path) -> str:
    """The descriptor of this process on a file that is still at its path; fails if there is none."""
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}") == str(path):
                return entry
    raise AssertionError(f"{path} is not open")


@pytest.mark.usefixtures("move_between")
@pytest.mark.parametrize("step", ["rename", "sync"])
def test_relocation_that_cannot_drop_the_old_name_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path)
    put(volume, 1, b"before")
    rename, sync_dir = os.rename, files.sync_dir

    def failing_rename(source: str, target: str) -> None:
        if source == f"{tmp_path}/3.idx":
            raise OSError(errno.EIO, "")
        rename(source, target)

    def failing_sync(directory: str) -> None:
        if directory == str(tmp_path):
            raise OSError(errno.EIO, "")
        sync_dir(directory)

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(files.os, "rename", failing_rename)
        else:
            patch.setattr(files, "sync_dir", failing_sync)
        with pytest.raises(
            DiskError, match=r"^relocate index for volume 3: move \.idx: rename .*: input/output error$"
        ):
            volume.relocate_index(str(idx))
    put(volume, 2, b"after")
    volume.close()
    assert not list(idx.iterdir()) and len(rows_in(tmp_path / "3.idx")) == 2


@pytest.mark.usefixtures("move_between")
@pytest.mark.parametrize("towards", ["idx", "data"])
def test_crash_with_both_names_of_a_relocated_index(tmp_path: Path, towards: str) -> None:
    """Nothing is written while there are two, so whichever the loader takes has every row."""
    data, idx = tmp_path / "data", tmp_path / "idx"
    idx.mkdir()
    volume = create(data, idx=data if towards == "idx" else idx)
    put(volume, 1, b"x")
    volume.close()
    source, target = (data, idx) if towards == "idx" else (idx, data)
    files.second_name(f"{source}/3.idx", f"{target}/3.idx")
    with closing(load(data, 3, idx=idx)) as again:
        assert data_of(again, 1) == b"x" and not again.is_read_only
        put(again, 2, b"y")
        again.relocate_index(str(idx))
        assert data_of(again, 2) == b"y"
    with closing(load(data, 3, idx=idx)) as again:
        assert again.idx_directory == str(idx) and data_of(again, 2) == b"y" and again.file_count == 2


def test_relocated_volume_is_found_at_the_next_start(tmp_path: Path) -> None:
    """A directory is searched for .idx and .vif only; without the first beside the data the second must be there."""
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path)
    (tmp_path / "3.vif").unlink()
    volume.relocate_index(str(idx))
    volume.close()
    assert (tmp_path / "3.vif").exists()


# ------------------------------------------------------------------------------------------------------------ heartbeat


def test_what_a_heartbeat_says(tmp_path: Path) -> None:
    volume = create(tmp_path, 3, "pics", ttl=Ttl.parse("3h"))
    location = DiskLocation(config_of(tmp_path, disk_type="SSD").dirs[0], disk_id=2)
    location.add(volume)
    put(volume, 0x99, b"x"), put(volume, 0x98, b"y")
    volume.delete_needle(0x98, COOKIE)
    info = volume.to_info()
    assert info is not None
    assert (info.id, info.collection, info.version, info.ttl) == (3, "pics", 3, 0x302)
    assert info.size == os.path.getsize(volume.dat_path)
    assert (info.file_count, info.delete_count, info.deleted_byte_count) == (2, 1, volume.deleted_bytes)
    assert (info.disk_type, info.disk_id, info.max_file_key) == ("ssd", 2, 0x99)
    assert abs(info.modified_at_second - time.time()) < 5
    assert not info.read_only and info.replica_placement == PLAIN.byte
    short = volume.short_info()
    assert (short.id, short.collection, short.ttl, short.disk_type, short.disk_id) == (3, "pics", 0x302, "ssd", 2)
    volume.close()


def test_phantoms_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = create(tmp_path)
    hidden = tmp_path / "hidden"
    (tmp_path / "3.dat").rename(hidden)
    assert volume.to_info() is not None, "without files there is nothing to miss"
    put(volume, 1, b"x")
    assert volume.to_info() is None
    assert "missing (held open as deleted FD) - not reporting to master" in caplog.text
    hidden.rename(tmp_path / "3.dat")
    assert volume.to_info() is not None
    (tmp_path / "3.dat").rename(hidden)
    assert volume.to_info() is not None, "seen a moment ago"
    volume.close()


def test_garbage_ratio(volume: Volume) -> None:
    assert volume.garbage_ratio == 0
    put(volume, 1, b"a" * 100), put(volume, 2, b"b" * 100)
    volume.delete_needle(1, COOKIE)
    assert volume.garbage_ratio == 0.5


def test_modified_time_is_the_files_until_it_is_written(tmp_path: Path) -> None:
    create(tmp_path).close()
    os.utime(tmp_path / "3.dat", (1_600_000_000, 1_600_000_000))
    volume = load(tmp_path, 3)
    assert volume.modified_at_s == volume.last_modified_s == 1_600_000_000
    put(volume, 1, b"x", last_modified_s=1_600_000_500)
    assert volume.last_modified_s == 1_600_000_500
    assert abs(volume.modified_at_s - time.time()) < 5
    volume.close()


def test_close_that_cannot_sync_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = create(tmp_path)
    handle = volume._handle

    class Closing(FailingHandle):
        def close(self) -> None:
            raise self.error

    volume._handle = Closing(handle, native_error(ESYS, errno.EIO, d=1))  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        volume.close()
    assert f"volume 3: closing: sync {volume.idx_path}: input/output error" in caplog.text
    handle.close()
