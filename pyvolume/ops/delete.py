"""DELETE of needles (contract http.md 11). Must not import server."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvolume._native import http as native
from pyvolume.errors import PyvolumeError, StorageError
from pyvolume.ops import manifest, replicate
from pyvolume.ops.auth import token_allows
from pyvolume.ops.context import Deleted, Location, Ops
from pyvolume.ops.message import Request, Response, Unanswered, empty, json_error, json_reply
from pyvolume.types import parse_key_cookie

if TYPE_CHECKING:
    from pyvolume._native.engine import Needle
    from pyvolume.storage.ec.volume import EcVolume
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

_COMPRESSED, _MANIFEST = 0x01, 0x80
MAX_DELETE_BATCH = 5_000  # file ids of one BatchDelete call


class ChunkDeleteError(PyvolumeError):
    """A chunk of a manifest could not be deleted; `str()` is upstream's text."""


def delete(ops: Ops, request: Request) -> Response:
    """Answers a DELETE of the admin port's catch-all route. Blocks on disk and on peers."""
    if not ops.guard.allows(request.peer_ip):
        log.info("Not in whitelist: %s", request.peer_ip)
        return empty(401)
    url = request.url
    if url.kind is native.UrlKind.DROP:
        raise Unanswered
    try:
        needle_id, cookie = native.parse_fid(url.fid)
    except native.IdError as exc:
        return json_error(request, 400, exc.text.decode("utf-8", "surrogateescape"))
    key = ops.security().jwt_write_key
    if key and not token_allows(
        key, request.token, url.vid.decode("latin-1"), url.fid.decode("latin-1"), request.peer_ip
    ):
        return json_error(request, 401, "wrong jwt")
    try:
        vid = native.parse_vid(url.vid)
        coded = ops.store.ec.find(vid) if ops.ec is not None else None
        if coded is not None:
            return _delete_coded(ops, request, coded, needle_id, cookie)
        volume = ops.store.find_volume(vid)
        if volume is None:
            return json_reply(request, 404, {"size": 0})
        needle = volume.read_needle(needle_id)
    except (native.IdError, StorageError):
        return json_reply(request, 404, {"size": 0})
    if not needle.empty and needle.cookie != cookie:
        log.info("delete %s with unmaching cookie from %s", url.path, request.peer_ip)
        return json_error(request, 400, "File Random Cookie does not match.")
    size = max(needle.size, 0)
    if needle.flags & _MANIFEST:
        try:
            size = _delete_chunks(ops, request, needle)
        except manifest.ManifestError as exc:
            return _failed(ops, request, f"Load chunks manifest error: {exc}")
        except ChunkDeleteError as exc:
            return _failed(ops, request, f"Delete chunks error: {exc}")
    try:
        _delete_needle(ops, request, vid, volume, needle, needle_id, cookie)
    except PyvolumeError as exc:
        return _failed(ops, request, f"Deletion Failed: {exc}")
    return json_reply(request, 202, {"size": size})


def _delete_coded(ops: Ops, request: Request, coded: EcVolume, needle_id: int, cookie: int) -> Response:
    """A needle of an erasure coded volume, which counts before a plain one of the same id. Quirks: every failure is a
    500, cookie 0 is not checked, chunks of a manifest stay."""
    assert ops.ec is not None
    try:
        size = ops.ec.delete(coded, needle_id, cookie)
    except PyvolumeError as exc:
        return _failed(ops, request, f"Deletion Failed: {exc}")
    return json_reply(request, 202, {"size": size})


def _failed(ops: Ops, request: Request, text: str) -> Response:
    ops.events.write_failure()
    return json_error(request, 500, text)


