"""The test bed: a development master and the server under test, each a process of its own on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from pyvolume.pb import volume_server_pb2 as pb
from tools.ports import free_ports

HOST = "127.0.0.1"
START_LIMIT_S = 60.0
CALL_LIMIT_S = 15.0


class BedError(Exception):
    """The test bed itself failed."""


class ServerFailed(BedError):
    """The server under test did not start: a difference, not a failure of the bed."""


def unary_call(channel: grpc.Channel, method: str, **fields: object) -> Any:
    """Calls a unary method of the volume server by its name."""
    request, response = getattr(pb, f"{method}Request"), getattr(pb, f"{method}Response")
    path = f"/volume_server_pb.VolumeServer/{method}"
    call = channel.unary_unary(
        path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )
    return call(request(**fields), timeout=CALL_LIMIT_S)


class Process:
    """A child with its output in a file."""

    def __init__(self, argv: Sequence[str], cwd: Path, log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self.child = subprocess.Popen(
                list(argv), cwd=cwd, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env
            )

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def stop(self, sig: int = signal.SIGINT, grace_s: float = 20.0) -> int:
        if self.alive:
            self.child.send_signal(sig)
            try:
                self.child.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait(10)
        return self.child.returncode

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as r:
            return bool(r.status < 500)
    except urllib.error.HTTPError as e:
        return e.code < 500
    except OSError:
        return False


def _connects(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], limit_s: float, process: Process | None = None) -> bool:
    """Polls until the condition holds; false when time is up or the process has ended."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        if process is not None and not process.alive:
            return False
        time.sleep(0.05)
    return False


class Bed:
    """A context: master, data directory, server. Files live under `base`."""

    def __init__(
        self,
        base: Path,
        *,
        command: str,
        flags: Sequence[str] = (),
        security_toml: str = "",
        public_port: bool = False,
        size_limit_mb: int = 32,
        data_dir: Path | None = None,
    ) -> None:
        self.base = base
        self.command = command
        self.flags = list(flags)
        self.config_dir = base / "config"
        self.data_dir = data_dir or base / "volume"
        for d in (self.config_dir, self.data_dir):
            d.mkdir(parents=True, exist_ok=True)
        (self.config_dir / "security.toml").write_text(security_toml or "# nothing configured\n")
        self.master_port, self.master_grpc_port, self.port, self.grpc_port, public = free_ports(5)
        self.public_port = public if public_port else self.port
        self.size_limit_mb = size_limit_mb
        self.master: Process | None = None
        self.server: Process | None = None
        self.channel: grpc.Channel | None = None

    def __enter__(self) -> Bed:
        try:
            self.start_master()
            self.start_server()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start_master(self) -> None:
        argv = [sys.executable, "-m", "pyvolume.devmaster", f"-ip={HOST}", f"-port={self.master_port}"]
        argv += [f"-port.grpc={self.master_grpc_port}", f"-volumeSizeLimitMB={self.size_limit_mb}"]
        self.master = Process(argv, self.config_dir, self.base / "master.log")
        url = f"http://{HOST}:{self.master_port}/dir/status"
        if not wait_for(lambda: _answers(url) and _connects(self.master_grpc_port), START_LIMIT_S, self.master):
            raise BedError(f"the development master did not come up:\n{self.master.tail()}")

    def start_server(self) -> None:
        command = self.command.replace("{config}", str(self.config_dir)).replace("{base}", str(self.base))
        argv = [
            *shlex.split(command),
            f"-ip={HOST}",
            f"-port={self.port}",
            f"-port.grpc={self.grpc_port}",
            f"-port.public={self.public_port}",
            f"-dir={self.data_dir}",
            "-max=64",
            f"-master={HOST}:{self.master_port}.{self.master_grpc_port}",
            "-preStopSeconds=0",
            *self.flags,
        ]
        self.server = Process(argv, self.config_dir, self.base / "server.log", dict(os.environ))
        url = f"http://{HOST}:{self.port}/healthz"
        if not wait_for(lambda: _answers(url) and _connects(self.grpc_port), START_LIMIT_S, self.server):
            raise ServerFailed(f"the server did not come up (exit {self.server.child.poll()}):\n{self.server.tail()}")

    def stop_server(self, sig: int = signal.SIGINT) -> int:
        if self.channel:
            self.channel.close()
            self.channel = None
        code = self.server.stop(sig) if self.server else 0
        self.server = None
        return code

    def close(self) -> None:
        self.stop_server()
        if self.master:
            self.master.stop()
            self.master = None

    def call(self, method: str, **fields: object) -> Any:
        """One unary call of the volume server; raises grpc.RpcError."""
        self.channel = self.channel or grpc.insecure_channel(f"{HOST}:{self.grpc_port}")
        return unary_call(self.channel, method, **fields)

    def allocate(self, **fields: object) -> bool:
        with contextlib.suppress(grpc.RpcError):
            self.call("AllocateVolume", **fields)
            return True
        return False

    def wait_registered(self, vids: Sequence[int], limit_s: float = 20.0) -> bool:
        """Waits until the master knows where the volumes are."""
        base = f"http://{HOST}:{self.master_port}/dir/lookup?volumeId="

        def known(vid: int) -> bool:
            try:
                with urllib.request.urlopen(f"{base}{vid}", timeout=2) as r:
                    return b"locations" in r.read()
            except OSError:
                return False

        return all(wait_for(lambda v=vid: known(v), limit_s) for vid in vids)  # type: ignore[misc]

    def scrub(self, text: str) -> str:
        """Own ports and directories replaced by the names that recordings use."""
        text = text.replace(str(self.data_dir), "{DIR0}").replace(str(self.base), "{BASE}")
        named = [(self.port, "{PORT}"), (self.grpc_port, "{GRPC}"), (self.master_port, "{MASTER}")]
        named.append((self.master_grpc_port, "{MASTERGRPC}"))
        if self.public_port != self.port:
            named.append((self.public_port, "{PUBLIC}"))
        for port, name in named:
            text = re.sub(rf"(?<![0-9a-zA-Z]){port}(?![0-9a-zA-Z])", name, text)
        return text
