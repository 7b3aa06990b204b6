"""Needle records, super blocks, index rows and the replay of an index, in plain Python.

An oracle for tests and a description of the formats; not a fallback of the product. Nothing here is fast. Written
from contract storage.md 1 to 5 and 15; imports nothing of pyvolume, so it cannot agree with the engine by accident.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

VERSIONS = (1, 2, 3)
HEADER_BYTES = 16
CHECKSUM_BYTES = 4
TIME_BYTES = 8  # version 3 only
PADDING_UNIT = 8
SUPER_BLOCK_BYTES = 8

COMPRESSED = 0x01
HAS_NAME = 0x02
HAS_MIME = 0x04
HAS_LAST_MODIFIED = 0x08
HAS_TTL = 0x10
HAS_PAIRS = 0x20
MANIFEST = 0x80


class FormatError(Exception):
    """Bytes that are no record. `kind` is one of version, eof, size, corrupt, crc; `field` the contract's number."""

    def __init__(self, kind: str, field_number: int = 0) -> None:
        super().__init__(kind, field_number)
        self.kind = kind
        self.field_number = field_number


# ----------------------------------------------------------------------------------------------------------- checksum


def crc32c(data: bytes, prev: int = 0) -> int:
    """CRC-32C, bit by bit: polynomial 0x1EDC6F41, reflected, all ones before and inverted after."""
    crc = prev ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def crc_legacy(crc: int) -> int:
    """What was stored instead before 3.09."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------------ needles


def _int32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _remainder(value: int, divisor: int) -> int:
    """Division that truncates toward zero, as Go's and C's."""
    return value % divisor if value >= 0 else -(-value % divisor)


def tail_bytes(version: int) -> int:
    return CHECKSUM_BYTES + (TIME_BYTES if version == 3 else 0)


def padding_bytes(size: int, version: int) -> int:
    """1 to 8, never 0; for negative sizes what 32-bit arithmetic gives."""
    used = _int32(HEADER_BYTES + size + tail_bytes(version))
    return PADDING_UNIT - _remainder(used, PADDING_UNIT)


def record_len(size: int, version: int) -> int:
    return HEADER_BYTES + size + tail_bytes(version) + padding_bytes(size, version)


@dataclass
class Needle:
    """One needle; what the flags do not announce is neither written nor read."""

    id: int = 0
    cookie: int = 0
    data: bytes = b""
    flags: int = 0
    name: bytes = b""
    mime: bytes = b""
    last_modified_s: int = 0
    ttl: tuple[int, int] = (0, 0)
    pairs: bytes = b""
    checksum: int | None = None  # None: that of the data
    append_at_ns: int = 0
    size: int = field(default=0, compare=False)  # header Size, set by a parse


def body(n: Needle, version: int) -> bytes:
    if version == 1:
        return n.data
    if not n.data:
        return b""
    out = struct.pack(">I", len(n.data)) + n.data + bytes([n.flags])
    if n.flags & HAS_NAME:
        name = n.name[:255]
        out += bytes([len(name)]) + name
    if n.flags & HAS_MIME:
        out += bytes([len(n.mime)]) + n.mime
    if n.flags & HAS_LAST_MODIFIED:
        out += n.last_modified_s.to_bytes(8, "big")[3:]
    if n.flags & HAS_TTL:
        out += bytes(n.ttl)
    if n.flags & HAS_PAIRS:
        out += struct.pack(">H", len(n.pairs)) + n.pairs
    return out


def padding(n: Needle, version: int) -> bytes:
    """Not zeros: what a Go server's header buffer holds behind the checksum."""
    size = len(body(n, version))
    if version == 3:
        left_over = struct.pack(">iI", size, 0)
    else:
        left_over = struct.pack(">Q", n.id)
        if version == 2 and n.data and n.flags & HAS_LAST_MODIFIED:
            left_over = struct.pack(">I", n.last_modified_s & 0xFFFFFFFF) + left_over[4:]
    return left_over[: padding_bytes(size, version)]


def frame(n: Needle, version: int) -> bytes:
    """The whole record."""
    if version not in VERSIONS:
        raise FormatError("version")
    inner = body(n, version)
    checksum = crc32c(n.data) if n.checksum is None else n.checksum
    out = struct.pack(">IQi", n.cookie, n.id, len(inner)) + inner + struct.pack(">I", checksum)
    if version == 3:
        out += struct.pack(">Q", n.append_at_ns)
    return out + padding(n, version)


class _Fields:
    """Takes the optional fields off the front of a body, blaming the one that does not fit."""

    def __init__(self, rest: bytes) -> None:
        self.rest = rest

    def take(self, length: int, number: int) -> bytes:
        if length > len(self.rest):
            raise FormatError("corrupt", number)
        out, self.rest = self.rest[:length], self.rest[length:]
        return out


def _parse_body(n: Needle, inner: bytes) -> None:
    if not inner:
        return
    fields = _Fields(inner)
    (data_size,) = struct.unpack(">I", fields.take(4, 1))
    n.data = fields.take(data_size, 1)
    # A body may end where a field would begin.
    if fields.rest:
        n.flags = fields.take(1, 0)[0]
    if fields.rest and n.flags & HAS_NAME:
        n.name = fields.take(fields.take(1, 2)[0], 2)
    if fields.rest and n.flags & HAS_MIME:
        n.mime = fields.take(fields.take(1, 3)[0], 3)
    if fields.rest and n.flags & HAS_LAST_MODIFIED:
        n.last_modified_s = int.from_bytes(fields.take(5, 4), "big")
    if fields.rest and n.flags & HAS_TTL:
        count, unit = fields.take(2, 5)
        n.ttl = (count, unit)
    if fields.rest and n.flags & HAS_PAIRS:
        (pairs_size,) = struct.unpack(">H", fields.take(2, 6))
        n.pairs = fields.take(pairs_size, 7)


