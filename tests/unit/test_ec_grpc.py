"""RPCs of erasure coding between servers (contract erasure-coding.md 8-11, 15; grpc.md 8, 9), departures E1-E4, S5."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_helpers import wait_for
from grpc_nodes import COOKIE, Peer, Server, content, put, relay

from pyvolume._native.ec import IdSet
from pyvolume.errors import NeedleDeleted, NeedleNotFound, StorageError
from pyvolume.ops import ec as ops_ec
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server import ec_peers
from pyvolume.server.ec_peers import reader_of
from pyvolume.server.master_client import Location
from pyvolume.server.rpc import RpcFailure
from pyvolume.storage.ec import encode as encode_module
from pyvolume.storage.ec.volume import EcVolume
from tools.ports import free_port

Code = grpc.StatusCode
ALL = list(range(14))
VID = 7


class Cluster:
    """Servers that find each other's shards without a master."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.lookups = 0
        self.others: dict[int, list[Location]] = {}
        self.is_down = False
        for server in servers:
            server.context.master.lookup_ec_volume = self.lookup  # type: ignore[method-assign]

    def lookup(self, vid: int, **_: Any) -> dict[int, list[Location]]:
        self.lookups += 1
        if self.is_down:
            raise RpcFailure(Code.UNAVAILABLE, "down")
        found: dict[int, list[Location]] = {shard: [] for shard in range(32)}
        for server in self.servers:
            for volume in server.store.ec.copies(vid):
                for shard in volume.shards:
                    found[shard].append(Location(f"127.0.0.1:{server.config.port}", grpc_port=server.grpc.port))
        for shard, places in self.others.items():
            found[shard] = places
        return found


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "one")
    yield made
    made.end()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "two", disk_types=("", ""))
    yield made
    made.end()


def ok(answer: Any) -> Any:
    assert answer.code is Code.OK, (answer.code, answer.details)
    return answer.messages[0] if answer.messages else None


def failed(answer: Any, text: str, code: grpc.StatusCode = Code.UNKNOWN) -> None:
    assert answer.code is code, answer
    assert text in answer.details


def encode(server: Server, vid: int = VID, count: int = 20, *, keep: bool = False) -> dict[int, bytes]:
    """A volume with needles, erasure coded and mounted; the plain one is gone unless it is to be kept."""
    volume = server.make(vid)
    pick = random.Random(vid)
    needles = {key: pick.randbytes(pick.choice((1, 1000, 200_000, 1_500_000))) for key in range(1, count + 1)}
    for key, data in needles.items():
        put(volume, key, data)
    ok(server.call("VolumeEcShardsGenerate", volume_id=vid))
    ok(server.call("VolumeEcShardsMount", volume_id=vid, shard_ids=ALL))
    if not keep:
        ok(server.call("VolumeDelete", volume_id=vid))
    return needles


def coded(server: Server, vid: int = VID) -> EcVolume:
    found = server.store.ec.find(vid)
    assert found is not None
    return found


def read(server: Server, key: int, vid: int = VID) -> bytes:
    return bytes(reader_of(server.context).read(coded(server, vid), key).data or b"")


def move(source: Server, target: Server, shards: list[int], vid: int = VID) -> None:
    flags = {"copy_ecx_file": True, "copy_ecj_file": True, "copy_vif_file": True, "copy_ecsum_file": True}
    ok(target.call("VolumeEcShardsCopy", volume_id=vid, shard_ids=shards, source_data_node=source.address, **flags))
    ok(target.call("VolumeEcShardsMount", volume_id=vid, shard_ids=shards))
    ok(source.call("VolumeEcShardsUnmount", volume_id=vid, shard_ids=shards))
    ok(source.call("VolumeEcShardsDelete", volume_id=vid, shard_ids=shards))


# -- making and removing ----------------------------------------------------------------------------------------------


def test_generate_says_what_is_wrong(one: Server) -> None:
    failed(one.call("VolumeEcShardsGenerate", volume_id=VID), f"volume {VID} not found")
    one.make(VID, "c")
    answer = one.call("VolumeEcShardsGenerate", volume_id=VID, collection="d")
    failed(answer, "existing collection:c unexpected input: d")


def test_generate_mounts_nothing_and_keeps_the_volume(one: Server) -> None:
    put(one.make(VID), 1, b"data")
    ok(one.call("VolumeEcShardsGenerate", volume_id=VID))
    assert one.store.ec.find(VID) is None
    assert content(one.volume(VID), 1) == b"data"
    names = {f"{VID}.ec{shard:02d}" for shard in ALL} | {
        f"{VID}{x}" for x in (".dat", ".idx", ".vif", ".ecx", ".ecsum")
    }
    assert one.files() == names


