"""HTTP on an erasure coded volume (contract erasure-coding.md 8, 9; departure A1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_bench import Bench, serving

from pyvolume._native import engine
from pyvolume.ops.ec import EcReader
from pyvolume.storage.ec.volume import EcVolume
from pyvolume.storage.store import Store

VID = 9
OCTETS = ("Content-Type", "application/octet-stream")


class OwnShards:
    """The peers of a server that is alone: it asks itself."""

    master = "nowhere"

    def __init__(self, store: Store) -> None:
        self._store = store

    def locate(self, vid: int) -> Mapping[int, Sequence[str]]:
        return {shard: ["self"] for volume in self._store.ec.copies(vid) for shard in volume.shards}

    def read_shard(self, *_: Any) -> tuple[bytes, bool]:
        raise AssertionError("every shard is here")

    def read_journal(self, *_: Any) -> list[int]:
        raise AssertionError("there is no other server")

    def is_self(self, address: str) -> bool:
        return True

    def delete_plain(self, vid: int, key: int, timeout_s: float) -> bool:
        raise AssertionError("there is no other server")

    def delete(
        self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float, *, mark: str
    ) -> None:
        assert not mark
        volume = self._store.ec.find(vid)
        assert volume is not None
        volume.journal(key)


class Coded:
    """A server with needles in an erasure coded volume."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.allocate(VID)
        self.needles = {
            bench.fid(VID): bytes([n]) * size for n, size in enumerate((1, 500, 70_000, 1_200_000, 2_500_000))
        }
        for fid, data in self.needles.items():
            assert bench.ask("PUT", f"/{fid}?ts=1700000000", [OCTETS], data).status == 201
        self.before = {fid: bench.ask("GET", f"/{fid}") for fid in self.needles}
        store = bench.context.store
        store.generate_shards(VID, "", lambda: None)
        store.delete_volume(VID)
        for shard in range(14):
            store.ec.mount("", VID, shard)
        reader = EcReader(store.ec, OwnShards(store))
        for server in (bench.admin, bench.public):
            server.ops.ec = reader

    @property
    def volume(self) -> EcVolume:
        found = self.bench.context.store.ec.find(VID)
        assert found is not None
        return found


@pytest.fixture
def coded(tmp_path: Path) -> Iterator[Coded]:
    with serving(tmp_path / "a") as bench:
        yield Coded(bench)


def headers_of(reply: Any) -> dict[str, str]:
    return {name: value for name, value in reply.headers if name not in ("Date", "X-Amz-Request-Id")}


def test_answers_are_those_of_the_plain_volume(coded: Coded) -> None:
    for fid, data in coded.needles.items():
        reply = coded.bench.ask("GET", f"/{fid}")
        assert (reply.status, reply.body) == (200, data)
        assert headers_of(reply) == headers_of(coded.before[fid])
        head = coded.bench.ask("HEAD", f"/{fid}")
        assert (head.status, head.body, head.get("content-length")) == (200, b"", str(len(data)))
        part = coded.bench.ask("GET", f"/{fid}", [("Range", "bytes=0-0")])
        assert (part.status, part.body) == (206, data[:1])
        etag = reply.get("etag") or ""
        assert coded.bench.ask("GET", f"/{fid}", [("If-None-Match", etag)]).status == 304


def test_lost_shards_do_not_show(coded: Coded) -> None:
    for shard in (0, 1, 2, 12):
        coded.bench.context.store.ec.unmount(VID, shard)
    for fid, data in coded.needles.items():
        assert coded.bench.ask("GET", f"/{fid}").body == data
    coded.bench.context.store.ec.unmount(VID, 3)
    statuses = {coded.bench.ask("GET", f"/{fid}").status for fid in coded.needles}
    assert 500 in statuses


def test_what_is_not_there(coded: Coded) -> None:
    fid = next(iter(coded.needles))
    wrong_cookie = fid[:-8] + "00000001"
    for target in (wrong_cookie, coded.bench.fid(VID)):
        reply = coded.bench.ask("GET", f"/{target}")
        assert (reply.status, reply.body) == (404, b"")


def test_delete(coded: Coded) -> None:
    fid, other = list(coded.needles)[1:3]
    refused = coded.bench.ask("DELETE", f"/{fid[:-8]}00000001")
    assert refused.status == 500
    assert json.loads(refused.body)["error"] == "Deletion Failed: unexpected cookie 1"
    _, size = coded.volume.lookup(int(fid.partition(",")[2][:-8], 16))
    length = engine.needle_record_len(engine.needle_record_len(size, 3), 3)
    reply = coded.bench.ask("DELETE", f"/{fid}")
    assert (reply.status, json.loads(reply.body)) == (202, {"size": length})
    assert coded.bench.ask("GET", f"/{fid}").status == 404
    again = coded.bench.ask("DELETE", f"/{fid}")
    assert (again.status, json.loads(again.body)) == (500, {"error": "Deletion Failed: already deleted"})
    missing = coded.bench.ask("DELETE", f"/{coded.bench.fid(VID)}")
    text = "Deletion Failed: locate in local ec volume: FindNeedleFromEcx: needle not found"
    assert (missing.status, json.loads(missing.body)) == (500, {"error": text})
    assert coded.bench.ask("DELETE", f"/{other[:-8]}00000000").status == 202  # quirk: cookie 0 is not checked


def test_writes_are_refused(coded: Coded) -> None:
    coded.bench.master.places[VID] = []
    reply = coded.bench.ask("PUT", f"/{coded.bench.fid(VID)}?type=replicate", [OCTETS], b"x")
    assert reply.status == 500
    assert json.loads(reply.body)["error"] == f"volume {VID} is erasure coded and cannot be written"


def test_deletes_go_to_the_shards_although_the_plain_volume_is_here(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as bench:
        bench.allocate(VID)
        fid = bench.fid(VID)
        assert bench.ask("PUT", f"/{fid}", [OCTETS], b"twice").status == 201
        store = bench.context.store
        store.generate_shards(VID, "", lambda: None)
        for shard in range(14):
            store.ec.mount("", VID, shard)
        reader = EcReader(store.ec, OwnShards(store))
        for server in (bench.admin, bench.public):
            server.ops.ec = reader
        assert bench.ask("DELETE", f"/{fid}").status == 202
        assert bench.ask("GET", f"/{fid}").body == b"twice"  # quirk: reads prefer the plain volume
        coded = store.ec.find(VID)
        assert coded is not None
        assert len(coded.deleted) == 1
