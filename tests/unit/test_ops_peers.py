"""The HTTP client to peers: keep-alive, stale connections, failures in Go's words, cancellation, bounds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pyvolume.ops import peers
from pyvolume.ops.peers import Cancel, Failure, PeerClient, PeerError

Script = Callable[[socket.socket], None]


class Peer:
    """A scripted server: the n-th connection is served by the n-th script (the last one serves all further)."""

    def __init__(self, *scripts: Script) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections = 0
        self.requests: list[bytes] = []
        self._scripts = scripts
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(10)
            self._open.append(sock)
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, script), daemon=True).start()

    def _serve(self, sock: socket.socket, script: Script) -> None:
        try:
            script(sock)
        except OSError:
            return

    def request(self, sock: socket.socket) -> bytes:
        """Reads one whole request (Content-Length framing); b"" at the end."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += sock.recv(65536)
        self.requests.append(head + b"\r\n\r\n" + body)
        return self.requests[-1]

    def close(self) -> None:
        self.listener.close()
        for sock in self._open:
            sock.close()


@contextmanager
def serving(*scripts: Callable[[Peer, socket.socket], None]) -> Iterator[Peer]:
    holder: list[Peer] = []
    peer = Peer(*(lambda sock, script=script: script(holder[0], sock) for script in scripts))
    holder.append(peer)
    try:
        yield peer
    finally:
        peer.close()


def answering(answer: bytes, times: int = 1000) -> Callable[[Peer, socket.socket], None]:
    def script(peer: Peer, sock: socket.socket) -> None:
        for _ in range(times):
            if not peer.request(sock):
                return
            sock.sendall(answer)
        sock.close()

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\nX-A: 2\r\n\r\nhello"


def test_request_as_it_goes_out() -> None:
    with serving(answering(OK)) as peer:
        client = PeerClient()
        response = client.request("POST", peer.host, "/3,01?a=b", [("X-Y", "z")], (b"ab", memoryview(b"cd")))
        assert (response.status, response.read(100)) == (200, b"hello")
        assert response.headers == [("Content-Length", "5"), ("X-A", "1"), ("X-A", "2")]
        assert response.header("x-a") == "1"
        head, _, body = peer.requests[0].partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[:3] == [b"POST /3,01?a=b HTTP/1.1", b"Host: " + peer.host.encode(), b"X-Y: z"]
        assert b"Content-Length: 4" in lines
        assert body == b"abcd"
        client.close()


def test_connections_are_kept_and_used_again() -> None:
    with serving(answering(OK)) as peer:
        client = PeerClient()
        for _ in range(5):
            assert client.request("GET", peer.host, "/").read(100) == b"hello"
        assert peer.connections == 1
        client.close()


def test_a_response_given_up_half_way_is_not_reused() -> None:
    with serving(answering(OK)) as peer:
        client = PeerClient()
        client.request("GET", peer.host, "/").close()
        assert client.request("GET", peer.host, "/").read(100) == b"hello"
        assert peer.connections == 2
        client.close()


