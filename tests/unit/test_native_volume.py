"""Volume handles, scans and the registry through the wrappers of pyvolume._native.engine."""

from __future__ import annotations

import gc
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import formats

from pyvolume import _pv
from pyvolume._native import engine, http
from pyvolume._native.engine import Entry, NativeError, OpenFlag, SuperBlockFields, TailVerdict, Volume
from pyvolume.errors import NativeCode

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "go-4.44"
COOKIE = 0xFC0044A0
BLOCK = SuperBlockFields(3, 0, 0, 0, 0, 0)

# volumes as they are, and those whose last record is torn
WHOLE = ["v3-basic", "collection", "replication-001", "vacuumed", "readonly", "chunk-manifest", "own-v1", "own-v2"]
WHOLE += ["own-v3", "own-5byte", "empty", "images"]


def create(directory: Path, **options: Any) -> Volume:
    flags = options.pop("flags", 0) | OpenFlag.CREATE
    block = options.pop("superblock", BLOCK)
    return Volume.open(directory / "7.dat", directory / "7.idx", vid=7, flags=flags, superblock=block, **options)


def reopen(directory: Path, **options: Any) -> Volume:
    return Volume.open(directory / "7.dat", directory / "7.idx", vid=7, **options)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    with create(tmp_path) as v:
        yield v


def fails(code: NativeCode, call: Any, *args: Any, **kwargs: Any) -> engine.NativeInfo:
    with pytest.raises(NativeError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, str(caught.value)
    assert code.name in str(caught.value)
    return caught.value.info


# ------------------------------------------------------------------------------------------------------- golden volumes


def golden_volumes(name: str, target: Path) -> Iterator[tuple[Volume, dict[str, Any]]]:
    """(open volume, needles by fid) for each volume of a golden set, on a copy."""
    shutil.copytree(GOLDEN / name / "data", target, dirs_exist_ok=True)
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text())
    for described in manifest["volumes"]:
        vid = described["id"]
        base = f"{described['collection']}_{vid}" if described["collection"] else str(vid)
        needles = {n["fid"]: n for n in manifest["needles"] if n["fid"].split(",")[0] == str(vid)}
        width = 5 if name == "own-5byte" else 4
        with Volume.open(target / f"{base}.dat", target / f"{base}.idx", vid=vid, offset_width=width) as v:
            yield v, needles


def split_fid(fid: str) -> tuple[int, int]:
    text = fid.split(",")[1]
    return int(text[:-8], 16), int(text[-8:], 16)


@pytest.mark.parametrize("name", WHOLE)
def test_reads_what_go_wrote(name: str, tmp_path: Path) -> None:
    seen = 0
    for v, needles in golden_volumes(name, tmp_path / name):
        for fid, answer in needles.items():
            key, cookie = split_fid(fid)
            if answer["status"] == 404:
                if "expired" in answer.get("note", ""):
                    continue
                try:
                    assert v.read(key).cookie != cookie
                except NativeError as exc:
                    assert exc.code in (NativeCode.ENOTFOUND, NativeCode.EDELETED)
                continue
            if answer["status"] != 200:
                continue
            n = v.read(key)
            if n.empty:
                assert answer["body_length"] == 0
                continue
            assert n.id == key
            assert n.cookie == cookie
            assert f'"{n.etag}"' == answer["headers"]["Etag"]
            data = bytes(n.data or b"")
            body = gzip.decompress(data) if n.is_compressed else data
            if not n.is_manifest:
                assert len(body) == answer["body_length"]
                assert hashlib.sha256(body).hexdigest() == answer["body_sha256"]
            seen += 1
    assert seen or name == "empty"


@pytest.mark.parametrize("name", WHOLE)
def test_scan_agrees_with_the_plain_reader(name: str, tmp_path: Path) -> None:
    for v, _ in golden_volumes(name, tmp_path / name):
        path = next((tmp_path / name).glob(f"*{v.vid}.dat"))
        raw = path.read_bytes()
        version = v.stat().version
        with path.open("rb") as f:
            got, offset = [], v.superblock_bytes
            while True:
                records, offset = engine.dat_scan(f.fileno(), version, offset, 0, True, max_records=7)
                got += records
                if not records:
                    break
        assert offset == len(raw)
        assert all(record.status == 0 for record in got)
        at = v.superblock_bytes
        for record in got:
            want = formats.parse(raw[record.offset : record.end], version)
            assert record.offset == at
            assert (record.id, record.cookie, record.size) == (want.id, want.cookie, want.size)
            assert (record.append_at_ns, record.last_modified_s) == (want.append_at_ns, want.last_modified_s)
            assert (record.data_size, record.checksum, record.flags) == (len(want.data), want.checksum, want.flags)
            at = record.end


