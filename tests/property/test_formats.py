"""Properties of the formats: what is framed parses to the same, C and the plain reference agree on everything.

Also on damage: a record with flipped, cut or invented bytes must get the same verdict from both.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import formats

from pyvolume._native import engine

U64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 300), st.integers(2**64 - 300, 2**64 - 1))
U32 = st.integers(0, 2**32 - 1)
VERSIONS = st.sampled_from(formats.VERSIONS)
WIDTHS = st.sampled_from((4, 5))
KINDS = {"PV_EVERSION": "version", "PV_EEOF": "eof", "PV_ESIZE": "size", "PV_ECORRUPT": "corrupt", "PV_ECRC": "crc"}

needles = st.builds(
    formats.Needle,
    id=U64,
    cookie=U32,
    data=st.binary(max_size=400),
    flags=st.integers(0, 255),
    name=st.binary(max_size=255),
    mime=st.binary(max_size=255),
    last_modified_s=st.integers(0, 2**40 - 1),
    ttl=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    pairs=st.binary(max_size=300),
    checksum=st.one_of(st.none(), U32),
    append_at_ns=U64,
)


def frame(n: formats.Needle, version: int) -> bytes:
    return engine.frame_needle(
        n.id,
        n.cookie,
        n.data,
        version=version,
        flags=n.flags,
        name=n.name,
        mime=n.mime,
        pairs=n.pairs,
        last_modified_s=n.last_modified_s,
        ttl=n.ttl,
        append_at_ns=n.append_at_ns,
        checksum=n.checksum,
    )


Verdict: TypeAlias = tuple[str, int] | formats.Needle


def verdict_of_c(record: bytes, version: int, expected: int | None, check_crc: bool) -> Verdict:
    try:
        n = engine.parse_needle(record, version, expected, check_crc)
    except engine.NativeError as e:
        kind = KINDS[engine.err_name(e.code)]
        return kind, e.info.a if kind == "corrupt" else 0
    return formats.Needle(
        id=n.id,
        cookie=n.cookie,
        data=bytes(n.data or b""),
        flags=n.flags,
        name=n.name,
        mime=n.mime,
        last_modified_s=n.last_modified_s,
        ttl=(n.ttl_count, n.ttl_unit),
        pairs=n.pairs,
        checksum=n.checksum,
        append_at_ns=n.append_at_ns,
        size=n.size,
    )


def verdict_of_oracle(record: bytes, version: int, expected: int | None, check_crc: bool) -> Verdict:
    try:
        return formats.parse(record, version, expected, check_crc)
    except formats.FormatError as e:
        return e.kind, e.field_number


def assert_agree(record: bytes, version: int, expected: int | None = None, check_crc: bool = True) -> Verdict:
    got = verdict_of_c(record, version, expected, check_crc)
    want = verdict_of_oracle(record, version, expected, check_crc)
    assert got == want
    if isinstance(got, formats.Needle) and isinstance(want, formats.Needle):
        assert got.size == want.size
    return got


@given(st.binary(max_size=2000), U32)
def test_checksum(data: bytes, prev: int) -> None:
    assert engine.crc32c(data, prev) == formats.crc32c(data, prev)
    assert engine.crc_legacy(prev) == formats.crc_legacy(prev)


@given(st.integers(-(2**31), 2**31 - 1), VERSIONS)
def test_record_length(size: int, version: int) -> None:
    assert engine.needle_record_len(size, version) == formats.record_len(size, version)


@given(needles, VERSIONS)
def test_frames_are_equal_and_parse_back(n: formats.Needle, version: int) -> None:
    record = frame(n, version)
    assert record == formats.frame(n, version)
    got = assert_agree(record, version, check_crc=n.checksum is None)
    assert isinstance(got, formats.Needle)
    assert (got.id, got.cookie, got.data) == (n.id, n.cookie, n.data)
    if version > 1 and n.data:
        assert got.flags == n.flags
        assert got.name == (n.name if n.flags & formats.HAS_NAME else b"")
        assert got.mime == (n.mime if n.flags & formats.HAS_MIME else b"")
        assert got.pairs == (n.pairs if n.flags & formats.HAS_PAIRS else b"")
    assert frame(got, version) == record


@pytest.mark.parametrize("version", formats.VERSIONS)
@pytest.mark.parametrize("checksum", [0, formats.crc_legacy(0), 5])
def test_bodies_without_data_were_taken_by_one_and_refused_by_the_other(version: int, checksum: int) -> None:
    verdicts = set()
    for fields in (b"", b"\0", b"\0\0\0\0", b"\x01\x01a", b"\x02\0"):
        body = bytes(4) + fields
        record = struct.pack(">IQI", 1, 2, len(body)) + body + struct.pack(">I", checksum) + bytes(16)
        for check_crc in (True, False):
            verdicts.add(isinstance(assert_agree(record, version, len(body), check_crc), formats.Needle))
    assert version == 1 or verdicts == {True, False}


@given(needles, VERSIONS, st.data())
def test_damaged_records_get_the_same_verdict(n: formats.Needle, version: int, data: st.DataObject) -> None:
    record = bytearray(formats.frame(n, version))
    size = len(formats.body(n, version))
    for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(record) - 1), st.integers(1, 255)), max_size=4)):
        record[at] ^= bits
    cut = data.draw(st.one_of(st.just(len(record)), st.integers(0, len(record))))
    for check_crc in (True, False):
        assert_agree(bytes(record[:cut]), version, size, check_crc)
        assert_agree(bytes(record[:cut]), version, None, check_crc)
        assert_agree(bytes(record[:cut]), data.draw(st.integers(0, 5)), None, check_crc)


@given(st.binary(max_size=120), st.integers(-40, 120), VERSIONS)
def test_invented_bodies_get_the_same_verdict(inner: bytes, size: int, version: int) -> None:
    header = bytes(12) + size.to_bytes(4, "big", signed=True)
    assert_agree(header + inner, version, check_crc=False)
    assert_agree(inner, version)


@given(st.binary(min_size=1, max_size=30), st.integers(0, 255), st.binary(max_size=12))
def test_any_bytes_behind_the_data(payload: bytes, flags: int, fields: bytes) -> None:
    """Fields that are cut, absent or longer than the body: the number blamed is the same."""
    inner = len(payload).to_bytes(4, "big") + payload + bytes([flags]) + fields
    record = bytes(12) + len(inner).to_bytes(4, "big") + inner + formats.crc32c(payload).to_bytes(4, "big") + bytes(8)
    assert_agree(record, 3)


@given(st.binary(min_size=8, max_size=8))
def test_super_blocks(block: bytes) -> None:
    got = engine.superblock_parse(block)
    assert formats.SuperBlock(*got) == formats.SuperBlock.parse(block)
    assert engine.superblock_put(*got) == block == formats.SuperBlock(*got).to_bytes()


# --------------------------------------------------------------------------------------------------- index files, map


def rows_strategy(width: int) -> st.SearchStrategy[list[formats.IdxRow]]:
    """Rows as a log has them: few keys again and again, some odd ones, tombstones, zero offsets."""
    units8_max = 2 ** (8 * width) - 1
    keys = st.one_of(st.integers(0, 12), st.integers(1000, 1300), U64)
    units8 = st.one_of(st.just(0), st.integers(1, 2000), st.integers(0, units8_max))
    sizes = st.one_of(st.just(-1), st.just(0), st.integers(1, 5000), st.integers(-(2**31), 2**31 - 1))
    row = st.builds(lambda k, u, s: formats.IdxRow(k, u * 8, s), keys, units8, sizes)
    return st.lists(row, max_size=120)


index_files = WIDTHS.flatmap(lambda w: st.tuples(st.just(w), rows_strategy(w), st.binary(max_size=11 + w)))


@contextmanager
def file_of(content: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as f:
        f.write(content)
        f.flush()
        yield f.fileno()


@given(WIDTHS, st.binary(min_size=17, max_size=17))
def test_any_row_round_trips(width: int, raw: bytes) -> None:
    raw = raw[: 12 + width]
    row = formats.IdxRow.parse(raw, width)
    with file_of(raw) as fd:
        assert engine.idx_read(fd, width, 0, 5) == [(row.key, row.offset, row.size)]
    assert engine.idx_pack([(row.key, row.offset, row.size)], width) == raw == row.to_bytes(width)


@given(index_files, VERSIONS, st.one_of(st.integers(0, 20000), st.integers(0, 2**44)))
def test_summary_of_any_file(case: tuple[int, list[formats.IdxRow], bytes], version: int, dat_size: int) -> None:
    width, rows, ragged = case
    content = b"".join(r.to_bytes(width) for r in rows) + ragged
    with file_of(content) as fd:
        got = engine.idx_summarize(fd, width, version, dat_size)
        assert engine.idx_read(fd, width, 0, 1000) == [(r.key, r.offset, r.size) for r in rows]
    ends = [(r.offset + formats.record_len(max(r.size, 0), version), r) for r in rows if r.offset != 0]
    past = [r for end, r in ends if r.size >= 0 and end > dat_size]
    lead = 0
    while lead < len(rows) and (rows[lead].offset, rows[lead].size) == (0, -1):
        lead += 1
    assert (got.file_bytes, got.rows, got.ragged_bytes) == (len(content), len(rows), len(ragged))
    assert got.max_key == max((r.key for r in rows), default=0)
    assert got.max_end == max((end for end, _ in ends), default=0)
    assert got.max_valid_end == max((end for end, r in ends if r.size >= 0), default=0)
    assert got.leading_zero_rows == lead
    assert (got.past_end, got.first_past_end_key) == (len(past), past[0].key if past else 0)
    if rows:
        assert got.last == (rows[-1].key, rows[-1].offset, rows[-1].size)
    if ends:
        furthest = max(ends, key=lambda pair: pair[0])[1]
        assert got.furthest == (furthest.key, furthest.offset, furthest.size)


@given(index_files)
def test_map_of_any_log(case: tuple[int, list[formats.IdxRow], bytes]) -> None:
    width, rows, _ = case
    want = formats.replay(rows)
    with tempfile.TemporaryDirectory() as name:
        dat, idx = Path(name, "v.dat"), Path(name, "v.idx")
        dat.write_bytes(formats.SuperBlock().to_bytes())
        idx.write_bytes(b"".join(r.to_bytes(width) for r in rows))
        with engine.Volume.open(dat, idx, vid=1, offset_width=width) as volume:
            stat = volume.stat()
            assert list(volume.entries(batch=7)) == [(key, *want.entries[key]) for key in sorted(want.entries)]
            for key, (offset, size) in want.entries.items():
                assert volume.lookup(key)[:2] == (offset, size)
        assert os.path.getsize(idx) == len(rows) * (12 + width)
    assert (stat.file_count, stat.file_bytes) == (want.file_count, want.file_bytes)
    assert (stat.deleted_count, stat.deleted_bytes) == (want.deleted_count, want.deleted_bytes)
    assert (stat.max_key, stat.map_entries) == (want.max_key, len(want.entries))
