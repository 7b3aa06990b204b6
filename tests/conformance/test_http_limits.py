"""Byte limits: waiting, time-outs, exemptions (contract http.md 5.4, departure A6)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from http_bench import Bench, Client, Reply, serving

OCTETS = ("Content-Type", "application/octet-stream")
MIB = 1 << 20


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class SlowUpload:
    """A PUT whose head and half of its body were sent."""

    def __init__(self, bench: Bench, size: int, *, chunked: bool = False) -> None:
        self.client: Client = bench.client()
        self.fid = bench.fid()
        self.size = size
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        head = f"PUT /{self.fid} HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\n{framing}\r\n\r\n"
        half = bytes(size // 2)
        self.chunked = chunked
        self.client.send(head.encode() + (b"%x\r\n%s\r\n" % (len(half), half) if chunked else half))

    def finish(self) -> Reply:
        rest = bytes(self.size - self.size // 2)
        self.client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest) if self.chunked else rest)
        reply = self.client.read("PUT")
        self.client.close()
        return reply


def uploads_in_flight(bench: Bench) -> int:
    return bench.ops.uploads.in_flight


def test_an_upload_over_the_limit_waits_and_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit_bytes=MIB, upload_wait_s=0.3) as bench:
        slow = SlowUpload(bench, 2_000_000)
        until(lambda: uploads_in_flight(bench) == 2_000_000, "the first upload is counted from its head on")
        reply = bench.ask("PUT", f"/{bench.fid()}", (OCTETS,), b"x")
        assert reply.status == 429
        assert reply.body == (
            b'{"error":"reject because inflight upload data 2000000 \\u003e 1048576, and wait timeout"}'
        )
        assert reply.get("Retry-After") is None
        replicated = bench.ask("PUT", f"/{bench.fid()}?type=replicate", (OCTETS,), b"x")
        assert replicated.status == 201, "replicas are exempt"
        assert bench.ask("DELETE", f"/{slow.fid}").status == 404, "deletes are exempt"
        assert slow.finish().status == 201
        until(lambda: uploads_in_flight(bench) == 0, "everything is given back")


def test_an_upload_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit_bytes=MIB, upload_wait_s=30.0) as bench:
        slow = SlowUpload(bench, 2_000_000)
        until(lambda: uploads_in_flight(bench) > 0, "counted")
        replies: list[Reply] = []
        waiting = [
            threading.Thread(target=lambda: replies.append(bench.ask("PUT", f"/{bench.fid()}", (OCTETS,), b"x")))
            for _ in range(5)
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        assert not replies
        assert slow.finish().status == 201
        for thread in waiting:
            thread.join(15)
        assert [reply.status for reply in replies] == [201] * 5
        until(lambda: uploads_in_flight(bench) == 0, "everything is given back")


def test_no_100_is_sent_while_an_upload_waits(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit_bytes=MIB, upload_wait_s=0.3) as bench:
        slow = SlowUpload(bench, 2_000_000)
        until(lambda: uploads_in_flight(bench) > 0, "counted")
        client = bench.client()
        client.send(
            f"PUT /{bench.fid()} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        reply = client.read("PUT")
        assert (reply.status, reply.interim) == (429, [])
        client.close()
        slow.finish()


def test_chunked_bodies_are_counted_as_they_arrive(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit_bytes=MIB, upload_wait_s=0.3) as bench:
        slow = SlowUpload(bench, 4_000_000, chunked=True)
        until(lambda: uploads_in_flight(bench) == 2_000_000, "half of it has arrived")
        assert bench.ask("PUT", f"/{bench.fid()}", (OCTETS,), b"x").status == 429
        assert slow.finish().status == 201
        until(lambda: uploads_in_flight(bench) == 0, "everything is given back")


def test_a_client_that_leaves_gives_its_bytes_back(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit_bytes=MIB, upload_wait_s=30.0) as bench:
        slow = SlowUpload(bench, 2_000_000)
        until(lambda: uploads_in_flight(bench) > 0, "counted")
        waiting = bench.client()
        waiting.send(f"PUT /{bench.fid()} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n".encode())
        time.sleep(0.05)
        waiting.close()
        slow.client.close()
        until(lambda: uploads_in_flight(bench) == 0, "nothing is left of either")
        assert bench.ask("PUT", f"/{bench.fid()}", (OCTETS,), b"x").status == 201


def test_uploads_are_counted_without_a_limit(tmp_path: Path) -> None:
    with serving(tmp_path, fast_lane=False) as bench:
        slow = SlowUpload(bench, 2_000_000)
        until(lambda: uploads_in_flight(bench) == 2_000_000, "counted")
        slow.finish()
        until(lambda: uploads_in_flight(bench) == 0, "given back")


class SlowDownload:
    """A GET whose client does not read."""

    def __init__(self, bench: Bench, fid: str) -> None:
        self.client = bench.client()
        self.client.send(f"GET /{fid} HTTP/1.1\r\nHost: h\r\n\r\n".encode())


BIG = bytes(32 * MIB)  # far more than the sockets take without a reader


def test_downloads_over_the_limit(tmp_path: Path) -> None:
    with serving(tmp_path, download_limit_bytes=MIB, download_wait_s=0.3) as bench:
        big, small = bench.fid(), bench.fid()
        assert bench.ask("PUT", f"/{big}", (OCTETS,), BIG).status == 201
        assert bench.ask("PUT", f"/{small}", (OCTETS,), b"small").status == 201
        slow = SlowDownload(bench, big)
        until(lambda: bench.ops.downloads.in_flight > len(BIG), "the size in the record is what is counted")
        counted = bench.ops.downloads.in_flight
        for method in ("GET", "HEAD"):
            reply = bench.ask(method, f"/{small}?x=y")
            assert reply.status == 429
        text = f"request /{small} because inflight download data {counted} \\u003e {MIB}, and wait timeout"
        assert bench.ask("GET", f"/{small}?x=y").body == b'{"error":"%s"}' % text.encode()
        assert bench.ask("GET", "/x,01deadbeef").status == 400, "a bad volume id is told at once"
        slow.client.read()
        slow.client.close()
        until(lambda: bench.ops.downloads.in_flight == 0, "everything is given back")
        assert bench.ask("GET", f"/{small}").body == b"small"


def test_a_download_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with serving(tmp_path, download_limit_bytes=MIB, download_wait_s=30.0) as bench:
        big, small = bench.fid(), bench.fid()
        bench.ask("PUT", f"/{big}", (OCTETS,), BIG)
        bench.ask("PUT", f"/{small}", (OCTETS,), b"small")
        slow = SlowDownload(bench, big)
        until(lambda: bench.ops.downloads.in_flight > 0, "counted")
        replies: list[Reply] = []
        waiting = threading.Thread(target=lambda: replies.append(bench.ask("GET", f"/{small}")))
        waiting.start()
        time.sleep(0.1)
        assert not replies
        slow.client.close()  # leaving counts as an end, too
        waiting.join(15)
        assert [reply.body for reply in replies] == [b"small"]
        until(lambda: bench.ops.downloads.in_flight == 0, "everything is given back")
