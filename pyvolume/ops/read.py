"""GET and HEAD of needles (contract http.md 5.3, 5.4, 6). Must not import server.

The meaning of headers, conditions and ranges is the engine's (`_native.http.plan_get`); this module finds the needle,
unpacks, resizes or expands it where that is asked for, and turns the plan into bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pyvolume._native import http as native
from pyvolume.errors import (
    CorruptNeedle,
    CrcMismatch,
    NeedleDeleted,
    NeedleNotFound,
    PyvolumeError,
    StorageError,
    VolumeClosed,
)
from pyvolume.ops import gz, image_query, manifest, proxy
from pyvolume.ops.auth import token_allows
from pyvolume.ops.context import Ops
from pyvolume.ops.gourl import encode_path
from pyvolume.ops.message import (
    TEXT_HEADERS,
    Buffer,
    Released,
    Request,
    Response,
    Unanswered,
    empty,
    json_error,
    json_reply,
)
from pyvolume.ops.throttle import Verdict

if TYPE_CHECKING:
    from pyvolume._native.engine import Needle
    from pyvolume.storage.ec.volume import EcVolume
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

COMPRESSED, MANIFEST = 0x01, 0x80  # needle flags
HELD_BACK_BYTES = 128 << 10  # of an expanded manifest before its status goes out: until then an error is a clean 500
MAX_IMAGE_BYTES = 256 << 20  # of a chunked file that is loaded to be resized; larger ones are served as they are
_PIECE_BYTES = 256 << 10
_SNIFF_BYTES = 512

_PLAN_FLAG_HEADERS = (
    (native.PlanFlag.HAS_SERVER, "server"),
    (native.PlanFlag.HAS_DATE, "date"),
    (native.PlanFlag.HAS_REQUEST_ID, "x-amz-request-id"),
    (native.PlanFlag.HAS_ALLOW_ORIGIN, "access-control-allow-origin"),
    (native.PlanFlag.HAS_ALLOW_CREDENTIALS, "access-control-allow-credentials"),
    (native.PlanFlag.HAS_CONNECTION, "connection"),
)
_NO_FLAGS: frozenset[str] = frozenset()

Source = Callable[[int, int], Iterator[Buffer]]
"""(offset, length) -> pieces of the data."""


def get(ops: Ops, request: Request) -> Response:
    """Answers a GET or HEAD of the catch-all route. Blocks on disk, and on peers where the answer comes from there."""
    if request.url.kind is native.UrlKind.DROP:
        raise Unanswered
    if not request.admitted and ops.downloads.over_limit():
        refusal = _over_limit(ops, request)
        if refusal is not None:
            return refusal
    url = request.url
    key = ops.security().jwt_read_key
    if key and not token_allows(
        key, request.token, url.vid.decode("latin-1"), url.fid.decode("latin-1"), request.peer_ip
    ):
        return json_error(request, 401, "wrong jwt")
    try:
        vid = native.parse_vid(url.vid)
        needle_id, cookie = native.parse_fid(url.fid)
    except native.IdError:
        return empty(400)
    volume = ops.store.find_volume(vid)
    if volume is not None:
        return _from_volume(ops, request, volume, needle_id, cookie)
    coded = ops.store.ec.find(vid) if ops.ec is not None else None
    if coded is not None:
        return _from_shards(ops, request, coded, needle_id, cookie)
    return proxy.missing_volume(ops, request, vid)


# --------------------------------------------------------------------------------------------------- the limiter


def _over_limit(ops: Ops, request: Request) -> Response | None:
    """What happens while too many bytes are on their way out; None: go on with the read."""
    ops.events.handler("downloadLimitCondition")
    if not request.raw_query or request.query.get(b"proxied") != b"true":
        try:
            vid = native.parse_vid(request.url.vid)
        except native.IdError:
            return empty(400)
        volume = ops.store.find_volume(vid)
        if volume is not None and volume.replica_placement.copy_count > 1:
            return proxy.elsewhere(ops, request, vid)
    waited = ops.downloads.wait(request.client_gone)
    if waited.verdict is Verdict.ADMITTED:
        return None
    if waited.verdict is Verdict.GONE:
        return empty(499)
    path = request.url.path.decode("utf-8", "surrogateescape")
    text = (
        f"request {path} because inflight download data {waited.in_flight} > {ops.downloads.limit_bytes}, "
        "and wait timeout"
    )
    return json_reply(request, 429, {"error": text})


# ------------------------------------------------------------------------------------------------ finding a needle


def _from_volume(ops: Ops, request: Request, volume: Volume, needle_id: int, cookie: int) -> Response:
    read_deleted = bool(request.raw_query or request.form_fields) and request.value(b"readDeleted") == b"true"
    wanted = _image_query(request)
    ext = request.url.ext.decode("latin-1").lower()
    whole = request.method != "HEAD" and bool(wanted) and bool(image_query.operation(ext, wanted))
    try:
        needle = volume.read_needle(needle_id, read_deleted=read_deleted, meta_ok=not whole)
        if needle.meta_only and needle.flags & (COMPRESSED | MANIFEST):
            needle = volume.read_needle(needle_id, read_deleted=read_deleted)
    except StorageError as exc:
        return _failed(ops, request, exc)
    return _checked(ops, request, volume, needle, cookie, wanted)


def _from_shards(ops: Ops, request: Request, coded: EcVolume, needle_id: int, cookie: int) -> Response:
    """Always the whole needle. Quirk: readDeleted and the needle's ttl are not looked at."""
    assert ops.ec is not None
    try:
        needle = ops.ec.read(coded, needle_id)
    except StorageError as exc:
        return _failed(ops, request, exc)
    return _checked(ops, request, None, needle, cookie, _image_query(request))


