"""RPCs on single needles and on all needles of a volume (contract grpc.md 5).

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_batch_delete.go`, `volume_grpc_read_write.go`,
`volume_grpc_read_all.go`, `volume_grpc_admin.go`, `weed/storage/needle/needle_read_page.go`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from pyvolume._native import engine
from pyvolume.errors import (
    CorruptNeedle,
    NativeCode,
    NeedleNotFound,
    PyvolumeError,
    StorageError,
    VolumeClosed,
    VolumeMoved,
)
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.ec_peers import reader_of
from pyvolume.server.grpc import wire
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.status import Refusal
from pyvolume.server.grpc.sync import volume_or_not_found
from pyvolume.storage.tier import scan
from pyvolume.types import MAX_VOLUME_BYTES, FileId, Ttl, parse_key_cookie, parse_uint

if TYPE_CHECKING:
    from pyvolume.storage.ec.volume import EcVolume
    from pyvolume.storage.volume import Volume

HEADER_BYTES = 16
DATA_SIZE_BYTES = 4
MAX_META_BYTES = 128 << 10
SCAN_RECORDS = 256
LAST_MODIFIED_BYTES = 5
DELETES_PARSED = 4096
DELETES_AFTER_FAILURE = 512
"""Items taken by themselves once a batch could not be written, before the next try."""

_U32_MAX = (1 << 32) - 1
_ACCEPTED, _NOT_MODIFIED, _BAD_REQUEST, _NOT_FOUND, _NOT_ACCEPTABLE, _ERROR = 202, 304, 400, 404, 406, 500
_FLAG_NAME, _FLAG_MIME, _FLAG_MTIME, _FLAG_TTL, _FLAG_PAIRS = 0x02, 0x04, 0x08, 0x10, 0x20


# -- deleting many ----------------------------------------------------------------------------------------------------


class _ItemFailed(Exception):
    """One file id could not be deleted: status as in HTTP, and a text."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def batch_delete(call: Call, request: Any) -> bytes:
    """Deletes each file id on its own, in order; results are in the answer. Replicas are the caller's business.

    Runs of plain ids of one volume are the engine's, many at a time; any other item is taken by itself.
    """
    fids = request.file_ids
    parts: list[bytes] = []
    for begin in range(0, len(fids), DELETES_PARSED):
        piece = fids[begin : begin + DELETES_PARSED]
        batch = engine.DeleteBatch(piece, skip_cookie=request.skip_cookie_check)
        at = single_until = 0
        while at < len(piece):
            call.check()
            done = _delete_run(call, batch, at) if at >= single_until else 0
            if done < 0:
                done, single_until = 0, at + DELETES_AFTER_FAILURE
            if done:
                parts.append(batch.answer(at, done))
            else:
                parts.append(_single_result(call, piece[at], request.skip_cookie_check))
            at += done or 1
    return b"".join(parts)


def _delete_run(call: Call, batch: engine.DeleteBatch, at: int) -> int:
    """How many items from `at` on the engine has dealt with; 0, or negative, if item `at` is to be taken by itself."""
    vid = batch.vid(at)
    if vid is None or call.server.store.ec.find(vid) is not None:
        return 0
    volume = call.server.store.find_volume(vid)
    return volume.delete_many(batch, at) if volume is not None else 0


def _single_result(call: Call, fid: str, skip_cookie: bool) -> bytes:
    """The result of one file id, as a BatchDeleteResponse with no other (messages behind each other are one)."""
    try:
        result = pb.DeleteResult(file_id=fid, status=_ACCEPTED, size=_delete_one(call, fid, skip_cookie))
    except _ItemFailed as exc:
        result = pb.DeleteResult(file_id=fid, status=exc.status, error=exc.text)
    made: bytes = pb.BatchDeleteResponse(results=[result]).SerializeToString()
    return made


