"""The engine's HTTP semantics through their Python wrappers, and against what a Go server was recorded to answer.

csrc/test/test_http.c walks through the contract's tables; here is what the wrappers add, and a replay of recorded
exchanges through a needle store that is a dict: uploads are parsed, answers planned, and both compared with Go's.
"""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import threading
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pyvolume._native import http as native

RECORDINGS = Path(__file__).parents[1] / "data" / "http-4.44"

HAS_NAME, HAS_MIME, HAS_MTIME, HAS_PAIRS, COMPRESSED = 0x02, 0x04, 0x08, 0x20, 0x01


@pytest.fixture(scope="module")
def table() -> native.MimeTable:
    return native.MimeTable()


# ---------------------------------------------------------------------- wrappers


def test_url_parts() -> None:
    u = native.parse_url(b"/3%2C64deadbeef_5.jpg")
    assert (u.kind, u.path, u.vid, u.fid, u.ext) == (0, b"/3,64deadbeef_5.jpg", b"3", b"64deadbeef_5", b".jpg")
    assert u.claim_fid == b"64deadbeef"
    assert not u.unclean
    assert native.parse_url(b"/a//b").unclean
    assert native.parse_url(b"/a/b/c/3,64deadbeef").kind is native.UrlKind.BAD
    assert native.parse_url(b"/3.5,64deadbeef").kind is native.UrlKind.DROP
    assert native.parse_url(b"/3").kind is native.UrlKind.VID_ONLY
    assert native.parse_url(b"").kind is native.UrlKind.BAD
    with pytest.raises(native.BadEscape):
        native.parse_url(b"/3,%zz")
    long = b"/3,%41" + b"x" * 100_000
    assert native.parse_url(long).fid == b"A" + b"x" * 100_000
    assert native.write_fid(b"/3/x/3,80deadbeef.txt") == b"80deadbeef"


def test_ids() -> None:
    assert native.parse_vid(b"0003") == 3
    assert native.parse_fid(b"64DEADBEEF_2") == (0x66, 0xDEADBEEF)
    with pytest.raises(native.IdError, match=r'strconv.ParseUint: parsing "x": invalid syntax') as syntax:
        native.parse_vid(b"x")
    assert syntax.value.code == 1
    with pytest.raises(native.IdError) as raw:
        native.parse_fid(b"\xff")
    assert raw.value.text == b"Invalid fid: \xff"
    assert str(raw.value) == "Invalid fid: \ufffd"
    with pytest.raises(native.IdError) as long:
        native.parse_vid(b"x" * 50_000)
    assert len(long.value.text) > 50_000


def test_ranges() -> None:
    assert native.parse_range(b"bytes=0-4", 11) == (native.RangeKind.SINGLE, [(0, 5)])
    assert native.parse_range(b"bytes=--5", 11) == (native.RangeKind.SINGLE, [(16, -5)])
    assert native.parse_range(b"bytes=1-1,2-2,3-3", 11, max_ranges=2) == (native.RangeKind.MULTI, [(1, 1), (2, 1)])
    assert native.parse_range(b"x", 11) == (native.RangeKind.INVALID, [])
    assert native.parse_range(b"", 11) == (native.RangeKind.NONE, [])
    assert native.content_range(0, 0, 0) == b"bytes 0--1/0"


def test_dates_and_tags() -> None:
    assert native.http_date(1136214245) == "Mon, 02 Jan 2006 15:04:05 GMT"
    assert native.parse_http_date(b"Mon, 02 Jan 2006 15:04:05 GMT") == 1136214245
    assert native.parse_http_date(b"Monday, 02-Jan-06 15:04:05 GMT") is None
    assert native.etag(0xC0FFEE) == '"00c0ffee"'
    assert native.not_modified(b"", b'"00c0ffee"', 5, 0xC0FFEE)
    assert not native.not_modified(b"", b"*", 5, 0xC0FFEE)