def _checked(
    ops: Ops, request: Request, volume: Volume | None, needle: Needle, cookie: int, wanted: dict[str, str]
) -> Response:
    """The response for a needle that was found, if the cookie fits."""
    if not needle.empty and needle.cookie != cookie:
        log.info(
            "request %s with cookie:%x expected:%x from %s", request.url.path, cookie, needle.cookie, request.peer_ip
        )
        return proxy.not_found(ops)
    size = max(needle.size, 0)
    if not size:
        return _answer(ops, request, volume, needle, wanted)
    ops.downloads.add(size)
    try:
        response = _answer(ops, request, volume, needle, wanted)
    except BaseException:
        ops.downloads.remove(size)
        raise
    if not response.body:
        ops.downloads.remove(size)
        return response
    body = response.body
    if isinstance(body, bytes | bytearray | memoryview):
        if response.length is None and not response.chunked:
            response.length = len(body)
        body = _slices(body)
    response.body = Released(body, lambda: ops.downloads.remove(size))
    return response


def _failed(ops: Ops, request: Request, exc: StorageError) -> Response:
    """404 for what is not there, a volume that was just unmounted included, 500 for what cannot be read."""
    if isinstance(exc, NeedleNotFound | VolumeClosed):
        if not isinstance(exc, NeedleDeleted):
            ops.events.invalid_needle()
        return proxy.not_found(ops)
    log.warning("read %s error: %s", request.url.path, exc)
    _count_corrupt(ops, exc)
    return proxy.internal_error(ops)


def _count_corrupt(ops: Ops, exc: PyvolumeError) -> None:
    if isinstance(exc, CrcMismatch):
        ops.events.handler("errorCRC")
    elif isinstance(exc, CorruptNeedle) and "index out of range" in str(exc):
        ops.events.handler("errorIndexOutOfRange")


def _image_query(request: Request) -> dict[str, str]:
    """The image parameters of the query, as text; empty without any."""
    if not request.raw_query and request.form_fields is None:
        return {}
    names = ("width", "height", "mode", "crop_x1", "crop_y1", "crop_x2", "crop_y2")
    found = {name: request.value(name.encode()).decode("latin-1") for name in names}
    return found if any(found.values()) else {}


