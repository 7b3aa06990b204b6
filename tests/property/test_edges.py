"""Hostile input at the Python edges: whatever comes, it is taken or refused in a declared way, never by an accident.

A short look as a test, the same each time; PYVOLUME_FUZZ_S=seconds looks at each edge for that long, at other inputs
(`make fuzz-py`). The parsers in C have targets of their own (`make fuzz`).
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import hmac
import io
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_nodes import COOKIE, Server, put
from http_bench import HOST, Bench, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pyvolume.config import ServerConfig
from pyvolume.ops import gojson, gz, image_query, images, jsonpath, manifest, message
from pyvolume.ops.auth import bearer_token, token_allows
from pyvolume.security_config import DiskProbeConfig, SecurityConfig, SecurityError, SecurityLoader, Settings
from pyvolume.server.grpc.methods import RPCS
from pyvolume.server.rpc import VOLUME_SERVICE, method_classes
from pyvolume.storage import vif
from pyvolume.storage.ec import sidecar

FUZZ_S = float(os.environ.get("PYVOLUME_FUZZ_S", "0"))
ROUND = 500
"""Examples between two looks at the clock, where there is one."""

pytestmark = pytest.mark.timeout(0 if FUZZ_S else 120)


def edge(strategy: st.SearchStrategy[Any], examples: int = 150) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the test, whose last argument is `data`, over what the strategy makes: so many examples, or for FUZZ_S."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        ready = settings(
            max_examples=ROUND if FUZZ_S else examples,
            deadline=None,
            derandomize=not FUZZ_S,
            suppress_health_check=list(HealthCheck),
        )(given(data=strategy)(test))

        @functools.wraps(ready)
        def run(*args: Any, **fixtures: Any) -> None:
            end = time.monotonic() + FUZZ_S
            while True:
                ready(*args, **fixtures)
                if time.monotonic() >= end:
                    return

        return run

    return decorate


def mutated(base: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The bytes, or the bytes with some replaced, taken out, doubled or put in."""

    def apply(made: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
        text, changes = made
        for at, length, new in changes:
            at = at % (len(text) + 1)
            text = text[:at] + (new or text[at : at + length] * 2) + text[at + length :]
        return text

    change = st.tuples(st.integers(0, 1 << 16), st.integers(0, 8), st.binary(max_size=6))
    return st.tuples(base, st.lists(change, max_size=3)).map(apply)


WORDS = st.sampled_from(["", "a", "..", ".", "/", "a/b", "\\", "\x00", "1", "1,01", "-1", "%2e", "\n", "é", "x" * 300])
NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 13, 14, 31, 32, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), WORDS, NUMBERS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=6), WORDS), inner, max_size=4)
    ),
    max_leaves=10,
)


