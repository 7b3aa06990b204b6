"""A data directory: lock and identity, loading, interrupted vacuums, free space (contract storage.md 7, 11, 17, 22)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from storage_util import COOKIE, config_of, create, data_of, golden, load, put, record, write_index, write_volume

from pyvolume._native import engine
from pyvolume.config import DirConfig, MinFreeSpace
from pyvolume.errors import DirectoryInUse, NativeCode, NeedleDeleted, StorageError
from pyvolume.faults import set_points
from pyvolume.storage import compact_recovery, disk_space, ec_files
from pyvolume.storage.dir_lock import lock_directory, lock_holder, writers_of_volumes
from pyvolume.storage.disk_location import DiskLocation
from pyvolume.storage.disk_space import DiskProbe, DiskUsage
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import Volume
from pyvolume.storage.volume_load import LoadOptions

EC_VIF = '{"ecShardConfig": {"dataShards": 10, "parityShards": 4}}'


@pytest.fixture
def location(tmp_path: Path):
    made = DiskLocation(config_of(tmp_path).dirs[0])
    yield made
    for volume in made.volumes():
        volume.close()
    made.release()


def load_into(location: DiskLocation, **more) -> list[Volume]:
    lock = threading.Lock()

    def take(volume: Volume) -> None:
        with lock:
            location.add(volume)

    location.load_existing(take=take, **more)
    return location.volumes()


# ----------------------------------------------------------------------------------------------------- lock, identity


def test_uuid_is_made_once_and_kept(tmp_path: Path) -> None:
    first = lock_directory(str(tmp_path))
    path = tmp_path / "vol_dir.uuid"
    assert len(first.uuid) == 36 and path.read_text() == first.uuid
    assert path.stat().st_mode & 0o777 == 0o644
    first.release()
    again = lock_directory(str(tmp_path))
    assert again.uuid == first.uuid
    again.release()
    path.write_text("anything, verbatim \n")
    third = lock_directory(str(tmp_path))
    assert third.uuid == "anything, verbatim \n"
    third.release()
    path.write_text("")
    fourth = lock_directory(str(tmp_path))
    assert len(fourth.uuid) == 36 != first.uuid
    fourth.release()


def test_second_process_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    """P4. The holder is a process of its own, as flock does not keep a process from itself."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('ok', flush=True); "
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "vol_dir.uuid")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ok\n"
        with pytest.raises(DirectoryInUse) as caught:
            lock_directory(str(tmp_path))
        assert caught.value.path == str(tmp_path)
        assert caught.value.pid in (holder.pid, 0)
        assert f"data directory {tmp_path} is in use by" in str(caught.value)
        if caught.value.pid:
            assert f"process {holder.pid} " in str(caught.value)
    finally:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait()
    lock_directory(str(tmp_path)).release()


def test_holder_is_found_in_the_kernels_table(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("w") as handle:
        st = os.fstat(handle.fileno())
        assert lock_holder((st.st_dev, st.st_ino)) == 0
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert lock_holder((st.st_dev, st.st_ino)) in (os.getpid(), 0)


def test_the_same_directory_twice_shares_the_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first, second = lock_directory(str(tmp_path)), lock_directory(str(tmp_path / "link"))
    assert first.uuid == second.uuid and first.key == second.key
    first.release()
    first.release()
    probe = (tmp_path / "vol_dir.uuid").open()
    with pytest.raises(BlockingIOError):
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second.release()
    fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    probe.close()


def test_a_process_that_writes_our_volumes_is_refused(tmp_path: Path) -> None:
    """A Go server takes no lock, but it has the .dat files open for writing."""
    create(tmp_path).close()
    code = "import sys; f = open(sys.argv[1], sys.argv[2]); print('ok', flush=True); sys.stdin.read()"
    for mode, refused in (("rb", False), ("r+b", True)):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "3.dat"), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"ok\n"
        try:
            assert list(writers_of_volumes(str(tmp_path))) == ([(other.pid, f"{tmp_path}/3.dat")] if refused else [])
            if refused:
                with pytest.raises(DirectoryInUse) as caught:
                    lock_directory(str(tmp_path))
                assert caught.value.pid == other.pid and f"{tmp_path}/3.dat" in str(caught.value)
        finally:
            other.stdin.close()
            other.wait()
    lock_directory(str(tmp_path)).release()


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StorageError) as caught:
        lock_directory(str(missing))
    assert str(caught.value) == (
        f"cannot generate uuid of dir {missing}: open {missing}/vol_dir.uuid: no such file or directory"
    )


