"""What the server counts: upstream's families under upstream's names, and `pyvolume_*` for what only we have.

ServerMetrics is the Events of HTTP and gRPC; figures of the store, the disks and the process are read when somebody
asks. Contract operations.md 4. May import ops and storage types; must not import http_app, grpc or lifecycle.

Series appear as upstream's do: those without labels from the start on, the others with their first event. Labels that
clients choose (methods) are bounded, which upstream's are not.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pyvolume.ops.context import Events
from pyvolume.server.metric_types import Distribution, Labels, Registry, Value, exponential_buckets
from pyvolume.version import PYVOLUME_VERSION, VERSION, size_tag

if TYPE_CHECKING:
    from pyvolume.config import ServerConfig
    from pyvolume.lockwatch import Watchdog
    from pyvolume.ops.context import Ops
    from pyvolume.ops.throttle import Slots
    from pyvolume.server.grpc.service import GrpcServer
    from pyvolume.server.heartbeat import Heartbeat
    from pyvolume.server.waitress_ext import VolumeHTTPServer
    from pyvolume.storage.store import Store
    from pyvolume.storage.volume import Volume

PREFIX: Final = "SeaweedFS_volumeServer_"
BUCKETS: Final = exponential_buckets(0.0001, 2, 24)
REBUILD_BUCKETS: Final = exponential_buckets(0.01, 2, 20)
TARGET_BUCKETS: Final = (1.0, 2.0, 3.0, 4.0, 5.0)
LIMITER_BUCKETS: Final = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OBJECT_SIZE_BUCKETS: Final = (1024.0, 102400.0, 1048576.0, 104857600.0, 1073741824.0)

STORE_REFRESH_S = 1.0
"""Figures of the volumes are not older than this when they are shown."""
MAX_METHODS = 32
"""Different methods that get a series of their own; further ones count as INVALID."""
GIL_BUCKETS: Final = exponential_buckets(0.00005, 2, 14)
GIL_SAMPLE_S = 0.5
HISTORY_INTERVAL_S = 5.0
HISTORY_SAMPLES = 720

_FOREIGN: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "SeaweedFS_admin_maintenance_last_scan_timestamp_seconds",
        "gauge",
        "Unix timestamp of the most recent maintenance scan. 0 means no scan has run yet.",
    ),
    (
        "SeaweedFS_admin_maintenance_next_scan_timestamp_seconds",
        "gauge",
        "Unix timestamp of the next expected maintenance scan.",
    ),
    (
        "SeaweedFS_admin_workers_connected",
        "gauge",
        "Current number of maintenance workers known to the admin server.",
    ),
    (
        "SeaweedFS_filer_in_flight_upload_bytes",
        "gauge",
        "Current number of bytes being uploaded to filer.",
    ),
    (
        "SeaweedFS_filer_in_flight_upload_count",
        "gauge",
        "Current number of uploads in progress to filer.",
    ),
    (
        "SeaweedFS_master_broadcast_to_full",
        "counter",
        "Counter of master broadcast send to full message channel err",
    ),
    ("SeaweedFS_master_is_leader", "gauge", "is leader"),
    ("SeaweedFS_master_pick_for_write_error", "counter", "Counter of master pick for write error"),
    (
        "SeaweedFS_master_start_time_seconds",
        "gauge",
        "Start time of the master, as seconds since UNIX epoch.",
    ),
    (
        "SeaweedFS_s3_in_flight_upload_bytes",
        "gauge",
        "Current number of bytes being uploaded to S3.",
    ),
    (
        "SeaweedFS_s3_in_flight_upload_count",
        "gauge",
        "Current number of uploads in progress to S3.",
    ),
)
"""Families of other servers, which upstream's one registry shows at 0 and dashboards may expect."""

