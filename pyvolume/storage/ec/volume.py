"""One mounted erasure coded volume on one disk: its index, its journal of deletes, the shards that lie there.

May import layout, sidecar, index, vif, files, _native and the leaves; not store. A volume with shards on several disks
has one EcVolume for each. Descriptors are shared: closing waits for whoever reads. `_lock` guards the deletes and the
journal and is held over the write and flush of one id; `locations_lock` guards the cache of where shards are elsewhere.
Upstream: `weed/storage/erasure_coding/ec_volume.go`, `ec_shard.go`, `ec_volume_delete.go`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pyvolume._native import ec, engine
from pyvolume.errors import NeedleNotFound, StorageError, from_native, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files, vif
from pyvolume.storage.ec import index, sidecar
from pyvolume.storage.ec.layout import Layout, Ratio, layout_of
from pyvolume.types import volume_base_name

log = logging.getLogger(__name__)

WALK_ROWS: Final = 4096
MAX_RECENT: Final = 1 << 16
"""So many of the last deletes are known with their times."""
MISSING_TEXT: Final = "locate in local ec volume: FindNeedleFromEcx: needle not found"


class FileMissing(StorageError):
    """A shard or index is not on this disk; another may have it."""


@dataclass(frozen=True, slots=True)
class EcShardsInfo:
    """What a master is told of the shards of one volume on one disk: the fields of VolumeEcShardInformationMessage."""

    id: int
    collection: str
    ec_index_bits: int
    shard_sizes: tuple[int, ...]
    disk_type: str
    disk_id: int
    expire_at_sec: int = 0
    file_count: int = 0
    delete_count: int = 0
    encode_ts_ns: int = 0


@dataclass(frozen=True, slots=True)
class RecentDelete:
    """A delete that came by itself, not with a journal. at_s: by the monotonic clock. first: the needle's shard."""

    at_s: float
    at_ns: int
    key: int
    first: int


class SharedFile:
    """A descriptor that several threads use; it is closed when the last of them, the fast lane included, is done."""

    def __init__(self, path: str, flags: int) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._users = 1
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            self.shared = ec.SharedFd(self._fd)
        except engine.NativeError:
            os.close(self._fd)
            raise
        self._closed = False

    @contextlib.contextmanager
    def use(self) -> Iterator[int]:
        """The descriptor, which stays open as long as the with-block. Raises OSError(EBADF) after close."""
        fd = self.hold()
        try:
            yield fd
        finally:
            self.let_go()

    def hold(self) -> int:
        """The descriptor, which stays open until let_go. Raises OSError(EBADF) after close."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
            self._users += 1
        return self._fd

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.let_go()

    def let_go(self) -> None:
        """Ends a hold."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.shared.release()