def test_texts() -> None:
    assert native.json_escape(b"<\xff") == b'"\\u003c\\ufffd"'
    assert native.json_escape(b"x" * 40_000) == b'"' + b"x" * 40_000 + b'"'
    assert native.go_quote(b"a\n\xff") == b'"a\\n\\xff"'
    assert native.canonical_header(b"x-fOO-bar") == b"X-Foo-Bar"
    assert native.request_id(0x18EB1CEF467CDB30, 0xF) == "18EB1CEF467CDB300000000F"
    assert native.content_disposition("a b\u4f60.json".encode(), True) == (
        b"attachment; filename*=utf-8''a%20b%E4%BD%A0.json"
    )
    assert native.write_reply(b"", 0, 0, b"", b"") == b'{"eTag":"00000000"}'
    assert native.sniff(b"") == "text/plain; charset=utf-8"
    assert native.sniff(memoryview(b"GIF89a")) == "image/gif"
    assert native.name_ext(b"a.tar.gz") == b".gz"


def test_numbers() -> None:
    assert native.parse_ttl(b"90m") == (90, 1)
    assert native.parse_ttl(b"bad") == (0, 0)
    assert (native.parse_ts(b"7"), native.parse_ts(b"-7")) == (7, 0)
    assert [native.parse_bool(t) for t in (b"T", b"0", b"yes")] == [True, False, None]
    assert [native.parse_int(t) for t in (b"+5", b"-5", b"x", b"9223372036854775808")] == [5, -5, None, None]


def test_names_of_pairs_that_are_taken_for_each_other_are_all_sent() -> None:
    """Names chosen so that their hashes agree in the bits that are looked at: each is compared, the last value wins."""
    names = ["aagba", "bfjfj", "bgdch", "cibec", "ebace", "faidb", "hicia"]
    stored = ",".join(f'"{name}":"{number}"' for number in (1, 2) for name in names)
    needle = native.GetNeedle(checksum=1, flags=0x20, data_len=1, data=b"x", pairs=f"{{{stored}}}".encode())
    sent = native.plan_get(native.GetRequest(), needle, None).headers
    assert [(name, value) for name, value in sent if name.lower() in names] == [
        (name.capitalize(), "2") for name in names
    ]


def test_pairs() -> None:
    headers = [(b"Host", b"x"), (b"seaweed-foo-bar", b"v1"), (b"SEAWEED-FOO-BAR", b"v2"), (b"Seaweed-A", b"<")]
    assert native.build_pairs(headers) == b'{"A":"\\u003c","Foo-Bar":"v1"}'
    assert native.build_pairs(headers[:1]) is None
    assert native.build_pairs([(b"Seaweed-A", b"v" * 65_527)]) == b'{"A":"' + b"v" * 65_527 + b'"}'
    assert native.build_pairs([(b"Seaweed-A", b"v" * 65_528)]) is None
    assert native.parse_pairs(b'{"a":"1","a":"2","b":[1]}') == [(b"a", b"1"), (b"a", b"2"), (b"b", b"")]
    assert native.parse_pairs(b"nonsense") == []


def test_mime_layers(tmp_path: Path) -> None:
    assert native.MimeTable.from_system(tmp_path).lookup(b".zzz") == b""
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "mime.types").write_bytes(
        b"# x/comment aaa\nx/one aaa bbb # ccc\nx/two\r\nx/pdf pdf\nx/html html\nx/rtf RTF\r\n"
    )
    types = native.MimeTable.from_system(tmp_path)
    assert [types.lookup(e) for e in (b".aaa", b".BBB", b".ccc", b".pdf", b".html", b".rtf", b".RTF")] == [
        b"x/one",
        b"x/one",
        b"",
        b"application/pdf",
        b"text/html; charset=utf-8",
        b"application/rtf",
        b"x/rtf",
    ]
    globs = tmp_path / "usr" / "share" / "mime"
    globs.mkdir(parents=True)
    (globs / "globs2").write_bytes(
        b"# comment\n50:x/first:*.aaa\n50:x/second:*.aaa\n50:x/rtf:*.rtf\n50:x/glob:*.a[bc]\n50:x/name:Makefile\n"
        b"50:text/foo:*.foo:cs\n::\n50:x/short:*.\n"
    )
    types = native.MimeTable.from_system(tmp_path)  # the file exists, so mime.types is not read
    assert [types.lookup(e) for e in (b".aaa", b".bbb", b".rtf", b".foo", b".a[bc]", b".")] == [
        b"x/first",
        b"",
        b"application/rtf",
        b"text/foo; charset=utf-8",
        b"",
        b"",
    ]


