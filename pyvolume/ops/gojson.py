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

from pyvolume import jsontext

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


_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"
_BLANKS = b" \t\r\n"
_MAX_DEPTH = 10_000


class _Syntax(Exception):
    """Carries the text of Go's SyntaxError."""


class _Scanner:
    """Finds the first place where Go's scanner stops, for the sake of its words. Used on broken input only."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _peek(self) -> int:
        if self._at >= len(self._data):
            raise _Syntax("unexpected end of JSON input")
        return self._data[self._at]

    def _bad(self, byte: int, context: str) -> _Syntax:
        shown = {0x27: "'\\''", 0x22: "'\"'"}.get(byte) or _quoted(byte)
        return _Syntax(f"invalid character {shown} {context}")

    def _skip(self) -> None:
        while self._at < len(self._data) and self._data[self._at] in _BLANKS:
            self._at += 1

    def check(self) -> None:
        """Walks the whole text with a stack of its own; nesting deeper than Go allows ends it too."""
        stack: list[int] = []
        while True:
            self._skip()
            byte = self._peek()
            if byte in b"{[":
                self._at += 1
                stack.append(byte)
                if len(stack) > _MAX_DEPTH:
                    raise _Syntax("exceeded max depth")
                self._skip()
                if byte == 0x7B:
                    if self._peek() != 0x7D:
                        self._key()
                        continue
                elif self._peek() != 0x5D:
                    continue
                self._at += 1
                stack.pop()
            else:
                self._scalar(byte)
            while stack:
                self._skip()
                byte = self._peek()
                if stack[-1] == 0x7B:
                    if byte == 0x2C:
                        self._at += 1
                        self._skip()
                        self._key()
                        break
                    if byte != 0x7D:
                        raise self._bad(byte, "after object key:value pair")
                elif byte == 0x2C:
                    self._at += 1
                    break
                elif byte != 0x5D:
                    raise self._bad(byte, "after array element")
                self._at += 1
                stack.pop()
            else:
                self._skip()
                if self._at < len(self._data):
                    raise self._bad(self._data[self._at], "after top-level value")
                return

    def _key(self) -> None:
        if self._peek() != 0x22:
            raise self._bad(self._peek(), "looking for beginning of object key string")
        self._string()
        self._skip()
        if self._peek() != 0x3A:
            raise self._bad(self._peek(), "after object key")
        self._at += 1

    def _scalar(self, byte: int) -> None:
        if byte == 0x22:
            self._string()
        elif byte == 0x2D or byte in _DIGITS:
            self._number()
        elif byte in b"tfn":
            self._word({0x74: b"true", 0x66: b"false", 0x6E: b"null"}[byte])
        else:
            raise self._bad(byte, "looking for beginning of value")

    def _word(self, word: bytes) -> None:
        for wanted in word:
            if self._peek() != wanted:
                raise self._bad(self._peek(), f"in literal {word.decode()} (expecting {_quoted(wanted)})")
            self._at += 1

    def _string(self) -> None:
        self._at += 1
        while True:
            byte = self._peek()
            if byte < 0x20:
                raise self._bad(byte, "in string literal")
            self._at += 1
            if byte == 0x22:
                return
            if byte != 0x5C:
                continue
            escape = self._peek()
            self._at += 1
            if escape == 0x75:
                for _ in range(4):
                    if self._peek() not in _HEX:
                        raise self._bad(self._peek(), "in \\u hexadecimal character escape")
                    self._at += 1
            elif escape not in b'bfnrt\\/"':
                raise self._bad(escape, "in string escape code")

    def _number(self) -> None:
        if self._peek() == 0x2D:
            self._at += 1
        if self._peek() not in _DIGITS:
            raise self._bad(self._peek(), "in numeric literal")
        if self._peek() == 0x30:
            self._at += 1
        else:
            self._digits()
        if self._data[self._at : self._at + 1] == b".":
            self._at += 1
            if self._peek() not in _DIGITS:
                raise self._bad(self._peek(), "after decimal point in numeric literal")
            self._digits()
        if self._data[self._at : self._at + 1] in (b"e", b"E"):
            self._at += 1
            if self._peek() in b"+-":
                self._at += 1
            if self._peek() not in _DIGITS:
                raise self._bad(self._peek(), "in exponent of numeric literal")
            self._digits()

    def _digits(self) -> None:
        while self._at < len(self._data) and self._data[self._at] in _DIGITS:
            self._at += 1


def _quoted(byte: int) -> str:
    """One byte as Go quotes a character in such a text."""
    names = {7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r", 0x5C: "\\\\"}
    if byte in names:
        return f"'{names[byte]}'"
    if byte < 0x20 or byte == 0x7F:
        return f"'\\x{byte:02x}'"
    if 0x80 <= byte < 0xA0 or byte == 0xAD:
        return f"'\\u{byte:04x}'"
    return f"'{chr(byte)}'"


def loads(data: bytes) -> Any:
    """Parses JSON. Raises ValueError with the text of Go's syntax error (`unexpected end of JSON input`).

    As in Go, bad UTF-8 in strings becomes U+FFFD, as does half a surrogate pair, and is no error. Words for values that
    do not fit a field are the caller's business.
    """
    try:
        _Scanner(data).check()
    except _Syntax as exc:
        raise ValueError(str(exc)) from None
    return jsontext.loads(utf8(data))
