"""A process dies at each step of an encode, rebuild or decode: the next start serves every needle, and only those."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_nodes import Server

from pyvolume import faults
from pyvolume._native import engine
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.errors import NeedleNotFound
from pyvolume.storage.store import Store
from pyvolume.storage.volume import NeedleIn
from pyvolume.types import ReplicaPlacement

COOKIE = 7
KEYS = range(1, 21)
DELETED, JOURNALED = 3, 4

CHILD = """
import sys
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.storage.store import Store

target, idx, job = sys.argv[1:]
store = Store(ServerConfig(dirs=(DirConfig(target, idx, min_free=MinFreeSpace(None, 0)),)))
store.load()
if job == "encode":
    store.generate_shards(3, "", lambda: None)
elif job == "rebuild":
    store.ec.rebuild("", 3, unsafe=False, go_on=lambda: None)
elif job == "decode":
    store.decode_shards(3, "", lambda: None)
store.close()
"""


def data_of(key: int) -> bytes:
    return b"%d " % key * 50_000


def open_store(directory: Path, idx: Path | None) -> Store:
    for path in (directory, *([idx] if idx else [])):
        path.mkdir(exist_ok=True)
    store = Store(ServerConfig(dirs=(DirConfig(str(directory), str(idx or ""), min_free=MinFreeSpace(None, 0)),)))
    store.load()
    return store


def make(directory: Path, idx: Path | None, *, coded: bool) -> None:
    store = open_store(directory, idx)
    volume = store.allocate_volume(3, "", ReplicaPlacement())
    for key in KEYS:
        volume.write_needle(NeedleIn(key, COOKIE, data_of(key)))
    volume.delete_needle(DELETED, COOKIE)
    if coded:
        store.generate_shards(3, "", lambda: None)
        store.delete_volume(3)
        for shard in range(14):
            store.ec.mount("", 3, shard)
        found = store.ec.find(3)
        assert found is not None
        found.journal(JOURNALED)
    store.close()


def needle(store: Store, key: int) -> bytes | None:
    """The data, of the volume or of the shards; None if it is deleted or missing."""
    if store.has_volume(3):
        try:
            return bytes(store.read_needle(3, key).data or b"")
        except NeedleNotFound:
            return None
    volume = store.ec.find(3)
    assert volume is not None, "neither volume nor shards"
    try:
        offset, size = volume.lookup(key)
    except NeedleNotFound:
        return None
    if size < 0:
        return None
    parts = volume.layout.locate(offset, volume.record_bytes(size))
    record = b"".join(volume.shards[part.shard].read(part.offset, part.length) for part in parts)
    return bytes(engine.parse_needle(record, volume.version, size).data or b"")


@pytest.mark.parametrize(
    ("job", "point"),
    [
        ("encode", "ec.write_index"),
        ("encode", "ec.encode"),
        ("encode", "ecsum.write"),
        ("encode", "ecsum.rename"),
        ("encode", "ec.publish"),
        ("encode", "vif.write"),
        ("encode", "vif.rename"),
        ("encode", "ec.publish_index"),
        ("rebuild", "ec.rebuild"),
        ("rebuild", "ec.rebuild_rename"),
        ("rebuild", "ec.fold"),
        ("rebuild", "ec.fold_truncate"),
        ("decode", "ec.fold"),
        ("decode", "ec.fold_truncate"),
        ("decode", "ec.decode"),
        ("decode", "ec.write_dat"),
        ("decode", "ec.publish_dat"),
        ("decode", "ec.fold@2"),
        ("decode", "ec.fold_truncate@2"),
        ("decode", "ec.idx.write"),
        ("decode", "ec.idx.rename"),
        ("decode", "compact.begin"),
        ("decode", "compact.finish"),
        ("decode", "compact.commit"),
        ("decode", "compact.remove_marker"),
    ],
)
@pytest.mark.parametrize("has_idx_directory", [False, True])
def test_next_start_serves_what_there_was(tmp_path: Path, job: str, point: str, has_idx_directory: bool) -> None:
    directory, idx = tmp_path / "data", tmp_path / "idx" if has_idx_directory else None
    make(directory, idx, coded=job != "encode")
    if job == "rebuild":
        (directory / "3.ec02").unlink()
        (directory / "3.ec11").unlink()
    name, _, nth = point.partition("@")
    environment = {**os.environ, faults.ENVIRONMENT: f"{name}=exit@{nth or 1}"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), str(idx or ""), job], env=environment, check=False
    )
    assert child.returncode == faults.EXIT_STATUS
    store = open_store(directory, idx)
    try:
        gone = {DELETED} if job == "encode" else {DELETED, JOURNALED}
        if job == "rebuild":
            store.ec.rebuild("", 3, unsafe=False, go_on=lambda: None)
            for shard in (2, 11):
                store.ec.mount("", 3, shard)
        for key in KEYS:
            assert needle(store, key) == (None if key in gone else data_of(key)), key
        left = [path.name for place in (directory, idx) if place is not None for path in place.iterdir()]
        assert [name for name in left if name.endswith((".tmp", ".rebuilding"))] == []
    finally:
        store.close()


# -------------------------------------------------------------------------------------------------- shards of a peer

COPY_CHILD = """
import sys
from pathlib import Path
from grpc_nodes import Server

