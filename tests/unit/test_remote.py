"""FetchAndWriteNeedle: an S3 server on loopback, replicas that note what they get, a guard that can be led astray."""

from __future__ import annotations

import io
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_helpers import Answer, wait_for
from grpc_nodes import Server, content
from minio import Minio
from s3_server import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, FakeS3, GoS3, Object, any_s3

from pyvolume.ops import endpoint_guard, remote
from pyvolume.pb import remote_pb2
from pyvolume.server.grpc.remote import fetcher_of

Code = grpc.StatusCode
DATA = bytes(range(256)) * 40
KEY = "deep/ä b+c%20~x.bin"


@pytest.fixture
def s3() -> Iterator[FakeS3]:
    with FakeS3() as server:
        server.objects[f"{BUCKET}/{KEY}"] = Object(DATA)
        yield server


@contextmanager
def running(directory: Path, **more: Any) -> Iterator[Server]:
    server = Server(directory, **more)
    try:
        server.make(7)
        yield server
    finally:
        fetcher_of(server.context).close()
        server.end()


@pytest.fixture
def trusting(tmp_path: Path) -> Iterator[Server]:
    """A server that dials any address."""
    with running(tmp_path, allow_untrusted_remote=True) as server:
        yield server


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path) as server:
        yield server


def conf(endpoint: str, **more: Any) -> Any:
    fields = {
        "type": "s3",
        "name": "n",
        "s3_access_key": ACCESS_KEY,
        "s3_secret_key": SECRET_KEY,
        "s3_region": REGION,
        "s3_endpoint": endpoint,
        "s3_force_path_style": True,
        **more,
    }
    return remote_pb2.RemoteConf(**fields)


def place(path: str = "/" + KEY, bucket: str = BUCKET) -> Any:
    return remote_pb2.RemoteStorageLocation(name="n", bucket=bucket, path=path)


def fetch(server: Server, endpoint: str = "http://127.0.0.1:1", **fields: Any) -> Answer:
    timeout_s = fields.pop("timeout_s", 20.0)
    given = {
        "volume_id": 7,
        "needle_id": 5,
        "cookie": 0x99,
        "size": len(DATA),
        "remote_conf": conf(endpoint),
        "remote_location": place(),
        **fields,
    }
    return server.call("FetchAndWriteNeedle", timeout_s, **given)


def refused(answer: Answer, text: str, code: grpc.StatusCode = Code.UNKNOWN) -> None:
    assert (answer.code, text in answer.details) == (code, True), answer


def nothing_written(server: Server) -> bool:
    return server.volume(7).stat().dat_bytes == 8


# --------------------------------------------------------------------------------------------------------- reading


@pytest.fixture
def any_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeS3 | GoS3]:
    yield from any_s3(tmp_path_factory.mktemp("s3"))


def test_a_piece_of_an_object_becomes_a_needle(trusting: Server, any_store: FakeS3 | GoS3) -> None:
    client = Minio(f"127.0.0.1:{any_store.port}", ACCESS_KEY, SECRET_KEY, secure=False, region=REGION)
    client.put_object(BUCKET, KEY, io.BytesIO(DATA), len(DATA))
    answer = fetch(trusting, any_store.endpoint)
    needle = trusting.volume(7).read_needle(5)
    assert answer.first.e_tag == f"{needle.checksum:08x}"
    assert bytes(needle.data or b"") == DATA
    assert needle.cookie == 0x99
    assert needle.last_modified_s > 0
    assert (needle.name, needle.mime, needle.pairs) == (b"", b"", b"")
    assert fetch(trusting, any_store.endpoint, needle_id=6, offset=100, size=57).first
    assert content(trusting.volume(7), 6) == DATA[100:157]
    refused(
        fetch(trusting, any_store.endpoint, remote_location=place("/nothing")),
        f'read from remote name:"n" bucket:"{BUCKET}" path:"/nothing": '
        f"failed to download file {BUCKET}/nothing: NoSuchKey: ",
    )


def test_the_request_is_the_one_upstream_sends(trusting: Server, s3: FakeS3) -> None:
    assert fetch(trusting, s3.endpoint, offset=3, size=10).first
    [seen] = s3.requests("GET")
    assert seen.path == f"{BUCKET}/{KEY}"
    assert seen.range == "bytes=3-12"
    assert seen.headers["user-agent"] == "SeaweedFS/4.44 S3Manager"
    assert seen.headers["host"] == f"127.0.0.1:{s3.port}"
    assert "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date," in seen.headers["authorization"]


