"""Packing and unpacking: members, damage, bounds, streaming."""

from __future__ import annotations

import gzip
import random

import pytest

from pyvolume.ops import gz

PLAIN = random.Random(1).randbytes(3000) * 500


def test_round_trip() -> None:
    packed = gz.compress(PLAIN)
    assert gz.is_gzip(packed)
    assert gzip.decompress(packed) == PLAIN
    assert gz.gunzip(packed) == PLAIN
    assert gz.plain_size(packed) == len(PLAIN)


def test_header_has_no_name_and_no_time() -> None:
    assert gz.compress(b"x" * 100)[:8] == b"\x1f\x8b\x08\0\0\0\0\0"


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_buffer(view: type) -> None:
    assert gz.gunzip(view(gz.compress(view(b"abc" * 50)))) == b"abc" * 50


def test_members_are_joined() -> None:
    assert gz.gunzip(gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two")) == b"onetwo"


def broken_crc() -> bytes:
    data = bytearray(gzip.compress(b"hello" * 50))
    data[-6] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b", b"not gzip at all", gzip.compress(PLAIN)[:-1], gzip.compress(b"x") + b"trailing", broken_crc()],
    ids=["empty", "two bytes", "text", "cut short", "trailing", "checksum"],
)
def test_damage_is_told(data: bytes) -> None:
    with pytest.raises(gz.BadGzip):
        gz.gunzip(data)
    with pytest.raises(gz.BadGzip):
        gz.plain_size(data)


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, len(PLAIN)), (5, 10), (300_000, 700_001), (len(PLAIN) - 1, 1), (7, 0)]
)
def test_streamed_stretch(start: int, length: int) -> None:
    packed = gz.compress(PLAIN)
    assert b"".join(gz.stream(packed, start, length)) == PLAIN[start : start + length]


def test_large_results_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gz, "IN_MEMORY_BYTES", 1000)
    assert gz.gunzip(gz.compress(b"a" * 1000)) == b"a" * 1000
    assert gz.gunzip(gz.compress(b"a" * 1001)) is None


def test_bombs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gz, "MAX_PLAIN_BYTES", 1 << 20)
    with pytest.raises(gz.TooLarge):
        gz.plain_size(gz.compress(bytes((1 << 20) + 1)))


def test_small_data_is_coded_without_repeats() -> None:
    assert len(gz.compress(b"abcd" * 31)) > len(gz.compress(b"abcd" * 32)), "below 128 bytes as Go does it"
    assert gz.gunzip(gz.compress(b"abcd" * 31)) == b"abcd" * 31


@pytest.mark.parametrize(
    ("packed", "size", "worth"), [(84, 100, True), (85, 100, False), (0, 5, False), (895, 1000, False)]
)
def test_packing_must_save_a_tenth(packed: int, size: int, worth: bool) -> None:
    assert gz.pays(packed, size) is worth
