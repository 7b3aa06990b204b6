"""Chunk manifests: a needle whose data names the needles that make up one large file (contract http.md 6.10, 11).

Parsing, and a reader that fetches the chunks one after the other as they are wanted. Must not import server or storage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pyvolume.errors import PyvolumeError
from pyvolume.ops import gojson, gz
from pyvolume.ops.peers import PeerError

READ_BYTES = 256 << 10
MAX_TEXT_BYTES = 256 << 20  # of a manifest, unpacked; about two million chunks

_JSON_WORDS: tuple[tuple[type, str], ...] = (
    (bool, "bool"),
    (int, "number"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)


class ManifestError(PyvolumeError):
    """The data is no manifest; `str()` is Go's word for what is wrong with the JSON."""


class ChunkError(PyvolumeError):
    """A chunk cannot be read; `str()` is upstream's text."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One needle of the file: its id as text, where it belongs, and how many bytes it brings."""

    fid: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest, chunks sorted by offset. `size` is the maker's word, `total_bytes` what chunks add up to."""

    name: str
    mime: str
    size: int
    chunks: tuple[Chunk, ...]

    @property
    def total_bytes(self) -> int:
        return sum(chunk.size for chunk in self.chunks)


def _word(value: Any) -> str:
    return next(word for kind, word in _JSON_WORDS if isinstance(value, kind))


def _member(source: dict[str, Any], name: str) -> Any:
    """A member by its name, letter case aside (the last one wins); None for null and absence."""
    value = source.get(name)
    if value is None:
        for key, candidate in source.items():
            if key.lower() == name and candidate is not None:
                value = candidate
    return value


def _misfit(value: Any, field: str, wanted: str) -> ManifestError:
    word = f"number {value}" if isinstance(value, int | float) and not isinstance(value, bool) else _word(value)
    return ManifestError(f"json: cannot unmarshal {word} into Go struct field ChunkManifest.{field} of type {wanted}")


def _text(source: dict[str, Any], name: str, prefix: str = "") -> str:
    value = _member(source, name)
    if value is not None and not isinstance(value, str):
        raise _misfit(value, prefix + name, "string")
    return value or ""


def _int64(source: dict[str, Any], name: str, prefix: str = "") -> int:
    value = _member(source, name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
        raise _misfit(value, prefix + name, "int64")
    return value


def parse(data: bytes) -> Manifest:
    """Reads a manifest as Go's decoder does: names in any case, unknown members ignored. Raises ManifestError."""
    try:
        top = gojson.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ManifestError(str(exc)) from None
    if top is None:
        top = {}
    if not isinstance(top, dict):
        raise ManifestError(f"json: cannot unmarshal {_word(top)} into Go value of type operation.ChunkManifest")
    entries = _member(top, "chunks")
    if entries is not None and not isinstance(entries, list):
        raise _misfit(entries, "chunks", "operation.ChunkList")
    chunks = []
    for entry in entries or ():
        if not isinstance(entry, dict):
            raise _misfit({} if entry is None else entry, "chunks", "operation.ChunkInfo")
        inner = "chunks."
        chunks.append(Chunk(_text(entry, "fid", inner), _int64(entry, "offset", inner), _int64(entry, "size", inner)))
    chunks.sort(key=lambda chunk: chunk.offset)
    return Manifest(_text(top, "name"), _text(top, "mime"), _int64(top, "size"), tuple(chunks))


def load(data: bytes | bytearray | memoryview, compressed: bool) -> Manifest:
    """Parses the data of a manifest needle, unpacking it first if it is marked as packed and looks so. Data that does
    not unpack counts as empty, as upstream has it. Raises ManifestError."""
    if compressed and gz.is_gzip(data):
        try:
            packed, data = data, b""
            if gz.plain_size(packed) > MAX_TEXT_BYTES:
                raise ManifestError(f"a manifest of more than {MAX_TEXT_BYTES} bytes")
            data = b"".join(gz.pieces(packed))
        except (gz.BadGzip, gz.TooLarge):
            data = b""
    return parse(bytes(data))


class Fetched(Protocol):
    """A response to a chunk request, from a peer or from this server itself."""

    @property
    def status(self) -> int: ...
    def chunks(self, size: int) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Located(Protocol):
    @property
    def url(self) -> str: ...


Fetch = Callable[[str, str, int], Fetched]
"""(host, fid, first byte) -> response; raises PeerError."""


class ChunkReader:
    """Streams byte ranges of the joined file.

    locate: volume id -> locations (raises PyvolumeError); fetch: gets one chunk from one server. Blocks on the network;
    holds one response at a time.
    """

    def __init__(
        self, manifest: Manifest, locate: Callable[[int], Sequence[Located]], fetch: Fetch, scheme: str = "http"
    ) -> None:
        self._manifest = manifest
        self._locate = locate
        self._fetch = fetch
        self._scheme = scheme

    def stream(self, start: int, length: int) -> Iterator[bytes]:
        """`length` bytes from `start` on. Raises ChunkError, maybe after some bytes were given out."""
        if length <= 0:
            return
        chunks = self._manifest.chunks
        index = next((i for i, c in enumerate(chunks) if c.offset <= start < c.offset + c.size), -1)
        if index < 0:
            raise ChunkError("Invalid range")
        skip = start - chunks[index].offset
        for chunk in chunks[index:]:
            for piece in self._chunk(chunk.fid, skip):
                if len(piece) >= length:
                    yield piece[:length]
                    return
                yield piece
                length -= len(piece)
            skip = 0
        raise ChunkError("EOF")

    def _chunk(self, fid: str, skip: int) -> Iterator[bytes]:
        parts = fid.split(",")
        if len(parts) != 2:
            raise ChunkError(f"Invalid fileId {fid}")
        try:
            locations = self._locate(int(parts[0])) if parts[0].isascii() and parts[0].isdigit() else ()
        except PyvolumeError as exc:
            raise ChunkError(str(exc)) from exc
        if not locations:
            raise ChunkError("File Not Found")
        host = random.choice(locations).url
        url = f"{self._scheme}://{host}/{fid}"
        try:
            response = self._fetch(host, fid, skip)
        except PeerError as exc:
            raise ChunkError(f'Get "{url}": {exc}') from exc
        try:
            if response.status == 416:
                raise ChunkError("Invalid range")
            if response.status == 200 and skip > 0:
                raise ChunkError("Range requests are not supported by the remote server")
            if response.status not in (200, 206):
                raise ChunkError(f"Read chunk needle error: [{response.status}] {url}")
            try:
                yield from response.chunks(READ_BYTES)
            except PeerError as exc:
                raise ChunkError(str(exc)) from exc
        finally:
            response.close()
