"""The servers that are measured: how each is started, where its process is, what it costs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
TICK = os.sysconf("SC_CLK_TCK")
POLL_S = 0.002


class DidNotStart(RuntimeError):
    """A server ended, or did not answer within its time."""


@dataclass
class Target:
    """One server process. `command` gets the common flags appended unless it is the bare app."""

    name: str
    command: list[str]
    port: int
    grpc_port: int
    master: str
    base: Path
    bare_body_bytes: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None
    data: Path | None = None

    def start(self, data: Path, limit_s: float = 120.0) -> float:
        """Starts the server on a directory; returns seconds until /healthz answers 200, which "still loading" does not.
        Raises DidNotStart."""
        self.data = data
        argv = [*self.command]
        if self.bare_body_bytes is not None:
            argv += [str(self.port), str(self.bare_body_bytes)]
        else:
            argv += [f"-ip={HOST}", f"-port={self.port}", f"-port.grpc={self.grpc_port}", f"-dir={data}", "-max=64"]
            argv += [f"-master={self.master}", "-preStopSeconds=0"]
            if "weed-volume" in argv[0]:  # the Rust port takes two dashes, two words, and no joined values
                argv = [argv[0]]
                for k, v in (("--ip", HOST), ("--port", self.port), ("--port.grpc", self.grpc_port), ("--dir", data)):
                    argv += [k, str(v)]
                argv += ["--max", "64", "--master", self.master, "--preStopSeconds", "0"]
        log = (self.base / f"{self.name}.log").open("ab")
        began = time.monotonic()
        self.child = subprocess.Popen(
            argv, cwd=self.base, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**environment(), **self.env}
        )
        log.close()
        while time.monotonic() - began < limit_s:
            if self.child.poll() is not None:
                break
            if self.get_status("/healthz") == 200:
                return time.monotonic() - began
            time.sleep(POLL_S)
        raise DidNotStart(f"{self.name} did not start in {limit_s:.0f} s; see {self.base / (self.name + '.log')}")

    def get_status(self, path: str) -> int | None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=5) as r:
                r.read()
                return int(r.status)
        except urllib.error.HTTPError as e:
            return e.code
        except OSError:
            return None

    def stop(self) -> None:
        if self.child and self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
            try:
                self.child.wait(20)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait(5)
        self.child = None

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, user and system."""
        assert self.child is not None
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory_mib(self) -> tuple[float, float]:
        """Resident memory now and at its peak, in MiB."""
        assert self.child is not None
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        now, peak = (int(status.split(key)[1].split()[0]) / 1024 for key in ("VmRSS:", "VmHWM:"))
        return now, peak

    def forget_peak(self) -> None:
        """The peak of resident memory counts from now on."""
        assert self.child is not None
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")


def build_load(base: Path) -> Path:
    """Compiles the load generator."""
    program = base / "load"
    source = Path(__file__).with_name("load.c")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", str(program), str(source)], check=True)
    return program


def references() -> list[tuple[str, list[str]]]:
    """The reference servers that the environment names."""
    out = []
    weed = os.environ.get("WEED_BIN")
    if weed and shutil.which(weed):
        out.append(("go", [weed, "volume"]))
    rust = os.environ.get("WEED_VOLUME_RUST")
    if rust and shutil.which(rust):
        out.append(("rust", [rust]))
    return out


def environment() -> dict[str, str]:
    """That of a server: ours, but modules are kept compiled as on a machine where the package is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def compile_package() -> None:
    """Compiles the package's modules, which an installation from a wheel does and one for development does not."""
    package = Path(__file__).parents[2] / "pyvolume"
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(package)], check=True, env=environment())


def pyvolume_command() -> list[str]:
    return [sys.executable, "-m", "pyvolume"]


def workspace() -> Path:
    """A directory on a real disk (not a memory file system) for data and logs."""
    return Path(tempfile.mkdtemp(prefix="pyvolume-bench-", dir=os.environ.get("BENCH_DIR")))
