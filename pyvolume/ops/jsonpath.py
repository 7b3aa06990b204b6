"""JSON values out of loose text, and paths into them, as upstream's queries read them.

Must not import server or storage. Upstream uses a lenient reader (`github.com/tidwall/gjson`): text is not validated,
what is no value is skipped, a container that is cut off counts up to the end. Its paths are followed for names, `\\`
escapes, `*` and `?` in names, array indexes, `#`, `#.rest`, `#(query)`, `#(query)#` and `|`. Its modifiers (`@…`),
literals (`!…`) and multipaths (`{…}`, `[…]`) find nothing here.

Everything works on bytes. Nothing recurses deeper than MAX_DEPTH, nothing takes more than time in proportion to the
text for each part of a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

MAX_DEPTH: Final = 100
"""Parts of a path, and `#` within `#`; behind that nothing is found."""

_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[{\[(]|[}\])]', re.DOTALL)
_CONTAINER: Final = re.compile(rb"[{\[]")
_KEY_OR_END: Final = re.compile(rb'["}]')
_VALUE: Final = re.compile(rb'["{\[tfn+\-0-9iIN]')
_VALUE_OR_END: Final = re.compile(rb'["{\[\]tfn+\-0-9iIN]')
_NUMBER: Final = re.compile(rb".[^\x00-\x20,\]}]*", re.DOTALL)
_LITERAL: Final = re.compile(rb"[tfn][a-z]*")
_FLOAT: Final = re.compile(
    rb"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE
)
_HEX_FLOAT: Final = re.compile(rb"[+-]?0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)p[+-]?[0-9]+", re.IGNORECASE)
_ESCAPES: Final = {
    0x5C: b"\\",
    0x2F: b"/",
    0x62: b"\b",
    0x66: b"\f",
    0x6E: b"\n",
    0x72: b"\r",
    0x74: b"\t",
    0x22: b'"',
}
_MAX_INDEX_DIGITS: Final = 18


class Kind(Enum):
    """What a value is. CONTAINER: an object or array."""

    NULL = "null"
    FALSE = "false"
    NUMBER = "number"
    STRING = "string"
    TRUE = "true"
    CONTAINER = "container"


class Value(NamedTuple):
    """A value as it stands in the text. `text`: a string unescaped; `number`: 0.0 for what is none."""

    kind: Kind
    raw: bytes
    text: bytes = b""
    number: float = 0.0


def values(data: bytes) -> Iterator[Value]:
    """The values that stand in the text one after the other, however they are separated.

    A string that does not end is the end.
    """
    at = 0
    while (start := _VALUE.search(data, at)) is not None:
        value, at = _read(data, start.start())
        if value is None:
            return
        yield value


def parse_float(text: bytes) -> float:
    """The number that all of the text is, as Go's ParseFloat reads it; 0.0 if it is none."""
    if _FLOAT.fullmatch(text):
        return float(text)
    if _HEX_FLOAT.fullmatch(text):
        try:
            return float.fromhex(text.decode("ascii"))
        except OverflowError:
            return float("-inf" if text.startswith(b"-") else "inf")
    return 0.0


def _read(data: bytes, at: int) -> tuple[Value | None, int]:
    """The value that begins here, and where it ends (see _squash); None for a string without an end."""
    first = data[at]
    if first == 0x22:
        whole = _STRING.match(data, at)
        if whole is None:
            return None, len(data)
        raw = whole[0]
        return Value(Kind.STRING, raw, unescape(raw[1:-1])), whole.end()
    if first in b"{[":
        end = _squash(data, at)
        return Value(Kind.CONTAINER, data[at:end]), end
    if first in b"tf" or (first == 0x6E and data[at + 1 : at + 2] in (b"u", b"")):
        word = _LITERAL.match(data, at)
        assert word is not None
        kind = Kind.TRUE if first == 0x74 else Kind.FALSE if first == 0x66 else Kind.NULL
        return Value(kind, word[0]), word.end()
    number = _NUMBER.match(data, at)
    assert number is not None
    return Value(Kind.NUMBER, number[0], b"", parse_float(number[0])), number.end()


def _squash(data: bytes, at: int) -> int:
    """Where the container that begins here ends; brackets of all kinds count alike.

    Behind the end of the text for one that is cut off within a string.
    """
    depth = 0
    token = None
    for token in _BRACKETS.finditer(data, at):
        char = data[token.start()]
        if char == 0x22:
            continue
        depth += 1 if char in b"{[(" else -1
        if depth == 0:
            return token.end()
    is_cut = token is not None and data[token.start()] == 0x22 and _STRING.fullmatch(token[0]) is None
    return len(data) + is_cut


