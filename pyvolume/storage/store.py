"""All volumes of this server: which exist, on which disk, and every change of that.

May import everything of storage, _native and the leaves; not ops or server.

The membership lock guards which volumes are held, nothing else: no disk access, logging, callback or other lock under
it. Changes of one id (allocate, mount, unmount, delete) exclude each other by a lock of that id, which is taken first
and may be held over disk access. Looking a volume up takes no lock. The registry mirrors what Python holds for the
fast lane and is edited here only. Upstream: `weed/storage/store.go`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from pyvolume._native import engine
from pyvolume.config import DirConfig
from pyvolume.errors import (
    BadRequest,
    NativeCode,
    NoFreeLocation,
    RemoteError,
    StorageError,
    VolumeBusy,
    VolumeExists,
    VolumeNotEmpty,
    VolumeNotFound,
    from_os_error,
    os_error_text,
)
from pyvolume.faults import fault
from pyvolume.lockwatch import WatchedLock
from pyvolume.security_config import DiskProbeConfig
from pyvolume.storage import compact, copy, files, vif
from pyvolume.storage.disk_location import DiskLocation
from pyvolume.storage.ec import encode
from pyvolume.storage.ec.members import EcMembers
from pyvolume.storage.ec.volume import EcShardsInfo
from pyvolume.storage.state import StateFile
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.storage.tier import move
from pyvolume.storage.tier.backends import Backend, Backends, Watcher
from pyvolume.storage.tier.handle import TieredVolume
from pyvolume.storage.volume import NeedleIn, Volume, VolumeShortInfo, VolumeStatusInfo
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement, Ttl, is_plain_file_part, volume_base_name

log = logging.getLogger(__name__)

ChangeKind = Literal["new", "deleted", "new-ec", "deleted-ec"]
ChangeListener = Callable[[ChangeKind, VolumeShortInfo | EcShardsInfo], None]

_CLOSE_WORKERS: Final = 16
_SYNC_WORKERS: Final = 8


class StoreConfig(Protocol):
    """What the store needs to know; config.ServerConfig has it."""

    @property
    def dirs(self) -> tuple[DirConfig, ...]: ...
    @property
    def ip(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def server_id(self) -> str: ...
    @property
    def index_kind(self) -> str: ...
    @property
    def index_leveldb_timeout_h(self) -> int: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def repair_on_load(self) -> bool: ...


class _IdLocks:
    """One lock for each id in use; an id that nobody holds or waits for costs nothing."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[int, tuple[WatchedLock, int]] = {}

    @contextlib.contextmanager
    def hold(self, vid: int) -> Iterator[None]:
        """Waits for the lock, for as long as a vacuum takes if an unmount waits for one."""
        with self.attempt(vid, wait=True):
            yield

    @contextlib.contextmanager
    def attempt(self, vid: int, *, wait: bool = False) -> Iterator[bool]:
        """Gives whether the lock was got; without `wait` at once."""
        with self._guard:
            lock, users = self._locks.get(vid) or (WatchedLock(f"the lock of volume id {vid}"), 0)
            self._locks[vid] = (lock, users + 1)
        try:
            got = lock.acquire(wait)
            try:
                yield got
            finally:
                if got:
                    lock.release()
        finally:
            with self._guard:
                lock, users = self._locks[vid]
                if users == 1:
                    del self._locks[vid]
                else:
                    self._locks[vid] = (lock, users - 1)