def test_torn_volumes_are_judged_as_go_does(tmp_path: Path) -> None:
    """71: the last record lost 100 bytes; 72: 5 bytes, all padding; 73: two records."""
    data = GOLDEN / "torn-dat" / "data"
    manifest = json.loads((GOLDEN / "torn-dat" / "manifest.json").read_text())
    for vid in (71, 72, 73):
        with (data / f"{vid}.dat").open("rb") as dat, (data / f"{vid}.idx").open("rb") as idx:
            verdict, info, _ = engine.check_tail(dat.fileno(), idx.fileno(), 4, 3)
            size = os.fstat(dat.fileno()).st_size
            summary = engine.idx_summarize(idx.fileno(), 4, 3, size)
        read_only = manifest["grpc"][str(vid)]["VolumeStatus"]["is_read_only"]
        assert (verdict != TailVerdict.OK) == read_only
        assert summary.rows == 6
        assert summary.past_end == (2 if vid == 73 else 1)
        if read_only:
            assert verdict == TailVerdict.DAT_SHORTER
            assert info.b == size
            assert info.a == summary.max_end
    for v, needles in golden_volumes("torn-dat", tmp_path / "torn"):
        assert v.stat().dat_bytes == int(manifest["grpc"][str(v.vid)]["VolumeStatus"]["volume_size"])
        for fid, answer in needles.items():
            key, cookie = split_fid(fid)
            if answer["status"] == 200:
                assert v.read(key).cookie == cookie
            else:
                assert answer["status"] == 500
                fails(NativeCode.EEOF, v.read, key)


def test_index_of_100k_rows(tmp_path: Path) -> None:
    """Counts and live entries as Go has them; there is no .dat, so the volume's end is given to none."""
    want = json.loads((GOLDEN / "index-100k" / "manifest.json").read_text())
    (tmp_path / "7.dat").write_bytes(engine.superblock_put(3))
    shutil.copy(GOLDEN / "index-100k" / "data" / "121.idx", tmp_path / "7.idx")
    with reopen(tmp_path) as v:
        stat = v.stat()
        summary = want["map_summary"]
        assert (stat.file_count, stat.deleted_count) == (summary["puts"], summary["deletes"])
        assert (stat.file_bytes, stat.deleted_bytes) == (summary["put_bytes"], summary["deleted_bytes"])
        assert stat.max_key == summary["max_key"]
        digest, live, before = hashlib.sha256(), 0, -1
        for row in v.entries(batch=1000):
            assert row.key > before
            before = row.key
            if row.size >= 0:
                live += 1
                digest.update(struct.pack(">QQi", row.key, row.offset, row.size))
        assert live == summary["live"]
        assert digest.hexdigest() == summary["live_sha256"]
        for key, offset, size in want["map_sample"]:
            assert v.lookup(key) == Entry(offset, size, 0)
        for key in want["map_gone"]:
            with pytest.raises(NativeError):
                v.read(key)


# ---------------------------------------------------------------------------------------------------- write and read


