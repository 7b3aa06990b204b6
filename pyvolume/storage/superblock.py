"""The super block at the head of a `.dat`: record version, placement, ttl, compaction revision.

May import _native and the leaves only; the byte layout is the engine's. Upstream: `weed/storage/super_block`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

from pyvolume._native import engine
from pyvolume.types import ReplicaPlacement, Ttl

SUPER_BLOCK_SIZE: Final = engine.SUPER_BLOCK_BYTES
SUPPORTED_VERSIONS: Final = (1, 2, 3)
CURRENT_VERSION: Final = 3


@dataclass(frozen=True, slots=True)
class SuperBlock:
    """The values of a super block. `extra_size` bytes of a content we do not read follow it in versions 2 and 3."""

    version: int = CURRENT_VERSION
    replica_placement: ReplicaPlacement = field(default_factory=ReplicaPlacement)
    ttl: Ttl = Ttl.NONE
    compaction_revision: int = 0
    extra_size: int = 0

    @classmethod
    def from_fields(cls, fields: engine.SuperBlockFields) -> SuperBlock:
        return cls(
            fields.version,
            ReplicaPlacement.from_byte(fields.replica_placement),
            Ttl(fields.ttl_count, fields.ttl_unit),
            fields.compaction_revision,
            fields.extra_size,
        )

    @classmethod
    def parse(cls, data: bytes) -> SuperBlock:
        """Takes the first eight bytes apart; any values pass. Raises ValueError if there are fewer."""
        return cls.from_fields(engine.superblock_parse(data))

    @classmethod
    def read(cls, fd: int) -> SuperBlock:
        """Reads it from an open .dat. Raises OSError, ValueError (shorter than a super block). Blocks on disk."""
        return cls.parse(os.pread(fd, SUPER_BLOCK_SIZE, 0))

    @property
    def fields(self) -> engine.SuperBlockFields:
        """For engine.Volume.open."""
        return engine.SuperBlockFields(
            self.version,
            self.replica_placement.byte,
            self.ttl.count,
            self.ttl.unit,
            self.compaction_revision,
            self.extra_size,
        )

    def to_bytes(self) -> bytes:
        """The eight bytes."""
        return engine.superblock_put(*self.fields)

    @property
    def is_supported(self) -> bool:
        return self.version in SUPPORTED_VERSIONS

    @property
    def block_bytes(self) -> int:
        """Where the first record is."""
        return SUPER_BLOCK_SIZE + (self.extra_size if self.version in (2, 3) else 0)