def test_without_keys_s3_is_asked_anonymously(trusting: Server, s3: FakeS3) -> None:
    refused(fetch(trusting, remote_conf=conf(s3.endpoint, s3_access_key="", s3_secret_key="")), "AccessDenied")
    assert "authorization" not in s3.seen[0].headers


KINDS = {
    "wasabi": ("wasabi_endpoint", "wasabi_region", "wasabi_access_key", "wasabi_secret_key"),
    "b2": ("backblaze_endpoint", "backblaze_region", "backblaze_key_id", "backblaze_application_key"),
    "aliyun": ("aliyun_endpoint", "aliyun_region", "aliyun_access_key", "aliyun_secret_key"),
    "baidu": ("baidu_endpoint", "baidu_region", "baidu_access_key", "baidu_secret_key"),
    "contabo": ("contabo_endpoint", "contabo_region", "contabo_access_key", "contabo_secret_key"),
    "tencent": ("tencent_endpoint", "", "tencent_secret_id", "tencent_secret_key"),
    "filebase": ("filebase_endpoint", "", "filebase_access_key", "filebase_secret_key"),
    "storj": ("storj_endpoint", "", "storj_access_key", "storj_secret_key"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_that_speaks_s3_reads_its_own_fields(trusting: Server, s3: FakeS3, kind: str) -> None:
    endpoint, region, access, secret = KINDS[kind]
    fields = {"type": kind, "name": kind, endpoint: s3.endpoint, access: "ak", secret: "sk"}
    if region:
        fields[region] = "moon-1"
    assert fetch(trusting, remote_conf=remote_pb2.RemoteConf(**fields)).first
    fixed = {"filebase": "us-east-1"}.get(kind, "us-west-2")
    assert "Credential=ak/" in s3.seen[0].headers["authorization"]
    assert f"/{'moon-1' if region else fixed}/s3/" in s3.seen[0].headers["authorization"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_that_speaks_s3_is_guarded(guarded: Server, s3: FakeS3, kind: str) -> None:
    fields = {"type": kind, "name": kind, KINDS[kind][0]: s3.endpoint}
    refused(
        fetch(guarded, remote_conf=remote_pb2.RemoteConf(**fields)),
        f'reject remote endpoint: remote endpoint "{s3.endpoint}" resolves to loopback address 127.0.0.1',
    )
    assert s3.seen == []


def test_the_flag_lets_any_address_in(tmp_path: Path, s3: FakeS3) -> None:
    with running(tmp_path / "closed") as server:
        refused(fetch(server, s3.endpoint), "resolves to loopback address")
        refused(fetch(server, "http://169.254.169.254/"), "targets instance metadata service 169.254.169.254")
        refused(fetch(server, ""), "reject remote endpoint: remote endpoint is empty")
        assert nothing_written(server)
    with running(tmp_path / "open", allow_untrusted_remote=True) as server:
        assert fetch(server, s3.endpoint).first


def test_a_bucket_can_stand_in_the_name_of_the_host(trusting: Server) -> None:
    def target(endpoint: str, bucket: str, *, path_style: bool = False) -> tuple[str, str]:
        options = remote.S3Options(endpoint, "r", "a", "s", path_style=path_style)
        return remote.S3Client(options, None)._target(remote.Place(bucket, "/k/../x"))

    assert target("https://s3.example.com", "abc") == ("abc.s3.example.com", "/k/../x")
    assert target("https://s3.example.com/base/", "abc") == ("abc.s3.example.com", "/base/k/../x")
    assert target("https://s3.example.com", "abc", path_style=True) == ("s3.example.com", "/abc/k/../x")
    assert target("https://s3.example.com", "a.bc") == ("s3.example.com", "/a.bc/k/../x")
    assert target("http://s3.example.com", "a.bc") == ("a.bc.s3.example.com", "/k/../x")
    assert target("https://s3.example.com", "Abc") == ("s3.example.com", "/Abc/k/../x")
    assert target("http://127.0.0.1:80", "abc") == ("127.0.0.1", "/abc/k/../x")
    assert target("", "abc", path_style=True) == ("s3.r.amazonaws.com", "/abc/k/../x")


def test_keys_that_are_missing_come_from_the_environment(
    trusting: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY", "AWS_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/")
    refused(fetch(trusting, remote_conf=conf(s3.endpoint, s3_secret_key="")), "NoCredentialProviders")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-env")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert fetch(trusting, remote_conf=conf(s3.endpoint, s3_secret_key="")).first
    assert "Credential=from-env/" in s3.seen[-1].headers["authorization"]
    fields = {"type": "aliyun", "aliyun_endpoint": s3.endpoint, "aliyun_region": "r"}
    monkeypatch.setenv("ALICLOUD_ACCESS_KEY_ID", "ali")
    monkeypatch.setenv("ALICLOUD_ACCESS_KEY_SECRET", "secret")
    assert fetch(trusting, remote_conf=remote_pb2.RemoteConf(**fields)).first
    assert "Credential=ali/" in s3.seen[-1].headers["authorization"]


# ---------------------------------------------------------------------------------------------------- bad requests


def test_fields_that_cannot_be(trusting: Server, s3: FakeS3) -> None:
    refused(fetch(trusting, volume_id=99, remote_conf=None), "not found volume id 99")
    refused(fetch(trusting, remote_conf=None), "remote_conf is missing", Code.INVALID_ARGUMENT)
    refused(fetch(trusting, s3.endpoint, remote_location=None), "remote_location is missing", Code.INVALID_ARGUMENT)
    refused(fetch(trusting, s3.endpoint, remote_location=place("")), "path is empty", Code.INVALID_ARGUMENT)
    for size in (-1, 1 << 31, 1 << 62, -(1 << 63)):
        refused(fetch(trusting, s3.endpoint, size=size), f"cannot hold {size} bytes", Code.INVALID_ARGUMENT)
    refused(fetch(trusting, s3.endpoint, offset=-5), "offset: -5", Code.INVALID_ARGUMENT)
    odd = remote_pb2.RemoteConf(type="odd", name="nm")
    refused(
        fetch(trusting, remote_conf=odd),
        "get remote client: make remote storage client nm: remote storage type odd not found",
    )
    refused(fetch(trusting, remote_conf=conf(s3.endpoint, s3_region="")), "MissingRegion: could not find region")
    refused(
        fetch(trusting, s3.endpoint, remote_location=place(bucket="")), "minimum field size of 1, GetObjectInput.Bu"
    )
    refused(fetch(trusting, s3.endpoint, remote_location=place("/")), "minimum field size of 1, GetObjectInput.Key")
    refused(fetch(trusting, "http://a b/"), 'get remote client: make remote storage client n: parse "http://a b/": ')
    assert s3.seen == []
    assert nothing_written(trusting)


@pytest.mark.parametrize(
    ("credentials", "text"),
    [
        ("/etc/hostname", "reject remote credentials: gcs credentials must be inline JSON"),
        ("~/x.json", "reject remote credentials: gcs credentials must be inline JSON"),
        ("{", "reject remote credentials: parse gcs credentials: unexpected end of JSON input"),
        ("{}", 'reject remote credentials: gcs credential type "" is not accepted here'),
        ('{"type":5}', "cannot unmarshal number into Go struct field .type of type string"),
        ('{"type":"external_account","token_url":"http://127.0.0.1/"}', 'type "external_account" is not accepted'),
        ('{"type":"external_account_authorized_user"}', "is not accepted here"),
        ('{"type":"impersonated_service_account"}', "is not accepted here"),
        (
            '{"type":"service_account","token_uri":"http://127.0.0.1:9/token"}',
            'reject remote endpoint: remote endpoint "http://127.0.0.1:9/token" resolves to loopback address 127.0.0.1',
        ),
    ],
)
def test_credentials_must_hold_their_own_key(guarded: Server, credentials: str, text: str) -> None:
    wanted = remote_pb2.RemoteConf(type="gcs", name="g", gcs_google_application_credentials=credentials)
    refused(fetch(guarded, remote_conf=wanted), text)


# --------------------------------------------------------------------------------------------- stores that misbehave


class Store:
    """An HTTP server that answers every request by a function that gets the connection's file."""

    def __init__(self, answer: Callable[[Any, int], None]) -> None:
        self.count = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.count += 1
                answer(self.wfile, outer.count)
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def head(length: int | None, status: str = "206 Partial Content", *lines: str) -> bytes:
    more = [*lines] if length is None else [*lines, f"Content-Length: {length}"]
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *more, "", ""]).encode()


def test_more_than_asked_for_is_not_read(trusting: Server) -> None:
    sent = []

    def endless(out: Any, count: int) -> None:
        out.write(head(None))
        try:
            while len(sent) < 20_000:
                out.write(b"x" * 65536)
                sent.append(1)
        except OSError:
            return

    with Store(endless) as store:
        refused(fetch(trusting, store.endpoint, size=10), "short read from tier/deep/")
    assert len(sent) < 20_000
    with Store(lambda out, count: out.write(head(1 << 50))) as store:
        refused(fetch(trusting, store.endpoint, size=10), f"got {1 << 50} bytes, want 10")


def test_less_than_asked_for_is_no_needle(trusting: Server, s3: FakeS3) -> None:
    refused(
        fetch(trusting, s3.endpoint, size=len(DATA) + 1),
        f"short read from {BUCKET}/{KEY} at offset 0: got {len(DATA)} bytes, want {len(DATA) + 1}",
    )
    refused(fetch(trusting, s3.endpoint, offset=len(DATA) + 5), "InvalidRange")
    with Store(lambda out, count: out.write(head(None) + b"abc")) as store:
        refused(fetch(trusting, store.endpoint, size=10), "got 3 bytes, want 10")
    assert nothing_written(trusting)


def test_bytes_from_another_place_are_refused(trusting: Server) -> None:
    """As upstream's client is not: it takes them for those it asked for."""
    whole = head(4, "200 OK") + b"abcd"
    with Store(lambda out, count: out.write(whole)) as store:
        refused(fetch(trusting, store.endpoint, size=4, offset=2), "another range than the one asked for")
        assert fetch(trusting, store.endpoint, size=4).first
    other = head(4, "206 Partial Content", "Content-Range: bytes 0-3/9") + b"abcd"
    with Store(lambda out, count: out.write(other)) as store:
        refused(fetch(trusting, store.endpoint, size=4, offset=2), "another range than the one asked for")


def test_redirects_are_not_followed(trusting: Server, s3: FakeS3) -> None:
    there = head(0, "307 Temporary Redirect", f"Location: {s3.endpoint}/{BUCKET}/x")
    with Store(lambda out, count: out.write(there)) as store:
        refused(fetch(trusting, store.endpoint), "status code: 307")
    assert s3.seen == []


def test_what_may_pass_is_tried_again(trusting: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.random, "random", lambda: -0.99)
    statuses = iter([500, 0, 503, None])
    s3.hook = lambda seen: next(statuses)
    assert fetch(trusting, s3.endpoint).first
    assert len(s3.seen) == 4
    s3.seen.clear()
    s3.hook = lambda seen: 503
    refused(fetch(trusting, s3.endpoint), "SlowDown: SlowDown\n\tstatus code: 503, request id: , host id: ")
    assert len(s3.seen) == remote.READ_ATTEMPTS
    s3.seen.clear()
    s3.hook = lambda seen: 403
    refused(fetch(trusting, s3.endpoint), "AccessDenied")
    assert len(s3.seen) == 1


def test_a_body_that_breaks_off_is_fetched_anew(trusting: Server, s3: FakeS3) -> None:
    s3.cut_after = 100
    assert fetch(trusting, s3.endpoint).first
    assert content(trusting.volume(7), 5) == DATA
    assert len(s3.requests("GET")) == 2


def test_nobody_listens(trusting: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.random, "random", lambda: -0.99)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
        text = f'caused by: Get "{endpoint}/{BUCKET}/k": dial tcp {endpoint[7:]}: connect: connection refused'
        refused(fetch(trusting, endpoint, remote_location=place("/k")), text)


# ------------------------------------------------------------------------------------------------- names and dials


def test_a_name_that_changes_its_answer_is_refused_at_the_dial(
    guarded: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["52.216.10.10"], ["127.0.0.1"]]
    asked = []

    def resolve(host: str, timeout_s: float) -> list[Any]:
        asked.append(host)
        return [ipaddress.ip_address(text) for text in answers[min(len(asked), 2) - 1]]

    monkeypatch.setattr(endpoint_guard, "resolve", resolve)
    endpoint = f"http://rebind.example.com:{s3.port}"
    refused(fetch(guarded, endpoint), f'remote endpoint "{endpoint}" resolves to loopback address 127.0.0.1')
    assert asked == ["rebind.example.com"] * 2
    assert s3.seen == []


def test_a_permitted_name_is_dialled_by_its_address(
    guarded: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = []
    really = socket.create_connection

    def connect(address: tuple[str, int], timeout_s: float, source: Any = None) -> socket.socket:
        dialled.append(address[0])
        return really(("127.0.0.1", address[1]), timeout_s)

    monkeypatch.setattr(endpoint_guard, "resolve", lambda host, timeout_s: [ipaddress.ip_address("52.216.10.10")])
    monkeypatch.setattr(endpoint_guard.socket, "create_connection", connect)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    endpoint = f"http://store.example.com:{s3.port}"
    assert fetch(guarded, endpoint).first
    assert fetch(guarded, endpoint, needle_id=6).first
    assert dialled == ["52.216.10.10"], "the second fetch uses the connection of the first"
    assert s3.seen[0].headers["host"] == f"store.example.com:{s3.port}"


def test_the_guard_covers_names_made_of_bucket_and_host(
    guarded: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, timeout_s: float) -> list[Any]:
        return [ipaddress.ip_address("127.0.0.1" if host.startswith("inner.") else "52.216.10.10")]

    monkeypatch.setattr(endpoint_guard, "resolve", resolve)
    wanted = conf(f"http://example.com:{s3.port}", s3_force_path_style=False)
    refused(fetch(guarded, remote_conf=wanted, remote_location=place(bucket="inner")), "resolves to loopback address")


def test_without_the_guard_a_proxy_of_the_environment_is_used(
    trusting: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", s3.endpoint)
    monkeypatch.delenv("no_proxy", raising=False)
    s3.hook = lambda seen: 404
    refused(fetch(trusting, "http://store.example.com"), "NoSuchKey")
    assert s3.seen[0].headers["host"] == "store.example.com"


def test_https_is_checked(trusting: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.random, "random", lambda: -0.99)
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Store(lambda out, count: out.write(head(4, "200 OK") + b"abcd")) as store:
        store.server.socket = context.wrap_socket(store.server.socket, server_side=True)
        endpoint = store.endpoint.replace("http://127.0.0.1", "https://localhost")
        refused(fetch(trusting, endpoint, size=4), "CERTIFICATE_VERIFY_FAILED")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert fetch(trusting, remote_conf=conf(endpoint, name="again"), size=4).first


def test_clients_are_kept_but_not_without_end(trusting: Server, s3: FakeS3) -> None:
    fetcher = fetcher_of(trusting.context)
    for number in range(remote.MAX_CLIENTS + 5):
        wanted = conf(s3.endpoint, name=f"n{number % (remote.MAX_CLIENTS + 3)}")
        assert fetch(trusting, remote_conf=wanted, size=10).first
    assert len(fetcher._clients) == remote.MAX_CLIENTS


# ------------------------------------------------------------------------------------------------- ends and bounds


def test_a_client_that_leaves_ends_the_fetch(trusting: Server) -> None:
    reached, release = threading.Event(), threading.Event()

    def stall(out: Any, count: int) -> None:
        out.write(head(100) + b"abc")
        reached.set()
        release.wait(20)

    fetcher = fetcher_of(trusting.context)
    with Store(stall) as store:
        try:
            answer = fetch(trusting, store.endpoint, size=100, timeout_s=0.5)
            assert answer.code is Code.DEADLINE_EXCEEDED
            assert reached.is_set()
            wait_for(lambda: fetcher._room._taken == 0, "the fetch to end")
        finally:
            release.set()
    assert nothing_written(trusting)


def test_a_fetch_has_an_end_of_its_own(trusting: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    really = remote.Job
    monkeypatch.setattr(remote, "Job", lambda: really(0.3))

    def trickle(out: Any, count: int) -> None:
        out.write(b"HTTP/1.1 206 Partial Content\r\nX: ")
        while not release.wait(0.02):
            out.write(b"x")
            out.flush()

    with Store(trickle) as store:
        try:
            refused(fetch(trusting, store.endpoint), "context deadline exceeded")
        finally:
            release.set()


def test_fetches_wait_for_room() -> None:
    room = remote.Room(100)
    with remote.Job() as job, room.taken(60, job), room.taken(40, job):
        with (
            remote.Job(0.05) as late,
            pytest.raises(remote.RemoteError, match="deadline exceeded"),
            room.taken(1, late),
        ):
            pass
        cancelled = remote.Job()
        cancelled.end()
        with pytest.raises(remote.RemoteError, match="canceled"), room.taken(1, cancelled):
            pass
    with remote.Job() as job, room.taken(1000, job):
        assert room._taken == 1000
    assert room._taken == 0


# -------------------------------------------------------------------------------------------------------- replicas


class Replica:
    """An HTTP server that notes uploads and answers them."""

    def __init__(self, status: int = 201, body: bytes = b'{"size":1}') -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, data))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def replicas() -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(*args: Any) -> Replica:
        made.append(Replica(*args))
        return made[-1]

    yield make
    for replica in made:
        replica.close()


def test_replicas_get_the_needle(trusting: Server, s3: FakeS3, replicas: Callable[..., Replica]) -> None:
    two = [replicas(), replicas()]
    answer = fetch(trusting, s3.endpoint, auth="token", replicas=[{"url": replica.url} for replica in two])
    assert answer.first.e_tag
    for replica in two:
        [(path, headers, body)] = replica.seen
        assert path == "/7,0500000099?type=replicate"
        assert headers["authorization"] == "Bearer token"
        assert headers["x-amz-request-id"] == answer.trailers["x-amz-request-id"]
        assert b'Content-Disposition: form-data; filename=""; name=file\r\n' in body
        assert DATA in body
        assert b"gzip" not in body


def test_a_replica_that_fails_fails_the_call_and_the_needle_stays(
    trusting: Server, s3: FakeS3, replicas: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "UPLOAD_PAUSE_S", 0.001)
    good, bad = replicas(), replicas(500, b'{"error":"no room"}')
    refused(
        fetch(trusting, s3.endpoint, replicas=[{"url": good.url}, {"url": bad.url}]),
        f"remote write needle 5 size {len(DATA)}: "
        f"unmarshalled error http://{bad.url}/7,0500000099?type=replicate: no room",
    )
    assert (len(good.seen), len(bad.seen)) == (1, remote.UPLOAD_ATTEMPTS)
    assert content(trusting.volume(7), 5) == DATA


def test_the_local_failure_wins(trusting: Server, s3: FakeS3, replicas: Callable[..., Replica]) -> None:
    assert fetch(trusting, s3.endpoint).first
    good = replicas()
    refused(
        fetch(trusting, s3.endpoint, cookie=1, offset=1, size=10, replicas=[{"url": good.url}]),
        "local write needle 5 size 10: mismatching cookie 1",
    )
    assert len(good.seen) == 1, "the replicas are written to at the same time"


def test_a_bad_replica_is_refused_before_anything_is_written(
    guarded: Server, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "make_client", lambda *args: _Fixed())
    monkeypatch.setattr(endpoint_guard, "check_endpoint", lambda endpoint: None)
    for target, text in (
        ("127.0.0.1:1", 'reject replica target: remote endpoint "127.0.0.1:1" resolves to loopback address 127.0.0.1'),
        ("10.0.0.7:80/x", 'reject replica target: replica target "10.0.0.7:80/x" must be a bare host:port'),
    ):
        refused(fetch(guarded, "http://8.8.8.8", replicas=[{"url": target}]), text)
    assert nothing_written(guarded)


def test_a_replica_whose_name_changes_its_answer_is_refused_at_the_dial(
    guarded: Server, replicas: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replicas()
    answers = iter(["10.0.0.7"])
    monkeypatch.setattr(remote, "UPLOAD_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "make_client", lambda *args: _Fixed())
    monkeypatch.setattr(endpoint_guard, "check_endpoint", lambda endpoint: None)
    monkeypatch.setattr(
        endpoint_guard, "resolve", lambda host, timeout_s: [ipaddress.ip_address(next(answers, "127.0.0.1"))]
    )
    name = f"replica.example.com:{target.url.rpartition(':')[2]}"
    refused(fetch(guarded, "http://8.8.8.8", replicas=[{"url": name}]), "resolves to loopback address 127.0.0.1")
    assert target.seen == []


class _Fixed:
    """A client without a store."""

    def read(self, place: remote.Place, offset: int, size: int, job: remote.Job) -> bytes:
        return bytes(size)

    def close(self) -> None:
        """Nothing to close."""
