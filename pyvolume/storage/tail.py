"""What was appended to a volume since a moment: for followers and incremental copies; and taking it in at a follower.

May import volume, _native and the leaves. Works on descriptors of its own, opened by name and held against the volume's
compaction revision, so that a vacuum meanwhile changes nothing under a reader. The ends of both files are taken from
the engine at one moment: only whole records are seen. Upstream: `weed/storage/volume_backup.go`,
`weed/server/volume_grpc_tail.go`. Blocks on disk.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from pyvolume._native import engine, since
from pyvolume._native.follow import RECORD_MAX, Follower
from pyvolume.errors import (
    CorruptNeedle,
    NativeCode,
    NeedleNotFound,
    StorageError,
    VolumeClosed,
    errno_text,
    from_native,
    from_os_error,
)
from pyvolume.storage.tier import scan
from pyvolume.storage.tier.handle import RemoteData, TieredVolume
from pyvolume.storage.volume import NeedleIn
from pyvolume.types import Ttl

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

PIECE_BYTES: Final = 2 << 20
"""Upstream's limit for the bytes of one message."""
SCAN_RECORDS: Final = 16
"""How many headers are looked at where records are long; those between them are not."""
SCAN_ROWS: Final = 512
HEADER_BYTES: Final = 16
CURRENT_VERSION: Final = 3
MAX_RECORD_BYTES: Final = (1 << 30) + (1 << 20)
"""No needle can be larger: the longest message of all is 1 GiB."""
_OPEN_ATTEMPTS: Final = 8
_CHECKSUM: Final = 4
_TIME: Final = struct.Struct(">Q")
_SIZE: Final = struct.Struct(">i")
_HEADER: Final = struct.Struct(">IQi")


class Piece(NamedTuple):
    """Part of a record: its header each time, up to PIECE_BYTES of the body (fields, checksum, time, padding)."""

    header: memoryview
    body: memoryview
    is_last: bool


@dataclass
class Snapshot:
    """Both files of a volume, opened; only rows and bytes before `rows` and `end` count."""

    volume: Volume
    dat_fd: int
    idx_fd: int
    rows: int
    end: int
    last_append_ns: int = 0
    """Append time of the last record that `follow` gave."""

    def find_since(self, since_ns: int) -> int | None:
        """Byte offset of the first record appended after since_ns; None if there is none.

        Raises StorageError `fail to locate by appendAtNs %d: …`. Upstream's search looks at the whole record, checksum
        included; here only the time counts, the receiver checks the rest.
        """
        volume = self.volume
        try:
            return since.find_since(self.dat_fd, self.idx_fd, volume.offset_width, volume.version, self.rows, since_ns)
        except since.SearchError as exc:
            if exc.code == NativeCode.ESYS:
                reason = f"read {volume.dat_path}: {errno_text(exc.info.sys_errno)}"
            else:
                reason = str(from_native(exc.code, exc.info, vid=volume.vid, path=volume.dat_path))
            where = f"read entry {exc.row} offset {exc.offset}"
            raise StorageError(f"fail to locate by appendAtNs {since_ns}: {where}: {reason}") from exc

    def raw(self, start: int) -> Iterator[bytes]:
        """The bytes from start to the end, in pieces. Raises DiskError."""
        at = start
        while at < self.end:
            piece = self._read(at, min(PIECE_BYTES, self.end - at))
            if not piece:
                return
            yield piece
            at += len(piece)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self.dat_fd, length, offset)
        except OSError as exc:
            raise from_os_error(exc, "read", self.volume.dat_path) from exc

    def follow(self, start: int) -> Iterator[list[bytes] | Piece]:
        """Every record from start on, tombstones included. Raises StorageError.

        Most come as the messages of a follower, many at a time (`_native.follow`), those that are long in pieces.
        Zero-filled regions, which upstream sends as records of id 0, are left out.
        """
        offset, window, follower = start, _Window(self), Follower(self.dat_fd, self.volume.version)
        while True:
            messages, after = follower.take(offset, self.end)
            if messages:
                self.last_append_ns = max(self.last_append_ns, follower.last_append_ns)
                yield messages
            if after != offset:
                offset = after
                continue
            records, offset = self._scan(offset)
            if not records:
                return
            yield from self._pieces(window, records[0])
            for record in records[1:]:
                if record.size <= RECORD_MAX:
                    offset = record.offset
                    break
                yield from self._pieces(window, record)

    def _scan(self, offset: int) -> tuple[list[engine.ScanRec], int]:
        """A few records from offset on, and where to go on; none at the end."""
        try:
            return engine.dat_scan(self.dat_fd, self.volume.version, offset, self.end, False, SCAN_RECORDS)
        except engine.NativeError as exc:
            if exc.code == NativeCode.EEOF:
                return [], offset  # the file ends within a record: not acknowledged, or being rolled back
            raise StorageError(f"cannot read needle header at offset {offset}: {exc}") from exc

    def _pieces(self, window: _Window | scan.Window, record: engine.ScanRec | scan.Header) -> Iterator[Piece]:
        header = memoryview(_HEADER.pack(record.cookie, record.id, record.size))
        at, end = record.offset + HEADER_BYTES, min(record.end, self.end)
        is_long = end - at > PIECE_BYTES
        if self.volume.version == CURRENT_VERSION:
            time_at = at + max(0, record.size) + _CHECKSUM
            when = self._exactly(time_at, _TIME.size) if is_long else window.take(at, time_at + _TIME.size - at)
            self.last_append_ns = max(self.last_append_ns, _TIME.unpack(when[-_TIME.size :])[0])
        while at < end:
            length = min(PIECE_BYTES, end - at)
            body = self._exactly(at, length) if is_long else window.take(at, length)
            yield Piece(header, body, at + length == end)
            at += length

    def _exactly(self, offset: int, length: int) -> memoryview:
        view = memoryview(self._read(offset, length))
        if len(view) < length:
            raise CorruptNeedle("EOF", path=self.volume.dat_path, offset=offset)
        return view


