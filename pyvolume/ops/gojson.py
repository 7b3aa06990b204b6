"""JSON as Go's encoding/json writes it, for every JSON answer of the HTTP ports.

Promises: compact text without a newline; `<`, `>`, `&`, U+2028 and U+2029 in strings appear as backslash-u escapes;
every byte that is no UTF-8 becomes one U+FFFD; keys keep the order they are given in (callers that stand for a Go map
sort them). Must not import anything of ops, storage or server.
"""

from __future__ import annotations

import codecs
import json
import struct
from typing import Any

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def _each_byte(exc: UnicodeError) -> tuple[str, int]:
    """Error handler of Go's decoder: it steps over one bad byte at a time, Python's over a whole bad sequence."""
    if isinstance(exc, UnicodeDecodeError):
        return "\ufffd" * (exc.end - exc.start), exc.end
    raise exc


codecs.register_error("pyvolume.each-byte", _each_byte)


def utf8(raw: bytes) -> str:
    """Bytes of a header, path or name as text for a JSON string; what is no UTF-8 becomes U+FFFD as in Go."""
    return raw.decode("utf-8", "pyvolume.each-byte")


def dumps(value: Any, pretty: bool = False) -> bytes:
    """Serialise dicts, lists, str, int, float, bool and None. Texts may hold surrogate escapes (undecodable bytes)."""
    if pretty:
        text = json.dumps(value, ensure_ascii=False, indent=2)
    else:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.translate(_ESCAPES)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return utf8(text.encode("utf-8", "surrogateescape")).encode()


def error(text: str, pretty: bool = False) -> bytes:
    """`{"error":"..."}`."""
    return dumps({"error": text}, pretty)


def float32(value: float) -> float:
    """The double whose shortest text equals Go's shortest text of `value` rounded to 32 bits (29.281769)."""
    single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 10):
        short = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == single:
            return short
    return single
