"""The case table of the HTTP ports: what is asked, what must be answered.

Each case is a short exchange on keys of its own; docs/SEMANTICS.md lists every case by its name, and a test compares
the two lists. The table is data, so that any lane or server can be put behind it (`test_http_cases.py`).

In targets, headers and texts these words are replaced: {fid} the case's file id, {vid} {hex} its two halves, {key}
{cookie} the parts of {hex}, {other} the same key with another cookie, {etag} the entity tag of the last answer that had
one, {next1} {next2} hex of the next two keys with the same cookie.
Volumes: 1 ordinary, 2 read-only, 3 with ttl 3d, 4 in collection "pics", 5 with two copies (no peer has it), 77 nowhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

ANY = "<any>"
"""The header is there, whatever its value."""


@dataclass(frozen=True)
class Step:
    """One request and what its answer must be. Headers: value, ANY, or None for absent; `body` None: not looked at."""

    method: str
    target: str
    status: int
    headers: tuple[tuple[str, str], ...] = ()
    send: bytes | None = None
    want: dict[str, str | None] = field(default_factory=dict)
    body: bytes | str | Callable[[bytes], bool] | None = None
    port: str = "admin"


@dataclass(frozen=True)
class Case:
    """A named exchange. `volume` is where its file id lies."""

    name: str
    steps: tuple[Step, ...]
    volume: int = 1


CASES: list[Case] = []
OCTETS = ("Content-Type", "application/octet-stream")
TS = "1700000000"
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
ERROR = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}
BARE: dict[str, str | None] = {"Content-Type": None, "Content-Length": "0"}


def case(name: str, *steps: Step, volume: int = 1) -> None:
    CASES.append(Case(name, steps, volume))


def put(data: bytes, /, *headers: tuple[str, str], query: str = f"?ts={TS}", status: int = 201, **kw: object) -> Step:
    if not any(name == "Content-Type" for name, _ in headers):
        headers = (OCTETS, *headers)
    return Step("PUT", "/{fid}" + query, status, headers, data, **kw)  # type: ignore[arg-type]


def get(status: int, *headers: tuple[str, str], target: str = "/{fid}", **kw: object) -> Step:
    return Step("GET", target, status, headers, **kw)  # type: ignore[arg-type]


def head(status: int, *headers: tuple[str, str], target: str = "/{fid}", **kw: object) -> Step:
    return Step("HEAD", target, status, headers, **kw)  # type: ignore[arg-type]


def delete(status: int, *headers: tuple[str, str], target: str = "/{fid}", **kw: object) -> Step:
    return Step("DELETE", target, status, headers, **kw)  # type: ignore[arg-type]


def form(parts: list[tuple[list[str], bytes]], boundary: str = "b0undary") -> bytes:
    out = b""
    for lines, data in parts:
        out += (
            f"--{boundary}\r\n".encode() + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + data + b"\r\n"
        )
    return out + f"--{boundary}--\r\n".encode()


FORM = ("Content-Type", "multipart/form-data; boundary=b0undary")


def post(
    parts: list[tuple[list[str], bytes]], *headers: tuple[str, str], query: str = "", status: int = 201, **kw: object
) -> Step:
    return Step("POST", "/{fid}" + query, status, (FORM, *headers), form(parts), **kw)  # type: ignore[arg-type]


def file_part(name: str, data: bytes, *lines: str) -> tuple[list[str], bytes]:
    return [f'Content-Disposition: form-data; name="file"; filename="{name}"', *lines], data


HELLO = b"hello world"
MD5 = base64.b64encode(hashlib.md5(HELLO).digest()).decode()
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 40
GZIPPED = gzip.compress(TEXT, mtime=0)

# ---------------------------------------------------------------------------------------------------- paths (http.md 4)

for label, target in (
    ("comma", "/{fid}"),
    ("slash", "/{vid}/{hex}"),
    ("named", "/{vid}/{hex}/any.bin"),
    ("empty-name", "/{vid}/{hex}/"),
    ("extension", "/{fid}.jpg"),
    ("slash-extension", "/{vid}/{hex}.jpg"),
    ("dot-end", "/{fid}."),
    ("leading-zeros", "/00{vid},0{hex}"),
    ("escaped-comma", "/{vid}%2C{hex}"),
    ("delta-zero", "/{fid}_0"),
    ("delta-empty", "/{fid}_"),
):
    case(f"path.read.{label}", put(HELLO), get(200, target=target, body=HELLO))

for label, target in (
    ("root", "/"),
    ("no-fid", "/{vid},"),
    ("vid-only", "/{vid}"),
    ("comma-first", "/,{hex}"),
    ("trailing-slash", "/{fid}/"),
    ("two-dots", "/{fid}.a.b"),
    ("short", "/{vid},12345678"),
    ("long", "/{vid},{hex}" + "f" * 24),
    ("bad-key", "/{vid},zz{hex}"),
    ("bad-vid", "/x,{hex}"),
    ("negative-vid", "/-1,{hex}"),
    ("huge-vid", "/99999999999999999999,{hex}"),
    ("wrapping-vid", "/4294967297,{hex}"),
    ("delta-text", "/{fid}_x"),
    ("delta-overflow", "/{vid},ffffffffffffffff{cookie}_1"),
    ("many-slashes", "/a/b/c/{fid}"),
    ("many-slashes-no-comma", "/a/b/c/d"),
):
    case(f"path.bad.{label}", get(400, target=target, want=BARE, body=b""))

case(
    "path.write-takes-the-last-comma",
    Step("PUT", "/{vid}/x/{fid}", 201, (OCTETS,), HELLO),
    get(200, body=HELLO),
)
case(
    "path.write-needs-a-comma",
    Step(
        "PUT",
        "/{vid}/{hex}",
        400,
        (OCTETS,),
        HELLO,
        ERROR,
        "Parse needleId error: needle id /{vid}/{key} format error: "
        'strconv.ParseUint: parsing "/{vid}/{key}": invalid syntax',
    ),
    Step("PUT", "/{vid}", 400, (OCTETS,), HELLO, ERROR, "Invalid fid: /{vid}"),
)
for label, target, text in (
    ("vid", "/x,{hex}", 'strconv.ParseUint: parsing "x": invalid syntax'),
    (
        "vid-range",
        "/99999999999999999999,{hex}",
        'strconv.ParseUint: parsing "99999999999999999999": value out of range',
    ),
    ("vid-32-bit", "/4294967296,{hex}", 'strconv.ParseUint: parsing "4294967296": value out of range'),
    ("short", "/1,64", "Invalid fid: 64"),
    ("too-short", "/1,1234567_5", "KeyHash is too short."),
    ("too-long", "/1,{hex}" + "f" * 24, "KeyHash is too long."),
    (
        "key",
        "/1,6zdeadbeef",
        'Parse needleId error: needle id 6z format error: strconv.ParseUint: parsing "6z": invalid syntax',
    ),
    (
        "cookie",
        "/1,64deadbezz",
        "Parse cookie error: needle cookie deadbezz format error: "
        'strconv.ParseUint: parsing "deadbezz": invalid syntax',
    ),
    ("delta", "/1,64deadbeef_x", 'strconv.ParseUint: parsing "x": invalid syntax'),
    ("delta-overflow", "/1,ffffffffffffffffdeadbeef_2", "delta 2 overflows needle id 66666666666666666666666666666666"),
):
    case(f"path.write-error.{label}", Step("PUT", target, 400, (OCTETS,), HELLO, ERROR, text))
case("path.write-error.many-slashes", Step("PUT", "/a/b/c/1,{hex}", 400, (OCTETS,), HELLO, ERROR))
case(
    "path.delta-adds-to-the-key",
    Step("PUT", "/{fid}_5", 201, (OCTETS,), HELLO),
    get(404),
    get(200, target="/{fid}_5", body=HELLO),
)

# -------------------------------------------------------------------------------------------------- routes (http.md 2)

for method in ("PATCH", "TRACE", "get", "PROPFIND"):
    case(f"method.unsupported.{method}", Step(method, "/{fid}", 400, want=ERROR, body=f"unsupported method {method}"))
case(
    "method.options",
    Step(
        "OPTIONS",
        "/{fid}",
        200,
        want={
            "Access-Control-Allow-Methods": "PUT, POST, GET, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "*",
            "Access-Control-Allow-Origin": None,
            "Content-Length": "0",
        },
        body=b"",
    ),
)
CORS = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true"}
case(
    "cors.origin",
    get(404, ("Origin", "http://a.example"), want=CORS),
    Step("OPTIONS", "/", 200, (("Origin", "null"),), want=CORS),
)
case("cors.no-origin", get(404, want=dict.fromkeys(CORS)))
case(
    "cors.not-on-pages",
    get(200, ("Origin", "http://a.example"), target="/status", want=dict.fromkeys(CORS)),
    get(200, ("Origin", "http://a.example"), target="/healthz", want=dict.fromkeys(CORS)),
)
PUBLIC_OPTIONS = {"Access-Control-Allow-Methods": "GET, OPTIONS", "Access-Control-Allow-Headers": "*"}
case(
    "public.reads-only",
    put(HELLO),
    get(200, port="public", body=HELLO),
    Step("POST", "/{fid}", 200, (OCTETS,), b"other", BARE, b"", "public"),
    Step("PUT", "/{fid}", 200, (OCTETS,), b"other", BARE, b"", "public"),
    delete(200, port="public", want=BARE, body=b""),
    Step("PATCH", "/{fid}", 200, want=BARE, body=b"", port="public"),
    Step("OPTIONS", "/{fid}", 200, want={**PUBLIC_OPTIONS}, body=b"", port="public"),
    get(200, body=HELLO),
)
case(
    "public.has-no-pages",
    get(400, target="/status", port="public", want=BARE, body=b""),
    get(400, target="/healthz", port="public"),
    get(400, target="/ui/index.html", port="public"),
    get(200, target="/favicon.ico", port="public"),
)
COMMON = {"Server": "SeaweedFS Volume 30GB 4.44", "X-Amz-Request-Id": ANY, "Date": ANY}
case(
    "headers.common",
    get(404, want={**COMMON}),
    get(200, target="/status", want={**COMMON}),
    get(200, target="/healthz", want={**COMMON}),
    get(400, target="/", want={**COMMON}),
)
NO_COMMON: dict[str, str | None] = {"Server": None, "X-Amz-Request-Id": None}
case(
    "headers.not-on-static-and-redirects",
    get(200, target="/favicon.ico", want=NO_COMMON),
    get(307, target="//x", want=NO_COMMON),
)

for label, target, location in (
    ("double-slash", "//{fid}", "/{fid}"),
    ("dot", "/./{fid}?a=b&c=d", "/{fid}?a=b&c=d"),
    ("dot-dot", "/x/../{fid}", "/{fid}"),
    ("above-root", "/../..", "/"),
    ("trailing-slash", "/a//b/", "/a/b/"),
    ("static", "/seaweedfsstatic", "/seaweedfsstatic/"),
):
    shown = location.replace("&", "&amp;")
    case(
        f"redirect.{label}",
        get(
            307,
            target=target,
            want={"Location": location, "Content-Type": "text/html; charset=utf-8"},
            body=f'<a href="{shown}">Temporary Redirect</a>.\n\n',
        ),
        head(307, target=target, want={"Location": location, "Content-Type": "text/html; charset=utf-8"}),
        Step(
            "PUT",
            target,
            307,
            (OCTETS,),
            HELLO,
            {"Location": location, "Content-Type": None, "Content-Length": "0"},
            b"",
        ),
    )
for label, target, location in (
    ("escapes-are-escaped-again", "//%41", "/%2541"),
    ("invalid-bytes-are-decoded-first", "/{x}/%2e%2e", "/"),
    ("marks-are-escaped", "//a'(b)", "/a%27%28b%29"),
    ("query-stays", "//a?x=%41&y", "/a?x=%41&y"),
    ("any-method", "/seaweedfsstatic", "/seaweedfsstatic/"),
):
    case(f"redirect.encoding.{label}", Step("OPTIONS", target, 307, want={"Location": location}, body=b""))
case("redirect.escaped-slashes-are-none", get(400, target="/a%2F%2Fb"))

# ------------------------------------------------------------------------------------------------ pages (http.md 12)

case(
    "page.health",
    *(
        Step(method, target, 200, want={"Content-Type": None}, body=b"")
        for method in ("GET", "POST", "DELETE")
        for target in ("/healthz", "/readyz")
    ),
)
case(
    "page.status",
    get(
        200,
        target="/status",
        want={"Content-Type": "application/json"},
        body=lambda b: (
            b.startswith(b'{"DiskStatuses":[{"dir":"')
            and b'"Version":"30GB 4.44 "' in b
            and b'"Volumes":[{"Collection":"","DiskType":""' in b
        ),
    ),
    get(200, target="/status?pretty=y", body=lambda b: b.startswith(b'{\n  "DiskStatuses": [\n    {\n      "dir": "')),
    Step("POST", "/status", 200, send=b"ignored"),
)
case(
    "page.ui",
    get(
        200,
        target="/ui/index.html",
        want={"Content-Type": "text/html; charset=utf-8", "Server": ANY},
        body=lambda b: b"olume" in b and b.count(b"<table") >= 3,
    ),
)
case(
    "page.static",
    get(
        200,
        target="/favicon.ico",
        want={"Content-Type": "image/x-icon", "Accept-Ranges": "bytes", "Etag": None},
        body=lambda b: b[:4] == b"\0\0\1\0",
    ),
    Step("POST", "/favicon.ico", 200),
    get(
        200,
        target="/seaweedfsstatic/",
        want={"Content-Type": "text/html; charset=utf-8"},
        body=lambda b: b'<a href="bootstrap/">' in b,
    ),
    get(206, ("Range", "bytes=0-3"), target="/favicon.ico", want={"Content-Length": "4"}, body=b"\0\0\1\0"),
    get(
        404,
        target="/seaweedfsstatic/nope.js",
        want={"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"},
        body=b"404 page not found\n",
    ),
)
case(
    "page.none-of-upstreams-removed",
    *(
        get(400, target=target, want=BARE, body=b"")
        for target in ("/stats/counter", "/stats/memory", "/stats/disk", "/metrics", "/healthz/", "/debug/pprof/")
    ),
)

# ------------------------------------------------------------------------------------------------- reads (http.md 6)

case(
    "read.plain",
    put(HELLO),
    get(
        200,
        body=HELLO,
        want={
            "Accept-Ranges": "bytes",
            "Content-Length": "11",
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Disposition": 'inline; filename="{fid}"',
            "Last-Modified": DATE,
            "Etag": '"c99465aa"',
        },
    ),
    head(
        200,
        want={
            "Accept-Ranges": "bytes",
            "Content-Length": "11",
            "Content-Type": None,
            "Etag": '"c99465aa"',
            "Last-Modified": DATE,
        },
    ),
)
case("read.unknown-key", get(404, want={**BARE, "Etag": None}, body=b""), head(404, want={"Content-Length": None}))
case(
    "read.wrong-cookie",
    put(HELLO),
    get(404, target="/{vid},{other}", want={**BARE, "Etag": None, "Last-Modified": None}, body=b""),
)
case("read.missing-volume", get(404, want=BARE, body=b""), volume=77)
case(
    "read.deleted",
    put(HELLO),
    delete(202),
    get(404),
    get(200, target="/{fid}?readDeleted=true", body=HELLO, want={"Last-Modified": DATE}),
    get(404, target="/{fid}?readDeleted=1"),
)
case(
    "read.empty-needle-ignores-the-cookie",
    put(b""),
    get(
        200,
        want={
            "Content-Length": "0",
            "Etag": '"00000000"',
            "Last-Modified": None,
            "Content-Disposition": None,
            "Content-Type": None,
        },
        body=b"",
    ),
    get(200, target="/{vid},{other}", body=b""),
    get(206, ("Range", "bytes=0-"), want={"Content-Range": "bytes 0--1/0", "Content-Length": "0"}, body=b""),
)
case(
    "read.empty-needle-named-by-the-url",
    put(b""),
    get(
        200,
        target="/{vid}/{hex}/f.css",
        want={"Content-Type": "text/css; charset=utf-8", "Content-Disposition": "inline; filename=f.css"},
    ),
)
BIG = bytes(range(256)) * 5000  # above 1 MiB: streamed
case(
    "read.large-is-streamed",
    put(BIG),
    get(200, body=BIG, want={"Content-Length": str(len(BIG)), "Content-Type": "application/octet-stream"}),
    get(
        206,
        ("Range", "bytes=1048570-1048589"),
        body=BIG[1048570:1048590],
        want={"Content-Range": f"bytes 1048570-1048589/{len(BIG)}"},
    ),
    get(206, ("Range", "bytes=-5"), body=BIG[-5:]),
    get(
        206,
        ("Range", "bytes=0-1,1000000-1000003"),
        body=lambda b: BIG[1000000:1000004] in b and b.count(b"Content-Range: bytes ") == 2,
    ),
    head(200, want={"Content-Length": str(len(BIG)), "Content-Type": None}),
    get(304, ("If-None-Match", "{etag}")),
)

case(
    "cond.if-none-match",
    put(HELLO),
    get(
        304,
        ("If-None-Match", '"c99465aa"'),
        want={"Etag": None, "Last-Modified": DATE, "Content-Length": None, "Accept-Ranges": None},
        body=b"",
    ),
    head(304, ("If-None-Match", '"c99465aa"')),
)
for label, value in (("weak", 'W/"c99465aa"'), ("star", "*"), ("list", '"x", "c99465aa"'), ("unquoted", "c99465aa")):
    case(f"cond.if-none-match.{label}", put(HELLO), get(200, ("If-None-Match", value), body=HELLO))
for label, value, status in (
    ("same-second", DATE, 304),
    ("later", "Tue, 14 Nov 2023 22:13:21 GMT", 304),
    ("earlier", "Tue, 14 Nov 2023 22:13:19 GMT", 200),
    ("rfc850", "Tuesday, 14-Nov-23 22:13:20 GMT", 200),
    ("utc", "Tue, 14 Nov 2023 22:13:20 UTC", 200),
    ("rubbish", "yesterday", 200),
):
    case(f"cond.if-modified-since.{label}", put(HELLO), get(status, ("If-Modified-Since", value)))
case("cond.since-wins-over-none-match", put(HELLO), get(304, ("If-None-Match", '"nope"'), ("If-Modified-Since", DATE)))
case(
    "cond.others-are-ignored",
    put(HELLO),
    get(200, ("If-Match", '"nope"')),
    get(200, ("If-Unmodified-Since", "Tue, 14 Nov 2000 22:13:20 GMT")),
    get(206, ("If-Range", '"nope"'), ("Range", "bytes=0-1"), body=b"he"),
)

for label, value, content_range, body in (
    ("first", "bytes=0-4", "bytes 0-4/11", b"hello"),
    ("open", "bytes=6-", "bytes 6-10/11", b"world"),
    ("suffix", "bytes=-5", "bytes 6-10/11", b"world"),
    ("long-suffix", "bytes=-50", "bytes 0-10/11", HELLO),
    ("cut", "bytes=6-100", "bytes 6-10/11", b"world"),
    ("blanks", "bytes= 0 - 4 ,", "bytes 0-4/11", b"hello"),
    ("at-the-end", "bytes=11-", "bytes 11-10/11", b""),
    ("at-the-end-closed", "bytes=11-20", "bytes 11-10/11", b""),
    ("suffix-zero", "bytes=-0", "bytes 11-10/11", b""),
):
    case(
        f"range.one.{label}",
        put(HELLO),
        get(
            206,
            ("Range", value),
            body=body,
            want={"Content-Range": content_range, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"},
        ),
    )
for label, value in (
    ("past-the-end", "bytes=12-"),
    ("backwards", "bytes=5-1"),
    ("unit", "items=0-1"),
    ("upper-case", "BYTES=0-1"),
    ("letters", "bytes=a-b"),
    ("no-dash", "bytes=5"),
):
    case(
        f"range.invalid.{label}",
        put(HELLO),
        get(
            416,
            ("Range", value),
            body=b"invalid range\n",
            want={
                "Content-Type": "text/plain; charset=utf-8",
                "X-Content-Type-Options": "nosniff",
                "Etag": ANY,
                "Last-Modified": DATE,
                "Content-Disposition": ANY,
                "Accept-Ranges": "bytes",
                "Content-Range": None,
            },
        ),
    )
case(
    "range.none-in-it",
    put(HELLO),
    get(200, ("Range", "bytes="), body=b"", want={"Content-Length": "0", "Content-Type": None}),
    get(200, ("Range", "bytes=,"), body=b""),
)
case(
    "range.more-than-there-is",
    put(HELLO),
    get(200, ("Range", "bytes=0-10,0-0"), body=b"", want={"Content-Length": "0"}),
)
case(
    "range.several",
    put(HELLO),
    get(
        206,
        ("Range", "bytes=0-1,4-5,0-0"),
        want={"Content-Type": ANY, "Content-Range": None},
        body=lambda b: (
            b.count(b"\r\nContent-Range: bytes ") == 3
            and b"Content-Type: \r\n\r\nhe\r\n" in b
            and b.endswith(b"--\r\n")
        ),
    ),
)
case(
    "range.head-ignores-it",
    put(HELLO),
    head(200, ("Range", "bytes=0-4"), want={"Content-Length": "11", "Content-Range": None}),
)
case(
    "range.sniffs-the-piece",
    put(b"\x00\x01<html>"),
    get(206, ("Range", "bytes=2-"), want={"Content-Type": "text/html; charset=utf-8"}),
    get(200, want={"Content-Type": "application/octet-stream"}),
)

case(
    "type.stored",
    put(HELLO, ("Content-Type", "application/x-thing; a=b")),
    get(200, want={"Content-Type": "application/x-thing; a=b"}),
    head(200, want={"Content-Type": "application/x-thing; a=b"}),
)
case(
    "type.by-name-in-the-url",
    put(HELLO),
    get(
        200,
        target="/{vid}/{hex}/a.json",
        want={"Content-Type": "application/json", "Content-Disposition": "inline; filename=a.json"},
    ),
)
case(
    "type.not-by-extension-in-the-url",
    put(HELLO),
    get(200, target="/{fid}.jpg", want={"Content-Type": "text/plain; charset=utf-8"}),
)
case(
    "type.octet-stream-by-extension",
    post([file_part("a.bin", HELLO)]),
    get(200, want={"Content-Type": "application/octet-stream"}),
)
case(
    "disposition.download",
    put(HELLO),
    *(
        get(200, target="/{fid}?dl=" + value, want={"Content-Disposition": 'attachment; filename="{fid}"'})
        for value in ("true", "1", "t", "TRUE")
    ),
    *(
        get(200, target="/{fid}?dl=" + value, want={"Content-Disposition": 'inline; filename="{fid}"'})
        for value in ("false", "yes", "")
    ),
)
case(
    "disposition.encoded",
    put(HELLO),
    get(
        200,
        target="/{vid}/{hex}/a%20b%E4%BD%A0.json",
        want={"Content-Disposition": "inline; filename*=utf-8''a%20b%E4%BD%A0.json"},
    ),
)
case(
    "override.headers",
    put(HELLO),
    get(
        200,
        target="/{fid}?response-content-type=text%2Fcss&response-cache-control=no-store&response-expires=0&Response-Content-Language=de&response-content-disposition=x",
        want={
            "Content-Type": "text/css",
            "Cache-Control": "no-store",
            "Expires": "0",
            "Content-Language": "de",
            "Content-Disposition": "x",
        },
    ),
    get(200, target="/{fid}?response-cache-control=a%0d%0aX-Evil:%201", want={"X-Evil": None}),
)
case(
    "query.bad-pairs-are-dropped-on-reads",
    put(HELLO),
    get(200, target="/{fid}?a=%zz&dl=true", want={"Content-Disposition": 'attachment; filename="{fid}"'}),
    get(200, target="/{fid}?x=1;y=2&dl=true", want={"Content-Disposition": 'attachment; filename="{fid}"'}),
)
case(
    "query.form-field-of-a-read",
    put(HELLO),
    Step(
        "GET",
        "/{fid}",
        200,
        (FORM,),
        form([(['Content-Disposition: form-data; name="dl"'], b"true")]),
        {"Content-Disposition": 'attachment; filename="{fid}"'},
        HELLO,
    ),
)

case(
    "pairs.come-back",
    put(HELLO, ("seaweed-foo-bar", "v1"), ("Seaweed-X", "<a&b>"), ("Seaweed-", "lost")),
    get(200, want={"Foo-Bar": "v1", "X": "<a&b>"}),
    head(200, want={"Foo-Bar": "v1"}),
)
case(
    "pairs.override-headers",
    put(HELLO, ("Seaweed-Etag", '"mine"'), ("Seaweed-Content-Disposition", "theirs"), ("Seaweed-Server", "other")),
    get(200, want={"Etag": '"mine"', "Content-Disposition": "theirs", "Server": "other"}),
)
case(
    "pairs.cannot-change-the-framing",
    put(HELLO, ("Seaweed-Content-Length", "5"), ("Seaweed-Transfer-Encoding", "chunked")),
    get(200, body=HELLO, want={"Content-Length": "11", "Transfer-Encoding": None}),
)
case(
    "pairs.too-many-are-dropped",
    put(HELLO, *((f"Seaweed-K{number}", "v" * 6000) for number in range(12))),
    get(200, want={"K1": None}, body=HELLO),
)

case(
    "gzip.as-sent-by-the-client",
    put(GZIPPED, ("Content-Encoding", "gzip"), ("Content-Type", "text/plain")),
    get(
        200,
        ("Accept-Encoding", "gzip"),
        body=GZIPPED,
        want={"Content-Encoding": "gzip", "Content-Length": str(len(GZIPPED)), "Content-Type": "text/plain"},
    ),
    get(200, ("Accept-Encoding", "gzip;q=0"), want={"Content-Encoding": "gzip"}),
    get(200, body=TEXT, want={"Content-Encoding": None, "Content-Length": str(len(TEXT))}),
    get(200, ("Accept-Encoding", "GZIP"), body=TEXT),
    head(200, want={"Content-Length": str(len(TEXT))}),
    head(200, ("Accept-Encoding", "gzip"), want={"Content-Length": str(len(GZIPPED)), "Content-Encoding": "gzip"}),
    get(206, ("Range", "bytes=4-8"), body=b"quick"),
    get(
        206,
        ("Accept-Encoding", "gzip"),
        ("Range", "bytes=0-1"),
        body=b"\x1f\x8b",
        want={"Content-Encoding": "gzip", "Content-Range": f"bytes 0-1/{len(GZIPPED)}"},
    ),
)
case(
    "gzip.that-is-none",
    put(b"this is not gzip", ("Content-Encoding", "gzip")),
    get(200, ("Accept-Encoding", "gzip"), body=b"this is not gzip", want={"Content-Encoding": None}),
)
case(
    "gzip.by-the-server",
    put(TEXT, ("Content-Type", "text/plain")),
    get(200, body=TEXT, want={"Content-Encoding": None}),
    get(200, ("Accept-Encoding", "gzip"), want={"Content-Encoding": "gzip"}, body=lambda b: gzip.decompress(b) == TEXT),
)
for label, media, packed in (
    ("json-is-not-packed", "application/json", False),
    ("xml-is-packed", "application/xml", True),
    ("script-is-packed", "application/javascript", True),
    ("octets-are-not-packed", "application/octet-stream", False),
    ("image-is-not-packed", "image/svg+xml", False),
):
    case(
        f"gzip.type.{label}",
        put(TEXT, ("Content-Type", media)),
        get(200, ("Accept-Encoding", "gzip"), want={"Content-Encoding": "gzip" if packed else None}),
    )
case(
    "gzip.not-for-replicas",
    put(TEXT, ("Content-Type", "text/plain"), query="?type=replicate"),
    get(200, ("Accept-Encoding", "gzip"), want={"Content-Encoding": None}, body=TEXT),
)

# ------------------------------------------------------------------------------------------------ writes (http.md 8)

case(
    "write.raw",
    put(
        HELLO,
        want={"Etag": '"c99465aa"', "Content-Md5": "", **ERROR},
        body='{"name":"{fid}","size":11,"eTag":"c99465aa","mime":"application/octet-stream"}',
    ),
)
case(
    "write.empty",
    put(b"", body='{"name":"{fid}","eTag":"00000000","mime":"application/octet-stream"}'),
    put(b"", status=201),
)
case(
    "write.unchanged",
    put(HELLO),
    put(
        HELLO,
        ("Content-MD5", MD5),
        status=204,
        want={"Etag": '"c99465aa"', "Content-Md5": MD5, "Content-Type": None, "Content-Length": None},
        body=b"",
    ),
)
case("write.changed", put(HELLO), put(b"other"), get(200, body=b"other"))
case(
    "write.form",
    post(
        [file_part("h.txt", HELLO, "Content-Type: text/plain")],
        body='{"name":"h.txt","size":11,"eTag":"c99465aa","mime":"text/plain"}',
    ),
    get(200, body=HELLO, want={"Content-Type": "text/plain", "Content-Disposition": "inline; filename=h.txt"}),
)
case(
    "write.form-without-a-file-name",
    post(
        [
            (['Content-Disposition: form-data; name="note"'], b"abc"),
            (['Content-Disposition: form-data; name="note2"'], b"def"),
        ],
        body='{"size":3,"eTag":"364b3fb7"}',
    ),
)
case(
    "write.form-first-named-part-wins",
    post(
        [(['Content-Disposition: form-data; name="note"'], b"abc"), file_part("x.bin", HELLO)],
        body=lambda b: b'"name":"x.bin","size":11' in b,
    ),
)
case(
    "write.form-fields-are-no-parameters",
    post([(['Content-Disposition: form-data; name="ts"'], b"1600000000"), file_part("x.bin", HELLO)]),
    get(200, want={"Last-Modified": ANY}, body=HELLO),
)
case(
    "write.form-path-is-cut",
    post([file_part("c:\\\\dir\\\\in/ner.bin", HELLO)], body=lambda b: b'"name":"ner.bin"' in b),
)
case(
    "write.put-does-not-parse-forms",
    Step("PUT", "/{fid}", 201, (FORM,), form([file_part("x", HELLO)])),
    get(200, body=form([file_part("x", HELLO)])),
)
case(
    "write.post-needs-a-form",
    Step("POST", "/{fid}", 400, (), HELLO, ERROR, "request Content-Type isn't multipart/form-data"),
)
case(
    "write.form-without-boundary",
    Step(
        "POST",
        "/{fid}",
        400,
        (("Content-Type", "multipart/form-data"),),
        HELLO,
        ERROR,
        "no multipart boundary param in Content-Type",
    ),
)
case("write.form-without-parts", Step("POST", "/{fid}", 400, (FORM,), HELLO, ERROR, "multipart: NextPart: EOF"))
case(
    "write.form-cut-off",
    Step("POST", "/{fid}", 400, (FORM,), form([file_part("x", HELLO)])[:-20], ERROR, "unexpected EOF"),
)
case("write.post-of-octets", Step("POST", "/{fid}", 201, (OCTETS,), HELLO), get(200, body=HELLO))
case(
    "write.named-by-disposition",
    put(HELLO, ("Content-Disposition", 'attachment; filename="q u.txt"'), body=lambda b: b'"name":"q u.txt"' in b),
)
case(
    "write.urlencoded-body-is-eaten",
    Step(
        "POST",
        "/{fid}",
        201,
        (("Content-Type", "application/x-www-form-urlencoded"),),
        b"ts=1700000000&x=y",
        body='{"name":"{fid}","eTag":"00000000","mime":"application/x-www-form-urlencoded"}',
    ),
)
case(
    "write.media-type-must-parse",
    Step("PUT", "/{fid}", 400, (("Content-Type", ";;"),), HELLO, ERROR, "mime: no media type"),
    Step(
        "PUT", "/{fid}", 400, (("Content-Type", "text/plain; charset"),), HELLO, ERROR, "mime: invalid media parameter"
    ),
)
case(
    "write.query-must-parse",
    Step("PUT", "/{fid}?a=%zz", 400, (OCTETS,), HELLO, ERROR, 'invalid URL escape "%zz"'),
    Step("PUT", "/{fid}?a=1;b=2", 400, (OCTETS,), HELLO, ERROR, "invalid semicolon separator in query"),
)
case(
    "write.md5",
    put(
        HELLO,
        ("Content-MD5", MD5),
        want={"Content-Md5": MD5},
        body='{"name":"{fid}","size":11,"eTag":"c99465aa","mime":"application/octet-stream","contentMd5":"'
        + MD5
        + '"}',
    ),
)
case("write.md5-of-a-part", post([file_part("x", HELLO, f"Content-MD5: {MD5}")], want={"Content-Md5": MD5}))
case(
    "write.md5-mismatch",
    put(
        HELLO,
        ("Content-MD5", "AAAAAAAAAAAAAAAAAAAAAA=="),
        status=400,
        want=ERROR,
        body=f"Content-MD5 did not match md5 of file data expected [AAAAAAAAAAAAAAAAAAAAAA==] received [{MD5}] size 11",
    ),
    get(404),
)
case(
    "write.md5-is-of-unpacked-data",
    put(
        GZIPPED,
        ("Content-Encoding", "gzip"),
        ("Content-MD5", base64.b64encode(hashlib.md5(TEXT).digest()).decode()),
        body=lambda b: f'"size":{len(TEXT)},'.encode() in b,
    ),
)
case(
    "write.gzip-size-is-unpacked",
    put(GZIPPED, ("Content-Encoding", "gzip"), body=lambda b: f'"size":{len(TEXT)},'.encode() in b),
)
case(
    "write.too-large",
    put(bytes((2 << 20) + 1), status=400, want=ERROR, body="file over the limited 2097152 bytes"),
    put(bytes(2 << 20)),
    post([file_part("x", bytes((2 << 20) + 1))], status=400, body="file over the limited 2097152 bytes"),
)
case(
    "write.ts",
    *(
        step
        for value, date in (("1", "Thu, 01 Jan 1970 00:00:01 GMT"), ("1099511627776", None))
        for step in (put(b"x" + value.encode(), query=f"?ts={value}"), head(200, want={"Last-Modified": date}))
    ),
)
case(
    "write.long-name-and-mime-are-not-kept",
    post([file_part("n" * 256, HELLO, "Content-Type: " + "m" * 256)], body='{"size":11,"eTag":"c99465aa"}'),
    post([file_part("n" * 255, b"other")], body=lambda b: b'"name":"' + b"n" * 255 + b'"' in b),
)
case(
    "write.read-only-volume",
    put(HELLO, status=500, want=ERROR, body="failed to write to local disk: volume 2 is read only"),
    volume=2,
)
case(
    "write.missing-volume",
    put(HELLO, status=404, want=ERROR, body="volume 77 not found"),
    put(HELLO, query="?type=replicate", status=404, body="volume 77 not found"),
    volume=77,
)
case(
    "write.other-cookie",
    put(HELLO),
    Step(
        "PUT",
        "/{vid},{other}",
        500,
        (OCTETS,),
        b"x",
        ERROR,
        lambda b: b"failed to write to local disk: mismatching cookie " in b,
    ),
)
case(
    "write.other-cookie-of-a-deleted-key",
    put(HELLO),
    delete(202),
    Step("PUT", "/{vid},{other}", 500, (OCTETS,), b"x", ERROR, lambda b: b"mismatching cookie " in b),
    put(b"again"),
    get(200, body=b"again"),
)
case(
    "write.too-few-replicas",
    put(
        HELLO,
        status=500,
        want=ERROR,
        body="replicating operations [1] is less than volume 5 replication copy count [2]",
    ),
    get(404),
    put(HELLO, query="?type=replicate"),
    get(200, body=HELLO),
    volume=5,
)
case(
    "write.pretty",
    put(
        HELLO,
        query="?pretty=1",
        body='{\n  "name": "{fid}",\n  "size": 11,\n  "eTag": "c99465aa",\n  "mime": "application/octet-stream"\n}',
    ),
)
case("write.fsync", put(HELLO, query="?fsync=true"), get(200, body=HELLO))
case(
    "write.ttl-volume-gives-its-ttl",
    put(HELLO, query=""),
    get(200, body=HELLO),
    put(HELLO, query="", status=201),
    volume=3,
)
case(
    "write.chunked-body",
    Step("PUT", "/{fid}", 201, (OCTETS, ("Transfer-Encoding", "chunked")), b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"),
    get(200, body=HELLO),
)
case(
    "write.error-is-escaped",
    Step("PUT", "/x<&>,{hex}", 400, (OCTETS,), HELLO, ERROR, lambda b: b"x\\u003c\\u0026\\u003e" in b),
)

# ----------------------------------------------------------------------------------------------- deletes (http.md 11)

case(
    "delete.done",
    put(HELLO),
    delete(202, want=ERROR, body=lambda b: b.startswith(b'{"size":6')),
    get(404),
    delete(404, body='{"size":0}'),
)
case("delete.unknown-key", delete(404, want=ERROR, body='{"size":0}'))
case("delete.missing-volume", delete(404, body='{"size":0}'), volume=77)
case("delete.bad-vid", delete(404, target="/x,{hex}", body='{"size":0}'))
case("delete.bad-fid", delete(400, target="/1,zz{hex}", want=ERROR), delete(400, target="/1", body="Invalid fid: "))
case(
    "delete.wrong-cookie",
    put(HELLO),
    delete(400, target="/{vid},{other}", want=ERROR, body="File Random Cookie does not match."),
    get(200, body=HELLO),
)
case(
    "delete.empty-needle-ignores-the-cookie",
    put(b""),
    delete(202, target="/{vid},{other}", body='{"size":0}'),
    get(404),
)
case("delete.read-forms", put(HELLO), delete(202, target="/{vid}/{hex}/name.txt"), get(404))
case(
    "delete.too-few-replicas",
    put(HELLO, query="?type=replicate"),
    delete(
        500,
        want=ERROR,
        body="Deletion Failed: replicating operations [1] is less than volume 5 replication copy count [2]",
    ),
    get(200, body=HELLO),
    delete(202, target="/{fid}?type=replicate"),
    volume=5,
)
case("delete.read-only-volume", delete(404, body='{"size":0}'), volume=2)
case("delete.body-is-not-read", put(HELLO), Step("DELETE", "/{fid}", 202, send=b"a body on delete"), get(404))

# ------------------------------------------------------------------------------------------- manifests (http.md 6.10)

case(
    "manifest.expands",
    Step("PUT", "/{fid}_1", 201, (OCTETS,), b"hello "),
    Step("PUT", "/{fid}_2", 201, (OCTETS,), b"world"),
    Step(
        "PUT",
        "/{fid}?cm=true",
        201,
        (("Content-Type", "application/json"),),
        b'{"name":"big.txt","mime":"text/x-big","size":11,"chunks":[{"fid":"{vid},{next2}","offset":6,"size":5},{"fid":"{vid},{next1}","offset":0,"size":6}]}',
    ),
    get(
        200,
        body=HELLO,
        want={
            "X-File-Store": "chunked",
            "Content-Type": "text/x-big",
            "Content-Disposition": "inline; filename=big.txt",
            "Content-Length": "11",
        },
    ),
    head(200, want={"X-File-Store": "chunked", "Content-Length": "11"}),
    get(206, ("Range", "bytes=4-7"), body=b"o wo", want={"Content-Range": "bytes 4-7/11"}),
    get(206, ("Range", "bytes=0-1,8-9"), body=lambda b: b"\r\n\r\nhe\r\n" in b and b"\r\n\r\nrl\r\n" in b),
    get(200, target="/{fid}?cm=false", body=lambda b: b.startswith(b'{"name":"big.txt"'), want={"X-File-Store": None}),
    get(200, target="/{fid}?cm=0", body=HELLO),
    get(
        200,
        target="/{vid}/{hex}/other.css",
        want={"Content-Disposition": "inline; filename=other.css", "Content-Type": "text/x-big"},
    ),
    delete(202, body='{"size":11}'),
    get(404),
    get(404, target="/{fid}_1"),
    get(404, target="/{fid}_2"),
)
case(
    "manifest.broken-is-served-as-it-is",
    Step("PUT", "/{fid}?cm=1", 201, (OCTETS,), b"{broken"),
    get(200, body=b"{broken", want={"X-File-Store": None}),
    delete(
        500,
        want=ERROR,
        body="Load chunks manifest error: invalid character 'b' looking for beginning of object key string",
    ),
)
case(
    "manifest.missing-chunk",
    Step("PUT", "/{fid}?cm=1", 201, (OCTETS,), b'{"chunks":[{"fid":"{vid},{next1}","offset":0,"size":6}]}'),
    get(
        500,
        want={"Content-Type": "text/plain; charset=utf-8"},
        body=lambda b: b.startswith(b"Read chunk needle error: [404] http://127.0.0.1:"),
    ),
    delete(202, body='{"size":0}'),
)
case(
    "manifest.unknown-volume",
    Step("PUT", "/{fid}?cm=1", 201, (OCTETS,), b'{"chunks":[{"fid":"98,{next1}","offset":0,"size":6}]}'),
    get(500, body=b"File Not Found\n"),
    delete(500, want=ERROR, body="Delete chunks error: chunk delete 98,{next1}: volume id 98 not found"),
    get(200, target="/{fid}?cm=false"),
)
case(
    "manifest.bad-fid",
    Step("PUT", "/{fid}?cm=1", 201, (OCTETS,), b'{"chunks":[{"fid":"not-a-valid-fid","offset":0,"size":6}]}'),
    delete(500, body="Delete chunks error: chunk delete not-a-valid-fid: Wrong fid format."),
)
case(
    "manifest.without-chunks",
    Step("PUT", "/{fid}?cm=1", 201, (OCTETS,), b'{"name":"x","chunks":[]}'),
    get(200, body=b"", want={"Content-Length": "0", "X-File-Store": "chunked"}),
)
