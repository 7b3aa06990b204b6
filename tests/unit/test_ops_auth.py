"""JWT and white list decisions (contract http.md 5.1, 5.2)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from pyvolume.log import V1
from pyvolume.ops.auth import Guard, bearer_token, token_allows

KEY = b"short key"


def token(claims: dict[str, Any], key: bytes = KEY, alg: str = "HS256") -> str:
    def enc(raw: bytes) -> bytes:
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    signed = enc(json.dumps({"alg": alg, "typ": "JWT"}).encode()) + b"." + enc(json.dumps(claims).encode())
    if alg == "none":
        return (signed + b".").decode()
    digest = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}[alg]
    return (signed + b"." + enc(hmac.new(key, signed, digest).digest())).decode()


NOW = time.time()


@pytest.mark.parametrize(
    ("made", "vid", "fid", "allowed"),
    [
        (token({"fid": "10,01deadbeef"}), "10", "01deadbeef", True),
        (token({"fid": "10,01deadbeef"}), "10", "01deadbeef_5", True),
        (token({"fid": "10,01deadbeef"}), "10", "01DEADBEEF", False),
        (token({"fid": "10,01deadbeef"}), "010", "01deadbeef", False),
        (token({"fid": "10,01deadbeef_5"}), "10", "01deadbeef_5", False),
        (token({"fid": "10,_1"}), "10", "_1", True),
        (token({"fid": ""}), "", "", False),
        (token({}), "10", "01deadbeef", False),
        (token({"fid": "10,01deadbeef"}, alg="HS384"), "10", "01deadbeef", True),
        (token({"fid": "10,01deadbeef"}, alg="HS512"), "10", "01deadbeef", True),
        (token({"fid": "10,01deadbeef"}, alg="none"), "10", "01deadbeef", False),
        (token({"fid": "10,01deadbeef"}, key=b"other"), "10", "01deadbeef", False),
        (token({"fid": "10,01deadbeef", "exp": NOW - 3600}), "10", "01deadbeef", False),
        (token({"fid": "10,01deadbeef", "exp": NOW + 36000}), "10", "01deadbeef", True),
        (token({"fid": "10,01deadbeef", "nbf": NOW + 36000}), "10", "01deadbeef", False),
        (token({"fid": "10,01deadbeef", "iat": NOW + 36000}), "10", "01deadbeef", True),
        (token({"fid": "10,01deadbeef", "exp": "soon"}), "10", "01deadbeef", False),
        ("", "10", "01deadbeef", False),
        ("rubbish", "10", "01deadbeef", False),
        ("a.b.c", "10", "01deadbeef", False),
    ],
)
def test_token_allows(made: str, vid: str, fid: str, allowed: bool) -> None:
    assert token_allows(KEY, made, vid, fid) is allowed


@pytest.mark.parametrize(
    ("made", "line"),
    [
        ("", "missing jwt from 1.2.3.4"),
        (
            token({"fid": "1,0200000001"}),
            'jwt fid mismatch from 1.2.3.4: token has "1,0200000001", request has "1,0100000001"',
        ),
        (
            token({"fid": "1,0100000001", "exp": NOW - 60}),
            "jwt verification error from 1.2.3.4: token has invalid claims: token is expired",
        ),
        (
            token({"fid": "1,0100000001", "nbf": NOW + 36000}),
            "jwt verification error from 1.2.3.4: token has invalid claims: token is not valid yet",
        ),
        (
            token({"fid": "1,0100000001"}, key=b"other"),
            "jwt verification error from 1.2.3.4: token signature is invalid: signature is invalid",
        ),
        (
            token({"fid": "1,0100000001"}, alg="none"),
            "jwt verification error from 1.2.3.4: token signature is invalid: signing method is invalid",
        ),
        ("secret.rubbish.secret", "jwt verification error from 1.2.3.4: token is malformed"),
    ],
)
def test_why_a_token_is_refused_is_told_at_v1(made: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(V1, "pyvolume.ops.auth"):
        assert not token_allows(KEY, made, "1", "0100000001", "1.2.3.4")
    assert caplog.messages == [line]
    assert caplog.records[0].levelno == V1


@pytest.mark.parametrize(
    ("query", "header", "cookie", "found"),
    [
        ("q", "Bearer h", "c", "q"),
        ("", "Bearer h", "c", "h"),
        ("", "BEARER:h", "c", "h"),
        ("", "bearer h", "", "h"),
        ("", "Bearer ", "c", "c"),
        ("", "Basic abcdef", "c", "c"),
        ("", "", "", ""),
    ],
)
def test_source_of_a_token(query: str, header: str, cookie: str, found: str) -> None:
    assert bearer_token(query, header, lambda: cookie) == found


@dataclass(frozen=True)
class Settings:
    white_list: tuple[str, ...]
    jwt_write_key: bytes = b""
    jwt_read_key: bytes = b""


@pytest.mark.parametrize(
    ("entries", "peer", "allowed"),
    [
        ((), "1.2.3.4", True),
        (("1.2.3.4",), "1.2.3.4", True),
        (("1.2.3.4",), "::ffff:1.2.3.4", True),
        (("1.2.3.4",), "1.2.3.5", False),
        (("10.0.0.0/8", "x"), "10.255.0.1", True),
        (("10.0.0.1/8",), "10.9.9.9", True),
        (("10.0.0.0/8",), "11.0.0.1", False),
        (("fd00::/8",), "fd12::1", True),
        (("10.0.0.0/8",), "not an address", False),
    ],
)
def test_white_list(entries: tuple[str, ...], peer: str, allowed: bool) -> None:
    assert Guard(lambda: Settings(entries)).allows(peer) is allowed


def test_white_list_follows_a_reload() -> None:
    current = [Settings(("10.0.0.1",))]
    guard = Guard(lambda: current[0])
    assert not guard.allows("10.0.0.2")
    current[0] = Settings(("10.0.0.2",))
    assert guard.allows("10.0.0.2")
    assert not guard.allows("10.0.0.1")
    current[0] = Settings(())
    assert guard.allows("10.0.0.1")
