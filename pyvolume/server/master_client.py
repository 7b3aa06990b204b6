"""What this server asks of masters, apart from the heartbeat: configuration, locations, marks, pings.

Must not import heartbeat or http_app; the heartbeat tells it the current master (`set_current`). Follows upstream's
`weed/operation/lookup.go`, `lookup_raft_leader.go` and `volume_grpc_admin.go`. Every call has a deadline; many threads
that want the location of one volume share one call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import grpc

from pyvolume.errors import PyvolumeError
from pyvolume.pb import master_pb2
from pyvolume.server.address import http_address, same_server
from pyvolume.server.rpc import MASTER_SERVICE, Channels, RpcFailure, WrappedRpcFailure

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

CACHE_S = 600.0
MAX_CACHED_VOLUMES = 65536
MAX_LOOKUPS_AT_ONCE = 32
LOOKUP_TIMEOUT_S = 10.0
CONFIGURATION_TIMEOUT_S = 5.0
MARK_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 10.0
FIRST_TRY_S = 3.0
"""How long a question for the master waits, at most, while a server that has just started connects to it."""
ROUND_PAUSE_S = 1.79

_MAX_VID = (1 << 32) - 1


class HasMasters(Protocol):
    """The part of the server's configuration that is used here."""

    @property
    def masters(self) -> Sequence[str]: ...
    @property
    def ip(self) -> str: ...
    @property
    def port(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Location:
    """One server that holds a volume. url and public_url are `host:port`; grpc_port 0 means port + 10000."""

    url: str
    public_url: str = ""
    grpc_port: int = 0
    data_center: str = ""


@dataclass(frozen=True, slots=True)
class StorageBackend:
    """A remote storage that volumes may be tiered to; its name is `<type>.<id>`."""

    type: str
    id: str
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MasterConfiguration:
    """The answer of GetMasterConfiguration, as far as a volume server uses it."""

    metrics_address: str = ""
    metrics_interval_s: int = 0
    storage_backends: tuple[StorageBackend, ...] = ()
    default_replication: str = ""
    leader: str = ""
    volume_size_limit_bytes: int = 0
    preallocate: bool = False


class NotCurrentLeader(PyvolumeError):
    """A master refused a change because it does not lead. Internal to this module's retry."""


class _Flight:
    """One lookup on its way; waiters sleep on done."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.locations: tuple[Location, ...] = ()
        self.error: RpcFailure | None = None


class MasterClient:
    """Thread-safe. Construction does no I/O. close() ends calls under way with an error.

    current_master is the address of the heartbeat's master (`""` before the first contact), as upstream's lookups and
    marks use it.
    """

    def __init__(self, config: HasMasters, *, channels: Channels | None = None) -> None:
        self._config = config
        self.channels = channels if channels is not None else Channels()
        self._lock = threading.Lock()
        self._current = ""
        self.contacts = 0
        """How often a stream to a master was opened."""
        self._first_try_over = threading.Event()
        self._first_try_over.set()
        self._cache: OrderedDict[int, tuple[float, tuple[Location, ...]]] = OrderedDict()
        self._flights: dict[int, _Flight] = {}
        self._lookup_slots = threading.BoundedSemaphore(MAX_LOOKUPS_AT_ONCE)

    # -- which master ---------------------------------------------------------------------------------------------

    @property
    def seeds(self) -> tuple[str, ...]:
        """The masters of the command line, in order."""
        return tuple(self._config.masters)

    @property
    def current_master(self) -> str:
        """The master of the heartbeat, kept after disconnects; `""` before the first contact."""
        with self._lock:
            return self._current

    def set_current(self, address: str) -> None:
        """Called by the heartbeat when its stream to this master is open."""
        with self._lock:
            self._current = address
            self.contacts += 1
        self._first_try_over.set()

    def first_try_begins(self) -> None:
        """Called by the heartbeat before it connects for the first time: who asks a master waits until that is over."""
        self._first_try_over.clear()

    def first_try_ends(self) -> None:
        """Called by the heartbeat when a master could not be reached, or when there is none. Idempotent."""
        self._first_try_over.set()

    def _master_to_ask(self, timeout_s: float) -> str:
        """The current master. A server that has just started waits for the first answer, for FIRST_TRY_S at most."""
        self._first_try_over.wait(min(FIRST_TRY_S, timeout_s))
        return self.current_master

    def knows(self, address: str) -> bool:
        """True when the address is the current or a seed master, compared by `host:port`."""
        return bool(http_address(address)) and any(
            same_server(address, known) for known in (self.current_master, *self.seeds) if known
        )

    # -- configuration --------------------------------------------------------------------------------------------

    def get_configuration(self, timeout_s: float = CONFIGURATION_TIMEOUT_S) -> MasterConfiguration:
        """Asks the seed masters in turn, once, each up to timeout_s. Raises the last RpcFailure when none answers."""
        last = RpcFailure(grpc.StatusCode.UNAVAILABLE, "no master peers configured")
        for master in self.seeds:
            try:
                return self._configuration_of(master, timeout_s)
            except RpcFailure as exc:
                last = exc
                host = http_address(master)
                log.info("checkWithMaster %s: get master %s configuration: %s", host, host, exc)
        raise last

    def wait_for_configuration(
        self, timeout_s: float, stop: threading.Event, pause_s: float = ROUND_PAUSE_S
    ) -> MasterConfiguration | None:
        """Asks round after round until a master answers, timeout_s is over or stop is set; then None."""
        deadline = time.monotonic() + timeout_s
        while not stop.is_set():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                return self.get_configuration(min(CONFIGURATION_TIMEOUT_S, left_s))
            except RpcFailure:
                stop.wait(min(pause_s, max(0.0, deadline - time.monotonic())))
        return None

    def when_configured(
        self, apply: Callable[[MasterConfiguration], None], stop: threading.Event, pause_s: float = ROUND_PAUSE_S
    ) -> threading.Thread:
        """Starts a thread that asks until a master answers, then calls apply once. Ends when stop is set."""

        def run() -> None:
            while not stop.is_set():
                answer = self.wait_for_configuration(60.0, stop, pause_s)
                if answer is not None:
                    apply(answer)
                    return

        thread = threading.Thread(target=run, name="master-configuration", daemon=True)
        thread.start()
        return thread

    def _configuration_of(self, master: str, timeout_s: float) -> MasterConfiguration:
        request = master_pb2.GetMasterConfigurationRequest()
        answer = self.channels.unary(master, MASTER_SERVICE, "GetMasterConfiguration", request, timeout_s=timeout_s)
        return MasterConfiguration(
            metrics_address=answer.metrics_address,
            metrics_interval_s=answer.metrics_interval_seconds,
            storage_backends=tuple(
                StorageBackend(backend.type, backend.id, dict(backend.properties))
                for backend in answer.storage_backends
            ),
            default_replication=answer.default_replication,
            leader=answer.leader,
            volume_size_limit_bytes=answer.volume_size_limit_m_b << 20,
            preallocate=answer.volume_preallocate,
        )

    # -- locations ------------------------------------------------------------------------------------------------

    def lookup_volume(
        self, vid: int, collection: str = "", *, timeout_s: float = LOOKUP_TIMEOUT_S, request_id: str = ""
    ) -> list[Location]:
        """The servers that hold the volume, by the current master; kept for ten minutes when there are any.

        A volume that the master does not know gives an empty list. Raises RpcFailure when the master cannot be asked;
        its str() is what upstream embeds in its texts. Blocks up to timeout_s.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            kept = self._cache.get(vid)
            if kept is not None and kept[0] > time.monotonic():
                self._cache.move_to_end(vid)
                return list(kept[1])
            flight = self._flights.get(vid)
            mine = flight is None
            if flight is None:
                flight = self._flights[vid] = _Flight()
        if mine:
            self._fly(flight, vid, collection, deadline, request_id)
        elif not flight.done.wait(max(0.0, deadline - time.monotonic())):
            raise RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, "context deadline exceeded")
        if flight.error is not None:
            raise RpcFailure(flight.error.code, flight.error.details)  # one exception object per thread
        return list(flight.locations)

    def invalidate(self, vid: int) -> None:
        """Forgets where the volume is, so that the next lookup asks the master."""
        with self._lock:
            self._cache.pop(vid, None)

    def _fly(self, flight: _Flight, vid: int, collection: str, deadline: float, request_id: str) -> None:
        """Does the lookup for all who wait on the flight. Never raises: the outcome is in the flight."""
        try:
            flight.locations = self._ask_location(vid, collection, deadline, request_id)
        except RpcFailure as exc:
            flight.error = exc
        except BaseException as exc:
            flight.error = RpcFailure(grpc.StatusCode.INTERNAL, f"lookup of volume {vid}: {exc}")
            raise
        finally:
            with self._lock:
                self._flights.pop(vid, None)
                if flight.error is None and flight.locations and 0 < vid <= _MAX_VID:
                    self._cache[vid] = (time.monotonic() + CACHE_S, flight.locations)
                    self._cache.move_to_end(vid)
                    while len(self._cache) > MAX_CACHED_VOLUMES:
                        self._cache.popitem(last=False)
            flight.done.set()

    def _ask_location(self, vid: int, collection: str, deadline: float, request_id: str) -> tuple[Location, ...]:
        if not self._lookup_slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_LOOKUPS_AT_ONCE} lookups are under way")
        try:
            request = master_pb2.LookupVolumeRequest(volume_or_file_ids=[str(vid)], collection=collection)
            answer = self.channels.unary(
                self._master_to_ask(max(0.0, deadline - time.monotonic())),
                MASTER_SERVICE,
                "LookupVolume",
                request,
                timeout_s=max(0.001, deadline - time.monotonic()),
                request_id=request_id,
            )
        finally:
            self._lookup_slots.release()
        for entry in answer.volume_id_locations:
            if entry.volume_or_file_id == str(vid):
                if entry.error:
                    return ()
                return tuple(
                    Location(where.url, where.public_url, where.grpc_port, where.data_center)
                    for where in entry.locations
                )
        return ()

    def lookup_ec_volume(
        self, vid: int, *, timeout_s: float = LOOKUP_TIMEOUT_S, request_id: str = ""
    ) -> dict[int, list[Location]]:
        """Locations of each shard of an EC volume, by the current master; not cached here. Raises RpcFailure."""
        request = master_pb2.LookupEcVolumeRequest(volume_id=vid)
        master = self._master_to_ask(timeout_s)
        answer = self.channels.unary(
            master, MASTER_SERVICE, "LookupEcVolume", request, timeout_s=timeout_s, request_id=request_id
        )
        return {
            shard.shard_id: [
                Location(where.url, where.public_url, where.grpc_port, where.data_center) for where in shard.locations
            ]
            for shard in answer.shard_id_locations
        }

    # -- read-only marks ------------------------------------------------------------------------------------------

    def mark_readonly(
        self, volume: Volume, is_readonly: bool, *, timeout_s: float = MARK_TIMEOUT_S, request_id: str = ""
    ) -> None:
        """Tells the master that a volume takes no more writes, or takes them again.

        Asks the heartbeat's master; when that one does not lead, asks the seeds for the leader and tries there once.
        Raises PyvolumeError with upstream's text; WrappedRpcFailure (with the remote's code) when no leader is found.
        """
        master = self._master_to_ask(timeout_s)
        try:
            self._mark_on(master, volume, is_readonly, timeout_s, request_id)
            return
        except NotCurrentLeader:
            pass
        try:
            leader = self.lookup_leader()
        except RpcFailure as exc:
            text = f"heartbeat master {http_address(master)} rejected mark-readonly and leader lookup failed: {exc}"
            raise WrappedRpcFailure(exc, text) from exc
        self._mark_on(leader, volume, is_readonly, timeout_s, request_id)

    def _mark_on(self, master: str, volume: Volume, is_readonly: bool, timeout_s: float, request_id: str) -> None:
        request = master_pb2.VolumeMarkReadonlyRequest(
            ip=self._config.ip,
            port=self._config.port,
            volume_id=volume.vid,
            collection=volume.collection,
            replica_placement=volume.replica_placement.byte,
            ttl=volume.ttl.to_u32(),
            disk_type=volume.disk_type,
            is_readonly=is_readonly,
        )
        try:
            self.channels.unary(
                master, MASTER_SERVICE, "VolumeMarkReadonly", request, timeout_s=timeout_s, request_id=request_id
            )
        except RpcFailure as exc:
            text = (
                f"grpc VolumeMarkReadonly with master {http_address(master)}: "
                f"set volume {volume.vid} to read only on master: {exc}"
            )
            raise (NotCurrentLeader if "Not current leader" in text else PyvolumeError)(text) from exc

    def lookup_leader(self) -> str:
        """The leader's address by the first seed master that names one. Raises RpcFailure with upstream's text."""
        count = len(self.seeds)
        if not count:
            raise WrappedRpcFailure(RpcFailure(grpc.StatusCode.UNKNOWN, ""), "no master peers configured")
        last = RpcFailure(grpc.StatusCode.UNKNOWN, "")
        for master in self.seeds:
            try:
                leader = self._configuration_of(master, CONFIGURATION_TIMEOUT_S).leader
            except RpcFailure as exc:
                last = exc
                continue
            if leader:
                return leader
            text = f"master {http_address(master)} returned empty leader"
            last = WrappedRpcFailure(RpcFailure(grpc.StatusCode.UNKNOWN, ""), text)
        raise WrappedRpcFailure(last, f"lookup raft leader from {count} master peer(s): {last}")

    # -- ping -----------------------------------------------------------------------------------------------------

    def ping(self, master: str, *, timeout_s: float = PING_TIMEOUT_S, request_id: str = "") -> int:
        """The start time that the master reports, in ns since the epoch. Raises RpcFailure."""
        answer = self.channels.unary(
            master, MASTER_SERVICE, "Ping", master_pb2.PingRequest(), timeout_s=timeout_s, request_id=request_id
        )
        return int(answer.start_time_ns)

    def close(self) -> None:
        """Closes the channels; calls under way fail with CANCELLED. Idempotent."""
        self.channels.close()
