"""Writers, deleters and readers go on through 50 vacuums, on the volume itself and through a server."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from race.history import History
from race.server import HttpStore, vacuum

from pyvolume.errors import NeedleNotFound
from pyvolume.storage import compact
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement
from tools.compat.bed import Bed

VACUUMS = 50
VID = 7
COOKIE = 1


class DirectStore:
    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    def put(self, key: int, data: bytes) -> None:
        self.volume.write_needle(NeedleIn(key, COOKIE, data, flags=0x08, last_modified_s=5), fsync=key % 16 == 0)

    def delete(self, key: int) -> None:
        with contextlib.suppress(NeedleNotFound):
            self.volume.delete_needle(key, COOKIE, self.volume.read_needle(key).checksum)

    def get(self, key: int) -> bytes | None:
        try:
            return bytes(self.volume.read_needle(key).data or b"")
        except NeedleNotFound:
            return None


@pytest.mark.parametrize("width", [4, 5])
def test_volume_through_vacuums(tmp_path: Path, width: int) -> None:
    place = str(tmp_path)
    options = LoadOptions(offset_width=width)
    volume = create_volume(place, place, "", VID, replica_placement=ReplicaPlacement(), options=options)
    history = History.of(300)
    threads = history.start(lambda: DirectStore(volume), writers=2, readers=2)
    for number in range(VACUUMS):
        assert compact.compact(volume) is not None
        assert compact.commit(volume)
        assert volume.compaction_revision == number + 1
        assert history.problems == []
    history.finish(threads, DirectStore(volume))
    assert min(history.done[kind] for kind in ("put", "delete", "get")) > VACUUMS
    volume.close()
    volume = load_volume(place, place, "", VID, options=options)
    assert not volume.is_read_only
    history.check(DirectStore(volume))
    volume.close()


def test_server_through_vacuums(tmp_path: Path) -> None:
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume") as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        history = History.of(300)
        threads = history.start(lambda: HttpStore(bed, VID), writers=2, readers=2)
        for _ in range(VACUUMS):
            vacuum(bed, VID)
            assert history.problems == []
        history.finish(threads, HttpStore(bed, VID))
        assert history.done["refused"] == 0
        assert min(history.done[kind] for kind in ("put", "delete", "get")) > VACUUMS
