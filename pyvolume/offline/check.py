"""Look for damage in volumes, plain and erasure coded: index against data, every record's checksum, shards, leftovers.

Changes nothing. May import common, check_ec, ec_volumes, storage, _native and the leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any, Final

from pyvolume._native import engine
from pyvolume._native.scrub import Scrub, ScrubFinding
from pyvolume.errors import NativeCode
from pyvolume.offline import check_ec
from pyvolume.offline.common import (
    CannotRun,
    Finding,
    Job,
    Layout,
    Level,
    Progress,
    VolumeFiles,
    add_common_arguments,
    explained,
    for_each_volume,
    layout_of,
    plural,
    positive_rate,
)
from pyvolume.offline.ec_volumes import ec_ids
from pyvolume.storage import files, index_files, scrub, vif
from pyvolume.storage.superblock import CURRENT_VERSION
from pyvolume.types import ReplicaPlacement

_FIX: Final = "run `pyvolume fix`, or copy the volume from a replica"
_REPLICA: Final = "copy the volume from a replica"
_STATE_FORMAT: Final = "pyvolume check 1"
_SAVE_INTERVAL_S: Final = 10.0
_LEFTOVERS: Final[dict[str, tuple[Level, str, str]]] = {
    ".note": (
        "error",
        "a copy of this volume was not completed",
        "the next start of a server deletes the volume's files: if they are the only copy, move this file away first",
    ),
    ".cpc": ("warning", "a vacuum was interrupted while it put its files in place", "the next start finishes it"),
    ".cpd": ("warning", "the data file of a vacuum that was not committed", "the next start commits or removes it"),
    ".cpx": ("warning", "the index of a vacuum that was not committed", "the next start commits or removes it"),
    ".cpldb": ("warning", "left by a vacuum of another server", "the next start of a server removes it"),
    ".idx.tmp": ("warning", "an index that was being written", "delete it"),
    ".vif.tmp": ("warning", "a .vif that was being written", "delete it"),
    ".idx.fixing": ("warning", "an index that an interrupted `pyvolume fix` was writing", "delete it"),
    ".cpd.kept": ("info", "an offline vacuum that did not fit the volume", "delete it once you do not need it"),
    ".cpx.kept": ("info", "an offline vacuum that did not fit the volume", "delete it once you do not need it"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, changes=False)
    parser.add_argument("--index-only", action="store_true", help="do not read the records")
    parser.add_argument(
        "--rate", type=positive_rate, default=0, metavar="MB", help="read at most so many MiB a second (0: no limit)"
    )
    parser.add_argument(
        "--state", default="", metavar="FILE", help="remember there how far the check has come, and go on from there"
    )


def run(job: Job) -> None:
    places: dict[int, str] = {}
    clean = 0
    try:
        state = _State(job.args.state)
    except (OSError, ValueError) as exc:
        job.fail(f"--state {job.args.state}: {exc}; delete the file to begin anew")
        return
    for volume in for_each_volume(job, will_write=False, elsewhere=ec_ids(job)):
        before = len(job.findings)
        facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": volume.dat}
        with explained(job, volume):
            if volume.vid in places and places[volume.vid] != volume.base:
                text = f"volume {volume.vid} is also at {places[volume.vid]}"
                remedy = "a server serves only the first: keep one, move the other away"
                job.find(Finding("error", volume.dat, text, remedy))
            places.setdefault(volume.vid, volume.base)
            facts |= check_volume(job, volume, state)
        findings = [f for f in job.findings[before:] if f.level != "info"]
        facts["findings"] = len(findings)
        clean += not findings
        job.report(**facts)
    clean += check_ec.run(job)
    job.say(f"{plural(len(job.volumes), 'volume')} checked, {clean} clean")


def check_volume(job: Job, volume: VolumeFiles, state: _State) -> dict[str, object]:
    """Looks at one volume; what is found goes to the job. Raises OSError, StorageError, NativeError."""
    _check_leftovers(job, volume)
    known = _check_vif(job, volume)
    if not files.exists(volume.dat):
        if not known.has_remote_file:
            job.find(Finding("error", volume.dat, "the index has no data file", f"{_REPLICA}, or remove {volume.idx}"))
        return {}
    try:
        layout = layout_of(volume, job.args.offset_bytes)
    except CannotRun as exc:
        reason = str(exc).removeprefix(f"{volume.dat}: offset 0: ")
        job.find(Finding("error", volume.dat, reason, f"{_REPLICA}: no server loads this one", 0))
        return {}
    facts: dict[str, object] = {
        "version": layout.block.version,
        "offset_bytes": layout.width,
        "bytes": layout.dat_bytes,
        "revision": layout.block.compaction_revision,
    }
    if not files.exists(volume.idx):
        if layout.dat_bytes > layout.block.block_bytes:
            job.find(Finding("error", volume.idx, "the index is missing", "run `pyvolume fix`"))
        return facts
    return facts | _check_index(job, volume, layout, state)


def _check_vif(job: Job, volume: VolumeFiles) -> vif.VifResult:
    known = vif.load(volume.vif)
    if known.error:
        job.find(Finding("warning", volume.vif, known.error, "delete it: a server makes it anew from the super block"))
        return known
    info = known.info
    if info.bytes_offset not in (0, 4, 5):
        text = f"bytesOffset {info.bytes_offset} does not exist"
        job.find(Finding("error", volume.vif, text, "set it to 4 (or 5), or delete the file"))
    if info.replication:
        try:
            ReplicaPlacement.parse(info.replication)
        except ValueError as exc:
            text = f"replication {info.replication}: {exc}"
            job.find(Finding("error", volume.vif, text, "correct it: no server loads the volume"))
    return known


def _check_leftovers(job: Job, volume: VolumeFiles) -> None:
    for place in dict.fromkeys((volume.directory, volume.idx_directory)):
        for entry in sorted(os.listdir(place)):
            if not entry.startswith(volume.name + "."):
                continue
            extension = entry[len(volume.name) :]
            level, reason, remedy = _LEFTOVERS.get(extension, ("info", "", ""))
            if extension.startswith(".torn-"):
                level, reason = "info", "bytes that were cut off the end of the data file"
                remedy = "delete it once you do not need it"
            elif extension.startswith(".idx.bak-"):
                level, reason = "info", "an index that `pyvolume fix` replaced"
                remedy = "delete it once you trust the new one"
            if reason:
                job.find(Finding(level, f"{place}/{entry}", reason, remedy))


# --------------------------------------------------------------------------------------------------- index and records


def _check_index(job: Job, volume: VolumeFiles, layout: Layout, state: _State) -> dict[str, object]:
    dat_end = -(-layout.dat_bytes // 8) * 8  # a cut in the last padding is none
    with files.opened(volume.dat) as dat_fd, files.opened(volume.idx) as idx_fd:
        summary = engine.idx_summarize(idx_fd, layout.width, layout.block.version, dat_end)
        facts: dict[str, object] = {"rows": summary.rows}
        if not summary.file_bytes and layout.dat_bytes > layout.block.block_bytes:
            text = f"the index is empty, the data is not ({layout.dat_bytes} bytes)"
            job.find(Finding("error", volume.idx, text, _FIX))
            return facts
        if summary.ragged_bytes:
            text = f"{summary.ragged_bytes} bytes of half a row at the end"
            remedy = "a server drops them at load; so does `pyvolume fix`"
            job.find(Finding("error", volume.idx, text, remedy, summary.file_bytes - summary.ragged_bytes))
        if summary.past_end:
            text = (
                f"{plural(summary.past_end, 'row')} of the index name records behind the end of the data "
                f"({layout.dat_bytes} bytes), the first is key {summary.first_past_end_key:x}"
            )
            remedy = f"{_REPLICA}, or run `pyvolume fix` to give them up"
            job.find(Finding("error", volume.idx, text, remedy, key=summary.first_past_end_key))
        _check_tail(job, volume, layout, dat_fd, summary)
        facts |= _scrub(job, volume, layout, (dat_fd, idx_fd), dat_end, state)
    return facts


def _check_tail(job: Job, volume: VolumeFiles, layout: Layout, dat_fd: int, summary: engine.IdxSummary) -> None:
    """What is behind the last record that the index knows."""
    start = summary.max_end or layout.block.block_bytes
    if start >= layout.dat_bytes:
        return
    if layout.block.version != CURRENT_VERSION and not index_files.chain_reaches(dat_fd, layout.block, start):
        text = f"the super block says version {layout.block.version}, the records are not of it"
        job.find(Finding("error", volume.dat, text, f"{_REPLICA}: no server can append to this one", 0))
        return
    whole, end = 0, start
    try:
        while end < layout.dat_bytes:
            records, after = engine.dat_scan(dat_fd, layout.block.version, end, 0, True)
            good = [record for record in records if record.status == 0 and (record.size > 0 or record.append_at_ns)]
            whole += len(good)
            if not records:
                break
            end = after
    except engine.NativeError as exc:
        if exc.code not in (NativeCode.EEOF, NativeCode.ECORRUPT):
            raise
    if whole:
        text = f"{plural(whole, 'record')} behind the last one in the index"
        remedy = "a server indexes them at load (unless -repairOnLoad=false); so does `pyvolume fix`"
        job.find(Finding("error", volume.dat, text, remedy, start))
    if end < layout.dat_bytes or not whole:
        text = f"{layout.dat_bytes - end} bytes of a record that is not whole at the end"
        remedy = "a server saves them beside the volume and cuts them off at load; so does `pyvolume fix`"
        job.find(Finding("error", volume.dat, text, remedy, end))


def _scrub(
    job: Job, volume: VolumeFiles, layout: Layout, fds: tuple[int, int], dat_end: int, state: _State
) -> dict[str, object]:
    offset, found = (0, []) if job.args.index_only else state.resume(volume.dat, fds)
    look = Scrub.of_files(
        *fds, layout.width, layout.block.version, index_only=job.args.index_only, check_id=True, resume_offset=offset
    )
    with Progress(job, look.stat().total_rows, volume.name, "row") as progress:
        try:
            for stats in scrub.run(look, job.args.rate):
                found += look.findings()
                offset = max(offset, stats.position)
                progress.to(stats.done_rows)
                state.note(volume.dat, fds, offset, found)
            stats = look.stat()
        finally:
            look.close()
            state.save()
    found = [f for f in found if f.error is None or (f.offset < dat_end and _record_end(f, layout) <= dat_end)]
    live = _live_offsets(fds[1], layout.width, {f.key for f in found})
    for f in found:
        if f.error is None:
            text = scrub.overlap_text(f)
            job.find(Finding("error", volume.idx, text, _FIX, f.row * (12 + layout.width), f.key))
            continue
        why = scrub.record_error_text(f, volume.dat, layout.width)
        end = _record_end(f, layout)
        if live.get(f.key) == f.offset and layout.dat_bytes < end <= dat_end:
            text = f"needle {f.key:x}: its record lacks {plural(end - layout.dat_bytes, 'byte')} of padding: {why}"
            job.find(Finding("error", volume.dat, text, "`pyvolume fix` adds them", f.offset, f.key))
        elif live.get(f.key) == f.offset:
            text = f"needle {f.key:x} cannot be read: {why}"
            job.find(Finding("error", volume.dat, text, f"{_REPLICA}; this needle is lost here", f.offset, f.key))
        else:
            text = f"an old record of needle {f.key:x}, overwritten or deleted since, cannot be read: {why}"
            job.find(Finding("warning", volume.dat, text, "nothing is lost; a vacuum removes it", f.offset, f.key))
    return {"records_read": stats.checked_records, "unreadable": sum(f.error is not None for f in found)}


def _record_end(found: ScrubFinding, layout: Layout) -> int:
    return found.offset + engine.needle_record_len(max(found.size, 0), layout.block.version)


def _live_offsets(idx_fd: int, width: int, keys: set[int]) -> dict[int, int]:
    """Where the live record of each of these keys is; the index is replayed, so the last row counts."""
    live: dict[int, int] = {}
    if keys:
        for row in index_files.rows_of(idx_fd, width):
            if row.key in keys:
                if row.offset != 0 and row.size >= 0:
                    live[row.key] = row.offset
                else:
                    live.pop(row.key, None)
    return live


# ------------------------------------------------------------------------------------------------------------- going on


class _State:
    """How far the records of each volume were read, with what was found, in a file: a check of a large disk takes long.

    What is in it counts only while the volume's files have the sizes and times that they had. Saved each few seconds
    and when the check of a volume ends, however it ends. Without a path nothing is kept.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError, ValueError (no such file of ours)."""
        self._path = path
        self._volumes: dict[str, dict[str, Any]] = {}
        self._saved_s = time.monotonic()
        if path and files.exists(path):
            with open(path, encoding="utf-8") as handle:
                known = json.load(handle)
            if not isinstance(known, dict) or known.get("format") != _STATE_FORMAT:
                raise ValueError("this is not what an earlier check left")
            self._volumes = known["volumes"]

    @staticmethod
    def _stamp(fds: tuple[int, int]) -> list[int]:
        stats = [os.fstat(fd) for fd in fds]
        return [number for st in stats for number in (st.st_ino, st.st_size, st.st_mtime_ns)]

    def resume(self, dat_path: str, fds: tuple[int, int]) -> tuple[int, list[ScrubFinding]]:
        """(offset from which records are still to be read, what was found before it)."""
        known = self._volumes.get(os.path.abspath(dat_path))
        if known is None or known["stamp"] != self._stamp(fds):
            return 0, []
        offset = int(known["offset"])
        found = [ScrubFinding._make([*row[:-1], engine.NativeInfo(*row[-1])]) for row in known["found"]]
        return offset, [f for f in found if f.offset < offset]

    def note(self, dat_path: str, fds: tuple[int, int], offset: int, found: list[ScrubFinding]) -> None:
        if not self._path or not offset:
            return
        unreadable = [f for f in found if f.error is not None]
        self._volumes[os.path.abspath(dat_path)] = {"stamp": self._stamp(fds), "offset": offset, "found": unreadable}
        if time.monotonic() - self._saved_s >= _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Raises DiskError, OSError."""
        if self._path:
            self._saved_s = time.monotonic()
            text = json.dumps({"format": _STATE_FORMAT, "volumes": self._volumes})
            files.replace_file(self._path, text.encode(), point="check.state")
