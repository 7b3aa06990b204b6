"""`pyvolume fix`: what comes back, what stays deleted, what is never invented, and that nothing is overwritten."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from offline_util import answer, command, contents, loaded, state_of
from storage_util import COOKIE, create, golden, put, record, rows_in, write_index, write_volume
from test_volume_load import WHOLE, check_needles, load

from pyvolume.storage import scrub
from pyvolume.storage.superblock import SuperBlock


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def eventful(directory: Path, *, width: int = 4) -> tuple[list[tuple[int, int, int]], dict[int, bytes | str]]:
    """A volume with overwrites, deletes, empty files, and keys that came back; its rows and what each key gives."""
    volume = create(directory, width=width)
    dice = random.Random(7)
    for step in range(120):
        key = dice.randrange(1, 25)
        if dice.random() < 0.25:
            volume.delete_needle(key, COOKIE)
        elif dice.random() < 0.2:
            put(volume, key, b"", flags=0)
        else:
            put(volume, key, bytes([step]) * dice.randrange(1, 900))
    volume.close()
    return rows_in(directory / "3.idx", width), state_of(directory, 3, range(1, 25))


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "v2-superblock"])
@pytest.mark.parametrize("without_index", [False, True])
def test_golden_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, without_index: bool) -> None:
    """An index that is right is left alone; one made from the data alone serves what a Go server served."""
    manifest = golden(name, tmp_path)
    originals = {path: rows_in(path, 5 if name == "own-5byte" else 4) for path in tmp_path.glob("*.idx")}
    before = {path: path.read_bytes() for path in originals}
    if without_index:
        for path in originals:
            path.unlink()
    words = ["--offset-bytes", "5"] if name == "own-5byte" else []
    said = answer(capsys, "fix", *words, tmp_path)
    assert said["exit_code"] == 0 and said["findings"] == []
    if not without_index:
        assert not any(volume["changed"] for volume in said["volumes"])
        assert {path: path.read_bytes() for path in originals} == before
        return
    volumes = {}
    for path in originals:
        collection, _, vid = path.stem.rpartition("_")
        volumes[int(vid)] = load(tmp_path, int(vid), collection)
    check_needles(volumes, manifest)
    for volume in volumes.values():
        volume.close()
    assert answer(capsys, "check", *words, tmp_path)["exit_code"] == 0


@pytest.mark.parametrize("width", [4, 5])
def test_damaged_index_is_rebuilt_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int) -> None:
    rows, wanted = eventful(tmp_path, width=width)
    whole = (tmp_path / "3.idx").read_bytes()
    dice = random.Random(3)
    for _ in range(12):
        damaged = bytearray(whole[: dice.randrange(len(whole))])
        (tmp_path / "3.idx").write_bytes(damaged)
        said = answer(capsys, "fix", tmp_path)
        (facts,) = said["volumes"]
        assert said["exit_code"] == 0 and facts["lost"] == facts["older"] == 0
        if facts["changed"]:
            backup = Path(facts["backup"])
            assert backup.name.startswith("3.idx.bak-") and backup.read_bytes() == bytes(damaged)
            backup.unlink()
        got = state_of(tmp_path, 3, range(1, 25))
        known = set(range(1, 25)) - {row[0] for row in rows[len(damaged) // (12 + width) :]}
        assert {key: got[key] for key in known} == {key: wanted[key] for key in known}
        # of what the index did not know only one thing is unsure: whether a last empty record was a delete or a file
        assert all(got[k] == wanted[k] or {got[k], wanted[k]} == {b"", "gone"} for k in wanted)
        assert not answer(capsys, "fix", tmp_path)["volumes"][0]["changed"], "once is enough"
        assert answer(capsys, "check", tmp_path)["exit_code"] == 0


def test_every_torn_tail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut anywhere: what is whole stays, the rest is saved, and nothing comes up that was not the newest before."""
    source = tmp_path / "source"
    rows, _ = eventful(source)
    dat, idx = (source / "3.dat").read_bytes(), (source / "3.idx").read_bytes()
    newest: dict[int, int] = {}
    for key, offset, size in rows:
        newest[key] = offset if size >= 0 else -1
    for cut in [*range(1, 80, 3), *range(80, 3000, 271)]:
        target = tmp_path / str(cut)
        target.mkdir()
        (target / "3.idx").write_bytes(idx)
        (target / "3.dat").write_bytes(dat[:-cut])
        said = answer(capsys, "fix", target)
        (facts,) = said["volumes"]
        assert not said["errors"]
        saved = b"".join(path.read_bytes() for path in target.glob("3.torn-*"))
        left = (target / "3.dat").read_bytes()
        assert left[: len(dat) - cut] + saved == dat[: len(dat) - cut] or facts["padded_bytes"]
        again = answer(capsys, "check", target)
        assert again["exit_code"] == 0, (cut, again["findings"])
        with loaded(target, 3) as volume:
            assert not volume.is_read_only
            for key, where in newest.items():
                try:
                    found = volume.lookup(key)
                except Exception:
                    continue
                if where < 0:
                    assert found.size < 0, f"{key:x} was deleted and must stay so"


