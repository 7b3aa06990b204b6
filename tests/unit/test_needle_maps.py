"""All kinds of needle maps by one suite: memory, the leveldb kinds on rocksdict, the sorted file; both offset widths.

What is particular to the kinds on disk (watermark, damage, vacuum, idling) follows below.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from storage_util import COOKIE, PLAIN, config_of, data_of, put, rows_in

from pyvolume._native import engine
from pyvolume._native.outside import LiveIndex
from pyvolume.errors import DiskError, NeedleDeleted, NeedleNotFound, StorageError, VolumeReadOnly
from pyvolume.server import lifecycle
from pyvolume.storage import compact, needle_map
from pyvolume.storage.mapped_volume import MappedVolume
from pyvolume.storage.needle_map import RocksMap, RocksMaps, Value
from pyvolume.storage.store import Store
from pyvolume.storage.volume import Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement

ON_DISK = ("leveldb", "leveldbMedium", "leveldbLarge")
WRITABLE = ("memory", *ON_DISK)
WIDTHS = (4, 5)


@dataclass
class Bed:
    """One volume of a kind in a directory; `sorted` is written as memory and reopened without writes."""

    directory: Path
    kind: str
    width: int
    opened: list[Volume] = field(default_factory=list)

    @property
    def options(self) -> LoadOptions:
        kind = "memory" if self.kind == "sorted" else self.kind
        return LoadOptions(offset_width=self.width, index_kind=kind)

    def create(self) -> Volume:
        self.directory.mkdir(parents=True, exist_ok=True)
        place = str(self.directory)
        volume = create_volume(place, place, "", 3, replica_placement=PLAIN, options=self.options)
        self.opened.append(volume)
        return volume

    def load(self, directory: Path | None = None, kind: str | None = None) -> Volume:
        place = str(directory or self.directory)
        options = self.options if kind is None else LoadOptions(offset_width=self.width, index_kind=kind)
        volume = load_volume(place, place, "", 3, options=options)
        self.opened.append(volume)
        return volume

    def reopen(self, volume: Volume) -> Volume:
        if self.kind == "sorted" and not volume.no_write_can_delete:
            volume.set_read_only(can_delete=True, persist=True)
        volume.close()
        return self.load()

    def killed(self) -> Path:
        """The files as a kill at this moment would leave them."""
        copy = self.directory.with_name(f"{self.directory.name}-killed{len(self.opened)}")
        for _ in range(20):
            try:
                return Path(shutil.copytree(self.directory, copy))
            except shutil.Error:  # RocksDB removed a table meanwhile
                shutil.rmtree(copy)
        raise AssertionError("the files of the map never stand still")

    @property
    def idx(self) -> Path:
        return self.directory / "3.idx"


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def bed_of(tmp_path: Path, kind: str, width: int) -> Iterator[Bed]:
    bed = Bed(tmp_path / "v", kind, width)
    yield bed
    for volume in bed.opened:
        volume.close()


@pytest.fixture(params=[*WRITABLE, "sorted"])
def bed(request: pytest.FixtureRequest, tmp_path: Path, width: int) -> Iterator[Bed]:
    yield from bed_of(tmp_path, request.param, width)


@pytest.fixture(params=WRITABLE)
def writable(request: pytest.FixtureRequest, tmp_path: Path, width: int) -> Iterator[Bed]:
    yield from bed_of(tmp_path, request.param, width)


@pytest.fixture
def disk(tmp_path: Path, width: int) -> Iterator[Bed]:
    """One kind stands for the three: they differ in sizes only."""
    yield from bed_of(tmp_path, "leveldb", width)


def map_of(volume: Volume) -> RocksMap:
    assert isinstance(volume.handle, MappedVolume)
    return volume.handle.map


def databases(bed: Bed) -> list[str]:
    """What is in the directory of maps, but for notes of clean closes."""
    return sorted(name for name in os.listdir(bed.directory / "3.rocks") if not name.endswith(".state"))


def counters(volume: Volume) -> tuple[int, int, int, int]:
    stat = volume.stat()
    return stat.file_count, stat.deleted_count, stat.deleted_bytes, stat.file_bytes


def gone(volume: Volume, *keys: int) -> bool:
    for key in keys:
        try:
            volume.read_needle(key)
        except NeedleNotFound:
            continue
        return False
    return True


def counted_by_the_index(bed: Bed, idx: Path | None = None) -> tuple[int, int, int, int]:
    """Upstream's counters after a reload of the leveldb and sorted kinds, the plain way."""
    last: dict[int, int] = {}
    files = content = deleted = deleted_bytes = 0
    for key, _, size in reversed(rows_in(idx or bed.idx, bed.width)):
        files += 1
        content += max(size, 0)
        if key in last or size <= 0:
            deleted += 1
        if key in last:
            deleted_bytes += max(size, 0)
        last.setdefault(key, size)
    return files, deleted, deleted_bytes, content


# ------------------------------------------------------------------------------------------------------- every kind


