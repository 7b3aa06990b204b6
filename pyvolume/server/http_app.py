"""The HTTP ports: WSGI applications of the admin and the public port, and the servers that run them.

Routes, common headers and framing are decided here (contract http.md 2, 3, 12); what a needle request means is decided
in ops. Needle paths go straight to ops; everything else is routed by Werkzeug. May import ops, storage and the other
parts of server except lifecycle.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote_to_bytes

from waitress.channel import ClientDisconnected
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.routing import Map, Rule

from pyvolume._native import http as native
from pyvolume.ops import delete, gojson, read, write
from pyvolume.ops.auth import Guard
from pyvolume.ops.context import Deleted, Events, Location, Ops
from pyvolume.ops.gourl import clean_path, redirect_for
from pyvolume.ops.message import (
    JSON_HEADERS,
    TEXT_HEADERS,
    Buffer,
    Query,
    Released,
    Request,
    Response,
    Unanswered,
    empty,
    json_error,
)
from pyvolume.ops.peers import PeerClient
from pyvolume.ops.throttle import ByteGate, Slots
from pyvolume.pb import volume_server_pb2
from pyvolume.server import http_pages, ui
from pyvolume.server.address import join_host_port, source_ip, with_grpc_port
from pyvolume.server.ec_peers import reader_of
from pyvolume.server.http_admission import ADMITTED_KEY, REDIRECT_KEY, URL_KEY, AdminAdmission, PublicAdmission
from pyvolume.server.rpc import VOLUME_SERVICE
from pyvolume.server.tls import TlsHTTPServer
from pyvolume.server.waitress_ext import BodyError, Refusal, RequestHead, VolumeHTTPServer, create_server, status_line
from pyvolume.version import server_header

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext

log = logging.getLogger(__name__)

ADMIN_THREADS = 88
PUBLIC_THREADS = 32
RESERVED_THREADS = 16
"""Of the admin port's workers: never taken by requests that wait for other servers."""
TIER_THREADS = 16
"""Requests for volumes in a remote store at a time, over both ports: a store that hangs keeps no more workers."""
PICTURE_THREADS = 8
"""Reads that may be at pictures at a time, over both ports; two of them compute (ops/images), the others wait."""
MAX_BLOCKED = 16
"""Reads that may wait for the download limit on a worker; most wait without one."""
BODY_BYTES_IN_MEMORY = 256 << 20
"""Request bodies of one port in memory at a time; further ones wait, large ones are kept in a file."""
MAX_FORM_MEMORY_BYTES = 32 << 20
"""Of the fields of one form, as Go has it."""
BATCH_DELETE_TIMEOUT_S = 60.0
_ADMIN_METHODS = "PUT, POST, GET, DELETE, OPTIONS"
_PUBLIC_METHODS = "GET, OPTIONS"
_STATIC = http_pages.STATIC_PREFIX.encode()
_PROFILES = b"/debug/pprof/"

StartResponse = Callable[..., Any]


