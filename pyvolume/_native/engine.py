"""The engine for Python: checksums, records, index rows, volume handles, scans, the registry of handles.

Thin and typed: arguments are turned into C structs, results into values of this module, codes into NativeError. No
policy, no texts for clients (pyvolume.errors.from_native makes those), no logging. Every call releases the
interpreter's lock for as long as C runs, so all of them may block on disk, and be called from any thread. Structs for
results are made anew for each call: a signal handler may call in here between a call and the reading of its result.

Buffers: data passed in is borrowed for the call. `Needle.data` of a needle read from a volume is a read-only memoryview
on memory of the engine; it stays valid as long as the view or a slice of it is alive, whatever happens to the volume.

Imports nothing of pyvolume but the compiled module.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from pyvolume import _pv
from pyvolume._native.borrow import Buffer, borrow

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib


FLAG_COMPRESSED: Final = 0x01
FLAG_NAME: Final = 0x02
FLAG_MIME: Final = 0x04
FLAG_LAST_MODIFIED: Final = 0x08
FLAG_TTL: Final = 0x10
FLAG_PAIRS: Final = 0x20
FLAG_MANIFEST: Final = 0x80

META_ONLY_ABOVE_BYTES: Final = 1 << 20  # larger needles may be read without their data
NEEDLE_HEAD_BYTES: Final = 20  # cookie, id, Size, size of the data
SUPER_BLOCK_BYTES: Final = 8

_NAME_MAX: Final = 255
_U64_MAX: Final = (1 << 64) - 1

_T_DELETES: Final = _ffi.typeof("pv_delete[]")
_T_ENTRY: Final = _ffi.typeof("pv_entry *")
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_I32: Final = _ffi.typeof("int32_t *")
_T_NEEDLE: Final = _ffi.typeof("pv_needle *")
_T_READ: Final = _ffi.typeof("pv_read *")
_T_WRITE_RES: Final = _ffi.typeof("pv_write_res *")
_T_BYTES: Final = _ffi.typeof("uint8_t[]")
_new_uninitialised: Final = _ffi.new_allocator(should_clear_after_alloc=False)

_new = _ffi.new
_buffer = _ffi.buffer
_gc = _ffi.gc
_NULL: Final = _ffi.NULL

# Structs that come in arrays are taken apart in bulk; the layouts are checked below.
_ROW: Final = struct.Struct("=QQi4x")
_HEAD: Final = struct.Struct(">IQiI")
_SCAN: Final = struct.Struct("=QQQQqIiIIiBBBx")


def _check_layout(name: str, layout: struct.Struct, fields: tuple[str, ...]) -> None:
    if _ffi.sizeof(name) != layout.size:
        raise ImportError(f"pyvolume._pv: {name} has {_ffi.sizeof(name)} bytes, not {layout.size}: rebuild it")
    found = tuple(field for field, _ in _ffi.typeof(name).fields if not field.startswith("reserved"))
    if found != fields:
        raise ImportError(f"pyvolume._pv: {name} has other fields: rebuild it")


# ------------------------------------------------------------------------------------------------------------- errors


class NativeInfo(NamedTuple):
    """pv_errinfo: what a..d mean stands at the code in csrc/pv.h."""

    code: int
    sys_errno: int
    a: int
    b: int
    c: int
    d: int


class NativeError(Exception):
    """An engine call failed. `code` is a PV_E... code (negative), `info` the details.

    `size` and `offset` tell, for a failed write, the header Size and place of the record that was tried (else 0).
    """

    def __init__(self, code: int, info: NativeInfo, *, size: int = 0, offset: int = 0) -> None:
        super().__init__(code, info)
        self.code = code
        self.info = info
        self.size = size
        self.offset = offset

    def __str__(self) -> str:
        name = err_name(self.code)
        if self.info.sys_errno:
            text = os.strerror(self.info.sys_errno)
            return f"{name}: {text} (offset {self.info.a}, {self.info.c}/{self.info.b} bytes)"
        return f"{name} (a={self.info.a} b={self.info.b} c={self.info.c} d={self.info.d})"


def err_name(code: int) -> str:
    """Name of a code, as in csrc/pv.h."""
    return str(_ffi.string(_lib.pv_err_name(code)).decode("ascii"))


def _info(code: int, err: Any) -> NativeInfo:
    return NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d)


def _error(code: int, err: Any) -> NativeError:
    return NativeError(code, _info(code, err))


def _bare_error(code: int, a: int = 0) -> NativeError:
    """For functions that give a code and no details."""
    return NativeError(code, NativeInfo(code, 0, a, 0, 0, 0))


# ----------------------------------------------------------------------------------------------------------- checksum


def crc32c(data: Buffer, prev: int = 0) -> int:
    """CRC-32C of data, continued from `prev`."""
    return int(_lib.pv_crc32c(prev, *borrow(data)))


def crc_legacy(crc: int) -> int:
    """The form in which a checksum was stored before 3.09, and in which some RPCs still give it."""
    return int(_lib.pv_crc_legacy(crc))


# ------------------------------------------------------------------------------------------------------------ needles


@dataclass(slots=True)
class Needle:
    """One needle. `data` is None with `meta_only`; name, mime and pairs are copies."""

    id: int
    cookie: int
    size: int  # header Size: body without checksum, time, padding
    data_size: int
    checksum: int  # raw CRC-32C, recomputed if the data was read; with meta_only the stored word
    flags: int
    ttl_count: int
    ttl_unit: int
    last_modified_s: int
    append_at_ns: int  # 0 in versions 1 and 2
    version: int
    name: bytes
    mime: bytes
    pairs: bytes
    data: memoryview | bytes | None
    data_offset: int = 0  # byte offset of the data in .dat
    entry_offset: int = 0  # the map entry it was found by
    entry_size: int = 0
    entry_revision: int = 0
    meta_only: bool = False
    empty: bool = False  # size 0: nothing was read, so nothing but id and entry is known

    @property
    def is_compressed(self) -> bool:
        return self.flags & FLAG_COMPRESSED != 0

    @property
    def is_manifest(self) -> bool:
        return self.flags & FLAG_MANIFEST != 0

    @property
    def has_ttl(self) -> bool:
        return self.flags & FLAG_TTL != 0

    @property
    def has_last_modified(self) -> bool:
        return self.flags & FLAG_LAST_MODIFIED != 0

    @property
    def etag(self) -> str:
        """Eight hex digits, without the quotes of the header."""
        return f"{self.checksum:08x}"


def needle_record_len(size: int, version: int) -> int:
    """Bytes on disk of a record with this header Size, padding included; odd or negative for hostile negative sizes."""
    return int(_lib.pv_needle_record_len(size, version))


def _field(pointer: Any, length: int) -> bytes:
    return bytes(_buffer(pointer, length)) if length else b""


def parse_needle(
    buf: Buffer, version: int, expected_size: int | None = None, check_crc: bool = True, offset: int = 0
) -> Needle:
    """Parses one whole record; `data` is a view into buf. Without expected_size the header's own Size is taken.

    Raises NativeError: PV_ESIZE, PV_ECORRUPT, PV_ECRC, PV_EVERSION, PV_EEOF (buf too short).
    """
    src, length = borrow(buf)
    n, err = _new(_T_NEEDLE), _new(_T_ERR)
    flags = 0 if check_crc else _lib.PV_PARSE_NO_CRC
    if expected_size is None:
        expected_size = 0
        flags |= _lib.PV_PARSE_ANY_SIZE
    code = _lib.pv_needle_parse(src, length, version, expected_size, offset, flags, n, err)
    if code < 0:
        raise _error(code, err)
    begin = int(n.data - src) if n.data else 0
    return Needle(
        n.id,
        n.cookie,
        n.size,
        n.data_size,
        n.checksum,
        n.flags,
        n.ttl_count,
        n.ttl_unit,
        n.last_modified_s,
        n.append_at_ns,
        n.version,
        _field(n.name, n.name_size),
        _field(n.mime, n.mime_size),
        _field(n.pairs, n.pairs_size),
        memoryview(buf).cast("B")[begin : begin + n.data_size],
        data_offset=offset + begin,
        empty=n.size == 0,
    )


def parse_needle_meta(head: Buffer, tail: Buffer, version: int, offset: int = 0) -> Needle:
    """A needle without its data (`meta_only`), of the first 20 bytes of its record and of what follows the data.

    `checksum` is the stored word. Raises NativeError: PV_ECORRUPT, PV_EVERSION, PV_EEOF; ValueError for a short head.
    """
    if len(head) < NEEDLE_HEAD_BYTES:
        raise ValueError(f"the head of a record has {NEEDLE_HEAD_BYTES} bytes, not {len(head)}")
    rest, rest_len = borrow(tail)
    n, err = _new(_T_NEEDLE), _new(_T_ERR)
    cookie, key, size, data_size = _HEAD.unpack_from(head)
    n.cookie, n.id, n.size, n.data_size = cookie, key, size, data_size
    code = _lib.pv_needle_parse_tail(rest, rest_len, version, n, err)
    if code < 0:
        raise _error(code, err)
    return Needle(
        key,
        cookie,
        size,
        data_size,
        n.checksum,
        n.flags,
        n.ttl_count,
        n.ttl_unit,
        n.last_modified_s,
        n.append_at_ns,
        n.version,
        _field(n.name, n.name_size),
        _field(n.mime, n.mime_size),
        _field(n.pairs, n.pairs_size),
        None,
        data_offset=offset + NEEDLE_HEAD_BYTES,
        meta_only=True,
    )


def _fill_needle(
    n: Any,
    key: int,
    cookie: int,
    data: Buffer,
    flags: int,
    name: Buffer,
    mime: Buffer,
    pairs: Buffer,
    last_modified_s: int,
    ttl: tuple[int, int],
) -> tuple[Any, ...]:
    """Fills a pv_needle; what is returned must live as long as it. A name above 255 bytes is cut, as upstream."""
    n.id = key
    n.cookie = cookie
    n.flags = flags
    n.last_modified_s = last_modified_s
    n.ttl_count, n.ttl_unit = ttl
    keep = name_c = mime_c = pairs_c = None
    if data:
        keep, n.data_size = borrow(data)
        n.data = keep
    if name:
        name_c, length = borrow(name)
        n.name = name_c
        n.name_size = min(length, _NAME_MAX)
    if mime:
        mime_c, n.mime_size = borrow(mime)
        n.mime = mime_c
    if pairs:
        pairs_c, n.pairs_size = borrow(pairs)
        n.pairs = pairs_c
    return keep, name_c, mime_c, pairs_c


def frame_needle(
    key: int,
    cookie: int,
    data: Buffer,
    *,
    version: int = 3,
    flags: int = 0,
    name: Buffer = b"",
    mime: Buffer = b"",
    pairs: Buffer = b"",
    last_modified_s: int = 0,
    ttl: tuple[int, int] = (0, 0),
    append_at_ns: int = 0,
    checksum: int | None = None,
) -> bytes:
    """A whole record as it would be written, padding included. `checksum` None: that of the data."""
    n, err = _new(_T_NEEDLE), _new(_T_ERR)
    keep = _fill_needle(n, key, cookie, data, flags, name, mime, pairs, last_modified_s, ttl)
    n.append_at_ns = append_at_ns
    n.checksum = crc32c(data) if checksum is None else checksum
    head, tail = _new("uint8_t[20]"), _new(f"uint8_t[{_lib.PV_NEEDLE_TAIL_MAX}]")
    head_len, tail_len, size = _new("size_t *"), _new("size_t *"), _new(_T_I32)
    code = _lib.pv_needle_frame(n, version, head, head_len, tail, len(tail), tail_len, size, err)
    del keep
    if code < 0:
        raise _error(code, err)
    return b"".join((_buffer(head, head_len[0]), data, _buffer(tail, tail_len[0])))


# -------------------------------------------------------------------------------------------------------- super block


class SuperBlockFields(NamedTuple):
    """The first eight bytes of a .dat."""

    version: int
    replica_placement: int
    ttl_count: int
    ttl_unit: int
    compaction_revision: int
    extra_size: int


def _super_block(sb: Any) -> SuperBlockFields:
    return SuperBlockFields(
        sb.version, sb.replica_placement, sb.ttl_count, sb.ttl_unit, sb.compaction_revision, sb.extra_size
    )


def superblock_parse(block: Buffer) -> SuperBlockFields:
    """Takes eight bytes apart; any values pass. ValueError if there are fewer."""
    src, length = borrow(block)
    if length < SUPER_BLOCK_BYTES:
        raise ValueError(f"a super block has {SUPER_BLOCK_BYTES} bytes, not {length}")
    sb = _new("pv_superblock *")
    _lib.pv_superblock_parse(src, sb)
    return _super_block(sb)


def superblock_put(
    version: int,
    replica_placement: int = 0,
    ttl_count: int = 0,
    ttl_unit: int = 0,
    compaction_revision: int = 0,
    extra_size: int = 0,
) -> bytes:
    """The eight bytes of these values; OverflowError if one does not fit."""
    fields = (version, replica_placement, ttl_count, ttl_unit, compaction_revision, extra_size)
    sb, out = _new("pv_superblock *", fields), _new("uint8_t[8]")
    _lib.pv_superblock_put(sb, out)
    return bytes(_buffer(out))


# --------------------------------------------------------------------------------------------------------- index rows


class IdxRow(NamedTuple):
    """A row of an .idx, or a map entry. Offset in bytes; size -1 (or less, in a map) says deleted."""

    key: int
    offset: int
    size: int


_check_layout("pv_idx_row", _ROW, IdxRow._fields)


@dataclass(frozen=True, slots=True)
class IdxSummary:
    """What one pass over an .idx tells; see pv_idx_summary in csrc/pv.h."""

    file_bytes: int
    rows: int
    ragged_bytes: int
    max_key: int
    max_end: int
    last: IdxRow
    furthest: IdxRow
    leading_zero_rows: int
    past_end: int
    first_past_end_key: int
    max_valid_end: int
    blank_rows: int
    first_blank_row: int


def _rows(rows: Any, count: int) -> list[IdxRow]:
    return [IdxRow._make(fields) for fields in _ROW.iter_unpack(_buffer(rows, count * _ROW.size))]


def idx_summarize(fd: int, width: int, version: int, dat_size: int) -> IdxSummary:
    """Reads a whole .idx; `dat_size` is what rows are held against. Raises NativeError."""
    out, err = _new("pv_idx_summary *"), _new(_T_ERR)
    code = _lib.pv_idx_summarize(fd, width, version, dat_size, out, err)
    if code < 0:
        raise _error(code, err)
    last, furthest = out.last, out.furthest
    return IdxSummary(
        out.file_bytes,
        out.rows,
        out.ragged_bytes,
        out.max_key,
        out.max_end,
        IdxRow(last.key, last.offset, last.size),
        IdxRow(furthest.key, furthest.offset, furthest.size),
        out.leading_zero_rows,
        out.past_end,
        out.first_past_end_key,
        out.max_valid_end,
        out.blank_rows,
        out.first_blank_row,
    )


def idx_read(fd: int, width: int, first_row: int, max_rows: int) -> list[IdxRow]:
    """Up to max_rows rows from row number first_row on; empty at the end. A ragged tail is not a row."""
    rows, err = _new("pv_idx_row[]", max_rows), _new(_T_ERR)
    count = _lib.pv_idx_read(fd, width, first_row, rows, max_rows, err)
    if count < 0:
        raise _error(count, err)
    return _rows(rows, count)


def idx_pack(rows: Iterable[tuple[int, int, int]], width: int) -> bytes:
    """The bytes of rows (key, offset in bytes, size) as they stand in an .idx."""
    row, length = _new("pv_idx_row *"), 12 + width
    out = _new(_T_BYTES, length)
    packed = bytearray()
    for row.key, row.offset, row.size in rows:
        _lib.pv_idx_row_put(row, width, out)
        packed += _buffer(out)
    return bytes(packed)


class TailVerdict(enum.IntEnum):
    """What the check of a volume's last record found (contract storage.md 11)."""

    OK = 0
    IDX_RAGGED = 1  # info.a = length
    DAT_LONGER = 2  # info.a = actual (rounded up to 8), info.b = expected bytes
    DAT_SHORTER = 3  # info.a = wanted end, info.b = actual bytes
    BAD_RECORD = 4  # info.code tells


