"""Pages about the server itself: /status, counts for the UI, and the static files (contract http.md 12).

Markup and assets are our own. Static files go through Werkzeug for ranges. Must not import http_app.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import RequestedRangeNotSatisfiable
from werkzeug.wrappers import Response as PageResponse

from pyvolume.errors import StorageError
from pyvolume.ops import gojson
from pyvolume.server.ui import assets
from pyvolume.storage.disk_space import disk_usage
from pyvolume.types import Ttl, readable_disk_type
from pyvolume.version import full_version

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext
    from pyvolume.storage.volume import Volume

# ------------------------------------------------------------------------------------------------------------ /status


def status(context: ServerContext) -> dict[str, Any]:
    """The document of /status. Asks every disk for its figures; blocks as long as they do."""
    volumes = [volume for volume in (_volume(each) for each in context.store.volumes()) if volume is not None]
    volumes.sort(key=lambda volume: int(volume["Id"]))
    return {
        "DiskStatuses": [_disk(location) for location in context.store.locations],
        "Version": full_version(context.config.offset_bytes),
        "Volumes": volumes or None,
    }


def _disk(location: Any) -> dict[str, Any]:
    """One directory; figures that are zero and an empty error are left out."""
    directory = os.path.abspath(location.directory)
    out: dict[str, Any] = {"dir": directory}
    try:
        usage = disk_usage(directory)
    except OSError as exc:
        return {**out, "error": str(exc)}
    figures = {
        "all": usage.all_bytes,
        "used": usage.used_bytes,
        "free": usage.free_bytes,
        "percent_free": gojson.float32(usage.percent_free),
        "percent_used": gojson.float32(usage.percent_used),
    }
    out |= {name: value for name, value in figures.items() if value}
    kind = readable_disk_type(location.disk_type)
    if kind != "hdd":
        out["disk_type"] = kind
    return out


def _volume(volume: Volume) -> dict[str, Any] | None:
    """One volume in upstream's order of fields; None for one that is just being closed."""
    try:
        info = volume.to_info()
    except StorageError:
        return None
    if info is None:
        return None
    placement = volume.replica_placement
    parts = {"node": placement.node, "rack": placement.rack, "dc": placement.dc}
    ttl = Ttl.from_u32(info.ttl)
    return {
        "Collection": info.collection,
        "DiskType": info.disk_type,
        "RemoteStorageName": info.remote_storage_name,
        "ReplicaPlacement": {name: count for name, count in parts.items() if count},
        "Ttl": {"Count": ttl.count, "Unit": ttl.unit},
        "Size": volume.content_bytes,
        "DeletedByteCount": info.deleted_byte_count,
        "ModifiedAtSecond": info.modified_at_second,
        "Id": info.id,
        "DiskId": info.disk_id,
        "CompactRevision": info.compact_revision,
        "FileCount": info.file_count,
        "DeleteCount": info.delete_count,
        "Version": info.version,
        "ReadOnly": info.read_only,
    }


# ------------------------------------------------------------------------------------------------------------- the UI