class _Cluster:
    """What ops needs of masters and peers, by the master client and its channels."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def lookup_volume(self, vid: int, *, request_id: str = "") -> Sequence[Location]:
        return self._context.master.lookup_volume(vid, request_id=request_id)

    def invalidate(self, vid: int) -> None:
        self._context.master.invalidate(vid)

    def batch_delete(self, location: Location, fids: Sequence[str], *, request_id: str = "") -> Sequence[Deleted]:
        answer = self._context.master.channels.unary(
            with_grpc_port(location.url, location.grpc_port),
            VOLUME_SERVICE,
            "BatchDelete",
            volume_server_pb2.BatchDeleteRequest(file_ids=list(fids), skip_cookie_check=True),
            timeout_s=BATCH_DELETE_TIMEOUT_S,
            request_id=request_id,
        )
        return [Deleted(result.file_id, result.error) for result in answer.results]


def make_ops(context: ServerContext, events: Events | None = None) -> Ops:
    """The operations context of a server: one for both of its ports."""
    config = context.config
    https_client = context.tls.https_client if context.tls is not None else None
    ops = Ops(
        config=config,
        security=lambda: context.security,
        store=context.store,
        cluster=_Cluster(context),
        peers=PeerClient(https_client.current if https_client is not None else None, source_ip(config.bind_ip)),
        mime=native.MimeTable.from_system(),
        uploads=ByteGate(config.upload_limit_bytes, config.upload_wait_s, MAX_BLOCKED),
        downloads=ByteGate(config.download_limit_bytes, config.download_wait_s, MAX_BLOCKED),
        guard=Guard(lambda: context.security),
        events=events if events is not None else context.events,
        self_url=join_host_port(config.ip, config.port),
    )
    ops.fetch_self = lambda request: _SelfFetched(read.get(ops, request))
    ops.ec = reader_of(context)
    return ops


class _SelfFetched:
    """This server's own answer to a chunk request, in the shape of a peer's."""

    def __init__(self, response: Response) -> None:
        self.status = response.status
        self._body = response.body

    def chunks(self, size: int) -> Iterator[bytes]:
        pieces: Iterable[Buffer] = (
            (self._body,) if isinstance(self._body, bytes | bytearray | memoryview) else self._body
        )
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), size):
                yield bytes(view[start : start + size])

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


# ------------------------------------------------------------------------------------------------------- applications


class App:
    """One port's WSGI application."""

    def __init__(self, context: ServerContext, ops: Ops, counts: http_pages.ReadCounts, *, public: bool) -> None:
        self._context = context
        self._ops = ops
        self._counts = counts
        self._public = public
        self._server = server_header(context.config.offset_bytes)
        self._methods = _PUBLIC_METHODS if public else _ADMIN_METHODS
        rules = [Rule("/favicon.ico", endpoint="static")]
        if not public:
            rules += [
                Rule("/status", endpoint="status"),
                Rule("/healthz", endpoint="health"),
                Rule("/readyz", endpoint="health"),
            ]
            security = context.security
            if not security.jwt_write_key or security.ui_access:
                rules.append(Rule("/ui/index.html", endpoint="ui"))
        self._profiles = context.config.pprof and not public
        self._routes = Map(rules, strict_slashes=True, merge_slashes=False)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[Buffer]:
        head: RequestHead = environ["pyvolume.head"]
        path, method = head.path, environ["REQUEST_METHOD"]
        url: native.UrlPath | None = environ.get(URL_KEY)
        if url is None:
            try:
                url = native.parse_url(path)
            except native.BadEscape:
                return _plain_refusal(start_response, "400 Bad Request")
        if REDIRECT_KEY in environ:
            clean = environ[REDIRECT_KEY]
        else:
            clean = redirect_for(path, url.path, url.unclean) if method != "CONNECT" else None
        if path == b"/seaweedfsstatic":
            clean = http_pages.STATIC_PREFIX
        elif path == _PROFILES[:-1] and self._profiles:
            clean = _PROFILES.decode()
        if clean is not None:
            return _redirect_to_clean(start_response, method, clean, head.query)
        if self.is_page(path):
            return self._page(environ, start_response, path, head.query)
        return self._needle(environ, start_response, head, url)

    # -- needles --------------------------------------------------------------------------------------------------

    def _needle(
        self,
        environ: dict[str, Any],
        start_response: StartResponse,
        head: RequestHead,
        url: native.UrlPath,
    ) -> Iterable[Buffer]:
        started = time.monotonic()
        method: str = environ["REQUEST_METHOD"]
        headers = {name.lower(): value for name, value in reversed(head.headers)}
        request = Request(
            method=method,
            target_path=head.path,
            raw_query=head.query,
            headers=headers,
            url=url,
            raw_headers=head.headers,
            peer_ip=head.peer[0],
            request_id=new_request_id(),
            body=lambda: _body(environ),
            client_gone=environ["pyvolume.client_gone"],
            admitted=environ.get(ADMITTED_KEY, False),
        )
        if environ["pyvolume.body_error"] is not None:
            request.body_error = str(environ["pyvolume.body_error"])
        content_type = headers.get(b"content-type")
        if (
            content_type is not None
            and method not in ("POST", "PUT")
            and content_type.lower().startswith(b"multipart/form-data")
        ):
            request.form_fields = cache(partial(_form_fields, environ))
        events = self._ops.events
        if not self._public:
            events.request_begins(method)
        label = method
        try:
            if method in ("GET", "HEAD"):
                self._counts.count()
                response = read.get(self._ops, request)
            elif method == "OPTIONS":
                self._counts.count()
                allow = [("Access-Control-Allow-Methods", self._methods), ("Access-Control-Allow-Headers", "*")]
                response = Response(200, allow)
            elif self._public:
                response = empty(200)
            elif method in ("POST", "PUT"):
                response = write.put(self._ops, request)
            elif method == "DELETE":
                response = delete.delete(self._ops, request)
            else:
                label = "INVALID"
                response = json_error(request, 400, f"unsupported method {method}")
        except Unanswered:
            if not self._public:
                events.in_flight_ended(method)
            raise ClientDisconnected from None
        except Exception:  # the top of this request: the client gets an answer, the log gets the trace
            log.exception("%s %s failed", method, environ["REQUEST_URI"])
            response = empty(500)

        def ended() -> None:
            if not self._public:
                events.in_flight_ended(method)
            events.request_ended(label, response.status, time.monotonic() - started)

        if isinstance(response.body, bytes | bytearray | memoryview):
            ended()
        else:
            response.body = Released(response.body, ended)
        return _framed(start_response, self._complete(request, response))

    def _complete(self, request: Request, response: Response) -> Response:
        """Adds the headers that every answer of the catch-all routes has."""
        headers, has = response.headers, response.has
        if "server" not in has:
            headers.append(("Server", self._server))
        if "x-amz-request-id" not in has:
            headers.append(("X-Amz-Request-Id", request.request_id))
        if request.headers.get(b"origin"):
            if "access-control-allow-origin" not in has:
                headers.append(("Access-Control-Allow-Origin", "*"))
            if "access-control-allow-credentials" not in has:
                headers.append(("Access-Control-Allow-Credentials", "true"))
        if response.close_connection and "connection" not in has:
            headers.append(("Connection", "close"))
        return response

    def refusal(self, request: Request, response: Response) -> Refusal:
        """An answer that is given at the head of a request, complete and counted."""
        request.request_id = new_request_id()
        self._ops.events.request_ended(request.method, response.status, 0.0)
        body = response.body if isinstance(response.body, bytes) else b""
        return Refusal(response.status, tuple(self._complete(request, response).headers), body)

    # -- pages ----------------------------------------------------------------------------------------------------

    def is_page(self, path: bytes) -> bool:
        """Whether an escaped path is one of the fixed routes; everything else is the catch-all's."""
        return not path[1:2].isdigit() and self._match(path) is not None

    def _match(self, path: bytes) -> tuple[str, str] | None:
        """(endpoint, name of a static file) of a path of the fixed routes."""
        if path.startswith(_STATIC):
            return "static", clean_path(unquote_to_bytes(path[len(_STATIC) :]).decode("latin-1"))[1:]
        if self._profiles and path.startswith(_PROFILES):
            return "pprof", unquote_to_bytes(path).decode("latin-1")
        if b"//" in path or b"%2f" in path.lower():
            return None  # no empty elements here, and an escaped slash separates nothing
        try:
            endpoint, _ = self._routes.bind("", "/").match(unquote_to_bytes(path).decode())
        except (HTTPException, UnicodeDecodeError):
            return None
        return endpoint, "favicon.ico"

    def _page(
        self, environ: dict[str, Any], start_response: StartResponse, path: bytes, query: bytes
    ) -> Iterable[Buffer]:
        """The fixed routes. Any method is answered like GET."""
        matched = self._match(path)
        assert matched is not None
        endpoint, name = matched
        if endpoint == "static":
            return http_pages.static_file(name, environ)(environ, start_response)
        if endpoint == "pprof":
            values = parse_qs(query.decode("latin-1"))
            from pyvolume.server import profiling

            found = profiling.debug_page(name, {key: texts[-1] for key, texts in values.items()})
            assert found is not None
            return _framed(start_response, Response(found.status, found.headers, found.body))
        headers = [("Server", self._server), ("X-Amz-Request-Id", new_request_id())]
        if endpoint == "health":
            return _framed(start_response, self._health(headers))
        if endpoint == "ui":
            asked = Query(query)
            headers += ui.HEADERS
            if asked.get(b"format") == b"json":
                part = (asked.get(b"part") or b"").decode("latin-1")
                return _framed(
                    start_response, Response(200, [*headers, *JSON_HEADERS], ui.figures(self._context, part))
                )
            headers.append(("Content-Type", "text/html; charset=utf-8"))
            return _framed(start_response, Response(200, headers, ui.page(self._context, self._counts)))
        headers += JSON_HEADERS
        document = gojson.dumps(http_pages.status(self._context), pretty=bool(Query(query).get(b"pretty")))
        return _framed(start_response, Response(200, headers, document))

    def _health(self, headers: list[tuple[str, str]]) -> Response:
        """200 or 503, empty. Departure P1: while no master has answered yet, the 200 says so in its body."""
        if not self._context.healthy:
            return Response(503, headers)
        if self._context.awaiting_master:
            return Response(200, [*headers, *TEXT_HEADERS], b"no master has answered yet\n")
        return Response(200, headers)


