"""A volume is unmounted, mounted, marked, deleted and made anew while clients use it; a server starts and stops.

What is served must be right at every moment, nothing acknowledged may be lost, and no thread or descriptor may be left.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path

from race.history import History, Refused
from race.server import HttpStore, threads_and_fds, vacuum

from tools.compat.bed import Bed, wait_for

ROOT = Path(__file__).resolve().parents[2]
VID = 7
OTHER = 8
ROUNDS = 25


class Presence:
    """Whether the volume may be away just now: an odd number while it is being taken away and brought back."""

    def __init__(self) -> None:
        self.number = 0

    def surely_there(self, before: int) -> bool:
        return before == self.number and before % 2 == 0


class MountedStore(HttpStore):
    """A 404 says nothing while the volume may be away."""

    def __init__(self, bed: Bed, vid: int, presence: Presence) -> None:
        super().__init__(bed, vid)
        self.presence = presence

    def delete(self, key: int) -> None:
        before = self.presence.number
        super().delete(key)
        if not self.presence.surely_there(before):
            raise Refused

    def get(self, key: int) -> bytes | None:
        before = self.presence.number
        data = super().get(key)
        if data is None and not self.presence.surely_there(before):
            raise Refused
        return data


def test_mounts_and_marks_under_load(tmp_path: Path) -> None:
    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume") as bed:
        assert bed.allocate(volume_id=VID, replication="000", version=3)
        presence = Presence()
        history = History.of(120)
        threads = history.start(lambda: MountedStore(bed, VID, presence), writers=2, readers=2)
        steady = (0, 0)
        for number in range(ROUNDS):
            presence.number += 1
            bed.call("VolumeUnmount", volume_id=VID)
            bed.call("VolumeMount", volume_id=VID)
            presence.number += 1
            vacuum(bed, VID)
            bed.call("VolumeMarkReadonly", volume_id=VID)
            bed.call("VolumeMarkWritable", volume_id=VID)
            reads = history.done["get"] + 20
            assert wait_for(lambda least=reads: history.done["get"] > least or bool(history.problems), 30)  # type: ignore[misc]
            assert history.problems == []
            if number == 5:
                steady = threads_and_fds(bed)
        assert history.done["refused"] > 0, "no request met a volume that was away"
        history.finish(threads, HttpStore(bed, VID))
        assert history.done["put"] > ROUNDS
        assert not bed.call("VolumeStatus", volume_id=VID).is_read_only
        assert wait_for(lambda: threads_and_fds(bed)[1] <= steady[1], 20), f"{threads_and_fds(bed)} after {steady}"
        assert threads_and_fds(bed)[0] <= steady[0] + 2  # pools of workers may grow to their bound
        assert bed.stop_server() == 0
        bed.start_server()
        history.check(HttpStore(bed, VID))


def test_deleted_volume_does_not_come_back(tmp_path: Path) -> None:
    """No answer holds what was written to a volume of the same id that was deleted before the request came."""
    epoch = 0
    stop = threading.Event()
    problems: list[str] = []
    seen = itertools.count()

    def client(bed: Bed, seed: int) -> None:
        rng = random.Random(seed)
        try:
            store = HttpStore(bed, OTHER)
            while not stop.is_set():
                key = rng.randrange(1, 40)
                before = epoch
                if rng.random() < 0.5:
                    try:
                        store.put(key, b"%d/%d" % (before, key))
                    except Refused:
                        continue
                data = store.get(key)
                if data is not None:
                    next(seen)
                    written, _, what = data.partition(b"/")
                    if int(what) != key or int(written) < before - 1:
                        problems.append(f"key {key} is {data!r} in epoch {before}")
        except Exception as exc:  # a thread must not end unseen
            problems.append(f"{type(exc).__name__}: {exc}")

    with Bed(tmp_path, command=f"{sys.executable} -m pyvolume") as bed:
        threads = [threading.Thread(target=client, args=(bed, i), name=f"client-{i}") for i in range(3)]
        for t in threads:
            t.start()
        for _ in range(ROUNDS):
            assert bed.allocate(volume_id=OTHER, replication="000", version=3)
            reads = next(seen)
            assert wait_for(lambda least=reads: next(seen) > least + 20 or bool(problems), 30)  # type: ignore[misc]
            bed.call("VolumeDelete", volume_id=OTHER)
            epoch += 1
            assert problems == []
        stop.set()
        for t in threads:
            t.join(30)
            assert not t.is_alive(), t.name
        assert problems == []
        assert not [p.name for p in bed.data_dir.iterdir() if p.name.startswith(f"{OTHER}.")]


START_STOP = """
import gc, os, sys, time
from pyvolume import config
from pyvolume.server import lifecycle
from pyvolume.server.signals import Inbox

def left():
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

def once():
    flags = config.parse_volume(config.parse_global(["volume", *sys.argv[1:]], os.environ), os.environ)
    inbox = Inbox()
    process = lifecycle.Process(flags, inbox, dict(os.environ))
    assert process.start().kind == "started"
    assert process.stop().status == 0
    os.close(inbox._reader)
    os.close(inbox._writer)

once()
end = time.monotonic() + 20
while (first := left())[0] > 1 and time.monotonic() < end:
    time.sleep(0.05)
for _ in range(4):
    once()
end = time.monotonic() + 20
while (last := left()) > first and time.monotonic() < end:
    time.sleep(0.05)
assert last[0] <= first[0] and last[1] <= first[1], f"threads, descriptors: {first}, then {last}"
"""


def test_start_and_stop_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    flags = ["-ip=127.0.0.1", "-port=0", "-port.grpc=0", f"-dir={tmp_path}/data", "-master=", "-preStopSeconds=0"]
    done = subprocess.run(
        [sys.executable, "-c", START_STOP, *flags], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
