"""What the admin port says before the server is ready, in plain text and by TLS, and how its socket is handed on."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_lifecycle import HOST, wait_for
from tls_helpers import https_settings, plain_identity

from pyvolume.server.start_page import StartPage
from pyvolume.server.tls import Tls


@pytest.fixture
def page() -> Iterator[StartPage]:
    one = StartPage(HOST, 0)
    one.start()
    yield one
    if not one._taken.is_set():
        one.take_listener()
    one.socket.close()


def ask(port: int, method: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request(method, path, b"body" if method == "PUT" else None)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize(("method", "path"), [("GET", "/healthz"), ("GET", "/status"), ("PUT", "/3,01637037d6")])
def test_everything_is_503_with_how_far_it_is(page: StartPage, method: str, path: str) -> None:
    page.progress(3, 10)
    answer, body = ask(page.port, method, path)
    assert (answer.status, body) == (503, b"loading volumes: 3 of 10\n")
    assert answer.headers["Retry-After"] == "1"
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Server"] == "SeaweedFS Volume 30GB 4.44"


def test_head_has_no_body(page: StartPage) -> None:
    assert ask(page.port, "HEAD", "/healthz")[1] == b""


def test_the_socket_stays_open_when_it_is_handed_on(page: StartPage) -> None:
    silent = socket.create_connection((HOST, page.port), 20)
    wait_for(lambda: len(page._open) == 1, "the connection")
    listener = page.take_listener()
    assert silent.recv(1) == b"", "who has asked nothing is not told later that the server starts"
    silent.close()
    with socket.create_connection((HOST, page.port), 20) as waiting:
        listener.setblocking(True)
        connection, _ = listener.accept()
        connection.close()
        assert waiting.recv(1) == b""


def test_connections_beyond_the_limit_are_closed_and_the_page_goes_on(page: StartPage) -> None:
    sockets = [socket.create_connection((HOST, page.port), 20) for _ in range(40)]
    for sock in sockets:
        sock.close()
    wait_for(lambda: not page._open, "all gone")
    assert ask(page.port, "GET", "/healthz")[0].status == 503


def test_by_tls(tmp_path: Path) -> None:
    identity, authority = plain_identity(tmp_path, "volume.test")
    tls = Tls(https_settings(identity))
    assert tls.https is not None
    page = StartPage(HOST, 0, tls=tls.https.current)
    page.start()
    try:
        page.tell("starting")
        context = ssl.create_default_context(cafile=str(authority))
        context.check_hostname = False
        connection = http.client.HTTPSConnection(HOST, page.port, timeout=20, context=context)
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (503, b"starting\n")
        connection.close()
        with socket.create_connection((HOST, page.port), 20) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"503" not in plain.recv(100), "nothing is said in plain text"
    finally:
        page.take_listener().close()