def test_write_read_delete(volume: Volume, tmp_path: Path) -> None:
    result = volume.write(
        1,
        COOKIE,
        b"hello",
        flags=0x3E,
        name=b"hello.bin",
        mime=b"text/x-demo",
        pairs=b'{"Color":"red"}',
        last_modified_s=1_700_000_000,
        ttl=(3, 2),
    )
    assert (result.offset, result.cookie, result.checksum, result.unchanged) == (8, COOKIE, 0x9A71BB4C, False)
    n = volume.read(1)
    assert (n.id, n.cookie, n.size, n.data_size, n.flags, n.version) == (1, COOKIE, result.size, 5, 0x3E, 3)
    assert (n.name, n.mime, n.pairs) == (b"hello.bin", b"text/x-demo", b'{"Color":"red"}')
    assert (n.last_modified_s, n.ttl_count, n.ttl_unit) == (1_700_000_000, 3, 2)
    assert (n.append_at_ns, n.checksum, n.etag) == (result.append_at_ns, result.checksum, "9a71bb4c")
    assert (n.entry_offset, n.entry_size, n.entry_revision, n.data_offset) == (8, result.size, 0, 28)
    assert n.has_ttl
    assert n.has_last_modified
    assert not n.is_compressed
    assert not n.is_manifest
    assert isinstance(n.data, memoryview)
    assert n.data.readonly
    assert n.data == b"hello"
    raw = (tmp_path / "7.dat").read_bytes()[8:]
    assert raw == engine.frame_needle(
        1,
        COOKIE,
        b"hello",
        flags=0x3E,
        name=b"hello.bin",
        mime=b"text/x-demo",
        pairs=b'{"Color":"red"}',
        last_modified_s=1_700_000_000,
        ttl=(3, 2),
        append_at_ns=result.append_at_ns,
    )
    assert volume.stat().last_modified_s == 1_700_000_000
    assert abs(volume.stat().last_write_wall_s - time.time()) < 5

    assert volume.write(1, COOKIE, b"hello").unchanged
    assert fails(NativeCode.ECOOKIE, volume.write, 1, 5, b"other").a == 5
    assert volume.write(1, 0, b"adopts", check_cookie=False).cookie == COOKIE

    size, tombstone = volume.delete(1, COOKIE, n.checksum)
    assert size == volume.lookup(1).size * -1
    assert tombstone is not None
    assert (tombstone.size, tombstone.checksum, tombstone.cookie) == (0, n.checksum, COOKIE)
    assert fails(NativeCode.EDELETED, volume.read, 1).a == size
    assert volume.read(1, read_deleted=True).data == b"adopts"
    assert volume.delete(1, COOKIE) == (-1, None)
    assert volume.delete(2, COOKIE) == (-1, None)
    fails(NativeCode.ENOTFOUND, volume.read, 2)
    fails(NativeCode.ENOTFOUND, volume.lookup, 2)

    assert volume.write(3, COOKIE, b"").size == 0
    empty = volume.read(3)
    assert empty.empty
    assert empty.data == b""
    assert empty.cookie == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: memoryview(b"xx" + b + b"yy")[2:-2]])
def test_kinds_of_buffers(volume: Volume, kind: Any) -> None:
    volume.write(1, COOKIE, kind(b"data of some kind"), flags=0x06, name=kind(b"n"), mime=kind(b"m"))
    n = volume.read(1)
    assert (n.data, n.name, n.mime) == (b"data of some kind", b"n", b"m")
    record = engine.frame_needle(2, COOKIE, kind(b"blob"), append_at_ns=1)
    volume.write_blob(2, struct.unpack_from(">i", record, 12)[0], kind(record))
    assert volume.read(2).data == b"blob"
    assert engine.crc32c(kind(b"123456789")) == 0xE3069283


def test_what_cannot_be_written(volume: Volume) -> None:
    volume.write(1, COOKIE, b"x", flags=0x02, name=b"n" * 300)
    assert volume.read(1).name == b"n" * 255  # as upstream
    for bad in (
        {"mime": b"m" * 256, "flags": 0x04},
        {"pairs": b"p" * 65536, "flags": 0x20},
        {"ttl": (256, 1)},
        {"flags": 256},
        {"last_modified_s": -1},
    ):
        with pytest.raises(OverflowError):
            volume.write(2, COOKIE, b"x", **bad)
    for key, cookie in ((-1, 0), (1 << 64, 0), (1, 1 << 32)):
        with pytest.raises(OverflowError):
            volume.write(key, cookie, b"x")
    with pytest.raises((BufferError, ValueError)):
        volume.write(2, COOKIE, memoryview(b"abcdef")[::2])
    assert volume.stat().file_count == 1


