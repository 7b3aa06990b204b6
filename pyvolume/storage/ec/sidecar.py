"""The `.ecsum` file: checksums of the blocks of all shards of one encode.

Header `ECSU`, version, length and CRC-32C of the payload, then the message EcBitrotProtection, which is read and
written here field by field: the layers below the server have no protobuf library. May import _native, files and the
leaves only. `load` and `save` block on disk.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import mmap
import os
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from pyvolume._native import ec, engine
from pyvolume.faults import fault
from pyvolume.storage import files
from pyvolume.storage.ec.layout import Ratio

EXTENSION: Final = ".ecsum"
BLOCK_BYTES: Final = 16 << 20
MAX_BLOCK_BYTES: Final = 64 << 20
MAX_FILE_BYTES: Final = 64 << 20
_MAGIC: Final = b"ECSU"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">4sHII")
_CRC32C: Final = 1
_U64: Final = (1 << 64) - 1

SidecarState = Literal["off", "on", "invalid"]


class BadSidecar(ValueError):
    """The file is not a sidecar, or not one of this volume; str() says why."""


@dataclass(slots=True)
class ShardSums:
    """Of one shard: how long it is, and the CRC-32C of each block."""

    shard: int
    covered: int
    crcs: list[int]


@dataclass(slots=True)
class Sidecar:
    ratio: Ratio | None
    shards: list[ShardSums] = field(default_factory=list)
    algorithm: int = _CRC32C
    block_bytes: int = BLOCK_BYTES
    generation: int = 0
    uuid: bytes = b""

    def of(self, shard: int) -> ShardSums | None:
        """The entry of a shard."""
        return next((entry for entry in self.shards if entry.shard == shard), None)

    def check(self, ratio: Ratio) -> None:
        """Raises BadSidecar unless there is one complete entry for each shard of the ratio."""
        if self.algorithm != _CRC32C:
            raise BadSidecar(f"unsupported checksum algorithm {self.algorithm}")
        block = self.block_bytes
        if not 1 << 20 <= block <= MAX_BLOCK_BYTES or block & (block - 1):
            raise BadSidecar(f"invalid block size {block}")
        if len(self.shards) != ratio.total:
            raise BadSidecar(f"{len(self.shards)} shard entries, expected {ratio.total}")
        seen = set()
        for entry in self.shards:
            if entry.shard >= ratio.total or entry.shard in seen:
                raise BadSidecar(f"unexpected entry of shard {entry.shard}")
            seen.add(entry.shard)
            if entry.covered <= 0 or len(entry.crcs) != -(-entry.covered // block):
                raise BadSidecar(f"shard {entry.shard} covers {entry.covered} bytes with {len(entry.crcs)} checksums")


# ------------------------------------------------------------------------------------------------------------ the text


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= _U64
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(number: int, value: int) -> bytes:
    return bytes((number << 3,)) + _varint(value) if value else b""


def _bytes(number: int, value: bytes, *, keep_empty: bool = False) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(value)) + value if value or keep_empty else b""


def encode(sidecar: Sidecar) -> bytes:
    """The whole file."""
    out = _number(1, sidecar.algorithm) + _number(2, sidecar.block_bytes) + _number(3, sidecar.generation)
    if sidecar.ratio is not None:
        ratio = _number(1, sidecar.ratio.data) + _number(2, sidecar.ratio.parity)
        out += _bytes(4, ratio, keep_empty=True)
    for entry in sidecar.shards:
        packed = struct.pack(f"<{len(entry.crcs)}I", *entry.crcs)
        out += _bytes(5, _number(1, entry.shard) + _number(2, entry.covered) + _bytes(3, packed), keep_empty=True)
    out += _bytes(6, sidecar.uuid)
    return _HEADER.pack(_MAGIC, _VERSION, len(out), engine.crc32c(out)) + out


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, at
        shift += 7
    raise BadSidecar("a message that ends within a number")


def _fields(data: bytes, take: Callable[[int, int | bytes], None]) -> None:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if not number:
            raise BadSidecar("a message with a field 0")
        value: int | bytes
        if wire == 0:
            value, at = _read_varint(data, at)
        elif wire == 2:
            length, at = _read_varint(data, at)
            value = data[at : at + length]
            at += length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            value = b""
            number = 0
        else:
            raise BadSidecar(f"a message with a field of wire type {wire}")
        if at > len(data):
            raise BadSidecar("a message that ends within a field")
        if number:
            take(number, value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _parse_shard(data: bytes) -> ShardSums:
    entry = ShardSums(0, 0, [])

    def take(number: int, value: int | bytes) -> None:
        if number == 1 and isinstance(value, int):
            entry.shard = value & 0xFFFFFFFF
        elif number == 2 and isinstance(value, int):
            entry.covered = _signed(value)
        elif number == 3 and isinstance(value, bytes):
            if len(value) % 4:
                raise BadSidecar(f"{len(value)} bytes of checksums")
            entry.crcs = list(struct.unpack(f"<{len(value) // 4}I", value))

    _fields(data, take)
    return entry


def _parse_ratio(data: bytes) -> Ratio:
    found = {1: 0, 2: 0}

    def take(number: int, value: int | bytes) -> None:
        if number in found and isinstance(value, int):
            found[number] = value & 0xFFFFFFFF

    _fields(data, take)
    return Ratio(found[1], found[2])


def decode(data: bytes) -> Sidecar:
    """Reads a whole file. Raises BadSidecar."""
    if len(data) < _HEADER.size:
        raise BadSidecar(f"too short ({len(data)} bytes)")
    magic, version, length, crc = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC:
        raise BadSidecar(f"bad magic {magic.hex()}")
    if version != _VERSION:
        raise BadSidecar(f"unsupported format version {version}")
    if length != len(payload):
        raise BadSidecar(f"length mismatch: header {length}, actual {len(payload)}")
    if crc != engine.crc32c(payload):
        raise BadSidecar("CRC mismatch")
    sidecar = Sidecar(None, algorithm=0, block_bytes=0)

    def take(number: int, value: int | bytes) -> None:
        if isinstance(value, int):
            if number == 1:
                sidecar.algorithm = value
            elif number == 2:
                sidecar.block_bytes = value & 0xFFFFFFFF
            elif number == 3:
                sidecar.generation = value & 0xFFFFFFFF
        elif number == 4:
            sidecar.ratio = _parse_ratio(value)
        elif number == 5:
            sidecar.shards.append(_parse_shard(value))
        elif number == 6:
            sidecar.uuid = value

    _fields(payload, take)
    return sidecar


# ------------------------------------------------------------------------------------------------------------ the file


def make(ratio: Ratio, shard_bytes: int, crcs: Sequence[Sequence[int]]) -> Sidecar:
    """The sidecar of an encode: crcs[shard][block]."""
    shards = [ShardSums(shard, shard_bytes, list(crcs[shard])) for shard in range(ratio.total)]
    return Sidecar(ratio, shards, uuid=uuid.uuid4().bytes)


def save(path: str, sidecar: Sidecar) -> None:
    """Puts a sidecar in place. Raises OSError. Failpoints ecsum.write, ecsum.rename."""
    files.replace_file(path, encode(sidecar), point="ecsum")


def find(*bases: str) -> str | None:
    """The first existing <base>.ecsum."""
    for base in dict.fromkeys(bases):
        if files.exists(base + EXTENSION):
            return base + EXTENSION
    return None


def load(path: str | None, ratio: Ratio) -> tuple[SidecarState, Sidecar | None, str]:
    """(state, sidecar if on, why if invalid). Absent, or of another generation or ratio: off."""
    if path is None:
        return "off", None, ""
    try:
        fault("ecsum.read")
        with open(path, "rb") as handle:
            data = handle.read(MAX_FILE_BYTES + 1)
        sidecar = decode(data)
        if sidecar.generation != 0 or sidecar.ratio != ratio:
            return "off", None, ""
        sidecar.check(ratio)
    except (OSError, BadSidecar) as exc:
        return "invalid", None, str(exc)
    return "on", sidecar, ""


def remove_all(base: str) -> None:
    """Removes <base>.ecsum and those of other generations. Raises OSError."""
    for path in (base + EXTENSION, *glob.glob(glob.escape(base + EXTENSION) + ".v*")):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def checksum(file: ec.File, start: int, end: int, crc: int, memory: mmap.mmap) -> int:
    """Goes on with the CRC-32C of an open shard. Raises OSError; EIO where the file ends too early."""
    try:
        return ec.checksum(file, start, end, crc, memory)
    except engine.NativeError as exc:
        number = exc.info.sys_errno or errno.EIO
        raise OSError(number, os.strerror(number)) from exc
