"""`pyvolume fix` of erasure coded volumes: the index made anew of the records in the shards.

An index that is whole and fits the records is left alone. Of a damaged one is taken over which records without data are
deletes and which are empty files, and what was deleted; journals say what else was, and stay as they are. Deletes that
were folded into rows that are lost cannot be known: that is said, and is a finding. May import common, check_ec,
ec_volumes, storage, _native and the leaves.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Final

from pyvolume._native import engine
from pyvolume.offline.check_ec import end_of_data, explained_ec, index_fault
from pyvolume.offline.common import CannotRun, Finding, Job, Progress, keep_and_replace, plural
from pyvolume.offline.ec_volumes import BadRecord, EcFiles, Shards, for_each_ec_volume, rows_of, why, width_of
from pyvolume.storage import files
from pyvolume.storage.ec import index
from pyvolume.types import MAX_VOLUME_BYTES

_VACUUM_TOMBSTONE_COOKIE: Final = 0x12345678
_HEADER: Final = struct.Struct(">IQi")
_SHOWN: Final = 100


def run(job: Job) -> int:
    """Sees to all erasure coded volumes of the directories; how many indexes were, or would be, made."""
    changed = 0
    for volume in for_each_ec_volume(job, will_write=not job.args.dry_run):
        path = volume.ecx[0] if volume.ecx else f"{volume.idx_directory}/{volume.name}.ecx"
        facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": path}
        with explained_ec(job, volume):
            facts |= fix_ec_volume(job, volume, path)
        changed += bool(facts.get("changed"))
        job.report(**facts)
    return changed


def fix_ec_volume(job: Job, volume: EcFiles, path: str) -> dict[str, object]:
    """Makes the indexes of one volume that are missing or damaged. Raises OSError, NativeError, CannotRun."""
    if volume.dat and not volume.ecx:
        text = "shards without an index, beside the plain volume that they are made of: an encode did not end"
        job.find(Finding("info", volume.base, text, "the next start of a server removes them"))
        return {"changed": False}
    width = width_of(volume, job.args.offset_bytes)
    with Shards(volume) as shards:
        faults = {each: _fault(volume, each, width, shards) for each in volume.ecx}
        todo = [each for each, fault in faults.items() if fault] or ([] if volume.ecx else [path])
        if not todo:
            job.say(f"{path}: is right, nothing was done")
            return {"changed": False}
        for each, fault in faults.items():
            if fault:
                job.say(f"{each}: {fault}")
        if shards.data_bytes > MAX_VOLUME_BYTES[width]:
            raise CannotRun(
                f"{volume}: offsets of {width} bytes do not reach {shards.data_bytes}: say --offset-bytes 5"
            )
        rows, damaged = _rows(job, volume, shards, width)
    packed = engine.idx_pack(((key, offset, size) for key, (offset, size) in sorted(rows.items())), width)
    facts: dict[str, object] = {
        "changed": True,
        "live": sum(size >= 0 for _, size in rows.values()),
        "rows": len(rows),
        "damaged": damaged,
    }
    facts["unknown"] = _tell_unknown(job, volume, path, rows, width)
    if job.args.dry_run:
        for each in todo:
            job.find(Finding("warning", each, "would be rebuilt", f"{plural(len(rows), 'row')}, {facts['live']} live"))
        return facts
    for each in todo:
        working = each + ".fixing"
        try:
            with files.opened(working, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as out:
                files.write_all(out, packed)
                os.fsync(out)
            facts["backup"] = kept = keep_and_replace(working, each)
        finally:
            with contextlib.suppress(OSError):
                files.remove_if_exists(working)
        text = f"{each}: rebuilt, {plural(len(rows), 'row')}, {facts['live']} live"
        job.say(f"{text}; the old one is {kept}" if kept else text)
    return facts


def _tell_unknown(job: Job, volume: EcFiles, path: str, rows: dict[int, tuple[int, int]], width: int) -> int:
    """Says of how many needles nobody can tell here whether they were deleted: no row of an index is left of them."""
    known = _known(volume, width)
    unknown = sum(size >= 0 and (key, offset) not in known for key, (offset, size) in rows.items())
    if not unknown:
        return 0
    journals = "the journal has others" if volume.ecj else "and there is no journal (.ecj) either"
    text = (
        f"no row of an index is left of {plural(unknown, 'needle')} that the shards have: deletes that ec.rebuild or "
        f"ec.decode had folded into the index were known to it only, {journals}; such needles are there again"
    )
    remedy = (
        "if another server has shards, copy its .ecx and .ecj here instead (`ec.rebuild` does), before one starts here"
    )
    job.find(Finding("warning", path, text, remedy))
    return unknown


def _fault(volume: EcFiles, path: str, width: int, shards: Shards) -> str:
    """What is wrong with an index, if anything: its form, or rows that are of other records than stand there."""
    version = shards.block.version
    fault = index_fault(path, width, end_of_data(volume, shards.shard_bytes), version)
    if fault is not None:
        return fault[0]
    if not os.path.getsize(path):
        return "the index is empty"
    with files.opened(path) as fd:
        for number, row in enumerate(rows_of(fd, width)):
            _, key, size = _HEADER.unpack(shards.read(row.offset, _HEADER.size).ljust(_HEADER.size, b"\0"))
            if key == row.key and row.size in (size, -1):
                continue
            try:
                shards.needle(row.offset, max(row.size, 0), row.key)
            except (engine.NativeError, BadRecord) as exc:
                return f"row {number} (key {row.key:x}) is of no record: {why(exc, volume.base)}"
    return ""


def _known(volume: EcFiles, width: int) -> dict[tuple[int, int], int]:
    """(key, offset) -> size of the rows of all indexes that there are."""
    known: dict[tuple[int, int], int] = {}
    for path in reversed(volume.ecx):
        with files.opened(path) as fd:
            known |= {(row.key, row.offset): row.size for row in rows_of(fd, width)}
    return known


def _rows(job: Job, volume: EcFiles, shards: Shards, width: int) -> tuple[dict[int, tuple[int, int]], int]:
    """(key -> (offset, size) of the newest records, how many of those are damaged). Raises CannotRun."""
    known = _known(volume, width)
    rows: dict[int, tuple[int, int]] = {}
    damaged: dict[int, Finding] = {}
    try:
        with Progress(job, shards.data_bytes, volume.name) as progress:
            for record in shards.records():
                progress.to(record.offset)
                key = record.key
                damaged.pop(key, None)
                if record.size == 0:
                    said = known.get((key, record.offset))
                    is_delete = key in rows or record.cookie == _VACUUM_TOMBSTONE_COOKIE
                    if is_delete if said is None else said < 0:
                        rows.pop(key, None)
                        continue
                rows[key] = (record.offset, record.size)
                if record.fault is not None:
                    text = f"the record of needle {key:x} is damaged: {why(record.fault, volume.base)}"
                    remedy = "it stays in the index, reads fail; copy the shards it lies in from other servers"
                    damaged[key] = Finding("error", volume.base, text, remedy, record.offset, key)
    except BadRecord as exc:
        raise CannotRun(f"{volume}: {exc}, so the index is left as it is; copy it from another server") from exc
    if not rows and not known and shards.encoded_bytes > shards.block.block_bytes:
        raise CannotRun(f"{volume}: not one record can be read, so no index is made; copy it from another server")
    for finding in list(damaged.values())[:_SHOWN]:
        job.find(finding)
    gone = {key for path in volume.ecj for key in index.read_journal(path)}
    gone |= {key for (key, offset), size in known.items() if size < 0 and rows.get(key, (0, 0))[0] == offset}
    for key in gone & rows.keys():
        rows[key] = (rows[key][0], -1)
    return rows, len(damaged)
