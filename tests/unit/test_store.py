"""The store: allocation, mounting, deletion, heartbeats, state (contract storage.md 18, 22, 24; grpc.md 4)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from storage_util import COOKIE, PLAIN, Clock, Config, config_of, create, data_of, dir_config, golden, put

from pyvolume._native import engine
from pyvolume.digest import report_hash
from pyvolume.errors import (
    BadRequest,
    DirectoryInUse,
    NeedleNotFound,
    NoFreeLocation,
    StateVersionMismatch,
    StorageError,
    VolumeBusy,
    VolumeExists,
    VolumeNotEmpty,
    VolumeNotFound,
    VolumeReadOnly,
)
from pyvolume.faults import set_points
from pyvolume.storage import disk_space, state, vif
from pyvolume.storage.disk_space import DiskUsage
from pyvolume.storage.state import ServerState, StateFile
from pyvolume.storage.store import Store
from pyvolume.storage.volume import NeedleIn, VolumeShortInfo, VolumeStatusInfo
from pyvolume.types import ReplicaPlacement, Ttl

GIB = 1 << 30


@contextmanager
def running(config: Config) -> Iterator[Store]:
    store = Store(config)
    store.load()
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with running(config_of(tmp_path / "d0")) as made:
        yield made


def listen(store: Store) -> list[tuple[str, VolumeShortInfo]]:
    heard: list[tuple[str, VolumeShortInfo]] = []
    store.subscribe(lambda kind, info: heard.append((kind, info)))
    return heard


# ------------------------------------------------------------------------------------------------------------- needles


def test_needles_by_volume_id(store: Store) -> None:
    store.allocate_volume(3, "", PLAIN)
    store.write_needle(3, NeedleIn(1, COOKIE, b"hello"))
    assert bytes(store.read_needle(3, 1).data) == b"hello"
    assert store.delete_needle(3, 1, COOKIE) > 0
    with pytest.raises(NeedleNotFound):
        store.read_needle(3, 1)
    with pytest.raises(VolumeNotFound, match=r"^volume 4 not found$"):
        store.read_needle(4, 1)
    for attempt in (
        lambda: store.write_needle(4, NeedleIn(1, 1, b"x")),
        lambda: store.delete_needle(4, 1, 1),
    ):
        with pytest.raises(VolumeNotFound, match=r"^volume 4 not found on 127\.0\.0\.1:8080$"):
            attempt()


# ---------------------------------------------------------------------------------------------------------- allocation


def test_allocate(store: Store, tmp_path: Path) -> None:
    heard = listen(store)
    volume = store.allocate_volume(3, "pics", ReplicaPlacement.parse("010"), Ttl.parse("3h"))
    assert sorted(p.name for p in (tmp_path / "d0").iterdir()) == [
        "pics_3.dat",
        "pics_3.idx",
        "pics_3.vif",
        "vol_dir.uuid",
    ]
    assert store.find_volume(3) is volume and store.has_volume(3)
    assert heard == [("new", VolumeShortInfo(3, "pics", 10, 3, 0x302, "", 0))]
    with pytest.raises(VolumeExists, match=r"^Volume Id 3 already exists!$"):
        store.allocate_volume(3, "", PLAIN)
    with pytest.raises(StorageError, match=r"^volume super block version 0 is not supported$"):
        store.allocate_volume(4, "", PLAIN, version=0)
    assert not list((tmp_path / "d0").glob("4.*"))
    with pytest.raises(BadRequest):
        store.allocate_volume(5, "../x", PLAIN)
    assert len(heard) == 1


def test_preallocated_space_does_not_count_as_data(store: Store, tmp_path: Path) -> None:
    volume = store.allocate_volume(3, "", PLAIN, preallocate=1 << 20)
    st = (tmp_path / "d0" / "3.dat").stat()
    assert st.st_size == 8 and st.st_blocks * 512 >= 1 << 20
    put(volume, 1, b"x")
    assert data_of(volume, 1) == b"x"


def test_placement_among_directories(tmp_path: Path) -> None:
    dirs = (
        dir_config(tmp_path / "a", max_volumes=3),
        dir_config(tmp_path / "b", max_volumes=2),
        dir_config(tmp_path / "c", disk_type="ssd", max_volumes=1),
    )
    with running(Config(dirs)) as store:
        where = [store.allocate_volume(vid, "", PLAIN).disk_id for vid in range(1, 6)]
        assert where == [0, 1, 0, 1, 0], "the fewest, the first on a tie"
        with pytest.raises(NoFreeLocation, match=r"^No more free space left$"):
            store.allocate_volume(6, "", PLAIN)
        assert store.allocate_volume(7, "", PLAIN, disk_type="ssd").disk_id == 2
        with pytest.raises(NoFreeLocation):
            store.allocate_volume(8, "", PLAIN, disk_type="nvme")
        store.delete_volume(2)
        store.locations[1].is_low = True
        with pytest.raises(NoFreeLocation):
            store.allocate_volume(9, "", PLAIN)
        store.locations[1].is_low = False
        store.locations[1].is_unavailable = True
        with pytest.raises(NoFreeLocation):
            store.allocate_volume(9, "", PLAIN)
        store.locations[1].is_unavailable = False
        assert store.allocate_volume(9, "", PLAIN).disk_id == 1


def test_failed_allocation_gives_its_slot_back(store: Store) -> None:
    store.locations[0].max_volume_count = 1
    with set_points("create.open=error:EIO"), pytest.raises(StorageError):
        store.allocate_volume(3, "", PLAIN)
    assert store.volumes() == [] and store.locations[0].pending_creations == 0
    store.allocate_volume(3, "", PLAIN)


def test_racing_allocations_share_the_slots(tmp_path: Path) -> None:
    with running(config_of(tmp_path / "a", tmp_path / "b", max_volumes=3)) as store:
        results: list[object] = []

        def allocate(vid: int) -> None:
            try:
                results.append(store.allocate_volume(vid, "", PLAIN).disk_id)
            except StorageError as exc:
                results.append(type(exc))

        threads = [threading.Thread(target=allocate, args=(vid,)) for vid in [*range(1, 9), 1, 2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(r for r in results if isinstance(r, int)) == [0, 0, 0, 1, 1, 1]
        assert {r for r in results if not isinstance(r, int)} <= {NoFreeLocation, VolumeExists}
        assert store.registry.count() == len(store.volumes()) == 6


def test_own_offset_width_for_new_volumes(tmp_path: Path) -> None:
    with running(config_of(tmp_path, offset_bytes=5)) as store:
        assert store.allocate_volume(3, "", PLAIN).offset_width == 5
        put(store.find_volume(3), 1, b"x")
    assert (tmp_path / "3.idx").stat().st_size == 17
    with running(config_of(tmp_path, offset_bytes=4)) as store:
        assert store.find_volume(3).offset_width == 5 and data_of(store.find_volume(3), 1) == b"x"


# ------------------------------------------------------------------------------------------------------ start and stop


def test_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a", tmp_path / "b")
    with running(config) as store:
        for vid in range(1, 7):
            put(store.allocate_volume(vid, "", PLAIN), vid, b"x" * vid)
        uuids = [location.uuid for location in store.locations]
    progress: list[tuple[int, int]] = []
    store = Store(config)
    store.load(lambda done, total: progress.append((done, total)))
    assert [(v.disk_id, v.vid) for v in store.volumes()] == [(0, 1), (0, 3), (0, 5), (1, 2), (1, 4), (1, 6)]
    assert [data_of(store.find_volume(vid), vid) for vid in range(1, 7)] == [b"x" * vid for vid in range(1, 7)]
    assert progress[-1] == (6, 6)
    assert [location.uuid for location in store.locations] == uuids
    assert store.registry.count() == 6
    store.close()
    store.close()
    assert store.volumes() == [] and store.registry.count() == 0 and store.find_volume(1) is None


def test_a_directory_in_use_stops_the_start_and_lets_go_of_the_others(tmp_path: Path) -> None:
    import fcntl

    config = config_of(tmp_path / "a", tmp_path / "b")
    holder = (tmp_path / "b" / "vol_dir.uuid").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(DirectoryInUse):
        Store(config).load()
    holder.close()
    with running(config):
        pass


def test_same_directory_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accepted as upstream does, but one file is never opened twice."""
    create(tmp_path / "a", 1).close()
    with running(config_of(tmp_path / "a", tmp_path / "a")) as store:
        assert [v.disk_id for v in store.volumes()] == [0]
        assert "is given twice: its volumes are served once" in caplog.text
        assert store.allocate_volume(2, "", PLAIN).disk_id == 1
        store.load_new_volumes()
        store.mount_volume(2)
        assert [(v.vid, v.disk_id) for v in store.volumes()] == [(1, 0), (2, 1)]