# ------------------------------------------------------------------------------------------------------------ servers


class HttpServer:
    """One listener: its socket is bound when this is made, it serves while `run` runs."""

    def __init__(self, server: VolumeHTTPServer, parts: _Shared, close: Callable[[], None]) -> None:
        self._server = server
        self._close = close
        self.ops = parts.ops
        self.slots = parts.slots
        self.counts = parts.counts

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def server(self) -> VolumeHTTPServer:
        """The wire server, for a lane that hands connections over."""
        return self._server

    def run(self) -> None:
        """Serves on this thread until `stop`."""
        self._server.run()

    def stop(self, deadline_s: float) -> None:
        """Lets requests under way end within deadline_s, then cuts them. Blocks until the listener is down."""
        self._server.stop(deadline_s)
        self._close()


@dataclass
class _Shared:
    """What both ports of a server have in common."""

    ops: Ops
    slots: Slots
    tier_slots: Slots
    picture_slots: Slots
    counts: http_pages.ReadCounts
    listeners: int = 0

    def close_one(self) -> None:
        """One listener is down; with the last one the helpers go."""
        self.listeners -= 1
        if self.listeners <= 0:
            self.ops.close()


_shared: list[tuple[ServerContext, _Shared]] = []
_shared_lock = threading.Lock()


