"""RPCs about the server itself: status, state, leave, ping (contract grpc.md 4).

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_admin.go`, `volume_grpc_state.go`.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from pyvolume.errors import PyvolumeError
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.status import Refusal
from pyvolume.server.master_client import PING_TIMEOUT_S
from pyvolume.server.rpc import RpcFailure, dial_target
from pyvolume.storage.disk_space import disk_usage
from pyvolume.storage.state import ServerState
from pyvolume.version import full_version

MASTER_TYPE = "master"
OTHER_PING_TYPES = ("filer", "volumeServer")
_STATM = Path("/proc/self/statm")
_PROC_STATUS = Path("/proc/self/status")


def volume_server_status(call: Call, request: Any) -> Any:
    """Disks, memory, version and place. Blocks on statvfs of each directory."""
    config, store = call.server.config, call.server.store
    return pb.VolumeServerStatusResponse(
        disk_statuses=[_disk_status(location.directory) for location in store.locations],
        memory_status=_memory_status(),
        version=full_version(config.offset_bytes),
        data_center=config.data_center,
        rack=config.rack,
        state=_state_message(store.state.current),
    )


def _disk_status(directory: str) -> Any:
    absolute = os.path.abspath(directory)
    try:
        usage = disk_usage(directory)
    except OSError:
        return pb.DiskStatus(dir=absolute)  # as upstream: the entry stays, its figures are 0
    return pb.DiskStatus(
        dir=absolute,
        all=usage.all_bytes,
        used=usage.used_bytes,
        free=usage.free_bytes,
        percent_free=usage.percent_free,
        percent_used=usage.percent_used,
    )


def _memory_status() -> Any:
    """Figures in bytes. goroutines are our threads; self and heap are the resident set."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        resident = int(_STATM.read_text().split()[1]) * page
        lines = _PROC_STATUS.read_text().splitlines()
        stack = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmStk:"))
    except (OSError, IndexError, ValueError, StopIteration):
        resident = stack = 0
    return pb.MemStatus(
        goroutines=threading.active_count(),
        all=total,
        used=total - free,
        free=free,
        self=resident,
        heap=resident,
        stack=stack,
    )


def _state_message(state: ServerState) -> Any:
    return pb.VolumeServerState(maintenance=state.maintenance, version=state.version)


def get_state(call: Call, request: Any) -> Any:
    """The state, present also when it is all zero."""
    return pb.GetStateResponse(state=_state_message(call.server.store.state.current))


def set_state(call: Call, request: Any) -> Any:
    """Replaces the state when the request's version is the current one; a request without state changes nothing.

    Quirk: the master is not told (volume_grpc_state.go).
    """
    state = call.server.store.state
    if not request.HasField("state"):
        return pb.SetStateResponse(state=_state_message(state.current))
    wanted = ServerState(request.state.maintenance, request.state.version)
    return pb.SetStateResponse(state=_state_message(state.update(wanted)))


def volume_server_leave(call: Call, request: Any) -> Any:
    """Ends the heartbeat for good; the master is told in the background. Always succeeds."""
    heartbeat = call.server.heartbeat
    if heartbeat is not None:
        heartbeat.stop(goodbye=True, wait_s=0.0)
    return pb.VolumeServerLeaveResponse()


def ping(call: Call, request: Any) -> Any:
    """Answers for itself when no target is named; otherwise asks a master that this server knows, and nobody else."""
    started_ns = time.time_ns()
    master = call.server.master
    target, kind = request.target, request.target_type
    if target and not (kind == MASTER_TYPE and master.knows(target)):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"unknown ping target {target} of type {kind}")
    remote_ns = 0
    try:
        if kind == MASTER_TYPE:
            remote_ns = master.ping(target, timeout_s=call.timeout_s(PING_TIMEOUT_S), request_id=call.request_id)
        elif kind in OTHER_PING_TYPES:
            dial_target(target)  # the target is empty here, so this says that there is nobody to dial
    except RpcFailure as exc:
        raise PyvolumeError(f"ping {kind} {target}: {exc}") from exc
    return pb.PingResponse(start_time_ns=started_ns, remote_time_ns=remote_ns, stop_time_ns=time.time_ns())


HANDLERS: dict[str, Handler] = {
    "VolumeServerStatus": volume_server_status,
    "VolumeServerLeave": volume_server_leave,
    "GetState": get_state,
    "SetState": set_state,
    "Ping": ping,
}
