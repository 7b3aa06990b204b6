"""What reads of erasure coded needles ask of masters and peers, over gRPC; and the reader of a server.

Must not import the handlers or http_app.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import grpc

from pyvolume.errors import NeedleNotFound, StorageError
from pyvolume.ops.ec import EcReader, Mark, PeerDown
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.address import http_address, join_host_port, same_server, with_grpc_port
from pyvolume.server.rpc import VOLUME_SERVICE, RpcFailure, failure_from, method_classes
from pyvolume.storage.copy import ANY_REVISION
from pyvolume.storage.ec import index

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext
    from pyvolume.server.master_client import MasterClient
    from pyvolume.storage.store import Store

PASSED_ON = "x-pyvolume-passed-on"
"""Metadata of a delete that a server passes on; its value is a Mark."""
MAX_JOURNAL_BYTES = 256 << 20
_STOP_OFFSET = (1 << 63) - 1
_LOOK_S = 0.5
_RETRY_S = 10.0
_NOT_FOUND = 404
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class GrpcEcPeers:
    """The EcPeers of one server. Calls to itself take the same way as to others."""

    def __init__(self, master: MasterClient, own: str) -> None:
        self._master = master
        self._own = own

    @property
    def master(self) -> str:
        return http_address(self._master.current_master)

    def locate(self, vid: int) -> Mapping[int, Sequence[str]]:
        """The servers of each shard, by the heartbeat's master; its many empty entries included. Raises RpcFailure."""
        return {
            shard: [with_grpc_port(where.url, where.grpc_port) for where in locations]
            for shard, locations in self._master.lookup_ec_volume(vid).items()
        }

    def read_shard(
        self,
        address: str,
        vid: int,
        shard: int,
        offset: int,
        length: int,
        key: int,
        encode_ts_ns: int,
        timeout_s: float,
    ) -> tuple[bytes, bool]:
        """One stretch of a shard of a peer. Raises PeerDown, StorageError."""
        path, _, response_class = method_classes(VOLUME_SERVICE, "VolumeEcShardRead")
        request = pb.VolumeEcShardReadRequest(
            volume_id=vid, shard_id=shard, offset=offset, size=length, file_key=key, encode_ts_ns=encode_ts_ns
        )
        channels = self._master.channels
        try:
            channel = channels.get(address)
        except RpcFailure as exc:
            raise PeerDown(str(exc)) from exc
        start = channel.unary_stream(
            path, request_serializer=_serialize, response_deserializer=response_class.FromString
        )
        pieces: list[bytes] = []
        deleted = False
        left = length
        try:
            stream = start(request, timeout=timeout_s)
            for message in stream:
                if encode_ts_ns and message.encode_ts_ns != encode_ts_ns:
                    stream.cancel()
                    raise StorageError(f"ec shard {vid}.{shard} on {address} is of another encode run")
                deleted = deleted or message.is_deleted
                left -= len(message.data)
                if left < 0:
                    stream.cancel()
                    raise StorageError(f"ec shard {vid}.{shard} on {address}: more bytes than asked for")
                pieces.append(message.data)
        except grpc.RpcError as exc:
            failure = failure_from(exc)
        except ValueError as exc:  # grpcio's way to say that the channel was closed meanwhile
            failure = RpcFailure(grpc.StatusCode.UNAVAILABLE, str(exc))
        else:
            return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), deleted
        if failure.code in _SILENT:
            channels.drop(address, channel)
            raise PeerDown(str(failure))
        raise StorageError(str(failure))

    def delete(
        self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float, *, mark: Mark
    ) -> None:
        """Has a peer note a delete. Raises PeerDown, RpcFailure."""
        request = pb.VolumeEcBlobDeleteRequest(volume_id=vid, collection=collection, file_key=key, version=version)
        marks = ((PASSED_ON, mark),) if mark else ()
        channels = self._master.channels
        try:
            channels.unary(address, VOLUME_SERVICE, "VolumeEcBlobDelete", request, timeout_s=timeout_s, marks=marks)
        except RpcFailure as exc:
            if exc.code in _SILENT:
                raise PeerDown(str(exc)) from exc
            raise

    def read_journal(self, address: str, vid: int, collection: str, timeout_s: float) -> list[int]:
        """The deletes that a peer knows of. Raises PeerDown, RpcFailure, StorageError."""
        path, _, response_class = method_classes(VOLUME_SERVICE, "CopyFile")
        request = pb.CopyFileRequest(
            volume_id=vid,
            ext=".ecj",
            compaction_revision=ANY_REVISION,
            stop_offset=_STOP_OFFSET,
            collection=collection,
            is_ec_volume=True,
            ignore_source_file_not_found=True,
        )
        try:
            channel = self._master.channels.get(address)
        except RpcFailure as exc:
            raise PeerDown(str(exc)) from exc
        start = channel.unary_stream(
            path, request_serializer=_serialize, response_deserializer=response_class.FromString
        )
        data = bytearray()
        try:
            stream = start(request, timeout=timeout_s)
            for message in stream:
                data += message.file_content
                if len(data) > MAX_JOURNAL_BYTES:
                    stream.cancel()
                    raise StorageError(f"the journal of ec volume {vid} on {address} is too long")
        except grpc.RpcError as exc:
            failure = failure_from(exc)
            raise (PeerDown(str(failure)) if failure.code in _SILENT else failure) from exc
        except ValueError as exc:  # as above
            raise PeerDown(str(exc)) from exc
        return index.ids_of(bytes(data))

    def is_self(self, address: str) -> bool:
        return same_server(address, self._own)

    def delete_plain(self, vid: int, key: int, timeout_s: float) -> bool:
        """Deletes a needle on each server that has a plain volume, whatever its cookie; false if none has. Raises
        PyvolumeError."""
        self._master.invalidate(vid)
        request = pb.BatchDeleteRequest(file_ids=[f"{vid},{key:x}00000000"], skip_cookie_check=True)
        holders = self._master.lookup_volume(vid)
        for where in holders:
            address = with_grpc_port(where.url, where.grpc_port)
            answer = self._master.channels.unary(address, VOLUME_SERVICE, "BatchDelete", request, timeout_s=timeout_s)
            for result in answer.results:
                if result.error and result.status != _NOT_FOUND:
                    raise StorageError(f"{address}: {result.error}")
        return bool(holders)


