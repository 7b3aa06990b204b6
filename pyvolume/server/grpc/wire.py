"""Messages that carry bulk data, built and read without the protobuf library's copies.

Must not import handlers or storage. Only the four messages below, all of length-delimited and varint fields; what is
made here is byte for byte what the library would make, and reading takes whatever any library may send (other order,
repeated and unknown fields). A handler may give such bytes wherever a message is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

CONTENT_FIELD: Final = 1
"""`file_content` of CopyFileResponse and VolumeIncrementalCopyResponse."""
MODIFIED_FIELD: Final = 2
HEADER_FIELD, BODY_FIELD, LAST_FIELD, VERSION_FIELD = 1, 2, 3, 4
"""Fields of VolumeTailSenderResponse."""

BATCH_BYTES: Final = 512 << 10
BATCH_MESSAGES: Final = 256
"""What `batches` holds at most before it gives it away; one message may be longer."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_PLAIN_HEADER: Final = bytes((HEADER_FIELD << 3 | _BYTES, 16))
_PLAIN_BODY: Final = bytes((BODY_FIELD << 3 | _BYTES,))
_PLAIN_END: Final = bytes((LAST_FIELD << 3 | _VARINT, 1, VERSION_FIELD << 3 | _VARINT))
_U64: Final = (1 << 64) - 1

Buffer = bytes | bytearray | memoryview
Fields = dict[int, int | memoryview]


def serialize(message: Any) -> bytes:
    """What goes on the wire for a message, or for bytes that are one already."""
    if type(message) is bytes:
        return message
    made: bytes = message.SerializeToString()
    return made


def batches(messages: Iterable[Any]) -> Iterator[list[bytes]]:
    """Serialised messages, some at a time (bulk.spread sends them). What came before a failure comes before it."""
    batch: list[bytes] = []
    held_bytes = 0
    try:
        for message in messages:
            batch.append(serialize(message))
            held_bytes += len(batch[-1])
            if held_bytes >= BATCH_BYTES or len(batch) >= BATCH_MESSAGES:
                yield batch
                batch, held_bytes = [], 0
    except Exception:
        yield batch
        raise
    yield batch


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_head(field: int, length: int) -> bytes:
    return bytes((field << 3 | _BYTES,)) + _varint(length)


def file_piece(content: Buffer, modified_ts_ns: int = 0) -> bytes:
    """A CopyFileResponse, or without a time a VolumeIncrementalCopyResponse."""
    parts: list[Buffer] = []
    if content:
        parts += (_bytes_head(CONTENT_FIELD, len(content)), content)
    if modified_ts_ns:
        parts.append(bytes((MODIFIED_FIELD << 3 | _VARINT,)) + _varint(modified_ts_ns & _U64))
    return b"".join(parts)


class TailFrame:
    """Makes VolumeTailSenderResponse messages of one volume version."""

    def __init__(self, version: int) -> None:
        version_field = bytes((VERSION_FIELD << 3 | _VARINT,)) + _varint(version)
        self._more = version_field
        self._last = bytes((LAST_FIELD << 3 | _VARINT, 1)) + version_field

    def heartbeat(self) -> bytes:
        """The message that says: nothing new, still here."""
        return self._last

    def piece(self, header: Buffer, body: Buffer, is_last: bool) -> bytes:
        """Part of a record: its 16 header bytes and some of its body."""
        tail = self._last if is_last else self._more
        if not body:
            return b"".join((_bytes_head(HEADER_FIELD, len(header)), header, tail))
        head = _bytes_head(HEADER_FIELD, len(header))
        return b"".join((head, header, _bytes_head(BODY_FIELD, len(body)), body, tail))


def read_fields(message: Buffer) -> Fields:
    """The last value of each field: numbers as unsigned 64 bit, bytes as views on the message.

    Raises ValueError for what is no message. Groups (which no message has) count as that.
    """
    view = memoryview(message)
    end = len(view)
    fields: Fields = {}
    at = 0
    while at < end:
        key, at = _read_varint(view, at, end)
        field, kind = key >> 3, key & 7
        if field == 0:
            raise ValueError("a message with a field 0")
        if kind == _VARINT:
            fields[field], at = _read_varint(view, at, end)
            continue
        if kind == _BYTES:
            length, at = _read_varint(view, at, end)
        elif kind == _FIXED64:
            length = 8
        elif kind == _FIXED32:
            length = 4
        else:
            raise ValueError(f"a message with a field of wire type {kind}")
        if length > end - at:
            raise ValueError("a message that ends within a field")
        if kind == _BYTES:
            fields[field] = view[at : at + length]
        at += length
    return fields


def _read_varint(view: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    for where in range(at, min(end, at + _MAX_VARINT_BYTES)):
        byte = view[where]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, where + 1
        shift += 7
    raise ValueError("a message that ends within a number")


def tail_fields(message: bytes) -> tuple[memoryview, memoryview, bool, int]:
    """Header, body, whether it is the last piece, and version of a VolumeTailSenderResponse. Raises ValueError.

    A record in one piece, as any library writes it, is looked at in the few places that matter.
    """
    if message[:2] == _PLAIN_HEADER and message[18:19] == _PLAIN_BODY:
        length, start = _read_varint(message, 19, len(message))
        end = start + length
        if message[end:-1] == _PLAIN_END and message[-1] <= 0x7F:
            view = memoryview(message)
            return view[2:18], view[start:end], True, message[-1]
    fields = read_fields(message)
    return (
        content(fields, HEADER_FIELD),
        content(fields, BODY_FIELD),
        bool(number(fields, LAST_FIELD)),
        number(fields, VERSION_FIELD),
    )


def number(fields: Fields, field: int) -> int:
    """A varint field; 0 if it is absent or no number."""
    value = fields.get(field, 0)
    return value if isinstance(value, int) else 0


def content(fields: Fields, field: int) -> memoryview:
    """A bytes field; empty if it is absent or no bytes."""
    value = fields.get(field)
    return value if isinstance(value, memoryview) else memoryview(b"")
