"""Loading volumes: Go's own files, damaged files, repairs and refusals (contract storage.md 11, departures L1-L9)."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from storage_util import (
    COOKIE,
    body_of,
    create,
    data_of,
    digest_of,
    fid_of,
    golden,
    load,
    put,
    record,
    rows_in,
    write_index,
    write_volume,
)

from pyvolume._native import engine
from pyvolume.errors import (
    CorruptNeedle,
    DiskError,
    NeedleDeleted,
    NeedleNotFound,
    StorageError,
    VolumeLoadError,
    VolumeReadOnly,
)
from pyvolume.faults import set_points
from pyvolume.storage import ec_files, vif
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import Volume
from pyvolume.types import ReplicaPlacement, Ttl

WHOLE = [
    "v3-basic",
    "collection",
    "empty",
    "images",
    "own-5byte",
    "own-v1",
    "own-v2",
    "own-v3",
    "readonly",
    "replication-001",
    "ttl",
    "v2-superblock",
    "vacuumed",
]


def check_needles(volumes: dict[int, Volume], manifest: dict) -> None:
    """Every needle of a manifest is what a Go server answered."""
    for entry in manifest["needles"]:
        fid = fid_of(entry)
        volume = volumes[fid.vid]
        if entry["status"] == 200:
            needle = volume.read_needle(fid.key)
            assert needle.empty or needle.cookie == fid.cookie, entry["fid"]
            body = body_of(needle)
            assert len(body) == entry["body_length"], entry["fid"]
            assert hashlib.sha256(body).hexdigest() == entry["body_sha256"], entry["fid"]
            if not needle.is_manifest:
                assert entry["headers"]["Etag"] == f'"{needle.etag}"'
        elif entry["status"] == 404:
            with pytest.raises(NeedleNotFound):
                volume.read_needle(fid.key)
        else:
            with pytest.raises((CorruptNeedle, DiskError)):
                volume.read_needle(fid.key)


def check_status(volumes: dict[int, Volume], manifest: dict) -> None:
    """Figures that a Go server gave over gRPC. Counts only where Go had its map in memory, too."""
    for vid, answers in manifest["grpc"].items():
        status = answers["VolumeStatus"]
        if "error" in status:
            assert int(vid) not in volumes
            continue
        volume = volumes[int(vid)]
        assert volume.is_read_only == status["is_read_only"]
        assert volume.dat_bytes == int(status["volume_size"])
        sync = answers["VolumeSyncStatus"]
        assert volume.idx_bytes == int(sync["idx_file_size"])
        assert volume.compaction_revision == sync["compact_revision"]
        assert volume.version == sync["version"]
        assert volume.collection == sync["collection"]
        assert str(volume.ttl) == sync["ttl"]
        assert str(volume.replica_placement) == sync["replication"]
        if not volume.is_read_only:
            assert volume.file_count == int(status["file_count"])
            assert volume.deleted_count == int(status["file_deleted_count"])


def load_all(directory: Path, manifest: dict, *, repair: bool = True) -> dict[int, Volume]:
    volumes = {}
    for entry in manifest["volumes"]:
        try:
            volumes[entry["id"]] = load(directory, entry["id"], entry["collection"], repair=repair)
        except StorageError:
            assert manifest["grpc"][str(entry["id"])]["VolumeStatus"].get("error")
    return volumes


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_golden_volumes(tmp_path: Path, name: str, repair: bool) -> None:
    manifest = golden(name, tmp_path)
    before = {path.name: digest_of(path) for path in tmp_path.iterdir() if path.suffix != ".vif"}
    volumes = load_all(tmp_path, manifest, repair=repair)
    check_needles(volumes, manifest)
    if "grpc" in manifest and not any(e["request"]["method"] in ("DELETE", "POST") for e in manifest["exchanges"]):
        check_status(volumes, manifest)
    for volume in volumes.values():
        volume.close()
    after = {path.name: digest_of(path) for path in tmp_path.iterdir() if path.suffix not in (".vif", ".sdx")}
    assert after == before, "loading a whole volume changes neither .dat nor .idx"
    for path in tmp_path.glob("*.sdx"):
        assert digest_of(path) == manifest["files_after_go_run"][path.name]["sha256"], "Go's sorted file"


@pytest.mark.parametrize("name", ["torn-dat", "torn-idx"])
def test_torn_volumes_without_repair_are_gos(tmp_path: Path, name: str) -> None:
    manifest = golden(name, tmp_path)
    volumes = load_all(tmp_path, manifest, repair=False)
    check_status(volumes, manifest)
    loaded = {**manifest, "needles": [e for e in manifest["needles"] if fid_of(e).vid in volumes]}
    check_needles(volumes, loaded)
    for volume in volumes.values():
        volume.close()
    for file, facts in manifest["files_after_go_run"].items():
        # Go writes the sorted file of a volume that it then refuses; we refuse it first
        if not file.endswith(".vif") and not (file.endswith(".sdx") and int(file[:-4]) not in volumes):
            assert digest_of(tmp_path / file) == facts["sha256"]


def test_torn_dat_is_read_only_and_says_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """L5: acknowledged data is missing, so a person decides; the rest can be read."""
    manifest = golden("torn-dat", tmp_path)
    with caplog.at_level(logging.INFO):
        volumes = load_all(tmp_path, manifest)
    (cut,) = (e for e in manifest["needles"] if fid_of(e).vid == 72 and e["status"] == 500)
    assert volumes[72].read_needle(fid_of(cut).key).data  # only padding was missing: it was put back
    check_needles(volumes, manifest | {"needles": [e for e in manifest["needles"] if e is not cut]})
    assert [volumes[vid].is_read_only for vid in (71, 72, 73)] == [True, False, True]
    for vid, count in ((71, 1), (73, 2)):
        (line,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith(f"volume {vid}: idx references"))
        missing = [fid_of(e).key for e in manifest["needles"] if fid_of(e).vid == vid and e["status"] == 500]
        assert len(missing) == count
        assert f"marking readonly: {count} needles" in line
        assert f"the first is {min(missing):x}" in line
        assert "replica" in line and "pyvolume fix" in line
        with pytest.raises(VolumeReadOnly):
            put(volumes[vid], 99, b"x")
    assert not list(tmp_path.glob("*.torn-*"))
    assert digest_of(tmp_path / "71.dat") == manifest["files"]["71.dat"]["sha256"]


def test_torn_idx_is_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """L3 and L4: all rows come back, the volumes take writes."""
    manifest = golden("torn-idx", tmp_path)
    with caplog.at_level(logging.INFO):
        volumes = {vid: load(tmp_path, vid) for vid in (71, 72, 73)}
    for entry in manifest["needles"]:
        fid = fid_of(entry)
        needle = volumes[fid.vid].read_needle(fid.key)
        assert needle.cookie == fid.cookie
    assert not any(volume.is_read_only for volume in volumes.values())
    lines = [r.getMessage() for r in caplog.records if "indexed" in r.getMessage()]
    assert [line.split(" ", 4)[3] for line in lines] == ["1", "1", "3"]
    assert any("dropped 9 bytes of half a row" in r.getMessage() for r in caplog.records)
    for vid, volume in volumes.items():
        put(volume, 0x999, b"after the repair")
        volume.close()
        again = load(tmp_path, vid, repair=False)
        assert not again.is_read_only
        assert data_of(again, 0x999) == b"after the repair"
        again.close()


# ------------------------------------------------------------------------------------------------------------ L1, L3


def volume_with(directory: Path, count: int = 5) -> tuple[list[bytes], list[int], list[tuple[int, int, int]]]:
    """Records 1..count with their index, written without a server."""
    records = [record(key, f"data {key}".encode() * key) for key in range(1, count + 1)]
    offsets = write_volume(directory, records)
    rows = [
        (key, offset, int.from_bytes(item[12:16], "big"))
        for key, (offset, item) in enumerate(zip(offsets, records, strict=True), 1)
    ]
    write_index(directory, rows)
    return records, offsets, rows


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_rows_lost_from_the_index_come_back(tmp_path: Path, lost: int) -> None:
    _, _, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:-lost])
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert rows_in(tmp_path / "3.idx") == rows
    for key in range(1, 6):
        assert data_of(volume, key) == f"data {key}".encode() * key
    volume.close()


def test_lost_rows_without_repair_make_it_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:-1])
    volume = load(tmp_path, 3, repair=False)
    assert volume.no_write_or_delete
    with pytest.raises(NeedleNotFound):
        volume.read_needle(5)
    assert rows_in(tmp_path / "3.idx") == rows[:-1]
    assert "expected" in caplog.text and "actual" in caplog.text
    volume.close()


@pytest.mark.parametrize("keep", [1, 15, 16, 20, 40, 44])
def test_torn_last_record_is_saved_and_cut(tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    """The last append reached the disk in part: its bytes are kept beside the volume."""
    _, _, rows = volume_with(tmp_path)
    dat = tmp_path / "3.dat"
    whole = dat.read_bytes()
    torn = record(6, b"never acknowledged" * 2)[:keep]
    dat.write_bytes(whole + torn)
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert dat.read_bytes() == whole
    assert (tmp_path / f"3.torn-{len(whole)}").read_bytes() == torn
    assert rows_in(tmp_path / "3.idx") == rows
    (line,) = (r.getMessage() for r in caplog.records if "torn" in r.getMessage())
    assert f"cut off {keep} bytes of a torn record at {len(whole)}" in line and "3.dat" in line
    put(volume, 6, b"written again")
    volume.close()
    again = load(tmp_path, 3, repair=False)
    assert not again.is_read_only and data_of(again, 6) == b"written again"
    again.close()


def test_torn_record_behind_unindexed_ones(tmp_path: Path) -> None:
    _, offsets, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:3])
    dat = tmp_path / "3.dat"
    dat.write_bytes(dat.read_bytes()[:-20])
    volume = load(tmp_path, 3)
    assert rows_in(tmp_path / "3.idx") == rows[:4]
    assert dat.stat().st_size == offsets[4]
    assert [path.name for path in tmp_path.glob("3.torn-*")] == [f"3.torn-{offsets[4]}"]
    volume.close()


def test_evidence_is_never_overwritten(tmp_path: Path) -> None:
    volume_with(tmp_path)
    dat = tmp_path / "3.dat"
    size = dat.stat().st_size
    for attempt, junk in enumerate((b"first", b"second", b"third")):
        with dat.open("ab") as handle:
            handle.write(junk)
        load(tmp_path, 3).close()
        suffix = f".{attempt}" if attempt else ""
        assert (tmp_path / f"3.torn-{size}{suffix}").read_bytes() == junk


def test_zeros_behind_the_last_record_are_no_needles(tmp_path: Path) -> None:
    """A file extended by a crash before its data: zeros look like empty records of key 0."""
    _, _, rows = volume_with(tmp_path)
    dat = tmp_path / "3.dat"
    whole = dat.read_bytes()
    dat.write_bytes(whole + bytes(4096))
    volume = load(tmp_path, 3)
    assert dat.read_bytes() == whole
    assert rows_in(tmp_path / "3.idx") == rows
    assert not volume.is_read_only
    volume.close()


def test_damaged_record_between_good_ones_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, offsets, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:2])
    dat = tmp_path / "3.dat"
    content = bytearray(dat.read_bytes())
    content[offsets[3] + 22] ^= 1
    dat.write_bytes(content)
    volume = load(tmp_path, 3)
    assert dat.read_bytes() == content
    assert rows_in(tmp_path / "3.idx") == [*rows[:3], rows[4]]
    assert f"1 damaged records in between got no row, the first at {offsets[3]}" in caplog.text
    with pytest.raises(NeedleNotFound):
        volume.read_needle(4)
    assert data_of(volume, 5) == b"data 5" * 5
    volume.close()


def test_deletes_and_empty_files_behind_the_index(tmp_path: Path) -> None:
    """A record of Size 0 is a delete where its key is live, else an empty file; a vacuum's mark is always a delete."""
    records = [
        record(1, b"one"),
        record(2, b"two"),
        record(1, b""),  # delete of a key known only to the index
        record(3, b""),  # empty file
        record(3, b""),  # delete of the empty file
        record(4, b"four"),
        record(4, b""),  # delete of a key in the tail
        record(4, b""),  # empty file under a deleted key
        record(5, b"", cookie=0x12345678),  # what a vacuum writes for a delete
        record(2, b"", cookie=7),
    ]
    offsets = write_volume(tmp_path, records)
    write_index(tmp_path, [(1, offsets[0], 8), (2, offsets[1], 8)])
    volume = load(tmp_path, 3)
    assert [(key, size) for key, _, size in rows_in(tmp_path / "3.idx")[2:]] == [
        (1, -1),
        (3, 0),
        (3, -1),
        (4, 9),
        (4, -1),
        (4, 0),
        (5, -1),
        (2, -1),
    ]
    for key in (1, 2, 3):
        with pytest.raises(NeedleDeleted):
            volume.read_needle(key)
    assert volume.read_needle(4).empty
    with pytest.raises(NeedleNotFound):
        volume.read_needle(5)
    volume.close()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_missing_index_is_rebuilt(tmp_path: Path, version: int, caplog: pytest.LogCaptureFixture) -> None:
    """L1: upstream ends the process."""
    records = [record(key, b"x" * key, version=version) for key in range(1, 40)]
    records.append(record(7, b"", version=version))
    offsets = write_volume(tmp_path, records, block=SuperBlock(version))
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    for key in range(1, 40):
        if key != 7:
            assert data_of(volume, key) == b"x" * key
    with pytest.raises(NeedleDeleted):
        volume.read_needle(7)
    assert [row[1] for row in rows_in(tmp_path / "3.idx")] == offsets
    assert f"check volume idx file {tmp_path}/3.idx: idx file {tmp_path}/3.idx does not exists" in caplog.text
    assert "indexed 40 records (1 deletes)" in caplog.text
    put(volume, 50, b"appended in its own version")
    volume.close()
    again = load(tmp_path, 3, repair=False)
    assert not again.is_read_only
    assert again.version == version
    assert data_of(again, 50) == b"appended in its own version"
    again.close()


