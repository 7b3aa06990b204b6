"""The frame around the handlers: gates, statuses, request ids, budgets, reflection, start and stop."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_helpers import WAIT_S, VolumeClient, bare_server, wait_for
from grpc_reflection.v1alpha import reflection_pb2

from pyvolume import errors
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc import reflection, service
from pyvolume.server.grpc.calls import Call, check_file_part, peer_ip
from pyvolume.server.grpc.methods import Kind
from pyvolume.server.grpc.status import CallEnded, Refusal, status_of
from pyvolume.server.rpc import RpcFailure, WrappedRpcFailure

Code = grpc.StatusCode


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts servers with given handlers; (server, client) each."""
    running: list[Any] = []

    def make(handlers: dict[str, Any], context: Any = None, **kwargs: Any) -> tuple[service.GrpcServer, VolumeClient]:
        server = service.make_grpc_server(context or bare_server(), "127.0.0.1:0", handlers=handlers, **kwargs)
        server.start()
        client = VolumeClient(server.port)
        running.extend((client.close, lambda: server.stop(0)))
        return server, client

    yield make
    for end in running:
        end()


# -- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (errors.VolumeNotFound("volume 3 not found"), Code.UNKNOWN, "volume 3 not found"),
        (errors.PyvolumeError("a line\nand another: ü"), Code.UNKNOWN, "a line\nand another: ü"),
        (errors.PyvolumeError("name \udcff here"), Code.UNKNOWN, "name ? here"),
        (Refusal(Code.INVALID_ARGUMENT, "size: -9"), Code.INVALID_ARGUMENT, "size: -9"),
        (errors.VolumeClosed("volume 3 is closed"), Code.FAILED_PRECONDITION, "volume 3 is closed"),
        (RpcFailure(Code.NOT_FOUND, "remote says"), Code.NOT_FOUND, "remote says"),
        (WrappedRpcFailure(RpcFailure(Code.ABORTED, "x"), "outer: x"), Code.ABORTED, "outer: x"),
        (CallEnded("context canceled"), Code.CANCELLED, "context canceled"),
        (ValueError("secret detail"), Code.INTERNAL, "internal error: ValueError"),
        (OSError(5, "secret detail"), Code.INTERNAL, "internal error: OSError"),
    ],
)
def test_status_reaches_the_client(start: Any, raised: Exception, code: Code, text: str) -> None:
    def handler(call: Call, request: Any) -> Any:
        raise raised

    _, client = start({"VolumeStatus": handler})
    answer = client.call("VolumeStatus")
    assert (answer.code, answer.details) == (code, text)
    assert status_of(raised).is_bug == (code is Code.INTERNAL)


def test_a_bug_is_logged_with_its_stack_and_the_server_goes_on(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(call: Call, request: Any) -> Any:
        return {}["no such key"]

    _, client = start({"VolumeStatus": broken, "GetState": lambda call, request: pb.GetStateResponse()})
    with caplog.at_level(logging.ERROR):
        assert client.call("VolumeStatus").code is Code.INTERNAL
    record = next(record for record in caplog.records if "VolumeStatus" in record.getMessage())
    assert record.exc_info is not None and record.exc_info[0] is KeyError
    assert client.call("GetState").code is Code.OK


def test_stream_fails_behind_what_was_sent(start: Any) -> None:
    def two_then_error(call: Call, request: Any) -> Iterator[Any]:
        yield pb.ReadAllNeedlesResponse(needle_id=1)
        yield pb.ReadAllNeedlesResponse(needle_id=2)
        raise errors.PyvolumeError("not found volume id 9")

    _, client = start({"ReadAllNeedles": two_then_error})
    answer = client.call("ReadAllNeedles")
    assert [message.needle_id for message in answer.messages] == [1, 2]
    assert (answer.code, answer.details) == (Code.UNKNOWN, "not found volume id 9")


def test_unserved_rpc_says_its_name(start: Any) -> None:
    _, client = start({})
    for name in ("VolumeCopy", "VacuumVolumeCheck", "ReceiveFile", "VolumeTailSender"):
        answer = client.call(name)
        assert (answer.code, answer.details) == (Code.UNIMPLEMENTED, f"method {name} not implemented")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/volume_server_pb.VolumeServer/Nope", "unknown method Nope for service volume_server_pb.VolumeServer"),
        ("/other.Service/Nope", "unknown service other.Service"),
        ("/grpc.health.v1.Health/Check", "unknown service grpc.health.v1.Health"),
    ],
)
def test_unknown_paths(start: Any, path: str, text: str) -> None:
    _, client = start({})
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary(path)(b"", timeout=WAIT_S)
    assert (caught.value.code(), caught.value.details()) == (Code.UNIMPLEMENTED, text)


