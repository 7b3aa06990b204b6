"""Super blocks against the bytes of Go servers (contract storage.md 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage_util import GOLDEN

from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock
from pyvolume.types import ReplicaPlacement, Ttl


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v3-basic/data/1.dat", SuperBlock()),
        ("ttl/data/12.dat", SuperBlock(ttl=Ttl.parse("200y"))),
        ("replication-001/data/21.dat", SuperBlock(replica_placement=ReplicaPlacement.parse("001"))),
        ("replication-001/data/r_22.dat", SuperBlock(replica_placement=ReplicaPlacement.parse("110"))),
        ("vacuumed/data/31.dat", SuperBlock(compaction_revision=2)),
        ("v2-superblock/data/95.dat", SuperBlock(version=2)),
        ("own-v1/data/101.dat", SuperBlock(version=1)),
    ],
)
def test_golden_heads(name: str, expected: SuperBlock) -> None:
    path = GOLDEN / name
    with path.open("rb") as handle:
        block = SuperBlock.read(handle.fileno())
    assert block == expected
    assert block.to_bytes() == path.read_bytes()[:SUPER_BLOCK_SIZE]


def test_every_field_round_trips() -> None:
    block = SuperBlock(2, ReplicaPlacement.from_byte(201), Ttl(7, 5), 0xFFFE, 300)
    assert SuperBlock.parse(block.to_bytes()) == block
    assert block.to_bytes() == bytes.fromhex("02c90705fffe012c")


def test_where_the_first_record_is() -> None:
    assert SuperBlock(1, extra_size=16).block_bytes == 8
    assert SuperBlock(2, extra_size=16).block_bytes == 24
    assert SuperBlock(3).block_bytes == 8


def test_supported_versions() -> None:
    assert [SuperBlock(version).is_supported for version in (0, 1, 2, 3, 4)] == [False, True, True, True, False]


def test_short_file(tmp_path: Path) -> None:
    path = tmp_path / "3.dat"
    path.write_bytes(b"\x03\0\0")
    with path.open("rb") as handle, pytest.raises(ValueError):
        SuperBlock.read(handle.fileno())
