"""`pyvolume check`: what is clean, every kind of damage, directories that a server has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from offline_util import answer, command, contents
from storage_util import COOKIE, create, golden, put, rows_in, write_index
from test_volume_load import WHOLE

from pyvolume.storage import scrub
from pyvolume.storage.dir_lock import lock_directory


def filled(directory: Path, *, width: int = 4, vid: int = 3) -> list[tuple[int, int, int]]:
    volume = create(directory, vid, width=width)
    for key in range(1, 8):
        put(volume, key, b"x" * key * 100)
    put(volume, 2, b"second")
    volume.delete_needle(3, COOKIE)
    volume.close()
    return rows_in(directory / f"{vid}.idx", width)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "v2-superblock"])
def test_whole_volumes_are_clean_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    golden(name, tmp_path)
    before = contents(tmp_path)
    said = answer(capsys, "check", tmp_path)
    assert said["exit_code"] == 0 and said["findings"] == [] and said["errors"] == []
    assert said["volumes"]
    assert contents(tmp_path) == before, "not even an identity file is made"


@pytest.mark.parametrize("width", [4, 5])
def test_damaged_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int) -> None:
    rows = filled(tmp_path, width=width)
    for row in (rows[1], rows[4]):  # the overwritten record of 2, and the live one of 5
        overwrite(tmp_path / "3.dat", row[1] + 30, b"!")
    said = answer(capsys, "check", tmp_path)
    assert said["exit_code"] == 1
    old, live = said["findings"]
    assert (old["level"], old["offset"], old["key"]) == ("warning", rows[1][1], 2)
    assert (live["level"], live["offset"], live["key"]) == ("error", rows[4][1], 5)
    assert live["file"] == f"{tmp_path}/3.dat" and "invalid CRC" in live["reason"] and "replica" in live["remedy"]
    assert answer(capsys, "check", "--index-only", tmp_path)["exit_code"] == 0
    status, out, _ = command(capsys, "check", tmp_path)
    assert status == 1
    assert f"error: {tmp_path}/3.dat: offset {rows[4][1]}: needle 5 cannot be read: invalid CRC" in out
    assert out.endswith("1 volume checked, 0 clean\n")


def test_record_of_another_needle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = filled(tmp_path)
    write_index(tmp_path, [(99, *rows[0][1:]), *rows[1:]])
    (finding,) = answer(capsys, "check", tmp_path)["findings"]
    assert finding["key"] == 99 and "does not match needle's Id 1" in finding["reason"]


def test_index_against_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = filled(tmp_path)
    dat, idx = tmp_path / "3.dat", tmp_path / "3.idx"

    def reasons() -> list[str]:
        return [finding["reason"] for finding in answer(capsys, "check", tmp_path)["findings"]]

    with idx.open("ab") as file:
        file.write(b"\xde\xad")
    assert reasons() == ["2 bytes of half a row at the end"]
    write_index(tmp_path, rows[:-2])
    assert reasons() == ["2 records behind the last one in the index"]
    whole = dat.read_bytes()
    with dat.open("ab") as file:
        file.write(whole[rows[6][1] : rows[6][1] + 50])
    assert reasons() == [
        "2 records behind the last one in the index",
        "50 bytes of a record that is not whole at the end",
    ]
    write_index(tmp_path, [*rows, (77, 1 << 20, 50)])
    dat.write_bytes(whole)
    assert reasons()[0].startswith("1 row of the index name records behind the end of the data")
    write_index(tmp_path, [rows[0], (9, rows[0][1] + 8, 4), *rows[1:]])
    assert any(reason.startswith("needle 9 (#2) at [16-") for reason in reasons())
    idx.write_bytes(b"")
    assert reasons() == [f"the index is empty, the data is not ({len(whole)} bytes)"]
    idx.unlink()
    assert reasons() == ["the index is missing"]
    write_index(tmp_path, rows)
    dat.unlink()
    assert reasons() == ["the index has no data file"]


def test_super_block_and_vif(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    (tmp_path / "3.vif").write_text("no json")
    (finding,) = answer(capsys, "check", tmp_path)["findings"]
    assert finding["file"] == f"{tmp_path}/3.vif" and finding["level"] == "warning"
    (tmp_path / "3.vif").write_text('{"replication": "xyz"}')
    (finding,) = answer(capsys, "check", tmp_path)["findings"]
    assert "replication xyz" in finding["reason"]
    (tmp_path / "3.vif").unlink()
    overwrite(tmp_path / "3.dat", 0, b"\x09")
    (finding,) = answer(capsys, "check", tmp_path)["findings"]
    assert (finding["reason"], finding.get("offset")) == ("unknown version 9", 0)
    (tmp_path / "3.dat").write_bytes(b"\3\0")
    (finding,) = answer(capsys, "check", tmp_path)["findings"]
    assert finding["reason"] == "2 bytes are no super block"


def test_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    for name in ("3.torn-400", "3.idx.bak-20260101T000000Z", "3.cpd.kept"):
        (tmp_path / name).write_bytes(b"x")
    said = answer(capsys, "check", tmp_path)
    assert said["exit_code"] == 0, "what was put aside on purpose is no finding"
    assert {finding["level"] for finding in said["findings"]} == {"info"} and len(said["findings"]) == 3
    for name in ("3.note", "3.cpd", "3.cpx"):
        (tmp_path / name).write_bytes(b"x")
    said = answer(capsys, "check", tmp_path)
    assert said["exit_code"] == 1
    assert {Path(f["file"]).suffix for f in said["findings"] if f["level"] != "info"} == {".note", ".cpd", ".cpx"}


def test_one_id_in_two_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (finding,) = answer(capsys, "check", tmp_path / "a", tmp_path / "b")["findings"]
    assert finding["reason"] == f"volume 3 is also at {tmp_path}/a/3"


def test_choice_of_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, vid=3)
    filled(tmp_path, vid=4)
    assert [v["id"] for v in answer(capsys, "check", tmp_path)["volumes"]] == [3, 4]
    assert [v["id"] for v in answer(capsys, "check", "--volume-id", 4, tmp_path)["volumes"]] == [4]
    assert answer(capsys, "check", "--collection", "pics", tmp_path)["volumes"] == []
    status, _, err = command(capsys, "check", "--volume-id", 7, tmp_path)
    assert status == 2 and f"there is no volume 7 in {tmp_path}" in err


def test_index_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, idx = tmp_path / "data", tmp_path / "idx"
    idx.mkdir()
    volume = create(data, idx=idx)
    put(volume, 1, b"abc")
    volume.close()
    assert answer(capsys, "check", "--idx-dir", idx, data)["exit_code"] == 0
    assert answer(capsys, "check", data)["findings"][0]["reason"] == "the index is missing"


def test_could_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(capsys, "check", tmp_path / "nowhere")
    assert status == 2 and f"{tmp_path}/nowhere is no directory" in err
    assert command(capsys, "check")[0] == 2
    assert command(capsys, "check", "--bogus", tmp_path)[0] == 2
    assert command(capsys, "check", "--help")[0] == 0


_HOLD = """
import sys, time
from pyvolume.storage import scrub
from pyvolume.storage.dir_lock import lock_directory
lock = lock_directory(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["check", "fix", "export", "compact"])
def test_a_directory_that_a_server_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    filled(tmp_path)
    lock_directory(str(tmp_path)).release()
    before = contents(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        status, _, err = command(capsys, name, tmp_path)
    finally:
        holder.communicate("")
    assert status == 2
    assert f"process {holder.pid}" in err and "stop that server first" in err
    assert contents(tmp_path) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_go_server_is_seen_by_its_open_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes no lock: what tells is that it holds data files open for writing."""
    filled(tmp_path)
    code = "import sys; f = open(sys.argv[1], 'r+b'); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "3.dat")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        status, _, err = command(capsys, "check", tmp_path)
    finally:
        holder.communicate("")
    assert status == 2 and f"process {holder.pid}" in err and "3.dat open for writing" in err


def test_goes_on_where_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, state = tmp_path / "data", tmp_path / "state"
    volume = create(data)
    for key in range(1, 100):
        put(volume, key, bytes([key]) * 20_000)
    volume.close()
    rows = rows_in(data / "3.idx")
    for row in (rows[2], rows[80]):
        overwrite(data / "3.dat", row[1] + 500, b"\0\1")
    whole = answer(capsys, "check", data)["findings"]
    assert len(whole) == 2
    monkeypatch.setattr(scrub, "STEP_BYTES", 300_000)
    steps: list[int] = []

    def interrupt(point: str) -> None:
        if point == "scrub.step":
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(scrub, "fault", interrupt)
    status, _, err = command(capsys, "check", "--state", state, data)
    assert status == 2 and "interrupted" in err and state.exists()
    said = answer(capsys, "check", "--state", state, data)
    assert said["findings"] == whole
    assert 20 < said["volumes"][0]["records_read"] < 90, "not those that were read before"
    again = answer(capsys, "check", "--state", state, data)
    assert again["findings"] == whole and again["volumes"][0]["records_read"] == 0
    os.utime(data / "3.dat")
    assert answer(capsys, "check", "--state", state, data)["volumes"][0]["records_read"] == 99
    state.write_text("{}")
    status, _, err = command(capsys, "check", "--state", state, data)
    assert status == 2 and "not what an earlier check left" in err
