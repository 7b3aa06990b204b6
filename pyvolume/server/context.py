"""What the parts of a running server share. Built by lifecycle, handed to HTTP, gRPC and heartbeat.

Must not import any other module of server (types only, under TYPE_CHECKING).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyvolume.ops.context import Events

if TYPE_CHECKING:
    from pyvolume.config import ServerConfig
    from pyvolume.security_config import SecurityConfig
    from pyvolume.server.heartbeat import Heartbeat
    from pyvolume.server.master_client import MasterClient
    from pyvolume.server.tls import Tls
    from pyvolume.storage.store import Store


@dataclass
class ServerContext:
    """One server process. Fields are set once at start; afterwards only these change, each by one assignment:
    `stopping`, `awaiting_master`, and `security` (a reload replaces the whole value, so read it anew for each request).
    """

    config: ServerConfig
    security: SecurityConfig
    store: Store
    master: MasterClient
    heartbeat: Heartbeat | None = None
    tls: Tls | None = None
    """None: everything in plain text."""
    events: Events = field(default_factory=Events)
    """Where HTTP and gRPC count; the base class counts nothing."""
    stopping: threading.Event = field(default_factory=threading.Event)
    started_at_s: float = field(default_factory=time.time)
    awaiting_master: bool = False
    """Departure P1: this server serves, but no master has told its configuration yet. /healthz says so."""

    @property
    def healthy(self) -> bool:
        """What /healthz answers: false once the server is stopping or its heartbeat was stopped for good."""
        return not self.stopping.is_set() and (self.heartbeat is None or self.heartbeat.alive)
