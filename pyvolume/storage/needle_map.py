"""Needle maps on disk: key -> (offset, size) in a rocksdict database beside the index, for `-index=leveldb…`.

May import _native, files and the leaves; nothing else of storage.

The `.idx` is the truth. A database holds, at every moment it is looked at, just what the first `rows` rows of the index
say, and a record of that: how many rows, their checksum, and the sums that upstream's counters are made of. Both are
changed in one batch. What was appended since is in memory (a layer), found there first, and folded in from the index
itself, not from the layer: so rows, database and sums agree whatever order writers came in. A start compares the
checksum with the index as it is and folds in the rows behind; what does not fit, or cannot be read, is made anew.

Nothing is synced and no log is written: what a crash takes from the database is in the index still.

The directory is `<base>.rocks/<compaction revision>`: upstream's `.ldb` is another format, and neither side opens the
other's. Upstream: `weed/storage/needle_map_leveldb.go`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from pyvolume._native import engine
from pyvolume._native.outside import ENTRY_BYTES, LiveIndex, MapFigures
from pyvolume.errors import NativeCode, StorageError, disk_error, from_os_error
from pyvolume.log import V1
from pyvolume.storage import files

log = logging.getLogger(__name__)

EXTENSION: Final = ".rocks"
"""Of the directory beside the index that holds a volume's databases."""

LAYER_ENTRIES: Final = 1024
"""Changes a map keeps in memory before they are folded into its database."""
LAYERS_TOTAL: Final = 1 << 16
"""The same for all maps together: many open maps keep fewer each, but LAYER_ENTRIES_LEAST."""
LAYER_ENTRIES_LEAST: Final = 64
LAYER_ENTRIES_MOST: Final = 1 << 16
"""With so many changes that could not be folded the database is given up and opened anew."""
FOLD_ROWS: Final = 8192
REPLAY_ROWS: Final = 16384
"""So many rows behind are always folded in; more only if they are few beside those that are there already."""
REPLAY_SHARE: Final = 16
"""Folding a row in costs about as much as making the database anew costs for so many rows."""
RETRY_S: Final = 5.0
"""Between two attempts of folding after one failed (a full disk)."""

_SMALL_BUILD: Final = 20_000
_SST_ENTRIES: Final = 2_000_000
_BUILD_ENTRIES: Final = 65_536
_READ_BYTES: Final = 1 << 20
_REOPEN_ATTEMPTS: Final = 2
_SHARES_MAX: Final = 32
"""The caches of more maps than this share what those get."""

_KEY: Final = struct.Struct(">Q")
_VALUE: Final = struct.Struct(">Qi")
_ENTRY: Final = struct.Struct(f"8s{ENTRY_BYTES - 8}s")
_ROWS: Final = {4: struct.Struct(">QIi"), 5: struct.Struct(">QIBi")}
_STATE_KEY: Final = b"pyvolume.needle_map"  # a needle's key has 8 bytes
_STATE: Final = struct.Struct(">8sBBHQIQQQQQ")
_STATE_MAGIC: Final = b"pvrocks\x01"


class Value(NamedTuple):
    """Where a key's record is, in bytes; size 0: empty, below 0: deleted, the absolute value is what it was."""

    offset: int
    size: int


class NeedleMap(Protocol):
    """What a volume asks of a map that is kept outside of the engine. Changes of one key come one after another."""

    revision: int

    def get(self, key: int) -> Value | None: ...
    def put(self, key: int, value: Value) -> None: ...
    def visit(self, from_key: int, max_rows: int) -> list[engine.IdxRow]: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class KindSizes:
    """Upstream's sizes of a kind: block cache, write buffer, open files of one map."""

    cache_bytes: int
    write_buffer_bytes: int
    open_files: int


KINDS: Final = {
    "leveldb": KindSizes(2 << 20, 1 << 20, 16),
    "leveldbMedium": KindSizes(4 << 20, 2 << 20, 32),
    "leveldbLarge": KindSizes(8 << 20, 4 << 20, 64),
}