@dataclass
class RemoteSnapshot(Snapshot):
    """Of a volume whose data is in a remote store. There is no dat_fd; methods may also raise RemoteError."""

    remote: RemoteData | None = None

    def _read(self, offset: int, length: int) -> bytes:
        assert self.remote is not None
        return bytes(self.remote.backend.read_at(self.remote.key, offset, min(length, self.end - offset)))

    def find_since(self, since_ns: int) -> int | None:
        """As Snapshot.find_since. The last record is looked at first: mostly nothing is newer."""
        found = self._row_before(self.rows)
        if found is None or self._time_of(found[1]) <= since_ns:
            return None
        low, high, at = 0, found[0], found[1].offset
        while low < high:  # the row at `high` is newer than since_ns, those before `low` are not
            middle = self._row_before((low + high) // 2 + 1)
            if middle is None or middle[0] < low:
                low = (low + high) // 2 + 1
                continue
            if self._time_of(middle[1]) > since_ns:
                high, at = middle[0], middle[1].offset
            else:
                low = (low + high) // 2 + 1
        return at

    def _row_before(self, end: int) -> tuple[int, engine.IdxRow] | None:
        """The last row before `end` that has a record."""
        count = 1  # rows without a record are rare
        while end > 0:
            first = max(0, end - count)
            rows = engine.idx_read(self.idx_fd, self.volume.offset_width, first, end - first)
            for back, row in enumerate(reversed(rows), 1):
                if row.offset:
                    return first + len(rows) - back, row
            end, count = first, SCAN_ROWS
        return None

    def _time_of(self, row: engine.IdxRow) -> int:
        if self.volume.version != CURRENT_VERSION:
            return 0
        at = row.offset + HEADER_BYTES + max(row.size, 0) + _CHECKSUM
        if at + _TIME.size > self.end:
            raise CorruptNeedle("EOF", path=self.volume.dat_path, offset=row.offset)
        return int(_TIME.unpack(self._read(at, _TIME.size))[0])

    def follow(self, start: int) -> Iterator[list[bytes] | Piece]:
        """As Snapshot.follow; all in pieces."""
        window = scan.Window(self._view_at, self.end, PIECE_BYTES)
        for header in scan.headers(window, self.volume.version, start, self.end):
            if header.id == 0 and header.cookie == 0 and header.size == 0:
                continue
            yield from self._pieces(window, header)

    def _view_at(self, offset: int, length: int) -> memoryview:
        return memoryview(self._read(offset, length))


class _Window:
    """Reads ahead, so that small records do not cost a system call each."""

    def __init__(self, files: Snapshot) -> None:
        self._files = files
        self._at = 0
        self._view = memoryview(b"")

    def take(self, offset: int, length: int) -> memoryview:
        """Bytes that lie before the end. Raises CorruptNeedle `EOF` if the file has become shorter."""
        start = offset - self._at
        if start < 0 or start + length > len(self._view):
            files = self._files
            self._at, start = offset, 0
            self._view = files._exactly(offset, max(length, min(PIECE_BYTES, files.end - offset)))
        return self._view[start : start + length]


@contextlib.contextmanager
def snapshot(volume: Volume) -> Iterator[Snapshot]:
    """The files of a volume as they are now. Raises VolumeClosed, DiskError."""
    with contextlib.ExitStack() as stack:
        for _ in range(_OPEN_ATTEMPTS):
            handle, stat = volume.handle, volume.stat()
            if not volume.is_open:
                raise VolumeClosed(f"volume {volume.vid} is closed")
            if isinstance(handle, TieredVolume):
                idx_fd = _open(volume.idx_path)
                stack.callback(os.close, idx_fd)
                rows = stat.idx_bytes // (12 + volume.offset_width)
                yield RemoteSnapshot(volume, -1, idx_fd, rows, handle.remote.size, remote=handle.remote)
                return
            dat_fd = _open(volume.dat_path)
            stack.callback(os.close, dat_fd)
            idx_fd = _open(volume.idx_path)
            stack.callback(os.close, idx_fd)
            if volume.compaction_revision == stat.compaction_revision:
                rows = stat.idx_bytes // (12 + volume.offset_width)
                # the engine counts up to a multiple of 8, the padding of the last record may be missing
                yield Snapshot(volume, dat_fd, idx_fd, rows, min(stat.dat_bytes, os.fstat(dat_fd).st_size))
                return
        raise StorageError(f"volume {volume.vid} is compacted")


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise from_os_error(exc, "open", path) from exc


# ------------------------------------------------------------------------------------------------------- the other end


class Assembler:
    """Puts records together from the pieces of a follower's stream. A sender is not trusted with our memory."""

    def __init__(self) -> None:
        self._header = b""
        self._body = bytearray()

    def add(self, header: memoryview, body: memoryview, is_last: bool, version: int) -> engine.Needle | None:
        """The needle once its last piece came. Raises StorageError, CorruptNeedle, CrcMismatch."""
        if not self._header:
            if not header:
                return None  # a heartbeat
            if len(header) < HEADER_BYTES:
                raise StorageError(f"needle header of {len(header)} bytes")
            self._header = bytes(header[:HEADER_BYTES])
        version = version or CURRENT_VERSION
        size = _SIZE.unpack_from(self._header, 12)[0]
        length = engine.needle_record_len(size, version)
        if size < 0 or length > MAX_RECORD_BYTES:
            raise StorageError(f"needle of size {size} is refused")
        if max(HEADER_BYTES, len(self._body)) + len(body) > length:
            raise StorageError(f"needle of size {size} with a record of more than {length} bytes")
        if is_last and not self._body:
            record = b"".join((self._header, body))
        else:
            if not self._body:
                self._body += self._header
            self._body += body
            if not is_last:
                return None
            record = bytes(self._body)
        self._header, self._body = b"", bytearray()
        try:
            return engine.parse_needle(record, version, size)
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info) from exc


def apply(volume: Volume, needle: engine.Needle) -> None:
    """Writes a needle that was appended elsewhere. Another cookie than the one here is refused, as upstream does.

    Departure V4: an empty record for a key that is live with data is applied as the delete it is. One that has the
    checksum of some data, for a key that is not live, is a delete of what is not here: nothing is written. Else it is
    an empty file, as upstream takes all of them. Raises StorageError.
    """
    if needle.size == 0:
        try:
            held = volume.lookup(needle.id).size
        except NeedleNotFound:
            held = -1
        if held > 0:
            volume.delete_needle(needle.id, needle.cookie, needle.checksum)
            return
        if held < 0 and needle.checksum:
            return
    volume.write_needle(
        NeedleIn(
            id=needle.id,
            cookie=needle.cookie,
            data=needle.data if needle.data is not None else b"",
            flags=needle.flags,
            name=needle.name,
            mime=needle.mime,
            pairs=needle.pairs,
            last_modified_s=needle.last_modified_s,
            ttl=Ttl(needle.ttl_count, needle.ttl_unit),
        ),
        check_cookie=False,
    )
