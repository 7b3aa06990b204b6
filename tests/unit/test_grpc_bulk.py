"""Batches of messages that are sent from the library's polling thread (server.grpc.bulk)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_helpers import WAIT_S, VolumeClient, bare_server, wait_for

from pyvolume import errors
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc import bulk, service, wire
from pyvolume.server.grpc.calls import Call

Code = grpc.StatusCode
Serve = Callable[[Call], Iterator[Any]]
MORE_THAN_WINDOWS_HOLD = 32 << 20


@pytest.fixture
def start() -> Iterator[Callable[[Serve], SimpleNamespace]]:
    ends: list[Callable[[], Any]] = []

    def make(serve: Serve) -> SimpleNamespace:
        handlers: Any = {
            "VolumeIncrementalCopy": lambda call, request: serve(call),
            "Ping": lambda call, request: pb.PingResponse(start_time_ns=1),
        }
        server = service.make_grpc_server(bare_server(), "127.0.0.1:0", handlers=handlers)
        server.start()
        client = VolumeClient(server.port)
        ends.extend((client.close, lambda: server.stop(0)))
        return SimpleNamespace(server=server, client=client, stream=lambda: client.open_stream("VolumeIncrementalCopy"))

    yield make
    for end in ends:
        end()


def message(number: int, length: int = 8) -> bytes:
    return wire.file_piece(number.to_bytes(8, "big") + bytes(length - 8))


def numbers(messages: Any) -> list[int]:
    return [int.from_bytes(each.file_content[:8], "big") for each in messages]


def test_batches_are_sent_with_the_grpcio_that_is_installed(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bulk.SUPPORTED
    sizes: list[int] = []
    send = bulk._Sender.send
    monkeypatch.setattr(bulk._Sender, "send", lambda self, batch: (sizes.append(len(batch)), send(self, batch))[1])
    serving = start(lambda call: iter([[message(n) for n in range(5)], [message(5)]]))
    assert numbers(serving.stream()) == list(range(6))
    assert sizes == [5, 1]


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("length", [8, 700, 5000, 100_000])
def test_every_message_comes_whole_and_in_order(
    start: Any, monkeypatch: pytest.MonkeyPatch, length: int, supported: bool
) -> None:
    monkeypatch.setattr(bulk, "SUPPORTED", supported)
    count = 200 if length > 10_000 else 3000

    def serve(call: Call) -> Iterator[Any]:
        made = iter(range(count))
        for size in (1, 2, 3, 100, 1000, count):
            yield [message(number, length) for _, number in zip(range(size), made, strict=False)]
            if (one := next(made, None)) is not None:
                yield pb.VolumeIncrementalCopyResponse(file_content=message(one, length)[-length:])
            yield []

    serving = start(serve)
    came = list(serving.stream())
    assert numbers(came) == list(range(count))
    assert {len(each.file_content) for each in came} == {length}


def test_the_first_messages_on_a_quiet_connection_do_not_wait(start: Any) -> None:
    """What may wait for one write with the next must not take the headers with it: they would wait for ever."""
    told = threading.Event()

    def serve(call: Call) -> Iterator[Any]:
        yield [message(0), message(1), message(2)]
        yield []
        told.set()

    serving = start(serve)
    serving.client.call("Ping")
    time.sleep(0.1)
    assert numbers(serving.stream()) == [0, 1, 2]
    assert told.is_set()


def test_a_batch_is_out_before_the_handler_waits_for_more(start: Any) -> None:
    go_on = threading.Event()

    def serve(call: Call) -> Iterator[Any]:
        yield [message(0), message(1)]
        yield []
        assert go_on.wait(WAIT_S)
        yield [message(2)]

    stream = start(serve).stream()
    assert numbers([next(stream), next(stream)]) == [0, 1]
    go_on.set()
    assert numbers(stream) == [2]


def test_all_messages_of_a_batch_come_before_the_failure_behind_it(start: Any) -> None:
    def serve(call: Call) -> Iterator[Any]:
        yield [message(number, 1000) for number in range(500)]
        raise errors.PyvolumeError("the disk")

    came = []
    with pytest.raises(grpc.RpcError) as caught:
        for each in start(serve).stream():
            came.append(each)
    assert (caught.value.code(), caught.value.details()) == (Code.UNKNOWN, "the disk")
    assert numbers(came) == list(range(500))


def test_a_client_that_goes_in_the_middle_of_a_batch_ends_the_call(start: Any) -> None:
    ended = threading.Event()

    def serve(call: Call) -> Iterator[Any]:
        try:
            while True:
                yield [message(number, 100_000) for number in range(MORE_THAN_WINDOWS_HOLD // 100_000)]
                call.check()
        finally:
            ended.set()

    serving = start(serve)
    stream = serving.stream()
    next(stream)
    assert not ended.wait(0.2)
    stream.cancel()
    assert ended.wait(5)
    wait_for(lambda: serving.server.running == 0, "the call to end")
    assert serving.client.call("Ping").code is Code.OK


def test_a_server_that_stops_cuts_a_batch_that_stands_still(start: Any) -> None:
    ended = threading.Event()

    def serve(call: Call) -> Iterator[Any]:
        try:
            yield [message(number, 100_000) for number in range(MORE_THAN_WINDOWS_HOLD // 100_000)]
            yield []
            call.check()
        finally:
            ended.set()

    serving = start(serve)
    next(serving.stream())
    began = time.monotonic()
    serving.server.stop(0.2)
    assert time.monotonic() - began < 5
    assert ended.wait(5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_message_that_the_library_refuses_fails_its_call_alone(start: Any, place: int) -> None:
    def serve(call: Call) -> Iterator[Any]:
        batch: list[Any] = [message(0), message(1), message(2)]
        batch[place] = "no bytes"
        yield batch
        yield [message(3)]

    serving = start(serve)
    for _ in range(2):
        came = []
        with pytest.raises(grpc.RpcError) as caught:
            for each in serving.stream():
                came.append(each)
        assert caught.value.code() is Code.INTERNAL
        assert numbers(came) == list(range(place))
    assert serving.client.call("Ping").code is Code.OK


def test_streams_that_stand_still_leave_the_others_and_short_calls_their_turn(start: Any) -> None:
    def serve(call: Call) -> Iterator[Any]:
        for _ in range(2):
            yield [message(number, 10_000) for number in range(MORE_THAN_WINDOWS_HOLD // 10_000)]
        yield []

    serving = start(serve)
    still = [serving.stream() for _ in range(8)]
    for stream in still:
        next(stream)
    assert len(list(serving.stream())) == 2 * (MORE_THAN_WINDOWS_HOLD // 10_000)
    for _ in range(20):
        assert serving.client.call("Ping").code is Code.OK
    for stream in still:
        stream.cancel()
    wait_for(lambda: serving.server.running == 0, "the calls to end")
