"""HTTP on a volume in a remote store: the answers are those of the same volume on the disk (http.md 5, 8)."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, Reply, serving
from s3_server import FakeS3, Seen

from pyvolume.server import http_admission
from pyvolume.storage.tier.backends import Watcher

OCTETS = ("Content-Type", "application/octet-stream")
LARGE = bytes(range(251)) * 20_000  # 5 MB, not a multiple of anything
VARYING = ("date", "x-amz-request-id", "connection")


@pytest.fixture
def s3_server() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


@pytest.fixture
def bench(tmp_path: Path, s3_server: FakeS3) -> Iterator[Bench]:
    with serving(tmp_path) as made:
        made.context.store.add_backends([("s3", "default", s3_server.properties())])
        made.allocate(2)
        yield made


def up(bench: Bench, vid: int = 1) -> None:
    bench.context.store.move_to_remote(vid, "", "s3.default", False, Watcher())


def put(bench: Bench, data: bytes, *headers: tuple[str, str], vid: int = 1) -> str:
    fid = bench.fid(vid)
    assert bench.ask("PUT", f"/{fid}", headers or (OCTETS,), data).status == 201
    return fid


def plain(reply: Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    return reply.status, [pair for pair in reply.headers if pair[0].lower() not in VARYING], reply.body


def test_answers_are_those_of_a_local_volume(bench: Bench) -> None:
    fids = {
        "small": put(bench, b"hello tier"),
        "text": put(bench, b"text " * 1000, ("Content-Type", "text/plain"), ("Seaweed-Color", "blue")),
        "packed": put(bench, gzip.compress(b"packed " * 99), OCTETS, ("Content-Encoding", "gzip")),
        "large": put(bench, LARGE),
        "empty": put(bench, b""),
        "gone": put(bench, b"to be deleted"),
        "cookie": bench.fid(1),
    }
    fids["cookie"] = fids["small"][:-8] + "00000000"
    assert bench.ask("DELETE", f"/{fids['gone']}").status == 202
    local = bench.ask("GET", f"/{fids['small']}")
    headers: list[tuple[tuple[str, str], ...]] = [
        (),
        (("Range", "bytes=2-5"),),
        (("Range", "bytes=-7"),),
        (("Range", "bytes=1000000-4999999"),),
        (("Range", "bytes=0-1,4-5"),),
        (("Range", "bytes=99999999-"),),
        (("Accept-Encoding", "gzip"),),
        (("If-None-Match", local.get("etag") or ""),),
        (("If-Modified-Since", local.get("last-modified") or ""),),
    ]
    targets = [f"/{fid}{tail}" for fid in fids.values() for tail in ("", "?readDeleted=true", ".txt?dl=true")]
    asked = list(itertools.product(("GET", "HEAD"), targets, headers))
    before = [plain(bench.ask(method, target, more)) for method, target, more in asked]
    up(bench)
    for (method, target, more), wanted in zip(asked, before, strict=True):
        answer = plain(bench.ask(method, target, more))
        if b"multipart/byteranges" in str(wanted[1]).encode():
            assert answer[0] == wanted[0] and len(answer[2]) == len(wanted[2])
        else:
            assert answer == wanted, (method, target, more)


def test_writes_and_deletes(bench: Bench) -> None:
    first, second = put(bench, b"first"), put(bench, b"second")
    up(bench)
    reply = bench.ask("PUT", f"/{first}", (OCTETS,), b"new")
    assert (reply.status, reply.body) == (500, b'{"error":"failed to write to local disk: volume 1 is read only"}')
    assert bench.ask("DELETE", f"/{first[:-8]}00000000").status == 400
    reply = bench.ask("DELETE", f"/{first}")
    assert (reply.status, json.loads(reply.body)["size"] > 5) == (202, True)
    assert bench.ask("DELETE", f"/{first}").status == 404
    assert bench.ask("GET", f"/{first}").status == 404
    bench.context.store.mark_readonly(1)
    reply = bench.ask("DELETE", f"/{second}")
    assert (reply.status, reply.body) == (500, b'{"error":"Deletion Failed: volume 1 is read only"}')
    volumes = json.loads(bench.ask("GET", "/status").body)["Volumes"]
    [shown] = [volume for volume in volumes if volume["Id"] == 1]
    assert shown["RemoteStorageName"] == "s3.default" and shown["ReadOnly"]
    assert b"s3.default" in bench.ask("GET", "/ui/index.html").body


def test_a_store_that_fails_is_500_without_a_body(bench: Bench, s3_server: FakeS3) -> None:
    small, large = put(bench, b"small"), put(bench, LARGE)
    up(bench)
    s3_server.hook = lambda seen: 403
    for fid in (small, large):
        for method in ("GET", "HEAD"):
            reply = bench.ask(method, f"/{fid}")
            assert (reply.status, reply.body) == (500, b"")
    assert bench.ask("DELETE", f"/{small}").status == 404  # upstream: any failure to read is "not there"
    s3_server.hook = None
    assert bench.ask("GET", f"/{small}").body == b"small"
    assert bench.ask("GET", f"/{large}").body == LARGE


def test_a_store_that_hangs_holds_up_nobody_else(
    bench: Bench, s3_server: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered, local = put(bench, b"in the store"), put(bench, b"here", vid=2)
    up(bench)
    go_on = threading.Event()

    def hang(seen: Seen) -> int | None:
        go_on.wait(30)
        return None

    s3_server.hook = hang
    answers: list[bytes] = []
    readers = [threading.Thread(target=lambda: answers.append(bench.ask("GET", f"/{tiered}").body)) for _ in range(120)]
    for reader in readers:
        reader.start()
    admission = bench.admin.server.admission
    assert isinstance(admission, http_admission.AdminAdmission)
    deadline = time.monotonic() + 20
    while admission.tier_slots.waiting < 104:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert admission.tier_slots.taken == 16
    for public in (False, True):
        client = bench.client(public=public)
        assert client.ask("GET", f"/{local}?x=y").body == b"here", "by a worker, not by the lane"
        client.close()
    assert bench.ask("PUT", f"/{bench.fid(2)}?cm=false", (OCTETS,), b"x").status == 201
    go_on.set()
    for reader in readers:
        reader.join(30)
    assert answers == [b"in the store"] * 120
    assert admission.tier_slots.taken == 0
