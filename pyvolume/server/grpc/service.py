"""The gRPC server: options, registration of all 49 RPCs, budgets of threads, stop.

Must not import http_app or heartbeat. grpcio gives a stream one thread for its whole life and lets calls beyond the
pool wait without a word, so every kind of long call has a limit of its own and the pool is as large as all limits
together: a short call always finds a thread, and a call that calls back into this server cannot starve itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from pyvolume.pb import master_pb2, volume_server_pb2
from pyvolume.server.address import join_host_port
from pyvolume.server.grpc import (
    bulk,
    copy,
    ec,
    needles,
    query,
    remote,
    scrub,
    server_info,
    sync,
    tail,
    tier,
    vacuum,
    volumes,
    wire,
)
from pyvolume.server.grpc import reflection as reflection_module
from pyvolume.server.grpc.calls import Call, Gates, Handler, request_id_of
from pyvolume.server.grpc.methods import LIMITS, RPCS, Kind, Rpc
from pyvolume.server.grpc.status import Refusal, status_of
from pyvolume.server.rpc import (
    KEEPALIVE_TIME_MS,
    KEEPALIVE_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    REQUEST_ID_KEY,
    VOLUME_SERVICE,
    method_classes,
)

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext

log = logging.getLogger(__name__)

HANDLERS: dict[str, Handler] = {
    **volumes.HANDLERS,
    **server_info.HANDLERS,
    **needles.HANDLERS,
    **sync.HANDLERS,
    **vacuum.HANDLERS,
    **ec.HANDLERS,
    **copy.HANDLERS,
    **tail.HANDLERS,
    **query.HANDLERS,
    **scrub.HANDLERS,
    **tier.HANDLERS,
    **remote.HANDLERS,
}
"""What is served; an RPC of the service that is not here answers UNIMPLEMENTED."""

REFLECTION_STREAMS = 8
HANDOVER_S = 0.1
"""How long an accepted call may take from the library to its handler's thread, as far as stopping is concerned."""
MAX_STREAMS_PER_CONNECTION = 1000
MAX_CALLS_AT_ONCE = 2048
"""Calls running and waiting, over all connections; the library refuses more with RESOURCE_EXHAUSTED."""
WINDOW_BYTES = 16 << 20

HANDSHAKE_LIMIT_MS = 20_000
"""Of a new connection, TLS and HTTP/2 together; the library's own limit is two minutes."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_LIMIT_MS),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
)


class GrpcBindError(OSError):
    """The gRPC port cannot be bound; str() is upstream's text."""


class _Budgets:
    """Counts the long calls of each kind and refuses those beyond the limit."""

    def __init__(self, limits: dict[Kind, int]) -> None:
        self._slots = {kind: threading.BoundedSemaphore(limit) for kind, limit in limits.items()}
        del self._slots[Kind.UNARY]
        self._limits = limits
        self._lock = threading.Lock()
        self.refused: dict[Kind, int] = dict.fromkeys(self._slots, 0)

    def take(self, kind: Kind) -> bool:
        """True when a slot was taken, which give() returns; False for short calls. Raises the refusal."""
        slots = self._slots.get(kind)
        if slots is None:
            return False
        if slots.acquire(blocking=False):
            return True
        with self._lock:
            self.refused[kind] += 1
        limit = self._limits[kind]
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{limit} {kind.value} calls are running, try again later")

    def give(self, kind: Kind) -> None:
        self._slots[kind].release()


class _Running:
    """Counts calls from their first step to the end of their stream."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def enter(self, context: grpc.ServicerContext) -> None:
        with self._changed:
            self._count += 1
        if not context.add_callback(self._leave):
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    @property
    def count(self) -> int:
        return self._count

    def wait_until_none(self, timeout_s: float) -> bool:
        """True once no call runs; False when timeout_s is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)


_HANDLER_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""By (client streams, server streams)."""


class _Dispatcher:
    """Builds what grpcio calls for each method: gates, budget, handler, error mapping."""

    def __init__(self, server: ServerContext, handlers: dict[str, Handler], limits: dict[Kind, int]) -> None:
        self._server = server
        self._gates = Gates(server)
        self._handlers = handlers
        self.budgets = _Budgets(limits)
        self.running = _Running()

    def method_handler(self, method: Any) -> grpc.RpcMethodHandler:
        """The grpcio handler for a method descriptor."""
        rpc = RPCS[method.name]
        handler = self._handlers.get(method.name)
        _, request_class, _ = method_classes(VOLUME_SERVICE, method.name)
        if method.server_streaming:
            behaviour = self._streaming(rpc, handler)
        else:
            behaviour = self._single(rpc, handler, is_unary=not method.client_streaming)
        make = _HANDLER_MAKERS[method.client_streaming, method.server_streaming]
        return make(
            behaviour,
            request_deserializer=request_class.FromString,
            response_serializer=wire.serialize,
        )

    def _single(self, rpc: Rpc, handler: Handler | None, *, is_unary: bool) -> Any:
        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            self.running.enter(context)
            request_id = request_id_of(context)
            if is_unary:
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
            held, started, response = False, 0.0, None
            try:
                self._gates.pass_gates(rpc, context)
                held = self.budgets.take(rpc.kind)
                started = time.monotonic()
                response = _implemented(rpc, handler)(Call(self._server, rpc, request_id, context), request)
                return response
            except Exception as exc:
                failure: Exception = exc
            finally:
                if held:
                    self.budgets.give(rpc.kind)
                if started:
                    seconds = time.monotonic() - started
                    self._server.events.rpc_ended(rpc.name, request, response, response is not None, seconds)
            _abort(rpc, request_id, context, failure)

        return serve

    def _streaming(self, rpc: Rpc, handler: Handler | None) -> Any:
        def serve(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self.running.enter(context)
            request_id = request_id_of(context)
            held, started, ok = False, 0.0, False
            try:
                self._gates.pass_gates(rpc, context)
                held = self.budgets.take(rpc.kind)
                started = time.monotonic()
                made = _implemented(rpc, handler)(Call(self._server, rpc, request_id, context), request)
                yield from bulk.spread(context, made)
                ok = True
                return
            except Exception as exc:
                failure: Exception = exc
            finally:
                if held:
                    self.budgets.give(rpc.kind)
                if started:
                    self._server.events.rpc_ended(rpc.name, request, None, ok, time.monotonic() - started)
            _abort(rpc, request_id, context, failure)

        return serve


def _implemented(rpc: Rpc, handler: Handler | None) -> Handler:
    if handler is None:
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"method {rpc.name} not implemented")
    return handler


def _abort(rpc: Rpc, request_id: str, context: grpc.ServicerContext, failure: Exception) -> NoReturn:
    """Ends the call with the status of the failure. grpcio takes the exception that abort() raises as its sign."""
    status = status_of(failure)
    if status.is_bug:
        log.error("%s from %s failed, request id %s", rpc.name, context.peer(), request_id, exc_info=failure)
    else:
        log.debug("%s from %s: %s: %s", rpc.name, context.peer(), status.code.name, status.text)
    context.abort(status.code, status.text)
    raise AssertionError("abort() returned")


class _Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio is untyped
    """Answers paths that nobody serves, in upstream's words."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        service, slash, method = details.method.removeprefix("/").rpartition("/")
        if not slash:
            text = f"malformed method name: {details.method!r}".replace("'", '"')
        elif service in self._services:
            text = f"unknown method {method} for service {service}"
        else:
            text = f"unknown service {service}"

        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