def test_missing_index_without_repair_refuses_only_this_volume(tmp_path: Path) -> None:
    write_volume(tmp_path, [record(1, b"x")])
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3, repair=False)
    assert str(caught.value) == f"check volume idx file {tmp_path}/3.idx: idx file {tmp_path}/3.idx does not exists"
    assert not (tmp_path / "3.idx").exists()


def test_missing_index_of_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "3.dat").write_bytes(SuperBlock().to_bytes() + os.urandom(4096))
    before = digest_of(tmp_path / "3.dat")
    with pytest.raises(VolumeLoadError, match="not one record in it can be read"):
        load(tmp_path, 3)
    assert digest_of(tmp_path / "3.dat") == before
    assert [p.name for p in tmp_path.iterdir()] == ["3.dat"]


def test_version_3_records_behind_a_version_2_super_block_are_never_cut(tmp_path: Path) -> None:
    """T1: what Go leaves of AllocateVolume with version 2. Read as version 2 the last record seems 8 bytes too long."""
    golden("v2-superblock", tmp_path)
    before = digest_of(tmp_path / "95.dat"), digest_of(tmp_path / "95.idx")
    volume = load(tmp_path, 95)
    assert volume.is_read_only and volume.version == 2
    volume.close()
    assert (digest_of(tmp_path / "95.dat"), digest_of(tmp_path / "95.idx")) == before
    (tmp_path / "95.idx").unlink()
    with pytest.raises(VolumeLoadError, match="its records are of version 3, not 2"):
        load(tmp_path, 95)
    assert digest_of(tmp_path / "95.dat") == before[0]


