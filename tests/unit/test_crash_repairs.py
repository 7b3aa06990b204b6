"""Bugs that the crash traces and fault walks of tests/crash found, each with the smallest case that shows it."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from storage_util import COOKIE, config_of, create, data_of, load, put, record, rows_in, write_index, write_volume

from pyvolume import faults
from pyvolume._native import engine
from pyvolume._native.compact import Compaction
from pyvolume.errors import CorruptNeedle, DiskError, NeedleNotFound, StorageError, VolumeReadOnly
from pyvolume.storage import compact, compact_recovery, index_files, volume_load
from pyvolume.storage.disk_location import DiskLocation
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import NeedleIn, Volume

ROW = 16


def filled(directory: Path, keys: range = range(1, 9)) -> Volume:
    volume = create(directory)
    for key in keys:
        put(volume, key, b"data %d" % key)
    return volume


def put_synced(volume: Volume, key: int, data: bytes) -> engine.WriteResult:
    return volume.write_needle(NeedleIn(key, COOKIE, data, 0x0E, last_modified_s=1_700_000_000), fsync=True)


def make_newer(path: Path) -> None:
    """Surely written after everything else, whatever the clock of the file system can tell apart."""
    later_ns = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later_ns, later_ns))


def absent(volume: Volume, key: int) -> bool:
    try:
        volume.read_needle(key)
    except NeedleNotFound:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------- at load


def test_hole_in_index_hides_no_needle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A page of .idx that a power cut lost, with later rows behind it: only the end of the index was looked at."""
    filled(tmp_path).close()
    idx = tmp_path / "3.idx"
    rows = idx.read_bytes()
    idx.write_bytes(rows[: 2 * ROW] + bytes(3 * ROW) + rows[5 * ROW :])
    with caplog.at_level(logging.INFO):
        volume = load(tmp_path, 3)
    assert [data_of(volume, key) for key in range(1, 9)] == [b"data %d" % key for key in range(1, 9)]
    assert not volume.is_read_only and absent(volume, 0)
    assert "3 rows of zeros" in caplog.text and "the first is row 2" in caplog.text
    assert len((tmp_path / f"3.idx.torn-{2 * ROW}").read_bytes()) == len(rows)
    volume.close()
    caplog.clear()
    load(tmp_path, 3).close()
    assert "rows of zeros" not in caplog.text


def test_hole_in_index_stays_with_repair_off(tmp_path: Path) -> None:
    filled(tmp_path).close()
    idx = tmp_path / "3.idx"
    rows = idx.read_bytes()
    idx.write_bytes(rows[: 2 * ROW] + bytes(3 * ROW) + rows[5 * ROW :])
    before = idx.read_bytes()
    load(tmp_path, 3, repair=False).close()
    assert idx.read_bytes() == before


def test_hole_that_cannot_be_mended_makes_read_only(tmp_path: Path) -> None:
    """Else needles that the hole hides could be written anew as if they had never been."""
    filled(tmp_path).close()
    idx = tmp_path / "3.idx"
    rows = idx.read_bytes()
    idx.write_bytes(rows[: 2 * ROW] + bytes(3 * ROW) + rows[5 * ROW :])
    with faults.set_points("index.rename=error:EIO"):
        volume = load(tmp_path, 3)
    assert volume.is_read_only
    volume.close()
    volume = load(tmp_path, 3)
    assert not volume.is_read_only and data_of(volume, 4) == b"data 4"
    volume.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_cut_in_last_padding_is_filled_up(tmp_path: Path, indexed: bool) -> None:
    """A kill in the middle of the append of a delete left a volume read-only."""
    volume = filled(tmp_path)
    volume.delete_needle(5, COOKIE, volume.read_needle(5).checksum)
    volume.close()
    dat, idx = tmp_path / "3.dat", tmp_path / "3.idx"
    whole = dat.read_bytes()
    dat.write_bytes(whole[:-3])
    if not indexed:
        idx.write_bytes(idx.read_bytes()[:-ROW])
    volume = load(tmp_path, 3)
    assert not volume.is_read_only and absent(volume, 5)
    volume.close()
    assert dat.read_bytes() == whole


