"""How a .dat is cut into shards, and where a stretch of it is to be found. Pure arithmetic; imports nothing.

Rows of large blocks come first, then rows of small ones; block i of a row belongs to shard i (contract
erasure-coding.md 4, 5). The number of data shards is always the volume's own (departure E4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LARGE_BLOCK: Final = 1 << 30
SMALL_BLOCK: Final = 1 << 20
MAX_SHARDS: Final = 32
DEFAULT_DATA, DEFAULT_PARITY = 10, 4


@dataclass(frozen=True, slots=True)
class Ratio:
    """Data and parity shards of a volume."""

    data: int = DEFAULT_DATA
    parity: int = DEFAULT_PARITY

    @property
    def total(self) -> int:
        return self.data + self.parity

    @property
    def is_valid(self) -> bool:
        return self.data > 0 and self.parity > 0 and self.total <= MAX_SHARDS


@dataclass(frozen=True, slots=True)
class Interval:
    """A stretch that lies within one block of one shard."""

    shard: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The cut of one volume. `large_rows` is fixed at encode time and must not be derived from anything smaller."""

    data: int
    large_rows: int
    large_block: int = LARGE_BLOCK
    small_block: int = SMALL_BLOCK

    def locate(self, offset: int, length: int) -> list[Interval]:
        """The intervals of a stretch of the .dat, in order."""
        found = []
        large_bytes = self.large_rows * self.large_block * self.data
        while length > 0:
            if offset < large_bytes:
                block, within, shard_base = self.large_block, offset, 0
            else:
                block, within, shard_base = self.small_block, offset - large_bytes, self.large_rows * self.large_block
            number, inner = divmod(within, block)
            take = min(length, block - inner)
            row, shard = divmod(number, self.data)
            found.append(Interval(shard, shard_base + row * block + inner, take))
            offset += take
            length -= take
        return found


def layout_of(ratio: Ratio, dat_bytes: int, shard_bytes: int) -> Layout:
    """The cut by the size of the .dat at encode time; by the length of a shard where that is not recorded.

    The latter is wrong for a .dat that was an exact number of large rows: nothing tells it from small rows then.
    """
    per_shard = dat_bytes // ratio.data if dat_bytes > 0 else max(0, shard_bytes - 1)
    return Layout(ratio.data, per_shard // LARGE_BLOCK)


def shard_bytes_of(dat_bytes: int, data: int) -> int:
    """Length of each shard of a .dat."""
    large, rest = divmod(dat_bytes, LARGE_BLOCK * data)
    return large * LARGE_BLOCK + -(-rest // (SMALL_BLOCK * data)) * SMALL_BLOCK
