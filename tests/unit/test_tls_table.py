"""Every row of operations.md 3.4 and 3.5 at the ports themselves: what is spoken with whom, or why no server starts.

Rows where upstream serves in plain text or lets everyone in are those of departure S1, and say so.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest
from test_grpc_tls import ping, stand_in
from test_tls import Bench, connect
from tls_helpers import HOST, Authority, Identity, plain_identity, write

from pyvolume.config import ServerConfig
from pyvolume.pb import volume_server_pb2
from pyvolume.security_config import SecurityConfig, SecurityError, SecurityLoader
from pyvolume.server.grpc.service import make_grpc_server
from pyvolume.server.grpc_tls import name_checks, secure_channels, server_credentials
from pyvolume.server.rpc import VOLUME_SERVICE, Channels, RpcFailure
from pyvolume.server.tls import Tls

TIMEOUT_S = 20.0
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
CBC = "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA"


class Certificates:
    """Files by the words that the tables use for them."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "ca")
        self.other = Authority(directory / "other")
        self.volume = self.authority.issue("volume", HOST, common_name="volume")
        self.client = self.authority.issue("client", "client.role", common_name="client")
        self.stranger = self.other.issue("client", "client.role", common_name="client")
        garbage = directory / "garbage.pem"
        write(garbage, b"no PEM at all\n")
        self.words = {
            "CERT": str(self.volume.cert),
            "KEY": str(self.volume.key),
            "CA": str(self.authority.path),
            "CLIENT_PEM": str(self.client.cert),
            "CLIENT_KEY": str(self.client.key),
            "ABSENT": str(directory / "absent.pem"),
            "GARBAGE": str(garbage),
        }

    def load(self, directory: Path, toml: str) -> SecurityConfig:
        """What a server makes of the text, its words replaced by paths."""
        for word, path in self.words.items():
            toml = toml.replace(f'"{word}"', f'"{path}"')
        (directory / "security.toml").write_text(toml)
        return SecurityLoader(ServerConfig(config_dir=str(directory)), {"HOME": str(directory)}).load()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def refusal(files: Certificates, directory: Path, toml: str) -> str:
    """What the start says, at the settings or at the files they name."""
    with pytest.raises(SecurityError) as caught:
        Tls(files.load(directory, toml).tls)
    return str(caught.value)


# --- 3.4: HTTPS on the admin port ------------------------------------------------------------------------------------

PAIR = '[https.volume]\ncert = "CERT"\nkey = "KEY"\n'
WITH_CA = PAIR + 'ca = "CA"\n'


def speaks(port: int, context: ssl.SSLContext) -> bool:
    """Whether a request is answered over TLS. With TLS 1.3 a refused client learns of it at its first read."""
    request = f"GET /status HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
    with contextlib.suppress(OSError), connect(context, port) as sock:
        sock.sendall(request)
        return sock.recv(12) == b"HTTP/1.1 200"
    return False


