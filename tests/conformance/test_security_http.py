"""Hostile requests on the HTTP ports: injection, bombs, pages, who counts as the peer (operations.md 3, http.md 5)."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import re
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from http_bench import HOST, Bench, Client, serving
from PIL import Image

from pyvolume.log import one_line
from pyvolume.ops import images
from pyvolume.security_config import SecurityConfig
from pyvolume.server import http_admission
from pyvolume.server.http_app import PICTURE_THREADS

OCTETS = ("Content-Type", "application/octet-stream")
LIMIT_S = 10.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with serving(tmp_path) as made:
        yield made


def raw(bench: Bench, data: bytes) -> bytes:
    """Everything the server says to these bytes."""
    with socket.create_connection((HOST, bench.port), LIMIT_S) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        out = b""
        while chunk := sock.recv(65536):
            out += chunk
    return out


def headers_of(answer: bytes) -> list[bytes]:
    head, _, _ = answer.partition(b"\r\n\r\n")
    return [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]


# --- header injection ------------------------------------------------------------------------------------------------

EVIL = "a\r\nX-Evil: 1\r\n\r\n<script>"


@pytest.mark.parametrize("name", ["response-content-disposition", "response-content-type", "response-cache-control"])
def test_headers_asked_for_by_a_query_cannot_start_another(bench: Bench, name: str) -> None:
    fid = bench.fid()
    assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"data").status == 201
    for text in (EVIL, "a\nX-Evil: 1", "a\rX-Evil: 1", "a\0b"):
        target = f"/{fid}?{name}={quote(text, safe='')}"
        answer = raw(bench, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b"x-evil" not in headers_of(answer), text
        assert answer.count(b"\r\n\r\n") == 1, text


@pytest.mark.parametrize("text", [EVIL, 'a"; filename=evil.exe; x="', "a\nX-Evil: 1", "é\r\nX-Evil: 1"])
def test_stored_names_and_types_cannot_start_a_header(bench: Bench, text: str) -> None:
    fid = bench.fid()
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r\n", "\\r\\n")
    for name in (quoted, quote(text, safe="")):
        part = f'--b\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\nContent-Type: text/plain'
        body = f"{part}\r\n\r\nx\r\n--b--\r\n".encode("utf-8", "replace")
        bench.ask("POST", f"/{fid}", (("Content-Type", "multipart/form-data; boundary=b"),), body)
        answer = raw(bench, f"GET /{fid} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert b"x-evil" not in headers_of(answer)
        assert answer.count(b"\r\n\r\n") == 1
    bench.ask("PUT", f"/{fid}/{quote(text, safe='')}", (OCTETS,), b"x")
    answer = raw(bench, f"GET /{fid} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert b"x-evil" not in headers_of(answer)


def test_pairs_with_line_ends_are_no_pairs(bench: Bench) -> None:
    fid = bench.fid()
    head = f"PUT /{fid} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Type: a/b\r\nConnection: close\r\n"
    raw(bench, f"{head}Seaweed-A: one\r\n two\r\n\r\nx".encode())
    raw(bench, f"{head}Seaweed-B: one\rX-Evil: 1\r\n\r\nx".encode())
    answer = raw(bench, f"GET /{fid} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert b"x-evil" not in headers_of(answer)


@pytest.mark.parametrize(
    "path", ["//%0d%0aX-Evil:%201", "/a/../%0d%0aX-Evil:1", "/./%0aX-Evil:1?x=%0d%0a", "//evil.example/%2e%2e"]
)
def test_redirects_cannot_start_a_header_or_lead_away(bench: Bench, path: str) -> None:
    answer = raw(bench, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert b"x-evil" not in headers_of(answer)
    found = re.search(rb"\r\nLocation: ([^\r]*)\r\n", answer)
    if found:
        assert found[1].startswith(b"/") and not found[1].startswith(b"//"), "stays on this host"


def test_requests_cannot_hide_another_request(bench: Bench) -> None:
    """Lengths that a proxy in front may read another way are refused, not guessed at."""
    fid = bench.fid()
    inner = b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n"
    start = f"PUT /{fid} HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n".encode()
    for framing in (
        b"Content-Length: 0\r\nContent-Length: 34\r\n",
        b"Content-Length: +0\r\n",
        b"Content-Length: 0x0\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length : 0\r\n",
    ):
        answer = raw(bench, start + framing + b"\r\n" + inner)
        assert answer.count(b"HTTP/1.1 ") <= 1 and b" 200 " not in answer[:15], framing


# --- log injection ---------------------------------------------------------------------------------------------------


def test_nothing_of_a_request_starts_a_log_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    forged = "%0aI1125%2000:00:00.000000%20forged.go:1%20line"
    with caplog.at_level(0):
        for target in (f"/1,{forged}", f"/9,0100000001?collection={forged}", f"/{forged}", f"//x{forged}"):
            for method in ("GET", "PUT", "DELETE"):
                bench.ask(method, target, (OCTETS, ("User-Agent", "x\tI1125 y"), ("Referer", forged)), b"x")
    for record in caplog.records:
        line = one_line(record.getMessage())
        assert "\n" not in line and "\r" not in line and "\t" not in line


# --- bombs -----------------------------------------------------------------------------------------------------------


def bomb(plain_bytes: int) -> bytes:
    """A gzip member of zeros, about a thousandth of its size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    out = [packer.compress(block) for _ in range(plain_bytes >> 20)]
    return b"".join([*out, packer.flush()])


