"""Who may do what: white list and JWT of the HTTP ports (contract http.md 5.1, 5.2).

Pure decisions on values; no sockets, no responses. Must not import server or storage.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pyvolume.log import V1

_log = logging.getLogger(__name__)

_MAPPED_BITS = 96  # of an IPv6 address that holds an IPv4 one
_BEARER_PREFIX_LENGTH = 7  # "Bearer" and the character after it, whatever that is


class SecuritySettings(Protocol):
    """What this module reads of SecurityConfig; a reload replaces the values, never edits them."""

    @property
    def jwt_write_key(self) -> bytes: ...
    @property
    def jwt_read_key(self) -> bytes: ...
    @property
    def white_list(self) -> tuple[str, ...]: ...


def bearer_token(query_token: str, authorization: str, cookie_token: Callable[[], str]) -> str:
    """The token of a request: query `jwt`, else a bearer Authorization header, else the cookie `AT`; "" if none."""
    if query_token:
        return query_token
    if len(authorization) > _BEARER_PREFIX_LENGTH and authorization[:6].upper() == "BEARER":
        return authorization[_BEARER_PREFIX_LENGTH:]
    return cookie_token()


def token_allows(key: bytes, token: str, vid: str, fid: str, peer_ip: str = "") -> bool:
    """True if `token` is signed with `key`, valid now, and names exactly this file (texts as in the URL).

    Everything after the last `_` of fid (if not at its start) is left out of the comparison, as upstream does. Why a
    token is refused is told in the log at -v=1 and nowhere else; the token never is.
    """
    if not token:
        _log.log(V1, "missing jwt from %s", peer_ip)
        return False
    from pyvolume.ops import tokens  # PyJWT is slow to import, and nothing without a signing key

    cut = fid.rfind("_")
    if cut > 0:
        fid = fid[:cut]
    try:
        claims = tokens.claims_of(key, token)
    except tokens.BadToken as exc:
        _log.log(V1, "jwt verification error from %s: %s", peer_ip, exc)
        return False
    allowed = claims.get("fid") == f"{vid},{fid}"
    if not allowed:
        _log.log(
            V1, 'jwt fid mismatch from %s: token has "%s", request has "%s,%s"', peer_ip, claims.get("fid"), vid, fid
        )
    return allowed


@dataclass(frozen=True)
class _Listed:
    texts: frozenset[str]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


def _unmapped(
    network: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A network of mapped addresses (`::ffff:10.0.0.0/104`) as the IPv4 network it is, since peers come as IPv4."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= _MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((int(mapped), network.prefixlen - _MAPPED_BITS))
    return network


def compile_white_list(entries: tuple[str, ...]) -> _Listed:
    """Splits entries into exact texts and networks. Bad networks are the configuration's business: skipped here."""
    texts: set[str] = set()
    networks = []
    for entry in entries:
        if "/" not in entry:
            texts.add(entry)
            continue
        try:
            networks.append(_unmapped(ipaddress.ip_network(entry, strict=False)))
        except ValueError:
            continue
    return _Listed(frozenset(texts), tuple(networks))


class Guard:
    """The white list of one server, compiled once per value of the settings."""

    def __init__(self, settings: Callable[[], SecuritySettings]) -> None:
        self._settings = settings
        self._source: tuple[str, ...] = ()
        self._listed = compile_white_list(())

    def allows(self, peer_ip: str) -> bool:
        """True if the peer may write. An empty list admits everyone; peer_ip is the TCP peer, never a header."""
        entries = self._settings().white_list
        if not entries:
            return True
        if entries is not self._source:
            self._listed = compile_white_list(entries)
            self._source = entries
        listed = self._listed
        if peer_ip.startswith("::ffff:"):
            peer_ip = peer_ip[7:]
        if peer_ip in listed.texts:
            return True
        if not listed.networks:
            return False
        try:
            address = ipaddress.ip_address(peer_ip)
        except ValueError:
            return False
        return any(address in network for network in listed.networks)