def test_connection_close_is_honoured() -> None:
    with serving(answering(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")) as peer:
        client = PeerClient()
        for _ in range(2):
            assert client.request("GET", peer.host, "/").read(10) == b""
        assert peer.connections == 2
        client.close()


def test_a_kept_connection_closed_by_the_peer_is_replaced() -> None:
    with serving(answering(OK, times=1), answering(OK)) as peer:
        client = PeerClient()
        assert client.request("GET", peer.host, "/").read(100) == b"hello"
        assert client.request("GET", peer.host, "/", body=(b"x" * 10,)).read(100) == b"hello"
        assert peer.connections == 2
        client.close()


def test_a_request_on_a_kept_connection_that_dies_under_it_is_sent_again() -> None:
    def once_then_die(peer: Peer, sock: socket.socket) -> None:
        peer.request(sock)
        sock.sendall(OK)
        peer.request(sock)
        sock.close()

    with serving(once_then_die, answering(OK)) as peer:
        client = PeerClient()
        assert client.request("GET", peer.host, "/").read(100) == b"hello"
        assert client.request("POST", peer.host, "/", body=(b"again",)).read(100) == b"hello"
        assert [request[-5:] for request in peer.requests[1:]] == [b"again", b"again"]
        client.close()


def test_a_new_connection_that_dies_is_an_error() -> None:
    def die(peer: Peer, sock: socket.socket) -> None:
        peer.request(sock)
        sock.close()

    with serving(die) as peer, pytest.raises(PeerError, match="EOF"):
        PeerClient().request("GET", peer.host, "/")
    assert peer.connections == 1


def test_refused() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    with pytest.raises(PeerError) as caught:
        PeerClient().request("GET", host, "/")
    assert str(caught.value) == f"dial tcp {host}: connect: connection refused"
    assert caught.value.kind is Failure.REFUSED


@pytest.mark.parametrize("host", ["127.0.0.1:x", "127.0.0.1:99999", "h:"])
def test_bad_ports(host: str) -> None:
    with pytest.raises(PeerError, match="invalid port"):
        PeerClient().request("GET", host, "/")


def test_silence_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HEADER_TIMEOUT_S", 0.1)

    def silent(peer: Peer, sock: socket.socket) -> None:
        peer.request(sock)
        sock.recv(1)

    with serving(silent) as peer, pytest.raises(PeerError, match="timeout awaiting response headers") as caught:
        PeerClient().request("GET", peer.host, "/")
    assert caught.value.kind is Failure.TIMEOUT


def test_a_body_that_breaks_off_is_an_error() -> None:
    with serving(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", times=1)) as peer:
        response = PeerClient().request("GET", peer.host, "/")
        with pytest.raises(PeerError, match="unexpected EOF"):
            response.read(100)


def test_chunked_bodies_are_read_and_the_connection_kept() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nabc\r\n0\r\n\r\n"
    with serving(answering(answer)) as peer:
        client = PeerClient()
        for _ in range(2):
            response = client.request("GET", peer.host, "/")
            assert response.length is None
            assert response.read(100) == b"helloabc"
        assert peer.connections == 1
        client.close()


def test_read_is_bounded() -> None:
    with serving(answering(OK)) as peer:
        assert PeerClient().request("GET", peer.host, "/").read(2) == b"he"


def test_cancel_ends_a_request_under_way() -> None:
    arrived = threading.Event()

    def silent(peer: Peer, sock: socket.socket) -> None:
        peer.request(sock)
        arrived.set()
        sock.recv(1)

    cancel = Cancel()
    with serving(silent) as peer:

        def later() -> None:
            assert arrived.wait(10)
            cancel.cancel()

        threading.Thread(target=later, daemon=True).start()
        with pytest.raises(PeerError) as caught:
            PeerClient().request("GET", peer.host, "/", cancel=cancel)
    assert caught.value.kind is Failure.CANCELLED


def test_what_was_cancelled_before_does_not_begin() -> None:
    cancel = Cancel()
    cancel.cancel()
    with serving(answering(OK)) as peer, pytest.raises(PeerError):
        PeerClient().request("GET", peer.host, "/", cancel=cancel)


@pytest.mark.parametrize(
    ("target", "value"), [("/a b", "v"), ("/a\r\nX: 1", "v"), ("/\u00e9", "v"), ("/", "v\r\nX: 1"), ("/", "\0")]
)
def test_nothing_can_be_smuggled_into_a_head(target: str, value: str) -> None:
    with serving(answering(OK)) as peer, pytest.raises(PeerError):
        PeerClient().request("GET", peer.host, target, [("X", value)])
    assert not peer.requests


def test_large_bodies_go_out_in_pieces() -> None:
    data = bytes(range(256)) * 20_000
    with serving(answering(OK)) as peer:
        client = PeerClient()
        assert client.request("POST", peer.host, "/", body=(b"head", memoryview(data), b"tail")).read(100) == b"hello"
        assert peer.requests[0].partition(b"\r\n\r\n")[2] == b"head" + data + b"tail"
        client.close()


def test_kept_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_IDLE_PER_HOST", 2)
    with serving(answering(OK)) as peer:
        client = PeerClient()
        responses = [client.request("GET", peer.host, "/") for _ in range(4)]
        for response in responses:
            assert response.read(100) == b"hello"
        assert client._idle_count == 2
        client.close()
        assert client._idle_count == 0


def test_an_answer_before_the_body_was_taken_is_seen() -> None:
    def hasty(peer: Peer, sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        while sock.recv(1 << 20):
            pass

    with serving(hasty) as peer:
        assert PeerClient().request("POST", peer.host, "/", body=(bytes(3 << 20),)).status == 401
