"""Erasure coding for Python: a thin wrapper of csrc/pv_ec.c and pv_shards.c.

All calls release the interpreter's lock; those with descriptors block on disk, and borrow them. Functions keep nothing
between calls, so different stretches of one volume may be coded on several threads. Imports the engine and the
compiled module only.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from pyvolume import _pv
from pyvolume._native import engine
from pyvolume._native.borrow import Buffer, borrow

MAX_SHARDS: Final = 32
CHUNK_BYTES: Final = 512 << 10
"""PV_EC_CHUNK: working memory for each file that is read or written."""

File = tuple[int, int]
"""Descriptor, and one by O_DIRECT or -1."""
NO_FILE: Final[File] = (-1, -1)
CutLayout = tuple[int, int, int, int, int]
"""Data shards, parity shards, bytes of a large block, of a small one, rows of large blocks."""

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_LAYOUT: Final = _ffi.typeof("pv_ec_layout *")
_T_FILES: Final = _ffi.typeof("pv_ec_file[]")
_T_FDS: Final = _ffi.typeof("int32_t[]")
_T_CRCS: Final = _ffi.typeof("uint32_t[]")
_T_BYTES: Final = _ffi.typeof("uint8_t[]")
_T_PIECES: Final = _ffi.typeof("uint8_t *[]")
_T_ROW: Final = _ffi.typeof("pv_idx_row *")
_T_U64: Final = _ffi.typeof("uint64_t *")
_T_U64S: Final = _ffi.typeof("uint64_t[]")


def matrix(data: int, parity: int) -> list[bytes]:
    """The rows of the code, identity first. Raises NativeError for a ratio that is none."""
    out, err = _new(_T_BYTES, MAX_SHARDS * MAX_SHARDS), _new(_T_ERR)
    _check(_lib.pv_ec_matrix(data, parity, out, err), err)
    flat = bytes(_ffi.buffer(out))
    return [flat[row * data : (row + 1) * data] for row in range(data + parity)]


def scratch(files: int) -> mmap.mmap:
    """Working memory for so many files; for one thread at a time."""
    return mmap.mmap(-1, files * CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def reserve(fd: int, length: int) -> None:
    """Makes a file so long and reserves its room. Raises NativeError."""
    err = _new(_T_ERR)
    _check(_lib.pv_ec_reserve(fd, length, err), err)


def encode(
    dat: File,
    dat_bytes: int,
    layout: CutLayout,
    start: int,
    end: int,
    out: Sequence[File],
    sums: list[int],
    memory: mmap.mmap,
) -> None:
    """Makes bytes [start, end) of all shards and writes them; their checksums go on in sums. Raises NativeError."""
    cut, err = _new(_T_LAYOUT, list(layout)), _new(_T_ERR)
    crcs = _new(_T_CRCS, sums)
    view = _ffi.from_buffer("char[]", memory)
    source = _new(_T_FILES, [dat])
    code = _lib.pv_ec_encode(
        source, dat_bytes, cut, start, end, _new(_T_FILES, list(out)), crcs, view, len(memory), err
    )
    _check(code, err)
    sums[:] = list(crcs)


def rebuild(
    data: int,
    parity: int,
    sources: Mapping[int, File],
    targets: Mapping[int, File],
    start: int,
    end: int,
    sums: list[int],
    memory: mmap.mmap,
) -> None:
    """Makes bytes [start, end) of the targets of the first `data` sources; the checksums of all these go on in sums.

    Raises NativeError, whose info.d is the shard that cannot be read.
    """
    total = data + parity
    crcs, err = _new(_T_CRCS, sums), _new(_T_ERR)
    ins = _new(_T_FILES, [sources.get(shard, NO_FILE) for shard in range(total)])
    outs = _new(_T_FILES, [targets.get(shard, NO_FILE) for shard in range(total)])
    view = _ffi.from_buffer("char[]", memory)
    _check(_lib.pv_ec_rebuild(data, parity, ins, outs, start, end, crcs, view, len(memory), err), err)
    sums[:] = list(crcs)


def decode(shards: Sequence[File], layout: CutLayout, out: File, start: int, end: int, memory: mmap.mmap) -> None:
    """Writes bytes [start, end) of a .dat from its data shards. Raises NativeError."""
    cut, err = _new(_T_LAYOUT, list(layout)), _new(_T_ERR)
    view = _ffi.from_buffer("char[]", memory)
    ins, outs = _new(_T_FILES, list(shards)), _new(_T_FILES, [out])
    _check(_lib.pv_ec_decode(ins, cut, outs, start, end, view, len(memory), err), err)


def checksum(file: File, start: int, end: int, crc: int, memory: mmap.mmap) -> int:
    """Goes on with a CRC-32C over bytes [start, end). Raises NativeError."""
    crcs, err = _new(_T_CRCS, [crc]), _new(_T_ERR)
    view = _ffi.from_buffer("char[]", memory)
    _check(_lib.pv_ec_sum(_new(_T_FILES, [file]), start, end, crcs, view, len(memory), err), err)
    return int(crcs[0])


def recover(data: int, parity: int, pieces: Mapping[int, Buffer], wanted: int) -> bytearray:
    """The bytes of one shard from the same bytes of at least `data` others. Raises NativeError, ValueError."""
    present = sorted(pieces)[:data]
    if len(present) < data or len({len(pieces[shard]) for shard in present}) != 1:
        raise ValueError(f"{data} pieces of one length are needed")
    length = len(pieces[present[0]])
    out = bytearray(length)
    views = [borrow(pieces[shard])[0] for shard in present]
    err = _new(_T_ERR)
    code = _lib.pv_ec_recover(
        data,
        parity,
        bytes(present),
        _new(_T_PIECES, views),
        length,
        wanted,
        borrow(out, writable=True)[0],
        err,
    )
    _check(code, err)
    return out


def read(fds: Sequence[int], layout: CutLayout, start: int, length: int) -> bytearray:
    """Bytes [start, start + length) of a .dat out of its shards; -1 for a shard that is not there.

    The bytes of one that is not there are made of those of the first `data` that are. Raises NativeError.
    """
    cut, err = _new(_T_LAYOUT, layout), _new(_T_ERR)
    out = bytearray(length)
    _check(_lib.pv_ec_read(_new(_T_FDS, fds), cut, start, length, borrow(out, writable=True)[0], err), err)
    return out


def ecx_from_idx(idx_fd: int, width: int, rows: int, out_fd: int) -> int:
    """Writes the sorted index of the first `rows` rows; how many are live. Raises NativeError."""
    live, err = _new(_T_U64), _new(_T_ERR)
    _check(_lib.pv_ecx_from_idx(idx_fd, width, rows, out_fd, live, err), err)
    return int(live[0])


def ecx_find(fd: int, width: int, rows: int, key: int) -> tuple[int, int, int] | None:
    """(row number, offset, size) of a key; None if it is not there. Raises NativeError."""
    row, index, err = _new(_T_ROW), _new(_T_U64), _new(_T_ERR)
    code = _lib.pv_ecx_find(fd, width, rows, key, row, index, err)
    _check(code, err)
    return (int(index[0]), int(row.offset), int(row.size)) if code else None


class SharedFd:
    """Takes a descriptor, which is closed when this object and all Shards that use it are gone."""

    __slots__ = ("handle",)

    def __init__(self, fd: int) -> None:
        out = _new("pv_file **")
        _check(_lib.pv_file_new(fd, out), _new(_T_ERR))
        self.handle: Any = _ffi.gc(out[0], _lib.pv_file_unref)

    def release(self) -> None:
        """Gives up this object's part. It must not be used afterwards."""
        _ffi.release(self.handle)


