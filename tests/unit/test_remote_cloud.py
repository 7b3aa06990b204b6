"""Remote fetch from Google's and Azure's stores, played by servers on loopback; and what is said without the extras."""

from __future__ import annotations

import json
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trustme

from pyvolume.ops import remote, remote_cloud
from pyvolume.ops.endpoint_guard import EndpointRefused, Rule
from pyvolume.pb import remote_pb2

DATA = bytes(range(256)) * 50_000  # more than three blocks of 4 MiB
ACCOUNT_KEY = "c2VjcmV0LWtleQ=="


class Store:
    """An HTTP(S) server: requests are noted, objects given by ranges, tokens to whoever asks."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.stall: threading.Event | None = None
        self.short = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                outer.seen.append(("POST", self.path, dict(self.headers)))
                self._answer(200, json.dumps({"access_token": "tok", "expires_in": 3600}).encode())

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append(("GET", unquote(self.path), headers))
                if "missing" in self.path:
                    self._answer(404, b"<Error><Code>BlobNotFound</Code></Error>")
                    return
                if "projection=" in self.path:  # what Google's library asks of a bucket besides
                    self._answer(200, b"{}")
                    return
                if outer.stall is not None:
                    outer.stall.wait(20)
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", headers.get("x-ms-range", "")))
                assert wanted is not None
                start, end = int(wanted[1]), min(int(wanted[2]), len(DATA) - 1)
                piece = DATA[start : end + 1]
                if outer.short:
                    piece = piece[:-1]
                self._answer(206, piece, ("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(DATA)}"))

            def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for name, value in (("Content-Type", "application/json"), ("ETag", '"e"'), *headers):
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.port = self.server.server_address[1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def plain() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    store = Store(context)
    yield store
    store.close()


def service_account(port: int) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return json.dumps(
        {
            "type": "service_account",
            "client_email": "a@example.com",
            "private_key": key.decode(),
            "private_key_id": "1",
            "project_id": "p",
            "token_uri": f"http://127.0.0.1:{port}/token",
        }
    )


@pytest.fixture
def gcs(plain: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Callable[[Rule | None], Any]]:
    pytest.importorskip("google.cloud.storage", reason="pyvolume[gcs] is not installed")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{plain.port}")
    conf = remote_pb2.RemoteConf(type="gcs", gcs_google_application_credentials=service_account(plain.port))
    return plain, lambda rule: remote.make_client(conf, rule)


@pytest.fixture
def azure(secure: Store) -> tuple[Store, Callable[[Rule | None], Any]]:
    pytest.importorskip("azure.storage.blob", reason="pyvolume[azure] is not installed")
    endpoint = f"https://localhost:{secure.port}/"
    conf = remote_pb2.RemoteConf(
        type="azure", azure_account_name="account1", azure_account_key=ACCOUNT_KEY, azure_endpoint=endpoint
    )
    return secure, lambda rule: remote.make_client(conf, rule)


@pytest.fixture(params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> tuple[Store, Callable[[Rule | None], Any]]:
    found: tuple[Store, Callable[[Rule | None], Any]] = request.getfixturevalue(request.param)
    return found


PLACE = remote.Place("bucket", "/deep/ä b")


def test_ranges_are_read_with_the_librarys_credentials(cloud: tuple[Store, Callable[[Rule | None], Any]]) -> None:
    store, make = cloud
    client = make(None)
    with remote.Job() as job:
        assert client.read(PLACE, 100, len(DATA) - 200, job) == DATA[100:-100]
        assert client.read(PLACE, 7, 1, job) == DATA[7:8]
    gets = [headers for method, _, headers in store.seen if method == "GET"]
    assert all(
        headers["authorization"] in ("Bearer tok",) or "SharedKey account1:" in headers["authorization"]
        for headers in gets
    )
    assert any("deep/ä b" in path for method, path, _ in store.seen if method == "GET")
    client.close()


def test_what_is_missing_or_short_is_an_error(cloud: tuple[Store, Callable[[Rule | None], Any]]) -> None:
    store, make = cloud
    client = make(None)
    with remote.Job() as job:
        with pytest.raises(remote.RemoteError, match="failed to download file bucket/missing: "):
            client.read(remote.Place("bucket", "/missing"), 0, 10, job)
        store.short = True
        with pytest.raises(remote.RemoteError, match=r"short read from|failed to download file"):
            client.read(PLACE, 0, 10, job)


def test_every_dial_passes_the_guard(cloud: tuple[Store, Callable[[Rule | None], Any]]) -> None:
    store, make = cloud
    client = make(Rule("the endpoint"))
    with remote.Job() as job, pytest.raises(EndpointRefused, match="resolves to loopback address"):
        client.read(PLACE, 0, 10, job)
    assert store.seen == []


def test_a_job_that_ends_cuts_the_request(cloud: tuple[Store, Callable[[Rule | None], Any]]) -> None:
    store, make = cloud
    store.stall = threading.Event()
    client = make(None)
    try:
        with remote.Job(1.0) as job, pytest.raises(remote.RemoteError, match="context deadline exceeded"):
            client.read(PLACE, 0, 10, job)
    finally:
        store.stall.set()


def test_credentials_in_a_file_of_the_environment(
    gcs: tuple[Store, Callable[[Rule | None], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = gcs
    (tmp_path / "key.json").write_text(service_account(store.port))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    client = remote.make_client(remote_pb2.RemoteConf(type="gcs"), None)
    with remote.Job() as job:
        assert client.read(PLACE, 5, 5, job) == DATA[5:10]
        assert client.read(PLACE, 5, 0, job) == b""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(remote.RemoteError, match="failed to read credentials file"):
        remote.make_client(remote_pb2.RemoteConf(type="gcs"), None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "neither azure_account_name nor the AZURE_STORAGE_ACCOUNT environment variable is set"),
        ({"azure_account_name": "BAD/"}, 'invalid azure account name "BAD/": expecting 3 to 24 lowercase letters'),
        (
            {"azure_account_name": "acct1", "azure_account_key": "!!"},
            "account name:acct1: decode account key: illegal base64 data at input byte 0",
        ),
        (
            {"azure_account_name": "acct1", "azure_account_key": "YWJj", "azure_endpoint": "http://1.2.3.4"},
            'invalid azure endpoint "http://1.2.3.4": expecting an https service url, such as '
            "https://acct1.blob.core.usgovcloudapi.net/",
        ),
    ],
)
def test_settings_of_azure_that_cannot_be(fields: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCESS_KEY", raising=False)
    with pytest.raises(remote.RemoteError, match=re.escape(text)):
        remote.make_client(remote_pb2.RemoteConf(type="azure", **fields), None)


@pytest.mark.parametrize(
    ("kind", "module"), [("gcs", "google.auth.transport.requests"), ("azure", "azure.storage.blob")]
)
def test_what_is_not_installed_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    conf = remote_pb2.RemoteConf(type=kind, azure_account_name="account1", azure_account_key=ACCOUNT_KEY)
    with pytest.raises(remote.RemoteError, match=rf"remote storage type {kind} needs .* pyvolume\[{kind}\]"):
        remote.make_client(conf, None)


def test_more_than_asked_for_is_not_kept() -> None:
    with remote.Job() as job:
        sink = remote_cloud._Sink(4, job)
        assert sink.write(b"abcd") == 4
        with pytest.raises(remote.RemoteError, match="more than the 4 bytes asked for"):
            sink.write(b"e")
