"""A plain HTTP/1.1 client on sockets: sends the bytes it is given and reports what came back, repairing nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

Header = tuple[str, str]


@dataclass
class Answer:
    """One final answer, or what went wrong on the way to it."""

    version: str = ""
    status: int = 0
    reason: str = ""
    headers: list[Header] = field(default_factory=list)
    body: bytes = b""
    framing: str = ""  # none, length, chunked, close
    interim: list[int] = field(default_factory=list)  # 1xx seen before
    error: str = ""  # trouble of the transport
    asked: str | None = None  # method, in raw scripts

    def get(self, name: str) -> str | None:
        wanted = name.lower()
        return next((v for k, v in self.headers if k.lower() == wanted), None)

    def all(self, name: str) -> list[str]:
        wanted = name.lower()
        return [v for k, v in self.headers if k.lower() == wanted]

    @property
    def ends_connection(self) -> bool:
        return (
            bool(self.error)
            or self.framing == "close"
            or self.version == "HTTP/1.0"
            or any("close" in v.lower() for v in self.all("connection"))
        )


class Connection:
    """One TCP connection."""

    def __init__(self, host: str, port: int, timeout_s: float = 15.0) -> None:
        self.timeout_s = timeout_s
        self.sock = socket.create_connection((host, port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buf = bytearray()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.settimeout(self.timeout_s)
        self.sock.sendall(data)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _fill(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        chunk = self.sock.recv(1 << 16)
        self.buf += chunk
        return bool(chunk)

    def _line(self, deadline: float) -> bytes:
        while (at := self.buf.find(b"\n")) < 0:
            if not self._fill(deadline):
                raise EOFError
        line = bytes(self.buf[:at])
        del self.buf[: at + 1]
        return line.rstrip(b"\r")

    def _exact(self, length: int, deadline: float) -> tuple[bytes, bool]:
        while len(self.buf) < length:
            if not self._fill(deadline):
                break
        data = bytes(self.buf[:length])
        del self.buf[:length]
        return data, len(data) == length

    def _headers(self, deadline: float) -> list[Header]:
        out: list[Header] = []
        while line := self._line(deadline):
            name, _, value = line.partition(b":")
            out.append((name.decode("latin-1"), value.strip().decode("latin-1")))
        return out

    def receive(self, method: str = "GET", timeout_s: float | None = None) -> Answer:
        """Reads one final answer to a request of that method."""
        answer = Answer()
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        started = False
        try:
            while True:
                line = self._line(deadline)
                started = True
                parts = line.decode("latin-1").split(" ", 2)
                answer.version = parts[0]
                if len(parts) < 2 or not parts[1].isdigit():
                    answer.error = f"bad status line {line[:80]!r}"
                    return answer
                answer.status = int(parts[1])
                answer.reason = parts[2] if len(parts) > 2 else ""
                answer.headers = self._headers(deadline)
                if not (100 <= answer.status < 200) or answer.status == 101:
                    break
                answer.interim.append(answer.status)
            self._body(answer, method, deadline)
        except TimeoutError:
            answer.error = "timeout" if started else "timeout before status"
        except EOFError:
            answer.error = "eof in head" if started else "eof before status"
        except ConnectionResetError:
            answer.error = "reset" if started else "reset before status"
        except (OSError, ValueError) as e:
            answer.error = type(e).__name__
        return answer

    def _body(self, answer: Answer, method: str, deadline: float) -> None:
        if method == "HEAD" or answer.status in (204, 304) or answer.status < 200:
            answer.framing = "none"
            return
        if "chunked" in (answer.get("transfer-encoding") or "").lower():
            answer.framing = "chunked"
            parts = []
            while size := int(self._line(deadline).split(b";")[0] or b"0", 16):
                data, whole = self._exact(size, deadline)
                parts.append(data)
                if not whole:
                    answer.error = "eof inside chunked body"
                    break
                self._line(deadline)
            else:
                self._headers(deadline)
            answer.body = b"".join(parts)
            return
        length = answer.get("content-length")
        if length is not None:
            answer.framing = "length"
            answer.body, whole = self._exact(int(length), deadline)
            if not whole:
                answer.error = "eof inside body"
            return
        answer.framing = "close"
        while self._fill(deadline):
            pass
        answer.body = bytes(self.buf)
        self.buf.clear()

    def peer_closed(self, wait_s: float) -> bool:
        """True when the peer has ended the connection and nothing is left to read."""
        if self.buf:
            return False
        try:
            self.sock.settimeout(wait_s)
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


def to_bytes(text: str | bytes) -> bytes:
    """Texts of a recording are bytes read as latin-1; anything else goes out as UTF-8."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def request_bytes(
    method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes | None, host: str, version: str
) -> bytes:
    headers = list(headers)
    names = {k.lower() for k, _ in headers}
    lines = [b" ".join(map(to_bytes, (method, target, version)))]
    if "host" not in names and version != "HTTP/1.0":
        lines.append(b"Host: " + to_bytes(host))
    lines += [to_bytes(k) + b": " + to_bytes(v) for k, v in headers]
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


class Client:
    """Keep-alive client of one port; opens a new connection whenever it must."""

    def __init__(self, host: str, port: int, timeout_s: float = 15.0) -> None:
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self.conn: Connection | None = None

    def close(self) -> None:
        if self.conn:
            self.conn.close()
            self.conn = None

    def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
        *,
        fresh: bool = False,
        version: str = "HTTP/1.1",
    ) -> Answer:
        data = request_bytes(method, target, headers, body, f"{self.host}:{self.port}", version)
        if fresh:
            self.close()
        answer = Answer()
        for attempt in (0, 1):
            reused = self.conn is not None
            answer, sent = self._once(method, data)
            stale = answer.error and not answer.status and ("before status" in answer.error or not sent)
            if not (stale and reused and attempt == 0) or "timeout" in answer.error:
                break
            self.close()  # the server had given the idle connection up
        if answer.ends_connection:
            self.close()
        return answer

    def _once(self, method: str, data: bytes) -> tuple[Answer, bool]:
        try:
            self.conn = self.conn or Connection(self.host, self.port, self.timeout_s)
        except OSError as e:
            return Answer(error=f"connect: {type(e).__name__}"), False
        sent = True
        try:
            self.conn.send(data)
        except (BrokenPipeError, ConnectionResetError):
            sent = False  # an early answer may still be there to read
        except OSError as e:
            return Answer(error=f"send: {type(e).__name__}"), False
        return self.conn.receive(method), sent
