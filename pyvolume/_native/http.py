"""HTTP semantics of the engine (csrc/pv_http.c) for Python: paths, ranges, conditions, answers to reads, uploads.

Thin, typed wrappers: bytes in, bytes out, no sockets and no policy. Texts that go on the wire or come from it are
bytes, since they need not be UTF-8; `json_escape` turns any of them into a JSON string. Every function may be called
from any thread. Imports nothing of pyvolume but the compiled module and its neighbours.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyvolume import _pv
from pyvolume._native.borrow import Buffer, borrow

_ffi: Final[Any] = _pv.ffi
_lib: Final[Any] = _pv.lib
_unpack: Final[Any] = _ffi.unpack


_SCRATCH_BYTES: Final = 16384  # covers every rendering of an ordinary request without a second try
_MAX_PARTS: Final = 64  # body stretches of an ordinary multi-range answer, kept ready per thread
PAIRS_LIMIT_BYTES: Final = 65536


class UrlKind(enum.IntEnum):
    """What a request path is (contract http.md 4)."""

    NEEDLE = 0
    VID_ONLY = 1
    BAD = 2  # answer 400 (departure A2)
    DROP = 3  # dot before the comma: upstream closes the connection unanswered; treating it as BAD is right, too


class RangeKind(enum.IntEnum):
    """What a Range header asks for (contract http.md 6.8)."""

    NONE = 0
    SINGLE = 1
    MULTI = 2
    INVALID = 3  # 416
    EMPTY = 4  # 200 with an empty body
    OUTSIDE = 5  # 416 with another text


class PlanResult(enum.IntEnum):
    """Whether `plan_get` needs something of its caller first."""

    DONE = 0
    NEED_PLAIN = 1  # gunzip the data (nothing at all if that fails), set `plain`, ask again
    NEED_SNIFF = 2  # read `need_len` bytes of the data from `need_offset`, set `sniff` and `sniff_offset`, ask again


class PlanFlag(enum.IntFlag):
    """What a lane must know about the header block of a plan."""

    NO_LENGTH = 1  # no Content-Length: send it chunked
    HAS_SERVER = 2  # HAS_...: a stored pair set this header; the server adds none of its own
    HAS_DATE = 4
    HAS_REQUEST_ID = 8
    HAS_ALLOW_ORIGIN = 16
    HAS_ALLOW_CREDENTIALS = 32
    HAS_CONNECTION = 64
    CLOSE = 128  # close the connection after this answer


_URL_KINDS: Final = tuple(UrlKind)
_PLAN_RESULTS: Final = tuple(PlanResult)
_NO_PLAN_FLAGS: Final = PlanFlag(0)


class IdError(ValueError):
    """A volume id or file id that is none; `text` is upstream's wording as raw bytes, str() the same decoded."""

    def __init__(self, code: int, text: bytes) -> None:
        super().__init__(text.decode("utf-8", "replace"))
        self.code = code
        self.text = text


class UploadError(ValueError):
    """An upload that is answered 400; `text` is upstream's wording as raw bytes, str() the same decoded."""

    def __init__(self, text: bytes) -> None:
        super().__init__(text.decode("utf-8", "replace"))
        self.text = text


class BadEscape(ValueError):
    """A request path with a malformed percent escape (answered below the handlers, contract http.md 1)."""


class _Scratch(threading.local):
    """Buffers of one thread, reused by every call on it."""

    def __init__(self) -> None:
        self.buf: Any = _ffi.new("char[]", _SCRATCH_BYTES)
        self.cap: int = _SCRATCH_BYTES
        self.parts: Any = _ffi.new("pv_body_part[]", _MAX_PARTS)
        self.max_parts: int = _MAX_PARTS
        self.err: Any = _ffi.new("pv_errinfo *")
        self.size: Any = _ffi.new("size_t *")
        self.text: Any = _ffi.new("pv_text *")
        self.url: Any = _ffi.new("pv_url *")
        self.id_error: Any = _ffi.new("pv_id_error *")
        self.vid: Any = _ffi.new("uint32_t *")
        self.cookie: Any = _ffi.new("uint32_t *")
        self.key: Any = _ffi.new("uint64_t *")
        self.plan: Any = _ffi.new("pv_plan *")


_scratch = _Scratch()


def _bytes(text: Any) -> bytes:
    out: bytes = _unpack(text.p, text.n) if text.n else b""
    return out


