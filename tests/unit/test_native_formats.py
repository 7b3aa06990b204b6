"""The engine's records, checksums, super blocks and index rows against Go's files and the plain reference."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from oracle import formats

from pyvolume._native import engine

GOLDEN = Path(__file__).parents[1] / "data" / "go-4.44"
RECORD_VERSIONS = {"own-v1": 1, "own-v2": 2}  # the others hold records of version 3

DAT_FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/data/*.dat"))
IDX_FILES = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/data/*.idx"))

# Contract storage.md 3.3: made by a Go server.
EXAMPLE = bytes.fromhex(
    "fc0044a0 0000000000000001 00000036"
    "00000005 68656c6c6f 2e 0968656c6c6f2e62696e 0b746578742f782d64656d6f 006553f100"
    "000f7b22436f6c6f72223a22726564227d 9a71bb4c 18eaa0962621e28d 000000360000"
)
EXAMPLE_TOMBSTONE = bytes.fromhex("11112222 000000000000000a 00000000 34cfdc25 18eaa09b4988c13f 00000000")


def manifest(name: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text())
    return out


def assert_same(got: engine.Needle, want: formats.Needle) -> None:
    assert (got.id, got.cookie, got.size, got.flags) == (want.id, want.cookie, want.size, want.flags)
    assert bytes(got.data or b"") == want.data
    assert got.data_size == len(want.data)
    assert (got.name, got.mime, got.pairs) == (want.name, want.mime, want.pairs)
    assert (got.last_modified_s, (got.ttl_count, got.ttl_unit)) == (want.last_modified_s, want.ttl)
    assert (got.checksum, got.append_at_ns) == (want.checksum, want.append_at_ns)


def frame_like(n: engine.Needle, version: int) -> bytes:
    return engine.frame_needle(
        n.id,
        n.cookie,
        n.data or b"",
        version=version,
        flags=n.flags,
        name=n.name,
        mime=n.mime,
        pairs=n.pairs,
        last_modified_s=n.last_modified_s,
        ttl=(n.ttl_count, n.ttl_unit),
        append_at_ns=n.append_at_ns,
        checksum=n.checksum,
    )


# ----------------------------------------------------------------------------------------------------------- checksum


def test_checksum_of_the_contract() -> None:
    assert engine.crc32c(b"123456789") == 0xE3069283 == formats.crc32c(b"123456789")
    assert engine.crc32c(b"hello") == 0x9A71BB4C
    assert engine.crc32c(b"") == 0
    assert engine.crc_legacy(0x9A71BB4C) == 0x191C1FBB == formats.crc_legacy(0x9A71BB4C)
    assert engine.crc32c(b"6789", engine.crc32c(b"12345")) == 0xE3069283


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("record", [EXAMPLE, EXAMPLE_TOMBSTONE], ids=["needle", "tombstone"])
def test_worked_example(record: bytes) -> None:
    got = engine.parse_needle(record, 3)
    assert_same(got, formats.parse(record, 3))
    assert frame_like(got, 3) == record
    assert formats.frame(formats.parse(record, 3), 3) == record


def test_worked_example_in_words() -> None:
    n = engine.parse_needle(EXAMPLE, 3, 54)
    assert (n.id, n.cookie, n.size, n.flags) == (1, 0xFC0044A0, 54, 0x2E)
    assert (bytes(n.data or b""), n.name, n.mime, n.pairs) == (
        b"hello",
        b"hello.bin",
        b"text/x-demo",
        b'{"Color":"red"}',
    )
    assert (n.last_modified_s, n.append_at_ns, n.etag) == (1700000000, 1795423968205857421, "9a71bb4c")


@pytest.mark.parametrize("name", DAT_FILES)
def test_records_of_golden_files(name: str) -> None:
    directory = name.split("/", maxsplit=1)[0]
    version = RECORD_VERSIONS.get(directory, 3)
    dat = (GOLDEN / name).read_bytes()
    end = formats.SUPER_BLOCK_BYTES
    for offset, record in formats.records(dat, version):
        got = engine.parse_needle(record, version, offset=offset)
        assert_same(got, formats.parse(record, version))
        assert engine.needle_record_len(got.size, version) == len(record)
        framed = frame_like(got, version)
        if directory.startswith("own-"):  # whose writer pads as it likes
            used = formats.HEADER_BYTES + got.size + formats.tail_bytes(version)
            framed, record = framed[:used], record[:used]
        assert framed == record, f"{name} at {offset}"
        end = offset + engine.needle_record_len(got.size, version)
    assert end == len(dat) or directory.startswith("torn-")


def test_golden_files_are_there() -> None:
    assert len(DAT_FILES) > 20
    assert len(IDX_FILES) > 20


@pytest.mark.parametrize(("name", "vid"), [("own-v1", 101), ("own-v2", 102)])
def test_padding_of_old_versions_is_that_of_go(name: str, vid: int) -> None:
    """A Go server deleted one needle of these volumes: its files are the old ones and a tombstone as we frame it."""
    facts = manifest(name)
    (deleted,) = [e["request"]["target"] for e in facts["exchanges"] if e["request"]["method"] == "DELETE"]
    key_cookie = deleted.split(",")[1]
    key, cookie = int(key_cookie[:-8], 16), int(key_cookie[-8:], 16)
    version = RECORD_VERSIONS[name]
    dat = (GOLDEN / name / "data" / f"{vid}.dat").read_bytes()
    needles = [formats.parse(record, version) for _, record in formats.records(dat, version)]
    newest = [n for n in needles if n.id == key][-1]
    tombstone = engine.frame_needle(key, cookie, b"", version=version, checksum=newest.checksum)
    assert hashlib.sha256(dat + tombstone).hexdigest() == facts["files_after_go_run"][f"{vid}.dat"]["sha256"]
    row = engine.idx_pack([(key, len(dat), -1)], 4)
    idx = (GOLDEN / name / "data" / f"{vid}.idx").read_bytes()
    assert hashlib.sha256(idx + row).hexdigest() == facts["files_after_go_run"][f"{vid}.idx"]["sha256"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_record_lengths(version: int) -> None:
    sizes = [*range(-200, 200), 2**31 - 1, 2**31 - 29, -(2**31)]
    assert [engine.needle_record_len(s, version) for s in sizes] == [formats.record_len(s, version) for s in sizes]
    assert [engine.needle_record_len(s, 3) for s in (0, -1, -5, -17, -100)] == [32, 32, 24, 16, -64]


def error_of(record: bytes, version: int, expected_size: int | None = None) -> tuple[str, engine.NativeInfo]:
    with pytest.raises(engine.NativeError) as caught:
        engine.parse_needle(record, version, expected_size)
    return engine.err_name(caught.value.code), caught.value.info


def test_size_mismatch_tells_both_sizes() -> None:
    name, info = error_of(EXAMPLE, 3, 55)
    assert (name, info.b, info.c, info.d) == ("PV_ESIZE", 1, 54, 55)


@pytest.mark.parametrize("cut", [0, 15, 16, 20, 81])
def test_cut_record(cut: int) -> None:
    name, info = error_of(EXAMPLE[:cut], 3, 54)
    assert (name, info.b, info.c) == ("PV_EEOF", 16 if cut < 16 else 82, cut)


def test_padding_may_be_missing() -> None:
    assert engine.parse_needle(EXAMPLE[:82], 3, 54).name == b"hello.bin"


@pytest.mark.parametrize("version", [0, 4, 255])
def test_unknown_version(version: int) -> None:
    assert error_of(EXAMPLE, version)[0] == "PV_EVERSION"
    with pytest.raises(engine.NativeError):
        engine.frame_needle(1, 2, b"x", version=version)


def test_damaged_data_is_found_and_may_be_read_on_purpose() -> None:
    record = bytearray(EXAMPLE)
    record[20] ^= 1
    name, info = error_of(bytes(record), 3, 54)
    assert (name, info.a, info.b, info.c) == ("PV_ECRC", formats.crc32c(b"iello"), 0x9A71BB4C, 1)
    n = engine.parse_needle(record, 3, 54, check_crc=False)
    assert (bytes(n.data or b""), n.checksum) == (b"iello", 0x9A71BB4C)


def test_legacy_checksum_is_accepted_and_reported_raw() -> None:
    record = bytearray(EXAMPLE)
    struct.pack_into(">I", record, 70, formats.crc_legacy(0x9A71BB4C))
    assert engine.parse_needle(record, 3, 54).checksum == 0x9A71BB4C


def test_names_are_cut_at_255_bytes() -> None:
    record = engine.frame_needle(1, 2, b"x", flags=engine.FLAG_NAME, name=b"n" * 300)
    assert engine.parse_needle(record, 3).name == b"n" * 255
    assert record == formats.frame(formats.Needle(1, 2, b"x", flags=formats.HAS_NAME, name=b"n" * 300), 3)


# -------------------------------------------------------------------------------------------------------- super block


@pytest.mark.parametrize("name", DAT_FILES)
def test_super_blocks_of_golden_files(name: str) -> None:
    block = (GOLDEN / name).read_bytes()[:8]
    want = formats.SuperBlock.parse(block)
    got = engine.superblock_parse(block)
    assert formats.SuperBlock(*got) == want
    assert engine.superblock_put(*got) == block == want.to_bytes()


# --------------------------------------------------------------------------------------------------------- index rows


@pytest.mark.parametrize(
    ("width", "offset", "stored"),
    [
        (5, 0x123456789A8, "68acf13524"),
        (5, 0x800000010, "0000000201"),
        (4, 0x20, "00000004"),
        (4, 2**35 + 8, "00000001"),
    ],
)
def test_offsets_of_the_contract(width: int, offset: int, stored: str) -> None:
    packed = engine.idx_pack([(7, offset, -1)], width)
    assert packed == struct.pack(">Q", 7) + bytes.fromhex(stored) + b"\xff\xff\xff\xff"
    assert packed == formats.IdxRow(7, offset, -1).to_bytes(width)


@pytest.mark.parametrize("name", [*IDX_FILES, "own-5byte/data/far-offsets.idx5"])
def test_rows_of_golden_files(name: str) -> None:
    width = 5 if name.startswith("own-5byte") else 4
    raw = (GOLDEN / name).read_bytes()
    want = formats.rows_of(raw, width)
    with (GOLDEN / name).open("rb") as f:
        got = engine.idx_read(f.fileno(), width, 0, len(want) + 10)
        assert engine.idx_read(f.fileno(), width, len(want), 10) == []
    assert got == [(r.key, r.offset, r.size) for r in want]
    assert engine.idx_pack(got, width) == raw[: len(want) * (12 + width)]


@pytest.mark.parametrize("name", IDX_FILES)
def test_rows_of_golden_files_point_at_their_records(name: str) -> None:
    """Both formats together: the record at a row's offset has its key, and its size (0 for a tombstone)."""
    path = GOLDEN / name
    directory = name.split("/", maxsplit=1)[0]
    if directory in ("index-100k", "torn-dat"):
        assert not path.with_suffix(".dat").exists() or directory == "torn-dat"
        return
    dat = path.with_suffix(".dat").read_bytes()
    for row in formats.rows_of(path.read_bytes(), 5 if directory == "own-5byte" else 4):
        n = engine.parse_needle(dat[row.offset :], RECORD_VERSIONS.get(directory, 3), max(row.size, 0))
        assert n.id == row.key