def unescape(text: bytes) -> bytes:
    """The inside of a string. Stops at what cannot be: a control character, an unknown or broken escape."""
    if b"\\" not in text:
        return text
    out = bytearray()
    at, end = 0, len(text)
    while at < end:
        byte = text[at]
        if byte < 0x20:
            break
        if byte != 0x5C:
            out.append(byte)
            at += 1
            continue
        escape = text[at + 1] if at + 1 < end else 0
        if escape in _ESCAPES:
            out += _ESCAPES[escape]
            at += 2
        elif escape == 0x75 and at + 6 <= end:
            code, at = _hex4(text, at + 2), at + 6
            if 0xD800 <= code < 0xE000:
                low = _hex4(text, at + 2) if text[at : at + 2] == b"\\u" and at + 6 <= end else 0
                at += 6 if text[at : at + 2] == b"\\u" and at + 6 <= end else 0
                is_pair = code < 0xDC00 and 0xDC00 <= low < 0xE000
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) if is_pair else 0xFFFD
            out += chr(code).encode("utf-8")
        else:
            break
    return bytes(out)


def _hex4(text: bytes, at: int) -> int:
    try:
        digits = text[at : at + 4].decode("ascii")
        return int(digits, 16) if digits.isalnum() else 0
    except ValueError:
        return 0


# --------------------------------------------------------------------------------------------------------------- paths


_NO_MATCH: Final = Value(Kind.CONTAINER, b"[]")
"""What `#(query)#.rest` gives when no element fits. Quirk: a `|` behind it is not followed then."""


class _CutString(Exception):
    """An array is cut off within a string."""


def get(raw: bytes, path: bytes) -> Value | None:
    """What the path leads to within the first container of the text; None if it leads nowhere."""
    return _get(raw, path, MAX_DEPTH)


def _get(raw: bytes, path: bytes, depth: int) -> Value | None:
    steps = _split_pipes(path)
    if len(steps) > MAX_DEPTH:
        return None
    found: Value | None = None
    for number, step in enumerate(steps):
        if number:
            if found is None:
                return None
            raw = found.raw
        start = _CONTAINER.search(raw)
        found = None if start is None else _descend(raw, start.start(), step, depth)
        if found is _NO_MATCH:
            return found
    return found


@lru_cache(maxsize=512)
def _split_pipes(path: bytes) -> tuple[bytes, ...]:
    """A path at its `|`, but for those that are escaped or stand within a query."""
    if b"|" not in path:
        return (path,)
    parts, start, at, end = [], 0, 0, len(path)
    while at < end:
        char = path[at]
        if char == 0x5C:
            at += 2
            continue
        if char == 0x23 and path[at + 1 : at + 2] in (b"(", b"["):
            at = _query_end(path, at)[0]
            continue
        if char == 0x7C:
            parts.append(path[start:at])
            start = at + 1
        at += 1
    return (*parts, path[start:])


def _descend(data: bytes, at: int, path: bytes, depth: int) -> Value | None:
    """Follows a path without pipes into the container that begins here."""
    if depth <= 0:
        return None
    if data[at] == 0x7B:
        return _in_object(data, at, path, depth)
    return _in_array(data, at, path, depth)


def _in_object(data: bytes, at: int, path: bytes, depth: int) -> Value | None:
    """Names may come again: the first whose value the rest of the path fits counts."""
    name, glob, rest = _object_part(path)
    at += 1
    while (token := _KEY_OR_END.search(data, at)) is not None:
        if data[token.start()] == 0x7D:
            return None
        key_match = _STRING.match(data, token.start())
        if key_match is None:
            return None
        start = _VALUE.search(data, key_match.end())
        if start is None:
            return None
        key = key_match[0][1:-1]
        key = unescape(key) if b"\\" in key else key
        fits = key == name if glob is None else glob.matches(key)
        value_at = start.start()
        value, at = _read(data, value_at)
        if value is None:
            return None
        if fits and rest is None:
            return value
        if fits and rest is not None and value.kind is Kind.CONTAINER:
            found = _descend(value.raw, 0, rest, depth - 1)
            if found is not None:
                return found
    return None


def _elements(data: bytes, at: int) -> Iterator[Value]:
    """The elements of an array that begins here; one that is cut off ends with the text.

    Raises _CutString behind those that come before a string without an end, or behind the one that ends within it.
    """
    at += 1
    while (start := _VALUE_OR_END.search(data, at)) is not None and data[start.start()] != 0x5D:
        value, at = _read(data, start.start())
        if value is None:
            raise _CutString
        yield value
        if at > len(data):
            raise _CutString