class EcShard:
    """One open shard file."""

    def __init__(self, path: str, number: int) -> None:
        self.path = path
        self.number = number
        self._file = SharedFile(path, os.O_RDONLY)
        with self._file.use() as fd:
            self.size = os.fstat(fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Up to length bytes; fewer at the end. Raises OSError."""
        with self._file.use() as fd:
            fault("ec.shard_read")
            pieces = []
            while length > 0:
                piece = os.pread(fd, length, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def use(self) -> contextlib.AbstractContextManager[int]:
        """As SharedFile.use."""
        return self._file.use()

    def hold(self) -> int:
        """As SharedFile.hold."""
        return self._file.hold()

    def let_go(self) -> None:
        """As SharedFile.let_go."""
        self._file.let_go()

    @property
    def shared(self) -> ec.SharedFd:
        """The descriptor, for the fast lane."""
        return self._file.shared

    def close(self) -> None:
        self._file.close()


class EcVolume:
    """Opens index and journal at construction; shards come and go by add_shard and drop_shard.

    Raises FileMissing when there is no index, StorageError. Blocks on disk.
    """

    def __init__(
        self,
        *,
        vid: int,
        collection: str,
        directory: str,
        idx_directory: str,
        disk_id: int,
        disk_type: str,
        offset_width: int,
    ) -> None:
        self.vid = vid
        self.collection = collection
        self.directory = directory
        self.idx_directory = idx_directory
        self.disk_id = disk_id
        self.disk_type = disk_type
        self.width = offset_width
        self.shards: dict[int, EcShard] = {}
        self._lock = threading.Lock()
        name = volume_base_name(collection, vid)
        self.base_path = f"{directory}/{name}"
        self.index_directory = _index_directory(directory, idx_directory, name)
        self.ecx_path = f"{self.index_directory}/{name}.ecx"
        self.ecj_path = f"{self.index_directory}/{name}.ecj"
        self._read_info(f"{idx_directory}/{name}.vif")
        try:
            self._ecx = SharedFile(self.ecx_path, os.O_RDWR)
            with self._ecx.use() as fd:
                self.ecx_bytes = os.fstat(fd).st_size
        except OSError as exc:
            raise from_os_error(exc, "open", self.ecx_path) from exc
        try:
            self._journal = os.open(self.ecj_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            self._ecx.close()
            raise from_os_error(exc, "open", self.ecj_path) from exc
        self._closed = False
        self._recent: deque[RecentDelete] = deque(maxlen=MAX_RECENT)
        self.sent_at_s: dict[int, float] = {}
        self._buried: frozenset[int] | None = None
        self._folds = 0
        self.deleted = ec.IdSet()
        try:
            self.deleted = ec.IdSet(index.journal_data(self.ecj_path))
        except OSError as exc:
            log.warning("ec volume %d: load deleted needles from %s: %s", vid, self.ecj_path, exc)
        path = sidecar.find(self.base_path, f"{idx_directory}/{name}")
        self.sums_state, self.sums, reason = sidecar.load(path, self.ratio)
        if reason:
            log.warning("ec volume %d: %s cannot be used: %s", vid, path, reason)
        self.locations_lock = threading.Lock()
        self.shard_locations: dict[int, tuple[str, ...]] = {}
        self.locations_at_s = float("-inf")
        self.view: ec.Shards | None = None
        """What the fast lane reads, if this volume is the one that counts (`EcMembers.find`)."""

    def __repr__(self) -> str:
        return f"<EcVolume {self.vid} {self.directory} {sorted(self.shards)}>"

    def _read_info(self, other_path: str) -> None:
        found = vif.load(self.base_path + ".vif")
        if found.status == "missing":
            found = vif.load(other_path)
        info = found.info if found.status in ("ok", "old") else vif.VolumeInfo(version=3)
        if found.status not in ("ok", "old"):
            log.warning("vif file not found, using defaults, volumeId:%d, filename:%s.vif", self.vid, self.base_path)
        self.version = info.version or 3
        self.dat_file_size = info.dat_file_size
        self.expire_at_s = info.expire_at_sec
        self.encode_ts_ns = 0
        self.ratio = Ratio()
        if info.ec_shard_config is not None:
            self.encode_ts_ns = info.ec_shard_config.encode_ts_ns
            ratio = Ratio(info.ec_shard_config.data_shards, info.ec_shard_config.parity_shards)
            if ratio.is_valid:
                self.ratio = ratio
            else:
                log.warning("ec volume %d: no valid ratio in the .vif (%s), using the default", self.vid, ratio)

    # ---------------------------------------------------------------------------------------------------------- shards

    def shard_path(self, number: int) -> str:
        return f"{self.base_path}.ec{number:02d}"

    def add_shard(self, number: int) -> EcShard:
        """Opens a shard; one that is open stays as it is. Raises FileMissing, StorageError. The store's lock is held
        by nobody: the caller excludes others by the id."""
        held = self.shards.get(number)
        if held is not None:
            return held
        path = self.shard_path(number)
        try:
            shard = EcShard(path, number)
        except FileNotFoundError as exc:
            raise FileMissing(str(from_os_error(exc, "open", path))) from exc
        except OSError as exc:
            raise from_os_error(exc, "open", path) from exc
        self.shards = dict(sorted({**self.shards, number: shard}.items()))
        return shard

    def drop_shard(self, number: int) -> bool:
        """Closes a shard; false if it is not open."""
        shard = self.shards.get(number)
        if shard is None:
            return False
        self.shards = {key: value for key, value in self.shards.items() if key != number}
        shard.close()
        return True

    def close(self) -> None:
        """Closes everything; idempotent. What reads now still gets through."""
        shards, self.shards, self.view = self.shards, {}, None
        for shard in shards.values():
            shard.close()
        self._ecx.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._journal)

    def sync(self) -> None:
        """Flushes index and journal; what fails is logged."""
        try:
            with self._ecx.use() as fd:
                os.fsync(fd)
            with self._lock:
                if not self._closed:
                    os.fsync(self._journal)
        except OSError as exc:
            log.warning("ec volume %d: sync: %s", self.vid, exc)

    def make_view(self, shards: Iterable[EcShard]) -> ec.Shards:
        """For the fast lane, with shards of any disk; `view` from now on. Raises StorageError. Does not block."""
        layout = self.layout
        cut = (layout.data, self.ratio.parity, layout.large_block, layout.small_block, layout.large_rows)
        try:
            with contextlib.ExitStack() as stack:  # none of them is closed meanwhile
                stack.enter_context(self._ecx.use())
                files = {}
                for shard in shards:
                    stack.enter_context(shard.use())
                    files[shard.number] = shard.shared
                self.view = ec.Shards(
                    ecx=self._ecx.shared,
                    rows=self.rows,
                    width=self.width,
                    version=self.version,
                    deleted=self.deleted,
                    shards=files,
                    layout=cut,
                )
        except OSError as exc:
            raise from_os_error(exc, "open", exc.filename or self.ecx_path) from exc
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=self.ecx_path) from exc
        return self.view

    # --------------------------------------------------------------------------------------------------------- needles

    @property
    def rows(self) -> int:
        return self.ecx_bytes // index.row_bytes(self.width)

    @property
    def layout(self) -> Layout:
        """How the .dat was cut. Without its size in the .vif, by the length of a shard."""
        first = next(iter(self.shards.values()), None)
        return layout_of(self.ratio, self.dat_file_size, first.size if first is not None else 0)

    def lookup(self, key: int) -> tuple[int, int]:
        """(offset, size) of a needle, size negative if it was deleted. Raises NeedleNotFound, StorageError."""
        try:
            with self._ecx.use() as fd:
                row = ec.ecx_find(fd, self.width, self.rows, key)
        except OSError as exc:
            raise from_os_error(exc, "read", self.ecx_path) from exc
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=self.ecx_path, key=key) from exc
        if row is None:
            raise NeedleNotFound(MISSING_TEXT)
        return row[1], -1 if key in self.deleted else row[2]

    def is_deleted(self, key: int) -> bool:
        """Whether the index or the journal says so; false for an id that is not known."""
        if key in self.deleted:
            return True
        try:
            return self.lookup(key)[1] < 0
        except StorageError:
            return False

    def walk(self) -> Iterator[tuple[int, int, int]]:
        """(key, offset, size) of each row as it is in the index. Raises StorageError."""
        at = 0
        while True:
            try:
                with self._ecx.use() as fd:
                    rows = engine.idx_read(fd, self.width, at, WALK_ROWS)
            except OSError as exc:
                raise from_os_error(exc, "read", self.ecx_path) from exc
            except engine.NativeError as exc:
                raise from_native(exc.code, exc.info, path=self.ecx_path) from exc
            if not rows:
                return
            for row in rows:
                yield row.key, row.offset, row.size
            at += len(rows)

    def record_bytes(self, size: int) -> int:
        """Length on disk of a needle's record."""
        return engine.needle_record_len(size, self.version)

    # --------------------------------------------------------------------------------------------------------- deletes

    def journal(self, key: int, *, first: int | None = None) -> None:
        """Notes a delete, durably. One that is noted already is success. Raises StorageError `ec volume %d closed`.

        first: the shard with the needle's first byte, which makes it one of the recent deletes.
        """
        self._journal_all([key])
        if first is not None:
            with self._lock:
                self._recent.append(RecentDelete(time.monotonic(), time.time_ns(), key, first))

    def merge_deletes(self, keys: Iterable[int]) -> None:
        """Notes deletes that came with a journal of another server, with one flush. Raises StorageError."""
        self._journal_all(keys)

    def _journal_all(self, keys: Iterable[int]) -> None:
        with self._lock:
            if self._closed:
                raise StorageError(f"ec volume {self.vid} closed")
            fresh = [key for key in dict.fromkeys(keys) if key not in self.deleted]
            if not fresh:
                return
            end = os.fstat(self._journal).st_size
            end -= end % index.ID_BYTES
            try:
                fault("ec.journal")
                files.pwrite_all(self._journal, index.bytes_of(fresh), end)
                os.fsync(self._journal)
            except OSError as exc:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._journal, end)
                raise from_os_error(exc, "write", self.ecj_path) from exc
            for key in fresh:
                self.deleted.add(key)

    def recent_deletes(self, within_s: float) -> list[RecentDelete]:
        """What was deleted here in the last seconds, the last MAX_RECENT at most; of a closed volume, too."""
        since = time.monotonic() - within_s
        with self._lock:
            return [each for each in self._recent if each.at_s >= since]

    def note_sent(self, number: int) -> None:
        """A peer begins to fetch a shard: what is deleted from now on may be missing in the journal that it fetches."""
        self.sent_at_s = {**self.sent_at_s, number: time.monotonic()}

    def buried(self) -> frozenset[int]:
        """Ids that the index itself says are deleted: those of journals that were folded into it. Raises StorageError.

        The first call reads the whole index.
        """
        with self._lock:
            known, folds = self._buried, self._folds
        if known is not None:
            return known
        try:
            with self._ecx.use() as fd:
                found = ec.ecx_buried(fd, self.width, self.rows)
        except OSError as exc:
            raise from_os_error(exc, "read", self.ecx_path) from exc
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=self.ecx_path) from exc
        known = frozenset(found)
        with self._lock:
            if self._folds == folds:
                self._buried = known
        return known

    def fold(self, also: Iterable[int] = ()) -> None:
        """Brings the journal into the index and empties it; the deletes stay known here (departure E1).

        `also`: deletes that other disks know of. Raises StorageError.
        """
        with self._lock:
            if self._closed:
                raise StorageError(f"ec volume {self.vid} closed")
            try:
                data = index.bytes_of(())
                size = os.fstat(self._journal).st_size
                while len(data) < size and (piece := os.pread(self._journal, size - len(data), len(data))):
                    data += piece
                if size % index.ID_BYTES:
                    raise StorageError("rebuild: read ecj: unexpected EOF")
                self._folds += 1
                self._buried = None
                index.bury(self.ecx_path, self.width, [*index.ids_of(data), *also])
                fault("ec.fold_truncate")
                os.ftruncate(self._journal, 0)
                os.fsync(self._journal)
            except OSError as exc:
                raise from_os_error(exc, "write", self.ecj_path) from exc

    # ------------------------------------------------------------------------------------------------------- locations

    def update_locations(self, change: Callable[[dict[int, tuple[str, ...]]], None]) -> None:
        """Changes the cache of shard locations in one step."""
        with self.locations_lock:
            fresh = dict(self.shard_locations)
            change(fresh)
            self.shard_locations = fresh

    # ---------------------------------------------------------------------------------------------------------- report

    def info(self) -> EcShardsInfo:
        """All shards here, for a heartbeat."""
        shards = self.shards
        bits = 0
        for number in shards:
            bits |= 1 << number
        return EcShardsInfo(
            id=self.vid,
            collection=self.collection,
            ec_index_bits=bits,
            shard_sizes=tuple(shard.size for shard in shards.values()),
            disk_type=self.disk_type,
            disk_id=self.disk_id,
            expire_at_sec=self.expire_at_s,
            file_count=self.rows,
            delete_count=len(self.deleted),
            encode_ts_ns=self.encode_ts_ns,
        )

    def delta(self, number: int, *, gone: bool) -> EcShardsInfo:
        """One shard that came or went. Quirk: its size is that of the first shard here, and 0 when it went."""
        first = next(iter(self.shards.values()), None)
        return EcShardsInfo(
            id=self.vid,
            collection=self.collection,
            ec_index_bits=1 << number,
            shard_sizes=(0,) if gone else (first.size if first is not None else 0,),
            disk_type=self.disk_type,
            disk_id=self.disk_id,
            expire_at_sec=0 if gone else self.expire_at_s,
            encode_ts_ns=self.encode_ts_ns,
        )


def _index_directory(directory: str, idx_directory: str, name: str) -> str:
    """Where the index is: one with content first, beside the shards first. Raises FileMissing."""
    sizes: dict[str, int] = {}
    for place in dict.fromkeys((directory, idx_directory)):
        with contextlib.suppress(OSError):
            status = os.stat(f"{place}/{name}.ecx")
            if not os.path.isdir(f"{place}/{name}.ecx"):
                sizes[place] = status.st_size
    for place, size in sizes.items():
        if size > 0:
            return place
    if not sizes:
        text = f"cannot open ec volume index {directory}/{name}.ecx (or {idx_directory}/{name}.ecx)"
        raise FileMissing(f"{text}: file does not exist")
    return next(iter(sizes))
