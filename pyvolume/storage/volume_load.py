"""From files to a mounted volume: what is checked, what is repaired, what is refused.

May import volume, needle_map, index_files, vif, superblock, files, _native and the leaves; not disk_location or store.
One broken volume never harms another: everything ends in a Volume or in an exception that names the file. Steps and
words follow `weed/storage/volume_loading.go` and `volume_checking.go` (contract storage.md 11); departures L1-L5, L8,
L9.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyvolume._native import engine
from pyvolume._native.engine import TailVerdict
from pyvolume.errors import (
    DiskError,
    RemoteError,
    StorageError,
    VolumeLoadError,
    disk_error,
    from_native,
    from_os_error,
    os_error_text,
)
from pyvolume.faults import fault
from pyvolume.storage import files, index_files, needle_map, vif
from pyvolume.storage.needle_map import RocksMaps
from pyvolume.storage.superblock import CURRENT_VERSION, SUPER_BLOCK_SIZE, SUPPORTED_VERSIONS, SuperBlock
from pyvolume.storage.tier import scan
from pyvolume.storage.tier.backends import Backends
from pyvolume.storage.tier.handle import RemoteData
from pyvolume.storage.volume import HandleOptions, Volume, open_handle, open_remote_handle, sdx_path_of
from pyvolume.types import ReplicaPlacement, Ttl, volume_base_name

if TYPE_CHECKING:
    from pyvolume.storage.disk_location import DiskLocation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How volumes of a server are loaded and made."""

    offset_width: int = 4
    """Bytes of stored offsets of new volumes, and of old ones that do not say."""
    repair: bool = True
    """False: files are left as they are found, and what upstream would not write to is read-only."""
    index_kind: str = "memory"
    index_timeout_h: int = 0
    """Hours after which the map on disk of a volume nobody uses is closed; 0: never."""
    maps: RocksMaps | None = None
    """Where maps of kinds other than memory live; made here if it is not given."""
    backends: Backends = field(default_factory=Backends)
    """The remote stores that tiered volumes are read from."""

    def __post_init__(self) -> None:
        if self.maps is None:
            object.__setattr__(self, "maps", needle_map.for_kind(self.index_kind))


@dataclass
class _Files:
    """The files of one volume while it is being loaded."""

    vid: int
    dat_path: str
    idx_path: str
    base_path: str
    dat: files.FileCheck
    block: SuperBlock
    width: int = 4
    last_append_at_ns: int = 0

    def look_again(self) -> None:
        """After a repair of .dat: the time of the last write stays what it was before."""
        size = os.stat(self.dat_path).st_size
        self.dat = files.FileCheck(True, self.dat.can_read, self.dat.can_write, self.dat.mtime_s, size)

    @property
    def dat_end(self) -> int:
        """The length of .dat rounded up to 8, as upstream counts it: a cut in the last padding is none."""
        return -(-self.dat.size // 8) * 8


def load_volume(
    directory: str,
    idx_directory: str,
    collection: str,
    vid: int,
    *,
    location: DiskLocation | None = None,
    disk_id: int = 0,
    options: LoadOptions | None = None,
) -> Volume:
    """Opens a volume whose .dat exists, after checking and, if allowed, repairing its files.

    Raises VolumeLoadError (or DiskError) with upstream's words; other volumes are not concerned. One log line for each
    repair and each reason to be read-only. Blocks on disk: the whole index is read.
    """
    options = options if options is not None else LoadOptions()
    name = volume_base_name(collection, vid)
    base_path = f"{directory}/{name}"
    vif_path = base_path + ".vif"
    known = vif.load(vif_path)
    if known.error:
        log.warning("load volume %d.vif file: %s", vid, known.error)
    info = known.info
    if known.has_remote_file:
        return _load_remote(directory, idx_directory, collection, vid, info, location, disk_id, options)
    no_write_can_delete = info.read_only and info.read_only_can_delete
    no_write_or_delete = (info.read_only and not info.read_only_can_delete) or known.disk_failed
    found = _open_data(vid, base_path)
    if not found.dat.can_write:
        log.info("opening %s in READONLY mode", found.dat_path)
        no_write_or_delete = True
    block = found.block
    info.version = block.version
    placement = _effective_placement(vid, info, block)
    if idx_directory != directory and files.exists(base_path + ".idx"):
        idx_directory = directory
    found.idx_path = f"{idx_directory}/{name}.idx"
    found.width = _offset_width(found, info, vif_path, options)
    info.bytes_offset = info.bytes_offset or found.width
    try:
        damaged = _check_and_repair(found, options)
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, vid=vid, path=found.dat_path, offset_width=found.width) from exc
    except OSError as exc:
        raise from_os_error(exc, "open", found.idx_path) from exc
    no_write_or_delete = no_write_or_delete or damaged
    low = location is not None and location.is_low
    # a volume that takes no writes is looked up in its sorted file, as upstream does
    handle_options = HandleOptions(
        dat_readonly=not found.dat.can_write,
        sorted_map=no_write_or_delete or no_write_can_delete,
        maps=options.maps,
        map_timeout_h=options.index_timeout_h,
    )
    refuse = (no_write_or_delete or no_write_can_delete or low, no_write_or_delete)
    handle = _open_checked(found, handle_options, block, refuse)
    volume = Volume(
        handle=handle,
        vid=vid,
        collection=collection,
        directory=directory,
        idx_directory=idx_directory,
        location=location,
        disk_id=disk_id,
        version=block.version,
        offset_width=found.width,
        ttl=block.ttl,
        replica_placement=placement,
        info=info,
        options=handle_options,
        no_write_or_delete=no_write_or_delete,
        no_write_can_delete=no_write_can_delete,
        dat_mtime_s=found.dat.mtime_s,
    )
    if known.disk_failed:
        volume.lacks_info = True
        log.error("volume %d is read only until %s can be read and it is mounted again", vid, vif_path)
    if not known.found:
        _save_first_info(volume)
    return volume


