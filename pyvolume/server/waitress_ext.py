"""The HTTP/1 wire: waitress, changed until it answers as Go's net/http does.

Role: accept connections, recognise request heads as Go does (or answer what Go answers to bad ones), take bodies in
within a budget, run the WSGI application on worker threads, put responses on the wire byte for byte as given.
This is the only module of the project that subclasses waitress internals, so waitress is pinned to one minor here.
It knows nothing of volumes, needles or tokens and must not import pyvolume.ops, pyvolume.storage or pyvolume._native.

What of waitress stays, and what is replaced, with the reason (the measured ones stand in ECOSYSTEM 2.1):

=============================  ======================================================================================
class here <- waitress         replaced, and why
=============================  ======================================================================================
VolumeHTTPServer               run(): epoll instead of poll() over every channel at each wake-up (idle connections then
  <- TcpWSGIServer             cost nothing, no limit of 1024 descriptors); accept: stops when descriptors run out;
                               maintenance: an exact idle timer instead of a sweep; stop(), adopt() do not exist there
Channel <- HTTPChannel         everything between socket and task: waitress reads ahead, answers 100-continue before the
                               application may refuse, spools bodies and responses through temporary files, and keeps a
                               worker blocked while a slow client reads
Exchange <- WSGITask           header names as given (no Title-Case, no sorting, no Via), keep-alive on 204 and 304, no
                               body on HEAD, Go's rules for Content-Length, chunks and Connection
Workers <- ThreadedTask-       a C queue instead of a condition variable, no log line per queued request
  Dispatcher
Trigger <- trigger             wake-ups are joined; thunks run outside its lock, so that a thunk may pull again
(none) <- HTTPRequestParser    replaced by functions below: waitress folds repeats, refuses lower-case methods and bare
                               LF, and accepts shapes that Go refuses
=============================  ======================================================================================

Threads. The *loop* thread (run()) owns every connection except those in state BUSY, which belong to one worker, the one
that holds the channel as its task. A worker hands a connection back by changing ``state`` under ``Channel.lock``; after
that it must not touch the channel. Only the loop closes sockets, and it serves the listener and the trigger after all
connection events of a round, so an event never meets a connection that took over the descriptor of another.
A response that the socket does not take goes to the loop (state FLUSH) and the worker is free; when the loop has sent
it, the channel is queued again for the next piece. So slow readers hold memory of one piece, never a thread.

Stances where Go accepts what is dangerous:
- Content-Length beside ``Transfer-Encoding: chunked``: served by the chunks as Go does, but the connection is closed
  after the answer and what follows on it is thrown away, so the two readings can never drift apart.
- obs-fold is accepted as in Go, except in Content-Length (400) and Transfer-Encoding (501).
- A bare LF inside chunk trailers is an error.
- More than 10,000 header lines are 431.
"""

from __future__ import annotations

import errno
import heapq
import importlib.metadata
import ipaddress
import itertools
import logging
import mmap
import os
import queue
import re
import resource
import select
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol
from urllib.parse import unquote_to_bytes

from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher, WSGITask
from waitress.trigger import trigger as _WaitressTrigger

__all__ = [
    "Admission",
    "BodyError",
    "Hold",
    "Refusal",
    "RequestHead",
    "Stats",
    "VolumeHTTPServer",
    "create_server",
]

_log = logging.getLogger("pyvolume.http")

Buffer = bytes | bytearray | memoryview
WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[Any]]

# ---------------------------------------------------------------------------------------------------------- constants

_WAITRESS_MINOR = (3, 0)
_WAITRESS_LEAST_PATCH = 2  # 3.0.1 fixed a loop at 100 % on half-open sockets, 3.0.2 the lookahead

HEAD_READ_BYTES = 4096  # Go's bufio: what it has not read when it refuses a head makes the kernel send a reset
MAX_HEAD_BYTES = (1 << 20) + 4096  # net/http DefaultMaxHeaderBytes plus its slop
MAX_HEAD_LINES = 10_000  # Go has no such limit, but a goroutine to spend: 350,000 would hold up this loop for 0.3 s
DRAIN_BYTES = 256 << 10  # net/http maxPostHandlerReadBytes: leftover body it reads to keep a connection
LINGER_S = 0.5  # net/http rstAvoidanceDelay: between FIN and close when bytes of the client are unread
AUTO_LENGTH_BYTES = 2048  # net/http bufferBeforeChunkingSize: shorter bodies get a Content-Length
OPTIONS_BODY_BYTES = 4096  # net/http reads that much of an OPTIONS * body
CHUNK_LINE_BYTES = 4096  # net/http/internal maxLineLength, and its limit for trailers
CHUNK_EXCESS_BYTES = 16 << 10  # overhead that net/http tolerates in a chunked body
BODY_READ_BYTES = 1 << 20  # at most this much of one body per round, so that others get their turn
MAP_BYTES = 8 << 20  # larger bodies in memory are mapped: filling a bytearray with zeros would hold up the loop
SCRATCH_BYTES = 256 << 10  # read size for bodies that go to a file or nowhere
FLUSH_BYTES = 16 << 10  # response pieces below this are joined before they are sent
SEND_BYTES = 1 << 20  # slice of a large piece per send, bounds the time in one system call
PATIENCE_MS = 10  # a worker waits this long for a full socket before it leaves the rest to the loop
ACCEPT_BATCH = 64
ACCEPT_RETRY_S = 0.25
PAUSE_LOG_S = 10.0
RELIEF_S = 1.0  # how often crowded bodies are looked through for slow ones
SLOW_BODY_BYTES_PER_S = 1 << 20  # slower bodies give way (to a file) when others wait for memory
MOST_STALE_TIMERS = 512  # cancelled ones that are kept whatever their share is
MAX_NOFILE = 1 << 20
MAX_CONNECTIONS = 65536

_IN = select.EPOLLIN | select.EPOLLRDHUP
_OUT = select.EPOLLOUT
_HANGUP = select.EPOLLRDHUP
_BROKEN = select.EPOLLERR | select.EPOLLHUP
_OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# states of a connection: the loop reads in the first two and writes in FLUSH; BUSY is with a worker
_HEAD, _BODY, _PARKED, _BUSY, _FLUSH, _LINGER, _CLOSED = range(7)

# how a connection goes on after an answer
_KEEP, _CLOSE, _CLOSE_AT_ONCE, _CLOSE_DRAINED, _CLOSE_LINGERING = range(5)

# framings of a response
_UNSET, _NO_BODY, _LENGTH, _SMALL, _CHUNKED, _TO_EOF = range(6)

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ERROR_TAIL = b"\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"

# net/http/status.go: Go's reasons, some differ from http.HTTPStatus
_REASONS = {
    100: "Continue", 101: "Switching Protocols", 102: "Processing", 103: "Early Hints",
    200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content",
    205: "Reset Content", 206: "Partial Content", 207: "Multi-Status", 208: "Already Reported", 226: "IM Used",
    300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
    305: "Use Proxy", 307: "Temporary Redirect", 308: "Permanent Redirect",
    400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 406: "Not Acceptable", 407: "Proxy Authentication Required", 408: "Request Timeout",
    409: "Conflict", 410: "Gone", 411: "Length Required", 412: "Precondition Failed", 413: "Request Entity Too Large",
    414: "Request URI Too Long", 415: "Unsupported Media Type", 416: "Requested Range Not Satisfiable",
    417: "Expectation Failed", 418: "I'm a teapot", 421: "Misdirected Request", 422: "Unprocessable Entity",
    423: "Locked", 424: "Failed Dependency", 425: "Too Early", 426: "Upgrade Required", 428: "Precondition Required",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 451: "Unavailable For Legal Reasons",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported", 506: "Variant Also Negotiates",
    507: "Insufficient Storage", 508: "Loop Detected", 510: "Not Extended", 511: "Network Authentication Required",
}  # fmt: skip


def _check_waitress(version: str) -> None:
    """Raises ImportError unless `version` is the waitress minor whose internals this module was written against."""
    numbers = [int(n) for n in re.findall(r"\d+", version)[:3]] + [0, 0, 0]
    if tuple(numbers[:2]) != _WAITRESS_MINOR or numbers[2] < _WAITRESS_LEAST_PATCH:
        raise ImportError(
            f"pyvolume needs waitress {_WAITRESS_MINOR[0]}.{_WAITRESS_MINOR[1]}.x with x >= {_WAITRESS_LEAST_PATCH}, "
            f"found {version}: pyvolume.server.waitress_ext subclasses its internals, which change between minors"
        )


_check_waitress(importlib.metadata.version("waitress"))


def status_line(code: int) -> str:
    """WSGI status text for a code with Go's reason ("499 status code 499" where Go knows none)."""
    reason = _REASONS.get(code)
    return f"{code} {reason}" if reason else f"{code:03d} status code {code}"


# ------------------------------------------------------------------------------------------------- interface to callers