def test_what_was_put_is_found(writable: Bed) -> None:
    volume = writable.create()
    for key in (1, 2, 300, 2**64 - 1, 0):
        put(volume, key, b"data %d" % key)
    for key in (1, 2, 300, 2**64 - 1, 0):
        assert data_of(volume, key) == b"data %d" % key
        assert volume.lookup(key).offset > 0
    assert gone(volume, 3, 299, 2**63)
    with pytest.raises(NeedleNotFound):
        volume.lookup(3)
    assert volume.max_file_key == 2**64 - 1


def test_an_overwrite_replaces(writable: Bed) -> None:
    volume = writable.create()
    put(volume, 1, b"old")
    first = volume.lookup(1)
    assert put(volume, 1, b"old").unchanged
    assert volume.lookup(1) == first
    put(volume, 1, b"new")
    assert data_of(volume, 1) == b"new"
    assert volume.lookup(1).offset > first.offset
    volume = writable.reopen(volume)
    assert data_of(volume, 1) == b"new"


def test_a_deleted_key_can_be_read_as_deleted_and_written_again(writable: Bed) -> None:
    volume = writable.create()
    size = put(volume, 1, b"gone").size
    assert volume.delete_needle(1, COOKIE) == size
    assert volume.delete_needle(1, COOKIE) == 0
    assert volume.delete_needle(2, COOKIE) == 0
    with pytest.raises(NeedleDeleted):
        volume.read_needle(1)
    assert bytes(volume.read_needle(1, read_deleted=True).data or b"") == b"gone"
    assert volume.lookup(1).size == -size
    assert len(rows_in(writable.idx, writable.width)) == 2
    volume = writable.reopen(volume)
    assert bytes(volume.read_needle(1, read_deleted=True).data or b"") == b"gone"
    put(volume, 1, b"back")
    assert data_of(volume, 1) == b"back"


def test_reload_finds_the_same(bed: Bed) -> None:
    volume = bed.create()
    expected = {key: b"%d" % key for key in range(1, 2500, 3)}
    for key, data in expected.items():
        put(volume, key, data)
    for key in list(expected)[::7]:
        volume.delete_needle(key, COOKIE)
        del expected[key]
    for key in list(expected)[::5]:
        put(volume, key, b"again")
        expected[key] = b"again"
    for _ in range(2):
        volume = bed.reopen(volume)
        assert {key: data_of(volume, key) for key in expected} == expected
        assert gone(volume, *(key for key in range(2500) if key not in expected))
        assert volume.max_file_key == 2497


def test_counters_of_each_kind(bed: Bed) -> None:
    """Contract storage.md 15: 4 puts, one of them empty, 2 deletes, one of them of the empty file."""
    volume = bed.create()
    sizes = [put(volume, key, data).size for key, data in ((1, b"first"), (2, b""), (3, b"third"), (4, b"fourth"))]
    volume.delete_needle(1, COOKIE)
    volume.delete_needle(2, COOKIE)
    content, deleted = sum(sizes), sizes[0]
    assert counters(volume) == (4, 1, deleted, content)
    volume = bed.reopen(volume)
    if bed.kind == "memory":
        assert counters(volume) == (4, 2, deleted, content)
    else:
        assert counters(volume) == (6, 4, deleted, content) == counted_by_the_index(bed)
    if bed.kind == "sorted":
        assert volume.delete_needle(3, COOKIE) == sizes[2]
        assert counters(volume) == (6, 4, deleted, content)
        with pytest.raises(VolumeReadOnly):
            put(volume, 9, b"no")
        assert gone(volume, 3)
        return
    before = counters(volume)
    put(volume, 3, b"overwritten")
    assert counters(volume)[:3] == (before[0] + 1, before[1] + 1, before[2] + sizes[2])
    volume.delete_needle(4, COOKIE)
    assert counters(volume)[1:3] == (before[1] + 2, before[2] + sizes[2] + sizes[3])


def test_deletes_of_a_sorted_file_last(tmp_path: Path, width: int) -> None:
    for bed in bed_of(tmp_path, "sorted", width):
        volume = bed.create()
        for key in range(1, 200):
            put(volume, key, b"%d" % key)
        volume = bed.reopen(volume)
        assert not volume.is_mapped
        assert volume.delete_needle(77, COOKIE) > 0
        volume = bed.reopen(volume)
        assert gone(volume, 77)
        with pytest.raises(NeedleNotFound):
            volume.read_needle(77, read_deleted=True)
        assert data_of(volume, 78) == b"78"


def test_vacuum(writable: Bed) -> None:
    volume = writable.create()
    sizes = {key: put(volume, key, b"needle %d" % key).size for key in range(1, 101)}
    for key in range(1, 51):
        volume.delete_needle(key, COOKIE)
    assert compact.compact(volume) is not None
    put(volume, 60, b"overwritten meanwhile")
    put(volume, 500, b"new meanwhile")
    volume.delete_needle(70, COOKIE)
    assert compact.commit(volume)
    assert volume.compaction_revision == 1
    assert volume.max_file_key == 500
    assert data_of(volume, 60) == b"overwritten meanwhile"
    assert data_of(volume, 500) == b"new meanwhile"
    assert gone(volume, 70, *range(1, 51))
    assert data_of(volume, 99) == b"needle 99"
    assert counters(volume)[:3] == (50 + 3, 2, sizes[60] + sizes[70])
    put(volume, 99, b"after")
    assert data_of(volume, 99) == b"after"
    assert volume.delete_needle(98, COOKIE) == sizes[98]
    assert sorted(path.name for path in writable.directory.iterdir() if path.suffix not in (".rocks",)) == [
        "3.dat",
        "3.idx",
        "3.vif",
    ]
    volume = writable.reopen(volume)
    assert data_of(volume, 99) == b"after"
    assert gone(volume, 98, 70)