def speaks_plain(port: int) -> bool:
    with socket.create_connection((HOST, port), TIMEOUT_S) as sock:
        sock.sendall(f"GET /status HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        return sock.recv(9) == b"HTTP/1.1 "  # a TLS port says HTTP/1.0 to plain requests, as upstream


def versions(port: int, make: Callable[[], ssl.SSLContext]) -> set[ssl.TLSVersion]:
    found = set()
    for version in (V12, V13):
        context = make()
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL")  # SHA-1 among them, which Python does not offer by itself
        if speaks(port, context):
            found.add(version)
    return found


@pytest.mark.parametrize(
    ("toml", "needs_certificate", "spoken"),
    [
        pytest.param("", False, None, id="nothing"),
        pytest.param('[https.volume]\ncert = ""\nkey = ""\nca = ""\n', False, None, id="empty"),
        pytest.param(PAIR, False, {V12, V13}, id="pair"),
        pytest.param(PAIR + '[tls]\nmin_version = "TLS 1.3"\n', False, {V12, V13}, id="pair, limits are ignored"),
        pytest.param(WITH_CA, True, {V12, V13}, id="ca"),
        pytest.param(WITH_CA + '[tls]\nmin_version = "TLS 1.3"\n', True, {V13}, id="ca, least version"),
        pytest.param(WITH_CA + '[tls]\nmax_version = "TLS 1.2"\n', True, {V12}, id="ca, greatest version"),
        pytest.param(WITH_CA + f'[tls]\ncipher_suites = "{CBC}"\n', True, {V12, V13}, id="ca, suite without HTTP/2"),
    ],
)
def test_what_the_admin_port_speaks(
    files: Certificates,
    tmp_path: Path,
    toml: str,
    needs_certificate: bool,
    spoken: set[ssl.TLSVersion] | None,
) -> None:
    server = Bench(tmp_path / "data", files.load(tmp_path, toml).tls, public=True)
    try:
        assert speaks_plain(server.public.port), "the public port is plain in every row"
        assert speaks_plain(server.port) == (spoken is None)
        assert speaks(server.port, files.authority.client()) == (spoken is not None and not needs_certificate)
        assert speaks(server.port, files.authority.client(files.stranger)) == (
            spoken is not None and not needs_certificate
        )
        assert versions(server.port, lambda: files.authority.client(files.client)) == (spoken or set())
        if spoken:
            context = files.authority.client(files.client)
            context.set_alpn_protocols(["h2", "http/1.1"])
            with connect(context, server.port) as sock:
                assert sock.selected_alpn_protocol() == "http/1.1", "departure A8"
    finally:
        server.close()


GO_PLAIN, GO_HANGS, GO_STOPS, GO_IGNORES = "plain HTTP", "every handshake hangs", "stops", "ignored"
"""What upstream does in the same row."""


@pytest.mark.parametrize(
    ("toml", "upstream", "key", "reason"),
    [
        ('[https.volume]\nca = "CA"\n', GO_PLAIN, "https.volume.ca", "https.volume.cert and https.volume.key are not"),
        ('[https.volume]\ncert = "CERT"\n', GO_PLAIN, "https.volume.cert", "https.volume.key is not set"),
        ('[https.volume]\nkey = "KEY"\n', GO_PLAIN, "https.volume.key", "https.volume.cert is not set"),
        ('[https.volume]\ncert = "CERT"\nca = "CA"\n', GO_PLAIN, "https.volume.cert", "https.volume.key is not set"),
        ('[https.volume]\ncert = "ABSENT"\nkey = "KEY"\n', GO_HANGS, "https.volume.cert", "no such file or directory"),
        ('[https.volume]\ncert = "CERT"\nkey = "ABSENT"\n', GO_HANGS, "https.volume.key", "no such file or directory"),
        ('[https.volume]\ncert = "GARBAGE"\nkey = "KEY"\n', GO_HANGS, "https.volume.cert", "no usable certificate"),
        ('[https.volume]\ncert = "CERT"\nkey = "CLIENT_KEY"\n', GO_HANGS, "https.volume.key", "is not the key of"),
        (PAIR + 'ca = "ABSENT"\n', GO_STOPS, "https.volume.ca", "no such file or directory"),
        (PAIR + 'ca = "GARBAGE"\n', GO_HANGS, "https.volume.ca", "no usable certificate"),
        (WITH_CA + '[tls]\nmin_version = "TLSv1.2"\n', GO_STOPS, "tls.min_version", "invalid tls version TLSv1.2"),
        (WITH_CA + '[tls]\nmax_version = "2"\n', GO_STOPS, "tls.max_version", "invalid tls version 2"),
        (
            WITH_CA + '[tls]\ncipher_suites = "NOPE"\n',
            GO_STOPS,
            "tls.cipher_suites",
            "invalid tls cipher suite name NOPE",
        ),
        (PAIR + '[tls]\nmin_version = "TLSv1.2"\n', GO_IGNORES, "tls.min_version", "invalid tls version TLSv1.2"),
    ],
)
def test_https_that_is_broken_forbids_the_start(
    files: Certificates, tmp_path: Path, toml: str, upstream: str, key: str, reason: str
) -> None:
    text = refusal(files, tmp_path, toml)
    assert text.startswith(f"{key} "), f"upstream: {upstream}"
    assert reason in text


# --- 3.5: gRPC -------------------------------------------------------------------------------------------------------

MTLS = '[grpc]\nca = "CA"\n[grpc.volume]\ncert = "CERT"\nkey = "KEY"\n'
NAMED = MTLS + "allowed_commonNames = "
DOMAIN = '[grpc]\nca = "CA"\nallowed_wildcard_domain = "{}"\n[grpc.volume]\ncert = "CERT"\nkey = "KEY"\n'

Outcome = Literal["answered", "refused", "closed"]


class Grpc:
    """A server with these settings, and clients of every kind."""

    def __init__(self, files: Certificates, security: SecurityConfig) -> None:
        self.files = files
        self.tls = Tls(security.tls)
        credentials = None if self.tls.grpc is None else server_credentials(self.tls.grpc)
        self.server = make_grpc_server(
            stand_in(),
            f"{HOST}:0",
            credentials=credentials,
            interceptors=name_checks(security.tls),
            handlers={"Ping": ping},
        )
        self.server.start()

    def ask(self, identity: Identity | None, *, plain: bool = False) -> Outcome:
        """answered; refused: the call; closed: the connection."""
        target = f"{HOST}:{self.server.port}"
        if plain:
            channel = grpc.insecure_channel(target)
        else:
            parts = [None, None]
            if identity is not None:
                parts = [identity.key.read_bytes(), identity.cert.read_bytes()]
            trusted = self.files.authority.path.read_bytes()
            channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(trusted, *parts))
        path = f"/{VOLUME_SERVICE.full_name}/Ping"
        request, response = volume_server_pb2.PingRequest, volume_server_pb2.PingResponse
        start = channel.unary_unary(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        try:
            start(request(), timeout=TIMEOUT_S)
        except grpc.RpcError as exc:
            assert exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED), exc
            return "refused" if exc.code() is grpc.StatusCode.PERMISSION_DENIED else "closed"
        finally:
            channel.close()
        return "answered"

    def reaches(self, channels: Channels) -> bool:
        """Whether a server with the same settings may call this one."""
        try:
            channels.unary(
                f"{HOST}:1.{self.server.port}",
                VOLUME_SERVICE,
                "Ping",
                volume_server_pb2.PingRequest(),
                timeout_s=TIMEOUT_S,
            )
        except RpcFailure:
            return False
        finally:
            channels.close()
        return True


