"""Two servers: replicated writes and deletes, forwarding, proxying, redirects, chunks elsewhere (http.md 6, 7, 9)."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from http_bench import HOST, Bench, serving

from pyvolume.errors import PyvolumeError
from pyvolume.security_config import SecurityConfig
from pyvolume.server import http_admission
from pyvolume.server.master_client import Location

OCTETS = ("Content-Type", "application/octet-stream")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Bench, Bench]]:
    """Two servers; volume 7 (two copies) is on both, volume 8 only on the second."""
    with serving(tmp_path / "a") as first, serving(tmp_path / "b") as second:
        both = [Location(bench.url, bench.url) for bench in (first, second)]
        for bench in (first, second):
            bench.allocate(7, placement="001", known=False)
            bench.master.places[7] = both
            bench.master.places[8] = [both[1]]
        second.allocate(8, known=False)
        yield first, second


class Recorder:
    """A peer that answers every request with the given bytes and keeps what it was sent."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.listener = socket.create_server((HOST, 0))
        self.url = f"{HOST}:{self.listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(10)
                data = b""
                while b"\r\n\r\n" not in data:
                    data += sock.recv(65536)
                head, _, body = data.partition(b"\r\n\r\n")
                lengths = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
                while lengths and len(body) < lengths[0]:
                    body += sock.recv(65536)
                self.requests.append(head + b"\r\n\r\n" + body)
                sock.sendall(self.answer)


@contextmanager
def recording(answer: bytes) -> Iterator[Recorder]:
    peer = Recorder(answer)
    try:
        yield peer
    finally:
        peer.listener.close()


def closed_port() -> str:
    with socket.create_server((HOST, 0)) as listener:
        return f"{HOST}:{listener.getsockname()[1]}"


# ----------------------------------------------------------------------------------------------------------- writes


