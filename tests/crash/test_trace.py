"""Every state a crash can leave, from the log of real workloads: loaded with repair on, nothing promised is lost.

A workload runs with csrc/test/iotrace.c preloaded; disk_model.py makes states from its log, here each is loaded and
judged. After a kill: what was acknowledged last, or one of what was on its way, byte for byte; nothing else; writable.
After a loss of power: nothing older than the last flushed change of a key, no body that was never written, and the
volume is read-only only if an acknowledged change is missing. PYVOLUME_CRASH_SAMPLES: how many power cuts are tried.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disk_model import Trace
from trace_workload import COOKIE, SCENARIOS, VID, body_of, data_dirs

from pyvolume._native import engine
from pyvolume.errors import NeedleNotFound, StorageError, VolumeLoadError
from pyvolume.storage import compact_recovery
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, load_volume

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = int(os.environ.get("PYVOLUME_CRASH_SAMPLES", "400"))
SEED = int(os.environ.get("PYVOLUME_CRASH_SEED", "1"))
PROBE_KEY = 1 << 40


@dataclass
class Change:
    """One operation on a key and where in the log it began and ended."""

    version: int | None
    fsync: bool
    begun: int
    acked: int | None = None
    failed: int | None = None


@dataclass
class History:
    """What was asked of the volume, by key, and the barriers: (begun, acknowledged)."""

    keys: dict[int, list[Change]] = field(default_factory=dict)
    barriers: list[tuple[int, int]] = field(default_factory=list)
    created: int = 0

    @classmethod
    def of(cls, trace: Trace) -> History:
        history = cls()
        by_id: dict[int, Change] = {}
        barriers: dict[int, int] = {}
        for at, note in trace.notes:
            match note["e"]:
                case "begin" if note["key"] is None:
                    barriers[note["id"]] = at
                case "begin":
                    by_id[note["id"]] = Change(note["v"], note["fsync"], at)
                    history.keys.setdefault(note["key"], []).append(by_id[note["id"]])
                case "ack" if note["id"] in barriers:
                    history.barriers.append((barriers[note["id"]], at))
                case "ack":
                    by_id[note["id"]].acked = at
                case "created":
                    history.created = at
                case "fail" if note["id"] in by_id:
                    by_id[note["id"]].failed = at
        return history

    def after_kill(self, key: int, cut: int) -> set[int | None]:
        allowed: set[int | None] = {None}
        for change in self.keys.get(key, []):
            if change.acked is not None and change.acked < cut:
                allowed = {change.version}
            elif change.begun < cut and (change.failed is None or change.failed >= cut):
                allowed.add(change.version)
        return allowed

    def after_power_loss(self, key: int, cut: int) -> tuple[set[int | None], bool]:
        """(allowed versions, whether something not flushed came behind the last flushed change)"""
        allowed: set[int | None] = {None}
        loose = False
        for change in self.keys.get(key, []):
            if change.begun >= cut:
                break
            acked = change.acked
            if acked is not None and acked < cut and (change.fsync or self._covered(acked, cut)):
                allowed, loose = {change.version}, False
            else:
                allowed.add(change.version)
                loose = True
        return allowed, loose

    def _covered(self, acked: int, cut: int) -> bool:
        return any(acked < begun and ended < cut for begun, ended in self.barriers)


@dataclass
class Found:
    """A state that was loaded."""

    volume: Volume
    versions: dict[int, int | None]
    broken: set[int]
    invented: list[int]


def lay_out(files: dict[str, bytearray], base: Path) -> None:
    for sub in ("data", "idx"):
        directory = base / sub
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            path.unlink()
    for name, content in files.items():
        (base / name).write_bytes(content)


def look(base: Path, scenario: str, width: int, history: History) -> Found | None:
    """Loads what is there; None if that is no volume yet: no data file, or one without its first bytes."""
    data_dir, idx_dir = data_dirs(str(base), scenario)
    compact_recovery.recover(data_dir, idx_dir, str(VID), default_width=width)
    if not os.path.exists(f"{data_dir}/{VID}.dat"):
        return None
    try:
        volume = load_volume(data_dir, idx_dir, "", VID, options=LoadOptions(offset_width=width))
    except VolumeLoadError as exc:
        if "not initialized" in str(exc) or "version 0" in str(exc):
            return None
        raise
    found = Found(volume, {}, set(), [])
    for row in volume.handle.entries(1024):
        if row.size >= 0 and row.key not in history.keys and row.key != PROBE_KEY:
            found.invented.append(row.key)
    for key, changes in history.keys.items():
        try:
            needle = volume.read_needle(key)
        except NeedleNotFound:
            found.versions[key] = None
            continue
        except StorageError:
            found.broken.add(key)
            continue
        data = bytes(needle.data or b"")
        matching = [c.version for c in changes if c.version is not None and body_of(key, c.version) == data]
        assert matching, f"key {key} has a body that was never written: {data[:40]!r}"
        found.versions[key] = matching[-1]
    return found


def assert_writable(found: Found, base: Path, scenario: str, width: int, history: History) -> None:
    """A new needle can be written, and is there, with all others, after one more load."""
    assert not found.volume.is_read_only
    found.volume.write_needle(NeedleIn(PROBE_KEY, COOKIE, b"probe"), fsync=True)
    found.volume.close()
    again = look(base, scenario, width, history)
    assert again is not None
    assert bytes(again.volume.read_needle(PROBE_KEY).data or b"") == b"probe"
    assert again.versions == found.versions
    assert not again.volume.is_read_only
    again.volume.close()


def trace_of(base: Path, scenario: str, width: int) -> Trace:
    subprocess.run(["make", "-s", "-C", str(ROOT / "csrc"), "iotrace"], check=True)
    traced = base / "traced"
    for directory in (traced / "data", traced / "idx"):
        directory.mkdir(parents=True)
    env = os.environ | {
        "IOTRACE_DIR": str(traced),
        "IOTRACE_LOG": str(base / "log"),
        "IOTRACE_FLUSH_US": "1500" if scenario == "group" else "0",
        "LD_PRELOAD": str(ROOT / "csrc/build/test/libiotrace.so"),
    }
    argv = [sys.executable, str(ROOT / "tests/crash/trace_workload.py"), str(traced), scenario, str(SEED), str(width)]
    done = subprocess.run(argv, check=False, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return Trace.read(base / "log", traced)


def judge_killed(found: Found | None, history: History, cut: int) -> None:
    assert found is not None or history.created >= cut, "the volume is not there"
    for key in history.keys:
        allowed = history.after_kill(key, cut)
        if found is None:
            assert None in allowed, f"key {key} is lost with the volume"
            continue
        assert key not in found.broken, f"key {key} cannot be read"
        got = found.versions[key]
        assert got in allowed, f"key {key} is {got}, allowed {allowed}"
    assert found is None or not found.invented, f"invented {found.invented}"


def judge_power_lost(found: Found | None, history: History, cut: int) -> bool:
    """Whether something acknowledged (but not flushed) is missing."""
    missing = False
    for key in history.keys:
        allowed, loose = history.after_power_loss(key, cut)
        if found is None:
            assert None in allowed, f"key {key} is lost with the volume"
            continue
        if key in found.broken:
            assert loose, f"key {key} was flushed and cannot be read"
            missing = True
            continue
        got = found.versions[key]
        assert got in allowed, f"key {key} is {got}, allowed {allowed}"
        # the record of a delete may be missing behind its row
        missing = missing or got not in history.after_kill(key, cut) or (loose and got is None)
    assert found is None or not found.invented, f"invented {found.invented}"
    return missing


def index_outruns_data(state: dict[str, bytearray], killed: dict[str, bytearray], width: int) -> bool:
    """Whether a row of the index names a record that is not on disk as it was written."""
    dat, whole = f"data/{VID}.dat", killed.get(f"data/{VID}.dat", bytearray())
    rows = next((state[name] for name in (f"data/{VID}.idx", f"idx/{VID}.idx") if name in state), bytearray())
    length = 12 + width
    for at in range(0, len(rows) - length + 1, length):
        units = int.from_bytes(rows[at + 8 : at + 12]) + (rows[at + 12] << 32 if width == 5 else 0)
        size = int.from_bytes(rows[at + length - 4 : at + length], signed=True)
        begin = units * 8
        end = begin + engine.needle_record_len(max(size, 0), 3)
        if begin and state[dat][begin:end] != whole[begin:end]:
            return True
    return False


CASES = [(name, 5 if name in ("vacuum-two-dirs", "group") or name.startswith("pages") else 4) for name in SCENARIOS]


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory where a flush costs nothing: what a crash leaves is made up from the log, not by the disk."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pyvolume-trace-", dir=place) as name:
        yield Path(name)


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("scenario", "width"), CASES)
@pytest.mark.usefixtures("quiet")
def test_no_crash_state_breaks_a_promise(memory_dir: Path, scenario: str, width: int) -> None:
    trace = trace_of(memory_dir, scenario, width)
    history = History.of(trace)
    rng = random.Random(f"{scenario}-{SEED}")
    base = memory_dir / "state"
    assert len(trace.cuts) > 60
    for number, cut in enumerate(trace.cuts):
        write = trace.writes.get(cut)
        torn = rng.randrange(len(write.data)) if write is not None and write.data and number % 3 == 0 else None
        before_answer = cut if torn is None or write is None else write.at + 1
        lay_out(trace.killed(cut, torn), base)
        try:
            found = look(base, scenario, width, history)
            judge_killed(found, history, before_answer)
            if found is not None:
                assert_writable(found, base, scenario, width, history)
        except (AssertionError, StorageError, OSError) as exc:
            raise AssertionError(f"killed before entry {cut} (torn {torn}) of {scenario}: {exc}") from exc
    for number in range(SAMPLES):
        cut = rng.choice(trace.cuts)
        state_seed = f"{scenario}-{SEED}-{number}"
        state = trace.power_lost(cut, random.Random(state_seed))
        lay_out(state, base)
        try:
            found = look(base, scenario, width, history)
            missing = judge_power_lost(found, history, cut)
            missing = missing or (f"data/{VID}.dat" in state and index_outruns_data(state, trace.killed(cut), width))
            if found is not None and not (found.volume.is_read_only and missing):
                assert_writable(found, base, scenario, width, history)
            elif found is not None:
                found.volume.close()
        except (AssertionError, StorageError, OSError) as exc:
            raise AssertionError(f"power lost before entry {cut} of {scenario}, state {state_seed}: {exc}") from exc
