"""The identity of a data directory and the lock that keeps two servers off it (departure P4).

May import files and the leaves only. A directory is locked by flock on its `vol_dir.uuid`, which every server makes and
no server replaces. The same directory named twice in one process shares one lock. A Go server does not look at the
lock, so the `.dat` files that other processes hold open for writing are looked for, too, where /proc lets us.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyvolume.errors import DirectoryInUse, StorageError, from_os_error
from pyvolume.storage.files import write_all

log = logging.getLogger(__name__)

UUID_FILE_NAME: Final = "vol_dir.uuid"
_MAX_UUID_BYTES: Final = 4096

_held_lock = threading.Lock()
_held: dict[tuple[int, int], tuple[int, int]] = {}
"""(device, inode) of a uuid file -> (locked fd, DirectoryLocks of this process on it). Guarded by _held_lock."""


@dataclass
class DirectoryLock:
    """A lock that is held until `release`. `uuid` is the directory's identity, verbatim as stored."""

    directory: str
    uuid: str
    key: tuple[int, int]
    """(device, inode) of the uuid file: the same for two paths of one directory."""
    _released: bool = False

    def release(self) -> None:
        """Gives the lock back; the last holder in this process closes the file. Idempotent."""
        with _held_lock:
            if self._released:
                return
            self._released = True
            fd, count = _held[self.key]
            if count > 1:
                _held[self.key] = (fd, count - 1)
            else:
                del _held[self.key]
                os.close(fd)


def lock_directory(directory: str) -> DirectoryLock:
    """Locks a data directory and reads, or makes, its uuid. Blocks on disk.

    Raises DirectoryInUse naming the holder's pid, StorageError `cannot generate uuid of dir …` when the file can be
    neither read nor made. A file system without locks is accepted with a warning.
    """
    path = f"{directory}/{UUID_FILE_NAME}"
    try:
        fd = _open_uuid(path)
    except OSError as exc:
        raise StorageError(f"cannot generate uuid of dir {directory}: {from_os_error(exc, 'open', path)}") from exc
    keep = False
    try:
        st = os.fstat(fd)
        key = (st.st_dev, st.st_ino)
        with _held_lock:
            shared = _held.get(key)
            if shared is not None:
                _held[key] = (shared[0], shared[1] + 1)
            else:
                _flock(fd, directory, key)
                _held[key] = (fd, 1)
                keep = True
        lock = DirectoryLock(directory, "", key)
        try:
            if shared is None:
                _refuse_open_volumes(directory)
            lock.uuid = _read_or_write_uuid(fd, path)
        except OSError as exc:
            lock.release()
            raise StorageError(f"cannot generate uuid of dir {directory}: {from_os_error(exc, 'write', path)}") from exc
        except StorageError:
            lock.release()
            raise
        return lock
    finally:
        if not keep:
            os.close(fd)


def _open_uuid(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read_or_write_uuid(fd: int, path: str) -> str:
    data = os.pread(fd, _MAX_UUID_BYTES, 0)
    if data:
        return data.decode("utf-8", "surrogateescape")
    fresh = str(uuid.uuid4())
    os.lseek(fd, 0, os.SEEK_SET)
    write_all(fd, fresh.encode())
    os.fsync(fd)
    log.info("made %s: %s", path, fresh)
    return fresh


def _flock(fd: int, directory: str, key: tuple[int, int]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = lock_holder(key)
        who = f"process {pid}" if pid else "another process"
        raise DirectoryInUse(
            f"data directory {directory} is in use by {who} (lock on {UUID_FILE_NAME}); two servers on one directory "
            "destroy each other's data",
            path=directory,
            pid=pid,
        ) from None
    except OSError as exc:
        if exc.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        log.warning("%s: the file system has no locks (%s); nothing keeps a second server off it", directory, exc)


def lock_holder(key: tuple[int, int]) -> int:
    """Pid of the process holding the flock on (device, inode), by /proc/locks; 0 if it cannot be found out."""
    device, inode = key
    exact = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    by_inode = 0
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as table:
            for line in table:
                # "1: FLOCK  ADVISORY  WRITE 1234 08:02:131090 0 EOF"
                words = line.split()
                if len(words) < 6 or words[1] != "FLOCK" or not words[4].isdigit():
                    continue
                if words[5] == exact:
                    return int(words[4])
                if words[5].endswith(f":{inode}"):
                    by_inode = int(words[4])
    except OSError:
        return 0
    return by_inode


def _refuse_open_volumes(directory: str) -> None:
    for pid, path in writers_of_volumes(directory):
        raise DirectoryInUse(
            f"data directory {directory} is in use by process {pid}, which holds {path} open for writing; two servers "
            "on one directory destroy each other's data",
            path=directory,
            pid=pid,
        )


_WRITTEN: Final = (".dat", ".ecx")
"""What every server holds open for writing: the data of a plain volume, the index of an erasure coded one."""


def writers_of_volumes(directory: str) -> Iterator[tuple[int, str]]:
    """(pid, path) of files of this directory, .dat and .ecx, that others hold open for writing, as far as /proc shows.

    Blocks for as long as walking /proc takes (milliseconds for thousands of descriptors).
    """
    own: dict[tuple[int, int], str] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(_WRITTEN):
                with contextlib.suppress(OSError):
                    st = entry.stat()
                    own[st.st_dev, st.st_ino] = entry.path
    if not own:
        return
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return
    for pid in pids:
        if pid == os.getpid():
            continue
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # not ours to look at, or gone
        for fd in fds:
            with contextlib.suppress(OSError, ValueError):
                if not os.readlink(f"/proc/{pid}/fd/{fd}").endswith(_WRITTEN):
                    continue
                st = os.stat(f"/proc/{pid}/fd/{fd}")
                path = own.get((st.st_dev, st.st_ino))
                if path is not None and _is_open_for_writing(pid, fd):
                    yield pid, path


def _is_open_for_writing(pid: int, fd: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            name, _, value = line.partition(":")
            if name == "flags":
                return int(value, 8) & os.O_ACCMODE != os.O_RDONLY
    return False
