"""Makes the first, second, third, ... file call of a load or of an operation fail, until one run meets no failure.

Started by test_fault_walks.py as a process with csrc/test/iotrace.c preloaded: `fault_walk.py DIR WALK`. After each
failure what was acknowledged must be there, in this process and after another load; descriptors and memory must be as
they were. Prints how many calls the walk made fail.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pyvolume._native import engine
from pyvolume.errors import StorageError
from pyvolume.storage import compact, compact_recovery
from pyvolume.storage.superblock import SuperBlock
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement

VID = 5
COOKIE = 0xC0FFEE
KEYS = range(1, 13)
ROW = 16
ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE)
MEMORY_SLACK_BYTES = 1 << 20
CALLS_MAX = 2000

library = ctypes.CDLL(None)


def arm(nth: int, code: int) -> None:
    library.iotrace_arm(ctypes.c_long(nth), ctypes.c_int(code))


def calls() -> int:
    library.iotrace_calls.restype = ctypes.c_long
    return int(library.iotrace_calls())


def body_of(key: int) -> bytes:
    return b"%d;" % key * (key * 20)


def load(base: Path) -> Volume:
    compact_recovery.recover(str(base), str(base), str(VID))
    return load_volume(str(base), str(base), "", VID, options=LoadOptions())


def put(volume: Volume, key: int, data: bytes, *, fsync: bool = False) -> None:
    volume.write_needle(NeedleIn(key, COOKIE, data, flags=0x08, last_modified_s=1_700_000_000), fsync=fsync)


def check(volume: Volume, wanted: dict[int, bytes | None]) -> None:
    for key, data in wanted.items():
        try:
            got = bytes(volume.read_needle(key).data or b"")
        except StorageError as exc:
            assert data is None and str(exc) in ("not found", "already deleted"), (key, exc)
        else:
            assert got == data, (key, got[:20])


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ----------------------------------------------------------------------------------- states of files that a load meets


def healthy(base: Path) -> dict[int, bytes | None]:
    volume = create_volume(
        str(base), str(base), "", VID, replica_placement=ReplicaPlacement(), options=LoadOptions(offset_width=4)
    )
    for key in KEYS:
        put(volume, key, body_of(key))
    volume.delete_needle(3, COOKIE, volume.read_needle(3).checksum)
    volume.close()
    return {key: None if key == 3 else body_of(key) for key in KEYS}


def torn(base: Path) -> dict[int, bytes | None]:
    """Rows missing, half a row, half a record (L3, L4)."""
    wanted = healthy(base)
    idx, dat = base / f"{VID}.idx", base / f"{VID}.dat"
    idx.write_bytes(idx.read_bytes()[: -4 * ROW + 5])
    with dat.open("ab") as handle:
        handle.write(engine.frame_needle(99, COOKIE, b"x" * 300, version=3, append_at_ns=1 << 60)[:200])
    return wanted


def unindexed(base: Path) -> dict[int, bytes | None]:
    wanted = healthy(base)
    (base / f"{VID}.idx").unlink()
    return wanted


def holed(base: Path) -> dict[int, bytes | None]:
    wanted = healthy(base)
    idx = base / f"{VID}.idx"
    rows = idx.read_bytes()
    idx.write_bytes(rows[: 5 * ROW] + bytes(2 * ROW) + rows[7 * ROW :])
    return wanted


def swapping(base: Path) -> dict[int, bytes | None]:
    """A commit that was decided, with one of its renames made."""
    wanted = healthy(base)
    volume = load(base)
    assert compact.compact(volume) is not None
    volume.close()
    (base / f"{VID}.cpc").touch()
    os.rename(base / f"{VID}.cpd", base / f"{VID}.dat")
    with (base / f"{VID}.dat").open("rb") as handle:
        assert SuperBlock.read(handle.fileno()).compaction_revision == 1
    return wanted


STATES: dict[str, Callable[[Path], dict[int, bytes | None]]] = {
    f.__name__: f for f in (healthy, torn, unindexed, holed, swapping)
}


def walk_load(base: Path, make: Callable[[Path], dict[int, bytes | None]]) -> int:
    """Fails each call of recovery, repair and load in turn."""
    origin = base / "origin"
    origin.mkdir()
    wanted = make(origin)
    done = 0
    fds = memory = 0
    for nth in range(1, CALLS_MAX):
        place = base / "walk"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(origin, place)
        if nth == 4:
            fds, memory = open_fds(), resident_bytes()
        arm(nth, ERRORS[nth % len(ERRORS)])
        try:
            volume = load(place)
        except (StorageError, engine.NativeError, OSError):
            met = calls() >= nth
            arm(0, 0)
            assert met, "a load failed without a failing call"
        else:
            met = calls() >= nth
            arm(0, 0)
            if not volume.is_read_only:
                check(volume, wanted)
            volume.close()
        again = load(place)
        assert not again.is_read_only, nth
        check(again, wanted)
        put(again, 1000 + nth, b"after", fsync=True)
        check(again, {1000 + nth: b"after"})
        again.close()
        if not met:
            break
        done = nth
    assert 4 < done < CALLS_MAX - 2
    assert open_fds() == fds, "a descriptor is left open"
    assert resident_bytes() < memory + MEMORY_SLACK_BYTES, "memory grows"
    return done


# ---------------------------------------------------------------------------------------------- operations of a volume


def op_append(volume: Volume, nth: int) -> dict[int, bytes | None]:
    put(volume, 1, b"new %d" % nth)
    return {1: b"new %d" % nth}


def op_fsync(volume: Volume, nth: int) -> dict[int, bytes | None]:
    put(volume, 2, b"flushed %d" % nth, fsync=True)
    return {2: b"flushed %d" % nth}


def op_delete(volume: Volume, nth: int) -> dict[int, bytes | None]:
    volume.delete_needle(2000 + nth, COOKIE, volume.read_needle(2000 + nth).checksum)
    return {2000 + nth: None}


def op_vacuum(volume: Volume, nth: int) -> dict[int, bytes | None]:
    assert compact.compact(volume) is not None
    put(volume, 4, b"meanwhile %d" % nth)
    assert compact.commit(volume)
    return {4: b"meanwhile %d" % nth}


OPERATIONS: dict[str, Callable[[Volume, int], dict[int, bytes | None]]] = {
    "append": op_append,
    "fsync": op_fsync,
    "delete": op_delete,
    "vacuum": op_vacuum,
}


def walk_operation(base: Path, operation: Callable[[Volume, int], dict[int, bytes | None]]) -> int:
    """Fails each call of an operation in turn; afterwards the volume takes the same operation."""
    wanted = healthy(base)
    volume = load(base)
    done = 0
    fds = memory = 0
    for nth in range(1, CALLS_MAX):
        put(volume, 2000 + nth, b"to be deleted")
        wanted[2000 + nth] = b"to be deleted"
        if nth == 4:
            fds, memory = open_fds(), resident_bytes()
        arm(nth, ERRORS[nth % 2])
        try:
            result = operation(volume, nth)
        except StorageError:
            met = calls() >= nth
            arm(0, 0)
            assert met, "an operation failed without a failing call"
            if operation is op_vacuum:  # the write in between may have been acknowledged before the commit failed
                got = bytes(volume.read_needle(4).data or b"")
                assert got in (wanted[4], b"meanwhile %d" % nth)
                wanted[4] = got
            check(volume, wanted)
            wanted |= operation(volume, nth)
        else:
            met = calls() >= nth
            arm(0, 0)
            wanted |= result
        assert not volume.is_read_only
        check(volume, wanted)
        if not met:
            break
        if nth % 5 == 0:
            volume.close()
            volume = load(base)
            assert not volume.is_read_only
            check(volume, wanted)
        done = nth
    assert open_fds() == fds or done < 4, "a descriptor is left open"
    assert resident_bytes() < memory + MEMORY_SLACK_BYTES or done < 4, "memory grows"
    volume.close()
    volume = load(base)
    check(volume, wanted)
    volume.close()
    return done


def main() -> None:
    base, name = Path(sys.argv[1]), sys.argv[2]
    if name in STATES:
        print(walk_load(base, STATES[name]))
    else:
        print(walk_operation(base, OPERATIONS[name]))


if __name__ == "__main__":
    main()