def check_tail(dat_fd: int, idx_fd: int, width: int, version: int) -> tuple[TailVerdict, NativeInfo, int]:
    """(verdict, details, append time of the last record or 0). Raises NativeError if the disk fails."""
    when, err = _new("uint64_t *"), _new(_T_ERR)
    code = _lib.pv_vol_check_tail(dat_fd, idx_fd, width, version, when, err)
    if code < 0:
        raise _error(code, err)
    return TailVerdict(code), _info(err.code, err), when[0]


# --------------------------------------------------------------------------------------------------------------- scan


class ScanRec(NamedTuple):
    """One record met by a scan. What stands in the body is 0 unless bodies were checked."""

    offset: int
    id: int
    append_at_ns: int
    last_modified_s: int
    record_len: int
    cookie: int
    size: int
    data_size: int
    checksum: int
    status: int  # 0, or the PV_E... code of this record's body
    flags: int
    ttl_count: int
    ttl_unit: int

    @property
    def end(self) -> int:
        return self.offset + self.record_len


_check_layout("pv_scan_rec", _SCAN, ScanRec._fields)


_WALK_RECORDS: Final = 1 << 18


def dat_scan(
    fd: int, version: int, offset: int, end_offset: int = 0, check_body: bool = False, max_records: int = 1024
) -> tuple[list[ScanRec], int]:
    """(records from `offset` on, where to go on). No records: a clean end, less than a header is left there.

    end_offset 0: to the end of the file. A last record that lacks only padding counts, the next offset is then behind
    the end of the file. Raises NativeError at a record that is cut off (PV_EEOF), at a header from which no next record
    can be found (PV_ECORRUPT), or if the disk fails: only when no record comes before that.
    """
    where, recs, err = _new("uint64_t *", offset), _new("pv_scan_rec[]", max_records), _new(_T_ERR)
    count = _lib.pv_dat_scan(fd, version, where, end_offset or _U64_MAX, check_body, recs, max_records, err)
    if count < 0:
        raise _error(count, err)
    return [ScanRec._make(fields) for fields in _SCAN.iter_unpack(_buffer(recs, count * _SCAN.size))], where[0]


