"""Vacuum of a mounted volume: check, compact, commit, clean up (contract storage.md 17).

May import _native, volume, mapped_volume, files, disk_space and the leaves; not store. The copying is the engine's;
here are the room check, the rate limit, the progress, the order of names and texts. A volume has one claim: a second
Compact or Commit while one runs is answered with success and does nothing, as upstream answers it.

Between Compact and Commit the copy waits on `Volume.compaction`. Departures: V1 (needles with a ttl of their own stay
until they expire), V2 (a commit that fails leaves the old files serving), V6. Upstream:
`weed/storage/volume_vacuum.go`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pyvolume._native import engine
from pyvolume._native.compact import Compaction, CompactPaths, CompactStats
from pyvolume.errors import NativeCode, StorageError, from_native, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files
from pyvolume.storage.mapped_volume import MappedVolume, adopt_or_log
from pyvolume.storage.superblock import SuperBlock

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

STEP_BYTES: Final = 8 << 20
"""Copied between two looks at the rate limit and the caller's wish to go on."""
PAUSE_MAX_S: Final = 0.5
REVISIONS: Final = 1 << 16


class CompactionInterrupted(StorageError):
    """The caller's progress callback said stop; the files of the attempt are gone."""


class RateLimit:
    """Keeps a job at so many bytes a second on the average; 0 is no limit."""

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._ready_s = time.monotonic()

    def pause_s(self, done_bytes: int) -> float:
        """Seconds to wait after done_bytes more were moved. Time that was not used is not saved up."""
        if self._rate <= 0:
            return 0.0
        now_s = time.monotonic()
        self._ready_s = max(self._ready_s, now_s - PAUSE_MAX_S) + done_bytes / self._rate
        return max(0.0, self._ready_s - now_s)

    def waits(self, done_bytes: int) -> Iterator[None]:
        """Sleeps what pause_s says, in pieces of at most PAUSE_MAX_S; yields after each, so that one can stop."""
        end_s = time.monotonic() + self.pause_s(done_bytes)
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, PAUSE_MAX_S))
            yield


def compact(
    volume: Volume,
    *,
    preallocate_bytes: int = 0,
    bytes_per_s: int = 0,
    go_on: Callable[[int], bool] = lambda _offset: True,
) -> CompactStats | None:
    """Copies what is live to `.cpd` and `.cpx`; None if the volume is busy already. Takes long.

    Reads and writes go on. go_on gets the offset of the source file reached after each step, and may end the copy
    (CompactionInterrupted). Raises StorageError with upstream's texts, NoSpace, DiskError; the volume is as before.
    """
    if volume.is_remote:
        raise StorageError(f"volume {volume.vid} backend is empty remote:true")
    if not volume.try_claim("vacuum"):
        log.info("volume %d is already compacting", volume.vid)
        return None
    try:
        return _compact(volume, preallocate_bytes, bytes_per_s, go_on)
    finally:
        volume.vacuum_offset = 0
        volume.release()


