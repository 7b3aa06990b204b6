"""A request as the operations see it, and what they answer; no sockets, no WSGI. Must not import storage or server.

Header values and query texts are bytes: they need not be UTF-8, and Go compares bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyvolume.ops import gojson
from pyvolume.ops.auth import bearer_token

if TYPE_CHECKING:
    from pyvolume._native.http import UrlPath

Buffer = bytes | bytearray | memoryview

JSON_HEADERS = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))
TEXT_HEADERS = (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff"))

MAX_QUERY_PAIRS = 10_000  # Go's bound on the number of pairs


class _BadEscape(Exception):
    """Text of the first malformed percent escape."""


def _unescape(text: bytes) -> bytes:
    """Query unescaping: `+` is a blank, `%XX` a byte. Raises _BadEscape with Go's text."""
    if b"%" not in text:
        return text.replace(b"+", b" ") if b"+" in text else text
    pieces = text.replace(b"+", b" ").split(b"%")
    out = [pieces[0]]
    for at, piece in enumerate(pieces[1:], 1):
        try:
            if len(piece) < 2 or not piece[:2].isalnum():
                raise ValueError
            out.append(bytes((int(piece[:2], 16),)) + piece[2:])
        except ValueError:
            start = sum(len(earlier) + 1 for earlier in pieces[:at]) - 1
            shown = gojson.utf8(text[start : start + 3])
            quoted = shown.replace("\\", "\\\\").replace('"', '\\"')
            raise _BadEscape(f'invalid URL escape "{quoted}"') from None
    return b"".join(out)


def parse_query(raw: bytes) -> tuple[list[tuple[bytes, bytes]], str | None]:
    """The pairs that are well formed, and Go's text about the others (None: all are).

    Quirk of url.ParseQuery: a pair with a semicolon is dropped and its text wins over one about a bad escape.
    """
    pairs: list[tuple[bytes, bytes]] = []
    error: str | None = None
    if not raw:
        return pairs, None
    pieces = raw.split(b"&")
    if len(pieces) > MAX_QUERY_PAIRS:
        return pairs, "number of URL query parameters exceeded limit"
    for piece in pieces:
        if not piece:
            continue
        if b";" in piece:
            error = "invalid semicolon separator in query"
            continue
        name, _, value = piece.partition(b"=")
        try:
            pairs.append((_unescape(name), _unescape(value)))
        except _BadEscape as exc:
            if error is None:
                error = str(exc)
    return pairs, error


class Query:
    """The parameters of one query (or form): first value of a name counts."""

    __slots__ = ("error", "pairs", "values")

    def __init__(self, raw: bytes) -> None:
        self.pairs, self.error = parse_query(raw)
        self.values: dict[bytes, bytes] = {}
        for name, value in self.pairs:
            self.values.setdefault(name, value)

    def get(self, name: bytes) -> bytes:
        """The first value, b"" without."""
        return self.values.get(name, b"")


NO_QUERY = Query(b"")


class Unanswered(Exception):
    """The connection is to be closed without an answer: upstream dies on such a request (a dot before the comma)."""


@dataclass(slots=True)
class Request:
    """One request. `headers` maps lower-case names to their first value, blanks around it removed."""

    method: str
    target_path: bytes  # as sent, percent-encoded, without query
    raw_query: bytes
    headers: dict[bytes, bytes]
    url: UrlPath
    raw_headers: Sequence[tuple[bytes, bytes]] = ()
    peer_ip: str = ""
    request_id: str = ""
    body: Callable[[], Buffer] = bytes
    body_error: str | None = None  # why the body is shorter than promised, in Go's words
    admitted: bool = False  # the download limit was looked at when the head arrived
    client_gone: Callable[[], bool] = bool
    form_fields: Callable[[], dict[bytes, bytes]] | None = None  # of a multipart body, for reads and deletes
    _query: Query | None = None

    @property
    def query(self) -> Query:
        """The parsed URL query."""
        if self._query is None:
            self._query = Query(self.raw_query) if self.raw_query else NO_QUERY
        return self._query

    def header(self, name: bytes) -> bytes:
        """First value of a header by its lower-case name, b"" without."""
        return self.headers.get(name, b"")

    def value(self, name: bytes) -> bytes:
        """As Go's FormValue on a read or delete: the query, else a field of a multipart body."""
        if name in self.query.values:
            return self.query.values[name]
        if self.form_fields is not None:
            return self.form_fields().get(name, b"")
        return b""

    @property
    def pretty(self) -> bool:
        return bool(self.raw_query) and bool(self.query.get(b"pretty"))

    @property
    def token(self) -> str:
        """The JWT of the request, "" without (contract http.md 5.2)."""
        return bearer_token(
            self.query.get(b"jwt").decode("latin-1") if self.raw_query else "",
            self.header(b"authorization").decode("latin-1"),
            self._cookie_token,
        )

    def _cookie_token(self) -> str:
        for name, value in self.raw_headers:
            if name.lower() == b"cookie":
                for pair in value.split(b";"):
                    key, _, text = pair.strip().partition(b"=")
                    if key.strip() == b"AT":
                        return text.strip().strip(b'"').decode("latin-1")
        return ""


@dataclass(slots=True)
class Response:
    """An answer. `body` is bytes (then Content-Length is theirs) or an iterable that the sender closes.

    length: Content-Length of an iterable body, None to send it without (chunked). chunked: never give it a length, be
    it ever so short. `has` are lower-case names of common headers that `headers` holds already (a stored pair may set
    any of them).
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: Buffer | Iterable[Buffer] = b""
    length: int | None = None
    chunked: bool = False
    has: frozenset[str] = frozenset()
    close_connection: bool = False


def empty(status: int) -> Response:
    """No body, no Content-Type."""
    return Response(status)


def json_reply(request: Request, status: int, value: object) -> Response:
    return Response(status, list(JSON_HEADERS), gojson.dumps(value, request.pretty))


def json_error(request: Request, status: int, text: str) -> Response:
    """`{"error":"..."}`; the text may hold surrogate escapes."""
    return json_reply(request, status, {"error": text})


class Released:
    """An iterable body that calls `release` once when it was sent or given up."""

    __slots__ = ("_body", "_release")

    def __init__(self, body: Iterable[Buffer], release: Callable[[], None]) -> None:
        self._body = body
        self._release: Callable[[], None] | None = release

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._body)

    def close(self) -> None:
        release, self._release = self._release, None
        if release is None:
            return
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            release()
