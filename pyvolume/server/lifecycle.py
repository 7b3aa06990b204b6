"""One server process from start to exit: builds the parts in order, reacts to signals, takes the parts down in order.

May import every module of server and below; nothing but cli imports it. Follows `weed/command/volume.go` and
`weed/util/grace` but for the departures P1 (a master is waited for ten seconds at most), P2 (stopping has a limit, a
second signal ends the process at once) and S1 to S3.

Threads: the main thread sleeps on the inbox of signals and does nothing else, so that a signal is always acted on. The
thread `start` builds the server, `stop` takes it down, `reload` serves SIGHUP; only one of them runs at a time, but for
a reload that a stop overtakes.

The parts are imported where they are built: flags and settings that forbid a start are told before the slow imports.
What serves requests is imported by the thread `imports` while masters are asked and volumes are loaded. For these, and
for the collector that rests meanwhile, see docs/decisions/0100-starts.md.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyvolume import faults, lockwatch, log
from pyvolume.config import ConfigFatal, ParsedFlags, ServerConfig, build_config, error_text, join_host_port
from pyvolume.errors import DirectoryInUse, PyvolumeError
from pyvolume.security_config import START_STATUS, DiskProbeConfig, SecurityConfig, SecurityError, SecurityLoader
from pyvolume.server.context import ServerContext
from pyvolume.server.signals import Inbox
from pyvolume.version import full_version

if TYPE_CHECKING:
    from pyvolume.server.grpc.service import GrpcServer
    from pyvolume.server.http_app import HttpServer
    from pyvolume.server.lane import FastLane
    from pyvolume.server.master_client import MasterClient, MasterConfiguration
    from pyvolume.server.metrics import ServerMetrics
    from pyvolume.server.profiling import FileProfiles
    from pyvolume.server.start_page import StartPage
    from pyvolume.server.tls import Tls
    from pyvolume.storage.store import Store

_log = logging.getLogger(__name__)

MASTER_WAIT_S = 10.0
"""How long a start waits for a master's configuration before it goes on without (departure P1)."""
SWITCH_INTERVAL_S = 0.0005
"""docs/decisions/0001-switch-interval.md."""
DISK_CHECK_INTERVAL_S = 60.0
MINUTES_PER_HOUR = 60
PROGRESS_INTERVAL_S = 5.0
LEAST_GRPC_GRACE_S = 1.0
LEAST_CLOSE_S = 4.0
"""Time for closing the volumes, when requests took all of -stopTimeout. What is not closed then is as after a crash."""
FORCED_STATUS = 1
"""Exit status when a second signal cuts the stop short."""
MAX_PORT = 65535
WILDCARDS = ("", "0.0.0.0", "::", "[::]")
"""Texts of -ip.bind that mean all addresses, of both families, as in Go."""


@dataclass(frozen=True)
class Note:
    """What a worker thread tells the main thread: `started`, or `stopped` with the exit status."""

    kind: str
    status: int = 0