def test_the_same_volume_on_two_disks_is_said_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        volume = create(tmp_path / name, 3)
        put(volume, 1, name.encode())
        volume.close()
    with running(config_of(tmp_path / "a", tmp_path / "b")) as store:
        assert "volume 3 is on two disks of this server" in caplog.text
        assert [v.disk_id for v in store.copies(3)] == [0, 1]
        assert data_of(store.find_volume(3), 1) == b"a", "the first directory's"
        assert len(store.heartbeat_volumes()) == 2
        assert bytes(store.registry.acquire(3).read(1).data) == b"a"
        heard = listen(store)
        store.unmount_volume(3)
        assert [(kind, info.disk_id) for kind, info in heard] == [("deleted", 0), ("deleted", 1)]
        assert store.registry.count() == 0 and not store.has_volume(3)


def test_registry_follows_the_copy_that_is_served(tmp_path: Path) -> None:
    for name in ("a", "b"):
        volume = create(tmp_path / name, 3)
        put(volume, 1, name.encode())
        volume.close()
    with running(config_of(tmp_path / "a", tmp_path / "b")) as store:
        first, second = store.copies(3)
        assert first.try_claim("vacuum")
        with pytest.raises(VolumeBusy, match=r"^DeleteVolume 3 failed on some disks: volume 3 is compacting$"):
            store.delete_volume(3)
        assert store.copies(3) == [first] and data_of(store.find_volume(3), 1) == b"a"
        first.release()
        assert not second.is_open
        store.delete_volume(3)
        assert store.registry.count() == 0


