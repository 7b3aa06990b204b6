"""Repairs of a volume's files at load, before it is opened: index rows that are missing, bytes that are half a record.

May import superblock, vif, files, _native and the leaves; nothing here may run on a volume that is open. Departures L1,
L3, L4 and the head repair of upstream (`weed/storage/volume_idx_repair.go`). Every function blocks on disk and raises
OSError or NativeError when the disk fails: then nothing was cut and no row was invented. What was done is returned; the
caller logs it.

A record with Size 0 is an empty file or a delete, and the `.dat` does not always say which. The mark of a vacuum's
catch-up (cookie 0x12345678) is a delete, and so is one with a checksum, which is that of what was deleted. Else it is
taken for a delete when its key is live at that place (departure V4 decides likewise), or when what it deletes may have
been lost with a damaged record before it; otherwise for an empty file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Final, Protocol

from pyvolume._native import engine
from pyvolume._native.outside import LiveIndex
from pyvolume.errors import NativeCode, StorageError
from pyvolume.faults import fault
from pyvolume.storage import files, vif
from pyvolume.storage.superblock import CURRENT_VERSION, SuperBlock
from pyvolume.types import MAX_VOLUME_BYTES, OFFSET_WIDTHS

_BATCH: Final = 16384
"""Rows or records handled by one call of the engine."""
_SAMPLE_ROWS: Final = 32
_KNOWN_ROWS: Final = 1 << 20
_ALL_ROWS: Final = (1 << 64) - 1
_COPY_BYTES: Final = 4 << 20
_HEADER_BYTES: Final = 16
_CHECKSUM_BYTES: Final = 4
_TIME_BYTES: Final = 8
"""Parts of a record around its body; padding follows."""
_HEADER: Final = struct.Struct(">IQiI")
_TIME: Final = struct.Struct(">Q")
_PAGE_BYTES: Final = 4096
"""What a file system writes at a time: of what was written last any of these may be missing after a power cut."""
_TORN_PAGES: Final = 256
"""Ends of pages that are looked at, from the end of the index on: 60,000 rows."""
_SETTLED_NS: Final = 120 * 10**9
"""A row so much older than a later one was on the disk: what is dirty for 30 s is written."""
_TIME_MIN_NS: Final = 1 << 59
_TIME_MAX_NS: Final = 1 << 62
"""1988 and 2116: no record was or will be appended before and behind them."""
_VACUUM_TOMBSTONE_COOKIE: Final = 0x12345678
_EMPTY_CHECKSUMS: Final = (0, engine.crc_legacy(0))
"""Of no data, as written now and in old releases."""
_END_OF_RECORDS: Final = (NativeCode.EEOF, NativeCode.ECORRUPT)


# ------------------------------------------------------------------------------------------------------- offset width


def width_of(vif_path: str, dat_fd: int, idx_fd: int | None, block: SuperBlock, default_width: int) -> int:
    """The volume's own offset width: what the .vif says, else what the rows prove, else the server's default.

    Raises StorageError if the .vif names a width that does not exist.
    """
    return resolve_width(vif.load(vif_path).info.bytes_offset, vif_path, dat_fd, idx_fd, block, default_width)


def resolve_width(
    bytes_offset: int, vif_path: str, dat_fd: int, idx_fd: int | None, block: SuperBlock, default_width: int
) -> int:
    """As width_of, with the .vif read already."""
    if bytes_offset in OFFSET_WIDTHS:
        return bytes_offset
    if bytes_offset != 0:
        raise StorageError(
            f"BytesOffset mismatch in volume info file {vif_path}, {bytes_offset} bytes: this server knows 4 and 5"
        )
    if idx_fd is None or os.fstat(idx_fd).st_size == 0:
        return default_width
    for width in (default_width, *(width for width in OFFSET_WIDTHS if width != default_width)):
        if _rows_fit(dat_fd, idx_fd, width, block):
            return width
    return default_width


def _rows_fit(dat_fd: int, idx_fd: int, width: int, block: SuperBlock) -> bool:
    """Whether most of the first and last rows, read with this width, point at headers with their key and size."""
    rows = os.fstat(idx_fd).st_size // (12 + width)
    sample = engine.idx_read(idx_fd, width, 0, _SAMPLE_ROWS)
    if rows > _SAMPLE_ROWS:
        sample += engine.idx_read(idx_fd, width, rows - _SAMPLE_ROWS, _SAMPLE_ROWS)
    sample = [row for row in sample if row.offset != 0]
    matching = 0
    for row in sample:
        record = record_at(dat_fd, block.version, row.offset) if row.offset >= block.block_bytes else None
        matching += record is not None and record.id == row.key and record.size == max(row.size, 0)
    return matching * 2 > len(sample)


def record_at(dat_fd: int, version: int, offset: int, *, check_body: bool = False) -> engine.ScanRec | None:
    """The record that begins at an offset; None if there is no whole one."""
    try:
        records, _ = engine.dat_scan(dat_fd, version, offset, 0, check_body, 1)
    except engine.NativeError as exc:
        if exc.code in _END_OF_RECORDS:
            return None
        raise
    return records[0] if records else None


def rows_of(idx_fd: int, width: int, first: int = 0) -> Iterator[engine.IdxRow]:
    """All whole rows of an index file, from one on."""
    while rows := engine.idx_read(idx_fd, width, first, _BATCH):
        yield from rows
        first += len(rows)


# --------------------------------------------------------------------------------------- records without a row (L1, L3)


class RepairRefused(StorageError):
    """The files are in a state that a repair could make worse: they stay as they are."""


@dataclass(slots=True)
class Repair:
    """What was done to a volume's files."""

    start: int
    """Byte offset of the first record looked at."""
    end: int = 0
    """Where the last good record ends: the length of .dat afterwards, padding aside."""
    indexed: int = 0
    deletes: int = 0
    """How many of the rows that were added are deletes."""
    bad_records: int = 0
    """Records between good ones whose body is damaged: left where they are, without a row."""
    first_bad_offset: int = 0
    torn_bytes: int = 0
    torn_path: str = ""

    def describe(self, dat_path: str, idx_path: str) -> str:
        """One line for the log."""
        text = f"indexed {self.indexed} records ({self.deletes} deletes) of {dat_path} in [{self.start}, {self.end}) "
        text += f"that {idx_path} lacked"
        if self.bad_records:
            text += f"; {self.bad_records} damaged records in between got no row, the first at {self.first_bad_offset}"
        if self.torn_bytes:
            text += f"; cut off {self.torn_bytes} bytes of a torn record at {self.end}, saved in {self.torn_path}"
        return text


