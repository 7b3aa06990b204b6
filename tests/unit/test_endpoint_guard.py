"""Which addresses may be dialled because a request named them."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Sequence

import pytest

from pyvolume.ops import endpoint_guard
from pyvolume.ops.endpoint_guard import EndpointRefused, LookupFailed, Rule
from pyvolume.ops.gourl import split_url

NAMES = {
    "s3.example.com": ["52.216.10.10"],
    "mixed.example.com": ["52.216.10.10", "127.0.0.1"],
    "inner.example.com": ["10.1.2.3"],
    "loop.example.com": ["127.0.0.1"],
    "metadata.example.com": ["169.254.169.254"],
    "v6.example.com": ["2600:1f18::1", "fe80::1"],
}


def names(host: str, timeout_s: float) -> Sequence[endpoint_guard.Address]:
    if host not in NAMES:
        raise LookupFailed(f"lookup {host}: no such host")
    return [ipaddress.ip_address(text) for text in NAMES[host]]


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        ("", "remote endpoint is empty"),
        (" ", "remote endpoint is empty"),
        ("ftp://h/", 'remote endpoint "ftp://h/" must use http or https, got "ftp"'),
        ("example.com/", 'remote endpoint "example.com/" must use http or https, got ""'),
        ("http:opaque", 'remote endpoint "http:opaque" has no host'),
        ("http://", 'remote endpoint "http://" has no host'),
        ("http://:80/", 'remote endpoint "http://:80/" has no host'),
        ("http://metadata/", 'remote endpoint "http://metadata/" targets instance metadata service'),
        ("http://METADATA.google.internal./", "targets instance metadata service"),
        ("http://127.0.0.1:8", 'remote endpoint "http://127.0.0.1:8" resolves to loopback address 127.0.0.1'),
        ("http://user@127.9.9.9/", "resolves to loopback address 127.9.9.9"),
        ("http://[::1%25lo]/", 'remote endpoint "http://[::1%25lo]/" resolves to loopback address ::1'),
        ("https://loop.example.com/", "resolves to loopback address 127.0.0.1"),
        ("https://mixed.example.com/", "resolves to loopback address 127.0.0.1"),
        ("https://inner.example.com/", "resolves to private address 10.1.2.3"),
        ("https://metadata.example.com/", "targets instance metadata service 169.254.169.254"),
        ("https://v6.example.com/", "resolves to link-local address fe80::1"),
        (
            "http://nowhere.example.com/",
            'resolve remote endpoint host "nowhere.example.com": lookup nowhere.example.com',
        ),
        ("http://%zz/", 'parse remote endpoint "http://%zz/": parse "http://%zz/": invalid URL escape "%zz"'),
        ("http://a b/", 'parse "http://a b/": invalid character " " in host name'),
        ("http://127.0.0.1:port/", 'parse "http://127.0.0.1:port/": invalid port ":port" after host'),
        (" http://127.0.0.1", 'parse " http://127.0.0.1": first path segment in URL cannot contain colon'),
        ("http://[::1", "parse \"http://[::1\": missing ']' in host"),
        ("://x", 'parse "://x": missing protocol scheme'),
        ("http://a\x00b/", 'parse "http://a\\x00b/": net/url: invalid control character in URL'),
        ("http://%31%32%37.1/", 'invalid URL escape "%31"'),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, text: str) -> None:
    with pytest.raises(EndpointRefused) as refusal:
        endpoint_guard.check_endpoint(endpoint, names)
    assert text in str(refusal.value)


@pytest.mark.parametrize(
    "endpoint", ["https://s3.example.com", "HTTP://52.216.10.10:9000/base", "http://[2600::1]:80/"]
)
def test_endpoints_that_are_let_through(endpoint: str) -> None:
    endpoint_guard.check_endpoint(endpoint, names)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback address 127.0.0.1"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("169.254.169.254", "metadata service 169.254.169.254"),
        ("::ffff:169.254.169.254", "metadata service 169.254.169.254"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("224.0.0.1", "link-local"),
        ("ff02::1", "link-local"),
        ("ff12::1", "link-local"),
        ("ff01::1", "interface-local"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.0.1", "private"),
        ("fc00::1", "private"),
        ("fd00:ec2::254", "private"),
        ("100.64.0.1", "CGNAT"),
        ("100.127.255.255", "CGNAT"),
        ("64:ff9b::7f00:1", "loopback address 127.0.0.1"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("64:ff9b:1::a00:1", "private address 10.0.0.1"),
        ("2002:a00:1::", "private address 10.0.0.1"),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", "loopback address 127.0.0.1"),
        ("::7f00:1", "loopback address 127.0.0.1"),
        ("::ffff:0:7f00:1", "loopback address 127.0.0.1"),
        ("2600::5efe:7f00:1", "loopback address 127.0.0.1"),
        ("2600::200:5efe:a9fe:a9fe", "metadata"),
    ],
)
def test_forbidden_addresses(address: str, words: str) -> None:
    with pytest.raises(EndpointRefused, match=words):
        endpoint_guard.check_address(Rule("e"), ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2600::1", "2002:808:808::", "1.1.1.1"])
def test_addresses_of_the_world(address: str) -> None:
    endpoint_guard.check_address(Rule("e"), ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("", "replica target is empty"),
        ("127.0.0.1:7000/status/x/?a=", "must be a bare host:port"),
        ("http://10.0.0.7:8080", "must be a bare host:port"),
        ("10.0.0.7:8080#x", "must be a bare host:port"),
        ("10.0.0.7:8080\\x", "must be a bare host:port"),
        ("10.0.0.7:80 80", "must be a bare host:port"),
        ("10.0.0.7:80\r\nX: y", "must be a bare host:port"),
        ("user@10.0.0.7:8080", "must be a bare host:port"),
        ("10.0.0.7", "must be a bare host:port: address 10.0.0.7: missing port in address"),
        ("::1:80", "must be a bare host:port: address ::1:80: too many colons in address"),
        ("[::1", "missing ']' in address"),
        (":8080", 'replica target ":8080" has no host'),
        ("metadata:80", 'replica target "metadata:80" targets instance metadata service'),
        ("127.0.0.1:8080", 'remote endpoint "127.0.0.1:8080" resolves to loopback address 127.0.0.1'),
        ("[::1]:8080", "loopback"),
        ("0.0.0.0:8080", "unspecified"),
        ("169.254.169.254:80", "metadata"),
        ("[fd00:ec2::254]:80", "metadata"),
        ("100.100.100.200:80", "metadata"),
        ("loop.example.com:8080", "loopback"),
        ("metadata.example.com:8080", "metadata"),
        ("nowhere.example.com:1", 'resolve replica target host "nowhere.example.com"'),
    ],
)
def test_replicas_that_are_refused(target: str, text: str) -> None:
    with pytest.raises(EndpointRefused) as refusal:
        endpoint_guard.check_replica(target, names)
    assert text in str(refusal.value)


@pytest.mark.parametrize("target", ["10.0.0.7:8080", "192.168.1.5:8080", "inner.example.com:8080", "[fd00::1]:80"])
def test_replicas_may_be_private(target: str) -> None:
    endpoint_guard.check_replica(target, names)


# ------------------------------------------------------------------------------------------------------ at the dial


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that would have been dialled; nobody is there."""
    seen: list[str] = []

    def refuse(address: tuple[str, int], timeout_s: float, source: object) -> socket.socket:
        seen.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(endpoint_guard.socket, "create_connection", refuse)
    return seen


