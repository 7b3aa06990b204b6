"""The small listeners beside the service: metrics on -metricsPort, profiles on -debug.port. And the push gateway.

No TLS and no credentials, as upstream's; both are off unless asked for. A listener takes few connections at a time and
none of the service's threads. May import metrics and profiling; must not import http_app.
"""

from __future__ import annotations

import gzip
import http.client
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from pyvolume.server import profiling
from pyvolume.server.metric_types import Registry, protobuf_format, text_format
from pyvolume.server.profiling import NOT_FOUND, Page

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
TIMEOUT_S: Final = 30.0
PUSH_TIMEOUT_S: Final = 10.0
GZIP_LEVEL: Final = 3

PROTOBUF_TYPE: Final = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values")
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")


# ------------------------------------------------------------------------------------------------------------- metrics


def _accepted(header: str) -> list[tuple[str, dict[str, str]]]:
    """Media types with their parameters, the best liked first."""
    rows: list[tuple[float, str, dict[str, str]]] = []
    for item in header.split(","):
        kind, *rest = (part.strip() for part in item.split(";"))
        parameters = {
            name.strip(): value.strip().strip('"') for name, _, value in (part.partition("=") for part in rest)
        }
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 1.0
        if kind:
            rows.append((quality, kind, parameters))
    rows.sort(key=lambda row: -row[0])
    return [(kind, parameters) for _, kind, parameters in rows]


def negotiate(accept: str) -> tuple[bool, str]:
    """(protobuf?, content type) for an Accept header. OpenMetrics is not offered."""
    escaping = "underscores"
    for kind, parameters in _accepted(accept):
        asked = parameters.get("escaping", "")
        if asked in _ESCAPINGS:
            escaping = asked
        if (
            kind == "application/vnd.google.protobuf"
            and parameters.get("proto") == "io.prometheus.client.MetricFamily"
            and parameters.get("encoding") == "delimited"
        ):
            return True, f"{PROTOBUF_TYPE}; escaping={escaping}"
        if kind == "text/plain" and parameters.get("version", "0.0.4") in ("0.0.4", ""):
            break
    return False, f"{TEXT_TYPE}; escaping={escaping}"


def metrics_page(registry: Registry, query: str, headers: Mapping[str, str]) -> Page:
    """The answer to /metrics: all families, or those of ?name[]=."""
    names = frozenset(parse_qs(query).get("name[]", ()))
    snapshots = registry.gather(names)
    as_protobuf, kind = negotiate(headers.get("Accept", ""))
    body = protobuf_format(snapshots) if as_protobuf else text_format(snapshots)
    out = [("Content-Type", kind)]
    if "gzip" in headers.get("Accept-Encoding", "").replace(" ", "").split(","):
        body = gzip.compress(body, GZIP_LEVEL)
        out.append(("Content-Encoding", "gzip"))
    return Page(200, out, body)


Answer = Callable[[str, str, Mapping[str, str]], Page]
"""(path, raw query, headers) -> answer, on a thread of its own."""


def side_pages(registry: Registry | None) -> Answer:
    """The pages of a side listener: profiles, and metrics if there is a registry."""

    def answer(path: str, query: str, headers: Mapping[str, str]) -> Page:
        if path == "/metrics" and registry is not None:
            return metrics_page(registry, query, headers)
        if path == "/debug/vars":
            return profiling.variables(flat_figures(registry) if registry is not None else {})
        if path == "/debug/pprof":
            return Page(301, [("Location", "/debug/pprof/")], b"")
        found = profiling.debug_page(path, {name: values[-1] for name, values in parse_qs(query).items()})
        return found if found is not None else NOT_FOUND

    return answer


def flat_figures(registry: Registry) -> dict[str, Any]:
    """Counters and gauges by the text of their series; histograms as their counts and sums."""
    out: dict[str, Any] = {}
    for family in registry.gather():
        for sample in family.samples:
            pairs = ",".join(f"{name}={value}" for name, value in sample.labels)
            name = f"{family.name}{{{pairs}}}" if pairs else family.name
            out[name] = {"count": sample.counts[-1], "sum": sample.value} if sample.counts else sample.value
    return out


# ------------------------------------------------------------------------------------------------------------ listener


def _titled(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Header names in the one spelling that answers look for."""
    return ((name.title(), value) for name, value in pairs)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    server: SideServer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer  # any method is answered alike
        raise AttributeError(name)

    def _answer(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # nobody reads bodies here
        url = urlsplit(self.path)
        try:
            page = self.server.answer(url.path, url.query, dict(_titled(self.headers.items())))
        except Exception:  # the top of this request
            log.exception("%s failed", self.path)
            page = Page(500, [("Content-Type", "text/plain; charset=utf-8")], b"internal error\n")
        self.send_response_only(page.status)
        self.send_header("Date", self.date_time_string())
        for name, value in page.headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests of these ports are not logged."""


class SideServer(ThreadingMixIn, HTTPServer):
    """One side listener, bound when it is made. Raises OSError."""

    daemon_threads = True

    def __init__(
        self, host: str, port: int, answer: Answer, name: str, *, listener: socket.socket | None = None
    ) -> None:
        self.answer = answer
        self._name = name
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener if listener is not None else _listen(host, port)
        self.port: int = self.socket.getsockname()[1]

    def start(self) -> None:
        """Serves on a thread of its own until the process ends or stop()."""
        threading.Thread(target=self.serve_forever, name=self._name, daemon=True).start()

    def stop(self) -> None:
        """Closes the listener; answers under way are finished by their threads. Only after start()."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection from %s broke off", client_address, exc_info=True)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; a host that means all addresses listens for both families."""
    if host in _WILDCARDS:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        return socket.create_server(("", port), backlog=64)
    bare = host.strip("[]")
    family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return socket.create_server((bare, port), family=family, backlog=64)


# ---------------------------------------------------------------------------------------------------------------- push


class Pusher:
    """Sends all families to a push gateway: at once, then every interval, from a thread of its own."""

    def __init__(self, registry: Registry, address: str, interval_s: float, instance: str) -> None:
        self._registry = registry
        self._interval_s = interval_s
        self.address = address
        url = urlsplit(address if "://" in address else f"http://{address}")
        self._host, self._tls = url.netloc, url.scheme == "https"
        self._path = f"{url.path.rstrip('/')}/metrics/job/volumeServer/instance/{quote(instance, safe='')}"
        self.url = f"{url.scheme}://{url.netloc}{self._path}"

    def run(self, quit_event: threading.Event) -> None:
        """Pushes until the event is set. A gateway that fails changes nothing else."""
        while True:
            try:
                self.push()
            except Exception as exc:  # whatever it is, the next round tries again
                log.info("could not push metrics to prometheus push gateway %s: %s", self.address, exc)
            if quit_event.wait(self._interval_s):
                return

    def push(self) -> None:
        """One PUT. Raises OSError, http.client.HTTPException, or RuntimeError for an answer other than 200 and 202."""
        body = protobuf_format(self._registry.gather())
        make = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = make(self._host, timeout=PUSH_TIMEOUT_S)
        try:
            connection.request("PUT", self._path, body, {"Content-Type": PROTOBUF_TYPE})
            answer = connection.getresponse()
            text = answer.read(4096).decode("utf-8", "replace")
        finally:
            connection.close()
        if answer.status not in (200, 202):
            raise RuntimeError(f"unexpected status code {answer.status} while pushing to {self.url}: {text}")