def test_plan_needs(table: native.MimeTable) -> None:
    stored = gzip.compress(b"<html> it")
    needle = native.GetNeedle(checksum=1, flags=COMPRESSED, data_len=len(stored), data=stored)
    plan = native.plan_get(native.GetRequest(), needle, table)
    assert plan.result is native.PlanResult.NEED_PLAIN
    plain = replace(needle, data=memoryview(b"<html> it"), data_len=9, plain=True)
    plan = native.plan_get(native.GetRequest(), plain, table)
    assert plan.headers == [
        ("Etag", '"00000001"'),
        ("Content-Type", "text/html; charset=utf-8"),
        ("Accept-Ranges", "bytes"),
        ("Content-Length", "9"),
    ]
    assert plan.parts == (native.BodyPart(b"", 0, 9),)
    streamed = native.GetNeedle(checksum=1, flags=0, data_len=1 << 40)
    plan = native.plan_get(native.GetRequest(range=b"bytes=1000-1099"), streamed, table)
    assert (plan.result, plan.need_offset, plan.need_len) == (native.PlanResult.NEED_SNIFF, 1000, 100)
    sniffed = replace(streamed, sniff=b"\0" * 100, sniff_offset=1000)
    plan = native.plan_get(native.GetRequest(range=b"bytes=1000-1099"), sniffed, table)
    assert ("Content-Type", "application/octet-stream") in plan.headers
    with pytest.raises(ValueError, match="cannot be planned"):
        native.plan_get(native.GetRequest(), replace(needle, data=None), table)
    with pytest.raises(ValueError, match="data_len"):
        native.plan_get(native.GetRequest(), replace(needle, data_len=3), table)
    with pytest.raises(ValueError, match="random30"):
        native.plan_get(native.GetRequest(random30=b"short"), plain, table)


def test_plan_outgrows_its_buffers(table: native.MimeTable) -> None:
    pairs = json.dumps({f"K{i}": "v" * 50 for i in range(900)}).encode()
    data = bytes(range(256)) * 4
    needle = native.GetNeedle(checksum=1, flags=HAS_PAIRS, data_len=len(data), data=data, pairs=pairs)
    header = b"bytes=" + b",".join(b"%d-%d" % (i, i) for i in range(500))
    plan = native.plan_get(native.GetRequest(range=header), needle, table)
    assert plan.status == 206
    assert len(plan.parts) == 501
    assert sum(name.startswith("K") for name, _ in plan.headers) == 900
    body = b"".join(p.text + data[p.offset : p.offset + p.length] for p in plan.parts)
    assert ("Content-Length", str(len(body))) in plan.headers


def test_overrides(table: native.MimeTable) -> None:
    needle = native.GetNeedle(checksum=1, flags=0, data_len=1, data=b"x", name=b"a.json")
    overrides = {"response-content-type": b"", "response-expires": b"a\nb", "response-unknown": b"x"}
    plan = native.plan_get(native.GetRequest(overrides=overrides), needle, table)
    headers = dict(plan.headers)
    assert headers["Content-Type"] == ""
    assert headers["Expires"] == "a b"
    assert "response-unknown" not in headers


def test_uploads(table: native.MimeTable) -> None:
    assert native.form_check(b"application/x-www-form-urlencoded")
    assert not native.form_check(b"")
    with pytest.raises(native.UploadError, match="mime: no media type"):
        native.form_check(b";;")
    body = (
        b'--b\r\nContent-Disposition: form-data; filename="x\\"y.md"\r\nContent-Transfer-Encoding: quoted-printable\r\n'
        b"Content-MD5: m\r\n\r\na=41=\r\nb\r\n--b--"
    )
    up = native.parse_upload(
        method=b"POST",
        path=b"/3,64deadbeef",
        body=body,
        size_limit=100,
        table=table,
        content_type=b"multipart/form-data; boundary=b",
    )
    assert (bytes(up.data), up.name, up.md5, up.is_multipart) == (b"aAb", b'x"y.md', b"m", True)
    assert up.mime == b"text/markdown; charset=utf-8"
    with pytest.raises(native.UploadError, match="file over the limited 2 bytes"):
        native.parse_upload(method=b"PUT", path=b"/x", body=memoryview(b"abc"), size_limit=2, table=None)
    long_line = b"x" * 60_000  # its quoted form needs more scratch than there is at first, several times over
    with pytest.raises(native.UploadError) as e:
        native.parse_upload(
            method=b"POST",
            path=b"/x",
            body=b"--b\r\n" + long_line + b"\r\n\r\n",
            size_limit=2,
            table=None,
            content_type=b"multipart/form-data; boundary=b",
        )
    assert e.value.text == b'malformed MIME header: missing colon: "' + long_line + b'"'
    assert native.should_compress(b"x", b"", b"plain text")
    assert not native.should_compress(b"x", b"application/octet-stream", b"plain text")
    empty = native.parse_upload(method=b"PUT", path=b"/x", body=b"", size_limit=2, table=None)
    assert bytes(empty.data) == b""