target, idx, address = sys.argv[1:]
server = Server(Path(target), idx=bool(idx))
flags = dict.fromkeys(("copy_ecx_file", "copy_ecj_file", "copy_vif_file", "copy_ecsum_file"), True)
answer = server.call("VolumeEcShardsCopy", volume_id=3, shard_ids=[0, 1], source_data_node=address, **flags)
answer = server.call("VolumeEcShardsMount", volume_id=3, shard_ids=[0, 1])
server.call("VolumeEcBlobDelete", volume_id=3, file_key=9)
server.end()
"""
LATER = 9


@pytest.mark.parametrize("has_idx_directory", [False, True])
@pytest.mark.parametrize(
    "point",
    [
        *(f"copy.{step}@{n}" for step in ("create", "write", "sync", "rename") for n in (1, 2, 3, 4)),
        "ec.ecj.write",
        "ec.ecj.rename",
        "ec.open",
        "ec.journal",
    ],
)
def test_shards_that_are_copied_from_a_peer(tmp_path: Path, point: str, has_idx_directory: bool) -> None:
    """A start after the crash finds no leftovers, and the copy can be repeated: shards and deletes are the source's."""
    source_directory = tmp_path / "source" / "d0"
    source_directory.mkdir(parents=True)
    make(source_directory, None, coded=True)
    source = Server(tmp_path / "source")
    name, _, nth = point.partition("@")
    try:
        child = subprocess.run(
            [sys.executable, "-c", COPY_CHILD, str(tmp_path / "t"), "idx" * has_idx_directory, source.address],
            env={
                **os.environ,
                faults.ENVIRONMENT: f"{name}=exit@{nth or 1}",
                "PYTHONPATH": f"{Path(__file__).parents[1] / 'unit'}:{Path(__file__).parents[2]}",
            },
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert child.returncode == faults.EXIT_STATUS, child.stderr
        target = Server(tmp_path / "t", idx=has_idx_directory)
        try:
            assert [each for each in target.files() if each.endswith((".tmp", ".receiving"))] == []
            flags = dict.fromkeys(("copy_ecx_file", "copy_ecj_file", "copy_vif_file", "copy_ecsum_file"), True)
            fields = {"volume_id": 3, "shard_ids": [0, 1], "source_data_node": source.address}
            assert target.call("VolumeEcShardsCopy", **fields, **flags).code is grpc.StatusCode.OK
            assert target.call("VolumeEcShardsMount", volume_id=3, shard_ids=[0, 1]).code is grpc.StatusCode.OK
            copied, whole = target.store.ec.find(3), source.store.ec.find(3)
            assert copied is not None and whole is not None
            for number in (0, 1):
                assert copied.shards[number].read(0, 1 << 21) == whole.shards[number].read(0, 1 << 21)
            assert list(copied.walk()) == list(whole.walk())
            assert set(copied.deleted) == set(whole.deleted) == {JOURNALED}, (
                "the delete at the crash was not acknowledged"
            )
            names = {"3.ec00", "3.ec01", "3.ecx", "3.ecj", "3.vif", "3.ecsum"}
            assert target.files() == names
        finally:
            target.end()
    finally:
        source.end()
