"""RPCs that move files and volumes (contract grpc.md 7): CopyFile, ReceiveFile, VolumeCopy, VolumeIncrementalCopy.

Must not import http_app or heartbeat. Names, room, staging and renames are storage.copy's; here are the messages.
Upstream: `weed/server/volume_grpc_copy.go`, `volume_grpc_copy_incremental.go`. Departures V3 (the old replica of a
copied volume goes last, a lost reply deletes nothing) and S5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from threading import Event
from typing import Any

import grpc

from pyvolume.errors import PyvolumeError, StorageError, VolumeExists
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.address import grpc_address
from pyvolume.server.grpc import wire
from pyvolume.server.grpc.calls import Call, Handler, check_file_part
from pyvolume.server.grpc.status import CallEnded, Refusal
from pyvolume.server.grpc.sync import volume_or_not_found
from pyvolume.server.pull import PeerLink, Watch
from pyvolume.server.rpc import RpcFailure, WrappedRpcFailure
from pyvolume.storage import copy, tail
from pyvolume.storage.compact import RateLimit

STATUS_TIMEOUT_S = 30.0
REPORT_INTERVAL_BYTES = 128 << 20
"""VolumeCopy sends a message each time the data file has got this much further."""
MAX_VIF_BYTES = 1 << 20
CLIENT_SILENCE_LIMIT_S = 600.0
"""How long a client may take nothing of what is sent to it, or push nothing: then its call is cut."""
CUT_TOLD_WITHIN_S = 0.25


# -- one file ---------------------------------------------------------------------------------------------------------


def sending(call: Call, batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """The batches of a long stream, for as long as the client takes them. Raises CallEnded once it has gone.

    Each batch is made while the one before is being sent. What was made before a failure goes out first.
    """
    watch = Watch(CLIENT_SILENCE_LIMIT_S, call.context.cancel)
    failure: StorageError | None = None
    try:
        try:
            for batch in batches:
                with watch:
                    yield batch
                call.check()
        except StorageError as exc:
            failure = exc
        with watch:
            yield []  # the last one has gone out
        call.check()
    finally:
        watch.stop()
    if failure is not None:
        raise failure


def copy_file(call: Call, request: Any) -> Iterator[Any]:
    """Sends a file of a volume. The first message carries its time; no message at all says that there is none."""
    if "\0" in request.collection:
        check_file_part("collection", request.collection)
    copy.check_names(request.ext, request.collection)
    may_be_missing = request.ignore_source_file_not_found or request.stop_offset == 0
    source: copy.OutgoingFile | None
    if request.is_ec_volume:
        source = copy.open_ec_file(call.server.store, request.volume_id, request.collection, request.ext)
        if source is None and not request.ignore_source_file_not_found:
            raise PyvolumeError(f"CopyFile not found ec volume id {request.volume_id}")
    else:
        volume = volume_or_not_found(call, request.volume_id)
        source = copy.open_volume_file(volume, request.ext, request.compaction_revision, may_be_missing=may_be_missing)
    if source is None:
        return
    with source:
        yield from sending(call, _file_messages(source, request.stop_offset))


def _file_messages(source: copy.OutgoingFile, stop_offset: int) -> Iterator[list[bytes]]:
    modified_ts_ns = source.modified_ts_ns
    for piece in source.pieces(stop_offset):
        yield [wire.file_piece(piece, modified_ts_ns)]
        modified_ts_ns = 0
    if modified_ts_ns:
        yield [wire.file_piece(b"", modified_ts_ns)]


def receive_file(call: Call, requests: Iterator[Any]) -> Any:
    """Takes a file that a client pushes. Failures are in `error`, the status is OK, the stream ends at once.

    The file gets its name when it is whole and flushed. A second info message begins another file; bytes_written is
    the sum.
    """
    target: copy.IncomingFile | None = None
    written = announced = 0
    ended = Event()
    call.on_end(ended.set)
    watch = Watch(CLIENT_SILENCE_LIMIT_S, call.context.cancel)
    try:
        while True:
            try:
                with watch:
                    message = next(requests, None)
            except grpc.RpcError:
                raise CallEnded("failed to receive stream: context canceled") from None
            if message is None:
                break
            kind = message.WhichOneof("data")
            if kind == "info":
                if target is not None:
                    _complete(target)
                target, announced = _begin_file(call, message.info), message.info.file_size
            elif kind != "file_content":
                return pb.ReceiveFileResponse(error="unknown message type")
            elif target is None:
                return pb.ReceiveFileResponse(error="file info must be sent first")
            else:
                try:
                    target.write(message.file_content)
                except StorageError as exc:
                    return pb.ReceiveFileResponse(error=f"failed to write file: {exc}")
                written += len(message.file_content)
        if target is not None:
            # The library ends the requests of a call that was cut as it ends those of a client that has sent all, and
            # tells which it was only a moment later.
            if target.bytes_written != announced:
                ended.wait(CUT_TOLD_WITHIN_S)
            if watch.fired or ended.is_set():
                raise CallEnded("failed to receive stream: context canceled")
            try:
                _complete(target)
            except StorageError as exc:
                return pb.ReceiveFileResponse(error=f"failed to write file: {exc}")
        return pb.ReceiveFileResponse(bytes_written=written)
    except StorageError as exc:
        return pb.ReceiveFileResponse(error=str(exc))
    finally:
        watch.stop()
        if target is not None:
            target.discard()


def _begin_file(call: Call, info: Any) -> copy.IncomingFile:
    path = copy.receive_path(
        call.server.store,
        info.volume_id,
        info.collection,
        info.ext,
        is_ec=info.is_ec_volume,
        disk_id=info.disk_id,
        disk_type=info.disk_type,
    )
    try:
        return copy.IncomingFile(path, copy.RECEIVING)
    except StorageError as exc:
        raise StorageError(f"failed to create file: {exc}") from exc


def _complete(target: copy.IncomingFile) -> None:
    """Flushes a file and gives it its name; a failure removes it."""
    try:
        target.finish()
        target.place()
    except BaseException:
        target.discard()
        raise


# -- what is new in a data file ---------------------------------------------------------------------------------------


def volume_incremental_copy(call: Call, request: Any) -> Iterator[Any]:
    """Raw bytes of the data file from the first record after since_ns on, to the end it had when the call came."""
    volume = volume_or_not_found(call, request.volume_id)
    with tail.snapshot(volume) as files:
        start = files.find_since(request.since_ns)
        if start is None:
            return
        yield from sending(call, ([wire.file_piece(piece)] for piece in files.raw(start)))


# -- a volume ---------------------------------------------------------------------------------------------------------


def peer_address(field: str, address: str) -> str:
    """The address, if it can be dialled at all (departure A4: upstream's process ends of a port that is no number)."""
    if address:
        try:
            grpc_address(address)
        except ValueError as exc:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {exc}") from None
    return address


def volume_copy(call: Call, request: Any) -> Iterator[Any]:
    """Copies a volume from another server, verifies it, puts it in the place of what is here, mounts it.

    A replica that is here serves until the copy is verified, and stays if anything fails before. When the client goes,
    the copy stops and cleans up; once the new files are in place nothing is undone.
    """
    store, vid, source = call.server.store, request.volume_id, request.source_data_node
    had_replica = store.has_volume(vid)
    with _link(call, peer_address("source_data_node", source)) as peer:
        status = _source_status(call, peer, vid)
        disk_type = request.disk_type or status.disk_type
        with (
            store.copy_room.admit(store.locations, vid, status.needed_bytes, disk_type) as location,
            copy.IncomingVolume(location, status) as incoming,
        ):
            incoming.begin(source)
            limit = RateLimit(request.io_byte_per_second or call.server.config.maintenance_bytes_per_s)
            transfer = _Transfer(call, peer, request.collection, incoming, limit)
            if not status.is_remote:
                yield from transfer.run(".dat", status.dat_bytes, may_be_missing=True)
            yield from transfer.run(".idx", status.idx_bytes, may_be_missing=False)
            yield from transfer.run(".vif", MAX_VIF_BYTES, may_be_missing=True)
            last_append_at_ns = incoming.verify(replaces=store.has_volume(vid))
            call.check()
            if not had_replica and store.has_volume(vid):
                raise VolumeExists(f"failed to mount volume {vid}: it was made here while it was being copied")
            incoming.seal()
            store.replace_volume(vid, location, incoming.name, incoming.place)
    yield pb.VolumeCopyResponse(last_append_at_ns=last_append_at_ns)


def _link(call: Call, source: str) -> PeerLink:
    try:
        return PeerLink(call.server.master.channels, source, call)
    except RpcFailure as exc:
        raise WrappedRpcFailure(exc, f"read volume file status failed, {exc}") from exc


def _source_status(call: Call, peer: PeerLink, vid: int) -> copy.SourceStatus:
    wanted = pb.ReadVolumeFileStatusRequest(volume_id=vid)
    try:
        answer = peer.ask("ReadVolumeFileStatus", wanted, call.timeout_s(STATUS_TIMEOUT_S))
    except RpcFailure as exc:
        raise WrappedRpcFailure(exc, f"read volume file status failed, {exc}") from exc
    return copy.SourceStatus(
        vid=vid,
        collection=answer.collection,
        version=answer.version,
        dat_bytes=answer.dat_file_size,
        idx_bytes=answer.idx_file_size,
        dat_modified_s=answer.dat_file_timestamp_seconds,
        compaction_revision=answer.compaction_revision,
        disk_type=answer.disk_type,
        is_remote=bool(answer.volume_info.files),
        bytes_offset=answer.volume_info.bytes_offset,
    )


class _Transfer:
    """Fetches the files of one volume, one after the other, within one rate limit."""

    def __init__(
        self, call: Call, peer: PeerLink, collection: str, incoming: copy.IncomingVolume, limit: RateLimit
    ) -> None:
        self._call = call
        self._peer = peer
        self._collection = collection
        self._incoming = incoming
        self._limit = limit

    def run(self, extension: str, size: int, *, may_be_missing: bool) -> Iterator[Any]:
        """Fetches up to `size` bytes of one file; yields progress of the data file. Raises PyvolumeError."""
        path = self._incoming.path(extension)
        try:
            yield from self._fetch(extension, size, may_be_missing)
        except RpcFailure as exc:
            raise PyvolumeError(f"failed to copy {path} file: receiving {path}: {exc}") from exc
        except StorageError as exc:
            raise type(exc)(f"failed to copy {path} file: {exc}") from exc

    def _fetch(self, extension: str, size: int, may_be_missing: bool) -> Iterator[Any]:
        status = self._incoming.status
        request = pb.CopyFileRequest(
            volume_id=status.vid,
            ext=extension,
            compaction_revision=status.compaction_revision,
            stop_offset=size,
            collection=self._collection,
            ignore_source_file_not_found=may_be_missing,
        )
        file = self._incoming.open(extension)
        modified_ts_ns, report_at = 0, REPORT_INTERVAL_BYTES
        with closing(self._peer.pull("CopyFile", request)) as messages:  # type: ignore[type-var]
            for message in messages:
                try:
                    fields = wire.read_fields(message)
                except ValueError as exc:
                    raise StorageError(f"receiving {file.path}: {exc}") from None
                modified_ts_ns = wire.number(fields, wire.MODIFIED_FIELD) or modified_ts_ns
                content = wire.content(fields, wire.CONTENT_FIELD)
                if len(content) > size - file.bytes_written:
                    raise StorageError(f"receiving {file.path}: the source sends more than the {size} bytes asked for")
                file.write(content)
                if extension == ".dat" and file.bytes_written > report_at:
                    yield pb.VolumeCopyResponse(processed_bytes=file.bytes_written)
                    report_at = file.bytes_written + REPORT_INTERVAL_BYTES
                self._pause(len(content))
        if modified_ts_ns == 0:
            self._incoming.drop(extension)  # the source has no such file
            return
        file.finish(modified_ts_ns)

    def _pause(self, moved_bytes: int) -> None:
        self._call.check()
        for _ in self._limit.waits(moved_bytes):
            self._call.check()


HANDLERS: dict[str, Handler] = {
    "CopyFile": copy_file,
    "ReceiveFile": receive_file,
    "VolumeIncrementalCopy": volume_incremental_copy,
    "VolumeCopy": volume_copy,
}