def test_a_write_and_a_delete_reach_both(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    fid = first.fid(7)
    reply = first.ask("PUT", f"/{fid}?ts=1700000000", (OCTETS, ("Seaweed-Who", "me")), b"hello")
    assert (reply.status, json.loads(reply.body)["size"]) == (201, 5)
    for bench in pair:
        got = bench.ask("GET", f"/{fid}")
        assert (got.body, got.get("Who"), got.get("Last-Modified")) == (b"hello", "me", "Tue, 14 Nov 2023 22:13:20 GMT")
    assert first.ask("PUT", f"/{fid}?ts=1700000000", (OCTETS, ("Seaweed-Who", "me")), b"hello").status == 204
    assert second.ask("DELETE", f"/{fid}").status == 202
    assert [bench.ask("GET", f"/{fid}").status for bench in pair] == [404, 404]


def test_what_was_packed_is_forwarded_as_it_is(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    fid = first.fid(7)
    text = b"words " * 500
    assert first.ask("PUT", f"/{fid}", (("Content-Type", "text/plain"),), text).status == 201
    stored = [bench.ask("GET", f"/{fid}", (("Accept-Encoding", "gzip"),)) for bench in pair]
    assert stored[0].get("Content-Encoding") == "gzip"
    assert stored[0].body == stored[1].body
    assert stored[0].get("Etag") == stored[1].get("Etag")
    assert second.ask("GET", f"/{fid}").body == text


def test_a_volume_that_is_elsewhere_is_written_there(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    fid = first.fid(8)
    assert first.ask("PUT", f"/{fid}", (OCTETS,), b"forwarded").status == 201
    assert second.ask("GET", f"/{fid}").body == b"forwarded"
    assert first.ask("DELETE", f"/{fid}").status == 404, "deletes are never forwarded for a missing volume"
    assert first.ask("PUT", f"/{first.fid(8)}?type=replicate", (OCTETS,), b"x").status == 404


def test_a_volume_that_nobody_has(pair: tuple[Bench, Bench]) -> None:
    reply = pair[0].ask("PUT", f"/{pair[0].fid(99)}", (OCTETS,), b"x")
    assert (reply.status, reply.body) == (404, b'{"error":"volume 99 not found"}')


def test_the_forwarded_request(tmp_path: Path) -> None:
    keys = SecurityConfig()
    with (
        recording(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}") as peer,
        serving(tmp_path, keys) as bench,
    ):
        bench.allocate(7, placement="001", ttl="3d", known=False)
        bench.master.places[7] = [Location(bench.url), Location(peer.url)]
        fid = bench.fid(7)
        headers = (
            ("Content-Type", "text/x-mine"),
            ("Seaweed-b", "2"),
            ("Seaweed-A", "1"),
            ("Content-Disposition", 'attachment; filename="na me.txt"'),
            ("Cookie", "AT=tok"),
            ("X-Other", "not forwarded"),
        )
        sent = bench.ask("PUT", f"/{fid}.txt?ts=1700000000&fsync=true&collection=c&cm=1", headers, b"{}")
        assert sent.status == 201
        head, _, body = peer.requests[0].partition(b"\r\n\r\n")
        line, *rest = head.decode().split("\r\n")
        target = f"/{fid}.txt?cm=true&fsync=true&ts=1700000000&ttl=3d&type=replicate"
        assert line == f"POST {target} HTTP/1.1"
        named = dict(item.split(": ", 1) for item in rest)
        boundary = named.pop("Content-Type").removeprefix("multipart/form-data; boundary=")
        assert named.pop("X-Amz-Request-Id") == sent.get("X-Amz-Request-Id")
        assert named.pop("Content-Length") == str(len(body))
        assert named == {
            "Host": peer.url,
            "Seaweed-A": "1",
            "Seaweed-B": "2",
            "Authorization": "Bearer tok",
            "User-Agent": "Go-http-client/1.1",
        }
        assert body.decode() == (
            f"--{boundary}\r\n"
            'Content-Disposition: form-data; filename="na me.txt"; name=file\r\n'
            "Content-Type: text/x-mine\r\n"
            f"Idempotency-Key: http://{peer.url}{target}\r\n\r\n"
            f"{{}}\r\n--{boundary}--\r\n"
        )


def test_the_forwarded_delete(tmp_path: Path) -> None:
    with (
        recording(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as peer,
        serving(tmp_path) as bench,
    ):
        bench.allocate(7, placement="001", known=False)
        bench.master.places[7] = [Location(bench.url), Location(peer.url)]
        fid = bench.fid(7)
        bench.ask("PUT", f"/{fid}?type=replicate", (OCTETS,), b"x")
        assert bench.ask("DELETE", f"/{fid}?ts=5&jwt=tok").status == 202
        lines = peer.requests[0].decode().split("\r\n")
        assert lines[0] == f"DELETE /{fid}?type=replicate HTTP/1.1"
        assert "Authorization: Bearer tok" in lines
        assert not any(line.startswith("X-Amz-Request-Id") for line in lines)


REFUSING = b'HTTP/1.1 500 Internal Server Error\r\nContent-Length: 16\r\nConnection: close\r\n\r\n{"error":"nope"}'


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (REFUSING, "unmarshalled error {url}: nope"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            "unmarshal {url}: unexpected end of JSON input",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>",
            "unmarshal {url}: invalid character '<' looking for beginning of value",
        ),
        (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", None),
        (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", None),
    ],
)
def test_what_counts_as_success_of_a_replica(tmp_path: Path, answer: bytes, text: str | None) -> None:
    with recording(answer) as peer, serving(tmp_path) as bench:
        bench.allocate(7, placement="001", known=False)
        bench.master.places[7] = [Location(bench.url), Location(peer.url)]
        fid = bench.fid(7)
        reply = bench.ask("PUT", f"/{fid}?ts=5", (OCTETS,), b"hello")
        if text is None:
            assert reply.status == 201
            return
        url = f"http://{peer.url}/{fid}?ts=5&ttl=&type=replicate"
        assert reply.status == 500
        expected = f"failed to write to replicas for volume 7: [{peer.url}]: {text.replace('{url}', url)}"
        assert json.loads(reply.body) == {"error": expected}
        assert bench.ask("GET", f"/{fid}").body == b"hello", "the local copy stays"


def test_a_dead_replica(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        dead = closed_port()
        bench.allocate(7, placement="001", known=False)
        bench.master.places[7] = [Location(bench.url), Location(dead)]
        fid = bench.fid(7)
        reply = bench.ask("PUT", f"/{fid}?ts=5", (OCTETS,), b"hello")
        url = f"http://{dead}/{fid}?ts=5&ttl=&type=replicate"
        assert json.loads(reply.body)["error"] == (
            f"failed to write to replicas for volume 7: [{dead}]: upload {fid} 5 bytes to {url}: "
            f'Post "{url}": dial tcp {dead}: connect: connection refused'
        )
        assert bench.master.invalidated == [7], "the master is asked anew next time"
        deleted = bench.ask("DELETE", f"/{fid}")
        target = f"http://{dead}/{fid}?type=replicate"
        assert json.loads(deleted.body)["error"] == (
            f'Deletion Failed: [{dead}]: Delete "{target}": dial tcp {dead}: connect: connection refused'
        )
        assert bench.ask("GET", f"/{fid}").status == 404, "the local delete is not undone"


def test_a_master_that_does_not_answer(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.allocate(7, placement="001")
        bench.master.failure = PyvolumeError("rpc error: code = Unavailable desc = gone")
        fid = bench.fid(7)
        reply = bench.ask("PUT", f"/{fid}", (OCTETS,), b"x")
        assert reply.body == b'{"error":"replicating lookup failed for 7: rpc error: code = Unavailable desc = gone"}'
        assert bench.ask("GET", f"/{fid}").status == 404
        assert bench.ask("PUT", f"/{bench.fid(1)}", (OCTETS,), b"x").status == 201, "one copy needs no master"


def test_the_first_of_several_failures_ends_the_request(tmp_path: Path) -> None:
    held = threading.Event()

    class Silent(Recorder):
        def _run(self) -> None:
            while True:
                try:
                    sock, _ = self.listener.accept()
                except OSError:
                    return
                with sock:
                    held.set()
                    sock.settimeout(20)
                    while sock.recv(65536):
                        pass
                    self.requests.append(b"let go")

    silent = Silent(b"")
    dead = closed_port()
    try:
        with serving(tmp_path) as bench:
            bench.allocate(7, placement="002", known=False)
            bench.master.places[7] = [Location(bench.url), Location(silent.url), Location(dead)]
            reply = bench.ask("PUT", f"/{bench.fid(7)}", (OCTETS,), b"x")
            assert reply.status == 500
            assert f"[{dead}]" in json.loads(reply.body)["error"]
            assert silent.url not in json.loads(reply.body)["error"]
    finally:
        silent.listener.close()


def test_servers_that_replicate_to_each_other_do_not_lock_up(pair: tuple[Bench, Bench]) -> None:
    statuses: list[int] = []

    def work(bench: Bench) -> None:
        client = bench.client()
        for _ in range(4):
            statuses.append(client.ask("PUT", f"/{bench.fid(7)}", (OCTETS,), b"x" * 100).status)
        client.close()

    threads = [threading.Thread(target=work, args=(pair[number % 2],)) for number in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [201] * 600


def test_who_gets_no_slot_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_admission, "SLOT_WAIT_S", 0.1)
    with serving(tmp_path) as bench:
        bench.allocate(7, placement="001")
        admission = bench.admin.server.admission
        assert isinstance(admission, http_admission.AdminAdmission)
        admission.slots.limit = 0
        reply = bench.ask("PUT", f"/{bench.fid(7)}", (OCTETS,), b"x")
        assert (reply.status, reply.body) == (500, b'{"error":"0 requests wait for other servers already"}')
        assert bench.ask("PUT", f"/{bench.fid(7)}?type=replicate", (OCTETS,), b"x").status == 201
        assert bench.ask("PUT", f"/{bench.fid(1)}", (OCTETS,), b"x").status == 201
        assert bench.ask("GET", f"/{bench.fid(1)}").status == 404
        admission.slots.limit = 1
        assert bench.ask("PUT", f"/{bench.fid(7)}", (OCTETS,), b"x").status == 500, (
            "too few replicas, but it was served"
        )
        assert admission.slots.taken == 0


# ------------------------------------------------------------------------------------------- reads of other volumes


def elsewhere(mode: str) -> Callable[[Path], object]:
    @contextmanager
    def made(tmp_path: Path) -> Iterator[tuple[Bench, Bench, str]]:
        with serving(tmp_path / "a", read_mode=mode) as first, serving(tmp_path / "b") as second:
            second.allocate(8, known=False)
            first.master.places[8] = [Location(second.url)]
            fid = first.fid(8)
            assert second.ask("PUT", f"/{fid}?ts=1700000000", (OCTETS,), b"hello").status == 201
            yield first, second, fid

    return made


def test_local(tmp_path: Path) -> None:
    with elsewhere("local")(tmp_path) as (first, _, fid):  # type: ignore[attr-defined]
        assert (first.ask("GET", f"/{fid}").status, first.ask("HEAD", f"/{fid}").status) == (404, 404)


def test_redirect(tmp_path: Path) -> None:
    with elsewhere("redirect")(tmp_path) as (first, second, fid):  # type: ignore[attr-defined]
        vid, hex_ = fid.split(",")
        reply = first.ask("GET", f"/{vid}/{hex_}/name.html?collection=c%201&width=5&dl=true")
        url = f"http://{second.url}/{fid}?collection=c+1&proxied=true"
        assert (reply.status, reply.get("Location")) == (301, url)
        assert reply.get("Content-Type") == "text/html; charset=utf-8"
        assert reply.body.decode() == f'<a href="{url.replace("&", "&amp;")}">Moved Permanently</a>.\n\n'
        assert first.ask("GET", f"/{fid}_1").get("Location") == f"http://{second.url}/{fid}_1?proxied=true"
        head = first.ask("HEAD", f"/{fid}")
        assert (head.status, head.get("Content-Length")) == (301, None)
        assert first.ask("GET", f"/{first.fid(99)}").status == 404


def test_proxy(tmp_path: Path) -> None:
    with elsewhere("proxy")(tmp_path) as (first, second, fid):  # type: ignore[attr-defined]
        reply = first.ask("GET", f"/{fid}", (("Origin", "http://o"),))
        assert (reply.status, reply.body, reply.get("Content-Type")) == (200, b"hello", "text/plain; charset=utf-8")
        assert len(reply.all("X-Amz-Request-Id")) == 2
        assert len(reply.all("Access-Control-Allow-Origin")) == 2
        assert len(reply.all("Server")) == len(reply.all("Date")) == 1
        ranged = first.ask("GET", f"/{fid}", (("Range", "bytes=1-2"),))
        assert (ranged.status, ranged.body, ranged.get("Content-Range")) == (206, b"el", "bytes 1-2/5")
        assert first.ask("GET", f"/{fid}", (("If-None-Match", '"9a71bb4c"'),)).status == 304
        head = first.ask("HEAD", f"/{fid}")
        assert (head.status, head.get("Content-Length"), head.get("Content-Type")) == (
            200,
            "5",
            "text/plain; charset=utf-8",
        )
        assert first.ask("GET", f"/{first.fid(8)}").status == 404
        assert first.ask("GET", f"/{first.fid(99)}").status == 404
        vid, hex_ = fid.split(",")
        assert (
            first.ask("GET", f"/{vid}/{hex_}/a.json?dl=true").get("Content-Disposition")
            == "attachment; filename=a.json"
        )
        second.ask("DELETE", f"/{fid}")
        assert first.ask("GET", f"/{fid}?readDeleted=true").body == b"hello"


def test_a_proxied_gzip_is_unpacked_for_who_did_not_ask(tmp_path: Path) -> None:
    with elsewhere("proxy")(tmp_path) as (first, second, _):  # type: ignore[attr-defined]
        fid = first.fid(8)
        text = b"words " * 2000
        assert second.ask("PUT", f"/{fid}", (("Content-Type", "text/plain"),), text).status == 201
        plain = first.ask("GET", f"/{fid}")
        assert plain.body == text
        assert (plain.get("Content-Encoding"), plain.get("Content-Length")) == (None, None)
        packed = first.ask("GET", f"/{fid}", (("Accept-Encoding", "gzip"),))
        assert packed.get("Content-Encoding") == "gzip"


def test_a_proxied_request(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 299 Odd\r\nContent-Length: 2\r\nX-Peer: y\r\nServer: other\r\nConnection: close\r\n\r\nok"
    with recording(answer) as peer, serving(tmp_path) as bench:
        bench.master.places[8] = [Location(peer.url)]
        reply = bench.ask("GET", "/8,01deadbeef.txt?z=1&a=%7e;&b=x+y", (("X-Mine", "v"), ("Accept-Encoding", "br")))
        assert (reply.status, reply.body, reply.get("X-Peer")) == (299, b"ok", "y")
        assert reply.get("Server") == "SeaweedFS Volume 30GB 4.44"
        lines = peer.requests[0].decode().split("\r\n")
        assert lines[0] == "GET /8,01deadbeef.txt?b=x+y&proxied=true&z=1 HTTP/1.1"
        assert "X-Mine: v" in lines
        assert "Accept-Encoding: br" in lines
        assert f"Host: {peer.url}" in lines


def test_a_dead_peer_is_500(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.master.places[8] = [Location(closed_port())]
        reply = bench.ask("GET", "/8,01deadbeef")
        assert (reply.status, reply.body, reply.get("Content-Type")) == (500, b"", None)


def test_a_server_never_proxies_to_itself(tmp_path: Path) -> None:
    with serving(tmp_path) as bench:
        bench.master.places[8] = [Location(bench.url)]
        assert bench.ask("GET", "/8,01deadbeef").status == 404


def test_over_the_download_limit_a_replica_is_asked(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    fid = first.fid(7)
    assert first.ask("PUT", f"/{fid}", (OCTETS,), b"hello").status == 201
    gate = first.ops.downloads
    gate.limit_bytes, gate.timeout_s = 10, 0.1
    first.settings_changed()
    gate.add(100)
    try:
        reply = first.ask("GET", f"/{fid}")
        assert (reply.body, len(reply.all("X-Amz-Request-Id"))) == (b"hello", 2)
        assert first.ask("GET", f"/{fid}?proxied=true").status == 429
        assert second.ask("GET", f"/{fid}").body == b"hello"
    finally:
        gate.remove(100)


# -------------------------------------------------------------------------------------------------- chunk manifests


def test_chunks_on_two_servers(pair: tuple[Bench, Bench]) -> None:
    first, second = pair
    here, there, whole = first.fid(1), second.fid(8), first.fid(1)
    first.ask("PUT", f"/{here}", (OCTETS,), b"hello ")
    second.ask("PUT", f"/{there}", (OCTETS,), b"world")
    chunks = [{"fid": here, "offset": 0, "size": 6}, {"fid": there, "offset": 6, "size": 5}]
    text = json.dumps({"name": "x.bin", "size": 11, "chunks": chunks}).encode()
    assert first.ask("PUT", f"/{whole}?cm=true", (OCTETS,), text).status == 201
    assert first.ask("GET", f"/{whole}").body == b"hello world"
    assert first.ask("GET", f"/{whole}", (("Range", "bytes=5-7"),)).body == b" wo"
    assert first.ask("GET", f"/{whole}", (("Range", "bytes=8-"),)).body == b"rld"
    second.ask("DELETE", f"/{there}")
    client = first.client()
    client.send(f"GET /{whole} HTTP/1.1\r\nHost: h\r\nRange: bytes=0-10\r\n\r\n".encode())
    with pytest.raises(ConnectionError):
        client.read()
    failed = first.ask("GET", f"/{whole}")
    assert failed.status == 500
    assert failed.body.decode() == f"Read chunk needle error: [404] http://{second.url}/{there}\n"


def test_a_manifest_does_not_need_a_second_worker_for_its_own_chunks(pair: tuple[Bench, Bench]) -> None:
    first, _ = pair
    part, whole = first.fid(1), first.fid(1)
    first.ask("PUT", f"/{part}", (OCTETS,), b"part")
    text = json.dumps({"chunks": [{"fid": part, "offset": 0, "size": 4}]}).encode()
    first.ask("PUT", f"/{whole}?cm=true", (OCTETS,), text)
    bodies: list[bytes] = []
    threads = [threading.Thread(target=lambda: bodies.append(first.ask("GET", f"/{whole}").body)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert bodies == [b"part"] * 100