# -- request ids ------------------------------------------------------------------------------------------------------


def test_request_id_comes_back_on_unary_replies(start: Any) -> None:
    seen: list[str] = []

    def handler(call: Call, request: Any) -> Any:
        seen.append(call.request_id)
        if request.volume_id:
            raise errors.PyvolumeError("no")
        return pb.VolumeStatusResponse()

    _, client = start({"VolumeStatus": handler})
    for volume_id in (0, 1):
        answer = client.call("VolumeStatus", {"volume_id": volume_id}, metadata=(("x-amz-request-id", "abc"),))
        assert answer.trailers["x-amz-request-id"] == "abc"
    fresh = client.call("VolumeStatus").trailers["x-amz-request-id"]
    assert uuid.UUID(fresh).version == 4
    assert seen == ["abc", "abc", fresh]
    assert "x-amz-request-id" in client.call("VacuumVolumeCheck").trailers, "also when nobody serves the call"


def test_streams_have_no_request_id(start: Any) -> None:
    _, client = start({"ReadAllNeedles": lambda call, request: iter(())})
    answer = client.call("ReadAllNeedles", metadata=(("x-amz-request-id", "abc"),))
    assert answer.code is Code.OK
    assert "x-amz-request-id" not in answer.trailers


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "ip"),
    [
        ("ipv4:1.2.3.4:5", "1.2.3.4"),
        ("ipv6:%5B::1%5D:5", "::1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5", "10.0.0.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", "fe80::1"),
        ("unix:", None),
        ("unix:/tmp/x", None),
        ("", None),
    ],
)
def test_peer_ip(peer: str, ip: str | None) -> None:
    assert peer_ip(peer) == ip


def served(call: Call, request: Any) -> Any:
    return pb.VolumeMountResponse()


def test_white_list_comes_first(start: Any) -> None:
    context = bare_server()
    context.store.state.maintenance = True
    context.security.white_list = ("10.0.0.0/8",)
    _, client = start({"VolumeMount": served, "VolumeStatus": lambda call, request: pb.VolumeStatusResponse()}, context)
    for name in ("VolumeMount", "AllocateVolume"):
        answer = client.call(name)
        assert (answer.code, answer.details) == (Code.PERMISSION_DENIED, "not authorized: 127.0.0.1")
    assert client.call("VolumeStatus").code is Code.OK, "an open call"
    context.security.white_list = ("127.0.0.1",)  # a reload
    assert client.call("VolumeMount").code is Code.OK
    context.security.white_list = ("127.0.0.0/8",)
    assert client.call("VolumeMount").code is Code.OK
    context.security.white_list = ()
    assert client.call("VolumeMount").code is Code.OK


def test_maintenance_gate(start: Any) -> None:
    context = bare_server(server_id="vs-7")
    context.store.state.maintenance = True
    _, client = start({"VolumeMount": served}, context)
    answer = client.call("AllocateVolume")
    assert (answer.code, answer.details) == (Code.UNKNOWN, "volume server vs-7 is in maintenance mode")
    assert client.call("ReceiveFile").details == "volume server vs-7 is in maintenance mode"
    assert client.call("VolumeMount").code is Code.OK, "not gated"
    assert client.call("VolumeTierMoveDatFromRemote").code is Code.UNIMPLEMENTED, "not gated"
    context.store.state.maintenance = False
    assert client.call("AllocateVolume").code is Code.UNIMPLEMENTED


def test_guard_peers_closes_the_open_calls_that_change(start: Any) -> None:
    context = bare_server(guard_peers=True)
    context.security.white_list = ("10.0.0.1",)
    _, client = start({}, context)
    for name in ("ReceiveFile", "WriteNeedleBlob", "VolumeEcBlobDelete", "VolumeEcShardsMount"):
        assert client.call(name).code is Code.PERMISSION_DENIED, name
    for name in ("CopyFile", "VolumeEcShardRead", "ReadVolumeFileStatus"):
        assert client.call(name).code is Code.UNIMPLEMENTED, name


def test_white_list_over_ipv6(start: Any) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    context = bare_server()
    context.security.white_list = ("::1",)
    try:
        server = service.make_grpc_server(context, "[::1]:0", handlers={"VolumeMount": served})
    except service.GrpcBindError:
        pytest.skip("no IPv6 loopback here")
    server.start()
    client = VolumeClient(server.port, "[::1]")
    try:
        assert client.call("VolumeMount").code is Code.OK
        context.security.white_list = ("::2",)
        assert client.call("VolumeMount").details == "not authorized: ::1"
    finally:
        client.close()
        server.stop(0)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "nul\0", ".", ".."])