_HTTP_FAMILIES: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("connections", "pyvolume_http_connections", "gauge", "Open connections."),
    ("queued", "pyvolume_http_queued_requests", "gauge", "Requests that wait for a worker thread."),
    ("body_bytes_in_memory", "pyvolume_http_body_bytes", "gauge", "Request bodies held in memory, in bytes."),
    ("bodies_waiting", "pyvolume_http_bodies_waiting", "gauge", "Request bodies that wait for memory."),
    ("accepted", "pyvolume_http_accepted_total", "counter", "Connections accepted."),
    ("adopted", "pyvolume_http_adopted_total", "counter", "Connections taken over from the fast lane."),
    ("requests", "pyvolume_http_requests_total", "counter", "Requests read, pages included."),
    ("bad_heads", "pyvolume_http_bad_heads_total", "counter", "Requests that could not be parsed."),
    ("refused", "pyvolume_http_refused_total", "counter", "Requests answered from their head alone."),
    ("idle_closed", "pyvolume_http_idle_closed_total", "counter", "Connections closed because nothing came."),
    ("app_errors", "pyvolume_http_app_errors_total", "counter", "Requests that failed in the application."),
    ("accept_pauses", "pyvolume_http_accept_pauses_total", "counter", "Times that no connection could be accepted."),
    ("bodies_spooled", "pyvolume_http_bodies_spooled_total", "counter", "Request bodies kept in a file."),
)
"""Figures of the wire server: name there, name of the family, kind, help."""