class BodyError(OSError):
    """Why a request body is not what its head promised; str() is the text that Go's reader gives the handler."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class RequestHead:
    """One request head, as sent. Given to Admission.on_head and, as environ["pyvolume.head"], to the application.

    Attributes an admission may set while on_head runs:
      read_body   False: the application will not read the body. Up to 256 KiB of it are read and thrown away, then the
                  application runs and the connection is kept; a longer one, or one that waits for 100-continue, is not
                  read, the application runs at once and the answer says Connection: close (what Go does when a
                  handler does not read)
      keep_bytes  how many leading bytes of the body to keep (None: the server's max_body_bytes); the rest is read and
                  thrown away
      on_body     called on the loop thread with the size of each piece of a body *without* Content-Length
      on_end      callbacks, run once when the request is over: answered, refused, or the client lost. Thread: any;
                  must not block. When the response fits into one piece they run before its last byte is sent, as
                  deferred calls of a Go handler do
    """

    __slots__ = (
        "at_least_11",
        "chunked",
        "close",
        "content_length",
        "environ",
        "expect_continue",
        "expect_other",
        "headers",
        "host",
        "keep_bytes",
        "method",
        "on_body",
        "on_end",
        "path",
        "peer",
        "query",
        "read_body",
        "suspect",
        "target",
        "version",
        "wants_close",
        "wants_keep_alive_10",
    )

    method: bytes  # as sent
    target: bytes  # as sent
    version: tuple[int, int]
    headers: list[tuple[bytes, bytes]]  # order and case as sent, blanks around values cut
    content_length: int | None  # None: no such header, or a chunked body
    chunked: bool
    expect_continue: bool  # the client waits for 100 Continue before it sends the body
    peer: tuple[str, int]
    path: bytes  # path of the target as sent (still percent-encoded), also for absolute-form targets
    query: bytes  # what follows the first ?
    host: str  # of an absolute-form target, else of the Host header
    environ: dict[str, Any]  # CGI part of the WSGI environment; empty once that was given to the application
    read_body: bool
    keep_bytes: int | None
    on_body: Callable[[int], None] | None
    on_end: list[Callable[[], None]]
    at_least_11: bool
    close: bool  # net/http Request.Close
    wants_close: bool  # response.wantsClose
    wants_keep_alive_10: bool  # response.wants10KeepAlive
    expect_other: bool  # an Expect header that is not 100-continue
    suspect: bool  # Content-Length beside chunked: close afterwards

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.content_length)

    def get(self, name: bytes) -> bytes | None:
        """First value of a header, name in any case."""
        name = name.lower()
        for k, v in self.headers:
            if k.lower() == name:
                return v
        return None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A whole answer given before any byte of the body is asked for."""

    status: int | str
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


class Hold:
    """What on_head may return to decide later (an upload that waits for room). No thread is held meanwhile.

    The connection is not closed for idleness while held; whoever holds must decide in the end. admit() and refuse() may
    be called from any thread, the first call counts.

    `gone` turns True, and on_gone (set it before on_head returns) is called on the loop thread, when the client has
    closed its side, or when a request without a body has waited for the idle timeout: there Go cancels a request, so
    that a throttled read is answered 499 after 30 s although it might wait for 60 (seen). The answer still goes out.
    """

    __slots__ = ("_channel", "_decided", "_lock", "_refusal", "gone", "on_gone")

    def __init__(self) -> None:
        self.on_gone: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._decided = False
        self._refusal: Refusal | None = None
        self.gone = False

    def admit(self) -> None:
        self._decide(None)

    def refuse(self, refusal: Refusal) -> None:
        self._decide(refusal)

    def _decide(self, refusal: Refusal | None) -> None:
        with self._lock:
            if self._decided:
                return
            self._decided, self._refusal = True, refusal
            channel = self._channel
        if channel is not None:
            channel.server.call_soon(channel._hold_over)

    def _client_left(self) -> None:
        """Loop."""
        if self.gone:
            return
        self.gone = True
        if self.on_gone is not None and not self._decided:
            try:
                self.on_gone()
            except Exception:
                _log.exception("telling the holder of a request that its client has gone failed")

    def _bind(self, channel: Channel) -> bool:
        """Loop. True when the decision is still open."""
        with self._lock:
            self._channel = channel
            return not self._decided


class Admission(Protocol):
    def on_head(self, head: RequestHead) -> Refusal | Hold | None:
        """Called on the loop thread when a head has arrived, before any body byte is read or 100-continue sent.

        None admits. Must not block: no disk, no network, no lock held for long.
        """


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of counters (since start) and gauges of one server."""

    connections: int  # open now
    accepted: int
    adopted: int
    requests: int  # heads that were understood
    bad_heads: int
    refused: int
    idle_closed: int
    app_errors: int
    accept_pauses: int
    body_bytes_in_memory: int  # now
    bodies_waiting: int  # now: not read because of the memory budget
    bodies_spooled: int
    queued: int  # now: requests waiting for a worker


class _HeadError(Exception):
    """A head that is refused; `reply` is the whole answer, `linger` asks for FIN and a pause before the close."""

    def __init__(self, reply: bytes, linger: bool = False) -> None:
        super().__init__(reply)
        self.reply = reply
        self.linger = linger


def _plain_error(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 " + status + _ERROR_TAIL + body


_BAD_REQUEST = _plain_error(b"400 Bad Request", b"400 Bad Request")
_TOO_LARGE = _plain_error(b"431 Request Header Fields Too Large", b"431 Request Header Fields Too Large")
_UNSUPPORTED_TE = _plain_error(b"501 Not Implemented", b"Unsupported transfer encoding")


def _bad(text: bytes = b"") -> _HeadError:
    """net/http writes the reason of its own checks into status line and body, that of parse errors nowhere."""
    if not text:
        return _HeadError(_BAD_REQUEST)
    said = b"400 Bad Request: " + text
    return _HeadError(_plain_error(said, said))


_BAD_VERSION = b"505 HTTP Version Not Supported: unsupported protocol version"


# ------------------------------------------------------------------------------------------------------- request heads

_TOKEN = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
_TARGET = rb"\x00-\x20\x7f"
# the usual request line: origin-form, HTTP/1.x. Group 2 is the escaped path, 3 the query with its "?"
_match_request = re.compile(
    rb"([" + _TOKEN + rb"]+) (/[^" + _TARGET + rb"%?]*(?:%[0-9A-Fa-f]{2}[^" + _TARGET + rb"%?]*)*)"
    rb"(\?[^" + _TARGET + rb"]*)? HTTP/1\.([01])\r?\n"
).match
# any number of well-formed, unfolded fields and the empty line behind them
_match_fields = re.compile(rb"(?:[" + _TOKEN + rb"]+:[^\x00-\x08\x0a-\x1f\x7f]*\r?\n)*\r?\n").match
_find_fields = re.compile(
    rb"([" + _TOKEN + rb"]+):[ \t]*((?:[^ \t\x00-\x1f\x7f]+(?:[ \t]+[^ \t\x00-\x1f\x7f]+)*)?)[ \t]*\r?\n"
).findall
# lines that may stand in a head, however odd: used to refuse early while a head is still arriving
_match_lines = re.compile(rb"(?:(?:[" + _TOKEN + rb" ]+:|[ \t])[^\x00-\x08\x0a-\x1f\x7f]*\r?\n)*").match
_is_token = re.compile(rb"[" + _TOKEN + rb"]+").fullmatch
_is_loose_name = re.compile(rb"[" + _TOKEN + rb" ]+").fullmatch
_has_bad_value = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search
_has_control = re.compile(rb"[\x00-\x1f\x7f]").search
_has_bad_escape = re.compile(rb"%(?![0-9A-Fa-f]{2})").search
_is_host = re.compile(rb"[0-9A-Za-z!$%&'()*+,\-.:;=\[\]_~]*").fullmatch
_is_version = re.compile(rb"HTTP/([0-9])\.([0-9])").fullmatch
_match_scheme = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*):").match
_is_url_host = re.compile(rb"(?:[A-Za-z0-9\-_.~!$&'()*+,;=:\[\]<>\"\x80-\xff]|%[89A-Fa-f][0-9A-Fa-f]|%25)*").fullmatch
_is_userinfo = re.compile(rb"[A-Za-z0-9\-._:~!$&'()*+,;=%@]*").fullmatch
_is_port = re.compile(rb"(?::[0-9]*)?").fullmatch

# what _scan_fields found beyond the usual
_ODD_NAME, _FOLDED_CODING = 1, 2
_CGI_NAMES = frozenset(("CONTENT_TYPE", "CONTENT_LENGTH"))
_env_keys: dict[bytes, str] = {}  # header name as sent -> environ key; bounded, clients choose names


def _env_key(name: bytes) -> str:
    """CGI key of a header name; "" for names with an underscore, which would pass for another header there."""
    if b"_" in name:
        key = ""
    else:
        key = name.decode("latin-1").upper().replace("-", "_")
        if key not in _CGI_NAMES:
            key = "HTTP_" + key
    if len(_env_keys) < 1024:
        _env_keys[name] = key
    return key


def _has_token(value: str, token: str) -> bool:
    """net/http header.go hasToken: `token` bounded by blanks and commas somewhere in `value`."""
    return token in re.split(r"[ ,\t]", value.lower())


def _lists_token(values: Iterable[str], token: str) -> bool:
    """httpguts.HeaderValuesContainsToken: an element of the comma lists."""
    return any(token == part.strip(" \t").lower() for value in values for part in value.split(","))


def _parse_authority(scheme: bytes, authority: bytes) -> bytes:
    """Host of an absolute-form target after the checks of net/url; raises _HeadError."""
    userinfo, at, host = authority.rpartition(b"@")
    if at and (_is_userinfo(userinfo) is None or _has_bad_escape(userinfo)):
        raise _bad()
    bracket = host.rfind(b"[")
    if bracket > 0:
        raise _bad()
    if bracket == 0:
        end = host.rfind(b"]")
        if end < 0 or _is_port(host[end + 1 :]) is None:
            raise _bad()
        literal = host[1:end]
        address, zone, _ = literal.partition(b"%25")
        if _is_url_host(literal) is None:
            raise _bad()
        try:
            ipaddress.IPv6Address(unquote_to_bytes(address).decode("latin-1"))
        except ValueError:
            raise _bad() from None
        return b"[" + unquote_to_bytes(literal) + b"]" + host[end + 1 :] if zone else host
    colon = host.find(b":")
    if colon >= 0:
        if scheme not in (b"http", b"https"):
            colon = host.rfind(b":")
        if _is_port(host[colon:]) is None:
            raise _bad()
    if _is_url_host(host) is None:
        raise _bad()
    return unquote_to_bytes(host)


def _parse_target(method: bytes, target: bytes) -> tuple[bytes, bytes, bytes]:
    """(escaped path, query, host) of any target, as url.ParseRequestURI sees it; raises _HeadError."""
    if _has_control(target):
        raise _bad()
    if target == b"*":
        return b"*", b"", b""
    text = target
    if method == b"CONNECT" and target[:1] != b"/":
        text = b"http://" + target  # authority-form
    if not text or text[:1] == b":":
        raise _bad()
    scheme = b""
    m = _match_scheme(text)
    if m is not None:
        scheme = m.group(1).lower()
        text = text[m.end() :]
    rest, _, query = text.partition(b"?")
    if rest[:1] != b"/":
        if scheme:
            return b"", query, b""  # opaque: Go leaves the path empty
        raise _bad()
    host = b""
    if scheme and rest[:2] == b"//":
        authority, slash, tail = rest[2:].partition(b"/")
        host = _parse_authority(scheme, authority)
        rest = slash + tail
    if _has_bad_escape(rest):
        raise _bad()
    return rest, query, host


def _split_request_line(line: bytes) -> tuple[bytes, bytes, int, int]:
    """(method, target, major, minor); raises _HeadError."""
    parts = line.split(b" ", 2)
    if len(parts) != 3:
        raise _bad()
    method, target, proto = parts
    version = _is_version(proto)
    if _is_token(method) is None or version is None:
        raise _bad()
    return method, target, int(version.group(1)), int(version.group(2))


def _end_of_head(buf: bytes | bytearray, start: int) -> int:
    """Index behind the empty line that ends a head, or -1; looks from `start` on."""
    start = max(0, start - 3)
    a = buf.find(b"\n\r\n", start)
    b = buf.find(b"\n\n", start)
    if a < 0:
        return b + 2 if b >= 0 else -1
    return a + 3 if b < 0 or a < b else b + 2


def _scan_fields(lines: list[bytes]) -> tuple[list[tuple[bytes, bytes]], int]:
    """Fields of a head by textproto's rules (folding, loose names); and flags: a name that is no token, a folded
    Transfer-Encoding.

    `lines` are those behind the request line, without line ends, the last one empty. Raises _HeadError.
    """
    fields: list[tuple[bytes, bytes]] = []
    odd = 0
    if lines[0][:1] in (b" ", b"\t"):
        raise _bad()
    i, n = 0, len(lines)
    while i < n and lines[i]:
        line = lines[i]
        if b":" not in line:
            raise _bad()
        text = line.strip(b" \t")
        i += 1
        begin = i
        while i < n and lines[i][:1] in (b" ", b"\t"):
            i += 1
        folded = i > begin
        if folded:
            text = b" ".join([text, *(line.strip(b" \t") for line in lines[begin:i])])
        name, _, value = text.partition(b":")
        if _is_loose_name(name) is None or _has_bad_value(value):
            raise _bad()
        if b" " in name:
            odd |= _ODD_NAME
        elif folded:  # stance: no folding where it decides where the message ends
            lower = name.lower()
            if lower == b"content-length":
                raise _bad()
            if lower == b"transfer-encoding":
                odd |= _FOLDED_CODING
        fields.append((name, value.lstrip(b" \t")))
    return fields, odd


def _parse_usual(data: bytes, peer: tuple[str, int], base: dict[str, Any]) -> tuple[RequestHead, int] | None:
    """The head at the front of `data` and its end, if all of it is there and has the usual shape; else None."""
    m = _match_request(data)
    if m is None:
        return None
    start = m.end()
    fields = _match_fields(data, start)
    if fields is None:
        return None
    end = fields.end()
    method, path, query, minor = m.groups()
    if query is None:
        target, query = path, b""
    else:
        target, query = path + query, query[1:]
    return _make_head(
        base,
        peer,
        method,
        target,
        path,
        query,
        b"",
        1,
        1 if minor == b"1" else 0,
        _find_fields(data, start, end),
        0,
    ), end


def parse_head(data: bytes, peer: tuple[str, int], base: dict[str, Any]) -> RequestHead:
    """Understands one complete head as net/http's readRequest does; raises _HeadError with the answer Go gives.

    `base` is the part of the WSGI environment that all requests share. Pure: no I/O.
    """
    usual = _parse_usual(data, peer, base)
    if usual is not None:
        return usual[0]
    lines = [line[:-1] if line[-1:] == b"\r" else line for line in data.split(b"\n")]
    method, target, major, minor = _split_request_line(lines[0])
    path, query, host = _parse_target(method, target)
    fields, odd = _scan_fields(lines[1:])
    return _make_head(base, peer, method, target, path, query, host, major, minor, fields, odd)


def _make_head(
    base: dict[str, Any],
    peer: tuple[str, int],
    method: bytes,
    target: bytes,
    path: bytes,
    query: bytes,
    url_host: bytes,
    major: int,
    minor: int,
    fields: list[tuple[bytes, bytes]],
    odd: int,
) -> RequestHead:
    """Framing and connection rules of net/http (readTransfer, conn.readRequest), in its order of checks."""
    environ = base.copy()
    keys = _env_keys
    repeated = False
    for name, value in fields:
        key = keys.get(name)
        if key is None:
            key = _env_key(name)
        if key in environ:
            repeated = True
        elif key:
            environ[key] = value.decode("latin-1")

    at_least_11 = minor >= 1 if major == 1 else major > 1
    connection = environ.get("HTTP_CONNECTION")
    connections: tuple[str, ...] = () if connection is None else (connection,)
    coding = environ.pop("HTTP_TRANSFER_ENCODING", None)
    length_text = environ.get("CONTENT_LENGTH")
    length: int | None = None
    lengths = 1
    chunked = False
    if repeated:
        many: dict[str, list[str]] = {}
        for name, value in fields:
            key = _env_key(name)
            if key in ("HTTP_HOST", "HTTP_TRANSFER_ENCODING", "CONTENT_LENGTH", "HTTP_CONNECTION", "HTTP_COOKIE"):
                many.setdefault(key, []).append(value.decode("latin-1"))
        if len(many.get("HTTP_HOST", ())) > 1:
            raise _bad()
        if at_least_11 and len(many.get("HTTP_TRANSFER_ENCODING", ())) > 1:
            raise _HeadError(_UNSUPPORTED_TE)
        lengths = len(set(many.get("CONTENT_LENGTH", ())))
        connections = tuple(many.get("HTTP_CONNECTION", ()))
        if len(many.get("HTTP_COOKIE", ())) > 1:
            environ["HTTP_COOKIE"] = "; ".join(many["HTTP_COOKIE"])
    if coding is not None and at_least_11:  # Go ignores it on 1.0
        if coding.lower() != "chunked" or odd & _FOLDED_CODING:
            raise _HeadError(_UNSUPPORTED_TE)
        chunked = True
    if length_text is not None:
        digits = length_text.lstrip("0")
        if lengths > 1 or not (length_text.isascii() and length_text.isdigit()) or len(digits) > 19:
            raise _bad()
        length = int(digits or "0")
        if length >= 1 << 63:
            raise _bad()
    suspect = chunked and length is not None
    if chunked:
        length = None
        environ.pop("CONTENT_LENGTH", None)
        trailer = environ.get("HTTP_TRAILER")
        if trailer is not None and any(
            _lists_token((trailer,), banned) for banned in ("transfer-encoding", "trailer", "content-length")
        ):
            raise _bad()
    if major != 1 and not (major == 2 and minor == 0 and method == b"PRI" and target == b"*"):
        raise _HeadError(_plain_error(_BAD_VERSION, _BAD_VERSION))
    host = environ.get("HTTP_HOST")
    if host is None:
        preface = major == 2 and not fields
        if at_least_11 and method != b"CONNECT" and not preface:
            raise _bad(b"missing required Host header")
        host = ""
    elif _is_host(host.encode("latin-1")) is None:
        raise _bad(b"malformed Host header")
    if odd & _ODD_NAME:
        raise _bad(b"invalid header name")
    if url_host:
        host = environ["HTTP_HOST"] = url_host.decode("latin-1")

    head = RequestHead()
    head.method = method
    head.target = target
    head.version = (major, minor)
    head.headers = fields
    head.content_length = length
    head.chunked = chunked
    head.peer = peer
    head.path = path
    head.query = query
    head.host = host
    head.environ = environ
    head.read_body = True
    head.keep_bytes = None
    head.on_body = None
    head.on_end = []
    head.at_least_11 = at_least_11
    head.suspect = suspect
    if connection is None:
        head.close = head.wants_close = not at_least_11
        head.wants_keep_alive_10 = False
    else:
        closes = _lists_token(connections, "close")
        if major == 1 and minor == 0:
            head.close = closes or not _lists_token(connections, "keep-alive")
            head.wants_keep_alive_10 = _has_token(connection, "keep-alive")
        else:
            head.close = closes
            head.wants_keep_alive_10 = False
        head.wants_close = head.close or _has_token(connection, "close")
    expect = environ.get("HTTP_EXPECT")
    if expect:
        continues = _has_token(expect, "100-continue")
        head.expect_other = not continues
        head.expect_continue = continues and at_least_11 and (chunked or bool(length))
    else:
        head.expect_continue = head.expect_other = False

    environ["REQUEST_METHOD"] = method.decode("latin-1")
    environ["PATH_INFO"] = (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1")
    environ["QUERY_STRING"] = query.decode("latin-1")
    environ["REQUEST_URI"] = target.decode("latin-1")
    environ["SERVER_PROTOCOL"] = f"HTTP/{major}.{minor}"
    environ["REMOTE_ADDR"] = peer[0]
    environ["REMOTE_PORT"] = str(peer[1])
    environ["pyvolume.peer_ip"] = peer[0]
    environ["pyvolume.raw_target"] = target
    environ["pyvolume.raw_path"] = path
    environ["pyvolume.raw_headers"] = fields
    return head


# ------------------------------------------------------------------------------------------------------ request bodies


def _go_quote(text: bytes) -> str:
    """%q of fmt for bytes, as far as error texts need it."""
    out = []
    for c in text:
        if c in b'"\\':
            out.append("\\" + chr(c))
        elif 0x20 <= c < 0x7F:
            out.append(chr(c))
        else:
            out.append({9: "\\t", 10: "\\n", 13: "\\r"}.get(c, f"\\x{c:02x}"))
    return '"' + "".join(out) + '"'


class Chunks:
    """Decoder of a chunked body with the strictness and the error texts of net/http/internal. No I/O.

    feed() takes bytes as they come and hands the payload to `sink`; `done` turns True behind the trailers.
    """

    __slots__ = ("_line", "_phase", "done", "excess", "left")

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self) -> None:
        self._phase = self._SIZE
        self._line = bytearray()
        self.left = 0  # of the current chunk
        self.excess = 0
        self.done = False

    def feed(self, data: bytes, sink: Callable[[Buffer], None]) -> int:
        """Returns how many bytes of `data` belong to the body; raises BodyError."""
        view = memoryview(data)
        pos, size = 0, len(data)
        while pos < size and not self.done:
            phase = self._phase
            if phase == self._DATA:
                take = min(self.left, size - pos)
                sink(view[pos : pos + take])
                pos += take
                self.left -= take
                if not self.left:
                    self._phase = self._DATA_END
            elif phase == self._SIZE:
                end = data.find(b"\n", pos)
                stop = size if end < 0 else end + 1
                self._line += view[pos:stop]
                pos = stop
                if len(self._line) > CHUNK_LINE_BYTES or (end < 0 and len(self._line) == CHUNK_LINE_BYTES):
                    raise BodyError("header line too long")
                if end >= 0:
                    self._begin(bytes(self._line))
                    self._line.clear()
            elif phase == self._DATA_END:
                take = min(2 - len(self._line), size - pos)
                self._line += view[pos : pos + take]
                pos += take
                if len(self._line) == 2:
                    if self._line != b"\r\n":
                        raise BodyError("malformed chunked encoding")
                    self._line.clear()
                    self._phase = self._SIZE
            else:
                pos += self._trailer(data, pos)
        return pos

    def _begin(self, line: bytes) -> None:
        cr = line.find(b"\r")
        if cr < 0:
            raise BodyError("chunked line ends with bare LF")
        if cr != len(line) - 2:
            raise BodyError("invalid CR in chunked line")
        line = line[:-2]
        self.excess += len(line) + 2
        digits = line.rstrip(b" \t").partition(b";")[0]
        if not digits:
            raise BodyError("empty hex number for chunk length")
        for i, c in enumerate(digits):
            if c not in b"0123456789abcdefABCDEF":
                raise BodyError("invalid byte in chunk length")
            if i == 16:
                raise BodyError("http chunk length too large")
        self.left = int(digits, 16)
        self.excess = max(self.excess - 16 - 2 * self.left, 0)
        if self.left == 0:
            self._phase = self._TRAILER
        elif self.excess > CHUNK_EXCESS_BYTES:
            raise BodyError("chunked encoding contains too much non-data")
        else:
            self._phase = self._DATA

    def _trailer(self, data: bytes, pos: int) -> int:
        """Takes trailer bytes; they are checked and dropped, upstream never looks at them."""
        line = self._line
        before = len(line)
        line += data[pos : pos + CHUNK_LINE_BYTES - before]
        if line[:2] == b"\r\n":
            self.done = True
            return 2 - before
        end = line.find(b"\r\n\r\n")
        if end < 0:
            if len(line) >= CHUNK_LINE_BYTES:
                raise BodyError("http: suspiciously long trailer after chunked body")
            return len(line) - before
        for field in bytes(line[:end]).split(b"\r\n"):
            if b":" not in field:
                raise BodyError("malformed MIME header: missing colon: " + _go_quote(field))
            name, _, value = field.partition(b":")
            if _is_loose_name(name) is None or _has_bad_value(value):
                raise BodyError("malformed MIME header line: " + _go_quote(field))
        self.done = True
        return end + 4 - before

    def eof(self) -> BodyError:
        """The error for an end of input here."""
        if self._phase == self._TRAILER:
            if len(self._line) < 2:
                return BodyError("http: unexpected EOF reading trailer")
            return BodyError("http: suspiciously long trailer after chunked body")
        return BodyError("unexpected EOF")


class _Input:
    """wsgi.input over a body in memory: seekable, bounded; raises the body's error where the bytes run out."""

    def __init__(self, view: memoryview, error: BodyError | None = None) -> None:
        self._view = view
        self._pos = 0
        self._error = error

    def _end(self, size: int | None) -> int:
        total = len(self._view)
        if size is None or size < 0 or size > total - self._pos:
            if self._error is not None and (self._pos >= total or size is None or size < 0):
                raise self._error
            return total
        return self._pos + size

    def read(self, size: int | None = -1) -> bytes:
        if size == 0:
            return b""
        end = self._end(size)
        data = bytes(self._view[self._pos : end])
        self._pos = end
        return data

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        end = self._end(len(target)) if len(target) else self._pos
        n = end - self._pos
        target[:n] = self._view[self._pos : end]
        self._pos = end
        return n

    def readline(self, size: int | None = -1) -> bytes:
        pos, total = self._pos, len(self._view)
        limit = total if size is None or size < 0 else min(total, pos + size)
        out = b""
        while pos < limit:
            part = bytes(self._view[pos : min(limit, pos + 8192)])
            nl = part.find(b"\n")
            if nl >= 0:
                out += part[: nl + 1]
                self._pos = pos + nl + 1
                return out
            out += part
            pos += len(part)
        if not out and size != 0 and self._error is not None:
            raise self._error
        self._pos = pos
        return out

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._pos, os.SEEK_END: len(self._view)}[whence]
        self._pos = min(max(0, start + offset), len(self._view))
        return self._pos

    def tell(self) -> int:
        return self._pos

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to free here: the body belongs to the request."""


class _SpooledInput(_Input):
    """The same over a temporary file (bodies beyond the memory threshold)."""

    def __init__(self, file: IO[bytes], size: int, error: BodyError | None) -> None:
        super().__init__(memoryview(b""), error)
        self._file = file
        self._size = size
        file.seek(0)

    def _end(self, size: int | None) -> int:
        at = self._file.tell()
        if size is None or size < 0 or size > self._size - at:
            if self._error is not None and (at >= self._size or size is None or size < 0):
                raise self._error
            return self._size - at
        return size

    def read(self, size: int | None = -1) -> bytes:
        return self._file.read(self._end(size)) if size != 0 else b""

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        if not len(target):
            return 0
        return int(self._file.readinto(target[: self._end(len(target))]))  # type: ignore[attr-defined]

    def readline(self, size: int | None = -1) -> bytes:
        line = self._file.readline(-1 if size is None else size)
        if not line and size != 0 and self._error is not None:
            raise self._error
        return line

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


_SPENT: dict[str, Any] = {}
_NO_INPUT = _Input(memoryview(b""))  # its position never moves: one serves all requests without a body


class _Budget:
    """Bytes of request bodies in memory, over all connections of a server."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            return True

    def give(self, size: int) -> None:
        with self._lock:
            self.used -= size