# ------------------------------------------------------------------------------------------------------------ loading


def test_collections_in_file_names(tmp_path: Path, location: DiskLocation) -> None:
    golden("collection", tmp_path)
    volumes = load_into(location)
    assert [(v.vid, v.collection) for v in volumes] == [(7, "photos"), (8, "a-b_c.d"), (9, "")]


def test_one_broken_volume_does_not_harm_the_others(
    tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture
) -> None:
    for vid in (1, 2, 3):
        create(tmp_path, vid).close()
    (tmp_path / "2.dat").write_bytes(b"\xff" * 8)
    (tmp_path / "x.idx").touch()
    (tmp_path / "007.idx").touch()
    (tmp_path / "4.idx").mkdir()
    (tmp_path / "5.dat").write_bytes(SuperBlock().to_bytes())
    (tmp_path / "6.idx").touch()
    assert [v.vid for v in load_into(location)] == [1, 3]
    text = caplog.text
    assert "new volume 2 error Unsupported volume 2 version 255" in text
    assert 'get volume id failed, x, err : strconv.ParseUint: parsing "x": invalid syntax' in text
    assert "get volume id failed, 007" in text
    assert sorted(p.name for p in tmp_path.glob("[56].*")) == ["5.dat", "6.idx"], "nothing made up for lone files"


def test_failing_disk_is_logged_per_volume(
    tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture
) -> None:
    for vid in (1, 2, 3):
        create(tmp_path, vid).close()
    with set_points("load.volume=error:EIO@2"):
        assert len(load_into(location, workers=1)) == 2
    assert caplog.text.count("Input/output error") == 1


def test_loading_again_takes_only_what_is_new(tmp_path: Path, location: DiskLocation) -> None:
    create(tmp_path, 1).close()
    (first,) = load_into(location)
    create(tmp_path, 2).close()
    seen: list[tuple[int, int]] = []
    volumes = load_into(location, progress=lambda done, total: seen.append((done, total)))
    assert [v.vid for v in volumes] == [1, 2] and volumes[0] is first
    assert seen[0] == (0, 2) and seen[1:] == [(1, 0), (1, 0)]


def test_skipped_ids(tmp_path: Path, location: DiskLocation) -> None:
    create(tmp_path, 1).close(), create(tmp_path, 2).close()
    assert [v.vid for v in load_into(location, skip=lambda vid: vid == 1)] == [2]


