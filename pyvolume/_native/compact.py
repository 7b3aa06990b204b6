"""Vacuum for Python: a thin wrapper of csrc/pv_compact.c.

One object is one vacuum of one volume, driven by one thread at a time: step until it says that all is copied, finish,
commit, close. Policy, texts and names are the caller's (storage.compact). Every call releases the interpreter's lock
and may block on disk.

Imports the engine module and the compiled module only.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from pyvolume import _pv
from pyvolume._native import engine

_ffi: Final = _pv.ffi
_lib: Final = _pv.lib
_new = _ffi.new
_T_ERR: Final = _ffi.typeof("pv_errinfo *")
_T_OPTS: Final = _ffi.typeof("pv_compact_opts *")
_T_NAMES: Final = _ffi.typeof("pv_compact_names *")
_T_STATS: Final = _ffi.typeof("pv_compact_stats *")


class CompactStats(NamedTuple):
    """How far a vacuum has come; counts of needles and bytes (header Sizes)."""

    live_bytes: int
    copied_needles: int
    source_offset: int
    expired_needles: int
    expired_bytes: int
    dropped_needles: int
    dropped_bytes: int
    first_dropped_key: int
    first_dropped_offset: int
    first_dropped_code: int
    new_dat_bytes: int
    new_idx_rows: int
    caught_up_rows: int
    marker_left: int
    """Not 0: a failed commit could not remove its marker durably, and the handle refuses all changes."""


class CompactPaths(NamedTuple):
    """Files and directories of a vacuum: new data and index, what they replace, the commit marker."""

    cpd: str
    dat: str
    cpx: str
    idx: str
    cpc: str
    dat_dir: str
    idx_dir: str


class Compaction:
    """See csrc/pv.h at pv_compact. NativeError codes as there."""

    __slots__ = ("_c", "paths")

    def __init__(
        self,
        volume: engine.Volume,
        paths: CompactPaths,
        *,
        superblock: engine.SuperBlockFields,
        volume_ttl_minutes: int,
        now_s: int,
        preallocate_bytes: int = 0,
    ) -> None:
        """Begins: flushes the volume, notes its state, creates the new files."""
        opts, out, err = _new(_T_OPTS), _new("pv_compact **"), _new(_T_ERR)
        opts.cpd_path = cpd = _new("char[]", os.fsencode(paths.cpd))
        opts.cpx_path = cpx = _new("char[]", os.fsencode(paths.cpx))
        opts.superblock = superblock
        opts.volume_ttl_minutes = volume_ttl_minutes
        opts.now_s = now_s
        opts.preallocate_bytes = preallocate_bytes
        code = _lib.pv_compact_begin(volume.handle, opts, out, err)
        del cpd, cpx
        if code < 0:
            raise _error(code, err)
        self.paths = paths
        self._c: Any = _ffi.gc(out[0], _lib.pv_compact_free)

    def step(self, max_bytes: int) -> bool:
        """Copies until about max_bytes more are written; True while there is more to copy."""
        err = _new(_T_ERR)
        code = _lib.pv_compact_step(self._c, max_bytes, err)
        if code < 0:
            raise _error(code, err)
        return bool(code)

    def finish(self) -> None:
        """Writes out and flushes both new files."""
        err = _new(_T_ERR)
        code = _lib.pv_compact_finish(self._c, err)
        if code < 0:
            raise _error(code, err)

    def commit(self) -> engine.NativeInfo | None:
        """Catches up and switches the volume over. None: done, the marker is to be removed.

        Anything else: switched all the same, but a rename or a flush of a directory failed as told; the marker has to
        stay, so that the next load finishes. NativeError: nothing has changed.
        """
        names, err = _new(_T_NAMES), _new(_T_ERR)
        kept = []
        for field in CompactPaths._fields:
            text = _new("char[]", os.fsencode(getattr(self.paths, field)))
            kept.append(text)
            setattr(names, field if field.endswith("_dir") else f"{field}_path", text)
        code = _lib.pv_compact_commit(self._c, names, err)
        if code < 0:
            raise _error(code, err)
        return None if code == 0 else engine.NativeInfo(err.code, err.sys_errno, err.a, err.b, err.c, err.d)

    def stat(self) -> CompactStats:
        out = _new(_T_STATS)
        _lib.pv_compact_stat(self._c, out)
        return CompactStats(*(int(getattr(out, field)) for field in CompactStats._fields))

    def close(self) -> None:
        """Frees it; the files stay. Idempotent; nothing else may be called afterwards."""
        self._c = None


def _error(code: int, err: object) -> engine.NativeError:
    info = engine.NativeInfo(code, err.sys_errno, err.a, err.b, err.c, err.d)  # type: ignore[attr-defined]
    return engine.NativeError(code, info)