def _render(call: Any) -> bytes:
    """Runs a rendering function `call(buf, cap) -> length`, with more room if it asks for it."""
    s = _scratch
    n = call(s.buf, s.cap)
    if n <= s.cap:
        text: bytes = _unpack(s.buf, n)
    else:
        buf = _ffi.new("char[]", n)
        text = _unpack(buf, call(buf, n))
    return text


class _Texts:
    """Fills pv_text fields and keeps what they point to alive for as long as this object lives."""

    __slots__ = ("_keep",)

    def __init__(self) -> None:
        self._keep: list[Any] = []

    def put(self, target: Any, value: Buffer | None) -> None:
        if value:
            c, target.n = borrow(value)
            self._keep.append(c)
            target.p = _ffi.cast("char *", c)

    def make(self, value: Buffer | None) -> Any:
        text = _ffi.new("pv_text *")
        self._keep.append(text)
        self.put(text, value)
        return text[0]


# ---------------------------------------------------------------------- file ids in paths


class UrlPath(NamedTuple):
    """A request path taken apart. `claim_fid` is what the fid claim of a token is compared with."""

    kind: UrlKind
    path: bytes
    vid: bytes
    fid: bytes
    filename: bytes
    ext: bytes
    claim_fid: bytes
    unclean: bool  # holds `//`, `.` or `..` elements: Go answers 307 before routing


def parse_url(raw: bytes) -> UrlPath:
    """Takes a path as sent (percent-encoded, without query) apart; raises BadEscape."""
    s = _scratch
    out = s.url
    size = len(raw)
    buf = s.buf if size <= s.cap else _ffi.new("char[]", size)
    if _lib.pv_url_parse(raw, size, buf, max(size, s.cap), out, s.err) != 0:
        raise BadEscape(f"invalid URL escape at byte {int(s.err.b)}")
    return UrlPath(
        _URL_KINDS[out.kind],
        _bytes(out.path),
        _bytes(out.vid),
        _bytes(out.fid),
        _bytes(out.filename),
        _bytes(out.ext),
        _bytes(out.claim_fid),
        bool(out.unclean),
    )


def write_fid(path: bytes) -> bytes:
    """The fid as POST and PUT derive it from a decoded path: behind the last comma, up to the last dot behind that."""
    s = _scratch
    src = _ffi.from_buffer("char[]", path)
    _lib.pv_url_write_fid(src, len(path), s.text)
    return _bytes(s.text)


def _id_error(e: Any) -> IdError:
    return IdError(int(e.code), _render(lambda buf, cap: _lib.pv_fid_error_text(e, buf, cap)))


def parse_vid(text: bytes) -> int:
    """Volume id of its decimal text; raises IdError with upstream's text (above 32 bits: out of range)."""
    s = _scratch
    if _lib.pv_vid_parse(text, len(text), s.vid, s.id_error) != 0:
        raise _id_error(s.id_error)
    return int(s.vid[0])


def parse_fid(text: bytes) -> tuple[int, int]:
    """(key, cookie) of `<key hex><cookie hex>[_delta]`; raises IdError with upstream's text."""
    s = _scratch
    if _lib.pv_fid_parse(text, len(text), s.key, s.cookie, s.id_error) != 0:
        raise _id_error(s.id_error)
    return int(s.key[0]), int(s.cookie[0])


# ---------------------------------------------------------------------- ranges, dates, conditions


def parse_range(header: bytes, total: int, max_ranges: int = 4096) -> tuple[RangeKind, list[tuple[int, int]]]:
    """Kind and (start, length) pairs of a Range header for `total` bytes; at most max_ranges pairs are returned."""
    s = _scratch
    src = _ffi.from_buffer("char[]", header)
    ranges = _ffi.new("pv_range[]", min(max_ranges, header.count(b",") + 1))
    kind = RangeKind(_lib.pv_range_parse(src, len(header), total, ranges, len(ranges), s.size))
    return kind, [(int(ranges[i].start), int(ranges[i].length)) for i in range(min(int(s.size[0]), len(ranges)))]


def content_range(start: int, length: int, total: int) -> bytes:
    """Value of a Content-Range header."""
    r = _ffi.new("pv_range *", {"start": start, "length": length})
    return _render(lambda buf, cap: _lib.pv_content_range(r, total, buf, cap))


