"""What a handler gets beside its request, and the gates in front of it.

Must not import the handlers or storage. A handler is a plain function `(call, request) -> response`, or a generator for
a response stream; it raises PyvolumeError with upstream's text, or Refusal where the code matters.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc

from pyvolume.errors import PyvolumeError
from pyvolume.ops.auth import Guard
from pyvolume.server.grpc.methods import Maintenance, Rpc
from pyvolume.server.grpc.status import CallEnded, Refusal
from pyvolume.server.rpc import REQUEST_ID_KEY
from pyvolume.types import is_plain_file_part

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext

log = logging.getLogger(__name__)

Handler = Callable[["Call", Any], Any]
"""Takes a Call and a request (an iterator of requests for a client stream)."""


@dataclass(slots=True)
class Call:
    """One RPC under way."""

    server: ServerContext
    rpc: Rpc
    request_id: str
    context: grpc.ServicerContext

    def active(self) -> bool:
        """False once the client has gone, the deadline is over or the server cuts its calls. Cheap."""
        return bool(self.context.is_active())

    def check(self) -> None:
        """Raises CallEnded when nobody waits for the answer any more. Long handlers call it between steps."""
        if not self.context.is_active():
            raise CallEnded("context canceled")

    def on_end(self, wake: Callable[[], None]) -> None:
        """Has wake called, on another thread, when the call ends; at once if it has ended."""
        if not self.context.add_callback(wake):
            wake()

    def timeout_s(self, limit_s: float) -> float:
        """limit_s, or less when the client's deadline is nearer: the time to give an outgoing call."""
        left_s = self.context.time_remaining()
        return limit_s if left_s is None else max(0.001, min(limit_s, left_s))


def peer_ip(peer: str) -> str | None:
    """The bare IP of grpcio's `ipv4:1.2.3.4:5` or `ipv6:%5B::1%5D:5`; None when there is no TCP peer.

    An IPv4 client on a dual-stack socket counts as IPv4; a zone (`%eth0`) is cut off.
    """
    family, _, rest = peer.partition(":")
    if family not in ("ipv4", "ipv6") or not rest:
        return None
    host = unquote(rest).rpartition(":")[0].removeprefix("[").removesuffix("]")
    host = host.partition("%")[0]
    return host.removeprefix("::ffff:") if "." in host else host


class Gates:
    """White list, maintenance mode and file names from requests, for one server."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self._guard = Guard(lambda: server.security)
        self._guard_peers = bool(server.config.guard_peers)

    def pass_gates(self, rpc: Rpc, context: grpc.ServicerContext) -> None:
        """Upstream's order: white list, then maintenance. Raises the refusal."""
        if rpc.guarded or (self._guard_peers and rpc.changes):
            self._check_white_list(context)
        if rpc.maintenance is Maintenance.FIRST:
            check_maintenance(self._server)

    def _check_white_list(self, context: grpc.ServicerContext) -> None:
        peer = context.peer() or ""
        host = peer_ip(peer)
        if host is None:
            if not self._server.security.white_list:
                return
            log.info("gRPC admin auth failed: no peer info")
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "no peer info")
        if not self._guard.allows(host):
            remote = unquote(peer.partition(":")[2])
            log.info("gRPC admin auth failed: %s is not whitelisted (remote: %s)", host, remote)
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"not authorized: {host}")


def check_maintenance(server: ServerContext) -> None:
    """Raises upstream's text when the server is in maintenance mode."""
    if server.store.state.maintenance:
        raise PyvolumeError(f"volume server {server.config.server_id} is in maintenance mode")


def check_file_part(field: str, value: str) -> None:
    """Departure S5: text of a request that becomes part of a file name must not lead to another directory."""
    if not is_plain_file_part(value):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field} must not contain path separators: {value!r}")


def request_id_of(context: grpc.ServicerContext) -> str:
    """The caller's x-amz-request-id, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and value:
            return value
    return str(uuid.uuid4())
