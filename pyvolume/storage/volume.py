"""One mounted volume: its files, its state, and the operations on its needles.

May import _native, the leaves, and the formats of storage (superblock, vif, files, needle_map, tier.handle); not
volume_load, disk_location, store.

The engine's handle owns descriptors, map, append offset and the order of appends; this class owns the handle's life
and every policy decision. Needle operations take no Python lock. `_state_lock` guards the read-only flags, the .vif
and the exchange of the handle; it may be held over disk writes of this volume's own small files, never over needle
I/O of others. Upstream: `weed/storage/volume.go`, `volume_read.go`, `volume_write.go`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pyvolume._native import engine
from pyvolume._native.compact import Compaction
from pyvolume.errors import (
    CorruptNeedle,
    CrcMismatch,
    DiskError,
    NativeCode,
    NeedleNotFound,
    RemoteError,
    StorageError,
    VolumeBusy,
    VolumeClosed,
    VolumeFull,
    VolumeLoadError,
    VolumeMoved,
    VolumeNotEmpty,
    VolumeReadOnly,
    disk_error,
    from_native,
    from_os_error,
    os_error_text,
)
from pyvolume.faults import fault
from pyvolume.lockwatch import WatchedLock, waiting_for
from pyvolume.storage import ec_files, files, vif
from pyvolume.storage.mapped_volume import MappedVolume
from pyvolume.storage.needle_map import RocksMaps, rocks_path_of
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.storage.tier.handle import RemoteData, TieredVolume
from pyvolume.types import ReplicaPlacement, Ttl, format_key_cookie, volume_base_name

if TYPE_CHECKING:
    from pyvolume.storage.disk_location import DiskLocation

log = logging.getLogger(__name__)

FLAG_COMPRESSED: Final = engine.FLAG_COMPRESSED
FLAG_HAS_NAME: Final = engine.FLAG_NAME
FLAG_HAS_MIME: Final = engine.FLAG_MIME
FLAG_HAS_LAST_MODIFIED: Final = engine.FLAG_LAST_MODIFIED
FLAG_HAS_TTL: Final = engine.FLAG_TTL
FLAG_HAS_PAIRS: Final = engine.FLAG_PAIRS
FLAG_CHUNK_MANIFEST: Final = engine.FLAG_MANIFEST

IO_ERROR_TOLERANCE: Final = 3
"""Consecutive EIOs after which a heartbeat quarantines the volume."""
PHANTOM_CHECK_INTERVAL_S: Final = 30.0
"""How long a .dat that was seen at its path counts as present."""
MAX_REMOVAL_DELAY_MINUTES: Final = 10
CLAIM_LOG_INTERVAL_S: Final = 30.0
"""How often a close that waits for a vacuum says so."""

VOLUME_FILE_EXTENSIONS: Final = ("dat", "idx", "vif", "sdx", "cpd", "cpx", "cpc", "ldb", "rdb", "note")
"""What deleting a volume removes beside both base names (contract storage.md 18), in this order."""
_OWN_EXTENSIONS: Final = ("rocks", "cpldb", "cpd.kept", "cpx.kept", "idx.tmp", "vif.tmp", "scrub", "scrub.tmp")

# For upstream's words on a blob with a negative size.
_HEADER_AND_CHECKSUM: Final = 20
_TIME: Final = 8

# Bits of the engine's info.d with a failed write: what failed.
_WRITE_EXISTING: Final = 1
_WRITE_INDEX: Final = 2
_WRITE_FLUSH: Final = 4


@dataclass(slots=True)
class NeedleIn:
    """A needle to be written. `flags` are stored as given (plus the ttl flag when the volume's ttl is inherited)."""

    id: int
    cookie: int
    data: bytes | bytearray | memoryview
    flags: int = 0
    name: bytes = b""
    mime: bytes = b""
    pairs: bytes = b""
    last_modified_s: int = 0
    ttl: Ttl = Ttl.NONE


@dataclass(frozen=True, slots=True)
class VolumeStatusInfo:
    """What a heartbeat tells of a volume: the fields of VolumeInformationMessage, and the largest key besides."""

    id: int
    size: int
    collection: str
    file_count: int
    delete_count: int
    deleted_byte_count: int
    read_only: bool
    replica_placement: int
    version: int
    ttl: int
    compact_revision: int
    modified_at_second: int
    remote_storage_name: str
    remote_storage_key: str
    disk_type: str
    disk_id: int
    max_file_key: int = 0


@dataclass(frozen=True, slots=True)
class VolumeShortInfo:
    """Identity of a volume in a delta: the fields of VolumeShortInformationMessage."""

    id: int
    collection: str
    replica_placement: int
    version: int
    ttl: int
    disk_type: str
    disk_id: int


@dataclass(frozen=True, slots=True)
class ReadOnlyReasons:
    """The flags behind `is_read_only`, read at one moment."""

    no_write_or_delete: bool
    no_write_can_delete: bool
    disk_space_low: bool

    def __bool__(self) -> bool:
        return self.no_write_or_delete or self.no_write_can_delete or self.disk_space_low


@dataclass(slots=True)
class HandleOptions:
    """How the engine's handle was opened: which files for reading only, and whether its map is the sorted file."""

    dat_readonly: bool = False
    idx_readonly: bool = False
    sorted_map: bool = False
    maps: RocksMaps | None = None
    """Where the map of a volume that may be written to lives; None: in the engine's memory."""
    map_timeout_h: int = 0
    remote: RemoteData | None = None
    """Where the data is, if it is not here."""

    @property
    def any_readonly(self) -> bool:
        return self.dat_readonly or self.idx_readonly

    @property
    def may_write(self) -> bool:
        """Whether this handle could ever take a write."""
        return not (self.any_readonly or self.sorted_map or self.remote is not None)

    def for_writing(self) -> HandleOptions:
        """The options of a handle on the same volume that may write."""
        return HandleOptions(maps=self.maps, map_timeout_h=self.map_timeout_h)


def running_s() -> float:
    """Seconds by a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Sight(NamedTuple):
    """What was seen of a volume's last change: when it was, by the wall clock, and how long ago it was at least."""

    modified_s: int
    idle_s: float
    at_s: float
    """By running_s."""


@dataclass
class _Busy:
    """Who has the volume for itself (a vacuum); guarded by the condition's lock."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    holder: str = ""


class Volume:
    """A volume whose files are open. Built by volume_load; all methods may be called from any thread.

    Errors of needle operations: NeedleNotFound, NeedleDeleted, CorruptNeedle (with path and offset), VolumeReadOnly,
    CookieMismatch, VolumeFull, DiskError / NoSpace (with errno), and VolumeClosed once the volume was unmounted, which
    readers should treat as "not found" (upstream's readers do).
    """

    def __init__(
        self,
        *,
        handle: engine.Volume,
        vid: int,
        collection: str,
        directory: str,
        idx_directory: str,
        location: DiskLocation | None,
        disk_id: int,
        version: int,
        offset_width: int,
        ttl: Ttl,
        replica_placement: ReplicaPlacement,
        info: vif.VolumeInfo,
        options: HandleOptions,
        no_write_or_delete: bool,
        no_write_can_delete: bool,
        dat_mtime_s: int,
    ) -> None:
        self.vid = vid
        self.collection = collection
        self.directory = directory
        self.idx_directory = idx_directory
        self.location = location
        self.disk_id = disk_id
        self.version = version
        self.offset_width = offset_width
        self.ttl = ttl
        self.replica_placement = replica_placement
        self.info = info
        self.on_reopen: Callable[[Volume], None] | None = None
        """Called under the state lock after the handle was exchanged; the store republishes it."""
        self.compaction: Compaction | None = None
        """A copy that waits for its commit; guarded by the claim."""
        self.vacuum_offset = 0
        """How far in .dat the copy of a vacuum under way is; read anywhere, written by the vacuum."""
        self.swap_unfinished = False
        """Renames of the last commit are still to be made, its marker is there; guarded by the claim."""
        self.marker_left = False
        """A commit failed and its marker may be on the disk: a change now could be lost at the next start, so there is
        none. Set under the claim."""
        self._handle = handle
        self._options = options
        self._state_lock = WatchedLock(f"the state of volume {vid}")
        self._appending = f"an append to volume {vid}"
        self._no_write_or_delete = no_write_or_delete
        self._no_write_can_delete = no_write_can_delete
        self._state: Literal["open", "closed", "destroyed"] = "open"
        self._busy = _Busy()
        self._dat_mtime_s = dat_mtime_s
        self._last_modified_floor_s = dat_mtime_s
        self.lacks_superblock = False
        """A tiered volume whose store did not answer when it was loaded: replication and ttl are not known."""
        self.lacks_info = False
        """The disk failed when its .vif was to be read: what that says is not known and must not be written over."""
        self._is_moving = False
        self._can_delete_before_tier: bool | None = None
        self._quarantined = False
        self._eio_forgiven = 0
        self._seen_on_disk_s = float("-inf")
        self._sight = _Sight(dat_mtime_s, max(0.0, time.time() - dat_mtime_s), running_s())

    def __repr__(self) -> str:
        return f"<Volume {self.vid} {self.base_path} {self._state}>"

    # ------------------------------------------------------------------------------------------------------- names

    @property
    def base_path(self) -> str:
        """Path of the data files without extension."""
        return f"{self.directory}/{volume_base_name(self.collection, self.vid)}"

    @property
    def idx_base_path(self) -> str:
        """Path of the index files without extension."""
        return f"{self.idx_directory}/{volume_base_name(self.collection, self.vid)}"

    @property
    def dat_path(self) -> str:
        return self.base_path + ".dat"

    @property
    def idx_path(self) -> str:
        return self.idx_base_path + ".idx"

    @property
    def vif_path(self) -> str:
        return self.base_path + ".vif"

    @property
    def disk_type(self) -> str:
        """Type of the location's disk; empty for hdd."""
        return self.location.disk_type if self.location is not None else ""

    # ------------------------------------------------------------------------------------------------------ figures

    @property
    def handle(self) -> engine.Volume:
        """The engine's handle, for the registry and for jobs that work on the files; may be closed at any time."""
        return self._handle

    @property
    def is_open(self) -> bool:
        return self._state == "open"

    @property
    def is_mapped(self) -> bool:
        """Whether the needle map lives outside of the engine, which then cannot look a key up by itself."""
        return isinstance(self._handle, MappedVolume)

    def stat(self) -> engine.VolumeStat:
        """All counters at one moment; does not wait for appends. Works on a closed volume, too (the last figures)."""
        return self._handle.stat()

    @property
    def content_bytes(self) -> int:
        """Sum of the sizes of all puts the map knows of, overwritten and deleted ones included."""
        return self.stat().file_bytes

    @property
    def dat_bytes(self) -> int:
        """Where the next record goes: the length of .dat, rounded up to 8 at open."""
        return self.stat().dat_bytes

    @property
    def idx_bytes(self) -> int:
        return self.stat().idx_bytes

    @property
    def file_count(self) -> int:
        """Puts, overwrites included."""
        return self.stat().file_count

    @property
    def deleted_count(self) -> int:
        return self.stat().deleted_count

    @property
    def deleted_bytes(self) -> int:
        return self.stat().deleted_bytes

    @property
    def max_file_key(self) -> int:
        return self.stat().max_key

    @property
    def compaction_revision(self) -> int:
        return self.stat().compaction_revision

    @property
    def modified_at_s(self) -> int:
        """mtime of .dat when it was opened, then the time of the last write that extended it. Unix seconds."""
        return self._modified_at_s(self.stat())

    def _modified_at_s(self, stat: engine.VolumeStat) -> int:
        return stat.last_write_wall_s or self._dat_mtime_s

    @property
    def last_modified_s(self) -> int:
        """mtime of .dat at open, or the largest LastModified written since: what expiry goes by. Deletes leave it."""
        return max(self._last_modified_floor_s, self.stat().last_modified_s)

    @property
    def is_remote(self) -> bool:
        """Whether the data lives in a remote tier."""
        return isinstance(self._handle, TieredVolume)

    @property
    def remote_storage(self) -> tuple[str, str]:
        """(backend name, key) of the first remote file; empty texts for a local volume."""
        if not self.info.files:
            return "", ""
        return self.info.files[0].backend_name, self.info.files[0].key

    @property
    def garbage_ratio(self) -> float:
        """Share of deleted bytes (contract storage.md 16)."""
        stat = self.stat()
        if stat.file_bytes == 0:
            return 0.0
        if stat.deleted_count > 0 and stat.deleted_bytes == 0:
            return (stat.dat_bytes - stat.file_bytes - SUPER_BLOCK_SIZE) / stat.dat_bytes
        return stat.deleted_bytes / stat.file_bytes

    # ------------------------------------------------------------------------------------------------ read-only state

    @property
    def no_write_or_delete(self) -> bool:
        """Marked so, on its way to a remote store, or with the marker of a failed commit on the disk."""
        return self._no_write_or_delete or self._is_moving or self.marker_left

    @property
    def no_write_can_delete(self) -> bool:
        return self._no_write_can_delete

    @property
    def read_only_reasons(self) -> ReadOnlyReasons:
        location = self.location
        return ReadOnlyReasons(
            self.no_write_or_delete, self._no_write_can_delete, location is not None and location.is_low
        )

    @property
    def is_read_only(self) -> bool:
        """Whether writes are refused, for whatever reason; the disk being low on space is one."""
        return bool(self.read_only_reasons)

    def set_read_only(self, can_delete: bool = False, persist: bool = False) -> None:
        """Refuses writes, and deletes too unless can_delete; persist keeps that in the .vif over restarts.

        Waits for an append under way. Raises StorageError / DiskError if the files cannot be opened for deletes or the
        .vif not written. Upstream: Store.MarkVolumeReadonly (and its quirk that a remote volume keeps its own mark).
        """
        with self._state_lock:
            if can_delete and not self.is_remote:
                self._reopen_for_writing()
            self._no_write_or_delete = not can_delete
            if can_delete:
                self._no_write_can_delete = True
            elif not self.is_remote:
                self._no_write_can_delete = False
            self._apply_read_only()
            if persist:
                self._persist_read_only(True, can_delete)

    def set_writable(self) -> None:
        """Clears all marks and the quarantine, and says so in the .vif. A remote volume stays no-write-can-delete.

        Raises StorageError / DiskError `volume %d reopen idx for write: …` if the files cannot be written; then nothing
        has changed. Upstream: Store.MarkVolumeWritable.
        """
        with self._state_lock:
            self._check_info()
            self._reopen_for_writing()
            self._no_write_or_delete = False
            if not self.is_remote:
                self._no_write_can_delete = False
            self._quarantined = False
            self._eio_forgiven = self.stat().eio_count
            self._apply_read_only()
            self._persist_read_only(False, False)

    def refresh_read_only(self) -> None:
        """Hands the current verdict to the engine: called after the location's free space crossed its limit."""
        with self._state_lock:
            if self._state == "open":
                self._apply_read_only()

    def _apply_read_only(self) -> None:
        """Needs the state lock. The engine refuses by itself what bypasses Python (the fast lane)."""
        reasons = self.read_only_reasons
        files_readonly = self._options.any_readonly
        no_write = bool(reasons) or not self._options.may_write
        try:
            self._handle.set_readonly(no_write, reasons.no_write_or_delete or files_readonly)
        except engine.NativeError as exc:
            raise self._error(exc, "truncate", self.dat_path) from exc

    def _persist_read_only(self, read_only: bool, can_delete: bool) -> None:
        self.info.read_only = read_only
        self.info.read_only_can_delete = read_only and can_delete
        self._save_info()

    def save_info(self, change: Callable[[vif.VolumeInfo], None] | None = None) -> None:
        """Applies a change to the .vif's fields and writes it. Raises StorageError / DiskError; blocks on disk."""
        with self._state_lock:
            if change is not None:
                change(self.info)
            self._save_info()

    def _check_info(self) -> None:
        if self.lacks_info:
            raise StorageError(f"volume {self.vid}: {self.vif_path} could not be read: mount the volume again")

    def _save_info(self) -> None:
        self._check_info()
        ttl_s = self.ttl.minutes * 60
        if ttl_s > 0:
            self.info.expire_at_sec = int(time.time()) + ttl_s
        vif.save(self.vif_path, self.info)

    def _reopen_for_writing(self) -> None:
        """Needs the state lock. Exchanges a handle whose files were opened read-only for one that may write."""
        if self._options.may_write or self.is_remote:
            return
        dat = files.check_file(self.dat_path)
        if dat.exists and not dat.can_write:
            raise disk_error(
                f"volume {self.vid} reopen idx for write: {os_error_text('open', self.dat_path, errno.EACCES)}",
                errno.EACCES,
                path=self.dat_path,
            )
        try:
            self._exchange_handle(self._options.for_writing(), self.idx_directory)
        except DiskError as exc:
            raise type(exc)(f"volume {self.vid} reopen idx for write: {exc}", exc.errno, path=exc.path) from exc

    def _exchange_handle(
        self, options: HandleOptions, idx_directory: str, *, settle: Callable[[], None] = lambda: None
    ) -> None:
        """Needs the state lock. Opens a second handle on the files, then closes the first; readers go over by a retry.

        No append can fall between the two: the old handle refuses writes before the new one reads the files. `settle`
        is called between: behind it nothing fails. On an error the old handle serves as before. A volume that was
        closed stays so (VolumeClosed): its files may be another's by now.
        """
        if self._state != "open":
            raise VolumeClosed(f"volume {self.vid} is closed")
        old = self._handle
        self._refuse_all(old)
        try:
            self._check_files(old)
            new = open_handle(
                self.dat_path,
                f"{idx_directory}/{volume_base_name(self.collection, self.vid)}.idx",
                vid=self.vid,
                options=options,
                offset_width=self.offset_width,
                ttl=self.ttl,
                last_append_at_ns=old.stat().last_append_at_ns,
                flush_failed=old.stat().flush_failed,
            )
            try:
                settle()
            except BaseException:
                with contextlib.suppress(engine.NativeError):
                    new.close()
                raise
        except BaseException:
            self._apply_read_only()
            raise
        self._take_over(new, options, idx_directory)

    def _check_files(self, old: engine.Volume) -> None:
        """Whether another handle would find just what the old one has. Raises StorageError, DiskError.

        It would take what a failed append left behind the end, and the old one cannot cut off, for data.
        """
        if self.swap_unfinished:
            raise StorageError(f"volume {self.vid}: the files of its last vacuum are not all in place")
        if isinstance(old, TieredVolume):
            return
        stat = old.stat()
        for path, end in ((self.dat_path, stat.dat_bytes), (self.idx_path, stat.idx_bytes)):
            if files.check_file(path).size > end:
                text = f"volume {self.vid}: half an append cannot be cut off {path} at {end}"
                raise disk_error(text, errno.EIO, path=path, offset=end)

    def _take_over(self, new: engine.Volume, options: HandleOptions, idx_directory: str) -> None:
        """Needs the state lock. Serves from a new handle from now on and closes the old one."""
        old = self._handle
        figures = old.stat()  # what the new handle cannot know
        self._dat_mtime_s = self._modified_at_s(figures)
        self._last_modified_floor_s = max(self._last_modified_floor_s, figures.last_modified_s)
        self._eio_forgiven = 0
        self._handle = new
        self._options = options
        self.idx_directory = idx_directory
        self._apply_read_only()
        if self.on_reopen is not None:
            self.on_reopen(self)
        try:
            old.close()
        except engine.NativeError as exc:
            log.warning("volume %d: closing the former handle of %s: %s", self.vid, self.dat_path, exc)

    # ------------------------------------------------------------------------------------------------- remote tier

    def hold_changes(self) -> None:
        """Refuses writes and deletes until release_changes, waiting for those under way: the data is being uploaded."""
        with self._state_lock:
            self._is_moving = True
            self._apply_read_only()

    def release_changes(self) -> None:
        """What was allowed before hold_changes is so again."""
        with self._state_lock:
            self._is_moving = False
            if self._state == "open":
                self._apply_read_only()

    def switch_to_remote(self, remote: RemoteData, file: vif.RemoteFile) -> None:
        """Names the object in the .vif, durably, then reads from it. From now on at most deletes are allowed.

        Under hold_changes. Raises StorageError `volume %d failed to save remote file info: …`, `… failed to load remote
        file: …`; then everything is as before. Failpoints: tier.save, those of vif.save, tier.swap.
        """
        with self._state_lock:
            self.info.files.append(file)
            try:
                fault("tier.save")
                self._save_info()
            except (OSError, StorageError) as exc:
                self.info.files.remove(file)
                with contextlib.suppress(StorageError):
                    self._save_info()  # the new text may be in place, only its flush failed
                raise StorageError(f"volume {self.vid} failed to save remote file info: {exc}") from exc
            try:
                fault("tier.swap")
                self._refuse_all(self._handle)
                options, handle = self._open_remote(remote)
            except (OSError, StorageError) as exc:
                self.info.files.remove(file)
                with contextlib.suppress(StorageError):
                    self._save_info()
                raise StorageError(f"volume {self.vid} failed to load remote file: {exc}") from exc
            self._can_delete_before_tier = self._no_write_can_delete
            self._no_write_can_delete = True
            self._take_over(handle, options, self.idx_directory)

    def _open_remote(self, remote: RemoteData) -> tuple[HandleOptions, engine.Volume]:
        """Needs the state lock. The map stays of its kind until the next load, but for one in a database."""
        old = self._options
        sorted_map = old.sorted_map or old.maps is not None
        options = HandleOptions(sorted_map=sorted_map, maps=old.maps, map_timeout_h=old.map_timeout_h, remote=remote)
        options.idx_readonly = old.idx_readonly
        handle = open_remote_handle(
            self.dat_path, self.idx_path, vid=self.vid, options=options, offset_width=self.offset_width, ttl=self.ttl
        )
        return options, handle

    def switch_to_local(self) -> vif.RemoteFile:
        """Takes the object out of the .vif, durably, then reads from the .dat, which is there; gives what it took out.

        Writes are allowed again if the volume was tiered since it was loaded and they were before; else not before the
        next load, as upstream. Raises StorageError `volume %d failed to save remote file info: …`, `… failed to open
        local dat file %s: …`; then everything is as before. Failpoints: tier.unsave, those of vif.save, tier.unswap.
        """
        with self._state_lock:
            file = self.info.files.pop(0)
            try:
                fault("tier.unsave")
                self._save_info()
            except (OSError, StorageError) as exc:
                self.info.files.insert(0, file)
                with contextlib.suppress(StorageError):
                    self._save_info()
                raise StorageError(f"volume {self.vid} failed to save remote file info: {exc}") from exc
            can_delete = self._no_write_can_delete
            options = self._options.for_writing()
            options.idx_readonly = self._options.idx_readonly
            try:
                fault("tier.unswap")
                if self._can_delete_before_tier is not None:
                    self._no_write_can_delete = self._can_delete_before_tier
                self._exchange_handle(options, self.idx_directory)
            except (OSError, StorageError) as exc:
                self._no_write_can_delete = can_delete
                self.info.files.insert(0, file)
                with contextlib.suppress(StorageError):
                    self._save_info()
                raise StorageError(f"volume {self.vid} failed to open local dat file {self.dat_path}: {exc}") from exc
            self._can_delete_before_tier = None
            return file

    def take_superblock(self, block: SuperBlock) -> None:
        """Replication and ttl of a tiered volume, which could not be read when it was loaded."""
        with self._state_lock:
            self.ttl = block.ttl
            if not self.info.replication:
                self.replica_placement = block.replica_placement
            self.lacks_superblock = False

    def relocate_index(self, new_directory: str) -> None:
        """Moves the index files to another directory. Reads go on, writes wait. Nothing to move is success.

        Raises VolumeBusy, StorageError `relocate index for volume %d: move .idx: …`: the index is where it was then.
        Blocks on disk. Upstream: Volume.RelocateIndexTo.
        """
        if self.idx_directory == new_directory or not files.exists(self.idx_path):
            return
        if not self.try_claim("relocate"):
            raise VolumeBusy(f"volume {self.vid} is compacting")
        try:
            with self._state_lock:
                self._relocate_index(new_directory)
        finally:
            self.release()

    def _relocate_index(self, new_directory: str) -> None:
        """Needs the state lock.

        The index has both names until a handle is open on the new one: a failure leaves the old handle on a file that
        has its name. Nothing is written meanwhile, so after a crash either name will do.
        """
        old_base = self.idx_base_path
        new_base = f"{new_directory}/{volume_base_name(self.collection, self.vid)}"
        old_path, new_path = old_base + ".idx", new_base + ".idx"
        what = f"relocate index for volume {self.vid}"
        if not files.exists(self.vif_path):
            self._save_info()  # a start finds the volume by it, once no index is beside the data
        self._refuse_all(self._handle)
        try:
            files.second_name(old_path, new_path)
        except OSError as exc:
            self._apply_read_only()
            reason = os_error_text("rename", f"{old_path} {new_path}", exc.errno or 0)
            raise disk_error(f"{what}: move .idx: {reason}", exc.errno or 0) from exc
        try:
            self._exchange_handle(self._options, new_directory, settle=lambda: files.drop_name(old_path))
        except (StorageError, OSError) as exc:
            try:
                files.remove_if_exists(new_path)
                files.remove_if_exists(rocks_path_of(new_path))
            except OSError as left:
                log.warning("volume %d: %s: %s (a copy that is not used)", self.vid, what, left)
            if isinstance(exc, OSError):
                reason = os_error_text("rename", f"{old_path} {new_path}", exc.errno or 0)
                raise disk_error(f"{what}: move .idx: {reason}", exc.errno or 0) from exc
            raise StorageError(f"{what}: {exc}") from exc
        try:
            files.remove_if_exists(rocks_path_of(old_path))
            if self._options.sorted_map:  # the new handle has made its own
                files.remove_if_exists(old_base + ".sdx")
            elif files.exists(old_base + ".sdx"):
                files.move_file(old_base + ".sdx", new_base + ".sdx")
        except OSError as exc:
            log.warning("relocate volume %d: move .sdx: %s (will rebuild)", self.vid, exc)

    # -------------------------------------------------------------------------------------------------------- reading

    def lookup(self, key: int) -> engine.Entry:
        """Where a key's record is; a negative size says deleted. Raises NeedleNotFound, VolumeClosed."""
        while True:
            handle = self._handle
            try:
                return handle.lookup(key)
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._error(exc, "read", self.dat_path, key) from exc

    def read_needle(self, key: int, *, read_deleted: bool = False, meta_ok: bool = False) -> engine.Needle:
        """Reads a needle and checks its CRC. With meta_ok one above 1 MiB may come without data (`meta_only`).

        An empty needle comes back with `empty` set and nothing else: its cookie was not read. One whose time to live is
        over is NeedleNotFound. The cookie is the caller's business. Blocks on disk without the interpreter's lock.
        """
        while True:
            handle = self._handle
            try:
                needle = handle.read(key, read_deleted=read_deleted, meta_ok=meta_ok)
                break
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._read_error(exc, handle, key) from exc
            except RemoteError:
                if self._handle is handle:  # else the data came back here meanwhile
                    raise
        if needle.flags & FLAG_HAS_TTL and needle.flags & FLAG_HAS_LAST_MODIFIED:
            minutes = Ttl(needle.ttl_count, needle.ttl_unit).minutes
            if minutes and time.time_ns() >= needle.append_at_ns + minutes * 60_000_000_000:
                raise NeedleNotFound("not found")
        return needle

    def stream_data(
        self, needle: engine.Needle, start: int = 0, length: int | None = None, chunk_bytes: int = 4 << 20
    ) -> Iterator[memoryview]:
        """Data bytes [start, start + length) of a needle that was read without its data, in pieces.

        Follows the needle when the volume is compacted meanwhile. When all of the data was asked for, the CRC is
        checked behind the last piece and CrcMismatch raised: by then the pieces are out, as upstream. Other errors:
        those of read_needle.
        """
        size = needle.data_size
        end = size if length is None else min(size, start + length)
        step = max(1, min(chunk_bytes, size))
        offset, revision = needle.data_offset, needle.entry_revision
        check = start == 0 and end == size
        crc = 0
        at = start
        ahead = self._stream_remote(offset + start, end - start, step)
        while at < end:
            want = min(step, end - at)
            try:
                piece = next(ahead, None)
                if piece is None:
                    piece = self.pread(offset + at, want, revision)
            except VolumeMoved:
                moved = self.read_needle(needle.id, meta_ok=True)
                # the same data: a vacuum writes a checksum of old releases in the present form
                same = needle.checksum in (moved.checksum, engine.crc_legacy(moved.checksum))
                if moved.data_size != size or moved.cookie != needle.cookie or not same or not moved.meta_only:
                    raise NeedleNotFound("not found") from None
                offset, revision = moved.data_offset, moved.entry_revision
                continue
            if check:
                crc = engine.crc32c(piece, crc)
            yield piece
            at += want
        if check and needle.checksum not in (crc, engine.crc_legacy(crc)):
            raise CrcMismatch(
                f"ReadNeedleData checksum {crc} expected {needle.checksum} for Needle: {self.vid},"
                f"{format_key_cookie(needle.id, needle.cookie)} Size:{needle.size}, DataSize:{size}",
                path=self.dat_path,
                offset=needle.entry_offset,
            )

    def _stream_remote(self, offset: int, length: int, step: int) -> Iterator[memoryview]:
        """Pieces of a tiered volume's data. Ends early, or at once, when the data is here: then pread goes on."""
        handle = self._handle
        if not isinstance(handle, TieredVolume):
            return
        try:
            yield from handle.stream(offset, length, step)
        except engine.NativeError as exc:
            raise self._error(exc, "read", self.dat_path) from exc
        except RemoteError:
            if self._handle is handle:
                raise

    def pread(self, offset: int, length: int, revision: int) -> memoryview:
        """Raw bytes of the data. Raises VolumeMoved if it was compacted since `revision`, CorruptNeedle `EOF`."""
        while True:
            handle = self._handle
            try:
                return handle.pread(offset, length, revision)
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._error(exc, "read", self.dat_path) from exc
            except RemoteError:
                if self._handle is handle:
                    raise

    # -------------------------------------------------------------------------------------------------------- writing

    def write_needle(self, needle: NeedleIn, *, check_cookie: bool = True, fsync: bool = False) -> engine.WriteResult:
        """Appends a needle; `unchanged` in the result means that the same data is there and nothing was written.

        With fsync the call returns when the data is on disk (many waiters share one flush). A needle without a ttl
        takes the volume's. A failed append leaves no trace and the volume writable. Blocks on disk. Raises
        VolumeReadOnly, VolumeClosed, CookieMismatch, VolumeFull, NoSpace, DiskError, CorruptNeedle (the header of the
        existing record cannot be read).
        """
        flags, ttl = needle.flags, needle.ttl
        if not ttl and self.ttl:
            flags, ttl = flags | FLAG_HAS_TTL, self.ttl
        while True:
            if self.is_read_only:
                raise VolumeReadOnly(f"volume {self.vid} is read only")
            handle = self._handle
            try:
                with waiting_for(self._appending):
                    return handle.write(
                        needle.id,
                        needle.cookie,
                        needle.data,
                        flags=flags,
                        name=needle.name,
                        mime=needle.mime,
                        pairs=needle.pairs,
                        last_modified_s=needle.last_modified_s,
                        ttl=(ttl.count, ttl.unit),
                        check_cookie=check_cookie,
                        fsync=fsync,
                    )
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._write_error(exc, needle.id) from exc

    def delete_needle(self, key: int, cookie: int, checksum: int = 0) -> int:
        """Appends a tombstone with this cookie and checksum; returns the deleted record's Size.

        0 if the key is absent, deleted already, or an empty file. Raises VolumeReadOnly only if deletes are refused,
        too (a disk low on space still deletes), VolumeClosed, NoSpace, DiskError. Blocks on disk; never synced.
        """
        while True:
            if self.no_write_or_delete:
                raise VolumeReadOnly(f"volume {self.vid} is read only")
            handle = self._handle
            try:
                with waiting_for(self._appending):
                    size, _ = handle.delete(key, cookie, checksum)
                return max(size, 0)
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._write_error(exc, key) from exc

    def delete_many(self, batch: engine.DeleteBatch, at: int) -> int:
        """Deletes some of the batch's items from `at` on, with one write to each file: how many were dealt with.

        0 if item `at` needs `read_needle` and `delete_needle`, which say what is the matter: the id is not plain, the
        needle is not there or not to be deleted so, deletes are refused, or the data or the map is not in the engine's
        hands. Negative: the same, because the files or the handle fail: the next items fare no better.
        Blocks on disk; never synced.
        """
        handle = self._handle
        if self.no_write_or_delete or type(handle) is not engine.Volume:
            return 0
        with waiting_for(self._appending):
            return handle.delete_many(batch, at)

    def write_blob(self, key: int, size: int, blob: bytes | bytearray | memoryview) -> engine.WriteResult:
        """Appends a ready record under `key` (its own id is not compared, its CRC not checked), with a new append time.

        Errors in upstream's order and words (contract storage.md 14). Blocks on disk.
        """
        while True:
            if self.is_read_only:
                raise VolumeReadOnly(f"volume {self.vid} is read only")
            handle = self._handle
            try:
                with waiting_for(self._appending):
                    return handle.write_blob(key, size, blob)
            except engine.NativeError as exc:
                if not self._superseded(handle, exc):
                    raise self._blob_error(exc, key, size, len(blob)) from exc

    def sync(self) -> None:
        """Flushes .dat and .idx. Raises DiskError, VolumeClosed."""
        fault("volume.sync")
        try:
            self._handle.sync()
        except engine.NativeError as exc:
            path = self.idx_path if exc.info.d else self.dat_path
            raise self._error(exc, "sync", path) from exc

    # --------------------------------------------------------------------------------------------------------- errors

    def _superseded(self, handle: engine.Volume, exc: engine.NativeError) -> bool:
        """Whether the call failed only because the handle was exchanged under it: then it is to be repeated."""
        if exc.code == NativeCode.EREADONLY:
            with self._state_lock:  # an exchange under way refuses writes on the old handle first
                return self._handle is not handle
        return exc.code == NativeCode.ECLOSED and self._handle is not handle

    def _error(self, exc: engine.NativeError, operation: str, path: str, key: int | None = None) -> StorageError:
        return from_native(
            exc.code,
            exc.info,
            vid=self.vid,
            path=path,
            operation=operation,
            key=key,
            offset_width=self.offset_width,
        )

    def _read_error(self, exc: engine.NativeError, handle: engine.Volume, key: int) -> StorageError:
        """As _error; damage is given the offset of the record."""
        error = self._error(exc, "read", self.dat_path, key)
        if isinstance(error, CorruptNeedle) and error.offset is None:
            with contextlib.suppress(engine.NativeError):
                error.offset = handle.lookup(key).offset
        return error

    def _write_error(self, exc: engine.NativeError, key: int) -> StorageError:
        """Upstream's texts around a failed append (`weed/storage/volume_write.go`, `needle/needle_write.go`)."""
        info = exc.info
        if exc.code == NativeCode.EFULL:
            if info.d:
                return VolumeFull(f"volume size limit {info.b} exceeded! current size is {info.a}")
            return VolumeFull(
                f"append to volume {self.vid} size 0 actualSize 0: Volume Size {info.a} Exceeded {info.b}"
            )
        if exc.code == NativeCode.ESYS:
            if info.d & _WRITE_EXISTING:
                error = self._error(exc, "read", self.dat_path)
                text = f"reading existing needle: {error}"
            elif info.d & _WRITE_FLUSH:
                error = self._error(exc, "sync", self.dat_path)
                text = str(error)
            elif info.d & _WRITE_INDEX:
                error = self._error(exc, "write", self.idx_path)
                text = f"index needle {key} of volume {self.vid} at offset {info.a}: {error}"
            else:
                error = self._error(exc, "write", self.dat_path)
                text = f"failed to write {info.b} bytes to {self.dat_path} at offset {info.a}: {error}"
                if exc.size:
                    text = f"append to volume {self.vid} size {exc.size} actualSize {info.b}: {text}"
            return disk_error(text, info.sys_errno, path=self.dat_path, offset=info.a)
        error = self._error(exc, "read", self.dat_path, key)
        if isinstance(error, CorruptNeedle):
            return type(error)(f"reading existing needle: {error}", path=error.path, offset=error.offset)
        return error

    def _blob_error(self, exc: engine.NativeError, key: int, size: int, given: int) -> StorageError:
        info = exc.info
        if exc.code == NativeCode.ESIZE:
            if info.a == 0:
                return StorageError(f"needle {key} blob of {info.b} bytes is shorter than a needle header")
            if info.a == 1:
                found = (info.c + (1 << 31)) % (1 << 32) - (1 << 31)
                return StorageError(f"needle {key} size {size} does not match its blob header size {found}")
            time_at = size + _HEADER_AND_CHECKSUM
            if time_at >= 0 and given < time_at + _TIME:
                return StorageError(f"needle blob buffer too small: need {time_at + _TIME} bytes, have {given}")
            return StorageError(f"invalid needle size {size} results in negative timestamp offset {time_at}")
        if exc.code == NativeCode.EBUFFER:
            return StorageError(f"needle blob buffer too small: need {info.a} bytes, have {info.b}")
        return self._write_error(exc, key)

    # ----------------------------------------------------------------------------------------------- exclusive holders

    @property
    def is_compacting(self) -> bool:
        """Whether a vacuum has the volume claimed."""
        with self._busy.changed:
            return bool(self._busy.holder)

    def try_claim(self, holder: str) -> bool:
        """Claims the volume for one exclusive job (a vacuum, a destruction); false if another has it. Does not wait."""
        with self._busy.changed:
            if self._busy.holder:
                return False
            self._busy.holder = holder
            return True

    def claim(self, holder: str) -> None:
        """As try_claim, but waits for the present holder to finish. May take as long as a vacuum does."""
        with self._busy.changed:
            while self._busy.holder:
                if not self._busy.changed.wait(CLAIM_LOG_INTERVAL_S):
                    log.warning("volume %d: %s waits for %s", self.vid, holder, self._busy.holder)
            self._busy.holder = holder

    def release(self) -> None:
        """Gives the claim back."""
        with self._busy.changed:
            self._busy.holder = ""
            self._busy.changed.notify_all()

    def compacted(self) -> None:
        """Takes note that the engine's handle has gone over to the compacted files. Called with the claim held."""
        with self._state_lock, contextlib.suppress(OSError):
            self._dat_mtime_s = int(os.stat(self.dat_path).st_mtime)

    # ------------------------------------------------------------------------------------------------------ end of life

    def close(self) -> None:
        """Waits for a running vacuum and running operations, syncs, closes. Later operations raise VolumeClosed.

        Idempotent. A failed sync is logged: the files are closed all the same. Blocks on disk.
        """
        self.claim("close")
        try:
            self.close_claimed()
        finally:
            self.release()

    def close_claimed(self) -> None:
        """As close, for whoever has claimed the volume."""
        self._close("closed")

    def _close(self, state: Literal["closed", "destroyed"]) -> None:
        with self._state_lock:
            self._state = state
            handle = self._handle
        if self.compaction is not None:
            self.compaction.close()
            self.compaction = None
        try:
            handle.close()
        except engine.NativeError as exc:
            path = self.idx_path if exc.info.d else self.dat_path
            log.warning("volume %d: closing: %s", self.vid, self._error(exc, "sync", path))

    @property
    def is_empty(self) -> bool:
        """What `only_empty` of a delete asks for: no record was ever written (deleted ones count as data)."""
        stat = self.stat()
        return stat.dat_bytes <= SUPER_BLOCK_SIZE and stat.file_bytes == 0

    def destroy(self, only_empty: bool = False, leave: Callable[[], object] | None = None) -> None:
        """Closes the volume and removes its files, data and idx directory alike.

        `leave` is called once nothing can stand in the way any more, before the volume is closed.

        Raises VolumeNotEmpty, VolumeBusy `volume %d is compacting`. A file that cannot be removed is logged, not
        raised, as upstream. The .vif stays when an EC volume of this id has its index on this disk. Blocks on disk.
        """
        if only_empty and not self.is_empty:
            raise VolumeNotEmpty("volume not empty")
        if not self.try_claim("destroy"):
            raise VolumeBusy(f"volume {self.vid} is compacting")
        try:
            if only_empty:
                self._stay_empty()
            keep_vif = ec_files.has_nonempty_ecx(
                self.directory,
                self.location.idx_directory if self.location is not None else self.idx_directory,
                volume_base_name(self.collection, self.vid),
            )
            if leave is not None:
                leave()
            self._close("destroyed")
            remove_volume_files(self.base_path, keep_vif)
            remove_volume_files(self.idx_base_path, keep_vif)
        finally:
            self.release()

    def _stay_empty(self) -> None:
        """Stops writes for good, unless one came in since the volume was seen empty: then raises VolumeNotEmpty."""
        with self._state_lock:
            self._refuse_all(self._handle)
            if not self.is_empty:
                self._apply_read_only()
                raise VolumeNotEmpty("volume not empty")

    def _refuse_all(self, handle: engine.Volume) -> None:
        """Waits for the append under way; none begins after it. A closed handle is fine."""
        try:
            handle.set_readonly(True, True)
        except engine.NativeError as exc:
            if exc.code != NativeCode.ECLOSED:
                raise self._error(exc, "truncate", self.dat_path) from exc

    # -------------------------------------------------------------------------------------------------------- heartbeat

    def to_info(self) -> VolumeStatusInfo | None:
        """What a heartbeat says of this volume; None when it must not be reported.

        That is: it is closed, or its .dat is gone from its path while files are counted (a phantom: open but deleted).
        Stats the path at most every 30 s, else no disk access.
        """
        stat = self.stat()
        if stat.closed or self._state != "open":
            return None
        if stat.file_count > 0 and not self.is_remote and self._is_phantom():
            return None
        name, key = self.remote_storage
        return VolumeStatusInfo(
            id=self.vid,
            size=stat.dat_bytes,
            collection=self.collection,
            file_count=stat.file_count,
            delete_count=stat.deleted_count,
            deleted_byte_count=stat.deleted_bytes,
            read_only=self.is_read_only,
            replica_placement=self.replica_placement.byte,
            version=self.version,
            ttl=self.ttl.to_u32(),
            compact_revision=stat.compaction_revision,
            modified_at_second=self._modified_at_s(stat),
            remote_storage_name=name,
            remote_storage_key=key,
            disk_type=self.disk_type,
            disk_id=self.disk_id,
            max_file_key=stat.max_key,
        )

    def short_info(self) -> VolumeShortInfo:
        """What a delta says of this volume."""
        return VolumeShortInfo(
            id=self.vid,
            collection=self.collection,
            replica_placement=self.replica_placement.byte,
            version=self.version,
            ttl=self.ttl.to_u32(),
            disk_type=self.disk_type,
            disk_id=self.disk_id,
        )

    def _is_phantom(self) -> bool:
        now = time.monotonic()
        if now - self._seen_on_disk_s <= PHANTOM_CHECK_INTERVAL_S:
            return False
        if not files.exists(self.dat_path):
            log.warning(
                "Volume %d: data file %s missing (held open as deleted FD) - not reporting to master",
                self.vid,
                self.dat_path,
            )
            return True
        self._seen_on_disk_s = now
        return False

    def check_io_health(self) -> bool:
        """False while the volume is quarantined: 3 EIOs in a row at the time of a heartbeat, until `set_writable`.

        Entering the quarantine makes the volume read-only in memory; nothing is deleted. May wait for an append.
        """
        with self._state_lock:
            count = self.stat().eio_count  # of the handle in force: another may have come while this waited
            if count < self._eio_forgiven:
                self._eio_forgiven = 0
            if not self._quarantined:
                if count - self._eio_forgiven < IO_ERROR_TOLERANCE:
                    return True
                self._quarantined = True
                log.warning("volume %d quarantined after %d consecutive IO errors: %s", self.vid, count, self.dat_path)
            if not self._no_write_or_delete and self._state == "open":
                self._no_write_or_delete = True
                self._apply_read_only()
        return False

    def idle_s(self) -> float:
        """Seconds since the last change: by the wall clock, but no more than can have passed since it was seen.

        A wall clock that jumps ahead makes nothing old (decision 0081). To be called now and then: what happened
        between two calls can have happened right after the former.
        """
        modified_s, now_s = self.last_modified_s, running_s()
        by_wall_s = int(time.time()) - modified_s
        sight = self._sight
        if modified_s != sight.modified_s:
            sight = _Sight(modified_s, max(0.0, min(by_wall_s, now_s - sight.at_s)), now_s)
        else:
            sight = _Sight(modified_s, sight.idle_s + now_s - sight.at_s, now_s)
        self._sight = sight
        return min(by_wall_s, sight.idle_s)

    def expired(self, dat_bytes: int, volume_size_limit: int) -> bool:
        """Whether a ttl volume with data was idle for longer than its ttl, in whole minutes. Unknown limit: never."""
        if volume_size_limit == 0 or dat_bytes <= SUPER_BLOCK_SIZE or self.ttl.minutes == 0:
            return False
        return self.ttl.minutes < int(self.idle_s() / 60)

    def expired_long_enough(self) -> bool:
        """Whether an expired volume may be destroyed: a tenth of its ttl, at most 10 minutes, after it expired."""
        minutes = self.ttl.minutes
        if minutes == 0:
            return False
        return (minutes + min(minutes // 10, MAX_REMOVAL_DELAY_MINUTES)) * 60 < int(self.idle_s())


def remove_volume_files(base_path: str, keep_vif: bool) -> None:
    """Removes what belongs to a volume beside one base path. Failures are logged and skipped. Blocks on disk.

    Upstream's set of files, and what repairs of ours may have put beside them.
    """
    names = [f"{base_path}.{extension}" for extension in VOLUME_FILE_EXTENSIONS if extension != "vif" or not keep_vif]
    names += [f"{base_path}.{extension}" for extension in _OWN_EXTENSIONS]
    directory, _, name = base_path.rpartition("/")
    with contextlib.suppress(OSError):
        names += [f"{directory}/{entry}" for entry in os.listdir(directory) if entry.startswith(f"{name}.torn-")]
    for path in names:
        try:
            size = files.remove_if_exists(path)
        except OSError as exc:
            log.info("failed to remove volume file %s: %s", path, from_os_error(exc, "unlinkat", path))
            continue
        if size >= 0 and path.endswith((".dat", ".idx")):
            log.info("removed volume file %s (size=%d)", path, size)


def sdx_path_of(idx_path: str) -> str:
    """The sorted file of an index."""
    return idx_path.removesuffix(".idx") + ".sdx"


def open_handle(
    dat_path: str,
    idx_path: str,
    *,
    vid: int,
    options: HandleOptions,
    offset_width: int,
    ttl: Ttl,
    last_append_at_ns: int = 0,
    read_only: tuple[bool, bool] = (False, False),
    flush_failed: bool = False,
    create: SuperBlock | None = None,
    preallocate_bytes: int = 0,
) -> engine.Volume:
    """Opens, or creates, the two files in the engine. `read_only` is (no write, no delete) to begin with.
    `flush_failed`: a flush of the data failed under the handle before this one.

    A map on disk that can be neither read nor made is held in memory instead; the log says so. Raises DiskError with
    upstream's words for the file that failed, VolumeLoadError. Blocks on disk: the whole index is read.
    """
    flags = engine.OpenFlag(0)
    maps = options.maps if options.may_write else None
    remote = options.remote
    if remote is not None:
        flags |= engine.OpenFlag.REMOTE
    if maps is not None:
        flags |= engine.OpenFlag.NO_MAP
    if options.dat_readonly:
        flags |= engine.OpenFlag.DAT_READONLY
    if options.idx_readonly:
        flags |= engine.OpenFlag.IDX_READONLY
    if options.sorted_map:
        flags |= engine.OpenFlag.SORTED_MAP
    if read_only[0]:
        flags |= engine.OpenFlag.NO_WRITE
    if read_only[1]:
        flags |= engine.OpenFlag.NO_DELETE
    if flush_failed:
        flags |= engine.OpenFlag.FLUSH_FAILED
    if create is not None:
        flags |= engine.OpenFlag.CREATE
    try:
        kind = TieredVolume if remote is not None else engine.Volume if maps is None else MappedVolume
        handle = kind.open(
            dat_path,
            idx_path,
            vid=vid,
            flags=flags,
            offset_width=offset_width,
            has_ttl=bool(str(ttl)),
            superblock=create.fields if create is not None else remote.superblock if remote is not None else None,
            remote_bytes=remote.size if remote is not None else 0,
            preallocate_bytes=preallocate_bytes,
            last_append_at_ns=last_append_at_ns,
            sdx_path=sdx_path_of(idx_path) if options.sorted_map else None,
        )
        if isinstance(handle, TieredVolume) and remote is not None:
            handle.attach(remote)
        if maps is None or not isinstance(handle, MappedVolume):
            return handle
        try:
            handle.attach(maps, idx_path, width=offset_width, timeout_h=options.map_timeout_h)
            return handle
        except StorageError as exc:
            log.error("%s; the map of volume %d is held in memory instead", exc, vid)
            engine.Volume.close(handle)
        return open_handle(
            dat_path,
            idx_path,
            vid=vid,
            options=replace(options, maps=None),
            offset_width=offset_width,
            ttl=ttl,
            last_append_at_ns=last_append_at_ns,
            read_only=read_only,
            flush_failed=flush_failed,
        )
    except engine.NativeError as exc:
        number = exc.info.sys_errno
        if exc.code != NativeCode.ESYS:
            error = from_native(exc.code, exc.info, vid=vid, path=dat_path, offset_width=offset_width)
            raise VolumeLoadError(f"cannot load volume data {dat_path}: {error}", path=dat_path) from exc
        path = idx_path if exc.info.d else dat_path
        reason = os_error_text("open", path, number)
        if exc.info.d:
            text = f"cannot {'read' if options.idx_readonly else 'write'} Volume Index {idx_path}: {reason}"
        elif number in (errno.EACCES, errno.EPERM):
            text = f"load data file {dat_path}: {reason}"
        else:
            text = f"cannot load volume data {dat_path}: {reason}"
        raise disk_error(text, number, path=path) from exc


def open_remote_handle(
    dat_path: str,
    idx_path: str,
    *,
    vid: int,
    options: HandleOptions,
    offset_width: int,
    ttl: Ttl,
    read_only: tuple[bool, bool] = (True, False),
) -> engine.Volume:
    """As open_handle for `options.remote`. A sorted file that cannot be made is done without: the log says so."""
    if options.sorted_map:
        try:
            return open_handle(
                dat_path,
                idx_path,
                vid=vid,
                options=options,
                offset_width=offset_width,
                ttl=ttl,
                read_only=read_only,
            )
        except StorageError as exc:
            log.info("%s: %s; the map is held in memory instead", sdx_path_of(idx_path), exc)
            options.sorted_map = False
    return open_handle(
        dat_path, idx_path, vid=vid, options=options, offset_width=offset_width, ttl=ttl, read_only=read_only
    )
