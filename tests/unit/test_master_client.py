"""What the server asks of masters: configuration, locations, marks, pings."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_helpers import WAIT_S, FakeMaster, wait_for

from pyvolume.errors import PyvolumeError
from pyvolume.pb import master_pb2 as pb
from pyvolume.server import master_client, rpc
from pyvolume.server.address import grpc_address, http_address, same_server, with_grpc_port
from pyvolume.server.master_client import Location, MasterClient
from pyvolume.server.rpc import Channels, RpcFailure, go_code_name
from pyvolume.types import ReplicaPlacement, Ttl


@pytest.fixture
def made() -> Iterator[Any]:
    """Makes clients and masters; ends them."""
    ends: list[Any] = []

    def make(*seeds: str, **methods: Any) -> tuple[MasterClient, FakeMaster]:
        master = FakeMaster(**methods)
        addresses = seeds or (master.address,)
        client = MasterClient(SimpleNamespace(masters=addresses, ip="10.1.1.1", port=8080))
        client.set_current(master.address)
        ends.extend((client.close, master.stop))
        return client, master

    yield make
    for end in ends:
        end()


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"127.0.0.1:{port}.{port}"


def fail(code: grpc.StatusCode, text: str) -> Any:
    def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(code, text)

    return behaviour


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "http", "dial"),
    [
        ("1.2.3.4:9333", "1.2.3.4:9333", "1.2.3.4:19333"),
        ("1.2.3.4:9333.7", "1.2.3.4:9333", "1.2.3.4:7"),
        ("host.name.org:9333.19000", "host.name.org:9333", "host.name.org:19000"),
        ("[::1]:9333", "[::1]:9333", "[::1]:19333"),
        ("[::1]:9333.19000", "[::1]:9333", "[::1]:19000"),
        ("::1:9333.19000", "[::1]:9333", "[::1]:19000"),
    ],
)
def test_addresses(address: str, http: str, dial: str) -> None:
    assert http_address(address) == http
    assert grpc_address(address) == dial
    assert same_server(address, http)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:x", "host:1.x", "host:.5", "host:60000", "host:1.70000"]
)
def test_addresses_that_cannot_be_dialled(address: str) -> None:
    with pytest.raises(ValueError, match="server address"):
        grpc_address(address)
    with pytest.raises(RpcFailure) as caught:
        rpc.dial_target(address)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def test_address_parts() -> None:
    assert with_grpc_port("h:1", 0) == "h:1"
    assert with_grpc_port("h:1", 2) == "h:1.2"
    assert http_address("nameless") == "nameless"
    assert not same_server("localhost:1", "127.0.0.1:1"), "names are not resolved"


def test_code_names_are_upstreams() -> None:
    assert go_code_name(grpc.StatusCode.CANCELLED) == "Canceled"
    assert go_code_name(grpc.StatusCode.DEADLINE_EXCEEDED) == "DeadlineExceeded"
    assert str(RpcFailure(grpc.StatusCode.NOT_FOUND, "x")) == "rpc error: code = NotFound desc = x"


# -- configuration ----------------------------------------------------------------------------------------------------


def configuration(**fields: Any) -> Any:
    return lambda request, context: pb.GetMasterConfigurationResponse(**fields)


def test_configuration(made: Any) -> None:
    backend = pb.StorageBackend(type="s3", id="default", properties={"a": "b"})
    client, _ = made(
        GetMasterConfiguration=configuration(
            metrics_address="push:9091",
            metrics_interval_seconds=15,
            storage_backends=[backend],
            default_replication="001",
            leader="l:1",
            volume_size_limit_m_b=30,
            volume_preallocate=True,
        )
    )
    found = client.get_configuration()
    assert (found.metrics_address, found.metrics_interval_s) == ("push:9091", 15)
    assert found.storage_backends == (master_client.StorageBackend("s3", "default", {"a": "b"}),)
    assert (found.default_replication, found.leader, found.preallocate) == ("001", "l:1", True)
    assert found.volume_size_limit_bytes == 30 << 20


def test_configuration_comes_from_the_first_seed_that_answers(made: Any) -> None:
    _, master = made(GetMasterConfiguration=configuration(leader="me:1"))
    client = MasterClient(SimpleNamespace(masters=(unused_address(), "nonsense", master.address), ip="", port=0))
    try:
        assert client.get_configuration().leader == "me:1"
    finally:
        client.close()


def test_waiting_for_a_master_ends_in_time_or_when_stopped() -> None:
    client = MasterClient(SimpleNamespace(masters=(unused_address(),), ip="", port=0))
    started = time.monotonic()
    assert client.wait_for_configuration(0.4, threading.Event(), pause_s=0.05) is None
    assert time.monotonic() - started < WAIT_S / 2
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert client.wait_for_configuration(1000.0, stop, pause_s=0.05) is None
    client.close()


def test_configuration_that_comes_later_is_applied_once(made: Any) -> None:
    answers = iter([False, False, True])

    def late(request: Any, context: grpc.ServicerContext) -> Any:
        if not next(answers):
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.GetMasterConfigurationResponse(leader="now:1")

    client, _ = made(GetMasterConfiguration=late)
    got: list[Any] = []
    thread = client.when_configured(got.append, threading.Event(), pause_s=0.01)
    thread.join(WAIT_S)
    assert [answer.leader for answer in got] == ["now:1"]


# -- lookups ----------------------------------------------------------------------------------------------------------


def located(request: Any, context: grpc.ServicerContext) -> Any:
    answer = pb.LookupVolumeResponse()
    for asked in request.volume_or_file_ids:
        entry = answer.volume_id_locations.add(volume_or_file_id=asked)
        if asked == "9":
            entry.error = "volume id 9 not found"
        elif asked != "8":
            entry.locations.add(url="a:1", public_url="pa:1", grpc_port=11, data_center="dc")
            entry.locations.add(url="b:2")
    return answer


def test_lookup_is_cached_for_ten_minutes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, master = made(LookupVolume=located)
    expected = [Location("a:1", "pa:1", 11, "dc"), Location("b:2")]
    assert client.lookup_volume(3, request_id="r1") == expected
    assert client.lookup_volume(3) == expected
    assert len(master.requests("LookupVolume")) == 1
    assert master.metadata[0]["x-amz-request-id"] == "r1"
    client.invalidate(3)
    client.lookup_volume(3)
    assert len(master.requests("LookupVolume")) == 2
    real = time.monotonic
    monkeypatch.setattr(master_client.time, "monotonic", lambda: real() + master_client.CACHE_S - 5)
    client.lookup_volume(3)
    assert len(master.requests("LookupVolume")) == 2
    monkeypatch.setattr(master_client.time, "monotonic", lambda: real() + master_client.CACHE_S + 5)
    client.lookup_volume(3)
    assert len(master.requests("LookupVolume")) == 3


@pytest.mark.parametrize("vid", [9, 8, 0])
def test_what_the_master_does_not_know_is_asked_again(made: Any, vid: int) -> None:
    client, master = made(LookupVolume=located)
    for _ in range(2):
        assert client.lookup_volume(vid) == ([] if vid else [Location("a:1", "pa:1", 11, "dc"), Location("b:2")])
    assert len(master.requests("LookupVolume")) == 2


def test_changing_a_result_does_not_change_the_cache(made: Any) -> None:
    client, _ = made(LookupVolume=located)
    client.lookup_volume(3).clear()
    assert len(client.lookup_volume(3)) == 2


def test_one_call_serves_all_who_wait(made: Any) -> None:
    go_on = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        go_on.wait(WAIT_S)
        return located(request, context)

    client, master = made(LookupVolume=slow)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(client.lookup_volume(3))) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_for(lambda: master.requests("LookupVolume"))
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 20
    assert len(master.requests("LookupVolume")) == 1


def test_failure_reaches_all_who_wait_and_is_not_cached(made: Any) -> None:
    client, master = made(LookupVolume=fail(grpc.StatusCode.UNKNOWN, "raft.Server: Not current leader"))
    for _ in range(2):
        with pytest.raises(RpcFailure) as caught:
            client.lookup_volume(3)
        assert str(caught.value) == "rpc error: code = Unknown desc = raft.Server: Not current leader"
    assert len(master.requests("LookupVolume")) == 2


def test_lookup_has_a_deadline_also_for_those_who_wait(made: Any) -> None:
    hold = threading.Event()

    def never(request: Any, context: grpc.ServicerContext) -> Any:
        hold.wait(WAIT_S)
        return located(request, context)

    client, master = made(LookupVolume=never)
    codes: list[grpc.StatusCode] = []

    def ask_first() -> None:
        try:
            client.lookup_volume(3, timeout_s=3.0)
        except RpcFailure as exc:
            codes.append(exc.code)

    first = threading.Thread(target=ask_first)
    first.start()
    wait_for(lambda: master.requests("LookupVolume"))
    with pytest.raises(RpcFailure) as caught:
        client.lookup_volume(3, timeout_s=0.1)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    first.join(WAIT_S)
    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED]
    hold.set()


def test_lookups_at_once_are_bounded(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_client, "MAX_LOOKUPS_AT_ONCE", 1)
    hold = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        hold.wait(WAIT_S)
        return located(request, context)

    client, master = made(LookupVolume=slow)
    first = threading.Thread(target=client.lookup_volume, args=(3,))
    first.start()
    wait_for(lambda: master.requests("LookupVolume"))
    with pytest.raises(RpcFailure) as caught:
        client.lookup_volume(4, timeout_s=0.1)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    hold.set()
    first.join(WAIT_S)
    assert len(client.lookup_volume(4)) == 2


def test_lookup_without_a_master_yet() -> None:
    client = MasterClient(SimpleNamespace(masters=(), ip="", port=0))
    with pytest.raises(RpcFailure) as caught:
        client.lookup_volume(3)
    assert str(caught.value) == (
        'rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: '
        'dial tcp: missing address"'
    )


@pytest.mark.parametrize("reached", [True, False])
def test_who_asks_while_the_server_connects_for_the_first_time_waits(made: Any, reached: bool) -> None:
    """A mark right after a start failed with "missing address" although a master was there."""
    _, master = made(VolumeMarkReadonly=lambda request, context: pb.VolumeMarkReadonlyResponse())
    client = MasterClient(SimpleNamespace(masters=(master.address,), ip="10.1.1.1", port=8080))
    client.first_try_begins()
    outcome: list[str] = []

    def mark() -> None:
        try:
            client.mark_readonly(VOLUME, True)
            outcome.append("marked")
        except PyvolumeError as exc:
            outcome.append(str(exc))

    asking = threading.Thread(target=mark)
    asking.start()
    asking.join(0.2)
    assert not outcome, "the first try is not over"
    if reached:
        client.set_current(master.address)
    else:
        client.first_try_ends()
    asking.join(WAIT_S)
    assert [reached] == [text == "marked" for text in outcome]
    if not reached:
        assert "missing address" in outcome[0]
    client.close()


def test_refused_connection_has_upstreams_words() -> None:
    address = unused_address()
    client = MasterClient(SimpleNamespace(masters=(address,), ip="", port=0))
    client.set_current(address)
    with pytest.raises(RpcFailure) as caught:
        client.lookup_volume(3)
    dialled = grpc_address(address)
    assert str(caught.value) == (
        'rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: '
        f'dial tcp {dialled}: connect: connection refused"'
    )
    client.close()


def test_lookup_of_shards(made: Any) -> None:
    def shards(request: Any, context: grpc.ServicerContext) -> Any:
        answer = pb.LookupEcVolumeResponse(volume_id=request.volume_id)
        answer.shard_id_locations.add(shard_id=0, locations=[pb.Location(url="a:1")])
        answer.shard_id_locations.add(shard_id=13, locations=[pb.Location(url="a:1"), pb.Location(url="b:2")])
        return answer

    client, _ = made(LookupEcVolume=shards)
    assert client.lookup_ec_volume(4) == {0: [Location("a:1")], 13: [Location("a:1"), Location("b:2")]}


# -- marks ------------------------------------------------------------------------------------------------------------

VOLUME = SimpleNamespace(
    vid=7, collection="c", replica_placement=ReplicaPlacement.parse("010"), ttl=Ttl.parse("3d"), disk_type="ssd"
)


def test_mark_tells_the_current_master(made: Any) -> None:
    client, master = made(VolumeMarkReadonly=lambda request, context: pb.VolumeMarkReadonlyResponse())
    client.mark_readonly(VOLUME, True, request_id="rid")
    client.mark_readonly(VOLUME, False)
    on, off = master.requests("VolumeMarkReadonly")
    assert (on.ip, on.port, on.volume_id, on.collection) == ("10.1.1.1", 8080, 7, "c")
    assert (on.replica_placement, on.ttl, on.disk_type, on.version) == (10, 3 << 8 | 3, "ssd", 0)
    assert (on.is_readonly, off.is_readonly) == (True, False)
    assert master.metadata[0]["x-amz-request-id"] == "rid"


def test_mark_that_the_master_refuses(made: Any) -> None:
    client, master = made(VolumeMarkReadonly=fail(grpc.StatusCode.INTERNAL, "broken"))
    with pytest.raises(PyvolumeError) as caught:
        client.mark_readonly(VOLUME, True)
    assert str(caught.value) == (
        f"grpc VolumeMarkReadonly with master {master.http_address}: set volume 7 to read only on master: "
        "rpc error: code = Internal desc = broken"
    )


def test_mark_goes_to_the_leader_when_the_master_does_not_lead(made: Any) -> None:
    _, leader = made(VolumeMarkReadonly=lambda request, context: pb.VolumeMarkReadonlyResponse())
    client, follower = made(
        VolumeMarkReadonly=fail(grpc.StatusCode.UNKNOWN, "raft.Server: Not current leader"),
        GetMasterConfiguration=configuration(leader=leader.address),
    )
    client.mark_readonly(VOLUME, True)
    assert len(leader.requests("VolumeMarkReadonly")) == 1
    assert client.current_master == follower.address, "the heartbeat alone changes that"


def test_mark_without_a_leader(made: Any) -> None:
    client, master = made(
        VolumeMarkReadonly=fail(grpc.StatusCode.UNKNOWN, "raft.Server: Not current leader"),
        GetMasterConfiguration=fail(grpc.StatusCode.PERMISSION_DENIED, "no"),
    )
    with pytest.raises(RpcFailure) as caught:
        client.mark_readonly(VOLUME, True)
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert str(caught.value) == (
        f"heartbeat master {master.http_address} rejected mark-readonly and leader lookup failed: "
        "lookup raft leader from 1 master peer(s): rpc error: code = PermissionDenied desc = no"
    )


def test_mark_when_no_seed_names_a_leader(made: Any) -> None:
    client, master = made(
        VolumeMarkReadonly=fail(grpc.StatusCode.UNKNOWN, "raft.Server: Not current leader"),
        GetMasterConfiguration=configuration(leader=""),
    )
    with pytest.raises(RpcFailure, match=f"master {master.http_address} returned empty leader"):
        client.mark_readonly(VOLUME, True)


def test_mark_before_any_master_was_reached() -> None:
    client = MasterClient(SimpleNamespace(masters=("127.0.0.1:9",), ip="h", port=1))
    with pytest.raises(PyvolumeError) as caught:
        client.mark_readonly(VOLUME, False)
    assert str(caught.value).startswith(
        "grpc VolumeMarkReadonly with master : set volume 7 to read only on master: rpc error: code = Unavailable"
    )


# -- ping, channels ---------------------------------------------------------------------------------------------------


def test_ping(made: Any) -> None:
    client, master = made(Ping=lambda request, context: pb.PingResponse(start_time_ns=77))
    assert client.ping(master.address) == 77


def test_known_masters(made: Any) -> None:
    client, master = made("seed:1.5", Ping=lambda request, context: pb.PingResponse())
    assert client.knows("seed:1")
    assert client.knows("seed:1.77")
    assert client.knows(master.http_address)
    assert not client.knows("seed:2")
    assert not client.knows("")


def test_channel_is_dialled_anew_after_the_master_was_away(made: Any) -> None:
    client, master = made(Ping=lambda request, context: pb.PingResponse(start_time_ns=1))
    assert client.ping(master.address) == 1
    before = client.channels.get(master.address)
    master.stop()
    with pytest.raises(RpcFailure) as caught:
        client.ping(master.address, timeout_s=5.0)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert client.channels.get(master.address) is not before


def test_channels_are_shared_bounded_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CACHED_CHANNELS", 2)
    channels = Channels()
    first = channels.get("127.0.0.1:1")
    assert channels.get("127.0.0.1:1") is first
    channels.get("127.0.0.1:2")
    channels.get("127.0.0.1:3")
    assert channels.get("127.0.0.1:1") is not first, "the oldest one went"
    channels.close()
    channels.close()
    with pytest.raises(RpcFailure):
        channels.get("127.0.0.1:1")


def test_credentials_are_asked_for_each_channel() -> None:
    asked: list[int] = []

    def credentials() -> None:
        asked.append(1)

    channels = Channels(credentials)
    channels.get("127.0.0.1:1")
    channels.get("127.0.0.1:1")
    channels.get("127.0.0.1:2")
    assert len(asked) == 2
    channels.close()