def test_tail_is_left_alone_when_the_last_indexed_record_is_damaged(tmp_path: Path) -> None:
    _, offsets, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:-1])
    dat = tmp_path / "3.dat"
    content = bytearray(dat.read_bytes())
    content[offsets[3] + 22] ^= 1
    dat.write_bytes(content)
    volume = load(tmp_path, 3)
    assert volume.is_read_only
    assert dat.read_bytes() == content
    assert rows_in(tmp_path / "3.idx") == rows[:-1]
    volume.close()


@pytest.mark.parametrize("point", ["repair.save_torn", "repair.truncate", "repair.append_rows"])
def test_failed_repair_loses_nothing_and_is_made_up_for(tmp_path: Path, point: str) -> None:
    _, _, rows = volume_with(tmp_path)
    write_index(tmp_path, rows[:2])
    dat = tmp_path / "3.dat"
    whole = dat.read_bytes()
    dat.write_bytes(whole + b"torn")
    with set_points(f"{point}=error:ENOSPC"):
        volume = load(tmp_path, 3)
    assert volume.is_read_only
    assert dat.read_bytes().startswith(whole)
    assert data_of(volume, 2) == b"data 2" * 2
    volume.close()
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert rows_in(tmp_path / "3.idx") == rows
    assert dat.read_bytes() == whole
    assert any(path.read_bytes() == b"torn" for path in tmp_path.glob("3.torn-*"))
    volume.close()


