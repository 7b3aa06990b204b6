"""The development master: registration, growing, assigning, looking up; documents in upstream's shape."""

from __future__ import annotations

import http.client
import json
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_helpers import WAIT_S, wait_for

from pyvolume.devmaster.__main__ import DevMaster, Options, parse_options
from pyvolume.devmaster.topology import Layout, MasterError, Sequence, Topology, Wish
from pyvolume.digest import report_hash
from pyvolume.pb import master_pb2
from pyvolume.server.rpc import MASTER_SERVICE, VOLUME_SERVICE, Channels, RpcFailure, method_classes, open_stream
from tools.ports import free_ports


class FakeVolumeServer:
    """Answers the master's calls and sends heartbeats."""

    def __init__(self, master: DevMaster, name: str, *, slots: int = 10, rack: str = "", dc: str = "", **extra: Any):
        self.volumes: dict[int, Any] = {}
        self.calls: list[tuple[str, Any]] = []
        self.refuse = ""
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
        handlers = {}
        for method in ("AllocateVolume", "VolumeDelete", "DeleteCollection"):
            _, request_class, response_class = method_classes(VOLUME_SERVICE, method)
            handlers[method] = grpc.unary_unary_rpc_method_handler(
                self._serve(method, response_class),
                request_deserializer=request_class.FromString,
                response_serializer=response_class.SerializeToString,
            )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(VOLUME_SERVICE.full_name, handlers),)
        )
        self.grpc_port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.url = f"127.0.0.1:{name}"
        self.port = int(name)
        self.responses: list[Any] = []
        self.failure: grpc.RpcError | None = None
        self._outgoing: queue.Queue[Any] = queue.Queue()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{master.grpc_port}")
        self._call = open_stream(self._channel, MASTER_SERVICE, "SendHeartbeat", iter(self._outgoing.get, None))
        threading.Thread(target=self._receive, daemon=True).start()
        self.beat(
            max_volume_counts={"": slots},
            data_center=dc,
            rack=rack,
            grpc_port=self.grpc_port,
            has_no_volumes=True,
            **extra,
        )

    def _serve(self, name: str, response_class: type) -> Any:
        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.append((name, request))
            if self.refuse:
                context.abort(grpc.StatusCode.UNKNOWN, self.refuse)
            return response_class()

        return serve

    def _receive(self) -> None:
        try:
            self.responses.extend(self._call)
        except grpc.RpcError as exc:
            self.failure = exc

    def beat(self, **fields: Any) -> None:
        self._outgoing.put(master_pb2.Heartbeat(ip="127.0.0.1", port=self.port, **fields))

    def allocated(self) -> list[int]:
        return [request.volume_id for name, request in self.calls if name == "AllocateVolume"]

    def leave(self) -> None:
        self._outgoing.put(None)

    def end(self) -> None:
        self._call.cancel()
        self._channel.close()
        self._server.stop(0)


class Cluster:
    """A master and the servers made for it."""

    def __init__(self, **options: Any) -> None:
        self.master = DevMaster(Options(port=0, **options))
        self.master.start()
        self.servers: list[FakeVolumeServer] = []

    def server(self, name: str, **kwargs: Any) -> FakeVolumeServer:
        made = FakeVolumeServer(self.master, name, **kwargs)
        self.servers.append(made)
        wait_for(lambda: made.responses or made.failure, "an answer to the first heartbeat")
        return made

    def get(self, path: str, method: str = "GET", body: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.master.port, timeout=WAIT_S)
        try:
            headers = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            raw = response.read()
            return response.status, json.loads(raw) if raw else None
        finally:
            connection.close()

    def call(self, name: str, request: Any) -> Any:
        channels = Channels()
        try:
            address = f"127.0.0.1:1.{self.master.grpc_port}"
            return channels.unary(address, MASTER_SERVICE, name, request, timeout_s=WAIT_S)
        finally:
            channels.close()

    def end(self) -> None:
        for server in self.servers:
            server.end()
        self.master.stop()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(volume_size_limit_mb=1)
    yield made
    made.end()


def volume(vid: int, **fields: Any) -> Any:
    return master_pb2.VolumeInformationMessage(**{"id": vid, "version": 3, "size": 8, **fields})


