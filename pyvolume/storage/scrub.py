"""Scrub of a mounted volume: does its index make sense, can every record be read (contract storage.md 24).

May import _native, volume, files and the leaves; not store. The engine looks, off every lock, at the files as they were
when it began; here are the rate limit, the interruption, the place to go on from, and upstream's texts. Upstream:
`weed/storage/volume_checking.go`, `weed/storage/idx/check.go`. Quirks kept: rows of overwritten and deleted needles are
read like live ones, and an index made by `weed fix` fails the total where a needle was overwritten.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyvolume._native import engine
from pyvolume._native.scrub import Scrub, ScrubFinding, ScrubStats
from pyvolume.errors import NativeCode, RemoteError, StorageError, from_native, os_error_text
from pyvolume.faults import fault
from pyvolume.storage import index_files
from pyvolume.storage.compact import RateLimit
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE
from pyvolume.storage.tier.handle import RemoteData, TieredVolume
from pyvolume.storage.tier.scan import Window

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

STEP_BYTES: Final = 16 << 20
"""Read between two looks at the rate limit and the caller's wish to go on."""
_BEGIN_TRIES: Final = 3
_LOOK_ROWS: Final = 64
"""Rows of a volume in a remote store between two looks at the caller's wish to go on."""


class ScrubInterrupted(StorageError):
    """The caller said stop. `position` is where a later scrub of the same volume may go on."""

    def __init__(self, position: ScrubPosition) -> None:
        super().__init__("interrupted")
        self.position = position


@dataclass(frozen=True, slots=True)
class ScrubPosition:
    """How far a FULL scrub has come: records before `offset` were read, with what was found. Plain data, for a file."""

    offset: int = 0
    revision: int = 0
    """Compaction revision the offset belongs to; a scrub of another one begins anew."""
    findings: tuple[tuple[int, str], ...] = ()
    """(row, text) of unreadable records met so far."""


@dataclass(slots=True)
class ScrubReport:
    """What a scrub says: `total_files` are the rows looked at, deletions included."""

    total_files: int = 0
    findings: list[str] = field(default_factory=list)
    position: ScrubPosition = field(default_factory=ScrubPosition, compare=False)
    """How far records were read: to the end."""


def go_on_always(_stats: ScrubStats) -> bool:
    return True


def note_nothing(_position: ScrubPosition) -> None:
    pass


def scrub_volume(
    volume: Volume,
    *,
    index_only: bool = False,
    bytes_per_s: int = 0,
    go_on: Callable[[ScrubStats], bool] = go_on_always,
    resume: ScrubPosition | None = None,
    note: Callable[[ScrubPosition], None] = note_nothing,
) -> ScrubReport:
    """Looks through one volume. Takes as long as reading its files; reads and writes of the volume go on.

    go_on is asked after each step; False ends the scrub with ScrubInterrupted, whose position `resume` takes. `note` is
    told of each step's position, which `resume` takes likewise. Damage is
    a finding; raises StorageError only for what has nothing to do with the volume (no memory), DiskError if its index
    cannot be read half way. Failpoint: scrub.step.
    """
    try:
        idx_fd = os.open(volume.idx_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        reason = os_error_text("open", volume.idx_path, exc.errno or errno.EIO)
        return ScrubReport(0, [f"failed to open IDX file {volume.idx_path} for volume {volume.vid}: {reason}"])
    handle = volume.handle
    if isinstance(handle, TieredVolume):
        try:
            return _scrub_remote(volume, handle.remote, idx_fd, index_only, bytes_per_s, go_on)
        finally:
            os.close(idx_fd)
    resume = resume if resume is not None else ScrubPosition()
    try:
        scrub, resume = _begin(volume, idx_fd, index_only, resume)
    except engine.NativeError as exc:
        if exc.code == NativeCode.ECLOSED:
            return ScrubReport(0, [f"volume {volume.vid} has no data backend"])
        raise from_native(exc.code, exc.info, vid=volume.vid, path=volume.idx_path) from exc
    try:
        stats = scrub.stat()
        if stats.idx_bytes == 0 and stats.dat_bytes > SUPER_BLOCK_SIZE:
            return ScrubReport(0, [f"zero-size IDX file for volume {volume.vid} with store size {stats.dat_bytes}"])
        return _look(volume, scrub, index_only, bytes_per_s, go_on, resume, note)
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, vid=volume.vid, path=volume.idx_path) from exc
    finally:
        scrub.close()


