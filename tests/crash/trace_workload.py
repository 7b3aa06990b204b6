"""Runs one workload on a volume of its own under csrc/test/iotrace.c, and notes in the log what was asked and answered.

Started by test_trace.py as a process with the library preloaded: `trace_workload.py DIR SCENARIO SEED WIDTH`. DIR gets
`data/` and `idx/`. Notes are JSON: `begin` and then `ack` or `fail` of one operation; an operation without a key is a
barrier: once it is acknowledged, everything acknowledged before it began is on disk. `created`: the volume is there.
`filled`: what is to be looked at begins.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from pyvolume._native import engine
from pyvolume.errors import StorageError
from pyvolume.storage import compact, compact_recovery
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement

VID = 9
COOKIE = 0x5EED
MANY_BYTES = 9000


def body_of(key: int, version: int) -> bytes:
    """What a key holds in a version; version 0 is an empty file."""
    if version == 0:
        return b""
    length = (key * 131 + version * 977) % (MANY_BYTES if version % 9 == 0 else 700) + 1
    return (f"{key}:{version};".encode() * (length // 4 + 1))[:length]


def data_dirs(base: str, scenario: str) -> tuple[str, str]:
    data = f"{base}/data"
    return data, f"{base}/idx" if scenario.endswith("-two-dirs") else data


class Tracer:
    """The functions of the preloaded library."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._note = library.iotrace_note
        self._note.argtypes = [ctypes.c_char_p]
        self._note.restype = None
        self._arm = library.iotrace_arm
        self._arm.argtypes = [ctypes.c_long, ctypes.c_int]
        self._arm.restype = None

    def note(self, **fields: object) -> None:
        self._note(json.dumps(fields).encode())

    def arm(self, nth: int, code: int = errno.EIO) -> None:
        self._arm(nth, code)


@dataclass
class Workload:
    """Operations on one volume, told to the log."""

    tracer: Tracer
    data_dir: str
    idx_dir: str
    width: int
    rng: random.Random
    numbers: count[int] = field(default_factory=count)
    known: dict[int, int | None] = field(default_factory=dict)
    version: int = 0

    def create(self) -> Volume:
        volume = create_volume(
            self.data_dir,
            self.idx_dir,
            "",
            VID,
            replica_placement=ReplicaPlacement(),
            options=LoadOptions(offset_width=self.width),
        )
        self.tracer.note(e="created")
        return volume

    def load(self) -> Volume:
        compact_recovery.recover(self.data_dir, self.idx_dir, str(VID))
        return load_volume(self.data_dir, self.idx_dir, "", VID, options=LoadOptions(offset_width=self.width))

    def put(self, volume: Volume, key: int, version: int, *, fsync: bool = False) -> bool:
        number = next(self.numbers)
        data = body_of(key, version)
        self.tracer.note(e="begin", id=number, key=key, v=version, fsync=fsync)
        try:
            volume.write_needle(NeedleIn(key, COOKIE, data, flags=0x08, last_modified_s=1_700_000_000), fsync=fsync)
        except StorageError:
            self.tracer.note(e="fail", id=number)
            return False
        self.tracer.note(e="ack", id=number)
        self.known[key] = version
        return True

    def delete(self, volume: Volume, key: int) -> bool:
        number = next(self.numbers)
        self.tracer.note(e="begin", id=number, key=key, v=None, fsync=False)
        try:
            known = volume.read_needle(key)  # as the server does
            volume.delete_needle(key, COOKIE, known.checksum)
        except StorageError:
            self.tracer.note(e="fail", id=number)
            return False
        self.tracer.note(e="ack", id=number)
        self.known[key] = None
        return True

    def step(self, volume: Volume, rng: random.Random, keys: range, fsync_share: float, versions: count[int]) -> None:
        """One random operation on one of the keys."""
        key = rng.choice(keys)
        if self.known.get(key) is not None and rng.random() < 0.25:
            self.delete(volume, key)
        else:
            fresh = self.known.get(key) is None and rng.random() < 0.06
            self.put(volume, key, 0 if fresh else next(versions), fsync=rng.random() < fsync_share)

    def barrier_begin(self) -> int:
        number = next(self.numbers)
        self.tracer.note(e="begin", id=number, key=None)
        return number

    def vacuum(self, volume: Volume, versions: count[int], keys: range) -> None:
        """Compact and commit with changes in between; the commit is a barrier."""

        def meanwhile(_offset: int) -> bool:
            for _ in range(6):
                self.step(volume, self.rng, keys, 0.2, versions)
            return True

        assert compact.compact(volume, go_on=meanwhile) is not None
        for _ in range(6):
            self.step(volume, self.rng, keys, 0.2, versions)
        number = self.barrier_begin()
        assert compact.commit(volume)
        self.tracer.note(e="ack", id=number)


def writes(w: Workload) -> None:
    """Plain and flushed writes, deletes, a clean close, a load, more of it."""
    versions = count(1)
    volume = w.create()
    for _ in range(90):
        w.step(volume, w.rng, range(1, 25), 0.25, versions)
    number = w.barrier_begin()
    volume.close()
    w.tracer.note(e="ack", id=number)
    volume = w.load()
    for _ in range(40):
        w.step(volume, w.rng, range(10, 35), 0.25, versions)
    volume.close()


