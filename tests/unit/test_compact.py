"""Vacuum of a volume: what it keeps, what stops it, what a failure leaves (contract storage.md 17; V1, V2)."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
from storage_util import Clock, create, data_of, load, put, rows_in

from pyvolume import faults
from pyvolume.errors import DiskError, NeedleNotFound, NoSpace, StorageError
from pyvolume.storage import compact
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import FLAG_HAS_LAST_MODIFIED, FLAG_HAS_TTL, Volume
from pyvolume.types import ReplicaPlacement, Ttl

STEPS = ("compact.begin", "compact.step", "compact.finish", "compact.commit")


def fill(volume: Volume) -> dict[int, bytes]:
    """Needles, some overwritten and some deleted; what is left."""
    kept = {}
    for key in range(1, 41):
        put(volume, key, b"first" * key)
        if key % 3 == 0:
            put(volume, key, kept.setdefault(key, b"second" * key))
        elif key % 3 == 1:
            kept[key] = b"first" * key
        else:
            volume.delete_needle(key, 0x1234ABCD)
    return kept


def check(volume: Volume, kept: dict[int, bytes]) -> None:
    for key in range(1, 41):
        if key in kept:
            assert data_of(volume, key) == kept[key]
        else:
            with pytest.raises(NeedleNotFound):
                volume.read_needle(key)


def no_leftovers(directory: Path) -> bool:
    return not [p for p in directory.iterdir() if p.suffix in (".cpd", ".cpx", ".cpc")]


@pytest.mark.parametrize("width", [4, 5])
def test_a_vacuum_keeps_what_is_live_and_gives_the_rest_back(tmp_path: Path, width: int) -> None:
    volume = create(tmp_path, width=width)
    kept = fill(volume)
    before = volume.dat_bytes
    assert volume.garbage_ratio > 0.3
    stats = compact.compact(volume)
    assert stats is not None and stats.copied_needles == len(kept) and stats.dropped_needles == 0
    assert compact.commit(volume)
    check(volume, kept)
    assert volume.dat_bytes < before and volume.garbage_ratio == 0
    assert volume.compaction_revision == 1 and no_leftovers(tmp_path)
    put(volume, 99, b"after")
    volume.close()
    rows = rows_in(tmp_path / "3.idx", width)
    assert [key for key, _, _ in rows] == [*sorted(kept), 99], "rows in the order of keys, then what came later"
    again = load(tmp_path, 3)
    check(again, kept)
    assert data_of(again, 99) == b"after" and not again.is_read_only
    again.close()


def test_changes_between_compact_and_commit_are_brought_over(tmp_path: Path) -> None:
    volume = create(tmp_path)
    kept = fill(volume)
    compact.compact(volume)
    put(volume, 1, b"newer")
    put(volume, 77, b"new")
    volume.delete_needle(3, 0x1234ABCD)
    compact.commit(volume)
    del kept[3]
    check(volume, {**kept, 1: b"newer"})
    assert data_of(volume, 77) == b"new"
    volume.close()
    again = load(tmp_path, 3)
    check(again, {**kept, 1: b"newer"})
    again.close()


def test_a_needle_with_a_ttl_of_its_own_stays_until_it_expires(tmp_path: Path) -> None:
    """V1: in a volume without a ttl upstream drops it, expired or not, or fails for ever."""
    volume = create(tmp_path)
    flags = FLAG_HAS_TTL | FLAG_HAS_LAST_MODIFIED
    put(volume, 1, b"an hour" * 400, flags=flags, ttl=Ttl.parse("1h"), last_modified_s=1_600_000_000)
    put(volume, 2, b"no end")
    compact.compact(volume)
    compact.commit(volume)
    assert data_of(volume, 1) == b"an hour" * 400 and data_of(volume, 2) == b"no end"
    volume.close()


@pytest.mark.parametrize("volume_ttl", ["", "30m"])
def test_a_vacuum_after_a_jump_of_the_clock_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, volume_ttl: str
) -> None:
    clock = Clock(monkeypatch)
    volume = create(tmp_path, ttl=Ttl.parse(volume_ttl))
    flags = FLAG_HAS_TTL | FLAG_HAS_LAST_MODIFIED
    put(volume, 1, b"half an hour", flags=flags, ttl=Ttl.parse("30m"), last_modified_s=int(clock.wall_s))
    clock.passes(10 * 60)
    clock.wall_s += 10 * 365 * 86400
    for minutes, copied in ((10, 1), (21, 0)):
        clock.passes(minutes * 60)
        stats = compact.compact(volume)
        assert stats is not None and stats.copied_needles == copied and stats.expired_needles == 1 - copied
        compact.commit(volume)
    volume.close()


def test_the_replication_of_the_vif_goes_into_the_super_block(tmp_path: Path) -> None:
    volume = create(tmp_path)
    volume.replica_placement = ReplicaPlacement.parse("001")
    put(volume, 1, b"x")
    compact.compact(volume)
    compact.commit(volume)
    volume.close()
    assert SuperBlock.parse((tmp_path / "3.dat").read_bytes()).replica_placement.byte == 1


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_the_old_files_serving(tmp_path: Path, step: str) -> None:
    """V2: upstream's volume is closed after a failed commit."""
    volume = create(tmp_path)
    kept = fill(volume)
    with faults.set_points(f"{step}=error:EIO@1"), pytest.raises(DiskError) as caught:
        compact.compact(volume)
        compact.commit(volume)
    assert caught.value.errno == errno.EIO
    check(volume, kept)
    put(volume, 50, b"still writable")
    assert no_leftovers(tmp_path) and volume.compaction is None
    compact.compact(volume)
    assert compact.commit(volume), "the next attempt succeeds"
    check(volume, kept)
    volume.close()