def test_file_parts_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(Refusal, match="collection") as caught:
        check_file_part("collection", name)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["", "a.b", "x_y", "with space", "ümlaut", "..."])
def test_file_parts_that_are_fine(name: str) -> None:
    check_file_part("collection", name)


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_long_calls_beyond_their_budget_are_refused_and_short_ones_go_on(start: Any) -> None:
    go_on = threading.Event()

    def slow(call: Call, request: Any) -> Iterator[Any]:
        yield pb.ReadAllNeedlesResponse(needle_id=1)
        go_on.wait(WAIT_S)

    handlers = {"ReadAllNeedles": slow, "GetState": lambda call, request: pb.GetStateResponse()}
    server, client = start(handlers, limits={Kind.SCAN: 2})
    streams = [client.open_stream("ReadAllNeedles") for _ in range(2)]
    assert [next(stream).needle_id for stream in streams] == [1, 1]
    refused = client.call("ReadAllNeedles")
    assert (refused.code, refused.details) == (
        Code.RESOURCE_EXHAUSTED,
        "2 scan calls are running, try again later",
    )
    assert server.budgets.refused[Kind.SCAN] == 1
    assert client.call("CopyFile").code is Code.UNIMPLEMENTED, "another kind has its own budget"
    assert client.call("GetState").code is Code.OK
    go_on.set()
    for stream in streams:
        assert list(stream) == []
    wait_for(lambda: client.call("ReadAllNeedles").code is Code.OK, "a free slot")


def test_cancelled_stream_gives_its_slot_back(start: Any) -> None:
    ended = threading.Event()

    def until_cancelled(call: Call, request: Any) -> Iterator[Any]:
        call.on_end(ended.set)
        yield pb.VolumeTailSenderResponse(version=3)
        ended.wait(WAIT_S)
        call.check()
        yield pb.VolumeTailSenderResponse(version=4)

    _, client = start({"VolumeTailSender": until_cancelled}, limits={Kind.TAIL: 1})
    stream = client.open_stream("VolumeTailSender")
    assert next(stream).version == 3
    assert client.call("VolumeTailSender").code is Code.RESOURCE_EXHAUSTED
    stream.cancel()
    assert ended.wait(WAIT_S)
    ended.set()

    def free_again() -> bool:
        again = client.open_stream("VolumeTailSender")
        try:
            return next(again).version == 3
        except grpc.RpcError:
            return False
        finally:
            again.cancel()

    wait_for(free_again, "the slot")


def test_stream_that_its_client_abandons_is_closed(start: Any) -> None:
    closed = threading.Event()

    def endless(call: Call, request: Any) -> Iterator[Any]:
        try:
            while True:
                yield pb.CopyFileResponse(file_content=b"x" * 65536)
        finally:
            closed.set()

    _, client = start({"CopyFile": endless}, limits={Kind.COPY: 1})
    stream = client.open_stream("CopyFile")
    next(stream)
    stream.cancel()
    assert closed.wait(WAIT_S)


def test_timeout_follows_the_clients_deadline(start: Any) -> None:
    limits: list[float] = []

    def handler(call: Call, request: Any) -> Any:
        limits.append(call.timeout_s(1000.0))
        return pb.VolumeStatusResponse()

    _, client = start({"VolumeStatus": handler})
    client.call("VolumeStatus", timeout_s=5.0)
    client.call("VolumeStatus", timeout_s=5000.0)
    assert 0 < limits[0] < 6.0, "the library rounds the deadline up on its way"
    assert limits[1] == 1000.0


# -- reflection -------------------------------------------------------------------------------------------------------


def ask(client: VolumeClient, package: str, requests: list[Any]) -> list[Any]:
    """Answers of a reflection stream, in v1alpha messages (the bytes are the same in both packages)."""
    call = client.channel.stream_stream(
        f"/{package}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(call(iter(requests), timeout=WAIT_S))


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def test_reflection(start: Any, package: str) -> None:
    _, client = start({})
    wanted = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="volume_server_pb.VolumeServer"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="master.proto"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{package}.ServerReflection"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
        reflection_pb2.ServerReflectionRequest(all_extension_numbers_of_type="master_pb.Heartbeat"),
    ]
    services, volume, master, own, nothing, extensions = ask(client, package, wanted)
    assert [found.name for found in services.list_services_response.service] == [
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "volume_server_pb.VolumeServer",
    ]
    assert files_of(volume) == ["volume_server.proto", "remote.proto"]
    assert files_of(master) == ["master.proto", "volume_server.proto", "remote.proto"]
    raw = own.file_descriptor_response.file_descriptor_proto[0]
    assert descriptor_pb2.FileDescriptorProto.FromString(raw).package == package
    assert nothing.error_response.error_code == Code.NOT_FOUND.value[0]
    assert extensions.all_extension_numbers_response.base_type_name == "master_pb.Heartbeat"
    assert volume.original_request == wanted[1]