@pytest.fixture
def serve(files: Certificates, tmp_path: Path) -> Iterator[Callable[[str], Grpc]]:
    made: list[Grpc] = []

    def start(toml: str) -> Grpc:
        made.append(Grpc(files, files.load(tmp_path, toml)))
        return made[-1]

    yield start
    for one in made:
        one.server.stop(1.0)


@pytest.mark.parametrize(
    ("toml", "client", "volume"),
    [
        pytest.param(MTLS, "answered", "answered", id="ca"),
        pytest.param(NAMED + '"client"\n', "answered", "refused", id="a name"),
        pytest.param(NAMED + '"volume,client"\n', "answered", "answered", id="names"),
        pytest.param(NAMED + '"volume, client"\n', "refused", "answered", id="names are not trimmed"),
        pytest.param(DOMAIN.format("ent"), "answered", "refused", id="a domain"),
        pytest.param(DOMAIN.format("ume") + 'allowed_commonNames = "client"\n', "answered", "answered", id="both"),
    ],
)
def test_who_may_call_with_mutual_tls(serve: Any, files: Certificates, toml: str, client: str, volume: str) -> None:
    server = serve(toml)
    assert server.ask(files.client) == client
    assert server.ask(files.volume) == volume
    assert server.ask(files.stranger) == "closed", "another authority"
    assert server.ask(None) == "closed", "no certificate"
    assert server.ask(None, plain=True) == "closed"
    assert server.tls.grpc is not None
    assert server.reaches(secure_channels(server.tls.grpc)) == (volume == "answered"), "we come as volume"


