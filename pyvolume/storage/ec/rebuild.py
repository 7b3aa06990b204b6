"""Making lost or damaged shards of those that are left (contract erasure-coding.md 10.7).

May import _native, the other modules of storage.ec, vif, files and the leaves; not store. Shards whose checksums are
known are verified before they are used. What is made goes to `<shard>.rebuilding`, is synced, verified, and gets its
name at the end: a failure or crash leaves the shards as they were. Upstream:
`weed/storage/erasure_coding/ec_encoder.go`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Final

from pyvolume._native import ec, engine
from pyvolume.errors import StorageError, from_native, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files, vif
from pyvolume.storage.ec import sidecar, stripes
from pyvolume.storage.ec.encode import ratio_of
from pyvolume.storage.ec.layout import Ratio

log = logging.getLogger(__name__)

REBUILDING: Final = ".rebuilding"

GoOn = Callable[[], None]


def _list(numbers: list[int]) -> str:
    return "[" + " ".join(str(number) for number in numbers) + "]"


class _Shards:
    """Which shards there are, and where what is made goes."""

    def __init__(self, base: str, ratio: Ratio, directories: list[str]) -> None:
        self.base = base
        self.ratio = ratio
        self.good: dict[int, str] = {}
        self.targets: dict[int, str] = {}
        self.order: list[int] = []
        name = os.path.basename(base)
        for shard in range(ratio.total):
            extension = f".ec{shard:02d}"
            places = [base + extension, *(f"{directory}/{name}{extension}" for directory in directories)]
            path = next((place for place in places if files.exists(place)), None)
            if path is None:
                self._lost(shard, base + extension)
            elif os.stat(path).st_size == 0:
                log.warning("shard %d of %s is empty at %s: it is made again", shard, base, path)
                self._lost(shard, path)
            else:
                self.good[shard] = path

    def _lost(self, shard: int, path: str) -> None:
        self.targets[shard] = path
        self.order.append(shard)

    def condemn(self, shard: int) -> None:
        self._lost(shard, self.good.pop(shard))


def rebuild(base: str, directories: list[str], *, unsafe: bool, go_on: GoOn) -> list[int]:
    """Makes what is missing or damaged; its ids, damaged ones last. directories: further places of shards.

    Raises StorageError with upstream's texts, what go_on raises; then nothing has changed.
    """
    found = vif.load(base + ".vif")
    if found.status in ("unparsable", "unreadable"):
        raise StorageError(f"RebuildEcFiles {base}: cannot load .vif: {found.error}")
    shards = _Shards(base, ratio_of(found.info), directories)
    sums = _verified(shards, directories, unsafe, go_on)
    ratio = shards.ratio
    if len(shards.good) < ratio.data:
        raise StorageError(
            f"not enough shards to rebuild {base}: found {len(shards.good)} shards, need at least {ratio.data} "
            f"(data shards), missing shards: {_list(shards.order)}"
        )
    if not shards.targets:
        return []
    working = {shard: path + REBUILDING for shard, path in shards.targets.items()}
    try:
        _make(shards, working, None if unsafe else sums, go_on)
        fault("ec.rebuild_rename")
        for shard, path in working.items():
            os.rename(path, shards.targets[shard])
        for directory in dict.fromkeys(os.path.dirname(path) for path in shards.targets.values()):
            files.sync_dir(directory)
    except BaseException as exc:
        for path in working.values():
            with contextlib.suppress(OSError):
                files.remove_if_exists(path)
        if isinstance(exc, OSError):
            raise StorageError(f"rebuildEcFiles: {from_os_error(exc, 'write', base)}") from exc
        raise
    return shards.order


def _verified(shards: _Shards, directories: list[str], unsafe: bool, go_on: GoOn) -> sidecar.Sidecar | None:
    """Takes shards out that fail their checksums; the checksums, if there are any."""
    base, ratio = shards.base, shards.ratio
    name = os.path.basename(base)
    path = sidecar.find(base, *(f"{directory}/{name}" for directory in directories))
    state, sums, reason = sidecar.load(path, ratio)
    if state == "invalid":
        log.warning("%s cannot be used: %s", path, reason)
        if not unsafe:
            raise StorageError(
                f"bitrot sidecar for {base} is malformed/unverifiable; refusing to rebuild "
                "(pass unsafeIgnoreSidecar to override)"
            )
    if sums is None or unsafe:
        return sums
    bad = []
    for shard, shard_path in shards.good.items():
        entry = sums.of(shard)
        if entry is None:
            continue
        try:
            with files.opened(shard_path) as fd:
                if sidecar.bad_blocks(fd, entry, sums.block_bytes, go_on):
                    bad.append(shard)
        except OSError as exc:
            log.warning("shard %d of %s cannot be read, it is made again: %s", shard, base, exc)
            bad.append(shard)
    present = len(shards.good)
    if len(bad) > ratio.parity:
        raise StorageError(
            f"bitrot sidecar suspect for {base}: {len(bad)}/{present} present shards mismatch "
            f"(> parity {ratio.parity}); refusing to rebuild (pass unsafeIgnoreSidecar to override)"
        )
    if bad and present - len(bad) < ratio.data:
        raise StorageError(
            f"bitrot: only {present - len(bad)} verified-good shards for {base}, need {ratio.data} data shards; "
            "sidecar may be stale (pass unsafeIgnoreSidecar to override)"
        )
    for shard in bad:
        log.warning("shard %d of %s fails its checksums: it is made again", shard, base)
        shards.condemn(shard)
    return sums


def _make(shards: _Shards, working: dict[int, str], sums: sidecar.Sidecar | None, go_on: GoOn) -> None:
    ratio = shards.ratio
    inputs = dict(list(shards.good.items())[: ratio.data])
    with contextlib.ExitStack() as stack:
        in_fds = {shard: stack.enter_context(files.opened(path)) for shard, path in inputs.items()}
        sizes = {shard: os.fstat(fd).st_size for shard, fd in in_fds.items()}
        first = next(iter(sizes.values()))
        for shard, size in sizes.items():
            if size != first:
                raise StorageError(
                    f"rebuildEcFiles: ec rebuild: input shard {shard} size {size} != {first} (truncated input?)"
                )
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        out_fds = {shard: stack.enter_context(files.opened(path, flags)) for shard, path in working.items()}

        def work(start: int, end: int) -> dict[int, int]:
            fault("ec.rebuild")
            return ec.rebuild(ratio.data, ratio.parity, in_fds, out_fds, start, end)

        try:
            stripes.run(first, work, go_on)
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=shards.base, operation="write") from exc
        stripes.sync(list(out_fds.values()), go_on)
        for shard, fd in out_fds.items():
            entry = sums.of(shard) if sums is not None else None
            if sums is None or entry is None:
                continue
            bad = sidecar.bad_blocks(fd, entry, sums.block_bytes, go_on)
            if bad:
                raise StorageError(
                    f"bitrot: regenerated shard {shard} for {shards.base} does not match sidecar ({len(bad)} blocks "
                    "differ); sidecar likely stale — aborting (pass unsafeIgnoreSidecar to override)"
                )


def backfill_sums(base: str, directories: list[str], go_on: GoOn) -> None:
    """Writes checksums of a volume that has none, if all its shards are here. What hinders it is logged."""
    if files.exists(base + sidecar.EXTENSION):
        return
    ratio = ratio_of(vif.load(base + ".vif").info)
    shards = _Shards(base, ratio, directories)
    if len(shards.good) < ratio.total:
        return
    entries = []
    try:
        for shard, path in shards.good.items():
            with files.opened(path) as fd:
                entries.append(sidecar.ShardSums(shard, os.fstat(fd).st_size, _sums_of(fd, go_on)))
        made = sidecar.make(ratio, 1, [[] for _ in range(ratio.total)])
        made.shards = entries
        sidecar.save(base + sidecar.EXTENSION, made)
    except OSError as exc:
        log.warning("checksums of %s are not written: %s", base, exc)


def _sums_of(fd: int, go_on: GoOn) -> list[int]:
    sums: list[int] = []
    at, end = 0, os.fstat(fd).st_size
    while at < end:
        go_on()
        crc, stop = 0, min(at + sidecar.BLOCK_BYTES, end)
        while at < stop and (piece := os.pread(fd, min(1 << 20, stop - at), at)):
            crc = engine.crc32c(piece, crc)
            at += len(piece)
        if at < stop:
            break
        sums.append(crc)
    return sums