@dataclass
class _Found:
    """Rows for the records met by a scan, in order, in compact columns."""

    end: int
    keys: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("i"))
    empty: dict[int, bool] = field(default_factory=dict)
    """Row number -> whether it is surely a delete, for the records with Size 0."""
    bad: int = 0
    first_bad_offset: int = 0

    def pack(self, width: int) -> bytes:
        rows = zip(self.keys, self.offsets, self.sizes, strict=True)
        return b"".join(engine.idx_pack(batch, width) for batch in _batches(rows))


def _batches(rows: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _is_good(record: engine.ScanRec, version: int) -> bool:
    """A whole, undamaged record; zeros that a crash left where data was to be are none.

    One without data has no checksum: behind a hole, half a header and what follows can look like it, so its id and time
    must be possible ones.
    """
    if record.status != 0 or record.size < 0 or record.offset % 8:
        return False
    if record.size == 0:
        if version == CURRENT_VERSION:
            return record.id != 0 and _TIME_MIN_NS <= record.append_at_ns < _TIME_MAX_NS
        return bool(record.id)
    return version != CURRENT_VERSION or record.append_at_ns != 0 or record.data_size > 0


@dataclass
class _Known:
    """Rows that may tell where records are, by offset."""

    rows: list[engine.IdxRow]

    @classmethod
    def behind(cls, idx_fd: int, width: int, first_row: int) -> _Known:
        """Those from a row on; none if they are too many to be held."""
        if os.fstat(idx_fd).st_size // (12 + width) - first_row > _KNOWN_ROWS:
            return cls([])
        rows = [row for row in rows_of(idx_fd, width, first_row) if row.offset]
        rows.sort(key=_offset_of)
        return cls(rows)

    def next_record(self, dat_fd: int, version: int, behind: int, end: int) -> int | None:
        """Offset of the first record behind a place, and before another, that is whole and what its row says."""
        for row in islice(self.rows, bisect_right(self.rows, behind, key=_offset_of), None):
            if row.offset >= end:
                return None
            record = record_at(dat_fd, version, row.offset, check_body=True)
            fits = record is not None and (record.id, record.size) == (row.key, max(row.size, 0))
            if record is not None and fits and _is_good(record, version):
                return record.offset
        return None

    def says_deleted(self, record: engine.ScanRec) -> bool:
        """Whether a row says that this record is a delete."""
        at = bisect_left(self.rows, record.offset, key=_offset_of)
        row = self.rows[at] if at < len(self.rows) else None
        return row is not None and (row.offset, row.key) == (record.offset, record.id) and row.size < 0


def _offset_of(row: engine.IdxRow) -> int:
    return row.offset


def _scan(
    dat_fd: int,
    version: int,
    start: int,
    end: int,
    *,
    behind_damage_delete: bool = False,
    known: _Known | None = None,
) -> _Found:
    """Reads and checks all records from start on. Ends at the first place from which no next record can be found.

    `known` rows lead over places where that is so, and over damage whose length is not to be trusted.
    """
    found = _Found(end=start)
    known = known if known is not None else _Known([])
    bad = first_bad = 0
    offset = start
    while offset < end:
        try:
            records, after = engine.dat_scan(dat_fd, version, offset, end, True, _BATCH)
        except engine.NativeError as exc:
            if exc.code not in _END_OF_RECORDS:
                raise
            next_offset = known.next_record(dat_fd, version, offset, end)
            if next_offset is None:
                break
            first_bad = first_bad or offset
            bad += 1
            offset = next_offset
            continue
        if not records:
            break
        offset = after
        for record in records:
            if record.status in (NativeCode.ESYS, NativeCode.ENOMEM):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if not _is_good(record, version):
                first_bad = first_bad or record.offset
                bad += 1
                next_offset = known.next_record(dat_fd, version, record.offset, min(record.end, end))
                if next_offset is not None:
                    offset = next_offset
                    break
                continue
            if record.size == 0:
                found.empty[len(found.keys)] = (
                    record.cookie == _VACUUM_TOMBSTONE_COOKIE
                    or record.checksum not in _EMPTY_CHECKSUMS
                    or known.says_deleted(record)
                    or (behind_damage_delete and bad + found.bad > 0)
                )
            found.keys.append(record.id)
            found.offsets.append(record.offset)
            found.sizes.append(record.size)
            found.end = record.end
            if bad:
                found.first_bad_offset = found.first_bad_offset or first_bad
                found.bad += bad
                bad = first_bad = 0
    return found


def _settle_empty_records(found: _Found, idx_fd: int | None, width: int) -> int:
    """Decides for every record with Size 0 whether it is a delete (row size -1); returns how many are."""
    if not found.empty:
        return 0
    wanted = {found.keys[row] for row in found.empty}
    live: dict[int, bool] = {}
    if idx_fd is not None:
        for known in rows_of(idx_fd, width):
            if known.key in wanted:
                live[known.key] = known.offset != 0 and known.size >= 0
    deletes = 0
    for row, key in enumerate(found.keys):
        if key not in wanted:
            continue
        surely_deleted = found.empty.get(row)
        if surely_deleted is None:
            live[key] = True
        elif live.get(key, False) or surely_deleted:
            found.sizes[row] = -1
            live[key] = False
            deletes += 1
        else:
            live[key] = True
    return deletes


def chain_reaches(dat_fd: int, block: SuperBlock, target: int, *, check_body: bool = False) -> bool:
    """Whether records of this version, one behind the other from the super block on, end exactly at target.

    With check_body none of them may be damaged. Raises NativeError if the disk fails.
    """
    try:
        return engine.dat_walk(dat_fd, block.version, block.block_bytes, target, check_body) == target
    except engine.NativeError as exc:
        if exc.code in (NativeCode.ESYS, NativeCode.ENOMEM):
            raise
        return False


def save_torn(dat_path: str, base_path: str, start: int, end: int) -> str:
    """Copies [start, end) of a data file to a new file `<base>.torn-<start>`, durable before this returns; its path."""
    with files.opened(dat_path) as dat_fd:
        return _save_torn(dat_fd, base_path, start, end)


def _save_torn(dat_fd: int, base_path: str, start: int, end: int) -> str:
    """Copies [start, end) of .dat to a new file `<base>.torn-<start>`, durable before this returns; its path."""
    path = f"{base_path}.torn-{start}"
    for attempt in count(1):
        try:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            break
        except FileExistsError:
            path = f"{base_path}.torn-{start}.{attempt}"
    try:
        try:
            fault("repair.save_torn")
            at = start
            while at < end:
                piece = os.pread(dat_fd, min(_COPY_BYTES, end - at), at)
                if not piece:
                    break
                files.write_all(target, piece)
                at += len(piece)
            os.fsync(target)
        finally:
            os.close(target)
        files.sync_dir(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return path


def _cut_torn(dat_fd: int, base_path: str, repair: Repair, size: int) -> None:
    """Saves and cuts what is behind the last good record; puts back what is missing of that one's padding."""
    if repair.end >= size:
        if repair.end > size:
            os.ftruncate(dat_fd, repair.end)
            os.fsync(dat_fd)
        return
    repair.torn_path = _save_torn(dat_fd, base_path, repair.end, size)
    repair.torn_bytes = size - repair.end
    fault("repair.truncate")
    os.ftruncate(dat_fd, repair.end)
    os.fsync(dat_fd)


def index_tail(
    dat_path: str,
    idx_path: str,
    base_path: str,
    *,
    width: int,
    block: SuperBlock,
    furthest: engine.IdxRow | None,
    known: _Known | None = None,
) -> Repair:
    """Appends rows for the whole records behind the last indexed one and cuts off a torn one at the end (L3).

    `furthest` is the row whose record ends last, None for an empty index; `known` as in _scan. Order: the torn bytes
    are saved, then cut, then rows are appended, each step synced: a crash in between is repaired by the next load.
    Raises
    RepairRefused when the last indexed record is not what its row says, or the records are of another version than the
    super block. Failpoints: repair.save_torn, repair.truncate, repair.append_rows.
    """
    with files.opened(dat_path, os.O_RDWR) as dat_fd, files.opened(idx_path, os.O_RDWR) as idx_fd:
        size = os.fstat(dat_fd).st_size
        start = block.block_bytes
        if furthest is not None:
            last = record_at(dat_fd, block.version, furthest.offset, check_body=True)
            if last is None or last.id != furthest.key or last.status != 0 or last.size != max(furthest.size, 0):
                raise RepairRefused(f"the last indexed record, at {furthest.offset}, is damaged")
            start = last.end
        if block.version != CURRENT_VERSION and not chain_reaches(dat_fd, block, start):
            raise RepairRefused(f"the records are not those of version {block.version}")
        found = _scan(dat_fd, block.version, start, size, behind_damage_delete=True, known=known)
        if found.end > MAX_VOLUME_BYTES[width]:
            raise RepairRefused(f"the data ends behind {MAX_VOLUME_BYTES[width]}, where {width} byte offsets end")
        repair = Repair(start, found.end, len(found.keys), _settle_empty_records(found, idx_fd, width))
        repair.bad_records, repair.first_bad_offset = found.bad, found.first_bad_offset
        _cut_torn(dat_fd, base_path, repair, size)
        if found.keys:
            fault("repair.append_rows")
            os.lseek(idx_fd, 0, os.SEEK_END)
            files.write_all(idx_fd, found.pack(width))
            os.fsync(idx_fd)
        return repair


def restore_padding(dat_path: str, size: int, last: engine.IdxRow, version: int) -> bool:
    """Puts back what is missing of the zeros behind the last record, which `last` names; false if more is missing.

    The engine begins the next record at a multiple of 8 in any case; but reads, and the check of a tombstone at the
    end, want all of the last one to be there.
    """
    body_end = last.offset + _HEADER_BYTES + max(last.size, 0) + _CHECKSUM_BYTES
    body_end += _TIME_BYTES if version == CURRENT_VERSION else 0
    end = last.offset + engine.needle_record_len(max(last.size, 0), version)
    if not body_end <= size < end:
        return False
    with files.opened(dat_path, os.O_RDWR) as dat_fd:
        os.ftruncate(dat_fd, end)
        os.fsync(dat_fd)
    return True


def torn_row(dat_fd: int, idx_fd: int, *, width: int, block: SuperBlock, end_row: int) -> int | None:
    """Number of the first row before `end_row`, of those written last, of which a power cut left only a part, or None.

    `end_row` is the first row of zeros, or the number of rows. Rows of 17 bytes lie across the ends of pages, of which
    one may be on the disk and the other not; of any row half may be left where a write broke off. What is missing is
    zeros: half a row can say that a key is deleted, empty, or another one. Reads records of the last two minutes of
    writing only, a few hundred at most: where the page cache is cold each costs a move of the disk's head.
    """
    row_bytes = 12 + width
    found, newest_ns = None, 0
    if end_row > 0 and _lacks_end(dat_fd, idx_fd, width, block.version, end_row - 1):
        found = end_row - 1
    if _PAGE_BYTES % row_bytes == 0:
        return found
    last_page = end_row * row_bytes // _PAGE_BYTES
    for page in range(last_page, max(0, last_page - _TORN_PAGES), -1):
        number, kept_before = divmod(page * _PAGE_BYTES, row_bytes)
        if not kept_before or number >= end_row:
            continue
        if _lacks_begin(dat_fd, idx_fd, width, number, kept_before):
            found = number
            continue
        append_ns = _append_ns(dat_fd, idx_fd, width, block.version, number)
        newest_ns = max(newest_ns, append_ns)
        if append_ns and newest_ns - append_ns > _SETTLED_NS:
            break
    return found


def _append_ns(dat_fd: int, idx_fd: int, width: int, version: int, number: int) -> int:
    """When the record of a row was appended; 0 if that is not known, or it is not what the row says."""
    row = _row_at(idx_fd, width, number)
    header = _header_at(dat_fd, row.offset) if row is not None and row.offset and version == CURRENT_VERSION else None
    if row is None or header is None or header[1:3] != (row.key, max(row.size, 0)):
        return 0
    raw = os.pread(dat_fd, _TIME.size, row.offset + _HEADER.size + header[2])
    return int(_TIME.unpack(raw)[0]) if len(raw) == _TIME.size else 0


def _row_at(idx_fd: int, width: int, number: int) -> engine.IdxRow | None:
    rows = engine.idx_read(idx_fd, width, number, 1)
    return rows[0] if rows else None


def _header_at(dat_fd: int, offset: int) -> tuple[int, int, int, int] | None:
    """(cookie, id, size, what follows: the checksum of a record without data); None behind the end of the file."""
    raw = os.pread(dat_fd, _HEADER.size, offset)
    return _HEADER.unpack(raw) if len(raw) == _HEADER.size else None


def _lacks_end(dat_fd: int, idx_fd: int, width: int, version: int, number: int) -> bool:
    """Whether the last bytes of a row are missing. It is the last one, or zeros follow."""
    row = _row_at(idx_fd, width, number)
    if row is None:
        return False
    if row.offset == 0:  # a delete in a remote store has -1; old releases wrote 0, but not in this version
        return version == CURRENT_VERSION and row.size != -1
    begin, end = number * (12 + width), (number + 1) * (12 + width) - 1
    if row.size < 0 or begin // _PAGE_BYTES == end // _PAGE_BYTES:
        return False
    header = _header_at(dat_fd, row.offset)
    if header is None:
        return False  # data that is missing is another trouble
    _, key, size, checksum = header
    if size != row.size:
        return True
    return size == 0 and (key != row.key or checksum not in _EMPTY_CHECKSUMS)


def _lacks_begin(dat_fd: int, idx_fd: int, width: int, number: int, missing: int) -> bool:
    """Whether the first bytes of a row, those before the end of a page, are missing."""
    row = _row_at(idx_fd, width, number)
    if row is None or row.key >> max(0, 64 - 8 * missing):
        return False
    if row.offset == 0:
        return row.key == 0 and row.size != 0
    header = _header_at(dat_fd, row.offset)
    if header is None:
        return False
    _, key, size, _ = header
    fits = size == max(row.size, 0)
    if missing > 8:  # of the offset, too
        return not (fits and key == row.key)
    return fits and key != row.key and key & ((1 << (64 - 8 * missing)) - 1) == row.key


def drop_rows_behind_hole(
    dat_path: str, idx_path: str, base_path: str, *, width: int, block: SuperBlock, first_blank: int
) -> Repair:
    """Takes an index with rows of zeros, or half a row, back to what stands before the first, and indexes the data
    behind that anew.

    A power cut can lose a page in the middle of what was written last. Rows behind the hole hide that records with rows
    in it are missing; without them index_tail finds all. They lead it over holes in the data. The old index is kept as
    `<idx>.torn-<offset>`, the new one comes in place by rename. Raises RepairRefused as index_tail does: then nothing
    was changed. Failpoints: those of index_tail, index.rename.
    """
    keep_bytes = first_blank * (12 + width)
    temporary = idx_path + ".tmp"
    try:
        with (
            files.opened(idx_path) as idx_fd,
            files.opened(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as new_fd,
        ):
            at = 0
            while at < keep_bytes:
                piece = os.pread(idx_fd, min(_COPY_BYTES, keep_bytes - at), at)
                if not piece:
                    raise OSError(errno.EIO, "the index became shorter", idx_path)
                files.write_all(new_fd, piece)
                at += len(piece)
            os.fsync(new_fd)
            summary = engine.idx_summarize(new_fd, width, block.version, os.stat(dat_path).st_size)
            known = _Known.behind(idx_fd, width, first_blank)
        furthest = summary.furthest if summary.max_end else None
        repair = index_tail(dat_path, temporary, base_path, width=width, block=block, furthest=furthest, known=known)
        kept = f"{idx_path}.torn-{keep_bytes}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(kept)
        os.link(idx_path, kept)
        fault("index.rename")
        os.rename(temporary, idx_path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    files.sync_dir(os.path.dirname(idx_path))
    return repair


def rebuild_index(dat_path: str, idx_path: str, base_path: str, *, width: int, block: SuperBlock) -> Repair:
    """Makes a missing index from the data (L1); a torn record at the end is cut off as in index_tail.

    Raises RepairRefused when no record can be read at all, or when those of another version fit better. Failpoints:
    repair.save_torn, repair.truncate, index.write, index.rename.
    """
    with files.opened(dat_path, os.O_RDWR) as dat_fd:
        size = os.fstat(dat_fd).st_size
        start = block.block_bytes
        found = _scan(dat_fd, block.version, start, size)
        if not found.keys:
            raise RepairRefused("not one record in it can be read")
        if found.end < size and block.version != CURRENT_VERSION:
            newest = _scan(dat_fd, CURRENT_VERSION, start, size)
            if newest.end > found.end:
                raise RepairRefused(f"its records are of version {CURRENT_VERSION}, not {block.version}")
        if found.end > MAX_VOLUME_BYTES[width]:
            raise RepairRefused(f"the data ends behind {MAX_VOLUME_BYTES[width]}, where {width} byte offsets end")
        repair = Repair(start, found.end, len(found.keys), _settle_empty_records(found, None, width))
        repair.bad_records, repair.first_bad_offset = found.bad, found.first_bad_offset
        _cut_torn(dat_fd, base_path, repair, size)
        files.replace_file(idx_path, found.pack(width), point="index")
        return repair


def drop_ragged_tail(idx_path: str, width: int) -> int:
    """Cuts bytes behind the last whole row off an index (L4); returns how many."""
    with files.opened(idx_path, os.O_RDWR) as idx_fd:
        size = os.fstat(idx_fd).st_size
        ragged = size % (12 + width)
        if ragged:
            os.ftruncate(idx_fd, size - ragged)
            os.fsync(idx_fd)
        return ragged


# -------------------------------------------------------------------------------------------------------- head repair


def recover_head(dat_fd: int, idx_path: str, *, width: int, block: SuperBlock, overwritten: int) -> int:
    """Restores rows that deletes on a tiered volume of an older release wrote over; returns how many.

    `overwritten` is the number of rows at the head with offset 0 and size -1. The first that many records of .dat are
    those the rows were for. The index is rewritten whole, by rename. Failpoints: index.write, index.rename.
    """
    return restore_head(_first_records(dat_fd, block, overwritten), idx_path, width=width)


def _first_records(dat_fd: int, block: SuperBlock, count: int) -> Iterator[engine.ScanRec]:
    offset, left = block.block_bytes, count
    while left > 0:
        try:
            records, offset = engine.dat_scan(dat_fd, block.version, offset, 0, False, min(left, _BATCH))
        except engine.NativeError as exc:
            if exc.code in _END_OF_RECORDS:
                return
            raise
        if not records:
            return
        yield from records
        left -= len(records)


def _whole(fd: int, path: str) -> bytes:
    """A file's content; one call gives 2 GiB of it at most. Raises OSError."""
    pieces, at, end = [], 0, os.fstat(fd).st_size
    while at < end:
        piece = os.pread(fd, min(_COPY_BYTES, end - at), at)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter", path)
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


class RecordPlace(Protocol):
    """What restore_head needs of a record."""

    @property
    def offset(self) -> int: ...
    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...


def restore_head(records: Iterable[RecordPlace], idx_path: str, *, width: int) -> int:
    """As recover_head, of the first records of the data, in their order. Failpoints: index.write, index.rename."""
    lost: dict[int, tuple[int, int]] = {}
    for record in records:
        if record.size > 0:
            lost[record.id] = (record.offset, record.size)
        else:
            lost.pop(record.id, None)
    with files.opened(idx_path) as idx_fd:
        for row in rows_of(idx_fd, width):
            lost.pop(row.key, None)
            if not lost:
                return 0
        rows = [(key, where, size) for key, (where, size) in lost.items()]
        head = b"".join(engine.idx_pack(batch, width) for batch in _batches(rows))
        old = _whole(idx_fd, idx_path)
    files.replace_file(idx_path, head + old, point="index")
    return len(lost)


# ---------------------------------------------------------------------------------------------------------- comparing


def same_live_needles(first_idx_fd: int, second_idx_fd: int, width: int) -> bool:
    """Whether two indexes have the same live keys with the same sizes. Raises NativeError if the disk fails."""
    first = LiveIndex(first_idx_fd, width, _ALL_ROWS)
    try:
        second = LiveIndex(second_idx_fd, width, _ALL_ROWS)
        try:
            return first.is_same(second)
        finally:
            second.close()
    finally:
        first.close()