def test_a_delete_that_is_lost_with_the_tail_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"one")
    put(volume, 2, b"two")
    volume.delete_needle(1, COOKIE)
    volume.close()
    rows = rows_in(tmp_path / "3.idx")
    with (tmp_path / "3.dat").open("r+b") as file:
        file.truncate(rows[2][1])
    assert answer(capsys, "fix", tmp_path)["volumes"][0]["deletes_kept"] == 1
    assert state_of(tmp_path, 3, {1, 2}) == {1: "gone", 2: b"two"}


def test_a_damaged_newest_record_does_not_bring_back_an_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"old" * 50)
    put(volume, 1, b"new" * 50)
    put(volume, 2, b"two")
    volume.close()
    rows = rows_in(tmp_path / "3.idx")
    overwrite(tmp_path / "3.dat", rows[1][1] + 30, b"!")
    said = answer(capsys, "fix", tmp_path)
    assert said["exit_code"] == 1
    (finding,) = said["findings"]
    assert (finding["level"], finding["key"], finding["offset"]) == ("error", 1, rows[1][1])
    assert state_of(tmp_path, 3, {1, 2}) == {1: "error", 2: b"two"}
    # the same when the header is damaged, too, so that the records behind must be found again
    overwrite(tmp_path / "3.dat", rows[1][1] + 12, b"\x7f")
    write_index(tmp_path, rows[:2])
    said = answer(capsys, "fix", tmp_path)
    assert said["exit_code"] == 1 and said["volumes"][0]["recovered"] == 1
    assert any("no record can be told apart" in finding["reason"] for finding in said["findings"])
    assert state_of(tmp_path, 3, {1, 2}) == {1: "error", 2: b"two"}


@pytest.mark.parametrize("with_index", [True, False])
def test_records_behind_a_broken_header_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], with_index: bool
) -> None:
    volume = create(tmp_path)
    for key in range(1, 30):
        put(volume, key, bytes([key]) * 1000)
    volume.close()
    rows = rows_in(tmp_path / "3.idx")
    overwrite(tmp_path / "3.dat", rows[9][1] + 12, b"\x12\x34\x56\x78")
    size = (tmp_path / "3.dat").stat().st_size
    if not with_index:
        (tmp_path / "3.idx").unlink()
    said = answer(capsys, "fix", tmp_path)
    assert said["exit_code"] == 1
    assert (tmp_path / "3.dat").stat().st_size == size, "nothing is cut off when good records follow"
    state = state_of(tmp_path, 3, range(1, 30))
    assert state.pop(10) == ("error" if with_index else "gone")
    assert state == {key: bytes([key]) * 1000 for key in range(1, 30) if key != 10}


