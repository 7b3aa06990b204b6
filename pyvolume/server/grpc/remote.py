"""FetchAndWriteNeedle: a piece of a remote store becomes a needle (contract grpc.md 10). Must not import http_app."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import grpc

from pyvolume._native import http as native
from pyvolume.ops import remote
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.address import source_ip
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.status import CallEnded, Refusal

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext
    from pyvolume.storage.store import Store

_fetchers: WeakKeyDictionary[Store, remote.Fetcher] = WeakKeyDictionary()
_fetchers_lock = threading.Lock()


def fetcher_of(server: ServerContext) -> remote.Fetcher:
    """The one fetcher of a server, made when it is first asked for."""
    with _fetchers_lock:
        fetcher = _fetchers.get(server.store)
        if fetcher is None:
            https_client = server.tls.https_client if server.tls is not None else None
            fetcher = _fetchers[server.store] = remote.Fetcher(
                server.store,
                native.MimeTable.from_system(),
                server.events,
                allow_untrusted=server.config.allow_untrusted_remote,
                tls=https_client.current if https_client is not None else None,
                source_ip=source_ip(server.config.bind_ip),
            )
        return fetcher


def fetch_and_write_needle(call: Call, request: Any) -> Any:
    """Reads [offset, offset + size) of an object, writes it as a needle here and on the replicas that are named.

    Departure A4: a request without remote_conf or remote_location, or with a size that no needle can have, is refused
    (upstream's process dies of it).
    """
    with remote.Job() as job:
        call.on_end(job.end)
        try:
            e_tag = fetcher_of(call.server).fetch_and_write(request, call.request_id, job)
        except remote.InvalidField as exc:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(exc)) from exc
        except remote.RemoteError as exc:
            if not call.active():
                raise CallEnded(str(exc)) from exc
            raise
    return pb.FetchAndWriteNeedleResponse(e_tag=e_tag)


HANDLERS: dict[str, Handler] = {
    "FetchAndWriteNeedle": fetch_and_write_needle,
}
