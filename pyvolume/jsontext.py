"""JSON texts of others, read so that every text in them can be written again.

Leaf: must not import cli, server, ops or storage.
"""

from __future__ import annotations

import json
import re
from typing import Any

_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_HALVES = re.compile("[\ud800-\udfff]")


def loads(text: str) -> Any:
    """json.loads, but half a surrogate pair (`"\\ud800"`) becomes U+FFFD as in Go, where Python would keep what no
    encoding can write. Raises ValueError, RecursionError."""
    value = json.loads(text)
    return _whole(value) if _HALF_ESCAPE.search(text) else value


def _whole(value: Any) -> Any:
    match value:
        case str():
            return _HALVES.sub("\ufffd", value)
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {_HALVES.sub("\ufffd", key): _whole(item) for key, item in value.items()}
        case _:
            return value