def _delete_one(call: Call, fid: str, skip_cookie: bool) -> int:
    """The size of what was deleted. Raises _ItemFailed.

    Quirk: with skip_cookie the needle is not read, so a chunk manifest is deleted and a missing volume is status 500;
    the key part is not split at `_` then (volume_grpc_batch_delete.go).
    """
    comma = fid.find(",")
    if comma <= 0:
        raise _ItemFailed(_BAD_REQUEST, "Wrong fid format.")
    try:
        vid = lenient_vid(fid[:comma])
        key, cookie = (parse_key_cookie if skip_cookie else FileId.parse_path)(fid[comma + 1 :])
    except ValueError as exc:
        raise _ItemFailed(_BAD_REQUEST, str(exc)) from None
    coded = call.server.store.ec.find(vid)
    if coded is not None:
        return _delete_coded(call, coded, key, cookie, skip_cookie)
    volume = call.server.store.find_volume(vid)
    checksum = 0
    if skip_cookie:
        cookie = 0
    else:
        if volume is None:
            raise _ItemFailed(_NOT_FOUND, f"volume {vid} not found")
        checksum = _check_before_delete(volume, key, cookie)
    if volume is None:
        config = call.server.config
        raise _ItemFailed(_ERROR, f"volume {vid} not found on {config.ip}:{config.port}")
    try:
        size = volume.delete_needle(key, cookie, checksum)
    except StorageError as exc:
        raise _ItemFailed(_ERROR, str(exc)) from exc
    if not size:
        raise _ItemFailed(_NOT_MODIFIED)
    return size


def _delete_coded(call: Call, volume: EcVolume, key: int, cookie: int, skip_cookie: bool) -> int:
    """As _delete_one for an erasure coded volume, which counts before a plain one of the same id."""
    reader = reader_of(call.server)
    if not skip_cookie:
        try:
            needle = reader.read(volume, key)
        except StorageError as exc:
            raise _ItemFailed(_NOT_FOUND, str(exc)) from None
        if not needle.empty and needle.cookie != cookie:
            raise _ItemFailed(_BAD_REQUEST, "File Random Cookie does not match.")
        if needle.is_manifest:
            raise _ItemFailed(_NOT_ACCEPTABLE, "ChunkManifest: not allowed in batch delete mode.")
    try:
        return reader.delete(volume, key, 0 if skip_cookie else cookie)
    except PyvolumeError as exc:
        raise _ItemFailed(_ERROR, str(exc)) from exc


def lenient_vid(text: str) -> int:
    """Quirk: what is no number is volume 0, a number beyond 64 bits the largest id. Beyond 32 bits: departure A3."""
    try:
        vid = parse_uint(text, 10, 64)
    except ValueError as exc:
        return _U32_MAX if "out of range" in str(exc) else 0
    return vid if vid <= _U32_MAX else parse_uint(text, 10, 32)


def _check_before_delete(volume: Volume, key: int, cookie: int) -> int:
    """Reads the needle and compares the cookie; the checksum, which goes into the tombstone. Raises _ItemFailed."""
    try:
        needle = volume.read_needle(key)
    except VolumeClosed:
        raise _ItemFailed(_NOT_FOUND, "not found") from None
    except StorageError as exc:
        raise _ItemFailed(_NOT_FOUND, str(exc)) from None
    if needle.empty:  # nothing was read of it, so there is no cookie to compare with
        return 0
    if needle.cookie != cookie:
        raise _ItemFailed(_BAD_REQUEST, "File Random Cookie does not match.")
    if needle.is_manifest:
        raise _ItemFailed(_NOT_ACCEPTABLE, "ChunkManifest: not allowed in batch delete mode.")
    return int(needle.checksum)


# -- one needle -------------------------------------------------------------------------------------------------------


def volume_needle_status(call: Call, request: Any) -> Any:
    """What the record says of itself. Quirk: needle_id is the id in the record, not always the one asked for."""
    volume = call.server.store.find_volume(request.volume_id)
    coded = call.server.store.ec.find(request.volume_id) if volume is None else None
    if volume is None and coded is None:
        raise PyvolumeError(f"volume not found {request.volume_id}")
    try:
        if coded is not None:
            needle = reader_of(call.server).read(coded, request.needle_id)
        elif volume is not None:
            needle = volume.read_needle(request.needle_id)
    except VolumeClosed:
        raise NeedleNotFound("not found") from None
    if needle.empty:
        return pb.VolumeNeedleStatusResponse(needle_id=request.needle_id, crc=engine.crc_legacy(0))
    return pb.VolumeNeedleStatusResponse(
        needle_id=needle.id,
        cookie=needle.cookie,
        size=needle.size & _U32_MAX,
        last_modified=needle.last_modified_s,
        crc=engine.crc_legacy(needle.checksum),
        ttl=str(Ttl(needle.ttl_count, needle.ttl_unit)) if needle.has_ttl else "",
    )


