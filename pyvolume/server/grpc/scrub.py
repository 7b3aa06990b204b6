"""ScrubVolume (contract grpc.md 9): looks for damage in volumes, and may take broken ones out of writing.

Must not import http_app or heartbeat. Departure A7: what was found is in the answer also when a broken volume could not
be marked read-only; the failure is among the details. Upstream: `weed/server/volume_grpc_scrub.go`.
"""

from __future__ import annotations

from typing import Any

from pyvolume.errors import PyvolumeError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler, check_maintenance
from pyvolume.server.grpc.status import Refusal
from pyvolume.server.grpc.volumes import make_readonly
from pyvolume.storage.scrub import ScrubInterrupted, ScrubReport, scrub_volume
from pyvolume.storage.volume import Volume

_INDEX_MODES = (pb.VolumeScrubMode.INDEX,)
_DATA_MODES = (pb.VolumeScrubMode.FULL, pb.VolumeScrubMode.LOCAL)
"""LOCAL is the same as FULL for a volume that is not erasure coded."""


def scrub_volumes(call: Call, request: Any) -> Any:
    """Looks through the volumes named, or all. Ends soon after the client has gone."""
    store = call.server.store
    vids = list(request.volume_ids)
    if not vids:
        vids = [volume.vid for location in store.locations for volume in location.volumes()]
    details: list[str] = []
    broken: list[Volume] = []
    total_files = 0
    for vid in vids:
        volume = store.find_volume(vid)
        if volume is None:
            raise PyvolumeError(f"volume id {vid} not found")
        report = _scrub(call, volume, request.mode)
        total_files += report.total_files
        if report.findings:
            broken.append(volume)
            details += report.findings
    if request.mark_broken_volumes_readonly:
        for volume in broken:
            details.append(_mark(call, volume))
    return pb.ScrubVolumeResponse(
        total_volumes=len(vids),
        total_files=total_files,
        broken_volume_ids=[volume.vid for volume in broken],
        details=details,
    )


def _scrub(call: Call, volume: Volume, mode: int) -> ScrubReport:
    if mode not in _INDEX_MODES and mode not in _DATA_MODES:
        raise PyvolumeError(f"unsupported volume scrub mode {mode}")
    try:
        return scrub_volume(
            volume,
            index_only=mode in _INDEX_MODES,
            bytes_per_s=call.server.config.maintenance_bytes_per_s,
            go_on=lambda _stats: call.active() and not call.server.stopping.is_set(),
        )
    except ScrubInterrupted:
        call.check()
        raise


def _mark(call: Call, volume: Volume) -> str:
    """Marks one volume read-only for good; what is to be said of it."""
    try:
        check_maintenance(call.server)
        make_readonly(call, volume, False, True)
    except (PyvolumeError, Refusal) as exc:
        return str(exc)
    return f"volume {volume.vid} is now read-only"


HANDLERS: dict[str, Handler] = {"ScrubVolume": scrub_volumes}
