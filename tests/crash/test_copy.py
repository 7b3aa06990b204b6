"""A process dies while a copied volume takes the place of an old one: the next start serves one of them, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyvolume import faults
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.storage.store import Store
from pyvolume.storage.volume import NeedleIn
from pyvolume.types import ReplicaPlacement

COOKIE = 7
OLD, NEW = b"the old replica", b"the copy"

CHILD = """
import sys
from pathlib import Path
from pyvolume.config import DirConfig, MinFreeSpace, ServerConfig
from pyvolume.storage.copy import IncomingVolume, SourceStatus
from pyvolume.storage.store import Store

source, target, idx = sys.argv[1:]
store = Store(ServerConfig(dirs=(DirConfig(target, idx, min_free=MinFreeSpace(None, 0)),)))
store.load()
parts = {name: Path(f"{source}/3{name}").read_bytes() for name in (".dat", ".idx", ".vif")}
status = SourceStatus(3, "", 3, len(parts[".dat"]), len(parts[".idx"]), 1, 0, "", False, 4)
with IncomingVolume(store.locations[0], status) as incoming:
    incoming.begin("nowhere")
    for name, content in parts.items():
        file = incoming.open(name)
        file.write(content)
        file.finish(1_000_000_000)
    incoming.verify(replaces=store.has_volume(3))
    incoming.seal()
    store.replace_volume(3, store.locations[0], incoming.name, incoming.place)
store.close()
"""


def open_store(directory: Path, idx: Path | None) -> Store:
    for path in (directory, *([idx] if idx else [])):
        path.mkdir(exist_ok=True)
    places = (DirConfig(str(directory), str(idx or ""), min_free=MinFreeSpace(None, 0)),)
    store = Store(ServerConfig(dirs=places))
    store.load()
    return store


def make(directory: Path, idx: Path | None, data: bytes, keys: int) -> None:
    store = open_store(directory, idx)
    volume = store.allocate_volume(3, "", ReplicaPlacement())
    for key in range(1, keys + 1):
        volume.write_needle(NeedleIn(key, COOKIE, data + b"%d" % key))
    volume.delete_needle(1, COOKIE)
    store.close()


@pytest.mark.parametrize("apart", [False, True], ids=["one directory", "an idx directory"])
@pytest.mark.parametrize("had_replica", [True, False], ids=["replaces", "first"])
@pytest.mark.parametrize(
    ("point", "served"),
    [
        ("copy.write@1", OLD),
        ("copy.write@3", OLD),
        ("copy.sync@3", OLD),
        ("copy.seal", OLD),
        ("copy.marker.write", OLD),
        ("copy.marker.rename", OLD),
        ("copy.rename@1", NEW),
        ("copy.rename@2", NEW),
        ("copy.rename@3", NEW),
        ("copy.mount", NEW),
    ],
)
def test_a_crash_at_any_step(tmp_path: Path, point: str, served: bytes, had_replica: bool, apart: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    idx = tmp_path / "idx" if apart else None
    make(source, None, NEW, 20)
    if had_replica:
        make(target, idx, OLD, 5)
    else:
        open_store(target, idx).close()
    name, _, nth = point.partition("@")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(target), str(idx or "")],
        env={"PYVOLUME_FAILPOINTS": f"{name}=exit@{nth or 1}"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == faults.EXIT_STATUS, child.stderr
    store = open_store(target, idx)
    try:
        volume = store.find_volume(3)
        if served == OLD and not had_replica:
            assert volume is None
            names = set()
        else:
            assert volume is not None
            assert volume.file_count == (5 if served == OLD else 20)
            assert bytes(volume.read_needle(4).data or b"") == served + b"4"
            assert not volume.is_read_only
            names = {"3.dat", "3.idx", "3.vif"}
        places = [target, *([idx] if idx else [])]
        assert {path.name for place in places for path in place.iterdir()} - {"vol_dir.uuid"} == names
    finally:
        store.close()
