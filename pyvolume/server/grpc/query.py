"""Query: filter and project the JSON values of needles (contract replication-tiering.md D).

Must not import http_app or heartbeat. Upstream: `weed/server/volume_grpc_query.go`, `weed/query/json`. Only JSON input
does anything; CSV and Parquet give no messages, as upstream. Departure A4: upstream's process ends without
input_serialization or filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from pyvolume.errors import NeedleNotFound, PyvolumeError, VolumeClosed
from pyvolume.ops import jsonpath
from pyvolume.pb import volume_server_pb2 as pb
from pyvolume.server.grpc.calls import Call, Handler
from pyvolume.server.grpc.needles import lenient_vid
from pyvolume.server.grpc.status import Refusal
from pyvolume.types import FileId

MAX_PATH_BYTES = 4096
MAX_STRIPE_BYTES = (1 << 30) - (1 << 16)
"""What fits into one message."""
CHECK_EVERY = 256
"""Values between two looks at whether the client is still there."""


def query(call: Call, request: Any) -> Iterator[Any]:
    """One stripe for each file id, in order. A wrong cookie ends the stream, which counts as success."""
    for fid in request.from_file_ids:
        call.check()
        data = _read(call, fid)
        if data is None:
            return
        if not request.HasField("input_serialization"):
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "input_serialization: missing")
        if request.input_serialization.HasField("json_input"):
            yield pb.QueriedStripe(records=_stripe(call, request, data))


def _read(call: Call, fid: str) -> bytes | None:
    """The data of a needle of a normal volume; None if its cookie is another."""
    comma = fid.find(",")
    if comma <= 0:
        raise PyvolumeError("Wrong fid format.")
    try:
        vid = lenient_vid(fid[:comma])
        key, cookie = FileId.parse_path(fid[comma + 1 :])
    except ValueError as exc:
        raise PyvolumeError(str(exc)) from None
    try:
        needle = call.server.store.read_needle(vid, key)
    except VolumeClosed:
        raise NeedleNotFound("not found") from None
    if needle.empty:  # nothing was read of it, so there is no cookie to compare with
        return b""
    return bytes(needle.data or b"") if needle.cookie == cookie else None


def _stripe(call: Call, request: Any, data: bytes) -> bytes:
    """The records of one needle. Quirk: names are not quoted, nothing stands between two records."""
    if not request.HasField("filter"):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "filter: missing")
    field, operator, operand = request.filter.field.encode(), request.filter.operand, request.filter.value.encode()
    selections = [selection.encode() for selection in request.selections]
    for path in (field, *selections):
        if len(path) > MAX_PATH_BYTES:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"path of {len(path)} bytes: at most {MAX_PATH_BYTES}")
    out = bytearray()
    for number, value in enumerate(jsonpath.values(data)):
        if number % CHECK_EVERY == 0:
            call.check()
        if not jsonpath.compare(jsonpath.get(value.raw, field), operator, operand):
            continue
        out += b"{"
        for place, path in enumerate(selections):
            if place:
                out += b","
            found = jsonpath.get(value.raw, path)
            out += path + b":" + (b"" if found is None or found.kind is jsonpath.Kind.NULL else found.raw)
        out += b"}"
        if len(out) > MAX_STRIPE_BYTES:
            raise PyvolumeError(f"the records of one file take more than {MAX_STRIPE_BYTES} bytes")
    return bytes(out)


HANDLERS: dict[str, Handler] = {"Query": query}