def _scrub_remote(
    volume: Volume,
    remote: RemoteData,
    idx_fd: int,
    index_only: bool,
    bytes_per_s: int,
    go_on: Callable[[ScrubStats], bool],
) -> ScrubReport:
    """Of a volume in a remote store: every record is fetched, in large pieces. Not to be resumed half way.

    A store that does not answer says nothing of the volume: RemoteError is raised then.
    """
    length_fd = os.memfd_create("length of the data")
    try:
        os.ftruncate(length_fd, remote.size)
        scrub = Scrub.of_files(length_fd, idx_fd, volume.offset_width, volume.version, index_only=True)
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, vid=volume.vid, path=volume.idx_path) from exc
    finally:
        os.close(length_fd)
    try:
        report = _look(volume, scrub, True, 0, go_on, ScrubPosition(), note_nothing)
        stats = scrub.stat()
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, vid=volume.vid, path=volume.idx_path) from exc
    finally:
        scrub.close()
    if index_only:
        return report
    limit, expected = RateLimit(bytes_per_s), SUPER_BLOCK_SIZE
    window = Window(lambda offset, length: remote.backend.read_at(remote.key, offset, length), remote.size)
    for number, row in enumerate(index_files.rows_of(idx_fd, volume.offset_width)):
        if row.offset == 0 and row.size < 0:
            continue
        length = engine.needle_record_len(row.size, volume.version)
        expected += length
        if row.size < 0:
            continue
        error = _remote_error(window, remote.size, row, volume, length)
        if error:
            report.findings.append(f"failed to read needle {row.key} on volume {volume.vid}: {error}")
        for _ in limit.waits(length):
            if not go_on(stats):
                raise ScrubInterrupted(ScrubPosition())
        if number % _LOOK_ROWS == 0 and not go_on(stats):
            raise ScrubInterrupted(ScrubPosition())
    total = total_text(volume.vid, stats._replace(dat_bytes=remote.size, expected_bytes=expected))
    if total:
        report.findings.append(total)
    return report


def _remote_error(window: Window, end: int, row: engine.IdxRow, volume: Volume, length: int) -> str:
    """Why a record in a remote store cannot be read, in upstream's words; empty if it can."""
    if row.offset + length > end:
        return "EOF"
    try:
        engine.parse_needle(window.take(row.offset, length), volume.version, row.size, offset=row.offset)
    except engine.NativeError as exc:
        return str(from_native(exc.code, exc.info, path=volume.dat_path, offset_width=volume.offset_width))
    except RemoteError as exc:
        if exc.is_transient:
            raise
        return str(exc)
    return ""


def _begin(volume: Volume, idx_fd: int, index_only: bool, resume: ScrubPosition) -> tuple[Scrub, ScrubPosition]:
    """Begins on the index as it stands at its path; takes the descriptor over.

    A vacuum may replace files between opening and beginning: then both are taken anew. What stays another file than the
    volume's own was put there by somebody, and is what upstream would look at.
    """
    tries = _BEGIN_TRIES
    while True:
        try:
            if resume.offset and resume.revision != volume.compaction_revision:
                resume = ScrubPosition()
            scrub = Scrub.of_volume(
                volume.handle, idx_fd, index_only=index_only, any_index=tries == 1, resume_offset=resume.offset
            )
            if scrub.stat().revision == resume.revision or not resume.offset:
                return scrub, resume
            scrub.close()
            resume = ScrubPosition()
        except engine.NativeError as exc:
            tries -= 1
            if exc.code not in (NativeCode.ESTALE, NativeCode.ECLOSED) or not tries or not volume.is_open:
                raise
        finally:
            os.close(idx_fd)
        idx_fd = os.open(volume.idx_path, os.O_RDONLY | os.O_CLOEXEC)


