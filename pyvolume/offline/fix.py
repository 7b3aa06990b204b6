"""Rebuild indexes from the data: every record found, newest last, deletes still deleted, empty files still alive.

The old index is kept as `.idx.bak-<time>`; a torn record at the end of the data is saved as `.torn-<offset>` before it
is cut off. An index that says the same already is left alone.

What only the old index knows is carried over: which records without data are deletes and which are empty files; keys
whose delete has been lost with the end of the data; the rows of records that are there but damaged, so that a reader
gets an error and not an older version. May import common, storage, _native and the leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import heapq
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from pyvolume._native import engine
from pyvolume.errors import NativeCode
from pyvolume.offline import fix_ec
from pyvolume.offline.common import (
    CannotRun,
    Finding,
    Job,
    Layout,
    Progress,
    VolumeFiles,
    add_common_arguments,
    explained,
    for_each_volume,
    keep_and_replace,
    layout_of,
    plural,
)
from pyvolume.offline.ec_volumes import ec_ids
from pyvolume.storage import files, index_files
from pyvolume.storage.superblock import CURRENT_VERSION
from pyvolume.types import MAX_VOLUME_BYTES

_BATCH: Final = 16384
_COPY_BYTES: Final = 4 << 20
_VACUUM_TOMBSTONE_COOKIE: Final = 0x12345678
_SEARCH_BYTES: Final = 1 << 20
_FIELDS_MAX: Final = 66_000
"""More than name, type, pairs and times of a record can take."""
_HEADER: Final = struct.Struct(">iI")  # Size, DataSize: bytes 12 to 20 of a record
_SHOWN: Final = 100
"""Damaged records that are told one by one."""
_KEYS_SHOWN: Final = 5
_END_OF_RECORDS: Final = (NativeCode.EEOF, NativeCode.ECORRUPT)
_REPLICA: Final = "copy the volume from a replica if there is one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, changes=True)


def run(job: Job) -> None:
    changed = 0
    for volume in for_each_volume(job, will_write=not job.args.dry_run, elsewhere=ec_ids(job)):
        facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": volume.idx}
        with explained(job, volume):
            facts |= fix_volume(job, volume)
        changed += bool(facts.get("changed"))
        job.report(**facts)
    changed += fix_ec.run(job)
    would = "would be rebuilt" if job.args.dry_run else "rebuilt"
    job.say(f"{plural(len(job.volumes), 'volume')} looked at, {plural(changed, 'index').replace('xs', 'xes')} {would}")


# ------------------------------------------------------------------------------------------------------ what is there


@dataclass
class _Found:
    """What a data file holds, in the order of offsets."""

    end: int
    """Where the last good record ends."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("i"))
    empty: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset -> (key, cookie) of the records without data: deletes, or empty files."""
    damaged: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Offset -> (key, Size, end) of records that can be told apart but not read."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) between good records in which no record could be told apart."""
    kept: list[tuple[int, int, int]] = field(default_factory=list)
    """(offset, key, Size) of rows of the old index for records that are damaged or in a gap."""
    last_append_ns: int = 0

    @property
    def rows(self) -> int:
        return len(self.keys) + len(self.kept)


def _scan(dat_fd: int, version: int, found: _Found, size: int, progress: Progress) -> int:
    """Takes up records from found.end on until there is none; returns where that is."""
    at = found.end
    while at < size:
        try:
            records, after = engine.dat_scan(dat_fd, version, at, size, True, _BATCH)
        except engine.NativeError as exc:
            if exc.code in _END_OF_RECORDS:
                return at
            raise
        if not records:
            return at
        for record in records:
            if record.status in (NativeCode.ESYS, NativeCode.ENOMEM):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if record.status != 0 or record.size < 0:
                found.damaged[record.offset] = (record.id, record.size, record.end)
            elif record.size > 0 or _is_somebody(record, version):
                found.last_append_ns = max(found.last_append_ns, record.append_at_ns)
                if record.size == 0:
                    found.empty[record.offset] = (record.id, record.cookie)
                found.keys.append(record.id)
                found.offsets.append(record.offset)
                found.sizes.append(record.size)
                found.end = record.end
        at = after
        progress.to(at)
    return at


def _is_somebody(record: engine.ScanRec, version: int) -> bool:
    """Whether a record without data is one: zeros that a crash left behind look like one, too."""
    return record.append_at_ns != 0 if version == CURRENT_VERSION else bool(record.id or record.cookie)


