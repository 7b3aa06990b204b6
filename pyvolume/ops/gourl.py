"""URLs as Go's net/url and net/http see and write them. Must not import anything of ops, storage or server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from pyvolume.types import go_quote

_LETTERS_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_KEPT = "$&+,/:;=@~"  # besides letters, digits and - _ . these stay as they are when a path is encoded
_VALID = frozenset(_LETTERS_DIGITS + b"-_.~$&+,/:;=@!'()*[]%")  # may stand in a path that is left as it was sent


def encode_path(path: bytes) -> str:
    """A decoded path, percent-encoded."""
    return quote(path, safe=_KEPT)


def escaped_path(raw: bytes, path: bytes) -> str:
    """The encoded form of a path that came in as `raw` and is `path` decoded: as sent where that is valid, else encoded
    anew."""
    return raw.decode("ascii") if _VALID.issuperset(raw) else encode_path(path)


def clean_path(path: str) -> str:
    """One slash between elements, `.` and `..` resolved, a slash at the end kept."""
    kept: list[str] = []
    for element in path.split("/"):
        if element == "..":
            if kept:
                kept.pop()
        elif element not in ("", "."):
            kept.append(element)
    cleaned = "/" + "/".join(kept)
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned


def redirect_for(raw: bytes, path: bytes, unclean: bool) -> str | None:
    """Where a request for an unclean path is sent, encoded; None for a clean one.

    unclean: whether `raw` itself has empty or dot elements. Quirk: the cleaned path is encoded although it is encoded
    already, so `%41` comes out as `%2541`; and a path with invalid bytes is cleaned in its decoded form, where `%2f` is
    a slash and `%2e` a dot.
    """
    if not unclean and _VALID.issuperset(raw):
        return None
    escaped = escaped_path(raw, path)
    cleaned = clean_path(escaped)
    return None if cleaned == escaped else encode_path(cleaned.encode("ascii"))


# ------------------------------------------------------------------------------------- URLs in settings and requests

_SUB_DELIMITERS = "!$&'()*+,;="
_HOST_CHARS = frozenset("-_.~" + _SUB_DELIMITERS + ':[]<>"' + _LETTERS_DIGITS.decode("ascii"))
_USER_CHARS = frozenset("-._:~%@" + _SUB_DELIMITERS + _LETTERS_DIGITS.decode("ascii"))
_HEX = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class SplitUrl:
    """A URL taken apart. scheme is in small letters; host has no brackets, and `%25` is `%`; port is "" when absent;
    path is as it was written, without query and fragment."""

    scheme: str
    host: str
    port: str
    path: str


def split_url(raw: str) -> SplitUrl:
    """Takes a URL apart as Go's url.Parse does. Raises ValueError with its text, which quotes the URL."""
    try:
        return _split_url(raw)
    except ValueError as exc:
        raise ValueError(f"parse {go_quote(raw)}: {exc}") from None


def _split_url(raw: str) -> SplitUrl:
    if any(ch < " " or ch == "\x7f" for ch in raw):
        raise ValueError("net/url: invalid control character in URL")
    scheme, rest = _scheme(raw.partition("#")[0])
    rest = rest.partition("?")[0]
    host = port = ""
    if not rest.startswith("/"):
        if scheme:
            return SplitUrl(scheme, "", "", "")  # "opaque", as in mailto:x
        if ":" in rest.partition("/")[0]:
            raise ValueError("first path segment in URL cannot contain colon")
    elif rest.startswith("//") and (scheme or not rest.startswith("///")):
        authority, slash, path = rest[2:].partition("/")
        rest = slash + path
        user, at, place = authority.rpartition("@")
        if at and not _USER_CHARS.issuperset(user):
            raise ValueError("net/url: invalid userinfo")
        _check_escapes(user)
        host, port = _host_and_port(place)
    _check_escapes(rest)
    return SplitUrl(scheme, host, port, rest)


def _scheme(raw: str) -> tuple[str, str]:
    for at, ch in enumerate(raw):
        if ch == ":":
            if at == 0:
                raise ValueError("missing protocol scheme")
            return raw[:at].lower(), raw[at + 1 :]
        if not (ch.isascii() and ch.isalpha()) and (at == 0 or ch not in "0123456789+-."):
            break
    return "", raw


def _host_and_port(place: str) -> tuple[str, str]:
    if place.startswith("["):
        end = place.rfind("]")
        if end < 0:
            raise ValueError("missing ']' in host")
        host, rest = place[1:end], place[end + 1 :]
    else:
        at = place.rfind(":")
        host, rest = (place[:at], place[at:]) if at >= 0 else (place, "")
    if rest and not (rest[0] == ":" and all(ch in "0123456789" for ch in rest[1:])):
        raise ValueError(f"invalid port {go_quote(rest)} after host")
    _check_escapes(host, in_host=True)
    bad = next((ch for ch in host if ch.isascii() and ch != "%" and ch not in _HOST_CHARS), None)
    if bad is not None:
        raise ValueError(f"invalid character {go_quote(bad)} in host name")
    return unquote(host, "utf-8", "surrogateescape"), rest[1:]


def _check_escapes(text: str, *, in_host: bool = False) -> None:
    """In a host only bytes that ASCII cannot say may be escaped, and `%`."""
    at = -1
    while (at := text.find("%", at + 1)) >= 0:
        digits = text[at + 1 : at + 3]
        wrong = len(digits) < 2 or not _HEX.issuperset(digits)
        if wrong or (in_host and digits[0] in "01234567" and digits != "25"):
            raise ValueError(f"invalid URL escape {go_quote(text[at : at + 3])}")