def test_zeros_and_half_a_header_are_no_needle(tmp_path: Path) -> None:
    """Behind a hole in .dat, the end of one record read as a header gave an empty file with id 0."""
    records = [record(1, b"first"), bytes(40) + (1 << 40).to_bytes(8, "big") + bytes(16), record(2, b"second" * 9)]
    offsets = write_volume(tmp_path, records)
    write_index(tmp_path, [(1, offsets[0], engine.parse_needle(records[0], 3).size)])
    volume = load(tmp_path, 3)
    assert data_of(volume, 1) == b"first"
    assert [row.key for row in volume.handle.entries(10)] in ([1], [1, 2])
    volume.close()


def test_delete_of_a_lost_needle_is_no_empty_file(tmp_path: Path) -> None:
    """A record without data but with a checksum is a delete, also if what it deletes was lost with its page."""
    volume = create(tmp_path)
    put(volume, 1, b"stays")
    begin = volume.dat_bytes
    put(volume, 2, b"lost" * 20)
    end = volume.dat_bytes
    volume.delete_needle(2, COOKIE, volume.read_needle(2).checksum)
    volume.close()
    dat, idx = tmp_path / "3.dat", tmp_path / "3.idx"
    content = bytearray(dat.read_bytes())
    content[begin + 20 : end - 12] = bytes(end - begin - 32)  # the header stays, its data is gone
    dat.write_bytes(content)
    idx.write_bytes(idx.read_bytes()[:ROW])
    volume = load(tmp_path, 3)
    assert data_of(volume, 1) == b"stays"
    assert absent(volume, 2)
    assert rows_in(idx)[-1][2] == -1
    volume.close()


def test_body_of_zeros_is_no_empty_file(tmp_path: Path) -> None:
    """A lost page behind a header: no data, so no checksum was compared, and a GET gave 200 with nothing."""
    volume = filled(tmp_path)
    entry = volume.lookup(3)
    volume.close()
    dat = tmp_path / "3.dat"
    content = bytearray(dat.read_bytes())
    end = entry.offset + engine.needle_record_len(entry.size, 3)
    content[entry.offset + 16 : end] = bytes(end - entry.offset - 16)
    dat.write_bytes(content)
    volume = load(tmp_path, 3)
    with pytest.raises(CorruptNeedle):
        volume.read_needle(3)
    assert data_of(volume, 4) == b"data 4"
    volume.close()


def test_empty_file_is_still_indexed_as_one(tmp_path: Path) -> None:
    volume = filled(tmp_path)
    put(volume, 20, b"")
    volume.close()
    idx = tmp_path / "3.idx"
    idx.write_bytes(idx.read_bytes()[:-ROW])
    volume = load(tmp_path, 3)
    assert volume.read_needle(20).empty
    volume.close()


