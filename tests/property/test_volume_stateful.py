"""A volume of every kind of needle map and both offset widths against a dictionary: whatever is done to it in whatever
order, it answers as the dictionary does, and after each start its counters are what its index says.

Things that are done: put, overwrite, delete, vacuum with changes in between, close and open, kill and open, take away
or damage the map, serve it with another kind of map for a while.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pyvolume._native import engine
from pyvolume.errors import NeedleNotFound
from pyvolume.storage import compact
from pyvolume.storage.volume import NeedleIn, Volume
from pyvolume.storage.volume_load import LoadOptions, create_volume, load_volume
from pyvolume.types import ReplicaPlacement

KINDS = ("memory", "leveldb", "leveldbMedium", "leveldbLarge", "sorted")
FIXED_KEYS = (*range(7), 2**64 - 1, 2**40, 0x7079_766F_6C75_6D65)
KEYS = st.sampled_from(FIXED_KEYS)
DATA = st.one_of(st.just(b""), st.binary(min_size=1, max_size=40))
COOKIE = 0x1234ABCD
CHANGES = st.lists(st.tuples(KEYS, st.one_of(st.none(), DATA)), max_size=4)


class VolumeMachine(RuleBasedStateMachine):
    """`expected` holds what is live. `undead`: empty files that were deleted; a leveldb kind keeps them live until its
    map is made anew or replays the tombstone (upstream's trap), so after a kill either may be found."""

    kind = "memory"
    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="pyvolume-stateful-"))
        self.directory = self.root / "0"
        self.directory.mkdir()
        self.serial = 0
        self.expected: dict[int, bytes] = {}
        self.undead: set[int] = set()
        self.frozen = False
        self.volume: Volume

    @property
    def on_disk(self) -> bool:
        return self.kind.startswith("leveldb")

    def options(self, kind: str | None = None) -> LoadOptions:
        kind = kind or self.kind
        return LoadOptions(offset_width=self.width, index_kind="memory" if kind == "sorted" else kind)

    def load(self, kind: str | None = None) -> None:
        place = str(self.directory)
        self.volume = load_volume(place, place, "", 3, options=self.options(kind))

    def rows(self) -> list[engine.IdxRow]:
        with open(self.directory / "3.idx", "rb") as handle:
            return engine.idx_read(handle.fileno(), self.width, 0, 1 << 16)

    def check_counters(self) -> None:
        """Only right after a start, as later they go by what happens."""
        if self.kind == "memory" or (self.kind == "sorted" and not self.frozen):
            return
        last: dict[int, int] = {}
        files = content = deleted = deleted_bytes = 0
        for key, _, size in reversed(self.rows()):
            files += 1
            content += max(size, 0)
            deleted += key in last or size <= 0
            deleted_bytes += max(size, 0) if key in last else 0
            last.setdefault(key, size)
        stat = self.volume.stat()
        found = stat.file_count, stat.deleted_count, stat.deleted_bytes, stat.file_bytes, stat.max_key
        exact = files, deleted, deleted_bytes, content, max(last, default=0)
        if self.kind != "sorted":
            assert found == exact
            return
        # A sorted map estimates what is deleted by a filter, as upstream does: it may take a new key for a known one.
        assert (found[0], found[3], found[4]) == (exact[0], exact[3], exact[4])
        assert deleted <= found[1] <= files and deleted_bytes <= found[2] <= content

    def read(self, key: int) -> bytes | None:
        try:
            return bytes(self.volume.read_needle(key).data or b"")
        except NeedleNotFound:
            return None

    def change(self, key: int, data: bytes | None) -> None:
        if data is None:
            before = self.expected.get(key)
            size = self.volume.delete_needle(key, COOKIE)
            assert (size > 0) == bool(before)
            if before == b"" and self.on_disk:
                self.undead.add(key)
            else:
                self.expected.pop(key, None)
            return
        # Without a cookie the one on disk is kept: a vacuum gives empty files another one.
        self.volume.write_needle(NeedleIn(key, 0, data, flags=0x0E, last_modified_s=1), check_cookie=False)
        self.expected[key] = data
        self.undead.discard(key)

    def bury(self) -> None:
        for key in self.undead:
            del self.expected[key]
        self.undead.clear()

    def look_at_the_undead(self) -> None:
        for key in [key for key in self.undead if self.read(key) is None]:
            del self.expected[key]
            self.undead.discard(key)

    # ------------------------------------------------------------------------------------------------------- rules

    @initialize()
    def create(self) -> None:
        place = str(self.directory)
        self.volume = create_volume(place, place, "", 3, replica_placement=ReplicaPlacement(), options=self.options())

    @precondition(lambda self: not self.frozen)
    @rule(key=KEYS, data=DATA)
    def put(self, key: int, data: bytes) -> None:
        self.change(key, data)

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        self.change(key, None)

    @precondition(lambda self: not self.frozen)
    @rule(changes=CHANGES, commit=st.booleans())
    def vacuum(self, changes: list[tuple[int, bytes | None]], commit: bool) -> None:
        assert compact.compact(self.volume) is not None
        for key, data in changes:
            self.change(key, data)
        if commit:
            assert compact.commit(self.volume)
            self.bury()
        else:
            compact.cleanup(self.volume)

    @rule()
    def reopen(self) -> None:
        self.volume.close()
        self.load()
        self.check_counters()

    @rule()
    def kill(self) -> None:
        """What is on disk at this moment, opened as after a kill."""
        self.serial += 1
        copy = self.root / str(self.serial)
        shutil.copytree(self.directory, copy, copy_function=copy_if_there)
        self.volume.close()
        shutil.rmtree(self.directory)
        self.directory = copy
        self.load()
        self.check_counters()
        self.look_at_the_undead()

    @precondition(lambda self: self.kind != "memory")
    @rule()
    def lose_the_map(self) -> None:
        self.volume.close()
        shutil.rmtree(self.directory / "3.rocks", ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "3.sdx").unlink()
        self.load()
        self.check_counters()
        self.bury()

    @precondition(lambda self: self.on_disk)
    @rule(which=st.integers(0, 30), at=st.floats(0, 1), mask=st.integers(1, 255))
    def damage_the_map(self, which: int, at: float, mask: int) -> None:
        """One byte of a file that RocksDB looks at when it opens a database (tables are looked at later)."""
        self.volume.close()
        files = [path for path in sorted((self.directory / "3.rocks").rglob("*")) if self.is_checked(path)]
        if files:
            path = files[which % len(files)]
            content = bytearray(path.read_bytes())
            content[int(at * (len(content) - 1))] ^= mask
            path.write_bytes(content)
        self.load()
        self.check_counters()
        self.look_at_the_undead()

    @staticmethod
    def is_checked(path: Path) -> bool:
        return path.is_file() and path.stat().st_size > 0 and path.name.startswith(("CURRENT", "MANIFEST"))

    @precondition(lambda self: self.on_disk)
    @rule(changes=CHANGES)
    def serve_with_another_kind(self, changes: list[tuple[int, bytes | None]]) -> None:
        self.volume.close()
        self.load("memory")
        self.bury()
        kind, self.kind = self.kind, "memory"  # of the instance only
        for key, data in changes:
            self.change(key, data)
        self.kind = kind
        self.volume.close()
        self.load()
        self.check_counters()
        for key in FIXED_KEYS:
            if key not in self.expected and self.read(key) == b"":
                # Its tombstone was folded in while the map kept it live.
                self.expected[key] = b""
                self.undead.add(key)

    @precondition(lambda self: self.kind == "sorted" and not self.frozen)
    @rule()
    def freeze(self) -> None:
        self.volume.set_read_only(can_delete=True, persist=True)
        self.frozen = True
        self.reopen()

    @precondition(lambda self: self.frozen)
    @rule()
    def thaw(self) -> None:
        self.volume.set_writable()
        self.frozen = False

    @invariant()
    def it_answers_as_the_dictionary_does(self) -> None:
        if not hasattr(self, "volume"):
            return
        for key in FIXED_KEYS:
            assert self.read(key) == self.expected.get(key), key

    def teardown(self) -> None:
        if hasattr(self, "volume"):
            self.volume.close()
        shutil.rmtree(self.root)


def copy_if_there(source: str, target: str) -> None:
    """RocksDB removes tables in the background; a copy without one is a damaged map."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(source, target)


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_is_a_dictionary(kind: str, width: int) -> None:
    machine = type(f"Volume_{kind}_{width}", (VolumeMachine,), {"kind": kind, "width": width})
    examples = max(5, settings.default.max_examples // (30 if kind.startswith("leveldb") else 10))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
