"""RPCs that make, mount, mark and remove volumes (contract grpc.md 4).

Must not import http_app or heartbeat: the store tells the heartbeat what changed. Upstream:
`weed/server/volume_grpc_admin.go`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvolume.errors import PyvolumeError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler, check_file_part, check_maintenance
from pyvolume.server.master_client import MARK_TIMEOUT_S
from pyvolume.types import ReplicaPlacement, Ttl, go_quote, normalize_disk_type

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume


def allocate_volume(call: Call, request: Any) -> Any:
    """Makes an empty volume on the disk of that type with the fewest volumes."""
    check_file_part("collection", request.collection)
    try:
        replication = ReplicaPlacement.parse(request.replication)
        ttl = Ttl.parse(request.ttl)
    except ValueError as exc:
        raise PyvolumeError(str(exc)) from None
    call.server.store.allocate_volume(
        request.volume_id,
        request.collection,
        replication,
        ttl,
        request.preallocate,
        normalize_disk_type(request.disk_type),
        request.version,
        request.memory_map_max_size_mb,
    )
    return pb.AllocateVolumeResponse()


def volume_mount(call: Call, request: Any) -> Any:
    """Loads a volume whose files are on one of the disks. Mounted already: success."""
    call.server.store.mount_volume(request.volume_id)
    return pb.VolumeMountResponse()


def volume_unmount(call: Call, request: Any) -> Any:
    """Closes a volume on every disk; its files stay. Not mounted: success."""
    call.server.store.unmount_volume(request.volume_id)
    return pb.VolumeUnmountResponse()


def volume_delete(call: Call, request: Any) -> Any:
    """Closes a volume and removes its files on every disk."""
    call.server.store.delete_volume(request.volume_id, request.only_empty, request.keep_remote_data)
    return pb.VolumeDeleteResponse()


def delete_collection(call: Call, request: Any) -> Any:
    """Removes all volumes of a collection; `""` is the default collection. An unknown one: success."""
    call.server.store.delete_collection(request.collection)
    return pb.DeleteCollectionResponse()


def volume_configure(call: Call, request: Any) -> Any:
    """Writes a replication into the `.vif`, with the volume unmounted for the moment. Failures are in the answer."""
    store, vid = call.server.store, request.volume_id
    shown = _configure_text(request)
    try:
        replication = ReplicaPlacement.parse(request.replication)
    except ValueError as exc:
        return pb.VolumeConfigureResponse(error=f"volume configure replication {shown}: {exc}")
    try:
        store.unmount_volume(vid)
    except PyvolumeError as exc:
        return pb.VolumeConfigureResponse(error=f"volume configure unmount {shown}: {exc}")
    try:
        store.configure_volume(vid, replication)
    except PyvolumeError as exc:
        error = f"volume configure {shown}: {exc}"
        try:
            store.mount_volume(vid)
        except PyvolumeError as mount_exc:
            error += f". Also failed to restore mount: {mount_exc}"
        return pb.VolumeConfigureResponse(error=error)
    try:
        store.mount_volume(vid)
    except PyvolumeError as exc:
        return pb.VolumeConfigureResponse(error=f"volume configure mount {shown}: {exc}")
    return pb.VolumeConfigureResponse()


def _configure_text(request: Any) -> str:
    """The request as upstream's `%v` prints it: text format on one line."""
    parts = []
    if request.volume_id:
        parts.append(f"volume_id:{request.volume_id}")
    if request.replication:
        parts.append(f"replication:{go_quote(request.replication)}")
    return " ".join(parts)


def volume_consolidate_index(call: Call, request: Any) -> Any:
    """Moves an index file that lies beside the data into the directory for indexes."""
    call.server.store.consolidate_index(request.volume_id)
    return pb.VolumeConsolidateIndexResponse()


def _volume_to_mark(call: Call, vid: int) -> Volume:
    """The volume, checked in upstream's order: a missing one is "not found" also in maintenance mode."""
    volume = call.server.store.find_volume(vid)
    if volume is None:
        raise PyvolumeError(f"volume {vid} not found")
    check_maintenance(call.server)
    return volume


def make_readonly(call: Call, volume: Volume, can_delete: bool, persist: bool) -> None:
    """Tells the master, marks the volume, tells the master again in case a heartbeat came in between.

    When the first message fails nothing is changed here. Raises PyvolumeError.
    """
    master = call.server.master
    timeout_s = call.timeout_s(MARK_TIMEOUT_S)
    master.mark_readonly(volume, True, timeout_s=timeout_s, request_id=call.request_id)
    call.server.store.mark_readonly(volume.vid, can_delete, persist)
    master.mark_readonly(volume, True, timeout_s=timeout_s, request_id=call.request_id)


def volume_mark_readonly(call: Call, request: Any) -> Any:
    """Stops writes to a volume, here and at the master."""
    volume = _volume_to_mark(call, request.volume_id)
    make_readonly(call, volume, request.can_delete, request.persist)
    return pb.VolumeMarkReadonlyResponse()


def volume_mark_writable(call: Call, request: Any) -> Any:
    """Takes writes again. Quirk: when the master cannot be told the call fails, but the volume stays writable."""
    volume = _volume_to_mark(call, request.volume_id)
    call.server.store.mark_writable(volume.vid)
    call.server.master.mark_readonly(
        volume, False, timeout_s=call.timeout_s(MARK_TIMEOUT_S), request_id=call.request_id
    )
    return pb.VolumeMarkWritableResponse()


def volume_status(call: Call, request: Any) -> Any:
    """Size, counts and whether it takes writes."""
    volume = call.server.store.find_volume(request.volume_id)
    if volume is None:
        raise PyvolumeError(f"not found volume id {request.volume_id}")
    stat = volume.stat()
    if not volume.is_open:
        raise PyvolumeError(f"volume {request.volume_id} data backend not found")
    return pb.VolumeStatusResponse(
        is_read_only=volume.is_read_only,
        volume_size=stat.dat_bytes,
        file_count=stat.file_count,
        file_deleted_count=stat.deleted_count,
    )


HANDLERS: dict[str, Handler] = {
    "AllocateVolume": allocate_volume,
    "VolumeMount": volume_mount,
    "VolumeUnmount": volume_unmount,
    "VolumeDelete": volume_delete,
    "DeleteCollection": delete_collection,
    "VolumeConfigure": volume_configure,
    "VolumeConsolidateIndex": volume_consolidate_index,
    "VolumeMarkReadonly": volume_mark_readonly,
    "VolumeMarkWritable": volume_mark_writable,
    "VolumeStatus": volume_status,
}