def test_threads_do_not_share_buffers(table: native.MimeTable) -> None:
    wrong: list[tuple[int, int]] = []

    def work(k: int) -> None:
        data = b"%d" % k * 100
        needle = native.GetNeedle(checksum=k, flags=0, data_len=len(data), data=data, name=b"n%d.txt" % k)
        for i in range(300):
            plan = native.plan_get(native.GetRequest(range=b"bytes=0-1,2-3"), needle, table)
            if dict(plan.headers)["Etag"] != native.etag(k) or native.json_escape(data) != b'"' + data + b'"':
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# ---------------------------------------------------------------------- recorded exchanges

FAMILIES = (
    "basic",
    "read",
    "range",
    "sniff",
    "text",
    "upload",
    "multipart",
    "malformed",
    "cors",
    "smallfile",
    "public",
)
# What a lane adds by itself.
LANE_HEADERS = {"server", "date", "x-amz-request-id", "access-control-allow-origin", "access-control-allow-credentials"}
IMAGE_EXTS = (b".png", b".jpg", b".jpeg", b".gif", b".webp")


@dataclass
class Stored:
    """What a recorded write put into the store."""

    data: bytes
    name: bytes
    mime: bytes
    pairs: bytes | None
    checksum: int
    cookie: int
    last_modified_s: int | None  # None: the server's clock
    gzipped: bool


@dataclass
class Replay:
    """A store that is a dict, and the comparison of its answers with recorded ones."""

    limit: int
    needles: dict[tuple[int, int], Stored | None] = field(default_factory=dict)  # None: written, but not known how
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, what: str, step: dict[str, Any], recorded: object, ours: object) -> None:
        self.counts[what] += 1
        if recorded != ours:
            self.wrong.append(f"{what}: {step['method']} {step['target']}\n recorded {recorded!r}\n ours     {ours!r}")


def body_of(d: dict[str, Any] | None) -> bytes:
    return base64.b64decode(d["b64"]) if d else b""


def first(headers: list[list[str]], name: str) -> bytes:
    return next((v.strip(" \t").encode("latin-1") for k, v in headers if k.lower() == name), b"")


def query_of(target: bytes) -> dict[bytes, bytes] | None:
    """First value of each key; None for a query that only part of would count."""
    raw = target.partition(b"?")[2]
    if b";" in raw or b"%" in raw.replace(b"%2", b"").replace(b"%3", b"").replace(b"%C", b"").replace(b"%A", b""):
        return None
    out: dict[bytes, bytes] = {}
    for pair in raw.split(b"&"):
        key, _, value = pair.partition(b"=")
        if key:
            out.setdefault(*(urllib.parse.unquote_to_bytes(t.replace(b"+", b" ")) for t in (key, value)))
    return out


