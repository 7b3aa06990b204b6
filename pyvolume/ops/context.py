"""What the operations share: configuration, store, the way to masters and peers, counters, limits.

Built by server.http_app from the ServerContext. The protocols here are what ops needs of the layers above it, so that
nothing in ops imports server.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pyvolume.ops.auth import Guard, SecuritySettings
from pyvolume.ops.message import Request
from pyvolume.ops.peers import PeerClient
from pyvolume.ops.throttle import ByteGate

if TYPE_CHECKING:
    from pyvolume._native.http import MimeTable
    from pyvolume.config import ServerConfig
    from pyvolume.ops.ec import EcReader
    from pyvolume.ops.manifest import Fetched
    from pyvolume.storage.store import Store

T = TypeVar("T")

MAX_FAN_OUT_THREADS = 32  # requests to the second and further replicas under way at a time


class Location(Protocol):
    """A server that holds a volume: `host:port` for HTTP, and its gRPC port (0: port + 10000)."""

    @property
    def url(self) -> str: ...
    @property
    def grpc_port(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Deleted:
    """One result of a batch delete on a peer; `error` is empty when it worked or nothing was there."""

    fid: str
    error: str


class Cluster(Protocol):
    """Masters and peers. Methods block on the network within their own time-outs and raise PyvolumeError."""

    def lookup_volume(self, vid: int, *, request_id: str = "") -> Sequence[Location]: ...
    def invalidate(self, vid: int) -> None: ...
    def batch_delete(self, location: Location, fids: Sequence[str], *, request_id: str = "") -> Sequence[Deleted]: ...


class Events:
    """What happened, for metrics. This class counts nothing; a collector overrides what it wants to know.

    Names of `handler` are upstream's handler_total types; methods must be cheap and must not raise.
    """

    def handler(self, kind: str) -> None:
        """One event of handler_total."""

    def read_failure(self) -> None:
        """A read answered 404 or 500."""

    def invalid_needle(self) -> None:
        """A read of a needle or volume that is unknown."""

    def write_failure(self) -> None:
        """A write or delete that failed for another reason than its credentials."""

    def request_begins(self, method: str) -> None:
        """A request on a catch-all route of the admin port began."""

    def request_ended(self, method: str, status: int, seconds: float) -> None:
        """A request on a catch-all route ended; method is `INVALID` for unsupported ones of the admin port."""

    def in_flight_ended(self, method: str) -> None:
        """The counterpart of request_begins."""

    def downloads_seen(self, in_flight_bytes: int) -> None:
        """What was on its way out when a read came, or while it waits. Upstream samples it only then."""

    def uploads_seen(self, in_flight_bytes: int) -> None:
        """The same for uploads, if there is a limit on them and for others than those of servers."""

    def local_write_begins(self) -> None:
        """The counterpart of local_write."""

    def local_write(self, seconds: float) -> None:
        """A needle was written (or refused) by the local volume."""

    def replica_writes_begin(self) -> None:
        """The counterpart of replica_writes."""

    def replica_writes(self, seconds: float) -> None:
        """A write was forwarded to all replicas."""

    def replicated(self, operation: str, targets: int) -> None:
        """A write or delete passed its local part; operation is `write` or `delete`."""

    def replication_ended(self, operation: str, ok: bool, seconds: float) -> None:
        """A write or delete with at least one replica ended."""

    def replication_failed(self, operation: str, reason: str) -> None:
        """`timeout`, `connection_refused`, `context_cancelled` or `server_error`."""

    def upload_error(self, status: int) -> None:
        """A peer refused a replica write; 0 = no answer."""

    def rpc_ended(self, name: str, request: Any, response: Any, ok: bool, seconds: float) -> None:
        """A gRPC call that had passed its gates ended. response is None for streams and failed calls."""

    def ec_rebuilt(self, ok: bool, seconds: float) -> None:
        """A rebuild of shards that found an index and shards here ended, whether or not any was missing."""


class Helpers:
    """A bounded pool of daemon threads, made as they are needed: a peer that hangs must not hold up the process's end,
    which the standard library's pool would wait for."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` on a helper as soon as one is free."""
        future: Future[T] = Future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._run, name=f"fan-out-{self._threads}", daemon=True).start()
            self._work.put((future, work))
        return future

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as exc:
                    future.set_exception(exc)
            with self._lock:
                self._idle += 1

    def close(self) -> None:
        """Lets the threads end when they are through with what was submitted."""
        with self._lock:
            for _ in range(self._threads):
                self._work.put(None)


@dataclass
class Ops:
    """One server's operations context; shared by all request threads."""

    config: ServerConfig
    security: Callable[[], SecuritySettings]
    store: Store
    cluster: Cluster
    peers: PeerClient
    mime: MimeTable
    uploads: ByteGate
    downloads: ByteGate
    guard: Guard
    events: Events
    self_url: str
    fetch_self: Callable[[Request], Fetched] | None = None
    ec: EcReader | None = None
    """Reads of erasure coded volumes; None: such volumes are not looked for."""
    copied: Callable[[int, Sequence[Location]], None] | None = None
    """Told of the replicas that have taken a write of a volume, and of none when one has not: for the fast lane."""
    pool: Helpers = field(default_factory=lambda: Helpers(MAX_FAN_OUT_THREADS))

    def close(self) -> None:
        """Ends the helper threads and closes kept connections."""
        self.pool.close()
        self.peers.close()