class ReadCounts:
    """Requests per minute of the last hour, per hour of the last day, per day of the last week. Counting is lock-free
    and may lose a few under contention: it feeds a page for people."""

    _SPANS = (("Last Minute", 1, 60), ("Hourly", 60, 60), ("Daily", 3600, 24), ("Weekly", 86400, 7))

    def __init__(self) -> None:
        self._slots = [[0] * count for _, _, count in self._SPANS]
        self._latest = [int(time.time()) // seconds for _, seconds, _ in self._SPANS]
        self._second = 0
        self._pending = 0

    def count(self, more: int = 1) -> None:
        """So many more requests now."""
        now = int(time.time())
        if now == self._second:
            self._pending += more
            return
        self._fold(now)
        self._pending = more

    def _fold(self, now: int) -> None:
        pending, second = self._pending, self._second
        self._pending, self._second = 0, now
        for span, (_, seconds, count) in enumerate(self._SPANS):
            slots = self._slots[span]
            if second:
                slots[second // seconds % count] += pending
            latest, current = self._latest[span], now // seconds
            for gone in range(max(latest + 1, current - count + 1), current + 1):
                slots[gone % count] = 0
            self._latest[span] = current

    def series(self) -> Iterable[tuple[str, list[int]]]:
        """(name, counts from oldest to newest) of each span, the longest first."""
        self._fold(int(time.time()))
        for span in reversed(range(len(self._SPANS))):
            name, _, count = self._SPANS[span]
            latest = self._latest[span]
            yield name, [self._slots[span][(latest + 1 + place) % count] for place in range(count)]


# --------------------------------------------------------------------------------------------------------- static files

STATIC_PREFIX = "/seaweedfsstatic/"
_STYLE_NAME = "bootstrap/3.3.1/css/bootstrap.min.css"

_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#1c2b33}
h1{border-bottom:3px solid #2a8c6f;padding-bottom:.3em}h1 small{color:#6b7b83;font-weight:normal}
table{border-collapse:collapse;width:100%;margin-bottom:2em}
th,td{border:1px solid #d5dde0;padding:.35em .6em;text-align:left;overflow-wrap:anywhere}
th{background:#eef4f2}tbody tr:nth-child(odd){background:#fafcfb}
"""

_SCRIPT = "/* The pages of this server need no script; this file answers pages made for another one. */\n"


def _leaf(side: int) -> bytes:
    """Our mark, RGBA rows of a PNG: a leaf of seaweed as two arcs that meet."""
    rows = []
    for y in range(side):
        row = bytearray(b"\0")
        for x in range(side):
            u, v = (x + 0.5) / side, (y + 0.5) / side
            inside = (u - 1) ** 2 + v**2 < 0.92 and u**2 + (v - 1) ** 2 < 0.92
            vein = inside and abs(u - v) < 0.03
            row += bytes((0xEE, 0xF4, 0xF2, 0xFF) if vein else (0x2A, 0x8C, 0x6F, 0xFF) if inside else (0, 0, 0, 0))
        rows.append(bytes(row))
    return b"".join(rows)


def _png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(_leaf(side), 9))
        + chunk(b"IEND", b"")
    )


def _icon() -> bytes:
    """An .ico that holds the mark in two sizes."""
    pictures = [(side, _png(side)) for side in (16, 32)]
    out = struct.pack("<HHH", 0, 1, len(pictures))
    at = len(out) + 16 * len(pictures)
    for side, data in pictures:
        out += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(data), at)
        at += len(data)
    return out + b"".join(data for _, data in pictures)


_FOLDER = bytes.fromhex("47494638396101000100800000f0b429ffffff2c00000000010001000002024401003b")  # one yellow pixel


@cache
def _files() -> Mapping[str, tuple[str, bytes]]:
    """Media type and content by path below STATIC_PREFIX. Made once, when the first of them is asked for."""
    return {
        "favicon.ico": ("image/x-icon", _icon()),
        **assets(),
        "seaweed50x50.png": ("image/png", _png(50)),
        "images/folder.gif": ("image/gif", _FOLDER),
        _STYLE_NAME: ("text/css; charset=utf-8", _STYLE.encode()),
        "javascript/jquery-3.6.0.min.js": ("text/javascript; charset=utf-8", _SCRIPT.encode()),
        "javascript/jquery-sparklines/2.1.2/jquery.sparkline.min.js": (
            "text/javascript; charset=utf-8",
            _SCRIPT.encode(),
        ),
    }


def _entries(directory: str) -> list[str]:
    """What lies in a directory of the static files, `""` or a name that ends with a slash; directories with a slash."""
    below = [path[len(directory) :] for path in _files() if path.startswith(directory)]
    return sorted({first + slash for first, slash, _ in (path.partition("/") for path in below)})


def _other_spelling(name: str) -> str:
    """Where Go's file server sends a directory without its slash, a file with one, and an index page; "" elsewhere."""
    if name == "index.html" or name.endswith("/index.html"):
        return "./"
    if name.endswith("/") and name[:-1] in _files():
        return "../" + name[:-1].rsplit("/", 1)[-1]
    if any(path.startswith(name + "/") for path in _files()):
        return name.rsplit("/", 1)[-1] + "/"
    return ""


def static_file(name: str, environ: dict[str, Any]) -> PageResponse:
    """A static file or a listing of a directory, with ranges, for whatever method; 404 in Go's words otherwise."""
    found = _files().get(name)
    if found is not None:
        kind, data = found
        page = PageResponse([data], content_type=kind)
        ranged = {**environ, "REQUEST_METHOD": "HEAD" if environ["REQUEST_METHOD"] == "HEAD" else "GET"}
        try:
            return page.make_conditional(ranged, accept_ranges=True, complete_length=len(data))
        except RequestedRangeNotSatisfiable:
            headers = [("Content-Range", f"bytes */{len(data)}"), ("X-Content-Type-Options", "nosniff")]
            text = "invalid range: failed to overlap\n"
            return PageResponse(text, 416, headers, content_type="text/plain; charset=utf-8")
    inside = _entries(name) if not name or name.endswith("/") else []
    if inside:
        links = "".join(f'<a href="{entry}">{entry}</a>\n' for entry in inside)
        head = '<!doctype html>\n<meta name="viewport" content="width=device-width">\n'
        return PageResponse(f"{head}<pre>\n{links}</pre>\n", content_type="text/html; charset=utf-8")
    target = _other_spelling(name)
    if target:
        query = environ.get("QUERY_STRING", "")
        return PageResponse(b"", 301, [("Location", target + (f"?{query}" if query else ""))])
    headers = [("X-Content-Type-Options", "nosniff")]
    return PageResponse("404 page not found\n", 404, headers, content_type="text/plain; charset=utf-8")
