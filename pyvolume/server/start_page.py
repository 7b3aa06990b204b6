"""The admin port while the server is not ready: every request is answered 503 with how far the start is.

Go's server does not listen before its volumes are loaded. A long load then looks like a dead server; here `/healthz`
says "loading volumes: 3 of 10". The listening socket goes on to the real server, so that no connection is refused in
between. May import side_http and waitress_ext; must not import http_app or lifecycle.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from pyvolume.server.profiling import Page
from pyvolume.server.side_http import SideServer
from pyvolume.server.waitress_ext import bind_listener
from pyvolume.version import server_header

RETRY_AFTER_S: Final = 1


class StartPage(SideServer):
    """Listens from start() until take_listener(). Bound when it is made; raises OSError."""

    def __init__(
        self, host: str, port: int, *, tls: Callable[[], ssl.SSLContext] | None = None, offset_bytes: int = 4
    ) -> None:
        self._tls = tls
        self._server_header = server_header(offset_bytes)
        self._state = "starting"
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC)
        self._taken = threading.Event()
        listener = bind_listener(host, port)
        listener.listen(128)
        super().__init__(host, port, self._refusal, "http-start", listener=listener)

    def tell(self, state: str) -> None:
        """What the answers say from now on."""
        self._state = state

    def progress(self, done: int, total: int) -> None:
        """How many entries of the directories are loaded."""
        self.tell(f"loading volumes: {done} of {total}")

    def _refusal(self, _path: str, _query: str, _headers: Mapping[str, str]) -> Page:
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Server", self._server_header),
            ("Retry-After", str(RETRY_AFTER_S)),
            ("Connection", "close"),
        ]
        return Page(503, headers, f"{self._state}\n".encode())

    def start(self) -> None:
        threading.Thread(target=self._run, name="http-start", daemon=True).start()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self.socket.fileno(), self._wake_reader):
            poll.register(fd, select.POLLIN)
        self.socket.setblocking(False)
        while not any(fd == self._wake_reader for fd, _ in poll.poll()):
            self._handle_request_noblock()  # type: ignore[attr-defined]
        self._taken.set()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = self.socket.accept()
        connection.setblocking(True)
        if self._tls is not None:
            connection = self._tls().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._open_lock:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def take_listener(self) -> socket.socket:
        """Ends the page and gives its listening socket away. Answers under way are sent; a connection that has asked
        nothing yet is closed, so that it does not hear later that the server is starting. After start() only."""
        os.write(self._wake_writer, b"\0")
        self._taken.wait()
        for fd in (self._wake_reader, self._wake_writer):
            os.close(fd)
        with self._open_lock:
            for connection in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RD)
        return self.socket
