"""Following a volume (contract grpc.md 7, departure V4): VolumeTailSender and VolumeTailReceiver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_helpers import wait_for
from grpc_nodes import COOKIE, Peer, Server, content, put, relay
from oracle import formats

from pyvolume._native import engine, since
from pyvolume._native.follow import RECORD_MAX
from pyvolume.errors import NativeCode, NeedleDeleted, NeedleNotFound, StorageError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server import pull
from pyvolume.server.grpc import tail as handlers
from pyvolume.server.grpc.methods import LIMITS, Kind
from pyvolume.storage import compact, tail
from pyvolume.storage.volume import FLAG_HAS_LAST_MODIFIED, FLAG_HAS_MIME, FLAG_HAS_NAME, FLAG_HAS_PAIRS

TAILS = LIMITS[Kind.TAIL]
Code = grpc.StatusCode


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "ROUND_S", 0.1)
    monkeypatch.setattr(handlers, "LOOK_S", 0.05)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "source")
    yield made
    made.end()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "target")
    yield made
    made.end()


def sent(server: Server, vid: int = 3, **fields: Any) -> list[Any]:
    answer = server.call("VolumeTailSender", volume_id=vid, **{"idle_timeout_seconds": 1, **fields})
    assert answer.code is Code.OK, (answer.code, answer.details)
    assert all(message.version == 3 for message in answer.messages)
    return answer.messages


def records(messages: list[Any]) -> list[bytes]:
    whole, body = [], b""
    for message in messages:
        if message.needle_header:
            body += message.needle_body
            if message.is_last_chunk:
                whole.append(message.needle_header + body)
                body = b""
    assert body == b""
    return whole


# -- sending ----------------------------------------------------------------------------------------------------------


def test_every_record_in_order_tombstones_included(source: Server) -> None:
    volume = source.make(3)
    for key in range(1, 30):
        put(volume, key, b"x" * key * 40)
    volume.delete_needle(4, COOKIE)
    put(volume, 5, b"again")
    messages = sent(source)
    assert b"".join(records(messages)) == (source.directories[0] / "3.dat").read_bytes()[8:]
    assert not messages[-1].needle_header  # the round after that found nothing
    assert messages[-1].is_last_chunk


def test_only_what_is_newer(source: Server) -> None:
    volume = source.make(3)
    for key in range(1, 10):
        put(volume, key, b"x" * key)
    when = volume.read_needle(6).append_at_ns
    newer = records(sent(source, since_ns=when))
    assert [engine.parse_needle(raw, 3).id for raw in newer] == [7, 8, 9]
    assert len(records(sent(source, since_ns=when - 1))) == 4
    assert records(sent(source, since_ns=1 << 62)) == []


def test_large_records_go_in_pieces(source: Server) -> None:
    volume = source.make(3)
    data = os.urandom((5 << 20) + 77)
    put(volume, 1, b"small")
    put(volume, 2, data)
    put(volume, 3, os.urandom(1 << 20))
    put(volume, 4, b"small")
    messages = [message for message in sent(source) if message.needle_header]
    assert [len(message.needle_body) for message in messages][1:3] == [2 << 20, 2 << 20]
    assert [message.is_last_chunk for message in messages] == [True, False, False, True, True, True]
    assert len({bytes(message.needle_header) for message in messages[1:4]}) == 1
    assert b"".join(records(messages)) == (source.directories[0] / "3.dat").read_bytes()[8:]


@pytest.mark.parametrize("rounds", [1, 3])
def test_idle_time_out_counts_rounds(source: Server, rounds: int) -> None:
    source.make(3)
    messages = sent(source, idle_timeout_seconds=rounds)
    assert [(bytes(m.needle_header), m.is_last_chunk) for m in messages] == [(b"", True)] * rounds


def test_new_data_restarts_the_count(source: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = source.make(3)
    put(volume, 1, b"one")
    stream = source.client.open_stream("VolumeTailSender", {"volume_id": 3, "idle_timeout_seconds": 30})
    first = next(stream)
    assert engine.parse_needle(first.needle_header + first.needle_body, 3).id == 1
    assert not next(stream).needle_header
    put(volume, 2, b"two")
    later = next(message for message in stream if message.needle_header)
    assert engine.parse_needle(later.needle_header + later.needle_body, 3).id == 2
    stream.cancel()


def test_no_time_out_means_for_ever_until_cancelled(source: Server) -> None:
    source.make(3)
    stream = source.client.open_stream("VolumeTailSender", {"volume_id": 3})
    for _ in range(5):
        assert next(stream).is_last_chunk
    assert _tail_slots(source) == TAILS - 1
    stream.cancel()
    wait_for(lambda: _tail_slots(source) == TAILS, "the slot", 1.0)


def _tail_slots(server: Server) -> int:
    from pyvolume.server.grpc.methods import Kind

    return int(server.grpc.budgets._slots[Kind.TAIL]._value)


def test_a_server_that_stops_ends_its_tails(source: Server) -> None:
    source.make(3)
    stream = source.client.open_stream("VolumeTailSender", {"volume_id": 3})
    next(stream)
    source.context.stopping.set()
    with pytest.raises(grpc.RpcError) as raised:
        list(stream)
    assert raised.value.code() is Code.UNAVAILABLE


def test_an_unmounted_volume_ends_its_tails(source: Server) -> None:
    source.make(3)
    stream = source.client.open_stream("VolumeTailSender", {"volume_id": 3})
    next(stream)
    source.store.unmount_volume(3)
    with pytest.raises(grpc.RpcError) as raised:
        list(stream)
    assert (raised.value.code(), raised.value.details()) == (Code.FAILED_PRECONDITION, "volume 3 is closed")


def test_a_vacuum_does_not_disturb_a_tail(source: Server) -> None:
    volume = source.make(3)
    for key in range(1, 10):
        put(volume, key, b"x" * 100)
    volume.delete_needle(2, COOKIE)
    when = volume.stat().last_append_at_ns
    compact.compact(volume)
    compact.commit(volume)
    put(volume, 20, b"after")
    assert [engine.parse_needle(raw, 3).id for raw in records(sent(source, since_ns=when))] == [20]


def test_sender_refuses(source: Server) -> None:
    answer = source.call("VolumeTailSender", volume_id=99)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "not found volume id 99")
    volume = source.make(3)
    put(volume, 1, b"x")
    with open(source.directories[0] / "3.idx", "r+b") as index:
        index.seek(8)
        index.write((1 << 20).to_bytes(4, "big"))
    answer = source.call("VolumeTailSender", volume_id=3)
    text = f"streamFollow: fail to locate by appendAtNs 0: read entry 0 offset {8 << 20}: EOF"
    assert (answer.code, answer.details) == (Code.UNKNOWN, text)


def test_zeros_are_no_records(source: Server) -> None:
    volume = source.make(3)
    put(volume, 1, b"x")
    with tail.snapshot(volume) as files:
        with open(source.directories[0] / "3.dat", "ab") as data:
            data.write(bytes(64))
        files.end += 64
        batches = list(files.follow(8))
        assert [len(batch) for batch in batches] == [1]
        assert files.last_append_ns == volume.read_needle(1).append_at_ns


def test_messages_made_by_the_engine_are_the_library_s(source: Server) -> None:
    """Records on both sides of what the engine takes, the long ones first, last and between short ones."""
    volume = source.make(3)
    around = range(RECORD_MAX - 40, RECORD_MAX + 20, 3)
    sizes = [RECORD_MAX + 9, *range(1, 40), *around, 7, 3 << 20, 5, 0, RECORD_MAX + 5]
    for key, size in enumerate(sizes, 1):
        put(volume, key, os.urandom(size))
    volume.delete_needle(2, COOKIE)
    data = Path(volume.dat_path).read_bytes()
    expected = []
    for offset, record in formats.records(data, 3):
        body = record[16:]
        pieces = [body[at : at + tail.PIECE_BYTES] for at in range(0, len(body), tail.PIECE_BYTES)]
        for number, piece in enumerate(pieces, 1):
            last = number == len(pieces)
            expected.append((offset, record[:16], piece, last))
    stream = source.client.channel.unary_stream(
        "/volume_server_pb.VolumeServer/VolumeTailSender",
        request_serializer=pb.VolumeTailSenderRequest.SerializeToString,
        response_deserializer=None,
    )
    came = list(stream(pb.VolumeTailSenderRequest(volume_id=3, idle_timeout_seconds=1), timeout=30))
    beat = pb.VolumeTailSenderResponse(is_last_chunk=True, version=3).SerializeToString()
    assert came.pop() == beat
    assert len(came) == len(expected)
    for message, (offset, header, body, last) in zip(came, expected, strict=True):
        made = pb.VolumeTailSenderResponse(needle_header=header, needle_body=body, is_last_chunk=last, version=3)
        assert message == made.SerializeToString(deterministic=True), offset


def test_a_record_that_is_cut_off_is_not_sent(source: Server) -> None:
    volume = source.make(3)
    put(volume, 1, b"x" * 100)
    put(volume, 2, b"x" * 100)
    with tail.snapshot(volume) as files:
        files.end -= 40
        assert [len(batch) for batch in files.follow(8)] == [1]


# -- receiving --------------------------------------------------------------------------------------------------------


def follow(target: Server, address: str, **fields: Any) -> Any:
    return target.call(
        "VolumeTailReceiver", volume_id=3, source_volume_server=address, **{"idle_timeout_seconds": 1, **fields}
    )


def test_receiver_writes_all_of_a_needle(source: Server, target: Server) -> None:
    volume, copy = source.make(3), target.make(3)
    flags = FLAG_HAS_NAME | FLAG_HAS_MIME | FLAG_HAS_PAIRS | FLAG_HAS_LAST_MODIFIED
    fields = {"name": b"n.txt", "mime": b"text/x", "pairs": b'{"a":"b"}', "last_modified_s": 1_700_000_000}
    put(volume, 1, b"hello", flags=flags, **fields)
    put(volume, 2, os.urandom(5 << 20))
    put(volume, 3, b"")
    assert follow(target, source.address).code is Code.OK
    needle = copy.read_needle(1)
    assert {name: getattr(needle, name) for name in fields} == fields
    assert (needle.flags, needle.cookie, bytes(needle.data or b"")) == (flags, COOKIE, b"hello")
    assert content(copy, 2) == content(volume, 2)
    assert copy.read_needle(3).empty
    assert (copy.dat_bytes, copy.idx_bytes, copy.file_count) == (volume.dat_bytes, volume.idx_bytes, volume.file_count)


def test_receiver_takes_deletes_for_what_they_are(source: Server, target: Server) -> None:
    volume, copy = source.make(3), target.make(3)
    for made in (volume, copy):
        put(made, 1, b"stays")
        put(made, 2, b"goes")
        put(made, 3, b"")
    when = volume.stat().last_append_at_ns
    volume.delete_needle(2, COOKIE, volume.read_needle(2).checksum)
    put(volume, 4, b"comes and goes")
    volume.delete_needle(4, COOKIE)
    put(volume, 5, b"")
    assert follow(target, source.address, since_ns=when).code is Code.OK
    assert content(copy, 1) == b"stays"
    for key in (2, 4):
        with pytest.raises(NeedleDeleted):
            copy.read_needle(key)
    assert copy.read_needle(3).empty
    assert copy.read_needle(5).empty
    assert (copy.dat_bytes, copy.idx_bytes) == (volume.dat_bytes, volume.idx_bytes)
    # once more from the beginning: nothing comes back to life
    assert follow(target, source.address, since_ns=when - 1).code is Code.OK
    with pytest.raises(NeedleDeleted):
        copy.read_needle(2)


def test_delete_of_what_never_came_writes_nothing(source: Server, target: Server) -> None:
    volume, copy = source.make(3), target.make(3)
    put(volume, 1, b"data")
    checksum = volume.read_needle(1).checksum
    when = volume.stat().last_append_at_ns
    volume.delete_needle(1, COOKIE, checksum)
    assert follow(target, source.address, since_ns=when).code is Code.OK
    with pytest.raises(NeedleNotFound):
        copy.read_needle(1)
    assert copy.dat_bytes == 8


def test_cookies_at_the_receiver(source: Server, target: Server) -> None:
    volume, copy = source.make(3), target.make(3)
    put(copy, 1, b"old", cookie=1)
    put(volume, 1, b"new", cookie=2)
    answer = follow(target, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "mismatching cookie 2")  # as upstream
    when = volume.stat().last_append_at_ns
    volume.delete_needle(1, 77)
    assert follow(target, source.address, since_ns=when).code is Code.OK
    with pytest.raises(NeedleDeleted):
        copy.read_needle(1)


def test_receiver_refuses(source: Server, target: Server) -> None:
    answer = follow(target, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "receiver not found volume id 3")
    target.make(3)
    answer = follow(target, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "not found volume id 3")  # the sender's own words
    answer = follow(target, "127.0.0.1:1.1")
    assert answer.code is Code.UNAVAILABLE
    answer = follow(target, "127.0.0.1:x")
    assert (answer.code, answer.details[:22]) == (Code.INVALID_ARGUMENT, "source_volume_server: ")
    put(source.make(3), 1, b"x")
    target.volume(3).set_read_only()
    answer = follow(target, source.address)
    assert (answer.code, answer.details) == (Code.UNKNOWN, "volume 3 is read only")


def sender(*messages: Any) -> Peer:
    return Peer(VolumeTailSender=lambda request, context: iter(messages))


def message(header: bytes, body: bytes, *, last: bool = True, version: int = 3) -> Any:
    return pb.VolumeTailSenderResponse(needle_header=header, needle_body=body, is_last_chunk=last, version=version)


GOOD = engine.frame_needle(9, COOKIE, b"good", append_at_ns=5)


def test_receiver_of_older_senders(target: Server) -> None:
    copy = target.make(3)
    peer = sender(
        message(b"", b""),
        message(GOOD[:16], GOOD[16:20], last=False, version=0),
        message(b"", GOOD[20:30], last=False),
        message(GOOD[:16], GOOD[30:]),
    )
    try:
        assert follow(target, peer.address).code is Code.OK
    finally:
        peer.stop()
    assert content(copy, 9) == b"good"


HEADER = GOOD[:16]


@pytest.mark.parametrize(
    "messages",
    [
        (message(b"short", b"x"),),
        (message(HEADER, b""),),
        (message(HEADER, GOOD[16:-12]),),
        (message(HEADER, GOOD[16:] + b"more"),),
        (message(HEADER, GOOD[16:18] + b"\xff" + GOOD[19:]),),
        (message(HEADER[:12] + b"\xff\xff\xff\xff", b"x"),),
        (message(HEADER[:12] + b"\x7f\xff\xff\xff", b"x", last=False),),
        (message(HEADER, b"x" * 30, last=False), message(HEADER, b"x" * 30, last=False)),
        (message(HEADER, GOOD[16:], version=77),),
        (b"\x0a\x7fgarbage",),
    ],
)
def test_sick_senders(target: Server, messages: tuple[Any, ...]) -> None:
    copy = target.make(3)
    peer = sender(*messages)
    try:
        answer = follow(target, peer.address)
    finally:
        peer.stop()
    assert answer.code is Code.UNKNOWN, answer
    assert copy.dat_bytes == 8


def test_a_stream_that_is_cut_keeps_what_was_whole(source: Server, target: Server) -> None:
    volume, copy = source.make(3), target.make(3)
    for key in range(1, 6):
        put(volume, key, b"x" * key)

    def cut(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for number, one in enumerate(relay(source, "VolumeTailSender")(request, context)):
            if number == 3:
                context.abort(Code.RESOURCE_EXHAUSTED, "enough")
            yield one

    peer = Peer(VolumeTailSender=cut)
    try:
        answer = follow(target, peer.address)
    finally:
        peer.stop()
    assert (answer.code, answer.details) == (Code.RESOURCE_EXHAUSTED, "enough")
    assert copy.file_count == 3
    assert follow(target, source.address).code is Code.OK
    assert content(copy, 5) == b"xxxxx"


def test_a_receiver_that_is_cancelled_lets_go_within_a_second(source: Server, target: Server) -> None:
    source.make(3)
    target.make(3)
    answers: list[Any] = []

    def run() -> None:
        answers.append(follow(target, source.address, idle_timeout_seconds=0, timeout_s=0.5))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert answers[0].code is Code.DEADLINE_EXCEEDED
    wait_for(lambda: _tail_slots(target) == TAILS and _tail_slots(source) == TAILS, "both slots", 1.5)


def test_a_sender_that_falls_silent_is_given_up(target: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    target.make(3)
    silence = pull.PeerLink.pull
    monkeypatch.setattr(pull.PeerLink, "pull", lambda self, name, request: silence(self, name, request, 0.3))
    released = threading.Event()

    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        released.wait(20)
        return iter(())

    peer = Peer(VolumeTailSender=silent)
    try:
        began_s = time.monotonic()
        answer = follow(target, peer.address)
        assert time.monotonic() - began_s < 5
    finally:
        released.set()
        peer.stop()
    assert (answer.code, answer.details) == (
        Code.DEADLINE_EXCEEDED,
        f"{peer.address} has sent nothing for 0.3 s",
    )


def test_two_servers_under_writes(source: Server, target: Server) -> None:
    """What is written while a follower runs arrives, in order, once."""
    volume, copy = source.make(3), target.make(3)
    stop = threading.Event()

    def write() -> None:
        key = 0
        while not stop.is_set() and key < 2000:
            key += 1
            put(volume, key, b"%d" % key * 50)
            if key % 7 == 0:
                volume.delete_needle(key - 3, COOKIE)

    writer = threading.Thread(target=write)
    writer.start()
    answer = follow(target, source.address, idle_timeout_seconds=2)
    stop.set()
    writer.join()
    assert answer.code is Code.OK, answer.details
    assert follow(target, source.address).code is Code.OK  # what came after the sender had gone idle
    for key in range(1, volume.max_file_key + 1):
        entry = volume.lookup(key)
        if entry.size > 0:
            assert content(copy, key) == content(volume, key)
        else:
            with pytest.raises(NeedleNotFound):
                copy.read_needle(key)


# -- the search -------------------------------------------------------------------------------------------------------


def test_search_errors_say_where(source: Server) -> None:
    volume = source.make(3)
    put(volume, 1, b"x")
    with tail.snapshot(volume) as files:
        assert since.find_since(files.dat_fd, files.idx_fd, 4, 3, 1, 0) == 8
        assert since.append_time(files.dat_fd, 3, 8) == volume.read_needle(1).append_at_ns
        with pytest.raises(since.SearchError) as raised:
            since.find_since(files.dat_fd, files.idx_fd, 4, 3, 99, 0)
        assert raised.value.code == NativeCode.EEOF
        with pytest.raises(engine.NativeError):
            since.append_time(files.dat_fd, 3, 1 << 40)
        os.ftruncate(os.open(source.directories[0] / "3.dat", os.O_RDWR), 20)
        with pytest.raises(StorageError, match="fail to locate by appendAtNs 0: read entry 0 offset 8: EOF"):
            files.find_since(0)