def _look(
    volume: Volume,
    scrub: Scrub,
    index_only: bool,
    bytes_per_s: int,
    go_on: Callable[[ScrubStats], bool],
    resume: ScrubPosition,
    note: Callable[[ScrubPosition], None],
) -> ScrubReport:
    overlaps: list[str] = []
    unreadable = list(resume.findings)
    for stats in run(scrub, bytes_per_s):
        for found in scrub.findings():
            if found.error is None:
                overlaps.append(overlap_text(found))
            else:
                unreadable.append((found.row, _record_text(volume, found)))
        here = ScrubPosition(max(stats.position, resume.offset), stats.revision, tuple(unreadable))
        if not go_on(stats):
            raise ScrubInterrupted(here)
        note(here)
    stats = scrub.stat()
    report = ScrubReport(
        stats.rows, overlaps, ScrubPosition(max(stats.position, resume.offset), stats.revision, tuple(unreadable))
    )
    size_text = index_size_text(stats, volume.offset_width)
    if size_text:
        report.findings.append(size_text)
    if not index_only:
        # upstream reads in the order of rows
        report.findings += [text for _, text in sorted(unreadable)]
        total = total_text(volume.vid, stats)
        if total:
            report.findings.append(total)
    return report


def run(scrub: Scrub, bytes_per_s: int) -> Iterable[ScrubStats]:
    """Steps through a scrub at a byte rate; gives the figures after each step, and again at least twice a second while
    it waits, so that the caller can stop. The caller takes the findings. Raises NativeError."""
    limit = RateLimit(bytes_per_s)
    step_bytes = STEP_BYTES if not bytes_per_s else max(256 << 10, min(STEP_BYTES, bytes_per_s // 4))
    more = True
    read_bytes = 0
    while more:
        fault("scrub.step")
        more = scrub.step(step_bytes)
        stats = scrub.stat()
        yield stats
        if more:
            for _ in limit.waits(stats.read_bytes - read_bytes):
                yield stats
        read_bytes = stats.read_bytes


def overlap_text(found: ScrubFinding) -> str:
    return (
        f"needle {found.key} (#{found.row + 1}) at [{found.offset}-{_signed(found.end)}] "
        f"overlaps needle {found.other_key} at [{found.other_offset}-{_signed(found.other_end)}]"
    )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _record_text(volume: Volume, found: ScrubFinding) -> str:
    return f"failed to read needle {found.key} on volume {volume.vid}: " + record_error_text(
        found, volume.dat_path, volume.offset_width
    )


def record_error_text(found: ScrubFinding, dat_path: str, width: int) -> str:
    """Why a record cannot be read, in upstream's words."""
    if found.error is None:
        return ""
    return str(from_native(found.error.code, found.error, path=dat_path, offset_width=width))


def index_size_text(stats: ScrubStats, width: int) -> str:
    """Empty if the index is whole rows. Quirk: upstream has the two numbers the wrong way round."""
    whole = stats.rows * (12 + width)
    return "" if whole == stats.idx_bytes else f"expected an index file of size {stats.idx_bytes}, got {whole}"


def total_text(vid: int, stats: ScrubStats) -> str:
    """Empty if the rows add up to the data file."""
    size, wanted = stats.dat_bytes, _signed(stats.expected_bytes)
    if size < wanted:
        return f"data file for volume {vid} is smaller ({size}) than the {stats.rows} needles it contains ({wanted})"
    if size != wanted:
        return (
            f"data file size for volume {vid} ({size}) doesn't match the size for {stats.rows} needles read ({wanted})"
        )
    return ""
