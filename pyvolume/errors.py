"""The exceptions of pyvolume: one class per thing a caller can do about it.

A leaf: must not import any other module of the package. `str(e)` is always the text a client may see, in the words of
the upstream server, so HTTP and gRPC map classes to codes and copy the text. Details for logs (path, offset, errno) are
attributes. Codes of the C engine become exceptions in exactly one place, `from_native`; nobody else inspects them.
"""

from __future__ import annotations

import errno as _errno
import os
from enum import IntEnum
from typing import Protocol

__all__ = [
    "BadRequest",
    "CookieMismatch",
    "CorruptNeedle",
    "CrcMismatch",
    "DirectoryInUse",
    "DiskError",
    "NativeCode",
    "NeedleDeleted",
    "NeedleNotFound",
    "NoFreeLocation",
    "NoSpace",
    "PyvolumeError",
    "RemoteError",
    "SizeMismatch",
    "StateVersionMismatch",
    "StorageError",
    "VolumeBusy",
    "VolumeClosed",
    "VolumeExists",
    "VolumeFull",
    "VolumeLoadError",
    "VolumeMoved",
    "VolumeNotEmpty",
    "VolumeNotFound",
    "VolumeReadOnly",
    "disk_error",
    "errno_text",
    "from_native",
    "from_os_error",
    "os_error_text",
]


class PyvolumeError(Exception):
    """Base of all errors raised on purpose; `str()` is client-visible text in upstream's words."""


class BadRequest(PyvolumeError):
    """The caller's input is malformed; HTTP 400, gRPC per RPC. Repeating it is useless."""


class StorageError(PyvolumeError):
    """Base of what the storage layer raises."""


class VolumeNotFound(StorageError):
    """This server does not hold the volume; ask the master where it is."""


class VolumeExists(StorageError):
    """AllocateVolume for an id that is mounted already: `Volume Id %d already exists!`."""


class VolumeNotEmpty(StorageError):
    """A delete with only_empty met data: `volume not empty`."""


class VolumeBusy(StorageError):
    """A vacuum holds the volume: `volume %d is compacting`. Try again later."""


class NeedleNotFound(StorageError):
    """No such key, or its time to live is over: `not found`."""


class NeedleDeleted(NeedleNotFound):
    """The key was deleted: `already deleted`."""


class CookieMismatch(StorageError):
    """The key exists with another cookie: `mismatching cookie %x`."""


class VolumeReadOnly(StorageError):
    """Writes (or deletes) are switched off: `volume %d is read only`."""


class VolumeClosed(StorageError):
    """The volume was unmounted or deleted while in use: `volume %d is closed`."""


class VolumeFull(StorageError):
    """The offset limit of the volume is reached: `Volume Size %d Exceeded %d`."""


class VolumeMoved(StorageError):
    """The volume was compacted between two pieces of one read: look the needle up again. Never reaches a client."""


class CorruptNeedle(StorageError):
    """Bytes on disk do not form the record that the index promises. `path` and `offset` say where, if known."""

    def __init__(self, text: str, *, path: str | None = None, offset: int | None = None) -> None:
        super().__init__(text)
        self.path = path
        self.offset = offset


class CrcMismatch(CorruptNeedle):
    """The checksum over the data differs from the stored one."""


class SizeMismatch(CorruptNeedle):
    """The header's size is not the index's."""


class VolumeLoadError(StorageError):
    """One volume cannot be loaded; others are not affected. `str()` names the file; `reason` is the bare reason."""

    def __init__(
        self, text: str, *, path: str | None = None, offset: int | None = None, reason: str | None = None
    ) -> None:
        super().__init__(text)
        self.path = path
        self.offset = offset
        self.reason = text if reason is None else reason


class DiskError(StorageError):
    """A system call on a volume's files failed. `errno` is kept; EIO counts towards the volume's quarantine."""

    def __init__(self, text: str, errno: int = 0, *, path: str | None = None, offset: int | None = None) -> None:
        super().__init__(text)
        self.errno = errno
        self.path = path
        self.offset = offset


