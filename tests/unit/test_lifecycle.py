"""A server process from start to exit: order, signals, exit codes (contract operations.md 6; P1, P2, P4, S3)."""

from __future__ import annotations

import gc
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyvolume.config import ServerConfig
from pyvolume.security_config import SecurityConfig
from pyvolume.server import lifecycle
from pyvolume.server.signals import Inbox
from tools.ports import free_port

HOST = "127.0.0.1"
START_LIMIT_S = 60.0


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = START_LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 5).close()
    except OSError:
        return False
    return True


class Server:
    """A pyvolume process in a directory of its own, in no cluster unless told otherwise."""

    def __init__(self, base: Path, *flags: str, data: Path | None = None, **environ: str) -> None:
        self.base = base
        self.port, self.grpc_port = free_port(), free_port()
        self.data = data or base / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.log_path = base / f"log.{self.port}"
        words = [f"-ip={HOST}", f"-port={self.port}", f"-port.grpc={self.grpc_port}", f"-dir={self.data}"]
        words += ["-master=", "-preStopSeconds=0", "-logtostderr", *flags]
        with self.log_path.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pyvolume", *words],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=base,
                env={**os.environ, "HOME": str(base), **environ},
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def lines(self) -> list[str]:
        """Messages without their heads."""
        return [line.split(" ", 3)[3] for line in self.log.splitlines() if re.match(r"[IWEF]\d{4} ", line)]

    def logged(self, text: str) -> bool:
        return text in self.log

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def up(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return self.request("GET", "/healthz")[0] == 200
        except OSError:
            return False

    def started(self) -> Server:
        wait_for(self.up, "serving")
        return self

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_status(self, limit_s: float = 20.0) -> int:
        return self.process.wait(limit_s)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str, **options: object) -> Server:
        servers.append(Server(tmp_path, *flags, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.end()


Make = Callable[..., Server]


# --- start -----------------------------------------------------------------------------------------------------------


def test_start_and_stop_in_order(make: Make) -> None:
    server = make().started()
    assert server.request("GET", "/status")[0] == 200
    with socket.create_connection((HOST, server.grpc_port), 5):
        pass
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0
    lines = server.lines()
    expected = [
        re.compile(rf"Folder {re.escape(str(server.data))} Permission: -rwx"),
        re.compile(r"loaded 0 volumes in "),
        re.compile(rf"Start Seaweed volume server 30GB 4\.44  at {HOST}:{server.port}$"),
        re.compile(r"volume server has been killed$"),
        re.compile(r"Stopping volume server\.\.\.$"),
        re.compile(r"stop send heartbeat and wait 0 seconds until shutdown \.\.\.$"),
        re.compile(r"graceful stop cluster http server \.\.\. $"),
        re.compile(r"graceful stop gRPC \.\.\.$"),
        re.compile(r"Shutting down volume server\.\.\.$"),
        re.compile(r"Shut down successfully!$"),
    ]
    at = 0
    for pattern in expected:
        found = next((i for i, line in enumerate(lines[at:], at) if pattern.match(line)), None)
        assert found is not None, f"{pattern.pattern!r} after line {at} of\n" + "\n".join(lines)
        at = found + 1
    assert at == len(lines), "nothing is logged after the end"


def test_only_the_identity_appears_in_an_empty_directory(make: Make) -> None:
    server = make().started()
    assert [p.name for p in server.data.iterdir()] == ["vol_dir.uuid"]
    server.send(signal.SIGINT)
    assert server.exit_status() == 0
    assert [p.name for p in server.data.iterdir()] == ["vol_dir.uuid"]


def test_public_listener_is_a_second_port(make: Make) -> None:
    port = free_port()
    server = make(f"-port.public={port}").started()
    assert server.logged(f"Start Seaweed volume server 30GB 4.44  public at {HOST}:{port}")
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 400
    connection.close()
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0
    assert server.logged("stop public http server ... ")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_wildcard_address_is_of_both_families(make: Make) -> None:
    server = make("-ip.bind=0.0.0.0").started()
    assert server.logged(f"Start Seaweed volume server 30GB 4.44  at 0.0.0.0:{server.port}")
    for host in (HOST, "::1"):
        for port in (server.port, server.grpc_port):
            socket.create_connection((host, port), 5).close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("ip", ["::1", "[::1]"])
def test_ipv6_address(make: Make, ip: str) -> None:
    server = make(f"-ip={ip}")
    for port in (server.port, server.grpc_port):
        wait_for(lambda port=port: connects("::1", port), f"port {port}")  # type: ignore[misc]
    assert server.logged(f"Start Seaweed volume server 30GB 4.44  at [::1]:{server.port}")
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0


@pytest.mark.parametrize("which", ["port", "port.grpc", "port.public"])
def test_busy_port_is_fatal(make: Make, which: str) -> None:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen(1)
        port = sock.getsockname()[1]
        server = make(f"-{which}={port}")
        assert server.exit_status(START_LIMIT_S) == 255
    reason = f"listen tcp {HOST}:{port}: bind: address already in use"
    head = f"failed to listen on grpc port {port}: " if which == "port.grpc" else "Volume server listener error:"
    fatal = [line for line in server.log.splitlines() if line.startswith("F")]
    assert [line.split(" ", 3)[3] for line in fatal] == [head + reason]


def test_impossible_grpc_port_is_fatal(make: Make) -> None:
    server = make("-port.grpc=70000")
    assert server.exit_status(START_LIMIT_S) == 255
    assert server.lines()[-1] == "failed to listen on grpc port 70000: listen tcp: address 70000: invalid port"


def test_start_without_a_master(make: Make) -> None:
    """Departure P1. The wait is ten seconds long, so this test is, too."""
    server = make(f"-master={HOST}:{free_port()}")
    began = time.monotonic()
    server.started()
    assert time.monotonic() - began >= lifecycle.MASTER_WAIT_S
    assert server.logged("no master answered within 10 seconds: going on")
    assert server.request("GET", "/healthz") == (200, b"no master has answered yet\n")
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0


def test_signal_while_a_master_is_waited_for_exits_0_at_once(make: Make) -> None:
    server = make(f"-master={HOST}:{free_port()}")
    wait_for(lambda: server.logged("checkWithMaster"), "asking the master")
    server.send(signal.SIGHUP)
    server.send(signal.SIGTERM)
    assert server.exit_status(3) == 0
    assert not server.logged("Start Seaweed")


def test_signals_close_together_are_all_acted_on() -> None:
    """The second one often reaches another thread than the main one, which must be woken all the same."""
    code = (
        "import os, signal, threading, time\n"
        "from pyvolume.server.signals import Inbox\n"
        "inbox = Inbox(); inbox.install(); inbox.defer()\n"
        "for _ in range(8): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "seen = set()\n"
        "while len(seen) < 3: seen.add(inbox.get())\n"
        "os._exit(0)\n"
    )
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(0.01)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
        try:
            assert child.wait(5) == 0
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def test_late_answer_of_a_master_ends_the_waiting() -> None:
    process = lifecycle.Process(SimpleNamespace(values={}), Inbox(), {})  # type: ignore[arg-type]
    process.context = SimpleNamespace(awaiting_master=True)  # type: ignore[assignment]
    process._apply_master(SimpleNamespace(storage_backends=(), metrics_address="", metrics_interval_s=0))  # type: ignore[arg-type]
    assert process.context.awaiting_master is False


def test_second_server_on_a_directory_is_refused(make: Make, tmp_path: Path) -> None:
    first = make().started()
    second = make(data=first.data)
    assert second.exit_status(START_LIMIT_S) == 1
    fatal = [line for line in second.log.splitlines() if line.startswith("F")]
    assert len(fatal) == 1
    assert str(first.data) in fatal[0] and str(first.process.pid) in fatal[0]
    assert first.up()


def test_open_calls_are_named_when_a_white_list_is_set(make: Make) -> None:
    server = make("-whiteList=127.0.0.1").started()
    warning = next(line for line in server.lines() if "the white list does not cover" in line)
    assert all(name in warning for name in ("ReceiveFile", "WriteNeedleBlob", "VolumeEcShardsMount", "-guardPeers"))
    guarded = make("-whiteList=127.0.0.1", "-guardPeers", data=server.base / "other").started()
    assert not guarded.logged("the white list does not cover")


def test_failpoints_are_announced(make: Make) -> None:
    assert make(PYVOLUME_FAILPOINTS="nothing.here=count").started().logged("failpoints are set")


def test_service_manager_is_told(make: Make, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(START_LIMIT_S)
        server = make(NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert inbox.recv(100) == b"READY=1\nSTATUS=serving"
        server.started().send(signal.SIGHUP)
        assert inbox.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert inbox.recv(100) == b"READY=1"
        server.send(signal.SIGTERM)
        assert inbox.recv(100) == b"STOPPING=1"
        assert server.exit_status() == 0


def test_healthz_says_how_far_the_loading_is(make: Make, tmp_path: Path) -> None:
    from storage_util import create

    data = tmp_path / "data"
    data.mkdir()
    for vid in range(1, 4):
        create(data, vid).close()
    server = make(PYVOLUME_FAILPOINTS="load.volume=sleep:1500@3")

    def says(text: bytes) -> bool:
        try:
            status, body = server.request("GET", "/healthz")
        except OSError:
            return False
        assert status in (200, 503)
        return status == 503 and body == text

    wait_for(lambda: says(b"loading volumes: 2 of 3\n"), "the progress")
    assert server.request("PUT", "/1,01637037d6", b"x")[0] == 503
    with socket.create_connection((HOST, server.port)) as silent:
        silent.settimeout(START_LIMIT_S)
        server.started()  # the port is never closed in between, or `up` would have seen it
        assert silent.recv(1) == b"", "connections that have asked nothing are not told later that it is starting"
    assert server.request("GET", "/healthz") == (200, b"")
    assert server.request("PUT", "/1,01637037d6", b"x")[0] == 201


def test_signal_while_loading_exits_0_at_once(make: Make, tmp_path: Path) -> None:
    from storage_util import create

    data = tmp_path / "data"
    data.mkdir()
    create(data, 1).close()
    server = make(PYVOLUME_FAILPOINTS="load.volume=sleep:60000")
    wait_for(lambda: connects(HOST, server.port), "the start page")
    server.send(signal.SIGTERM)
    assert server.exit_status(5) == 0


# --- stop ------------------------------------------------------------------------------------------------------------


def test_everything_is_served_before_the_stop(make: Make) -> None:
    server = make("-preStopSeconds=2").started()
    server.send(signal.SIGTERM)
    wait_for(lambda: server.logged("wait 2 seconds until shutdown"), "the stop")
    began = time.monotonic()
    assert server.request("GET", "/healthz")[0] == 503
    assert server.request("GET", "/status")[0] == 200
    with socket.create_connection((HOST, server.grpc_port), 5):
        pass
    assert server.exit_status() == 0
    assert 1.0 < time.monotonic() - began < 10.0


def test_second_signal_leaves_at_once(make: Make) -> None:
    server = make("-preStopSeconds=60").started()
    server.send(signal.SIGTERM)
    wait_for(lambda: server.logged("wait 60 seconds"), "the stop")
    server.send(signal.SIGHUP)
    server.send(signal.SIGINT)
    assert server.exit_status(5) == lifecycle.FORCED_STATUS
    assert server.logged("SIGINT during the stop: leaving at once")
    assert not server.logged("Reload volume server")


def test_silent_connections_do_not_delay_the_stop(make: Make) -> None:
    server = make().started()
    with socket.create_connection((HOST, server.port)), socket.create_connection((HOST, server.grpc_port)):
        began = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.exit_status() == 0
    assert time.monotonic() - began < 10.0


def test_a_thousand_idle_connections_do_not_delay_the_stop(make: Make) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    server = make().started()
    sockets: list[socket.socket] = []
    try:
        ask = f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        for number in range(1000):
            sock = socket.create_connection((HOST, server.port), 10)
            sockets.append(sock)
            if number % 2:  # half of them have been served before
                sock.sendall(ask)
        for sock in sockets[1::2]:
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        server.send(signal.SIGTERM)
        for sock in sockets:
            sock.settimeout(20)
            assert sock.recv(4096) == b""
        assert server.exit_status() == 0
    finally:
        for sock in sockets:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not server.logged("cut"), "closed in order, not by the time limit"
    begun, ended = (
        next(line for line in server.log.splitlines() if text in line) for text in ("killed", "successfully")
    )
    seconds = [
        sum(float(part) * 60**i for i, part in enumerate(reversed(line.split()[1].split(":"))))
        for line in (begun, ended)
    ]
    print(f"stop with 1,000 idle connections: {seconds[1] - seconds[0]:.3f} s")


def test_a_flush_that_hangs_does_not_hold_the_stop(make: Make, tmp_path: Path) -> None:
    from storage_util import create

    data = tmp_path / "data"
    data.mkdir()
    for vid in (1, 2, 3):
        create(data, vid).close()
    server = make("-stopTimeout=1s", PYVOLUME_FAILPOINTS="volume.sync=sleep:60000@2").started()
    server.send(signal.SIGTERM)
    assert server.exit_status(20) == 0
    assert server.logged("flushing volumes: 1 of 3 are not done in time, going on")


def test_stop_is_limited_in_time(make: Make) -> None:
    server = make("-stopTimeout=1s").started()
    with socket.create_connection((HOST, server.port)) as client:
        client.sendall(b"PUT /1,01637037d6 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
        time.sleep(0.2)
        began = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.exit_status() == 0
    assert 0.9 < time.monotonic() - began < 10.0


def test_sigquit_shows_stacks_and_exits_2(make: Make) -> None:
    server = make().started()
    server.send(signal.SIGQUIT)
    assert server.exit_status() == 2
    assert server.logged("most recent call first")


def test_sigusr1_shows_stacks_by_name_and_goes_on(make: Make) -> None:
    server = make().started()
    idle_workers = re.compile(r'thread "\S+" and \d+ more:')

    def all_shown() -> bool:  # a signal that comes before the last thread has started shows one less: ask again
        server.send(signal.SIGUSR1)
        named = all(server.logged(f'thread "{name}":') for name in ("MainThread", "periodic", "http-admin"))
        return named and idle_workers.search(server.log) is not None

    wait_for(all_shown, "stacks by name, idle workers listed once")
    assert server.up()


def test_sigalrm_stops_in_order(make: Make) -> None:
    server = make().started()
    server.send(signal.SIGALRM)
    assert server.exit_status() == 0
    assert server.logged("Shut down successfully!")


# --- reload ----------------------------------------------------------------------------------------------------------


def upload_status(server: Server) -> int:
    return server.request("PUT", "/77,01637037d6", b"x")[0]


def test_reload_takes_the_white_list_and_keys(make: Make) -> None:
    server = make().started()
    security = server.base / "security.toml"
    assert upload_status(server) != 401
    security.write_text('[guard]\nwhite_list = "10.9.9.9"\n')
    server.send(signal.SIGHUP)
    wait_for(lambda: upload_status(server) == 401, "the new white list")
    assert server.logged(" Loading new volume ids ...") and server.logged("Reload volume server...")
    security.write_text('[guard]\nwhite_list = "nonsense"\n')
    server.send(signal.SIGHUP)
    wait_for(lambda: server.logged("security settings stay as they were"), "the refusal")
    assert upload_status(server) == 401
    security.write_text('[guard]\nwhite_list = "127.0.0.0/8"\n[jwt.signing]\nkey = "k"\n')
    server.send(signal.SIGHUP)
    wait_for(lambda: b"wrong jwt" in server.request("PUT", "/77,01637037d6", b"x")[1], "the new key")


def test_a_number_in_a_file_ended_the_running_server(make: Make) -> None:
    server = make().started()
    security = server.base / "security.toml"
    security.write_text("[jwt.signing]\nexpires_after_seconds = inf\n")
    server.send(signal.SIGHUP)
    wait_for(lambda: server.logged("Reload volume server..."), "the reload")
    security.write_text("[jwt.signing]\nkey = 0x" + "f" * 5000 + "\n")
    server.send(signal.SIGHUP)
    wait_for(lambda: server.logged("is not within 64 bits"), "the refusal")
    assert server.up()


def test_an_accident_in_a_reload_leaves_settings_and_server_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_current: object) -> object:
        raise RuntimeError("an accident")

    process = lifecycle.Process(cast("Any", None), Inbox(), {})
    process.context = cast(
        "Any", SimpleNamespace(store=SimpleNamespace(load_new_volumes=int), security="as it was", tls=None)
    )
    process._loader = cast("Any", SimpleNamespace(reload=fail))
    process._reload()
    assert process.context is not None and str(process.context.security) == "as it was"
    assert "security settings stay as they were" in caplog.messages


def test_a_reload_that_brings_a_key_imports_what_tokens_need(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(lifecycle, "import_module", imported.append)
    process = lifecycle.Process(cast("Any", None), Inbox(), {})
    process.context = cast(
        "Any", SimpleNamespace(store=SimpleNamespace(load_new_volumes=int), security=SecurityConfig(), tls=None)
    )
    for security, expected in (
        (SecurityConfig(), []),
        (SecurityConfig(jwt_read_key=b"k"), ["pyvolume.ops.tokens"]),
        (SecurityConfig(jwt_write_key=b"k"), ["pyvolume.ops.tokens"]),
    ):
        imported.clear()
        process._loader = cast("Any", SimpleNamespace(reload=lambda _current, new=security: new))
        process._reload()
        assert process.context is not None and process.context.security is security
        assert imported == expected


def test_many_reloads_do_not_pile_up(make: Make) -> None:
    server = make().started()
    for _ in range(50):
        server.send(signal.SIGHUP)
    wait_for(lambda: server.logged("Reload volume server..."), "a reload")
    server.send(signal.SIGTERM)
    assert server.exit_status() == 0
    assert server.log.count("Reload volume server...") <= 50


class Scripted:
    """Stands in for Process: notes what the main thread asks for."""

    def __init__(self, inbox: Inbox, early: signal.Signals) -> None:
        self.serving = self.stop_begun = False
        self.asked: list[str] = []
        self._inbox = inbox
        self._early = early

    def start(self) -> lifecycle.Note:
        self.asked.append(f"start, collector {'on' if gc.isenabled() else 'off'}")
        self._inbox.put(self._early)
        return lifecycle.Note("started")

    def request_reload(self) -> None:
        self.asked.append("reload")
        self._inbox.put(signal.SIGTERM)

    def stop(self) -> lifecycle.Note:
        self.asked.append("stop")
        return lifecycle.Note("stopped")


@pytest.mark.parametrize(
    ("early", "asked"), [(signal.SIGHUP, ["reload", "stop"]), (signal.SIGTERM, ["stop"]), (signal.SIGALRM, ["stop"])]
)
def test_signals_between_binding_and_serving_are_kept(
    monkeypatch: pytest.MonkeyPatch, early: signal.Signals, asked: list[str]
) -> None:
    inbox = Inbox()
    process = Scripted(inbox, early)
    monkeypatch.setattr(lifecycle, "Process", lambda *_arguments: process)
    monkeypatch.setattr(lifecycle, "SWITCH_INTERVAL_S", sys.getswitchinterval())
    assert lifecycle.run(SimpleNamespace(), inbox, {}) == 0  # type: ignore[arg-type]
    assert process.asked == ["start, collector off", *asked]
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


ORDINARY = """
import sys
from pyvolume import cli
from pyvolume.security_config import SecurityConfig
from pyvolume.server import heartbeat, lifecycle, master_client, metrics, rpc, start_page, tls

lifecycle._import_ahead(SecurityConfig(jwt_read_key=sys.argv[1].encode())).join()
assert {"pyvolume.server.http_app", "pyvolume.server.grpc.service", "pyvolume.server.lane"} <= sys.modules.keys()
print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2].split())))
"""
SELDOM = "PIL argparse azure boto3 cryptography jwt minio prometheus_client requests rocksdict tqdm urllib3"


@pytest.mark.parametrize(("key", "loaded"), [("", ""), ("k", "cryptography jwt")])
def test_an_ordinary_start_imports_nothing_that_is_seldom_needed(key: str, loaded: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY, key, SELDOM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == (loaded, 0), done.stderr


FIRST_USES = """
import base64, hashlib, hmac, io, sys, threading
from pyvolume.ops.auth import token_allows

def enc(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=")

signed = enc(b'{"alg":"HS256"}') + b"." + enc(b'{"fid":"3,01637037d6"}')
token = (signed + b"." + enc(hmac.new(b"k", signed, hashlib.sha256).digest())).decode()
jpeg = b"no picture"
gate = threading.Barrier(16)
right = []

def first():
    gate.wait()
    allowed = token_allows(b"k", token, "3", "01637037d6")
    from pyvolume.ops import images

    right.append(allowed and images.upright(jpeg) is jpeg)

assert not {"jwt", "PIL"} & sys.modules.keys()
threads = [threading.Thread(target=first) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert right == [True] * 16, right
"""


def test_first_uses_of_what_is_imported_late_may_come_together() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_why_nobody_could_listen() -> None:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen(1)
        port = sock.getsockname()[1]
        assert lifecycle.bind_refusal(HOST, port) == f"listen tcp {HOST}:{port}: bind: address already in use"
    assert lifecycle.bind_refusal(HOST, port) is None
    assert lifecycle.bind_refusal(HOST, 65536) == "listen tcp: address 65536: invalid port"
    assert lifecycle.bind_refusal(HOST, -1) == "listen tcp: address -1: invalid port"
    assert lifecycle.bind_refusal("192.0.2.77", 0) == "listen tcp 192.0.2.77:0: bind: cannot assign requested address"
    refusal = lifecycle.bind_refusal("no-such-host.invalid", 0)
    assert refusal == "listen tcp: lookup no-such-host.invalid: no such host"


def test_progress_is_told_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    told: list[str] = []
    progress = lifecycle.Progress(clock=lambda: now[0], tell=told.append)
    with caplog.at_level("INFO", "pyvolume"):
        for done in range(20):
            now[0] = float(done)
            progress(done, 20)
    assert caplog.messages == told == [f"loading volumes: {done} of 20" for done in (5, 10, 15)]


def test_a_close_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    never, done = threading.Event(), threading.Event()
    with caplog.at_level("WARNING", "pyvolume"):
        lifecycle._within(0.05, "closing volumes", never.wait)
        lifecycle._within(60, "closing connections", done.set)
    never.set()
    assert done.is_set()
    assert caplog.messages == ["closing volumes takes longer than 0 s: leaving without"]


@pytest.mark.parametrize("address", ["", "relative", "/nonexistent/socket", "@abstract-nobody"])
def test_service_manager_that_is_not_there_does_no_harm(address: str) -> None:
    lifecycle.notify_service_manager("READY=1", {"NOTIFY_SOCKET": address})


def test_warning_of_open_calls_needs_a_white_list(caplog: pytest.LogCaptureFixture) -> None:
    lifecycle._warn_open_calls(ServerConfig(), SimpleNamespace(white_list=()))  # type: ignore[arg-type]
    assert not caplog.messages