def test_two_collections_with_one_id_in_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create(tmp_path, 3, "a").close(), create(tmp_path, 3, "b").close()
    with running(config_of(tmp_path)) as store:
        assert [v.collection for v in store.volumes()] == ["a"]
        assert f"volume 3 is in {tmp_path} twice: {tmp_path}/a_3 is served, b_3 is not" in caplog.text


def test_new_volumes_on_disk_are_found_without_a_word_to_the_master(store: Store, tmp_path: Path) -> None:
    heard = listen(store)
    golden("v3-basic", tmp_path / "d0")
    store.load_new_volumes()
    assert store.find_volume(1).file_count > 0
    assert heard == []
    before = store.find_volume(1)
    store.load_new_volumes()
    assert store.find_volume(1) is before


def test_golden_volumes_all_at_once(tmp_path: Path) -> None:
    for name in ("v3-basic", "collection", "own-v1", "own-v2", "own-v3", "own-5byte", "readonly", "ttl", "vacuumed"):
        golden(name, tmp_path)
    with running(config_of(tmp_path)) as store:
        assert [v.vid for v in store.volumes()] == [1, 7, 8, 9, 12, 31, 41, 42, 43, 101, 102, 103, 111]
        assert {v.offset_width for v in store.volumes()} == {4, 5}
        with pytest.raises(VolumeReadOnly):
            store.write_needle(41, NeedleIn(1, 1, b"x"))