def _in_array(data: bytes, at: int, path: bytes, depth: int) -> Value | None:
    try:
        return _step_into(data, at, _array_part(path), depth)
    except _CutString:
        return None  # what has to see all elements finds nothing


def _step_into(data: bytes, at: int, step: _ArrayPart, depth: int) -> Value | None:
    if step.query is not None:
        return _matching(data, at, step, step.query, depth)
    if step.is_count:
        if step.rest is None:
            count = sum(1 for _ in _elements(data, at))
            return Value(Kind.NUMBER, b"%d" % count, b"", float(count))
        parts = []
        for value in _elements(data, at):
            found = _get(value.raw, step.rest, depth - 1)
            if found is not None:
                parts.append(found.raw)
        return Value(Kind.CONTAINER, b"[" + b",".join(parts) + b"]")
    if step.element < 0:
        return None
    for number, value in enumerate(_elements(data, at)):
        if number < step.element:
            continue
        if step.rest is None:
            return value
        return _descend(value.raw, 0, step.rest, depth - 1) if value.kind is Kind.CONTAINER else None
    return None


def _matching(data: bytes, at: int, step: _ArrayPart, query: Query, depth: int) -> Value | None:
    """Elements that a query picks: the first, or all of them as an array."""
    raws, matched = [], False
    for value in _elements(data, at):
        if value.kind is Kind.CONTAINER:
            subject = _get(value.raw, query.path, depth - 1)
        elif query.path:
            continue
        else:
            subject = value
        if not query.picks(subject):
            continue
        matched = True
        found = value if step.rest is None else _get(value.raw, step.rest, depth - 1)
        if not step.takes_all:
            return found
        if found is not None:
            raws.append(found.raw)
    if not step.takes_all:
        return None
    if not matched and step.rest is not None:
        return _NO_MATCH
    return Value(Kind.CONTAINER, b"[" + b",".join(raws) + b"]")


# ------------------------------------------------------------------------------------------------------ parts of paths


@lru_cache(maxsize=512)
def _object_part(path: bytes) -> tuple[bytes, Glob | None, bytes | None]:
    """(name, pattern if it has wildcards, the rest behind the next dot)."""
    name, wild, at, end = bytearray(), False, 0, len(path)
    while at < end:
        char = path[at]
        if char == 0x2E:
            return bytes(name), Glob(bytes(name)) if wild else None, path[at + 1 :]
        if char == 0x5C:
            at += 1
            name += path[at : at + 1]
        else:
            wild = wild or char in b"*?"
            name.append(char)
        at += 1
    return bytes(name), Glob(bytes(name)) if wild else None, None


class _ArrayPart(NamedTuple):
    element: int = -1
    rest: bytes | None = None
    is_count: bool = False
    query: Query | None = None
    takes_all: bool = False


@lru_cache(maxsize=512)
def _array_part(path: bytes) -> _ArrayPart:
    if path[:2] in (b"#(", b"#["):
        end, query = _query_end(path, 0)
        if query is None:
            return _ArrayPart()
        takes_all = path[end : end + 1] == b"#"
        part, dot, rest = path[end + takes_all :].partition(b".")
        return _ArrayPart(query=query, takes_all=takes_all, rest=rest if dot else None)
    part, dot, tail = path.partition(b".")
    behind = tail if dot else None
    if part == b"#":
        return _ArrayPart(is_count=True, rest=behind)
    if part.isdigit() and len(part) <= _MAX_INDEX_DIGITS:
        return _ArrayPart(element=int(part), rest=behind)
    return _ArrayPart(rest=behind)


class Query(NamedTuple):
    """`path operator value`, as it stands in `#(…)`."""

    path: bytes
    operator: str
    value: bytes

    def picks(self, subject: Value | None) -> bool:
        """Whether a value fits."""
        if self.value.startswith(b"~"):
            return self._picks_by_truth(subject)
        return compare(subject, self.operator, self.value)

    def _picks_by_truth(self, subject: Value | None) -> bool:
        tests = {b"*": subject is not None, b"null": subject is None or subject.kind is Kind.NULL}
        tests[b"true"], tests[b"false"] = _truth(subject)
        told = tests.get(self.value[1:])
        if told is None:
            return False
        return compare(Value(Kind.TRUE if told else Kind.FALSE, b"x"), self.operator, b"true")


def _truth(value: Value | None) -> tuple[bool, bool]:
    """(counts as true, counts as false)."""
    if value is None or value.kind in (Kind.NULL, Kind.FALSE):
        return False, True
    if value.kind is Kind.TRUE:
        return True, False
    if value.kind is Kind.NUMBER:
        return value.number != 0, value.number == 0
    if value.kind is Kind.STRING:
        word = value.text.lower()
        return word in (b"1", b"t", b"true"), word in (b"0", b"f", b"false")
    return False, False


