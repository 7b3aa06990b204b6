"""Outgoing gRPC: channels to masters and peers, calls by descriptor, failures as one exception class.

Must not import ops or storage. Options equal upstream's (`weed/pb/grpc_client_server.go`): 1 GiB messages, a ping after
60 s of silence while a call runs, no proxy from the environment, no waiting for a peer that refuses the connection.

Channels are cached per address and shared by all threads; a channel that answered UNAVAILABLE, ABORTED or INTERNAL is
dropped so that the next call dials anew. Streams that live long take a channel of their own (`dial`).
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import message_factory

from pyvolume.errors import PyvolumeError
from pyvolume.pb import master_pb2, volume_server_pb2
from pyvolume.server.address import grpc_address

if TYPE_CHECKING:
    from google.protobuf.message import Message

MAX_MESSAGE_BYTES = 1 << 30
KEEPALIVE_TIME_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000
MAX_METADATA_BYTES = 8 << 20
MAX_CACHED_CHANNELS = 256
DIAL_TIMEOUT_S = 10.0
REQUEST_ID_KEY = "x-amz-request-id"

MASTER_SERVICE = master_pb2.DESCRIPTOR.services_by_name["Seaweed"]
VOLUME_SERVICE = volume_server_pb2.DESCRIPTOR.services_by_name["VolumeServer"]

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

_DROP_CHANNEL_ON = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL)
_GO_CODE_NAMES = {grpc.StatusCode.OK: "OK", grpc.StatusCode.CANCELLED: "Canceled"}
_REFUSED = re.compile(r"ipv[46]:(?P<peer>\S+): .*[Cc]onnection refused")


def go_code_name(code: grpc.StatusCode) -> str:
    """A status code as Go prints it: `InvalidArgument`."""
    return _GO_CODE_NAMES.get(code) or "".join(part.capitalize() for part in code.name.split("_"))


class RpcFailure(PyvolumeError):
    """A call to a master or peer failed. `str()` is what upstream's texts embed: `rpc error: code = X desc = Y`.

    Raised out of a handler as it is, the remote's code and details reach the client unchanged.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"rpc error: code = {go_code_name(code)} desc = {details}")
        self.code = code
        self.details = details


class WrappedRpcFailure(RpcFailure):
    """A remote's failure under an outer text: the code stays, `str()` and details are the whole text."""

    def __init__(self, cause: RpcFailure, text: str) -> None:
        super().__init__(cause.code, text)
        self.args = (text,)


def failure_from(error: grpc.RpcError) -> RpcFailure:
    """The RpcFailure for an exception of grpcio. A refused connection gets the wording of upstream's transport."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else str(error)) or ""
    if code is grpc.StatusCode.UNAVAILABLE and (match := _REFUSED.search(details)):
        details = dial_error(f"dial tcp {match['peer']}: connect: connection refused")
    return RpcFailure(code, details)


def dial_error(reason: str) -> str:
    """The text of upstream's transport for a connection that did not come about."""
    return f'connection error: desc = "transport: Error while dialing: {reason}"'


def dial_target(address: str) -> str:
    """The target to dial for a server address. Raises RpcFailure(UNAVAILABLE) for an address that cannot be dialled."""
    if not address:
        raise RpcFailure(grpc.StatusCode.UNAVAILABLE, dial_error("dial tcp: missing address"))
    try:
        return grpc_address(address)
    except ValueError as exc:
        raise RpcFailure(grpc.StatusCode.UNAVAILABLE, dial_error(f"dial tcp: {exc}")) from None


@cache
def method_classes(service: Any, name: str) -> tuple[str, type[Message], type[Message]]:
    """(path, request class, response class) of a method, from its descriptor."""
    method = service.methods_by_name[name]
    return (
        f"/{service.full_name}/{name}",
        message_factory.GetMessageClass(method.input_type),
        message_factory.GetMessageClass(method.output_type),
    )