# ----------------------------------------------------------------------------------------------------- answering


def _plan_request(request: Request, filename: bytes) -> native.GetRequest:
    headers = request.headers
    plain = native.GetRequest(
        head=request.method == "HEAD",
        filename=filename,
        accept_encoding=headers.get(b"accept-encoding", b""),
        range=headers.get(b"range", b""),
        if_modified_since=headers.get(b"if-modified-since", b""),
        if_none_match=headers.get(b"if-none-match", b""),
    )
    if b"," in plain.range:
        plain.random30 = os.urandom(30)
    if request.raw_query or request.form_fields is not None:
        plain.attachment = native.parse_bool(request.value(b"dl")) is True
        overrides: dict[str, bytes] = {}
        for name, value in request.query.pairs:
            lowered = name.lower()
            if lowered.startswith(b"response-"):
                overrides.setdefault(lowered.decode("latin-1"), value)
        plain.overrides = overrides
    return plain


def _answer(ops: Ops, request: Request, volume: Volume | None, needle: Needle, wanted: dict[str, str]) -> Response:
    """The response for a needle that was found and whose cookie fits."""
    if needle.empty:
        return _planned(ops, _plan_request(request, request.url.filename), native.GetNeedle(0, 0, 0, b""), None)
    found = native.GetNeedle(
        needle.checksum,
        needle.flags,
        needle.data_size,
        needle.data,
        needle.last_modified_s,
        needle.name,
        needle.mime,
        needle.pairs,
    )
    asked = _plan_request(request, request.url.filename)
    if needle.meta_only and volume is not None:
        found.data = None
        return _planned(ops, asked, found, lambda start, length: _streamed(ops, volume, needle, start, length))
    found.data_len = len(found.data) if found.data is not None else 0
    if needle.flags & MANIFEST and not (request.raw_query and request.query.get(b"cm") == b"false"):
        expanded = _expanded(ops, request, asked, found, wanted)
        if expanded is not None:
            return expanded
    if wanted:
        _image(request, found, wanted)
    return _planned(ops, asked, found, None)


def _image(request: Request, found: native.GetNeedle, wanted: dict[str, str]) -> None:
    """Crops and resizes in place. Quirk: whether packed data is unpacked for it, goes by the extension as written,
    whether there is something to do, by the one in lower case."""
    ext = request.url.ext.decode("latin-1")
    if not ext and found.name and not request.url.filename:
        ext = native.name_ext(found.name).decode("latin-1")
    todo = image_query.operation(ext.lower(), wanted)
    if not todo or found.data is None:
        return
    if found.flags & COMPRESSED:
        packed = gz.is_gzip(found.data)
        accepted = b"gzip" in request.header(b"accept-encoding")
        if packed and accepted and not image_query.operation(ext, wanted):
            return
        if packed:
            found.data = _unpacked(found.data) or b""
        found.plain = True
    from pyvolume.ops import images

    found.data = images.apply(_whole(found.data), ext, todo)
    found.data_len = len(found.data)


def _whole(data: Buffer) -> bytes | memoryview:
    return data if isinstance(data, bytes | memoryview) else bytes(data)


def _unpacked(data: Buffer) -> bytes | None:
    """The unpacked data, nothing at all when it is broken (as upstream), None when it is better streamed."""
    try:
        return gz.gunzip(data)
    except gz.BadGzip as exc:
        log.info("uncompress error: %s", exc)
        return b""


