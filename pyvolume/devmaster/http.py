"""The HTTP side of the development master: assign, lookup, grow, delete a collection, status.

Imports its own package only. Paths, parameters, status codes and JSON are those of upstream's master
(`weed/server/master_server_handlers.go`, `master_server_handlers_admin.go`) for what is served; anything else is 404.
"""

from __future__ import annotations

import json
import logging
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pyvolume.devmaster.service import Master
from pyvolume.devmaster.topology import MasterError, Node, Wish
from pyvolume.version import full_version

log = logging.getLogger(__name__)

MAX_FORM_BYTES = 1 << 20
_FORM = "application/x-www-form-urlencoded"

Answer = tuple[HTTPStatus, dict[str, Any] | None]


class HttpServer(ThreadingHTTPServer):
    """Serves one master. Threads are daemons: a client that stays connected does not hold up the end."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, bind: tuple[str, int], master: Master, topology_id: str) -> None:
        self.master = master
        self.topology_id = topology_id
        super().__init__(bind, Handler)

    def server_bind(self) -> None:
        """As the base class, without its look-up of the host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        values = dict(reversed(parse_qsl(url.query, keep_blank_values=True)))
        values = {**self._form(), **values}
        route = _ROUTES.get(url.path)
        if route is None:
            name = url.path.strip("/")
            self._answer(
                HTTPStatus.NOT_FOUND, {"error": f"volume id {name} not found: Unknown volume id {name}"}, False
            )
            return
        try:
            status, body = route(self.server, values)
        except MasterError as exc:
            status, body = HTTPStatus.NOT_ACCEPTABLE, {"error": str(exc)}
        self._answer(status, body, bool(values.get("pretty")))

    def _form(self) -> dict[str, str]:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_FORM_BYTES:
            self.close_connection = True
            return {}
        body = self.rfile.read(int(length))
        if not self.headers.get("Content-Type", "").startswith(_FORM):
            return {}
        return dict(reversed(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)))

    def _answer(self, status: HTTPStatus, body: dict[str, Any] | None, pretty: bool) -> None:
        raw = b""
        if body is not None:
            raw = (json.dumps(body, indent=2) if pretty else json.dumps(body, separators=(",", ":"))).encode()
        self.send_response(status)
        if raw:
            self.send_header("Content-Type", "application/json")
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _count(values: dict[str, str], name: str, default: int) -> int:
    text = values.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and int(text) < 1 << 63 else default


def dir_assign(server: HttpServer, values: dict[str, str]) -> Answer:
    """A file id to write to; makes volumes if there is none."""
    master = server.master
    wish = Wish.parse(values, master.default_replication)
    found = master.assign(_count(values, "count", 1) or 1, wish, _count(values, "writableVolumeCount", 0))
    first = found.nodes[0]
    return HTTPStatus.OK, {
        "fid": found.fid,
        "url": first.url,
        "publicUrl": first.public_url,
        "count": found.count,
    }


def dir_lookup(server: HttpServer, values: dict[str, str]) -> Answer:
    """Where a volume is."""
    asked = values.get("fileId") or values.get("volumeId", "")
    vid = asked.partition(",")[0] if not asked.startswith(",") else asked
    shown = {"volumeOrFileId": vid} if vid else {}
    if not (vid.isascii() and vid.isdigit()):
        return HTTPStatus.NOT_FOUND, {**shown, "error": f"Unknown volume id {vid}"}
    nodes = server.master.topology.lookup(int(vid), values.get("collection", ""))
    if not nodes:
        return HTTPStatus.NOT_FOUND, {**shown, "error": f"volume id {vid} not found"}
    return HTTPStatus.OK, {**shown, "locations": [_location(node) for node in nodes]}


def _location(node: Node) -> dict[str, Any]:
    found = {
        "url": node.url,
        "publicUrl": node.public_url,
        "dataCenter": node.data_center,
        "grpcPort": node.grpc_port,
    }
    return {name: value for name, value in found.items() if value}


def vol_grow(server: HttpServer, values: dict[str, str]) -> Answer:
    """Makes volumes."""
    wish = Wish.parse(values, server.master.default_replication)
    text = values.get("count", "")
    if not (text.isascii() and text.isdigit()):
        raise MasterError(f"can not parse parameter count {text}")
    topology = server.master.topology
    free, wanted = topology.free_slots(wish), int(text) * wish.replication.copy_count
    if free < wanted:
        raise MasterError(f"only {free} volumes left, not enough for {wanted}")
    if not topology.has_data_center(wish.data_center):
        raise MasterError(f"data center {wish.data_center} not found in topology")
    return HTTPStatus.OK, {"count": server.master.grow(int(text), wish)}


def col_delete(server: HttpServer, values: dict[str, str]) -> Answer:
    """Deletes a collection on all servers."""
    collection = values.get("collection", "")
    if not server.master.delete_collection(collection):
        return HTTPStatus.BAD_REQUEST, {"error": f"collection {collection} does not exist"}
    return HTTPStatus.NO_CONTENT, None


def dir_status(server: HttpServer, values: dict[str, str]) -> Answer:
    """The topology."""
    return HTTPStatus.OK, {
        "Topology": server.master.topology.describe(),
        "TopologyId": server.topology_id,
        "Version": full_version(),
    }


def cluster_status(server: HttpServer, values: dict[str, str]) -> Answer:
    """Who leads: always this one."""
    return HTTPStatus.OK, {
        "IsLeader": True,
        "Leader": server.master.address(),
        "MaxVolumeId": server.master.topology.max_vid,
    }


def cluster_healthz(server: HttpServer, values: dict[str, str]) -> Answer:
    """200 without a body."""
    return HTTPStatus.OK, None


_ROUTES = {
    "/dir/assign": dir_assign,
    "/dir/lookup": dir_lookup,
    "/dir/status": dir_status,
    "/vol/grow": vol_grow,
    "/col/delete": col_delete,
    "/cluster/status": cluster_status,
    "/cluster/healthz": cluster_healthz,
}
