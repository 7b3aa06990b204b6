"""The engine's fast lane (csrc/pv_lane.c): threads that serve plain needle requests and hand other connections over.

A thin wrapper; what is done with a connection that was handed over is the server's business. Imports nothing of
pyvolume but the compiled module and its neighbours.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyvolume import _pv

if TYPE_CHECKING:
    from pyvolume._native.engine import Registry
    from pyvolume._native.http import MimeTable

_ffi: Final[Any] = _pv.ffi
_lib: Final[Any] = _pv.lib

METHODS: Final = ("GET", "HEAD", "PUT", "POST", "DELETE")
STATUSES: Final = (200, 201, 202, 204, 206, 304, 416)
BUCKETS: Final[int] = _lib.PV_LANE_BUCKETS
"""Of a latency histogram: up to 0.0001 * 2**i seconds, the last one takes the rest."""
_BATCH: Final = 64


class Serve(enum.IntFlag):
    """What the lane answers itself."""

    NOTHING = 0
    READS = 1
    WRITES = 2


class Reason(enum.IntEnum):
    """Why a connection was handed over."""

    HEAD = 0  # not recognised
    OFF = 1  # the method is not served now
    QUERY = 2
    PATH = 3
    VOLUME = 4
    NEEDLE = 5
    ANSWER = 6
    UPLOAD = 7
    WRITE = 8
    SIZE = 9
    EOF = 10
    STOP = 11
    COPY = 12


class LaneError(OSError):
    """The lane cannot be made or started."""


class Handed(NamedTuple):
    """A connection that was handed over; its descriptor belongs to whoever took this."""

    fd: int
    public: bool
    served: bool
    lenient: bool
    reason: int
    peer: tuple[str, int]
    data: bytes


@dataclass(frozen=True, slots=True)
class LaneStats:
    """Counters since the start. The dictionaries have an entry for each combination that occurred."""

    connections: int  # now
    accepted: int
    given: int  # connections that came back
    idle_closed: int
    accept_pauses: int
    mailbox_full: int
    yields: int
    io_jobs: int
    received_bytes: int
    sent_bytes: int
    held_bytes: int  # now
    handed_over: dict[str, int]  # by lower-case name of Reason
    requests: dict[tuple[bool, str, int], int]  # (public port, method, status)
    seconds: dict[tuple[bool, str], float]  # (public port, method): sum of latencies
    latency: dict[tuple[bool, str], tuple[int, ...]]  # BUCKETS counts, not cumulated
    copied: int = 0  # writes that went to replicas, too
    copies: int = 0  # replicas they went to
    copy_seconds: float = 0.0  # sum over them
    copy_latency: tuple[int, ...] = ()


class Lane:
    """The threads and their sockets. All methods may be called from any thread; `close` last."""

    def __init__(
        self,
        registry: Registry,
        mime: MimeTable,
        *,
        server: str,
        size_limit_bytes: int,
        body_bytes: int,
        budget_bytes: int,
        idle_timeout_s: float,
        threads: int,
        io_threads: int,
        sync_threads: int,
        max_connections: int,
        mailbox: int,
        fix_orientation: bool,
        serve: Serve,
    ) -> None:
        self._keep = (registry, mime)
        name = _ffi.new("char[]", server.encode("latin-1"))
        opts = _ffi.new("pv_lane_opts *")
        opts.registry = registry.handle
        opts.mime = mime.handle
        opts.server = name
        opts.size_limit_bytes = size_limit_bytes
        opts.body_bytes = body_bytes
        opts.budget_bytes = budget_bytes
        opts.idle_timeout_ms = int(idle_timeout_s * 1000)
        opts.threads = threads
        opts.io_threads = io_threads
        opts.sync_threads = sync_threads
        opts.max_connections = max_connections
        opts.mailbox = mailbox
        opts.serve = serve
        opts.fix_orientation = fix_orientation
        out = _ffi.new("pv_lane **")
        code = _lib.pv_lane_new(opts, out)
        if code < 0:
            raise LaneError(f"fast lane: {_ffi.string(_lib.pv_err_name(code)).decode()}")
        self._lane = _ffi.gc(out[0], _lib.pv_lane_free)
        self._items = _ffi.new("pv_lane_item[]", _BATCH)
        self.mail_fd: Final[int] = _lib.pv_lane_mail_fd(self._lane)
        """Readable while there may be something to take, and from the end on. The lane's own."""

    def listen(self, fd: int, *, public: bool) -> None:
        """Takes a listening socket, before `start`."""
        if _lib.pv_lane_listen(self._lane, fd, _lib.PV_LANE_PUBLIC if public else 0) < 0:
            raise LaneError("fast lane: too many listeners")

    def start(self) -> None:
        """Raises LaneError; then nothing runs, and the listening sockets are closed."""
        if _lib.pv_lane_start(self._lane) < 0:
            raise LaneError("fast lane: its threads cannot be started")

    def serve(self, what: Serve) -> None:
        """What is served from now on."""
        _lib.pv_lane_serve(self._lane, what)

    def replicas(self, vid: int, hosts: Sequence[str], ttl_s: float) -> bool:
        """Has writes of a volume copied to these servers, `address:port` each, for a while; none: not any more. False:
        the lane does not do it, and all such writes are handed over."""
        text = " ".join(hosts).encode("ascii", "replace")
        return bool(_lib.pv_lane_replicas(self._lane, vid, text, int(ttl_s * 1000)) == 0 and hosts)

    def take(self) -> list[Handed] | None:
        """Connections that were handed over, some of them if there are many; never waits. None: there will be no more.
        One thread at a time."""
        items = self._items
        n = _lib.pv_lane_take(self._lane, items, _BATCH)
        if n < 0:
            return None
        out = []
        for i in range(n):
            item = items[i]
            flags = int(item.flags)
            out.append(
                Handed(
                    int(item.fd),
                    bool(flags & _lib.PV_LANE_PUBLIC),
                    bool(flags & _lib.PV_LANE_SERVED),
                    bool(flags & _lib.PV_LANE_LENIENT),
                    int(item.reason),
                    (_ffi.string(item.host).decode("ascii"), int(item.port)),
                    bytes(_ffi.buffer(item.data, item.size)) if item.size else b"",
                )
            )
            _lib.pv_lane_item_free(self._lane, items + i)
        return out

    def give(self, fd: int, *, public: bool, lenient: bool) -> bool:
        """Gives an idle connection back. False: the lane is stopping, the descriptor stays the caller's."""
        flags = _lib.PV_LANE_SERVED
        flags |= _lib.PV_LANE_PUBLIC if public else 0
        flags |= _lib.PV_LANE_LENIENT if lenient else 0
        return bool(_lib.pv_lane_give(self._lane, fd, flags) == 0)

    def quiesce(self) -> None:
        """Stops listening and reading; what is under way is answered or handed over when this returns."""
        _lib.pv_lane_quiesce(self._lane)

    def stop(self, deadline_s: float) -> int:
        """Ends the threads, after waiting for answers to be sent. The number of connections that were cut."""
        return int(_lib.pv_lane_stop(self._lane, int(max(deadline_s, 0) * 1000)))

    def stats(self) -> LaneStats:
        s = _ffi.new("pv_lane_stats *")
        _lib.pv_lane_stat(self._lane, s)
        kinds = [(public, method) for public in (False, True) for method in METHODS]
        requests: dict[tuple[bool, str, int], int] = {}
        seconds: dict[tuple[bool, str], float] = {}
        latency: dict[tuple[bool, str], tuple[int, ...]] = {}
        for i, (public, method) in enumerate(kinds):
            counts = [int(s.requests[i * len(STATUSES) + k]) for k in range(len(STATUSES))]
            if not any(counts):
                continue
            requests.update({(public, method, code): n for code, n in zip(STATUSES, counts, strict=True) if n})
            seconds[public, method] = int(s.nanoseconds[i]) / 1e9
            latency[public, method] = tuple(int(s.latency[i * BUCKETS + k]) for k in range(BUCKETS))
        return LaneStats(
            int(s.connections),
            int(s.accepted),
            int(s.given),
            int(s.idle_closed),
            int(s.accept_pauses),
            int(s.mailbox_full),
            int(s.yields),
            int(s.io_jobs),
            int(s.received_bytes),
            int(s.sent_bytes),
            int(s.held_bytes),
            {reason.name.lower(): int(s.handed_over[reason]) for reason in Reason},
            requests,
            seconds,
            latency,
            int(s.copied),
            int(s.copies),
            int(s.copy_nanoseconds) / 1e9,
            tuple(int(s.copy_latency[k]) for k in range(BUCKETS)),
        )