def http_date(unix_s: int) -> str:
    """`Mon, 02 Jan 2006 15:04:05 GMT` of a Unix time."""
    return _render(lambda buf, cap: _lib.pv_http_date(unix_s, buf, cap)).decode("ascii")


def parse_http_date(text: bytes) -> int | None:
    """Unix time of the one date form that If-Modified-Since may have, or None."""
    v = _ffi.new("int64_t *")
    src = _ffi.from_buffer("char[]", text)
    return int(v[0]) if _lib.pv_http_date_parse(src, len(text), v) == 0 else None


def not_modified(if_modified_since: bytes, if_none_match: bytes, last_modified_s: int, checksum: int) -> bool:
    """Whether a read is answered 304."""
    t = _Texts()
    return bool(_lib.pv_cond_eval(t.make(if_modified_since), t.make(if_none_match), last_modified_s, checksum))


def etag(checksum: int) -> str:
    """The quoted entity tag of a stored checksum."""
    return _render(lambda buf, cap: _lib.pv_etag(checksum, buf, cap)).decode("ascii")


# ---------------------------------------------------------------------- media types


def content_disposition(name: bytes, attachment: bool) -> bytes:
    """`inline; filename=...` or `attachment; filename=...`, quoted or encoded as needed."""
    src = _ffi.from_buffer("char[]", name)
    return _render(lambda buf, cap: _lib.pv_content_disposition(attachment, src, len(name), buf, cap))


def sniff(data: Buffer) -> str:
    """Media type by content (at most the first 512 bytes are looked at)."""
    n = min(len(data), 512)
    text: bytes = _ffi.string(_lib.pv_sniff(borrow(data)[0], n))
    return text.decode("ascii")


def name_ext(name: bytes) -> bytes:
    """Extension of a name, from the last dot of its last element, dot included; empty if there is none."""
    s = _scratch
    src = _ffi.from_buffer("char[]", name)
    _lib.pv_name_ext(src, len(name), s.text)
    return _bytes(s.text)


_GLOBS: Final = ("usr/local/share/mime/globs2", "usr/share/mime/globs2")
_TYPE_FILES: Final = ("etc/mime.types", "etc/apache2/mime.types", "etc/apache/mime.types", "etc/httpd/conf/mime.types")


def _lines(path: Path) -> Iterator[bytes] | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return (line.removesuffix(b"\r") for line in data.split(b"\n"))


class MimeTable:
    """Media types by extension in upstream's four layers (contract http.md 13.3); immutable once made.

    `entries` are those of the system's files: (extension with dot, type, only_new), in order. `handle` is the engine's
    table for as long as this object lives.
    """

    def __init__(self, entries: Iterable[tuple[bytes, bytes, bool]] = ()) -> None:
        out = _ffi.new("pv_mime **")
        if _lib.pv_mime_new(out) != 0:
            raise MemoryError
        self.handle: Any = _ffi.gc(out[0], _lib.pv_mime_free)
        for ext, kind, only_new in entries:
            if _lib.pv_mime_add(self.handle, ext, len(ext), kind, len(kind), only_new) < 0:
                raise MemoryError
        if _lib.pv_mime_seal(self.handle) != 0:
            raise MemoryError

    def lookup(self, ext: bytes) -> bytes:
        """Type of an extension (with its dot), tried as written and in lower case; empty if unknown."""
        s = _scratch
        src = _ffi.from_buffer("char[]", ext)
        _lib.pv_mime_lookup(self.handle, src, len(ext), s.text)
        return _bytes(s.text)

    @classmethod
    def from_system(cls, root: Path = Path("/")) -> MimeTable:
        """Reads the machine's shared-mime `globs2`, or else its `mime.types` files. Blocks on disk; for start-up."""
        return cls(_system_entries(root))


def _system_entries(root: Path) -> Iterator[tuple[bytes, bytes, bool]]:
    for name in _GLOBS:
        lines = _lines(root / name)
        if lines is None:
            continue
        for line in lines:
            fields = line.split(b":")
            if len(fields) < 3 or not fields[0] or len(fields[2]) < 3:
                continue
            glob = fields[2]
            if fields[0].startswith(b"#") or not glob.startswith(b"*."):
                continue
            if not any(c in glob[1:] for c in b"?*["):
                yield glob[1:], fields[1], True
        return
    for name in _TYPE_FILES:
        for line in _lines(root / name) or ():
            words = line.split()
            if len(words) < 2 or words[0].startswith(b"#"):
                continue
            for ext in words[1:]:
                if ext.startswith(b"#"):
                    break
                yield b"." + ext, words[0], False


