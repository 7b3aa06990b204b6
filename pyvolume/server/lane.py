"""The fast lane of a server: starts the engine's threads on its listening sockets, and passes connections between the
lanes (docs/decisions/0060-fast-lane.md).

The lane answers what needs no decision of Python's. Everything else comes through a mailbox: the loop of an HTTP server
empties it and adopts the connections, which go back when their request is answered. What the lane may serve follows
from the settings: a method with a signing key, a white list or a limit in force is all handed over. May import http_app
and below; must not import lifecycle.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyvolume._native import lane as native
from pyvolume.server.tls import TlsHTTPServer
from pyvolume.server.waitress_ext import default_connection_limit, raise_nofile_limit
from pyvolume.version import server_header

if TYPE_CHECKING:
    from pyvolume.ops.context import Location
    from pyvolume.security_config import SecurityConfig
    from pyvolume.server.context import ServerContext
    from pyvolume.server.http_app import HttpServer
    from pyvolume.server.metrics import ServerMetrics
    from pyvolume.server.waitress_ext import VolumeHTTPServer

log = logging.getLogger(__name__)

LaneError = native.LaneError

MOST_THREADS = 64
DEFAULT_THREADS = 4
"""Of a server that was not told how many: more gain nothing before the disk or the network is the limit."""
IO_THREADS = 4
SYNC_THREADS = 16
"""As many writes of `fsync=true` may wait for one flush; more of them queue."""
BODY_BYTES = 16 << 20
"""Largest body and largest needle that the lane holds; filers send chunks of 4 MiB, or 8."""
BUDGET_BYTES = 256 << 20
ROUTE_S = 10.0
"""How long the lane copies writes of a volume to the replicas that took the last one; then ops looks at one again."""
MAILBOX = 4096


class FastLane:
    """One server's lane. Made before its HTTP servers run: it takes their listening sockets."""

    def __init__(self, context: ServerContext, admin: HttpServer, public: HttpServer | None) -> None:
        config = context.config
        self._context = context
        self._admin = admin
        self._public = public
        self.read_counts = admin.counts
        self._lane = native.Lane(
            context.store.registry,
            admin.ops.mime,
            server=server_header(config.offset_bytes),
            size_limit_bytes=config.file_size_limit_bytes,
            body_bytes=BODY_BYTES,
            budget_bytes=BUDGET_BYTES,
            idle_timeout_s=config.idle_timeout_s,
            threads=min(config.fast_lane_threads or min(DEFAULT_THREADS, os.cpu_count() or 1), MOST_THREADS),
            io_threads=IO_THREADS,
            sync_threads=SYNC_THREADS,
            max_connections=default_connection_limit(raise_nofile_limit()),
            mailbox=MAILBOX,
            fix_orientation=config.fix_orientation,
            serve=self._may_serve(context.security),
        )
        peers = admin.ops.peers
        if peers.scheme == "http" and peers.source_ip is None:  # the lane's connections are plain, from any address
            admin.ops.copied = self._copied
        self._give_back = (partial(self._give, False), partial(self._give, True))
        self._delivery = threading.Lock()
        self._loop: VolumeHTTPServer | None = None  # the server whose loop empties the mailbox

    def start(self) -> None:
        """Raises LaneError; the listening sockets are gone then. A port that speaks TLS keeps its own."""
        for server, public in ((self._admin, False), (self._public, True)):
            if server is not None and not isinstance(server.server, TlsHTTPServer):
                self._lane.listen(server.server.lend_listener(), public=public)
                self._loop = self._loop or server.server
        self._lane.start()
        if self._loop is not None:
            self._loop.watch(self._lane.mail_fd, self._mail_came)

    def _may_serve(self, security: SecurityConfig) -> native.Serve:
        ops = self._admin.ops
        serve = native.Serve.NOTHING
        if not security.jwt_read_key and not ops.downloads.limit_bytes:
            serve |= native.Serve.READS
        if not (security.jwt_write_key or security.white_list or ops.uploads.limit_bytes):
            serve |= native.Serve.WRITES
        return serve

    def _copied(self, vid: int, locations: Sequence[Location]) -> None:
        """The lane may do likewise with the next writes, or not any more. Names and too many are not for it."""
        self._lane.replicas(vid, [location.url for location in locations], ROUTE_S)

    def apply(self, security: SecurityConfig) -> None:
        """Before settings are replaced, with the new ones: what they forbid is not served from now on. What they allow
        is served at once, too, so call it again with what is in force if they are not taken in the end."""
        self._lane.serve(self._may_serve(security))

    def stats(self) -> native.LaneStats:
        """Counters of the requests that the lane answered, for metrics."""
        return self._lane.stats()

    def quiesce(self) -> None:
        """Begins the stop: no new connections, idle ones are closed, unfinished requests are with the HTTP servers when
        this returns. Those must not be stopped before."""
        self._lane.quiesce()
        while self._deliver(None):
            pass

    def stop(self, deadline_s: float) -> None:
        """Lets answers be sent for up to deadline_s, then cuts them."""
        self.quiesce()
        cut = self._lane.stop(deadline_s)
        if cut:
            log.warning("stopping: %d connection(s) of the fast lane cut", cut)

    # -- the mailbox ----------------------------------------------------------------------------------------------

    def _mail_came(self) -> None:
        """Loop."""
        assert self._loop is not None
        if not self._deliver(self._loop):
            self._loop.unwatch(self._lane.mail_fd)

    def _deliver(self, loop: VolumeHTTPServer | None) -> bool:
        """Has the servers adopt some of what waits; `loop` is the one on whose loop this runs. False: the lane has
        ended and all is delivered, also what another thread had taken."""
        with self._delivery:
            batch = self._lane.take()
            if batch is None:
                return False
            for one in batch:
                port = self._public if one.public and self._public is not None else self._admin
                server = port.server
                adopt = server.adopt_here if server is loop else server.adopt
                try:
                    adopt(
                        one.fd,
                        one.peer,
                        one.data,
                        served=one.served,
                        lenient=one.lenient,
                        give_back=self._give_back[one.public],
                    )
                except Exception:  # one connection must not end the loop
                    log.exception("a connection of %s:%d was lost between the lanes", *one.peer)
        return True

    def _give(self, public: bool, fd: int, lenient: bool) -> bool:
        """Any thread."""
        return self._lane.give(fd, public=public, lenient=lenient)


