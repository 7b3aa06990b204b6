"""Files of erasure coded volumes (contract erasure-coding.md 3-7, 10.7, 12): against Go's, damage, crashes, start."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_util import GOLDEN, config_of

from pyvolume import faults
from pyvolume._native import ec, engine
from pyvolume.errors import NeedleNotFound, StorageError
from pyvolume.storage import vif
from pyvolume.storage.ec import encode, index, layout, rebuild, sidecar
from pyvolume.storage.ec.volume import EcVolume
from pyvolume.storage.store import Store
from pyvolume.storage.volume import NeedleIn
from pyvolume.types import ReplicaPlacement, Ttl

COOKIE = 0x1234ABCD


def go_on() -> None:
    pass


def golden_ec(target: Path) -> dict[str, bytes]:
    """Unpacks Go's erasure coded volume; its files."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (GOLDEN / "ec" / "data").iterdir():
        if path.suffix == ".gz":
            (target / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copy(path, target / path.name)
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.fixture
def go_files(tmp_path: Path) -> dict[str, bytes]:
    return golden_ec(tmp_path / "d0")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[Store]]:
    """Stores made with open_store; closed at the end."""
    stores: list[Store] = []
    yield stores
    for store in stores:
        store.close()


def open_store(opened: list[Store], *directories: Path) -> Store:
    store = Store(config_of(*directories, max_volumes=8))
    store.load()
    opened.append(store)
    return store


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dat_bytes", "shard_bytes"),
    [
        (8, 1 << 20),
        (10 << 20, 1 << 20),
        ((10 << 20) + 8, 2 << 20),
        ((10 << 30) - 8, 1 << 30),
        (10 << 30, 1 << 30),
        ((10 << 30) + 8, (1 << 30) + (1 << 20)),
    ],
)
def test_length_of_shards(dat_bytes: int, shard_bytes: int) -> None:
    assert layout.shard_bytes_of(dat_bytes, 10) == shard_bytes