class NoSpace(DiskError):
    """The disk (or quota) is full. The append was rolled back; the volume is writable again once room returns."""


class RemoteError(StorageError):
    """A remote store refused, failed, or did not answer in time. The data may be there all the same: nothing is marked.

    `is_transient`: asking again may help. `in_body`: it broke off after the answer had begun.
    """

    def __init__(self, text: str, *, is_transient: bool = False, in_body: bool = False) -> None:
        super().__init__(text)
        self.is_transient = is_transient
        self.in_body = in_body


class NoFreeLocation(StorageError):
    """No directory may take another volume: `No more free space left`, `no space left for disk type %s`."""


class DirectoryInUse(StorageError):
    """Another process serves this data directory. `pid` is the holder if it could be found out, else 0."""

    def __init__(self, text: str, *, path: str, pid: int = 0) -> None:
        super().__init__(text)
        self.path = path
        self.pid = pid


class StateVersionMismatch(StorageError):
    """SetState carried another version than the stored one."""


def errno_text(number: int) -> str:
    """The system's text for an errno as upstream prints it: first letter lower case (`no space left on device`)."""
    text = os.strerror(number)
    if len(text) > 1 and text[0].isupper() and text[1].islower():
        return text[0].lower() + text[1:]
    return text


def os_error_text(operation: str, path: str | None, number: int) -> str:
    """`<operation> <path>: <text>`, the shape of upstream's file errors: `open /d/3.dat: no such file or directory`."""
    return f"{operation} {path}: {errno_text(number)}" if path else f"{operation}: {errno_text(number)}"


def disk_error(text: str, number: int, *, path: str | None = None, offset: int | None = None) -> DiskError:
    """A DiskError with this text, as NoSpace when the errno says that the disk or a quota is full."""
    cls = NoSpace if number in (_errno.ENOSPC, _errno.EDQUOT) else DiskError
    return cls(text, number, path=path, offset=offset)


def from_os_error(exc: OSError, operation: str, path: str | os.PathLike[str] | None = None) -> DiskError:
    """Wraps an OSError at the storage edge; the text is upstream's `<operation> <path>: <reason>`."""
    name = os.fspath(path) if path is not None else (str(exc.filename) if exc.filename is not None else None)
    number = exc.errno or 0
    text = os_error_text(operation, name, number) if number else f"{operation} {name}: {exc}"
    return disk_error(text, number, path=name)


class NativeCode(IntEnum):
    """The codes of `enum pv_err` in csrc/pv.h (a test compares the two)."""

    OK = 0
    ESYS = -1000
    ENOMEM = -1001
    EINVAL = -1002
    EEOF = -1003
    ENOTFOUND = -1004
    EDELETED = -1005
    ECOOKIE = -1006
    ECRC = -1007
    ESIZE = -1008
    ECORRUPT = -1009
    EVERSION = -1010
    ECLOSED = -1011
    EREADONLY = -1012
    EFULL = -1013
    EBUFFER = -1014
    ERANGE = -1015
    EEXISTS = -1016
    EPARSE = -1017
    EMETA = -1018
    EID = -1019
    EALIGN = -1020
    ESTALE = -1021
    EMORE = -1022


