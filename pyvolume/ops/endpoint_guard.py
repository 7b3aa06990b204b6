"""Which addresses this server dials because a request named them (contract operations.md 3.6).

FetchAndWriteNeedle reads from an endpoint and writes to replicas that its caller chooses. Neither may lead to this
machine, to the metadata service of a cloud, or (the endpoint) into the private network. A name is resolved and every
address of it looked at before anything is done; at connect it is resolved once more, and what is dialled is an address
that was checked, not the name: a name server that answers differently the second time gains nothing. Must not import
storage or server. Upstream: `weed/server/volume_grpc_remote.go`.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyvolume.errors import PyvolumeError
from pyvolume.ops.gourl import split_url
from pyvolume.types import go_quote

LOOKUP_TIMEOUT_S = 2.0
MAX_LOOKUPS_AT_ONCE = 16
CONNECT_TIMEOUT_S = 10.0
MAX_TRIES = 4
"""Addresses of one name that are dialled in turn."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, float], Sequence[Address]]
"""(name, time-out in s) → its addresses. Raises LookupFailed."""

_METADATA_HOSTS = ("metadata", "metadata.google.internal")
_METADATA = ipaddress.ip_address("169.254.169.254")
_PRIVATE_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200")))
"""The same service of Amazon and Google over IPv6, and Alibaba's: private addresses to upstream, which a replica may
have; not here."""
_PRIVATE = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
_CGNAT = ipaddress.ip_network("100.64.0.0/10")
_LINK_LOCAL = tuple(map(ipaddress.ip_network, ("169.254.0.0/16", "224.0.0.0/24", "fe80::/10")))
_ZEROES = bytes(8)


class EndpointRefused(PyvolumeError):
    """An address that must not be dialled, or a name without a usable one; `str()` is upstream's text."""


class LookupFailed(PyvolumeError):
    """A name was not resolved; `str()` follows Go's resolver."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is allowed at connect. shown: the endpoint or target as the request named it, for texts."""

    shown: str
    allow_private: bool = False


# ------------------------------------------------------------------------------------------------------- addresses


def check_address(rule: Rule, address: Address) -> None:
    """Raises EndpointRefused for an address that the rule forbids, by itself or by the IPv4 address inside it."""
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.IPv6Address(int(address))  # without a zone
    what = _kind(address, rule.allow_private)
    if what is not None:
        raise EndpointRefused(f"remote endpoint {go_quote(rule.shown)} {what} {address}")
    inner = embedded_ipv4(address)
    if inner is not None:
        check_address(rule, inner)


def _kind(address: Address, allow_private: bool) -> str | None:
    """The words for a forbidden address."""
    if address == _METADATA or (allow_private and address in _PRIVATE_METADATA):
        return "targets instance metadata service"
    if address.is_loopback:
        return "resolves to loopback address"
    if address.is_unspecified:
        return "resolves to unspecified address"
    scope = address.packed[1] & 0x0F if address.version == 6 and address.is_multicast else 0
    if scope == 2 or any(address in network for network in _LINK_LOCAL):
        return "resolves to link-local address"
    if scope == 1:
        return "resolves to interface-local address"
    if not allow_private and any(address in network for network in _PRIVATE):
        return "resolves to private address"
    if not allow_private and address in _CGNAT:
        return "resolves to CGNAT address"
    return None


def embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for where the relay exists: NAT64 (64:ff9b::/96, and the local
    64:ff9b:1::/48), 6to4, Teredo, ISATAP, IPv4-translated, IPv4-compatible. None for all others.

    The local NAT64 prefix, ISATAP and ::ffff:0:a.b.c.d are not upstream's.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return None
    raw = address.packed
    if raw[:4] == b"\x20\x01\x00\x00":  # Teredo keeps the complement
        return ipaddress.IPv4Address(bytes(byte ^ 0xFF for byte in raw[12:]))
    if raw[:2] == b"\x20\x02":
        return ipaddress.IPv4Address(raw[2:6])
    carried = (
        (raw[:4] == b"\x00\x64\xff\x9b" and raw[4:12] == _ZEROES)
        or raw[:6] == b"\x00\x64\xff\x9b\x00\x01"
        or raw[8:12] in (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")
        or raw[:12] == _ZEROES + b"\xff\xff\x00\x00"
        or raw[:12] == _ZEROES + bytes(4)
    )
    return ipaddress.IPv4Address(raw[12:]) if carried else None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------------- resolving

_lookups = threading.BoundedSemaphore(MAX_LOOKUPS_AT_ONCE)


def resolve(host: str, timeout_s: float) -> Sequence[Address]:
    """The addresses of a name, by the system's resolver, which knows no time-out: the look-up runs on a thread of its
    own, of which there are MAX_LOOKUPS_AT_ONCE at most. Raises LookupFailed."""
    deadline = time.monotonic() + timeout_s
    if not host.isascii() or not host.isprintable():
        raise LookupFailed(f"lookup {host}: no such host")
    if not _lookups.acquire(timeout=timeout_s):
        raise LookupFailed(f"lookup {host}: i/o timeout")
    found: list[Address] = []
    failures: list[str] = []

    def look_up() -> None:
        try:
            for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
                found.append(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]))
        except (OSError, UnicodeError, ValueError) as exc:
            passing = isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN
            failures.append("server misbehaving" if passing else "no such host")
        finally:
            _lookups.release()

    thread = threading.Thread(target=look_up, name="lookup", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads
        _lookups.release()
        raise LookupFailed(f"lookup {host}: server misbehaving") from None
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise LookupFailed(f"lookup {host}: i/o timeout")
    if failures or not found:
        raise LookupFailed(f"lookup {host}: {failures[0] if failures else 'no such host'}")
    return found


# ------------------------------------------------------------------------------------------------- before the dial


def check_endpoint(endpoint: str, lookup: Resolver | None = None) -> None:
    """Raises EndpointRefused for the URL of a remote store that must not be dialled. Blocks up to LOOKUP_TIMEOUT_S."""
    if not endpoint.strip():
        raise EndpointRefused("remote endpoint is empty")
    quoted = go_quote(endpoint)
    try:
        url = split_url(endpoint)
    except ValueError as exc:
        raise EndpointRefused(f"parse remote endpoint {quoted}: {exc}") from None
    if url.scheme not in ("http", "https"):
        raise EndpointRefused(f"remote endpoint {quoted} must use http or https, got {go_quote(url.scheme)}")
    if not url.host:
        raise EndpointRefused(f"remote endpoint {quoted} has no host")
    _check_host(Rule(endpoint), url.host, "remote endpoint", lookup or resolve)


def check_replica(target: str, lookup: Resolver | None = None) -> None:
    """Raises EndpointRefused for a replica that is no bare `host:port` of another machine, private networks included.
    Blocks up to LOOKUP_TIMEOUT_S."""
    if not target.strip():
        raise EndpointRefused("replica target is empty")
    quoted = go_quote(target)
    if any(ch in "/?#@\\" or ch <= " " or ch == "\x7f" for ch in target):
        raise EndpointRefused(f"replica target {quoted} must be a bare host:port")
    try:
        host = _bare_host(target)
    except ValueError as exc:
        raise EndpointRefused(f"replica target {quoted} must be a bare host:port: {exc}") from None
    if not host:
        raise EndpointRefused(f"replica target {quoted} has no host")
    _check_host(Rule(target, allow_private=True), host, "replica target", lookup or resolve)


def _bare_host(target: str) -> str:
    """The host of `host:port`. Raises ValueError with the text of Go's SplitHostPort."""
    host, colon, _ = target.rpartition(":")
    if not colon:
        raise ValueError(f"address {target}: missing port in address")
    if target.startswith("["):
        end = target.find("]")
        if end < 0:
            raise ValueError(f"address {target}: missing ']' in address")
        if target[end + 1 : end + 2] != ":":
            raise ValueError(f"address {target}: missing port in address")
        if ":" in target[end + 2 :]:
            raise ValueError(f"address {target}: too many colons in address")
        return target[1:end]
    if ":" in host:
        raise ValueError(f"address {target}: too many colons in address")
    return host


def _check_host(rule: Rule, host: str, what: str, lookup: Resolver) -> None:
    if host.lower().rstrip(".") in _METADATA_HOSTS:
        raise EndpointRefused(f"{what} {go_quote(rule.shown)} targets instance metadata service")
    address = _literal(host)
    try:
        addresses = [address] if address is not None else lookup(host, LOOKUP_TIMEOUT_S)
    except LookupFailed as exc:
        raise EndpointRefused(f"resolve {what} host {go_quote(host)}: {exc}") from None
    for address in addresses:
        check_address(rule, address)


# ------------------------------------------------------------------------------------------------------ at the dial


def dial(
    host: str,
    port: int,
    rule: Rule | None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    source: tuple[str, int] | None = None,
    lookup: Resolver | None = None,
) -> socket.socket:
    """A connected socket. With a rule the name is resolved here, every address checked, and the first permitted one
    that answers is dialled as an address. None: no restriction. source: the local address. Raises EndpointRefused,
    OSError."""
    if rule is None:
        return _ready(socket.create_connection((host, port), timeout_s, source))
    literal = _literal(host)
    try:
        addresses = [literal] if literal is not None else (lookup or resolve)(host, LOOKUP_TIMEOUT_S)
    except LookupFailed as exc:
        raise EndpointRefused(f"resolve remote endpoint host {go_quote(host)}: {exc}") from None
    refusal: EndpointRefused | None = None
    failure: OSError | None = None
    tried = 0
    for address in dict.fromkeys(addresses):
        try:
            check_address(rule, address)
        except EndpointRefused as exc:
            refusal = refusal or exc
            continue
        if tried == MAX_TRIES:
            break
        tried += 1
        try:
            return _ready(socket.create_connection((str(address), port), timeout_s, source))
        except OSError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure
    raise refusal or EndpointRefused(f"resolve remote endpoint host {go_quote(host)}: no addresses")


def _ready(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock
