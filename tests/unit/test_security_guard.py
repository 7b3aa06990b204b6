"""Who counts as the caller of an RPC, and what -guardPeers closes (contract operations.md 3.1, 3.2; S3)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_helpers import VolumeClient, bare_server

from pyvolume.ops.context import Events
from pyvolume.pb import volume_server_pb2
from pyvolume.server.grpc.calls import peer_ip
from pyvolume.server.grpc.methods import RPCS
from pyvolume.server.grpc.service import GrpcServer, make_grpc_server

Code = grpc.StatusCode
OPEN_FOR_PEERS = {"ReceiveFile", "WriteNeedleBlob", "VolumeEcBlobDelete", "VolumeEcShardsMount"}
"""Named by the contract; what else changes state and is open is in the matrix."""


def mounted(_call: Any, _request: Any) -> Any:
    return volume_server_pb2.VolumeMountResponse()


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Any, VolumeClient]]]:
    made: list[tuple[GrpcServer, VolumeClient]] = []

    def run(white_list: tuple[str, ...], bind: str = "127.0.0.1:0", **config: Any) -> tuple[Any, VolumeClient]:
        context = bare_server(**config)
        context.events = Events()
        context.security.white_list = white_list
        server = make_grpc_server(context, bind, handlers={"VolumeMount": mounted})
        server.start()
        client = VolumeClient(server.port)
        made.append((server, client))
        return context, client

    yield run
    for server, client in made:
        client.close()
        server.stop(0)


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.0.0.0/8", True),
        ("::ffff:127.0.0.0/104", True),
        ("::1", False),
        ("::/0", False),
        ("10.0.0.0/8", False),
    ],
)
def test_ipv4_callers_of_a_dual_stack_port_count_as_ipv4(start: Any, entry: str, allowed: bool) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no dual-stack sockets here")
    _, client = start((entry,), "[::]:0")
    answer = client.call("VolumeMount")
    if allowed:
        assert answer.code is Code.OK
    else:
        assert (answer.code, answer.details) == (Code.PERMISSION_DENIED, "not authorized: 127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "ip"),
    [
        ("ipv4:1.2.3.4:5", "1.2.3.4"),
        ("ipv6:%5B::1%5D:5", "::1"),
        ("ipv6:[::ffff:1.2.3.4]:5", "1.2.3.4"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", "fe80::1"),
        ("unix:/tmp/s", None),
        ("unix:", None),
        ("", None),
    ],
)
def test_addresses_of_callers(peer: str, ip: str | None) -> None:
    assert peer_ip(peer) == ip


@pytest.mark.parametrize("key", ["x-forwarded-for", "x-real-ip", "forwarded"])
def test_metadata_does_not_make_a_peer(start: Any, key: str) -> None:
    _, client = start(("10.1.1.1",))
    answer = client.call("VolumeMount", metadata=((key, "10.1.1.1"),))
    assert answer.code is Code.PERMISSION_DENIED


@pytest.mark.parametrize("guard_peers", [False, True])
def test_which_calls_the_list_covers(start: Any, guard_peers: bool) -> None:
    _, client = start(("10.0.0.1",), guard_peers=guard_peers)
    refused = {name for name in RPCS if client.call(name).code is Code.PERMISSION_DENIED}
    expected = {rpc.name for rpc in RPCS.values() if rpc.guarded or (guard_peers and rpc.changes)}
    assert refused == expected
    assert not guard_peers or refused >= OPEN_FOR_PEERS
    if not guard_peers:
        assert len(refused) == 30 and not refused & OPEN_FOR_PEERS


def test_every_call_that_changes_anything_is_known_as_such() -> None:
    """A new RPC must be put on one side or the other: -guardPeers closes what `changes` says."""
    reading = {rpc.name for rpc in RPCS.values() if not rpc.changes}
    suspicious = (
        "Delete",
        "Write",
        "Receive",
        "Mark",
        "Set",
        "Allocate",
        "Mount",
        "Move",
        "Generate",
        "Rebuild",
        "Leave",
    )
    assert not [name for name in reading if any(word in name for word in suspicious)]
