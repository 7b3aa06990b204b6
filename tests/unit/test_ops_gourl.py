"""Encoding and cleaning of paths as Go does it."""

from __future__ import annotations

import pytest

from pyvolume.ops.gourl import clean_path, encode_path, escaped_path, redirect_for


def test_encode_path() -> None:
    assert (
        encode_path(b"/3,01/a b%?#\xc3\xa9~$&+:;=@!'()*[]") == "/3,01/a%20b%25%3F%23%C3%A9~$&+:;=@%21%27%28%29%2A%5B%5D"
    )


@pytest.mark.parametrize(
    ("raw", "path", "escaped"),
    [
        (b"/a%41!'()*[]", b"/aA!'()*[]", "/a%41!'()*[]"),
        (b"/a%41{}", b"/aA{}", "/aA%7B%7D"),
        (b"/\xc3\xa9", b"/\xc3\xa9", "/%C3%A9"),
    ],
)
def test_escaped_path_keeps_what_is_valid(raw: bytes, path: bytes, escaped: str) -> None:
    assert escaped_path(raw, path) == escaped


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/a//b/", "/a/b/"),
        ("/a/./b", "/a/b"),
        ("/a/../../b/..", "/"),
        ("/a/b/../", "/a/"),
        ("/..a/.b.", "/..a/.b."),
    ],
)
def test_clean_path(path: str, cleaned: str) -> None:
    assert clean_path(path) == cleaned


@pytest.mark.parametrize(
    ("raw", "path", "unclean", "target"),
    [
        (b"/3,01", b"/3,01", False, None),
        (b"/3,01%41", b"/3,01A", False, None),
        (b"/{}", b"/{}", False, None),
        (b"//3,01", b"//3,01", True, "/3,01"),
        (b"//%41", b"//A", True, "/%2541"),
        (b"/{}/%2e%2e", b"/{}/..", False, "/"),
        (b"/%2f{}", b"//{}", False, "/%257B%257D"),
        (b"/%2f/x", b"///x", False, None),
    ],
)
def test_redirects(raw: bytes, path: bytes, unclean: bool, target: str | None) -> None:
    assert redirect_for(raw, path, unclean) == target