def _planned(
    ops: Ops, asked: native.GetRequest, found: native.GetNeedle, source: Source | None, held_back: int = 1
) -> Response:
    """Asks the engine for the plan, giving it what it wants to see, and makes the response of it.

    held_back: bytes of a streamed 200 that are made before its status goes out, so that an error in them is a 500.
    """
    plan = native.plan_get(asked, found, ops.mime)
    while plan.result is not native.PlanResult.DONE:
        if plan.result is native.PlanResult.NEED_PLAIN:
            packed = found.data or b""
            try:
                plain = _unpacked(packed)
                found.data_len = gz.plain_size(packed) if plain is None else len(plain)
            except gz.TooLarge as exc:
                log.warning("needle is not unpacked: %s", exc)
                return proxy.internal_error(ops)
            found.data = plain
            found.plain = True
            if plain is None:
                found.flags &= ~COMPRESSED
                source = _unpacking(packed)
        else:
            try:
                found.sniff = _peek(source, plan.need_offset, min(plan.need_len, _SNIFF_BYTES))
            except PyvolumeError as exc:
                return _no_body(ops, Response(500), exc)
            found.sniff_offset = plan.need_offset
        plan = native.plan_get(asked, found, ops.mime)
    response = Response(plan.status, plan.headers)
    if plan.flags:
        response.has = frozenset(name for flag, name in _PLAN_FLAG_HEADERS if plan.flags & flag)
        response.close_connection = bool(plan.flags & native.PlanFlag.CLOSE)
        response.chunked = bool(plan.flags & native.PlanFlag.NO_LENGTH)
    if not plan.parts:
        return response
    if source is None:
        _fill_from_memory(response, plan, found.data or b"")
        return response
    response.length = None if plan.flags & native.PlanFlag.NO_LENGTH else plan.body_len
    body = _stretches(plan, source)
    if plan.status != 200:
        response.body = _cut_at_error(ops, [], body)
        return response
    first: list[Buffer] = []
    try:
        for piece in body:
            first.append(piece)
            held_back -= len(piece)
            if held_back <= 0:
                break
    except PyvolumeError as exc:
        return _no_body(ops, response, exc)
    response.body = _cut_at_error(ops, first, body)
    return response


def _fill_from_memory(response: Response, plan: native.GetPlan, data: Buffer) -> None:
    if len(plan.parts) == 1 and not plan.parts[0].text:
        part = plan.parts[0]
        response.body = data if part.length == len(data) else memoryview(data)[part.offset : part.offset + part.length]
        return
    view = memoryview(data)
    pieces: list[Buffer] = []
    for part in plan.parts:
        pieces += [part.text, view[part.offset : part.offset + part.length]]
    response.length = None if plan.flags & native.PlanFlag.NO_LENGTH else plan.body_len
    response.body = [piece for piece in pieces if len(piece)]


def _stretches(plan: native.GetPlan, source: Source) -> Iterator[Buffer]:
    for part in plan.parts:
        if part.text:
            yield part.text
        if part.length:
            yield from source(part.offset, part.length)


def _cut_at_error(ops: Ops, first: list[Buffer], rest: Iterator[Buffer]) -> Iterator[Buffer]:
    """A body whose length is out already. An error ends it early: it is shorter than promised, so the sender cuts the
    connection, which is all that can be said now."""
    try:
        yield from first
        first.clear()
        yield from rest
    except PyvolumeError as exc:
        _count_corrupt(ops, exc)
        log.error("ProcessRangeRequest: %s", exc)


def _no_body(ops: Ops, response: Response, exc: PyvolumeError) -> Response:
    """Go's http.Error over a response that has no byte out: the text, the headers kept but for those of a body."""
    log.error("ProcessRangeRequest: %s", exc)
    _count_corrupt(ops, exc)
    dropped = ("content-length", "content-type", "x-content-type-options")
    headers = [(name, value) for name, value in response.headers if name.lower() not in dropped]
    text = (str(exc) + "\n").encode("utf-8", "surrogateescape")
    return Response(500, [*headers, *TEXT_HEADERS], text, has=response.has)