def test_mount_and_unmount_are_announced(one: Server) -> None:
    encode(one, keep=True)
    assert one.news.count(("new-ec", VID)) == 14
    ok(one.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[3]))
    assert one.news.count(("new-ec", VID)) == 15
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[3, 3], encode_ts_ns=coded(one).encode_ts_ns))
    assert 3 in coded(one).shards
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[3, 3], encode_ts_ns=coded(one).encode_ts_ns + 1))
    assert 3 not in coded(one).shards
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=ALL))
    assert one.news.count(("deleted-ec", VID)) == 14
    assert one.store.ec.find(VID) is None
    failed(
        one.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[14]), f"mount {VID}.14: MountEcShards {VID}.14 not"
    )
    text = "MountEcShards 8.0: no .ecx index found on any local disk"
    failed(one.call("VolumeEcShardsMount", volume_id=8, shard_ids=[0]), text)


def test_delete_of_the_last_shard_takes_the_index_along(one: Server) -> None:
    encode(one)
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=ALL))
    assert not ok(one.call("VolumeEcShardsDelete", volume_id=VID, shard_ids=ALL[:13])).full_teardown_done
    assert one.files() == {f"{VID}.ec13", f"{VID}.ecx", f"{VID}.ecj", f"{VID}.vif", f"{VID}.ecsum"}
    ok(one.call("VolumeEcShardsDelete", volume_id=VID, shard_ids=[13]))
    assert one.files() == set()
    ok(one.call("VolumeEcShardsDelete", volume_id=VID, shard_ids=[13]))


def test_full_teardown_and_its_fence(one: Server) -> None:
    encode(one)
    stamp = coded(one).encode_ts_ns
    fields: dict[str, Any] = {"volume_id": VID, "full_teardown": True}
    assert ok(one.call("VolumeEcShardsDelete", encode_ts_ns=stamp, **fields)).full_teardown_done
    assert len(coded(one).shards) == 14
    assert ok(one.call("VolumeEcShardsDelete", encode_ts_ns=stamp + 1, **fields)).full_teardown_done
    assert one.files() == set()
    encode(one, 8, keep=True)
    assert ok(one.call("VolumeEcShardsDelete", volume_id=8, full_teardown=True)).full_teardown_done
    assert one.files() == {"8.dat", "8.idx", "8.vif"}


@pytest.mark.parametrize("collection", ["../x", "a/b", "..", "a\\b"])
@pytest.mark.parametrize(
    "name",
    [
        "VolumeEcShardsRebuild",
        "VolumeEcShardsCopy",
        "VolumeEcShardsDelete",
        "VolumeEcShardsMount",
        "VolumeEcShardsToVolume",
    ],
)
def test_names_stay_in_the_directory(one: Server, name: str, collection: str) -> None:
    failed(one.call(name, volume_id=VID, collection=collection), "collection must not", Code.INVALID_ARGUMENT)


# -- copying and rebuilding -------------------------------------------------------------------------------------------


def test_copy_says_what_is_wrong(one: Server, two: Server) -> None:
    encode(one)
    failed(two.call("VolumeEcShardsCopy", volume_id=VID, disk_id=2), "invalid disk_id 2: only have 2 disks")
    ok(two.call("VolumeEcShardsCopy", volume_id=VID, source_data_node="nowhere"))
    fields: dict[str, Any] = {"volume_id": VID, "shard_ids": [1]}
    failed(two.call("VolumeEcShardsCopy", source_data_node="h:x", **fields), "source_data_node", Code.INVALID_ARGUMENT)
    answer = two.call("VolumeEcShardsCopy", volume_id=8, shard_ids=[1], source_data_node=one.address)
    failed(answer, "VolumeEcShardsCopy volume 8: failed to copy ")
    assert "CopyFile not found ec volume id 8" in answer.details
    assert two.files() == set()


def test_copied_journals_are_joined(one: Server, two: Server, tmp_path: Path) -> None:
    encode(one)
    coded(one).journal(1)
    move(one, two, [0, 1])
    third = Server(tmp_path / "three")
    try:
        move(one, third, [2])
        coded(third).journal(3)
        coded(two).journal(2)
        for source in (one, third):
            ok(two.call("VolumeEcShardsCopy", volume_id=VID, copy_ecj_file=True, source_data_node=source.address))
        assert set(coded(two).deleted) == {1, 2, 3}
        ok(two.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=ALL))
        coded(one).journal(4)
        ok(two.call("VolumeEcShardsCopy", volume_id=VID, copy_ecj_file=True, source_data_node=one.address))
        ok(two.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[0]))
        assert set(coded(two).deleted) == {1, 2, 3, 4}
    finally:
        third.end()