def run(flags: ParsedFlags, inbox: Inbox, environ: Mapping[str, str] | None = None) -> int:
    """Serves until a signal says stop; returns the exit status. Main thread only. A FATAL ends the process from within.

    The handlers of `inbox` are installed already.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()  # until the ports serve: what a start makes stays
    if faults.active():
        _log.warning("failpoints are set, this is no server to keep data on: %s", ", ".join(faults.active()))
    process = Process(flags, inbox, dict(os.environ if environ is None else environ))
    _spawn("start", process.start, inbox)
    reload_pending = False
    while True:
        note = inbox.get()
        if isinstance(note, Note):
            if note.kind == "stopped":
                log.flush()
                return note.status
            gc.freeze()  # modules and the like are never looked at again: a full collection is a pause of all threads
            gc.enable()
            process.serving = True
            # Signals that came between binding the ports and now:
            if process.stop_begun:
                _spawn("stop", process.stop, inbox)
            elif reload_pending:
                process.request_reload()
        elif note == signal.SIGHUP:
            reload_pending = not process.serving
            if process.serving and not process.stop_begun:
                process.request_reload()
        elif isinstance(note, signal.Signals):
            if process.stop_begun:
                _log.warning("%s during the stop: leaving at once", note.name)
                log.exit_process(FORCED_STATUS)
            process.stop_begun = True
            if process.serving:
                _spawn("stop", process.stop, inbox)


def _spawn(name: str, work: Callable[[], Note | None], inbox: Inbox) -> None:
    """Runs `work` on a thread and puts what it returns into the inbox. An unexpected exception is FATAL."""

    def body() -> None:
        try:
            note = work()
        except Exception as exc:
            _log.exception("%s failed", name)
            log.fatal("%s failed: %s", name, exc)
        if note is not None:
            inbox.put(note)

    threading.Thread(target=body, name=name, daemon=True).start()


class Process:
    """The parts of the server and their order. start, stop and reload each run on a thread of their own."""

    def __init__(self, flags: ParsedFlags, inbox: Inbox, environ: Mapping[str, str]) -> None:
        self._flags = flags
        self._inbox = inbox
        self._environ = environ
        self.serving = False
        self.stop_begun = False
        self._quit = threading.Event()
        """Ends waiting threads (jobs, late configuration) at a stop."""
        self._reload_lock = threading.Lock()
        self._reload_wanted = False
        self._reload_running = False
        self._loader: SecurityLoader | None = None
        self._disk_probe = DiskProbeConfig()
        self._grpc: GrpcServer | None = None
        self._start_page: StartPage | None = None
        self._public: HttpServer | None = None
        self._admin: HttpServer | None = None
        self._lane: FastLane | None = None
        self._metrics: ServerMetrics | None = None
        self._profiles: FileProfiles | None = None
        self.context: ServerContext | None = None

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> Note | None:
        """Builds and starts everything; returns when the ports serve. Every refusal ends the process from within."""
        config = self._checked_config()
        security = self._checked_security(config)
        tls = self._checked_tls(security)
        if config.ip_detected:
            _log.info("detected volume server ip address: %s", config.ip)
        from pyvolume.server.heartbeat import Heartbeat
        from pyvolume.server.master_client import MasterClient
        from pyvolume.server.metrics import ServerMetrics

        self._metrics = metrics = ServerMetrics(config)
        self._start_observers(config, metrics)
        from pyvolume.server.rpc import Channels

        channels = Channels()
        if tls.grpc is not None:
            from pyvolume.server.grpc_tls import secure_channels

            channels = secure_channels(tls.grpc)
        master = MasterClient(config, channels=channels)
        self._open_start_page(config, tls)
        imports = _import_ahead(security)
        answer = self._ask_master(master)
        store = self._load_store(config, metrics, answer)
        awaiting = answer is None and bool(master.seeds)
        metrics.watch_store(store)
        context = ServerContext(
            config=config,
            security=security,
            store=store,
            master=master,
            tls=tls,
            events=metrics,
            awaiting_master=awaiting,
        )
        self.context = context
        context.heartbeat = Heartbeat(context, store, config)
        metrics.watch_heartbeat(context.heartbeat)
        if answer is not None:
            self._apply_master(answer)
        _warn_open_calls(config, security)
        imports.join()
        self._bind(context)
        self._inbox.defer()
        context.heartbeat.start()
        if context.awaiting_master:
            master.when_configured(self._apply_master, self._quit)
        assert self._grpc is not None and self._admin is not None
        self._grpc.start()
        self._start_lane(context, metrics)
        for server, name in ((self._public, "http-public"), (self._admin, "http-admin")):
            if server is not None:
                threading.Thread(target=server.run, name=name, daemon=True).start()
        metrics.watch_grpc(self._grpc)
        metrics.watch_http("admin", self._admin.server)
        metrics.watch_ops(self._admin.ops, self._admin.slots)
        if self._public is not None:
            metrics.watch_http("public", self._public.server)
        threading.Thread(target=metrics.history.run, args=(self._quit,), name="metrics-history", daemon=True).start()
        threading.Thread(target=self._periodic, name="periodic", daemon=True).start()
        from pyvolume.server.ec_peers import keep_journals

        threading.Thread(target=partial(keep_journals, context, self._quit), name="ec-journals", daemon=True).start()
        threading.Thread(target=metrics.sample_gil, args=(self._quit,), name="gil-sample", daemon=True).start()
        watchdog = lockwatch.Watchdog()
        metrics.watch_locks(watchdog)
        threading.Thread(target=watchdog.run, args=(self._quit,), name="lock-watch", daemon=True).start()
        notify_service_manager("READY=1\nSTATUS=serving", self._environ)
        return Note("started")

    def _start_lane(self, context: ServerContext, metrics: ServerMetrics) -> None:
        """Gives the plain listening sockets to the fast lane, if there is to be one. Without it the HTTP servers serve
        everything."""
        assert self._admin is not None
        if not context.config.fast_lane:
            return
        from pyvolume.server.lane import FastLane, LaneError, watch_lane

        try:
            lane = FastLane(context, self._admin, self._public)
        except LaneError as exc:
            _log.error("%s: all requests take the slow lane", exc)
            return
        try:
            lane.start()
        except LaneError as exc:
            log.fatal("%s", exc)  # the listening sockets are gone
        self._lane = lane
        watch_lane(metrics, lane)

    def _checked_config(self) -> ServerConfig:
        try:
            return build_config(self._flags)
        except ConfigFatal as exc:
            log.fatal("%s", exc)

    def _checked_security(self, config: ServerConfig) -> SecurityConfig:
        self._loader = SecurityLoader(config, self._environ)
        try:
            security = self._loader.load()
        except SecurityError as exc:
            log.exit_with(START_STATUS, "refusing to start: %s", exc)
        self._disk_probe = self._loader.load_disk_probe()
        return security

    def _start_observers(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        """Profiles and the listeners beside the service, which answer before any master does."""
        if config.debug:
            from pyvolume.server.side_http import SideServer, side_pages

            _log.info("Starting debug server for pprof at http://127.0.0.1:%d/debug/pprof/", config.debug_port)
            pages = side_pages(metrics.registry if config.metrics_port else None)
            reason = bind_refusal("127.0.0.1", config.debug_port)
            if reason is not None:
                _log.error("debug server failed: %s", reason)
            else:
                SideServer("127.0.0.1", config.debug_port, pages, "http-debug").start()
        if not config.pprof and (config.cpu_profile or config.mem_profile):
            from pyvolume.server.profiling import FileProfiles

            try:
                self._profiles = FileProfiles(config.cpu_profile, config.mem_profile)
            except OSError as exc:
                log.fatal("open %s: %s", exc.filename, error_text(exc))
        if config.metrics_port:
            from pyvolume.server.side_http import SideServer, side_pages

            refusal = bind_refusal(config.metrics_ip, config.metrics_port)
            if refusal is not None:
                log.fatal("%s", refusal)
            SideServer(config.metrics_ip, config.metrics_port, side_pages(metrics.registry), "http-metrics").start()

    @staticmethod
    def _checked_tls(security: SecurityConfig) -> Tls:
        """Reads all certificates. Departure S1: nothing that is configured for TLS is ever served in plain text."""
        from pyvolume.server.tls import Tls, grpc_cipher_suites

        try:
            tls = Tls(security.tls)
        except SecurityError as exc:
            log.exit_with(START_STATUS, "refusing to start: %s", exc)
        suites = grpc_cipher_suites(security.tls)
        if suites is not None:
            os.environ["GRPC_SSL_CIPHER_SUITES"] = suites  # the library has no other way, and is not loaded yet
        return tls

    def _open_start_page(self, config: ServerConfig, tls: Tls) -> None:
        """Has the admin port answer "not ready" from now on. If it cannot be bound, its turn to say so comes later."""
        from pyvolume.server.start_page import StartPage

        current = tls.https.current if tls.https is not None else None
        try:
            page = StartPage(config.bind_ip, config.port, tls=current, offset_bytes=config.offset_bytes)
        except (OSError, OverflowError):
            return
        page.start()
        self._start_page = page

    def _ask_master(self, master: MasterClient) -> MasterConfiguration | None:
        if not master.seeds:
            return None  # nobody to wait for; the heartbeat says so
        if self._start_page is not None:
            self._start_page.tell("asking the masters for their settings")
        answer = master.wait_for_configuration(MASTER_WAIT_S, self._quit)
        if answer is None:
            _log.warning("no master answered within %g seconds: going on, its settings follow later", MASTER_WAIT_S)
        return answer

    def _apply_master(self, answer: MasterConfiguration) -> None:
        """Takes over what a master told; once, at the start or whenever the first one answers."""
        if self.context is not None:
            self.context.awaiting_master = False
            if answer.storage_backends:
                self.context.store.add_backends(_backends_of(answer))
        if answer.metrics_address and answer.metrics_interval_s > 0:
            self._start_pushing(answer.metrics_address, answer.metrics_interval_s)

    def _start_pushing(self, address: str, interval_s: int) -> None:
        from pyvolume.server.side_http import Pusher

        assert self._metrics is not None and self.context is not None
        config = self.context.config
        _log.info("volumeServer server sends metrics to %s every %d seconds", address, interval_s)
        pusher = Pusher(self._metrics.registry, address, interval_s, join_host_port(config.ip, config.port))
        threading.Thread(target=pusher.run, args=(self._quit,), name="metrics-push", daemon=True).start()

    def _load_store(self, config: ServerConfig, metrics: ServerMetrics, answer: MasterConfiguration | None) -> Store:
        from pyvolume.storage.store import Store

        listeners: list[Callable[[int, int], None]] = [
            metrics.load_progress,
            Progress(tell=lambda text: notify_service_manager(f"STATUS={text}", self._environ)),
        ]
        if self._start_page is not None:
            self._start_page.tell("loading volumes")
            listeners.append(self._start_page.progress)

        def progress(done: int, total: int) -> None:
            for listener in listeners:
                listener(done, total)

        try:
            store = Store(config)
            store.watch_disks(self._disk_probe)
            if answer is not None:
                store.add_backends(_backends_of(answer))
            started = time.monotonic()
            store.load(progress)
        except DirectoryInUse as exc:
            log.exit_with(START_STATUS, "%s", exc)
        except PyvolumeError as exc:
            log.fatal("%s", exc)
        _log.info("loaded %d volumes in %.2f s", len(store.volumes()), time.monotonic() - started)
        return store

    def _bind(self, context: ServerContext) -> None:
        """Binds all ports before anything is announced, so that a busy one ends the start and nobody is misled."""
        from pyvolume.server import http_app

        config = context.config
        self._grpc = self._bind_grpc(context)
        version = full_version(config.offset_bytes)
        if config.has_public_listener:
            address = join_host_port(config.bind_ip, config.public_port)
            _log.info("Start Seaweed volume server %s public at %s", version, address)
            self._public = _bind_http(http_app.make_public_server, context, address, config.public_port)
        address = join_host_port(config.bind_ip, config.port)
        _log.info("Start Seaweed volume server %s at %s", version, address)
        if self._start_page is not None:
            self._admin = http_app.make_admin_server(context, self._start_page.take_listener())
        else:
            self._admin = _bind_http(http_app.make_admin_server, context, address, config.port)

    @staticmethod
    def _bind_grpc(context: ServerContext) -> GrpcServer:
        from pyvolume.server.grpc.service import make_grpc_server

        config = context.config
        credentials, interceptors = None, ()
        if context.tls is not None and context.tls.grpc is not None:
            from pyvolume.server.grpc_tls import name_checks, server_credentials

            credentials = server_credentials(context.tls.grpc)
            interceptors = name_checks(context.tls.settings)
        prefix = f"failed to listen on grpc port {config.grpc_port}"
        reason = bind_refusal(config.bind_ip, config.grpc_port)
        if reason is not None:
            log.fatal("%s: %s", prefix, reason)
        try:
            host = "" if config.bind_ip in WILDCARDS else config.bind_ip  # no host: IPv4 and IPv6 on one socket
            address = join_host_port(host, config.grpc_port)
            return make_grpc_server(context, address, credentials=credentials, interceptors=interceptors)
        except OSError as exc:
            log.fatal("%s", exc)

    # -- while serving --------------------------------------------------------------------------------------------

    def _periodic(self) -> None:
        """Each minute: free space of all disks, and what follows from it; needle maps on disk, hourly idle ones;
        volumes in remote stores."""
        assert self.context is not None
        minutes = 0
        while not self._quit.wait(DISK_CHECK_INTERVAL_S):
            minutes += 1
            try:
                self.context.store.check_free_space()
            except Exception:  # the top of this thread; the next minute tries again
                _log.exception("the check of free space failed")
            try:
                self.context.store.tend_maps(hour=minutes % MINUTES_PER_HOUR == 0)
            except Exception:  # as above
                _log.exception("tending the needle maps failed")
            try:
                self.context.store.tend_tiered()
            except Exception:  # as above
                _log.exception("tending the volumes in remote stores failed")

    def request_reload(self) -> None:
        """SIGHUP: reloads now, or once more when the reload that is running has ended."""
        with self._reload_lock:
            self._reload_wanted = True
            if self._reload_running:
                return
            self._reload_running = True
        _spawn("reload", self._reload_while_wanted, self._inbox)

    def _reload_while_wanted(self) -> None:
        while True:
            with self._reload_lock:
                if not self._reload_wanted or self._quit.is_set():
                    self._reload_running = False
                    return
                self._reload_wanted = False
            self._reload()

    def _reload(self) -> None:
        """New volumes, white list, signing keys, certificates. Problems are logged and leave things as they are."""
        context, loader = self.context, self._loader
        assert context is not None and loader is not None
        notify_service_manager("RELOADING=1", self._environ)
        _log.info(" Loading new volume ids ...")
        try:
            context.store.load_new_volumes()
        except Exception:  # a broken disk must not keep new keys from being taken
            _log.exception("loading new volumes failed")
        _log.info("Reload volume server...")
        try:
            security = loader.reload(context.security)
            _import_tokens(security)
            if self._lane is not None:
                self._lane.apply(security)  # before, so that nothing is served by what is over
            context.security = security
        except SecurityError as exc:
            _log.error("security settings stay as they were: %s", exc)
        except Exception:  # nothing that stands in a file may end a server that runs
            _log.exception("security settings stay as they were")
        if context.tls is not None:
            context.tls.look()
        notify_service_manager("READY=1", self._environ)

    # -- stop -----------------------------------------------------------------------------------------------------

    def stop(self) -> Note:
        """Takes everything down in order, within -preStopSeconds and -stopTimeout; returns the final note."""
        context = self.context
        assert context is not None and context.heartbeat is not None
        config = context.config
        _log.info("volume server has been killed")
        notify_service_manager("STOPPING=1", self._environ)
        pre_stop_until = time.monotonic()
        if context.heartbeat.alive:
            context.heartbeat.stop(goodbye=True)
            pre_stop_until = time.monotonic() + max(0, config.pre_stop_s)
            _log.info("Stopping volume server...")
            context.stopping.set()
            _guarded("flushing volumes", lambda: context.store.sync(pre_stop_until + config.stop_timeout_s))
            _log.info("stop send heartbeat and wait %d seconds until shutdown ...", config.pre_stop_s)
            faults.fault("stop.wait")
            time.sleep(max(0.0, pre_stop_until - time.monotonic()))
        context.stopping.set()
        deadline = pre_stop_until + config.stop_timeout_s
        self._stop_http(deadline)
        _log.info("graceful stop gRPC ...")
        if self._grpc is not None:
            grace = max(LEAST_GRPC_GRACE_S, deadline - time.monotonic())
            _guarded("stopping gRPC", lambda: self._grpc.stop(grace) if self._grpc else None)
        self._quit.set()
        _log.info("Shutting down volume server...")
        _within(max(LEAST_CLOSE_S, deadline - time.monotonic()), "closing volumes", context.store.close)
        _guarded("closing connections to masters", context.master.close)
        if self._profiles is not None:
            _guarded("writing profiles", self._profiles.finish)
        _log.info("Shut down successfully!")
        return Note("stopped")

    def _stop_http(self, deadline: float) -> None:
        """All listeners at once, so that the time limit is one for all."""
        threads = []
        if self._lane is not None:
            _guarded("stopping the fast lane", self._lane.quiesce)  # what it cannot finish goes to the two below
            work = _guarded_call("stopping the fast lane", self._lane.stop, max(0.0, deadline - time.monotonic()))
            threads.append(threading.Thread(target=work, name="stop-lane", daemon=True))
            threads[0].start()
        for server, text in (
            (self._public, "stop public http server ... "),
            (self._admin, "graceful stop cluster http server ... "),
        ):
            if server is None:
                continue
            _log.info(text)
            left = max(0.0, deadline - time.monotonic())
            work = _guarded_call("stopping an HTTP listener", server.stop, left)
            thread = threading.Thread(target=work, name="stop-http", daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()


class Progress:
    """Tells how far the loading of volumes is, in one line every few seconds. Called from the loading threads."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, tell: Callable[[str], None] = lambda _text: None
    ) -> None:
        self._clock = clock
        self._tell = tell
        self._lock = threading.Lock()
        self._next = clock() + PROGRESS_INTERVAL_S

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            now = self._clock()
            if now < self._next:
                return
            self._next = now + PROGRESS_INTERVAL_S
        _log.info("loading volumes: %d of %d", done, total)
        self._tell(f"loading volumes: {done} of {total}")


