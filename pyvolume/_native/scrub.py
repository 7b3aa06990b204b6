"""Scrub for Python: a thin wrapper of csrc/pv_scrub.c.

One object is one look through one volume's files, driven by one thread at a time: step until it says that there is no
more, take the findings after each step, close. Every call releases the interpreter's lock and may block on disk.

Imports the engine module and the compiled module only.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Self

from pyvolume import _pv
from pyvolume._native import engine

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_OPTS: Final = _ffi.typeof("pv_scrub_opts *")
_T_STATS: Final = _ffi.typeof("pv_scrub_stats *")
_T_FOUND: Final = _ffi.typeof("pv_scrub_finding[]")

_INDEX_ONLY, _CHECK_ID, _ANY_INDEX = 1, 2, 4
_BATCH: Final = 1024


class ScrubFinding(NamedTuple):
    """A row that overlaps its neighbour (error None), or a record that cannot be read. `row` counts from 0; `end` and
    `other_end` are last bytes."""

    row: int
    key: int
    offset: int
    size: int
    end: int
    other_key: int
    other_offset: int
    other_end: int
    error: engine.NativeInfo | None


class ScrubStats(NamedTuple):
    """See pv_scrub_stats in csrc/pv.h."""

    idx_bytes: int
    rows: int
    dat_bytes: int
    expected_bytes: int
    position: int
    done_rows: int
    total_rows: int
    checked_records: int
    bad_records: int
    read_bytes: int
    revision: int


class Scrub:
    """See csrc/pv.h at pv_scrub. NativeError codes as there."""

    __slots__ = ("_s",)

    def __init__(self, handle: Any) -> None:
        self._s: Any = handle

    @classmethod
    def of_volume(
        cls,
        volume: engine.Volume,
        idx_fd: int,
        *,
        index_only: bool = False,
        any_index: bool = False,
        check_id: bool = False,
        resume_offset: int = 0,
    ) -> Self:
        """Of an open volume. idx_fd is its index, opened anew (PV_ESTALE if it is another file, unless any_index)."""
        flags = _INDEX_ONLY * index_only | _CHECK_ID * check_id | _ANY_INDEX * any_index
        opts = _new(_T_OPTS)
        opts.vol, opts.dat_fd, opts.idx_fd = volume.handle, -1, idx_fd
        opts.flags, opts.resume_offset = flags, resume_offset
        return cls._begin(opts)

    @classmethod
    def of_files(
        cls,
        dat_fd: int,
        idx_fd: int,
        width: int,
        version: int,
        *,
        index_only: bool = False,
        check_id: bool = False,
        resume_offset: int = 0,
    ) -> Self:
        """Of files that nobody writes to."""
        opts = _new(_T_OPTS)
        opts.dat_fd, opts.idx_fd, opts.width, opts.version = dat_fd, idx_fd, width, version
        opts.flags = _INDEX_ONLY * index_only | _CHECK_ID * check_id
        opts.resume_offset = resume_offset
        return cls._begin(opts)

    @classmethod
    def _begin(cls, opts: Any) -> Self:
        out, err = _new("pv_scrub **"), _new(_T_ERR)
        code = _lib.pv_scrub_begin(opts, out, err)
        if code < 0:
            raise engine.NativeError(code, _info(err))
        return cls(_ffi.gc(out[0], _lib.pv_scrub_free))

    def step(self, max_bytes: int) -> bool:
        """Reads about max_bytes; True while there is more to look at."""
        err = _new(_T_ERR)
        code = _lib.pv_scrub_step(self._s, max_bytes, err)
        if code < 0:
            raise engine.NativeError(code, _info(err))
        return bool(code)

    def findings(self) -> list[ScrubFinding]:
        """What was found since the last call, in the order met."""
        found: list[ScrubFinding] = []
        rows = _new(_T_FOUND, _BATCH)
        while count := _lib.pv_scrub_findings(self._s, rows, _BATCH):
            for i in range(count):
                row = rows[i]
                found.append(
                    ScrubFinding(
                        row.row,
                        row.key,
                        row.offset,
                        row.size,
                        row.end,
                        row.other_key,
                        row.other_offset,
                        row.other_end,
                        None if row.kind == 1 else _info(row.error),
                    )
                )
        return found

    def stat(self) -> ScrubStats:
        out = _new(_T_STATS)
        _lib.pv_scrub_stat(self._s, out)
        return ScrubStats(*(int(getattr(out, field)) for field in ScrubStats._fields))

    def close(self) -> None:
        """Frees it. Idempotent; nothing else may be called afterwards."""
        if self._s is not None:
            _ffi.gc(self._s, None)
            _lib.pv_scrub_free(self._s)
            self._s = None


def _info(err: Any) -> engine.NativeInfo:
    return engine.NativeInfo(int(err.code), err.sys_errno, err.a, err.b, err.c, err.d)