def check_write(r: Replay, step: dict[str, Any], answer: dict[str, Any], table: native.MimeTable) -> None:
    target = step["target"].encode("latin-1")
    headers = step["headers"]
    query = query_of(target)
    status = answer["status"]
    reply = body_of(answer["body"])
    try:
        url = native.parse_url(target.partition(b"?")[0])
    except native.BadEscape:
        r.check("bad escape", step, status, 400)
        return
    if url.kind is native.UrlKind.DROP:
        r.check("dropped", step, answer["error"], "eof before status")
        return
    if url.kind is native.UrlKind.BAD or url.unclean or not url.path or query is None or status in (401, 429):
        return

    def refused(text: bytes) -> None:
        r.check("refusal", step, (status, reply), (400, b'{"error":' + native.json_escape(text) + b"}"))

    body = body_of(step["body"])
    chosen = {
        n: first(headers, n.replace("_", "-")) for n in ("content_type", "content_disposition", "content_encoding")
    }
    md5 = first(headers, "content-md5")
    try:
        form = native.form_check(chosen["content_type"])
        vid = native.parse_vid(url.vid)
        up = native.parse_upload(
            method=step["method"].encode(),
            path=url.path,
            body=b"" if form else body,
            size_limit=r.limit,
            table=table,
            is_manifest=native.parse_bool(query.get(b"cm", b"")) is True,
            content_md5=md5,
            **chosen,
        )
    except native.UploadError as e:
        refused(e.text)
        return
    except native.IdError as e:
        if e.code == 2 and len(url.vid) < 20:
            r.counts["wide vid"] += 1  # departure A3: Go lets it wrap
        else:
            refused(e.text)
        return
    if up.md5 and status == 400 and b"Content-MD5" in reply:
        r.counts["md5"] += 1
        return
    try:
        key, cookie = native.parse_fid(native.write_fid(url.path))
    except native.IdError as e:
        refused(e.text)
        return
    if status == 204:
        return
    if status != 201 or form:
        r.needles.pop((vid, key), None)
        return
    stated = json.loads(reply)
    name, mime = (t if len(t) < 256 else b"" for t in (up.name, up.mime))
    gunzip = zlib.decompressobj(31)
    size = len(up.data)
    if up.is_gzipped:
        try:
            size = len(gunzip.decompress(bytes(up.data)) + gunzip.flush())
        except zlib.error:
            size = len(up.data)
    checksum = int(stated["eTag"], 16)
    r.check("reply", step, reply, native.write_reply(name, size, checksum, mime, up.md5 if up.md5 else b""))
    compressed = (
        not up.is_gzipped and query.get(b"type") != b"replicate" and native.should_compress(up.name, up.mime, up.data)
    )
    if compressed or query.get(b"cm") or query.get(b"ttl") or step.get("image") or vid == 4:
        r.needles[vid, key] = None
        return
    pairs = native.build_pairs([(k.encode("latin-1"), v.strip(" \t").encode("latin-1")) for k, v in headers])
    stored = Stored(
        data=bytes(up.data),
        name=name,
        mime=mime,
        pairs=pairs,
        checksum=checksum,
        cookie=cookie,
        last_modified_s=(native.parse_ts(query.get(b"ts", b"")) & (1 << 40) - 1) or None,  # five bytes are stored
        gzipped=up.is_gzipped,
    )
    r.needles[vid, key] = stored