def test_summary_of_a_golden_index() -> None:
    path = GOLDEN / "v3-basic" / "data" / "1.idx"
    rows = formats.rows_of(path.read_bytes(), 4)
    dat_size = path.with_suffix(".dat").stat().st_size
    with path.open("rb") as f:
        s = engine.idx_summarize(f.fileno(), 4, 3, dat_size)
    assert (s.file_bytes, s.rows, s.ragged_bytes, s.past_end, s.leading_zero_rows) == (
        len(rows) * 16,
        len(rows),
        0,
        0,
        0,
    )
    assert s.max_end == dat_size
    assert s.last == (rows[-1].key, rows[-1].offset, rows[-1].size)
    assert s.max_key == max(r.key for r in rows)


# --------------------------------------------------------------------------------------------------------- needle map


def open_index(directory: Path, idx: Path, width: int) -> engine.Volume:
    """A volume of nothing but a super block and that index."""
    dat = directory / "v.dat"
    dat.write_bytes(formats.SuperBlock().to_bytes())
    shutil.copyfile(idx, directory / "v.idx")
    return engine.Volume.open(dat, directory / "v.idx", vid=121, offset_width=width)


def test_map_of_100k_rows_is_gos(tmp_path: Path) -> None:
    facts = manifest("index-100k")
    summary = facts["map_summary"]
    with open_index(tmp_path, GOLDEN / "index-100k" / "data" / "121.idx", 4) as volume:
        live = [row for row in volume.entries() if row.size >= 0]
        assert [row.key for row in live] == sorted(row.key for row in live)
        assert len(live) == summary["live"]
        digest = hashlib.sha256(b"".join(struct.pack(">QQi", *row) for row in live)).hexdigest()
        assert digest == summary["live_sha256"]
        for key, offset, size in facts["map_sample"]:
            assert volume.lookup(key)[:2] == (offset, size)
        for key in facts["map_gone"]:
            try:
                assert volume.lookup(key).size < 0
            except engine.NativeError as e:
                assert engine.err_name(e.code) == "PV_ENOTFOUND"
        stat = volume.stat()
        assert (stat.file_bytes, stat.max_key) == (summary["put_bytes"], summary["max_key"])
        assert (stat.deleted_count, stat.deleted_bytes) == (summary["deletes"], summary["deleted_bytes"])
        go = facts["grpc"]["121"]["VolumeStatus"]
        assert (stat.file_count, stat.deleted_count) == (int(go["file_count"]), int(go["file_deleted_count"]))