def test_ragged_index_without_repair_is_refused(tmp_path: Path) -> None:
    volume_with(tmp_path)
    with (tmp_path / "3.idx").open("ab") as handle:
        handle.write(b"half")
    with pytest.raises(VolumeLoadError, match=r"unexpected file .*3.idx size: 84"):
        load(tmp_path, 3, repair=False)
    volume = load(tmp_path, 3)
    assert (tmp_path / "3.idx").stat().st_size == 80 and not volume.is_read_only
    volume.close()


def test_cut_in_the_last_padding_is_none(tmp_path: Path) -> None:
    _, _, rows = volume_with(tmp_path, 4)  # the fourth record has 7 bytes of padding
    dat = tmp_path / "3.dat"
    os.truncate(dat, dat.stat().st_size - 3)
    volume = load(tmp_path, 3)
    assert not volume.is_read_only and rows_in(tmp_path / "3.idx") == rows
    put(volume, 9, b"nine")
    volume.close()
    again = load(tmp_path, 3, repair=False)
    assert not again.is_read_only and data_of(again, 4) == b"data 4" * 4 and data_of(again, 9) == b"nine"
    again.close()


def test_key_sorted_index_is_fine(tmp_path: Path) -> None:
    """After a vacuum or `weed fix` the last row is not that of the last record."""
    records = [record(key, b"x" * key) for key in (9, 3, 7, 1)]
    offsets = write_volume(tmp_path, records)
    rows = sorted(zip((9, 3, 7, 1), offsets, (5 + n for n in (9, 3, 7, 1)), strict=True))
    write_index(tmp_path, rows)
    volume = load(tmp_path, 3)
    assert not volume.is_read_only
    assert rows_in(tmp_path / "3.idx") == rows
    volume.close()


