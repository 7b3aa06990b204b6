"""TLS: what the files of security.toml give, their reload, and HTTPS on the admin port (contract operations.md 3.4-5).

Must not import ops, grpc, lifecycle or http_app. Departure S1: what is configured and cannot be used is a SecurityError
that names key, file and reason, never a plain port. Departure A8: HTTP/1.1 only.

A handshake costs the loop of the port nothing: connections that have not finished it belong to one thread of their own,
which sleeps until a client sends something. A client that sends nothing costs a descriptor until its time is over, and
the oldest of them go first when there are too many.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pyvolume.config import error_text
from pyvolume.security_config import TLS_VERSIONS, SecurityError, TlsSettings, cipher_list
from pyvolume.server.waitress_ext import Channel, VolumeHTTPServer

_log = logging.getLogger(__name__)

HANDSHAKE_LIMIT_S = 10.0
"""From the accepted connection to the end of its handshake."""
MAX_HANDSHAKES = 2048
"""Unfinished at a time; one more makes the oldest go."""
LINGER_S = 0.5
"""What a client that spoke plain HTTP gets to read why it is cut off."""
FAILED_AGAIN_S = 60.0
"""A file that could not be taken over is looked at again that soon."""
LOG_EVERY_S = 1.0
_RECORD_BYTES = 16384
_SEND_BYTES = 256 << 10
_HANDSHAKE_RECORD = 0x16
_PLAIN_HTTP = (b"GET /", b"HEAD ", b"POST ", b"PUT /", b"OPTIO")
"""First five bytes that Go takes for a request; other bytes get no answer."""
_PLAIN_ANSWER = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
_NO_TLS12_SUITE = "ECDHE-PSK-AES128-CBC-SHA"
"""A suite that nobody can negotiate without a pre-shared key: it leaves gRPC with TLS 1.3 alone."""

T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------- files and reload


@dataclass(frozen=True)
class PemFile:
    """A file with the key that names it."""

    key: str
    path: str

    def read(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except OSError as exc:
            raise self.refusal(f"cannot be read: {error_text(exc)}") from exc

    def refusal(self, reason: str) -> SecurityError:
        return SecurityError(f"{self.key} = {self.path}: {reason}")


class Reloading(Generic[T]):
    """Something built from files, built anew when they have changed. Thread-safe.

    The files are looked at when `current` is called and the interval has passed, and by `look` at once. What cannot be
    taken over is logged, and the last good value stays in force. The first build raises SecurityError.
    """

    def __init__(self, files: tuple[PemFile, ...], build: Callable[[], T], interval_s: float) -> None:
        self._files = files
        self._build = build
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._seen, self._value = self._load()
        self._due = time.monotonic() + interval_s

    def current(self) -> T:
        """The value in force. Reads files once per interval."""
        if time.monotonic() >= self._due and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._value

    def look(self) -> None:
        """Takes over changed files now."""
        with self._lock:
            self._look()

    def _look(self) -> None:
        self._due = time.monotonic() + self._interval_s
        if self._signature() == self._seen:
            return
        try:
            self._seen, self._value = self._load()
        except SecurityError as exc:
            self._due = time.monotonic() + min(FAILED_AGAIN_S, self._interval_s)
            _log.error("certificates stay as they were: %s", exc)
            return
        _log.info("certificates taken over from %s", ", ".join(file.path for file in self._files))

    def _load(self) -> tuple[object, T]:
        for _ in range(3):  # files that are being replaced one after the other
            before = self._signature()
            value = self._build()
            if self._signature() == before:
                break
        return before, value

    def _signature(self) -> object:
        found: list[object] = []
        for file in self._files:
            try:
                status = os.stat(file.path)
            except OSError as exc:
                found.append((exc.errno,))
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev))
        return found


class _Encrypted(Exception):
    """The key wants a passphrase."""


def _no_passphrase() -> str:
    raise _Encrypted


def load_identity(context: ssl.SSLContext, cert: PemFile, key: PemFile) -> tuple[bytes, bytes]:
    """Gives the context a certificate and its key; returns both files' contents. Raises SecurityError."""
    cert_pem, key_pem = cert.read(), key.read()
    try:
        context.load_cert_chain(cert.path, key.path, _no_passphrase)
    except _Encrypted:
        raise key.refusal("is encrypted, and nobody is there to type the passphrase") from None
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise key.refusal(f"is not the key of the certificate in {cert.path}") from exc
        if not _is_certificate(cert_pem):
            raise cert.refusal("holds no usable certificate in PEM") from exc
        raise key.refusal(f"holds no usable key in PEM ({exc.reason or exc})") from exc
    except OSError as exc:
        raise cert.refusal(f"cannot be read: {error_text(exc)}") from exc
    return cert_pem, key_pem


