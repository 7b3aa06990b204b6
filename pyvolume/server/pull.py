"""Calls to a peer that last: streams pulled over a connection of their own, with a bound on silence.

Must not import ops, storage or the handlers. A link is one fresh channel to one peer for the length of one incoming
call. Everything on it ends at once when that call ends, and a stream from which nothing comes for too long is given up:
the library would wait for ever for a peer that lives but says nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import grpc
from grpc.experimental import ChannelOptions

from pyvolume.server.rpc import REQUEST_ID_KEY, VOLUME_SERVICE, Channels, RpcFailure, failure_from, method_classes

if TYPE_CHECKING:
    from google.protobuf.message import Message

SILENCE_LIMIT_S = 120.0
"""How long a peer may send nothing on a stream. Senders of upstream that follow a volume beat every 2 s."""
WATCH_INTERVAL_S = 0.5
SINGLE_THREADED: str = ChannelOptions.SingleThreadedUnaryStream
LINK_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.lookahead_bytes", 16 << 20),
    (SINGLE_THREADED, 1),  # who waits for a message polls for it: no change of threads
)


class Waiter(Protocol):
    """The incoming call on whose behalf a peer is asked (server.grpc.calls.Call)."""

    @property
    def request_id(self) -> str: ...
    def on_end(self, wake: Callable[[], None]) -> None: ...
    def check(self) -> None: ...


class Watch:
    """Calls give_up once when a wait lasts longer than limit_s. Enter and leave it around each wait.

    One thread for its life, which stop() ends.
    """

    def __init__(self, limit_s: float, give_up: Callable[[], object]) -> None:
        self._limit_s = limit_s
        self._give_up = give_up
        self._since: float | None = None
        self._done = threading.Event()
        self.fired = False
        self._thread = threading.Thread(target=self._run, name="pull-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(min(WATCH_INTERVAL_S, self._limit_s / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s:
                self.fired = True
                self._give_up()
                return

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._since = None

    def stop(self) -> None:
        """Ends the thread. Idempotent."""
        self._done.set()


class PeerLink:
    """A channel of its own to one volume server. Use it in a with-block; closing cancels what runs on it.

    Raises RpcFailure(UNAVAILABLE) for an address that cannot be dialled.
    """

    def __init__(self, channels: Channels, address: str, call: Waiter) -> None:
        self._address = address
        self._call = call
        self._channel = channels.dial(address, LINK_OPTIONS)
        self._metadata = ((REQUEST_ID_KEY, call.request_id),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def ask(self, name: str, request: Message, timeout_s: float) -> Any:
        """One unary call; ends early when the incoming call does (CallEnded). Raises RpcFailure."""
        path, _, response_class = method_classes(VOLUME_SERVICE, name)
        start = self._channel.unary_unary(
            path, request_serializer=_serialize, response_deserializer=response_class.FromString
        )
        answer = start.future(request, timeout=timeout_s, metadata=self._metadata)
        self._call.on_end(answer.cancel)
        try:
            return answer.result()
        except grpc.FutureCancelledError:
            self._call.check()
            raise RpcFailure(grpc.StatusCode.CANCELLED, "context canceled") from None
        except grpc.RpcError as exc:
            self._call.check()
            raise failure_from(exc) from exc

    def pull(self, name: str, request: Message, silence_s: float = SILENCE_LIMIT_S) -> Iterator[bytes]:
        """The undecoded messages of a response stream. Raises RpcFailure, or CallEnded when nobody waits any more.

        A generator: close it (or exhaust it) to end the stream.
        """
        path, _, _ = method_classes(VOLUME_SERVICE, name)
        start = self._channel.unary_stream(path, request_serializer=_serialize, response_deserializer=None)
        stream = start(request, metadata=self._metadata)
        watch = Watch(silence_s, stream.cancel)
        self._call.on_end(stream.cancel)
        try:
            while True:
                try:
                    with watch:
                        message = next(stream)
                except StopIteration:
                    self._call.check()
                    return
                except grpc.RpcError as exc:
                    self._call.check()
                    if watch.fired:
                        text = f"{self._address} has sent nothing for {silence_s:g} s"
                        raise RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None
                    raise failure_from(exc) from exc
                yield message
        finally:
            watch.stop()
            stream.cancel()


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