@pytest.mark.parametrize("fsync", [False, True])
def test_writers_of_one_key_and_of_many(writable: Bed, fsync: bool) -> None:
    """The order of a key's rows in the index is that of its entries in the map."""
    volume = writable.create()
    count = 8 if fsync else 60

    def work(me: int) -> None:
        for turn in range(count):
            volume.write_needle(needle(5, b"%d-%d" % (me, turn)), fsync=fsync)
            volume.write_needle(needle(1000 + me, b"%d" % turn), fsync=fsync)
            if turn % 3 == me % 3:
                volume.delete_needle(5, COOKIE)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = [row for row in rows_in(writable.idx, writable.width) if row[0] == 5][-1]
    if last[2] < 0:
        assert gone(volume, 5)
    else:
        assert volume.lookup(5)[:2] == last[1:]
    for me in range(4):
        assert data_of(volume, 1000 + me) == b"%d" % (count - 1)
    found = None if last[2] < 0 else data_of(volume, 5)
    volume = writable.reopen(volume)
    assert gone(volume, 5) if found is None else data_of(volume, 5) == found


def needle(key: int, data: bytes) -> object:
    from pyvolume.storage.volume import NeedleIn

    return NeedleIn(key, COOKIE, data, flags=0x0E, last_modified_s=1_700_000_000)


# ------------------------------------------------------------------------------------------------ kinds on disk: start


def test_a_deleted_empty_file_stays_live_until_the_map_is_made_anew(disk: Bed) -> None:
    """Upstream's trap (contract storage.md 15); each further delete appends another tombstone."""
    volume = disk.create()
    put(volume, 1, b"")
    for rows in (2, 3):
        assert volume.delete_needle(1, COOKIE) == 0
        assert volume.read_needle(1).empty
        assert len(rows_in(disk.idx, disk.width)) == rows
    volume = disk.reopen(volume)
    assert volume.read_needle(1).empty
    volume.close()
    shutil.rmtree(disk.directory / "3.rocks")
    assert gone(disk.load(), 1)


def test_a_clean_start_uses_what_is_there(disk: Bed) -> None:
    volume = disk.create()
    for key in range(3000):
        put(volume, key, b"%d" % key)
    volume = disk.reopen(volume)
    assert counters(volume) == counted_by_the_index(disk)
    assert volume.stat().map_entries == 3000
    assert not map_of(volume).is_loaded  # on the first use
    assert data_of(volume, 2999) == b"2999"
    assert map_of(volume).is_loaded
    assert not map_of(volume).built


def test_a_volume_nobody_asks_is_closed_as_it_was(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.close()
    note = disk.directory / "3.rocks" / "00000.state"
    before = note.stat().st_mtime_ns
    for _ in range(2):
        disk.load().close()
    assert note.stat().st_mtime_ns == before
    volume = disk.load()
    volume.delete_needle(1, COOKIE)
    volume.close()
    assert note.stat().st_mtime_ns > before
    volume = disk.load()
    assert gone(volume, 1)
    assert bytes(volume.read_needle(1, read_deleted=True).data or b"") == b"one"


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: raw[:20] + b"?" + raw[21:]]
)
def test_a_note_that_is_not_whole_counts_for_nothing(disk: Bed, spoil: Callable[[bytes], bytes]) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.close()
    note = disk.directory / "3.rocks" / "00000.state"
    note.write_bytes(spoil(note.read_bytes()))
    volume = disk.load()
    assert map_of(volume).is_loaded
    assert data_of(volume, 1) == b"one"


def test_a_database_behind_its_note_is_brought_up_to_date_as_from_an_index(disk: Bed) -> None:
    """A note that a power loss left beside an older database."""
    volume = disk.create()
    put(volume, 1, b"")
    put(volume, 2, b"two")
    volume.close()
    older = disk.directory.with_name("older")
    shutil.copytree(disk.directory / "3.rocks" / "00000", older)
    volume = disk.load()
    volume.delete_needle(1, COOKIE)
    volume.delete_needle(2, COOKIE)
    put(volume, 3, b"three")
    volume.close()
    shutil.rmtree(disk.directory / "3.rocks" / "00000")
    os.rename(older, disk.directory / "3.rocks" / "00000")
    volume = disk.load()
    assert counters(volume) == counted_by_the_index(disk)
    assert gone(volume, 1, 2)
    assert data_of(volume, 3) == b"three"