def _serialize(message: Any) -> bytes:
    out: bytes = message.SerializeToString()
    return out


_readers: WeakKeyDictionary[Store, EcReader] = WeakKeyDictionary()
_readers_lock = threading.Lock()


def reader_of(server: ServerContext) -> EcReader:
    """The one reader of a server, for HTTP and gRPC alike: what it learns of peers counts for both."""
    with _readers_lock:
        reader = _readers.get(server.store)
        if reader is None:
            peers = GrpcEcPeers(server.master, join_host_port(server.config.ip, server.config.port))
            store = server.store

            def delete_here(vid: int, key: int, at_ns: int) -> bool:
                volume = store.find_volume(vid)
                if volume is None or volume.no_write_or_delete:
                    return False
                with contextlib.suppress(NeedleNotFound):
                    if volume.read_needle(key).append_at_ns <= at_ns:
                        volume.delete_needle(key, 0)
                return True

            reader = _readers[server.store] = EcReader(store.ec, peers, delete_here)
        return reader


def keep_journals(server: ServerContext, stop: threading.Event) -> None:
    """Runs until stop. Whenever a stream to a master was opened, the deletes are fetched that others noted while that
    master did not know of this server's shards. Volumes that no master could tell of are tried again, they alone."""
    reader, master, seen = reader_of(server), server.master, 0
    pending: dict[int, set[int]] = {}
    pause_s = _LOOK_S
    while not stop.wait(pause_s):
        contacts = master.contacts
        if contacts != seen:
            seen, pending = contacts, {}
            for volume in server.store.ec.volumes():
                pending.setdefault(volume.vid, set()).update(volume.shards)
        pending = {vid: shards for vid, shards in pending.items() if not reader.catch_up(vid, shards)}
        pause_s = _RETRY_S if pending else _LOOK_S