def load_authority(context: ssl.SSLContext, ca: PemFile) -> bytes:
    """Has the context verify against the certificates in the file; returns its contents. Raises SecurityError."""
    pem = ca.read()
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as exc:
        raise ca.refusal("holds no usable certificate in PEM") from exc
    return pem


def _is_certificate(pem: bytes) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- contexts


class TlsSocket(ssl.SSLSocket):
    """A socket whose shutdown does not switch its encryption off: another thread may be about to write."""

    def shutdown(self, how: int) -> None:
        socket.socket.shutdown(self, how)


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """What the admin port speaks. Raises SecurityError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = TlsSocket
    load_identity(context, PemFile("https.volume.cert", tls.https_cert), PemFile("https.volume.key", tls.https_key))
    if tls.https_ca:
        load_authority(context, PemFile("https.volume.ca", tls.https_ca))
        context.verify_mode = ssl.CERT_REQUIRED
        _limit(context, tls)  # Quirk: only with a CA, as upstream
    return context


def _limit(context: ssl.SSLContext, tls: TlsSettings) -> None:
    suites = cipher_list(tls.cipher_suites)
    if suites:
        try:
            context.set_ciphers(suites)
        except ssl.SSLError as exc:
            raise SecurityError(f"tls.cipher_suites: OpenSSL knows none of {suites}") from exc
    if suites == "" or tls.min_version == "TLS 1.3":
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.max_version == "TLS 1.2":
        context.maximum_version = ssl.TLSVersion.TLSv1_2


def client_context(tls: TlsSettings) -> ssl.SSLContext:
    """For requests to other servers (`https.client`). Raises SecurityError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False  # Go looks at the alternative names only
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = TlsSocket
    if tls.client_ca:
        load_authority(context, PemFile("https.client.ca", tls.client_ca))
    else:
        context.load_default_certs()
    if tls.client_cert:
        load_identity(
            context, PemFile("https.client.cert", tls.client_cert), PemFile("https.client.key", tls.client_key)
        )
    if tls.client_insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(frozen=True)
class GrpcFiles:
    """Contents of the gRPC files, checked, and a context that reads a server's certificate with them."""

    ca: bytes
    cert: bytes
    key: bytes
    client_cert: bytes
    client_key: bytes
    probe: ssl.SSLContext


def grpc_client_pair(tls: TlsSettings) -> tuple[PemFile, PemFile]:
    """The identity for outgoing gRPC: the client pair if both its keys are set, else the server's."""
    if tls.grpc_client_cert and tls.grpc_client_key:
        return (
            PemFile("grpc.volume.client_cert", tls.grpc_client_cert),
            PemFile("grpc.volume.client_key", tls.grpc_client_key),
        )
    return PemFile("grpc.volume.cert", tls.grpc_cert), PemFile("grpc.volume.key", tls.grpc_key)


def grpc_files(tls: TlsSettings) -> GrpcFiles:
    """Reads and checks everything gRPC needs. Raises SecurityError."""
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    probe.minimum_version = ssl.TLSVersion.TLSv1_2
    probe.check_hostname = False  # as upstream: the chain is verified, the name is not
    probe.set_alpn_protocols(["h2"])
    ca = load_authority(probe, PemFile("grpc.ca", tls.grpc_ca))
    client_cert, client_key = load_identity(probe, *grpc_client_pair(tls))
    cert, key = load_identity(
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        PemFile("grpc.volume.cert", tls.grpc_cert),
        PemFile("grpc.volume.key", tls.grpc_key),
    )
    return GrpcFiles(ca, cert, key, client_cert, client_key, probe)


