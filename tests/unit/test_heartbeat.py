"""The heartbeat: what is sent when, and how answers are obeyed (contract grpc.md 12)."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_helpers import WAIT_S, BeatLog, FakeMaster, wait_for
from test_master_client import unused_address

from pyvolume.digest import report_hash
from pyvolume.pb import master_pb2 as pb
from pyvolume.server import heartbeat as heartbeat_module
from pyvolume.server.heartbeat import Heartbeat, VolumeReport
from pyvolume.server.master_client import MasterClient
from pyvolume.server.rpc import RpcFailure
from pyvolume.storage.ec.volume import EcShardsInfo

PULSE_S = 0.05


@dataclass(frozen=True)
class Info:
    """A volume as the store reports it."""

    id: int
    size: int = 8
    collection: str = ""
    file_count: int = 0
    delete_count: int = 0
    deleted_byte_count: int = 0
    read_only: bool = False
    replica_placement: int = 0
    version: int = 3
    ttl: int = 0
    compact_revision: int = 0
    modified_at_second: int = 1795424088
    remote_storage_name: str = ""
    remote_storage_key: str = ""
    disk_type: str = ""
    disk_id: int = 0
    max_file_key: int = 0


class FakeEc:
    """The erasure coded volumes of a store: those given, none of which expires but once."""

    def __init__(self) -> None:
        self.held: list[EcHeld] = []
        self.expired: list[EcShardsInfo] = []

    def volumes(self) -> list[EcHeld]:
        return list(self.held)

    def remove_expired(self) -> list[EcShardsInfo]:
        gone, self.expired = self.expired, []
        return gone


class EcHeld:
    def __init__(self, info: EcShardsInfo) -> None:
        self._info = info

    def info(self) -> EcShardsInfo:
        return self._info


class FakeStore:
    """The part of the store that a heartbeat looks at."""

    def __init__(self, *infos: Info) -> None:
        self.infos = list(infos)
        self.ec = FakeEc()
        self.preallocate = False
        self.volume_size_limit = 0
        self.adjusts = iter(())
        self.adjusted = 0
        self.listeners: list[Callable[[str, Any], None]] = []
        usage = SimpleNamespace(all_bytes=1000, free_bytes=400)
        self.locations = [
            SimpleNamespace(
                directory=f"/d{number}",
                disk_type=kind,
                disk_id=number,
                is_unavailable=False,
                effective_max=slots,
                usage=usage,
                uuid=f"uuid-{number}",
                tags=tags,
            )
            for number, (kind, slots, tags) in enumerate((("", 7, ("a", "b")), ("ssd", 3, ()), ("", 2, ())))
        ]

    def subscribe(self, listener: Callable[[str, Any], None]) -> None:
        self.listeners.append(listener)

    def change(self, kind: str, info: Info) -> None:
        for listener in self.listeners:
            listener(kind, info)

    def heartbeat_volumes(self) -> list[Info]:
        return list(self.infos)

    def max_file_key(self) -> int:
        return max((info.max_file_key for info in self.infos), default=0)

    def recompute_auto_max(self) -> bool:
        self.adjusted += 1
        return next(self.adjusts, False)


CONFIG = {
    "ip": "10.0.0.1",
    "port": 8080,
    "grpc_port": 18080,
    "public_url": "pub:8080",
    "server_id": "node-1",
    "data_center": "dc1",
    "rack": "r1",
}


class Bench:
    """Starts heartbeats and masters, ends them."""

    def __init__(self) -> None:
        self._ends: list[Callable[[], Any]] = []

    def master(self, reply: Callable[[int, int, Any], Iterator[Any]]) -> tuple[FakeMaster, BeatLog]:
        log = BeatLog(reply)
        master = FakeMaster(SendHeartbeat=log)
        self._ends.append(master.stop)
        return master, log

    def beat(self, store: FakeStore, *seeds: str, start: bool = True, **kwargs: Any) -> Heartbeat:
        config = SimpleNamespace(masters=seeds, **CONFIG)
        client = MasterClient(config)
        kwargs = {"pulse_s": PULSE_S, "redirect_pause_s": 0.0, "duplicate_pause_s": 0.01, **kwargs}
        heart = Heartbeat(SimpleNamespace(master=client), store, config, **kwargs)
        self._ends += [client.close, lambda: heart.stop(goodbye=False)]
        if start:
            heart.start()
        return heart

    def end(self) -> None:
        for end in reversed(self._ends):
            end()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.end()


def silent(stream: int, number: int, beat: Any) -> Iterator[Any]:
    """A master that says nothing."""
    return iter(())


def modern(stream: int, number: int, beat: Any) -> Iterator[Any]:
    """A master that answers the first message as upstream's does."""
    if number == 0:
        yield pb.HeartbeatResponse(volume_size_limit=1 << 20, volume_digest_supported=True)