def test_new_volume_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The super block was written but not flushed: a created volume could come back as `not initialized`."""
    order: list[str] = []
    sync, save = engine.Volume.sync, volume_load._save_first_info

    def noted_sync(handle: engine.Volume) -> None:
        order.append("data")
        sync(handle)

    def noted_save(volume: Volume) -> None:
        order.append("info")
        save(volume)

    monkeypatch.setattr(engine.Volume, "sync", noted_sync)
    monkeypatch.setattr(volume_load, "_save_first_info", noted_save)
    create(tmp_path).close()
    assert order == ["data", "info"]


@pytest.mark.parametrize("lost", range(2, 8))
@pytest.mark.parametrize("bytes_lost", [24, 100, 4000])
def test_holes_in_index_and_data_hide_no_needle(tmp_path: Path, lost: int, bytes_lost: int) -> None:
    """After a failed flush of each of them, days apart, a power cut. Rows behind the one were dropped, and records
    behind the other not found without them: flushed ones, too, were cut off as half a record."""
    volume = create(tmp_path)
    data = {key: b"data %d" % key * (400 + key) for key in range(1, 9)}
    for key, body in data.items():
        put(volume, key, body)
    volume.delete_needle(1, COOKIE)
    volume.close()
    rows = rows_in(tmp_path / "3.idx")
    with (tmp_path / "3.idx").open("r+b") as idx:
        idx.seek(ROW)
        idx.write(bytes(ROW))
    with (tmp_path / "3.dat").open("r+b") as dat:
        dat.seek(rows[lost - 1][1] + 8)
        dat.write(bytes(bytes_lost))
    gone = {key for key, offset, _ in rows[:8] if rows[lost - 1][1] <= offset < rows[lost - 1][1] + 8 + bytes_lost}
    for _ in range(2):
        volume = load(tmp_path, 3)
        assert not volume.is_read_only
        for key, body in data.items():
            if key in gone or key == 1:
                assert absent(volume, key)
            else:
                assert data_of(volume, key) == body
        volume.close()
    assert not list(tmp_path.glob("3.torn-*"))


@pytest.mark.parametrize("behind", [b"", bytes(16), bytes(48)], ids=["the last", "a row of zeros", "three"])
def test_half_a_row_deletes_no_needle(tmp_path: Path, behind: bytes) -> None:
    """A write of a row broke off behind the key, and the power went before what took it back was on the disk: a key
    with zeros for a place reads as a delete, and a flushed needle was gone."""
    filled(tmp_path).close()
    with (tmp_path / "3.idx").open("ab") as idx:
        idx.write((4).to_bytes(8, "big") + bytes(8) + behind)
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert [data_of(volume, key) for key in range(1, 9)] == [b"data %d" % key for key in range(1, 9)]
    assert len(rows_in(tmp_path / "3.idx")) == 8
    assert len((tmp_path / "3.idx.torn-128").read_bytes()) == 144 + len(behind)
    volume.close()


def test_half_a_row_before_others_deletes_no_needle(tmp_path: Path) -> None:
    filled(tmp_path).close()
    whole = (tmp_path / "3.idx").read_bytes()
    half = (2).to_bytes(8, "big") + bytes(8)
    (tmp_path / "3.idx").write_bytes(whole[: 5 * ROW] + half + whole[5 * ROW :])
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert [data_of(volume, key) for key in range(1, 9)] == [b"data %d" % key for key in range(1, 9)]
    assert (tmp_path / "3.idx").read_bytes() == whole
    volume.close()


def test_deletes_of_old_releases_are_no_halves(tmp_path: Path) -> None:
    """They wrote a size of 0 for one."""
    offsets = write_volume(
        tmp_path, [record(1, b"one", version=2), record(2, b"two", version=2)], block=SuperBlock(version=2)
    )
    write_index(tmp_path, [(1, offsets[0], 8), (2, offsets[1], 8), (1, 0, 0)])
    before = (tmp_path / "3.idx").read_bytes()
    volume = load(tmp_path, 3)
    assert absent(volume, 1) and data_of(volume, 2) == b"two"
    assert (tmp_path / "3.idx").read_bytes() == before
    volume.close()


@pytest.mark.parametrize("deletes", [False, True], ids=["write", "delete"])
@pytest.mark.parametrize("lost", ["begin", "end"])
@pytest.mark.parametrize("page", range(1, 17))
def test_row_across_the_end_of_a_page(tmp_path: Path, page: int, lost: str, deletes: bool) -> None:
    """Rows of 17 bytes: of one that lies on two pages only one was on the disk after a power cut. Half of it said that
    a key was deleted, was empty, or stood under another name; a flushed needle behind it was not found."""
    boundary = page * 4096
    number, kept = divmod(boundary, 17)
    keys = [key << 56 | key for key in range(1, 9)]
    volume = create(tmp_path, width=5)
    for _ in range(number - len(keys)):
        put(volume, 1, b"%d" % volume.idx_bytes)
    for key in keys:
        put(volume, key, b"data %x" % key)
    data = {key: b"data %x" % key for key in keys}
    assert volume.idx_bytes == number * 17
    if deletes:  # the row in question
        volume.delete_needle(keys[0], COOKIE, volume.read_needle(keys[0]).checksum)
        del data[keys[0]]
    else:
        data[keys[0]] = b"newer"
        put(volume, keys[0], data[keys[0]])
    if lost == "begin":
        data[keys[1]] = b"newer, too"
        put(volume, keys[1], data[keys[1]])
    volume.close()
    index = bytearray((tmp_path / "3.idx").read_bytes())
    if lost == "begin":
        index[number * 17 : boundary] = bytes(kept)
    else:
        index[boundary:] = bytes(len(index) - boundary)
    (tmp_path / "3.idx").write_bytes(index)
    for _ in range(2):
        volume = load(tmp_path, 3)
        assert not volume.is_read_only
        assert {key: data_of(volume, key) for key in data} == data
        assert not deletes or absent(volume, keys[0])
        found = {row.key for row in volume.handle.entries(1024) if row.size >= 0}
        assert found == data.keys() | {1}
        volume.close()
    assert len(list(tmp_path.glob("3.idx.torn-*"))) <= 1


def test_rows_that_were_on_the_disk_long_before_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start read 256 records for every volume of 17-byte rows, each a move of the head of a cold disk."""
    times_s = [0] * 241 * 6 + [3600] * 241 * 2
    records = [record(n, b"abc", append_at_ns=(1 << 60) + at_s * 10**9) for n, at_s in enumerate(times_s, 1)]
    offsets = write_volume(tmp_path, records)
    size = int.from_bytes(records[0][12:16], "big")
    write_index(tmp_path, [(n, offset, size) for n, offset in enumerate(offsets, 1)], width=5)
    looked_at: list[int] = []
    lacks_begin = index_files._lacks_begin

    def counting(dat_fd: int, idx_fd: int, width: int, number: int, missing: int) -> bool:
        looked_at.append(number)
        return lacks_begin(dat_fd, idx_fd, width, number, missing)

    monkeypatch.setattr(index_files, "_lacks_begin", counting)
    with (tmp_path / "3.dat").open("rb") as dat, (tmp_path / "3.idx").open("rb") as idx:
        found = index_files.torn_row(dat.fileno(), idx.fileno(), width=5, block=SuperBlock(), end_row=len(records))
    assert found is None
    assert 2 <= len(looked_at) <= 3  # two ends of pages in the last hour, one before it
    assert len(times_s) * 17 // 4096 == 8


