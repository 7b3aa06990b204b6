"""JWT and white list on the wire, and the order of checks (contract http.md 5)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_bench import Bench, serving

from pyvolume.security_config import SecurityConfig

WRITE, READ = b"write key", b"read key"
OCTETS = ("Content-Type", "application/octet-stream")
WRONG = b'{"error":"wrong jwt"}'


def token(key: bytes, fid: str) -> str:
    def enc(raw: bytes) -> bytes:
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    signed = enc(b'{"alg":"HS256","typ":"JWT"}') + b"." + enc(json.dumps({"fid": fid}).encode())
    return (signed + b"." + enc(hmac.new(key, signed, hashlib.sha256).digest())).decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    keys = SecurityConfig(jwt_write_key=WRITE, jwt_read_key=READ)
    with serving(tmp_path_factory.mktemp("jwt"), keys) as bench:
        yield bench


def test_write_read_delete_need_their_own_keys(guarded: Bench) -> None:
    fid = guarded.fid()
    bearer = ("Authorization", f"Bearer {token(WRITE, fid)}")
    for headers in ((OCTETS,), (OCTETS, ("Authorization", f"Bearer {token(READ, fid)}"))):
        refused = guarded.ask("PUT", f"/{fid}", headers, b"x")
        assert (refused.status, refused.body) == (401, WRONG)
    assert guarded.ask("PUT", f"/{fid}", (OCTETS, bearer), b"x").status == 201
    assert guarded.ask("GET", f"/{fid}", (bearer,)).status == 401
    assert guarded.ask("GET", f"/{fid}?jwt={token(READ, fid)}").body == b"x"
    assert guarded.ask("GET", f"/{fid}", (("Cookie", f"AT={token(READ, fid)}"),)).body == b"x"
    assert guarded.ask("GET", f"/{fid}", (("Authorization", f"BEARER:{token(READ, fid)}"),)).body == b"x"
    assert guarded.ask("DELETE", f"/{fid}").status == 401
    assert guarded.ask("DELETE", f"/{fid}", (bearer,)).status == 202


def test_a_bad_query_token_is_final(guarded: Bench) -> None:
    fid = guarded.fid()
    good = ("Authorization", f"Bearer {token(READ, fid)}")
    assert guarded.ask("GET", f"/{fid}?jwt=bad", (good,)).status == 401
    assert guarded.ask("GET", f"/{fid}?jwt=", (good,)).status == 404


def test_head_has_the_headers_of_the_refusal(guarded: Bench) -> None:
    reply = guarded.ask("HEAD", f"/{guarded.fid()}")
    assert (reply.status, reply.get("Content-Length"), reply.get("Content-Type")) == (401, "21", "application/json")


def test_the_read_check_comes_before_the_path(guarded: Bench) -> None:
    for target in ("/", "/xx", "/1,zz", "/ui/index.html"):
        assert guarded.ask("GET", target).status == 401, target
    public = guarded.client(public=True)
    assert public.ask("GET", f"/{guarded.fid()}").status == 401
    public.close()


def test_pages_need_no_token(guarded: Bench) -> None:
    assert guarded.ask("GET", "/status").status == 200
    assert guarded.ask("GET", "/healthz").status == 200
    assert guarded.ask("GET", "/favicon.ico").status == 200
    assert guarded.ask("OPTIONS", "/1,00").status == 200


def test_order_of_checks_of_writes(guarded: Bench) -> None:
    fid = guarded.fid()
    assert guarded.ask("PUT", f"/{fid}?a=%zz", (OCTETS,), b"x").body == b'{"error":"invalid URL escape \\"%zz\\""}'
    assert guarded.ask("PUT", "/x,01deadbeef", (OCTETS,), b"x").status == 400
    assert guarded.ask("PUT", "/1,zz", (OCTETS,), b"x").status == 401
    assert guarded.ask("POST", f"/{fid}", (), b"x").status == 401, "the body is looked at after the token"
    assert guarded.ask("DELETE", "/1,zz").status == 400, "a delete looks at the fid first"


def test_a_refusal_before_the_body_sends_no_100(guarded: Bench) -> None:
    client = guarded.client()
    fid = guarded.fid()
    head = f"PUT /{fid} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    client.send(head.encode())
    reply = client.read("PUT")
    assert (reply.status, reply.interim, reply.body) == (401, [], WRONG)
    assert reply.get("Connection") == "close"
    client.close()
    client.send(head.replace("HTTP/1.1\r\n", f"HTTP/1.1\r\nAuthorization: Bearer {token(WRITE, fid)}\r\n").encode())
    client.send(b"hello")
    accepted = client.read("PUT")
    assert (accepted.status, accepted.interim) == (201, [100])
    client.close()


def test_a_large_body_is_refused_at_its_head(guarded: Bench) -> None:
    client = guarded.client()
    client.send(f"PUT /{guarded.fid()} HTTP/1.1\r\nHost: h\r\nContent-Length: {200 << 20}\r\n\r\n".encode())
    reply = client.read("PUT")
    assert (reply.status, reply.get("Connection")) == (401, "close")
    assert reply.get("Server") == "SeaweedFS Volume 30GB 4.44"
    assert reply.get("X-Amz-Request-Id") is not None
    client.close()


def test_keys_are_taken_from_the_current_settings(tmp_path: Path) -> None:
    with serving(tmp_path, SecurityConfig()) as bench:
        fid = bench.fid()
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201
        bench.context.security = SecurityConfig(jwt_write_key=WRITE)
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"y").status == 401
        assert bench.ask("GET", f"/{fid}").body == b"x"


@pytest.mark.parametrize(
    ("keys", "status"),
    [(SecurityConfig(jwt_write_key=WRITE), 400), (SecurityConfig(jwt_write_key=WRITE, ui_access=True), 200)],
)
def test_the_ui_is_hidden_with_a_write_key(tmp_path: Path, keys: SecurityConfig, status: int) -> None:
    with serving(tmp_path, keys) as bench:
        assert bench.ask("GET", "/ui/index.html").status == status


def test_white_list(tmp_path: Path) -> None:
    with serving(tmp_path, SecurityConfig(white_list=("10.0.0.0/8", "192.168.1.1"))) as bench:
        fid = bench.fid()
        for method in ("PUT", "POST", "DELETE"):
            reply = bench.ask(
                method, f"/{fid}", (OCTETS, ("X-Forwarded-For", "10.1.1.1")), b"x" if method != "DELETE" else None
            )
            assert (reply.status, reply.body, reply.get("Content-Type")) == (401, b"", None), method
        assert bench.ask("GET", f"/{fid}").status == 404
        assert bench.ask("OPTIONS", f"/{fid}").status == 200
        assert bench.ask("PATCH", f"/{fid}").status == 400
        bench.context.security = SecurityConfig(white_list=("127.0.0.0/8",))
        assert bench.ask("PUT", f"/{fid}", (OCTETS,), b"x").status == 201
