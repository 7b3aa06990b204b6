"""Search by append time for Python: a thin wrapper of csrc/pv_since.c.

Both calls release the interpreter's lock and block on disk. Descriptors are borrowed. Imports the engine module and the
compiled module only.
"""

from __future__ import annotations

from typing import Final

from pyvolume import _pv
from pyvolume._native import engine

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_U64: Final = _ffi.typeof("uint64_t *")


class SearchError(engine.NativeError):
    """A record that the search needed cannot be read: `row` of the index, `offset` in the data file."""

    def __init__(self, code: int, info: engine.NativeInfo, *, row: int, offset: int) -> None:
        super().__init__(code, info, offset=offset)
        self.row = row


def append_time(dat_fd: int, version: int, offset: int) -> int:
    """When the record at a byte offset was appended, in ns; 0 for versions 1 and 2. Raises NativeError."""
    when, err = _new(_T_U64), _new(_T_ERR)
    code = _lib.pv_dat_append_time(dat_fd, version, offset, when, err)
    if code < 0:
        raise engine.NativeError(code, _info(code, err))
    return int(when[0])


def find_since(dat_fd: int, idx_fd: int, width: int, version: int, rows: int, since_ns: int) -> int | None:
    """Byte offset of the first record, by index row, that was appended after since_ns; None if nothing was.

    Looks at the first `rows` rows. Raises SearchError.
    """
    offset, row, err = _new(_T_U64), _new(_T_U64), _new(_T_ERR)
    code = _lib.pv_dat_find_since(dat_fd, idx_fd, width, version, rows, since_ns, offset, row, err)
    if code < 0:
        raise SearchError(code, _info(code, err), row=int(row[0]), offset=int(offset[0]))
    return int(offset[0]) if code else None


def _info(code: int, err: object) -> engine.NativeInfo:
    return engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d)  # type: ignore[attr-defined]
