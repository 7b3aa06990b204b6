"""Erasure coded volumes in a cluster of Go and our volume servers, driven by upstream's shell, with deletes throughout.

Needs the binary of upstream: WEED_BIN=/path/to/weed. Without it these tests are skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_replicas import WEED, Cluster, Server, request, wait_for

from pyvolume.pb import master_pb2
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.rpc import MASTER_SERVICE, VOLUME_SERVICE, Channels

COLLECTION = "coded"
OBJECTS = 250
SHARDS = 14
SEED = int(os.environ.get("PYVOLUME_EC_SEED", "1"))

pytestmark = [
    pytest.mark.skipif(not WEED, reason="set WEED_BIN to the binary of SeaweedFS 4.44 to run these"),
    pytest.mark.timeout(400),
]


class Coded:
    """One volume of a collection, and what must be found in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.channels = Channels()
        self.random = random.Random(SEED)
        self.live: dict[str, bytes] = {}
        self.dead: list[str] = []
        self.acknowledged = 0
        self.fill()

    def fill(self) -> None:
        """All objects go to one volume, the one that the master names first."""

        def assigned() -> str:
            _, body = request(self.cluster.master_port, "GET", f"/dir/assign?collection={COLLECTION}&count={OBJECTS}")
            return str(json.loads(body).get("fid", ""))

        fid = wait_for(assigned, "an assignment")
        self.vid = fid.partition(",")[0]
        for number in range(OBJECTS):
            each = f"{fid}_{number}" if number else fid
            size = self.random.choice((1, 100, 5000, 70_000, 300_000))
            self.live[each] = self.random.randbytes(size)
            assert request(self.holder(), "PUT", f"/{each}", self.live[each])[0] == 201

    def holder(self) -> int:
        _, body = request(self.cluster.master_port, "GET", f"/dir/lookup?volumeId={self.vid}")
        return int(json.loads(body)["locations"][0]["url"].rpartition(":")[2])

    # -- shards

    def shards(self) -> dict[str, list[int]]:
        """Mounted shards by server; those of a server without the volume are none."""
        held = {}
        for server in self.cluster.servers:
            names = (self.cluster.base / server.name).glob(f"{COLLECTION}_{self.vid}.ec[0-9][0-9]")
            held[server.name] = sorted(int(path.suffix[3:]) for path in names)
        return held

    def lose(self, numbers: list[int]) -> None:
        """Takes shards away: unmounted and deleted where they are."""
        for server in self.cluster.servers:
            here = [n for n in self.shards()[server.name] if n in numbers]
            if here:
                self.lose_at(server, here)

    def lose_at(self, server: Server, numbers: list[int]) -> None:
        address, vid = f"{server.url}.{server.grpc}", int(self.vid)
        unmount = pb.VolumeEcShardsUnmountRequest(volume_id=vid, shard_ids=numbers)
        self.channels.unary(address, VOLUME_SERVICE, "VolumeEcShardsUnmount", unmount, timeout_s=20)
        delete = pb.VolumeEcShardsDeleteRequest(volume_id=vid, collection=COLLECTION, shard_ids=numbers)
        self.channels.unary(address, VOLUME_SERVICE, "VolumeEcShardsDelete", delete, timeout_s=20)

    def crowd(self) -> None:
        """Moves all shards to the first server, so that there is something to balance."""
        target, *others = self.cluster.servers
        held, vid = self.shards(), int(self.vid)
        for server in others:
            ask = pb.VolumeEcShardsCopyRequest(
                volume_id=vid,
                collection=COLLECTION,
                shard_ids=held[server.name],
                copy_ecj_file=True,
                source_data_node=f"{server.url}.{server.grpc}",
            )
            self.channels.unary(f"{target.url}.{target.grpc}", VOLUME_SERVICE, "VolumeEcShardsCopy", ask, timeout_s=60)
        mount = pb.VolumeEcShardsMountRequest(volume_id=vid, collection=COLLECTION, shard_ids=list(range(SHARDS)))
        self.channels.unary(f"{target.url}.{target.grpc}", VOLUME_SERVICE, "VolumeEcShardsMount", mount, timeout_s=60)
        for server in others:
            self.lose_at(server, held[server.name])

    def move(self, source: Server, target: Server, numbers: list[int]) -> None:
        vid, address = int(self.vid), f"{target.url}.{target.grpc}"
        ask = pb.VolumeEcShardsCopyRequest(
            volume_id=vid,
            collection=COLLECTION,
            shard_ids=numbers,
            copy_ecx_file=True,
            copy_ecj_file=True,
            copy_vif_file=True,
            source_data_node=f"{source.url}.{source.grpc}",
        )
        self.channels.unary(address, VOLUME_SERVICE, "VolumeEcShardsCopy", ask, timeout_s=60)
        mount = pb.VolumeEcShardsMountRequest(volume_id=vid, collection=COLLECTION, shard_ids=numbers)
        self.channels.unary(address, VOLUME_SERVICE, "VolumeEcShardsMount", mount, timeout_s=60)
        self.lose_at(source, numbers)

    def some_to_lose(self) -> list[int]:
        """Four shards, not all that a server has: the journal of deletes goes with the last."""
        while True:
            chosen = sorted(self.random.sample(range(SHARDS), 4))
            if all(set(held) - set(chosen) for held in self.shards().values() if held):
                return chosen

    # -- objects

    def delete_some(self, count: int = 3, kinds: tuple[str, ...] = ("go", "own")) -> None:
        """Deletes objects, each by way of another server that has shards, or of the one that has the volume."""
        held = self.shards()
        ports = [server.port for server in self.cluster.servers if held[server.name] and server.kind in kinds]
        ports = ports or [self.holder()]
        for number in range(count):
            fid = self.random.choice(sorted(self.live))
            status, body = request(ports[number % len(ports)], "DELETE", f"/{fid}")
            assert status == 202, (fid, body)
            del self.live[fid]
            self.dead.append(fid)

    @contextlib.contextmanager
    def deletes_meanwhile(self) -> Iterator[None]:
        """Objects are deleted, one after the other, as long as this lasts."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(0.02) and len(self.live) > 20:
                fid = self.random.choice(sorted(self.live))
                held = self.shards()
                ports = [each.port for each in self.cluster.servers if held[each.name]]
                port = self.random.choice(ports) if ports else self.holder()
                del self.live[fid]  # refused by who has just given its shards away, it may be there or not
                try:
                    status, _ = request(port, "DELETE", f"/{fid}")
                except (OSError, http.client.HTTPException):
                    status = 0
                if status == 202:
                    self.dead.append(fid)
                    self.acknowledged += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def restart_go(self) -> None:
        """Upstream remembers for minutes where shards were that are lost, and answers 500."""
        for server in self.cluster.servers:
            if server.kind == "go":
                server.kill()
                server.start()
        wait_for(lambda: self.mounted() == list(range(SHARDS)), "all shards are announced")

    def mounted(self) -> list[int]:
        """Shards that the master knows of."""
        request_ = master_pb2.LookupEcVolumeRequest(volume_id=int(self.vid))
        answer = self.channels.unary(self.cluster.master, MASTER_SERVICE, "LookupEcVolume", request_, timeout_s=20)
        return sorted(each.shard_id for each in answer.shard_id_locations if each.locations)

    def verify(self, when: str, kind: str = "own") -> None:
        """Every object by way of every server of a kind: it has its content, or is gone."""
        for server in [each for each in self.cluster.servers if each.kind == kind]:
            self.verify_at(server, when)

    def verify_at(self, server: Server, when: str) -> None:
        for fid, data in self.live.items():
            got = wait_for(lambda s=server, f=fid: found(s.port, f), f"{when}: {fid} by {server.name}", 60)
            assert got == (200, data), (when, server.name, fid, got[0], len(data))
        for fid in self.dead:
            got = wait_for(lambda s=server, f=fid: found(s.port, f), f"{when}: {fid} by {server.name}", 60)
            assert got[0] == 404, (when, server.name, fid, got[0], len(got[1]))

    def shell(self, *commands: str) -> str:
        return self.cluster.shell(*commands)


def found(port: int, fid: str) -> tuple[int, bytes] | None:
    """An answer; None while the server has yet to learn where the shards are."""
    status, body = request(port, "GET", f"/{fid}")
    if status in (301, 302):
        return None
    return None if status >= 500 else (status, body)


@pytest.fixture
def coded(tmp_path: Path) -> Iterator[Coded]:
    # Upstream's servers lose deletes when journals are copied to them, so ours are the ones to rebuild.
    cluster = Cluster(tmp_path, ("go", "go", "own", "own"), {"own": 60})
    made = Coded(cluster)
    try:
        yield made
    finally:
        made.channels.close()
        cluster.stop()


def test_a_life_of_shards(coded: Coded) -> None:
    coded.delete_some(2)
    out = coded.shell(f"ec.encode -volumeId={coded.vid} -collection={COLLECTION} -force")
    held = coded.shards()
    assert sorted(n for numbers in held.values() for n in numbers) == list(range(SHARDS)), out
    coded.verify("encoded")
    coded.shell(f"ec.balance -collection={COLLECTION} -apply")
    coded.verify("balanced")
    coded.delete_some(8)
    coded.restart_go()
    coded.verify("deletes after the balance")
    coded.verify("deletes after the balance", "go")
    lost = coded.some_to_lose()
    coded.lose(lost)
    coded.verify(f"without {lost}")
    coded.delete_some(kinds=("own",))
    coded.verify(f"deletes without {lost}")
    out = coded.shell(f"ec.rebuild -collection={COLLECTION} -apply")
    held = coded.shards()
    assert sorted(n for numbers in held.values() for n in numbers) == list(range(SHARDS)), out
    coded.verify("rebuilt")
    coded.restart_go()
    coded.verify("rebuilt", "go")
    coded.delete_some()
    nodes = ",".join(f"{server.url}.{server.grpc}" for server in coded.cluster.servers)
    for mode in ("index", "local", "full", "checksum"):
        out = coded.shell(f"ec.scrub -mode={mode} -details -node={nodes}")
        assert "Scrubbed" in out and "error" not in out and "failures" not in out, out
    out = coded.shell(f"ec.decode -collection={COLLECTION} -volumeId={coded.vid}")
    assert not any(coded.shards().values()), out
    coded.verify("decoded")
    coded.delete_some()
    coded.verify("deletes in the volume")


@pytest.mark.parametrize("command", ["ec.encode -force", "ec.balance -apply", "ec.rebuild -apply", "ec.decode"])
def test_deletes_during_a_command_stay(tmp_path: Path, command: str) -> None:
    """Deletes went to servers that had just given the shard away, or were noted by who had another one: needles came
    back. With servers of ours only: upstream's lose such deletes."""
    cluster = Cluster(tmp_path, ("own", "own", "own"))
    coded = Coded(cluster)
    try:
        if not command.startswith("ec.encode"):
            coded.shell(f"ec.encode -volumeId={coded.vid} -collection={COLLECTION} -force")
        if command.startswith("ec.balance"):
            coded.crowd()
        if command.startswith("ec.rebuild"):
            coded.lose(coded.some_to_lose())
        which = "" if "-apply" in command else f" -volumeId={coded.vid}"
        with coded.deletes_meanwhile():
            out = coded.shell(f"{command} -collection={COLLECTION}{which}")
        assert coded.acknowledged > 3, out
        coded.verify(command)
        numbers = sorted(n for held in coded.shards().values() for n in held)
        assert numbers == ([] if command == "ec.decode" else list(range(SHARDS))), out
    finally:
        coded.channels.close()
        cluster.stop()