class _Body:
    """The body of one request while it arrives. Loop thread until complete, then the worker's."""

    __slots__ = ("_budget", "_directory", "_most", "chunks", "data", "error", "file", "keep", "kept", "left", "on_body",
                 "received", "reserved", "since", "view")  # fmt: skip

    def __init__(self, budget: _Budget, most: int, directory: str | None) -> None:
        self._budget = budget
        self._most = most  # larger ones go to a file in `directory`
        self._directory = directory
        self.chunks: Chunks | None = None
        self.data: bytearray | mmap.mmap = bytearray()
        self.view: memoryview | None = None  # over data, when the size was known beforehand
        self.file: IO[bytes] | None = None
        self.keep = 0
        self.kept = 0
        self.left = 0  # of Content-Length
        self.received = 0
        self.reserved = 0
        self.error: BodyError | None = None
        self.on_body: Callable[[int], None] | None = None
        self.since = 0.0

    def expect(self, length: int, keep: int) -> bool:
        """A body of known length. False: no room for it now, ask again later."""
        self.left = length
        self.keep = keep = min(length, keep)
        if keep > self._most:
            self.open_file()
        elif keep:
            if not self._budget.take(keep):
                return False
            self.reserved = keep
        return True

    def expect_chunks(self, keep: int, on_body: Callable[[int], None] | None) -> None:
        self.chunks = Chunks()
        self.keep = keep
        self.on_body = on_body

    def open_file(self) -> None:
        self.file = tempfile.TemporaryFile("w+b", prefix="pyvolume-body-", dir=self._directory)  # noqa: SIM115

    def window(self) -> memoryview | None:
        """Where the next bytes of a body of known length may be received without a copy."""
        if self.file is not None or self.kept >= self.keep:
            return None
        if self.view is None:
            if self.keep > MAP_BYTES:
                self.data = mmap.mmap(-1, self.keep, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                self.data = bytearray(self.keep)
            self.view = memoryview(self.data)
        return self.view[self.kept : self.kept + BODY_READ_BYTES]

    def took(self, size: int) -> None:
        """`size` bytes were received into window()."""
        self.kept += size
        self.received += size
        self.left -= size

    def write(self, piece: Buffer) -> None:
        """Keeps a piece as far as keep allows. May raise OSError from the temporary file."""
        size = len(piece)
        self.received += size
        if self.chunks is None:
            self.left -= size
        elif self.on_body is not None:
            self.on_body(size)
        room = self.keep - self.kept
        if room <= 0:
            return
        if size > room:
            piece = piece[:room]
            size = room
        if self.file is None:
            if self.chunks is None:
                window = self.window()
                assert window is not None
                assert self.view is not None
                self.view[self.kept : self.kept + size] = piece
                self.kept += size
                return
            if self.kept + size <= self._most and self._budget.take(size):
                self.reserved += size
                assert isinstance(self.data, bytearray)
                self.data += piece
                self.kept += size
                return
            self.spill()
        assert self.file is not None
        self.file.write(piece)
        self.kept += size

    def spill(self) -> None:
        """Moves what has arrived to a file and gives its memory back."""
        self.open_file()
        assert self.file is not None
        if self.view is not None:
            self.file.write(self.view[: self.kept])
            self.view.release()
            self.view = None
        else:
            self.file.write(self.data)
        self.data = bytearray()
        self.give_back()

    def give_back(self) -> None:
        if self.reserved:
            self._budget.give(self.reserved)
            self.reserved = 0

    def whole(self) -> memoryview | None:
        """All kept bytes without a copy, None when they are in a file."""
        if self.file is not None:
            return None
        return memoryview(self.data)[: self.kept].toreadonly()

    def open_input(self) -> _Input:
        if self.file is not None:
            return _SpooledInput(self.file, self.kept, self.error)
        return _Input(memoryview(self.data)[: self.kept].toreadonly(), self.error)

    def close(self) -> None:
        """The request is over. Views that the application still holds stay valid, but are no longer counted."""
        self.give_back()
        self.data = bytearray()
        self.view = None
        if self.file is not None:
            file, self.file = self.file, None
            try:
                file.close()
            except OSError:  # a flush that failed: nobody wants the bytes any more
                _log.debug("closing a spooled body failed", exc_info=True)


# ----------------------------------------------------------------------------------------------------- response heads

_ORDINARY, _K_LENGTH, _K_CONNECTION, _K_CODING, _K_DATE, _K_TYPE, _K_INVALID = range(7)
_NAME_KINDS = {
    "content-length": _K_LENGTH,
    "connection": _K_CONNECTION,
    "transfer-encoding": _K_CODING,
    "date": _K_DATE,
    "content-type": _K_TYPE,
}
_kinds: dict[str, int] = {}  # response header name -> kind; bounded


def _kind_of(name: str) -> int:
    kind = _NAME_KINDS.get(name.lower(), _ORDINARY)
    if not name.isascii() or _is_token(name.encode("ascii")) is None:
        kind = _K_INVALID
    if len(_kinds) < 1024:
        _kinds[name] = kind
    return kind


_date_cache = (0, "")


def http_date() -> str:
    """Now, as an IMF date; made once a second."""
    global _date_cache  # noqa: PLW0603 - a tuple swapped whole, so that threads never see half of it
    now = int(time.time())
    stamp, text = _date_cache
    if stamp != now:
        t = time.gmtime(now)
        day = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[t.tm_wday]
        month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[t.tm_mon - 1]
        text = f"{day}, {t.tm_mday:02d} {month} {t.tm_year} {t.tm_hour:02d}:{t.tm_min:02d}:{t.tm_sec:02d} GMT"
        _date_cache = (now, text)
    return text


def render_head(
    head: RequestHead,
    status: str,
    headers: Iterable[tuple[str, str]],
    total: int | None,
    force_close: bool,
    stopping: bool,
) -> tuple[bytes, int, int, bool]:
    """Status line and headers by the rules of net/http's chunkWriter.writeHeader.

    total: length of the whole body if it is already known to be complete, else None.
    Returns (bytes, framing, content length or -1, whether the connection is to be closed afterwards).
    """
    code = status[:3]
    no_body = code in ("204", "304") or code[:1] == "1"
    is_head = head.method == b"HEAD"
    at_least_11 = head.at_least_11
    length = -1
    connection: str | None = None
    dated = False
    lines = [("HTTP/1.1 " if at_least_11 else "HTTP/1.0 ") + status]
    kinds = _kinds
    for name, value in headers:
        kind = kinds.get(name)
        if kind is None:
            kind = _kind_of(name)
        if kind == _ORDINARY:
            lines.append(f"{name}: {value}")
        elif kind == _K_TYPE:
            if not no_body:
                lines.append(f"{name}: {value}")
        elif kind == _K_LENGTH:
            text = value.strip()
            if length < 0 and text.isascii() and text.isdigit():
                length = int(text)
                if not no_body:
                    lines.append(f"{name}: {text}")
        elif kind == _K_CONNECTION:
            if connection is None:
                connection = value.strip()
        elif kind == _K_DATE:
            dated = True
            lines.append(f"{name}: {value}")
        # _K_CODING: framing is decided here; _K_INVALID: Go drops names that are no tokens
    if not dated:
        lines.append("Date: " + http_date())
    if length < 0 and total is not None and not no_body and (total > 0 or not is_head):
        length = total
        lines.append(f"Content-Length: {total}")

    close = force_close or stopping or connection == "close"
    said = connection
    if head.wants_keep_alive_10 and (is_head or length >= 0 or no_body):
        if connection is None:
            said = "keep-alive"
    elif not at_least_11 or head.wants_close:
        close = True
    coding = False
    if no_body or is_head:
        framing = _NO_BODY
    elif length >= 0:
        framing = _LENGTH
    elif at_least_11:
        framing, coding = _CHUNKED, True
    else:
        framing, close = _TO_EOF, True
    if close:
        if said is not None and (stopping or not _has_token(said, "close")):
            said = None
        if at_least_11 and said is None:
            said = "close"
    if said is not None:
        lines.append("Connection: " + said)
    if coding:
        lines.append("Transfer-Encoding: chunked")
    text = "\r\n".join(lines)
    breaks = len(lines) - 1
    if text.count("\n") != breaks or text.count("\r") != breaks:  # Go turns line ends in values into blanks
        text = "\r\n".join([line.replace("\r", " ").replace("\n", " ") for line in lines])
    return (text + "\r\n\r\n").encode("latin-1"), framing, length, close


# ------------------------------------------------------------------------------------------------------------ exchange


class Exchange(WSGITask):  # type: ignore[misc]
    """One request that was given to the application, and its response. Belongs to the worker that runs it."""

    def __init__(self, channel: Channel, head: RequestHead, body: _Body | None) -> None:
        # not WSGITask.__init__: it copies the version into its own scheme and nothing else that is used here
        self.channel = channel
        self.request = head
        self.environ = head.environ
        self.body = body
        self.status = ""
        self.response_headers: list[tuple[str, str]] = []
        self.declared = False  # the application gave a Content-Length
        self.chunks: Iterator[Any] | None = None
        self.app_iter: Any = None
        self.exhausted = False
        self.framing = _UNSET
        self.length = -1
        self.written = 0
        self.small: list[bytes] = []
        self.parts: list[Buffer] = []
        self.size = 0  # of parts
        self.sending = False  # something has gone to the socket
        self.force_close = False
        self.close = False
        self.broken = False
        self.leftover = _CLOSE  # how to end when the connection closes: the body may be unread

    # -- the application's side

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[Buffer], None]:
        if exc_info is not None:
            try:
                if self.framing not in (_UNSET, _SMALL):
                    raise exc_info[1]
            finally:
                exc_info = None
        elif self.status:
            raise AssertionError("start_response called a second time without exc_info")
        if "\n" in status or "\r" in status:
            raise ValueError("line end in the status")
        self.status = status
        self.response_headers = headers
        self.declared = any(len(name) == 14 and name.lower() == "content-length" for name, _ in headers)
        return self.write

    def write(self, data: Buffer) -> None:
        """The imperative writer of WSGI: blocks until the socket has taken the data."""
        if data:
            self._feed(data)
        self._render(None)
        if self.parts:
            parts = self._take_parts()
            self.sending = True
            self.channel._push_blocking(parts)

    # -- the worker's side

    def advance(self) -> bool:
        """Runs the application, or goes on with its response. False: the channel was left to the loop meanwhile."""
        try:
            if self.chunks is None:
                app_iter = self.app_iter = self.channel.server.application(self.environ, self.start_response)
                self.chunks = iter(app_iter)
            if not self.exhausted:
                for chunk in self.chunks:
                    if chunk:
                        self._feed(chunk)
                        if self.size >= FLUSH_BYTES and not self._flush():
                            return False
                self.exhausted = True
                self._seal()
                if not self.sending:
                    self.finish_app()  # as a Go handler is over before its buffered answer is flushed
                if self.parts and not self._flush():
                    return False
        except ClientDisconnected:
            raise
        except Exception:
            self.channel.server.app_failed()
            _log.exception("%s %s failed", self.environ["REQUEST_METHOD"], self.environ["REQUEST_URI"])
            if self.sending:
                self.broken = True  # a part is out: cutting the connection is the only honest end
            else:
                self.exhausted = True
                self._replace_by_500()
                self.finish_app()
                if not self._flush():
                    return False
        self.finish_app()
        return True

    def finish_app(self) -> None:
        """Ends what the request holds: the iterable, the body, the callbacks. Runs once, whatever happened."""
        self.chunks = iter(())
        app_iter, self.app_iter = self.app_iter, None
        if app_iter is not None and hasattr(app_iter, "close"):
            try:
                app_iter.close()
            except Exception:
                self.channel.server.app_failed()
                _log.exception("closing the response of %s failed", self.environ["REQUEST_URI"])
        body, self.body = self.body, None
        self.channel.server.release(self.request, body)

    def ending(self) -> int:
        if self.broken or (self.framing == _LENGTH and self.written != self.length):
            return _CLOSE
        if self.close:
            return self.leftover
        return _CLOSE if self.request.suspect else _KEEP

    # -- framing

    def _feed(self, chunk: Any) -> None:
        if not self.status:
            raise AssertionError("a body before start_response")
        if type(chunk) is not bytes:
            chunk = memoryview(chunk)
            if chunk.ndim != 1 or chunk.itemsize != 1:
                chunk = chunk.cast("B")
        if self.framing == _UNSET:
            if self.declared:
                self._render(None)
            else:
                self.framing = _SMALL
        size = len(chunk)
        framing = self.framing
        if framing == _LENGTH:
            room = self.length - self.written
            if size > room:
                _log.warning("%s: body longer than its Content-Length", self.environ["REQUEST_URI"])
                chunk, size = chunk[:room], room
            self.written += size
            if size:
                self._append(chunk, size)
        elif framing == _SMALL:
            self.written += size
            if self.written <= AUTO_LENGTH_BYTES:
                self.small.append(bytes(chunk))
            else:
                self._render(None)
                if self.framing != _NO_BODY:
                    self._emit(chunk, size)
        else:
            self.written += size
            if framing != _NO_BODY:
                self._emit(chunk, size)

    def _render(self, total: int | None) -> None:
        if self.framing not in (_UNSET, _SMALL):
            return
        if not self.status:
            raise AssertionError("the application returned without start_response")
        data, self.framing, self.length, self.close = render_head(
            self.request, self.status, self.response_headers, total, self.force_close, self.channel.server.stopping
        )
        self._append(data, len(data))
        small, self.small = self.small, []
        if small and self.framing != _NO_BODY:
            joined = b"".join(small)
            self._emit(joined, len(joined))

    def _emit(self, data: Buffer, size: int) -> None:
        if self.framing == _CHUNKED:
            self._append(b"%x\r\n" % size, 0)
            self._append(data, size)
            self._append(b"\r\n", 0)
        else:
            self._append(data, size)

    def _append(self, data: Buffer, size: int) -> None:
        # small views are copied: the application may reuse their buffer for its next piece
        self.parts.append(bytes(data) if size < FLUSH_BYTES and type(data) is not bytes else data)
        self.size += size

    def _seal(self) -> None:
        if self.framing in (_UNSET, _SMALL):
            self._render(self.written)
        if self.framing == _CHUNKED:
            self._append(b"0\r\n\r\n", 0)
        elif self.framing == _LENGTH and self.written != self.length:
            _log.warning("%s: body shorter than its Content-Length", self.environ["REQUEST_URI"])

    def _replace_by_500(self) -> None:
        self.parts, self.size, self.small = [], 0, []
        self.status = status_line(500)
        data, self.framing, self.length, _ = render_head(self.request, self.status, (), 0, True, False)
        self.written = max(self.length, 0)
        self.close = True
        self._append(data, len(data))

    def _take_parts(self) -> list[Buffer]:
        parts, self.parts, self.size = self.parts, [], 0
        return parts

    def _flush(self) -> bool:
        self.sending = True
        return self.channel._push(self._take_parts())