def read_needle_blob(call: Call, request: Any) -> Any:
    """The bytes of a record of the given size at the given place; nothing is verified.

    A size whose record would be shorter than nothing is refused (departure A4: upstream's process dies of it).
    """
    volume = volume_or_not_found(call, request.volume_id)
    offset, size = request.offset, request.size
    length = engine.needle_record_len(size, volume.version)
    if length < 0:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"size: {size} is no size of a needle")
    try:
        return pb.ReadNeedleBlobResponse(needle_blob=_read_at(volume, offset, length))
    except VolumeClosed:
        raise
    except StorageError as exc:
        raise PyvolumeError(f"read needle blob offset {offset} size {size}: {exc}") from exc


def _read_at(volume: Volume, offset: int, length: int) -> bytes:
    """Bytes of the data file. Raises StorageError with upstream's text: `EOF` when there are fewer."""
    if offset < 0:
        raise CorruptNeedle(f"readat {volume.dat_path}: negative offset", path=volume.dat_path, offset=offset)
    while True:
        stat = volume.stat()
        if offset + length > stat.dat_bytes:  # also keeps a hostile size from being allocated
            raise CorruptNeedle("EOF", path=volume.dat_path, offset=offset)
        try:
            return bytes(volume.pread(offset, length, stat.compaction_revision)) if length else b""
        except VolumeMoved:
            continue


def read_needle_meta(call: Call, request: Any) -> Any:
    """A record's metadata, read without its data. The request's needle_id is not looked at."""
    volume = call.server.store.find_volume(request.volume_id)
    if volume is None:
        text = f"not found volume id {request.volume_id} and read needle metadata at ec shards is not supported"
        raise PyvolumeError(text)
    meta = _read_meta(volume, request.offset, max(0, request.size))
    return pb.ReadNeedleMetaResponse(
        cookie=meta.cookie,
        last_modified=meta.last_modified_s,
        crc=engine.crc_legacy(meta.checksum),
        ttl=meta.ttl,
        append_at_ns=meta.append_at_ns,
    )


class _Meta(NamedTuple):
    cookie: int
    last_modified_s: int
    checksum: int
    ttl: str
    append_at_ns: int


def _read_meta(volume: Volume, offset: int, size: int) -> _Meta:
    """Reads header and fields; a header of another size is looked for once more behind the limit of 4-byte offsets."""
    limit = MAX_VOLUME_BYTES[4]
    head = _read_at(volume, offset, HEADER_BYTES + DATA_SIZE_BYTES)
    cookie, found_id, found_size, data_size = struct.unpack(">IQiI", head)
    if found_size != size and volume.offset_width == 4 and offset < limit:
        return _read_meta(volume, offset + limit, size)
    if found_size != size:
        shown_id = f"{found_id:x}".encode().hex()  # upstream prints the hex of the hex text
        text = f"size mismatch for entry at offset {offset}: found id {shown_id} size {found_size}"
        text += f", expected size {size}"
        raise CorruptNeedle(text, path=volume.dat_path, offset=offset)
    start = offset + HEADER_BYTES + (DATA_SIZE_BYTES + data_size if size > 0 else 0)
    span = offset + engine.needle_record_len(size, volume.version) - start
    if not 0 <= span <= MAX_META_BYTES:
        text = f"invalid needle meta size {span}: DataSize={data_size}, size={size}, offset={offset}"
        raise CorruptNeedle(text, path=volume.dat_path, offset=offset)
    return _parse_meta(_read_at(volume, start, span), cookie, volume.version, has_fields=size > 0)


def _parse_meta(raw: bytes, cookie: int, version: int, *, has_fields: bool) -> _Meta:
    """Fields (flags, name, mime, time, ttl, pairs), then checksum and append time. Raises CorruptNeedle.

    As upstream the fields are bounded by the whole span, checksum and padding included.
    """
    flags, at, ttl = _FLAG_MTIME, 0, ""
    last_modified_s = 0

    def take(number: int, count: int) -> bytes:
        nonlocal at
        if at + count > len(raw):
            raise CorruptNeedle(f"index out of range {number}: needle data corrupted")
        at += count
        return raw[at - count : at]

    if has_fields:
        flags = take(1, 1)[0] if raw else flags
        for number, flag in ((2, _FLAG_NAME), (3, _FLAG_MIME)):
            if flags & flag and at < len(raw):
                take(number, take(number, 1)[0])
        if flags & _FLAG_MTIME and at < len(raw):
            last_modified_s = int.from_bytes(take(4, LAST_MODIFIED_BYTES), "big")
        if flags & _FLAG_TTL and at < len(raw):
            count, unit = take(5, 2)
            ttl = str(Ttl(count, unit))
        if flags & _FLAG_PAIRS and at < len(raw):
            take(7, int.from_bytes(take(6, 2), "big"))
    needed = 12 if version == 3 else 4
    if at + needed > len(raw):
        raise CorruptNeedle("index out of range 1: needle data corrupted")
    checksum = int.from_bytes(raw[at : at + 4], "big")
    append_at_ns = int.from_bytes(raw[at + 4 : at + 12], "big") if version == 3 else 0
    return _Meta(cookie, last_modified_s, checksum, ttl, append_at_ns)