def test_rebuild_of_mounted_shards_serves_the_new_ones(one: Server) -> None:
    encode(one)
    base = Path(one.directories[0])
    good = (base / f"{VID}.ec05").read_bytes()
    damaged = bytearray(good)
    damaged[100] ^= 1
    with (base / f"{VID}.ec05").open("r+b") as file:
        file.write(damaged)
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0]))
    (base / f"{VID}.ec00").unlink()
    assert list(ok(one.call("VolumeEcShardsRebuild", volume_id=VID)).rebuilt_shard_ids) == [0, 5]
    assert coded(one).shards[5].read(0, 1 << 20) == good[: 1 << 20]
    assert list(ok(one.call("VolumeEcShardsRebuild", volume_id=9)).rebuilt_shard_ids) == []


def test_recover_missing_index_asks_a_peer(one: Server, two: Server) -> None:
    needles = encode(one)
    cluster = Cluster(one, two)
    coded(one).journal(3)
    move(one, two, [4, 5])
    ok(two.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[4, 5]))
    for extension in (".ecx", ".ecj", ".vif", ".ecsum"):
        for place in two.directories:
            (place / f"{VID}{extension}").unlink(missing_ok=True)
    ok(two.call("VolumeEcShardsMount", recover_missing_index=True))
    assert sorted(coded(two).shards) == [4, 5]
    assert set(coded(two).deleted) == {3}
    assert read(two, 1) == needles[1]
    assert cluster.lookups >= 1


# -- reading ----------------------------------------------------------------------------------------------------------


def test_shard_read(one: Server) -> None:
    encode(one)
    shard, stamp = coded(one).shards[2], coded(one).encode_ts_ns
    fields: dict[str, Any] = {"volume_id": VID, "shard_id": 2}
    answer = one.call("VolumeEcShardRead", size=5 << 20, **fields)
    assert answer.code is Code.OK
    assert b"".join(message.data for message in answer.messages) == shard.read(0, shard.size)
    assert all(message.encode_ts_ns == stamp for message in answer.messages)
    assert one.call("VolumeEcShardRead", offset=shard.size, size=10, **fields).messages == []
    assert one.call("VolumeEcShardRead", size=0, **fields).messages == []
    failed(one.call("VolumeEcShardRead", volume_id=VID, shard_id=14, size=1), f"not found ec shard {VID}.14")
    answer = one.call("VolumeEcShardRead", encode_ts_ns=stamp + 1, size=1, **fields)
    failed(answer, f"ec shard {VID}.2 belongs to a different encode run")
    coded(one).journal(3)
    (message,) = one.call("VolumeEcShardRead", size=10, file_key=3, **fields).messages
    assert (message.is_deleted, message.data) == (True, b"")
    assert one.call("VolumeEcShardRead", size=10, file_key=999, **fields).messages[0].data


def test_needles_from_shards_here_there_and_lost(one: Server, two: Server) -> None:
    needles = encode(one)
    cluster = Cluster(one, two)
    move(one, two, [0, 3, 5, 7, 11])
    cluster.lookups = 0
    for server in (one, two):
        for key, data in needles.items():
            assert read(server, key) == data
    assert cluster.lookups == 2
    for server, lost in ((one, [1, 2]), (two, [0, 3])):
        ok(server.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=lost))
    for server in (one, two):
        for key, data in needles.items():
            assert read(server, key) == data
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[4]))
    with pytest.raises(StorageError, match=rf"cannot recover shard {VID}\.\d: only 9 shards available"):
        for key in needles:
            read(two, key)


def test_a_shard_that_has_moved_is_found_again(one: Server, two: Server, tmp_path: Path) -> None:
    """For minutes it was made of the others for each read, and a scrub called it unreadable."""
    needles = encode(one)
    cluster = Cluster(one, two)
    move(one, two, [0, 3])
    key = next(key for key in needles if first_shard(one, key) == 0)
    assert read(one, key) == needles[key]
    third = Server(tmp_path / "three")
    try:
        cluster.servers = (one, two, third)
        Cluster(one, two, third)
        move(two, third, [0])
        scrub = ok(one.call("ScrubEcVolume", volume_ids=[VID], mode=pb.VolumeScrubMode.FULL))
        assert (list(scrub.details), list(scrub.broken_volume_ids)) == ([], [])
        move(third, two, [0])
        coded(one).locations_at_s -= ops_ec.FRESH_FEW_S
        coded(one).update_locations(lambda cache: cache.pop(9, None))
        assert read(one, key) == needles[key]
        assert coded(one).shard_locations[0] == (f"127.0.0.1:{two.config.port}.{two.grpc.port}",)
    finally:
        third.end()


