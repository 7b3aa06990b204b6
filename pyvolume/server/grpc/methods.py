"""The 49 RPCs: which gates each passes first, and which budget of threads it uses.

Must not import ops or storage. The matrix is upstream's (`weed/server/volume_grpc_admin_auth_coverage_test.go` lists
the open ones); a test compares it with the descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Maintenance(Enum):
    """Where the maintenance gate stands."""

    NONE = "none"
    FIRST = "first"
    """Right after the white list."""
    IN_HANDLER = "in handler"
    """Later than another check: the handler calls gates.check_maintenance itself."""


class Kind(Enum):
    """A budget of worker threads. Every kind but UNARY is for calls that may last as long as a volume takes to copy;
    they are refused with RESOURCE_EXHAUSTED beyond their limit, so that short calls always find a thread."""

    UNARY = "unary"
    COPY = "copy"
    TAIL = "tail"
    SCAN = "scan"
    VACUUM = "vacuum"
    EC_READ = "EC read"
    EC_WORK = "EC work"
    TIER = "tier"
    REMOTE = "remote fetch"


LIMITS: dict[Kind, int] = {
    Kind.UNARY: 64,
    Kind.COPY: 128,
    Kind.TAIL: 256,
    Kind.SCAN: 12,
    Kind.VACUUM: 16,
    Kind.EC_READ: 64,
    Kind.EC_WORK: 12,
    Kind.TIER: 8,
    Kind.REMOTE: 128,
}
"""Threads by kind. UNARY is not enforced by a semaphore: it is what is left of the pool for short calls, which wait."""


@dataclass(frozen=True, slots=True)
class Rpc:
    """One row of the matrix. guarded: the white list applies. changes: alters state, so -guardPeers guards it too."""

    name: str
    guarded: bool
    maintenance: Maintenance
    changes: bool
    kind: Kind = Kind.UNARY


_W, _NO_W = True, False
_M, _NO_M, _M_LATER = Maintenance.FIRST, Maintenance.NONE, Maintenance.IN_HANDLER
_CHANGES, _READS = True, False

RPCS: dict[str, Rpc] = {
    rpc.name: rpc
    for rpc in (
        # volumes
        Rpc("AllocateVolume", _W, _M, _CHANGES),
        Rpc("VolumeMount", _W, _NO_M, _CHANGES),
        Rpc("VolumeUnmount", _W, _NO_M, _CHANGES),
        Rpc("VolumeDelete", _W, _M, _CHANGES),
        Rpc("DeleteCollection", _W, _NO_M, _CHANGES),
        Rpc("VolumeConfigure", _W, _M, _CHANGES),
        Rpc("VolumeConsolidateIndex", _W, _M, _CHANGES),
        Rpc("VolumeMarkReadonly", _W, _M_LATER, _CHANGES),
        Rpc("VolumeMarkWritable", _W, _M_LATER, _CHANGES),
        Rpc("VolumeStatus", _NO_W, _NO_M, _READS),
        # the server
        Rpc("VolumeServerStatus", _NO_W, _NO_M, _READS),
        Rpc("VolumeServerLeave", _W, _NO_M, _CHANGES),
        Rpc("GetState", _NO_W, _NO_M, _READS),
        Rpc("SetState", _W, _NO_M, _CHANGES),
        Rpc("Ping", _NO_W, _NO_M, _READS),
        # needles
        Rpc("BatchDelete", _W, _M, _CHANGES),
        Rpc("VolumeNeedleStatus", _W, _NO_M, _READS),
        Rpc("ReadNeedleBlob", _NO_W, _NO_M, _READS),
        Rpc("ReadNeedleMeta", _NO_W, _NO_M, _READS),
        Rpc("WriteNeedleBlob", _NO_W, _M, _CHANGES),
        Rpc("ReadAllNeedles", _W, _NO_M, _READS, Kind.SCAN),
        Rpc("Query", _NO_W, _NO_M, _READS, Kind.SCAN),
        # vacuum
        Rpc("VacuumVolumeCheck", _NO_W, _NO_M, _READS),
        Rpc("VacuumVolumeCompact", _W, _M, _CHANGES, Kind.VACUUM),
        Rpc("VacuumVolumeCommit", _W, _M, _CHANGES, Kind.VACUUM),
        Rpc("VacuumVolumeCleanup", _W, _M, _CHANGES),
        # copying and following
        Rpc("VolumeSyncStatus", _NO_W, _NO_M, _READS),
        Rpc("ReadVolumeFileStatus", _NO_W, _NO_M, _READS),
        Rpc("CopyFile", _NO_W, _NO_M, _READS, Kind.COPY),
        Rpc("ReceiveFile", _NO_W, _M, _CHANGES, Kind.COPY),
        Rpc("VolumeCopy", _W, _M, _CHANGES, Kind.COPY),
        Rpc("VolumeIncrementalCopy", _NO_W, _NO_M, _READS, Kind.COPY),
        Rpc("VolumeTailSender", _NO_W, _NO_M, _READS, Kind.TAIL),
        Rpc("VolumeTailReceiver", _W, _NO_M, _CHANGES, Kind.TAIL),
        # erasure coding
        Rpc("VolumeEcShardsGenerate", _W, _M, _CHANGES, Kind.EC_WORK),
        Rpc("VolumeEcShardsRebuild", _W, _M, _CHANGES, Kind.EC_WORK),
        Rpc("VolumeEcShardsCopy", _W, _M, _CHANGES, Kind.COPY),
        Rpc("VolumeEcShardsDelete", _W, _M, _CHANGES),
        Rpc("VolumeEcShardsMount", _NO_W, _NO_M, _CHANGES),
        Rpc("VolumeEcShardsUnmount", _W, _NO_M, _CHANGES),
        Rpc("VolumeEcShardRead", _NO_W, _NO_M, _READS, Kind.EC_READ),
        Rpc("VolumeEcBlobDelete", _NO_W, _M, _CHANGES),
        Rpc("VolumeEcShardsToVolume", _W, _M, _CHANGES, Kind.EC_WORK),
        Rpc("VolumeEcShardsInfo", _NO_W, _NO_M, _READS),
        # scrub
        Rpc("ScrubVolume", _W, _NO_M, _CHANGES, Kind.SCAN),
        Rpc("ScrubEcVolume", _W, _NO_M, _READS, Kind.SCAN),
        # remote storage
        Rpc("VolumeTierMoveDatToRemote", _W, _M, _CHANGES, Kind.TIER),
        Rpc("VolumeTierMoveDatFromRemote", _W, _NO_M, _CHANGES, Kind.TIER),
        Rpc("FetchAndWriteNeedle", _W, _M, _CHANGES, Kind.REMOTE),
    )
}

OPEN_BUT_CHANGING = tuple(rpc.name for rpc in RPCS.values() if rpc.changes and not rpc.guarded)
"""What stays open to anyone although a white list is set, because peers call it; -guardPeers closes these."""