@given(data=st.integers(1, 6), rows=st.integers(0, 3), size=st.integers(1, 900), seed=st.integers(0, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_intervals_are_where_the_encoder_puts_the_bytes(data: int, rows: int, size: int, seed: int) -> None:
    large, small = 64, 16
    size = rows * large * data + size % (large * data)
    cut = layout.Layout(data, size // (large * data), large, small)
    places: list[tuple[int, int]] = []
    at = [0] * data
    left, block = size, large
    while left > 0:
        block = large if left >= large * data and block == large else small
        for shard in range(data):
            places += [(shard, at[shard] + i) for i in range(block)]
            at[shard] += block
        left -= block * data
    pick = random.Random(seed)
    start = pick.randrange(size) if size else 0
    length = pick.randrange(size - start) + 1 if size else 0
    found = [(iv.shard, iv.offset + i) for iv in cut.locate(start, length) for i in range(iv.length)]
    assert found == places[start : start + length]


def test_layout_without_the_size_of_the_dat_goes_by_the_shard() -> None:
    ratio = layout.Ratio()
    assert layout.layout_of(ratio, 0, 1 << 30).large_rows == 0
    assert layout.layout_of(ratio, 0, (1 << 30) + (1 << 20)).large_rows == 1
    assert layout.layout_of(ratio, 10 << 30, 1 << 30).large_rows == 1


@given(
    st.integers(1, 12).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, 6))),
    st.binary(min_size=1, max_size=200),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_any_data_shards_give_every_other(ratio: tuple[int, int], payload: bytes, pick: random.Random) -> None:
    data, parity = ratio
    rows = ec.matrix(data, parity)
    padded = payload + bytes(-len(payload) % data)
    length = len(padded) // data
    shards = {n: padded[n * length : (n + 1) * length] for n in range(data)}
    for n in range(data, data + parity):
        shards[n] = bytes(ec.recover(data, parity, shards, n))
    assert rows[:data] == [bytes(int(r == c) for c in range(data)) for r in range(data)]
    left = dict(pick.sample(sorted(shards.items()), data))
    for n, wanted in shards.items():
        assert ec.recover(data, parity, left, n) == wanted


def test_recover_needs_enough_pieces_of_one_length() -> None:
    with pytest.raises(ValueError, match="2 pieces"):
        ec.recover(2, 1, {0: b"a"}, 1)
    with pytest.raises(ValueError, match="2 pieces"):
        ec.recover(2, 1, {0: b"a", 2: b"bc"}, 1)
    with pytest.raises(engine.NativeError):
        ec.matrix(30, 3)


# -- files of Go ------------------------------------------------------------------------------------------------------


def test_sidecar_of_go_is_written_back_byte_for_byte(go_files: dict[str, bytes]) -> None:
    found = sidecar.decode(go_files["51.ecsum"])
    assert found.ratio == layout.Ratio(10, 4)
    found.check(layout.Ratio(10, 4))
    assert sidecar.encode(found) == go_files["51.ecsum"]
    for entry in found.shards:
        assert entry.crcs == [engine.crc32c(go_files[f"51.ec{entry.shard:02d}"])]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_sidecar_makes_the_reader_fail_otherwise(data: st.DataObject) -> None:
    good = sidecar.encode(sidecar.make(layout.Ratio(2, 1), 5 << 20, [[1], [2], [3]]))
    text = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(text[14:])
    if data.draw(st.booleans()):  # a header that fits, so that the message itself is read
        text = bytearray(sidecar._HEADER.pack(b"ECSU", 1, len(payload), engine.crc32c(payload)) + payload)
    with contextlib.suppress(sidecar.BadSidecar):
        sidecar.decode(bytes(text)).check(layout.Ratio(2, 1))


def test_needles_of_go(go_files: dict[str, bytes], tmp_path: Path, opened: list[Store]) -> None:
    store = open_store(opened, tmp_path / "d0")
    volume = store.ec.find(51)
    assert volume is not None
    assert volume.sums_state == "on"
    assert sorted(volume.shards) == list(range(14))
    assert (volume.info().file_count, volume.info().delete_count) == (20, 4)
    deleted = set(index.ids_of(go_files["51.ecj"]))
    seen = 0
    for key, offset, size in volume.walk():
        parts = [
            volume.shards[i.shard].read(i.offset, i.length)
            for i in volume.layout.locate(offset, volume.record_bytes(size))
        ]
        assert engine.parse_needle(b"".join(parts), volume.version, size).id == key
        assert volume.lookup(key) == (offset, -1 if key in deleted else size)
        assert volume.is_deleted(key) == (key in deleted)
        seen += 1
    assert seen == 20
    with pytest.raises(NeedleNotFound, match="FindNeedleFromEcx: needle not found"):
        volume.lookup(1)


@pytest.mark.parametrize("lost", [(0, 1, 2, 3), (10, 11, 12, 13), (3, 7, 11, 12), (5,), (0, 13)])
def test_rebuild_makes_gos_bytes(go_files: dict[str, bytes], tmp_path: Path, lost: tuple[int, ...]) -> None:
    directory = tmp_path / "d0"
    for number in lost:
        (directory / f"51.ec{number:02d}").unlink()
    assert rebuild.rebuild(str(directory / "51"), [], unsafe=False, go_on=go_on) == list(lost)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == go_files


def test_rebuild_finds_shards_on_other_disks_and_replaces_damage_in_place(
    go_files: dict[str, bytes], tmp_path: Path
) -> None:
    directory, other = tmp_path / "d0", tmp_path / "d1"
    other.mkdir()
    for number in (8, 9, 10, 11):
        shutil.move(directory / f"51.ec{number:02d}", other)
    (directory / "51.ec02").write_bytes(b"")
    damaged = bytearray(go_files["51.ec09"])
    damaged[4711] ^= 1
    (other / "51.ec09").write_bytes(damaged)
    (directory / "51.ec13").unlink()
    made = rebuild.rebuild(str(directory / "51"), [str(other)], unsafe=False, go_on=go_on)
    assert made == [2, 13, 9]
    for number, place in ((2, directory), (13, directory), (9, other)):
        assert (place / f"51.ec{number:02d}").read_bytes() == go_files[f"51.ec{number:02d}"]


def test_rebuild_refuses_what_it_cannot_trust(go_files: dict[str, bytes], tmp_path: Path) -> None:
    directory = tmp_path / "d0"
    base = str(directory / "51")
    for number in range(5):
        (directory / f"51.ec{number:02d}").unlink()
    with pytest.raises(StorageError, match=r"found 9 shards, need at least 10 .* missing shards: \[0 1 2 3 4\]"):
        rebuild.rebuild(base, [], unsafe=False, go_on=go_on)
    golden_ec(directory)
    for number in range(5):
        (directory / f"51.ec{number:02d}").write_bytes(b"x" * (1 << 20))
    with pytest.raises(StorageError, match=r"bitrot sidecar suspect .* 5/14 present shards mismatch"):
        rebuild.rebuild(base, [], unsafe=False, go_on=go_on)
    assert rebuild.rebuild(base, [], unsafe=True, go_on=go_on) == []
    golden_ec(directory)
    (directory / "51.ecsum").write_bytes(b"ECSUnonsense")
    with pytest.raises(StorageError, match="malformed/unverifiable; refusing"):
        rebuild.rebuild(base, [], unsafe=False, go_on=go_on)
    (directory / "51.ecsum").unlink()
    (directory / "51.ec00").unlink()
    os.truncate(directory / "51.ec04", 1000)
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(StorageError, match=r"input shard 4 size 1000 != 1048576"):
        rebuild.rebuild(base, [], unsafe=False, go_on=go_on)
    assert sorted(path.name for path in directory.iterdir()) == before


@pytest.mark.parametrize("point", ["ec.rebuild", "ec.rebuild_rename"])
def test_a_failed_rebuild_leaves_what_was_there(go_files: dict[str, bytes], tmp_path: Path, point: str) -> None:
    directory = tmp_path / "d0"
    (directory / "51.ec03").unlink()
    before = sorted(path.name for path in directory.iterdir())
    with faults.set_points(f"{point}=error:EIO"), pytest.raises(StorageError):
        rebuild.rebuild(str(directory / "51"), [], unsafe=False, go_on=go_on)
    assert sorted(path.name for path in directory.iterdir()) == before


# -- encode and decode ------------------------------------------------------------------------------------------------


def fill(store: Store, vid: int, count: int = 30, **more: object) -> dict[int, bytes]:
    volume = store.allocate_volume(vid, "c", ReplicaPlacement.parse("001"), **more)  # type: ignore[arg-type]
    pick = random.Random(vid)
    needles = {key: pick.randbytes(pick.choice((0, 1, 100, 70_000, 400_000))) for key in range(1, count + 1)}
    for key, data in needles.items():
        volume.write_needle(NeedleIn(key, COOKIE, data))
    for key in (2, 5):
        volume.delete_needle(key, COOKIE)
        del needles[key]
    return needles


def needle_of(volume: EcVolume, key: int) -> bytes:
    offset, size = volume.lookup(key)
    parts = volume.layout.locate(offset, volume.record_bytes(size))
    record = b"".join(volume.shards[part.shard].read(part.offset, part.length) for part in parts)
    return bytes(engine.parse_needle(record, volume.version, size).data or b"")


@pytest.mark.parametrize("ratio", [(10, 4), (9, 3), (1, 1), (3, 2)])
def test_encode_and_decode(tmp_path: Path, opened: list[Store], ratio: tuple[int, int]) -> None:
    store = open_store(opened, tmp_path / "d0")
    needles = fill(store, 3)
    plain = store.find_volume(3)
    assert plain is not None

    def prepare(info: vif.VolumeInfo) -> None:
        info.ec_shard_config = vif.EcShardConfig(*ratio)
        info.replication = "001"

    plain.save_info(prepare)
    store.generate_shards(3, "c", go_on)
    dat = (tmp_path / "d0" / "c_3.dat").read_bytes()
    info = vif.load(str(tmp_path / "d0" / "c_3.vif")).info
    assert info.replication == "001"
    assert info.dat_file_size == len(dat)
    total = sum(ratio)
    for number in range(total):
        store.ec.mount("c", 3, number)
    volume = store.ec.find(3)
    assert volume is not None
    assert (volume.ratio.data, volume.ratio.parity, volume.sums_state) == (*ratio, "on")
    coded = b"".join(volume.shards[i.shard].read(i.offset, i.length) for i in volume.layout.locate(0, len(dat)))
    assert coded == dat
    for key, data in needles.items():
        assert needle_of(volume, key) == data
    for key in (2, 5):
        with pytest.raises(NeedleNotFound):
            volume.lookup(key)
    volume.journal(7)
    store.delete_volume(3)
    assert (tmp_path / "d0" / "c_3.vif").exists()
    store.decode_shards(3, "c", go_on)
    store.mount_volume(3)
    back = store.find_volume(3)
    assert back is not None
    for key, data in needles.items():
        if key != 7:
            assert bytes(back.read_needle(key).data or b"") == data
    with pytest.raises(NeedleNotFound):
        back.read_needle(7)


def test_volume_of_deleted_needles_is_not_decoded(tmp_path: Path, opened: list[Store]) -> None:
    store = open_store(opened, tmp_path / "d0")
    needles = fill(store, 3, 6)
    store.generate_shards(3, "c", go_on)
    for number in range(14):
        store.ec.mount("c", 3, number)
    volume = store.ec.find(3)
    assert volume is not None
    for key in needles:
        volume.journal(key)
    with pytest.raises(encode.NoLiveEntries, match="ec volume 3 has no live entries"):
        store.decode_shards(3, "c", go_on)


@pytest.mark.parametrize(
    "point", ["ec.write_index", "ec.encode", "ec.publish", "ec.publish_index", "ecsum.write", "vif.write"]
)
def test_a_failed_encode_leaves_the_volume(tmp_path: Path, opened: list[Store], point: str) -> None:
    store = open_store(opened, tmp_path / "d0")
    needles = fill(store, 3, 6)
    before = {path.name for path in (tmp_path / "d0").iterdir()}
    with faults.set_points(f"{point}=error:EIO"):
        if point == "ecsum.write":  # without checksums the shards are as good
            store.generate_shards(3, "c", go_on)
            assert not (tmp_path / "d0" / "c_3.ecsum").exists()
            return
        with pytest.raises(StorageError):
            store.generate_shards(3, "c", go_on)
    assert {path.name for path in (tmp_path / "d0").iterdir()} == before
    for key, data in needles.items():
        assert bytes(store.read_needle(3, key).data or b"") == data


def test_an_encode_that_is_called_off_leaves_nothing(tmp_path: Path, opened: list[Store]) -> None:
    store = open_store(opened, tmp_path / "d0")
    fill(store, 3, 6)
    before = {path.name for path in (tmp_path / "d0").iterdir()}

    def stop() -> None:
        raise StorageError("context canceled")

    with pytest.raises(StorageError, match="context canceled"):
        store.generate_shards(3, "c", stop)
    assert {path.name for path in (tmp_path / "d0").iterdir()} == before


# -- deletes ----------------------------------------------------------------------------------------------------------


def test_a_delete_is_journaled_and_stays_after_a_fold(
    go_files: dict[str, bytes], tmp_path: Path, opened: list[Store]
) -> None:
    store = open_store(opened, tmp_path / "d0")
    volume = store.ec.find(51)
    assert volume is not None
    keys = [key for key, _, _ in volume.walk() if not volume.is_deleted(key)]
    volume.journal(keys[0])
    volume.journal(keys[0])
    assert (tmp_path / "d0" / "51.ecj").read_bytes() == go_files["51.ecj"] + index.bytes_of([keys[0]])
    store.ec.rebuild("", 51, unsafe=False, go_on=go_on)
    assert (tmp_path / "d0" / "51.ecj").read_bytes() == b""
    volume.journal(keys[1])
    assert (tmp_path / "d0" / "51.ecj").read_bytes() == index.bytes_of([keys[1]])
    store.close()
    again = open_store(opened, tmp_path / "d0").ec.find(51)
    assert again is not None
    assert again.is_deleted(keys[0]) and again.is_deleted(keys[1]) and not again.is_deleted(keys[2])


def test_a_delete_that_cannot_be_written_is_none(
    go_files: dict[str, bytes], tmp_path: Path, opened: list[Store]
) -> None:
    volume = open_store(opened, tmp_path / "d0").ec.find(51)
    assert volume is not None
    key = next(key for key, _, _ in volume.walk() if not volume.is_deleted(key))
    with faults.set_points("ec.journal=error:ENOSPC"), pytest.raises(StorageError):
        volume.journal(key)
    assert not volume.is_deleted(key)
    assert (tmp_path / "d0" / "51.ecj").read_bytes() == go_files["51.ecj"]
    volume.close()
    with pytest.raises(StorageError, match="ec volume 51 closed"):
        volume.journal(key)


def test_torn_journals(go_files: dict[str, bytes], tmp_path: Path) -> None:
    directory = tmp_path / "d0"
    (directory / "51.ecj").write_bytes(go_files["51.ecj"] + b"\0\0\0")
    with pytest.raises(StorageError, match="rebuild: read ecj"):
        index.fold_file(str(directory / "51.ecx"), 4, str(directory / "51.ecj"))
    assert (directory / "51.ecj").read_bytes() == go_files["51.ecj"] + b"\0\0\0"
    assert (directory / "51.ecx").read_bytes() == go_files["51.ecx"]
    (directory / "51.ecj").write_bytes(go_files["51.ecj"])
    index.fold_file(str(directory / "51.ecx"), 4, str(directory / "51.ecj"))
    assert not (directory / "51.ecj").exists()
    changed = sum(a != b for a, b in zip((directory / "51.ecx").read_bytes(), go_files["51.ecx"], strict=True))
    assert 0 < changed <= 16


# -- start ------------------------------------------------------------------------------------------------------------


def test_shards_over_two_disks_share_the_index(go_files: dict[str, bytes], tmp_path: Path, opened: list[Store]) -> None:
    other = tmp_path / "d1"
    other.mkdir()
    for number in range(7, 14):
        shutil.move(tmp_path / "d0" / f"51.ec{number:02d}", other)
    store = open_store(opened, tmp_path / "d0", other)
    assert [sorted(volume.shards) for volume in store.ec.copies(51)] == [list(range(7)), list(range(7, 14))]
    assert (other / "51.ecx").read_bytes() == go_files["51.ecx"]
    assert (other / "51.ecj").read_bytes() == go_files["51.ecj"]
    assert [location.ec_slots for location in store.locations] == [1, 1]
    assert store.locations[0].free_slots == 7
    key = next(key for key, _, _ in store.ec.copies(51)[0].walk() if not store.ec.is_deleted(51, key))
    store.ec.copies(51)[1].journal(key)
    assert store.ec.is_deleted(51, key)
    store.decode_shards(51, "", go_on)
    store.mount_volume(51)
    with pytest.raises(NeedleNotFound):
        store.read_needle(51, key)


def test_shards_without_any_index_stay(go_files: dict[str, bytes], tmp_path: Path, opened: list[Store]) -> None:
    (tmp_path / "d0" / "51.ecx").unlink()
    store = open_store(opened, tmp_path / "d0")
    assert store.ec.volumes() == []
    assert (tmp_path / "d0" / "51.ec00").exists()
    assert [(c, v) for c, v, _ in store.ec.missing_index()] == [("", 51)]
    (tmp_path / "d0" / "51.ecx").write_bytes(go_files["51.ecx"])
    store.ec.mount_recovered()
    assert len(store.ec.volumes()) == 1


def test_leftovers_go_and_interrupted_encodes_give_way(tmp_path: Path, opened: list[Store]) -> None:
    directory = tmp_path / "d0"
    store = open_store(opened, directory)
    needles = fill(store, 3, 6)
    store.generate_shards(3, "c", go_on)
    store.close()
    for name in ("c_3.ec00.tmp", "c_3.ecx.tmp", "c_3.ec01.rebuilding", "c_3.ecx.mirror.tmp"):
        (directory / name).write_bytes(b"left")
    (directory / "c_3.ecx").unlink()  # as if the encode had been killed before its last step
    again = open_store(opened, directory)
    left = {path.name for path in directory.iterdir()} - {"vol_dir.uuid"}
    assert left == {"c_3.dat", "c_3.idx", "c_3.vif", "c_3.ecsum"}
    for key, data in needles.items():
        assert bytes(again.read_needle(3, key).data or b"") == data


def test_a_dat_that_went_on_growing_is_served(tmp_path: Path, opened: list[Store]) -> None:
    directory = tmp_path / "d0"
    store = open_store(opened, directory)
    fill(store, 3, 6)
    store.generate_shards(3, "c", go_on)
    store.write_needle(3, NeedleIn(99, COOKIE, b"later"))
    store.close()
    again = open_store(opened, directory)
    assert bytes(again.read_needle(3, 99).data or b"") == b"later"
    assert again.ec.find(3) is None
    assert (directory / "c_3.ec00").exists()


def test_expired_volumes_go_and_are_not_announced(tmp_path: Path, opened: list[Store]) -> None:
    directory = tmp_path / "d0"
    store = open_store(opened, directory)
    fill(store, 3, 6, ttl=Ttl.parse("5m"))
    store.generate_shards(3, "c", go_on)
    store.delete_volume(3)
    for number in range(14):
        store.ec.mount("c", 3, number)
    volume = store.ec.find(3)
    assert volume is not None
    assert volume.expire_at_s > 0
    assert store.ec.remove_expired() == []
    store.close()
    info = vif.load(str(directory / "c_3.vif")).info
    info.expire_at_sec = 1000
    vif.save(str(directory / "c_3.vif"), info)
    news: list[str] = []
    again = Store(config_of(directory))
    again.subscribe(lambda kind, _info: news.append(kind))
    again.load()
    opened.append(again)
    assert news == []
    assert [gone.id for gone in again.ec.remove_expired()] == [3]
    assert {path.name for path in directory.iterdir()} == {"vol_dir.uuid"}