class IdSet:
    """Needle ids, which the fast lane sees as soon as they are added. Thread-safe; ids never leave it."""

    __slots__ = ("handle",)

    def __init__(self, journal: bytes = b"") -> None:
        """journal: ids of 8 bytes each. Raises NativeError PV_ENOMEM."""
        out = _new("pv_ids **")
        _check(_lib.pv_ids_new(out), _new(_T_ERR))
        self.handle: Any = _ffi.gc(out[0], _lib.pv_ids_unref)
        _check(_lib.pv_ids_add_bytes(self.handle, journal, len(journal)), _new(_T_ERR))

    def add(self, needle_id: int) -> bool:
        """Whether it is new. Raises NativeError PV_ENOMEM."""
        code = _lib.pv_ids_add(self.handle, needle_id)
        _check(code, _new(_T_ERR))
        return bool(code)

    def covers(self, other: IdSet) -> bool:
        """Whether it has all ids of another set."""
        return bool(_lib.pv_ids_covers(self.handle, other.handle))

    def __contains__(self, needle_id: int) -> bool:
        return bool(_lib.pv_ids_has(self.handle, needle_id))

    def __len__(self) -> int:
        return int(_lib.pv_ids_count(self.handle))

    def __iter__(self) -> Iterator[int]:
        """Those that are in it now."""
        room = len(self)
        out = _new(_T_U64S, room)
        return iter(sorted(_ffi.unpack(out, _lib.pv_ids_list(self.handle, out, room))))


class Shards:
    """What this server has of a volume, for the fast lane. Keeps the files open as long as it lives."""

    __slots__ = ("handle",)

    def __init__(
        self,
        *,
        ecx: SharedFd,
        rows: int,
        width: int,
        version: int,
        deleted: IdSet,
        shards: Mapping[int, SharedFd],
        layout: CutLayout,
    ) -> None:
        """Raises NativeError PV_EINVAL for a ratio, width or version that is none."""
        opts, out = _new("pv_shards_opts *"), _new("pv_shards **")
        opts.ecx, opts.deleted, opts.rows, opts.width, opts.version = ecx.handle, deleted.handle, rows, width, version
        opts.layout = list(layout)
        for number, shard in shards.items():
            opts.files[number] = shard.handle
        _check(_lib.pv_shards_new(opts, out), _new(_T_ERR))
        self.handle: Any = _ffi.gc(out[0], _lib.pv_shards_unref)

    def elsewhere(self, numbers: Iterable[int], valid_s: float) -> None:
        """Which shards other servers have, and how long that is to be believed. Until told, and afterwards, bytes of a
        shard that is not here are not made of others."""
        bits = 0
        for number in numbers:
            bits |= 1 << number
        _lib.pv_shards_elsewhere(self.handle, bits & 0xFFFFFFFF, max(0, min(int(valid_s * 1000), 0xFFFFFFFF)))


def ecx_buried(fd: int, width: int, rows: int) -> IdSet:
    """The ids whose rows in a sorted index say that they are deleted. Raises NativeError."""
    found, err = IdSet(), _new(_T_ERR)
    _check(_lib.pv_ecx_buried(fd, width, rows, found.handle, err), err)
    return found


def _check(code: int, err: object) -> None:
    if code < 0:
        info = engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d)  # type: ignore[attr-defined]
        raise engine.NativeError(code, info)