def test_broken_state_stops_the_start(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "state.pb").write_bytes(b"\x08")
    with pytest.raises(StorageError) as caught:
        Store(config).load()
    assert str(caught.value).startswith(
        "failed to resolve state for volume 127.0.0.1:8080: "
        f"failed to parse store state from {tmp_path}/state.pb : proto:"
    )
    (tmp_path / "state.pb").unlink()
    with running(config):
        pass


# ------------------------------------------------------------------------------------------------------ mount, unmount


def test_unmount_and_mount(store: Store, tmp_path: Path) -> None:
    put(store.allocate_volume(3, "c", PLAIN), 1, b"x")
    heard = listen(store)
    store.unmount_volume(3)
    store.unmount_volume(3)
    assert not store.has_volume(3) and (tmp_path / "d0" / "c_3.dat").exists()
    volume = store.mount_volume(3)
    assert store.mount_volume(3) is volume
    assert data_of(volume, 1) == b"x"
    assert [kind for kind, _ in heard] == ["deleted", "new", "new"], "quirk: mounting what is mounted is news, too"
    assert heard[1][1] == VolumeShortInfo(3, "c", 0, 3, 0, "", 0)
    assert bytes(store.registry.acquire(3).read(1).data) == b"x"
    with pytest.raises(VolumeNotFound, match=r"^volume 9 not found on disk$"):
        store.mount_volume(9)


def test_mount_that_fails_is_not_found(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create(tmp_path / "d0", 3).close()
    (tmp_path / "d0" / "3.dat").write_bytes(b"\xee" * 8)
    with pytest.raises(VolumeNotFound, match=r"^volume 3 not found on disk$"):
        store.mount_volume(3)
    assert "Unsupported volume 3 version 238" in caplog.text


def test_unmount_waits_for_a_vacuum(store: Store) -> None:
    volume = store.allocate_volume(3, "", PLAIN)
    assert volume.try_claim("vacuum")
    worker = threading.Thread(target=store.unmount_volume, args=(3,))
    worker.start()
    worker.join(0.05)
    assert worker.is_alive() and volume.is_open and store.has_volume(3)
    store.write_needle(3, NeedleIn(1, COOKIE, b"served until the vacuum is done"))
    volume.release()
    worker.join(10)
    assert not volume.is_open and not store.has_volume(3)


def test_a_scan_of_the_directory_waits_for_a_volume_on_its_way_out(store: Store, tmp_path: Path) -> None:
    """SIGHUP while a vacuum keeps an unmount waiting: its files are in use, not left over."""
    volume = store.allocate_volume(3, "", PLAIN)
    assert volume.try_claim("vacuum")
    (tmp_path / "d0" / "3.cpd").write_bytes(b"in the making")
    leaving = threading.Thread(target=store.unmount_volume, args=(3,))
    leaving.start()
    leaving.join(0.05)
    scanning = threading.Thread(target=store.load_new_volumes)
    scanning.start()
    scanning.join(0.05)
    assert (tmp_path / "d0" / "3.cpd").exists()
    volume.release()
    leaving.join(10), scanning.join(10)
    assert store.find_volume(3) is not volume and not volume.is_open


def test_a_scan_never_opens_files_that_are_being_closed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two handles on one volume would overwrite each other's records."""
    volume = store.allocate_volume(3, "", PLAIN)
    close, closing, go_on = volume.close_claimed, threading.Event(), threading.Event()

    def slow_close() -> None:
        closing.set()
        go_on.wait(10)
        close()

    monkeypatch.setattr(volume, "close_claimed", slow_close)
    leaving = threading.Thread(target=store.unmount_volume, args=(3,))
    leaving.start()
    assert closing.wait(10) and not store.has_volume(3)
    scanning = threading.Thread(target=store.load_new_volumes)
    scanning.start()
    scanning.join(0.1)
    assert scanning.is_alive() and not store.has_volume(3)
    go_on.set()
    leaving.join(10), scanning.join(10)
    assert store.has_volume(3) and store.find_volume(3) is not volume and not volume.is_open


# -------------------------------------------------------------------------------------------------------------- deletes


def test_delete(store: Store, tmp_path: Path) -> None:
    put(store.allocate_volume(3, "", PLAIN), 1, b"x")
    store.allocate_volume(4, "", PLAIN)
    heard = listen(store)
    with pytest.raises(VolumeNotEmpty, match=r"^DeleteVolume 3: volume not empty$"):
        store.delete_volume(3, only_empty=True)
    assert store.has_volume(3)
    store.write_needle(3, NeedleIn(2, 1, b"still writable"))
    store.delete_volume(4, only_empty=True)
    store.delete_volume(3)
    with pytest.raises(VolumeNotFound, match=r"^delete volume 3 not found on disk$"):
        store.delete_volume(3)
    assert [(kind, info.id) for kind, info in heard] == [("deleted", 4), ("deleted", 3)]
    assert [p.name for p in (tmp_path / "d0").iterdir()] == ["vol_dir.uuid"]


def test_delete_collection(store: Store) -> None:
    for vid, collection in ((1, "a"), (2, "b"), (3, "a"), (4, ""), (5, "a")):
        store.allocate_volume(vid, collection, PLAIN)
    busy = store.find_volume(5)
    assert busy.try_claim("vacuum")
    heard = listen(store)
    store.delete_collection("a")
    assert [v.vid for v in store.volumes()] == [2, 4, 5], "a volume being vacuumed is left, silently"
    assert [info.id for _, info in heard] == [1, 3]
    busy.release()
    store.delete_collection("unknown")
    store.delete_collection("")
    assert [v.vid for v in store.volumes()] == [2, 5]


def test_delete_collection_tells_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config_of(tmp_path / "a", tmp_path / "b")) as store:
        first, second = store.allocate_volume(1, "c", PLAIN), store.allocate_volume(2, "c", PLAIN)
        assert first.disk_id != second.disk_id

        def refuse(only_empty: bool = False, leave: object = None) -> None:
            raise VolumeBusy("volume 1 is compacting")

        monkeypatch.setattr(first, "destroy", refuse)
        with pytest.raises(StorageError, match=r"^volume 1 is compacting; $"):
            store.delete_collection("c")
        assert second.is_open, "further locations are not touched"