def test_a_server_that_hangs_and_one_that_is_away(tmp_path: Path) -> None:
    """With one of two servers stopped reads cost one time-out, not one for each needle; deletes are refused. Once it is
    away they are noted by the other, and known to it when it is back."""
    cluster = Cluster(tmp_path, ("own", "own"))
    coded = Coded(cluster)
    try:
        coded.shell(f"ec.encode -volumeId={coded.vid} -collection={COLLECTION} -force -rebalance=false")
        held = coded.shards()
        here, there = sorted(cluster.servers, key=lambda each: -len(held[each.name]))
        coded.move(here, there, [0, 1, 2, 3])
        coded.verify("spread")
        there.kill(signal.SIGSTOP)
        for fid, data in coded.live.items():
            assert request(here.port, "GET", f"/{fid}") == (200, data)
        log = (tmp_path / f"{here.name}.log").read_text()
        assert 1 <= log.count("DeadlineExceeded") < OBJECTS // 10, "one for each try"
        refused = []
        for fid in sorted(coded.live)[::10]:
            status, _ = request(here.port, "DELETE", f"/{fid}")
            assert status in (202, 500)
            if status == 202:
                del coded.live[fid]
                coded.dead.append(fid)
            else:
                refused.append(fid)
        assert coded.dead and refused
        there.kill(signal.SIGCONT)
        for fid in refused:
            wait_for(lambda fid=fid: request(here.port, "DELETE", f"/{fid}")[0] == 202, "it is deleted", 200)
            del coded.live[fid]
            coded.dead.append(fid)
        for fid in coded.dead:
            wait_for(lambda fid=fid: request(there.port, "GET", f"/{fid}")[0] == 404, f"{fid} is gone there, too")
        coded.verify("awake")
        there.kill()
        wait_for(lambda: coded.mounted() == list(range(4, SHARDS)), "the master misses its shards")
        before = len(coded.dead)
        for fid in sorted(coded.live)[::10]:
            wait_for(lambda fid=fid: request(here.port, "DELETE", f"/{fid}")[0] == 202, "it is deleted", 60)
            del coded.live[fid]
            coded.dead.append(fid)
        assert len(coded.dead) > before
        for fid in coded.dead[before:]:
            assert request(here.port, "GET", f"/{fid}")[0] == 404
        there.start()
        wait_for(lambda: coded.mounted() == list(range(SHARDS)), "all shards are announced")
        for fid in coded.dead:
            for port in (here.port, there.port):
                wait_for(lambda fid=fid, port=port: request(port, "GET", f"/{fid}")[0] == 404, f"{fid} is gone")
        coded.verify("back")
    finally:
        coded.channels.close()
        cluster.stop()