# -- registration -----------------------------------------------------------------------------------------------------


def test_first_heartbeat_is_answered_with_orders(cluster: Cluster) -> None:
    server = cluster.server("7001")
    assert server.responses == [master_pb2.HeartbeatResponse(volume_size_limit=1 << 20, volume_digest_supported=True)]
    status, document = cluster.get("/dir/status")
    assert status == 200
    assert document["Topology"]["DataCenters"] == [
        {
            "Id": "DefaultDataCenter",
            "Racks": [
                {
                    "Id": "DefaultRack",
                    "DataNodes": [
                        {
                            "Url": "127.0.0.1:7001",
                            "PublicUrl": "127.0.0.1:7001",
                            "Volumes": 0,
                            "EcShards": 0,
                            "Max": 10,
                            "VolumeIds": " ",
                        }
                    ],
                }
            ],
        }
    ]


def test_server_leaves_when_its_stream_ends(cluster: Cluster) -> None:
    server = cluster.server("7001")
    server.beat(volumes=[volume(3)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 200)
    server.leave()
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 404)
    assert cluster.get("/dir/status")[1]["Topology"] == {
        "Max": 0,
        "Free": 0,
        "DataCenters": None,
        "Layouts": [
            {"replication": "000", "ttl": "", "writables": None, "collection": "", "diskType": "hdd"},
        ],
    }


def test_directories_of_another_server_are_refused(cluster: Cluster) -> None:
    cluster.server("7001", location_uuids=["a", "b"])
    second = cluster.server("7002", location_uuids=["c", "b"])
    wait_for(lambda: second.failure)
    assert [list(response.duplicated_uuids) for response in second.responses] == [["b"]]
    assert second.failure is not None
    assert second.failure.details() == "volume: Duplicated volume directories were loaded"
    assert len(cluster.get("/dir/status")[1]["Topology"]["DataCenters"][0]["Racks"][0]["DataNodes"]) == 1


