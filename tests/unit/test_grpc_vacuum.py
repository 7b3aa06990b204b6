"""The vacuum RPCs, in the master's order (contract grpc.md 6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from test_grpc_handlers import NOWHERE, Code, Node, plain, unknown


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.end()


def fill(node: Node) -> None:
    node.alloc(1)
    for key in range(1, 21):
        node.put(1, key, b"x" * 500)
    for key in range(1, 11):
        node.store.find_volume(1).delete_needle(key, 0x11)  # type: ignore[union-attr]


def test_check_compact_commit(node: Node) -> None:
    fill(node)
    before = node.call("VolumeStatus", volume_id=1).first
    answer = node.call("VacuumVolumeCheck", volume_id=1)
    assert answer.code is Code.OK and answer.first.garbage_ratio == pytest.approx(0.5)
    copied = node.call("VacuumVolumeCompact", volume_id=1)
    assert copied.code is Code.OK, "a small volume streams nothing; the end of the stream says it is done"
    assert node.file("1.cpd").exists()
    done = node.call("VacuumVolumeCommit", volume_id=1)
    assert done.code is Code.OK and not done.first.is_read_only
    assert 0 < done.first.volume_size < before.volume_size
    assert not node.file("1.cpd").exists() and not node.file("1.cpc").exists()
    assert node.call("VacuumVolumeCheck", volume_id=1).first.garbage_ratio == 0
    assert node.call("VolumeSyncStatus", volume_id=1).first.compact_revision == 1


def test_cleanup(node: Node) -> None:
    fill(node)
    assert node.call("VacuumVolumeCleanup", volume_id=1).code is Code.OK
    assert node.call("VacuumVolumeCompact", volume_id=1).code is Code.OK
    assert node.call("VacuumVolumeCleanup", volume_id=1).code is Code.OK
    assert not node.file("1.cpd").exists()
    assert plain(node.call("VacuumVolumeCommit", volume_id=1)) == unknown(
        "volume 1 compact swap aborted: missing .cpd/.cpx"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("VacuumVolumeCheck", "check compact"),
        ("VacuumVolumeCompact", "compact"),
        ("VacuumVolumeCommit", "commit compact"),
        ("VacuumVolumeCleanup", "cleaning up"),
    ],
)
def test_a_volume_that_is_not_here(node: Node, name: str, text: str) -> None:
    answer = node.call(name, volume_id=NOWHERE)
    assert plain(answer) == unknown(f"volume id {NOWHERE} is not found during {text}")


def test_a_server_that_stops_commits_nothing(node: Node) -> None:
    fill(node)
    node.call("VacuumVolumeCompact", volume_id=1)
    node.context.stopping.set()
    assert plain(node.call("VacuumVolumeCommit", volume_id=1)) == unknown(
        "volume id 1 skips compact because volume is stopping"
    )


def test_maintenance_mode_guards_all_but_the_check(node: Node) -> None:
    fill(node)
    node.call("SetState", state={"maintenance": True})
    assert node.call("VacuumVolumeCheck", volume_id=1).code is Code.OK
    for name in ("VacuumVolumeCompact", "VacuumVolumeCommit", "VacuumVolumeCleanup"):
        answer = node.call(name, volume_id=1)
        assert answer.code is grpc.StatusCode.UNKNOWN and "maintenance mode" in answer.details