@pytest.mark.parametrize("changes", [0, 1, 1000, 1500, 5000])
def test_after_a_kill_only_the_tail_is_replayed(disk: Bed, changes: int) -> None:
    volume = disk.create()
    for key in range(1, 101):
        put(volume, key, b"%d" % key)
    volume = disk.reopen(volume)
    for turn in range(changes):
        if turn % 5 == 4:
            volume.delete_needle(turn % 97, COOKIE)
        else:
            put(volume, turn % 97 if turn % 2 else turn, b"turn %d" % turn)
    killed = disk.killed()
    again = disk.load(killed)
    assert not map_of(again).built
    assert counters(again) == counted_by_the_index(disk, killed / "3.idx")
    for key in range(max(101, changes)):
        if gone(volume, key):
            assert gone(again, key)
        else:
            assert data_of(again, key) == data_of(volume, key)


def test_a_kill_before_the_first_close_leaves_an_index_to_start_from(disk: Bed) -> None:
    volume = disk.create()
    for key in range(1, 2000):
        put(volume, key, b"%d" % key)
    again = disk.load(disk.killed())
    assert [data_of(again, key) for key in (1, 1024, 1999)] == [b"1", b"1024", b"1999"]
    assert counters(again) == counted_by_the_index(disk)


def test_rows_of_another_server_are_taken_up(disk: Bed) -> None:
    """Go, or this server with another kind, has served the volume in between: the index is the truth."""
    volume = disk.create()
    for key in range(1, 11):
        put(volume, key, b"%d" % key)
    put(volume, 11, b"")
    volume.close()
    other = disk.load(kind="memory")
    put(other, 3, b"three")
    put(other, 20, b"twenty")
    other.delete_needle(4, COOKIE)
    other.delete_needle(11, COOKIE)
    other.close()
    volume = disk.load()
    assert not map_of(volume).built
    assert data_of(volume, 3) == b"three"
    assert data_of(volume, 20) == b"twenty"
    assert gone(volume, 4, 11)
    assert data_of(volume, 5) == b"5"
    assert counters(volume) == counted_by_the_index(disk)


def test_a_directory_goes_back_and_forth_between_kinds(disk: Bed) -> None:
    """Each kind may open what another left, and upstream's own map beside ours is nobody's business here."""
    volume = disk.create()
    (disk.directory / "3.ldb").mkdir()
    (disk.directory / "3.ldb" / "CURRENT").write_text("MANIFEST-000001\n")
    for turn, kind in enumerate(("memory", "leveldb", "leveldbLarge", "memory", "leveldbMedium")):
        put(volume, turn, b"turn %d" % turn)
        volume.close()
        volume = disk.load(kind=kind)
        assert [data_of(volume, key) for key in range(turn + 1)] == [b"turn %d" % key for key in range(turn + 1)]
    assert os.listdir(disk.directory / "3.ldb") == ["CURRENT"]