def _compact(volume: Volume, preallocate_bytes: int, bytes_per_s: int, go_on: Callable[[int], bool]) -> CompactStats:
    settle_marker(volume)
    discard(volume)
    stat = volume.stat()
    _check_room(volume, stat, preallocate_bytes)
    paths = paths_of(volume)
    block = SuperBlock.from_fields(volume.handle.superblock())
    block = replace(
        block,
        replica_placement=volume.replica_placement,
        compaction_revision=(block.compaction_revision + 1) % REVISIONS,
    )
    limit = RateLimit(bytes_per_s)
    copy: Compaction | None = None
    try:
        fault("compact.begin")
        copy = Compaction(
            volume.handle,
            paths,
            superblock=block.fields,
            volume_ttl_minutes=volume.ttl.minutes,
            now_s=int(volume.last_modified_s + volume.idle_s()),  # not ahead of the time, wherever the clock was set
            preallocate_bytes=preallocate_bytes,
        )
        before = copy.stat()
        more = True
        while more:
            fault("compact.step")
            more = copy.step(STEP_BYTES if not bytes_per_s else max(1 << 20, min(STEP_BYTES, bytes_per_s // 4)))
            after = copy.stat()
            volume.vacuum_offset = after.source_offset
            if not go_on(after.source_offset):
                raise CompactionInterrupted("interrupted")
            for _ in limit.waits(after.new_dat_bytes - before.new_dat_bytes):
                if not go_on(after.source_offset):
                    raise CompactionInterrupted("interrupted")
            before = after
        fault("compact.finish")
        copy.finish()
        stats = copy.stat()
        _tell_losses(volume, stats)
        _check_size(volume, stats)
        if isinstance(volume.handle, MappedVolume):
            volume.handle.prepare(paths.cpx, stats.new_idx_rows, block.compaction_revision)
    except engine.NativeError as exc:
        _give_up(copy, paths)
        raise from_native(exc.code, exc.info, vid=volume.vid, path=paths.cpd, operation="write") from exc
    except OSError as exc:
        _give_up(copy, paths)
        raise from_os_error(exc, "write", paths.cpd) from exc
    except BaseException:
        _give_up(copy, paths)
        raise
    volume.compaction = copy
    return stats


def _check_room(volume: Volume, stat: engine.VolumeStat, preallocate_bytes: int) -> None:
    needed = max(preallocate_bytes, stat.dat_bytes + stat.idx_bytes)
    free = shutil.disk_usage(volume.directory).free
    if free < needed:
        raise StorageError(
            f"insufficient free space for compaction: need {needed} bytes (volume: {stat.dat_bytes}, "
            f"index: {stat.idx_bytes}), but only {free} bytes available"
        )


def _check_size(volume: Volume, stats: CompactStats) -> None:
    """Upstream's last look before the copy counts: what was live when it began must be there."""
    if volume.ttl:
        return
    expected = stats.live_bytes - stats.dropped_bytes - stats.expired_bytes
    if expected > stats.new_dat_bytes:
        raise StorageError(
            f"volume {volume.vid} unexpected new data size: {stats.new_dat_bytes} does not match size of content "
            f"minus deleted: {expected}"
        )


def _tell_losses(volume: Volume, stats: CompactStats) -> None:
    if stats.dropped_needles:
        log.warning(
            "vacuum volume %d: left %d unreadable needles behind (%d bytes), first is key %x at offset %d of %s (%s)",
            volume.vid,
            stats.dropped_needles,
            stats.dropped_bytes,
            stats.first_dropped_key,
            stats.first_dropped_offset,
            volume.dat_path,
            engine.err_name(stats.first_dropped_code),
        )


def _drop_prepared(volume: Volume) -> None:
    if isinstance(volume.handle, MappedVolume):
        volume.handle.drop_prepared()


def _give_up(copy: Compaction | None, paths: CompactPaths) -> None:
    if copy is not None:
        copy.close()
    for path in (paths.cpd, paths.cpx):
        with contextlib.suppress(OSError):  # the next vacuum or load tries again
            files.remove_if_exists(path)


def paths_of(volume: Volume) -> CompactPaths:
    """Where the files of a vacuum of this volume are."""
    base, idx_base = volume.base_path, volume.idx_base_path
    return CompactPaths(
        cpd=base + ".cpd",
        dat=base + ".dat",
        cpx=idx_base + ".cpx",
        idx=idx_base + ".idx",
        cpc=base + ".cpc",
        dat_dir=os.path.dirname(base),
        idx_dir=os.path.dirname(idx_base),
    )


def commit(volume: Volume) -> bool:
    """Brings the changes since the copy over and puts the new files in place; False if the volume is busy already.

    Writers wait for the last part of the catch-up, readers never. A failure leaves the old files serving and removes
    the new ones (V2). Raises StorageError, DiskError, VolumeClosed.
    """
    if not volume.try_claim("vacuum commit"):
        log.info("volume %d is already compacting", volume.vid)
        return False
    try:
        copy = volume.compaction
        if copy is None:
            raise StorageError(f"volume {volume.vid} compact swap aborted: missing .cpd/.cpx")
        volume.compaction = None
        _commit(volume, copy)
        return True
    finally:
        volume.release()


def _commit(volume: Volume, copy: Compaction) -> None:
    paths = copy.paths
    try:
        fault("compact.commit")
        unfinished = copy.commit()
        adopt_or_log(volume.handle)
    except engine.NativeError as exc:
        _give_commit_up(volume, copy)
        if exc.code == NativeCode.ESTALE:
            raise StorageError(
                f"current old dat file's compact revision {exc.info.b} is not the expected one {exc.info.a - 1}"
            ) from exc
        raise from_native(exc.code, exc.info, vid=volume.vid, path=paths.cpd, operation="write") from exc
    except OSError as exc:
        _give_commit_up(volume, copy)
        raise from_os_error(exc, "write", paths.cpd) from exc
    copy.close()
    volume.compacted()
    if unfinished is not None:
        volume.swap_unfinished = True
        with contextlib.suppress(StorageError):
            settle_marker(volume)
            return
        reason = from_native(unfinished.code, unfinished, vid=volume.vid, path=paths.dat, operation="rename")
        log.error(
            "volume %d serves its compacted files, but they are not all in place: %s. The marker %s makes the next "
            "vacuum or load finish that: mend the cause, then mount the volume again",
            volume.vid,
            reason,
            paths.cpc,
        )
        return
    try:
        for extension in (".ldb", ".rdb"):
            files.remove_if_exists(volume.idx_base_path + extension)
        fault("compact.remove_marker")
        os.unlink(paths.cpc)
        files.sync_dir(paths.dat_dir)
    except OSError as exc:
        log.warning("volume %d: %s is left, the next load removes it: %s", volume.vid, paths.cpc, exc)


def _give_commit_up(volume: Volume, copy: Compaction) -> None:
    """After a commit that failed; what does not work now is done before the next vacuum."""
    volume.marker_left = bool(copy.stat().marker_left)
    _drop_prepared(volume)
    _give_up(copy, copy.paths)
    try:
        settle_marker(volume)
    except StorageError as exc:
        what = "it is read only until a vacuum can remove it, or the next mount" if volume.marker_left else "it stays"
        log.error("volume %d: a marker of a commit that failed is left, %s: %s", volume.vid, what, exc)


def settle_marker(volume: Volume) -> None:
    """Does what the marker of an earlier commit still asks for, and removes it. Raises DiskError; blocks on disk.
    Failpoint: compact.settle_marker.

    Must come before new files of that name are made: the marker would put a half-made copy in place at the next load,
    and a swap whose renames failed has the volume's own files under those names.
    """
    paths = paths_of(volume)
    if not files.exists(paths.cpc) and not volume.marker_left:
        return
    try:
        for source, target in ((paths.cpd, paths.dat), (paths.cpx, paths.idx)):
            if not volume.swap_unfinished:
                files.remove_if_exists(source)
            elif files.exists(source):
                os.rename(source, target)
        for place in dict.fromkeys((paths.dat_dir, paths.idx_dir)):
            files.sync_dir(place)
        if volume.swap_unfinished:
            for extension in (".ldb", ".rdb"):
                files.remove_if_exists(volume.idx_base_path + extension)
        volume.swap_unfinished = False
        fault("compact.settle_marker")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(paths.cpc)
        files.sync_dir(paths.dat_dir)
    except OSError as exc:
        raise from_os_error(exc, "settle", paths.cpc) from exc
    if volume.marker_left:
        volume.marker_left = False
        volume.refresh_read_only()


def cleanup(volume: Volume) -> None:
    """Drops a copy that will not be committed. Nothing there is success. Raises StorageError, DiskError."""
    if files.exists(paths_of(volume).cpc):
        raise StorageError(f"volume {volume.vid}: refusing cleanup while commit marker present")
    discard(volume)


def discard(volume: Volume) -> None:
    """Closes and removes what an earlier Compact has left."""
    copy, volume.compaction = volume.compaction, None
    if copy is not None:
        copy.close()
    _drop_prepared(volume)
    paths = paths_of(volume)
    try:
        for path in (paths.cpd, paths.cpx, volume.idx_base_path + ".cpldb"):
            files.remove_if_exists(path)
    except OSError as exc:
        raise from_os_error(exc, "remove") from exc