def test_needles_under_another_key_stay_across_pages(tmp_path: Path) -> None:
    """A blob may be written under another key than its own: such a row is whole, wherever it lies."""
    volume = create(tmp_path, width=5)
    for number in range(16 * 241):
        volume.write_blob(1 << 40 | number, 8, record(number % 7, b"abc"))
    volume.close()
    before = (tmp_path / "3.idx").read_bytes()
    volume = load(tmp_path, 3)
    assert volume.file_count == 16 * 241 and not volume.is_read_only
    assert (tmp_path / "3.idx").read_bytes() == before
    volume.close()


# -------------------------------------------------------------------------------------------------------------- vacuum


def test_marker_that_stayed_does_not_commit_the_next_copy(tmp_path: Path) -> None:
    """A crash during the next vacuum would have put a half-made copy in place of the volume."""
    volume = filled(tmp_path)
    assert compact.compact(volume) is not None
    with faults.set_points("compact.remove_marker=error:EIO"):
        assert compact.commit(volume)
    assert (tmp_path / "3.cpc").exists()
    assert compact.compact(volume) is not None
    assert not (tmp_path / "3.cpc").exists()
    volume.close()


def test_no_change_behind_a_marker_that_may_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Making the marker failed, and so did taking it back; what was written then, flushed or not, was in none of the
    files that the next start would have put in place."""
    volume = filled(tmp_path)
    assert compact.compact(volume) is not None
    stat = Compaction.stat

    def failing(copy: Compaction) -> None:
        (tmp_path / "3.cpc").touch()
        volume.handle.set_readonly(True, True)  # as the engine does
        raise engine.NativeError(-1000, engine.NativeInfo(-1000, errno.EIO, 0, 0, 0, 0))

    with monkeypatch.context() as patch, faults.set_points("compact.settle_marker=error:EIO"):
        patch.setattr(Compaction, "commit", failing)
        patch.setattr(Compaction, "stat", lambda copy: stat(copy)._replace(marker_left=1))
        with pytest.raises(DiskError):
            compact.commit(volume)
    assert "a marker of a commit that failed is left, it is read only until a vacuum can remove it" in caplog.text
    assert volume.is_read_only and (tmp_path / "3.cpc").exists() and not (tmp_path / "3.cpd").exists()
    volume.refresh_read_only()
    volume.set_writable()
    for attempt in (lambda: put_synced(volume, 30, b"late"), lambda: volume.delete_needle(1, COOKIE)):
        with pytest.raises(VolumeReadOnly):
            attempt()
    assert data_of(volume, 1) == b"data 1"
    assert compact.compact(volume) is not None
    assert not volume.is_read_only and not (tmp_path / "3.cpc").exists()
    put(volume, 30, b"late")
    volume.delete_needle(1, COOKIE)
    assert compact.commit(volume)
    assert data_of(volume, 30) == b"late" and absent(volume, 1)
    volume.close()


def test_files_of_two_vacuums_are_not_opened_together(tmp_path: Path) -> None:
    """Where the renames of a commit are not all made, the names belong to files that do not belong together."""
    volume = filled(tmp_path)
    volume.swap_unfinished = True
    (tmp_path / "idx").mkdir()
    with pytest.raises(StorageError, match="the files of its last vacuum are not all in place"):
        volume.relocate_index(str(tmp_path / "idx"))
    put(volume, 30, b"late")
    assert volume.idx_path == f"{tmp_path}/3.idx" and not list((tmp_path / "idx").iterdir())
    volume.swap_unfinished = False
    volume.close()


def test_half_an_append_does_not_become_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was left where the disk refused to cut it off. A handle opened anew, to move the index, began behind it: for a
    later repair the records ended there."""
    volume = filled(tmp_path)
    (tmp_path / "idx").mkdir()
    for path in (tmp_path / "3.dat", tmp_path / "3.idx"):
        size = path.stat().st_size
        with path.open("ab") as file:
            file.write(b"half an append")
        with pytest.raises(StorageError, match=rf"half an append cannot be cut off {path} at {size}$"):
            volume.relocate_index(str(tmp_path / "idx"))
        os.truncate(path, size)
        put(volume, 30, b"goes on")
    assert not list((tmp_path / "idx").iterdir())
    volume.relocate_index(str(tmp_path / "idx"))
    put(volume, 31, b"goes on")
    volume.close()


