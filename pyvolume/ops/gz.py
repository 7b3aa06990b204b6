"""Gzip: the engine packs uploads, ISA-L unpacks for readers. Must not import storage or server.

Unpacked data never has to fit into memory: small results are bytes, large ones are walked once for their length and
then streamed. The walk is bounded, since 256 MiB of gzip can stand for a quarter of a terabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from isal import igzip_lib

from pyvolume._native.gzip import gzip_fast
from pyvolume.errors import PyvolumeError

Buffer = bytes | bytearray | memoryview

IN_MEMORY_BYTES = 16 << 20
MAX_PLAIN_BYTES = 16 << 30
_FEED_BYTES = 64 << 10
_PIECE_BYTES = 256 << 10
_MAGIC = b"\x1f\x8b"
_Error = cast("type[Exception]", igzip_lib.IsalError)  # the package's stub declares an instance


class BadGzip(PyvolumeError):
    """The data is no gzip, is cut off, or fails its checksum."""


class TooLarge(PyvolumeError):
    """Unpacked, the data has more than MAX_PLAIN_BYTES."""


def is_gzip(data: Buffer) -> bool:
    """Whether the data begins like gzip; all that upstream looks at before it unpacks."""
    return bytes(data[:2]) == _MAGIC


def pack(data: Buffer) -> bytes | None:
    """One gzip member, without name or time, or None where it would save a tenth or less: then upstream keeps the data.

    The bytes are those that upstream's encoder makes, so ETags and checksums of packed needles agree between servers.
    Runs without the interpreter's lock.
    """
    return gzip_fast(data, (len(data) * 9 - 1) // 10)


def pieces(data: Buffer) -> Iterator[bytes]:
    """The unpacked data of all members, piece by piece. Raises BadGzip where it breaks, TooLarge past the bound."""
    view = memoryview(data)
    at, total = 0, 0
    if not view:
        raise BadGzip("EOF")
    while at < len(view):
        unpacker = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        fed = 0
        while not unpacker.eof:
            chunk = b""
            if unpacker.needs_input:
                chunk = bytes(view[at + fed : at + fed + _FEED_BYTES])
                fed += len(chunk)
                if not chunk:
                    raise BadGzip("unexpected EOF")
            try:
                piece = unpacker.decompress(chunk, _PIECE_BYTES)
            except _Error as exc:
                raise BadGzip(f"gzip: {exc}") from exc
            if piece:
                total += len(piece)
                if total > MAX_PLAIN_BYTES:
                    raise TooLarge(f"gzip data unpacks to more than {MAX_PLAIN_BYTES} bytes")
                yield piece
        at += fed - len(unpacker.unused_data)


def plain_size(data: Buffer) -> int:
    """Length of the unpacked data. Raises BadGzip, TooLarge."""
    return sum(len(piece) for piece in pieces(data))


def gunzip(data: Buffer) -> bytes | None:
    """The unpacked data, or None if it is longer than IN_MEMORY_BYTES (then stream it). Raises BadGzip, TooLarge."""
    out = []
    total = 0
    for piece in pieces(data):
        total += len(piece)
        if total <= IN_MEMORY_BYTES:
            out.append(piece)
        else:
            out.clear()
    return b"".join(out) if total <= IN_MEMORY_BYTES else None


def stream(data: Buffer, start: int, length: int) -> Iterator[bytes]:
    """A stretch of the unpacked data. Raises BadGzip; callers have walked the data before."""
    if length <= 0:
        return
    for piece in pieces(data):
        if start >= len(piece):
            start -= len(piece)
            continue
        part = piece[start : start + length] if start or length < len(piece) else piece
        start = 0
        length -= len(part)
        yield part
        if length <= 0:
            return
