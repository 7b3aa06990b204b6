"""What reads of erasure coded needles ask of masters and peers, over gRPC; and the reader of a server.

Must not import the handlers or http_app.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import grpc

from pyvolume.errors import StorageError
from pyvolume.ops.ec import EcReader, PeerDown
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.address import http_address, with_grpc_port
from pyvolume.server.rpc import VOLUME_SERVICE, RpcFailure, failure_from, method_classes

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext
    from pyvolume.server.master_client import MasterClient
    from pyvolume.storage.store import Store

_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class GrpcEcPeers:
    """The EcPeers of one server. Calls to itself take the same way as to others."""

    def __init__(self, master: MasterClient) -> None:
        self._master = master

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

    def delete(self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float) -> None:
        """Has a peer note a delete. Raises RpcFailure."""
        request = pb.VolumeEcBlobDeleteRequest(volume_id=vid, collection=collection, file_key=key, version=version)
        self._master.channels.unary(address, VOLUME_SERVICE, "VolumeEcBlobDelete", request, timeout_s=timeout_s)


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
            reader = _readers[server.store] = EcReader(server.store.ec, GrpcEcPeers(server.master))
        return reader
