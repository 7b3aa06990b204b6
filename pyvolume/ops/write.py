"""POST and PUT of needles (contract http.md 5.3, 8, 9). Must not import server.

What an upload is made of is the engine's business (`_native.http.parse_upload`); this module checks who asks, packs and
measures, writes, and lets `replicate` copy.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyvolume._native import http as native
from pyvolume._native.engine import crc32c
from pyvolume.errors import PyvolumeError, StorageError, VolumeNotFound, VolumeReadOnly
from pyvolume.ops import gojson, gz, replicate
from pyvolume.ops.auth import token_allows
from pyvolume.ops.context import Ops
from pyvolume.ops.message import JSON_HEADERS, Buffer, Query, Request, Response, Unanswered, empty, json_error
from pyvolume.storage.volume import (
    FLAG_CHUNK_MANIFEST,
    FLAG_COMPRESSED,
    FLAG_HAS_LAST_MODIFIED,
    FLAG_HAS_MIME,
    FLAG_HAS_NAME,
    FLAG_HAS_PAIRS,
    FLAG_HAS_TTL,
    NeedleIn,
)
from pyvolume.types import Ttl

if TYPE_CHECKING:
    from pyvolume.storage.volume import Volume

log = logging.getLogger(__name__)

MAX_FORM_BYTES = 10 << 20
_SHORT_TEXT = 256  # a name or mime of this length or more is not stored
_UINT64_MAX = (1 << 64) - 1


def refuse_early(ops: Ops, request: Request) -> Response | None:
    """The refusals that need no byte of the body, in upstream's order: white list, query and media type, vid, token.

    None: the body is wanted. `put` runs the same checks again, since settings may change while a body arrives. Raises
    Unanswered.
    """
    if not ops.guard.allows(request.peer_ip):
        log.info("Not in whitelist: %s", request.peer_ip)
        return empty(401)
    try:
        native.form_check(request.header(b"content-type"))
    except native.UploadError as exc:
        return json_error(request, 400, _text(exc.text))
    if request.query.error is not None:
        return json_error(request, 400, request.query.error)
    url = request.url
    if url.kind is native.UrlKind.DROP:
        raise Unanswered
    try:
        native.parse_vid(url.vid)
    except native.IdError as exc:
        ops.events.write_failure()
        return json_error(request, 400, _text(exc.text))
    key = ops.security().jwt_write_key
    if key and not token_allows(
        key, request.token, url.vid.decode("latin-1"), url.fid.decode("latin-1"), request.peer_ip
    ):
        return json_error(request, 401, "wrong jwt")
    return None


def put(ops: Ops, request: Request) -> Response:
    """Answers a POST or PUT whose bytes are counted already. Blocks on disk and on peers.

    A body that broke off is refused, unless the file in a multipart body was complete before that.
    """
    if not ops.guard.allows(request.peer_ip):
        return empty(401)
    try:
        is_form = native.form_check(request.header(b"content-type"))
    except native.UploadError as exc:
        return json_error(request, 400, _text(exc.text))
    body = request.body()
    parameters = request.query
    if is_form:
        if len(body) > MAX_FORM_BYTES:
            refusal = json_error(request, 400, "http: POST too large")
            refusal.close_connection = True
            return refusal
        form = Query(bytes(body))
        if form.error is not None:
            return json_error(request, 400, form.error)
        parameters = _merged(form, request.query)
        body = b""
    refusal_or_none = refuse_early(ops, request)
    if refusal_or_none is not None:
        return refusal_or_none
    try:
        upload = parse(ops, request, parameters, body)
        if request.body_error is not None and not upload.multipart:
            raise native.UploadError(request.body_error.encode())
        needle_id, cookie = native.parse_fid(native.write_fid(request.url.path))
    except (native.UploadError, native.IdError) as exc:
        ops.events.write_failure()
        return json_error(request, 400, _text(exc.text))
    needle = upload.needle
    needle.id, needle.cookie = needle_id, cookie
    try:
        return _store(ops, request, parameters, upload)
    except VolumeNotFound as exc:
        ops.events.write_failure()
        return json_error(request, 404, str(exc))
    except PyvolumeError as exc:
        ops.events.write_failure()
        return json_error(request, 500, str(exc))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _merged(form: Query, query: Query) -> Query:
    """Form fields before the query's, as Go's request form has them."""
    both = Query(b"")
    both.pairs = [*form.pairs, *query.pairs]
    both.values = {**query.values, **form.values}
    return both


# ------------------------------------------------------------------------------------------- what was uploaded


@dataclass(slots=True)
class Upload:
    """An upload turned into a needle, and what its answer tells besides."""

    needle: NeedleIn
    reported_size: int  # bytes received, unpacked
    md5: bytes  # base64, only if the client sent one
    multipart: bool


def parse(ops: Ops, request: Request, parameters: Query, body: Buffer) -> Upload:
    """Finds the file in the body, checks its MD5, packs it where that pays. Raises UploadError (400)."""
    is_manifest = native.parse_bool(parameters.get(b"cm")) is True
    content_md5 = request.header(b"content-md5")
    found = native.parse_upload(
        method=request.method.encode(),
        path=request.url.path,
        body=body,
        size_limit=ops.config.file_size_limit_bytes,
        table=ops.mime,
        is_manifest=is_manifest,
        content_type=request.header(b"content-type"),
        content_disposition=request.header(b"content-disposition"),
        content_encoding=request.header(b"content-encoding"),
        content_md5=content_md5,
    )
    data: Buffer = found.data
    plain: Buffer = data
    size = len(data)
    compressed = found.is_gzipped
    if found.is_gzipped:
        size, plain = _measure(data, wanted=bool(found.md5))
    elif request.query.get(b"type") != b"replicate" and native.should_compress(found.name, found.mime, data):
        packed = gz.pack(data)
        if packed is not None:
            data, compressed = packed, True
    md5 = _checked_md5(found.md5, plain) if found.md5 else b""
    needle = NeedleIn(0, 0, data)
    needle.flags = FLAG_HAS_LAST_MODIFIED
    if compressed:
        needle.flags |= FLAG_COMPRESSED
    if is_manifest:
        needle.flags |= FLAG_CHUNK_MANIFEST
    if len(found.name) < _SHORT_TEXT:
        needle.name = found.name
        needle.flags |= FLAG_HAS_NAME
    if len(found.mime) < _SHORT_TEXT:
        needle.mime = found.mime
        needle.flags |= FLAG_HAS_MIME
    pairs = native.build_pairs(request.raw_headers)
    if pairs is not None:
        needle.pairs = pairs
        needle.flags |= FLAG_HAS_PAIRS
    ttl = Ttl(*native.parse_ttl(parameters.get(b"ttl")))
    if ttl:
        needle.ttl = ttl
        needle.flags |= FLAG_HAS_TTL
    needle.last_modified_s = native.parse_ts(parameters.get(b"ts")) or int(time.time())
    if ops.config.fix_orientation and _is_jpeg(found.name, found.mime):
        from pyvolume.ops import images

        needle.data = images.upright(data if isinstance(data, bytes | memoryview) else bytes(data))
    return Upload(needle, size, md5, found.is_multipart)


def _measure(data: Buffer, *, wanted: bool) -> tuple[int, Buffer]:
    """Length of gzip data unpacked, and the unpacked bytes if they are wanted for the MD5. What does not unpack counts
    as it is."""
    try:
        if not gz.is_gzip(data):
            return len(data), data
        if not wanted:
            return gz.plain_size(data), data
        plain = gz.gunzip(data)
        return (len(plain), plain) if plain is not None else (gz.plain_size(data), data)
    except (gz.BadGzip, gz.TooLarge):
        return len(data), data


def _checked_md5(expected: bytes, plain: Buffer) -> bytes:
    """The MD5 as base64. Raises UploadError when it is not the expected one."""
    actual = base64.b64encode(hashlib.md5(plain, usedforsecurity=False).digest())
    if actual != expected:
        raise native.UploadError(
            b"Content-MD5 did not match md5 of file data expected [%s] received [%s] size %d"
            % (expected, actual, len(plain))
        )
    return actual


def _is_jpeg(name: bytes, mime: bytes) -> bool:
    return mime == b"image/jpeg" or name.lower().endswith((b".jpg", b".jpeg"))


# ------------------------------------------------------------------------------------------------------- storing


def _store(ops: Ops, request: Request, parameters: Query, upload: Upload) -> Response:
    """Looks the replicas up, writes here, sends copies, answers. Raises PyvolumeError with the text of the answer."""
    started = time.monotonic()
    needle = upload.needle
    vid = native.parse_vid(request.url.vid)
    volume = ops.store.find_volume(vid)
    targets = []
    if parameters.get(b"type") != b"replicate":
        targets = replicate.targets(ops, vid, volume, request.request_id)
    fsync = parameters.get(b"fsync") == b"true"
    if volume is None and not targets and ops.ec is not None and ops.store.ec.find(vid) is not None:
        raise VolumeReadOnly(f"volume {vid} is erasure coded and cannot be written")
    if volume is None and not targets:
        raise VolumeNotFound(f"volume {vid} not found")
    unchanged, checksum = False, None
    ok = False
    try:
        if volume is not None:
            unchanged, checksum = _write_here(ops, volume, needle, fsync)
        ops.events.replicated("write", len(targets))
        if targets:
            replicate.write(ops, vid, targets, _copy(request, upload, volume, fsync))
            if ops.copied is not None and volume is not None:
                ops.copied(vid, targets)
        ok = True
    finally:
        if targets:
            ops.events.replication_ended("write", ok, time.monotonic() - started)
    if checksum is None:
        checksum = crc32c(needle.data)
    md5 = upload.md5
    headers = [("Etag", native.etag(checksum)), ("Content-Md5", md5.decode("latin-1"))]
    if unchanged:
        return Response(204, headers)
    reply = native.write_reply(needle.name, upload.reported_size & 0xFFFFFFFF, checksum, needle.mime, md5)
    if request.pretty:
        reply = gojson.dumps(gojson.loads(reply), pretty=True)
    return Response(201, [*headers, *JSON_HEADERS], reply)


def _write_here(ops: Ops, volume: Volume, needle: NeedleIn, fsync: bool) -> tuple[bool, int]:
    """(unchanged, checksum). Raises StorageError with upstream's prefix."""
    started = time.monotonic()
    ops.events.local_write_begins()
    try:
        result = volume.write_needle(needle, check_cookie=True, fsync=fsync)
    except StorageError as exc:
        ops.events.handler("errorWriteToLocalDisk")
        text = f"failed to write to local disk: {exc}"
        log.warning("%s", text)
        raise StorageError(text) from exc
    finally:
        ops.events.local_write(time.monotonic() - started)
    return bool(result.unchanged), int(result.checksum)


def _copy(request: Request, upload: Upload, volume: Volume | None, fsync: bool) -> replicate.ReplicaWrite:
    """What the other servers get. A needle without a ttl in a volume that has one goes out with the volume's."""
    needle = upload.needle
    ttl = needle.ttl or (volume.ttl if volume is not None else Ttl.NONE)
    return replicate.ReplicaWrite(
        path=request.url.path,
        data=needle.data,
        name=needle.name,
        mime=needle.mime,
        pairs=needle.pairs,
        compressed=bool(needle.flags & FLAG_COMPRESSED),
        manifest=bool(needle.flags & FLAG_CHUNK_MANIFEST),
        last_modified_s=min(needle.last_modified_s, _UINT64_MAX),
        ttl=str(ttl),
        fsync=fsync,
        md5=upload.md5,
        token=request.token,
        request_id=request.request_id,
    )