def dat_walk(fd: int, version: int, offset: int, end_offset: int, check_body: bool) -> int:
    """Goes over records from `offset` on and gives the place behind the last: `end_offset` if they end just there.

    Raises NativeError at the first that is not whole, or with check_body is damaged, or if the disk fails.
    """
    where, err = _new("uint64_t *", offset), _new(_T_ERR)
    while where[0] < end_offset:  # by the piece, so that a signal is heard
        count = _lib.pv_dat_walk(fd, version, where, end_offset, check_body, _WALK_RECORDS, err)
        if count < 0:
            raise _error(count, err)
        if count == 0:
            break
    return int(where[0])


# ------------------------------------------------------------------------------------------------------ volume handle


class OpenFlag(enum.IntFlag):
    """How a volume is opened."""

    CREATE = 1  # create .dat (truncating) and .idx, write the super block given
    DAT_READONLY = 2
    IDX_READONLY = 4
    NO_MAP = 8  # the map lives in Python: read, write and delete are given the entry
    NO_WRITE = 16  # start with writes refused
    NO_DELETE = 32  # start with deletes refused, too
    SORTED_MAP = 64  # the map is the sorted file given: for volumes that take no writes
    REMOTE = 128  # there is no .dat here: look-ups and deletes only
    FLUSH_FAILED = 256  # a flush of this .dat failed before: what the page cache shows need not be on disk