# ------------------------------------------------------------------------------------------------------------- channel


def _advance_parts(parts: list[Buffer], sent: int) -> None:
    """Drops the first `sent` bytes of `parts`, without copying large ones."""
    done = 0
    for part in parts:
        size = len(part)
        if sent < size:
            break
        sent -= size
        done += 1
    del parts[:done]
    if sent:
        parts[0] = memoryview(parts[0])[sent:]


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection. See the module docstring for which thread owns it when."""

    def __init__(self, server: VolumeHTTPServer, sock: socket.socket, peer: tuple[str, int]) -> None:
        # not HTTPChannel.__init__: it makes output buffers and conditions that are not used here, for every connection
        self.server = server
        self.socket = sock
        self._fileno = sock.fileno()
        self.addr = peer
        self.connected = True
        self.lock = threading.Lock()
        self.state = _HEAD
        self.mask = 0
        self.registered = False  # epoll knows of it
        self.inbuf: bytes | bytearray = b""  # read, not yet understood; an idle connection holds none
        self.ahead = False  # inbuf holds bytes that came with the previous request and were not looked at
        self.scanned = 0  # of inbuf: looked through for the end of the head
        self.checked = 0  # of inbuf: lines found acceptable
        self.served = False  # a request was answered on this connection
        self.lenient = False  # the last request was a POST: line ends may follow it
        self.give_back: Callable[[int, bool], bool] | None = None  # where the connection goes when it is idle
        self.gone = False  # the client has closed its side, or all of it
        self.dead = False  # no longer with epoll; to be closed as soon as its worker is through
        self.patient = True
        self.last_activity = server.now
        self.head: RequestHead | None = None
        self.body: _Body | None = None
        self.exchange: Exchange | None = None
        self.hold: Hold | None = None
        self.out: list[Buffer] = []
        self.then: Callable[[], None] = _nothing
        self.after_body: Callable[[BodyError | None, bool], None] = _nothing
        self.timer = server.call_later(server.idle_timeout_s, self._idle_check) if server.idle_timeout_s > 0 else None

    # -- seam for TLS: a subclass (VolumeHTTPServer.channel_class) replaces these three for an SSLSocket: want-read and
    #    want-write are "nothing now". Bytes that ssl holds decrypted cause no event, so it must also go on reading
    #    while pending() says so: after handle_event, and when a connection comes back (_exchange_over, _next_request).

    def _recv(self, size: int) -> bytes | None:
        """Bytes, b"" at the end, None when there is nothing now. Raises OSError on a broken connection."""
        try:
            data: bytes = self.socket.recv(size)
        except (BlockingIOError, InterruptedError):
            return None
        return data

    def _recv_into(self, view: memoryview) -> int:
        """Like _recv, into memory; -1 when there is nothing now."""
        try:
            n: int = self.socket.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return -1
        return n

    def _send(self, parts: list[Buffer]) -> int:
        """Sends from the front of `parts`; the number of bytes taken, 0 when there is no room now."""
        try:
            if len(parts) == 1:
                part = parts[0]
                if len(part) > SEND_BYTES:
                    part = memoryview(part)[:SEND_BYTES]
                n: int = self.socket.send(part)
            else:
                batch = parts[:16]
                if len(batch[-1]) > SEND_BYTES:
                    batch[-1] = memoryview(batch[-1])[:SEND_BYTES]
                n = self.socket.sendmsg(batch)
        except (BlockingIOError, InterruptedError):
            return 0
        return n

    # -- loop thread: events

    def handle_event(self, events: int) -> None:
        state = self.state
        if state == _HEAD:
            self._read_head()
        elif state == _BODY:
            self._read_body()
        elif state == _FLUSH:
            if events & (_OUT | _BROKEN):
                self._flush_out()
            elif events & _HANGUP:
                self.gone = True
                self._set_mask(_OUT)
        elif state == _LINGER:
            self._drop()
        elif state != _CLOSED:
            self._event_while_busy(events)

    def wants_input(self) -> bool:
        """Loop thread: whether bytes of a head or a body would be read now."""
        return self.state in (_HEAD, _BODY)

    def _event_while_busy(self, events: int) -> None:
        with self.lock:
            if self.state not in (_BUSY, _PARKED):
                return  # handed back just now; what is still so will be reported again
            if events & _BROKEN:
                self.gone = self.dead = True
                self._unregister()
            elif events & _HANGUP:
                self.gone = True
                self._set_mask(0)
            else:
                self._set_mask(_HANGUP)  # the next request is here already: it waits in the kernel
        if self.hold is not None and self.gone:
            self.hold._client_left()
        if self.dead and self.state == _PARKED:
            self._drop()

    def _set_mask(self, mask: int) -> bool:
        """Loop while it owns the channel, else with the lock held. False: no longer with epoll."""
        if (mask != self.mask or not self.registered) and not self.dead:
            self.mask = mask
            try:
                if self.registered:
                    self.server.epoll.modify(self._fileno, mask)
                else:
                    self.registered = True
                    self.server.epoll.register(self._fileno, mask)
            except (OSError, ValueError):  # only when the server is being torn down
                self.dead = True
        return not self.dead

    def _unregister(self) -> None:
        if not self.registered:
            return
        self.registered = False
        try:
            self.server.epoll.unregister(self._fileno)
        except (OSError, ValueError):
            _log.debug("descriptor %d was not registered", self._fileno)

    def _idle_check(self) -> None:
        server = self.server
        if self.state == _CLOSED:  # it left while this timer was on its way
            return
        if self.state in (_BUSY, _PARKED):  # our turn, not the client's
            due = server.now + server.idle_timeout_s
            if self.hold is not None and self.head is not None and not self.head.has_body:
                if self.last_activity + server.idle_timeout_s <= server.now:
                    self.hold._client_left()
                else:
                    due = self.last_activity + server.idle_timeout_s
        else:
            due = self.last_activity + server.idle_timeout_s
        if due > server.now:
            self.timer = server.call_at(due, self._idle_check)
        elif self.state == _BODY and self.head is not None and self.after_body != self._body_complete:
            # nobody will read the body that does not come: the answer is given all the same, as Go does
            self.timer = server.call_later(server.idle_timeout_s, self._idle_check)
            self._body_over(BodyError("i/o timeout"))
        else:
            self.timer = None
            server.counts.idle_closed += 1
            self._drop()

    # -- loop thread: heads

    def _read_head(self) -> None:
        if self.ahead:  # the event overtook the function that was to look at them
            self._resume()
            return
        size = HEAD_READ_BYTES
        if self.inbuf:
            size = min(65536, MAX_HEAD_BYTES - len(self.inbuf))
        try:
            data = self._recv(size)
        except OSError:
            self._drop()
            return
        if data is None:
            return
        self.last_activity = self.server.now
        if not data:
            self.gone = True
            if self.inbuf and (not self.served or len(self.inbuf) >= 4):
                self._refuse_head(_bad())  # the rest of the head will never come
            else:
                self._drop()
        elif self.inbuf:
            if type(self.inbuf) is bytes:
                self.inbuf = bytearray(self.inbuf)
            self.inbuf += data
            self._look_for_head()
        else:
            self._take_bytes(data)

    def _take_bytes(self, data: bytes) -> None:
        """First bytes of a request: the common case of a whole head in one piece goes straight through."""
        try:
            usual = _parse_usual(data, self.addr, self.server.base_environ)
        except _HeadError as e:
            self._refuse_head(e)
            return
        if usual is None:
            self.inbuf = bytearray(data)
            self._look_for_head()
        else:
            head, end = usual
            self.inbuf = data[end:]
            self._on_head(head)

    def _look_for_head(self) -> None:
        """Goes on with a head that arrives in pieces or is unusual. Linear in its length, however it is cut."""
        buf = self.inbuf
        assert isinstance(buf, bytearray)
        if self.served and len(buf) < 4:
            return  # Go looks at four bytes before it begins a further request
        if self.lenient:
            self.lenient = False
            n = 0
            while n < 4 and buf[n] in b"\r\n":  # there are four: see above
                n += 1
            del buf[:n]
            if not buf:
                self.inbuf = b""
                return
        try:
            if buf[:1] == b"\n" or buf[:2] == b"\r\n":
                raise _bad()
            end = _end_of_head(buf, self.scanned)
            if end < 0:
                if len(buf) >= MAX_HEAD_BYTES:
                    raise _HeadError(_TOO_LARGE, linger=True)
                self.scanned = len(buf)
                self._check_lines(buf)
                return
            if end > HEAD_READ_BYTES and buf.count(b"\n", 0, end) > MAX_HEAD_LINES:
                raise _HeadError(_TOO_LARGE, linger=True)
            data = bytes(memoryview(buf)[:end])
            self.inbuf = bytes(memoryview(buf)[end:])
            self.scanned = self.checked = 0
            head = parse_head(data, self.addr, self.server.base_environ)
        except _HeadError as e:
            self._refuse_head(e)
            return
        self._on_head(head)

    def _check_lines(self, buf: bytearray) -> None:
        """Refuses a head as soon as a complete line of it is wrong, as Go does, which reads by lines."""
        stop = buf.rfind(b"\n", self.checked) + 1
        if stop <= self.checked:
            return
        at = self.checked
        if at == 0:
            at = buf.index(b"\n") + 1
            line = bytes(buf[: at - 1]).removesuffix(b"\r")
            method, target, _, _ = _split_request_line(line)
            _parse_target(method, target)
            if buf.startswith((b" ", b"\t"), at):
                raise _bad()
        m = _match_lines(buf, at, stop)
        assert m is not None
        if m.end() != stop:
            parse_head(bytes(buf[:stop]) + b"\r\n", self.addr, self.server.base_environ)
            raise _bad()
        self.checked = stop

    def _refuse_head(self, error: _HeadError) -> None:
        self.server.counts.bad_heads += 1
        self.inbuf = b""
        self.scanned = self.checked = 0
        self._answer_bytes(error.reply, _CLOSE_LINGERING if error.linger else _CLOSE_AT_ONCE)

    def _on_head(self, head: RequestHead) -> None:
        server = self.server
        server.counts.requests += 1
        self.head = head
        self.lenient = head.method == b"POST"
        if head.expect_other:
            self._refuse(Refusal(417, (("Connection", "close"),)))
            return
        if head.target == b"*":
            if head.method == b"OPTIONS":
                self._refuse(Refusal(200), limit=OPTIONS_BODY_BYTES + 1)
            else:
                self._refuse(Refusal(400), close=head.at_least_11)
            return
        admission = server.admission
        if admission is not None:
            try:
                verdict = admission.on_head(head)
            except Exception:
                server.app_failed()
                _log.exception("admission of %s failed", head.environ["REQUEST_URI"])
                verdict = Refusal(500)
            if verdict is not None:
                if isinstance(verdict, Hold):
                    self.hold = verdict
                    self._park()
                    if verdict._bind(self):
                        return
                    self._hold_over()
                else:
                    server.counts.refused += 1
                    self._refuse(verdict)
                return
        if head.chunked or head.content_length:
            self._admitted(head)
        else:
            self._dispatch(head, None, False, _CLOSE)

    def _park(self) -> None:
        self.state = _PARKED
        self._set_mask(_HANGUP)

    def _hold_over(self) -> None:
        """The holder has decided."""
        hold, head = self.hold, self.head
        if hold is None or head is None or self.state != _PARKED:
            return
        self.hold = None
        self.last_activity = self.server.now
        if hold._refusal is not None:
            self.server.counts.refused += 1
            self._refuse(hold._refusal)
        elif head.has_body:
            self._admitted(head)
        else:
            self._dispatch(head, None, False, _CLOSE)

    # -- loop thread: bodies

    def _admitted(self, head: RequestHead) -> None:
        """A request with a body that is let in."""
        server = self.server
        body = _Body(server.budget, server.spool_bytes, server.spool_directory)
        if not head.read_body:
            if head.expect_continue or self._closes_anyway(head):
                self._dispatch(head, None, head.expect_continue, self._leftover(head, DRAIN_BYTES))
            elif not head.chunked and (head.content_length or 0) >= DRAIN_BYTES:
                self._dispatch(head, None, True, _CLOSE_LINGERING)
            else:
                self.after_body = self._unwanted_over
                self._skip(head, body)
            return
        self.body = body
        self.after_body = self._body_complete
        try:
            # behind those who wait, however small: a stream of small bodies must not starve a large one
            ready = not (server.waiting and head.content_length) and self._prepare_body(head, body)
        except OSError:
            self._cannot_spool()
            return
        if ready:
            self._begin_body()
        else:
            self._park()
            server.wait_for_room(self)

    def _prepare_body(self, head: RequestHead, body: _Body) -> bool:
        keep = self.server.max_body_bytes if head.keep_bytes is None else head.keep_bytes
        if head.chunked:
            body.expect_chunks(keep, head.on_body)
            return True
        ready = body.expect(head.content_length or 0, keep)
        if body.file is not None:
            self.server.counts.bodies_spooled += 1
        return ready

    def room_returned(self) -> bool:
        """The budget may have room now. False: still not enough."""
        head, body = self.head, self.body
        if self.state != _PARKED or head is None or body is None:
            return True
        try:
            if not self._prepare_body(head, body):
                return False
        except OSError:
            self._cannot_spool()
            return True
        self._begin_body()
        return True

    def _begin_body(self) -> None:
        head, body = self.head, self.body
        assert head is not None
        assert body is not None
        body.since = self.last_activity = self.server.now
        if body.reserved:
            self.server.memory_bodies.add(self)
        if head.expect_continue:
            self._send_then([_CONTINUE], self._body_follows)
        else:
            self._body_follows()

    def _skip(self, head: RequestHead, body: _Body) -> None:
        """Reads a body and throws it away."""
        self.body = body
        if head.chunked:
            body.expect_chunks(0, None)
        else:
            body.expect(head.content_length or 0, 0)
        self._body_follows()

    def _body_follows(self) -> None:
        self.state = _BODY
        data = self.inbuf
        if data:
            self.inbuf = b""
            self._take_body(bytes(data))
        if self.state == _BODY:
            self._set_mask(_IN)

    def _read_body(self) -> None:
        body = self.body
        assert body is not None
        window = body.window() if body.chunks is None else None
        try:
            if window is not None:
                n = self._recv_into(window)
                if n > 0:
                    self.last_activity = self.server.now
                    body.took(n)
                    if not body.left:
                        self._body_over(None)
                    return
            elif body.chunks is None:
                view = self.server.scratch[: body.left]
                n = self._recv_into(view)
                if n > 0:
                    self.last_activity = self.server.now
                    self._take_body(view[:n])
                    return
            else:
                data = self._recv(65536)
                if data:
                    self.last_activity = self.server.now
                    self._take_body(data)
                    return
                n = -1 if data is None else 0
        except OSError:
            self._drop()
            return
        if n == 0:
            self.gone = True
            self._body_over(body.chunks.eof() if body.chunks is not None else BodyError("unexpected EOF"))

    def _take_body(self, data: Buffer) -> None:
        body = self.body
        assert body is not None
        try:
            if body.chunks is None:
                if len(data) > body.left:
                    self.inbuf = bytes(data[body.left :])
                    data = data[: body.left]
                body.write(data)
                if not body.left:
                    self._body_over(None)
                return
            was_spooled = body.file is not None
            used = body.chunks.feed(bytes(data), body.write)
            if body.file is not None and not was_spooled:
                self.server.counts.bodies_spooled += 1
                self.server.room_given()
        except BodyError as e:
            self._body_over(e)
            return
        except OSError:
            self._cannot_spool()
            return
        if body.received > DRAIN_BYTES and self.after_body != self._body_complete:
            self.after_body(None, True)
        elif body.chunks.done:
            self.inbuf = bytes(data[used:])
            self._body_over(None)

    def _cannot_spool(self) -> None:
        """The temporary directory is full or broken: the body cannot be kept."""
        _log.exception("cannot keep a request body from %s:%d in a temporary file", *self.addr)
        self.server.app_failed()
        self._end_body()
        self._reply(Refusal(500), True, _CLOSE_LINGERING)

    def _end_body(self) -> None:
        body, self.body = self.body, None
        if body is not None:
            self.server.memory_bodies.discard(self)
            body.close()
            self.server.room_given()

    def _body_over(self, error: BodyError | None) -> None:
        self.after_body(error, False)

    def _body_complete(self, error: BodyError | None, _too_long: bool) -> None:
        """The body is here, or as much of it as there will be."""
        head, body = self.head, self.body
        assert head is not None
        assert body is not None
        self.server.memory_bodies.discard(self)
        if body.file is not None:
            try:
                body.file.flush()
            except OSError:
                self._cannot_spool()
                return
        body.error = error
        # after a cut Content-Length body Go sees the end of the connection by itself; otherwise it says close
        self._dispatch(head, body, error is not None and (head.chunked or head.expect_continue), _CLOSE)

    def _unwanted_over(self, error: BodyError | None, too_long: bool) -> None:
        head = self.head
        assert head is not None
        self._end_body()
        self._dispatch(head, None, error is not None or too_long, _CLOSE_LINGERING if too_long else _CLOSE)

    def spill(self) -> None:
        """Gives the memory of a slow body to others."""
        body = self.body
        if self.state != _BODY or body is None or not body.reserved:
            return
        try:
            body.spill()
        except OSError:
            self._cannot_spool()
            return
        self.server.memory_bodies.discard(self)
        self.server.counts.bodies_spooled += 1
        self.server.room_given()

    def _dispatch(self, head: RequestHead, body: _Body | None, force_close: bool, leftover: int) -> None:
        """Hands the request to a worker."""
        environ = head.environ
        if body is None:
            environ["wsgi.input"] = _NO_INPUT
            environ["pyvolume.body"] = b""
            environ["pyvolume.body_error"] = None
            environ["pyvolume.body_size"] = 0
        else:
            environ["wsgi.input"] = body.open_input()
            environ["pyvolume.body"] = body.whole()
            environ["pyvolume.body_error"] = body.error
            environ["pyvolume.body_size"] = body.received
            if head.chunked:
                environ["CONTENT_LENGTH"] = str(body.received)
            self.body = None
        environ["pyvolume.client_gone"] = self.check_client_disconnected
        environ["pyvolume.head"] = head
        exchange = Exchange(self, head, body)
        head.environ = _SPENT  # the environment knows the head; the other way round they would wait for the collector
        exchange.force_close = force_close
        exchange.leftover = leftover
        self.exchange = exchange
        self.head = None
        self.patient = True
        self.state = _BUSY
        self.server.task_dispatcher.add_task(self)

    # -- loop thread: answers of its own

    def _closes_anyway(self, head: RequestHead) -> bool:
        return self.server.stopping or (head.wants_close and not head.wants_keep_alive_10)

    def _leftover(self, head: RequestHead, limit: int) -> int:
        """How Go ends a connection after an answer that says close, when the body was not read."""
        if not head.has_body or (head.close and not head.chunked):
            return _CLOSE
        if not head.chunked and (head.content_length or 0) > limit:
            return _CLOSE if head.expect_continue or head.expect_other else _CLOSE_LINGERING
        return _CLOSE_DRAINED

    def _refuse(self, refusal: Refusal, close: bool = False, limit: int = DRAIN_BYTES) -> None:
        """Answers without the application; the body, if any, was not asked for."""
        head = self.head
        assert head is not None
        closes = close or self._closes_anyway(head) or head.expect_continue
        for name, value in refusal.headers:
            closes = closes or (name.lower() == "connection" and value == "close")
        if not head.has_body:
            self._reply(refusal, closes, _CLOSE)
        elif closes:
            self._reply(refusal, True, self._leftover(head, limit))
        elif not head.chunked and (head.content_length or 0) >= limit:
            self._reply(refusal, True, _CLOSE_LINGERING)
        else:

            def over(error: BodyError | None, too_long: bool) -> None:
                self._end_body()
                lost = error is not None or too_long
                self._reply(refusal, lost, _CLOSE_LINGERING if too_long else _CLOSE)

            self.after_body = over
            self._skip(head, _Body(self.server.budget, 0, None))

    def _reply(self, refusal: Refusal, close: bool, leftover: int) -> None:
        head = self.head
        assert head is not None
        status = status_line(refusal.status) if isinstance(refusal.status, int) else refusal.status
        data, framing, _, close = render_head(
            head, status, refusal.headers, len(refusal.body), close, self.server.stopping
        )
        if framing == _LENGTH:
            data += refusal.body
        self.server.release(head, None)
        ending = leftover if close else _CLOSE if head.suspect else _KEEP
        self._answer_bytes(data, ending)

    def _answer_bytes(self, data: bytes, ending: int) -> None:
        self._send_then([data], lambda: self._conclude(ending))

    def _send_then(self, parts: list[Buffer], then: Callable[[], None]) -> None:
        """Sends and goes on with `then`; what the socket does not take at once is sent by events."""
        self.out = parts
        self.then = then
        self.state = _FLUSH
        self._flush_out()

    def _flush_out(self) -> None:
        parts = self.out
        budget = SEND_BYTES * 4
        try:
            while parts:
                n = self._send(parts)
                if not n:
                    break
                self.last_activity = self.server.now
                _advance_parts(parts, n)
                budget -= n
                if budget < 0:
                    break
        except OSError:
            self._drop()
            return
        if not parts:
            self.then()
        elif not self._set_mask(_OUT if self.gone else _OUT | _HANGUP):
            self._drop()

    # -- loop thread: what follows an answer

    def _conclude(self, ending: int) -> None:
        head, self.head = self.head, None
        if self.dead:  # the client broke the connection off while we were busy: no event will ever tell again
            self._drop()
            return
        if ending == _KEEP and self.server.stopping:
            ending = _CLOSE
        if ending == _KEEP:
            self._next_request()
        elif ending == _CLOSE_DRAINED:
            self._drain(head)
        elif ending == _CLOSE_LINGERING:
            self._linger()
        else:
            if ending == _CLOSE:
                try:  # a line end behind the body, say, left unread would make the kernel send a reset
                    self._recv(HEAD_READ_BYTES)
                except OSError:
                    _log.debug("connection of %s:%d was reset", *self.addr)
            self._drop()

    def _next_request(self) -> None:
        self.served = True
        self.state = _HEAD
        if self.give_back is not None and not (self.inbuf or self.gone or self.dead or self.server.stopping):
            self._leave(self.give_back)
            return
        self._set_mask(_IN)
        if self.inbuf:
            self.ahead = True
            self.server.call_soon(self._resume)  # not at once: others have a turn first, and no recursion

    def _leave(self, give_back: Callable[[int, bool], bool]) -> None:
        """Idle, all answered: the connection goes back to where it was adopted from. Loop, or worker with the lock."""
        self._unregister()
        self.state = _CLOSED
        self.connected = False
        self.dead = True
        if self.timer is not None:
            self.server.cancel(self.timer)
            self.timer = None
        self.server.channel_left(self)
        fd = self.socket.detach()
        if not give_back(fd, self.lenient):
            os.close(fd)

    def _resume(self) -> None:
        """Bytes of the next request are here already (pipelining, adoption)."""
        if self.state == _HEAD and self.ahead:
            self.ahead = False
            self._set_mask(_IN)
            data = bytes(self.inbuf)
            self.inbuf = b""
            self._take_bytes(data)

    def begin_adopted(self, data: bytes) -> None:
        """Loop: the first bytes of a connection that epoll does not know yet. If a whole request is among them, it need
        not before something is to be waited for."""
        if data:
            self._take_bytes(data)
        with self.lock:
            if self.registered or self.state in (_BUSY, _CLOSED) or self._set_mask(_IN):
                return
        self._drop()

    def _drain(self, head: RequestHead | None) -> None:
        """The answer is out and says close: like Go, wait for up to 256 KiB of the body before hanging up."""
        if head is None or self.gone:
            self._drop()
            return

        def over(_error: BodyError | None, too_long: bool) -> None:
            self._end_body()
            if too_long:
                self._linger()
            else:
                self._drop()

        self.after_body = over
        self._skip(head, _Body(self.server.budget, 0, None))

    def _linger(self) -> None:
        """FIN, then a moment for the client to see it before the reset that unread bytes cause."""
        self.state = _LINGER
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop()
            return
        self._set_mask(_HANGUP)
        if self.timer is not None:
            self.server.cancel(self.timer)
        self.timer = self.server.call_later(LINGER_S, self._drop)

    def _drop(self) -> None:
        """Closes the connection. Whatever hangs on it is released, by a worker if it is the application's."""
        if self.state == _CLOSED:
            return
        exchange = self.exchange
        self.state = _CLOSED
        self.connected = False
        self.gone = self.dead = True
        if self.timer is not None:
            self.server.cancel(self.timer)
            self.timer = None
        self.out = []
        self.inbuf = b""
        self.then = self.after_body = _nothing
        hold, self.hold = self.hold, None
        if hold is not None:
            hold._client_left()
        self._end_body()
        head, self.head = self.head, None
        if head is not None:
            self.server.release(head, None)
        self.server.channel_closed(self)
        try:
            self.socket.close()
        except OSError:
            _log.debug("closing a connection of %s:%d failed", *self.addr, exc_info=True)
        if exchange is not None:
            self.server.task_dispatcher.add_task(self)

    handle_close = close = _drop

    def begin_stop(self) -> None:
        """Graceful stop: an idle connection goes at once, unless a request has just arrived on it."""
        if self.state == _HEAD and not self.inbuf:
            self._read_head()
            if self.state == _HEAD and not self.inbuf:
                self._drop()

    def force_stop(self) -> None:
        """The deadline has passed. A busy connection is cut and left to its worker to notice."""
        if self.state != _BUSY:
            self._drop()
            return
        with self.lock:
            if self.state == _BUSY:
                self.gone = self.dead = True
                self._unregister()
                try:
                    self.socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    _log.debug("connection of %s:%d was already down", *self.addr)
                return
        self._drop()

    # -- worker threads

    def check_client_disconnected(self) -> bool:
        """True when the client has hung up (even half), or nothing moved for the idle timeout: Go cancels then too."""
        limit = self.server.idle_timeout_s
        if not self.registered and not self.gone:
            poller = select.poll()
            poller.register(self._fileno, select.POLLRDHUP)
            self.gone = bool(poller.poll(0))
        return self.gone or (limit > 0 and time.monotonic() - self.last_activity >= limit)

    def service(self) -> None:
        """Runs or goes on with the exchange of this channel; the dispatcher calls it."""
        exchange = self.exchange
        assert exchange is not None
        if self.dead:
            exchange.broken = True
            exchange.finish_app()
        else:
            try:
                if not exchange.advance():
                    return  # the loop has it now
            except ClientDisconnected:
                _log.debug("client %s:%d left before its answer was out", *self.addr)
                exchange.broken = True
                exchange.finish_app()
            except BaseException:  # SystemExit and the like from the application: the worker logs it
                exchange.broken = True
                exchange.finish_app()
                self._exchange_over(_CLOSE)
                raise
        self._exchange_over(exchange.ending())

    def cancel(self) -> None:
        """waitress calls this for tasks still queued when the workers are stopped."""
        exchange = self.exchange
        if exchange is not None:
            exchange.broken = True
            exchange.finish_app()
            self._exchange_over(_CLOSE)

    def _exchange_over(self, ending: int) -> None:
        server = self.server
        kept = ending == _KEEP and not server.stopping
        if kept and (self.give_back is None or self.inbuf):
            with self.lock:
                self.exchange = None
                alive = not self.dead
                resume = self.ahead = bool(self.inbuf)
                if alive:
                    self.served = True
                    self.state = _HEAD
                    if not resume:
                        alive = self._set_mask(_IN)
            if alive:  # the loop has the connection now
                if resume:
                    server.call_soon(self._resume)
                if server.stopping:  # begun meanwhile: it may have passed by while this was busy
                    server.call_soon(self.begin_stop)
                return
        elif kept and self.give_back is not None and self._leave_at_once(self.give_back):
            return
        head = self.exchange.request if self.exchange is not None else None
        self.exchange = None
        if self.state == _CLOSED:
            return
        if self.dead:
            ending = _CLOSE

        def conclude() -> None:
            if self.state == _BUSY:
                self.head = head
                self._conclude(ending)

        if not server.call_soon(conclude):
            self._drop()  # the loop has ended

    def _leave_at_once(self, give_back: Callable[[int, bool], bool]) -> bool:
        """_leave without a turn of the loop. False: there is more to it than that, nothing is changed."""
        with self.lock:
            if self.gone or self.dead or self.state != _BUSY:
                return False
            self.exchange = None
            self._leave(give_back)
            return True

    def _push(self, parts: list[Buffer]) -> bool:
        """Sends; False when the rest was left to the loop, which queues this channel again when it is through."""
        if len(parts) > 1 and sum(map(len, parts)) <= 4 * FLUSH_BYTES:
            parts = [b"".join(parts)]
        elif len(parts) > 16:
            parts = [b"".join(parts[:-1]), parts[-1]]
        try:
            while parts:
                n = self._send(parts)
                if n:
                    self.last_activity = time.monotonic()
                    _advance_parts(parts, n)
                elif not (self.patient and self._writable(PATIENCE_MS)):
                    self.patient = False
                    break
        except OSError:
            raise ClientDisconnected from None
        if not parts:
            return True
        with self.lock:
            if self.dead:
                raise ClientDisconnected
            self.out = parts
            self.then = self._requeue
            self.state = _FLUSH
            self._set_mask(_OUT if self.gone else _OUT | _HANGUP)
        return False

    def _push_blocking(self, parts: list[Buffer]) -> None:
        limit_ms = max(1, int((self.server.idle_timeout_s or 3600) * 1000))
        try:
            while parts:
                n = self._send(parts)
                if n:
                    self.last_activity = time.monotonic()
                    _advance_parts(parts, n)
                elif not self._writable(limit_ms):
                    raise ClientDisconnected
        except OSError:
            raise ClientDisconnected from None

    def _writable(self, timeout_ms: int) -> bool:
        poller = select.poll()
        poller.register(self._fileno, select.POLLOUT)
        return bool(poller.poll(timeout_ms)) and not self.dead

    def _requeue(self) -> None:
        """Loop: the piece is out, the worker may go on."""
        self.state = _BUSY
        self._set_mask(0 if self.gone else _IN)
        self.server.task_dispatcher.add_task(self)