# -- hash and report --------------------------------------------------------------------------------------------------


def test_hash_has_upstreams_values() -> None:
    volume = Info(5, collection="cc", replica_placement=1, ttl=771)
    assert report_hash(volume) == 7754252933588234796
    assert report_hash(replace(volume, read_only=True)) == 10365280101075984987
    assert report_hash(replace(volume, remote_storage_key="k")) == report_hash(volume)


@pytest.mark.parametrize(
    "change",
    [
        {"id": 6},
        {"size": 9},
        {"file_count": 1},
        {"delete_count": 1},
        {"deleted_byte_count": 1},
        {"replica_placement": 2},
        {"version": 2},
        {"ttl": 772},
        {"compact_revision": 1},
        {"disk_id": 1},
        {"modified_at_second": 1},
        {"collection": "cd"},
        {"disk_type": "ssd"},
        {"remote_storage_name": "s3.x"},
    ],
)
def test_hash_depends_on(change: dict[str, Any]) -> None:
    volume = Info(5, collection="cc", replica_placement=1, ttl=771)
    assert report_hash(replace(volume, **change)) != report_hash(volume)


def test_counts_are_cut_to_32_bits() -> None:
    assert report_hash(Info(1, file_count=1 << 32)) == report_hash(Info(1, file_count=(1 << 32) - 1))


def accepting() -> VolumeReport:
    report = VolumeReport()
    report.accept_changes()
    return report


def build(report: VolumeReport, *infos: Info) -> tuple[bool, list[Any], list[int], int]:
    """One report: (full?, infos to send, ids that are gone, digest)."""
    turn = report.begin()
    send, gone, digest = report.build(infos, turn)
    return turn.full, send, sorted(short.id for short in gone), digest


def test_report_is_full_until_changes_are_accepted() -> None:
    report = VolumeReport()
    for _ in range(3):
        full, send, gone, digest = build(report, Info(1), Info(2))
        assert (full, send, gone) == (True, [Info(1), Info(2)], [])
        assert digest == report_hash(Info(1)) ^ report_hash(Info(2))
    report.accept_changes()
    assert build(report, Info(1), Info(2))[:3] == (False, [], [])


def test_report_of_changes() -> None:
    report = accepting()
    assert build(report, Info(1), Info(2))[0]
    grown = Info(2, size=99)
    full, send, gone, digest = build(report, Info(1), grown, Info(3))
    assert (full, send, gone) == (False, [grown, Info(3)], [])
    assert digest == report_hash(Info(1)) ^ report_hash(grown) ^ report_hash(Info(3))
    full, send, gone, digest = build(report, Info(3))
    assert (full, send, gone, digest) == (False, [], [1, 2], report_hash(Info(3)))
    assert build(report, Info(3))[1:3] == ([], []), "what is gone is said once"


def test_empty_report_has_digest_zero() -> None:
    assert build(accepting()) == (True, [], [], 0)


def test_copy_that_moved_to_another_disk_is_not_gone() -> None:
    report = accepting()
    build(report, Info(1, disk_id=0))
    assert build(report, Info(1, disk_id=1))[1:3] == ([Info(1, disk_id=1)], [])


def test_reset_makes_the_next_report_full() -> None:
    report = accepting()
    build(report, Info(1))
    report.reset()
    assert build(report, Info(1))[:2] == (True, [Info(1)])
    assert build(report, Info(1))[0], "changes must be accepted anew"


def test_request_for_the_whole_list() -> None:
    report = accepting()
    build(report, Info(1), Info(2))
    report.request_full()
    assert build(report, Info(1))[:3] == (True, [Info(1)], []), "a whole list needs no list of what is gone"
    assert not build(report, Info(1))[0]