def create_volume(
    directory: str,
    idx_directory: str,
    collection: str,
    vid: int,
    *,
    replica_placement: ReplicaPlacement,
    ttl: Ttl = Ttl.NONE,
    preallocate_bytes: int = 0,
    version: int = CURRENT_VERSION,
    location: DiskLocation | None = None,
    disk_id: int = 0,
    options: LoadOptions | None = None,
) -> Volume:
    """Makes a new volume: .dat with its super block, an empty .idx, a .vif.

    A .dat that exists is loaded, as upstream does. The super block always says version 3, which is what is written
    (departure L8). A failure leaves no files behind. Raises StorageError / DiskError. Blocks on disk. Failpoints:
    create.open, vif.write, vif.rename.
    """
    options = options if options is not None else LoadOptions()
    if version not in SUPPORTED_VERSIONS:
        raise StorageError(f"volume super block version {version} is not supported")
    name = volume_base_name(collection, vid)
    base_path, dat_path, idx_path = f"{directory}/{name}", f"{directory}/{name}.dat", f"{idx_directory}/{name}.idx"
    dat = _look_at(dat_path)
    if dat.exists and dat.size > 0:
        return load_volume(
            directory, idx_directory, collection, vid, location=location, disk_id=disk_id, options=options
        )
    stale = _look_at(idx_path)
    if stale.exists and stale.size > 0:
        raise VolumeLoadError(
            f"cannot create volume {vid}: its index {idx_path} of {stale.size} bytes is there, its data is not",
            path=idx_path,
        )
    known = vif.load(base_path + ".vif")
    if known.disk_failed:
        raise StorageError(f"cannot create volume {vid}: {known.error}")
    info = known.info
    width = info.bytes_offset or options.offset_width
    block = SuperBlock(CURRENT_VERSION, replica_placement, ttl)
    handle_options = HandleOptions(maps=options.maps, map_timeout_h=options.index_timeout_h)
    try:
        fault("create.open")
        handle = open_handle(
            dat_path,
            idx_path,
            vid=vid,
            options=handle_options,
            offset_width=width,
            ttl=ttl,
            create=block,
            preallocate_bytes=preallocate_bytes,
        )
        try:
            handle.sync()  # a volume that was asked for and is empty survives a power cut, too
        except engine.NativeError as exc:
            handle.close()
            raise from_native(exc.code, exc.info, vid=vid, path=dat_path, operation="sync") from exc
    except (OSError, StorageError) as exc:
        for path in (dat_path, idx_path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if isinstance(exc, OSError):
            raise from_os_error(exc, "open", dat_path) from exc
        raise
    info.version = CURRENT_VERSION
    info.bytes_offset = width
    volume = Volume(
        handle=handle,
        vid=vid,
        collection=collection,
        directory=directory,
        idx_directory=idx_directory,
        location=location,
        disk_id=disk_id,
        version=CURRENT_VERSION,
        offset_width=width,
        ttl=ttl,
        replica_placement=replica_placement,
        info=info,
        options=handle_options,
        no_write_or_delete=info.read_only and not info.read_only_can_delete,
        no_write_can_delete=info.read_only and info.read_only_can_delete,
        dat_mtime_s=files.check_file(dat_path).mtime_s,
    )
    volume.refresh_read_only()
    if not known.found:
        _save_first_info(volume)
    return volume


def _look_at(path: str) -> files.FileCheck:
    """What stands where a new file is to be made; raises DiskError where that cannot be told."""
    found = files.check_file(path)
    if found.error:
        raise disk_error(os_error_text("stat", path, found.error), found.error, path=path)
    return found


def _save_first_info(volume: Volume) -> None:
    try:
        volume.save_info()
    except StorageError as exc:
        log.warning("volume %d failed to save file info: %s", volume.vid, exc)


# --------------------------------------------------------------------------------------------------------- first looks


def _open_data(vid: int, base_path: str) -> _Files:
    """Looks at .dat and reads its super block."""
    dat_path = base_path + ".dat"
    dat = files.check_file(dat_path)
    if not dat.exists:
        raise VolumeLoadError(f"volume data file {dat_path} does not exist", path=dat_path)
    if not dat.can_read:
        raise VolumeLoadError(f"cannot read Volume Data file {dat_path}", path=dat_path)
    if dat.size < SUPER_BLOCK_SIZE:
        raise VolumeLoadError(f"volume {dat_path} not initialized", path=dat_path, offset=dat.size)
    try:
        with files.opened(dat_path) as fd:
            block = SuperBlock.read(fd)
    except OSError as exc:
        what = "load data file" if exc.errno in (errno.EACCES, errno.EPERM) else "cannot load volume data"
        error = from_os_error(exc, "open", dat_path)
        raise type(error)(f"{what} {dat_path}: {error}", error.errno, path=dat_path) from exc
    except ValueError:
        raise VolumeLoadError(f"cannot read volume {vid} super block: EOF", path=dat_path) from None
    if not block.is_supported:
        raise VolumeLoadError(f"Unsupported volume {vid} version {block.version}", path=dat_path, offset=0)
    return _Files(vid, dat_path, "", base_path, dat, block)


def _effective_placement(vid: int, info: vif.VolumeInfo, block: SuperBlock) -> ReplicaPlacement:
    """What the .vif says, else the super block."""
    if not info.replication:
        return block.replica_placement
    try:
        return ReplicaPlacement.parse(info.replication)
    except ValueError as exc:
        raise VolumeLoadError(f"Error parse volume {vid} replication {info.replication} : {exc}") from None


def _offset_width(found: _Files, info: vif.VolumeInfo, vif_path: str, options: LoadOptions) -> int:
    try:
        with contextlib.ExitStack() as stack:
            dat_fd = stack.enter_context(files.opened(found.dat_path))
            idx_fd = stack.enter_context(files.opened(found.idx_path)) if files.exists(found.idx_path) else None
            width = index_files.resolve_width(
                info.bytes_offset, vif_path, dat_fd, idx_fd, found.block, options.offset_width
            )
    except OSError as exc:
        error = from_os_error(exc, "open")
        raise type(error)(f"cannot read Volume Index {found.idx_path}: {error}", error.errno, path=error.path) from exc
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, vid=found.vid, path=found.idx_path) from exc
    if not info.bytes_offset and width != options.offset_width:
        log.warning("volume %d: %s has %d byte offsets", found.vid, found.idx_path, width)
    return width


