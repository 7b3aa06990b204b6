"""Version texts: what we report to clients, and our own number.

Leaf: imports nothing of the package, so that anything may import it.
"""

from __future__ import annotations

VERSION = "4.44"
"""The SeaweedFS release whose behaviour this server has; clients and masters see it."""

PYVOLUME_VERSION = "0.1.0"
"""Our own release number (the one in pyproject.toml)."""

_SIZE_TAGS = {4: "30GB", 5: "8000GB"}


def size_tag(width: int) -> str:
    """The label of an offset width of 4 or 5 bytes. ValueError for any other width."""
    try:
        return _SIZE_TAGS[width]
    except KeyError:
        raise ValueError(f"offset width must be 4 or 5, not {width}") from None


def version_text(width: int = 4) -> str:
    """`30GB 4.44`: what the Server header and the version command show."""
    return f"{size_tag(width)} {VERSION}"


def full_version(width: int = 4) -> str:
    """`30GB 4.44 `: version, blank, commit. The commit is empty, so the text ends with a blank, as upstream's does."""
    return f"{version_text(width)} "


def server_header(width: int = 4) -> str:
    """Value of the HTTP `Server` header."""
    return f"SeaweedFS Volume {version_text(width)}"


SERVER_HEADER = server_header(4)
