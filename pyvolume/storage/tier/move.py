"""Moves the data of a volume to a remote store and back, so that at no moment the only copy can be lost.

May import volume, vif, files, tier.* and the leaves; not store. Upstream: `weed/server/volume_grpc_tier_upload.go`,
`volume_grpc_tier_download.go`.

There: changes are refused, the data is flushed and uploaded, its length is asked back, the .vif names the object
(durably), reads go to the object, the local .dat goes. Back: the object is fetched under a working name, flushed,
renamed over the .dat (durably), the .vif forgets the object (durably), reads go to the .dat, the object goes. A crash
between two steps leaves a volume that is served from the one or the other; what may be left over is an object that
nobody names (there: before the .vif; back: after it), or a .dat that is not looked at.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from pyvolume.errors import NoSpace, RemoteError, StorageError, VolumeBusy, VolumeNotFound, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files, vif
from pyvolume.storage.copy import FETCHING
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.storage.tier.backends import Backend, Backends, TransferStopped, Watcher, split_name
from pyvolume.storage.tier.handle import RemoteData
from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _claimed(volume: Volume) -> Iterator[None]:
    """The volume for this move alone: no vacuum, unmount or other move meanwhile."""
    if not volume.try_claim("tier move"):
        raise VolumeBusy(f"volume {volume.vid} is compacting")
    try:
        if not volume.is_open:  # unmounted since it was looked up
            raise VolumeNotFound(f"volume {volume.vid} not found")
        yield
    finally:
        volume.release()


def to_remote(
    volume: Volume, backends: Backends, destination: str, *, keep_local: bool = False, watcher: Watcher | None = None
) -> None:
    """Uploads the data and serves from the remote store from then on. A volume that is tiered already: nothing to do.

    Writes and deletes are refused until it is over; afterwards deletes are allowed, if they were before. Raises
    StorageError with upstream's texts, VolumeBusy, TransferStopped (only before the .vif is written); then the volume
    is as before, and no object is left if the store answers. Failpoints: tier.uploaded, tier.save, tier.swap,
    tier.unlink, and those of the transfer (tier.put, tier.complete, tier.read).
    """
    watcher = watcher if watcher is not None else Watcher()
    if volume.is_remote:
        return
    backend = backends.find(destination)
    if backend is None:
        raise StorageError(f"destination {destination} not found, supported: {backends.names()}")
    kind, id_ = split_name(destination)
    if any((file.backend_type, file.backend_id) == (kind, id_) for file in volume.info.files):
        raise StorageError(f"destination {destination} already exists")
    with _claimed(volume):
        if volume.remote_storage != ("", ""):
            return  # another call was faster
        volume.hold_changes()
        try:
            _upload(volume, backend, destination, watcher)
        finally:
            volume.release_changes()
        log.info("volume %d: %s is in %s as %s now", volume.vid, volume.dat_path, destination, volume.info.files[0].key)
        if not keep_local:
            _remove_local(volume)


def _upload(volume: Volume, backend: Backend, destination: str, watcher: Watcher) -> None:
    """Needs hold_changes: the file does not grow."""
    path = volume.dat_path
    volume.sync()
    try:
        before = os.stat(path)
    except OSError as exc:
        raise StorageError(f"stat data file {path}: {from_os_error(exc, 'stat', path)}") from exc
    if before.st_size < min(volume.dat_bytes, SUPER_BLOCK_SIZE):
        raise StorageError(f"stat data file {path}: {before.st_size} bytes")
    try:
        key = backend.upload(path, before.st_size, watcher)
    except TransferStopped:
        raise
    except (OSError, StorageError) as exc:
        raise StorageError(f"backend {destination} copy file {path}: {exc}") from exc
    try:
        fault("tier.uploaded")
        watcher.check()
        stored = backend.size_of(key)
        after = os.stat(path)
        if (stored, after.st_size, after.st_ino) != (before.st_size, before.st_size, before.st_ino):
            raise StorageError(f"{before.st_size} bytes became {after.st_size} here and {stored} there")
        kind, id_ = split_name(backend.name)
        file = vif.RemoteFile(kind, id_, key, 0, before.st_size, int(before.st_mtime), ".dat")
        volume.switch_to_remote(RemoteData(backend, key, before.st_size, volume.handle.superblock()), file)
    except BaseException as exc:
        _drop_upload(volume, backend, key)
        if isinstance(exc, TransferStopped) or not isinstance(exc, OSError | StorageError):
            raise
        if str(exc).startswith(f"volume {volume.vid} "):
            raise
        raise StorageError(f"backend {destination} copy file {path}: {exc}") from exc


def _drop_upload(volume: Volume, backend: Backend, key: str) -> None:
    """Removes an object that no .vif names; one that a .vif may name stays."""
    known = vif.load(volume.vif_path)
    if known.status in ("unparsable", "unreadable") or any(file.key == key for file in known.info.files):
        log.error(
            "volume %d: object %s in %s may be named by %s and stays", volume.vid, key, backend.name, volume.vif_path
        )
        return
    delete_object(volume.vid, backend, key)


def _remove_local(volume: Volume) -> None:
    try:
        fault("tier.unlink")
        files.remove_if_exists(volume.dat_path)
        files.sync_dir(volume.directory)
    except OSError as exc:
        log.warning("volume %d: %s", volume.vid, from_os_error(exc, "unlink", volume.dat_path))


def from_remote(
    volume: Volume, backends: Backends, *, keep_remote: bool = False, watcher: Watcher | None = None
) -> None:
    """Fetches the data and serves from the local disk from then on; removes the object unless keep_remote.

    Reads and deletes go on. Raises StorageError with upstream's texts, VolumeBusy, NoSpace, TransferStopped (only
    before the .vif is written); then the volume is served from the store as before. When only the removal of the
    object fails, that is raised, but the volume is local. Failpoints: tier.fetched, tier.place, tier.unsave,
    tier.unswap, tier.delete, and those of the transfer (tier.get, tier.write).
    """
    watcher = watcher if watcher is not None else Watcher()
    _check_remote(volume)
    name, key = volume.remote_storage
    backend = backends.find(name)
    if backend is None:
        raise StorageError(f"remote storage {name} not found from supported: {backends.names()}")
    with _claimed(volume):
        _check_remote(volume)  # another call may have been faster
        name, key = volume.remote_storage
        _fetch(volume, backend, name, key, watcher)
        volume.switch_to_local()
        log.info("volume %d: %s of %s is in %s now", volume.vid, key, name, volume.dat_path)
        if keep_remote:
            return
        try:
            backend.delete(key)
        except RemoteError as exc:
            raise StorageError(f"volume {volume.vid} failed to delete remote file {key}: {exc}") from exc


def _check_remote(volume: Volume) -> None:
    if not all(volume.remote_storage) or not volume.is_remote:
        raise StorageError(f"volume {volume.vid} is already on local disk")


def _fetch(volume: Volume, backend: Backend, name: str, key: str, watcher: Watcher) -> None:
    """Puts the object in the place of the .dat, durably."""
    path, working = volume.dat_path, volume.dat_path + FETCHING
    file = volume.info.files[0]
    try:
        size = backend.size_of(key)
        if size != file.file_size:
            raise StorageError(f"object {key} has {size} bytes, not {file.file_size}")
        _check_room(volume, size)
        try:
            with files.opened(working, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
                backend.download(key, fd, size, watcher)
                _check_data(volume, fd, size)
                fault("tier.fetched")
                os.fsync(fd)
            if file.modified_time:
                with contextlib.suppress(OSError):
                    os.utime(working, (file.modified_time, file.modified_time))
            watcher.check()
            fault("tier.place")
            os.rename(working, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(working)
            raise
    except (TransferStopped, NoSpace):
        raise
    except OSError as exc:
        raise StorageError(f"backend {name} copy file {path}: {from_os_error(exc, 'open', path)}") from exc
    except StorageError as exc:
        raise StorageError(f"backend {name} copy file {path}: {exc}") from exc
    try:
        files.sync_dir(volume.directory)
    except OSError as exc:
        raise StorageError(f"volume {volume.vid} fsync dir for {path}: {from_os_error(exc, 'sync')}") from exc


def _check_room(volume: Volume, size: int) -> None:
    """Raises NoSpace rather than fill the disk with half of the data."""
    stat = os.statvfs(volume.directory)
    free = stat.f_bavail * stat.f_frsize
    if size > free:
        raise NoSpace(f"not enough free space for {volume.dat_path}: {size} bytes needed, {free} free")


def _check_data(volume: Volume, fd: int, size: int) -> None:
    """What was fetched must be this volume's data, as far as its head and length tell."""
    if os.fstat(fd).st_size != size:
        raise StorageError(f"{os.fstat(fd).st_size} bytes came, not {size}")
    if size >= SUPER_BLOCK_SIZE and SuperBlock.read(fd).version != volume.version:
        raise StorageError(f"the super block says version {SuperBlock.read(fd).version}, not {volume.version}")


def delete_object(vid: int, backend: Backend | None, key: str) -> None:
    """Removes the object of a volume that is gone; a failure is logged, as upstream ignores it."""
    if backend is None or not key:
        return
    try:
        backend.delete(key)
    except StorageError as exc:
        log.warning("volume %d: object %s in %s is left behind: %s", vid, key, backend.name, exc)
