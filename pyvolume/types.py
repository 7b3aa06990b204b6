"""Values that every layer speaks of: time to live, replica placement, file ids, disk types.

Must not import storage, ops, server or cli. What the fast lane parses, too, is parsed by the engine (_native.http).
Parsing and printing follow upstream to the letter, quirks included (`volume_ttl.go`, `file_id.go`, `volume_id.go` of
`weed/storage/needle`; `super_block/replica_placement.go`); malformed text raises ValueError with the text upstream
gives its clients. Nothing here blocks or takes a lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from pyvolume._native import http as native

VolumeId = int
"""An unsigned 32-bit volume id."""
NeedleId = int
"""An unsigned 64-bit needle id (key)."""

OFFSET_WIDTHS: Final = (4, 5)
"""Bytes of a stored offset in .idx rows; a property of each volume (`bytesOffset` of its .vif)."""

MAX_VOLUME_BYTES: Final[dict[int, int]] = {4: 1 << 35, 5: 1 << 43}
"""Largest append offset by offset width: 32 GiB and 8 TiB."""


# ------------------------------------------------------------------------------------------- texts of Go's strconv


def go_quote(text: str) -> str:
    """Text in double quotes with Go's escapes (`%q`), as strconv quotes its argument in errors."""
    return native.go_quote(_raw(text)).decode("utf-8", "surrogateescape")


def _raw(text: str) -> bytes:
    """The bytes of a text; those that were not UTF-8 are kept by surrogateescape."""
    return text.encode("utf-8", "surrogateescape")


def _syntax_error(function: str, text: str) -> ValueError:
    return ValueError(f"strconv.{function}: parsing {go_quote(text)}: invalid syntax")


def _range_error(function: str, text: str) -> ValueError:
    return ValueError(f"strconv.{function}: parsing {go_quote(text)}: value out of range")


def parse_uint(text: str, base: int = 10, bits: int = 64) -> int:
    """Go's strconv.ParseUint for base 10 or 16: no sign, no blanks, no prefix, no underscore.

    Digits are looked at from the left, so an overflow is reported before a later bad character. Raises ValueError.
    """
    if not text:
        raise _syntax_error("ParseUint", text)
    limit = (1 << bits) - 1
    value = 0
    for ch in text:
        digit = "0123456789abcdef".find(ch.lower()) if ch.isascii() else -1
        if digit < 0 or digit >= base:
            raise _syntax_error("ParseUint", text)
        value = value * base + digit
        if value > limit:
            raise _range_error("ParseUint", text)
    return value


