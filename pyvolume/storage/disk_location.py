"""One data directory: its lock and identity, which volumes it holds, how full its disk is.

May import volume_load, volume, ec_files, dir_lock, disk_space, files and what these import; not store.

`volumes` of a location changes only under the membership lock, which the store shares with its locations and which is
never held over disk access, logging or another lock. Upstream: `weed/storage/disk_location.go`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Final

from pyvolume._native import engine
from pyvolume.config import DirConfig
from pyvolume.errors import StorageError
from pyvolume.faults import fault
from pyvolume.lockwatch import WatchedLock
from pyvolume.log import V1, V2
from pyvolume.security_config import DiskProbeConfig
from pyvolume.storage import compact_recovery, disk_space, ec_files, files, vif
from pyvolume.storage.dir_lock import DirectoryLock, lock_directory
from pyvolume.storage.disk_space import DiskProbe, DiskUsage
from pyvolume.storage.volume import Volume, remove_volume_files
from pyvolume.storage.volume_load import LoadOptions, load_volume
from pyvolume.types import normalize_disk_type, parse_volume_base_name

log = logging.getLogger(__name__)

MIN_LOAD_WORKERS: Final = 10
"""Volumes of one directory loaded at a time are this many or the number of CPUs, as upstream."""


def _no_lock(vid: int) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class DiskLocation:
    """A data directory and the idx directory that goes with it (the same one unless -dir.idx is given)."""

    def __init__(
        self,
        config: DirConfig,
        disk_id: int = 0,
        options: LoadOptions | None = None,
        membership_lock: WatchedLock | None = None,
    ) -> None:
        self.config = config
        self.directory = os.path.normpath(config.path)
        self.idx_directory = os.path.normpath(config.idx_path) if config.idx_path else self.directory
        self.disk_id = disk_id
        self.disk_type = normalize_disk_type(config.disk_type)
        self.tags = config.tags
        self.min_free = config.min_free
        self.original_max = config.max_volumes
        self.max_volume_count = config.max_volumes
        """Changed by the store's auto sizing if original_max is 0. 0 means unlimited until the first one."""
        self.uuid = ""
        self.is_low = False
        """Whether free space is below the reserve: all volumes here refuse writes. Set by check_free_space only."""
        self.is_unavailable = False
        """Whether the disk stopped answering, or takes writes badly: no new volumes, left out of heartbeats."""
        self.available_bytes = 0
        self.usage = DiskUsage(self.directory)
        self.options = options if options is not None else LoadOptions()
        self.ec_shard_count = 0
        """Mounted shards of erasure coded volumes; ten of them take a slot. Set by storage.ec.members."""
        self.pending_creations = 0
        """Volumes being created, which count as slots. Guarded by the membership lock."""
        self._lock = membership_lock if membership_lock is not None else WatchedLock("the membership of volumes")
        self._volumes: dict[int, Volume] = {}
        self._probe = DiskProbe(self.directory)
        self._directory_lock: DirectoryLock | None = None

    def __repr__(self) -> str:
        return f"<DiskLocation {self.disk_id} {self.directory}>"

    def watch(self, config: DiskProbeConfig) -> None:
        """How the disk is watched from now on (volume.toml); forgets what was seen. Not while check_free_space runs."""
        self._probe = DiskProbe.configured(self.directory, config)

    # ------------------------------------------------------------------------------------------------- lock, identity

    def open(self) -> None:
        """Locks the directory and reads or makes its uuid. Raises DirectoryInUse, StorageError. Blocks on disk."""
        self._directory_lock = lock_directory(self.directory)
        self.uuid = self._directory_lock.uuid

    def is_same_place(self, other: DiskLocation) -> bool:
        """Whether both name the same directory, by whatever path."""
        if self._directory_lock is not None and other._directory_lock is not None:
            return self._directory_lock.key == other._directory_lock.key
        return self.directory == other.directory

    def release(self) -> None:
        """Gives the directory's lock back. Idempotent."""
        if self._directory_lock is not None:
            self._directory_lock.release()
            self._directory_lock = None

    # ----------------------------------------------------------------------------------------------------- membership

    def find(self, vid: int) -> Volume | None:
        return self._volumes.get(vid)

    def volumes(self) -> list[Volume]:
        """The volumes held now, by id."""
        with self._lock:
            return [self._volumes[vid] for vid in sorted(self._volumes)]

    def add(self, volume: Volume) -> None:
        """Takes a volume in. The membership lock must be held."""
        volume.location = self
        volume.disk_id = self.disk_id
        self._volumes[volume.vid] = volume

    def remove(self, volume: Volume) -> bool:
        """Forgets a volume; false if it is not (or no longer) the one held. The membership lock must be held."""
        if self._volumes.get(volume.vid) is not volume:
            return False
        del self._volumes[volume.vid]
        return True

    @property
    def volume_count(self) -> int:
        return len(self._volumes)

    @property
    def local_volume_count(self) -> int:
        """Volumes whose data is here and not in a remote tier."""
        with self._lock:
            return sum(not volume.is_remote for volume in self._volumes.values())

    # ----------------------------------------------------------------------------------------------------------- slots

    @property
    def offset_width(self) -> int:
        """Bytes of an offset in the indexes of this server."""
        return self.options.offset_width

    @property
    def ec_slots(self) -> int:
        """Slots that shards take, ten in one."""
        return -(-self.ec_shard_count // 10)

    @property
    def effective_max(self) -> int:
        """The maximum a heartbeat reports: with the disk low only the slots in use, never negative."""
        return self.local_volume_count + self.ec_slots if self.is_low else max(0, self.max_volume_count)

    @property
    def free_slots(self) -> int:
        """Volumes that may still be copied here. Quirk: an unlimited location (max 0) has none."""
        return self.max_volume_count - len(self._volumes) - self.ec_slots

    def can_take_volume(self) -> bool:
        """Whether a new volume may be created here. The membership lock must be held (pending_creations)."""
        if self.is_low or self.is_unavailable:
            return False
        used = len(self._volumes) + self.pending_creations + self.ec_slots
        return self.max_volume_count == 0 or used < self.max_volume_count

    # ---------------------------------------------------------------------------------------------------------- space

    def check_free_space(self) -> bool:
        """Takes new figures of the disk; true if its volumes became read-only or writable by that.

        To be called at start and each minute. Waits at most half a second for the disk (and, if its writes are probed,
        the time that volume.toml gives these), then for appends under way.
        Upstream: CheckDiskSpace.
        """
        usage = self._probe.check()
        if bool(usage.error) != self.is_unavailable:
            self.is_unavailable = bool(usage.error)
            if usage.error:
                log.warning("disk %s is not healthy: %s", self.directory, usage.error)
            else:
                log.info("disk %s is healthy again", self.directory)
        self.usage = usage
        self.available_bytes = disk_space.available_bytes(self.min_free, usage)
        if not usage.all_bytes:
            return False  # never seen yet: no verdict
        low, words = disk_space.is_low(self.min_free, usage)
        changed = low != self.is_low
        self.is_low = low
        if low or changed:
            log.info("dir %s %s", self.directory, words)
        if changed:
            for volume in self.volumes():
                try:
                    volume.refresh_read_only()
                except StorageError as exc:
                    log.warning("volume %d: %s", volume.vid, exc)
        return changed

    def disk_usage(self) -> DiskUsage:
        """Fresh figures for status pages, with the absolute directory. Blocks on the disk; raises OSError."""
        return disk_space.disk_usage(files.absolute(self.directory))

    def unused_bytes(self, volume_size_limit: int) -> int:
        """Room that writable volumes are still entitled to: sum of limit - .dat - .idx where positive."""
        total = 0
        for volume in self.volumes():
            if volume.is_read_only:
                continue
            stat = volume.stat()
            total += max(0, volume_size_limit - stat.dat_bytes - stat.idx_bytes)
        return total

    # -------------------------------------------------------------------------------------------------------- loading

    def load_existing(
        self,
        workers: int | None = None,
        *,
        take: Callable[[Volume], None],
        hold: Callable[[int], AbstractContextManager[None]] | None = None,
        skip: Callable[[int], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
        at_startup: bool = True,
    ) -> None:
        """Loads every volume of the directory that is not held yet, several at a time.

        `take` is called with each one, on a worker thread, and makes it a member; `hold` gives the lock under which
        an id's files are touched; `skip` tells ids not to be loaded from here; `progress` is called once the number
        of entries is known (0, n) and after each (1, 0). What cannot be loaded is logged and left as it is. Raises
        nothing; blocks on disk until all are done.
        """
        lock_of = hold if hold is not None else _no_lock
        self._recover_compactions(lock_of)
        by_id = self._entries_by_id()
        if not by_id:
            return
        if progress is not None:
            progress(0, sum(len(entries) for _, entries in by_id))

        def load(vid: int | None, entries: list[str]) -> None:
            for entry in entries:
                try:
                    with contextlib.nullcontext() if vid is None else lock_of(vid):
                        fault("load.volume")
                        volume = self._load_entry(entry, at_startup=at_startup, skip=skip)
                        if volume is not None and self.find(volume.vid) is not volume:
                            take(volume)
                except (StorageError, OSError) as exc:
                    log.error("new volume %s error %s", os.path.splitext(entry)[0], exc)
                except Exception:  # a fault of ours with one volume must not keep the others from being served
                    log.exception("new volume %s", os.path.splitext(entry)[0])
                if progress is not None:
                    progress(1, 0)

        count = workers if workers is not None else max(os.cpu_count() or 1, MIN_LOAD_WORKERS)
        with ThreadPoolExecutor(min(count, len(by_id)), thread_name_prefix=f"load-{self.disk_id}") as pool:
            for future in [pool.submit(load, vid, entries) for vid, entries in by_id]:
                future.result()
        log.log(
            V2, "Store started on dir: %s with %d volumes max %d", self.directory, self.volume_count, self.original_max
        )

    def _entries_by_id(self) -> list[tuple[int | None, list[str]]]:
        """(id, first .idx or .vif entry of each base name with it), in name order; id None for a name that has none."""
        groups: dict[int | str, dict[str, str]] = {}
        try:
            entries = sorted(os.listdir(self.directory))
        except OSError as exc:
            log.error("cannot list %s: %s", self.directory, exc)
            return []
        for entry in entries:
            base, extension = os.path.splitext(entry)
            if extension in (".idx", ".vif"):
                key: int | str = base
                with contextlib.suppress(ValueError):
                    key = parse_volume_base_name(base)[1]
                groups.setdefault(key, {}).setdefault(base, entry)
        return [(key if isinstance(key, int) else None, list(group.values())) for key, group in groups.items()]

    def load_one(self, vid: int) -> Volume | None:
        """Loads one volume by id, whatever its collection: the first directory entry in name order counts.

        None if there is nothing to load or loading failed (logged). The caller makes it a member. Blocks on disk.
        """
        entry = self.locate(vid)
        if entry is None:
            return None
        try:
            return self._load_entry(entry, at_startup=False)
        except (StorageError, OSError) as exc:
            log.error("new volume %s error %s", os.path.splitext(entry)[0], exc)
            return None

    def load_named(self, name: str) -> Volume | None:
        """Loads the volume with this base name. None if there is nothing to load; raises StorageError, OSError.

        The caller makes it a member. Blocks on disk.
        """
        extension = ".idx" if files.exists(f"{self.directory}/{name}.idx") else ".vif"
        return self._load_entry(name + extension, at_startup=False)

    def locate(self, vid: int) -> str | None:
        """File name of the first entry (name order) that ends in .idx or .vif and has this id. Blocks on disk."""
        try:
            entries = sorted(os.listdir(self.directory))
        except OSError as exc:
            log.error("cannot list %s: %s", self.directory, exc)
            return None
        for entry in entries:
            base, extension = os.path.splitext(entry)
            if extension in (".idx", ".vif") and base.endswith(str(vid)):
                try:
                    if parse_volume_base_name(base)[1] == vid:
                        return entry
                except ValueError:
                    continue
        return None

    def _load_entry(self, entry: str, *, at_startup: bool, skip: Callable[[int], bool] | None = None) -> Volume | None:
        """The steps before a load (contract storage.md 11 a-h); None: nothing to load. Raises StorageError, OSError."""
        directory, idx_directory = self.directory, self.idx_directory
        name, extension = os.path.splitext(entry)
        if os.path.isdir(f"{directory}/{entry}"):
            return None
        try:
            collection, vid = parse_volume_base_name(name)
        except ValueError as exc:
            log.warning("get volume id failed, %s, err : %s", name, exc)
            return None
        if ec_files.is_empty_stub(directory, idx_directory, name):
            log.warning("removing leftover empty .dat stub for EC volume %d (collection=%s)", vid, collection)
            files.remove_if_exists(f"{directory}/{name}.dat")
            files.remove_if_exists(f"{idx_directory}/{name}.idx")
            return None
        if not self._plain_volume_wanted(name, vid, extension, at_startup):
            return None
        if files.exists(f"{directory}/{name}.note"):
            self._remove_unfinished_copy(name)
            return None
        held = self.find(vid)
        if held is not None:
            if held.collection != collection:
                log.error("volume %d is in %s twice: %s is served, %s is not", vid, directory, held.base_path, name)
            log.log(V1, "loaded volume, %d", vid)
            return held
        if skip is not None and skip(vid):
            return None
        if files.exists(f"{directory}/{name}.cpc"):
            self._recover_compaction(name)  # without that, data and index may not belong together
        if not files.exists(f"{directory}/{name}.dat") and not self._is_remote(name):
            log.log(V1, "skipping volume %d (collection=%s); no .dat and no remote file", vid, collection)
            return None
        return load_volume(
            directory, idx_directory, collection, vid, location=self, disk_id=self.disk_id, options=self.options
        )

    def _plain_volume_wanted(self, name: str, vid: int, extension: str, at_startup: bool) -> bool:
        """Whether the .dat, and not the shards of an EC volume of the same id, is to be served."""
        claim = ec_files.claim(self.directory, self.idx_directory, name)
        if claim == "volume-keep":
            log.warning(
                "volume %d: %s/%s.dat went on growing after it was erasure coded: it is served, the shards stay on "
                "disk unmounted; compare the two, then delete the shards or encode again",
                vid,
                self.directory,
                name,
            )
            return True
        if extension == ".vif" and claim != "none":
            log.log(V1, "skipping .vif-only entry for volume %d (%s); .ecx present", vid, name)
            return False
        if not at_startup or claim == "none":
            return True
        if claim == "volume":
            log.warning("EC volume %d validation failed, removing incomplete EC files to allow .dat file loading", vid)
            ec_files.remove_interrupted_encode(self.directory, self.idx_directory, name)
            return True
        return False

    def _remove_unfinished_copy(self, name: str) -> None:
        note = ""
        try:
            with open(f"{self.directory}/{name}.note", encoding="utf-8", errors="replace") as handle:
                note = handle.read(4096)
        except OSError as exc:
            note = str(exc)
        log.warning("volume %s was not completed: %s", name, note)
        keep_vif = ec_files.ecx_path(self.directory, self.idx_directory, name) is not None
        for place in dict.fromkeys((self.directory, self.idx_directory)):
            remove_volume_files(f"{place}/{name}", keep_vif)

    def tiered_not_held(self) -> list[int]:
        """Ids of volumes in a remote store that are not held: its settings may have been missing. Blocks on disk."""
        found = []
        for vid, entries in self._entries_by_id():
            if vid is not None and self.find(vid) is None:
                found += [vid for entry in entries if self._is_remote(os.path.splitext(entry)[0])]
        return found

    def _is_remote(self, name: str) -> bool:
        return any(
            vif.load(f"{place}/{name}.vif").has_remote_file
            for place in dict.fromkeys((self.directory, self.idx_directory))
        )

    def _recover_compactions(self, lock_of: Callable[[int], AbstractContextManager[None]]) -> None:
        """Finishes or undoes vacuums that a crash interrupted, for ids that are not loaded (those may be at it now)."""
        names: set[str] = set()
        for place in dict.fromkeys((self.directory, self.idx_directory)):
            try:
                entries: Iterable[str] = os.listdir(place)
            except OSError as exc:
                log.warning("cannot list %s: %s", place, exc)
                continue
            names.update(
                base for base, extension in map(os.path.splitext, entries) if extension in compact_recovery.EXTENSIONS
            )
        for name in sorted(names):
            try:
                _, vid = parse_volume_base_name(name)
            except ValueError:
                continue
            with lock_of(vid):
                if self.find(vid) is not None:
                    continue
                try:
                    self._recover_compaction(name)
                except (OSError, StorageError, engine.NativeError) as exc:
                    log.error("volume %d: reconcile interrupted compaction failed: %s", vid, exc)

    def _recover_compaction(self, name: str) -> None:
        compact_recovery.recover(
            self.directory,
            self.idx_directory,
            name,
            repair=self.options.repair,
            default_width=self.options.offset_width,
        )
