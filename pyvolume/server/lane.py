"""The fast lane of a server: starts the engine's threads on its listening sockets, and passes connections between the
lanes (docs/decisions/0030-fast-lane.md).

The lane answers what needs no decision of Python's. Everything else comes through a mailbox: one thread takes it and
has the HTTP server of that port adopt the connection, which goes back when its request is answered. What the lane may
serve follows from the settings: a method with a signing key, a white list or a limit in force is all handed over. May
import http_app and below; must not import lifecycle.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from pyvolume._native import lane as native
from pyvolume.server.waitress_ext import default_connection_limit, raise_nofile_limit
from pyvolume.version import server_header

if TYPE_CHECKING:
    from pyvolume.security_config import SecurityConfig
    from pyvolume.server.context import ServerContext
    from pyvolume.server.http_app import HttpServer

log = logging.getLogger(__name__)

MAX_THREADS = 4
"""Of a server that was not told how many: more gain nothing before the disk or the network is the limit."""
IO_THREADS = 4
BODY_BYTES = 16 << 20
"""Largest body and largest needle that the lane holds; filers send chunks of 4 MiB, or 8."""
BUDGET_BYTES = 256 << 20
MAILBOX = 4096
_POLL_S = 60.0


class FastLane:
    """One server's lane. Made before its HTTP servers run: it takes their listening sockets."""

    def __init__(self, context: ServerContext, admin: HttpServer, public: HttpServer | None) -> None:
        config = context.config
        self._context = context
        self._admin = admin
        self._public = public
        self._lane = native.Lane(
            context.store.registry,
            admin.ops.mime,
            server=server_header(config.offset_bytes),
            size_limit_bytes=config.file_size_limit_bytes,
            body_bytes=BODY_BYTES,
            budget_bytes=BUDGET_BYTES,
            idle_timeout_s=config.idle_timeout_s,
            threads=config.fast_lane_threads or min(MAX_THREADS, os.cpu_count() or 1),
            io_threads=IO_THREADS,
            max_connections=default_connection_limit(raise_nofile_limit()),
            mailbox=MAILBOX,
            fix_orientation=config.fix_orientation,
            serve=self._may_serve(context.security),
        )
        self._taker = threading.Thread(target=self._take, name="lane-mailbox", daemon=True)

    def start(self) -> None:
        """Raises LaneError; the listening sockets are gone then."""
        for server, public in ((self._admin, False), (self._public, True)):
            if server is not None:
                self._lane.listen(server.server.lend_listener(), public=public)
        self._lane.start()
        self._taker.start()

    def _may_serve(self, security: SecurityConfig) -> native.Serve:
        ops = self._admin.ops
        serve = native.Serve.NOTHING
        if not security.jwt_read_key and not ops.downloads.limit_bytes:
            serve |= native.Serve.READS
        if not (security.jwt_write_key or security.white_list or ops.uploads.limit_bytes):
            serve |= native.Serve.WRITES
        return serve

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
        if self._taker.ident is not None:
            self._taker.join()

    def stop(self, deadline_s: float) -> None:
        """Lets answers be sent for up to deadline_s, then cuts them."""
        self.quiesce()
        cut = self._lane.stop(deadline_s)
        if cut:
            log.warning("stopping: %d connection(s) of the fast lane cut", cut)

    # -- the mailbox's thread -------------------------------------------------------------------------------------

    def _take(self) -> None:
        give_back = (partial(self._give_back, False), partial(self._give_back, True))
        while True:
            batch = self._lane.take(_POLL_S)
            if batch is None:
                return
            for one in batch:
                server = self._public if one.public and self._public is not None else self._admin
                try:
                    server.server.adopt(
                        one.fd,
                        one.peer,
                        one.data,
                        served=one.served,
                        lenient=one.lenient,
                        give_back=give_back[one.public],
                    )
                except Exception:  # the top of this thread: one connection must not end it
                    log.exception("a connection of %s:%d was lost between the lanes", *one.peer)

    def _give_back(self, public: bool, fd: int, lenient: bool) -> bool:
        return self._lane.give(fd, public=public, lenient=lenient)
