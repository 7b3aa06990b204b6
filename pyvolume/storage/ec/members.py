"""All erasure coded volumes of this server: what is mounted on which disk, and every change of that.

May import the other modules of storage.ec, ec_files, vif, files, the location's interface and the leaves; not store.
The store holds one EcMembers, and is told by `came_or_went` of ids whose shards here are others now; `hold` is its lock
of an id, taken first and held over disk access. `_lock` guards the tables only. Upstream: `weed/storage/store_ec.go`,
`disk_location_ec.go`, `store_ec_mirror.go`, `store_ec_reconcile.go`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Literal, Protocol

from pyvolume._native import ec
from pyvolume.errors import StorageError, from_os_error
from pyvolume.faults import fault
from pyvolume.lockwatch import WatchedLock
from pyvolume.storage import ec_files, files, vif
from pyvolume.storage.compact import RateLimit
from pyvolume.storage.ec import encode, index, rebuild, sidecar
from pyvolume.storage.ec.layout import DEFAULT_DATA, MAX_SHARDS
from pyvolume.storage.ec.volume import EcShard, EcShardsInfo, EcVolume, FileMissing
from pyvolume.types import normalize_disk_type, parse_volume_base_name, volume_base_name

log = logging.getLogger(__name__)

EMPTY_SHARD_AGE_S: Final = 3600.0
UNLIMITED: Final = 1 << 30
MIRRORED: Final = (".ecx", ".ecj", ".vif")
MIRRORING: Final = ".mirror.tmp"
SHARDS_PER_SLOT: Final = 10

_SHARD_NAME: Final = re.compile(r"\.ec([0-9]{2})$")
_LEFTOVER: Final = re.compile(
    r"\.(ec[0-9]{2}\.(tmp|rebuilding|receiving)|(ecx|ecj|ecsum|vif|dat|idx)\.tmp|(ecx|ecj|vif)\.mirror\.tmp"
    r"|(ecx|ecj|ecsum|vif)\.receiving)$"
)
"""Working names of jobs. At start, after the plain volumes were loaded, nothing that runs has such a file."""

EcChangeKind = Literal["new-ec", "deleted-ec"]


class Location(Protocol):
    """The part of a DiskLocation that is used here."""

    directory: str
    idx_directory: str
    disk_id: int
    disk_type: str
    is_low: bool
    is_unavailable: bool
    max_volume_count: int
    ec_shard_count: int

    @property
    def volume_count(self) -> int: ...
    @property
    def offset_width(self) -> int: ...


Key = tuple[str, int]
"""(collection, id)"""


class EcMembers:
    """Thread-safe. Methods block on disk unless they say otherwise."""

    def __init__(
        self,
        locations: Sequence[Location],
        hold: Callable[[int], AbstractContextManager[None]],
        attempt: Callable[[int], AbstractContextManager[bool]],
        notify: Callable[[EcChangeKind, EcShardsInfo], None],
        came_or_went: Callable[[int], None] = lambda _vid: None,
    ) -> None:
        self._locations = locations
        self._hold = hold
        self._attempt = attempt
        self._notify = notify
        self._came_or_went = came_or_went
        self._lock = WatchedLock("the membership of EC volumes")
        self._tables: list[dict[int, EcVolume]] = [{} for _ in locations]

    # ------------------------------------------------------------------------------------------------------ who is here

    def find(self, vid: int) -> EcVolume | None:
        """The volume on the first disk that has it: its index counts. Takes no lock."""
        for table in self._tables:
            volume = table.get(vid)
            if volume is not None:
                return volume
        return None

    def copies(self, vid: int) -> list[EcVolume]:
        """The volume on all disks that have shards of it. Takes no lock."""
        return [volume for table in self._tables if (volume := table.get(vid)) is not None]

    def find_shard(self, vid: int, number: int) -> tuple[EcVolume, EcShard] | None:
        """A shard and the volume on the disk that holds it. Takes no lock."""
        for volume in self.copies(vid):
            shard = volume.shards.get(number)
            if shard is not None:
                return volume, shard
        return None

    def view(self, vid: int) -> ec.Shards | None:
        """What the fast lane reads of a volume: the index that counts, the shards of its encode on all disks.

        None if the volume is not here, or if another disk knows of deletes that the first one does not. Raises
        StorageError.
        """
        volume = self.find(vid)
        if volume is None:
            return None
        for other in self.copies(vid):
            if not volume.deleted.covers(other.deleted):
                return None
        shards: dict[int, EcShard] = {}
        for holder in self.copies(vid):
            if not volume.encode_ts_ns or holder.encode_ts_ns == volume.encode_ts_ns:
                shards = {**holder.shards, **shards}
        return volume.make_view(shards.values())

    def merge_deletes(self, volume: EcVolume, keys: Sequence[int]) -> None:
        """Notes deletes that came with a journal of another server. Raises StorageError."""
        volume.merge_deletes(keys)
        if self.find(volume.vid) is not volume:
            self._came_or_went(volume.vid)  # the fast lane looks at the first disk only

    def volumes(self) -> list[EcVolume]:
        """All, by disk, then id."""
        with self._lock:
            return [table[vid] for table in self._tables for vid in sorted(table)]

    def is_deleted(self, vid: int, key: int) -> bool:
        """Whether any disk knows of the delete (departure E4)."""
        return any(volume.is_deleted(key) for volume in self.copies(vid))

    def _table(self, location: Location) -> dict[int, EcVolume]:
        return self._tables[location.disk_id]

    def _count(self, location: Location) -> None:
        location.ec_shard_count = sum(len(volume.shards) for volume in list(self._table(location).values()))

    # ------------------------------------------------------------------------------------------------ mount and unmount

    def _index_owner(self, collection: str, vid: int) -> str | None:
        """Directory with an index that has content, on any disk."""
        name = volume_base_name(collection, vid)
        for location in self._locations:
            for place in dict.fromkeys((location.idx_directory, location.directory)):
                with contextlib.suppress(OSError):
                    if os.stat(f"{place}/{name}.ecx").st_size > 0:
                        return place
        return None

    def mount(self, collection: str, vid: int, number: int, source_disk_type: str = "") -> None:
        """Opens a shard on the first disk that has its file, and announces it. Raises StorageError."""
        with self._hold(vid):
            owner = self._index_owner(collection, vid)
            failures = []
            for location in self._locations:
                try:
                    volume = self._open_shard(location, collection, vid, number, owner)
                except FileMissing:
                    continue
                except StorageError as exc:
                    failures.append(f"{location.directory}: {exc}")
                    continue
                self._came_or_went(vid)
                if source_disk_type:
                    volume.disk_type = normalize_disk_type(source_disk_type)
                log.info("MountEcShards %d.%d on disk ID %d", vid, number, location.disk_id)
                self._notify("new-ec", volume.delta(number, gone=False))
                return
        what = f"MountEcShards {vid}.{number}"
        if failures:
            raise StorageError(f"{what} load failures: {'; '.join(failures)}")
        if owner is None:
            raise StorageError(f"{what}: no .ecx index found on any local disk")
        raise StorageError(f"{what} not found on disk")

    def _open_shard(
        self, location: Location, collection: str, vid: int, number: int, owner: str | None = None
    ) -> EcVolume:
        """Needs the id's lock; the caller calls came_or_went. Raises FileMissing, StorageError."""
        name = volume_base_name(collection, vid)
        path = f"{location.directory}/{name}.ec{number:02d}"
        if not files.exists(path):
            raise FileMissing(f"open {path}: no such file or directory")
        volume = self._table(location).get(vid)
        fresh = volume is None
        if volume is None:
            idx_directory = location.idx_directory
            if owner is not None and not ec_files.has_nonempty_ecx(location.directory, idx_directory, name):
                idx_directory = owner
            fault("ec.open")
            volume = EcVolume(
                vid=vid,
                collection=collection,
                directory=location.directory,
                idx_directory=idx_directory,
                disk_id=location.disk_id,
                disk_type=location.disk_type,
                offset_width=location.offset_width,
            )
        try:
            volume.add_shard(number)
        except BaseException:
            if fresh:
                volume.close()
            raise
        if fresh:
            with self._lock:
                self._table(location)[vid] = volume
        self._count(location)
        return volume

    def unmount(self, vid: int, number: int, encode_ts_ns: int = 0) -> None:
        """Closes a shard on every disk; with a time only those of an older encode. Not mounted is no error."""
        with self._hold(vid):
            for location in self._locations:
                volume = self._table(location).get(vid)
                if volume is None or number not in volume.shards:
                    continue
                if encode_ts_ns > 0 and not 0 < volume.encode_ts_ns < encode_ts_ns:
                    continue
                volume.drop_shard(number)
                if not volume.shards:
                    self._forget(location, volume)
                else:
                    self._came_or_went(vid)
                self._count(location)
                log.info("UnmountEcShards %d.%d disk_id:%d", vid, number, location.disk_id)
                self._notify("deleted-ec", volume.delta(number, gone=True))

    def _forget(self, location: Location, volume: EcVolume) -> None:
        """Needs the id's lock."""
        with self._lock:
            if self._table(location).get(volume.vid) is volume:
                del self._table(location)[volume.vid]
        self._came_or_went(volume.vid)
        volume.close()
        self._count(location)

    def _unload(self, vid: int, location: Location | None = None) -> None:
        """Closes a volume on one disk or all, without a delta. Needs the id's lock."""
        for each in self._locations if location is None else [location]:
            volume = self._table(each).get(vid)
            if volume is not None:
                self._forget(each, volume)

    def close(self) -> None:
        """Closes all. Idempotent."""
        for volume in self.volumes():
            with self._hold(volume.vid):
                self._forget(self._locations[volume.disk_id], volume)

    # ---------------------------------------------------------------------------------------------------------- removal

    def _bases(self, location: Location, collection: str, vid: int) -> tuple[str, str]:
        name = volume_base_name(collection, vid)
        return f"{location.directory}/{name}", f"{location.idx_directory}/{name}"

    def wipe(self, collection: str, vid: int, encode_ts_ns: int = 0) -> None:
        """Unloads and removes all EC files of an id, or on disks of an older encode only. Raises StorageError."""
        with self._hold(vid):
            self.wipe_held(collection, vid, encode_ts_ns)

    def wipe_held(self, collection: str, vid: int, encode_ts_ns: int = 0) -> None:
        """As wipe, for whoever holds the id's lock."""
        if not encode_ts_ns:
            self._unload(vid)
        for location in self._locations:
            base, idx_base = self._bases(location, collection, vid)
            if encode_ts_ns:
                found = next((f for b in (base, idx_base) if (f := vif.load(b + ".vif")).found), None)
                config = found.info.ec_shard_config if found is not None else None
                if config is None or not 0 < config.encode_ts_ns < encode_ts_ns:
                    continue
                self._unload(vid, location)
            try:
                encode.remove_artifacts(base, idx_base)
            except OSError as exc:
                raise StorageError(f"{location.directory}: {from_os_error(exc, 'remove')}") from exc

    def _shard_files(self, location: Location, name: str) -> list[int]:
        """Ids of the shard files of a base name, empty ones included."""
        return [n for n in range(MAX_SHARDS) if files.exists(f"{location.directory}/{name}.ec{n:02d}")]

    def delete_files(self, collection: str, vid: int, numbers: Sequence[int]) -> None:
        """Removes shard files, and what belongs to the last of them. What is mounted goes on. Raises DiskError."""
        name = volume_base_name(collection, vid)
        with self._hold(vid):
            try:
                for location in self._locations:
                    self._delete_shard_files(location, name, numbers)
                if any(self._shard_files(location, name) for location in self._locations):
                    return
                for location in self._locations:
                    for place in dict.fromkeys((location.idx_directory, location.directory)):
                        for extension in (".ecx", ".ecj"):
                            files.remove_if_exists(f"{place}/{name}{extension}")
                    idx = (f"{place}/{name}.idx" for place in (location.idx_directory, location.directory))
                    if not any(files.exists(path) for path in idx):
                        files.remove_if_exists(f"{location.directory}/{name}.vif")
            except OSError as exc:
                raise from_os_error(exc, "remove") from exc

    def _delete_shard_files(self, location: Location, name: str, numbers: Sequence[int]) -> None:
        gone = [files.remove_if_exists(f"{location.directory}/{name}.ec{n:02d}") >= 0 for n in numbers]
        if not any(gone) or self._shard_files(location, name):
            return
        sidecar.remove_all(f"{location.directory}/{name}")
        if location.idx_directory != location.directory and not any(
            other.idx_directory == location.idx_directory and self._shard_files(other, name)
            for other in self._locations
        ):
            sidecar.remove_all(f"{location.idx_directory}/{name}")

    def _destroy(self, location: Location, volume: EcVolume) -> None:
        """Removes a volume on one disk with its files. Needs the id's lock."""
        numbers = list(volume.shards)
        self._forget(location, volume)
        base, idx_base = self._bases(location, volume.collection, volume.vid)
        names = [volume.shard_path(number) for number in numbers]
        names += [place + extension for place in dict.fromkeys((base, idx_base)) for extension in (".ecx", ".ecj")]
        if not files.exists(base + ".dat"):
            names.append(base + ".vif")
        try:
            for name in names:
                files.remove_if_exists(name)
            for place in dict.fromkeys((base, idx_base)):
                sidecar.remove_all(place)
        except OSError as exc:
            log.warning("ec volume %d: %s", volume.vid, from_os_error(exc, "remove"))

    def destroy_collection(self, collection: str) -> None:
        """Removes all EC volumes of a collection, without deltas as upstream."""
        for volume in self.volumes():
            if volume.collection == collection:
                with self._hold(volume.vid):
                    location = self._locations[volume.disk_id]
                    if self._table(location).get(volume.vid) is volume:
                        self._destroy(location, volume)

    def remove_expired(self, now_s: float | None = None) -> list[EcShardsInfo]:
        """Destroys what has expired; what it was, for a heartbeat."""
        now = time.time() if now_s is None else now_s
        gone = []
        for volume in self.volumes():
            if not 0 < volume.expire_at_s < now:
                continue
            with self._attempt(volume.vid) as got:
                location = self._locations[volume.disk_id]
                if not got or self._table(location).get(volume.vid) is not volume:
                    continue  # somebody else is at it; the next heartbeat looks again
                gone.append(volume.info())
                self._destroy(location, volume)
                log.info("ec volume %d has expired and is deleted", volume.vid)
        return gone

    # ----------------------------------------------------------------------------------------------------- where to put

    def target_location(self, collection: str, vid: int) -> Location | None:
        """The disk for another shard: one with the volume, with its index, an hdd, any (contract 11)."""
        name = volume_base_name(collection, vid)
        best: tuple[int, int] | None = None
        chosen = None
        for location in self._locations:
            free = self._free_shards(location)
            if location.is_low or location.is_unavailable or free <= 0:
                continue
            tier = 1 if location.disk_type else 2
            if ec_files.has_nonempty_ecx(location.directory, location.idx_directory, name):
                tier = 3
            if vid in self._table(location):
                tier = 4
            if best is None or (tier, free) > best:
                best, chosen = (tier, free), location
        return chosen

    def _free_shards(self, location: Location) -> int:
        used = location.volume_count * DEFAULT_DATA + location.ec_shard_count
        if location.max_volume_count <= 0:
            return max(1, UNLIMITED - used)
        return max(0, location.max_volume_count * DEFAULT_DATA - used)

    # ---------------------------------------------------------------------------------------------------------- rebuild

    def rebuild(
        self, collection: str, vid: int, *, unsafe: bool, go_on: Callable[[], None], bytes_per_s: int = 0
    ) -> list[int]:
        """Makes lost shards on the disk that has the index and most of them; their ids. Raises StorageError."""
        name = volume_base_name(collection, vid)
        with self._hold(vid):
            target: Location | None = None
            most = 0
            others: list[Location] = []
            for location in self._locations:
                count = len(self._shard_files(location, name))
                has_index = ec_files.ecx_path(location.idx_directory, location.directory, name) is not None
                if not count and not has_index:
                    continue
                if has_index and (target is None or count > most):
                    if target is not None:
                        others.append(target)
                    target, most = location, count
                else:
                    others.append(location)
            if target is None:
                return []
            directories = [location.directory for location in others]
            base = f"{target.directory}/{name}"
            try:
                limit = RateLimit(bytes_per_s)
                made = rebuild.rebuild(base, directories, unsafe=unsafe, go_on=go_on, limit=limit)
            except StorageError as exc:
                raise type(exc)(f"RebuildEcFiles {base}: {exc}") from exc
            ecx = ec_files.ecx_path(target.idx_directory, target.directory, name)
            if ecx is not None:
                self._fold(vid, ecx, target)
            rebuild.backfill_sums(base, directories, go_on)
            self._reopen(target, vid, made)
            return made

    def _fold(self, vid: int, ecx: str, location: Location) -> None:
        idx_base = ecx.removesuffix(".ecx")
        try:
            volume = next((v for v in self.copies(vid) if v.ecx_path == ecx), None)
            if volume is not None:
                first = self.find(vid)
                if first is not None and first is not volume:
                    first.merge_deletes(volume.deleted)  # its journal is what the fast lane goes by
                volume.fold()
            else:
                index.fold_file(ecx, location.offset_width, idx_base + ".ecj")
        except StorageError as exc:
            raise type(exc)(f"RebuildEcxFile {idx_base}: {exc}") from exc

    def _reopen(self, target: Location, vid: int, made: Sequence[int]) -> None:
        """Mounted shards whose files were replaced serve the new ones from now on."""
        for location in self._locations:
            volume = self._table(location).get(vid)
            for number in made if volume is not None else ():
                if volume is not None and volume.drop_shard(number):
                    try:
                        volume.add_shard(number)
                    except StorageError as exc:
                        log.warning("ec volume %d: shard %d was made again and cannot be opened: %s", vid, number, exc)
            self._count(location)
        self._came_or_went(vid)

    # ------------------------------------------------------------------------------------------------------------ start

    def load(self, *, at_startup: bool) -> None:
        """Mounts what lies on the disks, by the rules of contract 12.

        What cannot be loaded is logged. Expired volumes are not announced (departure E3).
        """
        for location in self._locations:
            if at_startup:
                self._sweep(location)
            self._load_location(location)
        if at_startup:
            if len(self._locations) > 1:
                self._prune()
                self._mirror()
            self._reconcile()

    def _sweep(self, location: Location) -> None:
        """Removes working files of jobs that a crash ended. In an index directory, which other servers may use too,
        only those of volumes that have a file in the data directory."""
        try:
            here = os.listdir(location.directory)
            names = {entry.partition(".")[0] for entry in here}
            found = [f"{location.directory}/{entry}" for entry in here if _LEFTOVER.search(entry)]
            if location.idx_directory != location.directory:
                found += [
                    f"{location.idx_directory}/{entry}"
                    for entry in os.listdir(location.idx_directory)
                    if _LEFTOVER.search(entry) and entry.partition(".")[0] in names
                ]
            for path in found:
                log.warning("removing %s, which was left by an interrupted job", path)
                files.remove_if_exists(path)
        except OSError as exc:
            log.warning("leftovers in %s: %s", location.directory, exc)

    def _found(self, location: Location) -> Iterator[tuple[Key, list[int]]]:
        """(volume, ids of its shards with content) by name; empty shard files that are old are removed."""
        by_name: dict[str, list[int]] = {}
        try:
            entries = sorted(os.listdir(location.directory))
        except OSError as exc:
            log.error("cannot list %s: %s", location.directory, exc)
            return
        for entry in entries:
            match = _SHARD_NAME.search(entry)
            if match is None or int(match[1]) >= MAX_SHARDS:
                continue
            path = f"{location.directory}/{entry}"
            try:
                status = os.stat(path)
            except OSError as exc:
                log.warning("%s: %s", path, exc)
                continue
            if status.st_size > 0:
                by_name.setdefault(entry[: match.start()], []).append(int(match[1]))
            elif time.time() - status.st_mtime > EMPTY_SHARD_AGE_S:
                log.info("removing empty shard file %s", path)
                with contextlib.suppress(OSError):
                    os.unlink(path)
        for name, numbers in by_name.items():
            try:
                key = parse_volume_base_name(name)
            except ValueError:
                continue
            yield key, numbers

    def _load_location(self, location: Location) -> None:
        directory, idx_directory = location.directory, location.idx_directory
        for (collection, vid), numbers in self._found(location):
            name = volume_base_name(collection, vid)
            with self._hold(vid):
                if ec_files.ecx_path(directory, idx_directory, name) is None:
                    if not files.exists(f"{directory}/{name}.dat"):
                        log.warning("ec volume %d: shards in %s, but no .ecx there", vid, directory)
                    elif os.stat(f"{directory}/{name}.dat").st_size > 8:
                        log.warning("ec volume %d: removing the files of an encode that was interrupted", vid)
                        ec_files.remove_interrupted_encode(directory, idx_directory, name)
                    continue
                claim = ec_files.claim(directory, idx_directory, name)
                if claim == "volume-keep":
                    continue
                if claim == "volume" and vid not in self._table(location):
                    log.warning("ec volume %d: its shards are incomplete beside a .dat; removing them", vid)
                    ec_files.remove_interrupted_encode(directory, idx_directory, name)
                    continue
                self._load_shards(location, collection, vid, numbers)

    def _load_shards(
        self, location: Location, collection: str, vid: int, numbers: Sequence[int], owner: str | None = None
    ) -> None:
        """Needs the id's lock. A failure unloads what was loaded and is logged."""
        was_here = self._table(location).get(vid)
        fresh = [n for n in numbers if was_here is None or n not in was_here.shards]
        try:
            for number in fresh:
                self._open_shard(location, collection, vid, number, owner)
        except StorageError as exc:
            log.error("ec volume %d on %s cannot be loaded: %s", vid, location.directory, exc)
            if was_here is None:
                self._unload(vid, location)
            self._came_or_went(vid)
            return
        self._came_or_went(vid)
        volume = self._table(location).get(vid)
        if volume is None or 0 < volume.expire_at_s < time.time():
            return
        for number in fresh:
            self._notify("new-ec", volume.delta(number, gone=False))

    def _orphans(self, location: Location) -> Iterator[tuple[Key, list[int]]]:
        """Shards that are not mounted and have no index with content on their disk."""
        for (collection, vid), numbers in self._found(location):
            if vid in self._table(location):
                continue
            name = volume_base_name(collection, vid)
            if files.exists(f"{location.directory}/{name}.dat"):
                continue
            yield (collection, vid), numbers

    def _prune(self) -> None:
        """Removes the remains of an encode whose .dat is whole on another disk of this server."""
        by_key: dict[Key, list[tuple[Location, int]]] = {}
        for location in self._locations:
            for key, numbers in self._found(location):
                by_key.setdefault(key, []).append((location, len(numbers)))
        for (collection, vid), places in by_key.items():
            name = volume_base_name(collection, vid)
            data = DEFAULT_DATA
            total = sum(count for _, count in places)
            for location, count in places:
                found = vif.load(f"{location.directory}/{name}.vif")
                if found.status in ("ok", "old"):
                    data = encode.ratio_of(found.info).data
                encoded = found.info.dat_file_size if found.status in ("ok", "old") else 0
                if count >= data or total >= data or encoded <= 0:
                    continue
                for other in self._locations:
                    if other is location:
                        continue
                    with contextlib.suppress(OSError):
                        if os.stat(f"{other.directory}/{name}.dat").st_size == encoded:
                            log.warning(
                                "ec volume %d: removing its %d shards in %s, the whole .dat is in %s",
                                vid,
                                count,
                                location.directory,
                                other.directory,
                            )
                            with self._hold(vid):
                                self._unload(vid, location)
                                ec_files.remove_interrupted_encode(location.directory, location.idx_directory, name)
                            break

    def _mirror(self) -> None:
        """Copies index, journal and .vif to disks that have shards but no index."""
        for location in self._locations:
            for (collection, vid), _ in list(self._orphans(location)):
                name = volume_base_name(collection, vid)
                owner = next(
                    (
                        other
                        for other in self._locations
                        if other is not location
                        and ec_files.has_nonempty_ecx(other.directory, other.idx_directory, name)
                    ),
                    None,
                )
                if owner is None:
                    continue
                try:
                    for extension in MIRRORED:
                        self._mirror_file(owner, location, name, extension)
                except OSError as exc:
                    log.warning("ec volume %d: index is not copied to %s: %s", vid, location.directory, exc)

    def _mirror_file(self, owner: Location, location: Location, name: str, extension: str) -> None:
        places = (location.directory, location.idx_directory)
        if any(files.exists(f"{place}/{name}{extension}") for place in places):
            return
        target = f"{location.directory if extension == '.vif' else location.idx_directory}/{name}{extension}"
        sources = [f"{place}/{name}{extension}" for place in (owner.idx_directory, owner.directory)]
        source = next((path for path in sources if files.exists(path)), None)
        if source is None:
            return
        try:
            shutil.copyfile(source, target + MIRRORING)
            with files.opened(target + MIRRORING) as fd:
                fault("ec.mirror")
                os.fsync(fd)
            os.rename(target + MIRRORING, target)
            files.sync_dir(os.path.dirname(target))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target + MIRRORING)
            raise

    def _reconcile(self) -> None:
        """Mounts shards that are still without an index of their own with that of another disk."""
        for location in self._locations:
            for (collection, vid), numbers in list(self._orphans(location)):
                with self._hold(vid):
                    owner = self._index_owner(collection, vid)
                    name = volume_base_name(collection, vid)
                    if owner is None and ec_files.ecx_path(location.directory, location.idx_directory, name) is None:
                        continue
                    self._load_shards(location, collection, vid, numbers, owner)

    def missing_index(self, vid: int = 0) -> list[tuple[str, int, Location]]:
        """(collection, id, disk) of shards without any index on this server; vid 0: all."""
        found: dict[Key, Location] = {}
        for location in self._locations:
            for (collection, each), _ in self._orphans(location):
                if (not vid or each == vid) and self._index_owner(collection, each) is None:
                    found.setdefault((collection, each), location)
        return [(collection, each, location) for (collection, each), location in found.items()]

    def mount_recovered(self) -> None:
        """Mounts shards whose index has been fetched."""
        if len(self._locations) > 1:
            self._mirror()
        self._reconcile()