# ---------------------------------------------------------------------- answers to GET and HEAD

OVERRIDES: Final = (
    "response-cache-control",
    "response-content-disposition",
    "response-content-encoding",
    "response-content-language",
    "response-content-type",
    "response-expires",
)


@dataclass(slots=True)
class GetRequest:
    """What a read asks for. Header values are the first of that name, stripped; absent ones are empty."""

    head: bool = False
    attachment: bool = False  # dl=true
    filename: bytes = b""  # of the URL
    accept_encoding: bytes = b""
    range: bytes = b""
    if_modified_since: bytes = b""
    if_none_match: bytes = b""
    overrides: Mapping[str, bytes] = field(default_factory=dict)  # response-* values (maybe empty), see OVERRIDES
    random30: bytes = bytes(30)  # random bytes for the boundary of a multi-range answer


@dataclass(slots=True)
class GetNeedle:
    """What was found. `data` is None when it will be streamed; an empty needle has checksum and last_modified_s 0."""

    checksum: int
    flags: int
    data_len: int
    data: Buffer | None = None
    last_modified_s: int = 0
    name: bytes = b""
    mime: bytes = b""
    pairs: bytes = b""
    plain: bool = False  # data is what the client shall get: it was decompressed or made by an image operation
    expanded_manifest: bool = False  # name, mime and data_len are those of a chunk manifest
    sniff: bytes = b""
    sniff_offset: int = 0


class BodyPart(NamedTuple):
    """One stretch of a body: `text`, then `length` bytes of the data from `offset`."""

    text: bytes
    offset: int
    length: int


class GetPlan(NamedTuple):
    """An answer, complete but for Date, Server, X-Amz-Request-Id, CORS and Connection (see flags)."""

    result: PlanResult
    status: int
    flags: PlanFlag
    head: bytes  # header lines, each ending in CR LF
    parts: tuple[BodyPart, ...]
    body_len: int
    need_offset: int
    need_len: int

    @property
    def headers(self) -> list[tuple[str, str]]:
        """(name, value) pairs, bytes as latin-1."""
        lines = self.head.decode("latin-1").split("\r\n")[:-1]
        return [line.partition(": ")[::2] for line in lines]


def plan_get(req: GetRequest, needle: GetNeedle, table: MimeTable | None) -> GetPlan:
    """Status, headers and body of a needle that was found and whose cookie fits (contract http.md 6.3-6.8).

    Raises ValueError for a compressed needle without data.
    """
    t = _Texts()
    s = _scratch
    r = _ffi.new("pv_get_req *")
    if req.filename:
        t.put(r.filename, req.filename)
    if req.accept_encoding:
        t.put(r.accept_encoding, req.accept_encoding)
    if req.range:
        t.put(r.range, req.range)
    if req.if_modified_since:
        t.put(r.if_modified_since, req.if_modified_since)
    if req.if_none_match:
        t.put(r.if_none_match, req.if_none_match)
    for i, key in enumerate(OVERRIDES if req.overrides else ()):
        value = req.overrides.get(key)
        if value is not None:
            r.overrides[i].p = s.buf  # not NULL: the parameter is there
            t.put(r.overrides[i], value)
    random30 = _ffi.from_buffer("uint8_t[]", req.random30)
    if len(req.random30) != 30:
        raise ValueError("random30 has not 30 bytes")
    r.random30 = random30
    r.flags = (
        (_lib.PV_GET_HEAD if req.head else 0)
        | (_lib.PV_GET_ATTACHMENT if req.attachment else 0)
        | (_lib.PV_GET_CHUNKED if needle.expanded_manifest else 0)
    )
    n = _ffi.new("pv_get_needle *")
    t.put(n.name, needle.name)
    t.put(n.mime, needle.mime)
    t.put(n.pairs, needle.pairs)
    n.data_len = needle.data_len
    data = None
    if needle.data is not None:
        if len(needle.data) != needle.data_len:
            raise ValueError("data_len is not the length of data")
        data, _ = borrow(needle.data)
        n.data = data
    sniffed = None
    if needle.sniff:
        sniffed, _ = borrow(needle.sniff)
        n.sniff = sniffed
        n.sniff_len = len(needle.sniff)
        n.sniff_offset = needle.sniff_offset
    n.last_modified_s = needle.last_modified_s
    n.checksum = needle.checksum
    n.flags = needle.flags
    n.plain = needle.plain
    out = s.plan
    mime = table.handle if table is not None else _ffi.NULL
    buf, parts = s.buf, s.parts
    rc = _lib.pv_get_plan(r, n, mime, buf, s.cap, parts, s.max_parts, out, s.err)
    if rc == _lib.PV_EBUFFER:
        cap, max_parts = max(int(s.err.a), s.cap), max(int(s.err.b), s.max_parts)
        buf, parts = _ffi.new("char[]", cap), _ffi.new("pv_body_part[]", max_parts)
        rc = _lib.pv_get_plan(r, n, mime, buf, cap, parts, max_parts, out, s.err)
    if rc < 0:
        raise ValueError(f"needle cannot be planned ({rc})")
    view = _ffi.buffer(buf)
    return GetPlan(
        _PLAN_RESULTS[rc],
        int(out.status),
        PlanFlag(out.flags) if out.flags else _NO_PLAN_FLAGS,
        view[0 : out.head_len],
        tuple(
            BodyPart(view[p.text_offset : p.text_offset + p.text_len], int(p.data_offset), int(p.data_len))
            for p in (parts[i] for i in range(out.parts))
        ),
        int(out.body_len),
        int(out.need_offset),
        int(out.need_len),
    )