@dataclass(frozen=True, slots=True)
class Basis:
    """What a database says of itself: the rows it reflects, and sums over them.

    `kept`: keys whose last row has a size above 0, with the sum of those sizes; `row_bytes`: of all rows; `entries`:
    live keys, empty ones included.
    """

    rows: int = 0
    crc: int = 0
    kept: int = 0
    kept_bytes: int = 0
    row_bytes: int = 0
    max_key: int = 0
    entries: int = 0

    @property
    def figures(self) -> MapFigures:
        """Upstream's counters of this kind after a reload: every row is a file, all but the kept ones are deleted."""
        return MapFigures(
            self.rows,
            self.row_bytes,
            self.rows - self.kept,
            self.row_bytes - self.kept_bytes,
            self.max_key,
            self.entries,
        )

    def pack(self, width: int, revision: int) -> bytes:
        body = _STATE.pack(
            _STATE_MAGIC,
            width,
            0,
            revision,
            self.rows,
            self.crc,
            self.kept,
            self.kept_bytes,
            self.row_bytes,
            self.max_key,
            self.entries,
        )
        return body + engine.crc32c(body).to_bytes(4, "big")


class _Damaged(Exception):
    """The database cannot be used as it is; the text says why."""


@contextlib.contextmanager
def _database() -> Iterator[None]:
    """Around calls of rocksdict, which raises bare Exceptions with RocksDB's text."""
    try:
        yield
    except (_Damaged, StorageError, engine.NativeError, OSError, MemoryError):
        raise
    except Exception as exc:
        raise _Damaged(str(exc) or type(exc).__name__) from exc


def for_kind(index_kind: str) -> RocksMaps | None:
    """The maps of a server with this `-index`; None for `memory`, whose maps are the engine's."""
    sizes = KINDS.get(index_kind)
    return RocksMaps(sizes) if sizes is not None else None


