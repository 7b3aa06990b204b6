"""HTTP to other volume servers: pooled keep-alive connections, bounded and with time-outs.

Used by replication, proxying and chunk manifests. One request at a time per connection; a connection goes back to the
pool once its response was read to the end. No lock is held while anything blocks. Must not import storage or server.

Texts of failures follow Go's transport (`dial tcp 10.0.0.1:8080: connect: connection refused`), since clients and
metrics look for these words.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from pyvolume.errors import PyvolumeError
from pyvolume.ops import endpoint_guard

DIAL_TIMEOUT_S = 10.0
HEADER_TIMEOUT_S = 30.0  # from the last byte of the request to the end of the response's head
STALL_TIMEOUT_S = 60.0  # without a byte moving, while a body is sent or read
IDLE_S = 90.0
MAX_IDLE_PER_HOST = 64
MAX_IDLE = 256
_SEND_SLICE = 1 << 20
_JOIN_BELOW = 64 << 10  # bodies up to this size travel in one write with their head

Buffer = bytes | bytearray | memoryview


class Failure(Enum):
    """What kind of failure it was: the label of metrics, and what may be tried again."""

    REFUSED = "connection_refused"
    TIMEOUT = "timeout"
    RESET = "reset"
    CANCELLED = "context_cancelled"
    OTHER = "server_error"


class PeerError(PyvolumeError):
    """A request to a peer got no (whole) response. `kind` says why; `str()` is the reason without method and URL."""

    def __init__(self, text: str, kind: Failure = Failure.OTHER) -> None:
        super().__init__(text)
        self.kind = kind


class Cancel:
    """Ends requests under way from another thread: their sockets are shut down, their callers get PeerError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def hold(self, sock: socket.socket) -> None:
        """Has `cancel` shut this socket down, at once if it was called already."""
        with self._lock:
            self._sockets.add(sock)
            late = self._cancelled
        if late:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def let_go(self, sock: socket.socket) -> None:
        """The request on this socket is over."""
        with self._lock:
            self._sockets.discard(sock)