def test_data_outlives_needle_and_volume(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    v = create(tmp_path)
    v.write(1, COOKIE, data)
    view = v.read(1).data
    assert view is not None
    part = memoryview(view)[500:1000]
    del view
    v.close()
    del v
    gc.collect()
    assert part == data[500:1000]


def test_read_memory_is_given_back(volume: Volume) -> None:
    volume.write(1, COOKIE, os.urandom(1 << 20))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    volume.read(1)
    before = resident()
    for _ in range(300):
        volume.read(1)
        volume.read(1, meta_ok=True)
    assert resident() - before < 50 << 20


def test_meta_only_and_pread(volume: Volume) -> None:
    data = os.urandom((1 << 20) + 100)
    volume.write(1, COOKIE, data, flags=0x02, name=b"big")
    assert volume.read(1).data == data
    n = volume.read(1, meta_ok=True)
    assert n.meta_only
    assert n.data is None
    assert (n.name, n.data_size, n.checksum) == (b"big", len(data), engine.crc32c(data))
    assert volume.pread(n.data_offset, len(data), n.entry_revision) == data
    buf = bytearray(10)
    volume.pread_into(n.data_offset + 5, buf, n.entry_revision)
    assert buf == data[5:15]
    fails(NativeCode.ESTALE, volume.pread, n.data_offset, 5, n.entry_revision + 1)
    fails(NativeCode.EEOF, volume.pread, volume.stat().dat_bytes - 2, 5, 0)
    with pytest.raises((BufferError, TypeError)):
        volume.pread_into(0, memoryview(b"readonly"), 0)
    volume.write(2, COOKIE, data, flags=0x01)
    assert volume.read(2, meta_ok=True).data == data


def test_blob(volume: Volume) -> None:
    record = engine.frame_needle(9, COOKIE, b"from elsewhere", append_at_ns=77)
    size = struct.unpack_from(">i", record, 12)[0]
    kept = bytes(bytearray(record))
    result = volume.write_blob(9, size, record)
    assert record == kept
    assert result.append_at_ns > 77
    assert volume.read(9).append_at_ns == result.append_at_ns
    assert volume.write_blob(9, size, record).unchanged
    info = fails(NativeCode.ESIZE, volume.write_blob, 9, size, record[:15])
    assert (info.a, info.b) == (0, 15)
    info = fails(NativeCode.ESIZE, volume.write_blob, 9, size + 1, record)
    assert (info.a, info.c, info.d) == (1, size, size + 1)
    info = fails(NativeCode.EBUFFER, volume.write_blob, 8, size, record[: 16 + size + 11])
    assert (info.a, info.b) == (16 + size + 12, 16 + size + 11)


def test_map_outside(tmp_path: Path) -> None:
    v = create(tmp_path, flags=OpenFlag.NO_MAP)
    first = v.write(1, COOKIE, b"one")
    entry = Entry(first.offset, first.size, 0)
    assert v.read(1, entry=entry).data == b"one"
    assert v.write(1, COOKIE, b"one", entry=entry).unchanged
    fails(NativeCode.ECOOKIE, v.write, 1, 3, b"two", entry=entry)
    second = v.write(1, COOKIE, b"two", entry=entry, fsync=True)
    entry = Entry(second.offset, second.size, 0)
    fails(NativeCode.ESTALE, v.read, 1, entry=entry._replace(revision=4))
    fails(NativeCode.EINVAL, v.lookup, 1)
    fails(NativeCode.EINVAL, v.visit, 0, 10)
    assert v.delete(1, COOKIE, entry=entry)[0] == second.size
    assert v.stat().file_count == 2  # counted from the entries given
    v.close()
    with reopen(tmp_path) as v:
        assert v.stat().file_count == 2
        fails(NativeCode.EDELETED, v.read, 1)


# ----------------------------------------------------------------------------------------------------- life of a handle


def test_open_errors(tmp_path: Path) -> None:
    info = fails(NativeCode.ESYS, reopen, tmp_path)
    assert (info.sys_errno, info.d) == (2, 0)
    (tmp_path / "7.dat").write_bytes(b"\3\0")
    fails(NativeCode.EEOF, reopen, tmp_path)
    (tmp_path / "7.dat").write_bytes(b"\x09" + bytes(7))
    assert fails(NativeCode.EVERSION, reopen, tmp_path).a == 9
    (tmp_path / "7.dat").write_bytes(engine.superblock_put(3))
    (tmp_path / "7.idx").write_bytes(b"12345")
    assert fails(NativeCode.EALIGN, reopen, tmp_path).a == 5
    with pytest.raises(ValueError, match="null"):
        Volume.open(str(tmp_path / "7.dat") + "\0x", tmp_path / "7.idx", vid=7)


def test_super_block(tmp_path: Path) -> None:
    block = SuperBlockFields(2, 110, 5, 3, 65535, 0)
    raw = engine.superblock_put(*block)
    assert engine.superblock_parse(raw) == block
    with create(tmp_path, superblock=raw) as v:
        assert v.superblock() == block
        assert v.superblock_bytes == 8
        assert v.stat().version == 2
        assert v.stat().compaction_revision == 65535
        v.write(1, COOKIE, b"x")
        assert v.lookup(1).revision == 65535
    assert v.superblock() == block
    with reopen(tmp_path, version=3) as v:
        assert v.stat().version == 3
    with pytest.raises(ValueError, match="8 bytes"):
        engine.superblock_parse(b"1234567")
    with pytest.raises(OverflowError):
        engine.superblock_put(3, 256)


def test_append_time_given_at_open(tmp_path: Path) -> None:
    with create(tmp_path, last_append_at_ns=1 << 62) as v:
        assert v.write(1, COOKIE, b"x").append_at_ns == (1 << 62) + 1


def test_read_only_switch(volume: Volume) -> None:
    volume.write(1, COOKIE, b"x")
    volume.set_readonly(True, False)
    assert volume.stat().no_write
    fails(NativeCode.EREADONLY, volume.write, 2, COOKIE, b"x")
    assert volume.delete(1, COOKIE)[0] > 0
    volume.set_readonly(True, True)
    fails(NativeCode.EREADONLY, volume.delete, 1, COOKIE)
    volume.set_readonly(False, False)
    volume.write(2, COOKIE, b"x")


def test_closed(tmp_path: Path) -> None:
    v = create(tmp_path)
    v.write(1, COOKIE, b"x", fsync=True)
    v.sync()
    v.close()
    v.close()
    for call in (
        lambda: v.read(1),
        lambda: v.write(1, COOKIE, b"y"),
        lambda: v.delete(1, COOKIE),
        lambda: v.write_blob(1, 0, bytes(32)),
        lambda: v.lookup(1),
        lambda: v.visit(0, 5),
        lambda: v.pread(0, 1, 0),
        v.sync,
        lambda: v.set_readonly(True, True),
    ):
        fails(NativeCode.ECLOSED, call)
    stat = v.stat()
    assert stat.closed
    assert stat.file_count == 1


def test_dropped_handle_closes_its_files(tmp_path: Path) -> None:
    def open_fds() -> int:
        return sum(1 for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd))

    v = create(tmp_path)
    assert open_fds() == 2
    del v
    gc.collect()
    assert open_fds() == 0