class RocksMaps:
    """All databases of one server: what they share, and which are open. Thread-safe.

    One block cache and one bound on write buffers for all: each open map adds its kind's share, up to 32 shares.
    """

    def __init__(self, sizes: KindSizes) -> None:
        import rocksdict  # 30 MB that only this kind needs

        self.rocksdict: Any = rocksdict
        self.sizes = sizes
        self._lock = threading.Lock()
        self._open: dict[str, RocksMap] = {}
        self._cache = rocksdict.Cache(sizes.cache_bytes)
        self._buffers = rocksdict.WriteBufferManager(sizes.write_buffer_bytes * 2, False)
        self.unlogged: Any = rocksdict.WriteOptions()
        self.unlogged.disable_wal = True
        self.layer_entries = LAYER_ENTRIES
        """How many changes each map may keep in memory now."""

    def claim(self, path: str, needle_map: RocksMap) -> None:
        """Raises StorageError if another map of this process has the database."""
        with self._lock:
            if path in self._open:
                raise StorageError(f"{path} is in use")
            self._open[path] = needle_map
            self._resize()

    def release(self, path: str, needle_map: RocksMap) -> None:
        with self._lock:
            if self._open.get(path) is needle_map:
                del self._open[path]
                self._resize()

    def is_claimed(self, path: str) -> bool:
        return path in self._open

    def open_maps(self) -> list[RocksMap]:
        with self._lock:
            return list(self._open.values())

    def _resize(self) -> None:
        shares = max(1, min(len(self._open), _SHARES_MAX))
        self._cache.set_capacity(self.sizes.cache_bytes * shares)
        self._buffers.set_buffer_size(self.sizes.write_buffer_bytes * 2 * shares)
        self.layer_entries = max(LAYER_ENTRIES_LEAST, min(LAYER_ENTRIES, LAYERS_TOTAL // max(1, len(self._open))))

    def options(self, *, create: bool) -> Any:
        """Options of one database."""
        rocksdict = self.rocksdict
        table = rocksdict.BlockBasedOptions()
        table.set_block_cache(self._cache)
        table.set_cache_index_and_filter_blocks(True)
        table.set_bloom_filter(10, False)
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(create)
        options.set_block_based_table_factory(table)
        options.set_write_buffer_manager(self._buffers)
        options.set_write_buffer_size(self.sizes.write_buffer_bytes)
        options.set_max_write_buffer_number(2)
        options.set_max_open_files(self.sizes.open_files)
        options.set_keep_log_file_num(1)
        options.set_max_log_file_size(1 << 20)
        options.set_stats_dump_period_sec(0)
        options.set_stats_persist_period_sec(0)
        options.set_max_background_jobs(2)
        options.set_table_cache_num_shard_bits(1)  # of a table cache that every database has for itself
        options.set_skip_stats_update_on_db_open(True)
        options.set_manifest_preallocation_size(1 << 14)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        return options

    def flush_all(self) -> None:
        """Folds what waits in memory into the databases; each minute. What fails is logged by the map."""
        for needle_map in self.open_maps():
            if needle_map.pending:
                needle_map.flush_or_log()

    def tick_hour(self) -> None:
        """Closes the databases of maps that nobody has used for their timeout, in whole ticks."""
        for needle_map in self.open_maps():
            needle_map.tick_hour()


class RocksMap:
    """The map of one volume at one compaction revision. Thread-safe; see the module's text for how it works.

    `settled` tells how many rows of the index will stand, and their revision. Locks: `_lock` is held over database work
    of this map; a look-up takes none. Errors: StorageError / DiskError when the database can be neither read nor made
    anew; engine.NativeError PV_ECLOSED after close.
    """

    def __init__(
        self,
        maps: RocksMaps,
        root: str,
        idx_path: str,
        *,
        width: int,
        revision: int,
        settled: Callable[[], tuple[int, int]],
        timeout_h: int = 0,
    ) -> None:
        """Claims the database's path and opens the index; nothing is read before `load` or `build`."""
        self.revision = revision
        self.path = f"{root}/{revision:05d}"
        self.timeout_h = timeout_h
        self.built = False
        """Whether the database was made anew when it was last opened."""
        self._maps = maps
        self._root = root
        self._idx_path = idx_path
        self._width = width
        self._row = _ROWS[width]
        self._settled = settled
        self._lock = threading.RLock()
        self._layers: tuple[dict[int, Value], ...] = ({},)
        self._basis = Basis()
        self._db: Any = None
        self._closed = False
        self._used = True
        self._idle_ticks = 0
        self._retry_at_s = 0.0
        self._replay = True  # rows behind were not noted by this process
        self._state_path = f"{self.path}.state"
        maps.claim(self.path, self)
        try:
            self._idx_fd = os.open(idx_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            maps.release(self.path, self)
            raise from_os_error(exc, "open", idx_path) from exc

    # ------------------------------------------------------------------------------------------------ opening, making

    def load(self, rows: int) -> None:
        """Opens the database and folds in what the index has more; makes it anew if it does not fit. Blocks on disk.

        After a clean stop, with the index as it was, the database is opened on its first use only: that takes long.
        """
        with self._lock:
            self._remove_others()
            if not self._was_closed_at(rows):
                self._load(rows)

    def build(self, rows: int) -> None:
        """Makes the database from the first `rows` rows of the index, whatever is there. Blocks on disk."""
        with self._lock:
            self._build(rows)

    def _was_closed_at(self, rows: int) -> bool:
        """Whether the note of the last close says that the database has all of the index; takes the sums from it."""
        try:
            with open(self._state_path, "rb") as note:
                basis = self._check_state(note.read(_STATE.size + 5), rows)
        except (_Damaged, OSError):
            return False
        if basis.rows != rows or not os.path.isdir(self.path):
            return False
        self._basis = basis
        return True

    def _note_close(self) -> None:
        """Leaves the note of a clean close beside the database. It counts for nothing once the index is another one."""
        state = self._basis.pack(self._width, self.revision)
        try:
            with open(self._state_path, "r+b" if os.path.exists(self._state_path) else "w+b") as note:
                if note.read() != state:
                    note.seek(0)
                    note.truncate()
                    note.write(state)
        except OSError as exc:
            log.info("needle map %s: %s", self.path, from_os_error(exc, "write", self._state_path))

    def _load(self, rows: int) -> None:
        if os.path.isdir(self.path):
            try:
                self._open_existing(rows)
                self.built = False
                return
            except _Damaged as exc:
                log.info("needle map %s is made anew from %s: %s", self.path, self._idx_path, exc)
            except OSError as exc:
                raise self._failure(exc) from exc
        self._build(rows)

    def _open_existing(self, rows: int) -> None:
        """Needs the lock. The database is looked into only once it has all rows."""
        with _database():
            db = self._maps.rocksdict.Rdict(self.path, self._maps.options(create=False))
        try:
            with _database():
                self._basis = self._check_state(db.get(_STATE_KEY), rows)
                self._advance(db, rows, self._replay)
        except BaseException:
            self._close_database(db)
            raise
        self._replay = False
        self._db = db

    def _check_state(self, raw: bytes | None, rows: int) -> Basis:
        if raw is None or len(raw) != _STATE.size + 4 or engine.crc32c(raw[:-4]).to_bytes(4, "big") != raw[-4:]:
            raise _Damaged("it does not say what it reflects")
        magic, width, _, revision, *fields = _STATE.unpack(raw[:-4])
        basis = Basis(*fields)
        if (magic, width, revision) != (_STATE_MAGIC, self._width, self.revision):
            raise _Damaged("it is of another volume or version")
        behind = rows - basis.rows
        if behind < 0:
            raise _Damaged(f"it reflects {basis.rows} rows, the index has {rows}")
        if self._index_crc(0, basis.rows, 0) != basis.crc:
            raise _Damaged(f"the first {basis.rows} rows of the index are other ones than it was made from")
        if behind > max(REPLAY_ROWS, basis.rows // REPLAY_SHARE):
            raise _Damaged(f"the index has {behind} rows more than its {basis.rows}")
        return basis

    def _build(self, rows: int) -> None:
        """Needs the lock. Raises DiskError."""
        self._abandon()
        db: Any = None
        try:
            os.makedirs(self._root, exist_ok=True)
            files.remove_if_exists(self.path)
            live = LiveIndex(self._idx_fd, self._width, rows)
            try:
                with _database():
                    db = self._maps.rocksdict.Rdict(self.path, self._maps.options(create=True))
                    self._fill(db, live)
                    figures = live.figures
                    self._basis = Basis(
                        rows=figures.file_count,
                        crc=self._index_crc(0, figures.file_count, 0),
                        kept=figures.file_count - figures.deleted_count,
                        kept_bytes=figures.file_bytes - figures.deleted_bytes,
                        row_bytes=figures.file_bytes,
                        max_key=figures.max_key,
                        entries=figures.entries,
                    )
                    batch = self._maps.rocksdict.WriteBatch(raw_mode=True)
                    batch.put(_STATE_KEY, self._basis.pack(self._width, self.revision))
                    db.write(batch, self._maps.unlogged)
                    db.flush()
            finally:
                live.close()
        except (_Damaged, OSError, engine.NativeError) as exc:
            self._close_database(db)
            raise self._failure(exc) from exc
        self._replay = False
        self._db = db
        self.built = True

    def _fill(self, db: Any, live: LiveIndex) -> None:
        """Sorted files for many entries, as they need no sorting and no second writing; a batch for few."""
        rocksdict = self._maps.rocksdict
        if live.figures.entries <= _SMALL_BUILD:
            batch = rocksdict.WriteBatch(raw_mode=True)
            for key, value in _ENTRY.iter_unpack(live.read(_SMALL_BUILD)):
                batch.put(key, value)
            db.write(batch, self._maps.unlogged)
            return
        left = live.figures.entries
        paths: list[str] = []
        while left > 0:
            path = f"{self._root}/{self.revision:05d}.{len(paths)}.sst"
            writer = rocksdict.SstFileWriter(options=self._maps.options(create=True))
            writer.open(path)
            paths.append(path)
            room = _SST_ENTRIES
            while room > 0 and left > 0:
                entries = live.read(min(room, _BUILD_ENTRIES))
                for key, value in _ENTRY.iter_unpack(entries):
                    writer[key] = value
                done = len(entries) // ENTRY_BYTES
                if done == 0:
                    raise _Damaged(f"{left} entries of the index are missing")
                room -= done
                left -= done
            writer.finish()
        how = rocksdict.IngestExternalFileOptions()
        how.set_move_files(True)
        db.ingest_external_file(paths, how)
        for path in paths:
            files.remove_if_exists(path)

    def _remove_others(self) -> None:
        """Databases of other revisions, and what an interrupted build left."""
        try:
            for name in os.listdir(self._root):
                path = f"{self._root}/{name}"
                if path not in (self.path, self._state_path) and not self._maps.is_claimed(path):
                    files.remove_if_exists(path)
        except FileNotFoundError:
            return
        except OSError as exc:
            log.warning("needle map %s: %s", self._root, exc)

    def _index_crc(self, first_row: int, end_row: int, crc: int) -> int:
        at, end = first_row * self._row.size, end_row * self._row.size
        while at < end:
            crc = engine.crc32c(piece := self._read_index(at, min(end, at + _READ_BYTES)), crc)
            at += len(piece)
        return crc

    def _read_index(self, begin: int, end: int) -> bytes:
        piece = os.pread(self._idx_fd, end - begin, begin)
        if len(piece) < end - begin:
            raise _Damaged(f"{self._idx_path} ends at {begin + len(piece)}, before {end}")
        return piece

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def figures(self) -> MapFigures:
        """Upstream's counters of a map just loaded, of the rows folded in."""
        return self._basis.figures

    @property
    def is_loaded(self) -> bool:
        """Whether the database is open: not one that is idle, or was not used since the start."""
        return self._db is not None

    def get(self, key: int) -> Value | None:
        """A key's entry, deleted ones included. Takes no lock unless the database has to be opened."""
        for layer in self._layers:
            value = layer.get(key)
            if value is not None:
                return value
        packed = _KEY.pack(key)
        attempts = 0
        while True:
            db = self._db or self._opened()
            try:
                with _database():
                    raw = db.get(packed)
                    self._used = True
                    return None if raw is None else Value._make(_VALUE.unpack(raw))
            except _Damaged as exc:
                # A database that was closed under the call is no news: the next turn has the new one.
                if self._db is db:
                    attempts += 1
                    self._give_up(db, exc, attempts)

    def _opened(self) -> Any:
        """The database, opened if it was idle."""
        with self._lock:
            if self._closed:
                raise _closed_error()
            if self._db is None:
                rows, revision = self._settled()
                if revision != self.revision:  # superseded by a vacuum: the index is complete
                    rows = os.fstat(self._idx_fd).st_size // self._row.size
                self._load(rows)
                self._idle_ticks = 0
            return self._db

    def _give_up(self, db: Any, exc: _Damaged, attempts: int) -> None:
        """A database that cannot be read is made anew from the index, which is what it mirrors."""
        with self._lock:
            if self._db is not db:
                return
            if attempts > _REOPEN_ATTEMPTS:
                raise self._failure(exc)
            log.warning("needle map %s cannot be read and is made anew from %s: %s", self.path, self._idx_path, exc)
            self._abandon()
            rows, _ = self._settled()
            self._build(rows)

    def visit(self, from_key: int, max_rows: int) -> list[engine.IdxRow]:
        """Up to max_rows entries with keys from from_key on, ascending, deleted ones included."""
        with self._lock:
            self.flush()
            db = self._opened()
            rows: list[engine.IdxRow] = []
            with _database():
                cursor = db.iter()
                cursor.seek(_KEY.pack(from_key))
                while len(rows) < max_rows and cursor.valid():
                    key = cursor.key()
                    if len(key) == _KEY.size:
                        rows.append(engine.IdxRow(_KEY.unpack(key)[0], *_VALUE.unpack(cursor.value())))
                    cursor.next()
                cursor.status()
                del cursor  # holds the database open as long as it lives
            return rows

    # -------------------------------------------------------------------------------------------------------- writing

    @property
    def pending(self) -> int:
        """Changes that wait in memory."""
        return sum(map(len, self._layers))

    def put(self, key: int, value: Value) -> None:
        """Notes a change whose row is in the index. Now and then folds all of them into the database."""
        layer = self._layers[0]
        layer[key] = value
        if len(layer) >= self._maps.layer_entries and self._lock.acquire(blocking=False):
            try:
                self.flush_or_log()
            finally:
                self._lock.release()

    def flush_or_log(self) -> None:
        """As flush; a failure is logged and tried again a little later, the changes stay in memory."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._retry_at_s:
                return
            try:
                self.flush()
            except (StorageError, OSError, engine.NativeError) as exc:
                if isinstance(exc, engine.NativeError) and exc.code == NativeCode.ECLOSED:
                    return
                self._retry_at_s = now_s + RETRY_S
                log.warning(
                    "needle map %s: %d changes stay in memory, the index has them: %s", self.path, self.pending, exc
                )
                if self.pending > LAYER_ENTRIES_MOST:
                    self._abandon()

    def flush(self) -> None:
        """Brings the database up to the end of the index. Blocks on disk. Raises StorageError, DiskError."""
        with self._lock:
            if self._closed:
                return
            self._opened()
            self._layers = ({}, *self._layers)
            rows, revision = self._settled()
            if revision != self.revision:
                return
            self._fold_layers(rows)

    def _fold_layers(self, rows: int) -> None:
        """Needs the lock, and that `rows` was found after the newest layer was begun."""
        try:
            self._advance(self._db, rows, replay=False)
        except (_Damaged, OSError) as exc:
            raise self._failure(exc) from exc
        self._layers = self._layers[:1]

    def catch_up(self) -> MapFigures:
        """Folds in the rows that a vacuum's commit appended behind those the map was built from.

        Returns upstream's counters of a map right after a vacuum: only those rows count as deletes. Blocks on disk.
        """
        with self._lock:
            rows = os.fstat(self._idx_fd).st_size // self._row.size
            try:
                deleted, deleted_bytes = self._advance(self._opened(), rows, replay=True)
            except (_Damaged, OSError) as exc:
                raise self._failure(exc) from exc
            basis = self._basis
            return MapFigures(rows, basis.row_bytes, deleted, deleted_bytes, basis.max_key, basis.entries)

    def _advance(self, db: Any, rows: int, replay: bool) -> tuple[int, int]:
        """Needs the lock. Folds the index's rows up to `rows` in; (entries they replaced or deleted, bytes of those).

        With replay a deleted key goes, as when upstream makes its database from an index. Without, it stays with its
        size negated, so that it can still be read as deleted; an empty file has no such size and so stays live, as
        upstream has it (contract storage.md 15, trap).
        """
        count = count_bytes = 0
        while self._basis.rows < rows:
            end = min(rows, self._basis.rows + FOLD_ROWS)
            raw = self._read_index(self._basis.rows * self._row.size, end * self._row.size)
            with _database():
                more, more_bytes = self._fold(db, raw, end, replay)
            count += more
            count_bytes += more_bytes
        return count, count_bytes

    def _fold(self, db: Any, raw: bytes, end: int, replay: bool) -> tuple[int, int]:
        rows = self._parse(raw)
        keys = list({row[0] for row in rows})
        packed = [_KEY.pack(key) for key in keys]
        before = {
            key: None if found is None else Value._make(_VALUE.unpack(found))
            for key, found in zip(keys, db.get(packed), strict=True)
        }
        now = dict(before)
        basis = self._basis
        kept, kept_bytes, row_bytes, max_key, entries = (
            basis.kept,
            basis.kept_bytes,
            basis.row_bytes,
            basis.max_key,
            basis.entries,
        )
        count = count_bytes = 0
        for key, offset, size in rows:
            old = now[key]
            new: Value | None
            if offset != 0 and size >= 0:
                new = Value(offset, size)
            elif replay or offset == 0 or old is None:
                new = None
            else:
                new = Value(old.offset, -abs(old.size))
            if old is not None and old.size >= 0:
                count += 1
                count_bytes += old.size
                entries -= 1
                if old.size > 0:
                    kept -= 1
                    kept_bytes -= old.size
            if new is not None and new.size >= 0:
                entries += 1
                if new.size > 0:
                    kept += 1
                    kept_bytes += new.size
            row_bytes += max(size, 0)
            max_key = max(max_key, key)
            now[key] = new
        basis = Basis(end, engine.crc32c(raw, basis.crc), kept, kept_bytes, row_bytes, max_key, entries)
        batch = self._maps.rocksdict.WriteBatch(raw_mode=True)
        for key, name in zip(keys, packed, strict=True):
            value = now[key]
            if value is None:
                if before[key] is not None:
                    batch.delete(name)
            elif value != before[key]:
                batch.put(name, _VALUE.pack(*value))
        batch.put(_STATE_KEY, basis.pack(self._width, self.revision))
        db.write(batch, self._maps.unlogged)
        self._basis = basis
        return count, count_bytes

    def _parse(self, raw: bytes) -> list[tuple[int, int, int]]:
        if self._width == 4:
            return [(key, units * 8, size) for key, units, size in self._row.iter_unpack(raw)]
        return [(key, (high << 32 | low) * 8, size) for key, low, high, size in self._row.iter_unpack(raw)]

    # ------------------------------------------------------------------------------------------------ closing, idling

    def tick_hour(self) -> None:
        """One hour has passed: closes the database after `timeout_h` ticks without a look-up in it."""
        if self.timeout_h <= 0 or self._db is None:
            return
        if self._used:
            self._used = False
            self._idle_ticks = 0
            return
        self._idle_ticks += 1
        if self._idle_ticks >= self.timeout_h:
            self.unload()

    def unload(self) -> None:
        """Closes the database until the next use. Blocks on disk; a failure is logged."""
        with self._lock:
            if self._db is None or self._closed:
                return
            self.flush_or_log()
            log.log(V1, "needle map %s is idle and closed", self.path)
            if self._db is not None:
                with contextlib.suppress(_Damaged), _database():
                    self._db.flush()
            self._abandon()

    def _abandon(self) -> None:
        """Needs the lock. Look-ups that run find the database gone and take the next one."""
        db, self._db = self._db, None
        self._close_database(db)

    def _close_database(self, db: Any) -> None:
        if db is not None:
            try:
                with _database():
                    db.close()
            except _Damaged as exc:
                log.warning("needle map %s: closing: %s", self.path, exc)

    def close(self) -> None:
        """Brings the database up to the end of the index, which nobody extends any more, and closes it. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                rows = os.fstat(self._idx_fd).st_size // self._row.size
                if self._db is not None:
                    self._layers = ({}, *self._layers)
                    self._fold_layers(rows)
                    with _database():
                        self._db.flush()
                if self._basis.rows == rows:
                    self._note_close()
            except (_Damaged, StorageError, OSError) as exc:
                log.warning("needle map %s: the next start takes up what is missing: %s", self.path, exc)
            self._end()

    def discard(self) -> None:
        """Closes the database and removes it."""
        with self._lock:
            already, self._closed = self._closed, True
            if not already:
                self._end()
            try:
                for path in (self._state_path, self.path):
                    files.remove_if_exists(path)
            except OSError as exc:
                log.warning("needle map %s: %s", self.path, from_os_error(exc, "remove"))

    def _end(self) -> None:
        self._abandon()
        os.close(self._idx_fd)
        self._maps.release(self.path, self)

    def _failure(self, exc: BaseException) -> StorageError:
        if isinstance(exc, OSError):
            return from_os_error(exc, "write", self.path)
        number = errno.EIO
        if isinstance(exc, engine.NativeError):
            number = exc.info.sys_errno or errno.EIO
        elif "No space left" in str(exc):
            number = errno.ENOSPC
        return disk_error(f"needle map {self.path}: {exc}", number, path=self.path)


def rocks_path_of(idx_path: str) -> str:
    """The directory of an index's databases."""
    return idx_path.removesuffix(".idx") + EXTENSION


def _closed_error() -> engine.NativeError:
    return engine.NativeError(NativeCode.ECLOSED, engine.NativeInfo(NativeCode.ECLOSED, 0, 0, 0, 0, 0))
