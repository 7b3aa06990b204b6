"""What `weed shell` and `weed backup` do to volumes of ours, in a Go cluster: three masters, two volume servers of
ours, two of Go, a filer. After each command every needle is read on every server that is said to have it.

Needs the binary of upstream: WEED_BIN=/path/to/weed. PYVOLUME_STOPPED_S=60 for the long form of the server that hangs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.ports import free_port

HOST = "127.0.0.1"
WEED = os.environ.get("WEED_BIN", "")
STOPPED_S = float(os.environ.get("PYVOLUME_STOPPED_S", "12"))
LIMIT_S = 90.0
NEEDLES = 30
SIZE_LIMIT_MB = 3

pytestmark = [
    pytest.mark.skipif(not WEED, reason="set WEED_BIN to the binary of SeaweedFS 4.44 to run these"),
    pytest.mark.timeout(400),
]


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    end = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, http.client.HTTPException, AssertionError):
            value = condition()
            if value:
                return value
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.2)


def request(port: int, method: str, path: str, body: bytes | None = None, timeout_s: float = 30.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Node:
    """One process with its two ports; start() brings it (back) up on its files."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.port, self.grpc = free_port(), free_port()
        self.url = f"{HOST}:{self.port}"
        self.address = f"{self.url}.{self.grpc}"
        self.directory = cluster.base / name
        self.directory.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = [f"-ip={HOST}", f"-port={self.port}", f"-port.grpc={self.grpc}"]
        go = [WEED, f"-config_dir={self.cluster.base}"]
        masters = self.cluster.master_list
        if self.name.startswith("master"):
            words = [*go, "master", *where, f"-mdir={self.directory}", f"-peers={masters}"]
            words.append(f"-volumeSizeLimitMB={SIZE_LIMIT_MB}")
        elif self.name == "filer":
            words = [*go, "filer", *where, f"-master={masters}", f"-defaultStoreDir={self.directory}"]
        else:
            program = go if self.name.startswith("go") else [sys.executable, "-m", "pyvolume", "-logtostderr"]
            more = [f"-dir={self.directory}", "-max=40", "-preStopSeconds=0", f"-master={masters}"]
            words = [*program, "volume", *where, *more]
        with (self.cluster.base / f"{self.name}.log").open("ab") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=self.cluster.base
            )

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(with_signal)
        if with_signal not in (signal.SIGSTOP, signal.SIGCONT):
            self.process.wait(30)


class Cluster:
    def __init__(self, base: Path) -> None:
        self.base = base
        (base / "security.toml").write_text("# nothing\n")
        self.masters = [Node(self, f"master{number}") for number in range(3)]
        self.master_list = ",".join(node.address for node in self.masters)
        self.own = [Node(self, "own0"), Node(self, "own1")]
        self.go = [Node(self, "go0"), Node(self, "go1")]
        self.filer = Node(self, "filer")

    @property
    def servers(self) -> list[Node]:
        return [*self.own, *self.go]

    def start(self) -> None:
        for node in self.masters:
            node.start()
        wait_for(self.leader, "a leading master")
        for node in self.servers:
            node.start()
        for node in self.servers:
            wait_for(lambda n=node: n.url in self.nodes(), f"{node.name} joined")  # type: ignore[misc]
        self.filer.start()
        wait_for(lambda: request(self.filer.port, "GET", "/")[0] == 200, "the filer serves")

    def stop(self) -> None:
        for node in (self.filer, *self.servers, *self.masters):
            if node.process is not None:
                with contextlib.suppress(OSError):
                    node.process.send_signal(signal.SIGCONT)
                node.process.kill()
                node.process.wait()

    def leader(self) -> Node | None:
        for node in self.masters:
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                if json.loads(request(node.port, "GET", "/cluster/status", timeout_s=3)[1]).get("IsLeader"):
                    return node
        return None

    def ask(self, path: str) -> Any:
        leader = self.leader()
        assert leader is not None
        return json.loads(request(leader.port, "GET", path)[1])

    def nodes(self) -> str:
        return json.dumps(self.ask("/dir/status"))

    def holders(self, vid: int, collection: str = "") -> set[str]:
        found = self.ask(f"/dir/lookup?volumeId={vid}&collection={collection}").get("locations") or []
        return {each["url"] for each in found}

    def wait_for_holders(self, vid: int, *nodes: Node) -> None:
        wait_for(
            lambda: self.holders(vid) == {node.url for node in nodes}, f"volume {vid} on {[n.name for n in nodes]}"
        )

    def shell(self, *commands: str) -> str:
        """Runs commands under the lock; fails with their output when one of them says that it failed."""
        script = "".join(f"{command}\n" for command in ("lock", *commands, "unlock"))
        words = [
            WEED,
            f"-config_dir={self.base}",
            "shell",
            f"-master={self.master_list}",
            f"-filer={self.filer.address}",
        ]
        done = subprocess.run(words, input=script.encode(), capture_output=True, timeout=180, cwd=self.base, check=True)
        text = (done.stdout + done.stderr).decode(errors="replace")
        assert "error:" not in text.lower(), text
        return text

    def volume(self, collection: str, *nodes: Node) -> Volume:
        """A volume with needles on the servers named: grown there, then copied by the servers themselves."""
        query = urllib.parse.urlencode(
            {"collection": collection, "count": 1, "replication": "000", "dataNode": nodes[0].url}
        )
        assert self.ask(f"/vol/grow?{query}").get("count") == 1, query
        fid = wait_for(lambda: self.ask(f"/dir/assign?collection={collection}").get("fid"), "an assignment")
        made = Volume(self, int(fid.partition(",")[0]), collection)
        self.wait_for_holders(made.vid, nodes[0])
        for number in range(NEEDLES):
            made.put(number, nodes[0])
        for node in nodes[1:]:
            self.shell(f"volume.copy -source {nodes[0].address} -target {node.address} -volumeId {made.vid}")
        self.wait_for_holders(made.vid, *nodes)
        return made