def write_needle_blob(call: Call, request: Any) -> Any:
    """Appends a ready record under a key, which need not be the id in the record; its CRC is not checked."""
    volume = volume_or_not_found(call, request.volume_id)
    try:
        volume.write_blob(request.needle_id, request.size, request.needle_blob)
    except StorageError as exc:
        raise PyvolumeError(f"write blob needle {request.needle_id} size {request.size}: {exc}") from exc
    return pb.WriteNeedleBlobResponse()


# -- all needles ------------------------------------------------------------------------------------------------------


def read_all_needles(call: Call, request: Any) -> Iterator[Any]:
    """One message for each record that the index points to, volume by volume, in the order of the data file.

    Quirk: a deleted needle whose record is still there is among them (the index keeps its place). A volume that is not
    here ends the stream with an error behind what was sent.
    """
    for vid in request.volume_ids:
        yield from wire.batches(_read_volume(call, volume_or_not_found(call, vid)))


def _read_volume(call: Call, volume: Volume) -> Iterator[Any]:
    offset = volume.handle.superblock_bytes
    if volume.is_remote:
        end, revision = volume.dat_bytes, volume.compaction_revision
        window = scan.Window(lambda at, length: volume.pread(at, length, revision), end)
        for header in scan.headers(window, volume.version, offset, end):
            call.check()
            if _is_current(volume, header.id, header.offset):
                raw = bytes(window.take(header.offset, header.record_len))
                yield _needle_message(volume, raw, header.offset)
        return
    try:
        fd = os.open(volume.dat_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise PyvolumeError(f"cannot read {volume.dat_path} at offset {offset}: {exc.strerror}") from exc
    try:
        while True:
            call.check()
            try:
                records, offset = engine.dat_scan(fd, volume.version, offset, 0, False, SCAN_RECORDS)
            except engine.NativeError as exc:
                raise PyvolumeError(f"cannot read needle header at offset {offset}: {exc}") from exc
            if not records:
                return
            for record in records:
                if _is_current(volume, record.id, record.offset):
                    yield _needle_message(volume, os.pread(fd, record.record_len, record.offset), record.offset)
    finally:
        os.close(fd)


def _is_current(volume: Volume, key: int, offset: int) -> bool:
    try:
        return volume.lookup(key).offset == offset
    except NeedleNotFound:
        return False


def _needle_message(volume: Volume, raw: bytes, offset: int) -> Any:
    """The message of one record. One whose checksum is wrong is sent all the same, as upstream does."""
    size = struct.unpack_from(">i", raw, 12)[0]
    try:
        needle = engine.parse_needle(raw, volume.version, size)
        checksum = needle.checksum
    except engine.NativeError as exc:
        if exc.code != NativeCode.ECRC:
            raise PyvolumeError(f"visit needle error: record at offset {offset}: {exc}") from exc
        needle = engine.parse_needle(raw, volume.version, size, check_crc=False)
        checksum = 0
    return pb.ReadAllNeedlesResponse(
        volume_id=volume.vid,
        needle_id=needle.id,
        cookie=needle.cookie,
        needle_blob=bytes(needle.data or b""),
        needle_blob_compressed=needle.is_compressed,
        last_modified=needle.last_modified_s,
        crc=engine.crc_legacy(checksum),
        name=needle.name,
        mime=needle.mime,
    )


HANDLERS: dict[str, Handler] = {
    "BatchDelete": batch_delete,
    "VolumeNeedleStatus": volume_needle_status,
    "ReadNeedleBlob": read_needle_blob,
    "ReadNeedleMeta": read_needle_meta,
    "WriteNeedleBlob": write_needle_blob,
    "ReadAllNeedles": read_all_needles,
}