def _delete_needle(
    ops: Ops, request: Request, vid: int, volume: Volume, needle: Needle, needle_id: int, cookie: int
) -> None:
    """Looks the replicas up, deletes here, then there. Raises PyvolumeError."""
    started = time.monotonic()
    targets: list[Location] = []
    if request.value(b"type") != b"replicate":
        targets = replicate.targets(ops, vid, volume, request.request_id)
    ok = False
    try:
        volume.delete_needle(needle_id, cookie, needle.checksum)
        ops.events.replicated("delete", len(targets))
        if targets:
            replicate.delete(ops, vid, targets, request.url.path, request.token)
        ok = True
    finally:
        if targets:
            ops.events.replication_ended("delete", ok, time.monotonic() - started)


def _delete_chunks(ops: Ops, request: Request, needle: Needle) -> int:
    """Deletes all chunks of a manifest on all servers that hold them; gives the size that the manifest states.

    What can be deleted is deleted; then ChunkDeleteError is raised for the first chunk that failed (ids that are none
    come first, then unknown volumes). An absent chunk is no failure. Raises ManifestError before anything is deleted.
    """
    parsed = manifest.load(needle.data or b"", bool(needle.flags & _COMPRESSED))
    failures: list[str] = []
    by_volume: dict[str, list[str]] = {}
    for chunk in parsed.chunks:
        comma = chunk.fid.find(",")
        if comma <= 0:
            failures.append(f"chunk delete {chunk.fid}: Wrong fid format.")
        else:
            by_volume.setdefault(chunk.fid[:comma], []).append(chunk.fid)
    by_server: dict[str, tuple[Location, list[str]]] = {}
    for vid_text, fids in by_volume.items():
        try:
            for location in _locate(ops, request, vid_text):
                by_server.setdefault(location.url, (location, []))[1].extend(fids)
        except PyvolumeError as exc:
            failures.append(f"chunk delete {fids[0]}: {exc}")
    for location, fids in by_server.values():
        for start in range(0, len(fids), MAX_DELETE_BATCH):
            failures += _delete_on(ops, request, location, fids[start : start + MAX_DELETE_BATCH])
    if failures:
        raise ChunkDeleteError(failures[0])
    return parsed.size


def _locate(ops: Ops, request: Request, vid_text: str) -> Sequence[Location]:
    try:
        vid = native.parse_vid(vid_text.encode("utf-8", "surrogateescape"))
    except native.IdError as exc:
        raise ChunkDeleteError(f"unknown volume id {vid_text}") from exc
    try:
        locations = ops.cluster.lookup_volume(vid, request_id=request.request_id)
    except PyvolumeError as exc:
        raise ChunkDeleteError(f"lookup error: {exc}") from exc
    if not locations:
        raise ChunkDeleteError(f"volume id {vid} not found")
    return locations


def _delete_on(ops: Ops, request: Request, location: Location, fids: Sequence[str]) -> list[str]:
    """Deletes chunks on one server, this one's through the store, a peer's by gRPC, and tells what failed. No cookie is
    checked."""
    if location.url == ops.self_url:
        results: Sequence[Deleted] = [Deleted(fid, _delete_local(ops, fid)) for fid in fids]
    else:
        try:
            results = ops.cluster.batch_delete(location, fids, request_id=request.request_id)
        except PyvolumeError as exc:
            results = [Deleted(fids[0], str(exc))]
    return [f"chunk delete {result.fid}: {result.error}" for result in results if result.error]


def _delete_local(ops: Ops, fid: str) -> str:
    """What this server's own BatchDelete says about one id without a cookie check; "" for success."""
    vid_text, _, key_text = fid.partition(",")
    try:
        vid = native.parse_vid(vid_text.encode("utf-8", "surrogateescape"))
        needle_id, cookie = parse_key_cookie(key_text)
        coded = ops.store.ec.find(vid) if ops.ec is not None else None
        if coded is not None and ops.ec is not None:
            ops.ec.delete(coded, needle_id, 0)
            return ""
        volume = ops.store.find_volume(vid)
        if volume is None:
            return f"volume {vid} not found on {ops.config.ip}:{ops.config.port}"
        volume.delete_needle(needle_id, cookie)
    except (ValueError, StorageError) as exc:
        return str(exc)
    return ""
