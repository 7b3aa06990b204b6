"""Volume servers that talk to each other in one process, and a peer that misbehaves as it is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from grpc_helpers import Answer, VolumeClient

from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.security_config import SecurityConfig
from pyvolume.server.context import ServerContext
from pyvolume.server.grpc.service import make_grpc_server
from pyvolume.server.master_client import MasterClient
from pyvolume.server.rpc import VOLUME_SERVICE, method_classes
from pyvolume.storage.ec.volume import EcShardsInfo
from pyvolume.storage.store import Store
from pyvolume.storage.volume import NeedleIn, Volume, VolumeShortInfo
from pyvolume.types import ReplicaPlacement

COOKIE = 0x1234ABCD
_PORTS = itertools.count(8081)
"""What servers say their HTTP ports are; nobody listens there."""


class Server:
    """A volume server without HTTP, heartbeat and master. `news` is what it would tell a master."""

    def __init__(self, directory: Path, *, disk_types: tuple[str, ...] = ("",), idx: bool = False, **more: Any) -> None:
        self.directories = [directory / f"d{number}" for number in range(len(disk_types))]
        self.idx_directory = directory / "idx" if idx else None
        for path in (*self.directories, *([self.idx_directory] if self.idx_directory else [])):
            path.mkdir(parents=True, exist_ok=True)
        port = next(_PORTS)
        self.config = ServerConfig(
            ip="127.0.0.1",
            port=port,
            server_id=f"127.0.0.1:{port}",
            masters=(),
            dirs=tuple(
                DirConfig(
                    str(path),
                    str(self.idx_directory or ""),
                    max_volumes=4,
                    disk_type=disk_type,
                    min_free=MinFreeSpace(None, 0),
                )
                for path, disk_type in zip(self.directories, disk_types, strict=True)
            ),
            **more,
        )
        self.store = Store(self.config)
        self.store.load()
        self.news: list[tuple[str, int]] = []
        self.store.subscribe(self._note)
        self.context = ServerContext(
            config=self.config, security=SecurityConfig(), store=self.store, master=MasterClient(self.config)
        )
        self.grpc = make_grpc_server(self.context, "127.0.0.1:0")
        self.grpc.start()
        self.client = VolumeClient(self.grpc.port)
        self.address = f"127.0.0.1:{port}.{self.grpc.port}"

    def _note(self, kind: str, info: VolumeShortInfo | EcShardsInfo) -> None:
        self.news.append((kind, info.id))

    def call(self, name: str, timeout_s: float = 20.0, **fields: Any) -> Answer:
        return self.client.call(name, fields, timeout_s=timeout_s)

    def push(self, *messages: dict[str, Any]) -> Any:
        """ReceiveFile with these messages."""
        answer = push(self.client, iter([pb.ReceiveFileRequest(**fields) for fields in messages]))
        assert answer.code is grpc.StatusCode.OK, answer
        return answer.messages[0]

    def make(self, vid: int, collection: str = "", disk_type: str = "") -> Volume:
        return self.store.allocate_volume(vid, collection, ReplicaPlacement(), disk_type=disk_type)

    def volume(self, vid: int) -> Volume:
        found = self.store.find_volume(vid)
        assert found is not None
        return found

    def files(self) -> set[str]:
        """Names of everything in the data and idx directories but what belongs to the directory itself."""
        places = (*self.directories, *([self.idx_directory] if self.idx_directory else []))
        return {path.name for place in places for path in place.iterdir()} - {"vol_dir.uuid"}

    def end(self) -> None:
        self.client.close()
        self.grpc.stop(0)
        self.context.master.close()
        self.store.close()


def push(client: VolumeClient, messages: Iterator[Any]) -> Answer:
    """ReceiveFile with an iterator of messages."""
    path, request_class, response_class = method_classes(VOLUME_SERVICE, "ReceiveFile")
    start = client.channel.stream_unary(
        path, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
    )
    try:
        message, call = start.with_call(messages, timeout=20)
    except grpc.RpcError as exc:
        return Answer(exc.code(), exc.details(), [], {})
    return Answer(call.code(), call.details() or "", [message], {})


def put(volume: Volume, key: int, data: bytes, *, cookie: int = COOKIE, **fields: Any) -> None:
    volume.write_needle(NeedleIn(key, cookie, data, **fields))


def content(volume: Volume, key: int) -> bytes:
    return bytes(volume.read_needle(key).data or b"")


class Peer:
    """A volume server with the methods given: name → function(request, context) giving messages or a message."""

    def __init__(self, **methods: Callable[[Any, grpc.ServicerContext], Any]) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=(("grpc.so_reuseport", 0),))
        handlers = {}
        for name, behaviour in methods.items():
            method = VOLUME_SERVICE.methods_by_name[name]
            _, request_class, _response_class = method_classes(VOLUME_SERVICE, name)
            make = grpc.unary_stream_rpc_method_handler
            if not method.server_streaming:
                make = grpc.unary_unary_rpc_method_handler
            handlers[name] = make(
                self._noting(name, behaviour),
                request_deserializer=request_class.FromString,
                response_serializer=lambda made: made if isinstance(made, bytes) else made.SerializeToString(),
            )
        generic = grpc.method_handlers_generic_handler(VOLUME_SERVICE.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:1.{self.port}"
        self._server.start()

    def _noting(self, name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def note(request: Any, context: grpc.ServicerContext) -> Any:
            self.seen.append((name, request))
            return behaviour(request, context)

        return note

    def stop(self) -> None:
        self._server.stop(0).wait()


def relay(server: Server, name: str) -> Callable[[Any, grpc.ServicerContext], Iterable[Any]]:
    """A behaviour for a Peer: what the true server answers."""

    def behaviour(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        fields = {field.name: value for field, value in request.ListFields()}
        answer = server.client.call(name, fields)
        yield from answer.messages
        if answer.code is not grpc.StatusCode.OK:
            context.abort(answer.code, answer.details)

    return behaviour