def _scan_all(volume: VolumeFiles, layout: Layout, dat_fd: int, idx_fd: int | None, progress: Progress) -> _Found:
    """All records, also those behind a place where the chain is broken."""
    version, size = layout.block.version, layout.dat_bytes
    found = _Found(layout.block.block_bytes)
    stopped = _scan(dat_fd, version, found, size, progress)
    if stopped < size and version != CURRENT_VERSION:
        newest = _Found(layout.block.block_bytes)
        _scan(dat_fd, CURRENT_VERSION, newest, size, progress)
        if newest.end > found.end:
            raise CannotRun(
                f"{volume.dat}: offset {found.end}: the records are of version {CURRENT_VERSION}, the super block says "
                f"{version}; {_REPLICA}"
            )
    while stopped < size:
        going_on = _next_record(dat_fd, layout, idx_fd, stopped, found.last_append_ns, progress)
        if going_on is None:
            break
        found.gaps.append((stopped, going_on))
        found.end = going_on
        stopped = _scan(dat_fd, version, found, size, progress)
    return found


def _next_record(
    dat_fd: int, layout: Layout, idx_fd: int | None, broken: int, after_ns: int, progress: Progress
) -> int | None:
    """Offset of the first good record behind a place where the chain is broken: by the index, else by searching."""
    limit, first = layout.dat_bytes, None
    if idx_fd is not None:
        rows = (row for row in index_files.rows_of(idx_fd, layout.width) if broken < row.offset < limit)
        for offset, key in sorted({(row.offset, row.key) for row in rows}):
            record = _good_at(dat_fd, layout.block.version, offset)
            if record is not None and record.id == key:
                limit, first = offset, offset
                break
    if layout.block.version != CURRENT_VERSION or (first is None and _is_torn(dat_fd, broken)):
        return first
    searched = _search(dat_fd, layout, broken + 8, limit, after_ns, progress)
    return first if searched is None else searched


def _good_at(dat_fd: int, version: int, offset: int) -> engine.ScanRec | None:
    record = index_files.record_at(dat_fd, version, offset, check_body=True)
    return record if record is not None and record.status == 0 and record.size > 0 else None


def _is_torn(dat_fd: int, offset: int) -> bool:
    """Whether a sound header stands here, so that only the end of its record is missing: nothing can follow it."""
    head = os.pread(dat_fd, 20, offset)
    if len(head) < 20:
        return True
    size, data_size = _HEADER.unpack_from(head, 12)
    return bool(5 <= size - data_size <= _FIELDS_MAX)


def _search(dat_fd: int, layout: Layout, start: int, limit: int, after_ns: int, progress: Progress) -> int | None:
    """Offset of the first record in [start, limit) that was appended after after_ns.

    By its time a record is told from the copy of one that stands in somebody's data: that one is older.
    """
    for block_at in range(start, limit, _SEARCH_BYTES):
        block = os.pread(dat_fd, _SEARCH_BYTES + 16, block_at)
        for at in range(0, min(_SEARCH_BYTES, len(block) - 20, limit - block_at), 8):
            size, data_size = _HEADER.unpack_from(block, at + 12)
            if 5 <= size - data_size <= _FIELDS_MAX:
                record = _good_at(dat_fd, layout.block.version, block_at + at)
                if record is not None and record.append_at_ns > after_ns:
                    return block_at + at
        progress.to(block_at)
    return None


# ------------------------------------------------------------------------------------------------------- the new index


@dataclass(slots=True)
class _Comparison:
    """How the map that a new index gives differs from that of the old one."""

    same: bool = True
    live: int = 0
    recovered: int = 0
    """Keys whose newest write or delete the old index did not have."""
    lost: list[int] = field(default_factory=list)
    lost_count: int = 0
    older: list[int] = field(default_factory=list)
    older_count: int = 0
    deletes: list[int] = field(default_factory=list)
    """Keys to be deleted once more: their delete is not in the data."""


