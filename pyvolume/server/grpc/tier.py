"""RPCs that move the data of a volume to a remote store and back (contract grpc.md 10).

Must not import http_app or heartbeat. What is moved, and in which order, is storage.tier.move's. Upstream:
`weed/server/volume_grpc_tier_upload.go`, `volume_grpc_tier_download.go`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.storage.tier.backends import Watcher

REPORT_INTERVAL_S = 1.0


class _Transfer:
    """A move on a thread of its own, so that a client that takes no messages does not hold it up, and one that has gone
    is noticed while the store does not answer."""

    def __init__(self, call: Call, size: int, work: Callable[[Watcher], None]) -> None:
        self._call = call
        self._size = size
        self._work = work
        self._done = 0
        self._stop = Event()
        self._result: SimpleQueue[BaseException | None] = SimpleQueue()

    def _run(self) -> None:
        try:
            self._work(Watcher(self._tell, lambda: not self._stop.is_set()))
        except BaseException as exc:
            self._result.put(exc)
        else:
            self._result.put(None)

    def _tell(self, done_bytes: int) -> None:
        self._done = done_bytes

    def messages(self, make: Callable[..., Any]) -> Iterator[Any]:
        """One each second in which something moved; a fast transfer sends none."""
        worker = Thread(target=self._run, name="tier-move", daemon=True)
        self._call.on_end(self._stop.set)
        worker.start()
        told = 0
        try:
            while True:
                try:
                    failure = self._result.get(timeout=REPORT_INTERVAL_S)
                except Empty:
                    done = self._done
                    if done != told and not self._stop.is_set():
                        told = done
                        yield make(processed=done, processedPercentage=_percentage(done, self._size))
                    continue
                if failure is not None:
                    raise failure
                return
        finally:
            self._stop.set()
            worker.join()


def _percentage(done: int, size: int) -> float:
    """As a 32 bit float, which it is on the wire."""
    value: float = struct.unpack("f", struct.pack("f", 100.0 * done / size if size else 0.0))[0]
    return value


def _size_of(call: Call, vid: int) -> int:
    volume = call.server.store.find_volume(vid)
    return volume.dat_bytes if volume is not None else 0


def move_dat_to_remote(call: Call, request: Any) -> Iterator[Any]:
    """Uploads the data file. Once the `.vif` names the object a client that goes does not stop it any more."""
    store = call.server.store

    def work(watcher: Watcher) -> None:
        store.move_to_remote(
            request.volume_id,
            request.collection,
            request.destination_backend_name,
            request.keep_local_dat_file,
            watcher,
        )

    transfer = _Transfer(call, _size_of(call, request.volume_id), work)
    yield from transfer.messages(pb.VolumeTierMoveDatToRemoteResponse)


def move_dat_from_remote(call: Call, request: Any) -> Iterator[Any]:
    """Fetches the data file. Once the `.vif` has forgotten the object a client that goes does not stop it any more."""
    store = call.server.store

    def work(watcher: Watcher) -> None:
        store.move_from_remote(request.volume_id, request.collection, request.keep_remote_dat_file, watcher)

    transfer = _Transfer(call, _size_of(call, request.volume_id), work)
    yield from transfer.messages(pb.VolumeTierMoveDatFromRemoteResponse)


HANDLERS: dict[str, Handler] = {
    "VolumeTierMoveDatToRemote": move_dat_to_remote,
    "VolumeTierMoveDatFromRemote": move_dat_from_remote,
}
