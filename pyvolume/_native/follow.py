"""Records as a follower's messages: a thin wrapper of csrc/pv_follow.c.

The call releases the interpreter's lock and blocks on disk. Imports the engine module and the compiled module only.
"""

from __future__ import annotations

from typing import Final

from pyvolume import _pv
from pyvolume._native import engine

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib

RECORD_MAX: Final = int(_lib.PV_FOLLOW_RECORD_MAX)
"""Size of the longest record that messages are made of here."""
BATCH_BYTES: Final = 512 << 10
BATCH_MESSAGES: Final = 1024


class Follower:
    """Makes batches of messages of one volume; holds the memory they are made in. For one thread."""

    def __init__(self, fd: int, version: int) -> None:
        """fd is borrowed for the life of this."""
        self._fd = fd
        self._version = version
        self._out = _ffi.new("uint8_t[]", BATCH_BYTES)
        self._ends = _ffi.new("uint32_t[]", BATCH_MESSAGES)
        self._offset = _ffi.new("uint64_t *")
        self._latest = _ffi.new("uint64_t *")
        self._err = _ffi.new("pv_errinfo *")
        self._view = _ffi.buffer(self._out)

    @property
    def last_append_ns(self) -> int:
        """The latest append time of a record that a message was made of; 0 for versions 1 and 2."""
        return int(self._latest[0])

    def take(self, offset: int, end: int) -> tuple[list[bytes], int]:
        """(VolumeTailSenderResponse messages of records from offset on, where to go on).

        No message and the offset as it was: what is there is for dat_scan to tell, and to send piece by piece.
        Raises NativeError for an unknown version.
        """
        self._offset[0] = offset
        count = _lib.pv_dat_follow(
            self._fd,
            self._version,
            self._offset,
            end,
            self._out,
            BATCH_BYTES,
            self._ends,
            BATCH_MESSAGES,
            self._latest,
            self._err,
        )
        if count < 0:
            err = self._err
            raise engine.NativeError(
                count, engine.NativeInfo(count, err.sys_errno, err.a, err.b, err.c, err.d), offset=offset
            )
        view, start = self._view, 0
        messages = []
        for stop in _ffi.unpack(self._ends, count):
            messages.append(view[start:stop])
            start = stop
        return messages, int(self._offset[0])
