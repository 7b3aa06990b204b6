"""The page of /ui/index.html, and the figures it asks for (contract http.md 12, operations.md 5).

The page is whole without its script: tables with the first rows, bars, totals. The script takes the tables over
(sorting, filtering, pages) and draws the plots. Nothing comes from elsewhere, nothing is inline, every text is escaped;
a content security policy holds browsers to that. Must not import http_app.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyvolume.errors import StorageError
from pyvolume.ops import gojson
from pyvolume.server.metrics import ServerMetrics
from pyvolume.storage.disk_space import disk_usage
from pyvolume.types import ReplicaPlacement, Ttl, readable_disk_type
from pyvolume.version import PYVOLUME_VERSION, full_version

if TYPE_CHECKING:
    from pyvolume.server.context import ServerContext
    from pyvolume.server.http_pages import ReadCounts

FIRST_ROWS: Final = 100
"""Volumes in the page itself; the script fetches the others."""
STATIC: Final = "/seaweedfsstatic/pyvolume/"
HEADERS: Final = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
_ASSETS: Final = Path(__file__).parent / "assets"


def assets() -> dict[str, tuple[str, bytes]]:
    """(type, content) of the static files of the page, by their names below the static prefix."""
    return {
        "pyvolume/ui.css": ("text/css; charset=utf-8", (_ASSETS / "ui.css").read_bytes()),
        "pyvolume/ui.js": ("text/javascript; charset=utf-8", (_ASSETS / "ui.js").read_bytes()),
    }


# ------------------------------------------------------------------------------------------------------------- figures


def size_text(count: int) -> str:
    """`159 B`, `2.00 MiB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.2f} {unit}"
    return f"{value / 1024:.2f} PiB"


def up_time(seconds: int) -> str:
    """`24m53s`, as Go writes a duration."""
    hours, rest = divmod(seconds, 3600)
    minutes, left = divmod(rest, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{left}s"


def _volumes(context: ServerContext) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(local, remote) volumes by id."""
    local, remote = [], []
    for volume in context.store.volumes():
        try:
            info = volume.to_info()
        except StorageError:
            info = None
        if info is None:
            continue
        content = volume.content_bytes
        row = {
            "id": info.id,
            "collection": info.collection,
            "disk": readable_disk_type(info.disk_type),
            "size": content,
            "files": info.file_count,
            "trash": info.delete_count,
            "trash_size": info.deleted_byte_count,
            "garbage": round(min(1.0, info.deleted_byte_count / content), 4) if content > 0 else 0,
            "ttl": str(Ttl.from_u32(info.ttl)),
            "replication": str(ReplicaPlacement.from_byte(info.replica_placement)),
            "read_only": info.read_only,
            "version": info.version,
        }
        if info.remote_storage_name:
            remote.append({**row, "remote": info.remote_storage_name, "key": info.remote_storage_key})
        else:
            local.append(row)
    return sorted(local, key=_id), sorted(remote, key=_id)


def _id(row: dict[str, Any]) -> int:
    return int(row["id"])


def _ec_volumes(context: ServerContext) -> list[dict[str, Any]]:
    rows = []
    for volume in context.store.ec.volumes():
        shards = sorted((number, shard.size) for number, shard in list(volume.shards.items()))
        created_s = volume.encode_ts_ns // 10**9
        rows.append(
            {
                "id": volume.vid,
                "collection": volume.collection,
                "size": sum(size for _, size in shards),
                "count": len(shards),
                "shards": ", ".join(f"{number}: {size_text(size)}" for number, size in shards),
                "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(created_s)) if created_s else "",
            }
        )
    return sorted(rows, key=_id)


def _history(context: ServerContext) -> list[dict[str, Any]]:
    return context.events.history.points() if isinstance(context.events, ServerMetrics) else []


def _up_time_of(context: ServerContext) -> str:
    return up_time(int(time.time() - context.started_at_s))


def figures(context: ServerContext, part: str) -> bytes:
    """The JSON that the script asks for: everything, or with part `history` the plots alone."""
    document: dict[str, Any] = {"history": _history(context)}
    if part != "history":
        local, remote = _volumes(context)
        texts = {"uptime": _up_time_of(context), "master": _master(context)}
        document |= {"volumes": local, "remote": remote, "ec": _ec_volumes(context), "texts": texts}
    return gojson.dumps(document)


def _master(context: ServerContext) -> str:
    heartbeat = context.heartbeat
    current = heartbeat.current_master if heartbeat is not None else ""
    return f"connected to {current}" if current else "not connected to a master"


# ---------------------------------------------------------------------------------------------------------------- page


def _meter(share: float, label: str, warn: float, bad: float) -> str:
    level = " bad" if share >= bad else " warn" if share >= warn else ""
    width = min(max(share, 0.0), 1.0) * 100
    return (
        f'<svg class="meter{level}" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><rect class="track" width="100" height="8"></rect>'
        f'<rect class="fill" width="{width:.2f}" height="8"></rect></svg>'
    )


class _Markup(str):
    """A text that is markup already."""

    __slots__ = ()


def _cell(value: Any) -> str:
    return value if isinstance(value, _Markup) else escape(str(value))


def _table(title: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[Any]]) -> str:
    """columns: (title, whether numbers stand in it). `title` names the part that scrolls to who cannot see it."""
    head = "".join(f'<th scope="col"{" class=n" if number else ""}>{escape(name)}</th>' for name, number in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(name)}"{" class=n" if number else ""}><span>{_cell(cell)}</span></td>'
            for (name, number), cell in zip(columns, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n"
        "</table></div>\n"
    )


def _section(name: str, title: str, table: str, shown: int, total: int) -> str:
    note = f"{shown} of {total}" if total > shown else f"{total}"
    return (
        f'<section id="{name}"><div class="bar"><h2>{escape(title)}</h2></div>\n{table}'
        f'<div class="pages"><span>{note}</span></div></section>\n'
    )


_VOLUME_COLUMNS: Final = (
    ("Id", True), ("Collection", False), ("Disk", False), ("Data Size", True), ("Files", True), ("Trash", True),
    ("Garbage", True), ("TTL", False), ("Replication", False), ("ReadOnly", False), ("Version", True),
)  # fmt: skip
_REMOTE_COLUMNS: Final = (
    ("Id", True), ("Collection", False), ("Size", True), ("Files", True), ("Trash", True), ("Remote", False),
    ("Key", False),
)  # fmt: skip
_EC_COLUMNS: Final = (
    ("Id", True), ("Collection", False), ("Total Size", True), ("Shards", True), ("Shard Details", False),
    ("CreatedAt", False),
)  # fmt: skip
_DISK_COLUMNS: Final = (
    ("Path", False), ("Disk", False), ("Total", True), ("Free", True), ("Usage", True), ("Volumes", True),
    ("State", False),
)  # fmt: skip


def _disk_rows(context: ServerContext) -> Iterable[Sequence[Any]]:
    for location in context.store.locations:
        kind = readable_disk_type(location.disk_type)
        most = location.max_volume_count
        slots = f"{location.volume_count} / {most}" if most > 0 else str(location.volume_count)
        try:
            usage = disk_usage(location.directory)
        except OSError as exc:
            yield location.directory, kind, "", "", "", slots, _Markup(f'<span class="bad">{escape(str(exc))}</span>')
            continue
        percent = f"{usage.percent_used:.2f}%"
        bar = _Markup(_meter(usage.percent_used / 100, f"used {percent}", 0.8, 0.95) + percent)
        state = "ok"
        if location.is_unavailable:
            state = _Markup('<span class="bad">does not answer</span>')
        elif location.is_low:
            state = _Markup('<span class="warn">low on space, read-only</span>')
        yield (
            location.directory,
            kind,
            size_text(usage.all_bytes),
            size_text(usage.free_bytes),
            bar,
            slots,
            state,
        )


def _trash(row: dict[str, Any]) -> str:
    return f"{row['trash']} / {size_text(row['trash_size'])}"


def _volume_row(row: dict[str, Any]) -> Sequence[Any]:
    percent = f"{row['garbage'] * 100:.1f}%"
    garbage = _Markup(_meter(row["garbage"], f"garbage {percent}", 0.3, 0.6) + percent)
    read_only = _Markup('<span class="warn">true</span>') if row["read_only"] else "false"
    return (
        row["id"], row["collection"], row["disk"], size_text(row["size"]), row["files"], _trash(row), garbage,
        row["ttl"], row["replication"], read_only, row["version"],
    )  # fmt: skip


def page(context: ServerContext, counts: ReadCounts) -> bytes:
    """The whole page. Asks every disk for its figures; blocks as long as they do."""
    version = escape(full_version(context.config.offset_bytes))
    if isinstance(context.events, ServerMetrics):
        context.events.registry.refresh(counts_only=True)  # reads of the fast lane
    local, remote = _volumes(context)
    coded = _ec_volumes(context)
    system: list[tuple[str, str, str]] = [
        ("Masters", f"[{' '.join(context.config.masters)}]", ""),
        ("Current Master", _master(context), "master"),
        ("Up Time", _up_time_of(context), "uptime"),
        ("pyvolume", PYVOLUME_VERSION, ""),
    ]
    system += [(f"{name} # ReadRequests", ",".join(map(str, series)), "") for name, series in counts.series()]
    system_rows = "".join(
        f'<tr><th scope="row">{escape(title)}</th><td{f" id={name}" if name else ""}>{escape(text)}</td></tr>\n'
        for title, text, name in system
    )
    volumes = _table("Volumes", _VOLUME_COLUMNS, map(_volume_row, local[:FIRST_ROWS]))
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>SeaweedFS {version}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="/favicon.ico">\n<link rel="stylesheet" href="{STATIC}ui.css">\n'
        f'<script src="{STATIC}ui.js" defer></script>\n</head>\n<body>\n'
        f"<header><div><h1>SeaweedFS volume server <small>{version}</small></h1>"
        '<span id="state" class="bad" role="status"></span></div></header>\n<main>\n',
        '<section><div class="bar"><h2>Requests</h2></div>\n<div id="plots"><noscript>The plots need '
        "the script of this server.</noscript></div></section>\n",
        '<section id="disks"><div class="bar"><h2>Disk Stats</h2></div>\n'
        f"{_table('Disk Stats', _DISK_COLUMNS, _disk_rows(context))}</section>\n",
        _section("volumes", "Volumes", volumes, min(len(local), FIRST_ROWS), len(local)),
    ]
    if remote:
        rows = (
            (r["id"], r["collection"], size_text(r["size"]), r["files"], _trash(r), r["remote"], r["key"])
            for r in remote[:FIRST_ROWS]
        )
        table = _table("Remote Volumes", _REMOTE_COLUMNS, rows)
        parts.append(_section("remote", "Remote Volumes", table, min(len(remote), FIRST_ROWS), len(remote)))
    if coded:
        rows_ec = (
            (r["id"], r["collection"], size_text(r["size"]), r["count"], r["shards"], r["created"])
            for r in coded[:FIRST_ROWS]
        )
        table = _table("Erasure Coding Shards", _EC_COLUMNS, rows_ec)
        parts.append(_section("ec", "Erasure Coding Shards", table, min(len(coded), FIRST_ROWS), len(coded)))
    parts.append(
        f'<section id="system"><div class="bar"><h2>System Stats</h2></div>\n<table>\n<tbody>\n{system_rows}</tbody>\n'
        "</table></section>\n</main>\n</body>\n</html>\n"
    )
    return "".join(parts).encode("utf-8", "replace")
