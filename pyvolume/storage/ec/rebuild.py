"""Making lost or damaged shards of those that are left (contract erasure-coding.md 10.7).

May import _native, the other modules of storage.ec, vif, files and the leaves; not store. Shards whose checksums are
known are verified before they are used. What is made goes to `<shard>.rebuilding`, is synced, verified, and gets its
name at the end: a failure or crash leaves the shards as they were. Upstream:
`weed/storage/erasure_coding/ec_encoder.go`.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
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
    """Which shards there are, which of them are damaged, and where what is made goes."""

    def __init__(self, base: str, ratio: Ratio, directories: list[str]) -> None:
        self.base = base
        self.ratio = ratio
        self.present: dict[int, str] = {}
        self.missing: dict[int, str] = {}
        self.bad: set[int] = set()
        name = os.path.basename(base)
        for shard in range(ratio.total):
            extension = f".ec{shard:02d}"
            places = [base + extension, *(f"{directory}/{name}{extension}" for directory in directories)]
            path = next((place for place in places if files.exists(place)), None)
            if path is None:
                self.missing[shard] = base + extension
            elif os.stat(path).st_size == 0:
                log.warning("shard %d of %s is empty at %s: it is made again", shard, base, path)
                self.missing[shard] = path
            else:
                self.present[shard] = path

    @property
    def usable(self) -> dict[int, str]:
        return {shard: path for shard, path in self.present.items() if shard not in self.bad}

    @property
    def targets(self) -> dict[int, str]:
        """What is to be made: missing ones, then damaged ones."""
        return self.missing | {shard: self.present[shard] for shard in sorted(self.bad)}

    def judge(self) -> None:
        """Raises StorageError if so many are damaged that the checksums are doubtful, or the rest is not enough."""
        present, bad, ratio = len(self.present), len(self.bad), self.ratio
        if bad > ratio.parity:
            raise StorageError(
                f"bitrot sidecar suspect for {self.base}: {bad}/{present} present shards mismatch "
                f"(> parity {ratio.parity}); refusing to rebuild (pass unsafeIgnoreSidecar to override)"
            )
        if bad and present - bad < ratio.data:
            raise StorageError(
                f"bitrot: only {present - bad} verified-good shards for {self.base}, need {ratio.data} data shards; "
                "sidecar may be stale (pass unsafeIgnoreSidecar to override)"
            )

    def require_enough(self) -> None:
        """Raises StorageError unless there are as many shards as a volume has of data."""
        have = len(self.usable)
        if have < self.ratio.data:
            raise StorageError(
                f"not enough shards to rebuild {self.base}: found {have} shards, need at least {self.ratio.data} "
                f"(data shards), missing shards: {_list(list(self.targets))}"
            )


class _BadShard(Exception):
    """A shard cannot be read."""

    def __init__(self, shard: int, cause: engine.NativeError) -> None:
        super().__init__(shard)
        self.shard = shard
        self.cause = cause


def rebuild(
    base: str, directories: list[str], *, unsafe: bool, go_on: GoOn, limit: stripes.Limit | None = None
) -> list[int]:
    """Makes what is missing or damaged; its ids, damaged ones last. directories: further places of shards.

    Shards are held against their checksums as they are read; if some fail, the work begins again without them. Raises
    StorageError with upstream's texts, what go_on raises; then nothing has changed.
    """
    found = vif.load(base + ".vif")
    if found.status in ("unparsable", "unreadable"):
        raise StorageError(f"RebuildEcFiles {base}: cannot load .vif: {found.error}")
    shards = _Shards(base, ratio_of(found.info), directories)
    sums = _sums_for(shards, directories, unsafe)
    made: dict[int, str] = {}
    try:
        while True:
            made = shards.targets if len(shards.usable) >= shards.ratio.data else {}
            if sums is None and not made:
                break
            failed = _attempt(shards, made, sums, go_on, limit)
            if not failed:
                break
            for shard in sorted(failed):
                log.warning("shard %d of %s is damaged: it is made again", shard, base)
            shards.bad |= failed
            shards.judge()
        shards.require_enough()
        if made:
            fault("ec.rebuild_rename")
        for path in made.values():
            os.rename(path + REBUILDING, path)
        for directory in dict.fromkeys(os.path.dirname(path) for path in made.values()):
            files.sync_dir(directory)
    except BaseException as exc:
        for path in shards.targets.values():
            with contextlib.suppress(OSError):
                files.remove_if_exists(path + REBUILDING)
        if isinstance(exc, OSError):
            raise StorageError(f"rebuildEcFiles: {from_os_error(exc, 'write', base)}") from exc
        raise
    return list(made)


def _sums_for(shards: _Shards, directories: list[str], unsafe: bool) -> sidecar.Sidecar | None:
    """The checksums, if there are any; shards of another length than they say are damaged. Raises StorageError."""
    base = shards.base
    name = os.path.basename(base)
    path = sidecar.find(base, *(f"{directory}/{name}" for directory in directories))
    state, sums, reason = sidecar.load(path, shards.ratio)
    if state == "invalid":
        log.warning("%s cannot be used: %s", path, reason)
        if not unsafe:
            raise StorageError(
                f"bitrot sidecar for {base} is malformed/unverifiable; refusing to rebuild "
                "(pass unsafeIgnoreSidecar to override)"
            )
    if sums is None or unsafe:
        return None
    for shard, shard_path in shards.present.items():
        entry = sums.of(shard)
        if entry is not None and os.stat(shard_path).st_size != entry.covered:
            log.warning("shard %d of %s is not %d bytes long: it is made again", shard, base, entry.covered)
            shards.bad.add(shard)
    shards.judge()
    return sums


def _attempt(
    shards: _Shards,
    targets: dict[int, str],
    sums: sidecar.Sidecar | None,
    go_on: GoOn,
    limit: stripes.Limit | None,
) -> set[int]:
    """Reads all usable shards, or without checksums those needed; makes the targets under working names, flushed.

    The shards that turned out to be damaged; what was made is then worth nothing.
    """
    ratio, usable = shards.ratio, shards.usable
    inputs = dict(list(usable.items())[: ratio.data] if sums is None else usable)
    working = {shard: path + REBUILDING for shard, path in targets.items()}
    with (
        stripes.opened(inputs, os.O_RDONLY) as sources,
        stripes.opened(working, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as outs,
    ):
        coded = dict(list(sources.items())[: ratio.data]) if targets else {}
        shard_bytes = _common_length(coded or sources)

        def step(start: int, end: int, crcs: list[int], memory: mmap.mmap) -> None:
            fault("ec.rebuild")
            try:
                if targets:
                    ec.rebuild(ratio.data, ratio.parity, coded, outs, start, end, crcs, memory)
            except engine.NativeError as exc:
                if exc.info.d in coded:
                    raise _BadShard(exc.info.d, exc) from exc
                raise
            for shard, file in sources.items():
                if shard not in coded:
                    try:
                        crcs[shard] = ec.checksum(file, start, end, crcs[shard], memory)
                    except engine.NativeError as exc:
                        raise _BadShard(shard, exc) from exc

        try:
            for fd, _ in outs.values():
                ec.reserve(fd, shard_bytes)
            blocks = stripes.run(
                shard_bytes,
                step,
                go_on,
                files=ratio.total,
                sums=ratio.total,
                limit=limit,
                weight=len(sources) + len(outs),
                stretch_bytes=sidecar.BLOCK_BYTES if sums is None else sums.block_bytes,
            )
        except _BadShard as exc:
            if sums is not None:
                return {exc.shard}
            code, info = exc.cause.code, exc.cause.info
            raise from_native(code, info, path=usable[exc.shard], operation="read") from exc
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=shards.base, operation="write") from exc
        if sums is None:
            stripes.sync(list(outs.values()), go_on)
            return set()
        failed = {shard for shard in sources if _differing(sums, shard, blocks)}
        if failed:
            return failed
        for shard in outs:
            if bad := _differing(sums, shard, blocks):
                raise StorageError(
                    f"bitrot: regenerated shard {shard} for {shards.base} does not match sidecar ({bad} blocks "
                    "differ); sidecar likely stale — aborting (pass unsafeIgnoreSidecar to override)"
                )
        stripes.sync(list(outs.values()), go_on)
        return set()


def _common_length(sources: dict[int, ec.File]) -> int:
    """Length of the shards that are coded from. Raises StorageError if they differ."""
    sizes = {shard: os.fstat(fd).st_size for shard, (fd, _) in sources.items()}
    first = next(iter(sizes.values()), 0)
    for shard, size in sizes.items():
        if size != first:
            raise StorageError(
                f"rebuildEcFiles: ec rebuild: input shard {shard} size {size} != {first} (truncated input?)"
            )
    return first


def _differing(sums: sidecar.Sidecar, shard: int, blocks: list[list[int]]) -> int:
    """How many blocks of a shard have another checksum than they should."""
    entry = sums.of(shard)
    if entry is None:
        return 0
    found = [block[shard] for block in blocks]
    return sum(a != b for a, b in zip(found, entry.crcs, strict=False)) + abs(len(found) - len(entry.crcs))


def backfill_sums(base: str, directories: list[str], go_on: GoOn) -> None:
    """Writes checksums of a volume that has none, if all its shards are here. What hinders it is logged."""
    if files.exists(base + sidecar.EXTENSION):
        return
    ratio = ratio_of(vif.load(base + ".vif").info)
    shards = _Shards(base, ratio, directories)
    if len(shards.present) < ratio.total:
        return
    try:
        with stripes.opened(shards.present, os.O_RDONLY) as opened:
            shard_bytes = _common_length(opened)

            def step(start: int, end: int, crcs: list[int], memory: mmap.mmap) -> None:
                for shard, file in opened.items():
                    crcs[shard] = sidecar.checksum(file, start, end, crcs[shard], memory)

            blocks = stripes.run(shard_bytes, step, go_on, files=1, sums=ratio.total)
        by_shard = [[block[shard] for block in blocks] for shard in range(ratio.total)]
        sidecar.save(base + sidecar.EXTENSION, sidecar.make(ratio, shard_bytes, by_shard))
    except (OSError, StorageError) as exc:
        log.warning("checksums of %s are not written: %s", base, exc)