def watch_lane(metrics: ServerMetrics, lane: FastLane) -> None:
    """Adds what the lane answered to the families of the HTTP requests, each request once, whenever metrics are read.

    The lane does not time the local part of a write apart: there the whole request counts as `writeToLocalDisk`.
    """
    registry = metrics.registry
    handed_over = registry.counter("pyvolume_lane_handed_over", "Connections the fast lane handed over.", "reason")
    returned = registry.counter("pyvolume_lane_given_back", "Connections that came back to the fast lane.")
    refused = registry.counter("pyvolume_lane_refused", "Connections refused since the hand-over was full.")
    jobs = registry.counter("pyvolume_lane_io_jobs", "Requests of the fast lane that waited for the disk elsewhere.")
    connections = registry.gauge("pyvolume_lane_connections", "Connections the fast lane has open.")
    held = registry.gauge("pyvolume_lane_held_bytes", "Bodies and answers the fast lane holds in memory.")
    lock = threading.Lock()
    seen: list[native.LaneStats] = []

    def refresh() -> None:
        with lock:
            stats = lane.stats()
            before = seen[-1] if seen else None
            seen[:] = [stats]
            alone = before.copied - stats.copied if before else -stats.copied  # writes that went nowhere else
            for (public, method, status), count in stats.requests.items():
                more = count - (before.requests.get((public, method, status), 0) if before else 0)
                if method in ("PUT", "POST", "DELETE"):
                    alone += more
                if more:
                    metrics.request_total.value(str(status), method).inc(more)
                    if method in ("GET", "HEAD", "OPTIONS"):
                        lane.read_counts.count(more)
            for kind, counts in stats.latency.items():
                old = before.latency.get(kind, ()) if before else ()
                seconds = stats.seconds[kind] - (before.seconds.get(kind, 0.0) if before else 0.0)
                more_counts = [n - (old[i] if old else 0) for i, n in enumerate(counts)]
                names = [kind[1], "writeToLocalDisk"] if kind[1] in ("PUT", "POST") else [kind[1]]
                for name in names:
                    distribution = metrics.request_seconds.distribution(name)
                    metrics.seconds.setdefault(name, distribution).add(more_counts, seconds)
            more = stats.copied - (before.copied if before else 0)
            if more:
                old = before.copy_latency if before else ()
                copied = [n - (old[i] if old else 0) for i, n in enumerate(stats.copy_latency)]
                seconds = stats.copy_seconds - (before.copy_seconds if before else 0.0)
                metrics.writes_replicated(more, stats.copies - (before.copies if before else 0), copied, seconds)
            if alone > 0:
                metrics.writes_not_replicated(alone)
        for reason, count in stats.handed_over.items():
            handed_over.value(reason).set(count)
        returned.value().set(stats.given)
        refused.value().set(stats.mailbox_full)
        jobs.value().set(stats.io_jobs)
        connections.value().set(stats.connections)
        held.value().set(stats.held_bytes)

    registry.refresh_with(refresh)