def test_a_failed_flush_is_not_forgotten_when_the_files_are_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same data with fsync was answered as there, though the disk had lost it and only the page cache had not."""
    volume = filled(tmp_path)
    (tmp_path / "idx").mkdir()
    assert not volume.stat().flush_failed
    stat = engine.Volume.stat
    with monkeypatch.context() as patch:
        patch.setattr(engine.Volume, "stat", lambda handle: replace(stat(handle), flush_failed=True))
        volume.relocate_index(str(tmp_path / "idx"))
    assert volume.stat().flush_failed
    assert not put_synced(volume, 1, b"data 1").unchanged
    assert put(volume, 1, b"data 1").unchanged
    assert compact.compact(volume) is not None and compact.commit(volume)
    assert not volume.stat().flush_failed, "all of the new files was flushed"
    volume.close()


def test_swap_with_a_failed_rename_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next vacuum removed .cpx, which was the only name of the index that the volume was using."""
    volume = filled(tmp_path)
    put(volume, 1, b"newer")
    assert compact.compact(volume) is not None
    commit, rename = Compaction.commit, os.rename
    cut_off = True

    def half_done(copy: Compaction) -> engine.NativeInfo:
        assert commit(copy) is None
        rename(tmp_path / "3.idx", tmp_path / "3.cpx")  # as if the second rename had failed
        (tmp_path / "3.idx").write_bytes(b"")
        return engine.NativeInfo(0, errno.EIO, 0, 0, 0, 0)

    def failing(source: str, target: str) -> None:
        if cut_off and str(source).endswith(".cpx"):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with monkeypatch.context() as patch:
        patch.setattr(Compaction, "commit", half_done)
        assert compact.commit(volume)
    assert (tmp_path / "3.cpc").exists() and (tmp_path / "3.cpx").exists()
    with pytest.raises(DiskError):
        compact.compact(volume)
    assert (tmp_path / "3.cpx").exists()
    cut_off = False
    assert compact.compact(volume) is not None
    assert compact.commit(volume)
    assert not (tmp_path / "3.cpc").exists()
    put(volume, 30, b"after")
    volume.close()
    volume = load(tmp_path, 3)
    assert (data_of(volume, 1), data_of(volume, 8), data_of(volume, 30)) == (b"newer", b"data 8", b"after")
    volume.close()


