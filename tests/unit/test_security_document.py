"""docs/SECURITY.md promises what tests show; and promises that have no better place."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from pathlib import Path

import pytest
from tls_helpers import HOST, Authority, https_settings

from pyvolume.server.tls import TlsSocket, client_context, server_context

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "SECURITY.md").read_text()
REFERENCES = sorted(set(re.findall(r"`((?:unit|conformance|property)/\w+\.py)(?:::(\w+))?`", DOCUMENT)))


@pytest.mark.parametrize(("path", "name"), REFERENCES)
def test_each_promise_names_a_test_that_exists(path: str, name: str) -> None:
    text = (ROOT / "tests" / path).read_text()
    assert not name or f"def {name}(" in text


def test_each_promise_names_a_test() -> None:
    promises = DOCUMENT.partition("## Promises")[2].partition("## Open by design")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`(unit|conformance|property)/\w+\.py", row)]


def test_tls_sockets_keep_their_encryption(tmp_path: Path) -> None:
    """ssl's own sockets turn into plain ones at shutdown(): a thread that writes then would write plain text."""
    authority = Authority(tmp_path)
    settings = https_settings(authority.issue("volume"))
    ours, theirs = socket.socketpair()
    seen: list[bytes] = []

    def other_side() -> None:
        with authority.client().wrap_socket(theirs, server_hostname=HOST) as sock:
            raw = socket.socket(fileno=socket.dup(sock.fileno()))
            seen.append(sock.recv(100))
            while chunk := raw.recv(65536):
                seen.append(chunk)
            raw.close()

    thread = threading.Thread(target=other_side)
    thread.start()
    with server_context(settings).wrap_socket(ours, server_side=True) as sock:
        assert isinstance(sock, TlsSocket)
        sock.sendall(b"first")
        sock.shutdown(socket.SHUT_RD)
        sock.sendall(b"must not be plain")
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError):
            sock.sendall(b"more")
    thread.join(10)
    assert seen[0] == b"first"
    assert b"must not be plain" not in b"".join(seen[1:])
    assert len(b"".join(seen[1:])) > len(b"must not be plain")


def test_outgoing_sockets_keep_it_too() -> None:
    from pyvolume.security_config import TlsSettings

    assert client_context(TlsSettings(client_enabled=True)).sslsocket_class is TlsSocket
    assert issubclass(TlsSocket, ssl.SSLSocket)