def _settle(found: _Found, idx_fd: int | None, width: int) -> dict[int, int]:
    """Sizes of the rows for records without data, by offset; puts into found.kept the rows that only the index knows.

    For a record without data the old index's row counts. Else: live before, or marked by a vacuum: a delete; not live:
    an empty file (as a load decides).
    """
    sizes: dict[int, int] = {}
    kept: dict[int, tuple[int, int]] = {}
    ends = [found.end]
    if idx_fd is not None and (found.empty or found.damaged or found.gaps):
        for row in index_files.rows_of(idx_fd, width):
            empty, damaged = found.empty.get(row.offset), found.damaged.get(row.offset)
            if empty is not None and empty[0] == row.key and row.size in (0, -1):
                sizes[row.offset] = row.size
            elif damaged is not None and damaged[0] == row.key and max(row.size, 0) == damaged[1]:
                kept[row.offset] = (row.key, row.size)
                ends.append(damaged[2])
            elif any(start <= row.offset < end for start, end in found.gaps):
                kept[row.offset] = (row.key, row.size)
    found.kept = sorted((offset, key, size) for offset, (key, size) in kept.items())
    found.end = max(ends)
    found.damaged = {offset: seen for offset, seen in found.damaged.items() if seen[2] <= found.end}
    unknown = {key for offset, (key, _) in found.empty.items() if offset not in sizes}
    live: dict[int, bool] = {}
    for key, offset, size in zip(found.keys, found.offsets, found.sizes, strict=True):
        if key not in unknown:
            continue
        if size == 0:
            if offset not in sizes:
                is_delete = live.get(key, False) or found.empty[offset][1] == _VACUUM_TOMBSTONE_COOKIE
                sizes[offset] = -1 if is_delete else 0
            live[key] = sizes[offset] == 0
        else:
            live[key] = True
    return sizes


