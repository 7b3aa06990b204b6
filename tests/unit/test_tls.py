"""HTTPS on the admin port, outgoing HTTPS, reload of certificates (contract operations.md 3.4; S1, A8; http.md 1)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from tls_helpers import HOST, Authority, Identity, https_settings, write

from pyvolume.config import DirConfig, ServerConfig
from pyvolume.ops.peers import PeerClient, PeerError
from pyvolume.security_config import CIPHER_SUITES, SecurityConfig, SecurityError, TlsSettings
from pyvolume.server import tls as tls_module
from pyvolume.server.context import ServerContext
from pyvolume.server.http_app import HttpServer, make_admin_server, make_public_server
from pyvolume.server.master_client import Location
from pyvolume.server.tls import Handshakes, PemFile, Reloading, Tls, TlsHTTPServer, grpc_cipher_suites, server_context
from pyvolume.storage.store import Store
from pyvolume.types import ReplicaPlacement, Ttl

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def volume(authority: Authority) -> Identity:
    return authority.issue("volume")


@pytest.fixture(scope="module")
def client01(authority: Authority) -> Identity:
    return authority.issue("client01")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Master:
    """Tells where volumes are."""

    def __init__(self) -> None:
        self.places: dict[int, list[Location]] = {}

    def lookup_volume(self, vid: int, collection: str = "", **_: object) -> list[Location]:
        return self.places.get(vid, [])

    def invalidate(self, vid: int) -> None:
        self.places.pop(vid, None)


class Bench:
    def __init__(self, directory: Path, settings: TlsSettings, *, public: bool = False, **config: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.config = ServerConfig(
            ip=HOST, bind_ip=HOST, port=0, public_port=0, dirs=(DirConfig(str(directory), "", 8),)
        )
        self.config = replace(self.config, masters=(), **config)
        self.store = Store(self.config)
        self.store.load()
        self.master = Master()
        self.tls = Tls(settings)
        security = SecurityConfig(tls=settings)
        self.context = ServerContext(self.config, security, self.store, cast("Any", self.master), tls=self.tls)
        self.admin = make_admin_server(self.context)
        self.servers: list[HttpServer] = [self.admin]
        if public:
            self.public = make_public_server(self.context)
            self.servers.append(self.public)
        self.threads = [threading.Thread(target=server.run, daemon=True) for server in self.servers]
        for thread in self.threads:
            thread.start()
        self.allocate(1)

    def allocate(self, vid: int, placement: str = "000") -> None:
        rp = ReplicaPlacement.parse(placement)
        self.store.allocate_volume(vid, "", rp, Ttl.NONE, preallocate=0, disk_type="", version=3)

    @property
    def port(self) -> int:
        return self.admin.port

    @property
    def handshakes(self) -> Handshakes:
        return cast("TlsHTTPServer", self.admin.server).handshakes

    def close(self) -> None:
        for server in self.servers:
            server.stop(5.0)
        for thread in self.threads:
            thread.join(10)
        self.store.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def start(settings: TlsSettings, **options: Any) -> Bench:
        made.append(Bench(tmp_path / f"data{len(made)}", settings, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


Make = Callable[..., Bench]


def connect(context: ssl.SSLContext, port: int) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection((HOST, port), TIMEOUT_S), server_hostname=HOST)


def ask(sock: socket.socket, request: bytes) -> tuple[int, bytes]:
    """Sends one request and reads the answer by its Content-Length."""
    sock.sendall(request)
    return answer(sock)


def answer(sock: socket.socket) -> tuple[int, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError(f"closed after {data!r}")
        data += more
    head, body = data.split(b"\r\n\r\n", 1)
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < lengths[0]:
        body += sock.recv(65536)
    assert len(body) == lengths[0], "nothing follows an answer"
    return int(head.split(b" ", 2)[1]), body


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {HOST}", *headers, "", ""]).encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}", *headers]
    lines += ["Content-Type: application/octet-stream", "", ""]
    return "\r\n".join(lines).encode() + body


# --- what is served --------------------------------------------------------------------------------------------------


def test_upload_and_read_of_all_sizes_on_one_connection(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    with connect(authority.client(), server.port) as sock:
        for number, size in enumerate((0, 1, 4096, 16384, 16385, 100_000, 3 << 20)):
            data = hashlib.sha256(bytes([number])).digest() * (size // 32 + 1)
            data = data[:size]
            path = f"/1,{number + 1:02x}0000000{number + 1:x}"
            status, _ = ask(sock, post(path, data))
            assert status == 201
            assert ask(sock, get(path)) == (200, data) if size else True


def test_two_requests_in_one_record_are_both_answered(bench: Make, authority: Authority, volume: Identity) -> None:
    """The second one is in ssl's memory when the first is answered: no event will tell of it."""
    server = bench(https_settings(volume))
    with connect(authority.client(), server.port) as sock:
        assert ask(sock, post("/1,0100000001", b"one"))[0] == 201
        sock.sendall(get("/1,0100000001") * 3 + get("/1,0100000001", "Connection: close"))
        rest = b""
        while chunk := sock.recv(65536):
            rest += chunk
    assert rest.count(b"HTTP/1.1 200 OK") == 4


