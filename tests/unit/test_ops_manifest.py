"""Chunk manifests: parsing as Go does, and reading stretches of the joined file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pyvolume.errors import PyvolumeError
from pyvolume.ops import manifest
from pyvolume.ops.peers import PeerError


def test_parse_sorts_and_sums() -> None:
    text = json.dumps(
        {
            "name": "n",
            "mime": "m/m",
            "size": 7,
            "chunks": [{"fid": "2,b", "offset": 5, "size": 3}, {"fid": "1,a", "offset": 0, "size": 5}],
        }
    )
    parsed = manifest.parse(text.encode())
    assert (parsed.name, parsed.mime, parsed.size, parsed.total_bytes) == ("n", "m/m", 7, 8)
    assert [chunk.fid for chunk in parsed.chunks] == ["1,a", "2,b"]


def test_names_are_matched_in_any_case_and_null_is_nothing() -> None:
    parsed = manifest.parse(b'{"Name":"x","MIME":null,"SIZE":3,"unknown":[1],"Chunks":[{"FID":"1,a","Size":3}]}')
    assert (parsed.name, parsed.mime, parsed.size) == ("x", "", 3)
    assert parsed.chunks == (manifest.Chunk("1,a", 0, 3),)


@pytest.mark.parametrize("data", [b"{}", b"null", b'{"chunks":null}', b'{"chunks":[]}'])
def test_empty_manifests(data: bytes) -> None:
    assert manifest.parse(data) == manifest.Manifest("", "", 0, ())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{broken", "invalid character 'b' looking for beginning of object key string"),
        (b"", "unexpected end of JSON input"),
        (b'"not a manifest"', "json: cannot unmarshal string into Go value of type operation.ChunkManifest"),
        (b"[1]", "json: cannot unmarshal array into Go value of type operation.ChunkManifest"),
        (b'{"size":"5"}', "json: cannot unmarshal string into Go struct field ChunkManifest.size of type int64"),
        (b'{"size":1.5}', "json: cannot unmarshal number 1.5 into Go struct field ChunkManifest.size of type int64"),
        (b'{"name":1}', "json: cannot unmarshal number 1 into Go struct field ChunkManifest.name of type string"),
        (
            b'{"chunks":{}}',
            "json: cannot unmarshal object into Go struct field ChunkManifest.chunks of type operation.ChunkList",
        ),
        (
            b'{"chunks":[{"offset":true}]}',
            "json: cannot unmarshal bool into Go struct field ChunkManifest.chunks.offset of type int64",
        ),
        (
            b'{"chunks":[3]}',
            "json: cannot unmarshal number 3 into Go struct field ChunkManifest.chunks of type operation.ChunkInfo",
        ),
    ],
)
def test_what_is_no_manifest(data: bytes, text: str) -> None:
    with pytest.raises(manifest.ManifestError) as caught:
        manifest.parse(data)
    assert str(caught.value) == text


def test_packed_manifests() -> None:
    text = b'{"name":"x"}'
    assert manifest.load(gzip.compress(text), True).name == "x"
    assert manifest.load(memoryview(text), True).name == "x", "marked as packed, but it is not"
    with pytest.raises(manifest.ManifestError, match="unexpected end of JSON input"):
        manifest.load(gzip.compress(text)[:-4], True)


@dataclass
class Place:
    url: str


@dataclass
class Answer:
    status: int
    data: bytes
    closed: int = 0
    fail_after: int | None = None

    def chunks(self, size: int) -> Iterator[bytes]:
        for at in range(0, len(self.data), 3):
            if self.fail_after is not None and at >= self.fail_after:
                raise PeerError("unexpected EOF")
            yield self.data[at : at + 3]

    def close(self) -> None:
        self.closed += 1


class Servers:
    """Chunks by fid; remembers what was asked."""

    def __init__(self, **chunks: bytes) -> None:
        self.data = {fid.replace("_", ","): data for fid, data in chunks.items()}
        self.asked: list[tuple[str, int]] = []
        self.answers: list[Answer] = []
        self.status = 0

    def fetch(self, host: str, fid: str, skip: int) -> Answer:
        self.asked.append((fid, skip))
        assert host == "h:1"
        status = self.status or (206 if skip else 200)
        answer = Answer(status, self.data[fid][skip:])
        self.answers.append(answer)
        return answer


def reader(servers: Servers, *chunks: tuple[str, int, int]) -> manifest.ChunkReader:
    made = manifest.Manifest("", "", 0, tuple(manifest.Chunk(*chunk) for chunk in chunks))
    return manifest.ChunkReader(made, lambda vid: [Place("h:1")], servers.fetch)


ALL = (("1,a", 0, 10), ("1,b", 10, 7), ("2,c", 17, 5))
DATA = {"1_a": b"0123456789", "1_b": b"abcdefg", "2_c": b"VWXYZ"}
JOINED = b"0123456789abcdefgVWXYZ"


@pytest.mark.parametrize(
    ("start", "length"), [(0, 22), (0, 1), (3, 4), (9, 2), (10, 7), (5, 15), (21, 1), (17, 5), (8, 0)]
)
def test_stretches(start: int, length: int) -> None:
    servers = Servers(**{fid.lstrip("_"): data for fid, data in DATA.items()})
    assert b"".join(reader(servers, *ALL).stream(start, length)) == JOINED[start : start + length]
    assert all(answer.closed for answer in servers.answers)


def test_only_chunks_that_are_needed_are_asked_for() -> None:
    servers = Servers(**DATA)
    assert b"".join(reader(servers, *ALL).stream(12, 3)) == b"cde"
    assert servers.asked == [("1,b", 2)]


@pytest.mark.parametrize(
    ("status", "start", "text"),
    [
        (404, 0, "Read chunk needle error: [404] http://h:1/1,a"),
        (416, 3, "Invalid range"),
        (200, 3, "Range requests are not supported by the remote server"),
        (401, 3, "Read chunk needle error: [401] http://h:1/1,a"),
    ],
)
def test_bad_answers(status: int, start: int, text: str) -> None:
    servers = Servers(**DATA)
    servers.status = status
    with pytest.raises(manifest.ChunkError) as caught:
        list(reader(servers, *ALL).stream(start, 5))
    assert str(caught.value) == text
    assert servers.answers[0].closed


def test_a_gap_is_an_invalid_range() -> None:
    with pytest.raises(manifest.ChunkError, match="Invalid range"):
        list(reader(Servers(**DATA), ("1,b", 10, 7)).stream(0, 5))


def test_a_short_chunk_shows_as_an_error_at_the_end() -> None:
    servers = Servers(**DATA)
    with pytest.raises(manifest.ChunkError):
        list(reader(servers, ("1,b", 0, 10)).stream(0, 10))


def test_lookup_failures() -> None:
    made = manifest.Manifest("", "", 0, (manifest.Chunk("1,a", 0, 10),))
    with pytest.raises(manifest.ChunkError, match="File Not Found"):
        list(manifest.ChunkReader(made, lambda vid: [], Servers().fetch).stream(0, 1))

    def broken(vid: int) -> list[Place]:
        raise PyvolumeError("rpc error")

    with pytest.raises(manifest.ChunkError, match="rpc error"):
        list(manifest.ChunkReader(made, broken, Servers().fetch).stream(0, 1))
    odd = manifest.Manifest("", "", 0, (manifest.Chunk("1,a,b", 0, 10),))
    with pytest.raises(manifest.ChunkError, match="Invalid fileId 1,a,b"):
        list(manifest.ChunkReader(odd, lambda vid: [Place("h:1")], Servers().fetch).stream(0, 1))


def test_a_body_that_breaks_off_ends_in_a_chunk_error() -> None:
    servers = Servers(**DATA)
    original = servers.fetch

    def cut(host: str, fid: str, skip: int) -> Answer:
        answer = original(host, fid, skip)
        answer.fail_after = 3
        return answer

    made = manifest.Manifest("", "", 0, (manifest.Chunk("1,a", 0, 10),))
    got = []
    with pytest.raises(manifest.ChunkError, match="unexpected EOF"):
        for piece in manifest.ChunkReader(made, lambda vid: [Place("h:1")], cut).stream(0, 10):
            got.append(piece)
    assert b"".join(got) == b"012"
