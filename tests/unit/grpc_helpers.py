"""Both ends of gRPC for tests: a scripted master, and a client of the volume server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc

from pyvolume.ops.context import Events
from pyvolume.server.rpc import MASTER_SERVICE, VOLUME_SERVICE, method_classes

WAIT_S = 20.0


def wait_for(condition: Callable[[], Any], what: str = "the condition", timeout_s: float = WAIT_S) -> Any:
    """The first true value of the condition. Fails the test when it stays false."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {timeout_s} s for {what}")


class FakeMaster:
    """A gRPC server with the methods given: name → function(request or iterator, context). Keeps all requests."""

    def __init__(self, **methods: Callable[[Any, grpc.ServicerContext], Any]) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, str]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=(("grpc.so_reuseport", 0),))
        handlers = {}
        makers = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        for name, behaviour in methods.items():
            method = MASTER_SERVICE.methods_by_name[name]
            _, request_class, response_class = method_classes(MASTER_SERVICE, name)
            handlers[name] = makers[method.client_streaming, method.server_streaming](
                behaviour if method.client_streaming else self._noting(name, behaviour),
                request_deserializer=request_class.FromString,
                response_serializer=response_class.SerializeToString,
            )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(MASTER_SERVICE.full_name, handlers),)
        )
        self.grpc_port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.grpc_port}.{self.grpc_port}"
        self.http_address = f"127.0.0.1:{self.grpc_port}"
        self._server.start()

    def _noting(self, name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def note(request: Any, context: grpc.ServicerContext) -> Any:
            self.seen.append((name, request))
            self.metadata.append(dict(context.invocation_metadata()))
            return behaviour(request, context)

        return note

    def requests(self, name: str) -> list[Any]:
        return [request for seen, request in list(self.seen) if seen == name]

    def stop(self) -> None:
        self._server.stop(0).wait()


class BeatLog:
    """A SendHeartbeat behaviour: logs the messages of each stream, answers what `replies` says for the n-th of them."""

    def __init__(self, reply: Callable[[int, int, Any], Iterator[Any]]) -> None:
        self.streams: list[list[Any]] = []
        self.half_closed: list[bool] = []
        self._reply = reply
        self._lock = threading.Lock()

    def __call__(self, beats: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with self._lock:
            number = len(self.streams)
            log: list[Any] = []
            self.streams.append(log)
            self.half_closed.append(False)
        for beat in beats:
            log.append(beat)
            yield from self._reply(number, len(log) - 1, beat)
        self.half_closed[number] = True

    def all(self) -> list[Any]:
        return [beat for stream in list(self.streams) for beat in list(stream)]


@dataclass
class Answer:
    """What a call gave: messages, and the status if it is not OK."""

    code: grpc.StatusCode
    details: str
    messages: list[Any]
    trailers: dict[str, str]

    @property
    def first(self) -> Any:
        assert self.code is grpc.StatusCode.OK, (self.code, self.details)
        return self.messages[0]


class VolumeClient:
    """Calls methods of the volume server at a port by name."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.channel = grpc.insecure_channel(f"{host}:{port}", options=(("grpc.use_local_subchannel_pool", 1),))

    def call(
        self,
        name: str,
        fields: dict[str, Any] | None = None,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        timeout_s: float = WAIT_S,
    ) -> Answer:
        """fields: of the request message."""
        method = VOLUME_SERVICE.methods_by_name[name]
        path, request_class, response_class = method_classes(VOLUME_SERVICE, name)
        request = request_class(**(fields or {}))
        coders = {
            "request_serializer": request_class.SerializeToString,
            "response_deserializer": response_class.FromString,
        }
        messages: list[Any] = []
        try:
            if method.server_streaming:
                call = self.channel.unary_stream(path, **coders)(request, timeout=timeout_s, metadata=metadata)
                for message in call:
                    messages.append(message)
            elif method.client_streaming:
                requests = iter([request])
                message, call = self.channel.stream_unary(path, **coders).with_call(
                    requests, timeout=timeout_s, metadata=metadata
                )
                messages.append(message)
            else:
                message, call = self.channel.unary_unary(path, **coders).with_call(
                    request, timeout=timeout_s, metadata=metadata
                )
                messages.append(message)
        except grpc.RpcError as exc:
            call = exc
        trailers = {key: value for key, value in call.trailing_metadata() or () if isinstance(value, str)}
        return Answer(call.code(), call.details() or "", messages, trailers)

    def open_stream(self, name: str, fields: dict[str, Any] | None = None) -> Any:
        """A running response stream."""
        path, request_class, response_class = method_classes(VOLUME_SERVICE, name)
        start = self.channel.unary_stream(
            path, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
        )
        return start(request_class(**(fields or {})))

    def close(self) -> None:
        self.channel.close()


def bare_server(**config: Any) -> Any:
    """A stand-in for ServerContext where only configuration, white list and maintenance mode matter."""
    values = {"guard_peers": False, "server_id": "me:1", "ip": "127.0.0.1", "port": 1, **config}
    return SimpleNamespace(
        config=SimpleNamespace(**values),
        security=SimpleNamespace(white_list=()),
        store=SimpleNamespace(state=SimpleNamespace(maintenance=False)),
        events=Events(),
        master=None,
        heartbeat=None,
    )
