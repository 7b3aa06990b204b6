"""`pyvolume check`, `export`, `fix` of erasure coded volumes: Go's is clean, each kind of damage is named."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from offline_util import answer, command, contents
from storage_util import COOKIE, GOLDEN, config_of, put, rows_in, write_index

from pyvolume._native import engine
from pyvolume.storage.store import Store
from pyvolume.types import ReplicaPlacement

SHARDS = 14


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory with Go's erasure coded volume 51."""
    directory = tmp_path / "d0"
    directory.mkdir()
    for path in (GOLDEN / "ec" / "data").iterdir():
        if path.suffix == ".gz":
            (directory / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copy(path, directory / path.name)
    return directory


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def found(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [finding for finding in said["findings"] if finding["level"] != "info"]


def test_a_whole_volume_is_clean_and_left_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(volume)
    said = answer(capsys, "check", volume)
    assert (said["exit_code"], said["findings"], said["errors"]) == (0, [], [])
    (facts,) = said["volumes"]
    assert (facts["id"], facts["shards"], facts["rows"]) == (51, list(range(SHARDS)), 20)
    assert facts["records_read"] == 16 and not facts["unreadable"], "four are in the journal of deletes"
    assert contents(volume) == before


def test_shards_in_several_directories(volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "d1"
    other.mkdir()
    for number in range(8, SHARDS):
        shutil.move(volume / f"51.ec{number:02d}", other)
    assert answer(capsys, "check", volume, other)["findings"] == []
    alone = answer(capsys, "check", volume)
    assert alone["exit_code"] == 0, "the others are on other servers"
    assert "8 of 14 shards are here, 10 are needed; not here: 8 9 10 11 12 13" in alone["findings"][0]["reason"]


@pytest.mark.parametrize("shard", [0, 5, 12])
@pytest.mark.parametrize("sums", [True, False])
def test_a_damaged_shard_is_named(volume: Path, capsys: pytest.CaptureFixture[str], shard: int, sums: bool) -> None:
    overwrite(volume / f"51.ec{shard:02d}", 1000, b"damage")
    if not sums:
        (volume / "51.ecsum").unlink()
    said = answer(capsys, "check", volume)
    assert said["exit_code"] == 1
    (finding,) = found(said)
    assert (
        finding["file"] == f"{volume}/51.ec{shard:02d}" and finding["offset"] == 0 and "ec.rebuild" in finding["remedy"]
    )
    assert ("differs from its checksum in 1 block" if sums else "does not fit the others") in finding["reason"]
    assert said["volumes"][0]["damaged_shards"] == [shard] and not said["volumes"][0]["unreadable"]
    assert answer(capsys, "check", "--index-only", volume)["exit_code"] == 0


def test_a_shard_of_another_length(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(volume / "51.ec03", 1000)
    (finding,) = found(answer(capsys, "check", volume))
    assert finding["file"].endswith("51.ec03") and finding["reason"] == "the shard has 1000 bytes, not 1048576"


def test_checksums_that_are_damaged(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(volume / "51.ecsum", 20, b"\xff\xff")
    (finding,) = found(answer(capsys, "check", volume))
    assert finding["file"].endswith("51.ecsum") and "CRC mismatch" in finding["reason"]


@pytest.mark.parametrize("kind", ["ragged", "order", "range", "missing", "empty"])
def test_a_damaged_index(volume: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = volume / "51.ecx"
    data = path.read_bytes()
    damaged = {
        "ragged": data[:-5],
        "order": data[16:32] + data[:16] + data[32:],
        "range": data[:8] + b"\x7f" + data[9:],
        "empty": b"",
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[kind])
    said = answer(capsys, "check", "--index-only", volume)
    assert said["exit_code"] == 1
    (finding,) = found(said)
    words = {"ragged": "11 bytes of half a row", "order": "order of keys", "range": "ends behind the data"}
    assert words.get(kind, f"the index is {kind}") in finding["reason"]
    assert finding["file"] == str(path) and "pyvolume fix" in finding["remedy"]
    assert finding.get("offset") == {"ragged": 19 * 16, "order": 16, "range": 0}.get(kind)


def test_half_an_id_in_the_journal(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (volume / "51.ecj").open("ab") as file:
        file.write(b"abc")
    (finding,) = found(answer(capsys, "check", volume))
    assert finding["level"] == "warning" and finding["offset"] == 32


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_go_server_is_seen_by_the_index_that_it_has_open(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; f = open(sys.argv[1], 'r+b'); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(volume / "51.ecx")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        status, _, err = command(capsys, "check", volume)
    finally:
        holder.communicate("")
    assert status == 2 and err.count(f"process {holder.pid}") == 1 and "51.ecx open for writing" in err


def test_a_single_volume_may_be_asked_for(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "check", "--volume-id", 51, volume)["exit_code"] == 0
    assert answer(capsys, "check", "--volume-id", 52, volume)["exit_code"] == 2


# -- export -----------------------------------------------------------------------------------------------------------


def as_plain(volume: Path, target: Path) -> Path:
    """The plain volume that the shards are of, with the deletes of the journal."""
    target.mkdir()
    rows = rows_in(volume / "51.ecx")
    size = int(json.loads((volume / "51.vif").read_text())["datFileSize"])
    (target / "51.dat").write_bytes(b"".join((volume / f"51.ec{n:02d}").read_bytes() for n in range(10))[:size])
    deleted = (volume / "51.ecj").read_bytes()
    gone = [(int.from_bytes(deleted[at : at + 8], "big"), 0, -1) for at in range(0, len(deleted), 8)]
    write_index(target, sorted(rows, key=lambda row: row[1]) + gone, vid=51)
    return target


def exported(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("options", [[], ["--deleted"], ["--limit", "3"]])
def test_the_list_is_that_of_the_plain_volume(
    volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    plain = as_plain(volume, tmp_path / "plain")
    wanted = answer(capsys, "export", *options, plain)
    for number in (0, 1, 7, 12):
        (volume / f"51.ec{number:02d}").unlink()
    said = answer(capsys, "export", *options, volume)
    assert said["needles"] == wanted["needles"] and len(said["needles"]) >= 3
    assert said["exit_code"] == wanted["exit_code"] == 0


@pytest.mark.parametrize("damage", ["none", "four missing", "damaged"])
def test_the_files_are_those_of_the_plain_volume(
    volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    plain = as_plain(volume, tmp_path / "plain")
    if damage == "four missing":
        for number in (0, 3, 10, 11):
            (volume / f"51.ec{number:02d}").unlink()
    elif damage == "damaged":
        for _, offset, _ in rows_in(volume / "51.ecx"):
            overwrite(volume / "51.ec00", offset + 20, b"!?!?")
    assert command(capsys, "export", "-o", tmp_path / "a", plain)[0] == 0
    before = contents(volume)
    assert command(capsys, "export", "-o", tmp_path / "b", volume)[0] == 0
    assert exported(tmp_path / "a") == exported(tmp_path / "b") != {}
    assert contents(volume) == before


def test_five_missing_shards_are_too_many(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        (volume / f"51.ec{number:02d}").unlink()
    said = answer(capsys, "export", volume)
    assert said["exit_code"] == 2 and "9 usable shards of 10 that are needed" in said["errors"][0]


def test_damage_in_more_shards_than_can_be_made_is_told(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, offset, _ = max(rows_in(volume / "51.ecx"), key=lambda row: row[2])
    overwrite(volume / "51.ec00", offset + 25, b"!?!?")
    for number in range(10, 14):
        (volume / f"51.ec{number:02d}").unlink()
    (finding,) = answer(capsys, "export", volume)["findings"]
    assert (finding["key"], finding["offset"]) == (key, offset) and "CRC" in finding["reason"]


# -- fix --------------------------------------------------------------------------------------------------------------


def with_deletes(volume: Path) -> bytes:
    """The index as it was, with the deletes of the journal in it."""
    journal = (volume / "51.ecj").read_bytes()
    gone = {int.from_bytes(journal[at : at + 8], "big") for at in range(0, len(journal), 8)}
    rows = rows_in(volume / "51.ecx")
    assert gone <= {key for key, _, _ in rows}
    return engine.idx_pack(((key, offset, -1 if key in gone else size) for key, offset, size in rows), 4)


@pytest.mark.parametrize("kind", ["missing", "empty", "ragged", "order", "another record"])
def test_a_damaged_index_is_made_anew(volume: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = volume / "51.ecx"
    data = path.read_bytes()
    wanted = with_deletes(volume)
    damaged = {
        "empty": b"",
        "ragged": data[:-5],
        "order": data[16:32] + data[:16] + data[32:],
        "another record": data[:8] + data[24:28] + data[12:],
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[kind])
    for number in (0, 2, 3, 4):
        (volume / f"51.ec{number:02d}").unlink()
    before = contents(volume)
    said = answer(capsys, "fix", "--dry-run", volume)
    assert said["exit_code"] == 1 and "would be rebuilt" in said["findings"][-1]["reason"]
    assert contents(volume) == before
    said = answer(capsys, "fix", volume)
    (facts,) = said["volumes"]
    unknown = {"missing": 16, "empty": 16, "ragged": 1}.get(kind, 0)
    assert (said["exit_code"], facts["changed"], facts["live"], facts["rows"]) == (int(unknown > 0), True, 16, 20)
    assert facts["unknown"] == unknown
    assert path.read_bytes() == wanted
    after = contents(volume)
    if kind != "missing":
        assert Path(facts["backup"]).read_bytes() == damaged[kind]
    assert {name: after[name] for name in before if name != "51.ecx"} == {
        name: digest for name, digest in before.items() if name != "51.ecx"
    }
    assert found(answer(capsys, "check", volume)) == []
    assert answer(capsys, "fix", volume)["volumes"][0]["changed"] is False


def test_deletes_that_were_folded_into_a_lost_index_are_a_finding(
    volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come back, and nothing told so but a line that is no finding."""
    path = volume / "51.ecx"
    path.write_bytes(with_deletes(volume))
    (volume / "51.ecj").write_bytes(b"")
    mirror = volume.parent / "d1"
    mirror.mkdir()
    shutil.copy(path, mirror)
    shutil.move(volume / "51.ec13", mirror)
    path.write_bytes(b"")
    said = answer(capsys, "fix", volume, mirror)
    assert (said["exit_code"], said["volumes"][0]["unknown"], found(said)) == (0, 0, []), "the other disk's index knows"
    assert path.read_bytes() == (mirror / "51.ecx").read_bytes() == with_deletes(volume)
    for each in (path, mirror / "51.ecx"):
        each.unlink()
    said = answer(capsys, "fix", volume, mirror)
    (finding,) = found(said)
    assert (said["exit_code"], said["volumes"][0]["unknown"], said["volumes"][0]["live"]) == (1, 20, 20)
    assert finding["file"] == str(path) and finding["reason"].startswith("no row of an index is left of 20 needles")
    assert "folded" in finding["reason"] and "another server" in finding["remedy"]
    (volume / "51.ecj").unlink()
    path.unlink()
    (finding,) = found(answer(capsys, "fix", volume, mirror))
    assert "there is no journal (.ecj) either" in finding["reason"]


def test_an_index_that_is_right_is_left_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(volume)
    said = answer(capsys, "fix", volume)
    assert said["exit_code"] == 0 and not said["volumes"][0]["changed"]
    after = contents(volume)
    assert {name: after[name] for name in before} == before


def test_without_enough_shards_no_index_is_made(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (volume / "51.ecx").unlink()
    for number in range(5):
        (volume / f"51.ec{number:02d}").unlink()
    said = answer(capsys, "fix", volume)
    assert said["exit_code"] == 2 and "9 usable shards" in said["errors"][0]
    assert not (volume / "51.ecx").exists()


def test_shards_that_an_encode_left_get_no_index(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = as_plain(volume, volume / "plain")
    for name in ("51.dat", "51.idx"):
        shutil.move(plain / name, volume / name)
    plain.rmdir()
    (volume / "51.ecx").unlink()
    assert answer(capsys, "fix", volume)["errors"] == []
    assert not (volume / "51.ecx").exists(), "a start would take the shards for the volume"


def test_needles_of_a_damaged_shard_stay_in_the_index(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = with_deletes(volume)
    key, offset, _ = max(rows_in(volume / "51.ecx"), key=lambda row: row[2])
    overwrite(volume / "51.ec00", offset + 25, b"!?!?")
    (volume / "51.ecx").unlink()
    for number in range(10, 14):
        (volume / f"51.ec{number:02d}").unlink()
    said = answer(capsys, "fix", volume)
    finding, lost = found(said)
    assert (said["exit_code"], finding["key"], finding["offset"]) == (1, key, offset)
    assert "no row of an index is left of 16 needles" in lost["reason"]
    assert (volume / "51.ecx").read_bytes() == wanted


def test_records_across_shards_with_a_damaged_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The walk goes on behind a header that only the other shards tell."""
    directory = tmp_path / "d"
    directory.mkdir()
    store = Store(config_of(directory, max_volumes=8))
    store.load()
    plain = store.allocate_volume(3, "c", ReplicaPlacement.parse("000"))
    for key in range(1, 8):
        put(plain, key, bytes([key]) * (700_000 * key % 1_900_000 + 1))
    plain.delete_needle(4, COOKIE)
    plain.sync()
    assert command(capsys, "export", "-o", tmp_path / "a", _copy(directory, tmp_path / "copy"))[0] == 0
    store.generate_shards(3, "c", lambda: None)
    store.delete_volume(3)
    store.close()
    for suffix in (".dat", ".idx"):
        (directory / f"c_3{suffix}").unlink(missing_ok=True)
    ecx = directory / "c_3.ecx"
    wanted = ecx.read_bytes()
    offset = rows_in(ecx)[4][1]
    shard, within = divmod(offset, 1 << 20)
    overwrite(directory / f"c_3.ec{shard % 10:02d}", (shard // 10 << 20) + within, b"\xff" * 16)
    ecx.unlink()
    assert answer(capsys, "fix", directory)["exit_code"] == 1, "nobody knows what was deleted since"
    assert ecx.read_bytes() == wanted
    said = answer(capsys, "check", directory)
    assert said["volumes"][0]["damaged_shards"] == [shard % 10] and not said["volumes"][0]["unreadable"]
    (directory / "c_3.ec02").unlink()
    assert command(capsys, "export", "-o", tmp_path / "b", directory)[0] == 0
    assert exported(tmp_path / "a") == exported(tmp_path / "b") and len(exported(tmp_path / "b")) == 6


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for suffix in (".dat", ".idx"):
        shutil.copy(source / f"c_3{suffix}", target)
    return target