def test_reads_need_the_master_only_when_nothing_is_known(one: Server) -> None:
    needles = encode(one)
    cluster = Cluster(one)
    cluster.is_down = True
    assert read(one, 1) == needles[1]  # its shards are here
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0, 1, 2, 3]))
    with pytest.raises(StorageError, match=f"failed to locate shard via master grpc .*lookup ec volume {VID}: "):
        for key in needles:
            read(one, key)
    cluster.is_down = False
    assert read(one, 1) == needles[1]
    cluster.is_down = True
    assert read(one, 2) == needles[2]


def test_a_peer_that_says_nothing_costs_one_time_out(one: Server, two: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_ec, "READ_TIMEOUT_S", 0.5)
    needles = encode(one)
    cluster = Cluster(one, two)
    move(one, two, [0, 1, 2, 3])
    ok(two.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0, 1, 2, 3]))
    released = threading.Event()

    def hang(_request: Any, _context: Any) -> Iterator[Any]:
        released.wait(20)
        yield from ()

    peer = Peer(VolumeEcShardRead=hang)
    try:
        cluster.others = {shard: [Location("127.0.0.1:1", grpc_port=peer.port)] for shard in range(4)}
        started = time.monotonic()
        for key, data in needles.items():
            assert read(one, key) == data
        assert time.monotonic() - started < 5
        assert len(peer.seen) == 1
    finally:
        released.set()
        peer.stop()


