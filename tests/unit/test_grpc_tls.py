"""mTLS of gRPC, server and client (contract operations.md 3.5; S1)."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_helpers import bare_server
from tls_helpers import HOST, Authority, Identity, grpc_settings, plain_identity

from pyvolume.ops.context import Events
from pyvolume.pb import volume_server_pb2
from pyvolume.security_config import SecurityError, TlsSettings
from pyvolume.server.grpc import service
from pyvolume.server.grpc.service import GrpcServer, make_grpc_server
from pyvolume.server.grpc_tls import CommonNameCheck, name_checks, name_in, secure_channels, server_credentials
from pyvolume.server.rpc import VOLUME_SERVICE, Channels, RpcFailure
from pyvolume.server.tls import Tls

TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def volume(authority: Authority) -> Identity:
    """As in a cluster where one certificate serves a role: no address of this machine in it."""
    return authority.issue("volume", "volume.role.internal", common_name="volume01")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Identity]:
    other = Authority(tmp_path_factory.mktemp("other"))
    return other, other.issue("volume", "volume.role.internal", common_name="volume01")


def stand_in() -> Any:
    server = bare_server()
    server.events = Events()
    return server


class Side:
    """A gRPC server with its settings."""

    def __init__(self, settings: TlsSettings) -> None:
        self.tls = Tls(settings)
        assert self.tls.grpc is not None
        self.server: GrpcServer = make_grpc_server(
            stand_in(),
            f"{HOST}:0",
            credentials=server_credentials(self.tls.grpc),
            interceptors=name_checks(settings),
            handlers={"Ping": ping, "ReadAllNeedles": read_all, "ReceiveFile": receive},
        )
        self.server.start()

    @property
    def address(self) -> str:
        return f"{HOST}:1.{self.server.port}"


def ping(_call: Any, _request: Any) -> Any:
    return volume_server_pb2.PingResponse(remote_time_ns=7)


def read_all(_call: Any, _request: Any) -> Iterator[Any]:
    yield volume_server_pb2.ReadAllNeedlesResponse(needle_id=5)


def receive(_call: Any, requests: Iterator[Any]) -> Any:
    return volume_server_pb2.ReceiveFileResponse(bytes_written=len(list(requests)))


@pytest.fixture
def serve() -> Iterator[Callable[[TlsSettings], Side]]:
    sides: list[Side] = []

    def start(settings: TlsSettings) -> Side:
        sides.append(Side(settings))
        return sides[-1]

    yield start
    for side in sides:
        side.server.stop(1.0)


Serve = Callable[[TlsSettings], Side]


def channels_of(settings: TlsSettings) -> Channels:
    tls = Tls(settings)
    assert tls.grpc is not None
    return secure_channels(tls.grpc)


def call(channels: Channels, address: str, name: str = "Ping") -> Any:
    classes = {"Ping": volume_server_pb2.PingRequest, "ReadAllNeedles": volume_server_pb2.ReadAllNeedlesRequest}
    return channels.unary(address, VOLUME_SERVICE, name, classes[name](), timeout_s=TIMEOUT_S)


def reached(channels: Channels, address: str) -> bool:
    try:
        return bool(call(channels, address).remote_time_ns == 7)
    except RpcFailure as failure:
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        return False
    finally:
        channels.close()


# --- who gets in -----------------------------------------------------------------------------------------------------


def test_both_sides_know_each_other_by_the_authority_not_by_host_names(
    serve: Serve, authority: Authority, volume: Identity
) -> None:
    settings = grpc_settings(volume, authority.path)
    side = serve(settings)
    assert reached(channels_of(settings), side.address)


def test_client_identity_is_the_client_pair_if_both_keys_are_set(
    serve: Serve, authority: Authority, volume: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    own = authority.issue("dedicated", "c", common_name="client01")
    settings = grpc_settings(volume, authority.path)
    side = serve(replace(settings, grpc_allowed_common_names="client01"))
    both = replace(settings, grpc_client_cert=str(own.cert), grpc_client_key=str(own.key))
    assert reached(channels_of(both), side.address)
    half = replace(settings, grpc_client_cert=str(own.cert))
    channels = channels_of(half)
    assert "must both be set, falling back" in caplog.text
    with pytest.raises(RpcFailure, match="invalid subject client common name: volume01"):
        call(channels, side.address)
    channels.close()


def test_strangers_are_refused_in_both_directions(
    serve: Serve, authority: Authority, volume: Identity, stranger: tuple[Authority, Identity]
) -> None:
    other, identity = stranger
    ours, theirs = grpc_settings(volume, authority.path), grpc_settings(identity, other.path)
    assert not reached(channels_of(theirs), serve(ours).address), "they would not trust our server"
    assert not reached(channels_of(ours), serve(theirs).address), "we do not trust theirs"
    spy = grpc_settings(identity, authority.path)  # trusts us, but its certificate is of another CA
    assert not reached(channels_of(spy), serve(ours).address)


def test_plain_text_and_clients_without_certificate_are_refused(
    serve: Serve, authority: Authority, volume: Identity
) -> None:
    side = serve(grpc_settings(volume, authority.path))
    assert not reached(Channels(), side.address)
    bare = grpc.ssl_channel_credentials(authority.path.read_bytes())
    assert not reached(Channels(lambda: bare, lambda *_: "volume.role.internal"), side.address)


def test_plain_servers_are_not_talked_to(authority: Authority, volume: Identity) -> None:
    plain = make_grpc_server(stand_in(), f"{HOST}:0", handlers={"Ping": ping})
    plain.start()
    try:
        assert not reached(channels_of(grpc_settings(volume, authority.path)), f"{HOST}:1.{plain.port}")
    finally:
        plain.stop(0.1)


def test_refused_and_silent_servers_in_the_words_of_upstream(authority: Authority, volume: Identity) -> None:
    channels = channels_of(grpc_settings(volume, authority.path))
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
        with pytest.raises(RpcFailure) as caught:
            call(channels, f"{HOST}:1.{port}")
        assert f"dial tcp {HOST}:{port}: connect: connection refused" in str(caught.value)
        listener.listen()
        with pytest.raises(RpcFailure, match="authentication handshake failed"):
            channels.dial(f"{HOST}:1.{port}", timeout_s=0.2)
    channels.close()


# --- common names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "domain", "passes"),
    [
        ("volume01", "", True),
        ("client01,volume01", "", True),
        ("client01, volume01", "", False),  # not trimmed, as upstream
        ("client01", "", False),
        ("", "01", True),  # the end of the name, as text
        ("", ".example.com", False),
        ("client01", "me01", True),
    ],
)
def test_common_names_and_domain(
    serve: Serve, authority: Authority, volume: Identity, names: str, domain: str, passes: bool
) -> None:
    settings = grpc_settings(volume, authority.path)
    side = serve(replace(settings, grpc_allowed_common_names=names, grpc_allowed_wildcard_domain=domain))
    channels = channels_of(settings)
    try:
        if passes:
            assert call(channels, side.address).remote_time_ns == 7
            return
        with pytest.raises(RpcFailure) as caught:
            call(channels, side.address)
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        assert caught.value.details == "Authenticate: invalid subject client common name: volume01"
    finally:
        channels.close()


@pytest.mark.parametrize("path", ["ReadAllNeedles", "ReceiveFile", "CopyFile", "NoSuch"])
def test_every_kind_of_call_is_checked(serve: Serve, authority: Authority, volume: Identity, path: str) -> None:
    settings = grpc_settings(volume, authority.path)
    side = serve(replace(settings, grpc_allowed_common_names="somebody"))
    channels = channels_of(settings)
    start = channels.get(side.address).stream_stream(f"/volume_server_pb.VolumeServer/{path}")
    with pytest.raises(grpc.RpcError) as caught:
        list(start(iter([b""]), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    channels.close()


def test_streams_pass_with_the_right_name(serve: Serve, authority: Authority, volume: Identity) -> None:
    settings = replace(grpc_settings(volume, authority.path), grpc_allowed_common_names="volume01")
    side = serve(settings)
    channels = channels_of(settings)
    stub = channels.get(side.address)
    read = stub.unary_stream("/volume_server_pb.VolumeServer/ReadAllNeedles")
    assert len(list(read(b"", timeout=TIMEOUT_S))) == 1
    receive_file = stub.stream_unary("/volume_server_pb.VolumeServer/ReceiveFile")
    assert receive_file(iter([b"", b""]), timeout=TIMEOUT_S)
    channels.close()


def test_certificate_without_a_name_passes_no_check() -> None:
    check = CommonNameCheck("", ".example.com")
    assert not check.allows("")
    assert not CommonNameCheck("a,,b", "").allows("")
    assert check.allows("x.example.com")


def test_name_of_a_refused_client_cannot_start_a_log_line(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pyvolume.log import one_line

    identity, ca = plain_identity(tmp_path, "x\nI1125 12:00:00.000000 forged.go:1 line")
    settings = grpc_settings(identity, ca)
    side = serve(replace(settings, grpc_allowed_common_names="y"))
    channels = Channels(
        lambda: grpc.ssl_channel_credentials(ca.read_bytes(), identity.key.read_bytes(), identity.cert.read_bytes())
    )
    channel = channels_of(settings)
    with caplog.at_level(logging.ERROR), pytest.raises(RpcFailure):
        call(channel, side.address)
    records = [record for record in caplog.records if "invalid subject" in record.getMessage()]
    assert len(records) == 1
    assert "\n" not in one_line(records[0].getMessage())
    channel.close()
    channels.close()


# --- names of servers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("common_name", "names"),
    [
        ("volume01", []),
        ("volume with blanks", []),
        ("Jürgen", []),
        ("10.1.1.1", []),
        ("x", [x509.DNSName("*.volume.internal")]),
        ("x", [x509.IPAddress(ipaddress.ip_address("10.9.9.9"))]),
        ("x", [x509.IPAddress(ipaddress.ip_address("fe80::1"))]),
        ("", [x509.DNSName("a.b")]),
    ],
)
def test_any_name_in_a_certificate_will_do(
    serve: Serve, tmp_path: Path, common_name: str, names: list[x509.GeneralName]
) -> None:
    identity, ca = plain_identity(tmp_path, common_name, names)
    settings = grpc_settings(identity, ca)
    assert reached(channels_of(settings), serve(settings).address)


def test_certificate_that_names_nobody(serve: Serve, tmp_path: Path) -> None:
    identity, ca = plain_identity(tmp_path, "")
    settings = grpc_settings(identity, ca)
    with pytest.raises(RpcFailure, match="the certificate has no name"):
        call(channels_of(settings), serve(settings).address)


def test_names_in_order() -> None:
    subject = (((("organizationName", "o"),)), (("commonName", "cn"),))
    assert name_in({"subject": subject, "subjectAltName": (("IP Address", "FE80:0:0:0:0:0:0:1"), ("DNS", "d"))}) == "d"
    assert name_in({"subject": subject, "subjectAltName": (("IP Address", "FE80:0:0:0:0:0:0:1"),)}) == "fe80::1"
    assert name_in({"subject": subject, "subjectAltName": (("DNS", "*"), ("URI", "spiffe://a/b"))}) == "cn"
    assert name_in({}) == ""


# --- reload, breakage ------------------------------------------------------------------------------------------------


def test_both_sides_take_over_new_certificates(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    renewed = Authority(tmp_path / "renewed", authority.ca)
    identity = renewed.issue("volume", "old.internal", common_name="old")
    settings = grpc_settings(identity, renewed.path)
    side = serve(replace(settings, grpc_allowed_common_names="old,new"))
    tls = Tls(settings)
    assert tls.grpc is not None
    channels = secure_channels(tls.grpc)
    assert call(channels, side.address).remote_time_ns == 7

    def presented() -> str:
        context = authority.client(identity)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(socket.create_connection((HOST, side.server.port), TIMEOUT_S)) as sock:
            certificate = sock.getpeercert()
            assert certificate is not None
            return name_in(certificate)

    assert presented() == "old.internal"
    renewed.issue("volume", "new.internal", common_name="new")
    assert presented() == "old.internal"
    side.tls.look()
    tls.look()
    assert presented() == "new.internal"
    assert call(channels, side.address).remote_time_ns == 7, "the open channel goes on"
    fresh = channels.dial(side.address)
    ping_again = fresh.unary_unary("/volume_server_pb.VolumeServer/Ping")
    assert ping_again(b"", timeout=TIMEOUT_S)
    fresh.close()
    channels.close()


@pytest.mark.parametrize("key", ["grpc.ca", "grpc.volume.cert", "grpc.volume.key"])
def test_broken_files_are_named(authority: Authority, volume: Identity, tmp_path: Path, key: str) -> None:
    absent = str(tmp_path / "absent.pem")
    fields = {"grpc.ca": "grpc_ca", "grpc.volume.cert": "grpc_cert", "grpc.volume.key": "grpc_key"}
    settings = replace(grpc_settings(volume, authority.path), **{fields[key]: absent})
    with pytest.raises(SecurityError) as caught:
        Tls(settings)
    assert str(caught.value) == f"{key} = {absent}: cannot be read: no such file or directory"


def test_broken_client_pair_is_named(authority: Authority, volume: Identity, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pem")
    settings = replace(grpc_settings(volume, authority.path), grpc_client_cert=absent, grpc_client_key=absent)
    with pytest.raises(SecurityError, match=f"^grpc.volume.client_cert = {absent}: cannot be read"):
        Tls(settings)


# --- hostile connections ---------------------------------------------------------------------------------------------


def test_silent_clients_do_not_keep_others_out(serve: Serve, authority: Authority, volume: Identity) -> None:
    settings = grpc_settings(volume, authority.path)
    side = serve(settings)
    silent = [socket.create_connection((HOST, side.server.port), TIMEOUT_S) for _ in range(50)]
    try:
        for number, sock in enumerate(silent):
            if number % 2:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        done = threading.Event()
        found: list[bool] = []

        def honest() -> None:
            found.append(reached(channels_of(settings), side.address))
            done.set()

        threading.Thread(target=honest, daemon=True).start()
        assert done.wait(5.0)
        assert found == [True]
    finally:
        for sock in silent:
            sock.close()


def test_handshakes_have_a_limit(
    serve: Serve, authority: Authority, volume: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(service.SERVER_OPTIONS)
    assert 0 < options["grpc.server_handshake_timeout_ms"] <= 20_000
    short = tuple({**options, "grpc.server_handshake_timeout_ms": 500}.items())
    monkeypatch.setattr(service, "SERVER_OPTIONS", short)
    side = serve(grpc_settings(volume, authority.path))
    silent = socket.create_connection((HOST, side.server.port), TIMEOUT_S)
    with silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b"", "cut, not waited for"


def test_least_version_is_1_2(serve: Serve, authority: Authority, volume: Identity) -> None:
    side = serve(grpc_settings(volume, authority.path))
    context = authority.client(volume)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection((HOST, side.server.port), TIMEOUT_S)) as sock:
        assert sock.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with context.wrap_socket(socket.create_connection((HOST, side.server.port), TIMEOUT_S)) as sock:
        assert sock.version() == "TLSv1.2"