def test_a_listener_that_fails_undoes_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fail(kind: str, info: VolumeShortInfo) -> None:
        raise RuntimeError("listener")

    store.subscribe(fail)
    heard = listen(store)
    store.allocate_volume(3, "", PLAIN)
    assert store.has_volume(3) and len(heard) == 1
    assert "telling of new volume 3" in caplog.text


# ------------------------------------------------------------------------------------------- configure, marks, index


def test_configure(store: Store, tmp_path: Path) -> None:
    store.allocate_volume(3, "c", PLAIN)
    store.unmount_volume(3)
    store.configure_volume(3, ReplicaPlacement.parse("010"))
    assert store.mount_volume(3).replica_placement == ReplicaPlacement.parse("010")
    assert (tmp_path / "d0" / "c_3.dat").read_bytes()[1] == 0, "the super block stays as it is"
    store.unmount_volume(3)
    path = tmp_path / "d0" / "c_3.vif"
    info = vif.load(str(path)).info
    assert (info.replication, info.bytes_offset, info.version) == ("010", 4, 3)
    path.chmod(0o444)
    with pytest.raises(StorageError, match=r"^volume 3 failed to save vif: failed to check .* not writable$"):
        store.configure_volume(3, PLAIN)
    path.chmod(0o644)
    path.write_text("{")
    with pytest.raises(StorageError, match=r"^volume 3 failed to load vif: unmarshal error"):
        store.configure_volume(3, PLAIN)
    with pytest.raises(VolumeNotFound, match=r"^volume 9 not found on disk$"):
        store.configure_volume(9, PLAIN)


def test_marks(store: Store) -> None:
    store.allocate_volume(3, "", PLAIN)
    store.mark_readonly(3, can_delete=False, persist=True)
    with pytest.raises(VolumeReadOnly):
        store.write_needle(3, NeedleIn(1, 1, b"x"))
    store.mark_writable(3)
    store.write_needle(3, NeedleIn(1, 1, b"x"))
    for attempt in (lambda: store.mark_readonly(4), lambda: store.mark_writable(4)):
        with pytest.raises(VolumeNotFound, match=r"^volume 4 not found$"):
            attempt()