@pytest.mark.parametrize("name", [*IDX_FILES, "own-5byte/data/far-offsets.idx5"])
def test_maps_of_golden_files(name: str, tmp_path: Path) -> None:
    width = 5 if name.startswith("own-5byte") else 4
    want = formats.replay(formats.rows_of((GOLDEN / name).read_bytes(), width))
    if os.path.getsize(GOLDEN / name) % (12 + width) != 0:
        with pytest.raises(engine.NativeError) as caught:
            open_index(tmp_path, GOLDEN / name, width)
        assert engine.err_name(caught.value.code) == "PV_EALIGN"
        return
    with open_index(tmp_path, GOLDEN / name, width) as volume:
        assert list(volume.entries()) == [(key, *want.entries[key]) for key in sorted(want.entries)]
        stat = volume.stat()
    assert (stat.file_count, stat.file_bytes) == (want.file_count, want.file_bytes)
    assert (stat.deleted_count, stat.deleted_bytes) == (want.deleted_count, want.deleted_bytes)
    assert (stat.max_key, stat.map_entries) == (want.max_key, len(want.entries))


def test_far_offsets_are_as_recorded(tmp_path: Path) -> None:
    recorded = manifest("own-5byte")["far_offsets"]
    with open_index(tmp_path, GOLDEN / "own-5byte" / "data" / "far-offsets.idx5", 5) as volume:
        assert [volume.lookup(key)[:2] for key, _, _ in recorded] == [(offset, size) for _, offset, size in recorded]
    assert max(offset for _, offset, _ in recorded) > 1 << 40