# ---------------------------------------------------------------------- uploads


@dataclass(frozen=True, slots=True)
class Upload:
    """The file found in an upload. A name or mime of 256 bytes or more is neither stored nor reported (8.5)."""

    data: memoryview
    name: bytes
    mime: bytes
    md5: bytes  # expected Content-MD5 text, empty if none was given
    is_multipart: bool
    is_gzipped: bool


def form_check(content_type: bytes) -> bool:
    """Whether the body is form fields (and is eaten as such); raises UploadError for a Content-Type that is none."""
    s = _scratch
    src = _ffi.from_buffer("char[]", content_type)
    rc = _lib.pv_form_check(src, len(content_type), s.text)
    if rc < 0:
        raise UploadError(_bytes(s.text))
    return bool(rc)


def parse_upload(
    *,
    method: bytes,
    path: bytes,
    body: Buffer,
    size_limit: int,
    table: MimeTable | None,
    is_manifest: bool = False,
    content_type: bytes = b"",
    content_disposition: bytes = b"",
    content_encoding: bytes = b"",
    content_md5: bytes = b"",
) -> Upload:
    """Finds the file in a POST or PUT (contract http.md 8.3-8.5). path is the decoded path; body is b"" when form_check
    said so. The data of the result is a view of body (or of decoded bytes). Raises UploadError with the 400 text."""
    t = _Texts()
    s = _scratch
    r = _ffi.new("pv_upload_req *")
    t.put(r.method, method)
    t.put(r.content_type, content_type)
    t.put(r.content_disposition, content_disposition)
    t.put(r.content_encoding, content_encoding)
    t.put(r.content_md5, content_md5)
    t.put(r.path, path)
    view = memoryview(body)
    src, r.body_len = borrow(view)
    r.body = src
    r.size_limit = size_limit
    r.is_manifest = is_manifest
    if table is not None:
        r.mime = table.handle
    out = _ffi.new("pv_upload *")
    buf = s.buf
    rc = _lib.pv_upload_parse(r, buf, s.cap, out, s.err)
    while rc == _lib.PV_EBUFFER:
        cap = int(s.err.a)
        buf = _ffi.new("char[]", cap)
        rc = _lib.pv_upload_parse(r, buf, cap, out, s.err)
    if rc != 0:
        raise UploadError(_bytes(out.message))
    start = int(out.data - src) if out.data_len else 0
    data = view[start : start + int(out.data_len)]
    if out.quoted:
        plain = bytearray(int(out.decoded_len))
        if _lib.pv_qp_decode(out.data, out.data_len, *borrow(plain, writable=True), s.size) != 0:
            raise AssertionError("quoted-printable text was checked before")
        data = memoryview(plain)[: int(s.size[0])]
    return Upload(
        data, _bytes(out.name), _bytes(out.mime), _bytes(out.md5), bool(out.is_multipart), bool(out.is_gzipped)
    )


def should_compress(name: bytes, mime: bytes, data: Buffer) -> bool:
    """Whether upstream would gzip such an upload (8.4); with an empty mime the data is sniffed."""
    t = _Texts()
    return bool(_lib.pv_should_compress(t.make(name), t.make(mime), *borrow(data)))


