"""A process dies while a volume's data moves to a remote store or back: the next start serves one of them, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import FakeS3

from pyvolume import faults
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.errors import NeedleNotFound
from pyvolume.storage.store import Store
from pyvolume.storage.tier.backends import Watcher
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.types import ReplicaPlacement

COOKIE = 7
KEYS = range(1, 20)

CHILD = """
import json, sys
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.storage.store import Store
from pyvolume.storage.tier import s3
from pyvolume.storage.tier.backends import Watcher

directory, properties, way = sys.argv[1:]
s3.PART_BYTES = 4096
store = Store(ServerConfig(dirs=(DirConfig(directory, "", min_free=MinFreeSpace(None, 0)),)))
store.add_backends([("s3", "default", json.loads(properties))])
store.load()
if way == "up":
    store.move_to_remote(3, "", "s3.default", False, Watcher())
else:
    store.move_from_remote(3, "", False, Watcher())
store.close()
"""


@pytest.fixture
def server() -> Iterator[FakeS3]:
    with FakeS3() as made:
        yield made


def opened(directory: Path, server: FakeS3) -> Store:
    store = Store(ServerConfig(dirs=(DirConfig(str(directory), "", min_free=MinFreeSpace(None, 0)),)))
    store.add_backends([("s3", "default", server.properties())])
    store.load()
    return store


def body(key: int) -> bytes:
    return b"%d;" % key * key * 50


def check(volume: Volume) -> None:
    for key in KEYS:
        if key == 4:
            with pytest.raises(NeedleNotFound):
                volume.read_needle(key)
        else:
            assert bytes(volume.read_needle(key).data or b"") == body(key)


def dies(directory: Path, server: FakeS3, way: str, point: str) -> None:
    name, _, nth = point.partition("@")
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), json.dumps(server.properties()), way],
        env={**os.environ, "PYVOLUME_FAILPOINTS": f"{name}=exit@{nth or 1}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == faults.EXIT_STATUS, ended.stderr


def filled(directory: Path, server: FakeS3) -> Store:
    directory.mkdir()
    store = opened(directory, server)
    volume = store.allocate_volume(3, "", ReplicaPlacement())
    for key in KEYS:
        volume.write_needle(NeedleIn(key, COOKIE, body(key)))
    volume.delete_needle(4, COOKIE)
    return store


@pytest.mark.parametrize(
    ("point", "is_remote"),
    [
        ("tier.put", False),
        ("tier.put@3", False),
        ("tier.complete", False),
        ("tier.uploaded", False),
        ("tier.save", False),
        ("vif.write", False),
        ("vif.rename", False),
        ("tier.swap", True),
        ("tier.unlink", True),
    ],
)
def test_a_crash_on_the_way_there(tmp_path: Path, server: FakeS3, point: str, is_remote: bool) -> None:
    directory = tmp_path / "a"
    filled(directory, server).close()
    dies(directory, server, "up", point)
    store = opened(directory, server)
    volume = store.find_volume(3)
    assert volume is not None and volume.is_remote is is_remote
    check(volume)
    if not is_remote:
        volume.write_needle(NeedleIn(50, COOKIE, b"goes on"))
        store.move_to_remote(3, "", "s3.default", False, Watcher())
        check(volume)
    store.move_from_remote(3, "", False, Watcher())
    check(store.find_volume(3) or volume)
    store.close()


@pytest.mark.parametrize(
    ("point", "is_remote"),
    [
        ("tier.get@2", True),
        ("tier.write@2", True),
        ("tier.fetched", True),
        ("tier.place", True),
        ("tier.unsave", True),
        ("vif.write", True),
        ("vif.rename", True),
        ("tier.unswap", False),
        ("tier.delete", False),
    ],
)
def test_a_crash_on_the_way_back(tmp_path: Path, server: FakeS3, point: str, is_remote: bool) -> None:
    directory = tmp_path / "a"
    store = filled(directory, server)
    store.move_to_remote(3, "", "s3.default", False, Watcher())
    store.close()
    dies(directory, server, "down", point)
    assert len(server.keys()) == 1, "an object goes last"
    store = opened(directory, server)
    volume = store.find_volume(3)
    assert volume is not None and volume.is_remote is is_remote
    assert not list(directory.glob("*.fetching")), "what was half fetched is gone"
    check(volume)
    if is_remote:
        store.move_from_remote(3, "", False, Watcher())
        check(volume)
    else:
        volume.write_needle(NeedleIn(50, COOKIE, b"goes on"))
    store.close()