def test_gzip_bomb_is_never_held_in_memory(bench: Bench) -> None:
    size = 512 << 20
    data = bomb(size)
    assert len(data) < 1 << 20
    fid = bench.fid()
    packed = (OCTETS, ("Content-Encoding", "gzip"))
    tracemalloc.start()
    try:
        assert bench.ask("PUT", f"/{fid}", packed, data).status == 201
        assert bench.ask(
            "PUT", f"/{bench.fid()}", (*packed, ("Content-MD5", "1B2M2Y8AsgTpgAmY7PhCfg==")), data
        ).status in (
            201,
            400,
        )
        with socket.create_connection((HOST, bench.port), LIMIT_S) as sock:
            sock.sendall(f"GET /{fid} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = sock.recv(65536)
            assert b" 200 " in head[:15]
            read = len(head)
            while read < 64 << 20:
                read += len(sock.recv(1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 96 << 20, "512 MB were never in memory"


def test_manifest_bombs_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvolume.ops import manifest

    monkeypatch.setattr(manifest, "MAX_TEXT_BYTES", 1 << 20)
    fid = bench.fid()
    data = gzip.compress(b'{"name":"' + b"a" * (8 << 20) + b'","chunks":[]}')
    assert bench.ask("PUT", f"/{fid}?cm=true", (OCTETS, ("Content-Encoding", "gzip")), data).status == 201
    assert bench.ask("GET", f"/{fid}").status in (200, 500)
    deep = b'{"chunks":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for text in (deep, b"[" * 1_000_000, b'{"size":1e999,"chunks":[{"fid":"1,00","offset":-1,"size":-5}]}'):
        other = bench.fid()
        assert bench.ask("PUT", f"/{other}?cm=true", (OCTETS,), text).status == 201
        assert bench.ask("GET", f"/{other}").status in (200, 500)
    assert bench.ask("GET", "/status").status == 200


def test_manifest_that_names_itself_ends(bench: Bench) -> None:
    fid = bench.fid()
    text = f'{{"name":"loop","size":10,"chunks":[{{"fid":"{fid}","offset":0,"size":10}}]}}'.encode()
    assert bench.ask("PUT", f"/{fid}?cm=true", (OCTETS,), text).status == 201
    started = time.monotonic()
    answer = raw(bench, f"GET /{fid} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert time.monotonic() - started < LIMIT_S
    assert len(answer) < 1 << 20
    assert bench.ask("GET", "/status").status == 200


def png_of(width: int, height: int) -> bytes:
    """A small file that claims to be a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bomb(1 << 20)[10:]) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(100_000, 100_000), (0x7FFFFFFF, 1), (1, 0x7FFFFFFF), (0x7FFFFFFF, 0x7FFFFFFF)]
)
def test_pictures_of_too_many_pixels_are_not_decoded(bench: Bench, width: int, height: int) -> None:
    fid, data = bench.fid(), png_of(width, height)
    assert bench.ask("PUT", f"/{fid}", (("Content-Type", "image/png"),), data).status == 201
    tracemalloc.start()
    try:
        reply = bench.ask("GET", f"/{fid}.png?width=10")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (reply.status, reply.body) == (200, data)
    assert peak < 32 << 20


@pytest.mark.parametrize(
    "query",
    [
        "width=2000000000",
        "width=100000&height=100000&mode=fill",
        "height=9223372036854775807",
        "crop_x2=2147483647&crop_y2=2147483647",
    ],
)
def test_pictures_are_not_blown_up(bench: Bench, query: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (300, 300), "red").save(out, "PNG")
    fid = bench.fid()
    assert bench.ask("PUT", f"/{fid}", (("Content-Type", "image/png"),), out.getvalue()).status == 201
    started = time.monotonic()
    reply = bench.ask("GET", f"/{fid}.png?{query}")
    assert time.monotonic() - started < LIMIT_S
    assert reply.status == 200
    assert len(reply.body) < 1 << 20


def test_few_pictures_are_in_work_at_a_time(bench: Bench) -> None:
    assert images.MAX_AT_ONCE <= 4
    assert images.MAX_PIXELS * 4 * images.MAX_AT_ONCE <= 1 << 30, "a gigabyte of pixels at most"


def test_many_pictures_took_all_workers(tmp_path: Path) -> None:
    """More readers of pictures than there are workers, while nobody gets on with a picture: others are served."""
    stored = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stored, "PNG")
    with serving(tmp_path, fast_lane=False) as bench:
        picture, other = bench.fid(), bench.fid()
        assert bench.ask("PUT", f"/{picture}", (("Content-Type", "image/png"),), stored.getvalue()).status == 201
        assert bench.ask("PUT", f"/{other}", (OCTETS,), b"here").status == 201
        for _ in range(images.MAX_AT_ONCE):
            images._slots.acquire()
        statuses: list[int] = []
        queries = ("width=20", "height=9", "crop_x2=5&crop_y2=5")

        def read(number: int) -> None:
            statuses.append(bench.ask("GET", f"/{picture}.png?{queries[number % 3]}").status)

        readers = [threading.Thread(target=read, args=(number,)) for number in range(120)]
        try:
            for reader in readers:
                reader.start()
            admission = bench.admin.server.admission
            assert isinstance(admission, http_admission.AdminAdmission)
            slots = admission.picture_slots
            deadline = time.monotonic() + LIMIT_S
            while slots.waiting < len(readers) - slots.limit:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert slots.taken == slots.limit == PICTURE_THREADS
            assert bench.ask("GET", f"/{other}").body == b"here"
            client = bench.client(public=True)
            assert client.ask("GET", f"/{other}").body == b"here"
            client.close()
        finally:
            for _ in range(images.MAX_AT_ONCE):
                images._slots.release()
        for reader in readers:
            reader.join(30)
        assert statuses == [200] * len(readers)
        assert slots.taken == 0


FORM = ("Content-Type", "multipart/form-data; boundary=b")
PART = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ((FORM, ("Transfer-Encoding", "chunked")), b"nked\r\n\r\n0\r\n\r\n"),
        ((FORM, ("Content-Length", "900")), PART % (b"cm", b"false")),
        ((FORM,), PART % (b"a", b"b") * 1001 + b"--b--\r\n"),
        ((FORM,), b"--b\r\n" + b"a" * 100_000),
        ((FORM,), b"--b\r\nContent-Disposition: form-data; name*=utf-8''%ff; name\r\n\r\n\r\n--b--\r\n"),
    ],
)
def test_forms_of_reads_and_deletes_that_are_broken_were_a_500(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, headers: tuple[tuple[str, str], ...], body: bytes
) -> None:
    with serving(tmp_path, fast_lane=False) as bench:
        names = {name for name, _ in headers}
        lines = [f"{method} /{bench.fid()} HTTP/1.1", "Host: h", *(f"{name}: {value}" for name, value in headers)]
        if len(names) == 1:
            lines.append(f"Content-Length: {len(body)}")
        answer = raw(bench, ("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        assert not answer or answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), answer[:100]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_large_field_of_a_form_counts(bench: Bench) -> None:
    """Werkzeug's own limit for fields, half a megabyte, is not upstream's."""
    fid = bench.fid()
    assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201
    body = PART % (b"a", b"x" * 700_000) + PART % (b"dl", b"true") + b"--b--\r\n"
    reply = bench.ask("GET", f"/{fid.replace(',', '/')}/n.bin", (FORM,), body)
    assert (reply.get("Content-Disposition") or "").startswith("attachment")


# --- pages -----------------------------------------------------------------------------------------------------------

MARKUP = (
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'+alert(1)+'",
    "<b>bold<b>",
    "&lt;i&gt;",
    "${7*7}{{7*7}}",
)


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    settings = {"rack": MARKUP[0], "data_center": MARKUP[1], "public_url": MARKUP[0], "server_id": MARKUP[1]}
    with serving(tmp_path, **settings) as bench:
        for number, text in enumerate(MARKUP):
            bench.allocate(20 + number, collection=text)
        reply = bench.ask("GET", "/ui/index.html")
        assert reply.status == 200
        page = reply.body.decode()
        for text in MARKUP[:4]:
            assert text not in page
        assert "<img" not in page.replace('<img src="', "") and "<svg onload" not in page
        assert "onerror=alert(1)>" not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page, "shown, but as text"
        assert "${7*7}{{7*7}}" in page, "no template is run over it"
        hostile = bench.ask(
            "GET", "/ui/index.html?x=<script>alert(1)</script>", (("X-Y", "<script>alert(2)</script>"),)
        )
        assert b"alert(" not in hostile.body.replace(b"onerror=alert(1)", b"").replace(b"onload=alert(1)", b"").replace(
            b"+alert(1)+", b""
        )


@pytest.mark.parametrize(
    "target", ["/<script>alert(1)</script>", "/9,%3Cscript%3E", "/1,zz<b>", "/ui/<b>", "/status/<b>"]
)
def test_errors_do_not_speak_html(bench: Bench, target: str) -> None:
    reply = bench.ask("GET", target)
    kind = reply.get("Content-Type") or ""
    assert "html" not in kind or "<script" not in reply.body.decode()


def test_redirect_pages_escape_what_they_quote(bench: Bench) -> None:
    reply = bench.ask("GET", '//x"><script>alert(1)</script>')
    assert b"<script>" not in reply.body


# --- who counts as the peer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        ("127.0.0.1", 201),
        ("127.0.0.0/8", 201),
        ("::ffff:127.0.0.0/104", 201),
        ("::1", 401),
        ("::/0", 401),
        ("10.0.0.0/8", 401),
        ("::ffff:10.0.0.0/104", 401),
    ],
)
def test_a_mapped_peer_counts_as_ipv4(tmp_path: Path, entry: str, status: int) -> None:
    """A wildcard listener has one socket for both families: IPv4 peers arrive as ::ffff:a.b.c.d."""
    with serving(tmp_path, SecurityConfig(white_list=(entry,)), bind_ip="0.0.0.0") as bench:
        assert bench.ask("PUT", f"/{bench.fid()}", (OCTETS,), b"x").status == status


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "X-Real-Ip", "Forwarded", "X-Client-Ip", "True-Client-Ip", "Client-Ip"]
)
def test_headers_do_not_make_a_peer(tmp_path: Path, header: str) -> None:
    with serving(tmp_path, SecurityConfig(white_list=("10.1.1.1",))) as bench:
        value = "for=10.1.1.1" if header == "Forwarded" else "10.1.1.1"
        assert bench.ask("PUT", f"/{bench.fid()}", (OCTETS, (header, value)), b"x").status == 401


# --- tokens in logs --------------------------------------------------------------------------------------------------


def test_tokens_are_in_no_log_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At every level, where requests fail on their way to other servers too: those texts quote URLs."""
    secret = "eyJ0b2tlbiI6InNlY3JldC1tYXJrZXIifQ.eyJmaWQiOiIxIn0.c2VjcmV0LW1hcmtlcg"
    with caplog.at_level(0), serving(tmp_path) as bench:
        bench.allocate(5, placement="001")
        from pyvolume.server.master_client import Location

        dead = Location(f"{HOST}:1", f"{HOST}:1")
        bench.master.places[5] = [Location(bench.url, bench.url), dead]
        bench.master.places[6] = [dead]
        for target in (f"/{bench.fid(5)}", f"/{bench.fid(6)}", f"/{bench.fid(7)}", f"/{bench.fid(1)}"):
            for method in ("GET", "HEAD", "PUT", "DELETE"):
                body = b"x" if method == "PUT" else None
                for extra, where in (
                    ((("Authorization", f"Bearer {secret}"),), target),
                    ((), f"{target}?jwt={secret}"),
                ):
                    reply = bench.ask(method, where, (OCTETS, *extra), body)
                    if method != "GET":
                        assert secret.encode() not in reply.body, "nor does a refusal quote it"
    text = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert caplog.records
    assert secret not in text
    assert "c2VjcmV0LW1hcmtlcg" not in text


def test_many_refusals_leave_an_honest_client_alone(tmp_path: Path) -> None:
    with serving(tmp_path, SecurityConfig(jwt_read_key=b"k")) as bench:
        stop = threading.Event()

        def pester() -> None:
            client = Client(bench.port)
            for number in itertools.count():
                if stop.is_set():
                    break
                client.ask("GET", f"/1,{number:x}00000001?jwt={'x' * 500}")
            client.close()

        threads = [threading.Thread(target=pester) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            started = time.monotonic()
            for _ in range(20):
                assert bench.ask("GET", "/status").status == 200
            assert time.monotonic() - started < LIMIT_S
        finally:
            stop.set()
            for thread in threads:
                thread.join()