def _import_ahead(security: SecurityConfig) -> threading.Thread:
    """Imports on a thread what `_bind` and the first requests need; returns the thread, which must be joined before
    another one imports any of it. What fails here fails there again, and is told there."""
    import_module("pyvolume.storage.store")  # what the caller needs meanwhile

    def body() -> None:
        with contextlib.suppress(Exception):
            for name in ("http_app", "grpc.service", "lane"):
                import_module(f"pyvolume.server.{name}")
            _import_tokens(security)

    thread = threading.Thread(target=body, name="imports", daemon=True)
    thread.start()
    return thread


def _import_tokens(security: SecurityConfig) -> None:
    """So that the first request with a token does not have to."""
    if security.jwt_write_key or security.jwt_read_key:
        import_module("pyvolume.ops.tokens")


def _backends_of(answer: MasterConfiguration) -> list[tuple[str, str, dict[str, str]]]:
    return [(backend.type, backend.id, backend.properties) for backend in answer.storage_backends]


def _guarded(what: str, work: Callable[[], Any]) -> None:
    """A step of the stop: whatever goes wrong is logged and the stop goes on."""
    try:
        work()
    except Exception:
        _log.exception("%s failed", what)


def _within(seconds: float, what: str, work: Callable[[], Any]) -> None:
    """As _guarded, on a thread of its own that is left alone when the time is over."""
    thread = threading.Thread(target=_guarded, args=(what, work), name="stop-close", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _log.warning("%s takes longer than %.0f s: leaving without", what, seconds)


def _guarded_call(what: str, work: Callable[[float], Any], argument: float) -> Callable[[], None]:
    return lambda: _guarded(what, lambda: work(argument))


def _bind_http(
    make: Callable[[ServerContext], HttpServer], context: ServerContext, address: str, port: int
) -> HttpServer:
    prefix = "Volume server listener error:"
    reason = bind_refusal(context.config.bind_ip, port)
    if reason is not None:
        log.fatal("%s%s", prefix, reason)
    try:
        return make(context)
    except OSError as exc:
        log.fatal("%slisten tcp %s: bind: %s", prefix, address, error_text(exc))


def bind_refusal(host: str, port: int) -> str | None:
    """Why nobody could listen there, in Go's words; None if one can (or if only the name service could tell)."""
    if not 0 <= port <= MAX_PORT:
        return f"listen tcp: address {port}: invalid port"
    try:
        candidates = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        return f"listen tcp: lookup {host}: no such host"
    family, kind, protocol, _, target = candidates[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(target)
            probe.listen(1)
        except OSError as exc:
            return f"listen tcp {join_host_port(host, port)}: bind: {error_text(exc)}"
    return None


def _warn_open_calls(config: ServerConfig, security: SecurityConfig) -> None:
    """Departure S3: a white list alone, without mutual TLS, does not guard the calls that peers make."""
    if security.white_list and not config.guard_peers and not security.tls.uses_grpc_tls:
        from pyvolume.server.grpc.methods import RPCS

        open_calls = [rpc.name for rpc in RPCS.values() if rpc.changes and not rpc.guarded]
        _log.warning(
            "the white list does not cover calls that other volume servers make: %s are open to everyone who reaches "
            "port %d; -guardPeers closes them, every peer must be listed then",
            ", ".join(open_calls),
            config.grpc_port,
        )


def notify_service_manager(state: str, environ: Mapping[str, str]) -> None:
    """Tells systemd, if it asked to be told. Never raises: nothing depends on it."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return
    text = state
    if state == "RELOADING=1":
        text += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(1)
        sock.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