class _Connection:
    """One socket to a peer. `used` tells whether a request was answered on it before."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.sock = sock
        self.host = host
        self.used = False
        self.idle_since_s = 0.0

    def stale(self, now_s: float) -> bool:
        """True if the peer closed it, sent something unasked, or it was idle for too long."""
        if now_s - self.idle_since_s > IDLE_S:
            return True
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | select.POLLHUP | select.POLLERR)
        return bool(poll.poll(0))

    def send(self, parts: Sequence[Buffer]) -> None:
        """Sends everything; each slice within STALL_TIMEOUT_S."""
        self.sock.settimeout(STALL_TIMEOUT_S)
        if sum(len(part) for part in parts) <= _JOIN_BELOW:
            self.sock.sendall(b"".join(parts))
            return
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _SEND_SLICE):
                self.sock.sendall(view[start : start + _SEND_SLICE])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class PeerResponse:
    """A response whose body is still to be read. Close it (or read it to the end) in any case."""

    def __init__(self, pool: PeerClient, connection: _Connection, raw: http.client.HTTPResponse) -> None:
        self._pool = pool
        self._connection: _Connection | None = connection
        self._raw = raw
        self.status: int = raw.status
        self.headers: list[tuple[str, str]] = raw.getheaders()
        self.length: int | None = raw.length

    def header(self, name: str) -> str:
        """The first value of a header, "" without."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), "")

    def read(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes of it (the rest is not read and the connection is given up)."""
        parts = []
        left = limit
        for chunk in self.chunks(_JOIN_BELOW):
            parts.append(chunk[:left])
            left -= len(parts[-1])
            if left <= 0:
                break
        self.close()
        return b"".join(parts)

    def chunks(self, size: int) -> Iterator[bytes]:
        """The body in pieces of at most `size` bytes. Raises PeerError when it ends early or stalls."""
        if self._connection is None:
            return
        try:
            while chunk := self._raw.read1(size):
                yield chunk
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise _failure(exc, "read", self._connection) from exc
        if self._raw.length:
            self.close()
            raise PeerError("unexpected EOF")
        self.close()

    def close(self) -> None:
        """Gives the connection back if the body was read to its end, else closes it. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        done = self._raw.isclosed() or self._raw.length == 0
        reusable = done and not self._raw.will_close
        self._raw.close()
        if reusable:
            self._pool.give_back(connection)
        else:
            connection.close()


class PeerClient:
    """Connections to all peers of one server. Thread-safe.

    tls: gives the context for https to peers (`https.client`) at each dial, None for plain http. source_ip: local
    address for targets that are not loopback, None to leave it to the system. guarded: the targets come from a request,
    so every address passes the endpoint guard when it is dialled.
    """

    def __init__(
        self,
        tls: Callable[[], ssl.SSLContext] | None = None,
        source_ip: str | None = None,
        *,
        guarded: bool = False,
    ) -> None:
        self.tls = tls
        self.scheme = "https" if tls is not None else "http"
        self.source_ip = source_ip
        self._guarded = guarded
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, list[_Connection]] = OrderedDict()
        self._idle_count = 0
        self._closed = False

    def request(
        self,
        method: str,
        host: str,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        body: Sequence[Buffer] | None = None,
        *,
        dial_timeout_s: float = DIAL_TIMEOUT_S,
        cancel: Cancel | None = None,
    ) -> PeerResponse:
        """Sends one request and waits for the head of the response. Raises PeerError.

        target and header values are latin-1 texts (bytes as they go over the wire). A request on a kept connection that
        the peer closed under it is sent once more on a new one; so is one that was reset before any byte of an answer.
        """
        head = self._head(method, host, target, headers, body)
        parts = [head, *(body or ())]
        for attempt in (0, 1):
            connection = self._take(host) if attempt == 0 else None
            if connection is None:
                connection = self._dial(host, dial_timeout_s)
            try:
                return self._exchange(connection, method, parts, cancel)
            except PeerError as exc:
                again = exc.kind is Failure.RESET and attempt == 0
                if not again or (cancel is not None and cancel.cancelled):
                    raise
        raise AssertionError("unreachable")

    def _exchange(
        self, connection: _Connection, method: str, parts: Sequence[Buffer], cancel: Cancel | None
    ) -> PeerResponse:
        if cancel is not None:
            cancel.hold(connection.sock)
        step = "write"
        try:
            try:
                connection.send(parts)
            except (BrokenPipeError, ConnectionResetError):
                step = "read"  # the peer may have answered before it stopped reading
            connection.sock.settimeout(HEADER_TIMEOUT_S)
            step = "read"
            raw = http.client.HTTPResponse(connection.sock, method=method)
            raw.begin()
            connection.sock.settimeout(STALL_TIMEOUT_S)
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            if cancel is not None and cancel.cancelled:
                raise PeerError("context canceled", Failure.CANCELLED) from exc
            raise _failure(exc, step, connection) from exc
        finally:
            if cancel is not None:
                cancel.let_go(connection.sock)
        return PeerResponse(self, connection, raw)

    @staticmethod
    def _head(
        method: str, host: str, target: str, headers: Sequence[tuple[str, str]], body: Sequence[Buffer] | None
    ) -> bytes:
        if not target.isascii() or not target.isprintable() or " " in target:
            raise PeerError("net/url: invalid control character in URL")
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
        names = set()
        for name, value in headers:
            if "\r" in value or "\n" in value or "\0" in value:
                raise PeerError(f"net/http: invalid header field value for {name!r}")
            names.add(name.lower())
            lines.append(f"{name}: {value}")
        if "user-agent" not in names:
            lines.append("User-Agent: Go-http-client/1.1")
        if body is not None:
            lines.append(f"Content-Length: {sum(len(part) for part in body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    # -- the pool -------------------------------------------------------------------------------------------------

    def _take(self, host: str) -> _Connection | None:
        now_s = time.monotonic()
        while True:
            with self._lock:
                kept = self._idle.get(host)
                if not kept:
                    return None
                connection = kept.pop()
                self._idle_count -= 1
                if not kept:
                    del self._idle[host]
            if not connection.stale(now_s):
                return connection
            connection.close()

    def give_back(self, connection: _Connection) -> None:
        """Keeps a connection whose last response was read to the end."""
        connection.used = True
        connection.idle_since_s = time.monotonic()
        surplus: list[_Connection] = []
        with self._lock:
            if self._closed:
                surplus.append(connection)
            else:
                kept = self._idle.setdefault(connection.host, [])
                self._idle.move_to_end(connection.host)
                kept.append(connection)
                self._idle_count += 1
                if len(kept) > MAX_IDLE_PER_HOST:
                    surplus.append(kept.pop(0))
                elif self._idle_count > MAX_IDLE:
                    oldest = next(iter(self._idle))
                    surplus.append(self._idle[oldest].pop(0))
                    if not self._idle[oldest]:
                        del self._idle[oldest]
                self._idle_count -= len(surplus)
        for unused in surplus:
            unused.close()

    def close(self) -> None:
        """Closes the kept connections; requests under way go on. Idempotent."""
        with self._lock:
            self._closed = True
            kept = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
            self._idle_count = 0
        for connection in kept:
            connection.close()

    # -- dialling -------------------------------------------------------------------------------------------------

    def _dial(self, host: str, timeout_s: float) -> _Connection:
        name, port = _split(host, 443 if self.tls is not None else 80)
        source = None
        if self.source_ip is not None and _takes_source(name, self.source_ip):
            source = (self.source_ip, 0)
        try:
            rule = endpoint_guard.Rule(host, allow_private=True) if self._guarded else None
            sock = endpoint_guard.dial(name, port, rule, timeout_s, source)
        except endpoint_guard.EndpointRefused as exc:
            raise PeerError(str(exc)) from exc
        except socket.gaierror as exc:
            raise PeerError(f"dial tcp: lookup {name}: no such host") from exc
        except TimeoutError as exc:
            raise PeerError(f"dial tcp {host}: i/o timeout", Failure.TIMEOUT) from exc
        except OSError as exc:
            refused = isinstance(exc, ConnectionRefusedError)
            kind = Failure.REFUSED if refused else Failure.OTHER
            raise PeerError(f"dial tcp {host}: connect: {_reason(exc)}", kind) from exc
        if self.tls is None:
            return _Connection(sock, host)
        try:
            return _Connection(self.tls().wrap_socket(sock, server_hostname=name), host)
        except TimeoutError as exc:
            sock.close()
            raise PeerError("net/http: TLS handshake timeout", Failure.TIMEOUT) from exc
        except (OSError, ValueError) as exc:
            sock.close()
            raise PeerError(f"tls: {_reason(exc)}") from exc


def _split(host: str, default_port: int) -> tuple[str, int]:
    """`name:port`, `[v6]:port` or a bare name. Raises PeerError for a port that is none."""
    name, colon, port = host.rpartition(":")
    if not colon or name.endswith(":") or host.endswith("]"):
        name, port = host, str(default_port)
    name = name.removeprefix("[").removesuffix("]")
    if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise PeerError(f"dial tcp: address {host}: invalid port")
    return name, int(port)


def _takes_source(target: str, source_ip: str) -> bool:
    """False for loopback targets and for literal addresses of the other family."""
    if target == "localhost":
        return False
    try:
        address = ipaddress.ip_address(target)
    except ValueError:
        return True
    return not address.is_loopback and address.version == ipaddress.ip_address(source_ip).version


def _reason(exc: Exception) -> str:
    """The system's words, first letter small as Go prints them."""
    text = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _failure(exc: Exception, step: str, connection: _Connection | None) -> PeerError:
    if isinstance(exc, TimeoutError):
        if step == "read":
            return PeerError("net/http: timeout awaiting response headers", Failure.TIMEOUT)
        return PeerError(f"{step} tcp: i/o timeout", Failure.TIMEOUT)
    if isinstance(exc, http.client.RemoteDisconnected):
        return PeerError("EOF", Failure.RESET if connection is not None and connection.used else Failure.OTHER)
    if isinstance(exc, ConnectionResetError | BrokenPipeError):
        host = connection.host if connection is not None else ""
        return PeerError(f"{step} tcp {host}: {step}: {_reason(exc)}", Failure.RESET)
    if isinstance(exc, http.client.IncompleteRead):
        return PeerError("unexpected EOF")
    if isinstance(exc, http.client.HTTPException):
        return PeerError(f"net/http: malformed HTTP response: {type(exc).__name__}")
    return PeerError(f"{step} tcp: {_reason(exc)}")