def test_a_peer_that_stays_silent_holds_up_one_read_at_a_time(one: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever its time was over all reads waited for it again."""
    monkeypatch.setattr(ops_ec, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ops_ec, "PENALTY_S", 0.5)
    needles = encode(one)
    cluster = Cluster(one)
    released = threading.Event()
    peer = Peer(VolumeEcShardRead=lambda _request, _context: iter([released.wait(20)][:0]))
    try:
        ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0]))
        cluster.others = {0: [Location("127.0.0.1:1", grpc_port=peer.port)]}
        key = key_in(one, 0)
        reader = reader_of(one.context)
        assert read(one, key) == needles[key]
        (address,) = reader._down
        pauses = [reader._down[address].penalty_s]
        for tried in (2, 3):
            until_s = reader._down[address].until_s
            wait_for(lambda until_s=until_s: time.monotonic() > until_s)
            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(lambda _: read(one, key), range(8))) == {needles[key]}
            assert len(peer.seen) == tried
            pauses.append(reader._down[address].penalty_s)
        assert pauses == [0.5, 1.0, 2.0]
        released.set()
        wait_for(lambda: time.monotonic() > reader._down[address].until_s)
        assert read(one, key) == needles[key]
        assert not reader._down, "it has answered"
    finally:
        released.set()
        peer.stop()


def test_a_peer_with_other_bytes_is_not_believed(one: Server, two: Server) -> None:
    needles = encode(one)
    cluster = Cluster(one)
    shard = coded(one).layout.locate(coded(one).lookup(1)[0], 1)[0].shard
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[shard]))
    stamp = coded(one).encode_ts_ns

    def short(request: Any, _context: Any) -> Iterator[Any]:
        yield pb.VolumeEcShardReadResponse(data=bytes(request.size - 1), encode_ts_ns=stamp)

    def other_run(request: Any, _context: Any) -> Iterator[Any]:
        yield pb.VolumeEcShardReadResponse(data=bytes(request.size), encode_ts_ns=stamp + 1)

    for behaviour in (short, other_run):
        peer = Peer(VolumeEcShardRead=behaviour)
        try:
            cluster.others = {shard: [Location("127.0.0.1:1", grpc_port=peer.port)]}
            coded(one).locations_at_s = float("-inf")
            assert read(one, 1) == needles[1]
            assert peer.seen
        finally:
            peer.stop()


def test_needle_status(one: Server) -> None:
    needles = encode(one)
    Cluster(one)
    answer = ok(one.call("VolumeNeedleStatus", volume_id=VID, needle_id=4))
    assert (answer.needle_id, answer.cookie) == (4, COOKIE)
    assert answer.size > len(needles[4])
    text = "locate in local ec volume: FindNeedleFromEcx: needle not found"
    failed(one.call("VolumeNeedleStatus", volume_id=VID, needle_id=400), text)


# -- deleting ---------------------------------------------------------------------------------------------------------


def test_a_delete_is_noted_by_one_holder_and_seen_by_all(one: Server, two: Server) -> None:
    needles = encode(one)
    Cluster(one, two)
    move(one, two, [0, 1, 2, 3, 4])
    reader = reader_of(two.context)
    for key in needles:
        volume = coded(two)
        size = reader.delete(volume, key, COOKIE)
        length = volume.record_bytes(volume.lookup(key)[1] if volume.lookup(key)[1] >= 0 else 0)
        assert size >= length
        assert (key in coded(one).deleted) != (key in coded(two).deleted)
    for server in (one, two):
        for key in needles:
            holder_knows = key in coded(server).deleted
            if holder_knows:
                with pytest.raises(NeedleDeleted):
                    read(server, key)


def test_delete_checks(one: Server) -> None:
    encode(one)
    Cluster(one)
    reader = reader_of(one.context)
    with pytest.raises(ops_ec.UnexpectedCookie, match="unexpected cookie 1"):
        reader.delete(coded(one), 1, 1)
    with pytest.raises(NeedleNotFound):
        reader.delete(coded(one), 1000, COOKIE)
    size = coded(one).lookup(1)[1]
    once = coded(one).record_bytes(size)
    assert reader.delete(coded(one), 1, 0) == coded(one).record_bytes(once)
    with pytest.raises(NeedleDeleted, match="already deleted"):
        reader.delete(coded(one), 1, COOKIE)


def test_batch_delete(one: Server) -> None:
    encode(one)
    Cluster(one)
    fids = [f"{VID},{key:x}{cookie:08x}" for key, cookie in ((1, COOKIE), (2, 5), (1, COOKIE), (900, COOKIE))]
    results = ok(one.call("BatchDelete", file_ids=fids)).results
    assert [result.status for result in results] == [202, 400, 404, 404]
    assert results[1].error == "File Random Cookie does not match."
    assert results[2].error == "already deleted"
    assert results[3].error == "locate in local ec volume: FindNeedleFromEcx: needle not found"
    results = ok(one.call("BatchDelete", file_ids=[fids[0], fids[1]], skip_cookie_check=True)).results
    assert [(result.status, result.error) for result in results] == [(500, "already deleted"), (202, "")]
    assert set(coded(one).deleted) == {1, 2}


def test_blob_delete(one: Server) -> None:
    encode(one)
    ok(one.call("VolumeEcBlobDelete", volume_id=8, file_key=1))
    failed(one.call("VolumeEcBlobDelete", volume_id=VID, file_key=99), "FindNeedleFromEcx: needle not found")
    for _ in range(2):
        ok(one.call("VolumeEcBlobDelete", volume_id=VID, file_key=3))
    assert (one.directories[0] / f"{VID}.ecj").read_bytes() == (3).to_bytes(8, "big")


# -- deletes while shards move ----------------------------------------------------------------------------------------


def first_shard(server: Server, key: int) -> int:
    volume = coded(server)
    return volume.layout.locate(volume.lookup(key)[0], 1)[0].shard


def key_in(server: Server, shard: int) -> int:
    return next(key for key in range(1, 21) if first_shard(server, key) == shard)


def noted(server: Server, key: int, **fields: Any) -> None:
    ok(server.call("VolumeEcBlobDelete", volume_id=VID, file_key=key, **fields))


def copy_shards(source: Server, target: Server, shards: list[int]) -> None:
    flags = {"copy_ecx_file": True, "copy_ecj_file": True, "copy_vif_file": True}
    ok(target.call("VolumeEcShardsCopy", volume_id=VID, shard_ids=shards, source_data_node=source.address, **flags))


def test_a_delete_sent_to_who_had_the_shard_reaches_who_has_it(one: Server, two: Server) -> None:
    encode(one)
    Cluster(one, two)
    key = key_in(one, 0)
    move(one, two, [0])
    noted(one, key)
    assert (key in coded(one).deleted, key in coded(two).deleted) == (False, True)
    for server in (one, two):
        with pytest.raises(NeedleDeleted):
            read(server, key)


def test_a_delete_that_no_holder_can_be_told_is_refused(one: Server, two: Server) -> None:
    encode(one)
    cluster = Cluster(one, two)
    key = key_in(one, 0)
    move(one, two, [0])
    cluster.others = {0: [Location("127.0.0.1:1", grpc_port=free_port())]}
    failed(one.call("VolumeEcBlobDelete", volume_id=VID, file_key=key), f"failed to delete from ec shard {VID}")
    assert key not in coded(one).deleted


@pytest.mark.parametrize("step", ["before the mount", "before the unmount"])
def test_a_delete_after_the_copy_reaches_the_new_holder(one: Server, two: Server, step: str) -> None:
    encode(one)
    Cluster(one, two)
    key = key_in(one, 0)
    copy_shards(one, two, [0])
    if step == "before the mount":
        noted(one, key)
    ok(two.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[0]))
    if step == "before the unmount":
        noted(one, key)
        assert key in coded(one).deleted and key not in coded(two).deleted
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0]))
    assert key in coded(two).deleted
    with pytest.raises(NeedleDeleted):
        read(two, key)


def test_a_delete_while_nobody_had_the_shard_reaches_who_mounts_it(one: Server, two: Server) -> None:
    encode(one)
    Cluster(one, two)
    key = key_in(one, 2)
    move(one, two, [5, 6, 7])
    copy_shards(one, two, [2])
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[2]))
    reader_of(two.context).delete(coded(two), key, COOKIE)
    assert (key in coded(one).deleted, key in coded(two).deleted) == (True, False), "noted by who has shard 0"
    with pytest.raises(NeedleDeleted):
        read(two, key)
    ok(two.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[2]))
    assert key in coded(two).deleted
    assert set(coded(two).deleted) == {key}, "only those of the shard"


def test_a_needle_of_a_lost_shard_is_not_read_past_who_knows_that_it_is_deleted(one: Server, two: Server) -> None:
    """With enough shards here nobody else was asked."""
    encode(one)
    Cluster(one, two)
    key = key_in(one, 2)
    move(one, two, [0])
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[2]))
    reader_of(one.context).delete(coded(one), key, COOKIE)
    assert (key in coded(one).deleted, key in coded(two).deleted) == (False, True), "noted by who has shard 0"
    with pytest.raises(NeedleDeleted):
        read(one, key)


def test_a_journal_that_is_copied_has_what_was_folded_into_the_index(one: Server, two: Server) -> None:
    """A rebuild folded deletes into its index; a decode elsewhere, which collects the journals, brought them back."""
    encode(one)
    Cluster(one, two)
    move(one, two, [4])
    key = key_in(one, 0)
    noted(one, key)
    ok(one.call("VolumeEcShardsRebuild", volume_id=VID))
    assert (one.directories[0] / f"{VID}.ecj").read_bytes() == b""
    ok(two.call("VolumeEcShardsCopy", volume_id=VID, copy_ecj_file=True, source_data_node=one.address))
    assert set(coded(two).deleted) == {key}


def on_two_disks(one: Server, two: Server) -> tuple[EcVolume, EcVolume]:
    """All shards on the two disks of the second server."""
    name = f"{VID}.ec"
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=ALL))
    for path in one.directories[0].glob(f"{VID}.*"):
        is_late = path.name.startswith(name) and path.name[len(name) :].isdigit() and int(path.name[len(name) :]) > 6
        for place in (
            two.directories[1:] if is_late else two.directories[:1] if path.suffix[3:].isdigit() else two.directories
        ):
            shutil.copy(path, place)
    ok(two.call("VolumeEcShardsMount", volume_id=VID, shard_ids=ALL))
    first, second = two.store.ec.copies(VID)
    return first, second


def test_a_delete_in_the_journal_of_another_disk_counts(one: Server, two: Server) -> None:
    encode(one)
    _, second = on_two_disks(one, two)
    Cluster(two)
    second.journal(3)
    with pytest.raises(NeedleDeleted):
        read(two, 3)


def test_deletes_in_the_index_of_another_disk_stay_through_a_decode(one: Server, two: Server) -> None:
    """Folded into one disk's index by a rebuild, they were not looked for there after a restart."""
    needles = encode(one)
    first, second = on_two_disks(one, two)
    first.journal(3)
    first.fold()
    first.deleted = IdSet()  # as after a restart
    assert second.lookup(3)[1] > 0
    ok(two.call("VolumeEcShardsToVolume", volume_id=VID))
    ok(two.call("VolumeMount", volume_id=VID))
    with pytest.raises(NeedleNotFound):
        content(two.volume(VID), 3)
    assert content(two.volume(VID), 4) == needles[4]


def test_a_delete_during_a_decode_stays(one: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    needles = encode(one)
    write = encode_module._write_dat

    def slow(*args: Any) -> None:
        coded(one).journal(5)
        write(*args)

    monkeypatch.setattr(encode_module, "_write_dat", slow)
    ok(one.call("VolumeEcShardsToVolume", volume_id=VID))
    ok(one.call("VolumeMount", volume_id=VID))
    with pytest.raises(NeedleNotFound):
        content(one.volume(VID), 5)
    assert content(one.volume(VID), 4) == needles[4]


def test_a_delete_between_a_decode_and_the_unmount_reaches_the_volume(one: Server, two: Server) -> None:
    needles = encode(one)
    Cluster(one, two)
    key, rewritten, there = key_in(one, 0), key_in(one, 2), key_in(one, 3)
    copy_shards(one, two, [3])
    ok(two.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[3]))
    ok(one.call("VolumeEcShardsToVolume", volume_id=VID))
    ok(one.call("VolumeMount", volume_id=VID))
    noted(one, key)
    noted(one, rewritten)
    put(one.volume(VID), rewritten, b"written again")
    coded(two).note_sent(3)
    noted(two, there)
    assert content(one.volume(VID), key) == needles[key], "quirk: deletes go to the shards"
    two.context.master.set_current("127.0.0.1:1")
    two.context.master.lookup_volume = lambda vid, **_: [  # type: ignore[method-assign]
        Location(f"127.0.0.1:{one.config.port}", grpc_port=one.grpc.port)
    ]
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=ALL))
    ok(two.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[3]))
    for gone in (key, there):
        with pytest.raises(NeedleNotFound):
            content(one.volume(VID), gone)
    assert content(one.volume(VID), rewritten) == b"written again"


