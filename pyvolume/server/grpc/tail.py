"""RPCs that follow a volume (contract grpc.md 7): VolumeTailSender and VolumeTailReceiver.

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_tail.go`, `weed/operation/tail_volume.go`.
Departure V4 is in storage.tail.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc

from pyvolume.errors import PyvolumeError, StorageError, VolumeClosed
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc import wire
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.copy import peer_address, sending
from pyvolume.server.grpc.status import Refusal
from pyvolume.server.grpc.sync import volume_or_not_found
from pyvolume.server.pull import PeerLink
from pyvolume.storage import tail

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

ROUND_S = 2.0
"""Time between two looks. Quirk: the idle time-out of a request counts these rounds, not seconds."""
LOOK_S = 0.25


def volume_tail_sender(call: Call, request: Any) -> Iterator[Any]:
    """Sends every record appended after since_ns, then looks again every 2 s; nothing new gives one heartbeat.

    Ends when as many rounds as the idle time-out says brought nothing; 0 means never. A server that stops ends it too,
    and so does an unmount of the volume.
    """
    volume = volume_or_not_found(call, request.volume_id)
    ended = Event()
    call.on_end(ended.set)
    since_ns, rounds_left = request.since_ns, request.idle_timeout_seconds
    while True:
        try:
            reached_ns = yield from _send_since(call, volume, since_ns)
        except VolumeClosed:
            raise
        except StorageError as exc:
            raise PyvolumeError(f"streamFollow: {exc}") from exc
        _wait(call, ended)
        if reached_ns != since_ns:
            since_ns, rounds_left = reached_ns, request.idle_timeout_seconds
            continue
        rounds_left -= 1
        if request.idle_timeout_seconds and rounds_left <= 0:
            return


def _send_since(call: Call, volume: Volume, since_ns: int) -> Generator[Any, None, int]:
    """One round; returns up to where it came."""
    frame = wire.TailFrame(volume.version)
    with tail.snapshot(volume) as files:
        start = files.find_since(since_ns)
        if start is None:
            yield frame.heartbeat()
            return since_ns
        yield from sending(call, _batches(files, start, frame))
        return max(since_ns, files.last_append_ns)


def _batches(files: tail.Snapshot, start: int, frame: wire.TailFrame) -> Iterator[list[bytes]]:
    for made in files.follow(start):
        yield made if type(made) is list else [frame.piece(*made)]


def _wait(call: Call, ended: Event) -> None:
    """Sleeps until the next round; notices within moments that nobody waits any more or that the server stops."""
    for _ in range(int(ROUND_S / LOOK_S)):
        if ended.wait(LOOK_S):
            break
        if call.server.stopping.is_set():
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
    call.check()


def volume_tail_receiver(call: Call, request: Any) -> Any:
    """Follows a volume of another server until that one ends the stream; its failure is passed on as it is."""
    vid = request.volume_id
    volume = call.server.store.find_volume(vid)
    if volume is None:
        raise PyvolumeError(f"receiver not found volume id {vid}")
    source = peer_address("source_volume_server", request.source_volume_server)
    wanted = pb.VolumeTailSenderRequest(
        volume_id=vid, since_ns=request.since_ns, idle_timeout_seconds=request.idle_timeout_seconds
    )
    assembler = tail.Assembler()
    with (
        PeerLink(call.server.master.channels, source, call) as peer,
        closing(peer.pull("VolumeTailSender", wanted)) as messages,  # type: ignore[type-var]
    ):
        for message in messages:
            try:
                header, body, is_last, version = wire.tail_fields(message)
            except ValueError as exc:
                raise PyvolumeError(f"receiving volume {vid} from {source}: {exc}") from None
            needle = assembler.add(header, body, is_last, version)
            if needle is not None:
                tail.apply(volume, needle)
    return pb.VolumeTailReceiverResponse()


HANDLERS: dict[str, Handler] = {
    "VolumeTailSender": volume_tail_sender,
    "VolumeTailReceiver": volume_tail_receiver,
}