def test_server_that_comes_back_replaces_its_old_stream(cluster: Cluster) -> None:
    old = cluster.server("7001", location_uuids=["a"])
    new = cluster.server("7001", location_uuids=["a"])
    assert new.responses[0].volume_digest_supported
    old.leave()
    new.beat(volumes=[volume(3)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 200)


def test_changes_and_deltas_are_applied(cluster: Cluster) -> None:
    server = cluster.server("7001")
    server.beat(new_volumes=[master_pb2.VolumeShortInformationMessage(id=3, version=3, collection="c")])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 200)
    assert cluster.get("/dir/lookup?volumeId=3&collection=c")[0] == 200
    assert cluster.get("/dir/lookup?volumeId=3&collection=d")[0] == 404
    server.beat(changed_volumes=[volume(4)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=4")[0] == 200)
    server.beat(deleted_volumes=[master_pb2.VolumeShortInformationMessage(id=3)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 404)
    server.beat(volumes=[volume(7), volume(8), volume(10)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=4")[0] == 404)
    node = cluster.get("/dir/status")[1]["Topology"]["DataCenters"][0]["Racks"][0]["DataNodes"][0]
    assert (node["Volumes"], node["VolumeIds"]) == (3, " 7-8 10")


def test_digest_that_differs_asks_for_the_whole_list(cluster: Cluster) -> None:
    server = cluster.server("7001")
    held = [volume(3, file_count=5), volume(4, collection="c", ttl=771)]
    server.beat(volumes=held, volume_digest=12345)
    digest = report_hash(held[0]) ^ report_hash(held[1])
    server.beat(volume_digest=digest)
    server.beat(volume_digest=digest ^ 1)
    wait_for(lambda: len(server.responses) == 2)
    assert server.responses[1] == master_pb2.HeartbeatResponse(volume_size_limit=1 << 20, resend_full_volume_list=True)


# -- assigning --------------------------------------------------------------------------------------------------------


def test_assign_grows_and_gives_ids_in_a_row(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=20)
    fids = []
    for _ in range(5):
        status, answer = cluster.get("/dir/assign")
        assert status == 200
        assert answer == {"fid": answer["fid"], "url": "127.0.0.1:7001", "publicUrl": "127.0.0.1:7001", "count": 1}
        fids.append(answer["fid"])
    assert server.allocated() == [1, 2, 3, 4, 5, 6, 7]
    request = server.calls[0][1]
    assert (request.replication, request.version, request.ttl, request.disk_type) == ("000", 3, "", "")
    keys = [int(re.fullmatch(r"[1-7],([0-9a-f]+)[0-9a-f]{8}", fid)[1], 16) for fid in fids]  # type: ignore[index]
    assert keys == [1, 2, 3, 4, 5]
    status, answer = cluster.get("/dir/assign?count=10")
    assert answer["count"] == 10
    assert int(cluster.get("/dir/assign")[1]["fid"].split(",")[1][:-8], 16) == 16
    assert cluster.get("/cluster/status")[1]["MaxVolumeId"] == 7


def test_ids_that_servers_hold_are_not_given_again(cluster: Cluster) -> None:
    server = cluster.server("7001", max_file_key=1000)
    server.beat(volumes=[volume(5)])
    wait_for(lambda: cluster.get("/cluster/status")[1]["MaxVolumeId"] == 5)
    vid, rest = cluster.get("/dir/assign")[1]["fid"].split(",")
    assert (vid, int(rest[:-8], 16)) == ("5", 1001)
    cluster.get("/dir/assign?collection=other")
    assert min(server.allocated()) == 6


def test_growth_with_fewer_slots_than_wanted(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=3)
    assert cluster.get("/dir/assign")[0] == 200
    assert server.allocated() == [1, 2, 3]
    status, answer = cluster.get("/dir/assign?collection=c")
    assert status == 406
    assert answer == {
        "error": "failed to find writable volumes for collection:c replication:000 ttl: error: No writable volumes "
        'and no free volumes left for {"collection":"c","replication":{},"ttl":{"Count":0,"Unit":0},"version":3}'
    }


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("replication=999", "unexpected replication type: 999"),
        ("ttl=abc", 'strconv.Atoi: parsing "ab": invalid syntax'),
        (
            "disk=ssd",
            "failed to find writable volumes for collection: replication:000 ttl: error: No writable volumes and no "
            'free volumes left for {"replication":{},"ttl":{"Count":0,"Unit":0},"disk":"ssd","version":3}',
        ),
        (
            "replication=001",
            "no server can take another volume with all its copies",
        ),
    ],
)
def test_assign_that_cannot_be_met(cluster: Cluster, query: str, text: str) -> None:
    server = cluster.server("7001")
    assert cluster.get(f"/dir/assign?{query}") == (406, {"error": text})
    assert server.allocated() == []


def test_layouts_are_kept_apart(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=100)
    for query in ("", "collection=c", "ttl=3d", "replication=000&collection=c&ttl=1h"):
        assert cluster.get(f"/dir/assign?{query}")[0] == 200
    layouts = cluster.get("/dir/status")[1]["Topology"]["Layouts"]
    assert [(entry["collection"], entry["ttl"], len(entry["writables"])) for entry in layouts] == [
        ("", "", 7),
        ("c", "", 7),
        ("", "3d", 7),
        ("c", "1h", 7),
    ]
    assert {request.ttl for _, request in server.calls} == {"", "3d", "1h"}


def test_what_makes_a_volume_unwritable(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=0)
    full, read_only, good = volume(1, size=1 << 20), volume(2, read_only=True), volume(3)
    server.beat(volumes=[full, read_only, good, volume(4, version=2), volume(5, replica_placement=1)])
    wait_for(lambda: cluster.get("/dir/assign")[0] == 200)
    assert {cluster.get("/dir/assign")[1]["fid"].split(",")[0] for _ in range(20)} == {"3"}
    mark = master_pb2.VolumeMarkReadonlyRequest(ip="127.0.0.1", port=7001, volume_id=3, is_readonly=True)
    cluster.call("VolumeMarkReadonly", mark)
    assert cluster.get("/dir/assign")[0] == 406
    mark.is_readonly = False
    cluster.call("VolumeMarkReadonly", mark)
    assert cluster.get("/dir/assign")[0] == 200


def test_replicas_go_where_the_replication_says(cluster: Cluster) -> None:
    places = {
        "7001": ("dc1", "r1"),
        "7002": ("dc1", "r1"),
        "7003": ("dc1", "r2"),
        "7004": ("dc2", "r1"),
    }
    for name, (dc, rack) in places.items():
        cluster.server(name, dc=dc, rack=rack, slots=30)
    for replication, spread in (
        ("001", lambda a, b: a == b),
        ("010", lambda a, b: a[0] == b[0] and a[1] != b[1]),
        ("100", lambda a, b: a[0] != b[0]),
    ):
        fid = cluster.get(f"/dir/assign?replication={replication}")[1]["fid"]
        vid = fid.split(",")[0]
        holders = [entry["url"].split(":")[1] for entry in cluster.get(f"/dir/lookup?volumeId={vid}")[1]["locations"]]
        assert len(holders) == 2
        assert spread(*(places[holder] for holder in holders)), (replication, holders)
    answer = cluster.call("Assign", master_pb2.AssignRequest(count=2, replication="111"))
    assert (answer.count, len(answer.replicas)) == (2, 3)
    assert {place.url for place in (answer.location, *answer.replicas)} == {f"127.0.0.1:{name}" for name in places}


def test_wish_for_a_data_center(cluster: Cluster) -> None:
    for name, dc in (("7001", "dc1"), ("7002", "dc2")):
        cluster.server(name, dc=dc)
    for dc, url in (("dc2", "127.0.0.1:7002"), ("dc1", "127.0.0.1:7001")):
        assert cluster.get(f"/dir/assign?dataCenter={dc}")[1]["url"] == url
    status, answer = cluster.get("/dir/assign?dataCenter=dc9")
    assert status == 406
    assert "No writable volumes in DataCenter:dc9 Rack: DataNode: and no free volumes left" in answer["error"]


def test_volume_that_one_server_refuses_is_taken_back(cluster: Cluster) -> None:
    servers = [cluster.server(name) for name in ("7001", "7002")]
    servers[1].refuse = "No more free space left"
    status, answer = cluster.get("/dir/assign?replication=001")
    assert status == 406
    assert answer == {"error": "AllocateVolume on 127.0.0.1:7002: No more free space left"}
    deleted = [request.volume_id for name, request in servers[0].calls if name == "VolumeDelete"]
    assert deleted == servers[0].allocated()
    assert cluster.get("/dir/status")[1]["Topology"]["Free"] == 20, "slots are given back"
    servers[1].refuse = ""
    assert cluster.get("/dir/assign?replication=001")[0] == 200
    node_slots = [node.free_slots("") for node in cluster.master.topology.lookup(2)]
    assert node_slots == [4, 4], "six volumes on each, nothing reserved"


def test_many_assigns_at_once_grow_once(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=50)
    with futures.ThreadPoolExecutor(16) as pool:
        fids = [answer["fid"] for _, answer in pool.map(cluster.get, ["/dir/assign"] * 64)]
    assert len({fid.split(",")[1][:-8] for fid in fids}) == 64
    assert len(server.allocated()) == 7


def test_volume_on_another_disk_than_guessed_is_counted_once(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=1)
    assert cluster.get("/dir/assign")[0] == 200
    server.beat(new_volumes=[master_pb2.VolumeShortInformationMessage(id=1, version=3, disk_id=2)])
    info = volume(1, disk_id=2)
    server.beat(changed_volumes=[info], volume_digest=report_hash(info))
    server.beat(changed_volumes=[volume(9)], volume_digest=0)
    wait_for(lambda: len(server.responses) >= 2)
    assert len(server.responses) == 2, "the first digest was right"
    node = cluster.get("/dir/status")[1]["Topology"]["DataCenters"][0]["Racks"][0]["DataNodes"][0]
    assert node["Volumes"] == 2


# -- other calls ------------------------------------------------------------------------------------------------------


def test_grow(cluster: Cluster) -> None:
    server = cluster.server("7001", slots=5)
    assert cluster.get("/vol/grow?count=2&collection=c") == (200, {"count": 2})
    assert server.allocated() == [1, 2]
    assert cluster.get("/vol/grow?count=9") == (406, {"error": "only 3 volumes left, not enough for 9"})
    assert cluster.get("/vol/grow") == (406, {"error": "can not parse parameter count "})
    assert cluster.get("/vol/grow?count=1&dataCenter=x")[0] == 406


@pytest.mark.parametrize(
    ("query", "status", "answer"),
    [
        ("volumeId=99", 404, {"volumeOrFileId": "99", "error": "volume id 99 not found"}),
        ("volumeId=abc", 404, {"volumeOrFileId": "abc", "error": "Unknown volume id abc"}),
        ("", 404, {"error": "Unknown volume id "}),
    ],
)
def test_lookup_of_nothing(cluster: Cluster, query: str, status: int, answer: Any) -> None:
    assert cluster.get(f"/dir/lookup?{query}") == (status, answer)


def test_lookup(cluster: Cluster) -> None:
    server = cluster.server("7001")
    server.beat(volumes=[volume(3)])
    place = {
        "url": "127.0.0.1:7001",
        "publicUrl": "127.0.0.1:7001",
        "dataCenter": "DefaultDataCenter",
        "grpcPort": server.grpc_port,
    }
    expected = {"volumeOrFileId": "3", "locations": [place]}
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3") == (200, expected))
    assert cluster.get("/dir/lookup?fileId=3,01abcdef") == (200, expected)
    assert cluster.get("/dir/lookup", "POST", "volumeId=3") == (200, expected)
    answer = cluster.call("LookupVolume", master_pb2.LookupVolumeRequest(volume_or_file_ids=["3,01ab", "4", "x"]))
    shown = [(entry.volume_or_file_id, len(entry.locations), entry.error) for entry in answer.volume_id_locations]
    assert shown == [("3", 1, ""), ("4", 0, "volume id 4 not found"), ("x", 0, "Unknown volume id x")]
    assert answer.volume_id_locations[0].locations[0].grpc_port == server.grpc_port


def test_shards(cluster: Cluster) -> None:
    server = cluster.server("7001")
    shards = master_pb2.VolumeEcShardInformationMessage(id=6, collection="c", ec_index_bits=0b101)
    server.beat(ec_shards=[shards])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=6")[0] == 200)
    answer = cluster.call("LookupEcVolume", master_pb2.LookupEcVolumeRequest(volume_id=6))
    assert [entry.shard_id for entry in answer.shard_id_locations] == [0, 2]
    server.beat(new_ec_shards=[master_pb2.VolumeEcShardInformationMessage(id=6, ec_index_bits=0b10)])
    server.beat(deleted_ec_shards=[master_pb2.VolumeEcShardInformationMessage(id=6, ec_index_bits=0b100)])

    def shard_ids() -> list[int]:
        found = cluster.call("LookupEcVolume", master_pb2.LookupEcVolumeRequest(volume_id=6))
        return [entry.shard_id for entry in found.shard_id_locations]

    wait_for(lambda: shard_ids() == [0, 1])
    server.beat(has_no_ec_shards=True)
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=6")[0] == 404)
    with pytest.raises(RpcFailure, match="ec volume 6 not found"):
        cluster.call("LookupEcVolume", master_pb2.LookupEcVolumeRequest(volume_id=6))


def test_collection_is_deleted_everywhere(cluster: Cluster) -> None:
    servers = [cluster.server(name) for name in ("7001", "7002")]
    servers[0].beat(volumes=[volume(3, collection="c"), volume(4)])
    wait_for(lambda: cluster.get("/dir/lookup?volumeId=3")[0] == 200)
    assert cluster.get("/col/delete?collection=c") == (204, None)
    assert [request.collection for name, request in servers[0].calls if name == "DeleteCollection"] == ["c"]
    assert not servers[1].calls
    assert cluster.get("/dir/lookup?volumeId=3")[0] == 404
    assert cluster.get("/dir/lookup?volumeId=4")[0] == 200
    assert cluster.get("/col/delete?collection=c") == (400, {"error": "collection c does not exist"})


def test_configuration_ping_and_status(cluster: Cluster) -> None:
    answer = cluster.call("GetMasterConfiguration", master_pb2.GetMasterConfigurationRequest())
    assert (answer.leader, answer.volume_size_limit_m_b, answer.default_replication) == (
        cluster.master.address,
        1,
        "000",
    )
    assert cluster.call("Ping", master_pb2.PingRequest()).start_time_ns > 0
    assert cluster.get("/cluster/status") == (
        200,
        {"IsLeader": True, "Leader": cluster.master.address, "MaxVolumeId": 0},
    )
    assert cluster.get("/cluster/healthz") == (200, None)
    assert cluster.get("/nope") == (404, {"error": "volume id nope not found: Unknown volume id nope"})


def test_other_calls_are_not_implemented(cluster: Cluster) -> None:
    with pytest.raises(RpcFailure) as caught:
        cluster.call("VolumeList", master_pb2.VolumeListRequest())
    assert (caught.value.code, caught.value.details) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "method VolumeList not implemented",
    )


# -- ids, flags, process ----------------------------------------------------------------------------------------------


def test_ids_survive_a_restart(tmp_path: Path) -> None:
    first = Sequence(str(tmp_path))
    assert [first.next_vid(), first.next_vid()] == [1, 2]
    last = max(first.next_keys(10) for _ in range(3))
    second = Sequence(str(tmp_path))
    assert second.next_vid() == 3
    assert second.next_keys(1) > last + 9


def test_a_port_with_connections_that_have_just_ended_was_refused() -> None:
    port, grpc_port = free_ports(2)
    for _ in range(2):
        master = DevMaster(Options(port=port, grpc_port=grpc_port))
        master.start()
        master.stop()


def test_pick_prefers_the_server_that_was_wished_for() -> None:
    topology = Topology(1 << 20, Sequence())
    for name in ("1", "2"):
        beat = master_pb2.Heartbeat(
            ip="h", port=int(name), rack=f"r{name}", volumes=[volume(3, replica_placement=10)], id=name
        )
        node, _ = topology.register(beat)
        assert node is not None
        topology.apply(node, beat)
    wish = Wish.parse({"replication": "010", "rack": "r2"}, "000")
    assert {topology.pick(1, wish).nodes[0].id for _ in range(20)} == {"2"}
    assert len(topology.pick(1, wish).nodes) == 2
    assert topology.writable(Layout("", 10, 0, "")).keys() == {3}
    with pytest.raises(MasterError):
        topology.pick(1, Wish.parse({"replication": "010", "rack": "r3"}, "000"))


def test_flags() -> None:
    parsed = parse_options(
        ["-ip=127.0.0.2", "-port=9400", "-port.grpc=19500", "-volumeSizeLimitMB=64", "-defaultReplication=001"]
    )
    assert parsed == Options("127.0.0.2", 9400, 19500, 64, "001", "")
    assert parse_options([]) == Options()
    for wrong in (["-defaultReplication=999"], ["-volumeSizeLimitMB=0"], ["-mdir=/no/such/dir"], ["-port=x"]):
        with pytest.raises(SystemExit):
            parse_options(wrong)


def test_taken_port_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(OSError):
        DevMaster(Options(port=cluster.master.port, grpc_port=0))
    with pytest.raises(OSError, match="gRPC port"):
        DevMaster(Options(port=0, grpc_port=cluster.master.grpc_port))


def test_process_says_what_it_is_for_and_ends_on_a_signal() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvolume.devmaster", "-port=0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]
    assert "for trying pyvolume out and for its tests" in lines[0]
    assert "SeaweedFS masters" in lines[0]
    found = re.search(r"serving at 127\.0\.0\.1:(\d+)", lines[1])
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=WAIT_S)
    connection.request("GET", "/cluster/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    process.stderr.close()


def test_it_imports_nothing_of_the_server() -> None:
    program = "import sys, pyvolume.devmaster.__main__; print(*(name for name in sys.modules if 'pyvolume.' in name))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    parts = {name.split(".")[1] for name in done.stdout.split()}
    assert "devmaster" in parts
    assert not parts & {"server", "ops", "storage", "cli", "config", "security_config"}