def test_with_a_separate_idx_directory(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    data = tmp_path / "data"
    create(data, 1, idx=idx).close()
    create(data, 2, idx=idx).close()
    create(data, 3).close()
    (data / "2.vif").unlink()
    location = DiskLocation(config_of(data, idx=idx).dirs[0])
    volumes = load_into(location)
    assert [(v.vid, v.idx_directory) for v in volumes] == [(1, str(idx)), (3, str(data))], (
        "quirk: without .vif and .idx in the data directory a volume is not found"
    )
    for volume in volumes:
        volume.close()


def test_unfinished_copy_is_removed(tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture) -> None:
    create(tmp_path, 3).close()
    create(tmp_path, 4).close()
    (tmp_path / "3.note").write_text("copying from 10.0.0.9:8080")
    assert [v.vid for v in load_into(location)] == [4]
    assert "volume 3 was not completed: copying from 10.0.0.9:8080" in caplog.text
    assert not list(tmp_path.glob("3.*"))


def test_empty_data_of_an_ec_volume_is_swept(tmp_path: Path, location: DiskLocation) -> None:
    (tmp_path / "3.dat").write_bytes(SuperBlock().to_bytes())
    (tmp_path / "3.idx").touch()
    (tmp_path / "3.vif").write_text(EC_VIF)
    create(tmp_path, 4).close()
    assert [v.vid for v in load_into(location)] == [4]
    assert sorted(p.name for p in tmp_path.glob("3.*")) == ["3.vif"]


def test_load_one(tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture) -> None:
    create(tmp_path, 3, "b").close()
    volume = location.load_one(3)
    assert volume is not None and volume.collection == "b"
    volume.close()
    assert location.load_one(4) is None
    assert location.locate(3) == "b_3.idx" and location.locate(33) is None
    (tmp_path / "b_3.dat").write_bytes(b"")
    assert location.load_one(3) is None
    assert f"volume {tmp_path}/b_3.dat not initialized" in caplog.text


# ------------------------------------------------------------------------------------------------- beside EC volumes


def make_ec(directory: Path, dat_bytes: int, *, shard_bytes: int, dat_file_size: int = 0, shards: int = 14) -> None:
    create(directory, 3).close()
    os.truncate(directory / "3.dat", dat_bytes)
    (directory / "3.ecx").write_bytes(b"x" * 16)
    for shard in range(shards):
        path = directory / f"3.ec{shard:02d}"
        path.touch()
        os.truncate(path, shard_bytes)
    (directory / "3.vif").write_text(
        f'{{"datFileSize": "{dat_file_size}", "ecShardConfig": {{"dataShards": 10, "parityShards": 4}}}}'
    )


def test_shards_win_over_the_data_they_were_made_from(tmp_path: Path, location: DiskLocation) -> None:
    make_ec(tmp_path, 4096, shard_bytes=1 << 20, dat_file_size=4096)
    assert load_into(location) == []
    assert (tmp_path / "3.dat").exists() and (tmp_path / "3.ec00").exists()


def test_interrupted_encode_is_removed(tmp_path: Path, location: DiskLocation) -> None:
    make_ec(tmp_path, 8 + 32, shard_bytes=4096)
    write_volume(tmp_path, [record(1, b"abc")])
    write_index(tmp_path, [(1, 8, 8)])
    (volume,) = load_into(location)
    assert data_of(volume, 1) == b"abc"
    assert sorted(p.name for p in tmp_path.glob("3.*")) == ["3.dat", "3.idx", "3.vif"]


def test_data_that_grew_after_the_encode_is_served(
    tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture
) -> None:
    """E5: upstream serves the shards, and the writes since then are gone."""
    make_ec(tmp_path, 8, shard_bytes=1 << 20, dat_file_size=8)
    write_volume(tmp_path, [record(1, b"written after the encode")])
    write_index(tmp_path, [(1, 8, 29)])
    (volume,) = load_into(location)
    assert data_of(volume, 1) == b"written after the encode"
    assert (tmp_path / "3.ecx").exists() and len(list(tmp_path.glob("3.ec[0-9]*"))) == 14
    assert "went on growing after it was erasure coded" in caplog.text


def test_vif_beside_an_ecx_is_no_volume(tmp_path: Path, location: DiskLocation) -> None:
    (tmp_path / "3.vif").write_text(EC_VIF)
    (tmp_path / "3.ecx").write_bytes(b"x")
    (tmp_path / "3.dat").write_bytes(SuperBlock().to_bytes() + record(1, b"x"))
    assert load_into(location, at_startup=False) == []
    assert ec_files.ecx_path(str(tmp_path), str(tmp_path), "3") == f"{tmp_path}/3.ecx"


@pytest.mark.parametrize(
    ("dat_bytes", "shards", "size"),
    [
        (0, 10, 0),
        (1, 10, 1 << 20),
        (10 << 20, 10, 1 << 20),
        ((10 << 20) + 1, 10, 2 << 20),
        ((10 << 30) + 1, 10, (1 << 30) + (1 << 20)),
    ],
)
def test_expected_shard_size(dat_bytes: int, shards: int, size: int) -> None:
    assert ec_files.expected_shard_bytes(dat_bytes, shards) == size


def test_uneven_shards_are_never_thrown_away(tmp_path: Path) -> None:
    make_ec(tmp_path, 8, shard_bytes=4096)
    os.truncate(tmp_path / "3.dat", 40)
    os.truncate(tmp_path / "3.ec05", 8192)
    assert ec_files.claim(str(tmp_path), str(tmp_path), "3") == "shards"


# ------------------------------------------------------------------------------------------------ interrupted vacuums


def vacuumed(directory: Path, *, revision: int = 1, older: bool = False, keep: tuple[int, ...] = (1, 3)) -> None:
    """A volume with keys 1 and 3 live and 2 deleted, and what a vacuum makes of it, not yet committed."""
    volume = create(directory, 3)
    for key in (1, 2, 3):
        put(volume, key, f"data {key}".encode())
    volume.delete_needle(2, COOKIE)
    kept = [(key, volume.read_needle(key)) for key in (1, 2, 3) if key in keep]
    volume.close()
    content, rows = bytearray(SuperBlock(compaction_revision=revision).to_bytes()), []
    for key, needle in kept:
        rows.append((key, len(content), needle.size))
        with (directory / "3.dat").open("rb") as old:
            old.seek(needle.entry_offset)
            content += old.read(-(-(16 + needle.size + 12 + 1) // 8) * 8)
    (directory / "3.cpd").write_bytes(content)
    write_index(directory, rows, vid=3)  # over .idx for a moment
    (directory / "3.cpx").write_bytes((directory / "3.idx").read_bytes())
    live = [(key, offset, size) for key, offset, size in old_rows(directory)]
    write_index(directory, live)
    stamp = time.time()
    os.utime(directory / "3.dat", (stamp, stamp)), os.utime(directory / "3.idx", (stamp, stamp))
    shift = -10 if older else 10
    os.utime(directory / "3.cpx", (stamp + shift, stamp + shift))
    (directory / "3.ldb").mkdir()
    (directory / "3.rdb").touch()


def old_rows(directory: Path) -> list[tuple[int, int, int]]:
    """The log of vacuumed()'s volume, from its data."""
    from pyvolume._native import engine

    with (directory / "3.dat").open("rb") as handle:
        records, _ = engine.dat_scan(handle.fileno(), 3, 8, 0, True)
    return [(r.id, r.offset, r.size if r.size else -1) for r in records]


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("3.*"))


def check_contents(directory: Path, revision: int) -> None:
    volume = load(directory, 3, repair=False)
    assert not volume.is_read_only
    assert volume.compaction_revision == revision
    assert data_of(volume, 1) == b"data 1" and data_of(volume, 3) == b"data 3"
    volume.close()


def recover(directory: Path, **more) -> None:
    compact_recovery.recover(str(directory), str(directory), "3", **more)


def test_rollback_of_a_vacuum_without_a_marker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vacuumed(tmp_path, older=True)
    with caplog.at_level(logging.INFO):
        recover(tmp_path)
    assert names(tmp_path) == ["3.dat", "3.idx", "3.vif"]
    assert "rolling back orphan compaction file" in caplog.text and "written to after it" in caplog.text
    check_contents(tmp_path, 0)


@pytest.mark.parametrize("damage", ["no index", "cut data", "short data", "ragged index", "a flipped bit"])
def test_rollback_of_half_a_vacuum(tmp_path: Path, damage: str) -> None:
    vacuumed(tmp_path)
    if damage == "no index":
        (tmp_path / "3.cpx").unlink()
    elif damage == "cut data":
        os.truncate(tmp_path / "3.cpd", (tmp_path / "3.cpd").stat().st_size - 8)
    elif damage == "short data":
        os.truncate(tmp_path / "3.cpd", 5)
    elif damage == "a flipped bit":
        content = bytearray((tmp_path / "3.cpd").read_bytes())
        content[8 + 16 + 4] ^= 1
        (tmp_path / "3.cpd").write_bytes(content)
    else:
        with (tmp_path / "3.cpx").open("ab") as handle:
            handle.write(b"x")
    recover(tmp_path)
    assert names(tmp_path) == ["3.dat", "3.idx", "3.vif"]
    check_contents(tmp_path, 0)


def test_disk_that_fails_while_a_compaction_is_judged_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk was taken for damage, and the result of an offline compact removed for it."""
    vacuumed(tmp_path)
    before = names(tmp_path)

    def fail(*_args: object) -> int:
        raise engine.NativeError(NativeCode.ESYS, engine.NativeInfo(NativeCode.ESYS, errno.EIO, 0, 0, 0, 0))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "dat_walk", fail)
        with pytest.raises(engine.NativeError):
            recover(tmp_path)
    assert names(tmp_path) == before
    recover(tmp_path)
    check_contents(tmp_path, 1)


@pytest.mark.parametrize("done", [(), ("3.cpd",), ("3.cpd", "3.cpx")])
def test_commit_goes_on_where_it_stopped(tmp_path: Path, done: tuple[str, ...]) -> None:
    """After the marker is durable any of the renames may have happened."""
    vacuumed(tmp_path, older=True)
    (tmp_path / "3.cpc").touch()
    (tmp_path / "3.cpldb").mkdir()
    for name in done:
        (tmp_path / name).rename(tmp_path / name.replace("cp", "").replace("3.d", "3.dat").replace("3.x", "3.idx"))
    recover(tmp_path)
    check_contents(tmp_path, 1)
    expected = ["3.dat", "3.idx", "3.vif"]
    assert [n for n in names(tmp_path) if n not in ("3.ldb", "3.rdb")] == expected
    assert len(done) == 2 or names(tmp_path) == expected


@pytest.mark.parametrize("point", ["recover.rename_dat", "recover.rename_idx", "recover.remove_marker"])
def test_crash_in_the_recovery_is_recovered(tmp_path: Path, point: str) -> None:
    vacuumed(tmp_path)
    (tmp_path / "3.cpc").touch()
    with set_points(f"{point}=error:EIO"), pytest.raises(OSError, match="failpoint"):
        recover(tmp_path)
    recover(tmp_path)
    assert names(tmp_path) == ["3.dat", "3.idx", "3.vif"]
    check_contents(tmp_path, 1)


def test_result_of_an_offline_compact_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """P3: upstream deletes it at the next start."""
    vacuumed(tmp_path)
    with caplog.at_level(logging.INFO):
        recover(tmp_path)
    assert names(tmp_path) == ["3.dat", "3.idx", "3.vif"]
    assert "committing the finished compaction" in caplog.text
    check_contents(tmp_path, 1)
    volume = load(tmp_path, 3)
    with pytest.raises(Exception, match="not found"):
        volume.read_needle(2)
    volume.close()


@pytest.mark.parametrize(("revision", "keep"), [(5, (1, 3)), (1, (1,))])
def test_compaction_that_does_not_fit_is_kept_aside(tmp_path: Path, revision: int, keep: tuple[int, ...]) -> None:
    vacuumed(tmp_path, revision=revision, keep=keep)
    cpd = (tmp_path / "3.cpd").read_bytes()
    recover(tmp_path)
    assert [n for n in names(tmp_path) if "kept" in n] == ["3.cpd.kept", "3.cpx.kept"]
    assert (tmp_path / "3.cpd.kept").read_bytes() == cpd
    check_contents(tmp_path, 0)
    recover(tmp_path)
    assert (tmp_path / "3.cpd.kept").read_bytes() == cpd


def test_leftover_map_of_a_vacuum_goes(tmp_path: Path) -> None:
    """L6: upstream opens it again at the next vacuum and brings deleted keys back."""
    vacuumed(tmp_path, older=True)
    (tmp_path / "3.cpldb").mkdir()
    recover(tmp_path, repair=False)
    assert (tmp_path / "3.cpldb").exists(), "upstream's behaviour on request"
    (tmp_path / "3.cpd").touch()
    recover(tmp_path)
    assert not (tmp_path / "3.cpldb").exists()


def test_index_of_a_vacuum_beside_the_data_is_found(tmp_path: Path) -> None:
    """Upstream looks in the idx directory only and leaves new data with the old index."""
    idx = tmp_path / "idx"
    idx.mkdir()
    vacuumed(tmp_path)
    (tmp_path / "3.cpc").touch()
    compact_recovery.recover(str(tmp_path), str(idx), "3")
    assert names(tmp_path) == ["3.dat", "3.idx", "3.vif"] and not list(idx.iterdir())
    check_contents(tmp_path, 1)


def test_directory_pass_recovers_but_leaves_loaded_volumes_alone(tmp_path: Path, location: DiskLocation) -> None:
    vacuumed(tmp_path, older=True)
    (volume,) = load_into(location)
    assert not (tmp_path / "3.cpd").exists()
    with pytest.raises(NeedleDeleted):
        volume.read_needle(2)
    (tmp_path / "3.cpd").write_bytes(b"a vacuum that runs now")
    load_into(location)
    assert (tmp_path / "3.cpd").exists()


def test_recovery_that_fails_is_logged(
    tmp_path: Path, location: DiskLocation, caplog: pytest.LogCaptureFixture
) -> None:
    vacuumed(tmp_path)
    (tmp_path / "3.cpc").touch()
    with set_points("recover.rename_dat=error:EIO"):
        load_into(location)
    assert "volume 3: reconcile interrupted compaction failed" in caplog.text
    assert (tmp_path / "3.cpd").exists()


# --------------------------------------------------------------------------------------------------------------- space


GIB = 1 << 30


@pytest.mark.parametrize(
    ("reserve", "free", "low", "words", "available"),
    [
        (MinFreeSpace(1.0, 0), GIB, True, "disk free 0.98% < required 1.00%", 0),
        (MinFreeSpace(1.0, 0), 2 * GIB, False, "disk free 1.95% >= required 1.00%", None),
        (MinFreeSpace(None, 3 * GIB // 2), GIB, True, "disk free 1.00 GiB < required 1.50 GiB", 0),
        (MinFreeSpace(None, 512 << 20), GIB, False, "disk free 1.00 GiB >= required 512.00 MiB", 512 << 20),
        (MinFreeSpace(0.0, 0), 0, False, "disk free 0.00% >= required 0.00%", 0),
    ],
)
def test_reserve(reserve: MinFreeSpace, free: int, low: bool, words: str, available: int | None) -> None:
    total = 102 * GIB + GIB // 2
    usage = DiskUsage("/d", total, total - free, free, free / total * 100, 0.0)
    assert disk_space.is_low(reserve, usage) == (low, words)
    found = disk_space.available_bytes(reserve, usage)
    assert found == available if available is not None else 0 < found < free


def test_human_sizes() -> None:
    assert [disk_space.human_bytes(n) for n in (0, 1023, 1024, 1536, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 KiB",
        "5.00 TiB",
    ]


def test_figures_of_a_real_disk(tmp_path: Path) -> None:
    usage = disk_space.disk_usage(str(tmp_path))
    assert usage.all_bytes == usage.used_bytes + usage.free_bytes > 0
    assert abs(usage.percent_free + usage.percent_used - 100) < 0.001


def usage_of(free: int) -> DiskUsage:
    return DiskUsage("/d", 100 * GIB, 100 * GIB - free, free, free / GIB, 0.0)


def test_low_disk_makes_its_volumes_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    location = DiskLocation(DirConfig(str(tmp_path), "", min_free=MinFreeSpace(None, 10 * GIB), max_volumes=7))
    volume = create(tmp_path)
    location.add(volume)
    free = 20 * GIB
    monkeypatch.setattr(disk_space, "disk_usage", lambda path: usage_of(free))
    assert not location.check_free_space()
    assert (location.is_low, location.effective_max, location.available_bytes) == (False, 7, 10 * GIB)
    assert location.can_take_volume()
    free = 5 * GIB
    with caplog.at_level(logging.INFO):
        assert location.check_free_space()
    assert location.is_low and volume.is_read_only and not location.can_take_volume()
    assert location.effective_max == 1, "only the slots in use"
    assert "disk free 5.00 GiB < required 10.00 GiB" in caplog.text
    assert not location.check_free_space()
    free = 11 * GIB
    assert location.check_free_space() and not volume.is_read_only
    put(volume, 1, b"room again")
    volume.close()


def test_dead_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = DiskLocation(config_of(tmp_path).dirs[0])
    answer: list[DiskUsage | OSError] = [usage_of(GIB)]

    def figures(path: str) -> DiskUsage:
        if isinstance(answer[0], OSError):
            raise answer[0]
        return answer[0]

    monkeypatch.setattr(disk_space, "disk_usage", figures)
    location.check_free_space()
    answer[0] = OSError(errno.EIO, "x")
    for _ in range(4):
        location.check_free_space()
    assert not location.is_unavailable, "four failures are forgiven"
    location.check_free_space()
    assert location.is_unavailable and not location.can_take_volume()
    assert location.usage.error == "disk health check failed: statfs: input/output error"
    assert location.usage.free_bytes == GIB, "the last good figures stay"
    answer[0] = usage_of(2 * GIB)
    for _ in range(4):
        location.check_free_space()
    assert location.is_unavailable
    location.check_free_space()
    assert not location.is_unavailable and location.usage.free_bytes == 2 * GIB


def test_hanging_disk_does_not_hang_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    calls = []

    def hang(path: str) -> DiskUsage:
        calls.append(path)
        go_on.wait(20)
        return usage_of(GIB)

    monkeypatch.setattr(disk_space, "disk_usage", hang)
    probe = DiskProbe(str(tmp_path), timeout_s=0.01)
    for _ in range(5):
        probe.check()
    assert probe.error in (
        "disk health check failed: statfs: statfs still in progress",
        "disk health check failed: statfs: statfs timeout",
    )
    assert len(calls) == 1, "no second thread goes after the first"
    go_on.set()


def test_slots(tmp_path: Path) -> None:
    location = DiskLocation(config_of(tmp_path, max_volumes=3).dirs[0], options=LoadOptions())
    volume = create(tmp_path)
    location.add(volume)
    assert (location.volume_count, location.local_volume_count, location.free_slots) == (1, 1, 2)
    location.pending_creations = 2
    assert not location.can_take_volume()
    location.pending_creations = 0
    location.max_volume_count = 0
    assert location.can_take_volume() and location.free_slots == -1
    location.max_volume_count = -5
    assert not location.can_take_volume() and location.effective_max == 0
    assert location.unused_bytes(1000) == 1000 - 8
    volume.set_read_only()
    assert location.unused_bytes(1000) == 0
    assert location.remove(volume) and not location.remove(volume)
    volume.close()