@dataclass
class _Progress:
    """Counts entries loaded over all locations."""

    report: Callable[[int, int], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0
    total: int = 0

    def __call__(self, done: int, more: int) -> None:
        with self.lock:
            self.done += done
            self.total += more
            counts = self.done, self.total
        self.report(*counts)


class Store:
    """The storage of one server process. Thread-safe unless said otherwise.

    Use: construct, `load`, serve, `close`. `volume_size_limit` (bytes, 0 = not known yet) and `preallocate` are set by
    whoever talks to the master.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.volume_size_limit = 0
        self.preallocate = False
        self.registry = engine.Registry()
        self._lock = WatchedLock("the membership of volumes")
        self._ids = _IdLocks()
        self._by_vid: dict[int, Volume] = {}
        self._registry_lock = WatchedLock("the registry of volumes")
        self._listeners: list[ChangeListener] = []
        self._max_file_key = 0
        self._loaded = False
        self.copy_room = copy.CopyRoom()
        self.backends = Backends()
        self._objects = ThreadPoolExecutor(1, thread_name_prefix="tier-delete")
        """Removes the objects of expired volumes, for which nobody waits."""
        self.options = LoadOptions(
            offset_width=config.offset_bytes,
            repair=config.repair_on_load,
            index_kind=config.index_kind,
            index_timeout_h=config.index_leveldb_timeout_h,
            backends=self.backends,
        )
        self.locations = [
            DiskLocation(directory, disk_id, self.options, self._lock) for disk_id, directory in enumerate(config.dirs)
        ]
        self.ec = EcMembers(self.locations, self._ids.hold, self._ids.attempt, self._notify, self._coded_came_or_went)
        self.state = StateFile(self.locations[0].idx_directory if self.locations else ".")

    # ------------------------------------------------------------------------------------------------- start and stop

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Locks all directories, loads all volumes (all disks at once), reads state.pb. Blocks on disk.

        Raises DirectoryInUse, or StorageError for a directory without a uuid and an unreadable state; then nothing is
        held. A broken volume is logged and left out. `progress(done, total)` is called from the loading threads.
        """
        try:
            for location in self.locations:
                location.open()
                copy.recover(location.directory, location.idx_directory)
            self.check_free_space()
            counter = _Progress(progress) if progress is not None else None
            self._load_locations(at_startup=True, progress=counter)
            self._loaded = True
            for location in self.locations:  # upstream's timeout goes for volumes found at start, and new ones
                location.options = replace(location.options, index_timeout_h=0)
            self.ec.load(at_startup=True)
            try:
                self.state.load()
            except StorageError as exc:
                raise StorageError(f"failed to resolve state for volume {self.config.server_id}: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def load_new_volumes(self) -> None:
        """Loads volumes whose files came to the directories since (SIGHUP). They are not announced as deltas."""
        self._load_locations(at_startup=True, progress=None)
        self.ec.load(at_startup=False)

    def _load_locations(self, *, at_startup: bool, progress: _Progress | None) -> None:
        distinct: list[DiskLocation] = []
        for location in self.locations:
            if any(location.is_same_place(other) for other in distinct):
                log.warning("directory %s is given twice: its volumes are served once", location.directory)
            else:
                distinct.append(location)

        def run(location: DiskLocation) -> None:
            twins = [other for other in self.locations if other is not location and location.is_same_place(other)]
            location.load_existing(
                take=lambda volume: self._take_loaded(location, volume),
                hold=self._ids.hold,
                skip=lambda vid: any(twin.find(vid) is not None for twin in twins),
                progress=progress,
                at_startup=at_startup,
            )

        if not distinct:
            return
        with ThreadPoolExecutor(len(distinct), thread_name_prefix="load-disk") as pool:
            for future in [pool.submit(run, location) for location in distinct]:
                future.result()

    def _take_loaded(self, location: DiskLocation, volume: Volume) -> None:
        """A volume found by a directory scan becomes a member. Needs the id's lock."""
        other = self.find_volume(volume.vid)
        self._join(location, volume)
        if other is not None:
            log.error(
                "volume %d is on two disks of this server: %s and %s; %s is served, compare them and delete one",
                volume.vid,
                other.base_path,
                volume.base_path,
                (self.find_volume(volume.vid) or volume).base_path,
            )

    def sync(self, deadline_s: float | None = None) -> int:
        """Flushes all volumes, several at a time; what fails is logged. Blocks on disk.

        With a deadline (of the monotonic clock) it returns then at the latest; threads that are stuck in a flush are
        left to themselves. Returns how many volumes are not flushed.
        """
        work = deque(self.volumes())
        left = total = len(work)
        done = threading.Condition()

        def flush() -> None:
            nonlocal left
            while work:
                try:
                    volume = work.popleft()
                except IndexError:
                    return
                try:
                    volume.sync()
                except StorageError as exc:
                    log.warning("volume %d: sync: %s", volume.vid, exc)
                except Exception:  # the others are to be flushed all the same
                    log.exception("volume %d: sync", volume.vid)
                with done:
                    left -= 1
                    done.notify()

        for number in range(min(_SYNC_WORKERS, left)):
            threading.Thread(target=flush, name=f"sync_{number}", daemon=True).start()
        with done:
            limit = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            done.wait_for(lambda: left == 0, limit)
            missing = left
        work.clear()
        if missing:
            log.warning("flushing volumes: %d of %d are not done in time, going on", missing, total)
        return missing

    def close(self) -> None:
        """Closes all volumes and gives the directories back. Waits for running vacuums. Idempotent; blocks on disk."""
        volumes = self.volumes()
        if volumes:
            with ThreadPoolExecutor(min(_CLOSE_WORKERS, len(volumes)), thread_name_prefix="close") as pool:
                for future in [pool.submit(self._drop, volume) for volume in volumes]:
                    future.result()
        self.ec.close()
        self._objects.shutdown(wait=False, cancel_futures=True)
        for location in self.locations:
            location.release()

    def _drop(self, volume: Volume) -> None:
        with self._ids.hold(volume.vid):
            self._end_service(volume)

    def _end_service(self, volume: Volume) -> None:
        """Needs the id's lock. Served until a vacuum that has the volume is done, then gone and closed."""
        volume.claim("unmount")
        try:
            self._leave(volume)
            volume.close_claimed()
        finally:
            volume.release()

    # ----------------------------------------------------------------------------------------------------- membership

    def find_volume(self, vid: int) -> Volume | None:
        """The volume served under an id: that of the first location that has it. Takes no lock."""
        return self._by_vid.get(vid)

    def has_volume(self, vid: int) -> bool:
        return vid in self._by_vid

    def volumes(self) -> list[Volume]:
        """All volumes held, by location, then id."""
        return [volume for location in self.locations for volume in location.volumes()]

    def copies(self, vid: int) -> list[Volume]:
        """The volumes of an id on all disks, in their order; more than one only if something went wrong."""
        with self._lock:
            return [v for location in self.locations if (v := location.find(vid)) is not None]

    def _join(self, location: DiskLocation, volume: Volume) -> None:
        """Makes a volume a member and publishes it. Needs the id's lock; the location does not hold the id."""
        volume.on_reopen = self._republish
        with self._lock:
            location.add(volume)
            self._settle(volume.vid)
        volume.refresh_read_only()  # the disk may have become low while it was being loaded
        self._republish(volume)

    def _leave(self, volume: Volume) -> bool:
        """Ends a membership; false if it had none. Needs the id's lock. The files stay open."""
        location = volume.location
        if location is None:
            return False
        with self._lock:
            removed = location.remove(volume)
            if removed:
                self._settle(volume.vid)
        if removed:
            self._republish(volume)
        return removed

    def _settle(self, vid: int) -> None:
        """Needs the membership lock: which of the copies of an id is served."""
        for location in self.locations:
            volume = location.find(vid)
            if volume is not None:
                self._by_vid[vid] = volume
                return
        self._by_vid.pop(vid, None)

    def _coded_came_or_went(self, vid: int) -> None:
        """A plain volume beside an erasure coded one is not served by the fast lane: deletes go to the shards."""
        self._republish_id(vid)

    def _republish(self, volume: Volume) -> None:
        self._republish_id(volume.vid)

    def _republish_id(self, vid: int) -> None:
        """Brings the registry's entry of this id up to date with what is served. Never blocks on disk."""
        with self._registry_lock:
            served = self._by_vid.get(vid)
            with contextlib.suppress(engine.NativeError):
                self.registry.withdraw(vid)
            if served is None:
                self._publish_shards(vid)
                return
            # A map on disk cannot be asked without the interpreter's lock: such a volume is none for the fast lane.
            if served.is_open and not served.is_remote and self.ec.find(vid) is None and not served.is_mapped:
                try:
                    self.registry.publish(
                        vid,
                        served.handle,
                        copies=served.replica_placement.copy_count,
                        ttl=(served.ttl.count, served.ttl.unit),
                    )
                except engine.NativeError as exc:
                    if exc.code != NativeCode.ECLOSED:
                        log.warning("volume %d is not served by the fast lane: %s", vid, exc)

    def _publish_shards(self, vid: int) -> None:
        """Has the fast lane read an erasure coded volume, if there is one of this id. Needs the registry's lock."""
        try:
            view = self.ec.view(vid)
            if view is not None:
                self.registry.publish_shards(vid, view)
        except (StorageError, engine.NativeError) as exc:
            log.warning("ec volume %d is not served by the fast lane: %s", vid, exc)

    def subscribe(self, listener: ChangeListener) -> None:
        """Calls listener(kind, info) for every volume that is made, mounted, unmounted or deleted from now on.

        On the thread that made the change, after it, with no lock held but the id's; it must not block for long.
        """
        with self._lock:
            self._listeners = [*self._listeners, listener]

    def _notify(self, kind: ChangeKind, info: VolumeShortInfo | EcShardsInfo) -> None:
        for listener in self._listeners:
            try:
                listener(kind, info)
            except Exception:  # a listener's fault must not undo a change that has happened
                log.exception("telling of %s volume %d", kind, info.id)

    # --------------------------------------------------------------------------------------------------------- needles

    def read_needle(self, vid: int, key: int, *, read_deleted: bool = False, meta_ok: bool = False) -> engine.Needle:
        """As Volume.read_needle; VolumeNotFound `volume %d not found`."""
        volume = self.find_volume(vid)
        if volume is None:
            raise VolumeNotFound(f"volume {vid} not found")
        return volume.read_needle(key, read_deleted=read_deleted, meta_ok=meta_ok)

    def write_needle(
        self, vid: int, needle: NeedleIn, *, check_cookie: bool = True, fsync: bool = False
    ) -> engine.WriteResult:
        """As Volume.write_needle; VolumeNotFound `volume %d not found on <ip>:<port>`."""
        return self._volume_for_write(vid).write_needle(needle, check_cookie=check_cookie, fsync=fsync)

    def delete_needle(self, vid: int, key: int, cookie: int, checksum: int = 0) -> int:
        """As Volume.delete_needle; VolumeNotFound `volume %d not found on <ip>:<port>`."""
        return self._volume_for_write(vid).delete_needle(key, cookie, checksum)

    def _volume_for_write(self, vid: int) -> Volume:
        volume = self.find_volume(vid)
        if volume is None:
            raise VolumeNotFound(f"volume {vid} not found on {self.config.ip}:{self.config.port}")
        return volume

    # --------------------------------------------------------------------------------------------- volumes come and go

    def allocate_volume(
        self,
        vid: int,
        collection: str,
        replication: ReplicaPlacement,
        ttl: Ttl = Ttl.NONE,
        preallocate: int = 0,
        disk_type: str = "",
        version: int = 3,
        memory_map_max_mb: int = 0,
    ) -> Volume:
        """Makes an empty volume in the directory of that disk type that holds the fewest; announces it.

        memory_map_max_mb only ever did something on Windows; it is accepted and ignored. Raises VolumeExists,
        NoFreeLocation `No more free space left`, BadRequest (a collection that is no part of a file name),
        StorageError, DiskError. Blocks on disk.
        """
        if not is_plain_file_part(collection):
            raise BadRequest(f"invalid collection {collection!r}")
        with self._ids.hold(vid):
            if self.has_volume(vid):
                raise VolumeExists(f"Volume Id {vid} already exists!")
            location = self._reserve_location(disk_type)
            try:
                log.info(
                    "In dir %s (disk ID %d) adds volume:%d collection:%s replicaPlacement:%s ttl:%s",
                    location.directory,
                    location.disk_id,
                    vid,
                    collection,
                    replication,
                    ttl,
                )
                volume = create_volume(
                    location.directory,
                    location.idx_directory,
                    collection,
                    vid,
                    replica_placement=replication,
                    ttl=ttl,
                    preallocate_bytes=preallocate,
                    version=version,
                    location=location,
                    disk_id=location.disk_id,
                    options=self.options,
                )
                self._join(location, volume)
            finally:
                with self._lock:
                    location.pending_creations -= 1
            log.info("add volume %d on disk ID %d", vid, location.disk_id)
            self._notify("new", volume.short_info())
            return volume

    def _reserve_location(self, disk_type: str) -> DiskLocation:
        """The directory for a new volume, one of its slots taken until pending_creations is counted down."""
        counts = {location.disk_id: location.local_volume_count for location in self.locations}
        with self._lock:
            fitting = [loc for loc in self.locations if loc.disk_type == disk_type and loc.can_take_volume()]
            if not fitting:
                raise NoFreeLocation("No more free space left")
            location = min(fitting, key=lambda loc: counts[loc.disk_id] + loc.pending_creations)
            location.pending_creations += 1
            return location

    def mount_volume(self, vid: int) -> Volume:
        """Loads a volume from the first directory that has files of it; one that is mounted stays so.

        Announced as new either way, as upstream. Raises VolumeNotFound `volume %d not found on disk`, whatever the
        reason (the log has it). Blocks on disk.
        """
        with self._ids.hold(vid):
            volume = self.find_volume(vid)
            for location in self.locations if volume is None else ():
                volume = location.load_one(vid)
                if volume is not None:
                    self._join(location, volume)
                    break
            if volume is None:
                raise VolumeNotFound(f"volume {vid} not found on disk")
            log.info("mount volume %d", vid)
            self._notify("new", volume.short_info())
            return volume

    def replace_volume(self, vid: int, location: DiskLocation, name: str, place: Callable[[], None]) -> Volume:
        """Removes every copy of a volume, has `place` put other files under its base name, and mounts those.

        Between the two the volume is away for the time of a few renames. Raises StorageError `failed to delete existing
        volume %d: …` with all as before, `failed to mount volume %d: …` with the new files in place; what `place`
        raises. Blocks on disk.
        """
        with self._ids.hold(vid):
            old = self.copies(vid)
            if any(volume.is_compacting for volume in old):
                raise VolumeBusy(f"failed to delete existing volume {vid}: volume {vid} is compacting")
            for volume in old:
                info = volume.short_info()
                try:
                    self._destroy(volume)
                except StorageError as exc:
                    raise StorageError(f"failed to delete existing volume {vid}: {exc}") from exc
                log.info("deleted volume %d on disk ID %d: it is replaced by a copy", vid, volume.disk_id)
                self._notify("deleted", info)
            place()
            try:
                fault("copy.mount")
                fresh = location.load_named(name)
            except OSError as exc:
                raise StorageError(f"failed to mount volume {vid}: {from_os_error(exc, 'open')}") from exc
            except StorageError as exc:
                raise StorageError(f"failed to mount volume {vid}: {exc}") from exc
            if fresh is None:
                raise StorageError(f"failed to mount volume {vid}: volume {vid} not found on disk")
            self._join(location, fresh)
            log.info("mount volume %d", vid)
            self._notify("new", fresh.short_info())
            return fresh

    def unmount_volume(self, vid: int) -> None:
        """Closes every copy of a volume; one that is not mounted is no error. Waits for a running vacuum."""
        with self._ids.hold(vid):
            for volume in self.copies(vid):
                info = volume.short_info()
                self._end_service(volume)
                log.info("UnmountVolume %d disk_id:%d", vid, volume.disk_id)
                self._notify("deleted", info)

    def delete_volume(self, vid: int, only_empty: bool = False, keep_remote: bool = False) -> None:
        """Removes every copy of a volume with its files.

        keep_remote concerns tiered volumes: their object is not to be touched. Else it is removed, too, after the
        files; a failure of that is logged only. Raises VolumeNotFound `delete volume %d not found on disk`,
        VolumeNotEmpty (at once: copies before that one are gone), VolumeBusy. Blocks on disk, and on the network
        without a lock.
        """
        objects: list[tuple[Backend | None, str]] = []
        try:
            self._delete_volume(vid, only_empty, objects)
        finally:
            if not keep_remote:
                for backend, key in objects:
                    move.delete_object(vid, backend, key)

    def _delete_volume(self, vid: int, only_empty: bool, objects: list[tuple[Backend | None, str]]) -> None:
        """Notes in `objects` where the data of tiered volumes that are gone is."""
        with self._ids.hold(vid):
            copies = self.copies(vid)
            if not copies:
                raise VolumeNotFound(f"delete volume {vid} not found on disk")
            failures: list[StorageError] = []
            for volume in copies:
                info, held = volume.short_info(), self._object_of(volume)
                try:
                    self._destroy(volume, only_empty)
                    objects += held
                except VolumeNotEmpty as exc:
                    raise VolumeNotEmpty(f"DeleteVolume {vid}: {exc}") from None
                except StorageError as exc:
                    log.error("DeleteVolume %d: %s", vid, exc)
                    failures.append(exc)
                    continue
                log.info("DeleteVolume %d disk_id:%d", vid, volume.disk_id)
                self._notify("deleted", info)
            if failures:
                text = "\n".join(str(exc) for exc in failures)
                raise type(failures[0])(f"DeleteVolume {vid} failed on some disks: {text}")

    def _object_of(self, volume: Volume) -> list[tuple[Backend | None, str]]:
        """Where the data of a tiered volume is; nothing for a local one."""
        if not volume.is_remote:
            return []
        name, key = volume.remote_storage
        return [(self.backends.find(name), key)]

    def _destroy(self, volume: Volume, only_empty: bool = False) -> None:
        """Needs the id's lock. The object of a tiered volume is the caller's business."""
        volume.destroy(only_empty, leave=lambda: self._leave(volume))

    def delete_collection(self, collection: str) -> None:
        """Removes all volumes of a collection; `""` is the default one. Those being vacuumed are left, silently.

        Raises StorageError with all failures of one location, each followed by `; `; further locations are not touched.
        """
        objects: list[tuple[int, Backend | None, str]] = []
        try:
            self._delete_collection(collection, objects)
        finally:
            for vid, backend, key in objects:
                move.delete_object(vid, backend, key)

    def _delete_collection(self, collection: str, objects: list[tuple[int, Backend | None, str]]) -> None:
        for location in self.locations:
            failures = ""
            for volume in location.volumes():
                if volume.collection != collection or volume.is_compacting:
                    continue
                with self._ids.hold(volume.vid):
                    if location.find(volume.vid) is not volume:
                        continue
                    info, held = volume.short_info(), self._object_of(volume)
                    try:
                        self._destroy(volume)
                        objects += [(volume.vid, *found) for found in held]
                    except StorageError as exc:
                        failures += f"{exc}; "
                        continue
                    self._notify("deleted", info)
            if failures:
                raise StorageError(failures)
        self.ec.destroy_collection(collection)

    def configure_volume(self, vid: int, replication: ReplicaPlacement) -> None:
        """Writes another replication into the .vif of a volume, which should be unmounted for that.

        Raises StorageError `volume %d not found on disk`, `volume %d failed to load vif: …`, `… failed to save vif: …`.
        """
        with self._ids.hold(vid):
            for location in self.locations:
                entry = location.locate(vid)
                if entry is None:
                    continue
                path = f"{location.directory}/{entry[: entry.rindex('.')]}.vif"
                known = vif.load(path)
                if known.error:
                    raise StorageError(f"volume {vid} failed to load vif: {known.error}")
                known.info.replication = str(replication)
                try:
                    vif.save(path, known.info)
                except StorageError as exc:
                    raise StorageError(f"volume {vid} failed to save vif: {exc}") from exc
                return
        raise VolumeNotFound(f"volume {vid} not found on disk")

    def consolidate_index(self, vid: int) -> None:
        """Moves an index that lies beside the data to the idx directory; reads go on. Nothing to do is success.

        Raises VolumeNotFound `volume %d not found on disk`, StorageError `relocate index for volume %d: move .idx: …`;
        the latter also when the name there is that of a copy of the volume on another disk, whose index upstream
        overwrites.
        """
        with self._ids.hold(vid):
            volume = self.find_volume(vid)
            if volume is None or volume.location is None:
                raise VolumeNotFound(f"volume {vid} not found on disk")
            target = volume.location.idx_directory
            if target == volume.location.directory:
                return
            path = f"{target}/{volume_base_name(volume.collection, vid)}.idx"
            others = (location.find(vid) for location in self.locations if location is not volume.location)
            if any(other is not None and other.idx_path == path for other in others):
                reason = os_error_text("rename", f"{volume.idx_path} {path}", errno.EEXIST)
                raise StorageError(f"relocate index for volume {vid}: move .idx: {reason}")
            volume.relocate_index(target)

    # ------------------------------------------------------------------------------------------------------ remote tier

    def add_backends(self, listed: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
        """Makes remote stores known, each (type, id, properties), and mounts the volumes that only waited for them.

        A store that is known stays as it is. Before `load` it only notes them. Blocks on disk and network.
        """
        if not self.backends.add_all(listed) or not self._loaded:
            return
        for location in self.locations:
            for vid in location.tiered_not_held():
                if self.has_volume(vid):
                    continue
                try:
                    self.mount_volume(vid)
                except StorageError as exc:
                    log.warning("volume %d is not mounted, though its store may be known now: %s", vid, exc)

    def tend_tiered(self) -> None:
        """Reads what could not be read of tiered volumes when they were loaded; to be called each minute.

        Blocks on the network for a few seconds for each store that does not answer.
        """
        for volume in self.volumes():
            handle = volume.handle
            if not volume.lacks_superblock or not isinstance(handle, TieredVolume):
                continue
            try:
                block = SuperBlock.parse(bytes(handle.remote.backend.read_start(handle.remote.key, SUPER_BLOCK_SIZE)))
            except RemoteError as exc:
                log.debug("volume %d: super block: %s", volume.vid, exc)
                continue
            volume.take_superblock(block)
            log.info("volume %d: replication %s, ttl %s", volume.vid, volume.replica_placement, volume.ttl)

    def move_to_remote(self, vid: int, collection: str, destination: str, keep_local: bool, watcher: Watcher) -> None:
        """As tier.move.to_remote. Also raises VolumeNotFound, and StorageError for another collection."""
        volume = self._tierable(vid, collection)
        move.to_remote(volume, self.backends, destination, keep_local=keep_local, watcher=watcher)

    def move_from_remote(self, vid: int, collection: str, keep_remote: bool, watcher: Watcher) -> None:
        """As tier.move.from_remote. Also raises VolumeNotFound, and StorageError for another collection."""
        volume = self._tierable(vid, collection)
        move.from_remote(volume, self.backends, keep_remote=keep_remote, watcher=watcher)

    def _tierable(self, vid: int, collection: str) -> Volume:
        volume = self._marked(vid)
        if volume.collection != collection:
            raise StorageError(f"existing collection:{volume.collection} unexpected input: {collection}")
        return volume

    # --------------------------------------------------------------------------------------------------- erasure coding

    def generate_shards(self, vid: int, collection: str, go_on: Callable[[], None], *, bytes_per_s: int = 0) -> None:
        """Makes the EC files of a mounted volume beside it, in the place of any there are. Takes long.

        Raises StorageError with upstream's texts, VolumeNotFound, and what go_on raises. Blocks on disk.
        """
        with self._ids.hold(vid):
            volume = self.find_volume(vid)
            if volume is None:
                raise VolumeNotFound(f"volume {vid} not found")
            if volume.collection != collection:
                raise StorageError(f"existing collection:{volume.collection} unexpected input: {collection}")
            ratio = encode.ratio_of(volume.info)
            try:
                self.ec.wipe_held(collection, vid)
            except StorageError as exc:
                raise type(exc)(f"wipe stale EC artifacts for volume {vid} on {exc}") from exc
            encode.generate(volume, ratio, go_on, compact.RateLimit(bytes_per_s))

    def decode_shards(self, vid: int, collection: str, go_on: Callable[[], None], *, bytes_per_s: int = 0) -> None:
        """Makes the files of a plain volume of local shards; mounts nothing. Takes long.

        Raises NoLiveEntries, StorageError with upstream's texts, and what go_on raises. Blocks on disk.
        """
        with self._ids.hold(vid):
            copies = self.ec.copies(vid)
            if not copies:
                raise StorageError(f"ec volume {vid} not found")
            volume = copies[-1]
            if volume.collection != collection:
                raise StorageError(f"existing collection:{volume.collection} unexpected input: {collection}")
            paths = []
            for number in range(volume.ratio.data):
                found = self.ec.find_shard(vid, number)
                if found is None:
                    raise StorageError(f"ec volume {vid} missing shard {number}")
                paths.append(found[1].path)
            folded = {key for copy_ in copies for key in copy_.buried()}

            def deletes() -> set[int]:
                return folded.union(*(list(copy_.deleted) for copy_ in copies))

            is_packed = encode.decode(volume, paths, deletes, go_on, compact.RateLimit(bytes_per_s))
            location = self.locations[volume.disk_id]
            if location.find(vid) is None and not is_packed:
                self._compact_decoded(location, collection, vid, go_on, bytes_per_s)
            self._move_decoded_index(location, volume_base_name(collection, vid))

    def _compact_decoded(
        self, location: DiskLocation, collection: str, vid: int, go_on: Callable[[], None], bytes_per_s: int
    ) -> None:
        """Drops what is deleted from a volume that was just made of shards; a failure is only logged."""

        def step(_offset: int) -> bool:
            go_on()
            return True

        try:
            made = load_volume(
                location.directory,
                location.idx_directory,
                collection,
                vid,
                location=location,
                disk_id=location.disk_id,
                options=location.options,
            )
            try:
                compact.compact(made, bytes_per_s=bytes_per_s, go_on=step)
                compact.commit(made)
            finally:
                made.close()
        except (StorageError, OSError) as exc:
            log.error("CompactVolumeFiles %s/%s: %s", location.directory, volume_base_name(collection, vid), exc)

    def _move_decoded_index(self, location: DiskLocation, name: str) -> None:
        """Puts the index beside the data, where a mount looks for it; a failure is only logged."""
        source, target = f"{location.idx_directory}/{name}.idx", f"{location.directory}/{name}.idx"
        if source == target or not files.exists(source):
            return
        try:
            files.move_file(source, target)
        except OSError as exc:
            log.warning("%s", from_os_error(exc, "rename", target))

    def mark_readonly(self, vid: int, can_delete: bool = False, persist: bool = False) -> None:
        """As Volume.set_read_only; VolumeNotFound `volume %d not found`."""
        self._marked(vid).set_read_only(can_delete, persist)

    def mark_writable(self, vid: int) -> None:
        """As Volume.set_writable; VolumeNotFound `volume %d not found`."""
        self._marked(vid).set_writable()

    def _marked(self, vid: int) -> Volume:
        volume = self.find_volume(vid)
        if volume is None:
            raise VolumeNotFound(f"volume {vid} not found")
        return volume

    # ------------------------------------------------------------------------------------------------- disks, heartbeat

    def tend_maps(self, *, hour: bool) -> None:
        """Maps on disk: brings the databases up to date, each minute; once an hour closes idle ones. Blocks on disk."""
        maps = self.options.maps
        if maps is not None:
            maps.flush_all()
            if hour:
                maps.tick_hour()

    def watch_disks(self, probe: DiskProbeConfig) -> None:
        """How the disks are watched (volume.toml). To be called before `load`.

        Quirk: with several directories nothing is written to them, only statfs is watched.
        """
        if probe.enabled and len(self.locations) > 1:
            names = " ".join(location.directory for location in self.locations)
            log.warning("disk IO probe is disabled for multiple volume directories: [%s]", names)
            probe = replace(probe, enabled=False)
        for location in self.locations:
            location.watch(probe)

    def check_free_space(self) -> None:
        """Looks at every disk, all at once; to be called each minute. Waits half a second for a dead one."""
        if not self.locations:
            return
        with ThreadPoolExecutor(len(self.locations), thread_name_prefix="disk-check") as pool:
            for future in [pool.submit(location.check_free_space) for location in self.locations]:
                future.result()

    def recompute_auto_max(self) -> bool:
        """Sizes the directories with -max 0 by their free space; true if a maximum changed. Waits for the disks.

        Does nothing until the volume size limit is known. Upstream: MaybeAdjustVolumeMax.
        """
        limit = self.volume_size_limit
        if limit == 0:
            return False
        changed = False
        for location in self.locations:
            if location.original_max != 0:
                continue
            try:
                unclaimed = location.disk_usage().free_bytes
            except OSError as exc:
                log.warning("disk %s: %s", location.directory, exc)
                continue
            if not self.preallocate:
                unclaimed -= location.unused_bytes(limit)
            maximum = max(1, location.volume_count + location.ec_slots + max(0, unclaimed) // limit)
            changed = changed or maximum != location.max_volume_count
            location.max_volume_count = maximum
        return changed

    def heartbeat_volumes(self) -> list[VolumeStatusInfo]:
        """What the master is to be told, by location, then id; destroys ttl volumes that expired long enough ago.

        Left out: volumes of a disk that is unavailable, closed and phantom volumes, quarantined and expired ones. Looks
        at paths at most every 30 s; blocks on disk only to destroy. For one caller at a time.
        """
        infos = []
        max_key = 0
        for location in self.locations:
            if location.is_unavailable:
                continue
            for volume in location.volumes():
                info = volume.to_info()
                if info is None:
                    continue
                max_key = max(max_key, info.max_file_key)
                if not volume.check_io_health():
                    continue
                if not volume.expired(info.size, self.volume_size_limit):
                    infos.append(info)
                elif volume.expired_long_enough():
                    self._remove_expired(location, volume)
                else:
                    log.info("volume %d is expired", volume.vid)
        self._max_file_key = max_key
        return infos

    def _remove_expired(self, location: DiskLocation, volume: Volume) -> None:
        with self._ids.attempt(volume.vid) as got:
            if not got or location.find(volume.vid) is not volume:
                return  # somebody else is at it; the next heartbeat looks again
            held = self._object_of(volume)
            try:
                self._destroy(volume)
            except StorageError as exc:
                log.warning("delete volume %d: %s", volume.vid, exc)
                return
            for backend, key in held:
                with contextlib.suppress(RuntimeError):  # the store is being closed
                    self._objects.submit(move.delete_object, volume.vid, backend, key)
        log.info("volume %d is deleted", volume.vid)

    def max_file_key(self) -> int:
        """The largest key over all volumes at the last `heartbeat_volumes`."""
        return self._max_file_key