class GrpcServer:
    """A bound server. start() serves, stop() drains; both from any thread, each once."""

    def __init__(
        self, server: grpc.Server, port: int, pool: futures.ThreadPoolExecutor, budgets: _Budgets, running: _Running
    ) -> None:
        self._server = server
        self._pool = pool
        self._running = running
        self.port = port
        self.budgets = budgets

    @property
    def running(self) -> int:
        """Calls that have reached their handler and not ended."""
        return self._running.count

    def start(self) -> None:
        """Begins to accept calls. Does not block."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Accepts no more calls, waits up to grace_s for running ones, then cancels them. Blocks until all ended.

        A handler that ignores its cancellation is not waited for beyond another second. A connection that never sent
        anything would make the library wait for all of grace_s, so once no call runs the rest is cut.
        """
        ended = self._server.stop(grace_s)
        deadline = time.monotonic() + grace_s
        # A call that was accepted just before may not have reached its handler: it gets a moment to do so.
        while not ended.wait(HANDOVER_S) and (left_s := deadline - time.monotonic()) > 0:
            if self._running.wait_until_none(left_s) and not ended.wait(HANDOVER_S):
                if not self._running.wait_until_none(0):
                    continue
                self._server.stop(0)
                break
        ended.wait(1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)


def make_grpc_server(
    server: ServerContext,
    bind: str | None = None,
    *,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    handlers: dict[str, Handler] | None = None,
    limits: dict[Kind, int] | None = None,
) -> GrpcServer:
    """Makes the server and binds its port (`host:port`; by default the configuration's bind_ip and grpc_port).

    An empty host is all addresses, port 0 lets the system choose (`GrpcServer.port`). credentials None is plaintext.
    interceptors see every call before anything else does.
    Raises GrpcBindError. handlers and limits are for tests.
    """
    limits = LIMITS if limits is None else {**LIMITS, **limits}
    bind = join_host_port(server.config.bind_ip, server.config.grpc_port) if bind is None else bind
    pool = futures.ThreadPoolExecutor(sum(limits.values()) + REFLECTION_STREAMS, thread_name_prefix="grpc")
    rpc_server = grpc.server(
        pool, interceptors=interceptors, options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS_AT_ONCE
    )
    dispatcher = _Dispatcher(server, HANDLERS if handlers is None else handlers, limits)
    service_name = VOLUME_SERVICE.full_name
    methods = {method.name: dispatcher.method_handler(method) for method in VOLUME_SERVICE.methods}
    rpc_server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, methods),))
    rpc_server.add_generic_rpc_handlers(_reflection_handlers(service_name))
    rpc_server.add_generic_rpc_handlers((_Unknown((service_name, *reflection_module.SERVICE_NAMES)),))
    address = f"[::]{bind}" if bind.startswith(":") else bind
    try:
        if credentials is None:
            port = rpc_server.add_insecure_port(address)
        else:
            port = rpc_server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        pool.shutdown(wait=False)
        number = bind.rpartition(":")[2]
        raise GrpcBindError(f"failed to listen on grpc port {number}: listen tcp {bind}: bind: address already in use")
    return GrpcServer(rpc_server, port, pool, dispatcher.budgets, dispatcher.running)


def _reflection_handlers(service_name: str) -> tuple[grpc.GenericRpcHandler, ...]:
    """Reflection of the service, the messages of masters included; at most REFLECTION_STREAMS at once."""
    assert master_pb2.DESCRIPTOR.pool is volume_server_pb2.DESCRIPTOR.pool
    reflection = reflection_module.Reflection([service_name])
    slots = threading.BoundedSemaphore(REFLECTION_STREAMS)

    def serve(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        if not slots.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{REFLECTION_STREAMS} reflection calls are running")
        try:
            yield from reflection.serve(requests)
        finally:
            slots.release()

    handler = grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=reflection_module.Request.FromString,
        response_serializer=reflection_module.Response.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(name, {reflection_module.METHOD: handler})
        for name in reflection_module.SERVICE_NAMES
    )