# -------------------------------------------------------------------------------------------------------- head repair


def test_rows_overwritten_at_the_head_are_recovered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, rows = volume_with(tmp_path)
    write_index(tmp_path, [(8, 0, -1), (9, 0, -1), (2, 0, -1), *rows[3:]])
    (tmp_path / "3.idx").chmod(0o600)
    with caplog.at_level(logging.INFO):
        volume = load(tmp_path, 3, repair=False)
    assert rows_in(tmp_path / "3.idx") == [rows[0], rows[2], (8, 0, -1), (9, 0, -1), (2, 0, -1), *rows[3:]]
    assert (tmp_path / "3.idx").stat().st_mode & 0o777 == 0o600
    assert f"recovered 2 overwritten {tmp_path}/3.idx rows" in caplog.text
    assert data_of(volume, 1) == b"data 1"
    with pytest.raises(NeedleNotFound):
        volume.read_needle(2)
    volume.close()


def test_head_repair_that_fails_is_no_reason_to_refuse(tmp_path: Path) -> None:
    _, _, rows = volume_with(tmp_path)
    write_index(tmp_path, [(8, 0, -1), *rows[1:]])
    with set_points("index.write=error:ENOSPC"):
        volume = load(tmp_path, 3)
    assert data_of(volume, 2) == b"data 2" * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.dat", "3.idx", "3.vif"]
    volume.close()


# ------------------------------------------------------------------------------------------------------------- widths


def test_two_widths_in_one_process(tmp_path: Path) -> None:
    """L2: a volume is opened with its own width, whatever the server's is."""
    wide, narrow = create(tmp_path, 5, width=5), create(tmp_path, 4, width=4)
    put(wide, 1, b"wide"), put(narrow, 1, b"narrow")
    wide.close(), narrow.close()
    assert (tmp_path / "5.idx").stat().st_size == 17 and (tmp_path / "4.idx").stat().st_size == 16
    wide, narrow = load(tmp_path, 5), load(tmp_path, 4)
    assert (wide.offset_width, narrow.offset_width) == (5, 4)
    assert (data_of(wide, 1), data_of(narrow, 1)) == (b"wide", b"narrow")
    wide.close(), narrow.close()


def test_width_is_found_out_when_the_vif_does_not_say(tmp_path: Path) -> None:
    records = [record(key, b"x" * key) for key in range(1, 100)]
    offsets = write_volume(tmp_path, records)
    write_index(tmp_path, [(key, offsets[key - 1], key + 5) for key in range(1, 100)], width=5)
    volume = load(tmp_path, 3)
    assert volume.offset_width == 5
    assert data_of(volume, 99) == b"x" * 99
    volume.close()
    assert vif.load(str(tmp_path / "3.vif")).info.bytes_offset == 5


