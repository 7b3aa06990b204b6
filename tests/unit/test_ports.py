"""Ports of servers that are about to be started: nobody else gets them, they themselves do."""

from __future__ import annotations

import socket

from tools import ports


def test_a_port_found_free_went_to_somebody_else_before_the_server_had_started() -> None:
    given = set(ports.free_ports(50))
    assert len(given) == 50
    with socket.create_server((ports.HOST, 0)) as listener:
        for number in range(2000):
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, number % 2)
                sock.bind((ports.HOST, 0))
                assert sock.getsockname()[1] not in given
            with socket.create_connection(listener.getsockname()) as outgoing, listener.accept()[0]:
                assert outgoing.getsockname()[1] not in given


def test_a_server_has_its_port_and_has_it_again() -> None:
    for host in (ports.HOST, ""):
        port = ports.free_port()
        for _ in range(2):
            with socket.create_server((host, port)), socket.create_connection((ports.HOST, port)):
                pass


def test_a_held_port_is_no_listening_one() -> None:
    with socket.socket() as sock:
        sock.settimeout(5)
        assert sock.connect_ex((ports.HOST, ports.free_port())) != 0


def test_ports_are_held_up_to_a_bound() -> None:
    ports.free_ports(ports.MOST_HELD + 10)
    assert len(ports._held) == ports.MOST_HELD