def _shared_of(context: ServerContext) -> _Shared:
    """The shared parts of this server, made by the first of its ports."""
    with _shared_lock:
        parts = next((parts for known, parts in _shared if known is context), None)
        if parts is None:
            parts = _Shared(
                make_ops(context),
                Slots(ADMIN_THREADS - RESERVED_THREADS - TIER_THREADS - PICTURE_THREADS),
                Slots(TIER_THREADS),
                Slots(PICTURE_THREADS),
                http_pages.ReadCounts(),
            )
            _shared.append((context, parts))
        parts.listeners += 1
        return parts


def _forget(context: ServerContext, parts: _Shared) -> None:
    with _shared_lock:
        parts.close_one()
        if parts.listeners <= 0:
            _shared[:] = [pair for pair in _shared if pair[1] is not parts]


def _make_server(
    context: ServerContext, port: int, *, public: bool, listener: socket.socket | None = None
) -> HttpServer:
    parts = _shared_of(context)
    app = App(context, parts.ops, parts.counts, public=public)
    admin = AdminAdmission(parts.ops, parts.slots, parts.tier_slots, parts.picture_slots, app.is_page, app.refusal)
    admission = PublicAdmission(admin) if public else admin
    config = context.config
    make = None
    if not public and context.tls is not None and context.tls.https is not None:
        make = partial(TlsHTTPServer, contexts=context.tls.https)
    try:
        server = create_server(
            app,
            host=config.bind_ip,
            port=port,
            threads=PUBLIC_THREADS if public else ADMIN_THREADS,
            idle_timeout_s=config.idle_timeout_s,
            max_inflight_body_bytes=BODY_BYTES_IN_MEMORY,
            admission=admission,
            make=make,
            listener=listener,
        )
    except BaseException:
        _forget(context, parts)
        raise
    admission.bind(server)
    return HttpServer(server, parts, lambda: _forget(context, parts))


