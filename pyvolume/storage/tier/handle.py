"""The engine's handle of a tiered volume: map and index are here, records are read from the remote store.

May import _native, tier.backends and the leaves. Small needles cost one request for the whole record, larger ones are
read without their data first (what the engine does with a local file). Upstream:
`weed/storage/needle/needle_read.go` on a `backend.BackendStorageFile`.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from pyvolume._native import engine
from pyvolume._native.engine import Entry, Needle
from pyvolume.errors import NativeCode
from pyvolume.storage.tier.backends import Backend

READ_AHEAD_THREADS: Final = 16
"""Pieces of large needles fetched ahead, over all volumes; without a free thread a reader fetches for itself."""

_GIB32: Final = 1 << 35
_META_SPAN_MAX: Final = 131072
_HEAD: Final = struct.Struct(">IQiI")


@dataclass(frozen=True, slots=True)
class RemoteData:
    """The object that holds a volume's data, and what its super block says."""

    backend: Backend
    key: str
    size: int
    """Bytes, as the .vif has it; the store is not asked."""
    superblock: engine.SuperBlockFields


@dataclass
class _Ahead:
    """The threads that fetch ahead, made with the first large needle; `free` counts those without work."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    free: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(READ_AHEAD_THREADS))
    pool: ThreadPoolExecutor | None = None

    def submit(self, remote: RemoteData, offset: int, length: int) -> Future[memoryview] | None:
        if not self.free.acquire(blocking=False):
            return None
        with self.lock:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(READ_AHEAD_THREADS, thread_name_prefix="tier-ahead")
            future = self.pool.submit(remote.backend.read_at, remote.key, offset, length)
        future.add_done_callback(lambda _: self.free.release())
        return future


_ahead: Final = _Ahead()


def native_error(code: NativeCode, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> engine.NativeError:
    """What the engine would raise."""
    return engine.NativeError(code, engine.NativeInfo(code, 0, a, b, c, d))


class TieredVolume(engine.Volume):
    """As engine.Volume. Open with OpenFlag.REMOTE, then `attach`. Reads may also raise RemoteError."""

    __slots__ = ("_remote",)

    def attach(self, remote: RemoteData) -> None:
        """Nothing else may be called before."""
        self._remote = remote

    @property
    def remote(self) -> RemoteData:
        return self._remote

    def read(
        self, key: int, *, read_deleted: bool = False, meta_ok: bool = False, entry: Entry | None = None
    ) -> Needle:
        found = self.lookup(key) if entry is None else entry
        size = found.size
        if found.offset == 0:
            raise native_error(NativeCode.ENOTFOUND, c=key)
        if size < 0:
            size = 0 if size == -1 else -size
            if not read_deleted or not size:
                raise native_error(NativeCode.EDELETED, size, c=key)
        stat = self.stat()
        if size == 0:
            return Needle(key, 0, 0, 0, 0, 0, 0, 0, 0, 0, stat.version, b"", b"", b"", b"", 0, *found, empty=True)
        try:
            needle = self._read_at(found.offset, size, stat.version, meta_ok)
        except engine.NativeError as exc:
            # volumes that outgrew 32 GiB with offsets of four bytes: those wrapped
            if exc.code != NativeCode.ESIZE or stat.offset_width != 4 or self._remote.size <= _GIB32:
                raise
            needle = self._read_at(found.offset + _GIB32, size, stat.version, meta_ok)
        needle.entry_offset, needle.entry_size, needle.entry_revision = found
        return needle

    def _read_at(self, offset: int, size: int, version: int, meta_ok: bool) -> Needle:
        if meta_ok and size > engine.META_ONLY_ABOVE_BYTES and version != 1:
            needle = self._read_meta(offset, size, version)
            if not needle.flags & (engine.FLAG_COMPRESSED | engine.FLAG_MANIFEST):
                return needle
        record = self._fetch(offset, engine.needle_record_len(size, version))
        return engine.parse_needle(record, version, size, offset=offset)

    def _read_meta(self, offset: int, size: int, version: int) -> Needle:
        head = self._fetch(offset, engine.NEEDLE_HEAD_BYTES)
        _, key, found_size, data_size = _HEAD.unpack(head)
        if found_size != size:
            raise native_error(NativeCode.ESIZE, offset, key, found_size & 0xFFFFFFFF, size)
        span = engine.needle_record_len(size, version) - engine.NEEDLE_HEAD_BYTES - data_size
        if not 0 <= span <= _META_SPAN_MAX:
            raise native_error(NativeCode.EMETA, span, data_size, size, offset)
        tail = self._fetch(offset + engine.NEEDLE_HEAD_BYTES + data_size, span)
        return engine.parse_needle_meta(head, tail, version, offset)

    def _fetch(self, offset: int, length: int) -> memoryview:
        end = self._remote.size
        if offset < 0 or length > end - offset:
            raise native_error(NativeCode.EEOF, max(0, offset), length, max(0, end - offset))
        return self._remote.backend.read_at(self._remote.key, offset, length)

    def pread(self, offset: int, length: int, revision: int) -> memoryview:
        stat = self.stat()
        if stat.closed:
            raise native_error(NativeCode.ECLOSED, self.vid)
        if revision != stat.compaction_revision:
            raise native_error(NativeCode.ESTALE, revision, stat.compaction_revision)
        return self._fetch(offset, length)

    def pread_into(self, offset: int, buf: bytearray | memoryview, revision: int) -> None:
        memoryview(buf)[:] = self.pread(offset, len(buf), revision)

    def stream(self, offset: int, length: int, step: int) -> Iterator[memoryview]:
        """Bytes [offset, offset + length) in pieces of `step`; the next one is fetched while one is being used."""
        if offset < 0 or offset + length > self._remote.size:
            raise native_error(NativeCode.EEOF, max(0, offset), length, max(0, self._remote.size - offset))
        end = offset + length
        ahead: Future[memoryview] | None = None
        try:
            while offset < end:
                want = min(step, end - offset)
                piece = self._fetch(offset, want) if ahead is None else ahead.result()
                offset += want
                ahead = _ahead.submit(self._remote, offset, min(step, end - offset)) if offset < end else None
                yield piece
        finally:
            if ahead is not None:
                ahead.cancel()