class Tls:
    """Everything TLS of one server. Made at start; raises SecurityError."""

    def __init__(self, settings: TlsSettings) -> None:
        self.settings = settings
        self.https: Reloading[ssl.SSLContext] | None = None
        self.https_client: Reloading[ssl.SSLContext] | None = None
        self.grpc: Reloading[GrpcFiles] | None = None
        if settings.serves_https:
            files = _files(
                ("https.volume.cert", settings.https_cert),
                ("https.volume.key", settings.https_key),
                ("https.volume.ca", settings.https_ca),
            )
            self.https = Reloading(files, lambda: server_context(settings), settings.refresh_s)
        if settings.client_enabled:
            files = _files(
                ("https.client.cert", settings.client_cert),
                ("https.client.key", settings.client_key),
                ("https.client.ca", settings.client_ca),
            )
            self.https_client = Reloading(files, lambda: client_context(settings), settings.refresh_s)
        if settings.uses_grpc_tls:
            files = (
                *_files(
                    ("grpc.ca", settings.grpc_ca),
                    ("grpc.volume.cert", settings.grpc_cert),
                    ("grpc.volume.key", settings.grpc_key),
                ),
                *grpc_client_pair(settings),
            )
            self.grpc = Reloading(files, lambda: grpc_files(settings), settings.refresh_s)
        self._warn()

    def _warn(self) -> None:
        tls = self.settings
        if bool(tls.grpc_client_cert) != bool(tls.grpc_client_key):
            _log.warning(
                "grpc.volume.client_cert and grpc.volume.client_key must both be set, falling back to grpc.volume.cert "
                "and grpc.volume.key"
            )
        limits = tls.min_version or tls.max_version or tls.cipher_suites
        if tls.serves_https and not tls.https_ca and limits:
            _log.warning("[tls] limits do not apply to the HTTPS port without https.volume.ca, as upstream")
        if tls.min_version and TLS_VERSIONS.index(tls.min_version) < TLS_VERSIONS.index("TLS 1.2"):
            _log.warning("tls.min_version %s: TLS 1.2 is the least spoken here", tls.min_version)
        if tls.client_enabled and tls.client_insecure_skip_verify:
            _log.warning("https.client.insecure_skip_verify is set: servers that we send data to are not verified")

    def look(self) -> None:
        """SIGHUP: takes over changed certificates now."""
        for part in (self.https, self.https_client, self.grpc):
            if part is not None:
                part.look()


def _files(*named: tuple[str, str]) -> tuple[PemFile, ...]:
    return tuple(PemFile(key, path) for key, path in named if path)


def grpc_cipher_suites(tls: TlsSettings) -> str | None:
    """The value for GRPC_SSL_CIPHER_SUITES, which the library reads once when it is loaded; None without limits."""
    if not tls.uses_grpc_tls:
        return None
    suites = cipher_list(tls.cipher_suites)
    return _NO_TLS12_SUITE if suites == "" or tls.min_version == "TLS 1.3" else suites


# ----------------------------------------------------------------------------------------------------------- handshakes


class _Pending:
    """A connection before the end of its handshake."""

    __slots__ = ("address", "plain", "secure", "sock", "until_s")

    def __init__(self, sock: socket.socket, address: tuple[Any, ...], until_s: float) -> None:
        self.sock = sock
        self.address = address
        self.until_s = until_s
        self.secure: ssl.SSLSocket | None = None  # made with the first byte, not before
        self.plain = bytearray()


