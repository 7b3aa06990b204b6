"""Ports for servers that are about to be started, given by the system and kept from everybody else until then."""

from __future__ import annotations

import collections
import socket
from typing import Final

HOST: Final = "127.0.0.1"
MOST_HELD: Final = 512

_held: Final[collections.deque[socket.socket]] = collections.deque(maxlen=MOST_HELD)


def free_ports(count: int) -> list[int]:
    """TCP ports, no two alike, for a server to listen on.

    A socket that is bound and does not listen keeps each: the system gives the port neither to whoever asks for any
    port nor to an outgoing connection, and lets a server that names it have it, now and after a restart, provided that
    the server sets SO_REUSEADDR, as servers do. The latest MOST_HELD ports of a process are held.
    """
    ports = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, 0))
        ports.append(int(sock.getsockname()[1]))
        if len(_held) == MOST_HELD:
            _held.popleft().close()
        _held.append(sock)
    return ports


def free_port() -> int:
    """One of free_ports."""
    return free_ports(1)[0]