def build_pairs(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """JSON of the `Seaweed-*` headers among (name, value) pairs, or None (no such header, or too long to be kept)."""
    chosen = [h for h in headers if h[0][:8].lower() == b"seaweed-"]
    if not chosen:
        return None
    t = _Texts()
    arr = _ffi.new("pv_header[]", len(chosen))
    for i, (name, value) in enumerate(chosen):
        t.put(arr[i].name, name)
        t.put(arr[i].value, value)
    order = _ffi.new("uint32_t[]", len(chosen))
    s = _scratch
    buf = s.buf
    rc = _lib.pv_pairs_build(arr, len(chosen), order, buf, s.cap, s.size)
    if rc == _lib.PV_EBUFFER:
        buf = _ffi.new("char[]", PAIRS_LIMIT_BYTES)
        rc = _lib.pv_pairs_build(arr, len(chosen), order, buf, PAIRS_LIMIT_BYTES, s.size)
    return bytes(_ffi.buffer(buf, s.size[0])) if rc == 1 else None


def parse_pairs(json: bytes) -> list[tuple[bytes, bytes]]:
    """Names and values of stored pairs, in order, repeated names kept; nothing for what is no JSON object."""
    s = _scratch
    src = _ffi.from_buffer("char[]", json)
    cap, most = 3 * len(json) + 1, len(json) // 4 + 1
    buf, arr = _ffi.new("char[]", cap), _ffi.new("pv_header[]", most)
    if _lib.pv_pairs_parse(src, len(json), buf, cap, arr, most, s.size, s.err) != 0:
        return []
    return [(_bytes(arr[i].name), _bytes(arr[i].value)) for i in range(s.size[0])]


def parse_ttl(text: bytes) -> tuple[int, int]:
    """Stored (count, unit) of a ttl text; (0, 0) for none, a bad one or zero."""
    count, unit = _ffi.new("uint8_t *"), _ffi.new("uint8_t *")
    if not _lib.pv_ttl_parse(_ffi.from_buffer("char[]", text), len(text), count, unit):
        return 0, 0
    return int(count[0]), int(unit[0])


def parse_ts(text: bytes) -> int:
    """Seconds of a `ts` parameter of a write; 0 for a text that is no unsigned decimal number."""
    return int(_lib.pv_ts_parse(_ffi.from_buffer("char[]", text), len(text)))


def parse_bool(text: bytes) -> bool | None:
    """Go's ParseBool; None for a text it refuses."""
    rc = int(_lib.pv_bool_parse(_ffi.from_buffer("char[]", text), len(text)))
    return None if rc < 0 else rc == 1


def parse_int(text: bytes) -> int | None:
    """Go's signed 64-bit decimal; None for a text it refuses (syntax or range)."""
    v = _ffi.new("int64_t *")
    return int(v[0]) if _lib.pv_int_parse(_ffi.from_buffer("char[]", text), len(text), v) == 0 else None


def write_reply(name: bytes, size: int, checksum: int, mime: bytes, md5: bytes) -> bytes:
    """JSON body of a 201 answer (8.8)."""
    t = _Texts()
    n, m, d = t.make(name), t.make(mime), t.make(md5)
    return _render(lambda buf, cap: _lib.pv_write_reply(n, size, checksum, m, d, buf, cap))


# ---------------------------------------------------------------------- texts


def json_escape(text: bytes) -> bytes:
    """A JSON string with quotes, escaped as Go does."""
    src = _ffi.from_buffer("char[]", text)
    return _render(lambda buf, cap: _lib.pv_json_escape(src, len(text), buf, cap))


def go_quote(text: bytes) -> bytes:
    """Go's %q of a text."""
    src = _ffi.from_buffer("char[]", text)
    return _render(lambda buf, cap: _lib.pv_go_quote(src, len(text), buf, cap))


def canonical_header(name: bytes) -> bytes:
    """A header name in Go's canonical case."""
    src = _ffi.from_buffer("char[]", name)
    return _render(lambda buf, cap: _lib.pv_header_canonical(src, len(name), buf, cap))


def request_id(ns: int, random32: int) -> str:
    """Text of an X-Amz-Request-Id header."""
    s = _scratch
    text: bytes = _unpack(s.buf, _lib.pv_request_id(ns, random32, s.buf, s.cap))
    return text.decode("ascii")