def test_consolidate_index(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume = create(tmp_path / "d", 3)
    put(volume, 1, b"x")
    volume.close()
    with running(config_of(tmp_path / "d", idx=idx)) as store:
        assert store.find_volume(3).idx_directory == str(tmp_path / "d")
        store.consolidate_index(3)
        store.consolidate_index(3)
        assert (idx / "3.idx").stat().st_size == 16 and not (tmp_path / "d" / "3.idx").exists()
        assert bytes(store.registry.acquire(3).read(1).data) == b"x", "the new handle is the published one"
        store.write_needle(3, NeedleIn(2, 1, b"y"))
        with pytest.raises(VolumeNotFound, match=r"^volume 4 not found on disk$"):
            store.consolidate_index(4)
    with running(config_of(tmp_path / "d", idx=idx)) as store:
        assert data_of(store.find_volume(3), 2) == b"y"


def test_index_of_a_copy_on_another_disk_is_not_overwritten(tmp_path: Path) -> None:
    """Two disks with one directory for indexes: the second copy's lies there already."""
    idx = tmp_path / "idx"
    idx.mkdir()
    first, second = create(tmp_path / "a", 3), create(tmp_path / "b", 3, idx=idx)
    put(first, 1, b"x"), put(second, 2, b"y")
    first.close(), second.close()
    with running(config_of(tmp_path / "a", tmp_path / "b", idx=idx)) as store:
        text = f"^relocate index for volume 3: move .idx: rename {tmp_path}/a/3.idx {idx}/3.idx: file exists$"
        with pytest.raises(StorageError, match=text):
            store.consolidate_index(3)
        copies = [location.find(3) for location in store.locations]
        put(copies[0], 4, b"still writable")
        assert data_of(copies[1], 2) == b"y" and data_of(copies[0], 1) == b"x"


# ------------------------------------------------------------------------------------------------------------ heartbeat


def test_heartbeat_list(tmp_path: Path) -> None:
    with running(config_of(tmp_path / "a", tmp_path / "b")) as store:
        for vid in (4, 3, 2, 1):
            store.allocate_volume(vid, "", PLAIN)
        put(store.find_volume(2), 0x500, b"x")
        infos = store.heartbeat_volumes()
        assert [(info.disk_id, info.id) for info in infos] == [(0, 2), (0, 4), (1, 1), (1, 3)]
        assert store.max_file_key() == 0x500
        store.locations[1].is_unavailable = True
        assert [info.id for info in store.heartbeat_volumes()] == [2, 4]
        store.find_volume(4).close()
        assert [info.id for info in store.heartbeat_volumes()] == [2]


def test_expired_volumes_are_left_out_and_later_destroyed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    volume = store.allocate_volume(3, "", PLAIN, Ttl.parse("30m"))
    put(volume, 1, b"x", last_modified_s=1)
    assert len(store.heartbeat_volumes()) == 1
    heard = listen(store)
    for late_min, listed, destroyed in ((32, True, False), (32, False, False), (34, False, True)):
        if not listed:
            store.volume_size_limit = GIB
        clock.reaches(volume.last_modified_s + late_min * 60 - 30)
        assert len(store.heartbeat_volumes()) == int(listed)
        assert store.has_volume(3) is not destroyed
    assert not list((tmp_path / "d0").glob("3.*"))
    assert heard == [], "the next full list or the departed ones say so"


def test_a_new_volume_of_old_files_is_not_destroyed(store: Store) -> None:
    volume = store.allocate_volume(3, "", PLAIN, Ttl.parse("3d"))
    store.volume_size_limit = GIB
    put(volume, 1, b"x", last_modified_s=1_600_000_000)
    assert len(store.heartbeat_volumes()) == 1
    assert store.has_volume(3)
    assert volume.read_needle(1).data == b"x"


def test_a_heartbeat_never_waits_for_an_unmount(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expired volume whose unmount waits for a vacuum is left for a later heartbeat."""
    clock = Clock(monkeypatch)
    volume = store.allocate_volume(3, "", PLAIN, Ttl.parse("30m"))
    put(volume, 1, b"x", last_modified_s=1)
    store.volume_size_limit = GIB
    assert volume.try_claim("vacuum")
    leaving = threading.Thread(target=store.unmount_volume, args=(3,))
    leaving.start()
    leaving.join(0.05)
    clock.passes(10_000)
    assert store.heartbeat_volumes() == []
    assert volume.is_open
    volume.release()
    leaving.join(10)
    assert not volume.is_open


def test_quarantined_volumes_are_not_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = store.allocate_volume(3, "", PLAIN)
    monkeypatch.setattr(volume, "check_io_health", lambda: False)
    assert store.heartbeat_volumes() == []


BASE = VolumeStatusInfo(5, 8, "cc", 0, 0, 0, False, 1, 3, 771, 0, 1795424088, "", "", "", 0)


def test_digest_vectors() -> None:
    """Values a Go server sent (contract grpc.md 12)."""
    assert report_hash(BASE) == 7754252933588234796
    assert report_hash(replace(BASE, read_only=True)) == 10365280101075984987
    assert report_hash(replace(BASE, remote_storage_key="x", max_file_key=9)) == report_hash(BASE)
    changes = {
        "id": 6,
        "size": 9,
        "collection": "c",
        "file_count": 1,
        "delete_count": 1,
        "deleted_byte_count": 1,
        "replica_placement": 2,
        "version": 2,
        "ttl": 772,
        "compact_revision": 1,
        "modified_at_second": 1,
        "remote_storage_name": "s3.a",
        "disk_type": "ssd",
        "disk_id": 1,
    }
    digests = {report_hash(replace(BASE, **{name: value})) for name, value in changes.items()}
    assert len(digests) == len(changes) and report_hash(BASE) not in digests


def test_auto_sized_maximum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirs = (dir_config(tmp_path / "a", max_volumes=0), dir_config(tmp_path / "b", max_volumes=7))
    with running(Config(dirs)) as store:
        store.allocate_volume(1, "", PLAIN), store.allocate_volume(2, "", PLAIN)
        assert [v.disk_id for v in store.volumes()] == [0, 1]
        free = 10 * GIB
        monkeypatch.setattr(disk_space, "disk_usage", lambda path: DiskUsage(path, 100 * GIB, 0, free))
        assert not store.recompute_auto_max(), "the limit is not known yet"
        store.volume_size_limit = GIB
        assert store.recompute_auto_max()
        # one volume is entitled to a whole GiB less 8 bytes: 9 GiB and 8 bytes are unclaimed
        assert [location.max_volume_count for location in store.locations] == [1 + 9, 7]
        assert not store.recompute_auto_max()
        store.preallocate = True
        assert store.recompute_auto_max()
        assert store.locations[0].max_volume_count == 1 + 10
        free = 0
        store.delete_volume(1)
        assert store.recompute_auto_max()
        assert store.locations[0].max_volume_count == 1, "never less than one"


def test_free_space_of_all_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config_of(tmp_path / "a", tmp_path / "b")) as store:
        monkeypatch.setattr(disk_space, "disk_usage", lambda path: DiskUsage(path, 100, 60, 40, 40.0, 60.0))
        store.check_free_space()
        assert [location.usage.free_bytes for location in store.locations] == [40, 40]


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (ServerState(), b""),
        (ServerState(True, 1), bytes.fromhex("08011001")),
        (ServerState(False, 2), bytes.fromhex("1002")),
        (ServerState(True, 300), bytes.fromhex("080110ac02")),
        (ServerState(False, (1 << 32) - 1), bytes.fromhex("10ffffffff0f")),
    ],
)
def test_state_bytes(value: ServerState, data: bytes) -> None:
    assert state.encode(value) == data
    assert state.decode(data) == value


def test_state_decoding_is_that_of_protobuf() -> None:
    unknown = bytes.fromhex("1a0361626325010203042901020304050607083005")
    assert state.decode(unknown + b"\x08\x01\x10\x02\x10\x03") == ServerState(True, 3)
    for broken in (b"\x08", b"\x10\x80", b"\x1a\x05ab", b"\x0b", b"\x00\x00", b"\x10" + b"\x80" * 11, b"\x25\x01"):
        with pytest.raises(ValueError):
            state.decode(broken)


def test_state_changes(tmp_path: Path) -> None:
    kept = StateFile(str(tmp_path))
    kept.load()
    assert kept.current == ServerState() and not (tmp_path / "state.pb").exists()
    assert kept.update(ServerState(True, 0)) == ServerState(True, 1)
    assert kept.maintenance and kept.version == 1
    assert (tmp_path / "state.pb").read_bytes() == bytes.fromhex("08011001")
    with pytest.raises(StateVersionMismatch) as caught:
        kept.update(ServerState(False, 0))
    assert str(caught.value) == "version mismatch for VolumeServerState (got 1, want 0)"
    with set_points("state.write=error:ENOSPC"), pytest.raises(StorageError) as failed:
        kept.update(ServerState(False, 1))
    assert str(failed.value) == (
        f"failed to write store state to {tmp_path}/state.pb : open {tmp_path}/state.pb: no space left on device"
    )
    assert kept.current == ServerState(True, 1)
    kept.update(ServerState(False, 1))
    again = StateFile(str(tmp_path))
    again.load()
    assert again.current == ServerState(False, 2)
    (tmp_path / "state.pb").unlink()
    (tmp_path / "state.pb").mkdir()
    with pytest.raises(StorageError, match=r"^failed to read store state from .*: is a directory$"):
        again.load()


def test_state_lives_in_the_first_idx_directory(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    with running(config_of(tmp_path / "a", tmp_path / "b", idx=idx)) as store:
        store.state.update(ServerState(True, 0))
    assert (idx / "state.pb").exists()
    with running(config_of(tmp_path / "a", tmp_path / "b", idx=idx)) as store:
        assert store.state.maintenance


# ---------------------------------------------------------------------------------------------------------------- races


def test_readers_and_writers_meet_unmount_and_mount(tmp_path: Path) -> None:
    """No acknowledged write is lost, and nobody sees anything but data, "not found" or "closed"."""
    from pyvolume.errors import VolumeClosed

    with running(config_of(tmp_path)) as store:
        store.allocate_volume(3, "", PLAIN)
        written: list[int] = []
        stop = threading.Event()
        surprises: list[BaseException] = []

        def write() -> None:
            key = 0
            while not stop.is_set():
                key += 1
                try:
                    store.write_needle(3, NeedleIn(key, COOKIE, str(key).encode()))
                    written.append(key)
                except (VolumeNotFound, VolumeClosed):
                    pass
                except BaseException as exc:  # judged by the test's own thread
                    surprises.append(exc)
                    return

        def read() -> None:
            while not stop.is_set():
                for key in written[-5:]:
                    try:
                        assert bytes(store.read_needle(3, key).data) == str(key).encode()
                    except (VolumeNotFound, VolumeClosed):
                        pass
                    except BaseException as exc:  # judged by the test's own thread
                        surprises.append(exc)
                        return

        threads = [threading.Thread(target=target) for target in (write, read, read)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            store.unmount_volume(3)
            store.mount_volume(3)
        stop.set()
        for thread in threads:
            thread.join()
        assert not surprises
        assert written
        for key in written:
            assert bytes(store.read_needle(3, key).data) == str(key).encode()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with running(config) as store:
        put(store.allocate_volume(1, "", PLAIN), 1, b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with running(config) as store:
            store.unmount_volume(1)
            store.mount_volume(1)
            store.allocate_volume(2, "", PLAIN)
            store.delete_volume(2)
    import gc

    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert isinstance(store.registry, engine.Registry)
