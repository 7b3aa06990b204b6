"""Addresses of Python's buffers, for the length of a call. Imports the compiled module only."""

from __future__ import annotations

from typing import Any, Final

from pyvolume import _pv

Buffer = bytes | bytearray | memoryview

_ffi: Final = _pv.ffi
_from_buffer: Final = _ffi.from_buffer
_release: Final = _ffi.release
_cast: Final = _ffi.cast
_T_BYTES: Final = _ffi.typeof("uint8_t[]")
_T_POINTER: Final = _ffi.typeof("uint8_t *")


def borrow(data: Buffer, *, writable: bool = False) -> tuple[Any, int]:
    """(uint8_t *, number of bytes). Whoever calls keeps `data` until the engine is done with it.

    Nothing is left registered with a memoryview: before Python 3.12.4 the collector crashes the process when it frees a
    cycle with a memoryview in it that something has a hold on, and the frames of an exception that somebody has kept
    are such a cycle. What is behind the memoryview stays in place all the same, as the memoryview holds on to it.
    """
    held = _from_buffer(_T_BYTES, data, writable)
    length = len(held)
    if type(data) is not memoryview:
        return held, length
    pointer = _cast(_T_POINTER, held)
    _release(held)
    return pointer, length