def make_admin_server(context: ServerContext, listener: socket.socket | None = None) -> HttpServer:
    """Binds the admin port, or takes the socket that is bound to it already. Raises OSError."""
    return _make_server(context, context.config.port, public=False, listener=listener)


def make_public_server(context: ServerContext) -> HttpServer:
    """Binds the public port. Raises OSError."""
    return _make_server(context, context.config.public_port, public=True)


def make_admin_app(context: ServerContext) -> App:
    """The WSGI application of the admin port alone, with parts of its own."""
    return App(context, make_ops(context), http_pages.ReadCounts(), public=False)


def make_public_app(context: ServerContext) -> App:
    """The WSGI application of the public port alone, with parts of its own."""
    return App(context, make_ops(context), http_pages.ReadCounts(), public=True)


# ------------------------------------------------------------------------------------------------------------ helpers

_random: Iterator[int] = iter(())  # numbers that were fetched at once; to take one is one step of the interpreter's


def _random32() -> int:
    global _random  # noqa: PLW0603 - swapped whole; threads that find it used up at once each fetch their own
    number = next(_random, None)
    while number is None:
        _random = iter(array("I", os.urandom(4096)))
        number = next(_random, None)
    return number


def new_request_id() -> str:
    """X-Amz-Request-Id of one request, always of our own making."""
    return native.request_id(time.time_ns(), _random32())


def _framed(start_response: StartResponse, response: Response) -> Iterable[Buffer]:
    """Starts the response. Framing not given here is the wire's: Content-Length for short bodies, else chunks."""
    headers, body = response.headers, response.body
    if response.length is not None and not any(name == "Content-Length" for name, _ in headers):
        headers.append(("Content-Length", str(response.length)))
    write = start_response(status_line(response.status), headers)
    if response.chunked:
        write(b"")  # sends the head now, when the length is not known yet
    if isinstance(body, bytes | bytearray | memoryview):
        return (body,)
    return body


def _plain_refusal(start_response: StartResponse, text: str) -> Iterable[Buffer]:
    """What Go's server says below the handlers; it closes the connection."""
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Connection", "close")]
    return _framed(start_response, Response(400, headers, text.encode()))


def _redirect_to_clean(start_response: StartResponse, method: str, clean: str, query: bytes) -> Iterable[Buffer]:
    """307 to the path without empty and dot elements. Only GET and HEAD get a type, and GET a body."""
    location = clean.encode("ascii") + (b"?" + query if query else b"")
    headers = [("Location", "".join(chr(byte) if byte < 0x80 else f"%{byte:02x}" for byte in location))]
    body = b""
    if method in ("GET", "HEAD"):
        headers.append(("Content-Type", "text/html; charset=utf-8"))
    if method == "GET":
        shown = escape(location.decode("latin-1")).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
        body = f'<a href="{shown}">Temporary Redirect</a>.\n\n'.encode("latin-1")
    return _framed(start_response, Response(307, headers, body))


def _body(environ: dict[str, Any]) -> Buffer:
    """The whole request body without a copy: a view of memory, or of the file it was kept in."""
    body: Buffer | None = environ["pyvolume.body"]
    if body is not None:
        return body
    descriptor = environ["wsgi.input"].fileno()
    if not os.fstat(descriptor).st_size:
        return b""
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def _form_fields(environ: dict[str, Any]) -> dict[bytes, bytes]:
    """Fields of a multipart body, first value of each: Go's FormValue sees them on reads and deletes. None of them if
    the body is broken, cut off, or has more than 1000 parts."""
    parser = FormDataParser(silent=True, max_form_memory_size=MAX_FORM_MEMORY_BYTES)
    try:
        _, form, _ = parser.parse_from_environ(environ)
    except (BodyError, RequestEntityTooLarge):
        return {}
    return {name.encode(): value.encode() for name, value in form.items()}