def parse(record: bytes, version: int, expected_size: int | None = None, check_crc: bool = True) -> Needle:
    """One record; its padding may be missing. Raises FormatError."""
    if version not in VERSIONS:
        raise FormatError("version")
    if len(record) < HEADER_BYTES:
        raise FormatError("eof")
    cookie, key, size = struct.unpack(">IQi", record[:HEADER_BYTES])
    if expected_size is not None and size != expected_size:
        raise FormatError("size")
    if size < 0:
        raise FormatError("corrupt", 1)
    end = HEADER_BYTES + size
    if len(record) < end + tail_bytes(version):
        raise FormatError("eof")
    n = Needle(id=key, cookie=cookie, size=size)
    if version == 1:
        n.data = record[HEADER_BYTES:end]
    else:
        _parse_body(n, record[HEADER_BYTES:end])
    (n.checksum,) = struct.unpack(">I", record[end : end + 4])
    if version == 3:
        (n.append_at_ns,) = struct.unpack(">Q", record[end + 4 : end + 12])
    # Nobody writes a body without data: this is a page that was lost, or a length that was damaged.
    no_data = version != 1 and size > 4 and not n.data
    if no_data and (n.flags == 0 or (check_crc and n.checksum not in (0, crc_legacy(0)))):
        raise FormatError("corrupt", 1)
    if n.data and check_crc:
        computed = crc32c(n.data)
        if n.checksum not in (computed, crc_legacy(computed)):
            raise FormatError("crc")
        n.checksum = computed
    return n


def records(dat: bytes, version: int, offset: int = SUPER_BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """(offset, record) for each whole record of a data file."""
    while offset + HEADER_BYTES <= len(dat):
        (size,) = struct.unpack(">i", dat[offset + 12 : offset + 16])
        length = record_len(size, version)
        if length <= 0 or offset + length > len(dat):
            return
        yield offset, dat[offset : offset + length]
        offset += length


# -------------------------------------------------------------------------------------------------------- super block


@dataclass(frozen=True)
class SuperBlock:
    version: int = 3
    replica_placement: int = 0
    ttl_count: int = 0
    ttl_unit: int = 0
    compaction_revision: int = 0
    extra_size: int = 0

    def to_bytes(self) -> bytes:
        return struct.pack(">BBBBHH", *dataclasses.astuple(self))

    @classmethod
    def parse(cls, block: bytes) -> SuperBlock:
        return cls(*struct.unpack(">BBBBHH", block[:SUPER_BLOCK_BYTES]))


# --------------------------------------------------------------------------------------------------------- index rows


@dataclass(frozen=True)
class IdxRow:
    key: int
    offset: int  # bytes
    size: int

    def to_bytes(self, width: int) -> bytes:
        units8 = self.offset // 8
        low = struct.pack(">I", units8 & 0xFFFFFFFF)
        high = bytes([units8 >> 32 & 0xFF]) if width == 5 else b""  # the extra high byte comes last
        return struct.pack(">Q", self.key) + low + high + struct.pack(">i", self.size)

    @classmethod
    def parse(cls, raw: bytes, width: int) -> IdxRow:
        key, units8 = struct.unpack(">QI", raw[:12])
        if width == 5:
            units8 |= raw[12] << 32
        (size,) = struct.unpack(">i", raw[8 + width : 12 + width])
        return cls(key, units8 * 8, size)

    @property
    def is_live(self) -> bool:
        return self.offset != 0 and self.size >= 0


def rows_of(idx: bytes, width: int) -> list[IdxRow]:
    """Whole rows; a ragged tail is none."""
    length = 12 + width
    return [IdxRow.parse(idx[at : at + length], width) for at in range(0, len(idx) - length + 1, length)]


@dataclass
class Replay:
    """The map after an index was read from its beginning, with the counters of an in-memory map after a reload."""

    entries: dict[int, tuple[int, int]] = field(default_factory=dict)  # key -> (byte offset, size), < 0 if deleted
    file_count: int = 0
    file_bytes: int = 0
    deleted_count: int = 0
    deleted_bytes: int = 0
    max_key: int = 0

    def add(self, row: IdxRow) -> None:
        self.max_key = max(self.max_key, row.key)
        old_offset, old_size = self.entries.get(row.key, (0, -1))
        if row.is_live:
            self.entries[row.key] = (row.offset, row.size)
            self.file_count += 1
            self.file_bytes += row.size
            if old_offset != 0 and old_size >= 0:
                self.deleted_count += 1
                self.deleted_bytes += old_size
            return
        self.deleted_count += 1
        if row.key in self.entries and old_size >= 0:
            self.entries[row.key] = (old_offset, -old_size or -1)
            self.deleted_bytes += old_size


def replay(rows: Iterable[IdxRow]) -> Replay:
    out = Replay()
    for row in rows:
        out.add(row)
    return out