def test_impossible_width_is_refused(tmp_path: Path) -> None:
    volume_with(tmp_path)
    (tmp_path / "3.vif").write_text('{"bytesOffset": 6}')
    with pytest.raises(StorageError, match=r"BytesOffset mismatch in volume info file .*3.vif"):
        load(tmp_path, 3)


# ---------------------------------------------------------------------------------------------------- vif, permissions


def test_vif_is_made_when_missing_or_empty(tmp_path: Path) -> None:
    volume_with(tmp_path)
    path = tmp_path / "3.vif"
    load(tmp_path, 3).close()
    first = path.read_text()
    assert vif.load(str(path)).info == vif.VolumeInfo(version=3, bytes_offset=4)
    path.write_text("")
    load(tmp_path, 3).close()
    assert path.read_text() == first


@pytest.mark.parametrize("text", ['{"surprise": 1}', "{", '{"version": 3, "readOnly": true, "x'])
def test_broken_vif_is_left_alone_and_the_volume_loads(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    volume_with(tmp_path)
    (tmp_path / "3.vif").write_text(text)
    volume = load(tmp_path, 3)
    assert volume.is_read_only == ("readOnly" in text)
    assert (tmp_path / "3.vif").read_text() == text
    assert "load volume 3.vif file: unmarshal error" in caplog.text
    volume.close()


def test_replication_of_the_vif_wins(tmp_path: Path) -> None:
    volume_with(tmp_path)
    (tmp_path / "3.vif").write_text('{"replication": "110", "version": 2}')
    volume = load(tmp_path, 3)
    assert volume.replica_placement == ReplicaPlacement.parse("110")
    assert volume.version == 3, "the super block's version wins"
    volume.close()
    (tmp_path / "3.vif").write_text('{"replication": "999"}')
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == "Error parse volume 3 replication 999 : unexpected replication type: 999"


def test_data_without_owner_write_is_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume_with(tmp_path)
    (tmp_path / "3.dat").chmod(0o444)
    with caplog.at_level(logging.INFO):
        volume = load(tmp_path, 3)
    assert volume.no_write_or_delete
    assert f"opening {tmp_path}/3.dat in READONLY mode" in caplog.text
    assert data_of(volume, 1) == b"data 1"
    with pytest.raises(VolumeReadOnly):
        volume.delete_needle(1, COOKIE)
    volume.close()
    (tmp_path / "3.dat").chmod(0o200)
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == f"cannot read Volume Data file {tmp_path}/3.dat"


@pytest.mark.parametrize("content", [b"", b"\x03\0\0\0"])
def test_data_without_a_super_block(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "3.dat").write_bytes(content)
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == f"volume {tmp_path}/3.dat not initialized"
    assert (tmp_path / "3.dat").read_bytes() == content


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == f"volume data file {tmp_path}/3.dat does not exist"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [0, 4, 255])
def test_unknown_version_is_refused(tmp_path: Path, version: int) -> None:
    (tmp_path / "3.dat").write_bytes(SuperBlock(version).to_bytes())
    (tmp_path / "3.idx").touch()
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == f"Unsupported volume 3 version {version}"


def test_extra_area_of_the_super_block_is_kept(tmp_path: Path) -> None:
    """L9: its length counts, its content is carried through."""
    extra = b"whatever is here"
    item = record(1, b"behind the extra area")
    (tmp_path / "3.dat").write_bytes(SuperBlock(extra_size=len(extra)).to_bytes() + extra + item)
    volume = load(tmp_path, 3)
    assert data_of(volume, 1) == b"behind the extra area"
    put(volume, 2, b"more")
    volume.close()
    assert (tmp_path / "3.dat").read_bytes()[8:24] == extra
    again = load(tmp_path, 3, repair=False)
    assert not again.is_read_only and data_of(again, 2) == b"more"
    again.close()


def test_tiered_volume_without_its_backend_is_refused(tmp_path: Path) -> None:
    volume_with(tmp_path)
    (tmp_path / "3.vif").write_text('{"files": [{"backendType": "s3", "backendId": "a", "key": "k"}]}')
    with pytest.raises(VolumeLoadError) as caught:
        load(tmp_path, 3)
    assert str(caught.value) == "load remote file k: backend storage s3.a not found"


