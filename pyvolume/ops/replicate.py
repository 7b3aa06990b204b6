"""Copies of writes and deletes for the other servers of a volume (contract http.md 9, replication-tiering.md A).

Order, as upstream has it: find the targets (an error here means that nothing was written), act locally, then send to
all targets at once; the first failure ends the request, nothing is rolled back. No lock is held while the network is
waited for. Must not import server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote_plus

from pyvolume._native import http as native
from pyvolume.errors import PyvolumeError
from pyvolume.ops import gojson
from pyvolume.ops.context import Events, Location, Ops
from pyvolume.ops.gourl import encode_path
from pyvolume.ops.peers import Buffer, Cancel, Failure, PeerClient, PeerError, PeerResponse

if TYPE_CHECKING:
    from pyvolume._native.http import MimeTable
    from pyvolume.storage.volume import Volume

WRITE_DIAL_S = 10.0
DELETE_DIAL_S = 30.0
_REPLY_LIMIT = 1 << 20  # bytes of a peer's answer that are looked at


class ReplicationError(PyvolumeError):
    """A replica cannot be found or did not take the operation; `str()` is the text for the client."""


def targets(ops: Ops, vid: int, volume: Volume | None, request_id: str) -> list[Location]:
    """The servers besides this one that must have the write. Raises ReplicationError before anything was done."""
    if volume is not None and volume.replica_placement.copy_count == 1:
        return []
    try:
        locations = ops.cluster.lookup_volume(vid, request_id=request_id)
    except PyvolumeError as exc:
        raise ReplicationError(f"replicating lookup failed for {vid}: {exc}") from exc
    if volume is not None and len(locations) < volume.replica_placement.copy_count:
        ops.cluster.invalidate(vid)
        raise ReplicationError(
            f"replicating operations [{len(locations)}] is less than volume {vid} "
            f"replication copy count [{volume.replica_placement.copy_count}]"
        )
    return [location for location in locations if location.url != ops.self_url]


@dataclass(frozen=True, slots=True)
class ReplicaWrite:
    """A needle as its copies get it: the stored bytes, and what the first server made of the upload."""

    path: bytes  # decoded, with extension
    data: Buffer
    last_modified_s: int
    token: str
    request_id: str
    name: bytes = b""
    mime: bytes = b""
    pairs: bytes = b""
    compressed: bool = False
    manifest: bool = False
    ttl: str = ""
    fsync: bool = False
    md5: bytes = b""


def write(ops: Ops, vid: int, locations: Sequence[Location], needle: ReplicaWrite) -> None:
    """Sends the needle to all locations at once. Raises ReplicationError at the first failure."""
    started = time.monotonic()
    ops.events.replica_writes_begin()
    try:
        _fan_out(ops, vid, locations, lambda location, cancel: _write_to(ops, location, needle, cancel), "write")
    except ReplicationError as exc:
        ops.events.handler("errorWriteToReplicas")
        raise ReplicationError(f"failed to write to replicas for volume {vid}: {exc}") from exc
    finally:
        ops.events.replica_writes(time.monotonic() - started)


def delete(ops: Ops, vid: int, locations: Sequence[Location], path: bytes, token: str) -> None:
    """Sends the delete to all locations at once. Raises ReplicationError at the first failure."""
    target = f"{encode_path(path)}?type=replicate"
    headers = [("Authorization", f"Bearer {token}")] if token else []
    _fan_out(ops, vid, locations, lambda location, cancel: _delete_on(ops, location, target, headers, cancel), "delete")


# ---------------------------------------------------------------------------------------------------- fanning out


def _fan_out(
    ops: Ops,
    vid: int,
    locations: Sequence[Location],
    send: Callable[[Location, Cancel | None], None],
    operation: str,
) -> None:
    """Runs `send` for every location. One target is served by this thread; more by the pool, the rest is cancelled
    when one has failed."""
    failed = _attempt(locations[0], send, None) if len(locations) == 1 else _at_once(ops, locations, send)
    if failed is None:
        return
    if ops.copied is not None:
        ops.copied(vid, ())
    location, error = failed
    kind = error.kind if isinstance(error, PeerError) else Failure.OTHER
    if kind is not Failure.OTHER:
        ops.cluster.invalidate(vid)  # the master may know by now that this replica is gone
    known = kind in (Failure.REFUSED, Failure.TIMEOUT, Failure.CANCELLED)
    ops.events.replication_failed(operation, kind.value if known else Failure.OTHER.value)
    raise ReplicationError(f"[{location.url}]: {error}") from error


_Failed = tuple[Location, PyvolumeError]


def _attempt(
    location: Location, send: Callable[[Location, Cancel | None], None], cancel: Cancel | None
) -> _Failed | None:
    try:
        send(location, cancel)
    except PyvolumeError as exc:
        return location, exc
    return None


def _at_once(
    ops: Ops, locations: Sequence[Location], send: Callable[[Location, Cancel | None], None]
) -> _Failed | None:
    cancel = Cancel()
    pending: set[Future[_Failed | None]] = {
        ops.pool.submit(partial(_attempt, location, send, cancel)) for location in locations
    }
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            failed = future.result()
            if failed is not None:
                for late in pending:
                    late.cancel()
                cancel.cancel()
                return failed
    return None


# --------------------------------------------------------------------------------------------------- one replica


class _PeerRefusal(PeerError):
    """The peer answered, and not with success."""


def _write_to(ops: Ops, location: Location, needle: ReplicaWrite, cancel: Cancel | None) -> None:
    target = f"{encode_path(needle.path)}?{_write_query(needle)}"
    upload(ops.peers, ops.mime, ops.events, location.url, target, needle, cancel)


def upload(
    peers: PeerClient,
    mime: MimeTable,
    events: Events,
    host: str,
    target: str,
    needle: ReplicaWrite,
    cancel: Cancel | None,
) -> None:
    """Posts a needle to a path (with query) of a server, in the form that servers send each other. Raises PeerError."""
    url = f"{peers.scheme}://{host}{target}"
    head, tail, boundary = _part(mime, needle, url)
    headers = [("Content-Type", f"multipart/form-data; boundary={boundary}")]
    for name, value in native.parse_pairs(needle.pairs) if needle.pairs else ():
        headers.append((f"Seaweed-{name.decode('latin-1')}", value.decode("latin-1")))
    if needle.token:
        headers.append(("Authorization", f"Bearer {needle.token}"))
    headers.append(("X-Amz-Request-Id", needle.request_id))
    try:
        response = peers.request(
            "POST", host, target, headers, (head, needle.data, tail), dial_timeout_s=WRITE_DIAL_S, cancel=cancel
        )
    except PeerError as exc:
        events.upload_error(0)
        shown = needle.name.decode("utf-8", "surrogateescape")
        text = f'upload {shown} {len(needle.data)} bytes to {url}: Post "{url}": {exc}'
        raise PeerError(text, exc.kind) from exc
    if response.status == 204:
        response.read(0)
        return
    _check_reply(events, response, url)


def _write_query(needle: ReplicaWrite) -> str:
    """Names in alphabetical order; ttl is there even when empty."""
    pairs = []
    if needle.manifest:
        pairs.append("cm=true")
    if needle.fsync:
        pairs.append("fsync=true")
    if needle.last_modified_s > 0:
        pairs.append(f"ts={needle.last_modified_s}")
    pairs.append(f"ttl={quote_plus(needle.ttl)}")
    pairs.append("type=replicate")
    return "&".join(pairs)


def _part(table: MimeTable, needle: ReplicaWrite, url: str) -> tuple[bytes, bytes, str]:
    """Head and tail of the one-part form around the data, and its boundary."""
    boundary = os.urandom(30).hex()
    disposition = native.content_disposition(needle.name, attachment=False).removeprefix(b"inline; ")
    lines = [b"--" + boundary.encode(), b"Content-Disposition: form-data; " + disposition + b"; name=file"]
    if needle.compressed:
        lines.append(b"Content-Encoding: gzip")
    if needle.md5:
        lines.append(b"Content-Md5: " + needle.md5)
    mime = needle.mime or table.lookup(native.name_ext(needle.name).lower())
    if mime:
        lines.append(b"Content-Type: " + mime)
    lines.append(b"Idempotency-Key: " + url.encode("latin-1"))
    return b"\r\n".join(lines) + b"\r\n\r\n", f"\r\n--{boundary}--\r\n".encode(), boundary


def _check_reply(events: Events, response: PeerResponse, url: str) -> None:
    """Anything that parses as JSON without an `error` is success; the status itself is not looked at."""
    try:
        body = response.read(_REPLY_LIMIT)
    except PeerError as exc:
        events.upload_error(response.status)
        raise PeerError(f"read response body {url}: {exc}", exc.kind) from exc
    try:
        reply = gojson.loads(body)
        if not isinstance(reply, dict | None):
            kind = "array" if isinstance(reply, list) else "string" if isinstance(reply, str) else "number"
            raise ValueError(f"json: cannot unmarshal {kind} into Go value of type operation.UploadResult")
    except (ValueError, RecursionError) as exc:
        events.upload_error(response.status)
        raise _PeerRefusal(f"unmarshal {url}: {exc}") from exc
    error = reply.get("error") if reply else None
    if error:
        events.upload_error(response.status)
        raise _PeerRefusal(f"unmarshalled error {url}: {error}")


def _delete_on(
    ops: Ops, location: Location, target: str, headers: Sequence[tuple[str, str]], cancel: Cancel | None
) -> None:
    url = f"{ops.peers.scheme}://{location.url}{target}"
    try:
        response = ops.peers.request(
            "DELETE", location.url, target, headers, dial_timeout_s=DELETE_DIAL_S, cancel=cancel
        )
        body = response.read(_REPLY_LIMIT)
    except PeerError as exc:
        raise PeerError(f'Delete "{url}": {exc}', exc.kind) from exc
    if response.status in (200, 202, 204, 404):
        return
    try:
        reply = gojson.loads(body)
    except (ValueError, RecursionError):
        reply = None
    error = reply.get("error") if isinstance(reply, dict) else None
    raise _PeerRefusal(error if isinstance(error, str) else body.decode("utf-8", "surrogateescape"))