def _query_end(path: bytes, at: int) -> tuple[int, Query | None]:
    """Where the `#(…)` that begins here ends, and what it asks; None if it does not end."""
    start = at + 2
    at, depth, operator_at, end = start, 1, 0, len(path)
    while at < end:
        char = path[at]
        if depth == 1 and not operator_at and char in b"!=<>%":
            operator_at = at
        elif char == 0x5C:
            at += 1
        elif char in b"[(":
            depth += 1
        elif char in b"])":
            depth -= 1
            if depth == 0:
                break
        elif char == 0x22:
            quoted = _STRING.match(path, at)
            at = end if quoted is None else quoted.end() - 1
        at += 1
    if at >= end:
        return end, None
    if not operator_at:
        return at + 1, Query(path[start:at].strip(_BLANKS), "", b"")
    comparison = path[operator_at:at].strip(_BLANKS)
    if comparison[:2] in (b"!=", b"!%", b"<=", b">=", b"=="):
        operator, value = comparison[:2], comparison[2:]
    else:
        operator, value = comparison[:1], comparison[1:]
    value = value.strip(_BLANKS)
    if len(value) >= 2 and value[0] == 0x22 and value[-1] == 0x22:
        value = unescape(value[1:-1])
    name = "=" if operator == b"==" else operator.decode("ascii")
    return at + 1, Query(path[start:operator_at].strip(_BLANKS), name, value)


_BLANKS: Final = bytes(range(0x21))


# --------------------------------------------------------------------------------------------------------- comparisons


def compare(subject: Value | None, operator: str, operand: bytes) -> bool:
    """Whether a value passes a filter. No operator: whether there is one.

    Strings compare byte-wise, `%` and `!%` match them with wildcards; numbers compare with the operand as a number (0
    if it is none); true and false know a few operators of their own; null and containers pass none.
    """
    if subject is None:
        return False
    if not operator:
        return True
    match subject.kind:
        case Kind.STRING:
            if operator in ("%", "!%"):
                return Glob(operand).matches(subject.text) is (operator == "%")
            return _ordered(subject.text, operator, operand)
        case Kind.NUMBER:
            return _ordered(subject.number, operator, parse_float(operand))
        case Kind.TRUE:
            if operator == ">":
                return operand == b"false"
            return operator == ">=" or (operator in ("=", "!=") and (operand == b"true") is (operator == "="))
        case Kind.FALSE:
            if operator == "<":
                return operand == b"true"
            return operator == "<=" or (operator in ("=", "!=") and (operand == b"false") is (operator == "="))
        case _:
            return False


def _ordered(left: bytes | float, operator: str, right: bytes | float) -> bool:
    match operator:
        case "=":
            return left == right
        case "!=":
            return left != right
        case "<":
            return left < right  # type: ignore[operator]  # both are of one kind
        case "<=":
            return left <= right  # type: ignore[operator]
        case ">":
            return left > right  # type: ignore[operator]
        case ">=":
            return left >= right  # type: ignore[operator]
        case _:
            return False


class Glob:
    """A pattern with `*` for any run of characters, `?` for one, `\\` before one that is meant as it is.

    Matching takes time in proportion to text times pattern at worst, whatever the pattern: the pieces between the stars
    are looked for from left to right.
    """

    def __init__(self, pattern: bytes) -> None:
        self._pieces: list[re.Pattern[str]] = []
        self._never = False
        expressions = [""]
        text = pattern.decode("utf-8", "surrogateescape")
        at = 0
        while at < len(text):
            char = text[at]
            if char == "*":
                expressions.append("")
            elif char == "?":
                expressions[-1] += "."
            else:
                if char == "\\":
                    at += 1
                    if at == len(text):
                        self._never = True
                        break
                    char = text[at]
                expressions[-1] += re.escape(char)
            at += 1
        self._pieces = [re.compile(expression, re.DOTALL) for expression in expressions]
        self._last = re.compile(f"(?:{expressions[-1]})\\Z", re.DOTALL)

    def matches(self, text: bytes) -> bool:
        """Whether all of the text fits."""
        if self._never:
            return False
        subject = text.decode("utf-8", "surrogateescape")
        first, *middle = self._pieces
        if not middle:
            return first.fullmatch(subject) is not None
        start = first.match(subject)
        if start is None:
            return False
        at = start.end()
        for piece in middle[:-1]:
            found = piece.search(subject, at)
            if found is None:
                return False
            at = found.end()
        return self._last.search(subject, max(at, 0)) is not None