# -------------------------------------------------------------------------------------------------- checks and repairs


def _check_and_repair(found: _Files, options: LoadOptions) -> bool:
    """Brings index and data together; true if they do not fit so that the volume must be read-only.

    Raises VolumeLoadError when the volume cannot be served at all; OSError, NativeError.
    """
    may_repair = options.repair and found.dat.can_write
    if not files.exists(found.idx_path):
        if found.dat_end <= SUPER_BLOCK_SIZE:
            return False
        _rebuild_index(found, may_repair)
    with files.opened(found.dat_path) as dat_fd:
        summary = _summarize(found)
        if summary.leading_zero_rows and _recover_head(found, dat_fd, summary.leading_zero_rows):
            summary = _summarize(found)
        if summary.ragged_bytes:
            if not may_repair:
                raise VolumeLoadError(
                    f"unexpected file {found.idx_path} size: {summary.file_bytes}", path=found.idx_path
                )
            dropped = index_files.drop_ragged_tail(found.idx_path, found.width)
            log.warning(
                "volume %d: dropped %d bytes of half a row at the end of %s, at offset %d",
                found.vid,
                dropped,
                found.idx_path,
                summary.file_bytes - dropped,
            )
        hole = _find_hole(found, dat_fd, summary) if may_repair else None
        if hole is not None and _drop_rows_behind_hole(found, summary, hole):
            hole = None
            summary = _summarize(found)
        if (
            may_repair
            and summary.max_end
            and index_files.restore_padding(found.dat_path, found.dat.size, summary.furthest, found.block.version)
        ):
            log.warning("volume %d: put back the padding of the last record of %s", found.vid, found.dat_path)
            found.look_again()
        verdict, info = _check_tail(found, dat_fd)
        indexed_end = summary.max_end or found.block.block_bytes
        if may_repair and verdict in (TailVerdict.OK, TailVerdict.DAT_LONGER) and found.dat.size > indexed_end:
            if _index_tail(found, summary):
                verdict, info = _check_tail(found, dat_fd)
                summary = _summarize(found)
            else:
                verdict = TailVerdict.DAT_LONGER
                info = engine.NativeInfo(0, 0, found.dat_end, indexed_end, 0, 0)
    # needles that a hole hides are missing: nobody may write them anew as if they had never been
    return _is_damaged(found, summary, verdict, info) or hole is not None


