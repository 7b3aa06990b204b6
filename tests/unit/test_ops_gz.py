"""Packing and unpacking: members, damage, bounds, streaming."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyvolume._native import engine
from pyvolume._native.gzip import gzip_fast
from pyvolume.ops import gz

VECTORS = Path(__file__).parents[1] / "data" / "gzip-go1.26.json"
PLAIN = random.Random(1).randbytes(3000) * 500


def test_round_trip() -> None:
    packed = gzip.compress(PLAIN)
    assert gz.is_gzip(packed)
    assert gzip.decompress(packed) == PLAIN
    assert gz.gunzip(packed) == PLAIN
    assert gz.plain_size(packed) == len(PLAIN)


def packed_in_full(data: bytes) -> bytes:
    """What the encoder makes, worth keeping or not."""
    made = gzip_fast(data, 2 * len(data) + 1024)
    assert made is not None
    return made


def test_header_has_no_name_and_no_time() -> None:
    assert packed_in_full(b"x" * 100)[:10] == b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_buffer(view: type) -> None:
    packed = gz.pack(view(b"abc" * 50))
    assert packed is not None and gz.gunzip(view(packed)) == b"abc" * 50


def test_the_example_of_upstream() -> None:
    packed = gz.pack(b"abcdefghij" * 400)
    assert packed is not None and len(packed) == 73
    assert engine.crc32c(packed) == 0xC5FD6606


def sample(kind: int, size: int) -> bytes:
    """Inputs for which tests/data/gzip-go1.26.json tells what Go's encoder makes of them."""
    rng = random.Random(f"{kind}-{size}")
    if kind == 0:
        return rng.randbytes(size)
    if kind == 1:
        return bytes(size)
    if kind == 2:
        return bytes(rng.choices(b"abcd", k=size))
    if kind == 3:
        return bytes(rng.choices(range(256), weights=[1.0 / (i + 1) ** 2 for i in range(256)], k=size))
    words = [b"volume", b"needle", b"cookie", b"offset", b"shard", b"\n", b"<b>", b"0123456789"]
    return b" ".join(rng.choices(words, k=size // 4 + 1))[:size]


@pytest.mark.parametrize("row", json.loads(VECTORS.read_text()), ids=lambda row: f"{row['kind']}-{row['size']}")
def test_packed_data_is_what_go_makes_of_it(row: dict[str, Any]) -> None:
    data = sample(row["kind"], row["size"])
    packed = packed_in_full(data)
    assert gzip.decompress(packed) == data
    assert (len(packed), hashlib.sha256(packed).hexdigest()) == (row["packed_size"], row["sha256"])
    kept = gz.pack(data)
    assert (kept is not None) == (len(packed) * 10 < len(data) * 9)
    assert kept in (None, packed)


def test_no_output_beyond_what_is_worth_keeping() -> None:
    data = b"abcd" * 1000
    size = len(packed_in_full(data))
    assert gzip_fast(data, size) is not None
    assert gzip_fast(data, size - 1) is None
    assert gzip_fast(data, 0) is None


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
    packed = gzip.compress(PLAIN)
    assert b"".join(gz.stream(packed, start, length)) == PLAIN[start : start + length]


def test_large_results_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gz, "IN_MEMORY_BYTES", 1000)
    assert gz.gunzip(gzip.compress(b"a" * 1000)) == b"a" * 1000
    assert gz.gunzip(gzip.compress(b"a" * 1001)) is None


def test_bombs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gz, "MAX_PLAIN_BYTES", 1 << 20)
    with pytest.raises(gz.TooLarge):
        gz.plain_size(gzip.compress(bytes((1 << 20) + 1)))