class Volume:
    """Knows what is to be found under each key: bytes, or None for what was deleted."""

    def __init__(self, cluster: Cluster, vid: int, collection: str) -> None:
        self.cluster, self.vid, self.collection = cluster, vid, collection
        self.content: dict[str, bytes | None] = {}

    def key(self, number: int) -> str:
        return f"{self.vid},{0x100 + number:x}0000abcd"

    def put(self, number: int, node: Node, more: str = "") -> None:
        key = self.key(number)
        data = random.Random(key).randbytes((10, 900, 5000, 70_000)[number % 4]) + more.encode()
        status, answer = request(node.port, "PUT", f"/{key}{more}", data)
        assert status in (201, 204), (node.name, key, status, answer)
        self.content[key] = data

    def delete(self, number: int, node: Node, more: str = "") -> None:
        status, answer = request(node.port, "DELETE", f"/{self.key(number)}{more}")
        assert status == 202, (node.name, status, answer)
        self.content[self.key(number)] = None

    def verify(self, *nodes: Node) -> None:
        """Exactly these servers have the volume, and each has everything."""
        self.cluster.wait_for_holders(self.vid, *nodes)
        for node in nodes:
            for key, data in self.content.items():
                status, body = request(node.port, "GET", f"/{key}")
                if data is None:
                    assert status == 404, (node.name, key, status)
                else:
                    assert (status, body == data) == (200, True), (node.name, key, status, len(body), len(data))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def pairs(cluster: Cluster) -> list[tuple[Node, Node]]:
    """From ours to Go's, from Go's to ours, from ours to ours."""
    return [(cluster.own[0], cluster.go[0]), (cluster.go[1], cluster.own[1]), (cluster.own[0], cluster.own[1])]


def test_volumes_are_listed_copied_moved_and_deleted(cluster: Cluster) -> None:
    for number, (source, target) in enumerate(pairs(cluster)):
        volume = cluster.volume(f"move{number}", source)
        vid = volume.vid
        text = cluster.shell("volume.list")
        assert f"volume Id:{vid}, " in text, text
        volume.delete(1, source)
        cluster.shell(f"volume.copy -source {source.address} -target {target.address} -volumeId {vid}")
        volume.verify(source, target)
        cluster.shell(f"volume.delete -node {source.address} -volumeId {vid}")
        volume.verify(target)
        cluster.shell(f"volume.move -source {target.address} -target {source.address} -volumeId {vid}")
        volume.verify(source)
        volume.put(2, source, "?again=1")
        volume.put(NEEDLES, source)
        volume.verify(source)


def test_volumes_are_unmounted_mounted_and_marked(cluster: Cluster) -> None:
    node = cluster.own[0]
    volume = cluster.volume("marks", node)
    vid = volume.vid
    cluster.shell(f"volume.unmount -node {node.address} -volumeId {vid}")
    wait_for(lambda: not cluster.holders(vid), "the volume gone")
    cluster.shell(f"volume.mount -node {node.address} -volumeId {vid}")
    volume.verify(node)
    cluster.shell(f"volume.mark -node {node.address} -volumeId {vid} -readonly")
    assert request(node.port, "PUT", f"/{volume.key(90)}", b"x")[0] == 500
    volume.verify(node)
    cluster.shell(f"volume.mark -node {node.address} -volumeId {vid} -writable")
    volume.put(90, node)
    volume.verify(node)