class NativeInfo(Protocol):
    """What the engine says about a failure (pv_errinfo): the numbers mean what pv.h says at the code."""

    @property
    def sys_errno(self) -> int: ...
    @property
    def a(self) -> int: ...
    @property
    def b(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def d(self) -> int: ...


def _signed(value: int) -> int:
    """An int64 that travelled as uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _size32(value: int) -> int:
    """An int32 needle size that travelled as uint32 or uint64."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def from_native(
    code: int,
    info: NativeInfo | None,
    *,
    vid: int | None = None,
    path: str | None = None,
    operation: str = "read",
    key: int | None = None,
    offset_width: int = 4,
) -> StorageError:
    """The exception for an engine code, with upstream's text. Does not raise.

    vid, path and key are context the engine does not know; operation is the word for a failed system call (`read`,
    `write`, `open`, `sync`). An unknown code gives a plain StorageError that names it, so a new code is not swallowed.
    """
    a, b, c, d = (int(info.a), int(info.b), int(info.c), int(info.d)) if info is not None else (0, 0, 0, 0)
    volume = "volume" if vid is None else f"volume {vid}"
    error: StorageError
    match code:
        case NativeCode.ESYS:
            number = int(info.sys_errno) if info is not None else 0
            error = disk_error(os_error_text(operation, path, number), number, path=path, offset=a)
        case NativeCode.ENOTFOUND:
            error = NeedleNotFound("not found")
        case NativeCode.EDELETED:
            error = NeedleDeleted("already deleted")
        case NativeCode.ECOOKIE:
            error = CookieMismatch(f"mismatching cookie {a & 0xFFFFFFFF:x}")
        case NativeCode.EEOF:
            error = CorruptNeedle("EOF", path=path, offset=a)
        case NativeCode.ECRC:
            error = CrcMismatch(
                f"invalid CRC for needle {c:x} (got {a & 0xFFFFFFFF:08x}, want {b & 0xFFFFFFFF:08x}), "
                "data on disk corrupted: needle data corrupted",
                path=path,
            )
        case NativeCode.ESIZE:
            error = SizeMismatch(_size_mismatch_text(a, b, c, d, offset_width), path=path, offset=a)
        case NativeCode.ECORRUPT:
            error = CorruptNeedle(f"index out of range {a}: needle data corrupted", path=path)
        case NativeCode.EMETA:
            where, data_size = _signed(d), b & 0xFFFFFFFF
            text = f"invalid needle meta size {_signed(a)}: DataSize={data_size}, size={_size32(c)}, offset={where}"
            error = CorruptNeedle(text, path=path, offset=where)
        case NativeCode.EID:
            error = CorruptNeedle(f"index key {b:x} does not match needle's Id {a:x}", path=path, offset=c)
        case NativeCode.EVERSION:
            error = StorageError(f"unsupported version: {a}")
        case NativeCode.ECLOSED:
            error = VolumeClosed(f"{volume} is closed")
        case NativeCode.EREADONLY:
            error = VolumeReadOnly(f"{volume} is read only")
        case NativeCode.EFULL:
            error = VolumeFull(f"Volume Size {a} Exceeded {b}")
        case NativeCode.EBUFFER:
            error = StorageError(f"buffer too small: need {a} bytes")
        case NativeCode.EALIGN:
            error = VolumeLoadError(f"index file's size is {a} bytes, maybe corrupted", path=path)
        case NativeCode.ESTALE:
            error = VolumeMoved(f"{volume} is compacted")
        case NativeCode.EEXISTS:
            error = VolumeExists(f"Volume Id {vid if vid is not None else a} already exists!")
        case NativeCode.ENOMEM:
            error = StorageError("cannot allocate memory")
        case NativeCode.EINVAL | NativeCode.ERANGE | NativeCode.EPARSE | NativeCode.EMORE:
            subject = f" for needle {key:x}" if key is not None else ""
            error = StorageError(f"engine refused the call: {NativeCode(code).name}{subject} (a={a} b={b} c={c} d={d})")
        case _:
            error = StorageError(f"engine error {code} (a={a} b={b} c={c} d={d})")
    return error


def _size_mismatch_text(offset: int, found_id: int, found_size: int, expected_size: int, offset_width: int) -> str:
    """Upstream is terse in a 4-byte build below 32 GiB; it prints the id as the hex of its hex text."""
    if offset_width == 4 and offset < 1 << 35:
        return "size mismatch"
    double_hex = f"{found_id:x}".encode().hex()
    return (
        f"size mismatch: entry not found: offset {_signed(offset)} found id {double_hex} "
        f"size {_size32(found_size)}, expected size {_size32(expected_size)}"
    )