def test_a_full_disk_is_seen_before_anything_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = create(tmp_path)
    fill(volume)
    size, index = volume.dat_bytes, volume.idx_bytes
    usage = compact.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(compact.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(StorageError) as caught:
        compact.compact(volume, preallocate_bytes=5)
    assert str(caught.value) == (
        f"insufficient free space for compaction: need {size + index} bytes (volume: {size}, index: {index}), "
        "but only 1000 bytes available"
    )
    assert not isinstance(caught.value, NoSpace) and no_leftovers(tmp_path)
    volume.close()


def test_a_commit_without_a_copy_says_so_and_changes_nothing(tmp_path: Path) -> None:
    volume = create(tmp_path)
    kept = fill(volume)
    with pytest.raises(StorageError, match=r"^volume 3 compact swap aborted: missing \.cpd/\.cpx$"):
        compact.commit(volume)
    check(volume, kept)
    volume.close()


def test_a_busy_volume_answers_without_doing_anything(tmp_path: Path) -> None:
    volume = create(tmp_path)
    assert volume.try_claim("a test")
    assert compact.compact(volume) is None
    assert compact.commit(volume) is False
    volume.release()
    volume.close()


def test_the_caller_can_interrupt(tmp_path: Path) -> None:
    volume = create(tmp_path)
    kept = fill(volume)
    with pytest.raises(compact.CompactionInterrupted, match=r"^interrupted$"):
        compact.compact(volume, go_on=lambda _offset: False)
    assert no_leftovers(tmp_path)
    check(volume, kept)
    volume.close()


def test_cleanup_drops_a_copy_and_spares_a_commit(tmp_path: Path) -> None:
    volume = create(tmp_path)
    fill(volume)
    compact.cleanup(volume)
    compact.compact(volume)
    assert not no_leftovers(tmp_path)
    compact.cleanup(volume)
    assert no_leftovers(tmp_path)
    (tmp_path / "3.cpc").touch()
    with pytest.raises(StorageError, match="refusing cleanup while commit marker present"):
        compact.cleanup(volume)
    volume.close()


def test_a_crash_after_the_commit_marker_is_finished_by_the_next_load(tmp_path: Path) -> None:
    volume = create(tmp_path)
    kept = fill(volume)
    compact.compact(volume)
    with faults.set_points("compact.remove_marker=error:EIO"):
        assert compact.commit(volume), "the swap is decided: a marker that stays is no failure"
    assert (tmp_path / "3.cpc").exists()
    check(volume, kept)
    put(volume, 60, b"later")
    volume.close()
    again = load(tmp_path, 3)
    check(again, kept)
    assert data_of(again, 60) == b"later"
    again.close()


def test_the_rate_limit_holds_on_the_average() -> None:
    limit = compact.RateLimit(1000)
    assert limit.pause_s(1000) == pytest.approx(1.0 - compact.PAUSE_MAX_S, abs=0.6)
    assert limit.pause_s(1000) > 0.9
    assert compact.RateLimit(0).pause_s(1 << 40) == 0


def test_writers_and_readers_run_through_vacuums(tmp_path: Path) -> None:
    """Every body is checked while one vacuum follows the other."""
    volume = create(tmp_path)
    stop = threading.Event()
    failures: list[str] = []

    def work(first_key: int) -> None:
        version = 0
        state: dict[int, bytes] = {}
        while not stop.is_set() and not failures:
            version += 1
            key = first_key + version % 50
            state[key] = b"%d:%d;" % (key, version) * (1 + version % 30)
            put(volume, key, state[key])
            if version % 5 == 0:
                volume.delete_needle(key, 0x1234ABCD)
                del state[key]
            probe = first_key + (version * 7) % 50
            try:
                found = data_of(volume, probe)
            except NeedleNotFound:
                found = b""
            if found != state.get(probe, b""):
                failures.append(f"key {probe}: {found[:30]!r} instead of {state.get(probe, b'')[:30]!r}")

    threads = [threading.Thread(target=work, args=(1000 * i,), name=f"worker-{i}") for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    for _ in range(25):
        compact.compact(volume)
        compact.commit(volume)
        if failures or time.monotonic() > end:
            break
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert volume.compaction_revision >= 3
    volume.close()