def test_mount_finishes_a_decided_swap(tmp_path: Path) -> None:
    """Only a start of the server did: a mount served new data with the old index."""
    volume = filled(tmp_path)
    volume.delete_needle(2, COOKIE, volume.read_needle(2).checksum)
    assert compact.compact(volume) is not None
    volume.close()
    (tmp_path / "3.cpc").touch()
    os.rename(tmp_path / "3.cpd", tmp_path / "3.dat")
    location = DiskLocation(config_of(tmp_path).dirs[0])
    mounted = location.load_one(3)
    assert mounted is not None and not mounted.is_read_only
    assert data_of(mounted, 8) == b"data 8" and absent(mounted, 2)
    assert not (tmp_path / "3.cpc").exists() and not (tmp_path / "3.cpx").exists()
    mounted.close()
    location.release()


def test_copy_without_the_last_flushed_write_is_not_taken_over(tmp_path: Path) -> None:
    """A record whose row was lost is no less acknowledged: what looks like an offline compact lacks it."""
    volume = filled(tmp_path)
    assert compact.compact(volume) is not None
    put(volume, 50, b"flushed")
    volume.close()
    idx = tmp_path / "3.idx"
    idx.write_bytes(idx.read_bytes()[:-ROW])
    make_newer(tmp_path / "3.cpx")
    compact_recovery.recover(str(tmp_path), str(tmp_path), "3")
    assert not (tmp_path / "3.cpd").exists()
    volume = load(tmp_path, 3)
    assert data_of(volume, 50) == b"flushed"
    volume.close()


def test_damaged_copy_is_not_taken_over(tmp_path: Path) -> None:
    """Its index was whole, the pages of its data were not on disk yet."""
    volume = filled(tmp_path)
    assert compact.compact(volume) is not None
    volume.close()
    cpd = tmp_path / "3.cpd"
    content = bytearray(cpd.read_bytes())
    content[100:160] = bytes(60)
    cpd.write_bytes(content)
    make_newer(tmp_path / "3.cpx")
    compact_recovery.recover(str(tmp_path), str(tmp_path), "3")
    assert not cpd.exists()
    volume = load(tmp_path, 3)
    assert [data_of(volume, key) for key in range(1, 9)] == [b"data %d" % key for key in range(1, 9)]
    volume.close()


def test_sound_copy_is_taken_over(tmp_path: Path) -> None:
    """The same files, undamaged: this is what the offline command leaves (P3)."""
    volume = filled(tmp_path)
    assert compact.compact(volume) is not None
    volume.close()
    make_newer(tmp_path / "3.cpx")
    compact_recovery.recover(str(tmp_path), str(tmp_path), "3")
    assert not (tmp_path / "3.cpd").exists()
    volume = load(tmp_path, 3)
    assert volume.compaction_revision == 1
    volume.close()


def test_repair_refused_leaves_no_temporary(tmp_path: Path) -> None:
    filled(tmp_path).close()
    idx, dat = tmp_path / "3.idx", tmp_path / "3.dat"
    rows = idx.read_bytes()
    idx.write_bytes(rows[: 2 * ROW] + bytes(ROW) + rows[3 * ROW :])
    offset = rows_in(idx)[1][1]
    content = bytearray(dat.read_bytes())
    content[offset + 20 : offset + 24] = b"\xff" * 4
    dat.write_bytes(content)
    before = idx.read_bytes()
    volume = load(tmp_path, 3)
    assert volume.is_read_only
    assert idx.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    volume.close()
