"""Server addresses as masters, peers and flags spell them: `host:port` or `host:port.grpcPort`.

Must not import any other module of server. Follows upstream's rules (`weed/pb/server_address.go`): two addresses are
the same server when their `host:port` texts are equal, names are never resolved, a missing gRPC port is port + 10000.
"""

from __future__ import annotations

import ipaddress

GRPC_PORT_OFFSET = 10000
_MAX_PORT = 65535


def join_host_port(host: str, port: int | str) -> str:
    """`host:port`, with brackets around an IPv6 host that has none."""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


def http_address(address: str) -> str:
    """The address without a gRPC port. Text without a port is returned as it is."""
    host, colon, ports = address.rpartition(":")
    port, dot, _ = ports.rpartition(".")
    return join_host_port(host, port) if colon and dot else address


def grpc_address(address: str) -> str:
    """The address to dial for gRPC. Raises ValueError when there is no port or it is no number below 65536.

    (Upstream ends its process on some of these; a request may carry them, so here the caller gets an error.)
    """
    host, colon, ports = address.rpartition(":")
    if not colon or not ports:
        raise ValueError(f"server address {address!r} has no port")
    port_text, dot, grpc_text = ports.rpartition(".")
    number = grpc_text if dot else ports
    if not (number.isascii() and number.isdigit()) or (dot and not port_text):
        raise ValueError(f"server address {address!r} has no numeric port")
    port = int(number) if dot else int(number) + GRPC_PORT_OFFSET
    if not 0 < port <= _MAX_PORT:
        raise ValueError(f"server address {address!r} needs gRPC port {port}, which does not exist")
    return join_host_port(host, port)


def with_grpc_port(address: str, grpc_port: int) -> str:
    """`host:port` joined with a gRPC port; 0 means that the default applies."""
    return f"{address}.{grpc_port}" if grpc_port else address


def same_server(left: str, right: str) -> bool:
    """True when both name the same `host:port`."""
    return left == right or http_address(left) == http_address(right)


def source_ip(bind_ip: str) -> str | None:
    """The address that outgoing connections come from: -ip.bind if it is one particular address."""
    try:
        address = ipaddress.ip_address(bind_ip)
    except ValueError:
        return None
    return None if address.is_unspecified or address.is_loopback else bind_ip
