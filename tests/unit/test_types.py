"""Parsing and printing of ttl, replica placement, file ids, disk types (contract storage.md 2, 8, 9, 10)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvolume.types import (
    MAX_VOLUME_BYTES,
    OFFSET_WIDTHS,
    FileId,
    ReplicaPlacement,
    Ttl,
    format_key_cookie,
    go_quote,
    is_plain_file_part,
    normalize_disk_type,
    parse_int,
    parse_key_cookie,
    parse_uint,
    parse_volume_base_name,
    parse_volume_id,
    readable_disk_type,
    volume_base_name,
)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("", ""),
        ("3m", "3m"),
        ("90", "90m"),
        ("60m", "1h"),
        ("24h", "1d"),
        ("7d", "1w"),
        ("30d", "1M"),
        ("365d", "1y"),
        ("256m", "4h"),
        ("1000h", "41d"),
        ("300y", ""),
        ("5s", ""),
        ("-3m", ""),
        ("0m", ""),
        ("+2h", "2h"),
        ("255y", "255y"),
        ("12M", "12M"),
        ("4w", "4w"),
        ("52w", "52w"),
        ("7M", "7M"),
        ("1440", "1d"),
    ],
)
def test_ttl_text(text: str, printed: str) -> None:
    ttl = Ttl.parse(text)
    assert str(ttl) == printed
    assert Ttl.parse_lenient(text) == ttl
    if printed:
        assert Ttl.parse(printed) == ttl


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x", 'strconv.Atoi: parsing "": invalid syntax'),
        ("m", 'strconv.Atoi: parsing "": invalid syntax'),
        ("1.5h", 'strconv.Atoi: parsing "1.5": invalid syntax'),
        ('a"b\\m', 'strconv.Atoi: parsing "a\\"b\\\\": invalid syntax'),
        ("99999999999999999999m", 'strconv.Atoi: parsing "99999999999999999999": value out of range'),
    ],
)
def test_ttl_malformed(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        Ttl.parse(text)
    assert str(caught.value) == error
    assert Ttl.parse_lenient(text) == Ttl.NONE


def test_ttl_stored_forms() -> None:
    ttl = Ttl.parse("3h")
    assert ttl.to_bytes() == b"\x03\x02"
    assert ttl.to_u32() == 0x302
    assert Ttl.from_u32(0x302) == ttl == Ttl.from_bytes(b"\x03\x02")
    assert ttl.minutes == 180
    assert Ttl.from_bytes(b"\0\0") == Ttl.NONE
    assert not Ttl.NONE
    assert Ttl.NONE.to_u32() == 0
    assert Ttl(0, 3).to_u32() == 0
    assert str(Ttl(0, 3)) == "" and Ttl(0, 3)
    assert str(Ttl(5, 0)) == "" and Ttl(5, 0).minutes == 0
    assert str(Ttl(5, 9)) == "" and Ttl(5, 9).minutes == 0
    assert [Ttl(1, unit).minutes for unit in range(7)] == [0, 1, 60, 1440, 10080, 43200, 525600]


@pytest.mark.parametrize(
    ("text", "byte", "printed"),
    [
        ("", 0, "000"),
        ("1", 1, "001"),
        ("10", 10, "010"),
        ("000", 0, "000"),
        ("110", 110, "110"),
        ("200", 200, "200"),
        ("0012345", 1, "001"),
        ("00a", 49, "00a"),
    ],
)
def test_replica_placement(text: str, byte: int, printed: str) -> None:
    placement = ReplicaPlacement.parse(text)
    assert placement.byte == byte
    assert str(placement) == printed


def test_replica_placement_from_byte_and_copies() -> None:
    for byte in range(256):
        assert ReplicaPlacement.from_byte(byte).byte == byte
    assert ReplicaPlacement.from_byte(201) == ReplicaPlacement(2, 0, 1)
    assert ReplicaPlacement.parse("110").copy_count == 3
    assert ReplicaPlacement.parse("000").copy_count == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("999", "unexpected replication type: 999"),
        ("256", "unexpected replication type: 256"),
        ("!", "unknown replication type: 00!"),
        ("00-", "unknown replication type: 00-"),
        ("000 ", "unknown replication type: 000 "),
        ("zzz", "unexpected replication type: zzz"),
    ],
)
def test_replica_placement_malformed(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        ReplicaPlacement.parse(text)
    assert str(caught.value) == error


def test_file_id_round_trip() -> None:
    fid = FileId.parse("4,01fc0044a0")
    assert fid == FileId(4, 1, 0xFC0044A0)
    assert str(fid) == "4,01fc0044a0"
    assert str(FileId(3, 1, 2)) == "3,0100000002"
    assert str(FileId(3, 0, 0)) == "3,00000000"
    assert str(FileId(3, 0x100, 0xABCDEF01)) == "3,0100abcdef01"
    assert format_key_cookie(0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF) == "f" * 24
    assert FileId.parse("3,1FC0044A0") == FileId(3, 1, 0xFC0044A0)
    assert FileId.parse("007,00000000000000000000000f").vid == 7


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "wrong fid format"),
        ("301fc0044a0", "wrong fid format"),
        (",01fc0044a0", "wrong fid format"),
        ("x,01fc0044a0", 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("+1,01fc0044a0", 'strconv.ParseUint: parsing "+1": invalid syntax'),
        ("4294967297,01fc0044a0", 'strconv.ParseUint: parsing "4294967297": value out of range'),
        ("99999999999999999999,01fc0044a0", 'strconv.ParseUint: parsing "99999999999999999999": value out of range'),
        ("3,00000000", "KeyHash is too short."),
        ("3,", "KeyHash is too short."),
        ("3," + "0" * 25, "KeyHash is too long."),
        (
            "3,6zdeadbeef",
            'Parse needleId error: needle id 6z format error: strconv.ParseUint: parsing "6z": invalid syntax',
        ),
        (
            "3,64deadbezz",
            "Parse cookie error: needle cookie deadbezz format error: "
            'strconv.ParseUint: parsing "deadbezz": invalid syntax',
        ),
        (
            "3,01fc0044a0_1",
            "Parse cookie error: needle cookie 0044a0_1 format error: "
            'strconv.ParseUint: parsing "0044a0_1": invalid syntax',
        ),
    ],
)
def test_file_id_malformed(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        FileId.parse(text)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("text", "key", "cookie"),
    [
        ("64deadbeef", 0x64, 0xDEADBEEF),
        ("01fc0044a0_2", 3, 0xFC0044A0),
        ("01fc0044a0_", 1, 0xFC0044A0),
        ("0000000000000000fc0044a0", 0, 0xFC0044A0),
    ],
)
def test_path_form(text: str, key: int, cookie: int) -> None:
    assert FileId.parse_path(text) == (key, cookie)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("64", "Invalid fid: 64"),
        ("12345678", "Invalid fid: 12345678"),
        ("12345678_1", "KeyHash is too short."),
        ("_12345678", 'Parse needleId error: needle id _ format error: strconv.ParseUint: parsing "_": invalid syntax'),
        ("01fc0044a0_x", 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("01fc0044a0_-1", 'strconv.ParseUint: parsing "-1": invalid syntax'),
        (
            "fffffffffffffffffc0044a0_2",
            "delta 2 overflows needle id 66666666666666666666666666666666",
        ),
        ("1fc0044a0_18446744073709551615", "delta 18446744073709551615 overflows needle id 31"),
        ("1" * 25, "KeyHash is too long."),
    ],
)
def test_path_form_malformed(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        FileId.parse_path(text)
    assert str(caught.value) == error


def test_numbers_like_strconv() -> None:
    assert parse_uint("18446744073709551615") == (1 << 64) - 1
    assert parse_int("-9223372036854775808") == -(1 << 63)
    # the overflow comes before the bad digit, as strconv reads from the left
    with pytest.raises(ValueError, match="value out of range"):
        parse_uint("99999999999999999999x")
    with pytest.raises(ValueError, match="invalid syntax"):
        parse_uint("1_000")
    with pytest.raises(ValueError, match="invalid syntax"):
        parse_uint("٣")
    with pytest.raises(ValueError, match="invalid syntax"):
        parse_int("٣")
    assert parse_key_cookie("abcDEF0123") == (0xAB, 0xCDEF0123)


def test_quoting_like_go() -> None:
    assert go_quote('a"b\\c') == '"a\\"b\\\\c"'
    assert go_quote("\n\t\x01\x7f") == '"\\n\\t\\x01\\x7f"'
    assert go_quote("é😀") == '"é😀"'
    assert go_quote("\u200b\U000e0001") == '"\\u200b\\U000e0001"'
    assert go_quote(b"\xff".decode("utf-8", "surrogateescape")) == '"\\xff"'


def test_volume_file_names() -> None:
    assert volume_base_name("", 7) == "7"
    assert volume_base_name("a_b", 7) == "a_b_7"
    assert parse_volume_base_name("7") == ("", 7)
    assert parse_volume_base_name("a-b_c.d_8") == ("a-b_c.d", 8)
    assert parse_volume_base_name("__8") == ("_", 8)
    for name in ("_7", "", "x", "07", "a_07", "4294967296", "a_", "7x"):
        with pytest.raises(ValueError):
            parse_volume_base_name(name)
    assert parse_volume_id("4294967295") == 4294967295


def test_plain_file_parts() -> None:
    assert all(is_plain_file_part(text) for text in ("", "a", "..a", "a.b_c", "ü"))
    assert not any(is_plain_file_part(text) for text in (".", "..", "a/b", "a\\b", "a\0", "/"))


def test_disk_types() -> None:
    assert normalize_disk_type("") == normalize_disk_type("HDD") == ""
    assert normalize_disk_type("SSD") == "ssd"
    assert normalize_disk_type("NVMe") == "nvme"
    assert readable_disk_type("") == "hdd"
    assert readable_disk_type("ssd") == "ssd"


def test_offset_widths() -> None:
    assert {width: MAX_VOLUME_BYTES[width] for width in OFFSET_WIDTHS} == {4: 34359738368, 5: 8796093022208}


@pytest.mark.parametrize(
    "text", ["64deadbeef", "0000000000000000fc0044a0", "1" * 24, "ABCDEF0123", "6zdeadbeef", "64deadbezz"]
)
def test_both_forms_of_a_file_id_agree_where_there_is_no_delta(text: str) -> None:
    """The form without delta is parsed here, the other one in the engine."""

    def outcome(parse: Callable[[str], tuple[int, int]]) -> object:
        try:
            return parse(text)
        except ValueError as exc:
            return str(exc)

    assert outcome(parse_key_cookie) == outcome(FileId.parse_path)