def test_only_checked_addresses_are_dialled_never_the_name(dialled: list[str]) -> None:
    with pytest.raises(ConnectionRefusedError):
        endpoint_guard.dial("mixed.example.com", 80, Rule("e"), lookup=names)
    assert dialled == ["52.216.10.10"]


@pytest.mark.parametrize("host", ["loop.example.com", "127.0.0.1", "::1", "10.0.0.5"])
def test_a_name_that_came_to_mean_another_address_is_not_dialled(dialled: list[str], host: str) -> None:
    with pytest.raises(EndpointRefused):
        endpoint_guard.dial(host, 80, Rule("e"), lookup=names)
    assert dialled == []


def test_not_all_addresses_of_a_name_are_tried(dialled: list[str]) -> None:
    many = [ipaddress.ip_address(f"8.8.8.{number}") for number in range(50)]
    with pytest.raises(ConnectionRefusedError):
        endpoint_guard.dial("many.example.com", 80, Rule("e"), lookup=lambda host, timeout_s: many)
    assert len(dialled) == endpoint_guard.MAX_TRIES


def test_a_resolver_that_hangs_costs_its_time_out_and_a_bounded_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    running = []

    def hang(*args: object, **kwargs: object) -> list[object]:
        running.append(1)
        release.wait(30)
        return []

    monkeypatch.setattr(endpoint_guard.socket, "getaddrinfo", hang)
    try:
        for _ in range(endpoint_guard.MAX_LOOKUPS_AT_ONCE + 3):
            with pytest.raises(LookupFailed, match=r"lookup slow.example.com: i/o timeout"):
                endpoint_guard.resolve("slow.example.com", 0.01)
        assert len(running) <= endpoint_guard.MAX_LOOKUPS_AT_ONCE
    finally:
        release.set()


def test_resolve_knows_this_machine_and_no_other_text() -> None:
    assert any(address.is_loopback for address in endpoint_guard.resolve("localhost", 2.0))
    for bad in ("nowhere.invalid", "a b", "\u24db", "x" * 300):
        with pytest.raises(LookupFailed):
            endpoint_guard.resolve(bad, 2.0)


def test_urls_are_taken_apart_as_go_does() -> None:
    url = split_url("HTTPS://u:p@[fe80::1%25en0]:443/a%20b?x#y")
    assert (url.scheme, url.host, url.port, url.path) == ("https", "fe80::1%en0", "443", "/a%20b")
    assert split_url("///x").host == ""
    assert split_url("mailto:x").host == ""
    for bad in ("http://u%zz@h/", "http://h/%", "http://u[@h/"):
        with pytest.raises(ValueError, match="parse"):
            split_url(bad)
