"""The remote stores that volumes may be tiered to, by name. What a store can do is the protocol `Backend`.

May import the leaves only; tier.s3 is imported when a store of that type is made known. Upstream:
`weed/storage/backend/backend.go`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from pyvolume.errors import StorageError

log = logging.getLogger(__name__)

DEFAULT_ID: Final = "default"


class TransferStopped(StorageError):
    """Whoever asked for a transfer has gone: `context canceled`."""

    def __init__(self) -> None:
        super().__init__("context canceled")


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who follows a transfer. Both are called from any of its threads, often, and must be cheap."""

    tell: Callable[[int], None] = field(default=lambda done_bytes: None)
    """How many bytes are done; less than before after a new attempt."""
    go_on: Callable[[], bool] = field(default=lambda: True)
    """False ends the transfer with TransferStopped, within seconds."""

    def check(self) -> None:
        """Raises TransferStopped."""
        if not self.go_on():
            raise TransferStopped


class Backend(Protocol):
    """A remote store. Every method blocks on the network, within limits of its own, and raises RemoteError."""

    @property
    def name(self) -> str:
        """`<type>.<id>`."""
        ...

    def read_at(self, key: str, offset: int, length: int) -> memoryview:
        """Exactly these bytes of an object."""
        ...

    def read_start(self, key: str, length: int) -> memoryview:
        """The first bytes of an object, for a volume that is being loaded: gives up soon, at once if the store was just
        found not to answer."""
        ...

    def size_of(self, key: str) -> int:
        """Length of an object in bytes."""
        ...

    def upload(self, path: str, size: int, watcher: Watcher) -> str:
        """Stores the first `size` bytes of a file; the key of the new object. Nothing is left behind on failure."""
        ...

    def download(self, key: str, fd: int, size: int, watcher: Watcher) -> None:
        """Writes the object into a file, from its beginning on. Does not flush."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error."""
        ...


def split_name(name: str) -> tuple[str, str]:
    """(type, id) of a backend's name. One part alone means id `default`, more than two fit nothing."""
    parts = name.split(".")
    if len(parts) == 1:
        return name, DEFAULT_ID
    return (parts[0], parts[1]) if len(parts) == 2 else ("", "")


class Backends:
    """The stores this server knows. Thread-safe; looking one up takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Backend] = {}

    def find(self, name: str) -> Backend | None:
        """By `<type>.<id>`; that with id `default` also by `<type>` alone."""
        return self._by_name.get(name)

    def names(self) -> str:
        """All names as upstream prints them in its errors: `[s3 s3.default]`."""
        return "[" + " ".join(sorted(self._by_name)) + "]"

    def add(self, kind: str, id_: str, properties: Mapping[str, str]) -> bool:
        """Makes a store known; False if there is one of that name, which stays as it is, or if it cannot be.

        What is wrong is logged: one bad entry of the master's list does not keep the others from working (upstream's
        process ends).
        """
        name = f"{kind}.{id_}"
        if kind != "s3":
            log.warning("storage type %s not found", kind)
            return False
        from pyvolume.storage.tier.s3 import S3Backend

        with self._lock:
            if name in self._by_name:
                return False
            try:
                backend = S3Backend(id_, properties)
            except ValueError as exc:
                log.error("fail to create backend storage %s: %s", name, exc)
                return False
            fresh: dict[str, Backend] = {**self._by_name, name: backend}
            if id_ == DEFAULT_ID:
                fresh[kind] = backend
            self._by_name = fresh
        log.info("created backend storage %s for %s", name, backend)
        return True

    def add_all(self, listed: Iterable[tuple[str, str, Mapping[str, str]]]) -> bool:
        """As add, for each (type, id, properties); True if any was new."""
        return sum(self.add(*entry) for entry in listed) > 0
