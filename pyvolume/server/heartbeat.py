"""The heartbeat: tells a master what this server holds, and takes its orders (contract grpc.md 12).

Must not import http_app or the gRPC handlers. Upstream: `weed/server/volume_grpc_client_to_master.go`,
`weed/storage/store_volume_report.go`.

Threads: `heartbeat` owns the connection loop and builds every message; `heartbeat-recv` reads the responses of the
stream that is open; grpcio's own thread takes messages from the outbox. One condition, `_wake`, guards the flags, the
delta queue and the outbox; it is held for bookkeeping only, never while the store is asked or the network is used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from pyvolume import log as glog
from pyvolume.digest import report_hash
from pyvolume.pb import master_pb2
from pyvolume.server.address import http_address, same_server
from pyvolume.server.rpc import MASTER_SERVICE, RpcFailure, failure_from, open_stream

if TYPE_CHECKING:
    from pyvolume.config import ServerConfig
    from pyvolume.server.context import ServerContext
    from pyvolume.storage.store import Store

log = logging.getLogger(__name__)

PULSE_S = 5.0
EC_PULSES = 17
REDIRECT_PAUSE_S = 3.0
DUPLICATE_PAUSE_S = 2.0
MAX_DUPLICATE_RETRIES = 3
CONNECT_TIMEOUT_S = 20.0
GOODBYE_WAIT_S = 1.0
MAX_QUEUED_DELTAS = 1024
MAX_UNSENT_MESSAGES = 8

_DELTA_FIELDS = {
    "new": "new_volumes",
    "deleted": "deleted_volumes",
    "new-ec": "new_ec_shards",
    "deleted-ec": "deleted_ec_shards",
}
_EC_FIELDS = tuple(field.name for field in master_pb2.VolumeEcShardInformationMessage.DESCRIPTOR.fields)
_SHORT_FIELDS = ("id", "collection", "replica_placement", "version", "ttl", "disk_type", "disk_id")


def short_message(info: Any) -> Any:
    """The delta form of a volume."""
    return master_pb2.VolumeShortInformationMessage(**{name: getattr(info, name) for name in _SHORT_FIELDS})


def ec_message(info: Any) -> Any:
    """The message about the shards of one volume on one disk."""
    return master_pb2.VolumeEcShardInformationMessage(**{name: getattr(info, name) for name in _EC_FIELDS})


@dataclass(slots=True)
class _Told:
    """What the master was last told of one copy of a volume."""

    beat: int
    info: Any
    digest: int
    short: Any


class Turn(NamedTuple):
    """One report being made: what had been asked for when it began."""

    full: bool
    wishes: int


class VolumeReport:
    """Decides what a beat must carry: the whole list, or the volumes whose hash changed. Thread-safe.

    A stream starts with the whole list, because its master may know nothing. Lists of changes begin when the master
    says that it compares digests. A request for the whole list that comes while a beat is built is for the next one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepts_changes = False
        self._full_wanted = True
        self._wishes = 0
        self._beat = 0
        self._told: dict[tuple[int, int], _Told] = {}

    def reset(self) -> None:
        """For a new stream: forgets what was told."""
        with self._lock:
            self._accepts_changes = False
            self._full_wanted = True
            self._wishes += 1
            self._told = {}

    def accept_changes(self) -> None:
        """The master compares digests."""
        with self._lock:
            self._accepts_changes = True

    def request_full(self) -> None:
        """The next beat shall carry the whole list."""
        with self._lock:
            self._full_wanted = True
            self._wishes += 1

    def begin(self) -> Turn:
        """To be called before the volumes are looked at: a wish that comes later is about what this report misses."""
        with self._lock:
            return Turn(self._full_wanted or not self._accepts_changes, self._wishes)

    def build(self, infos: Iterable[Any], turn: Turn) -> tuple[list[Any], list[Any], int]:
        """(infos to send, short messages of what is gone, digest over all infos), noted as told."""
        full = turn.full
        digest, send = 0, []
        with self._lock:
            self._beat += 1
            beat = self._beat
            for info in infos:
                told = self._told.get((info.disk_id, info.id))
                value = told.digest if told is not None and told.info == info else report_hash(info)
                digest ^= value
                if full or told is None or told.digest != value:
                    send.append(info)
                    self._told[info.disk_id, info.id] = _Told(beat, info, value, short_message(info))
                else:
                    told.beat, told.info = beat, info
            if self._wishes == turn.wishes:
                self._full_wanted = False
            return send, self._departed(beat, full), digest

    def _departed(self, beat: int, full: bool) -> list[Any]:
        """Forgets copies that this beat did not see; names those of which no other copy is left. Lock held."""
        gone = [key for key, told in self._told.items() if told.beat != beat]
        if not gone:
            return []
        left = {vid for (_, vid), told in self._told.items() if told.beat == beat}
        messages = [self._told[key].short for key in gone if not full and key[1] not in left]
        for key in gone:
            del self._told[key]
        return messages