class Entry(NamedTuple):
    """Where a key's record is. `size` < 0: deleted. `revision`: the compaction the offset belongs to."""

    offset: int
    size: int
    revision: int


class WriteResult(NamedTuple):
    """What a write or delete did."""

    offset: int  # of the record
    append_at_ns: int
    size: int  # header Size
    checksum: int
    cookie: int  # as written: given, or adopted from the record before
    unchanged: bool  # nothing was written: the same is there already


@dataclass(frozen=True, slots=True)
class VolumeStat:
    """All figures of a handle at one moment. Those of the map are 0 with OpenFlag.NO_MAP."""

    dat_bytes: int
    idx_bytes: int
    file_count: int
    file_bytes: int
    deleted_count: int
    deleted_bytes: int
    max_key: int
    map_entries: int
    map_bytes: int
    last_append_at_ns: int
    last_modified_s: int
    last_write_wall_s: int
    eio_count: int
    flush_count: int
    flushed_records: int
    vid: int
    compaction_revision: int
    version: int
    offset_width: int
    no_write: bool
    no_delete: bool
    closed: bool
    flush_failed: bool
    """Whether a flush of .dat failed, once: OpenFlag.FLUSH_FAILED when the files are opened anew."""


_STAT: Final = struct.Struct("=15QIHBB????4x")
_check_layout("pv_vol_stats", _STAT, tuple(VolumeStat.__slots__))


