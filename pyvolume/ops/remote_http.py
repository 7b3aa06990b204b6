"""Connections to remote stores, by urllib3: every dial passes the endpoint guard, every socket can be cut.

Imported on first use (the library is not needed otherwise). Must not import storage or server.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from pyvolume.errors import PyvolumeError
from pyvolume.ops import endpoint_guard
from pyvolume.ops.endpoint_guard import Rule

if TYPE_CHECKING:
    from pyvolume.ops.peers import Cancel

CONNECT_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 60.0
"""Without a byte moving: while a head is waited for, or a body."""
MAX_POOLS = 4
MAX_IDLE_PER_HOST = 16

FAILURES = (urllib3.exceptions.HTTPError, OSError)
"""What requests and reads of bodies raise."""

_thread = threading.local()


@contextlib.contextmanager
def cut_by(cancel: Cancel) -> Iterator[None]:
    """Requests of this thread in the block end when `cancel` is cancelled."""
    _thread.cancel = cancel
    _thread.held = []
    try:
        yield
    finally:
        for sock in _thread.held:
            cancel.let_go(sock)
        _thread.cancel = None


class Cut(PyvolumeError):
    """Nobody waits for this request any more. Not an OSError, so that no library tries again."""


def _hold(sock: Any) -> None:
    """Has the socket cut with the job of this thread. Raises Cut if that has ended."""
    cancel = getattr(_thread, "cancel", None)
    if cancel is not None and cancel.cancelled:
        raise Cut("context canceled")
    if cancel is not None and sock is not None:
        cancel.hold(sock)
        _thread.held.append(sock)


class _Dialled:
    """What both kinds of connection do another way than urllib3's own."""

    rule: Rule | None = None
    sock: Any
    port: int
    _dns_host: str

    def _new_conn(self) -> socket.socket:
        _hold(None)
        return endpoint_guard.dial(self._dns_host, self.port, self.rule, CONNECT_TIMEOUT_S)

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        _hold(self.sock)

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        _hold(self.sock)  # a kept connection
        super().putrequest(*args, **kwargs)  # type: ignore[misc]


def make_manager(rule: Rule | None, endpoint: str = "", tls: ssl.SSLContext | None = None) -> urllib3.PoolManager:
    """Pools for one store. Without a rule the proxy that the environment names for the endpoint is used, as upstream
    does; with one there is none, since a proxy would resolve the name again. Redirects are not followed by pools."""
    plain = type("Connection", (_Dialled, HTTPConnection), {"rule": rule})
    secure = type("TlsConnection", (_Dialled, HTTPSConnection), {"rule": rule})
    options: dict[str, Any] = {
        "num_pools": MAX_POOLS,
        "maxsize": MAX_IDLE_PER_HOST,
        "retries": False,
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=STALL_TIMEOUT_S),
    }
    if tls is not None:
        options["ssl_context"] = tls
    proxy = _proxy_for(endpoint) if rule is None else None
    manager = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    manager.pool_classes_by_scheme = {
        "http": type("Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TlsPool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
    return manager


def role_http(timeout_s: float) -> urllib3.PoolManager:
    """For the credentials of this machine's role, which its own environment names."""
    return urllib3.PoolManager(timeout=timeout_s, retries=False)


def _proxy_for(endpoint: str) -> str | None:
    url = urlsplit(endpoint)
    host = url.hostname or ""
    if host == "localhost" or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def reason(exc: BaseException) -> str:
    """Why a request failed, in the words of Go's transport where there are any."""
    if isinstance(exc, urllib3.exceptions.IncompleteRead):
        return "unexpected EOF"
    if isinstance(exc, urllib3.exceptions.ProtocolError) and isinstance(exc.args[-1], BaseException):
        return reason(exc.args[-1])  # the library wraps what the socket raised
    if isinstance(exc, urllib3.exceptions.ReadTimeoutError | TimeoutError):
        return "i/o timeout"
    if isinstance(exc, http.client.RemoteDisconnected):
        return "EOF"
    if isinstance(exc, http.client.IncompleteRead):
        return "unexpected EOF"
    if isinstance(exc, urllib3.exceptions.SSLError | ssl.SSLError):
        return f"tls: {exc}"
    if isinstance(exc, socket.gaierror):
        return "no such host"
    text = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
