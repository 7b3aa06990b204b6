"""What a needle map kept outside of the engine needs: figures, settled rows, and the live entries of an index.

Wraps the "maps kept outside" part of csrc/pv.h for storage.needle_map. Every call releases the interpreter's lock.
Imports the engine module and the compiled module only.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pyvolume import _pv
from pyvolume._native import engine

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_STATS: Final = _ffi.typeof("pv_map_stats *")
_T_ROWS: Final = _ffi.typeof("uint64_t *")
_T_REVISION: Final = _ffi.typeof("uint32_t *")

ENTRY_BYTES: Final = int(_lib.PV_LIVE_ENTRY)
"""One live entry: key (8 bytes), offset in bytes (8), size (4), all big-endian."""


class MapFigures(NamedTuple):
    """The counters of a needle map (contract storage.md 15). `entries`: how many keys are live."""

    file_count: int
    file_bytes: int
    deleted_count: int
    deleted_bytes: int
    max_key: int
    entries: int


def set_figures(volume: engine.Volume, figures: MapFigures) -> None:
    """What `stat` of a handle without a map tells from now on, and counts up from. PV_ECLOSED, PV_EINVAL."""
    stats = _new(_T_STATS)
    for field, value in zip(MapFigures._fields, figures, strict=True):
        setattr(stats, field, value)
    code = _lib.pv_vol_set_figures(volume.handle, stats)
    if code < 0:
        raise _error(code, None)


def settled_rows(volume: engine.Volume) -> tuple[int, int]:
    """(rows of the index that will stand, compaction revision). May wait for a flush. NativeError: PV_ECLOSED."""
    rows, revision = _new(_T_ROWS), _new(_T_REVISION)
    code = _lib.pv_vol_settled_rows(volume.handle, rows, revision)
    if code < 0:
        raise _error(code, None)
    return rows[0], revision[0]


class LiveIndex:
    """What is live after the first `max_rows` rows of an index, ascending by key. Holds a compact map until closed.

    `figures` are upstream's counters of a map made from those rows. NativeError: PV_ESYS, PV_ENOMEM, PV_EINVAL.
    """

    __slots__ = ("_live", "figures")

    def __init__(self, fd: int, width: int, max_rows: int) -> None:
        out, stats, err = _new("pv_live **"), _new(_T_STATS), _new(_T_ERR)
        code = _lib.pv_live_open(fd, width, max_rows, out, stats, err)
        if code < 0:
            raise _error(code, err)
        self._live: Any = _ffi.gc(out[0], _lib.pv_live_free)
        self.figures = MapFigures(*(int(getattr(stats, field)) for field in MapFigures._fields))

    def read(self, max_entries: int) -> memoryview:
        """The next entries of ENTRY_BYTES each; empty at the end."""
        buf = _new("uint8_t[]", max_entries * ENTRY_BYTES)
        count = _lib.pv_live_next(self._live, buf, max_entries)
        if count < 0:
            raise _error(count, None)
        return memoryview(_ffi.buffer(buf, count * ENTRY_BYTES))

    def is_same(self, other: LiveIndex) -> bool:
        """Whether both have the same keys with the same sizes, wherever the records are. Uses both up."""
        return bool(_lib.pv_live_same(self._live, other._live))

    def close(self) -> None:
        """Frees the memory. Nothing else may be called afterwards."""
        self._live = None


def _error(code: int, err: Any) -> engine.NativeError:
    if err is None:
        return engine.NativeError(code, engine.NativeInfo(code, 0, 0, 0, 0, 0))
    return engine.NativeError(code, engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d))
