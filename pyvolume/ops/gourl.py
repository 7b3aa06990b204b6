"""Paths of URLs as Go's net/url and net/http see and write them. Must not import anything of ops, storage or server."""

from __future__ import annotations

from urllib.parse import quote

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
