"""Scrub of mounted volumes: what it finds and says, its rate, interruption and place to go on, and the RPC."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_util import COOKIE, create, golden, load, put, rows_in, write_index
from test_grpc_handlers import NOWHERE, Code, Node, plain, unknown

from pyvolume._native import engine
from pyvolume._native.scrub import ScrubStats
from pyvolume.errors import StorageError
from pyvolume.faults import set_points
from pyvolume.storage import compact, scrub
from pyvolume.storage.scrub import ScrubInterrupted, scrub_volume
from pyvolume.storage.scrub_state import ScrubState

INDEX, FULL, LOCAL = 1, 2, 3


def findings(volume: object, **more: object) -> list[str]:
    return scrub_volume(volume, **more).findings  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [4, 5])
def test_healthy_volume(tmp_path: Path, width: int) -> None:
    volume = create(tmp_path, width=width)
    for key in range(1, 30):
        put(volume, key, b"x" * key * 300)
    put(volume, 5, b"again")
    put(volume, 6, b"", flags=0)
    volume.delete_needle(7, COOKIE)
    for index_only in (True, False):
        report = scrub_volume(volume, index_only=index_only)
        assert report.findings == []
        assert report.total_files == 32, "overwrites and deletions are rows, too"
    volume.close()


@pytest.mark.parametrize("name", ["v3-basic", "own-v1", "own-v2", "own-v3", "own-5byte", "vacuumed", "empty", "ttl"])
def test_golden_volumes_are_clean(tmp_path: Path, name: str) -> None:
    golden(name, tmp_path)
    seen = 0
    for idx in sorted(tmp_path.glob("*.idx")):
        collection, _, vid = idx.stem.rpartition("_")
        try:
            volume = load(tmp_path, int(vid), collection, repair=False)
        except StorageError:
            continue
        assert findings(volume) == [], idx
        assert findings(volume, index_only=True) == []
        volume.close()
        seen += 1
    assert seen


def test_texts_of_every_finding(tmp_path: Path) -> None:
    volume = create(tmp_path)
    for key in range(1, 6):
        put(volume, key, b"x" * 100)
    rows = rows_in(tmp_path / "3.idx")
    dat = tmp_path / "3.dat"
    with dat.open("r+b") as file:
        file.seek(rows[3][1] + 30)
        file.write(b"!")
        file.seek(rows[1][1] + 12)
        file.write(b"\x01")
    with (tmp_path / "3.idx").open("ab") as file:
        file.write(b"\xde\xad")
    size, end = rows[0][2], dat.stat().st_size
    assert findings(volume) == [
        "expected an index file of size 82, got 80",
        "failed to read needle 2 on volume 3: EOF",
        "failed to read needle 4 on volume 3: invalid CRC for needle 4 "
        f"(got {_crc():08x}, want {_stored(dat, rows[3]):08x}), data on disk corrupted: needle data corrupted",
    ]
    assert findings(volume, index_only=True) == ["expected an index file of size 82, got 80"]

    write_index(tmp_path, [rows[0], (9, rows[0][1] + 8, size), *rows[1:]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(volume), "idx_path", str(tmp_path / "3.idx"))
        found = findings(volume, index_only=True)
    first, step = rows[0][1], rows[1][1] - rows[0][1]
    assert found == [
        f"needle 9 (#2) at [{first + 8}-{first + 8 + step - 1}] overlaps needle 1 at [{first}-{first + step - 1}]",
        f"needle 2 (#3) at [{rows[1][1]}-{rows[1][1] + step - 1}] "
        f"overlaps needle 9 at [{first + 8}-{first + 8 + step - 1}]",
    ]
    write_index(tmp_path, rows[:-1])
    assert findings(volume)[-1] == (
        f"data file size for volume 3 ({end}) doesn't match the size for 4 needles read ({end - step})"
    )
    write_index(tmp_path, [*rows, (7, end, size)])
    assert findings(volume)[-2:] == [
        "failed to read needle 7 on volume 3: EOF",
        f"data file for volume 3 is smaller ({end}) than the 6 needles it contains ({end + step})",
    ]
    (tmp_path / "3.idx").write_bytes(b"")
    assert scrub_volume(volume) == scrub.ScrubReport(0, [f"zero-size IDX file for volume 3 with store size {end}"])
    (tmp_path / "3.idx").unlink()
    assert findings(volume) == [
        f"failed to open IDX file {tmp_path}/3.idx for volume 3: open {tmp_path}/3.idx: no such file or directory"
    ]
    write_index(tmp_path, rows)
    volume.close()
    assert findings(volume) == ["volume 3 has no data backend"]


def _crc() -> int:
    data = bytearray(b"x" * 100)
    data[10] = ord("!")
    return engine.crc32c(data)


def _stored(dat: Path, row: tuple[int, int, int]) -> int:
    at = row[1] + 16 + row[2]
    return int.from_bytes(dat.read_bytes()[at : at + 4], "big")


def test_empty_volume_is_clean(tmp_path: Path) -> None:
    volume = create(tmp_path)
    assert findings(volume) == [] and findings(volume, index_only=True) == []
    volume.close()


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = create(tmp_path)
    for key in range(1, 200):
        put(volume, key, bytes([key]) * 20_000)
    rows = rows_in(tmp_path / "3.idx")
    with (tmp_path / "3.dat").open("r+b") as file:
        for row in (rows[2], rows[150]):
            file.seek(row[1] + 500)
            file.write(b"\0\1")
    whole = findings(volume)
    assert len(whole) == 2
    monkeypatch.setattr(scrub, "STEP_BYTES", 300_000)

    def half(stats: ScrubStats) -> bool:
        return stats.position < 2_000_000

    with pytest.raises(ScrubInterrupted) as stopped:
        scrub_volume(volume, go_on=half)
    position = stopped.value.position
    assert 2_000_000 <= position.offset < 3_500_000 and [row for row, _ in position.findings] == [2]
    seen: list[int] = []

    def note(stats: ScrubStats) -> bool:
        seen.append(stats.checked_records)
        return True

    report = scrub_volume(volume, resume=position, go_on=note)
    assert report.findings == whole
    assert report.total_files == 199
    assert seen[-1] < 110, "what was read before is not read again"

    # after a vacuum the position means nothing: all is read again, and old findings are not repeated
    with (tmp_path / "3.dat").open("r+b") as file:
        for row in (rows[2], rows[150]):
            file.seek(row[1] + 500)
            file.write(bytes([row[0]]) * 2)
    compact.compact(volume)
    compact.commit(volume)
    assert scrub_volume(volume, resume=position, go_on=note).findings == []
    assert seen[-1] == 199
    volume.close()


def test_rate_is_kept_and_stops_at_once(tmp_path: Path) -> None:
    volume = create(tmp_path)
    for key in range(1, 41):
        put(volume, key, b"y" * 50_000)
    began = time.monotonic()
    assert findings(volume, bytes_per_s=4_000_000) == []
    assert 0.2 < time.monotonic() - began < 5
    began = time.monotonic()
    with pytest.raises(ScrubInterrupted):
        scrub_volume(volume, bytes_per_s=1000, go_on=lambda _stats: time.monotonic() - began < 0.2)
    assert time.monotonic() - began < 3
    volume.close()


def test_writes_deletes_and_vacuums_go_on(tmp_path: Path) -> None:
    """Nothing that a working volume does is a finding, and nothing waits for the scrub."""
    volume = create(tmp_path)
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        key = 0
        try:
            while not stop.is_set():
                key = key % 300 + 1
                put(volume, key, os.urandom(500 + key))
                if key % 5 == 0:
                    volume.delete_needle(key - 2, COOKIE)
        except BaseException as exc:
            failures.append(exc)

    def vacuum() -> None:
        try:
            while not stop.is_set():
                compact.compact(volume)
                compact.commit(volume)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=target) for target in (write, vacuum)]
    for thread in threads:
        thread.start()
    try:
        deadline_s, rounds = time.monotonic() + 60, 0
        while (rounds < 20 or volume.compaction_revision < 3) and time.monotonic() < deadline_s:
            assert findings(volume) == []
            rounds += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert volume.compaction_revision >= 3
    volume.close()


# ------------------------------------------------------------------------------------------ going on after a restart


def long_volume(directory: Path, bad_row: int = 2) -> scrub.ScrubPosition:
    """A closed volume of 4 MB with a damaged record, and where a scrub stands in its middle."""
    volume = create(directory)
    for key in range(1, 200):
        put(volume, key, bytes([key]) * 20_000)
    row = rows_in(directory / "3.idx")[bad_row]
    with (directory / "3.dat").open("r+b") as file:
        file.seek(row[1] + 500)
        file.write(b"\0\1")
    volume.close()
    return scrub.ScrubPosition(rows_in(directory / "3.idx")[100][1], 0, ((bad_row, "failed to read needle 3"),))


def test_place_of_a_scrub_outlives_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = long_volume(tmp_path)
    volume = load(tmp_path, 3)
    state = ScrubState(volume)
    assert state.position is None
    state.note(place)
    assert not (tmp_path / "3.scrub").exists(), "not at each step"
    state.save(place)
    volume.close()
    volume = load(tmp_path, 3)
    with caplog.at_level("INFO"):
        state = ScrubState(volume)
    assert state.position == place
    assert f"volume 3: the scrub goes on at offset {place.offset}" in caplog.text
    checked: list[int] = []
    report = scrub_volume(volume, resume=state.position, go_on=lambda s: checked.append(s.checked_records) or True)
    assert report.findings == ["failed to read needle 3"] and checked[-1] == 99
    state.save(report.position)
    assert ScrubState(volume).position == report.position
    state.forget()
    assert ScrubState(volume).position is None
    state.save(place)
    volume.destroy()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["vacuum", "another file", "a day", "the clock", "shorter"])
def test_place_of_a_scrub_that_means_nothing_any_more(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = long_volume(tmp_path)
    volume = load(tmp_path, 3)
    ScrubState(volume).save(place)
    if change == "vacuum":
        compact.compact(volume)
        compact.commit(volume)
    elif change == "another file":
        shutil.copy(tmp_path / "3.dat", tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / "3.dat")
    elif change == "shorter":
        os.truncate(tmp_path / "3.dat", place.offset - 8)
    else:
        now = time.time() + (24 * 3600 + 1 if change == "a day" else -1000)
        monkeypatch.setattr(time, "time", lambda: now)
    assert ScrubState(volume).position is None
    volume.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1, "offset": -8, "revision": 0, "began_s": 0, "inode": 0, "findings": []}',
        b'{"format": 1, "offset": true, "revision": 0, "began_s": 0, "inode": 0, "findings": []}',
        b'{"format": 1, "offset": 8, "revision": 0, "began_s": 0, "inode": 0, "findings": [[1, 2]]}',
        b'{"format": 1, "offset": 8, "revision": 0, "began_s": 0, "inode": 0, "findings": [7]}',
        b'{"format": 1, "offset": 8, "revision": 0, "began_s": 0, "inode": 0, "findings": null}',
        b" " * (2 << 20),
    ],
)
def test_damaged_place_of_a_scrub_is_passed_over(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    volume = create(tmp_path)
    (tmp_path / "3.scrub").write_bytes(content)
    assert ScrubState(volume).position is None
    assert f"{tmp_path}/3.scrub" in caplog.text and "the scrub begins anew" in caplog.text
    volume.close()


def test_place_that_cannot_be_noted_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = long_volume(tmp_path)
    volume = load(tmp_path, 3)
    state = ScrubState(volume)
    with set_points("scrub.state.write=error:ENOSPC"):
        state.save(place), state.save(place)
    assert caplog.text.count("noting where the scrub is") == 1
    assert not list(tmp_path.glob("3.scrub*"))
    many = tuple((row, "text") for row in range(1001))
    state.save(scrub.ScrubPosition(place.offset, 0, many))
    assert ScrubState(volume).position is None, "what is too much is found again"
    volume.close()


# ------------------------------------------------------------------------------------------------------------- the RPC


def test_scrub_cut_short_goes_on_in_the_next_call(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for vid in (1, 2):
        node.alloc(vid)
        for key in range(1, 60):
            node.put(vid, key, bytes([key]) * 20_000)
    monkeypatch.setattr(scrub, "STEP_BYTES", 200_000)
    checked: list[int] = []  # records read, by scrub
    run = scrub.run

    def cut(scrubbing: object, rate: int) -> Iterator[ScrubStats]:
        checked.append(0)
        for stats in run(scrubbing, rate):  # type: ignore[arg-type]
            checked[-1] = stats.checked_records
            if len(checked) == 2 and stats.checked_records > 20:
                node.context.stopping.set()
            yield stats

    monkeypatch.setattr(scrub, "run", cut)
    assert node.call("ScrubVolume", mode=FULL).code is not Code.OK
    assert checked[0] == 59 and 20 < checked[1] < 59
    places = {vid: next(p for d in (0, 1) if (p := node.file(f"{vid}.dat", d)).exists()) for vid in (1, 2)}
    left = [place.with_suffix(".scrub") for place in places.values()]
    assert all(path.exists() for path in left), "the first is done, the second half done"
    node.context.stopping.clear()
    answer = node.call("ScrubVolume", mode=FULL).first
    assert (answer.total_volumes, answer.total_files, list(answer.details)) == (2, 118, [])
    assert checked[2] == 0 and checked[3] in (59 - checked[1], 60 - checked[1])
    assert not any(path.exists() for path in left)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def filled(node: Node, vid: int) -> None:
    node.alloc(vid)
    for key in range(1, 4):
        node.put(vid, key, b"x" * 500)


def damage(node: Node, vid: int) -> None:
    """Appends two bytes to the index of a volume that is open."""
    path = next(p for d in (0, 1) if (p := node.file(f"{vid}.idx", d)).exists())
    with path.open("ab") as file:
        file.write(b"\xde\xad")


def test_all_volumes_or_those_named(node: Node) -> None:
    for vid in (1, 2, 3):
        filled(node, vid)
    for mode in (INDEX, FULL, LOCAL):
        answer = node.call("ScrubVolume", mode=mode).first
        assert (answer.total_volumes, answer.total_files) == (3, 9)
        assert not answer.broken_volume_ids and not answer.details
    assert node.call("ScrubVolume", mode=FULL, volume_ids=[2, 2]).first.total_volumes == 2
    damage(node, 2)
    answer = node.call("ScrubVolume", mode=INDEX).first
    assert list(answer.broken_volume_ids) == [2]
    assert list(answer.details) == ["expected an index file of size 50, got 48"]
    assert not node.store.find_volume(2).is_read_only  # type: ignore[union-attr]


def test_refusals(node: Node) -> None:
    assert node.call("ScrubVolume", mode=0).code is Code.OK, "without volumes nobody looks at the mode"
    filled(node, 1)
    for mode in (0, 4, 9):
        assert plain(node.call("ScrubVolume", mode=mode)) == unknown(f"unsupported volume scrub mode {mode}")
    answer = node.call("ScrubVolume", mode=INDEX, volume_ids=[1, NOWHERE])
    assert plain(answer) == unknown(f"volume id {NOWHERE} not found")


def test_broken_volumes_are_marked(node: Node) -> None:
    for vid in (1, 2):
        filled(node, vid)
    damage(node, 1)
    answer = node.call("ScrubVolume", mode=FULL, mark_broken_volumes_readonly=True).first
    assert list(answer.details) == ["expected an index file of size 50, got 48", "volume 1 is now read-only"]
    assert node.store.find_volume(1).is_read_only  # type: ignore[union-attr]
    assert not node.store.find_volume(2).is_read_only  # type: ignore[union-attr]
    assert [mark.volume_id for mark in node.marks] == [1, 1]
    vif = next(p for d in (0, 1) if (p := node.file("1.vif", d)).exists())
    assert '"readOnly":  true' in vif.read_text()


def test_findings_outlive_a_volume_that_cannot_be_marked(node: Node) -> None:
    """Departure A7: upstream fails the call and keeps what it found to itself."""
    filled(node, 1)
    damage(node, 1)
    node.mark_failure = "no leader"
    answer = node.call("ScrubVolume", mode=INDEX, mark_broken_volumes_readonly=True)
    assert answer.code is Code.OK
    assert list(answer.first.broken_volume_ids) == [1]
    assert answer.first.details[0] == "expected an index file of size 50, got 48"
    assert "no leader" in answer.first.details[1]
    assert not node.store.find_volume(1).is_read_only  # type: ignore[union-attr]
    node.mark_failure = ""
    state = node.call("GetState").first.state
    node.call("SetState", state={"maintenance": True, "version": state.version})
    answer = node.call("ScrubVolume", mode=INDEX, mark_broken_volumes_readonly=True)
    assert answer.code is Code.OK
    assert list(answer.first.details) == [
        "expected an index file of size 50, got 48",
        "volume server 127.0.0.1:8081 is in maintenance mode",
    ]


def test_a_copy_of_the_index_in_place_of_it_is_looked_at(tmp_path: Path) -> None:
    volume = create(tmp_path)
    put(volume, 1, b"abc")
    shutil.copy(tmp_path / "3.idx", tmp_path / "copy")
    os.replace(tmp_path / "copy", tmp_path / "3.idx")
    assert findings(volume) == []
    volume.close()