def parse_int(text: str) -> int:
    """Go's strconv.Atoi: an optional sign and decimal digits, 64 bit. Raises ValueError."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not digits or not (digits.isascii() and digits.isdigit()):
        raise _syntax_error("Atoi", text)
    value = -int(digits) if text[0] == "-" else int(digits)
    if not -(1 << 63) <= value < 1 << 63:
        raise _range_error("Atoi", text)
    return value


# ------------------------------------------------------------------------------------------------------ time to live

_TTL_SUFFIX: Final = ("", "m", "h", "d", "w", "M", "y")
_TTL_MINUTES: Final = (0, 1, 60, 1440, 10080, 43200, 525600)


@dataclass(frozen=True, slots=True)
class Ttl:
    """A time to live as it is stored: a count (0..255) of a unit (0 none, 1 m, 2 h, 3 d, 4 w, 5 M, 6 y)."""

    count: int = 0
    unit: int = 0

    NONE: ClassVar[Ttl]

    @classmethod
    def parse(cls, text: str) -> Ttl:
        """Reads `3m`, `24h`, `90` (minutes) and refits it to the largest exact unit; an unknown unit means no ttl.

        Quirk: the refit loses precision when no unit divides (`1000h` is `41d`), and what fits nowhere (`300y`) is no
        ttl. Raises ValueError if the count is not an integer. Upstream: ReadTTL.
        """
        if text:
            raw = _raw(text)
            ends_in_digit = raw[-1:].isdigit()
            parse_int(text if ends_in_digit else raw[:-1].decode("utf-8", "surrogateescape"))
        return cls.parse_lenient(text)

    @classmethod
    def parse_lenient(cls, text: str) -> Ttl:
        """As `parse`, but malformed text is no ttl: what an upload's `ttl` parameter gets."""
        return cls(*native.parse_ttl(_raw(text)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Ttl:
        """From the two stored bytes (super block, needle)."""
        return cls(data[0], data[1])

    @classmethod
    def from_u32(cls, value: int) -> Ttl:
        """From `count << 8 | unit`, as heartbeats carry it."""
        return cls(value >> 8 & 0xFF, value & 0xFF)

    def to_bytes(self) -> bytes:
        return bytes((self.count, self.unit))

    def to_u32(self) -> int:
        """`count << 8 | unit`, 0 if the count is 0."""
        return self.count << 8 | self.unit if self.count else 0

    @property
    def minutes(self) -> int:
        """Length in minutes; 0 for none and for an unknown unit. A month has 30 days, a year 365."""
        return self.count * _TTL_MINUTES[self.unit] if self.unit < len(_TTL_MINUTES) else 0

    def __bool__(self) -> bool:
        """False only for the stored bytes 0, 0."""
        return self.count != 0 or self.unit != 0

    def __str__(self) -> str:
        if self.count == 0 or not 0 < self.unit < len(_TTL_SUFFIX):
            return ""
        return f"{self.count}{_TTL_SUFFIX[self.unit]}"


Ttl.NONE = Ttl()


# -------------------------------------------------------------------------------------------------- replica placement


@dataclass(frozen=True, slots=True)
class ReplicaPlacement:
    """How many further copies go to other data centers, other racks, and other servers of the same rack."""

    dc: int = 0
    rack: int = 0
    node: int = 0

    @classmethod
    def parse(cls, text: str) -> ReplicaPlacement:
        """Reads three digits; shorter text is padded with zeros on the left. Raises ValueError with upstream's text.

        Quirk: characters after the third are ignored (unless they sort below `0`) and any other character counts by its
        distance from `0`, so `00a` is 49. Upstream: NewReplicaPlacementFromString.
        """
        padded = "0" * max(0, 3 - len(_raw(text))) + text
        counts = [0, 0, 0]
        position = 0
        for ch in padded:
            count = ord(ch) - ord("0")
            if count < 0:
                raise ValueError(f"unknown replication type: {padded}")
            if position < 3:
                counts[position] = count
            position += len(_raw(ch))
        if counts[0] * 100 + counts[1] * 10 + counts[2] > 255:
            raise ValueError(f"unexpected replication type: {padded}")
        return cls(*counts)

    @classmethod
    def from_byte(cls, value: int) -> ReplicaPlacement:
        """From the super block's byte: hundreds, tens, ones."""
        return cls(value // 100, value // 10 % 10, value % 10)

    @property
    def byte(self) -> int:
        return (self.dc * 100 + self.rack * 10 + self.node) & 0xFF

    @property
    def copy_count(self) -> int:
        """Copies in all, this one included."""
        return self.dc + self.rack + self.node + 1

    def __str__(self) -> str:
        raw = bytes((n + ord("0")) & 0xFF for n in (self.dc, self.rack, self.node))
        return raw.decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------------- file ids

_COOKIE_DIGITS: Final = 8
_KEY_COOKIE_DIGITS: Final = 24


def parse_volume_id(text: str) -> VolumeId:
    """Decimal digits, at most 32 bits. Raises ValueError with strconv's text.

    Departure A3: upstream takes 64 bits and cuts them to 32, so that a long number names another volume.
    """
    return native.parse_vid(_raw(text))


def parse_key_cookie(text: str) -> tuple[NeedleId, int]:
    """`<hex key><8 hex digits of cookie>`, either case, 9 to 24 characters. Raises ValueError with upstream's text."""
    length = len(_raw(text))
    if length <= _COOKIE_DIGITS:
        raise ValueError("KeyHash is too short.")
    if length > _KEY_COOKIE_DIGITS:
        raise ValueError("KeyHash is too long.")
    key_text, cookie_text = text[:-_COOKIE_DIGITS], text[-_COOKIE_DIGITS:]
    try:
        key = parse_uint(key_text, 16, 64)
    except ValueError as exc:
        raise ValueError(f"Parse needleId error: needle id {key_text} format error: {exc}") from None
    try:
        cookie = parse_uint(cookie_text, 16, 32)
    except ValueError as exc:
        raise ValueError(f"Parse cookie error: needle cookie {cookie_text} format error: {exc}") from None
    return key, cookie


def format_key_cookie(key: NeedleId, cookie: int) -> str:
    """Whole bytes without the key's leading zero bytes; key 0 leaves only the cookie (which cannot be parsed back)."""
    key_bytes = key.to_bytes(8, "big").lstrip(b"\0")
    return key_bytes.hex() + f"{cookie:08x}"


@dataclass(frozen=True, slots=True)
class FileId:
    """Names one needle: volume id, key, and the cookie that guards against guessing."""

    vid: VolumeId
    key: NeedleId
    cookie: int

    @classmethod
    def parse(cls, text: str) -> FileId:
        """Reads `3,01fc0044a0`; no `_delta` here. Raises ValueError with upstream's text (ParseFileIdFromString)."""
        comma = text.find(",")
        if comma <= 0:
            raise ValueError("wrong fid format")
        vid = parse_volume_id(text[:comma])
        key, cookie = parse_key_cookie(text[comma + 1 :])
        return cls(vid, key, cookie)

    @staticmethod
    def parse_path(text: str) -> tuple[NeedleId, int]:
        """Reads the fid part of a URL, `<key><cookie>[_<delta>]`: (key + delta, cookie). Raises ValueError.

        The delta is decimal; an empty one is 0. Quirk: the overflow text prints the key as the hex of its hex text.
        Upstream: Needle.ParsePath.
        """
        return native.parse_fid(_raw(text))

    def __str__(self) -> str:
        return f"{self.vid},{format_key_cookie(self.key, self.cookie)}"


# --------------------------------------------------------------------------------------------- names of volume files


def volume_base_name(collection: str, vid: VolumeId) -> str:
    """File name of a volume without extension: `<vid>` or `<collection>_<vid>`."""
    return f"{collection}_{vid}" if collection else str(vid)


def parse_volume_base_name(name: str) -> tuple[str, VolumeId]:
    """(collection, vid) of a file name without extension; the id follows the last `_` (not at the front).

    Raises ValueError with strconv's text. A name that upstream would read but that is not what `volume_base_name` gives
    (leading zeros, more than 32 bits) is refused too: its files would be looked for under another name.
    """
    underscore = name.rfind("_")
    collection, digits = (name[:underscore], name[underscore + 1 :]) if underscore > 0 else ("", name)
    vid = parse_volume_id(digits)
    if volume_base_name(collection, vid) != name:
        raise ValueError(f"volume id {digits} has leading zeros")
    return collection, vid


def is_plain_file_part(text: str) -> bool:
    """Whether text from a request may become part of a file name: no `/`, backslash or NUL, not `.` or `..` (S5)."""
    return text not in (".", "..") and not any(ch in text for ch in "/\\\0")


# -------------------------------------------------------------------------------------------------------- disk types


def normalize_disk_type(text: str) -> str:
    """Lower case; `hdd` and the empty text are both the empty (default) type. Any other word is its own type."""
    lowered = text.lower()
    return "" if lowered == "hdd" else lowered


def readable_disk_type(disk_type: str) -> str:
    """The type for people: `hdd` for the default type."""
    return disk_type or "hdd"
