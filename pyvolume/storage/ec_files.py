"""What the files of an erasure coded volume mean for the plain volume of the same id beside them.

May import vif, files and the leaves only. Looks at names and sizes; nothing is decoded here. Facts: contract
erasure-coding.md 12, departure E5. Upstream: `weed/storage/disk_location_ec.go`. All functions block on disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final, Literal

from pyvolume.storage import files, vif
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE

log = logging.getLogger(__name__)

MAX_SHARDS: Final = 32
DEFAULT_DATA_SHARDS: Final = 10
LARGE_BLOCK: Final = 1 << 30
SMALL_BLOCK: Final = 1 << 20

Claim = Literal["none", "shards", "volume", "volume-keep"]
"""Who serves an id: no EC files; the shards; the .dat (the encode was interrupted); the .dat, but all files stay."""


def ecx_path(directory: str, idx_directory: str, name: str) -> str | None:
    """The .ecx of a volume, in the data directory or else the idx directory."""
    for place in dict.fromkeys((directory, idx_directory)):
        path = f"{place}/{name}.ecx"
        if files.exists(path):
            return path
    return None


def has_nonempty_ecx(directory: str, idx_directory: str, name: str) -> bool:
    """Whether an EC volume with an index of its own shares this disk (and so the .vif) with the plain volume."""
    for place in dict.fromkeys((directory, idx_directory)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.stat(f"{place}/{name}.ecx").st_size > 0:
                return True
    return False


def expected_shard_bytes(dat_bytes: int, data_shards: int) -> int:
    """Length of each shard of a full encode of dat_bytes."""
    large, rest = divmod(dat_bytes, LARGE_BLOCK * data_shards)
    return large * LARGE_BLOCK + -(-rest // (SMALL_BLOCK * data_shards)) * SMALL_BLOCK


def _shard_config(directory: str, idx_directory: str, name: str) -> vif.VolumeInfo:
    for place in dict.fromkeys((directory, idx_directory)):
        result = vif.load(f"{place}/{name}.vif")
        if result.status in ("ok", "old") and result.info.ec_shard_config is not None:
            return result.info
    return vif.VolumeInfo()


def is_empty_stub(directory: str, idx_directory: str, name: str) -> bool:
    """Whether <name>.dat is what old releases left behind of an EC volume: no needle, and an EC ratio in the .vif."""
    try:
        size = os.stat(f"{directory}/{name}.dat").st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    if size > SUPER_BLOCK_SIZE:
        return False
    return _shard_config(directory, idx_directory, name).ec_shard_config is not None


def claim(directory: str, idx_directory: str, name: str) -> Claim:
    """Decides between shards and .dat of one id. Any doubt, an I/O error included, keeps every file.

    `volume` means that the shards are shorter than a full encode of this .dat: it is complete, they are not.
    """
    if ecx_path(directory, idx_directory, name) is None:
        return "none"
    try:
        dat_bytes = os.stat(f"{directory}/{name}.dat").st_size
    except OSError:
        return "shards"
    if dat_bytes <= SUPER_BLOCK_SIZE:
        return "shards"
    if any(vif.load(f"{place}/{name}.vif").disk_failed for place in (directory, idx_directory)):
        return "shards"
    info = _shard_config(directory, idx_directory, name)
    if 0 < info.dat_file_size < dat_bytes:
        return "volume-keep"
    sizes = set()
    for shard in range(MAX_SHARDS):
        try:
            size = os.stat(f"{directory}/{name}.ec{shard:02d}").st_size
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return "shards"
        if size > 0:
            sizes.add(size)
    if not sizes:
        return "volume"
    ratio = info.ec_shard_config.data_shards if info.ec_shard_config is not None else 0
    expected = expected_shard_bytes(dat_bytes, ratio or DEFAULT_DATA_SHARDS)
    return "volume" if len(sizes) == 1 and sizes.pop() < expected else "shards"


def remove_interrupted_encode(directory: str, idx_directory: str, name: str) -> None:
    """Removes index, journal and shards of an encode that did not finish; the .vif stays. Logs what fails."""
    names = [f"{place}/{name}{ext}" for ext in (".ecx", ".ecj") for place in (directory, idx_directory)]
    names += [f"{directory}/{name}.ec{shard:02d}" for shard in range(MAX_SHARDS)]
    for path in dict.fromkeys(names):
        try:
            if files.remove_if_exists(path) >= 0:
                log.info("removed %s of an interrupted erasure coding", path)
        except OSError as exc:
            log.warning("cannot remove %s: %s", path, exc)
