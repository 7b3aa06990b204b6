"""What a query asks of a picture (contract http.md 6.9); ops.images does it. Must not import server or storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RESIZABLE = frozenset((".png", ".jpg", ".jpeg", ".gif", ".webp"))
CROPPABLE = frozenset((".png", ".jpg", ".jpeg", ".gif"))


@dataclass(frozen=True)
class Operation:
    """What a query asks of a picture. `resize` and `crop` say whether there is anything to do for this extension."""

    width: int = 0
    height: int = 0
    mode: str = ""
    x1: int = 0
    y1: int = 0
    x2: int = 0
    y2: int = 0

    @property
    def resize(self) -> bool:
        return self.width > 0 or self.height > 0

    @property
    def crop(self) -> bool:
        return self.x1 >= 0 and self.y1 >= 0 and self.x2 > self.x1 and self.y2 > self.y1

    def __bool__(self) -> bool:
        return self.resize or self.crop


NOTHING = Operation()

QUERY_KEYS = frozenset(("width", "height", "crop_x1", "crop_y1", "crop_x2", "crop_y2"))


def _number(text: str) -> int:
    """Go's Atoi with its error ignored: optional sign and ASCII digits within 64 bits, anything else is 0."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()):
        return 0
    if len(digits) > 19:
        digits = digits.lstrip("0") or "0"
        if len(digits) > 19:
            return 0
    value = -int(digits) if text[0] == "-" else int(digits)
    return value if -(1 << 63) <= value < 1 << 63 else 0


def operation(ext: str, query: Mapping[str, str]) -> Operation:
    """Reads the parameters that count for this extension (compared as given: callers lower it where upstream does)."""
    if not query or QUERY_KEYS.isdisjoint(query):
        return NOTHING
    resizable, croppable = ext in RESIZABLE, ext in CROPPABLE
    if not resizable:
        return NOTHING
    width, height = _number(query.get("width", "")), _number(query.get("height", ""))
    corners = [0, 0, 0, 0]
    if croppable:
        corners = [_number(query.get(f"crop_{name}", "")) for name in ("x1", "y1", "x2", "y2")]
    return Operation(width, height, query.get("mode", ""), *corners)