def files_of(answer: Any) -> list[str]:
    raw = answer.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(one).name for one in raw]


def test_reflected_files_are_enough_to_call_the_server(start: Any) -> None:
    _, client = start({"VolumeStatus": lambda call, request: pb.VolumeStatusResponse(file_count=request.volume_id + 1)})
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="volume_server_pb.VolumeServer")
    (answer,) = ask(client, "grpc.reflection.v1", [request])
    pool = descriptor_pool.DescriptorPool()
    for raw in reversed(answer.file_descriptor_response.file_descriptor_proto):
        pool.AddSerializedFile(raw)
    method = pool.FindServiceByName("volume_server_pb.VolumeServer").methods_by_name["VolumeStatus"]
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    call = client.channel.unary_unary(
        "/volume_server_pb.VolumeServer/VolumeStatus",
        request_serializer=request_class.SerializeToString,
        response_deserializer=response_class.FromString,
    )
    assert call(request_class(volume_id=6), timeout=WAIT_S).file_count == 7


def test_version_1_reflection_has_its_own_types() -> None:
    types = {message.name: message for message in reflection.v1_file().message_types_by_name.values()}
    answer = types["ServerReflectionResponse"].fields_by_name["list_services_response"].message_type
    assert answer.full_name == "grpc.reflection.v1.ListServiceResponse"


def test_open_reflection_streams_are_bounded(start: Any) -> None:
    _, client = start({})
    hold = threading.Event()

    def questions() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        hold.wait(WAIT_S)

    start_stream = client.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    streams = [start_stream(questions()) for _ in range(service.REFLECTION_STREAMS)]
    for stream in streams:
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        list(start_stream(questions(), timeout=WAIT_S))
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    hold.set()


# -- messages, port, stop ---------------------------------------------------------------------------------------------


def test_messages_above_the_librarys_default_limit(start: Any) -> None:
    size = 5 << 20
    _, client = start({"WriteNeedleBlob": lambda call, request: pb.WriteNeedleBlobResponse()})
    assert client.call("WriteNeedleBlob", {"needle_blob": b"x" * size}).code is Code.OK


def test_taken_port_raises_with_upstreams_text() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(service.GrpcBindError) as caught:
            service.make_grpc_server(bare_server(), f"127.0.0.1:{port}", handlers={})
    assert str(caught.value) == (
        f"failed to listen on grpc port {port}: listen tcp 127.0.0.1:{port}: bind: address already in use"
    )


def test_two_servers_do_not_share_a_port(start: Any) -> None:
    server, _ = start({})
    with pytest.raises(service.GrpcBindError):
        service.make_grpc_server(bare_server(), f"127.0.0.1:{server.port}", handlers={})


def test_stop_waits_for_running_calls_but_not_longer_than_its_grace() -> None:
    entered, cancelled = threading.Event(), threading.Event()

    def quick(call: Call, request: Any) -> Any:
        entered.set()
        time.sleep(0.3)
        return pb.VolumeStatusResponse(file_count=5)

    def stuck(call: Call, request: Any) -> Iterator[Any]:
        call.on_end(cancelled.set)
        yield pb.VolumeTailSenderResponse(version=3)
        cancelled.wait(WAIT_S)

    server = service.make_grpc_server(
        bare_server(), "127.0.0.1:0", handlers={"VolumeStatus": quick, "VolumeTailSender": stuck}
    )
    server.start()
    client = VolumeClient(server.port)
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(client.call("VolumeStatus")))
    caller.start()
    assert entered.wait(WAIT_S)
    stream = client.open_stream("VolumeTailSender")
    next(stream)
    started = time.monotonic()
    server.stop(0.8)
    assert time.monotonic() - started < 5
    caller.join(WAIT_S)
    assert answers[0].first.file_count == 5, "a running call ends in peace"
    assert cancelled.is_set(), "one that does not end is cancelled"
    client.close()
