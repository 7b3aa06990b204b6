"""Small file helpers of the storage layer: replace a file whole, make names durable, look at permission bits.

Must not import anything of storage or above. Every function blocks on disk and lets OSError through; callers wrap it
once (`errors.from_os_error`). No locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyvolume.faults import fault


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What one stat says. `can_read` and `can_write` are the owner's permission bits, no access check, as upstream."""

    exists: bool
    can_read: bool = False
    can_write: bool = False
    mtime_s: int = 0
    size: int = 0
    error: int = 0
    """errno of a stat that failed, other than by telling that nothing is there."""


def check_file(path: str) -> FileCheck:
    """Upstream's util.CheckFile: a file that cannot be looked at exists but can be neither read nor written."""
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return FileCheck(exists=False)
    except OSError as exc:
        return FileCheck(exists=True, error=exc.errno or errno.EIO)
    return FileCheck(
        exists=True,
        can_read=bool(st.st_mode & stat.S_IRUSR),
        can_write=bool(st.st_mode & stat.S_IWUSR),
        mtime_s=int(st.st_mtime),
        size=st.st_size,
    )


def exists(path: str) -> bool:
    """Whether a name is there; false only if the system says so (an I/O error is no reason to create it anew)."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes everything at the fd's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes everything at an offset."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def sync_dir(directory: str) -> None:
    """Makes creations, renames and removals in a directory durable."""
    fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a directory
            raise
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes, mode: int = 0o644, *, point: str) -> None:
    """Puts a whole new content in place: `<path>.tmp`, fsync, rename, fsync of the directory.

    A crash leaves the old content or the new one. An existing file keeps its mode. `point` names the failpoints
    `<point>.write`, `<point>.rename`. On an error the temporary is removed and the old file is as it was.
    """
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            fault(f"{point}.write")
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        fault(f"{point}.rename")
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_dir(os.path.dirname(path))


def remove_if_exists(path: str) -> int:
    """Removes a file or a directory tree; returns the size of the file (0 for a directory), -1 if nothing was there."""
    try:
        st = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    if stat.S_ISDIR(st.st_mode):
        shutil.rmtree(path)
        return 0
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return st.st_size


_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Why a second name for a file may be refused where a copy is possible."""


def _copy_synced(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    shutil.copystat(source, target)
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def second_name(source: str, target: str) -> None:
    """Gives a file a second name, durably: a hard link, or where none can be made a copy. What target was is replaced.

    The source stays; where target is a copy nobody may write to either until one of the two is gone. On an error
    target is what it was, unless only making it durable failed: then it is gone.
    """
    temporary = target + ".tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.link(source, temporary)
        except OSError as exc:
            if exc.errno not in _NO_LINK:
                raise
            _copy_synced(source, temporary)
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # a rename of one name of a file onto another does nothing
    try:
        sync_dir(os.path.dirname(target))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise


def drop_name(path: str) -> None:
    """Removes a name so that a crash cannot bring it back. On an error it is still there."""
    temporary = path + ".tmp"
    os.rename(path, temporary)
    try:
        sync_dir(os.path.dirname(path))
    except BaseException:
        os.rename(temporary, path)
        raise
    with contextlib.suppress(OSError):
        os.unlink(temporary)


def move_file(source: str, target: str) -> None:
    """Renames, or across file systems copies, syncs and removes the source. On an error only the source is left."""
    try:
        os.rename(source, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
    else:
        sync_dir(os.path.dirname(target))
        return
    try:
        _copy_synced(source, target)
        sync_dir(os.path.dirname(target))
        os.unlink(source)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
    sync_dir(os.path.dirname(source))


def absolute(path: str) -> str:
    """The path as /status shows it: absolute, cleaned, symlinks kept."""
    return str(Path(os.path.abspath(path)))


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """A file descriptor for the length of a with-block."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)
