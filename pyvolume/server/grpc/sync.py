"""RPCs that tell copiers and followers where a volume stands (contract grpc.md 7).

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_copy.go`, `volume_grpc_copy_incremental.go`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvolume.errors import PyvolumeError, VolumeClosed
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler

if TYPE_CHECKING:
    from pyvolume.storage.vif import VolumeInfo
    from pyvolume.storage.volume import Volume


def volume_or_not_found(call: Call, vid: int) -> Volume:
    """The mounted volume. Raises `not found volume id N`, and VolumeClosed for one that is just being unmounted."""
    volume = call.server.store.find_volume(vid)
    if volume is None:
        raise PyvolumeError(f"not found volume id {vid}")
    if not volume.is_open:
        raise VolumeClosed(f"volume {vid} is closed")
    return volume


def volume_sync_status(call: Call, request: Any) -> Any:
    """What `weed backup` compares: sizes, revision, ttl and replication as text."""
    volume = volume_or_not_found(call, request.volume_id)
    stat = volume.stat()
    return pb.VolumeSyncStatusResponse(
        volume_id=volume.vid,
        collection=volume.collection,
        replication=str(volume.replica_placement),
        ttl=str(volume.ttl),
        tail_offset=stat.dat_bytes,
        compact_revision=stat.compaction_revision,
        idx_file_size=stat.idx_bytes,
        version=volume.version,
    )


def read_volume_file_status(call: Call, request: Any) -> Any:
    """What a copy is checked against. Both times are those of the `.dat`."""
    volume = volume_or_not_found(call, request.volume_id)
    stat, modified_s = volume.stat(), volume.modified_at_s
    return pb.ReadVolumeFileStatusResponse(
        volume_id=volume.vid,
        idx_file_timestamp_seconds=modified_s,
        idx_file_size=stat.idx_bytes,
        dat_file_timestamp_seconds=modified_s,
        dat_file_size=stat.dat_bytes,
        file_count=stat.file_count,
        compaction_revision=stat.compaction_revision,
        collection=volume.collection,
        disk_type=volume.disk_type,
        volume_info=volume_info_message(volume.info),
        version=volume.version,
    )


def volume_info_message(info: VolumeInfo) -> Any:
    """The content of a `.vif` as the message it is the JSON of."""
    message = pb.VolumeInfo(
        files=[
            pb.RemoteFile(
                backend_type=file.backend_type,
                backend_id=file.backend_id,
                key=file.key,
                offset=file.offset,
                file_size=file.file_size,
                modified_time=file.modified_time,
                extension=file.extension,
            )
            for file in info.files
        ],
        version=info.version,
        replication=info.replication,
        bytes_offset=info.bytes_offset,
        dat_file_size=info.dat_file_size,
        expire_at_sec=info.expire_at_sec,
        read_only=info.read_only,
        read_only_can_delete=info.read_only_can_delete,
    )
    if info.ec_shard_config is not None:
        config = info.ec_shard_config
        message.ec_shard_config.SetInParent()
        message.ec_shard_config.data_shards = config.data_shards
        message.ec_shard_config.parity_shards = config.parity_shards
        message.ec_shard_config.encode_ts_ns = config.encode_ts_ns
    return message


HANDLERS: dict[str, Handler] = {
    "VolumeSyncStatus": volume_sync_status,
    "ReadVolumeFileStatus": read_volume_file_status,
}
