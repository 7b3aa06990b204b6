"""The fast lane on an erasure coded volume: what it reads itself, and what it leaves to the other lane."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_bench import Bench, serving

from pyvolume.errors import StorageError
from pyvolume.ops.ec import EcReader
from pyvolume.storage.store import Store

VID = 9
OCTETS = ("Content-Type", "application/octet-stream")
SIZES = (1, 500, 70_000, 1_200_000, 2_500_000)


class Peers:
    """Who has shards besides this server, as tests say."""

    master = "nowhere"

    def __init__(self, store: Store) -> None:
        self._store = store
        self.others: dict[int, list[str]] = {}
        self.asked = 0
        self.silent = False

    def locate(self, vid: int) -> Mapping[int, Sequence[str]]:
        if self.silent:
            raise StorageError("no master answers")
        here = {shard for volume in self._store.ec.copies(vid) for shard in volume.shards}
        return {shard: [*self.others.get(shard, []), *(["self"] if shard in here else [])] for shard in range(14)}

    def read_shard(self, address: str, *_: Any) -> tuple[bytes, bool]:
        if address == "self":
            raise StorageError("it is gone")
        self.asked += 1
        return b"", True

    def read_journal(self, *_: Any) -> list[int]:
        return []

    def is_self(self, address: str) -> bool:
        return address == "self"

    def delete_plain(self, vid: int, key: int, timeout_s: float) -> bool:
        return False

    def delete(
        self, address: str, vid: int, collection: str, key: int, version: int, timeout_s: float, *, mark: str
    ) -> None:
        volume = self._store.ec.find(vid)
        assert volume is not None
        volume.journal(key)


class Coded:
    """A server with the fast lane and needles in an erasure coded volume."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.allocate(VID)
        self.needles = {bench.fid(VID): bytes([n]) * size for n, size in enumerate(SIZES)}
        for fid, data in self.needles.items():
            assert bench.ask("PUT", f"/{fid}?ts=1700000000", [OCTETS], data).status == 201
        self.before = {fid: bench.ask("GET", f"/{fid}") for fid in self.needles}
        self.store = bench.context.store
        self.store.generate_shards(VID, "", lambda: None)
        self.store.delete_volume(VID)
        for shard in range(14):
            self.store.ec.mount("", VID, shard)
        self.peers = Peers(self.store)
        self.reader = EcReader(self.store.ec, self.peers)
        for server in (bench.admin, bench.public):
            server.ops.ec = self.reader

    def handed_over(self) -> int:
        assert self.bench.lane is not None
        return sum(self.bench.lane.stats().handed_over.values())

    def read_all(self) -> int:
        """Reads all needles; how many were handed over."""
        before = self.handed_over()
        for fid, data in self.needles.items():
            reply = self.bench.ask("GET", f"/{fid}")
            assert (reply.status, reply.body) == (200, data)
            assert headers_of(reply) == headers_of(self.before[fid])
        return self.handed_over() - before


def headers_of(reply: Any) -> dict[str, str]:
    return {name: value for name, value in reply.headers if name not in ("Date", "X-Amz-Request-Id")}


@pytest.fixture
def coded(tmp_path: Path) -> Iterator[Coded]:
    with serving(tmp_path / "a", fast_lane=True) as bench:
        yield Coded(bench)


def test_whole_shards_are_read_by_the_lane(coded: Coded) -> None:
    assert coded.read_all() == 0
    fid, data = list(coded.needles.items())[3]
    part = coded.bench.ask("GET", f"/{fid}", [("Range", "bytes=1048570-1048590")])
    assert (part.status, part.body) == (206, data[1048570:1048591])
    assert coded.bench.ask("HEAD", f"/{fid}").status == 200
    assert coded.handed_over() == 0 or coded.read_all() == 0


def test_lost_shards_are_made_by_the_lane_once_it_is_told_that_nobody_has_them(coded: Coded) -> None:
    for shard in (0, 1, 2, 12):
        coded.store.ec.unmount(VID, shard)
    assert coded.read_all() > 0  # where shards are was not asked yet
    assert coded.read_all() == 0
    coded.store.ec.unmount(VID, 3)
    fid = list(coded.needles)[3]
    assert coded.bench.ask("GET", f"/{fid}").status == 500  # nine of ten are left
    coded.store.ec.mount("", VID, 3)
    coded.read_all()
    assert coded.read_all() == 0