class _Disconnected(Exception):
    """The stream ended without a redirect; str() is for the log."""


class _DuplicateDirectories(_Disconnected):
    """The master knows a directory of ours from another server."""


class _Session:
    """One stream. Everything here is guarded by the heartbeat's condition."""

    def __init__(self, master: str) -> None:
        self.master = master
        self.unsent: deque[Any] = deque()
        self.closed = False
        self.ended = False
        self.redirect = ""
        self.error: Exception | None = None


def _exit(status: int, text: str) -> None:
    glog.exit_with(status, "%s", text)


class Heartbeat:
    """Keeps a master informed from start() until stop(). start() and stop() may be called once each, from any thread.

    Subscribes to the store's changes at construction; a change is queued without blocking, also while the store is
    locked. pulse_s and pauses are parameters for tests. on_fatal(status, text) ends the process when the master keeps
    saying that a directory of ours is served twice.
    """

    def __init__(
        self,
        server: ServerContext,
        store: Store,
        config: ServerConfig,
        *,
        pulse_s: float = PULSE_S,
        ec_pulses: int = EC_PULSES,
        redirect_pause_s: float = REDIRECT_PAUSE_S,
        duplicate_pause_s: float = DUPLICATE_PAUSE_S,
        on_fatal: Callable[[int, str], object] | None = None,
    ) -> None:
        self._master = server.master
        self._store = store
        self._config = config
        self._pulse_s = pulse_s
        self._ec_pulse_s = pulse_s * ec_pulses
        self._redirect_pause_s = redirect_pause_s
        self._duplicate_pause_s = duplicate_pause_s
        self._on_fatal = on_fatal if on_fatal is not None else _exit
        self._wake = threading.Condition()
        self._stopping = threading.Event()
        self._goodbye = True
        self._beat_wanted = False
        self._deltas: deque[tuple[str, Any]] = deque()
        self._deltas_lost = False
        self._report = VolumeReport()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._started = False
        self.disconnections: dict[str, int] = {}
        store.subscribe(self._on_change)

    # -- for others -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False from stop() on: the server has left its cluster."""
        return not self._stopping.is_set()

    @property
    def current_master(self) -> str:
        """The master of the open or last stream, `""` before the first one."""
        return self._master.current_master

    def start(self) -> None:
        """Starts the thread. Does not wait for a master."""
        self._started = True
        if self._master.seeds:
            self._master.first_try_begins()
        self._thread.start()

    def stop(self, goodbye: bool = True, wait_s: float = GOODBYE_WAIT_S + 1.0) -> None:
        """Ends heartbeats for good; idempotent. Changes of the store are dropped from here on.

        With goodbye the master is told first (departure V7: for a second at most until it has closed the stream).
        Blocks up to wait_s until the thread has ended.
        """
        with self._wake:
            if not self._stopping.is_set():
                self._stopping.set()
                self._goodbye = goodbye
                self._deltas.clear()
                self._wake.notify_all()
        if self._started and wait_s > 0 and threading.current_thread() is not self._thread:
            self._thread.join(wait_s)

    def pulse_now(self) -> None:
        """Has a volume beat sent at once if a stream is open."""
        with self._wake:
            self._beat_wanted = True
            self._wake.notify_all()

    def _on_change(self, kind: str, info: Any) -> None:
        """A volume came or went; runs on the thread that did it."""
        if kind not in _DELTA_FIELDS:
            raise ValueError(f"unknown kind of change {kind!r}")
        message = ec_message(info) if kind.endswith("-ec") else short_message(info)
        with self._wake:
            if self._stopping.is_set():
                return
            if len(self._deltas) >= MAX_QUEUED_DELTAS:
                # Upstream blocks here; a whole list in the next beat says the same without holding anybody up.
                self._deltas.clear()
                self._deltas_lost = True
            if not self._deltas_lost:
                self._deltas.append((kind, message))
            self._wake.notify_all()

    # -- connection loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        seeds = self._master.seeds
        log.info("Volume server start with seed master nodes: [%s]", " ".join(http_address(seed) for seed in seeds))
        redirect, duplicates = "", 0
        while seeds and not self._stopping.is_set():
            for seed in seeds:
                master = seed
                if redirect:
                    self._sleep(self._redirect_pause_s)  # the new leader may not have noticed yet that it is one
                    master = redirect
                if self._stopping.is_set():
                    break
                redirect, duplicates = self._try_master(master, duplicates)
        self._master.first_try_ends()
        if not seeds:
            log.warning("no masters given: this server is in no cluster")

    def _try_master(self, master: str, duplicates: int) -> tuple[str, int]:
        """One stream with its aftermath: (redirect, count of consecutive duplicate reports). Never raises."""
        try:
            return self._serve(master, duplicates), 0
        except _DuplicateDirectories as exc:
            log.info("heartbeat to %s error: %s", http_address(master), exc)
            self._master.first_try_ends()
            duplicates += 1
            self._sleep(self._duplicate_pause_s * 2 ** (duplicates - 1))
        except _Disconnected as exc:
            log.info("heartbeat to %s error: %s", http_address(master), exc)
            self._master.first_try_ends()
            duplicates = 0
            self._sleep(self._pulse_s)
        except Exception:  # the top of this thread: without it the server would silently leave its cluster
            log.exception("heartbeat to %s failed", http_address(master))
            self._master.first_try_ends()
            duplicates = 0
            self._sleep(self._pulse_s)
        self.disconnections[http_address(master)] = self.disconnections.get(http_address(master), 0) + 1
        return "", duplicates

    def _sleep(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _serve(self, master: str, duplicates: int) -> str:
        """Connects and beats until the stream ends: the leader to go to, or `""` after stop(). Raises _Disconnected."""
        try:
            channel = self._master.channels.dial(master)
        except RpcFailure as exc:
            raise _Disconnected(f"fail to dial {http_address(master)} : {exc}") from exc
        with channel:
            self._connect(channel)
            if self._stopping.is_set():
                return ""
            session = _Session(master)
            call = open_stream(channel, MASTER_SERVICE, "SendHeartbeat", self._outgoing(session))
            log.info("Heartbeat to: %s", http_address(master))
            self._master.set_current(master)
            receiver = threading.Thread(
                target=self._receive, args=(session, call, duplicates), name="heartbeat-recv", daemon=True
            )
            receiver.start()
            try:
                self._beat_until_end(session)
                if self._stopping.is_set():
                    self._say_goodbye(session)
            finally:
                with self._wake:
                    session.closed = True
                    self._wake.notify_all()
                call.cancel()
                receiver.join()
            if self._stopping.is_set():
                return ""
            if session.error is not None:
                raise session.error
            return session.redirect

    def _connect(self, channel: grpc.Channel) -> None:
        """Waits until the connection is up. Raises _Disconnected at the first failure, after a time-out, or at stop."""
        seen: list[grpc.ChannelConnectivity] = []
        bad = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

        def note(state: grpc.ChannelConnectivity) -> None:
            with self._wake:
                seen.append(state)
                self._wake.notify_all()

        def settled() -> bool:
            return self._stopping.is_set() or (bool(seen) and seen[-1] in (*bad, grpc.ChannelConnectivity.READY))

        channel.subscribe(note, try_to_connect=True)
        try:
            with self._wake:
                self._wake.wait_for(settled, CONNECT_TIMEOUT_S)
                state = seen[-1] if seen else None
        finally:
            channel.unsubscribe(note)
        if state is not grpc.ChannelConnectivity.READY and not self._stopping.is_set():
            raise _Disconnected("connection refused" if state in bad else "connection timed out")

    # -- sending --------------------------------------------------------------------------------------------------

    def _outgoing(self, session: _Session) -> Iterator[Any]:
        """What grpcio sends, in order; its end closes our half of the stream. Runs on a thread of grpcio."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: session.unsent or session.closed)
                if not session.unsent:
                    return
                message = session.unsent.popleft()
                self._wake.notify_all()
            yield message

    def _send(self, session: _Session, message: Any) -> None:
        with self._wake:
            session.unsent.append(message)
            self._wake.notify_all()

    def _beat_until_end(self, session: _Session) -> None:
        """The stream's work on this side, until it ends or stop() is called."""
        self._report.reset()
        with self._wake:
            self._beat_wanted = False
            self._deltas_lost = False
        self._send(session, self._volume_beat())
        self._send(session, self._ec_beat())
        now = time.monotonic()
        next_beat, next_ec_beat = now + self._pulse_s, now + self._ec_pulse_s
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopping.is_set() or session.ended or self._has_news(session),
                    max(0.0, min(next_beat, next_ec_beat) - time.monotonic()),
                )
                if self._stopping.is_set() or session.ended:
                    return
                if len(session.unsent) >= MAX_UNSENT_MESSAGES:  # the master does not read: say nothing until it does
                    self._wake.wait(self._pulse_s)
                    continue
                delta = self._take_deltas()
                if self._deltas_lost:
                    self._deltas_lost = False
                    self._beat_wanted = True
                    self._report.request_full()
                    next_ec_beat = 0.0
                beat_now = self._beat_wanted
                self._beat_wanted = False
            if delta is not None:
                self._send(session, delta)
            now = time.monotonic()
            if beat_now or now >= next_beat:
                if now >= next_beat:
                    next_beat = now + self._pulse_s
                    self._store.recompute_auto_max()
                self._send(session, self._volume_beat())
            if now >= next_ec_beat:
                next_ec_beat = now + self._ec_pulse_s
                self._send(session, self._ec_beat())

    def _has_news(self, session: _Session) -> bool:
        return len(session.unsent) < MAX_UNSENT_MESSAGES and bool(
            self._deltas or self._beat_wanted or self._deltas_lost
        )

    def _take_deltas(self) -> Any | None:
        """One message with the oldest queued changes that are of one kind; kinds are never mixed. Lock held."""
        if not self._deltas:
            return None
        kind = self._deltas[0][0]
        count = 0
        for queued, _ in self._deltas:
            if queued != kind:
                break
            count += 1
        messages = [message for _, message in islice(self._deltas, count)]
        for _ in range(count):
            self._deltas.popleft()
        word = "adds" if kind.startswith("new") else "deletes"
        what = "ec shards of volume" if kind.endswith("-ec") else "volume"
        for message in messages:
            log.info("volume server %s:%d %s %s %d", self._config.ip, self._config.port, word, what, message.id)
        return master_pb2.Heartbeat(**self._place(), **{_DELTA_FIELDS[kind]: messages})

    def _say_goodbye(self, session: _Session) -> None:
        """Tells the master that nothing is here any more, closes our half and waits for the master to close its own."""
        with self._wake:
            if not self._goodbye or session.ended:
                return
            session.unsent.clear()
            session.unsent.append(
                master_pb2.Heartbeat(**self._place(), public_url=self._config.public_url, has_no_volumes=True)
            )
            session.closed = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: session.ended, GOODBYE_WAIT_S)

    # -- messages -------------------------------------------------------------------------------------------------

    def _place(self) -> dict[str, Any]:
        config = self._config
        return {"ip": config.ip, "port": config.port, "data_center": config.data_center, "rack": config.rack}

    def _volume_beat(self) -> Any:
        """The periodic message: all volumes or the changed ones, slots, disks, digest."""
        store, config = self._store, self._config
        turn = self._report.begin()
        infos = store.heartbeat_volumes()
        expired = store.ec.remove_expired()
        send, gone, digest = self._report.build(infos, turn)
        beat = master_pb2.Heartbeat(
            **self._place(),
            grpc_port=config.grpc_port,
            public_url=config.public_url,
            id=config.server_id,
            max_file_key=store.max_file_key(),
            deleted_volumes=gone,
            has_no_volumes=turn.full and not send,
            has_no_ec_shards=not store.ec.volumes(),
            deleted_ec_shards=[ec_message(info) for info in expired],
            volume_digest=digest,
        )
        (beat.volumes if turn.full else beat.changed_volumes).extend(_volume_message(info) for info in send)
        for location in store.locations:
            kind, slots = location.disk_type, 0
            if not location.is_unavailable:
                slots = max(0, location.effective_max)
                usage = location.usage
                beat.max_volume_counts[kind] += slots
                beat.disk_total_bytes[kind] += usage.all_bytes
                beat.disk_free_bytes[kind] += usage.free_bytes
            beat.location_uuids.append(location.uuid)
            beat.disk_tags.add(disk_id=location.disk_id, tags=location.tags, type=kind, max_volume_count=slots)
        return beat

    def _ec_beat(self) -> Any:
        """The message about erasure coded volumes: it says nothing else, not even who sends it."""
        shards = [ec_message(volume.info()) for volume in self._store.ec.volumes()]
        return master_pb2.Heartbeat(ec_shards=shards, has_no_ec_shards=not shards)

    # -- receiving ------------------------------------------------------------------------------------------------

    def _receive(self, session: _Session, call: Any, duplicates: int) -> None:
        """Reads responses until the stream ends or leads elsewhere."""
        error: Exception | None = None
        redirect = ""
        try:
            for response in call:
                redirect = self._react(session, response, duplicates)
                if redirect:
                    break
            else:
                error = _Disconnected("EOF")
        except _Disconnected as exc:
            error = exc
        except grpc.RpcError as exc:
            error = _Disconnected(str(failure_from(exc)))
        except Exception as exc:
            log.exception("response of master %s", http_address(session.master))
            error = _Disconnected(f"response: {exc}")
        with self._wake:
            session.error, session.redirect, session.ended = error, redirect, True
            self._wake.notify_all()

    def _react(self, session: _Session, response: Any, duplicates: int) -> str:
        """Obeys one response; the address of another leader if it names one. Raises _DuplicateDirectories."""
        if response.duplicated_uuids:
            self._on_duplicates(list(response.duplicated_uuids), duplicates)
        store = self._store
        changed = store.preallocate != response.preallocate
        store.preallocate = response.preallocate
        if response.volume_size_limit and store.volume_size_limit != response.volume_size_limit:
            store.volume_size_limit = response.volume_size_limit
            changed = True
        if changed and store.recompute_auto_max():
            self.pulse_now()
        if response.volume_digest_supported:
            self._report.accept_changes()
        if response.resend_full_volume_list:
            log.info("master %s asked for the full volume list", http_address(session.master))
            self._report.request_full()
        if response.leader and not same_server(response.leader, session.master):
            log.info("Volume Server found a new master newLeader: %s instead of %s", response.leader, session.master)
            return str(response.leader)
        return ""

    def _on_duplicates(self, uuids: list[str], duplicates: int) -> None:
        names = [location.directory for location in self._store.locations if location.uuid in uuids]
        shown = f"[{' '.join(names)}]"
        if duplicates >= MAX_DUPLICATE_RETRIES:
            text = (
                f"Shut down Volume Server due to persistent duplicate volume directories after {MAX_DUPLICATE_RETRIES} "
                f"retries: {shown}. Please check if another volume server is using the same directory"
            )
            self._on_fatal(1, text)
        log.error(
            "Master reported duplicate volume directories: %s (retry %d/%d)",
            shown,
            duplicates + 1,
            MAX_DUPLICATE_RETRIES,
        )
        raise _DuplicateDirectories(
            f"duplicate UUIDs detected, retrying connection (attempt {duplicates + 1}/{MAX_DUPLICATE_RETRIES})"
        )


_VOLUME_FIELDS = tuple(field.name for field in master_pb2.VolumeInformationMessage.DESCRIPTOR.fields)


def _volume_message(info: Any) -> Any:
    return master_pb2.VolumeInformationMessage(**{name: getattr(info, name) for name in _VOLUME_FIELDS})
