"""What the tests of the storage layer share: golden volumes, made-up configurations, volumes in a directory."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyvolume._native import engine
from pyvolume.config import DirConfig, MinFreeSpace
from pyvolume.storage import volume as volume_module
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import FileId, ReplicaPlacement, Ttl

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "go-4.44"
PLAIN = ReplicaPlacement()
COOKIE = 0x1234ABCD


@dataclass(frozen=True)
class Config:
    """The part of ServerConfig that the store looks at."""

    dirs: tuple[DirConfig, ...]
    ip: str = "127.0.0.1"
    port: int = 8080
    server_id: str = "127.0.0.1:8080"
    index_kind: str = "memory"
    index_leveldb_timeout_h: int = 0
    offset_bytes: int = 4
    repair_on_load: bool = True


def config_of(*directories: Path, idx: Path | None = None, **more: Any) -> Config:
    """One DirConfig for each directory, without a reserve, so that the machine's disk does not matter."""
    fields = {key: more.pop(key) for key in ("max_volumes", "disk_type", "tags") if key in more}
    return Config(tuple(dir_config(d, idx, **fields) for d in directories), **more)


def dir_config(directory: Path, idx: Path | None = None, **fields: Any) -> DirConfig:
    directory.mkdir(parents=True, exist_ok=True)
    return DirConfig(str(directory), str(idx) if idx else "", min_free=MinFreeSpace(None, 0), **fields)


class Clock:
    """The clocks that expiry goes by, in the hands of a test: that of the wall, and the one that only runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = time.time()
        self.running_s = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.wall_s)
        monkeypatch.setattr(volume_module, "running_s", lambda: self.running_s)

    def passes(self, seconds: float) -> None:
        self.wall_s += seconds
        self.running_s += seconds

    def reaches(self, wall_s: float) -> None:
        self.passes(wall_s - self.wall_s)


def golden(name: str, target: Path) -> dict[str, Any]:
    """Copies a golden volume's files into a directory; gives its manifest."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (GOLDEN / name / "data").iterdir():
        shutil.copy(path, target / path.name)
    manifest: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text())
    return manifest


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(directory: Path, vid: int, collection: str = "", *, repair: bool = True, idx: Path | None = None) -> Volume:
    return load_volume(str(directory), str(idx or directory), collection, vid, options=LoadOptions(repair=repair))


def create(
    directory: Path, vid: int = 3, collection: str = "", *, ttl: Ttl = Ttl.NONE, width: int = 4, idx: Path | None = None
) -> Volume:
    directory.mkdir(parents=True, exist_ok=True)
    return create_volume(
        str(directory),
        str(idx or directory),
        collection,
        vid,
        replica_placement=PLAIN,
        ttl=ttl,
        options=LoadOptions(offset_width=width),
    )


def put(volume: Volume, key: int, data: bytes, cookie: int = COOKIE, **more: Any) -> engine.WriteResult:
    """Writes a needle as an upload without a name would look."""
    more.setdefault("flags", 0x0E)
    more.setdefault("last_modified_s", 1_700_000_000)
    return volume.write_needle(NeedleIn(key, cookie, data, **more))


def data_of(volume: Volume, key: int) -> bytes:
    needle = volume.read_needle(key)
    return bytes(needle.data or b"")


def body_of(needle: engine.Needle) -> bytes:
    """What a GET that takes no gzip gets."""
    data = bytes(needle.data or b"")
    return gzip.decompress(data) if needle.is_compressed else data


def fid_of(entry: dict[str, Any]) -> FileId:
    vid, _, rest = entry["fid"].partition(",")
    key, cookie = FileId.parse_path(rest)
    return FileId(int(vid), key, cookie)


def record(key: int, data: bytes, *, version: int = 3, cookie: int = COOKIE, append_at_ns: int = 1 << 60) -> bytes:
    """A whole record, made by the engine."""
    return engine.frame_needle(key, cookie, data, version=version, append_at_ns=append_at_ns if version == 3 else 0)


def write_volume(directory: Path, records: list[bytes], *, vid: int = 3, block: SuperBlock | None = None) -> list[int]:
    """Writes <vid>.dat of a super block and records, no index; the offsets of the records."""
    directory.mkdir(parents=True, exist_ok=True)
    content = bytearray((block or SuperBlock()).to_bytes())
    offsets = []
    for item in records:
        offsets.append(len(content))
        content += item
    (directory / f"{vid}.dat").write_bytes(content)
    return offsets


def write_index(directory: Path, rows: list[tuple[int, int, int]], *, vid: int = 3, width: int = 4) -> None:
    (directory / f"{vid}.idx").write_bytes(engine.idx_pack(rows, width))


def rows_in(path: Path, width: int = 4) -> list[tuple[int, int, int]]:
    with path.open("rb") as handle:
        return [tuple(row) for row in engine.idx_read(handle.fileno(), width, 0, 1 << 20)]
