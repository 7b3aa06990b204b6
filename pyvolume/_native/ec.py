"""Erasure coding for Python: a thin wrapper of csrc/pv_ec.c.

All calls release the interpreter's lock; those with descriptors block on disk, and borrow them. Nothing is kept between
calls, so different stretches of one volume may be coded on several threads. Imports the engine and the compiled module
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pyvolume import _pv
from pyvolume._native import engine

MAX_SHARDS: Final = 32

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_LAYOUT: Final = _ffi.typeof("pv_ec_layout *")
_T_FDS: Final = _ffi.typeof("int[]")
_T_CRCS: Final = _ffi.typeof("uint32_t[]")
_T_BYTES: Final = _ffi.typeof("uint8_t[]")
_T_PIECES: Final = _ffi.typeof("uint8_t *[]")
_T_ROW: Final = _ffi.typeof("pv_idx_row *")
_T_U64: Final = _ffi.typeof("uint64_t *")

Buffer = bytes | bytearray | memoryview


def matrix(data: int, parity: int) -> list[bytes]:
    """The rows of the code, identity first. Raises NativeError for a ratio that is none."""
    out, err = _new(_T_BYTES, MAX_SHARDS * MAX_SHARDS), _new(_T_ERR)
    _check(_lib.pv_ec_matrix(data, parity, out, err), err)
    flat = bytes(_ffi.buffer(out))
    return [flat[row * data : (row + 1) * data] for row in range(data + parity)]


def encode(
    dat_fd: int,
    dat_bytes: int,
    data: int,
    parity: int,
    *,
    large_block: int,
    small_block: int,
    large_rows: int,
    start: int,
    end: int,
    out_fds: Sequence[int],
) -> list[int]:
    """Makes bytes [start, end) of all shards and writes them; the CRC-32C of each stretch. Raises NativeError."""
    layout = _new(_T_LAYOUT, [data, parity, large_block, small_block, large_rows])
    crcs, err = _new(_T_CRCS, data + parity), _new(_T_ERR)
    fds = _new(_T_FDS, list(out_fds))
    _check(_lib.pv_ec_encode(dat_fd, dat_bytes, layout, start, end, fds, crcs, err), err)
    return list(crcs)


def rebuild(
    data: int, parity: int, in_fds: Mapping[int, int], out_fds: Mapping[int, int], start: int, end: int
) -> dict[int, int]:
    """Makes bytes [start, end) of the shards of out_fds of those of in_fds; their CRCs. Raises NativeError."""
    total = data + parity
    sources = _new(_T_FDS, [in_fds.get(shard, -1) for shard in range(total)])
    targets = _new(_T_FDS, [out_fds.get(shard, -1) for shard in range(total)])
    crcs, err = _new(_T_CRCS, total), _new(_T_ERR)
    _check(_lib.pv_ec_rebuild(data, parity, sources, targets, start, end, crcs, err), err)
    return {shard: int(crcs[shard]) for shard in out_fds}


def recover(data: int, parity: int, pieces: Mapping[int, Buffer], wanted: int) -> bytearray:
    """The bytes of one shard from the same bytes of at least `data` others. Raises NativeError, ValueError."""
    present = sorted(pieces)[:data]
    if len(present) < data or len({len(pieces[shard]) for shard in present}) != 1:
        raise ValueError(f"{data} pieces of one length are needed")
    length = len(pieces[present[0]])
    out = bytearray(length)
    views = [_ffi.from_buffer("uint8_t[]", pieces[shard]) for shard in present]
    err = _new(_T_ERR)
    code = _lib.pv_ec_recover(
        data,
        parity,
        bytes(present),
        _new(_T_PIECES, views),
        length,
        wanted,
        _ffi.from_buffer("uint8_t[]", out, True),
        err,
    )
    _check(code, err)
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


def _check(code: int, err: object) -> None:
    if code < 0:
        info = engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d)  # type: ignore[attr-defined]
        raise engine.NativeError(code, info)