def test_replication_is_configured_and_made_up_for(cluster: Cluster) -> None:
    own = cluster.own[1]
    volume = cluster.volume("replicas", own)
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 001")

    def copied() -> bool:
        cluster.shell("volume.fix.replication -apply -collectionPattern replicas")
        return len(cluster.holders(volume.vid)) == 2

    wait_for(copied, "a second copy")
    nodes = [node for node in cluster.servers if node.url in cluster.holders(volume.vid)]
    volume.verify(*nodes)
    volume.put(91, own)  # goes to both
    volume.delete(3, nodes[0])
    volume.verify(*nodes)
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 000")

    def thinned() -> bool:
        cluster.shell("volume.fix.replication -apply -collectionPattern replicas")
        return len(cluster.holders(volume.vid)) == 1

    wait_for(thinned, "one copy")
    volume.verify(*(node for node in cluster.servers if node.url in cluster.holders(volume.vid)))


@pytest.mark.parametrize("which", [("own0", "go0"), ("own0", "own1")], ids="-".join)
def test_replicas_that_differ_are_made_equal(cluster: Cluster, which: tuple[str, str]) -> None:
    first, second = (node for node in cluster.servers if node.name in which)
    volume = cluster.volume("differ" + which[1], first, second)
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 001")
    for number in range(40, 45):  # each on one side only
        volume.put(number, first, "?type=replicate")
        volume.put(number + 10, second, "?type=replicate")
    volume.delete(4, first, "?type=replicate")
    cluster.shell(f"volume.check.disk -slow -v -volumeId={volume.vid} -apply -syncDeleted -resurrectMissingNeedles")
    volume.verify(first, second)


@pytest.mark.parametrize("which", [("own0", "go0"), ("own0", "own1")], ids="-".join)
def test_replicas_that_differ_are_merged(cluster: Cluster, which: tuple[str, str]) -> None:
    first, second = (node for node in cluster.servers if node.name in which)
    volume = cluster.volume("merge" + which[1], first, second)
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 001")
    for number in range(40, 45):
        volume.put(number, first, "?type=replicate")
        volume.put(number + 10, second, "?type=replicate")
    assert "merged volume" in cluster.shell(f"volume.merge -volumeId {volume.vid}")
    volume.verify(first, second)
    volume.put(92, second)  # writable again, on both
    volume.verify(first, second)


def test_volumes_are_vacuumed(cluster: Cluster) -> None:
    first, second = cluster.own[0], cluster.go[0]
    volume = cluster.volume("vacuum", first, second)
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 001")
    for number in range(0, NEEDLES, 2):
        volume.delete(number, first)
    data = first.directory / f"vacuum_{volume.vid}.dat"
    before = data.stat().st_size

    def smaller() -> bool:
        cluster.shell(f"volume.vacuum -garbageThreshold 0.0001 -volumeId {volume.vid}")
        return data.stat().st_size < before

    wait_for(smaller, "a smaller file")
    volume.verify(first, second)
    volume.put(93, second)
    volume.verify(first, second)


def test_volumes_are_balanced(cluster: Cluster) -> None:
    node = cluster.own[0]
    volumes = [cluster.volume(f"balance{number}", node) for number in range(5)]
    for volume in volumes:
        for number in range(100, 132):  # balanced is by bytes
            volume.put(number * 4 + 3, node)
    sizes = [(node.directory / f"{volume.collection}_{volume.vid}.dat").stat().st_size for volume in volumes]

    def known() -> bool:
        text = cluster.shell("volume.list")
        return all(f"Size:{size}," in text for size in sizes)

    wait_for(known, "the sizes at the master")
    text = cluster.shell("volume.balance -apply -collection balance*")
    holders = [cluster.holders(volume.vid) for volume in volumes]
    assert len(set().union(*holders)) > 1, text
    for volume, urls in zip(volumes, holders, strict=True):
        volume.verify(*(node for node in cluster.servers if node.url in urls))