def test_a_volume_in_a_torn_record_is_not_taken_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data file stored as a needle holds records of its own."""
    inner = b"".join(record(key, b"stolen" * 20, append_at_ns=100 + key) for key in range(50, 60))
    outer = [record(1, b"one", append_at_ns=1000), record(2, b"\0" * 3 + inner, append_at_ns=2000)]
    at = write_volume(tmp_path, outer)
    dat = tmp_path / "3.dat"
    whole = dat.read_bytes()
    dat.write_bytes(whole[:-40])  # torn
    assert answer(capsys, "fix", tmp_path)["volumes"][0]["live"] == 1
    assert dat.stat().st_size == at[1]
    # and with a header that cannot be trusted
    dat.write_bytes(whole)
    overwrite(dat, at[1] + 12, b"\x7f")
    (tmp_path / "3.idx").unlink()
    assert answer(capsys, "fix", tmp_path)["volumes"][0]["live"] == 1


def test_empty_files_and_deletes_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(
        tmp_path,
        [
            record(1, b"", append_at_ns=1),  # never had data: an empty file
            record(2, b"two", append_at_ns=2),
            record(2, b"", append_at_ns=3),  # had data: a delete
            record(3, b"", append_at_ns=4, cookie=0x12345678),  # the mark of a vacuum
        ],
    )
    assert answer(capsys, "fix", tmp_path)["volumes"][0]["live"] == 1
    assert state_of(tmp_path, 3, {1, 2, 3}) == {1: b"", 2: "gone", 3: "gone"}
    # an index that knows better is believed
    rows = rows_in(tmp_path / "3.idx")
    write_index(tmp_path, [rows[0], rows[1], (2, rows[2][1], 0)])
    answer(capsys, "fix", tmp_path)
    assert state_of(tmp_path, 3, {2, 3}) == {2: b"", 3: "gone"}


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torn-dat", "torn-idx"):
        directory = tmp_path / name
        golden(name, directory)
        before = contents(directory)
        said = answer(capsys, "fix", "--dry-run", directory)
        assert said["dry_run"] and said["exit_code"] == 1
        assert all(volume["changed"] for volume in said["volumes"])
        assert contents(directory) == before
        done = answer(capsys, "fix", directory)
        keys = ("live", "lost", "torn_bytes", "padded_bytes", "recovered")
        assert [[v[k] for k in keys] for v in done["volumes"]] == [[v[k] for k in keys] for v in said["volumes"]]
        assert answer(capsys, "check", directory)["exit_code"] == 0


def test_torn_golden_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = golden("torn-dat", tmp_path)
    status, out, _ = command(capsys, "fix", tmp_path)
    assert status == 1 and "are saved in" in out
    for vid in (71, 72, 73):
        with loaded(tmp_path, vid) as volume:
            assert not volume.is_read_only
            assert scrub.scrub_volume(volume).findings == []
            for entry in manifest["needles"]:
                if entry["fid"].startswith(f"{vid},") and entry["status"] == 200:
                    check_needles({vid: volume}, {"needles": [entry]})
    assert state_of(tmp_path, 72, {0xF46})[0xF46] not in ("gone", "error"), "only its padding was missing"


def test_what_cannot_be_fixed_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden("v2-superblock", tmp_path / "two")
    write_volume(tmp_path / "junk", [b"\xff" * 400])
    (tmp_path / "junk" / "3.idx").write_bytes(b"12345")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "5.idx").write_bytes(b"x" * 16)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "6.dat").write_bytes(b"\3")
    create(tmp_path / "half").close()
    (tmp_path / "half" / "3.cpc").write_bytes(b"")
    for name in ("two", "junk", "none", "short", "half"):
        directory = tmp_path / name
        before = contents(directory)
        status, _, err = command(capsys, "fix", directory)
        assert status == 2 and str(directory) in err, name
        after = contents(directory)
        after.pop("vol_dir.uuid")
        before.pop("vol_dir.uuid", None)
        assert after == before
    write_volume(tmp_path / "empty", [], block=SuperBlock())
    assert command(capsys, "fix", tmp_path / "empty")[0] == 0