def test_a_tail_too_long_is_no_reason_to_replay(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.close()
    monkeypatch.setattr(needle_map, "REPLAY_ROWS", 10)
    other = disk.load(kind="memory")
    for key in range(2, 15):
        put(other, key, b"%d" % key)
    other.close()
    volume = disk.load()
    assert map_of(volume).built
    assert data_of(volume, 14) == b"14"


def shorten(bed: Bed) -> None:
    os.truncate(bed.idx, 50 * (12 + bed.width))


def other_rows(bed: Bed) -> None:
    """As an offline fix would: the same rows in another order."""
    size = 12 + bed.width
    content = bed.idx.read_bytes()
    rows = [content[at : at + size] for at in range(0, len(content), size)]
    bed.idx.write_bytes(b"".join([rows[1], rows[0], *rows[2:]]))


def next_revision(bed: Bed) -> None:
    path = bed.directory / "3.dat"
    content = bytearray(path.read_bytes())
    content[4:6] = (7).to_bytes(2, "big")
    path.write_bytes(content)


def a_copy_for_the_next_revision(bed: Bed) -> None:
    next_revision(bed)
    os.rename(bed.directory / "3.rocks" / "00000", bed.directory / "3.rocks" / "00007")


def cut_tables(bed: Bed) -> None:
    for path in (bed.directory / "3.rocks" / "00000").glob("*.sst"):
        os.truncate(path, path.stat().st_size // 2)


def zero_tables(bed: Bed) -> None:
    for path in (bed.directory / "3.rocks" / "00000").glob("*.sst"):
        path.write_bytes(bytes(path.stat().st_size))


def remove(pattern: str) -> Callable[[Bed], None]:
    def run(bed: Bed) -> None:
        for path in (bed.directory / "3.rocks" / "00000").glob(pattern):
            path.unlink()

    return run


def a_file_instead(bed: Bed) -> None:
    shutil.rmtree(bed.directory / "3.rocks" / "00000")
    (bed.directory / "3.rocks" / "00000").write_text("?")


def another_map(bed: Bed) -> None:
    """The database of another volume, whole and consistent by itself."""
    other = Bed(bed.directory.with_name("other"), bed.kind, bed.width)
    volume = other.create()
    for key in range(1, 101):
        put(volume, key, b"other %d" % key)
    volume.close()
    shutil.rmtree(bed.directory / "3.rocks")
    shutil.copytree(other.directory / "3.rocks", bed.directory / "3.rocks")


def spoil_state(bed: Bed) -> None:
    maps = bed.options.maps
    assert maps is not None
    db = maps.rocksdict.Rdict(str(bed.directory / "3.rocks" / "00000"), maps.options(create=False))
    state = db[needle_map._STATE_KEY]
    db[needle_map._STATE_KEY] = state[:-1] + bytes([state[-1] ^ 1])
    db.close()


@pytest.mark.parametrize(
    "spoil",
    [
        shorten,
        other_rows,
        next_revision,
        a_copy_for_the_next_revision,
        cut_tables,
        zero_tables,
        remove("CURRENT"),
        remove("MANIFEST*"),
        remove("*.sst"),
        remove("*"),
        a_file_instead,
        another_map,
        spoil_state,
    ],
)
def test_what_does_not_fit_is_made_anew(disk: Bed, spoil: Callable[[Bed], None]) -> None:
    volume = disk.create()
    for key in range(1, 101):
        put(volume, key, b"needle %d" % key)
    volume.close()
    spoil(disk)
    expected = {row[0] for row in rows_in(disk.idx, disk.width)}
    place = str(disk.directory)
    volume = load_volume(place, place, "", 3, options=replace(disk.options, repair=False))
    disk.opened.append(volume)
    if spoil is shorten:
        assert volume.no_write_or_delete  # .dat is longer: a sorted file serves, without repair
        volume.set_writable()
    assert counters(volume) == counted_by_the_index(disk)
    assert gone(volume, 101)
    assert map_of(volume).built
    for key in range(1, 101):
        if key in expected:
            assert data_of(volume, key) == b"needle %d" % key
        else:
            assert gone(volume, key)
    assert counters(volume) == counted_by_the_index(disk)
    assert databases(disk) == [f"{volume.compaction_revision:05d}"]
    put(volume, 1, b"fine")
    volume = disk.reopen(volume)
    assert data_of(volume, 1) == b"fine"
    assert not map_of(volume).built


def test_many_entries_are_made_into_sorted_files(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_map, "_SMALL_BUILD", 10)
    monkeypatch.setattr(needle_map, "_SST_ENTRIES", 100)
    monkeypatch.setattr(needle_map, "_BUILD_ENTRIES", 30)
    volume = disk.create()
    for key in range(1, 333):
        put(volume, key, b"%d" % key)
    volume.delete_needle(5, COOKIE)
    volume.close()
    shutil.rmtree(disk.directory / "3.rocks")
    volume = disk.load()
    assert map_of(volume).built
    assert gone(volume, 5, 333, 0)
    assert all(data_of(volume, key) == b"%d" % key for key in range(1, 333) if key != 5)
    assert databases(disk) == ["00000"]
    put(volume, 5, b"back")
    volume = disk.reopen(volume)
    assert not map_of(volume).built
    assert data_of(volume, 5) == b"back"


def test_leftovers_of_a_build_go(disk: Bed) -> None:
    disk.create().close()
    (disk.directory / "3.rocks" / "00003").mkdir()
    (disk.directory / "3.rocks" / "00000.0.sst").write_text("half")
    disk.load()
    assert databases(disk) == ["00000"]


def test_a_map_that_cannot_be_made_is_held_in_memory(disk: Bed, caplog: pytest.LogCaptureFixture) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.close()
    shutil.rmtree(disk.directory / "3.rocks")
    (disk.directory / "3.rocks").write_text("in the way")
    volume = disk.load()
    assert not volume.is_mapped
    assert "held in memory instead" in caplog.text
    put(volume, 2, b"two")
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


# ---------------------------------------------------------------------------------------------- kinds on disk: running


def test_changes_are_folded_in_as_they_pile_up(disk: Bed) -> None:
    volume = disk.create()
    needles = map_of(volume)
    for key in range(needle_map.LAYER_ENTRIES - 1):
        put(volume, key, b"x")
    assert needles.pending == needle_map.LAYER_ENTRIES - 1
    put(volume, 2**40, b"x")
    assert needles.pending == 0
    assert needles.figures.file_count == needle_map.LAYER_ENTRIES
    volume.delete_needle(7, COOKIE)
    assert needles.pending == 1
    volume.handle.visit(0, 1)
    assert needles.pending == 0


def test_visit_gives_entries_in_order(disk: Bed) -> None:
    volume = disk.create()
    for key in (
        0x7079_766F_6C75_6D65,
        5,
        2**64 - 1,
        0,
        300,
    ):  # the first: as the key of the database's own record begins
        put(volume, key, b"x")
    volume.delete_needle(5, COOKIE)
    rows = volume.handle.visit(0, 10)
    assert [row.key for row in rows] == [0, 5, 300, 0x7079_766F_6C75_6D65, 2**64 - 1]
    assert [row.size < 0 for row in rows] == [False, True, False, False, False]
    assert [row.key for row in volume.handle.visit(6, 2)] == [300, 0x7079_766F_6C75_6D65]
    assert [row.key for row in volume.handle.entries(2)] == [row.key for row in rows]


class FailingDatabase:
    """Stands in for a database that cannot be read any more."""

    def __init__(self, db: object) -> None:
        self.db = db

    def get(self, *_: object) -> None:
        raise RuntimeError("Corruption: block checksum mismatch")

    def close(self) -> None:
        self.db.close()  # type: ignore[attr-defined]


def test_a_database_that_rots_is_made_anew(disk: Bed, caplog: pytest.LogCaptureFixture) -> None:
    volume = disk.create()
    for key in range(20):
        put(volume, key, b"%d" % key)
    needles = map_of(volume)
    needles.flush()
    volume.delete_needle(3, COOKIE)
    needles._db = FailingDatabase(needles._db)
    assert data_of(volume, 1) == b"1"
    assert gone(volume, 3)
    assert "block checksum mismatch" in caplog.text
    assert needles.built
    assert needles.figures[:3] == (21, volume.content_bytes, 2)


def test_a_disk_that_cannot_be_read_at_all_is_told(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    needles = map_of(volume)
    needles.flush()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(needles, "_fill", fail)
    needles._db = FailingDatabase(needles._db)
    with pytest.raises(DiskError, match="00000"):
        volume.read_needle(1)
    monkeypatch.undo()
    assert data_of(volume, 1) == b"one"


def test_folding_that_fails_is_tried_again(
    disk: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    volume = disk.create()
    needles = map_of(volume)
    fold = needles._fold

    def fail(*_: object) -> tuple[int, int]:
        raise needle_map._Damaged("IO error: No space left on device")

    monkeypatch.setattr(needles, "_fold", fail)
    for key in range(needle_map.LAYER_ENTRIES + 5):
        put(volume, key, b"%d" % key)
    assert caplog.text.count("stay in memory") == 1
    assert needles.pending == needle_map.LAYER_ENTRIES + 5
    assert data_of(volume, 3) == b"3"
    monkeypatch.setattr(needles, "_fold", fold)
    needles._retry_at_s = 0.0
    needles.flush_or_log()
    assert needles.pending == 0
    assert data_of(volume, 3) == b"3"
    volume = disk.reopen(volume)
    assert data_of(volume, needle_map.LAYER_ENTRIES + 4) == b"%d" % (needle_map.LAYER_ENTRIES + 4)


def test_only_changes_of_one_key_wait_for_each_other(disk: Bed) -> None:
    volume = disk.create()
    assert isinstance(volume.handle, MappedVolume)
    with volume.handle._stripes[1]:
        volume.write_needle(needle(2, b"two"), fsync=True)
        late = threading.Thread(target=put, args=(volume, 1, b"one"))
        late.start()
        late.join(0.2)
        assert late.is_alive()
        assert gone(volume, 1)
    late.join()
    assert data_of(volume, 1) == b"one"


def test_reads_go_on_while_the_database_is_closed_and_opened(disk: Bed) -> None:
    volume = disk.create()
    for key in range(50):
        put(volume, key, b"%d" % key)
    needles = map_of(volume)
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        key = 0
        while not stop.is_set():
            key = (key + 1) % 50
            try:
                assert data_of(volume, key) == b"%d" % key
            except BaseException as exc:
                failures.append(exc)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(25):
        needles.unload()
        put(volume, 100 + turn, b"x")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert needles.figures.file_count <= 75
    volume = disk.reopen(volume)
    assert volume.file_count == 75


def test_an_idle_map_is_closed_and_opened_on_use(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    needles = map_of(volume)
    maps = needles._maps
    for _ in range(5):
        maps.tick_hour()
    assert needles.is_loaded  # no timeout was given
    needles.timeout_h = 2
    assert data_of(volume, 1) == b"one"
    needles._used = True
    for loaded in (True, True, False, False):
        maps.tick_hour()
        assert needles.is_loaded is loaded
    put(volume, 2, b"two")
    assert needles.is_loaded
    assert data_of(volume, 1) == b"one"
    needles._used = False
    needles._idle_ticks = 1
    maps.tick_hour()
    assert not needles.is_loaded
    assert data_of(volume, 2) == b"two"
    needles.unload()
    volume = disk.reopen(volume)
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


def test_closing_ends_it(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    needles = map_of(volume)
    volume.close()
    volume.close()
    assert volume.file_count == 1
    with pytest.raises(StorageError, match="volume 3 is closed"):
        volume.read_needle(2)
    with pytest.raises(StorageError, match="volume 3 is closed"):
        put(volume, 1, b"two")
    needles.flush()
    needles.unload()
    assert needles._maps.open_maps() == []


def test_a_database_has_one_owner(disk: Bed) -> None:
    volume = disk.create()
    needles = map_of(volume)
    place = str(disk.directory)
    options = replace(disk.options, maps=needles._maps)
    second = load_volume(place, place, "", 3, options=options)
    disk.opened.append(second)
    assert volume.is_mapped
    assert not second.is_mapped


def test_memory_is_shared_by_all_maps(tmp_path: Path) -> None:
    maps = RocksMaps(needle_map.KINDS["leveldb"])
    assert maps._buffers.get_buffer_size() == 2 << 20
    index = tmp_path / "1.idx"
    index.write_bytes(b"")

    def open_one(number: int) -> RocksMap:
        return RocksMap(
            maps, str(tmp_path / f"{number}.rocks"), str(index), width=4, revision=0, settled=lambda: (0, 0)
        )

    opened = [open_one(number) for number in range(100)]
    assert maps._buffers.get_buffer_size() == 64 << 20
    assert maps.layer_entries == needle_map.LAYERS_TOTAL // 100
    for needles in opened:
        needles.close()
    assert maps.layer_entries == needle_map.LAYER_ENTRIES
    assert maps.open_maps() == []


def test_a_map_by_itself(tmp_path: Path, width: int) -> None:
    """The interface without a volume around it."""
    index = tmp_path / "1.idx"
    index.write_bytes(engine.idx_pack([(1, 8, 10), (2, 64, 0), (1, 128, 20), (3, 0, -1)], width))
    maps = RocksMaps(needle_map.KINDS["leveldb"])
    needles = RocksMap(maps, str(tmp_path / "1.rocks"), str(index), width=width, revision=4, settled=lambda: (6, 4))
    needles.load(4)
    assert needles.get(1) == Value(128, 20)
    assert needles.get(2) == Value(64, 0)
    assert needles.get(3) is None
    assert needles.figures == (4, 30, 3, 10, 3, 2)
    with index.open("ab") as out:
        out.write(engine.idx_pack([(1, 256, -1), (9, 512, 7)], width))
    needles.put(1, Value(128, -20))
    assert needles.get(1) == Value(128, -20)
    needles.flush()
    assert needles.get(1) == Value(128, -20)
    assert needles.get(9) == Value(512, 7)
    with index.open("rb") as handle:
        assert needles.figures == LiveIndex(handle.fileno(), width, 6).figures
    needles.discard()
    needles.discard()
    assert os.listdir(tmp_path / "1.rocks") == []


# ----------------------------------------------------------------------------------------------- kinds on disk: vacuum


def test_the_map_of_a_vacuum_that_is_given_up_goes(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    compact.compact(volume)
    assert databases(disk) == ["00000", "00001"]
    compact.cleanup(volume)
    assert databases(disk) == ["00000"]
    compact.compact(volume)
    volume.close()
    assert databases(disk) == ["00000"]


def test_a_commit_that_fails_leaves_the_old_map(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    compact.compact(volume)

    def fail(name: str) -> None:
        if name == "compact.commit":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(compact, "fault", fail)
    with pytest.raises(DiskError):
        compact.commit(volume)
    assert data_of(volume, 1) == b"one"
    put(volume, 2, b"two")
    assert databases(disk) == ["00000"]
    monkeypatch.undo()
    compact.compact(volume)
    compact.commit(volume)
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


def test_a_map_that_cannot_be_prepared_fails_the_vacuum(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = disk.create()
    put(volume, 1, b"one")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RocksMap, "_fill", fail)
    with pytest.raises(DiskError, match="no space left"):
        compact.compact(volume)
    monkeypatch.undo()
    assert sorted(path.name for path in disk.directory.iterdir()) == ["3.dat", "3.idx", "3.rocks", "3.vif"]
    assert databases(disk) == ["00000"]
    assert data_of(volume, 1) == b"one"


def test_a_map_that_cannot_catch_up_is_made_anew(
    disk: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    volume = disk.create()
    for key in range(10):
        put(volume, key, b"%d" % key)
    compact.compact(volume)
    put(volume, 4, b"meanwhile")
    volume.delete_needle(5, COOKIE)

    def fail(*_: object) -> tuple[int, int]:
        raise needle_map._Damaged("IO error: No space left on device")

    monkeypatch.setattr(RocksMap, "_fold", fail)
    compact.commit(volume)
    assert "is made anew" in caplog.text
    monkeypatch.undo()
    assert map_of(volume).built
    assert volume.file_count == 12
    assert data_of(volume, 4) == b"meanwhile"
    assert gone(volume, 5)
    assert data_of(volume, 6) == b"6"


def test_a_vacuum_whose_map_is_lost_serves_again_when_the_disk_does(
    disk: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    compact.compact(volume)
    put(volume, 2, b"two")

    def fail(*_: object) -> tuple[int, int]:
        raise needle_map._Damaged("IO error: No space left on device")

    monkeypatch.setattr(RocksMap, "_fold", fail)
    monkeypatch.setattr(RocksMap, "_fill", fail)
    compact.commit(volume)
    assert "the needle map after the vacuum" in caplog.text
    with pytest.raises(DiskError):
        volume.read_needle(1)
    monkeypatch.undo()
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


def test_a_kill_after_the_commit_starts_from_the_new_files(disk: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = disk.create()
    for key in range(10):
        put(volume, key, b"%d" % key)
    volume.delete_needle(2, COOKIE)
    compact.compact(volume)
    put(volume, 3, b"meanwhile")
    killed: list[Path] = []
    monkeypatch.setattr(compact, "adopt_or_log", lambda _handle: killed.append(disk.killed()))
    compact.commit(volume)
    monkeypatch.undo()
    assert isinstance(volume.handle, MappedVolume)
    volume.handle.adopt()
    for at in (volume, disk.load(killed[0])):
        assert data_of(at, 3) == b"meanwhile"
        assert gone(at, 2)
        assert data_of(at, 9) == b"9"
        assert map_of(at).revision == 1


def test_readers_and_writers_run_through_vacuums(disk: Bed) -> None:
    volume = disk.create()
    for key in range(200):
        put(volume, key, b"0")
    stop = threading.Event()
    failures: list[BaseException] = []
    newest = dict.fromkeys(range(200), 0)

    def write(me: int) -> None:
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                key = (me * 50) + turn % 50
                volume.write_needle(needle(key, b"%d" % turn), fsync=turn % 40 == 0)
                newest[key] = turn
                if turn % 7 == 0:
                    assert volume.delete_needle(key, COOKIE) > 0
                    volume.write_needle(needle(key, b"%d" % turn))
                assert int(data_of(volume, key)) == turn
        except BaseException as exc:
            failures.append(exc)

    def read() -> None:
        key = 0
        try:
            while not stop.is_set():
                key = (key + 1) % 50 + 150
                assert data_of(volume, key) == b"0"
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=write, args=(me,)) for me in range(3)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        assert compact.compact(volume) is not None
        assert compact.commit(volume)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert {key: int(data_of(volume, key)) for key in newest} == newest
    volume = disk.reopen(volume)
    assert not map_of(volume).built
    assert {key: int(data_of(volume, key)) for key in newest} == newest
    assert counters(volume) == counted_by_the_index(disk)


# ------------------------------------------------------------------------------------------ kinds on disk: the volume


def test_a_look_up_that_meets_the_end_of_its_map_takes_the_next_one(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    handle = volume.handle
    assert isinstance(handle, MappedVolume)
    current = handle.map

    class Ended:
        def get(self, key: int) -> None:
            handle._map = current
            raise needle_map._closed_error()

    handle._map = Ended()  # type: ignore[assignment]
    assert data_of(volume, 1) == b"one"
    handle._map = Ended()  # type: ignore[assignment]
    put(volume, 1, b"two")
    assert current.get(1) == handle.lookup(1)[:2]


def test_marks_change_the_kind_of_map(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.set_read_only(persist=True)
    volume.close()
    volume = disk.load()
    assert not volume.is_mapped
    assert data_of(volume, 1) == b"one"
    volume.set_writable()
    assert volume.is_mapped
    put(volume, 2, b"two")
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


def test_destroying_a_volume_removes_its_map(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    volume.destroy()
    assert os.listdir(disk.directory) == []


def test_the_map_moves_with_the_index(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    new = disk.directory.with_name("idx")
    new.mkdir()
    volume.relocate_index(str(new))
    assert sorted(os.listdir(new)) == ["3.idx", "3.rocks"]
    assert sorted(os.listdir(disk.directory)) == ["3.dat", "3.vif"]
    put(volume, 2, b"two")
    assert data_of(volume, 1) + data_of(volume, 2) == b"onetwo"


def test_figures_survive_the_exchange_of_files(disk: Bed) -> None:
    volume = disk.create()
    put(volume, 1, b"one")
    with pytest.raises(StorageError, match="volume size limit"):
        _fill_content(volume)


def _fill_content(volume: Volume) -> None:
    """Flushed writes are held against the sum of all sizes, which the engine knows from the figures given to it."""
    from pyvolume._native.outside import MapFigures, set_figures

    limit = 1 << (35 if volume.offset_width == 4 else 43)
    set_figures(volume.handle, MapFigures(1, limit, 0, 0, 1, 1))
    volume.write_needle(needle(2, b"two"), fsync=True)


def test_the_server_tends_maps_each_minute_and_idle_ones_each_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "DISK_CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr(lifecycle, "MINUTES_PER_HOUR", 3)
    process = lifecycle.Process(SimpleNamespace(), SimpleNamespace(), {})  # type: ignore[arg-type]
    hours: list[bool] = []

    def tend(*, hour: bool) -> None:
        hours.append(hour)
        if len(hours) == 7:
            process._quit.set()
        raise OSError(5, "Input/output error")  # must not end the thread

    store = SimpleNamespace(check_free_space=lambda: None, tend_maps=tend)
    process.context = SimpleNamespace(store=store)  # type: ignore[assignment]
    process._periodic()
    assert hours == [False, False, True, False, False, True, False]


def test_a_store_serves_such_volumes_but_not_by_the_fast_lane(tmp_path: Path) -> None:
    config = config_of(tmp_path / "d", index_kind="leveldbMedium", index_leveldb_timeout_h=3)
    store = Store(config)
    store.load()
    try:
        volume = store.allocate_volume(7, "", ReplicaPlacement())
        assert map_of(volume).timeout_h == 3
        assert store.registry.count() == 0
        put(volume, 1, b"one")
        store.tend_maps(hour=False)
        assert map_of(volume).pending == 0
        store.unmount_volume(7)
        volume = store.mount_volume(7)
        assert map_of(volume).timeout_h == 0  # as upstream: a mount knows of no timeout
        assert data_of(volume, 1) == b"one"
        volume.set_read_only(persist=True)
        store.unmount_volume(7)
        store.mount_volume(7)
        assert store.registry.count() == 1
    finally:
        store.close()
    again = Store(config)
    again.load()
    try:
        loaded = again.find_volume(7)
        assert loaded is not None
        loaded.set_writable()
        assert map_of(loaded).timeout_h == 3
        for _ in range(4):
            again.tend_maps(hour=True)
        assert not map_of(loaded).is_loaded
        assert data_of(loaded, 1) == b"one"
    finally:
        again.close()
