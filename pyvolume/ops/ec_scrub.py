"""Looking for damage in erasure coded volumes (contract erasure-coding.md 15). Changes nothing. Must not import server.

Findings are texts in upstream's words. Upstream: `weed/storage/erasure_coding/ec_volume_scrub.go`,
`weed/storage/store_ec_scrub.go`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pyvolume._native import ec, engine
from pyvolume.errors import NativeCode, NeedleDeleted, StorageError, from_native
from pyvolume.ops.ec import EcReader
from pyvolume.storage.ec import index
from pyvolume.storage.ec.sidecar import Sidecar
from pyvolume.storage.ec.volume import EcShard, EcVolume

_COMPARE_BYTES = 1 << 20

GoOn = Callable[[], None]


@dataclass(slots=True)
class Findings:
    """Of one volume: files looked at, broken shards with the size that is reported, texts."""

    files: int = 0
    broken: dict[int, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


def scrub_index(volume: EcVolume, found: Findings) -> None:
    """Records must not overlap, and the file must be whole rows."""
    if volume.ecx_bytes == 0:
        found.texts.append(f"zero-size ECX file for EC volume {volume.vid}")
        return
    rows = list(volume.walk())
    found.files = len(rows)
    places = sorted((offset, size, number, key) for number, (key, offset, size) in enumerate(rows, 1))
    last: tuple[int, int, int] | None = None
    for offset, size, number, key in places:
        if offset == 0 and size < 0:
            continue
        end = offset + max(0, volume.record_bytes(size) - 1)
        if last is not None and offset <= last[2]:
            found.texts.append(
                f"needle {key} (#{number}) at [{offset}-{end}] overlaps needle {last[0]} at [{last[1]}-{last[2]}]"
            )
        last = (key, offset, end)
    expected = len(rows) * index.row_bytes(volume.width)
    if expected != volume.ecx_bytes:
        found.texts.append(f"expected an index file of size {expected}, got {volume.ecx_bytes}")


def _list(numbers: list[int]) -> str:
    return "[" + " ".join(str(number) for number in sorted(numbers)) + "]"


def _parse(volume: EcVolume, data: bytes, size: int, *, forced: bool) -> str:
    """What is wrong with a record; "" for nothing. A record that only disagrees about being deleted is not."""
    try:
        engine.parse_needle(data, volume.version, size)
    except engine.NativeError as exc:
        found_size = exc.info.c & 0xFFFFFFFF
        if exc.code == NativeCode.ESIZE and not forced and (size < 0) != (found_size == 0):
            return ""
        return str(from_native(exc.code, exc.info, path=volume.base_path))
    return ""


def scrub_local(volume: EcVolume, go_on: GoOn) -> Findings:
    """Reads what lies on this disk; a record that is whole here is checked."""
    found = Findings()
    scrub_index(volume, found)
    found.files = 0
    shards, layout = volume.shards, volume.layout
    for key, offset, size in volume.walk():
        go_on()
        found.files += 1
        if size < 0:
            continue
        intervals = layout.locate(offset, volume.record_bytes(size))
        pieces: list[bytes] = []
        got, whole, local = 0, True, []
        for number, interval in enumerate(intervals, 1):
            shard = shards.get(interval.shard)
            if shard is None:
                whole = False
                got += interval.length
                continue
            local.append(interval.shard)
            problem, data = _read(shard, interval.offset, interval.length, key, number, len(intervals))
            if problem:
                found.broken[shard.number] = shard.size
                found.texts.append(problem)
                continue
            if whole:
                pieces.append(data)
            got += len(data)
        wanted = volume.record_bytes(size)
        if got != wanted:
            found.texts.append(f"expected {wanted} bytes for needle {key} on volume {volume.vid}, got {got}")
            break
        if whole:
            problem = _parse(volume, b"".join(pieces), size, forced=False)
            if problem:
                found.texts.append(f"needle {key} on volume {volume.vid}, shards {_list(local)}: {problem}")
    return found


def _read(shard: EcShard, offset: int, length: int, key: int, number: int, count: int) -> tuple[str, bytes]:
    if offset + length > shard.size:
        text = f"local shard {shard.number} for needle {key} is too short ({shard.size}), cannot read chunk"
        return f"{text} {number}/{count}", b""
    try:
        data = shard.read(offset, length)
    except OSError as exc:
        text = f"failed to read chunk {number}/{count} for needle {key} from local shard {shard.number}"
        return f"{text} at offset {offset}: {exc.strerror}", b""
    if len(data) != length:
        text = f"expected {length} bytes for chunk {number}/{count} for needle {key} from local shard {shard.number}"
        return f"{text}, got {len(data)}", b""
    return "", data


def scrub_full(reader: EcReader, volume: EcVolume, *, forced: bool, go_on: GoOn) -> Findings:
    """Reads every record from shards here and elsewhere, without making lost ones anew, and checks it."""
    found = Findings()
    try:
        reader.refresh(volume, 0.0)  # a shard that has moved is no finding
    except StorageError as exc:
        found.texts.append(str(exc).removeprefix("ReadEcShardIntervals: "))
        return found
    scrub_index(volume, found)
    found.files = 0
    layout = volume.layout
    for key, offset, size in volume.walk():
        go_on()
        found.files += 1
        if size < 0:
            continue
        intervals = layout.locate(offset, volume.record_bytes(size))
        ids = _list([interval.shard for interval in intervals])
        pieces = []
        is_deleted = False
        for number, interval in enumerate(intervals, 1):
            data = reader.read_local(volume, interval)
            if data is None:
                try:
                    data = reader.read_remote(volume, key, interval)
                except NeedleDeleted:  # noted by another server only: nothing is wrong with it
                    is_deleted = True
                    break
            if data is None:
                found.texts.append(
                    f"failed to read EC shard {interval.shard} for needle {key} on volume {volume.vid} "
                    f"(interval {number}/{len(intervals)})"
                )
                found.broken[interval.shard] = interval.length
                break
            pieces.append(data)
        if is_deleted:
            continue
        record, wanted = b"".join(pieces), volume.record_bytes(size)
        what = f"EC volume {volume.vid}, needle {key} on shards {ids}"
        if len(record) != wanted:
            found.texts.append(f"{what}: expected {wanted} bytes, got {len(record)}")
            continue
        problem = _parse(volume, record, size, forced=forced)
        if problem:
            found.texts.append(f"{what}: {problem}")
    return found


def scrub_checksums(volume: EcVolume, go_on: GoOn) -> Findings:
    """Compares the shards of this disk with their checksums; with enough good ones, those with what they should be."""
    found = Findings()
    if volume.sums_state == "invalid":
        found.texts.append(f"ec volume {volume.vid}: bitrot sidecar is malformed/unverifiable (sidecar integrity)")
        return found
    if volume.sums is None:
        return found
    shards = volume.shards
    broken = [shard for shard in shards.values() if _has_bad_sums(volume, volume.sums, shard, found, go_on)]
    parity = volume.ratio.parity
    if len(broken) > parity:
        found.texts = [
            f"ec volume {volume.vid}: {len(broken)}/{len(shards)} local shards mismatch (> parity {parity}): "
            "suspect stale sidecar, not flagging shard corruption"
        ]
        return found
    bad = {shard.number for shard in broken}
    good = {number: shard for number, shard in shards.items() if number not in bad}
    for shard in broken:
        if len(good) >= volume.ratio.data and _is_as_coded(volume, shard, good, go_on):
            found.texts.append(
                f"ec volume {volume.vid} shard {shard.number}: sidecar mismatch but Reed-Solomon confirms the bytes "
                "are correct: stale sidecar, not flagging shard"
            )
            continue
        found.broken[shard.number] = shard.size
    return found


def _has_bad_sums(volume: EcVolume, sums: Sidecar, shard: EcShard, found: Findings, go_on: GoOn) -> bool:
    entry = sums.of(shard.number)
    vid, number = volume.vid, shard.number
    if entry is None:
        found.texts.append(f"ec volume {vid}: no checksum entry for local shard {number}")
        return False
    if shard.size != entry.covered:
        found.texts.append(
            f"ec volume {vid} shard {number}: size {shard.size} != covered_size {entry.covered} (truncated or extended)"
        )
        return True
    is_bad = False
    for block, wanted in enumerate(entry.crcs):
        at, end, crc = block * sums.block_bytes, min((block + 1) * sums.block_bytes, entry.covered), 0
        start = at
        try:
            while at < end and (piece := shard.read(at, min(_COMPARE_BYTES, end - at))):
                go_on()
                crc = engine.crc32c(piece, crc)
                at += len(piece)
            reason = "EOF"
        except OSError as exc:
            reason = exc.strerror or str(exc)
        if at < end:
            text = f"read block {block} at {start}: {reason} (got {at - start}/{end - start})"
            found.texts.append(f"ec volume {vid} shard {number}: {text}")
            return True
        if crc != wanted:
            found.texts.append(f"ec volume {vid} shard {number}: checksum mismatch at block {block} (offset {start})")
            is_bad = True
    return is_bad


def _is_as_coded(volume: EcVolume, shard: EcShard, good: dict[int, EcShard], go_on: GoOn) -> bool:
    """Whether the bytes of a shard are what the others make of it."""
    sources = dict(sorted(good.items())[: volume.ratio.data])
    at = 0
    while at < shard.size:
        go_on()
        length = min(_COMPARE_BYTES, shard.size - at)
        try:
            pieces = {number: source.read(at, length) for number, source in sources.items()}
            made = ec.recover(volume.ratio.data, volume.ratio.parity, pieces, shard.number)
            if made != shard.read(at, length):
                return False
        except (OSError, ValueError, engine.NativeError):
            return False
        at += length
    return True