def _summarize(found: _Files) -> engine.IdxSummary:
    with files.opened(found.idx_path) as idx_fd:
        return engine.idx_summarize(idx_fd, found.width, found.block.version, found.dat_end)


def _check_tail(found: _Files, dat_fd: int) -> tuple[TailVerdict, engine.NativeInfo]:
    with files.opened(found.idx_path) as idx_fd:
        verdict, info, found.last_append_at_ns = engine.check_tail(dat_fd, idx_fd, found.width, found.block.version)
    return verdict, info


def _rebuild_index(found: _Files, may_repair: bool) -> None:
    """Departure L1: upstream ends the process over a missing index."""
    text = f"check volume idx file {found.idx_path}: idx file {found.idx_path} does not exists"
    if not may_repair:
        raise VolumeLoadError(text, path=found.idx_path)
    try:
        repair = index_files.rebuild_index(
            found.dat_path, found.idx_path, found.base_path, width=found.width, block=found.block
        )
    except index_files.RepairRefused as exc:
        raise VolumeLoadError(
            f"{text}, and none can be made from {found.dat_path}: {exc}", path=found.idx_path
        ) from exc
    log.warning("volume %d: %s: %s", found.vid, text, repair.describe(found.dat_path, found.idx_path))
    found.dat = files.check_file(found.dat_path) if repair.torn_bytes else found.dat


def _recover_head(found: _Files, dat_fd: int, overwritten: int) -> bool:
    """Rows that deletes on a tiered volume of an old release wrote over: put back; a failure is no reason to refuse.
    True if the index is another one now."""
    try:
        restored = index_files.recover_head(
            dat_fd, found.idx_path, width=found.width, block=found.block, overwritten=overwritten
        )
    except (OSError, engine.NativeError) as exc:
        log.warning("volume %d: recover overwritten %s rows: %s", found.vid, found.idx_path, exc)
        return False
    if restored:
        log.info(
            "volume %d: recovered %d overwritten %s rows from %s", found.vid, restored, found.idx_path, found.dat_path
        )
    return restored > 0


def _find_hole(found: _Files, dat_fd: int, summary: engine.IdxSummary) -> int | None:
    """The first row that a power cut left out, or left half; None if there is none."""
    blank = summary.first_blank_row if summary.blank_rows else None
    with files.opened(found.idx_path) as idx_fd:
        torn = index_files.torn_row(
            dat_fd, idx_fd, width=found.width, block=found.block, end_row=summary.rows if blank is None else blank
        )
    return blank if torn is None else torn


