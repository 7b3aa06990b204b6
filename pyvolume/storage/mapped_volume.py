"""The engine's handle of a volume whose needle map lives outside of the engine, looking like one that has a map.

May import _native, needle_map and the leaves; nothing else of storage.

A look-up finds the entry here and gives it to the engine with the compaction revision it belongs to; the engine
refuses one of another revision. Changes of one key are serialised from the look-up to the noted result, so the order of
its rows in the index is the order of its entries in the map; changes of different keys share the engine's flushes.

A vacuum: `prepare` makes the next map from the new index; from the engine's switch to the new files until `adopt` every
call that reaches the engine is answered "stale" and waits for the next map.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from pyvolume._native import engine, outside
from pyvolume._native.borrow import Buffer
from pyvolume._native.engine import Entry, IdxRow, Needle, WriteResult
from pyvolume._native.outside import MapFigures
from pyvolume.errors import NativeCode, StorageError
from pyvolume.storage.needle_map import RocksMap, RocksMaps, Value, rocks_path_of

log = logging.getLogger(__name__)

STRIPES: Final = 128
"""Locks for keys: neighbours, which clients tend to write together, have different ones."""
_WAIT_S: Final = 0.5


class MappedVolume(engine.Volume):
    """As engine.Volume, with a RocksMap. Open with OpenFlag.NO_MAP, then `attach`.

    Besides NativeError calls may raise StorageError / DiskError when the map can be neither read nor made anew.
    """

    __slots__ = ("_changed", "_idx_path", "_map", "_maps", "_next", "_stripes", "_timeout_h", "_width")

    def attach(self, maps: RocksMaps, idx_path: str, *, width: int, timeout_h: int = 0) -> None:
        """Opens the map, or makes it. Nothing else may be called before. Raises StorageError; then close the handle."""
        self._maps = maps
        self._idx_path = idx_path
        self._width = width
        self._timeout_h = timeout_h
        self._stripes = tuple(threading.Lock() for _ in range(STRIPES))
        self._changed = threading.Condition()
        self._next: RocksMap | None = None
        rows, revision = self._settled()
        self._map = self._new_map(idx_path, revision)
        try:
            self._map.load(rows)
        except BaseException:
            self._map.close()
            raise
        outside.set_figures(self, self._map.figures)

    def _settled(self) -> tuple[int, int]:
        return outside.settled_rows(self)

    def _new_map(self, idx_path: str, revision: int) -> RocksMap:
        return RocksMap(
            self._maps,
            rocks_path_of(self._idx_path),
            idx_path,
            width=self._width,
            revision=revision,
            settled=self._settled,
            timeout_h=self._timeout_h,
        )

    @property
    def map(self) -> RocksMap:
        """The map in use."""
        return self._map

    def close(self) -> None:
        """As engine.Volume.close; the map follows."""
        try:
            super().close()
        finally:
            with self._changed:
                self._changed.notify_all()
            self.drop_prepared()
            self._map.close()

    # -------------------------------------------------------------------------------------------------------- needles

    def _find(self, key: int) -> tuple[RocksMap, Entry]:
        """The map in use and what it says; offset 0 if nothing."""
        while True:
            needle_map = self._map
            try:
                value = needle_map.get(key)
            except engine.NativeError as exc:
                if exc.code == NativeCode.ECLOSED and self._map is not needle_map:
                    continue  # a vacuum has put another one in its place
                raise
            if value is None:
                return needle_map, Entry(0, 0, needle_map.revision)
            return needle_map, Entry(value.offset, value.size, needle_map.revision)

    def _wait_for_next(self, stale: RocksMap, exc: engine.NativeError) -> None:
        """After an answer PV_ESTALE: returns once another map is in use. Any other answer is raised."""
        if exc.code != NativeCode.ESTALE:
            raise exc
        with self._changed:
            while self._map is stale:
                if self.stat().closed:
                    raise _native_error(NativeCode.ECLOSED)
                self._changed.wait(_WAIT_S)

    def lookup(self, key: int) -> Entry:
        _, entry = self._find(key)
        if entry.offset == 0:
            raise _native_error(NativeCode.ENOTFOUND)
        return entry

    def visit(self, from_key: int, max_rows: int) -> list[IdxRow]:
        return self._map.visit(from_key, max_rows)

    def read(
        self, key: int, *, read_deleted: bool = False, meta_ok: bool = False, entry: Entry | None = None
    ) -> Needle:
        if entry is not None:
            return super().read(key, read_deleted=read_deleted, meta_ok=meta_ok, entry=entry)
        while True:
            needle_map, found = self._find(key)
            try:
                return super().read(key, read_deleted=read_deleted, meta_ok=meta_ok, entry=found)
            except engine.NativeError as exc:
                self._wait_for_next(needle_map, exc)

    def write(
        self,
        key: int,
        cookie: int,
        data: Buffer,
        *,
        flags: int = 0,
        name: Buffer = b"",
        mime: Buffer = b"",
        pairs: Buffer = b"",
        last_modified_s: int = 0,
        ttl: tuple[int, int] = (0, 0),
        check_cookie: bool = True,
        fsync: bool = False,
        entry: Entry | None = None,
    ) -> WriteResult:
        with self._stripes[key % STRIPES]:
            while True:
                needle_map, found = self._find(key)
                try:
                    result = super().write(
                        key,
                        cookie,
                        data,
                        flags=flags,
                        name=name,
                        mime=mime,
                        pairs=pairs,
                        last_modified_s=last_modified_s,
                        ttl=ttl,
                        check_cookie=check_cookie,
                        fsync=fsync,
                        entry=found,
                    )
                except engine.NativeError as exc:
                    self._wait_for_next(needle_map, exc)
                    continue
                if not result.unchanged:
                    needle_map.put(key, Value(result.offset, result.size))
                return result

    def delete(
        self, key: int, cookie: int, checksum: int = 0, *, fsync: bool = False, entry: Entry | None = None
    ) -> tuple[int, WriteResult | None]:
        """As engine.Volume.delete, but an empty file stays live, though its tombstone is written (upstream's trap)."""
        with self._stripes[key % STRIPES]:
            while True:
                needle_map, found = self._find(key)
                try:
                    size, result = super().delete(key, cookie, checksum, fsync=fsync, entry=found)
                except engine.NativeError as exc:
                    self._wait_for_next(needle_map, exc)
                    continue
                if result is not None:
                    needle_map.put(key, Value(found.offset, -found.size))
                return size, result

    def write_blob(
        self, key: int, size: int, blob: Buffer, *, fsync: bool = False, entry: Entry | None = None
    ) -> WriteResult:
        with self._stripes[key % STRIPES]:
            while True:
                needle_map, found = self._find(key)
                try:
                    result = super().write_blob(key, size, blob, fsync=fsync, entry=found)
                except engine.NativeError as exc:
                    self._wait_for_next(needle_map, exc)
                    continue
                if not result.unchanged:
                    needle_map.put(key, Value(result.offset, result.size))
                return result

    # --------------------------------------------------------------------------------------------------------- vacuum

    def prepare(self, cpx_path: str, rows: int, revision: int) -> None:
        """Makes the map of a vacuum's result, which will be of this revision. Blocks on disk. Raises StorageError."""
        self.drop_prepared()
        fresh = self._new_map(cpx_path, revision)
        try:
            fresh.build(rows)
        except BaseException:
            fresh.discard()
            raise
        self._next = fresh

    def drop_prepared(self) -> None:
        """The vacuum's result will not be used."""
        fresh, self._next = self._next, None
        if fresh is not None:
            fresh.discard()

    def adopt(self) -> None:
        """The engine has gone over to the vacuum's files: so does the map. Calls that wait for it go on.

        Raises StorageError if the new map can neither be brought up to date nor made anew; it is in use all the same,
        and each look-up tries to open it.
        """
        fresh, self._next = self._next, None
        stale = self._map
        try:
            if fresh is None:
                fresh = self._new_map(self._idx_path, self._settled()[1])
            outside.set_figures(self, self._up_to_date(fresh))
        finally:
            if fresh is not None:
                with self._changed:
                    self._map = fresh
                    self._changed.notify_all()
                stale.discard()

    def _up_to_date(self, fresh: RocksMap) -> MapFigures:
        if fresh.is_loaded:
            try:
                return fresh.catch_up()
            except StorageError as exc:
                log.warning("volume %d: the needle map made by the vacuum is made anew: %s", self.vid, exc)
        rows, _ = self._settled()
        fresh.build(rows)
        return fresh.figures


def _native_error(code: NativeCode) -> engine.NativeError:
    return engine.NativeError(code, engine.NativeInfo(code, 0, 0, 0, 0, 0))


def adopt_or_log(volume: engine.Volume) -> None:
    """After a vacuum's commit; nothing for a handle with a map of its own."""
    if isinstance(volume, MappedVolume):
        try:
            volume.adopt()
        except (StorageError, engine.NativeError) as exc:
            log.error("volume %d: the needle map after the vacuum: %s", volume.vid, exc)