class ServerMetrics(Events):
    """One server's counters. Made before the store is there; `watch_*` tell it where to read the rest from."""

    def __init__(self, config: ServerConfig) -> None:
        self.registry = registry = Registry()
        self._config = config
        _define_foreign(registry)
        self._define_requests(registry)
        self._define_state(registry)
        self._define_replication(registry)
        self._define_ours(registry)
        labels = ("", "amd64" if platform.machine() in ("x86_64", "AMD64") else platform.machine(), "linux")
        registry.gauge(
            "SeaweedFS_build_info",
            "A metric with a constant '1' value labeled by version, commit, sizelimit, goos, and goarch from which "
            "SeaweedFS was built.",
            "commit", "goarch", "goos", "sizelimit", "version",
        ).value(*labels, size_tag(config.offset_bytes), VERSION).set(1)  # fmt: skip
        self._store_figures: StoreFigures | None = None
        self._watched: list[Callable[[], None]] = []
        process = ProcessFigures(registry)
        registry.refresh_with(process.refresh, is_slow=True)
        registry.refresh_with(self._refresh_watched, is_slow=True)
        self.history = History(self)

    # -- families -------------------------------------------------------------------------------------------------

    def _define_requests(self, registry: Registry) -> None:
        p = PREFIX
        self.request_total = registry.counter(p + "request_total", "Counter of volume server requests.", "code", "type")
        self.request_seconds = registry.histogram(
            p + "request_seconds", "Bucketed histogram of volume server request processing time.", BUCKETS, "type"
        )
        self._in_flight = registry.gauge(
            p + "in_flight_requests", "Current number of in-flight requests being handled by volume server.", "type"
        )
        self._handlers = registry.counter(p + "handler_total", "Counter of volume server handlers.", "type")
        self._download_limit = registry.gauge(
            p + "concurrent_download_limit", "Limit total concurrent download size."
        ).value()
        self._upload_limit = registry.gauge(
            p + "concurrent_upload_limit", "Limit total concurrent upload size."
        ).value()
        self._download_size = registry.gauge(p + "in_flight_download_size", "In flight total download size.").value()
        self._upload_size = registry.gauge(p + "in_flight_upload_size", "In flight total upload size.").value()
        self._read_failures = registry.counter(
            p + "file_read_failures", "Counter of overall failed file read requests from clients."
        ).value()
        self._invalid_needles = registry.counter(
            p + "file_read_invalid_needles",
            "Counter of failed file read requests due to invalid needle IDs from clients.",
        ).value()
        self._write_failures = registry.counter(
            p + "file_write_failures", "Counter of overall failed file write requests from clients."
        ).value()
        self._totals: dict[tuple[str, int], Value] = {}
        self.seconds: dict[str, Distribution] = {}
        self._flights: dict[str, Value] = {}
        self._kinds: dict[str, Value] = {}

    def _define_state(self, registry: Registry) -> None:
        p = PREFIX
        self._start_time = registry.gauge(
            p + "start_time_seconds", "Start time of the volume server, as seconds since UNIX epoch."
        ).value()
        self.disconnections = registry.counter(
            p + "master_disconnections", "Number of master server disconnections.", "address"
        )
        self.max_volumes = registry.gauge(p + "max_volumes", "Maximum number of volumes.").value()
        self.volumes = registry.gauge(p + "volumes", "Number of volumes or shards.", "collection", "type")
        self.read_only_volumes = registry.gauge(
            p + "read_only_volumes", "Number of read only volumes.", "collection", "type"
        )
        self.total_disk_size = registry.gauge(
            p + "total_disk_size", "Actual disk size used by volumes.", "collection", "type"
        )
        self.resource = registry.gauge(p + "resource", "Resource usage", "name", "type")
        self.disk_errors = registry.gauge(p + "disk_error_status", "Disk error status", "name", "type")
        self._compact_count = registry.counter(
            p + "vacuuming_compact_count", "Counter of volume vacuuming Compact counter", "success"
        )
        self._commit_count = registry.counter(
            p + "vacuuming_commit_count", "Counter of volume vacuuming commit counter", "success"
        )
        self._vacuum_seconds = registry.histogram(
            p + "vacuuming_seconds",
            "Bucketed histogram of volume server vacuuming processing time.",
            BUCKETS,
            "type",
        )
        self._rebuilds = registry.counter(
            p + "ec_rebuild_total", "Counter of EC shard rebuild operations by result.", "result"
        )
        self._rebuild_seconds = registry.histogram(
            p + "ec_rebuild_seconds",
            "Bucketed histogram of EC shard rebuild/reconstruct duration by result.",
            REBUILD_BUCKETS,
            "result",
        )
        self._scrub_time = registry.gauge(
            p + "scrub_last_time_seconds", "Last scrub execution time, as seconds since UNIX epoch.", "mode"
        )
        self._scrub_volumes = registry.counter(
            p + "scrub_volume_failures",
            "Counter of overall volumes with issues detected during scrubbing.",
            "mode",
        )
        self._scrub_shards = registry.counter(
            p + "scrub_shard_failures",
            "Counter of overall EC shards with issues detected during scrubbing.",
            "mode",
        )

    def _define_replication(self, registry: Registry) -> None:
        p = PREFIX
        self._replications = registry.counter(
            p + "replication_operations_total",
            "Counter of replication operations by type (write, delete) and result (success, failure).",
            "operation",
            "result",
        )
        self._replication_seconds = registry.histogram(
            p + "replication_seconds",
            "Bucketed histogram of replication operation duration in seconds.",
            BUCKETS,
            "operation",
        )
        self._targets = registry.histogram(
            p + "replication_targets",
            "Histogram of replica targets count per replication operation.",
            TARGET_BUCKETS,
        ).distribution()
        self._replication_failures = registry.counter(
            p + "replication_failures_total",
            "Counter of replication failures by operation and reason (timeout, connection_refused, context_cancelled, "
            "server_error).",
            "operation",
            "reason",
        )
        self._upload_errors = registry.counter(
            "SeaweedFS_upload_error_total",
            "Counter of upload errors by HTTP status code. Code 0 means transport error (no response received).",
            "code",
        )

    def _define_ours(self, registry: Registry) -> None:
        gauge, counter = registry.gauge, registry.counter
        gauge("pyvolume_info", "Constant 1, labeled by our own version and that of Python.", "python", "version").value(
            platform.python_version(), PYVOLUME_VERSION
        ).set(1)
        self.map_bytes = gauge("pyvolume_map_bytes", "Memory taken by the needle maps of all volumes.")
        self.map_entries = gauge("pyvolume_map_entries", "Needles known to the maps of all volumes.")
        self.io_errors = gauge("pyvolume_volume_io_errors", "Input/output errors met in the volumes served now.")
        self.compacting = gauge("pyvolume_volumes_compacting", "Volumes that are being vacuumed.")
        self.vacuum_progress = gauge(
            "pyvolume_vacuum_progress", "Share of the data that the vacuum of a volume has gone through.", "volume"
        )
        self.flushes = counter("pyvolume_group_commits_total", "Flushes that writes with fsync waited for.").value()
        self.flushed = counter("pyvolume_group_commit_records_total", "Records that these flushes covered.").value()
        self._gil_wait = registry.histogram(
            "pyvolume_gil_wait_seconds",
            "Sampled: how long a thread that has work waits for the interpreter.",
            GIL_BUCKETS,
        ).distribution()
        self.loading = gauge(
            "pyvolume_loading_entries", "Volumes found at the start, and how many of them are done with.", "state"
        )
        self._long_waits = counter("pyvolume_long_waits_total", "Waits for a lock or an append longer than 30 s.")
        self._waiting_long = gauge("pyvolume_long_waits", "Such waits under way.")
        self._connected = gauge("pyvolume_master_connected", "1 while a master takes our heartbeats.")
        self._in_flight_bytes = gauge(
            "pyvolume_in_flight_bytes", "Bytes of requests that were let in and have not ended.", "direction"
        )
        self._waiting = gauge(
            "pyvolume_waiting_requests",
            "Requests that wait: for room under a transfer limit, or for a slot to ask other servers.",
            "what",
        )
        self._peer_slots = gauge("pyvolume_peer_slots", "Slots for requests that ask other servers.", "state")
        self._http = [
            (stat, (counter if kind == "counter" else gauge)(name, help_text, "port"))
            for stat, name, kind, help_text in _HTTP_FAMILIES
        ]
        self._grpc_running = gauge("pyvolume_grpc_running", "gRPC calls that are being handled.")
        self._grpc_refused = counter(
            "pyvolume_grpc_refused_total", "gRPC calls refused because too many of their kind were running.", "kind"
        )
        self._grpc_calls = counter("pyvolume_grpc_calls_total", "gRPC calls handled.", "method", "result")

    # -- where the rest comes from --------------------------------------------------------------------------------

    def _refresh_watched(self) -> None:
        if self._store_figures is not None:
            self._store_figures.refresh()
        for refresh in self._watched:
            refresh()

    def watch_store(self, store: Store) -> None:
        """The volumes are loaded: the server counts as started now."""
        self._start_time.set(int(time.time()))
        self._download_limit.set(self._config.download_limit_bytes)
        self._upload_limit.set(self._config.upload_limit_bytes)
        self._store_figures = StoreFigures(self, store)

    def sample_gil(self, quit_event: threading.Event) -> None:
        """Until the event is set: gives the interpreter away for a moment and sees how long it takes to get it back."""
        while not quit_event.wait(GIL_SAMPLE_S):
            began = time.perf_counter()
            time.sleep(0)
            self._gil_wait.observe(time.perf_counter() - began)

    def load_progress(self, done: int, total: int) -> None:
        """How far the loading of volumes is."""
        self.loading.value("done").set(done)
        self.loading.value("found").set(total)

    def watch_locks(self, watchdog: Watchdog) -> None:
        """Waits that the watchdog finds too long."""

        def refresh() -> None:
            self._long_waits.value().set(watchdog.long_waits)
            self._waiting_long.value().set(watchdog.waiting)

        self._watched.append(refresh)

    def watch_heartbeat(self, heartbeat: Heartbeat) -> None:
        def refresh() -> None:
            for address, count in list(heartbeat.disconnections.items()):
                self.disconnections.value(address).set(count)
            self._connected.value().set(1 if heartbeat.current_master else 0)

        self._watched.append(refresh)

    def watch_http(self, port: str, server: VolumeHTTPServer) -> None:
        """Connections and queues of a listener; port is `admin` or `public`."""

        def refresh() -> None:
            stats = server.stats
            for stat, family in self._http:
                family.value(port).set(getattr(stats, stat))

        self._watched.append(refresh)

    def watch_ops(self, ops: Ops, slots: Slots) -> None:
        def refresh() -> None:
            self._in_flight_bytes.value("download").set(ops.downloads.in_flight)
            self._in_flight_bytes.value("upload").set(ops.uploads.in_flight)
            self._waiting.value("download").set(ops.downloads.waiting)
            self._waiting.value("upload").set(ops.uploads.waiting)
            self._waiting.value("peer_slot").set(slots.waiting)
            self._peer_slots.value("taken").set(slots.taken)
            self._peer_slots.value("limit").set(slots.limit)

        self._watched.append(refresh)

    def watch_grpc(self, server: GrpcServer) -> None:
        def refresh() -> None:
            self._grpc_running.value().set(server.running)
            for kind, count in list(server.budgets.refused.items()):
                self._grpc_refused.value(kind.value.replace(" ", "_")).set(count)

        self._watched.append(refresh)

    # -- events ---------------------------------------------------------------------------------------------------

    def handler(self, kind: str) -> None:
        child = self._kinds.get(kind)
        if child is None:
            child = self._kinds[kind] = self._handlers.value(kind)
        child.inc()

    def read_failure(self) -> None:
        self._read_failures.inc()

    def invalid_needle(self) -> None:
        self._invalid_needles.inc()

    def write_failure(self) -> None:
        self._write_failures.inc()

    def _flight(self, kind: str) -> Value:
        child = self._flights.get(kind)
        if child is None:
            if len(self._flights) >= MAX_METHODS:
                kind = "INVALID"
            child = self._in_flight.value(kind)
            if len(self._flights) < MAX_METHODS:
                self._flights[kind] = child
        return child

    def request_begins(self, method: str) -> None:
        self._flight(method).inc()

    def in_flight_ended(self, method: str) -> None:
        self._flight(method).dec()

    def request_ended(self, method: str, status: int, seconds: float) -> None:
        total = self._totals.get((method, status))
        if total is None:
            method = self._known(method)
            total = self._totals[method, status] = self.request_total.value(str(status), method)
        total.inc()
        self._duration(method).observe(seconds)

    def _known(self, method: str) -> str:
        return method if method in self.seconds or len(self.seconds) < MAX_METHODS else "INVALID"

    def _duration(self, kind: str) -> Distribution:
        child = self.seconds.get(kind)
        if child is None:
            child = self.seconds[kind] = self.request_seconds.distribution(kind)
        return child

    def downloads_seen(self, in_flight_bytes: int) -> None:
        self._download_size.value = in_flight_bytes

    def uploads_seen(self, in_flight_bytes: int) -> None:
        self._upload_size.value = in_flight_bytes

    def local_write_begins(self) -> None:
        self._flight("writeToLocalDisk").inc()

    def local_write(self, seconds: float) -> None:
        self._flight("writeToLocalDisk").dec()
        self._duration("writeToLocalDisk").observe(seconds)

    def replica_writes_begin(self) -> None:
        self._flight("writeToReplicas").inc()

    def replica_writes(self, seconds: float) -> None:
        self._flight("writeToReplicas").dec()
        self._duration("writeToReplicas").observe(seconds)

    def replicated(self, operation: str, targets: int) -> None:
        self._targets.observe(targets)

    def replication_ended(self, operation: str, ok: bool, seconds: float) -> None:
        self._replications.value(operation, "success" if ok else "failure").inc()
        self._replication_seconds.distribution(operation).observe(seconds)

    def writes_replicated(self, count: int, copies: int, latency: Sequence[int], seconds: float) -> None:
        """Writes that the fast lane has copied: `copies` in all. latency: counts by BUCKETS, not cumulated."""
        self._replications.value("write", "success").inc(count)
        self._replication_seconds.distribution("write").add(latency, seconds)
        self._duration("writeToReplicas").add(latency, seconds)
        targets = [0] * (len(TARGET_BUCKETS) + 1)
        targets[bisect_left(TARGET_BUCKETS, copies / count)] = count
        self._targets.add(targets, float(copies))

    def writes_not_replicated(self, count: int) -> None:
        """Writes and deletes of the fast lane that concerned no other server."""
        self._targets.add([count, *[0] * len(TARGET_BUCKETS)], 0.0)

    def replication_failed(self, operation: str, reason: str) -> None:
        self._replication_failures.value(operation, reason).inc()

    def upload_error(self, status: int) -> None:
        self._upload_errors.value(str(status)).inc()

    def rpc_ended(self, name: str, request: Any, response: Any, ok: bool, seconds: float) -> None:
        self._grpc_calls.value(name, "ok" if ok else "failed").inc()
        if name in ("VacuumVolumeCompact", "VacuumVolumeCommit"):
            step, counts = (
                ("compact", self._compact_count) if name == "VacuumVolumeCompact" else ("commit", self._commit_count)
            )
            counts.value("true" if ok else "false").inc()
            self._vacuum_seconds.distribution(step).observe(seconds)
        elif name in ("ReadNeedleBlob", "ReadNeedleMeta", "ReadAllNeedles"):
            if not ok:
                self.read_failure()
        elif name == "WriteNeedleBlob":
            if not ok:
                self.write_failure()
        elif name == "DeleteCollection":
            if ok:
                self._collection_deleted(request.collection)
        elif name in ("ScrubVolume", "ScrubEcVolume") and ok and response is not None:
            mode = request.DESCRIPTOR.fields_by_name["mode"].enum_type.values_by_number[request.mode].name
            self._scrub_time.value(mode).set(int(time.time()))
            self._scrub_volumes.value(mode).inc(len(response.broken_volume_ids))
            if name == "ScrubEcVolume":
                self._scrub_shards.value(mode).inc(len(response.broken_shard_infos))

    def ec_rebuilt(self, ok: bool, seconds: float) -> None:
        result = "success" if ok else "failure"
        self._rebuilds.value(result).inc()
        self._rebuild_seconds.distribution(result).observe(seconds)

    def _collection_deleted(self, collection: str) -> None:
        for family in (self.volumes, self.read_only_volumes, self.total_disk_size):
            for labels in family.all_labels():
                if labels[0] == collection:
                    family.remove(*labels)