def _drop_rows_behind_hole(found: _Files, summary: engine.IdxSummary, hole: int) -> bool:
    """What a power cut left of the index behind its first row that is not whole is not trusted."""
    text = f"row {hole} of {found.idx_path} is not whole"
    if summary.blank_rows:
        text = f"{summary.blank_rows} rows of zeros in {found.idx_path}, the first is row {summary.first_blank_row}"
    try:
        repair = index_files.drop_rows_behind_hole(
            found.dat_path,
            found.idx_path,
            found.base_path,
            width=found.width,
            block=found.block,
            first_blank=hole,
        )
    except index_files.RepairRefused as exc:
        log.warning("volume %d: %s, left alone because %s", found.vid, text, exc)
        return False
    except (OSError, engine.NativeError) as exc:
        log.error("volume %d: %s: repair failed: %s", found.vid, text, exc)
        return False
    log.warning("volume %d: %s: %s", found.vid, text, repair.describe(found.dat_path, found.idx_path))
    found.look_again()
    return True


def _index_tail(found: _Files, summary: engine.IdxSummary) -> bool:
    """Departure L3: upstream makes such a volume read-only until somebody runs an offline fix."""
    try:
        repair = index_files.index_tail(
            found.dat_path,
            found.idx_path,
            found.base_path,
            width=found.width,
            block=found.block,
            furthest=summary.furthest if summary.max_end else None,
        )
    except index_files.RepairRefused as exc:
        log.warning(
            "volume %d: %s has %d bytes behind the last indexed record at %d, left alone because %s",
            found.vid,
            found.dat_path,
            found.dat.size - summary.max_end,
            summary.furthest.offset,
            exc,
        )
        return False
    except (OSError, engine.NativeError) as exc:
        log.error("volume %d: repair of %s failed: %s", found.vid, found.dat_path, exc)
        return False
    log.warning("volume %d: %s", found.vid, repair.describe(found.dat_path, found.idx_path))
    found.look_again()
    return True


def _is_damaged(found: _Files, summary: engine.IdxSummary, verdict: TailVerdict, info: engine.NativeInfo) -> bool:
    """Says in one line why the volume is read-only, if it must be (upstream's words, then remedies: L5)."""
    damaged = False
    if verdict != TailVerdict.OK:
        log.warning(
            "volume %d: volumeDataIntegrityChecking failed CheckVolumeDataIntegrity %s failed: %s",
            found.vid,
            found.idx_path,
            _verdict_text(found, verdict, info),
        )
        damaged = True
    if summary.max_valid_end > found.dat_end:
        log.warning(
            "volume %d: idx references end=%d but .dat is %d bytes; marking readonly: %d needles of %s end behind %s, "
            "the first is %x; copy the volume from a replica, or run `pyvolume fix` to give them up",
            found.vid,
            summary.max_valid_end,
            found.dat_end,
            summary.past_end,
            found.idx_path,
            found.dat_path,
            summary.first_past_end_key,
        )
        damaged = True
    return damaged


def _verdict_text(found: _Files, verdict: TailVerdict, info: engine.NativeInfo) -> str:
    if verdict == TailVerdict.DAT_LONGER:
        return f"data file {found.dat_path} actual {info.a} bytes expected {info.b} bytes"
    if verdict == TailVerdict.DAT_SHORTER:
        return f"data file {found.dat_path} actual {info.b} bytes, the last record ends at {info.a}: EOF"
    if verdict == TailVerdict.IDX_RAGGED:
        return f"index file's size is {info.a} bytes, maybe corrupted"
    return str(from_native(info.code, info, path=found.dat_path, offset_width=found.width))


# ------------------------------------------------------------------------------------------------- in a remote tier