class Channels:
    """Channels by server address. All methods may be called from any thread.

    credentials() is asked once per new channel; None means plaintext. server_name(target, timeout_s) is asked once per
    new channel with credentials for the name that the server's certificate is checked against; it may block up to
    timeout_s and raise RpcFailure. At most MAX_CACHED_CHANNELS stay open; the one unused for longest is closed first.
    """

    def __init__(
        self,
        credentials: Callable[[], grpc.ChannelCredentials | None] | None = None,
        server_name: Callable[[str, float], str] | None = None,
    ) -> None:
        self._credentials = credentials
        self._server_name = server_name
        self._lock = threading.Lock()
        self._open: OrderedDict[str, grpc.Channel] = OrderedDict()
        self._closed = False

    def dial(
        self, address: str, extra_options: Iterable[tuple[str, int]] = (), *, timeout_s: float = DIAL_TIMEOUT_S
    ) -> grpc.Channel:
        """A new channel that the caller closes. Raises RpcFailure for an address without a usable port.

        With TLS it blocks up to timeout_s and raises RpcFailure for a server that cannot be reached or verified; in
        plain text it does neither.
        """
        target = dial_target(address)
        options: list[tuple[str, int | str]] = [*CLIENT_OPTIONS, *extra_options]
        credentials = self._credentials() if self._credentials is not None else None
        if credentials is None:
            return grpc.insecure_channel(target, options=options)
        if self._server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._server_name(target, timeout_s)))
        return grpc.secure_channel(target, credentials, options=options)

    def get(self, address: str, timeout_s: float = DIAL_TIMEOUT_S) -> grpc.Channel:
        """The shared channel for this address, made if needed, as by `dial`."""
        with self._lock:
            if self._closed:
                raise RpcFailure(grpc.StatusCode.CANCELLED, "the server is stopping")
            channel = self._open.get(address)
            if channel is not None:
                self._open.move_to_end(address)
                return channel
        made = self.dial(address, timeout_s=timeout_s)
        with self._lock:
            channel = self._open.setdefault(address, made)
            surplus = [made] if channel is not made else []
            limit = 0 if self._closed else MAX_CACHED_CHANNELS  # close() may have come in between
            while len(self._open) > limit:
                surplus.append(self._open.popitem(last=False)[1])
        for unused in surplus:
            unused.close()
        return channel

    def drop(self, address: str, channel: grpc.Channel) -> None:
        """Forgets this channel if it is still the shared one: the next call dials anew, calls on it go on."""
        with self._lock:
            if self._open.get(address) is channel:
                del self._open[address]

    def close(self) -> None:
        """Closes all channels; running calls end with CANCELLED. Idempotent."""
        with self._lock:
            self._closed = True
            channels = list(self._open.values())
            self._open.clear()
        for channel in channels:
            channel.close()

    def unary(
        self,
        address: str,
        service: Any,
        name: str,
        request: Message,
        *,
        timeout_s: float | None,
        request_id: str = "",
        marks: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """One unary call; `marks` is further metadata. Blocks up to timeout_s (None: no limit). Raises RpcFailure."""
        path, _, response_class = method_classes(service, name)
        started_s = time.monotonic()
        channel = self.get(address, DIAL_TIMEOUT_S if timeout_s is None else min(DIAL_TIMEOUT_S, timeout_s))
        if timeout_s is not None:
            timeout_s = max(0.001, timeout_s - (time.monotonic() - started_s))
        call = channel.unary_unary(path, request_serializer=_serialize, response_deserializer=response_class.FromString)
        metadata = ((REQUEST_ID_KEY, request_id), *marks) if request_id else marks
        try:
            return call(request, timeout=timeout_s, metadata=metadata or None)
        except grpc.RpcError as exc:
            failure = failure_from(exc)
        except ValueError as exc:  # grpcio's way to say that the channel was closed meanwhile
            failure = RpcFailure(grpc.StatusCode.CANCELLED, str(exc))
        if failure.code in _DROP_CHANNEL_ON:
            self.drop(address, channel)
        raise failure


def open_stream(channel: grpc.Channel, service: Any, name: str, requests: Iterator[Message]) -> Any:
    """Starts a bidirectional stream; the result iterates over the responses and can be cancelled."""
    path, _, response_class = method_classes(service, name)
    start = channel.stream_stream(path, request_serializer=_serialize, response_deserializer=response_class.FromString)
    return start(requests)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
