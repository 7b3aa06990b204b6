"""Making the shards of a plain volume, and a plain volume of its shards (contract erasure-coding.md 10.1, 10.8).

May import _native, the other modules of storage.ec, volume, compact, vif, files and the leaves; not store. All files
are made under working names; the index gets its name last, so that a crash before leaves a volume without shards
(the loader sweeps working names and shards without an index). Departures E1, E2, E4. Upstream:
`weed/storage/erasure_coding/ec_encoder.go`, `ec_decoder.go`.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyvolume._native import ec, engine
from pyvolume.errors import NativeCode, StorageError, from_native, from_os_error
from pyvolume.faults import fault
from pyvolume.storage import files, vif
from pyvolume.storage.ec import index, sidecar, stripes
from pyvolume.storage.ec.layout import LARGE_BLOCK, MAX_SHARDS, SMALL_BLOCK, Ratio, layout_of, shard_bytes_of
from pyvolume.storage.superblock import SUPER_BLOCK_SIZE

if TYPE_CHECKING:
    from pyvolume.storage.ec.volume import EcVolume
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

WORKING: Final = ".tmp"
"""Suffix of a file that is being made; leftovers are removed at load."""
NO_LIVE_TEXT: Final = "has no live entries"

GoOn = Callable[[], None]


class NoLiveEntries(StorageError):
    """All needles of the shards are deleted: there is nothing to make a volume of."""


def ratio_of(info: vif.VolumeInfo, default: Ratio | None = None) -> Ratio:
    """The ratio of a .vif, if it has a valid one."""
    config = info.ec_shard_config
    if config is not None:
        ratio = Ratio(config.data_shards, config.parity_shards)
        if ratio.is_valid:
            return ratio
        log.warning("no valid ratio in a .vif (%d+%d), using the default", ratio.data, ratio.parity)
    return default if default is not None else Ratio()


def remove_artifacts(base: str, idx_base: str) -> None:
    """Removes shards, index, journal, checksums, and the .vif where no .idx is. Raises OSError after trying all."""
    failure: OSError | None = None
    bases = list(dict.fromkeys((idx_base, base)))
    names = [f"{base}.ec{shard:02d}" for shard in range(MAX_SHARDS)]
    names += [f"{place}{extension}" for place in bases for extension in (".ecx", ".ecj")]
    for place in bases:
        if not files.exists(f"{idx_base}.idx") and not files.exists(f"{place}.idx"):
            names.append(f"{place}.vif")
    for name in names:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        except OSError as exc:
            failure = failure or exc
    for place in bases:
        try:
            sidecar.remove_all(place)
        except OSError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure


def generate(volume: Volume, ratio: Ratio, go_on: GoOn, limit: stripes.Limit | None = None) -> None:
    """Makes all EC files of a mounted volume beside it; what was there of an earlier encode must be gone.

    The volume stays as it is and may take writes, which are not among the shards. A failure leaves nothing. Raises
    StorageError with upstream's texts, and what go_on raises.
    """
    base, idx_base = volume.base_path, volume.idx_base_path
    shard_paths = {shard: f"{base}.ec{shard:02d}" for shard in range(ratio.total)}
    working = {shard: path + WORKING for shard, path in shard_paths.items()}
    ecx_path = idx_base + ".ecx"
    made = [*working.values(), *shard_paths.values(), ecx_path + WORKING, ecx_path, base + sidecar.EXTENSION]
    volume.claim("erasure coding")  # a vacuum would exchange the files under way
    try:
        volume.sync()
        try:
            _write_index(volume, ecx_path + WORKING)
        except StorageError as exc:
            raise type(exc)(f"WriteSortedFileFromIdx {idx_base}: {exc}") from exc
        try:
            dat_bytes = _write_shards(volume, ratio, working, go_on, limit)
        except StorageError as exc:
            raise type(exc)(f"WriteEcFiles {base}: {exc}") from exc
        _publish(volume, ratio, working, shard_paths, dat_bytes)
        fault("ec.publish_index")
        os.rename(ecx_path + WORKING, ecx_path)
        files.sync_dir(os.path.dirname(ecx_path))
    except BaseException as exc:
        for path in made:
            with contextlib.suppress(OSError):
                files.remove_if_exists(path)
        if isinstance(exc, OSError):
            raise from_os_error(exc, "write", base) from exc
        raise
    finally:
        volume.release()


def _write_index(volume: Volume, path: str) -> None:
    try:
        with (
            files.opened(volume.idx_path) as idx_fd,
            files.opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as out,
        ):
            rows = os.fstat(idx_fd).st_size // index.row_bytes(volume.offset_width)
            ec.ecx_from_idx(idx_fd, volume.offset_width, rows, out)
            fault("ec.write_index")
            os.fsync(out)
    except OSError as exc:
        raise from_os_error(exc, "open", exc.filename or path) from exc
    except engine.NativeError as exc:
        raise from_native(exc.code, exc.info, path=path, operation="write") from exc


def _write_shards(volume: Volume, ratio: Ratio, paths: dict[int, str], go_on: GoOn, limit: stripes.Limit | None) -> int:
    """Codes the .dat as it is now; its size. The checksums go to `<base>.ecsum`, whose failure is only logged."""
    with contextlib.ExitStack() as stack:
        try:
            dat = stack.enter_context(stripes.opened({0: volume.dat_path}, os.O_RDONLY))[0]
        except OSError as exc:
            raise StorageError(f"failed to open dat file: {from_os_error(exc, 'open', volume.dat_path)}") from exc
        try:
            dat_bytes = os.fstat(dat[0]).st_size
            shard_bytes = shard_bytes_of(dat_bytes, ratio.data)
            large_rows = layout_of(ratio, dat_bytes, 0).large_rows if dat_bytes else 0
            cut = (ratio.data, ratio.parity, LARGE_BLOCK, SMALL_BLOCK, large_rows)
            opened = stack.enter_context(stripes.opened(paths, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            out = [opened[shard] for shard in range(ratio.total)]
            for fd, _ in out:
                ec.reserve(fd, shard_bytes)

            def step(start: int, end: int, sums: list[int], memory: mmap.mmap) -> None:
                fault("ec.encode")
                ec.encode(dat, dat_bytes, cut, start, end, out, sums, memory)

            blocks = stripes.run(
                shard_bytes, step, go_on, files=ratio.total, sums=ratio.total, limit=limit, weight=ratio.total
            )
            stripes.sync(out, go_on)
        except engine.NativeError as exc:
            raise from_native(exc.code, exc.info, path=volume.dat_path, operation="write") from exc
        except OSError as exc:
            raise from_os_error(exc, "write", volume.base_path) from exc
    try:
        by_shard = [[block[shard] for block in blocks] for shard in range(ratio.total)]
        sidecar.save(volume.base_path + sidecar.EXTENSION, sidecar.make(ratio, shard_bytes, by_shard))
    except OSError as exc:
        log.warning("ec volume %d: its checksums are not written: %s", volume.vid, exc)
    return dat_bytes


def _publish(volume: Volume, ratio: Ratio, working: dict[int, str], final: dict[int, str], dat_bytes: int) -> None:
    """Gives the shards their names and writes the .vif, which keeps what it said of the volume (departure E2)."""
    fault("ec.publish")
    for shard, path in final.items():
        os.rename(working[shard], path)
    files.sync_dir(volume.directory)
    now_ns = time.time_ns()
    minutes = volume.ttl.minutes

    def change(info: vif.VolumeInfo) -> None:
        info.version = volume.version
        info.dat_file_size = dat_bytes
        info.expire_at_sec = now_ns // 1_000_000_000 + minutes * 60 if minutes else 0
        info.ec_shard_config = vif.EcShardConfig(ratio.data, ratio.parity, now_ns)

    try:
        volume.save_info(change)
    except StorageError as exc:
        raise type(exc)(f"SaveVolumeInfo {volume.base_path}: {exc}") from exc


# --------------------------------------------------------------------------------------------------------- and back


def decode(
    volume: EcVolume,
    shard_paths: list[str],
    deletes: Callable[[], set[int]],
    go_on: GoOn,
    limit: stripes.Limit | None = None,
) -> bool:
    """Makes `.dat` and `.idx` beside the shards. `deletes`: what any disk of this server knows to be deleted by now;
    it is asked again before the index is written.

    True if the result is what a vacuum would make of it: all records live, in the order of their keys, without gaps
    and without a ttl. The super block then counts that vacuum. Raises NoLiveEntries, StorageError with upstream's
    texts.
    """
    base = volume.base_path
    _fold(volume, deletes)
    block = _superblock_of(shard_paths[0])
    version = block[0]
    extent, is_live = SUPER_BLOCK_SIZE, False
    is_packed = block[2:4] == b"\0\0" and block[6:] == b"\0\0"  # no ttl, no extra bytes
    for _, offset, size in volume.walk():
        is_packed = is_packed and size > 0 and offset == extent
        if size >= 0:
            is_live = True
            extent = max(extent, offset + engine.needle_record_len(size, version))
    if not is_live:
        raise NoLiveEntries(f"ec volume {volume.vid} {NO_LIVE_TEXT}")
    if is_packed:
        revision = (int.from_bytes(block[4:6], "big") + 1) & 0xFFFF
        block = block[:4] + revision.to_bytes(2, "big") + block[6:]
    try:
        _write_dat(volume, shard_paths, extent, block if is_packed else b"", go_on, limit)
    except StorageError as exc:
        raise type(exc)(f"WriteDatFile {base}: {exc}") from exc
    _fold(volume, deletes)
    idx_base = volume.ecx_path.removesuffix(".ecx")
    try:
        with files.opened(volume.ecx_path) as fd:
            data = os.pread(fd, os.fstat(fd).st_size, 0)
        files.replace_file(idx_base + ".idx", data, point="ec.idx")
    except OSError as exc:
        raise StorageError(f"WriteIdxFileFromEcIndex {idx_base}: {from_os_error(exc, 'write')}") from exc
    for place in dict.fromkeys((base, idx_base)):
        with contextlib.suppress(OSError):
            sidecar.remove_all(place)
    return is_packed


def _fold(volume: EcVolume, deletes: Callable[[], set[int]]) -> None:
    try:
        volume.fold(deletes().difference(volume.deleted))
    except StorageError as exc:
        raise type(exc)(f"RebuildEcxFile {volume.ecx_path.removesuffix('.ecx')}: {exc}") from exc


def _superblock_of(path: str) -> bytes:
    try:
        with files.opened(path) as fd:
            block = os.pread(fd, SUPER_BLOCK_SIZE, 0)
    except OSError as exc:
        raise StorageError(f"FindDatFileSize {path}: {from_os_error(exc, 'open', path)}") from exc
    if len(block) < SUPER_BLOCK_SIZE or block[0] not in (1, 2, 3):
        raise StorageError(f"FindDatFileSize {path}: read ec volume {path} superblock: unsupported version")
    return block


def _write_dat(
    volume: EcVolume, shard_paths: list[str], extent: int, block: bytes, go_on: GoOn, limit: stripes.Limit | None
) -> None:
    data = volume.ratio.data
    shard_bytes = os.stat(shard_paths[0]).st_size
    encoded = volume.dat_file_size
    if encoded <= 0:
        rows = shard_bytes // LARGE_BLOCK
        if shard_bytes % LARGE_BLOCK == 0 and extent > (rows - 1) * LARGE_BLOCK * data:
            raise StorageError(
                f"shard size {shard_bytes} of {volume.base_path} does not identify the block layout; "
                "re-encode to record the dat size in .vif"
            )
        encoded = data * shard_bytes
    if extent > encoded:
        raise StorageError(f"dat file size {extent} exceeds encoded dat file size {encoded}")
    cut = (data, volume.ratio.parity, LARGE_BLOCK, SMALL_BLOCK, encoded // (LARGE_BLOCK * data))
    path = volume.base_path + ".dat"
    try:
        with (
            stripes.opened(dict(enumerate(shard_paths)), os.O_RDONLY) as shards,
            stripes.opened({0: path + WORKING}, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as target,
        ):
            sources, out = [shards[shard] for shard in range(data)], target[0]
            ec.reserve(out[0], extent)

            def step(start: int, end: int, _sums: list[int], memory: mmap.mmap) -> None:
                fault("ec.decode")
                ec.decode(sources, cut, out, start, end, memory)

            stripes.run(extent, step, go_on, files=1, sums=0, limit=limit)
            if block:
                os.pwrite(out[0], block, 0)
            fault("ec.write_dat")
            stripes.sync([out], go_on)
            if os.fstat(out[0]).st_size < extent:
                raise StorageError(f"decoded {path} is short of the {extent} its ec index references")
        fault("ec.publish_dat")
        os.rename(path + WORKING, path)
        files.sync_dir(volume.directory)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            files.remove_if_exists(path + WORKING)
        if isinstance(exc, engine.NativeError):
            if exc.code == NativeCode.EEOF:
                raise StorageError(f"copy {shard_paths[exc.info.d]} at {exc.info.a}: EOF") from exc
            raise from_native(exc.code, exc.info, path=path, operation="write") from exc
        if isinstance(exc, OSError):
            raise from_os_error(exc, "write", path) from exc
        raise