def test_a_certificate_without_a_name_does_not_pass_a_domain(serve: Any, files: Certificates, tmp_path: Path) -> None:
    """Quirk of upstream: with only a domain set, the list holds one empty name, and such a certificate passes."""
    nameless, ca = plain_identity(tmp_path, "")
    both = tmp_path / "both.pem"
    both.write_bytes(files.authority.path.read_bytes() + ca.read_bytes())
    server = serve(DOMAIN.format(".cluster").replace('"CA"', f'"{both}"'))
    assert server.ask(nameless) == "refused"


@pytest.mark.parametrize(
    "toml", ["", '[grpc]\nca = ""\n[grpc.volume]\ncert = ""\nkey = ""\nallowed_commonNames = ""\n']
)
def test_without_settings_grpc_is_plain(serve: Any, files: Certificates, toml: str) -> None:
    server = serve(toml)
    assert server.ask(None, plain=True) == "answered"
    assert server.ask(files.client) == "closed"


def test_we_call_with_the_client_pair(serve: Any, files: Certificates) -> None:
    server = serve(NAMED + '"client"\nclient_cert = "CLIENT_PEM"\nclient_key = "CLIENT_KEY"\n')
    assert server.tls.grpc is not None
    assert server.reaches(secure_channels(server.tls.grpc))


@pytest.mark.parametrize("half", ['client_cert = "CLIENT_PEM"\n', 'client_key = "CLIENT_KEY"\n'])
def test_half_a_client_pair_is_passed_over(serve: Any, half: str) -> None:
    server = serve(NAMED + '"client"\n' + half)
    assert server.tls.grpc is not None
    assert not server.reaches(secure_channels(server.tls.grpc)), "we come as volume"


@pytest.mark.parametrize(
    ("toml", "key", "reason"),
    [
        ('[grpc.volume]\ncert = "CERT"\nkey = "KEY"\n', "grpc.volume.cert", "grpc.ca is not set"),
        ('[grpc]\nca = "CA"\n[grpc.volume]\ncert = "CERT"\n', "grpc.volume.cert", "grpc.volume.key is not set"),
        ('[grpc]\nca = "CA"\n[grpc.volume]\nkey = "KEY"\n', "grpc.volume.key", "grpc.volume.cert is not set"),
        ('[grpc]\nca = "CA"\n', "grpc.ca", "grpc.volume.cert and grpc.volume.key are not set"),
        ('[grpc.volume]\nallowed_commonNames = "client"\n', "grpc.volume.allowed_commonnames", "are not set"),
        ('[grpc]\nallowed_wildcard_domain = ".x"\n', "grpc.allowed_wildcard_domain", "are not set"),
        (MTLS + '[tls]\nmin_version = "bogus"\n', "tls.min_version", "invalid tls version bogus"),
        (MTLS + '[tls]\nmax_version = "bogus"\n', "tls.max_version", "invalid tls version bogus"),
        (MTLS + '[tls]\ncipher_suites = "NOPE"\n', "tls.cipher_suites", "invalid tls cipher suite name NOPE"),
        (MTLS.replace('"CA"', '"ABSENT"'), "grpc.ca", "no such file or directory"),
        (MTLS.replace('"CA"', '"GARBAGE"'), "grpc.ca", "no usable certificate"),
        (MTLS.replace('"CERT"', '"ABSENT"'), "grpc.volume.cert", "no such file or directory"),
        (MTLS.replace('"KEY"', '"CLIENT_KEY"'), "grpc.volume.key", "is not the key of"),
        (
            MTLS + 'client_cert = "ABSENT"\nclient_key = "CLIENT_KEY"\n',
            "grpc.volume.client_cert",
            "no such file or directory",
        ),
    ],
)
def test_mutual_tls_that_is_broken_forbids_the_start(
    files: Certificates, tmp_path: Path, toml: str, key: str, reason: str
) -> None:
    """Upstream serves in plain text, and accepts anyone, in all rows but the last one."""
    text = refusal(files, tmp_path, toml)
    assert text.startswith(f"{key} ")
    assert reason in text
