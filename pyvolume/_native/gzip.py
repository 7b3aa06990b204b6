"""Gzip by the engine: the encoder whose output is upstream's, byte for byte (csrc/pv_gzip.c).

Imports the engine module and the compiled module only.
"""

from __future__ import annotations

from typing import Final

from pyvolume import _pv
from pyvolume._native import engine
from pyvolume._native.borrow import Buffer, borrow

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_new_uninitialised: Final = _ffi.new_allocator(should_clear_after_alloc=False)
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_LEN: Final = _ffi.typeof("size_t *")
_T_BYTES: Final = _ffi.typeof("uint8_t[]")

PV_EBUFFER: Final = int(_lib.PV_EBUFFER)


def gzip_fast(data: Buffer, most_bytes: int) -> bytes | None:
    """One gzip member of data; None if it has more than most_bytes. Runs without the interpreter's lock."""
    view, length = borrow(data)
    err, out_len = _new(_T_ERR), _new(_T_LEN)
    out = _new_uninitialised(_T_BYTES, max(1, most_bytes))
    code = _lib.pv_gzip_fast(view, length, out, max(0, most_bytes), out_len, err)
    if code == PV_EBUFFER:
        return None
    if code < 0:
        raise engine.NativeError(code, engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d))
    return bytes(_ffi.buffer(out, out_len[0]))
