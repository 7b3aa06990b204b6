"""Walks over the records of a tiered volume's data, read from the remote store in large pieces.

May import _native and the leaves. For local files the engine does this (`engine.dat_scan`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from pyvolume._native import engine
from pyvolume.errors import StorageError

WINDOW_BYTES: Final = 1 << 20
HEADER_BYTES: Final = 16
_HEADER: Final = struct.Struct(">IQi")

ReadAt = Callable[[int, int], memoryview]
"""(offset, length) -> exactly these bytes."""


class Header(NamedTuple):
    """Header of a record, and where it is."""

    offset: int
    cookie: int
    id: int
    size: int
    record_len: int

    @property
    def end(self) -> int:
        return self.offset + self.record_len


class Window:
    """Reads ahead, so that small records do not cost a request each."""

    def __init__(self, read_at: ReadAt, end: int, window_bytes: int = WINDOW_BYTES) -> None:
        self._read_at = read_at
        self._end = end
        self._window_bytes = window_bytes
        self._at = 0
        self._view = memoryview(b"")

    def take(self, offset: int, length: int) -> memoryview:
        """These bytes, which lie before the end. Raises what read_at does."""
        start = offset - self._at
        if start < 0 or start + length > len(self._view):
            want = max(length, min(self._window_bytes, self._end - offset))
            self._at, start, self._view = offset, 0, self._read_at(offset, want)
        return self._view[start : start + length]


def headers(window: Window, version: int, start: int, end: int) -> Iterator[Header]:
    """Every record from start on, as long as whole ones come. Raises StorageError where no next one can be found."""
    offset = start
    while offset + HEADER_BYTES <= end:
        cookie, key, size = _HEADER.unpack(window.take(offset, HEADER_BYTES))
        length = engine.needle_record_len(max(size, 0), version)
        if size < -1 or length <= 0:
            raise StorageError(f"cannot read needle header at offset {offset}: size {size}")
        if offset + length > end:
            return
        yield Header(offset, cookie, key, size, length)
        offset += length
