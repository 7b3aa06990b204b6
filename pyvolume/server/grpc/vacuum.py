"""Vacuum RPCs (contract grpc.md 6): for each volume the master asks for check, compact, then commit or cleanup.

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_vacuum.go`, `weed/storage/store_vacuum.go`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from pyvolume.errors import PyvolumeError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.status import CallEnded
from pyvolume.storage import compact
from pyvolume.storage.volume import Volume

REPORT_INTERVAL_BYTES = 128 << 20
"""A message goes out each time the copy has got this much further in the old file."""
LOOK_S = 0.5


def _volume(call: Call, vid: int, doing: str) -> Volume:
    volume = call.server.store.find_volume(vid)
    if volume is None:
        raise PyvolumeError(f"volume id {vid} is not found during {doing}")
    return volume


def check(call: Call, request: Any) -> Any:
    """The share of garbage; the master compares it with its threshold."""
    return pb.VacuumVolumeCheckResponse(garbage_ratio=_volume(call, request.volume_id, "check compact").garbage_ratio)


def compact_volume(call: Call, request: Any) -> Iterator[Any]:
    """Copies the live needles. Small volumes stream nothing: the end of the stream says that it is done."""
    volume = _volume(call, request.volume_id, "compact")
    progress: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = Event()

    def report(source_offset: int) -> bool:
        progress.put(source_offset)
        return not stop.is_set()

    def work() -> None:
        try:
            compact.compact(
                volume,
                preallocate_bytes=max(0, request.preallocate),
                bytes_per_s=call.server.config.compaction_bytes_per_s,
                go_on=report,
            )
        except BaseException as exc:
            progress.put(exc)
        else:
            progress.put(None)

    # The copy has a thread of its own: a client that takes no messages must not stop it, and a client that has gone
    # must be noticed while it works.
    worker = Thread(target=work, name=f"vacuum-{request.volume_id}", daemon=True)
    worker.start()
    target, load = REPORT_INTERVAL_BYTES, 0.0
    try:
        while True:
            try:
                seen = progress.get(timeout=LOOK_S)
            except Empty:
                call.check()
                continue
            if seen is None:
                return
            if isinstance(seen, BaseException):
                raise seen
            call.check()
            if seen > target:
                load = _load_average(load)
                yield pb.VacuumVolumeCompactResponse(processed_bytes=seen, load_avg_1m=load)
                target = seen + REPORT_INTERVAL_BYTES
    except (CallEnded, GeneratorExit):
        stop.set()
        raise
    finally:
        stop.set()
        worker.join()


def _load_average(previous: float) -> float:
    """One-minute load for each CPU; the previous figure where the system does not tell."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return previous


def commit(call: Call, request: Any) -> Any:
    """Puts the compacted files in place. is_read_only is the state before."""
    vid = request.volume_id
    if call.server.stopping.is_set():
        raise PyvolumeError(f"volume id {vid} skips compact because volume is stopping")
    volume = _volume(call, vid, "commit compact")
    read_only = volume.is_read_only
    compact.commit(volume)
    return pb.VacuumVolumeCommitResponse(is_read_only=read_only, volume_size=volume.dat_bytes)


def cleanup(call: Call, request: Any) -> Any:
    """Drops a copy that will not be committed."""
    compact.cleanup(_volume(call, request.volume_id, "cleaning up"))
    return pb.VacuumVolumeCleanupResponse()


HANDLERS: dict[str, Handler] = {
    "VacuumVolumeCheck": check,
    "VacuumVolumeCompact": compact_volume,
    "VacuumVolumeCommit": commit,
    "VacuumVolumeCleanup": cleanup,
}
