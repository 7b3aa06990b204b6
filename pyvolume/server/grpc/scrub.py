"""ScrubVolume (contract grpc.md 9): looks for damage in volumes, and may take broken ones out of writing.

Must not import http_app or heartbeat. Departure A7: what was found is in the answer also when a broken volume could not
be marked read-only; the failure is among the details. A scrub of the data that was cut short, by the client or by the
end of the server, goes on where it was when it is asked for again within a day. Upstream:
`weed/server/volume_grpc_scrub.go`.
"""

from __future__ import annotations

from typing import Any

from pyvolume._native.scrub import ScrubStats
from pyvolume.errors import PyvolumeError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler, check_maintenance
from pyvolume.server.grpc.status import Refusal
from pyvolume.server.grpc.volumes import make_readonly
from pyvolume.storage.scrub import ScrubInterrupted, ScrubReport, scrub_volume
from pyvolume.storage.scrub_state import ScrubState
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
    states: list[ScrubState] = []
    total_files = 0
    for vid in vids:
        volume = store.find_volume(vid)
        if volume is None:
            raise PyvolumeError(f"volume id {vid} not found")
        report = _scrub(call, volume, request.mode, states)
        total_files += report.total_files
        if report.findings:
            broken.append(volume)
            details += report.findings
    for state in states:  # only now: whoever asks again for what was cut short need not wait for these
        state.forget()
    if request.mark_broken_volumes_readonly:
        for volume in broken:
            details.append(_mark(call, volume))
    return pb.ScrubVolumeResponse(
        total_volumes=len(vids),
        total_files=total_files,
        broken_volume_ids=[volume.vid for volume in broken],
        details=details,
    )


def _scrub(call: Call, volume: Volume, mode: int, states: list[ScrubState]) -> ScrubReport:
    if mode not in _INDEX_MODES and mode not in _DATA_MODES:
        raise PyvolumeError(f"unsupported volume scrub mode {mode}")

    def go_on(_stats: ScrubStats) -> bool:
        return call.active() and not call.server.stopping.is_set()

    rate = call.server.config.maintenance_bytes_per_s
    if mode in _INDEX_MODES:
        try:
            return scrub_volume(volume, index_only=True, bytes_per_s=rate, go_on=go_on)
        except ScrubInterrupted:
            call.check()
            raise
    state = ScrubState(volume)
    try:
        report = scrub_volume(volume, bytes_per_s=rate, go_on=go_on, resume=state.position, note=state.note)
    except ScrubInterrupted as exc:
        state.save(exc.position)
        call.check()
        raise
    state.save(report.position)
    states.append(state)
    return report


def _mark(call: Call, volume: Volume) -> str:
    """Marks one volume read-only for good; what is to be said of it."""
    try:
        check_maintenance(call.server)
        make_readonly(call, volume, False, True)
    except (PyvolumeError, Refusal) as exc:
        return str(exc)
    return f"volume {volume.vid} is now read-only"


HANDLERS: dict[str, Handler] = {"ScrubVolume": scrub_volumes}
