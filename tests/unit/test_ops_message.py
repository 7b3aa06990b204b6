"""Queries as Go parses them, and the small parts of requests and answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvolume.ops.message import Query, Released, Request, parse_query


@pytest.mark.parametrize(
    ("raw", "pairs", "error"),
    [
        (b"", [], None),
        (b"a=1&b=2&a=3", [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")], None),
        (b"a", [(b"a", b"")], None),
        (b"a=&=b&&", [(b"a", b""), (b"", b"b")], None),
        (b"a=x+y%20z%2B", [(b"a", b"x y z+")], None),
        (b"a=b=c", [(b"a", b"b=c")], None),
        (b"a=%e6%97%A5", [(b"a", b"\xe6\x97\xa5")], None),
        (b"a=%zz&b=1", [(b"b", b"1")], 'invalid URL escape "%zz"'),
        (b"%=1", [], 'invalid URL escape "%"'),
        (b"a=%4", [], 'invalid URL escape "%4"'),
        (b"a=%1_", [], 'invalid URL escape "%1_"'),
        (b'a=%"x', [], 'invalid URL escape "%\\"x"'),
        (b"a=ok%41%", [], 'invalid URL escape "%"'),
        (b"x=1;y=2&b=1", [(b"b", b"1")], "invalid semicolon separator in query"),
        (b"a=%zz&b=1;c", [], "invalid semicolon separator in query"),
        (b"b=1;c&a=%zz", [], "invalid semicolon separator in query"),
        (b"a=%zz&b=%yy", [], 'invalid URL escape "%zz"'),
    ],
)
def test_parse_query(raw: bytes, pairs: list[tuple[bytes, bytes]], error: str | None) -> None:
    assert parse_query(raw) == (pairs, error)


def test_number_of_pairs_is_bounded() -> None:
    assert parse_query(b"&".join([b"a=1"] * 10_000))[1] is None
    assert parse_query(b"&".join([b"a=1"] * 10_001)) == ([], "number of URL query parameters exceeded limit")


def test_first_value_counts() -> None:
    assert Query(b"a=1&a=2").get(b"a") == b"1"
    assert Query(b"a=1").get(b"b") == b""


def request(**changes: object) -> Request:
    values: dict[str, object] = {"method": "GET", "target_path": b"/", "raw_query": b"", "headers": {}, "url": None}
    return Request(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cookies", "token"),
    [
        ([b"AT=abc"], "abc"),
        ([b"x=1; AT=abc; y=2"], "abc"),
        ([b'AT="quoted"'], "quoted"),
        ([b"jwt=abc"], ""),
        ([b"x=1", b"AT=second"], "second"),
        ([], ""),
    ],
)
def test_token_of_a_cookie(cookies: list[bytes], token: str) -> None:
    assert request(raw_headers=[(b"Cookie", value) for value in cookies]).token == token


def test_value_prefers_the_query_to_a_form_field() -> None:
    made = request(raw_query=b"dl=", form_fields=lambda: {b"dl": b"true", b"ts": b"5"})
    assert made.value(b"dl") == b""
    assert made.value(b"ts") == b"5"
    assert made.value(b"other") == b""


def test_released_calls_once_even_when_the_body_fails_to_close() -> None:
    calls: list[str] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter((b"a", b"b"))

        def close(self) -> None:
            calls.append("closed")
            raise OSError

    body = Released(Body(), lambda: calls.append("released"))
    assert list(body) == [b"a", b"b"]
    with pytest.raises(OSError):
        body.close()
    body.close()
    assert calls.count("released") == 1