def test_index_beside_the_data_is_used_although_there_is_an_idx_directory(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    volume_with(tmp_path)
    volume = load(tmp_path, 3, idx=idx)
    assert volume.idx_path == f"{tmp_path}/3.idx" and volume.idx_directory == str(tmp_path)
    volume.close()
    (tmp_path / "3.idx").rename(idx / "3.idx")
    volume = load(tmp_path, 3, idx=idx)
    assert volume.idx_path == f"{idx}/3.idx" and data_of(volume, 5) == b"data 5" * 5
    volume.close()


# ------------------------------------------------------------------------------------------------------------ creation


def test_created_files(tmp_path: Path) -> None:
    volume = create(tmp_path, 3, "pics", ttl=Ttl.parse("3h"))
    assert (tmp_path / "pics_3.dat").read_bytes() == bytes.fromhex("0300030200000000")
    assert (tmp_path / "pics_3.idx").read_bytes() == b""
    info = vif.load(str(tmp_path / "pics_3.vif")).info
    assert (info.version, info.bytes_offset) == (3, 4)
    assert info.expire_at_sec > 0
    assert volume.ttl == Ttl.parse("3h") and not volume.is_read_only
    volume.close()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_new_volumes_say_the_version_they_are_filled_with(tmp_path: Path, version: int) -> None:
    """L8."""
    from storage_util import PLAIN

    from pyvolume.storage.volume_load import create_volume

    volume = create_volume(str(tmp_path), str(tmp_path), "", 3, replica_placement=PLAIN, version=version)
    put(volume, 1, b"x")
    volume.close()
    assert (tmp_path / "3.dat").read_bytes()[0] == 3
    again = load(tmp_path, 3, repair=False)
    assert again.version == 3 and not again.is_read_only and data_of(again, 1) == b"x"
    again.close()


def test_unsupported_version_leaves_nothing_behind(tmp_path: Path) -> None:
    from storage_util import PLAIN

    from pyvolume.storage.volume_load import create_volume

    with pytest.raises(StorageError) as caught:
        create_volume(str(tmp_path), str(tmp_path), "", 3, replica_placement=PLAIN, version=0)
    assert str(caught.value) == "volume super block version 0 is not supported"
    assert not list(tmp_path.iterdir())


def test_failed_creation_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot write Volume Index .*: open .*no such file or directory"):
        create(tmp_path, idx=tmp_path / "missing")
    assert not list(tmp_path.iterdir())
    with set_points("create.open=error:ENOSPC"), pytest.raises(DiskError, match="no space left on device"):
        create(tmp_path)
    assert not list(tmp_path.iterdir())


def test_creation_over_existing_data_loads_it(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"precious")
    volume.close()
    volume = create(tmp_path)
    assert data_of(volume, 1) == b"precious"
    volume.close()
    (tmp_path / "3.dat").write_bytes(b"")
    with pytest.raises(VolumeLoadError, match=r"its index .* of 16 bytes is there, its data is not"):
        create(tmp_path)


def test_creation_does_not_empty_a_file_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stat that failed (a disk, a server of files) passed for an empty file."""
    volume = create(tmp_path)
    put(volume, 1, b"precious")
    volume.close()
    before = (tmp_path / "3.dat").read_bytes()
    stat = os.stat
    for extension in ("dat", "idx"):

        def failing(path: Any, *args: Any, suffix: str = f"3.{extension}", **more: Any) -> os.stat_result:
            if str(path).endswith(suffix):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)
            return stat(path, *args, **more)

        if extension == "idx":
            (tmp_path / "3.dat").write_bytes(b"")
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", failing)
            with pytest.raises(DiskError, match=rf"^stat {tmp_path}/3.{extension}: connection timed out$"):
                create(tmp_path)
        (tmp_path / "3.dat").write_bytes(before)
    with closing(load(tmp_path, 3)) as volume:
        assert data_of(volume, 1) == b"precious"


@pytest.fixture
def vif_on_a_bad_sector(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Until the patch is undone."""

    def failing(path: str, mode: str) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(vif, "open", failing, raising=False)
    return monkeypatch


def test_a_mark_in_a_vif_that_cannot_be_read_is_not_lost(
    tmp_path: Path, vif_on_a_bad_sector: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The volume took writes, and the next mark wrote the file anew, without what else had stood in it."""
    volume = create(tmp_path)
    put(volume, 1, b"x")
    volume.save_info(lambda info: setattr(info, "replication", "001"))
    volume.set_read_only(persist=True)
    volume.close()
    before = (tmp_path / "3.vif").read_bytes()
    volume = load(tmp_path, 3)
    assert volume.is_read_only and volume.lacks_info and data_of(volume, 1) == b"x"
    assert f"volume 3 is read only until {tmp_path}/3.vif can be read and it is mounted again" in caplog.text
    for change in (volume.set_writable, volume.save_info, lambda: volume.set_read_only(persist=True)):
        with pytest.raises(StorageError, match=r"could not be read: mount the volume again$"):
            change()
    with pytest.raises(VolumeReadOnly):
        put(volume, 2, b"y")
    volume.close()
    with pytest.raises(StorageError, match=r"^cannot create volume 4: fail to read "):
        (tmp_path / "4.vif").write_bytes(before)
        create(tmp_path, 4)
    assert not (tmp_path / "4.dat").exists()
    vif_on_a_bad_sector.undo()
    assert (tmp_path / "3.vif").read_bytes() == before
    with closing(load(tmp_path, 3)) as volume:
        assert volume.is_read_only and str(volume.replica_placement) == "001"
        volume.set_writable()
        put(volume, 2, b"y")


def test_shards_stay_where_a_vif_cannot_be_read(tmp_path: Path, vif_on_a_bad_sector: pytest.MonkeyPatch) -> None:
    """Their ratio stands in it: by another one they look too short."""
    (tmp_path / "3.dat").write_bytes(bytes(30 << 20))
    (tmp_path / "3.ecx").write_bytes(bytes(16))
    info = vif.VolumeInfo(version=3, ec_shard_config=vif.EcShardConfig(15, 3, 0))
    (tmp_path / "3.vif").write_text(vif.render(info))
    for shard in range(18):
        (tmp_path / f"3.ec{shard:02d}").write_bytes(bytes(2 << 20))
    assert ec_files.claim(str(tmp_path), str(tmp_path), "3") == "shards"
    vif_on_a_bad_sector.undo()
    assert ec_files.claim(str(tmp_path), str(tmp_path), "3") == "shards"
    (tmp_path / "3.vif").unlink()
    assert ec_files.claim(str(tmp_path), str(tmp_path), "3") == "volume"


def test_last_append_time_survives_a_restart(tmp_path: Path) -> None:
    """Append times must rise even if the clock was set back in between."""
    far = 1 << 62
    offsets = write_volume(tmp_path, [record(1, b"old"), record(2, b"from the future", append_at_ns=far)])
    write_index(tmp_path, [(2, offsets[1], 20), (1, offsets[0], 8)])  # the last row is not that of the last record
    volume = load(tmp_path, 3)
    assert volume.stat().last_append_at_ns == far
    assert put(volume, 3, b"now").append_at_ns == far + 1
    volume.close()


def test_index_100k_counts(tmp_path: Path) -> None:
    """The counters of a real index, as Go had them after a reload."""
    manifest = golden("index-100k", tmp_path)
    facts = manifest["map_summary"]
    with (tmp_path / "121.idx").open("rb") as idx:
        summary = engine.idx_summarize(idx.fileno(), 4, 3, manifest["files"]["121.dat"]["size"])
    assert summary.rows == facts["rows"] and summary.max_key == facts["max_key"]
    assert summary.past_end == 0
    (tmp_path / "121.dat").write_bytes(SuperBlock().to_bytes())
    with engine.Volume.open(tmp_path / "121.dat", tmp_path / "121.idx", vid=121) as handle:
        stat = handle.stat()
        assert stat.file_count == facts["puts"] and stat.deleted_count == facts["deletes"]
        assert stat.file_bytes == facts["put_bytes"] and stat.deleted_bytes == facts["deleted_bytes"]
    volume = load(tmp_path, 121)
    assert volume.is_read_only, "every row points behind the end"
    assert volume.file_count == facts["rows"], "the sorted map of a read-only volume counts all rows"
    assert volume.content_bytes == facts["put_bytes"]
    rows = (tmp_path / "121.sdx").stat().st_size // 16
    assert rows == facts["live"]
    for key, offset, size in manifest["map_sample"]:
        assert volume.lookup(key)[:2] == (offset, size)
    volume.close()
