"""How strictly two HTTP answers are compared, and which accepted departures explain a difference.

Dates need only be valid, a request id only have the shape, `/status` figures of disks and clocks are left out. What a
server's own compressor or image encoder decides (ETag, length and bytes of text that the server compressed itself,
bytes of a re-encoded picture of the same format and size) is tolerated and counted.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from tools.compat.wire import Answer

CLOCK_SLACK_S = 180
IMAGE_TOLERANCE = 6.0  # mean absolute difference of a channel, of 255
DISK_FIGURES = {"dir", "all", "used", "free", "percent_free", "percent_used"}
NO_CONTENT = {204, 304}

Difference = tuple[str, Any, Any]  # what, recorded, got
Step = dict[str, Any]
Scrub = Callable[[str], str]


def imf_date(value: str) -> float | None:
    """Seconds of a fixed-form HTTP date, None if it is none."""
    if not re.fullmatch(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT", value):
        return None
    try:
        return parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return None


def departure(step: Step, want: Answer, got: Answer) -> str | None:
    """Name of the accepted departure that this answer is, in exactly the form the decisions give it."""
    target = step.get("target")
    if step.get("raw") or not isinstance(target, str) or (want.status, want.error) == (got.status, got.error):
        return None
    path = target.split("?")[0]
    m = re.match(r"/(\d+)[,/]", path)
    vid = int(m.group(1)) if m else None
    if step["method"] in ("PUT", "POST") and want.status == 201 and got.status == 404 and vid is not None:
        try:
            if json.loads(got.body).get("error") == f"volume {vid} not found":
                return "A1"
        except (ValueError, AttributeError):
            return None
    if got.status == 400 and vid is not None and vid > 0xFFFFFFFF:
        return "A3"
    if got.status == 400 and path.count("/") >= 4 and "," in path:
        return "A2"
    return None


class Judge:
    """Compares answers and counts what it let pass."""

    def __init__(self, scrub: Scrub) -> None:
        self.scrub = scrub
        self.tolerated: Counter[str] = Counter()

    def compare(self, step: Step, want: Answer, got: Answer) -> list[Difference]:
        """Differences of the answer from the recorded one; `want` is scrubbed already."""
        if name := departure(step, want, got):
            self.tolerated[f"departure {name}"] += 1
            return []
        out: list[Difference] = []
        for what, a, b in (
            ("transport", want.error or "answered", got.error or "answered"),
            ("1xx answers", want.interim, got.interim),
            ("status", want.status, got.status),
        ):
            if a != b:
                out.append((what, a, b))
        if want.status != got.status or want.status == 0:
            return out
        if want.version != got.version:
            out.append(("http version", want.version, got.version))
        if step.get("check") == "status":
            return out
        ignore = {h.lower() for h in step.get("ignore", ())}
        self._body(step, want, got, out, ignore)
        self._headers(step, want, got, out, ignore)
        return out

    # -- bodies
    def _body(self, step: Step, want: Answer, got: Answer, out: list[Difference], ignore: set[str]) -> None:
        wanted_json, got_json = self._json(want, lambda s: s), self._json(got, self.scrub)
        if wanted_json is not None:
            ignore.add("content-length")
            length = got.get("content-length")
            if length is not None and got.framing == "length" and length != str(len(got.body)):
                out.append(("content-length of its own body", length, len(got.body)))
        if step.get("check") == "headers":
            if len(want.body) != len(got.body):
                out.append(("body length", len(want.body), len(got.body)))
        elif wanted_json is not None:
            a, b = _plain_json(wanted_json), _plain_json(got_json)
            if step.get("gzvids") or str(step.get("target", "")).startswith("/status"):
                a, b = _drop_sizes(a), _drop_sizes(b)
            if a == b:
                return
            if step.get("gz") and _drop_gz(a) == _drop_gz(b):
                self.tolerated["compressor: JSON value"] += 1
            else:
                out.append(("json", a, b))
        else:
            self._bytes(step, want, got, out, ignore)

    def _bytes(self, step: Step, want: Answer, got: Answer, out: list[Difference], ignore: set[str]) -> None:
        a, b = want.body, got.body
        kind = want.get("content-type") or ""
        if kind.startswith("multipart/byteranges"):
            a, b = _without_boundary(a, kind), _without_boundary(b, got.get("content-type") or "")
        elif kind.startswith(("text/plain", "text/html")):
            b = self.scrub(b.decode("latin-1")).encode("latin-1", "replace")
        if a == b:
            return
        gzipped = (want.get("content-encoding") or "") == "gzip"
        if step.get("gz") and gzipped and want.status == 200 and _inflate(a) is not None and _inflate(a) == _inflate(b):
            self.tolerated["compressor: body"] += 1
            ignore.add("content-length")
        elif step.get("gz") and gzipped and want.get("content-range") is not None:
            self.tolerated["compressor: range body"] += 1
            ignore |= {"content-length", "content-range"}
        elif step.get("image") and image_info(a) and image_info(a) == image_info(b):
            ignore.add("content-length")
            distance = _image_distance(a, b)
            if distance <= IMAGE_TOLERANCE:
                self.tolerated["image encoder"] += 1
            else:
                out.append(("image pixels (mean difference)", 0, round(distance, 2)))
        elif step.get("image") and image_info(a):
            out.append(("image", image_info(a), image_info(b) or b[:40]))
        else:
            out.append(("body", a, b))

    @staticmethod
    def _json(answer: Answer, scrub: Scrub) -> Any:
        if "json" not in (answer.get("content-type") or ""):
            return None
        try:
            return json.loads(scrub(answer.body.decode("utf-8", "surrogateescape")))
        except ValueError:
            return None

    # -- headers
    def _headers(self, step: Step, want: Answer, got: Answer, out: list[Difference], ignore: set[str]) -> None:
        wanted, had = _by_name(want, lambda s: s), _by_name(got, self.scrub)
        for name in sorted(set(wanted) | set(had)):
            if name in ignore:
                continue
            a, b = wanted.get(name), had.get(name)
            if a is None or b is None:
                if step.get("gz") and name == "content-length" and want.get("content-encoding") == "gzip":
                    self.tolerated["compressor: header"] += 1
                else:
                    out.append((f"header {name}", a, b))
            elif not self._same_header(step, name, a, b, want):
                out.append((f"header {name}", a, b))

    def _same_header(self, step: Step, name: str, a: list[str], b: list[str], want: Answer) -> bool:
        if name == "date":
            return len(b) == 1 and imf_date(b[0]) is not None
        if name == "x-amz-request-id":
            return len(a) == len(b) and all(re.fullmatch(r"[0-9A-F]{23,25}", v) for v in b)
        if a == b:
            return True
        if name == "last-modified":
            times = [imf_date(a[0]), imf_date(b[0])]
            return len(a) == len(b) == 1 and all(t and abs(t - time.time()) < CLOCK_SLACK_S for t in times)
        if name == "content-type" and a[0].startswith("multipart/byteranges"):
            return b[0].startswith("multipart/byteranges")
        if name == "content-length" and step.get("image") and step.get("method") == "HEAD":
            self.tolerated["image encoder"] += 1
            return True
        if name == "content-range" and step.get("image") and a[0].split("/")[0] == b[0].split("/")[0]:
            self.tolerated["image encoder"] += 1
            return True
        if step.get("gz") and name in ("etag", "content-length", "content-range"):
            gzipped = want.get("content-encoding") == "gzip"
            if name == "etag" or gzipped or want.status in (206, 416) or step.get("method") == "HEAD":
                self.tolerated["compressor: header"] += 1
                return True
        return False


def _plain_json(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        drop = DISK_FIGURES if key == "DiskStatuses" else set()
        return {k: "*" if k in drop or k == "ModifiedAtSecond" else _plain_json(v, k) for k, v in value.items()}
    if isinstance(value, list):
        items = [_plain_json(v, key) for v in value]
        return sorted(items, key=lambda v: v.get("Id", 0)) if key == "Volumes" else items
    return value


def _drop_sizes(value: Any) -> Any:
    """/status while volumes hold text that the server compressed itself."""
    if isinstance(value, dict) and isinstance(value.get("Volumes"), list):
        slim = [{k: v for k, v in x.items() if k not in ("Size", "DeletedByteCount")} for x in value["Volumes"]]
        return dict(value, Volumes=slim)
    return value


def _drop_gz(value: Any) -> Any:
    if isinstance(value, dict):
        drop = {"eTag", "size", "Size", "DeletedByteCount"}
        return {k: _drop_gz(v) for k, v in value.items() if k not in drop}
    return [_drop_gz(v) for v in value] if isinstance(value, list) else value


def _by_name(answer: Answer, scrub: Scrub) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for k, v in answer.headers:
        out.setdefault(k.lower(), []).append(scrub(v))
    return {k: sorted(v) for k, v in out.items()}


def _without_boundary(body: bytes, kind: str) -> bytes:
    m = re.search(r'boundary="?([^";]+)"?', kind)
    return body.replace(m.group(1).encode("latin-1"), b"{BOUNDARY}") if m else body


def _inflate(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


def image_info(data: bytes) -> tuple[str, int, int] | None:
    """Format, width and height in pixels; None if it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as im:
            return (im.format or "").lower(), im.width, im.height
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


def _image_distance(a: bytes, b: bytes) -> float:
    from PIL import Image, ImageChops, ImageStat

    with Image.open(io.BytesIO(a)) as first, Image.open(io.BytesIO(b)) as second:
        diff = ImageChops.difference(first.convert("RGBA"), second.convert("RGBA"))
    return float(sum(ImageStat.Stat(diff).mean) / 4)


def brief(value: Any) -> str:
    """A value in a form short enough for a report."""
    if isinstance(value, bytes) and len(value) > 160:
        return f"{value[:70]!r}...({len(value)} bytes)...{value[-40:]!r}"
    text = repr(value)
    return text if len(text) <= 400 else text[:300] + f"...({len(text)} characters)"
