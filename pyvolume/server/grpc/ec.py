"""RPCs of erasure coding (contract erasure-coding.md 10, 15; grpc.md 8, 9). Copying is in ec_copy.

Must not import http_app or heartbeat. Storage does the work; here are requests, texts and cancellation. Upstream:
`weed/server/volume_grpc_erasure_coding.go`, `volume_grpc_scrub.go`. Departures E1-E4, S5.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import grpc

from pyvolume.errors import PyvolumeError, StorageError, from_os_error
from pyvolume.ops import ec_scrub
from pyvolume.ops.ec import Mark
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.ec_peers import PASSED_ON, reader_of
from pyvolume.server.grpc import ec_copy
from pyvolume.server.grpc.calls import Call, Handler, check_file_part
from pyvolume.server.grpc.status import Refusal
from pyvolume.storage import files
from pyvolume.storage.ec.encode import NoLiveEntries
from pyvolume.storage.ec.volume import EcVolume, RecentDelete
from pyvolume.types import normalize_disk_type, volume_base_name

PIECE_BYTES = 2 << 20


def generate(call: Call, request: Any) -> Any:
    """Makes index, shards and checksums of a mounted volume beside it."""
    rate = call.server.config.compaction_bytes_per_s
    call.server.store.generate_shards(request.volume_id, request.collection, call.check, bytes_per_s=rate)
    return pb.VolumeEcShardsGenerateResponse()


def rebuild(call: Call, request: Any) -> Any:
    """Makes what is missing or damaged of what is on this server."""
    check_file_part("collection", request.collection)
    members, events, started = call.server.store.ec, call.server.events, time.monotonic()
    try:
        made = members.rebuild(
            request.collection,
            request.volume_id,
            unsafe=request.unsafe_ignore_sidecar,
            go_on=call.check,
            bytes_per_s=call.server.config.compaction_bytes_per_s,
        )
    except StorageError:
        events.ec_rebuilt(False, time.monotonic() - started)
        raise
    if made or members.find(request.volume_id) is not None:
        events.ec_rebuilt(True, time.monotonic() - started)
    return pb.VolumeEcShardsRebuildResponse(rebuilt_shard_ids=made)


def delete(call: Call, request: Any) -> Any:
    """Removes shard files, or all there is of a volume."""
    check_file_part("collection", request.collection)
    members, vid, collection = call.server.store.ec, request.volume_id, request.collection
    if not request.full_teardown:
        members.delete_files(collection, vid, list(request.shard_ids))
        return pb.VolumeEcShardsDeleteResponse()
    try:
        members.wipe(collection, vid, max(0, request.encode_ts_ns))
    except StorageError as exc:
        kind = "fenced" if request.encode_ts_ns else "full"
        raise type(exc)(f"{kind} teardown of ec volume {vid} on {exc}") from exc
    return pb.VolumeEcShardsDeleteResponse(full_teardown_done=True)


def mount(call: Call, request: Any) -> Any:
    """Opens shards, one after the other; the first failure ends it. Deletes that others noted while nobody had a shard
    are fetched."""
    check_file_part("collection", request.collection)
    if request.recover_missing_index:
        ec_copy.recover_indexes(call, request.volume_id)
    members, vid = call.server.store.ec, request.volume_id
    fresh: list[int] = []
    try:
        for shard in request.shard_ids:
            was_here = members.find_shard(vid, shard) is not None
            try:
                members.mount(request.collection, vid, shard, request.source_disk_type)
            except StorageError as exc:
                raise StorageError(f"mount {vid}.{shard}: {exc}") from exc
            if not was_here:
                fresh.append(shard)
    finally:
        reader_of(call.server).catch_up(vid, fresh)
    return pb.VolumeEcShardsMountResponse()


def unmount(call: Call, request: Any) -> Any:
    """Closes shards on every disk, with a time only those of an older encode. Who has them now is told of the deletes
    that came here after it had got them."""
    members, shards = call.server.store.ec, list(request.shard_ids)
    volumes = members.copies(request.volume_id)
    reader, told = reader_of(call.server), set[RecentDelete]()
    reader.hand_over(volumes, shards, told)
    for shard in shards:
        members.unmount(request.volume_id, shard, request.encode_ts_ns)
    reader.hand_over(volumes, shards, told)
    return pb.VolumeEcShardsUnmountResponse()


def shard_read(call: Call, request: Any) -> Iterator[Any]:
    """Bytes of a shard, fewer at its end; one message without any if the needle they are asked for is deleted."""
    members, vid, number = call.server.store.ec, request.volume_id, request.shard_id
    found = members.find_shard(vid, number)
    if found is None:
        raise PyvolumeError(f"not found ec shard {vid}.{number}")
    volume, shard = found
    stamp = volume.encode_ts_ns
    if request.encode_ts_ns and request.encode_ts_ns != stamp:
        raise PyvolumeError(f"ec shard {vid}.{number} belongs to a different encode run")
    if request.file_key and members.is_deleted(vid, request.file_key):
        yield pb.VolumeEcShardReadResponse(is_deleted=True, encode_ts_ns=stamp)
        return
    at, left = request.offset, request.size
    if at < 0:
        raise PyvolumeError(f"readat {shard.path}: negative offset")
    while left > 0:
        try:
            data = shard.read(at, min(PIECE_BYTES, left))
        except OSError as exc:
            raise from_os_error(exc, "read", shard.path) from exc
        if not data:
            return
        yield pb.VolumeEcShardReadResponse(data=data, encode_ts_ns=stamp)
        call.check()
        at, left = at + len(data), left - len(data)


def blob_delete(call: Call, request: Any) -> Any:
    """Notes a delete, or tells the server that has the needle's shard by now. No such volume, or known: success."""
    said = {value for key, value in call.context.invocation_metadata() or () if key == PASSED_ON}
    mark: Mark = "keep" if "keep" in said else "holder" if said else ""
    reader_of(call.server).note_delete(request.volume_id, request.file_key, mark=mark)
    return pb.VolumeEcBlobDeleteResponse()


