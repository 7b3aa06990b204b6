"""A server process with TLS: refusals at start, SIGHUP, limits of gRPC, tokens in logs (operations.md 2.4, 3; S1)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tls_helpers import HOST, Authority, Identity

from tools.ports import free_port

LIMIT_S = 60.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < end, what
        time.sleep(0.05)


def sign(fid: str, key: str) -> str:
    """A token as masters make it."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, {"fid": fid})]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    digest = hmac.new(key.encode(), text, hashlib.sha256).digest()
    return (text + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


class Server:
    """A process with a security.toml of its own, in no cluster."""

    def __init__(self, base: Path, toml: str, *words: str, global_flags: tuple[str, ...] = ()) -> None:
        self.base = base
        (base / "data").mkdir(exist_ok=True)
        self.toml = base / "security.toml"
        self.toml.write_text(toml)
        self.port, self.grpc_port = free_port(), free_port()
        self.log_path = base / f"log.{self.port}"
        flags = [f"-ip={HOST}", f"-port={self.port}", f"-port.grpc={self.grpc_port}", f"-dir={base}/data", "-master="]
        command = [sys.executable, "-m", "pyvolume", "-logtostderr", f"-config_dir={base}", *global_flags]
        with self.log_path.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "volume", *flags, "-preStopSeconds=0", *words],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=base,
                env={**os.environ, "HOME": str(base)},
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ask(self, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
        """The whole answer of a request that closes its connection."""
        assert self.process.poll() is None, self.log
        with socket.create_connection((HOST, self.port), 10) as sock:
            stream = context.wrap_socket(sock, server_hostname=HOST) if context is not None else sock
            stream.sendall(request)
            data = b""
            while chunk := stream.recv(65536):
                data += chunk
            return data

    def healthy(self, context: ssl.SSLContext | None = None) -> bool:
        request = f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
        return b" 200 " in self.ask(request, context)[:20]

    def reload(self) -> None:
        count = self.log.count("Reload volume server...")
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log.count("Reload volume server...") > count, "the reload")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(toml: str, *words: str, global_flags: tuple[str, ...] = ()) -> Server:
        servers.append(Server(tmp_path, toml, *words, global_flags=global_flags))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


Make = Callable[..., Server]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def volume(authority: Authority) -> Identity:
    return authority.issue("volume")


def https(identity: Identity, *more: str) -> str:
    return "\n".join(["[https.volume]", f'cert = "{identity.cert}"', f'key = "{identity.key}"', *more, ""])


def mtls(identity: Identity, authority: Authority, *more: str) -> str:
    pair = [f'cert = "{identity.cert}"', f'key = "{identity.key}"']
    return "\n".join(["[grpc]", f'ca = "{authority.path}"', "[grpc.volume]", *pair, *more, ""])


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ('[https.volume]\ncert = "/x/c"\nkey = "/x/k"\n', "https.volume.cert = /x/c: cannot be read: no such file"),
        ('[https.volume]\ncert = "/x/c"\n', "https.volume.cert in .*security.toml asks for TLS, but https.volume.key"),
        (
            '[grpc.volume]\ncert = "/x/c"\nkey = "/x/k"\n',
            "grpc.volume.cert in .*security.toml asks .* grpc.ca is not set",
        ),
        (
            '[grpc]\nca = "/x/a"\n[grpc.volume]\ncert = "/c"\nkey = "/k"\n',
            "grpc.ca = /x/a: cannot be read: no such file",
        ),
        ('[https.client]\nenabled = true\nca = "/x/a"\n', "https.client.ca = /x/a: cannot be read: no such file"),
    ],
)
def test_broken_tls_ends_the_start(make: Make, toml: str, reason: str) -> None:
    server = make(toml)
    assert server.process.wait(LIMIT_S) == 1
    assert re.search(f"refusing to start: {reason}", server.log)