# --- security.toml, volume.toml, TOML lists --------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "jwt.signing.key",
        "jwt.signing.expires_after_seconds",
        "jwt.signing.read.key",
        "jwt.signing",
        "JWT.Signing.Key",
        "guard.white_list",
        "guard",
        "access.ui",
        "grpc.ca",
        "grpc.volume.cert",
        "grpc.volume.key",
        "grpc.volume.allowed_commonNames",
        "https.volume.cert",
        "https.volume.key",
        "https.client.enabled",
        "tls.min_version",
        "tls.cipher_suites",
        "volume.disk.io.probe",
        "volume.disk.io.timeout",
        "volume.disk.io.slow.latency.hdd",
        "volume.disk.io.min.samples",
        "volume.disk.io.slow.percent",
        "volume.disk.io.max.stat.failures",
        "volume.disk.io.recovery.coef",
    ]
)
ODD = [
    "1",
    "-1",
    "1e9",
    "inf",
    "-inf",
    "nan",
    "0x_",
    "true",
    "1979-05-27",
    "'''",
    "[[",
    "{}",
    '"inf"',
    '"1e999"',
    '"9s"',
]
ODD += ['"10.0.0.0/8"', '"127.0.0.1, ::1"', '"1/2/3"', '"::ffff:1.2.3.4/300"', '"fe80::1%eth0"', '"TLS 1.2"', '"1h"']
ODD += ["9" * 400, "1" + "0" * 5000, "0x" + "f" * 5000]
SCALARS = st.one_of(
    st.text(max_size=8).map(lambda text: json.dumps(text, ensure_ascii=False).replace("\x7f", "")),
    st.sampled_from(ODD),
)
ITEMS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(inner, max_size=2).map(
            lambda items: "{" + ", ".join(f"k{n} = {v}" for n, v in enumerate(items)) + "}"
        ),
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.tuples(KEYS, ITEMS).map(lambda pair: f"{pair[0]} = {pair[1]}"),
    KEYS.map(lambda key: f"[{key}]"),
    KEYS.map(lambda key: f"[[{key}]]"),
)
TOML = mutated(st.lists(LINES, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")))
ENVIRON = st.dictionaries(
    KEYS.map(lambda key: "WEED_" + key.upper().replace(".", "_")),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
    max_size=2,
)


FILES = st.one_of(
    TOML.map(lambda text: ("toml", text)),
    mutated(st.dictionaries(KEYS, JSON, max_size=4).map(lambda tree: json.dumps(tree).encode())).map(
        lambda text: ("json", text)
    ),
)


@edge(st.tuples(FILES, TOML, ENVIRON), 300)
def test_settings_are_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    (extension, first), second, environ = data
    directory = tmp_path_factory.getbasetemp() / "settings"
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    environ = {"HOME": str(directory), **environ}
    loader = SecurityLoader(ServerConfig(config_dir=str(directory)), environ)
    (directory / f"security.{extension}").write_bytes(first)
    (directory / "volume.toml").write_bytes(second)
    security = SecurityConfig()
    try:
        security = loader.load()
    except SecurityError as exc:
        assert "\n" not in str(exc).rstrip("\n")
    assert isinstance(loader.load_disk_probe(), DiskProbeConfig)
    (directory / f"security.{extension}").write_bytes(second)
    try:
        again = loader.reload(security)
    except SecurityError:
        return
    assert again.tls == security.tls and all(again.white_list)


HUGE = st.sampled_from([float("inf"), float("-inf"), float("nan"), "1e999", "nan", "9" * 400])


@edge(st.dictionaries(KEYS, st.one_of(JSON, HUGE), max_size=4), 200)
def test_every_value_can_be_read_as_every_type(data: dict[str, Any]) -> None:
    made = Settings({})
    made.merge(data, Path("x.json"))
    for key in data:
        made.text(key.lower())
        made.boolean(key.lower())
        made.integer(key.lower(), 1)
        made.number(key.lower(), 1.0)
        made.seconds(key.lower(), 1.0)


# --- JWT -------------------------------------------------------------------------------------------------------------

SECRET = b"a key of the tests"
HEADERS = st.one_of(
    st.just({"alg": "HS256", "typ": "JWT"}),
    st.fixed_dictionaries({"alg": st.one_of(st.sampled_from(["HS256", "HS512", "none", "RS256", "hs256"]), JSON)}),
    st.fixed_dictionaries({"alg": st.just("HS256"), "crit": JSON, "b64": JSON, "kid": JSON, "jku": JSON}),
    JSON,
)
CLAIMS = st.one_of(
    st.dictionaries(
        st.sampled_from(["fid", "exp", "nbf", "iat", "iss", "aud", "sub", "jti"]),
        st.one_of(JSON, st.just("3,01"), st.sampled_from([1e400, -1, 0, 4102444800, 10**400, "4102444800", "nan"])),
        max_size=5,
    ),
    JSON,
)


def _part(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=")


def _signed(made: tuple[Any, Any]) -> bytes:
    head, claims = (_part(part) for part in made)
    text = head + b"." + claims
    return text + b"." + _part(hmac.new(SECRET, text, hashlib.sha256).digest())


PARTS = st.tuples(st.one_of(HEADERS, mutated(HEADERS.map(lambda h: json.dumps(h).encode()))), CLAIMS)
TOKENS = st.one_of(PARTS.map(_signed), mutated(PARTS.map(_signed)), st.binary(max_size=60))


@edge(TOKENS, 300)
def test_tokens_allow_or_not(data: bytes) -> None:
    token = data.decode("latin-1")
    assert token_allows(b"another key", token, "3", "01") is False
    if token_allows(SECRET, token, "3", "01"):
        claims = token.split(".")[1]
        assert json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["fid"] == "3,01"


@edge(st.tuples(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60)))
def test_any_request_has_a_token_or_none(data: tuple[bytes, bytes, bytes]) -> None:
    query, header, cookie = data
    request = message.Request("GET", b"/", query, {b"authorization": header}, message_url(), ((b"Cookie", cookie),))
    assert isinstance(request.token, str)
    assert isinstance(bearer_token("", header.decode("latin-1"), str), str)


def message_url() -> Any:
    from pyvolume._native.http import parse_url

    return parse_url(b"/3,01")


# --- texts and files -------------------------------------------------------------------------------------------------

MANIFESTS = mutated(
    st.fixed_dictionaries(
        {
            "name": st.one_of(st.text(max_size=5), JSON),
            "size": st.one_of(NUMBERS, JSON),
            "chunks": st.one_of(
                JSON,
                st.lists(
                    st.fixed_dictionaries(
                        {"fid": st.one_of(WORDS, JSON), "offset": st.one_of(NUMBERS, JSON), "size": NUMBERS}
                    ),
                    max_size=4,
                ),
            ),
        }
    ).map(lambda made: json.dumps(made).encode())
)


@edge(st.one_of(MANIFESTS, JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=40)))
def test_manifests_are_read_or_refused(data: bytes) -> None:
    for text, compressed in ((data, False), (gzip.compress(data), True), (data, True)):
        try:
            made = manifest.load(text, compressed)
        except manifest.ManifestError:
            continue
        assert all(isinstance(chunk.fid, str) for chunk in made.chunks)
        assert isinstance(made.total_bytes, int)


@edge(st.one_of(mutated(JSON.map(lambda v: json.dumps(v).encode())), st.binary(max_size=40)))
def test_json_is_read_or_refused(data: bytes) -> None:
    try:
        value = gojson.loads(data)
    except (ValueError, RecursionError):
        return
    gojson.dumps(value)
    vif.parse(data)


PATHS = st.one_of(
    st.binary(max_size=20),
    st.lists(
        st.sampled_from(
            [
                b"a",
                b".",
                b"#",
                b"*",
                b"?",
                b"#(",
                b")",
                b"|",
                b"@",
                b"\\",
                b'"',
                b"%",
                b"==",
                b"1",
                b"!",
                b"~",
                b"[",
                b"{",
            ]
        ),
        max_size=12,
    ).map(b"".join),
)


@edge(st.tuples(mutated(JSON.map(lambda v: json.dumps(v).encode())), PATHS, st.binary(max_size=4)), 300)
def test_queries_lead_somewhere_or_nowhere(data: tuple[bytes, bytes, bytes]) -> None:
    text, path, operand = data
    for value in jsonpath.values(text):
        found = jsonpath.get(value.raw, path)
        for operator in ("", "=", "!=", "<", ">=", "%", "!%", "x"):
            assert jsonpath.compare(found, operator, operand) in (True, False)


@edge(st.binary(max_size=200))
def test_url_queries(data: bytes) -> None:
    message.parse_query(data)
    message.Query(data).get(b"a")


@edge(mutated(st.binary(max_size=2000).map(gzip.compress)))
def test_gzip_unpacks_or_not(data: bytes) -> None:
    try:
        plain = gz.gunzip(data)
    except gz.BadGzip:
        return
    assert plain is not None and gz.plain_size(data) == len(plain)


@edge(st.one_of(mutated(st.just(bytes.fromhex("0801121208041000180122040000000128013001"))), st.binary(max_size=80)))
def test_sums_of_shards_are_read_or_refused(data: bytes) -> None:
    try:
        sidecar.decode(data)
    except sidecar.BadSidecar:
        return


def _picture(kind: str, mode: str, exif: bool) -> bytes:
    picture = Image.new(mode, (24, 16))
    out = io.BytesIO()
    tags = Image.Exif()
    tags[0x0112] = 6
    picture.save(out, kind, **({"exif": tags} if exif else {}))
    return out.getvalue()


PICTURES = [
    _picture(*spec)
    for spec in (
        ("PNG", "RGBA", False),
        ("PNG", "P", False),
        ("PNG", "I;16", False),
        ("JPEG", "RGB", True),
        ("JPEG", "CMYK", False),
        ("GIF", "P", False),
        ("WEBP", "RGB", True),
        ("TIFF", "RGB", True),
        ("BMP", "RGB", False),
    )
]
QUERIES = st.dictionaries(
    st.sampled_from(["width", "height", "mode", "crop_x1", "crop_y1", "crop_x2", "crop_y2"]),
    st.sampled_from(["1", "7", "20", "0", "-1", "99999999999", "fit", "fill", "", "x"]),
    max_size=5,
)


@pytest.mark.filterwarnings("ignore")  # Pillow tells of what is odd in a picture
@edge(st.tuples(mutated(st.sampled_from(PICTURES)), st.sampled_from(sorted(image_query.RESIZABLE)), QUERIES), 200)
def test_pictures_never_fail(data: tuple[bytes, str, dict[str, str]]) -> None:
    picture, extension, query = data
    assert len(images.apply(picture, extension, image_query.operation(extension, query))) >= 0
    assert len(images.upright(picture)) > 0 or not picture


# --- HTTP ------------------------------------------------------------------------------------------------------------


class Accidents(logging.Handler):
    """Collects records that come with a stack: nobody meant to raise what they tell of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None:
            self.found.append(logging.Formatter().format(record))


@pytest.fixture(scope="module")
def accidents() -> Iterator[Accidents]:
    handler = Accidents()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving(tmp_path_factory.mktemp("http"), fast_lane=False) as made:
        yield made


HEADER_LINES = st.sampled_from(
    [
        b"Content-Type: multipart/form-data; boundary=b",
        b'Content-Type: multipart/form-data; boundary="b"; x*0=y',
        b"Content-Type: application/x-www-form-urlencoded",
        b"Content-Type: image/jpeg",
        b"Content-Encoding: gzip",
        b"Content-Encoding: zstd",
        b"Content-MD5: AAAA",
        b"Seaweed-a: b",
        b"Range: bytes=0-1,3-,-1",
        b"If-None-Match: *",
        b"Accept-Encoding: gzip",
        b"Authorization: Bearer a.b.c",
        b"Transfer-Encoding: chunked",
        b"Connection: close",
        b"Expect: 100-continue",
        b"Content-Disposition: form-data; filename*=utf-8''%ff",
    ]
)
PARAMETERS = st.sampled_from(
    b"""cm=true cm=false width=3 mode=fit&height=1 crop_x2=2&crop_y2=1 ttl=3m ttl=99999999999d ts=1 ts=-1 type=replicate
    fsync=true readDeleted=true dl=true pretty=1 jwt=a response-content-type=%0d%0aa collection=.. %zz a=%00
    crop_x1=99999999999999999999""".split()
)
FILE_IDS = st.sampled_from(
    [
        b"1,01deadbeef",
        b"1,02deadbeef.jpg",
        b"1/03deadbeef/a.png",
        b"1,01deadbeef_1",
        b"1,xx",
        b"9,01deadbeef",
        b"1,",
        b",",
    ]
)


def _multipart(made: tuple[list[bytes], list[bytes]]) -> bytes:
    heads, bodies = made
    parts = [b"--b\r\n" + head + b"\r\n\r\n" + body + b"\r\n" for head, body in zip(heads, bodies, strict=False)]
    return b"".join(parts) + b"--b--\r\n"


PART_HEADS = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="file"; filename="a.txt"',
        b'Content-Disposition: form-data; name="file"; filename="../a"\r\nContent-Type: text/html',
        b"Content-Disposition: form-data; name=x",
        b'Content-Disposition: form-data; name="a"; filename="\\"\x00"\r\nContent-Encoding: gzip',
        b"Content-Transfer-Encoding: quoted-printable\r\nContent-Disposition: form-data; filename=q",
        b"",
    ]
)
BODIES = st.one_of(
    st.binary(max_size=60),
    MANIFESTS,
    mutated(st.sampled_from(PICTURES)),
    mutated(st.binary(max_size=300).map(gzip.compress)),
    mutated(st.tuples(st.lists(PART_HEADS, max_size=3), st.lists(st.binary(max_size=40), max_size=3)).map(_multipart)),
)


@st.composite
def requests(draw: Callable[..., Any]) -> bytes:
    method = draw(st.sampled_from([b"POST", b"PUT", b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH"]))
    target = b"/" + draw(FILE_IDS) + b"?" + b"&".join(draw(st.lists(PARAMETERS, max_size=3)))
    lines = [b"Host: h", *draw(st.lists(HEADER_LINES, max_size=4))]
    body = draw(BODIES) if method in (b"POST", b"PUT") else b""
    if b"Transfer-Encoding: chunked" in lines:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    elif body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (method, target, b"\r\n".join(lines), body)


@edge(st.lists(st.one_of(requests(), mutated(requests())), min_size=1, max_size=3), 200)
def test_requests_are_answered_or_cut_but_never_by_accident(
    bench: Bench, accidents: Accidents, data: list[bytes]
) -> None:
    accidents.found.clear()
    with socket.create_connection((HOST, bench.port), 20) as sock:
        try:
            sock.sendall(b"".join(data))
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        try:
            while chunk := sock.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
    assert not answer or answer.startswith(b"HTTP/1."), answer[:80]
    assert not accidents.found, (data, accidents.found[0])


# --- gRPC ------------------------------------------------------------------------------------------------------------

# Dials nobody: a closed port of this machine, and texts that are no address.
ADDRESSES = ["", "127.0.0.1:1.1", "127.0.0.1:1", "nowhere", "127.0.0.1:x", ":"]
FID = f"1,01{COOKIE:08x}"
TEXTS = st.one_of(
    WORDS, st.sampled_from([*ADDRESSES, ".dat", ".idx", ".ec00", ".ecx", ".vif", "c", "c", "hdd", "=", FID])
)
SMALL = {"idle_timeout_seconds", "since_ns", "preallocate", "limit", "io_byte_per_second", "memory_map_max_size_mb"}
"""Fields that would make a call wait or reserve room: small values only."""
SKIPPED = {
    "VolumeServerLeave",  # stops the heartbeat, of which this server has none
}


def messages(descriptor: Any, depth: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of a message as keyword arguments."""
    fields = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            if depth == 0 or field.message_type.GetOptions().map_entry:
                continue
            values: st.SearchStrategy[Any] = messages(field.message_type, depth - 1)
        elif field.type == FieldDescriptor.TYPE_STRING:
            values = st.sampled_from(ADDRESSES) if "node" in field.name or "target" in field.name else TEXTS
        elif field.type == FieldDescriptor.TYPE_BYTES:
            values = st.binary(max_size=64)
        elif field.type == FieldDescriptor.TYPE_BOOL:
            values = st.booleans()
        elif field.type == FieldDescriptor.TYPE_ENUM:
            values = st.sampled_from([0, 1, 2, 99])
        elif field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
            values = st.floats()
        else:
            is_signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
            bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
            limits = [-(1 << bits - 1), -1, (1 << bits - 1) - 1] if is_signed else [(1 << bits) - 1]
            numbers = [0, 1, 2, 3, 13, 31, 64, COOKIE]
            if field.name == "volume_id":
                numbers += [1, 2, 3] * 6
            values = st.sampled_from(numbers[:3] if field.name in SMALL else numbers + limits)
        fields[field.name] = st.lists(values, max_size=3) if field.is_repeated else values
    return st.fixed_dictionaries({}, optional=fields)


@st.composite
def calls(draw: Callable[..., Any]) -> tuple[str, list[dict[str, Any]]]:
    name = draw(st.sampled_from(sorted(set(RPCS) - SKIPPED)))
    strategy = messages(VOLUME_SERVICE.methods_by_name[name].input_type)
    return name, draw(st.lists(strategy, min_size=1, max_size=3))


class Target:
    """The server that is called; a new one now and then, since calls delete what is there and switch it off."""

    CALLS = 200

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.number = 0
        self.running: Server | None = None

    def server(self) -> Server:
        if self.number % self.CALLS == 0:
            self.end()
            made = self.running = Server(self.directory / str(self.number))
            for vid in (1, 2, 3):
                volume = made.make(vid, "c" if vid == 3 else "")
                for key in range(1, 6):
                    put(volume, key, json.dumps({"a": key}).encode() * key)
            made.call("VolumeEcShardsGenerate", volume_id=3, collection="c")
            made.call("VolumeEcShardsMount", volume_id=3, collection="c", shard_ids=range(14))
        self.number += 1
        assert self.running is not None
        if self.running.store.state.maintenance:
            current = self.running.store.state.current
            self.running.call("SetState", state={"maintenance": False, "version": current.version}).first  # noqa: B018
        return self.running

    def end(self) -> None:
        if self.running is not None:
            self.running.end()
            shutil.rmtree(self.running.directories[0].parent)
            self.running = None


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("grpc"))
    yield made
    made.end()


@edge(calls(), 150)
def test_calls_are_served_or_refused_but_never_by_accident(target: Target, accidents: Accidents, data: Any) -> None:
    name, requests = data
    client = target.server().client
    accidents.found.clear()
    method = VOLUME_SERVICE.methods_by_name[name]
    path, request_class, response_class = method_classes(VOLUME_SERVICE, name)
    made = [request_class(**fields) for fields in requests]
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    start = getattr(client.channel, kind)(
        path, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
    )
    try:
        answer = start(iter(made) if method.client_streaming else made[0], timeout=3)
        if method.server_streaming:
            for number, _ in enumerate(answer):
                if number > 200:
                    answer.cancel()
                    break
    except grpc.RpcError as exc:
        assert exc.code() is not grpc.StatusCode.INTERNAL, (name, made, exc.details(), accidents.found)
        assert exc.code() is not grpc.StatusCode.UNAVAILABLE or "dial" in exc.details(), (name, made, exc.details())
    assert not accidents.found, (name, made, accidents.found[0])