def to_volume(call: Call, request: Any) -> Any:
    """Makes the files of a plain volume of local shards, or puts those in place that were pushed here."""
    check_file_part("collection", request.collection)
    if request.from_staged:
        _adopt_staged(call, request)
    else:
        try:
            rate = call.server.config.compaction_bytes_per_s
            call.server.store.decode_shards(request.volume_id, request.collection, call.check, bytes_per_s=rate)
        except NoLiveEntries as exc:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(exc)) from exc
    return pb.VolumeEcShardsToVolumeResponse()


def _adopt_staged(call: Call, request: Any) -> None:
    store, vid, disk_type = call.server.store, request.volume_id, request.disk_type
    if store.has_volume(vid):
        raise PyvolumeError(f"staged volume {vid} already exists on this server")
    name = volume_base_name(request.collection, vid)
    bases = [
        f"{location.directory}/{name}"
        for location in store.locations
        if location.disk_type == normalize_disk_type(disk_type)
    ]
    base = next((each for each in bases if files.exists(each + ".dat.copying")), None)
    if base is None:
        raise PyvolumeError(f"staged volume {vid}: no .dat.copying found on a {disk_type} disk")
    for extension in (".dat", ".idx", ".vif"):
        if not files.exists(f"{base}{extension}.copying"):
            raise PyvolumeError(f"staged volume {vid} missing {extension}.copying")
    note = base + ".note"
    try:
        with files.opened(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            files.write_all(fd, f"adopting decoded volume {vid}".encode())
            os.fsync(fd)
        for extension in (".vif", ".dat", ".idx"):
            with files.opened(f"{base}{extension}.copying") as fd:
                os.fsync(fd)
            os.rename(f"{base}{extension}.copying", base + extension)
        files.sync_dir(os.path.dirname(base))
        os.unlink(note)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(note)
        raise PyvolumeError(f"rename staged files for volume {vid}: {from_os_error(exc, 'rename')}") from exc
    try:
        store.mount_volume(vid)
    except StorageError as exc:
        raise PyvolumeError(f"mount staged volume {vid}: {exc}") from exc


def info(call: Call, request: Any) -> Any:
    """All shards on this server, and what the index counts. Quirk: deletes in the journal do not show."""
    copies = call.server.store.ec.copies(request.volume_id)
    if not copies:
        raise PyvolumeError(f"VolumeEcShardsInfo: EC volume {request.volume_id} not found")
    answer = pb.VolumeEcShardsInfoResponse()
    seen: set[int] = set()
    for volume in copies:
        for shard in volume.shards.values():
            if shard.number not in seen:
                seen.add(shard.number)
                answer.ec_shard_infos.append(_shard_info(volume, shard.number, shard.size))
    for _, _, size in copies[0].walk():
        answer.volume_size += max(0, size) if size == -1 else abs(size)
        if size < 0:
            answer.file_deleted_count += 1
        else:
            answer.file_count += 1
    return answer


def _shard_info(volume: EcVolume, number: int, size: int) -> Any:
    return pb.EcShardInfo(shard_id=number, size=size, collection=volume.collection, volume_id=volume.vid)


def scrub(call: Call, request: Any) -> Any:
    """Looks for damage; what is found is in the answer."""
    modes = pb.VolumeScrubMode
    if request.force_deleted_needles_check and request.mode != modes.FULL:
        raise PyvolumeError("deleted needle checks are only supported for FULL scrubs")
    members = call.server.store.ec
    answer = pb.ScrubEcVolumeResponse()
    for vid in list(request.volume_ids) or [volume.vid for volume in members.volumes()]:
        volume = members.find(vid)
        if volume is None:
            raise PyvolumeError(f"EC volume id {vid} not found")
        if request.mode == modes.INDEX:
            found = ec_scrub.Findings()
            ec_scrub.scrub_index(volume, found)
        elif request.mode == modes.LOCAL:
            found = ec_scrub.scrub_local(volume, call.check)
        elif request.mode == modes.FULL:
            forced = request.force_deleted_needles_check
            found = ec_scrub.scrub_full(reader_of(call.server), volume, forced=forced, go_on=call.check)
        elif request.mode == modes.CHECKSUM:
            found = ec_scrub.scrub_checksums(volume, call.check)
        else:
            raise PyvolumeError(f"unsupported EC volume scrub mode {request.mode}")
        answer.total_volumes += 1
        answer.total_files += found.files
        if found.texts or found.broken:
            answer.broken_volume_ids.append(vid)
            answer.details.extend(found.texts)
            answer.broken_shard_infos.extend(_shard_info(volume, n, size) for n, size in sorted(found.broken.items()))
    return answer


HANDLERS: dict[str, Handler] = {
    "VolumeEcShardsGenerate": generate,
    "VolumeEcShardsRebuild": rebuild,
    "VolumeEcShardsCopy": ec_copy.copy,
    "VolumeEcShardsDelete": delete,
    "VolumeEcShardsMount": mount,
    "VolumeEcShardsUnmount": unmount,
    "VolumeEcShardRead": shard_read,
    "VolumeEcBlobDelete": blob_delete,
    "VolumeEcShardsToVolume": to_volume,
    "VolumeEcShardsInfo": info,
    "ScrubEcVolume": scrub,
}