def test_a_shard_that_another_server_has_is_not_made_here(coded: Coded) -> None:
    """That server may know of a delete which this one does not."""
    for shard in (0, 1, 2):
        coded.store.ec.unmount(VID, shard)
        coded.peers.others[shard] = ["other:1"]
    for fid in coded.needles:
        assert coded.bench.ask("GET", f"/{fid}").status == 404  # deleted there
    assert coded.peers.asked == len(coded.needles)


def test_a_delete_is_seen_by_the_lane_at_once(coded: Coded) -> None:
    for fid in coded.needles:
        assert coded.bench.ask("GET", f"/{fid}").status == 200
        assert coded.bench.ask("DELETE", f"/{fid}").status == 202
        assert coded.bench.ask("GET", f"/{fid}").status == 404


def test_deletes_stay_seen_after_a_rebuild(coded: Coded) -> None:
    fid, *others = coded.needles
    assert coded.bench.ask("DELETE", f"/{fid}").status == 202
    coded.store.ec.unmount(VID, 5)
    coded.store.ec.delete_files("", VID, [5])
    assert coded.store.ec.rebuild("", VID, unsafe=False, go_on=lambda: None) == [5]
    coded.store.ec.mount("", VID, 5)
    assert coded.bench.ask("GET", f"/{fid}").status == 404
    for other in others:
        assert coded.bench.ask("GET", f"/{other}").body == coded.needles[other]


@pytest.mark.parametrize("lane", [True, False])
def test_what_is_here_is_read_without_a_master(tmp_path: Path, lane: bool) -> None:
    with serving(tmp_path / "a", fast_lane=lane) as bench:
        coded = Coded(bench)
        coded.peers.silent = True
        for fid, data in coded.needles.items():
            assert bench.ask("GET", f"/{fid}").body == data
        coded.store.ec.unmount(VID, 0)
        fid = list(coded.needles)[3]
        assert bench.ask("GET", f"/{fid}").status == 500  # who has it is not known


def test_nothing_is_left_of_a_volume_that_is_unmounted(coded: Coded) -> None:
    fid = next(iter(coded.needles))
    assert coded.bench.ask("GET", f"/{fid}").status == 200
    assert coded.store.registry.count() == 2
    for shard in range(14):
        coded.store.ec.unmount(VID, shard)
    assert coded.store.registry.count() == 1
    coded.bench.master.places[VID] = []
    assert coded.bench.ask("GET", f"/{fid}").status == 404


def test_shards_come_and_go_under_reads(coded: Coded) -> None:
    """Whatever is unmounted under a read, it is answered, and never with wrong bytes."""
    stop = threading.Event()
    wrong: list[Any] = []
    count = 0

    def read() -> None:
        nonlocal count
        client = coded.bench.client()
        while not stop.is_set():
            for fid, data in coded.needles.items():
                reply = client.ask("GET", f"/{fid}")
                if reply.status not in (200, 404, 500) or (reply.status == 200 and reply.body != data):
                    wrong.append((fid, reply.status, len(reply.body)))
                count += reply.status == 200
        client.close()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        shards = [(turn + n) % 14 for n in range(1 + turn % 5)]
        for shard in shards:
            coded.store.ec.unmount(VID, shard)
        for shard in shards:
            coded.store.ec.mount("", VID, shard)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert count > 0
    coded.read_all()


def test_a_plain_volume_of_the_same_id_is_preferred(coded: Coded, tmp_path: Path) -> None:
    """Reads go to the plain volume, deletes to the shards: none of that is the lane's."""
    coded.bench.allocate(VID)
    fid = next(iter(coded.needles))
    before = coded.handed_over()
    assert coded.bench.ask("GET", f"/{fid}").status == 404
    assert coded.handed_over() == before + 1
    coded.store.delete_volume(VID)
    assert coded.bench.ask("GET", f"/{fid}").body == coded.needles[fid]
