"""`pyvolume check` of erasure coded volumes: shards against their checksums and each other, index, journal, records.

Changes nothing. May import common, ec_volumes, storage, _native and the leaves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Final

from pyvolume._native import ec, engine
from pyvolume.errors import from_native, from_os_error
from pyvolume.offline.common import CannotRun, Finding, Job, Progress, plural
from pyvolume.offline.ec_volumes import BadRecord, EcFiles, Shards, for_each_ec_volume, rows_of, why, width_of
from pyvolume.storage import files
from pyvolume.storage.compact import RateLimit
from pyvolume.storage.ec import index, sidecar
from pyvolume.storage.ec.encode import ratio_of
from pyvolume.storage.ec.layout import Ratio, shard_bytes_of

_STEP_BYTES: Final = 1 << 20
_SHOWN: Final = 100
_REMAKE: Final = "move the shard away and run `ec.rebuild` in `weed shell`"
_FIX: Final = (
    "copy .ecx and .ecj from another server that has shards, or if there is none run `pyvolume fix` with all "
    "directories that have shards: it cannot know which deletes had been folded into the index"
)


def run(job: Job) -> int:
    """Checks all erasure coded volumes of the directories; how many are clean."""
    clean = 0
    for volume in for_each_ec_volume(job, will_write=False):
        before = len(job.findings)
        facts: dict[str, object] = {"id": volume.vid, "collection": volume.collection, "path": volume.base}
        with explained_ec(job, volume):
            facts |= check_ec_volume(job, volume)
        findings = [f for f in job.findings[before:] if f.level != "info"]
        facts["findings"] = len(findings)
        clean += not findings
        job.report(**facts)
    return clean


@contextlib.contextmanager
def explained_ec(job: Job, volume: EcFiles) -> Iterator[None]:
    """As common.explained, for an erasure coded volume."""
    try:
        yield
    except CannotRun as exc:
        job.fail(str(exc))
    except BrokenPipeError:
        raise
    except engine.NativeError as exc:
        job.fail(f"{volume}: {from_native(exc.code, exc.info, vid=volume.vid, path=volume.base)}")
    except OSError as exc:
        job.fail(f"{volume}: {from_os_error(exc, 'open', exc.filename or volume.base)}")


def check_ec_volume(job: Job, volume: EcFiles) -> dict[str, object]:
    """Looks at one volume; what is found goes to the job. Raises OSError, NativeError, CannotRun."""
    _check_names(job, volume)
    ratio = _check_info(job, volume)
    shard_bytes = _check_shards(job, volume, ratio)
    present = sorted(n for n in volume.shards if n < ratio.total)
    facts: dict[str, object] = {
        "data_shards": ratio.data,
        "parity_shards": ratio.parity,
        "shards": present,
        "shard_bytes": shard_bytes,
    }
    if not job.args.index_only:
        facts["damaged_shards"] = _check_content(job, volume, ratio, shard_bytes)
    deleted = _check_journals(job, volume)
    if not volume.ecx:
        job.find(Finding("error", f"{volume.base}.ecx", "the index is missing: no server serves the shards", _FIX))
        return facts
    for path in volume.ecx:
        rows = check_index(job, volume, path, shard_bytes)
        if path == volume.ecx[0]:
            facts["rows"] = rows
    if not job.args.index_only:
        facts |= _check_records(job, volume, deleted)
    return facts


def _check_names(job: Job, volume: EcFiles) -> None:
    for path in volume.others:
        job.find(Finding("warning", path, "a file that was being made", "delete it"))
    if volume.dat:
        text = "a plain volume of the same id is here, which is what a server serves"
        job.find(Finding("info", volume.dat, text, "remove it once the shards are spread, or remove the shards"))


def _check_info(job: Job, volume: EcFiles) -> Ratio:
    known = volume.info()
    if not volume.vifs:
        text = "there is no .vif: 10+4 shards and version 3 are assumed"
        job.find(Finding("warning", f"{volume.base}.vif", text, "copy it from another server that has shards"))
    elif known.error:
        job.find(Finding("error", volume.vifs[0], known.error, "copy it from another server that has shards"))
    config = known.info.ec_shard_config
    if config is not None and not Ratio(config.data_shards, config.parity_shards).is_valid:
        text = f"{config.data_shards}+{config.parity_shards} shards cannot be; 10+4 are assumed"
        job.find(Finding("error", volume.vifs[0], text, "copy it from another server that has shards"))
    for path in volume.vifs[1:]:
        other = EcFiles(volume.collection, volume.vid, volume.name, volume.directories, vifs=[path]).info().info
        if (other.ec_shard_config, other.dat_file_size) != (config, known.info.dat_file_size):
            text = f"it is of another encode than {volume.vifs[0]}: the shards do not go together"
            job.find(Finding("error", path, text, "keep the shards of one encode, move the others away"))
    return ratio_of(known.info)


def _check_shards(job: Job, volume: EcFiles, ratio: Ratio) -> int:
    """How long shards are; finds those of another length."""
    sizes = {path: os.path.getsize(path) for paths in volume.shards.values() for path in paths}
    counts = list(sizes.values())
    common = max(counts, key=lambda size: (counts.count(size), size)) if counts else 0
    said = volume.info().info.dat_file_size
    wanted = shard_bytes_of(said, ratio.data) if said > 0 else common
    if said > 0 and counts and wanted not in counts:
        text = f"a .dat of {said} bytes makes shards of {wanted} bytes, the shards have {common}"
        job.find(Finding("error", volume.vifs[0], text, "copy shards and .vif of one encode from other servers"))
        wanted = common
    for number, paths in sorted(volume.shards.items()):
        for path in paths:
            if number >= ratio.total:
                job.find(Finding("error", path, f"there is no shard {number} of {ratio.total}", "move it away"))
            elif sizes[path] != wanted:
                text = f"the shard has {sizes[path]} bytes, not {wanted}"
                job.find(Finding("error", path, text, _REMAKE, min(sizes[path], wanted)))
        if len(paths) > 1:
            text = f"shard {number} is also at {paths[0]}"
            job.find(Finding("warning", paths[1], text, "keep one, move the other away"))
    missing = [n for n in range(ratio.total) if n not in volume.shards]
    if missing:
        text = (
            f"{ratio.total - len(missing)} of {ratio.total} shards are here, {ratio.data} are needed; not here: "
            f"{' '.join(map(str, missing))}"
        )
        remedy = "if no other server has them, `ec.rebuild` in `weed shell` makes them"
        if ratio.total - len(missing) < ratio.data:
            remedy = "other servers must have them: give their directories, too, to have the records checked"
        job.find(Finding("info", volume.base, text, remedy))
    return wanted


# -------------------------------------------------------------------------------------------------- content of shards


class _Sums:
    """Compares one shard with its checksums, piece by piece."""

    def __init__(self, entry: sidecar.ShardSums, block_bytes: int) -> None:
        self._entry, self._block_bytes = entry, block_bytes
        self._crc = 0
        self.bad: list[int] = []

    def take(self, at: int, piece: bytes) -> None:
        self._crc = engine.crc32c(piece, self._crc)
        end = at + len(piece)
        if end % self._block_bytes == 0 or end >= self._entry.covered:
            block = at // self._block_bytes
            if block < len(self._entry.crcs) and self._crc != self._entry.crcs[block]:
                self.bad.append(block)
            self._crc = 0


def _check_content(job: Job, volume: EcFiles, ratio: Ratio, shard_bytes: int) -> list[int]:
    """Reads all shards once, against their checksums, and against each other if all are here; the damaged ones."""
    path = volume.sums[0] if volume.sums else None
    state, sums, reason = sidecar.load(path, ratio)
    if state == "invalid" and path:
        remedy = "delete it: a rebuild with all shards in one place writes it anew"
        job.find(Finding("error", path, f"the checksums cannot be used: {reason}", remedy))
    elif state == "off":
        text = "there are no checksums of this encode"
        job.find(Finding("info", path or f"{volume.base}.ecsum", text, "shards are compared only if all are here"))
    stale = False
    if sums is not None and (covered := {entry.covered for entry in sums.shards}) != {shard_bytes}:
        stale = True
        text = f"the checksums are of shards of {max(covered)} bytes, the shards have {shard_bytes}"
        job.find(Finding("error", path or "", text, "delete it, or copy it from a server with shards of this encode"))
    block_bytes = sums.block_bytes if sums is not None else sidecar.BLOCK_BYTES
    with contextlib.ExitStack() as stack:
        fds: dict[int, int] = {}
        for number, paths in sorted(volume.shards.items()):
            if number < ratio.total and os.path.getsize(paths[0]) == shard_bytes:
                fds[number] = stack.enter_context(files.opened(paths[0]))
        checks = {}
        for number in fds:
            entry = sums.of(number) if sums is not None and not stale else None
            if entry is not None:
                checks[number] = _Sums(entry, block_bytes)
        compare = _Parity(ratio) if len(fds) == ratio.total else None
        unreadable: dict[int, int] = {}
        limit = RateLimit(job.args.rate)
        with Progress(job, shard_bytes * len(fds), f"{volume.name} shards") as progress:
            for at in range(0, shard_bytes, _STEP_BYTES):
                pieces: dict[int, bytes] = {}
                for number, fd in fds.items():
                    try:
                        pieces[number] = os.pread(fd, min(_STEP_BYTES, shard_bytes - at), at)
                    except OSError as exc:
                        if number not in unreadable:
                            text = f"shard {number} cannot be read: {exc.strerror}"
                            job.find(Finding("error", volume.shards[number][0], text, _REMAKE, at))
                        unreadable.setdefault(number, at)
                        continue
                    if number in checks:
                        checks[number].take(at, pieces[number])
                if compare is not None and len(pieces) == ratio.total:
                    compare.take(at, pieces)
                progress.to((at + _STEP_BYTES) * len(fds))
                for _ in limit.waits(sum(map(len, pieces.values()))):
                    pass
    damaged = {number for number, check in checks.items() if check.bad} | set(unreadable)
    for number in sorted(damaged - set(unreadable)):
        bad = checks[number].bad
        text = f"shard {number} differs from its checksum in {plural(len(bad), 'block')} of {block_bytes} bytes"
        text += f", the first is block {bad[0]}"
        job.find(Finding("error", volume.shards[number][0], text, _REMAKE, bad[0] * block_bytes))
    if compare is not None:
        damaged |= _tell_parity(job, volume, compare, damaged)
    return sorted(damaged)


class _Parity:
    """Compares the shards of a volume with each other."""

    def __init__(self, ratio: Ratio) -> None:
        self._ratio = ratio
        self.guilty: dict[int, list[int]] = {}
        """Shard -> offsets of the stretches in which it alone does not fit the others; -1: no single one."""

    def take(self, at: int, pieces: dict[int, bytes]) -> None:
        if self._fits(pieces):
            return
        suspects: Iterable[int] = range(self._ratio.total) if self._ratio.parity > 1 else ()
        known = [n for n in self.guilty if n >= 0]
        for shard in dict.fromkeys([*known, *suspects]):
            if self._fits({n: piece for n, piece in pieces.items() if n != shard}):
                self.guilty.setdefault(shard, []).append(at)
                return
        self.guilty.setdefault(-1, []).append(at)

    def _fits(self, pieces: dict[int, bytes]) -> bool:
        data, parity = self._ratio.data, self._ratio.parity
        numbers = sorted(pieces)
        base = {n: pieces[n] for n in numbers[:data]}
        return all(ec.recover(data, parity, base, n) == pieces[n] for n in numbers[data:])


def _tell_parity(job: Job, volume: EcFiles, compare: _Parity, known: set[int]) -> set[int]:
    found = set()
    for shard, offsets in sorted(compare.guilty.items()):
        count = plural(len(offsets), "stretch").replace("stretchs", "stretches") + f" of {_STEP_BYTES} bytes"
        if shard < 0:
            if not known:
                text = f"the shards do not fit each other in {count}, and which are wrong cannot be told"
                job.find(Finding("error", volume.base, text, "copy shards from other servers", offsets[0]))
        elif shard not in known:
            text = f"shard {shard} does not fit the others in {count}"
            job.find(Finding("error", volume.shards[shard][0], text, _REMAKE, offsets[0]))
            found.add(shard)
    return found


# --------------------------------------------------------------------------------------- index, journal, records


def index_fault(path: str, width: int, end: int, version: int) -> tuple[str, int, int] | None:
    """(what is wrong with an index, offset, key of the row) of the first fault; None for a sound one.

    `end`: where the data ends. Raises OSError, NativeError.
    """
    row_bytes = index.row_bytes(width)
    with files.opened(path) as fd:
        size = os.fstat(fd).st_size
        last = -1
        for number, row in enumerate(rows_of(fd, width)):
            at = number * row_bytes
            if row.key <= last:
                return f"row {number} is not in the order of keys: {row.key:x} after {last:x}", at, row.key
            last = row.key
            if row.size < -1 or row.offset == 0:
                return f"row {number} (key {row.key:x}) is none: offset {row.offset}, size {row.size}", at, row.key
            if row.offset + engine.needle_record_len(max(row.size, 0), version) > end:
                text = f"row {number} (key {row.key:x}, offset {row.offset}, size {row.size}) ends behind the data"
                return f"{text} ({end} bytes)", at, row.key
        if size % row_bytes:
            return f"{size % row_bytes} bytes of half a row at the end", size - size % row_bytes, -1
    return None


def end_of_data(volume: EcFiles, shard_bytes: int) -> int:
    """Where the last record can end; without shards and .vif nothing is known, and any end is good."""
    info = volume.info().info
    return -(-(info.dat_file_size or ratio_of(info).data * shard_bytes or 1 << 62) // 8) * 8


def check_index(job: Job, volume: EcFiles, path: str, shard_bytes: int) -> int:
    """Tells of the first fault of an index; how many rows it has."""
    width = width_of(volume, job.args.offset_bytes)
    version = volume.info().info.version or 3
    fault = index_fault(path, width, end_of_data(volume, shard_bytes), version)
    if fault is not None:
        text, offset, key = fault
        job.find(Finding("error", path, text, _FIX, offset, key if key >= 0 else None))
    size = os.path.getsize(path)
    if not size:
        text = "the index is empty, which is right only if nothing was alive when the shards were made"
        job.find(Finding("warning", path, text, _FIX))
    return size // index.row_bytes(width)


def _check_journals(job: Job, volume: EcFiles) -> set[int]:
    deleted: set[int] = set()
    for path in volume.ecj:
        deleted |= set(index.read_journal(path))
        ragged = os.path.getsize(path) % index.ID_BYTES
        if ragged:
            text = f"{ragged} bytes of half an id at the end"
            remedy = "they are no delete; cut them off: `ec.decode` and `ec.rebuild` refuse the volume with them"
            job.find(Finding("warning", path, text, remedy, os.path.getsize(path) - ragged))
    return deleted


def _check_records(job: Job, volume: EcFiles, deleted: set[int]) -> dict[str, object]:
    """Reads every live record through the shards, if enough are here."""
    try:
        shards = Shards(volume)
    except CannotRun as exc:
        job.find(Finding("info", volume.base, f"the records are not read: {str(exc).removeprefix(f'{volume}: ')}"))
        return {}
    width = width_of(volume, job.args.offset_bytes)
    with shards, files.opened(volume.ecx[0]) as fd:
        rows = sorted((r.offset, r.key, r.size) for r in rows_of(fd, width) if r.size >= 0 and r.key not in deleted)
        limit = RateLimit(job.args.rate)
        unreadable = 0
        with Progress(job, len(rows), volume.name, "row") as progress:
            for number, (offset, key, size) in enumerate(rows):
                try:
                    shards.needle(offset, size, key)
                except (engine.NativeError, BadRecord) as exc:
                    unreadable += 1
                    if unreadable <= _SHOWN:
                        text = f"needle {key:x} cannot be read: {why(exc, volume.base)}"
                        remedy = "copy the shards that it lies in from other servers; this needle is lost here"
                        job.find(Finding("error", volume.base, text, remedy, offset, key))
                progress.to(number + 1)
                for _ in limit.waits(size):
                    pass
    return {"records_read": len(rows), "unreadable": unreadable}