def test_registry(tmp_path: Path) -> None:
    registry = engine.Registry()
    v = create(tmp_path)
    v.write(1, COOKIE, b"x")
    registry.publish(7, v)
    assert fails(NativeCode.EEXISTS, registry.publish, 7, v).a == 7
    assert registry.count() == 1
    assert registry.acquire(8) is None
    del v
    gc.collect()
    again = registry.acquire(7)  # the registry kept it open
    assert again is not None
    assert again.read(1).data == b"x"
    registry.withdraw(7)
    assert fails(NativeCode.ENOTFOUND, registry.withdraw, 7).a == 7
    assert registry.count() == 0
    assert again.read(1).data == b"x"


# -------------------------------------------------------------------------------------------------------------- threads


def test_threads_write_read_and_close(tmp_path: Path) -> None:
    """Each thread knows its keys; readers check every needle's own checksum; the volume is closed under all of them."""
    v = create(tmp_path)
    known: list[dict[int, bytes | None]] = [{} for _ in range(4)]
    problems: list[BaseException] = []

    def guard(work: Any, *args: Any) -> None:
        try:
            work(*args)
        except NativeError as exc:
            if exc.code != NativeCode.ECLOSED:
                problems.append(exc)
        except BaseException as exc:
            problems.append(exc)

    def writer(number: int) -> None:
        mine = known[number]
        for i in range(1_000_000):
            key = number * 1000 + i % 50
            if i % 7 == 3 and mine.get(key) is not None:
                v.delete(key, COOKIE)
                mine[key] = None
                continue
            data = f"{key} {i} ".encode() * (1 + i % 40)
            v.write(key, COOKIE, data, fsync=i % 100 == 0)
            mine[key] = data

    def reader() -> None:
        for i in range(1_000_000):
            try:
                n = v.read(i % 4 * 1000 + i % 50, read_deleted=i % 2 == 0)
            except NativeError as exc:
                if exc.code not in (NativeCode.ENOTFOUND, NativeCode.EDELETED):
                    raise
                continue
            assert bytes(n.data or b"").startswith(b"%d " % n.id)

    threads = [threading.Thread(target=guard, args=(writer, n)) for n in range(4)]
    threads += [threading.Thread(target=guard, args=(reader,)) for _ in range(3)]
    for t in threads:
        t.start()
    deadline = time.monotonic() + 20
    while v.stat().file_count < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    v.close()
    for t in threads:
        t.join()
    assert not problems
    with reopen(tmp_path) as v:
        for mine in known:
            for key, data in mine.items():
                if data is None:
                    fails(NativeCode.EDELETED, v.read, key)
                else:
                    assert v.read(key).data == data


