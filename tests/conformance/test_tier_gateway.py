"""A tier in upstream's own S3 gateway, which checks every signature (the server of this process without WEED_BIN)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import FakeS3, GoS3, any_s3

from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.errors import RemoteError, StorageError
from pyvolume.storage.store import Store
from pyvolume.storage.tier import s3
from pyvolume.storage.tier.backends import Watcher
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.types import ReplicaPlacement

COOKIE = 9
LARGE = bytes(range(256)) * (24 << 10)  # 6 MiB


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeS3 | GoS3]:
    yield from any_s3(tmp_path_factory.mktemp("gateway"))


@pytest.fixture
def store(tmp_path: Path, gateway: FakeS3 | GoS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(s3, "RETRY_WAITS_S", (0.1,))
    made = Store(ServerConfig(dirs=(DirConfig(str(tmp_path), "", min_free=MinFreeSpace(None, 0)),)))
    wrong = gateway.properties(aws_secret_access_key="another")
    made.add_backends([("s3", "default", gateway.properties()), ("s3", "wrong", wrong)])
    made.load()
    yield made
    made.close()


def fill(store: Store, vid: int) -> Volume:
    volume = store.allocate_volume(vid, "", ReplicaPlacement())
    for key in range(1, 11):
        volume.write_needle(NeedleIn(key, COOKIE, b"%d;" % key * 1000))
    volume.write_needle(NeedleIn(20, COOKIE, LARGE))
    return volume


def check(volume: Volume) -> None:
    for key in range(1, 11):
        assert bytes(volume.read_needle(key).data or b"") == b"%d;" % key * 1000
    needle = volume.read_needle(20, meta_ok=True)
    assert b"".join(volume.stream_data(needle, chunk_bytes=1 << 20)) == LARGE
    assert b"".join(volume.stream_data(needle, 12_345, 1 << 20)) == LARGE[12_345 : 12_345 + (1 << 20)]


@pytest.mark.parametrize("part_bytes", [64 << 20, 5 << 20], ids=["one PUT", "parts"])
def test_round_trip(store: Store, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", part_bytes)
    volume = fill(store, 3)
    local = Path(volume.dat_path).read_bytes()
    store.move_to_remote(3, "", "s3", False, Watcher())
    assert not Path(volume.dat_path).exists()
    check(volume)
    volume.delete_needle(5, COOKIE)
    store.unmount_volume(3)
    volume = store.mount_volume(3)
    store.move_from_remote(3, "", False, Watcher())
    assert Path(volume.dat_path).read_bytes() == local


def test_deleting_the_volume_deletes_the_object(store: Store) -> None:
    volume = fill(store, 4)
    store.move_to_remote(4, "", "s3.default", False, Watcher())
    name, key = volume.remote_storage
    backend = store.backends.find(name)
    assert backend is not None and backend.size_of(key) == volume.dat_bytes
    store.delete_volume(4)
    with pytest.raises(RemoteError, match="NoSuchKey"):
        backend.size_of(key)


def test_wrong_keys(store: Store, gateway: FakeS3 | GoS3) -> None:
    if isinstance(gateway, FakeS3):
        pytest.skip("WEED_BIN is not set: the server of this process checks no signatures")
    volume = fill(store, 5)
    with pytest.raises(StorageError, match=r"^backend s3.wrong copy file .*SignatureDoesNotMatch"):
        store.move_to_remote(5, "", "s3.wrong", False, Watcher())
    check(volume)
    assert not volume.is_read_only
