"""`pyvolume compact`: byte for byte what a server's vacuum leaves; volumes it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from offline_util import answer, command, contents, loaded, state_of
from storage_util import COOKIE, create, load, put, rows_in

from pyvolume.storage import compact


def wasteful(directory: Path, *, width: int = 4) -> None:
    volume = create(directory, width=width)
    for key in range(1, 60):
        put(volume, key, bytes([key]) * 700)
    for key in range(1, 60, 3):
        volume.delete_needle(key, COOKIE)
    put(volume, 2, b"second")
    put(volume, 5, b"", flags=0)
    volume.close()


@pytest.mark.parametrize("width", [4, 5])
def test_same_as_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    wasteful(ours, width=width)
    shutil.copytree(ours, theirs)
    before = state_of(ours, 3, range(1, 60))
    volume = load(theirs, 3)
    compact.compact(volume)
    compact.commit(volume)
    volume.close()
    said = answer(capsys, "compact", ours)
    (facts,) = said["volumes"]
    assert said["exit_code"] == 0 and facts["compacted"] and facts["revision"] == 1
    assert facts["freed_bytes"] == facts["bytes"] - facts["new_bytes"] > 10_000
    for name in ("3.dat", "3.idx"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert rows_in(ours / "3.idx", width)
    assert state_of(ours, 3, range(1, 60)) == before
    assert not [path for path in ours.iterdir() if path.suffix in (".cpd", ".cpx", ".cpc")]
    assert answer(capsys, "check", ours)["exit_code"] == 0
    assert not answer(capsys, "compact", ours)["volumes"][0]["compacted"], "no garbage is left"


def test_dry_run_and_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wasteful(tmp_path)
    before = contents(tmp_path)
    said = answer(capsys, "compact", "--dry-run", tmp_path)
    assert said["exit_code"] == 1 and said["volumes"][0]["garbage"] == pytest.approx(0.35, abs=0.05)
    assert "would be compacted" in said["findings"][0]["reason"]
    assert answer(capsys, "compact", "--dry-run", "--garbage", "0.9", tmp_path)["exit_code"] == 0
    assert contents(tmp_path) == before
    assert not answer(capsys, "compact", "--garbage", "0.9", tmp_path)["volumes"][0]["compacted"]
    status, out, _ = command(capsys, "compact", tmp_path)
    assert status == 0 and "1 compacted" in out


def test_unfinished_vacuum_is_finished_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Departure P3: the result of an earlier offline compact is not thrown away."""
    wasteful(tmp_path)
    before = state_of(tmp_path, 3, range(1, 60))
    volume = load(tmp_path, 3)
    compact.compact(volume)
    volume.close()
    assert (tmp_path / "3.cpd").exists()
    said = answer(capsys, "compact", tmp_path)
    assert said["exit_code"] == 0 and not (tmp_path / "3.cpd").exists()
    with loaded(tmp_path, 3) as again:
        assert again.compaction_revision == 1
    assert state_of(tmp_path, 3, range(1, 60)) == before


def test_damaged_volume_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wasteful(tmp_path)
    rows = rows_in(tmp_path / "3.idx")
    with (tmp_path / "3.dat").open("r+b") as file:
        file.truncate(rows[-2][1])
    before = {name: digest for name, digest in contents(tmp_path).items() if name in ("3.dat", "3.idx")}
    said = answer(capsys, "compact", tmp_path)
    assert said["exit_code"] == 1 and "damaged" in said["findings"][0]["reason"]
    assert before.items() <= contents(tmp_path).items()


def test_unreadable_needles_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wasteful(tmp_path)
    rows = rows_in(tmp_path / "3.idx")
    with (tmp_path / "3.dat").open("r+b") as file:
        file.seek(rows[2][1] + 100)
        file.write(b"!!")
    said = answer(capsys, "compact", tmp_path)
    assert said["exit_code"] == 1 and "could not be read and were left behind" in said["findings"][0]["reason"]