def _slices(data: Buffer) -> list[Buffer]:
    """Large bodies go out in pieces, so that the sender can wait for the client in between."""
    if len(data) <= 2 * _PIECE_BYTES:
        return [data]
    view = memoryview(data)
    return [view[at : at + _PIECE_BYTES] for at in range(0, len(view), _PIECE_BYTES)]


def _peek(source: Source | None, offset: int, length: int) -> bytes:
    if source is None:
        return b""
    out = b""
    pieces = source(offset, length)
    for piece in pieces:
        out += bytes(piece)
        if len(out) >= length:
            break
    return out[:length]


def _streamed(ops: Ops, volume: Volume, needle: Needle, start: int, length: int) -> Iterator[Buffer]:
    """Data of a large needle from disk. Quirk: a wrong CRC shows behind the last byte; the client is not told."""
    try:
        yield from volume.stream_data(needle, start, length, ops.config.read_buffer_bytes)
    except CrcMismatch as exc:
        ops.events.handler("errorCRC")
        log.error("%s", exc)


def _unpacking(packed: Buffer) -> Source:
    return lambda start, length: gz.stream(packed, start, length)


# ---------------------------------------------------------------------------------------------- chunk manifests


def _expanded(
    ops: Ops, request: Request, asked: native.GetRequest, found: native.GetNeedle, wanted: dict[str, str]
) -> Response | None:
    """The joined chunks of a manifest; None if the data is no manifest (then it is served as it is)."""
    try:
        parsed = manifest.load(found.data or b"", bool(found.flags & COMPRESSED))
    except manifest.ManifestError as exc:
        log.info("load chunked manifest (%s) error: %s", request.url.path, exc)
        return None
    reader = manifest.ChunkReader(
        parsed,
        lambda vid: ops.cluster.lookup_volume(vid, request_id=request.request_id),
        lambda host, fid, skip: _fetch_chunk(ops, request, host, fid, skip),
        ops.peers.scheme,
    )
    name = parsed.name.encode("utf-8", "surrogateescape")
    whole = native.GetNeedle(
        found.checksum,
        found.flags & ~COMPRESSED,
        parsed.total_bytes,
        None,
        found.last_modified_s,
        name,
        parsed.mime.encode("utf-8", "surrogateescape"),
        found.pairs,
        plain=True,
        expanded_manifest=True,
    )
    ext = request.url.ext.decode("latin-1") or native.name_ext(asked.filename or name).decode("latin-1")
    todo = image_query.operation(ext.lower(), wanted)
    if todo and 0 < parsed.total_bytes <= MAX_IMAGE_BYTES:
        try:
            joined = b"".join(reader.stream(0, parsed.total_bytes))
        except manifest.ChunkError:
            joined = b""  # not decodable, as upstream finds it: served as it is, where the error shows
        if joined:
            from pyvolume.ops import images

            whole.data = images.apply(joined, ext, todo)
            whole.data_len = len(whole.data)
            return _planned(ops, asked, whole, None)
    return _planned(ops, asked, whole, reader.stream, HELD_BACK_BYTES)


def _fetch_chunk(ops: Ops, request: Request, host: str, fid: str, skip: int) -> manifest.Fetched:
    """One chunk, without any token as upstream. A chunk on this server takes the same way but for the socket: it must
    not wait for another worker of this very server."""
    headers = [("Range", f"bytes={skip}-")] if skip > 0 else []
    target = encode_path(b"/" + fid.encode("utf-8", "surrogateescape"))
    if host == ops.self_url and ops.fetch_self is not None:
        raw = [(name.encode(), value.encode()) for name, value in headers]
        return ops.fetch_self(
            Request(
                method="GET",
                target_path=target.encode(),
                raw_query=b"",
                headers={name.lower(): value for name, value in raw},
                url=native.parse_url(target.encode()),
                raw_headers=raw,
                peer_ip=request.peer_ip,
                request_id=request.request_id,
                client_gone=request.client_gone,
            )
        )
    return ops.peers.request("GET", host, target, headers)