def _c_path(path: str | os.PathLike[str]) -> Any:
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    return _new("char[]", raw)


def _c_entry(entry: Entry | None) -> Any:
    return _NULL if entry is None else _new(_T_ENTRY, entry)


class DeleteBatch:
    """File ids to be deleted, in order, and what came of each (contract grpc.md 5, BatchDelete)."""

    __slots__ = ("_text", "count", "flags", "items")

    def __init__(self, fids: Sequence[str], *, skip_cookie: bool) -> None:
        """Reads the ids. None counts as plain if one has a newline in it."""
        self._text = "\n".join(fids).encode("utf-8", "surrogatepass")
        self.count = len(fids)
        self.flags = int(skip_cookie)
        self.items = _new(_T_DELETES, self.count)
        if _lib.pv_delete_parse(self._text, len(self._text), self.flags, self.items, self.count) != self.count:
            self.items = _new(_T_DELETES, self.count)

    def vid(self, at: int) -> int | None:
        """The volume of a plain id; None of any other, which is not for `Volume.delete_many`."""
        item = self.items[at]
        return item.vid if item.ok else None

    def answer(self, at: int, count: int) -> bytes:
        """The results of items that `Volume.delete_many` has dealt with, as a BatchDeleteResponse."""
        first, last = self.items[at], self.items[at + count - 1]
        buf = bytearray(last.at + last.len - first.at + 32 * count)
        done = _lib.pv_delete_answer(self._text, self.items + at, count, *borrow(buf, writable=True))
        if done < 0:
            raise _bare_error(done)
        return bytes(memoryview(buf)[:done])


