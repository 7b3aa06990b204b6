"""What becomes, at load, of the files a vacuum left behind: `.cpd`, `.cpx` (new data, index), `.cpc` (commit marker).

May import superblock, files, index_files, _native and the leaves. Runs before a volume is loaded, never on one that is.

| found | done |
|---|---|
| `.cpc` | the swap was decided: the renames that are missing are made, then the marker goes |
| no `.cpc`; `.cpd`, `.cpx` whole, newer than the volume, same live needles | committed: an offline compact (P3) |
| no `.cpc`; whole and newer, but other needles than the volume | kept aside as `.cpd.kept`, `.cpx.kept` (P3) |
| no `.cpc`; anything else | an interrupted vacuum: removed |

`.ldb` and `.rdb` mirror an index that is no longer there and go with a swap or removal; a left-over `.cpldb` always
goes (L6, so not with repair off). Upstream: reconcileCompactState of `weed/storage/volume_vacuum.go`, which looks for
`.cpx` in the idx directory only and deletes the result of an offline compact.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from pyvolume._native import engine
from pyvolume.errors import StorageError
from pyvolume.faults import fault
from pyvolume.storage import files, index_files
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE, SuperBlock

log = logging.getLogger(__name__)

EXTENSIONS: Final = (".cpc", ".cpd", ".cpx")
"""Names that make a volume's base name worth a look."""


def recover(directory: str, idx_directory: str, name: str, *, repair: bool = True, default_width: int = 4) -> None:
    """Brings the files of one volume back to one state. Raises OSError, NativeError if the disk
    fails: then nothing was removed. Blocks on disk. One log line per decision.

    Failpoints: recover.rename_dat, recover.rename_idx, recover.remove_marker.
    """
    base = f"{directory}/{name}"
    cpx = _existing(idx_directory, directory, f"{name}.cpx")
    if files.exists(base + ".cpc"):
        log.info("volume %s: rolling forward interrupted compaction commit", base)
        _swap(directory, idx_directory, name, cpx)
    elif cpx is None and not files.exists(base + ".cpd"):
        return
    else:
        _without_marker(directory, idx_directory, name, cpx, default_width)
    if repair:
        files.remove_if_exists(f"{idx_directory}/{name}.cpldb")


def _existing(first: str, second: str, entry: str) -> str | None:
    """Directory of the two that holds the entry."""
    for place in dict.fromkeys((first, second)):
        if files.exists(f"{place}/{entry}"):
            return place
    return None


def _swap(directory: str, idx_directory: str, name: str, cpx: str | None) -> None:
    """Makes the renames that are still missing and clears the marker; may be repeated after a crash at any point."""
    base = f"{directory}/{name}"
    moved = False
    if files.exists(base + ".cpd"):
        fault("recover.rename_dat")
        os.rename(base + ".cpd", base + ".dat")
        moved = True
    if cpx is not None:
        fault("recover.rename_idx")
        os.rename(f"{cpx}/{name}.cpx", f"{cpx}/{name}.idx")
        moved = True
    if moved:
        for place in dict.fromkeys((directory, cpx or directory)):
            files.sync_dir(place)
        _drop_stale_maps(directory, idx_directory, name)
    fault("recover.remove_marker")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(base + ".cpc")
    files.sync_dir(directory)


def _drop_stale_maps(directory: str, idx_directory: str, name: str) -> None:
    for place in dict.fromkeys((directory, idx_directory)):
        for extension in (".ldb", ".rdb"):
            files.remove_if_exists(f"{place}/{name}{extension}")


def _without_marker(directory: str, idx_directory: str, name: str, cpx: str | None, default_width: int) -> None:
    base = f"{directory}/{name}"
    reason = "no new index beside it"
    if cpx is not None and files.exists(base + ".cpd"):
        reason, whole = _judge(directory, idx_directory, name, cpx, default_width)
        if not reason:
            log.info("volume %s: committing the finished compaction found in .cpd and .cpx", base)
            fd = os.open(base + ".cpc", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            files.sync_dir(directory)
            _swap(directory, idx_directory, name, cpx)
            return
        if whole:
            log.warning(
                "volume %s: a finished compaction does not fit the volume (%s): kept as .cpd.kept and .cpx.kept, "
                "delete them once you do not need them",
                base,
                reason,
            )
            os.replace(base + ".cpd", base + ".cpd.kept")
            os.replace(f"{cpx}/{name}.cpx", f"{cpx}/{name}.cpx.kept")
            for place in dict.fromkeys((directory, cpx)):
                files.sync_dir(place)
            return
    for path in (base + ".cpd", *(f"{place}/{name}.cpx" for place in dict.fromkeys((idx_directory, directory)))):
        size = files.remove_if_exists(path)
        if size >= 0:
            log.info("volume %s: rolling back orphan compaction file %s (size=%d): %s", base, path, size, reason)
    _drop_stale_maps(directory, idx_directory, name)


def _judge(directory: str, idx_directory: str, name: str, cpx: str, default_width: int) -> tuple[str, bool]:
    """(why the compaction cannot be committed, whether it is whole and newer than the volume); ("", True) to commit."""
    base = f"{directory}/{name}"
    idx_path = f"{_existing(directory, idx_directory, f'{name}.idx') or idx_directory}/{name}.idx"
    new_idx_path = f"{cpx}/{name}.cpx"
    old, new, old_idx, new_idx = (os.stat(p) for p in (base + ".dat", base + ".cpd", idx_path, new_idx_path))
    # clocks of file systems are coarse, so the same time is no proof
    if new_idx.st_mtime_ns <= max(old.st_mtime_ns, old_idx.st_mtime_ns):
        return "the volume was written to after it", False
    with contextlib.ExitStack() as stack:
        old_dat_fd, new_dat_fd, old_idx_fd, new_idx_fd = (
            stack.enter_context(files.opened(p)) for p in (base + ".dat", base + ".cpd", idx_path, new_idx_path)
        )
        if old.st_size < SUPER_BLOCK_SIZE or new.st_size < SUPER_BLOCK_SIZE:
            return "there is no whole super block", False
        old_block, new_block = SuperBlock.read(old_dat_fd), SuperBlock.read(new_dat_fd)
        if new_block.version != old_block.version or not new_block.is_supported:
            return f"version {new_block.version} instead of {old_block.version}", False
        try:
            width = index_files.width_of(f"{base}.vif", old_dat_fd, old_idx_fd, old_block, default_width)
        except StorageError as exc:
            return str(exc), True
        summary = engine.idx_summarize(new_idx_fd, width, new_block.version, new.st_size)
        end = summary.max_end if summary.rows else new_block.block_bytes
        if summary.ragged_bytes or summary.past_end or end != new.st_size:
            return "it is not whole", False
        if new_block.compaction_revision != (old_block.compaction_revision + 1) & 0xFFFF:
            return f"revision {new_block.compaction_revision} after {old_block.compaction_revision}", True
        if old_idx.st_size % (12 + width):
            return "the volume's index is ragged", True
        known = engine.idx_summarize(old_idx_fd, width, old_block.version, old.st_size)
        if known.blank_rows or (known.max_end or old_block.block_bytes) < old.st_size:
            return "the volume has records without rows in its index", False
        if not index_files.chain_reaches(new_dat_fd, new_block, new.st_size, check_body=True):
            return "it has damaged records", False
        if not index_files.same_live_needles(old_idx_fd, new_idx_fd, width):
            return "it has other live needles", True
    return "", True