def group(w: Workload) -> None:
    """Threads whose flushes are shared, and others that do not wait for any."""
    volume = w.create()
    shares = (0.9, 0.9, 0.5, 0.0)
    versions = [count(1, 4), count(2, 4), count(3, 4), count(4, 4)]

    def run(i: int) -> None:
        rng = random.Random(w.rng.random() + i)
        for _ in range(36):
            w.step(volume, rng, range(1 + i * 8, 8 + i * 8), shares[i], versions[i])

    threads = [threading.Thread(target=run, args=(i,), name=f"writer-{i}") for i in range(len(shares))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    volume.close()


def vacuum(w: Workload) -> None:
    versions = count(1)
    volume = w.create()
    for _ in range(2):
        for _ in range(50):
            w.step(volume, w.rng, range(1, 25), 0.2, versions)
        w.vacuum(volume, versions, range(1, 25))
    for _ in range(6):
        w.step(volume, w.rng, range(1, 25), 0.2, versions)
    volume.close()


def faulty(w: Workload) -> None:
    """Some call of some operations fails: what was refused must not be there, the rest must."""
    versions = count(1)
    volume = w.create()
    for number in range(110):
        if number % 3 == 2:
            w.tracer.arm(w.rng.randrange(1, 8), w.rng.choice((errno.EIO, errno.ENOSPC)))
        w.step(volume, w.rng, range(1, 20), 0.5, versions)
        w.tracer.arm(0)
    volume.close()


def faulty_vacuum(w: Workload) -> None:
    """Vacuums that fail at some call, each followed by flushed writes to the files that stay."""
    versions = count(1)
    volume = w.create()
    keys = range(1, 16)
    for nth in range(1, 40, 2):
        for _ in range(5):
            w.step(volume, w.rng, keys, 0.3, versions)
        number = w.barrier_begin()
        try:
            if nth % 4 == 1:
                w.tracer.arm(nth)
                compact.compact(volume)
                compact.commit(volume)
            else:
                compact.compact(volume)
                w.put(volume, keys[0], next(versions))
                w.tracer.arm(nth)
                compact.commit(volume)
        except StorageError:
            w.tracer.arm(0)
            w.tracer.note(e="fail", id=number)
        else:
            w.tracer.arm(0)
            w.tracer.note(e="ack", id=number)
        for _ in range(3):
            w.step(volume, w.rng, keys, 0.7, versions)
    volume.close()


def repair(w: Workload) -> None:
    """A volume as a crash leaves it: a ragged index, records without rows, half a record; then loads that mend it."""
    versions = count(1)
    volume = w.create()
    for _ in range(30):
        w.step(volume, w.rng, range(1, 12), 0.0, versions)
    number = w.barrier_begin()
    volume.close()
    w.tracer.note(e="ack", id=number)
    for round_number in range(3):
        extra = {100 + round_number * 4 + i: next(versions) for i in range(4)}
        numbers = {}
        records = b""
        for key, version in extra.items():
            numbers[key] = next(w.numbers)
            w.tracer.note(e="begin", id=numbers[key], key=key, v=version, fsync=True)
            records += engine.frame_needle(
                key, COOKIE, body_of(key, version), version=3, flags=0x08, last_modified_s=5, append_at_ns=1 << 60
            )
        torn = engine.frame_needle(7777, COOKIE, b"torn" * 50, version=3, append_at_ns=1 << 60)
        append(f"{w.data_dir}/{VID}.dat", records)
        for own in numbers.values():
            w.tracer.note(e="ack", id=own)
        append(f"{w.data_dir}/{VID}.dat", torn[:-40])
        if round_number == 2:
            os.unlink(f"{w.idx_dir}/{VID}.idx")
        else:
            append(f"{w.idx_dir}/{VID}.idx", b"\1" * 7)
        volume = w.load()
        assert not volume.is_read_only
        w.put(volume, 50 + round_number, next(versions), fsync=True)
        number = w.barrier_begin()
        volume.close()
        w.tracer.note(e="ack", id=number)


def pages(w: Workload, page: int) -> None:
    """An index of rows of 17 bytes, one of which lies across the end of a page: another part of it with each page."""
    versions = count(1)
    volume = w.create()
    for number in range(page * 4096 // 17 - 16):
        volume.write_needle(NeedleIn(1 << 56 | 1, COOKIE, b"%d" % number))
    for key in range(1, 7):
        w.put(volume, key << 56 | key, next(versions))
    number = w.barrier_begin()
    volume.sync()
    w.tracer.note(e="ack", id=number)
    w.tracer.note(e="filled")
    rng = w.rng
    for _ in range(34):
        key = rng.randrange(1, 9)
        key |= key << 56
        if w.known.get(key) is not None and rng.random() < 0.25:
            w.delete(volume, key)
        else:
            fresh = w.known.get(key) is None and rng.random() < 0.2
            w.put(volume, key, 0 if fresh else next(versions), fsync=rng.random() < 0.35)
    volume.close()


def append(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


SCENARIOS = {
    "writes": writes,
    "group": group,
    "vacuum": vacuum,
    "vacuum-two-dirs": vacuum,
    "faulty": faulty,
    "faulty-vacuum": faulty_vacuum,
    "repair": repair,
    "pages-2": partial(pages, page=2),
    "pages-4": partial(pages, page=4),
    "pages-6": partial(pages, page=6),
    "pages-9": partial(pages, page=9),
}


def main() -> None:
    base, scenario, seed, width = sys.argv[1:]
    data_dir, idx_dir = data_dirs(base, scenario)
    tracer = Tracer()
    for directory in dict.fromkeys((data_dir, idx_dir)):
        tracer.note(e="dir", path=directory, inode=os.stat(directory).st_ino)
    SCENARIOS[scenario](Workload(tracer, data_dir, idx_dir, int(width), random.Random(f"{scenario}-{seed}")))


if __name__ == "__main__":
    main()