def _rows(found: _Found, sizes: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """(key, offset, size) of the new index, by offset."""
    scanned = (
        (offset, key, sizes.get(offset, size) if size == 0 else size)
        for offset, key, size in zip(found.offsets, found.keys, found.sizes, strict=True)
    )
    for offset, key, size in heapq.merge(scanned, found.kept):
        yield key, offset, size


def _write_rows(path: str, found: _Found, sizes: dict[int, int], width: int) -> None:
    with open(path, "wb") as out:
        batch: list[tuple[int, int, int]] = []
        for row in _rows(found, sizes):
            batch.append(row)
            if len(batch) == _BATCH:
                out.write(engine.idx_pack(batch, width))
                batch.clear()
        out.write(engine.idx_pack(batch, width))
        out.flush()
        os.fsync(out.fileno())


def _compare(volume: VolumeFiles, layout: Layout, old_idx: str, new_idx: str, known_end: int) -> _Comparison:
    """Merges the two maps, both in the order of keys. known_end: records from there on are news to the old index."""
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    result = _Comparison()
    with (
        engine.Volume.open(volume.dat, old_idx, vid=volume.vid, flags=flags, offset_width=layout.width) as old_map,
        engine.Volume.open(volume.dat, new_idx, vid=volume.vid, flags=flags, offset_width=layout.width) as new_map,
    ):
        old_rows, new_rows = old_map.entries(_BATCH), new_map.entries(_BATCH)
        old, new = next(old_rows, None), next(new_rows, None)
        while old is not None or new is not None:
            key = min(row.key for row in (old, new) if row is not None)
            before = old if old is not None and old.key == key else None
            after = new if new is not None and new.key == key else None
            _compare_key(key, before, after, known_end, result)
            old = next(old_rows, None) if before is not None else old
            new = next(new_rows, None) if after is not None else new
    return result


def _compare_key(
    key: int, old: engine.IdxRow | None, new: engine.IdxRow | None, known_end: int, result: _Comparison
) -> None:
    was_live, is_live = old is not None and old.size >= 0, new is not None and new.size >= 0
    if is_live and not was_live and new is not None and old is not None and new.offset < known_end:
        result.deletes.append(key)
        is_live = False
    result.live += is_live
    if not was_live and not is_live:
        return
    if was_live and is_live and old is not None and new is not None:
        if (old.offset, old.size) == (new.offset, new.size):
            return
        if new.offset < old.offset:
            result.older_count += 1
            result.older += [key] * (len(result.older) < _KEYS_SHOWN)
        else:
            result.recovered += 1
    elif is_live or (new is not None and old is not None and new.offset >= old.offset):
        result.recovered += 1  # written, or deleted (the map keeps the offset of what was), since
    else:
        result.lost_count += 1
        result.lost += [key] * (len(result.lost) < _KEYS_SHOWN)
    result.same = False


# -------------------------------------------------------------------------------------------------------- one volume


def fix_volume(job: Job, volume: VolumeFiles) -> dict[str, object]:
    """Rebuilds one index if that is needed; says what it did. Raises CannotRun, OSError, StorageError, NativeError."""
    if not files.exists(volume.dat):
        raise CannotRun(f"{volume.dat} does not exist, so {volume.idx} cannot be rebuilt; {_REPLICA}")
    layout = layout_of(volume, job.args.offset_bytes)
    dry = bool(job.args.dry_run)
    with contextlib.ExitStack() as stack:
        _refuse_unfinished(volume)
        dat_fd = stack.enter_context(files.opened(volume.dat))
        idx_fd = stack.enter_context(files.opened(volume.idx)) if files.exists(volume.idx) else None
        progress = stack.enter_context(Progress(job, layout.dat_bytes, volume.name))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvolume-fix-"))
        summary = None
        if idx_fd is not None:
            summary = engine.idx_summarize(idx_fd, layout.width, layout.block.version, layout.dat_bytes)
        found = _scan_all(volume, layout, dat_fd, idx_fd, progress)
        if not found.keys and layout.dat_bytes > layout.block.block_bytes:
            raise CannotRun(
                f"{volume.dat}: offset {layout.block.block_bytes}: not one record can be read, the index is left as it "
                f"is; {_REPLICA}"
            )
        if found.end > MAX_VOLUME_BYTES[layout.width]:
            raise CannotRun(
                f"{volume.dat}: the data ends at {found.end}, behind what offsets of {layout.width} bytes reach; say "
                "--offset-bytes 5 if it is a large volume"
            )
        sizes = _settle(found, idx_fd, layout.width)
        new_idx = f"{scratch}/new.idx" if dry else f"{volume.idx}.fixing"
        stack.callback(files.remove_if_exists, new_idx)
        _write_rows(new_idx, found, sizes, layout.width)
        compared, ragged = _Comparison(same=False, live=_live_count(volume, layout, new_idx)), 0
        if summary is not None:
            ragged = summary.ragged_bytes
            old_idx = _whole_rows(volume.idx, f"{scratch}/old.idx", ragged)
            compared = _compare(volume, layout, old_idx, new_idx, max(summary.furthest.offset + 1, 1))
        torn, lacking = max(0, layout.dat_bytes - found.end), max(0, found.end - layout.dat_bytes)
        changed = not compared.same or bool(ragged) or summary is None
        facts: dict[str, object] = {
            "changed": changed or bool(torn or lacking),
            "live": compared.live,
            "rows": found.rows + len(compared.deletes),
            "recovered": compared.recovered,
            "lost": compared.lost_count,
            "older": compared.older_count,
            "deletes_kept": len(compared.deletes),
            "damaged": len(found.damaged),
            "damaged_in_index": len(found.kept),
            "torn_bytes": torn,
            "padded_bytes": lacking,
        }
        _tell(job, volume, found, compared, _live_damaged(volume, layout, new_idx, found))
        if changed and compared.deletes:
            _append_deletes(new_idx, compared.deletes, layout.width)
        if dry:
            if facts["changed"]:
                text = "would be rebuilt" if changed else "is right"
                job.find(Finding("warning", volume.idx, text, _cut_text(found, torn, lacking)))
            return facts
        if torn:
            facts["torn_path"] = _cut(job, volume, found.end, layout.dat_bytes)
        if lacking:
            _pad(job, volume, found.end, layout.dat_bytes)
        if changed:
            facts["backup"] = _put_in_place(job, volume, new_idx, compared)
        elif not torn and not lacking:
            job.say(f"{volume.idx}: is right, nothing was done")
        return facts


def _refuse_unfinished(volume: VolumeFiles) -> None:
    if files.exists(volume.base + ".cpc"):
        raise CannotRun(
            f"{volume.base}.cpc: a vacuum was interrupted while it put its files in place; the next start of a server, "
            "or `pyvolume compact`, finishes it"
        )
    if files.exists(volume.base + ".note"):
        raise CannotRun(f"{volume.base}.note: a copy of this volume was not completed; copy it again")


def _live_damaged(volume: VolumeFiles, layout: Layout, idx: str, found: _Found) -> set[int]:
    """Offsets of damaged records that are the newest of their keys."""
    offsets = {offset for offset, _, _ in found.kept}
    if not offsets:
        return offsets
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    live: set[int] = set()
    with engine.Volume.open(volume.dat, idx, vid=volume.vid, flags=flags, offset_width=layout.width) as opened:
        for offset, key, size in found.kept:
            with contextlib.suppress(engine.NativeError):
                if size >= 0 and opened.lookup(key)[:2] == (offset, size):
                    live.add(offset)
    return live


def _cut_text(found: _Found, torn: int, lacking: int) -> str:
    if lacking:
        return f"{plural(lacking, 'byte')} of padding would be added to the data"
    return f"{torn} bytes at offset {found.end} of the data would be saved and cut off" if torn else ""


def _live_count(volume: VolumeFiles, layout: Layout, idx: str) -> int:
    flags = engine.OpenFlag.DAT_READONLY | engine.OpenFlag.IDX_READONLY
    with engine.Volume.open(volume.dat, idx, vid=volume.vid, flags=flags, offset_width=layout.width) as opened:
        return sum(row.size >= 0 for row in opened.entries(_BATCH))


def _whole_rows(idx: str, copy: str, ragged: int) -> str:
    """The index, or a copy without the half row at its end."""
    if not ragged:
        return idx
    with open(idx, "rb") as source, open(copy, "wb") as target:
        left = os.fstat(source.fileno()).st_size - ragged
        while left > 0 and (piece := source.read(min(_COPY_BYTES, left))):
            target.write(piece)
            left -= len(piece)
    return copy


def _append_deletes(idx: str, keys: list[int], width: int) -> None:
    with open(idx, "ab") as out:
        out.write(engine.idx_pack([(key, 0, -1) for key in keys], width))
        out.flush()
        os.fsync(out.fileno())


def _tell(job: Job, volume: VolumeFiles, found: _Found, compared: _Comparison, live_damaged: set[int]) -> None:
    for start, end in found.gaps:
        text = f"{end - start} bytes in which no record can be told apart"
        job.find(Finding("error", volume.dat, text, f"they stay where they are; {_REPLICA}", start))
    for offset, key, _ in found.kept[:_SHOWN]:
        if offset in live_damaged:
            text, remedy = f"the record of needle {key:x} is damaged", f"it stays in the index, reads fail; {_REPLICA}"
            job.find(Finding("error", volume.dat, text, remedy, offset, key))
    known = {offset for offset, _, _ in found.kept}
    for offset, (key, _, _) in islice(found.damaged.items(), _SHOWN):
        if offset not in live_damaged:
            what = "an old record" if offset in known else "a record that the index does not have"
            text = f"{what}, of needle {key:x}, is damaged"
            job.find(Finding("warning", volume.dat, text, "it stays where it is; a vacuum removes it", offset, key))
    if compared.lost_count:
        text = f"needles of the old index that are in no readable record: {_shown(compared.lost, compared.lost_count)}"
        job.find(Finding("error", volume.idx, text, f"they are given up; {_REPLICA}"))
    if compared.older_count:
        text = f"needles that have lost their newest record: {_shown(compared.older, compared.older_count)}"
        job.find(Finding("error", volume.idx, text, f"an older version is served again; {_REPLICA}"))


def _shown(keys: list[int], total: int) -> str:
    return f"{total} ({', '.join(f'{key:x}' for key in keys)}{', …' if total > len(keys) else ''})"


def _pad(job: Job, volume: VolumeFiles, end: int, size: int) -> None:
    """Gives the last record the padding that it lacks: a Go server cannot read it without."""
    with files.opened(volume.dat, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(end - size), size)
        os.fsync(fd)
    text = f"the last record lacked {plural(end - size, 'byte')} of padding"
    job.find(Finding("info", volume.dat, text, "now added", size))


def _cut(job: Job, volume: VolumeFiles, start: int, end: int) -> str:
    """Saves what is behind the last record beside the volume, then cuts it off; gives the file it is saved in."""
    path = index_files.save_torn(volume.dat, volume.base, start, end)
    with files.opened(volume.dat, os.O_RDWR) as fd:
        os.ftruncate(fd, start)
        os.fsync(fd)
    text = f"{end - start} bytes of a record that is not whole were cut off"
    job.find(Finding("info", volume.dat, text, f"they are saved in {path}", start))
    return path


def _put_in_place(job: Job, volume: VolumeFiles, new_idx: str, compared: _Comparison) -> str:
    """Keeps the old index under another name, then puts the new one in place; a crash leaves the one or the other."""
    backup = keep_and_replace(new_idx, volume.idx)
    for extension in (".sdx", ".ldb", ".rdb", ".rocks"):
        files.remove_if_exists(volume.idx.removesuffix(".idx") + extension)
    files.sync_dir(os.path.dirname(volume.idx))
    lacked = plural(compared.recovered, "change")
    text = f"{volume.idx}: rebuilt, {plural(compared.live, 'live needle')}, {lacked} that it lacked"
    job.say(f"{text}; the old one is {backup}" if backup else text)
    return backup