class Handshakes:
    """Does the handshakes of one listener on a thread of its own and hands finished connections to `finished`."""

    def __init__(
        self,
        contexts: Reloading[ssl.SSLContext],
        finished: Callable[[ssl.SSLSocket, tuple[Any, ...]], None],
        *,
        most: int = MAX_HANDSHAKES,
        limit_s: float = HANDSHAKE_LIMIT_S,
    ) -> None:
        self._contexts = contexts
        self._finished = finished
        self._most = most
        self._limit_s = limit_s
        self._arrived: deque[tuple[socket.socket, tuple[Any, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._pending: dict[int, _Pending] = {}  # by descriptor, the oldest first
        self._leaving: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._logged_s = float("-inf")
        self._unlogged = 0
        self.failed = 0
        self.expired = 0

    @property
    def unfinished(self) -> int:
        return len(self._pending)

    def add(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Takes over an accepted socket. Never blocks; any thread."""
        with self._lock:
            if self._stopped:
                sock.close()
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tls-handshake", daemon=True)
                self._thread.start()
            self._arrived.append((sock, address))
            os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Cuts what is unfinished. Idempotent; blocks for a moment."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            thread = self._thread
            os.eventfd_write(self._wake_fd, 1)
        if thread is None:
            self._close()
        elif thread is not threading.current_thread():
            thread.join(5.0)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                for fd, _events in self._epoll.poll(self._pause_s()):
                    if fd == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                        self._take_arrived()
                    elif fd in self._leaving:
                        self._leave(fd)
                    elif fd in self._pending:
                        self._advance_safely(fd)
                self._expire()
        except Exception:  # the top of this thread: the port must not go silent without a word
            _log.exception("the thread of TLS handshakes failed")
        finally:
            self._close()

    def _pause_s(self) -> float:
        oldest = [next(iter(group.values())).until_s for group in (self._pending, self._leaving) if group]
        return max(0.0, min(oldest) - time.monotonic()) if oldest else -1.0

    def _take_arrived(self) -> None:
        while self._arrived:
            sock, address = self._arrived.popleft()
            if len(self._pending) >= self._most:
                self.expired += 1
                self._drop(next(iter(self._pending)), "too many unfinished handshakes")
            try:
                sock.setblocking(False)
                self._epoll.register(sock.fileno(), select.EPOLLIN)
            except OSError as exc:
                _log.warning("cannot begin a TLS handshake: %s", exc)
                sock.close()
                continue
            self._pending[sock.fileno()] = _Pending(sock, address, time.monotonic() + self._limit_s)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._pending and (first := next(iter(self._pending.items())))[1].until_s <= now:
            self.expired += 1
            self._drop(first[0], "i/o timeout")
        while self._leaving and (last := next(iter(self._leaving.items())))[1].until_s <= now:
            self._leave(last[0])

    def _advance_safely(self, fd: int) -> None:
        """One connection's trouble must not be that of the others."""
        try:
            self._advance(fd)
        except Exception:
            _log.exception("a TLS handshake failed unexpectedly")
            if fd in self._pending:
                self._drop(fd, "internal error")

    def _advance(self, fd: int) -> None:
        pending = self._pending[fd]
        try:
            if pending.secure is None:
                if not self._begins_tls(fd, pending):
                    return
                context = self._contexts.current()
                wrapped = context.wrap_socket(pending.sock, server_side=True, do_handshake_on_connect=False)
                pending.secure = pending.sock = wrapped
            pending.secure.do_handshake()
        except BlockingIOError:
            return  # an event of a connection that had this descriptor before
        except ssl.SSLWantReadError:
            self._epoll.modify(fd, select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self._epoll.modify(fd, select.EPOLLOUT)
        except (OSError, ValueError) as exc:
            self._drop(fd, getattr(exc, "reason", None) or str(exc))
        else:
            del self._pending[fd]
            self._epoll.unregister(fd)
            self._finished(pending.secure, pending.address)

    def _begins_tls(self, fd: int, pending: _Pending) -> bool:
        """Looks at the first byte; one that no handshake begins with is answered here as far as Go answers it."""
        if not pending.plain and pending.sock.recv(1, socket.MSG_PEEK)[:1] == bytes((_HANDSHAKE_RECORD,)):
            return True
        data = pending.sock.recv(65536)
        pending.plain += data[: 5 - len(pending.plain)]
        if data and len(pending.plain) < 5:
            return False
        if bytes(pending.plain) not in _PLAIN_HTTP:
            self._drop(fd, "EOF" if not data else "first record does not look like a TLS handshake")
            return False
        self._count_failure(pending, "client sent an HTTP request to an HTTPS server")
        pending.sock.send(_PLAIN_ANSWER)
        pending.sock.shutdown(socket.SHUT_WR)
        del self._pending[fd]
        pending.until_s = time.monotonic() + LINGER_S
        self._leaving[fd] = pending
        return False

    def _leave(self, fd: int) -> None:
        """Reads on until the client has seen the answer and hung up, or its moment is over."""
        pending = self._leaving[fd]
        try:
            while time.monotonic() < pending.until_s:
                if not pending.sock.recv(65536):
                    break
        except BlockingIOError:
            if time.monotonic() < pending.until_s:
                return
        except OSError as exc:
            _log.debug("a client that spoke plain HTTP left: %s", exc)
        del self._leaving[fd]
        pending.sock.close()

    def _drop(self, fd: int, reason: str) -> None:
        pending = self._pending.pop(fd)
        self._count_failure(pending, reason)
        pending.sock.close()  # takes it out of epoll as well

    def _count_failure(self, pending: _Pending, reason: str) -> None:
        """One line a second: anybody can make handshakes fail."""
        self.failed += 1
        now = time.monotonic()
        if now - self._logged_s < LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" (and {self._unlogged} more before)" if self._unlogged else ""
        host, port = pending.address[:2]
        _log.info("http: TLS handshake error from %s:%s: %s%s", host, port, reason, more)
        self._logged_s, self._unlogged = now, 0

    def _close(self) -> None:
        with self._lock:
            self._stopped = True
            arrived, self._arrived = list(self._arrived), deque()
        for sock, _ in arrived:
            sock.close()
        for pending in (*self._pending.values(), *self._leaving.values()):
            pending.sock.close()
        self._pending.clear()
        self._leaving.clear()
        self._epoll.close()
        with contextlib.suppress(OSError):
            os.close(self._wake_fd)


# ------------------------------------------------------------------------------------------------------- HTTPS listener


class TlsChannel(Channel):
    """A connection whose handshake is done. ssl may hold bytes that no event tells of: `held` says so."""

    def __init__(self, server: VolumeHTTPServer, sock: socket.socket, peer: tuple[str, int]) -> None:
        super().__init__(server, sock, peer)
        assert isinstance(sock, ssl.SSLSocket)
        self._secure = sock
        self.held = False
        self._concluding = False

    def _recv(self, size: int) -> bytes | None:
        try:
            data: bytes = self._secure.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.held = False
            return None
        self.held = self._secure.pending() > 0
        return data

    def _recv_into(self, view: memoryview) -> int:
        try:
            n: int = self._secure.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.held = False
            return -1
        self.held = self._secure.pending() > 0
        return n

    def _send(self, parts: list[Any]) -> int:
        # A write that was refused must be repeated with the same bytes: what is sent depends on `parts` alone.
        data = parts[0]
        if len(parts) > 1 and len(data) < _RECORD_BYTES:
            joined = bytearray(data)
            for part in parts[1:]:
                joined += memoryview(part)[: _RECORD_BYTES - len(joined)]
                if len(joined) >= _RECORD_BYTES:
                    break
            data = joined
        elif len(data) > _SEND_BYTES:
            data = memoryview(data)[:_SEND_BYTES]
        try:
            return self._secure.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def handle_event(self, events: int) -> None:
        super().handle_event(events)
        self._read_held()

    def _read_held(self) -> None:
        """Loop thread: goes on as if there were an event, for as long as ssl holds bytes and they are wanted."""
        while self.held and self.wants_input():
            super().handle_event(select.EPOLLIN)

    def _set_mask(self, mask: int) -> bool:
        alive = super()._set_mask(mask)
        if alive and self.held and mask & select.EPOLLIN:
            self.server.call_soon(self._read_held)
        return alive

    def _linger(self) -> None:
        self._say_goodbye()
        super()._linger()

    def _conclude(self, ending: int) -> None:
        self._concluding = True
        super()._conclude(ending)
        self._concluding = False

    def _drop(self) -> None:
        if (self._concluding or self.wants_input()) and not self.gone:  # else a worker may be writing
            self._say_goodbye()
        super()._drop()

    handle_close = close = _drop

    def _say_goodbye(self) -> None:
        """close_notify, as far as the socket takes it now: the client can tell the end from a cut."""
        try:
            self._secure.unwrap()
        except (OSError, ValueError) as exc:
            _log.debug("close_notify to %s:%d: %s", *self.addr, exc)


class TlsHTTPServer(VolumeHTTPServer):
    """A listener that speaks HTTPS only. Accepts on its loop as always; handshakes are done elsewhere."""

    channel_class = TlsChannel

    def __init__(self, *args: Any, contexts: Reloading[ssl.SSLContext], **options: Any) -> None:
        self.handshakes = Handshakes(contexts, self._handshake_done)
        try:
            super().__init__(*args, **options)
        except BaseException:
            self.handshakes.stop()
            raise

    def _make_base_environ(self, ident: str | None) -> dict[str, Any]:
        return {**super()._make_base_environ(ident), "wsgi.url_scheme": "https"}

    def _open_channel(self, sock: socket.socket, addr: tuple[Any, ...]) -> Channel | None:
        if not isinstance(sock, ssl.SSLSocket):
            self.handshakes.add(sock, addr)
            return None
        if len(self.channels) >= self.connection_limit:
            sock.close()
            return None
        return super()._open_channel(sock, addr)

    def _handshake_done(self, sock: ssl.SSLSocket, addr: tuple[Any, ...]) -> None:
        self.adopt_socket(sock, (addr[0], addr[1]))

    def _begin_stop(self, cut_at: float) -> None:
        super()._begin_stop(cut_at)
        self.handshakes.stop()

    def _tear_down(self) -> None:
        super()._tear_down()
        self.handshakes.stop()
