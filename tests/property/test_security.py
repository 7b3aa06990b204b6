"""Tokens that nobody signed open nothing, settings are taken or refused by name, addresses are matched."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pyvolume.config import ServerConfig
from pyvolume.ops.auth import Guard, token_allows
from pyvolume.security_config import (
    CIPHER_SUITES,
    SecurityConfig,
    SecurityError,
    Settings,
    check_tls,
    cipher_list,
    tls_settings,
    white_list,
)
from pyvolume.server.grpc_tls import CommonNameCheck, name_in

SCALARS = st.one_of(st.text(max_size=30), st.integers(), st.booleans(), st.floats(), st.none(), st.binary(max_size=8))
VALUES: st.SearchStrategy[Any] = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=5), SCALARS)
)
TLS_KEYS = st.sampled_from(
    [
        "https.volume.cert",
        "https.volume.key",
        "https.volume.ca",
        "https.client.enabled",
        "https.client.cert",
        "https.client.key",
        "grpc.ca",
        "grpc.volume.cert",
        "grpc.volume.key",
        "grpc.volume.client_cert",
        "grpc.volume.allowed_commonNames",
        "tls.min_version",
        "tls.max_version",
        "tls.cipher_suites",
    ]
)


def tree(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        here = out
        *path, last = key.split(".")
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return out


@given(st.one_of(st.text(), st.from_regex(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*", fullmatch=True)))
def test_no_text_is_a_token(text: str) -> None:
    assert not token_allows(b"a key that nobody has", text, "1", "0100000001")


@given(st.dictionaries(TLS_KEYS, VALUES, max_size=6))
def test_tls_settings_are_taken_or_refused_by_name(values: dict[str, Any]) -> None:
    settings = Settings({})
    settings.merge(tree(values), Path("security.toml"))
    tls = tls_settings(settings)
    try:
        check_tls(settings, tls)
    except SecurityError as exc:
        assert any(str(exc).startswith(key.lower()) for key in values)
        return
    assert bool(tls.https_cert) == bool(tls.https_key), "never half of it"
    assert bool(tls.grpc_cert) == bool(tls.grpc_key) == bool(tls.grpc_ca)
    assert tls.https_cert or not tls.https_ca


@given(VALUES)
def test_a_white_list_that_is_written_down_is_never_empty(value: Any) -> None:
    settings = Settings({})
    settings.merge({"guard": {"white_list": value}}, Path("security.toml"))
    try:
        entries = white_list((), settings)
    except SecurityError as exc:
        assert "guard.white_list" in str(exc)
        return
    if not entries:
        assert value in (None, "", []) or isinstance(value, dict), "only what says nothing means nobody is shut out"


@given(st.ip_addresses(), st.integers(0, 128), st.ip_addresses())
def test_networks_match_as_ipaddress_says(network: Any, bits: int, peer: Any) -> None:
    bits = min(bits, network.max_prefixlen)
    entry = f"{network}/{bits}"
    guard = Guard(lambda: SecurityConfig(white_list=(entry,)))
    expected = peer.version == network.version and peer in ipaddress.ip_network(entry, strict=False)
    if peer.version == 4:
        mapped = ipaddress.IPv6Address(f"::ffff:{peer}")
        assert guard.allows(str(peer)) == guard.allows(f"::ffff:{peer}")
        if network.version == 6 and network.ipv4_mapped and bits >= 96:
            expected = mapped in ipaddress.ip_network(entry, strict=False)
        assert guard.allows(str(peer)) == expected
    elif peer.ipv4_mapped is None and not (network.version == 6 and network.ipv4_mapped):
        assert guard.allows(str(peer)) == expected


@given(st.text(max_size=200))
def test_cipher_lists(text: str) -> None:
    try:
        found = cipher_list(text)
    except ValueError as exc:
        assert str(exc).startswith("invalid tls cipher suite name ")
        return
    assert (found is None) == (not text.strip())


@given(st.lists(st.sampled_from(sorted(CIPHER_SUITES)), min_size=1))
def test_known_suites_in_any_order(names: list[str]) -> None:
    assert cipher_list(" , ".join(names)) == ":".join(CIPHER_SUITES[name] for name in names if CIPHER_SUITES[name])


@given(st.text(), st.text(), st.text())
def test_common_names(names: str, domain: str, name: str) -> None:
    allowed = CommonNameCheck(names, domain).allows(name)
    assert allowed == bool(name and (name in names.split(",") or (domain and name.endswith(domain))))


@given(st.dictionaries(st.sampled_from(["subject", "subjectAltName"]), st.just(()), max_size=2))
def test_certificates_without_names(certificate: dict[str, Any]) -> None:
    assert name_in(certificate) == ""


def test_the_settings_of_a_server_are_open_only_without_any() -> None:
    assert white_list(ServerConfig().white_list, Settings({})) == ()