class Volume:
    """A volume open in the engine. Usable from any number of threads; see csrc/pv.h for the exact promises.

    Closing waits for running calls; calls after it raise NativeError PV_ECLOSED (stat and superblock still answer).
    A handle that is dropped without close() is closed when its last reference goes, the registry's included.
    """

    __slots__ = ("_v", "vid")

    def __init__(self, handle: Any, vid: int) -> None:
        self._v = handle
        self.vid = vid

    @classmethod
    def open(
        cls,
        dat_path: str | os.PathLike[str],
        idx_path: str | os.PathLike[str],
        *,
        vid: int,
        flags: int = 0,
        offset_width: int = 4,
        version: int = 0,
        has_ttl: bool = False,
        superblock: SuperBlockFields | Buffer | None = None,
        preallocate_bytes: int = 0,
        max_volume_bytes: int = 0,
        last_append_at_ns: int = 0,
        sdx_path: str | os.PathLike[str] | None = None,
        remote_bytes: int = 0,
    ) -> Self:
        """Opens or creates (OpenFlag.CREATE with `superblock`) both files and loads the map.

        With OpenFlag.REMOTE only the index is opened; `superblock` and `remote_bytes` say what the data is.

        `version` 0: the super block's. NativeError: PV_ESYS (info.d: 0 .dat, 1 .idx, 2 sdx_path), PV_EEOF (no whole
        super block), PV_EVERSION, PV_EALIGN (ragged .idx), PV_ENOMEM, PV_EINVAL.
        """
        opts, out, err = _new("pv_vol_opts *"), _new("pv_vol **"), _new(_T_ERR)
        opts.dat_path = dat_c = _c_path(dat_path)
        opts.idx_path = idx_c = _c_path(idx_path)
        opts.vid = vid
        opts.flags = flags
        opts.offset_width = offset_width
        opts.version = version
        opts.has_ttl = has_ttl
        opts.preallocate_bytes = preallocate_bytes
        opts.max_volume_bytes = max_volume_bytes
        opts.last_append_at_ns = last_append_at_ns
        opts.remote_bytes = remote_bytes
        if superblock is not None:
            opts.superblock = superblock if isinstance(superblock, tuple) else superblock_parse(superblock)
        sdx_c = None
        if sdx_path is not None:
            opts.sdx_path = sdx_c = _c_path(sdx_path)
        code = _lib.pv_vol_open(opts, out, err)
        del dat_c, idx_c, sdx_c
        if code < 0:
            raise _error(code, err)
        return cls(_gc(out[0], _lib.pv_vol_unref), vid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<engine.Volume {self.vid}>"

    @property
    def handle(self) -> Any:
        """The `pv_vol *`, for the registry and the lane. Borrowed: it lives as long as this object."""
        return self._v

    def close(self) -> None:
        """Waits for running calls, syncs .idx, then .dat, closes. Idempotent. Closed also if a failed sync raises."""
        err = _new(_T_ERR)
        code = _lib.pv_vol_close(self._v, err)
        if code < 0:
            raise _error(code, err)

    def read(
        self, key: int, *, read_deleted: bool = False, meta_ok: bool = False, entry: Entry | None = None
    ) -> Needle:
        """Reads a needle, checks its CRC. The cookie is the caller's business; an empty needle has none.

        read_deleted: also one whose deletion the map remembers. meta_ok: one above 1 MiB may come without its data
        (`meta_only`; pread gives it). entry: instead of the map's.
        NativeError: PV_ENOTFOUND, PV_EDELETED, PV_ESIZE, PV_ECORRUPT, PV_ECRC, PV_EEOF, PV_ESYS, PV_ECLOSED, PV_EMETA,
        PV_ENOMEM, PV_ESTALE.
        """
        out, err = _new(_T_READ), _new(_T_ERR)
        flags = read_deleted | meta_ok << 1
        if entry is None:
            code = _lib.pv_vol_read(self._v, key, flags, _NULL, out, err)
        else:
            code = _lib.pv_vol_read(self._v, key, flags | 4, _c_entry(entry), out, err)
        if code < 0:
            raise _error(code, err)
        n, found = out.n, out.entry
        data: memoryview | bytes | None
        if out.buf:
            data_size = n.data_size
            owner = _gc(out.buf, _lib.pv_buf_free, out.buf_len)
            data = None
            if n.data:
                begin = n.data - owner
                data = memoryview(_buffer(owner, out.buf_len))[begin : begin + data_size].toreadonly()
        else:
            data = b""
        name_size, mime_size, pairs_size = n.name_size, n.mime_size, n.pairs_size
        return Needle(
            n.id,
            n.cookie,
            n.size,
            n.data_size,
            n.checksum,
            n.flags,
            n.ttl_count,
            n.ttl_unit,
            n.last_modified_s,
            n.append_at_ns,
            n.version,
            bytes(_buffer(n.name, name_size)) if name_size else b"",
            bytes(_buffer(n.mime, mime_size)) if mime_size else b"",
            bytes(_buffer(n.pairs, pairs_size)) if pairs_size else b"",
            data,
            out.data_offset,
            found.offset,
            found.size,
            found.revision,
            out.meta_only != 0,
            out.empty != 0,
        )

    def pread(self, offset: int, length: int, revision: int) -> memoryview:
        """Exactly `length` bytes of .dat. NativeError: PV_EEOF, PV_ESTALE (compacted since `revision`), PV_ESYS."""
        buf, err = _new_uninitialised(_T_BYTES, length), _new(_T_ERR)
        code = _lib.pv_vol_pread(self._v, offset, buf, length, revision, err)
        if code < 0:
            raise _error(code, err)
        return memoryview(_buffer(buf))

    def pread_into(self, offset: int, buf: bytearray | memoryview, revision: int) -> None:
        """Fills all of buf from .dat; errors as pread."""
        err = _new(_T_ERR)
        code = _lib.pv_vol_pread(self._v, offset, *borrow(buf, writable=True), revision, err)
        if code < 0:
            raise _error(code, err)

    def lookup(self, key: int) -> Entry:
        """The map's entry. NativeError: PV_ENOTFOUND, PV_ECLOSED, PV_EINVAL (no map)."""
        out = _new(_T_ENTRY)
        code = _lib.pv_vol_lookup(self._v, key, out)
        if code < 0:
            raise _bare_error(code)
        return Entry(out.offset, out.size, out.revision)

    def visit(self, from_key: int, max_rows: int) -> list[IdxRow]:
        """Up to max_rows map entries with keys >= from_key, ascending, deleted ones included (size < 0)."""
        rows = _new("pv_idx_row[]", max_rows)
        count = _lib.pv_vol_visit(self._v, from_key, rows, max_rows)
        if count < 0:
            raise _bare_error(count)
        return _rows(rows, count)

    def entries(self, batch: int = 4096) -> Iterator[IdxRow]:
        """All map entries, ascending, taken in batches: what changes meanwhile may or may not be seen."""
        key = 0
        while rows := self.visit(key, batch):
            yield from rows
            if rows[-1].key == _U64_MAX:
                return
            key = rows[-1].key + 1

    def write(
        self,
        key: int,
        cookie: int,
        data: Buffer,
        *,
        flags: int = 0,
        name: Buffer = b"",
        mime: Buffer = b"",
        pairs: Buffer = b"",
        last_modified_s: int = 0,
        ttl: tuple[int, int] = (0, 0),
        check_cookie: bool = True,
        fsync: bool = False,
        entry: Entry | None = None,
    ) -> WriteResult:
        """Appends a needle and publishes it; with fsync it is on disk before anyone sees it and before this returns.

        check_cookie False: cookie 0 takes over the stored one. entry: with OpenFlag.NO_MAP, what the map says (None:
        the key is not there). A failed append leaves nothing behind and the volume writable. NativeError: PV_EREADONLY,
        PV_ECLOSED, PV_ECOOKIE, PV_EFULL, PV_ESYS, PV_EEOF, PV_EINVAL, PV_ENOMEM, PV_ESTALE: details in csrc/pv.h.
        """
        n, out, err = _new(_T_NEEDLE), _new(_T_WRITE_RES), _new(_T_ERR)
        keep = _fill_needle(n, key, cookie, data, flags, name, mime, pairs, last_modified_s, ttl)
        if entry is None:
            code = _lib.pv_vol_write(self._v, n, check_cookie | fsync << 1, _NULL, out, err)
        else:
            code = _lib.pv_vol_write(self._v, n, check_cookie | fsync << 1 | 4, _c_entry(entry), out, err)
        del keep
        if code < 0:
            raise NativeError(code, _info(code, err), size=out.size, offset=out.offset)
        return WriteResult(out.offset, out.append_at_ns, out.size, out.checksum, out.cookie, out.unchanged != 0)

    def delete(
        self, key: int, cookie: int, checksum: int = 0, *, fsync: bool = False, entry: Entry | None = None
    ) -> tuple[int, WriteResult | None]:
        """Appends a tombstone for a live key: (its old header Size, result), or (-1, None) if nothing was live."""
        deleted, out, err = _new(_T_I32), _new(_T_WRITE_RES), _new(_T_ERR)
        flags = fsync << 1 | (entry is not None) << 2
        code = _lib.pv_vol_delete(self._v, key, cookie, checksum, flags, _c_entry(entry), deleted, out, err)
        if code < 0:
            raise NativeError(code, _info(code, err), size=out.size, offset=out.offset)
        size = deleted[0]
        if size < 0:
            return -1, None
        return size, WriteResult(out.offset, out.append_at_ns, out.size, out.checksum, out.cookie, False)

    def delete_many(self, batch: DeleteBatch, at: int) -> int:
        """Deletes the first part of the batch's items from `at` on, at most some hundreds: how many were dealt with.

        0: item `at` is to be taken by itself, whatever the reason (csrc/pv.h); negative: it is likely that so are the
        next ones. What was dealt with is in `answer`.
        """
        return _lib.pv_vol_delete_many(self._v, batch.items + at, batch.count - at, batch.flags, _NULL)

    def write_blob(
        self, key: int, size: int, blob: Buffer, *, fsync: bool = False, entry: Entry | None = None
    ) -> WriteResult:
        """Appends a ready record under `key`, with a new append time; blob itself is not changed.

        NativeError: those of write without the cookie, PV_ESIZE (info.a: 0 too short for a header, 1 another Size in
        its header, 2 size negative), PV_EBUFFER (info.a needed, info.b given bytes).
        """
        src, length = borrow(blob)
        out, err = _new(_T_WRITE_RES), _new(_T_ERR)
        flags = fsync << 1 | (entry is not None) << 2
        code = _lib.pv_vol_write_blob(self._v, key, size, src, length, flags, _c_entry(entry), out, err)
        if code < 0:
            raise NativeError(code, _info(code, err), size=out.size, offset=out.offset)
        return WriteResult(out.offset, out.append_at_ns, out.size, out.checksum, out.cookie, out.unchanged != 0)

    def stat(self) -> VolumeStat:
        """Never waits for an append or a flush; answers for a closed handle, too."""
        out = _new("pv_vol_stats *")
        _lib.pv_vol_stat(self._v, out)
        return VolumeStat(*_STAT.unpack(_buffer(out)))

    def superblock(self) -> SuperBlockFields:
        out = _new("pv_superblock *")
        _lib.pv_vol_superblock(self._v, out)
        return _super_block(out)

    @property
    def superblock_bytes(self) -> int:
        """Where the first record is: the super block's length with its extra area (version 1 has none)."""
        block = self.superblock()
        return SUPER_BLOCK_BYTES + (block.extra_size if block.version > 1 else 0)

    def set_readonly(self, no_write: bool, no_delete: bool) -> None:
        """Switches writes and deletes off or on; waits for appends and flushes under way.

        NativeError: PV_EREADONLY (the files were opened read-only), PV_ESYS (bytes of a failed append still cannot be
        cut off), PV_ECLOSED.
        """
        code = _lib.pv_vol_set_readonly(self._v, no_write, no_delete)
        if code < 0:
            raise _bare_error(code)

    def sync(self) -> None:
        """Flushes .dat, then .idx. NativeError: PV_ESYS (info.d: 0 .dat, 1 .idx), PV_ECLOSED."""
        err = _new(_T_ERR)
        code = _lib.pv_vol_sync(self._v, err)
        if code < 0:
            raise _error(code, err)


class Registry:
    """vid -> handle, for lanes that must not ask Python. Only the store edits it. Holds references of its own."""

    __slots__ = ("_r",)

    def __init__(self) -> None:
        out = _new("pv_reg **")
        code = _lib.pv_reg_new(out)
        if code < 0:
            raise _bare_error(code)
        self._r = _gc(out[0], _lib.pv_reg_free)

    @property
    def handle(self) -> Any:
        """The `pv_reg *`, for the lane. Borrowed: it lives as long as this object."""
        return self._r

    def publish(self, vid: int, volume: Volume, *, copies: int = 0, ttl: tuple[int, int] = (0, 0)) -> None:
        """NativeError PV_EEXISTS if the vid is taken.

        copies: how many there are to be (0: nobody knows); with one the lane may write on its own. ttl: count and unit
        for needles that have none.
        """
        flags = _lib.PV_REG_SINGLE if copies == 1 else 0
        flags |= (min(copies, 255) or 255) << _lib.PV_REG_COPIES_SHIFT
        flags |= ttl[0] << _lib.PV_REG_TTL_COUNT_SHIFT | ttl[1] << _lib.PV_REG_TTL_UNIT_SHIFT
        code = _lib.pv_reg_publish_as(self._r, vid, volume.handle, flags)
        if code < 0:
            raise _bare_error(code, vid)

    def publish_shards(self, vid: int, shards: Any) -> None:
        """The same for what is here of an erasure coded volume, an `ec.Shards`."""
        code = _lib.pv_reg_publish_shards(self._r, vid, shards.handle)
        if code < 0:
            raise _bare_error(code, vid)

    def withdraw(self, vid: int) -> None:
        """NativeError PV_ENOTFOUND if the vid is not there. Calls that run on the handle go on."""
        code = _lib.pv_reg_withdraw(self._r, vid)
        if code < 0:
            raise _bare_error(code, vid)

    def acquire(self, vid: int) -> Volume | None:
        """The handle published under vid, with a reference of its own, or None."""
        v = _lib.pv_reg_acquire(self._r, vid)
        return Volume(_gc(v, _lib.pv_vol_unref), vid) if v else None

    def count(self) -> int:
        return int(_lib.pv_reg_count(self._r))