def test_request_that_comes_while_a_report_is_made_counts_for_the_next() -> None:
    report = accepting()
    build(report, Info(1))
    turn = report.begin()
    report.request_full()
    report.build([Info(1)], turn)
    assert not turn.full
    assert build(report, Info(1))[0]
    assert not build(report, Info(1))[0]


def test_unchanged_volumes_are_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    report = accepting()
    build(report, Info(1), Info(2))
    hashed: list[int] = []
    monkeypatch.setattr(heartbeat_module, "report_hash", lambda info: hashed.append(info.id) or report_hash(info))
    build(report, Info(1), Info(2, size=50))
    assert hashed == [2]


# -- messages ---------------------------------------------------------------------------------------------------------


def test_first_messages(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore(Info(1, max_file_key=5), Info(2, collection="c", ttl=771, max_file_key=9))
    bench.beat(store, master.address)
    wait_for(lambda: log.streams and len(log.streams[0]) >= 2)
    first, second = log.streams[0][:2]
    assert (first.ip, first.port, first.grpc_port) == ("10.0.0.1", 8080, 18080)
    assert (first.public_url, first.id, first.data_center, first.rack) == ("pub:8080", "node-1", "dc1", "r1")
    assert first.max_file_key == 9
    assert dict(first.max_volume_counts) == {"": 9, "ssd": 3}
    assert dict(first.disk_total_bytes) == {"": 2000, "ssd": 1000}
    assert dict(first.disk_free_bytes) == {"": 800, "ssd": 400}
    assert list(first.location_uuids) == ["uuid-0", "uuid-1", "uuid-2"]
    assert [(tag.disk_id, list(tag.tags), tag.type, tag.max_volume_count) for tag in first.disk_tags] == [
        (0, ["a", "b"], "", 7),
        (1, [], "ssd", 3),
        (2, [], "", 2),
    ]
    assert [(v.id, v.collection, v.ttl, v.size, v.modified_at_second) for v in first.volumes] == [
        (1, "", 0, 8, 1795424088),
        (2, "c", 771, 8, 1795424088),
    ]
    assert first.HasField("volume_digest")
    assert first.volume_digest == report_hash(store.infos[0]) ^ report_hash(store.infos[1])
    assert (first.has_no_volumes, first.has_no_ec_shards) == (False, True)
    assert not first.HasField("state")
    assert (first.admin_port, len(first.new_volumes), len(first.new_ec_shards), len(first.ec_shards)) == (0, 0, 0, 0)
    assert second == pb.Heartbeat(has_no_ec_shards=True), "the EC message says nothing else"


def test_unavailable_disk_has_no_slots_and_no_bytes(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore()
    store.locations[1].is_unavailable = True
    bench.beat(store, master.address)
    wait_for(log.all)
    first = log.streams[0][0]
    assert "ssd" not in first.max_volume_counts
    assert "ssd" not in first.disk_total_bytes
    assert first.disk_tags[1].max_volume_count == 0
    assert len(first.location_uuids) == 3


def test_empty_server(bench: Bench) -> None:
    master, log = bench.master(modern)
    bench.beat(FakeStore(), master.address)
    wait_for(lambda: log.streams and len(log.streams[0]) >= 4)
    first, _, later, _ = log.streams[0][:4]
    assert first.has_no_volumes
    assert first.HasField("volume_digest")
    assert later.HasField("volume_digest")
    assert not later.has_no_volumes, "a list of changes never says that there is nothing"


def test_lists_stay_full_for_a_master_without_digests(bench: Bench) -> None:
    master, log = bench.master(silent)
    bench.beat(FakeStore(Info(1)), master.address)
    wait_for(lambda: log.streams and len(log.streams[0]) >= 5)
    beats = [beat for beat in log.streams[0] if beat.ip]
    assert all([volume.id for volume in beat.volumes] == [1] for beat in beats)
    assert all(not beat.changed_volumes for beat in beats)


def test_changes_only_for_a_master_with_digests(bench: Bench) -> None:
    master, log = bench.master(modern)
    store = FakeStore(Info(1), Info(2))
    bench.beat(store, master.address)
    wait_for(lambda: len([beat for beat in log.all() if beat.ip]) >= 2)
    wait_for(lambda: not log.all()[-1].volumes and log.all()[-1].ip, "a beat of changes")
    store.infos = [Info(2, size=99)]
    changed = wait_for(lambda: [beat for beat in log.all() if beat.changed_volumes])[0]
    assert [(volume.id, volume.size) for volume in changed.changed_volumes] == [(2, 99)]
    assert [volume.id for volume in changed.deleted_volumes] == [1]
    assert not changed.volumes
    assert changed.volume_digest == report_hash(store.infos[0])


def test_master_may_ask_for_the_whole_list(bench: Bench) -> None:
    asked = threading.Event()

    def reply(stream: int, number: int, beat: Any) -> Iterator[Any]:
        yield from modern(stream, number, beat)
        if number >= 4 and not asked.is_set():
            asked.set()
            yield pb.HeartbeatResponse(volume_size_limit=1 << 20, resend_full_volume_list=True)

    master, log = bench.master(reply)
    bench.beat(FakeStore(Info(1)), master.address)
    wait_for(lambda: len([beat for beat in log.all() if beat.volumes]) >= 2, "another whole list")
    after = len(log.all())
    wait_for(lambda: len(log.all()) > after + 3)
    assert len([beat for beat in log.all() if beat.volumes]) == 2, "asked once, sent once"


def test_ec_message_comes_every_seventeenth_pulse(bench: Bench) -> None:
    master, log = bench.master(silent)
    bench.beat(FakeStore(), master.address, ec_pulses=4)
    wait_for(lambda: len([beat for beat in log.all() if not beat.ip]) >= 3)
    kinds = ["volume" if beat.ip else "ec" for beat in log.all()]
    between = [len(list(group)) for kind, group in itertools.groupby(kinds[2:]) if kind == "volume"]
    assert 2 <= between[0] <= 5, kinds
    assert heartbeat_module.PULSE_S * heartbeat_module.EC_PULSES == 85


def ec_info(vid: int, **more: Any) -> EcShardsInfo:
    return EcShardsInfo(vid, "c", 0b101, (7, 9), "ssd", 1, file_count=4, delete_count=1, encode_ts_ns=12, **more)


def test_erasure_coded_volumes_are_told_beside_the_plain_ones(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore()
    store.ec.held = [EcHeld(ec_info(5, expire_at_sec=99))]
    store.ec.expired = [ec_info(6)]
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: len(log.all()) == 2)
    volumes, shards = log.all()
    assert not volumes.has_no_ec_shards
    assert [gone.id for gone in volumes.deleted_ec_shards] == [6]
    message = pb.VolumeEcShardInformationMessage(
        id=5,
        collection="c",
        ec_index_bits=5,
        shard_sizes=[7, 9],
        disk_type="ssd",
        disk_id=1,
        expire_at_sec=99,
        file_count=4,
        delete_count=1,
        encode_ts_ns=12,
    )
    assert shards == pb.Heartbeat(ec_shards=[message])


def test_shards_that_come_and_go_are_told_at_once(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore()
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: len(log.all()) == 2)
    store.change("new-ec", EcShardsInfo(5, "", 2, (7,), "", 0, encode_ts_ns=3))
    store.change("deleted-ec", EcShardsInfo(5, "", 2, (0,), "", 0, encode_ts_ns=3))
    wait_for(lambda: len(log.all()) == 4)
    new, gone = log.all()[2:]
    assert [(one.id, one.ec_index_bits, list(one.shard_sizes)) for one in new.new_ec_shards] == [(5, 2, [7])]
    assert [(one.id, one.ec_index_bits, list(one.shard_sizes)) for one in gone.deleted_ec_shards] == [(5, 2, [0])]
    assert (new.ip, new.port, gone.ip) == ("10.0.0.1", 8080, "10.0.0.1")


# -- deltas -----------------------------------------------------------------------------------------------------------


def deltas(log: BeatLog) -> list[Any]:
    return [beat for beat in log.all() if beat.new_volumes or (beat.deleted_volumes and not beat.id)]


def test_deltas_are_sent_at_once_and_alone(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore()
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: len(log.all()) == 2)
    store.change("new", Info(5, collection="c", replica_placement=1, ttl=771, disk_type="ssd", disk_id=1, size=77))
    wait_for(lambda: deltas(log))
    store.change("deleted", Info(6))
    wait_for(lambda: len(deltas(log)) == 2)
    new, gone = deltas(log)
    short = pb.VolumeShortInformationMessage(
        id=5, collection="c", replica_placement=1, version=3, ttl=771, disk_type="ssd", disk_id=1
    )
    place = {"ip": "10.0.0.1", "port": 8080, "data_center": "dc1", "rack": "r1"}
    assert new == pb.Heartbeat(new_volumes=[short], **place)
    assert gone == pb.Heartbeat(deleted_volumes=[pb.VolumeShortInformationMessage(id=6, version=3)], **place)


def test_deltas_of_one_kind_travel_together_and_in_order(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore()
    heart = bench.beat(store, master.address, start=False)
    for kind, vid in (("new", 1), ("new", 2), ("deleted", 1), ("new", 1), ("new", 3)):
        store.change(kind, Info(vid))
    heart.start()
    wait_for(lambda: len(deltas(log)) == 3)
    shown = [([v.id for v in beat.new_volumes], [v.id for v in beat.deleted_volumes]) for beat in deltas(log)]
    assert shown == [([1, 2], []), ([], [1]), ([1, 3], [])]
    assert log.streams[0][0].id, "the whole list goes first"


def test_full_queue_drops_deltas_for_a_whole_list_and_blocks_nobody(bench: Bench) -> None:
    gate = threading.Event()

    def reply(stream: int, number: int, beat: Any) -> Iterator[Any]:
        yield from modern(stream, number, beat)
        if number == 0:
            gate.wait(WAIT_S)

    master, log = bench.master(reply)
    store = FakeStore(Info(1))
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: len(log.all()) == 1)
    for number in range(heartbeat_module.MAX_QUEUED_DELTAS * 3):
        store.change(("new", "deleted")[number % 2], Info(number))
    gate.set()
    wait_for(lambda: len([beat for beat in log.all() if beat.volumes]) >= 2, "a whole list")
    assert len(deltas(log)) < heartbeat_module.MAX_QUEUED_DELTAS


def test_unknown_kind_of_change_is_an_error(bench: Bench) -> None:
    store = FakeStore()
    bench.beat(store, start=False)
    with pytest.raises(ValueError, match="shrunk"):
        store.change("shrunk", Info(1))


# -- obeying ----------------------------------------------------------------------------------------------------------


def test_limit_and_preallocate_are_taken(bench: Bench) -> None:
    def reply(stream: int, number: int, beat: Any) -> Iterator[Any]:
        if number == 0:
            yield pb.HeartbeatResponse(volume_size_limit=123, preallocate=True)
        if number == 3:
            yield pb.HeartbeatResponse()

    master, _ = bench.master(reply)
    store = FakeStore()
    bench.beat(store, master.address)
    wait_for(lambda: store.preallocate and store.volume_size_limit == 123)
    wait_for(lambda: not store.preallocate, "absent means false")
    assert store.volume_size_limit == 123, "absent means unchanged"


def test_changed_maximum_is_sent_at_once(bench: Bench) -> None:
    master, log = bench.master(modern)
    store = FakeStore()
    store.adjusts = iter([True])
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: len([beat for beat in log.all() if beat.ip]) == 2, "a second volume beat")
    assert len(log.all()) == 3


def test_maximum_that_stays_sends_nothing(bench: Bench) -> None:
    master, log = bench.master(modern)
    store = FakeStore()
    bench.beat(store, master.address, pulse_s=600.0)
    wait_for(lambda: store.adjusted == 1)
    time.sleep(0.1)
    assert len(log.all()) == 2


def test_maximum_is_recomputed_before_each_beat(bench: Bench) -> None:
    master, _ = bench.master(silent)
    store = FakeStore()
    bench.beat(store, master.address)
    wait_for(lambda: store.adjusted >= 3)


def test_pulse_now(bench: Bench) -> None:
    master, log = bench.master(silent)
    heart = bench.beat(FakeStore(), master.address, pulse_s=600.0)
    wait_for(lambda: len(log.all()) == 2)
    heart.pulse_now()
    wait_for(lambda: len(log.all()) == 3)


# -- connections ------------------------------------------------------------------------------------------------------


def test_redirect_to_the_leader(bench: Bench) -> None:
    leader, leader_log = bench.master(modern)

    def elsewhere(stream: int, number: int, beat: Any) -> Iterator[Any]:
        yield pb.HeartbeatResponse(leader=leader.address)

    follower, follower_log = bench.master(elsewhere)
    heart = bench.beat(FakeStore(Info(1)), follower.address, pulse_s=0.5)
    wait_for(leader_log.all)
    wait_for(lambda: heart.current_master == leader.address)
    assert [volume.id for volume in leader_log.streams[0][0].volumes] == [1], "a new stream begins with all"
    assert len(follower_log.streams) == 1


def test_leader_that_is_the_same_server_is_no_redirect(bench: Bench) -> None:
    def me(stream: int, number: int, beat: Any) -> Iterator[Any]:
        yield pb.HeartbeatResponse(leader=master.http_address)

    master, log = bench.master(me)
    bench.beat(FakeStore(), master.address)
    wait_for(lambda: len(log.all()) >= 4)
    assert len(log.streams) == 1


def test_next_seed_when_one_is_down(bench: Bench) -> None:
    master, log = bench.master(silent)
    down = unused_address()
    heart = bench.beat(FakeStore(), down, "no port", master.address)
    wait_for(log.all)
    assert heart.current_master == master.address
    assert heart.disconnections == {down.rpartition(".")[0]: 1, "no port": 1}


def test_stream_that_breaks_is_opened_again(bench: Bench) -> None:
    def breaks(stream: int, number: int, beat: Any) -> Iterator[Any]:
        if stream == 0 and number == 1:
            raise RuntimeError("on purpose")
        yield from modern(stream, number, beat)

    master, log = bench.master(breaks)
    store = FakeStore(Info(1))
    heart = bench.beat(store, master.address)
    wait_for(lambda: len(log.streams) >= 2 and log.streams[1])
    assert heart.current_master == master.address
    assert [volume.id for volume in log.streams[1][0].volumes] == [1], "all again"


def test_stream_that_the_master_ends_is_opened_again(bench: Bench) -> None:
    class OneBeat(BeatLog):
        def __call__(self, beats: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            self.streams.append([next(beats)])
            yield pb.HeartbeatResponse()

    log = OneBeat(silent)
    master = FakeMaster(SendHeartbeat=log)
    bench._ends.append(master.stop)
    bench.beat(FakeStore(), master.address)
    wait_for(lambda: len(log.streams) >= 3)


def test_error_of_the_store_does_not_end_the_heartbeat(bench: Bench) -> None:
    master, log = bench.master(silent)
    store = FakeStore(Info(1))
    good = store.heartbeat_volumes
    failures = iter([OSError("disk"), None])

    def sometimes() -> list[Info]:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return good()

    store.heartbeat_volumes = sometimes  # type: ignore[method-assign]
    bench.beat(store, master.address)
    wait_for(lambda: [beat for beat in log.all() if beat.volumes])


def test_without_masters_nothing_happens(bench: Bench) -> None:
    heart = bench.beat(FakeStore())
    heart._thread.join(WAIT_S)
    assert not heart._thread.is_alive()
    assert heart.alive
    assert heart.current_master == ""


def test_duplicate_directories_back_off_and_end_the_process(bench: Bench) -> None:
    def duplicate(stream: int, number: int, beat: Any) -> Iterator[Any]:
        yield pb.HeartbeatResponse(duplicated_uuids=["uuid-1"])

    master, log = bench.master(duplicate)
    ended: list[tuple[int, str]] = []
    times: list[float] = []

    def fatal(status: int, text: str) -> None:
        ended.append((status, text))
        heart.stop(goodbye=False, wait_s=0)

    heart = bench.beat(FakeStore(), master.address, start=False, duplicate_pause_s=0.1, on_fatal=fatal)
    real_sleep = heart._sleep
    heart._sleep = lambda seconds: (times.append(seconds), real_sleep(seconds))[1]  # type: ignore[method-assign]
    heart.start()
    wait_for(lambda: ended)
    assert [round(pause, 3) for pause in times[:3]] == [0.1, 0.2, 0.4]
    assert len(log.streams) == 4
    status, text = ended[0]
    assert status == 1
    assert "persistent duplicate volume directories after 3 retries: [/d1]" in text


def test_another_error_resets_the_count_of_duplicates(bench: Bench) -> None:
    def mixed(stream: int, number: int, beat: Any) -> Iterator[Any]:
        if stream % 2:
            raise RuntimeError("on purpose")
        yield pb.HeartbeatResponse(duplicated_uuids=["uuid-1"])

    master, log = bench.master(mixed)
    ended: list[int] = []
    bench.beat(FakeStore(), master.address, pulse_s=0.01, on_fatal=lambda status, text: ended.append(status))
    wait_for(lambda: len(log.streams) >= 12)
    assert not ended


# -- end --------------------------------------------------------------------------------------------------------------


def test_stop_says_goodbye_and_half_closes(bench: Bench) -> None:
    master, log = bench.master(modern)
    store = FakeStore(Info(1))
    heart = bench.beat(store, master.address)
    wait_for(lambda: len(log.all()) >= 2)
    assert heart.alive
    heart.stop()
    assert not heart.alive
    assert log.half_closed == [True], "the master saw the end of the stream, not a cancellation"
    last = log.all()[-1]
    assert last == pb.Heartbeat(
        ip="10.0.0.1", port=8080, public_url="pub:8080", data_center="dc1", rack="r1", has_no_volumes=True
    )
    store.change("new", Info(9))
    heart.stop()
    assert not heart._deltas, "changes are dropped from then on"
    assert len(log.streams) == 1


def test_goodbye_does_not_wait_for_a_master_that_hangs(bench: Bench) -> None:
    hold = threading.Event()

    def hang(stream: int, number: int, beat: Any) -> Iterator[Any]:
        hold.wait(WAIT_S)
        return iter(())

    master, log = bench.master(hang)
    heart = bench.beat(FakeStore(), master.address)
    wait_for(log.all)
    started = time.monotonic()
    heart.stop()
    assert time.monotonic() - started < WAIT_S / 2
    assert not heart._thread.is_alive()
    hold.set()


def test_master_that_does_not_read_gets_no_pile_of_messages(bench: Bench) -> None:
    hold = threading.Event()

    class Deaf(BeatLog):
        def __call__(self, beats: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            self.streams.append([next(beats)])
            hold.wait(WAIT_S)
            yield from super().__call__(beats, context)

    log = Deaf(modern)
    master = FakeMaster(SendHeartbeat=log)
    bench._ends.append(master.stop)
    store = FakeStore(*(Info(vid, collection="c" * 20000) for vid in range(200)))  # about 4 MB a beat
    calls = iter(range(10**6))
    good = store.heartbeat_volumes
    asked: list[int] = []
    store.heartbeat_volumes = lambda: (asked.append(next(calls)), good())[1]  # type: ignore[method-assign]
    heart = bench.beat(store, master.address, pulse_s=0.01)

    def has_stopped() -> bool:
        before = len(asked)
        time.sleep(0.3)  # thirty pulses
        return before >= heartbeat_module.MAX_UNSENT_MESSAGES and len(asked) == before

    wait_for(has_stopped, "an end of the messages")
    heart.stop(goodbye=False)
    hold.set()


def test_stop_while_no_master_answers(bench: Bench) -> None:
    heart = bench.beat(FakeStore(), unused_address(), pulse_s=600.0)
    time.sleep(0.1)
    started = time.monotonic()
    heart.stop()
    assert time.monotonic() - started < WAIT_S / 2
    assert not heart._thread.is_alive()


def test_stop_before_start_and_twice(bench: Bench) -> None:
    heart = bench.beat(FakeStore(), "127.0.0.1:1", start=False)
    heart.stop()
    heart.stop()
    assert not heart.alive


@pytest.mark.parametrize("reached", [True, False])
def test_the_first_try_ends_whether_a_master_is_reached_or_not(bench: Bench, reached: bool) -> None:
    address = bench.master(modern)[0].address if reached else unused_address()
    config = SimpleNamespace(masters=(address,), **CONFIG)
    client = MasterClient(config)
    heart = Heartbeat(SimpleNamespace(master=client), FakeStore(), config, pulse_s=600.0)
    heart.start()
    text = ""
    try:
        client.lookup_ec_volume(3, timeout_s=5)
    except RpcFailure as exc:
        text = str(exc)
    finally:
        heart.stop(goodbye=False)
        client.close()
    assert ("Unimplemented" if reached else "missing address") in text
