"""A real server for the HTTP conformance tests: both ports in this process, a store in a directory, a scripted master.

No gRPC, no heartbeat, no cluster: `Master` answers lookups from a table. Requests go over sockets, byte for byte.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pyvolume.config import DirConfig, ServerConfig
from pyvolume.errors import PyvolumeError
from pyvolume.ops.context import Ops
from pyvolume.security_config import SecurityConfig
from pyvolume.server.context import ServerContext
from pyvolume.server.http_app import HttpServer, make_admin_server, make_public_server
from pyvolume.server.lane import FastLane
from pyvolume.server.master_client import Location
from pyvolume.storage.store import Store
from pyvolume.types import ReplicaPlacement, Ttl
from tools.ports import free_port

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
LANE = os.environ.get("PYVOLUME_TEST_LANE", "on") != "off"
"""Whether servers have the fast lane: these tests are to be run with it and without."""


# ------------------------------------------------------------------------------------------------------------- client


@dataclass
class Reply:
    """One answer as it came."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes
    interim: list[int] = field(default_factory=list)

    def get(self, name: str) -> str | None:
        """First value of a header, None without."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]


class Client:
    """One connection; opened anew when the server has closed it."""

    def __init__(self, port: int, host: str = HOST) -> None:
        self.host = host
        self.port = port
        self._sock: socket.socket | None = None
        self._data = b""

    def connect(self) -> socket.socket:
        if self._sock is None:
            self._sock = socket.create_connection((self.host, self.port), TIMEOUT_S)
            self._data = b""
        return self._sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def ask(
        self, method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes | None = None
    ) -> Reply:
        """Sends a request and reads its answer. Raises ConnectionError when there is none."""
        names = {name.lower() for name, _ in headers}
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            lines.append(f"Content-Length: {len(body)}")
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b""))
        return self.read(method)

    def send(self, data: bytes) -> None:
        self.connect().sendall(data)

    def _more(self) -> bool:
        assert self._sock is not None
        chunk = self._sock.recv(1 << 18)
        self._data += chunk
        return bool(chunk)

    def _line(self) -> bytes:
        while b"\r\n" not in self._data:
            if not self._more():
                self.close()
                raise ConnectionError("the server closed the connection")
        line, self._data = self._data.split(b"\r\n", 1)
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            if not self._more():
                self.close()
                raise ConnectionError("the body broke off")
        out, self._data = self._data[:size], self._data[size:]
        return out

    def read(self, method: str = "GET") -> Reply:
        interim = []
        while True:
            _, code, *reason = self._line().decode("latin-1").split(" ", 2)
            headers = []
            while line := self._line().decode("latin-1"):
                name, _, value = line.partition(":")
                headers.append((name, value.strip()))
            if code[0] != "1":
                break
            interim.append(int(code))
        reply = Reply(int(code), " ".join(reason), headers, b"", interim)
        if method == "HEAD" or reply.status in (204, 304):
            pass
        elif (reply.get("Transfer-Encoding") or "").lower() == "chunked":
            while size := int(self._line(), 16):
                reply.body += self._exactly(size)
                self._exactly(2)
            self._exactly(2)
        elif (length := reply.get("Content-Length")) is not None:
            reply.body = self._exactly(int(length))
        else:
            while self._more():
                pass
            reply.body, self._data = self._data, b""
            self.close()
        if (reply.get("Connection") or "").lower() == "close":
            self.close()
        return reply


# ------------------------------------------------------------------------------------------------------------- server


class Master:
    """Stands for the master client: who has which volume."""

    def __init__(self) -> None:
        self.places: dict[int, list[Location]] = {}
        self.failure: PyvolumeError | None = None
        self.lookups: list[int] = []
        self.invalidated: list[int] = []

    def lookup_volume(self, vid: int, collection: str = "", **_: object) -> list[Location]:
        self.lookups.append(vid)
        if self.failure is not None:
            raise self.failure
        return list(self.places.get(vid, ()))

    def invalidate(self, vid: int) -> None:
        self.invalidated.append(vid)


_keys = itertools.count(0x1000, 0x10)


@dataclass
class Bench:
    """A running server and what tests need of it."""

    context: ServerContext
    master: Master
    admin: HttpServer
    public: HttpServer
    lane: FastLane | None = None

    @property
    def port(self) -> int:
        return self.admin.port

    def settings_changed(self) -> None:
        """Tells the lane that a test has changed limits of a running server, which only tests do."""
        if self.lane is not None:
            self.lane.apply(self.context.security)

    @property
    def url(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def ops(self) -> Ops:
        return self.admin.ops

    def client(self, *, public: bool = False) -> Client:
        return Client(self.public.port if public else self.admin.port)

    def ask(
        self, method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        client = self.client()
        try:
            return client.ask(method, target, headers, body)
        finally:
            client.close()

    def allocate(
        self, vid: int, *, placement: str = "000", ttl: str = "", collection: str = "", known: bool = True
    ) -> None:
        self.context.store.allocate_volume(
            vid, collection, ReplicaPlacement.parse(placement), Ttl.parse(ttl), preallocate=0, disk_type="", version=3
        )
        if known:
            self.master.places[vid] = [Location(self.url, self.url)]

    @staticmethod
    def fid(vid: int = 1) -> str:
        """A file id that was not used before."""
        return f"{vid},{next(_keys):x}{secrets.randbits(32):08x}"


class _Context(ServerContext):
    """Tells the lane of new settings, as a reload does."""

    lane: FastLane | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "security" and self.lane is not None:
            self.lane.apply(value)
        super().__setattr__(name, value)


@contextmanager
def serving(directory: Path, security: SecurityConfig | None = None, **settings: Any) -> Iterator[Bench]:
    """Runs a server on free ports with volume 1; settings are fields of ServerConfig."""
    directory.mkdir(parents=True, exist_ok=True)
    config = replace(
        ServerConfig(
            ip=HOST,
            bind_ip=HOST,
            port=free_port(),
            public_port=free_port(),
            masters=(),
            dirs=(DirConfig(str(directory), "", 16),),
            fast_lane=LANE,
        ),
        **settings,
    )
    store = Store(config)
    store.load()
    master = Master()
    context = _Context(config, security or SecurityConfig(), store, cast("Any", master))
    admin = make_admin_server(context)
    public = make_public_server(context)
    lane = FastLane(context, admin, public) if config.fast_lane else None
    if lane is not None:
        lane.start()
        context.lane = lane
    threads = [threading.Thread(target=server.run, daemon=True) for server in (admin, public)]
    for thread in threads:
        thread.start()
    bench = Bench(context, master, admin, public, lane)
    try:
        bench.allocate(1)
        yield bench
    finally:
        if lane is not None:
            lane.stop(5.0)
        admin.stop(5.0)
        public.stop(5.0)
        for thread in threads:
            thread.join(10)
        store.close()
