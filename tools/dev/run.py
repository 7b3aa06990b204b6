"""`make run`: a development master and one server, a sample upload and read, then serving until Ctrl-C.

Needs nothing but the installed package. Both children are stopped cleanly at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

HOST = "127.0.0.1"
START_LIMIT_S = 60.0
SAMPLE = b"Hello from pyvolume. If you can read this, it stored you well.\n"


class Stop(Exception):
    """Asked to end: Ctrl-C or a termination signal."""


def port_is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


def check_ports(named: dict[str, int]) -> None:
    """Ends the program with a plain message when a port is taken or impossible."""
    for name, port in named.items():
        if not 0 < port < 65536:
            sys.exit(f"{name} is {port}, which is no port: choose one from 1 to 65535 (gRPC is at the port + 10000).")
        if not port_is_free(port):
            sys.exit(f"Port {port} ({name}) is in use. Choose another one: make run PORT=18080 MASTER_PORT=19333")


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as r:
        return bytes(r.read())


def wait_until_up(url: str, child: subprocess.Popen[bytes], what: str, log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if child.poll() is not None:
            break
        try:
            get(url)
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
    sys.exit(f"{what} did not start; the end of {log}:\n{tail}")


def start(module: str, args: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        # a process group of its own: Ctrl-C reaches this program, which then stops its children in order
        return subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def assign(master: str) -> dict[str, str]:
    """Asks for a file id until the server has registered with the master."""
    end = time.monotonic() + START_LIMIT_S
    assigned: dict[str, str] = {}
    while time.monotonic() < end:
        try:
            assigned = json.loads(get(f"http://{master}/dir/assign"))
        except urllib.error.HTTPError as e:
            assigned = json.loads(e.read() or b"{}")
        if "fid" in assigned:
            return assigned
        time.sleep(0.2)
    sys.exit(f"The master assigned no file id: {assigned}")


def show(master: str) -> None:
    """Assigns an id, uploads the sample, reads it back, prints what to try."""
    assigned = assign(master)
    url = f"http://{assigned['url']}/{assigned['fid']}"
    request = urllib.request.Request(url, data=SAMPLE, method="PUT", headers={"Content-Type": "text/plain"})
    with urllib.request.urlopen(request, timeout=10) as r:
        reply = r.read().decode()
    back = get(url)
    if back != SAMPLE:
        sys.exit(f"What came back is not what went in: {back[:80]!r}")
    print(f"assigned  {assigned['fid']} at {assigned['url']}")
    print(f"uploaded  {reply}")
    print(f"read back {back.decode().strip()!r}")
    print("\nTry:")
    print(f"  curl -i {url}")
    print(f"  curl 'http://{master}/dir/assign'")
    print(f"  curl -F file=@README.md {url}")
    print(f"  curl -i -r 0-4 {url}")
    print(f"  curl -X DELETE {url}")
    print(f"  curl 'http://{assigned['url']}/status?pretty=y'")


def stop(child: subprocess.Popen[bytes], name: str) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(45)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop in time, ending it")
            child.kill()
            child.wait(5)
    print(f"{name} stopped (exit {child.returncode})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--master-port", type=int, default=9333)
    parser.add_argument("--dir", type=Path, default=Path("run/data"))
    parser.add_argument("--once", action="store_true", help="stop after the sample instead of serving on")
    args = parser.parse_args()
    check_ports(
        {
            "MASTER_PORT": args.master_port,
            "MASTER_PORT + 10000": args.master_port + 10000,
            "PORT": args.port,
            "PORT + 10000": args.port + 10000,
        }
    )
    try:
        args.dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"DIR={args.dir} cannot be made: {e.strerror}")
    if not os.access(args.dir, os.W_OK):
        sys.exit(f"DIR={args.dir} is not writable")
    logs = Path("run")
    logs.mkdir(exist_ok=True)
    master, server = f"{HOST}:{args.master_port}", f"{HOST}:{args.port}"
    children: list[tuple[subprocess.Popen[bytes], str]] = []

    def end(signum: int, frame: FrameType | None) -> None:
        raise Stop

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    try:
        log = logs / "master.log"
        child = start("pyvolume.devmaster", [f"-ip={HOST}", f"-port={args.master_port}"], log)
        children.append((child, "development master"))
        wait_until_up(f"http://{master}/cluster/status", child, "The development master", log)
        log = logs / "server.log"
        flags = [f"-ip={HOST}", f"-port={args.port}", f"-dir={args.dir}", f"-master={master}", "-preStopSeconds=0"]
        child = start("pyvolume", flags, log)
        children.append((child, "pyvolume"))
        wait_until_up(f"http://{server}/healthz", child, "pyvolume", log)
        print(f"master    http://{master}  (for trying out and tests; clusters use SeaweedFS masters)")
        print(f"pyvolume  http://{server}  serving {args.dir}, logs in {logs}/")
        show(master)
        if args.once:
            return 0
        print("\nServing; Ctrl-C stops.", flush=True)
        while True:
            for child, name in children:
                if child.poll() is not None:
                    sys.exit(f"{name} has ended by itself (exit {child.returncode}); see {logs}/")
            time.sleep(0.5)
    except Stop:
        print("\nstopping")
        return 0
    finally:
        for child, name in reversed(children):
            stop(child, name)


if __name__ == "__main__":
    sys.exit(main())
