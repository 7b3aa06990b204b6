"""Reads of volumes that are elsewhere: 404, forwarded, or redirected, by -readMode (contract http.md 7).

Must not import server.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from urllib.parse import quote_plus, urlsplit

from pyvolume.errors import PyvolumeError
from pyvolume.ops.context import Location, Ops
from pyvolume.ops.gourl import encode_path, escaped_path
from pyvolume.ops.message import Request, Response, empty
from pyvolume.ops.peers import PeerError, PeerResponse

log = logging.getLogger(__name__)

DIAL_S = 30.0
MAX_REDIRECTS = 10
_PIECE_BYTES = 256 << 10
_DRAIN_BYTES = 64 << 10
_GZIP_WINDOW = 31  # zlib's wbits for gzip with header

# framing of one connection, or what the sender writes itself
_NOT_FORWARDED = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"trailer", b"connection", b"keep-alive", b"expect", b"upgrade")
)
_NOT_RETURNED = frozenset(
    ("server", "date", "connection", "keep-alive", "transfer-encoding", "trailer", "content-length", "upgrade")
)
_CREDENTIALS = frozenset(("authorization", "www-authenticate", "cookie", "cookie2"))


def missing_volume(ops: Ops, request: Request, vid: int) -> Response:
    """The answer to a read of a volume that is not here."""
    if ops.config.read_mode == "local":
        ops.events.invalid_needle()
        return not_found(ops)
    return elsewhere(ops, request, vid)


def not_found(ops: Ops) -> Response:
    ops.events.read_failure()
    ops.events.handler("errorGetNotFound")
    return empty(404)


def internal_error(ops: Ops) -> Response:
    ops.events.read_failure()
    ops.events.handler("errorGetInternal")
    return empty(500)


def elsewhere(ops: Ops, request: Request, vid: int) -> Response:
    """Forwards or redirects to another server of the volume. Quirk: whatever -readMode is, if it is not `proxy` the
    answer is a redirect (upstream comes here from its throttle, too)."""
    try:
        locations: Sequence[Location] = ops.cluster.lookup_volume(vid, request_id=request.request_id)
    except PyvolumeError as exc:
        log.info("lookup error: %s %s", exc, request.url.path)
        locations = ()
    if not locations:
        ops.events.invalid_needle()
        return not_found(ops)
    own = f"{ops.config.ip}:{ops.config.port}"
    others = [location for location in locations if own not in location.url]
    if not others:
        ops.events.invalid_needle()
        ops.events.handler("emptyReadProxyLocaction")
        log.error("failed lookup target host is empty locations: %s, %s", [one.url for one in locations], own)
        return not_found(ops)
    host = random.choice(others).url
    if ops.config.read_mode == "proxy":
        ops.events.handler("readProxyRequest")
        return _forward(ops, request, vid, host)
    ops.events.handler("readRedirectRequest")
    return _redirect(ops, request, host)


def _redirect(ops: Ops, request: Request, host: str) -> Response:
    """301 with nothing of the query but collection."""
    collection = request.value(b"collection")
    query = (f"collection={quote_plus(collection)}&" if collection else "") + "proxied=true"
    url = f"{ops.peers.scheme}://{host}{encode_path(b'/' + request.url.vid + b',' + request.url.fid)}?{query}"
    headers = [("Location", url), ("Content-Type", "text/html; charset=utf-8")]
    if request.method != "GET":
        return Response(301, headers)
    shown = escape(url).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    return Response(301, headers, f'<a href="{shown}">Moved Permanently</a>.\n\n'.encode())


def _target(request: Request) -> str:
    """Path as sent (re-encoded only where it is not valid as it stands) and the query in Go's form, `proxied` added."""
    path = escaped_path(request.target_path, request.url.path)
    pairs: dict[bytes, list[bytes]] = {}
    for name, value in request.query.pairs:
        pairs.setdefault(name, []).append(value)
    pairs[b"proxied"] = [b"true"]
    query = "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name in sorted(pairs) for value in pairs[name])
    return f"{path}?{query}"


def _forward(ops: Ops, request: Request, vid: int, host: str) -> Response:
    """GET (also for HEAD, as upstream does) to the peer with the client's headers, its answer passed on as it comes."""
    headers = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in request.raw_headers
        if name.lower() not in _NOT_FORWARDED
    ]
    # Go's client asks for gzip and unpacks it where its caller does not care
    unpack = b"accept-encoding" not in request.headers and b"range" not in request.headers
    if unpack:
        headers.append(("Accept-Encoding", "gzip"))
    try:
        response = _follow(ops, host, _target(request), headers)
    except PeerError as exc:
        ops.events.handler("failedReadProxyRequest")
        ops.cluster.invalidate(vid)
        log.info("request remote url %s://%s%s: %s", ops.peers.scheme, host, request.target_path, exc)
        return internal_error(ops)
    returned = [(name, value) for name, value in response.headers if name.lower() not in _NOT_RETURNED]
    length = response.length
    if length is None and response.header("content-length").isdigit():
        length = int(response.header("content-length"))
    gzipped = unpack and response.header("content-encoding").lower() == "gzip"
    if gzipped:
        returned = [(name, value) for name, value in returned if name.lower() != "content-encoding"]
        length = None
    if request.method == "HEAD" or response.status in (204, 304):
        response.close()
        return Response(response.status, returned, b"", length=length)
    return Response(response.status, returned, _Body(response, gzipped), length=length)


def _follow(ops: Ops, host: str, target: str, headers: list[tuple[str, str]]) -> PeerResponse:
    """One GET, following redirects as Go's client does. Raises PeerError."""
    for _ in range(MAX_REDIRECTS):
        response = ops.peers.request("GET", host, target, headers, dial_timeout_s=DIAL_S)
        location = response.header("location")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            return response
        response.read(_DRAIN_BYTES)
        url = urlsplit(location)
        if url.netloc:
            if url.netloc.rpartition(":")[0] != host.rpartition(":")[0]:
                headers = [(name, value) for name, value in headers if name.lower() not in _CREDENTIALS]
            host = url.netloc
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    raise PeerError(f"stopped after {MAX_REDIRECTS} redirects")


class _Body:
    """The peer's body, unpacked if need be; closing it gives the connection back or up."""

    def __init__(self, response: PeerResponse, gzipped: bool) -> None:
        self._response = response
        self._gzipped = gzipped

    def __iter__(self) -> Iterator[bytes]:
        return self._unpacked() if self._gzipped else self._as_it_comes()

    def _as_it_comes(self) -> Iterator[bytes]:
        try:
            yield from self._response.chunks(_PIECE_BYTES)
        except PeerError as exc:
            if self._response.length is None:
                raise  # chunked: only an exception tells the sender that the end is missing
            log.info("the peer's answer broke off: %s", exc)  # shorter than promised: the sender cuts the connection

    def _unpacked(self) -> Iterator[bytes]:
        unpacker = zlib.decompressobj(_GZIP_WINDOW)
        for piece in self._response.chunks(_PIECE_BYTES):
            data = piece
            while data:
                out = unpacker.decompress(data, _PIECE_BYTES)
                if out:
                    yield out
                data = unpacker.unconsumed_tail
                if unpacker.eof:
                    data = unpacker.unused_data
                    unpacker = zlib.decompressobj(_GZIP_WINDOW)

    def close(self) -> None:
        self._response.close()