# ---------------------------------------------------------------------------------------------------------- the binding


def test_codes_agree_with_the_header() -> None:
    found = {name: getattr(_pv.lib, name) for name in dir(_pv.lib) if name.startswith("PV_E") and name[4].isupper()}
    names = {name[3:]: value for name, value in found.items() if value <= -1000}
    assert names == {code.name: int(code) for code in NativeCode if int(code) <= -1000}
    for name, value in names.items():
        assert engine.err_name(value) == f"PV_{name}"


def test_constants_agree_with_the_header() -> None:
    lib = _pv.lib
    assert engine.META_ONLY_ABOVE_BYTES == lib.PV_META_ONLY_ABOVE
    assert engine.SUPER_BLOCK_BYTES == lib.PV_SUPERBLOCK
    assert {f.name: int(f) for f in OpenFlag} == {
        name[7:]: getattr(lib, name) for name in dir(lib) if name.startswith("PV_VOL_")
    }
    assert {f.name: int(f) for f in TailVerdict} == {
        name[8:]: getattr(lib, name) for name in dir(lib) if name.startswith("PV_TAIL_")
    }
    flags = [engine.FLAG_COMPRESSED, engine.FLAG_NAME, engine.FLAG_MIME, engine.FLAG_LAST_MODIFIED, engine.FLAG_TTL]
    flags += [engine.FLAG_PAIRS, engine.FLAG_MANIFEST]
    assert flags == [
        lib.PV_F_COMPRESSED,
        lib.PV_F_NAME,
        lib.PV_F_MIME,
        lib.PV_F_MTIME,
        lib.PV_F_TTL,
        lib.PV_F_PAIRS,
        lib.PV_F_MANIFEST,
    ]
    # the wrappers spell these as numbers
    assert (lib.PV_READ_DELETED, lib.PV_READ_META_OK, lib.PV_READ_ENTRY) == (1, 2, 4)
    assert (lib.PV_WRITE_CHECK_COOKIE, lib.PV_WRITE_FSYNC, lib.PV_WRITE_ENTRY) == (1, 2, 4)


def build_script() -> Any:
    spec = importlib.util.spec_from_file_location("build_ffi", ROOT / "build_ffi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stub_is_in_step_with_the_module() -> None:
    pytest.importorskip("cffi")
    assert (ROOT / "pyvolume" / "_pv.pyi").read_text() == build_script().stub(_pv.ffi, _pv.lib), "run build_ffi.py"


def test_declarations_of_a_header() -> None:
    pytest.importorskip("cffi")
    text = """
    #ifndef X /* guard */
    #define X
    #include <stdint.h>
    #define PV_API __attribute__((visibility("default")))
    #define A 16
    #define B 0x1f /* a number */
    #define C (-3)
    #define D (A + 1)
    #define LONG(x) \\
        do { x; } while (0)
    /* PV_API int not_this(void); */
    PV_API int f(int a) PV_WUR;
    #endif
    """
    got = [" ".join(line.split()) for line in build_script().declarations(text).splitlines()]
    assert [line for line in got if line] == ["#define A 16", "#define B 0x1f", "#define C -3", "int f(int a) ;"]


def test_quick_functions_of_a_header() -> None:
    pytest.importorskip("cffi")
    header = """
    /* PV_API PV_QUICK int not_this(void); */
    PV_API PV_QUICK int f(int a) PV_WUR;
    PV_API int g(int a, int b);
    PV_API PV_QUICK const char *h(int a,
                                  int b);
    """
    build = build_script()
    assert build.quick_functions(header) == ["f", "h"]
    assert "PV_QUICK" not in build.declarations(header)
    ours = build.quick_functions((ROOT / "csrc" / "pv.h").read_text())
    assert {"pv_vid_parse", "pv_get_plan", "pv_buf_free"} <= set(ours)
    assert not {"pv_vol_read", "pv_vol_write", "pv_crc32c", "pv_upload_parse"} & set(ours)


def test_small_calls_woke_other_threads() -> None:
    """With a switch interval that never ends, another thread runs only while this one lets go of the lock."""
    turns = 0
    over = False

    def wait_for_turns() -> None:
        nonlocal turns
        while not over:
            turns += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    other = threading.Thread(target=wait_for_turns)
    try:
        other.start()
        before = turns
        for _ in range(5000):
            http.parse_vid(b"7")
            http.etag(1)
        after = turns
    finally:
        over = True
        sys.setswitchinterval(interval)
        other.join()
    assert after == before