def test_files_of_a_filer_are_checked_and_orphans_purged(cluster: Cluster) -> None:
    node = cluster.own[0]
    assert cluster.ask(f"/vol/grow?count=1&replication=000&dataNode={node.url}").get("count") == 1
    files = {f"/dir/file{number}": os.urandom(50_000 + number) for number in range(12)}
    for path, data in files.items():
        assert request(cluster.filer.port, "PUT", path, data)[0] == 201
    listed = json.loads(request(cluster.filer.port, "GET", "/dir/file0?metadata=true")[1])
    vid = int(listed["chunks"][0]["file_id"].partition(",")[0])
    assert cluster.holders(vid) == {node.url}
    everything = f"-volumeId {vid} -cutoffTimeAgo 0s"
    text = cluster.shell(f"volume.fsck {everything} -verifyNeedles")
    assert "no orphan data" in text, text
    text = cluster.shell(f"volume.fsck {everything} -findMissingChunksInFiler -verifyNeedles")
    assert "0 missing" in text or "missing" not in text.replace("find missing", ""), text
    orphan = f"/{vid},7fffff0000abcd"
    assert request(node.port, "PUT", orphan, b"nobody's")[0] == 201
    text = cluster.shell(f"volume.fsck {everything}")
    assert "orphan:1" in text, text
    cluster.shell(f"volume.fsck {everything} -reallyDeleteFromVolume")
    assert request(node.port, "GET", orphan)[0] == 404
    assert "no orphan data" in cluster.shell(f"volume.fsck {everything}")
    for path, data in files.items():
        assert request(cluster.filer.port, "GET", path) == (200, data)


def test_a_volume_is_backed_up_twice(cluster: Cluster) -> None:
    own = cluster.own[1]
    volume = cluster.volume("backup", own)
    target = cluster.base / "backup"
    target.mkdir()

    def back_up() -> None:
        words = [WEED, "backup", f"-dir={target}", f"-volumeId={volume.vid}", "-collection=backup"]
        words.append(f"-master={cluster.leader().address}")  # type: ignore[union-attr]
        done = subprocess.run(words, capture_output=True, timeout=120, cwd=cluster.base, check=False)
        assert done.returncode == 0, done.stderr.decode()

    back_up()
    volume.put(94, own)
    volume.delete(5, own)
    back_up()  # what is new only
    source = (own.directory / f"backup_{volume.vid}.dat").read_bytes()
    assert (target / f"backup_{volume.vid}.dat").read_bytes() == source


def test_a_collection_is_deleted(cluster: Cluster) -> None:
    gone = cluster.volume("gone", cluster.own[0], cluster.go[1])
    stays = cluster.volume("stays", cluster.own[0])
    cluster.shell("collection.delete -collection gone -apply")
    wait_for(lambda: not cluster.holders(gone.vid), "the collection gone")
    wait_for(lambda: not list(cluster.own[0].directory.glob("gone_*")), "its files gone")
    stays.verify(cluster.own[0])


def test_the_leading_master_dies_and_comes_back(cluster: Cluster) -> None:
    volume = cluster.volume("leader", cluster.own[0], cluster.go[0])
    cluster.shell(f"volume.configure.replication -volumeId {volume.vid} -replication 001")
    old = cluster.leader()
    assert old is not None
    old.kill()
    volume.put(95, cluster.go[0], "?type=replicate")
    volume.put(95, cluster.own[0], "?type=replicate")  # locally, nobody is asked
    wait_for(lambda: cluster.leader() not in (None, old), "another leader")
    for node in cluster.servers:
        wait_for(lambda n=node: n.url in cluster.nodes(), f"{node.name} joined the new leader")  # type: ignore[misc]
    volume.verify(cluster.own[0], cluster.go[0])
    volume.put(96, cluster.own[0])
    old.start()
    wait_for(lambda: request(old.port, "GET", "/cluster/status")[0] == 200, "the old leader serves")
    volume.put(97, cluster.go[0])
    volume.verify(cluster.own[0], cluster.go[0])
    cluster.shell("volume.list")


def test_a_server_that_stands_still_comes_back_with_all_it_had(cluster: Cluster) -> None:
    own, other = cluster.own[0], cluster.own[1]
    volume = cluster.volume("still", own)
    beside = cluster.volume("beside", other)
    own.kill(signal.SIGSTOP)
    end = time.monotonic() + STOPPED_S
    number = 100
    while time.monotonic() < end:  # the others go on
        beside.put(number, other)
        number += 1
        time.sleep(0.5)
    own.kill(signal.SIGCONT)
    volume.verify(own)
    volume.put(98, own)
    volume.verify(own)
    beside.verify(other)


def test_a_server_is_evacuated_and_leaves(cluster: Cluster) -> None:
    own = cluster.own[1]
    volume = cluster.volume("evacuate", own)

    def empty() -> bool:
        cluster.shell(f"volumeServer.evacuate -node {own.url} -apply -skipNonMoveable")
        return own.url not in cluster.holders(volume.vid)

    wait_for(empty, "the volume elsewhere")
    volume.verify(*(node for node in cluster.servers if node.url in cluster.holders(volume.vid)))
    cluster.shell(f"volumeServer.leave -node {own.address} -apply")
    wait_for(lambda: own.url not in cluster.nodes(), "the server gone")
    assert request(own.port, "GET", "/healthz")[0] == 503
    own.kill(signal.SIGTERM)
    own.start()
    wait_for(lambda: own.url in cluster.nodes(), "the server back")
