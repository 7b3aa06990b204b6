"""mTLS of gRPC, both directions (contract operations.md 3.5).

Must not import ops, storage or lifecycle. grpcio has no way to verify a chain without a host name, which upstream does:
certificates of a cluster name roles, not machines. So the certificate of a server is read first, by a handshake with
the same CA and identity, and the name in it is what the library is told to expect. Both handshakes verify the chain.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import grpc

from pyvolume.config import error_text
from pyvolume.security_config import TlsSettings
from pyvolume.server.rpc import Channels, RpcFailure, dial_error
from pyvolume.server.tls import GrpcFiles, Reloading

log = logging.getLogger(__name__)

_HANDLER_MAKERS = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
"""By (client streams, server streams): the handler's attribute and its maker."""


# --------------------------------------------------------------------------------------------------------------- server


def server_credentials(files: Reloading[GrpcFiles]) -> grpc.ServerCredentials:
    """TLS with a client certificate required and verified; new contents of the files count from the next handshake."""
    lock = threading.Lock()
    given = files.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        now = files.current()
        with lock:
            if now is given:
                return None
            given = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(given), fetch, require_client_authentication=True)


def _configuration(files: GrpcFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], root_certificates=files.ca)


def name_checks(tls: TlsSettings) -> tuple[grpc.ServerInterceptor, ...]:
    """The check of client common names, if any name or domain is set."""
    if not tls.grpc_allowed_common_names and not tls.grpc_allowed_wildcard_domain:
        return ()
    return (CommonNameCheck(tls.grpc_allowed_common_names, tls.grpc_allowed_wildcard_domain),)


class CommonNameCheck(grpc.ServerInterceptor):  # type: ignore[misc]  # grpcio is untyped
    """Refuses calls of clients whose certificate has another subject common name.

    names: comma list, as it stands (upstream does not trim it). domain: end of the name, compared as text. Upstream
    ends the handshake; the library here cannot, so that each call is refused. A certificate without a name never
    passes.
    """

    def __init__(self, names: str, domain: str) -> None:
        self._names = frozenset(name for name in names.split(",") if name)
        self._domain = domain

    def allows(self, name: str) -> bool:
        """Whether a client with this common name may call."""
        if not name:
            return False
        return name in self._names or bool(self._domain and name.endswith(self._domain))

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        attribute, make = _HANDLER_MAKERS[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, attribute)

        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            self._check(context)
            return behaviour(request, context)

        return make(
            checked,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _check(self, context: grpc.ServicerContext) -> None:
        values = context.auth_context().get("x509_common_name", ())
        name = values[0].decode("utf-8", "replace") if values else ""
        if self.allows(name):
            return
        text = f"Authenticate: invalid subject client common name: {name}"
        log.error("%s (%s)", text, context.peer())
        context.abort(grpc.StatusCode.PERMISSION_DENIED, text)


# --------------------------------------------------------------------------------------------------------------- client


def secure_channels(files: Reloading[GrpcFiles]) -> Channels:
    """Channels with our identity; the files' contents are those of the moment a channel is made."""

    def credentials() -> grpc.ChannelCredentials:
        now = files.current()
        return grpc.ssl_channel_credentials(now.ca, now.client_key, now.client_cert)

    def server_name(target: str, timeout_s: float) -> str:
        return name_of_server(files.current().probe, target, timeout_s)

    return Channels(credentials, server_name)


def name_of_server(context: ssl.SSLContext, target: str, timeout_s: float) -> str:
    """A name that the certificate of the server at `host:port` holds, its chain verified.

    Blocks up to timeout_s for each of connection and handshake. Raises RpcFailure(UNAVAILABLE).
    """
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        sock = socket.create_connection((host, int(port)), timeout_s)
    except TimeoutError:
        raise _unavailable(dial_error(f"dial tcp {target}: i/o timeout")) from None
    except (OSError, UnicodeError) as exc:
        reason = f"connect: {error_text(exc)}" if isinstance(exc, OSError) else "no such host"
        raise _unavailable(dial_error(f"dial tcp {target}: {reason}")) from exc
    try:
        with context.wrap_socket(sock, server_hostname=host) as secure:
            certificate = secure.getpeercert() or {}
    except (OSError, ValueError) as exc:
        sock.close()
        reason = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else str(exc)
        raise _handshake_failed(target, reason) from exc
    name = name_in(certificate)
    if not name:
        raise _handshake_failed(target, "the certificate has no name")
    return name


def _unavailable(text: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.UNAVAILABLE, text)


def _handshake_failed(target: str, reason: str) -> RpcFailure:
    text = f'connection error: desc = "transport: authentication handshake failed: {reason}" ({target})'
    return _unavailable(text)


def name_in(certificate: dict[str, Any]) -> str:
    """A name that the certificate is valid for: its first DNS name, else address, else common name; "" without any."""
    names = certificate.get("subjectAltName", ())
    for kind, value in names:
        if kind == "DNS" and value:
            if value.startswith("*.") and len(value) > 2:
                return "any" + str(value)[1:]
            if "*" not in value:
                return str(value)
    for kind, value in names:
        if kind == "IP Address":
            try:
                return str(ipaddress.ip_address(value))
            except ValueError:
                continue
    found = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return str(found[0]) if found else ""