def _define_foreign(registry: Registry) -> None:
    for name, kind, help_text in _FOREIGN:
        (registry.counter if kind == "counter" else registry.gauge)(name, help_text).value()
    registry.histogram(
        "SeaweedFS_filer_object_size_bytes",
        "Distribution of object sizes in bytes, sampled when an object is first created.",
        OBJECT_SIZE_BUCKETS,
    ).distribution()
    registry.histogram(
        "SeaweedFS_s3_lifecycle_dispatch_limiter_wait_seconds",
        "Time spent waiting on the cluster rate limiter before issuing a LifecycleDelete RPC. Non-zero values indicate "
        "the cluster cap is binding.",
        LIMITER_BUCKETS,
    ).distribution()


# --------------------------------------------------------------------------------------------------------------- store


class StoreFigures:
    """Sums over the volumes and the state of the disks. Takes the membership lock for a moment, no disk access."""

    def __init__(self, metrics: ServerMetrics, store: Store) -> None:
        self._metrics = metrics
        self._store = store
        self._flushes: dict[Volume, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._fresh_until = 0.0

    def refresh(self) -> None:
        with self._lock:
            if time.monotonic() < self._fresh_until:
                return
            self._volumes()
            self._disks()
            self._fresh_until = time.monotonic() + STORE_REFRESH_S

    def _volumes(self) -> None:
        counts: dict[Labels, float] = {}
        read_only: dict[Labels, float] = {}
        sizes: dict[Labels, float] = {}
        map_bytes = map_entries = io_errors = compacting = 0
        progress: dict[Labels, float] = {}
        flushes: dict[Volume, tuple[int, int]] = {}
        for volume in self._store.volumes():
            stat = volume.stat()
            if stat.closed:
                continue
            name = volume.collection
            key = (name, "volume")
            if key not in counts:
                for kind in ("IsReadOnly", "isDiskSpaceLow", "noWriteCanDelete", "noWriteOrDelete"):
                    read_only[name, kind] = 0
            counts[key] = counts.get(key, 0) + 1
            sizes[name, "normal"] = sizes.get((name, "normal"), 0) + stat.dat_bytes
            sizes[name, "deleted_bytes"] = sizes.get((name, "deleted_bytes"), 0) + stat.deleted_bytes
            reasons = volume.read_only_reasons
            if reasons:
                read_only[name, "IsReadOnly"] += 1
                read_only[name, "isDiskSpaceLow"] += reasons.disk_space_low
                read_only[name, "noWriteCanDelete"] += reasons.no_write_can_delete
                read_only[name, "noWriteOrDelete"] += reasons.no_write_or_delete
            map_bytes += stat.map_bytes
            map_entries += stat.map_entries
            io_errors += stat.eio_count
            compacting += volume.is_compacting
            if volume.vacuum_offset and stat.dat_bytes:
                progress[(str(volume.vid),)] = round(min(1.0, volume.vacuum_offset / stat.dat_bytes), 3)
            if stat.flush_count:
                flushes[volume] = stat.flush_count, stat.flushed_records
        for coded in self._store.ec.volumes():
            name, shards = coded.collection, list(coded.shards.values())
            counts[name, "ec_shards"] = counts.get((name, "ec_shards"), 0) + len(shards)
            sizes[name, "ec"] = sizes.get((name, "ec"), 0) + sum(shard.size for shard in shards)
        metrics = self._metrics
        for labels in metrics.volumes.all_labels():
            counts.setdefault(labels, 0)  # once seen, a collection stays, at 0
        for labels, count in counts.items():
            metrics.volumes.value(*labels).set(count)
        metrics.read_only_volumes.replace(read_only)
        metrics.total_disk_size.replace(sizes)
        metrics.map_bytes.value().set(map_bytes)
        metrics.map_entries.value().set(map_entries)
        metrics.io_errors.value().set(io_errors)
        metrics.compacting.value().set(compacting)
        metrics.vacuum_progress.replace(progress)
        for flushed, (count, records) in flushes.items():
            old_count, old_records = self._flushes.get(flushed, (0, 0))
            if count < old_count:  # another handle
                old_count = old_records = 0
            metrics.flushes.inc(count - old_count)
            metrics.flushed.inc(records - old_records)
        self._flushes = flushes

    def _disks(self) -> None:
        most = 0
        resource: dict[Labels, float] = {}
        errors: dict[Labels, float] = {}
        for location in self._store.locations:
            most += location.max_volume_count
            name, usage = location.config.path, location.usage
            resource[name, "all"] = usage.all_bytes
            resource[name, "used"] = usage.used_bytes
            resource[name, "free"] = usage.free_bytes
            resource[name, "avail"] = location.available_bytes
            errors[name, "error"] = 1 if location.is_unavailable else 0
        self._metrics.max_volumes.set(most)
        self._metrics.resource.replace(resource)
        self._metrics.disk_errors.replace(errors)


# ------------------------------------------------------------------------------------------------------------- process

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_UNLIMITED = 18446744073709551615
_STAT_STATE_FIELD = 3  # the number, in proc(5), of the first field behind the command's name


class ProcessFigures:
    """The process_* families, from /proc. A figure that the system does not tell is left as it was."""

    def __init__(self, registry: Registry) -> None:
        gauge, counter = registry.gauge, registry.counter
        self._cpu = counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.").value()
        self._max_fds = gauge("process_max_fds", "Maximum number of open file descriptors.").value()
        self._open_fds = gauge("process_open_fds", "Number of open file descriptors.").value()
        self._received = counter(
            "process_network_receive_bytes_total", "Number of bytes received by the process over the network."
        ).value()
        self._sent = counter(
            "process_network_transmit_bytes_total", "Number of bytes sent by the process over the network."
        ).value()
        self._resident = gauge("process_resident_memory_bytes", "Resident memory size in bytes.").value()
        self._started = gauge(
            "process_start_time_seconds", "Start time of the process since unix epoch in seconds."
        ).value()
        self._virtual = gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.").value()
        self._virtual_max = gauge(
            "process_virtual_memory_max_bytes", "Maximum amount of virtual memory available in bytes."
        ).value()
        self._threads = gauge("pyvolume_threads", "Threads of the process.").value()

    def refresh(self) -> None:
        for read in (self._read_stat, self._read_limits, self._read_network):
            with suppress(OSError, ValueError, IndexError, KeyError):
                read()

    def _read_stat(self) -> None:
        fields = _text("/proc/self/stat").rpartition(")")[2].split()

        def field(number: int) -> int:
            return int(fields[number - _STAT_STATE_FIELD])

        self._cpu.set((field(14) + field(15)) / _TICKS)
        self._threads.set(field(20))
        self._virtual.set(field(23))
        self._resident.set(field(24) * _PAGE_BYTES)
        boot = next(int(line.split()[1]) for line in _text("/proc/stat").splitlines() if line.startswith("btime "))
        self._started.set(boot + field(22) / _TICKS)
        self._open_fds.set(len(os.listdir("/proc/self/fd")) - 1)

    def _read_limits(self) -> None:
        for line in _text("/proc/self/limits").splitlines():
            for title, child in (("Max open files", self._max_fds), ("Max address space", self._virtual_max)):
                if line.startswith(title):
                    soft = line[len(title) :].split()[0]
                    child.set(_UNLIMITED if soft == "unlimited" else int(soft))

    def _read_network(self) -> None:
        lines = [line.split() for line in _text("/proc/self/net/netstat").splitlines() if line.startswith("IpExt:")]
        figures = dict(zip(lines[0], lines[1], strict=True))
        self._received.set(int(figures["InOctets"]))
        self._sent.set(int(figures["OutOctets"]))


def _text(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


# ------------------------------------------------------------------------------------------------------------- history

_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "reads": ("GET", "HEAD"),
    "writes": ("POST", "PUT"),
    "deletes": ("DELETE",),
}


class History:
    """Requests and latencies of the last hour in steps of a few seconds, for the UI. One thread samples."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._samples: deque[dict[str, Any]] = deque(maxlen=HISTORY_SAMPLES)
        self._before: dict[str, list[int]] = {}
        self._at = time.monotonic()

    def run(self, quit_event: threading.Event) -> None:
        """Samples until the event is set."""
        while not quit_event.wait(HISTORY_INTERVAL_S):
            self.sample()

    def sample(self) -> None:
        """Appends what happened since the last call. One thread only."""
        self._metrics.registry.refresh(counts_only=True)
        now = time.monotonic()
        step, self._at = max(now - self._at, 1e-3), now
        point: dict[str, Any] = {"t": int(time.time())}
        for group, methods in _GROUPS.items():
            counts = [0] * (len(BUCKETS) + 1)
            for method in methods:
                child = self._metrics.seconds.get(method)
                if child is not None:
                    counts = [have + more for have, more in zip(counts, child.read()[0], strict=True)]
            before = self._before.get(group, [0] * len(counts))
            self._before[group] = counts
            fresh = [new - old for new, old in zip(counts, before, strict=True)]
            point[group] = {
                "rate": round(fresh[-1] / step, 3),
                "p50_ms": _quantile(fresh, 0.5),
                "p99_ms": _quantile(fresh, 0.99),
            }
        self._samples.append(point)

    def points(self) -> list[dict[str, Any]]:
        """Oldest first. Times of day are Unix seconds, rates per second; a latency without requests is None."""
        return list(self._samples)


def _quantile(cumulative: Sequence[int], share: float) -> float | None:
    """In ms, between the bounds of its bucket in proportion, as Prometheus does."""
    total = cumulative[-1]
    if not total:
        return None
    rank = share * total
    place = next(index for index, count in enumerate(cumulative) if count >= rank)
    if place == len(BUCKETS):
        return round(BUCKETS[-1] * 1000, 4)
    below = cumulative[place - 1] if place else 0
    low = BUCKETS[place - 1] if place else 0.0
    inside = cumulative[place] - below
    return round((low + (BUCKETS[place] - low) * (rank - below) / inside) * 1000, 4)