def check_read(r: Replay, step: dict[str, Any], answer: dict[str, Any], table: native.MimeTable) -> None:
    target = step["target"].encode("latin-1")
    headers = step["headers"]
    query = query_of(target)
    try:
        url = native.parse_url(target.partition(b"?")[0])
    except native.BadEscape:
        r.check("bad escape", step, answer["status"], 400)
        return
    if url.kind is native.UrlKind.DROP:
        r.check("dropped", step, answer["error"], "eof before status")
        return
    if url.unclean:
        r.check("unclean", step, answer["status"], 307)
        return
    if (
        url.kind is native.UrlKind.BAD
        or answer["status"] in (401, 429)
        or url.path in (b"/status", b"/healthz", b"/readyz")
    ):
        return
    if url.path.startswith((b"/ui/", b"/seaweedfsstatic", b"/favicon.ico", b"/debug/")):
        return
    try:
        vid = native.parse_vid(url.vid)
        key, cookie = native.parse_fid(url.fid)
    except native.IdError:
        r.check("bad id", step, (answer["status"], answer["body"]["len"]), (400, 0))
        return
    stored = r.needles.get((vid, key))
    if (
        stored is None
        or query is None
        or any(k in query for k in (b"width", b"height", b"crop_x1", b"readDeleted", b"cm"))
    ):
        return
    if stored.data and cookie != stored.cookie:
        r.check("cookie", step, (answer["status"], answer["body"]["len"]), (404, 0))
        return
    sent = [(k, v) for k, v in answer["headers"] if k.lower() not in LANE_HEADERS]
    recorded = {k.lower(): v for k, v in sent}
    if stored.last_modified_s is None and "last-modified" in recorded:
        stored.last_modified_s = native.parse_http_date(recorded["last-modified"].encode())
    if stored.data and stored.last_modified_s is None:
        return  # the server's clock, and the answer does not tell it
    needle = native.GetNeedle(checksum=0, flags=0, data_len=0)
    if stored.data:
        flags = (
            HAS_NAME | HAS_MIME | HAS_MTIME | (HAS_PAIRS if stored.pairs else 0) | (COMPRESSED if stored.gzipped else 0)
        )
        needle = native.GetNeedle(
            checksum=stored.checksum,
            flags=flags,
            data_len=len(stored.data),
            data=stored.data,
            last_modified_s=stored.last_modified_s or 0,
            name=stored.name,
            mime=stored.mime,
            pairs=stored.pairs or b"",
        )
    kind = recorded.get("content-type", "")
    boundary = kind.partition("boundary=")[2] if kind.startswith("multipart/byteranges") else "00" * 30
    etag = first(headers, "if-none-match")
    if etag.startswith(b"@ETAG:"):
        etag = native.etag(needle.checksum).encode()
    request = native.GetRequest(
        head=step["method"] == "HEAD",
        attachment=native.parse_bool(query.get(b"dl", b"")) is True,
        filename=url.filename,
        accept_encoding=first(headers, "accept-encoding"),
        range=first(headers, "range"),
        if_modified_since=first(headers, "if-modified-since"),
        if_none_match=etag,
        overrides={k.decode("latin-1").lower(): v for k, v in query.items()},
        random30=bytes.fromhex(boundary),
    )
    plan = native.plan_get(request, needle, table)
    data = stored.data
    if plan.result is native.PlanResult.NEED_PLAIN:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            data = b""
        plan = native.plan_get(request, replace(needle, data=data, data_len=len(data), plain=True), table)
    assert plan.result is native.PlanResult.DONE
    ours = {k.lower(): v for k, v in plan.headers if k.lower() not in LANE_HEADERS}
    if native.PlanFlag.NO_LENGTH in plan.flags:
        ours["transfer-encoding"] = "chunked"
    body = b"".join(p.text + data[p.offset : p.offset + p.length] for p in plan.parts)
    r.check("read", step, (answer["status"], recorded, body_of(answer["body"])), (plan.status, ours, body))


def exchanges(profile: str) -> Iterator[dict[str, Any]]:
    with lzma.open(RECORDINGS / f"{profile}.jsonl.xz", "rt", encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)


@pytest.mark.parametrize(
    ("profile", "at_least"),
    [
        (
            "default",
            {"read": 400, "reply": 120, "refusal": 30, "bad id": 70, "unclean": 10, "bad escape": 5, "dropped": 4}
            | {"cookie": 4, "md5": 2, "wide vid": 1},
        ),
        ("public", {"read": 35, "reply": 45, "bad id": 10}),
        ("noslow", {"read": 160, "reply": 15}),
        ("smallfile", {"read": 15, "reply": 15, "refusal": 15}),
    ],
)
def test_recorded_exchanges(profile: str, at_least: dict[str, int], table: native.MimeTable) -> None:
    rows = exchanges(profile)
    head = next(rows)
    limit = next((int(f.partition("=")[2]) for f in head["flags"] if f.startswith("-fileSizeLimitMB")), 256) << 20
    r = Replay(limit)
    for row in rows:
        step = row["step"]
        method = step.get("method")
        if step.get("raw") or method not in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            continue
        if step["target"] == "*" or " " in step["target"]:
            continue  # refused below the handlers
        path = step["target"].partition("?")[0].encode("latin-1")
        known = row["family"] in FAMILIES and not step.get("gz") and not step.get("image")
        if method in ("GET", "HEAD"):
            if known:
                check_read(r, step, row["answers"][0], table)
        elif known and method != "DELETE" and step.get("port") != "public":
            check_write(r, step, row["answers"][0], table)
        else:  # whatever it did: no longer known
            try:
                r.needles.pop(
                    (native.parse_vid(path[1:].split(b",")[0]), native.parse_fid(native.write_fid(path))[0]), None
                )
            except native.IdError:
                continue
    assert r.wrong == [], f"{len(r.wrong)} differ from Go\n" + "\n".join(r.wrong[:5])
    assert all(r.counts[k] >= n for k, n in at_least.items()), r.counts