def _nothing(*_args: Any) -> None:
    """Stands in for the callbacks of a closed channel."""


# ------------------------------------------------------------------------------------------------------------- workers


class Workers(ThreadedTaskDispatcher):  # type: ignore[misc]
    """The pool that runs applications. A queue in C: waitress' condition variable costs more than a small request."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start_new_thread(self, target: Callable[[int], None], thread_no: int) -> None:
        threading.Thread(target=target, name=f"pyvolume-http-{thread_no}", args=(thread_no,), daemon=True).start()

    def add_task(self, task: Any) -> None:
        self.queue.put(task)

    def handler_thread(self, thread_no: int) -> None:
        get = self.queue.get
        while (task := get()) is not None:
            try:
                task.service()
            except BaseException:
                _log.exception("worker %d: unexpected error", thread_no)
        with self.lock:
            self.threads.discard(thread_no)
            self.thread_exit_cv.notify_all()

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool:
        """Ends the threads as they become free, waits for them up to `timeout` s, then cancels what is queued."""
        with self.lock:
            for _ in range(len(self.threads)):
                self.queue.put(None)
            ended: bool = self.thread_exit_cv.wait_for(lambda: not self.threads, timeout)
            if not ended:
                _log.warning("%d worker thread(s) still busy", len(self.threads))
        if cancel_pending:
            while True:
                try:
                    task = self.queue.get_nowait()
                except queue.Empty:
                    break
                if task is not None:
                    task.cancel()
            for _ in range(len(self.threads)):
                self.queue.put(None)
        return ended


class Trigger(_WaitressTrigger):  # type: ignore[misc]
    """Runs functions on the loop thread. One byte wakes the loop for any number of them."""

    def __init__(self, map: dict[int, Any]) -> None:
        super().__init__(map)
        self.thunks: list[Callable[[], None]] = []
        self._closed = False
        self._pulled = False

    def pull_trigger(self, thunk: Callable[[], None] | None = None) -> bool:
        """False: the loop has ended and will not run it."""
        with self.lock:
            if self._closed:
                return False
            if thunk is not None:
                self.thunks.append(thunk)
            if not self._pulled:
                self._pulled = True
                self._physical_pull()
            return True

    def handle_read(self) -> None:
        try:
            self.recv(8192)
        except OSError:
            return
        self.run_thunks()

    def run_thunks(self) -> None:
        with self.lock:
            thunks, self.thunks = self.thunks, []
            self._pulled = False
        for thunk in thunks:
            try:
                thunk()
            except Exception:
                _log.exception("a function given to the HTTP loop failed")

    def close(self) -> None:
        with self.lock:
            closed, self._closed = self._closed, True
        if not closed:
            self.del_channel()
            self._close()


# -------------------------------------------------------------------------------------------------------------- server


class _Counts:
    """Counters of the loop thread."""

    def __init__(self) -> None:
        self.accepted = 0
        self.adopted = 0
        self.requests = 0
        self.bad_heads = 0
        self.refused = 0
        self.idle_closed = 0
        self.accept_pauses = 0
        self.bodies_spooled = 0


_Timer = list[Any]  # [when, serial number, function or None when cancelled]


class VolumeHTTPServer(TcpWSGIServer):  # type: ignore[misc]
    """One listener with its loop and its workers. Made by create_server."""

    channel_class = Channel

    def __init__(
        self,
        app: WSGIApp,
        sock: socket.socket,
        *,
        threads: int,
        idle_timeout_s: float,
        connection_limit: int,
        max_inflight_body_bytes: int,
        max_body_bytes: int,
        spool_bytes: int,
        spool_directory: str | None,
        admission: Admission | None,
        ident: str | None,
    ) -> None:
        # asyncore_use_poll stands for whoever runs waitress' own loop on this map; run() below does not
        adjustments = Adjustments(
            sockets=[sock],
            threads=threads,
            ident=ident,
            connection_limit=connection_limit,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=False,
            backlog=sock_backlog(),
        )
        self.map: dict[int, Any] = {}
        # what threads other than the loop may look at from the first moment on stands before the base's __init__
        self.now = time.monotonic()
        self.stopping = False
        self.idle_timeout_s = idle_timeout_s
        self.connection_limit = connection_limit
        self.admission = admission
        self.max_body_bytes = max_body_bytes
        self.spool_bytes = min(spool_bytes, max_inflight_body_bytes)
        self.spool_directory = spool_directory
        self.budget = _Budget(max_inflight_body_bytes)
        self.counts = _Counts()
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self.channels: dict[int, Channel] = {}
        self.memory_bodies: set[Channel] = set()
        self.waiting: deque[Channel] = deque()  # for room in the budget
        self._app_errors = itertools.count()
        self._app_error_count = 0
        self._timers: list[_Timer] = []
        self._timer_serial = itertools.count()
        self._sweep_at = MOST_STALE_TIMERS
        self._relief: _Timer | None = None
        self._accept_retry: _Timer | None = None
        self._pause_logged = self.now - PAUSE_LOG_S
        self._listening = False
        self._watched: dict[int, Callable[[], None]] = {}
        self._stop_lock = threading.Lock()
        self._stop_calls = 0
        self._started = False
        self._finished = False
        self._was_cut = False
        self._done = threading.Event()
        workers = Workers()
        super().__init__(
            app,
            map=self.map,
            _start=False,
            _sock=sock,
            dispatcher=workers,
            adj=adjustments,
            sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
            bind_socket=False,
        )
        self.trigger.close()
        self.trigger: Any = Trigger(self.map)
        self.port: int = sock.getsockname()[1]
        self.base_environ = self._make_base_environ(ident)
        self.epoll = select.epoll()
        self.epoll.register(self.trigger._fileno, select.EPOLLIN)
        self.socket.setblocking(False)
        self.socket.listen(adjustments.backlog)
        self.accepting = True
        self._listen(True)
        workers.set_thread_count(threads)

    def _make_base_environ(self, ident: str | None) -> dict[str, Any]:
        host, port = self.socket.getsockname()[:2]
        return {
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "SERVER_SOFTWARE": ident or "pyvolume",
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": _ErrorStream(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }

    # -- any thread

    @property
    def stats(self) -> Stats:
        c = self.counts
        return Stats(
            connections=len(self.channels),
            accepted=c.accepted,
            adopted=c.adopted,
            requests=c.requests,
            bad_heads=c.bad_heads,
            refused=c.refused,
            idle_closed=c.idle_closed,
            app_errors=self._app_error_count,
            accept_pauses=c.accept_pauses,
            body_bytes_in_memory=self.budget.used,
            bodies_waiting=len(self.waiting),
            bodies_spooled=c.bodies_spooled,
            queued=self.task_dispatcher.queue.qsize(),
        )

    def app_failed(self) -> None:
        self._app_error_count = next(self._app_errors) + 1

    def call_soon(self, thunk: Callable[[], None]) -> bool:
        """Runs `thunk` on the loop thread. False: the loop has ended."""
        pulled: bool = self.trigger.pull_trigger(thunk)
        return pulled

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        """Has `readable` called on the loop thread whenever fd is readable, until unwatch(), which is for the loop."""
        self._watched[fd] = readable
        self.epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def lend_listener(self) -> int:
        """Before run(): gives the listening socket away, as a descriptor of its own; connections are adopted then."""
        fd = os.dup(self.socket.fileno())
        self._close_listener()
        return fd

    def adopt(
        self,
        sock_fd: int,
        peer: tuple[str, int],
        data: bytes = b"",
        *,
        served: bool = False,
        lenient: bool = False,
        give_back: Callable[[int, bool], bool] | None = None,
    ) -> None:
        """Takes over an accepted connection and the bytes already read from it; never blocks, any thread.

        The descriptor belongs to the server from here on, also when it is stopping: then it is closed.
        Everything sent on the connection before must have been answered: `served` says that there was something, and
        `lenient` that the last of it was a POST. give_back(descriptor, lenient) is called on the loop thread when the
        connection has become idle after an answer: True, and the descriptor is the callee's again.
        """
        self.adopt_socket(
            socket.socket(fileno=sock_fd), peer, data, served=served, lenient=lenient, give_back=give_back
        )

    def adopt_socket(
        self,
        sock: socket.socket,
        peer: tuple[str, int],
        data: bytes = b"",
        *,
        served: bool = False,
        lenient: bool = False,
        give_back: Callable[[int, bool], bool] | None = None,
    ) -> None:
        """adopt() for a socket object; the way in for an accept loop that has done a TLS handshake first."""

        if not self.call_soon(lambda: self._take_over(sock, peer, data, served, lenient, give_back)):
            sock.close()

    def adopt_here(
        self,
        sock_fd: int,
        peer: tuple[str, int],
        data: bytes = b"",
        *,
        served: bool = False,
        lenient: bool = False,
        give_back: Callable[[int, bool], bool] | None = None,
    ) -> None:
        """adopt() of a stream socket that does not block, on the loop thread while it handles no connection's event."""
        # what is told here need not be asked of the kernel; the family matters only to calls that nobody makes
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        sock = socket.socket(socket.AF_INET, kind, socket.IPPROTO_TCP, sock_fd)
        if self.stopping:
            sock.close()
            return
        self.counts.adopted += 1
        channel: Channel = self.channel_class(self, sock, _shown(peer))
        self.channels[sock_fd] = channel
        channel.served, channel.lenient, channel.give_back = served, lenient, give_back
        channel.begin_adopted(data)

    def _take_over(
        self,
        sock: socket.socket,
        peer: tuple[str, int],
        data: bytes,
        served: bool,
        lenient: bool,
        give_back: Callable[[int, bool], bool] | None,
    ) -> None:
        if self.stopping:
            sock.close()
            return
        self.counts.adopted += 1
        channel = self._open_channel(sock, peer)
        if channel is None:
            return
        channel.served, channel.lenient, channel.give_back = served, lenient, give_back
        if data:
            channel.inbuf = data
            channel.ahead = True
            channel._resume()

    def stop(self, deadline_s: float = 30.0) -> bool:
        """Ends the server; blocks until run() is through. Any thread but the loop and the workers.

        The listener is closed and idle connections go at once; requests in flight have `deadline_s` seconds to finish
        (their answers say Connection: close), then they are cut. A second call cuts at once. True: nothing was cut.
        """
        with self._stop_lock:
            self._stop_calls += 1
            first = self._stop_calls == 1
            started = self._started
            if not started:
                self.stopping = True
                self._finished = True
        if not started:
            self._tear_down()
            return True
        cut_at = time.monotonic() + deadline_s
        if first:
            self.call_soon(lambda: self._begin_stop(cut_at))
        else:
            self.call_soon(self._force_stop)
        self._done.wait(deadline_s + 10)
        return not self._was_cut

    # -- loop thread: the loop

    def run(self) -> None:
        """Serves until stop(); the calling thread becomes the loop."""
        with self._stop_lock:
            if self._finished or self._started:
                return
            self._started = True
        poll = self.epoll.poll
        channels = self.channels
        trigger_fd = self.trigger._fileno
        listener_fd = self.socket.fileno()
        clock = time.monotonic
        timers = self._timers
        watched = self._watched
        try:
            while not self._finished:
                timeout = max(0.0, timers[0][0] - clock()) if timers else -1
                events = poll(timeout)
                self.now = now = clock()
                woken = arrived = False
                readable = None
                for fd, what in events:
                    channel = channels.get(fd)
                    if channel is not None:
                        try:
                            channel.handle_event(what)
                        except Exception:
                            _log.exception("connection of %s:%d failed", *channel.addr)
                            channel.force_stop()
                    elif fd == trigger_fd:
                        woken = True
                    elif fd == listener_fd:
                        arrived = True
                    elif fd in watched:
                        readable = watched[fd] if readable is None else readable  # of another one: in the next round
                if woken:
                    self.trigger.handle_read()
                if readable is not None:
                    try:
                        readable()
                    except Exception:
                        _log.exception("what the HTTP loop watches for failed")
                if timers and timers[0][0] <= now:
                    self._run_timers(now)
                if arrived and self._listening:
                    self._accept()
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        self.stopping = self._finished = True
        self._close_listener()
        for channel in list(self.channels.values()):
            channel.force_stop()
        self.trigger.close()
        with self.trigger.lock:
            thunks, self.trigger.thunks = self.trigger.thunks, []
        for thunk in thunks:
            thunk()  # adopted sockets and finished exchanges that came too late
        self.task_dispatcher.shutdown(timeout=0.5)
        self.epoll.close()
        self._done.set()

    # -- loop thread: timers

    def call_later(self, delay_s: float, function: Callable[[], None]) -> _Timer:
        return self.call_at(self.now + delay_s, function)

    def call_at(self, when: float, function: Callable[[], None]) -> _Timer:
        timer: _Timer = [when, next(self._timer_serial), function]
        timers = self._timers
        if len(timers) >= self._sweep_at:
            timers[:] = [t for t in timers if t[2] is not None]
            heapq.heapify(timers)
            self._sweep_at = max(MOST_STALE_TIMERS, 2 * len(timers))
        heapq.heappush(timers, timer)
        return timer

    def cancel(self, timer: _Timer) -> None:
        """Any thread; safe to call for a timer that has run. Cancelled ones are swept before they are the majority."""
        timer[2] = None

    def _run_timers(self, now: float) -> None:
        timers = self._timers
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)
            function, timer[2] = timer[2], None
            if function is None:
                continue
            try:
                function()
            except Exception:
                _log.exception("a timer of the HTTP loop failed")

    # -- loop thread: connections

    def _listen(self, on: bool) -> None:
        if on == self._listening or not self.accepting:
            return
        self._listening = on
        if on:
            self.epoll.register(self.socket.fileno(), select.EPOLLIN)
        else:
            self.epoll.unregister(self.socket.fileno())

    def _pause_accepting(self, why: str) -> None:
        """No spinning on a listener that cannot be served: look again when a connection ends, or in a moment."""
        if self._listening:
            self._listen(False)
            self.counts.accept_pauses += 1
            if self.now >= self._pause_logged + PAUSE_LOG_S:
                self._pause_logged = self.now
                _log.warning("not accepting connections for now: %s (%d open)", why, len(self.channels))
        if self._accept_retry is None:
            self._accept_retry = self.call_later(ACCEPT_RETRY_S, self._accept_again)

    def _accept_again(self) -> None:
        self._accept_retry = None
        if self.accepting and not self.stopping and len(self.channels) < self.connection_limit:
            self._listen(True)

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            if len(self.channels) >= self.connection_limit:
                self._pause_accepting(f"limit of {self.connection_limit} connections")
                return
            try:
                sock, addr = self.socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as e:
                if e.errno in _OUT_OF_DESCRIPTORS:
                    self._pause_accepting(os.strerror(e.errno))
                    return
                _log.debug("accept: %s", e)  # the client was gone before we looked
                continue
            self.counts.accepted += 1
            self._open_channel(sock, addr)

    def _open_channel(self, sock: socket.socket, addr: tuple[Any, ...]) -> Channel | None:
        try:
            if sock.gettimeout() != 0:
                sock.setblocking(False)
            channel: Channel = self.channel_class(self, sock, _shown(addr))
            fd = channel._fileno
            self.channels[fd] = channel
            channel.mask = _IN
            self.epoll.register(fd, _IN)
            channel.registered = True
        except OSError as e:
            _log.warning("cannot serve a connection of %s: %s", addr[0], e)
            self.channels.pop(sock.fileno(), None)
            sock.close()
            return None
        return channel

    def channel_closed(self, channel: Channel) -> None:
        """Called by the channel before its descriptor is closed (which takes it out of epoll as well)."""
        if self.channels.get(channel._fileno) is channel:
            del self.channels[channel._fileno]
        if self.stopping:
            self._finish_if_idle()
        elif self.accepting and not self._listening and self._accept_retry is None:
            self._accept_again()

    def channel_left(self, channel: Channel) -> None:
        """The same for a connection that was adopted and goes back. Any thread."""
        if self.channels.get(channel._fileno) is channel:
            del self.channels[channel._fileno]
        if self.stopping:  # after the line above: whoever began the stop has counted the connection, or we see the stop
            self.call_soon(self._finish_if_idle)

    def _finish_if_idle(self) -> None:
        if not self.channels and self._stop_calls:
            self._finished = True

    # -- memory for bodies

    def release(self, head: RequestHead, body: _Body | None) -> None:
        """A request is over. Any thread."""
        if body is not None:
            body.close()
            self.room_given()
        callbacks, head.on_end = head.on_end, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("a callback at the end of a request failed")

    def room_given(self) -> None:
        """Any thread."""
        if self.waiting:
            self.call_soon(self._grant_room)

    def wait_for_room(self, channel: Channel) -> None:
        """Loop: the body of `channel` does not fit now; bodies are let in in the order they came."""
        self.waiting.append(channel)
        if self._relief is None:
            self._relief = self.call_later(RELIEF_S, self._relieve)
        self.call_soon(self._grant_room)  # room may have come between the try and the append

    def _grant_room(self) -> None:
        while self.waiting:
            if not self.waiting[0].room_returned():
                return
            self.waiting.popleft()

    def _relieve(self) -> None:
        """While bodies wait for memory, those that arrive slowly are moved to files: a few slow clients cannot hold
        all of it."""
        self._relief = None
        self._grant_room()
        if not self.waiting:
            return
        for channel in list(self.memory_bodies):
            body = channel.body
            if body is None:
                continue
            age_s = self.now - body.since
            if age_s > RELIEF_S and body.received < age_s * SLOW_BODY_BYTES_PER_S:
                channel.spill()
        self._relief = self.call_later(RELIEF_S, self._relieve)

    # -- stopping

    def _close_listener(self) -> None:
        if self.accepting:
            if self._listening:
                self._listen(False)
            self.accepting = False
            self.map.pop(self._fileno, None)
            self.socket.close()

    def _begin_stop(self, cut_at: float) -> None:
        if self.stopping:
            return
        if self._listening:
            self._accept()  # those who were let in by the kernel get their answer
        self.stopping = True
        self._close_listener()
        for channel in list(self.channels.values()):
            channel.begin_stop()
        if self.channels:
            self.call_at(cut_at, self._force_stop)
        else:
            self._finished = True

    def _force_stop(self) -> None:
        self.stopping = True
        self._close_listener()
        if self.channels:
            self._was_cut = True
            _log.warning("stopping: %d connection(s) cut", len(self.channels))
        for channel in list(self.channels.values()):
            channel.force_stop()
        self._finished = True