def test_sighup_takes_over_certificates_keys_and_white_list(make: Make, tmp_path: Path, authority: Authority) -> None:
    own = Authority(tmp_path / "own", authority.ca)
    identity = own.issue("volume")
    settings = https(identity)
    server = make('[access]\nui = false\n[jwt.signing]\nkey = "first"\n' + settings)
    context = authority.client()
    wait_for(lambda: server.healthy(context), "serving")

    def serial() -> str:
        with context.wrap_socket(socket.create_connection((HOST, server.port), 10), server_hostname=HOST) as sock:
            certificate = sock.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])

    def admitted(key: str) -> bool:
        token = sign("9,0100000001", key)
        head = f"PUT /9,0100000001 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n"
        status = server.ask(f"{head}Content-Length: 1\r\n\r\nx".encode(), context).split(b" ", 2)[1]
        assert status in (b"401", b"500"), "let in, there is no such volume and no master to ask"
        return status == b"500"

    before = serial()
    assert admitted("first")
    assert not admitted("second")
    own.issue("volume")
    server.toml.write_text('[access]\nui = true\n[jwt.signing]\nkey = "second"\n' + settings)
    server.reload()
    wait_for(lambda: serial() != before, "the new certificate")
    assert admitted("second")
    assert not admitted("first")
    page = server.ask(b"GET /ui/index.html HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", context)
    assert b" 400 " in page[:20], "whether there is a UI is settled at the start"

    server.toml.write_text('[jwt.signing]\nkey = "third"\n[guard]\nwhite_list = "nonsense"\n' + settings)
    server.reload()
    wait_for(lambda: "security settings stay as they were: guard.white_list" in server.log, "the refusal")
    assert admitted("second"), "all of it stays"
    server.toml.write_text('[guard]\nwhite_list = "10.9.9.9"\n')
    server.reload()
    wait_for(lambda: not admitted("third"), "the list is in force")
    cleared = '[jwt.signing]\nkey = ""\n[guard]\nwhite_list = ""\n'
    server.toml.write_text(cleared)
    server.reload()
    wait_for(lambda: admitted("none"), "an empty key clears, a missing one would not")


@pytest.mark.parametrize("limit", ['min_version = "TLS 1.3"', 'cipher_suites = "TLS_AES_256_GCM_SHA384"'])
def test_grpc_speaks_only_what_tls_limits_allow(make: Make, authority: Authority, volume: Identity, limit: str) -> None:
    server = make(mtls(volume, authority) + f"[tls]\n{limit}\n")
    wait_for(server.healthy, "serving")
    context = authority.client(volume)
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(socket.create_connection((HOST, server.grpc_port), 10), server_hostname=HOST) as sock:
        assert sock.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        pytest.raises(OSError),
        context.wrap_socket(socket.create_connection((HOST, server.grpc_port), 10), server_hostname=HOST),
    ):
        pass


def test_open_calls_are_not_warned_of_with_mutual_tls(make: Make, authority: Authority, volume: Identity) -> None:
    server = make(mtls(volume, authority) + f'[guard]\nwhite_list = "{HOST}"\n')
    wait_for(server.healthy, "serving")
    assert "the white list does not cover calls" not in server.log


def test_tokens_and_keys_are_in_no_log_at_any_level(make: Make) -> None:
    server = make(
        '[jwt.signing]\nkey = "sesame-write"\n[jwt.signing.read]\nkey = "sesame-read"\n', global_flags=("-v=4",)
    )
    wait_for(server.healthy, "serving")
    tokens = []
    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        for key in ("sesame-read", "sesame-write", "wrong"):
            for fid in ("9,0100000001", "9,0200000002"):
                token = sign(fid, key)
                tokens.append(token)
                body = b"" if method in ("GET", "HEAD", "DELETE") else b"x"
                for target, header in (
                    (f"/9,0100000001?jwt={token}", ""),
                    (f"//9,0100000001?jwt={token}", ""),
                    ("/9,0100000001", f"Authorization: Bearer {token}\r\n"),
                    ("/9,0100000001", f"Cookie: AT={token}\r\n"),
                ):
                    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}"
                    server.ask(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    server.ask(f"GET /9,0100000001?jwt={tokens[0]} BAD\r\n\r\n".encode())
    server.reload()
    log = server.log
    assert f"jwt verification error from {HOST}: token signature is invalid" in log
    assert f'jwt fid mismatch from {HOST}: token has "9,0200000002", request has "9,0100000001"' in log
    assert not [token for token in tokens if token in log or token.rpartition(".")[2] in log]
    assert "sesame" not in log