def test_a_delete_sent_to_who_has_nothing_left_goes_to_who_has_shards(one: Server, two: Server) -> None:
    encode(one)
    Cluster(one, two)
    key = key_in(one, 0)
    move(one, two, ALL)
    assert one.store.ec.find(VID) is None
    one.context.master.set_current("127.0.0.1:1")
    noted(one, key)
    assert key in coded(two).deleted


def test_a_holder_that_is_down_costs_one_time_out(one: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each delete waited for the time-out anew."""
    needles = encode(one)
    cluster = Cluster(one)
    held = threading.Event()
    hang = Peer(
        VolumeEcBlobDelete=lambda _request, _context: held.wait(20) and pb.VolumeEcBlobDeleteResponse(),
        VolumeEcShardRead=lambda _request, _context: iter([held.wait(20)][:0]),
    )
    monkeypatch.setattr(ops_ec, "DELETE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ops_ec, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ops_ec, "PENALTY_S", 600.0)
    try:
        keys = [key for key in needles if first_shard(one, key) == 0]
        ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[0]))
        cluster.others = {0: [Location("127.0.0.1:1", grpc_port=hang.port)]}
        for key in keys:
            assert read(one, key) == needles[key]
            with pytest.raises(StorageError, match="failed to delete from ec shard"):
                reader_of(one.context).delete(coded(one), key, COOKIE)
            assert read(one, key) == needles[key], "it was not acknowledged"
        assert len(hang.seen) == 1
    finally:
        held.set()
        hang.stop()


# -- back to a volume, facts, scrub -----------------------------------------------------------------------------------


def test_to_volume(one: Server) -> None:
    needles = encode(one)
    failed(one.call("VolumeEcShardsToVolume", volume_id=8), "ec volume 8 not found")
    coded(one).journal(2)
    ok(one.call("VolumeEcShardsUnmount", volume_id=VID, shard_ids=[6]))
    failed(one.call("VolumeEcShardsToVolume", volume_id=VID), f"ec volume {VID} missing shard 6")
    ok(one.call("VolumeEcShardsMount", volume_id=VID, shard_ids=[6]))
    ok(one.call("VolumeEcShardsToVolume", volume_id=VID))
    ok(one.call("VolumeMount", volume_id=VID))
    for key, data in needles.items():
        if key != 2:
            assert content(one.volume(VID), key) == data
    for key in needles:
        coded(one).journal(key)
    answer = one.call("VolumeEcShardsToVolume", volume_id=VID)
    failed(answer, f"ec volume {VID} has no live entries", Code.FAILED_PRECONDITION)


def test_staged_volume_is_adopted(one: Server, two: Server) -> None:
    put(one.make(VID), 1, b"staged")
    ok(one.call("VolumeUnmount", volume_id=VID))
    fields: dict[str, Any] = {"volume_id": VID, "from_staged": True}
    failed(two.call("VolumeEcShardsToVolume", **fields), f"staged volume {VID}: no .dat.copying found on a  disk")
    for extension in (".dat", ".vif"):
        shutil.copy(one.directories[0] / f"{VID}{extension}", two.directories[1] / f"{VID}{extension}.copying")
    failed(two.call("VolumeEcShardsToVolume", **fields), f"staged volume {VID} missing .idx.copying")
    shutil.copy(one.directories[0] / f"{VID}.idx", two.directories[1] / f"{VID}.idx.copying")
    ok(two.call("VolumeEcShardsToVolume", **fields))
    assert content(two.volume(VID), 1) == b"staged"
    assert two.files() == {f"{VID}.dat", f"{VID}.idx", f"{VID}.vif"}
    failed(two.call("VolumeEcShardsToVolume", **fields), f"staged volume {VID} already exists on this server")


def test_shards_info(one: Server) -> None:
    encode(one)
    coded(one).journal(2)
    answer = ok(one.call("VolumeEcShardsInfo", volume_id=VID))
    assert [info.shard_id for info in answer.ec_shard_infos] == ALL
    assert (answer.file_count, answer.file_deleted_count) == (20, 0)
    assert answer.volume_size == sum(size for _, _, size in coded(one).walk())
    failed(one.call("VolumeEcShardsInfo", volume_id=8), "VolumeEcShardsInfo: EC volume 8 not found")


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_scrub_of_what_is_whole(one: Server, mode: int) -> None:
    encode(one)
    Cluster(one)
    answer = ok(one.call("ScrubEcVolume", mode=mode))
    assert (answer.total_volumes, answer.total_files) == (1, 0 if mode == 4 else 20)
    assert list(answer.details) == []


def test_scrub_does_not_take_deletes_of_others_for_damage(one: Server, two: Server) -> None:
    needles = encode(one)
    Cluster(one, two)
    move(one, two, [0, 1, 2, 3, 4, 5])
    for key in needles:
        coded(two).journal(key)
    answer = ok(one.call("ScrubEcVolume", mode=2))
    assert (answer.total_files, list(answer.details)) == (20, [])


def test_scrub_finds_damage(one: Server) -> None:
    encode(one)
    Cluster(one)
    volume = coded(one)
    part = volume.layout.locate(volume.lookup(3)[0], 60)[0]
    path = one.directories[0] / f"{VID}.ec{part.shard:02d}"
    with path.open("r+b") as file:
        file.seek(part.offset + 25)
        byte = file.read(1)[0]
        file.seek(part.offset + 25)
        file.write(bytes([byte ^ 1]))
    answer = ok(one.call("ScrubEcVolume", mode=4, volume_ids=[VID]))
    assert list(answer.details) == [f"ec volume {VID} shard {part.shard}: checksum mismatch at block 0 (offset 0)"]
    assert [info.shard_id for info in answer.broken_shard_infos] == [part.shard]
    for mode in (2, 3):
        answer = ok(one.call("ScrubEcVolume", mode=mode, volume_ids=[VID]))
        assert list(answer.broken_volume_ids) == [VID]
        assert "needle 3 on " in answer.details[0]
    failed(one.call("ScrubEcVolume", mode=1, volume_ids=[8]), "EC volume id 8 not found")
    failed(one.call("ScrubEcVolume", mode=7), "unsupported EC volume scrub mode 7")
    answer = one.call("ScrubEcVolume", mode=1, force_deleted_needles_check=True)
    failed(answer, "deleted needle checks are only supported for FULL scrubs")


def test_stale_checksums_are_not_taken_for_damage(one: Server) -> None:
    encode(one)
    volume = coded(one)
    assert volume.sums is not None
    volume.sums.shards[4].crcs[0] ^= 1
    answer = ok(one.call("ScrubEcVolume", mode=4))
    assert list(answer.broken_shard_infos) == []
    assert "stale sidecar, not flagging shard" in answer.details[1]
    for entry in volume.sums.shards[:5]:
        entry.crcs[0] ^= 2
    answer = ok(one.call("ScrubEcVolume", mode=4))
    assert list(answer.details) == [
        f"ec volume {VID}: 5/14 local shards mismatch (> parity 4): suspect stale sidecar, "
        "not flagging shard corruption"
    ]


def test_relayed_reads_pass_a_peer(one: Server) -> None:
    needles = encode(one)
    cluster = Cluster(one)
    peer = Peer(VolumeEcShardRead=relay(one, "VolumeEcShardRead"))
    try:
        cluster.others = {shard: [Location("127.0.0.1:1", grpc_port=peer.port)] for shard in ALL}
        for key, data in needles.items():
            assert read(one, key) == data
        assert peer.seen == []  # all shards are here
    finally:
        peer.stop()


def test_volumes_that_no_master_knows_are_tried_again_and_they_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec_peers, "_LOOK_S", 0.001)
    monkeypatch.setattr(ec_peers, "_RETRY_S", 0.001)
    stop, asked = threading.Event(), list[tuple[int, set[int]]]()

    class Reader:
        def catch_up(self, vid: int, shards: set[int]) -> bool:
            asked.append((vid, shards))
            if len(asked) == 5:
                stop.set()
            return vid != 2

    def volume(vid: int, *shards: int) -> SimpleNamespace:
        return SimpleNamespace(vid=vid, shards=dict.fromkeys(shards))

    volumes = [volume(1, 0), volume(2, 3), volume(1, 4)]  # the first on two disks
    server = SimpleNamespace(
        store=SimpleNamespace(ec=SimpleNamespace(volumes=lambda: volumes)), master=SimpleNamespace(contacts=1)
    )
    monkeypatch.setattr(ec_peers, "reader_of", lambda _server: Reader())
    ec_peers.keep_journals(cast("Any", server), stop)
    assert asked == [(1, {0, 4}), (2, {3}), (2, {3}), (2, {3}), (2, {3})]