def _load_remote(
    directory: str,
    idx_directory: str,
    collection: str,
    vid: int,
    info: vif.VolumeInfo,
    location: DiskLocation | None,
    disk_id: int,
    options: LoadOptions,
) -> Volume:
    """Opens a volume whose .vif names an object; a .dat that may lie here, too, is not looked at.

    A store that does not answer is no reason to refuse: then version is the .vif's, and replication and ttl are not
    known before `Store.tend_tiered` finds it answering (upstream: before the next load). Raises VolumeLoadError for a
    store that is not known and for a missing index. Blocks on the network for a few seconds at most.
    """
    file = info.files[0]
    name = volume_base_name(collection, vid)
    base_path = f"{directory}/{name}"
    backend = options.backends.find(file.backend_name)
    if backend is None:
        text = f"load remote file {file.key}: backend storage {file.backend_name} not found"
        raise VolumeLoadError(text, path=base_path + ".vif")
    log.info("volume %d is tiered to %s as %s and read only", vid, file.backend_name, file.key)
    block, lacks_superblock = SuperBlock(info.version or CURRENT_VERSION, ReplicaPlacement(), Ttl.NONE), True
    try:
        block = SuperBlock.parse(bytes(backend.read_start(file.key, SUPER_BLOCK_SIZE)))
        info.version, lacks_superblock = block.version, False
    except RemoteError as exc:
        log.error("readSuperBlock remote volume %d: %s", vid, exc)
    if not block.is_supported:
        raise VolumeLoadError(f"Unsupported volume {vid} version {block.version}", path=base_path + ".vif")
    placement = _effective_placement(vid, info, block)
    if idx_directory != directory and files.exists(base_path + ".idx"):
        idx_directory = directory
    idx_path = f"{idx_directory}/{name}.idx"
    if not files.exists(idx_path):
        raise VolumeLoadError(f"check volume idx file {idx_path}: idx file {idx_path} does not exists", path=idx_path)
    width = info.bytes_offset or options.offset_width
    remote = RemoteData(backend, file.key, file.file_size, block.fields)
    if options.repair:
        try:
            _repair_remote_index(vid, idx_path, width, block, remote)
        except (OSError, StorageError, engine.NativeError) as exc:
            log.warning("volume %d: recover overwritten %s rows: %s", vid, idx_path, exc)
    handle_options = HandleOptions(
        sorted_map=True, maps=options.maps, map_timeout_h=options.index_timeout_h, remote=remote
    )
    handle = open_remote_handle(
        base_path + ".dat", idx_path, vid=vid, options=handle_options, offset_width=width, ttl=block.ttl
    )
    volume = Volume(
        handle=handle,
        vid=vid,
        collection=collection,
        directory=directory,
        idx_directory=idx_directory,
        location=location,
        disk_id=disk_id,
        version=block.version,
        offset_width=width,
        ttl=block.ttl,
        replica_placement=placement,
        info=info,
        options=handle_options,
        no_write_or_delete=False,
        no_write_can_delete=True,
        dat_mtime_s=file.modified_time or files.check_file(base_path + ".vif").mtime_s,
    )
    volume.lacks_superblock = lacks_superblock
    return volume


def _repair_remote_index(vid: int, idx_path: str, width: int, block: SuperBlock, remote: RemoteData) -> None:
    """Half a row at the end goes (L4); rows at the head that an old release's deletes wrote over come back."""
    with files.opened(idx_path) as idx_fd:
        summary = engine.idx_summarize(idx_fd, width, block.version, remote.size)
    if summary.ragged_bytes:
        dropped = index_files.drop_ragged_tail(idx_path, width)
        log.warning("volume %d: dropped %d bytes of half a row at the end of %s", vid, dropped, idx_path)
    if not summary.leading_zero_rows:
        return
    window = scan.Window(lambda offset, length: remote.backend.read_at(remote.key, offset, length), remote.size)
    records = scan.headers(window, block.version, block.block_bytes, remote.size)
    first = itertools.islice(records, summary.leading_zero_rows)
    restored = index_files.restore_head(first, idx_path, width=width)
    if restored:
        log.info("volume %d: recovered %d overwritten %s rows from %s", vid, restored, idx_path, remote.key)


# ------------------------------------------------------------------------------------------------------------- opening


def _open_checked(found: _Files, options: HandleOptions, block: SuperBlock, refuse: tuple[bool, bool]) -> engine.Volume:
    """Opens both files; an index that may not be written to only for reading, if the volume is read-only anyway."""
    if options.sorted_map:
        try:
            return _open(found, options, block, refuse)
        except StorageError as exc:
            log.info("%s: %s; the map is held in memory instead", sdx_path_of(found.idx_path), exc)
            options.sorted_map = False
    try:
        return _open(found, options, block, refuse)
    except DiskError as exc:
        if not refuse[1] or exc.path != found.idx_path or exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        log.info("open to read file %s: %s", found.idx_path, os_error_text("open", found.idx_path, exc.errno))
        options.idx_readonly = True
        return _open(found, options, block, refuse)


def _open(found: _Files, options: HandleOptions, block: SuperBlock, refuse: tuple[bool, bool]) -> engine.Volume:
    return open_handle(
        found.dat_path,
        found.idx_path,
        vid=found.vid,
        options=options,
        offset_width=found.width,
        ttl=block.ttl,
        last_append_at_ns=found.last_append_at_ns,
        read_only=refuse,
    )