def _shown(addr: tuple[Any, ...]) -> tuple[str, int]:
    """A peer's address as Go has it: mapped ones as IPv4."""
    host: str = addr[0]
    return (host[7:] if host[:7] == "::ffff:" else host), addr[1]


class _ErrorStream:
    """wsgi.errors into the log."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.error("%s", text.rstrip())
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing is held back."""


def sock_backlog() -> int:
    """The kernel's own limit; asking for more changes nothing."""
    try:
        with open("/proc/sys/net/core/somaxconn", encoding="ascii") as f:
            return int(f.read())
    except (OSError, ValueError):
        return 1024


def raise_nofile_limit() -> int:
    """Lifts the soft limit on descriptors towards the hard one (at most 1 Mi); returns the soft limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = MAX_NOFILE if hard == resource.RLIM_INFINITY else min(hard, MAX_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < want:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
            soft = want
        except (OSError, ValueError) as e:
            _log.warning("descriptor limit stays at %d: %s", soft, e)
    return MAX_NOFILE if soft == resource.RLIM_INFINITY else soft


def default_connection_limit(nofile: int) -> int:
    """Three quarters of the descriptors, the rest is for volumes, spooled bodies and the master."""
    return max(16, min(MAX_CONNECTIONS, nofile * 3 // 4))


def bind_listener(host: str, port: int) -> socket.socket:
    """A bound socket; a wildcard host takes IPv4 and IPv6 on one socket, as net.Listen does. Raises OSError."""
    attempts: list[tuple[int, tuple[Any, ...]]] = []
    if host in ("", "*", "0.0.0.0", "::", "[::]"):
        if socket.has_dualstack_ipv6():
            attempts.append((socket.AF_INET6, ("::", port)))
        attempts.append((socket.AF_INET, ("0.0.0.0", port)))
    else:
        found = socket.getaddrinfo(
            host.strip("[]"), port, socket.AF_UNSPEC, socket.SOCK_STREAM, socket.IPPROTO_TCP, socket.AI_PASSIVE
        )
        found.sort(key=lambda info: info[0] != socket.AF_INET)  # net.Listen prefers IPv4 too
        attempts.append((found[0][0], found[0][4]))
    error: OSError | None = None
    for family, address in attempts:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
            sock.bind(address)
            return sock
        except OSError as e:
            sock.close()
            error = error or e
    assert error is not None
    raise error


def create_server(
    app: WSGIApp,
    *,
    host: str,
    port: int,
    threads: int = 16,
    idle_timeout_s: float = 30.0,
    connection_limit: int | None = None,
    max_inflight_body_bytes: int = 256 << 20,
    max_body_bytes: int = 1 << 40,
    spool_bytes: int = 64 << 20,
    spool_directory: str | None = None,
    admission: Admission | None = None,
    ident: str | None = None,
    make: Callable[..., VolumeHTTPServer] | None = None,
    listener: socket.socket | None = None,
) -> VolumeHTTPServer:
    """Binds and listens at once (port 0: any, see .port); connections are served when run() is called.

    idle_timeout_s           0 = never
    connection_limit         None: from RLIMIT_NOFILE, whose soft limit is raised to the hard one
    max_inflight_body_bytes  request bodies in memory, over all connections. A body of known length is let in when it
                             fits as a whole, in order of arrival; until then it is not read (and not asked for)
    max_body_bytes           leading bytes of a body that are kept; the rest is read, counted and thrown away
    spool_bytes              larger bodies are kept in an unlinked file in spool_directory (None: the system's)
    ident                    SERVER_SOFTWARE of the environment; never sent, the application gives the Server header
    make                     makes the server, None: VolumeHTTPServer itself
    listener                 a socket that is bound already, instead of host and port; the server's from here on

    Environment beyond WSGI: pyvolume.head (RequestHead), .raw_target, .raw_path, .raw_headers, .peer_ip,
    .body (memoryview of the kept bytes, None when spooled), .body_size (bytes that arrived), .body_error (BodyError or
    None: the body is short or malformed; wsgi.input raises it where the bytes end), .client_gone (callable).
    Of a repeated header the HTTP_ key holds the first value, as Go's Header.Get; cookies are joined.
    Raises OSError when the address cannot be bound.
    """
    nofile = raise_nofile_limit()
    sock = listener if listener is not None else bind_listener(host, port)
    try:
        return (make or VolumeHTTPServer)(
            app,
            sock,
            threads=threads,
            idle_timeout_s=idle_timeout_s,
            connection_limit=connection_limit or default_connection_limit(nofile),
            max_inflight_body_bytes=max_inflight_body_bytes,
            max_body_bytes=max_body_bytes,
            spool_bytes=spool_bytes,
            spool_directory=spool_directory,
            admission=admission,
            ident=ident,
        )
    except BaseException:
        sock.close()
        raise