def test_body_that_comes_with_its_head_and_in_crumbs(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    with connect(authority.client(), server.port) as sock:
        request = post("/1,0200000001", b"x" * 9000)
        assert ask(sock, request)[0] == 201  # one record: head, and body beyond the first read
        for byte in post("/1,0300000001", b"crumbs"):
            sock.sendall(bytes([byte]))
        assert answer(sock)[0] == 201
        assert ask(sock, get("/1,0300000001")) == (200, b"crumbs")


def test_alpn_offers_http_1_1_only(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    context = authority.client()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with connect(context, server.port) as sock:
        assert sock.selected_alpn_protocol() == "http/1.1"
        assert ask(sock, get("/status"))[0] == 200


def test_public_port_stays_plain(bench: Make, authority: Authority, volume: Identity, client01: Identity) -> None:
    server = bench(https_settings(volume, authority.path), public=True)
    with connect(authority.client(client01), server.port) as sock:
        assert ask(sock, post("/1,0400000001", b"public"))[0] == 201
    with socket.create_connection((HOST, server.public.port), TIMEOUT_S) as plain:
        assert ask(plain, get("/1,0400000001")) == (200, b"public")


def test_end_of_a_connection_is_told_by_close_notify(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    context = authority.client()
    sock = context.wrap_socket(
        socket.create_connection((HOST, server.port), TIMEOUT_S), server_hostname=HOST, suppress_ragged_eofs=False
    )
    with sock:
        assert ask(sock, get("/status", "Connection: close"))[0] == 200
        assert sock.recv(1) == b"", "a ragged end would raise"


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\n\r\n", b"POST /1,01 HTTP/1.1\r\n", b"PUT /x", b"HEAD /", b"OPTIONS *"]
)
def test_plain_request_is_told_so(bench: Make, volume: Identity, first: bytes) -> None:
    server = bench(https_settings(volume))
    with socket.create_connection((HOST, server.port), TIMEOUT_S) as sock:
        sock.sendall(first)
        data = b""
        while chunk := sock.recv(4096):
            data += chunk
    assert data == b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"


@pytest.mark.parametrize("first", [b"DELETE / HTTP/1.1\r\n\r\n", b"\x00\x01\x02\x03\x04", b"\x16\x03\x01\x00\x05hello"])
def test_other_bytes_get_no_answer(bench: Make, authority: Authority, volume: Identity, first: bytes) -> None:
    server = bench(https_settings(volume))
    with socket.create_connection((HOST, server.port), TIMEOUT_S) as sock:
        sock.sendall(first)
        with contextlib.suppress(ConnectionResetError):
            data = sock.recv(4096)
            assert data[:4] != b"HTTP"
    with connect(authority.client(), server.port) as sock:
        assert ask(sock, get("/status"))[0] == 200


def test_slow_readers_get_every_byte(bench: Make, authority: Authority, volume: Identity) -> None:
    """The socket is full most of the time: a refused write of ssl is repeated with the same bytes."""
    server = bench(https_settings(volume))
    data = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(1 << 18))
    context = authority.client()
    with connect(context, server.port) as sock:
        assert ask(sock, post("/1,0500000001", data))[0] == 201
    found: list[tuple[int, bytes]] = []

    def read_slowly() -> None:
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            plain.settimeout(TIMEOUT_S)
            plain.connect((HOST, server.port))
            with context.wrap_socket(plain, server_hostname=HOST) as sock:
                sock.sendall(get("/1,0500000001", "Connection: close"))
                got = bytearray()
                for number in itertools.count():
                    piece = sock.recv(5000)
                    got += piece
                    if not piece:
                        break
                    if number % 200 == 0:
                        time.sleep(0.005)
                head, _, body = bytes(got).partition(b"\r\n\r\n")
                found.append((int(head.split(b" ", 2)[1]), body))

    threads = [threading.Thread(target=read_slowly) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [status for status, _ in found] == [200] * 4
    assert all(body == data for _, body in found)


def test_many_clients_read_and_write_at_once(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    context = authority.client()
    failures: list[object] = []

    def work(worker: int) -> None:
        try:
            with connect(context, server.port) as sock:
                for number in range(25):
                    size = (worker * 7919 + number * 104729) % 1_500_000
                    data = bytes([worker, number]) * (size // 2 + 1)
                    path = f"/1,{worker * 64 + number + 1:x}00000007"
                    assert ask(sock, post(path, data))[0] == 201
                    assert ask(sock, get(path)) == (200, data)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


# --- handshakes ------------------------------------------------------------------------------------------------------


def test_two_hundred_silent_clients_cost_an_honest_one_nothing(
    bench: Make, authority: Authority, volume: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The honest client is answered while all the others wait: for a server that waited with them it would be too late.

    How long its connections took is printed (pytest -s).
    """
    server = bench(https_settings(volume))
    monkeypatch.setattr(server.handshakes, "_limit_s", 600.0)
    with contextlib.ExitStack() as stack:
        for number in range(200):
            silent = stack.enter_context(socket.create_connection((HOST, server.port), TIMEOUT_S))
            if number % 2:
                silent.sendall(b"\x16\x03\x01\x02\x00\x01")  # a handshake that stops after six bytes
        wait_for(lambda: server.handshakes.unfinished == 200, "all are waiting")
        context = authority.client()
        times = []
        for _ in range(100):
            started = time.monotonic()
            with connect(context, server.port) as sock:
                assert ask(sock, get("/status"))[0] == 200
            times.append(time.monotonic() - started)
            assert server.handshakes.unfinished >= 200, "they are there all the time"
        times.sort()
        print(f"connect, handshake, answer: p50 {times[49] * 1000:.1f} ms, p99 {times[98] * 1000:.1f} ms")


def test_handshake_has_a_deadline_and_the_oldest_give_way(authority: Authority, volume: Identity) -> None:
    contexts = Reloading((), lambda: server_context(https_settings(volume)), 3600)
    done: list[ssl.SSLSocket] = []
    handshakes = Handshakes(contexts, lambda sock, _: done.append(sock), most=2, limit_s=0.5)
    pairs = [socket.socketpair() for _ in range(3)]
    try:
        for _, ours in pairs:
            handshakes.add(ours, (HOST, 1))
        pairs[0][0].settimeout(0.4)
        assert pairs[0][0].recv(1) == b"", "the oldest went at once for the third"
        for theirs, _ in pairs[1:]:
            theirs.settimeout(5)
            assert theirs.recv(1) == b"", "the others when their time was over"
        assert handshakes.expired == 3
        assert not done
    finally:
        handshakes.stop()
        for theirs, _ in pairs:
            theirs.close()


def test_trouble_with_one_connection_is_not_that_of_others(authority: Authority, volume: Identity) -> None:
    good = server_context(https_settings(volume))
    contexts = Reloading((), lambda: good, 3600)
    done: list[ssl.SSLSocket] = []
    handshakes = Handshakes(contexts, lambda sock, _: done.append(sock))
    answers: list[Any] = [RuntimeError("no context"), good]

    def current() -> ssl.SSLContext:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast("ssl.SSLContext", answer)

    contexts.current = current  # type: ignore[method-assign]
    pairs = [socket.socketpair() for _ in range(2)]
    try:
        for theirs, ours in pairs:
            theirs.settimeout(TIMEOUT_S)
            handshakes.add(ours, (HOST, 1))
            if not answers[1:]:
                with authority.client().wrap_socket(theirs, server_hostname=HOST):
                    wait_for(lambda: len(done) == 1, "the second one is through")
            else:
                with pytest.raises(OSError):
                    authority.client().wrap_socket(theirs, server_hostname=HOST)
    finally:
        handshakes.stop()
        for sock in (*done, *(theirs for theirs, _ in pairs)):
            sock.close()


def test_failed_handshakes_are_logged_once_a_second(
    bench: Make, volume: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    server = bench(https_settings(volume))
    with caplog.at_level(logging.INFO, "pyvolume.server.tls"):
        for _ in range(20):
            with socket.create_connection((HOST, server.port), TIMEOUT_S) as sock:
                sock.sendall(b"nonsense")
                with contextlib.suppress(ConnectionResetError):
                    sock.recv(1)
        wait_for(lambda: server.handshakes.failed == 20, "all failed")
    lines = [record.getMessage() for record in caplog.records if "TLS handshake error" in record.getMessage()]
    assert 1 <= len(lines) <= 5
    assert lines[0].startswith(f"http: TLS handshake error from {HOST}:")


def test_stop_cuts_unfinished_handshakes(bench: Make, authority: Authority, volume: Identity) -> None:
    server = bench(https_settings(volume))
    with (
        socket.create_connection((HOST, server.port), TIMEOUT_S) as silent,
        connect(authority.client(), server.port) as idle,
    ):
        assert ask(idle, get("/status"))[0] == 200
        wait_for(lambda: server.handshakes.unfinished == 1, "the silent one is known")
        started = time.monotonic()
        server.admin.stop(10.0)
        assert time.monotonic() - started < 3
        assert silent.recv(1) == b""
        assert idle.recv(1) == b""


# --- client certificates, versions, ciphers --------------------------------------------------------------------------


def served(server: Bench, context: ssl.SSLContext) -> bool:
    try:
        with connect(context, server.port) as sock:
            return ask(sock, get("/status"))[0] == 200
    except (OSError, ConnectionError):
        return False


def test_client_certificates(
    bench: Make, authority: Authority, volume: Identity, client01: Identity, tmp_path: Path
) -> None:
    server = bench(https_settings(volume, authority.path))
    assert served(server, authority.client(client01))
    assert not served(server, authority.client()), "without a certificate"
    stranger = Authority(tmp_path / "other").issue("client01")
    assert not served(server, authority.client(stranger)), "of another CA"


V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
GCM256 = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"


@pytest.mark.parametrize(
    ("with_ca", "limits", "speaks"),
    [
        (False, {}, {V12, V13}),
        (False, {"min_version": "TLS 1.3"}, {V12, V13}),  # Quirk: [tls] counts with a CA only
        (True, {}, {V12, V13}),
        (True, {"min_version": "TLS 1.3"}, {V13}),
        (True, {"max_version": "TLS 1.2"}, {V12}),
        (True, {"min_version": "TLS 1.0"}, {V12, V13}),
        (True, {"min_version": "TLS 1.2", "max_version": "TLS 1.2"}, {V12}),
        (True, {"cipher_suites": "TLS_AES_128_GCM_SHA256"}, {V13}),
        (True, {"cipher_suites": f"{GCM256}, TLS_AES_128_GCM_SHA256"}, {V12, V13}),
    ],
)
def test_versions(
    bench: Make,
    authority: Authority,
    volume: Identity,
    client01: Identity,
    with_ca: bool,
    limits: dict[str, str],
    speaks: set[ssl.TLSVersion],
) -> None:
    server = bench(https_settings(volume, authority.path if with_ca else None, **limits))
    for version in (V12, V13):
        context = authority.client(client01)
        context.minimum_version = context.maximum_version = version
        assert served(server, context) == (version in speaks), version


def test_cipher_suites_by_their_go_names(
    bench: Make, authority: Authority, volume: Identity, client01: Identity
) -> None:
    server = bench(https_settings(volume, authority.path, max_version="TLS 1.2", cipher_suites=GCM256))
    context = authority.client(client01)
    with connect(context, server.port) as sock:
        assert sock.cipher() == ("ECDHE-ECDSA-AES256-GCM-SHA384", "TLSv1.2", 256)
    context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    assert not served(server, context)


def test_openssl_knows_every_suite() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, openssl in CIPHER_SUITES.items():
        known = {cipher["name"] for cipher in context.get_ciphers()}
        if openssl:
            context.set_ciphers(openssl)
            assert openssl in {cipher["name"] for cipher in context.get_ciphers()}
        else:
            assert name in known, "suites of TLS 1.3 are always on, under this very name"


def test_old_protocol_versions_are_never_spoken(volume: Identity) -> None:
    assert server_context(https_settings(volume, min_version="SSLv3")).minimum_version == V12


# --- broken files ----------------------------------------------------------------------------------------------------


def broken(
    tmp_path: Path, authority: Authority, volume: Identity, client01: Identity, case: str
) -> tuple[TlsSettings, str]:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no PEM at all\n")
    absent = str(tmp_path / "absent.pem")
    good = https_settings(volume, authority.path)
    if case == "absent cert":
        return replace(
            good, https_cert=absent
        ), f"https.volume.cert = {absent}: cannot be read: no such file or directory"
    if case == "absent key":
        return replace(
            good, https_key=absent
        ), f"https.volume.key = {absent}: cannot be read: no such file or directory"
    if case == "absent ca":
        return replace(good, https_ca=absent), f"https.volume.ca = {absent}: cannot be read: no such file or directory"
    if case == "a directory":
        return replace(good, https_ca=str(tmp_path)), f"https.volume.ca = {tmp_path}: cannot be read: is a directory"
    if case == "no certificate":
        return replace(
            good, https_cert=str(garbage)
        ), f"https.volume.cert = {garbage}: holds no usable certificate in PEM"
    if case == "no key":
        return replace(good, https_key=str(garbage)), f"https.volume.key = {garbage}: holds no usable key in PEM"
    if case == "another's key":
        reason = f"is not the key of the certificate in {volume.cert}"
        return replace(good, https_key=str(client01.key)), f"https.volume.key = {client01.key}: {reason}"
    if case == "no authority":
        return replace(good, https_ca=str(garbage)), f"https.volume.ca = {garbage}: holds no usable certificate in PEM"
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(volume.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    return replace(good, https_key=str(locked)), f"https.volume.key = {locked}: is encrypted"


@pytest.mark.parametrize(
    "case",
    [
        "absent cert",
        "absent key",
        "absent ca",
        "a directory",
        "no certificate",
        "no key",
        "another's key",
        "no authority",
        "encrypted key",
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, authority: Authority, volume: Identity, client01: Identity, case: str
) -> None:
    settings, text = broken(tmp_path, authority, volume, client01, case)
    with pytest.raises(SecurityError) as caught:
        Tls(settings)
    assert str(caught.value).startswith(text)


def test_broken_files_of_the_client_are_named(tmp_path: Path, volume: Identity) -> None:
    absent = str(tmp_path / "absent.pem")
    for settings, key in (
        (TlsSettings(client_enabled=True, client_ca=absent), "https.client.ca"),
        (TlsSettings(client_enabled=True, client_cert=absent, client_key=str(volume.key)), "https.client.cert"),
    ):
        with pytest.raises(SecurityError, match=f"^{key} = {absent}: cannot be read"):
            Tls(settings)
    assert Tls(TlsSettings(client_ca=absent)).https_client is None, "not looked at unless enabled, as upstream"


# --- reload ----------------------------------------------------------------------------------------------------------


def serial(context: ssl.SSLContext, port: int) -> str:
    with connect(context, port) as sock:
        certificate = sock.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


def test_certificates_are_taken_over_while_serving(
    bench: Make, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renewed = Authority(tmp_path / "renewed", authority.ca)
    identity = renewed.issue("volume")
    server = bench(https_settings(identity))
    context = authority.client()
    before = serial(context, server.port)
    with connect(context, server.port) as kept:
        old_key = identity.key.read_bytes()
        renewed.issue("volume")
        assert serial(context, server.port) == before, "not before the interval or a SIGHUP"
        new_cert, new_key = identity.cert.read_bytes(), identity.key.read_bytes()
        write(identity.key, old_key)
        with caplog.at_level(logging.INFO):
            server.tls.look()
        assert "certificates stay as they were: https.volume.key" in caplog.text
        assert serial(context, server.port) == before
        write(identity.key, new_key)
        server.tls.look()
        after = serial(context, server.port)
        assert after != before
        assert identity.cert.read_bytes() == new_cert
        assert ask(kept, get("/status"))[0] == 200, "connections stay"


def test_files_are_looked_at_when_the_interval_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("one")
    now = [100.0]
    monkeypatch.setattr(tls_module.time, "monotonic", lambda: now[0])
    value = Reloading((PemFile("k", str(path)),), path.read_text, 60.0)
    write(path, b"twice")
    assert value.current() == "one"
    now[0] += 60
    assert value.current() == "twice"


# --- outgoing HTTPS --------------------------------------------------------------------------------------------------


def peer_client(settings: TlsSettings) -> PeerClient:
    part = Tls(settings).https_client
    assert part is not None
    return PeerClient(part.current)


def test_outgoing_requests_verify_and_identify(
    bench: Make, authority: Authority, volume: Identity, client01: Identity, tmp_path: Path
) -> None:
    server = bench(https_settings(volume, authority.path))
    host = f"{HOST}:{server.port}"
    ours = {"client_cert": str(client01.cert), "client_key": str(client01.key)}
    good = peer_client(TlsSettings(client_enabled=True, client_ca=str(authority.path), **ours))
    for _ in range(3):
        assert good.request("GET", host, "/status").read(1 << 20)
    assert server.admin.server.stats.adopted == 1, "the connection is kept"
    other = Authority(tmp_path / "other")
    for settings in (
        TlsSettings(client_enabled=True, client_ca=str(other.path), **ours),
        TlsSettings(client_enabled=True, **ours),
        TlsSettings(client_enabled=True, client_ca=str(authority.path)),
    ):
        with pytest.raises(PeerError):
            peer_client(settings).request("GET", host, "/status")
    careless = TlsSettings(client_enabled=True, client_insecure_skip_verify=True, **ours)
    assert peer_client(careless).request("GET", host, "/status").status == 200


def test_outgoing_requests_check_the_host_name(bench: Make, authority: Authority) -> None:
    server = bench(https_settings(authority.issue("elsewhere", "elsewhere.example", common_name=HOST)))
    with pytest.raises(PeerError, match=r"(?i)ip address mismatch"):
        peer_client(TlsSettings(client_enabled=True, client_ca=str(authority.path))).request(
            "GET", f"{HOST}:{server.port}", "/status"
        )


def test_replicas_proxied_reads_and_chunks_travel_by_https(
    bench: Make, authority: Authority, volume: Identity, client01: Identity
) -> None:
    settings = replace(
        https_settings(volume, authority.path),
        client_enabled=True,
        client_cert=str(client01.cert),
        client_key=str(client01.key),
        client_ca=str(authority.path),
    )
    first, second = bench(settings), bench(settings)
    places = [Location(f"{HOST}:{one.port}", f"{HOST}:{one.port}") for one in (first, second)]
    for one in (first, second):
        one.allocate(7, "001")
        one.master.places[7] = places
        one.admin.ops.self_url = f"{HOST}:{one.port}"
    second.allocate(8)
    first.master.places[8] = [places[1]]
    second.master.places[8] = [places[1]]
    context = authority.client(client01)
    with connect(context, first.port) as sock:
        status, body = ask(sock, post("/7,0100000001", b"both"))
        assert (status, second.store.find_volume(7) is not None) == (201, True), body
        for one in (first, second):
            found = one.store.find_volume(7)
            assert found is not None and bytes(found.read_needle(1).data or b"") == b"both"
    with connect(context, second.port) as sock:
        assert ask(sock, post("/8,0200000002", b"chunk"))[0] == 201
    with connect(context, first.port) as sock:
        assert ask(sock, get("/8,0200000002")) == (200, b"chunk"), "proxied"
        manifest = b'{"name":"m","size":5,"chunks":[{"fid":"8,0200000002","offset":0,"size":5}]}'
        assert ask(sock, post("/7,0300000003?cm=true", manifest))[0] == 201
        sock.sendall(get("/7,0300000003", "Connection: close"))
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    assert data.startswith(b"HTTP/1.1 200") and b"chunk" in data.split(b"\r\n\r\n", 1)[1]


# --- what gRPC is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "value"),
    [
        ({}, None),
        ({"min_version": "TLS 1.2"}, None),
        ({"min_version": "TLS 1.3"}, "ECDHE-PSK-AES128-CBC-SHA"),
        ({"cipher_suites": "TLS_AES_256_GCM_SHA384"}, "ECDHE-PSK-AES128-CBC-SHA"),
        ({"cipher_suites": GCM256}, "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ],
)
def test_suites_for_grpc(limits: dict[str, str], value: str | None) -> None:
    assert grpc_cipher_suites(TlsSettings(grpc_cert="c", **limits)) == value
    assert grpc_cipher_suites(TlsSettings(https_cert="c", **limits)) is None
