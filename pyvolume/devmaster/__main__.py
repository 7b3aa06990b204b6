"""`pyvolume-devmaster`: a master of one process for trying pyvolume out and for its tests.

Imports the leaves, pyvolume.pb and its own package only; the server never imports it. It keeps everything in memory,
has no replication repair, no vacuum scheduling, no peers and no security. Clusters use SeaweedFS masters.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Sequence as Words
from dataclasses import dataclass
from pathlib import Path

from pyvolume.devmaster.http import HttpServer
from pyvolume.devmaster.service import Master, make_server
from pyvolume.devmaster.topology import Sequence, Topology
from pyvolume.types import ReplicaPlacement

GRPC_PORT_OFFSET = 10000
STOP_GRACE_S = 1.0
NOTICE = (
    "pyvolume-devmaster is for trying pyvolume out and for its tests: it keeps its knowledge in memory and repairs "
    "nothing. Clusters use SeaweedFS masters (`weed master`)."
)


@dataclass(frozen=True)
class Options:
    """The flags. port 0 lets the system choose; grpc_port None is port + 10000 (or any, when port is 0)."""

    ip: str = "127.0.0.1"
    port: int = 9333
    grpc_port: int | None = None
    volume_size_limit_mb: int = 30_000
    default_replication: str = "000"
    mdir: str = ""


class DevMaster:
    """A bound master. start() serves in threads of its own, stop() ends it. Raises OSError when a port is taken."""

    def __init__(self, options: Options) -> None:
        topology = Topology(options.volume_size_limit_mb << 20, Sequence(options.mdir))
        self._ip = options.ip
        master = Master(topology, default_replication=options.default_replication, address=lambda: self.address)
        self.topology = topology
        self._master = master
        self._http = HttpServer((options.ip, options.port), master, str(uuid.uuid4()))
        self.port = self._http.server_port
        grpc_port = options.grpc_port
        if grpc_port is None:
            grpc_port = options.port + GRPC_PORT_OFFSET if options.port else 0
        try:
            self._grpc, self.grpc_port = make_server(master, f"{_bracketed(options.ip)}:{grpc_port}")
        except RuntimeError as exc:
            self._http.server_close()
            raise OSError(f"gRPC port {grpc_port}: {exc}") from exc
        self._thread = threading.Thread(target=self._http.serve_forever, name="devmaster-http", daemon=True)

    @property
    def address(self) -> str:
        """`host:port.grpcPort`, what a volume server's -master takes."""
        return f"{_bracketed(self._ip)}:{self.port}.{self.grpc_port}"

    def start(self) -> None:
        """Begins to serve. Does not block."""
        self._grpc.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends serving; volume servers see their streams end."""
        self._grpc.stop(STOP_GRACE_S).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._master.close()


def _bracketed(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def parse_options(words: Words[str]) -> Options:
    """The flags; argparse ends the process on a wrong one."""
    parser = argparse.ArgumentParser(prog="pyvolume-devmaster", description=NOTICE, allow_abbrev=False)
    parser.add_argument("-ip", "--ip", default=Options.ip, help="address to listen on and to announce")
    parser.add_argument("-port", "--port", type=int, default=Options.port, help="HTTP port, 0 for any")
    parser.add_argument("-port.grpc", "--port.grpc", dest="grpc_port", type=int, help="gRPC port, else port + 10000")
    parser.add_argument(
        "-volumeSizeLimitMB",
        "--volumeSizeLimitMB",
        dest="volume_size_limit_mb",
        type=int,
        default=Options.volume_size_limit_mb,
        help="volumes of this size take no more files",
    )
    parser.add_argument(
        "-defaultReplication",
        "--defaultReplication",
        dest="default_replication",
        default=Options.default_replication,
        help="replication when a request names none",
    )
    parser.add_argument("-mdir", "--mdir", default="", help="directory that keeps the ids over a restart")
    options = Options(**vars(parser.parse_args(words)))
    try:
        ReplicaPlacement.parse(options.default_replication)
    except ValueError as exc:
        parser.error(str(exc))
    if options.volume_size_limit_mb <= 0:
        parser.error("-volumeSizeLimitMB must be positive")
    if options.mdir and not Path(options.mdir).is_dir():
        parser.error(f"-mdir: {options.mdir} is no directory")
    return options


def main(words: Words[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM. The status for sys.exit."""
    options = parse_options(sys.argv[1:] if words is None else words)
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s%(asctime)s %(message)s", datefmt="%m%d %H:%M:%S")
    sys.stderr.write(NOTICE + "\n")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        master = DevMaster(options)
    except OSError as exc:
        sys.stderr.write(f"pyvolume-devmaster: {exc}\n")
        return 1
    master.start()
    sys.stderr.write(f"serving at {_bracketed(options.ip)}:{master.port}, gRPC port {master.grpc_port}\n")
    stop.wait()
    master.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
